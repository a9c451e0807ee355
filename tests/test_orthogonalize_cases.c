/* Orthogonalisation on the host, generated: coefficients, norms and forms x working dtypes x shapes
 * x spectra, against the exact polynomial of the fp64 singular value decomposition of the
 * normalised input. The bounds are those of docs/algorithms.md. */
#include "config.h" /* before cmocka.h, whose macro `fail` would hide a function */
#include "mirror_backend.h"
#include "ns_fixture.h"

#include <stdarg.h>
#include <setjmp.h>
#include <cmocka.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const int64_t shapes[][2] = {{1, 1},   {1, 37},  {37, 1},   {24, 24}, {16, 80},
                                    {80, 16}, {31, 17}, {40, 160}, {68, 84}, {16, 776}};
enum { SHAPES = sizeof shapes / sizeof shapes[0] };

typedef struct combination {
    const char *yaml; /* without ns_dtype and ns_form */
    oracle_set set;
    int steps;
    double safety;
    bool powers;
    oracle_norm norm;
    double eps;
    bool raw;   /* refused by the check in 16 bits and tf32 */
    bool cubic; /* refused in bf16 */
    bool steep; /* slope at zero above 6,000: rounding is amplified */
} combination;

static const combination combinations[] = {
    {"norm: frobenius_add", ORACLE_SIMPLE, 5, 1, false, ORACLE_FROBENIUS_ADD, 1e-7, .raw = false},
    {"norm: frobenius_max, norm_eps: 1e-15", ORACLE_SIMPLE, 5, 1, false, ORACLE_FROBENIUS_MAX,
     1e-15, .raw = false},
    {"coefficient_safety: 1.02", ORACLE_SIMPLE, 5, 1.02, false, ORACLE_FROBENIUS_MAX, 1e-7,
     .raw = false},
    {"norm: schatten4", ORACLE_SIMPLE, 5, 1, false, ORACLE_SCHATTEN4, 1e-8, .raw = false},
    {"norm: spectral", ORACLE_SIMPLE, 5, 1, false, ORACLE_SPECTRAL, 1e-8, .raw = false},
    {"coefficients: quintic", ORACLE_QUINTIC, 5, 1, false, ORACLE_FROBENIUS_MAX, 1e-7,
     .raw = false},
    {"coefficients: you", ORACLE_QUINTIC, 5, 1, false, ORACLE_FROBENIUS_MAX, 1e-7, .raw = false},
    {"coefficients: polar_express", ORACLE_POLAR_EXPRESS, 5, 1, false, ORACLE_FROBENIUS_MAX, 1e-7,
     .raw = true},
    {"coefficients: polar_express, coefficient_safety: 1.05, coefficient_safety_form: powers",
     ORACLE_POLAR_EXPRESS, 5, 1.05, true, ORACLE_FROBENIUS_MAX, 1e-7, .raw = false},
    {"coefficients: polar_express_nvidia, ns_steps: 8", ORACLE_POLAR_EXPRESS_NVIDIA, 8, 1, false,
     ORACLE_FROBENIUS_MAX, 1e-7, .steep = true},
    {"coefficients: polar_express_speedrun, norm: frobenius_safety, norm_eps: 1e-6",
     ORACLE_POLAR_EXPRESS_SPEEDRUN, 5, 1, false, ORACLE_FROBENIUS_SAFETY, 1e-6, .raw = false},
    {"coefficients: cans", ORACLE_CANS, 5, 1, false, ORACLE_FROBENIUS_MAX, 1e-7, .raw = true},
    {"coefficients: turbo, norm: aol, ns_steps: 4", ORACLE_TURBO, 4, 1, false, ORACLE_AOL, 1e-7,
     .raw = false},
    {"coefficients: aol4, norm: aol, ns_steps: 4", ORACLE_AOL4, 4, 1, false, ORACLE_AOL, 1e-7,
     .raw = false},
    {"coefficients: deepseekv4, ns_steps: 10", ORACLE_DEEPSEEKV4, 10, 1, false,
     ORACLE_FROBENIUS_MAX, 1e-7, .steep = true},
    {"coefficients: cubic5", ORACLE_CUBIC5, 5, 1, false, ORACLE_FROBENIUS_MAX, 1e-7, .cubic = true},
};
enum { COMBINATIONS = sizeof combinations / sizeof combinations[0] };

