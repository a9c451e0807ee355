/* formulas.h - what happens to one element: momentum, decay, update, AdamW, variance, norms. The
 * host's loops and the GPU's kernels are made of these and nothing else, in C and CUDA alike. fp32
 * with one rounding an operation, since nothing contracts; scalars are computed in fp64 and rounded
 * once. */
#ifndef FORMULAS_H
#define FORMULAS_H

#include <float.h>
#include <math.h>

#include "kernels/backend.h"

#ifdef __CUDACC__
#define FORMULA static __host__ __device__ __forceinline__
#else
#define FORMULA static inline __attribute__((always_inline, unused))
#endif

/* ---- what all do ---- */

/* A gradient that is longer is brought down to this: momentum, a hundred thousand times as large,
 * is a number of fp32 and bf16 then. To the second before AdamW keeps its squares. State that
 * became infinite would stay so, and what it belongs to would move no more. */
#define LONGEST_GRADIENT 0x1p110
#define LONGEST_SQUARED  0x1p63

FORMULA bool leave_alone(const kernel_context *c, int tensor) {
    return c->record->skip || !c->active[tensor];
}

/* d, see decay_method. */
FORMULA double decay_of_method(decay_method method, double lr, double wd) {
    switch (method) {
    case DECAY_DECOUPLED:
    case DECAY_CAUTIOUS: return lr * wd;
    case DECAY_INDEPENDENT: return wd;
    case DECAY_LR_SQUARED:
    case DECAY_CAUTIOUS_LR_SQUARED: return lr * lr * wd;
    case DECAY_L2: break;
    }
    return 0.0;
}

FORMULA bool decay_is_cautious(decay_method method) {
    return method == DECAY_CAUTIOUS || method == DECAY_CAUTIOUS_LR_SQUARED;
}

/* ---- momentum ---- */

typedef struct momentum_scalars {
    bool ema, nesterov, towards_g;
    float factor, wd; /* g = factor S + wd W */
    float mu, rest;   /* rest = 1 - mu */
    float m, g;       /* U = m M + g G, but for the Nesterov of ema */
} momentum_scalars;

FORMULA momentum_scalars momentum_scalars_of(const momentum_args *args, const step_record *record,
                                             const tensor_values *v) {
    const double mu = v->momentum, t = (double)record->count;
    double m = 1.0, g = 0.0;
    if (args->form == MOMENTUM_EMA_CORRECTED) {
        m = args->nesterov ? mu / (1.0 - pow(mu, t + 1.0)) : 1.0 / (1.0 - pow(mu, t));
        g = (1.0 - mu) / (1.0 - pow(mu, t));
    } else if (args->nesterov) {
        m = args->form == MOMENTUM_HEAVY_BALL ? mu : 1.0;
        g = args->form == MOMENTUM_HEAVY_BALL ? 1.0 : mu;
    }
    momentum_scalars s;
    s.ema = args->form == MOMENTUM_EMA || args->form == MOMENTUM_EMA_CORRECTED;
    s.nesterov = args->nesterov;
    s.towards_g = args->form == MOMENTUM_EMA;
    s.factor = record->grad_factor;
    s.wd = (float)v->weight_decay;
    s.mu = (float)mu;
    s.rest = (float)(1.0 - mu);
    s.m = (float)m;
    s.g = (float)g;
    return s;
}

/* (1-mu) g + mu M is M moved by 1-mu towards g, for M and for U alike. */
FORMULA float next_momentum(momentum_scalars s, float m, float g) {
    return s.ema ? m + s.rest * (g - m) : s.mu * m + g;
}

FORMULA float direction(momentum_scalars s, float m, float g) {
    if (!s.nesterov)
        return s.m * m;
    return s.towards_g ? m + s.rest * (g - m) : s.m * m + s.g * g;
}

/* ---- decay and update of matrices ---- */

typedef struct apply_scalars {
    float keep, d, step; /* 1 - d, d, lr scale */
} apply_scalars;

