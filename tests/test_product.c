/* The host's matrix products: every instruction set against fp64, shapes that are multiples of
 * nothing, and the same bits from all sets that fuse, for bf16 from all sets. */
#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "dtype.h"
#include "kernels/host_product.h"
#include "kernels/host_threads.h"

#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

enum { GUARD = 64 };

static uint64_t random_state = 1;
static host_threads *pool; /* of three; every other instruction set goes through it */

static float uniform(void) {
    random_state = random_state * 6364136223846793005U + 1442695040888963407U;
    return (float)((double)(random_state >> 40) / 8388608.0 - 1.0);
}

static muonshard_dtype stored_as(ns_dtype dtype) {
    return dtype == NS_BF16 ? MUONSHARD_BF16 : dtype == NS_FP16 ? MUONSHARD_FP16 : MUONSHARD_FP32;
}

/* [count] numbers of `dtype` and NaN on both sides, which no product may touch. */
static float *array_of(size_t count, ns_dtype dtype, float magnitude) {
    float *block = malloc((count + 2 * GUARD) * sizeof *block);
    assert_non_null(block);
    for (size_t i = 0; i < count + 2 * GUARD; i++)
        block[i] = NAN;
    for (size_t i = 0; i < count; i++)
        block[GUARD + i] = magnitude * uniform();
    dtype_round(block + GUARD, stored_as(dtype), count);
    return block + GUARD;
}

static float *symmetric_of(size_t m, ns_dtype dtype) {
    float *x = array_of(m * m, dtype, 1.0F);
    for (size_t i = 0; i < m; i++)
        for (size_t j = 0; j < i; j++)
            x[j * m + i] = x[i * m + j];
    return x;
}

static void release(float *x) {
    if (x)
        free(x - GUARD);
}

static void check_guards(const float *x, size_t count) {
    for (size_t i = 0; i < GUARD; i++)
        assert_true(isnan(x[count + i]) && isnan((x - GUARD)[i]));
}

static double operand_at(const product_operand *o, const product *p, size_t sides, size_t side,
                         size_t k) {
    const float x = o->across ? o->x[k * sides + side] : o->x[side * p->depth + k];
    return p->operands == NS_TF32   ? dtype_round_tf32(x)
           : p->operands == NS_BF16 ? dtype_from_bf16(dtype_to_bf16(x))
                                    : x;
}

/* Distance of an element from fp64, in what the rounding of sum and storage allows. */
static double worst(const product *p) {
    const double unit = p->stored == NS_BF16   ? ldexp(1.0, -8)
                        : p->stored == NS_FP16 ? ldexp(1.0, -11)
                                               : ldexp(1.0, -24);
    double found = 0.0;
    for (size_t i = 0; i < p->rows; i++) {
        for (size_t j = 0; j < p->cols; j++) {
            double sum = 0.0, magnitude = 0.0;
            for (size_t k = 0; k < p->depth; k++) {
                const double term =
                    operand_at(&p->a, p, p->rows, i, k) * operand_at(&p->b, p, p->cols, j, k);
                sum += term;
                magnitude += fabs(term);
            }
            const double c = p->c ? (double)p->beta * p->c[i * p->cols + j] : 0.0;
            const double exact = p->alpha * sum + c;
            const double sum_error =
                (double)p->depth * ldexp(1.0, -24) * fabs(p->alpha) * magnitude;
            const double allowed = sum_error + unit * fabs(exact) +
                                   ldexp(1.0, -22) * (fabs(p->alpha * sum) + fabs(c)) +
                                   (p->stored == NS_FP16 ? ldexp(1.0, -25) : 0.0);
            const double error = fabs(p->dst[i * p->cols + j] - exact);
            assert_true(isfinite(error));
            found = fmax(found, error == 0.0 ? 0.0 : error / allowed);
        }
    }
    return found;
}

