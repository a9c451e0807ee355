/* nccl.c - device memory over NCCL. Communicators don't block: every issue is polled until NCCL has
 * taken it, with a deadline, before anything else is given to the stream; from then on the stream's
 * order is all there is to wait for. Sums are of fp32 alone: 16 bits would be rounded at every hop,
 * so they are exchanged and summed in rank order, and with `deterministic` fp32 is too. */
#define _GNU_SOURCE /* pthread_timedjoin_np */
#include "comm/nccl_comm.h"

#include <cuda_runtime_api.h>
#include <nccl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "comm/comm.h"

enum { END_S = 5 }; /* seconds that an ending communicator gets */

typedef struct nccl_transport {
    ncclComm_t comm;           /* own, unless adopted */
    muonshard_comm *bootstrap; /* borrowed; NULL: adopted */
    pthread_mutex_t lock;      /* one thread at a time is in NCCL with this communicator */
    /* adopted: messages of the host */
    int device;
    cudaStream_t stream; /* own */
    cudaEvent_t event;   /* own */
    char *staging;       /* own, pinned, [staging_bytes] */
    char *buffer;        /* own, device, [staging_bytes] */
    size_t staging_bytes;
} nccl_transport;

static muonshard_status nccl_failed(muonshard_comm *comm, const char *what, ncclResult_t code) {
    const nccl_transport *t = comm->impl;
    const char *more = t->comm ? ncclGetLastError(t->comm) : NULL;
    return comm_die(comm, MUONSHARD_ERR_COMM, "rank %d of %d (host %s): %s: NCCL: %s: %s%s%.300s",
                    comm->rank, comm->size, comm->host, comm->position.phase, what,
                    ncclGetErrorString(code), more && *more ? ": " : "", more ? more : "");
}

static muonshard_status device_failed(muonshard_comm *comm, cudaError_t code) {
    return comm_die(comm,
                    code == cudaErrorMemoryAllocation ? MUONSHARD_ERR_MEMORY : MUONSHARD_ERR_COMM,
                    "rank %d of %d (host %s): %s: CUDA: %s", comm->rank, comm->size, comm->host,
                    comm->position.phase, cudaGetErrorString(code));
}

#define TRY_DEVICE(comm, call)                                                                     \
    do {                                                                                           \
        const cudaError_t try_device_ = (call);                                                    \
        if (try_device_ != cudaSuccess)                                                            \
            return device_failed(comm, try_device_);                                               \
    } while (0)

/* ---- issuing ---- */

static ncclResult_t state_of(nccl_transport *t) {
    ncclResult_t state = ncclSuccess;
    pthread_mutex_lock(&t->lock);
    const ncclResult_t code = ncclCommGetAsyncError(t->comm, &state);
    pthread_mutex_unlock(&t->lock);
    return code != ncclSuccess ? code : state;
}

/* Within a group a call may say already that it is under way. */
static bool is_taken(ncclResult_t code) {
    return code == ncclSuccess || code == ncclInProgress;
}

/* Until NCCL has taken what it was given. The first time it connects the ranks, which waits for
 * them. */
static muonshard_status poll_issue(muonshard_comm *comm, const char *what, ncclResult_t issued) {
    const double begin = now_s(), timeout_s = comm->options.timeout_s;
    while (is_taken(issued)) {
        const double waited = now_s() - begin;
        issued = state_of(comm->impl);
        if (issued == ncclSuccess)
            return MUONSHARD_OK;
        if (issued == ncclInProgress && waited > timeout_s)
            return comm_time_out(comm, timeout_s);
        comm_beat(comm);
        comm_back_off(waited);
    }
    return nccl_failed(comm, what, issued);
}

/* More than a quarter of the slots mean nothing: they are left out, at the price of a collective a
 * slot. */
static bool is_sparse(const muonshard_comm *comm, const comm_part *part) {
    int empty = 0;
    for (int r = 0; part->filled && r < comm->size; r++)
        empty += !part->filled[r];
    return 4 * empty > comm->size;
}

