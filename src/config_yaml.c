#include "config_internal.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <yaml.h>

/* One pass over libyaml's events; `event` is the current one, and the functions that read a node
 * leave the node's last event current. */
typedef struct reader {
    yaml_parser_t parser;
    yaml_event_t event;
    bool has_event;
    const char *yaml, *name;
    int depth, documents;
    config_entries *entries;
    error_text *error;
} reader;

typedef struct text_buffer {
    char *data; /* owned, ends with a zero once something was appended */
    size_t length, capacity;
} text_buffer;

/* ---- memory ---- */

void config_entries_free(config_entries *entries) {
    for (size_t i = 0; i < entries->count; ++i) {
        free(entries->items[i].key);
        free(entries->items[i].value);
        free(entries->items[i].item_lines);
    }
    free(entries->items);
    *entries = (config_entries){0};
}

static muonshard_status no_memory(reader *r) {
    return fail(r->error, MUONSHARD_ERR_MEMORY, "%s: out of memory", r->name);
}

static muonshard_status append(reader *r, text_buffer *buffer, const char *text) {
    const size_t length = strlen(text);
    if (buffer->length + length + 1 > buffer->capacity) {
        const size_t capacity = 2 * (buffer->length + length + 1);
        char *data = realloc(buffer->data, capacity);
        if (!data)
            return no_memory(r);
        buffer->data = data;
        buffer->capacity = capacity;
    }
    memcpy(buffer->data + buffer->length, text, length + 1);
    buffer->length += length;
    return MUONSHARD_OK;
}

static muonshard_status add_entry(reader *r, config_entry_kind kind, const char *key, size_t line,
                                  const char *value) {
    config_entries *entries = r->entries;
    if (entries->count == entries->capacity) {
        const size_t capacity = entries->capacity ? 2 * entries->capacity : 64;
        config_entry *items = realloc(entries->items, capacity * sizeof *items);
        if (!items)
            return no_memory(r);
        entries->items = items;
        entries->capacity = capacity;
    }
    config_entry entry = {kind, strdup(key), strdup(value), line, NULL};
    if (!entry.key || !entry.value) {
        free(entry.key);
        free(entry.value);
        return no_memory(r);
    }
    entries->items[entries->count++] = entry;
    return MUONSHARD_OK;
}

/* ---- events ---- */

static size_t line_of(const reader *r) {
    return r->event.start_mark.line + 1;
}

static muonshard_status refuse(reader *r, const char *what) {
    return fail(r->error, MUONSHARD_ERR_CONFIG, "%s:%zu: %s", r->name, line_of(r), what);
}

static muonshard_status syntax_error(reader *r) {
    const yaml_parser_t *p = &r->parser;
    if (p->error == YAML_MEMORY_ERROR)
        return no_memory(r);
    size_t line = p->problem_mark.line + 1;
    if (p->error == YAML_READER_ERROR) { /* has an offset in place of a mark */
        line = 1;
        for (size_t i = 0; i < p->problem_offset && r->yaml[i]; ++i)
            line += r->yaml[i] == '\n';
    }
    return fail(r->error, MUONSHARD_ERR_CONFIG, "%s:%zu: %s%s%s", r->name, line,
                p->problem ? p->problem : "malformed YAML", p->context ? " " : "",
                p->context ? p->context : "");
}

/* Moves on to the next event and refuses what no config needs. */
static muonshard_status advance(reader *r) {
    if (r->has_event)
        yaml_event_delete(&r->event);
    r->has_event = yaml_parser_parse(&r->parser, &r->event);
    if (!r->has_event)
        return syntax_error(r);

    const yaml_char_t *anchor = NULL, *tag = NULL;
    switch (r->event.type) {
    case YAML_ALIAS_EVENT: return refuse(r, "aliases (*name) are not supported");
    case YAML_DOCUMENT_START_EVENT:
        return r->documents++ ? refuse(r, "more than one document in a file") : MUONSHARD_OK;
    case YAML_SCALAR_EVENT:
        if (memchr(r->event.data.scalar.value, 0, r->event.data.scalar.length))
            return refuse(r, "a value contains a NUL byte");
        anchor = r->event.data.scalar.anchor;
        tag = r->event.data.scalar.tag;
        break;
    case YAML_SEQUENCE_START_EVENT:
        anchor = r->event.data.sequence_start.anchor;
        tag = r->event.data.sequence_start.tag;
        ++r->depth;
        break;
    case YAML_MAPPING_START_EVENT:
        anchor = r->event.data.mapping_start.anchor;
        tag = r->event.data.mapping_start.tag;
        ++r->depth;
        break;
    case YAML_SEQUENCE_END_EVENT:
    case YAML_MAPPING_END_EVENT: --r->depth; break;
    default: break;
    }
    if (anchor)
        return refuse(r, "anchors (&name) are not supported");
    if (tag)
        return refuse(r, "tags (!name) are not supported");
    if (r->depth > CONFIG_MAX_DEPTH)
        return refuse(r, "nested too deeply");
    return MUONSHARD_OK;
}

