/* A KV compressor of DeepSeek-V4 in C11: plain loops in fp32, token after token, rows in bf16 or fp32.

   It is written to be read, and to be right under any split of a sequence into steps. What it computes, per request:
   every token leaves a state row [kv | score + ape] in a ring, at its position modulo the ring's length. The token that
   completes window w (position w r + r - 1) pools the window's rows, and with overlap those of the window before; the
   pooled row is normed, rotated at position w r, and written to the cache.

   kvc_init, kvc_step, kvc_get_state, kvc_put_state and kvc_reset return NULL, or a text that says what is wrong. Then
   nothing has been written. Nothing here knows where the numbers come from: see driver.c and vectors.c. */
#ifndef KVC_COMPRESSOR_H
#define KVC_COMPRESSOR_H

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef __clang__
#pragma STDC FP_CONTRACT OFF /* gcc has it off with -std=c11: a * b + c is rounded twice, as everywhere else */
#endif

enum { KVC_CANARY = 0xA5 }; /* what a cache holds that nobody has written */
#define KVC_FILLED ((int64_t)1 << 30) /* bytes from which on a cache stays untouched, so that it costs no memory */

typedef enum { KVC_REFERENCE, KVC_FUSED, KVC_LATENT } kvc_rounding; /* where a row becomes bf16 on its way */

typedef struct {
  int64_t ratio;    /* r: tokens of a window */
  int64_t head_dim; /* d: channels of a row; projected are N = d of kv, with overlap N = 2 d, and as many scores */
  int64_t rope_dim; /* the last channels, rotated in pairs (2i, 2i + 1) */
  int64_t overlap;  /* channels [0, d) count while a token is in the window before, [d, 2d) in its own */
  int64_t rotate;   /* Hadamard rotation after RoPE */
  int64_t fp32;     /* elements of the cache are fp32, not bf16 */
  double eps;
  kvc_rounding rounding;
  int64_t num_slots, max_draft, num_pages, page_rows, max_positions;
  int64_t table_rows; /* of cosines and sines */
  const float *norm;  /* [d]; this and what follows must stay where it is until the next kvc_init */
  const float *ape;   /* [r, N], or NULL */
  const float *cosines, *sines; /* [table_rows, rope_dim / 2] */
} kvc_setup;

typedef struct {
  int64_t tokens, requests, pages;
  const float *kv_score;          /* [tokens, 2N]; those behind the last request are ignored */
  const int64_t *query_start_loc; /* [requests + 1] */
  const int64_t *start_positions, *draft_rows, *state_slots; /* [requests]; slot -1: the request is not there */
  const int64_t *block_table;  /* [requests, pages]: the page of rows 0, 1, ..., or NULL: */
  const int64_t *slot_mapping; /* [tokens]: the row for the window that a token completes; -1: it is not written */
} kvc_batch;

typedef struct {
  kvc_setup s;
  int64_t width, window, ring; /* N; tokens that a row reads; state rows of a slot */
  int64_t row_bytes;           /* of the cache */
  float *state;                /* [num_slots, ring, 2N] */
  int64_t *tags;               /* [num_slots, ring]: the position that a state row holds, or -1 */
  int64_t *seen, steps;        /* [num_slots]: the last step that named the slot */
  void *cache;                 /* [num_pages * page_rows, d] */
  float *scratch;              /* [3, d] */
  char error[200];
} kvc_compressor;

/* "argument: expected LIMIT, got VALUE". The text is the compressor's, and holds until the next one. */
static const char *kvc_wrong(kvc_compressor *c, const char *what, int64_t limit, int64_t got) {
  snprintf(c->error, sizeof c->error, "%s %lld, got %lld", what, (long long)limit, (long long)got);
  return c->error;
}

/* To bf16 and back: nearest, ties to even. */
static inline uint16_t kvc_to_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  if (x != x) return 0x7fc0;
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline float kvc_rounded(float x) {
  uint32_t bits = (uint32_t)kvc_to_bf16(x) << 16;
  memcpy(&x, &bits, sizeof x);
  return x;
}

static inline int64_t kvc_times(int64_t a, int64_t b) { return b && a > INT64_MAX / b ? INT64_MAX : a * b; }

