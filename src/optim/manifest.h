/* manifest.h - what makes a directory a checkpoint: which step and tensors it is of, and size and
 * checksum of the file of every rank. JSON, whose last member is a checksum of all before it. */
#ifndef MANIFEST_H
#define MANIFEST_H

#include <stdbool.h>
#include "optim/registry.h"

#define MANIFEST_VERSION 1
#define MANIFEST_NAME    "manifest.json"
#define MANIFEST_MOST    ((size_t)1 << 28)           /* bytes; a larger one is refused */
#define STEP_MOST        ((int64_t)1000000000000000) /* a later one was never reached */

typedef struct manifest_tensor {
    const char *name, *role, *dtype; /* as text; borrowed */
    int dims;
    int64_t shape[MUONSHARD_MAX_DIMS];
} manifest_tensor;

typedef struct manifest_file {
    uint64_t bytes, hash; /* XXH3, 64 bits */
} manifest_file;

typedef struct manifest {
    int64_t step, count;
    int world_size;
    manifest_file *files;     /* own, [world_size] */
    manifest_tensor *tensors; /* own, [tensor_count] */
    size_t tensor_count;
    const char *config, *user; /* borrowed */
    void *json;                /* own: what a read one's texts are in */
} manifest;

/* The text of a manifest; own, [*length] without the final zero. ERR_ARGUMENT: a name or `user` is
 * no UTF-8; ERR_MEMORY. */
muonshard_status manifest_write(const manifest *m, char **text, size_t *length, error_text *error);
/* text [length]; `where` is its name in errors. ERR_FORMAT: anything that isn't as it was written;
 * ERR_UNSUPPORTED: another version; ERR_MEMORY. */
muonshard_status manifest_read(const char *where, const char *text, size_t length, manifest *m,
                               error_text *error);
/* The tensors are those that are registered; otherwise ERR_ARGUMENT names the first that isn't. */
muonshard_status manifest_check_tensors(const manifest *m, const char *where, const registry *r,
                                        error_text *error);
/* The tensors of a registry, in m->tensors. ERR_MEMORY. */
muonshard_status manifest_take_tensors(manifest *m, const registry *r, error_text *error);
/* Text that a manifest can hold: UTF-8. */
bool manifest_takes(const char *text);
void manifest_free(manifest *m);

#endif
