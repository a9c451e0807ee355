/* mpi.c - host memory over MPI: nonblocking collectives on a duplicate of the caller's
 * communicator, which the thread that waits polls. Nothing here blocks; the deadlines are comm.c's.
 */
#include "muonshard_mpi.h"

#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include "comm/comm.h"
#include "comm/mpi_positions.h"

/* Bytes that are still counted one by one; tests set it low to see the other way. */
#ifndef COMM_MPI_MAX_COUNT
#define COMM_MPI_MAX_COUNT INT_MAX
#endif
enum { BLOCK_BYTES = COMM_MPI_MAX_COUNT / 2 + 1 };
/* How long the end of a job waits: for room on stderr, and for MPI_Abort. */
enum { ROOM_MS = 1000, ABORT_S = 3 };

/* The MPI requests of one ticket. */
typedef struct mpi_operation {
    MPI_Request *requests; /* [capacity] */
    int count, capacity;
    struct mpi_operation *next_free, *next_made;
} mpi_operation;

typedef struct mpi_transport {
    MPI_Comm comm;
    bool joined; /* `comm` is there */
    mpi_operation *free,
        *made; /* every operation is in `made`; those not under way in `free` too */
    mpi_positions *board;
} mpi_transport;

static muonshard_status mpi_failed(muonshard_comm *comm, const char *what, int code) {
    char text[MPI_MAX_ERROR_STRING] = "";
    int length;
    if (MPI_Error_string(code, text, &length) != MPI_SUCCESS)
        snprintf(text, sizeof text, "MPI error %d", code);
    return comm_die(comm, MUONSHARD_ERR_COMM, "rank %d of %d (host %s): %s: %s: %.400s", comm->rank,
                    comm->size, comm->host, comm->position.phase, what, text);
}

/* ---- operations ---- */

static mpi_operation *take_operation(mpi_transport *transport, size_t count) {
    if (count > INT_MAX)
        return NULL;
    mpi_operation *operation = transport->free;
    if (!operation) {
        operation = calloc(1, sizeof *operation);
        if (!operation)
            return NULL;
        operation->next_made = transport->made;
        transport->made = operation;
    } else {
        transport->free = operation->next_free;
    }
    operation->count = 0;
    if (operation->capacity >= (int)count)
        return operation;
    MPI_Request *requests = realloc(operation->requests, count * sizeof *requests);
    if (!requests) {
        operation->next_free = transport->free;
        transport->free = operation;
        return NULL;
    }
    operation->requests = requests;
    operation->capacity = (int)count;
    return operation;
}

/* `bytes` as one element, since counts are int: blocks and the bytes that are left. */
static int make_large_type(size_t bytes, MPI_Datatype *type) {
    MPI_Datatype block, types[2];
    int code = MPI_Type_contiguous(BLOCK_BYTES, MPI_BYTE, &block);
    if (code != MPI_SUCCESS)
        return code;
    size_t blocks = bytes / BLOCK_BYTES, rest = bytes % BLOCK_BYTES;
    int counts[2] = {(int)blocks, (int)rest};
    MPI_Aint offsets[2] = {0, (MPI_Aint)(blocks * BLOCK_BYTES)};
    types[0] = block;
    types[1] = MPI_BYTE;
    code = MPI_Type_create_struct(2, counts, offsets, types, type);
    MPI_Type_free(&block);
    return code != MPI_SUCCESS ? code : MPI_Type_commit(type);
}

/* A message to each of the others and one from each. Those of one pair of ranks match in the order
 * they are posted in, which is the same on all ranks, so that one tag does. */
