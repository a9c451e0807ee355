/* model_file.h - a model as a list of tensors, for planning and measuring without its weights.
 *
 *   model: gpt2-124m
 *   tensors:
 *     - {name: wte, role: elementwise, shape: [50257, 768]}
 *     - {name: qkv, role: matrix, shape: [12, 2304, 768], axes: [layer], row_splits: [768, 768,
 * 768]}
 *
 * A tensor may have form=stack|flatten, dtype=fp32|bf16|fp16 and grad_dtype, which is dtype's
 * unless it is given; axes says what its first sizes count: layer, expert, or both. Settings of the
 * optimizer may stand beside it.
 *
 * With pipeline_parallel P a rank holds every P-th part of the layers, with expert_parallel E every
 * E-th of the experts; the ranks that hold the same are a data-parallel group, and a group is an
 * optimizer: ranks / P of them share everything but the experts, ranks / (P E) the experts. */
#ifndef MODEL_FILE_H
#define MODEL_FILE_H

#include "command.h"

typedef struct model_file {
    const char *name;                           /* of the model; the config's */
    int64_t pipeline_parallel, expert_parallel; /* the config's */
    const char *tensor_lines;       /* "name=... role=... shape=a,b", each followed by '\n' */
    muonshard_tensor_desc *tensors; /* own, [tensor_count]; param and grad are not set */
    size_t tensor_count;
    struct model_axes {
        bool layer, expert; /* of these, in that order, its first sizes are */
    } * axes;               /* own, [tensor_count] */
    char *text;             /* own; names point into it */
    int64_t *splits;        /* own; row_splits point into it */
} model_file;

/* Its keys, to be filled by muonshard_config_add_table. */
extern const muonshard_param model_file_table[];
extern const size_t model_file_table_count;

/* tensor_lines, which come from the file `path`, to tensors. ERR_CONFIG with `message`
 * [COMMAND_MESSAGE] naming file, line and tensor; ERR_UNSUPPORTED, likewise: more than four million
 * matrices; ERR_MEMORY. */
muonshard_status model_file_parse(model_file *model, const char *path, char *message);
void model_file_free(model_file *model);

typedef enum model_part { MODEL_SHARED, MODEL_EXPERTS, MODEL_PARTS } model_part;

/* Tensor `index` as a rank of the part's group holds it; false: it is of the other part. */
bool model_file_tensor(const model_file *model, size_t index, model_part part,
                       muonshard_tensor_desc *desc);
/* Every tensor `times` times over, for weak scaling. ERR_UNSUPPORTED: a tensor that is flattened,
 * or it is too large then. */
muonshard_status model_file_repeat(model_file *model, int64_t times, char *message);
/* Only the first `layers` of every tensor that has such an axis; *had: how many there are.
 * ERR_ARGUMENT: no more than that. */
muonshard_status model_file_layers(model_file *model, int64_t layers, int64_t *had, char *message);

#endif