static const char *scalar(const reader *r) {
    return (const char *)r->event.data.scalar.value;
}

static bool scalar_is_null(const reader *r) {
    const char *s = scalar(r);
    return r->event.data.scalar.style == YAML_PLAIN_SCALAR_STYLE &&
           (!*s || !strcmp(s, "~") || !strcmp(s, "null") || !strcmp(s, "Null") ||
            !strcmp(s, "NULL"));
}

/* ---- lists ---- */

/* Words of a mapping in a list are joined without quotes, so they must not contain what separates
 * them. */
static muonshard_status word(reader *r, const char *separators, const char **text) {
    if (r->event.type != YAML_SCALAR_EVENT)
        return refuse(r, "nested too deeply: a mapping in a list holds words and lists of words");
    *text = scalar_is_null(r) ? "" : scalar(r);
    if ((*text)[strcspn(*text, separators)])
        return fail(r->error, MUONSHARD_ERR_CONFIG,
                    "%s:%zu: '%.100s': no white space%s allowed in a mapping in a list", r->name,
                    line_of(r), *text,
                    strchr(separators, ',')   ? " or comma"
                    : strchr(separators, '=') ? " or '='"
                                              : "");
    return MUONSHARD_OK;
}

#define WHITE_SPACE " \t\n\r\v\f"

static bool item_has_key(const char *item, const char *key) {
    const size_t length = strlen(key);
    for (const char *c = item; c; c = strchr(c, ' ')) {
        c += *c == ' ';
        if (strncmp(c, key, length) == 0 && c[length] == '=')
            return true;
    }
    return false;
}

/* The value of a key in a mapping in a list: a word, or words joined by commas. */
static muonshard_status read_item_value(reader *r, text_buffer *items) {
    const char *text;
    if (r->event.type != YAML_SEQUENCE_START_EVENT) {
        TRY(word(r, WHITE_SPACE, &text));
        return append(r, items, text);
    }
    TRY(advance(r));
    for (bool first = true; r->event.type != YAML_SEQUENCE_END_EVENT; first = false) {
        TRY(word(r, WHITE_SPACE ",", &text));
        TRY(append(r, items, first ? "" : ","));
        TRY(append(r, items, text));
        TRY(advance(r));
    }
    return MUONSHARD_OK;
}

/* A mapping in a list becomes `key=value key=value`. */
static muonshard_status read_item(reader *r, text_buffer *items) {
    TRY(append(r, items, ""));
    const size_t start = items->length;
    TRY(advance(r));
    for (int keys = 0; r->event.type != YAML_MAPPING_END_EVENT; keys++) {
        const char *key;
        if (keys == CONFIG_MAX_WORDS)
            return refuse(r, "a mapping in a list has too many keys");
        TRY(word(r, WHITE_SPACE "=", &key));
        FAIL_IF(item_has_key(items->data + start, key), r->error, MUONSHARD_ERR_CONFIG,
                "%s:%zu: repeated key '%.100s'", r->name, line_of(r), key);
        TRY(append(r, items, items->length > start ? " " : ""));
        TRY(append(r, items, key));
        TRY(append(r, items, "="));
        TRY(advance(r));
        TRY(read_item_value(r, items));
        TRY(advance(r));
    }
    if (items->length == start)
        return refuse(r, "an empty mapping in a list");
    return MUONSHARD_OK;
}

/* *lines [count] gets one more. */
static muonshard_status note_line(reader *r, size_t **lines, size_t count) {
    size_t *more = realloc(*lines, (count + 1) * sizeof *more);
    if (!more)
        return no_memory(r);
    more[count] = line_of(r);
    *lines = more;
    return MUONSHARD_OK;
}

static muonshard_status read_items(reader *r, text_buffer *items, size_t **lines) {
    size_t count = 0;
    TRY(append(r, items, ""));
    TRY(advance(r));
    while (r->event.type != YAML_SEQUENCE_END_EVENT) {
        TRY(note_line(r, lines, count++));
        if (r->event.type == YAML_SEQUENCE_START_EVENT)
            return refuse(r, "a list in a list");
        if (r->event.type == YAML_MAPPING_START_EVENT) {
            TRY(read_item(r, items));
        } else {
            if (strchr(scalar(r), '\n'))
                return refuse(r, "an item of a list must be one line");
            TRY(append(r, items, scalar_is_null(r) ? "" : scalar(r)));
        }
        TRY(append(r, items, "\n"));
        TRY(advance(r));
    }
    return MUONSHARD_OK;
}

static muonshard_status read_list(reader *r, const char *key, size_t line) {
    text_buffer items = {0};
    size_t *lines = NULL;
    muonshard_status status = read_items(r, &items, &lines);
    if (status == MUONSHARD_OK)
        status = add_entry(r, ENTRY_LIST, key, line, items.data);
    if (status == MUONSHARD_OK)
        r->entries->items[r->entries->count - 1].item_lines = lines;
    else
        free(lines);
    free(items.data);
    return status;
}

