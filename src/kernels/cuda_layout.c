#include "kernels/cuda_layout.h"

enum { ALIGNMENT = 256 };

static size_t take(size_t *end, size_t bytes) {
    const size_t start = *end;
    *end += (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    return start;
}

int cuda_needs_gram(const ns_instruction *op) {
    return op->kind == NS_NORMALIZE &&
           (op->a != NS_NONE || op->norm == NS_NORM_AOL || op->norm == NS_NORM_SCHATTEN4 ||
            op->norm == NS_NORM_SPECTRAL);
}

cuda_layout cuda_layout_of(const ns_program *p, int64_t m, int64_t n, size_t count) {
    cuda_layout s = {.bytes = 0};
    const size_t square = count * (size_t)m * (size_t)m, wide = count * (size_t)m * (size_t)n;
    /* Where squares are kept in another dtype than X, they are rounded to X's before they meet it.
     */
    const size_t narrowed = ns_dtype_size(p->dtype) != ns_dtype_size(p->square_dtype) ? square : 0;
    int gram = 0, spectral = 0;
    for (int i = 0; i < p->count; i++) {
        gram = gram || cuda_needs_gram(&p->code[i]);
        spectral =
            spectral || (cuda_needs_gram(&p->code[i]) && p->code[i].norm == NS_NORM_SPECTRAL);
    }
    s.at[NS_X] = take(&s.bytes, wide * ns_dtype_size(p->dtype));
    s.at[NS_Y] = take(&s.bytes, wide * ns_dtype_size(p->dtype));
    for (int i = 0; i < p->squares; i++)
        s.at[NS_A + i] = take(&s.bytes, square * ns_dtype_size(p->square_dtype));
    for (int i = 0; i < 2; i++)
        s.operands[i] = take(&s.bytes, narrowed * ns_dtype_size(p->dtype));
    s.factors = take(&s.bytes, count * (size_t)m * sizeof(double));
    s.squares = take(&s.bytes, count * sizeof(double));
    s.x64 = take(&s.bytes, gram ? wide * sizeof(double) : 0);
    s.gram[0] = take(&s.bytes, gram ? square * sizeof(double) : 0);
    s.gram[1] = take(&s.bytes, spectral ? square * sizeof(double) : 0);
    s.logs = take(&s.bytes, spectral ? 2 * count * sizeof(double) : 0);
    s.gemm = take(&s.bytes, GEMM_WORKSPACE);
    return s;
}