static int post_messages(const mpi_transport *transport, const muonshard_comm *comm,
                         const comm_request *request, const comm_part *part, int count,
                         MPI_Datatype type, mpi_operation *operation) {
    const bool gathers = request->kind == COMM_ALL_GATHER;
    char *to = gathers ? part->recv : comm_exchange_target(request, part);
    const char *from = part->send;
    int code = MPI_SUCCESS;
    for (int i = 1; i < comm->size && code == MPI_SUCCESS; i++) {
        const int source = (comm->rank - i + comm->size) % comm->size;
        code = MPI_Irecv(to + (size_t)source * part->bytes, count, type, source, 0, transport->comm,
                         &operation->requests[operation->count]);
        operation->count += code == MPI_SUCCESS;
    }
    for (int i = 1; i < comm->size && code == MPI_SUCCESS; i++) {
        const int target = (comm->rank + i) % comm->size;
        code = MPI_Isend(gathers ? from : from + (size_t)target * part->bytes, count, type, target,
                         0, transport->comm, &operation->requests[operation->count]);
        operation->count += code == MPI_SUCCESS;
    }
    const size_t own = (size_t)comm->rank * part->bytes;
    const char *mine = gathers ? from : from + own;
    if (request->kind != COMM_REDUCE_SCATTER && mine != to + own) /* it reads it where it is */
        memcpy(to + own, mine, part->bytes);
    return code;
}

static int start_part(const mpi_transport *transport, const muonshard_comm *comm,
                      const comm_request *request, const comm_part *part, int count,
                      MPI_Datatype type, mpi_operation *operation) {
    if (request->kind != COMM_BROADCAST)
        return post_messages(transport, comm, request, part, count, type, operation);
    const int code = MPI_Ibcast(part->recv, count, type, request->root, transport->comm,
                                &operation->requests[operation->count]);
    operation->count += code == MPI_SUCCESS;
    return code;
}

static muonshard_status mpi_start(muonshard_comm *comm, comm_ticket *ticket) {
    mpi_transport *transport = comm->impl;
    const comm_request *request = &ticket->request;
    const size_t a_part = request->kind == COMM_BROADCAST ? 1 : 2 * ((size_t)comm->size - 1);
    mpi_operation *operation = take_operation(transport, request->part_count * a_part);
    if (!operation)
        return comm_die(comm, MUONSHARD_ERR_MEMORY, "rank %d of %d (host %s): %s: out of memory",
                        comm->rank, comm->size, comm->host, comm->position.phase);
    ticket->impl = operation;
    for (size_t i = 0; i < request->part_count; i++) {
        const comm_part *part = &request->parts[i];
        if (!part->bytes)
            continue;
        const bool large = part->bytes > COMM_MPI_MAX_COUNT;
        MPI_Datatype type = MPI_BYTE;
        int code = large ? make_large_type(part->bytes, &type) : MPI_SUCCESS;
        if (code == MPI_SUCCESS)
            code = start_part(transport, comm, request, part, large ? 1 : (int)part->bytes, type,
                              operation);
        if (code != MPI_SUCCESS)
            return mpi_failed(comm, "start", code);
        if (large)
            MPI_Type_free(&type); /* MPI keeps it until the requests are done */
    }
    return MUONSHARD_OK;
}

static muonshard_status mpi_test(muonshard_comm *comm, comm_ticket *ticket, bool *done) {
    mpi_transport *transport = comm->impl;
    mpi_operation *operation = ticket->impl;
    int flag = 0;
    /* One that was stopped is woken to be ended: what it waited for may be there, and it must not
     * go on into an MPI that is coming down. */
    if (positions_claimed(transport->board))
        return comm_die(comm, MUONSHARD_ERR_TIMEOUT,
                        "rank %d of %d (host %s): another rank of this host ends the job",
                        comm->rank, comm->size, comm->host);
    int code = MPI_Testall(operation->count, operation->requests, &flag, MPI_STATUSES_IGNORE);
    if (code != MPI_SUCCESS)
        return mpi_failed(comm, "test", code);
    if (!flag)
        return MUONSHARD_OK;
    operation->next_free = transport->free;
    transport->free = operation;
    ticket->impl = NULL;
    *done = true;
    return MUONSHARD_OK;
}

static void mpi_mark(muonshard_comm *comm, const comm_position *position) {
    mpi_transport *transport = comm->impl;
    positions_mark(transport->board, position);
}

static void mpi_beat(muonshard_comm *comm) {
    mpi_transport *transport = comm->impl;
    positions_beat(transport->board);
}

static size_t mpi_blame(muonshard_comm *comm, double timeout_s, char *text, size_t size) {
    mpi_transport *transport = comm->impl;
    return positions_blame(transport->board, timeout_s, text, size);
}

