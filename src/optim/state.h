/* state.h - the state of an optimizer as named slices of its tensors: what a rank owns of it, and
 * what a rank needs to go on. Checkpoints are made of slices, so that they say nothing of ranks. */
#ifndef STATE_H
#define STATE_H

#include "optim/optimizer.h"

#define STATE_MAP(X)                                                                               \
    X(STATE_PARAM, "param")       /* of the tensor's dtype */                                      \
    X(STATE_MASTER, "master")     /* fp32 copy of a 16-bit parameter */                            \
    X(STATE_MOMENTUM, "momentum") /* of momentum_dtype */                                          \
    X(STATE_VARIANCE, "variance") /* fp32, of one matrix: a number a row or a column */            \
    X(STATE_ADAM_M, "adam_m")     /* fp32 */                                                       \
    X(STATE_ADAM_V, "adam_v")     /* fp32 */

typedef enum state_kind {
#define STATE_ENUM(name, text) name,
    STATE_MAP(STATE_ENUM)
#undef STATE_ENUM
        STATE_KIND_COUNT
} state_kind;

typedef struct state_slice {
    state_kind kind;
    int tensor;
    size_t first; /* element of the tensor it begins with; of the variance: its matrix does */
    int dims;
    int64_t shape[2]; /* [rows, cols] of a matrix, [count] of others */
    size_t count;     /* elements */
    muonshard_dtype dtype;
    void *memory; /* [shape] of dtype, the backend's or the caller's; borrowed */
} state_slice;

typedef struct state_list {
    state_slice *slices; /* own */
    size_t count;
} state_list;

const char *state_kind_name(state_kind kind);
/* STATE_KIND_COUNT: there is none of that name. */
state_kind state_kind_find(const char *name, size_t length);

/* What this rank writes: over all ranks everything once, those of more bytes an element first.
 * ERR_MEMORY. */
muonshard_status state_owned(const muonshard_optimizer *o, state_list *list, error_text *error);
/* What this rank reads: what it works on and, if that is wanted, all parameters. ERR_MEMORY. */
muonshard_status state_wanted(const muonshard_optimizer *o, bool params, state_list *list,
                              error_text *error);
void state_free(state_list *list);
/* bytes [world_size] += what each rank's slices take. */
void state_bytes(const registry *r, const plan *p, const settings *s, size_t *bytes);

/* What has to be the same in a checkpoint and here: name, role, dtype and shape of all. Matrices
 * may be made of them in another way: momentum has an element for each of the parameter. */
uint64_t state_tensors_hash(const registry *r);

#endif
