/* gpt_cuda_launch.cuh - how a kernel is launched: through the runtime's own call, so that its
 * outcome is a status like any other. A build without nvcc (the tests') runs the same kernels on
 * the host. */
#ifndef GPT_CUDA_LAUNCH_CUH
#define GPT_CUDA_LAUNCH_CUH

#include <cuda_runtime_api.h>

#ifdef __CUDACC__

enum { THREADS = 256, LANES = 32 };

template <typename Type> struct plain { typedef Type type; };

template <typename... Parameters>
static cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, cudaStream_t stream,
                          typename plain<Parameters>::type... arguments) {
    void *list[] = {(void *)&arguments...};
    return cudaLaunchKernel((const void *)kernel, grid, block, list, 0, stream);
}

/* `mine` of the lane whose number differs from this one's in the bits of `step`. */
template <typename Number> __device__ static inline Number other_lane(Number mine, int step) {
    return __shfl_xor_sync(0xffffffffu, mine, step);
}

#else
#include "cuda_emulation.h"

enum { LANES = THREADS };

template <typename Number> static inline Number other_lane(Number mine, int step) {
    __shared__ Number lanes[LANES];
    lanes[threadIdx.x] = mine;
    __syncthreads();
    const Number other = lanes[threadIdx.x ^ (unsigned)step];
    __syncthreads();
    return other;
}
#endif

/* Rows of an array are worked on by LANES threads each, GROUPS rows a block. */
enum { GROUPS = THREADS / LANES };

/* The sum over the lanes, the same bits in each. */
template <typename Number> __device__ static inline Number lanes_sum(Number mine) {
    for (int step = LANES / 2; step > 0; step /= 2)
        mine += other_lane(mine, step);
    return mine;
}

__device__ static inline float lanes_max(float mine) {
    for (int step = LANES / 2; step > 0; step /= 2)
        mine = fmaxf(mine, other_lane(mine, step));
    return mine;
}

#endif
