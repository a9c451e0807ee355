#include "kernels/host_tile.h"

#include <math.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

/* ---- what every machine has ---- */

enum { PORTABLE_ROWS = 4, PORTABLE_PANEL = 8 };

static inline float multiply_add(float a, float b, float c) {
#if defined(FP_FAST_FMAF)
    return fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

static void multiply_portable(size_t depth, const void *a_panel, const void *b_panel, int vectors,
                              float *tile) {
    const float *a = a_panel, *b = b_panel;
    float sum[PORTABLE_ROWS][PORTABLE_PANEL];
    (void)vectors;
    for (int r = 0; r < PORTABLE_ROWS; r++)
        for (int j = 0; j < PORTABLE_PANEL; j++)
            sum[r][j] = tile[r * PORTABLE_PANEL + j];
    for (size_t k = 0; k < depth; k++, a += PORTABLE_PANEL, b += PORTABLE_PANEL)
        for (int r = 0; r < PORTABLE_ROWS; r++)
            for (int j = 0; j < PORTABLE_PANEL; j++)
                sum[r][j] = multiply_add(a[r], b[j], sum[r][j]);
    for (int r = 0; r < PORTABLE_ROWS; r++)
        for (int j = 0; j < PORTABLE_PANEL; j++)
            tile[r * PORTABLE_PANEL + j] = sum[r][j];
}

/* ---- around the products ---- */

typedef uint32_t four __attribute__((vector_size(16), aligned(4), may_alias));
typedef uint32_t eight __attribute__((vector_size(32), aligned(4), may_alias));

/* out [4, out_stride] = transpose of in [4, in_stride] */
static inline void turn_four(uint32_t *out, size_t out_stride, const uint32_t *in,
                             size_t in_stride) {
    const four a = *(const four *)in, b = *(const four *)(in + in_stride),
               c = *(const four *)(in + 2 * in_stride), d = *(const four *)(in + 3 * in_stride);
    const four ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5),
               ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7),
               cd_low = __builtin_shufflevector(c, d, 0, 4, 1, 5),
               cd_high = __builtin_shufflevector(c, d, 2, 6, 3, 7);
    *(four *)out = __builtin_shufflevector(ab_low, cd_low, 0, 1, 4, 5);
    *(four *)(out + out_stride) = __builtin_shufflevector(ab_low, cd_low, 2, 3, 6, 7);
    *(four *)(out + 2 * out_stride) = __builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5);
    *(four *)(out + 3 * out_stride) = __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7);
}

