/* What one step does besides the mathematics of a preset: clipping, skipping, arguments,
 * multipliers, groups, and gradients that are missing. Through the public API at one rank. */
#include "oracle_pair.h"

#include <stdarg.h>
#include <setjmp.h>
#include <cmocka.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define MATRIX      MUONSHARD_ROLE_MATRIX
#define ELEMENTWISE MUONSHARD_ROLE_ELEMENTWISE

static const pair_tensor tensors[] = {
    {"square", MATRIX, MUONSHARD_STACK, 2, {20, 20}, .grad_size = 1.0},
    {"stack", MATRIX, MUONSHARD_STACK, 3, {3, 14, 9}, 2, {6, 8}, .grad_size = 1.0},
    {"gain", ELEMENTWISE, MUONSHARD_STACK, 1, {33}, .grad_size = 0.5},
    {"convolution", MATRIX, MUONSHARD_FLATTEN, 4, {6, 2, 3, 3}, .grad_size = 2.0},
    {"embedding", ELEMENTWISE, MUONSHARD_STACK, 2, {11, 5}, .grad_size = 1.0},
};
enum { TENSORS = sizeof tensors / sizeof tensors[0] };

static const oracle_preset *const jordan = &oracle_presets[0];
static const oracle_preset *const moonlight = &oracle_presets[1];

/* Rates that move every entry by far more than the spacing of fp32. */
static muonshard_step_args large_rates(void) {
    muonshard_step_args args = MUONSHARD_STEP_ARGS_INIT;
    args.lr = 0.1;
    args.adam_lr = 0.1;
    return args;
}

static float *params_copy(const pair *p, size_t tensor) {
    float *copy = malloc(p->elements[tensor] * sizeof *copy);
    assert_non_null(copy);
    memcpy(copy, p->params[tensor], p->elements[tensor] * sizeof *copy);
    return copy;
}

static void assert_unchanged(const pair *p, size_t tensor, const float *before) {
    if (memcmp(p->params[tensor], before, p->elements[tensor] * sizeof *before) != 0)
        fail_msg("%s changed in step %lld", p->tensors[tensor].name, (long long)p->result.step);
}

/* Of the gradient, before momentum: clipping steps of different sizes changes their weights in the
 * momentum. */
static void test_clipping_comes_before_momentum(void **state) {
    (void)state;
    oracle_preset preset = *moonlight;
    preset.clip_norm = 0.7;
    pair p;
    pair_open(&p, "preset: moonlight\nns_dtype: fp32\nclip_norm: 0.7\n", &preset, tensors, TENSORS,
              300);
    muonshard_step_args args = large_rates();
    for (int step = 1; step <= 10; step++) {
        args.grad_scale =
            step % 3 == 0 ? 1e-3 : 1.0; /* the norm is taken after it: these aren't clipped */
        pair_new_gradients(&p);
        pair_step(&p, &args);
        assert_true((p.result.clip_factor < 1.0) == (step % 3 != 0));
        pair_check(&p, "clipped", 2e-5, 1e-5, NULL);
    }
    pair_close(&p);
}

static void test_idle_clipping_changes_no_bit(void **state) {
    (void)state;
    pair with, without;
    pair_open(&with, "preset: jordan\nns_dtype: fp32\nclip_norm: 1e6\n", jordan, tensors, TENSORS,
              301);
    pair_open(&without, "preset: jordan\nns_dtype: fp32\n", jordan, tensors, TENSORS, 301);
    for (int step = 1; step <= 3; step++) {
        pair_new_gradients(&with);
        pair_new_gradients(&without);
        pair_step_library(&with, NULL);
        pair_step_library(&without, NULL);
        assert_true(with.result.clip_factor == 1.0);
    }
    pair_assert_same_params(&with, &without);
    pair_close(&with);
    pair_close(&without);
}

