/* machine.h - a machine as a file: how fast a rank computes, what memory it has, and the links that
 * join ranks, level by level. `muonshard bench --calibrate` writes one, a person with datasheets
 * can.
 *
 *   machine: h100
 *   origin: datasheet
 *   runs_on: cuda
 *   memory_gb: 80
 *   newton_schulz:
 *     - {dtype: bf16, gflop: 13.6, tflops: 160}     a launch of so many operations runs so fast
 *   links:
 *     - {name: nvlink, ranks: 8, gbs: 330, us: 1.5}
 *     - {name: rail, ranks: 16384, gbs: 47, us: 5}
 *
 * A link joins groups of the level before into groups of `ranks` ranks; gbs is what a rank can send
 * over it, and receive at the same time, when all do. */
#ifndef MACHINE_H
#define MACHINE_H

#include <muonshard.h>

/* Passes over memory, each with a rate of its own. */
typedef enum machine_pass {
    PASS_COPY,     /* pack, take, what is gathered to its place; read and write */
    PASS_SUM,      /* sums over ranks; reads and the write */
    PASS_MEASURE,  /* sums of squares; reads */
    PASS_MOMENTUM, /* gradient, momentum, U; reads and writes */
    PASS_APPLY,    /* U, parameters, masters; reads and writes */
    PASS_ADAM,     /* AdamW or Lion; reads and writes */
    PASS_COUNT
} machine_pass;

typedef struct machine_rate {
    int dtype;    /* 0 fp32, 1 tf32, 2 bf16, 3 fp16 */
    double flops; /* of a launch: a batch on a GPU, a matrix on the host */
    double rate;  /* operations a second */
} machine_rate;

typedef struct machine_link {
    char name[32];
    double ranks;
    double bandwidth; /* bytes a second of one rank, each way */
    double latency;   /* seconds a message */
} machine_link;

enum { MACHINE_LINKS = 8 };

typedef struct machine {
    muonshard_config *config; /* own; texts are its */
    const char *name, *source;
    int measured; /* or from datasheets */
    int on_gpu;
    int ring;      /* collectives go round a ring (NCCL), or from every rank to every other */
    int by_rank;   /* a rank's own thread moves the bytes, and does nothing else meanwhile */
    double memory; /* GB a rank; NaN: not known */
    double launch; /* microseconds an operation takes beside its work */
    double pass[PASS_COUNT]; /* GB/s */
    const char *rate_lines, *link_lines;
    machine_rate *rates; /* own */
    size_t rate_count;
    machine_link links[MACHINE_LINKS];
    size_t link_count;
} machine;

/* ERR_IO, ERR_CONFIG, ERR_MEMORY; `message` [COMMAND_MESSAGE] has file and line. */
muonshard_status machine_load(machine *m, const char *path, char *message);
void machine_free(machine *m);

/* Seconds of Newton-Schulz over `count` matrices of `flops` each; rates between those that are
 * known are interpolated, beyond the last ones they stay. NaN: no rate of this dtype is known. */
double machine_newton_schulz(const machine *m, int dtype, double flops, double count);
/* Seconds of a pass over `bytes`. */
double machine_pass_seconds(const machine *m, machine_pass pass, double bytes);

/* How long links carry a reduce-scatter or all-gather of `slot` bytes a rank over `ranks` ranks
 * that are `stride` ranks apart. */
typedef struct machine_transfer {
    double latency, bandwidth; /* seconds, of each what it costs */
    size_t slowest;            /* link that sets the bandwidth */
} machine_transfer;

/* Ring (NCCL): a piece passes ranks - 1 links one after the other, and the slowest level has to
 * pass all pieces; the ranks of a group that are together below it share its links. Else, by
 * exchange (MPI): a message to every other rank. `filled`: slots that have something in them.
 * `bytes` [link_count], unless NULL, grows by what a rank sends over each link. */
machine_transfer machine_collective(const machine *m, int ring, double ranks, double stride,
                                    double filled, double slot, double *bytes);

#endif
