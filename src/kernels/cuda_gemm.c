/* cuda_gemm.c - batched products through cuBLASLt: descriptors and algorithm of a shape are made
 * once, and kept. The algorithm is the one cuBLASLt puts first, or the fastest of those it
 * proposes. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda_gemm.h"

enum { CANDIDATES = 8, TIMED_RUNS = 5, MOST_ALIGNED = 256 };

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

void gemm_free_choice(gemm_choice *c) {
    if (c->operation)
        cublasLtMatmulDescDestroy(c->operation);
    for (int i = 0; i < GEMM_PLACES; i++)
        if (c->layouts[i])
            cublasLtMatrixLayoutDestroy(c->layouts[i]);
}

void gemm_table_free(gemm_table *table) {
    if (!table)
        return;
    for (size_t i = 0; i < table->count; i++)
        gemm_free_choice(&table->choices[i]);
    free(table->choices);
    free(table);
}

#define TRY_BLAS(call)                                                                             \
    do {                                                                                           \
        const cublasStatus_t try_blas_ = (call);                                                   \
        if (try_blas_ != CUBLAS_STATUS_SUCCESS)                                                    \
            return try_blas_;                                                                      \
    } while (0)

/* [rows, cols] in memory are [cols, rows] in columns. */
static cublasStatus_t make_layout(gemm_choice *c, int place, gemm_type type, int64_t rows,
                                  int64_t cols) {
    cublasLtMatrixLayout_t *layout = &c->layouts[place];
    const int32_t count = (int32_t)c->key.batch;
    const int64_t stride = c->key.stride[place];
    TRY_BLAS(cublasLtMatrixLayoutCreate(layout, data_type(type), (uint64_t)cols, (uint64_t)rows,
                                        c->key.pitch[place]));
    TRY_BLAS(cublasLtMatrixLayoutSetAttribute(*layout, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count,
                                              sizeof count));
    return cublasLtMatrixLayoutSetAttribute(*layout, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET,
                                            &stride, sizeof stride);
}

cublasStatus_t gemm_describe(gemm_choice *c) {
    const gemm_key *k = &c->key;
    const gemm_type operands = (gemm_type)k->operands, stored = (gemm_type)k->stored;
    const cudaDataType_t scalars = operands == GEMM_FP64 ? CUDA_R_64F : CUDA_R_32F;
    const cublasOperation_t transposed = CUBLAS_OP_T;
    TRY_BLAS(cublasLtMatmulDescCreate(&c->operation, compute_type(operands), scalars));
    if (k->b_transposed)
        TRY_BLAS(cublasLtMatmulDescSetAttribute(c->operation, CUBLASLT_MATMUL_DESC_TRANSA,
                                                &transposed, sizeof transposed));
    TRY_BLAS(make_layout(c, GEMM_A, operands, k->rows, k->depth));
    TRY_BLAS(make_layout(c, GEMM_B, operands, k->b_transposed ? k->cols : k->depth,
                         k->b_transposed ? k->depth : k->cols));
    TRY_BLAS(make_layout(c, GEMM_C, stored, k->rows, k->cols));
    return make_layout(c, GEMM_DST, stored, k->rows, k->cols);
}