FORMULA apply_scalars apply_scalars_of(const apply_args *args, double scale,
                                       const tensor_values *v) {
    const bool scaled = args->scaled_lr && args->decay != DECAY_INDEPENDENT;
    const double d = decay_of_method(args->decay, v->lr, v->weight_decay) * (scaled ? scale : 1.0);
    apply_scalars s;
    s.keep = (float)(1.0 - d);
    s.d = (float)d;
    s.step = (float)(v->lr * scale);
    return s;
}

/* Zeros count as pulled. */
FORMULA bool pulls_to_zero(float w, float u) {
    return ((w >= 0.0f) & (u >= 0.0f)) | ((w <= 0.0f) & (u <= 0.0f));
}

FORMULA float apply_multiply(float w, float u, apply_scalars s, bool cautious) {
    const float keep = !cautious || pulls_to_zero(w, u) ? s.keep : 1.0f;
    return keep * w - s.step * u;
}

FORMULA float apply_add(float w, float u, apply_scalars s, bool cautious) {
    const float d = !cautious || pulls_to_zero(w, u) ? s.d : 0.0f;
    return (w + -d * w) - s.step * u;
}

FORMULA float apply_with_update(float w, float u, apply_scalars s, bool cautious) {
    const float d = !cautious || pulls_to_zero(w, u) ? s.d : 0.0f;
    return w - (s.step * u + d * w);
}

/* ---- AdamW and Lion ---- */

typedef struct adam_scalars {
    float factor, wd; /* g = factor S + wd W */
    float beta1, beta1_rest, beta2, beta2_rest;
    float m, g; /* Nesterov: m M + g G takes the place of M */
    float step, root_scale, eps;
    float keep; /* 1 - d */
} adam_scalars;

/* Of a gradient that is `norm` long and has been brought down to LONGEST_GRADIENT. */
FORMULA double adam_shortening(double norm) {
    return fmin(1.0, LONGEST_SQUARED / fmin(norm, LONGEST_GRADIENT));
}

/* root_scale is 1/sqrt(c2) with the eps outside, else 1: then sqrt(c2) is in the step. */
FORMULA adam_scalars adam_scalars_of(const adam_args *args, const step_record *record,
                                     const tensor_values *v) {
    const double t = (double)record->count, beta1 = args->beta1, beta2 = args->beta2;
    const double c1 = 1.0 - pow(beta1, t), c2 = 1.0 - pow(beta2, t);
    const bool inside = args->form == ADAM_EPS_INSIDE;
    double step = v->lr;
    if (args->rule == ELEMENTWISE_ADAMW)
        step = (args->nesterov ? step : step / c1) * (inside ? sqrt(c2) : 1.0);
    const double norm = record->grad_norm * (double)record->clip_factor;
    adam_scalars s;
    s.factor = (float)((double)record->grad_factor * adam_shortening(norm));
    s.wd = (float)v->weight_decay;
    s.beta1 = (float)beta1;
    s.beta1_rest = (float)(1.0 - beta1);
    s.beta2 = (float)beta2;
    s.beta2_rest = (float)(1.0 - beta2);
    s.m = (float)(args->nesterov ? beta1 / (1.0 - pow(beta1, t + 1.0)) : 1.0);
    s.g = (float)(args->nesterov ? (1.0 - beta1) / c1 : 0.0);
    s.step = (float)step;
    s.root_scale = (float)(inside ? 1.0 : 1.0 / sqrt(c2));
    s.eps = (float)args->eps;
    s.keep = (float)(1.0 - decay_of_method(args->decay, v->lr, v->weight_decay));
    return s;
}

FORMULA float adam_gradient(adam_scalars s, float sum, float w, bool l2) {
    return l2 ? s.factor * sum + s.wd * w : s.factor * sum;
}

/* What decay leaves of w. */
FORMULA float adam_kept(adam_scalars s, float w, float update, bool cautious) {
    const bool pulls = ((w > 0.0f) & (update > 0.0f)) | ((w < 0.0f) & (update < 0.0f));
    return (!cautious || pulls ? s.keep : 1.0f) * w;
}

