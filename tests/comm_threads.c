#include "comm_threads.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_RANKS = 64 };

/* One collective: what each rank brought to its operation of this number. */
typedef struct meeting {
    struct meeting *next;
    uint64_t number;
    comm_request request; /* the first rank's, to compare with */
    size_t *bytes;        /* [part_count], likewise */
    const comm_part *parts[MAX_RANKS];
    int arrived, left;
    double ready_s; /* when the data may move, once all have arrived */
    bool moved;
} meeting;

typedef struct world {
    pthread_mutex_t lock;
    pthread_barrier_t barrier;
    int size;
    double latency_s;
    meeting *meetings;
    uint64_t next[MAX_RANKS]; /* number of each rank's next operation */
    bool dead[MAX_RANKS];     /* its buffers may be gone */
    comm_position position[MAX_RANKS];
    char mismatch[256]; /* not empty: two ranks started different operations */
} world;

/* What one rank's communicator holds. */
typedef struct seat {
    world *world;
    int rank;
    muonshard_comm_options options; /* the caller's, whose on_fatal comes after ours */
} seat;

static const char *kind_name(comm_kind kind) {
    static const char *const names[] = {"exchange", "reduce-scatter", "all-gather", "broadcast"};
    return names[kind];
}

static meeting *find_meeting(world *w, uint64_t number) {
    meeting *m = w->meetings;
    while (m && m->number != number)
        m = m->next;
    return m;
}

static meeting *new_meeting(world *w, uint64_t number, const comm_request *request) {
    meeting *m = calloc(1, sizeof *m);
    size_t *bytes = malloc((request->part_count + 1) * sizeof *bytes);
    if (!m || !bytes) {
        free(m);
        free(bytes);
        return NULL;
    }
    for (size_t i = 0; i < request->part_count; i++)
        bytes[i] = request->parts[i].bytes;
    m->number = number;
    m->request = *request;
    m->bytes = bytes;
    m->next = w->meetings;
    w->meetings = m;
    return m;
}

static void remove_meeting(world *w, meeting *m) {
    meeting **at = &w->meetings;
    while (*at != m)
        at = &(*at)->next;
    *at = m->next;
    free(m->bytes);
    free(m);
}

static bool same_operation(const meeting *m, const comm_request *request) {
    if (m->request.kind != request->kind || m->request.part_count != request->part_count ||
        (request->kind == COMM_BROADCAST && m->request.root != request->root))
        return false;
    for (size_t i = 0; i < request->part_count; i++)
        if (m->bytes[i] != request->parts[i].bytes)
            return false;
    return true;
}

static muonshard_status arrive(seat *s, comm_ticket *ticket) {
    world *w = s->world;
    const comm_request *request = &ticket->request;
    uint64_t number = w->next[s->rank]++;
    meeting *m = find_meeting(w, number);
    if (!m)
        m = new_meeting(w, number, request);
    if (!m)
        return MUONSHARD_ERR_MEMORY;
    if (!same_operation(m, request)) {
        snprintf(w->mismatch, sizeof w->mismatch,
                 "operation %llu: rank %d started %s root %d of %zu parts (first %zu bytes), "
                 "another rank %s root %d of %zu parts (first %zu bytes)",
                 (unsigned long long)number, s->rank, kind_name(request->kind), request->root,
                 request->part_count, request->part_count ? request->parts[0].bytes : 0,
                 kind_name(m->request.kind), m->request.root, m->request.part_count,
                 m->request.part_count ? m->bytes[0] : 0);
        return MUONSHARD_ERR_MISMATCH;
    }
    m->parts[s->rank] = request->parts;
    m->arrived++;
    if (m->arrived == w->size)
        m->ready_s = now_s() + w->latency_s;
    ticket->impl = m;
    return MUONSHARD_OK;
}

