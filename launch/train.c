/* muonshard train: a byte-level GPT on text files, data-parallel over the ranks. */
#include "train.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "corpus.h"
#include "deadline.h"
#include "gpt.h"
#include "gpt_device.h"
#include "gpt_layers.h"
#include "routing.h"
#include "step_values.h"

static const command_option train_options[] = {
    {"--resume", COMMAND_VALUE, false, "auto|DIRECTORY",
     "Goes on from a checkpoint: auto: the newest in train.save, or from the start where there is "
     "none; or the one that DIRECTORY is, or the newest in it"},
};

static const command_usage train_usage = {
    .name = "train",
    .synopsis = "CONFIG [--resume auto|DIRECTORY] [key=value...]",
    .doc = "Trains a GPT over bytes on text files; under mpirun the ranks share every batch.",
    .positional_min = 1,
    .positional_max = 1,
    .overrides = true,
    .options = train_options,
    .option_count = sizeof train_options / sizeof train_options[0],
};

typedef struct trainer {
    command cmd;
    train_settings settings;
    corpus text;
    gpt_layers *device;             /* own, where the backend is a device's; else NULL */
    const gpt_layers *layers;       /* of the model: the device\'s or the host\'s */
    gpt *model;                     /* own */
    muonshard_optimizer *optimizer; /* own */
    train_report *report;           /* own; rank 0 */
    routing rules;
    step_values values;
    /* of the model's tensors */
    muonshard_tensor_desc tensors[GPT_TENSOR_MAX];
    int rules_chosen[GPT_TENSOR_MAX];
    int ids[GPT_TENSOR_MAX];          /* in the optimizer */
    uint16_t *narrow[GPT_TENSOR_MAX]; /* own, the layers\' memory: parameters in bf16, or NULL */
    int sequences;                    /* worked on at a time */
    int micro_batches;                /* a step */
    size_t window;                    /* context + 1 bytes */
    unsigned char *windows;           /* [sequences, window], own */
    const char *resume;               /* --resume, or NULL */
    int64_t first;                    /* steps that were taken by the run this one continues */
    double time_before;               /* its seconds */
    bool saving;                      /* a checkpoint is being written */
    bool signalled;                   /* some rank has had a signal */
    bool stopped;                     /* and there are steps left */
    muonshard_status save_failed;     /* of the latest save */
    muonshard_status local;           /* of this rank, on its way to all */
    char message[COMMAND_MESSAGE];
} trainer;

/* ---- set-up ---- */

static muonshard_status load_text(trainer *t) {
    command_enter(&t->cmd, "read text");
    muonshard_status status =
        corpus_load(&t->text, t->settings.files, t->settings.val_fraction, t->window, t->message);
    status = command_agree(&t->cmd, status, t->message);
    if (status != MUONSHARD_OK)
        return status;
    uint64_t hash = t->text.hash;
    status = muonshard_comm_broadcast(t->cmd.comm, &hash, sizeof hash, 0);
    if (status != MUONSHARD_OK)
        return command_told(&t->cmd, status, "%s", muonshard_comm_last_error(t->cmd.comm));
    if (hash != t->text.hash) {
        snprintf(t->message, sizeof t->message,
                 "data.files: rank %d reads other text (%zu bytes) than rank 0", t->cmd.rank,
                 t->text.size);
        status = MUONSHARD_ERR_MISMATCH;
    }
    return command_agree(&t->cmd, status, t->message);
}

/* To nearest even; parameters are finite. */
static uint16_t bf16_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* What the model computes with is what the optimizer has. */
static void widen_params(trainer *t) {
    size_t count;
    const gpt_tensor *tensors = gpt_tensors(t->model, &count);
    for (size_t i = 0; i < count && t->narrow[i]; i++)
        t->layers->widen(t->layers->self, tensors[i].param, t->narrow[i], tensors[i].count);
}

