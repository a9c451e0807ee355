/* settle.c - what came of a step: its record, and when its operations ran. The host backend's steps
 * are over when the walk is; a device's when it gets there, which is looked at two steps later, or
 * as soon as somebody asks. Here the deadlines of a device's collectives are kept. */
#include "optim/optimizer.h"

muonshard_status settle_stamp(muonshard_optimizer *o, size_t index, op_stamp which,
                              backend_stream stream) {
    const size_t at = stamp_index(o, o->step, index, which);
    if (!runs_ahead(o)) {
        o->stamps[at] = now_s();
        return MUONSHARD_OK;
    }
    const muonshard_status status = o->backend->streams->stamp(o->backend, at, stream);
    return status ? step_kill(o, status, &o->backend->error) : MUONSHARD_OK;
}

/* ---- when ---- */

/* Seconds of now_s(). A device's clock is its own: the host's and the device's meet where the
 * step's first stamp is. */
static muonshard_status time_of(muonshard_optimizer *o, int64_t step, size_t index, op_stamp which,
                                double *at) {
    const size_t stamped = stamp_index(o, step, index, which);
    if (!runs_ahead(o)) {
        *at = o->stamps[stamped];
        return MUONSHARD_OK;
    }
    double since = 0.0;
    const muonshard_status status = o->backend->streams->stamp_seconds(
        o->backend, stamp_index(o, step, 0, STAMP_BEGIN), stamped, &since);
    *at = o->begun[step % STEPS_IN_FLIGHT] + since;
    return status ? step_kill(o, status, &o->backend->error) : MUONSHARD_OK;
}

/* The time an operation took counts for its kind; for communication, what was waited for it. */
static muonshard_status account_op(muonshard_optimizer *o, int64_t step, size_t index) {
    const op *operation = &o->schedule.ops[index];
    double begin, end;
    TRY(time_of(o, step, index, STAMP_BEGIN, &begin));
    TRY(time_of(o, step, index, STAMP_END, &end));
    trace_op(o->trace, operation, step, begin, end);
    if (!op_is_collective(operation->kind))
        o->op_seconds[operation->kind] += end - begin;
    if (operation->waits_on == OP_NONE)
        return MUONSHARD_OK;
    const op_kind awaited = o->schedule.ops[operation->waits_on].kind;
    if (!op_is_collective(awaited))
        return MUONSHARD_OK;
    TRY(time_of(o, step, index, STAMP_WAIT_FROM, &begin));
    TRY(time_of(o, step, index, STAMP_WAIT_TO, &end));
    o->op_seconds[awaited] += end - begin;
    return MUONSHARD_OK;
}

static muonshard_status account_times(muonshard_optimizer *o, int64_t step) {
    for (size_t i = 0; i < o->schedule.count; i++)
        TRY(account_op(o, step, i));
    if (runs_ahead(o) && o->schedule.count) {
        double begin, end;
        TRY(time_of(o, step, 0, STAMP_BEGIN, &begin));
        TRY(time_of(o, step, o->schedule.count - 1, STAMP_END, &end));
        o->stats.time_step += end - begin;
    }
    return MUONSHARD_OK;
}

/* ---- what ---- */

void settle_record(muonshard_optimizer *o, int64_t step) {
    const step_record *r = &o->memory.posted[step % STEP_RESULTS];
    muonshard_step_result_info *result = &o->results[step % STEP_RESULTS];
    *result = (muonshard_step_result_info){.size = sizeof *result,
                                           .step = step,
                                           .count = r->count,
                                           .skipped = r->skip && !r->failed,
                                           .grad_norm = r->grad_norm,
                                           .clip_factor = (double)r->clip_factor};
    o->failures[step % STEP_RESULTS].rank = r->failed;
    o->failures[step % STEP_RESULTS].status =
        r->failed && !r->status ? MUONSHARD_ERR_MISMATCH : (muonshard_status)r->status;
    o->stats.skipped += result->skipped;
    o->stats.grad_norm = r->grad_norm;
    for (size_t i = 0; !r->skip && i < o->plan.batch_count; i++) {
        const batch_work *work = &o->batches[i];
        if (work->owned)
            o->stats.ns_flops +=
                (double)work->owned *
                ns_program_flops(work->program, o->plan.batches[i].m, o->plan.batches[i].n);
    }
}

/* ---- waiting ---- */

/* The last operation waits for all others. */
static muonshard_status look(muonshard_optimizer *o, int64_t step, bool *over) {
    *over = true;
    if (!runs_ahead(o) || !o->schedule.count)
        return MUONSHARD_OK;
    const size_t last = stamp_index(o, step, o->schedule.count - 1, STAMP_END);
    const muonshard_status status = o->backend->streams->stamp_passed(o->backend, last, over);
    if (status)
        return step_kill(o, status, &o->backend->error);
    const muonshard_status sound = comm_check(o->data);
    return sound ? step_kill(o, sound, &o->data->error) : MUONSHARD_OK;
}

