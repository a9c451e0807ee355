#include "comm/comm.h"

#include <math.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* ---- life and death ---- */

muonshard_status comm_refuse(const muonshard_comm_options *options, muonshard_status status,
                             const char *format, ...) {
    muonshard_comm_options own = MUONSHARD_COMM_OPTIONS_INIT;
    if (!options || take_struct(NULL, &own, sizeof own, options, "options") || !own.log)
        return status;
    error_text error;
    va_list args;
    va_start(args, format);
    vsnprintf(error.text, sizeof error.text, format, args);
    va_end(args);
    own.log(own.log_user, MUONSHARD_LOG_ERROR, error.text);
    return status;
}

muonshard_status comm_create(const comm_ops *ops, void *impl, int rank, int size,
                             const muonshard_comm_options *options, muonshard_comm **out) {
    muonshard_comm_options own = MUONSHARD_COMM_OPTIONS_INIT;
    if (options)
        TRY(take_struct(NULL, &own, sizeof own, options, "options"));
    if (!(own.timeout_s > 0.0) || isinf(own.timeout_s))
        return comm_refuse(options, MUONSHARD_ERR_ARGUMENT,
                           "options.timeout_s is %g; it has to be positive and finite",
                           own.timeout_s);
    muonshard_comm *comm = calloc(1, sizeof *comm);
    if (!comm)
        return MUONSHARD_ERR_MEMORY;
    comm->ops = ops;
    comm->impl = impl;
    comm->rank = rank;
    comm->size = size;
    comm->sums_fp32 = comm->sums_16bit = ops->native_reduce_scatter;
    comm->options = own;
    if (gethostname(comm->host, sizeof comm->host) != 0)
        snprintf(comm->host, sizeof comm->host, "unknown");
    comm->host[sizeof comm->host - 1] = '\0';
    snprintf(comm->position.phase, sizeof comm->position.phase, "create communicator");
    snprintf(comm->outside, sizeof comm->outside, "outside the library");
    *out = comm;
    return MUONSHARD_OK;
}

void muonshard_comm_destroy(muonshard_comm *comm) {
    if (!comm)
        return;
    comm->ops->destroy(comm);
    free(comm);
}

muonshard_status comm_die(muonshard_comm *comm, muonshard_status status, const char *format, ...) {
    if (comm->dead)
        return comm->dead;
    error_text error; /* an argument may be the old text */
    va_list args;
    va_start(args, format);
    vsnprintf(error.text, sizeof error.text, format, args);
    va_end(args);
    comm->error = error;
    comm->dead = status;
    /* Whoever takes the fatal call has the message; the log would say it twice. */
    if (comm->options.on_fatal)
        comm->options.on_fatal(comm->options.fatal_user, status, comm->error.text);
    else
        comm_log(comm, MUONSHARD_LOG_ERROR, "%s", comm->error.text);
    return status;
}

void comm_log(muonshard_comm *comm, muonshard_log_level level, const char *format, ...) {
    if (!comm->options.log)
        return;
    error_text line;
    va_list args;
    va_start(args, format);
    vsnprintf(line.text, sizeof line.text, format, args);
    va_end(args);
    comm->options.log(comm->options.log_user, level, line.text);
}

void comm_mark(muonshard_comm *comm, int64_t step, const char *format, ...) {
    if (comm->dead) /* others read where it died */
        return;
    va_list args;
    va_start(args, format);
    vsnprintf(comm->position.phase, sizeof comm->position.phase, format, args);
    va_end(args);
    comm->position.step = step;
    if (comm->ops->mark)
        comm->ops->mark(comm, &comm->position);
}

/* ---- requests ---- */

