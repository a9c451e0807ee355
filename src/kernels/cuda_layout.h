/* cuda_layout.h - what the CUDA backend works in, as offsets: known without CUDA, so that a plan
 * for GPUs can be made where there are none. */
#ifndef CUDA_LAYOUT_H
#define CUDA_LAYOUT_H

#include <stddef.h>

#include "kernels/program.h"

/* Sums of squares are made of parts: as many as depend on the length alone, at most CUDA_PARTS an
 * item, CUDA_LIST items at a time. */
enum { CUDA_PARTS = 1024, CUDA_LIST = 32 };
/* Of the backend itself, whatever it is used for. */
#define CUDA_SCRATCH_BYTES ((size_t)2 * CUDA_LIST * CUDA_PARTS * sizeof(double))
#define GEMM_WORKSPACE     ((size_t)32 << 20) /* what cuBLAS asks for on Hopper */

/* Bytes from the start of the workspace of one call of orthogonalize. */
typedef struct cuda_layout {
    size_t at[NS_BUFFER_COUNT]; /* X, Y [count, m, n]; A to D [count, m, m], as stored */
    size_t operands[2];  /* [count, m, m]: squares as they enter products of a narrower dtype */
    size_t factors;      /* [count, m] fp64 */
    size_t squares;      /* [count] fp64: of items that have none */
    size_t x64, gram[2]; /* [count, m, n]; [count, m, m], fp64: of norms that need X X^T */
    size_t logs;         /* [2, count] fp64: spectral */
    size_t gemm;         /* [GEMM_WORKSPACE] */
    size_t bytes;        /* of all */
} cuda_layout;

cuda_layout cuda_layout_of(const ns_program *program, int64_t m, int64_t n, size_t count);

/* Symmetric results [count, m, m] of products over `depth` are made by panels of rows, each up to
 * its last row's diagonal element, and mirrored: k of them do (1 + 1/k)/2 of the work, in k
 * launches and one pass more unless everything is `mirrored` anyway. How many take the least time
 * by a model of waves: tiles of 128 x 128 over `processors` at what 16-bit products reach on an
 * H200. */
int cuda_panels(int64_t m, int64_t depth, size_t count, int mirrored, int processors);
/* The first row of panel `i` of `panels`; m for i = panels. */
int64_t cuda_panel_begin(int64_t m, int panels, int i);

/* The instruction needs X X^T in fp64. */
int cuda_needs_gram(const ns_instruction *op);

#endif
