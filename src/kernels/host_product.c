#include "kernels/host_product.h"

#include <string.h>

#include "dtype.h"

enum {
    CACHE_LINE = 64,
    DEPTH_BLOCK = 512,   /* groups whose panel of b stays in the nearer caches */
    ROWS_BLOCK = 192,    /* packed rows of as many groups, which stay in the second */
    COLUMNS_BLOCK = 384, /* whose results stay cached while the whole depth goes by */
    SHARED_BLOCK = 96,   /* columns, where threads share a product */
    STRIP = 16           /* steps of the depth that are turned at once */
};

/* One side, packed: [panels, groups, kernel->panel]. */
typedef struct packed {
    const tile_kernel *kernel;
    size_t groups; /* of the whole depth */
    uint32_t *at;
} packed;

static size_t smaller(size_t a, size_t b) {
    return a < b ? a : b;
}

static size_t round_up(size_t n, size_t unit) {
    return (n + unit - 1) / unit * unit;
}

static size_t groups_of(const tile_kernel *kernel, size_t depth) {
    const size_t even = depth + depth % 2;
    return kernel->format == TILE_FP32         ? depth
           : kernel->format == TILE_BF16_PAIRS ? even / 2
                                               : even;
}

/* ---- packing ---- */

/* strip [steps, panel]: steps of the depth from `k`, `width` columns from `side`, zeros after them.
 */
static void read_strip(uint32_t *strip, const tile_kernel *kernel, const product *p,
                       const product_operand *from, size_t sides, size_t side, size_t k,
                       size_t steps, size_t width) {
    const size_t panel = kernel->panel;
    const uint32_t *x = (const uint32_t *)(const void *)from->x;
    if (width < panel)
        memset(strip, 0, steps * panel * sizeof *strip);
    if (from->across)
        for (size_t i = 0; i < steps; i++)
            memcpy(strip + i * panel, x + (k + i) * sides + side, width * sizeof *strip);
    else
        kernel->turn(strip, panel, x + side * p->depth + k, p->depth, width, steps);
    if (from->rounded)
        return;
    float *value = (float *)(void *)strip;
    if (p->operands == NS_BF16)
        kernel->store(value, value, NULL, steps * panel, (tile_scale){.alpha = 1.0F, .bf16 = true});
    else if (p->operands == NS_FP16)
        dtype_round(value, MUONSHARD_FP16, steps * panel);
    for (size_t i = 0; p->operands == NS_TF32 && i < steps * panel; i++)
        value[i] = dtype_round_tf32(value[i]);
}

/* A strip of fp32 that are bf16 numbers into the panel at its step `k`, by pairs. */
static void put_pairs(uint32_t *to, const tile_kernel *kernel, const uint32_t *strip, size_t k,
                      size_t steps) {
    static const uint32_t zeros[TILE_MAX_COLS];
    const size_t panel = kernel->panel;
    for (size_t i = 0; i < steps; i += 2) {
        const uint32_t *first = strip + i * panel, *second = i + 1 < steps ? first + panel : zeros;
        if (kernel->format == TILE_BF16_PAIRS) {
            uint32_t *out = to + (k + i) / 2 * panel;
            for (size_t j = 0; j < panel; j++)
                out[j] = first[j] >> 16 | (second[j] & 0xffff0000U);
        } else {
            memcpy(to + (k + i) * panel, second, panel * sizeof *to);
            memcpy(to + (k + i + 1) * panel, first, panel * sizeof *to);
        }
    }
}

/* Sides [first, first + count) of an operand that has `sides`. */
static void pack(const packed *to, const product *p, const product_operand *from, size_t sides,
                 size_t first, size_t count) {
    const tile_kernel *kernel = to->kernel;
    const bool pairs = kernel->format != TILE_FP32;
    uint32_t local[STRIP * TILE_MAX_COLS];
    for (size_t j = 0; j < count; j += kernel->panel) {
        uint32_t *panel = to->at + j * to->groups;
        const size_t width = smaller(kernel->panel, count - j);
        for (size_t k = 0; k < p->depth; k += STRIP) {
            const size_t steps = smaller(STRIP, p->depth - k);
            if (!pairs) {
                read_strip(panel + k * kernel->panel, kernel, p, from, sides, first + j, k, steps,
                           width);
                continue;
            }
            read_strip(local, kernel, p, from, sides, first + j, k, steps, width);
            put_pairs(panel, kernel, local, k, steps);
        }
    }
}

