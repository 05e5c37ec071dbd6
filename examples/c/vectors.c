/* A compressor in C on a test vector of kvcondense: what VECTOR.json says is done, what came out is written.

   cc -std=c11 -O2 -Wall -Wextra -Werror examples/c/vectors.c -lm -o vectors
   kvcondense vectors write build/vectors
   ./vectors build/vectors/NAME.json out/NAME.safetensors
   kvcondense vectors check build/vectors --against out

   docs/vectors.md has the entries. Exit status: 0 if OUT.safetensors was written. Else one line says why not: 1 what is
   to be done was refused, 2 the vector is none, 3 it needs what is not there. For an engine of your own, keep this
   file and safetensors.h, and put your calls where kvc_... stands. */
#include "compressor.h"
#include "safetensors.h"

static const char *const ABLE[] = {
    "exact", "chunks", "ragged", "max_draft", "mixed", "inert", "spare", "unmapped", "exports", "begins", "huge_cache",
    "refuses", "format bf16", "format fp32", "compressor csa", "compressor hca", "compressor indexer",
    "compressor fused", "compressor r2"};
enum { REFUSED = 1, NO_VECTOR = 2, UNABLE = 3, MOST_TOKENS = 1 << 16, MOST_POSITIONS = 1 << 22, MOST_REPEATS = 64 };
#define MOST ((int64_t)1 << 28) /* bytes of anything */
#define ANY ((int64_t)1 << 62)

static json *vector;  /* the whole file */
static tensors given; /* the file beside it */
static kvc_compressor compressor;
static const int8_t *pattern; /* [patterns, d], or NULL */
static int64_t patterns;
static uint32_t seed;
static float scale;

static _Noreturn void stop(int status, const char *what, const char *why) {
  fprintf(stderr, "%s%s%s\n", what, *why ? ": " : "", why);
  exit(status);
}

/* Entries and their kinds: " string, i integer, n number, ? number or null, b boolean, S list of strings, I list of
   integers, L list of lists of integers, { object, [ list of objects. */
static const char *const ENTRIES[] = {
    "\"name", "\"invariant", "\"promise", "\"bug_class", "Sneeds", "{compressor", "\"format", "ipage_rows",
    "inum_pages", "inum_slots", "imax_draft", "imax_positions", "iseed", "nscale", "[ops", "Iread", "Lequal",
    "Iuntouched", "nmin_equal", "irepeat", "bpattern", "bexact", "?tensor_scale", "ischema", NULL};
static const char *const COMPRESSOR[] = {"iratio", "ihead_dim", "neps", "irope_dim", "boverlap", "brotate",
                                         "bhas_ape", "bhas_gate", "\"rounding", NULL};
static const char *const STEP[] = {"\"op", "Lpieces", "Iquery_start_loc", "Istart_positions", "Idraft_rows",
                                   "Istate_slots", "Islot_mapping", "ifirst_page?", "Lblock_table?", "\"why?", NULL};
static const char *const BEGIN[] = {"\"op", "islot", "iposition", NULL};
static const char *const COPY[] = {"\"op", "islot", "ito", "iposition", NULL};
static const char *const RESET[] = {"\"op", "islot", NULL};
static const struct { const char *name; const char *const *entries; } OPS[] = {
    {"step", STEP}, {"refuse", STEP}, {"begin", BEGIN}, {"copy", COPY}, {"reset", RESET}};

static int is_a(char kind, const json *v) {
  static const char lists[] = "SIL[", inside[] = "\"iI{";
  int64_t whole;
  if (kind == '"' || kind == '{') return v->kind == kind;
  if (kind == 'b') return v->kind == 't' || v->kind == 'f';
  if (kind == 'i') return json_int(v, -ANY, ANY, &whole);
  if (kind == 'n' || kind == '?') return v->kind == 0 || (kind == '?' && v->kind == 'n');
  if (v->kind != '[') return 0;
  for (const json *e = v + 1; e < v + v->size; e += e->size)
    if (!is_a(inside[strchr(lists, kind) - lists], e)) return 0;
  return 1;
}

