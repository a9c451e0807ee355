/* cuda_orthogonalize.c - runs a Newton-Schulz program on all matrices of a batch at a time:
 * products through cuBLASLt, or through a kernel of ours that knows symmetric results and matrices
 * that are turned (tiles), everything else through kernels of ours.
 *
 * With cuBLASLt symmetric results are computed by panels up to the diagonal, where that pays, and
 * mirrored. One that is computed whole comes out symmetric as far as cuBLASLt adds up in one order,
 * if it is X X^T; what only commutes does not, and the Gram form, which multiplies such squares on
 * and on, diverges by it: its squares are always mirrored. */
#include <math.h>

#include "kernels/cuda.h"
#include "kernels/cuda_kernels.h"

enum { SQUARINGS = 24 };

/* What is done with a program. */
typedef enum purpose {
    RUN,
    CHOOSE, /* algorithms of its products; nothing is launched */
    MEASURE /* products run, on noise, and the algorithms that take least time are chosen */
} purpose;

typedef struct buffers {
    backend *self;
    purpose purpose;
    cudaStream_t stream;
    const ns_program *program;
    int64_t m, n;
    const orthogonalize_item *items;
    size_t count;
    bool tiles; /* products are our kernel's, and X and Y [n, m] of items that are turned */
    void *at[NS_BUFFER_COUNT]; /* X, Y [count, m, n]; A to D [count, m, m], as stored */
    void *operands[2];     /* [count, m, m]: squares as they enter products of a narrower dtype */
    double *factors;       /* [count, m] */
    double *squares;       /* [count]: of items that have none */
    double *x64, *gram[2]; /* [count, m, n]; [count, m, m]: of norms that need X X^T */
    double *logs;          /* [2, count]: spectral */
    void *gemm;            /* [GEMM_WORKSPACE] */
    gemm_matrices result;  /* where the last product leaves the program's result; NULL: in `at` */
} buffers;

/* ---- memory ---- */

