#include "oracle_optimizer.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static double *zeros(size_t count) {
    double *x = calloc(count, sizeof *x);
    if (x == NULL)
        abort();
    return x;
}

const oracle_preset oracle_presets[] = {
    {.name = "jordan",
     .momentum_form = ORACLE_EMA,
     .momentum = 0.95,
     .nesterov = true,
     .norm = ORACLE_FROBENIUS_ADD,
     .norm_eps = 1e-7,
     .set = ORACLE_SIMPLE,
     .steps = 5,
     .coefficient_safety = 1.0,
     .scale = ORACLE_SCALE_SHAPE,
     .scale_dims = ORACLE_LAST_TWO,
     .extra_scale = 1.0,
     .lr = 0.02,
     .weight_decay = 0.0,
     .adam_form = ORACLE_EPS_OUTSIDE,
     .adam_eps = 1e-10,
     .adam_beta1 = 0.9,
     .adam_beta2 = 0.95,
     .adam_lr = 3e-4,
     .adam_weight_decay = 0.0},
    {.name = "moonlight",
     .momentum_form = ORACLE_HEAVY_BALL,
     .momentum = 0.95,
     .nesterov = true,
     .norm = ORACLE_FROBENIUS_ADD,
     .norm_eps = 1e-7,
     .set = ORACLE_SIMPLE,
     .steps = 5,
     .coefficient_safety = 1.0,
     .scale = ORACLE_SCALE_RMS,
     .scale_dims = ORACLE_FIRST_TWO,
     .extra_scale = 1.0,
     .lr = 1e-3,
     .weight_decay = 0.1,
     .adam_form = ORACLE_EPS_INSIDE,
     .adam_eps = 1e-8,
     .adam_beta1 = 0.9,
     .adam_beta2 = 0.95,
     .adam_lr = 1e-3,
     .adam_weight_decay = 0.1},
    {.name = "nvidia",
     .momentum_form = ORACLE_EMA,
     .momentum = 0.95,
     .nesterov = false,
     .norm = ORACLE_FROBENIUS_MAX,
     .norm_eps = 1e-7,
     .set = ORACLE_QUINTIC,
     .steps = 5,
     .coefficient_safety = 1.0,
     .scale = ORACLE_SCALE_SPECTRAL,
     .scale_dims = ORACLE_FLATTENED,
     .extra_scale = 1.0,
     .lr = 3e-4,
     .weight_decay = 0.01,
     .adam_form = ORACLE_EPS_OUTSIDE,
     .adam_eps = 1e-8,
     .adam_beta1 = 0.9,
     .adam_beta2 = 0.95,
     .adam_lr = 3e-4,
     .adam_weight_decay = 0.01},
    {.name = "grouped_fp16", /* in fp32: coefficient_safety is dropped */
     .momentum_form = ORACLE_HEAVY_BALL,
     .momentum = 0.95,
     .nesterov = true,
     .norm = ORACLE_FROBENIUS_ADD,
     .norm_eps = 1e-7,
     .set = ORACLE_SIMPLE,
     .steps = 5,
     .coefficient_safety = 1.0,
     .scale = ORACLE_SCALE_RMS,
     .scale_dims = ORACLE_FLATTENED,
     .extra_scale = 1.0,
     .lr = 3e-4,
     .weight_decay = 0.01,
     .adam_form = ORACLE_EPS_OUTSIDE,
     .adam_eps = 1e-8,
     .adam_beta1 = 0.9,
     .adam_beta2 = 0.95,
     .adam_lr = 3e-4,
     .adam_weight_decay = 0.01},
    {.name = "fan_ratio",
     .momentum_form = ORACLE_HEAVY_BALL_SWAPPED,
     .momentum = 0.95,
     .nesterov = true,
     .norm = ORACLE_FROBENIUS_ADD,
     .norm_eps = 1e-7,
     .set = ORACLE_SIMPLE,
     .steps = 5,
     .coefficient_safety = 1.0,
     .scale = ORACLE_SCALE_FAN_RATIO,
     .scale_dims = ORACLE_FIRST_LAST,
     .extra_scale = 1.0,
     .lr = 0.02,
     .weight_decay = 0.0,
     .adam_form = ORACLE_EPS_OUTSIDE,
     .adam_eps = 1e-8,
     .adam_beta1 = 0.9,
     .adam_beta2 = 0.95,
     .adam_lr = 3e-4,
     .adam_weight_decay = 0.01},
};
const size_t oracle_preset_count = sizeof oracle_presets / sizeof oracle_presets[0];

