/* The settings, their presets, and a program's own table. Expected numbers are written out here,
 * not taken from the tables. */
#include "config_fixture.h"

/* ---- presets ---- */

/* One line a preset: the values of `keys`, as they are printed. */
static const char *const keys[] = {
    "lr",
    "weight_decay",
    "decay",
    "decay_lr",
    "decay_form",
    "momentum",
    "momentum_form",
    "nesterov",
    "norm",
    "norm_eps",
    "coefficients",
    "coefficient_safety",
    "coefficient_safety_form",
    "coefficient_safety_for",
    "ns_steps",
    "ns_dtype",
    "ns_form",
    "scale",
    "scale_dims",
    "layout",
    "adam.lr",
    "adam.weight_decay",
    "adam.beta1",
    "adam.beta2",
    "adam.eps",
    "adam.form",
    "adam.nesterov",
    "adam.decay",
};
enum { KEYS = sizeof keys / sizeof keys[0] };

static const char *const algorithms[][KEYS + 1] = {
    {"none",  "0.001",         "0.1",         "decoupled", "base",     "multiply", "0.95", "ema",
     "true",  "frobenius_max", "auto",        "simple",    "1",        "factor",   "all",  "5",
     "fp32",  "auto",          "shape",       "flattened", "out_in",   "auto",     "0.01", "0.9",
     "0.999", "1e-08",         "eps_outside", "false",     "decoupled"},
    {"jordan", "0.02",          "0",           "decoupled", "base",     "multiply", "0.95", "ema",
     "true",   "frobenius_add", "1e-07",       "simple",    "1",        "factor",   "all",  "5",
     "bf16",   "standard",      "shape",       "last_two",  "out_in",   "0.0003",   "0",    "0.9",
     "0.95",   "1e-10",         "eps_outside", "false",     "decoupled"},
    {"moonlight",  "0.001", "0.1",           "decoupled", "base",   "multiply",   "0.95",
     "heavy_ball", "true",  "frobenius_add", "1e-07",     "simple", "1",          "factor",
     "all",        "5",     "bf16",          "standard",  "rms",    "first_two",  "out_in",
     "auto",       "auto",  "0.9",           "0.95",      "1e-08",  "eps_inside", "false",
     "decoupled"},
    {"torch", "0.001",         "0.1",         "decoupled", "base",     "multiply", "0.95", "ema",
     "true",  "frobenius_max", "1e-07",       "simple",    "1",        "factor",   "all",  "5",
     "bf16",  "standard",      "shape",       "flattened", "out_in",   "0.001",    "0.01", "0.9",
     "0.999", "1e-08",         "eps_outside", "false",     "decoupled"},
    {"nvidia", "0.0003",        "0.01",        "decoupled", "base",     "add",    "0.95", "ema",
     "false",  "frobenius_max", "1e-07",       "quintic",   "1",        "factor", "all",  "5",
     "bf16",   "standard",      "spectral",    "flattened", "out_in",   "0.0003", "0.01", "0.9",
     "0.95",   "1e-08",         "eps_outside", "false",     "decoupled"},
    {"grouped_fp16", "0.0003", "0.01",          "decoupled", "base",   "multiply",    "0.95",
     "heavy_ball",   "true",   "frobenius_add", "1e-07",     "simple", "1.02",        "factor",
     "fp16",         "5",      "fp16",          "standard",  "rms",    "flattened",   "out_in",
     "auto",         "auto",   "0.9",           "0.95",      "1e-08",  "eps_outside", "false",
     "decoupled"},
    {"fan_ratio", "0.02",          "0",           "decoupled",
     "base",      "multiply",      "0.95",        "heavy_ball_swapped",
     "true",      "frobenius_add", "1e-07",       "simple",
     "1",         "factor",        "all",         "5",
     "fp32",      "standard",      "fan_ratio",   "first_last",
     "out_in",    "0.0003",        "0.01",        "0.9",
     "0.95",      "1e-08",         "eps_outside", "false",
     "decoupled"},
    {"dion_repo",   "0.01",
     "0.01",        "decoupled",
     "base",        "multiply",
     "0.95",        "heavy_ball",
     "false",       "frobenius_safety",
     "1e-08",       "polar_express_speedrun",
     "1",           "factor",
     "all",         "5",
     "bf16",        "standard",
     "ratio",       "last_two",
     "out_in",      "auto",
     "auto",        "0.9",
     "0.95",        "1e-08",
     "eps_outside", "false",
     "decoupled"},
    {"gram",       "0.001", "0.1",           "decoupled", "base",          "multiply",    "0.95",
     "heavy_ball", "true",  "frobenius_add", "1e-07",     "polar_express", "1.05",        "powers",
     "all",        "5",     "fp16",          "gram",      "rms",           "flattened",   "out_in",
     "auto",       "auto",  "0.9",           "0.95",      "1e-08",         "eps_outside", "false",
     "decoupled"},
    {"speedrun",
     "0.023",
     "1.2",
     "cautious_lr_squared",
     "scaled",
     "multiply",
     "0.95",
     "ema",
     "true",
     "frobenius_safety",
     "1e-06",
     "polar_express_speedrun",
     "1",
     "factor",
     "all",
     "5",
     "bf16",
     "standard",
     "shape",
     "flattened",
     "out_in",
     "0.008",
     "0.005",
     "0.9",
     "0.95",
     "1e-10",
     "eps_inside",
     "false",
     "cautious_lr_squared"},
    {"optax",    "0.001",         "0",           "decoupled",
     "base",     "with_update",   "0.95",        "ema_corrected",
     "true",     "frobenius_add", "1e-08",       "simple",
     "1",        "factor",        "all",         "5",
     "param",    "standard",      "shape",       "flattened",
     "in_out",   "auto",          "0",           "0.9",
     "0.999",    "1e-08",         "eps_outside", "true",
     "decoupled"},
};
static const size_t algorithm_count = sizeof algorithms / sizeof *algorithms;