/* One bad number anywhere: the step changes no byte, and the next is as if it had never been. */
static void test_nonfinite_gradients_skip_the_step(void **state) {
    (void)state;
    const float bad[] = {NAN, INFINITY, -INFINITY};
    for (size_t tensor = 0; tensor < TENSORS; tensor++) {
        for (int kind = 0; kind < 6; kind++) {
            bool at_first =
                kind <
                3; /* the first step, and the first entry; else the last entry in the middle */
            pair p, untouched;
            pair_open(&p, "preset: moonlight\nns_dtype: fp32\nclip_norm: 1\n", moonlight, tensors,
                      TENSORS, 302);
            pair_open(&untouched, "preset: moonlight\nns_dtype: fp32\nclip_norm: 1\n", moonlight,
                      tensors, TENSORS, 302);
            for (int step = 0; step < 4; step++) {
                if (step == (at_first ? 0 : 2)) {
                    float *before[TENSORS];
                    float *entry = &p.grads[tensor][at_first ? 0 : p.elements[tensor] - 1];
                    float good = *entry;
                    *entry = bad[kind % 3];
                    for (size_t k = 0; k < TENSORS; k++)
                        before[k] = params_copy(&p, k);
                    pair_step_library(&p, NULL);
                    assert_int_equal(p.result.skipped, 1);
                    assert_int_equal(p.result.count, step);
                    for (size_t k = 0; k < TENSORS; k++) {
                        assert_unchanged(&p, k, before[k]);
                        free(before[k]);
                    }
                    *entry = good;
                }
                pair_new_gradients(&p);
                pair_new_gradients(&untouched);
                pair_step_library(&p, NULL);
                pair_step_library(&untouched, NULL);
                assert_int_equal(p.result.skipped, 0);
                assert_int_equal(p.result.step, untouched.result.step + (at_first || step >= 2));
                assert_int_equal(p.result.count, untouched.result.count);
                pair_assert_same_params(&p, &untouched);
            }
            muonshard_stats_info stats = MUONSHARD_STATS_INIT;
            assert_int_equal(muonshard_stats(p.optimizer, &stats), MUONSHARD_OK);
            assert_int_equal(stats.steps, 5);
            assert_int_equal(stats.skipped, 1);
            pair_close(&p);
            pair_close(&untouched);
        }
    }
}

/* Large and finite is not infinite, though its square is in fp32. */
static void test_large_gradients_are_not_skipped(void **state) {
    (void)state;
    pair p;
    pair_open(&p, "preset: jordan\nns_dtype: fp32\n", jordan, tensors, 2, 303);
    for (int step = 1; step <= 2; step++) {
        pair_new_gradients(&p);
        for (size_t k = 0; k < p.count; k++)
            for (size_t i = 0; i < p.elements[k]; i++)
                p.grads[k][i] *= 1e30F;
        pair_step(&p, NULL);
        assert_int_equal(p.result.skipped, 0);
        pair_check(&p, "gradients of 1e30", 1e-4, 1e-4, NULL);
    }
    pair_close(&p);
}

static void test_zero_gradients(void **state) {
    (void)state;
    pair p; /* weight decay alone is left */
    pair_open(&p, "preset: moonlight\nns_dtype: fp32\n", moonlight, tensors, TENSORS, 304);
    muonshard_step_args args = large_rates();
    for (int step = 1; step <= 3; step++) { /* gradients are zero from the start */
        pair_step(&p, &args);
        assert_true(p.result.grad_norm == 0.0 && p.result.skipped == 0);
        pair_check(&p, "zero gradients", 2e-5, 1e-5, NULL);
    }
    pair_close(&p);
}

static void test_arguments_of_a_step(void **state) {
    (void)state;
    pair p;
    pair_open(&p, "preset: jordan\nns_dtype: fp32\n", jordan, tensors, TENSORS, 305);
    for (int step = 1; step <= 10; step++) {
        muonshard_step_args args = MUONSHARD_STEP_ARGS_INIT;
        args.lr = 0.1 / step;
        args.momentum = 0.85 + 0.01 * step;
        args.weight_decay = 0.2 * step;
        args.adam_lr = 0.02 * step;
        args.adam_weight_decay = step % 2 ? 0.5 : 0.0;
        args.lr_factor = step < 4 ? 0.25 * step : 1.5;
        args.grad_scale = pow(2.0, step - 5); /* it weighs steps in the momentum */
        pair_new_gradients(&p);
        pair_step(&p, &args);
        pair_check(&p, "arguments", 2e-5, 1e-5, NULL);
    }
    pair_close(&p);
}

