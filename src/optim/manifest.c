#include "optim/manifest.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <jansson.h>
#include <xxhash.h>
#include "optim/state.h"

/* How it ends: ,"xxh3":"0123456789abcdef"} and a line feed. */
#define TAIL_FORMAT ",\"xxh3\":\"%016" PRIx64 "\"}\n"
enum { TAIL = 28 };

#define TEXT_OF(x)       #x
#define VERSION(a, b, c) TEXT_OF(a) "." TEXT_OF(b) "." TEXT_OF(c)
#define LIBRARY          VERSION(MUONSHARD_VERSION_MAJOR, MUONSHARD_VERSION_MINOR, MUONSHARD_VERSION_PATCH)

static const char *const roles[] = {"unset", "matrix", "elementwise", "frozen"};

void manifest_free(manifest *m) {
    free(m->files);
    free(m->tensors);
    json_decref(m->json);
    *m = (manifest){.files = NULL};
}

muonshard_status manifest_take_tensors(manifest *m, const registry *r, error_text *error) {
    m->tensors = calloc(r->tensor_count + 1, sizeof *m->tensors);
    FAIL_IF(!m->tensors, error, MUONSHARD_ERR_MEMORY, "out of memory");
    m->tensor_count = r->tensor_count;
    for (size_t i = 0; i < r->tensor_count; i++) {
        const tensor *t = &r->tensors[i];
        m->tensors[i] = (manifest_tensor){.name = t->name,
                                          .role = roles[t->role],
                                          .dtype = dtype_name(t->dtype),
                                          .dims = t->dims};
        memcpy(m->tensors[i].shape, t->shape, sizeof t->shape);
    }
    return MUONSHARD_OK;
}

/* ---- writing ---- */

bool manifest_takes(const char *text) {
    json_t *json = json_string(text);
    json_decref(json);
    return json != NULL;
}

static json_t *hex(uint64_t number) {
    char text[17];
    snprintf(text, sizeof text, "%016" PRIx64, number);
    return json_string(text);
}

static json_t *pack_files(const manifest *m) {
    json_t *files = json_array();
    for (int i = 0; i < m->world_size; i++)
        json_array_append_new(files, json_pack("{s:I, s:o}", "bytes", (json_int_t)m->files[i].bytes,
                                               "xxh3", hex(m->files[i].hash)));
    return files;
}

static json_t *pack_tensors(const manifest *m) {
    json_t *tensors = json_array();
    for (size_t i = 0; i < m->tensor_count; i++) {
        const manifest_tensor *t = &m->tensors[i];
        json_t *shape = json_array();
        for (int d = 0; d < t->dims; d++)
            json_array_append_new(shape, json_integer(t->shape[d]));
        json_array_append_new(tensors, json_pack("{s:s, s:s, s:s, s:o}", "name", t->name, "role",
                                                 t->role, "dtype", t->dtype, "shape", shape));
    }
    return tensors;
}

muonshard_status manifest_write(const manifest *m, char **text, size_t *length, error_text *error) {
    json_t *json = json_pack(
        "{s:i, s:s, s:I, s:I, s:i, s:s, s:s, s:o, s:o}", "muonshard_checkpoint", MANIFEST_VERSION,
        "library", LIBRARY, "step", (json_int_t)m->step, "count", (json_int_t)m->count,
        "world_size", m->world_size, "user", m->user ? m->user : "", "config",
        m->config ? m->config : "", "tensors", pack_tensors(m), "files", pack_files(m));
    char *body = json ? json_dumps(json, JSON_INDENT(1)) : NULL;
    const bool whole = body &&
                       json_array_size(json_object_get(json, "tensors")) == m->tensor_count &&
                       json_array_size(json_object_get(json, "files")) == (size_t)m->world_size;
    json_decref(json);
    const size_t size = body ? strlen(body) : 0;
    const bool fits = size <= MANIFEST_MOST - TAIL;
    *text = whole && fits ? malloc(size + TAIL + 1) : NULL;
    if (!*text) {
        free(body);
        FAIL_IF(!fits, error, MUONSHARD_ERR_ARGUMENT, MANIFEST_NAME ": %zu bytes are too many",
                size);
        return fail(error, MUONSHARD_ERR_ARGUMENT,
                    MANIFEST_NAME ": a name, `user` or the configuration is not UTF-8, or memory "
                                  "is out");
    }
    /* The last brace, and the line feed before it, make room for the checksum. */
    const size_t kept = size - 2;
    memcpy(*text, body, kept);
    snprintf(*text + kept, TAIL + 1, TAIL_FORMAT, (uint64_t)XXH3_64bits(body, kept));
    *length = kept + TAIL;
    free(body);
    return MUONSHARD_OK;
}

