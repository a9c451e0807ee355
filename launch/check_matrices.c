/* check_matrices.c - a stack of matrices through Muon, one a rank: orthogonal, the right ones, the
 * same bytes on all ranks; and how fast Newton-Schulz runs on each. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "check_values.h"

/* W = -U of the summed gradient, U in fp32 with singular values within 1e-5 of 1 where those of the
 * gradient are a hundredth of its norm or more: a matrix of numbers without order, twice as wide as
 * high, has such. */
static const char *const exact[][2] = {
    {"momentum_form", "heavy_ball"},
    {"nesterov", "false"},
    {"norm", "frobenius_max"},
    {"norm_eps", "auto"},
    {"coefficients", "polar_express_nvidia"},
    {"coefficient_repeat", "auto"},
    {"coefficient_safety", "1"},
    {"ns_steps", "8"},
    {"ns_dtype", "fp32"},
    {"ns_form", "standard"},
    {"variance", "none"},
    {"scale", "none"},
    {"extra_scale", "1"},
    {"decay", "decoupled"},
    {"decay_form", "multiply"},
    {"layout", "out_in"},
    {NULL, NULL},
};
enum { DTYPE_TEXT = 8 };
static const double ORTHOGONAL = 1e-2, SYMMETRIC = 1e-3, SLOW = 1.5;

static muonshard_step_args step_args(void) {
    muonshard_step_args args = MUONSHARD_STEP_ARGS_INIT;
    args.lr = 1.0;
    args.momentum = 0.0;
    args.weight_decay = 0.0;
    return args;
}

/* ---- right ---- */

/* Of U [rows, cols] and the gradient G it was made of: how far U U^T is from 1, and U G^T, which is
 * the root of G G^T and so symmetric and positive, from its transpose, relative to its largest
 * element. Infinite where its trace is not above 0. */
static void measure(const float *u, const float *g, size_t rows, size_t cols, double *product,
                    double found[2]) {
    double largest = 0.0, trace = 0.0;
    found[0] = found[1] = 0.0;
    for (size_t i = 0; i < rows; i++)
        for (size_t j = 0; j < rows; j++) {
            double uu = 0.0, ug = 0.0;
            for (size_t k = 0; k < cols; k++) {
                uu += (double)u[i * cols + k] * (double)u[j * cols + k];
                ug += (double)u[i * cols + k] * (double)g[j * cols + k];
            }
            const double off = fabs(uu - (i == j));
            found[0] = off <= found[0] ? found[0] : off; /* NaN stays */
            product[i * rows + j] = ug;
            largest = fmax(largest, fabs(ug));
            trace += i == j ? ug : 0.0;
        }
    for (size_t i = 0; i < rows; i++)
        for (size_t j = 0; j < i; j++)
            found[1] = fmax(found[1], fabs(product[i * rows + j] - product[j * rows + i]));
    found[1] = trace > 0.0 ? found[1] / largest : INFINITY;
}

/* The matrix of the next rank, so that what is looked at was computed elsewhere. */
static muonshard_status look(check *c, const check_tensor *t, size_t rows, size_t cols,
                             double found[2]) {
    const check_pattern p = check_pattern_make(c->cmd.size);
    const size_t count = rows * cols, which = (size_t)((c->cmd.rank + 1) % c->cmd.size);
    float *u = malloc(2 * count * sizeof *u);
    double *product = malloc(rows * rows * sizeof *product);
    const bool memory = u && product;
    if (memory) {
        for (size_t i = 0; i < count; i++) {
            u[i] = -t->host[which * count + i];
            u[count + i] = check_sum(&p, which * count + i);
        }
        measure(u, u + count, rows, cols, product, found);
    }
    free(u);
    free(product);
    return command_agree(&c->cmd, memory ? MUONSHARD_OK : MUONSHARD_ERR_MEMORY, "out of memory");
}

/* FNV-1a over the words. */
static uint64_t hash_of(const float *values, size_t count) {
    uint64_t hash = 0xcbf29ce484222325U;
    for (size_t i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, &values[i], sizeof bits);
        hash = (hash ^ bits) * 0x100000001b3U;
    }
    return hash;
}

