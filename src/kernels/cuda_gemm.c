/* cuda_gemm.c - batched products through cuBLASLt: descriptors and algorithm of a shape are made
 * when it comes for the first time, and kept. */
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda.h"

typedef struct gemm_key { /* compared as bytes: all of it is set, padding too */
    int32_t operands, stored;
    int64_t b_transposed, rows, cols, depth, batch;
} gemm_key;

typedef struct gemm_choice {
    gemm_key key;
    cublasLtMatmulDesc_t operation;           /* own */
    cublasLtMatrixLayout_t left, right, dest; /* own; as cuBLAS sees them, in columns */
    cublasLtMatmulAlgo_t algorithm;
} gemm_choice;

struct gemm_table {
    gemm_choice *choices; /* own */
    size_t count, capacity;
};

static cudaDataType_t data_type(gemm_type type) {
    switch (type) {
    case GEMM_BF16: return CUDA_R_16BF;
    case GEMM_FP16: return CUDA_R_16F;
    case GEMM_FP64: return CUDA_R_64F;
    default: return CUDA_R_32F;
    }
}

static cublasComputeType_t compute_type(gemm_type type) {
    return type == GEMM_FP64   ? CUBLAS_COMPUTE_64F
           : type == GEMM_TF32 ? CUBLAS_COMPUTE_32F_FAST_TF32
                               : CUBLAS_COMPUTE_32F;
}

static muonshard_status blas_failed(backend *self, cublasStatus_t code, const gemm_key *key) {
    return fail(&self->error,
                code == CUBLAS_STATUS_ALLOC_FAILED ? MUONSHARD_ERR_MEMORY : MUONSHARD_ERR_INTERNAL,
                "cuBLASLt: %s, for %lld products of [%lld, %lld] and [%lld, %lld]",
                cublasLtGetStatusString(code), (long long)key->batch, (long long)key->rows,
                (long long)key->depth, (long long)key->depth, (long long)key->cols);
}

static void free_choice(gemm_choice *c) {
    if (c->operation)
        cublasLtMatmulDescDestroy(c->operation);
    const cublasLtMatrixLayout_t layouts[] = {c->left, c->right, c->dest};
    for (int i = 0; i < 3; i++)
        if (layouts[i])
            cublasLtMatrixLayoutDestroy(layouts[i]);
}

void gemm_table_free(gemm_table *table) {
    if (!table)
        return;
    for (size_t i = 0; i < table->count; i++)
        free_choice(&table->choices[i]);
    free(table->choices);
    free(table);
}

#define TRY_BLAS(call)                                                                             \
    do {                                                                                           \
        const cublasStatus_t try_blas_ = (call);                                                   \
        if (try_blas_ != CUBLAS_STATUS_SUCCESS)                                                    \
            return try_blas_;                                                                      \
    } while (0)

/* [rows, cols] in columns, one matrix right after the other. */
static cublasStatus_t make_layout(cublasLtMatrixLayout_t *layout, gemm_type type, int64_t rows,
                                  int64_t cols, int64_t batch) {
    const int32_t count = (int32_t)batch;
    const int64_t stride = rows * cols;
    TRY_BLAS(
        cublasLtMatrixLayoutCreate(layout, data_type(type), (uint64_t)rows, (uint64_t)cols, rows));
    TRY_BLAS(cublasLtMatrixLayoutSetAttribute(*layout, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count,
                                              sizeof count));
    return cublasLtMatrixLayoutSetAttribute(*layout, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET,
                                            &stride, sizeof stride);
}

static cublasStatus_t choose_algorithm(cublasLtHandle_t blas, gemm_choice *c) {
    cublasLtMatmulPreference_t preference = NULL;
    cublasLtMatmulHeuristicResult_t result;
    const size_t bytes = GEMM_WORKSPACE;
    int found = 0;
    TRY_BLAS(cublasLtMatmulPreferenceCreate(&preference));
    cublasStatus_t status = cublasLtMatmulPreferenceSetAttribute(
        preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes, sizeof bytes);
    if (status == CUBLAS_STATUS_SUCCESS)
        status = cublasLtMatmulAlgoGetHeuristic(blas, c->operation, c->left, c->right, c->dest,
                                                c->dest, preference, 1, &result, &found);
    cublasLtMatmulPreferenceDestroy(preference);
    if (status == CUBLAS_STATUS_SUCCESS)
        status = found ? result.state : CUBLAS_STATUS_NOT_SUPPORTED;
    if (status == CUBLAS_STATUS_SUCCESS)
        c->algorithm = result.algo;
    return status;
}

