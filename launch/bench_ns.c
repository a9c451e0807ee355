/* bench_ns.c - Newton-Schulz alone: as many matrices as fit, against three plain products a step
 * through OpenBLAS with as many threads, and against fp64. */
#include <cblas.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "bench.h"
#include "optim/coefficients.h"
#include "optim/newton_schulz.h"

typedef struct ns_case {
    bench *b;
    bench_shape s;
    size_t m, n; /* m <= n; a matrix a thread unless s says how many */
    ns_program program;
    coefficient_row coefficients[NS_MAX_STEPS];
    float *in, *out;           /* own, [count, rows, cols] */
    orthogonalize_item *items; /* own, [count] */
    void *workspace;           /* own */
    float *x, *y, *a, *p;      /* own: of the plain form */
} ns_case;

/* ---- what is timed ---- */

static muonshard_status run_ours(void *user) {
    ns_case *c = user;
    backend *host = c->b->host;
    const size_t at_once = backend_at_once(host, c->s.count);
    for (size_t i = 0; i < c->s.count; i += at_once) {
        const size_t left = c->s.count - i;
        const muonshard_status status =
            host->ops->orthogonalize(host, NULL, &c->program, (int64_t)c->m, (int64_t)c->n,
                                     c->items + i, left < at_once ? left : at_once, c->workspace);
        if (status)
            return message_fail(c->b->message, status, "%s", host->error.text);
    }
    return MUONSHARD_OK;
}

/* As it is usually written: X / |X|; A = X X^T; B = b A + c A A; X = a X + B X. */
static muonshard_status run_three_gemm(void *user) {
    ns_case *c = user;
    const int m = (int)c->m, n = (int)c->n, steps = (int)c->b->settings->ns_steps;
    for (size_t k = 0; k < c->s.count; k++) {
        const float *in = c->in + k * c->m * c->n;
        float *x = c->x, *y = c->y;
        const float norm = cblas_snrm2(m * n, in, 1);
        for (size_t i = 0; i < c->m * c->n; i++)
            x[i] = in[i] / norm;
        for (int i = 0; i < steps; i++) {
            const coefficient_row k3 = c->coefficients[i];
            cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, m, m, n, 1.0F, x, n, x, n, 0.0F,
                        c->a, m);
            memcpy(c->p, c->a, c->m * c->m * sizeof *c->a);
            cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, m, m, m, (float)k3.c, c->a, m,
                        c->a, m, (float)k3.b, c->p, m);
            memcpy(y, x, c->m * c->n * sizeof *x);
            cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, m, n, m, 1.0F, c->p, m, x, n,
                        (float)k3.a, y, n);
            float *swap = x;
            x = y;
            y = swap;
        }
    }
    return MUONSHARD_OK;
}

/* Of the first and the last matrix. */
static muonshard_status wrong_elements(const ns_case *c, double *wrong) {
    const size_t count = c->m * c->n;
    const muonshard_dtype dtype = ns_program_output(&c->program);
    float *out = malloc(count * sizeof *out);
    muonshard_status status =
        out ? MUONSHARD_OK : message_fail(c->b->message, MUONSHARD_ERR_MEMORY, "out of memory");
    *wrong = 0.0;
    for (size_t k = 0; k < c->s.count && status == MUONSHARD_OK;
         k += c->s.count > 1 ? c->s.count - 1 : 1) {
        double of_this;
        dtype_load(out, c->items[k].out, dtype, count);
        status = bench_compare(c->b, c->in + k * count, out, c->s.rows, c->s.cols, c->program.dtype,
                               false, &of_this);
        *wrong += of_this;
    }
    free(out);
    return status;
}

/* ---- a row ---- */

static const char *dtype_text(ns_dtype dtype) {
    static const char *const names[] = {"fp32", "tf32", "bf16", "fp16"};
    return names[dtype];
}

static const char *form_text(const ns_program *p) {
    for (int i = 0; i < p->count; i++)
        if (p->code[i].kind == NS_COMMUTING_PRODUCT)
            return "gram";
    return "standard";
}

static muonshard_status reserve(ns_case *c) {
    backend *host = c->b->host;
    const size_t count = c->m * c->n * c->s.count;
    c->in = malloc(count * sizeof(float));
    c->out = malloc(count * sizeof(float));
    c->items = calloc(c->s.count, sizeof *c->items);
    c->x = malloc(c->m * c->n * sizeof(float));
    c->y = malloc(c->m * c->n * sizeof(float));
    c->a = malloc(c->m * c->m * sizeof(float));
    c->p = malloc(c->m * c->m * sizeof(float));
    const size_t bytes = host->ops->orthogonalize_workspace(
        host, &c->program, (int64_t)c->m, (int64_t)c->n, backend_at_once(host, c->s.count));
    if (!c->in || !c->out || !c->items || !c->x || !c->y || !c->a || !c->p ||
        host->ops->alloc(host, &c->workspace, bytes))
        return message_fail(c->b->message, MUONSHARD_ERR_MEMORY, "out of memory");
    /* Uniform in [-1, 1): any spectrum takes as long. */
    uint64_t state = (uint64_t)c->b->cmd->rank + 1;
    for (size_t i = 0; i < count; i++) {
        state = state * 6364136223846793005U + 1442695040888963407U;
        c->in[i] = (float)((double)(state >> 40) / 8388608.0 - 1.0);
    }
    const size_t element = dtype_size(ns_program_output(&c->program));
    for (size_t i = 0; i < c->s.count; i++)
        c->items[i] = (orthogonalize_item){.u = c->in + i * c->m * c->n,
                                           .out = (char *)c->out + i * c->m * c->n * element,
                                           .transposed = c->s.rows > c->s.cols};
    return MUONSHARD_OK;
}