/* The model's parameters, rounded to bf16; false: out of memory. */
static bool narrow_params(trainer *t) {
    size_t count;
    const gpt_tensor *tensors = gpt_tensors(t->model, &count);
    const gpt_layers *layers = t->layers;
    for (size_t i = 0; i < count; i++) {
        const size_t n = tensors[i].count;
        float *wide = malloc(n * sizeof *wide);
        uint16_t *rounded = malloc(n * sizeof *rounded);
        t->narrow[i] = layers->alloc(layers->self, n * sizeof *rounded);
        const bool good = wide && rounded && t->narrow[i];
        if (good) {
            layers->download(layers->self, wide, tensors[i].param, n * sizeof *wide);
            for (size_t k = 0; k < n; k++)
                rounded[k] = bf16_of(wide[k]);
            layers->upload(layers->self, t->narrow[i], rounded, n * sizeof *rounded);
        }
        free(wide);
        free(rounded);
        if (!good)
            return false;
    }
    widen_params(t);
    return true;
}

/* In the memory the optimizer works in: of its device, which is the thread's current one. */
static muonshard_status make_model(trainer *t, const gpt_shape *shape) {
    if (strcmp(muonshard_backend(t->optimizer), "host") != 0) {
        t->device = gpt_device_open((gpt_cuda_math)t->settings.math, -1, NULL, t->message,
                                    sizeof t->message);
        if (!t->device)
            return MUONSHARD_ERR_UNAVAILABLE;
    }
    t->layers = t->device ? t->device : &gpt_host_layers;
    t->model = gpt_create(shape, t->sequences, t->layers);
    t->windows = malloc((size_t)t->sequences * t->window);
    if (t->model && t->windows) {
        gpt_init(t->model, (uint64_t)t->settings.seed);
        if (!t->settings.params || narrow_params(t))
            return MUONSHARD_OK;
    }
    snprintf(t->message, sizeof t->message,
             "out of memory for the model and its activations; a smaller train.micro_batch needs "
             "less");
    return MUONSHARD_ERR_MEMORY;
}

static muonshard_status read_rules(trainer *t) {
    muonshard_status status = step_values_set_total(t->cmd.config, t->settings.steps, t->message);
    if (status == MUONSHARD_OK)
        status = routing_parse(t->settings.groups, &t->rules, t->message);
    if (status == MUONSHARD_OK)
        status = step_values_open(&t->values, &t->rules, t->cmd.config, t->message);
    return status;
}

/* Tensor i as it is without rules, then as the rules say. */
static muonshard_status add_tensor(trainer *t, const gpt_tensor *from, size_t i) {
    const bool adamw = t->settings.optimizer == TRAIN_OPTIMIZER_ADAMW;
    muonshard_tensor_desc *desc = &t->tensors[i];
    *desc = (muonshard_tensor_desc)MUONSHARD_TENSOR_DESC_INIT;
    desc->name = from->name;
    desc->role = adamw ? MUONSHARD_ROLE_ELEMENTWISE : from->role;
    desc->dims = from->dims;
    for (int d = 0; d < from->dims; d++)
        desc->shape[d] = from->shape[d];
    desc->row_splits = from->row_splits;
    desc->row_split_count = from->row_split_count;
    desc->priority_stride = -1; /* layer by layer, as the backward pass finishes them */
    desc->param = t->narrow[i] ? (void *)t->narrow[i] : from->param;
    desc->dtype = t->narrow[i] ? MUONSHARD_BF16 : MUONSHARD_FP32;
    desc->grad = from->grad;
    desc->grad_dtype = MUONSHARD_FP32;
    desc->decay_multiplier = strstr(from->name, "norm") ? 0.0 : 1.0; /* gains do not decay */
    muonshard_status status = routing_apply(&t->rules, desc, &t->rules_chosen[i], t->message);
    if (status != MUONSHARD_OK)
        return status;
    status = muonshard_add_tensor(t->optimizer, desc, &t->ids[i]);
    if (status != MUONSHARD_OK)
        snprintf(t->message, sizeof t->message, "%s", muonshard_last_error(t->optimizer));
    return status;
}

