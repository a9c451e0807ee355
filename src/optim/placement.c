#define _GNU_SOURCE /* sched_getaffinity */
#include "optim/placement.h"

#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <xxhash.h>

typedef struct whereabouts {
    uint64_t machine;
    int64_t isa;
    cpu_set_t cores; /* all of them where the system has more than the set can hold */
} whereabouts;

/* A running kernel has a name of its own, which containers on it share as they share its cores. */
static uint64_t machine_of(const muonshard_comm *comm) {
    char id[64] = "";
    FILE *file = fopen("/proc/sys/kernel/random/boot_id", "r");
    if (!file || !fgets(id, sizeof id, file))
        snprintf(id, sizeof id, "%.63s", comm->host);
    if (file)
        fclose(file);
    return XXH3_64bits(id, strlen(id));
}

static whereabouts own(const muonshard_comm *comm) {
    whereabouts w;
    memset(&w, 0, sizeof w);
    w.machine = machine_of(comm);
    w.isa = host_isa_detect();
    if (sched_getaffinity(0, sizeof w.cores, &w.cores) != 0) {
        const long online = sysconf(_SC_NPROCESSORS_ONLN);
        for (long i = 0; i < online && i < CPU_SETSIZE; i++)
            CPU_SET((size_t)i, &w.cores);
    }
    return w;
}

static int first_number_in(const char *path, int otherwise) {
    FILE *file = fopen(path, "r");
    int number = otherwise;
    if (file && fscanf(file, "%d", &number) != 1)
        number = otherwise;
    if (file)
        fclose(file);
    return number;
}

/* Two hardware threads share the units that multiply: they count once. */
static int count_cores(const cpu_set_t *set) {
    int count = 0;
    for (int i = 0; i < CPU_SETSIZE; i++) {
        char path[96];
        if (!CPU_ISSET((size_t)i, set))
            continue;
        snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list",
                 i);
        const int first = first_number_in(path, i);
        count += first == i || first < 0 || first >= CPU_SETSIZE || !CPU_ISSET((size_t)first, set);
    }
    return count;
}

/* A container's share of time, in cores. */
static int time_share(int otherwise) {
    FILE *file = fopen("/sys/fs/cgroup/cpu.max", "r");
    long quota, period;
    if (file && fscanf(file, "%ld %ld", &quota, &period) == 2 && quota > 0 && period > 0 &&
        quota / period < otherwise)
        otherwise = (int)((quota + period - 1) / period);
    if (file)
        fclose(file);
    return otherwise;
}

muonshard_status placement_find(muonshard_comm *comm, placement *p, error_text *error) {
    const whereabouts here = own(comm);
    whereabouts *all = calloc((size_t)comm->size, sizeof *all);
    const muonshard_status memory =
        all ? MUONSHARD_OK : fail(error, MUONSHARD_ERR_MEMORY, "out of memory");
    muonshard_status status = comm_agree(comm, memory, error);
    if (status == MUONSHARD_OK) {
        status = comm_allgather(comm, &here, all, sizeof here);
        if (status)
            fail(error, status, "%s", comm->error.text);
    }
    *p = (placement){.cores = time_share(count_cores(&here.cores)), .isa = (host_isa)here.isa};
    for (int r = 0; status == MUONSHARD_OK && r < comm->size; r++) {
        cpu_set_t both;
        CPU_AND(&both, &here.cores, &all[r].cores);
        p->local_rank += r < comm->rank && all[r].machine == here.machine;
        p->sharing += all[r].machine == here.machine && CPU_COUNT(&both) > 0;
        p->isa = all[r].isa < (int64_t)p->isa ? (host_isa)all[r].isa : p->isa;
    }
    free(all);
    return status;
}

host_options placement_options(const placement *p, const settings *s) {
    const int share = p->cores / (p->sharing > 0 ? p->sharing : 1);
    return (host_options){.isa = s->instructions ? (host_isa)(s->instructions - 1) : p->isa,
                          .threads = s->threads  ? (int)s->threads
                                     : share > 0 ? share
                                                 : 1};
}
