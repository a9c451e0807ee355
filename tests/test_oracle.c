/* The oracle against mathematics: published bounds, identities, closed forms. What the library is
 * compared with must not be taken on trust. */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

#include <math.h>
#include <string.h>
#include <stdlib.h>
#include "oracle_optimizer.h"

#define assert_below(value, limit) assert_below_at(value, limit, #value, __LINE__)

static void assert_below_at(double value, double limit, const char *what, int line) {
    if (!(value <= limit)) /* NaN fails */
        fail_msg("line %d: %s is %.3e, more than %.3e", line, what, value, limit);
}

static double *numbers(int64_t count) {
    double *x = calloc((size_t)count, sizeof *x);
    assert_non_null(x);
    return x;
}

/* [low, high] is rounded outward at the fourth digit: both ends have to be met that closely too. */
static void assert_range(const oracle_polynomial *p, double low, double high) {
    double smallest = INFINITY, largest = -INFINITY;
    for (int i = 0; i <= 1000000; i++) {
        double out = oracle_polynomial_at(p, 0.01 + 0.99 * i / 1e6);
        smallest = fmin(smallest, out);
        largest = fmax(largest, out);
    }
    assert_true(smallest >= low && smallest < low + 1.01e-4);
    assert_true(largest <= high && largest > high - 1.01e-4);
}

/* What docs/algorithms.md says of the sets, from the formula alone. */
static void test_bounds_of_the_coefficient_sets(void **state) {
    (void)state;
    static const struct {
        oracle_set set;
        int steps;
        double low, high;
    } cases[] = {
        {ORACLE_SIMPLE, 5, 0.6818, 1.1344},
        {ORACLE_QUINTIC, 5, 0.9777, 1.0318},
        {ORACLE_POLAR_EXPRESS, 5, 0.8764, 1.1236},
        {ORACLE_POLAR_EXPRESS_NVIDIA, 8, 0.9999, 1.0001},
        {ORACLE_CANS, 5, 0.8843, 1.1199},
        {ORACLE_AOL4, 4, 0.9409, 1.0501},
        {ORACLE_TURBO, 4, 0.9726, 1.1451},
        {ORACLE_POLAR_EXPRESS_SPEEDRUN, 5, 0.8588, 1.1412},
        {ORACLE_DEEPSEEKV4, 10, 0.9999, 1.0006},
        {ORACLE_CUBIC5, 5, 0.7741, 1.3001},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const oracle_polynomial p = oracle_coefficients(cases[i].set, cases[i].steps, 1.0, false);
        assert_range(&p, cases[i].low, cases[i].high);
    }
    const oracle_polynomial safe = oracle_coefficients_powers(ORACLE_POLAR_EXPRESS, 5, 1.05, false);
    assert_range(&safe, 0.8460, 1.1236);
}

static void test_slope_at_zero_is_the_product_of_a(void **state) {
    (void)state;
    oracle_polynomial p = oracle_coefficients(ORACLE_SIMPLE, 5, 1.0, false);
    assert_below(fabs(oracle_polynomial_at(&p, 1e-9) / (1e-9 * pow(3.4445, 5)) - 1.0), 1e-9);
    p = oracle_coefficients(ORACLE_QUINTIC, 6, 1.0, false); /* the sixth step is the first again */
    double slope = 4.0848 * 3.9505 * 3.7418 * 2.8769 * 2.8366 * 4.0848;
    assert_below(fabs(oracle_polynomial_at(&p, 1e-9) / (1e-9 * slope) - 1.0), 1e-9);
    p = oracle_coefficients(ORACLE_SIMPLE, 1, 1.02, false);
    assert_below(fabs(oracle_polynomial_at(&p, 1.0) - (3.4445 - 4.7750 + 2.0315) / 1.02), 1e-14);
}

static const int64_t shapes[][2] = {{1, 1}, {1, 9}, {7, 13}, {17, 31}, {24, 24}, {16, 80}};
enum { SHAPES = sizeof shapes / sizeof shapes[0] };

