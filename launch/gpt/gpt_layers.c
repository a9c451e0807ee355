#include "gpt_layers.h"

#include <cblas.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#ifdef GPT_DOUBLE
#define GEMM cblas_dgemm
#else
#define GEMM cblas_sgemm
#endif

/* Partial sums the compiler can keep in vector registers. */
enum { LANES = 16 };

static gpt_real fold(const gpt_real *lanes) {
    gpt_real sum = 0;
    for (int i = 0; i < LANES; i++)
        sum += lanes[i];
    return sum;
}

static gpt_real sum_of(const gpt_real *x, int n) {
    gpt_real lanes[LANES] = {0};
    int i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++)
            lanes[j] += x[i + j];
    for (; i < n; i++)
        lanes[0] += x[i];
    return fold(lanes);
}

static gpt_real dot(const gpt_real *x, const gpt_real *y, int n) {
    gpt_real lanes[LANES] = {0};
    int i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++)
            lanes[j] += x[i + j] * y[i + j];
    for (; i < n; i++)
        lanes[0] += x[i] * y[i];
    return fold(lanes);
}

static gpt_real max_of(const gpt_real *x, int n) {
    gpt_real max = x[0];
    for (int i = 1; i < n; i++)
        max = x[i] > max ? x[i] : max;
    return max;
}

#ifdef GPT_DOUBLE
static inline double exponential(double x) {
    return exp(x);
}
#else
/* 2^k times a degree-7 Taylor polynomial on |r| <= ln(2)/2: within 2 units in the last place, and
 * without a call, so that loops over it become vector code. Saturates outside [-87, 88]; NaN stays
 * NaN. */
static inline float exponential(float x) {
    const float round_shift = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    x = x < -80.0f ? -80.0f : x;
    x = x > 80.0f ? 80.0f : x;
    float shifted = x * 1.44269504f + round_shift;
    float k = shifted - round_shift;
    float r = (x - k * 0.693359375f) + k * 2.12194440e-4f; /* ln 2 in two parts */
    float p = 1.0f / 5040.0f;
    p = p * r + 1.0f / 720.0f;
    p = p * r + 1.0f / 120.0f;
    p = p * r + 1.0f / 24.0f;
    p = p * r + 1.0f / 6.0f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    uint32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (bits << 23) + 0x3f800000u; /* k is in the low bits of the shifted sum */
    float power;
    memcpy(&power, &bits, sizeof power);
    return p * power;
}
#endif

static void embed_forward(void *self, gpt_real *x, const gpt_real *token, const gpt_real *position,
                          const unsigned char *windows, const attention_shape *s) {
    (void)self;
    size_t width = (size_t)s->width;
    for (int b = 0; b < s->sequences; b++, windows += s->context + 1) {
        for (int t = 0; t < s->context; t++, x += width) {
            const gpt_real *a = token + windows[t] * width, *p = position + (size_t)t * width;
            for (size_t c = 0; c < width; c++)
                x[c] = a[c] + p[c];
        }
    }
}

static void embed_backward(void *self, gpt_real *token_grad, gpt_real *position_grad,
                           const gpt_real *dx, const unsigned char *windows, gpt_real *scratch,
                           const attention_shape *s) {
    (void)self;
    (void)scratch;
    size_t width = (size_t)s->width;
    for (int b = 0; b < s->sequences; b++, windows += s->context + 1) {
        for (int t = 0; t < s->context; t++, dx += width) {
            gpt_real *a = token_grad + windows[t] * width, *p = position_grad + (size_t)t * width;
            for (size_t c = 0; c < width; c++) {
                a[c] += dx[c];
                p[c] += dx[c];
            }
        }
    }
}

static void linear_forward(void *self, gpt_real *y, const gpt_real *x, const gpt_real *weight,
                           const gpt_real *add, int n, int in, int out) {
    (void)self;
    if (add)
        memcpy(y, add, (size_t)n * (size_t)out * sizeof *y);
    GEMM(CblasRowMajor, CblasNoTrans, CblasTrans, n, out, in, 1, x, in, weight, in, add ? 1 : 0, y,
         out);
}

static void linear_backward(void *self, gpt_real *dx, gpt_real *weight_grad, const gpt_real *dy,
                            const gpt_real *x, const gpt_real *weight, int n, int in, int out) {
    (void)self;
    GEMM(CblasRowMajor, CblasNoTrans, CblasNoTrans, n, in, out, 1, dy, out, weight, in, 0, dx, in);
    GEMM(CblasRowMajor, CblasTrans, CblasNoTrans, out, in, n, 1, dy, out, x, in, 1, weight_grad,
         in);
}

static void norm_forward(void *self, gpt_real *y, gpt_real *mean, gpt_real *rstd, const gpt_real *x,
                         const gpt_real *gain, int n, int width) {
    (void)self;
    gpt_real size = (gpt_real)width;
    for (int i = 0; i < n; i++, x += width, y += width) {
        gpt_real m = sum_of(x, width) / size;
        for (int c = 0; c < width; c++)
            y[c] = x[c] - m;
        gpt_real r = 1 / (gpt_real)sqrt((double)(dot(y, y, width) / size) + 1e-5);
        for (int c = 0; c < width; c++)
            y[c] = gain[c] * (y[c] * r);
        mean[i] = m;
        rstd[i] = r;
    }
}

