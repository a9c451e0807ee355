#include "optim/registry.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#include "optim/scale.h"

static bool name_taken(const registry *r, const char *name) {
    for (size_t i = 0; i < r->tensor_count; i++)
        if (strcmp(r->tensors[i].name, name) == 0)
            return true;
    return false;
}

bool registry_gathers_params(const settings *s, muonshard_dtype dtype) {
    if (s->gather != GATHER_AUTO)
        return s->gather == GATHER_PARAMS;
    return dtype != MUONSHARD_FP32 && s->master != MASTER_REPLICATED;
}

master_mode registry_master(const settings *s, muonshard_dtype dtype) {
    if (dtype == MUONSHARD_FP32)
        return MASTER_NONE;
    if (s->master != MASTER_AUTO)
        return (master_mode)s->master;
    return s->rounding == ROUNDING_STOCHASTIC ? MASTER_NONE : MASTER_OWNER;
}

/* Small updates have to survive in 16 bits: in an fp32 copy, or by chance. */
static muonshard_status check_storage(const settings *s, const muonshard_tensor_desc *d,
                                      error_text *error) {
    const master_mode master = registry_master(s, d->dtype);
    const bool params = registry_gathers_params(s, d->dtype);
    if (d->dtype == MUONSHARD_FP32 || d->role == MUONSHARD_ROLE_FROZEN)
        return MUONSHARD_OK;
    FAIL_IF(master == MASTER_NONE && s->rounding != ROUNDING_STOCHASTIC, error,
            MUONSHARD_ERR_CONFIG,
            "tensor '%s' is %s: master none needs rounding stochastic, or small updates are lost",
            d->name, dtype_name(d->dtype));
    FAIL_IF(d->role == MUONSHARD_ROLE_MATRIX && master == MASTER_OWNER && !params, error,
            MUONSHARD_ERR_CONFIG,
            "tensor '%s' is %s: gather updates needs master replicated, or rounding stochastic "
            "without a master",
            d->name, dtype_name(d->dtype));
    FAIL_IF(
        d->role == MUONSHARD_ROLE_MATRIX && master == MASTER_REPLICATED && params, error,
        MUONSHARD_ERR_CONFIG,
        "tensor '%s' is %s: gather params leaves master owner or none; replicated is for updates",
        d->name, dtype_name(d->dtype));
    return MUONSHARD_OK;
}

static muonshard_status check_desc(const registry *r, const muonshard_tensor_desc *d,
                                   error_text *error) {
    const muonshard_status bad = MUONSHARD_ERR_ARGUMENT;
    FAIL_IF(!d->name || !*d->name, error, bad, "tensor %zu has no name", r->tensor_count);
    FAIL_IF(name_taken(r, d->name), error, bad, "tensor '%s' is registered already", d->name);
    FAIL_IF(d->role != MUONSHARD_ROLE_MATRIX && d->role != MUONSHARD_ROLE_ELEMENTWISE &&
                d->role != MUONSHARD_ROLE_FROZEN,
            error, bad, "tensor '%s': role is %d; matrix, element-wise or frozen must be said",
            d->name, (int)d->role);
    FAIL_IF(d->form != MUONSHARD_STACK && d->form != MUONSHARD_FLATTEN, error, bad,
            "tensor '%s': unknown matrix form %d", d->name, (int)d->form);
    FAIL_IF(!dtype_name(d->dtype), error, MUONSHARD_ERR_UNSUPPORTED,
            "tensor '%s': dtype %d; fp32, bf16 and fp16 are supported", d->name, (int)d->dtype);
    FAIL_IF(d->grad_dtype != MUONSHARD_DTYPE_OF_PARAM && !dtype_name(d->grad_dtype), error,
            MUONSHARD_ERR_UNSUPPORTED,
            "tensor '%s': grad_dtype %d; fp32, bf16 and fp16 are supported", d->name,
            (int)d->grad_dtype);
    FAIL_IF(d->dims < 0 || d->dims > MUONSHARD_MAX_DIMS, error, bad,
            "tensor '%s' has %d dimensions; 0 to %d are allowed", d->name, d->dims,
            MUONSHARD_MAX_DIMS);
    FAIL_IF(d->role == MUONSHARD_ROLE_MATRIX && d->dims < 2, error, bad,
            "tensor '%s' has %d dimensions; a matrix needs at least 2", d->name, d->dims);
    int64_t elements = 1;
    for (int i = 0; i < d->dims; i++) {
        FAIL_IF(d->shape[i] < 1, error, bad, "tensor '%s': size %d is %lld; it must be positive",
                d->name, i, (long long)d->shape[i]);
        FAIL_IF(__builtin_mul_overflow(elements, d->shape[i], &elements) ||
                    elements > INT64_MAX / 8,
                error, bad, "tensor '%s' has too many elements", d->name);
    }
    FAIL_IF(!d->param && !r->weightless, error, bad, "tensor '%s': param is NULL", d->name);
    FAIL_IF(d->null_grad != MUONSHARD_NULL_GRAD_ERROR && d->null_grad != MUONSHARD_NULL_GRAD_ZERO &&
                d->null_grad != MUONSHARD_NULL_GRAD_SKIP,
            error, bad, "tensor '%s': unknown null_grad policy %d", d->name, (int)d->null_grad);
    FAIL_IF(!(d->lr_multiplier >= 0) || !isfinite(d->lr_multiplier), error, bad,
            "tensor '%s': lr_multiplier is %g; it must be finite and not negative", d->name,
            d->lr_multiplier);
    FAIL_IF(!(d->decay_multiplier >= 0) || !isfinite(d->decay_multiplier), error, bad,
            "tensor '%s': decay_multiplier is %g; it must be finite and not negative", d->name,
            d->decay_multiplier);
    FAIL_IF(d->group < 0, error, bad, "tensor '%s': group is %d; it must not be negative", d->name,
            d->group);
    FAIL_IF(d->row_split_count && (d->role != MUONSHARD_ROLE_MATRIX || !d->row_splits), error, bad,
            "tensor '%s': row_splits %s", d->name,
            d->row_splits ? "are for matrices only" : "is NULL");
    return MUONSHARD_OK;
}

