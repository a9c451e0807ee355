/* The compiled program and the host backend against the oracle: the exact polynomial of the
 * singular values of the same input, and the bits the backend promises. */
#include "kernels/backend.h" /* before cmocka.h, whose macro `fail` would hide a function */
#include "optim/newton_schulz.h"
#include "oracle.h"

#include <stdarg.h>
#include <setjmp.h>
#include <cmocka.h>

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const int64_t shapes[][2] = {{1, 1},   {1, 50},   {50, 1},   {7, 13},   {31, 17},
                                    {64, 64}, {48, 160}, {160, 48}, {128, 512}};
enum { SHAPES = sizeof shapes / sizeof shapes[0], GUARD = 64 };

static settings settings_of(oracle_set set, ns_norm norm, double eps) {
    settings s = {0};
    s.norm = (int)norm;
    s.norm_eps = eps;
    s.coefficients = set == ORACLE_SIMPLE ? COEFFICIENTS_SIMPLE : COEFFICIENTS_QUINTIC;
    s.coefficient_safety = 1.0;
    s.ns_steps = 5;
    s.ns_dtype = NS_DTYPE_FP32;
    s.ns_form = NS_FORM_STANDARD;
    return s;
}

static backend *open_host(void) {
    backend *host = NULL;
    error_text error;
    assert_int_equal(backend_open_host(&host, &error), MUONSHARD_OK);
    return host;
}

static void poison(float *x, size_t count) {
    for (size_t i = 0; i < count; i++)
        x[i] = NAN;
}

/* Runs a program over `count` matrices, each [r, c] in u[i] and replaced there; the workspace is
 * NaN before, and what lies around the matrices is looked at after. */
static void run_program(backend *host, const ns_program *program, int64_t r, int64_t c, float **u,
                        size_t count) {
    bool transposed = r > c;
    int64_t m = transposed ? c : r, n = transposed ? r : c;
    size_t elements = (size_t)(r * c), bytes = elements * sizeof(float);
    orthogonalize_item *items = calloc(count, sizeof *items);
    float **padded = calloc(count, sizeof *padded);
    assert_non_null(items);
    assert_non_null(padded);
    for (size_t i = 0; i < count; i++) {
        padded[i] = malloc(bytes + 2 * GUARD * sizeof(float));
        assert_non_null(padded[i]);
        poison(padded[i], elements + 2 * GUARD);
        memcpy(padded[i] + GUARD, u[i], bytes);
        items[i] = (orthogonalize_item){padded[i] + GUARD, transposed};
    }
    void *workspace = NULL;
    size_t size = host->ops->orthogonalize_workspace(host, program, m, n, count);
    if (size > 0) {
        assert_int_equal(host->ops->alloc(host, &workspace, size), MUONSHARD_OK);
        poison(workspace, size / sizeof(float));
    }
    muonshard_status status =
        host->ops->orthogonalize(host, NULL, program, m, n, items, count, workspace);
    assert_int_equal(status, MUONSHARD_OK);
    for (size_t i = 0; i < count; i++) {
        for (size_t k = 0; k < GUARD; k++)
            assert_true(isnan(padded[i][k]) && isnan(padded[i][GUARD + elements + k]));
        memcpy(u[i], padded[i] + GUARD, bytes);
        free(padded[i]);
    }
    if (workspace != NULL)
        host->ops->free(host, workspace);
    free(padded);
    free(items);
}

static void orthogonalize(backend *host, const settings *s, int64_t r, int64_t c, float **u,
                          size_t count) {
    ns_program program;
    error_text error;
    muonshard_status status =
        newton_schulz_compile(s, r < c ? r : c, r < c ? c : r, &program, &error);
    assert_int_equal(status, MUONSHARD_OK);
    run_program(host, &program, r, c, u, count);
}

static float *copy_of(const float *x, size_t count) {
    float *copy = malloc(count * sizeof *copy);
    assert_non_null(copy);
    memcpy(copy, x, count * sizeof *copy);
    return copy;
}

static float *matrix_of(int64_t r, int64_t c, oracle_spectrum spectrum, oracle_rng *rng) {
    float *x = malloc((size_t)(r * c) * sizeof *x);
    assert_non_null(x);
    oracle_matrix(x, r, c, spectrum, rng);
    return x;
}