double oracle_momentum_update(oracle_momentum form, bool nesterov, double mu, double *m, double g) {
    if (form == ORACLE_EMA)
        *m = mu * *m + (1.0 - mu) * g;
    else
        *m = mu * *m + g;
    if (!nesterov)
        return *m;
    switch (form) {
    case ORACLE_HEAVY_BALL: return g + mu * *m;
    case ORACLE_HEAVY_BALL_SWAPPED: return *m + mu * g;
    default: return (1.0 - mu) * g + mu * *m;
    }
}

double oracle_adam_update(const oracle_preset *preset, double lr, int64_t t, double *m, double *v,
                          double g) {
    double b1 = preset->adam_beta1, b2 = preset->adam_beta2, eps = preset->adam_eps;
    *m = b1 * *m + (1.0 - b1) * g;
    *v = b2 * *v + (1.0 - b2) * g * g;
    double c1 = 1.0 - pow(b1, (double)t), c2 = 1.0 - pow(b2, (double)t);
    if (preset->adam_form == ORACLE_EPS_INSIDE)
        return lr * sqrt(c2) / c1 * *m / (sqrt(*v) + eps);
    return lr * (*m / c1) / (sqrt(*v / c2) + eps);
}

double oracle_scale_factor(oracle_scale scale, double r, double c) {
    switch (scale) {
    case ORACLE_SCALE_SHAPE: return sqrt(fmax(1.0, r / c));
    case ORACLE_SCALE_RATIO: return sqrt(r / c);
    case ORACLE_SCALE_SPECTRAL: return sqrt(fmax(r, c));
    case ORACLE_SCALE_RMS: return 0.2 * sqrt(fmax(r, c));
    case ORACLE_SCALE_FAN_RATIO: return sqrt(fmax(r, c) / fmin(r, c));
    default: return 1.0;
    }
}

oracle oracle_open(const oracle_preset *preset, bool fp32_params) {
    oracle o = {.preset = *preset, .fp32_params = fp32_params};
    return o;
}

void oracle_add(oracle *o, const oracle_tensor *tensor, const float *w0) {
    o->tensors = realloc(o->tensors, (o->tensor_count + 1) * sizeof *o->tensors);
    if (o->tensors == NULL)
        abort();
    oracle_tensor *added = &o->tensors[o->tensor_count++];
    *added = *tensor;
    added->count = 1;
    for (int i = 0; i < tensor->dims; i++)
        added->count *= (size_t)tensor->shape[i];
    added->w = zeros(added->count);
    added->m = zeros(added->count);
    added->v = zeros(added->count);
    for (size_t i = 0; i < added->count; i++)
        added->w[i] = (double)w0[i];
}

void oracle_close(oracle *o) {
    for (size_t i = 0; i < o->tensor_count; i++) {
        free(o->tensors[i].w);
        free(o->tensors[i].m);
        free(o->tensors[i].v);
    }
    free(o->tensors);
    memset(o, 0, sizeof *o);
}

static double first_number(double a, double b, double c) {
    return !isnan(a) ? a : !isnan(b) ? b : c;
}

/* W *= 1 - lr wd, then W -= update: two assignments, and the factor of the first is stored like W.
 */
static double stored(const oracle *o, double x) {
    return o->fp32_params ? (double)(float)x : x;
}

static double decayed_and_updated(const oracle *o, double w, double lr_decay, double update) {
    return stored(o, stored(o, stored(o, 1.0 - lr_decay) * w) - update);
}

/* Section 1, points 8 to 12, of one matrix [r, c] at w; u is its update direction. */
static void matrix_update(const oracle *o, const oracle_tensor *tensor, int64_t r, int64_t c,
                          double lr, double decay, double *w, double *u) {
    const oracle_preset *p = &o->preset;
    double factor = oracle_norm_factor(p->norm, p->norm_eps, u, (size_t)(r * c));
    for (int64_t i = 0; i < r * c; i++)
        u[i] *= factor;
    oracle_polynomial poly = oracle_coefficients(p->set, p->steps, p->coefficient_safety, true);
    oracle_polynomial_recursion(&poly, u, r, c, u);
    int64_t rows = r, cols = c;
    if (tensor->flatten && p->scale_dims != ORACLE_FLATTENED) {
        const int64_t *first = tensor->shape, *last = tensor->shape + tensor->dims - 1;
        rows = p->scale_dims == ORACLE_LAST_TWO ? last[-1] : first[0];
        cols = p->scale_dims == ORACLE_FIRST_TWO ? first[1] : last[0];
    }
    double scale = p->extra_scale * oracle_scale_factor(p->scale, (double)rows, (double)cols);
    for (int64_t i = 0; i < r * c; i++)
        w[i] = decayed_and_updated(o, w[i], lr * decay, lr * scale * u[i]);
}