FORMULA void adam_element(float *w, float *m, float *v, float sum, adam_scalars s, bool l2,
                          bool cautious) {
    const float g = adam_gradient(s, sum, *w, l2);
    *m += s.beta1_rest * (g - *m);
    *v = s.beta2 * *v + s.beta2_rest * g * g;
    const float update = s.step * (s.m * *m + s.g * g) / (sqrtf(*v) * s.root_scale + s.eps);
    *w = adam_kept(s, *w, update, cautious) - update;
}

FORMULA void lion_element(float *w, float *m, float sum, adam_scalars s, bool l2, bool cautious) {
    const float g = adam_gradient(s, sum, *w, l2);
    const float u = s.beta1 * *m + s.beta1_rest * g;
    *m = s.beta2 * *m + s.beta2_rest * g;
    const float update = s.step * (float)((u > 0.0f) - (u < 0.0f));
    *w = adam_kept(s, *w, update, cautious) - update;
}

/* ---- variance ---- */

FORMULA float variance_next(const variance_args *args, float v, double sum, double length) {
    return (float)(args->beta2 * v + (1.0 - args->beta2) * (sum / length));
}

FORMULA double variance_denominator_of(const variance_args *args, float v) {
    return args->denominator == VARIANCE_CLAMPED ? sqrt(fmax((double)v, args->eps))
                                                 : sqrt((double)v) + args->eps;
}

/* From the squared Frobenius norms of U and of U once divided. */
FORMULA double variance_rescale(const variance_args *args, double norm2, double divided2) {
    return sqrt(norm2) / fmax(sqrt(divided2), args->eps);
}

/* ---- what a matrix is divided by before Newton-Schulz ---- */

/* A zero matrix, or a zero row, stays zero even if eps is. */
FORMULA double inverse_of(double divisor) {
    return divisor == 0.0 ? 0.0 : 1.0 / divisor;
}

FORMULA double frobenius_divisor(ns_norm norm, double frobenius, double eps) {
    switch (norm) {
    case NS_NORM_FROBENIUS_ADD: return frobenius + eps;
    case NS_NORM_FROBENIUS_SAFETY: return 1.02 * frobenius + eps;
    default: return fmax(frobenius, eps);
    }
}

/* ---- the outcome of agreement ---- */

/* 0, or 1 + the lowest rank whose word has a failure or differs from the first in what has to be
 * equal; *status as in step_record. */
FORMULA int failed_rank(const resolve_args *a, int *status) {
    for (int r = 0; r < a->word_count; r++) {
        const double *word = a->words + (size_t)r * a->stride;
        *status = (int)word[0];
        if (word[0] != 0.0 || (a->equal && word[a->equal] != a->words[a->equal]))
            return 1 + r;
    }
    *status = 0;
    return 0;
}

FORMULA bool tensor_is_active(const resolve_args *a, size_t tensor) {
    bool present = false;
    for (int r = 0; r < a->word_count; r++)
        present = present || a->words[(size_t)r * a->stride + 1 + tensor] != 0.0;
    return present || !a->skip_if_absent[tensor];
}

/* `sum`: of squares, unscaled. A difference between ranks counts as a failure like any other. */
FORMULA void resolve_record(const resolve_args *a, double sum) {
    int status;
    const int failed = failed_rank(a, &status);
    a->total[0] = failed && !status ? (double)MUONSHARD_ERR_MISMATCH : (double)status;
    a->total[1] = sum * a->sum_scale * a->sum_scale;
    step_record *record = a->record;
    if (!record)
        return;
    const double norm = sqrt(sum) * a->sum_scale;
    double clip = 1.0;
    if (a->clip_norm > 0.0 && norm + 1e-6 > a->clip_norm)
        clip = a->clip_norm / (norm + 1e-6);
    const double factor = fmin(clip, LONGEST_GRADIENT / norm) * a->scale;
    record->failed = failed;
    record->status = status;
    /* Not only finite: the norm has to be a number of fp32, and so has what multiplies. */
    record->skip = failed || !(norm <= (double)FLT_MAX && factor <= (double)FLT_MAX);
    record->grad_norm = norm;
    record->clip_factor = (float)clip;
    record->grad_factor = (float)factor;
    record->count += record->skip ? 0 : 1;
}

#endif
