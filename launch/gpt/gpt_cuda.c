/* gpt_cuda.c - the layers on CUDA: all work goes to one stream of the caller's. */
#include "gpt_cuda.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "gpt_cuda_kernels.h"

/* ---- errors ---- */

void gpt_cuda_fail(gpt_cuda *g, const char *format, ...) {
    if (g->error[0])
        return;
    va_list list;
    va_start(list, format);
    vsnprintf(g->error, sizeof g->error, format, list);
    va_end(list);
}

bool gpt_cuda_ok(gpt_cuda *g, cudaError_t code, const char *what) {
    if (code != cudaSuccess) {
        cudaGetLastError(); /* forgotten by the runtime, or later calls would report it again */
        const int length = (int)strcspn(what, "(");
        gpt_cuda_fail(g, "CUDA: %.*s: %s", length, what, cudaGetErrorString(code));
    }
    return !g->error[0];
}

#define CUDA(g, call) gpt_cuda_ok(g, call, #call)

/* The calling thread may have had another device in mind. */
static bool enter(gpt_cuda *g) {
    return !g->error[0] && CUDA(g, cudaSetDevice(g->device));
}

/* ---- memory ---- */

static void cuda_wait(void *self) {
    gpt_cuda *g = self;
    if (enter(g) && CUDA(g, cudaStreamSynchronize(g->stream)))
        g->staged = 0;
}

static void *cuda_alloc(void *self, size_t bytes) {
    gpt_cuda *g = self;
    void *memory = NULL;
    if (!enter(g))
        return NULL;
    const cudaError_t code = cudaMalloc(&memory, bytes ? bytes : 1);
    if (code == cudaErrorMemoryAllocation) {
        size_t left = 0, total = 0;
        cudaGetLastError();
        cudaMemGetInfo(&left, &total);
        gpt_cuda_fail(g, "out of device memory: %zu bytes are wanted, %zu of %zu are free", bytes,
                      left, total);
        return NULL;
    }
    if (CUDA(g, code) && CUDA(g, cudaMemsetAsync(memory, 0, bytes ? bytes : 1, g->stream)))
        return memory;
    cudaFree(memory);
    return NULL;
}

static void cuda_free(void *self, void *memory) {
    const gpt_cuda *g = self;
    if (memory && cudaSetDevice(g->device) == cudaSuccess)
        cudaFree(memory); /* waits for what is under way on it */
}

static void cuda_zero(void *self, void *memory, size_t bytes) {
    gpt_cuda *g = self;
    if (enter(g))
        CUDA(g, cudaMemsetAsync(memory, 0, bytes, g->stream));
}

/* Through pinned memory: from any other the runtime may wait for the stream. */
static void cuda_upload(void *self, void *dst, const void *host, size_t bytes) {
    gpt_cuda *g = self;
    for (size_t done = 0, n; done < bytes && enter(g); done += n) {
        if (g->staged == GPT_STAGING)
            cuda_wait(g);
        if (g->error[0])
            return;
        n = bytes - done < GPT_STAGING - g->staged ? bytes - done : GPT_STAGING - g->staged;
        memcpy(g->staging + g->staged, (const char *)host + done, n);
        CUDA(g, cudaMemcpyAsync((char *)dst + done, g->staging + g->staged, n,
                                cudaMemcpyHostToDevice, g->stream));
        g->staged += n;
    }
}

static void cuda_download(void *self, void *host, const void *src, size_t bytes) {
    gpt_cuda *g = self;
    if (enter(g) && CUDA(g, cudaMemcpyAsync(host, src, bytes, cudaMemcpyDeviceToHost, g->stream)))
        cuda_wait(g);
}

static const char *cuda_error(void *self) {
    const gpt_cuda *g = self;
    return g->error[0] ? g->error : NULL;
}

/* ---- layers ---- */

static size_t positions(const attention_shape *s) {
    return (size_t)s->sequences * (size_t)s->context;
}

