#include "config_internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define NO_ROW     ((size_t)-1)
#define PRESET_ROW 0 /* of settings_table */

/* ---- rows and their values ---- */

static size_t find_row(const config_row *rows, size_t count, const char *key) {
    for (size_t i = 0; i < count; ++i)
        if (strcmp(rows[i].param->name, key) == 0)
            return i;
    return NO_ROW;
}

static const preset *preset_in_effect(char *const *given) {
    const char *name =
        given && given[PRESET_ROW] ? given[PRESET_ROW] : settings_table[PRESET_ROW].initial;
    for (size_t i = 0; i < preset_count; ++i)
        if (strcmp(preset_table[i].name, name) == 0)
            return &preset_table[i];
    return NULL;
}

/* The last of its values for a key. */
static const char *preset_value(const preset *from, const char *key) {
    const size_t length = strlen(key);
    const char *value = NULL;
    for (const char *const *v = from ? from->values : NULL; v && *v; ++v)
        if (strncmp(*v, key, length) == 0 && (*v)[length] == '=')
            value = *v + length + 1;
    return value;
}

/* As it was written: given, else the preset's, else the default. */
static const char *raw_value(const muonshard_config *config, char *const *given, size_t row) {
    const muonshard_param *param = config->rows[row].param;
    if (given && given[row])
        return given[row];
    const char *value =
        row < settings_table_count ? preset_value(preset_in_effect(given), param->name) : NULL;
    return value ? value : param->initial;
}

const char *config_row_text(const muonshard_config *config, char *const *given, size_t row,
                            char buffer[VALUE_TEXT_MAX]) {
    return value_canonical(config->rows[row].param, raw_value(config, given, row), buffer);
}

void config_given_free(char **given, size_t count) {
    if (!given)
        return;
    for (size_t i = 0; i < count; ++i)
        free(given[i]);
    free(given);
}

/* New memory; `base` may be NULL. NULL: out of memory. */
static char **given_copy(char *const *base, size_t count) {
    char **given = calloc(count, sizeof *given);
    if (!given || !base)
        return given;
    for (size_t i = 0; i < count; ++i) {
        if (!base[i])
            continue;
        given[i] = strdup(base[i]);
        if (!given[i]) {
            config_given_free(given, count);
            return NULL;
        }
    }
    return given;
}

void config_given_commit(muonshard_config *config, char **given) {
    config_given_free(config->given, config->row_count);
    config->given = given;
    for (size_t i = 0; i < config->row_count; ++i)
        value_store(config->rows[i].param, raw_value(config, given, i), config->rows[i].target);
}

/* ---- messages ---- */

static size_t min_size(size_t a, size_t b) {
    return a < b ? a : b;
}

/* Levenshtein distance of words shorter than CONFIG_MAX_KEY. */
static size_t edit_distance(const char *a, const char *b) {
    size_t row[CONFIG_MAX_KEY];
    const size_t length = strlen(b);
    for (size_t j = 0; j <= length; ++j)
        row[j] = j;
    for (; *a; ++a) {
        size_t diagonal = row[0]++;
        for (size_t j = 1; j <= length; ++j) {
            const size_t replaced = diagonal + (*a != b[j - 1]);
            diagonal = row[j];
            row[j] = min_size(replaced, min_size(row[j], row[j - 1]) + 1);
        }
    }
    return row[length];
}

/* The first key below `name:`, or NULL when it is no group of keys. */
static const char *first_of_group(const muonshard_config *config, const char *name) {
    const size_t length = strlen(name);
    for (size_t i = 0; i < config->row_count; ++i) {
        const char *key = config->rows[i].param->name;
        if (strncmp(key, name, length) == 0 && key[length] == '.')
            return key;
    }
    return NULL;
}

static muonshard_status unknown_key(const muonshard_config *config, const char *where,
                                    const char *key, error_text *error) {
    const char *inside = first_of_group(config, key);
    FAIL_IF(inside, error, MUONSHARD_ERR_CONFIG,
            "%s: '%s' is a group of keys, not a key; did you mean '%s'?", where, key, inside);
    FAIL_IF(strlen(key) >= CONFIG_MAX_KEY, error, MUONSHARD_ERR_CONFIG,
            "%s: unknown key '%.60s...'", where, key);
    const char *nearest = "";
    size_t best = NO_ROW;
    for (size_t i = 0; i < config->row_count; ++i) {
        const size_t distance = edit_distance(key, config->rows[i].param->name);
        if (distance < best) {
            best = distance;
            nearest = config->rows[i].param->name;
        }
    }
    return fail(error, MUONSHARD_ERR_CONFIG, "%s: unknown key '%s'; did you mean '%s'?", where, key,
                nearest);
}

