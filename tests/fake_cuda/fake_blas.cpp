/* fake_blas.cpp - the calls of cuBLASLt that the backend makes, on OpenBLAS: operands rounded as
 * the device would, sums in fp32 (fp64 for fp64), one rounding of the result. */
#include <cblas.h>
#include <cublasLt.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <thread>
#include <vector>

#include "dtype_bits.h"
#include "fake.h"

namespace {

struct operation {
    cublasComputeType_t compute;
    bool left_transposed = false, right_transposed = false;
};

struct layout {
    cudaDataType type;
    size_t rows, cols;
    int64_t leading, stride = 0;
    int32_t batch = 1;
};

size_t size_of(cudaDataType type) {
    return type == CUDA_R_64F ? 8 : type == CUDA_R_32F ? 4 : 2;
}

/* Alignments an algorithm counts on. */
struct preference {
    uint32_t bytes[4] = {256, 256, 256, 256}; /* A, B, C, D */
};

enum { ALGORITHM_MARK = 6, ALGORITHM_NUMBER = 7 };
constexpr uint64_t MARK = 0x616c676f;
std::atomic<long> proposed, products;
std::atomic<int> fast{-1}; /* the only algorithm that doesn't take a while; below 0: all */

float tf32(float x) {
    return float_of(nearest(bits_of(x), 13) << 13);
}

double as_operand(cublasComputeType_t compute, double x) {
    return compute == CUBLAS_COMPUTE_32F_FAST_TF32   ? tf32((float)x)
           : compute == CUBLAS_COMPUTE_32F_FAST_16BF ? from_bf16(to_bf16((float)x))
                                                     : x;
}

/* Matrix number `i` of a batch, closely packed. */
std::vector<double> load(const layout &l, const void *memory, int64_t i,
                         cublasComputeType_t compute) {
    std::vector<double> out(l.rows * l.cols);
    const char *base = (const char *)memory + (size_t)(i * l.stride) * size_of(l.type);
    for (size_t c = 0; c < l.cols; c++)
        for (size_t r = 0; r < l.rows; r++) {
            const size_t at = c * (size_t)l.leading + r;
            double x;
            switch (l.type) {
            case CUDA_R_64F: x = ((const double *)base)[at]; break;
            case CUDA_R_16BF: x = from_bf16(((const uint16_t *)base)[at]); break;
            case CUDA_R_16F: x = from_fp16(((const uint16_t *)base)[at]); break;
            default: x = ((const float *)base)[at];
            }
            out[c * l.rows + r] = as_operand(compute, x);
        }
    return out;
}

void store(const layout &l, void *memory, int64_t i, const std::vector<double> &x) {
    char *base = (char *)memory + (size_t)(i * l.stride) * size_of(l.type);
    for (size_t c = 0; c < l.cols; c++)
        for (size_t r = 0; r < l.rows; r++) {
            const size_t at = c * (size_t)l.leading + r;
            const double value = x[c * l.rows + r];
            switch (l.type) {
            case CUDA_R_64F: ((double *)base)[at] = value; break;
            case CUDA_R_16BF: ((uint16_t *)base)[at] = to_bf16((float)value); break;
            case CUDA_R_16F: ((uint16_t *)base)[at] = to_fp16((float)value); break;
            default: ((float *)base)[at] = (float)value;
            }
        }
}

void multiply_fp32(const operation &o, const layout &d, size_t depth, double alpha,
                   const std::vector<double> &a, const std::vector<double> &b,
                   std::vector<double> &out) {
    const std::vector<float> left(a.begin(), a.end()), right(b.begin(), b.end());
    std::vector<float> sum(out.begin(), out.end());
    cblas_sgemm(CblasColMajor, o.left_transposed ? CblasTrans : CblasNoTrans,
                o.right_transposed ? CblasTrans : CblasNoTrans, (int)d.rows, (int)d.cols,
                (int)depth, (float)alpha, left.data(), (int)(o.left_transposed ? depth : d.rows),
                right.data(), (int)(o.right_transposed ? d.cols : depth), 1.0f, sum.data(),
                (int)d.rows);
    out.assign(sum.begin(), sum.end());
}

void multiply(const operation &o, const layout &la, const layout &lb, const layout &lc,
              const layout &d, double alpha, double beta, const void *a, const void *b,
              const void *c, void *dst) {
    const bool wide = o.compute == CUBLAS_COMPUTE_64F;
    const size_t depth = o.left_transposed ? la.rows : la.cols;
    for (int64_t i = 0; i < d.batch; i++) {
        const std::vector<double> left = load(la, a, i, o.compute),
                                  right = load(lb, b, i, o.compute);
        std::vector<double> out(d.rows * d.cols, 0.0);
        if (beta != 0.0) {
            out = load(lc, c, i, CUBLAS_COMPUTE_32F);
            for (double &x : out)
                x *= beta;
        }
        if (wide)
            cblas_dgemm(CblasColMajor, o.left_transposed ? CblasTrans : CblasNoTrans,
                        o.right_transposed ? CblasTrans : CblasNoTrans, (int)d.rows, (int)d.cols,
                        (int)depth, alpha, left.data(), (int)(o.left_transposed ? depth : d.rows),
                        right.data(), (int)(o.right_transposed ? d.cols : depth), 1.0, out.data(),
                        (int)d.rows);
        else
            multiply_fp32(o, d, depth, alpha, left, right, out);
        store(d, dst, i, out);
    }
}

} // namespace

