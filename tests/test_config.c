/* The configuration: parser, presets, messages, dump, help, and the same config on all ranks.
 * Expected numbers and messages are written out here, not taken from the tables. */
#include <math.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "config.h" /* before cmocka, which has a macro `fail` */
#include <cmocka.h>

static muonshard_config *fresh(void) {
    muonshard_config *config = NULL;
    assert_int_equal(muonshard_config_create(&config), MUONSHARD_OK);
    return config;
}

/* Owned by the caller; length and termination are checked on the way. */
static char *dump(const muonshard_config *config) {
    const size_t length = muonshard_config_dump(config, NULL, 0);
    char *text = malloc(length + 1);
    assert_non_null(text);
    assert_int_equal(muonshard_config_dump(config, text, length + 1), length);
    assert_int_equal(strlen(text), length);
    return text;
}

static void set(muonshard_config *config, const char *key, const char *value) {
    if (muonshard_config_set(config, key, value) != MUONSHARD_OK)
        fail_msg("%s", muonshard_config_last_error(config));
}

static void load(muonshard_config *config, const char *yaml) {
    if (muonshard_config_load_string(config, yaml) != MUONSHARD_OK)
        fail_msg("%s", muonshard_config_last_error(config));
}

static void assert_value(const muonshard_config *config, const char *key, const char *expected) {
    char text[256];
    size_t length = 0;
    assert_int_equal(muonshard_config_get(config, key, text, sizeof text, &length), MUONSHARD_OK);
    assert_string_equal(text, expected);
    assert_int_equal(length, strlen(expected));
}

static void assert_real(double value, double expected) {
    if (isnan(expected) ? !isnan(value) : value != expected)
        fail_msg("%.17g is not %.17g", value, expected);
}

/* ---- presets */

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
    muonshard_config *config = fresh();
    assert_int_equal(algorithm_count, preset_count);
    assert_algorithm(config_settings(config), &algorithms[0]);
    /* Forth and back: nothing of the last preset stays. */
    for (size_t n = 0; n < 2 * algorithm_count; ++n) {
        const size_t i = n < algorithm_count ? n : 2 * algorithm_count - 1 - n;
        set(config, "preset", algorithms[i].preset);
        assert_int_equal(config_settings(config)->preset, i);
        assert_algorithm(config_settings(config), &algorithms[i]);
    }
    muonshard_config_destroy(config);
}

/* What no preset names. */
static void test_other_defaults(void **state) {
    (void)state;
    muonshard_config *config = fresh();
    for (size_t i = 0; i < preset_count; ++i) {
        const settings *s = config_settings(config);
        set(config, "preset", preset_table[i].name);
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
        muonshard_config *config = fresh();
        if (order < 2) {
            load(config, yaml[order]);
        } else {
            set(config, order == 2 ? "preset" : "lr", order == 2 ? "moonlight" : "0.5");
            set(config, order == 2 ? "lr" : "preset", order == 2 ? "0.5" : "moonlight");
            set(config, "adam.lr", "0.25");
        }
        const settings *s = config_settings(config);
        assert_real(s->lr, 0.5);
        assert_real(s->adam_lr, 0.25);
        assert_int_equal(s->scale, SCALE_RMS);
        set(config, "preset", "jordan"); /* another preset, the same explicit keys */
        assert_real(s->lr, 0.5);
        assert_real(s->adam_lr, 0.25);
        assert_int_equal(s->scale, SCALE_SHAPE);
        muonshard_config_destroy(config);
    }
}

static void test_later_goes_before_earlier(void **state) {
    (void)state;
    muonshard_config *config = fresh();
    load(config, "lr: 0.5\nmomentum: 0.9\n");
    load(config, "lr: 0.25\n");
    assert_real(config_settings(config)->lr, 0.25);
    assert_real(config_settings(config)->momentum, 0.9);
    set(config, "lr", "0.125");
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
    muonshard_config *config = fresh();
    for (size_t i = 0; i < sizeof cases / sizeof *cases; ++i) {
        set(config, cases[i].key, cases[i].word);
        const char *base = (const char *)config_settings(config);
        assert_int_equal(*(const int *)(base + cases[i].offset), cases[i].value);
        assert_value(config, cases[i].key, cases[i].word);
    }
    muonshard_config_destroy(config);
}

