/* muonshard replay: recorded gradients through the optimizer, one file a step. */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include "command.h"
#include "message.h"
#include "routing.h"
#include "safetensors.h"
#include "step_values.h"

typedef struct replay_settings {
    const char *groups;
} replay_settings;

static const muonshard_param replay_table[] = {
    {"groups", MUONSHARD_PARAM_LIST, offsetof(replay_settings, groups), "", 0, 0, NULL,
     ROUTING_DOC " Without a rule two dimensions or more are a matrix, or a stack of them."},
};

static const command_option replay_options[] = {
    {"--params", COMMAND_VALUE, true, "IN", "safetensors file with the parameters to begin with"},
    {"--grads", COMMAND_VALUES, true, "GRADS",
     "safetensors files with gradients, one a step; with %r in the name a file a rank"},
    {"--out", COMMAND_VALUE, true, "OUT",
     "safetensors file for the parameters after the last step"},
    {"--out-every", COMMAND_VALUE, false, "K",
     "also after steps K, 2K...: the step number goes before OUT's extension"},
};

static const command_usage replay_usage = {
    .name = "replay",
    .synopsis = "CONFIG --params IN --grads GRADS... --out OUT [--out-every K] [key=value...]",
    .doc =
        "Runs recorded gradients through the optimizer, one safetensors file a step, and writes "
        "the resulting parameters.\nParameters and gradients are F32, BF16 or F16, independently; "
        "total_steps is the number of files unless it is set.\nUnder mpirun the ranks share the "
        "work; their gradients are reduced as `reduce` says.",
    .positional_min = 1,
    .positional_max = 1,
    .overrides = true,
    .options = replay_options,
    .option_count = sizeof replay_options / sizeof replay_options[0],
};

typedef struct replay {
    command cmd;
    command_args args;
    replay_settings settings;
    routing rules;
    const char *out;
    long long out_every; /* 0: only at the end */
    const char **names;  /* borrowed, [steps], of gradient files, %r and all */
    size_t steps;
    safetensors_file params;
    /* [params.tensor_count] */
    muonshard_tensor_desc *tensors; /* own; its params are own too */
    const char **dtypes;            /* own; names, of params */
    int *rules_chosen;              /* own */
    int *ids;                       /* own; CARRIED: the optimizer does not know it */
    safetensors_tensor *results;    /* own; what is written: as in `params`, with the new values */
    step_values values;
    muonshard_optimizer *optimizer; /* own */
} replay;

/* An empty tensor, or a frozen one whose dtype the optimizer does not know, is written as it was
 * read. */
#define CARRIED (-1)

/* What can be updated, in the order of muonshard_dtype. */
static const char *const dtype_names[] = {"F32", "BF16", "F16"};

/* -1 for another. */
static int find_dtype(const safetensors_dtype *dtype) {
    for (int i = 0; i < 3; i++)
        if (strcmp(dtype_names[i], dtype->name) == 0)
            return i;
    return -1;
}

/* ---- names ---- */

/* `name` with each %r replaced by the rank; own. NULL: no memory. */
static char *rank_name(const char *name, int rank) {
    size_t size = strlen(name) + 1, at = 0;
    for (const char *c = name; (c = strstr(c, "%r")); c += 2)
        size += 16;
    char *text = malloc(size);
    if (!text)
        return NULL;
    while (*name) {
        if (name[0] == '%' && name[1] == 'r') {
            at += (size_t)snprintf(text + at, size - at, "%d", rank);
            name += 2;
        } else
            text[at++] = *name++;
    }
    text[at] = '\0';
    return text;
}

/* OUT-000005.safetensors for OUT.safetensors; own. step 0: OUT itself. NULL: no memory. */
static char *step_name(const char *out, size_t step) {
    if (step == 0)
        return strdup(out);
    const char *base = strrchr(out, '/');
    base = base ? base + 1 : out;
    const char *extension = strrchr(base, '.');
    if (!extension || extension == base)
        extension = base + strlen(base);
    size_t size = strlen(out) + 32;
    char *text = malloc(size);
    if (text)
        snprintf(text, size, "%.*s-%06zu%s", (int)(extension - out), out, step, extension);
    return text;
}