/* An object has these entries, and no others; those that end with ? may be absent. */
static void check_entries(const json *object, const char *const *entries, const char *what) {
  int64_t members = 0, found = 0;
  for (const json *k = object + 1; k < object + object->size; k += 1 + k[1].size) members++;
  for (; *entries; entries++) {
    char name[32];
    size_t length = strlen(*entries + 1), optional = (*entries)[length] == '?';
    snprintf(name, sizeof name, "%.*s", (int)(length - optional), *entries + 1);
    const json *v = json_get(object, name);
    if (v ? !is_a(**entries, v) : !optional) stop(NO_VECTOR, what, name);
    found += v != NULL;
  }
  if (found != members) stop(NO_VECTOR, what, "an entry that is none");
}

static void check_vector(void) {
  check_entries(vector, ENTRIES, "vector");
  check_entries(json_get(vector, "compressor"), COMPRESSOR, "compressor");
  const json *ops = json_get(vector, "ops");
  for (const json *op = ops + 1; op < ops + ops->size; op += op->size) {
    size_t i = 0;
    while (i < 5 && !json_is(json_get(op, "op"), OPS[i].name)) i++;
    if (i == 5) stop(NO_VECTOR, "op", "none of step, refuse, begin, copy, reset");
    check_entries(op, OPS[i].entries, OPS[i].name);
  }
}

static int64_t integer(const json *object, const char *key, int64_t low, int64_t high) {
  int64_t found = 0;
  if (!json_int(json_get(object, key), low, high, &found)) stop(NO_VECTOR, key, "an integer that cannot be");
  return found;
}

static double number(const json *object, const char *key) {
  double found = strtod(json_get(object, key)->text, NULL);
  if (!(found > -1e30 && found < 1e30)) stop(NO_VECTOR, key, "a number that is too large");
  return found;
}

static int truth(const json *object, const char *key) { return json_get(object, key)->kind == 't'; }

static void *memory(int64_t count, int64_t size) {
  void *found = kvc_times(count, size) > MOST ? NULL : kvc_memory(count, size);
  if (!found) stop(UNABLE, "too little memory", "");
  return found;
}

/* The integers of a list; count: how many there must be, -1 for any, which becomes how many there are. */
static int64_t *integers(const json *list, const char *name, int64_t *count) {
  int64_t *found = memory(list->size, sizeof *found);
  if (*count >= 0 && *count != list->size - 1) stop(NO_VECTOR, name, "a list of another length");
  *count = list->size - 1;
  for (int64_t i = 0; i < *count; i++) json_int(list + 1 + i, -ANY, ANY, &found[i]);
  return found;
}

static unsigned char *read_file(const char *path, int64_t most, int64_t *size) {
  FILE *from = fopen(path, "rb");
  if (!from || fseek(from, 0, SEEK_END)) stop(NO_VECTOR, path, "cannot be read");
  *size = ftell(from);
  if (*size < 0 || *size > most) stop(NO_VECTOR, path, "too large");
  unsigned char *found = memory(*size + 1, 1);
  rewind(from);
  if (fread(found, 1, (size_t)*size, from) != (size_t)*size) stop(NO_VECTOR, path, "cannot be read");
  fclose(from);
  return found[*size] = 0, found;
}

/* --8<-- [start:generator] */
static float value(uint32_t stream, uint32_t i) {
  uint32_t x = i * 0x9E3779B1u + seed * 0x85EBCA77u + stream * 0xC2B2AE3Du + 0x165667B1u;
  x = (x ^ x >> 15) * 0x2C1B3C6Du;
  x = (x ^ x >> 12) * 0x297A2D39u;
  x ^= x >> 15;
  return (float)((int32_t)(x >> 8) - (1 << 23)) / (float)(1 << 22);
}
/* --8<-- [end:generator] */

static const void *need(const char *name, const char *dtype, int rank, int64_t *shape) {
  const void *found = tensor(&given, name, dtype, rank, shape);
  if (!found) stop(NO_VECTOR, failure, "");
  return found;
}

