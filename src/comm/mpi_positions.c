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

/* What a rank publishes; whole words, so that it can travel as atomics under a sequence
 * lock. */
typedef struct place {
    int64_t pid, started; /* started: /proc's start time, which tells a process from a later one of
                             the same id */
    int64_t step;         /* 0: outside a step */
    int64_t reached;      /* the highest step so far */
    int64_t marks;        /* since then */
    char phase[48];
} place;
enum { PLACE_WORDS = sizeof(place) / sizeof(int64_t) };
_Static_assert(sizeof(place) % sizeof(int64_t) == 0, "place has a broken word");

typedef struct slot {
    _Atomic unsigned sequence; /* odd while its rank writes */
    int rank;
    _Atomic int64_t words[PLACE_WORDS];
} slot;

typedef struct shared_board {
    _Atomic unsigned claimed;
    slot slots[]; /* [ranks on this node] */
} shared_board;

struct mpi_positions {
    shared_board *shared;
    size_t bytes;
    int count, mine; /* slots, and this rank's */
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
    char state;
    board->place.pid = me.pid;
    if (!process_state(me.pid, &state, &board->place.started))
        board->place.pid = 0;
    board->shared->slots[board->mine].rank = comm->rank;
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

/* ---- writing and reading ---- */

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
    unsigned sequence = atomic_load_explicit(&to->sequence, memory_order_relaxed);
    atomic_store_explicit(&to->sequence, sequence + 1, memory_order_relaxed);
    for (int i = 0; i < PLACE_WORDS; i++) /* release: a new word comes with the odd number */
        atomic_store_explicit(&to->words[i], words[i], memory_order_release);
    atomic_store_explicit(&to->sequence, sequence + 2, memory_order_release);
}

/* False for a rank that hasn't written yet, or was stopped within a write. */
static bool read_slot(const slot *from, place *out) {
    int64_t words[PLACE_WORDS];
    for (int tries = 0; tries < READ_TRIES; tries++) {
        unsigned before = atomic_load_explicit(&from->sequence, memory_order_acquire);
        if (before == 0 || before % 2)
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
    const char *state; /* "", " (stopped)", " (dead)" */
    place place;
} sighting;

static const char *state_of(const place *at) {
    char state;
    int64_t started;
    if (at->pid == 0 || !process_state(at->pid, &state, &started) || started != at->started)
        return "";
    if (state == 'T' || state == 't')
        return " (stopped)";
    return state == 'Z' || state == 'X' ? " (dead)" : "";
}

/* A process that doesn't run keeps everybody waiting, wherever it is; then who is least far. */
static int compare_sightings(const void *left, const void *right) {
    const sighting *a = left, *b = right;
    if (!a->state[0] != !b->state[0])
        return a->state[0] ? -1 : 1;
    if (a->place.reached != b->place.reached)
        return a->place.reached < b->place.reached ? -1 : 1;
    if (a->place.marks != b->place.marks)
        return a->place.marks < b->place.marks ? -1 : 1;
    return a->rank < b->rank ? -1 : 1;
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

size_t positions_describe(const mpi_positions *board, char *text, size_t size) {
    if (size)
        text[0] = '\0';
    sighting *seen = board ? malloc((size_t)board->count * sizeof *seen) : NULL;
    if (!seen)
        return 0;
    int count = 0;
    for (int i = 0; i < board->count; i++) {
        const slot *from = &board->shared->slots[i];
        sighting *one = &seen[count];
        if (i == board->mine || !read_slot(from, &one->place))
            continue;
        one->rank = from->rank;
        one->state = state_of(&one->place);
        if (one->state[0] || one->place.step != board->place.step ||
            strcmp(one->place.phase, board->place.phase) != 0)
            count++;
    }
    qsort(seen, (size_t)count, sizeof *seen, compare_sightings);

    size_t length = 0;
    for (int i = 0; i < count && i < DESCRIBED_RANKS; i++) {
        length = append(text, size, length, "%srank %d: ", i ? "; " : "", seen[i].rank);
        if (seen[i].place.step > 0)
            length = append(text, size, length, "step %lld, ", (long long)seen[i].place.step);
        length = append(text, size, length, "%s%s", seen[i].place.phase, seen[i].state);
    }
    if (count > DESCRIBED_RANKS)
        length = append(text, size, length, " and %d more", count - DESCRIBED_RANKS);
    free(seen);
    return length;
}

bool positions_claim(mpi_positions *board) {
    return !board || atomic_exchange(&board->shared->claimed, 1u) == 0;
}