/* Squares are multiplied with squares, or begin as one and a multiple of the identity. */
static bool is_gram(const ns_program *program) {
    bool found = false;
    for (int i = 0; i < program->count; i++)
        found = found || program->code[i].kind == NS_COMMUTING_PRODUCT ||
                program->code[i].kind == NS_ADD_IDENTITY;
    return found;
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

static muonshard_status product(const buffers *s, const gemm *g) {
    if (s->purpose != RUN)
        TRY(gemm_prepare(s->self, g, s->gemm));
    return s->purpose == CHOOSE ? MUONSHARD_OK : gemm_run(s->self, g, s->gemm);
}

/* ---- normalisation ---- */

/* The sums of squares, where the items have them side by side; else made here. */
static muonshard_status squares_of(const buffers *s, const double **squares) {
    const orthogonalize_item *items = s->items;
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
    const gemm_matrices operand = {a, depth, s->m * depth};
    const gemm g = {.operands = GEMM_FP64,
                    .stored = GEMM_FP64,
                    .rows = s->m,
                    .cols = s->m,
                    .depth = depth,
                    .b_transposed = true,
                    .batch = s->count,
                    .alpha = 1.0,
                    .a = operand,
                    .b = operand,
                    .dst = {dst, s->m, s->m * s->m}};
    return product(s, &g);
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

static muonshard_status gram_factors(const buffers *s, const ns_instruction *op) {
    TRY_CUDA(s->self, cuda_load_fp64(s->items, s->count, s->m, s->n, s->x64, s->stream));
    TRY(multiply_fp64(s, s->x64, s->n, s->gram[0]));
    if (op->norm != NS_NORM_SPECTRAL) {
        TRY_CUDA(s->self, cuda_gram_factors(op->norm, op->eps, s->gram[0], s->count, s->m,
                                            s->factors, s->stream));
        return MUONSHARD_OK;
    }
    TRY(spectral_factors(s, op->eps));
    return op->a == NS_NONE ? MUONSHARD_OK : multiply_fp64(s, s->x64, s->n, s->gram[0]);
}

static muonshard_status normalize(const buffers *s, const ns_instruction *op) {
    const bool frobenius = op->norm == NS_NORM_FROBENIUS_ADD || op->norm == NS_NORM_FROBENIUS_MAX ||
                           op->norm == NS_NORM_FROBENIUS_SAFETY;
    if (cuda_needs_gram(op))
        TRY(gram_factors(s, op));
    if (frobenius) {
        const double *squares;
        TRY(squares_of(s, &squares));
        TRY_CUDA(s->self, cuda_frobenius_factors(op->norm, op->eps, squares, s->count, s->m,
                                                 s->factors, s->stream));
    }
    if (op->a != NS_NONE)
        TRY_CUDA(s->self, cuda_store_gram(s->gram[0], s->factors, s->count, s->m,
                                          s->program->square_dtype, s->at[op->a], s->stream));
    TRY_CUDA(s->self, cuda_store_x(s->items, s->count, s->m, s->n, !s->tiles, s->factors,
                                   s->program->dtype, s->at[op->dst], s->stream));
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
    if (s->purpose != CHOOSE)
        TRY_CUDA(s->self, cuda_round(s->at[b], s->count * (size_t)s->m * (size_t)s->m, dtype,
                                     s->operands[slot], s->stream));
    return MUONSHARD_OK;
}

static int64_t width(const buffers *s, ns_buffer b) {
    return ns_is_wide(b) ? s->n : s->m;
}

static gemm_matrices matrices(const buffers *s, ns_buffer b, const void *at) {
    return (gemm_matrices){at, width(s, b), s->m * width(s, b)};
}

/* `elements` further on. */
static gemm_matrices advance(gemm_matrices of, int64_t elements, ns_dtype dtype) {
    if (of.at)
        of.at = (const char *)of.at + elements * (int64_t)ns_dtype_size(dtype);
    return of;
}

/* The instruction that adds a multiple of the identity to what `op` leaves: it is done with it. */
static const ns_instruction *shift_after(const buffers *s, const ns_instruction *op) {
    const ns_instruction *next = op + 1, *end = s->program->code + s->program->count;
    return next < end && next->kind == NS_ADD_IDENTITY && next->a == op->dst ? next : NULL;
}

/* Rows and columns of dst are those of a and, transposed, of b: a panel of it takes some rows of
 * the one and the first rows of the other. */
static muonshard_status symmetric_product(const buffers *s, const ns_instruction *op,
                                          const gemm *whole, ns_dtype operands, ns_dtype stored) {
    const int processors = cuda_of(s->self)->processors, wanted = cuda_of(s->self)->panels;
    const bool mirrored = is_gram(s->program);
    const int panels =
        wanted ? wanted : cuda_panels(s->m, whole->depth, s->count, mirrored, processors);
    int made = 0;
    for (int i = 0; i < panels; i++) {
        const int64_t begin = cuda_panel_begin(s->m, panels, i);
        const int64_t end = cuda_panel_begin(s->m, panels, i + 1);
        gemm g = *whole;
        g.rows = end - begin;
        g.cols = end;
        g.a = advance(whole->a, begin * whole->a.pitch, operands);
        g.c = advance(whole->c, begin * whole->c.pitch, stored);
        g.dst = advance(whole->dst, begin * whole->dst.pitch, stored);
        if (g.rows) {
            made++;
            TRY(product(s, &g));
        }
    }
    if ((made > 1 || mirrored) && s->purpose != CHOOSE) {
        const ns_instruction *shift = shift_after(s, op);
        TRY_CUDA(s->self,
                 cuda_mirror(s->at[op->dst], s->count, s->m, stored, shift ? shift->alpha : 0.0f,
                             shift ? s->at[shift->dst] : NULL, s->stream));
    }
    return MUONSHARD_OK;
}

/* ---- products by tiles ---- */

static muonshard_status tile(const buffers *s, const tile_product *t) {
    if (s->purpose != RUN)
        TRY(tile_prepare(s->self, t, s->gemm));
    return s->purpose == CHOOSE ? MUONSHARD_OK : tile_run(s->self, t, s->gemm);
}

/* Where a product leaves dst, or finds an operand, of items that are turned as `turned` has it. */
static gemm_matrices tile_matrices(const buffers *s, ns_buffer b, bool turned) {
    return (gemm_matrices){s->at[b], turned || !ns_is_wide(b) ? s->m : s->n, s->m * width(s, b)};
}

/* X X^T, or a product of squares. */
static void tile_square(const buffers *s, const ns_instruction *op, bool turned, tile_product *t) {
    const ns_buffer b = op->kind == NS_SYMMETRIC_PRODUCT ? op->a : op->b;
    const ns_instruction *shift = shift_after(s, op);
    t->symmetric = true;
    t->rows = t->cols = s->m;
    t->depth = width(s, op->a);
    t->a_turned = t->b_turned = turned;
    t->a = tile_matrices(s, op->a, turned);
    t->b = tile_matrices(s, b, turned);
    if (shift) {
        t->gamma = shift->alpha;
        t->shifted = tile_matrices(s, shift->dst, false);
    }
}

/* A square by X, whose columns are then b's turned rows; or, of what is turned, X^T by the square,
 * which is the transpose of that. */
static void tile_wide(const buffers *s, const ns_instruction *op, bool turned, tile_product *t) {
    const gemm_matrices square = tile_matrices(s, op->a, false);
    const gemm_matrices x = tile_matrices(s, op->b, turned);
    t->rows = turned ? s->n : s->m;
    t->cols = turned ? s->m : s->n;
    t->depth = s->m;
    t->b_turned = !turned;
    t->a = turned ? x : square;
    t->b = turned ? square : x;
}

static muonshard_status tile_multiply(const buffers *s, const ns_instruction *op) {
    const bool wide = ns_is_wide(op->a) || (op->kind == NS_PRODUCT && ns_is_wide(op->b));
    const bool last = s->result.at && op == &s->program->code[s->program->count - 1];
    for (int turned = 0; turned <= (int)wide; turned++) {
        tile_product t = {.dtype = s->program->dtype,
                          .alpha = op->alpha,
                          .beta = op->beta,
                          .dst = tile_matrices(s, op->dst, turned),
                          .items = s->items,
                          .count = s->count,
                          .which = !wide    ? TILE_ALL
                                   : turned ? TILE_TURNED
                                            : TILE_UPRIGHT};
        if (op->c != NS_NONE)
            t.c = tile_matrices(s, op->c, turned);
        if (op->kind == NS_PRODUCT)
            tile_wide(s, op, turned, &t);
        else
            tile_square(s, op, turned, &t);
        if (last) {
            t.dst.at = s->result.at;
            t.dst.stride = s->result.stride;
        }
        TRY(tile(s, &t));
    }
    return MUONSHARD_OK;
}

/* ---- the program ---- */

/* Squares are symmetric, so that a transposed one is as good. */
static muonshard_status multiply(const buffers *s, const ns_instruction *op) {
    const bool symmetric = op->kind != NS_PRODUCT;
    const ns_buffer b = op->kind == NS_SYMMETRIC_PRODUCT ? op->a : op->b;
    const ns_dtype operands = ns_operands(s->program, op), stored = ns_stored(s->program, op->dst);
    const void *left, *right;
    if (s->tiles)
        return tile_multiply(s, op);
    TRY(operand(s, op->a, operands, 0, &left));
    if (b == op->a)
        right = left;
    else
        TRY(operand(s, b, operands, 1, &right));
    const bool last = s->result.at && op == &s->program->code[s->program->count - 1];
    const gemm g = {.operands = gemm_type_of(operands),
                    .stored = gemm_type_of(stored),
                    .rows = s->m,
                    .cols = symmetric ? s->m : width(s, b),
                    .depth = width(s, op->a),
                    .b_transposed = symmetric,
                    .batch = s->count,
                    .alpha = (double)op->alpha,
                    .beta = (double)op->beta,
                    .a = matrices(s, op->a, left),
                    .b = matrices(s, b, right),
                    .c = matrices(s, op->dst, op->c == NS_NONE ? NULL : s->at[op->c]),
                    .dst = last ? s->result : matrices(s, op->dst, s->at[op->dst])};
    return symmetric ? symmetric_product(s, op, &g, operands, stored) : product(s, &g);
}

static muonshard_status run(const buffers *s, const ns_instruction *op) {
    switch (op->kind) {
    case NS_NORMALIZE: return normalize(s, op);
    case NS_SYMMETRIC_PRODUCT:
    case NS_COMMUTING_PRODUCT:
    case NS_PRODUCT: return multiply(s, op);
    case NS_ADD_IDENTITY: break; /* with the product before it */
    }
    return MUONSHARD_OK;
}

/* Where the last product leaves U itself, no pass is needed that takes it there: the items' places
 * are one batch as cuBLASLt knows them, evenly spaced, and none is turned; or as TMA does. */
static gemm_matrices results_of(const buffers *s) {
    const ns_program *program = s->program;
    const ns_instruction *last = &program->code[program->count - 1];
    const ptrdiff_t element = (ptrdiff_t)ns_dtype_size(ns_stored(program, program->result));
    const ptrdiff_t matrix = s->m * s->n * element;
    const char *first = s->items[0].out;
    const ptrdiff_t bytes = s->count > 1 ? (const char *)s->items[1].out - first : matrix;
    const gemm_matrices results = {first, s->n, bytes / element};
    bool even = last->kind == NS_PRODUCT && last->dst == program->result && bytes >= matrix &&
                bytes % element == 0 && (!s->tiles || tile_takes_places(results, s->m, s->n));
    for (size_t i = 0; i < s->count; i++)
        even = even && (s->tiles || !s->items[i].transposed) &&
               (const char *)s->items[i].out == first + (ptrdiff_t)i * bytes;
    return even ? results : (gemm_matrices){NULL, 0, 0};
}

static buffers buffers_of(backend *self, purpose why, const ns_program *program, int64_t m,
                          int64_t n, const orthogonalize_item *items, size_t count,
                          void *workspace) {
    buffers s = {.self = self,
                 .purpose = why,
                 .stream = cuda_of(self)->streams[STREAM_COMPUTE],
                 .program = program,
                 .m = m,
                 .n = n,
                 .items = items,
                 .count = count,
                 .tiles = tile_takes(self, program, m, n, count)};
    lay_out(&s, workspace);
    s.result = results_of(&s);
    return s;
}

static muonshard_status prepare_gram(const buffers *s, const ns_instruction *op) {
    TRY(multiply_fp64(s, s->x64, s->n, s->gram[0]));
    return op->norm == NS_NORM_SPECTRAL ? multiply_fp64(s, s->gram[0], s->m, s->gram[1])
                                        : MUONSHARD_OK;
}

muonshard_status cuda_prepare(backend *self, const ns_program *program, int64_t m, int64_t n,
                              const orthogonalize_item *items, size_t count, void *workspace) {
    if (!count)
        return MUONSHARD_OK;
    const bool measures = cuda_of(self)->measures_gemms;
    const buffers s =
        buffers_of(self, measures ? MEASURE : CHOOSE, program, m, n, items, count, workspace);
    /* As large as the numbers of matrices whose Frobenius norm is 1. */
    for (int b = NS_X; measures && b < NS_A + program->squares; b++) {
        const int64_t elements = m * width(&s, (ns_buffer)b);
        TRY_CUDA(self,
                 cuda_noise(s.at[b], (size_t)elements * count, (float)sqrt(3.0 / (double)elements),
                            ns_stored(program, (ns_buffer)b), s.stream));
    }
    for (int i = 0; i < program->count; i++) {
        const ns_instruction *op = &program->code[i];
        if (op->kind != NS_NORMALIZE && op->kind != NS_ADD_IDENTITY)
            TRY(multiply(&s, op));
        else if (cuda_needs_gram(op))
            TRY(prepare_gram(&s, op));
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
    const buffers s = buffers_of(self, RUN, program, m, n, items, count, workspace);
    const ns_dtype stored = ns_stored(program, program->result);
    for (int i = 0; i < program->count; i++)
        TRY(run(&s, &program->code[i]));
    if (!s.result.at)
        TRY_CUDA(self, cuda_give_back(items, count, m, n, !s.tiles, stored, s.at[program->result],
                                      ns_program_output(program), s.stream));
    return MUONSHARD_OK;
}
