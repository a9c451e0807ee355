#include "model_file.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include "message.h"

const muonshard_param model_file_table[] = {
    {"model", MUONSHARD_PARAM_TEXT, offsetof(model_file, name), "model", 0, 0, NULL,
     "Name of the model, for tables."},
    {"tensors", MUONSHARD_PARAM_LIST, offsetof(model_file, tensor_lines), "", 0, 0, NULL,
     "Its tensors: name, role (matrix, elementwise or frozen), shape, dtype and grad_dtype (fp32, "
     "bf16 or fp16), and for matrices form (stack or flatten) and row_splits."},
};
const size_t model_file_table_count = sizeof model_file_table / sizeof model_file_table[0];

/* "12,2304,768" into `numbers` [max]; -1 when it is not such a list. */
static int read_numbers(const char *text, int64_t *numbers, int max) {
    int count = 0;
    while (*text) {
        char *end;
        errno = 0;
        const long long n = strtoll(text, &end, 10);
        if (end == text || errno || n < 1 || count == max || (*end && *end != ','))
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

/* `splits` has room for `room` numbers; what was read is taken from it. */
static muonshard_status read_word(muonshard_tensor_desc *t, const char *key, char *value,
                                  int64_t *splits, int room, char *message) {
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
    } else if (strcmp(key, "dtype") == 0) {
        good = read_dtype(value, &t->dtype);
    } else if (strcmp(key, "grad_dtype") == 0) {
        good = read_dtype(value, &t->grad_dtype);
    } else if (strcmp(key, "form") == 0) {
        good = strcmp(value, "stack") == 0 || strcmp(value, "flatten") == 0;
        t->form = strcmp(value, "flatten") == 0 ? MUONSHARD_FLATTEN : MUONSHARD_STACK;
    } else {
        return message_fail(message, MUONSHARD_ERR_CONFIG,
                            "tensors: '%s': unknown word '%s'; known are name, role, shape, dtype, "
                            "grad_dtype, form, row_splits",
                            t->name ? t->name : "?", key);
    }
    if (!good || count < 0)
        return message_fail(message, MUONSHARD_ERR_CONFIG, "tensors: '%s': %s is '%s'",
                            t->name ? t->name : "?", key, value);
    return MUONSHARD_OK;
}

static muonshard_status read_line(muonshard_tensor_desc *t, char *line, int64_t *splits, int room,
                                  char *message) {
    *t = (muonshard_tensor_desc)MUONSHARD_TENSOR_DESC_INIT;
    char *next = NULL;
    for (char *word = strtok_r(line, " ", &next); word; word = strtok_r(NULL, " ", &next)) {
        char *value = strchr(word, '=');
        if (!value)
            return message_fail(message, MUONSHARD_ERR_CONFIG, "tensors: '%s' is not WORD=VALUE",
                                word);
        *value++ = '\0';
        const muonshard_status status = read_word(t, word, value, splits, room, message);
        if (status != MUONSHARD_OK)
            return status;
    }
    if (!t->name || t->role == MUONSHARD_ROLE_UNSET || t->dims == 0)
        return message_fail(message, MUONSHARD_ERR_CONFIG, "tensors: '%s' has no %s",
                            t->name ? t->name : "?",
                            !t->name       ? "name"
                            : t->dims == 0 ? "shape"
                                           : "role");
    return MUONSHARD_OK;
}

muonshard_status model_file_parse(model_file *model, char *message) {
    size_t lines = 0, commas = 0;
    for (const char *c = model->tensor_lines; *c; c++) {
        lines += *c == '\n';
        commas += *c == ',';
    }
    if (!lines)
        return message_fail(message, MUONSHARD_ERR_CONFIG, "tensors: the model has none");
    model->tensors = calloc(lines, sizeof *model->tensors);
    model->splits = calloc(lines + commas, sizeof *model->splits);
    model->text = strdup(model->tensor_lines);
    if (!model->tensors || !model->splits || !model->text)
        return message_fail(message, MUONSHARD_ERR_MEMORY, "out of memory");
    int64_t *splits = model->splits;
    int room = (int)(lines + commas);
    char *next = NULL;
    for (char *line = strtok_r(model->text, "\n", &next); line;
         line = strtok_r(NULL, "\n", &next)) {
        muonshard_tensor_desc *t = &model->tensors[model->tensor_count];
        const muonshard_status status = read_line(t, line, splits, room, message);
        if (status != MUONSHARD_OK)
            return status;
        splits += t->row_split_count;
        room -= (int)t->row_split_count;
        model->tensor_count++;
    }
    return MUONSHARD_OK;
}

void model_file_free(model_file *model) {
    free(model->tensors);
    free(model->splits);
    free(model->text);
    model->tensors = NULL;
    model->splits = NULL;
    model->text = NULL;
    model->tensor_count = 0;
}
