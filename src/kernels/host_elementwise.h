/* host_elementwise.h - what the element-wise kernels of the host share. They go through arrays of
 * any dtype in blocks of fp32 that stay in the cache, with one plain loop a formula; scalars are
 * computed in fp64 and rounded once. Blocks are counted from the start of the item and no element
 * looks at another, so that bits don't depend on where an array is cut. */
#ifndef HOST_ELEMENTWISE_H
#define HOST_ELEMENTWISE_H

#include "kernels/formulas.h"
#include "kernels/host.h"

enum { HOST_BLOCK = 1024 }; /* elements */

/* A loop that is compiled for wider vectors, too, and chosen by the processor when the library is
 * loaded. Nothing contracts, so that the values are the same. For static functions only: others
 * lose their name with clang 14. */
#if defined(__x86_64__) && !defined(__SANITIZE_THREAD__) /* which is not up yet at that time */
#define HOST_WIDE __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define HOST_WIDE
#endif

/* What a pass does with elements [start, end) of an item; `start` is a multiple of HOST_BLOCK. */
typedef void host_pass(const void *job, size_t item, size_t start, size_t end);

/* pass(job, i, ...) over all of items i below `count`, each cut into a slice a thread: threads
 * touch memory in order, and do as much as each other. sizes(job, i) is the item's number of
 * elements. */
void host_slices(backend *self, host_pass *pass, size_t (*size)(const void *job, size_t item),
                 const void *job, size_t count);

/* Elements of the block at `start`. */
static inline size_t host_block(size_t start, size_t count) {
    return count - start < HOST_BLOCK ? count - start : HOST_BLOCK;
}

/* As strchr: const only where the caller's array is. */
static inline void *host_at(const void *array, muonshard_dtype dtype, size_t element) {
    return (char *)array + element * dtype_size(dtype);
}

/* Elements [start, start + n) as fp32: where they are if that is what they are, or in `block`. */
static inline const float *host_read(const void *array, muonshard_dtype dtype, size_t start,
                                     size_t n, float *block) {
    const void *at = host_at(array, dtype, start);
    if (dtype == MUONSHARD_FP32)
        return at;
    dtype_load(block, at, dtype, n);
    return block;
}

#endif
