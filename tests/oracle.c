#include "oracle.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static double *numbers(int64_t count) {
    double *x = calloc((size_t)(count > 0 ? count : 1), sizeof *x);
    if (x == NULL)
        abort();
    return x;
}

/* ---- random numbers ---- */

uint64_t oracle_random(oracle_rng *rng) {
    uint64_t z = (rng->state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

double oracle_uniform(oracle_rng *rng) {
    return ((double)(oracle_random(rng) >> 11) + 0.5) / 9007199254740992.0; /* 2^53 */
}

double oracle_normal(oracle_rng *rng) {
    double radius = sqrt(-2.0 * log(oracle_uniform(rng)));
    return radius * cos(6.283185307179586 * oracle_uniform(rng));
}

/* ---- matrices ---- */

static double dot(const double *a, const double *b, int64_t count) {
    double sum = 0.0;
    for (int64_t i = 0; i < count; i++)
        sum += a[i] * b[i];
    return sum;
}

double oracle_relative_error(const double *a, const double *b, size_t count) {
    double difference = 0.0, reference = 0.0;
    for (size_t i = 0; i < count; i++) {
        difference += (a[i] - b[i]) * (a[i] - b[i]);
        reference += b[i] * b[i];
    }
    return reference > 0.0 ? sqrt(difference / reference) : sqrt(difference);
}

/* Turns rows p and q of x [., n] and of j [., m] so that the rows of x become orthogonal; false:
 * they were. */
static bool jacobi_rotate(double *x, double *j, int64_t m, int64_t n, int64_t p, int64_t q,
                          double negligible) {
    double *a = x + p * n, *b = x + q * n, *ja = j + p * m, *jb = j + q * m;
    double aa = dot(a, a, n), bb = dot(b, b, n), ab = dot(a, b, n);
    if (fabs(ab) <= 1e-15 * sqrt(aa * bb) || fabs(ab) <= negligible)
        return false;
    double zeta = (bb - aa) / (2.0 * ab);
    double t = (zeta >= 0.0 ? 1.0 : -1.0) / (fabs(zeta) + sqrt(1.0 + zeta * zeta));
    double c = 1.0 / sqrt(1.0 + t * t), s = c * t;
    for (int64_t i = 0; i < n; i++) {
        double old = a[i];
        a[i] = c * old - s * b[i];
        b[i] = s * old + c * b[i];
    }
    for (int64_t i = 0; i < m; i++) {
        double old = ja[i];
        ja[i] = c * old - s * jb[i];
        jb[i] = s * old + c * jb[i];
    }
    return true;
}

oracle_svd oracle_svd_of(const double *x, int64_t m, int64_t n) {
    oracle_svd svd = {m, n, numbers(m * m), numbers(m * n), numbers(m)};
    double *work = numbers(m * n), *j = numbers(m * m); /* work = j x */
    memcpy(work, x, (size_t)(m * n) * sizeof *x);
    for (int64_t i = 0; i < m; i++)
        j[i * m + i] = 1.0;
    double negligible = 1e-30 * dot(x, x, m * n);
    bool turned = true;
    for (int sweep = 0; turned && sweep < 60; sweep++) {
        turned = false;
        for (int64_t p = 0; p < m; p++)
            for (int64_t q = p + 1; q < m; q++)
                turned |= jacobi_rotate(work, j, m, n, p, q, negligible);
    }
    for (int64_t k = 0; k < m; k++) { /* selection of the largest that is left */
        int64_t best = -1;
        double sigma = -1.0;
        for (int64_t i = 0; i < m; i++) {
            double norm = j[i * m] == HUGE_VAL ? -1.0 : sqrt(dot(work + i * n, work + i * n, n));
            if (norm > sigma) {
                sigma = norm;
                best = i;
            }
        }
        svd.sigma[k] = sigma;
        memcpy(svd.right + k * n, work + best * n, (size_t)n * sizeof *work);
        for (int64_t i = 0; i < m; i++)
            svd.u[i * m + k] = j[best * m + i];
        j[best * m] = HUGE_VAL; /* taken */
    }
    free(work);
    free(j);
    return svd;
}

void oracle_svd_free(oracle_svd *svd) {
    free(svd->u);
    free(svd->right);
    free(svd->sigma);
    memset(svd, 0, sizeof *svd);
}

/* Row i of a published set; `cycle`: what steps beyond the last take. */
typedef struct published {
    int count;
    bool cycle;
    double rows[10][3];
} published;

#define SIMPLE                                                                                     \
    { 3.4445, -4.7750, 2.0315 }
static const published sets[ORACLE_SET_COUNT] = {
    [ORACLE_SIMPLE] = {1, true, {SIMPLE}},
    [ORACLE_QUINTIC] = {5,
                        true,
                        {{4.0848, -6.8946, 2.9270},
                         {3.9505, -6.3029, 2.6377},
                         {3.7418, -5.5913, 2.3037},
                         {2.8769, -3.1427, 1.2046},
                         {2.8366, -3.0525, 1.2012}}},
    [ORACLE_POLAR_EXPRESS] = {8,
                              false,
                              {{8.28721201814563, -23.595886519098837, 17.300387312530933},
                               {4.107059111542203, -2.9478499167379106, 0.5448431082926601},
                               {3.9486908534822946, -2.908902115962949, 0.5518191394370137},
                               {3.3184196573706015, -2.488488024314874, 0.51004894012372},
                               {2.300652019954817, -1.6689039845747493, 0.4188073119525673},
                               {1.891301407787398, -1.2679958271945868, 0.37680408948524835},
                               {1.8750014808534479, -1.2500016453999487, 0.3750001645474248},
                               {1.875, -1.25, 0.375}}},
    [ORACLE_POLAR_EXPRESS_NVIDIA] = {8,
                                     false,
                                     {{8.2051, -22.9019, 16.4607},
                                      {4.0664, -2.8612, 0.5184},
                                      {3.9096, -2.8234, 0.5250},
                                      {3.2856, -2.4153, 0.4853},
                                      {2.2779, -1.6198, 0.3985},
                                      {1.8726, -1.2307, 0.3585},
                                      {1.8564, -1.2132, 0.3568},
                                      {1.8750, -1.2500, 0.3750}}},
    [ORACLE_POLAR_EXPRESS_SPEEDRUN] =
        {5,
         false,
         {{8.156554524902461, -22.48329292557795, 15.878769915207462},
          {4.042929935166739, -2.808917465908714, 0.5000178451051316},
          {3.8916678022926607, -2.772484153217685, 0.5060648178503393},
          {3.285753657755655, -2.3681294933425376, 0.46449024233003106},
          {2.3465413258596377, -1.7097828382687081, 0.42323551169305323}}},
    [ORACLE_CANS] = {5,
                     false,
                     {{8.4703, -25.1081, 18.6293},
                      {4.1828, -3.1087, 0.5806},
                      {3.9619, -2.9541, 0.5630},
                      {3.2866, -2.4647, 0.5074},
                      {2.2737, -1.6447, 0.4162}}},
    [ORACLE_TURBO] = {4,
                      false,
                      {{3.9505, -6.3029, 2.6377},
                       {3.7418, -5.5913, 2.3037},
                       {2.8769, -3.1427, 1.2046},
                       {2.8366, -3.0525, 1.2012}}},
    [ORACLE_AOL4] = {4,
                     false,
                     {{4.6051, -9.6552, 5.6769},
                      {4.7505, -6.0861, 2.1790},
                      {2.7763, -2.3190, 0.5523},
                      {2.4231, -2.2861, 0.8193}}},
    [ORACLE_DEEPSEEKV4] = {10,
                           false,
                           {SIMPLE,
                            SIMPLE,
                            SIMPLE,
                            SIMPLE,
                            SIMPLE,
                            SIMPLE,
                            SIMPLE,
                            SIMPLE,
                            {2.0, -1.5, 0.5},
                            {2.0, -1.5, 0.5}}},
    [ORACLE_CUBIC5] = {5,
                       false,
                       {{3.3656576, -3.3420992, 0.0},
                        {2.5744352, -1.4957376, 0.0},
                        {2.5368962, -1.4312570, 0.0},
                        {2.4418906, -1.2764040, 0.0},
                        {2.2230472, -0.9630650, 0.0}}},
};

static oracle_polynomial divided(oracle_set set, int steps, double a, double b, double c,
                                 bool fp32) {
    oracle_polynomial p = {.steps = steps};
    const published *from = &sets[set];
    for (int i = 0; i < steps; i++) {
        const int last = from->cycle ? i % from->count : from->count - 1;
        const double *row = from->rows[i < from->count ? i : last];
        p.a[i] = row[0] / a;
        p.b[i] = row[1] / b;
        p.c[i] = row[2] / c;
        if (fp32) {
            p.a[i] = (double)(float)p.a[i];
            p.b[i] = (double)(float)p.b[i];
            p.c[i] = (double)(float)p.c[i];
        }
    }
    return p;
}

oracle_polynomial oracle_coefficients(oracle_set set, int steps, double safety, bool fp32) {
    return divided(set, steps, safety, safety, safety, fp32);
}

oracle_polynomial oracle_coefficients_powers(oracle_set set, int steps, double s, bool fp32) {
    return divided(set, steps, s, pow(s, 3.0), pow(s, 5.0), fp32);
}

/* p(sigma) / sigma, which is finite at zero. */
static double polynomial_gain(const oracle_polynomial *p, double sigma) {
    double gain = 1.0;
    for (int i = 0; i < p->steps; i++) {
        double y = (gain * sigma) * (gain * sigma);
        gain *= p->a[i] + p->b[i] * y + p->c[i] * y * y;
    }
    return gain;
}

double oracle_polynomial_at(const oracle_polynomial *p, double sigma) {
    return sigma * polynomial_gain(p, sigma);
}

void oracle_polynomial_svd(const oracle_polynomial *p, const oracle_svd *svd, double factor,
                           double *out) {
    int64_t m = svd->m, n = svd->n;
    memset(out, 0, (size_t)(m * n) * sizeof *out);
    for (int64_t k = 0; k < m; k++) {
        double gain = factor * polynomial_gain(p, factor * svd->sigma[k]);
        for (int64_t i = 0; i < m; i++)
            for (int64_t j = 0; j < n; j++)
                out[i * n + j] += svd->u[i * m + k] * gain * svd->right[k * n + j];
    }
}

void oracle_polynomial_recursion(const oracle_polynomial *p, const double *x, int64_t r, int64_t c,
                                 double *out) {
    bool tall = r > c;
    int64_t m = tall ? c : r, n = tall ? r : c;
    double *y = numbers(m * n), *z = numbers(m * n), *a = numbers(m * m), *b = numbers(m * m);
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < n; j++)
            y[i * n + j] = tall ? x[j * m + i] : x[i * n + j];
    for (int step = 0; step < p->steps; step++) {
        for (int64_t i = 0; i < m; i++)
            for (int64_t j = 0; j < m; j++)
                a[i * m + j] = dot(y + i * n, y + j * n, n);
        for (int64_t i = 0; i < m; i++)
            for (int64_t j = 0; j < m; j++) /* a is symmetric */
                b[i * m + j] =
                    p->b[step] * a[i * m + j] + p->c[step] * dot(a + i * m, a + j * m, m);
        for (int64_t i = 0; i < m; i++) {
            for (int64_t j = 0; j < n; j++)
                z[i * n + j] = p->a[step] * y[i * n + j];
            for (int64_t k = 0; k < m; k++)
                for (int64_t j = 0; j < n; j++)
                    z[i * n + j] += b[i * m + k] * y[k * n + j];
        }
        memcpy(y, z, (size_t)(m * n) * sizeof *y);
    }
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < n; j++)
            out[tall ? j * m + i : i * n + j] = y[i * n + j];
    free(y);
    free(z);
    free(a);
    free(b);
}

