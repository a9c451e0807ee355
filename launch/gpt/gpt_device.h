/* gpt_device.h - the layers on a GPU: a shared library of its own, opened at run time, so that
 * nothing of CUDA has to be installed where it isn't used. */
#ifndef GPT_DEVICE_H
#define GPT_DEVICE_H

#include "gpt_layers.h"

/* Raised by every change of gpt_layers.h or this file. */
#define GPT_DEVICE_ABI 2

/* What the products of the linear maps and of attention are made of. Everything is stored in fp32
 * and summed in fp32. */
typedef enum gpt_cuda_math {
    GPT_MATH_FP32,
    GPT_MATH_TF32, /* factors rounded to tf32 */
    GPT_MATH_BF16  /* factors rounded to bf16 */
} gpt_cuda_math;

typedef struct gpt_device_entry {
    int abi; /* GPT_DEVICE_ABI it was built with; what follows is read only if that is ours */
    gpt_layers *(*open)(gpt_cuda_math math, int device, void *stream, char *message, size_t size);
} gpt_device_entry;

typedef const gpt_device_entry *(*gpt_device_entry_fn)(void);

/* Layers on `device` (below 0: the current one) whose work all goes to `stream`, a cudaStream_t
 * that stays borrowed (NULL: the default stream). The caller's, until its close(). NULL: not
 * available, with the reason in `message` [size]. */
gpt_layers *gpt_device_open(gpt_cuda_math math, int device, void *stream, char *message,
                            size_t size);

#endif