/* Only lr_factor is given: it multiplies the configured rates. */
static void test_lr_factor_alone(void **state) {
    (void)state;
    oracle_preset preset = *jordan;
    preset.adam_lr = 0.1;
    preset.weight_decay = 0.5;
    pair p;
    pair_open(&p, "preset: jordan\nns_dtype: fp32\nweight_decay: 0.5\nadam: {lr: 0.1}\n", &preset,
              tensors, TENSORS, 306);
    muonshard_step_args args = MUONSHARD_STEP_ARGS_INIT;
    for (int step = 1; step <= 5; step++) {
        args.lr_factor = 6.0 / step;
        pair_new_gradients(&p);
        pair_step(&p, &args);
        pair_check(&p, "lr_factor", 2e-5, 1e-5, NULL);
    }
    args.lr_factor = 0.0; /* no rate, no decay: only state moves */
    float *before[TENSORS];
    for (size_t k = 0; k < TENSORS; k++)
        before[k] = params_copy(&p, k);
    pair_step(&p, &args);
    for (size_t k = 0; k < TENSORS; k++) {
        assert_unchanged(&p, k, before[k]);
        free(before[k]);
    }
    pair_new_gradients(&p);
    pair_step(&p, NULL);
    pair_check(&p, "after a rate of zero", 2e-5, 1e-5, NULL);
    pair_close(&p);
}

/* Where a preset says "same rate and decay" for element-wise tensors, they follow those of the
 * step. */
static void test_auto_rates_follow_the_step(void **state) {
    (void)state;
    pair p;
    pair_open(&p, "preset: moonlight\nns_dtype: fp32\nadam: {lr_scale: 0.4}\n", moonlight, tensors,
              TENSORS, 315);
    muonshard_step_args args = MUONSHARD_STEP_ARGS_INIT;
    for (int step = 1; step <= 5; step++) {
        args.lr = 0.1 * step;
        args.weight_decay = 0.2 * step;
        p.exact.preset.adam_lr = p.rounded.preset.adam_lr = 0.4 * args.lr;
        p.exact.preset.adam_weight_decay = p.rounded.preset.adam_weight_decay = args.weight_decay;
        pair_new_gradients(&p);
        pair_step(&p, &args);
        pair_check(&p, "auto rates", 2e-5, 1e-5, NULL);
    }
    pair_close(&p);
}

static void test_multipliers(void **state) {
    (void)state;
    static const pair_tensor scaled[] = {
        {"base", MATRIX, MUONSHARD_STACK, 2, {12, 18}, .grad_size = 1.0},
        {"fast",
         MATRIX,
         MUONSHARD_STACK,
         2,
         {12, 18},
         .grad_size = 1.0,
         .lr_multiplier = 3.0,
         .decay_multiplier = 1.0},
        {"kept",
         MATRIX,
         MUONSHARD_STACK,
         2,
         {18, 12},
         .grad_size = 1.0,
         .lr_multiplier = 1.0,
         .decay_multiplier = 0.0},
        {"held",
         MATRIX,
         MUONSHARD_STACK,
         3,
         {2, 6, 5},
         .grad_size = 1.0,
         .lr_multiplier = 0.5,
         .decay_multiplier = 4.0},
        {"slow gain",
         ELEMENTWISE,
         MUONSHARD_STACK,
         1,
         {21},
         .grad_size = 1.0,
         .lr_multiplier = 0.3,
         .decay_multiplier = 2.0},
        {"kept gain",
         ELEMENTWISE,
         MUONSHARD_STACK,
         1,
         {21},
         .grad_size = 1.0,
         .lr_multiplier = 1.0,
         .decay_multiplier = 0.0},
    };
    pair p;
    pair_open(&p, "preset: moonlight\nns_dtype: fp32\n", moonlight, scaled,
              sizeof scaled / sizeof scaled[0], 307);
    muonshard_step_args args = large_rates();
    args.weight_decay = args.adam_weight_decay = 0.7;
    for (int step = 1; step <= 10; step++) {
        pair_new_gradients(&p);
        pair_step(&p, &args);
        pair_check(&p, "multipliers", 2e-5, 1e-5, NULL);
    }
    pair_close(&p);
}

static void test_groups(void **state) {
    (void)state;
    static const pair_tensor grouped[] = {
        {"group 0", MATRIX, MUONSHARD_STACK, 2, {12, 18}, .grad_size = 1.0},
        {"group 1", MATRIX, MUONSHARD_STACK, 2, {12, 18}, .grad_size = 1.0, .group = 1},
        {"group 2",
         MATRIX,
         MUONSHARD_STACK,
         2,
         {12, 18},
         .grad_size = 1.0,
         .group = 2,
         .lr_multiplier = 2.0,
         .decay_multiplier = 0.5},
        {"group 3", MATRIX, MUONSHARD_STACK, 2, {12, 18}, .grad_size = 1.0, .group = 3},
        {"gain 0", ELEMENTWISE, MUONSHARD_STACK, 1, {21}, .grad_size = 1.0},
        {"gain 1", ELEMENTWISE, MUONSHARD_STACK, 1, {21}, .grad_size = 1.0, .group = 1},
    };
    pair p;
    pair_open(&p, "preset: jordan\nns_dtype: fp32\n", jordan, grouped,
              sizeof grouped / sizeof grouped[0], 308);
    for (int step = 1; step <= 10; step++) { /* group 3 is beyond the list: the step's values */
        const muonshard_group_args groups[3] = {
            {0.2, 0.9, 0.1}, {0.05 * step, 0.8, 0.4}, {0.3, 0.5 + 0.04 * step, 0.0}};
        muonshard_step_args args = large_rates();
        args.weight_decay = args.adam_weight_decay = 0.6;
        args.lr_factor = 0.5;
        args.groups = groups;
        args.group_count = 3;
        pair_new_gradients(&p);
        pair_step(&p, &args);
        pair_check(&p, "groups", 2e-5, 1e-5, NULL);
    }
    pair_close(&p);
}

