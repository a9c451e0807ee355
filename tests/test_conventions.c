/* Every convention that is a setting, one at a time, against the fp64 oracle: ten steps at rates
 * that move parameters by far more than the spacing of fp32, through the public API at one rank. */
#include "oracle_pair.h"

#include <stdarg.h>
#include <setjmp.h>
#include <cmocka.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#define MATRIX      MUONSHARD_ROLE_MATRIX
#define ELEMENTWISE MUONSHARD_ROLE_ELEMENTWISE

static const pair_tensor tensors[] = {
    {"square", MATRIX, MUONSHARD_STACK, 2, {20, 20}, .grad_size = 1.0},
    {"wide", MATRIX, MUONSHARD_STACK, 2, {12, 40}, .grad_size = 1.0},
    {"tall", MATRIX, MUONSHARD_STACK, 2, {40, 12}, .grad_size = 0.1},
    {"stack", MATRIX, MUONSHARD_STACK, 3, {3, 14, 9}, 2, {6, 8}, .grad_size = 1.0},
    {"convolution", MATRIX, MUONSHARD_FLATTEN, 4, {6, 2, 3, 3}, .grad_size = 2.0},
    {"gain", ELEMENTWISE, MUONSHARD_STACK, 1, {33}, .grad_size = 0.5},
    {"embedding", ELEMENTWISE, MUONSHARD_STACK, 2, {11, 5}, .grad_size = 1.0},
};
enum { TENSORS = sizeof tensors / sizeof tensors[0] };

#define BASE "preset: jordan\nns_dtype: fp32\nlr: 0.1\nadam.lr: 0.1\n"

