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
    *p = (placement){.cores = CPU_COUNT(&here.cores), .isa = (host_isa)here.isa};
    for (int r = 0; status == MUONSHARD_OK && r < comm->size; r++) {
        cpu_set_t both;
        CPU_AND(&both, &here.cores, &all[r].cores);
        p->sharing += all[r].machine == here.machine && CPU_COUNT(&both) > 0;
        p->isa = all[r].isa < (int64_t)p->isa ? (host_isa)all[r].isa : p->isa;
    }
    free(all);
    return status;
}
