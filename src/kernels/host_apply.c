/* host_apply.c - weight decay and update of matrices, with or without fp32 masters. */
#include "kernels/host.h"
#include "kernels/host_elementwise.h"

/* A loop of its own for each form, cautious or not. */
#define APPLY_LOOP(formula, cautious)                                                              \
    for (size_t i = 0; i < n; i++)                                                                 \
        w[i] = formula(w[i], u[i], s, cautious);

static void multiply(float *restrict w, const float *restrict u, size_t n, apply_scalars s,
                     bool cautious) {
    if (cautious)
        APPLY_LOOP(apply_multiply, true)
    else
        APPLY_LOOP(apply_multiply, false)
}

static void add(float *restrict w, const float *restrict u, size_t n, apply_scalars s,
                bool cautious) {
    if (cautious)
        APPLY_LOOP(apply_add, true)
    else
        APPLY_LOOP(apply_add, false)
}

static void with_update(float *restrict w, const float *restrict u, size_t n, apply_scalars s,
                        bool cautious) {
    if (cautious)
        APPLY_LOOP(apply_with_update, true)
    else
        APPLY_LOOP(apply_with_update, false)
}

static void decay_and_update(const apply_args *args, float *w, const float *u, size_t n,
                             apply_scalars s) {
    const bool cautious = decay_is_cautious(args->decay);
    switch (args->form) {
    case DECAY_FORM_MULTIPLY: multiply(w, u, n, s, cautious); break;
    case DECAY_FORM_ADD: add(w, u, n, s, cautious); break;
    case DECAY_FORM_WITH_UPDATE: with_update(w, u, n, s, cautious); break;
    }
}

/* out = diag(factor) U or U diag(factor), elements [start, start + n): row by row. */
static void multiply_factor(float *restrict out, const float *restrict u, const apply_item *it,
                            size_t start, size_t n) {
    const size_t cols = (size_t)it->cols;
    size_t row = start / cols, col = start % cols;
    for (size_t done = 0; done < n; row++, col = 0) {
        const size_t length = cols - col < n - done ? cols - col : n - done;
        if (it->by_rows)
            for (size_t i = 0; i < length; i++)
                out[done + i] = it->factor[row] * u[done + i];
        else
            for (size_t i = 0; i < length; i++)
                out[done + i] = it->factor[col + i] * u[done + i];
        done += length;
    }
}

static void apply_block(const kernel_context *c, const apply_args *args, apply_scalars s,
                        const apply_item *it, size_t start, size_t n) {
    float u_block[HOST_BLOCK], scaled[HOST_BLOCK], w_block[HOST_BLOCK];
    const float *u = host_read(it->u, it->u_dtype, start, n, u_block);
    if (it->factor) {
        multiply_factor(scaled, u, it, start, n);
        u = scaled;
    }
    void *stored = host_at(it->w, it->w_dtype, start);
    float *w = w_block;
    if (it->master)
        w = it->master + start;
    else if (it->w_dtype == MUONSHARD_FP32)
        w = stored;
    else
        dtype_load(w, stored, it->w_dtype, n);
    decay_and_update(args, w, u, n, s);
    if (c->stochastic && it->w_dtype != MUONSHARD_FP32)
        dtype_store_stochastic(stored, it->w_dtype, w, n, c->seed, (uint32_t)c->record->count,
                               (uint32_t)it->tensor, it->first + start);
    else if (w != stored)
        dtype_store(stored, it->w_dtype, w, n);
}

typedef struct apply_job {
    const kernel_context *context;
    const apply_args *args;
    const apply_item *items;
} apply_job;

static size_t apply_size(const void *job, size_t item) {
    const apply_job *j = job;
    const apply_item *it = &j->items[item];
    return leave_alone(j->context, it->tensor) ? 0 : (size_t)it->rows * (size_t)it->cols;
}

static void apply_slice(const void *job, size_t item, size_t start, size_t end) {
    const apply_job *j = job;
    const apply_args *args = j->args;
    const apply_item *it = &j->items[item];
    const apply_scalars s = apply_scalars_of(args, it->scale, &j->context->values[it->tensor]);
    for (; start < end; start += HOST_BLOCK)
        apply_block(j->context, args, s, it, start, host_block(start, end));
}

muonshard_status host_apply(backend *self, const kernel_context *c, const apply_args *args,
                            const apply_item *items, size_t count) {
    const apply_job job = {c, args, items};
    host_slices(self, apply_slice, apply_size, &job, count);
    return MUONSHARD_OK;
}