static void test_svd_reconstructs(void **state) {
    (void)state;
    oracle_rng rng = {1};
    for (int k = 0; k < SHAPES; k++) {
        for (int spectrum = 0; spectrum < ORACLE_ZERO; spectrum++) {
            int64_t m = shapes[k][0], n = shapes[k][1];
            float *x = calloc((size_t)(m * n), sizeof *x);
            assert_non_null(x);
            double *wide = numbers(m * n), *back = numbers(m * n), *gram = numbers(m * m);
            oracle_matrix(x, m, n, (oracle_spectrum)spectrum, &rng);
            double largest = 0.0;
            for (int64_t i = 0; i < m * n; i++) {
                wide[i] = (double)x[i];
                largest += wide[i] * wide[i];
            }
            oracle_svd svd = oracle_svd_of(wide, m, n);
            for (int64_t i = 0; i < m; i++) {
                for (int64_t l = 0; l < m; l++) { /* u u^T = 1 */
                    for (int64_t j = 0; j < m; j++)
                        gram[i * m + l] += svd.u[i * m + j] * svd.u[l * m + j];
                    assert_below(fabs(gram[i * m + l] - (i == l ? 1.0 : 0.0)), 1e-13);
                    double across = 0.0; /* rows of `right` are orthogonal, lengths sigma */
                    for (int64_t j = 0; j < n; j++)
                        across += svd.right[i * n + j] * svd.right[l * n + j];
                    double expect = i == l ? svd.sigma[i] * svd.sigma[i] : 0.0;
                    assert_below(fabs(across - expect), 1e-14 * largest);
                }
                assert_true(i == 0 || svd.sigma[i] <= svd.sigma[i - 1]);
                for (int64_t j = 0; j < n; j++)
                    for (int64_t l = 0; l < m; l++)
                        back[i * n + j] += svd.u[i * m + l] * svd.right[l * n + j];
            }
            assert_below(oracle_relative_error(back, wide, (size_t)(m * n)), 1e-13);
            oracle_svd_free(&svd);
            free(x);
            free(wide);
            free(back);
            free(gram);
        }
    }
}

static void test_generator_has_the_spectrum_asked_for(void **state) {
    (void)state;
    oracle_rng rng = {2};
    double sigma[12], x[12 * 20];
    for (int i = 0; i < 12; i++)
        sigma[i] = pow(10.0, -0.5 * i);
    oracle_matrix_with(x, 12, 20, sigma, &rng);
    oracle_svd svd = oracle_svd_of(x, 12, 20);
    for (int i = 0; i < 12; i++)
        assert_below(fabs(svd.sigma[i] - sigma[i]), 1e-14);
    oracle_svd_free(&svd);
}

static void test_ranks_are_exact(void **state) {
    (void)state;
    oracle_rng rng = {3};
    float x[32 * 40];
    double wide[32 * 40];
    static const int rank[] = {[ORACLE_LOW_RANK] = 8, [ORACLE_RANK_ONE] = 1, [ORACLE_CONSTANT] = 1};
    for (int spectrum = ORACLE_LOW_RANK; spectrum <= ORACLE_CONSTANT; spectrum++) {
        if (spectrum == ORACLE_SPIKE)
            continue;
        oracle_matrix(x, 32, 40, (oracle_spectrum)spectrum, &rng);
        for (int i = 0; i < 32 * 40; i++)
            wide[i] = (double)x[i];
        oracle_svd svd = oracle_svd_of(wide, 32, 40);
        assert_true(svd.sigma[rank[spectrum] - 1] > 1e-2 * svd.sigma[0]);
        assert_below(svd.sigma[rank[spectrum]], 1e-14 * svd.sigma[0]);
        oracle_svd_free(&svd);
    }
}

/* Two ways to the same matrix: through singular values, and by the recursion. */
static void test_polynomial_by_svd_equals_recursion(void **state) {
    (void)state;
    oracle_rng rng = {4};
    for (int k = 0; k < SHAPES; k++) {
        for (int spectrum = 0; spectrum < ORACLE_SPECTRUM_COUNT; spectrum++) {
            for (int set = ORACLE_SIMPLE; set <= ORACLE_QUINTIC; set++) {
                int64_t m = shapes[k][0], n = shapes[k][1];
                size_t count = (size_t)(m * n);
                float *x = calloc(count, sizeof *x);
                assert_non_null(x);
                double *wide = numbers(m * n), *by_svd = numbers(m * n),
                       *by_matrix = numbers(m * n);
                oracle_matrix(x, m, n, (oracle_spectrum)spectrum, &rng);
                for (size_t i = 0; i < count; i++)
                    wide[i] = (double)x[i];
                double factor = oracle_norm_factor(ORACLE_FROBENIUS_ADD, 1e-7, wide, count);
                oracle_polynomial p = oracle_coefficients((oracle_set)set, 5, 1.0, true);
                oracle_svd svd = oracle_svd_of(wide, m, n);
                oracle_polynomial_svd(&p, &svd, factor, by_svd);
                for (size_t i = 0; i < count; i++)
                    wide[i] *= factor;
                oracle_polynomial_recursion(&p, wide, m, n, by_matrix);
                assert_below(oracle_relative_error(by_matrix, by_svd, count), 1e-10);
                oracle_svd_free(&svd);
                free(x);
                free(wide);
                free(by_svd);
                free(by_matrix);
            }
        }
    }
}

