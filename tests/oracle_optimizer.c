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
     .shipped = ORACLE_BF16,
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
     .shipped = ORACLE_BF16,
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
    {.name = "torch",
     .momentum_form = ORACLE_EMA,
     .momentum = 0.95,
     .nesterov = true,
     .norm = ORACLE_FROBENIUS_MAX,
     .norm_eps = 1e-7,
     .set = ORACLE_SIMPLE,
     .steps = 5,
     .coefficient_safety = 1.0,
     .shipped = ORACLE_BF16,
     .scale = ORACLE_SCALE_SHAPE,
     .scale_dims = ORACLE_FLATTENED,
     .extra_scale = 1.0,
     .lr = 1e-3,
     .weight_decay = 0.1,
     .adam_form = ORACLE_EPS_OUTSIDE,
     .adam_eps = 1e-8,
     .adam_beta1 = 0.9,
     .adam_beta2 = 0.999,
     .adam_lr = 1e-3,
     .adam_weight_decay = 0.01},
    {.name = "nvidia",
     .momentum_form = ORACLE_EMA,
     .momentum = 0.95,
     .nesterov = false,
     .norm = ORACLE_FROBENIUS_MAX,
     .norm_eps = 1e-7,
     .set = ORACLE_QUINTIC,
     .steps = 5,
     .coefficient_safety = 1.0,
     .shipped = ORACLE_BF16,
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
     .adam_weight_decay = 0.01,
     .decay_form = ORACLE_ADD},
    {.name = "grouped_fp16",
     .momentum_form = ORACLE_HEAVY_BALL,
     .momentum = 0.95,
     .nesterov = true,
     .norm = ORACLE_FROBENIUS_ADD,
     .norm_eps = 1e-7,
     .set = ORACLE_SIMPLE,
     .steps = 5,
     .coefficient_safety = 1.0,
     .shipped = ORACLE_FP16,
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
     .adam_weight_decay = 0.01,
     .safety_16_bits = 1.02},
    {.name = "fan_ratio",
     .momentum_form = ORACLE_HEAVY_BALL_SWAPPED,
     .momentum = 0.95,
     .nesterov = true,
     .norm = ORACLE_FROBENIUS_ADD,
     .norm_eps = 1e-7,
     .set = ORACLE_SIMPLE,
     .steps = 5,
     .coefficient_safety = 1.0,
     .shipped = ORACLE_FP32,
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
    {.name = "dion_repo",
     .momentum_form = ORACLE_HEAVY_BALL,
     .momentum = 0.95,
     .nesterov = false,
     .norm = ORACLE_FROBENIUS_SAFETY,
     .norm_eps = 1e-8,
     .set = ORACLE_POLAR_EXPRESS_SPEEDRUN,
     .steps = 5,
     .coefficient_safety = 1.0,
     .shipped = ORACLE_BF16,
     .scale = ORACLE_SCALE_RATIO,
     .scale_dims = ORACLE_LAST_TWO,
     .extra_scale = 1.0,
     .lr = 0.01,
     .weight_decay = 0.01,
     .adam_form = ORACLE_EPS_OUTSIDE,
     .adam_eps = 1e-8,
     .adam_beta1 = 0.9,
     .adam_beta2 = 0.95,
     .adam_lr = 0.01,
     .adam_weight_decay = 0.01},
    {.name = "gram",
     .momentum_form = ORACLE_HEAVY_BALL,
     .momentum = 0.95,
     .nesterov = true,
     .norm = ORACLE_FROBENIUS_ADD,
     .norm_eps = 1e-7,
     .set = ORACLE_POLAR_EXPRESS,
     .steps = 5,
     .coefficient_safety = 1.05,
     .shipped = ORACLE_FP16,
     .scale = ORACLE_SCALE_RMS,
     .scale_dims = ORACLE_FLATTENED,
     .extra_scale = 1.0,
     .lr = 1e-3,
     .weight_decay = 0.1,
     .adam_form = ORACLE_EPS_OUTSIDE,
     .adam_eps = 1e-8,
     .adam_beta1 = 0.9,
     .adam_beta2 = 0.95,
     .adam_lr = 1e-3,
     .adam_weight_decay = 0.1,
     .safety_powers = true,
     .gram = true},
    {.name = "speedrun",
     .momentum_form = ORACLE_EMA,
     .momentum = 0.85,
     .momentum_to = 0.95,
     .momentum_over = 300,
     .nesterov = true,
     .norm = ORACLE_FROBENIUS_SAFETY,
     .norm_eps = 1e-6,
     .set = ORACLE_POLAR_EXPRESS_SPEEDRUN,
     .steps = 5,
     .coefficient_safety = 1.0,
     .shipped = ORACLE_BF16,
     .scale = ORACLE_SCALE_SHAPE,
     .scale_dims = ORACLE_FLATTENED,
     .extra_scale = 1.0,
     .lr = 0.023,
     .weight_decay = 1.2,
     .adam_form = ORACLE_EPS_INSIDE,
     .adam_eps = 1e-10,
     .adam_beta1 = 0.9,
     .adam_beta2 = 0.95,
     .adam_lr = 0.008,
     .adam_weight_decay = 0.005,
     .normuon = true,
     .variance_auto = true,
     .variance_clamped = true,
     .variance_beta2 = 0.9,
     .variance_eps = 1e-10,
     .decay = ORACLE_CAUTIOUS_LR_SQUARED,
     .decay_scaled = true,
     .adam_decay = ORACLE_CAUTIOUS_LR_SQUARED},
    {.name = "optax",
     .momentum_form = ORACLE_EMA_CORRECTED,
     .momentum = 0.95,
     .nesterov = true,
     .norm = ORACLE_FROBENIUS_ADD,
     .norm_eps = 1e-8,
     .set = ORACLE_SIMPLE,
     .steps = 5,
     .coefficient_safety = 1.0,
     .shipped = ORACLE_FP32,
     .scale = ORACLE_SCALE_SHAPE,
     .scale_dims = ORACLE_FLATTENED,
     .extra_scale = 1.0,
     .lr = 1e-3,
     .weight_decay = 0.0,
     .adam_form = ORACLE_EPS_OUTSIDE,
     .adam_eps = 1e-8,
     .adam_beta1 = 0.9,
     .adam_beta2 = 0.999,
     .adam_lr = 1e-3,
     .adam_weight_decay = 0.0,
     .in_out = true,
     .decay_form = ORACLE_WITH_UPDATE,
     .adam_nesterov = true},
};
const size_t oracle_preset_count = sizeof oracle_presets / sizeof oracle_presets[0];

