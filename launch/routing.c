#include "routing.h"

#include <errno.h>
#include <float.h>
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
    SHAPE,
    DIMS,
    ROLE,
    FORM,
    ROW_SPLITS,
    LR_MULTIPLIER,
    DECAY_MULTIPLIER,
    NULL_GRAD,
    LR,
    MOMENTUM,
    WEIGHT_DECAY,
    LR_SCHEDULE,
    MOMENTUM_SCHEDULE,
    WEIGHT_DECAY_SCHEDULE,
    WORDS
};

enum { FOR_ALL, FOR_UPDATED, FOR_MATRICES }; /* the roles a word has a meaning for */

#define LR_MAX 1e6 /* and of weight decay: what muonshard_step takes */

static const struct {
    const char *name, *values;
    int roles;
} words[WORDS] = {
    [MATCH] = {"match", "names or patterns, separated by commas", FOR_ALL},
    [SHAPE] = {"shape", "up to 8 sizes, numbers > 0 or *, separated by commas", FOR_ALL},
    [DIMS] = {"dims", "an integer from 0 to 8", FOR_ALL},
    [ROLE] = {"role", "matrix, elementwise or frozen", FOR_ALL},
    [FORM] = {"form", "stack or flatten", FOR_MATRICES},
    [ROW_SPLITS] = {"row_splits", "positive row counts, separated by commas", FOR_MATRICES},
    [LR_MULTIPLIER] = {"lr_multiplier", "a number >= 0", FOR_UPDATED},
    [DECAY_MULTIPLIER] = {"decay_multiplier", "a number >= 0", FOR_UPDATED},
    [NULL_GRAD] = {"null_grad", "error, zero or skip", FOR_ALL},
    [LR] = {"lr", "a number from 0 to 1e6", FOR_UPDATED},
    [MOMENTUM] = {"momentum", "a number from 0 to 1", FOR_MATRICES},
    [WEIGHT_DECAY] = {"weight_decay", "a number from 0 to 1e6", FOR_UPDATED},
    [LR_SCHEDULE] = {"lr_schedule",
                     "points step:value separated by commas, values from 0 to 1e6, like the key "
                     "lr_schedule",
                     FOR_UPDATED},
    [MOMENTUM_SCHEDULE] = {"momentum_schedule",
                           "points step:value separated by commas, values from 0 to 1, like the "
                           "key lr_schedule",
                           FOR_MATRICES},
    [WEIGHT_DECAY_SCHEDULE] = {"weight_decay_schedule",
                               "points step:value separated by commas, values from 0 to 1e6, like "
                               "the key lr_schedule",
                               FOR_UPDATED},
};

static int find_word(const char *name) {
    for (int i = 0; i < WORDS; i++)
        if (strcmp(words[i].name, name) == 0)
            return i;
    return -1;
}

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