/* X(name, YAML on top of BASE, tolerance, what it means for the oracle's preset p) */
#define CASES(X)                                                                                   \
    X(heavy_ball, "momentum_form: heavy_ball\nnesterov: false\n", 2e-5,                            \
      p->momentum_form = ORACLE_HEAVY_BALL, p->nesterov = false)                                   \
    X(corrected, "momentum_form: ema_corrected\n", 2e-5, p->momentum_form = ORACLE_EMA_CORRECTED)  \
    X(corrected_plain, "momentum_form: ema_corrected\nnesterov: false\n", 2e-5,                    \
      p->momentum_form = ORACLE_EMA_CORRECTED, p->nesterov = false)                                \
    /* fp32 and fp64 may round an entry to different neighbours */                                 \
    X(momentum_bf16, "momentum_dtype: bf16\n", 2e-3, p->momentum_bf16 = true)                      \
    X(momentum_bf16_ball, "momentum_dtype: bf16\nmomentum_form: heavy_ball\nnesterov: false\n",    \
      2e-3, p->momentum_bf16 = true, p->momentum_form = ORACLE_HEAVY_BALL, p->nesterov = false)    \
    X(independent, "decay: independent\nweight_decay: 0.02\nscale: rms\n", 2e-5,                   \
      p->decay = ORACLE_INDEPENDENT, p->weight_decay = 0.02, p->scale = ORACLE_SCALE_RMS)          \
    X(independent_scaled,                                                                          \
      "decay: independent\ndecay_lr: scaled\nweight_decay: 0.02\nscale: rms\n", 2e-5,              \
      p->decay = ORACLE_INDEPENDENT, p->weight_decay = 0.02, p->decay_scaled = true,               \
      p->scale = ORACLE_SCALE_RMS)                                                                 \
    X(lr_squared, "decay: lr_squared\nweight_decay: 3\nscale: rms\n", 2e-5,                        \
      p->decay = ORACLE_LR_SQUARED, p->weight_decay = 3.0, p->scale = ORACLE_SCALE_RMS)            \
    X(l2, "decay: l2\nweight_decay: 2\n", 2e-5, p->decay = ORACLE_L2, p->weight_decay = 2.0)       \
    /* where U is nearly zero, its sign is a matter of rounding */                                 \
    X(cautious, "decay: cautious\nweight_decay: 0.5\n", 1e-3, p->decay = ORACLE_CAUTIOUS,          \
      p->weight_decay = 0.5)                                                                       \
    X(cautious_squared, "decay: cautious_lr_squared\nweight_decay: 4\ndecay_form: add\n", 1e-3,    \
      p->decay = ORACLE_CAUTIOUS_LR_SQUARED, p->weight_decay = 4.0, p->decay_form = ORACLE_ADD)    \
    X(cautious_with, "decay: cautious\nweight_decay: 0.5\ndecay_form: with_update\n", 1e-3,        \
      p->decay = ORACLE_CAUTIOUS, p->weight_decay = 0.5, p->decay_form = ORACLE_WITH_UPDATE)       \
    X(scaled, "decay_lr: scaled\nweight_decay: 0.5\nscale: rms\n", 2e-5, p->decay_scaled = true,   \
      p->weight_decay = 0.5, p->scale = ORACLE_SCALE_RMS)                                          \
    X(scaled_squared, "decay: lr_squared\ndecay_lr: scaled\nweight_decay: 5\nscale: spectral\n",   \
      2e-5, p->decay = ORACLE_LR_SQUARED, p->decay_scaled = true, p->weight_decay = 5.0,           \
      p->scale = ORACLE_SCALE_SPECTRAL)                                                            \
    X(add, "decay_form: add\nweight_decay: 0.5\n", 2e-5, p->decay_form = ORACLE_ADD,               \
      p->weight_decay = 0.5)                                                                       \
    X(with_update, "decay_form: with_update\nweight_decay: 0.5\n", 2e-5,                           \
      p->decay_form = ORACLE_WITH_UPDATE, p->weight_decay = 0.5)                                   \
    X(safety_norm, "norm: frobenius_safety\nnorm_eps: auto\n", 2e-5,                               \
      p->norm = ORACLE_FROBENIUS_SAFETY)                                                           \
    X(large_eps, "norm: frobenius_safety\nnorm_eps: 0.5\n", 2e-5,                                  \
      p->norm = ORACLE_FROBENIUS_SAFETY, p->norm_eps = 0.5)                                        \
    X(turbo, "norm: aol\ncoefficients: turbo\nns_steps: 4\n", 2e-5, p->norm = ORACLE_AOL,          \
      p->set = ORACLE_TURBO, p->steps = 4)                                                         \
    X(aol4, "norm: aol\nnorm_eps: 0.1\ncoefficients: aol4\nns_steps: 4\n", 2e-5,                   \
      p->norm = ORACLE_AOL, p->norm_eps = 0.1, p->set = ORACLE_AOL4, p->steps = 4)                 \
    X(schatten4, "norm: schatten4\nnorm_eps: auto\n", 2e-5, p->norm = ORACLE_SCHATTEN4,            \
      p->norm_eps = 1e-8)                                                                          \
    X(spectral, "norm: spectral\nnorm_eps: auto\n", 2e-5, p->norm = ORACLE_SPECTRAL,               \
      p->norm_eps = 1e-8)                                                                          \
    X(polar_express, "coefficients: polar_express\nns_steps: 6\n", 5e-5,                           \
      p->set = ORACLE_POLAR_EXPRESS, p->steps = 6)                                                 \
    X(computed, "coefficients: polar_express_computed\nns_steps: 6\n", 5e-5,                       \
      p->set = ORACLE_POLAR_EXPRESS, p->steps = 6)                                                 \
    X(custom,                                                                                      \
      "coefficients: custom\ncustom_coefficients: ['3.9505, -6.3029, 2.6377', "                    \
      "'3.7418,-5.5913,2.3037', '2.8769,-3.1427,1.2046', '2.8366,-3.0525,1.2012']\n",              \
      5e-5, p->set = ORACLE_TURBO)                                                                 \
    X(powers, "coefficient_safety: 1.1\ncoefficient_safety_form: powers\n", 2e-5,                  \
      p->coefficient_safety = 1.1, p->safety_powers = true)                                        \
    X(only_fp16, "coefficient_safety: 1.1\ncoefficient_safety_for: fp16\n", 2e-5,                  \
      p->coefficient_safety = 1.0)                                                                 \
    X(cubic, "coefficients: cubic5\n", 2e-5, p->set = ORACLE_CUBIC5)                               \
    X(gram, "ns_form: gram\n", 1e-4, p->gram = true)                                               \
    X(gram_auto, "ns_form: auto\ncoefficients: quintic\n", 1e-4, p->set = ORACLE_QUINTIC)          \
    X(in_out, "layout: in_out\n", 2e-5, p->in_out = true)                                          \
    X(in_out_dims, "layout: in_out\nscale: ratio\nscale_dims: first_two\n", 2e-5,                  \
      p->in_out = true, p->scale = ORACLE_SCALE_RATIO, p->scale_dims = ORACLE_FIRST_TWO)           \
    X(normuon, "variance: normuon\n", 5e-5, p->normuon = true, p->variance_beta2 = 0.95,           \
      p->variance_eps = 1e-10)                                                                     \
    X(normuon_auto, "variance: normuon\nvariance_axis: auto\nvariance_beta2: 0.8\n", 5e-5,         \
      p->normuon = p->variance_auto = true, p->variance_beta2 = 0.8, p->variance_eps = 1e-10)      \
    X(normuon_clamped,                                                                             \
      "variance: normuon\nvariance_denominator: clamped\nvariance_eps: 0.01\nlayout: in_out\n",    \
      5e-5, p->normuon = p->variance_clamped = p->in_out = true, p->variance_beta2 = 0.95,         \
      p->variance_eps = 0.01)                                                                      \
    X(normuon_in_out, "variance: normuon\nvariance_axis: auto\nlayout: in_out\n", 5e-5,            \
      p->normuon = p->variance_auto = p->in_out = true, p->variance_beta2 = 0.95,                  \
      p->variance_eps = 1e-10)                                                                     \
    X(adam_nesterov, "adam.nesterov: true\n", 2e-5, p->adam_nesterov = true)                       \
    X(adam_nesterov_inside, "adam.nesterov: true\nadam.form: eps_inside\nadam.eps: 1e-2\n", 2e-5,  \
      p->adam_nesterov = true, p->adam_form = ORACLE_EPS_INSIDE, p->adam_eps = 1e-2)               \
    X(adam_independent, "adam.decay: independent\nadam.weight_decay: 0.02\n", 2e-5,                \
      p->adam_decay = ORACLE_INDEPENDENT, p->adam_weight_decay = 0.02)                             \
    X(adam_squared, "adam.decay: lr_squared\nadam.weight_decay: 3\n", 2e-5,                        \
      p->adam_decay = ORACLE_LR_SQUARED, p->adam_weight_decay = 3.0)                               \
    X(adam_l2, "adam.decay: l2\nadam.weight_decay: 2\n", 5e-5, p->adam_decay = ORACLE_L2,          \
      p->adam_weight_decay = 2.0)                                                                  \
    X(adam_cautious, "adam.decay: cautious\nadam.weight_decay: 0.5\n", 2e-5,                       \
      p->adam_decay = ORACLE_CAUTIOUS, p->adam_weight_decay = 0.5)                                 \
    X(adam_cautious_squared, "adam.decay: cautious_lr_squared\nadam.weight_decay: 3\n", 2e-5,      \
      p->adam_decay = ORACLE_CAUTIOUS_LR_SQUARED, p->adam_weight_decay = 3.0)                      \
    X(lion, "elementwise: lion\nadam.weight_decay: 0.3\n", 2e-5, p->lion = true,                   \
      p->adam_weight_decay = 0.3)                                                                  \
    X(lion_cautious, "elementwise: lion\nadam.decay: cautious\nadam.weight_decay: 0.3\n", 2e-5,    \
      p->lion = true, p->adam_decay = ORACLE_CAUTIOUS, p->adam_weight_decay = 0.3)                 \
    X(gathered_params, "gather: params\nweight_decay: 0.3\n", 2e-5, p->weight_decay = 0.3)         \
    X(everything,                                                                                  \
      "gather: params\nvariance: normuon\ndecay: cautious\ndecay_lr: scaled\nweight_decay: 0.3\n"  \
      "momentum_form: heavy_ball_swapped\nlayout: in_out\nclip_norm: 1\n",                         \
      1e-3, p->normuon = p->decay_scaled = p->in_out = true, p->variance_beta2 = 0.95,             \
      p->variance_eps = 1e-10, p->decay = ORACLE_CAUTIOUS, p->weight_decay = 0.3,                  \
      p->momentum_form = ORACLE_HEAVY_BALL_SWAPPED, p->clip_norm = 1.0)

