/* hopper_emulation.h - the instructions of sm_90a as functions of the host, for the kernels of
 * clusters that cuda_hopper.cuh is made for; it includes this where nvcc doesn't compile it. What
 * each of them does is said there. What breaks a rule of theirs ends the program with a message. */
#ifndef HOPPER_EMULATION_H
#define HOPPER_EMULATION_H

#include <type_traits>

#include "cuda_emulation.h"
#include "dtype_bits.h"

#define KERNEL_OF_CLUSTER(threads)

cudaError_t emulated_clusters(cudaStream_t stream, unsigned clusters, unsigned threads,
                              size_t parameter_bytes, size_t shared_bytes,
                              std::function<void()> thread);

/* A device is given the arguments' bytes as they are: they must have the parameters' types. */
template <typename... Parameters, typename... Arguments>
static cudaError_t launch_clusters(void (*kernel)(Parameters...), unsigned clusters,
                                   unsigned threads, size_t shared_bytes, cudaStream_t stream,
                                   const Arguments &...arguments) {
    static_assert((std::is_same<Parameters, Arguments>::value && ...), "arguments of other types");
    return emulated_clusters(stream, clusters, threads, (sizeof(Parameters) + ... + 0),
                             shared_bytes, [=] { kernel(arguments...); });
}

uint32_t dynamic_shared(void);
unsigned cluster_rank(void);
void cluster_sync(void);
void named_barrier(unsigned barrier, unsigned threads);

void emulated_registers(unsigned registers);

template <unsigned Registers> static inline void give_registers(void) {
    static_assert(Registers >= 24 && Registers <= 256 && Registers % 8 == 0, "setmaxnreg");
    emulated_registers(Registers);
}

template <unsigned Registers> static inline void take_registers(void) {
    give_registers<Registers>();
}

/* Threads of a warp go their own ways here. */
static inline void warp_sync(void) {
}

void store_shared_half(uint32_t at, uint16_t x);

void barrier_init(uint32_t barrier, unsigned arrivals);
void barrier_init_done(void);
void barrier_expect(uint32_t barrier, unsigned bytes);
void barrier_arrive_at(uint32_t barrier, unsigned block);
void barrier_wait(uint32_t barrier, unsigned parity);

void tma_prefetch(const CUtensorMap *map);
void tma_load(uint32_t dst, const CUtensorMap *map, uint32_t barrier, int x, int y, int z);
void tma_load_to_all(uint32_t dst, const CUtensorMap *map, uint32_t barrier, int x, int y, int z);
void tma_store(const CUtensorMap *map, uint32_t src, int x, int y, int z);
void tma_commit(void);
void fence_for_tma(void);

void emulated_tma_wait(unsigned left, bool complete);

template <unsigned Left> static inline void tma_wait_read(void) {
    emulated_tma_wait(Left, false);
}

static inline void tma_wait(void) {
    emulated_tma_wait(0, true);
}

void emulated_fragments(uint32_t at, const uint32_t (&f)[4], bool turned);

static inline void store_fragments(uint32_t at, const uint32_t (&f)[4]) {
    emulated_fragments(at, f, false);
}

static inline void store_fragments_turned(uint32_t at, const uint32_t (&f)[4]) {
    emulated_fragments(at, f, true);
}

/* What a product is, but for its operands: of which type, which of them are turned, how many
 * columns b has. */
struct product_form {
    bool bf16, a_turned, b_turned;
    unsigned columns;
};

void wgmma_fence(void);
void wgmma_commit(void);
void emulated_wgmma(float *d, uint64_t a, uint64_t b, bool adds, product_form form);
void emulated_wgmma_wait(unsigned left);

template <unsigned Left> static inline void wgmma_wait(void) {
    static_assert(Left < 8, "wgmma.wait_group");
    emulated_wgmma_wait(Left);
}

template <unsigned Count> static inline void hold(float (&)[Count]) {
}

template <bool Bf16, bool ATurned, bool BTurned>
static inline void wgmma(float (&d)[64], uint64_t a, uint64_t b, bool adds) {
    emulated_wgmma(d, a, b, adds, {Bf16, ATurned, BTurned, 128});
}

template <bool Bf16, bool ATurned, bool BTurned>
static inline void wgmma(float (&d)[128], uint64_t a, uint64_t b, bool adds) {
    emulated_wgmma(d, a, b, adds, {Bf16, ATurned, BTurned, 256});
}

void store_release(unsigned *to, unsigned x);
unsigned load_acquire(const unsigned *from);

static inline void fence_device(void) {
}

static inline float load_from_device(const float *from) {
    return *from;
}

template <bool Bf16> static inline uint32_t pack_two(float first, float second) {
    return Bf16 ? to_bf16(first) | (uint32_t)to_bf16(second) << 16
                : to_fp16(first) | (uint32_t)to_fp16(second) << 16;
}

template <bool Bf16> static inline float unpack_half(uint16_t half) {
    return Bf16 ? from_bf16(half) : from_fp16(half);
}

#endif
