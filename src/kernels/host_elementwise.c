/* host_elementwise.c - the passes over gradients, momentum and parameters: one read and one write
 * of each array. */
#include <math.h>

#include "kernels/host.h"

static bool leave_alone(const kernel_context *c, int tensor) {
    return c->record->skip || !c->active[tensor];
}

/* In blocks that stay in the cache; the order of additions is that of the ranks for every element.
 */
muonshard_status host_sum_ranks(backend *self, float *restrict dst, const float *restrict src,
                                int ranks, size_t count, backend_stream stream) {
    (void)self;
    (void)stream;
    const size_t block = 4096;
    for (size_t start = 0; start < count; start += block) {
        const size_t n = count - start < block ? count - start : block;
        float *restrict d = dst + start;
        for (size_t i = 0; i < n; i++)
            d[i] = src[start + i];
        for (int r = 1; r < ranks; r++) {
            const float *restrict s = src + (size_t)r * count + start;
            for (size_t i = 0; i < n; i++)
                d[i] += s[i];
        }
    }
    return MUONSHARD_OK;
}

/* Eight partial sums: vectors of any width give the same bits. */
double host_sum_squares(const float *x, size_t count) {
    double part[8] = {0.0};
    size_t i = 0;
    for (; i + 8 <= count; i += 8)
        for (size_t k = 0; k < 8; k++)
            part[k] += (double)x[i + k] * (double)x[i + k];
    for (size_t k = 0; i < count; i++, k++)
        part[k] += (double)x[i] * (double)x[i];
    return ((part[0] + part[1]) + (part[2] + part[3])) +
           ((part[4] + part[5]) + (part[6] + part[7]));
}

muonshard_status host_measure(backend *self, const sum_squares_item *items, size_t count) {
    (void)self;
    for (size_t i = 0; i < count; i++)
        *items[i].out = host_sum_squares(items[i].x, items[i].count);
    return MUONSHARD_OK;
}

/* ---- momentum: M and U from the summed gradient S, g = factor S ---- */

static void heavy_ball(float *restrict u, float *restrict m, size_t n, float factor, float mu) {
    for (size_t i = 0; i < n; i++) {
        m[i] = mu * m[i] + factor * u[i];
        u[i] = m[i];
    }
}

static void heavy_ball_nesterov(float *restrict u, float *restrict m, size_t n, float factor,
                                float mu) {
    for (size_t i = 0; i < n; i++) {
        const float g = factor * u[i];
        m[i] = mu * m[i] + g;
        u[i] = g + mu * m[i];
    }
}

static void heavy_ball_swapped_nesterov(float *restrict u, float *restrict m, size_t n,
                                        float factor, float mu) {
    for (size_t i = 0; i < n; i++) {
        const float g = factor * u[i];
        m[i] = mu * m[i] + g;
        u[i] = m[i] + mu * g;
    }
}

/* (1-mu) g + mu M is M moved by 1-mu towards g, for M and for U alike. */
static void ema(float *restrict u, float *restrict m, size_t n, float factor, float rest) {
    for (size_t i = 0; i < n; i++) {
        m[i] += rest * (factor * u[i] - m[i]);
        u[i] = m[i];
    }
}

static void ema_nesterov(float *restrict u, float *restrict m, size_t n, float factor, float rest) {
    for (size_t i = 0; i < n; i++) {
        const float g = factor * u[i];
        m[i] += rest * (g - m[i]);
        u[i] = m[i] + rest * (g - m[i]);
    }
}

muonshard_status host_momentum(backend *self, const kernel_context *c, momentum_form form,
                               bool nesterov, const momentum_item *items, size_t count) {
    (void)self;
    const float factor = c->record->grad_factor;
    for (size_t i = 0; i < count; i++) {
        const momentum_item *it = &items[i];
        if (leave_alone(c, it->tensor))
            continue;
        const double momentum = c->values[it->tensor].momentum;
        const float mu = (float)momentum, rest = (float)(1.0 - momentum);
        if (form == MOMENTUM_EMA)
            (nesterov ? ema_nesterov : ema)(it->g_u, it->momentum, it->count, factor, rest);
        else if (!nesterov)
            heavy_ball(it->g_u, it->momentum, it->count, factor, mu);
        else if (form == MOMENTUM_HEAVY_BALL)
            heavy_ball_nesterov(it->g_u, it->momentum, it->count, factor, mu);
        else
            heavy_ball_swapped_nesterov(it->g_u, it->momentum, it->count, factor, mu);
    }
    return MUONSHARD_OK;
}

/* ---- parameters ---- */

static void apply(float *restrict w, const float *restrict u, size_t n, float keep, float step) {
    for (size_t i = 0; i < n; i++)
        w[i] = keep * w[i] - step * u[i];
}

muonshard_status host_apply(backend *self, const kernel_context *c, const apply_item *items,
                            size_t count) {
    (void)self;
    for (size_t i = 0; i < count; i++) {
        const apply_item *it = &items[i];
        if (leave_alone(c, it->tensor))
            continue;
        const tensor_values *v = &c->values[it->tensor];
        apply(it->w, it->u, it->count, (float)(1.0 - v->lr * v->weight_decay),
              (float)(v->lr * it->scale));
    }
    return MUONSHARD_OK;
}

typedef struct adam_scalars {
    float factor, beta1_rest, beta2, beta2_rest, keep, step, root_scale, eps;
} adam_scalars;

/* root_scale is 1/sqrt(c2) with the eps outside, else 1: then sqrt(c2) is in the step. */
static void adam(const adam_item *it, adam_scalars s) {
    float *restrict w = it->w, *restrict m = it->m, *restrict v = it->v;
    const float *restrict grad = it->g;
    for (size_t i = 0; i < it->count; i++) {
        const float g = s.factor * grad[i];
        m[i] += s.beta1_rest * (g - m[i]);
        v[i] = s.beta2 * v[i] + s.beta2_rest * g * g;
        w[i] = s.keep * w[i] - s.step * m[i] / (sqrtf(v[i]) * s.root_scale + s.eps);
    }
}

muonshard_status host_adam(backend *self, const kernel_context *c, const adam_args *args,
                           const adam_item *items, size_t count) {
    (void)self;
    const double t = (double)c->record->count;
    const double c1 = 1.0 - pow(args->beta1, t), c2 = 1.0 - pow(args->beta2, t);
    const bool inside = args->form == ADAM_EPS_INSIDE;
    for (size_t i = 0; i < count; i++) {
        if (leave_alone(c, items[i].tensor))
            continue;
        const tensor_values *v = &c->values[items[i].tensor];
        const double step = v->lr / c1 * (inside ? sqrt(c2) : 1.0);
        adam(&items[i], (adam_scalars){.factor = c->record->grad_factor,
                                       .beta1_rest = (float)(1.0 - args->beta1),
                                       .beta2 = (float)args->beta2,
                                       .beta2_rest = (float)(1.0 - args->beta2),
                                       .keep = (float)(1.0 - v->lr * v->weight_decay),
                                       .step = (float)step,
                                       .root_scale = (float)(inside ? 1.0 : 1.0 / sqrt(c2)),
                                       .eps = (float)args->eps});
    }
    return MUONSHARD_OK;
}
