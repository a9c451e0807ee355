/* gpt_cuda_kernels.cu - rows by groups of lanes, elements by threads. */
#include "gpt_cuda_kernels.h"

#include "gpt_cuda_launch.cuh"

namespace {

const dim3 row_block(LANES, GROUPS);

unsigned blocks_for(size_t count, size_t each) {
    return (unsigned)((count + each - 1) / each);
}

size_t positions(const attention_shape *s) {
    return (size_t)s->sequences * (size_t)s->context;
}

/* The row this group of lanes works on. */
__device__ size_t own_row() {
    return (size_t)blockIdx.x * GROUPS + threadIdx.y;
}

/* The byte at position number `row`, `ahead` further on. */
__device__ unsigned byte_at(const unsigned char *windows, size_t row, int context, unsigned ahead) {
    return windows[row + row / (unsigned)context + ahead];
}

/* ---- embedding ---- */

__global__ void embed_kernel(float *x, const float *token, const float *position,
                             const unsigned char *windows, int context, int width) {
    const size_t row = blockIdx.x, columns = (size_t)width;
    const float *a = token + byte_at(windows, row, context, 0) * columns;
    const float *p = position + row % (unsigned)context * columns;
    for (unsigned c = threadIdx.x; c < columns; c += THREADS)
        x[row * columns + c] = a[c] + p[c];
}

__global__ void position_grad_kernel(float *grad, const float *dx, int sequences, size_t count) {
    const size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x;
    if (i >= count)
        return;
    float sum = 0.0f;
    for (int b = 0; b < sequences; b++)
        sum += dx[(size_t)b * count + i];
    grad[i] += sum;
}

__global__ void one_hot_kernel(float *out, const unsigned char *windows, int context) {
    const size_t row = blockIdx.x;
    const unsigned byte = byte_at(windows, row, context, 0);
    for (unsigned v = threadIdx.x; v < GPT_VOCABULARY; v += THREADS)
        out[row * GPT_VOCABULARY + v] = v == byte ? 1.0f : 0.0f;
}

/* ---- norm ---- */

__global__ void norm_forward_kernel(float *y, float *mean, float *rstd, const float *x,
                                    const float *gain, int n, int width) {
    const size_t row = own_row();
    if (row >= (size_t)n)
        return;
    x += row * (size_t)width;
    y += row * (size_t)width;
    float sum = 0.0f, squares = 0.0f;
    for (int c = (int)threadIdx.x; c < width; c += LANES)
        sum += x[c];
    const float m = lanes_sum(sum) / (float)width;
    for (int c = (int)threadIdx.x; c < width; c += LANES)
        squares += (x[c] - m) * (x[c] - m);
    const float r = 1.0f / sqrtf(lanes_sum(squares) / (float)width + 1e-5f);
    for (int c = (int)threadIdx.x; c < width; c += LANES)
        y[c] = gain[c] * ((x[c] - m) * r);
    if (threadIdx.x == 0) {
        mean[row] = m;
        rstd[row] = r;
    }
}

__global__ void norm_backward_kernel(float *dx, const float *dy, const float *x, const float *gain,
                                     const float *mean, const float *rstd, int n, int width) {
    const size_t row = own_row();
    if (row >= (size_t)n)
        return;
    x += row * (size_t)width;
    dx += row * (size_t)width;
    dy += row * (size_t)width;
    const float m = mean[row], r = rstd[row];
    float along = 0.0f, across = 0.0f;
    for (int c = (int)threadIdx.x; c < width; c += LANES) {
        const float d = dy[c] * gain[c];
        along += d;
        across += d * (x[c] - m);
    }
    const float d_mean = lanes_sum(along) / (float)width;
    const float d_hat = lanes_sum(across) * r / (float)width;
    for (int c = (int)threadIdx.x; c < width; c += LANES)
        dx[c] += r * (dy[c] * gain[c] - d_mean - (x[c] - m) * r * d_hat);
}

/* parts [gridDim.y, width]: the gain's gradient over a run of rows each */
__global__ void gain_parts_kernel(float *parts, const float *dy, const float *x, const float *mean,
                                  const float *rstd, int n, int width) {
    const size_t c = (size_t)blockIdx.x * THREADS + threadIdx.x, columns = (size_t)width;
    if (c >= columns)
        return;
    const size_t begin = (size_t)n * blockIdx.y / gridDim.y;
    const size_t end = (size_t)n * (blockIdx.y + 1) / gridDim.y;
    float sum = 0.0f;
#pragma unroll 4
    for (size_t row = begin; row < end; row++)
        sum += dy[row * columns + c] * ((x[row * columns + c] - mean[row]) * rstd[row]);
    parts[blockIdx.y * columns + c] = sum;
}

__global__ void add_parts_kernel(float *grad, const float *parts, unsigned count, int width) {
    const size_t c = (size_t)blockIdx.x * THREADS + threadIdx.x;
    if (c >= (size_t)width)
        return;
    float sum = 0.0f;
#pragma unroll 8
    for (unsigned i = 0; i < count; i++)
        sum += parts[(size_t)i * (size_t)width + c];
    grad[c] += sum;
}

/* ---- attention ---- */

template <bool split>
__global__ void heads_kernel(float *dst, const float *src, int count, attention_shape s) {
    const unsigned width = (unsigned)s.width, context = (unsigned)s.context;
    const unsigned size = width / (unsigned)s.heads, row = blockIdx.x;
    const unsigned b = row / context, t = row % context;
    for (unsigned i = threadIdx.x; i < (unsigned)count * width; i += THREADS) {
        const unsigned part = i / width, c = i % width, h = c / size, j = c % size;
        const size_t matrix = ((size_t)part * (unsigned)s.sequences + b) * (unsigned)s.heads + h;
        const size_t apart = (matrix * context + t) * size + j;
        const size_t together = (size_t)row * ((unsigned)count * width) + i;
        dst[split ? apart : together] = src[split ? together : apart];
    }
}

__global__ void softmax_forward_kernel(float *scores, size_t rows, int context) {
    const size_t row = own_row();
    if (row >= rows)
        return;
    float *p = scores + row * (size_t)context;
    const int last = (int)(row % (unsigned)context);
    float max = -INFINITY, sum = 0.0f;
    for (int u = (int)threadIdx.x; u <= last; u += LANES)
        max = fmaxf(max, p[u]);
    max = lanes_max(max);
    for (int u = (int)threadIdx.x; u <= last; u += LANES)
        sum += expf(p[u] - max);
    const float inverse = 1.0f / lanes_sum(sum);
    for (int u = (int)threadIdx.x; u < context; u += LANES)
        p[u] = u <= last ? expf(p[u] - max) * inverse : 0.0f;
}

__global__ void softmax_backward_kernel(float *d, const float *probs, size_t rows, int context) {
    const size_t row = own_row();
    if (row >= rows)
        return;
    float *g = d + row * (size_t)context;
    const float *p = probs + row * (size_t)context;
    const int last = (int)(row % (unsigned)context);
    float inner = 0.0f;
    for (int u = (int)threadIdx.x; u <= last; u += LANES)
        inner += p[u] * g[u];
    inner = lanes_sum(inner);
    for (int u = (int)threadIdx.x; u < context; u += LANES)
        g[u] = u <= last ? p[u] * (g[u] - inner) : 0.0f;
}

/* ---- GELU: (1 + tanh(u))/2 = 1/(1 + exp(-2u)), and u = slope (x + cubic x^3) ---- */

const float gelu_slope = 0.79788456080286536f, gelu_cubic = 0.044715f;
enum { GELU_BLOCKS = 4096 };

__device__ float gelu_gate(float x) {
    return 1.0f / (1.0f + expf(-2.0f * gelu_slope * (x + gelu_cubic * x * x * x)));
}

/* bf16 is the upper half of fp32. */
__global__ void widen_kernel(uint32_t *dst, const uint16_t *src, size_t count) {
    const size_t stride = (size_t)gridDim.x * THREADS;
    for (size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x; i < count; i += stride)
        dst[i] = (uint32_t)src[i] << 16;
}

__global__ void gelu_forward_kernel(float *y, const float *x, size_t count) {
    const size_t stride = (size_t)gridDim.x * THREADS;
    for (size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x; i < count; i += stride)
        y[i] = x[i] * gelu_gate(x[i]);
}

__global__ void gelu_backward_kernel(float *dy, const float *x, size_t count) {
    const size_t stride = (size_t)gridDim.x * THREADS;
    for (size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x; i < count; i += stride) {
        const float gate = gelu_gate(x[i]);
        const float slope = 2.0f * gelu_slope * (1.0f + 3.0f * gelu_cubic * x[i] * x[i]);
        dy[i] *= gate + x[i] * gate * (1.0f - gate) * slope;
    }
}

unsigned gelu_blocks(size_t count) {
    const unsigned blocks = blocks_for(count, THREADS);
    return blocks < GELU_BLOCKS ? blocks : GELU_BLOCKS;
}

/* ---- cross-entropy ---- */

enum { LOSS_BLOCKS = 1024 };

/* parts [gridDim.x, GROUPS]: the loss over the rows of each group, which come in turns */
__global__ void cross_entropy_forward_kernel(float *logits, double *parts,
                                             const unsigned char *windows, size_t n, int context) {
    enum { EACH = GPT_VOCABULARY / LANES };
    double loss = 0.0; /* this lane's part of it */
    for (size_t row = own_row(); row < n; row += (size_t)gridDim.x * GROUPS) {
        float *p = logits + row * GPT_VOCABULARY + threadIdx.x;
        const unsigned next = byte_at(windows, row, context, 1);
        float x[EACH], max = -INFINITY, sum = 0.0f;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            x[i] = p[i * LANES];
            max = fmaxf(max, x[i]);
        }
        max = lanes_max(max);
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            if ((unsigned)(i * LANES) + threadIdx.x == next)
                loss += (double)(max - x[i]);
            x[i] = expf(x[i] - max);
            sum += x[i];
        }
        sum = lanes_sum(sum);
#pragma unroll
        for (int i = 0; i < EACH; i++)
            p[i * LANES] = x[i] * (1.0f / sum);
        if (threadIdx.x == 0)
            loss += (double)logf(sum);
    }
    loss = lanes_sum(loss);
    if (threadIdx.x == 0)
        parts[(size_t)blockIdx.x * GROUPS + threadIdx.y] = loss;
}

