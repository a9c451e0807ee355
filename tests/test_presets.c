/* Each preset against the fp64 oracle: ten steps of random gradients on every kind of tensor,
 * through the public API. */
#include "oracle_pair.h"

#include <stdarg.h>
#include <setjmp.h>
#include <cmocka.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#define MATRIX      MUONSHARD_ROLE_MATRIX
#define ELEMENTWISE MUONSHARD_ROLE_ELEMENTWISE
#define STACK       MUONSHARD_STACK
#define FLATTEN     MUONSHARD_FLATTEN

static const pair_tensor tensors[] = {
    {"square", MATRIX, STACK, 2, {48, 48}, .grad_size = 1.0},
    {"gain", ELEMENTWISE, STACK, 1, {37}, .grad_size = 0.1},
    {"wide", MATRIX, STACK, 2, {16, 40}, .grad_size = 0.3},
    {"tall", MATRIX, STACK, 2, {40, 16}, .grad_size = 3.0},
    {"same shape as wide", MATRIX, STACK, 2, {16, 40}, .grad_size = 1e3},
    {"primes, tall", MATRIX, STACK, 2, {31, 17}, .grad_size = 1.0},
    {"primes, wide", MATRIX, STACK, 2, {13, 29}, .grad_size = 1e-3},
    {"embedding", ELEMENTWISE, STACK, 2, {19, 8}, .grad_size = 1.0},
    {"stack", MATRIX, STACK, 3, {3, 12, 20}, .grad_size = 1.0},
    {"stack of stacks", MATRIX, STACK, 4, {2, 2, 9, 6}, .grad_size = 1.0},
    {"qkv", MATRIX, STACK, 3, {2, 48, 16}, 3, {16, 16, 16}, .grad_size = 1.0},
    {"unequal splits", MATRIX, STACK, 3, {2, 30, 12}, 3, {5, 8, 17}, .grad_size = 1.0},
    {"splits of one matrix", MATRIX, STACK, 2, {21, 10}, 2, {20, 1}, .grad_size = 1.0},
    {"convolution", MATRIX, FLATTEN, 4, {8, 3, 5, 5}, .grad_size = 1.0},
    {"convolution, tall", MATRIX, FLATTEN, 4, {40, 2, 3, 5}, .grad_size = 1.0},
    {"convolution, 1d", MATRIX, FLATTEN, 3, {6, 24, 2}, .grad_size = 1.0},
    {"row", MATRIX, STACK, 2, {1, 11}, .grad_size = 1.0},
    {"column", MATRIX, STACK, 2, {11, 1}, .grad_size = 1.0},
    {"numbers", MATRIX, STACK, 3, {9, 1, 1}, .grad_size = 1.0},
    {"near eps", MATRIX, STACK, 2, {10, 14}, .grad_size = 1e-8},
    {"any size", ELEMENTWISE, STACK, 3, {2, 4, 16}, .grad_size = 0.0},
};
enum { TENSORS = sizeof tensors / sizeof tensors[0] };

static const oracle_preset *preset_named(const char *name) {
    for (size_t i = 0; i < oracle_preset_count; i++)
        if (strcmp(oracle_presets[i].name, name) == 0)
            return &oracle_presets[i];
    fail_msg("no preset %s", name);
    return NULL;
}

/* As the preset stands. Small learning rates: the rounding of parameters is part of the error
 * against fp64. */
static void run_as_configured(const char *yaml, const oracle_preset *preset, const char *what) {
    pair p;
    pair_open(&p, yaml, preset, tensors, TENSORS, 100);
    double worst[2] = {0.0, 0.0};
    for (int step = 1; step <= 10; step++) {
        pair_new_gradients(&p);
        pair_step(&p, NULL);
        if (step == 1 || step == 10)
            pair_check(&p, what, 1e-3, 3e-4, worst);
    }
    print_message("%-24s worst displacement error: %.2e, parameters in fp32 %.2e\n", what, worst[0],
                  worst[1]);
    pair_close(&p);
}

/* With rates at which every entry moves by far more than the spacing of fp32: what is left is the
 * update's own error. */
static void run_at_large_rates(const char *yaml, const oracle_preset *preset, const char *what,
                               double tolerance) {
    pair p;
    pair_open(&p, yaml, preset, tensors, TENSORS, 200);
    muonshard_step_args args = MUONSHARD_STEP_ARGS_INIT;
    args.lr = 0.1;
    args.adam_lr = 0.1;
    double worst[2] = {0.0, 0.0};
    for (int step = 1; step <= 10; step++) {
        pair_new_gradients(&p);
        pair_step(&p, &args);
        pair_check(&p, what, tolerance, tolerance, worst);
    }
    print_message("%-24s at large rates:             %.2e, parameters in fp32 %.2e\n", what,
                  worst[0], worst[1]);
    pair_close(&p);
}