static void multiply(host_isa isa, const product *p, host_threads *threads) {
    const size_t bytes = host_product_workspace(isa, p, threads);
    unsigned char *workspace = aligned_alloc(64, bytes + 64);
    assert_non_null(workspace);
    memset(workspace, 0xff, bytes + 64);
    for (size_t i = 0; i < p->rows * p->cols; i++)
        p->dst[i] = NAN;
    host_product(isa, p, workspace, threads);
    for (size_t i = 0; i < 64; i++)
        assert_int_equal(workspace[bytes + i], 0xff);
    check_guards(p->dst, p->rows * p->cols);
    free(workspace);
}

static bool fuses(host_isa isa) {
#if defined(FP_FAST_FMAF)
    (void)isa;
    return true;
#else
    return isa > HOST_PORTABLE;
#endif
}

/* All instruction sets of this machine; all that fuse agree to the bit, and where products of two
 * elements are exact in fp32 all do. */
static void check(product p) {
    const size_t count = p.rows * p.cols;
    const bool exact_products = p.operands != NS_FP32;
    float *first = NULL;
    for (int isa = (int)host_isa_detect(); isa >= 0; isa--) {
        p.dst = array_of(count, p.stored, 0.0F);
        multiply((host_isa)isa, &p, isa % 2 ? pool : NULL);
        const bool same = first && memcmp(first, p.dst, count * sizeof(float)) == 0;
        const double distance = same ? 0.0 : worst(&p);
        if (!(distance <= 1.0))
            print_error("%s dtype %d, %zu x %zu x %zu: %g of what is allowed\n",
                        host_isa_name((host_isa)isa), p.operands, p.rows, p.cols, p.depth,
                        distance);
        assert_true(distance <= 1.0);
        assert_true(same || !first || !(exact_products || fuses((host_isa)isa)));
        for (size_t i = 0; p.symmetric && i < p.rows; i++)
            for (size_t j = 0; j < i; j++)
                assert_memory_equal(&p.dst[i * p.cols + j], &p.dst[j * p.cols + i], sizeof(float));
        if (!first)
            first = p.dst;
        else
            release(p.dst);
    }
    release(first);
}

/* The three kinds Newton-Schulz has, for one m and n. */
static void check_kinds(ns_dtype dtype, size_t m, size_t n) {
    float *x = array_of(m * n, dtype, 1.0F), *s = symmetric_of(m, dtype),
          *t = symmetric_of(m, dtype);
    check((product){.operands = dtype,
                    .stored = dtype,
                    .rows = m,
                    .cols = m,
                    .depth = n,
                    .a = {.x = x},
                    .b = {.x = x},
                    .square = true,
                    .symmetric = true,
                    .alpha = 1.0F});
    check((product){.operands = dtype,
                    .stored = dtype,
                    .rows = m,
                    .cols = m,
                    .depth = m,
                    .a = {.x = s, .across = true},
                    .b = {.x = s, .across = true},
                    .square = true,
                    .symmetric = true,
                    .alpha = 0.7F,
                    .beta = -1.3F,
                    .c = s});
    check((product){.operands = dtype,
                    .stored = dtype,
                    .rows = m,
                    .cols = n,
                    .depth = m,
                    .a = {.x = s, .across = true},
                    .b = {.x = x, .across = true},
                    .alpha = 1.0F,
                    .beta = 3.4F,
                    .c = x});
    /* Commuting: of a matrix and itself, so that the outcome is symmetric but for rounding. */
    check((product){.operands = dtype,
                    .stored = dtype,
                    .rows = m,
                    .cols = m,
                    .depth = m,
                    .a = {.x = s, .across = true},
                    .b = {.x = s, .across = true},
                    .symmetric = true,
                    .alpha = 1.0F,
                    .beta = 0.5F,
                    .c = t});
    check_guards(x, m * n);
    release(x);
    release(s);
    release(t);
}

static void test_shapes(void **state) {
    (void)state;
    const size_t shapes[][2] = {{1, 1},     {1, 7},     {2, 3},     {3, 1025}, {4, 24},
                                {7, 50},    {8, 48},    {9, 49},    {24, 24},  {47, 97},
                                {48, 96},   {49, 385},  {95, 400},  {97, 97},  {130, 131},
                                {192, 384}, {193, 385}, {200, 1100}};
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++)
        for (int dtype = NS_FP32; dtype <= NS_FP16; dtype++)
            check_kinds((ns_dtype)dtype, shapes[i][0], shapes[i][1]);
}