/* A NaN in a group leaves that value to the step, or to the configuration where the step has NaN
 * too. */
static void test_groups_leave_out_values(void **state) {
    (void)state;
    static const pair_tensor grouped[] = {
        {"momentum only", MATRIX, MUONSHARD_STACK, 2, {12, 18}, .grad_size = 1.0},
        {"rate only", MATRIX, MUONSHARD_STACK, 2, {12, 18}, .grad_size = 1.0, .group = 1},
    };
    const muonshard_group_args groups[2] = {{MUONSHARD_NAN, 0.7, MUONSHARD_NAN},
                                            {0.3, MUONSHARD_NAN, MUONSHARD_NAN}};
    pair p;
    pair_open(&p, "preset: jordan\nns_dtype: fp32\nlr: 0.1\nweight_decay: 0.3\n", jordan, grouped,
              2, 309);
    p.exact.preset.lr = p.rounded.preset.lr = 0.1;
    p.exact.preset.weight_decay = p.rounded.preset.weight_decay = 0.3;
    muonshard_step_args args = MUONSHARD_STEP_ARGS_INIT;
    args.groups = groups;
    args.group_count = 2;
    for (int step = 1; step <= 6; step++) {
        pair_new_gradients(&p);
        pair_step(&p, &args);
        pair_check(&p, "partial groups", 2e-5, 1e-5, NULL);
    }
    pair_close(&p);
}

static void test_reductions_of_one_rank_are_the_same(void **state) {
    (void)state;
    static const char *const yaml[] = {"preset: nvidia\nns_dtype: fp32\nreduce: mean\n",
                                       "preset: nvidia\nns_dtype: fp32\nreduce: sum\n",
                                       "preset: nvidia\nns_dtype: fp32\nreduce: none\n"};
    pair p[3];
    for (int i = 0; i < 3; i++) {
        pair_open(&p[i], yaml[i], &oracle_presets[3], tensors, TENSORS, 310);
        for (int step = 1; step <= 3; step++) {
            pair_new_gradients(&p[i]);
            pair_step(&p[i], NULL);
        }
        pair_check(&p[i], yaml[i], 1e-3, 1e-3, NULL);
        pair_assert_same_params(&p[0], &p[i]);
    }
    for (int i = 0; i < 3; i++)
        pair_close(&p[i]);
}

static void test_null_gradient_is_an_error(void **state) {
    (void)state;
    for (size_t tensor = 1; tensor <= 2; tensor++) { /* a matrix and an element-wise one */
        pair p, untouched;
        pair_open(&p, "preset: moonlight\nns_dtype: fp32\n", moonlight, tensors, TENSORS, 311);
        pair_open(&untouched, "preset: moonlight\nns_dtype: fp32\n", moonlight, tensors, TENSORS,
                  311);
        for (int step = 0; step < 3; step++) {
            pair_new_gradients(&p);
            pair_new_gradients(&untouched);
            if (step == 1) {
                pair_set_absent(&p, tensor, true);
                assert_int_not_equal(muonshard_step(p.optimizer, NULL), MUONSHARD_OK);
                assert_non_null(strstr(muonshard_last_error(p.optimizer), tensors[tensor].name));
                pair_assert_same_params(&p, &untouched); /* the step before */
                pair_set_absent(&p, tensor, false);
            }
            pair_step_library(&p, NULL);
            pair_step_library(&untouched, NULL);
            assert_int_equal(p.result.count, untouched.result.count);
            pair_assert_same_params(&p, &untouched);
        }
        pair_close(&p);
        pair_close(&untouched);
    }
}