static float *transpose_of(const float *x, int64_t r, int64_t c) {
    float *t = malloc((size_t)(r * c) * sizeof *t);
    assert_non_null(t);
    for (int64_t i = 0; i < r; i++)
        for (int64_t j = 0; j < c; j++)
            t[j * r + i] = x[i * c + j];
    return t;
}

/* What x [r, c] should become, oriented so that rows <= columns, and how it is compared. */
typedef struct reference {
    oracle_svd svd;
    double *x, *exact, *got; /* [m, n] */
    int64_t r, c, m, n;
} reference;

static void to_oriented(const reference *ref, const float *x, double *out) {
    for (int64_t i = 0; i < ref->m; i++)
        for (int64_t j = 0; j < ref->n; j++)
            out[i * ref->n + j] = (double)(ref->r > ref->c ? x[j * ref->c + i] : x[i * ref->c + j]);
}

static reference reference_of(const float *x, int64_t r, int64_t c) {
    reference ref = {.r = r, .c = c, .m = r < c ? r : c, .n = r < c ? c : r};
    size_t count = (size_t)(r * c);
    ref.x = calloc(count, sizeof(double));
    ref.exact = calloc(count, sizeof(double));
    ref.got = calloc(count, sizeof(double));
    assert_non_null(ref.x);
    assert_non_null(ref.exact);
    assert_non_null(ref.got);
    to_oriented(&ref, x, ref.x);
    ref.svd = oracle_svd_of(ref.x, ref.m, ref.n);
    return ref;
}

static double reference_error(reference *ref, oracle_set set, oracle_norm norm, double eps,
                              const float *u) {
    size_t count = (size_t)(ref->r * ref->c);
    oracle_polynomial p = oracle_coefficients(set, 5, 1.0, true);
    double factor = oracle_norm_factor(norm, eps, ref->x, count);
    oracle_polynomial_svd(&p, &ref->svd, factor, ref->exact);
    to_oriented(ref, u, ref->got);
    return oracle_relative_error(ref->got, ref->exact, count);
}

static void reference_free(reference *ref) {
    oracle_svd_free(&ref->svd);
    free(ref->x);
    free(ref->exact);
    free(ref->got);
}

static double tolerance_of(oracle_spectrum spectrum) {
    return spectrum == ORACLE_GAUSSIAN ? 1e-5 : 5e-4;
}

static void test_exact_polynomial(void **state) {
    (void)state;
    static const struct {
        ns_norm library;
        oracle_norm oracle;
        double eps;
    } norms[] = {{NS_NORM_FROBENIUS_ADD, ORACLE_FROBENIUS_ADD, 1e-7},
                 {NS_NORM_FROBENIUS_MAX, ORACLE_FROBENIUS_MAX, 1e-7},
                 {NS_NORM_FROBENIUS_ADD, ORACLE_FROBENIUS_ADD, 3.0},
                 {NS_NORM_FROBENIUS_MAX, ORACLE_FROBENIUS_MAX, 300.0}};
    static const char *const set_names[] = {"simple", "quintic"};
    backend *host = open_host();
    oracle_rng rng = {10};
    for (int spectrum = 0; spectrum < ORACLE_ZERO; spectrum++) {
        double worst[2] = {0.0, 0.0};
        for (int k = 0; k < SHAPES; k++) {
            int64_t r = shapes[k][0], c = shapes[k][1];
            size_t count = (size_t)(r * c);
            float *x = matrix_of(r, c, (oracle_spectrum)spectrum, &rng);
            reference ref = reference_of(x, r, c);
            for (int set = ORACLE_SIMPLE; set <= ORACLE_QUINTIC; set++) {
                for (size_t k_norm = 0; k_norm < sizeof norms / sizeof norms[0]; k_norm++) {
                    double eps = norms[k_norm].eps;
                    settings s = settings_of((oracle_set)set, norms[k_norm].library, eps);
                    float *u = copy_of(x, count);
                    orthogonalize(host, &s, r, c, &u, 1);
                    double error =
                        reference_error(&ref, (oracle_set)set, norms[k_norm].oracle, eps, u);
                    if (!(error <= tolerance_of((oracle_spectrum)spectrum)))
                        fail_msg("%s, %s, %lld x %lld, norm %zu: relative error %.3e",
                                 oracle_spectrum_name((oracle_spectrum)spectrum), set_names[set],
                                 (long long)r, (long long)c, k_norm, error);
                    worst[set] = fmax(worst[set], error);
                    free(u);
                }
            }
            reference_free(&ref);
            free(x);
        }
        print_message("worst relative error, %-10s: simple %.2e, quintic %.2e\n",
                      oracle_spectrum_name((oracle_spectrum)spectrum), worst[0], worst[1]);
    }
    backend_close(host);
}

