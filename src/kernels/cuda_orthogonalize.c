/* cuda_orthogonalize.c - runs a Newton-Schulz program on all matrices of a batch at a time:
 * products through cuBLASLt, everything else through kernels of ours. Symmetric results are
 * computed whole. X X^T comes out symmetric as far as cuBLASLt adds up in one order; what only
 * commutes does not, and the Gram form, which multiplies such squares on and on, diverges by it:
 * its squares are mirrored. */
#include "kernels/cuda.h"
#include "kernels/cuda_kernels.h"

enum { SQUARINGS = 24 };

typedef struct buffers {
    backend *self;
    cudaStream_t stream;
    const ns_program *program;
    int64_t m, n;
    size_t count;
    void *at[NS_BUFFER_COUNT]; /* X, Y [count, m, n]; A to D [count, m, m], as stored */
    void *operands[2];     /* [count, m, m]: squares as they enter products of a narrower dtype */
    double *factors;       /* [count, m] */
    double *squares;       /* [count]: of items that have none */
    double *x64, *gram[2]; /* [count, m, n]; [count, m, m]: of norms that need X X^T */
    double *logs;          /* [2, count]: spectral */
    void *gemm;            /* [GEMM_WORKSPACE] */
} buffers;

/* ---- memory ---- */

/* Squares are multiplied with squares. */
static bool is_gram(const ns_program *program) {
    bool commuting = false;
    for (int i = 0; i < program->count; i++)
        commuting = commuting || program->code[i].kind == NS_COMMUTING_PRODUCT;
    return commuting;
}

static void lay_out(buffers *s, void *workspace) {
    const cuda_layout l = cuda_layout_of(s->program, s->m, s->n, s->count);
    char *start = workspace;
    for (int b = 0; b < NS_BUFFER_COUNT; b++)
        s->at[b] = start + l.at[b];
    for (int i = 0; i < 2; i++) {
        s->operands[i] = start + l.operands[i];
        s->gram[i] = (double *)(void *)(start + l.gram[i]);
    }
    s->factors = (double *)(void *)(start + l.factors);
    s->squares = (double *)(void *)(start + l.squares);
    s->x64 = (double *)(void *)(start + l.x64);
    s->logs = (double *)(void *)(start + l.logs);
    s->gemm = start + l.gemm;
}

size_t cuda_orthogonalize_workspace(backend *self, const ns_program *program, int64_t m, int64_t n,
                                    size_t count) {
    (void)self;
    return count ? cuda_layout_of(program, m, n, count).bytes : 0;
}

/* ---- normalisation ---- */

/* The sums of squares, where the items have them side by side; else made here. */
static muonshard_status squares_of(const buffers *s, const orthogonalize_item *items,
                                   const double **squares) {
    bool given = items[0].squares != NULL;
    for (size_t i = 1; i < s->count; i++)
        given = given && items[i].squares == items[0].squares + i;
    *squares = given ? items[0].squares : s->squares;
    for (size_t i = 0; !given && i < s->count;) {
        sum_squares_item list[CUDA_LIST];
        size_t used = 0;
        for (; used < CUDA_LIST && i < s->count; used++, i++)
            list[used] = (sum_squares_item){
                .x = items[i].u, .count = (size_t)s->m * (size_t)s->n, .out = s->squares + i};
        TRY_CUDA(s->self, cuda_sum_squares(list, used, cuda_of(s->self)->scratch, s->stream));
    }
    return MUONSHARD_OK;
}

static muonshard_status multiply_fp64(const buffers *s, const double *a, int64_t depth,
                                      double *dst) {
    const gemm g = {.operands = GEMM_FP64,
                    .stored = GEMM_FP64,
                    .rows = s->m,
                    .cols = s->m,
                    .depth = depth,
                    .b_transposed = true,
                    .batch = s->count,
                    .alpha = 1.0,
                    .a = a,
                    .b = a,
                    .dst = dst};
    return gemm_run(s->self, &g, s->gemm);
}

/* G / tr G squared again and again: the trace of G^(2^k) comes within a factor m of the largest
 * eigenvalue's power, whose root is what is wanted: 2^24 leaves 5e-7 for a million rows. */
static muonshard_status spectral_factors(const buffers *s, double eps) {
    for (int k = 0;; k++) {
        TRY_CUDA(s->self,
                 cuda_spectral_step(s->gram[k % 2], s->count, s->m, k, s->logs, s->stream));
        if (k == SQUARINGS)
            break;
        TRY(multiply_fp64(s, s->gram[k % 2], s->m, s->gram[(k + 1) % 2]));
    }
    TRY_CUDA(s->self, cuda_spectral_factors(eps, s->logs, s->count, s->m, s->factors, s->stream));
    return MUONSHARD_OK;
}

static muonshard_status gram_factors(const buffers *s, const ns_instruction *op,
                                     const orthogonalize_item *items) {
    TRY_CUDA(s->self, cuda_load_fp64(items, s->count, s->m, s->n, s->x64, s->stream));
    TRY(multiply_fp64(s, s->x64, s->n, s->gram[0]));
    if (op->norm != NS_NORM_SPECTRAL) {
        TRY_CUDA(s->self, cuda_gram_factors(op->norm, op->eps, s->gram[0], s->count, s->m,
                                            s->factors, s->stream));
        return MUONSHARD_OK;
    }
    TRY(spectral_factors(s, op->eps));
    return op->a == NS_NONE ? MUONSHARD_OK : multiply_fp64(s, s->x64, s->n, s->gram[0]);
}

