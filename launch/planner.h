/* planner.h - a model at a number of ranks: the plans of its groups, what they take of a rank's
 * memory, and what a step takes on a machine. */
#ifndef PLANNER_H
#define PLANNER_H

#include "machine.h"
#include "model_file.h"
#include "optim/memory.h"
#include "simulate.h"

typedef struct planner {
    muonshard_config *config;
    const settings *settings; /* of config */
    model_file model;
    const char *path;            /* of the model file */
    registry whole;              /* all of the model */
    registry parts[MODEL_PARTS]; /* as a rank of the group holds it */
    machine machine;             /* config is NULL: none is given */
    backend *host;               /* own: asked for workspaces */
    sim_options options;
    bool on_gpu;
} planner;

/* Bytes of a rank. */
typedef struct plan_memory {
    double parameters, gradients, state, workspace, pinned;
    double staging; /* of the host, once a checkpoint is saved */
} plan_memory;

static inline double plan_memory_total(const plan_memory *m) {
    return m->parameters + m->gradients + m->state + m->workspace;
}

/* One group at a number of ranks. */
typedef struct group_plan {
    bool there; /* the part has tensors */
    plan plan;
    schedule schedule;
    double stride;
    simulation sim; /* where there is a machine */
} group_plan;

/* Largest / mean cost of Newton-Schulz over the ranks, of all groups together: by both policies,
 * and what no assignment of whole matrices can be below. */
typedef struct plan_imbalance {
    double turns, balanced, bound;
} plan_imbalance;

typedef struct rank_plan {
    int ranks;
    group_plan groups[MODEL_PARTS];
    plan_memory memory;
    plan_imbalance imbalance;
    double step; /* seconds, of both groups one after the other; 0 without a machine */
} rank_plan;

muonshard_status planner_open(planner *p, const char *path, const char *machine_path,
                              const command_args *args, char *message);
void planner_close(planner *p);

/* Ranks have to be a multiple of it. */
int planner_unit(const planner *p);
/* ERR_ARGUMENT: `ranks` is no multiple of planner_unit. */
muonshard_status planner_plan(const planner *p, int ranks, rank_plan *r, char *message);
void planner_free(rank_plan *r);
/* Only memory. */
muonshard_status planner_memory(const planner *p, int ranks, plan_memory *memory, char *message);

/* planner_words.c: what of it a person should know, in sentences, each on a line "# ...".
 * `plans` [count], in the order of ranks. */
muonshard_status planner_advise(const planner *p, const rank_plan *plans, size_t count,
                                char *message);

#endif
