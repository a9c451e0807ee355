/* cuda_gemm.h - the table of products: what cuda_gemm.c runs and cuda_gemm_table.c writes down. */
#ifndef CUDA_GEMM_H
#define CUDA_GEMM_H

#include "kernels/cuda.h"
#include "kernels/cuda_tiles.h"

/* Of a, b, c and dst. */
enum { GEMM_A, GEMM_B, GEMM_C, GEMM_DST, GEMM_PLACES };

/* Compared as bytes: all of it is set, padding too. Products of our own kernel have `tiles`, which
 * says whether a is turned and whether they may be cut along the depth, and neither pitch nor
 * stride nor alignment. */
typedef struct gemm_key {
    int64_t tiles, symmetric;
    int64_t operands, stored, b_transposed, adds, rows, cols, depth, batch;
    int64_t pitch[GEMM_PLACES], stride[GEMM_PLACES];
    int64_t alignment[GEMM_PLACES]; /* bytes, of the first matrix */
} gemm_key;

typedef struct gemm_choice {
    gemm_key key;
    cublasLtMatmulDesc_t operation;              /* own */
    cublasLtMatrixLayout_t layouts[GEMM_PLACES]; /* own; as cuBLAS sees them, in columns */
    cublasLtMatmulAlgo_t algorithm;              /* of tiles: width and sharers, see tile_cut */
} gemm_choice;

struct gemm_table {
    gemm_choice *choices; /* own */
    size_t count, capacity;
    size_t added; /* since they were written out, or read */
};

/* NULL: it has not been chosen. */
gemm_choice *gemm_find(const cuda_impl *impl, const gemm_key *key);
/* The fastest of `count` that `run` starts, with `context`; one that returns false is out of
 * question. Waits for the device. */
muonshard_status gemm_fastest(backend *self, bool (*run)(const void *context, int i),
                              const void *context, int count, int *best);
/* Room for one more at the end, which counts once `count` does; NULL: no memory. */
gemm_choice *gemm_next_choice(cuda_impl *impl);
/* Descriptors for the key. cuBLAS computes dst^T = b^T a^T: its A is b, its B is a. */
cublasStatus_t gemm_describe(gemm_choice *c);
void gemm_free_choice(gemm_choice *c);

static inline tile_cut gemm_cut(const gemm_choice *c) {
    return (tile_cut){(int)c->algorithm.data[0], (int)c->algorithm.data[1]};
}
/* In place is for cuBLASLt what has one address and one layout: that of dst, where nothing is
 * added. */
static inline cublasLtMatrixLayout_t gemm_layout_of_c(const gemm_choice *c) {
    return c->layouts[c->key.adds ? GEMM_C : GEMM_DST];
}

#endif