/* ---- checks before the first step ---- */

static muonshard_status read_arguments(replay *r, char *message) {
    const command_given grads = command_option_given(&replay_usage, &r->args, "--grads");
    r->names = grads.values;
    r->steps = grads.count;
    r->out = command_option_value(&replay_usage, &r->args, "--out");
    const char *every = command_option_value(&replay_usage, &r->args, "--out-every");
    if (every) {
        char *end;
        errno = 0;
        r->out_every = strtoll(every, &end, 10);
        if (end == every || *end || errno || r->out_every < 1)
            return message_fail(message, MUONSHARD_ERR_ARGUMENT,
                                "--out-every is \"%s\"; allowed: an integer >= 1", every);
    }
    return MUONSHARD_OK;
}

static bool same_file(const struct stat *one, const char *path) {
    struct stat other;
    return stat(path, &other) == 0 && one->st_dev == other.st_dev && one->st_ino == other.st_ino;
}

/* `path` can be written and is none of the inputs. */
static muonshard_status check_out(const replay *r, const char *path, char *message) {
    struct stat out;
    error_text error;
    muonshard_status status = safetensors_can_write(path, &error);
    if (status != MUONSHARD_OK)
        return message_fail(message, status, "%s", error.text);
    if (stat(path, &out) != 0)
        return MUONSHARD_OK;
    if (same_file(&out, r->params.path))
        return message_fail(message, MUONSHARD_ERR_ARGUMENT, "%s: would overwrite --params", path);
    for (size_t step = 0; step < r->steps; step++) {
        char *grads = rank_name(r->names[step], r->cmd.rank);
        bool same = grads && same_file(&out, grads);
        free(grads);
        if (same)
            return message_fail(message, MUONSHARD_ERR_ARGUMENT,
                                "%s: would overwrite a file of --grads", path);
    }
    return MUONSHARD_OK;
}

static bool written_after(const replay *r, size_t step) {
    return r->out_every > 0 && step % (size_t)r->out_every == 0;
}

static muonshard_status check_outs(const replay *r, char *message) {
    muonshard_status status = MUONSHARD_OK;
    for (size_t step = 0; step <= r->steps && status == MUONSHARD_OK; step++) {
        if (step > 0 && !written_after(r, step))
            continue;
        char *path = step_name(r->out, step);
        if (!path)
            return message_fail(message, MUONSHARD_ERR_MEMORY, "out of memory");
        status = check_out(r, path, message);
        free(path);
    }
    return status;
}

static size_t find_param(const replay *r, const char *name) {
    size_t i = 0;
    while (i < r->params.tensor_count && strcmp(r->params.tensors[i].name, name) != 0)
        i++;
    return i;
}

/* The gradient of tensor i: its shape, and its dtype, which is that of the files before. */
static muonshard_status check_grad(replay *r, size_t i, const char *path,
                                   const safetensors_tensor *grad, char *message) {
    const safetensors_tensor *param = &r->params.tensors[i];
    muonshard_tensor_desc *tensor = &r->tensors[i];
    if (grad->dims != param->dims || memcmp(grad->shape, param->shape, sizeof grad->shape) != 0) {
        char found[SAFETENSORS_SHAPE_TEXT], expected[SAFETENSORS_SHAPE_TEXT];
        return message_fail(message, MUONSHARD_ERR_ARGUMENT,
                            "%s: tensor \"%s\" is %s; expected %s as in %s", path, grad->name,
                            safetensors_shape_text(grad, found),
                            safetensors_shape_text(param, expected), r->params.path);
    }
    if (tensor->role == MUONSHARD_ROLE_FROZEN)
        return MUONSHARD_OK;
    int dtype = find_dtype(grad->dtype);
    if (dtype < 0)
        return message_fail(message, MUONSHARD_ERR_UNSUPPORTED,
                            "%s: tensor \"%s\" is %s; gradients are F32, BF16 or F16", path,
                            grad->name, grad->dtype->name);
    if (tensor->grad_dtype != MUONSHARD_DTYPE_OF_PARAM && (int)tensor->grad_dtype != dtype)
        return message_fail(message, MUONSHARD_ERR_ARGUMENT,
                            "%s: tensor \"%s\" is %s; expected %s as in the files before", path,
                            grad->name, grad->dtype->name, dtype_names[tensor->grad_dtype]);
    tensor->grad_dtype = (muonshard_dtype)dtype;
    return MUONSHARD_OK;
}

