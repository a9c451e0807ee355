/* api.c - the public calls on an optimizer: arguments are checked here, and only then does anything
 * move. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <xxhash.h>

#include "curve.h"
#include "optim/optimizer.h"
#include "optim/placement.h"

static const error_text no_handle = {"the handle is NULL"};

const char *muonshard_backend(const muonshard_optimizer *o) {
    return o ? o->backend->ops->name : "";
}

const char *muonshard_device(const muonshard_optimizer *o) {
    return o ? o->backend->device_text : "";
}

const char *muonshard_last_error(const muonshard_optimizer *o) {
    return o ? o->error.text : no_handle.text;
}

/* ---- create ---- */

static muonshard_status open_backend(muonshard_optimizer *o, const placement *at,
                                     error_text *error) {
    char why[256] = "";
    const cuda_options cuda = {.local_rank = at->local_rank,
                               .share = o->settings->share_gpu != 0,
                               .measures = o->settings->gemm_choice != 0,
                               .panels = (int)o->settings->symmetric_panels,
                               .tiles = o->settings->gemm_kernels != 0,
                               .deterministic = o->settings->deterministic != 0};
    const muonshard_status status =
        backend_open((backend_choice)o->settings->backend, placement_options(at, o->settings), cuda,
                     &o->backend, error, why, sizeof why);
    if (status == MUONSHARD_OK && o->comm->rank == 0)
        comm_log(o->comm, MUONSHARD_LOG_INFO, "%s", why);
    return status;
}

/* Corrected, a momentum of 1 would be 0/0. */
static double largest_momentum(const settings *s) {
    return s->momentum_form == MOMENTUM_EMA_CORRECTED ? 0.999999 : 1.0;
}

static muonshard_status check_values_over_steps(const settings *s, error_text *error) {
    const char *const keys[] = {"lr_schedule", "weight_decay_schedule", "momentum_schedule"};
    const char *const schedules[] = {s->lr_schedule, s->weight_decay_schedule,
                                     s->momentum_schedule};
    FAIL_IF(s->momentum > largest_momentum(s), error, MUONSHARD_ERR_CONFIG,
            "momentum is %g; with momentum_form ema_corrected at most %g is allowed", s->momentum,
            largest_momentum(s));
    for (size_t i = 0; i < 3; i++) {
        double lowest, highest;
        error_text why;
        const muonshard_status status =
            curve_range(schedules[i], s->total_steps, &lowest, &highest, &why);
        FAIL_IF(status, error, status, "%s: %s", keys[i], why.text);
        const double max = i == 2 ? largest_momentum(s) : 1e6;
        FAIL_IF(lowest < 0.0 || highest > max, error, MUONSHARD_ERR_CONFIG,
                "%s has values from %g to %g; 0 to %g is allowed", keys[i], lowest, highest, max);
    }
    return MUONSHARD_OK;
}

static muonshard_status build(muonshard_optimizer **out, muonshard_comm *comm,
                              const muonshard_config *config, const muonshard_options *options,
                              const placement *at, error_text *error) {
    muonshard_options own = MUONSHARD_OPTIONS_INIT;
    if (options)
        TRY(take_struct(error, &own, sizeof own, options, "options"));
    FAIL_IF(!config, error, MUONSHARD_ERR_ARGUMENT, "config is NULL");
    muonshard_optimizer *o = calloc(1, sizeof *o);
    *out = o;
    FAIL_IF(!o, error, MUONSHARD_ERR_MEMORY, "out of memory");
    o->comm = o->data = comm;
    o->agree_comm = own.agree_comm;
    o->stream = own.stream;
    TRY(config_copy(config, &o->config, error));
    o->settings = config_settings(o->config);
    o->stats = (muonshard_stats_info)MUONSHARD_STATS_INIT;
    TRY(check_values_over_steps(o->settings, error));
    return open_backend(o, at, error);
}

/* `auto` may find a device on one rank and none on another. */
static muonshard_status check_backends(const muonshard_optimizer *o, error_text *error) {
    char first[32] = "";
    const char *own = o->backend->ops->name;
    snprintf(first, sizeof first, "%s", own);
    const muonshard_status sent = comm_broadcast(o->comm, first, sizeof first, 0);
    FAIL_IF(sent, error, sent, "%s", o->comm->error.text);
    muonshard_status status = MUONSHARD_OK;
    if (strcmp(first, own) != 0)
        status = fail(error, MUONSHARD_ERR_MISMATCH, "backend %s here, %s on rank 0; set `backend`",
                      own, first);
    return comm_agree(o->comm, status, error);
}