static muonshard_status wrong_value(const muonshard_param *param, const char *where,
                                    config_entry_kind kind, const char *value, error_text *error) {
    char expected[VALUE_RANGE_MAX];
    value_expected(param, expected);
    if (kind == ENTRY_LIST || kind == ENTRY_EMPTY_MAPPING)
        return fail(error, MUONSHARD_ERR_CONFIG, "%s: %s: found a %s, expected %s", where,
                    param->name, kind == ENTRY_LIST ? "list" : "mapping", expected);
    return fail(error, MUONSHARD_ERR_CONFIG, "%s: %s: found '%.200s', expected %s", where,
                param->name, value, expected);
}

/* ---- setting and loading ---- */

/* Puts a checked value into given[row]; `where` opens the message. */
static muonshard_status assign(const muonshard_config *config, char **given, size_t row,
                               config_entry_kind kind, const char *value, const char *where,
                               error_text *error) {
    const muonshard_param *param = config->rows[row].param;
    const bool is_list = param->type == MUONSHARD_PARAM_LIST;
    const bool is_text = is_list || param->type == MUONSHARD_PARAM_TEXT;
    if (kind == ENTRY_EMPTY_MAPPING || (kind == ENTRY_LIST && !is_list))
        return wrong_value(param, where, kind, value, error);
    if (kind == ENTRY_NULL && is_text)
        value = "";
    /* One item stands for a list of one, nothing for an empty list. */
    const bool item = is_list && kind == ENTRY_SCALAR && *value;
    if (item && strchr(value, '\n'))
        return wrong_value(param, where, kind, value, error);

    const size_t length = strlen(value);
    char *text = malloc(length + 2);
    FAIL_IF(!text, error, MUONSHARD_ERR_MEMORY, "%s: out of memory", where);
    memcpy(text, value, length + 1);
    if (item)
        memcpy(text + length, "\n", 2);
    if (!value_valid(param, text)) {
        free(text);
        return wrong_value(param, where, kind, value, error);
    }
    free(given[row]);
    given[row] = text;
    return MUONSHARD_OK;
}

static muonshard_status assign_entries(const muonshard_config *config, char **given,
                                       const config_entries *entries, size_t *lines,
                                       const char *name, error_text *error) {
    for (size_t i = 0; i < entries->count; ++i) {
        const config_entry *entry = &entries->items[i];
        const size_t row = find_row(config->rows, config->row_count, entry->key);
        char where[512];
        snprintf(where, sizeof where, "%.400s:%zu", name, entry->line);
        if (row == NO_ROW && entry->kind == ENTRY_EMPTY_MAPPING &&
            first_of_group(config, entry->key))
            continue;
        if (row == NO_ROW)
            return unknown_key(config, where, entry->key, error);
        FAIL_IF(lines[row], error, MUONSHARD_ERR_CONFIG,
                "%s: repeated key '%s'; line %zu has it already", where, entry->key, lines[row]);
        lines[row] = entry->line;
        TRY(assign(config, given, row, entry->kind, entry->value, where, error));
    }
    return MUONSHARD_OK;
}

muonshard_status config_given_load(const muonshard_config *config, char *const *base,
                                   const char *yaml, size_t length, const char *name, char ***given,
                                   error_text *error) {
    config_entries entries = {0};
    muonshard_status status = MUONSHARD_OK;
    char **next = given_copy(base, config->row_count);
    size_t *lines = calloc(config->row_count, sizeof *lines);
    if (!next || !lines) {
        status = fail(error, MUONSHARD_ERR_MEMORY, "%s: out of memory", name);
        goto out;
    }
    TRY_GOTO(config_yaml_parse(yaml, length, name, &entries, error), out);
    TRY_GOTO(assign_entries(config, next, &entries, lines, name, error), out);
    *given = next;
    next = NULL;
out:
    config_given_free(next, config->row_count);
    config_entries_free(&entries);
    free(lines);
    return status;
}

