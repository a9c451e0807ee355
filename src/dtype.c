/* Rounding is arithmetic on the bits of fp32, so that neither the vector width nor a processor that
 * flushes subnormals has a say. The processor's own conversions are taken where they give the same
 * bits: F16C does; AVX-512's to bf16 loses subnormals and is left alone. */
#include "dtype.h"

#include <stdatomic.h>
#include <string.h>

#include "dtype_bits.h"

const char *dtype_name(muonshard_dtype dtype) {
    switch (dtype) {
    case MUONSHARD_FP32: return "fp32";
    case MUONSHARD_BF16: return "bf16";
    case MUONSHARD_FP16: return "fp16";
    case MUONSHARD_DTYPE_OF_PARAM: break;
    }
    return NULL;
}

float dtype_from_bf16(uint16_t x) {
    return from_bf16(x);
}

uint16_t dtype_to_bf16(float x) {
    return to_bf16(x);
}

float dtype_from_fp16(uint16_t x) {
    return from_fp16(x);
}

uint16_t dtype_to_fp16(float x) {
    return to_fp16(x);
}

float dtype_round_tf32(float x) {
    const uint32_t bits = bits_of(x), magnitude = bits & ~(1u << 31);
    return float_of(magnitude > DTYPE_INFINITE ? bits | DTYPE_QUIET : nearest(bits, 13) << 13);
}

uint16_t dtype_to_bf16_stochastic(float x, uint32_t random) {
    return to_bf16_stochastic(x, random);
}

uint16_t dtype_to_fp16_stochastic(float x, uint32_t random) {
    return to_fp16_stochastic(x, random);
}

uint32_t dtype_random(uint64_t seed, uint32_t step, uint32_t tensor, uint64_t element) {
    return philox((random_stream){seed, step, tensor}, element / 4).word[element % 4];
}

/* ---- arrays: each loop is compiled for the baseline, and again for more instructions ---- */

INLINE void load_bf16(float *restrict dst, const uint16_t *restrict src, size_t count) {
    for (size_t i = 0; i < count; i++)
        dst[i] = from_bf16(src[i]);
}

INLINE void load_fp16(float *restrict dst, const uint16_t *restrict src, size_t count) {
    for (size_t i = 0; i < count; i++)
        dst[i] = from_fp16(src[i]);
}

INLINE void store_bf16(uint16_t *restrict dst, const float *restrict src, size_t count) {
    for (size_t i = 0; i < count; i++)
        dst[i] = to_bf16(src[i]);
}

INLINE void store_fp16(uint16_t *restrict dst, const float *restrict src, size_t count) {
    for (size_t i = 0; i < count; i++)
        dst[i] = to_fp16(src[i]);
}

INLINE void round_bf16(float *x, size_t count) {
    for (size_t i = 0; i < count; i++)
        x[i] = from_bf16(to_bf16(x[i]));
}

INLINE void round_fp16(float *x, size_t count) {
    for (size_t i = 0; i < count; i++)
        x[i] = from_fp16(to_fp16(x[i]));
}

#define STOCHASTIC_BLOCK 64 /* elements; their random bits are made at once */

INLINE void store_stochastic(uint16_t *restrict dst, muonshard_dtype dtype,
                             const float *restrict src, size_t count, random_stream s,
                             uint64_t first) {
    uint32_t random[STOCHASTIC_BLOCK];
    for (size_t i = 0; i < count;) {
        const uint64_t counter = (first + i) / 4;
        for (uint64_t k = 0; k < STOCHASTIC_BLOCK / 4; k++) {
            const philox_block block = philox(s, counter + k);
            for (int w = 0; w < 4; w++)
                random[4 * k + (uint64_t)w] = block.word[w];
        }
        if (dtype == MUONSHARD_BF16)
            for (size_t k = (first + i) % 4; k < STOCHASTIC_BLOCK && i < count; k++, i++)
                dst[i] = to_bf16_stochastic(src[i], random[k]);
        else
            for (size_t k = (first + i) % 4; k < STOCHASTIC_BLOCK && i < count; k++, i++)
                dst[i] = to_fp16_stochastic(src[i], random[k]);
    }
}

typedef struct conversions {
    void (*load_bf16)(float *dst, const uint16_t *src, size_t count);
    void (*load_fp16)(float *dst, const uint16_t *src, size_t count);
    void (*store_bf16)(uint16_t *dst, const float *src, size_t count);
    void (*store_fp16)(uint16_t *dst, const float *src, size_t count);
    void (*round_bf16)(float *x, size_t count);
    void (*round_fp16)(float *x, size_t count);
    void (*store_stochastic)(uint16_t *dst, muonshard_dtype dtype, const float *src, size_t count,
                             random_stream s, uint64_t first);
} conversions;