static size_t mpi_describe(muonshard_comm *comm, char *text, size_t size) {
    mpi_transport *transport = comm->impl;
    return positions_describe(transport->board, text, size);
}

static void mpi_destroy(muonshard_comm *comm) {
    mpi_transport *transport = comm->impl;
    comm_mark(comm, 0, "communicator destroyed");
    positions_close(transport->board);
    int finalized = 1;
    MPI_Finalized(&finalized);
    if (transport->joined && !comm->dead && !finalized)
        MPI_Comm_free(&transport->comm);
    for (mpi_operation *operation = transport->made; operation;) {
        mpi_operation *next = operation->next_made;
        free(operation->requests);
        free(operation);
        operation = next;
    }
    /* A duplication that never ended may still be written to by MPI. */
    if (transport->joined)
        free(transport);
}

static const comm_ops mpi_ops = {.name = "mpi",
                                 .gathers_in_place = true,
                                 .native_reduce_scatter = false,
                                 .writes_after_death = true,
                                 .start = mpi_start,
                                 .test = mpi_test,
                                 .mark = mpi_mark,
                                 .beat = mpi_beat,
                                 .blame = mpi_blame,
                                 .describe = mpi_describe,
                                 .destroy = mpi_destroy};

/* ---- the end of a job ---- */

int muonshard_mpi_exit_code(muonshard_status status) {
    return status == MUONSHARD_OK ? 0 : 10 - (int)status;
}

static void pause_s(double seconds) {
    struct timespec pause = {(time_t)seconds, (long)((seconds - (double)(time_t)seconds) * 1e9)};
    nanosleep(&pause, NULL);
}

/* MPI_Abort asks the launcher, which may hang itself; this process ends by then all the same. */
static void leave(int signal, siginfo_t *info, void *context) {
    (void)signal;
    (void)context;
    _exit(info->si_value.sival_int);
}

static void leave_within(time_t seconds, int exit_code) {
    struct sigaction action = {.sa_sigaction = leave, .sa_flags = SA_SIGINFO};
    struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGALRM};
    const struct itimerspec once = {.it_value.tv_sec = seconds};
    timer_t timer;
    event.sigev_value.sival_int = exit_code;
    sigemptyset(&action.sa_mask);
    if (sigaction(SIGALRM, &action, NULL) == 0 &&
        timer_create(CLOCK_MONOTONIC, &event, &timer) == 0)
        timer_settime(timer, 0, &once, NULL);
}

static void end_job(muonshard_status status) {
    int initialized = 0, finalized = 1;
    MPI_Initialized(&initialized);
    MPI_Finalized(&finalized);
    if (!initialized || finalized)
        return;
    const int code = muonshard_mpi_exit_code(status);
    leave_within(ABORT_S, code);
    MPI_Abort(MPI_COMM_WORLD, code);
}

/* Whoever reads stderr may have stopped: the line is left out where there is no room for it. Of no
 * more than PIPE_BUF bytes a pipe takes all or nothing. */
static void write_line(const char *message) {
    char line[sizeof(error_text) + 16];
    struct pollfd room = {.fd = STDERR_FILENO, .events = POLLOUT};
    int length = snprintf(line, sizeof line, "muonshard: %s\n", message);
    if (length >= (int)sizeof line)
        length = (int)sizeof line - 1;
    for (int i = 0; i + 1 < length; i++)
        if (line[i] == '\n' || line[i] == '\r')
            line[i] = ' ';
    line[length - 1] = '\n';
    if (poll(&room, 1, ROOM_MS) == 1 && room.revents == POLLOUT &&
        write(STDERR_FILENO, line, (size_t)length) < 0)
        return; /* nobody is left to tell */
}

void muonshard_mpi_abort(void *user, muonshard_status status, const char *message) {
    (void)user;
    write_line(message ? message : muonshard_status_string(status));
    end_job(status);
}

/* muonshard_mpi_abort where several ranks fail at about the same time: the first of the node speaks
 * and ends the job, the others keep quiet and see to it only if that one could not. Before there is
 * a board, they come one after the other. A rank that is gone has most often said why, and the
 * launcher ends the job for it: both get a moment. */
