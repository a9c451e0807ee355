#include "config_internal.h"

#include <errno.h>
#include <locale.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct parsed_value {
    double real;
    int64_t integer;
    int index; /* BOOL, CHOICE */
} parsed_value;

/* A decimal point is a point in whatever locale the program runs. */
static double read_real(const char *text, char **end) {
    const locale_t own = newlocale(LC_NUMERIC_MASK, "C", (locale_t)0);
    const locale_t before = uselocale(own); /* without memory for one: as it is */
    const double value = strtod(text, end);
    uselocale(before);
    if (own)
        freelocale(own);
    return value;
}

static void write_real(double value, int digits, char *text, size_t size) {
    const locale_t own = newlocale(LC_NUMERIC_MASK, "C", (locale_t)0);
    const locale_t before = uselocale(own);
    snprintf(text, size, "%.*g", digits, value);
    uselocale(before);
    if (own)
        freelocale(own);
}

bool value_parse_real(const char *text, double *value) {
    if (!*text || text[strspn(text, "0123456789+-.eE")])
        return false;
    char *end;
    *value = read_real(text, &end);
    return !*end && isfinite(*value);
}

static bool parse_integer(const char *text, int64_t *value) {
    if (!*text || text[strspn(text, "0123456789+-")])
        return false;
    char *end;
    errno = 0;
    *value = strtoll(text, &end, 10);
    return !*end && errno != ERANGE;
}

static bool parse_choice(const char *choices, const char *text, int *index) {
    const size_t length = strlen(text);
    *index = 0;
    for (const char *c = choices; length > 0; ++*index) {
        const size_t word = strcspn(c, "|");
        if (word == length && memcmp(c, text, length) == 0)
            return true;
        if (!c[word])
            break;
        c += word + 1;
    }
    return false;
}

int32_t utf8_next(const char **text) {
    const unsigned char *p = (const unsigned char *)*text;
    if (!*p)
        return 0;
    int extra = 0;
    int32_t code = *p;
    if (code >= 0xf0 && code < 0xf8)
        extra = 3, code &= 0x07;
    else if (code >= 0xe0 && code < 0xf0)
        extra = 2, code &= 0x0f;
    else if (code >= 0xc2 && code < 0xe0)
        extra = 1, code &= 0x1f;
    else if (code >= 0x80)
        return -1;
    for (int i = 1; i <= extra; ++i) {
        if ((p[i] & 0xc0) != 0x80)
            return -1;
        code = code << 6 | (p[i] & 0x3f);
    }
    static const int32_t shortest[] = {0, 0x80, 0x800, 0x10000};
    if (code < shortest[extra] || code > 0x10ffff || (code >= 0xd800 && code < 0xe000))
        return -1;
    *text += 1 + extra;
    return code;
}

static bool is_utf8(const char *text) {
    int32_t code;
    do {
        code = utf8_next(&text);
    } while (code > 0);
    return code == 0;
}

static bool accepts_auto(const muonshard_param *param) {
    return param->type == MUONSHARD_PARAM_REAL && strcmp(param->initial, "auto") == 0;
}

static bool parse(const muonshard_param *param, const char *text, parsed_value *value) {
    switch (param->type) {
    case MUONSHARD_PARAM_BOOL: return parse_choice("false|true", text, &value->index);
    case MUONSHARD_PARAM_CHOICE: return parse_choice(param->choices, text, &value->index);
    case MUONSHARD_PARAM_INT:
        return parse_integer(text, &value->integer) && (double)value->integer >= param->min &&
               (double)value->integer <= param->max;
    case MUONSHARD_PARAM_REAL:
        if (accepts_auto(param) && strcmp(text, "auto") == 0) {
            value->real = NAN;
            return true;
        }
        return value_parse_real(text, &value->real) && value->real >= param->min &&
               value->real <= param->max;
    case MUONSHARD_PARAM_TEXT: return is_utf8(text);
    case MUONSHARD_PARAM_LIST: return is_utf8(text) && (!*text || text[strlen(text) - 1] == '\n');
    }
    return false;
}

bool value_valid(const muonshard_param *param, const char *text) {
    parsed_value value;
    return parse(param, text, &value);
}