/* Sums that pass through numbers below the normal ones, which bf16 instructions flush. */
static void test_subnormal(void **state) {
    (void)state;
    const size_t m = 19, n = 70;
    for (int dtype = NS_FP32; dtype <= NS_BF16; dtype += NS_BF16) {
        float *first = NULL;
        float *x = array_of(m * n, (ns_dtype)dtype, 1e-19F);
        for (int isa = (int)host_isa_detect(); isa > HOST_PORTABLE; isa--) {
            product p = {.operands = (ns_dtype)dtype,
                         .stored = (ns_dtype)dtype,
                         .rows = m,
                         .cols = m,
                         .depth = n,
                         .a = {.x = x},
                         .b = {.x = x},
                         .square = true,
                         .symmetric = true,
                         .alpha = 1.0F,
                         .dst = array_of(m * m, NS_FP32, 0.0F)};
            multiply((host_isa)isa, &p, isa % 2 ? pool : NULL);
            if (first)
                assert_memory_equal(first, p.dst, m * m * sizeof(float));
            if (!first)
                first = p.dst;
            else
                release(p.dst);
        }
        release(first);
        release(x);
    }
}

/* NaN and infinity stay in their row and column, and are seen by both triangles. */
static void test_not_finite(void **state) {
    (void)state;
    const size_t m = 60, n = 101;
    for (int isa = 0; isa <= (int)host_isa_detect(); isa++) {
        float *x = array_of(m * n, NS_BF16, 1.0F);
        x[17 * n + 50] = NAN;
        x[51 * n + 3] = INFINITY;
        product p = {.operands = NS_BF16,
                     .stored = NS_BF16,
                     .rows = m,
                     .cols = m,
                     .depth = n,
                     .a = {.x = x},
                     .b = {.x = x},
                     .square = true,
                     .symmetric = true,
                     .alpha = 1.0F,
                     .dst = array_of(m * m, NS_FP32, 0.0F)};
        multiply((host_isa)isa, &p, isa % 2 ? pool : NULL);
        for (size_t i = 0; i < m; i++)
            for (size_t j = 0; j < m; j++)
                assert_int_equal(isfinite(p.dst[i * m + j]) != 0,
                                 i != 17 && j != 17 && i != 51 && j != 51);
        assert_true(isnan(p.dst[17 * m + 17]) && isinf(p.dst[51 * m + 51]));
        release(p.dst);
        release(x);
    }
}

/* ---- threads ---- */

enum { TASKS = 1000 };

typedef struct counted {
    int runs[TASKS], thread[TASKS];
} counted;

static void count_task(void *user, size_t index, int thread) {
    counted *c = user;
    c->runs[index]++;
    c->thread[index] = thread;
}

static void test_threads_run_every_task_once(void **state) {
    (void)state;
    for (int threads = 1; threads <= 5; threads += 2) {
        host_threads *several;
        error_text error;
        assert_int_equal(host_threads_open(threads, &several, &error), MUONSHARD_OK);
        assert_int_equal(host_threads_count(several), threads);
        for (int round = 0; round < 50; round++) {
            counted c = {0};
            const size_t count = (size_t)(round * 20);
            host_threads_run(several, count_task, &c, count);
            for (size_t i = 0; i < TASKS; i++) {
                assert_int_equal(c.runs[i], i < count);
                assert_in_range(c.thread[i], 0, threads - 1);
            }
        }
        host_threads_close(several);
    }
}

static int open_pool(void **state) {
    (void)state;
    error_text error;
    return host_threads_open(3, &pool, &error);
}

static int close_pool(void **state) {
    (void)state;
    host_threads_close(pool);
    return 0;
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_shapes),
        cmocka_unit_test(test_subnormal),
        cmocka_unit_test(test_not_finite),
        cmocka_unit_test(test_threads_run_every_task_once),
    };
    return cmocka_run_group_tests(tests, open_pool, close_pool);
}