static void test_null_gradient_is_zero(void **state) {
    (void)state;
    pair_tensor lenient[TENSORS];
    memcpy(lenient, tensors, sizeof tensors);
    for (size_t k = 0; k < TENSORS; k++)
        lenient[k].null_grad = MUONSHARD_NULL_GRAD_ZERO;
    pair null, zero;
    pair_open(&null, "preset: moonlight\nns_dtype: fp32\n", moonlight, lenient, TENSORS, 312);
    pair_open(&zero, "preset: moonlight\nns_dtype: fp32\n", moonlight, lenient, TENSORS, 312);
    for (int step = 1; step <= 5; step++) {
        pair_new_gradients(&null);
        pair_new_gradients(&zero);
        for (size_t k = 1; k <= 2; k++) {
            bool absent = step == 1 || step == 3;
            pair_set_absent(&null, k, absent);
            for (size_t i = 0; absent && i < zero.elements[k]; i++)
                zero.grads[k][i] = 0.0F;
        }
        pair_step(&null, NULL);
        pair_step(&zero, NULL);
        pair_assert_same_params(&null, &zero);
    }
    pair_check(&null, "NULL as zero", 1e-3, 1e-3, NULL);
    pair_close(&null);
    pair_close(&zero);
}

/* The tensor and its momentum stay; the others step. */
static void test_null_gradient_leaves_the_tensor(void **state) {
    (void)state;
    pair_tensor skipping[TENSORS];
    memcpy(skipping, tensors, sizeof tensors);
    for (size_t k = 1; k <= 2; k++)
        skipping[k].null_grad = MUONSHARD_NULL_GRAD_SKIP;
    pair p;
    pair_open(&p, "preset: moonlight\nns_dtype: fp32\n", moonlight, skipping, TENSORS, 313);
    muonshard_step_args args = large_rates();
    for (int step = 1; step <= 6; step++) {
        bool absent = step >= 5 || step == 2;
        float *before[3] = {NULL, params_copy(&p, 1), params_copy(&p, 2)};
        pair_new_gradients(&p);
        pair_set_absent(&p, 1, absent);
        pair_set_absent(&p, 2, step >= 5);
        pair_step(&p, &args);
        assert_int_equal(p.result.skipped, 0);
        for (size_t k = 1; k <= 2; k++) {
            if (p.absent[k])
                assert_unchanged(&p, k, before[k]);
            free(before[k]);
        }
        pair_check(&p, "NULL as skip", 2e-5, 1e-5, NULL);
    }
    pair_close(&p);
}

static void test_frozen_tensors_stay(void **state) {
    (void)state;
    static const pair_tensor with_frozen[] = {
        {"matrix", MATRIX, MUONSHARD_STACK, 2, {12, 18}, .grad_size = 1.0},
        {"frozen", MUONSHARD_ROLE_FROZEN, MUONSHARD_STACK, 2, {12, 18}, .grad_size = 1.0},
        {"gain", ELEMENTWISE, MUONSHARD_STACK, 1, {18}, .grad_size = 1.0},
    };
    pair p;
    pair_open(&p, "preset: moonlight\nns_dtype: fp32\n", moonlight, with_frozen, 3, 314);
    for (int step = 1; step <= 3; step++) {
        pair_new_gradients(&p);
        pair_step_library(&p, NULL);
        assert_unchanged(&p, 1, p.start[1]);
        assert_true(p.params[0][0] != p.start[0][0] && p.params[2][0] != p.start[2][0]);
    }
    pair_close(&p);
}

int main(void) {
    const struct CMUnitTest all[] = {
        cmocka_unit_test(test_clipping_comes_before_momentum),
        cmocka_unit_test(test_idle_clipping_changes_no_bit),
        cmocka_unit_test(test_nonfinite_gradients_skip_the_step),
        cmocka_unit_test(test_large_gradients_are_not_skipped),
        cmocka_unit_test(test_zero_gradients),
        cmocka_unit_test(test_arguments_of_a_step),
        cmocka_unit_test(test_lr_factor_alone),
        cmocka_unit_test(test_auto_rates_follow_the_step),
        cmocka_unit_test(test_multipliers),
        cmocka_unit_test(test_groups),
        cmocka_unit_test(test_groups_leave_out_values),
        cmocka_unit_test(test_reductions_of_one_rank_are_the_same),
        cmocka_unit_test(test_null_gradient_is_an_error),
        cmocka_unit_test(test_null_gradient_is_zero),
        cmocka_unit_test(test_null_gradient_leaves_the_tensor),
        cmocka_unit_test(test_frozen_tensors_stay),
    };
    return cmocka_run_group_tests(all, NULL, NULL);
}