static muonshard_status check_request(muonshard_comm *comm, const comm_request *request) {
    FAIL_IF(request->part_count && !request->parts, &comm->error, MUONSHARD_ERR_INTERNAL,
            "a request of %zu parts has none", request->part_count);
    FAIL_IF(request->kind == COMM_BROADCAST && (request->root < 0 || request->root >= comm->size),
            &comm->error, MUONSHARD_ERR_ARGUMENT, "broadcast: root is %d; it has to be in 0..%d",
            request->root, comm->size - 1);
    if (request->kind != COMM_REDUCE_SCATTER)
        return MUONSHARD_OK;
    for (size_t i = 0; i < request->part_count; i++) {
        const comm_part *part = &request->parts[i];
        FAIL_IF(part->bytes % dtype_size(part->dtype), &comm->error, MUONSHARD_ERR_INTERNAL,
                "reduce-scatter: a slot of %zu bytes is no whole number of %s", part->bytes,
                dtype_name(part->dtype));
        FAIL_IF(!comm_sums(comm, part->dtype) && part->bytes &&
                    (!part->scratch || !request->backend),
                &comm->error, MUONSHARD_ERR_INTERNAL,
                "reduce-scatter over %s needs scratch and a backend", comm->ops->name);
    }
    return MUONSHARD_OK;
}

/* ---- memory of a device, for transports that don't know it ---- */

static muonshard_status failed_backend(muonshard_comm *comm, const comm_request *request,
                                       muonshard_status status) {
    return status ? fail(&comm->error, status, "%s", request->backend->error.text) : MUONSHARD_OK;
}

static muonshard_status bring_down(muonshard_comm *comm, const comm_request *request) {
    backend *memory = request->backend;
    for (size_t i = 0; i < request->part_count; i++) {
        const comm_part *part = &request->parts[i], *host = &request->host_parts[i];
        const size_t slots = request->kind == COMM_ALL_GATHER ? 1 : (size_t)comm->size;
        const copy_item item = {(void *)(uintptr_t)host->send, part->send, slots * part->bytes};
        TRY(failed_backend(comm, request,
                           memory->streams->copy_async(memory, &item, 1, request->stream)));
    }
    return failed_backend(comm, request,
                          memory->streams->stamp(memory, request->stamp, request->stream));
}

static muonshard_status bring_up(muonshard_comm *comm, const comm_request *request) {
    backend *memory = request->backend;
    for (size_t i = 0; i < request->part_count; i++) {
        const comm_part *part = &request->parts[i], *host = &request->host_parts[i];
        const copy_item item = {comm_exchange_target(request, part),
                                comm_exchange_target(request, host),
                                (size_t)comm->size * part->bytes};
        TRY(failed_backend(comm, request,
                           memory->streams->copy_async(memory, &item, 1, request->stream)));
    }
    return MUONSHARD_OK;
}

/* The transport sees the request with the host's parts. */
static muonshard_status hand_over(muonshard_comm *comm, comm_ticket *ticket) {
    const comm_part *parts = ticket->request.parts;
    ticket->request.parts = ticket->request.host_parts;
    const muonshard_status status = comm->ops->start(comm, ticket);
    ticket->request.parts = parts;
    return status;
}

/* Until the device is past what is sent, nothing is given to the transport. */
static muonshard_status test_staged(muonshard_comm *comm, comm_ticket *ticket, bool *arrived) {
    const comm_request *request = &ticket->request;
    if (ticket->coming_down) {
        bool passed = false;
        TRY(failed_backend(
            comm, request,
            request->backend->streams->stamp_passed(request->backend, request->stamp, &passed)));
        if (!passed)
            return MUONSHARD_OK;
        ticket->coming_down = false;
        TRY(hand_over(comm, ticket));
    }
    TRY(comm->ops->test(comm, ticket, arrived));
    return *arrived ? bring_up(comm, request) : MUONSHARD_OK;
}

/* ---- starting and testing ---- */

muonshard_status comm_start(muonshard_comm *comm, const comm_request *request,
                            comm_ticket *ticket) {
    *ticket = (comm_ticket){.request = *request};
    if (comm->dead)
        return comm->dead;
    TRY(check_request(comm, request));
    if (comm_is_staged(comm, request->backend)) {
        FAIL_IF((request->part_count && !request->host_parts) || request->kind == COMM_BROADCAST,
                &comm->error, MUONSHARD_ERR_INTERNAL, "%s carries memory of the host only",
                comm->ops->name);
        TRY(bring_down(comm, request));
        ticket->coming_down = true;
    } else {
        TRY(comm->ops->start(comm, ticket));
    }
    ticket->open = true;
    return MUONSHARD_OK;
}

