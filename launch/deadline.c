#define _GNU_SOURCE /* fopencookie */
#include "deadline.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <math.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#include "muonshard_mpi.h"
#include "siblings.h"

enum { ROOM_MS = 1000, END_S = 6 };
/* Ranks that wait for the same one speak in turn, the first of which ends the job; a launcher on a
 * busy machine takes more than a second for that. One that was stopped itself wakes later than it
 * should, and is quiet. */
enum { TURN_S = 2, MOST_TURNS = 2 };
static const double LATE_S = 0.15;

static struct {
    double seconds;
    int rank, size;
    int turn; /* of this rank on its host */
    char host[64];
    int64_t step;
    int depth;
    double due;     /* of the deadline that runs */
    bool for_ranks; /* others are what it waits for */
    /* What the handler says: this, or the rank that is stopped and what comes after it. */
    char line[512], blame[512];
} own = {.seconds = 300.0, .size = 1, .host = "unknown"};

/* ---- the end ---- */

static double now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

#define LINE_START "muonshard: rank "
enum { MOST_DIGITS = 15 };

static const char *find_line(void) {
    static char line[sizeof LINE_START + MOST_DIGITS + sizeof own.blame];
    const char *culprit = own.for_ranks ? siblings_stopped() : NULL;
    if (!culprit || strlen(culprit) > MOST_DIGITS)
        return own.line;
    stpcpy(stpcpy(stpcpy(line, LINE_START), culprit), own.blame);
    return line;
}

/* The line, where stderr has room for it. */
static void speak(void) {
    const struct timespec turn = {TURN_S * own.turn, 250000000};
    struct pollfd room = {.fd = STDERR_FILENO, .events = POLLOUT};
    const char *line = find_line();
    signal(SIGTERM, SIG_DFL); /* it comes when another rank has spoken */
    nanosleep(&turn, NULL);
    if (poll(&room, 1, ROOM_MS) == 1 && room.revents == POLLOUT &&
        write(STDERR_FILENO, line, strlen(line)) < 0)
        return; /* nobody is left to tell */
}

static volatile sig_atomic_t expired;

/* Only what a signal handler may do. The second time, the line itself found no end. */
static void expire(int signal) {
    (void)signal;
    if (!expired) {
        expired = 1;
        alarm(END_S);
        if (now_s() - own.due < LATE_S)
            speak();
    }
    _exit(muonshard_mpi_exit_code(MUONSHARD_ERR_TIMEOUT));
}

static void set_timer(double seconds) {
    struct itimerval timer = {0};
    timer.it_value.tv_sec = (time_t)seconds;
    timer.it_value.tv_usec = (suseconds_t)((seconds - floor(seconds)) * 1e6);
    setitimer(ITIMER_REAL, &timer, NULL);
}

static void begin(const char *phase, double seconds, bool for_ranks) {
    if (own.depth++)
        return;
    char step[32] = "";
    if (own.step > 0)
        snprintf(step, sizeof step, "step %lld, ", (long long)own.step);
    own.for_ranks = for_ranks;
    snprintf(own.line, sizeof own.line,
             LINE_START "%d of %d (host %s): %s%s: not done within %g s\n", own.rank, own.size,
             own.host, step, phase, seconds);
    snprintf(own.blame, sizeof own.blame,
             " of %d (host %s): stopped; rank %d waited %g s for it in %s%s\n", own.size, own.host,
             own.rank, seconds, step, phase);
    struct sigaction action = {.sa_handler = expire, .sa_flags = SA_NODEFER};
    sigemptyset(&action.sa_mask);
    sigaction(SIGALRM, &action, NULL);
    own.due = now_s() + seconds;
    set_timer(seconds);
}

void deadline_begin(const char *phase) {
    begin(phase, own.seconds, true);
}

void deadline_end(void) {
    if (--own.depth == 0)
        set_timer(0.0);
}

/* ---- who and how long ---- */

/* A number that one of the launchers gave, or `otherwise`. */
static int launched(const char *const names[3], int otherwise) {
    for (int i = 0; i < 3; i++)
        if (names[i] && getenv(names[i]))
            return (int)strtol(getenv(names[i]), NULL, 10);
    return otherwise;
}

const char *deadline_open(void) {
    own.rank = launched((const char *[]){"OMPI_COMM_WORLD_RANK", "PMIX_RANK", "SLURM_PROCID"}, 0);
    own.size = launched((const char *[]){"OMPI_COMM_WORLD_SIZE", "SLURM_NTASKS", NULL}, 1);
    own.turn = launched((const char *[]){"OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID", NULL}, 0);
    own.turn = own.turn < MOST_TURNS ? own.turn : MOST_TURNS;
    gethostname(own.host, sizeof own.host - 1);
    const char *text = getenv("MUONSHARD_START_TIMEOUT");
    if (!text)
        return NULL;
    char *end;
    const double seconds = strtod(text, &end);
    if (end == text || *end || !(seconds >= 0.001 && seconds <= 1e6))
        return "MUONSHARD_START_TIMEOUT is not a number of seconds in [0.001, 1e6]";
    own.seconds = seconds;
    return NULL;
}

double deadline_seconds(void) {
    return own.seconds;
}

void deadline_set(double seconds) {
    own.seconds = seconds;
}

void deadline_set_rank(int rank, int size) {
    own.rank = rank;
    own.size = size;
}

void deadline_set_step(int64_t step) {
    own.step = step;
}

/* ---- output ---- */

typedef struct sink {
    int file;
    int behind; /* the launcher's pipe that `file` ends up in; -1: none */
} sink;

/* mpirun takes all that its ranks write, and can't end before it has passed it on: what counts is
 * whether its own output is read. */
static int launcher_pipe(int file) {
    char path[64];
    struct stat about;
    snprintf(path, sizeof path, "/proc/%ld/fd/%d", (long)getppid(), file);
    if (!getenv("OMPI_COMM_WORLD_SIZE") || stat(path, &about) != 0 || !S_ISFIFO(about.st_mode))
        return -1;
    return open(path, O_WRONLY | O_NONBLOCK | O_CLOEXEC);
}

/* No more than PIPE_BUF at a time fits where there is room at all. */
static ssize_t write_piece(const sink *to, const char *text, size_t size) {
    struct pollfd room = {.fd = to->behind, .events = POLLOUT};
    if (to->behind >= 0 && poll(&room, 1, -1) < 0)
        return -1;
    return write(to->file, text, size < PIPE_BUF ? size : PIPE_BUF);
}

/* Less than `size` is an error of the stream. */
static ssize_t write_out(void *cookie, const char *text, size_t size) {
    size_t written = 0;
    begin("write output, which nobody reads", own.seconds / 2.0, false);
    while (written < size) {
        const ssize_t more = write_piece(cookie, text + written, size - written);
        if (more < 0 && errno != EINTR)
            break;
        written += more > 0 ? (size_t)more : 0;
    }
    deadline_end();
    return (ssize_t)written;
}

static FILE *guard(FILE *stream, sink *to, int buffering) {
    fflush(stream);
    to->behind = launcher_pipe(to->file);
    FILE *guarded = fopencookie(to, "w", (cookie_io_functions_t){.write = write_out});
    if (!guarded)
        return stream;
    setvbuf(guarded, NULL, buffering, BUFSIZ);
    return guarded;
}

void deadline_guard_output(void) {
    static sink out = {.file = STDOUT_FILENO}, err = {.file = STDERR_FILENO};
    stdout = guard(stdout, &out, isatty(STDOUT_FILENO) ? _IOLBF : _IOFBF);
    stderr = guard(stderr, &err, _IONBF);
}
