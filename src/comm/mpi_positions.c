#include "comm/mpi_positions.h"

#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

/* Processes share these words without a lock. */
_Static_assert(ATOMIC_LLONG_LOCK_FREE == 2 && ATOMIC_INT_LOCK_FREE == 2, "atomics need locks");

enum { DESCRIBED_RANKS = 4, READ_TRIES = 1000 };

/* A wait looks far more often than the others need to know. */
static const int64_t BEAT_EVERY_NS = 10000000;
/* Who waits gives signs of life; who has given none for so long (or half the deadline, where that
 * is less) does something else. */
static const double SILENT_S = 1.0;

/* Which process a rank is; written once. */
typedef struct process {
    int64_t id, started; /* started: /proc's start time, which tells a process from a later one of
                            the same id */
    int64_t space;       /* of process ids; in another one ours mean nothing. 0: not known */
} process;

/* What a rank publishes again and again; whole words, so that it can travel as atomics under a
 * sequence lock. */
typedef struct place {
    int64_t step;    /* 0: outside a step */
    int64_t reached; /* the highest step so far */
    int64_t marks;   /* since then */
    char phase[48];
} place;
enum { PLACE_WORDS = sizeof(place) / sizeof(int64_t) };
_Static_assert(sizeof(place) % sizeof(int64_t) == 0, "place has a broken word");

typedef struct slot {
    _Atomic unsigned sequence; /* odd while its rank writes; 0: nothing is here yet */
    int rank;
    process process;
    _Atomic int64_t beat; /* the last sign of life, on the monotonic clock of the node */
    _Atomic int64_t words[PLACE_WORDS];
} slot;

typedef struct shared_board {
    _Atomic unsigned claimed;
    slot slots[]; /* [ranks on this node] */
} shared_board;

struct mpi_positions {
    shared_board *shared;
    size_t bytes;
    int count, mine;  /* slots, and this rank's */
    int world;        /* ranks on all nodes */
    const char *host; /* the communicator's */
    int64_t beaten;
    place place;
};

/* ---- opening ---- */

typedef struct resident { /* what every rank tells every other */
    char host[64];
    int64_t pid, time_ns;
} resident;

/* State letter and start time of a process of this machine; false where /proc doesn't tell. */
static bool process_state(int64_t pid, char *state, int64_t *started) {
    char path[64], text[1024];
    snprintf(path, sizeof path, "/proc/%lld/stat", (long long)pid);
    FILE *file = fopen(path, "r");
    if (!file)
        return false;
    size_t length = fread(text, 1, sizeof text - 1, file);
    fclose(file);
    text[length] = '\0';
    const char *at = strrchr(text, ')'); /* the name before it may hold anything */
    long long ticks;
    if (!at || sscanf(at + 1,
                      " %c %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s "
                      "%lld",
                      state, &ticks) != 2)
        return false;
    *started = ticks;
    return true;
}

static shared_board *map_board(const char *name, bool create, size_t bytes) {
    int file = shm_open(name, create ? O_RDWR | O_CREAT | O_EXCL : O_RDWR, 0600);
    if (file < 0)
        return NULL;
    void *memory = MAP_FAILED;
    /* fallocate: a full /dev/shm has to say so here, not by a signal at the first write. */
    if (!create || posix_fallocate(file, 0, (off_t)bytes) == 0)
        memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (memory == MAP_FAILED && create)
        shm_unlink(name);
    return memory == MAP_FAILED ? NULL : memory;
}

static process own_process(void) {
    process own = {.id = getpid()};
    char state;
    struct stat space;
    if (process_state(own.id, &state, &own.started) && stat("/proc/self/ns/pid", &space) == 0)
        own.space = (int64_t)space.st_ino;
    return own;
}

/* Lowest rank of this node makes the board, the others attach; the name is gone when both have
 * happened. */
static muonshard_status share_board(muonshard_comm *comm, mpi_positions *board, const resident *all,
                                    int8_t *ok) {
    const char *host = all[comm->rank].host;
    int creator = -1;
    for (int r = 0; r < comm->size; r++) {
        if (strcmp(all[r].host, host) != 0)
            continue;
        if (creator < 0)
            creator = r;
        if (r == comm->rank)
            board->mine = board->count;
        board->count++;
    }
    board->bytes = sizeof(shared_board) + (size_t)board->count * sizeof(slot);
    char name[96];
    snprintf(name, sizeof name, "/muonshard-%lld-%lld-%d", (long long)all[0].pid,
             (long long)all[0].time_ns, creator);

    bool creates = creator == comm->rank;
    if (creates)
        board->shared = map_board(name, true, board->bytes);
    int8_t made = board->shared != NULL;
    muonshard_status status = comm_allgather(comm, &made, ok, sizeof made);
    if (!status && !creates && ok[creator])
        board->shared = map_board(name, false, board->bytes);
    if (!status)
        status = comm_allgather(comm, &made, ok, sizeof made);
    if (creates && board->shared)
        shm_unlink(name);
    return status;
}