static muonshard_status sum_in_rank_order(muonshard_comm *comm, const comm_request *request) {
    for (size_t i = 0; i < request->part_count; i++) {
        const comm_part *part = &request->parts[i];
        if (!part->bytes || comm_sums(comm, part->dtype))
            continue;
        const sum_ranks_args args = {.dst = part->recv,
                                     .received = part->scratch,
                                     .own = (const char *)part->send +
                                            (size_t)comm->rank * part->bytes,
                                     .dtype = part->dtype,
                                     .ranks = comm->size,
                                     .rank = comm->rank,
                                     .count = part->bytes / dtype_size(part->dtype)};
        muonshard_status status =
            request->backend->ops->sum_ranks(request->backend, &args, request->stream);
        FAIL_IF(status, &comm->error, status, "reduce-scatter, sum over ranks: %s",
                request->backend->error.text);
    }
    return MUONSHARD_OK;
}

muonshard_status comm_test(muonshard_comm *comm, comm_ticket *ticket, bool *done) {
    *done = false;
    if (comm->dead)
        return comm->dead;
    if (!ticket->open) {
        *done = true;
        return MUONSHARD_OK;
    }
    comm_beat(comm);
    bool arrived = false;
    if (comm_is_staged(comm, ticket->request.backend))
        TRY(test_staged(comm, ticket, &arrived));
    else
        TRY(comm->ops->test(comm, ticket, &arrived));
    if (!arrived)
        return MUONSHARD_OK;
    ticket->open = false;
    if (ticket->request.kind == COMM_REDUCE_SCATTER)
        TRY(sum_in_rank_order(comm, &ticket->request));
    *done = true;
    return MUONSHARD_OK;
}

/* Spins while an answer is a matter of microseconds, then leaves the core to ranks that share it.
 */
void comm_back_off(double waited_s) {
    if (waited_s < 20e-6)
        return;
    if (waited_s < 500e-6) {
        sched_yield();
        return;
    }
    double pause_s = fmin(waited_s / 16.0, 100e-6);
    struct timespec pause = {0, (long)(pause_s * 1e9)};
    nanosleep(&pause, NULL);
}

muonshard_status comm_time_out(muonshard_comm *comm, double timeout_s) {
    char where[96], culprit[320] = "", others[640] = "";
    if (comm->position.step > 0)
        snprintf(where, sizeof where, "step %lld, %s", (long long)comm->position.step,
                 comm->position.phase);
    else
        snprintf(where, sizeof where, "%s", comm->position.phase);
    if (comm->ops->blame && comm->ops->blame(comm, timeout_s, culprit, sizeof culprit))
        return comm_die(comm, MUONSHARD_ERR_TIMEOUT, "%s; rank %d waited %g s for it in %s",
                        culprit, comm->rank, timeout_s, where);
    if (comm->ops->describe)
        comm->ops->describe(comm, others, sizeof others);
    return comm_die(comm, MUONSHARD_ERR_TIMEOUT,
                    "rank %d of %d (host %s): %s: no completion within %g s%s%s", comm->rank,
                    comm->size, comm->host, where, timeout_s, others[0] ? "; " : "", others);
}

muonshard_status comm_wait(muonshard_comm *comm, comm_ticket *ticket, double timeout_s) {
    double begin = now_s();
    for (;;) {
        /* The clock before the test: a rank that slept past its deadline still takes what has
         * arrived. */
        double waited = now_s() - begin;
        bool done;
        TRY(comm_test(comm, ticket, &done));
        if (done)
            return MUONSHARD_OK;
        if (waited > timeout_s)
            return comm_time_out(comm, timeout_s);
        comm_back_off(waited);
    }
}