static muonshard_status normalize(const buffers *s, const ns_instruction *op,
                                  const orthogonalize_item *items) {
    const bool frobenius = op->norm == NS_NORM_FROBENIUS_ADD || op->norm == NS_NORM_FROBENIUS_MAX ||
                           op->norm == NS_NORM_FROBENIUS_SAFETY;
    if (cuda_needs_gram(op))
        TRY(gram_factors(s, op, items));
    if (frobenius) {
        const double *squares;
        TRY(squares_of(s, items, &squares));
        TRY_CUDA(s->self, cuda_frobenius_factors(op->norm, op->eps, squares, s->count, s->m,
                                                 s->factors, s->stream));
    }
    if (op->a != NS_NONE)
        TRY_CUDA(s->self, cuda_store_gram(s->gram[0], s->factors, s->count, s->m,
                                          s->program->square_dtype, s->at[op->a], s->stream));
    TRY_CUDA(s->self, cuda_store_x(items, s->count, s->m, s->n, s->factors, s->program->dtype,
                                   s->at[op->dst], s->stream));
    return MUONSHARD_OK;
}

/* ---- products ---- */

static gemm_type gemm_type_of(ns_dtype dtype) {
    static const gemm_type types[] = {GEMM_FP32, GEMM_TF32, GEMM_BF16, GEMM_FP16};
    return types[dtype];
}

/* Buffer `b` in the dtype of the product's operands, through operands[slot] if it has to be
 * rounded. */
static muonshard_status operand(const buffers *s, ns_buffer b, ns_dtype dtype, int slot,
                                const void **out) {
    *out = s->at[b];
    if (ns_dtype_size(ns_stored(s->program, b)) == ns_dtype_size(dtype))
        return MUONSHARD_OK;
    *out = s->operands[slot];
    TRY_CUDA(s->self, cuda_round(s->at[b], s->count * (size_t)s->m * (size_t)s->m, dtype,
                                 s->operands[slot], s->stream));
    return MUONSHARD_OK;
}

/* Squares are symmetric, so that a transposed one is as good. */
static muonshard_status multiply(const buffers *s, const ns_instruction *op) {
    const bool square = op->kind == NS_SYMMETRIC_PRODUCT;
    const ns_buffer b = square ? op->a : op->b;
    const ns_dtype dtype = ns_operands(s->program, op);
    gemm g = {.operands = gemm_type_of(dtype),
              .stored = gemm_type_of(ns_stored(s->program, op->dst)),
              .rows = s->m,
              .cols = square || !ns_is_wide(b) ? s->m : s->n,
              .depth = ns_is_wide(op->a) ? s->n : s->m,
              .b_transposed = square,
              .batch = s->count,
              .alpha = (double)op->alpha,
              .beta = (double)op->beta,
              .c = op->c == NS_NONE ? NULL : s->at[op->c],
              .dst = s->at[op->dst]};
    TRY(operand(s, op->a, dtype, 0, &g.a));
    if (b == op->a)
        g.b = g.a;
    else
        TRY(operand(s, b, dtype, 1, &g.b));
    TRY(gemm_run(s->self, &g, s->gemm));
    if (op->kind != NS_PRODUCT && is_gram(s->program))
        TRY_CUDA(s->self, cuda_mirror(s->at[op->dst], s->count, s->m,
                                      ns_stored(s->program, op->dst), s->stream));
    return MUONSHARD_OK;
}

static muonshard_status run(const buffers *s, const ns_instruction *op,
                            const orthogonalize_item *items) {
    switch (op->kind) {
    case NS_NORMALIZE: return normalize(s, op, items);
    case NS_SYMMETRIC_PRODUCT:
    case NS_COMMUTING_PRODUCT:
    case NS_PRODUCT: return multiply(s, op);
    case NS_ADD_IDENTITY:
        TRY_CUDA(s->self, cuda_add_identity(s->at[op->a], s->count, s->m, op->alpha,
                                            s->program->square_dtype, s->at[op->dst], s->stream));
        break;
    }
    return MUONSHARD_OK;
}

/* On skip what comes out means nothing, and nothing reads it. */
muonshard_status cuda_orthogonalize(backend *self, const step_record *record,
                                    const ns_program *program, int64_t m, int64_t n,
                                    const orthogonalize_item *items, size_t count,
                                    void *workspace) {
    (void)record;
    if (!count)
        return MUONSHARD_OK;
    buffers s = {.self = self,
                 .stream = cuda_of(self)->streams[STREAM_COMPUTE],
                 .program = program,
                 .m = m,
                 .n = n,
                 .count = count};
    lay_out(&s, workspace);
    for (int i = 0; i < program->count; i++)
        TRY(run(&s, &program->code[i], items));
    TRY_CUDA(self, cuda_give_back(items, count, m, n, ns_stored(program, program->result),
                                  s.at[program->result], ns_program_output(program), s.stream));
    return MUONSHARD_OK;
}
