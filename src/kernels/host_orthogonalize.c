/* host_orthogonalize.c - runs a Newton-Schulz program through OpenBLAS, one matrix after the other.
 * Every call sees the same shapes in the same order whatever else a rank owns, so that bits depend
 * on the matrix alone. Buffers are fp32 whatever the program works in: of bf16 and fp16 they hold
 * numbers that are rounded already, and OpenBLAS accumulates their products in fp32. */
#include <cblas.h>
#include <string.h>

#include "kernels/host.h"

#define ALIGNMENT 64
#define TILE      32  /* of transpositions */
#define PANEL     128 /* rows of a commuting product that are computed at once */

typedef struct buffers {
    size_t m, n;
    const ns_program *program;
    void *normalize;            /* workspace of host_normalize */
    float *at[NS_BUFFER_COUNT]; /* X, Y [m, n]; as many of A, B, C, D [m, m] as are used */
    float *wide, *square;       /* [m, n], [m, m]: operands rounded to tf32 */
} buffers;

static size_t columns(const buffers *s, ns_buffer b) {
    return b == NS_X || b == NS_Y ? s->n : s->m;
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

/* ---- instructions ---- */

/* A buffer as it enters a product. */
static const float *operand(const buffers *s, ns_buffer b, float *rounded) {
    const float *x = s->at[b];
    if (s->program->dtype != NS_TF32)
        return x;
    const size_t count = s->m * columns(s, b);
    for (size_t i = 0; i < count; i++)
        rounded[i] = dtype_round_tf32(x[i]);
    return rounded;
}

/* As it is stored: the one rounding of a result. */
static void finish(const buffers *s, ns_buffer dst) {
    dtype_round(s->at[dst], ns_program_output(s->program), s->m * columns(s, dst));
}

static muonshard_status normalize(backend *self, const buffers *s, const ns_instruction *op) {
    float *a = op->a == NS_NONE ? NULL : s->at[op->a];
    TRY(host_normalize(self, op, s->at[op->dst], a, s->m, s->n, s->normalize));
    finish(s, op->dst);
    if (a) {
        mirror(a, s->m);
        finish(s, op->a);
    }
    return MUONSHARD_OK;
}

/* dst = c, where the product that follows adds to it; what it multiplies dst by. */
static float preload(const buffers *s, const ns_instruction *op) {
    if (op->c == NS_NONE)
        return 0.0F;
    if (op->c != op->dst)
        memcpy(s->at[op->dst], s->at[op->c], s->m * columns(s, op->dst) * sizeof(float));
    return op->beta;
}

static void symmetric_product(const buffers *s, const ns_instruction *op) {
    const int m = (int)s->m, k = (int)columns(s, op->a);
    const float beta = preload(s, op);
    cblas_ssyrk(CblasRowMajor, CblasLower, CblasNoTrans, m, k, op->alpha,
                operand(s, op->a, s->wide), k, beta, s->at[op->dst], m);
    mirror(s->at[op->dst], s->m);
    finish(s, op->dst);
}

/* The rows of a panel as far as the diagonal block: the rest is their mirror image. */
static void commuting_product(const buffers *s, const ns_instruction *op) {
    const int m = (int)s->m;
    const float *a = operand(s, op->a, s->square), *b = operand(s, op->b, s->wide);
    const float beta = preload(s, op);
    for (int row = 0; row < m; row += PANEL) {
        const int rows = m - row < PANEL ? m - row : PANEL;
        const size_t start = (size_t)row * s->m;
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, rows, row + rows, m, op->alpha,
                    a + start, m, b, m, beta, s->at[op->dst] + start, m);
    }
    mirror(s->at[op->dst], s->m);
    finish(s, op->dst);
}

static void product(const buffers *s, const ns_instruction *op) {
    const int m = (int)s->m, n = (int)columns(s, op->b);
    const float *a = operand(s, op->a, s->square), *b = operand(s, op->b, s->wide);
    const float beta = preload(s, op);
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, m, n, m, op->alpha, a, m, b, n, beta,
                s->at[op->dst], n);
    finish(s, op->dst);
}

