/* host_normalize.c - what a matrix is divided by before Newton-Schulz. In fp64, where neither the
 * squares nor the fourth powers of fp32 overflow or vanish, and rounded once. */
#include <cblas.h>
#include <math.h>

#include "kernels/formulas.h"
#include "kernels/host.h"

#define PANEL 128 /* columns of X that are in fp64 at once */

/* LAPACK: the lower triangle in Fortran's order is the upper one in ours. */
void dsyevr_(const char *jobz, const char *range, const char *uplo, const int *n, double *a,
             const int *lda, const double *vl, const double *vu, const int *il, const int *iu,
             const double *abstol, int *found, double *w, double *z, const int *ldz, int *isuppz,
             double *work, const int *lwork, int *iwork, const int *liwork, int *info,
             size_t jobz_length, size_t range_length, size_t uplo_length);
#define LAPACK_DOUBLES 70 /* of workspace, a row: 26 are needed, this is enough for its blocks */
#define LAPACK_INTS    10

typedef struct space {
    double *factor; /* [m] what the rows of X are multiplied by */
    double *gram;   /* [m, m] X X^T, lower triangle */
    double *panel;  /* [m, PANEL] */
    double *eigen;  /* [m, 1 + LAPACK_DOUBLES] */
    int *ints;      /* [m, LAPACK_INTS] */
} space;

static bool needs_gram(const ns_instruction *op) {
    return op->a != NS_NONE || op->norm == NS_NORM_AOL || op->norm == NS_NORM_SCHATTEN4 ||
           op->norm == NS_NORM_SPECTRAL;
}

size_t host_normalize_workspace(const ns_instruction *op, size_t m) {
    size_t bytes = m * sizeof(double);
    if (needs_gram(op))
        bytes += m * (m + PANEL) * sizeof(double);
    if (op->norm == NS_NORM_SPECTRAL)
        bytes += m * ((1 + LAPACK_DOUBLES) * sizeof(double) + LAPACK_INTS * sizeof(int));
    return bytes;
}

static space space_of(const ns_instruction *op, double *workspace, size_t m) {
    space s = {.factor = workspace};
    if (!needs_gram(op))
        return s;
    s.gram = s.factor + m;
    s.panel = s.gram + m * m;
    if (op->norm != NS_NORM_SPECTRAL)
        return s;
    s.eigen = s.panel + m * PANEL;
    s.ints = (int *)(void *)(s.eigen + m * (1 + LAPACK_DOUBLES));
    return s;
}

static void gram(space s, const float *x, size_t m, size_t n) {
    for (size_t start = 0; start < n; start += PANEL) {
        const size_t k = n - start < PANEL ? n - start : PANEL;
        for (size_t i = 0; i < m; i++)
            for (size_t j = 0; j < k; j++)
                s.panel[i * PANEL + j] = (double)x[i * n + start + j];
        cblas_dsyrk(CblasRowMajor, CblasLower, CblasNoTrans, (int)m, (int)k, 1.0, s.panel, PANEL,
                    start ? 1.0 : 0.0, s.gram, (int)m);
    }
}

/* Of the Gram matrix, which is destroyed; an infinite or NaN X has a sigma like it. */
static muonshard_status largest_singular_value(space s, size_t m, double *sigma,
                                               error_text *error) {
    double trace = 0.0;
    for (size_t i = 0; i < m; i++)
        trace += s.gram[i * m + i];
    *sigma = sqrt(trace);
    if (trace == 0.0 || !isfinite(trace))
        return MUONSHARD_OK;
    const int n = (int)m, lwork = n * LAPACK_DOUBLES, liwork = n * LAPACK_INTS, one = 1;
    const double unused = 0.0, abstol = 0.0;
    double *values = s.eigen, no_vectors;
    int found, no_support[2], info;
    dsyevr_("N", "I", "U", &n, s.gram, &n, &unused, &unused, &n, &n, &abstol, &found, values,
            &no_vectors, &one, no_support, values + m, &lwork, s.ints, &liwork, &info, 1, 1, 1);
    FAIL_IF(info != 0, error, MUONSHARD_ERR_INTERNAL,
            "the largest singular value of a %d-row matrix: LAPACK's dsyevr fails with %d", n,
            info);
    *sigma = sqrt(fmax(values[0], 0.0));
    return MUONSHARD_OK;
}

/* sums[i] = sum_j |G_ij| */
static void absolute_row_sums(const double *g, size_t m, double *sums) {
    for (size_t i = 0; i < m; i++) {
        sums[i] = fabs(g[i * m + i]);
        for (size_t j = 0; j < i; j++) {
            sums[i] += fabs(g[i * m + j]);
            sums[j] += fabs(g[i * m + j]);
        }
    }
}

static double frobenius_of_symmetric(const double *g, size_t m) {
    double sum = 0.0;
    for (size_t i = 0; i < m; i++) {
        sum += g[i * m + i] * g[i * m + i];
        for (size_t j = 0; j < i; j++)
            sum += 2.0 * g[i * m + j] * g[i * m + j];
    }
    return sqrt(sum);
}

static muonshard_status factors(const ns_instruction *op, const float *x, size_t m, size_t n,
                                space s, error_text *error) {
    const double eps = op->eps, frobenius = sqrt(host_sum_squares(x, m * n));
    double divisor = 0.0, sigma;
    switch (op->norm) {
    case NS_NORM_FROBENIUS_ADD:
    case NS_NORM_FROBENIUS_MAX:
    case NS_NORM_FROBENIUS_SAFETY: divisor = frobenius_divisor(op->norm, frobenius, eps); break;
    case NS_NORM_AOL:
        absolute_row_sums(s.gram, m, s.factor);
        for (size_t i = 0; i < m; i++)
            s.factor[i] = inverse_of(sqrt(fmax(s.factor[i], eps)));
        return MUONSHARD_OK;
    case NS_NORM_SCHATTEN4: divisor = sqrt(fmax(frobenius_of_symmetric(s.gram, m), eps)); break;
    case NS_NORM_SPECTRAL:
        TRY(largest_singular_value(s, m, &sigma, error));
        divisor = sigma + eps;
        break;
    }
    for (size_t i = 0; i < m; i++)
        s.factor[i] = inverse_of(divisor);
    return MUONSHARD_OK;
}

muonshard_status host_normalize(const ns_instruction *op, float *x, float *a, size_t m, size_t n,
                                void *workspace, error_text *error) {
    const space s = space_of(op, workspace, m);
    if (needs_gram(op))
        gram(s, x, m, n);
    TRY(factors(op, x, m, n, s, error));
    if (a && op->norm == NS_NORM_SPECTRAL)
        gram(s, x, m, n);
    for (size_t i = 0; a && i < m; i++)
        for (size_t j = 0; j <= i; j++)
            a[i * m + j] = a[j * m + i] = (float)(s.factor[i] * s.gram[i * m + j] * s.factor[j]);
    for (size_t i = 0; i < m; i++)
        for (size_t j = 0; j < n; j++)
            x[i * n + j] = (float)((double)x[i * n + j] * s.factor[i]);
    return MUONSHARD_OK;
}