/* NCCL, and with it kernels that wait for each other, wants a device of its own for every rank. */
static muonshard_status check_devices(const muonshard_optimizer *o, error_text *error) {
    const size_t bytes = sizeof o->backend->device, ranks = (size_t)o->comm->size;
    uint8_t *all = calloc(ranks, bytes);
    muonshard_status status = comm_agree(o->comm, all ? MUONSHARD_OK : MUONSHARD_ERR_MEMORY, error);
    if (status == MUONSHARD_OK)
        status = comm_allgather(o->comm, o->backend->device, all, bytes);
    for (int r = 0; status == MUONSHARD_OK && !o->settings->share_gpu && r < o->comm->rank; r++)
        if (memcmp(all + (size_t)r * bytes, o->backend->device, bytes) == 0)
            status = fail(error, MUONSHARD_ERR_CONFIG,
                          "ranks %d and %d have the same device (%s); give each its own, or set "
                          "share_gpu",
                          r, o->comm->rank, o->backend->device_text);
    free(all);
    return comm_agree(o->comm, status, error);
}

/* What moves tensors. The choice is the same on all ranks, as settings and backends are. */
static muonshard_status open_data(muonshard_optimizer *o, error_text *error) {
    static const char *const names[] = {NULL, "self", "mpi", "nccl"};
    const int choice = o->settings->comm;
    const char *given = o->comm->ops->name;
    const bool on_device = o->backend->streams != NULL;
    const char *why = "as configured";
    if (on_device)
        TRY(check_devices(o, error));
    if (choice == COMM_NCCL || (choice == COMM_AUTO && on_device)) {
        FAIL_IF(!on_device, error, MUONSHARD_ERR_UNAVAILABLE,
                "comm: nccl moves memory of GPUs; the backend is %s", o->backend->ops->name);
        if (o->comm->ops->on_stream && (choice == COMM_AUTO || strcmp(given, "nccl") == 0))
            return MUONSHARD_OK;
        const muonshard_status status = comm_open_nccl(
            o->comm, o->backend->ordinal, o->settings->deterministic != 0, &o->data, error);
        if (status == MUONSHARD_OK || choice == COMM_NCCL || o->comm->dead)
            return status;
        why = error->text;
    } else if (choice != COMM_AUTO) {
        FAIL_IF(strcmp(given, names[choice]) != 0, error, MUONSHARD_ERR_UNAVAILABLE,
                "comm: %s is configured; the program came with a communicator over %s",
                names[choice], given);
    }
    if (on_device && !o->comm->ops->on_stream && o->comm->rank == 0)
        comm_log(o->comm, MUONSHARD_LOG_WARNING,
                 "tensors go over %s, through memory of the host "
                 "(%s)",
                 given, why);
    return MUONSHARD_OK;
}

muonshard_status muonshard_create(muonshard_comm *comm, const muonshard_config *config,
                                  const muonshard_options *options, muonshard_optimizer **out) {
    if (!comm)
        return MUONSHARD_ERR_ARGUMENT;
    if (out)
        *out = NULL;
    TRY(comm->dead);
    muonshard_optimizer *o = NULL;
    error_text error = {""};
    comm_mark(comm, 0, "create optimizer");
    placement at;
    muonshard_status status = placement_find(comm, &at, &error);
    TRY_GOTO(status, failed);
    status = out ? build(&o, comm, config, options, &at, &error)
                 : fail(&error, MUONSHARD_ERR_ARGUMENT, "optimizer is NULL");
    TRY_GOTO(comm_agree(comm, status, &error), failed);
    TRY_GOTO(config_check_equal(o->config, comm, &error), failed);
    TRY_GOTO(check_backends(o, &error), failed);
    TRY_GOTO(open_data(o, &error), failed);
    *out = o;
    return MUONSHARD_OK;
failed:
    fail(&comm->error, status, "%s", error.text);
    muonshard_destroy(o);
    return status;
}

void muonshard_destroy(muonshard_optimizer *o) {
    if (!o)
        return;
    /* Kernels of a dead communicator may never end, and freeing memory would wait for them. */
    if (o->committed && !o->dead)
        settle_idle(o);
    const bool stuck = o->data && o->data->dead && o->data->ops->on_stream &&
                       o->data->ops->writes_after_death && o->backend && o->backend->streams;
    if (o->backend && !stuck) {
        optimizer_release(o);
        backend_close(o->backend);
    }
    if (o->data != o->comm)
        muonshard_comm_destroy(o->data);
    registry_free(&o->registry);
    muonshard_config_destroy(o->config);
    free(o->loaded_path);
    free(o->loaded_user);
    free(o);
}

