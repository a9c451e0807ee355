#include "model_file.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "config.h"
#include "message.h"

const muonshard_param model_file_table[] = {
    {"model", MUONSHARD_PARAM_TEXT, offsetof(model_file, name), "model", 0, 0, NULL,
     "Name of the model, for tables."},
    {"tensors", MUONSHARD_PARAM_LIST, offsetof(model_file, tensor_lines), "", 0, 0, NULL,
     "Its tensors: name, role (matrix, elementwise or frozen), shape, axes (what its first sizes "
     "count: layer, expert), dtype and grad_dtype (fp32, bf16 or fp16), and for matrices form "
     "(stack or flatten) and row_splits."},
    {"pipeline_parallel", MUONSHARD_PARAM_INT, offsetof(model_file, pipeline_parallel), "1", 1,
     16384, NULL, "Stages the layers are spread over; a rank holds one."},
    {"expert_parallel", MUONSHARD_PARAM_INT, offsetof(model_file, expert_parallel), "1", 1, 16384,
     NULL, "Ranks the experts are spread over."},
};
const size_t model_file_table_count = sizeof model_file_table / sizeof model_file_table[0];

/* Sizes that can be added and multiplied without overflow; and matrices, each of which is a line of
 * a plan. */
/* Sizes can be added to and multiplied without overflow; a plan has a line for each matrix. */
#define LARGEST_SIZE  ((int64_t)1 << 40)
#define MOST_MATRICES 4194304.0

/* "12,2304,768" into `numbers` [max]; -1 when it is not such a list. */
static int read_numbers(const char *text, int64_t *numbers, int max) {
    int count = 0;
    while (*text) {
        char *end;
        errno = 0;
        const long long n = strtoll(text, &end, 10);
        if (end == text || errno || n < 1 || n > LARGEST_SIZE || count == max ||
            (*end && *end != ','))
            return -1;
        numbers[count++] = n;
        text = *end ? end + 1 : end;
        if (*end && !*text)
            return -1;
    }
    return count;
}

static bool read_role(const char *text, muonshard_role *role) {
    *role = strcmp(text, "matrix") == 0        ? MUONSHARD_ROLE_MATRIX
            : strcmp(text, "elementwise") == 0 ? MUONSHARD_ROLE_ELEMENTWISE
            : strcmp(text, "frozen") == 0      ? MUONSHARD_ROLE_FROZEN
                                               : MUONSHARD_ROLE_UNSET;
    return *role != MUONSHARD_ROLE_UNSET;
}

static bool read_dtype(const char *text, muonshard_dtype *dtype) {
    *dtype = strcmp(text, "bf16") == 0   ? MUONSHARD_BF16
             : strcmp(text, "fp16") == 0 ? MUONSHARD_FP16
                                         : MUONSHARD_FP32;
    return *dtype != MUONSHARD_FP32 || strcmp(text, "fp32") == 0;
}

static bool read_axes(const char *text, struct model_axes *axes) {
    axes->layer = strncmp(text, "layer", 5) == 0;
    const char *rest = text + (axes->layer ? 5 : 0);
    axes->expert = strcmp(rest, axes->layer ? ",expert" : "expert") == 0;
    return axes->expert || (axes->layer && !*rest);
}

/* `splits` has room for `room` numbers; what was read is taken from it. */
static muonshard_status read_word(muonshard_tensor_desc *t, struct model_axes *axes,
                                  const char *key, char *value, int64_t *splits, int room,
                                  char *message) {
    int count = 0;
    bool good = true;
    if (strcmp(key, "name") == 0) {
        t->name = value;
    } else if (strcmp(key, "role") == 0) {
        good = read_role(value, &t->role);
    } else if (strcmp(key, "shape") == 0) {
        count = read_numbers(value, t->shape, MUONSHARD_MAX_DIMS);
        t->dims = count;
    } else if (strcmp(key, "row_splits") == 0) {
        count = read_numbers(value, splits, room);
        t->row_splits = splits;
        t->row_split_count = count > 0 ? (size_t)count : 0;
    } else if (strcmp(key, "axes") == 0) {
        good = read_axes(value, axes);
    } else if (strcmp(key, "dtype") == 0) {
        good = read_dtype(value, &t->dtype);
    } else if (strcmp(key, "grad_dtype") == 0) {
        good = read_dtype(value, &t->grad_dtype);
    } else if (strcmp(key, "form") == 0) {
        good = strcmp(value, "stack") == 0 || strcmp(value, "flatten") == 0;
        t->form = strcmp(value, "flatten") == 0 ? MUONSHARD_FLATTEN : MUONSHARD_STACK;
    } else {
        return message_fail(message, MUONSHARD_ERR_CONFIG,
                            "tensors: '%s': unknown word '%s'; known are name, role, shape, axes, "
                            "dtype, grad_dtype, form, row_splits",
                            t->name ? t->name : "?", key);
    }
    if (!good || count < 0)
        return message_fail(message, MUONSHARD_ERR_CONFIG, "tensors: '%s': %s is '%s'",
                            t->name ? t->name : "?", key, value);
    return MUONSHARD_OK;
}