/* ---- reading ---- */

static bool read_hex(const json_t *from, uint64_t *number) {
    const char *text = json_string_value(from);
    if (!text || strlen(text) != 16 || strspn(text, "0123456789abcdef") != 16)
        return false;
    *number = strtoull(text, NULL, 16);
    return true;
}

static bool read_count(const json_t *from, int64_t most, int64_t *number) {
    *number = json_integer_value(from);
    return json_is_integer(from) && *number >= 0 && *number <= most;
}

static muonshard_status read_files(const char *where, const json_t *files, manifest *m,
                                   error_text *error) {
    FAIL_IF(json_array_size(files) != (size_t)m->world_size, error, MUONSHARD_ERR_FORMAT,
            "%s: files of %zu ranks, world_size %d", where, json_array_size(files), m->world_size);
    m->files = calloc((size_t)m->world_size, sizeof *m->files);
    FAIL_IF(!m->files, error, MUONSHARD_ERR_MEMORY, "%s: out of memory", where);
    for (int i = 0; i < m->world_size; i++) {
        const json_t *file = json_array_get(files, (size_t)i);
        int64_t bytes;
        FAIL_IF(!read_count(json_object_get(file, "bytes"), INT64_MAX, &bytes) ||
                    !read_hex(json_object_get(file, "xxh3"), &m->files[i].hash),
                error, MUONSHARD_ERR_FORMAT, "%s: file %d has no bytes or no xxh3", where, i);
        m->files[i].bytes = (uint64_t)bytes;
    }
    return MUONSHARD_OK;
}

static bool read_tensor(const json_t *from, manifest_tensor *t) {
    const json_t *shape = json_object_get(from, "shape");
    t->name = json_string_value(json_object_get(from, "name"));
    t->role = json_string_value(json_object_get(from, "role"));
    t->dtype = json_string_value(json_object_get(from, "dtype"));
    if (!t->name || !t->role || !t->dtype || !json_is_array(shape) ||
        json_array_size(shape) > MUONSHARD_MAX_DIMS)
        return false;
    t->dims = (int)json_array_size(shape);
    for (int d = 0; d < t->dims; d++)
        if (!read_count(json_array_get(shape, (size_t)d), INT64_MAX, &t->shape[d]))
            return false;
    return true;
}

static muonshard_status read_tensors(const char *where, const json_t *tensors, manifest *m,
                                     error_text *error) {
    FAIL_IF(!json_is_array(tensors), error, MUONSHARD_ERR_FORMAT, "%s: no tensors", where);
    m->tensor_count = json_array_size(tensors);
    m->tensors = calloc(m->tensor_count + 1, sizeof *m->tensors);
    FAIL_IF(!m->tensors, error, MUONSHARD_ERR_MEMORY, "%s: out of memory", where);
    for (size_t i = 0; i < m->tensor_count; i++)
        FAIL_IF(!read_tensor(json_array_get(tensors, i), &m->tensors[i]), error,
                MUONSHARD_ERR_FORMAT, "%s: tensor %zu is not described as it should be", where, i);
    return MUONSHARD_OK;
}

