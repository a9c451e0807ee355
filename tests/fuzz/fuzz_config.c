/* A config: YAML up to the first NUL byte, then "key=value" settings with a NUL byte between them,
 * beside a program's table that has every type of parameter. What is refused changes nothing; what
 * is taken is in range, and its dump loads to the same. */
#include <math.h>
#include <string.h>

#include "fuzz.h"

enum { MOST_SETTINGS = 8 }; /* each costs some dumps */

typedef struct program {
    int flag, choice;
    int64_t count;
    double rate, given_or_auto;
    const char *name, *items;
} program;

#define FIELD(key, type, field, initial, min, max, choices)                                        \
    { key, MUONSHARD_PARAM_##type, offsetof(program, field), initial, min, max, choices, "Doc." }
static const muonshard_param table[] = {
    FIELD("run.flag", BOOL, flag, "true", 0, 0, NULL),
    FIELD("run.choice", CHOICE, choice, "one", 0, 0, "one|two|three"),
    FIELD("run.count", INT, count, "1", -1000, 9e15, NULL),
    FIELD("run.rate", REAL, rate, "0.1", -1e300, 1e300, NULL),
    FIELD("run.more.auto", REAL, given_or_auto, "auto", 0, 1, NULL),
    FIELD("name", TEXT, name, "a name", 0, 0, NULL),
    FIELD("items", LIST, items, "one\ntwo\n", 0, 0, NULL),
};

static muonshard_config *new_config(program *p) {
    muonshard_config *config;
    FUZZ_CHECK(muonshard_config_create(&config) == MUONSHARD_OK);
    FUZZ_CHECK(muonshard_config_add_table(config, table, sizeof table / sizeof *table, p) ==
               MUONSHARD_OK);
    return config;
}

/* Own. Most fit at the first try. */
static char *dump_of(const muonshard_config *config) {
    static char usual[1 << 14];
    const size_t length = muonshard_config_dump(config, usual, sizeof usual);
    if (length < sizeof usual)
        return strdup(usual);
    char *text = malloc(length + 1);
    FUZZ_CHECK(text && muonshard_config_dump(config, text, length + 1) == length);
    return text;
}

/* A buffer that is too small gets the beginning. */
static void check_short_dump(const muonshard_config *config, const char *dump) {
    char beginning[16];
    FUZZ_CHECK(muonshard_config_dump(config, beginning, sizeof beginning) == strlen(dump));
    FUZZ_CHECK(strlen(beginning) == sizeof beginning - 1 &&
               strncmp(beginning, dump, sizeof beginning - 1) == 0);
}

static void check_values(const program *p) {
    FUZZ_CHECK(p->flag == 0 || p->flag == 1);
    FUZZ_CHECK(p->choice >= 0 && p->choice < 3);
    FUZZ_CHECK(p->count >= -1000 && p->count <= (int64_t)9e15);
    FUZZ_CHECK(fabs(p->rate) <= 1e300);
    FUZZ_CHECK(isnan(p->given_or_auto) || (p->given_or_auto >= 0 && p->given_or_auto <= 1));
    const size_t length = strlen(p->items);
    FUZZ_CHECK(length == 0 || p->items[length - 1] == '\n');
    FUZZ_CHECK(strlen(p->name) < SIZE_MAX);
}

static bool same_real(double a, double b) {
    return a == b || (isnan(a) && isnan(b));
}

static void check_dump_loads(const char *dump, const program *p) {
    program again;
    muonshard_config *config = new_config(&again);
    const muonshard_status status = muonshard_config_load_string(config, dump);
    if (status)
        fprintf(stderr, "%s\n%s\n", muonshard_config_last_error(config), dump);
    FUZZ_CHECK(status == MUONSHARD_OK);
    char *second = dump_of(config);
    FUZZ_CHECK(strcmp(dump, second) == 0);
    FUZZ_CHECK(p->flag == again.flag && p->choice == again.choice && p->count == again.count);
    FUZZ_CHECK(same_real(p->rate, again.rate) && same_real(p->given_or_auto, again.given_or_auto));
    FUZZ_CHECK(strcmp(p->name, again.name) == 0 && strcmp(p->items, again.items) == 0);
    free(second);
    muonshard_config_destroy(config);
}

/* After an outcome: all or nothing. Takes over `before`; returns what is in effect now. */
static char *check_outcome(muonshard_config *config, const program *p, muonshard_status status,
                           char *before) {
    fuzz_status(status, muonshard_config_last_error(config));
    FUZZ_CHECK(status == MUONSHARD_OK || status == MUONSHARD_ERR_CONFIG);
    check_values(p);
    char *after = dump_of(config);
    FUZZ_CHECK(status == MUONSHARD_OK || strcmp(before, after) == 0);
    free(before);
    return after;
}

/* What a setting is said to be can be set, and changes nothing; a list is no single item. */
static void check_get(muonshard_config *config, const char *key, const char *dump) {
    size_t length;
    FUZZ_CHECK(muonshard_config_get(config, key, NULL, 0, &length) == MUONSHARD_OK);
    char *value = malloc(length + 1);
    FUZZ_CHECK(value && muonshard_config_get(config, key, value, length + 1, NULL) == MUONSHARD_OK);
    FUZZ_CHECK(strlen(value) == length);
    if (!strchr(value, '\n') && strcmp(key, "preset") != 0) {
        FUZZ_CHECK(muonshard_config_set(config, key, value) == MUONSHARD_OK);
        char *after = dump_of(config);
        FUZZ_CHECK(strcmp(after, dump) == 0);
        free(after);
    }
    free(value);
}

/* The settings after the YAML, each "key=value" or a key alone. */
static char *set_all(muonshard_config *config, const program *p, const char *at, const char *end,
                     char *dump) {
    for (int i = 0; at < end && i < MOST_SETTINGS; at += strlen(at) + 1, i++) {
        char *key = strdup(at);
        FUZZ_CHECK(key);
        char *value = strchr(key, '=');
        if (value)
            *value++ = '\0';
        const muonshard_status status = muonshard_config_set(config, key, value ? value : "");
        dump = check_outcome(config, p, status, dump);
        if (status == MUONSHARD_OK)
            check_get(config, key, dump);
        free(key);
    }
    return dump;
}

/* What a new config dumps. */
static const char *fresh_dump(const muonshard_config *fresh) {
    static char *dump;
    if (!dump)
        dump = dump_of(fresh);
    return dump;
}

static void fuzz_string(const char *text, size_t size) {
    program p;
    muonshard_config *config = new_config(&p);
    const char *fresh = fresh_dump(config);
    char *dump = strdup(fresh);
    dump = check_outcome(config, &p, muonshard_config_load_string(config, text), dump);
    dump = set_all(config, &p, text + strlen(text) + 1, text + size, dump);
    static bool fresh_loads;
    if (!fresh_loads || strcmp(dump, fresh) != 0) { /* most input is refused */
        check_dump_loads(dump, &p);
        check_short_dump(config, dump);
        fresh_loads = true;
    }
    free(dump);
    muonshard_config_destroy(config);
}

/* A file may have NUL bytes in it, which are refused. */
static void fuzz_as_file(const uint8_t *data, size_t size) {
    program p;
    muonshard_config *config = new_config(&p);
    char *dump = strdup(fresh_dump(config));
    const muonshard_status status = muonshard_config_load_file(config, fuzz_file(data, size));
    FUZZ_CHECK(status == MUONSHARD_ERR_CONFIG);
    free(check_outcome(config, &p, status, dump));
    muonshard_config_destroy(config);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    char *text = malloc(size + 1);
    FUZZ_CHECK(text);
    if (size)
        memcpy(text, data, size);
    text[size] = '\0';
    fuzz_string(text, size);
    if (strlen(text) < size)
        fuzz_as_file(data, size);
    free(text);
    return 0;
}