/* ---- tensors ---- */

static muonshard_status check_alive(muonshard_optimizer *o, bool committed) {
    if (!o)
        return MUONSHARD_ERR_ARGUMENT;
    TRY(o->dead);
    FAIL_IF(committed && !o->committed, &o->error, MUONSHARD_ERR_STATE,
            "muonshard_commit comes first");
    FAIL_IF(!committed && o->committed, &o->error, MUONSHARD_ERR_STATE,
            "tensors cannot be added after muonshard_commit, nor can it be called twice");
    return MUONSHARD_OK;
}

static muonshard_status check_id(muonshard_optimizer *o, int id) {
    FAIL_IF(id < 0 || (size_t)id >= o->registry.tensor_count, &o->error, MUONSHARD_ERR_ARGUMENT,
            "tensor %d; there are %zu", id, o->registry.tensor_count);
    return MUONSHARD_OK;
}

static muonshard_status check_entries(muonshard_optimizer *o, int id, int64_t first,
                                      int64_t count) {
    TRY(check_id(o, id));
    const tensor *t = &o->registry.tensors[id];
    FAIL_IF(first < 0 || count < 0 || first > t->entries || count > t->entries - first, &o->error,
            MUONSHARD_ERR_ARGUMENT, "tensor '%s': entries %lld and %lld more; it has %lld", t->name,
            (long long)first, (long long)count, (long long)t->entries);
    return MUONSHARD_OK;
}

/* A kernel that reads what is not its device's ends the program's device, with no word of whose it
 * was. */
static muonshard_status check_memory(muonshard_optimizer *o, const char *name, const char *what,
                                     const void *memory) {
    const stream_ops *streams = o->backend->streams;
    FAIL_IF(
        streams && memory && !streams->is_device(o->backend, memory), &o->error,
        MUONSHARD_ERR_ARGUMENT,
        "tensor '%s': its %s is memory of the host or of another device; the backend is %s (%s)",
        name ? name : "", what, o->backend->ops->name, o->backend->device_text);
    return MUONSHARD_OK;
}

muonshard_status optimizer_check(muonshard_optimizer *o) {
    return check_alive(o, true);
}

muonshard_status muonshard_add_tensor(muonshard_optimizer *o, const muonshard_tensor_desc *desc,
                                      int *id) {
    TRY(check_alive(o, false));
    muonshard_tensor_desc own = MUONSHARD_TENSOR_DESC_INIT;
    TRY(take_struct(&o->error, &own, sizeof own, desc, "tensor"));
    TRY(check_memory(o, own.name, "parameter", own.param));
    TRY(check_memory(o, own.name, "gradient", own.grad));
    return registry_add(&o->registry, o->settings, &own, id, &o->error);
}

muonshard_status muonshard_set_grad(muonshard_optimizer *o, int id, const void *grad) {
    if (!o)
        return MUONSHARD_ERR_ARGUMENT;
    TRY(o->dead);
    TRY(check_id(o, id));
    tensor *t = &o->registry.tensors[id];
    if (o->committed && o->open)
        for (size_t i = o->first_entry[id]; i < o->first_entry[id + 1]; i++)
            FAIL_IF(o->ready[i], &o->error, MUONSHARD_ERR_STATE,
                    "tensor '%s': entry %zu of the gradient is marked ready already", t->name,
                    i - o->first_entry[id]);
    TRY(check_memory(o, t->name, "gradient", grad));
    t->grad = grad;
    return MUONSHARD_OK;
}

muonshard_status muonshard_commit(muonshard_optimizer *o, muonshard_sync_params sync) {
    TRY(check_alive(o, false));
    muonshard_status local = MUONSHARD_OK;
    if (sync != MUONSHARD_SYNC_CHECK && sync != MUONSHARD_SYNC_BROADCAST &&
        sync != MUONSHARD_SYNC_NONE)
        local =
            fail(&o->error, MUONSHARD_ERR_ARGUMENT, "commit: unknown sync_params %d", (int)sync);
    return optimizer_commit(o, local, sync);
}

/* ---- the step ---- */

static double pick(double given, double otherwise) {
    return isnan(given) ? otherwise : given;
}