static muonshard_status add_tensors(trainer *t) {
    size_t count;
    const gpt_tensor *tensors = gpt_tensors(t->model, &count);
    muonshard_status status = MUONSHARD_OK;
    for (size_t i = 0; i < count && status == MUONSHARD_OK; i++)
        status = add_tensor(t, &tensors[i], i);
    return status;
}

static void print_rules(const trainer *t) {
    const char *dtypes[GPT_TENSOR_MAX];
    size_t count;
    gpt_tensors(t->model, &count);
    for (size_t i = 0; i < count; i++)
        dtypes[i] = t->narrow[i] ? "bf16" : "fp32";
    routing_print(&t->rules, t->tensors, dtypes, t->rules_chosen, count, stderr);
    routing_warn_unused(&t->rules, train_usage.name, stderr);
}

static muonshard_status make_optimizer(trainer *t) {
    command_enter(&t->cmd, "create");
    muonshard_status status = command_agree(&t->cmd, read_rules(t), t->message);
    if (status != MUONSHARD_OK)
        return status;
    status = muonshard_create(t->cmd.comm, t->cmd.config, NULL, &t->optimizer);
    return command_told(&t->cmd, status, "%s", muonshard_comm_last_error(t->cmd.comm));
}

static muonshard_status commit_tensors(trainer *t) {
    command_enter(&t->cmd, "commit");
    muonshard_status status = command_agree(&t->cmd, add_tensors(t), t->message);
    if (status != MUONSHARD_OK)
        return status;
    if (t->cmd.rank == 0 && t->rules.rule_count > 0)
        print_rules(t);
    status = muonshard_commit(t->optimizer, MUONSHARD_SYNC_CHECK);
    return command_told(&t->cmd, status, "%s", muonshard_last_error(t->optimizer));
}

/* ---- saving and continuing ---- */

static train_state state_of(const trainer *t, double time_s) {
    const train_settings *s = &t->settings;
    train_state state = {.text = t->text.hash,
                         .seed = s->seed,
                         .batch = s->batch,
                         .context = s->context,
                         .time_s = time_s,
                         .best = NAN};
    train_report_state(t->report, &state);
    return state;
}

static muonshard_status resume(trainer *t, muonshard_load_result *from, train_state *state) {
    const bool automatic = t->resume && strcmp(t->resume, "auto") == 0;
    const char *directory = automatic ? t->settings.save : t->resume;
    muonshard_load_args args = MUONSHARD_LOAD_ARGS_INIT;
    args.optional = automatic;
    if (!directory || !*directory)
        return MUONSHARD_OK;
    muonshard_status status = muonshard_load(t->optimizer, directory, &args, from);
    if (status != MUONSHARD_OK || !from->found)
        return command_told(&t->cmd, status, "%s", muonshard_last_error(t->optimizer));
    status = command_agree(&t->cmd, train_state_take(from->user, state, t->message), t->message);
    t->first = from->step;
    t->time_before = state->time_s;
    widen_params(t);
    return status;
}

/* A save that fails leaves a run without its latest checkpoint, which is less than no run. */
static void note_saved(trainer *t, muonshard_status status) {
    t->save_failed = status;
    if (status != MUONSHARD_OK)
        train_report_say(t->report, "warning: not saved: %s", muonshard_last_error(t->optimizer));
}

static void finish_save(trainer *t) {
    if (t->saving)
        note_saved(t, muonshard_save_wait(t->optimizer));
    t->saving = false;
}

