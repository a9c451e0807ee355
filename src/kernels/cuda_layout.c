#include "kernels/cuda_layout.h"

enum { ALIGNMENT = 256 };

static size_t take(size_t *end, size_t bytes) {
    const size_t start = *end;
    *end += (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    return start;
}

/* ---- panels of symmetric products ---- */

enum { PANEL_TILE = 128, PANEL_UNIT = 8, MOST_PANELS = 8 };
#define TILE_RATE   4.8e6 /* flop a microsecond and multiprocessor: 80 % of 790 TFLOP/s by 132 */
#define MEMORY_RATE 3.5e6 /* bytes a microsecond */
#define LAUNCH_US   2.0   /* of a kernel in a graph that waits for the one before */

/* Whole tiles where there are enough of them, so that all panels are aligned as the first is. */
int64_t cuda_panel_begin(int64_t m, int panels, int i) {
    const int64_t unit = m >= (int64_t)panels * PANEL_TILE ? PANEL_TILE : PANEL_UNIT;
    const int64_t at = (m * i / panels + unit - 1) / unit * unit;
    return i == panels || at > m ? m : at;
}

static double panels_us(int64_t m, int64_t depth, size_t count, int panels, int processors) {
    const double tile = 2.0 * PANEL_TILE * PANEL_TILE * (double)depth / TILE_RATE;
    double us = 0.0;
    for (int i = 0; i < panels; i++) {
        const int64_t begin = cuda_panel_begin(m, panels, i);
        const int64_t end = cuda_panel_begin(m, panels, i + 1);
        const int64_t down = (end - begin + PANEL_TILE - 1) / PANEL_TILE;
        const int64_t across = (end + PANEL_TILE - 1) / PANEL_TILE;
        const int64_t tiles = down * across * (int64_t)count;
        us += LAUNCH_US + (double)((tiles + processors - 1) / processors) * tile;
    }
    return us;
}

int cuda_panels(int64_t m, int64_t depth, size_t count, int mirrored, int processors) {
    const double mirror =
        mirrored ? 0.0 : LAUNCH_US + 2.0 * (double)count * (double)m * (double)m / MEMORY_RATE;
    double best = panels_us(m, depth, count, 1, processors);
    int panels = 1;
    for (int k = 2; k <= MOST_PANELS && (int64_t)k * PANEL_TILE <= m; k++) {
        const double us = mirror + panels_us(m, depth, count, k, processors);
        if (us < best) {
            best = us;
            panels = k;
        }
    }
    return panels;
}

/* ---- workspace ---- */

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