/* ---- what should come out ---- */

static double unit_of(ns_dtype dtype) {
    static const double units[] = {0x1p-24, 0x1p-11, 0x1p-8, 0x1p-11};
    return units[dtype];
}

typedef struct expected {
    int64_t m, n;
    double *u;     /* [m, n] */
    double *sigma; /* [m] of u, descending */
    int rank;
    double slope; /* largest |p'| on [0, 1 + 2u] */
} expected;

static oracle_polynomial polynomial_of(const combination *c) {
    return c->powers ? oracle_coefficients_powers(c->set, c->steps, c->safety, true)
                     : oracle_coefficients(c->set, c->steps, c->safety, true);
}

static int descending(const void *left, const void *right) {
    const double a = *(const double *)left, b = *(const double *)right;
    return a > b ? -1 : a < b;
}

static double *oriented(const float *x, int64_t r, int64_t c) {
    const int64_t m = r < c ? r : c, n = r < c ? c : r;
    double *out = calloc((size_t)(m * n), sizeof *out);
    assert_non_null(out);
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < n; j++)
            out[i * n + j] = (double)x[r > c ? j * c + i : i * c + j];
    return out;
}

/* How much a change of a singular value is amplified: at zero by the product of the a, and by some
 * sets where sigma is 1, which one singular value alone is. */
static double largest_slope(const oracle_polynomial *p, double top) {
    const double h = 1e-9;
    double largest = 0.0;
    for (int i = 0; i <= 2000; i++) {
        const double x = top * i / 2000.0;
        const double rise = oracle_polynomial_at(p, x + h) - oracle_polynomial_at(p, x - h);
        largest = fmax(largest, fabs(rise) / (2.0 * h));
    }
    return largest;
}

static expected expect(const combination *k, const float *x, int64_t r, int64_t c, double unit) {
    expected e = {.m = r < c ? r : c, .n = r < c ? c : r, .u = oriented(x, r, c)};
    const oracle_polynomial p = polynomial_of(k);
    oracle_normalize(k->norm, k->eps, e.u, e.m, e.n);
    oracle_svd svd = oracle_svd_of(e.u, e.m, e.n);
    e.sigma = calloc((size_t)e.m, sizeof *e.sigma);
    assert_non_null(e.sigma);
    for (int64_t i = 0; i < e.m; i++) {
        e.rank += svd.sigma[i] > 1e-12 * svd.sigma[0];
        e.sigma[i] = fabs(oracle_polynomial_at(&p, svd.sigma[i]));
    }
    qsort(e.sigma, (size_t)e.m, sizeof *e.sigma, descending);
    oracle_polynomial_svd(&p, &svd, 1.0, e.u);
    oracle_svd_free(&svd);
    e.slope = largest_slope(&p, 1.0 + 2.0 * unit);
    return e;
}

/* ---- how close is close enough ---- */

static bool is_gaussian(oracle_spectrum s) {
    return s == ORACLE_GAUSSIAN || s == ORACLE_HUGE || s == ORACLE_TINY;
}

/* On singular values of 16-bit results. Storing X, whose Frobenius norm is 1, changes it by u at
 * most, and spread over all directions where entries are like random numbers; where few different
 * entries make a matrix of low rank, their errors line up. */
static double sigma_bound(const expected *e, ns_dtype dtype) {
    const double spread = 1.25 * (1.0 / sqrt((double)e->m) + 1.0 / sqrt((double)e->n));
    return unit_of(dtype) * e->slope * (e->rank < e->m ? fmax(spread, 1.0) : spread);
}

/* Relative Frobenius error allowed. The figures hold for slopes at zero up to 1,000 and grow with
 * the slope; raw sets are steep where sigma is 1 as well, which one singular value alone is. */
