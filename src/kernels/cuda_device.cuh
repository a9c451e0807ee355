/* cuda_device.cuh - what the kernels share: elements of any dtype, and lists of items as kernel
 * arguments. */
#ifndef CUDA_DEVICE_CUH
#define CUDA_DEVICE_CUH

#include "dtype_bits.h"
#include "kernels/cuda_kernels.h"
#include "kernels/cuda_launch.cuh"
#include "kernels/formulas.h"

template <typename Item> struct item_list { Item at[CUDA_LIST]; };

/* Blocks an item is worth: some thousands of elements each; a function of its length alone. */
enum { BLOCK_ELEMENTS = 8192 };

__host__ __device__ static inline unsigned parts_for(size_t count) {
    const size_t parts = (count + BLOCK_ELEMENTS - 1) / BLOCK_ELEMENTS;
    return (unsigned)(parts < 1 ? 1 : parts > CUDA_PARTS ? CUDA_PARTS : parts);
}

typedef struct span {
    size_t begin, end;
} span;

/* The elements of `count` that are the block's that does `part`; begins are multiples of 32. None,
 * where the grid is as wide as a longer item needs it. */
__device__ static inline span block_span(size_t count, size_t part) {
    const size_t units = (count + 31) / 32, parts = parts_for(count);
    span s = {count, count};
    if (part >= parts)
        return s;
    s.begin = units * part / parts * 32;
    const size_t end = units * (part + 1) / parts * 32;
    s.end = end < count ? end : count;
    return s;
}

/* body(list, how many, the number of elements of the longest) for all items, CUDA_LIST at a time;
 * those without elements are left out. */
template <typename Item, typename Size, typename Body>
static cudaError_t in_lists(const Item *items, size_t count, Size size, Body body) {
    cudaError_t status = cudaSuccess;
    for (size_t next = 0; next < count && status == cudaSuccess;) {
        item_list<Item> list;
        unsigned used = 0;
        size_t longest = 0;
        for (; next < count && used < CUDA_LIST; next++) {
            const size_t elements = size(items[next]);
            if (!elements)
                continue;
            longest = elements > longest ? elements : longest;
            list.at[used++] = items[next];
        }
        if (used)
            status = body(list, used, longest);
    }
    return status;
}

__device__ static inline float load_element(const void *array, muonshard_dtype dtype, size_t i) {
    switch (dtype) {
    case MUONSHARD_BF16: return from_bf16(((const uint16_t *)array)[i]);
    case MUONSHARD_FP16: return from_fp16(((const uint16_t *)array)[i]);
    default: return ((const float *)array)[i];
    }
}

__device__ static inline void store_element(void *array, muonshard_dtype dtype, size_t i, float x) {
    switch (dtype) {
    case MUONSHARD_BF16: ((uint16_t *)array)[i] = to_bf16(x); break;
    case MUONSHARD_FP16: ((uint16_t *)array)[i] = to_fp16(x); break;
    default: ((float *)array)[i] = x;
    }
}

__host__ __device__ static inline muonshard_dtype stored_as(ns_dtype dtype) {
    return dtype == NS_BF16 ? MUONSHARD_BF16 : dtype == NS_FP16 ? MUONSHARD_FP16 : MUONSHARD_FP32;
}

#endif
