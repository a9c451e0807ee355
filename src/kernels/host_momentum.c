/* host_momentum.c - momentum M and update direction U from the summed gradient S. */
#include "kernels/host.h"
#include "kernels/host_elementwise.h"

static void add_decay(float *restrict g, const float *restrict w, size_t n, float factor,
                      float wd) {
    for (size_t i = 0; i < n; i++)
        g[i] = factor * g[i] + wd * w[i];
}

static void momentum_fp32(float *restrict u, float *restrict m, size_t n, momentum_scalars s) {
    for (size_t i = 0; i < n; i++) {
        const float g = s.factor * u[i];
        m[i] = next_momentum(s, m[i], g);
        u[i] = direction(s, m[i], g);
    }
}

/* U is made of M as it is stored. */
static void momentum_16bit(float *restrict u, void *momentum, muonshard_dtype dtype, size_t n,
                           momentum_scalars s) {
    float m[HOST_BLOCK];
    dtype_load(m, momentum, dtype, n);
    for (size_t i = 0; i < n; i++)
        m[i] = next_momentum(s, m[i], s.factor * u[i]);
    dtype_store(momentum, dtype, m, n);
    dtype_load(m, momentum, dtype, n);
    for (size_t i = 0; i < n; i++)
        u[i] = direction(s, m[i], s.factor * u[i]);
}

static void momentum_block(const momentum_args *args, momentum_scalars s, const momentum_item *it,
                           size_t start, size_t n) {
    float *u = it->g_u + start;
    void *m = host_at(it->momentum, args->dtype, start);
    if (args->l2) {
        float block[HOST_BLOCK];
        add_decay(u, host_read(it->w, it->w_dtype, start, n, block), n, s.factor, s.wd);
        s.factor = 1.0f;
    }
    if (args->dtype == MUONSHARD_FP32)
        momentum_fp32(u, m, n, s);
    else
        momentum_16bit(u, m, args->dtype, n, s);
}

typedef struct momentum_job {
    const kernel_context *context;
    const momentum_args *args;
    const momentum_item *items;
} momentum_job;

static size_t momentum_size(const void *job, size_t item) {
    const momentum_job *j = job;
    const momentum_item *it = &j->items[item];
    return leave_alone(j->context, it->tensor) ? 0 : it->count;
}

static void momentum_slice(const void *job, size_t item, size_t start, size_t end) {
    const momentum_job *j = job;
    const kernel_context *c = j->context;
    const momentum_item *it = &j->items[item];
    const momentum_scalars s = momentum_scalars_of(j->args, c->record, &c->values[it->tensor]);
    for (; start < end; start += HOST_BLOCK)
        momentum_block(j->args, s, it, start, host_block(start, end));
}

muonshard_status host_momentum(backend *self, const kernel_context *c, const momentum_args *args,
                               const momentum_item *items, size_t count) {
    const momentum_job job = {c, args, items};
    host_slices(self, momentum_slice, momentum_size, &job, count);
    for (size_t i = 0; i < count; i++)
        if (items[i].squares && !leave_alone(c, items[i].tensor))
            *items[i].squares = host_sum_squares(items[i].g_u, items[i].count);
    return MUONSHARD_OK;
}