/* [entries, rows, cols] of a tensor. */
static void set_matrix_shape(tensor *t) {
    t->elements = 1;
    for (int i = 0; i < t->dims; i++)
        t->elements *= (size_t)t->shape[i];
    t->entries = 1;
    t->rows = 1;
    t->cols = (int64_t)t->elements;
    if (t->role != MUONSHARD_ROLE_MATRIX)
        return;
    if (t->form == MUONSHARD_FLATTEN) {
        t->rows = t->shape[0];
        t->cols = (int64_t)t->elements / t->rows;
    } else {
        t->rows = t->shape[t->dims - 2];
        t->cols = t->shape[t->dims - 1];
        t->entries = (int64_t)t->elements / (t->rows * t->cols);
    }
}

/* Updated twice, a parameter would be wrong: tied weights are registered once. */
static muonshard_status check_overlap(const registry *r, const tensor *t, const char *name,
                                      error_text *error) {
    const uintptr_t start = (uintptr_t)t->param, end = start + t->elements * dtype_size(t->dtype);
    for (size_t i = 0; i < r->tensor_count && !r->weightless; i++) {
        const uintptr_t other = (uintptr_t)r->tensors[i].param;
        FAIL_IF(start < other + r->tensors[i].elements * dtype_size(r->tensors[i].dtype) &&
                    other < end,
                error, MUONSHARD_ERR_ARGUMENT, "tensor '%s': its memory overlaps that of '%s'",
                name, r->tensors[i].name);
    }
    return MUONSHARD_OK;
}

static muonshard_status set_splits(tensor *t, const muonshard_tensor_desc *d, error_text *error) {
    t->split_count = d->row_split_count ? d->row_split_count : 1;
    t->row_splits = calloc(t->split_count, sizeof *t->row_splits);
    FAIL_IF(!t->row_splits, error, MUONSHARD_ERR_MEMORY, "out of memory");
    t->row_splits[0] = t->rows;
    int64_t left = t->rows;
    for (size_t i = 0; i < d->row_split_count; i++) {
        FAIL_IF(d->row_splits[i] < 1 || d->row_splits[i] > left, error, MUONSHARD_ERR_ARGUMENT,
                "tensor '%s': row split %zu is %lld; %lld of %lld rows are left", d->name, i,
                (long long)d->row_splits[i], (long long)left, (long long)t->rows);
        t->row_splits[i] = d->row_splits[i];
        left -= d->row_splits[i];
    }
    FAIL_IF(d->row_split_count && left, error, MUONSHARD_ERR_ARGUMENT,
            "tensor '%s': row splits leave %lld of %lld rows out", d->name, (long long)left,
            (long long)t->rows);
    return MUONSHARD_OK;
}