/* Collective. */
static muonshard_status save(trainer *t, double time_s, bool last) {
    const train_settings *s = &t->settings;
    command_enter(&t->cmd, "save");
    finish_save(t);
    const train_state state = state_of(t, time_s);
    char *text = train_state_text(&state);
    muonshard_status status =
        command_agree(&t->cmd, text ? MUONSHARD_OK : MUONSHARD_ERR_MEMORY, "out of memory");
    if (status != MUONSHARD_OK) {
        free(text);
        return status;
    }
    muonshard_save_args args = MUONSHARD_SAVE_ARGS_INIT;
    args.user = text;
    args.keep = (int)s->keep;
    args.defer = s->save_async && !last;
    status = muonshard_save(t->optimizer, s->save, &args);
    free(text);
    t->saving = status == MUONSHARD_OK && args.defer;
    note_saved(t, status);
    return MUONSHARD_OK;
}

static muonshard_status set_up(trainer *t) {
    const train_settings *s = &t->settings;
    const gpt_shape shape = {(int)s->layers, (int)s->width, (int)s->heads, (int)s->context,
                             s->tied != 0};
    const char *error = train_settings_error(s, t->cmd.size, t->message);
    if (error)
        return command_told(&t->cmd, MUONSHARD_ERR_CONFIG, "%s", error);
    if ((error = gpt_shape_error(&shape)))
        return command_told(&t->cmd, MUONSHARD_ERR_CONFIG, "model: %s", error);
    int64_t share = s->batch / t->cmd.size, at_once = s->micro_batch ? s->micro_batch : share;
    if (at_once * s->context > INT32_MAX / 4)
        return command_told(&t->cmd, MUONSHARD_ERR_CONFIG,
                            "train.micro_batch: %" PRId64 " sequences of %" PRId64
                            " positions are too many at a time",
                            at_once, s->context);
    t->sequences = (int)at_once;
    t->micro_batches = (int)(share / at_once);
    t->window = (size_t)s->context + 1;

    muonshard_status status = load_text(t);
    if (status == MUONSHARD_OK)
        status = make_optimizer(t);
    if (status == MUONSHARD_OK)
        status = command_agree(&t->cmd, make_model(t, &shape), t->message);
    if (status == MUONSHARD_OK)
        status = commit_tensors(t);
    if (status != MUONSHARD_OK)
        return status;
    muonshard_load_result from = MUONSHARD_LOAD_RESULT_INIT;
    train_state state = state_of(t, 0.0);
    status = resume(t, &from, &state);
    if (status != MUONSHARD_OK)
        return status;
    status = train_report_open(&t->report, s, t->cmd.rank, t->first, t->message);
    train_report_continue(t->report, &state);
    if (status == MUONSHARD_OK && from.found)
        status = train_report_resumed(t->report, &from, t->message);
    else if (status == MUONSHARD_OK)
        status = train_report_run(t->report, t->cmd.config, t->cmd.size,
                                  gpt_parameter_count(t->model), t->text.size, t->message);
    return command_agree(&t->cmd, status, t->message);
}

/* ---- the loop ---- */

/* Sum over all ranks, in rank order; and one rank's error becomes everybody's, and its signal. What
 * all have written of a checkpoint becomes one. Collective. */
static muonshard_status sum_over_ranks(trainer *t, double *value) {
    int written = 1;
    muonshard_save_test(t->optimizer, &written);
    double sums[4] = {*value, t->local == MUONSHARD_OK ? 0.0 : 1.0, train_signal() ? 1.0 : 0.0,
                      written ? 0.0 : 1.0};
    muonshard_status status = muonshard_comm_allreduce(t->cmd.comm, sums, 4, MUONSHARD_REDUCE_SUM);
    if (status != MUONSHARD_OK)
        return command_told(&t->cmd, status, "%s", muonshard_comm_last_error(t->cmd.comm));
    *value = sums[0];
    t->signalled = t->signalled || sums[2] > 0.0;
    if (sums[3] == 0.0)
        finish_save(t);
    return sums[1] > 0.0 ? command_agree(&t->cmd, t->local, t->message) : MUONSHARD_OK;
}

/* In the last micro-batch: what has its final gradient can travel while the backward pass goes on.
 */
