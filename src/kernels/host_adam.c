/* host_adam.c - AdamW and Lion, for what is not a matrix. */
#include <math.h>

#include "kernels/host.h"
#include "kernels/host_elementwise.h"

typedef struct adam_scalars {
    float factor, wd; /* g = factor S + wd W */
    float beta1, beta1_rest, beta2, beta2_rest;
    float m, g; /* Nesterov: m M + g G takes the place of M */
    float step, root_scale, eps;
    float keep; /* 1 - d */
} adam_scalars;

/* root_scale is 1/sqrt(c2) with the eps outside, else 1: then sqrt(c2) is in the step. */
static adam_scalars adam_scalars_of(const adam_args *args, const step_record *record,
                                    const tensor_values *v) {
    const double t = (double)record->count, beta1 = args->beta1, beta2 = args->beta2;
    const double c1 = 1.0 - pow(beta1, t), c2 = 1.0 - pow(beta2, t);
    const bool inside = args->form == ADAM_EPS_INSIDE;
    double step = v->lr;
    if (args->rule == ELEMENTWISE_ADAMW)
        step = (args->nesterov ? step : step / c1) * (inside ? sqrt(c2) : 1.0);
    return (adam_scalars){.factor = record->grad_factor,
                          .wd = (float)v->weight_decay,
                          .beta1 = (float)beta1,
                          .beta1_rest = (float)(1.0 - beta1),
                          .beta2 = (float)beta2,
                          .beta2_rest = (float)(1.0 - beta2),
                          .m = (float)(args->nesterov ? beta1 / (1.0 - pow(beta1, t + 1.0)) : 1.0),
                          .g = (float)(args->nesterov ? (1.0 - beta1) / c1 : 0.0),
                          .step = (float)step,
                          .root_scale = (float)(inside ? 1.0 : 1.0 / sqrt(c2)),
                          .eps = (float)args->eps,
                          .keep = (float)(1.0 - host_decay(args->decay, v->lr, v->weight_decay))};
}

static inline float gradient(adam_scalars s, float sum, float w, bool l2) {
    return l2 ? s.factor * sum + s.wd * w : s.factor * sum;
}

/* What decay leaves of w. */
static inline float kept(adam_scalars s, float w, float update, bool cautious) {
    const bool pulls_to_zero = ((w > 0.0f) & (update > 0.0f)) | ((w < 0.0f) & (update < 0.0f));
    return (!cautious || pulls_to_zero ? s.keep : 1.0f) * w;
}

/* `l2` and `cautious` are constant where they are called, for a loop of its own each way. */
static inline void adam(const adam_item *it, size_t start, size_t end, adam_scalars s, bool l2,
                        bool cautious) {
    float *restrict w = it->w, *restrict m = it->m, *restrict v = it->v;
    const float *restrict sum = it->g;
    for (size_t i = start; i < end; i++) {
        const float g = gradient(s, sum[i], w[i], l2);
        m[i] += s.beta1_rest * (g - m[i]);
        v[i] = s.beta2 * v[i] + s.beta2_rest * g * g;
        const float update = s.step * (s.m * m[i] + s.g * g) / (sqrtf(v[i]) * s.root_scale + s.eps);
        w[i] = kept(s, w[i], update, cautious) - update;
    }
}

static inline void lion(const adam_item *it, size_t start, size_t end, adam_scalars s, bool l2,
                        bool cautious) {
    float *restrict w = it->w, *restrict m = it->m;
    const float *restrict sum = it->g;
    for (size_t i = start; i < end; i++) {
        const float g = gradient(s, sum[i], w[i], l2);
        const float u = s.beta1 * m[i] + s.beta1_rest * g;
        m[i] = s.beta2 * m[i] + s.beta2_rest * g;
        const float update = s.step * (float)((u > 0.0f) - (u < 0.0f));
        w[i] = kept(s, w[i], update, cautious) - update;
    }
}

static void adam_step(const adam_item *it, size_t start, size_t end, adam_scalars s,
                      decay_method decay) {
    if (decay == DECAY_L2)
        adam(it, start, end, s, true, false);
    else if (host_decay_is_cautious(decay))
        adam(it, start, end, s, false, true);
    else
        adam(it, start, end, s, false, false);
}

static void lion_step(const adam_item *it, size_t start, size_t end, adam_scalars s,
                      decay_method decay) {
    if (decay == DECAY_L2)
        lion(it, start, end, s, true, false);
    else if (host_decay_is_cautious(decay))
        lion(it, start, end, s, false, true);
    else
        lion(it, start, end, s, false, false);
}

typedef struct adam_job {
    const kernel_context *context;
    const adam_args *args;
    const adam_item *items;
} adam_job;

static size_t adam_size(const void *job, size_t item) {
    const adam_job *j = job;
    const adam_item *it = &j->items[item];
    return host_leave_alone(j->context, it->tensor) ? 0 : it->count;
}

static void adam_slice(const void *job, size_t item, size_t start, size_t end) {
    const adam_job *j = job;
    const kernel_context *c = j->context;
    const adam_item *it = &j->items[item];
    const adam_scalars s = adam_scalars_of(j->args, c->record, &c->values[it->tensor]);
    (j->args->rule == ELEMENTWISE_LION ? lion_step : adam_step)(it, start, end, s, j->args->decay);
}

muonshard_status host_adam(backend *self, const kernel_context *c, const adam_args *args,
                           const adam_item *items, size_t count) {
    const adam_job job = {c, args, items};
    host_slices(self, adam_slice, adam_size, &job, count);
    return MUONSHARD_OK;
}
