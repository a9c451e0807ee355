#include "device_fixture.h"

#include <dlfcn.h>
#include <stdlib.h>

#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

fake_calls fake;
runtime_calls runtime;
nccl_calls nccl;

int find_fake(void **state) {
    (void)state;
    void *library = dlopen("libmuonshard_cuda.so.0.1", RTLD_NOW | RTLD_LOCAL);
    if (!library)
        return print_error("%s\n", dlerror()), -1;
    *(void **)&fake.fail_at = dlsym(library, "fake_cuda_fail_at");
    *(void **)&fake.calls = dlsym(library, "fake_cuda_calls");
    *(void **)&fake.live = dlsym(library, "fake_cuda_live");
    *(void **)&fake.bytes = dlsym(library, "fake_cuda_bytes");
    *(void **)&fake.waits = dlsym(library, "fake_cuda_waits");
    *(void **)&fake.allocations = dlsym(library, "fake_cuda_allocations");
    *(void **)&fake.seed = dlsym(library, "fake_cuda_seed");
    *(void **)&fake.fast = dlsym(library, "fake_blas_fast");
    *(void **)&fake.blas = dlsym(library, "fake_blas_given");
    *(void **)&fake.launches = dlsym(library, "fake_hopper_launches");
    *(void **)&runtime.create = dlsym(library, "cudaStreamCreateWithFlags");
    *(void **)&runtime.destroy = dlsym(library, "cudaStreamDestroy");
    *(void **)&runtime.pin = dlsym(library, "cudaHostAlloc");
    *(void **)&runtime.unpin = dlsym(library, "cudaFreeHost");
    *(void **)&runtime.alloc = dlsym(library, "cudaMalloc");
    *(void **)&runtime.free = dlsym(library, "cudaFree");
    *(void **)&runtime.copy = dlsym(library, "cudaMemcpyAsync");
    *(void **)&nccl.id = dlsym(library, "ncclGetUniqueId");
    *(void **)&nccl.init = dlsym(library, "ncclCommInitRankConfig");
    *(void **)&nccl.state = dlsym(library, "ncclCommGetAsyncError");
    *(void **)&nccl.destroy = dlsym(library, "ncclCommDestroy");
    *(void **)&nccl.count = dlsym(library, "ncclCommCount");
    *(void **)&runtime.set_device = dlsym(library, "cudaSetDevice");
    return fake.fail_at && fake.seed && nccl.id && nccl.count ? 0 : -1;
}

const rig_tensor few[FEW] = {
    {RIG_TENSOR("embedding", MUONSHARD_ROLE_ELEMENTWISE, 2, 31, 8)},
    {RIG_TENSOR("square", MUONSHARD_ROLE_MATRIX, 3, 3, 12, 12)},
    {RIG_TENSOR("tall", MUONSHARD_ROLE_MATRIX, 2, 24, 8)},
    {RIG_TENSOR("wide", MUONSHARD_ROLE_MATRIX, 3, 2, 8, 24)},
};

rig_case few_case(const char *yaml) {
    return (rig_case){.tensors = few, .count = FEW, .yaml = yaml, .steps = STEPS};
}
