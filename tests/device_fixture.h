/* device_fixture.h - the fake device as a test sees it, and a few small tensors. */
#ifndef DEVICE_FIXTURE_H
#define DEVICE_FIXTURE_H

#include "muonshard_nccl.h"
#include "optim/optimizer.h"
#include "ranks_fixture.h"

#include <cuda_runtime_api.h>
#include <nccl.h>

/* fake_cuda/fake.h says what these do. */
typedef struct fake_calls {
    void (*fail_at)(long n);
    long (*calls)(void);
    int (*live)(void);
    size_t (*bytes)(void);
    long (*waits)(void);
    long (*allocations)(void);
    void (*seed)(unsigned seed);
    void (*blas)(long *proposals, long *products);
    void (*fast)(int algorithm);
    long (*launches)(void); /* of kernels of clusters */
} fake_calls;
extern fake_calls fake;

/* What a program with a stream and memory of its own calls. */
typedef struct runtime_calls {
    cudaError_t (*create)(void **stream, unsigned flags);
    cudaError_t (*destroy)(void *stream);
    cudaError_t (*pin)(void **memory, size_t bytes, unsigned flags);
    cudaError_t (*unpin)(void *memory);
    cudaError_t (*alloc)(void **memory, size_t bytes);
    cudaError_t (*free)(void *memory);
    cudaError_t (*copy)(void *dst, const void *src, size_t bytes, int kind, void *stream);
    cudaError_t (*set_device)(int device);
} runtime_calls;
extern runtime_calls runtime;

/* And one with NCCL of its own. */
typedef struct nccl_calls {
    ncclResult_t (*id)(ncclUniqueId *id);
    ncclResult_t (*init)(ncclComm_t *comm, int size, ncclUniqueId id, int rank,
                         ncclConfig_t *config);
    ncclResult_t (*state)(ncclComm_t comm, ncclResult_t *state);
    ncclResult_t (*destroy)(ncclComm_t comm);
    void (*count)(void);
} nccl_calls;
extern nccl_calls nccl;

/* A group's setup: finds all of these. */
int find_fake(void **state);

enum { FEW = 4, STEPS = 6 };
extern const rig_tensor few[FEW];
rig_case few_case(const char *yaml);

#endif