muonshard_status comm_check(muonshard_comm *comm) {
    TRY(comm->dead);
    comm_beat(comm);
    return comm->ops->check ? comm->ops->check(comm) : MUONSHARD_OK;
}

muonshard_status comm_run(muonshard_comm *comm, const comm_request *request) {
    comm_ticket ticket;
    TRY(comm_start(comm, request, &ticket));
    return comm_wait(comm, &ticket, comm->options.timeout_s);
}

/* ---- host messages ---- */

/* Where some ranks are in a collective already, a rank without memory can't stay away: it dies. */
static muonshard_status no_memory(muonshard_comm *comm, const char *what) {
    return comm_die(comm, MUONSHARD_ERR_MEMORY, "rank %d of %d (host %s): %s: out of memory",
                    comm->rank, comm->size, comm->host, what);
}

/* Through memory of our own where a transport may still write after a timeout: the callers' is on
 * stacks and in blocks that are freed. After a timeout it is left to the transport. */
static muonshard_status run_host(muonshard_comm *comm, comm_kind kind, const void *send,
                                 size_t sent, void *recv, size_t bytes, int root) {
    const size_t received = kind == COMM_ALL_GATHER ? (size_t)comm->size * bytes : bytes;
    comm_part part = {.send = send, .recv = recv, .bytes = bytes};
    comm_request request = {.kind = kind, .parts = &part, .part_count = 1, .root = root};
    if (!comm->ops->writes_after_death || !bytes)
        return comm_run(comm, &request);
    char *own = malloc(sent + received);
    if (!own)
        return no_memory(comm, comm->position.phase);
    if (sent)
        memcpy(own, send, sent);
    else
        memcpy(own, recv, received);
    part.send = own;
    part.recv = own + sent;
    const muonshard_status status = comm_run(comm, &request);
    if (status == MUONSHARD_OK)
        memcpy(recv, part.recv, received);
    if (!comm->dead)
        free(own);
    return status;
}

muonshard_status comm_allgather(muonshard_comm *comm, const void *send, void *recv, size_t bytes) {
    return run_host(comm, COMM_ALL_GATHER, send, bytes, recv, bytes, 0);
}

muonshard_status comm_broadcast(muonshard_comm *comm, void *data, size_t bytes, int root) {
    return run_host(comm, COMM_BROADCAST, NULL, 0, data, bytes, root);
}

/* One small all-gather; the text travels only when there is one. */
static muonshard_status agree(muonshard_comm *comm, muonshard_status status, error_text *text) {
    if (comm->dead)
        return comm->dead;
    int32_t mine = status;
    int32_t *all = malloc((size_t)comm->size * sizeof *all);
    if (!all)
        return no_memory(comm, "agreement");
    muonshard_status sent = comm_allgather(comm, &mine, all, sizeof mine);
    int root = 0;
    while (!sent && root < comm->size && all[root] == MUONSHARD_OK)
        root++;
    muonshard_status agreed =
        !sent && root < comm->size ? (muonshard_status)all[root] : MUONSHARD_OK;
    free(all);
    TRY(sent);
    if (agreed == MUONSHARD_OK)
        return MUONSHARD_OK;
    TRY(comm_broadcast(comm, text->text, sizeof text->text, root));
    text->text[sizeof text->text - 1] = '\0';
    if (root == comm->rank)
        return fail(&comm->error, agreed, "%s", text->text);
    return fail(&comm->error, agreed, "rank %d: %s", root, text->text);
}

muonshard_status comm_agree(muonshard_comm *comm, muonshard_status status, error_text *error) {
    error_text text = {{0}};
    if (status)
        fail(&text, status, "%s",
             error && error->text[0] ? error->text : muonshard_status_string(status));
    muonshard_status agreed = agree(comm, status, &text);
    if (agreed && error && error != &comm->error)
        *error = comm->error;
    return agreed;
}

/* ---- public ---- */

/* What the board says of a rank that is in none of our calls. */
static muonshard_status leave(muonshard_comm *comm, muonshard_status status) {
    comm_mark(comm, 0, "%s", comm->outside);
    return status;
}

