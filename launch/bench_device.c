/* bench_device.c - what a device can do at best, measured in the same run: a copy inside its memory
 * and a product of two large dense squares with operands in 16 bits. */
#include <math.h>
#include <stdlib.h>

#include "bench_step.h"

enum {
    DEFAULT_BYTES = 256 << 20, /* of an array: beyond every cache */
    LEAST_BYTES = 64 << 10,
    COPIES = 8,
    FEW_PRODUCTS = 2, /* what comes before and after them is in both */
    MANY_PRODUCTS = 6,
    MOST_SIDE = 8192,
    RUNS = 7 /* of which the best counts */
};

typedef struct device_probe {
    bench *b;
    backend *memory; /* the device's */
    void *from, *to; /* own, backend's, [bytes] */
    size_t bytes;
    int64_t side;
    ns_program program;
    void *workspace; /* own, backend's */
} device_probe;

static muonshard_status failed(const device_probe *p, muonshard_status status) {
    return status ? message_fail(p->b->message, status, "%s", p->memory->error.text) : MUONSHARD_OK;
}

/* Waits for the device: a copy to the host does. */
static muonshard_status settle(const device_probe *p) {
    float value;
    const copy_item item = {&value, p->to, sizeof value};
    return failed(p, p->memory->ops->copy(p->memory, &item, 1, STREAM_COMPUTE));
}

static muonshard_status run_copies(void *user) {
    const device_probe *p = user;
    const copy_item item = {p->to, p->from, p->bytes};
    for (int i = 0; i < COPIES; i++)
        TRY(failed(p, p->memory->ops->copy(p->memory, &item, 1, STREAM_COMPUTE)));
    return settle(p);
}

/* X / F(X); A = X X^T; then A times X and so on, of which no half can be left out. Singular values
 * of a random square go up to 2 / sqrt(side): with 0.25 side A's largest is 1, so that numbers
 * neither vanish nor overflow. (Zeros would cost less power, and flatter the clock.) */
static void make_products(device_probe *p, int count) {
    ns_program *program = &p->program;
    *program = (ns_program){.dtype = NS_BF16, .square_dtype = NS_BF16, .squares = 1};
    program->code[program->count++] = (ns_instruction){.kind = NS_NORMALIZE,
                                                       .dst = NS_X,
                                                       .a = NS_NONE,
                                                       .b = NS_NONE,
                                                       .c = NS_NONE,
                                                       .norm = NS_NORM_FROBENIUS_MAX,
                                                       .eps = 1e-7};
    program->code[program->count++] = (ns_instruction){.kind = NS_SYMMETRIC_PRODUCT,
                                                       .dst = NS_A,
                                                       .a = NS_X,
                                                       .b = NS_NONE,
                                                       .c = NS_NONE,
                                                       .alpha = 0.25F * (float)p->side};
    for (int i = 0; i < count; i++)
        program->code[program->count++] = (ns_instruction){.kind = NS_PRODUCT,
                                                           .dst = i % 2 ? NS_X : NS_Y,
                                                           .a = NS_A,
                                                           .b = i % 2 ? NS_Y : NS_X,
                                                           .c = NS_NONE,
                                                           .alpha = 1.0F};
    program->result = count % 2 ? NS_Y : NS_X;
}

static muonshard_status run_products(void *user) {
    const device_probe *p = user;
    const orthogonalize_item item = {.u = p->from, .out = p->to};
    TRY(failed(p, p->memory->ops->orthogonalize(p->memory, NULL, &p->program, p->side, p->side,
                                                &item, 1, p->workspace)));
    return settle(p);
}

static muonshard_status measure_products(device_probe *p, double *flops) {
    bench_time few, many;
    make_products(p, MANY_PRODUCTS);
    TRY(bench_measure(p->b, run_products, p, &many));
    make_products(p, FEW_PRODUCTS);
    TRY(bench_measure(p->b, run_products, p, &few));
    if (many.min > few.min)
        *flops =
            (MANY_PRODUCTS - FEW_PRODUCTS) * 2.0 * pow((double)p->side, 3.0) / (many.min - few.min);
    return MUONSHARD_OK;
}

static muonshard_status fill(device_probe *p) {
    float *numbers = malloc(p->bytes);
    if (!numbers)
        return message_fail(p->b->message, MUONSHARD_ERR_MEMORY, "out of memory");
    uint64_t state = 1;
    bench_normal(numbers, p->bytes / sizeof *numbers, &state);
    const copy_item item = {p->from, numbers, p->bytes};
    const muonshard_status status =
        failed(p, p->memory->ops->copy(p->memory, &item, 1, STREAM_COMPUTE));
    free(numbers);
    return status;
}

static muonshard_status measure(device_probe *p, bench_device_ceilings *ceilings) {
    bench_time time;
    TRY(bench_measure(p->b, run_copies, p, &time));
    ceilings->copy_bytes = COPIES * 2.0 * (double)p->bytes / time.min;
    return measure_products(p, &ceilings->dense_flops);
}

muonshard_status bench_device_measure(bench *b, muonshard_optimizer *o,
                                      bench_device_ceilings *ceilings) {
    *ceilings = (bench_device_ceilings){NAN, NAN};
    if (!o->backend->streams)
        return MUONSHARD_OK;
    const double bytes = fmax(b->end > 0.0 ? b->end : DEFAULT_BYTES, LEAST_BYTES);
    device_probe p = {.b = b, .memory = o->backend, .bytes = (size_t)bytes / 4 * 4, .side = 1};
    while (p.side < MOST_SIDE && (size_t)(4 * p.side * p.side) * sizeof(float) <= p.bytes)
        p.side *= 2;
    const int iterations = b->iterations, warmup = b->warmup;
    b->iterations = iterations < RUNS ? iterations : RUNS;
    b->warmup = 1;
    muonshard_status status = failed(&p, p.memory->ops->alloc(p.memory, &p.from, p.bytes));
    if (status == MUONSHARD_OK)
        status = failed(&p, p.memory->ops->alloc(p.memory, &p.to, p.bytes));
    make_products(&p, MANY_PRODUCTS);
    if (status == MUONSHARD_OK)
        status = failed(&p, p.memory->ops->alloc(p.memory, &p.workspace,
                                                 p.memory->ops->orthogonalize_workspace(
                                                     p.memory, &p.program, p.side, p.side, 1)));
    if (status == MUONSHARD_OK)
        status = fill(&p);
    status = command_agree(b->cmd, status, b->message);
    if (status == MUONSHARD_OK)
        status = measure(&p, ceilings);
    void *memory[] = {p.from, p.to, p.workspace};
    for (size_t i = 0; i < sizeof memory / sizeof *memory; i++)
        if (memory[i])
            p.memory->ops->free(p.memory, memory[i]);
    b->iterations = iterations;
    b->warmup = warmup;
    return status;
}