static muonshard_status read_line(muonshard_tensor_desc *t, struct model_axes *axes, char *line,
                                  int64_t *splits, int room, char *message) {
    *t = (muonshard_tensor_desc)MUONSHARD_TENSOR_DESC_INIT;
    char *next = NULL;
    for (char *word = strtok_r(line, " ", &next); word; word = strtok_r(NULL, " ", &next)) {
        char *value = strchr(word, '=');
        if (!value)
            return message_fail(message, MUONSHARD_ERR_CONFIG, "tensors: '%s' is not WORD=VALUE",
                                word);
        *value++ = '\0';
        const muonshard_status status = read_word(t, axes, word, value, splits, room, message);
        if (status != MUONSHARD_OK)
            return status;
    }
    if (!t->name || t->role == MUONSHARD_ROLE_UNSET || t->dims == 0)
        return message_fail(message, MUONSHARD_ERR_CONFIG, "tensors: '%s' has no %s",
                            t->name ? t->name : "?",
                            !t->name       ? "name"
                            : t->dims == 0 ? "shape"
                                           : "role");
    const int named = axes->layer + axes->expert;
    if (named && named > t->dims - (t->role == MUONSHARD_ROLE_MATRIX ? 2 : 1))
        return message_fail(message, MUONSHARD_ERR_CONFIG,
                            "tensors: '%s': %d axes and %d sizes leave none for the %s", t->name,
                            named, t->dims,
                            t->role == MUONSHARD_ROLE_MATRIX ? "matrix" : "elements");
    return MUONSHARD_OK;
}

static double matrices_of(const muonshard_tensor_desc *t) {
    double matrices = t->row_split_count ? (double)t->row_split_count : 1.0;
    for (int d = 0; t->form == MUONSHARD_STACK && d < t->dims - 2; d++)
        matrices *= (double)t->shape[d];
    return t->role == MUONSHARD_ROLE_MATRIX ? matrices : 0.0;
}

/* `matrices` of all tensors up to this one. */
static muonshard_status check_count(const muonshard_tensor_desc *t, double matrices,
                                    char *message) {
    return matrices > MOST_MATRICES
               ? message_fail(message, MUONSHARD_ERR_UNSUPPORTED,
                              "tensors: '%s': up to it they are %.4g matrices; at most %.0f can "
                              "be planned",
                              t->name, matrices, MOST_MATRICES)
               : MUONSHARD_OK;
}

/* The file and line before what is wrong with tensor `index`. */
static muonshard_status at_line(const char *path, size_t index, muonshard_status status,
                                char *message) {
    char what[COMMAND_MESSAGE];
    const size_t line = config_item_line(path, "tensors", index);
    snprintf(what, sizeof what, "%s", message);
    return line ? message_fail(message, status, "%s:%zu: %s", path, line, what)
                : message_fail(message, status, "%s: %s", path, what);
}

static muonshard_status check_degrees(const model_file *model, size_t index, char *message) {
    const muonshard_tensor_desc *t = &model->tensors[index];
    const struct model_axes *axes = &model->axes[index];
    const int64_t experts = axes->expert ? t->shape[axes->layer] : 0;
    return experts % model->expert_parallel
               ? message_fail(message, MUONSHARD_ERR_CONFIG,
                              "tensors: '%s': its %lld experts can't be spread evenly over "
                              "expert_parallel %lld",
                              t->name, (long long)experts, (long long)model->expert_parallel)
               : MUONSHARD_OK;
}