static void assert_algorithm(const muonshard_config *config, const char *const *values) {
    for (size_t k = 0; k < KEYS; k++)
        assert_config_value(config, keys[k], values[k + 1]);
    const bool speedrun = strcmp(values[0], "speedrun") == 0;
    assert_config_value(config, "variance", speedrun ? "normuon" : "none");
    assert_config_value(config, "momentum_schedule",
                        speedrun ? "0:0.85 300:0.95 end-50:0.95 end:0.85" : "");
    if (speedrun) {
        assert_config_value(config, "variance_axis", "auto");
        assert_config_value(config, "variance_denominator", "clamped");
        assert_config_value(config, "variance_beta2", "0.9");
        assert_config_value(config, "variance_eps", "1e-10");
    }
}

static void test_presets(void **state) {
    (void)state;
    muonshard_config *config = config_fresh();
    assert_int_equal(algorithm_count, preset_count);
    assert_algorithm(config, algorithms[0]);
    /* Forth and back: nothing of the last preset stays. */
    for (size_t n = 0; n < 2 * algorithm_count; ++n) {
        const size_t i = n < algorithm_count ? n : 2 * algorithm_count - 1 - n;
        config_put(config, "preset", algorithms[i][0]);
        assert_int_equal(config_settings(config)->preset, i);
        assert_algorithm(config, algorithms[i]);
    }
    muonshard_config_destroy(config);
}

/* What no preset names. */
static void test_other_defaults(void **state) {
    (void)state;
    muonshard_config *config = config_fresh();
    for (size_t i = 0; i < preset_count; ++i) {
        const settings *s = config_settings(config);
        config_put(config, "preset", preset_table[i].name);
        assert_real(s->clip_norm, 0);
        assert_int_equal(s->reduce, REDUCE_MEAN);
        assert_int_equal(s->gather, GATHER_AUTO);
        assert_int_equal(s->master, MASTER_AUTO);
        assert_int_equal(s->rounding, ROUNDING_NEAREST);
        assert_int_equal(s->momentum_dtype, MUONSHARD_FP32);
        assert_int_equal(s->elementwise, ELEMENTWISE_ADAMW);
        assert_real(s->adam_lr_scale, 1);
        assert_real(s->extra_scale, 1);
        assert_string_equal(s->lr_schedule, "");
        assert_string_equal(s->weight_decay_schedule, "");
        assert_int_equal(s->coefficient_check, 0);
        assert_int_equal(s->ownership, OWNERSHIP_ROUND_ROBIN);
        assert_int_equal(s->check_replicas, 0);
        assert_int_equal(s->backend, BACKEND_AUTO);
        assert_int_equal(s->bucket_bytes, 25 * 1024 * 1024);
        assert_int_equal(s->batch_bytes, 0);
        assert_real(s->timeout_s, 100);
        assert_real(s->first_timeout_s, 300);
        assert_string_equal(s->trace, "");
    }
    muonshard_config_destroy(config);
}