static inline void *kvc_memory(int64_t count, int64_t size) {
  int64_t bytes = kvc_times(count, size);
  return bytes > INT64_MAX / 2 ? NULL : malloc((size_t)(bytes ? bytes : 1));
}

static inline void kvc_free(kvc_compressor *c) {
  free(c->state), free(c->tags), free(c->seen), free(c->cache), free(c->scratch);
  memset(c, 0, sizeof *c);
}

/* State rows of a slot: nobody's, and NaN, so that whoever reads them shows it. */
static inline void kvc_forget(kvc_compressor *c, int64_t slot) {
  memset(c->state + slot * c->ring * 2 * c->width, 0xff, (size_t)(c->ring * 2 * c->width) * sizeof(float));
  for (int64_t i = 0; i < c->ring; i++) c->tags[slot * c->ring + i] = -1;
}

/* Start over: no state, a cache of canaries. A compressor of zeros is one that can be started. */
static inline const char *kvc_init(kvc_compressor *c, const kvc_setup *setup) {
  const kvc_setup s = *setup;
  kvc_free(c);
  const struct { const char *name; int64_t value, low, most; } sizes[] = {
      {"ratio", s.ratio, 1, 1 << 16}, {"head_dim", s.head_dim, 1, 1 << 16}, {"rope_dim", s.rope_dim, 0, s.head_dim},
      {"num_slots", s.num_slots, 1, 1 << 24}, {"max_draft", s.max_draft, 0, 1 << 20},
      {"num_pages", s.num_pages, 1, (int64_t)1 << 40}, {"page_rows", s.page_rows, 1, 1 << 20},
      {"max_positions", s.max_positions, 1, (int64_t)1 << 31}};
  for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
    char what[64];
    snprintf(what, sizeof what, "%s: expected at %s", sizes[i].name, sizes[i].value < sizes[i].low ? "least" : "most");
    if (sizes[i].value < sizes[i].low) return kvc_wrong(c, what, sizes[i].low, sizes[i].value);
    if (sizes[i].value > sizes[i].most) return kvc_wrong(c, what, sizes[i].most, sizes[i].value);
  }
  if (s.rope_dim % 2) return kvc_wrong(c, "rope_dim: expected an even number up to", s.head_dim, s.rope_dim);
  if (s.rotate && s.head_dim & (s.head_dim - 1)) return "rotate: expected a head_dim that is a power of two";
  if (!(s.eps > 0 && isfinite(s.eps))) return "eps: expected a positive finite number";
  c->s = s;
  c->width = s.head_dim * (s.overlap ? 2 : 1);
  c->window = s.ratio * (s.overlap ? 2 : 1);
  /* A step may be taken back by max_draft tokens, and the window that is open there still needs its rows. */
  c->ring = c->window - 1 + (s.max_draft ? s.max_draft : 1);
  c->state = kvc_memory(kvc_times(kvc_times(s.num_slots, c->ring), 2 * c->width), sizeof *c->state);
  c->tags = kvc_memory(kvc_times(s.num_slots, c->ring), sizeof *c->tags);
  c->seen = kvc_memory(s.num_slots, sizeof *c->seen);
  c->scratch = kvc_memory(3 * s.head_dim, sizeof *c->scratch);
  int64_t rows = kvc_times(s.num_pages, s.page_rows); /* elements are far beyond 2^31 in a large cache */
  c->row_bytes = s.head_dim * (s.fp32 ? 4 : 2);
  c->cache = kvc_memory(rows, c->row_bytes);
  if (!c->state || !c->tags || !c->seen || !c->scratch || !c->cache) {
    kvc_free(c);
    return "init: expected room for state and cache, got too little memory";
  }
  if (rows < KVC_FILLED / c->row_bytes) memset(c->cache, KVC_CANARY, (size_t)(rows * c->row_bytes));
  for (int64_t slot = 0; slot < s.num_slots; slot++) c->seen[slot] = 0, kvc_forget(c, slot);
  return NULL;
}

/* First position whose row a request at this position still needs. */
static inline int64_t kvc_live_start(const kvc_compressor *c, int64_t position) {
  int64_t first = position / c->s.ratio * c->s.ratio - (c->s.overlap ? c->s.ratio : 0);
  return first < 0 ? 0 : first;
}

static inline float *kvc_row(const kvc_compressor *c, int64_t slot, int64_t position) {
  return c->state + (slot * c->ring + position % c->ring) * 2 * c->width;
}

