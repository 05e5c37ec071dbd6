/* A compressor in C under kvcondense's conformance kit: reads messages from stdin, answers on stdout.

   cc -std=c11 -O2 -Wall -Wextra -Werror examples/c/driver.c -lm -o driver
   kvcondense conformance --exec ./driver

   docs/protocol.md has the messages: 8 bytes of length, then a safetensors file. For an engine of your own, keep this
   file and safetensors.h, and put your calls where kvc_... stands. */
#include "compressor.h"
#include "safetensors.h"

/* What it does: JSON with single quotes, which are exchanged on the way. A line of specs is a compressor to ask for. */
static const char CAPABILITIES[] =
    "{'specs': ['csa', 'hca', 'indexer', 'fused', 'r2', 'r2 rounding=latent', 'csa head_dim=512 rope_dim=64', "
    "'hca head_dim=512 rope_dim=64', 'indexer head_dim=128 rope_dim=64'], "
    "'max_draft': 16, 'exports': true, 'returns_state': true, 'refuses': true, 'exact': true}";

static tensors in; /* the message */

static const json *metadata(const char *key) { return json_get(json_get(in.entries, "__metadata__"), key); }

static const void *vector(const char *name, const char *dtype, int64_t size) {
  return tensor(&in, name, dtype, 1, &size);
}

static int64_t integer(const char *name) {
  const int64_t *found = vector(name, "I64", 1);
  return found ? *found : 0;
}

/* Answers. */
#define KIND(kind) "{\"kvcondense\": \"1\", \"kind\": \"" kind "\""

static void done(void) { tensors_write(stdout, 1, KIND("done") "}", NULL, 0); }

static void done_with(const char *name, const char *dtype, int64_t rows, int64_t channels, const void *data) {
  const output found = {name, dtype, 2, {rows, channels}, data};
  tensors_write(stdout, 1, KIND("done") "}", &found, 1);
}

/* Texts here have neither quotes nor backslashes. */
static void refuse(const char *text) {
  char answer[600];
  snprintf(answer, sizeof answer, KIND("error") ", \"error\": \"%s\"}", text);
  tensors_write(stdout, 1, answer, NULL, 0);
}

static void hello(void) {
  char answer[2 * sizeof CAPABILITIES + 100], *to = answer;
  to += sprintf(answer, KIND("done") ", \"name\": \"the C example\", \"capabilities\": \"");
  for (const char *from = CAPABILITIES; *from; from++) {
    if (*from == '\'') *to++ = '\\';
    *to++ = *from == '\'' ? '"' : *from;
  }
  strcpy(to, "\"}");
  tensors_write(stdout, 1, answer, NULL, 0);
}

static kvc_compressor compressor;
static tensors kept; /* the message of init: the compressor's weights lie in it */

static const char *init(void) {
  const double *eps = vector("eps", "F64", 1);
  kvc_setup s = {.ratio = integer("ratio"), .head_dim = integer("head_dim"), .rope_dim = integer("rope_dim"),
                 .overlap = integer("overlap"), .rotate = integer("rotate"), .num_slots = integer("num_slots"),
                 .max_draft = integer("max_draft"), .num_pages = integer("num_pages"),
                 .page_rows = integer("page_rows"), .max_positions = integer("max_positions")};
  int64_t table[] = {-1, s.rope_dim / 2}, ape[] = {s.ratio, s.head_dim * (s.overlap ? 2 : 1)};
  s.norm = vector("norm", "F32", s.head_dim);
  s.ape = json_get(in.entries, "ape") ? tensor(&in, "ape", "F32", 2, ape) : NULL;
  s.cosines = tensor(&in, "cos", "F32", 2, table);
  s.sines = tensor(&in, "sin", "F32", 2, table);
  s.table_rows = table[0];
  const json *rounding = metadata("rounding");
  s.rounding = json_is(rounding, "fused") ? KVC_FUSED : json_is(rounding, "latent") ? KVC_LATENT : KVC_REFERENCE;
  if (s.rounding == KVC_REFERENCE && !json_is(rounding, "reference")) fail("rounding", "reference, fused or latent");
  if (!json_is(metadata("format"), "bf16")) fail("format", "bf16");
  if (failure[0]) return failure;
  s.eps = *eps;
  tensors_free(&kept);
  kept = in;
  memset(&in, 0, sizeof in);
  return kvc_init(&compressor, &s);
}