static void test_explicit_keys_win(void **state) {
    (void)state;
    const char *const yaml[] = {"lr: 0.5\nadam: {lr: 0.25}\npreset: moonlight\n",
                                "preset: moonlight\nadam:\n  lr: 0.25\nlr: 0.5\n"};
    for (int order = 0; order < 4; ++order) {
        muonshard_config *config = config_fresh();
        if (order < 2) {
            config_load(config, yaml[order]);
        } else {
            config_put(config, order == 2 ? "preset" : "lr", order == 2 ? "moonlight" : "0.5");
            config_put(config, order == 2 ? "lr" : "preset", order == 2 ? "0.5" : "moonlight");
            config_put(config, "adam.lr", "0.25");
        }
        const settings *s = config_settings(config);
        assert_real(s->lr, 0.5);
        assert_real(s->adam_lr, 0.25);
        assert_int_equal(s->scale, SCALE_RMS);
        config_put(config, "preset", "jordan"); /* another preset, the same explicit keys */
        assert_real(s->lr, 0.5);
        assert_real(s->adam_lr, 0.25);
        assert_int_equal(s->scale, SCALE_SHAPE);
        muonshard_config_destroy(config);
    }
}

static void test_later_goes_before_earlier(void **state) {
    (void)state;
    muonshard_config *config = config_fresh();
    config_load(config, "lr: 0.5\nmomentum: 0.9\n");
    config_load(config, "lr: 0.25\n");
    assert_real(config_settings(config)->lr, 0.25);
    assert_real(config_settings(config)->momentum, 0.9);
    config_put(config, "lr", "0.125");
    assert_real(config_settings(config)->lr, 0.125);
    muonshard_config_destroy(config);
}

