#include "routing.h"

#include <errno.h>
#include <fnmatch.h>
#include <inttypes.h>
#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "message.h"

static const char *const role_names[] = {"matrix", "elementwise", "frozen", NULL};
static const char *const form_names[] = {"stack", "flatten", NULL};
static const char *const null_grad_names[] = {"error", "zero", "skip", NULL};

enum word {
    MATCH,
    ROLE,
    FORM,
    ROW_SPLITS,
    LR_MULTIPLIER,
    DECAY_MULTIPLIER,
    GROUP,
    NULL_GRAD,
    WORDS
};
static const char *const word_names[] = {"match",      "role",          "form",
                                         "row_splits", "lr_multiplier", "decay_multiplier",
                                         "group",      "null_grad",     NULL};
static const char *const word_values[] = {"names or patterns, separated by commas",
                                          "matrix, elementwise or frozen",
                                          "stack or flatten",
                                          "positive row counts, separated by commas",
                                          "a number >= 0",
                                          "a number >= 0",
                                          "an integer from 0 to 65535",
                                          "error, zero or skip"};

static int find_name(const char *const *names, const char *name) {
    for (int i = 0; names[i]; i++)
        if (strcmp(names[i], name) == 0)
            return i;
    return -1;
}

/* ---- values ---- */

static bool read_choice(const char *text, const char *const *names, int *value) {
    *value = find_name(names, text);
    return *value >= 0;
}

static bool read_multiplier(const char *text, double *value) {
    char *end;
    *value = strtod(text, &end);
    return end != text && *end == '\0' && isfinite(*value) && *value >= 0;
}

static bool read_integer(const char *text, char stop, int64_t min, int64_t max, int64_t *value,
                         const char **rest) {
    char *end;
    errno = 0;
    long long read = strtoll(text, &end, 10);
    *value = read;
    *rest = *end && *end == stop ? end + 1 : end;
    return end != text && (*end == '\0' || (*end == stop && end[1])) && errno == 0 && read >= min &&
           read <= max;
}

/* ERR_CONFIG: not a list of positive numbers; the caller says so. */
static muonshard_status read_splits(const char *text, routing_rule *rule) {
    size_t count = 1;
    for (const char *c = text; *c; c++)
        count += *c == ',';
    rule->row_splits = calloc(count, sizeof *rule->row_splits);
    if (!rule->row_splits)
        return MUONSHARD_ERR_MEMORY;
    rule->row_split_count = count;
    for (size_t i = 0; i < count; i++)
        if (!read_integer(text, ',', 1, INT64_MAX, &rule->row_splits[i], &text))
            return MUONSHARD_ERR_CONFIG;
    return MUONSHARD_OK;
}

static bool patterns_good(const char *match) {
    size_t length = strlen(match);
    return length > 0 && match[0] != ',' && match[length - 1] != ',' && !strstr(match, ",,");
}

static muonshard_status read_value(enum word word, char *text, routing_rule *rule) {
    int64_t integer;
    int choice;
    const char *rest;
    bool good = false;
    switch (word) {
    case MATCH:
        rule->match = text;
        good = patterns_good(text);
        break;
    case ROLE:
        good = read_choice(text, role_names, &choice);
        rule->role = (muonshard_role)(MUONSHARD_ROLE_MATRIX + choice);
        break;
    case FORM:
        good = read_choice(text, form_names, &choice);
        rule->form = (muonshard_matrix_form)choice;
        break;
    case NULL_GRAD:
        good = read_choice(text, null_grad_names, &choice);
        rule->null_grad = (muonshard_null_grad)choice;
        break;
    case LR_MULTIPLIER: good = read_multiplier(text, &rule->lr_multiplier); break;
    case DECAY_MULTIPLIER: good = read_multiplier(text, &rule->decay_multiplier); break;
    case GROUP:
        good = read_integer(text, '\0', 0, 65535, &integer, &rest);
        rule->group = (int)integer;
        break;
    case ROW_SPLITS: return read_splits(text, rule);
    case WORDS: break;
    }
    return good ? MUONSHARD_OK : MUONSHARD_ERR_CONFIG;
}

/* ---- rules ---- */