/* Every key reaches its own field: distinct values in, distinct values out. */
static void test_every_field(void **state) {
    (void)state;
    muonshard_config *config = fresh();
    load(config, "lr: 0.011\nweight_decay: 0.012\nmomentum: 0.013\nnorm_eps: 0.014\n"
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
    set(config, "adam.lr", "auto");
    assert_true(isnan(s->adam_lr));
    muonshard_config_destroy(config);
}

/* ---- a program's own table */

typedef struct program_values {
    int flag, mode;
    int64_t count;
    double rate, limit;
    const char *name, *groups;
} program_values;

static const muonshard_param program_table[] = {
    {"flag", MUONSHARD_PARAM_BOOL, offsetof(program_values, flag), "true", 0, 0, NULL, "A flag."},
    {"data.count", MUONSHARD_PARAM_INT, offsetof(program_values, count), "7", -10, 1e15, NULL,
     "How many | of them."},
    {"data.rate", MUONSHARD_PARAM_REAL, offsetof(program_values, rate), "0.5", -1, 1, NULL,
     "A rate."},
    {"data.limit", MUONSHARD_PARAM_REAL, offsetof(program_values, limit), "auto", 0, 10, NULL,
     "A limit."},
    {"name", MUONSHARD_PARAM_TEXT, offsetof(program_values, name), "no name", 0, 0, NULL,
     "A name."},
    {"groups", MUONSHARD_PARAM_LIST, offsetof(program_values, groups), "role=matrix\n", 0, 0, NULL,
     "Rules."},
    {"mode", MUONSHARD_PARAM_CHOICE, offsetof(program_values, mode), "slow", 0, 0, "fast|slow",
     "A mode."},
};
#define PROGRAM_ROWS (sizeof program_table / sizeof *program_table)

static muonshard_config *fresh_with_program(program_values *values) {
    muonshard_config *config = fresh();
    assert_int_equal(muonshard_config_add_table(config, program_table, PROGRAM_ROWS, values),
                     MUONSHARD_OK);
    return config;
}

static void test_added_table(void **state) {
    (void)state;
    program_values v;
    memset(&v, 0xff, sizeof v);
    muonshard_config *config = fresh_with_program(&v);
    assert_int_equal(v.flag, 1);
    assert_int_equal(v.count, 7);
    assert_real(v.rate, 0.5);
    assert_true(isnan(v.limit));
    assert_string_equal(v.name, "no name");
    assert_string_equal(v.groups, "role=matrix\n");
    assert_int_equal(v.mode, 1);

    load(config, "flag: false\n"
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

    set(config, "groups", "one item"); /* replaces */
    assert_string_equal(v.groups, "one item\n");
    assert_value(config, "groups", "one item\n");
    load(config, "groups: [a, '', b]\n");
    assert_string_equal(v.groups, "a\n\nb\n");
    load(config, "groups: scalar item\n");
    assert_string_equal(v.groups, "scalar item\n");
    load(config, "groups:\nname: ~\n");
    assert_string_equal(v.groups, "");
    assert_string_equal(v.name, "");
    load(config, "groups: []\nname: 'null'\n");
    assert_string_equal(v.groups, "");
    assert_string_equal(v.name, "null");
    set(config, "data.limit", "auto");
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
    muonshard_config *config = fresh();
    char *before = dump(config);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; ++i) {
        bad[0] = (muonshard_param){"first", MUONSHARD_PARAM_BOOL, 0, "true", 0, 0, NULL, "doc"};
        bad[1] = (muonshard_param){cases[i].name,    cases[i].type, 0, cases[i].initial, 0, 10,
                                   cases[i].choices, "doc"};
        memset(&v, 0x55, sizeof v);
        program_values same = v;
        assert_int_equal(muonshard_config_add_table(config, bad, 2, &v), MUONSHARD_ERR_ARGUMENT);
        assert_string_equal(muonshard_config_last_error(config), cases[i].message);
        assert_memory_equal(&v, &same, sizeof v);
        char *after = dump(config);
        assert_string_equal(after, before);
        free(after);
    }
    free(before);
    load(config, "");
    assert_int_equal(muonshard_config_add_table(config, program_table, PROGRAM_ROWS, &v),
                     MUONSHARD_ERR_STATE);
    muonshard_config_destroy(config);
}

/* ---- errors */

static const char *const valid_yaml =
    "# comment\npreset: moonlight\nlr: 2e-2\nadam: {lr: 0.001, beta2: 0.9}\nnesterov: false\n"
    "name: \"x y\"\nns_steps: 4\ngroups:\n  - {a: b, c: [d, e]}\n  - plain item\nscale: ratio\n";

/* A failed change leaves every value, in text and in the structs, as it was. */
static void assert_refused_set(muonshard_status expected_status, const char *key, const char *value,
                               const char *message) {
    program_values v;
    memset(&v, 0, sizeof v);
    muonshard_config *config = fresh_with_program(&v);
    load(config, valid_yaml);
    const settings settings_before = *config_settings(config);
    const program_values values_before = v;
    char *before = dump(config);
    const muonshard_status status = key ? muonshard_config_set(config, key, value)
                                        : muonshard_config_load_string(config, value);
    if (strcmp(muonshard_config_last_error(config), message) != 0)
        fail_msg("message is\n  %s\nnot\n  %s", muonshard_config_last_error(config), message);
    assert_int_equal(status, expected_status);
    char *after = dump(config);
    assert_string_equal(after, before);
    assert_memory_equal(config_settings(config), &settings_before, sizeof settings_before);
    assert_memory_equal(&v, &values_before, sizeof v);
    free(before);
    free(after);
    muonshard_config_destroy(config);
}

static void test_load_errors(void **state) {
    (void)state;
    static const char *const cases[][2] = {
        /* unknown */
        {"lr: 0.5\nmomentun: 0.9\n",
         "<string>:2: unknown key 'momentun'; did you mean 'momentum'?"},
        {"adam:\n  bta1: 0.9\n", "<string>:2: unknown key 'adam.bta1'; did you mean 'adam.beta1'?"},
        {"lr: {x: 1}\n", "<string>:1: unknown key 'lr.x'; did you mean 'lr'?"},
        {"momento: {}\n", "<string>:1: unknown key 'momento'; did you mean 'momentum'?"},
        {"adam: 5\n", "<string>:1: 'adam' is a group of keys, not a key; did you mean 'adam.lr'?"},
        {"<<: {lr: 1}\n", "<string>:1: unknown key '<<.lr'; did you mean 'lr'?"},
        /* repeated */
        {"lr: 0.5\n\nlr: 0.25\n", "<string>:3: repeated key 'lr'; line 1 has it already"},
        {"adam: {lr: 1}\nadam.lr: 2\n",
         "<string>:2: repeated key 'adam.lr'; line 1 has it already"},
        {"adam: {lr: 1}\nadam: {lr: 2}\n",
         "<string>:2: repeated key 'adam.lr'; line 1 has it already"},
        {"groups: [{a: 1, ab: 2, a: 3}]\n", "<string>:1: repeated key 'a'"},
        /* wrong type */
        {"\n\nlr: abc\n", "<string>:3: lr: found 'abc', expected a number in [0, 1e+06]"},
        {"lr: 1e-3x\n", "<string>:1: lr: found '1e-3x', expected a number in [0, 1e+06]"},
        {"lr: 0x10\n", "<string>:1: lr: found '0x10', expected a number in [0, 1e+06]"},
        {"lr: ' 1'\n", "<string>:1: lr: found ' 1', expected a number in [0, 1e+06]"},
        {"lr: nan\n", "<string>:1: lr: found 'nan', expected a number in [0, 1e+06]"},
        {"lr: inf\n", "<string>:1: lr: found 'inf', expected a number in [0, 1e+06]"},
        {"lr: 1e999\n", "<string>:1: lr: found '1e999', expected a number in [0, 1e+06]"},
        {"lr: auto\n", "<string>:1: lr: found 'auto', expected a number in [0, 1e+06]"},
        {"lr:\n", "<string>:1: lr: found '', expected a number in [0, 1e+06]"},
        {"lr: null\n", "<string>:1: lr: found 'null', expected a number in [0, 1e+06]"},
        {"lr: [1]\n", "<string>:1: lr: found a list, expected a number in [0, 1e+06]"},
        {"lr: {}\n", "<string>:1: lr: found a mapping, expected a number in [0, 1e+06]"},
        {"adam: {lr: Auto}\n",
         "<string>:1: adam.lr: found 'Auto', expected a number in [0, 1e+06] or auto"},
        {"ns_steps: 5.0\n", "<string>:1: ns_steps: found '5.0', expected an integer in [1, 32]"},
        {"ns_steps: 5k\n", "<string>:1: ns_steps: found '5k', expected an integer in [1, 32]"},
        {"nesterov: yes\n", "<string>:1: nesterov: found 'yes', expected one of true, false"},
        {"nesterov: on\n", "<string>:1: nesterov: found 'on', expected one of true, false"},
        {"nesterov: True\n", "<string>:1: nesterov: found 'True', expected one of true, false"},
        {"reduce: average\n",
         "<string>:1: reduce: found 'average', expected one of mean, sum, none"},
        {"reduce: mean|sum\n",
         "<string>:1: reduce: found 'mean|sum', expected one of mean, sum, none"},
        {"reduce: ''\n", "<string>:1: reduce: found '', expected one of mean, sum, none"},
        {"preset: torch\n", "<string>:1: preset: found 'torch', expected one of none, jordan, "
                            "moonlight, nvidia, grouped_fp16, fan_ratio"},
        {"name: [a]\n", "<string>:1: name: found a list, expected UTF-8 text"},
        {"groups: {}\n", "<string>:1: groups: found a mapping, expected a list of UTF-8 text, an "
                         "item a line"},
        /* out of range */
        {"lr: -1\n", "<string>:1: lr: found '-1', expected a number in [0, 1e+06]"},
        {"ns_steps: 0\n", "<string>:1: ns_steps: found '0', expected an integer in [1, 32]"},
        {"ns_steps: 33\n", "<string>:1: ns_steps: found '33', expected an integer in [1, 32]"},
        {"ns_steps: 99999999999999999999\n",
         "<string>:1: ns_steps: found '99999999999999999999', expected an integer in [1, 32]"},
        {"momentum: 1.5\n", "<string>:1: momentum: found '1.5', expected a number in [0, 1]"},
        {"timeout: 0\n", "<string>:1: timeout: found '0', expected a number in [0.001, 1e+06]"},
        /* a good key before and after a bad one */
        {"lr: 0.5\nns_steps: x\nmomentum: 0.5\n",
         "<string>:2: ns_steps: found 'x', expected an integer in [1, 32]"},
        /* YAML this has no use for */
        {"lr: &a 1\nmomentum: *a\n", "<string>:1: anchors (&name) are not supported"},
        {"lr: *a\n", "<string>:1: aliases (*name) are not supported"},
        {"lr: !!float 1\n", "<string>:1: tags (!name) are not supported"},
        {"lr: 1\n---\nlr: 2\n", "<string>:2: more than one document in a file"},
        {"- lr\n", "<string>:1: expected `key: value` lines"},
        {"lr\n", "<string>:1: expected `key: value` lines"},
        {"[lr]: 1\n", "<string>:1: a key must be a word"},
        {"'': 1\n", "<string>:1: an empty key"},
        {"name: \"a\\0b\"\n", "<string>:1: a value contains a NUL byte"},
        {"{a: {a: {a: {a: {a: {a: {a: {a: {a: {a: {a: {a: {a: {a: {a: {a: {a: 1}}}}}}}}}}}}}}}}}\n",
         "<string>:1: nested too deeply"},
        {"groups: [[a]]\n", "<string>:1: a list in a list"},
        {"groups: [\"a\\nb\"]\n", "<string>:1: an item of a list must be one line"},
        {"groups: \"a\\nb\"\n", "<string>:1: groups: found 'a\nb', expected a list of UTF-8 text, "
                                "an item a line"},
        {"groups:\n  - {}\n", "<string>:2: an empty mapping in a list"},
        {"groups:\n  - a: {b: c}\n",
         "<string>:2: nested too deeply: a mapping in a list holds words and lists of words"},
        {"groups:\n  - a: b c\n",
         "<string>:2: 'b c': no white space allowed in a mapping in a list"},
        {"groups:\n  - a b: c\n",
         "<string>:2: 'a b': no white space or '=' allowed in a mapping in a list"},
        {"groups:\n  - a=b: c\n",
         "<string>:2: 'a=b': no white space or '=' allowed in a mapping in a list"},
        {"groups:\n  - a: [b, 'c,d']\n",
         "<string>:2: 'c,d': no white space or comma allowed in a mapping in a list"},
        /* syntax */
        {"lr: 1\nadam: {lr: 1\n", "<string>:3: did not find expected ',' or '}' while parsing a "
                                  "flow mapping"},
        {"lr: 1\nname: \"open\n", "<string>:3: found unexpected end of stream while scanning a "
                                  "quoted scalar"},
        {"lr: @x\n", "<string>:1: found character that cannot start any token while scanning for "
                     "the next token"},
        {"lr: 1\nname: \xff\n", "<string>:2: invalid leading UTF-8 octet"},
        {"lr: 1\nname: \x01\n", "<string>:2: control characters are not allowed"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; ++i)
        assert_refused_set(MUONSHARD_ERR_CONFIG, NULL, cases[i][0], cases[i][1]);
}

static void test_set_errors(void **state) {
    (void)state;
    static const char *const cases[][3] = {
        {"momentun", "0.9", "'momentun=0.9': unknown key 'momentun'; did you mean 'momentum'?"},
        {"", "1", "'=1': unknown key ''; did you mean 'lr'?"},
        {"adam", "1", "'adam=1': 'adam' is a group of keys, not a key; did you mean 'adam.lr'?"},
        {"lr", "abc", "'lr=abc': lr: found 'abc', expected a number in [0, 1e+06]"},
        {"lr", "", "'lr=': lr: found '', expected a number in [0, 1e+06]"},
        {"nesterov", "1", "'nesterov=1': nesterov: found '1', expected one of true, false"},
        {"name", "\xc3", "'name=\xc3': name: found '\xc3', expected UTF-8 text"},
        {"name", "\xed\xa0\x80",
         "'name=\xed\xa0\x80': name: found '\xed\xa0\x80', expected UTF-8 text"},
        {"groups", "a\nb",
         "'groups=a\nb': groups: found 'a\nb', expected a list of UTF-8 text, an item a line"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; ++i)
        assert_refused_set(MUONSHARD_ERR_CONFIG, cases[i][0], cases[i][1], cases[i][2]);

    char key[2000];
    memset(key, 'k', sizeof key - 1);
    key[sizeof key - 1] = '\0';
    muonshard_config *config = fresh();
    assert_int_equal(muonshard_config_set(config, key, "1"), MUONSHARD_ERR_CONFIG);
    assert_non_null(strstr(muonshard_config_last_error(config), "unknown key 'kkk"));
    assert_int_equal(muonshard_config_set(config, NULL, "1"), MUONSHARD_ERR_ARGUMENT);
    assert_int_equal(muonshard_config_set(config, "lr", NULL), MUONSHARD_ERR_ARGUMENT);
    assert_int_equal(muonshard_config_set(NULL, "lr", "1"), MUONSHARD_ERR_ARGUMENT);
    assert_int_equal(muonshard_config_get(config, "lrr", NULL, 0, NULL), MUONSHARD_ERR_CONFIG);
    assert_string_equal(muonshard_config_last_error(config),
                        "'lrr': unknown key 'lrr'; did you mean 'lr'?");
    muonshard_config_destroy(config);
}

/* Writes `length` bytes to a new file and loads it. `message` has one %s for the path. */
static void check_file(const char *bytes, size_t length, muonshard_status expected,
                       const char *message) {
    char path[] = "/tmp/muonshard_config_XXXXXX", text[256];
    const int fd = mkstemp(path);
    assert_true(fd >= 0);
    assert_int_equal(write(fd, bytes, length), length);
    close(fd);
    muonshard_config *config = fresh();
    char *before = dump(config);
    const muonshard_status status = muonshard_config_load_file(config, path);
    unlink(path);
    assert_int_equal(status, expected);
    if (message) {
        const char *gap = strstr(message, "%s");
        snprintf(text, sizeof text, "%.*s%s%s", (int)(gap - message), message, path, gap + 2);
        assert_string_equal(muonshard_config_last_error(config), text);
        char *after = dump(config);
        assert_string_equal(after, before);
        free(after);
    }
    free(before);
    muonshard_config_destroy(config);
}

static void test_files(void **state) {
    (void)state;
    check_file("", 0, MUONSHARD_OK, NULL);
    check_file("---\n", 4, MUONSHARD_OK, NULL);
    check_file("# nothing\n", 10, MUONSHARD_OK, NULL);
    check_file("\xef\xbb\xbflr: 1\n", 9, MUONSHARD_OK, NULL);
    check_file("lr: 1\r\nmomentum: 0.5\r\n", 22, MUONSHARD_OK, NULL);
    check_file("a: 1\nmomentun: 2\n", 17, MUONSHARD_ERR_CONFIG,
               "%s:1: unknown key 'a'; did you mean 'lr'?");
    check_file("lr: 1\n\0", 7, MUONSHARD_ERR_CONFIG, "%s:2: a NUL byte in the text");

    const size_t large = (1u << 20) + 1;
    char *text = malloc(large);
    assert_non_null(text);
    memset(text, '#', large);
    check_file(text, large - 1, MUONSHARD_OK, NULL);
    check_file(text, large, MUONSHARD_ERR_CONFIG, "%s: larger than 1048576 bytes");
    free(text);

    muonshard_config *config = fresh();
    assert_int_equal(muonshard_config_load_file(config, "/nowhere/train.yaml"), MUONSHARD_ERR_IO);
    assert_string_equal(muonshard_config_last_error(config),
                        "cannot read '/nowhere/train.yaml': No such file or directory");
    assert_int_equal(muonshard_config_load_file(config, "/tmp"), MUONSHARD_ERR_IO);
    assert_string_equal(muonshard_config_last_error(config), "cannot read '/tmp': Is a directory");
    assert_int_equal(muonshard_config_load_file(config, NULL), MUONSHARD_ERR_ARGUMENT);
    muonshard_config_destroy(config);
}

/* ---- dump, get, help */

static void assert_round_trip(const muonshard_config *config, program_values *v) {
    program_values other;
    muonshard_config *copy = fresh_with_program(&other);
    char *text = dump(config);
    load(copy, text);
    char *again = dump(copy);
    assert_string_equal(again, text);
    assert_string_equal(other.name, v->name);
    assert_string_equal(other.groups, v->groups);
    assert_real(other.rate, v->rate);
    assert_int_equal(other.count, v->count);
    assert_real(config_settings(copy)->lr, config_settings(config)->lr);
    assert_true(config_hash(copy) == config_hash(config));
    free(text);
    free(again);
    muonshard_config_destroy(copy);
}

static void test_dump_round_trip(void **state) {
    (void)state;
    static const char *const texts[] = {
        "",
        "null",
        "~",
        "true",
        "- a",
        "a: b",
        "#x",
        "'",
        "\"\\",
        " lead",
        "trail ",
        "tab\there",
        "two\nlines",
        "{a}",
        "[x",
        "*a",
        "&a",
        "!t",
        "%r.json",
        "a,b",
        "\xc3\xa4",
        "---",
        "...",
        "0.5",
        "\xe2\x80\xa8u",
        "\x7f",
        "\xc2\x85",
        "\x01\x1f",
        "a #b",
        "\r\n",
        "@x",
        "`x",
        "?",
        "? a",
        "|",
        "a: ",
        "/tmp/x-1.y",
        "key=value",
        "\xef\xbb\xbfx",
        "\xef\xbf\xbf",
        "\xf0\x9f\x99\x82",
    };
    program_values v;
    muonshard_config *config = fresh_with_program(&v);
    assert_round_trip(config, &v);
    for (size_t i = 0; i < preset_count; ++i) {
        set(config, "preset", preset_table[i].name);
        assert_round_trip(config, &v);
    }
    for (size_t i = 0; i < sizeof texts / sizeof *texts; ++i) {
        set(config, "name", texts[i]);
        assert_string_equal(v.name, texts[i]);
        if (!strchr(texts[i], '\n'))
            set(config, "groups", texts[i]);
        assert_round_trip(config, &v);
    }
    load(config, "groups: ['', a b, {c: d}, 'null', '# x']\n");
    assert_round_trip(config, &v);
    set(config, "data.count", "-3");
    set(config, "data.count", "999999999999999");
    assert_round_trip(config, &v);
    muonshard_config_destroy(config);
}

static void test_numbers(void **state) {
    (void)state;
    static const char *const cases[][2] = {
        {"0.1", "0.1"},
        {"1e-3", "0.001"},
        {"+.5", "0.5"},
        {"0.30000000000000004", "0.30000000000000004"},
        {"0.1234567", "0.1234567"},
        {"3.3333333333333331e-1", "0.3333333333333333"},
        {"5e-324", "4.94066e-324"},
        {"-0.25", "-0.25"},
    };
    program_values v;
    muonshard_config *config = fresh_with_program(&v);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; ++i) {
        set(config, "data.rate", cases[i][0]);
        assert_value(config, "data.rate", cases[i][1]);
        assert_round_trip(config, &v);
    }
    set(config, "data.count", "+0012");
    assert_value(config, "data.count", "12");
    muonshard_config_destroy(config);
}

static void test_sizes(void **state) {
    (void)state;
    program_values v;
    muonshard_config *config = fresh_with_program(&v);
    char text[8] = "xxxxxxx";
    size_t length = 99;
    set(config, "name", "abcdef");
    assert_int_equal(muonshard_config_get(config, "name", text, 4, &length), MUONSHARD_OK);
    assert_string_equal(text, "abc");
    assert_int_equal(text[4], 'x');
    assert_int_equal(length, 6);
    assert_int_equal(muonshard_config_get(config, "name", NULL, 0, &length), MUONSHARD_OK);
    assert_int_equal(length, 6);
    assert_int_equal(muonshard_config_get(config, "name", text, 7, NULL), MUONSHARD_OK);
    assert_string_equal(text, "abcdef");
    assert_int_equal(muonshard_config_get(config, "name", NULL, 5, NULL), MUONSHARD_ERR_ARGUMENT);

    char *whole = dump(config);
    for (size_t size = 0; size <= strlen(whole) + 2; ++size) {
        char *part = malloc(size + 1);
        assert_non_null(part);
        part[size] = 'x';
        assert_int_equal(muonshard_config_dump(config, part, size), strlen(whole));
        assert_int_equal(part[size], 'x');
        if (size > 0) {
            const size_t kept = size - 1 < strlen(whole) ? size - 1 : strlen(whole);
            assert_memory_equal(part, whole, kept);
            assert_int_equal(part[kept], '\0');
        }
        free(part);
    }
    free(whole);
    assert_int_equal(muonshard_config_dump(NULL, text, sizeof text), 0);
    muonshard_config_destroy(config);
}

static void test_help(void **state) {
    (void)state;
    program_values v;
    muonshard_config *config = fresh_with_program(&v);
    static const struct {
        muonshard_text_format format;
        const char *line, *adam, *groups;
    } cases[] = {
        {MUONSHARD_TEXT_PLAIN,
         "\nlr                  number   0.001          [0, 1e+06]\n    Learn",
         "\nadam.weight_decay   number   0.01           [0, 1e+06] or auto\n",
         "\ngroups              list     role=matrix\n    Rules.\n"},
        {MUONSHARD_TEXT_MARKDOWN, "\n| `lr` | number | `0.001` | [0, 1e+06] | Learn",
         "\n| `adam.weight_decay` | number | `0.01` | [0, 1e+06] or auto |",
         "\n| `groups` | list | `role=matrix` |  | Rules. |\n"},
    };
    load(config, "lr: 0.25\npreset: jordan\n"); /* defaults are shown, not what is loaded */
    for (size_t i = 0; i < 2; ++i) {
        const size_t length = muonshard_config_help(config, cases[i].format, NULL, 0);
        char *text = malloc(length + 1);
        assert_non_null(text);
        assert_int_equal(muonshard_config_help(config, cases[i].format, text, length + 1), length);
        assert_int_equal(strlen(text), length);
        for (size_t k = 0; k < settings_table_count; ++k)
            assert_non_null(strstr(text, settings_table[k].name));
        for (size_t p = 0; p < algorithm_count; ++p)
            assert_non_null(strstr(text, algorithms[p].preset));
        assert_non_null(strstr(text, cases[i].line));
        assert_non_null(strstr(text, cases[i].adam));
        assert_non_null(strstr(text, cases[i].groups));
        assert_non_null(strstr(text, "adam.eps=1e-10"));
        char small[40];
        assert_int_equal(muonshard_config_help(config, cases[i].format, small, sizeof small),
                         length);
        assert_int_equal(strlen(small), sizeof small - 1);
        if (cases[i].format == MUONSHARD_TEXT_MARKDOWN)
            assert_non_null(strstr(text, "How many \\| of them."));
        free(text);
    }
    muonshard_config_destroy(config);
}

static void test_copy_and_hash(void **state) {
    (void)state;
    program_values v;
    muonshard_config *config = fresh_with_program(&v), *copy = NULL;
    load(config, "preset: nvidia\nlr: 0.5\ntrace: t.json\nname: x\n");
    error_text error;
    assert_int_equal(config_copy(config, &copy, &error), MUONSHARD_OK);
    assert_true(config_hash(copy) == config_hash(config));
    set(config, "name", "y"); /* the program's tables are not in the hash */
    assert_true(config_hash(copy) == config_hash(config));
    set(config, "lr", "0.25");
    assert_true(config_hash(copy) != config_hash(config));
    set(config, "lr", "0.50"); /* another text of the same value */
    assert_true(config_hash(copy) == config_hash(config));
    muonshard_config_destroy(config);
    assert_real(config_settings(copy)->lr, 0.5);
    assert_int_equal(config_settings(copy)->scale, SCALE_SPECTRAL);
    assert_string_equal(config_settings(copy)->trace, "t.json");
    assert_int_equal(muonshard_config_get(copy, "name", NULL, 0, NULL), MUONSHARD_ERR_CONFIG);
    muonshard_config_destroy(copy);
}

/* ---- mutations of a valid file */

static uint32_t next_random(uint32_t *state) {
    *state ^= *state << 13;
    *state ^= *state >> 17;
    *state ^= *state << 5;
    return *state;
}

static void test_fuzz(void **state) {
    (void)state;
    static const char bytes[] = "{}[]:,-\"'\n\t #&*!|>%@`?~0.1eE+aZ_\\\xff\xc3\x80";
    uint32_t random = 12345;
    int refused = 0, accepted = 0;
    program_values v;
    muonshard_config *config = fresh_with_program(&v);
    load(config, valid_yaml);
    char *before = dump(config);
    for (int n = 0; n < 5000; ++n) {
        char text[512];
        size_t length = strlen(valid_yaml);
        memcpy(text, valid_yaml, length + 1);
        for (uint32_t edits = 1 + next_random(&random) % 4; edits > 0; --edits) {
            const size_t at = next_random(&random) % length;
            const char byte = bytes[next_random(&random) % (sizeof bytes - 1)];
            switch (next_random(&random) % 4) {
            case 0: text[at] = byte; break;
            case 1:
                if (length > 1)
                    memmove(text + at, text + at + 1, length-- - at);
                break;
            case 2:
                memmove(text + at + 1, text + at, ++length - at);
                text[at] = byte;
                break;
            case 3: text[length = at + 1] = '\0'; break;
            }
        }
        if (muonshard_config_load_string(config, text) == MUONSHARD_OK) {
            ++accepted;
            assert_round_trip(config, &v);
            free(before);
            before = dump(config);
        } else {
            ++refused;
            assert_true(strlen(muonshard_config_last_error(config)) > 10);
            char *after = dump(config);
            assert_string_equal(after, before);
            free(after);
        }
    }
    free(before);
    assert_true(refused > 500 && accepted > 500); /* both sides are exercised */
    muonshard_config_destroy(config);
}

/* ---- ranks: threads of this process over a communicator of callbacks */

#define RANKS 3

typedef struct shared_board {
    pthread_barrier_t barrier;
    char slots[RANKS][1 << 20];
} shared_board;

typedef struct rank_state {
    shared_board *board;
    int rank;
    int scenario;
    muonshard_status status;
    program_values values;
    muonshard_config *config;
    char error[1024];
} rank_state;

static int board_barrier(void *user) {
    rank_state *r = user;
    pthread_barrier_wait(&r->board->barrier);
    return 0;
}

static int board_allgather(void *user, const void *send, void *recv, size_t bytes) {
    rank_state *r = user;
    if (bytes > sizeof r->board->slots[0])
        return 1;
    memcpy(r->board->slots[r->rank], send, bytes);
    board_barrier(user);
    for (int i = 0; i < RANKS; ++i)
        memcpy((char *)recv + (size_t)i * bytes, r->board->slots[i], bytes);
    return board_barrier(user);
}

enum { BROADCAST, OTHER_TABLES, OTHER_DEFAULTS, CHECK_EQUAL, CHECK_DIFFERENT };

static void *run_rank(void *argument) {
    rank_state *r = argument;
    static const muonshard_param other_default[] = {{"flag", MUONSHARD_PARAM_BOOL,
                                                     offsetof(program_values, flag), "false", 0, 0,
                                                     NULL, "A flag."}};
    muonshard_comm_callbacks calls = MUONSHARD_COMM_CALLBACKS_INIT;
    calls.rank = r->rank;
    calls.world_size = RANKS;
    calls.user = r;
    calls.allgather = board_allgather;
    calls.barrier = board_barrier;
    muonshard_comm *comm = NULL;
    r->status = muonshard_comm_create_callbacks(&calls, NULL, &comm);
    if (r->status == MUONSHARD_OK)
        r->status = muonshard_config_create(&r->config);
    if (r->status != MUONSHARD_OK)
        abort(); /* the others would wait for ever */
    error_text error = {{0}};
    const bool third = r->rank == 2;
    const bool shorter = r->scenario == OTHER_DEFAULTS || (r->scenario == OTHER_TABLES && third);
    muonshard_config_add_table(
        r->config, r->scenario == OTHER_DEFAULTS && third ? other_default : program_table,
        shorter ? 1 : PROGRAM_ROWS, &r->values);
    if (r->scenario <= OTHER_DEFAULTS) {
        /* The others' own values go. */
        muonshard_config_load_string(r->config, r->rank == 0 && r->scenario == BROADCAST
                                                    ? valid_yaml
                                                    : "momentum: 0.5\nlr: 0.125\n");
        r->status = muonshard_config_broadcast(r->config, comm);
        snprintf(r->error, sizeof r->error, "%s", muonshard_config_last_error(r->config));
    } else {
        muonshard_config_set(r->config, "lr",
                             r->scenario == CHECK_DIFFERENT && r->rank > 0 ? "0.02" : "1e-2");
        muonshard_config_set(r->config, "name", third ? "a" : "b"); /* not the library's */
        r->status = config_check_equal(r->config, comm, &error);
        snprintf(r->error, sizeof r->error, "%s", error.text);
    }
    muonshard_comm_destroy(comm);
    return NULL;
}

static void run_ranks(int scenario, rank_state ranks[RANKS]) {
    shared_board *board = calloc(1, sizeof *board);
    pthread_t threads[RANKS];
    assert_non_null(board);
    assert_int_equal(pthread_barrier_init(&board->barrier, NULL, RANKS), 0);
    for (int i = 0; i < RANKS; ++i) {
        ranks[i] = (rank_state){.board = board, .rank = i, .scenario = scenario};
        assert_int_equal(pthread_create(&threads[i], NULL, run_rank, &ranks[i]), 0);
    }
    for (int i = 0; i < RANKS; ++i)
        pthread_join(threads[i], NULL);
    pthread_barrier_destroy(&board->barrier);
    free(board);
}

static void destroy_configs(rank_state ranks[RANKS]) {
    for (int i = 0; i < RANKS; ++i)
        muonshard_config_destroy(ranks[i].config);
}

static void test_broadcast(void **state) {
    (void)state;
    rank_state ranks[RANKS];
    run_ranks(BROADCAST, ranks);
    char *expected = dump(ranks[0].config);
    assert_non_null(strstr(expected, "preset: moonlight\nlr: 0.02\n"));
    for (int i = 0; i < RANKS; ++i) {
        assert_int_equal(ranks[i].status, MUONSHARD_OK);
        char *text = dump(ranks[i].config);
        assert_string_equal(text, expected);
        free(text);
        assert_string_equal(ranks[i].values.groups, "a=b c=d,e\nplain item\n");
        assert_real(config_settings(ranks[i].config)->momentum, 0.95);
        set(ranks[i].config, "preset", "jordan"); /* lr was explicit on rank 0, momentum wasn't */
        assert_real(config_settings(ranks[i].config)->lr, 0.02);
        assert_int_equal(config_settings(ranks[i].config)->momentum_form, MOMENTUM_EMA);
    }
    free(expected);
    destroy_configs(ranks);
}

static void test_broadcast_mismatch(void **state) {
    (void)state;
    rank_state ranks[RANKS];
    for (int scenario = OTHER_TABLES; scenario <= OTHER_DEFAULTS; ++scenario) {
        run_ranks(scenario, ranks);
        for (int i = 0; i < RANKS; ++i) {
            assert_int_equal(ranks[i].status, MUONSHARD_ERR_MISMATCH);
            assert_string_equal(ranks[i].error,
                                scenario == OTHER_TABLES
                                    ? "rank 2's tables of parameters differ from rank 0's"
                                    : "rank 2's values after the broadcast differ from rank 0's");
            assert_real(config_settings(ranks[i].config)->lr, 0.125);
        }
        destroy_configs(ranks);
    }
}

static void test_check_equal(void **state) {
    (void)state;
    rank_state ranks[RANKS];
    run_ranks(CHECK_EQUAL, ranks);
    for (int i = 0; i < RANKS; ++i)
        assert_int_equal(ranks[i].status, MUONSHARD_OK);
    destroy_configs(ranks);
    run_ranks(CHECK_DIFFERENT, ranks);
    for (int i = 0; i < RANKS; ++i) {
        assert_int_equal(ranks[i].status, MUONSHARD_ERR_MISMATCH);
        assert_string_equal(ranks[i].error,
                            "rank 1's config differs from rank 0's: lr is 0.02, rank 0 has 0.01");
    }
    destroy_configs(ranks);
}

static void test_broadcast_to_self(void **state) {
    (void)state;
    program_values v;
    muonshard_config *config = fresh_with_program(&v);
    muonshard_comm *comm = NULL;
    error_text error;
    assert_int_equal(muonshard_comm_create_self(NULL, &comm), MUONSHARD_OK);
    load(config, valid_yaml);
    char *before = dump(config);
    assert_int_equal(muonshard_config_broadcast(config, comm), MUONSHARD_OK);
    char *after = dump(config);
    assert_string_equal(after, before);
    assert_int_equal(config_check_equal(config, comm, &error), MUONSHARD_OK);
    assert_int_equal(muonshard_config_broadcast(NULL, comm), MUONSHARD_ERR_ARGUMENT);
    assert_int_equal(muonshard_config_broadcast(config, NULL), MUONSHARD_ERR_ARGUMENT);
    free(before);
    free(after);
    muonshard_comm_destroy(comm);
    muonshard_config_destroy(config);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_presets),
        cmocka_unit_test(test_other_defaults),
        cmocka_unit_test(test_explicit_keys_win),
        cmocka_unit_test(test_later_goes_before_earlier),
        cmocka_unit_test(test_choice_order),
        cmocka_unit_test(test_every_field),
        cmocka_unit_test(test_added_table),
        cmocka_unit_test(test_added_table_errors),
        cmocka_unit_test(test_load_errors),
        cmocka_unit_test(test_set_errors),
        cmocka_unit_test(test_files),
        cmocka_unit_test(test_dump_round_trip),
        cmocka_unit_test(test_numbers),
        cmocka_unit_test(test_sizes),
        cmocka_unit_test(test_help),
        cmocka_unit_test(test_copy_and_hash),
        cmocka_unit_test(test_fuzz),
        cmocka_unit_test(test_broadcast),
        cmocka_unit_test(test_broadcast_mismatch),
        cmocka_unit_test(test_check_equal),
        cmocka_unit_test(test_broadcast_to_self),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