static const conversions software = {load_bf16,  load_fp16,  store_bf16,      store_fp16,
                                     round_bf16, round_fp16, store_stochastic};

#ifdef __x86_64__

#include <cpuid.h>
#include <immintrin.h>

#define AVX2 __attribute__((target("avx2,f16c")))

AVX2 static void avx2_load_bf16(float *dst, const uint16_t *src, size_t count) {
    load_bf16(dst, src, count);
}

AVX2 static void avx2_load_fp16(float *dst, const uint16_t *src, size_t count) {
    size_t i = 0;
    for (; i + 8 <= count; i += 8)
        _mm256_storeu_ps(
            dst + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)(src + i))));
    load_fp16(dst + i, src + i, count - i);
}

AVX2 static void avx2_store_bf16(uint16_t *dst, const float *src, size_t count) {
    store_bf16(dst, src, count);
}

AVX2 static void avx2_store_fp16(uint16_t *dst, const float *src, size_t count) {
    size_t i = 0;
    for (; i + 8 <= count; i += 8)
        _mm_storeu_si128((__m128i *)(void *)(dst + i),
                         _mm256_cvtps_ph(_mm256_loadu_ps(src + i), _MM_FROUND_TO_NEAREST_INT));
    store_fp16(dst + i, src + i, count - i);
}

AVX2 static void avx2_round_bf16(float *x, size_t count) {
    round_bf16(x, count);
}

AVX2 static void avx2_round_fp16(float *x, size_t count) {
    size_t i = 0;
    for (; i + 8 <= count; i += 8)
        _mm256_storeu_ps(x + i, _mm256_cvtph_ps(_mm256_cvtps_ph(_mm256_loadu_ps(x + i),
                                                                _MM_FROUND_TO_NEAREST_INT)));
    round_fp16(x + i, count - i);
}

AVX2 static void avx2_store_stochastic(uint16_t *dst, muonshard_dtype dtype, const float *src,
                                       size_t count, random_stream s, uint64_t first) {
    store_stochastic(dst, dtype, src, count, s, first);
}

static const conversions avx2 = {avx2_load_bf16,       avx2_load_fp16,  avx2_store_bf16,
                                 avx2_store_fp16,      avx2_round_bf16, avx2_round_fp16,
                                 avx2_store_stochastic};

/* F16C by cpuid itself: not every compiler's builtin knows the name. */
static const conversions *best(void) {
    unsigned a, b, c = 0, d;
    const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
    return f16c && __builtin_cpu_supports("avx2") ? &avx2 : &software;
}

#else

static const conversions *best(void) {
    return &software;
}

#endif

/* The one thing kept outside handles: which processor this is, or what a test has asked for. Both
 * ways give the same bits. */
static const conversions *_Atomic chosen;

static const conversions *conversions_here(void) {
    const conversions *here = atomic_load_explicit(&chosen, memory_order_relaxed);
    if (!here) {
        here = best();
        atomic_store_explicit(&chosen, here, memory_order_relaxed);
    }
    return here;
}

void dtype_use_instructions(bool use) {
    atomic_store_explicit(&chosen, use ? best() : &software, memory_order_relaxed);
}

void dtype_load(float *dst, const void *src, muonshard_dtype dtype, size_t count) {
    if (dtype == MUONSHARD_BF16)
        conversions_here()->load_bf16(dst, src, count);
    else if (dtype == MUONSHARD_FP16)
        conversions_here()->load_fp16(dst, src, count);
    else if (dst != src && count)
        memcpy(dst, src, count * sizeof *dst);
}

void dtype_store(void *dst, muonshard_dtype dtype, const float *src, size_t count) {
    if (dtype == MUONSHARD_BF16)
        conversions_here()->store_bf16(dst, src, count);
    else if (dtype == MUONSHARD_FP16)
        conversions_here()->store_fp16(dst, src, count);
    else if (dst != src && count)
        memcpy(dst, src, count * sizeof *src);
}

void dtype_store_stochastic(void *dst, muonshard_dtype dtype, const float *src, size_t count,
                            uint64_t seed, uint32_t step, uint32_t tensor, uint64_t first) {
    if (dtype == MUONSHARD_FP32)
        dtype_store(dst, dtype, src, count);
    else
        conversions_here()->store_stochastic(dst, dtype, src, count,
                                             (random_stream){seed, step, tensor}, first);
}

void dtype_round(float *x, muonshard_dtype dtype, size_t count) {
    if (dtype == MUONSHARD_BF16)
        conversions_here()->round_bf16(x, count);
    else if (dtype == MUONSHARD_FP16)
        conversions_here()->round_fp16(x, count);
}