static void run(const char *yaml, const oracle_preset *preset, const char *what, double tolerance) {
    run_as_configured(yaml, preset, what);
    run_at_large_rates(yaml, preset, what, tolerance);
}

/* ---- every preset, in fp32 and as it is shipped ---- */

/* In fp32 the slope of the polynomial at zero, and Gram's products of near-zero eigenvalues,
 * multiply rounding. */
static void test_presets_in_fp32(void **state) {
    (void)state;
    for (size_t i = 0; i < oracle_preset_count; i++) {
        char yaml[64];
        const oracle_preset *preset = &oracle_presets[i];
        snprintf(yaml, sizeof yaml, "preset: %s\nns_dtype: fp32\n", preset->name);
        run(yaml, preset, preset->name, preset->gram ? 1e-4 : 2e-5);
    }
}

/* prod(a) */
static double slope_at_zero(const oracle_preset *preset) {
    oracle_polynomial p =
        oracle_coefficients(preset->set, preset->steps, preset->coefficient_safety, false);
    double slope = 1.0;
    for (int i = 0; i < p.steps; i++)
        slope *= p.a[i];
    return slope;
}

/* The oracle doesn't round: what is left is the 16 bits' own error. Allowed is u prod(a) / 50,
 * about twice what is typical for Gaussian input. One singular value alone, that of a row or a
 * column, may fall where the polynomial is steep: then the length of the update is off, by no more
 * than the bound 1.25 u prod(a) (1/sqrt(m) + 1/sqrt(n)), and not its direction. */
static void run_in_16_bits(const char *yaml, const oracle_preset *exact, oracle_dtype dtype,
                           const char *what) {
    oracle_preset preset = *exact;
    if (dtype == ORACLE_FP16 && preset.safety_16_bits > 0.0)
        preset.coefficient_safety = preset.safety_16_bits;
    const double unit = dtype == ORACLE_BF16 ? 0x1p-8 : 0x1p-11;
    double slope = slope_at_zero(&preset), worst = 0.0, worst_line = 0.0;
    pair p;
    pair_open(&p, yaml, &preset, tensors, TENSORS, 200);
    muonshard_step_args args = MUONSHARD_STEP_ARGS_INIT;
    args.lr = 0.1;
    args.adam_lr = 0.1;
    for (int step = 1; step <= 10; step++) {
        pair_new_gradients(&p);
        pair_step(&p, &args);
        for (size_t k = 0; k < TENSORS; k++) {
            const pair_tensor *t = &tensors[k];
            const int64_t *last = t->shape + t->dims - 1;
            bool line = t->dims >= 2 && (last[0] == 1 || last[-1] == 1 || t->split_count == 2);
            double error = pair_error(&p, &p.exact, k);
            double allowed = line ? fmin(1.25 * unit * slope, 0.5) : unit * slope / 35.0;
            if (!(error <= allowed))
                fail_msg("%s, tensor %s, step %d: displacement is off by %.3e, allowed is %.3e",
                         what, t->name, step, error, allowed);
            *(line ? &worst_line : &worst) = fmax(line ? worst_line : worst, error);
        }
    }
    print_message("%-24s in 16 bits: %.2e, rows and columns %.2e\n", what, worst, worst_line);
    pair_close(&p);
}

static void test_presets_as_shipped(void **state) {
    (void)state;
    for (size_t i = 0; i < oracle_preset_count; i++) {
        char yaml[64];
        const oracle_preset *preset = &oracle_presets[i];
        if (preset->shipped == ORACLE_FP32)
            continue;
        snprintf(yaml, sizeof yaml, "preset: %s\n", preset->name);
        run_in_16_bits(yaml, preset, preset->shipped, preset->name);
    }
}

static void test_nvidia_scales(void **state) {
    (void)state;
    static const char *const names[] = {"spectral", "ratio", "shape"};
    static const oracle_scale scales[] = {ORACLE_SCALE_SPECTRAL, ORACLE_SCALE_RATIO,
                                          ORACLE_SCALE_SHAPE};
    for (int i = 0; i < 3; i++) {
        for (int extra = 0; extra < 2; extra++) {
            char yaml[128], what[64];
            snprintf(yaml, sizeof yaml,
                     "preset: nvidia\nns_dtype: fp32\nscale: %s\nextra_scale: %s\n", names[i],
                     extra ? "0.2" : "1");
            snprintf(what, sizeof what, "nvidia %s%s", names[i], extra ? " x 0.2" : "");
            oracle_preset preset = *preset_named("nvidia");
            preset.scale = scales[i];
            preset.extra_scale = extra ? 0.2 : 1.0;
            run(yaml, &preset, what, 1e-5);
        }
    }
}

