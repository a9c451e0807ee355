/* step_rig.h - an optimizer over made-up tensors on any communicator, for tests at several ranks.
 * Nothing here asserts: it runs in threads, where cmocka can't; statuses and bytes go back to the
 * caller. Sees the public header only, but for memory of a device. */
#ifndef STEP_RIG_H
#define STEP_RIG_H

#include <stdbool.h>
#include <muonshard.h>
#include "device_images.h"

#define RIG_MAX_TENSORS 24

typedef struct rig_tensor {
    const char *name;
    muonshard_role role;
    int dims;
    int64_t shape[4];
    size_t split_count;
    int64_t splits[4];
    int priority, priority_stride;
    muonshard_null_grad null_grad;
    muonshard_matrix_form form;
    muonshard_dtype dtype, grad_dtype;
} rig_tensor;

/* The first fields of an initialiser: {RIG_TENSOR("w", MUONSHARD_ROLE_MATRIX, 2, 24, 96), .priority
 * = 1} */
#define RIG_TENSOR(name_, role_, dims_, ...)                                                       \
    .name = (name_), .role = (role_), .dims = (dims_), .shape = {__VA_ARGS__}

typedef enum rig_overlap {
    RIG_STEP_ONLY,
    RIG_READY_BACKWARD, /* grad_ready entry by entry, last tensor first, with progress between */
    RIG_READY_SHUFFLED, /* grad_ready in an order that depends on rank and step */
    RIG_DEFER           /* the step is deferred and finished by tensor_wait */
} rig_overlap;

typedef struct rig_case {
    const rig_tensor *tensors;
    size_t count;
    const char *yaml;
    int steps;
    rig_overlap overlap;
    bool same_gradients; /* every rank has rank 0's */
    muonshard_sync_params sync;
} rig_case;

typedef struct rig {
    const rig_case *setup;
    muonshard_comm *comm; /* borrowed */
    muonshard_optimizer *optimizer;
    size_t elements[RIG_MAX_TENSORS];
    float *params[RIG_MAX_TENSORS], *grads[RIG_MAX_TENSORS]; /* of the tensor's dtypes */
    device_images images; /* of them, where the backend is not the host's */
    int step;
    muonshard_status status; /* the first that was not OK */
    char message[1024];
} rig;

/* Parameters depend on names alone. The statuses of all calls collect in rig.status. */
void rig_open(rig *r, muonshard_comm *comm, const rig_case *setup);
/* Up to and without commit, for tests of what goes wrong there. */
void rig_prepare(rig *r, muonshard_comm *comm, const rig_case *setup);
/* New gradients of this rank's, and the next step's number. */
void rig_gradients(rig *r);
/* The gradients another rank would have in this step. */
void rig_gradients_of(rig *r, int rank);
void rig_step(rig *r);
/* muonshard_step with arguments of the test's own, and what came of it on all ranks: rig.status
 * stays as it is, the text is the optimizer's. */
muonshard_status rig_call(rig *r, const muonshard_step_args *args);
void rig_close(rig *r);
/* What the optimizer is given as a tensor's gradient. */
const void *rig_grad(const rig *r, size_t tensor);
/* Parameters that were changed on the host, to where the optimizer has them. */
void rig_push(rig *r);
/* And back. */
void rig_pull(rig *r);
/* Of a tensor's parameters. */
size_t rig_bytes(const rig *r, size_t tensor);
/* FNV-1a of all parameters' bytes. */
uint64_t rig_digest(const rig *r);
/* Opens, steps setup->steps times with new gradients, closes; returns the digest, 0 after an error.
 */
uint64_t rig_run(muonshard_comm *comm, const rig_case *setup, muonshard_status *status);

/* Square, wide, tall, prime, 1 x n, n x 1, stacked, row-split, flattened, element-wise, frozen. */
extern const rig_tensor rig_zoo[];
extern const size_t rig_zoo_count;

#endif