static void abort_once(void *user, muonshard_status status, const char *message) {
    const muonshard_comm *comm = user;
    mpi_positions *board = ((const mpi_transport *)comm->impl)->board;
    if (!board)
        pause_s(comm->rank < 3 ? comm->rank : 3.0);
    if (positions_gone(board))
        pause_s(2.0);
    if (!positions_claim(board)) {
        pause_s(ROOM_MS / 500.0);
        end_job(status);
    } else {
        muonshard_mpi_abort(NULL, status, message);
    }
}

/* ---- creation ---- */

static muonshard_status check_mpi(const muonshard_comm_options *options, MPI_Comm given) {
    int initialized = 0, finalized = 0, inter = 0;
    MPI_Initialized(&initialized);
    MPI_Finalized(&finalized);
    if (!initialized || finalized)
        return comm_refuse(options, MUONSHARD_ERR_STATE, "MPI is %s",
                           initialized ? "already finalised" : "not initialised");
    if (given == MPI_COMM_NULL)
        return comm_refuse(options, MUONSHARD_ERR_ARGUMENT, "mpi_comm is MPI_COMM_NULL");
    if (MPI_Comm_test_inter(given, &inter) != MPI_SUCCESS || inter)
        return comm_refuse(options, MUONSHARD_ERR_ARGUMENT,
                           "mpi_comm is an inter-communicator; it has to be one group of ranks");
    return MUONSHARD_OK;
}

/* MPI_Comm_idup, polled: a rank that doesn't come must not hold the others for ever. */
static muonshard_status duplicate(muonshard_comm *comm, MPI_Comm given) {
    mpi_transport *transport = comm->impl;
    MPI_Request request;
    int code = MPI_Comm_idup(given, &transport->comm, &request);
    if (code != MPI_SUCCESS)
        return mpi_failed(comm, "MPI_Comm_idup", code);
    double begin = now_s();
    for (int done = 0; !done;) {
        double waited = now_s() - begin;
        code = MPI_Test(&request, &done, MPI_STATUS_IGNORE);
        if (code != MPI_SUCCESS)
            return mpi_failed(comm, "MPI_Comm_idup", code);
        if (!done && waited > comm->options.timeout_s)
            return comm_die(comm, MUONSHARD_ERR_TIMEOUT,
                            "rank %d of %d (host %s): %s: some rank did not join within %g s",
                            comm->rank, comm->size, comm->host, comm->position.phase,
                            comm->options.timeout_s);
        if (!done && waited > 1e-3)
            pause_s(50e-6);
    }
    transport->joined = true;
    code = MPI_Comm_set_errhandler(transport->comm, MPI_ERRORS_RETURN);
    return code == MPI_SUCCESS ? MUONSHARD_OK : mpi_failed(comm, "MPI_Comm_set_errhandler", code);
}

muonshard_status muonshard_comm_create_mpi(MPI_Comm mpi_comm, const muonshard_comm_options *options,
                                           muonshard_comm **out) {
    if (!out)
        return comm_refuse(options, MUONSHARD_ERR_ARGUMENT, "comm is NULL");
    *out = NULL;
    TRY(check_mpi(options, mpi_comm));
    int rank, size;
    if (MPI_Comm_rank(mpi_comm, &rank) != MPI_SUCCESS ||
        MPI_Comm_size(mpi_comm, &size) != MPI_SUCCESS)
        return comm_refuse(options, MUONSHARD_ERR_COMM, "mpi_comm has no rank and size");

    mpi_transport *transport = calloc(1, sizeof *transport);
    if (!transport)
        return comm_refuse(options, MUONSHARD_ERR_MEMORY, "out of memory");
    muonshard_comm *comm;
    muonshard_status status = comm_create(&mpi_ops, transport, rank, size, options, &comm);
    if (status) {
        free(transport);
        return status;
    }
    if (comm->options.on_fatal == muonshard_mpi_abort) {
        comm->options.on_fatal = abort_once;
        comm->options.fatal_user = comm;
    }
    TRY_GOTO(duplicate(comm, mpi_comm), destroy);
    TRY_GOTO(positions_open(comm, &transport->board), destroy);
    *out = comm;
    return MUONSHARD_OK;
destroy:
    muonshard_comm_destroy(comm);
    return status;
}