/* The fp32 sum of squares of these overflows or vanishes; their direction doesn't. */
static void test_extreme_scales(void **state) {
    (void)state;
    static const double factors[] = {1e-30, 1e-22, 1e18, 1e30, 3e37};
    static const int64_t sizes[][2] = {{64, 64}, {31, 17}, {1, 50}};
    backend *host = open_host();
    oracle_rng rng = {11};
    for (size_t k = 0; k < sizeof sizes / sizeof sizes[0]; k++) {
        for (size_t f = 0; f < sizeof factors / sizeof factors[0]; f++) {
            int64_t r = sizes[k][0], c = sizes[k][1];
            float *u = matrix_of(r, c, ORACLE_GAUSSIAN, &rng);
            for (int64_t i = 0; i < r * c; i++)
                u[i] = (float)((double)u[i] * factors[f]);
            reference ref = reference_of(u, r, c);
            settings s = settings_of(ORACLE_SIMPLE, NS_NORM_FROBENIUS_MAX, 1e-37);
            orthogonalize(host, &s, r, c, &u, 1);
            double error = reference_error(&ref, ORACLE_SIMPLE, ORACLE_FROBENIUS_MAX, 1e-37, u);
            if (!(error <= 1e-5))
                fail_msg("input of size %g, %lld x %lld: relative error %.3e", factors[f],
                         (long long)r, (long long)c, error);
            reference_free(&ref);
            free(u);
        }
    }
    backend_close(host);
}

/* Below eps the update shrinks with the gradient, linearly: p'(0) x / eps. */
static void test_far_below_eps(void **state) {
    (void)state;
    backend *host = open_host();
    oracle_rng rng = {12};
    for (int norm = 0; norm < 2; norm++) {
        float *x = matrix_of(13, 29, ORACLE_GAUSSIAN, &rng);
        for (int i = 0; i < 13 * 29; i++)
            x[i] *= 1e-20F;
        float *u = copy_of(x, 13 * 29);
        settings s = settings_of(ORACLE_SIMPLE, (ns_norm)norm, 1e-7);
        orthogonalize(host, &s, 13, 29, &u, 1);
        double slope = pow(3.4445, 5) / 1e-7;
        for (int i = 0; i < 13 * 29; i++)
            if (!(fabs((double)u[i] - slope * (double)x[i]) <= 1e-5 * slope * fabs((double)x[i])))
                fail_msg("norm %d, entry %d: %g, expected %g", norm, i, (double)u[i],
                         slope * (double)x[i]);
        free(u);
        free(x);
    }
    backend_close(host);
}

static void test_zero_stays_zero(void **state) {
    (void)state;
    backend *host = open_host();
    static const double eps[] = {1e-7, 1e-15, 1e-30, 0.0};
    for (int k = 0; k < SHAPES; k++) {
        for (int norm = 0; norm < 2; norm++) {
            for (size_t e = 0; e < sizeof eps / sizeof eps[0]; e++) {
                size_t count = (size_t)(shapes[k][0] * shapes[k][1]);
                float *u = calloc(count, sizeof *u);
                assert_non_null(u);
                settings s = settings_of(ORACLE_QUINTIC, (ns_norm)norm, eps[e]);
                orthogonalize(host, &s, shapes[k][0], shapes[k][1], &u, 1);
                for (size_t i = 0; i < count; i++)
                    assert_true(u[i] == 0.0F); /* NaN isn't */
                free(u);
            }
        }
    }
    backend_close(host);
}

static void test_transpose_to_the_bit(void **state) {
    (void)state;
    backend *host = open_host();
    oracle_rng rng = {13};
    settings s = settings_of(ORACLE_SIMPLE, NS_NORM_FROBENIUS_ADD, 1e-7);
    for (int k = 0; k < SHAPES; k++) {
        int64_t r = shapes[k][0], c = shapes[k][1];
        if (r == c && r > 1) /* square matrices are never turned */
            continue;
        float *u = matrix_of(r, c, ORACLE_GAUSSIAN, &rng), *t = transpose_of(u, r, c);
        orthogonalize(host, &s, r, c, &u, 1);
        orthogonalize(host, &s, c, r, &t, 1);
        float *back = transpose_of(t, c, r);
        assert_memory_equal(u, back, (size_t)(r * c) * sizeof *u);
        free(u);
        free(t);
        free(back);
    }
    backend_close(host);
}

