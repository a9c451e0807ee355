/* registry.h - the caller's tensors, and the matrix views they are made of. */
#ifndef REGISTRY_H
#define REGISTRY_H

#include <stdbool.h>
#include "dtype.h"
#include "settings.h"

typedef struct tensor {
    char *name; /* own */
    muonshard_role role;
    muonshard_matrix_form form;
    int dims;
    int64_t shape[MUONSHARD_MAX_DIMS];
    int64_t *row_splits; /* own, [split_count]; one split of all rows where the caller gave none */
    size_t split_count;
    muonshard_dtype dtype, grad_dtype;
    void *param;      /* borrowed, [elements] of dtype */
    const void *grad; /* borrowed, [elements] of grad_dtype, or NULL */
    muonshard_null_grad null_grad;
    double lr_multiplier, decay_multiplier;
    int group, priority, priority_stride;

    int64_t entries, rows, cols; /* as [entries, rows, cols]; element-wise: [1, 1, elements] */
    size_t elements;
    size_t first_view, view_count; /* matrices: entries * split_count views */
} tensor;

/* One matrix: contiguous rows of one entry of a tensor. */
typedef struct view {
    int tensor;
    int64_t entry, rows, cols;
    size_t offset; /* elements from the tensor's start */
    double scale;  /* of U, from settings and shape */
} view;

typedef struct registry {
    tensor *tensors; /* own, [tensor_count] */
    size_t tensor_count, tensor_capacity;
    view *views; /* own, [view_count], in registration order */
    size_t view_count, view_capacity;
    bool weightless; /* tensors may have no memory: only a plan is wanted */
} registry;

/* Whether owners of a matrix send new parameters, and not U. */
bool registry_gathers_params(const settings *s, muonshard_dtype dtype);
/* Who keeps an fp32 copy of parameters: nobody where they are fp32 themselves; never MASTER_AUTO.
 */
master_mode registry_master(const settings *s, muonshard_dtype dtype);

/* Checks and copies one description. Nothing changes on failure. */
muonshard_status registry_add(registry *r, const settings *s, const muonshard_tensor_desc *desc,
                              int *id, error_text *error);
/* A hash of what all ranks must have in common of tensor `id`: everything but pointers. */
uint64_t registry_tensor_hash(const registry *r, size_t id);
void registry_free(registry *r);

static inline size_t view_elements(const view *v) {
    return (size_t)v->rows * (size_t)v->cols;
}
/* Where element `index` of a tensor's parameter or gradient lies; NULL for a NULL gradient. */
static inline void *tensor_param_at(const tensor *t, size_t index) {
    return (char *)t->param + index * dtype_size(t->dtype);
}
static inline const void *tensor_grad_at(const tensor *t, size_t index) {
    return t->grad ? (const char *)t->grad + index * dtype_size(t->grad_dtype) : NULL;
}

#endif