/* Ten steps; fails where a tensor is off. Returns the sum of all parameters' squares, which tells
 * settings apart. */
static double run(const char *name, const char *yaml, double tolerance,
                  const oracle_preset *preset) {
    char whole[512];
    snprintf(whole, sizeof whole, "%s%s", BASE, yaml);
    pair p;
    pair_open(&p, whole, preset, tensors, TENSORS, 400);
    double worst[2] = {0.0, 0.0}, sum = 0.0;
    for (int step = 1; step <= 10; step++) {
        pair_new_gradients(&p);
        pair_step(&p, NULL);
        pair_check(&p, name, tolerance, tolerance, worst);
    }
    for (size_t k = 0; k < TENSORS; k++)
        for (size_t i = 0; i < p.elements[k]; i++)
            sum += (double)p.params[k][i] * (double)p.params[k][i];
    print_message("%-24s %.2e\n", name, worst[0]);
    pair_close(&p);
    return sum;
}

static oracle_preset base_preset(void) {
    oracle_preset p = oracle_presets[0];
    p.lr = p.adam_lr = 0.1;
    return p;
}

#define CASE_TEST(name, yaml, tolerance, ...)                                                      \
    static void test_##name(void **state) {                                                        \
        (void)state;                                                                               \
        oracle_preset preset = base_preset(), *p = &preset;                                        \
        (void)(__VA_ARGS__);                                                                       \
        run(#name, yaml, tolerance, p);                                                            \
    }