/* Algorithms for the choice, best guess first; `found` of at most `wanted`. */
static cublasStatus_t propose(cublasLtHandle_t blas, const gemm_choice *c,
                              cublasLtMatmulHeuristicResult_t *results, int wanted, int *found) {
    static const cublasLtMatmulPreferenceAttributes_t alignments[GEMM_PLACES] = {
        [GEMM_A] = CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        [GEMM_B] = CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
        [GEMM_C] = CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
        [GEMM_DST] = CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES};
    cublasLtMatmulPreference_t preference = NULL;
    const size_t bytes = GEMM_WORKSPACE;
    *found = 0;
    TRY_BLAS(cublasLtMatmulPreferenceCreate(&preference));
    cublasStatus_t status = cublasLtMatmulPreferenceSetAttribute(
        preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes, sizeof bytes);
    for (int i = 0; i < GEMM_PLACES && status == CUBLAS_STATUS_SUCCESS; i++) {
        const uint32_t alignment = (uint32_t)c->key.alignment[i];
        status = cublasLtMatmulPreferenceSetAttribute(preference, alignments[i], &alignment,
                                                      sizeof alignment);
    }
    if (status == CUBLAS_STATUS_SUCCESS)
        status = cublasLtMatmulAlgoGetHeuristic(
            blas, c->operation, c->layouts[GEMM_B], c->layouts[GEMM_A], gemm_layout_of_c(c),
            c->layouts[GEMM_DST], preference, wanted, results, found);
    cublasLtMatmulPreferenceDestroy(preference);
    if (status == CUBLAS_STATUS_SUCCESS)
        status = *found ? results[0].state : CUBLAS_STATUS_NOT_SUPPORTED;
    return status;
}

static cublasStatus_t multiply(const cuda_impl *impl, const gemm_choice *c,
                               const cublasLtMatmulAlgo_t *algorithm, const gemm *g,
                               void *workspace) {
    const bool wide = g->operands == GEMM_FP64;
    const double wide_scalars[] = {g->alpha, g->c.at ? g->beta : 0.0};
    const float scalars[] = {(float)wide_scalars[0], (float)wide_scalars[1]};
    return cublasLtMatmul(
        impl->blas, c->operation, wide ? (const void *)&wide_scalars[0] : &scalars[0], g->b.at,
        c->layouts[GEMM_B], g->a.at, c->layouts[GEMM_A],
        wide ? (const void *)&wide_scalars[1] : &scalars[1], g->c.at ? g->c.at : g->dst.at,
        gemm_layout_of_c(c), (void *)(uintptr_t)g->dst.at, c->layouts[GEMM_DST], algorithm,
        workspace, GEMM_WORKSPACE, impl->streams[STREAM_COMPUTE]);
}

gemm_choice *gemm_find(const cuda_impl *impl, const gemm_key *key) {
    const gemm_table *t = impl->gemms;
    for (size_t i = 0; t && i < t->count; i++)
        if (memcmp(&t->choices[i].key, key, sizeof *key) == 0)
            return &t->choices[i];
    return NULL;
}