static ncclResult_t exchange(const muonshard_comm *comm, ncclComm_t nccl, const comm_part *part,
                             char *to, cudaStream_t stream) {
    const char *from = part->send;
    ncclResult_t code = ncclSuccess;
    for (int r = 0; r < comm->size && is_taken(code); r++) {
        const size_t at = (size_t)r * part->bytes;
        code = ncclSend(from + at, part->bytes, ncclInt8, r, nccl, stream);
        if (is_taken(code))
            code = ncclRecv(to + at, part->bytes, ncclInt8, r, nccl, stream);
    }
    return code;
}

static ncclResult_t reduce_scatter(const muonshard_comm *comm, ncclComm_t nccl,
                                   const comm_part *part, cudaStream_t stream) {
    const size_t count = part->bytes / sizeof(float);
    ncclResult_t code = ncclSuccess;
    size_t place = 0;
    if (!is_sparse(comm, part))
        return ncclReduceScatter(part->send, part->recv, count, ncclFloat32, ncclSum, nccl, stream);
    for (int r = 0; r < comm->size && is_taken(code); r++) {
        if (part->filled[r])
            code = ncclReduce((const char *)part->send + place * part->bytes, part->recv, count,
                              ncclFloat32, ncclSum, r, nccl, stream);
        place += part->filled[r] || !part->compact;
    }
    return code;
}

static ncclResult_t all_gather(const muonshard_comm *comm, ncclComm_t nccl, const comm_part *part,
                               cudaStream_t stream) {
    ncclResult_t code = ncclSuccess;
    size_t place = 0;
    if (!is_sparse(comm, part))
        return ncclAllGather(part->send, part->recv, part->bytes, ncclInt8, nccl, stream);
    for (int r = 0; r < comm->size && is_taken(code); r++) {
        if (part->filled[r])
            code = ncclBroadcast(part->send, (char *)part->recv + place * part->bytes, part->bytes,
                                 ncclInt8, r, nccl, stream);
        place += part->filled[r] || !part->compact;
    }
    return code;
}

static ncclResult_t issue_part(const muonshard_comm *comm, ncclComm_t nccl,
                               const comm_request *request, const comm_part *part,
                               cudaStream_t stream) {
    if (!part->bytes)
        return ncclSuccess;
    switch (request->kind) {
    case COMM_EXCHANGE: return exchange(comm, nccl, part, part->recv, stream);
    case COMM_REDUCE_SCATTER:
        return comm_sums(comm, part->dtype) ? reduce_scatter(comm, nccl, part, stream)
                                            : exchange(comm, nccl, part, part->scratch, stream);
    case COMM_ALL_GATHER: return all_gather(comm, nccl, part, stream);
    case COMM_BROADCAST:
        return ncclBroadcast(part->recv, part->recv, part->bytes, ncclInt8, request->root, nccl,
                             stream);
    }
    return ncclInvalidArgument;
}

/* All parts as one group. */
static muonshard_status issue(muonshard_comm *comm, const comm_request *request,
                              const comm_part *parts, cudaStream_t stream) {
    nccl_transport *t = comm->impl;
    pthread_mutex_lock(&t->lock);
    ncclResult_t code = ncclGroupStart();
    if (code == ncclSuccess) {
        for (size_t i = 0; i < request->part_count && is_taken(code); i++)
            code = issue_part(comm, t->comm, request, &parts[i], stream);
        const ncclResult_t ended = ncclGroupEnd();
        code = is_taken(code) ? ended : code;
    }
    pthread_mutex_unlock(&t->lock);
    return poll_issue(comm, "start", code);
}

/* ---- messages of the host, where there is no other communicator for them ---- */

static void free_staging(nccl_transport *t) {
    if (t->staging)
        cudaFreeHost(t->staging);
    cudaFree(t->buffer);
    t->staging = t->buffer = NULL;
    t->staging_bytes = 0;
}

static muonshard_status reserve_staging(muonshard_comm *comm, size_t bytes) {
    nccl_transport *t = comm->impl;
    if (bytes <= t->staging_bytes)
        return MUONSHARD_OK;
    free_staging(t);
    void *memory;
    TRY_DEVICE(comm, cudaHostAlloc(&memory, bytes, cudaHostAllocDefault));
    t->staging = memory;
    TRY_DEVICE(comm, cudaMalloc(&memory, bytes));
    t->buffer = memory;
    t->staging_bytes = bytes;
    return MUONSHARD_OK;
}