static bool read_number(const char *text, double max, double *value) {
    char *end;
    *value = strtod(text, &end);
    return end != text && *end == '\0' && *value >= 0 && *value <= max;
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

/* "768,*"; every tensor has as many dimensions as it says. */
static bool read_shape(const char *text, routing_rule *rule) {
    for (rule->shape_dims = 0; rule->shape_dims < MUONSHARD_MAX_DIMS;) {
        int64_t *size = &rule->shape[rule->shape_dims++];
        if (text[0] == '*' && (text[1] == ',' || !text[1])) {
            *size = ROUTING_ANY_SIZE;
            text += text[1] ? 2 : 1;
        } else if (!read_integer(text, ',', 1, INT64_MAX, size, &text))
            return false;
        if (!*text)
            return text[-1] != ',';
    }
    return false;
}

/* Well-formed, and every point's value in [0, max]. */
static bool read_schedule(const char *text, double max, const char **schedule) {
    double value;
    *schedule = text;
    if (!*text || muonshard_schedule_value(text, 0, 0, 0, &value) != MUONSHARD_OK)
        return false;
    for (const char *c = text; (c = strchr(c, ':'));) {
        value = strtod(++c, NULL);
        if (!(value >= 0 && value <= max))
            return false;
    }
    return true;
}

static bool patterns_good(const char *match) {
    size_t length = strlen(match);
    return length > 0 && match[0] != ',' && match[length - 1] != ',' && !strstr(match, ",,");
}

static muonshard_status read_value(enum word word, const char *text, routing_rule *rule) {
    int64_t integer;
    int choice;
    const char *rest;
    bool good = false;
    switch (word) {
    case MATCH:
        rule->match = text;
        good = patterns_good(text);
        break;
    case SHAPE: good = read_shape(text, rule); break;
    case DIMS:
        good = read_integer(text, '\0', 0, MUONSHARD_MAX_DIMS, &integer, &rest);
        rule->dims = (int)integer;
        break;
    case ROLE:
        good = read_choice(text, role_names, &choice);
        rule->role = (muonshard_role)(MUONSHARD_ROLE_MATRIX + choice);
        break;
    case FORM: good = read_choice(text, form_names, &rule->form); break;
    case NULL_GRAD: good = read_choice(text, null_grad_names, &rule->null_grad); break;
    case ROW_SPLITS: return read_splits(text, rule);
    case LR_MULTIPLIER: good = read_number(text, DBL_MAX, &rule->lr_multiplier); break;
    case DECAY_MULTIPLIER: good = read_number(text, DBL_MAX, &rule->decay_multiplier); break;
    case LR: good = read_number(text, LR_MAX, &rule->lr.value); break;
    case MOMENTUM: good = read_number(text, 1, &rule->momentum.value); break;
    case WEIGHT_DECAY: good = read_number(text, LR_MAX, &rule->weight_decay.value); break;
    case LR_SCHEDULE: good = read_schedule(text, LR_MAX, &rule->lr.schedule); break;
    case MOMENTUM_SCHEDULE: good = read_schedule(text, 1, &rule->momentum.schedule); break;
    case WEIGHT_DECAY_SCHEDULE:
        good = read_schedule(text, LR_MAX, &rule->weight_decay.schedule);
        break;
    case WORDS: break;
    }
    return good ? MUONSHARD_OK : MUONSHARD_ERR_CONFIG;
}

/* ---- rules ---- */

/* Reads WORD=VALUE, which it cuts at the '='. */
static muonshard_status parse_word(char *text, size_t number, bool *seen, routing_rule *rule,
                                   char *message) {
    const muonshard_status bad = MUONSHARD_ERR_CONFIG;
    char *value = strchr(text, '=');
    if (!value)
        return message_fail(message, bad, "groups: rule %zu: \"%s\" is not of the form WORD=VALUE",
                            number, text);
    *value++ = '\0';
    int word = find_word(text);
    if (word < 0)
        return message_fail(message, bad,
                            "groups: rule %zu: unknown word \"%s\"; known are match, shape, dims, "
                            "role, form, row_splits, lr_multiplier, decay_multiplier, null_grad, "
                            "lr, momentum, weight_decay and their schedules (lr_schedule...)",
                            number, text);
    if (seen[word])
        return message_fail(message, bad, "groups: rule %zu: %s is given twice", number, text);
    seen[word] = true;
    muonshard_status status = read_value((enum word)word, value, rule);
    if (status == MUONSHARD_ERR_MEMORY)
        return message_fail(message, status, "groups: out of memory");
    if (status != MUONSHARD_OK)
        return message_fail(message, status, "groups: rule %zu: %s is \"%s\"; allowed: %s", number,
                            text, value, words[word].values);
    return MUONSHARD_OK;
}

static muonshard_status check_rule(const routing_rule *rule, const bool *seen, size_t number,
                                   char *message) {
    const muonshard_status bad = MUONSHARD_ERR_CONFIG;
    if (!seen[MATCH] && !seen[SHAPE] && !seen[DIMS])
        return message_fail(message, bad, "groups: rule %zu has no match, shape or dims", number);
    if (!seen[ROLE])
        return message_fail(message, bad, "groups: rule %zu has no role", number);
    for (int i = 0; i < WORDS; i++)
        if (seen[i] && ((words[i].roles == FOR_MATRICES && rule->role != MUONSHARD_ROLE_MATRIX) ||
                        (words[i].roles == FOR_UPDATED && rule->role == MUONSHARD_ROLE_FROZEN)))
            return message_fail(message, bad, "groups: rule %zu (%s): %s is for role=%s only",
                                number, rule->text, words[i].name,
                                words[i].roles == FOR_MATRICES ? "matrix"
                                                               : "matrix and role=elementwise");
    return MUONSHARD_OK;
}

/* `text` has room for it, and zeros behind it. */
static void append(char *text, const char *word) {
    size_t at = strlen(text);
    if (at)
        text[at++] = ' ';
    memcpy(text + at, word, strlen(word));
}

static muonshard_status parse_rule(const char *line, size_t length, size_t number,
                                   routing_rule *rule, char *message) {
    bool seen[WORDS] = {false};
    const routing_value none = {NAN, NULL};
    *rule = (routing_rule){.dims = -1,
                           .shape_dims = -1,
                           .form = -1,
                           .null_grad = -1,
                           .lr_multiplier = NAN,
                           .decay_multiplier = NAN,
                           .lr = none,
                           .momentum = none,
                           .weight_decay = none};
    rule->line = strndup(line, length);
    rule->text = calloc(length + 1, 1);
    if (!rule->line || !rule->text)
        return message_fail(message, MUONSHARD_ERR_MEMORY, "groups: out of memory");
    char *next = NULL;
    for (char *word = strtok_r(rule->line, " \t", &next); word;
         word = strtok_r(NULL, " \t", &next)) {
        if (strncmp(word, "role=", 5) != 0)
            append(rule->text, word);
        muonshard_status status = parse_word(word, number, seen, rule, message);
        if (status != MUONSHARD_OK)
            return status;
    }
    for (int i = LR; i <= WEIGHT_DECAY_SCHEDULE; i++)
        rule->group |= seen[i]; /* routing_parse numbers them */
    return check_rule(rule, seen, number, message);
}

muonshard_status routing_parse(const char *groups, routing *rules, char *message) {
    size_t capacity = 0;
    *rules = (routing){.group_count = 1};
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
        rule->group = rule->group ? (int)rules->group_count++ : 0;
        line += length + (line[length] == '\n');
    }
    return MUONSHARD_OK;
}

