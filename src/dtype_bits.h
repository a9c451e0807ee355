/* dtype_bits.h - one element of a 16-bit dtype, by its bits: what dtype.c does to arrays, and GPU
 * kernels to what they hold in registers. C and CUDA alike. */
#ifndef DTYPE_BITS_H
#define DTYPE_BITS_H

#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define INLINE static __host__ __device__ __forceinline__
#else
#define INLINE static inline __attribute__((always_inline, unused))
#endif

#define DTYPE_INFINITE 0x7f800000u  /* fp32 */
#define DTYPE_QUIET    0x00400000u  /* the bit that makes a NaN quiet */
#define DTYPE_REBIAS   (112u << 23) /* from the exponents of fp32 to those of fp16 */

/* ---- one element, by its bits ---- */

INLINE uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

INLINE float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* Drops the last `drop` bits of a number that is no NaN, to nearest even: half of the last bit that
 * stays, less one unit where that bit is even, carries or doesn't. */
INLINE uint32_t nearest(uint32_t bits, int drop) {
    return (bits + (1u << (drop - 1)) - 1 + (bits >> drop & 1)) >> drop;
}

INLINE float from_bf16(uint16_t x) {
    return float_of((uint32_t)x << 16);
}

INLINE uint16_t to_bf16(float x) {
    const uint32_t bits = bits_of(x), magnitude = bits & ~(1u << 31);
    return (uint16_t)(magnitude > DTYPE_INFINITE ? (bits | DTYPE_QUIET) >> 16 : nearest(bits, 16));
}

/* A subnormal is a multiple of 2^-24. */
INLINE float from_fp16(uint16_t x) {
    const uint32_t sign = (uint32_t)(x & 0x8000) << 16, magnitude = x & 0x7fff;
    const uint32_t small = bits_of((float)(int32_t)magnitude * 0x1p-24F);
    uint32_t bits = magnitude < 0x400 ? small : (magnitude << 13) + DTYPE_REBIAS;
    bits = magnitude >= 0x7c00 ? (magnitude << 13) | DTYPE_INFINITE : bits;
    bits = magnitude > 0x7c00 ? bits | DTYPE_QUIET : bits;
    return float_of(sign | bits);
}

/* The last bit of 0.5 stands where that of fp16's subnormals does: they round as the sum does. */
INLINE uint16_t to_fp16(float x) {
    const uint32_t bits = bits_of(x), magnitude = bits & ~(1u << 31);
    const uint32_t small = bits_of(float_of(magnitude) + 0.5F) - bits_of(0.5F);
    uint32_t half = magnitude < 0x38800000u ? small : nearest(magnitude - DTYPE_REBIAS, 13);
    half = magnitude >= 0x477ff000u ? 0x7c00 : half; /* 65520 and beyond */
    half = magnitude > DTYPE_INFINITE ? 0x7e00 | (magnitude >> 13 & 0x3ff) : half;
    return (uint16_t)(bits >> 16 & 0x8000) | (uint16_t)half;
}

/* With the fraction of a step that is dropped as 32 bits after the point: up where adding `random`
 * carries. bf16 and normal fp16 drop fewer than 32. */
INLINE uint16_t to_bf16_stochastic(float x, uint32_t random) {
    const uint32_t bits = bits_of(x), magnitude = bits & ~(1u << 31);
    const uint32_t up_or_down = (bits + (random >> 16)) >> 16;
    return magnitude > 0x7f7f0000u ? to_bf16(x) : (uint16_t)up_or_down;
}

/* Below 2^-33 a fraction has bits past the 32nd, which are lost: a bias under 2^-56. */
INLINE uint16_t to_fp16_stochastic(float x, uint32_t random) {
    const uint32_t bits = bits_of(x), magnitude = bits & ~(1u << 31);
    const uint32_t sign = bits >> 16 & 0x8000;
    if (magnitude > 0x477fe000u) /* 65504 */
        return to_fp16(x);
    if (magnitude >= 0x38800000u)
        return (uint16_t)(sign | (magnitude - DTYPE_REBIAS + (random >> 19)) >> 13);
    const uint64_t steps = (uint64_t)((double)float_of(magnitude) * 0x1p56);
    return (uint16_t)(sign | (uint32_t)((steps + random) >> 32));
}

/* ---- random bits ---- */

typedef struct random_stream { /* the numbers of one tensor in one step */
    uint64_t seed;
    uint32_t step, tensor;
} random_stream;

typedef struct philox_block {
    uint32_t word[4];
} philox_block;

/* Constants and rounds: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011). */
INLINE philox_block philox(random_stream s, uint64_t counter) {
    uint32_t a = (uint32_t)counter, b = (uint32_t)(counter >> 32), c = s.step, d = s.tensor;
    uint32_t key0 = (uint32_t)s.seed, key1 = (uint32_t)(s.seed >> 32);
    for (int round = 0; round < 10; round++) {
        const uint64_t from_a = (uint64_t)a * 0xd2511f53u, from_c = (uint64_t)c * 0xcd9e8d57u;
        a = (uint32_t)(from_c >> 32) ^ b ^ key0;
        b = (uint32_t)from_c;
        c = (uint32_t)(from_a >> 32) ^ d ^ key1;
        d = (uint32_t)from_a;
        key0 += 0x9e3779b9u;
        key1 += 0xbb67ae85u;
    }
    const philox_block block = {{a, b, c, d}};
    return block;
}

#endif