static muonshard_status check_value(muonshard_optimizer *o, const char *name, double value,
                                    double max) {
    FAIL_IF(!isnan(value) && !(value >= 0.0 && value <= max), &o->error, MUONSHARD_ERR_ARGUMENT,
            "step: %s is %g; 0 to %g is allowed, or NaN for the configured value", name, value,
            max);
    return MUONSHARD_OK;
}

static muonshard_status check_args(muonshard_optimizer *o, const muonshard_step_args *a) {
    const double big = 1e6;
    TRY(check_value(o, "lr", a->lr, big));
    TRY(check_value(o, "momentum", a->momentum, largest_momentum(o->settings)));
    TRY(check_value(o, "weight_decay", a->weight_decay, big));
    TRY(check_value(o, "adam_lr", a->adam_lr, big));
    TRY(check_value(o, "adam_weight_decay", a->adam_weight_decay, big));
    FAIL_IF(!(a->lr_factor >= 0.0) || !isfinite(a->lr_factor), &o->error, MUONSHARD_ERR_ARGUMENT,
            "step: lr_factor is %g; it must be finite and not negative", a->lr_factor);
    FAIL_IF(!(a->grad_scale > 0.0) || !isfinite(a->grad_scale), &o->error, MUONSHARD_ERR_ARGUMENT,
            "step: grad_scale is %g; it must be finite and positive", a->grad_scale);
    FAIL_IF(a->group_count && !a->groups, &o->error, MUONSHARD_ERR_ARGUMENT,
            "step: groups is NULL, group_count is %zu", a->group_count);
    for (size_t g = 0; g < a->group_count; g++) {
        TRY(check_value(o, "a group's lr", a->groups[g].lr, big));
        TRY(check_value(o, "a group's momentum", a->groups[g].momentum,
                        largest_momentum(o->settings)));
        TRY(check_value(o, "a group's weight_decay", a->groups[g].weight_decay, big));
    }
    return MUONSHARD_OK;
}

static muonshard_status check_gradients(muonshard_optimizer *o) {
    for (size_t i = 0; i < o->registry.tensor_count; i++) {
        const tensor *t = &o->registry.tensors[i];
        FAIL_IF(!t->grad && t->role != MUONSHARD_ROLE_FROZEN &&
                    t->null_grad == MUONSHARD_NULL_GRAD_ERROR,
                &o->error, MUONSHARD_ERR_ARGUMENT,
                "step: the gradient of tensor '%s' is NULL and its null_grad is error", t->name);
    }
    return MUONSHARD_OK;
}

/* What the step's arguments leave to the configuration: matrices and element-wise tensors. */
static void configured_values(const muonshard_optimizer *o, tensor_values *matrix,
                              tensor_values *elementwise) {
    const settings *s = o->settings;
    double lr = 1.0, decay = 1.0; /* factors; the schedules are known to be well-formed */
    curve_value(s->lr_schedule, o->step - 1, s->total_steps, 1.0, &lr, NULL);
    curve_value(s->weight_decay_schedule, o->step - 1, s->total_steps, 1.0, &decay, NULL);
    *matrix = (tensor_values){.lr = lr * s->lr, .weight_decay = decay * s->weight_decay};
    curve_value(s->momentum_schedule, o->step - 1, s->total_steps, s->momentum, &matrix->momentum,
                NULL);
    *elementwise =
        (tensor_values){.lr = lr * s->adam_lr, .weight_decay = decay * s->adam_weight_decay};
}

/* From configuration, step, group and multipliers to one triple a tensor. */
static muonshard_status set_values(muonshard_optimizer *o, const muonshard_step_args *a) {
    tensor_values matrix, elementwise;
    configured_values(o, &matrix, &elementwise);
    const double lr = pick(a->lr, matrix.lr), momentum = pick(a->momentum, matrix.momentum);
    const double decay = pick(a->weight_decay, matrix.weight_decay);
    const double adam_lr = pick(a->adam_lr, pick(elementwise.lr, lr * o->settings->adam_lr_scale));
    const double adam_decay = pick(a->adam_weight_decay, pick(elementwise.weight_decay, decay));
    for (size_t i = 0; i < o->registry.tensor_count; i++) {
        const tensor *t = &o->registry.tensors[i];
        const bool muon = t->role == MUONSHARD_ROLE_MATRIX;
        tensor_values v = {muon ? lr : adam_lr, momentum, muon ? decay : adam_decay};
        if ((size_t)t->group < a->group_count) {
            const muonshard_group_args *g = &a->groups[t->group];
            v = (tensor_values){pick(g->lr, v.lr), pick(g->momentum, v.momentum),
                                pick(g->weight_decay, v.weight_decay)};
        }
        v.lr *= t->lr_multiplier * a->lr_factor;
        v.weight_decay *= t->decay_multiplier;
        o->values[i] = v;
    }
    const size_t bytes = o->registry.tensor_count * sizeof *o->values;
    const uint64_t hash = XXH64(&a->grad_scale, sizeof a->grad_scale, XXH64(o->values, bytes, 0));
    o->fingerprint = (double)(hash >> 11); /* 53 bits: all that a double holds */
    const muonshard_status status =
        backend_write(o->backend, o->memory.values, o->values, bytes, STREAM_COMPUTE);
    return status ? step_kill(o, status, &o->backend->error) : MUONSHARD_OK;
}