/* Bytes a part sends and receives; what is broadcast is sent where it is received. */
static size_t part_sends(const muonshard_comm *comm, const comm_request *request, size_t bytes) {
    return request->kind == COMM_BROADCAST    ? 0
           : request->kind == COMM_ALL_GATHER ? bytes
                                              : (size_t)comm->size * bytes;
}

static size_t part_receives(const muonshard_comm *comm, const comm_request *request, size_t bytes) {
    return request->kind == COMM_BROADCAST ? bytes : (size_t)comm->size * bytes;
}

/* One part at a time, which is all that host messages have. */
static muonshard_status start_host(muonshard_comm *comm, comm_ticket *ticket) {
    nccl_transport *t = comm->impl;
    const comm_request *request = &ticket->request;
    const comm_part *part = request->parts;
    if (!request->part_count || !part->bytes)
        return MUONSHARD_OK;
    if (request->part_count > 1)
        return comm_die(comm, MUONSHARD_ERR_INTERNAL, "a message of the host has %zu parts",
                        request->part_count);
    const size_t sends = part_sends(comm, request, part->bytes);
    const size_t receives = part_receives(comm, request, part->bytes);
    TRY_DEVICE(comm, cudaSetDevice(t->device));
    TRY(reserve_staging(comm, sends + receives));
    const size_t up = sends ? sends : receives;
    memcpy(t->staging, sends ? part->send : part->recv, up);
    TRY_DEVICE(comm, cudaMemcpyAsync(t->buffer, t->staging, up, cudaMemcpyDefault, t->stream));
    const comm_part on_device = {.send = t->buffer,
                                 .recv = t->buffer + sends,
                                 .scratch = t->buffer + sends,
                                 .bytes = part->bytes,
                                 .dtype = part->dtype};
    TRY(issue(comm, request, &on_device, t->stream));
    TRY_DEVICE(comm, cudaMemcpyAsync(t->staging + sends, t->buffer + sends, receives,
                                     cudaMemcpyDefault, t->stream));
    TRY_DEVICE(comm, cudaEventRecord(t->event, t->stream));
    ticket->impl = t;
    return MUONSHARD_OK;
}

static muonshard_status test_host(muonshard_comm *comm, comm_ticket *ticket, bool *done) {
    nccl_transport *t = comm->impl;
    const comm_request *request = &ticket->request;
    if (ticket->impl) {
        const ncclResult_t state = state_of(t);
        if (!is_taken(state))
            return nccl_failed(comm, "test", state);
        const cudaError_t code = cudaEventQuery(t->event);
        if (code == cudaErrorNotReady) {
            cudaGetLastError(); /* which the program's own checks would find */
            return MUONSHARD_OK;
        }
        TRY_DEVICE(comm, code);
        const comm_part *part = request->parts;
        memcpy(comm_exchange_target(request, part),
               t->staging + part_sends(comm, request, part->bytes),
               part_receives(comm, request, part->bytes));
        ticket->impl = NULL;
    }
    *done = true;
    return MUONSHARD_OK;
}

/* ---- the table ---- */

static muonshard_status nccl_start(muonshard_comm *comm, comm_ticket *ticket) {
    const comm_request *request = &ticket->request;
    if (!request->backend)
        return start_host(comm, ticket);
    backend *memory = request->backend;
    if (!memory->streams)
        return comm_die(comm, MUONSHARD_ERR_UNSUPPORTED,
                        "nccl carries memory of a device; the backend is %s", memory->ops->name);
    return issue(comm, request, request->parts, memory->streams->native(memory, request->stream));
}

static muonshard_status nccl_test(muonshard_comm *comm, comm_ticket *ticket, bool *done) {
    if (!ticket->request.backend)
        return test_host(comm, ticket, done);
    *done = true; /* it is in the stream's order */
    return MUONSHARD_OK;
}

static muonshard_status nccl_check(muonshard_comm *comm) {
    const ncclResult_t state = state_of(comm->impl);
    return is_taken(state) ? MUONSHARD_OK : nccl_failed(comm, "check", state);
}