static void mark_ready(void *user, size_t tensor, int64_t first, int64_t count) {
    trainer *t = user;
    if (t->local != MUONSHARD_OK)
        return;
    const muonshard_tensor_desc *desc = &t->tensors[tensor];
    if (desc->role != MUONSHARD_ROLE_MATRIX || desc->form != MUONSHARD_STACK) {
        if (first > 0) /* complete with its first layer, which comes last */
            return;
        count = 1;
    }
    t->local = muonshard_grad_ready(t->optimizer, t->ids[tensor], first, count);
    if (t->local != MUONSHARD_OK)
        snprintf(t->message, sizeof t->message, "%s", muonshard_last_error(t->optimizer));
}

/* A device's error is this rank's, on its way to all. */
static void note_model_error(trainer *t) {
    const char *error = gpt_error(t->model);
    if (!error || t->local != MUONSHARD_OK)
        return;
    t->local = MUONSHARD_ERR_INTERNAL;
    snprintf(t->message, sizeof t->message, "rank %d: %s", t->cmd.rank, error);
}

/* Loss and gradient of this rank's share of the batch; the mean loss of the share. */
static double run_batch(trainer *t, int64_t step) {
    const train_settings *s = &t->settings;
    int64_t index = s->batch / t->cmd.size * t->cmd.rank;
    double loss = 0.0;
    for (int m = 0; m < t->micro_batches; m++) {
        for (int i = 0; i < t->sequences; i++, index++)
            corpus_train_window(&t->text, (uint64_t)s->seed, step, index, t->window,
                                t->windows + (size_t)i * t->window);
        loss += gpt_forward(t->model, t->windows, t->sequences);
        bool last = m + 1 == t->micro_batches;
        gpt_backward(t->model, 1.0 / t->micro_batches, m > 0, last ? mark_ready : NULL, t);
    }
    note_model_error(t);
    return loss / t->micro_batches;
}

/* Mean loss over the validation windows; they are dealt to the ranks in turn. Collective. */
static muonshard_status evaluate(trainer *t, double *loss) {
    int64_t count = t->settings.eval_windows, next = t->cmd.rank;
    command_enter(&t->cmd, "evaluate");
    *loss = 0.0;
    while (next < count) {
        int n = 0;
        for (; n < t->sequences && next < count; n++, next += t->cmd.size)
            corpus_validation_window(&t->text, next, count, t->window,
                                     t->windows + (size_t)n * t->window);
        *loss += n * gpt_forward(t->model, t->windows, n);
    }
    note_model_error(t);
    muonshard_status status = sum_over_ranks(t, loss);
    *loss /= (double)count;
    return status;
}

static muonshard_status one_step(trainer *t, int64_t step, train_step_report *out) {
    const train_settings *s = &t->settings;
    double begin = command_now_s();
    command_enter(&t->cmd, "forward and backward");
    out->step = step;
    out->lr_factor = train_lr_factor(s, step);
    out->train_loss = run_batch(t, step) / t->cmd.size;

    muonshard_step_args args = MUONSHARD_STEP_ARGS_INIT;
    muonshard_step_result_info result = MUONSHARD_STEP_RESULT_INIT;
    args.lr_factor = out->lr_factor;
    step_values_at(&t->values, step - 1, &args);
    muonshard_status status = muonshard_step(t->optimizer, &args);
    if (status == MUONSHARD_OK)
        status = muonshard_step_result(t->optimizer, 0, 1, &result);
    if (status != MUONSHARD_OK)
        return command_told(&t->cmd, status, "step %" PRId64 ": %s", step,
                            muonshard_last_error(t->optimizer));
    widen_params(t);
    out->grad_norm = result.grad_norm;
    out->skipped = result.skipped != 0;
    status = sum_over_ranks(t, &out->train_loss);
    out->tokens_per_s = (double)(s->batch * s->context) / (command_now_s() - begin);
    return status;
}