__global__ void sum_kernel(double *out, const double *parts, unsigned count) {
    double sum = 0.0;
    for (unsigned i = threadIdx.x; i < count; i += LANES)
        sum += parts[i];
    sum = lanes_sum(sum);
    if (threadIdx.x == 0)
        *out = sum;
}

__global__ void cross_entropy_backward_kernel(float *probs, float factor,
                                              const unsigned char *windows, int context) {
    const size_t row = blockIdx.x;
    const unsigned next = byte_at(windows, row, context, 1);
    for (unsigned v = threadIdx.x; v < GPT_VOCABULARY; v += THREADS) {
        float *p = probs + row * GPT_VOCABULARY + v;
        *p = factor * (*p - (v == next ? 1.0f : 0.0f));
    }
}

} // namespace

cudaError_t gpt_cuda_embed(float *x, const float *token, const float *position,
                           const unsigned char *windows, const attention_shape *s,
                           cudaStream_t stream) {
    return launch(embed_kernel, dim3((unsigned)positions(s)), dim3(THREADS), stream, x, token,
                  position, windows, s->context, s->width);
}

cudaError_t gpt_cuda_position_grad(float *grad, const float *dx, const attention_shape *s,
                                   cudaStream_t stream) {
    const size_t count = (size_t)s->context * (size_t)s->width;
    return launch(position_grad_kernel, dim3(blocks_for(count, THREADS)), dim3(THREADS), stream,
                  grad, dx, s->sequences, count);
}