/* Whether a file may lack the gradient of tensor i. */
static bool grad_optional(const replay *r, size_t i) {
    return r->tensors[i].role == MUONSHARD_ROLE_FROZEN ||
           r->tensors[i].null_grad != MUONSHARD_NULL_GRAD_ERROR;
}

static muonshard_status check_grads(replay *r, const safetensors_file *grads, char *message) {
    muonshard_status status = MUONSHARD_OK;
    for (size_t k = 0; k < grads->tensor_count && status == MUONSHARD_OK; k++) {
        const size_t i = find_param(r, grads->tensors[k].name);
        if (i == r->params.tensor_count)
            return message_fail(message, MUONSHARD_ERR_ARGUMENT, "%s: tensor \"%s\" is not in %s",
                                grads->path, grads->tensors[k].name, r->params.path);
        status = check_grad(r, i, grads->path, &grads->tensors[k], message);
    }
    for (size_t i = 0; i < r->params.tensor_count && status == MUONSHARD_OK; i++)
        if (!grad_optional(r, i) && !safetensors_find(grads, r->tensors[i].name))
            return message_fail(
                message, MUONSHARD_ERR_ARGUMENT,
                "%s: tensor \"%s\" of %s is missing (its null_grad in groups is error; "
                "zero and skip allow it)",
                grads->path, r->tensors[i].name, r->params.path);
    return status;
}

static muonshard_status open_file(const char *path, safetensors_file *file, char *message) {
    error_text error;
    const muonshard_status status = safetensors_open(path, file, &error);
    return status ? message_fail(message, status, "%s", error.text) : MUONSHARD_OK;
}

static muonshard_status open_grads(replay *r, size_t step, safetensors_file *grads, char *message) {
    char *path = rank_name(r->names[step], r->cmd.rank);
    if (!path)
        return message_fail(message, MUONSHARD_ERR_MEMORY, "out of memory");
    muonshard_status status = open_file(path, grads, message);
    if (status == MUONSHARD_OK) {
        status = check_grads(r, grads, message);
        if (status != MUONSHARD_OK)
            safetensors_close(grads);
    }
    free(path);
    return status;
}

/* ---- parameters ---- */

static muonshard_status route_tensor(replay *r, size_t i, char *message) {
    const safetensors_tensor *source = &r->params.tensors[i];
    muonshard_tensor_desc *tensor = &r->tensors[i];
    *tensor = (muonshard_tensor_desc)MUONSHARD_TENSOR_DESC_INIT;
    tensor->name = source->name;
    tensor->dims = source->dims;
    memcpy(tensor->shape, source->shape, sizeof tensor->shape);
    r->results[i] = *source;
    r->ids[i] = CARRIED;
    r->dtypes[i] = source->dtype->name;
    routing_default(tensor);
    muonshard_status status = routing_apply(&r->rules, tensor, &r->rules_chosen[i], message);
    if (status != MUONSHARD_OK)
        return status;
    const int dtype = find_dtype(source->dtype);
    if (source->elements == 0) {
        tensor->role = MUONSHARD_ROLE_FROZEN;
    } else if (dtype >= 0) {
        tensor->dtype = (muonshard_dtype)dtype;
        tensor->param = malloc(source->bytes);
        if (!tensor->param)
            return message_fail(message, MUONSHARD_ERR_MEMORY,
                                "%s: tensor \"%s\": out of memory for %zu bytes", r->params.path,
                                source->name, source->bytes);
        memcpy(tensor->param, source->data, source->bytes);
        r->results[i].data = tensor->param;
    } else if (tensor->role != MUONSHARD_ROLE_FROZEN) {
        return message_fail(message, MUONSHARD_ERR_UNSUPPORTED,
                            "%s: tensor \"%s\" is %s; only F32, BF16 and F16 can be updated "
                            "(role=frozen in groups keeps it as it is)",
                            r->params.path, source->name, source->dtype->name);
    }
    return MUONSHARD_OK;
}