/* The operation after all that is computed and sent. */
static size_t deferred_end(const muonshard_optimizer *o) {
    size_t end = o->schedule.count;
    while (end > 0 && o->schedule.ops[end - 1].kind == OP_APPLY)
        end--;
    return end;
}

muonshard_status muonshard_step(muonshard_optimizer *o, const muonshard_step_args *args) {
    TRY(check_alive(o, true));
    if (o->open && o->called)
        TRY(step_run_until(o, o->schedule.count));
    if (!o->open)
        TRY(step_begin(o));
    o->called = true;

    muonshard_step_args a = MUONSHARD_STEP_ARGS_INIT;
    muonshard_status local = MUONSHARD_OK;
    if (args)
        local = take_struct(&o->error, &a, sizeof a, args, "step arguments");
    if (local == MUONSHARD_OK)
        local = check_args(o, &a);
    if (local == MUONSHARD_OK)
        local = check_gradients(o);
    if (local != MUONSHARD_OK)
        a = (muonshard_step_args)MUONSHARD_STEP_ARGS_INIT; /* the others must not be left waiting */
    o->step_status = local;
    o->grad_scale = a.grad_scale;
    void *stream = a.stream ? a.stream : o->stream;
    TRY(step_join(o, stream));
    TRY(set_values(o, &a));
    for (size_t i = 0; i < o->first_entry[o->registry.tensor_count]; i++)
        o->ready[i] = 1;
    const bool waits = a.defer && !(runs_ahead(o) && o->data->ops->on_stream);
    TRY(step_run_until(o, waits ? deferred_end(o) : o->schedule.count));
    if (runs_ahead(o)) {
        TRY(a.defer ? step_give_back_gradients(o, stream) : step_give_back(o, stream));
        return local;
    }
    /* A failed step is not deferred: all ranks know of it, and all return it from this call. */
    return o->open && o->failed ? step_run_until(o, o->schedule.count) : MUONSHARD_OK;
}

muonshard_status muonshard_grad_ready(muonshard_optimizer *o, int id, int64_t first,
                                      int64_t count) {
    TRY(check_alive(o, true));
    TRY(check_entries(o, id, first, count));
    FAIL_IF(o->open && o->called, &o->error, MUONSHARD_ERR_STATE,
            "step %lld is deferred and not finished; muonshard_step_result with wait finishes it",
            (long long)o->step);
    if (!o->open)
        TRY(step_begin(o));
    uint8_t *ready = o->ready + o->first_entry[id] + first;
    for (int64_t i = 0; i < count; i++)
        FAIL_IF(ready[i], &o->error, MUONSHARD_ERR_ARGUMENT,
                "tensor '%s': entry %lld is marked ready twice in one step",
                o->registry.tensors[id].name, (long long)(first + i));
    for (int64_t i = 0; i < count; i++)
        ready[i] = 1;
    TRY(step_join(o, o->stream));
    return step_start_ready(o);
}

