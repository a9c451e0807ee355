/* comm.h - what moves between ranks. A transport is a table of operations (self, callbacks, mpi,
 * later nccl); what every transport needs and none should write again stands in comm.c: the
 * reduce-scatter made of an exchange and a sum in rank order, waits with a deadline, agreement on
 * failure. */
#ifndef COMM_H
#define COMM_H

#include <stdbool.h>
#include "status.h"
#include "kernels/backend.h"

/* Exported for libmuonshard_mpi of the very same version under a name that can clash with nothing;
 * no part of the ABI. */
#define PRIVATE_API(name) __asm__("muonshard_private_" #name) __attribute__((visibility("default")))

typedef enum comm_kind {
    COMM_EXCHANGE, /* send [size, bytes], recv [size, bytes]: slot j of every rank goes to rank j */
    COMM_REDUCE_SCATTER, /* send [size, bytes] of `dtype`, recv: fp32 sum of slot `rank`, scratch
                            [size, bytes] */
    COMM_ALL_GATHER,     /* send [bytes], recv [size, bytes] */
    COMM_BROADCAST       /* recv [bytes] in place; send is not used */
} comm_kind;

/* Buffers of one collective; the same bytes on every rank. All are borrowed until the ticket is
 * done. */
typedef struct comm_part {
    const void *send;
    void *recv;
    void *scratch; /* reduce-scatter on a transport without a native one; unless comm_sums */
    size_t bytes;  /* a slot, of what is sent */
    muonshard_dtype dtype; /* reduce-scatter: of what is sent; it is summed in fp32 */
    const uint8_t *filled; /* NULL: all; or [size]: slots of ranks whose flag is 0 mean nothing, and
                              need not travel */
    bool compact;          /* where all slots are, those have no place: [filled slots, bytes] */
} comm_part;

/* Several parts travel together: one NCCL group, one batch of messages. The parts array is borrowed
 * likewise. */
typedef struct comm_request {
    comm_kind kind;
    const comm_part *parts;
    size_t part_count;
    int root; /* broadcast */
    backend
        *backend; /* whose memory the parts are, and who sums; NULL: host memory, nothing to sum */
    backend_stream stream;
    /* Staged (comm_is_staged): the same parts in pinned memory of the host, and a stamp of the
     * backend's that is free until the request is done. */
    const comm_part *host_parts;
    size_t stamp;
} comm_request;

/* An operation under way. The caller keeps it where it is until done. `impl` is the transport's. */
typedef struct comm_ticket {
    comm_request request;
    void *impl;
    bool open;
    bool coming_down; /* staged: what is sent is on its way to the host */
} comm_ticket;

/* Where a rank is in its step: what a timeout reports about it and about the others. */
typedef struct comm_position {
    int64_t step;   /* 0: outside a step */
    char phase[48]; /* "all-gather batch 3" */
} comm_position;

typedef struct comm_ops {
    const char *name;
    bool native_reduce_scatter; /* in fp32 whatever is sent; comm_create sets `sums` by it */
    bool on_stream; /* takes any backend's memory; done means that it is in the stream's order */
    bool gathers_in_place;   /* all-gather: send may be the rank's own place in recv */
    bool leaves_out_empty;   /* slots that mean nothing, where they are more than a quarter */
    bool writes_after_death; /* what never completed may still write to its buffers */
    /* Begins the ticket's request; same order on every rank; never waits for another rank.
     * (callbacks may: it says so.) Without native_reduce_scatter that kind is an exchange into
     * comm_exchange_target, where the rank's own slot may be left as it is. Failures here and in
     * test go through comm_die. */
    muonshard_status (*start)(muonshard_comm *comm, comm_ticket *ticket);
    /* Sets *done when the request's recv buffers are final and its send buffers free. Never waits.
     */
    muonshard_status (*test)(muonshard_comm *comm, comm_ticket *ticket, bool *done);
    /* Optional: whether what is on a stream has met an error; through comm_die. */
    muonshard_status (*check)(muonshard_comm *comm);
    /* Optional: publishes this rank's position where others can read it without its help. */
    void (*mark)(muonshard_comm *comm, const comm_position *position);
    /* Optional: a sign of life; whoever waits gives one at every look. */
    void (*beat)(muonshard_comm *comm);
    /* Optional: "rank 1 of 3 (host X): …" of the rank that keeps this one waiting, "" where none is
     * known; like snprintf. */
    size_t (*blame)(muonshard_comm *comm, double timeout_s, char *text, size_t size);
    /* Optional: "rank 1: step 12, momentum batch 2; …" of the ranks that are behind; like snprintf.
     */
    size_t (*describe)(muonshard_comm *comm, char *text, size_t size);
    void (*destroy)(muonshard_comm *comm);
} comm_ops;