muonshard_status model_file_parse(model_file *model, const char *path, char *message) {
    size_t lines = 0, commas = 0;
    for (const char *c = model->tensor_lines; *c; c++) {
        lines += *c == '\n';
        commas += *c == ',';
    }
    if (!lines)
        return message_fail(message, MUONSHARD_ERR_CONFIG, "%s: tensors: the model has none", path);
    model->tensors = calloc(lines, sizeof *model->tensors);
    model->axes = calloc(lines, sizeof *model->axes);
    model->splits = calloc(lines + commas, sizeof *model->splits);
    model->text = strdup(model->tensor_lines);
    if (!model->tensors || !model->axes || !model->splits || !model->text)
        return message_fail(message, MUONSHARD_ERR_MEMORY, "out of memory");
    int64_t *splits = model->splits;
    int room = (int)(lines + commas);
    double matrices = 0.0;
    for (char *line = model->text; *line;) {
        muonshard_tensor_desc *t = &model->tensors[model->tensor_count];
        const size_t index = model->tensor_count;
        char *end = strchr(line, '\n');
        *end = '\0';
        muonshard_status status = read_line(t, &model->axes[index], line, splits, room, message);
        if (status == MUONSHARD_OK)
            status = check_degrees(model, index, message);
        if (status == MUONSHARD_OK)
            status = check_count(t, matrices += matrices_of(t), message);
        if (status != MUONSHARD_OK)
            return at_line(path, index, status, message);
        splits += t->row_split_count;
        room -= (int)t->row_split_count;
        model->tensor_count++;
        line = end + 1;
    }
    return MUONSHARD_OK;
}

void model_file_free(model_file *model) {
    free(model->tensors);
    free(model->axes);
    free(model->splits);
    free(model->text);
    model->tensors = NULL;
    model->axes = NULL;
    model->splits = NULL;
    model->text = NULL;
    model->tensor_count = 0;
}

bool model_file_tensor(const model_file *model, size_t index, model_part part,
                       muonshard_tensor_desc *desc) {
    const struct model_axes *axes = &model->axes[index];
    const int64_t stages = model->pipeline_parallel;
    if (axes->expert != (part == MODEL_EXPERTS) && model->expert_parallel > 1)
        return false;
    *desc = model->tensors[index];
    if (axes->layer) /* the stage that has most of them */
        desc->shape[0] = (desc->shape[0] + stages - 1) / stages;
    if (axes->expert)
        desc->shape[axes->layer] /= model->expert_parallel;
    return part == MODEL_SHARED || model->expert_parallel > 1;
}

muonshard_status model_file_repeat(model_file *model, int64_t times, char *message) {
    double matrices = 0.0;
    for (size_t i = 0; i < model->tensor_count; i++) {
        muonshard_tensor_desc *t = &model->tensors[i];
        const bool matrix = t->role == MUONSHARD_ROLE_MATRIX;
        if (matrix && (t->form == MUONSHARD_FLATTEN || t->dims == MUONSHARD_MAX_DIMS))
            return message_fail(message, MUONSHARD_ERR_UNSUPPORTED,
                                "tensor '%s' can't be had %lld times: it is no stack", t->name,
                                (long long)times);
        if (matrix && t->dims == 2) {
            memmove(t->shape + 1, t->shape, 2 * sizeof *t->shape);
            t->shape[0] = 1;
            t->dims = 3;
        }
        if (__builtin_mul_overflow(t->shape[0], times, &t->shape[0]))
            return message_fail(message, MUONSHARD_ERR_UNSUPPORTED,
                                "tensor '%s' can't be had %lld times: it is too large", t->name,
                                (long long)times);
        const muonshard_status status = check_count(t, matrices += matrices_of(t), message);
        if (status)
            return status;
    }
    return MUONSHARD_OK;
}

muonshard_status model_file_layers(model_file *model, int64_t layers, int64_t *had, char *message) {
    *had = 0;
    for (size_t i = 0; i < model->tensor_count; i++)
        if (model->axes[i].layer && model->tensors[i].shape[0] > *had)
            *had = model->tensors[i].shape[0];
    if (layers > *had)
        return message_fail(message, MUONSHARD_ERR_ARGUMENT,
                            "%lld layers of %s can't be had: it has %lld", (long long)layers,
                            model->name, (long long)*had);
    for (size_t i = 0; i < model->tensor_count; i++)
        if (model->axes[i].layer && model->tensors[i].shape[0] > layers)
            model->tensors[i].shape[0] = layers;
    return MUONSHARD_OK;
}
