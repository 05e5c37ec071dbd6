/* JSON and safetensors, as much of both as driver.c and vectors.c need; for little-endian machines, as the files are.

   Whatever is read may be damaged: nothing here looks outside of what it was given, or goes deeper than JSON_DEPTH. */
#ifndef KVC_SAFETENSORS_H
#define KVC_SAFETENSORS_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static char failure[400]; /* what is wrong with what was read; empty: nothing so far */

static inline void fail(const char *name, const char *expected) {
  if (!failure[0]) snprintf(failure, sizeof failure, "%s: expected %s, got something else", name, expected);
}

/* A value. What is in a list or an object follows it: the first at + 1, then each ->size further; of an object key,
   value, key, ... */
typedef struct {
  char kind;        /* { [ " for an object, a list, a string; 0 for a number; t f n for true, false, null */
  const char *text; /* where it begins; of a string, behind the quote */
  int64_t length;   /* of a string, as it is written: escapes are left as they are */
  int64_t size;     /* values, itself included */
} json;

enum { JSON_DEPTH = 8, JSON_MEMBERS = 64 };

typedef struct {
  const char *at;
  json *values;
  int64_t count, room;
} json_reader;

static inline void json_space(json_reader *r) {
  while (*r->at == ' ' || *r->at == '\n' || *r->at == '\r' || *r->at == '\t') r->at++;
}

static inline int json_digits(json_reader *r) {
  const char *begin = r->at;
  while (*r->at >= '0' && *r->at <= '9') r->at++;
  return r->at > begin;
}

static inline int json_number(json_reader *r) {
  if (*r->at == '-') r->at++;
  if (*r->at == '0') r->at++;
  else if (!json_digits(r)) return 0;
  if (*r->at == '.' && (r->at++, !json_digits(r))) return 0;
  if (*r->at != 'e' && *r->at != 'E') return 1;
  r->at++;
  if (*r->at == '+' || *r->at == '-') r->at++;
  return json_digits(r);
}

static inline int json_string(json_reader *r) {
  for (r->at++; *r->at != '"'; r->at++) {
    if ((signed char)*r->at < ' ') return 0; /* what is not ASCII, and the 0 at the end, too */
    if (*r->at != '\\') continue;
    if (!*++r->at || !strchr("\"\\/bfnrtu", *r->at)) return 0;
    if (*r->at != 'u') continue;
    if ((r->at[1] == 'd' || r->at[1] == 'D') && r->at[2] >= '8') return 0; /* half a character beyond 16 bits */
    for (int i = 0; i < 4; i++)
      if (!*++r->at || !strchr("0123456789abcdefABCDEF", *r->at)) return 0;
  }
  return r->at++, 1;
}

static inline int json_value(json_reader *r, int depth);

/* What is in a list or an object, up to its end. */
static inline int json_inside(json_reader *r, int64_t self, int depth) {
  char end = *r->at++ == '{' ? '}' : ']';
  int members = 0;
  json_space(r);
  if (*r->at == end) return r->at++, 1;
  for (;;) {
    if (end == '}') {
      int64_t key = r->count;
      json_space(r);
      if (++members > JSON_MEMBERS || *r->at != '"' || !json_value(r, depth + 1)) return 0;
      for (int64_t i = self + 1; i < key; i += 1 + r->values[i + 1].size) /* no key may be there twice */
        if (r->values[i].length == r->values[key].length &&
            !memcmp(r->values[i].text, r->values[key].text, (size_t)r->values[key].length))
          return 0;
      if (*r->at++ != ':') return 0;
    }
    if (!json_value(r, depth + 1)) return 0;
    if (*r->at == end) return r->at++, 1;
    if (*r->at++ != ',') return 0;
  }
}

static inline int json_value(json_reader *r, int depth) {
  static const char *const words[] = {"true", "false", "null"};
  int64_t self = r->count++;
  int good = 0;
  if (r->count > r->room) {
    json *more = realloc(r->values, (size_t)(r->room = 2 * r->count) * sizeof *more);
    if (!more) return r->count--, 0;
    r->values = more;
  }
  json_space(r);
  json v = {.kind = *r->at, .text = r->at + (*r->at == '"')};
  r->values[self] = v;
  if (v.kind == '"') {
    good = json_string(r);
    r->values[self].length = r->at - v.text - 1;
  } else if (v.kind == '[' || v.kind == '{') {
    good = depth < JSON_DEPTH && json_inside(r, self, depth);
  } else if (v.kind == '-' || (v.kind >= '0' && v.kind <= '9')) {
    r->values[self].kind = 0;
    good = json_number(r);
  } else {
    for (int i = 0; i < 3; i++)
      if (!good && !strncmp(r->at, words[i], strlen(words[i]))) r->at += strlen(words[i]), good = 1;
  }
  r->values[self].size = r->count - self;
  json_space(r);
  return good;
}

/* All values of a text that ends with a 0 at its size; NULL if it is no JSON. To be freed; it points into the text. */
static inline json *json_parse(const char *text, int64_t size, const char *name) {
  json_reader r = {.at = text};
  if (json_value(&r, 0) && r.at == text + size) return r.values;
  char what[80];
  snprintf(what, sizeof what, "JSON (see byte %lld)", (long long)(r.at - text));
  free(r.values);
  fail(name, what);
  return NULL;
}

/* Whether a value is this string. */
static inline int json_is(const json *v, const char *text) {
  return v && v->kind == '"' && v->length == (int64_t)strlen(text) && !memcmp(v->text, text, strlen(text));
}

