/* callbacks.c - host memory through the caller's blocking functions: everything happens in start.
 */
#include "comm/comm.h"

#include <stdlib.h>
#include <string.h>

/* Bytes one all-gather takes from each rank where it stands in for something it is not. */
enum { CHUNK_BYTES = 1 << 20 };

typedef struct callbacks_transport {
    muonshard_comm_callbacks call;
    size_t *bytes,
        *offsets; /* [size] of an alltoallv of equal slots, the same for send and receive */
    char *chunk;  /* [size, CHUNK_BYTES] */
    bool warned;
} callbacks_transport;

static muonshard_status check_call(muonshard_comm *comm, const char *name, int returned) {
    if (returned == 0)
        return MUONSHARD_OK;
    return comm_die(comm, MUONSHARD_ERR_COMM,
                    "rank %d of %d (host %s): %s: the %s callback returned %d", comm->rank,
                    comm->size, comm->host, comm->position.phase, name, returned);
}

/* An all-gather in chunks that keeps the slots of ranks [first, first + count): recv [count,
 * bytes]. */
static muonshard_status gather_some(muonshard_comm *comm, const char *send, char *recv,
                                    size_t bytes, int first, int count) {
    callbacks_transport *transport = comm->impl;
    for (size_t at = 0; at < bytes; at += CHUNK_BYTES) {
        size_t length = bytes - at < CHUNK_BYTES ? bytes - at : CHUNK_BYTES;
        TRY(check_call(
            comm, "allgather",
            transport->call.allgather(transport->call.user, send + at, transport->chunk, length)));
        for (int i = 0; i < count; i++)
            memcpy(recv + (size_t)i * bytes + at, transport->chunk + (size_t)(first + i) * length,
                   length);
    }
    return MUONSHARD_OK;
}

/* Slot j goes to rank j: all slots to everybody, of which each rank keeps its own. */
static muonshard_status exchange_by_allgather(muonshard_comm *comm, const char *send, char *recv,
                                              size_t bytes) {
    callbacks_transport *transport = comm->impl;
    if (!transport->warned) {
        transport->warned = true;
        comm_log(comm, MUONSHARD_LOG_WARNING,
                 "no alltoallv callback: reduce-scatters run as all-gathers of everything, which "
                 "moves %d times the bytes",
                 comm->size);
    }
    for (int j = 0; j < comm->size; j++)
        TRY(gather_some(comm, send + (size_t)j * bytes, recv, bytes, 0,
                        j == comm->rank ? comm->size : 0));
    return MUONSHARD_OK;
}

static muonshard_status exchange(muonshard_comm *comm, const void *send, void *recv, size_t bytes) {
    callbacks_transport *transport = comm->impl;
    if (!transport->call.alltoallv)
        return exchange_by_allgather(comm, send, recv, bytes);
    for (int r = 0; r < comm->size; r++) {
        transport->bytes[r] = bytes;
        transport->offsets[r] = (size_t)r * bytes;
    }
    return check_call(comm, "alltoallv",
                      transport->call.alltoallv(transport->call.user, send, transport->bytes,
                                                transport->offsets, recv, transport->bytes,
                                                transport->offsets));
}

static muonshard_status callbacks_start(muonshard_comm *comm, comm_ticket *ticket) {
    callbacks_transport *transport = comm->impl;
    const comm_request *request = &ticket->request;
    for (size_t i = 0; i < request->part_count; i++) {
        const comm_part *part = &request->parts[i];
        if (!part->bytes)
            continue;
        switch (request->kind) {
        case COMM_EXCHANGE:
        case COMM_REDUCE_SCATTER:
            TRY(exchange(comm, part->send, comm_exchange_target(request, part), part->bytes));
            break;
        case COMM_ALL_GATHER:
            TRY(check_call(comm, "allgather",
                           transport->call.allgather(transport->call.user, part->send, part->recv,
                                                     part->bytes)));
            break;
        case COMM_BROADCAST:
            TRY(gather_some(comm, part->recv, part->recv, part->bytes, request->root,
                            comm->rank == request->root ? 0 : 1));
            break;
        }
    }
    return MUONSHARD_OK;
}

static muonshard_status callbacks_test(muonshard_comm *comm, comm_ticket *ticket, bool *done) {
    (void)comm;
    (void)ticket;
    *done = true;
    return MUONSHARD_OK;
}

static void callbacks_free(callbacks_transport *transport) {
    if (!transport)
        return;
    free(transport->bytes);
    free(transport->offsets);
    free(transport->chunk);
    free(transport);
}

static void callbacks_destroy(muonshard_comm *comm) {
    callbacks_free(comm->impl);
}

static const comm_ops callbacks_ops = {.name = "callbacks",
                                       .native_reduce_scatter = false,
                                       .start = callbacks_start,
                                       .test = callbacks_test,
                                       .destroy = callbacks_destroy};

static muonshard_status check_callbacks(const muonshard_comm_options *options,
                                        const muonshard_comm_callbacks *call) {
    if (call->world_size < 1)
        return comm_refuse(options, MUONSHARD_ERR_ARGUMENT,
                           "callbacks: world_size is %d; it has to be at least 1",
                           call->world_size);
    if (call->rank < 0 || call->rank >= call->world_size)
        return comm_refuse(options, MUONSHARD_ERR_ARGUMENT,
                           "callbacks: rank is %d; it has to be in 0..%d", call->rank,
                           call->world_size - 1);
    if (!call->allgather || !call->barrier)
        return comm_refuse(options, MUONSHARD_ERR_ARGUMENT, "callbacks: %s is NULL",
                           call->allgather ? "barrier" : "allgather");
    return MUONSHARD_OK;
}

muonshard_status muonshard_comm_create_callbacks(const muonshard_comm_callbacks *callbacks,
                                                 const muonshard_comm_options *options,
                                                 muonshard_comm **comm) {
    if (!comm)
        return comm_refuse(options, MUONSHARD_ERR_ARGUMENT, "comm is NULL");
    *comm = NULL;
    muonshard_comm_callbacks call = MUONSHARD_COMM_CALLBACKS_INIT;
    error_text error;
    muonshard_status status = take_struct(&error, &call, sizeof call, callbacks, "callbacks");
    if (status)
        return comm_refuse(options, status, "%s", error.text);
    TRY(check_callbacks(options, &call));

    size_t size = (size_t)call.world_size;
    callbacks_transport *transport = calloc(1, sizeof *transport);
    if (!transport)
        return comm_refuse(options, MUONSHARD_ERR_MEMORY, "callbacks: out of memory");
    transport->call = call;
    transport->bytes = calloc(size, sizeof *transport->bytes);
    transport->offsets = calloc(size, sizeof *transport->offsets);
    transport->chunk = malloc(size * CHUNK_BYTES); /* pages nobody touches cost nothing */
    if (!transport->bytes || !transport->offsets || !transport->chunk)
        status = comm_refuse(options, MUONSHARD_ERR_MEMORY, "callbacks: out of memory");
    else
        status = comm_create(&callbacks_ops, transport, call.rank, call.world_size, options, comm);
    if (status)
        callbacks_free(transport);
    return status;
}
