/* What src/fault.h promises. */
#include "fault.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { FAULT_MOST = 16 };

/* The one state outside of handles, and no shipped library has it. */
static _Atomic long passed[FAULT_MOST]; /* of the fault of this number in the list */

static long own_rank(void) {
    const char *const names[] = {"OMPI_COMM_WORLD_RANK", "PMIX_RANK", "SLURM_PROCID"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (getenv(names[i]))
            return strtol(getenv(names[i]), NULL, 10);
    return 0;
}

static bool fits(const char *pattern, size_t length, const char *name) {
    if (length && pattern[length - 1] == '*')
        return strncmp(pattern, name, length - 1) == 0;
    return strlen(name) == length && strncmp(pattern, name, length) == 0;
}

static void write_log(const char *name) {
    const char *to = getenv("MUONSHARD_FAULT_LOG");
    if (!to)
        return;
    char path[1024], line[128];
    const char *rank = strstr(to, "%r");
    if (rank)
        snprintf(path, sizeof path, "%.*s%ld%s", (int)(rank - to), to, own_rank(), rank + 2);
    else
        snprintf(path, sizeof path, "%s", to);
    const int file = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    const int length = snprintf(line, sizeof line, "%s\n", name);
    if (file < 0 || write(file, line, (size_t)length) != length)
        abort();
    close(file);
}

static int act(const char *action, size_t length) {
    static const struct {
        const char *name;
        int code;
    } errors[] = {{"ENOSPC", ENOSPC}, {"EIO", EIO}, {"EROFS", EROFS}, {"short", FAULT_SHORT}};
    if (fits(action, length, "kill"))
        raise(SIGKILL);
    if (fits(action, length, "stop"))
        raise(SIGSTOP);
    if (fits(action, length, "exit"))
        _exit(3);
    if (strncmp(action, "sleep=", 6) == 0) {
        const double seconds = strtod(action + 6, NULL);
        struct timespec t = {(time_t)seconds, (long)((seconds - (double)(time_t)seconds) * 1e9)};
        nanosleep(&t, NULL);
        return 0;
    }
    for (size_t i = 0; i < sizeof errors / sizeof *errors; i++)
        if (fits(action, length, errors[i].name))
            return errors[i].code;
    return 0;
}

/* One fault of the list, ACTION@POINT:N[/RANK]; a malformed one would make a test that tests
 * nothing. */
static int consider(const char *fault, size_t length, size_t number, const char *name) {
    const char *at = memchr(fault, '@', length);
    const char *colon = at;
    for (const char *c = at; c && c < fault + length; c++)
        colon = *c == ':' ? c : colon;
    if (!at || *colon != ':')
        abort();
    char *after;
    const long wanted = strtol(colon + 1, &after, 10);
    if (*after == '/' && after < fault + length && strtol(after + 1, NULL, 10) != own_rank())
        return 0;
    if (!fits(at + 1, (size_t)(colon - at - 1), name) ||
        atomic_fetch_add(&passed[number], 1) + 1 != wanted)
        return 0;
    return act(fault, (size_t)(at - fault));
}

int fault_act(const char *name) {
    write_log(name);
    const char *list = getenv("MUONSHARD_FAULT");
    int outcome = 0;
    for (size_t i = 0; list && *list && i < FAULT_MOST; i++) {
        const size_t length = strcspn(list, ";");
        const int pretended = consider(list, length, i, name);
        outcome = pretended ? pretended : outcome;
        list += length + (list[length] == ';');
    }
    return outcome;
}