static void test_recursion_of_transpose_is_transpose(void **state) {
    (void)state;
    oracle_rng rng = {5};
    double x[5 * 9], transposed[9 * 5];
    for (int i = 0; i < 5; i++)
        for (int j = 0; j < 9; j++)
            x[i * 9 + j] = transposed[j * 5 + i] = 0.1 * oracle_normal(&rng);
    oracle_polynomial p = oracle_coefficients(ORACLE_QUINTIC, 5, 1.0, false);
    oracle_polynomial_recursion(&p, x, 5, 9, x);
    oracle_polynomial_recursion(&p, transposed, 9, 5, transposed);
    for (int i = 0; i < 5; i++)
        for (int j = 0; j < 9; j++)
            assert_true(x[i * 9 + j] == transposed[j * 5 + i]);
}

static void test_norm_factors(void **state) {
    (void)state;
    const double x[2] = {3.0, 4.0}, none[2] = {0.0, 0.0};
    assert_true(oracle_norm_factor(ORACLE_FROBENIUS_ADD, 1.0, x, 2) == 1.0 / 6.0);
    assert_true(oracle_norm_factor(ORACLE_FROBENIUS_MAX, 1.0, x, 2) == 1.0 / 5.0);
    assert_true(oracle_norm_factor(ORACLE_FROBENIUS_MAX, 8.0, x, 2) == 1.0 / 8.0);
    assert_true(oracle_norm_factor(ORACLE_FROBENIUS_MAX, 8.0, none, 2) == 1.0 / 8.0);
}

static void test_scale_factors(void **state) {
    (void)state;
    assert_true(oracle_scale_factor(ORACLE_SCALE_NONE, 36, 4) == 1.0);
    assert_true(oracle_scale_factor(ORACLE_SCALE_SHAPE, 36, 4) == 3.0);
    assert_true(oracle_scale_factor(ORACLE_SCALE_SHAPE, 4, 36) == 1.0);
    assert_true(oracle_scale_factor(ORACLE_SCALE_RATIO, 4, 36) == sqrt(4.0 / 36.0));
    assert_true(oracle_scale_factor(ORACLE_SCALE_SPECTRAL, 4, 36) == 6.0);
    assert_true(oracle_scale_factor(ORACLE_SCALE_RMS, 36, 4) == 0.2 * 6.0);
    assert_true(oracle_scale_factor(ORACLE_SCALE_FAN_RATIO, 4, 36) == 3.0);
}

/* A constant gradient of 1 for t steps: M is a geometric series. */
static void test_momentum_closed_forms(void **state) {
    (void)state;
    const double mu = 0.95;
    double ball = 0.0, swapped = 0.0, ema = 0.0, plain = 0.0;
    for (int t = 1; t <= 20; t++) {
        double series = (1.0 - pow(mu, t)) / (1.0 - mu);
        double u = oracle_momentum_update(ORACLE_HEAVY_BALL, true, mu, 1, &ball, 1.0);
        assert_below(fabs(u - (1.0 + mu * series)), 1e-12);
        u = oracle_momentum_update(ORACLE_HEAVY_BALL_SWAPPED, true, mu, 1, &swapped, 1.0);
        assert_below(fabs(u - (series + mu)), 1e-12);
        u = oracle_momentum_update(ORACLE_EMA, true, mu, 1, &ema, 1.0);
        assert_below(fabs(u - (1.0 - pow(mu, t + 1))), 1e-12); /* 1-mu + mu (1 - mu^t) */
        u = oracle_momentum_update(ORACLE_EMA, false, mu, 1, &plain, 1.0);
        assert_below(fabs(u - (1.0 - pow(mu, t))), 1e-12);
        assert_true(u == plain && ball == swapped);
    }
}

/* With a constant gradient, both forms of the corrected ema are that gradient. */
static void test_corrected_ema_of_a_constant(void **state) {
    (void)state;
    double plain = 0.0, nesterov = 0.0;
    for (int t = 1; t <= 20; t++) {
        double u = oracle_momentum_update(ORACLE_EMA_CORRECTED, false, 0.9, t, &plain, 3.0);
        assert_below(fabs(u - 3.0), 1e-12);
        u = oracle_momentum_update(ORACLE_EMA_CORRECTED, true, 0.9, t, &nesterov, 3.0);
        double expected =
            3.0 * (0.9 * (1.0 - pow(0.9, t)) / (1.0 - pow(0.9, t + 1)) + 0.1 / (1.0 - pow(0.9, t)));
        assert_below(fabs(u - expected), 1e-12);
    }
}