static inline int64_t *kvc_tag(const kvc_compressor *c, int64_t slot, int64_t position) {
  return c->tags + slot * c->ring + position % c->ring;
}

/* Whether a slot is one, and holds every row that a request at this position goes on from. */
static inline const char *kvc_continues(kvc_compressor *c, int64_t slot, int64_t position) {
  if (slot < 0 || slot >= c->s.num_slots)
    return kvc_wrong(c, "state_slots: expected a slot below", c->s.num_slots, slot);
  if (position < 0 || position > c->s.max_positions)
    return kvc_wrong(c, "start_positions: expected a position up to", c->s.max_positions, position);
  for (int64_t p = kvc_live_start(c, position); p < position; p++)
    if (*kvc_tag(c, slot, p) != p)
      return kvc_wrong(c, "start_positions: expected one that the state goes on at, which lacks position", p, position);
  return NULL;
}

static inline int kvc_order(const void *a, const void *b) {
  int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
  return (x > y) - (x < y);
}

/* Whether request q has tokens that count; an engine pads a batch with requests that have none, or no slot. */
static inline int kvc_active(const kvc_batch *b, int64_t q) {
  return b->state_slots[q] != -1 && b->start_positions[q] != -1 && b->query_start_loc[q + 1] > b->query_start_loc[q];
}

/* Cache row of window w of request q, which token t completes; -1: none. */
static inline int64_t kvc_slot(const kvc_compressor *c, const kvc_batch *b, int64_t q, int64_t w, int64_t t) {
  if (b->slot_mapping) return b->slot_mapping[t];
  return b->block_table[q * b->pages + w / c->s.page_rows] * c->s.page_rows + w % c->s.page_rows;
}

/* Windows of request q, each with a cache row that is there; their rows go to found, if it is not NULL. */
static inline const char *kvc_check_windows(kvc_compressor *c, const kvc_batch *b, int64_t q, int64_t *found) {
  int64_t r = c->s.ratio, first = b->query_start_loc[q], start = b->start_positions[q];
  int64_t end = start + b->query_start_loc[q + 1] - first, rows = c->s.num_pages * c->s.page_rows;
  for (int64_t w = start / r; w < end / r; w++) {
    if (c->s.rope_dim && w * r >= c->s.table_rows)
      return kvc_wrong(c, "cos: expected rows of every position; the last one is", c->s.table_rows - 1, w * r);
    int64_t page = w / c->s.page_rows;
    if (b->block_table) {
      if (page >= b->pages) return kvc_wrong(c, "block_table: expected more pages than", page, b->pages);
      int64_t entry = b->block_table[q * b->pages + page];
      if (entry < 0 || entry >= c->s.num_pages)
        return kvc_wrong(c, "block_table: expected a page from 0, below", c->s.num_pages, entry);
    }
    int64_t slot = kvc_slot(c, b, q, w, first + w * r + r - 1 - start);
    if (slot < -1 || slot >= rows) return kvc_wrong(c, "slot_mapping: expected -1, or a row below", rows, slot);
    if (found) *found++ = slot;
  }
  return NULL;
}

