/* bench_calibrate.c - `muonshard bench --calibrate FILE`: the rates of this machine's backend and
 * links, one operation at a time on all ranks at once, as a machine file for `muonshard plan`. Of
 * several runs the best counts: what else is on the machine only takes away. */
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "bench.h"
#include "machine.h"
#include "optim/newton_schulz.h"
#include "optim/optimizer.h"

enum {
    DEFAULT_BYTES = 32 << 20, /* of an array: beyond caches, or nearly */
    LEAST_BYTES = 64 << 10,
    ARRAYS = 4,
    MOST_RATES = 64,
    MOST_SIZES = 8
};

typedef struct calibration {
    bench *b;
    muonshard_optimizer *o;  /* own: for its backend and communicator */
    backend *memory;         /* of o */
    size_t elements;         /* of an array; of a pass */
    float *array[ARRAYS];    /* own, backend's, [elements] */
    step_record *record;     /* own, backend's: no skip */
    tensor_values *values;   /* own, backend's, [1] */
    uint8_t *active;         /* own, backend's, [1] */
    double *sum;             /* own, backend's, [1] */
    double pass[PASS_COUNT]; /* bytes a second */
    machine_rate rates[MOST_RATES];
    size_t rate_count;
    double launch; /* seconds */
    machine_link link;
} calibration;

/* What is timed at the moment. */
typedef struct probe {
    calibration *c;
    int pass;            /* machine_pass, or -1 */
    size_t elements;     /* of a pass */
    ns_program *program; /* Newton-Schulz */
    int64_t m, n;
    size_t count;
    orthogonalize_item *items; /* [count] */
    void *workspace;
    comm_kind kind; /* a collective of `slot` bytes */
    size_t slot;
} probe;

static muonshard_status failed(const calibration *c, muonshard_status status) {
    return status ? message_fail(c->b->message, status, "%s", c->memory->error.text) : MUONSHARD_OK;
}

/* Waits for the backend's stream. */
static muonshard_status settle(const calibration *c, backend_stream stream) {
    double value;
    const copy_item item = {&value, c->sum, sizeof value};
    return c->memory->streams ? failed(c, c->memory->ops->copy(c->memory, &item, 1, stream))
                              : MUONSHARD_OK;
}

/* ---- passes ---- */

/* A pass over [count] elements, and the bytes it moves: those of simulate_work. */
static double pass_bytes(int pass, size_t count) {
    static const double each[PASS_COUNT] = {8.0, 12.0, 4.0, 16.0, 12.0, 28.0};
    return each[pass] * (double)count;
}

static muonshard_status run_pass(void *user) {
    const probe *p = user;
    calibration *c = p->c;
    backend *m = c->memory;
    float **a = c->array;
    const kernel_context context = {.record = c->record, .values = c->values, .active = c->active};
    const size_t count = p->elements;
    muonshard_status status = MUONSHARD_OK;
    switch ((machine_pass)p->pass) {
    case PASS_COPY: {
        const convert_item item = {.dst = a[0], .src = a[1], .count = count};
        status = m->ops->convert(m, NULL, &item, 1, STREAM_COMPUTE);
        break;
    }
    case PASS_SUM: {
        const sum_ranks_args args = {
            .dst = a[0], .received = a[1], .own = a[2], .ranks = 2, .count = count / 2};
        status = m->ops->sum_ranks(m, &args, STREAM_COMPUTE);
        break;
    }
    case PASS_MEASURE: {
        const sum_squares_item item = {a[0], count, c->sum};
        status = m->ops->sum_squares(m, &item, 1);
        break;
    }
    case PASS_MOMENTUM: {
        const momentum_args args = {.form = MOMENTUM_EMA, .nesterov = true};
        const momentum_item item = {.g_u = a[0], .momentum = a[1], .count = count};
        status = m->ops->momentum(m, &context, &args, &item, 1);
        break;
    }
    case PASS_APPLY: {
        const apply_args args = {.decay = DECAY_DECOUPLED};
        const apply_item item = {
            .w = a[0], .u = a[1], .rows = 1024, .cols = (int64_t)count / 1024, .scale = 1.0};
        status = m->ops->apply(m, &context, &args, &item, 1);
        break;
    }
    default: {
        const adam_args args = {.beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8};
        const adam_item item = {.w = a[0], .g = a[1], .m = a[2], .v = a[3], .count = count};
        status = m->ops->adam(m, &context, &args, &item, 1);
    }
    }
    return status ? failed(c, status) : settle(c, STREAM_COMPUTE);
}