/* bf16 keeps 8 bits of the significand, fp16 11, of which subnormals lose some. */
double oracle_round(oracle_dtype dtype, double x) {
    float narrow = (float)x;
    if (dtype == ORACLE_FP32 || x == 0.0 || !isfinite(x))
        return (double)narrow;
    int exponent;
    frexp((double)narrow, &exponent);
    int lowest = dtype == ORACLE_BF16 ? exponent - 8 : (int)fmax(exponent - 11, -24);
    return ldexp(nearbyint(ldexp((double)narrow, -lowest)), lowest);
}

double oracle_direction(oracle_momentum form, bool nesterov, double mu, int64_t t, double m,
                        double g) {
    double now = 1.0 - pow(mu, (double)t), next = 1.0 - pow(mu, (double)(t + 1));
    if (!nesterov)
        return form == ORACLE_EMA_CORRECTED ? m / now : m;
    switch (form) {
    case ORACLE_HEAVY_BALL: return g + mu * m;
    case ORACLE_HEAVY_BALL_SWAPPED: return m + mu * g;
    case ORACLE_EMA_CORRECTED: return mu * m / next + (1.0 - mu) * g / now;
    default: return (1.0 - mu) * g + mu * m;
    }
}

double oracle_momentum_update(oracle_momentum form, bool nesterov, double mu, int64_t t, double *m,
                              double g) {
    if (form == ORACLE_EMA || form == ORACLE_EMA_CORRECTED)
        *m = mu * *m + (1.0 - mu) * g;
    else
        *m = mu * *m + g;
    return oracle_direction(form, nesterov, mu, t, *m, g);
}