cudaError_t gpt_cuda_one_hot(float *out, const unsigned char *windows, const attention_shape *s,
                             cudaStream_t stream) {
    return launch(one_hot_kernel, dim3((unsigned)positions(s)), dim3(THREADS), stream, out, windows,
                  s->context);
}

cudaError_t gpt_cuda_norm_forward(float *y, float *mean, float *rstd, const float *x,
                                  const float *gain, int n, int width, cudaStream_t stream) {
    return launch(norm_forward_kernel, dim3(blocks_for((size_t)n, GROUPS)), row_block, stream, y,
                  mean, rstd, x, gain, n, width);
}

/* Runs of rows of the gain's gradient: a function of the shape alone, and few enough for `parts`.
 */
static unsigned gain_parts(int n, int width) {
    enum { ROWS = 32, MOST = 256 };
    const size_t room = GPT_PART_BYTES / sizeof(float) / (size_t)width;
    size_t parts = blocks_for((size_t)n, ROWS);
    parts = parts < MOST ? parts : MOST;
    return (unsigned)(parts < room ? parts : room);
}

cudaError_t gpt_cuda_norm_backward(float *dx, float *gain_grad, const float *dy, const float *x,
                                   const float *gain, const float *mean, const float *rstd, int n,
                                   int width, float *parts, cudaStream_t stream) {
    const unsigned columns = blocks_for((size_t)width, THREADS), runs = gain_parts(n, width);
    cudaError_t status = launch(norm_backward_kernel, dim3(blocks_for((size_t)n, GROUPS)),
                                row_block, stream, dx, dy, x, gain, mean, rstd, n, width);
    if (status == cudaSuccess)
        status = launch(gain_parts_kernel, dim3(columns, runs), dim3(THREADS), stream, parts, dy, x,
                        mean, rstd, n, width);
    if (status == cudaSuccess)
        status = launch(add_parts_kernel, dim3(columns), dim3(THREADS), stream, gain_grad, parts,
                        runs, width);
    return status;
}