muonshard_status positions_open(muonshard_comm *comm, mpi_positions **out) {
    *out = NULL;
    resident me = {.pid = getpid()};
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    me.time_ns = (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
    memcpy(me.host, comm->host, sizeof me.host);

    muonshard_status status = MUONSHARD_OK;
    mpi_positions *board = calloc(1, sizeof *board);
    resident *all = calloc((size_t)comm->size, sizeof *all);
    int8_t *ok = calloc((size_t)comm->size, sizeof *ok);
    if (!board || !all || !ok) {
        /* Alone with it: the others are on their way into the all-gather. */
        status = comm_die(comm, MUONSHARD_ERR_MEMORY, "rank %d of %d (host %s): out of memory",
                          comm->rank, comm->size, comm->host);
        goto done;
    }
    TRY_GOTO(comm_allgather(comm, &me, all, sizeof me), done);
    TRY_GOTO(share_board(comm, board, all, ok), done);
    if (!board->shared)
        goto done;
    board->world = comm->size;
    board->host = comm->host;
    board->shared->slots[board->mine].rank = comm->rank;
    board->shared->slots[board->mine].process = own_process();
    positions_mark(board, &comm->position);
    *out = board;
    board = NULL;
done:
    positions_close(board);
    free(all);
    free(ok);
    return status;
}

void positions_close(mpi_positions *board) {
    if (!board)
        return;
    if (board->shared)
        munmap(board->shared, board->bytes);
    free(board);
}

/* ---- writing ---- */

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

void positions_beat(mpi_positions *board) {
    if (!board)
        return;
    const int64_t now = now_ns();
    if (now - board->beaten < BEAT_EVERY_NS)
        return;
    board->beaten = now;
    atomic_store_explicit(&board->shared->slots[board->mine].beat, now, memory_order_relaxed);
}

void positions_mark(mpi_positions *board, const comm_position *position) {
    if (!board)
        return;
    place *own = &board->place;
    if (position->step > own->reached) {
        own->reached = position->step;
        own->marks = 0;
    }
    own->marks++;
    own->step = position->step;
    memcpy(own->phase, position->phase, sizeof own->phase);

    int64_t words[PLACE_WORDS];
    memcpy(words, own, sizeof words);
    slot *to = &board->shared->slots[board->mine];
    positions_beat(board);
    unsigned sequence = atomic_load_explicit(&to->sequence, memory_order_relaxed);
    atomic_store_explicit(&to->sequence, sequence + 1, memory_order_relaxed);
    for (int i = 0; i < PLACE_WORDS; i++) /* release: a new word comes with the odd number */
        atomic_store_explicit(&to->words[i], words[i], memory_order_release);
    atomic_store_explicit(&to->sequence, sequence + 2, memory_order_release);
}

/* ---- reading ---- */

/* False for a rank that was stopped within a write. */
static bool read_place(const slot *from, place *out) {
    int64_t words[PLACE_WORDS];
    for (int tries = 0; tries < READ_TRIES; tries++) {
        unsigned before = atomic_load_explicit(&from->sequence, memory_order_acquire);
        if (before % 2)
            continue;
        for (int i = 0; i < PLACE_WORDS; i++)
            words[i] = atomic_load_explicit(&from->words[i], memory_order_acquire);
        if (atomic_load_explicit(&from->sequence, memory_order_relaxed) != before)
            continue;
        memcpy(out, words, sizeof words);
        out->phase[sizeof out->phase - 1] = '\0';
        return true;
    }
    return false;
}

typedef struct sighting {
    int rank;
    const char *state; /* "stopped", "gone", "running"; "": not known */
    bool runs;         /* as far as is known */
    double silent_s;
    place place;
} sighting;

/* A process of another space of ids can't be looked up here. */
static const char *state_of(const process *of, const process *own) {
    char state;
    int64_t started;
    if (of->space == 0 || of->space != own->space)
        return "";
    if (!process_state(of->id, &state, &started) || started != of->started || state == 'Z' ||
        state == 'X')
        return "gone";
    return state == 'T' || state == 't' ? "stopped" : "running";
}

/* False for this rank itself and for one that hasn't written yet. */
static bool sight(const mpi_positions *board, int index, sighting *out) {
    const slot *from = &board->shared->slots[index];
    if (index == board->mine || atomic_load_explicit(&from->sequence, memory_order_acquire) == 0)
        return false;
    out->rank = from->rank;
    out->state = state_of(&from->process, &board->shared->slots[board->mine].process);
    out->runs = strcmp(out->state, "stopped") != 0 && strcmp(out->state, "gone") != 0;
    const int64_t beat = atomic_load_explicit(&from->beat, memory_order_relaxed);
    out->silent_s = 1e-9 * (double)(now_ns() - beat);
    if (!read_place(from, &out->place)) {
        if (out->runs)
            return false;
        out->place = (place){.phase = "between two places"};
    }
    return true;
}

/* Negative where `a` is less far than `b`. */
static int compare_places(const place *a, const place *b) {
    if (a->reached != b->reached)
        return a->reached < b->reached ? -1 : 1;
    return (a->marks > b->marks) - (a->marks < b->marks);
}

static int compare_sightings(const void *left, const void *right) {
    const sighting *a = left, *b = right;
    if (a->runs != b->runs) /* who doesn't run keeps everybody waiting, wherever it is */
        return a->runs ? 1 : -1;
    const int places = compare_places(&a->place, &b->place);
    return places ? places : (a->rank > b->rank) - (a->rank < b->rank);
}

static size_t append(char *text, size_t size, size_t length, const char *format, ...)
    __attribute__((format(printf, 4, 5)));
static size_t append(char *text, size_t size, size_t length, const char *format, ...) {
    va_list args;
    va_start(args, format);
    int more = vsnprintf(length < size ? text + length : NULL, length < size ? size - length : 0,
                         format, args);
    va_end(args);
    return length + (size_t)(more > 0 ? more : 0);
}

static size_t append_place(char *text, size_t size, size_t length, const place *at) {
    if (at->step > 0)
        length = append(text, size, length, "step %lld, ", (long long)at->step);
    else if (at->reached > 0)
        length = append(text, size, length, "after step %lld, ", (long long)at->reached);
    return append(text, size, length, "%s", at->phase);
}

/* Who is further and silent has its own work to do. */
static bool keeps_waiting(const mpi_positions *board, const sighting *one, double timeout_s) {
    const double most_s = timeout_s < 2.0 * SILENT_S ? timeout_s / 2.0 : SILENT_S;
    return !one->runs ||
           (one->silent_s > most_s && compare_places(&one->place, &board->place) <= 0);
}

size_t positions_blame(const mpi_positions *board, double timeout_s, char *text, size_t size) {
    sighting worst = {.rank = -1}, one;
    if (size)
        text[0] = '\0';
    for (int i = 0; board && i < board->count; i++)
        if (sight(board, i, &one) && keeps_waiting(board, &one, timeout_s) &&
            (worst.rank < 0 || compare_sightings(&one, &worst) < 0))
            worst = one;
    if (worst.rank < 0)
        return 0;
    size_t length =
        append(text, size, 0, "rank %d of %d (host %s): ", worst.rank, board->world, board->host);
    length = append_place(text, size, length, &worst.place);
    length = append(text, size, length, ": no sign of life for %.1f s", worst.silent_s);
    return worst.state[0] ? append(text, size, length, " (%s)", worst.state) : length;
}

size_t positions_describe(const mpi_positions *board, char *text, size_t size) {
    if (size)
        text[0] = '\0';
    sighting *seen = board ? malloc((size_t)board->count * sizeof *seen) : NULL;
    if (!seen)
        return 0;
    int count = 0;
    for (int i = 0; i < board->count; i++) {
        const sighting *one = &seen[count];
        if (sight(board, i, &seen[count]) && (!one->runs || one->place.step != board->place.step ||
                                              strcmp(one->place.phase, board->place.phase) != 0))
            count++;
    }
    qsort(seen, (size_t)count, sizeof *seen, compare_sightings);

    size_t length = 0;
    for (int i = 0; i < count && i < DESCRIBED_RANKS; i++) {
        length = append(text, size, length, "%srank %d: ", i ? "; " : "", seen[i].rank);
        length = append_place(text, size, length, &seen[i].place);
        if (!seen[i].runs)
            length = append(text, size, length, " (%s)", seen[i].state);
    }
    if (count > DESCRIBED_RANKS)
        length = append(text, size, length, " and %d more", count - DESCRIBED_RANKS);
    free(seen);
    if (board->count < board->world)
        length = append(text, size, length,
                        "%sthe ranks of this host are well: who is missing is on another",
                        length ? "; " : "");
    return length;
}

bool positions_gone(const mpi_positions *board) {
    sighting one;
    for (int i = 0; board && i < board->count; i++)
        if (sight(board, i, &one) && strcmp(one.state, "gone") == 0)
            return true;
    return false;
}

bool positions_claimed(const mpi_positions *board) {
    return board && atomic_load_explicit(&board->shared->claimed, memory_order_relaxed) != 0;
}

bool positions_claim(mpi_positions *board) {
    return !board || atomic_exchange(&board->shared->claimed, 1u) == 0;
}
