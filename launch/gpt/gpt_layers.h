/* gpt_layers.h - the layers of gpt.c as functions of plain arrays: n positions (rows), row-major.
 * Backward functions take dy and write dx; weight gradients are added to. */
#ifndef GPT_LAYERS_H
#define GPT_LAYERS_H

#include "gpt.h"

/* One attention layer's sizes; rows of qkv are sequence-major. */
typedef struct attention_shape {
    int sequences, context, heads, width;
} attention_shape;

/* x [n, width] = token [256, width] of each byte + position [context, width]; windows [sequences,
 * context + 1] */
void embed_forward(gpt_real *x, const gpt_real *token, const gpt_real *position,
                   const unsigned char *windows, const attention_shape *s);
void embed_backward(gpt_real *token_grad, gpt_real *position_grad, const gpt_real *dx,
                    const unsigned char *windows, const attention_shape *s);

/* y [n, out] = x [n, in] weight [out, in]^T, or added to y */
void linear_forward(gpt_real *y, const gpt_real *x, const gpt_real *weight, int n, int in, int out,
                    bool add);
/* dx [n, in] = dy [n, out] weight; weight_grad += dy^T x */
void linear_backward(gpt_real *dx, gpt_real *weight_grad, const gpt_real *dy, const gpt_real *x,
                     const gpt_real *weight, int n, int in, int out);

/* y = gain * (x - mean) * rstd; mean and rstd [n] are kept for backward */
void norm_forward(gpt_real *y, gpt_real *mean, gpt_real *rstd, const gpt_real *x,
                  const gpt_real *gain, int n, int width);
/* dx += what came through the norm: the residual's own gradient is in dx already. */
void norm_backward(gpt_real *dx, gpt_real *gain_grad, const gpt_real *dy, const gpt_real *x,
                   const gpt_real *gain, const gpt_real *mean, const gpt_real *rstd, int n,
                   int width);

/* y [n, width] from qkv [n, 3 width]; probs [sequences, heads, context, context] is kept for
 * backward */
void attention_forward(gpt_real *y, gpt_real *probs, const gpt_real *qkv, const attention_shape *s);
/* scratch [context, context] */
void attention_backward(gpt_real *dqkv, const gpt_real *dy, const gpt_real *probs,
                        const gpt_real *qkv, gpt_real *scratch, const attention_shape *s);

/* y = x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), element by element */
void gelu_forward(gpt_real *y, const gpt_real *x, size_t count);
/* dy becomes dx in place. */
void gelu_backward(gpt_real *dy, const gpt_real *x, size_t count);

/* logits [n, 256] become probabilities; returns the mean of -log p of each position's next byte. */
double cross_entropy_forward(gpt_real *logits, const unsigned char *windows,
                             const attention_shape *s);
/* probs becomes the gradient of scale * loss with respect to the logits. */
void cross_entropy_backward(gpt_real *probs, double scale, const unsigned char *windows,
                            const attention_shape *s);

#endif
