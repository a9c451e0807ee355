/* cuda_vector.cuh - passes over arrays, four neighbouring elements at a time: 16 bytes of fp32 or 8
 * of a 16-bit dtype are one access. Fours are counted from the start of an item and not by address,
 * so that which thread has which, and with it the order of a sum, depends on lengths alone; where
 * an array isn't aligned to its fours, and at the end of an item, they are accessed one by one. */
#ifndef CUDA_VECTOR_CUH
#define CUDA_VECTOR_CUH

#include "kernels/cuda_device.cuh"

/* Not eight: neighbouring threads then touch neighbouring 16 bytes of what is fp32, and each access
 * of a warp is of whole sectors. Four is also what one call of philox gives. */
enum { QUAD = 4 };

/* Elements [at, at + count) of arrays, count <= QUAD. */
typedef struct piece {
    size_t at;
    unsigned count;
    bool whole; /* four, aligned: one access */
} piece;

/* Four elements: as they are stored, in 16 bits two a word; and as fp32. */
typedef struct quad_bits {
    uint32_t word[QUAD];
} quad_bits;

typedef struct quad {
    float x[QUAD];
} quad;

__device__ static inline bool is_aligned(const void *array, muonshard_dtype dtype) {
    return (uintptr_t)array % (dtype == MUONSHARD_FP32 ? 16 : 8) == 0;
}

/* One of the four, in the low bits. */
__device__ static inline uint32_t one_of(quad_bits b, muonshard_dtype dtype, unsigned j) {
    return dtype == MUONSHARD_FP32 ? b.word[j] : b.word[j / 2] >> 16 * (j % 2) & 0xffff;
}

/* Into bits that are zero there. */
__device__ static inline void put_one(quad_bits *b, muonshard_dtype dtype, unsigned j,
                                      uint32_t bits) {
    if (dtype == MUONSHARD_FP32)
        b->word[j] = bits;
    else
        b->word[j / 2] |= bits << 16 * (j % 2);
}

/* ---- memory ---- */

/* body(known) with known.dtype a constant, for what is stored. Of what is loaded the dtype may be
 * known at run time only: that makes two loads, of which one is carried out, and no wait. */
template <muonshard_dtype Dtype> struct known_dtype {
    static constexpr muonshard_dtype dtype = Dtype;
};

template <typename Body>
__device__ static inline void with_dtype(muonshard_dtype dtype, Body body) {
    switch (dtype) {
    case MUONSHARD_BF16: body(known_dtype<MUONSHARD_BF16>()); break;
    case MUONSHARD_FP16: body(known_dtype<MUONSHARD_FP16>()); break;
    default: body(known_dtype<MUONSHARD_FP32>());
    }
}

__device__ static inline quad_bits load_bits(const void *array, muonshard_dtype dtype, piece p) {
    quad_bits b = {};
    if (dtype == MUONSHARD_FP32) {
        const uint32_t *from = (const uint32_t *)array + p.at;
        if (p.whole) {
            const uint4 v = load_wide<uint4>(from);
            return {{v.x, v.y, v.z, v.w}};
        }
#pragma unroll
        for (unsigned j = 0; j < QUAD; j++)
            if (j < p.count)
                put_one(&b, dtype, j, from[j]);
    } else {
        const uint16_t *from = (const uint16_t *)array + p.at;
        if (p.whole) {
            const uint2 v = load_wide<uint2>(from);
            return {{v.x, v.y}};
        }
#pragma unroll
        for (unsigned j = 0; j < QUAD; j++)
            if (j < p.count)
                put_one(&b, dtype, j, from[j]);
    }
    return b;
}

__device__ static inline void store_bits(void *array, muonshard_dtype dtype, piece p, quad_bits b) {
    if (dtype == MUONSHARD_FP32) {
        uint32_t *to = (uint32_t *)array + p.at;
        if (p.whole) {
            store_wide((uint4 *)to, uint4{b.word[0], b.word[1], b.word[2], b.word[3]});
            return;
        }
#pragma unroll
        for (unsigned j = 0; j < QUAD; j++)
            if (j < p.count)
                to[j] = one_of(b, dtype, j);
    } else {
        uint16_t *to = (uint16_t *)array + p.at;
        if (p.whole) {
            store_wide((uint2 *)to, uint2{b.word[0], b.word[1]});
            return;
        }
#pragma unroll
        for (unsigned j = 0; j < QUAD; j++)
            if (j < p.count)
                to[j] = (uint16_t)one_of(b, dtype, j);
    }
}

/* ---- fp32 and what is stored ---- */

template <typename From> __device__ static inline quad unpack_halves(quad_bits b, From from) {
    quad q;
#pragma unroll
    for (unsigned j = 0; j < QUAD; j++)
        q.x[j] = from((uint16_t)one_of(b, MUONSHARD_BF16, j));
    return q;
}

