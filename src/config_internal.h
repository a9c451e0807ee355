/* config_internal.h - what the config_*.c files share: config.c (the handle and its state),
 * config_value.c (one parameter's text), config_yaml.c (YAML in), config_text.c (dump and help
 * out), config_ranks.c (the same config on all ranks). */
#ifndef CONFIG_INTERNAL_H
#define CONFIG_INTERNAL_H

#include <stdbool.h>
#include "config.h"

typedef struct config_row {
    const muonshard_param *param;
    void *target; /* where its value goes: param->offset into the table's values */
} config_row;

struct muonshard_config {
    config_row *rows; /* all tables', the library's own first */
    size_t row_count;
    char **given; /* [row_count] values set explicitly, owned; NULL: the preset's or the default */
    bool loaded;  /* no more tables may come */
    settings settings; /* target of the library's own table */
    error_text error;
};

/* ---- config_value.c: one parameter's value as text ---- */

#define VALUE_TEXT_MAX  64
#define VALUE_RANGE_MAX 512

/* Whether `text` is a value of `param`; a list is its items, each followed by '\n'. */
bool value_valid(const muonshard_param *param, const char *text);
/* Writes a valid value to its target; TEXT and LIST store the pointer itself. */
void value_store(const muonshard_param *param, const char *text, void *target);
/* The one way to write a valid value: numbers go to `buffer`, for anything else the answer is
 * `text`. */
const char *value_canonical(const muonshard_param *param, const char *text,
                            char buffer[VALUE_TEXT_MAX]);
/* "[1, 32]", "true, false", "mean, sum, none"; empty for TEXT and LIST. */
void value_range(const muonshard_param *param, char text[VALUE_RANGE_MAX]);
/* "an integer in [1, 32]" and so on, for messages. */
void value_expected(const muonshard_param *param, char text[VALUE_RANGE_MAX]);
/* A number as every setting is written, whatever the locale; narrower than strtod: no white space,
 * no hexadecimal, no inf or nan. */
bool value_parse_real(const char *text, double *value);
const char *value_type_name(muonshard_param_type type);
/* The code point at *text, which moves on behind it; 0 at the end, -1 where it is not UTF-8. */
int32_t utf8_next(const char **text);

/* ---- config_yaml.c: YAML as a flat sequence of dotted keys ---- */

#define CONFIG_MAX_BYTES ((size_t)1 << 20)
#define CONFIG_MAX_DEPTH 16
#define CONFIG_MAX_KEY   256
#define CONFIG_MAX_WORDS 64 /* of a mapping in a list: each is looked for among those before */

typedef enum config_entry_kind {
    ENTRY_SCALAR,
    ENTRY_NULL,         /* an empty plain value, `~` or `null`; value is the word */
    ENTRY_LIST,         /* value is the items, each followed by '\n' */
    ENTRY_EMPTY_MAPPING /* value is empty */
} config_entry_kind;

typedef struct config_entry {
    config_entry_kind kind;
    char *key, *value;  /* owned */
    size_t line;        /* of the key, from 1 */
    size_t *item_lines; /* owned, of a list: a line an item */
} config_entry;

typedef struct config_entries {
    config_entry *items;
    size_t count, capacity;
} config_entries;

/* Appends to `entries`, which the caller frees whatever the outcome. `name` opens every message.
 * ERR_CONFIG, ERR_MEMORY. */
muonshard_status config_yaml_parse(const char *yaml, size_t length, const char *name,
                                   config_entries *entries, error_text *error);
/* A whole file, at most CONFIG_MAX_BYTES, into new memory. ERR_IO, ERR_CONFIG: too large;
 * ERR_MEMORY. */
muonshard_status config_yaml_read(const char *path, char **yaml, size_t *length, error_text *error);
void config_entries_free(config_entries *entries);

/* ---- config.c ---- */

/* The values `given` gives to a row, with presets and defaults behind it; as canonical text. */
const char *config_row_text(const muonshard_config *config, char *const *given, size_t row,
                            char buffer[VALUE_TEXT_MAX]);
/* New memory for what would be given if `yaml` were loaded over `base` (NULL: over nothing). */
muonshard_status config_given_load(const muonshard_config *config, char *const *base,
                                   const char *yaml, size_t length, const char *name, char ***given,
                                   error_text *error);
/* Takes over `given` and rewrites all targets; cannot fail. */
void config_given_commit(muonshard_config *config, char **given);
void config_given_free(char **given, size_t count);

/* ---- config_text.c ---- */

/* YAML of all rows, or only of those given; like snprintf. */
size_t config_text_dump(const muonshard_config *config, bool only_given, char *text, size_t size);

#endif