/* Rows in memory are columns to cuBLAS, which therefore computes dst^T = b^T a^T. */
static cublasStatus_t make_choice(cublasLtHandle_t blas, gemm_choice *c) {
    const gemm_key *k = &c->key;
    const gemm_type operands = (gemm_type)k->operands;
    const cudaDataType_t scalars = operands == GEMM_FP64 ? CUDA_R_64F : CUDA_R_32F;
    const cublasOperation_t transposed = CUBLAS_OP_T;
    TRY_BLAS(cublasLtMatmulDescCreate(&c->operation, compute_type(operands), scalars));
    if (k->b_transposed)
        TRY_BLAS(cublasLtMatmulDescSetAttribute(c->operation, CUBLASLT_MATMUL_DESC_TRANSA,
                                                &transposed, sizeof transposed));
    const int64_t b_rows = k->b_transposed ? k->depth : k->cols;
    const int64_t b_cols = k->b_transposed ? k->cols : k->depth;
    TRY_BLAS(make_layout(&c->left, operands, b_rows, b_cols, k->batch));
    TRY_BLAS(make_layout(&c->right, operands, k->depth, k->rows, k->batch));
    TRY_BLAS(make_layout(&c->dest, (gemm_type)k->stored, k->cols, k->rows, k->batch));
    return choose_algorithm(blas, c);
}

/* Room for one more. */
static gemm_choice *next_choice(cuda_impl *impl) {
    if (!impl->gemms)
        impl->gemms = calloc(1, sizeof *impl->gemms);
    gemm_table *t = impl->gemms;
    if (t && t->count == t->capacity) {
        const size_t capacity = t->capacity ? 2 * t->capacity : 16;
        gemm_choice *more = realloc(t->choices, capacity * sizeof *more);
        if (!more)
            return NULL;
        t->choices = more;
        t->capacity = capacity;
    }
    return t ? &t->choices[t->count] : NULL;
}

static muonshard_status find_choice(backend *self, const gemm_key *key, gemm_choice **out) {
    cuda_impl *impl = cuda_of(self);
    for (size_t i = 0; impl->gemms && i < impl->gemms->count; i++) {
        *out = &impl->gemms->choices[i];
        if (memcmp(&(*out)->key, key, sizeof *key) == 0)
            return MUONSHARD_OK;
    }
    *out = next_choice(impl);
    FAIL_IF(!*out, &self->error, MUONSHARD_ERR_MEMORY, "out of memory");
    **out = (gemm_choice){.key = *key};
    const cublasStatus_t code = make_choice(impl->blas, *out);
    if (code != CUBLAS_STATUS_SUCCESS) {
        free_choice(*out);
        return blas_failed(self, code, key);
    }
    impl->gemms->count++;
    return MUONSHARD_OK;
}

muonshard_status gemm_run(backend *self, const gemm *g, void *workspace) {
    cuda_impl *impl = cuda_of(self);
    gemm_key key;
    memset(&key, 0, sizeof key);
    key.operands = (int32_t)g->operands;
    key.stored = (int32_t)g->stored;
    key.b_transposed = g->b_transposed;
    key.rows = g->rows;
    key.cols = g->cols;
    key.depth = g->depth;
    key.batch = (int64_t)g->batch;
    gemm_choice *choice;
    TRY(find_choice(self, &key, &choice));
    const float alpha = (float)g->alpha, beta = g->c ? (float)g->beta : 0.0f;
    const double wide_alpha = g->alpha, wide_beta = g->c ? g->beta : 0.0;
    const bool wide = g->operands == GEMM_FP64;
    const cublasStatus_t code = cublasLtMatmul(
        impl->blas, choice->operation, wide ? (const void *)&wide_alpha : &alpha, g->b,
        choice->left, g->a, choice->right, wide ? (const void *)&wide_beta : &beta,
        g->c ? g->c : g->dst, choice->dest, g->dst, choice->dest, &choice->algorithm, workspace,
        GEMM_WORKSPACE, impl->streams[STREAM_COMPUTE]);
    return code == CUBLAS_STATUS_SUCCESS ? MUONSHARD_OK : blas_failed(self, code, &key);
}