static muonshard_status parse_rule(const char *line, size_t length, size_t number,
                                   routing_rule *rule, char *message) {
    bool seen[WORDS] = {false};
    const muonshard_status bad = MUONSHARD_ERR_CONFIG;
    *rule = (routing_rule){.lr_multiplier = 1, .decay_multiplier = 1};
    rule->line = strndup(line, length);
    if (!rule->line)
        return message_fail(message, MUONSHARD_ERR_MEMORY, "groups: out of memory");
    char *next = NULL;
    for (char *word = strtok_r(rule->line, " \t", &next); word;
         word = strtok_r(NULL, " \t", &next)) {
        char *value = strchr(word, '=');
        if (!value)
            return message_fail(message, bad,
                                "groups: rule %zu: \"%s\" is not of the form WORD=VALUE", number,
                                word);
        *value++ = '\0';
        int known = find_name(word_names, word);
        if (known < 0)
            return message_fail(
                message, bad,
                "groups: rule %zu: unknown word \"%s\"; known are match, role, form, "
                "row_splits, lr_multiplier, decay_multiplier, group, null_grad",
                number, word);
        if (seen[known])
            return message_fail(message, bad, "groups: rule %zu: %s is given twice", number, word);
        seen[known] = true;
        muonshard_status status = read_value((enum word)known, value, rule);
        if (status == MUONSHARD_ERR_MEMORY)
            return message_fail(message, status, "groups: out of memory");
        if (status != MUONSHARD_OK)
            return message_fail(message, status, "groups: rule %zu: %s is \"%s\"; allowed: %s",
                                number, word, value, word_values[known]);
    }
    if (!seen[MATCH] || !seen[ROLE])
        return message_fail(message, bad, "groups: rule %zu has no %s", number,
                            seen[MATCH] ? "role" : "match");
    if (rule->role != MUONSHARD_ROLE_MATRIX && (seen[FORM] || seen[ROW_SPLITS]))
        return message_fail(message, bad, "groups: rule %zu (match=%s): %s is for role=matrix only",
                            number, rule->match, seen[FORM] ? "form" : "row_splits");
    return MUONSHARD_OK;
}

muonshard_status routing_parse(const char *groups, routing *rules, char *message) {
    size_t capacity = 0;
    *rules = (routing){0};
    for (const char *c = groups; *c; c++)
        capacity += *c == '\n';
    rules->rules = calloc(capacity + 1, sizeof *rules->rules);
    if (!rules->rules)
        return message_fail(message, MUONSHARD_ERR_MEMORY, "groups: out of memory");
    for (const char *line = groups; *line;) {
        size_t length = strcspn(line, "\n");
        routing_rule *rule = &rules->rules[rules->rule_count++];
        muonshard_status status = parse_rule(line, length, rules->rule_count, rule, message);
        if (status != MUONSHARD_OK) {
            routing_free(rules);
            return status;
        }
        line += length + (line[length] == '\n');
    }
    return MUONSHARD_OK;
}

void routing_free(routing *rules) {
    for (size_t i = 0; i < rules->rule_count; i++) {
        free(rules->rules[i].line);
        free(rules->rules[i].row_splits);
    }
    free(rules->rules);
    *rules = (routing){0};
}

/* ---- tensors ---- */

/* 1: matches, 0: does not, -1: no memory. */
static int rule_matches(const routing_rule *rule, const char *name) {
    char *patterns = strdup(rule->match), *next = NULL;
    int matches = patterns ? 0 : -1;
    for (char *p = patterns ? strtok_r(patterns, ",", &next) : NULL; p && !matches;
         p = strtok_r(NULL, ",", &next))
        matches = fnmatch(p, name, 0) == 0;
    free(patterns);
    return matches;
}

/* Rows of each matrix before row_splits cut them. */
static int64_t matrix_rows(const muonshard_tensor_desc *tensor) {
    return tensor->form == MUONSHARD_FLATTEN ? tensor->shape[0] : tensor->shape[tensor->dims - 2];
}

static muonshard_status check_fit(const routing_rule *rule, size_t number,
                                  const muonshard_tensor_desc *tensor, char *message) {
    if (tensor->dims < 2)
        return message_fail(
            message, MUONSHARD_ERR_CONFIG,
            "groups: rule %zu (match=%s) makes tensor \"%s\" a matrix, but it has %d "
            "dimension%s; at least 2 are needed",
            number, rule->match, tensor->name, tensor->dims, tensor->dims == 1 ? "" : "s");
    if (rule->row_split_count == 0)
        return MUONSHARD_OK;
    int64_t rows = matrix_rows(tensor), sum = 0;
    for (size_t i = 0; i < rule->row_split_count; i++)
        if (__builtin_add_overflow(sum, rule->row_splits[i], &sum))
            sum = INT64_MAX;
    if (sum != rows)
        return message_fail(message, MUONSHARD_ERR_CONFIG,
                            "groups: rule %zu (match=%s): row_splits add up to %" PRId64
                            ", tensor \"%s\" has %" PRId64 " rows",
                            number, rule->match, sum, tensor->name, rows);
    return MUONSHARD_OK;
}

