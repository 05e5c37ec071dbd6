/* A compressor in C under kvcondense's conformance kit: reads messages from stdin, answers on stdout.

   cc -std=c11 -O2 -Wall -Wextra -Werror examples/c/driver.c -lm -o driver
   kvcondense conformance --exec ./driver

   docs/protocol.md has the messages: 8 bytes of length, then a safetensors file. For an engine of your own, keep this
   file and put your calls where kvc_... stands. Written for little-endian machines, as safetensors are. */
#include "compressor.h"

/* What it does: JSON with single quotes, which are exchanged on the way. A line of specs is a compressor to ask for. */
static const char CAPABILITIES[] =
    "{'specs': ['csa', 'hca', 'indexer', 'fused', 'r2', 'r2 rounding=latent', 'csa head_dim=512 rope_dim=64', "
    "'hca head_dim=512 rope_dim=64', 'indexer head_dim=128 rope_dim=64'], "
    "'max_draft': 16, 'exports': true, 'returns_state': true, 'refuses': true, 'exact': true}";
enum { DONE_HEADER = 1 << 12 };

typedef struct {
  unsigned char *bytes; /* the message, header first */
  char *header;         /* JSON that ends with a 0 */
  unsigned char *data;  /* what offsets count from */
  int64_t size;         /* of data */
} message;

static message in;
static char failure[400]; /* what is wrong with the message; empty: nothing so far */

static void fail(const char *name, const char *expected) {
  if (!failure[0]) snprintf(failure, sizeof failure, "%s: expected %s, got something else", name, expected);
}

/* JSON, as much of it as headers need. All of these stop at the 0 at the end. */
static const char *space(const char *p) {
  while (*p == ' ' || *p == '\n' || *p == '\r' || *p == '\t') p++;
  return p;
}

static const char *skip_string(const char *p) {
  for (p++; *p && *p != '"'; p++)
    if (*p == '\\' && p[1]) p++;
  return *p ? p + 1 : p;
}

/* Behind the value at p. */
static const char *skip(const char *p) {
  int depth = 0;
  for (; *p; p++) {
    if (*p == '"') {
      p = skip_string(p);
      if (!depth) return p;
      p--;
    } else if (*p == '{' || *p == '[') {
      depth++;
    } else if (*p == '}' || *p == ']') {
      if (depth <= 1) return depth ? p + 1 : p;
      depth--;
    } else if (*p == ',' && !depth) {
      return p;
    }
  }
  return p;
}

/* The value of a key in the object at p, or NULL. */
static const char *member(const char *p, const char *key) {
  size_t length = strlen(key);
  if (!p || *(p = space(p)) != '{') return NULL;
  for (p = space(p + 1); *p == '"';) {
    const char *name = p + 1, *colon = space(skip_string(p));
    if (*colon != ':') return NULL;
    const char *value = space(colon + 1);
    if (!strncmp(name, key, length) && name[length] == '"') return value;
    p = space(skip(value));
    if (*p == ',') p = space(p + 1);
  }
  return NULL;
}

/* Whether the value at p is this string. */
static int is(const char *p, const char *text) {
  size_t length = strlen(text);
  return p && *p == '"' && !strncmp(p + 1, text, length) && p[1 + length] == '"';
}

/* Exactly count integers of the array at p. */
static int integers(const char *p, int count, int64_t *found) {
  if (!p || *p != '[') return 0;
  for (int i = 0; i < count; i++) {
    char *end;
    found[i] = strtoll(p = space(p + 1), &end, 10);
    if (end == p || found[i] < 0 || found[i] > (int64_t)1 << 31) return 0;
    p = space(end);
    if (*p != (i + 1 < count ? ',' : ']')) return 0;
  }
  return 1;
}

static const char *metadata(const char *key) { return member(member(in.header, "__metadata__"), key); }

/* A tensor of this type and shape, in which -1 stands for any size and becomes the one that is there; NULL if not. */
static const void *tensor(const char *name, const char *dtype, int rank, int64_t *shape) {
  const char *entry = member(in.header, name);
  int64_t got[2] = {1, 1}, at[2], bytes = strstr(dtype, "64") ? 8 : 4;
  if (entry && is(member(entry, "dtype"), dtype) && integers(member(entry, "shape"), rank, got) &&
      integers(member(entry, "data_offsets"), 2, at)) {
    int fits = at[0] <= at[1] && at[1] <= in.size && (in.data + at[0] - in.bytes) % bytes == 0;
    fits = fits && (got[0] == 0 || got[1] <= in.size / bytes / got[0]) && got[0] * got[1] * bytes == at[1] - at[0];
    for (int i = 0; i < rank; i++) {
      if (shape[i] == -1) shape[i] = got[i];
      fits = fits && shape[i] == got[i];
    }
    if (fits) return in.data + at[0];
  }
  char text[100];
  snprintf(text, sizeof text, "%s of %lld x %lld", dtype, (long long)shape[0], (long long)(rank > 1 ? shape[1] : 1));
  fail(name, text);
  return NULL;
}

