/* What a config tells: get, dump, help, copy and hash. */
#include "config_fixture.h"

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
    muonshard_config *config = config_fresh_with_program(&v);
    assert_config_round_trip(config, &v);
    for (size_t i = 0; i < preset_count; ++i) {
        config_put(config, "preset", preset_table[i].name);
        assert_config_round_trip(config, &v);
    }
    for (size_t i = 0; i < sizeof texts / sizeof *texts; ++i) {
        config_put(config, "name", texts[i]);
        assert_string_equal(v.name, texts[i]);
        if (!strchr(texts[i], '\n'))
            config_put(config, "groups", texts[i]);
        assert_config_round_trip(config, &v);
    }
    config_load(config, "groups: ['', a b, {c: d}, 'null', '# x']\n");
    assert_config_round_trip(config, &v);
    config_put(config, "data.count", "-3");
    config_put(config, "data.count", "999999999999999");
    assert_config_round_trip(config, &v);
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
    muonshard_config *config = config_fresh_with_program(&v);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; ++i) {
        config_put(config, "data.rate", cases[i][0]);
        assert_config_value(config, "data.rate", cases[i][1]);
        assert_config_round_trip(config, &v);
    }
    config_put(config, "data.count", "+0012");
    assert_config_value(config, "data.count", "12");
    muonshard_config_destroy(config);
}

static void test_sizes(void **state) {
    (void)state;
    program_values v;
    muonshard_config *config = config_fresh_with_program(&v);
    char text[8] = "xxxxxxx";
    size_t length = 99;
    config_put(config, "name", "abcdef");
    assert_int_equal(muonshard_config_get(config, "name", text, 4, &length), MUONSHARD_OK);
    assert_string_equal(text, "abc");
    assert_int_equal(text[4], 'x');
    assert_int_equal(length, 6);
    assert_int_equal(muonshard_config_get(config, "name", NULL, 0, &length), MUONSHARD_OK);
    assert_int_equal(length, 6);
    assert_int_equal(muonshard_config_get(config, "name", text, 7, NULL), MUONSHARD_OK);
    assert_string_equal(text, "abcdef");
    assert_int_equal(muonshard_config_get(config, "name", NULL, 5, NULL), MUONSHARD_ERR_ARGUMENT);

    char *whole = config_dump(config);
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
    muonshard_config *config = config_fresh_with_program(&v);
    static const struct {
        muonshard_text_format format;
        const char *line, *adam, *groups;
    } cases[] = {
        {MUONSHARD_TEXT_PLAIN,
         "\nlr                       number   0.001          [0, 1e+06]\n    Learn",
         "\nadam.weight_decay        number   0.01           [0, 1e+06] or auto\n",
         "\ngroups                   list     role=matrix\n    Rules.\n"},
        {MUONSHARD_TEXT_MARKDOWN, "\n| `lr` | number | `0.001` | [0, 1e+06] | Learn",
         "\n| `adam.weight_decay` | number | `0.01` | [0, 1e+06] or auto |",
         "\n| `groups` | list | `role=matrix` |  | Rules. |\n"},
    };
    config_load(config, "lr: 0.25\npreset: jordan\n"); /* defaults are shown, not what is loaded */
    for (size_t i = 0; i < 2; ++i) {
        const size_t length = muonshard_config_help(config, cases[i].format, NULL, 0);
        char *text = malloc(length + 1);
        assert_non_null(text);
        assert_int_equal(muonshard_config_help(config, cases[i].format, text, length + 1), length);
        assert_int_equal(strlen(text), length);
        for (size_t k = 0; k < settings_table_count; ++k)
            assert_non_null(strstr(text, settings_table[k].name));
        for (size_t p = 0; p < preset_count; ++p)
            assert_non_null(strstr(text, preset_table[p].name));
        /* Of a preset only what differs from the defaults, and only the value in effect. */
        const char *moonlight = strstr(text, "moonlight");
        for (const char *next; (next = strstr(moonlight + 1, "moonlight"));)
            moonlight = next;
        const char *end = strstr(moonlight, "torch");
        const char *decay = strstr(moonlight, "weight_decay=");
        assert_true(end && (!decay || decay > end)); /* 0.1 is the default; 0 is another preset's */
        assert_true(strstr(moonlight, "adam.form=eps_inside") < end);
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
    muonshard_config *config = config_fresh_with_program(&v), *copy = NULL;
    config_load(config, "preset: nvidia\nlr: 0.5\ntrace: t.json\nname: x\n");
    error_text error;
    assert_int_equal(config_copy(config, &copy, &error), MUONSHARD_OK);
    assert_true(config_hash(copy) == config_hash(config));
    config_put(config, "name", "y"); /* the program's tables are not in the hash */
    assert_true(config_hash(copy) == config_hash(config));
    config_put(config, "lr", "0.25");
    assert_true(config_hash(copy) != config_hash(config));
    config_put(config, "lr", "0.50"); /* another text of the same value */
    assert_true(config_hash(copy) == config_hash(config));
    muonshard_config_destroy(config);
    assert_real(config_settings(copy)->lr, 0.5);
    assert_int_equal(config_settings(copy)->scale, SCALE_SPECTRAL);
    assert_string_equal(config_settings(copy)->trace, "t.json");
    assert_int_equal(muonshard_config_get(copy, "name", NULL, 0, NULL), MUONSHARD_ERR_CONFIG);
    muonshard_config_destroy(copy);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_dump_round_trip), cmocka_unit_test(test_numbers),
        cmocka_unit_test(test_sizes),           cmocka_unit_test(test_help),
        cmocka_unit_test(test_copy_and_hash),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