muonshard_status routing_apply(routing *rules, muonshard_tensor_desc *tensor, int *chosen,
                               char *message) {
    if (chosen)
        *chosen = -1;
    tensor->role = tensor->dims >= 2 ? MUONSHARD_ROLE_MATRIX : MUONSHARD_ROLE_ELEMENTWISE;
    tensor->form = MUONSHARD_STACK;
    for (size_t i = 0; i < rules->rule_count; i++) {
        routing_rule *rule = &rules->rules[i];
        int matches = rule_matches(rule, tensor->name);
        if (matches < 0)
            return message_fail(message, MUONSHARD_ERR_MEMORY, "groups: out of memory");
        if (!matches)
            continue;
        rule->matched++;
        if (chosen)
            *chosen = (int)i;
        tensor->role = rule->role;
        tensor->form = rule->form;
        tensor->row_splits = rule->row_splits;
        tensor->row_split_count = rule->row_split_count;
        tensor->null_grad = rule->null_grad;
        tensor->lr_multiplier = rule->lr_multiplier;
        tensor->decay_multiplier = rule->decay_multiplier;
        tensor->group = rule->group;
        return rule->role == MUONSHARD_ROLE_MATRIX ? check_fit(rule, i + 1, tensor, message)
                                                   : MUONSHARD_OK;
    }
    return MUONSHARD_OK;
}

/* ---- telling ---- */

static void shape_text(const muonshard_tensor_desc *tensor, char *text, size_t size) {
    size_t at = (size_t)snprintf(text, size, "[");
    for (int d = 0; d < tensor->dims && at < size; d++)
        at += (size_t)snprintf(text + at, size - at, "%s%" PRId64, d ? ", " : "", tensor->shape[d]);
    if (at < size)
        snprintf(text + at, size - at, "]");
}

static int64_t matrix_count(const muonshard_tensor_desc *tensor) {
    int64_t matrices = tensor->row_split_count ? (int64_t)tensor->row_split_count : 1;
    for (int d = 0; tensor->form == MUONSHARD_STACK && d < tensor->dims - 2; d++)
        matrices *= tensor->shape[d];
    return matrices;
}

void routing_print(const routing *rules, const muonshard_tensor_desc *tensors, const int *chosen,
                   size_t count, FILE *out) {
    char shape[MUONSHARD_MAX_DIMS * 22 + 3];
    int name_width = 6, shape_width = 5;
    for (size_t i = 0; i < count; i++) {
        shape_text(&tensors[i], shape, sizeof shape);
        if ((int)strlen(tensors[i].name) > name_width)
            name_width = (int)strlen(tensors[i].name);
        if ((int)strlen(shape) > shape_width)
            shape_width = (int)strlen(shape);
    }
    fprintf(out, "# %-*s  %-*s  %-11s  %8s  %s\n", name_width, "tensor", shape_width, "shape",
            "role", "matrices", "rule");
    for (size_t i = 0; i < count; i++) {
        bool matrix = tensors[i].role == MUONSHARD_ROLE_MATRIX;
        shape_text(&tensors[i], shape, sizeof shape);
        fprintf(out, "  %-*s  %-*s  %-11s  ", name_width, tensors[i].name, shape_width, shape,
                role_names[tensors[i].role - MUONSHARD_ROLE_MATRIX]);
        if (matrix)
            fprintf(out, "%8" PRId64 "  ", matrix_count(&tensors[i]));
        else
            fprintf(out, "%8s  ", "-");
        if (chosen[i] >= 0)
            fprintf(out, "%d: %s%s\n", chosen[i] + 1, rules->rules[chosen[i]].match,
                    tensors[i].form == MUONSHARD_FLATTEN ? ", flattened" : "");
        else
            fprintf(out, "none\n");
    }
}

void routing_warn_unused(const routing *rules, const char *command_name, FILE *out) {
    for (size_t i = 0; i < rules->rule_count; i++)
        if (rules->rules[i].matched == 0)
            fprintf(out,
                    "muonshard %s: warning: groups: rule %zu (match=%s) decides about no tensor\n",
                    command_name, i + 1, rules->rules[i].match);
}