static muonshard_status load(muonshard_config *config, const char *yaml, size_t length,
                             const char *name) {
    char **given;
    TRY(config_given_load(config, config->given, yaml, length, name, &given, &config->error));
    config_given_commit(config, given);
    config->loaded = true;
    return MUONSHARD_OK;
}

muonshard_status muonshard_config_load_file(muonshard_config *config, const char *path) {
    if (!config)
        return MUONSHARD_ERR_ARGUMENT;
    FAIL_IF(!path, &config->error, MUONSHARD_ERR_ARGUMENT, "path is NULL");
    char *yaml;
    size_t length;
    TRY(config_yaml_read(path, &yaml, &length, &config->error));
    const muonshard_status status = load(config, yaml, length, path);
    free(yaml);
    return status;
}

muonshard_status muonshard_config_load_string(muonshard_config *config, const char *yaml) {
    if (!config)
        return MUONSHARD_ERR_ARGUMENT;
    FAIL_IF(!yaml, &config->error, MUONSHARD_ERR_ARGUMENT, "yaml is NULL");
    const size_t length = strlen(yaml);
    FAIL_IF(length > CONFIG_MAX_BYTES, &config->error, MUONSHARD_ERR_CONFIG,
            "<string>: larger than %zu bytes", CONFIG_MAX_BYTES);
    return load(config, yaml, length, "<string>");
}

muonshard_status muonshard_config_set(muonshard_config *config, const char *key,
                                      const char *value) {
    if (!config)
        return MUONSHARD_ERR_ARGUMENT;
    FAIL_IF(!key || !value, &config->error, MUONSHARD_ERR_ARGUMENT, "%s is NULL",
            key ? "value" : "key");
    char where[512];
    snprintf(where, sizeof where, "'%.200s=%.200s'", key, value);
    const size_t row = find_row(config->rows, config->row_count, key);
    if (row == NO_ROW)
        return unknown_key(config, where, key, &config->error);
    char **given = given_copy(config->given, config->row_count);
    FAIL_IF(!given, &config->error, MUONSHARD_ERR_MEMORY, "%s: out of memory", where);
    const muonshard_status status =
        assign(config, given, row, ENTRY_SCALAR, value, where, &config->error);
    if (status != MUONSHARD_OK) {
        config_given_free(given, config->row_count);
        return status;
    }
    config_given_commit(config, given);
    return MUONSHARD_OK;
}

muonshard_status muonshard_config_get(const muonshard_config *config, const char *key, char *text,
                                      size_t size, size_t *length) {
    if (!config)
        return MUONSHARD_ERR_ARGUMENT;
    /* Const is for the values; the text of the last error may change. */
    error_text *error = &((muonshard_config *)config)->error;
    FAIL_IF(!key || (!text && size > 0), error, MUONSHARD_ERR_ARGUMENT, "%s is NULL",
            key ? "text" : "key");
    const size_t row = find_row(config->rows, config->row_count, key);
    if (row == NO_ROW) {
        char where[512];
        snprintf(where, sizeof where, "'%.200s'", key);
        return unknown_key(config, where, key, error);
    }
    char buffer[VALUE_TEXT_MAX];
    const char *value = config_row_text(config, config->given, row, buffer);
    if (size > 0) {
        const size_t copied = min_size(strlen(value), size - 1);
        memcpy(text, value, copied);
        text[copied] = '\0';
    }
    if (length)
        *length = strlen(value);
    return MUONSHARD_OK;
}

/* ---- the handle ---- */

