/* bench_oracle.c - the standard form in fp64, which every result is compared with. */
#include <cblas.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "bench.h"
#include "optim/coefficients.h"

/* What U may be off, root mean square, of the size of its elements: docs/algorithms.md's bounds. */
static double tolerance(ns_dtype dtype) {
    return dtype == NS_FP32 ? 2e-4 : dtype == NS_BF16 ? 0.2 : 0.05;
}

enum { SCATTER = 6 }; /* of single elements around the root mean square */

/* x [m, n] becomes its Newton-Schulz; y [m, n], a, p [m, m] are scratch. */
static void exact_steps(const settings *s, const coefficient_row *rows, int m, int n, double *x,
                        double *y, double *a, double *p) {
    const size_t count = (size_t)m * (size_t)n, square = (size_t)m * (size_t)m;
    const double norm = cblas_dnrm2((int)count, x, 1);
    const double divisor = s->norm == NS_NORM_FROBENIUS_SAFETY ? 1.02 * norm : norm;
    for (size_t i = 0; i < count; i++)
        x[i] /= divisor;
    for (int i = 0; i < (int)s->ns_steps; i++) {
        const coefficient_row k = rows[i];
        cblas_dgemm(CblasRowMajor, CblasNoTrans, CblasTrans, m, m, n, 1.0, x, n, x, n, 0.0, a, m);
        memcpy(p, a, square * sizeof *a);
        cblas_dgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, m, m, m, k.c, a, m, a, m, k.b, p, m);
        memcpy(y, x, count * sizeof *x);
        cblas_dgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, m, n, m, 1.0, p, m, x, n, k.a, y, n);
        memcpy(x, y, count * sizeof *x);
    }
}

static double distant_elements(const double *exact, const float *u, size_t rows, size_t cols,
                               ns_dtype dtype, bool of_any_length) {
    const bool transposed = rows > cols;
    const size_t count = rows * cols;
    const double length = cblas_dnrm2((int)count, exact, 1), rms = length / sqrt((double)count);
    const double own = cblas_snrm2((int)count, u, 1), factor = of_any_length ? length / own : 1.0;
    double wrong = 0.0;
    for (size_t i = 0; i < rows; i++)
        for (size_t j = 0; j < cols; j++) {
            const double want = exact[transposed ? j * rows + i : i * cols + j];
            wrong += !(fabs(factor * u[i * cols + j] - want) <= SCATTER * tolerance(dtype) * rms);
        }
    return wrong;
}

muonshard_status bench_compare(bench *b, const float *g, const float *u, size_t rows, size_t cols,
                               ns_dtype dtype, bool of_any_length, double *wrong) {
    const settings *s = b->settings;
    const size_t count = rows * cols, m = rows < cols ? rows : cols;
    *wrong = NAN;
    if (s->norm != NS_NORM_FROBENIUS_ADD && s->norm != NS_NORM_FROBENIUS_MAX &&
        s->norm != NS_NORM_FROBENIUS_SAFETY)
        return MUONSHARD_OK;
    coefficient_row coefficients[NS_MAX_STEPS];
    error_text error;
    const muonshard_status status = coefficients_rows(s, dtype, coefficients, &error);
    if (status)
        return message_fail(b->message, status, "%s", error.text);
    double *x = calloc(2 * count + 2 * m * m, sizeof *x);
    if (!x)
        return message_fail(b->message, MUONSHARD_ERR_MEMORY, "out of memory");
    for (size_t i = 0; i < rows; i++)
        for (size_t j = 0; j < cols; j++)
            x[rows > cols ? j * rows + i : i * cols + j] = g[i * cols + j];
    exact_steps(s, coefficients, (int)m, (int)(count / m), x, x + count, x + 2 * count,
                x + 2 * count + m * m);
    *wrong = distant_elements(x, u, rows, cols, dtype, of_any_length);
    free(x);
    return MUONSHARD_OK;
}
