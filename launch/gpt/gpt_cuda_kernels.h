/* gpt_cuda_kernels.h - the layers' kernels: each call enqueues on the stream. Arrays as in
 * gpt_layers.h, on the device. No sum depends on the order in which blocks run. */
#ifndef GPT_CUDA_KERNELS_H
#define GPT_CUDA_KERNELS_H

#include <cuda_runtime_api.h>

#include "gpt_layers.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { GPT_PART_BYTES = 4 << 20 }; /* of the array `parts` below */

cudaError_t gpt_cuda_embed(float *x, const float *token, const float *position,
                           const unsigned char *windows, const attention_shape *s,
                           cudaStream_t stream);
/* grad [context, width] += the sum of dx over sequences */
cudaError_t gpt_cuda_position_grad(float *grad, const float *dx, const attention_shape *s,
                                   cudaStream_t stream);
/* out [n, 256]: 1 at each position's byte, else 0 */
cudaError_t gpt_cuda_one_hot(float *out, const unsigned char *windows, const attention_shape *s,
                             cudaStream_t stream);

cudaError_t gpt_cuda_norm_forward(float *y, float *mean, float *rstd, const float *x,
                                  const float *gain, int n, int width, cudaStream_t stream);
cudaError_t gpt_cuda_norm_backward(float *dx, float *gain_grad, const float *dy, const float *x,
                                   const float *gain, const float *mean, const float *rstd, int n,
                                   int width, float *parts, cudaStream_t stream);

/* [n, count, width] to [count, sequences, heads, context, width / heads], and back */
cudaError_t gpt_cuda_split_heads(float *dst, const float *src, int count, const attention_shape *s,
                                 cudaStream_t stream);
cudaError_t gpt_cuda_merge_heads(float *dst, const float *src, int count, const attention_shape *s,
                                 cudaStream_t stream);
/* scores [sequences, heads, context, context] become probabilities: row t over positions 0..t, zero
 * after it. */
cudaError_t gpt_cuda_softmax_forward(float *scores, const attention_shape *s, cudaStream_t stream);
/* d, the gradient of the probabilities, becomes that of the scores. */
cudaError_t gpt_cuda_softmax_backward(float *d, const float *probs, const attention_shape *s,
                                      cudaStream_t stream);

cudaError_t gpt_cuda_widen(float *dst, const uint16_t *src, size_t count, cudaStream_t stream);
cudaError_t gpt_cuda_gelu_forward(float *y, const float *x, size_t count, cudaStream_t stream);
cudaError_t gpt_cuda_gelu_backward(float *dy, const float *x, size_t count, cudaStream_t stream);

/* loss [1]: the sum over positions */
cudaError_t gpt_cuda_cross_entropy_forward(float *logits, double *loss,
                                           const unsigned char *windows, const attention_shape *s,
                                           double *parts, cudaStream_t stream);
/* probs = factor * (probs - one hot of the next byte) */
cudaError_t gpt_cuda_cross_entropy_backward(float *probs, float factor,
                                            const unsigned char *windows, const attention_shape *s,
                                            cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif
