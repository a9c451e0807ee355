/* gpt_cuda.h - what the files of the layers on CUDA share: the context behind their table, and
 * products through cuBLASLt. */
#ifndef GPT_CUDA_H
#define GPT_CUDA_H

#include <cublasLt.h>
#include <cuda_runtime_api.h>

#include "gpt_device.h"

typedef struct gpt_gemm_table gpt_gemm_table;

typedef struct gpt_cuda {
    gpt_layers layers; /* the table; its self is this */
    int device;
    cudaStream_t stream; /* borrowed */
    cublasComputeType_t compute;
    cublasLtHandle_t blas; /* own, as all that follows */
    gpt_gemm_table *gemms;
    void *workspace;   /* of cuBLASLt, [GPT_WORKSPACE] device */
    double *parts;     /* of sums over rows, [GPT_PART_BYTES] device */
    double *loss;      /* [1] device */
    double *host_loss; /* [1] pinned */
    char *staging;     /* [GPT_STAGING] pinned */
    size_t staged;     /* bytes of it that may not have been read yet */
    char error[256];   /* the first failure; empty: none */
} gpt_cuda;

enum { GPT_WORKSPACE = 32 << 20, GPT_STAGING = 1 << 20 };

typedef enum gpt_gemm_form { GEMM_AB, GEMM_ABT, GEMM_ATB } gpt_gemm_form; /* T: transposed */

/* A batch of products [rows, cols] of a and b, row-major, one matrix right after the other.
 * Whatever the form, `depth` is what is summed over. */
typedef struct gpt_gemm {
    cublasComputeType_t compute;
    gpt_gemm_form form;
    int rows, cols, depth, batch;
    float alpha;
} gpt_gemm;

/* dst = alpha a b + add, where NULL adds nothing; add may be dst. */
void gpt_gemm_run(gpt_cuda *g, const gpt_gemm *gemm, float *dst, const float *a, const float *b,
                  const float *add);
void gpt_gemm_table_free(gpt_gemm_table *table);

/* Keeps the first error; true where there is none so far. */
bool gpt_cuda_ok(gpt_cuda *g, cudaError_t code, const char *what);
void gpt_cuda_fail(gpt_cuda *g, const char *format, ...) __attribute__((format(printf, 2, 3)));

#endif
