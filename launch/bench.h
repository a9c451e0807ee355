/* bench.h - what the benchmarks share: options, timing over ranks, ceilings of this machine, the
 * JSON they leave. Conventions are those of nccl-tests: warm-up, several timed runs of which the
 * slowest rank counts, algorithm and bus bandwidth, #wrong. */
#ifndef BENCH_H
#define BENCH_H

#include <jansson.h>

#include "command.h"
#include "kernels/host.h"
#include "message.h"
#include "model_file.h"
#include "settings.h"

#define BENCH_SCHEMA 2

/* Seconds. */
typedef struct bench_time {
    double median, min, max;
} bench_time;

/* Of one rank with all its threads; all ranks are measured at the same time. NaN: not measured. */
typedef struct bench_ceilings {
    double fp32_flops, bf16_flops; /* of the innermost loop on what is in the first cache */
    double blas_flops;             /* OpenBLAS's sgemm with as many threads */
    double triad_bytes;            /* a = b + s c, 12 bytes an element (STREAM) */
    double memcpy_bytes;           /* read and written */
} bench_ceilings;

typedef struct bench {
    command *cmd;
    const settings *settings;
    backend *host;                           /* own */
    model_file *model;                       /* step */
    const char *model_path;                  /* or NULL, where `shapes` are the model */
    const char *shapes, *dtype, *grad_dtype; /* borrowed, or NULL */
    int64_t layers;                          /* of the model that are measured; 0: all */
    const char *kind;
    int iterations, warmup;
    bool check;
    bool weak;                       /* step: every tensor as often as there are ranks */
    double begin, end, factor, step; /* -b, -e, -f, -i; 0: not given */
    bench_ceilings ceilings;
    double *seconds; /* own, [iterations] */
    json_t *rows;    /* own */
    char message[COMMAND_MESSAGE];
} bench;

/* One timed run. */
typedef muonshard_status bench_run(void *user);

/* Runs warm-up and iterations, each after a barrier; of each the slowest rank counts. Collective.
 */
muonshard_status bench_measure(bench *b, bench_run *run, void *user, bench_time *time);
/* Of seconds[count], which get sorted, and of each the slowest rank. Collective. */
muonshard_status bench_time_of(bench *b, double *seconds, size_t count, bench_time *time);
/* All-gathers one byte. */
muonshard_status bench_barrier(bench *b);
/* *value becomes its sum over the ranks. Collective. */
muonshard_status bench_sum(bench *b, double *value);
/* The next size of a sweep after `size`. */
double bench_next_size(const bench *b, double size);
muonshard_status bench_ceilings_measure(bench *b);

/* Nearly normal, of mean 0 and deviation 1: the sum of four uniform numbers. `state` goes on. */
void bench_normal(float *numbers, size_t count, uint64_t *state);

/* Of --shapes. count 0: not said. */
typedef struct bench_shape {
    size_t rows, cols, count;
} bench_shape;
/* "768x3072x24" at *at, which moves behind it and a comma. ERR_ARGUMENT. */
muonshard_status bench_read_shape(bench *b, const char **at, bench_shape *s);

/* *wrong: how many elements of U [rows, cols] are further from Newton-Schulz of g [rows, cols] in
 * fp64 than the rounding of `dtype` explains. `of_any_length`: only the direction of U is known.
 * NaN: not known for the norm that is set. */
muonshard_status bench_compare(bench *b, const float *g, const float *u, size_t rows, size_t cols,
                               ns_dtype dtype, bool of_any_length, double *wrong);

/* Only rank 0 prints. */
void bench_print(const bench *b, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* {"median":, "min":, "max":} in microseconds. */
json_t *bench_time_json(bench_time time);
/* A number, or null where it is not finite. */
json_t *bench_number(double value);
/* Takes `row` over. */
muonshard_status bench_add_row(bench *b, json_t *row);

/* "10,5": GB/s and microseconds; "250": milliseconds. NULL: nothing, 0. ERR_ARGUMENT. */
muonshard_status bench_read_link(const char *text, double *bandwidth, double *latency,
                                 char *message);
muonshard_status bench_read_backward(const char *text, double *seconds, char *message);

/* The kinds. Collective; rows and tables as they come. */
muonshard_status bench_ns(bench *b, const char *shapes);
muonshard_status bench_comm(bench *b, const char *op);
muonshard_status bench_step(bench *b, const char *backward, const char *link);
/* Writes a machine file. */
muonshard_status bench_calibrate(bench *b, const char *path);

/* When, and by what version: of the JSON. */
void bench_stamp(char date[32], char version[32]);
/* The processor's name. */
void bench_processor(char *name, size_t size);

#endif