/* ---- mappings ---- */

static muonshard_status read_mapping(reader *r, const char *prefix, size_t line) {
    TRY(advance(r));
    if (r->event.type == YAML_MAPPING_END_EVENT && *prefix)
        return add_entry(r, ENTRY_EMPTY_MAPPING, prefix, line, "");
    while (r->event.type != YAML_MAPPING_END_EVENT) {
        if (r->event.type != YAML_SCALAR_EVENT)
            return refuse(r, "a key must be a word");
        char key[CONFIG_MAX_KEY];
        const int length =
            snprintf(key, sizeof key, "%s%s%s", prefix, *prefix ? "." : "", scalar(r));
        if (length < 0 || (size_t)length >= sizeof key)
            return refuse(r, "a key is too long");
        if (!*scalar(r))
            return refuse(r, "an empty key");
        line = line_of(r);
        TRY(advance(r));
        if (r->event.type == YAML_MAPPING_START_EVENT)
            TRY(read_mapping(r, key, line));
        else if (r->event.type == YAML_SEQUENCE_START_EVENT)
            TRY(read_list(r, key, line));
        else
            TRY(add_entry(r, scalar_is_null(r) ? ENTRY_NULL : ENTRY_SCALAR, key, line, scalar(r)));
        TRY(advance(r));
    }
    return MUONSHARD_OK;
}

static muonshard_status read_stream(reader *r) {
    do {
        TRY(advance(r));
        if (r->event.type == YAML_MAPPING_START_EVENT)
            TRY(read_mapping(r, "", 0));
        else if (r->event.type == YAML_SEQUENCE_START_EVENT ||
                 (r->event.type == YAML_SCALAR_EVENT && !scalar_is_null(r)))
            return refuse(r, "expected `key: value` lines");
    } while (r->event.type != YAML_STREAM_END_EVENT);
    return MUONSHARD_OK;
}

muonshard_status config_yaml_parse(const char *yaml, size_t length, const char *name,
                                   config_entries *entries, error_text *error) {
    const char *zero = memchr(yaml, 0, length);
    if (zero) {
        size_t line = 1;
        for (const char *c = yaml; c < zero; ++c)
            line += *c == '\n';
        return fail(error, MUONSHARD_ERR_CONFIG, "%s:%zu: a NUL byte in the text", name, line);
    }
    reader r = {.yaml = yaml, .name = name, .entries = entries, .error = error};
    if (!yaml_parser_initialize(&r.parser))
        return no_memory(&r);
    yaml_parser_set_encoding(&r.parser, YAML_UTF8_ENCODING);
    yaml_parser_set_input_string(&r.parser, (const unsigned char *)yaml, length);
    const muonshard_status status = read_stream(&r);
    if (r.has_event)
        yaml_event_delete(&r.event);
    yaml_parser_delete(&r.parser);
    return status;
}

muonshard_status config_yaml_read(const char *path, char **yaml, size_t *length,
                                  error_text *error) {
    muonshard_status status = MUONSHARD_OK;
    char *text = NULL;
    FILE *file = fopen(path, "rb");
    FAIL_IF(!file, error, MUONSHARD_ERR_IO, "cannot read '%s': %s", path, strerror(errno));

    text = malloc(CONFIG_MAX_BYTES + 1);
    if (!text) {
        status = fail(error, MUONSHARD_ERR_MEMORY, "%s: out of memory", path);
        goto out;
    }
    errno = 0;
    *length = fread(text, 1, CONFIG_MAX_BYTES + 1, file);
    if (ferror(file))
        status = fail(error, MUONSHARD_ERR_IO, "cannot read '%s': %s", path, strerror(errno));
    else if (*length > CONFIG_MAX_BYTES)
        status =
            fail(error, MUONSHARD_ERR_CONFIG, "%s: larger than %zu bytes", path, CONFIG_MAX_BYTES);
out:
    fclose(file);
    if (status != MUONSHARD_OK) {
        free(text);
        return status;
    }
    *yaml = text;
    return MUONSHARD_OK;
}

size_t config_item_line(const char *path, const char *key, size_t index) {
    char *yaml;
    size_t length, line = 0;
    config_entries entries = {0};
    error_text error;
    if (config_yaml_read(path, &yaml, &length, &error))
        return 0;
    if (config_yaml_parse(yaml, length, path, &entries, &error) == MUONSHARD_OK)
        for (size_t i = 0; i < entries.count; ++i) {
            const config_entry *e = &entries.items[i];
            size_t items = 0;
            for (const char *c = e->value; e->kind == ENTRY_LIST && *c; ++c)
                items += *c == '\n';
            if (strcmp(e->key, key) == 0 && index < items)
                line = e->item_lines[index];
        }
    config_entries_free(&entries);
    free(yaml);
    return line;
}
