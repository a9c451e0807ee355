/* bench_comm.c - reduce-scatter and all-gather over sizes, beside the MPI collective that does the
 * same. Bandwidths as nccl-tests has them: algbw = bytes / time, busbw = algbw (n-1)/n. */
#include <math.h>
#include <mpi.h>
#include <stdlib.h>
#include <string.h>

#include "bench.h"
#include "comm/comm.h"

typedef struct comm_case {
    bench *b;
    comm_kind kind;
    size_t slot;                   /* elements */
    float *whole, *scratch, *part; /* own, [ranks, slot], likewise, [slot] */
} comm_case;

static muonshard_status run_ours(void *user) {
    const comm_case *c = user;
    bench *b = c->b;
    const size_t bytes = c->slot * sizeof(float);
    const bool reduces = c->kind == COMM_REDUCE_SCATTER;
    const comm_part part = {.send = reduces ? c->whole : c->part,
                            .recv = reduces ? c->part : c->whole,
                            .scratch = c->scratch,
                            .bytes = bytes,
                            .dtype = MUONSHARD_FP32};
    const comm_request request = {.kind = c->kind,
                                  .parts = &part,
                                  .part_count = 1,
                                  .backend = b->host,
                                  .stream = STREAM_COMM};
    const muonshard_status status = comm_run(b->cmd->comm, &request);
    return status ? message_fail(b->message, status, "%s", b->cmd->comm->error.text) : MUONSHARD_OK;
}

static muonshard_status run_mpi(void *user) {
    const comm_case *c = user;
    const int count = (int)c->slot;
    const int code =
        c->kind == COMM_REDUCE_SCATTER
            ? MPI_Reduce_scatter_block(c->whole, c->part, count, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD)
            : MPI_Allgather(c->part, count, MPI_FLOAT, c->whole, count, MPI_FLOAT, MPI_COMM_WORLD);
    return code == MPI_SUCCESS
               ? MUONSHARD_OK
               : message_fail(c->b->message, MUONSHARD_ERR_COMM, "MPI error %d", code);
}

/* Small integers, so that sums are exact: of rank r, slot s, element i. */
static float value(size_t rank, size_t slot, size_t i) {
    return (float)((rank * 31 + slot * 17 + i * 7) % 1009);
}

static void fill(const comm_case *c) {
    const size_t ranks = (size_t)c->b->cmd->size, rank = (size_t)c->b->cmd->rank;
    for (size_t i = 0; i < c->slot; i++)
        c->part[i] = c->kind == COMM_REDUCE_SCATTER ? NAN : value(rank, rank, i);
    for (size_t s = 0; s < ranks; s++)
        for (size_t i = 0; i < c->slot; i++)
            c->whole[s * c->slot + i] =
                c->kind == COMM_REDUCE_SCATTER ? value(rank, s, i) : (float)NAN;
}

static double wrong_elements(const comm_case *c) {
    const size_t ranks = (size_t)c->b->cmd->size, rank = (size_t)c->b->cmd->rank;
    double wrong = 0.0;
    for (size_t i = 0; i < c->slot; i++) {
        float sum = 0.0F;
        for (size_t r = 0; r < ranks; r++) {
            sum += value(r, rank, i);
            if (c->kind == COMM_ALL_GATHER)
                wrong += c->whole[r * c->slot + i] != value(r, r, i);
        }
        wrong += c->kind == COMM_REDUCE_SCATTER && c->part[i] != sum;
    }
    return wrong;
}