static void cuda_linear_forward(void *self, float *y, const float *x, const float *weight,
                                const float *add, int n, int in, int out) {
    gpt_cuda *g = self;
    if (enter(g))
        gpt_gemm_run(g, &(gpt_gemm){g->compute, GEMM_ABT, n, out, in, 1, 1.0f}, y, x, weight, add);
}

static void cuda_linear_backward(void *self, float *dx, float *weight_grad, const float *dy,
                                 const float *x, const float *weight, int n, int in, int out) {
    gpt_cuda *g = self;
    if (!enter(g))
        return;
    gpt_gemm_run(g, &(gpt_gemm){g->compute, GEMM_AB, n, in, out, 1, 1.0f}, dx, dy, weight, NULL);
    gpt_gemm_run(g, &(gpt_gemm){g->compute, GEMM_ATB, out, in, n, 1, 1.0f}, weight_grad, dy, x,
                 weight_grad);
}

static void cuda_embed_forward(void *self, float *x, const float *token, const float *position,
                               const unsigned char *windows, const attention_shape *s) {
    gpt_cuda *g = self;
    if (enter(g))
        CUDA(g, gpt_cuda_embed(x, token, position, windows, s, g->stream));
}

/* Bytes that are frequent would make for long sums: the product with which byte it is shares them
 * out. In full fp32, as a sum is. */
static void cuda_embed_backward(void *self, float *token_grad, float *position_grad,
                                const float *dx, const unsigned char *windows, float *scratch,
                                const attention_shape *s) {
    gpt_cuda *g = self;
    const gpt_gemm sum = {
        CUBLAS_COMPUTE_32F, GEMM_ATB, GPT_VOCABULARY, s->width, (int)positions(s), 1, 1.0f};
    if (enter(g) && CUDA(g, gpt_cuda_position_grad(position_grad, dx, s, g->stream)) &&
        CUDA(g, gpt_cuda_one_hot(scratch, windows, s, g->stream)))
        gpt_gemm_run(g, &sum, token_grad, scratch, dx, token_grad);
}

static void cuda_norm_forward(void *self, float *y, float *mean, float *rstd, const float *x,
                              const float *gain, int n, int width) {
    gpt_cuda *g = self;
    if (enter(g))
        CUDA(g, gpt_cuda_norm_forward(y, mean, rstd, x, gain, n, width, g->stream));
}

static void cuda_norm_backward(void *self, float *dx, float *gain_grad, const float *dy,
                               const float *x, const float *gain, const float *mean,
                               const float *rstd, int n, int width) {
    gpt_cuda *g = self;
    if (enter(g))
        CUDA(g, gpt_cuda_norm_backward(dx, gain_grad, dy, x, gain, mean, rstd, n, width,
                                       (float *)(void *)g->parts, g->stream));
}

/* Heads lie apart in scratch, so that all products of a kind are one batch. Forward: q, k, v, y.
 * Backward: q, k, v, dy, dq, dk, dv and the scores' gradient. Embedding: [n, 256]. */
static size_t cuda_scratch_count(const attention_shape *s) {
    const size_t n = positions(s), heads = 7 * n * (size_t)s->width;
    const size_t attention = heads + n * (size_t)s->heads * (size_t)s->context;
    return attention > n * GPT_VOCABULARY ? attention : n * GPT_VOCABULARY;
}

typedef struct head_gemms {
    gpt_gemm scores; /* [t, t] from two of [t, size] */
    gpt_gemm rows;   /* [t, size] from [t, t] and [t, size] */
    gpt_gemm cols;   /* the same with [t, t] transposed */
} head_gemms;

/* One product for each head of each sequence. */
static head_gemms head_gemms_of(const gpt_cuda *g, const attention_shape *s) {
    const int t = s->context, size = s->width / s->heads, batch = s->sequences * s->heads;
    return (head_gemms){.scores = {g->compute, GEMM_ABT, t, t, size, batch, 1.0f},
                        .rows = {g->compute, GEMM_AB, t, size, t, batch, 1.0f},
                        .cols = {g->compute, GEMM_ATB, t, size, t, batch, 1.0f}};
}