CASES(CASE_TEST)

/* A schedule is the same as its values given to each step. */
static void test_schedules(void **state) {
    (void)state;
    static const double lr[] = {0.0, 0.025, 0.05, 0.1, 0.1, 0.0775, 0.055, 0.0325, 0.01, 0.01};
    static const double momentum[] = {0.5,  0.6125, 0.725, 0.8375, 0.95,
                                      0.95, 0.95,   0.95,  0.95,   0.95};
    static const double decay[] = {0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.4, 0.4};
    oracle_preset preset = base_preset();
    pair scheduled, told;
    pair_open(&scheduled,
              BASE "total_steps: 8\nweight_decay: 0.2\nadam.weight_decay: 0.1\n"
                   "lr_schedule: 0:0 2:0.5 3:1 end-4:1 end:0.1\n"
                   "momentum_schedule: 0:0.5 4:0.95\n"
                   "weight_decay_schedule: 7:1 8:2\n",
              &preset, tensors, TENSORS, 500);
    pair_open(&told, BASE "weight_decay: 0.2\nadam.weight_decay: 0.1\n", &preset, tensors, TENSORS,
              500);
    for (int step = 0; step < 10; step++) {
        muonshard_step_args args = MUONSHARD_STEP_ARGS_INIT;
        args.lr = args.adam_lr = lr[step];
        args.momentum = momentum[step];
        args.weight_decay = decay[step];
        args.adam_weight_decay = 0.5 * decay[step];
        pair_new_gradients(&scheduled);
        pair_new_gradients(&told);
        pair_step_library(&scheduled, NULL);
        pair_step_library(&told, &args);
        for (size_t k = 0; k < TENSORS; k++)
            for (size_t i = 0; i < told.elements[k]; i++) {
                const double a = (double)scheduled.params[k][i], b = (double)told.params[k][i];
                if (!(fabs(a - b) <= 1e-6 * (fabs(b) + 0.1)))
                    fail_msg("step %d, %s: %.9g scheduled, %.9g told", step, tensors[k].name, a, b);
            }
    }
    pair_close(&scheduled);
    pair_close(&told);
}