static void norm_backward(void *self, gpt_real *dx, gpt_real *gain_grad, const gpt_real *dy,
                          const gpt_real *x, const gpt_real *gain, const gpt_real *mean,
                          const gpt_real *rstd, int n, int width) {
    (void)self;
    gpt_real size = (gpt_real)width;
    for (int i = 0; i < n; i++, x += width, dx += width, dy += width) {
        gpt_real m = mean[i], r = rstd[i], along[LANES] = {0}, across[LANES] = {0};
        int c = 0;
        for (; c + LANES <= width; c += LANES) {
            for (int j = 0; j < LANES; j++) {
                gpt_real d = dy[c + j] * gain[c + j];
                along[j] += d;
                across[j] += d * (x[c + j] - m);
            }
        }
        for (; c < width; c++) {
            gpt_real d = dy[c] * gain[c];
            along[0] += d;
            across[0] += d * (x[c] - m);
        }
        gpt_real d_mean = fold(along) / size, d_hat = fold(across) * r / size;
        for (c = 0; c < width; c++) {
            gpt_real hat = (x[c] - m) * r;
            dx[c] += r * (dy[c] * gain[c] - d_mean - hat * d_hat);
            gain_grad[c] += dy[c] * hat;
        }
    }
}

static void attention_forward(void *self, gpt_real *y, gpt_real *probs, const gpt_real *qkv,
                              gpt_real *scratch, const attention_shape *s) {
    (void)self;
    (void)scratch;
    int t_count = s->context, size = s->width / s->heads, row = 3 * s->width;
    gpt_real scale = (gpt_real)(1 / sqrt((double)size));
    for (int b = 0; b < s->sequences; b++) {
        for (int h = 0; h < s->heads; h++) {
            size_t first = (size_t)b * (size_t)t_count;
            const gpt_real *q = qkv + first * (size_t)row + h * size;
            const gpt_real *k = q + s->width, *v = k + s->width;
            /* probs [context, context]: row t is position t's weights over positions 0..t. */
            GEMM(CblasRowMajor, CblasNoTrans, CblasTrans, t_count, t_count, size, scale, q, row, k,
                 row, 0, probs, t_count);
            for (int t = 0; t < t_count; t++) {
                gpt_real *p = probs + (size_t)t * (size_t)t_count, max = max_of(p, t + 1);
                for (int u = 0; u <= t; u++)
                    p[u] = exponential(p[u] - max);
                gpt_real inverse = 1 / sum_of(p, t + 1);
                for (int u = 0; u <= t; u++)
                    p[u] *= inverse;
                for (int u = t + 1; u < t_count; u++)
                    p[u] = 0;
            }
            GEMM(CblasRowMajor, CblasNoTrans, CblasNoTrans, t_count, size, t_count, 1, probs,
                 t_count, v, row, 0, y + first * (size_t)s->width + h * size, s->width);
            probs += (size_t)t_count * (size_t)t_count;
        }
    }
}

static void attention_backward(void *self, gpt_real *dqkv, const gpt_real *dy,
                               const gpt_real *probs, const gpt_real *qkv, gpt_real *scratch,
                               const attention_shape *s) {
    (void)self;
    int t_count = s->context, size = s->width / s->heads, row = 3 * s->width;
    gpt_real scale = (gpt_real)(1 / sqrt((double)size));
    for (int b = 0; b < s->sequences; b++) {
        for (int h = 0; h < s->heads; h++) {
            size_t first = (size_t)b * (size_t)t_count, at = first * (size_t)row;
            const gpt_real *q = qkv + at + h * size, *k = q + s->width, *v = k + s->width;
            gpt_real *dq = dqkv + at + h * size, *dk = dq + s->width, *dv = dk + s->width;
            const gpt_real *d = dy + first * (size_t)s->width + h * size;
            GEMM(CblasRowMajor, CblasNoTrans, CblasTrans, t_count, t_count, size, 1, d, s->width, v,
                 row, 0, scratch, t_count);
            GEMM(CblasRowMajor, CblasTrans, CblasNoTrans, t_count, size, t_count, 1, probs, t_count,
                 d, s->width, 0, dv, row);
            /* Softmax: scratch becomes the gradient of the scores, zero above the diagonal as probs
             * are. */
            for (int t = 0; t < t_count; t++) {
                const gpt_real *p = probs + (size_t)t * (size_t)t_count;
                gpt_real *g = scratch + (size_t)t * (size_t)t_count, inner = dot(p, g, t + 1);
                for (int u = 0; u < t_count; u++)
                    g[u] = p[u] * (g[u] - inner);
            }
            GEMM(CblasRowMajor, CblasNoTrans, CblasNoTrans, t_count, size, t_count, scale, scratch,
                 t_count, k, row, 0, dq, row);
            GEMM(CblasRowMajor, CblasTrans, CblasNoTrans, t_count, size, t_count, scale, scratch,
                 t_count, q, row, 0, dk, row);
            probs += (size_t)t_count * (size_t)t_count;
        }
    }
}