/* Whether a checkpoint is due after a step. */
static bool save_due(const trainer *t, int64_t step) {
    const train_settings *s = &t->settings;
    return *s->save &&
           (t->stopped || step == s->steps || (s->save_every && step % s->save_every == 0));
}

/* A run that ends without its last checkpoint says so by its exit code. */
static muonshard_status end_of_saves(trainer *t) {
    finish_save(t);
    if (t->save_failed == MUONSHARD_OK && t->stopped)
        train_report_say(t->report, "stopped by a signal, and saved in %s", t->settings.save);
    return t->save_failed;
}

static muonshard_status train(trainer *t) {
    const train_settings *s = &t->settings;
    double begin = command_now_s() - t->time_before;
    int64_t skipped_in_a_row = 0;
    for (int64_t step = t->first + 1; step <= s->steps && !t->stopped; step++) {
        train_step_report report = {.val_loss = NAN};
        deadline_set_step(step);
        muonshard_status status = one_step(t, step, &report);
        report.evaluated = step == s->steps || (s->eval_every && step % s->eval_every == 0);
        if (status == MUONSHARD_OK && report.evaluated)
            status = evaluate(t, &report.val_loss);
        if (status != MUONSHARD_OK)
            return status;
        command_enter(&t->cmd, "report");
        report.time_s = command_now_s() - begin;
        t->local = train_report_step(t->report, &report, t->message);
        t->stopped = t->signalled && step < s->steps;
        if (save_due(t, step) &&
            (status = save(t, report.time_s, t->stopped || step == s->steps)) != MUONSHARD_OK)
            return status;
        skipped_in_a_row = report.skipped ? skipped_in_a_row + 1 : 0;
        if (s->max_skipped && skipped_in_a_row == s->max_skipped)
            return command_told(&t->cmd, MUONSHARD_ERR_DIVERGED,
                                "step %" PRId64 ": %" PRId64 " steps in a row were skipped because "
                                "a gradient was NaN or infinite; a lower learning rate may help",
                                step, skipped_in_a_row);
    }
    muonshard_status status = command_agree(&t->cmd, t->local, t->message);
    if (status == MUONSHARD_OK)
        status = end_of_saves(t);
    muonshard_stats_info stats = MUONSHARD_STATS_INIT;
    if (status == MUONSHARD_OK) {
        status = muonshard_stats(t->optimizer, &stats);
        command_told(&t->cmd, status, "%s", muonshard_last_error(t->optimizer));
    }
    if (status == MUONSHARD_OK)
        train_report_end(t->report, &stats);
    return status;
}

int command_train(int argc, char **argv) {
    if (command_wants_help(argc, argv))
        return command_help(&train_usage, argc, argv, train_table, train_table_count);
    trainer t = {0};
    command_args args = {0};
    muonshard_status status = command_start(&t.cmd, &train_usage, &args, argc, argv);
    if (status == MUONSHARD_OK)
        status = command_configure(&t.cmd, args.positional[0], &args, train_table,
                                   train_table_count, &t.settings);
    t.resume = command_option_value(&train_usage, &args, "--resume");
    if (status == MUONSHARD_OK && *t.settings.save)
        train_signals_note();
    if (status == MUONSHARD_OK)
        status = set_up(&t);
    if (status == MUONSHARD_OK)
        status = train(&t);
    train_report_close(t.report);
    muonshard_destroy(t.optimizer);
    step_values_close(&t.values);
    routing_free(&t.rules);
    for (size_t i = 0; i < GPT_TENSOR_MAX && t.layers; i++)
        t.layers->free(t.layers->self, t.narrow[i]);
    gpt_destroy(t.model);
    if (t.device)
        t.device->close(t.device->self);
    corpus_free(&t.text);
    free(t.windows);
    const int code = command_finish(&t.cmd, &args, status);
    return code == 0 && t.stopped ? TRAIN_STOPPED : code;
}