/* The words of every choice stand for the enum's constants in their order. */
static void test_choice_order(void **state) {
    (void)state;
    static const struct {
        const char *key, *word;
        size_t offset;
        int value;
    } cases[] = {
#define WORD(key, field, word, value) {key, word, offsetof(settings, field), value}
        WORD("momentum_form", momentum_form, "heavy_ball", MOMENTUM_HEAVY_BALL),
        WORD("momentum_form", momentum_form, "heavy_ball_swapped", MOMENTUM_HEAVY_BALL_SWAPPED),
        WORD("momentum_form", momentum_form, "ema", MOMENTUM_EMA),
        WORD("momentum_form", momentum_form, "ema_corrected", MOMENTUM_EMA_CORRECTED),
        WORD("momentum_dtype", momentum_dtype, "fp32", MUONSHARD_FP32),
        WORD("momentum_dtype", momentum_dtype, "bf16", MUONSHARD_BF16),
        WORD("decay", decay, "decoupled", DECAY_DECOUPLED),
        WORD("decay", decay, "independent", DECAY_INDEPENDENT),
        WORD("decay", decay, "lr_squared", DECAY_LR_SQUARED),
        WORD("decay", decay, "l2", DECAY_L2),
        WORD("decay", decay, "cautious", DECAY_CAUTIOUS),
        WORD("decay", decay, "cautious_lr_squared", DECAY_CAUTIOUS_LR_SQUARED),
        WORD("decay_lr", decay_lr, "base", DECAY_LR_BASE),
        WORD("decay_lr", decay_lr, "scaled", DECAY_LR_SCALED),
        WORD("decay_form", decay_form, "multiply", DECAY_FORM_MULTIPLY),
        WORD("decay_form", decay_form, "add", DECAY_FORM_ADD),
        WORD("decay_form", decay_form, "with_update", DECAY_FORM_WITH_UPDATE),
        WORD("nesterov", nesterov, "true", 1),
        WORD("nesterov", nesterov, "false", 0),
        WORD("norm", norm, "frobenius_add", NS_NORM_FROBENIUS_ADD),
        WORD("norm", norm, "frobenius_max", NS_NORM_FROBENIUS_MAX),
        WORD("norm", norm, "frobenius_safety", NS_NORM_FROBENIUS_SAFETY),
        WORD("norm", norm, "aol", NS_NORM_AOL),
        WORD("norm", norm, "schatten4", NS_NORM_SCHATTEN4),
        WORD("norm", norm, "spectral", NS_NORM_SPECTRAL),
        WORD("coefficients", coefficients, "simple", COEFFICIENTS_SIMPLE),
        WORD("coefficients", coefficients, "quintic", COEFFICIENTS_QUINTIC),
        WORD("coefficients", coefficients, "you", COEFFICIENTS_YOU),
        WORD("coefficients", coefficients, "polar_express", COEFFICIENTS_POLAR_EXPRESS),
        WORD("coefficients", coefficients, "polar_express_nvidia",
             COEFFICIENTS_POLAR_EXPRESS_NVIDIA),
        WORD("coefficients", coefficients, "polar_express_speedrun",
             COEFFICIENTS_POLAR_EXPRESS_SPEEDRUN),
        WORD("coefficients", coefficients, "polar_express_computed",
             COEFFICIENTS_POLAR_EXPRESS_COMPUTED),
        WORD("coefficients", coefficients, "cans", COEFFICIENTS_CANS),
        WORD("coefficients", coefficients, "turbo", COEFFICIENTS_TURBO),
        WORD("coefficients", coefficients, "aol4", COEFFICIENTS_AOL4),
        WORD("coefficients", coefficients, "deepseekv4", COEFFICIENTS_DEEPSEEKV4),
        WORD("coefficients", coefficients, "cubic5", COEFFICIENTS_CUBIC5),
        WORD("coefficients", coefficients, "custom", COEFFICIENTS_CUSTOM),
        WORD("coefficient_repeat", coefficient_repeat, "auto", REPEAT_AUTO),
        WORD("coefficient_repeat", coefficient_repeat, "cycle", REPEAT_CYCLE),
        WORD("coefficient_repeat", coefficient_repeat, "repeat_last", REPEAT_LAST),
        WORD("coefficient_safety_form", coefficient_safety_form, "factor", SAFETY_FACTOR),
        WORD("coefficient_safety_form", coefficient_safety_form, "powers", SAFETY_POWERS),
        WORD("coefficient_safety_for", coefficient_safety_for, "all", SAFETY_FOR_ALL),
        WORD("coefficient_safety_for", coefficient_safety_for, "fp16", SAFETY_FOR_FP16),
        WORD("safety_last", safety_last, "true", 1),
        WORD("safety_last", safety_last, "false", 0),
        WORD("coefficient_check", coefficient_check, "on", 0),
        WORD("coefficient_check", coefficient_check, "off", 1),
        WORD("ns_dtype", ns_dtype, "fp32", NS_DTYPE_FP32),
        WORD("ns_dtype", ns_dtype, "tf32", NS_DTYPE_TF32),
        WORD("ns_dtype", ns_dtype, "bf16", NS_DTYPE_BF16),
        WORD("ns_dtype", ns_dtype, "fp16", NS_DTYPE_FP16),
        WORD("ns_dtype", ns_dtype, "param", NS_DTYPE_PARAM),
        WORD("ns_form", ns_form, "standard", NS_FORM_STANDARD),
        WORD("ns_form", ns_form, "gram", NS_FORM_GRAM),
        WORD("ns_form", ns_form, "auto", NS_FORM_AUTO),
        WORD("variance", variance, "none", VARIANCE_NONE),
        WORD("variance", variance, "normuon", VARIANCE_NORMUON),
        WORD("variance_axis", variance_axis, "rows", VARIANCE_AXIS_ROWS),
        WORD("variance_axis", variance_axis, "auto", VARIANCE_AXIS_AUTO),
        WORD("variance_denominator", variance_denominator, "sqrt_plus_eps", VARIANCE_SQRT_PLUS_EPS),
        WORD("variance_denominator", variance_denominator, "clamped", VARIANCE_CLAMPED),
        WORD("scale", scale, "none", SCALE_NONE),
        WORD("scale", scale, "shape", SCALE_SHAPE),
        WORD("scale", scale, "ratio", SCALE_RATIO),
        WORD("scale", scale, "spectral", SCALE_SPECTRAL),
        WORD("scale", scale, "rms", SCALE_RMS),
        WORD("scale", scale, "fan_ratio", SCALE_FAN_RATIO),
        WORD("scale_dims", scale_dims, "flattened", SCALE_DIMS_FLATTENED),
        WORD("scale_dims", scale_dims, "first_two", SCALE_DIMS_FIRST_TWO),
        WORD("scale_dims", scale_dims, "last_two", SCALE_DIMS_LAST_TWO),
        WORD("scale_dims", scale_dims, "first_last", SCALE_DIMS_FIRST_LAST),
        WORD("layout", layout, "out_in", LAYOUT_OUT_IN),
        WORD("layout", layout, "in_out", LAYOUT_IN_OUT),
        WORD("elementwise", elementwise, "adamw", ELEMENTWISE_ADAMW),
        WORD("elementwise", elementwise, "lion", ELEMENTWISE_LION),
        WORD("adam.form", adam_form, "eps_outside", ADAM_EPS_OUTSIDE),
        WORD("adam.form", adam_form, "eps_inside", ADAM_EPS_INSIDE),
        WORD("adam.nesterov", adam_nesterov, "true", 1),
        WORD("adam.nesterov", adam_nesterov, "false", 0),
        WORD("adam.decay", adam_decay, "decoupled", DECAY_DECOUPLED),
        WORD("adam.decay", adam_decay, "independent", DECAY_INDEPENDENT),
        WORD("adam.decay", adam_decay, "lr_squared", DECAY_LR_SQUARED),
        WORD("adam.decay", adam_decay, "l2", DECAY_L2),
        WORD("adam.decay", adam_decay, "cautious", DECAY_CAUTIOUS),
        WORD("adam.decay", adam_decay, "cautious_lr_squared", DECAY_CAUTIOUS_LR_SQUARED),
        WORD("reduce", reduce, "mean", REDUCE_MEAN),
        WORD("reduce", reduce, "sum", REDUCE_SUM),
        WORD("reduce", reduce, "none", REDUCE_NONE),
        WORD("gather", gather, "auto", GATHER_AUTO),
        WORD("gather", gather, "updates", GATHER_UPDATES),
        WORD("gather", gather, "params", GATHER_PARAMS),
        WORD("master", master, "auto", MASTER_AUTO),
        WORD("master", master, "owner", MASTER_OWNER),
        WORD("master", master, "replicated", MASTER_REPLICATED),
        WORD("master", master, "none", MASTER_NONE),
        WORD("rounding", rounding, "nearest", ROUNDING_NEAREST),
        WORD("rounding", rounding, "stochastic", ROUNDING_STOCHASTIC),
        WORD("ownership", ownership, "round_robin", OWNERSHIP_ROUND_ROBIN),
        WORD("ownership", ownership, "balanced", OWNERSHIP_BALANCED),
        WORD("backend", backend, "auto", BACKEND_AUTO),
        WORD("backend", backend, "host", BACKEND_HOST),
        WORD("backend", backend, "cuda", BACKEND_CUDA),
#undef WORD
    };
    muonshard_config *config = config_fresh();
    for (size_t i = 0; i < sizeof cases / sizeof *cases; ++i) {
        config_put(config, cases[i].key, cases[i].word);
        const char *base = (const char *)config_settings(config);
        assert_int_equal(*(const int *)(base + cases[i].offset), cases[i].value);
        assert_config_value(config, cases[i].key, cases[i].word);
    }
    muonshard_config_destroy(config);
}