int muonshard_comm_rank(const muonshard_comm *comm) {
    return comm ? comm->rank : -1;
}

int muonshard_comm_size(const muonshard_comm *comm) {
    return comm ? comm->size : 0;
}

muonshard_status muonshard_comm_set_timeout(muonshard_comm *comm, double timeout_s) {
    if (!comm)
        return MUONSHARD_ERR_ARGUMENT;
    FAIL_IF(!(timeout_s > 0.0) || isinf(timeout_s), &comm->error, MUONSHARD_ERR_ARGUMENT,
            "a deadline of %g s; it has to be positive and finite", timeout_s);
    comm->options.timeout_s = timeout_s;
    return MUONSHARD_OK;
}

muonshard_status muonshard_comm_set_phase(muonshard_comm *comm, const char *phase) {
    if (!comm)
        return MUONSHARD_ERR_ARGUMENT;
    snprintf(comm->outside, sizeof comm->outside, "%s", phase ? phase : "outside the library");
    return leave(comm, MUONSHARD_OK);
}

const char *muonshard_comm_last_error(const muonshard_comm *comm) {
    return comm ? comm->error.text : "communicator is NULL";
}

muonshard_status muonshard_comm_agree(muonshard_comm *comm, muonshard_status status,
                                      const char *message) {
    if (!comm)
        return MUONSHARD_ERR_ARGUMENT;
    error_text error = {{0}};
    if (message)
        fail(&error, status, "%s", message);
    comm_mark(comm, 0, "agreement");
    return leave(comm, comm_agree(comm, status, &error));
}

muonshard_status muonshard_comm_broadcast(muonshard_comm *comm, void *data, size_t bytes,
                                          int root) {
    if (!comm)
        return MUONSHARD_ERR_ARGUMENT;
    if (comm->dead)
        return comm->dead;
    FAIL_IF(!data && bytes, &comm->error, MUONSHARD_ERR_ARGUMENT, "broadcast: data is NULL");
    comm_mark(comm, 0, "broadcast");
    return leave(comm, comm_broadcast(comm, data, bytes, root));
}

muonshard_status muonshard_comm_allgather(muonshard_comm *comm, const void *send, void *recv,
                                          size_t bytes) {
    if (!comm)
        return MUONSHARD_ERR_ARGUMENT;
    if (comm->dead)
        return comm->dead;
    FAIL_IF((!send || !recv) && bytes, &comm->error, MUONSHARD_ERR_ARGUMENT,
            "all-gather: %s is NULL", send ? "recv" : "send");
    comm_mark(comm, 0, "all-gather");
    return leave(comm, comm_allgather(comm, send, recv, bytes));
}

muonshard_status muonshard_comm_allreduce(muonshard_comm *comm, double *values, size_t count,
                                          muonshard_reduce_op op) {
    if (!comm)
        return MUONSHARD_ERR_ARGUMENT;
    if (comm->dead)
        return comm->dead;
    FAIL_IF(!values && count, &comm->error, MUONSHARD_ERR_ARGUMENT, "all-reduce: values is NULL");
    FAIL_IF(op != MUONSHARD_REDUCE_SUM && op != MUONSHARD_REDUCE_MAX, &comm->error,
            MUONSHARD_ERR_ARGUMENT, "all-reduce: unknown operation %d", (int)op);
    comm_mark(comm, 0, "all-reduce");
    const size_t ranks = (size_t)comm->size;
    double *all = calloc(ranks * count + 1, sizeof *all);
    if (!all)
        return leave(comm, no_memory(comm, "all-reduce"));
    muonshard_status status = comm_allgather(comm, values, all, count * sizeof *values);
    for (size_t i = 0; status == MUONSHARD_OK && i < count; i++) {
        double outcome = all[i];
        for (size_t r = 1; r < ranks; r++) {
            const double x = all[r * count + i];
            if (op == MUONSHARD_REDUCE_SUM)
                outcome += x;
            else if (x > outcome || isnan(x))
                outcome = x;
        }
        values[i] = outcome;
    }
    free(all);
    return leave(comm, status);
}