static muonshard_status compare(check *c, const check_tensor *t) {
    const uint64_t own = hash_of(t->host, t->count);
    uint64_t *all = calloc((size_t)c->cmd.size, sizeof *all);
    muonshard_status status =
        command_agree(&c->cmd, all ? MUONSHARD_OK : MUONSHARD_ERR_MEMORY, "out of memory");
    if (status == MUONSHARD_OK)
        status = check_gather(c, &own, all, sizeof own);
    int differ = 0, first = 0;
    for (int r = 1; r < c->cmd.size && status == MUONSHARD_OK; r++)
        if (all[r] != all[0] && differ++ == 0)
            first = r;
    if (differ)
        check_problem(
            c, MUONSHARD_ERR_MISMATCH,
            "matrices have other bytes than on rank 0 on %d rank%s, the first is rank %d: "
            "an all-gather that did not bring the same to all",
            differ, differ == 1 ? "" : "s", first);
    free(all);
    return status;
}

static void tell(check *c, const double found[2], size_t rows, size_t cols) {
    if (!(found[0] <= ORTHOGONAL))
        check_problem(c, MUONSHARD_ERR_INTERNAL,
                      "an update is not orthogonal: an element of U U^T is %.2g from that of 1, "
                      "where %.0e is allowed",
                      found[0], ORTHOGONAL);
    if (!(found[1] <= SYMMETRIC))
        check_problem(c, MUONSHARD_ERR_COMM,
                      "an update is not that of its gradient: U G^T is %.2g from symmetric, where "
                      "%.0e is allowed; matrices may have come to other ranks than their owners",
                      found[1], SYMMETRIC);
    check_say(
        c, "matrices: %d of %zu x %zu; U U^T is within %.1e of 1, U G^T within %.1e of symmetric",
        c->cmd.size, rows, cols, found[0], found[1]);
}

/* Halves the side until a stack of so many fits. */
static int64_t side_that_fits(int64_t side, double each, double bytes) {
    while (side > 16 && each * (double)(side * side) > bytes)
        side /= 2;
    return side;
}

static muonshard_status check_right(check *c) {
    const int64_t rows = side_that_fits(256, 8.0 * c->cmd.size, 0x1p26);
    const int64_t shape[3] = {c->cmd.size, rows, 2 * rows};
    const muonshard_step_args args = step_args();
    double found[2] = {0.0, 0.0};
    check_times times;
    check_tensor t;
    muonshard_status status = check_set(c, exact);
    if (status != MUONSHARD_OK)
        return status;
    status = check_tensor_open(c, &t, MUONSHARD_ROLE_MATRIX, 3, shape);
    if (status == MUONSHARD_OK)
        status = check_tensor_step(c, &t, &args, &times);
    if (status == MUONSHARD_OK)
        status = check_tensor_read(c, &t);
    if (status == MUONSHARD_OK)
        status = compare(c, &t);
    if (status == MUONSHARD_OK)
        status = look(c, &t, (size_t)rows, (size_t)(2 * rows), found);
    if (status == MUONSHARD_OK)
        status = check_largest(c, found, 2);
    if (status == MUONSHARD_OK)
        tell(c, found, (size_t)rows, (size_t)(2 * rows));
    check_tensor_close(c, &t);
    return status;
}

/* ---- fast ---- */

static void judge(check *c, double flops, double rate, const char *dtype) {
    static const char *const dtypes[] = {"fp32", "tf32", "bf16", "fp16"};
    int number = 0;
    while (number < 3 && strcmp(dtypes[number], dtype) != 0)
        number++;
    const double usual = flops / machine_newton_schulz(&c->machine, number, flops, 1.0);
    if (rate < 0.7 * usual)
        check_warn(c,
                   "Newton-Schulz in %s runs at %.3g GFLOP/s on the slowest rank; %s expects %.3g; "
                   "look at clocks and power limits, at who else computes there, and at binding",
                   dtype, 1e-9 * rate, c->machine_path, 1e-9 * usual);
}

