#include "config_internal.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

/* Text that goes to a caller's buffer as far as it has room, and is counted to the end. */
typedef struct writer {
    char *text;
    size_t size, length;
} writer;

static void put(writer *w, const char *format, ...) __attribute__((format(printf, 2, 3)));
static void put(writer *w, const char *format, ...) {
    const size_t used = w->length < w->size ? w->length : w->size;
    va_list args;
    va_start(args, format);
    const int n = vsnprintf(w->size > used ? w->text + used : NULL, w->size - used, format, args);
    va_end(args);
    w->length += n > 0 ? (size_t)n : 0;
}

static writer writer_to(char *text, size_t size) {
    writer w = {text, text ? size : 0, 0};
    if (w.size > 0)
        text[0] = '\0';
    return w;
}

/* ---- dump ---- */

static bool needs_quotes(const char *text, size_t length) {
    static const char *const nulls[] = {"null", "Null", "NULL"};
    for (size_t i = 0; i < sizeof nulls / sizeof *nulls; ++i)
        if (length == 4 && memcmp(text, nulls[i], 4) == 0)
            return true;
    for (size_t i = 0; i < length; ++i) {
        const char c = text[i];
        const bool word = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ||
                          (c >= '0' && c <= '9') || c == '_' || c == '/';
        if (!word && (i == 0 || !strchr(".-+=", c)))
            return true;
    }
    return length == 0;
}

/* A scalar of `length` bytes of UTF-8, in double quotes where plain text would read back as
 * something else. */
static void put_scalar(writer *w, const char *text, size_t length) {
    if (!needs_quotes(text, length)) {
        put(w, "%.*s", (int)length, text);
        return;
    }
    put(w, "\"");
    for (const char *c = text; c < text + length;) {
        const char *start = c;
        const int32_t code = utf8_next(&c);
        if (code <= 0)
            break;
        if (code == '"' || code == '\\')
            put(w, "\\%c", (char)code);
        else if (code < 0x20 || (code >= 0x7f && code < 0xa0) || code == 0x2028 || code == 0x2029 ||
                 code == 0xfeff || code == 0xfffe || code == 0xffff)
            put(w, "\\u%04x", (unsigned)code);
        else
            put(w, "%.*s", (int)(c - start), start);
    }
    put(w, "\"");
}

static void put_list(writer *w, const char *items) {
    put(w, *items ? "\n" : " []\n");
    while (*items) {
        const size_t length = strcspn(items, "\n");
        put(w, "  - ");
        put_scalar(w, items, length);
        put(w, "\n");
        items += length + (items[length] == '\n');
    }
}

size_t config_text_dump(const muonshard_config *config, bool only_given, char *text, size_t size) {
    writer w = writer_to(text, size);
    for (size_t i = 0; i < config->row_count; ++i) {
        if (only_given && !config->given[i])
            continue;
        const muonshard_param *param = config->rows[i].param;
        char buffer[VALUE_TEXT_MAX];
        const char *value = config_row_text(config, config->given, i, buffer);
        put(&w, "%s:", param->name);
        if (param->type == MUONSHARD_PARAM_LIST) {
            put_list(&w, value);
        } else if (param->type == MUONSHARD_PARAM_TEXT) {
            put(&w, " ");
            put_scalar(&w, value, strlen(value));
            put(&w, "\n");
        } else {
            put(&w, " %s\n", value);
        }
    }
    return w.length;
}

size_t muonshard_config_dump(const muonshard_config *config, char *text, size_t size) {
    return config ? config_text_dump(config, false, text, size) : writer_to(text, size).length;
}

/* ---- help ---- */

/* What a fresh config shows for a row. */
static void row_default(const muonshard_config *config, size_t row, char *text, size_t size) {
    char buffer[VALUE_TEXT_MAX];
    const char *value = config_row_text(config, NULL, row, buffer);
    writer w = writer_to(text, size);
    if (config->rows[row].param->type == MUONSHARD_PARAM_LIST && !*value)
        put(&w, "[]");
    else if (!*value)
        put(&w, "\"\"");
    for (const char *c = value; *c; ++c)
        if (*c != '\n')
            put(&w, "%c", *c);
        else if (c[1])
            put(&w, ", ");
}