/* The value of a key, or NULL. */
static inline const json *json_get(const json *object, const char *key) {
  if (!object || object->kind != '{') return NULL;
  for (const json *k = object + 1; k < object + object->size; k += 1 + k[1].size)
    if (json_is(k, key)) return k + 1;
  return NULL;
}

/* Whether a value is an integer from low to high. */
static inline int json_int(const json *v, int64_t low, int64_t high, int64_t *found) {
  char *end;
  if (!v || v->kind) return 0;
  *found = strtoll(v->text, &end, 10); /* the largest there is for what is larger */
  return *end != '.' && *end != 'e' && *end != 'E' && *found >= low && *found <= high;
}

/* Whether a value is a list of exactly count integers that are sizes. */
static inline int json_sizes(const json *list, int64_t count, int64_t *found) {
  if (!list || list->kind != '[' || list->size != 1 + count) return 0;
  for (int64_t i = 0; i < count; i++)
    if (!json_int(list + 1 + i, 0, (int64_t)1 << 31, &found[i])) return 0;
  return 1;
}

typedef struct {
  unsigned char *bytes; /* the file, header first */
  char *header;         /* JSON that ends with a 0 */
  json *entries;
  unsigned char *data; /* what offsets count from */
  int64_t size;        /* of data */
} tensors;

static inline void tensors_free(tensors *t) {
  free(t->entries), free(t->header), free(t->bytes);
  memset(t, 0, sizeof *t);
}

/* A file, which is freed with the tensors. Whether it is one; if not, see failure. */
static inline int tensors_open(tensors *t, unsigned char *bytes, uint64_t size) {
  uint64_t header;
  memset(t, 0, sizeof *t);
  t->bytes = bytes;
  if (size >= 8) memcpy(&header, bytes, sizeof header);
  if (size < 8 || header > size - 8) return fail("safetensors", "a header"), 0;
  t->header = malloc(header + 1);
  if (!t->header) return fail("safetensors", "room for the header"), 0;
  memcpy(t->header, bytes + 8, header), t->header[header] = 0;
  t->data = bytes + 8 + header;
  t->size = (int64_t)(size - 8 - header);
  t->entries = json_parse(t->header, (int64_t)header, "safetensors header");
  return t->entries != NULL;
}

static inline int64_t element_bytes(const char *dtype) {
  return strstr(dtype, "64") ? 8 : strstr(dtype, "32") ? 4 : strstr(dtype, "16") ? 2 : 1;
}

/* A tensor of this type and shape, in which -1 stands for any size and becomes the one that is there; NULL if not. */
static inline const void *tensor(const tensors *t, const char *name, const char *dtype, int rank, int64_t *shape) {
  const json *entry = json_get(t->entries, name);
  int64_t got[2] = {1, 1}, at[2], bytes = element_bytes(dtype);
  if (json_is(json_get(entry, "dtype"), dtype) && json_sizes(json_get(entry, "shape"), rank, got) &&
      json_sizes(json_get(entry, "data_offsets"), 2, at)) {
    int fits = at[0] <= at[1] && at[1] <= t->size && (t->data + at[0] - t->bytes) % bytes == 0;
    fits = fits && (got[0] == 0 || got[1] <= t->size / bytes / got[0]) && got[0] * got[1] * bytes == at[1] - at[0];
    for (int i = 0; i < rank; i++) {
      if (shape[i] == -1) shape[i] = got[i];
      fits = fits && shape[i] == got[i];
    }
    if (fits) return t->data + at[0];
  }
  char text[100];
  snprintf(text, sizeof text, "%s of %lld x %lld", dtype, (long long)shape[0], (long long)(rank > 1 ? shape[1] : 1));
  fail(name, text);
  return NULL;
}

typedef struct {
  const char *name, *dtype;
  int rank;
  int64_t shape[2]; /* of rank 1: the second is 1 */
  const void *data;
} output;

/* A file of tensors, the widest elements first; framed: behind 8 bytes that say how long it is. metadata: JSON, or
   NULL; below 2000 bytes. The header is padded to a multiple of 8 bytes. Whether everything was written. */
static inline int tensors_write(FILE *to, int framed, const char *metadata, const output *given, int count) {
  char header[4096];
  int64_t at = 0, n = snprintf(header, sizeof header, "{\"__metadata__\": %s", metadata ? metadata : "{}");
  for (int i = 0; i < count; i++) {
    const output *t = &given[i];
    int64_t end = at + t->shape[0] * t->shape[1] * element_bytes(t->dtype);
    n += snprintf(header + n, sizeof header - (size_t)n, ", \"%s\": {\"dtype\": \"%s\", \"shape\": [%lld", t->name,
                  t->dtype, (long long)t->shape[0]);
    if (t->rank > 1) n += snprintf(header + n, sizeof header - (size_t)n, ", %lld", (long long)t->shape[1]);
    n += snprintf(header + n, sizeof header - (size_t)n, "], \"data_offsets\": [%lld, %lld]}", (long long)at,
                  (long long)end);
    at = end;
  }
  header[n++] = '}';
  while (n % 8) header[n++] = ' ';
  uint64_t lengths[] = {(uint64_t)(8 + n + at), (uint64_t)n};
  fwrite(lengths + !framed, sizeof *lengths, framed ? 2 : 1, to);
  fwrite(header, 1, (size_t)n, to);
  for (int i = 0; i < count; i++)
    fwrite(given[i].data, (size_t)element_bytes(given[i].dtype), (size_t)(given[i].shape[0] * given[i].shape[1]), to);
  return fflush(to) == 0 && !ferror(to);
}

#endif
