#include "config_fixture.h"

const muonshard_param program_table[PROGRAM_ROWS] = {
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

const char *const valid_yaml =
    "# comment\npreset: moonlight\nlr: 2e-2\nadam: {lr: 0.001, beta2: 0.9}\nnesterov: false\n"
    "name: \"x y\"\nns_steps: 4\ngroups:\n  - {a: b, c: [d, e]}\n  - plain item\nscale: ratio\n";

muonshard_config *config_fresh(void) {
    muonshard_config *config = NULL;
    assert_int_equal(muonshard_config_create(&config), MUONSHARD_OK);
    return config;
}

char *config_dump(const muonshard_config *config) {
    const size_t length = muonshard_config_dump(config, NULL, 0);
    char *text = malloc(length + 1);
    assert_non_null(text);
    assert_int_equal(muonshard_config_dump(config, text, length + 1), length);
    assert_int_equal(strlen(text), length);
    return text;
}

void config_put(muonshard_config *config, const char *key, const char *value) {
    if (muonshard_config_set(config, key, value) != MUONSHARD_OK)
        fail_msg("%s", muonshard_config_last_error(config));
}

void config_load(muonshard_config *config, const char *yaml) {
    if (muonshard_config_load_string(config, yaml) != MUONSHARD_OK)
        fail_msg("%s", muonshard_config_last_error(config));
}

void assert_config_value(const muonshard_config *config, const char *key, const char *expected) {
    char text[256];
    size_t length = 0;
    assert_int_equal(muonshard_config_get(config, key, text, sizeof text, &length), MUONSHARD_OK);
    assert_string_equal(text, expected);
    assert_int_equal(length, strlen(expected));
}

void assert_real(double value, double expected) {
    if (isnan(expected) ? !isnan(value) : value != expected)
        fail_msg("%.17g is not %.17g", value, expected);
}

muonshard_config *config_fresh_with_program(program_values *values) {
    muonshard_config *config = config_fresh();
    assert_int_equal(muonshard_config_add_table(config, program_table, PROGRAM_ROWS, values),
                     MUONSHARD_OK);
    return config;
}

void assert_config_round_trip(const muonshard_config *config, const program_values *v) {
    program_values other;
    muonshard_config *copy = config_fresh_with_program(&other);
    char *text = config_dump(config);
    config_load(copy, text);
    char *again = config_dump(copy);
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
