/* check_ranks.c - where the ranks are and what they compute with: a table, and in words what is
 * unusual about it. */
#define _GNU_SOURCE /* sched_getaffinity */
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "check.h"

enum { WHOLE_TABLE = 64 }; /* more ranks get a line a host */

typedef struct rank_info {
    char host[64], backend[16], device[96];
    int64_t pid;
    int32_t online; /* CPUs of the host */
    cpu_set_t cpus; /* of these, the rank's */
} rank_info;

typedef struct host_info {
    const char *name;
    int first, ranks; /* the first of them */
    int least, most;  /* CPUs of a rank */
    cpu_set_t cpus;   /* of any of its ranks */
} host_info;

typedef struct survey {
    int ranks, hosts;
    rank_info *of; /* own, [ranks] */
    int *host;     /* own, [ranks] */
    host_info *at; /* own, [ranks], of which [hosts] are used */
} survey;

static rank_info look_around(const muonshard_optimizer *optimizer) {
    rank_info info;
    memset(&info, 0, sizeof info);
    if (gethostname(info.host, sizeof info.host - 1) != 0)
        snprintf(info.host, sizeof info.host, "?");
    info.pid = getpid();
    info.online = (int32_t)sysconf(_SC_NPROCESSORS_ONLN);
    if (sched_getaffinity(0, sizeof info.cpus, &info.cpus) != 0)
        for (int i = 0; i < info.online && i < CPU_SETSIZE; i++)
            CPU_SET((size_t)i, &info.cpus);
    if (optimizer) {
        snprintf(info.backend, sizeof info.backend, "%s", muonshard_backend(optimizer));
        snprintf(info.device, sizeof info.device, "%s", muonshard_device(optimizer));
    }
    return info;
}

static void find_hosts(survey *s) {
    for (int r = 0; r < s->ranks; r++) {
        const rank_info *info = &s->of[r];
        const int cpus = CPU_COUNT(&info->cpus);
        int h = 0;
        /* Ranks of a host follow each other, mostly. */
        if (r > 0 && strcmp(info->host, s->of[r - 1].host) == 0)
            h = s->host[r - 1];
        while (h < s->hosts && strcmp(s->at[h].name, info->host) != 0)
            h++;
        host_info *host = &s->at[h];
        if (h == s->hosts) {
            *host = (host_info){.name = info->host, .first = r, .least = cpus, .most = cpus};
            s->hosts++;
        }
        s->host[r] = h;
        host->ranks++;
        host->least = cpus < host->least ? cpus : host->least;
        host->most = cpus > host->most ? cpus : host->most;
        CPU_OR(&host->cpus, &host->cpus, &info->cpus);
    }
}

/* ---- the table ---- */

/* "0-3,8"; what doesn't fit is left out. */
static void cpu_text(const cpu_set_t *set, char *text, size_t size) {
    size_t length = 0;
    text[0] = '\0';
    for (int i = 0; i < CPU_SETSIZE; i++) {
        int end = i;
        if (!CPU_ISSET((size_t)i, set))
            continue;
        while (end + 1 < CPU_SETSIZE && CPU_ISSET((size_t)end + 1, set))
            end++;
        char part[32];
        const int n = end > i ? snprintf(part, sizeof part, "%s%d-%d", length ? "," : "", i, end)
                              : snprintf(part, sizeof part, "%s%d", length ? "," : "", i);
        if (length + (size_t)n + 4 > size) {
            snprintf(text + length, size - length, "...");
            return;
        }
        length += (size_t)snprintf(text + length, size - length, "%s", part);
        i = end;
    }
}

static void print_ranks(const check *c, const survey *s) {
    check_say(c, "%6s  %-20s %8s  %-16s %s", "rank", "host", "pid", "CPUs", "computes on");
    for (int r = 0; r < s->ranks; r++) {
        const rank_info *info = &s->of[r];
        char cpus[17];
        cpu_text(&info->cpus, cpus, sizeof cpus);
        check_say(c, "%6d  %-20s %8lld  %-16s %s%s%s", r, info->host, (long long)info->pid, cpus,
                  info->backend[0] ? info->backend : "not known", info->device[0] ? ": " : "",
                  info->device);
    }
}

static void print_hosts(const check *c, const survey *s) {
    check_say(c, "%-20s %6s %11s %10s  %s", "host", "ranks", "from rank", "CPUs each",
              "its first computes on");
    for (int h = 0; h < s->hosts; h++) {
        const host_info *host = &s->at[h];
        const rank_info *info = &s->of[host->first];
        char cpus[32];
        snprintf(cpus, sizeof cpus, host->least == host->most ? "%d" : "%d-%d", host->least,
                 host->most);
        check_say(c, "%-20s %6d %11d %10s  %s%s%s", host->name, host->ranks, host->first, cpus,
                  info->backend[0] ? info->backend : "not known", info->device[0] ? ": " : "",
                  info->device);
    }
}

/* ---- what is unusual ---- */