/* Everything that a step names, before it writes anything. */
static inline const char *kvc_check(kvc_compressor *c, const kvc_batch *b) {
  const int64_t *begin = b->query_start_loc;
  int64_t windows = 0, shared = 0;
  if (!b->block_table == !b->slot_mapping) return "slot_mapping: expected one of block_table and slot_mapping";
  if (begin[0] != 0) return kvc_wrong(c, "query_start_loc: expected to begin with", 0, begin[0]);
  for (int64_t q = 0; q < b->requests; q++)
    if (begin[q + 1] < begin[q]) return kvc_wrong(c, "query_start_loc: expected at least", begin[q], begin[q + 1]);
  if (begin[b->requests] > b->tokens) return kvc_wrong(c, "kv_score: expected rows", begin[b->requests], b->tokens);
  c->steps++;
  for (int64_t q = 0; q < b->requests; q++) {
    int64_t count = begin[q + 1] - begin[q], start = b->start_positions[q], slot = b->state_slots[q], most;
    const char *wrong;
    if (!kvc_active(b, q)) continue;
    if ((wrong = kvc_continues(c, slot, start))) return wrong;
    if (c->seen[slot] == c->steps)
      return kvc_wrong(c, "state_slots: expected every slot once, below", c->s.num_slots, slot);
    c->seen[slot] = c->steps;
    most = count < c->s.max_draft ? count : c->s.max_draft;
    if (b->draft_rows[q] < 0 || b->draft_rows[q] > most)
      return kvc_wrong(c, "draft_rows: expected from 0 to", most, b->draft_rows[q]);
    if (count > c->s.max_positions - start)
      return kvc_wrong(c, "start_positions: expected to end at", c->s.max_positions, start + count);
    if ((wrong = kvc_check_windows(c, b, q, NULL))) return wrong;
    windows += (start + count) / c->s.ratio - start / c->s.ratio;
  }
  int64_t *rows = kvc_memory(windows, sizeof *rows), n = 0;
  if (!rows) return "step: expected room for a list of windows, got too little memory";
  for (int64_t q = 0; q < b->requests; q++) {
    if (!kvc_active(b, q)) continue;
    int64_t start = b->start_positions[q];
    kvc_check_windows(c, b, q, rows + n);
    n += (start + begin[q + 1] - begin[q]) / c->s.ratio - start / c->s.ratio;
  }
  qsort(rows, (size_t)n, sizeof *rows, kvc_order);
  for (int64_t i = 1; i < n; i++) shared |= rows[i] >= 0 && rows[i] == rows[i - 1];
  free(rows);
  return shared ? "slot_mapping: expected a cache row of its own for each window" : NULL;
}

/* P = sum(e^z K) / sum(e^z) per channel, oldest token first whatever the step: the order is what makes splits exact. */
static inline void kvc_pool(const kvc_compressor *c, int64_t slot, int64_t start, float *pooled) {
  int64_t d = c->s.head_dim, first = kvc_live_start(c, start); /* nothing lies before position 0 */
  float *top = c->scratch + d, *total = c->scratch + 2 * d;
  for (int64_t i = 0; i < d; i++) top[i] = -INFINITY, total[i] = pooled[i] = 0;
  for (int64_t p = first; p < start + c->s.ratio; p++) {
    const float *score = kvc_row(c, slot, p) + c->width + (p >= start ? c->width - d : 0);
    for (int64_t i = 0; i < d; i++) top[i] = score[i] > top[i] ? score[i] : top[i];
  }
  for (int64_t p = first; p < start + c->s.ratio; p++) {
    const float *kv = kvc_row(c, slot, p) + (p >= start ? c->width - d : 0), *score = kv + c->width;
    for (int64_t i = 0; i < d; i++) {
      float weight = expf(score[i] - top[i]);
      total[i] += weight;
      pooled[i] += weight * kv[i];
    }
  }
  for (int64_t i = 0; i < d; i++) pooled[i] /= total[i];
}

/* Norm, RoPE at the window's first position, Hadamard; in place. */
static inline void kvc_finish(const kvc_compressor *c, int64_t position, float *x) {
  int64_t d = c->s.head_dim, half = c->s.rope_dim / 2;
  int reference = c->s.rounding == KVC_REFERENCE, latent = c->s.rounding != KVC_FUSED;
  double squares = 0;
  for (int64_t i = 0; i < d; i++) {
    if (reference) x[i] = kvc_rounded(x[i]);
    squares += (double)x[i] * x[i];
  }
  float scale = (float)(1 / sqrt(squares / (double)d + c->s.eps));
  for (int64_t i = 0; i < d; i++) {
    x[i] = c->s.norm[i] * (x[i] * scale);
    if (latent) x[i] = kvc_rounded(x[i]);
  }
  for (int64_t i = 0; i < half; i++) {
    float *pair = x + d - 2 * half + 2 * i, a = pair[0], b = pair[1];
    float cosine = c->s.cosines[position * half + i], sine = c->s.sines[position * half + i];
    pair[0] = a * cosine - b * sine;
    pair[1] = a * sine + b * cosine;
    if (reference) pair[0] = kvc_rounded(pair[0]), pair[1] = kvc_rounded(pair[1]);
  }
  if (!c->s.rotate) return;
  for (int64_t step = 1; step < d; step *= 2) /* butterflies: H_d in natural order */
    for (int64_t i = 0; i < d; i++)
      if (!(i & step)) {
        float a = x[i], b = x[i + step];
        x[i] = a + b, x[i + step] = a - b;
      }
  for (int64_t i = 0; i < d; i++) x[i] *= (float)(1 / sqrt((double)d));
}

