/* What is refused, with which message, and that it changes nothing. */
#include "config_fixture.h"

#include <unistd.h>

/* A failed change leaves every value, in text and in the structs, as it was. */
static void assert_refused_set(muonshard_status expected_status, const char *key, const char *value,
                               const char *message) {
    program_values v;
    memset(&v, 0, sizeof v);
    muonshard_config *config = config_fresh_with_program(&v);
    config_load(config, valid_yaml);
    const settings settings_before = *config_settings(config);
    const program_values values_before = v;
    char *before = config_dump(config);
    const muonshard_status status = key ? muonshard_config_set(config, key, value)
                                        : muonshard_config_load_string(config, value);
    if (strcmp(muonshard_config_last_error(config), message) != 0)
        fail_msg("message is\n  %s\nnot\n  %s", muonshard_config_last_error(config), message);
    assert_int_equal(status, expected_status);
    char *after = config_dump(config);
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
        {"preset: muon\n", "<string>:1: preset: found 'muon', expected one of none, jordan, "
                           "moonlight, torch, nvidia, grouped_fp16, fan_ratio, dion_repo, gram, "
                           "speedrun, optax"},
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
        {"groups: \"a\\nb\"\n", "<string>:1: groups: found 'a?b', expected a list of UTF-8 text, "
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
         "'groups=a?b': groups: found 'a?b', expected a list of UTF-8 text, an item a line"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; ++i)
        assert_refused_set(MUONSHARD_ERR_CONFIG, cases[i][0], cases[i][1], cases[i][2]);

    char key[2000];
    memset(key, 'k', sizeof key - 1);
    key[sizeof key - 1] = '\0';
    muonshard_config *config = config_fresh();
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
    muonshard_config *config = config_fresh();
    char *before = config_dump(config);
    const muonshard_status status = muonshard_config_load_file(config, path);
    unlink(path);
    assert_int_equal(status, expected);
    if (message) {
        const char *gap = strstr(message, "%s");
        snprintf(text, sizeof text, "%.*s%s%s", (int)(gap - message), message, path, gap + 2);
        assert_string_equal(muonshard_config_last_error(config), text);
        char *after = config_dump(config);
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

    /* Each key of it is compared with those before: a megabyte of them took a minute. */
    size_t length = 0;
    length += (size_t)sprintf(text, "groups:\n  - {");
    for (int i = 0; i < 65; i++)
        length += (size_t)sprintf(text + length, "a%d: 1, ", i);
    length += (size_t)sprintf(text + length, "}\n");
    check_file(text, length, MUONSHARD_ERR_CONFIG, "%s:2: a mapping in a list has too many keys");
    free(text);

    muonshard_config *config = config_fresh();
    assert_int_equal(muonshard_config_load_file(config, "/nowhere/train.yaml"), MUONSHARD_ERR_IO);
    assert_string_equal(muonshard_config_last_error(config),
                        "cannot read '/nowhere/train.yaml': No such file or directory");
    assert_int_equal(muonshard_config_load_file(config, "/tmp"), MUONSHARD_ERR_IO);
    assert_string_equal(muonshard_config_last_error(config), "cannot read '/tmp': Is a directory");
    assert_int_equal(muonshard_config_load_file(config, NULL), MUONSHARD_ERR_ARGUMENT);
    muonshard_config_destroy(config);
}

/* ---- mutations of a valid file ---- */

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
    muonshard_config *config = config_fresh_with_program(&v);
    config_load(config, valid_yaml);
    char *before = config_dump(config);
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
            assert_config_round_trip(config, &v);
            free(before);
            before = config_dump(config);
        } else {
            ++refused;
            assert_true(strlen(muonshard_config_last_error(config)) > 10);
            char *after = config_dump(config);
            assert_string_equal(after, before);
            free(after);
        }
    }
    free(before);
    assert_true(refused > 500 && accepted > 500); /* both sides are exercised */
    muonshard_config_destroy(config);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_load_errors),
        cmocka_unit_test(test_set_errors),
        cmocka_unit_test(test_files),
        cmocka_unit_test(test_fuzz),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