/* Every key reaches its own field: distinct values in, distinct values out. */
static void test_every_field(void **state) {
    (void)state;
    muonshard_config *config = config_fresh();
    config_load(config,
                "lr: 0.011\nweight_decay: 0.012\nmomentum: 0.013\nnorm_eps: 0.014\n"
                "coefficient_safety: 1.015\nns_steps: 16\nextra_scale: 0.017\n"
                "adam:\n  lr: 0.018\n  lr_scale: 0.019\n  weight_decay: 0.020\n  beta1: 0.021\n"
                "  beta2: 0.022\n  eps: 0.023\n"
                "clip_norm: 0.024\ncheck_replicas: 25\nbucket_bytes: 26\nbatch_bytes: 27\n"
                "timeout: 28\nfirst_timeout: 29\ntrace: t-%r.json\n"
                "lr_schedule: 0:0.30\nweight_decay_schedule: 0:0.31\nmomentum_schedule: 0:0.32\n"
                "total_steps: 33\npolar_lower_bound: 0.034\nvariance_beta2: 0.035\n"
                "variance_eps: 0.036\nseed: 37\ngram_restarts: 3,8\n"
                "custom_coefficients: ['3, 9', '4']\n");
    const settings *s = config_settings(config);
    assert_real(s->lr, 0.011);
    assert_real(s->weight_decay, 0.012);
    assert_real(s->momentum, 0.013);
    assert_real(s->norm_eps, 0.014);
    assert_real(s->coefficient_safety, 1.015);
    assert_int_equal(s->ns_steps, 16);
    assert_real(s->extra_scale, 0.017);
    assert_real(s->adam_lr, 0.018);
    assert_real(s->adam_lr_scale, 0.019);
    assert_real(s->adam_weight_decay, 0.020);
    assert_real(s->adam_beta1, 0.021);
    assert_real(s->adam_beta2, 0.022);
    assert_real(s->adam_eps, 0.023);
    assert_real(s->clip_norm, 0.024);
    assert_int_equal(s->check_replicas, 25);
    assert_int_equal(s->bucket_bytes, 26);
    assert_int_equal(s->batch_bytes, 27);
    assert_real(s->timeout_s, 28);
    assert_real(s->first_timeout_s, 29);
    assert_string_equal(s->trace, "t-%r.json");
    assert_string_equal(s->lr_schedule, "0:0.30");
    assert_string_equal(s->weight_decay_schedule, "0:0.31");
    assert_string_equal(s->momentum_schedule, "0:0.32");
    assert_int_equal(s->total_steps, 33);
    assert_real(s->polar_lower_bound, 0.034);
    assert_real(s->variance_beta2, 0.035);
    assert_real(s->variance_eps, 0.036);
    assert_int_equal(s->seed, 37);
    assert_string_equal(s->gram_restarts, "3,8");
    assert_string_equal(s->custom_coefficients, "3, 9\n4\n");
    config_put(config, "adam.lr", "auto");
    assert_true(isnan(s->adam_lr));
    muonshard_config_destroy(config);
}