static muonshard_status read_members(const char *where, const json_t *json, manifest *m,
                                     error_text *error) {
    const json_t *version = json_object_get(json, "muonshard_checkpoint");
    int64_t ranks;
    FAIL_IF(!json_is_integer(version), error, MUONSHARD_ERR_FORMAT,
            "%s: no manifest of a muonshard checkpoint", where);
    FAIL_IF(json_integer_value(version) != MANIFEST_VERSION, error, MUONSHARD_ERR_UNSUPPORTED,
            "%s: version %lld of the format; this library reads version %d", where,
            (long long)json_integer_value(version), MANIFEST_VERSION);
    FAIL_IF(!read_count(json_object_get(json, "step"), STEP_MOST, &m->step) ||
                !read_count(json_object_get(json, "count"), m->step, &m->count) ||
                !read_count(json_object_get(json, "world_size"), INT32_MAX, &ranks) || ranks == 0,
            error, MUONSHARD_ERR_FORMAT, "%s: step, count or world_size is missing or out of range",
            where);
    m->world_size = (int)ranks;
    m->config = json_string_value(json_object_get(json, "config"));
    m->user = json_string_value(json_object_get(json, "user"));
    FAIL_IF(!m->config || !m->user, error, MUONSHARD_ERR_FORMAT, "%s: no config or no user", where);
    TRY(read_files(where, json_object_get(json, "files"), m, error));
    return read_tensors(where, json_object_get(json, "tensors"), m, error);
}

/* Bytes that aren't as they were written are found before they are looked at. */
static muonshard_status check_tail(const char *where, const char *text, size_t length,
                                   error_text *error) {
    char tail[TAIL + 1];
    FAIL_IF(length < TAIL, error, MUONSHARD_ERR_FORMAT, "%s: %zu bytes are no manifest", where,
            length);
    snprintf(tail, sizeof tail, TAIL_FORMAT, (uint64_t)XXH3_64bits(text, length - TAIL));
    FAIL_IF(memcmp(tail, text + length - TAIL, TAIL) != 0, error, MUONSHARD_ERR_FORMAT,
            "%s: its checksum says that it is damaged or cut off", where);
    return MUONSHARD_OK;
}

muonshard_status manifest_read(const char *where, const char *text, size_t length, manifest *m,
                               error_text *error) {
    *m = (manifest){.files = NULL};
    TRY(check_tail(where, text, length, error));
    json_error_t at;
    m->json = json_loadb(text, length, JSON_REJECT_DUPLICATES, &at);
    FAIL_IF(!m->json, error, MUONSHARD_ERR_FORMAT, "%s: not valid JSON: %s (line %d)", where,
            at.text, at.line);
    const muonshard_status status = read_members(where, m->json, m, error);
    if (status)
        manifest_free(m);
    return status;
}

/* ---- tensors ---- */

static bool same_tensor(const manifest_tensor *a, const manifest_tensor *b) {
    return strcmp(a->name, b->name) == 0 && strcmp(a->role, b->role) == 0 &&
           strcmp(a->dtype, b->dtype) == 0 && a->dims == b->dims &&
           memcmp(a->shape, b->shape, (size_t)a->dims * sizeof *a->shape) == 0;
}

/* "'name' matrix fp32 [2, 3]", or "nothing". */
static void describe(const manifest *m, size_t i, char *text, size_t size) {
    if (i >= m->tensor_count) {
        snprintf(text, size, "nothing");
        return;
    }
    const manifest_tensor *t = &m->tensors[i];
    int at = snprintf(text, size, "'%.60s' %.12s %.8s [", t->name, t->role, t->dtype);
    for (int d = 0; d < t->dims && (size_t)at < size; d++)
        at += snprintf(text + at, size - (size_t)at, "%s%" PRId64, d ? ", " : "", t->shape[d]);
    if ((size_t)at < size)
        snprintf(text + at, size - (size_t)at, "]");
}

muonshard_status manifest_check_tensors(const manifest *m, const char *where, const registry *r,
                                        error_text *error) {
    manifest here = {.files = NULL};
    TRY(manifest_take_tensors(&here, r, error));
    const size_t most = m->tensor_count > here.tensor_count ? m->tensor_count : here.tensor_count;
    muonshard_status status = MUONSHARD_OK;
    for (size_t i = 0; i < most && status == MUONSHARD_OK; i++) {
        char there[300], own[300];
        if (i < m->tensor_count && i < here.tensor_count &&
            same_tensor(&m->tensors[i], &here.tensors[i]))
            continue;
        describe(m, i, there, sizeof there);
        describe(&here, i, own, sizeof own);
        status = fail(error, MUONSHARD_ERR_ARGUMENT, "%s: tensor %zu is %s; registered is %s",
                      where, i, there, own);
    }
    manifest_free(&here);
    return status;
}
