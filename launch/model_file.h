/* model_file.h - a model as a list of tensors, for planning without its weights.
 *
 *   model: gpt2-124m
 *   tensors:
 *     - {name: wte, role: elementwise, shape: [50257, 768]}
 *     - {name: qkv, role: matrix, shape: [12, 2304, 768], row_splits: [768, 768, 768]}
 *
 * A tensor may have form=stack|flatten, dtype=fp32|bf16|fp16 and grad_dtype, which is dtype's
 * unless it is given. Settings of the optimizer may stand beside it. */
#ifndef MODEL_FILE_H
#define MODEL_FILE_H

#include "command.h"

typedef struct model_file {
    const char *name;               /* of the model; the config's */
    const char *tensor_lines;       /* "name=... role=... shape=a,b", each followed by '\n' */
    muonshard_tensor_desc *tensors; /* own, [tensor_count]; param and grad are not set */
    size_t tensor_count;
    char *text;      /* own; names point into it */
    int64_t *splits; /* own; row_splits point into it */
} model_file;

/* `tensor_lines` and `name`, to be filled by muonshard_config_add_table. */
extern const muonshard_param model_file_table[];
extern const size_t model_file_table_count;

/* tensor_lines to tensors. ERR_CONFIG with `message` [COMMAND_MESSAGE] naming the tensor;
 * ERR_MEMORY. */
muonshard_status model_file_parse(model_file *model, char *message);
void model_file_free(model_file *model);

#endif