/* ---- a program's own table ---- */

static void test_added_table(void **state) {
    (void)state;
    program_values v;
    memset(&v, 0xff, sizeof v);
    muonshard_config *config = config_fresh_with_program(&v);
    assert_int_equal(v.flag, 1);
    assert_int_equal(v.count, 7);
    assert_real(v.rate, 0.5);
    assert_true(isnan(v.limit));
    assert_string_equal(v.name, "no name");
    assert_string_equal(v.groups, "role=matrix\n");
    assert_int_equal(v.mode, 1);

    config_load(config, "flag: false\n"
                        "data:\n  count: -3\n  rate: -1\n  limit: 10\n"
                        "name: \"a: b # c\"\n"
                        "mode: fast\n"
                        "lr: 0.5\n"
                        "groups:\n"
                        "  - {pattern: '*.bias', role: elementwise}\n"
                        "  - match: [h.*, wte]\n"
                        "    lr: 2\n"
                        "  - role=frozen\n");
    assert_int_equal(v.flag, 0);
    assert_int_equal(v.count, -3);
    assert_real(v.rate, -1);
    assert_real(v.limit, 10);
    assert_string_equal(v.name, "a: b # c");
    assert_string_equal(v.groups,
                        "pattern=*.bias role=elementwise\nmatch=h.*,wte lr=2\nrole=frozen\n");
    assert_int_equal(v.mode, 0);
    assert_real(config_settings(config)->lr, 0.5);

    config_put(config, "groups", "one item"); /* replaces */
    assert_string_equal(v.groups, "one item\n");
    assert_config_value(config, "groups", "one item\n");
    config_load(config, "groups: [a, '', b]\n");
    assert_string_equal(v.groups, "a\n\nb\n");
    config_load(config, "groups: scalar item\n");
    assert_string_equal(v.groups, "scalar item\n");
    config_load(config, "groups:\nname: ~\n");
    assert_string_equal(v.groups, "");
    assert_string_equal(v.name, "");
    config_load(config, "groups: []\nname: 'null'\n");
    assert_string_equal(v.groups, "");
    assert_string_equal(v.name, "null");
    config_put(config, "data.limit", "auto");
    assert_true(isnan(v.limit));
    muonshard_config_destroy(config);
}