/* Of one matrix, at the ceilings of the dtypes its products are in. */
static double floor_seconds(const ns_case *c) {
    const bench_ceilings *ceiling = &c->b->ceilings;
    const double flops = ns_program_flops(&c->program, (int64_t)c->m, (int64_t)c->n);
    const double in_fp32 =
        ns_program_cost(&c->program, (int64_t)c->m, (int64_t)c->n, false) - flops;
    const double narrow = c->program.dtype == NS_BF16 ? ceiling->bf16_flops : ceiling->fp32_flops;
    return in_fp32 / ceiling->fp32_flops + (flops - in_fp32) / narrow;
}

static muonshard_status add_row(ns_case *c, bench_time ours, bench_time plain, double wrong) {
    bench *b = c->b;
    const double matrices = (double)c->s.count;
    const double flops = ns_program_flops(&c->program, (int64_t)c->m, (int64_t)c->n) * matrices;
    const double m = (double)c->m, n = (double)c->n;
    const double flops_plain =
        (double)b->settings->ns_steps * (4.0 * m * m * n + 2.0 * m * m * m) * matrices;
    const double rate = flops / ours.median;
    const double share = floor_seconds(c) * matrices / ours.median;
    bench_print(b,
                "  %6zu %6zu %5zu  %-5s %-8s %11.1f %11.1f %11.1f %9.1f %6.1f %12.1f %7.2f %8s\n",
                c->s.rows, c->s.cols, c->s.count, dtype_text(c->program.dtype),
                form_text(&c->program), 1e6 * ours.median, 1e6 * ours.min, 1e6 * ours.max,
                1e-9 * rate, 100.0 * share, 1e6 * plain.median, plain.median / ours.median,
                isnan(wrong)  ? "-"
                : wrong > 0.0 ? "WRONG"
                              : "0");
    return bench_add_row(
        b, json_pack("{s:I, s:I, s:I, s:s, s:s, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o}", "rows",
                     (json_int_t)c->s.rows, "cols", (json_int_t)c->s.cols, "count",
                     (json_int_t)c->s.count, "dtype", dtype_text(c->program.dtype), "form",
                     form_text(&c->program), "time_us", bench_time_json(ours), "flops_plain",
                     bench_number(flops_plain), "flops", bench_number(flops), "gflops",
                     bench_number(1e-9 * rate), "share", bench_number(share), "three_gemm_us",
                     bench_time_json(plain), "ratio", bench_number(plain.median / ours.median),
                     "wrong", bench_number(wrong)));
}

static muonshard_status measure(ns_case *c) {
    bench *b = c->b;
    bench_time ours, plain;
    double wrong = NAN;
    TRY(bench_measure(b, run_ours, c, &ours));
    if (b->check)
        TRY(wrong_elements(c, &wrong));
    TRY(bench_sum(b, &wrong));
    TRY(bench_measure(b, run_three_gemm, c, &plain));
    return add_row(c, ours, plain, wrong);
}

static muonshard_status run_shape(bench *b, bench_shape s) {
    ns_case c = {.b = b, .s = s};
    if (!c.s.count)
        c.s.count = (size_t)b->host->threads;
    c.m = s.rows < s.cols ? s.rows : s.cols;
    c.n = s.rows < s.cols ? s.cols : s.rows;
    error_text error = {""};
    muonshard_status status = newton_schulz_compile(b->settings, MUONSHARD_FP32, false,
                                                    (int64_t)c.m, (int64_t)c.n, &c.program, &error);
    if (status == MUONSHARD_OK)
        status = coefficients_rows(b->settings, c.program.dtype, c.coefficients, &error);
    if (status)
        return message_fail(b->message, status, "%s", error.text);
    status = reserve(&c);
    if (status == MUONSHARD_OK)
        status = measure(&c);
    free(c.in);
    free(c.out);
    free(c.items);
    free(c.x);
    free(c.y);
    free(c.a);
    free(c.p);
    b->host->ops->free(b->host, c.workspace);
    return status;
}

muonshard_status bench_ns(bench *b, const char *shapes) {
    bench_print(b, "#\n# %6s %6s %5s  %-5s %-8s %11s %11s %11s %9s %6s %12s %7s %8s\n", "rows",
                "cols", "count", "dtype", "form", "time", "min", "max", "flop rate", "share",
                "three gemm", "ratio", "#wrong");
    bench_print(b, "# %6s %6s %5s  %-5s %-8s %11s %11s %11s %9s %6s %12s\n", "", "", "", "", "",
                "(us)", "(us)", "(us)", "(GFLOP/s)", "(%)", "(us)");
    if (b->begin > 0.0 && !shapes) {
        for (double side = b->begin; side <= fmax(b->begin, b->end);
             side = bench_next_size(b, side))
            TRY(run_shape(b, (bench_shape){.rows = (size_t)side, .cols = (size_t)side}));
        return MUONSHARD_OK;
    }
    for (const char *at = shapes ? shapes : "768x768,768x3072,1024x4096"; *at;) {
        bench_shape s;
        TRY(bench_read_shape(b, &at, &s));
        TRY(run_shape(b, s));
    }
    return MUONSHARD_OK;
}