/* Rows (3, 4) and (6, 8) have means of squares 12.5 and 50. From v = 0 with beta2 = 0.5, v is half
 * of them; the rows become of one length, and the matrix keeps its norm, sqrt(125). */
static void test_normuon_by_hand(void **state) {
    (void)state;
    oracle_preset p = {.variance_beta2 = 0.5, .variance_eps = 1e-12};
    double u[] = {3, 4, 6, 8}, v[2] = {0, 0};
    const double length = sqrt(125.0 / 2.0);
    oracle_normuon(&p, u, 2, 2, v);
    assert_below(fabs(v[0] - 6.25) + fabs(v[1] - 25.0), 1e-12);
    for (int i = 0; i < 4; i++)
        assert_below(fabs(u[i] - (i % 2 ? 0.8 : 0.6) * length), 1e-9);

    /* A floor of 1e6 under v divides by 1000; the norm that is left is below the floor as well. */
    oracle_preset clamped = {.variance_beta2 = 0.5, .variance_eps = 1e6, .variance_clamped = true};
    double small[] = {30, 40, 30, 40}, w[2] = {0, 0};
    oracle_normuon(&clamped, small, 2, 2, w);
    assert_below(fabs(small[0] - 30.0 / 1e3 * sqrt(5000.0) / 1e6), 1e-12);

    /* Wide with `auto`: a column each; (out, in) and (in, out) are each other's transposes. */
    oracle_preset automatic = {.variance_auto = true, .variance_beta2 = 0.5, .variance_eps = 1e-12};
    oracle_preset turned = automatic;
    turned.in_out = true;
    double wide[] = {1, 2, 3, 4, 5, 6}, tall[] = {1, 4, 2, 5, 3, 6}, a[6] = {0}, b[6] = {0};
    oracle_normuon(&automatic, wide, 2, 3, a);
    oracle_normuon(&turned, tall, 3, 2, b);
    assert_below(fabs(a[0] - 0.5 * 17.0 / 2.0), 1e-12);
    for (int i = 0; i < 2; i++)
        for (int j = 0; j < 3; j++)
            assert_below(fabs(wide[i * 3 + j] - tall[j * 2 + i]), 1e-12);
}

static void test_lion_by_hand(void **state) {
    (void)state;
    const oracle_preset p = {.adam_beta1 = 0.5, .adam_beta2 = 0.75};
    double m = 1.0;
    assert_true(oracle_lion_update(&p, 0.1, &m, -3.0) == -0.1); /* 0.5 - 1.5 */
    assert_true(m == 0.0);                                      /* 0.75 - 0.75 */
    assert_true(oracle_lion_update(&p, 0.1, &m, 0.0) == 0.0);
    assert_true(oracle_lion_update(&p, 0.1, &m, 1e-30) == 0.1);
}

static void test_norms_by_hand(void **state) {
    (void)state;
    /* A = X X^T = [[25, 7], [7, 2]]: rows sum to 32 and 9, F(A)^2 = 625 + 98 + 4 */
    const double x[] = {3, 4, 1, 1};
    double aol[4], schatten[4], spectral[] = {0, 3, 0, 0, 0, 2};
    memcpy(aol, x, sizeof x);
    memcpy(schatten, x, sizeof x);
    oracle_normalize(ORACLE_AOL, 1e-7, aol, 2, 2);
    oracle_normalize(ORACLE_SCHATTEN4, 1e-8, schatten, 2, 2);
    oracle_normalize(ORACLE_SPECTRAL, 1.0, spectral, 2, 3);
    for (int i = 0; i < 4; i++) {
        assert_below(fabs(aol[i] - x[i] / sqrt(i < 2 ? 32.0 : 9.0)), 1e-12);
        assert_below(fabs(schatten[i] - x[i] / pow(727.0, 0.25)), 1e-12);
    }
    assert_below(fabs(spectral[1] - 0.75) + fabs(spectral[5] - 0.5), 1e-12);
    double square[] = {3, 1, 4, 1}; /* of a square matrix the rows count, not the columns */
    oracle_normalize(ORACLE_AOL, 1e-7, square, 2, 2);
    assert_below(fabs(square[0] - 3.0 / sqrt(10.0 + 13.0)), 1e-12);
}

