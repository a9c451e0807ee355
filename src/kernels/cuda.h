/* cuda.h - what the C files of the CUDA backend share. */
#ifndef CUDA_BACKEND_H
#define CUDA_BACKEND_H

#include <cublasLt.h>
#include <cuda_runtime_api.h>

#include "kernels/backend.h"
#include "kernels/cuda_layout.h"

typedef struct gemm_table gemm_table;

typedef struct cuda_impl {
    cudaStream_t streams[STREAM_COUNT]; /* own; one and the same where the device is shared */
    cudaEvent_t fences[STREAM_COUNT];   /* own; by the stream that is waited for */
    cudaEvent_t joined;                 /* own */
    cublasLtHandle_t blas;              /* own */
    gemm_table *gemms;                  /* own */
    bool measures_gemms;                /* algorithms are chosen by time */
    int processors;                     /* multiprocessors of the device */
    int capability;                     /* of it: 90 is sm_90 */
    char model[48];                     /* of the device: name and architecture */
    int panels;                         /* of symmetric products; 0: as many as pay */
    struct tile_products *tiles;        /* own; NULL: all products are cuBLASLt's */
    double *scratch;                    /* own, device, of the compute stream */
    cudaEvent_t *stamps;                /* own, [stamp_count] */
    size_t stamp_count;
    cudaGraphExec_t *segments; /* own, [segment_count]; NULL until they are recorded */
    size_t segment_count;
    bool capturing; /* on the compute stream */
} cuda_impl;

static inline cuda_impl *cuda_of(const backend *self) {
    return self->impl;
}

/* Returns the status for an outcome of the runtime's, with a text. */
muonshard_status cuda_failed(backend *self, cudaError_t code, const char *what);

#define TRY_CUDA(self, call)                                                                       \
    do {                                                                                           \
        const cudaError_t try_cuda_ = (call);                                                      \
        if (try_cuda_ != cudaSuccess)                                                              \
            return cuda_failed(self, try_cuda_, #call);                                            \
    } while (0)

/* See plugin.h. */
muonshard_status cuda_open(cuda_options options, backend **out, error_text *error);

/* ---- cuda_orthogonalize.c ---- */

size_t cuda_orthogonalize_workspace(backend *self, const ns_program *program, int64_t m, int64_t n,
                                    size_t count);
muonshard_status cuda_orthogonalize(backend *self, const step_record *record,
                                    const ns_program *program, int64_t m, int64_t n,
                                    const orthogonalize_item *items, size_t count, void *workspace);
muonshard_status cuda_prepare(backend *self, const ns_program *program, int64_t m, int64_t n,
                              const orthogonalize_item *items, size_t count, void *workspace);

/* ---- cuda_gemm.c: batched products through cuBLASLt ---- */

typedef enum gemm_type { GEMM_FP32, GEMM_TF32, GEMM_BF16, GEMM_FP16, GEMM_FP64 } gemm_type;

/* Matrices of a batch: the first, and how many elements lie from a row to the next and from a
 * matrix to the next. */
typedef struct gemm_matrices {
    const void *at;
    int64_t pitch, stride;
} gemm_matrices;

/* dst [batch, rows, cols] = alpha a [batch, rows, depth] b + beta c, row-major; b is [batch, depth,
 * cols], or [batch, cols, depth] of which the transpose is taken. `stored`: of c and dst. c.at may
 * be NULL where beta is 0. */
typedef struct gemm {
    gemm_type operands, stored;
    int64_t rows, cols, depth;
    bool b_transposed;
    size_t batch;
    double alpha, beta;
    gemm_matrices a, b, c;
    gemm_matrices dst; /* is written */
} gemm;

/* Descriptors and algorithm are chosen once for what is alike in all but numbers and addresses:
 * here, or in gemm_prepare before. `workspace` [GEMM_WORKSPACE]. */
muonshard_status gemm_run(backend *self, const gemm *g, void *workspace);
/* Chooses, so that gemm_run has not to. Where algorithms are measured, those that cuBLASLt proposes
 * run, into dst, and the fastest is taken: waits for the device. */
muonshard_status gemm_prepare(backend *self, const gemm *g, void *workspace);
void gemm_table_free(gemm_table *table);

/* ---- cuda_tile_product.c: products through a kernel of ours, see cuda_tiles.h ---- */

/* Which matrices of a batch: those of items that lie as they are oriented, or turned. */
typedef enum tile_which { TILE_ALL, TILE_UPRIGHT, TILE_TURNED } tile_which;

/* dst [rows, cols] = alpha a b^T + beta c of 16-bit matrices, row-major; a [rows, depth], or
 * [depth, rows] where it is turned; b [cols, depth] or [depth, cols]. Symmetric: rows and cols are
 * alike, a b^T is symmetric but for rounding, and dst equals its transpose to the bit. shifted =
 * dst + gamma I, unless it is NULL. a_turned goes with b_turned and no other way. */
typedef struct tile_product {
    ns_dtype dtype;
    int64_t rows, cols, depth;
    bool symmetric, a_turned, b_turned;
    float alpha, beta, gamma;
    gemm_matrices a, b, c;
    gemm_matrices dst, shifted; /* are written */
    const orthogonalize_item *items;
    size_t count; /* of items */
    tile_which which;
} tile_product;

/* ERR_CONFIG: the device has not the instructions, or the driver no tensor maps. `may_cut`: see
 * tile_cuts. */
muonshard_status tile_products_open(backend *self, bool may_cut);
void tile_products_close(backend *self);
/* Whether all products of the program are this kernel's: 16 bits, and rows and starts that are
 * multiples of 16 bytes, as TMA wants them. */
bool tile_takes(const backend *self, const ns_program *program, int64_t m, int64_t n, size_t count);
/* And whether it can leave matrices [m, n] and [n, m] at these places: a number of rows apart. */
bool tile_takes_places(gemm_matrices of, int64_t m, int64_t n);
/* As gemm_run and gemm_prepare. */
muonshard_status tile_run(backend *self, const tile_product *t, void *workspace);
muonshard_status tile_prepare(backend *self, const tile_product *t, void *workspace);

/* ---- cuda_gemm_table.c ---- see choices of stream_ops */

muonshard_status gemm_table_text(backend *self, char **text);
void gemm_table_kept(backend *self);
muonshard_status gemm_table_read(backend *self, const char *text);

#endif