double oracle_norm_factor(oracle_norm norm, double eps, const double *x, size_t count) {
    double frobenius = sqrt(dot(x, x, (int64_t)count));
    switch (norm) {
    case ORACLE_FROBENIUS_ADD: return 1.0 / (frobenius + eps);
    case ORACLE_FROBENIUS_SAFETY: return 1.0 / (1.02 * frobenius + eps);
    default: return 1.0 / fmax(frobenius, eps);
    }
}

/* Line i of the oriented matrix: its rows, which are the columns of a tall one. */
static void multiply_line(double *x, int64_t r, int64_t c, int64_t i, double factor) {
    bool tall = r > c;
    for (int64_t j = 0; j < (tall ? r : c); j++)
        x[tall ? j * c + i : i * c + j] *= factor;
}

static double line_product(const double *x, int64_t r, int64_t c, int64_t i, int64_t k) {
    bool tall = r > c;
    double sum = 0.0;
    for (int64_t j = 0; j < (tall ? r : c); j++)
        sum += x[tall ? j * c + i : i * c + j] * x[tall ? j * c + k : k * c + j];
    return sum;
}

static double largest_singular_value(const double *x, int64_t r, int64_t c) {
    bool tall = r > c;
    int64_t m = tall ? c : r, n = tall ? r : c;
    double *wide = numbers(m * n);
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < n; j++)
            wide[i * n + j] = x[tall ? j * c + i : i * c + j];
    oracle_svd svd = oracle_svd_of(wide, m, n);
    double sigma = svd.sigma[0];
    oracle_svd_free(&svd);
    free(wide);
    return sigma;
}