static int max_int(int a, size_t b) {
    return (size_t)a > b ? a : (int)b;
}

/* A preset's value is shown if no later one has its key, and if it isn't the default. */
static bool preset_shows(const char *const *value) {
    const size_t key = strcspn(*value, "=") + 1;
    for (const char *const *later = value + 1; *later; ++later)
        if (strncmp(*later, *value, key) == 0)
            return false;
    for (size_t i = 0; i < settings_table_count; ++i)
        if (strlen(settings_table[i].name) == key - 1 &&
            strncmp(settings_table[i].name, *value, key - 1) == 0)
            return strcmp(settings_table[i].initial, *value + key) != 0;
    return true;
}

static void help_plain(const muonshard_config *config, writer *w) {
    char initial[VALUE_RANGE_MAX], range[VALUE_RANGE_MAX];
    int name_width = 0, initial_width = 0;
    for (size_t i = 0; i < config->row_count; ++i) {
        row_default(config, i, initial, sizeof initial);
        name_width = max_int(name_width, strlen(config->rows[i].param->name));
        initial_width = max_int(initial_width, strlen(initial));
    }
    for (size_t i = 0; i < config->row_count; ++i) {
        const muonshard_param *param = config->rows[i].param;
        row_default(config, i, initial, sizeof initial);
        value_range(param, range);
        put(w, "%-*s  %-7s  ", name_width, param->name, value_type_name(param->type));
        if (*range)
            put(w, "%-*s  %s\n", initial_width, initial, range);
        else
            put(w, "%s\n", initial);
        put(w, "    %s\n", param->doc);
    }
    put(w, "\npresets: values over the defaults; a key set explicitly goes before its preset\n");
    for (size_t p = 0; p < preset_count; ++p) {
        put(w, "%s", preset_table[p].name);
        size_t column = 100; /* a new line first */
        for (const char *const *v = preset_table[p].values; *v; ++v) {
            if (!preset_shows(v))
                continue;
            if (column + 1 + strlen(*v) > 96) {
                put(w, "\n   ");
                column = 3;
            }
            put(w, " %s", *v);
            column += 1 + strlen(*v);
        }
        put(w, "\n");
    }
}

/* A cell of a markdown table; a bar would end it. */
static void put_cell(writer *w, const char *text) {
    for (; *text; ++text)
        put(w, *text == '|' ? "\\%c" : "%c", *text);
}

static void help_markdown(const muonshard_config *config, writer *w) {
    char text[VALUE_RANGE_MAX];
    put(w, "| key | type | default | range | meaning |\n|---|---|---|---|---|\n");
    for (size_t i = 0; i < config->row_count; ++i) {
        const muonshard_param *param = config->rows[i].param;
        put(w, "| `%s` | %s | `", param->name, value_type_name(param->type));
        row_default(config, i, text, sizeof text);
        put_cell(w, text);
        put(w, "` | ");
        value_range(param, text);
        put_cell(w, text);
        put(w, " | ");
        put_cell(w, param->doc);
        put(w, " |\n");
    }
    put(w, "\n| preset | values over the defaults; a key set explicitly goes before them |\n"
           "|---|---|\n");
    for (size_t p = 0; p < preset_count; ++p) {
        put(w, "| `%s` |", preset_table[p].name);
        for (const char *const *v = preset_table[p].values; *v; ++v)
            if (preset_shows(v))
                put(w, " `%s`", *v);
        put(w, " |\n");
    }
}

size_t muonshard_config_help(const muonshard_config *config, muonshard_text_format format,
                             char *text, size_t size) {
    writer w = writer_to(text, size);
    if (!config)
        return 0;
    if (format == MUONSHARD_TEXT_MARKDOWN)
        help_markdown(config, &w);
    else
        help_plain(config, &w);
    return w.length;
}