/* ---- tiles ---- */

typedef struct tile_place {
    size_t row, col, rows, cols; /* of dst */
    bool first, last;            /* of the depth */
} tile_place;

/* Until the last block of the depth dst holds the sums so far. */
static void begin_tile(float *tile, size_t stride, const product *p, const tile_place *at) {
    if (at->first)
        memset(tile, 0, at->rows * stride * sizeof *tile);
    for (size_t i = 0; i < at->rows && !at->first; i++)
        memcpy(tile + i * stride, p->dst + (at->row + i) * p->cols + at->col,
               at->cols * sizeof *tile);
}

/* The sums of the whole depth to what is stored. Symmetric: the tile keeps it, to be mirrored, and
 * what lies above the diagonal is not written. */
static void end_tile(float *tile, const tile_kernel *kernel, const product *p,
                     const tile_place *at) {
    const size_t stride = kernel->panel;
    const tile_scale scale = {p->alpha, p->beta, p->stored == NS_BF16};
    for (size_t i = 0; i < at->rows; i++) {
        const size_t place = (at->row + i) * p->cols + at->col;
        float *sum = tile + i * stride, *dst = p->dst + place;
        if (!at->last) {
            memcpy(dst, sum, at->cols * sizeof *dst);
            continue;
        }
        const size_t width = p->symmetric ? smaller(at->cols, at->row + i + 1 - at->col) : at->cols;
        float *out = p->symmetric ? sum : dst;
        kernel->store(out, sum, p->c ? p->c + place : NULL, width, scale);
        if (p->stored == NS_FP16)
            dtype_round(out, MUONSHARD_FP16, width);
        if (out == sum)
            memcpy(dst, sum, width * sizeof *dst);
    }
}

/* ---- blocks ---- */

typedef struct block {
    size_t row, rows, col, cols; /* of dst */
    size_t group, groups;        /* of the depth */
    size_t b_col;                /* the column of dst that the first panel of b is of */
} block;

/* Columns of a tile row that have to be computed: none above the diagonal. */
static size_t wanted_columns(const product *p, const tile_place *at) {
    if (!p->symmetric)
        return at->cols;
    const size_t end = at->row + at->rows;
    return end <= at->col ? 0 : smaller(at->cols, end - at->col);
}

/* The finished tiles of a panel, below each other, to where their transpose belongs. */
static void mirror(const product *p, const tile_kernel *kernel, const float *tiles, const block *at,
                   size_t col, size_t cols) {
    const size_t stride = kernel->panel;
    uint32_t *dst = (uint32_t *)(void *)p->dst;
    const uint32_t *from = (const uint32_t *)(const void *)tiles;
    size_t above = col + cols > at->row ? smaller(at->rows, col + cols - at->row) : 0;
    for (size_t i = 0; i < above; i++) /* rows that meet the diagonal */
        for (size_t j = 0; j < cols && col + j <= at->row + i; j++)
            dst[(col + j) * p->cols + at->row + i] = from[i * stride + j];
    kernel->turn(dst + col * p->cols + at->row + above, p->cols, from + above * stride, stride,
                 at->rows - above, cols);
}

static void multiply_block(const product *p, const packed *a, const packed *b, const block *at) {
    const tile_kernel *kernel = a->kernel;
    const size_t panel = kernel->panel;
    const bool last = at->group + at->groups == a->groups;
    _Alignas(CACHE_LINE) float tiles[ROWS_BLOCK * TILE_MAX_COLS]; /* [rows, panel] */
    for (size_t j = 0; j < at->cols; j += panel) {
        const size_t col = at->col + j, cols = smaller(panel, at->cols - j);
        const uint32_t *b_panel = b->at + (col - at->b_col) * b->groups + at->group * panel;
        for (size_t i = 0; i < at->rows; i += kernel->rows) {
            float *tile = tiles + i * panel;
            tile_place place = {.row = at->row + i,
                                .col = col,
                                .rows = smaller(kernel->rows, at->rows - i),
                                .cols = cols,
                                .first = at->group == 0,
                                .last = last};
            place.cols = wanted_columns(p, &place);
            if (!place.cols)
                continue;
            const uint32_t *a_panel = a->at + place.row / panel * panel * a->groups +
                                      at->group * panel + place.row % panel;
            begin_tile(tile, panel, p, &place);
            kernel->multiply(at->groups, a_panel, b_panel,
                             (int)((place.cols + kernel->vector - 1) / kernel->vector), tile);
            end_tile(tile, kernel, p, &place);
        }
        if (p->symmetric && last)
            mirror(p, kernel, tiles, at, col, cols);
    }
}