/* One line of what may be so on many hosts. */
typedef struct finding {
    int hosts;
    char first[256];
} finding;

static void say_finding(const check *c, const finding *f, const char *advice) {
    if (f->hosts == 1)
        check_say(c, "note: %s; %s", f->first, advice);
    else if (f->hosts > 1)
        check_say(c, "note: %s, and so on %d more host%s; %s", f->first, f->hosts - 1,
                  f->hosts == 2 ? "" : "s", advice);
}

static void note_cpus(check *c, const survey *s) {
    finding crowded = {0}, unbound = {0}, uneven = {0};
    for (int h = 0; h < s->hosts; h++) {
        const host_info *host = &s->at[h];
        const int cpus = CPU_COUNT(&host->cpus);
        const bool few = host->ranks > cpus;
        if (few && crowded.hosts++ == 0)
            snprintf(crowded.first, sizeof crowded.first, "%d ranks share %d CPU%s of %s",
                     host->ranks, cpus, cpus == 1 ? "" : "s", host->name);
        if (!few && host->ranks > 1 && host->least == s->of[host->first].online &&
            unbound.hosts++ == 0)
            snprintf(unbound.first, sizeof unbound.first,
                     "the ranks of %s are not bound: each may run on all its %d CPUs", host->name,
                     cpus);
        if ((host->least != host->most || host->least != s->at[0].least) && uneven.hosts++ == 0)
            snprintf(uneven.first, sizeof uneven.first,
                     "ranks of %s have %d to %d CPUs, rank 0 has %d", host->name, host->least,
                     host->most, CPU_COUNT(&s->of[0].cpus));
    }
    c->crowded = crowded.hosts > 0;
    say_finding(c, &crowded, "they wait for each other, and no rank is called slow below");
    say_finding(c, &unbound, "mpirun --bind-to core, or launch/run_hosts.sh, binds them");
    say_finding(c, &uneven, "a step is as fast as the slowest rank");
}

/* What is the same for two cards of a kind: without the number in the process and the UUID. */
static bool same_kind(const rank_info *a, const rank_info *b) {
    const char *x = strchr(a->device, ':'), *y = strchr(b->device, ':');
    if (strcmp(a->backend, b->backend) != 0)
        return false;
    if (!x || !y)
        return strcmp(a->device, b->device) == 0;
    const char *end = strstr(x, ", GPU-");
    const size_t length = end ? (size_t)(end - x) : strlen(x);
    return strncmp(x, y, length) == 0;
}

static bool same_card(const rank_info *a, const rank_info *b) {
    const char *x = strchr(a->device, ':'), *y = strchr(b->device, ':');
    return x && y && strcmp(x, y) == 0;
}

static void note_devices(const check *c, const survey *s) {
    finding shared = {0};
    int other = 0, others = 0;
    for (int r = 0; r < s->ranks; r++) {
        if (!same_kind(&s->of[0], &s->of[r]) && others++ == 0)
            other = r;
        bool found = false;
        for (int q = s->at[s->host[r]].first; q < r && !found; q++)
            found = s->host[q] == s->host[r] && same_card(&s->of[q], &s->of[r]);
        if (found && shared.hosts++ == 0)
            snprintf(shared.first, sizeof shared.first,
                     "rank %d of %s has the card of another rank", r, s->of[r].host);
    }
    if (others)
        check_say(
            c,
            "note: %d rank%s not like rank 0, the first is rank %d of %s: %s %s; rank 0 has %s "
            "%s",
            others, others == 1 ? " is" : "s are", other, s->of[other].host, s->of[other].backend,
            s->of[other].device, s->of[0].backend, s->of[0].device);
    if (shared.hosts)
        check_say(c, "note: %s, %d in all; that is for tests, a rank wants one of its own",
                  shared.first, shared.hosts);
}

static void show(check *c, survey *s) {
    find_hosts(s);
    c->hosts = s->hosts;
    if (c->cmd.rank != 0)
        return;
    if (s->ranks <= WHOLE_TABLE)
        print_ranks(c, s);
    else
        print_hosts(c, s);
    note_cpus(c, s);
    note_devices(c, s);
}

muonshard_status check_ranks(check *c, const muonshard_optimizer *optimizer) {
    const size_t ranks = (size_t)c->cmd.size;
    const rank_info own = look_around(optimizer);
    survey s = {.ranks = c->cmd.size,
                .of = calloc(ranks, sizeof *s.of),
                .host = calloc(ranks, sizeof *s.host),
                .at = calloc(ranks, sizeof *s.at)};
    const bool memory = s.of && s.host && s.at;
    muonshard_status status =
        command_agree(&c->cmd, memory ? MUONSHARD_OK : MUONSHARD_ERR_MEMORY, "out of memory");
    if (status == MUONSHARD_OK)
        status = check_gather(c, &own, s.of, sizeof own);
    if (status == MUONSHARD_OK)
        show(c, &s);
    free(s.of);
    free(s.host);
    free(s.at);
    return status;
}