void oracle_normalize(oracle_norm norm, double eps, double *x, int64_t r, int64_t c) {
    int64_t m = r < c ? r : c;
    double *factor = numbers(m), fourth = 0.0;
    for (int64_t i = 0; i < m; i++) {
        double absolute = 0.0;
        for (int64_t k = 0; k < m; k++) {
            double a = line_product(x, r, c, i, k);
            absolute += fabs(a);
            fourth += a * a;
        }
        factor[i] = 1.0 / sqrt(fmax(absolute, eps));
    }
    double all = 0.0;
    if (norm == ORACLE_SCHATTEN4)
        all = 1.0 / sqrt(fmax(sqrt(fourth), eps));
    else if (norm == ORACLE_SPECTRAL)
        all = 1.0 / (largest_singular_value(x, r, c) + eps);
    else if (norm != ORACLE_AOL)
        all = oracle_norm_factor(norm, eps, x, (size_t)(r * c));
    for (int64_t i = 0; i < m; i++)
        multiply_line(x, r, c, i, norm == ORACLE_AOL ? factor[i] : all);
    free(factor);
}

/* Rows of q [m, n], m <= n: orthonormal, Gram-Schmidt done twice. */
static void orthonormal_rows(double *q, int64_t m, int64_t n, oracle_rng *rng) {
    for (int64_t i = 0; i < m; i++) {
        double *row = q + i * n;
        for (int64_t j = 0; j < n; j++)
            row[j] = oracle_normal(rng);
        for (int pass = 0; pass < 2; pass++) {
            for (int64_t k = 0; k < i; k++) {
                double along = dot(row, q + k * n, n);
                for (int64_t j = 0; j < n; j++)
                    row[j] -= along * q[k * n + j];
            }
            double length = sqrt(dot(row, row, n));
            for (int64_t j = 0; j < n; j++)
                row[j] /= length;
        }
    }
}