static const void *vector(const char *name, const char *dtype, int64_t size) { return tensor(name, dtype, 1, &size); }

static int64_t integer(const char *name) {
  const int64_t *found = vector(name, "I64", 1);
  return found ? *found : 0;
}

/* Answers. A header is padded to a multiple of 8 bytes, so that what follows it is aligned. */
static void put(const char *header, const void *data, int64_t size) {
  static const char spaces[] = "       ";
  uint64_t length = strlen(header), pad = (8 - length % 8) % 8;
  uint64_t lengths[] = {8 + length + pad + (uint64_t)size, length + pad};
  fwrite(lengths, sizeof lengths, 1, stdout);
  fwrite(header, 1, length, stdout);
  fwrite(spaces, 1, pad, stdout);
  fwrite(data, 1, (size_t)size, stdout);
  fflush(stdout);
}

static void done(void) { put("{\"__metadata__\": {\"kvcondense\": \"1\", \"kind\": \"done\"}}", "", 0); }

static void done_with(const char *name, const char *dtype, int64_t rows, int64_t channels, const void *data) {
  char header[DONE_HEADER];
  int64_t size = rows * channels * (dtype[0] == 'B' ? 2 : 4);
  snprintf(header, sizeof header,
           "{\"__metadata__\": {\"kvcondense\": \"1\", \"kind\": \"done\"}, \"%s\": "
           "{\"dtype\": \"%s\", \"shape\": [%lld, %lld], \"data_offsets\": [0, %lld]}}",
           name, dtype, (long long)rows, (long long)channels, (long long)size);
  put(header, data, size);
}

/* Texts here have neither quotes nor backslashes. */
static void refuse(const char *text) {
  char header[DONE_HEADER];
  snprintf(header, sizeof header,
           "{\"__metadata__\": {\"kvcondense\": \"1\", \"kind\": \"error\", \"error\": \"%s\"}}", text);
  put(header, "", 0);
}

static void hello(void) {
  char header[DONE_HEADER], *to = header;
  to += sprintf(header, "{\"__metadata__\": {\"kvcondense\": \"1\", \"kind\": \"done\", "
                        "\"name\": \"the C example\", \"capabilities\": \"");
  for (const char *from = CAPABILITIES; *from; from++) {
    if (*from == '\'') *to++ = '\\';
    *to++ = *from == '\'' ? '"' : *from;
  }
  strcpy(to, "\"}}");
  put(header, "", 0);
}

static kvc_compressor compressor;
static message kept; /* the message of init: the compressor's weights lie in it */

static const char *init(void) {
  const double *eps = vector("eps", "F64", 1);
  kvc_setup s = {.ratio = integer("ratio"), .head_dim = integer("head_dim"), .rope_dim = integer("rope_dim"),
                 .overlap = integer("overlap"), .rotate = integer("rotate"), .num_slots = integer("num_slots"),
                 .max_draft = integer("max_draft"), .num_pages = integer("num_pages"),
                 .page_rows = integer("page_rows"), .max_positions = integer("max_positions")};
  int64_t table[] = {-1, s.rope_dim / 2}, ape[] = {s.ratio, s.head_dim * (s.overlap ? 2 : 1)};
  s.norm = vector("norm", "F32", s.head_dim);
  s.ape = member(in.header, "ape") ? tensor("ape", "F32", 2, ape) : NULL;
  s.cosines = tensor("cos", "F32", 2, table);
  s.sines = tensor("sin", "F32", 2, table);
  s.table_rows = table[0];
  const char *rounding = metadata("rounding");
  s.rounding = is(rounding, "fused") ? KVC_FUSED : is(rounding, "latent") ? KVC_LATENT : KVC_REFERENCE;
  if (s.rounding == KVC_REFERENCE && !is(rounding, "reference")) fail("rounding", "reference, fused or latent");
  if (!is(metadata("format"), "bf16")) fail("format", "bf16");
  if (failure[0]) return failure;
  s.eps = *eps;
  free(kept.bytes), free(kept.header);
  kept = in;
  memset(&in, 0, sizeof in);
  return kvc_init(&compressor, &s);
}