/* Pairs of elements, pairs of pairs, halves. */
__attribute__((always_inline)) static inline void turn_eight(uint32_t *out, size_t out_stride,
                                                             const uint32_t *in, size_t in_stride) {
    eight row[8], pair[8], quad[8];
    _Pragma("GCC unroll 8") for (size_t i = 0; i < 8; i++) row[i] =
        *(const eight *)(in + i * in_stride);
    _Pragma("GCC unroll 4") for (size_t i = 0; i < 8; i += 2) {
        pair[i] = __builtin_shufflevector(row[i], row[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        pair[i + 1] = __builtin_shufflevector(row[i], row[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    _Pragma("GCC unroll 4") for (size_t i = 0; i < 4; i++) {
        const eight x = pair[i / 2 * 4 + i % 2], y = pair[i / 2 * 4 + i % 2 + 2];
        quad[i / 2 * 4 + i % 2 * 2] = __builtin_shufflevector(x, y, 0, 1, 8, 9, 4, 5, 12, 13);
        quad[i / 2 * 4 + i % 2 * 2 + 1] = __builtin_shufflevector(x, y, 2, 3, 10, 11, 6, 7, 14, 15);
    }
    _Pragma("GCC unroll 4") for (size_t i = 0; i < 4; i++) {
        *(eight *)(out + i * out_stride) =
            __builtin_shufflevector(quad[i], quad[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        *(eight *)(out + (i + 4) * out_stride) =
            __builtin_shufflevector(quad[i], quad[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
}

/* `side` is 4 or 8, and constant where it is called. */
__attribute__((always_inline)) static inline void turn_blocks(uint32_t *out, size_t out_stride,
                                                              const uint32_t *in, size_t in_stride,
                                                              size_t rows, size_t cols,
                                                              const size_t side) {
    const size_t whole_rows = rows - rows % side, whole_cols = cols - cols % side;
    for (size_t i = 0; i < whole_rows; i += side)
        for (size_t j = 0; j < whole_cols; j += side)
            if (side == 8)
                turn_eight(out + j * out_stride + i, out_stride, in + i * in_stride + j, in_stride);
            else
                turn_four(out + j * out_stride + i, out_stride, in + i * in_stride + j, in_stride);
    for (size_t i = 0; i < rows; i++)
        for (size_t j = i < whole_rows ? whole_cols : 0; j < cols; j++)
            out[j * out_stride + i] = in[i * in_stride + j];
}

/* To nearest even; NaN stays one, quiet. */
static inline uint32_t bf16_bits(uint32_t x) {
    const uint32_t rounded = x + 0x7fffU + (x >> 16 & 1U), quiet = x | 0x00400000U;
    return ((x & 0x7fffffffU) > 0x7f800000U ? quiet : rounded) & 0xffff0000U;
}

typedef union bits {
    float value;
    uint32_t bits;
} bits;

__attribute__((always_inline)) static inline void
store(float *out, const float *sum, const float *c, size_t count, tile_scale s) {
    if (c)
        for (size_t i = 0; i < count; i++)
            out[i] = s.alpha * sum[i] + s.beta * c[i];
    else if (s.alpha != 1.0F || out != sum)
        for (size_t i = 0; i < count; i++)
            out[i] = s.alpha * sum[i];
    for (size_t i = 0; s.bf16 && i < count; i++)
        out[i] = (bits){.bits = bf16_bits((bits){.value = out[i]}.bits)}.value;
}

static void store_portable(float *out, const float *sum, const float *c, size_t count,
                           tile_scale s) {
    store(out, sum, c, count, s);
}

static void turn_portable(uint32_t *out, size_t out_stride, const uint32_t *in, size_t in_stride,
                          size_t rows, size_t cols) {
    turn_blocks(out, out_stride, in, in_stride, rows, cols, 4);
}

#if defined(__x86_64__)

/* One body a vector type; the number of vectors is constant where it is called, for the sums to
 * stay in registers. */
#define MULTIPLY(NAME, TARGET, VECTOR, ROWS, PANEL, LANES, GROUP, LOAD, STORE, SPREAD,             \
                 MULTIPLY_ADD, OPERAND)                                                            \
    __attribute__((target(TARGET), always_inline)) static inline void NAME##_columns(              \
        size_t depth, const GROUP *a, const GROUP *b, float *tile, const int vectors) {            \
        VECTOR sum[ROWS][PANEL / LANES];                                                           \
        _Pragma("GCC unroll 8") for (int r = 0; r < ROWS; r++)                                     \
            _Pragma("GCC unroll 3") for (int v = 0; v < vectors; v++) sum[r][v] =                  \
                LOAD(tile + r * PANEL + v * LANES);                                                \
        for (size_t k = 0; k < depth; k++, a += PANEL, b += PANEL) {                               \
            OPERAND column[PANEL / LANES];                                                         \
            _Pragma("GCC unroll 3") for (int v = 0; v < vectors; v++) column[v] =                  \
                (OPERAND)LOAD((const float *)(const void *)(b + v * LANES));                       \
            _Pragma("GCC unroll 8") for (int r = 0; r < ROWS; r++) {                               \
                const OPERAND row = SPREAD(a[r]);                                                  \
                _Pragma("GCC unroll 3") for (int v = 0; v < vectors; v++) sum[r][v] =              \
                    MULTIPLY_ADD(row, column[v], sum[r][v]);                                       \
            }                                                                                      \
        }                                                                                          \
        _Pragma("GCC unroll 8") for (int r = 0; r < ROWS; r++)                                     \
            _Pragma("GCC unroll 3") for (int v = 0; v < vectors; v++)                              \
                STORE(tile + r * PANEL + v * LANES, sum[r][v]);                                    \
    }                                                                                              \
    __attribute__((target(TARGET))) static void NAME(size_t depth, const void *a, const void *b,   \
                                                     int vectors, float *tile) {                   \
        if (vectors == 3)                                                                          \
            NAME##_columns(depth, a, b, tile, 3);                                                  \
        else if (vectors == 2)                                                                     \
            NAME##_columns(depth, a, b, tile, 2);                                                  \
        else                                                                                       \
            NAME##_columns(depth, a, b, tile, 1);                                                  \
    }

#define SPREAD_PAIR(x)             (__m512bh) _mm512_set1_epi32((int)(x))
#define MULTIPLY_ADD_PAIR(x, y, c) _mm512_dpbf16_ps(c, x, y)

MULTIPLY(multiply_avx2, "avx2,fma", __m256, 4, 24, 8, float, _mm256_loadu_ps, _mm256_storeu_ps,
         _mm256_set1_ps, _mm256_fmadd_ps, __m256)
MULTIPLY(multiply_avx512, "avx512f", __m512, 8, 48, 16, float, _mm512_loadu_ps, _mm512_storeu_ps,
         _mm512_set1_ps, _mm512_fmadd_ps, __m512)
MULTIPLY(multiply_bf16, "avx512f,avx512bf16", __m512, 8, 48, 16, uint32_t, _mm512_loadu_ps,
         _mm512_storeu_ps, SPREAD_PAIR, MULTIPLY_ADD_PAIR, __m512bh)

/* The same lines, for wider vectors. */
__attribute__((target("avx2"))) static void store_avx2(float *out, const float *sum, const float *c,
                                                       size_t count, tile_scale s) {
    store(out, sum, c, count, s);
}

__attribute__((target("avx2"))) static void turn_avx2(uint32_t *out, size_t out_stride,
                                                      const uint32_t *in, size_t in_stride,
                                                      size_t rows, size_t cols) {
    turn_blocks(out, out_stride, in, in_stride, rows, cols, 8);
}

/* Numbers below the normal ones are zeros for the bf16 instruction, as operands and as results,
 * whatever the control register says. */
#define FLUSHING(NAME)                                                                             \
    static void NAME##_flushing(size_t depth, const void *a, const void *b, int vectors,           \
                                float *tile) {                                                     \
        const unsigned before = _mm_getcsr();                                                      \
        _mm_setcsr(before | _MM_FLUSH_ZERO_ON | _MM_DENORMALS_ZERO_ON);                            \
        NAME(depth, a, b, vectors, tile);                                                          \
        _mm_setcsr(before);                                                                        \
    }
FLUSHING(multiply_portable)
FLUSHING(multiply_avx2)
FLUSHING(multiply_avx512)

#else
#define multiply_portable_flushing multiply_portable
#endif

/* ---- which ---- */

const char *host_isa_name(host_isa isa) {
    static const char *const names[HOST_ISA_COUNT] = {"portable", "avx2", "avx512", "avx512_bf16"};
    return names[isa];
}

host_isa host_isa_detect(void) {
#if defined(__x86_64__)
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma"))
        return HOST_PORTABLE;
    if (!__builtin_cpu_supports("avx512f"))
        return HOST_AVX2;
    return __builtin_cpu_supports("avx512bf16") ? HOST_AVX512_BF16 : HOST_AVX512;
#else
    return HOST_PORTABLE;
#endif
}

const tile_kernel *tile_kernel_for(host_isa isa, bool bf16) {
    /* [isa], for fp32 and for bf16 */
    static const tile_kernel kernels[][2] = {
        {{TILE_FP32, 4, 8, 8, multiply_portable, store_portable, turn_portable},
         {TILE_FP32_SWAPPED, 4, 8, 8, multiply_portable_flushing, store_portable, turn_portable}},
#if defined(__x86_64__)
        {{TILE_FP32, 4, 24, 8, multiply_avx2, store_avx2, turn_avx2},
         {TILE_FP32_SWAPPED, 4, 24, 8, multiply_avx2_flushing, store_avx2, turn_avx2}},
        {{TILE_FP32, 8, 48, 16, multiply_avx512, store_avx2, turn_avx2},
         {TILE_FP32_SWAPPED, 8, 48, 16, multiply_avx512_flushing, store_avx2, turn_avx2}},
        {{TILE_FP32, 8, 48, 16, multiply_avx512, store_avx2, turn_avx2},
         {TILE_BF16_PAIRS, 8, 48, 16, multiply_bf16, store_avx2, turn_avx2}},
#endif
    };
    return &kernels[isa][bf16];
}