static void nccl_mark(muonshard_comm *comm, const comm_position *position) {
    muonshard_comm *bootstrap = ((nccl_transport *)comm->impl)->bootstrap;
    if (bootstrap && bootstrap->ops->mark)
        bootstrap->ops->mark(bootstrap, position);
}

static void nccl_beat(muonshard_comm *comm) {
    muonshard_comm *bootstrap = ((nccl_transport *)comm->impl)->bootstrap;
    if (bootstrap)
        comm_beat(bootstrap);
}

static size_t nccl_blame(muonshard_comm *comm, double timeout_s, char *text, size_t size) {
    muonshard_comm *bootstrap = ((nccl_transport *)comm->impl)->bootstrap;
    return bootstrap && bootstrap->ops->blame
               ? bootstrap->ops->blame(bootstrap, timeout_s, text, size)
               : 0;
}

static size_t nccl_describe(muonshard_comm *comm, char *text, size_t size) {
    muonshard_comm *bootstrap = ((nccl_transport *)comm->impl)->bootstrap;
    if (size)
        text[0] = '\0';
    return bootstrap && bootstrap->ops->describe ? bootstrap->ops->describe(bootstrap, text, size)
                                                 : 0;
}

/* ---- the end ---- */

static void *end_comm(void *user) {
    nccl_transport *t = user;
    pthread_mutex_lock(&t->lock);
    ncclCommAbort(t->comm);
    pthread_mutex_unlock(&t->lock);
    return NULL;
}

/* An abort can hang itself: it gets a thread and some seconds, and what it holds is left to it. */
static bool abort_in_time(nccl_transport *t) {
    pthread_t thread;
    struct timespec until;
    if (pthread_create(&thread, NULL, end_comm, t) != 0)
        return false;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += END_S;
    if (pthread_timedjoin_np(thread, NULL, &until) == 0)
        return true;
    pthread_detach(thread);
    return false;
}

/* All ranks come, or it is aborted. */
static bool finalize_in_time(nccl_transport *t) {
    const double begin = now_s();
    ncclResult_t state = ncclCommFinalize(t->comm);
    while (is_taken(state)) {
        state = state_of(t);
        if (state == ncclSuccess)
            return ncclCommDestroy(t->comm) == ncclSuccess;
        if (now_s() - begin > END_S)
            break;
        comm_back_off(now_s() - begin);
    }
    return false;
}

static void nccl_destroy(muonshard_comm *comm) {
    nccl_transport *t = comm->impl;
    bool ended = true;
    if (t->comm && t->bootstrap)
        ended = (!comm->dead && finalize_in_time(t)) || abort_in_time(t);
    if (!t->bootstrap) {
        if (t->event)
            cudaEventDestroy(t->event);
        if (t->stream)
            cudaStreamDestroy(t->stream);
        if (!comm->dead) /* its kernels may never end, and this waits for them */
            free_staging(t);
    }
    if (!ended)
        return;
    pthread_mutex_destroy(&t->lock);
    free(t);
}

static const comm_ops nccl_ops = {.name = "nccl",
                                  .native_reduce_scatter = true,
                                  .on_stream = true,
                                  .gathers_in_place = true,
                                  .leaves_out_empty = true,
                                  .writes_after_death = true,
                                  .start = nccl_start,
                                  .test = nccl_test,
                                  .check = nccl_check,
                                  .mark = nccl_mark,
                                  .beat = nccl_beat,
                                  .blame = nccl_blame,
                                  .describe = nccl_describe,
                                  .destroy = nccl_destroy};

/* ---- creation ---- */

static muonshard_status make(nccl_transport **transport, int rank, int size,
                             const muonshard_comm_options *options, muonshard_comm **out,
                             error_text *error) {
    nccl_transport *t = calloc(1, sizeof *t);
    FAIL_IF(!t, error, MUONSHARD_ERR_MEMORY, "out of memory");
    pthread_mutex_init(&t->lock, NULL);
    const muonshard_status status = comm_create(&nccl_ops, t, rank, size, options, out);
    if (status) {
        pthread_mutex_destroy(&t->lock);
        free(t);
        return fail(error, status, "nccl: the communicator cannot be made");
    }
    (*out)->sums_16bit = false;
    *transport = t;
    return MUONSHARD_OK;
}

