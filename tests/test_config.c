/* The settings, their presets, and a program's own table. Expected numbers are written out here,
 * not taken from the tables. */
#include "config_fixture.h"

/* ---- presets ---- */

typedef struct algorithm {
    const char *preset;
    double lr, weight_decay, momentum;
    int momentum_form, nesterov;
    int norm;
    double norm_eps;
    int coefficients;
    int scale, scale_dims;
    double adam_lr, adam_weight_decay, beta2, adam_eps; /* NaN: as the matrices' */
    int adam_form;
} algorithm;

#define AUTO (double)NAN

static const algorithm algorithms[] = {
    {"none", 1e-3, .1, .95, MOMENTUM_EMA, 1, NS_NORM_FROBENIUS_MAX, 1e-7, COEFFICIENTS_SIMPLE,
     SCALE_SHAPE, SCALE_DIMS_FLATTENED, AUTO, .01, .999, 1e-8, ADAM_EPS_OUTSIDE},
    {"jordan", .02, 0, .95, MOMENTUM_EMA, 1, NS_NORM_FROBENIUS_ADD, 1e-7, COEFFICIENTS_SIMPLE,
     SCALE_SHAPE, SCALE_DIMS_LAST_TWO, 3e-4, 0, .95, 1e-10, ADAM_EPS_OUTSIDE},
    {"moonlight", 1e-3, .1, .95, MOMENTUM_HEAVY_BALL, 1, NS_NORM_FROBENIUS_ADD, 1e-7,
     COEFFICIENTS_SIMPLE, SCALE_RMS, SCALE_DIMS_FIRST_TWO, AUTO, AUTO, .95, 1e-8, ADAM_EPS_INSIDE},
    {"nvidia", 3e-4, .01, .95, MOMENTUM_EMA, 0, NS_NORM_FROBENIUS_MAX, 1e-7, COEFFICIENTS_QUINTIC,
     SCALE_SPECTRAL, SCALE_DIMS_FLATTENED, 3e-4, .01, .95, 1e-8, ADAM_EPS_OUTSIDE},
    {"grouped_fp16", 3e-4, .01, .95, MOMENTUM_HEAVY_BALL, 1, NS_NORM_FROBENIUS_ADD, 1e-7,
     COEFFICIENTS_SIMPLE, SCALE_RMS, SCALE_DIMS_FLATTENED, AUTO, AUTO, .95, 1e-8, ADAM_EPS_OUTSIDE},
    {"fan_ratio", .02, 0, .95, MOMENTUM_HEAVY_BALL_SWAPPED, 1, NS_NORM_FROBENIUS_ADD, 1e-7,
     COEFFICIENTS_SIMPLE, SCALE_FAN_RATIO, SCALE_DIMS_FIRST_LAST, 3e-4, .01, .95, 1e-8,
     ADAM_EPS_OUTSIDE},
};
static const size_t algorithm_count = sizeof algorithms / sizeof *algorithms;

static void assert_algorithm(const settings *s, const algorithm *a) {
    assert_real(s->lr, a->lr);
    assert_real(s->weight_decay, a->weight_decay);
    assert_int_equal(s->decay, DECAY_DECOUPLED);
    assert_real(s->momentum, a->momentum);
    assert_int_equal(s->momentum_form, a->momentum_form);
    assert_int_equal(s->nesterov, a->nesterov);
    assert_int_equal(s->norm, a->norm);
    assert_real(s->norm_eps, a->norm_eps);
    assert_int_equal(s->coefficients, a->coefficients);
    assert_real(s->coefficient_safety, 1);
    assert_int_equal(s->ns_steps, 5);
    assert_int_equal(s->ns_dtype, NS_DTYPE_FP32);
    assert_int_equal(s->ns_form, NS_FORM_STANDARD);
    assert_int_equal(s->scale, a->scale);
    assert_int_equal(s->scale_dims, a->scale_dims);
    assert_real(s->extra_scale, 1);
    assert_real(s->adam_lr, a->adam_lr);
    assert_real(s->adam_lr_scale, 1);
    assert_real(s->adam_weight_decay, a->adam_weight_decay);
    assert_real(s->adam_beta1, .9);
    assert_real(s->adam_beta2, a->beta2);
    assert_real(s->adam_eps, a->adam_eps);
    assert_int_equal(s->adam_form, a->adam_form);
}

static void test_presets(void **state) {
    (void)state;
    muonshard_config *config = config_fresh();
    assert_int_equal(algorithm_count, preset_count);
    assert_algorithm(config_settings(config), &algorithms[0]);
    /* Forth and back: nothing of the last preset stays. */
    for (size_t n = 0; n < 2 * algorithm_count; ++n) {
        const size_t i = n < algorithm_count ? n : 2 * algorithm_count - 1 - n;
        config_put(config, "preset", algorithms[i].preset);
        assert_int_equal(config_settings(config)->preset, i);
        assert_algorithm(config_settings(config), &algorithms[i]);
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
        assert_int_equal(s->gather, GATHER_UPDATES);
        assert_int_equal(s->ownership, OWNERSHIP_ROUND_ROBIN);
        assert_int_equal(s->check_replicas, 0);
        assert_int_equal(s->backend, BACKEND_AUTO);
        assert_int_equal(s->bucket_bytes, 25 * 1024 * 1024);
        assert_int_equal(s->batch_bytes, 32 * 1024 * 1024);
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
        WORD("decay", decay, "decoupled", DECAY_DECOUPLED),
        WORD("nesterov", nesterov, "true", 1),
        WORD("nesterov", nesterov, "false", 0),
        WORD("norm", norm, "frobenius_add", NS_NORM_FROBENIUS_ADD),
        WORD("norm", norm, "frobenius_max", NS_NORM_FROBENIUS_MAX),
        WORD("coefficients", coefficients, "simple", COEFFICIENTS_SIMPLE),
        WORD("coefficients", coefficients, "quintic", COEFFICIENTS_QUINTIC),
        WORD("ns_dtype", ns_dtype, "fp32", NS_DTYPE_FP32),
        WORD("ns_form", ns_form, "standard", NS_FORM_STANDARD),
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
        WORD("adam.form", adam_form, "eps_outside", ADAM_EPS_OUTSIDE),
        WORD("adam.form", adam_form, "eps_inside", ADAM_EPS_INSIDE),
        WORD("reduce", reduce, "mean", REDUCE_MEAN),
        WORD("reduce", reduce, "sum", REDUCE_SUM),
        WORD("reduce", reduce, "none", REDUCE_NONE),
        WORD("gather", gather, "updates", GATHER_UPDATES),
        WORD("ownership", ownership, "round_robin", OWNERSHIP_ROUND_ROBIN),
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
                "timeout: 28\nfirst_timeout: 29\ntrace: t-%r.json\n");
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