double oracle_adam_update(const oracle_preset *preset, double lr, int64_t t, double *m, double *v,
                          double g) {
    double b1 = preset->adam_beta1, b2 = preset->adam_beta2, eps = preset->adam_eps;
    *m = b1 * *m + (1.0 - b1) * g;
    *v = b2 * *v + (1.0 - b2) * g * g;
    double c1 = 1.0 - pow(b1, (double)t), c2 = 1.0 - pow(b2, (double)t);
    double numerator = *m / c1;
    if (preset->adam_nesterov)
        numerator = b1 * *m / (1.0 - pow(b1, (double)(t + 1))) + (1.0 - b1) * g / c1;
    if (preset->adam_form == ORACLE_EPS_INSIDE)
        return lr * sqrt(c2) * numerator / (sqrt(*v) + eps);
    return lr * numerator / (sqrt(*v / c2) + eps);
}

double oracle_lion_update(const oracle_preset *preset, double lr, double *m, double g) {
    double u = preset->adam_beta1 * *m + (1.0 - preset->adam_beta1) * g;
    *m = preset->adam_beta2 * *m + (1.0 - preset->adam_beta2) * g;
    return u > 0.0 ? lr : u < 0.0 ? -lr : 0.0;
}

/* With arrays (in, out), outputs are columns. */
void oracle_normuon(const oracle_preset *p, double *u, int64_t r, int64_t c, double *v) {
    int64_t outputs = p->in_out ? c : r, inputs = p->in_out ? r : c;
    bool an_output_each = !p->variance_auto || outputs >= inputs;
    bool a_row_each = p->in_out ? !an_output_each : an_output_each;
    int64_t lines = a_row_each ? r : c, length = a_row_each ? c : r;
    double before = 0.0, after = 0.0;
    for (int64_t i = 0; i < lines; i++) {
        double mean = 0.0;
        for (int64_t j = 0; j < length; j++) {
            double x = u[a_row_each ? i * c + j : j * c + i];
            mean += x * x / (double)length;
            before += x * x;
        }
        v[i] = p->variance_beta2 * v[i] + (1.0 - p->variance_beta2) * mean;
        double below =
            p->variance_clamped ? sqrt(fmax(v[i], p->variance_eps)) : sqrt(v[i]) + p->variance_eps;
        for (int64_t j = 0; j < length; j++) {
            double *x = &u[a_row_each ? i * c + j : j * c + i];
            *x /= below;
            after += *x * *x;
        }
    }
    double rescale = sqrt(before) / fmax(sqrt(after), p->variance_eps);
    for (int64_t i = 0; i < r * c; i++)
        u[i] *= rescale;
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

static double stored(const oracle *o, double x) {
    return o->fp32_params ? (double)(float)x : x;
}

/* Each assignment of the form stores W; the factor of the first is a number in fp32 too. */
static double decayed_and_updated(const oracle *o, oracle_decay_form form, double w, double d,
                                  double update) {
    switch (form) {
    case ORACLE_ADD: return stored(o, stored(o, w - stored(o, d) * w) - update);
    case ORACLE_WITH_UPDATE: return stored(o, w - (update + stored(o, d) * w));
    default: return stored(o, stored(o, stored(o, 1.0 - d) * w) - update);
    }
}

/* d of W -= d W. */
static double decay_of(oracle_decay method, double lr, double wd) {
    switch (method) {
    case ORACLE_INDEPENDENT: return wd;
    case ORACLE_LR_SQUARED:
    case ORACLE_CAUTIOUS_LR_SQUARED: return lr * lr * wd;
    case ORACLE_L2: return 0.0;
    default: return lr * wd;
    }
}

static bool is_cautious(oracle_decay method) {
    return method == ORACLE_CAUTIOUS || method == ORACLE_CAUTIOUS_LR_SQUARED;
}

static double sign(double x) {
    return x > 0.0 ? 1.0 : x < 0.0 ? -1.0 : 0.0;
}

static void swap(int64_t *a, int64_t *b) {
    int64_t old = *a;
    *a = *b;
    *b = old;
}

/* Section 1, points 8 to 12, of one matrix [r, c] at w; u is its update direction, v the state of
 * its variance. */
static void matrix_update(const oracle *o, const oracle_tensor *tensor, int64_t r, int64_t c,
                          double lr, double wd, double *w, double *u, double *v) {
    const oracle_preset *p = &o->preset;
    oracle_normalize(p->norm, p->norm_eps, u, r, c);
    oracle_polynomial poly =
        p->safety_powers ? oracle_coefficients_powers(p->set, p->steps, p->coefficient_safety, true)
                         : oracle_coefficients(p->set, p->steps, p->coefficient_safety, true);
    oracle_polynomial_recursion(&poly, u, r, c, u);
    if (p->normuon)
        oracle_normuon(p, u, r, c, v);
    int64_t rows = r, cols = c;
    if (tensor->flatten && p->scale_dims != ORACLE_FLATTENED) {
        const int64_t *first = tensor->shape, *last = tensor->shape + tensor->dims - 1;
        rows = p->scale_dims == ORACLE_LAST_TWO ? last[-1] : first[0];
        cols = p->scale_dims == ORACLE_FIRST_TWO ? first[1] : last[0];
    }
    if (p->in_out)
        swap(&rows, &cols);
    double scale = p->extra_scale * oracle_scale_factor(p->scale, (double)rows, (double)cols);
    bool scaled = p->decay_scaled && p->decay != ORACLE_INDEPENDENT; /* it has no lr */
    double d = decay_of(p->decay, lr, wd) * (scaled ? scale : 1.0);
    for (int64_t i = 0; i < r * c; i++) {
        bool decays = !is_cautious(p->decay) || sign(w[i]) * sign(u[i]) >= 0.0;
        w[i] = decayed_and_updated(o, p->decay_form, w[i], decays ? d : 0.0, lr * scale * u[i]);
    }
}

static void elementwise_update(const oracle *o, oracle_tensor *tensor, double lr, double wd,
                               const double *grad) {
    const oracle_preset *p = &o->preset;
    double d = decay_of(p->adam_decay, lr, wd);
    for (size_t i = 0; i < tensor->count; i++) {
        double *w = &tensor->w[i], *m = &tensor->m[i];
        double g = grad[i] + (p->adam_decay == ORACLE_L2 ? wd * *w : 0.0);
        double update = p->lion ? oracle_lion_update(p, lr, m, g)
                                : oracle_adam_update(p, lr, o->t, m, &tensor->v[i], g);
        bool decays = !is_cautious(p->adam_decay) || sign(update) * sign(*w) > 0.0;
        *w = decayed_and_updated(o, ORACLE_MULTIPLY, *w, decays ? d : 0.0, update);
    }
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
    double way = p->momentum_over > 0 ? fmin((double)(o->t - 1) / p->momentum_over, 1.0) : 0.0;
    double mu = p->momentum + way * (p->momentum_to - p->momentum);
    mu = first_number(group.momentum, args->momentum, mu);
    lr *= args->lr_factor * tensor->lr_multiplier;
    decay *= tensor->decay_multiplier;

    if (adam) {
        elementwise_update(o, tensor, lr, decay, g);
        return;
    }
    for (size_t i = 0; i < tensor->count; i++) {
        double with_l2 = g[i] + (p->decay == ORACLE_L2 ? decay * tensor->w[i] : 0.0);
        double *m = &tensor->m[i];
        g[i] = oracle_momentum_update(p->momentum_form, p->nesterov, mu, o->t, m, with_l2);
        if (!p->momentum_bf16)
            continue;
        *m = oracle_round(ORACLE_BF16, *m); /* U is made of M as it is stored */
        g[i] = oracle_direction(p->momentum_form, p->nesterov, mu, o->t, *m, with_l2);
    }
    int64_t rows = tensor->shape[tensor->flatten ? 0 : tensor->dims - 2];
    int64_t cols =
        tensor->flatten ? (int64_t)tensor->count / rows : tensor->shape[tensor->dims - 1];
    for (size_t at = 0, part = 0; at < tensor->count; part++) {
        int64_t height = tensor->splits == NULL ? rows : tensor->splits[part % tensor->split_count];
        matrix_update(o, tensor, height, cols, lr, decay, tensor->w + at, g + at, tensor->v + at);
        at += (size_t)(height * cols);
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