static void tell_slow(check *c, const double *rates, double median) {
    int told = 0;
    for (int r = 0; r < c->cmd.size && !c->crowded; r++)
        if (SLOW * rates[r] < median && told++ < 8)
            check_warn(c,
                       "rank %d runs Newton-Schulz %.1f times slower than the median rank; every "
                       "step waits for it",
                       r, median / rates[r]);
    if (told > 8)
        check_say(c, "         and %d more ranks", told - 8);
}

static muonshard_status tell_rates(check *c, double rate, double flops, int64_t side,
                                   const char *dtype) {
    const size_t ranks = (size_t)c->cmd.size;
    double *rates = calloc(2 * ranks, sizeof *rates);
    muonshard_status status =
        command_agree(&c->cmd, rates ? MUONSHARD_OK : MUONSHARD_ERR_MEMORY, "out of memory");
    if (status == MUONSHARD_OK)
        status = check_gather(c, &rate, rates, sizeof rate);
    if (status == MUONSHARD_OK && c->cmd.rank == 0) {
        memcpy(rates + ranks, rates, ranks * sizeof *rates);
        const double median = check_median(rates + ranks, ranks), least = rates[ranks];
        size_t slowest = 0;
        while (rates[slowest] > least)
            slowest++;
        check_say(c,
                  "Newton-Schulz: %s, a matrix of %lld x %lld a rank: %.4g GFLOP/s (median rank), "
                  "%.4g (slowest, rank %zu)",
                  dtype, (long long)side, (long long)side, 1e-9 * median, 1e-9 * least, slowest);
        tell_slow(c, rates, median);
        if (c->machine_path)
            judge(c, flops, least, dtype);
    }
    free(rates);
    return status;
}

/* The best of some steps: what else runs on a machine makes one slower, never faster. */
static muonshard_status time_steps(check *c, check_tensor *t, double *rate, double *flops) {
    const muonshard_step_args args = step_args();
    int timed = 1;
    muonshard_status status = MUONSHARD_OK;
    *rate = 0.0;
    for (int step = 0; step < CHECK_WARM_STEPS + timed && status == MUONSHARD_OK; step++) {
        check_times times;
        status = check_tensor_step(c, t, &args, &times);
        *flops = times.flops;
        if (step >= CHECK_WARM_STEPS)
            *rate = fmax(*rate, times.flops / fmax(times.orthogonalize, 1e-9));
        if (status == MUONSHARD_OK && step == CHECK_WARM_STEPS - 1)
            status = check_step_count(c, times.whole, &timed);
    }
    return status;
}

static muonshard_status check_rate(check *c, const char *dtype) {
    const double usual = c->device ? 2048.0 : 512.0;
    const int64_t side = side_that_fits((int64_t)(c->side > 0.0 ? c->side : usual),
                                        4.0 * c->cmd.size, c->device ? 0x1p31 : 0x1p28);
    const int64_t shape[3] = {c->cmd.size, side, side};
    const char *const keys[][2] = {
        {"coefficients", "simple"}, {"ns_steps", "5"}, {"ns_dtype", dtype}, {NULL, NULL}};
    double rate = 0.0, flops = 0.0;
    check_tensor t;
    muonshard_status status = check_set(c, keys);
    if (status != MUONSHARD_OK)
        return status;
    status = check_tensor_open(c, &t, MUONSHARD_ROLE_MATRIX, 3, shape);
    if (status == MUONSHARD_OK)
        status = time_steps(c, &t, &rate, &flops);
    if (status == MUONSHARD_OK)
        status = tell_rates(c, rate, flops, side, dtype);
    check_tensor_close(c, &t);
    return status;
}

muonshard_status check_matrices(check *c) {
    char dtype[DTYPE_TEXT] = "";
    muonshard_config_get(c->cmd.config, "ns_dtype", dtype, sizeof dtype, NULL);
    if (strcmp(dtype, "param") == 0)
        snprintf(dtype, sizeof dtype, "fp32");
    if (!c->dtype_given && c->device)
        snprintf(dtype, sizeof dtype, "bf16");
    const muonshard_status status = check_right(c);
    return status == MUONSHARD_OK ? check_rate(c, dtype) : status;
}