static muonshard_status agree_on_id(muonshard_comm *bootstrap, ncclUniqueId *id,
                                    error_text *error) {
    muonshard_status status = MUONSHARD_OK;
    if (bootstrap->rank == 0) {
        const ncclResult_t code = ncclGetUniqueId(id);
        if (code != ncclSuccess)
            status = fail(error, MUONSHARD_ERR_UNAVAILABLE, "nccl: %s", ncclGetErrorString(code));
    }
    TRY(comm_agree(bootstrap, status, error));
    status = comm_broadcast(bootstrap, id, sizeof *id, 0);
    FAIL_IF(status, error, status, "%s", bootstrap->error.text);
    return MUONSHARD_OK;
}

muonshard_status nccl_create(muonshard_comm *bootstrap, nccl_options options, muonshard_comm **out,
                             error_text *error) {
    nccl_transport *t;
    ncclUniqueId id;
    memset(&id, 0, sizeof id);
    *out = NULL;
    muonshard_comm *comm = NULL;
    muonshard_status status =
        make(&t, bootstrap->rank, bootstrap->size, &bootstrap->options, &comm, error);
    TRY_GOTO(comm_agree(bootstrap, status, error), failed);
    comm->sums_fp32 = !options.deterministic;
    comm->options.on_fatal = NULL;
    t->bootstrap = bootstrap;
    TRY_GOTO(agree_on_id(bootstrap, &id, error), failed);
    comm_mark(comm, 0, "create NCCL communicator");
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    const cudaError_t entered = cudaSetDevice(options.device);
    if (entered != cudaSuccess) {
        status = fail(error, MUONSHARD_ERR_COMM, "nccl: CUDA: %s", cudaGetErrorString(entered));
        goto failed;
    }
    const ncclResult_t code =
        ncclCommInitRankConfig(&t->comm, bootstrap->size, id, bootstrap->rank, &config);
    status = poll_issue(comm, "ncclCommInitRankConfig", code);
    if (status) {
        fail(error, status, "%s", comm->error.text);
        goto failed;
    }
    comm_mark(comm, 0, "outside the library");
    comm->options.on_fatal = bootstrap->options.on_fatal;
    *out = comm;
    return MUONSHARD_OK;
failed:
    if (comm)
        comm_mark(comm, 0, "outside the library");
    muonshard_comm_destroy(comm);
    return status;
}

muonshard_status nccl_adopt(void *nccl_comm, void (*function)(void),
                            const muonshard_comm_options *options, muonshard_comm **out,
                            error_text *error) {
    int rank, size, device;
    nccl_transport *t;
    muonshard_comm *comm = NULL;
    *out = NULL;
    FAIL_IF(!nccl_comm, error, MUONSHARD_ERR_ARGUMENT, "nccl_comm is NULL");
    FAIL_IF(function != (void (*)(void))ncclCommCount, error, MUONSHARD_ERR_MISMATCH,
            "the program's NCCL is another library than the one muonshard found; both have to use "
            "the same libnccl.so.2");
    FAIL_IF(ncclCommCount(nccl_comm, &size) != ncclSuccess ||
                ncclCommUserRank(nccl_comm, &rank) != ncclSuccess ||
                ncclCommCuDevice(nccl_comm, &device) != ncclSuccess,
            error, MUONSHARD_ERR_COMM, "the ncclComm_t has no rank, size and device");
    TRY(make(&t, rank, size, options, &comm, error));
    t->comm = nccl_comm;
    t->device = device;
    cudaError_t code = cudaSetDevice(device);
    if (code == cudaSuccess)
        code = cudaStreamCreateWithFlags(&t->stream, cudaStreamNonBlocking);
    if (code == cudaSuccess)
        code = cudaEventCreateWithFlags(&t->event, cudaEventDisableTiming);
    if (code != cudaSuccess) {
        muonshard_comm_destroy(comm);
        return fail(error, MUONSHARD_ERR_COMM, "nccl: CUDA: %s", cudaGetErrorString(code));
    }
    *out = comm;
    return MUONSHARD_OK;
}