static bool valid_name(const char *name) {
    const size_t length = strlen(name);
    return length > 0 && length < CONFIG_MAX_KEY && name[0] != '.' && name[length - 1] != '.' &&
           !strstr(name, "..") &&
           !name[strspn(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.")];
}

static muonshard_status check_param(const muonshard_param *param, const config_row *before,
                                    size_t before_count, error_text *error) {
    const char *name = param->name;
    FAIL_IF(!name || !valid_name(name), error, MUONSHARD_ERR_ARGUMENT,
            "'%.100s' cannot be the name of a parameter", name ? name : "(null)");
    FAIL_IF(find_row(before, before_count, name) != NO_ROW, error, MUONSHARD_ERR_ARGUMENT,
            "parameter '%s' exists already", name);
    FAIL_IF(!param->doc || !param->initial || (unsigned)param->type > MUONSHARD_PARAM_CHOICE ||
                (param->type == MUONSHARD_PARAM_CHOICE && !param->choices),
            error, MUONSHARD_ERR_ARGUMENT, "parameter '%s' lacks its type, default, choices or doc",
            name);
    if (value_valid(param, param->initial))
        return MUONSHARD_OK;
    wrong_value(param, "default", ENTRY_SCALAR, param->initial, error);
    return MUONSHARD_ERR_ARGUMENT;
}

muonshard_status muonshard_config_add_table(muonshard_config *config, const muonshard_param *table,
                                            size_t count, void *values) {
    if (!config)
        return MUONSHARD_ERR_ARGUMENT;
    FAIL_IF(config->loaded, &config->error, MUONSHARD_ERR_STATE,
            "a table of parameters has to be added before anything is loaded");
    FAIL_IF(count > 0 && (!table || !values), &config->error, MUONSHARD_ERR_ARGUMENT, "%s is NULL",
            table ? "values" : "table");
    if (count == 0)
        return MUONSHARD_OK;

    muonshard_status status = MUONSHARD_OK;
    const size_t old = config->row_count, total = old + count;
    config_row *rows = calloc(total, sizeof *rows);
    char **given = calloc(total, sizeof *given);
    if (!rows || !given) {
        status = fail(&config->error, MUONSHARD_ERR_MEMORY, "out of memory");
        goto out;
    }
    if (old > 0) {
        memcpy(rows, config->rows, old * sizeof *rows);
        memcpy(given, config->given, old * sizeof *given);
    }
    for (size_t i = 0; i < count; ++i) {
        TRY_GOTO(check_param(&table[i], rows, old + i, &config->error), out);
        rows[old + i] = (config_row){&table[i], (char *)values + table[i].offset};
    }
    for (size_t i = old; i < total; ++i)
        value_store(rows[i].param, rows[i].param->initial, rows[i].target);

    /* The old arrays go; the texts in `given` have moved. */
    config_row *old_rows = config->rows;
    char **old_given = config->given;
    config->rows = rows;
    config->given = given;
    config->row_count = total;
    rows = old_rows;
    given = old_given;
out:
    free(rows);
    free(given);
    return status;
}

static muonshard_status create(muonshard_config **config, error_text *error) {
    muonshard_status status;
    char **given = NULL;
    muonshard_config *c = calloc(1, sizeof *c);
    FAIL_IF(!c, error, MUONSHARD_ERR_MEMORY, "out of memory");
    TRY_GOTO(muonshard_config_add_table(c, settings_table, settings_table_count, &c->settings),
             out);
    given = given_copy(NULL, c->row_count);
    if (!given) {
        status = fail(&c->error, MUONSHARD_ERR_MEMORY, "out of memory");
        goto out;
    }
    config_given_commit(c, given); /* what the preset `none` adds to the table's defaults */
    *config = c;
    return MUONSHARD_OK;
out:
    fail(error, status, "%s", c->error.text);
    muonshard_config_destroy(c);
    return status;
}

muonshard_status muonshard_config_create(muonshard_config **config) {
    if (!config)
        return MUONSHARD_ERR_ARGUMENT;
    *config = NULL;
    return create(config, NULL);
}

muonshard_status config_copy(const muonshard_config *config, muonshard_config **copy,
                             error_text *error) {
    muonshard_config *c;
    TRY(create(&c, error));
    char **given = given_copy(config->given, c->row_count);
    if (!given) {
        muonshard_config_destroy(c);
        return fail(error, MUONSHARD_ERR_MEMORY, "out of memory");
    }
    config_given_commit(c, given);
    *copy = c;
    return MUONSHARD_OK;
}

const settings *config_settings(const muonshard_config *config) {
    return &config->settings;
}

const char *muonshard_config_last_error(const muonshard_config *config) {
    return config ? config->error.text : "config is NULL";
}

void muonshard_config_destroy(muonshard_config *config) {
    if (!config)
        return;
    config_given_free(config->given, config->row_count);
    free(config->rows);
    free(config);
}