/* --8<-- [start:step] */
static const char *step(void) {
  int64_t scores[] = {-1, 2 * compressor.width}, starts = -1;
  kvc_batch b = {.kv_score = tensor(&in, "kv_score", "F32", 2, scores)};
  b.query_start_loc = tensor(&in, "query_start_loc", "I64", 1, &starts);
  b.tokens = scores[0], b.requests = starts - 1;
  if (starts < 1) fail("query_start_loc", "one entry more than there are requests");
  b.start_positions = vector("start_positions", "I64", b.requests);
  b.draft_rows = vector("draft_rows", "I64", b.requests);
  b.state_slots = vector("state_slots", "I64", b.requests);
  int64_t table[] = {b.requests, -1};
  if (json_get(in.entries, "block_table")) b.block_table = tensor(&in, "block_table", "I64", 2, table);
  if (json_get(in.entries, "slot_mapping")) b.slot_mapping = vector("slot_mapping", "I64", b.tokens);
  b.pages = table[1];
  return failure[0] ? failure : kvc_step(&compressor, &b);
}
/* --8<-- [end:step] */

static const char *rows(void) {
  int64_t count = -1, d = compressor.s.head_dim;
  const int64_t *slots = tensor(&in, "slots", "I64", 1, &count);
  if (failure[0]) return failure;
  uint16_t *found = kvc_memory(kvc_times(count, d), sizeof *found);
  if (!found) return "rows: expected room for them, got too little memory";
  for (int64_t i = 0; i < count; i++) {
    const void *row = kvc_cache_row(&compressor, slots[i]);
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
    const float *given = tensor(&in, "state", "F32", 2, shape);
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
  const json *kind = metadata("kind");
  const char *wrong = NULL;
  int64_t count = -1;
  int ready = compressor.cache != NULL, says = 1; /* says: the answer is a mere "done" */
  if (!json_is(metadata("kvcondense"), "1")) {
    wrong = "kvcondense: expected version 1 of the protocol";
  } else if (json_is(kind, "hello")) {
    hello(), says = 0;
  } else if (json_is(kind, "init")) {
    wrong = init();
  } else if (!ready) {
    wrong = "kind: expected init first";
  } else if (json_is(kind, "step")) {
    wrong = step();
  } else if (json_is(kind, "rows")) {
    wrong = rows(), says = 0;
  } else if (json_is(kind, "state")) {
    wrong = state(0), says = 0;
  } else if (json_is(kind, "load")) {
    wrong = state(1);
  } else if (json_is(kind, "reset")) {
    const int64_t *slots = tensor(&in, "slots", "I64", 1, &count);
    wrong = failure[0] ? failure : kvc_reset(&compressor, slots, count);
  } else {
    wrong = "kind: expected hello, init, step, rows, state, load or reset";
  }
  if (wrong) refuse(wrong);
  else if (says) done();
}

int main(void) {
  uint64_t size;
  while (fread(&size, sizeof size, 1, stdin) == 1) {
    if (size < 8 || size > (uint64_t)1 << 31) return fprintf(stderr, "a length that none has\n"), 1;
    unsigned char *bytes = malloc(size);
    if (!bytes || fread(bytes, 1, size, stdin) != size) return fprintf(stderr, "a message that breaks off\n"), 1;
    failure[0] = 0;
    if (tensors_open(&in, bytes, size)) answer();
    else refuse(failure);
    tensors_free(&in);
  }
  return 0;
}