static double allowed(const combination *k, const expected *e, ns_dtype dtype, bool gram,
                      oracle_spectrum spectrum) {
    const bool easy = is_gaussian(spectrum) && e->m > 1;
    const double more = fmax(1.0, e->slope / 500.0);
    switch (dtype) {
    case NS_FP32:
        if (k->steep)
            return easy ? 1e-4 : 1.5e-2;
        if (gram)
            return (easy ? 2e-5 : 5e-3) * more;
        return (easy ? 1e-5 : 5e-4) * more;
    case NS_TF32: return k->steep ? INFINITY : (easy ? 1e-2 : 0.2) * more;
    default: return sigma_bound(e, dtype) * sqrt((double)e->m / (e->rank ? e->rank : 1));
    }
}

/* Singular values of 16-bit results, both sorted. Returns the worst of |sigma - p(sigma)| / bound.
 */
static double check_sigma(const double *got, const expected *e, ns_dtype dtype) {
    oracle_svd svd = oracle_svd_of(got, e->m, e->n);
    double worst = 0.0;
    for (int64_t i = 0; i < e->m; i++)
        worst = fmax(worst, fabs(svd.sigma[i] - e->sigma[i]) / sigma_bound(e, dtype));
    oracle_svd_free(&svd);
    return worst;
}

/* ||got - exact|| / ||exact||; where eps makes the exact result smaller than 16 bits can be,
 * against that. */
static double error_of(const double *got, const expected *e, bool narrow) {
    const size_t count = (size_t)(e->m * e->n);
    double difference = 0.0, length = 0.0;
    for (size_t i = 0; i < count; i++) {
        difference += (got[i] - e->u[i]) * (got[i] - e->u[i]);
        length += e->u[i] * e->u[i];
    }
    return sqrt(difference) / fmax(sqrt(length), narrow ? 1e-4 : 0.0);
}

/* ---- one case ---- */

static double worst_ratio[4][2]
                         [ORACLE_SPECTRUM_COUNT]; /* [dtype][gram][spectrum] error / allowed */
static int runs;

static void run_case(const combination *k, const ns_program *program, bool gram, int64_t r,
                     int64_t c, oracle_spectrum spectrum) {
    oracle_rng rng = {(uint64_t)(spectrum * 131 + r * 7 + c)};
    float *x = ns_matrix(r, c, spectrum, &rng), *u = ns_numbers((size_t)(r * c));
    ns_run(program, r, c, &x, &u, 1, runs % 2 == 0);
    runs++;
    for (int64_t i = 0; i < r * c; i++)
        if (!isfinite(u[i]) || (spectrum == ORACLE_ZERO && u[i] != 0.0F))
            fail_msg("%s, %s, %lld x %lld, %s: an entry is %g", k->yaml,
                     ns_dtype_text(program->dtype), (long long)r, (long long)c,
                     oracle_spectrum_name(spectrum), (double)u[i]);
    if (spectrum != ORACLE_ZERO) {
        const bool narrow = program->dtype == NS_BF16 || program->dtype == NS_FP16;
        expected e = expect(k, x, r, c, unit_of(program->dtype));
        double *got = oriented(u, r, c);
        const double error = error_of(got, &e, narrow);
        const double bound = allowed(k, &e, program->dtype, gram, spectrum);
        const double sigma = narrow ? check_sigma(got, &e, program->dtype) : 0.0;
        double *worst = &worst_ratio[program->dtype][gram][spectrum];
        *worst = fmax(*worst, fmax(error / bound, sigma));
        if (!(error <= bound) || !(sigma <= 1.0))
            fail_msg("%s, %s%s, %lld x %lld, %s: relative error %.3e, allowed is %.3e; singular "
                     "values %.2f of their bound",
                     k->yaml, ns_dtype_text(program->dtype), gram ? ", gram" : "", (long long)r,
                     (long long)c, oracle_spectrum_name(spectrum), error, bound, sigma);
        free(got);
        free(e.u);
        free(e.sigma);
    }
    free(x);
    free(u);
}

