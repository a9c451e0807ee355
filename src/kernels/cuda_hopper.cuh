/* cuda_hopper.cuh - the instructions of sm_90a that products are made of, one function each: copies
 * of boxes of an array by the tensor memory accelerator (TMA), barriers in shared memory that count
 * threads and bytes, products by the tensor cores of a group of four warps (wgmma), and what orders
 * them. Names are the PTX ISA's where it has one. Shared memory is addressed by 32 bits, as PTX
 * does. A build without nvcc (the tests') has functions of the host in their place. */
#ifndef CUDA_HOPPER_CUH
#define CUDA_HOPPER_CUH

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <stdint.h>

/* Threads of a warp group, blocks of a cluster. */
enum { GROUP = 128, CLUSTER = 2 };

#ifdef __CUDACC__

#define KERNEL_OF_CLUSTER(threads) __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(threads, 1)

/* Asks for dynamic shared memory as well; `kernel` is one of KERNEL_OF_CLUSTER. */
template <typename... Parameters, typename... Arguments>
static cudaError_t launch_clusters(void (*kernel)(Parameters...), unsigned clusters,
                                   unsigned threads, size_t shared_bytes, cudaStream_t stream,
                                   const Arguments &...arguments) {
    void *list[] = {(void *)&arguments...};
    const cudaError_t status = cudaFuncSetAttribute(
        (const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared_bytes);
    return status ? status
                  : cudaLaunchKernel((const void *)kernel, dim3(CLUSTER * clusters), dim3(threads),
                                     list, shared_bytes, stream);
}

/* ---- threads, blocks, shared memory ---- */

/* The block's dynamic shared memory, from a multiple of 1024 on. */
__device__ static inline uint32_t dynamic_shared(void) {
    extern __shared__ __align__(1024) char dynamic_memory[];
    return (uint32_t)__cvta_generic_to_shared(dynamic_memory);
}

__device__ static inline unsigned cluster_rank(void) {
    unsigned rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

/* All threads of both blocks. */
__device__ static inline void cluster_sync(void) {
    asm volatile("barrier.cluster.arrive.release.aligned;\n"
                 "barrier.cluster.wait.acquire.aligned;" ::
                     : "memory");
}

/* `threads` threads of the block that name the same barrier, 1 to 15. */
__device__ static inline void named_barrier(unsigned barrier, unsigned threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

/* How many registers the warps of a group have from here on. */
template <unsigned Registers> __device__ static inline void give_registers(void) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}

template <unsigned Registers> __device__ static inline void take_registers(void) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}

__device__ static inline void store_shared_half(uint32_t at, uint16_t x) {
    asm volatile("st.shared.b16 [%0], %1;" ::"r"(at), "h"(x) : "memory");
}

/* A warp whose threads went different ways. */
__device__ static inline void warp_sync(void) {
    __syncwarp();
}

/* ---- barriers in shared memory (mbarrier), 8 bytes each ---- */

__device__ static inline void barrier_init(uint32_t barrier, unsigned arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals)
                 : "memory");
}

/* After all inits, before cluster_sync. */
__device__ static inline void barrier_init_done(void) {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

/* Arrives; the phase ends when all have and `bytes` more have come. */
__device__ static inline void barrier_expect(uint32_t barrier, unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}

/* Arrives at the barrier that `block` of the cluster has at the same address. Said to be of cluster
 * scope, an arrival would be a fence of the whole device's memory, and a wait would empty the
 * first-level cache; what is handed over here is shared memory that only TMA writes and wgmma
 * reads. */
__device__ static inline void barrier_arrive_at(uint32_t barrier, unsigned block) {
    asm volatile("{\n"
                 ".reg .b32 remote;\n"
                 "mapa.shared::cluster.u32 remote, %0, %1;\n"
                 "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
                 "}" ::"r"(barrier),
                 "r"(block)
                 : "memory");
}

/* Until the phase of this parity has ended. */
__device__ static inline void barrier_wait(uint32_t barrier, unsigned parity) {
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again;\n"
                 "}" ::"r"(barrier),
                 "r"(parity)
                 : "memory");
}

/* ---- TMA: boxes of a three-dimensional array, innermost coordinate first ---- */

__device__ static inline void tma_prefetch(const CUtensorMap *map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

/* To `dst` here; its bytes are counted by `barrier`. Elements outside of the array are zero. */
__device__ static inline void tma_load(uint32_t dst, const CUtensorMap *map, uint32_t barrier,
                                       int x, int y, int z) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
                 " [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(dst),
                 "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z)
                 : "memory");
}

/* To this address, and for the barrier of this address, in all blocks of the cluster. */
__device__ static inline void tma_load_to_all(uint32_t dst, const CUtensorMap *map,
                                              uint32_t barrier, int x, int y, int z) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
                 ".multicast::cluster [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(dst),
                 "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z), "h"((uint16_t)((1 << CLUSTER) - 1))
                 : "memory");
}

/* Elements outside of the array are not written. In the group that is committed next. */
__device__ static inline void tma_store(const CUtensorMap *map, uint32_t src, int x, int y, int z) {
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group"
                 " [%0, {%2, %3, %4}], [%1];" ::"l"(map),
                 "r"(src), "r"(x), "r"(y), "r"(z)
                 : "memory");
}