static muonshard_status add_row(comm_case *c, bench_time ours, bench_time mpi, double wrong) {
    bench *b = c->b;
    const double ranks = b->cmd->size, bytes = ranks * (double)c->slot * sizeof(float);
    const double algbw = 1e-9 * bytes / ours.median, busbw = algbw * (ranks - 1.0) / ranks;
    const char *op = c->kind == COMM_REDUCE_SCATTER ? "reduce_scatter" : "all_gather";
    bench_print(b,
                "  %12.0f %12.0f  %-5s %-14s %11.1f %11.1f %11.1f %8.2f %8.2f %11.1f %7.2f %8s\n",
                bytes, bytes / sizeof(float), "fp32", op, 1e6 * ours.median, 1e6 * ours.min,
                1e6 * ours.max, algbw, busbw, 1e6 * mpi.median, mpi.median / ours.median,
                isnan(wrong)  ? "-"
                : wrong > 0.0 ? "WRONG"
                              : "0");
    return bench_add_row(
        b, json_pack("{s:s, s:o, s:s, s:o, s:o, s:o, s:o, s:o, s:o}", "op", op, "bytes",
                     bench_number(bytes), "dtype", "fp32", "time_us", bench_time_json(ours),
                     "algbw_gbs", bench_number(algbw), "busbw_gbs", bench_number(busbw), "mpi_us",
                     bench_time_json(mpi), "ratio", bench_number(mpi.median / ours.median), "wrong",
                     bench_number(wrong)));
}

static muonshard_status measure(comm_case *c) {
    bench *b = c->b;
    bench_time ours, mpi;
    double wrong = NAN;
    fill(c);
    TRY(bench_measure(b, run_ours, c, &ours));
    if (b->check)
        wrong = wrong_elements(c);
    TRY(bench_sum(b, &wrong));
    TRY(bench_measure(b, run_mpi, c, &mpi));
    return add_row(c, ours, mpi, wrong);
}

static muonshard_status run_size(bench *b, comm_kind kind, double bytes) {
    const size_t ranks = (size_t)b->cmd->size;
    comm_case c = {.b = b, .kind = kind, .slot = (size_t)(bytes / 4.0 / (double)ranks)};
    if (!c.slot || c.slot > INT32_MAX)
        return message_fail(b->message, MUONSHARD_ERR_ARGUMENT,
                            "%.0f bytes are not a slot of 1 to %d elements for each of %zu ranks",
                            bytes, INT32_MAX, ranks);
    c.whole = malloc(ranks * c.slot * sizeof(float));
    c.scratch = malloc(ranks * c.slot * sizeof(float));
    c.part = malloc(c.slot * sizeof(float));
    const muonshard_status memory =
        c.whole && c.scratch && c.part
            ? MUONSHARD_OK
            : message_fail(b->message, MUONSHARD_ERR_MEMORY, "out of memory");
    muonshard_status status = command_agree(b->cmd, memory, b->message);
    if (status == MUONSHARD_OK)
        status = measure(&c);
    free(c.whole);
    free(c.scratch);
    free(c.part);
    return status;
}

muonshard_status bench_comm(bench *b, const char *op) {
    const bool reduces = !op || strcmp(op, "reduce_scatter") == 0,
               gathers = !op || strcmp(op, "all_gather") == 0;
    if (!reduces && !gathers)
        return message_fail(b->message, MUONSHARD_ERR_ARGUMENT,
                            "--op is '%s'; reduce_scatter and all_gather can be measured", op);
    bench_print(b, "#\n# %12s %12s  %-5s %-14s %11s %11s %11s %8s %8s %11s %7s %8s\n", "size",
                "count", "type", "op", "time", "min", "max", "algbw", "busbw", "plain MPI", "ratio",
                "#wrong");
    bench_print(b, "# %12s %12s  %-5s %-14s %11s %11s %11s %8s %8s %11s\n", "(B)", "(elements)", "",
                "", "(us)", "(us)", "(us)", "(GB/s)", "(GB/s)", "(us)");
    const double begin = b->begin > 0.0 ? b->begin : 1 << 20;
    const double end = b->end > 0.0 ? b->end : b->begin > 0.0 ? b->begin : 1 << 26;
    for (int kind = 0; kind < 2; kind++)
        for (double bytes = begin; bytes <= end && (kind ? gathers : reduces);
             bytes = bench_next_size(b, bytes))
            TRY(run_size(b, kind ? COMM_ALL_GATHER : COMM_REDUCE_SCATTER, bytes));
    return MUONSHARD_OK;
}