cudaError_t gpt_cuda_split_heads(float *dst, const float *src, int count, const attention_shape *s,
                                 cudaStream_t stream) {
    return launch(heads_kernel<true>, dim3((unsigned)positions(s)), dim3(THREADS), stream, dst, src,
                  count, *s);
}

cudaError_t gpt_cuda_merge_heads(float *dst, const float *src, int count, const attention_shape *s,
                                 cudaStream_t stream) {
    return launch(heads_kernel<false>, dim3((unsigned)positions(s)), dim3(THREADS), stream, dst,
                  src, count, *s);
}

cudaError_t gpt_cuda_softmax_forward(float *scores, const attention_shape *s, cudaStream_t stream) {
    const size_t rows = positions(s) * (size_t)s->heads;
    return launch(softmax_forward_kernel, dim3(blocks_for(rows, GROUPS)), row_block, stream, scores,
                  rows, s->context);
}

cudaError_t gpt_cuda_softmax_backward(float *d, const float *probs, const attention_shape *s,
                                      cudaStream_t stream) {
    const size_t rows = positions(s) * (size_t)s->heads;
    return launch(softmax_backward_kernel, dim3(blocks_for(rows, GROUPS)), row_block, stream, d,
                  probs, rows, s->context);
}

cudaError_t gpt_cuda_widen(float *dst, const uint16_t *src, size_t count, cudaStream_t stream) {
    return launch(widen_kernel, dim3(gelu_blocks(count)), dim3(THREADS), stream, (uint32_t *)dst,
                  src, count);
}

cudaError_t gpt_cuda_gelu_forward(float *y, const float *x, size_t count, cudaStream_t stream) {
    return launch(gelu_forward_kernel, dim3(gelu_blocks(count)), dim3(THREADS), stream, y, x,
                  count);
}

cudaError_t gpt_cuda_gelu_backward(float *dy, const float *x, size_t count, cudaStream_t stream) {
    return launch(gelu_backward_kernel, dim3(gelu_blocks(count)), dim3(THREADS), stream, dy, x,
                  count);
}

cudaError_t gpt_cuda_cross_entropy_forward(float *logits, double *loss,
                                           const unsigned char *windows, const attention_shape *s,
                                           double *parts, cudaStream_t stream) {
    unsigned blocks = blocks_for(positions(s), GROUPS);
    blocks = blocks < LOSS_BLOCKS ? blocks : LOSS_BLOCKS;
    const cudaError_t status = launch(cross_entropy_forward_kernel, dim3(blocks), row_block, stream,
                                      logits, parts, windows, positions(s), s->context);
    return status != cudaSuccess
               ? status
               : launch(sum_kernel, dim3(1), dim3(LANES), stream, loss, parts, blocks * GROUPS);
}

cudaError_t gpt_cuda_cross_entropy_backward(float *probs, float factor,
                                            const unsigned char *windows, const attention_shape *s,
                                            cudaStream_t stream) {
    return launch(cross_entropy_backward_kernel, dim3((unsigned)positions(s)), dim3(THREADS),
                  stream, probs, factor, windows, s->context);
}
