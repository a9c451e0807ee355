/* safetensors.h - tensors in a file: an 8-byte little-endian header length, a JSON header, then the
 * data. The reader trusts nothing in the file: what it hands out has been checked against the
 * file's real size.
 *
 * Functions that can fail write a line to `error` that names the file, and the tensor if it is
 * one's fault. */
#ifndef SAFETENSORS_H
#define SAFETENSORS_H

#include <stdbool.h>
#include "status.h"

#define SAFETENSORS_HEADER_MAX ((size_t)100000000) /* bytes: the format's limit */

typedef struct safetensors_dtype {
    const char *name; /* "F32" */
    unsigned bits;    /* of one element */
} safetensors_dtype;

/* The entry of the format's table, or NULL. */
const safetensors_dtype *safetensors_dtype_find(const char *name);

typedef struct safetensors_tensor {
    const char *name;
    const safetensors_dtype *dtype;
    int dims;
    int64_t shape[MUONSHARD_MAX_DIMS];
    size_t elements;
    size_t offset;    /* from the beginning of the file */
    const void *data; /* [shape], row-major, aligned for its elements; NULL where it isn't mapped */
    size_t bytes;
} safetensors_tensor;

typedef struct safetensors_pair {
    const char *key, *value;
} safetensors_pair;

typedef struct safetensors_file {
    char *path;
    safetensors_tensor *tensors; /* [tensor_count], by position in the file */
    size_t tensor_count;
    safetensors_pair *metadata; /* [metadata_count], the strings of `__metadata__` */
    size_t metadata_count;
    /* the reader's own */
    void *map;
    size_t map_size;
    void *header;  /* the parsed JSON, which owns the names */
    void **copies; /* [tensor_count], of those whose place is not aligned; mostly NULL */
} safetensors_file;

/* Maps `path` read-only and checks all of it: known dtypes, sizes that multiply without overflow,
 * data that is neither overlapping nor leaves a gap and fills the file exactly. The data must not
 * be truncated by others while it is open. ERR_IO: missing, unreadable, not a regular file;
 * ERR_FORMAT: anything wrong inside; ERR_UNSUPPORTED: more than MUONSHARD_MAX_DIMS dimensions;
 * ERR_MEMORY. On failure nothing is held. */
muonshard_status safetensors_open(const char *path, safetensors_file *file, error_text *error);
/* The same of an image of `size` bytes called `name`, of which the first `available` are at
 * `bytes`: all of the header at least. Tensors have no data, but an offset. */
muonshard_status safetensors_parse(const char *name, const void *bytes, size_t available,
                                   size_t size, safetensors_file *file, error_text *error);
/* NULL when there is none of that name. */
const safetensors_tensor *safetensors_find(const safetensors_file *file, const char *name);
void safetensors_close(safetensors_file *file);

/* "[3, 5]", "[]" for a scalar. Returns `text` [SAFETENSORS_SHAPE_TEXT]. */
#define SAFETENSORS_SHAPE_TEXT (MUONSHARD_MAX_DIMS * 22 + 3)
const char *safetensors_shape_text(const safetensors_tensor *tensor, char *text);

/* How a file of these tensors begins, up to their data, which starts at a multiple of 8: own text
 * [length]. ERR_ARGUMENT (names not unique, not UTF-8 or with control characters; a header that the
 * format doesn't allow; out of memory). */
muonshard_status safetensors_header(const char *path, const safetensors_tensor *tensors,
                                    size_t tensor_count, const safetensors_pair *metadata,
                                    size_t metadata_count, char **text, size_t *length,
                                    error_text *error);
/* Whether a write to `path` can work: its directory is there and writable, and what stands there is
 * a regular file or nothing. Writes nothing. ERR_IO. */
muonshard_status safetensors_can_write(const char *path, error_text *error);
/* Writes `tensors` (all but `elements` is used) in the given order: to a temporary
 * name in the same directory, synced, renamed. On failure the temporary is gone and an older file
 * of the name is as it was. ERR_IO, ERR_ARGUMENT (names not unique, or not UTF-8), ERR_MEMORY. */
muonshard_status safetensors_write(const char *path, const safetensors_tensor *tensors,
                                   size_t tensor_count, const safetensors_pair *metadata,
                                   size_t metadata_count, error_text *error);

#endif
