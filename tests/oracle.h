/* oracle.h - the mathematics the library is tested against: fp64, plain loops, and no line shared
 * with src/. Singular values, the Newton-Schulz polynomial taken two ways, matrices with chosen
 * spectra, and a whole optimizer. Running out of memory ends the test program. */
#ifndef ORACLE_H
#define ORACLE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* ---- random numbers: splitmix64, the same on every machine ---- */

typedef struct oracle_rng {
    uint64_t state;
} oracle_rng;

uint64_t oracle_random(oracle_rng *rng);
double oracle_uniform(oracle_rng *rng); /* (0, 1) */
double oracle_normal(oracle_rng *rng);

/* ---- matrices; row-major, fp64 unless float is written ---- */

/* ||a - b|| / ||b|| over `count` numbers; ||a|| where b is zero; NaN where anything is NaN. */
double oracle_relative_error(const double *a, const double *b, size_t count);

/* x = u diag(sigma) v^T, as u and the rows of diag(sigma) v^T, which need no division where sigma
 * is zero. */
typedef struct oracle_svd {
    int64_t m, n;  /* m <= n */
    double *u;     /* [m, m], column i belongs to sigma[i] */
    double *right; /* [m, n], row i is sigma_i v_i^T */
    double *sigma; /* [m], descending */
} oracle_svd;

/* One-sided Jacobi of x [m, n], m <= n. Freed by oracle_svd_free. */
oracle_svd oracle_svd_of(const double *x, int64_t m, int64_t n);
void oracle_svd_free(oracle_svd *svd);

typedef enum oracle_set {
    ORACLE_SIMPLE,
    ORACLE_QUINTIC,
    ORACLE_POLAR_EXPRESS,
    ORACLE_POLAR_EXPRESS_NVIDIA,
    ORACLE_POLAR_EXPRESS_SPEEDRUN,
    ORACLE_CANS,
    ORACLE_TURBO,
    ORACLE_AOL4,
    ORACLE_DEEPSEEKV4,
    ORACLE_CUBIC5,
    ORACLE_SET_COUNT
} oracle_set;

#define ORACLE_MAX_STEPS 32
typedef struct oracle_polynomial {
    int steps;
    double a[ORACLE_MAX_STEPS], b[ORACLE_MAX_STEPS], c[ORACLE_MAX_STEPS];
} oracle_polynomial;

/* Coefficients over `safety`; rounded to fp32, as an fp32 backend gets them, if asked. */
oracle_polynomial oracle_coefficients(oracle_set set, int steps, double safety, bool fp32);
/* The polynomial of x/s at every step: (a/s, b/s^3, c/s^5), in fp32 if asked. */
oracle_polynomial oracle_coefficients_powers(oracle_set set, int steps, double s, bool fp32);
/* sigma_out of sigma_in. */
double oracle_polynomial_at(const oracle_polynomial *p, double sigma);

/* out = u diag(p(factor sigma)) v^T: the polynomial of factor * x, for x the matrix of the svd. */
void oracle_polynomial_svd(const oracle_polynomial *p, const oracle_svd *svd, double factor,
                           double *out);
/* The same for x [r, c] by A = X X^T; B = b A + c A A; X = a X + B X on the wide orientation. out
 * may be x. */
void oracle_polynomial_recursion(const oracle_polynomial *p, const double *x, int64_t r, int64_t c,
                                 double *out);

typedef enum oracle_norm {
    ORACLE_FROBENIUS_ADD,
    ORACLE_FROBENIUS_MAX,
    ORACLE_FROBENIUS_SAFETY,
    ORACLE_AOL,
    ORACLE_SCHATTEN4,
    ORACLE_SPECTRAL,
    ORACLE_NORM_COUNT
} oracle_norm;
/* What x is multiplied by before Newton-Schulz, for the Frobenius norms: 1 / (F + eps), 1 / max(F,
 * eps), 1 / (1.02 F + eps). */
double oracle_norm_factor(oracle_norm norm, double eps, const double *x, size_t count);
/* x [r, c], normalised in place, oriented so that rows <= columns; by any of them. */
void oracle_normalize(oracle_norm norm, double eps, double *x, int64_t r, int64_t c);

/* x [r, c] with the given singular values ([min(r, c)]) and random singular vectors. */
void oracle_matrix_with(double *x, int64_t r, int64_t c, const double *sigma, oracle_rng *rng);

typedef enum oracle_spectrum {
    ORACLE_GAUSSIAN,
    ORACLE_DECAY,    /* geometric from 1 to 1e-6 */
    ORACLE_LOW_RANK, /* rank min(r, c) / 4, exact in fp32 */
    ORACLE_RANK_ONE, /* exact in fp32 */
    ORACLE_SPIKE,    /* 1, and 1e-2 for the rest */
    ORACLE_CONSTANT, /* every entry 0.37 */
    ORACLE_ZERO,
    ORACLE_HUGE,          /* Gaussian, times 1e30 */
    ORACLE_TINY,          /* times 1e-30 */
    ORACLE_HUGE_RANK_ONE, /* rank 1, times 1e30 or 1e-30 */
    ORACLE_TINY_RANK_ONE,
    ORACLE_ZERO_ROWS, /* Gaussian, but for every other row */
    ORACLE_SPECTRUM_COUNT
} oracle_spectrum;

const char *oracle_spectrum_name(oracle_spectrum spectrum);
void oracle_matrix(float *x, int64_t r, int64_t c, oracle_spectrum spectrum, oracle_rng *rng);

#endif