/* Angles of the positions that are there; those of others are wanted by rows that nobody reads. */
static void read_angles(kvc_setup *s) {
  int64_t count = -1, half = s->rope_dim / 2;
  const int64_t *positions = need("positions", "I64", 1, &count);
  int64_t shape[] = {count, half};
  const float *from[] = {need("cos", "F32", 2, shape), need("sin", "F32", 2, shape)};
  s->table_rows = s->max_positions + 1;
  for (int k = 0; k < 2; k++) {
    float *to = calloc((size_t)(s->table_rows * half + 1), sizeof *to); /* takes the pages that are written */
    if (!to) stop(UNABLE, "too little memory", "");
    for (int64_t i = 0; i < count; i++) {
      if (positions[i] < 0 || positions[i] > s->max_positions) stop(NO_VECTOR, "positions", "beyond the last one");
      memcpy(to + positions[i] * half, from[k] + i * half, (size_t)half * sizeof *to);
    }
    *(k ? &s->sines : &s->cosines) = to;
  }
}

static kvc_setup read_setup(void) {
  const json *c = json_get(vector, "compressor"), *rounding = json_get(c, "rounding");
  kvc_setup s = {.ratio = integer(c, "ratio", 1, 4096), .head_dim = integer(c, "head_dim", 1, 4096),
                 .rope_dim = integer(c, "rope_dim", 0, 4096), .overlap = truth(c, "overlap"),
                 .rotate = truth(c, "rotate"), .eps = number(c, "eps"),
                 .rounding = json_is(rounding, "fused") ? KVC_FUSED : json_is(rounding, "latent") ? KVC_LATENT : 0,
                 .num_slots = integer(vector, "num_slots", 1, 1 << 20),
                 .max_draft = integer(vector, "max_draft", 0, 1 << 16),
                 .num_pages = integer(vector, "num_pages", 1, (int64_t)1 << 40),
                 .page_rows = integer(vector, "page_rows", 1, 1 << 20),
                 .max_positions = integer(vector, "max_positions", 1, MOST_POSITIONS),
                 .fp32 = json_is(json_get(vector, "format"), "fp32")};
  int64_t width = s.head_dim * (1 + s.overlap), ring = s.ratio * (1 + s.overlap) + s.max_draft;
  if (s.rounding == KVC_REFERENCE && !json_is(rounding, "reference")) stop(NO_VECTOR, "rounding", "one that is none");
  if (!s.fp32 && !json_is(json_get(vector, "format"), "bf16")) stop(UNABLE, "needs another format than bf16, fp32", "");
  if (!truth(c, "has_gate")) stop(UNABLE, "needs a compressor without a gate", "");
  if (kvc_times(s.num_slots * ring, 8 * width) > MOST) stop(NO_VECTOR, "num_slots", "more state than a vector has");
  read_angles(&s);
  int64_t shape[] = {s.head_dim, s.head_dim};
  float *norm = memory(s.head_dim, sizeof *norm), *ape = memory(s.ratio * width, sizeof *ape);
  for (int64_t i = 0; i < s.head_dim; i++) norm[i] = 1 + value(0, (uint32_t)i) / 4;
  for (int64_t i = 0; i < s.ratio * width; i++) ape[i] = value(1, (uint32_t)i) / 2 * scale;
  s.norm = norm;
  if (truth(vector, "pattern")) {
    s.norm = need("norm", "F32", 1, shape);
    shape[0] = -1;
    pattern = need("pattern", "I8", 2, shape);
    patterns = shape[0];
  }
  if (truth(c, "has_ape")) s.ape = ape;
  else free(ape);
  return s;
}