/* ---- parameters and gradients of 16 bits ---- */

/* The master moves as fp32 would; the parameter is within half a unit of bf16 of it. */
static void check_rounded_params(const pair *p, const char *what) {
    for (size_t k = 0; k < p->count; k++)
        for (size_t i = 0; i < p->elements[k]; i++) {
            const double exact = p->exact.tensors[k].w[i], got = (double)p->params[k][i];
            const double moved = fabs(exact - (double)p->start[k][i]);
            if (!(fabs(got - exact) <= fabs(exact) / 256.0 + 1e-4 * moved + 1e-5))
                fail_msg("%s: %s[%zu] is %.6g, expected bf16 of %.6g", what, p->tensors[k].name, i,
                         got, exact);
        }
}

static void test_presets_with_16_bit_parameters(void **state) {
    (void)state;
    static const char *const gathers[] = {"", "gather: updates\nmaster: replicated\n"};
    pair_tensor narrow[TENSORS];
    memcpy(narrow, tensors, sizeof tensors);
    for (size_t k = 0; k < TENSORS; k++) {
        narrow[k].dtype = MUONSHARD_BF16;
        narrow[k].grad_dtype = k % 3 ? MUONSHARD_BF16 : MUONSHARD_FP32;
    }
    for (size_t i = 0; i < oracle_preset_count; i++)
        for (size_t g = 0; g < 2; g++) {
            char yaml[128];
            const oracle_preset *preset = &oracle_presets[i];
            if (preset->gram) /* its error is another test's */
                continue;
            snprintf(yaml, sizeof yaml, "preset: %s\nns_dtype: fp32\n%s", preset->name, gathers[g]);
            pair p;
            pair_open(&p, yaml, preset, narrow, TENSORS, 300);
            muonshard_step_args args = MUONSHARD_STEP_ARGS_INIT;
            args.lr =
                1e-3; /* far below the spacing of bf16: without a master, steps would be lost */
            args.adam_lr = 1e-3;
            for (int step = 1; step <= 10; step++) {
                pair_new_gradients(&p);
                pair_step(&p, &args);
                check_rounded_params(&p, preset->name);
            }
            pair_close(&p);
        }
}

/* The order of keys and presets doesn't matter, and every field of a preset can be overridden. */
static void test_overridden_preset(void **state) {
    (void)state;
    oracle_preset preset = *preset_named("jordan");
    preset.momentum_form = ORACLE_HEAVY_BALL_SWAPPED;
    preset.momentum = 0.8;
    preset.nesterov = false;
    preset.norm = ORACLE_FROBENIUS_MAX;
    preset.norm_eps = 1e-3;
    preset.set = ORACLE_QUINTIC;
    preset.steps = 7;
    preset.coefficient_safety = 1.02;
    preset.scale = ORACLE_SCALE_NONE;
    preset.lr = 0.03;
    preset.weight_decay = 0.4;
    preset.adam_form = ORACLE_EPS_INSIDE;
    preset.adam_eps = 1e-2;
    preset.adam_beta1 = 0.7;
    preset.adam_beta2 = 0.8;
    preset.adam_lr = 0.05;
    preset.adam_weight_decay = 0.3;
    const char *yaml = "ns_dtype: fp32\n"
                       "momentum_form: heavy_ball_swapped\n"
                       "momentum: 0.8\n"
                       "nesterov: false\n"
                       "norm: frobenius_max\n"
                       "norm_eps: 1e-3\n"
                       "coefficients: quintic\n"
                       "ns_steps: 7\n"
                       "coefficient_safety: 1.02\n"
                       "scale: none\n"
                       "preset: jordan\n"
                       "lr: 0.03\n"
                       "weight_decay: 0.4\n"
                       "adam:\n"
                       "  form: eps_inside\n"
                       "  eps: 1e-2\n"
                       "  beta1: 0.7\n"
                       "  beta2: 0.8\n"
                       "  lr: 0.05\n"
                       "  weight_decay: 0.3\n";
    run_as_configured(yaml, &preset, "jordan, overridden");
    run_at_large_rates(yaml, &preset, "jordan, overridden", 5e-5); /* slope at zero: 7,000 */
}

int main(void) {
    const struct CMUnitTest all[] = {
        cmocka_unit_test(test_presets_in_fp32),
        cmocka_unit_test(test_presets_as_shipped),
        cmocka_unit_test(test_nvidia_scales),
        cmocka_unit_test(test_presets_with_16_bit_parameters),
        cmocka_unit_test(test_overridden_preset),
    };
    return cmocka_run_group_tests(all, NULL, NULL);
}
