#include "siblings.h"

#include <fcntl.h>
#include <stdbool.h>
#include <string.h>
#include <unistd.h>

/* No stdio and no memory: a signal handler may have neither. */
enum { CHILDREN_BYTES = 4096, ENVIRONMENT_BYTES = 1 << 17 };
static char children[CHILDREN_BYTES], environment[ENVIRONMENT_BYTES];

static char *put_number(char *at, long number) {
    char digits[24];
    size_t i = sizeof digits - 1;
    digits[i] = '\0';
    do
        digits[--i] = (char)('0' + number % 10);
    while (number /= 10);
    return stpcpy(at, digits + i);
}

/* The number at *text, which moves behind it and spaces; -1: there is none. */
static long take_number(const char **text) {
    const char *at = *text;
    long number = 0;
    if (*at < '0' || *at > '9')
        return -1;
    for (; *at >= '0' && *at <= '9'; at++)
        number = 10 * number + (*at - '0');
    while (*at == ' ')
        at++;
    *text = at;
    return number;
}

/* What there is of a file of /proc, with a NUL behind; its length. */
static size_t read_file(const char *path, char *text, size_t size) {
    const int file = open(path, O_RDONLY | O_CLOEXEC);
    size_t length = 0;
    while (file >= 0 && length < size - 1) {
        const ssize_t more = read(file, text + length, size - 1 - length);
        if (more <= 0)
            break;
        length += (size_t)more;
    }
    if (file >= 0)
        close(file);
    text[length] = '\0';
    return length;
}

static bool is_stopped(long pid) {
    char path[64], stat[512];
    stpcpy(put_number(stpcpy(path, "/proc/"), pid), "/stat");
    read_file(path, stat, sizeof stat);
    const char *name_end = strrchr(stat, ')'); /* the name before it may hold anything */
    return name_end && (name_end[2] == 'T' || name_end[2] == 't');
}

static const char *rank_of(long pid) {
    static const char *const names[] = {"OMPI_COMM_WORLD_RANK=", "PMIX_RANK=", "SLURM_PROCID="};
    char path[64];
    stpcpy(put_number(stpcpy(path, "/proc/"), pid), "/environ");
    const size_t length = read_file(path, environment, sizeof environment);
    for (size_t n = 0; n < sizeof names / sizeof *names; n++)
        for (const char *at = environment; at < environment + length; at += strlen(at) + 1)
            if (strncmp(at, names[n], strlen(names[n])) == 0)
                return at + strlen(names[n]);
    return NULL;
}

const char *siblings_stopped(void) {
    const long parent = (long)getppid();
    char path[96];
    const char *at = children;
    stpcpy(put_number(stpcpy(put_number(stpcpy(path, "/proc/"), parent), "/task/"), parent),
           "/children");
    read_file(path, children, sizeof children);
    for (long pid; (pid = take_number(&at)) > 0;) {
        const char *rank = is_stopped(pid) ? rank_of(pid) : NULL;
        if (rank)
            return rank;
    }
    return NULL;
}