#define MAY_FAIL()                                                                                 \
    do {                                                                                           \
        if (fake_fails())                                                                          \
            return CUBLAS_STATUS_INTERNAL_ERROR;                                                   \
    } while (0)

extern "C" {

cublasStatus_t cublasLtCreate(cublasLtHandle_t *out) {
    MAY_FAIL();
    *out = (cublasLtHandle_t) new int(0);
    fake_count(1);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) {
    delete (int *)handle;
    fake_count(-1);
    return CUBLAS_STATUS_SUCCESS;
}

const char *cublasLtGetStatusString(cublasStatus_t) {
    return "a fake failure";
}

/* The header makes these of the _internal ones, or inline of their own. */
cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *out, cublasComputeType_t compute,
                                        cudaDataType_t) {
    MAY_FAIL();
    operation *o = new operation;
    o->compute = compute;
    *out = (cublasLtMatmulDesc_t)o;
    fake_count(1);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t desc) {
    delete (operation *)desc;
    fake_count(-1);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t desc,
                                              cublasLtMatmulDescAttributes_t attribute,
                                              const void *value, size_t) {
    MAY_FAIL();
    const bool transposed = *(const cublasOperation_t *)value == CUBLAS_OP_T;
    if (attribute == CUBLASLT_MATMUL_DESC_TRANSA)
        ((operation *)desc)->left_transposed = transposed;
    else if (attribute == CUBLASLT_MATMUL_DESC_TRANSB)
        ((operation *)desc)->right_transposed = transposed;
    else
        return CUBLAS_STATUS_NOT_SUPPORTED;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *out, cudaDataType type,
                                          uint64_t rows, uint64_t cols, int64_t leading) {
    MAY_FAIL();
    layout *l = new layout;
    l->type = type;
    l->rows = rows;
    l->cols = cols;
    l->leading = leading;
    *out = (cublasLtMatrixLayout_t)l;
    fake_count(1);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t given) {
    delete (layout *)given;
    fake_count(-1);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t given,
                                                cublasLtMatrixLayoutAttribute_t attribute,
                                                const void *value, size_t) {
    MAY_FAIL();
    layout *l = (layout *)given;
    if (attribute == CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT)
        l->batch = *(const int32_t *)value;
    else if (attribute == CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET)
        l->stride = *(const int64_t *)value;
    else
        return CUBLAS_STATUS_NOT_SUPPORTED;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *out) {
    MAY_FAIL();
    *out = (cublasLtMatmulPreference_t) new preference;
    fake_count(1);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t given) {
    delete (preference *)given;
    fake_count(-1);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t given,
                                                    cublasLtMatmulPreferenceAttributes_t attribute,
                                                    const void *value, size_t) {
    MAY_FAIL();
    const int operand = attribute - CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES;
    if (operand >= 0 && operand < 4)
        ((preference *)given)->bytes[operand] = *(const uint32_t *)value;
    return CUBLAS_STATUS_SUCCESS;
}