static muonshard_status measure_passes(calibration *c) {
    for (int pass = 0; pass < PASS_COUNT; pass++) {
        probe p = {.c = c, .pass = pass, .elements = c->elements};
        bench_time all, few;
        TRY(bench_measure(c->b, run_pass, &p, &all));
        p.elements = 1024;
        TRY(bench_measure(c->b, run_pass, &p, &few));
        /* Of sums, two arrays of half the elements are read and one written. */
        const double bytes =
            pass == PASS_SUM ? 6.0 * (double)c->elements : pass_bytes(pass, c->elements);
        c->pass[pass] = bytes / fmax(all.min - few.min, 1e-9);
        c->launch = pass == 0 || few.min < c->launch ? few.min : c->launch;
    }
    return MUONSHARD_OK;
}

/* ---- Newton-Schulz ---- */

static muonshard_status run_newton_schulz(void *user) {
    const probe *p = user;
    calibration *c = p->c;
    const size_t at_once = backend_at_once(c->memory, p->count);
    for (size_t i = 0; i < p->count; i += at_once)
        TRY(failed(c, c->memory->ops->orthogonalize(
                          c->memory, NULL, p->program, p->m, p->n, p->items + i,
                          p->count - i < at_once ? p->count - i : at_once, p->workspace)));
    return settle(c, STREAM_COMPUTE);
}

/* Matrices of the four arrays by turns: what is in them is of no account. */
static muonshard_status measure_shape(calibration *c, int dtype, int64_t m, int64_t n,
                                      size_t count) {
    settings s = *c->b->settings;
    error_text error;
    ns_program program;
    probe p = {.c = c, .program = &program, .m = m, .n = n, .count = count};
    s.ns_dtype = dtype;
    s.ns_form = NS_FORM_STANDARD;
    s.coefficient_check = 1;
    muonshard_status status =
        newton_schulz_compile(&s, MUONSHARD_FP32, false, m, n, &program, &error);
    if (status)
        return message_fail(c->b->message, status, "%s", error.text);
    const size_t bytes = c->memory->ops->orthogonalize_workspace(c->memory, &program, m, n,
                                                                 backend_at_once(c->memory, count));
    p.items = calloc(count, sizeof *p.items);
    if (!p.items)
        return message_fail(c->b->message, MUONSHARD_ERR_MEMORY, "out of memory");
    const size_t elements = (size_t)(m * n), fit = c->elements / elements;
    for (size_t i = 0; i < count; i++) {
        float *at = c->array[i / fit % ARRAYS] + i % fit * elements;
        p.items[i] = (orthogonalize_item){.u = at, .out = at};
    }
    bench_time time;
    status = failed(c, c->memory->ops->alloc(c->memory, &p.workspace, bytes));
    if (status == MUONSHARD_OK)
        status = bench_measure(c->b, run_newton_schulz, &p, &time);
    if (status == MUONSHARD_OK) {
        const double flops = ns_program_flops(&program, m, n);
        const double one = c->memory->ops->batched ? flops * (double)count : flops;
        c->rates[c->rate_count++] = (machine_rate){dtype, one, flops * (double)count / time.min};
    }
    if (p.workspace)
        c->memory->ops->free(c->memory, p.workspace);
    free(p.items);
    return status;
}

/* The host computes a matrix a thread, a GPU a batch at a time. */
static muonshard_status measure_rates(calibration *c) {
    const bool gpu = c->memory->ops->batched;
    static const int64_t sides[] = {32, 64, 128, 256, 512, 768, 1024, 2048};
    static const int on_host[] = {NS_DTYPE_FP32, NS_DTYPE_BF16, NS_DTYPE_FP16};
    static const int on_gpu[] = {NS_DTYPE_FP32, NS_DTYPE_TF32, NS_DTYPE_BF16, NS_DTYPE_FP16};
    const size_t dtypes = gpu ? 4 : 3, most = gpu ? 8 : 6;
    const size_t threads = (size_t)c->memory->threads;
    for (size_t d = 0; d < dtypes; d++)
        for (size_t i = 0; i < most && c->rate_count < MOST_RATES; i++) {
            /* Small ones many times over, or a clock's tick is seen. */
            const size_t count =
                gpu ? (sides[i] < 1024 ? 16 : 1) : threads * (sides[i] < 128 ? 8 : 1);
            if ((size_t)(sides[i] * sides[i]) <= c->elements)
                TRY(measure_shape(c, gpu ? on_gpu[d] : on_host[d], sides[i], sides[i], count));
        }
    return MUONSHARD_OK;
}

/* ---- links ---- */

