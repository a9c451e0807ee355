/* host_orthogonalize.c - runs a Newton-Schulz program through OpenBLAS, one matrix after the other.
 * Every call sees the same shapes in the same order whatever else a rank owns, so that bits depend
 * on the matrix alone. */
#include <cblas.h>
#include <math.h>
#include <string.h>

#include "kernels/host.h"

#define TILE 32

typedef struct buffers {
    float *at[NS_BUFFER_COUNT]; /* X, Y [m, n]; A, B [m, m] */
    size_t m, n;
} buffers;

static bool is_square(ns_buffer b) {
    return b == NS_A || b == NS_B;
}

static size_t columns(const buffers *s, ns_buffer b) {
    return is_square(b) ? s->m : s->n;
}

/* out [cols, rows] = transpose of in [rows, cols] */
static void transpose(float *restrict out, const float *restrict in, size_t rows, size_t cols) {
    for (size_t i0 = 0; i0 < rows; i0 += TILE)
        for (size_t j0 = 0; j0 < cols; j0 += TILE)
            for (size_t i = i0; i < rows && i < i0 + TILE; i++)
                for (size_t j = j0; j < cols && j < j0 + TILE; j++)
                    out[j * rows + i] = in[i * cols + j];
}

/* The lower triangle of x [m, m] into the upper one. */
static void mirror(float *x, size_t m) {
    for (size_t i0 = 0; i0 < m; i0 += TILE)
        for (size_t j0 = 0; j0 <= i0; j0 += TILE)
            for (size_t i = i0; i < m && i < i0 + TILE; i++)
                for (size_t j = j0; j < i && j < j0 + TILE; j++)
                    x[j * m + i] = x[i * m + j];
}

/* In fp64, since squares of fp32 overflow. */
static void normalize(const buffers *s, const ns_instruction *op) {
    float *x = s->at[op->dst];
    const size_t count = s->m * columns(s, op->dst);
    const double norm = sqrt(host_sum_squares(x, count)), eps = (double)op->eps;
    const double divisor = op->norm == NS_NORM_FROBENIUS_ADD ? norm + eps : fmax(norm, eps);
    if (norm == 0.0)
        return;
    for (size_t i = 0; i < count; i++)
        x[i] = (float)((double)x[i] / divisor);
}

/* dst = c, where the product that follows adds to it. */
static void preload(const buffers *s, const ns_instruction *op) {
    if (op->c != NS_NONE && op->c != op->dst)
        memcpy(s->at[op->dst], s->at[op->c], s->m * columns(s, op->dst) * sizeof(float));
}

static void symmetric_product(const buffers *s, const ns_instruction *op) {
    const int m = (int)s->m, k = (int)columns(s, op->a);
    preload(s, op);
    cblas_ssyrk(CblasRowMajor, CblasLower, CblasNoTrans, m, k, op->alpha, s->at[op->a], k,
                op->c == NS_NONE ? 0.0F : op->beta, s->at[op->dst], m);
    mirror(s->at[op->dst], s->m);
}

static void product(const buffers *s, const ns_instruction *op) {
    const int m = (int)s->m, n = (int)columns(s, op->b);
    preload(s, op);
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, m, n, m, op->alpha, s->at[op->a], m,
                s->at[op->b], n, op->c == NS_NONE ? 0.0F : op->beta, s->at[op->dst], n);
}

static void axpby(const buffers *s, const ns_instruction *op) {
    const size_t count = s->m * columns(s, op->dst);
    float *dst = s->at[op->dst];
    const float *a = s->at[op->a], *c = s->at[op->c];
    for (size_t i = 0; i < count; i++)
        dst[i] = op->alpha * a[i] + op->beta * c[i];
}

static void run(const buffers *s, const ns_program *program) {
    for (int i = 0; i < program->count; i++) {
        const ns_instruction *op = &program->code[i];
        switch (op->kind) {
        case NS_NORMALIZE: normalize(s, op); break;
        case NS_SYMMETRIC_PRODUCT: symmetric_product(s, op); break;
        case NS_PRODUCT: product(s, op); break;
        case NS_AXPBY: axpby(s, op); break;
        }
    }
}

size_t host_orthogonalize_workspace(backend *self, const ns_program *program, int64_t m, int64_t n,
                                    size_t count) {
    (void)self;
    (void)program;
    (void)count;
    return 2 * (size_t)m * (size_t)(m + n) * sizeof(float);
}

muonshard_status host_orthogonalize(backend *self, const step_record *record,
                                    const ns_program *program, int64_t m, int64_t n,
                                    const orthogonalize_item *items, size_t count,
                                    void *workspace) {
    (void)self;
    if (record && record->skip)
        return MUONSHARD_OK;
    const size_t rows = (size_t)m, cols = (size_t)n;
    float *w = workspace;
    const buffers s = {.at = {[NS_X] = w,
                              [NS_Y] = w + rows * cols,
                              [NS_A] = w + 2 * rows * cols,
                              [NS_B] = w + 2 * rows * cols + rows * rows},
                       .m = rows,
                       .n = cols};
    for (size_t i = 0; i < count; i++) {
        if (items[i].transposed)
            transpose(s.at[NS_X], items[i].u, cols, rows);
        else
            memcpy(s.at[NS_X], items[i].u, rows * cols * sizeof(float));
        run(&s, program);
        const float *result = s.at[program->result];
        if (items[i].transposed)
            transpose(items[i].u, result, rows, cols);
        else
            memcpy(items[i].u, result, rows * cols * sizeof(float));
    }
    return MUONSHARD_OK;
}
