/* cuda_tile_product.h - one launch of the kernel of tiles: what it is given. */
#ifndef CUDA_TILE_PRODUCT_H
#define CUDA_TILE_PRODUCT_H

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <stdbool.h>

#include "kernels/cuda_tiles.h"

/* dst = alpha a b^T + beta c for the matrices of a list; shifted = dst + gamma I, of dst as it was
 * rounded. Maps are of boxes of 64 x 64 of 16-bit elements [matrices, rows, columns] with a swizzle
 * of 128 bytes. */
typedef struct tile_product_args {
    CUtensorMap a, b, dst, shifted;
    tile_work work;
    const void *c;             /* [.., rows, cols]; NULL: nothing is added */
    int64_t c_pitch, c_stride; /* elements; the pitch is even */
    float alpha, beta, gamma;
    int shifts;      /* `shifted` is wanted; dst is symmetric */
    float *parts;    /* [clusters, 2, 128, width] of units that are cut; any values */
    unsigned *flags; /* [clusters, 2, 2], zero, and zero again in the end */
    uint16_t matrices[TILE_MATRICES]; /* which of the batch */
} tile_product_args;

#ifdef __cplusplus
extern "C"
#endif
    /* a_turned: operand a lies [depth, rows], and so does b; b_turned: b does, [depth, cols]. */
    cudaError_t
    cuda_tile_product(const tile_product_args *args, bool bf16, bool a_turned, bool b_turned,
                      cudaStream_t stream);

#endif