static muonshard_status run_collective(void *user) {
    const probe *p = user;
    calibration *c = p->c;
    const bool reduces = p->kind == COMM_REDUCE_SCATTER;
    const comm_part part = {.send = reduces ? c->array[0] : c->array[1],
                            .recv = reduces ? c->array[1] : c->array[0],
                            .scratch = c->array[2],
                            .bytes = p->slot,
                            .dtype = MUONSHARD_FP32};
    const comm_request request = {.kind = p->kind,
                                  .parts = &part,
                                  .part_count = 1,
                                  .backend = c->memory,
                                  .stream = STREAM_COMM};
    const muonshard_status status = comm_run(c->o->data, &request);
    return status ? message_fail(c->b->message, status, "%s", c->o->data->error.text)
                  : settle(c, STREAM_COMM);
}

/* T = alpha x + beta y by least squares of relative errors. */
static void fit(const double *x, const double *y, const double *seconds, size_t count,
                double *alpha, double *beta) {
    double xx = 0.0, xy = 0.0, yy = 0.0, x1 = 0.0, y1 = 0.0;
    for (size_t i = 0; i < count; i++) {
        const double u = x[i] / seconds[i], v = y[i] / seconds[i];
        xx += u * u;
        xy += u * v;
        yy += v * v;
        x1 += u;
        y1 += v;
    }
    const double det = xx * yy - xy * xy;
    *alpha = det > 0.0 ? (x1 * yy - y1 * xy) / det : 0.0;
    *beta = det > 0.0 ? (y1 * xx - x1 * xy) / det : 0.0;
    if (!(*alpha >= 0.0)) {
        *alpha = 0.0;
        *beta = y1 / yy;
    }
    if (!(*beta > 0.0))
        *beta = 1e-15;
}

/* One level joins all the ranks there are: what is between hosts is not told from what is inside.
 */
static muonshard_status measure_link(calibration *c) {
    const double ranks = c->b->cmd->size;
    double messages[MOST_SIZES], bytes[MOST_SIZES], seconds[MOST_SIZES];
    size_t count = 0;
    machine one = {.ring = c->memory->streams && c->o->data->ops->on_stream, .link_count = 1};
    one.links[0] = (machine_link){.ranks = ranks, .bandwidth = 1.0, .latency = 1.0};
    if (c->b->cmd->size < 2)
        return MUONSHARD_OK;
    for (size_t slot = 4096;
         slot * (size_t)ranks <= sizeof(float) * c->elements && count < MOST_SIZES; slot *= 4) {
        probe p = {.c = c, .kind = COMM_ALL_GATHER, .slot = slot};
        bench_time time;
        TRY(bench_measure(c->b, run_collective, &p, &time));
        /* A rank's own slot is copied on the host, and that is counted as a copy. */
        const double own = c->memory->streams ? 0.0 : 2.0 * (double)slot / c->pass[PASS_COPY];
        const machine_transfer t =
            machine_collective(&one, one.ring, ranks, 1.0, ranks, (double)slot, NULL);
        messages[count] = t.latency;
        bytes[count] = t.bandwidth;
        seconds[count++] = fmax(time.min - own, 0.1 * time.min);
    }
    double alpha, beta;
    fit(messages, bytes, seconds, count, &alpha, &beta);
    c->link = (machine_link){.ranks = ranks, .bandwidth = 1.0 / beta, .latency = alpha};
    snprintf(c->link.name, sizeof c->link.name, "%s", c->o->data->ops->name);
    return MUONSHARD_OK;
}

/* ---- the file ---- */

static muonshard_status write_machine(const calibration *c, const char *path) {
    static const char *const dtypes[] = {"fp32", "tf32", "bf16", "fp16"};
    static const char *const passes[PASS_COUNT] = {"copy",     "sum",   "measure",
                                                   "momentum", "apply", "adam"};
    char host[64] = "", date[32], processor[128];
    const time_t now = time(NULL);
    struct tm utc;
    FILE *file = fopen(path, "w");
    if (!file)
        return message_fail(c->b->message, MUONSHARD_ERR_IO, "%s: %s", path, strerror(errno));
    gethostname(host, sizeof host - 1);
    gmtime_r(&now, &utc);
    strftime(date, sizeof date, "%Y-%m-%d", &utc);
    bench_processor(processor, sizeof processor);
    const bool gpu = c->memory->streams != NULL;
    fprintf(file, "# Written by muonshard bench --calibrate with %d ranks of %d threads.\n",
            c->b->cmd->size, c->memory->threads);
    fprintf(file, "machine: \"%s\"\norigin: measured\nsource: \"%s, %d ranks, %s\"\n", host,
            gpu ? c->memory->device_text : processor, c->b->cmd->size, date);
    fprintf(file, "runs_on: %s\ncollectives: %s\nmoved_by: %s\nlaunch_us: %.3f\n",
            gpu ? "cuda" : "host", gpu && c->o->data->ops->on_stream ? "ring" : "exchange",
            gpu ? "network" : "rank", 1e6 * c->launch);
    const double pages = (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGESIZE);
    if (!gpu)
        fprintf(file, "memory_gb: %.3f\n", 1e-9 * pages / c->b->cmd->size);
    fprintf(file, "passes:\n");
    for (int i = 0; i < PASS_COUNT; i++)
        fprintf(file, "  %s: %.3f\n", passes[i], 1e-9 * c->pass[i]);
    fprintf(file, "newton_schulz:\n");
    for (size_t i = 0; i < c->rate_count; i++)
        fprintf(file, "  - {dtype: %s, gflop: %.6g, tflops: %.6g}\n", dtypes[c->rates[i].dtype],
                1e-9 * c->rates[i].flops, 1e-12 * c->rates[i].rate);
    if (c->link.ranks > 1.0)
        fprintf(file, "links:\n  - {name: %s, ranks: %.0f, gbs: %.6g, us: %.4g}\n", c->link.name,
                c->link.ranks, 1e-9 * c->link.bandwidth, 1e6 * c->link.latency);
    else
        fprintf(file, "links: []\n");
    const int unwritten = ferror(file) | fclose(file);
    return unwritten
               ? message_fail(c->b->message, MUONSHARD_ERR_IO, "%s: %s", path, strerror(errno))
               : MUONSHARD_OK;
}