static void add_identity(const buffers *s, const ns_instruction *op) {
    float *dst = s->at[op->dst];
    memcpy(dst, s->at[op->a], s->m * s->m * sizeof *dst);
    for (size_t i = 0; i < s->m; i++)
        dst[i * s->m + i] += op->alpha;
    finish(s, op->dst);
}

static muonshard_status run(backend *self, const buffers *s) {
    for (int i = 0; i < s->program->count; i++) {
        const ns_instruction *op = &s->program->code[i];
        switch (op->kind) {
        case NS_NORMALIZE: TRY(normalize(self, s, op)); break;
        case NS_SYMMETRIC_PRODUCT: symmetric_product(s, op); break;
        case NS_COMMUTING_PRODUCT: commuting_product(s, op); break;
        case NS_PRODUCT: product(s, op); break;
        case NS_ADD_IDENTITY: add_identity(s, op); break;
        }
    }
    return MUONSHARD_OK;
}

/* ---- a matrix in, a matrix out ---- */

static void read_item(const buffers *s, const orthogonalize_item *item) {
    if (item->transposed)
        transpose(s->at[NS_X], item->u, s->n, s->m);
    else
        memcpy(s->at[NS_X], item->u, s->m * s->n * sizeof(float));
}

/* Through the wide buffer that the result is not in, when it is turned. */
static void write_item(const buffers *s, const orthogonalize_item *item) {
    const ns_buffer result = s->program->result;
    const float *x = s->at[result];
    if (item->transposed) {
        float *turned = s->at[result == NS_X ? NS_Y : NS_X];
        transpose(turned, x, s->m, s->n);
        x = turned;
    }
    dtype_store(item->out, ns_program_output(s->program), x, s->m * s->n);
}

static void *take(uintptr_t *at, size_t bytes) {
    void *start = (void *)*at;
    *at += (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    return start;
}

/* The buffers of a program in `workspace`; returns where they end. */
static uintptr_t lay_out(buffers *s, uintptr_t workspace) {
    const size_t wide = s->m * s->n * sizeof(float), square = s->m * s->m * sizeof(float);
    size_t normalize_bytes = 0;
    for (int i = 0; i < s->program->count; i++) {
        const ns_instruction *op = &s->program->code[i];
        const size_t bytes = op->kind == NS_NORMALIZE ? host_normalize_workspace(op, s->m) : 0;
        normalize_bytes = bytes > normalize_bytes ? bytes : normalize_bytes;
    }
    s->normalize = take(&workspace, normalize_bytes);
    s->at[NS_X] = take(&workspace, wide);
    s->at[NS_Y] = take(&workspace, wide);
    for (int i = 0; i < s->program->squares; i++)
        s->at[NS_A + i] = take(&workspace, square);
    if (s->program->dtype == NS_TF32) {
        s->wide = take(&workspace, wide);
        s->square = take(&workspace, square);
    }
    return workspace;
}

size_t host_orthogonalize_workspace(backend *self, const ns_program *program, int64_t m, int64_t n,
                                    size_t count) {
    (void)self;
    (void)count;
    buffers s = {.m = (size_t)m, .n = (size_t)n, .program = program};
    return lay_out(&s, 0);
}

muonshard_status host_orthogonalize(backend *self, const step_record *record,
                                    const ns_program *program, int64_t m, int64_t n,
                                    const orthogonalize_item *items, size_t count,
                                    void *workspace) {
    if (record && record->skip)
        return MUONSHARD_OK;
    buffers s = {.m = (size_t)m, .n = (size_t)n, .program = program};
    lay_out(&s, (uintptr_t)workspace);
    for (size_t i = 0; i < count; i++) {
        read_item(&s, &items[i]);
        TRY(run(self, &s));
        write_item(&s, &items[i]);
    }
    return MUONSHARD_OK;
}
