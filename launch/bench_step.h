/* bench_step.h - what `bench step` is made of beside the run itself: a model from a list of shapes,
 * what a device can do at best, and how near to it the passes over memory come. */
#ifndef BENCH_STEP_H
#define BENCH_STEP_H

#include "bench.h"
#include "optim/optimizer.h"

/* The model that b->shapes names, in b->model and in the config, as if a file had its tensors.
 * ERR_ARGUMENT, ERR_MEMORY. Local. */
muonshard_status bench_shapes_model(bench *b);

/* Of a device, on which all ranks are measured at the same time; NaN: there is none. */
typedef struct bench_device_ceilings {
    double copy_bytes;  /* a second, of a copy inside the device; read and written */
    double dense_flops; /* of the largest product of squares, operands in bf16 */
} bench_device_ceilings;

/* Of o's backend, whose memory is given back. Collective. */
muonshard_status bench_device_measure(bench *b, muonshard_optimizer *o,
                                      bench_device_ceilings *ceilings);

/* Bytes a second of the operations that pass over memory, by kind: those that simulate_work knows
 * of a step, over the time they took in `iterations` steps since op_seconds was `before`
 * [OP_KIND_COUNT]; the slowest rank counts. NaN: the kind has no bytes. Collective. */
muonshard_status bench_pass_rates(bench *b, muonshard_optimizer *o, const double *before,
                                  double rates[OP_KIND_COUNT]);
/* {"momentum": GB/s, ...} */
json_t *bench_pass_json(const double rates[OP_KIND_COUNT]);
/* One line; nothing without a device. */
void bench_pass_print(const bench *b, const double rates[OP_KIND_COUNT],
                      const bench_device_ceilings *ceilings);

#endif