static muonshard_status reserve(calibration *c) {
    muonshard_status status = MUONSHARD_OK;
    const uint8_t one = 1;
    void *memory[ARRAYS + 4] = {NULL};
    const size_t bytes[ARRAYS + 4] = {sizeof(float) * c->elements,
                                      sizeof(float) * c->elements,
                                      sizeof(float) * c->elements,
                                      sizeof(float) * c->elements,
                                      sizeof(step_record),
                                      sizeof(tensor_values),
                                      sizeof one,
                                      sizeof(double)};
    for (size_t i = 0; i < ARRAYS + 4 && status == MUONSHARD_OK; i++)
        status = c->memory->ops->alloc(c->memory, &memory[i], bytes[i]);
    for (size_t i = 0; i < ARRAYS; i++)
        c->array[i] = memory[i];
    c->record = memory[ARRAYS];
    c->values = memory[ARRAYS + 1];
    c->active = memory[ARRAYS + 2];
    c->sum = memory[ARRAYS + 3];
    const copy_item item = {c->active, &one, 1};
    if (status == MUONSHARD_OK)
        status = c->memory->ops->copy(c->memory, &item, 1, STREAM_COMPUTE);
    /* Numbers that are neither zero nor subnormal, which some processors are slow with. */
    float *numbers = malloc(sizeof(float) * c->elements);
    for (size_t i = 0; numbers && i < c->elements; i++)
        numbers[i] = 0.5F + (float)(i * 2654435761U % 1009) / 1009.0F;
    for (size_t i = 0; i < ARRAYS && status == MUONSHARD_OK && numbers; i++) {
        const copy_item fill = {c->array[i], numbers, sizeof(float) * c->elements};
        status = c->memory->ops->copy(c->memory, &fill, 1, STREAM_COMPUTE);
    }
    if (!numbers)
        return message_fail(c->b->message, MUONSHARD_ERR_MEMORY, "out of memory");
    free(numbers);
    return failed(c, status);
}

static void release(const calibration *c) {
    void *memory[] = {c->array[0], c->array[1], c->array[2], c->array[3],
                      c->record,   c->values,   c->active,   c->sum};
    for (size_t i = 0; i < sizeof memory / sizeof *memory; i++)
        if (memory[i])
            c->memory->ops->free(c->memory, memory[i]);
}

static muonshard_status measure(calibration *c) {
    bench_print(c->b, "# passes over memory\n");
    TRY(measure_passes(c));
    bench_print(c->b, "# Newton-Schulz\n");
    TRY(measure_rates(c));
    bench_print(c->b, "# links\n");
    return measure_link(c);
}

muonshard_status bench_calibrate(bench *b, const char *path) {
    calibration c = {.b = b};
    c.elements = (size_t)fmax(b->end > 0.0 ? b->end : DEFAULT_BYTES, LEAST_BYTES) / sizeof(float);
    muonshard_status status = muonshard_create(b->cmd->comm, b->cmd->config, NULL, &c.o);
    if (status)
        return message_fail(b->message, status, "%s", muonshard_comm_last_error(b->cmd->comm));
    c.memory = c.o->backend;
    status = command_agree(b->cmd, reserve(&c), b->message);
    if (status == MUONSHARD_OK)
        status = measure(&c);
    if (status == MUONSHARD_OK && b->cmd->rank == 0) {
        status = write_machine(&c, path);
        bench_print(b, "# %s written\n", path);
    }
    release(&c);
    muonshard_destroy(c.o);
    return status;
}