gemm_choice *gemm_next_choice(cuda_impl *impl) {
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

/* ---- choosing ---- */

/* Milliseconds of one run, of the best of a few; what can't run takes for ever. */
static muonshard_status time_of(backend *self, bool (*run)(const void *context, int i),
                                const void *context, int i, cudaEvent_t from, cudaEvent_t to,
                                float *ms) {
    cudaStream_t stream = cuda_of(self)->streams[STREAM_COMPUTE];
    *ms = INFINITY;
    for (int n = 0; n < 1 + TIMED_RUNS; n++) {
        float one = INFINITY;
        TRY_CUDA(self, cudaEventRecord(from, stream));
        if (!run(context, i))
            return MUONSHARD_OK;
        TRY_CUDA(self, cudaEventRecord(to, stream));
        TRY_CUDA(self, cudaStreamSynchronize(stream));
        TRY_CUDA(self, cudaEventElapsedTime(&one, from, to));
        if (n > 0 && one < *ms) /* the first loads code */
            *ms = one;
    }
    return MUONSHARD_OK;
}

muonshard_status gemm_fastest(backend *self, bool (*run)(const void *context, int i),
                              const void *context, int count, int *best) {
    cudaEvent_t from = NULL, to = NULL;
    float fastest = INFINITY;
    muonshard_status status = MUONSHARD_OK;
    cudaError_t code = cudaEventCreate(&from);
    if (code == cudaSuccess)
        code = cudaEventCreate(&to);
    if (code != cudaSuccess)
        status = cuda_failed(self, code, "cudaEventCreate");
    *best = 0;
    for (int i = 0; i < count && status == MUONSHARD_OK; i++) {
        float ms = INFINITY;
        status = time_of(self, run, context, i, from, to, &ms);
        if (ms < fastest) {
            fastest = ms;
            *best = i;
        }
    }
    if (from)
        cudaEventDestroy(from);
    if (to)
        cudaEventDestroy(to);
    return status;
}

typedef struct proposed {
    const cuda_impl *impl;
    const gemm_choice *choice;
    const cublasLtMatmulHeuristicResult_t *results;
    const gemm *product;
    void *workspace;
} proposed;

static bool run_proposed(const void *context, int i) {
    const proposed *p = context;
    return p->results[i].state == CUBLAS_STATUS_SUCCESS &&
           multiply(p->impl, p->choice, &p->results[i].algo, p->product, p->workspace) ==
               CUBLAS_STATUS_SUCCESS;
}

static muonshard_status choose(backend *self, gemm_choice *c, const gemm *g, bool by_time,
                               void *workspace) {
    cublasLtMatmulHeuristicResult_t results[CANDIDATES];
    int found = 0, best = 0;
    cublasStatus_t code = gemm_describe(c);
    if (code == CUBLAS_STATUS_SUCCESS)
        code = propose(cuda_of(self)->blas, c, results, by_time ? CANDIDATES : 1, &found);
    if (code != CUBLAS_STATUS_SUCCESS)
        return blas_failed(self, code, &c->key);
    const proposed all = {cuda_of(self), c, results, g, workspace};
    if (found > 1)
        TRY(gemm_fastest(self, run_proposed, &all, found, &best));
    c->algorithm = results[best].algo;
    return MUONSHARD_OK;
}

static int64_t alignment_of(const void *memory) {
    const uintptr_t address = (uintptr_t)memory;
    return address % MOST_ALIGNED ? (int64_t)(address & -address) : MOST_ALIGNED;
}

static gemm_key key_of(const gemm *g) {
    gemm_key k;
    memset(&k, 0, sizeof k);
    k.operands = g->operands;
    k.stored = g->stored;
    k.b_transposed = g->b_transposed;
    k.adds = g->c.at != NULL;
    k.rows = g->rows;
    k.cols = g->cols;
    k.depth = g->depth;
    k.batch = (int64_t)g->batch;
    const gemm_matrices *const places[GEMM_PLACES] = {&g->a, &g->b, g->c.at ? &g->c : &g->dst,
                                                      &g->dst};
    for (int i = 0; i < GEMM_PLACES; i++) {
        k.pitch[i] = places[i]->pitch;
        k.stride[i] = places[i]->stride;
        k.alignment[i] = alignment_of(places[i]->at);
    }
    return k;
}

static muonshard_status find_choice(backend *self, const gemm *g, bool by_time, void *workspace,
                                    gemm_choice **out) {
    cuda_impl *impl = cuda_of(self);
    const gemm_key key = key_of(g);
    *out = gemm_find(impl, &key);
    if (*out)
        return MUONSHARD_OK;
    *out = gemm_next_choice(impl);
    FAIL_IF(!*out, &self->error, MUONSHARD_ERR_MEMORY, "out of memory");
    **out = (gemm_choice){.key = key};
    const muonshard_status status = choose(self, *out, g, by_time, workspace);
    if (status) {
        gemm_free_choice(*out);
        return status;
    }
    impl->gemms->count++;
    impl->gemms->added++;
    return MUONSHARD_OK;
}

muonshard_status gemm_prepare(backend *self, const gemm *g, void *workspace) {
    gemm_choice *choice;
    return find_choice(self, g, cuda_of(self)->measures_gemms, workspace, &choice);
}

muonshard_status gemm_run(backend *self, const gemm *g, void *workspace) {
    gemm_choice *choice;
    TRY(find_choice(self, g, false, workspace, &choice));
    const cublasStatus_t code = multiply(cuda_of(self), choice, &choice->algorithm, g, workspace);
    return code == CUBLAS_STATUS_SUCCESS ? MUONSHARD_OK : blas_failed(self, code, &choice->key);
}
