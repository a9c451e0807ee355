/* dtype.h - 16-bit numbers: how they are stored, and how fp32 is rounded to them. The same bits on
 * every machine, with or without instructions for it. */
#ifndef DTYPE_H
#define DTYPE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include "muonshard.h"

static inline size_t dtype_size(muonshard_dtype dtype) {
    return dtype == MUONSHARD_FP32 ? 4 : 2;
}
/* "fp32", "bf16", "fp16"; NULL for anything else. */
const char *dtype_name(muonshard_dtype dtype);

/* One element; to nearest even. NaN stays NaN (quiet), what is too large becomes infinite. */
float dtype_from_bf16(uint16_t x);
uint16_t dtype_to_bf16(float x);
float dtype_from_fp16(uint16_t x);
uint16_t dtype_to_fp16(float x);
/* To the 10 explicit bits of tf32, nearest even. */
float dtype_round_tf32(float x);

/* Up or down, each with the probability that makes the mean x: `random` is uniform over 32 bits.
 * Values that fit exactly stay; NaN and infinities too; beyond the largest finite number, infinite
 * as to nearest. */
uint16_t dtype_to_bf16_stochastic(float x, uint32_t random);
uint16_t dtype_to_fp16_stochastic(float x, uint32_t random);

/* 32 random bits for one element: Philox 4x32-10 (Salmon et al. 2011) with key `seed` and counter
 * {element / 4 (64 bits), step, tensor}; word element % 4. */
uint32_t dtype_random(uint64_t seed, uint32_t step, uint32_t tensor, uint64_t element);

/* Arrays; src and dst don't overlap, or are the same array of the same dtype. */
void dtype_load(float *dst, const void *src, muonshard_dtype dtype, size_t count);
void dtype_store(void *dst, muonshard_dtype dtype, const float *src, size_t count);
/* dst[0] is element `first` of `tensor`. */
void dtype_store_stochastic(void *dst, muonshard_dtype dtype, const float *src, size_t count,
                            uint64_t seed, uint32_t step, uint32_t tensor, uint64_t first);
/* x = what comes back when it is stored as bf16 or fp16. */
void dtype_round(float *x, muonshard_dtype dtype, size_t count);
/* For tests: from now on without (false) or with the processor's instructions. */
void dtype_use_instructions(bool use);

#endif