void value_store(const muonshard_param *param, const char *text, void *target) {
    parsed_value value = {0};
    parse(param, text, &value);
    switch (param->type) {
    case MUONSHARD_PARAM_BOOL:
    case MUONSHARD_PARAM_CHOICE: *(int *)target = value.index; break;
    case MUONSHARD_PARAM_INT: *(int64_t *)target = value.integer; break;
    case MUONSHARD_PARAM_REAL: *(double *)target = value.real; break;
    case MUONSHARD_PARAM_TEXT:
    case MUONSHARD_PARAM_LIST: *(const char **)target = text; break;
    }
}

/* The shortest text that reads back as the same number. */
static void print_real(double value, char *text, size_t size) {
    for (int digits = 6; digits <= 17; ++digits) {
        write_real(value, digits, text, size);
        if (read_real(text, NULL) == value)
            break;
    }
}

const char *value_canonical(const muonshard_param *param, const char *text,
                            char buffer[VALUE_TEXT_MAX]) {
    parsed_value value = {0};
    if (param->type == MUONSHARD_PARAM_INT && parse(param, text, &value)) {
        snprintf(buffer, VALUE_TEXT_MAX, "%lld", (long long)value.integer);
        return buffer;
    }
    if (param->type == MUONSHARD_PARAM_REAL && parse(param, text, &value) && !isnan(value.real)) {
        print_real(value.real, buffer, VALUE_TEXT_MAX);
        return buffer;
    }
    return text;
}

void value_range(const muonshard_param *param, char text[VALUE_RANGE_MAX]) {
    char low[VALUE_TEXT_MAX], high[VALUE_TEXT_MAX];
    size_t length = 0;
    text[0] = '\0';
    switch (param->type) {
    case MUONSHARD_PARAM_BOOL: snprintf(text, VALUE_RANGE_MAX, "true, false"); break;
    case MUONSHARD_PARAM_INT:
        snprintf(text, VALUE_RANGE_MAX, "[%.0f, %.0f]", param->min, param->max);
        break;
    case MUONSHARD_PARAM_REAL:
        print_real(param->min, low, sizeof low);
        print_real(param->max, high, sizeof high);
        snprintf(text, VALUE_RANGE_MAX, "[%s, %s]%s", low, high,
                 accepts_auto(param) ? " or auto" : "");
        break;
    case MUONSHARD_PARAM_CHOICE:
        for (const char *c = param->choices; *c && length + 3 < VALUE_RANGE_MAX; ++c) {
            text[length++] = *c == '|' ? ',' : *c;
            if (*c == '|')
                text[length++] = ' ';
        }
        text[length] = '\0';
        break;
    case MUONSHARD_PARAM_TEXT:
    case MUONSHARD_PARAM_LIST: break;
    }
}

void value_expected(const muonshard_param *param, char text[VALUE_RANGE_MAX]) {
    static const char *const kinds[] = {
        [MUONSHARD_PARAM_BOOL] = "one of ",
        [MUONSHARD_PARAM_INT] = "an integer in ",
        [MUONSHARD_PARAM_REAL] = "a number in ",
        [MUONSHARD_PARAM_TEXT] = "UTF-8 text",
        [MUONSHARD_PARAM_LIST] = "a list of UTF-8 text, an item a line",
        [MUONSHARD_PARAM_CHOICE] = "one of ",
    };
    char range[VALUE_RANGE_MAX];
    value_range(param, range);
    const size_t kind = strlen(kinds[param->type]);
    memcpy(text, kinds[param->type], kind);
    snprintf(text + kind, VALUE_RANGE_MAX - kind, "%s", range);
}

const char *value_type_name(muonshard_param_type type) {
    static const char *const names[] = {
        [MUONSHARD_PARAM_BOOL] = "bool",   [MUONSHARD_PARAM_INT] = "integer",
        [MUONSHARD_PARAM_REAL] = "number", [MUONSHARD_PARAM_TEXT] = "text",
        [MUONSHARD_PARAM_LIST] = "list",   [MUONSHARD_PARAM_CHOICE] = "choice",
    };
    return names[type];
}