/* (1 + tanh(u))/2 = 1/(1 + exp(-2u)), and u = gelu_slope (x + gelu_cubic x^3). */
static const gpt_real gelu_slope = (gpt_real)0.79788456080286536, gelu_cubic = (gpt_real)0.044715;

static inline gpt_real gelu_gate(gpt_real x) {
    return 1 / (1 + exponential(-2 * gelu_slope * (x + gelu_cubic * x * x * x)));
}

static void gelu_forward(void *self, gpt_real *y, const gpt_real *x, size_t count) {
    (void)self;
    for (size_t i = 0; i < count; i++)
        y[i] = x[i] * gelu_gate(x[i]);
}

static void gelu_backward(void *self, gpt_real *dy, const gpt_real *x, size_t count) {
    (void)self;
    for (size_t i = 0; i < count; i++) {
        gpt_real gate = gelu_gate(x[i]);
        gpt_real slope = 2 * gelu_slope * (1 + 3 * gelu_cubic * x[i] * x[i]);
        dy[i] *= gate + x[i] * gate * (1 - gate) * slope;
    }
}

static double cross_entropy_forward(void *self, gpt_real *logits, const unsigned char *windows,
                                    const attention_shape *s) {
    (void)self;
    double loss = 0.0;
    for (int b = 0; b < s->sequences; b++, windows += s->context + 1) {
        for (int t = 0; t < s->context; t++, logits += GPT_VOCABULARY) {
            gpt_real max = max_of(logits, GPT_VOCABULARY), target = logits[windows[t + 1]];
            for (int v = 0; v < GPT_VOCABULARY; v++)
                logits[v] = exponential(logits[v] - max);
            gpt_real sum = sum_of(logits, GPT_VOCABULARY), inverse = 1 / sum;
            for (int v = 0; v < GPT_VOCABULARY; v++)
                logits[v] *= inverse;
            loss += log((double)sum) + (double)(max - target);
        }
    }
    return loss / ((double)s->sequences * s->context);
}

static void cross_entropy_backward(void *self, gpt_real *probs, double scale,
                                   const unsigned char *windows, const attention_shape *s) {
    (void)self;
    gpt_real factor = (gpt_real)(scale / ((double)s->sequences * s->context));
    for (int b = 0; b < s->sequences; b++, windows += s->context + 1) {
        for (int t = 0; t < s->context; t++, probs += GPT_VOCABULARY) {
            probs[windows[t + 1]] -= 1;
            for (int v = 0; v < GPT_VOCABULARY; v++)
                probs[v] *= factor;
        }
    }
}

/* ---- memory ---- */

static void *host_alloc(void *self, size_t bytes) {
    (void)self;
    size_t size = (bytes + 63) / 64 * 64;
    void *p = aligned_alloc(64, size);
    if (p)
        memset(p, 0, size);
    return p;
}

static void host_free(void *self, void *memory) {
    (void)self;
    free(memory);
}

static void host_zero(void *self, void *memory, size_t bytes) {
    (void)self;
    memset(memory, 0, bytes);
}

static void host_copy(void *self, void *dst, const void *src, size_t bytes) {
    (void)self;
    memcpy(dst, src, bytes);
}

static void host_nothing(void *self) {
    (void)self;
}

static const char *host_error(void *self) {
    (void)self;
    return NULL;
}

static void host_widen(void *self, gpt_real *dst, const uint16_t *src, size_t count) {
    (void)self;
    for (size_t i = 0; i < count; i++) {
        const uint32_t bits = (uint32_t)src[i] << 16;
        float x;
        memcpy(&x, &bits, sizeof x);
        dst[i] = (gpt_real)x;
    }
}

/* attention_backward's [context, context] */
static size_t host_scratch_count(const attention_shape *s) {
    return (size_t)s->context * (size_t)s->context;
}

const gpt_layers gpt_host_layers = {
    .alloc = host_alloc,
    .free = host_free,
    .zero = host_zero,
    .upload = host_copy,
    .download = host_copy,
    .widen = host_widen,
    .wait = host_nothing,
    .error = host_error,
    .close = host_nothing,
    .scratch_count = host_scratch_count,
    .embed_forward = embed_forward,
    .embed_backward = embed_backward,
    .linear_forward = linear_forward,
    .linear_backward = linear_backward,
    .norm_forward = norm_forward,
    .norm_backward = norm_backward,
    .attention_forward = attention_forward,
    .attention_backward = attention_backward,
    .gelu_forward = gelu_forward,
    .gelu_backward = gelu_backward,
    .cross_entropy_forward = cross_entropy_forward,
    .cross_entropy_backward = cross_entropy_backward,
};
