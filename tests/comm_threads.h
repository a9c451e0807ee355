/* comm_threads.h - a communicator whose ranks are threads of one process, for sanitizers and for
 * tests that need several ranks without MPI. Starts publish buffers; the data moves when every rank
 * has started the same operation. Ranks that start different operations die with ERR_MISMATCH
 * instead of moving anything. */
#ifndef COMM_THREADS_H
#define COMM_THREADS_H

#include "comm/comm.h"

typedef struct threads_options {
    muonshard_comm_options comm; /* of every rank: callbacks in it are called from all threads */
    double latency_s;            /* nothing is reported done earlier after the last rank's start */
} threads_options;
/* Deadlines of 20 s, no latency. */
#define THREADS_OPTIONS_INIT                                                                       \
    { {sizeof(muonshard_comm_options), 20.0, NULL, NULL, NULL, NULL}, 0.0 }

/* Runs fn once a rank, each in a thread of its own with a communicator of its own, and joins them.
 * cmocka's asserts must not be used in fn: they jump, and only the main thread can be jumped in. fn
 * reports through `arg`, for example in one slot a rank, and the caller asserts after the join.
 * Returns ERR_MEMORY where ranks can't be made. */
muonshard_status threads_run(int ranks, void (*fn)(muonshard_comm *comm, void *arg), void *arg);
/* `options` may be NULL. */
muonshard_status threads_run_with(const threads_options *options, int ranks,
                                  void (*fn)(muonshard_comm *comm, void *arg), void *arg);
/* Waits for the other threads outside of the communicator. Every rank has to come: there is no
 * deadline. */
void threads_barrier(muonshard_comm *comm);

#endif
