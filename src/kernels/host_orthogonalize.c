/* host_orthogonalize.c - runs a Newton-Schulz program, a matrix a thread. Bits depend on the matrix
 * alone. Buffers are fp32 whatever the program works in: of bf16 and fp16 they hold numbers that
 * are rounded already. */
#include <stdatomic.h>
#include <string.h>

#include "kernels/host.h"
#include "kernels/host_product.h"

#define ALIGNMENT 64

typedef struct buffers {
    size_t m, n;
    const ns_program *program;
    host_isa isa;
    host_threads *threads;      /* that share this matrix; NULL: the caller's alone */
    void *normalize;            /* workspace of host_normalize */
    float *at[NS_BUFFER_COUNT]; /* X, Y [m, n]; as many of A, B, C, D [m, m] as are used */
    void *product;              /* workspace of host_product */
} buffers;

static size_t columns(const buffers *s, ns_buffer b) {
    return ns_is_wide(b) ? s->n : s->m;
}

static void transpose(const buffers *s, float *out, const float *in, size_t rows, size_t cols) {
    tile_kernel_for(s->isa, false)
        ->turn((uint32_t *)(void *)out, rows, (const uint32_t *)(const void *)in, cols, rows, cols);
}

/* ---- instructions ---- */

/* As it is stored: the one rounding of a result. */
static void finish(const buffers *s, ns_buffer dst) {
    const ns_dtype dtype = ns_stored(s->program, dst);
    dtype_round(s->at[dst],
                dtype == NS_BF16   ? MUONSHARD_BF16
                : dtype == NS_FP16 ? MUONSHARD_FP16
                                   : MUONSHARD_FP32,
                s->m * columns(s, dst));
}

static muonshard_status normalize(const buffers *s, const ns_instruction *op, error_text *error) {
    float *a = op->a == NS_NONE ? NULL : s->at[op->a];
    TRY(host_normalize(op, s->at[op->dst], a, s->m, s->n, s->normalize, error));
    finish(s, op->dst);
    if (a)
        finish(s, op->a);
    return MUONSHARD_OK;
}

/* tf32 is stored as fp32. */
static bool is_rounded(const ns_program *program, ns_buffer b, ns_dtype operands) {
    return operands == NS_FP32 || (operands != NS_TF32 && ns_stored(program, b) == operands);
}

/* Square matrices are symmetric, which saves turning them. */
static product product_of(const buffers *s, const ns_instruction *op) {
    const bool square = op->kind == NS_SYMMETRIC_PRODUCT;
    const ns_buffer b = square ? op->a : op->b;
    const ns_dtype dtype = ns_operands(s->program, op);
    return (product){.operands = dtype,
                     .stored = ns_stored(s->program, op->dst),
                     .rows = s->m,
                     .cols = square ? s->m : columns(s, b),
                     .depth = columns(s, op->a),
                     .a = {.x = s->at[op->a],
                           .across = !ns_is_wide(op->a),
                           .rounded = is_rounded(s->program, op->a, dtype)},
                     .b = {.x = s->at[b],
                           .across = !square || !ns_is_wide(b),
                           .rounded = is_rounded(s->program, b, dtype)},
                     .square = square,
                     .symmetric = op->kind != NS_PRODUCT,
                     .alpha = op->alpha,
                     .beta = op->beta,
                     .c = op->c == NS_NONE ? NULL : s->at[op->c],
                     .dst = s->at[op->dst]};
}

static void multiply(const buffers *s, const ns_instruction *op) {
    const product p = product_of(s, op);
    host_product(s->isa, &p, s->product, s->threads);
}

static void add_identity(const buffers *s, const ns_instruction *op) {
    float *dst = s->at[op->dst];
    memcpy(dst, s->at[op->a], s->m * s->m * sizeof *dst);
    for (size_t i = 0; i < s->m; i++)
        dst[i * s->m + i] += op->alpha;
    finish(s, op->dst);
}

static muonshard_status run(const buffers *s, error_text *error) {
    for (int i = 0; i < s->program->count; i++) {
        const ns_instruction *op = &s->program->code[i];
        switch (op->kind) {
        case NS_NORMALIZE: TRY(normalize(s, op, error)); break;
        case NS_SYMMETRIC_PRODUCT:
        case NS_COMMUTING_PRODUCT:
        case NS_PRODUCT: multiply(s, op); break;
        case NS_ADD_IDENTITY: add_identity(s, op); break;
        }
    }
    return MUONSHARD_OK;
}