/* Reads what there is to read and checks it, so that nothing that could be seen now is found after
 * hours. Local. */
static muonshard_status replay_load(replay *r, char *message) {
    muonshard_status status = read_arguments(r, message);
    if (status == MUONSHARD_OK)
        status = step_values_set_total(r->cmd.config, (int64_t)r->steps, message);
    if (status == MUONSHARD_OK)
        status = routing_parse(r->settings.groups, &r->rules, message);
    if (status == MUONSHARD_OK)
        status = step_values_open(&r->values, &r->rules, r->cmd.config, message);
    if (status == MUONSHARD_OK)
        status = open_file(command_option_value(&replay_usage, &r->args, "--params"), &r->params,
                           message);
    if (status != MUONSHARD_OK)
        return status;

    size_t count = r->params.tensor_count;
    r->tensors = calloc(count + 1, sizeof *r->tensors);
    r->dtypes = calloc(count + 1, sizeof *r->dtypes);
    r->rules_chosen = calloc(count + 1, sizeof *r->rules_chosen);
    r->ids = calloc(count + 1, sizeof *r->ids);
    r->results = calloc(count + 1, sizeof *r->results);
    if (!r->tensors || !r->dtypes || !r->rules_chosen || !r->ids || !r->results)
        return message_fail(message, MUONSHARD_ERR_MEMORY, "out of memory");
    for (size_t i = 0; i < count && status == MUONSHARD_OK; i++)
        status = route_tensor(r, i, message);
    if (status == MUONSHARD_OK)
        status = check_outs(r, message);
    for (size_t step = 0; step < r->steps && status == MUONSHARD_OK; step++) {
        safetensors_file grads;
        status = open_grads(r, step, &grads, message);
        if (status == MUONSHARD_OK)
            safetensors_close(&grads);
    }
    return status;
}

/* ---- the run; what these return has been told ---- */

static muonshard_status replay_register(replay *r) {
    muonshard_status status = muonshard_create(r->cmd.comm, r->cmd.config, NULL, &r->optimizer);
    if (status != MUONSHARD_OK)
        return command_told(&r->cmd, status, "%s", muonshard_comm_last_error(r->cmd.comm));
    for (size_t i = 0; i < r->params.tensor_count && status == MUONSHARD_OK; i++)
        if (r->tensors[i].param)
            status = muonshard_add_tensor(r->optimizer, &r->tensors[i], &r->ids[i]);
    status = command_agree(&r->cmd, status, muonshard_last_error(r->optimizer));
    if (status != MUONSHARD_OK)
        return status;
    status = muonshard_commit(r->optimizer, MUONSHARD_SYNC_CHECK);
    if (status != MUONSHARD_OK)
        return command_told(&r->cmd, status, "%s", muonshard_last_error(r->optimizer));
    if (r->cmd.rank == 0) {
        routing_print(&r->rules, r->tensors, r->dtypes, r->rules_chosen, r->params.tensor_count,
                      stderr);
        routing_warn_unused(&r->rules, replay_usage.name, stderr);
    }
    return MUONSHARD_OK;
}

/* Rank 0 writes, all learn how it went. step 0: OUT itself. */
static muonshard_status replay_write(replay *r, size_t step) {
    muonshard_status status = MUONSHARD_OK;
    error_text error = {"out of memory"};
    if (r->cmd.rank == 0) {
        char *path = step_name(r->out, step);
        status = path ? safetensors_write(path, r->results, r->params.tensor_count,
                                          r->params.metadata, r->params.metadata_count, &error)
                      : MUONSHARD_ERR_MEMORY;
        free(path);
    }
    return command_agree(&r->cmd, status, error.text);
}

