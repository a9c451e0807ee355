/* gpt_layers.h - what gpt.c is made of: layers as functions of plain arrays, and the memory these
 * arrays lie in. A table is one place to compute: the host (gpt_layers.c) or a device (gpt_cuda.c).
 *
 * Arrays are row-major, n positions (rows), in the memory of the table unless said otherwise. Calls
 * take effect in the order they are made; only those that say so wait. Backward functions take dy
 * and write dx; weight gradients are added to. After a call that failed the rest do nothing, and
 * error() says what it was. */
#ifndef GPT_LAYERS_H
#define GPT_LAYERS_H

#include "gpt.h"

/* One attention layer's sizes; rows of qkv are sequence-major. */
typedef struct attention_shape {
    int sequences, context, heads, width;
} attention_shape;

struct gpt_layers {
    void *self; /* first argument of every function */

    /* ---- memory; sizes in bytes ---- */
    void *(*alloc)(void *self, size_t bytes); /* zeroed, aligned to 64; NULL: error() tells */
    void (*free)(void *self, void *memory);   /* NULL is allowed */
    void (*zero)(void *self, void *memory, size_t bytes);
    /* From the host's memory, which is free for other use on return; and to it, which waits. */
    void (*upload)(void *self, void *dst, const void *host, size_t bytes);
    void (*download)(void *self, void *host, const void *src, size_t bytes);
    /* dst [count] = src [count] bf16, both of the table's memory */
    void (*widen)(void *self, gpt_real *dst, const uint16_t *src, size_t count);
    void (*wait)(void *self);         /* until all that was called for is done */
    const char *(*error)(void *self); /* the first failure, or NULL; borrowed */
    void (*close)(void *self);        /* ends the table; its memory has been freed before */
    /* Elements of scratch that the layers below need for up to this shape. */
    size_t (*scratch_count)(const attention_shape *s);

    /* ---- layers ---- */
    /* x [n, width] = token [256, width] of each byte + position [context, width]; windows
     * [sequences, context + 1] bytes */
    void (*embed_forward)(void *self, gpt_real *x, const gpt_real *token, const gpt_real *position,
                          const unsigned char *windows, const attention_shape *s);
    void (*embed_backward)(void *self, gpt_real *token_grad, gpt_real *position_grad,
                           const gpt_real *dx, const unsigned char *windows, gpt_real *scratch,
                           const attention_shape *s);
    /* y [n, out] = x [n, in] weight [out, in]^T + add [n, out], where NULL adds nothing */
    void (*linear_forward)(void *self, gpt_real *y, const gpt_real *x, const gpt_real *weight,
                           const gpt_real *add, int n, int in, int out);
    /* dx [n, in] = dy [n, out] weight; weight_grad += dy^T x */
    void (*linear_backward)(void *self, gpt_real *dx, gpt_real *weight_grad, const gpt_real *dy,
                            const gpt_real *x, const gpt_real *weight, int n, int in, int out);
    /* y = gain * (x - mean) * rstd; mean and rstd [n] are kept for backward */
    void (*norm_forward)(void *self, gpt_real *y, gpt_real *mean, gpt_real *rstd, const gpt_real *x,
                         const gpt_real *gain, int n, int width);
    /* dx += what came through the norm: the residual's own gradient is in dx already. */
    void (*norm_backward)(void *self, gpt_real *dx, gpt_real *gain_grad, const gpt_real *dy,
                          const gpt_real *x, const gpt_real *gain, const gpt_real *mean,
                          const gpt_real *rstd, int n, int width);
    /* y [n, width] from qkv [n, 3 width]; probs [sequences, heads, context, context] is kept for
     * backward */
    void (*attention_forward)(void *self, gpt_real *y, gpt_real *probs, const gpt_real *qkv,
                              gpt_real *scratch, const attention_shape *s);
    void (*attention_backward)(void *self, gpt_real *dqkv, const gpt_real *dy,
                               const gpt_real *probs, const gpt_real *qkv, gpt_real *scratch,
                               const attention_shape *s);
    /* y = x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), element by element */
    void (*gelu_forward)(void *self, gpt_real *y, const gpt_real *x, size_t count);
    /* dy becomes dx in place. */
    void (*gelu_backward)(void *self, gpt_real *dy, const gpt_real *x, size_t count);
    /* logits [n, 256] become probabilities; returns the mean of -log p of each position's next
     * byte, NaN after a failure. Waits. */
    double (*cross_entropy_forward)(void *self, gpt_real *logits, const unsigned char *windows,
                                    const attention_shape *s);
    /* probs becomes the gradient of scale * loss with respect to the logits. */
    void (*cross_entropy_backward)(void *self, gpt_real *probs, double scale,
                                   const unsigned char *windows, const attention_shape *s);
};

#endif