static float score_scale(const attention_shape *s) {
    return (float)(1.0 / sqrt((double)(s->width / s->heads)));
}

static void cuda_attention_forward(void *self, float *y, float *probs, const float *qkv,
                                   float *scratch, const attention_shape *s) {
    gpt_cuda *g = self;
    const size_t plane = positions(s) * (size_t)s->width;
    float *q = scratch, *k = q + plane, *v = k + plane, *apart = v + plane;
    head_gemms m = head_gemms_of(g, s);
    if (!enter(g) || !CUDA(g, gpt_cuda_split_heads(q, qkv, 3, s, g->stream)))
        return;
    m.scores.alpha = score_scale(s);
    gpt_gemm_run(g, &m.scores, probs, q, k, NULL);
    CUDA(g, gpt_cuda_softmax_forward(probs, s, g->stream));
    gpt_gemm_run(g, &m.rows, apart, probs, v, NULL);
    CUDA(g, gpt_cuda_merge_heads(y, apart, 1, s, g->stream));
}

static void cuda_attention_backward(void *self, float *dqkv, const float *dy, const float *probs,
                                    const float *qkv, float *scratch, const attention_shape *s) {
    gpt_cuda *g = self;
    const size_t plane = positions(s) * (size_t)s->width;
    float *q = scratch, *k = q + plane, *v = k + plane, *d = v + plane;
    float *dq = d + plane, *dk = dq + plane, *dv = dk + plane, *scores = dv + plane;
    head_gemms m = head_gemms_of(g, s);
    if (!enter(g) || !CUDA(g, gpt_cuda_split_heads(q, qkv, 3, s, g->stream)) ||
        !CUDA(g, gpt_cuda_split_heads(d, dy, 1, s, g->stream)))
        return;
    gpt_gemm_run(g, &m.scores, scores, d, v, NULL);
    gpt_gemm_run(g, &m.cols, dv, probs, d, NULL);
    CUDA(g, gpt_cuda_softmax_backward(scores, probs, s, g->stream));
    m.rows.alpha = m.cols.alpha = score_scale(s);
    gpt_gemm_run(g, &m.rows, dq, scores, k, NULL);
    gpt_gemm_run(g, &m.cols, dk, scores, q, NULL);
    CUDA(g, gpt_cuda_merge_heads(dqkv, dq, 3, s, g->stream));
}

static void cuda_widen(void *self, float *dst, const uint16_t *src, size_t count) {
    gpt_cuda *g = self;
    if (enter(g))
        CUDA(g, gpt_cuda_widen(dst, src, count, g->stream));
}

static void cuda_gelu_forward(void *self, float *y, const float *x, size_t count) {
    gpt_cuda *g = self;
    if (enter(g))
        CUDA(g, gpt_cuda_gelu_forward(y, x, count, g->stream));
}

static void cuda_gelu_backward(void *self, float *dy, const float *x, size_t count) {
    gpt_cuda *g = self;
    if (enter(g))
        CUDA(g, gpt_cuda_gelu_backward(dy, x, count, g->stream));
}

static double cuda_cross_entropy_forward(void *self, float *logits, const unsigned char *windows,
                                         const attention_shape *s) {
    gpt_cuda *g = self;
    if (enter(g) &&
        CUDA(g, gpt_cuda_cross_entropy_forward(logits, g->loss, windows, s, g->parts, g->stream)))
        cuda_download(g, g->host_loss, g->loss, sizeof *g->loss);
    return g->error[0] ? (double)NAN : *g->host_loss / (double)positions(s);
}

static void cuda_cross_entropy_backward(void *self, float *probs, double scale,
                                        const unsigned char *windows, const attention_shape *s) {
    gpt_cuda *g = self;
    const float factor = (float)(scale / (double)positions(s));
    if (enter(g))
        CUDA(g, gpt_cuda_cross_entropy_backward(probs, factor, windows, s, g->stream));
}

