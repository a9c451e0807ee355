/* cuda_launch.cuh - how a kernel is launched: through the runtime's own call, so that its outcome
 * is a status like any other. A build without nvcc (the tests') runs the same kernels on the host.
 */
#ifndef CUDA_LAUNCH_CUH
#define CUDA_LAUNCH_CUH

#include <cuda_runtime_api.h>

#ifdef __CUDACC__

enum { THREADS = 256 };

template <typename Type> struct plain { typedef Type type; };

template <typename... Parameters>
static cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, cudaStream_t stream,
                          typename plain<Parameters>::type... arguments) {
    void *list[] = {(void *)&arguments...};
    return cudaLaunchKernel((const void *)kernel, grid, block, list, 0, stream);
}

template <typename Type> __device__ static inline Type load_wide(const void *from) {
    return *(const Type *)from;
}

/* One instruction, to global memory; the compiler may take an assignment apart where others are
 * near it. */
__device__ static inline void store_wide(uint4 *to, uint4 x) {
    asm("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
        : "memory");
}

__device__ static inline void store_wide(uint2 *to, uint2 x) {
    asm("st.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(x.x), "r"(x.y) : "memory");
}

#else
#include "cuda_emulation.h"
#endif

/* Adds up one number a thread; every thread gets the sum, the same whatever else runs. */
__device__ static inline double block_sum(double mine) {
    __shared__ double parts[THREADS];
    const unsigned thread = threadIdx.y * blockDim.x + threadIdx.x;
    parts[thread] = mine;
    __syncthreads();
    for (unsigned half = THREADS / 2; half > 0; half /= 2) {
        if (thread < half)
            parts[thread] += parts[thread + half];
        __syncthreads();
    }
    const double sum = parts[0];
    __syncthreads();
    return sum;
}

#endif
