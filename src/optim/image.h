/* image.h - a rank's state as the bytes of a safetensors file: tensors are slices, called
 * KIND:TENSOR:FIRST, metadata say which step it was. Images of all ranks together are the state,
 * whatever the number of ranks that read them. */
#ifndef IMAGE_H
#define IMAGE_H

#include "optim/manifest.h"
#include "optim/state.h"
#include "safetensors.h"

#define IMAGE_VERSION 1

/* What is beside the slices. */
typedef struct image_facts {
    int64_t step, count; /* calls of muonshard_step, and those that weren't skipped */
    int rank, world_size;
    uint64_t tensors; /* state_tensors_hash */
} image_facts;

/* ---- writing ---- */

typedef struct image {
    state_list list;
    char *header; /* own */
    size_t header_bytes, bytes;
} image;

/* The image of this rank's state as it is now: how large, and how it begins; the same size in every
 * step. ERR_MEMORY, ERR_ARGUMENT: a tensor's name is not UTF-8. */
muonshard_status image_make(const muonshard_optimizer *o, const image_facts *facts, image *made,
                            error_text *error);
/* to [bytes], memory of the host: complete on return. */
muonshard_status image_fill(muonshard_optimizer *o, const image *made, char *to);
void image_free(image *made);

/* ---- reading ---- */

/* Where an image is. */
typedef struct image_source {
    char name[32];      /* of the file in `directory`; or for errors */
    const char *memory; /* [bytes], borrowed; or NULL */
    int directory;      /* otherwise; borrowed */
    size_t bytes;
} image_source;

/* A file is opened to be read; -1: it is in memory. ERR_IO, ERR_FORMAT: no regular file of `bytes`.
 */
muonshard_status image_source_open(const image_source *from, int *file, error_text *error);

typedef struct image_set image_set;

/* Reads how images begin and checks that they belong together. Local. ERR_FORMAT, ERR_IO,
 * ERR_ARGUMENT: of other tensors; ERR_UNSUPPORTED: of another version. */
muonshard_status image_set_open(const registry *r, const image_source *sources, size_t count,
                                image_set **set, error_text *error);
const image_facts *image_set_facts(const image_set *set);
/* Whether every element is there, in its dtype. `init_master`: masters may be missing. Nothing is
 * changed. ERR_ARGUMENT, ERR_FORMAT. */
muonshard_status image_set_check(const image_set *set, const registry *r, const state_list *wanted,
                                 bool init_master, error_text *error);
/* Those of `wanted` that are parameters, or those that aren't; masters that aren't there are left
 * as they are. */
muonshard_status image_set_read(const image_set *set, muonshard_optimizer *o,
                                const state_list *wanted, bool params);
void image_set_close(image_set *set);

#endif