struct muonshard_comm {
    const comm_ops *ops;
    void *impl;
    int rank, size;
    bool sums_fp32, sums_16bit; /* reduce-scatters of these are native */
    muonshard_comm_options options;
    char host[64];
    comm_position position;
    char outside[sizeof((comm_position *)0)->phase]; /* the phase between two calls */
    muonshard_status dead;                           /* OK, or why nothing works on it any more */
    error_text error;
};

/* A communicator over a transport; takes over `impl` (ops->destroy frees it) only on success. */
muonshard_status comm_create(const comm_ops *ops, void *impl, int rank, int size,
                             const muonshard_comm_options *options, muonshard_comm **comm)
    PRIVATE_API(comm_create);

static inline bool comm_sums(const muonshard_comm *comm, muonshard_dtype dtype) {
    return dtype == MUONSHARD_FP32 ? comm->sums_fp32 : comm->sums_16bit;
}
/* The transport knows memory of the host only: what the backend has goes through pinned memory. */
static inline bool comm_is_staged(const muonshard_comm *comm, const backend *memory) {
    return memory && memory->streams && !comm->ops->on_stream;
}

/* Where an exchange puts what it receives; a reduce-scatter without a native one is an exchange. */
static inline void *comm_exchange_target(const comm_request *request, const comm_part *part) {
    return request->kind == COMM_REDUCE_SCATTER ? part->scratch : part->recv;
}

muonshard_status comm_start(muonshard_comm *comm, const comm_request *request, comm_ticket *ticket);
/* *done stays true once it is; for a reduce-scatter the ordered sum runs in the call that finds it
 * done. */
muonshard_status comm_test(muonshard_comm *comm, comm_ticket *ticket, bool *done);
/* Tests until done. On expiry: the communicator is dead, ERR_TIMEOUT with who was where, on_fatal
 * has run. */
muonshard_status comm_wait(muonshard_comm *comm, comm_ticket *ticket, double timeout_s);
/* start + wait with the communicator's own deadline. */
muonshard_status comm_run(muonshard_comm *comm, const comm_request *request);

/* NCCL between the ranks' devices, this rank's by its number, beside `bootstrap`, which stays
 * borrowed; *out is left as it is on failure. Collective; one rank's failure is everybody's.
 * ERR_UNAVAILABLE. */
muonshard_status comm_open_nccl(muonshard_comm *bootstrap, int device, bool deterministic,
                                muonshard_comm **out, error_text *error);
/* Errors of what is under way on a stream. */
muonshard_status comm_check(muonshard_comm *comm);
/* No completion by the deadline: the communicator is dead, ERR_TIMEOUT. */
muonshard_status comm_time_out(muonshard_comm *comm, double timeout_s);
/* A sign of life, for others that wait. */
static inline void comm_beat(muonshard_comm *comm) {
    if (comm->ops->beat)
        comm->ops->beat(comm);
}
/* Between two looks at something that was not done `waited_s` after it began. */
void comm_back_off(double waited_s);

/* What the rank does now; kept for timeouts and published where the transport can. */
void comm_mark(muonshard_comm *comm, int64_t step, const char *format, ...) PRIVATE_API(comm_mark)
    __attribute__((format(printf, 3, 4)));
/* The communicator is dead from now on; runs on_fatal once. Returns `status`. */
muonshard_status comm_die(muonshard_comm *comm, muonshard_status status, const char *format, ...)
    PRIVATE_API(comm_die) __attribute__((format(printf, 3, 4)));
void comm_log(muonshard_comm *comm, muonshard_log_level level, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
/* A create call that fails leaves no handle to keep the text: it goes to the log of `options`.
 * Returns `status`. */
muonshard_status comm_refuse(const muonshard_comm_options *options, muonshard_status status,
                             const char *format, ...) PRIVATE_API(comm_refuse)
    __attribute__((format(printf, 3, 4)));

/* Host memory, blocking, with the communicator's deadline. */
muonshard_status comm_allgather(muonshard_comm *comm, const void *send, void *recv, size_t bytes)
    PRIVATE_API(comm_allgather);
muonshard_status comm_broadcast(muonshard_comm *comm, void *data, size_t bytes, int root);
/* A local status becomes everybody's: the lowest failing rank's status and text, in error (and the
 * communicator's). */
muonshard_status comm_agree(muonshard_comm *comm, muonshard_status status, error_text *error);

#endif
