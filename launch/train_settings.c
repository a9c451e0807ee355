#include "train.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include "routing.h"

#define AT(field) offsetof(train_settings, field)

const muonshard_param train_table[] = {
    {"model.layers", MUONSHARD_PARAM_INT, AT(layers), "4", 1, 1024, NULL, "Transformer blocks."},
    {"model.width", MUONSHARD_PARAM_INT, AT(width), "128", 1, 65536, NULL,
     "Width of the residual stream."},
    {"model.heads", MUONSHARD_PARAM_INT, AT(heads), "4", 1, 65536, NULL,
     "Attention heads; the width is a multiple of them."},
    {"model.context", MUONSHARD_PARAM_INT, AT(context), "128", 1, 65536, NULL,
     "Positions in a sequence, bytes of text."},
    {"model.tied", MUONSHARD_PARAM_BOOL, AT(tied), "false", 0, 0, NULL,
     "The head is the token embedding."},
    {"model.math", MUONSHARD_PARAM_CHOICE, AT(math), "fp32", 0, 0, "fp32|tf32|bf16",
     "What factors of the model's products are rounded to on a GPU; they are stored and summed in "
     "fp32."},
    {"model.params", MUONSHARD_PARAM_CHOICE, AT(params), "fp32", 0, 0, "fp32|bf16",
     "How the optimizer has the parameters; the model computes with them widened to fp32."},
    {"data.files", MUONSHARD_PARAM_LIST, AT(files), "", 0, 0, NULL,
     "Patterns (glob) of the text files, read in order of their names."},
    {"data.val_fraction", MUONSHARD_PARAM_REAL, AT(val_fraction), "0.05", 0, 0.9, NULL,
     "Part of the text, at its end, that is kept for validation."},
    {"train.steps", MUONSHARD_PARAM_INT, AT(steps), "400", 1, 1e12, NULL,
     "Optimizer steps; total_steps is their number unless it is set."},
    {"train.batch", MUONSHARD_PARAM_INT, AT(batch), "32", 1, 1e9, NULL,
     "Sequences in a step, over all ranks; a multiple of their number."},
    {"train.micro_batch", MUONSHARD_PARAM_INT, AT(micro_batch), "0", 0, 1e9, NULL,
     "Sequences a rank works on at a time, accumulating gradients; 0: its whole share."},
    {"train.seed", MUONSHARD_PARAM_INT, AT(seed), "1", 0, 1e15, NULL,
     "Seed of the parameters and of the order of the text."},
    {"train.schedule", MUONSHARD_PARAM_CHOICE, AT(schedule), "cosine", 0, 0,
     "cosine|linear|constant",
     "How the learning rates fall after the warm-up; a factor beside lr_schedule, where that is "
     "set."},
    {"train.warmup", MUONSHARD_PARAM_INT, AT(warmup), "20", 0, 1e12, NULL,
     "Steps in which the learning rates rise linearly to their values."},
    {"train.final_lr", MUONSHARD_PARAM_REAL, AT(final_lr), "0.1", 0, 1, NULL,
     "Factor of the learning rates at the end of the schedule."},
    {"train.eval_every", MUONSHARD_PARAM_INT, AT(eval_every), "25", 0, 1e12, NULL,
     "Steps between validations; 0: only after the last."},
    {"train.eval_windows", MUONSHARD_PARAM_INT, AT(eval_windows), "64", 1, 1e9, NULL,
     "Sequences in a validation: fixed windows, spread evenly over the validation text."},
    {"train.max_skipped", MUONSHARD_PARAM_INT, AT(max_skipped), "20", 0, 1e12, NULL,
     "Steps skipped in a row, for gradients that are NaN or infinite, after which the run is given "
     "up with exit code 23; 0: never."},
    {"train.optimizer", MUONSHARD_PARAM_CHOICE, AT(optimizer), "muon", 0, 0, "muon|adamw",
     "muon: matrices of the blocks by Muon, the rest by AdamW; adamw: everything by AdamW."},
    {"train.log", MUONSHARD_PARAM_TEXT, AT(log), "", 0, 0, NULL,
     "File for JSON lines, one a step, replaced at the start, or cut back to the step that a run "
     "continues from; empty: off."},
    {"train.save", MUONSHARD_PARAM_TEXT, AT(save), "", 0, 0, NULL,
     "Directory for checkpoints, which all ranks see; one is saved after the last step, and at "
     "SIGTERM and SIGUSR1, which then end the run with exit code 4; empty: none."},
    {"train.save_every", MUONSHARD_PARAM_INT, AT(save_every), "0", 0, 1e12, NULL,
     "Steps between checkpoints; 0: only those."},
    {"train.keep", MUONSHARD_PARAM_INT, AT(keep), "2", 0, 1e6, NULL,
     "Complete checkpoints that stay, the newest ones; 0: all."},
    {"train.save_async", MUONSHARD_PARAM_BOOL, AT(save_async), "true", 0, 0, NULL,
     "Training goes on while a copy of the state is written; it takes memory of the host."},
    {"train.progress", MUONSHARD_PARAM_CHOICE, AT(progress), "auto", 0, 0, "auto|on|off",
     "A line that is kept up to date (on); auto: where the output is no terminal, a line a "
     "validation."},
    {"groups", MUONSHARD_PARAM_LIST, AT(groups), "", 0, 0, NULL,
     ROUTING_DOC " Without a rule as train.optimizer says."},
};
const size_t train_table_count = sizeof train_table / sizeof *train_table;

const char *train_settings_error(const train_settings *s, int ranks, char *message) {
    int64_t share = s->batch / ranks;
    if (!*s->files)
        return "data.files is empty; it needs at least one pattern";
    if (s->batch % ranks) {
        snprintf(message, COMMAND_MESSAGE,
                 "train.batch: %" PRId64 " sequences cannot be split evenly over %d ranks",
                 s->batch, ranks);
        return message;
    }
    if (s->micro_batch > 0 && share % s->micro_batch) {
        snprintf(message, COMMAND_MESSAGE,
                 "train.micro_batch: a rank's %" PRId64 " sequences are no multiple of %" PRId64,
                 share, s->micro_batch);
        return message;
    }
    if (s->warmup >= s->steps) {
        snprintf(message, COMMAND_MESSAGE,
                 "train.warmup: %" PRId64 " steps of warm-up leave none of train.steps (%" PRId64
                 ")",
                 s->warmup, s->steps);
        return message;
    }
    return NULL;
}

double train_lr_factor(const train_settings *s, int64_t step) {
    if (step <= s->warmup)
        return (double)step / (double)s->warmup;
    /* 0 after the warm-up, 1 in the last step */
    int64_t falling = s->steps - s->warmup - 1;
    double part = falling > 0 ? (double)(step - s->warmup - 1) / (double)falling : 0.0;
    switch (s->schedule) {
    case TRAIN_SCHEDULE_COSINE:
        return s->final_lr + (1 - s->final_lr) * 0.5 * (1 + cos(3.141592653589793 * part));
    case TRAIN_SCHEDULE_LINEAR: return 1 - (1 - s->final_lr) * part;
    default: return 1;
    }
}