static void test_batched_equals_single_to_the_bit(void **state) {
    (void)state;
    enum { BATCH = 7 };
    backend *host = open_host();
    oracle_rng rng = {14};
    settings s = settings_of(ORACLE_QUINTIC, NS_NORM_FROBENIUS_MAX, 1e-7);
    for (int k = 0; k < SHAPES; k++) {
        int64_t r = shapes[k][0], c = shapes[k][1];
        size_t bytes = (size_t)(r * c) * sizeof(float);
        float *batch[BATCH], *single[BATCH];
        for (int i = 0; i < BATCH; i++) { /* one of each spectrum, the zero matrix too */
            batch[i] = matrix_of(r, c, (oracle_spectrum)i, &rng);
            single[i] = copy_of(batch[i], (size_t)(r * c));
        }
        orthogonalize(host, &s, r, c, batch, BATCH);
        for (int i = 0; i < BATCH; i++) {
            orthogonalize(host, &s, r, c, &single[i], 1);
            assert_memory_equal(batch[i], single[i], bytes);
            free(batch[i]);
            free(single[i]);
        }
    }
    backend_close(host);
}

/* A batch may hold matrices of both orientations. */
static void test_mixed_orientations_in_one_batch(void **state) {
    (void)state;
    backend *host = open_host();
    oracle_rng rng = {15};
    settings s = settings_of(ORACLE_SIMPLE, NS_NORM_FROBENIUS_ADD, 1e-7);
    float *wide = matrix_of(7, 13, ORACLE_GAUSSIAN, &rng), *tall = transpose_of(wide, 7, 13);
    ns_program program;
    error_text error;
    assert_int_equal(newton_schulz_compile(&s, 7, 13, &program, &error), MUONSHARD_OK);
    void *workspace = NULL;
    size_t size = host->ops->orthogonalize_workspace(host, &program, 7, 13, 2);
    assert_int_equal(host->ops->alloc(host, &workspace, size), MUONSHARD_OK);
    poison(workspace, size / sizeof(float));
    const orthogonalize_item items[2] = {{tall, true}, {wide, false}};
    assert_int_equal(host->ops->orthogonalize(host, NULL, &program, 7, 13, items, 2, workspace),
                     MUONSHARD_OK);
    float *back = transpose_of(tall, 13, 7);
    assert_memory_equal(wide, back, 7 * 13 * sizeof *wide);
    assert_true(fabs((double)wide[0]) > 0.0);
    host->ops->free(host, workspace);
    free(wide);
    free(tall);
    free(back);
    backend_close(host);
}

static void test_skip_leaves_the_matrix(void **state) {
    (void)state;
    backend *host = open_host();
    oracle_rng rng = {17};
    settings s = settings_of(ORACLE_SIMPLE, NS_NORM_FROBENIUS_ADD, 1e-7);
    float *u = matrix_of(5, 8, ORACLE_GAUSSIAN, &rng), *before = copy_of(u, 5 * 8);
    ns_program program;
    error_text error;
    assert_int_equal(newton_schulz_compile(&s, 5, 8, &program, &error), MUONSHARD_OK);
    void *workspace = NULL;
    size_t size = host->ops->orthogonalize_workspace(host, &program, 5, 8, 1);
    assert_int_equal(host->ops->alloc(host, &workspace, size), MUONSHARD_OK);
    step_record record = {.skip = 1};
    const orthogonalize_item item = {u, false};
    for (int skip = 1; skip >= 0; skip--) {
        record.skip = skip;
        assert_int_equal(
            host->ops->orthogonalize(host, &record, &program, 5, 8, &item, 1, workspace),
            MUONSHARD_OK);
        assert_int_equal(memcmp(u, before, 5 * 8 * sizeof *u) == 0, skip);
    }
    host->ops->free(host, workspace);
    free(u);
    free(before);
    backend_close(host);
}

/* B = 2 A A^T + 3 A, A = X X^T, read without touching its bits: Y = B X with X = [1 | R] has B in
 * its first columns. */