static muonshard_status threads_start(muonshard_comm *comm, comm_ticket *ticket) {
    seat *s = comm->impl;
    char text[sizeof s->world->mismatch] = "out of memory";
    pthread_mutex_lock(&s->world->lock);
    muonshard_status status = s->world->mismatch[0] ? MUONSHARD_ERR_MISMATCH : arrive(s, ticket);
    if (s->world->mismatch[0])
        memcpy(text, s->world->mismatch, sizeof text);
    pthread_mutex_unlock(&s->world->lock);
    return status ? comm_die(comm, status, "%s", text) : MUONSHARD_OK;
}

/* Moves everybody's data in the thread that holds the lock. */
static void move_part(const meeting *m, int size, size_t part) {
    size_t bytes = m->bytes[part];
    if (!bytes)
        return;
    for (int to = 0; to < size; to++) {
        const comm_part *in = &m->parts[to][part];
        for (int from = 0; from < size; from++) {
            const comm_part *out = &m->parts[from][part];
            const char *send = out->send;
            char *recv = in->recv;
            switch (m->request.kind) {
            case COMM_EXCHANGE:
            case COMM_REDUCE_SCATTER:
                recv = comm_exchange_target(&m->request, in);
                memcpy(recv + (size_t)from * bytes, send + (size_t)to * bytes, bytes);
                break;
            case COMM_ALL_GATHER: memcpy(recv + (size_t)from * bytes, send, bytes); break;
            case COMM_BROADCAST:
                if (from == m->request.root && to != from)
                    memcpy(recv, out->recv, bytes);
                break;
            }
        }
    }
}

static bool can_move(const world *w, const meeting *m) {
    if (m->arrived < w->size || now_s() < m->ready_s)
        return false;
    for (int r = 0; r < w->size; r++)
        if (w->dead[r])
            return false;
    return true;
}

static bool finished(world *w, comm_ticket *ticket) {
    meeting *m = ticket->impl;
    if (!m->moved) {
        if (!can_move(w, m))
            return false;
        for (size_t i = 0; i < m->request.part_count; i++)
            move_part(m, w->size, i);
        m->moved = true;
    }
    if (++m->left == w->size)
        remove_meeting(w, m);
    ticket->impl = NULL;
    return true;
}

static muonshard_status threads_test(muonshard_comm *comm, comm_ticket *ticket, bool *done) {
    world *w = ((seat *)comm->impl)->world;
    char text[sizeof w->mismatch];
    pthread_mutex_lock(&w->lock);
    memcpy(text, w->mismatch, sizeof text);
    *done = !text[0] && finished(w, ticket);
    pthread_mutex_unlock(&w->lock);
    return text[0] ? comm_die(comm, MUONSHARD_ERR_MISMATCH, "%s", text) : MUONSHARD_OK;
}

static void threads_mark(muonshard_comm *comm, const comm_position *position) {
    seat *s = comm->impl;
    pthread_mutex_lock(&s->world->lock);
    s->world->position[s->rank] = *position;
    pthread_mutex_unlock(&s->world->lock);
}

static size_t threads_describe(muonshard_comm *comm, char *text, size_t size) {
    seat *s = comm->impl;
    world *w = s->world;
    size_t length = 0;
    text[0] = '\0';
    pthread_mutex_lock(&w->lock);
    for (int r = 0; r < w->size && length < size; r++) {
        const comm_position *at = &w->position[r];
        if (at->step == comm->position.step && strcmp(at->phase, comm->position.phase) == 0)
            continue;
        length += (size_t)snprintf(text + length, size - length, "%srank %d: step %lld, %s",
                                   length ? "; " : "", r, (long long)at->step, at->phase);
    }
    pthread_mutex_unlock(&w->lock);
    return length;
}

/* From here on no other thread may touch this rank's buffers. */
static void threads_fatal(void *user, muonshard_status status, const char *message) {
    seat *s = user;
    pthread_mutex_lock(&s->world->lock);
    s->world->dead[s->rank] = true;
    pthread_mutex_unlock(&s->world->lock);
    if (s->options.on_fatal)
        s->options.on_fatal(s->options.fatal_user, status, message);
    else if (s->options.log)
        s->options.log(s->options.log_user, MUONSHARD_LOG_ERROR, message);
}