/* One token: its state row, and the cache row if it completes a window. */
static inline void kvc_take(kvc_compressor *c, const kvc_batch *b, int64_t q, int64_t token, int64_t position) {
  int64_t n = c->width, d = c->s.head_dim, r = c->s.ratio, slot = b->state_slots[q];
  const float *from = b->kv_score + token * 2 * n, *ape = c->s.ape ? c->s.ape + position % r * n : NULL;
  float *row = kvc_row(c, slot, position);
  for (int64_t i = 0; i < n; i++) row[i] = from[i], row[n + i] = ape ? from[n + i] + ape[i] : from[n + i];
  *kvc_tag(c, slot, position) = position;
  if ((position + 1) % r) return;
  int64_t at = kvc_slot(c, b, q, position / r, token);
  if (at < 0) return;
  kvc_pool(c, slot, position / r * r, c->scratch);
  kvc_finish(c, position / r * r, c->scratch);
  float *fp32 = c->cache;
  uint16_t *bf16 = c->cache;
  for (int64_t i = 0; i < d; i++)
    if (c->s.fp32) fp32[at * d + i] = c->scratch[i];
    else bf16[at * d + i] = kvc_to_bf16(c->scratch[i]);
}

/* One step of all requests. */
static inline const char *kvc_step(kvc_compressor *c, const kvc_batch *b) {
  const char *wrong = kvc_check(c, b);
  if (wrong) return wrong;
  for (int64_t q = 0; q < b->requests; q++) {
    if (!kvc_active(b, q)) continue;
    int64_t first = b->query_start_loc[q], start = b->start_positions[q], *tags = kvc_tag(c, b->state_slots[q], 0);
    for (int64_t i = 0; i < c->ring; i++)
      if (tags[i] >= start) tags[i] = -1; /* rejected drafts, or the slot's last owner */
    for (int64_t t = first; t < b->query_start_loc[q + 1]; t++) kvc_take(c, b, q, t, start + t - first);
  }
  return NULL;
}

/* How many rows a request at this position goes on from. */
static inline int64_t kvc_state_rows(const kvc_compressor *c, int64_t position) {
  return position - kvc_live_start(c, position);
}

/* Those rows [n, 2N], oldest first. */
static inline const char *kvc_get_state(kvc_compressor *c, int64_t slot, int64_t position, float *rows) {
  const char *wrong = kvc_continues(c, slot, position);
  if (wrong) return wrong;
  for (int64_t p = kvc_live_start(c, position); p < position; p++, rows += 2 * c->width)
    memcpy(rows, kvc_row(c, slot, p), (size_t)(2 * c->width) * sizeof *rows);
  return NULL;
}

/* The other way around: the slot holds these rows and nothing else. */
static inline const char *kvc_put_state(kvc_compressor *c, int64_t slot, int64_t position, const float *rows) {
  if (slot < 0 || slot >= c->s.num_slots) return kvc_wrong(c, "slot: expected a slot below", c->s.num_slots, slot);
  kvc_forget(c, slot);
  for (int64_t p = kvc_live_start(c, position); p < position; p++, rows += 2 * c->width) {
    memcpy(kvc_row(c, slot, p), rows, (size_t)(2 * c->width) * sizeof *rows);
    *kvc_tag(c, slot, p) = p;
  }
  return NULL;
}

/* Slots get new owners. */
static inline const char *kvc_reset(kvc_compressor *c, const int64_t *slots, int64_t count) {
  for (int64_t i = 0; i < count; i++)
    if (slots[i] < 0 || slots[i] >= c->s.num_slots)
      return kvc_wrong(c, "slots: expected a slot below", c->s.num_slots, slots[i]);
  for (int64_t i = 0; i < count; i++) kvc_forget(c, slots[i]);
  return NULL;
}

/* Row of the cache [d]; NULL if there is no such row. */
static inline const void *kvc_cache_row(const kvc_compressor *c, int64_t row) {
  int64_t rows = c->s.num_pages * c->s.page_rows;
  return row < 0 || row >= rows ? NULL : (const unsigned char *)c->cache + row * c->row_bytes;
}

#endif