/* The first operation the device is not past is what the message names. */
static muonshard_status time_out(muonshard_optimizer *o, int64_t step, double deadline) {
    char label[sizeof o->comm->position.phase] = "";
    for (size_t i = 0; i < o->schedule.count; i++) {
        bool passed = false;
        const size_t end = stamp_index(o, step, i, STAMP_END);
        if (o->backend->streams->stamp_passed(o->backend, end, &passed) || !passed) {
            op_label(&o->schedule.ops[i], label, sizeof label);
            break;
        }
    }
    comm_mark(o->data, step, "%s", label);
    const muonshard_status status = comm_time_out(o->data, deadline);
    return step_kill(o, status, &o->data->error);
}

static muonshard_status account(muonshard_optimizer *o, int64_t step) {
    if (runs_ahead(o))
        settle_record(o, step);
    o->settled = step;
    return account_times(o, step);
}

muonshard_status settle_until(muonshard_optimizer *o, int64_t step) {
    while (o->settled < step) {
        const int64_t next = o->settled + 1;
        const double begin = now_s();
        const double deadline = step_deadline(o, next);
        for (bool over = false; !over;) {
            const double waited = now_s() - begin;
            TRY(look(o, next, &over));
            if (!over && waited > deadline)
                return time_out(o, next, deadline);
            if (!over) {
                comm_beat(o->data);
                comm_back_off(waited);
            }
        }
        TRY(account(o, next));
    }
    return MUONSHARD_OK;
}

void settle_idle(muonshard_optimizer *o) {
    if (!runs_ahead(o) || !o->step)
        return;
    /* The one stamp that is no operation's. */
    const size_t idle = o->schedule.count * STEPS_IN_FLIGHT * STAMP_COUNT;
    const double begin = now_s();
    const double deadline = step_deadline(o, o->step);
    for (int stream = STREAM_COUNT - 1; stream >= 0; stream--) {
        bool passed = false;
        muonshard_status status =
            o->backend->streams->stamp(o->backend, idle, (backend_stream)stream);
        while (!passed && status == MUONSHARD_OK && !o->data->dead) {
            status = o->backend->streams->stamp_passed(o->backend, idle, &passed);
            if (!passed && now_s() - begin > deadline)
                comm_time_out(o->data, deadline);
            if (!passed) {
                comm_beat(o->data);
                comm_back_off(now_s() - begin);
            }
        }
    }
}

muonshard_status settle_what_is_over(muonshard_optimizer *o) {
    const int64_t last = o->open ? o->step - 1 : o->step;
    while (o->settled < last) {
        bool over = false;
        TRY(look(o, o->settled + 1, &over));
        if (!over)
            break;
        TRY(account(o, o->settled + 1));
    }
    return MUONSHARD_OK;
}

/* ---- the end of a step, on the host ---- */

/* Host messages at the end of a step wait no longer than its operations. Returns the deadline that
 * holds outside of steps, to be put back. */
static double enter_step_deadline(muonshard_optimizer *o, muonshard_comm *comm, const char *phase) {
    const double outside = comm->options.timeout_s;
    comm_mark(comm, o->step, "%s", phase);
    comm->options.timeout_s = step_deadline(o, o->step);
    return outside;
}

/* A rank without an error of its own may have been given other values than rank 0. */
static muonshard_status compare_values(muonshard_optimizer *o) {
    double first = o->fingerprint;
    const double outside = enter_step_deadline(o, o->comm, "agreement on an error");
    const muonshard_status status = comm_broadcast(o->comm, &first, sizeof first, 0);
    o->comm->options.timeout_s = outside;
    if (status)
        return step_kill(o, status, &o->comm->error);
    if (o->step_status == MUONSHARD_OK && first != o->fingerprint)
        o->step_status = fail(&o->error, MUONSHARD_ERR_MISMATCH,
                              "step: learning rates, momentum, weight decay or grad_scale differ "
                              "from rank 0's");
    return MUONSHARD_OK;
}

/* Everybody knows that some rank failed; the text is the lowest one's. */
static muonshard_status agree_on_failure(muonshard_optimizer *o) {
    TRY(compare_values(o));
    muonshard_comm *over = o->agree_comm ? o->agree_comm : o->comm;
    const double outside = enter_step_deadline(o, over, "agreement on an error");
    const muonshard_status status = comm_agree(over, o->step_status, &o->error);
    over->options.timeout_s = outside;
    return over->dead ? step_kill(o, status, &over->error) : status;
}

static muonshard_status check_replicas(muonshard_optimizer *o) {
    const double outside = enter_step_deadline(o, o->comm, "comparison of replicas");
    const muonshard_status status = replicas_check(o);
    o->comm->options.timeout_s = outside;
    return status ? step_kill(o, status, &o->error) : MUONSHARD_OK;
}

muonshard_status settle_finish(muonshard_optimizer *o) {
    const int64_t every = o->settings->check_replicas;
    const bool check = every && o->step % every == 0;
    o->open = false;
    o->stats.steps++;
    muonshard_status status = MUONSHARD_OK;
    if (!runs_ahead(o) || check)
        TRY(settle_until(o, o->step));
    if (o->failed)
        status = agree_on_failure(o);
    else if (check)
        status = check_replicas(o);
    comm_mark(o->comm, 0, "between steps");
    return status;
}