void oracle_matrix_with(double *x, int64_t r, int64_t c, const double *sigma, oracle_rng *rng) {
    int64_t k = r < c ? r : c;
    double *left = numbers(k * r), *right = numbers(k * c); /* rows are singular vectors */
    orthonormal_rows(left, k, r, rng);
    orthonormal_rows(right, k, c, rng);
    memset(x, 0, (size_t)(r * c) * sizeof *x);
    for (int64_t s = 0; s < k; s++)
        for (int64_t i = 0; i < r; i++)
            for (int64_t j = 0; j < c; j++)
                x[i * c + j] += left[s * r + i] * sigma[s] * right[s * c + j];
    free(left);
    free(right);
}

const char *oracle_spectrum_name(oracle_spectrum spectrum) {
    static const char *const names[ORACLE_SPECTRUM_COUNT] = {
        "gaussian", "decay 1e-6", "rank m/4", "rank 1",       "spike",         "constant",
        "zero",     "x 1e30",     "x 1e-30",  "rank 1, 1e30", "rank 1, 1e-30", "zero rows"};
    return names[spectrum];
}

/* A product of matrices of small integers, so that the rank survives fp32. */
static void integer_product(double *x, int64_t r, int64_t c, int64_t rank, oracle_rng *rng) {
    for (int64_t s = 0; s < rank; s++) {
        double *left = numbers(r), *right = numbers(c);
        for (int64_t i = 0; i < r; i++)
            left[i] = (double)(oracle_random(rng) % 7) - 3.5; /* never zero */
        for (int64_t j = 0; j < c; j++)
            right[j] = (double)(oracle_random(rng) % 7) - 3.5;
        for (int64_t i = 0; i < r; i++)
            for (int64_t j = 0; j < c; j++)
                x[i * c + j] += left[i] * right[j];
        free(left);
        free(right);
    }
}

