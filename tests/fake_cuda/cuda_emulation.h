/* cuda_emulation.h - kernels as functions of the host: a block is run thread by thread, each on a
 * stack of its own as soon as one of them comes to a barrier. Included by cuda_launch.cuh where
 * nvcc doesn't compile it. */
#ifndef CUDA_EMULATION_H
#define CUDA_EMULATION_H

#include <functional>
#include <math.h>

#include <cuda_runtime_api.h>

/* Blocks are small: a barrier costs a change of stacks for every thread. */
enum { THREADS = 8 };

#undef __shared__
#define __shared__ static thread_local
#ifndef __grid_constant__
#define __grid_constant__
#endif

extern thread_local uint3 threadIdx, blockIdx;
extern thread_local dim3 blockDim, gridDim;

void emulated_barrier(void);
cudaError_t emulated_launch(cudaStream_t stream, dim3 grid, dim3 block, size_t parameter_bytes,
                            std::function<void()> thread);

#define __syncthreads() emulated_barrier()

/* Of 8 or 16 bytes; aligned, or the program ends, as a kernel would. */
void emulated_wide_access(const void *at, size_t bytes);

template <typename Type> static inline Type load_wide(const void *from) {
    emulated_wide_access(from, sizeof(Type));
    return *(const Type *)from;
}

template <typename Type> static inline void store_wide(Type *to, Type x) {
    emulated_wide_access(to, sizeof(Type));
    *to = x;
}

template <typename Type> struct plain { typedef Type type; };

template <typename... Parameters>
static cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, cudaStream_t stream,
                          typename plain<Parameters>::type... arguments) {
    return emulated_launch(stream, grid, block, (sizeof(Parameters) + ... + 0),
                           [=] { kernel(arguments...); });
}

#endif