/* ---- the context ---- */

static void cuda_close(void *self) {
    gpt_cuda *g = self;
    cudaSetDevice(g->device);
    gpt_gemm_table_free(g->gemms);
    if (g->blas)
        cublasLtDestroy(g->blas);
    cudaFree(g->workspace);
    cudaFree(g->parts);
    cudaFree(g->loss);
    if (g->host_loss)
        cudaFreeHost(g->host_loss);
    if (g->staging)
        cudaFreeHost(g->staging);
    free(g);
}

static const gpt_layers cuda_layers = {
    .alloc = cuda_alloc,
    .free = cuda_free,
    .zero = cuda_zero,
    .upload = cuda_upload,
    .download = cuda_download,
    .widen = cuda_widen,
    .wait = cuda_wait,
    .error = cuda_error,
    .close = cuda_close,
    .scratch_count = cuda_scratch_count,
    .embed_forward = cuda_embed_forward,
    .embed_backward = cuda_embed_backward,
    .linear_forward = cuda_linear_forward,
    .linear_backward = cuda_linear_backward,
    .norm_forward = cuda_norm_forward,
    .norm_backward = cuda_norm_backward,
    .attention_forward = cuda_attention_forward,
    .attention_backward = cuda_attention_backward,
    .gelu_forward = cuda_gelu_forward,
    .gelu_backward = cuda_gelu_backward,
    .cross_entropy_forward = cuda_cross_entropy_forward,
    .cross_entropy_backward = cuda_cross_entropy_backward,
};

static cublasComputeType_t compute_type(gpt_cuda_math math) {
    return math == GPT_MATH_TF32   ? CUBLAS_COMPUTE_32F_FAST_TF32
           : math == GPT_MATH_BF16 ? CUBLAS_COMPUTE_32F_FAST_16BF
                                   : CUBLAS_COMPUTE_32F;
}

static void allocate_own(gpt_cuda *g) {
    if (!CUDA(g, cudaMalloc(&g->workspace, GPT_WORKSPACE)) ||
        !CUDA(g, cudaMalloc((void **)&g->parts, GPT_PART_BYTES)) ||
        !CUDA(g, cudaMalloc((void **)&g->loss, sizeof *g->loss)) ||
        !CUDA(g,
              cudaHostAlloc((void **)&g->host_loss, sizeof *g->host_loss, cudaHostAllocDefault)) ||
        !CUDA(g, cudaHostAlloc((void **)&g->staging, GPT_STAGING, cudaHostAllocDefault)))
        return;
    const cublasStatus_t code = cublasLtCreate(&g->blas);
    if (code != CUBLAS_STATUS_SUCCESS)
        gpt_cuda_fail(g, "cuBLASLt: %s", cublasLtGetStatusString(code));
}

static gpt_layers *cuda_open(gpt_cuda_math math, int device, void *stream, char *message,
                             size_t size) {
    gpt_cuda *g = calloc(1, sizeof *g);
    if (!g) {
        snprintf(message, size, "out of memory");
        return NULL;
    }
    g->layers = cuda_layers;
    g->layers.self = g;
    g->compute = compute_type(math);
    g->stream = stream;
    g->device = device;
    if (device < 0)
        CUDA(g, cudaGetDevice(&g->device));
    if (enter(g))
        allocate_own(g);
    if (!g->error[0])
        return &g->layers;
    snprintf(message, size, "no GPT on CUDA: %s", g->error);
    cuda_close(g);
    return NULL;
}

/* The one symbol the library is entered through. */
__attribute__((visibility("default"))) const gpt_device_entry *muonshard_gpt_cuda(void);

const gpt_device_entry *muonshard_gpt_cuda(void) {
    static const gpt_device_entry entry = {.abi = GPT_DEVICE_ABI, .open = cuda_open};
    return &entry;
}
