/* host_tile.h - the innermost loop of matrix products, for the instruction sets there are: a tile
 * of C from two packed panels. Every element is one chain of fused multiply-adds over the depth, in
 * order, so that all fused kernels give the same bits and nothing depends on how a matrix is cut.
 */
#ifndef HOST_TILE_H
#define HOST_TILE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include "kernels/backend.h"

/* What a packed panel holds. A group is what one step of the depth reads: one fp32, or two bf16, of
 * which the instruction for them adds the second one first; without it, pairs of fp32 change
 * places. */
typedef enum tile_format { TILE_FP32, TILE_FP32_SWAPPED, TILE_BF16_PAIRS } tile_format;

#define TILE_MAX_ROWS 8
#define TILE_MAX_COLS 48

/* tile [rows, panel] += a b, of which the first `vectors` * `vector` columns are wanted. Panels are
 * [depth, panel] groups; `a` begins at the first of `rows` columns of one. */
typedef void (*tile_multiply)(size_t depth, const void *a, const void *b, int vectors, float *tile);

/* out[i] = alpha sum[i] + beta c[i] (c NULL: alpha sum[i]), rounded to bf16 if asked for; out may
 * be sum. */
typedef struct tile_scale {
    float alpha, beta;
    bool bf16;
} tile_scale;
typedef void (*tile_store)(float *out, const float *sum, const float *c, size_t count,
                           tile_scale scale);

/* out [cols, out_stride] = transpose of in [rows, in_stride]; fp32, by its bits. */
typedef void (*tile_turn)(uint32_t *out, size_t out_stride, const uint32_t *in, size_t in_stride,
                          size_t rows, size_t cols);

typedef struct tile_kernel {
    tile_format format;
    size_t rows, panel; /* rows divide panel */
    size_t vector;      /* divides panel: columns that are computed together */
    tile_multiply multiply;
    tile_store store;
    tile_turn turn;
} tile_kernel;

/* The kernel for fp32 operands, or for such that are bf16 numbers. */
const tile_kernel *tile_kernel_for(host_isa isa, bool bf16);

#endif