/* The tokens of a step: [tokens, 2N], to be freed. */
static float *read_tokens(const json *pieces, int64_t *tokens) {
  static const float junk[] = {0, NAN, INFINITY, 1e4f};
  int64_t n = compressor.width, d = compressor.s.head_dim, four = 4, at = 0;
  *tokens = 0;
  for (int pass = 0;; pass++) {
    float *found = pass ? memory(*tokens * 2 * n, sizeof *found) : NULL;
    for (const json *piece = pieces + 1; piece < pieces + pieces->size; piece += piece->size) {
      int64_t *p = integers(piece, "pieces", &four), stream = p[0], first = p[1], count = p[2], kind = p[3];
      free(p);
      if (count < 0 || count > MOST_TOKENS || kind < 0 || kind > 3 || (!kind && (stream < 2 || stream > INT32_MAX)))
        stop(NO_VECTOR, "pieces", "one that cannot be");
      if (!kind && pattern && stream - 2 >= patterns) stop(NO_VECTOR, "pieces", "no such row of pattern");
      if (!pass && (*tokens += count) > MOST_TOKENS) stop(NO_VECTOR, "pieces", "too many tokens");
      for (int64_t i = 0; pass && i < count * 2 * n; i++, at++)
        if (kind) found[at] = junk[kind];
        else if (pattern) found[at] = i % (2 * n) < n ? pattern[(stream - 2) * d + i % d] : 0;
        else found[at] = value((uint32_t)stream, (uint32_t)first * (uint32_t)(2 * n) + (uint32_t)i) * scale;
    }
    if (pass) return found;
  }
}

/* --8<-- [start:step] */
static const char *step(const json *op) {
  kvc_batch b = {.requests = -1};
  float *tokens = read_tokens(json_get(op, "pieces"), &b.tokens);
  int64_t starts = -1, *begin = integers(json_get(op, "query_start_loc"), "query_start_loc", &starts);
  if ((b.requests = starts - 1) < 0) stop(NO_VECTOR, "query_start_loc", "empty");
  int64_t *start = integers(json_get(op, "start_positions"), "start_positions", &b.requests);
  int64_t *drafts = integers(json_get(op, "draft_rows"), "draft_rows", &b.requests);
  int64_t *slots = integers(json_get(op, "state_slots"), "state_slots", &b.requests);
  int64_t *rows = integers(json_get(op, "slot_mapping"), "slot_mapping", &b.tokens);
  b.kv_score = tokens, b.query_start_loc = begin, b.slot_mapping = rows;
  b.start_positions = start, b.draft_rows = drafts, b.state_slots = slots;
  const char *wrong = kvc_step(&compressor, &b);
  free(tokens), free(begin), free(start), free(drafts), free(slots), free(rows);
  return wrong;
}
/* --8<-- [end:step] */

/* The state of a request without history: the window before it has no weight. */
static const char *begin(int64_t slot, int64_t position) {
  int64_t width = compressor.width, count = kvc_state_rows(&compressor, position) * 2 * width;
  float *rows = memory(count, sizeof *rows);
  for (int64_t i = 0; i < count; i++) rows[i] = i % (2 * width) < width ? 0 : -INFINITY;
  const char *wrong = kvc_put_state(&compressor, slot, position, rows);
  return free(rows), wrong;
}

static const char *copy(int64_t from, int64_t to, int64_t position) {
  float *rows = memory(kvc_state_rows(&compressor, position) * 2 * compressor.width, sizeof *rows);
  const char *wrong = kvc_get_state(&compressor, from, position, rows);
  if (!wrong) wrong = kvc_put_state(&compressor, to, position, rows);
  return free(rows), wrong;
}

/* What a compressor says of an op; NULL if it did it. */
static const char *run(const json *op) {
  const json *kind = json_get(op, "op");
  if (json_is(kind, "step") || json_is(kind, "refuse")) return step(op);
  int64_t slot = integer(op, "slot", 0, ANY);
  if (json_is(kind, "reset")) return kvc_reset(&compressor, &slot, 1);
  int64_t position = integer(op, "position", 0, MOST_POSITIONS);
  return json_is(kind, "begin") ? begin(slot, position) : copy(slot, integer(op, "to", 0, ANY), position);
}