static void test_symmetric_products_mirror_to_the_bit(void **state) {
    (void)state;
    static const int64_t sizes[][2] = {{5, 12}, {37, 90}, {64, 160}, {96, 96 + 33}};
    backend *host = open_host();
    oracle_rng rng = {16};
    for (size_t k = 0; k < sizeof sizes / sizeof sizes[0]; k++) {
        for (int depth = 1; depth <= 2; depth++) {
            int64_t m = sizes[k][0], n = sizes[k][1];
            ns_program program = {.count = 0, .result = NS_Y};
            program.code[program.count++] = (ns_instruction){.kind = NS_SYMMETRIC_PRODUCT,
                                                             .dst = NS_A,
                                                             .a = NS_X,
                                                             .b = NS_NONE,
                                                             .c = NS_NONE,
                                                             .alpha = 1.0F};
            program.code[program.count++] = (ns_instruction){.kind = NS_SYMMETRIC_PRODUCT,
                                                             .dst = NS_B,
                                                             .a = NS_A,
                                                             .b = NS_NONE,
                                                             .c = NS_A,
                                                             .alpha = 2.0F,
                                                             .beta = 3.0F};
            program.code[program.count++] = (ns_instruction){.kind = NS_PRODUCT,
                                                             .dst = NS_Y,
                                                             .a = depth == 1 ? NS_A : NS_B,
                                                             .b = NS_X,
                                                             .c = NS_NONE,
                                                             .alpha = 1.0F};
            float *x = matrix_of(m, n, ORACLE_GAUSSIAN, &rng);
            for (int64_t i = 0; i < m; i++)
                for (int64_t j = 0; j < n; j++)
                    x[i * n + j] = j < m ? (i == j ? 1.0F : 0.0F) : 0.1F * x[i * n + j];
            float *y = copy_of(x, (size_t)(m * n));
            run_program(host, &program, m, n, &y, 1);
            for (int64_t i = 0; i < m; i++)
                for (int64_t j = 0; j < m; j++)
                    assert_true(y[i * n + j] == y[j * n + i]);

            double *a = calloc((size_t)(m * m), sizeof *a), *b = calloc((size_t)(m * m), sizeof *b);
            double *got = calloc((size_t)(m * m), sizeof *got);
            assert_non_null(a);
            assert_non_null(b);
            assert_non_null(got);
            for (int64_t i = 0; i < m; i++)
                for (int64_t j = 0; j < m; j++) {
                    got[i * m + j] = (double)y[i * n + j];
                    for (int64_t l = 0; l < n; l++)
                        a[i * m + j] += (double)x[i * n + l] * (double)x[j * n + l];
                }
            for (int64_t i = 0; i < m; i++)
                for (int64_t j = 0; j < m; j++) {
                    b[i * m + j] = 3.0 * a[i * m + j];
                    for (int64_t l = 0; l < m; l++)
                        b[i * m + j] += 2.0 * a[i * m + l] * a[j * m + l];
                }
            double error = oracle_relative_error(got, depth == 1 ? a : b, (size_t)(m * m));
            assert_true(error <= 1e-6);
            free(a);
            free(b);
            free(got);
            free(x);
            free(y);
        }
    }
    backend_close(host);
}

static void test_flops_of_the_standard_form(void **state) {
    (void)state;
    settings s = settings_of(ORACLE_SIMPLE, NS_NORM_FROBENIUS_ADD, 1e-7);
    ns_program program;
    error_text error;
    assert_int_equal(newton_schulz_compile(&s, 32, 96, &program, &error), MUONSHARD_OK);
    /* T (3a + 1) m^3 with a = n/m: the published count for symmetric products */
    double expected = 5.0 * (3.0 * 3.0 + 1.0) * 32.0 * 32.0 * 32.0;
    assert_true(fabs(ns_program_flops(&program, 32, 96) / expected - 1.0) < 1e-12);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_exact_polynomial),
        cmocka_unit_test(test_extreme_scales),
        cmocka_unit_test(test_far_below_eps),
        cmocka_unit_test(test_zero_stays_zero),
        cmocka_unit_test(test_transpose_to_the_bit),
        cmocka_unit_test(test_batched_equals_single_to_the_bit),
        cmocka_unit_test(test_mixed_orientations_in_one_batch),
        cmocka_unit_test(test_skip_leaves_the_matrix),
        cmocka_unit_test(test_symmetric_products_mirror_to_the_bit),
        cmocka_unit_test(test_flops_of_the_standard_form),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