static void tell_step(const replay *r, size_t step, const muonshard_step_result_info *result,
                      double seconds) {
    if (r->cmd.rank != 0)
        return;
    if (result->skipped)
        fprintf(stderr,
                "muonshard replay: warning: step %zu (%s) skipped: a gradient is NaN or infinite\n",
                step, r->names[step - 1]);
    else if (isatty(STDERR_FILENO))
        fprintf(stderr, "step %zu of %zu  gradient norm %.6g  %.3f s\n", step, r->steps,
                result->grad_norm, seconds);
}

/* Step number `step`, from 1. */
static muonshard_status replay_step(replay *r, size_t step) {
    double started = command_now_s();
    char message[COMMAND_MESSAGE] = "";
    safetensors_file grads;
    muonshard_status status = open_grads(r, step - 1, &grads, message);
    bool opened = status == MUONSHARD_OK;
    for (size_t i = 0; i < r->params.tensor_count && status == MUONSHARD_OK; i++) {
        if (r->ids[i] == CARRIED || r->tensors[i].role == MUONSHARD_ROLE_FROZEN)
            continue;
        const safetensors_tensor *grad = safetensors_find(&grads, r->tensors[i].name);
        status = muonshard_set_grad(r->optimizer, r->ids[i], grad ? grad->data : NULL);
        if (status != MUONSHARD_OK)
            message_fail(message, status, "%s", muonshard_last_error(r->optimizer));
    }
    status = command_agree(&r->cmd, status, message);
    if (status == MUONSHARD_OK) {
        muonshard_step_args args = MUONSHARD_STEP_ARGS_INIT;
        muonshard_step_result_info result = MUONSHARD_STEP_RESULT_INIT;
        step_values_at(&r->values, (int64_t)step - 1, &args);
        status = muonshard_step(r->optimizer, &args);
        if (status == MUONSHARD_OK)
            status = muonshard_step_result(r->optimizer, 0, 1, &result);
        if (status == MUONSHARD_OK)
            tell_step(r, step, &result, command_now_s() - started);
        else
            command_told(&r->cmd, status, "step %zu (%s): %s", step, r->names[step - 1],
                         muonshard_last_error(r->optimizer));
    }
    if (opened)
        safetensors_close(&grads);
    return status;
}

static muonshard_status replay_run(replay *r) {
    char message[COMMAND_MESSAGE] = "";
    muonshard_status status = command_agree(&r->cmd, replay_load(r, message), message);
    if (status == MUONSHARD_OK)
        status = replay_register(r);
    for (size_t step = 1; step <= r->steps && status == MUONSHARD_OK; step++) {
        status = replay_step(r, step);
        if (status == MUONSHARD_OK && written_after(r, step))
            status = replay_write(r, step);
    }
    return status == MUONSHARD_OK ? replay_write(r, 0) : status;
}

static void replay_free(replay *r) {
    muonshard_destroy(r->optimizer);
    for (size_t i = 0; r->tensors && i < r->params.tensor_count; i++)
        free(r->tensors[i].param);
    free(r->tensors);
    free(r->dtypes);
    free(r->rules_chosen);
    free(r->ids);
    free(r->results);
    step_values_close(&r->values);
    routing_free(&r->rules);
    safetensors_close(&r->params);
}

int command_replay(int argc, char **argv) {
    if (command_wants_help(argc, argv))
        return command_help(&replay_usage, argc, argv, replay_table,
                            sizeof replay_table / sizeof replay_table[0]);
    replay r = {0};
    muonshard_status status = command_start(&r.cmd, &replay_usage, &r.args, argc, argv);
    if (status == MUONSHARD_OK)
        status = command_configure(&r.cmd, r.args.positional[0], &r.args, replay_table,
                                   sizeof replay_table / sizeof replay_table[0], &r.settings);
    if (status == MUONSHARD_OK)
        status = command_on_host(&r.cmd);
    if (status == MUONSHARD_OK)
        status = replay_run(&r);
    replay_free(&r);
    return command_finish(&r.cmd, &r.args, status);
}
