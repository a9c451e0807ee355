/* gpt_cuda_gemm.c - products through cuBLASLt: descriptors and algorithm of a shape are made when
 * it comes for the first time, and kept. */
#include "gpt_cuda.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef struct gemm_key { /* compared as bytes: all of it is set, padding too */
    int32_t compute, form;
    int32_t rows, cols, depth, batch;
    int32_t a_align, b_align, add_align, dst_align; /* bytes: what the algorithm may count on */
} gemm_key;

typedef struct gemm_choice {
    gemm_key key;
    cublasLtMatmulDesc_t operation;           /* own */
    cublasLtMatrixLayout_t left, right, dest; /* own; as cuBLAS sees them, in columns */
    cublasLtMatmulAlgo_t algorithm;
} gemm_choice;

struct gpt_gemm_table {
    gemm_choice *choices; /* own */
    size_t count, capacity;
};

static void free_choice(gemm_choice *c) {
    if (c->operation)
        cublasLtMatmulDescDestroy(c->operation);
    const cublasLtMatrixLayout_t layouts[] = {c->left, c->right, c->dest};
    for (int i = 0; i < 3; i++)
        if (layouts[i])
            cublasLtMatrixLayoutDestroy(layouts[i]);
}

void gpt_gemm_table_free(gpt_gemm_table *table) {
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
static cublasStatus_t make_layout(cublasLtMatrixLayout_t *layout, int rows, int cols, int batch) {
    const int32_t count = batch;
    const int64_t stride = (int64_t)rows * cols;
    TRY_BLAS(cublasLtMatrixLayoutCreate(layout, CUDA_R_32F, (uint64_t)rows, (uint64_t)cols, rows));
    TRY_BLAS(cublasLtMatrixLayoutSetAttribute(*layout, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count,
                                              sizeof count));
    return cublasLtMatrixLayoutSetAttribute(*layout, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET,
                                            &stride, sizeof stride);
}

/* Tensors follow one another in the arena as they come, and cuBLASLt supposes 256 bytes. */
static cublasStatus_t set_preferences(cublasLtMatmulPreference_t p, const gemm_key *k) {
    const struct {
        cublasLtMatmulPreferenceAttributes_t attribute;
        uint32_t bytes;
    } alignments[] = {
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, (uint32_t)k->b_align},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, (uint32_t)k->a_align},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, (uint32_t)k->add_align},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, (uint32_t)k->dst_align},
    };
    const size_t workspace = GPT_WORKSPACE;
    for (size_t i = 0; i < sizeof alignments / sizeof *alignments; i++)
        TRY_BLAS(cublasLtMatmulPreferenceSetAttribute(
            p, alignments[i].attribute, &alignments[i].bytes, sizeof alignments[i].bytes));
    return cublasLtMatmulPreferenceSetAttribute(p, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                                &workspace, sizeof workspace);
}

static cublasStatus_t choose_algorithm(cublasLtHandle_t blas, gemm_choice *c) {
    cublasLtMatmulPreference_t preference = NULL;
    cublasLtMatmulHeuristicResult_t result;
    int found = 0;
    TRY_BLAS(cublasLtMatmulPreferenceCreate(&preference));
    cublasStatus_t status = set_preferences(preference, &c->key);
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
    const cublasOperation_t transposed = CUBLAS_OP_T;
    TRY_BLAS(cublasLtMatmulDescCreate(&c->operation, (cublasComputeType_t)k->compute, CUDA_R_32F));
    if (k->form == GEMM_ABT)
        TRY_BLAS(cublasLtMatmulDescSetAttribute(c->operation, CUBLASLT_MATMUL_DESC_TRANSA,
                                                &transposed, sizeof transposed));
    if (k->form == GEMM_ATB)
        TRY_BLAS(cublasLtMatmulDescSetAttribute(c->operation, CUBLASLT_MATMUL_DESC_TRANSB,
                                                &transposed, sizeof transposed));
    TRY_BLAS(k->form == GEMM_ABT ? make_layout(&c->left, k->depth, k->cols, k->batch)
                                 : make_layout(&c->left, k->cols, k->depth, k->batch));
    TRY_BLAS(k->form == GEMM_ATB ? make_layout(&c->right, k->rows, k->depth, k->batch)
                                 : make_layout(&c->right, k->depth, k->rows, k->batch));
    TRY_BLAS(make_layout(&c->dest, k->cols, k->rows, k->batch));
    return choose_algorithm(blas, c);
}

/* Room for one more. */
static gemm_choice *next_choice(gpt_cuda *g) {
    if (!g->gemms)
        g->gemms = calloc(1, sizeof *g->gemms);
    gpt_gemm_table *t = g->gemms;
    if (t && t->count == t->capacity) {
        const size_t capacity = t->capacity ? 2 * t->capacity : 32;
        gemm_choice *more = realloc(t->choices, capacity * sizeof *more);
        if (!more)
            return NULL;
        t->choices = more;
        t->capacity = capacity;
    }
    return t ? &t->choices[t->count] : NULL;
}

static cublasStatus_t find_choice(gpt_cuda *g, const gemm_key *key, gemm_choice **out) {
    for (size_t i = 0; g->gemms && i < g->gemms->count; i++) {
        *out = &g->gemms->choices[i];
        if (memcmp(&(*out)->key, key, sizeof *key) == 0)
            return CUBLAS_STATUS_SUCCESS;
    }
    *out = next_choice(g);
    if (!*out)
        return CUBLAS_STATUS_ALLOC_FAILED;
    **out = (gemm_choice){.key = *key};
    const cublasStatus_t code = make_choice(g->blas, *out);
    if (code == CUBLAS_STATUS_SUCCESS)
        g->gemms->count++;
    else
        free_choice(*out);
    return code;
}

static int32_t alignment_of(const void *p) {
    const uintptr_t at = (uintptr_t)p | 256;
    return (int32_t)(at & (~at + 1));
}

void gpt_gemm_run(gpt_cuda *g, const gpt_gemm *m, float *dst, const float *a, const float *b,
                  const float *add) {
    if (g->error[0])
        return;
    const float beta = add ? 1.0f : 0.0f, *c = add ? add : dst;
    gemm_key key;
    memset(&key, 0, sizeof key);
    key.compute = (int32_t)m->compute;
    key.form = (int32_t)m->form;
    key.rows = m->rows;
    key.cols = m->cols;
    key.depth = m->depth;
    key.batch = m->batch;
    key.a_align = alignment_of(a);
    key.b_align = alignment_of(b);
    key.add_align = alignment_of(c);
    key.dst_align = alignment_of(dst);
    gemm_choice *choice;
    cublasStatus_t code = find_choice(g, &key, &choice);
    if (code == CUBLAS_STATUS_SUCCESS)
        code = cublasLtMatmul(g->blas, choice->operation, &m->alpha, b, choice->left, a,
                              choice->right, &beta, c, choice->dest, dst, choice->dest,
                              &choice->algorithm, g->workspace, GPT_WORKSPACE, g->stream);
    if (code != CUBLAS_STATUS_SUCCESS)
        gpt_cuda_fail(g, "cuBLASLt: %s, for %d products of [%d, %d] and [%d, %d]",
                      cublasLtGetStatusString(code), m->batch, m->rows, m->depth, m->depth,
                      m->cols);
}