size_t cublasLtGetVersion(void) {
    return 130000;
}

/* As many as are wanted, at most three, which differ in nothing but their names: alignments first,
 * then a mark and a number. */
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t,
                                              cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                              cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                              cublasLtMatmulPreference_t wanted, int most,
                                              cublasLtMatmulHeuristicResult_t *result, int *found) {
    MAY_FAIL();
    *found = most < 3 ? most : 3;
    for (int i = 0; i < *found; i++) {
        memset(&result[i], 0, sizeof result[i]);
        memcpy(&result[i].algo, wanted, sizeof(preference));
        result[i].algo.data[ALGORITHM_MARK] = MARK;
        result[i].algo.data[ALGORITHM_NUMBER] = (uint64_t)i;
        proposed++;
    }
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulAlgoCheck(cublasLtHandle_t, cublasLtMatmulDesc_t,
                                       cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                       cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                       const cublasLtMatmulAlgo_t *algorithm,
                                       cublasLtMatmulHeuristicResult_t *result) {
    MAY_FAIL();
    memset(result, 0, sizeof *result);
    return algorithm->data[ALGORITHM_MARK] == MARK ? CUBLAS_STATUS_SUCCESS
                                                   : CUBLAS_STATUS_INVALID_VALUE;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t desc, const void *alpha,
                              const void *a, cublasLtMatrixLayout_t a_layout, const void *b,
                              cublasLtMatrixLayout_t b_layout, const void *beta, const void *c,
                              cublasLtMatrixLayout_t c_layout, void *d,
                              cublasLtMatrixLayout_t d_layout,
                              const cublasLtMatmulAlgo_t *algorithm, void *workspace, size_t bytes,
                              cudaStream_t stream) {
    MAY_FAIL();
    const operation o = *(operation *)desc;
    const layout la = *(layout *)a_layout, lb = *(layout *)b_layout;
    const layout lc = *(layout *)c_layout, ld = *(layout *)d_layout;
    const bool wide = o.compute == CUBLAS_COMPUTE_64F;
    const double scale = wide ? *(const double *)alpha : (double)*(const float *)alpha;
    const double more = wide ? *(const double *)beta : (double)*(const float *)beta;
    /* What the device supports together. */
    if (la.type != lb.type || la.batch != ld.batch || lb.batch != ld.batch ||
        (ld.type != la.type && !(ld.type == CUDA_R_32F && size_of(la.type) == 2)))
        return CUBLAS_STATUS_NOT_SUPPORTED;
    const void *const operands[] = {a, b, c, d};
    preference counted_on;
    memcpy(&counted_on, algorithm, sizeof counted_on);
    for (int i = 0; i < 4; i++)
        if ((uintptr_t)operands[i] % counted_on.bytes[i])
            return CUBLAS_STATUS_INVALID_VALUE;
    products++;
    const int number = (int)algorithm->data[ALGORITHM_NUMBER];
    const cudaError_t status = fake_enqueue(stream, [=] {
        if (fast >= 0 && number != fast)
            std::this_thread::sleep_for(std::chrono::microseconds(500));
        memset(workspace, 0xff, bytes < 4096 ? bytes : 4096);
        multiply(o, la, lb, lc, ld, scale, more, a, b, c, d);
    });
    return status == cudaSuccess ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_EXECUTION_FAILED;
}

void fake_blas_given(long *proposals, long *multiplications) {
    *proposals = proposed;
    *multiplications = products;
}

void fake_blas_fast(int number) {
    fast = number;
}

} // extern "C"