static void tensor_update(oracle *o, oracle_tensor *tensor, const oracle_step_args *args,
                          double *g) {
    const oracle_preset *p = &o->preset;
    oracle_group group = {NAN, NAN, NAN};
    if (args->groups != NULL && (size_t)tensor->group < args->group_count)
        group = args->groups[tensor->group];
    bool adam = tensor->elementwise;
    double lr = first_number(group.lr, adam ? args->adam_lr : args->lr, adam ? p->adam_lr : p->lr);
    double decay =
        first_number(group.weight_decay, adam ? args->adam_weight_decay : args->weight_decay,
                     adam ? p->adam_weight_decay : p->weight_decay);
    double mu = first_number(group.momentum, args->momentum, p->momentum);
    lr *= args->lr_factor * tensor->lr_multiplier;
    decay *= tensor->decay_multiplier;

    if (adam) {
        for (size_t i = 0; i < tensor->count; i++) {
            double update = oracle_adam_update(p, lr, o->t, &tensor->m[i], &tensor->v[i], g[i]);
            tensor->w[i] = decayed_and_updated(o, tensor->w[i], lr * decay, update);
        }
    } else {
        for (size_t i = 0; i < tensor->count; i++)
            g[i] = oracle_momentum_update(p->momentum_form, p->nesterov, mu, &tensor->m[i], g[i]);
        int64_t rows = tensor->shape[tensor->flatten ? 0 : tensor->dims - 2];
        int64_t cols =
            tensor->flatten ? (int64_t)tensor->count / rows : tensor->shape[tensor->dims - 1];
        for (size_t at = 0, part = 0; at < tensor->count; part++) {
            int64_t height =
                tensor->splits == NULL ? rows : tensor->splits[part % tensor->split_count];
            matrix_update(o, tensor, height, cols, lr, decay, tensor->w + at, g + at);
            at += (size_t)(height * cols);
        }
    }
}

oracle_outcome oracle_step(oracle *o, const oracle_step_args *args, const float *const *grads,
                           int ranks) {
    static const oracle_step_args as_configured = {NAN, NAN, NAN, NAN, NAN, 1.0, 1.0, NULL, 0};
    if (args == NULL)
        args = &as_configured;
    oracle_outcome outcome = {false, 0.0, 1.0};
    double **sums = calloc(o->tensor_count + 1, sizeof *sums); /* NULL: the tensor is left alone */
    if (sums == NULL)
        abort();
    double squares = 0.0;
    for (size_t k = 0; k < o->tensor_count; k++) {
        oracle_tensor *tensor = &o->tensors[k];
        bool present = false;
        double *g = zeros(tensor->count);
        for (int rank = 0; rank < ranks; rank++) {
            const float *share = grads[(size_t)rank * o->tensor_count + k];
            present |= share != NULL;
            for (size_t i = 0; share != NULL && i < tensor->count; i++)
                g[i] += args->grad_scale * (double)share[i] / (o->preset.sum ? 1.0 : ranks);
        }
        for (size_t i = 0; i < tensor->count; i++)
            squares += g[i] * g[i];
        if (present || !tensor->skip_if_null)
            sums[k] = g;
        else
            free(g);
    }
    outcome.grad_norm = sqrt(squares);
    outcome.skipped = !isfinite(outcome.grad_norm);
    if (!outcome.skipped) {
        o->t++;
        if (o->preset.clip_norm > 0.0)
            outcome.clip_factor = fmin(1.0, o->preset.clip_norm / (outcome.grad_norm + 1e-6));
        for (size_t k = 0; k < o->tensor_count; k++) {
            for (size_t i = 0; sums[k] != NULL && i < o->tensors[k].count; i++)
                sums[k][i] *= outcome.clip_factor;
            if (sums[k] != NULL)
                tensor_update(o, &o->tensors[k], args, sums[k]);
        }
    }
    for (size_t k = 0; k < o->tensor_count; k++)
        free(sums[k]);
    free(sums);
    return outcome;
}