/* Rows of the cache, to where they go. */
static void copy_rows(const int64_t *slots, int64_t count, unsigned char *to) {
  for (int64_t i = 0; i < count; i++, to += compressor.row_bytes) {
    const void *row = kvc_cache_row(&compressor, slots[i]);
    if (!row) stop(NO_VECTOR, "read, untouched", "no row of the cache");
    memcpy(to, row, (size_t)compressor.row_bytes);
  }
}

int main(int count, char **words) {
  int64_t size, read = -1, left = -1, asked = 0, ops = 0;
  size_t length = count == 3 ? strlen(words[1]) : 0;
  if (length < 5 || length > 4000 || strcmp(words[1] + length - 5, ".json"))
    stop(NO_VECTOR, "vectors VECTOR.json OUT.safetensors", "");
  char *text = (char *)read_file(words[1], 4 << 20, &size), beside[4100];
  vector = json_parse(text, size, words[1]);
  if (!vector || vector->kind != '{') stop(NO_VECTOR, failure[0] ? failure : "expected an object", "");
  check_vector();
  integer(vector, "schema", 1, 1);
  for (const json *n = json_get(vector, "needs"), *v = n + 1; v < n + n->size; v++) {
    size_t i = 0;
    while (i < sizeof ABLE / sizeof *ABLE && !json_is(v, ABLE[i])) i++;
    if (i == sizeof ABLE / sizeof *ABLE) fprintf(stderr, "needs %.*s\n", (int)v->length, v->text), exit(UNABLE);
    asked |= json_is(v, "huge_cache");
  }
  snprintf(beside, sizeof beside, "%.*s.safetensors", (int)length - 5, words[1]);
  unsigned char *bytes = read_file(beside, MOST, &size);
  if (!tensors_open(&given, bytes, (uint64_t)size)) stop(NO_VECTOR, failure, "");
  seed = (uint32_t)integer(vector, "seed", 0, UINT32_MAX), scale = (float)number(vector, "scale");
  kvc_setup s = read_setup();
  int64_t repeat = integer(vector, "repeat", 1, MOST_REPEATS), page = s.page_rows * s.head_dim * (s.fp32 ? 4 : 2);
  if (!asked && kvc_times(s.num_pages, page) > MOST) stop(NO_VECTOR, "num_pages", "more than a vector has");
  int64_t *slots = integers(json_get(vector, "read"), "read", &read);
  int64_t *others = integers(json_get(vector, "untouched"), "untouched", &left);
  const json *todo = json_get(vector, "ops");
  unsigned char *refused = memory(todo->size, 1), *rows = NULL;
  for (int64_t k = 0; k < repeat; k++) {
    const char *wrong = kvc_init(&compressor, &s);
    if (wrong) stop(strstr(wrong, "memory") ? UNABLE : NO_VECTOR, asked ? "needs huge_cache" : "init", wrong);
    if (!rows) rows = memory(kvc_times(repeat, read), compressor.row_bytes);
    ops = 0;
    for (const json *op = todo + 1; op < todo + todo->size; op += op->size) {
      wrong = run(op);
      if (json_is(json_get(op, "op"), "refuse")) refused[ops++] = wrong != NULL;
      else if (wrong) stop(REFUSED, "refused", wrong);
    }
    copy_rows(slots, read, rows + k * read * compressor.row_bytes);
  }
  unsigned char *kept = memory(left, compressor.row_bytes);
  copy_rows(others, left, kept);
  const output out[] = {{"rows", s.fp32 ? "F32" : "BF16", 2, {repeat * read, s.head_dim}, rows},
                        {"untouched", "U8", 2, {left, compressor.row_bytes}, kept},
                        {"refused", "U8", 1, {ops, 1}, refused},
                        {"pages", "U8", 2, {s.num_pages, page}, compressor.cache}};
  FILE *to = fopen(words[2], "wb");
  if (!to) stop(REFUSED, words[2], "cannot be written");
  int whole = tensors_write(to, 0, NULL, out, truth(vector, "exact") ? 4 : 3);
  if (fclose(to) || !whole) remove(words[2]), stop(REFUSED, words[2], "cannot be written");
  return 0;
}
