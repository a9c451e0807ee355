/* ranks_fixture.h - a step rig a rank, the ranks being threads, and what came of them for the main
 * thread to assert. */
#ifndef RANKS_FIXTURE_H
#define RANKS_FIXTURE_H

#include "comm_threads.h"
#include "step_rig.h"

enum { MAX_RANKS = 4 };

typedef struct outcome {
    const rig_case *setup[MAX_RANKS];             /* [0] where a rank has none of its own */
    void (*between)(rig *r, struct outcome *out); /* in place of plain steps */
    uint64_t digest[MAX_RANKS];
    muonshard_status status[MAX_RANKS];
    char message[MAX_RANKS][1024];
    muonshard_step_result_info result[MAX_RANKS];
    float *kept[RIG_MAX_TENSORS]; /* rank 0's final parameters, own */
    bool keep;
    double number[MAX_RANKS];
} outcome;

/* For threads_run; `arg` is an outcome. */
void ranks_run(muonshard_comm *comm, void *arg);
/* The digest all ranks have in common. */
uint64_t digest_at(int ranks, const rig_case *setup);
/* Of long tables all but every `apart`-th row, where every access is looked at (sanitizers) and on
 * a device that isn't there. */
bool row_left_out(size_t which, size_t apart);
/* 1, or `apart` under sanitizers. */
size_t rows_apart(size_t apart);
/* Three steps of the zoo. */
rig_case zoo_case(const char *yaml);

#endif