void oracle_matrix(float *x, int64_t r, int64_t c, oracle_spectrum spectrum, oracle_rng *rng) {
    int64_t k = r < c ? r : c;
    double *y = numbers(r * c), *sigma = numbers(k);
    switch (spectrum) {
    case ORACLE_GAUSSIAN:
    case ORACLE_HUGE:
    case ORACLE_TINY:
        for (int64_t i = 0; i < r * c; i++)
            y[i] = oracle_normal(rng) * (spectrum == ORACLE_HUGE   ? 1e30
                                         : spectrum == ORACLE_TINY ? 1e-30
                                                                   : 1.0);
        break;
    case ORACLE_DECAY:
        for (int64_t i = 0; i < k; i++)
            sigma[i] = k > 1 ? pow(1e-6, (double)i / (double)(k - 1)) : 1.0;
        oracle_matrix_with(y, r, c, sigma, rng);
        break;
    case ORACLE_LOW_RANK: integer_product(y, r, c, k < 8 ? 1 : k / 4, rng); break;
    case ORACLE_RANK_ONE:
    case ORACLE_HUGE_RANK_ONE:
    case ORACLE_TINY_RANK_ONE:
        integer_product(y, r, c, 1, rng);
        for (int64_t i = 0; spectrum != ORACLE_RANK_ONE && i < r * c; i++) /* 2^100 is 1.3e30 */
            y[i] *= spectrum == ORACLE_HUGE_RANK_ONE ? 0x1p100 : 0x1p-100;
        break;
    case ORACLE_ZERO_ROWS:
        for (int64_t i = 0; i < r * c; i++)
            y[i] = i / c % 2 ? 0.0 : oracle_normal(rng);
        break;
    case ORACLE_SPIKE:
        for (int64_t i = 0; i < k; i++)
            sigma[i] = i == 0 ? 1.0 : 1e-2;
        oracle_matrix_with(y, r, c, sigma, rng);
        break;
    case ORACLE_CONSTANT:
        for (int64_t i = 0; i < r * c; i++)
            y[i] = 0.37;
        break;
    default: break;
    }
    for (int64_t i = 0; i < r * c; i++)
        x[i] = (float)y[i];
    free(y);
    free(sigma);
}