__device__ static inline void tma_commit(void) {
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

/* Until all but the latest `Left` groups of this thread have read their source. */
template <unsigned Left> __device__ static inline void tma_wait_read(void) {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(Left) : "memory");
}

/* Until all of them are complete. */
__device__ static inline void tma_wait(void) {
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

/* What this thread has written to shared memory is seen by TMA after it. */
__device__ static inline void fence_for_tma(void) {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/* ---- fragments: of 8 x 8 elements of 16 bits, a thread has two of row lane / 4, from column
 * 2 (lane % 4) on, one in each half of a word ---- */

/* Four fragments: the rows of fragment i go to the 16 bytes that lanes 8 i to 8 i + 7 name. */
__device__ static inline void store_fragments(uint32_t at, const uint32_t (&f)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at),
                 "r"(f[0]), "r"(f[1]), "r"(f[2]), "r"(f[3])
                 : "memory");
}

/* Their columns go there. */
__device__ static inline void store_fragments_turned(uint32_t at, const uint32_t (&f)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at),
                 "r"(f[0]), "r"(f[1]), "r"(f[2]), "r"(f[3])
                 : "memory");
}

/* ---- wgmma ---- */

/* Registers that products add to were written by other instructions before. */
__device__ static inline void wgmma_fence(void) {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ static inline void wgmma_commit(void) {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

/* Until all but the latest `Left` groups are complete. */
template <unsigned Left> __device__ static inline void wgmma_wait(void) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Left) : "memory");
}

/* The compiler may not move what is done with sums across it. */
template <unsigned Count> __device__ static inline void hold(float (&sums)[Count]) {
#pragma unroll
    for (unsigned i = 0; i < Count; i++)
        asm volatile("" : "+f"(sums[i])::"memory");
}

#define SUMS_4(i)  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SUMS_16(i) SUMS_4(i), SUMS_4(i + 4), SUMS_4(i + 8), SUMS_4(i + 12)
#define SUMS_64(i) SUMS_16(i), SUMS_16(i + 16), SUMS_16(i + 32), SUMS_16(i + 48)
/* clang-format off */
#define NAMES_64                                                                                   \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                       \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "             \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "             \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NAMES_128                                                                                  \
    NAMES_64 ", "                                                                                  \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "             \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
/* clang-format on */
#define WGMMA(shape, type, names, sums, a_at, b_at, adds_at, a_turned_at, b_turned_at)             \
    asm volatile("{\n"                                                                             \
                 ".reg .pred adds;\n"                                                              \
                 "setp.ne.b32 adds, %" adds_at ", 0;\n"                                            \
                 "wgmma.mma_async.sync.aligned." shape ".f32." type "." type " {" names            \
                 "}, %" a_at ", %" b_at ", adds, 1, 1, %" a_turned_at ", %" b_turned_at ";\n"      \
                 "}"                                                                               \
                 : sums                                                                            \
                 : "l"(a), "l"(b), "r"((int)adds), "n"((int)ATurned), "n"((int)BTurned))

/* d [64, 128] (or [64, 256], below), as fragments side by side, (+)= a [64, 16] b^T [., 16].
 * Operands are named by descriptors; turned ones lie along their rows or columns and not along the
 * depth. */
template <bool Bf16, bool ATurned, bool BTurned>
__device__ static inline void wgmma(float (&d)[64], uint64_t a, uint64_t b, bool adds) {
    if (Bf16)
        WGMMA("m64n128k16", "bf16", NAMES_64, SUMS_64(0), "64", "65", "66", "67", "68");
    else
        WGMMA("m64n128k16", "f16", NAMES_64, SUMS_64(0), "64", "65", "66", "67", "68");
}

template <bool Bf16, bool ATurned, bool BTurned>
__device__ static inline void wgmma(float (&d)[128], uint64_t a, uint64_t b, bool adds) {
#define SUMS_128 SUMS_64(0), SUMS_64(64)
    if (Bf16)
        WGMMA("m64n256k16", "bf16", NAMES_128, SUMS_128, "128", "129", "130", "131", "132");
    else
        WGMMA("m64n256k16", "f16", NAMES_128, SUMS_128, "128", "129", "130", "131", "132");
#undef SUMS_128
}

/* ---- memory of the device ---- */

__device__ static inline void store_release(unsigned *to, unsigned x) {
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(x) : "memory");
}

__device__ static inline unsigned load_acquire(const unsigned *from) {
    unsigned x;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(from) : "memory");
    return x;
}

/* What this thread has written is seen by all of the device before what it writes after. */
__device__ static inline void fence_device(void) {
    __threadfence();
}

/* What other blocks have written: not from a cache of this one. */
__device__ static inline float load_from_device(const float *from) {
    return __ldcg(from);
}

/* ---- numbers of 16 bits, two a word, the first in the low half ---- */

template <bool Bf16> __device__ static inline uint32_t pack_two(float first, float second) {
    uint32_t word;
    if (Bf16)
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
    else
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
    return word;
}

template <bool Bf16> __device__ static inline float unpack_half(uint16_t half) {
    float x;
    if (Bf16)
        return __uint_as_float((uint32_t)half << 16);
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(half));
    return x;
}

#else
#include "hopper_emulation.h"
#endif

#endif