/* ---- refused, with a message that names the setting ---- */

static void test_refusals(void **state) {
    (void)state;
    static const struct {
        const char *yaml, *named;
        bool at_create; /* else at commit */
    } cases[] = {
        {"{coefficients: polar_express, ns_dtype: bf16}", "polar_express", false},
        {"{coefficients: cans, ns_dtype: fp16}", "cans", false},
        {"{coefficients: cubic5, ns_dtype: bf16}", "cubic5", false},
        {"{coefficients: deepseekv4}", "deepseekv4", false},
        {"{coefficients: cubic5, ns_steps: 4}", "cubic5", false},
        {"{coefficients: custom}", "custom_coefficients", false},
        {"{coefficients: custom, custom_coefficients: ['1,2']}", "custom_coefficients", false},
        {"{gram_restarts: '7', ns_form: gram}", "gram_restarts", false},
        {"{lr_schedule: '5:1 3:1'}", "lr_schedule", true},
        {"{momentum_schedule: '0:1.5'}", "momentum_schedule", true},
        {"{weight_decay_schedule: '0:-1'}", "weight_decay_schedule", true},
        {"{lr_schedule: nonsense}", "lr_schedule", true},
        {"{momentum_form: ema_corrected, momentum: 1}", "momentum", true},
        {"{momentum_form: ema_corrected, momentum_schedule: '0:0.5 9:1'}", "momentum_schedule",
         true},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        muonshard_comm *comm;
        muonshard_config *config;
        muonshard_optimizer *o = NULL;
        float w[6 * 9] = {0}, g[6 * 9] = {0};
        assert_int_equal(muonshard_comm_create_self(NULL, &comm), MUONSHARD_OK);
        assert_int_equal(muonshard_config_create(&config), MUONSHARD_OK);
        if (muonshard_config_load_string(config, cases[i].yaml))
            fail_msg("%s", muonshard_config_last_error(config));
        muonshard_status status = muonshard_create(comm, config, NULL, &o);
        assert_int_equal(status, cases[i].at_create ? MUONSHARD_ERR_CONFIG : MUONSHARD_OK);
        const char *text = muonshard_comm_last_error(comm);
        if (o && strcmp(muonshard_backend(o), "host") == 0) { /* w and g are the host's */
            muonshard_tensor_desc d = MUONSHARD_TENSOR_DESC_INIT;
            d.name = "w";
            d.role = MATRIX;
            d.dims = 2;
            d.shape[0] = 6;
            d.shape[1] = 9;
            d.param = w;
            d.grad = g;
            assert_int_equal(muonshard_add_tensor(o, &d, NULL), MUONSHARD_OK);
            assert_int_equal(muonshard_commit(o, MUONSHARD_SYNC_CHECK), MUONSHARD_ERR_CONFIG);
            text = muonshard_last_error(o);
        }
        const bool seen = !o || strcmp(muonshard_backend(o), "host") == 0;
        if (seen && !strstr(text, cases[i].named))
            fail_msg("%s: '%s'", cases[i].yaml, text);
        muonshard_destroy(o);
        muonshard_config_destroy(config);
        muonshard_comm_destroy(comm);
    }
}

int main(void) {
#define CASE_ENTRY(name, ...) cmocka_unit_test(test_##name),
    const struct CMUnitTest all[] = {
        CASES(CASE_ENTRY) cmocka_unit_test(test_schedules),
        cmocka_unit_test(test_refusals),
    };
    return cmocka_run_group_tests(all, NULL, NULL);
}