static void test_added_table_errors(void **state) {
    (void)state;
    program_values v;
    muonshard_param bad[2];
    static const struct {
        const char *name, *initial, *choices;
        muonshard_param_type type;
        const char *message;
    } cases[] = {
        {"lr", "x", NULL, MUONSHARD_PARAM_TEXT, "parameter 'lr' exists already"},
        {"first", "x", NULL, MUONSHARD_PARAM_TEXT, "parameter 'first' exists already"},
        {"b d", "x", NULL, MUONSHARD_PARAM_TEXT, "'b d' cannot be the name of a parameter"},
        {"a..b", "x", NULL, MUONSHARD_PARAM_TEXT, "'a..b' cannot be the name of a parameter"},
        {"", "x", NULL, MUONSHARD_PARAM_TEXT, "'' cannot be the name of a parameter"},
        {"n", "11", NULL, MUONSHARD_PARAM_INT,
         "default: n: found '11', expected an integer in [0, 10]"},
        {"x", "auto ", NULL, MUONSHARD_PARAM_REAL,
         "default: x: found 'auto ', expected a number in [0, 10]"},
        {"c", "z", "a|b", MUONSHARD_PARAM_CHOICE, "default: c: found 'z', expected one of a, b"},
        {"c", "a", NULL, MUONSHARD_PARAM_CHOICE,
         "parameter 'c' lacks its type, default, choices or doc"},
        {"t", NULL, NULL, MUONSHARD_PARAM_TEXT,
         "parameter 't' lacks its type, default, choices or doc"},
        {"l", "item", NULL, MUONSHARD_PARAM_LIST,
         "default: l: found 'item', expected a list of UTF-8 text, an item a line"},
    };
    muonshard_config *config = config_fresh();
    char *before = config_dump(config);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; ++i) {
        bad[0] = (muonshard_param){"first", MUONSHARD_PARAM_BOOL, 0, "true", 0, 0, NULL, "doc"};
        bad[1] = (muonshard_param){cases[i].name,    cases[i].type, 0, cases[i].initial, 0, 10,
                                   cases[i].choices, "doc"};
        memset(&v, 0x55, sizeof v);
        program_values same = v;
        assert_int_equal(muonshard_config_add_table(config, bad, 2, &v), MUONSHARD_ERR_ARGUMENT);
        assert_string_equal(muonshard_config_last_error(config), cases[i].message);
        assert_memory_equal(&v, &same, sizeof v);
        char *after = config_dump(config);
        assert_string_equal(after, before);
        free(after);
    }
    free(before);
    config_load(config, "");
    assert_int_equal(muonshard_config_add_table(config, program_table, PROGRAM_ROWS, &v),
                     MUONSHARD_ERR_STATE);
    muonshard_config_destroy(config);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_presets),           cmocka_unit_test(test_other_defaults),
        cmocka_unit_test(test_explicit_keys_win), cmocka_unit_test(test_later_goes_before_earlier),
        cmocka_unit_test(test_choice_order),      cmocka_unit_test(test_every_field),
        cmocka_unit_test(test_added_table),       cmocka_unit_test(test_added_table_errors),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