void routing_free(routing *rules) {
    for (size_t i = 0; i < rules->rule_count; i++) {
        free(rules->rules[i].line);
        free(rules->rules[i].text);
        free(rules->rules[i].row_splits);
    }
    free(rules->rules);
    *rules = (routing){0};
}

/* ---- tensors ---- */

static bool shape_fits(const routing_rule *rule, const muonshard_tensor_desc *tensor) {
    if ((rule->dims >= 0 && rule->dims != tensor->dims) ||
        (rule->shape_dims >= 0 && rule->shape_dims != tensor->dims))
        return false;
    for (int d = 0; d < rule->shape_dims; d++)
        if (rule->shape[d] != ROUTING_ANY_SIZE && rule->shape[d] != tensor->shape[d])
            return false;
    return true;
}

/* 1: fits, 0: does not, -1: no memory. */
static int rule_fits(const routing_rule *rule, const muonshard_tensor_desc *tensor) {
    if (!shape_fits(rule, tensor) || !rule->match)
        return shape_fits(rule, tensor);
    char *patterns = strdup(rule->match), *next = NULL;
    int fits = patterns ? 0 : -1;
    for (char *p = patterns ? strtok_r(patterns, ",", &next) : NULL; p && !fits;
         p = strtok_r(NULL, ",", &next))
        fits = fnmatch(p, tensor->name, 0) == 0;
    free(patterns);
    return fits;
}

/* Rows of each matrix before row_splits cut them. */
static int64_t matrix_rows(const muonshard_tensor_desc *tensor) {
    return tensor->form == MUONSHARD_FLATTEN ? tensor->shape[0] : tensor->shape[tensor->dims - 2];
}

static muonshard_status check_matrix(const routing_rule *rule, size_t number,
                                     const muonshard_tensor_desc *tensor, char *message) {
    if (tensor->dims < 2)
        return message_fail(message, MUONSHARD_ERR_CONFIG,
                            "groups: rule %zu (%s) makes tensor \"%s\" a matrix, but it has %d "
                            "dimension%s; at least 2 are needed",
                            number, rule->text, tensor->name, tensor->dims,
                            tensor->dims == 1 ? "" : "s");
    if (tensor->row_split_count == 0)
        return MUONSHARD_OK;
    int64_t rows = matrix_rows(tensor), sum = 0;
    for (size_t i = 0; i < tensor->row_split_count; i++)
        if (__builtin_add_overflow(sum, tensor->row_splits[i], &sum))
            sum = INT64_MAX;
    if (sum != rows)
        return message_fail(message, MUONSHARD_ERR_CONFIG,
                            "groups: rule %zu (%s): row_splits add up to %" PRId64
                            ", tensor \"%s\" has %" PRId64 " rows",
                            number, rule->text, sum, tensor->name, rows);
    return MUONSHARD_OK;
}