/* --8<-- [start:step] */
static const char *step(void) {
  int64_t scores[] = {-1, 2 * compressor.width}, starts = -1;
  kvc_batch b = {.kv_score = tensor("kv_score", "F32", 2, scores)};
  b.query_start_loc = tensor("query_start_loc", "I64", 1, &starts);
  b.tokens = scores[0], b.requests = starts - 1;
  if (starts < 1) fail("query_start_loc", "one entry more than there are requests");
  b.start_positions = vector("start_positions", "I64", b.requests);
  b.draft_rows = vector("draft_rows", "I64", b.requests);
  b.state_slots = vector("state_slots", "I64", b.requests);
  int64_t table[] = {b.requests, -1};
  if (member(in.header, "block_table")) b.block_table = tensor("block_table", "I64", 2, table);
  if (member(in.header, "slot_mapping")) b.slot_mapping = vector("slot_mapping", "I64", b.tokens);
  b.pages = table[1];
  return failure[0] ? failure : kvc_step(&compressor, &b);
}
/* --8<-- [end:step] */

static const char *rows(void) {
  int64_t count = -1, d = compressor.s.head_dim;
  const int64_t *slots = tensor("slots", "I64", 1, &count);
  if (failure[0]) return failure;
  uint16_t *found = kvc_memory(kvc_times(count, d), sizeof *found);
  if (!found) return "rows: expected room for them, got too little memory";
  for (int64_t i = 0; i < count; i++) {
    const uint16_t *row = kvc_cache_row(&compressor, slots[i]);
    if (!row) return free(found), "slots: expected rows of the cache";
    memcpy(found + i * d, row, (size_t)d * sizeof *found);
  }
  done_with("rows", "BF16", count, d, found);
  free(found);
  return NULL;
}

static const char *state(int load) {
  int64_t position = integer("position"), slot = integer("slot"), channels = 2 * compressor.width;
  if (position < 0 || position > compressor.s.max_positions) fail("position", "one of the sequence");
  if (failure[0]) return failure;
  int64_t shape[] = {kvc_state_rows(&compressor, position), channels};
  if (load) {
    const float *given = tensor("state", "F32", 2, shape);
    return failure[0] ? failure : kvc_put_state(&compressor, slot, position, given);
  }
  float *found = kvc_memory(shape[0] * channels, sizeof *found);
  if (!found) return "state: expected room for it, got too little memory";
  const char *wrong = kvc_get_state(&compressor, slot, position, found);
  if (!wrong) done_with("state", "F32", shape[0], channels, found);
  free(found);
  return wrong;
}

static void answer(void) {
  const char *kind = metadata("kind"), *wrong = NULL;
  int64_t count = -1;
  int ready = compressor.cache != NULL, says = 1; /* says: the answer is a mere "done" */
  if (!is(metadata("kvcondense"), "1")) {
    wrong = "kvcondense: expected version 1 of the protocol";
  } else if (is(kind, "hello")) {
    hello(), says = 0;
  } else if (is(kind, "init")) {
    wrong = init();
  } else if (!ready) {
    wrong = "kind: expected init first";
  } else if (is(kind, "step")) {
    wrong = step();
  } else if (is(kind, "rows")) {
    wrong = rows(), says = 0;
  } else if (is(kind, "state")) {
    wrong = state(0), says = 0;
  } else if (is(kind, "load")) {
    wrong = state(1);
  } else if (is(kind, "reset")) {
    const int64_t *slots = tensor("slots", "I64", 1, &count);
    wrong = failure[0] ? failure : kvc_reset(&compressor, slots, count);
  } else {
    wrong = "kind: expected hello, init, step, rows, state, load or reset";
  }
  if (wrong) refuse(wrong);
  else if (says) done();
}

int main(void) {
  uint64_t size, header;
  while (fread(&size, sizeof size, 1, stdin) == 1) {
    if (size < 8 || size > (uint64_t)1 << 31) return fprintf(stderr, "a length that none has\n"), 1;
    failure[0] = 0;
    in.bytes = malloc(size);
    if (!in.bytes || fread(in.bytes, 1, size, stdin) != size) return fprintf(stderr, "a message that breaks off\n"), 1;
    memcpy(&header, in.bytes, sizeof header);
    if (header > size - 8) return fprintf(stderr, "a message without a header\n"), 1;
    in.header = malloc(header + 1);
    if (!in.header) return fprintf(stderr, "too little memory\n"), 1;
    memcpy(in.header, in.bytes + 8, header), in.header[header] = 0;
    in.data = in.bytes + 8 + header;
    in.size = (int64_t)(size - 8 - header);
    answer();
    free(in.bytes), free(in.header);
    memset(&in, 0, sizeof in);
  }
  return 0;
}
