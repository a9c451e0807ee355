/* check.h - what the parts of `muonshard check` share. Everything is seen through the public API,
 * as a program would. Only rank 0 prints and counts; every function here is collective unless it
 * says otherwise, and a status it returns has been told. */
#ifndef CHECK_H
#define CHECK_H

#include <stdbool.h>

#include "command.h"
#include "gpt_layers.h"
#include "machine.h"

typedef struct check {
    command cmd;
    bool strict;
    const char *machine_path; /* borrowed, or NULL: no expectations */
    machine machine;          /* rank 0's */
    double largest, side;     /* --largest, --side; 0: not given */
    bool dtype_given;         /* ns_dtype is among the keys given */
    bool opened;              /* the first optimizer was made, and ranks were shown */
    bool crowded;             /* a host has more ranks than CPUs: nobody is called slow */
    bool slow_links;          /* rank 0's: slower than the machine file says */
    int hosts;
    const gpt_layers *layers; /* the memory of the backend */
    gpt_layers *device;       /* own: these, where they are a device's */
    int problems, warnings;   /* rank 0's */
    muonshard_status worst;   /* of the first problem */
    char message[COMMAND_MESSAGE];
} check;

/* Local. A warning is of what is right, but slow. */
void check_say(const check *c, const char *format, ...) __attribute__((format(printf, 2, 3)));
void check_warn(check *c, const char *format, ...) __attribute__((format(printf, 2, 3)));
void check_problem(check *c, muonshard_status status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* Keys the check needs, over what was given: {key, value}, ends with NULL. Local, the same on all
 * ranks. */
muonshard_status check_set(check *c, const char *const (*keys)[2]);
/* recv [ranks, bytes] <- send [bytes] */
muonshard_status check_gather(check *c, const void *send, void *recv, size_t bytes);
/* values [count] become the largest over the ranks. */
muonshard_status check_largest(check *c, double *values, size_t count);
/* Local; sorts. */
double check_median(double *values, size_t count);

/* ---- ranks ---- */

/* Where the ranks are and what they compute with, and what is unusual about it. `optimizer` NULL:
 * it could not be made, and what is known without it is shown. */
muonshard_status check_ranks(check *c, const muonshard_optimizer *optimizer);

/* ---- a tensor and its optimizer ---- */

typedef struct check_tensor {
    muonshard_optimizer *optimizer; /* own */
    float *param, *grad;            /* own, memory of the backend, [count] */
    float *host;                    /* own, [count] */
    size_t count, slot;             /* elements; of an owner */
    int64_t bytes_pinned;
} check_tensor;

enum { CHECK_WARM_STEPS = 2, CHECK_TIMED_STEPS = 5 };

/* What one step took on this rank, seconds. */
typedef struct check_times {
    double reduce_scatter, all_gather, orthogonalize, whole;
    double flops; /* of Newton-Schulz */
} check_times;

/* Parameters are 0, this rank's gradient is that of check_values.h. Also shows the ranks when it is
 * the first. To be closed whatever came of it. */
muonshard_status check_tensor_open(check *c, check_tensor *t, muonshard_role role, int dims,
                                   const int64_t *shape);
muonshard_status check_tensor_step(check *c, check_tensor *t, const muonshard_step_args *args,
                                   check_times *times);
/* The parameters, to t->host. */
muonshard_status check_tensor_read(check *c, check_tensor *t);
/* How many steps are timed, after one that took so long. */
muonshard_status check_step_count(check *c, double seconds, int *count);
void check_tensor_close(check *c, check_tensor *t);

/* ---- what is checked ---- */

/* Reduce-scatter and all-gather over sizes: every element, times, bandwidths. */
muonshard_status check_tensors(check *c);
/* Matrices of Muon: the same on all ranks, orthogonal, how fast. */
muonshard_status check_matrices(check *c);

#endif
