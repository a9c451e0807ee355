/* oracle_pair.h - the library, through its public header at one rank, and the oracle, over the same
 * tensors and gradients. */
#ifndef ORACLE_PAIR_H
#define ORACLE_PAIR_H

#include "device_images.h"
#include <muonshard.h>
#include "oracle_optimizer.h"

typedef struct pair_tensor {
    const char *name;
    muonshard_role role;
    muonshard_matrix_form form;
    int dims;
    int64_t shape[4];
    size_t split_count;
    int64_t splits[4];
    double
        grad_size; /* of an entry of the gradient; 0: log-uniform from 1e-12 to 1, entry by entry */
    muonshard_null_grad null_grad;
    double lr_multiplier, decay_multiplier; /* both 0: 1 */
    int group;
    muonshard_dtype dtype, grad_dtype; /* fp32 or bf16 */
} pair_tensor;

/* The oracle twice: with parameters in fp64, and with parameters stored in fp32.
 */
typedef struct pair {
    muonshard_comm *comm;
    device_images images;
    muonshard_optimizer *optimizer;
    oracle exact, rounded;
    const pair_tensor *tensors;
    size_t count;
    size_t *elements;
    float **start, **params, **grads, **grads_before; /* fp32, of numbers of the tensor's dtype */
    uint16_t **narrow_params, **narrow_grads; /* what the library has of bf16 tensors; NULL: fp32 */
    bool *absent;                             /* the library and the oracle get NULL for it */
    oracle_rng rng;
    muonshard_step_result_info result; /* of the last pair_step */
} pair;

/* Parameters of size 0.02 and gradients come from `seed`. Fails the test if the library refuses
 * anything. */
void pair_open(pair *p, const char *yaml, const oracle_preset *preset, const pair_tensor *tensors,
               size_t count, uint64_t seed);
void pair_close(pair *p);
/* From now on the gradient of a tensor is NULL, or its buffer again. */
void pair_set_absent(pair *p, size_t tensor, bool absent);
/* New random gradients; each tensor's size varies by up to 10 either way. */
void pair_new_gradients(pair *p);
/* One step of the library alone. Fails the test if it fails or if a gradient has other bytes after
 * it. */
void pair_step_library(pair *p, const muonshard_step_args *args);
/* One step of both; norm and clip factor have to agree. `args` may be NULL. */
void pair_step(pair *p, const muonshard_step_args *args);
/* Of the displacement from the start: relative Frobenius error against one of the two oracles. */
double pair_error(const pair *p, const oracle *o, size_t tensor);
/* Fails, naming `what`, tensor and step, where an error of any tensor exceeds its tolerance.
 * Returns the worst of each. */
void pair_check(const pair *p, const char *what, double tolerance_exact, double tolerance_rounded,
                double worst[2]);
/* The parameters of a and b (opened with the same tensors) are the same bytes. */
void pair_assert_same_params(const pair *a, const pair *b);

#endif