/* Columns [col, col + cols) of dst, of which b holds the panels. */
static void multiply_columns(const product *p, const packed *a, const packed *b, size_t b_col,
                             size_t col, size_t cols) {
    const size_t first_row = p->symmetric ? col : 0;
    const size_t blocks = (a->groups + DEPTH_BLOCK - 1) / DEPTH_BLOCK;
    const size_t depth = (a->groups + blocks - 1) / blocks;
    for (size_t group = 0; group < a->groups; group += depth)
        for (size_t row = first_row; row < p->rows; row += ROWS_BLOCK)
            multiply_block(p, a, b,
                           &(block){.row = row,
                                    .rows = smaller(ROWS_BLOCK, p->rows - row),
                                    .col = col,
                                    .cols = cols,
                                    .group = group,
                                    .groups = smaller(depth, a->groups - group),
                                    .b_col = b_col});
}

/* ---- products ---- */

typedef struct product_job {
    const product *p;
    packed a, b;    /* b: of the first thread */
    size_t b_words; /* from one thread's b to the next */
    size_t columns; /* a task */
} product_job;

static size_t packed_words(const tile_kernel *kernel, size_t sides, size_t depth) {
    return round_up(round_up(sides, kernel->panel) * groups_of(kernel, depth),
                    CACHE_LINE / sizeof(uint32_t));
}

static size_t columns_of(const host_threads *threads) {
    return host_threads_count(threads) > 1 ? SHARED_BLOCK : COLUMNS_BLOCK;
}

size_t host_product_workspace(host_isa isa, const product *p, const host_threads *threads) {
    const tile_kernel *kernel = tile_kernel_for(isa, p->operands == NS_BF16);
    size_t words = packed_words(kernel, p->rows, p->depth);
    if (!p->square)
        words += packed_words(kernel, smaller(p->cols, columns_of(threads)), p->depth) *
                 (size_t)host_threads_count(threads);
    return words * sizeof(uint32_t);
}

/* A panel of a. */
static void pack_task(void *user, size_t index, int thread) {
    (void)thread;
    const product_job *j = user;
    const size_t side = index * j->a.kernel->panel;
    packed to = j->a;
    to.at += side * to.groups;
    pack(&to, j->p, &j->p->a, j->p->rows, side, smaller(to.kernel->panel, j->p->rows - side));
}

static void columns_task(void *user, size_t index, int thread) {
    const product_job *j = user;
    const product *p = j->p;
    const size_t col = index * j->columns, cols = smaller(j->columns, p->cols - col);
    if (p->square) {
        multiply_columns(p, &j->a, &j->a, 0, col, cols);
        return;
    }
    packed b = j->b;
    b.at += (size_t)thread * j->b_words;
    pack(&b, p, &p->b, p->cols, col, cols);
    multiply_columns(p, &j->a, &b, col, col, cols);
}

void host_product(host_isa isa, const product *p, void *workspace, host_threads *threads) {
    const tile_kernel *kernel = tile_kernel_for(isa, p->operands == NS_BF16);
    const size_t groups = groups_of(kernel, p->depth), columns = columns_of(threads);
    uint32_t *a = workspace;
    product_job job = {
        .p = p,
        .a = {.kernel = kernel, .groups = groups, .at = a},
        .b = {.kernel = kernel,
              .groups = groups,
              .at = a + packed_words(kernel, p->rows, p->depth)},
        .b_words = packed_words(kernel, smaller(p->cols, columns), p->depth),
        .columns = columns,
    };
    host_threads_run(threads, pack_task, &job, round_up(p->rows, kernel->panel) / kernel->panel);
    host_threads_run(threads, columns_task, &job, round_up(p->cols, columns) / columns);
}