void routing_default(muonshard_tensor_desc *tensor) {
    tensor->role = tensor->dims >= 2 ? MUONSHARD_ROLE_MATRIX : MUONSHARD_ROLE_ELEMENTWISE;
}

static void follow(const routing_rule *rule, muonshard_tensor_desc *tensor) {
    tensor->role = rule->role;
    if (rule->row_split_count || rule->form >= 0) { /* splits are those of one form */
        tensor->row_splits = rule->row_splits;
        tensor->row_split_count = rule->row_split_count;
    }
    if (rule->form >= 0)
        tensor->form = (muonshard_matrix_form)rule->form;
    if (rule->null_grad >= 0)
        tensor->null_grad = (muonshard_null_grad)rule->null_grad;
    if (!isnan(rule->lr_multiplier))
        tensor->lr_multiplier = rule->lr_multiplier;
    if (!isnan(rule->decay_multiplier))
        tensor->decay_multiplier = rule->decay_multiplier;
    tensor->group = rule->group;
}

muonshard_status routing_apply(routing *rules, muonshard_tensor_desc *tensor, int *chosen,
                               char *message) {
    int index = -1;
    muonshard_status status = MUONSHARD_OK;
    for (size_t i = 0; i < rules->rule_count && index < 0; i++) {
        routing_rule *rule = &rules->rules[i];
        int fits = rule_fits(rule, tensor);
        if (fits < 0)
            return message_fail(message, MUONSHARD_ERR_MEMORY, "groups: out of memory");
        if (!fits)
            continue;
        index = (int)i;
        rule->matched++;
        follow(rule, tensor);
        if (tensor->role == MUONSHARD_ROLE_MATRIX)
            status = check_matrix(rule, i + 1, tensor, message);
    }
    if (chosen)
        *chosen = index;
    if (tensor->role != MUONSHARD_ROLE_MATRIX) {
        tensor->form = MUONSHARD_STACK;
        tensor->row_splits = NULL;
        tensor->row_split_count = 0;
    }
    return status;
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

static int wider(int width, const char *text) {
    int length = (int)strlen(text);
    return length > width ? length : width;
}

void routing_print(const routing *rules, const muonshard_tensor_desc *tensors,
                   const char *const *dtypes, const int *chosen, size_t count, FILE *out) {
    char shape[MUONSHARD_MAX_DIMS * 22 + 3], matrices[24];
    int name_width = 6, shape_width = 5;
    for (size_t i = 0; i < count; i++) {
        shape_text(&tensors[i], shape, sizeof shape);
        name_width = wider(name_width, tensors[i].name);
        shape_width = wider(shape_width, shape);
    }
    fprintf(out, "# %-*s  %-*s  %-5s  %-11s  %8s  rule\n", name_width, "tensor", shape_width,
            "shape", "dtype", "role", "matrices");
    for (size_t i = 0; i < count; i++) {
        shape_text(&tensors[i], shape, sizeof shape);
        snprintf(matrices, sizeof matrices, "%" PRId64, matrix_count(&tensors[i]));
        fprintf(out, "  %-*s  %-*s  %-5s  %-11s  %8s  ", name_width, tensors[i].name, shape_width,
                shape, dtypes[i], role_names[tensors[i].role - MUONSHARD_ROLE_MATRIX],
                tensors[i].role == MUONSHARD_ROLE_MATRIX ? matrices : "-");
        if (chosen[i] >= 0)
            fprintf(out, "%d: %s\n", chosen[i] + 1, rules->rules[chosen[i]].text);
        else
            fprintf(out, "none\n");
    }
}

void routing_warn_unused(const routing *rules, const char *command_name, FILE *out) {
    for (size_t i = 0; i < rules->rule_count; i++)
        if (rules->rules[i].matched == 0)
            fprintf(out, "muonshard %s: warning: groups: rule %zu (%s) decides about no tensor\n",
                    command_name, i + 1, rules->rules[i].text);
}
