/* fuzz_small.h - an optimizer to load hostile checkpoints into: a stack of matrices in bf16, a
 * convolution, a bias in fp16, a frozen tensor. */
#ifndef FUZZ_SMALL_H
#define FUZZ_SMALL_H

#include "fuzz.h"

typedef struct small {
    muonshard_comm *comm;
    muonshard_config *config;
    muonshard_optimizer *optimizer;
    void *params; /* own, [params_bytes]: of all tensors */
    size_t params_bytes;
    void *grads; /* own, [params_bytes] */
    void *image; /* own, [image_bytes]: the state after some steps */
    size_t image_bytes;
} small;

/* Made at the first call, with its image loaded at every one. It leaks nothing: it stays. */
small *fuzz_small(void);
/* The state is what it was: the parameters, and the image. */
bool fuzz_small_unchanged(const small *s);
/* A state that was loaded can be saved, loaded again to the same, and stepped on. */
void fuzz_small_goes_on(small *s);

#endif
