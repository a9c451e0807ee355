/* simulate.h - the schedule on a machine that isn't there: walks the array the executor walks, with
 * rates and links in the place of the machine, for every rank. */
#ifndef SIMULATE_H
#define SIMULATE_H

#include "machine.h"
#include "optim/schedule.h"

/* An optimizer: a data-parallel group of plan.world_size ranks that are `stride` ranks apart. */
typedef struct sim_group {
    const registry *registry;
    const settings *settings;
    const plan *plan;
    const schedule *schedule;
    double stride;
} sim_group;

/* Beside the machine. */
typedef struct sim_options {
    double backward;           /* seconds, during which gradients become ready, last tensor first */
    double bandwidth, latency; /* of a link all collectives take turns on, as of `bench step
                                  --link`; 0 bandwidth: none */
} sim_options;

/* What a step takes, seconds. */
typedef struct sim_phases {
    double pack, reduce_scatter, agree, momentum, orthogonalize, elementwise, all_gather, apply;
} sim_phases;

typedef struct sim_span {
    double begin, end;
} sim_span;

typedef struct simulation {
    double step;                 /* of the slowest rank, backward included */
    sim_phases phases;           /* the longest over the ranks; communication: what is waited for */
    double rs_busy, ag_busy;     /* links under way with reduce-scatters, all-gathers */
    double rs_bytes, ag_bytes;   /* of all slots that travel, times (n-1)/n */
    double latency, bandwidth;   /* of these: what messages cost, what bytes cost */
    size_t slowest;              /* link that costs most of the bytes' time */
    double bytes[MACHINE_LINKS]; /* a rank sends over each link */
    double ns_flops;             /* of the rank that has most */
    double matrices;             /* likewise */
    sim_span *spans;             /* own, [schedule.count], of rank 0 */
} simulation;

/* ERR_CONFIG: the machine's links join fewer ranks, or it has no rate of a dtype; ERR_MEMORY. */
muonshard_status simulate(const machine *m, const sim_group *group, const sim_options *options,
                          simulation *out, char *message);
void simulation_free(simulation *s);

/* What operation `op` does on a rank that owns `owned` matrices of its batch, so that a machine can
 * be calibrated by what is measured. Bytes of a pass; operations of Newton-Schulz. */
typedef struct sim_work {
    machine_pass pass;
    double bytes;
    double flops, matrices; /* of one; how many */
    int dtype;
} sim_work;
muonshard_status simulate_work(const sim_group *group, size_t op, size_t owned, sim_work *work,
                               error_text *error);

/* What a collective moves: bytes a rank sends to each other, how many slots have something in them,
 * whether it is summed by the ranks' own processors. */
typedef struct sim_traffic {
    double slot,
        filled; /* bytes of a slot, of all parts; slots, as if all parts were of one size */
    bool ring, sums;
} sim_traffic;
sim_traffic simulate_traffic(const machine *m, const sim_group *group, size_t op);

#endif