/* ---- a matrix in, a matrix out ---- */

static void read_item(const buffers *s, const orthogonalize_item *item) {
    if (item->transposed)
        transpose(s, s->at[NS_X], item->u, s->n, s->m);
    else
        memcpy(s->at[NS_X], item->u, s->m * s->n * sizeof(float));
}

/* Through the wide buffer that the result is not in, when it is turned. */
static void write_item(const buffers *s, const orthogonalize_item *item) {
    const ns_buffer result = s->program->result;
    const float *x = s->at[result];
    if (item->transposed) {
        float *turned = s->at[result == NS_X ? NS_Y : NS_X];
        transpose(s, turned, x, s->m, s->n);
        x = turned;
    }
    dtype_store(item->out, ns_program_output(s->program), x, s->m * s->n);
}

static void *take(uintptr_t *at, size_t bytes) {
    void *start = (void *)*at;
    *at += (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    return start;
}

static size_t larger(size_t a, size_t b) {
    return a > b ? a : b;
}

/* The buffers of a program in `workspace`; returns where they end. */
static uintptr_t lay_out(buffers *s, uintptr_t workspace) {
    const size_t wide = s->m * s->n * sizeof(float), square = s->m * s->m * sizeof(float);
    size_t normalize_bytes = 0, product_bytes = 0;
    for (int i = 0; i < s->program->count; i++) {
        const ns_instruction *op = &s->program->code[i];
        if (op->kind == NS_NORMALIZE) {
            normalize_bytes = larger(normalize_bytes, host_normalize_workspace(op, s->m));
        } else if (op->kind != NS_ADD_IDENTITY) {
            const product p = product_of(s, op);
            product_bytes = larger(product_bytes, host_product_workspace(s->isa, &p, s->threads));
        }
    }
    s->normalize = take(&workspace, normalize_bytes);
    s->at[NS_X] = take(&workspace, wide);
    s->at[NS_Y] = take(&workspace, wide);
    for (int i = 0; i < s->program->squares; i++)
        s->at[NS_A + i] = take(&workspace, square);
    s->product = take(&workspace, product_bytes);
    return workspace;
}

/* A matrix a thread; where there are fewer matrices, one after the other, each by all threads. */
static bool shares(const backend *self, size_t count) {
    return self->threads > 1 && count < (size_t)self->threads;
}

static buffers shape_of(const backend *self, const ns_program *program, int64_t m, int64_t n,
                        bool shared) {
    return (buffers){.m = (size_t)m,
                     .n = (size_t)n,
                     .program = program,
                     .isa = host_of(self)->isa,
                     .threads = shared ? host_of(self)->threads : NULL};
}

size_t host_orthogonalize_workspace(backend *self, const ns_program *program, int64_t m, int64_t n,
                                    size_t count) {
    buffers alone = shape_of(self, program, m, n, false),
            shared = shape_of(self, program, m, n, true);
    const size_t threads = (size_t)self->threads;
    return larger((count < threads ? 0 : threads) * lay_out(&alone, 0), lay_out(&shared, 0));
}

typedef struct job {
    backend *self;
    buffers shape;
    const orthogonalize_item *items;
    uintptr_t workspace;
    size_t bytes; /* of it, a thread */
    atomic_int status;
} job;

static void orthogonalize(void *user, size_t index, int thread) {
    job *j = user;
    buffers s = j->shape;
    error_text error;
    lay_out(&s, j->workspace + (size_t)thread * j->bytes);
    read_item(&s, &j->items[index]);
    const muonshard_status status = run(&s, &error);
    int none = MUONSHARD_OK;
    if (status && atomic_compare_exchange_strong(&j->status, &none, status))
        j->self->error = error;
    write_item(&s, &j->items[index]);
}

muonshard_status host_orthogonalize(backend *self, const step_record *record,
                                    const ns_program *program, int64_t m, int64_t n,
                                    const orthogonalize_item *items, size_t count,
                                    void *workspace) {
    if (record && record->skip)
        return MUONSHARD_OK;
    job j = {.self = self,
             .shape = shape_of(self, program, m, n, shares(self, count)),
             .items = items,
             .workspace = (uintptr_t)workspace};
    buffers measured = j.shape;
    j.bytes = lay_out(&measured, 0);
    if (j.shape.threads)
        for (size_t i = 0; i < count; i++)
            orthogonalize(&j, i, 0);
    else
        host_threads_run(host_of(self)->threads, orthogonalize, &j, count);
    return (muonshard_status)j.status;
}
