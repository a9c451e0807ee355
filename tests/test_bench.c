/* What the benchmark is made of: the comparison that makes #wrong, and the link that is no faster
 * than it says. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "bench.h"
#include "bench_link.h"
#include "comm_threads.h"
#include "config.h"

#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

/* ---- #wrong ---- */

enum { ROWS = 5, COLS = 9, COUNT = ROWS * COLS };

/* G with orthonormal rows: each of ROWS unit vectors, so that every step of Newton-Schulz takes the
 * one singular value 1/sqrt(ROWS) along its polynomial. */
static double known(float *g, float *u, size_t rows, size_t cols) {
    const size_t m = rows < cols ? rows : cols;
    double sigma = 1.0 / sqrt((double)m);
    for (int i = 0; i < 5; i++)
        sigma *= 3.4445 - 4.7750 * sigma * sigma + 2.0315 * sigma * sigma * sigma * sigma;
    memset(g, 0, COUNT * sizeof *g);
    for (size_t i = 0; i < m; i++)
        g[i * cols + i] = i % 2 ? -2.0F : 2.0F;
    for (size_t i = 0; i < COUNT; i++)
        u[i] = (float)(sigma / 2.0) * g[i];
    return sigma;
}

static void test_wrong_elements_are_counted(void **state) {
    (void)state;
    muonshard_config *config;
    assert_int_equal(muonshard_config_create(&config), MUONSHARD_OK);
    bench b = {.settings = config_settings(config)};
    for (int tall = 0; tall < 2; tall++) {
        const size_t rows = tall ? COLS : ROWS, cols = tall ? ROWS : COLS;
        float g[COUNT], u[COUNT], scaled[COUNT];
        const double sigma = known(g, u, rows, cols);
        double wrong = -1.0;
        assert_int_equal(bench_compare(&b, g, u, rows, cols, NS_FP32, false, &wrong), 0);
        assert_true(wrong == 0.0);
        for (size_t i = 0; i < COUNT; i++)
            scaled[i] = 7.0F * u[i];
        assert_int_equal(bench_compare(&b, g, scaled, rows, cols, NS_FP32, true, &wrong), 0);
        assert_true(wrong == 0.0);
        assert_int_equal(bench_compare(&b, g, scaled, rows, cols, NS_FP32, false, &wrong), 0);
        assert_true(wrong == ROWS);
        u[3] += (float)(0.01 * sigma);
        u[7] = NAN;
        assert_int_equal(bench_compare(&b, g, u, rows, cols, NS_FP32, false, &wrong), 0);
        assert_true(wrong == 2.0);
        assert_int_equal(bench_compare(&b, g, u, rows, cols, NS_BF16, false, &wrong), 0);
        assert_true(wrong == 1.0);
    }
    assert_int_equal(muonshard_config_set(config, "norm", "aol"), MUONSHARD_OK);
    float g[COUNT], u[COUNT];
    double wrong = 0.0;
    known(g, u, ROWS, COLS);
    assert_int_equal(bench_compare(&b, g, u, ROWS, COLS, NS_FP32, false, &wrong), 0);
    assert_true(isnan(wrong));
    muonshard_config_destroy(config);
}

/* ---- random numbers ---- */

enum { NUMBERS = 1 << 20 };

/* Moments of the sum of four uniform numbers, scaled to a variance of 1: the fourth is 2.7, and
 * nothing is beyond 2 sqrt(3). Bounds are five deviations of such a mean. */
static void test_numbers_are_nearly_normal(void **state) {
    (void)state;
    float *numbers = malloc(NUMBERS * sizeof *numbers);
    assert_non_null(numbers);
    uint64_t key = 7;
    bench_normal(numbers, NUMBERS, &key);
    double mean = 0.0, second = 0.0, fourth = 0.0, next = 0.0;
    for (size_t i = 0; i < NUMBERS; i++) {
        const double x = (double)numbers[i];
        assert_true(fabs(x) <= 2.0 * sqrt(3.0));
        mean += x / NUMBERS;
        second += x * x / NUMBERS;
        fourth += x * x * x * x / NUMBERS;
        next += i ? x * (double)numbers[i - 1] / NUMBERS : 0.0;
    }
    assert_true(fabs(mean) < 5.0 / sqrt(NUMBERS));
    assert_true(fabs(next) < 5.0 / sqrt(NUMBERS));
    assert_true(fabs(second - 1.0) < 5.0 * sqrt(1.7 / NUMBERS));
    assert_true(fabs(fourth - 2.7) < 0.05);
    /* In pieces they are the same. */
    float pieces[100];
    key = 7;
    bench_normal(pieces, 33, &key);
    bench_normal(pieces + 33, 67, &key);
    assert_memory_equal(pieces, numbers, sizeof pieces);
    free(numbers);
}

/* ---- the link ---- */

enum { RANKS = 3, PART = 5000 };
#define BANDWIDTH 1e6
#define LATENCY   2e-3

typedef struct outcome {
    bool right;
    double seconds, busy;
} outcome;

static void over_a_link(muonshard_comm *comm, void *arg) {
    outcome *o = (outcome *)arg + comm->rank;
    muonshard_comm *slow = NULL;
    static const char letters[] = "abc";
    char send[PART], recv[2][RANKS * PART];
    memset(send, letters[comm->rank], sizeof send);
    if (bench_link_create(comm, BANDWIDTH, LATENCY, &slow))
        return;
    /* Two at a time take turns. */
    comm_ticket tickets[2];
    const double start = command_now_s();
    bool ok = true;
    comm_part parts[2];
    for (int i = 0; i < 2; i++) {
        parts[i] = (comm_part){.send = send, .recv = recv[i], .bytes = PART};
        const comm_request request = {
            .kind = COMM_ALL_GATHER, .parts = &parts[i], .part_count = 1, .stream = STREAM_COMM};
        ok = comm_start(slow, &request, &tickets[i]) == MUONSHARD_OK && ok;
    }
    for (int i = 0; i < 2; i++)
        ok = comm_wait(slow, &tickets[i], 20.0) == MUONSHARD_OK && ok;
    o->seconds = command_now_s() - start;
    o->busy = bench_link_busy(slow);
    for (int i = 0; i < 2 * RANKS * PART; i++)
        ok = ok && recv[i / (RANKS * PART)][i % (RANKS * PART)] == letters[i / PART % RANKS];
    o->right = ok;
    threads_barrier(comm);
    muonshard_comm_destroy(slow);
}

static void test_link_takes_its_time(void **state) {
    (void)state;
    outcome outcomes[RANKS] = {{0}};
    assert_int_equal(threads_run(RANKS, over_a_link, outcomes), MUONSHARD_OK);
    const double expected = 2.0 * (LATENCY + PART * (RANKS - 1) / BANDWIDTH);
    for (int r = 0; r < RANKS; r++) {
        assert_true(outcomes[r].right);
        assert_true(fabs(outcomes[r].busy - expected) < 1e-9);
        assert_true(outcomes[r].seconds >= expected);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_wrong_elements_are_counted),
        cmocka_unit_test(test_numbers_are_nearly_normal),
        cmocka_unit_test(test_link_takes_its_time),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