static muonshard_status compile(const combination *k, ns_dtype dtype, bool gram, int64_t r,
                                int64_t c, ns_program *program, error_text *error) {
    char yaml[256];
    snprintf(yaml, sizeof yaml, "{%s, ns_dtype: %s, ns_form: %s}", k->yaml, ns_dtype_text(dtype),
             gram ? "gram" : "standard");
    muonshard_config *config;
    assert_int_equal(muonshard_config_create(&config), MUONSHARD_OK);
    if (muonshard_config_load_string(config, yaml))
        fail_msg("%s", muonshard_config_last_error(config));
    const muonshard_status status =
        newton_schulz_compile(config_settings(config), MUONSHARD_FP32, false, r < c ? r : c,
                              r < c ? c : r, program, error);
    muonshard_config_destroy(config);
    return status;
}

static void run_dtype(ns_dtype dtype, bool gram) {
    for (size_t i = 0; i < COMBINATIONS; i++) {
        const combination *k = &combinations[i];
        for (size_t s = 0; s < SHAPES; s++) {
            const int64_t r = shapes[s][0], c = shapes[s][1];
            /* Ten steps whose slope at zero is 79,000: in bf16 some matrices of rank 1 end in NaN.
             */
            const bool parts = gram && dtype == NS_BF16 && k->steps == 10 && r != c;
            const bool refused =
                (k->raw && dtype != NS_FP32) || (k->cubic && dtype == NS_BF16) || parts;
            ns_program program;
            error_text error = {""};
            const muonshard_status status = compile(k, dtype, gram, r, c, &program, &error);
            assert_int_equal(status, refused ? MUONSHARD_ERR_CONFIG : MUONSHARD_OK);
            if (refused) {
                assert_non_null(strstr(error.text, ns_dtype_text(dtype)));
                assert_non_null(strstr(error.text, "coefficient_check"));
            }
            /* More than a device's tile holds, or so deep that it is cut: that is seen on any
             * numbers, and bounds of matrices that lack rank are for smaller ones. */
            const bool tiled = r > 64 || c > 700;
            for (int spectrum = 0; !refused && spectrum < ORACLE_SPECTRUM_COUNT; spectrum++)
                if (!tiled || is_gaussian((oracle_spectrum)spectrum))
                    run_case(k, &program, gram, r, c, (oracle_spectrum)spectrum);
        }
    }
    for (int spectrum = 0; spectrum < ORACLE_SPECTRUM_COUNT; spectrum++)
        if (spectrum != ORACLE_ZERO)
            print_message("%s%s, %-10s worst error is %5.3f of what is allowed\n",
                          ns_dtype_text(dtype), gram ? " gram" : "",
                          oracle_spectrum_name((oracle_spectrum)spectrum),
                          worst_ratio[dtype][gram][spectrum]);
}

static void test_fp32(void **state) {
    (void)state;
    run_dtype(NS_FP32, false);
}

static void test_tf32(void **state) {
    (void)state;
    run_dtype(NS_TF32, false);
}

static void test_bf16(void **state) {
    (void)state;
    run_dtype(NS_BF16, false);
}

static void test_fp16(void **state) {
    (void)state;
    run_dtype(NS_FP16, false);
}

static void test_gram_fp32(void **state) {
    (void)state;
    run_dtype(NS_FP32, true);
}

/* Whose squares are in fp32: within what the standard form is allowed. */
static void test_gram_bf16(void **state) {
    (void)state;
    run_dtype(NS_BF16, true);
}

static void test_gram_fp16(void **state) {
    (void)state;
    run_dtype(NS_FP16, true);
}

int main(void) {
    const struct CMUnitTest all[] = {
        cmocka_unit_test(test_fp32),      cmocka_unit_test(test_tf32),
        cmocka_unit_test(test_bf16),      cmocka_unit_test(test_fp16),
        cmocka_unit_test(test_gram_fp32), cmocka_unit_test(test_gram_bf16),
        cmocka_unit_test(test_gram_fp16),
    };
    return cmocka_run_group_tests(all, NULL, NULL);
}