muonshard_status muonshard_step_result(muonshard_optimizer *o, int64_t step, int wait,
                                       muonshard_step_result_info *result) {
    TRY(check_alive(o, true));
    const int64_t last = o->open && !o->called ? o->step - 1 : o->step;
    const int64_t wanted = step ? step : last;
    FAIL_IF(wanted < 1 || wanted > last || wanted <= last - STEP_RESULTS, &o->error,
            MUONSHARD_ERR_ARGUMENT,
            "the result of step %lld; %lld steps were called, the last %d are kept",
            (long long)wanted, (long long)last, STEP_RESULTS);
    if (wanted == o->step && o->open && o->called && wait)
        TRY(step_run_until(o, o->schedule.count));
    TRY(wait ? settle_until(o, wanted) : settle_what_is_over(o));
    const muonshard_step_result_info *r = &o->results[wanted % STEP_RESULTS];
    FAIL_IF(r->step != wanted, &o->error, MUONSHARD_ERR_STATE,
            "the result of step %lld is not known yet", (long long)wanted);
    const int failed = o->failures[wanted % STEP_RESULTS].rank;
    const muonshard_status status = o->failures[wanted % STEP_RESULTS].status;
    FAIL_IF(runs_ahead(o) && failed, &o->error, status,
            "step %lld failed on rank %d: %s; nothing has changed", (long long)wanted, failed - 1,
            status == MUONSHARD_ERR_MISMATCH
                ? "its learning rates, momentum, weight decay or grad_scale differ from rank 0's"
                : muonshard_status_string(status));
    return give_struct(&o->error, r, sizeof *r, result, "result");
}

static size_t apply_of_batch(const muonshard_optimizer *o, size_t batch_index) {
    for (size_t i = 0; i < o->schedule.count; i++)
        if (o->schedule.ops[i].kind == OP_APPLY && (size_t)o->schedule.ops[i].index == batch_index)
            return i + 1;
    return 0;
}

/* Where the schedule is past the apply of these entries. */
static size_t end_of_entries(const muonshard_optimizer *o, int id, int64_t first, int64_t count) {
    const tensor *t = &o->registry.tensors[id];
    size_t end = 0;
    for (size_t b = 0; b < o->plan.batch_count && count; b++) {
        const batch *bt = &o->plan.batches[b];
        bool covers = bt->kind == PLAN_FLAT && t->role == MUONSHARD_ROLE_ELEMENTWISE;
        for (size_t v = t->first_view; v < t->first_view + t->view_count && !covers; v++) {
            const int64_t entry = o->registry.views[v].entry;
            const size_t w = o->plan.view_wave[v];
            covers = entry >= first && entry < first + count && w >= bt->first &&
                     w < bt->first + bt->count;
        }
        const size_t applied = covers ? apply_of_batch(o, b) : 0;
        end = applied > end ? applied : end;
    }
    return end;
}

muonshard_status muonshard_tensor_wait(muonshard_optimizer *o, int id, int64_t first, int64_t count,
                                       void *stream) {
    TRY(check_alive(o, true));
    TRY(check_entries(o, id, first, count));
    const size_t end = end_of_entries(o, id, first, count);
    if (o->open && o->called && end > o->next)
        TRY(step_run_until(o, end));
    const int64_t last = o->open && !o->called ? o->step - 1 : o->step;
    return last > 0 && end > 0 ? step_give_back_op(o, end - 1, last, stream) : MUONSHARD_OK;
}

muonshard_status muonshard_progress(muonshard_optimizer *o) {
    TRY(check_alive(o, true));
    return o->open ? step_progress(o) : MUONSHARD_OK;
}

/* ---- looking in ---- */

muonshard_status muonshard_stats(const muonshard_optimizer *o, muonshard_stats_info *stats) {
    if (!o)
        return MUONSHARD_ERR_ARGUMENT;
    /* Const is for the optimizer; the text of the last error may change. */
    error_text *error = &((muonshard_optimizer *)o)->error;
    FAIL_IF(!o->committed, error, MUONSHARD_ERR_STATE, "muonshard_commit comes first");
    muonshard_stats_info s = o->stats;
    s.time_pack = o->op_seconds[OP_PACK] + o->op_seconds[OP_TAKE];
    s.time_reduce_scatter = o->op_seconds[OP_REDUCE_SCATTER];
    s.time_agree = o->op_seconds[OP_MEASURE] + o->op_seconds[OP_AGREE] + o->op_seconds[OP_RESOLVE];
    s.time_momentum = o->op_seconds[OP_MOMENTUM];
    s.time_orthogonalize = o->op_seconds[OP_ORTHOGONALIZE];
    s.time_all_gather = o->op_seconds[OP_ALL_GATHER];
    s.time_elementwise = o->op_seconds[OP_ADAM];
    s.time_apply = o->op_seconds[OP_VARIANCE] + o->op_seconds[OP_UPDATE] + o->op_seconds[OP_APPLY];
    return give_struct(error, &s, sizeof s, stats, "stats");
}
