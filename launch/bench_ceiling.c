/* bench_ceiling.c - what this machine can do at best, measured in the same run. */
#include <cblas.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "bench.h"
#include "kernels/host_tile.h"

enum {
    ROUNDS = 5,       /* of which the best counts */
    TILE_DEPTH = 256, /* groups */
    TILE_RUNS = 4000, /* some milliseconds */
    BLAS_SIDE = 1024,
    ARRAY_BYTES = 128 << 20, /* beyond every cache */
};

typedef struct ceiling_job {
    const tile_kernel *kernel;
    float *a, *b, *c;
    size_t elements; /* of a, b, c */
    int threads;
} ceiling_job;

static void run_tiles(void *user, size_t index, int thread) {
    (void)index;
    (void)thread;
    const ceiling_job *j = user;
    _Alignas(64) uint32_t a[TILE_DEPTH * TILE_MAX_COLS], b[TILE_DEPTH * TILE_MAX_COLS];
    _Alignas(64) float tile[TILE_MAX_ROWS * TILE_MAX_COLS];
    memset(a, 0, sizeof a);
    memset(b, 0, sizeof b);
    memset(tile, 0, sizeof tile);
    for (int i = 0; i < TILE_RUNS; i++)
        j->kernel->multiply(TILE_DEPTH, a, b, (int)(j->kernel->panel / j->kernel->vector), tile);
}

/* A thread's part of the arrays. */
static size_t part(const ceiling_job *j, size_t index) {
    return j->elements / (size_t)j->threads * index;
}

static void run_triad(void *user, size_t index, int thread) {
    (void)thread;
    const ceiling_job *j = user;
    const float *restrict b = j->b, *restrict c = j->c;
    float *restrict a = j->a;
    for (size_t i = part(j, index); i < part(j, index + 1); i++)
        a[i] = b[i] + 3.0F * c[i];
}

static void run_memcpy(void *user, size_t index, int thread) {
    (void)thread;
    const ceiling_job *j = user;
    memcpy(j->a + part(j, index), j->b + part(j, index),
           (part(j, index + 1) - part(j, index)) * sizeof *j->a);
}

static void run_blas(void *user, size_t index, int thread) {
    (void)index;
    (void)thread;
    const ceiling_job *j = user;
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, BLAS_SIDE, BLAS_SIDE, BLAS_SIDE, 1.0F,
                j->a, BLAS_SIDE, j->b, BLAS_SIDE, 0.0F, j->c, BLAS_SIDE);
}

static double best_seconds(bench *b, host_task *task, ceiling_job *j, size_t count) {
    double best = INFINITY;
    for (int i = 0; i < ROUNDS; i++) {
        const double start = command_now_s();
        host_threads_run(host_of(b->host)->threads, task, j, count);
        best = fmin(best, command_now_s() - start);
    }
    return best;
}

static double tile_flops(bench *b, ceiling_job *j, bool bf16) {
    j->kernel = tile_kernel_for(host_of(b->host)->isa, bf16);
    const double steps = j->kernel->format == TILE_BF16_PAIRS ? 2.0 * TILE_DEPTH : TILE_DEPTH;
    const size_t threads = (size_t)j->threads;
    return 2.0 * steps * (double)(j->kernel->rows * j->kernel->panel * threads) * TILE_RUNS /
           best_seconds(b, run_tiles, j, threads);
}

muonshard_status bench_ceilings_measure(bench *b) {
    ceiling_job j = {.elements = ARRAY_BYTES / sizeof(float), .threads = b->host->threads};
    const size_t threads = (size_t)j.threads;
    muonshard_status status = MUONSHARD_OK;
    j.a = malloc(ARRAY_BYTES);
    j.b = malloc(ARRAY_BYTES);
    j.c = malloc(ARRAY_BYTES);
    if (!j.a || !j.b || !j.c) {
        status = message_fail(b->message, MUONSHARD_ERR_MEMORY, "out of memory");
        goto done;
    }
    memset(j.a, 0, ARRAY_BYTES);
    memset(j.b, 0, ARRAY_BYTES);
    memset(j.c, 0, ARRAY_BYTES);
    TRY_GOTO(bench_barrier(b), done);
    const double elements = (double)(part(&j, threads));
    b->ceilings = (bench_ceilings){
        .fp32_flops = tile_flops(b, &j, false),
        .bf16_flops = tile_flops(b, &j, true),
        .triad_bytes = 12.0 * elements / best_seconds(b, run_triad, &j, threads),
        .memcpy_bytes = 8.0 * elements / best_seconds(b, run_memcpy, &j, threads),
    };
    openblas_set_num_threads(j.threads);
    b->ceilings.blas_flops = 2.0 * pow(BLAS_SIDE, 3.0) / best_seconds(b, run_blas, &j, 1);
done:
    free(j.a);
    free(j.b);
    free(j.c);
    return status;
}
