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

static void run(const char *yaml, const oracle_preset *preset, const char *what) {
    run_as_configured(yaml, preset, what);
    run_at_large_rates(yaml, preset, what, 1e-5);
}

static void test_jordan(void **state) {
    (void)state;
    run("preset: jordan\n", preset_named("jordan"), "jordan");
}

static void test_moonlight(void **state) {
    (void)state;
    run("preset: moonlight\n", preset_named("moonlight"), "moonlight");
}

static void test_grouped_fp16(void **state) {
    (void)state;
    run("preset: grouped_fp16\nns_dtype: fp32\n", preset_named("grouped_fp16"), "grouped_fp16");
}

static void test_fan_ratio(void **state) {
    (void)state;
    run("preset: fan_ratio\n", preset_named("fan_ratio"), "fan_ratio");
}

static void test_nvidia(void **state) {
    (void)state;
    static const char *const names[] = {"spectral", "ratio", "shape"};
    static const oracle_scale scales[] = {ORACLE_SCALE_SPECTRAL, ORACLE_SCALE_RATIO,
                                          ORACLE_SCALE_SHAPE};
    run("preset: nvidia\n", preset_named("nvidia"), "nvidia");
    for (int i = 0; i < 3; i++) {
        for (int extra = 0; extra < 2; extra++) {
            char yaml[128], what[64];
            snprintf(yaml, sizeof yaml, "preset: nvidia\nscale: %s\nextra_scale: %s\n", names[i],
                     extra ? "0.2" : "1");
            snprintf(what, sizeof what, "nvidia %s%s", names[i], extra ? " x 0.2" : "");
            oracle_preset preset = *preset_named("nvidia");
            preset.scale = scales[i];
            preset.extra_scale = extra ? 0.2 : 1.0;
            run(yaml, &preset, what);
        }
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
    const char *yaml = "momentum_form: heavy_ball_swapped\n"
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
        cmocka_unit_test(test_jordan),    cmocka_unit_test(test_moonlight),
        cmocka_unit_test(test_nvidia),    cmocka_unit_test(test_grouped_fp16),
        cmocka_unit_test(test_fan_ratio), cmocka_unit_test(test_overridden_preset),
    };
    return cmocka_run_group_tests(all, NULL, NULL);
}