static void threads_destroy(muonshard_comm *comm) {
    seat *s = comm->impl;
    pthread_mutex_lock(&s->world->lock);
    s->world->dead[s->rank] = true;
    pthread_mutex_unlock(&s->world->lock);
}

static const comm_ops threads_ops = {.name = "threads",
                                     .native_reduce_scatter = false,
                                     .start = threads_start,
                                     .test = threads_test,
                                     .mark = threads_mark,
                                     .describe = threads_describe,
                                     .destroy = threads_destroy};

void threads_barrier(muonshard_comm *comm) {
    pthread_barrier_wait(&((seat *)comm->impl)->world->barrier);
}

/* ---- running ---- */

typedef struct runner {
    seat seat;
    muonshard_comm *comm;
    pthread_t thread;
    bool started;
    void (*fn)(muonshard_comm *comm, void *arg);
    void *arg;
} runner;

static void *run_rank(void *user) {
    runner *r = user;
    r->fn(r->comm, r->arg);
    muonshard_comm_destroy(r->comm);
    return NULL;
}

static muonshard_status make_comm(runner *r, const muonshard_comm_options *options) {
    TRY(comm_create(&threads_ops, &r->seat, r->seat.rank, r->seat.world->size, options, &r->comm));
    r->seat.options = r->comm->options;
    r->comm->options.on_fatal = threads_fatal;
    r->comm->options.fatal_user = &r->seat;
    r->seat.world->position[r->seat.rank] = r->comm->position;
    return MUONSHARD_OK;
}

static muonshard_status run_ranks(world *w, const threads_options *options,
                                  void (*fn)(muonshard_comm *comm, void *arg), void *arg) {
    runner *runners = calloc((size_t)w->size, sizeof *runners);
    if (!runners)
        return MUONSHARD_ERR_MEMORY;
    muonshard_status status = MUONSHARD_OK;
    for (int r = 0; r < w->size && !status; r++) {
        runners[r].seat = (seat){.world = w, .rank = r};
        runners[r].fn = fn;
        runners[r].arg = arg;
        status = make_comm(&runners[r], &options->comm);
    }
    for (int r = 0; r < w->size && !status; r++) {
        runners[r].started = pthread_create(&runners[r].thread, NULL, run_rank, &runners[r]) == 0;
        if (!runners[r].started)
            status = MUONSHARD_ERR_MEMORY; /* those that run end by their deadlines */
    }
    for (int r = 0; r < w->size; r++) {
        if (runners[r].started)
            pthread_join(runners[r].thread, NULL);
        else
            muonshard_comm_destroy(runners[r].comm);
    }
    free(runners);
    return status;
}

muonshard_status threads_run_with(const threads_options *options, int ranks,
                                  void (*fn)(muonshard_comm *comm, void *arg), void *arg) {
    const threads_options initial = THREADS_OPTIONS_INIT;
    if (!options)
        options = &initial;
    if (ranks < 1 || ranks > MAX_RANKS)
        return MUONSHARD_ERR_ARGUMENT;
    world w = {.size = ranks, .latency_s = options->latency_s};
    if (pthread_mutex_init(&w.lock, NULL) != 0)
        return MUONSHARD_ERR_MEMORY;
    if (pthread_barrier_init(&w.barrier, NULL, (unsigned)ranks) != 0) {
        pthread_mutex_destroy(&w.lock);
        return MUONSHARD_ERR_MEMORY;
    }
    muonshard_status status = run_ranks(&w, options, fn, arg);
    while (w.meetings)
        remove_meeting(&w, w.meetings);
    pthread_barrier_destroy(&w.barrier);
    pthread_mutex_destroy(&w.lock);
    return status;
}

muonshard_status threads_run(int ranks, void (*fn)(muonshard_comm *comm, void *arg), void *arg) {
    return threads_run_with(NULL, ranks, fn, arg);
}