/* `array` is the address of a pointer of any type. */
static muonshard_status grow(void *array, size_t *capacity, size_t needed, size_t item) {
    if (needed <= *capacity)
        return MUONSHARD_OK;
    if (needed > SIZE_MAX / 2 / item)
        return MUONSHARD_ERR_MEMORY;
    size_t n = *capacity ? *capacity : 16;
    while (n < needed)
        n *= 2;
    void *block;
    memcpy(&block, array, sizeof block);
    void *bigger = realloc(block, n * item);
    if (!bigger)
        return MUONSHARD_ERR_MEMORY;
    memcpy(array, &bigger, sizeof bigger);
    *capacity = n;
    return MUONSHARD_OK;
}

static void add_views(registry *r, const settings *s, const tensor *t, int id) {
    for (int64_t e = 0; e < t->entries; e++) {
        size_t offset = (size_t)(e * t->rows * t->cols);
        for (size_t i = 0; i < t->split_count; i++) {
            view v = {.tensor = id,
                      .entry = e,
                      .rows = t->row_splits[i],
                      .cols = t->cols,
                      .offset = offset};
            v.scale = scale_factor(s, t, &v);
            r->views[r->view_count++] = v;
            offset += view_elements(&v);
        }
    }
}

muonshard_status registry_add(registry *r, const settings *s, const muonshard_tensor_desc *d,
                              int *id, error_text *error) {
    TRY(check_desc(r, d, error));
    TRY(check_storage(s, d, error));
    tensor t = {.role = d->role,
                .form = d->form,
                .dims = d->dims,
                .dtype = d->dtype,
                .grad_dtype = d->grad_dtype == MUONSHARD_DTYPE_OF_PARAM ? d->dtype : d->grad_dtype,
                .param = d->param,
                .grad = d->grad,
                .null_grad = d->null_grad,
                .lr_multiplier = d->lr_multiplier,
                .decay_multiplier = d->decay_multiplier,
                .group = d->group,
                .priority = d->priority,
                .priority_stride = d->priority_stride};
    memcpy(t.shape, d->shape, (size_t)d->dims * sizeof d->shape[0]);
    set_matrix_shape(&t);
    TRY(check_overlap(r, &t, d->name, error));
    muonshard_status status;
    TRY_GOTO(set_splits(&t, d, error), failed);
    if (t.role == MUONSHARD_ROLE_MATRIX)
        t.view_count = (size_t)t.entries * t.split_count;
    t.first_view = r->view_count;
    status = MUONSHARD_ERR_MEMORY;
    t.name = strdup(d->name);
    if (!t.name || grow(&r->tensors, &r->tensor_capacity, r->tensor_count + 1, sizeof t) ||
        grow(&r->views, &r->view_capacity, r->view_count + t.view_count, sizeof(view))) {
        fail(error, status, "out of memory");
        goto failed;
    }
    if (t.role == MUONSHARD_ROLE_MATRIX)
        add_views(r, s, &t, (int)r->tensor_count);
    if (id)
        *id = (int)r->tensor_count;
    r->tensors[r->tensor_count++] = t;
    return MUONSHARD_OK;
failed:
    free(t.name);
    free(t.row_splits);
    return status;
}

uint64_t registry_tensor_hash(const registry *r, size_t id) {
    const tensor *t = &r->tensors[id];
    uint64_t h = XXH64(t->name, strlen(t->name), 0);
    const int64_t facts[] = {t->role,      t->form,  t->dims,     t->null_grad,
                             t->dtype,     t->group, t->priority, t->priority_stride,
                             t->grad_dtype};
    h = XXH64(facts, sizeof facts, h);
    h = XXH64(t->shape, (size_t)t->dims * sizeof t->shape[0], h);
    h = XXH64(t->row_splits, t->split_count * sizeof t->row_splits[0], h);
    const double multipliers[] = {t->lr_multiplier, t->decay_multiplier};
    return XXH64(multipliers, sizeof multipliers, h);
}

void registry_free(registry *r) {
    for (size_t i = 0; i < r->tensor_count; i++) {
        free(r->tensors[i].name);
        free(r->tensors[i].row_splits);
    }
    free(r->tensors);
    free(r->views);
    *r = (registry){0};
}