/* to(x, j) */
template <typename To> __device__ static inline quad_bits pack_halves(quad q, To to) {
    quad_bits b = {};
#pragma unroll
    for (unsigned j = 0; j < QUAD; j++)
        put_one(&b, MUONSHARD_BF16, j, to(q.x[j], j));
    return b;
}

__device__ static inline quad_bits bits_of(quad q) {
    return {{bits_of(q.x[0]), bits_of(q.x[1]), bits_of(q.x[2]), bits_of(q.x[3])}};
}

__device__ static inline quad unpack(quad_bits b, muonshard_dtype dtype) {
    switch (dtype) {
    case MUONSHARD_BF16: return unpack_halves(b, [](uint16_t x) { return from_bf16(x); });
    case MUONSHARD_FP16: return unpack_halves(b, [](uint16_t x) { return from_fp16(x); });
    default:
        return {
            {float_of(b.word[0]), float_of(b.word[1]), float_of(b.word[2]), float_of(b.word[3])}};
    }
}

__device__ static inline quad_bits pack(quad q, muonshard_dtype dtype) {
    switch (dtype) {
    case MUONSHARD_BF16: return pack_halves(q, [](float x, unsigned) { return to_bf16(x); });
    case MUONSHARD_FP16: return pack_halves(q, [](float x, unsigned) { return to_fp16(x); });
    default: return bits_of(q);
    }
}

/* dtype_random of four elements from `element` on: one call where they are a block of philox. */
__device__ static inline philox_block random_quad(random_stream s, size_t element) {
    philox_block b = philox(s, element / QUAD);
    if (element % QUAD == 0)
        return b;
    philox_block next = philox(s, element / QUAD + 1);
    for (size_t skip = element % QUAD; skip > 0; skip--) {
        b = {{b.word[1], b.word[2], b.word[3], next.word[0]}};
        next = {{next.word[1], next.word[2], next.word[3], 0}};
    }
    return b;
}

__device__ static inline random_stream stream_for(const kernel_context *c, int tensor) {
    return {c->seed, (uint32_t)c->record->count, (uint32_t)tensor};
}

/* As dtype_store_stochastic: elements from `element` on of the tensor that `s` is for. */
__device__ static inline quad_bits pack_stochastic(quad q, muonshard_dtype dtype, random_stream s,
                                                   size_t element) {
    if (dtype == MUONSHARD_FP32)
        return bits_of(q);
    const philox_block random = random_quad(s, element);
    if (dtype == MUONSHARD_BF16)
        return pack_halves(
            q, [&](float x, unsigned j) { return to_bf16_stochastic(x, random.word[j]); });
    return pack_halves(q,
                       [&](float x, unsigned j) { return to_fp16_stochastic(x, random.word[j]); });
}

/* ---- passes ---- */

/* use(piece, load(piece)) for all elements of a span, the fours of a block one a thread in turns;
 * `Depth` loads a thread are under way before the first is used. `aligned`: all arrays are. */
template <unsigned Depth, typename Load, typename Use>
__device__ static inline void for_each_quad(span s, bool aligned, Load load, Use use) {
    const size_t step = (size_t)QUAD * blockDim.x;
    size_t i = s.begin + (size_t)QUAD * threadIdx.x;
    for (; aligned && i + (Depth - 1) * step + QUAD <= s.end; i += Depth * step) {
        decltype(load(piece())) got[Depth];
#pragma unroll
        for (unsigned k = 0; k < Depth; k++)
            got[k] = load(piece{i + k * step, QUAD, true});
#pragma unroll
        for (unsigned k = 0; k < Depth; k++)
            use(piece{i + k * step, QUAD, true}, got[k]);
    }
#pragma unroll 1
    for (; i < s.end; i += step) {
        const size_t left = s.end - i;
        const piece p = {i, left < QUAD ? (unsigned)left : QUAD, aligned && left >= QUAD};
        use(p, load(p));
    }
}

/* Where an element of a matrix is. */
typedef struct place_in {
    size_t row, col;
    unsigned left; /* elements from here to the end of the row, at most QUAD */
} place_in;

__device__ static inline place_in place_of(size_t i, size_t cols) {
    const size_t row = i / cols, col = i - row * cols, left = cols - col;
    return {row, col, left < QUAD ? (unsigned)left : QUAD};
}

/* On to the element behind it, without a division; true where that begins a row. For pieces: QUAD
 * steps at most. */
__device__ static inline bool next_place(place_in *at, size_t cols) {
    at->col++;
    if (--at->left)
        return false;
    *at = {at->row + 1, 0, cols < QUAD ? (unsigned)cols : QUAD};
    return true;
}

#endif
