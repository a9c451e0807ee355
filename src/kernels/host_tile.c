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
        {{TILE_FP32, 4, 8, 8, multiply_portable},
         {TILE_FP32_SWAPPED, 4, 8, 8, multiply_portable_flushing}},
#if defined(__x86_64__)
        {{TILE_FP32, 4, 24, 8, multiply_avx2},
         {TILE_FP32_SWAPPED, 4, 24, 8, multiply_avx2_flushing}},
        {{TILE_FP32, 8, 48, 16, multiply_avx512},
         {TILE_FP32_SWAPPED, 8, 48, 16, multiply_avx512_flushing}},
        {{TILE_FP32, 8, 48, 16, multiply_avx512}, {TILE_BF16_PAIRS, 8, 48, 16, multiply_bf16}},
#endif
    };
    return &kernels[isa][bf16];
}