static void test_rounding(void **state) {
    (void)state;
    assert_true(oracle_round(ORACLE_BF16, 1.0 + 0x1p-8) == 1.0);
    assert_true(oracle_round(ORACLE_BF16, 1.0 + 3 * 0x1p-8) == 1.0 + 0x1p-6);
    assert_true(oracle_round(ORACLE_FP16, 1.0 + 0x1p-11) == 1.0);
    assert_true(oracle_round(ORACLE_FP16, 0x1p-25) == 0.0);
    assert_true(oracle_round(ORACLE_FP16, -3 * 0x1p-25) == -0x1p-23);
    assert_true(oracle_round(ORACLE_FP32, 1.0 + 0x1p-24) == 1.0);
}

static void test_adam_closed_forms(void **state) {
    (void)state;
    oracle_preset p = oracle_presets[0];
    p.adam_eps = 1e-30;
    for (int form = ORACLE_EPS_OUTSIDE; form <= ORACLE_EPS_INSIDE; form++) {
        p.adam_form = (oracle_adam)form;
        double m = 0.0,
               v = 0.0; /* a constant gradient moves by lr against its sign, at every step */
        for (int t = 1; t <= 10; t++)
            assert_below(fabs(oracle_adam_update(&p, 0.5, t, &m, &v, -3e-4) + 0.5), 1e-12);
    }
    p.adam_eps = 1.0; /* first step, g = 1: the forms differ in what eps is compared with */
    double m = 0.0, v = 0.0;
    p.adam_form = ORACLE_EPS_OUTSIDE;
    assert_below(fabs(oracle_adam_update(&p, 1.0, 1, &m, &v, 1.0) - 0.5), 1e-12);
    m = v = 0.0;
    p.adam_form = ORACLE_EPS_INSIDE;
    double b2 = p.adam_beta2;
    assert_below(
        fabs(oracle_adam_update(&p, 1.0, 1, &m, &v, 1.0) - sqrt(1 - b2) / (sqrt(1 - b2) + 1)),
        1e-12);
}

/* A 1x1 matrix is a scalar: a whole step can be written down. */
static void test_step_of_a_scalar(void **state) {
    (void)state;
    oracle_preset p = oracle_presets[0];
    p.weight_decay = 0.5;
    p.clip_norm = 1.0;
    oracle o = oracle_open(&p, false);
    const oracle_tensor scalar = {
        .dims = 2, .shape = {1, 1}, .lr_multiplier = 1.0, .decay_multiplier = 1.0};
    const float w0 = 2.0F, share[2] = {4.0F, 8.0F};
    oracle_add(&o, &scalar, &w0);
    const float *const grads[2] = {&share[0], &share[1]};
    oracle_outcome outcome = oracle_step(&o, NULL, grads, 2);
    assert_true(!outcome.skipped && outcome.grad_norm == 6.0);
    double clipped = 6.0 / (6.0 + 1e-6);
    assert_below(fabs(outcome.clip_factor - clipped / 6.0), 1e-15);
    double direction = (1.0 - 0.95) * clipped + 0.95 * (0.05 * clipped);
    oracle_polynomial poly = oracle_coefficients(ORACLE_SIMPLE, 5, 1.0, true);
    double u = oracle_polynomial_at(&poly, direction / (direction + 1e-7));
    assert_below(fabs(o.tensors[0].w[0] - (2.0 * (1.0 - 0.02 * 0.5) - 0.02 * u)), 1e-14);

    double w = o.tensors[0].w[0], m = o.tensors[0].m[0];
    const float bad = NAN;
    const float *const bad_grads[2] = {&share[0], &bad};
    outcome = oracle_step(&o, NULL, bad_grads, 2);
    assert_true(outcome.skipped && o.t == 1);
    assert_true(o.tensors[0].w[0] == w && o.tensors[0].m[0] == m);
    oracle_close(&o);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_bounds_of_the_coefficient_sets),
        cmocka_unit_test(test_slope_at_zero_is_the_product_of_a),
        cmocka_unit_test(test_svd_reconstructs),
        cmocka_unit_test(test_generator_has_the_spectrum_asked_for),
        cmocka_unit_test(test_ranks_are_exact),
        cmocka_unit_test(test_polynomial_by_svd_equals_recursion),
        cmocka_unit_test(test_recursion_of_transpose_is_transpose),
        cmocka_unit_test(test_norm_factors),
        cmocka_unit_test(test_scale_factors),
        cmocka_unit_test(test_momentum_closed_forms),
        cmocka_unit_test(test_corrected_ema_of_a_constant),
        cmocka_unit_test(test_normuon_by_hand),
        cmocka_unit_test(test_lion_by_hand),
        cmocka_unit_test(test_norms_by_hand),
        cmocka_unit_test(test_rounding),
        cmocka_unit_test(test_adam_closed_forms),
        cmocka_unit_test(test_step_of_a_scalar),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
