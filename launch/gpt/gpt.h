/* gpt.h - a small GPT over bytes, forward and backward: what `muonshard train` trains.
 *
 * Token + position embedding; pre-norm blocks of causal multi-head attention (fused QKV) and an MLP
 * four times as wide with GELU (tanh form); final norm; head, tied to the token embedding or its
 * own. LayerNorm has a gain and no bias, linear maps have no bias. Weights are [out, in] and those
 * of a kind are stacked over the layers. fp32; a build with GPT_DOUBLE is the same model in fp64,
 * for checking gradients. It computes where its table of layers does: on the host, where GEMMs run
 * on the BLAS threads the program set, or on a device (gpt_device.h). */
#ifndef GPT_H
#define GPT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include "muonshard.h"

#ifdef GPT_DOUBLE
typedef double gpt_real;
#else
typedef float gpt_real;
#endif

#define GPT_VOCABULARY 256

typedef struct gpt_shape {
    int layers, width, heads;
    int context; /* positions in a sequence */
    bool tied;   /* the head is the token embedding */
} gpt_shape;

/* In forward order; GPT_HEAD is missing when tied. L layers, C width. */
enum {
    GPT_TOKEN_EMBEDDING,    /* [256, C] */
    GPT_POSITION_EMBEDDING, /* [context, C] */
    GPT_ATTN_NORM,          /* [L, C] */
    GPT_QKV,        /* [L, 3C, C]: rows of Q, K, V; a head's rows are together within each */
    GPT_ATTN_OUT,   /* [L, C, C] */
    GPT_MLP_NORM,   /* [L, C] */
    GPT_MLP_UP,     /* [L, 4C, C] */
    GPT_MLP_DOWN,   /* [L, C, 4C] */
    GPT_FINAL_NORM, /* [C] */
    GPT_HEAD,       /* [256, C] */
    GPT_TENSOR_MAX
};

typedef struct gpt_tensor {
    const char *name;
    muonshard_role role; /* MATRIX for the stacks of the blocks, else ELEMENTWISE */
    int dims;
    int64_t shape[3];
    size_t row_split_count; /* QKV: 3; else 0 */
    int64_t row_splits[3];
    int64_t entries; /* a MATRIX stack: layers; else 1 */
    size_t count;    /* elements */
    gpt_real *param; /* borrowed from the model's one parameter arena, in the layers' memory */
    gpt_real *grad;  /* borrowed from its one gradient arena, likewise */
} gpt_tensor;

typedef struct gpt gpt;
typedef struct gpt_layers gpt_layers; /* gpt_layers.h */
extern const gpt_layers gpt_host_layers;

/* Entries [first, first + count) of tensor number `tensor` have their final gradient in this
 * backward pass. Entries of a stack come from the last to the first. */
typedef void (*gpt_ready_fn)(void *user, size_t tensor, int64_t first, int64_t count);

/* NULL, or what is wrong with the shape. */
const char *gpt_shape_error(const gpt_shape *shape);
/* A model for up to `sequences` sequences at a time, parameters from gpt_init with seed 0,
 * gradients zero, on `layers`, which stay borrowed. All memory is allocated here. NULL: out of
 * memory, gpt_shape_error, or an error of the layers. */
gpt *gpt_create(const gpt_shape *shape, int sequences, const gpt_layers *layers);
void gpt_destroy(gpt *model);

/* N(0, 1/in) weights of the blocks (in: a row's length), attn_out and mlp_down times 1/sqrt(2 L),
 * embeddings N(0, 1/C), head N(0, 0.02^2), gains 1: a function of the seed alone. They are in place
 * on return. */
void gpt_init(gpt *model, uint64_t seed);
/* The tensors, in the order of the enum; borrowed from the model. */
const gpt_tensor *gpt_tensors(const gpt *model, size_t *count);
size_t gpt_parameter_count(const gpt *model);
/* What went wrong on the device, for good, or NULL. Borrowed. A failure may come to light only in a
 * call that waits, such as gpt_forward. */
const char *gpt_error(const gpt *model);

/* windows [sequences, context + 1] bytes in the host's memory: position t predicts byte t + 1.
 * Returns the mean cross-entropy over all positions, nats; NaN after an error. Waits for it. */
double gpt_forward(gpt *model, const unsigned char *windows, int sequences);
/* Gradient of scale * (mean loss of the latest forward): added to the gradients, or in their place.
 * `ready` may be NULL; it is called exactly once for every entry. On a device the gradient is final
 * for what is given to the stream from then on: nothing here waits. */
void gpt_backward(gpt *model, double scale, bool accumulate, gpt_ready_fn ready, void *user);

#endif
