/* 16-bit numbers against their definition in fp64: every pattern one way, every kind of fp32 the
 * other; arrays against single elements, on both paths; stochastic rounding by its exact
 * probabilities. */
#include "dtype.h"
#include "oracle.h"

#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

#include <math.h>
#include <stdlib.h>
#include <string.h>
#ifdef __x86_64__
#include <xmmintrin.h>
#endif

/* A binary format: `bits` explicit bits of significand, exponents from `least` on. */
typedef struct format {
    muonshard_dtype dtype;
    int bits, least;
    uint16_t infinite; /* its pattern */
} format;

static const format formats[] = {{MUONSHARD_BF16, 7, -126, 0x7f80},
                                 {MUONSHARD_FP16, 10, -14, 0x7c00}};
enum { FORMATS = sizeof formats / sizeof formats[0] };

static uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* By the definition: sign, exponent, fraction. */
static double value_of(const format *f, uint16_t pattern) {
    int exponent = (pattern & f->infinite) >> f->bits;
    double fraction = ldexp((double)(pattern & ((1 << f->bits) - 1)), -f->bits);
    double magnitude =
        exponent == 0 ? ldexp(fraction, f->least) : ldexp(1.0 + fraction, f->least + exponent - 1);
    if ((pattern & f->infinite) == f->infinite)
        magnitude = fraction == 0.0 ? INFINITY : NAN;
    return pattern & 0x8000 ? -magnitude : magnitude;
}

/* The distance of neighbours at x. */
static double spacing_at(int bits, int least, double x) {
    int exponent = x == 0.0 ? least : ilogb(x);
    return ldexp(1.0, (exponent < least ? least : exponent) - bits);
}

static double nearest_value(const format *f, double x) {
    if (!isfinite(x))
        return x;
    double spacing = spacing_at(f->bits, f->least, x);
    double rounded = nearbyint(x / spacing) * spacing; /* to even: the default mode */
    return fabs(rounded) > value_of(f, (uint16_t)(f->infinite - 1)) ? copysign(INFINITY, x)
                                                                    : rounded;
}

static float from(const format *f, uint16_t x) {
    return f->dtype == MUONSHARD_BF16 ? dtype_from_bf16(x) : dtype_from_fp16(x);
}

static uint16_t to(const format *f, float x) {
    return f->dtype == MUONSHARD_BF16 ? dtype_to_bf16(x) : dtype_to_fp16(x);
}

static uint16_t to_stochastic(const format *f, float x, uint32_t random) {
    return f->dtype == MUONSHARD_BF16 ? dtype_to_bf16_stochastic(x, random)
                                      : dtype_to_fp16_stochastic(x, random);
}

static bool same(double a, double b) {
    return isnan(a) ? (bool)isnan(b) : a == b && signbit(a) == signbit(b);
}

/* fp32 numbers of every kind: each 16-bit number, the point half-way to the next, their fp32
 * neighbours; random patterns; NaNs. Freed by the caller. */
static float *interesting_numbers(const format *f, size_t *count) {
    enum { RANDOM = 1 << 18 };
    static const uint32_t special[] = {0x7f800001, 0x7fc00000, 0x7fffffff, 0xff800001, 0xffc12345,
                                       0x7f7fffff, 0xff7fffff, 0x00000001, 0x80000001, 0x007fffff,
                                       0x00800000, 0x7f7f7fff, 0x7f7f8000, 0x7f7f8001, 0x7fa5a5a5};
    enum { SPECIAL = sizeof special / sizeof special[0] };
    float *x = malloc((6u * 65536u + RANDOM + SPECIAL) * sizeof *x);
    assert_non_null(x);
    size_t n = 0;
    for (uint32_t p = 0; p < 65536; p++) {
        if ((p & f->infinite) == f->infinite) /* of these, see `special` */
            continue;
        double value = value_of(f, (uint16_t)p);
        double half = 0.5 * copysign(spacing_at(f->bits, f->least, value), value);
        const float on[2] = {(float)value, (float)(value + half)};
        for (int k = 0; k < 2; k++) {
            x[n++] = on[k];
            x[n++] = nextafterf(on[k], INFINITY);
            x[n++] = nextafterf(on[k], -INFINITY);
        }
    }
    oracle_rng rng = {1};
    for (int i = 0; i < RANDOM; i++)
        x[n++] = float_of((uint32_t)oracle_random(&rng));
    for (int i = 0; i < SPECIAL; i++)
        x[n++] = float_of(special[i]);
    *count = n;
    return x;
}

static void test_names_and_sizes(void **state) {
    (void)state;
    assert_string_equal(dtype_name(MUONSHARD_FP32), "fp32");
    assert_string_equal(dtype_name(MUONSHARD_BF16), "bf16");
    assert_string_equal(dtype_name(MUONSHARD_FP16), "fp16");
    assert_null(dtype_name(MUONSHARD_DTYPE_OF_PARAM));
    assert_null(dtype_name((muonshard_dtype)7));
    assert_int_equal(dtype_size(MUONSHARD_FP32), 4);
    assert_int_equal(dtype_size(MUONSHARD_BF16), 2);
    assert_int_equal(dtype_size(MUONSHARD_FP16), 2);
}

static void test_every_pattern_is_read_and_written_back(void **state) {
    (void)state;
    for (int k = 0; k < FORMATS; k++) {
        const format *f = &formats[k];
        const uint32_t quiet = 1u << (f->bits - 1);
        for (uint32_t p = 0; p < 65536; p++) {
            float x = from(f, (uint16_t)p);
            assert_true(same((double)x, value_of(f, (uint16_t)p)));
            assert_int_equal(to(f, x), isnan(x) ? p | quiet : p);
        }
    }
}

static void test_nearest_even(void **state) {
    (void)state;
    for (int k = 0; k < FORMATS; k++) {
        const format *f = &formats[k];
        size_t count;
        float *x = interesting_numbers(f, &count);
        for (size_t i = 0; i < count; i++) {
            double got = value_of(f, to(f, x[i])), wanted = nearest_value(f, (double)x[i]);
            if (!same(got, wanted))
                fail_msg("%s of %a (%08x): %a, should be %a", dtype_name(f->dtype), (double)x[i],
                         bits_of(x[i]), got, wanted);
        }
        free(x);
    }
}

static void test_tf32_keeps_ten_bits(void **state) {
    (void)state;
    size_t count;
    float *x = interesting_numbers(&formats[0], &count);
    oracle_rng rng = {2};
    for (size_t i = 0; i < count; i++) {
        /* towards points half-way of tf32: its last bits are all ones, all zeros, or one and zeros
         */
        static const uint32_t endings[] = {0x1000, 0x0fff, 0x1001, 0x3000, 0x0000, 0x1fff};
        uint32_t ending = endings[oracle_random(&rng) % 6];
        float y = i % 2 ? x[i] : float_of((bits_of(x[i]) & ~0x3fffu) | ending);
        float got = dtype_round_tf32(y);
        double wanted = (double)y;
        if (isfinite(y)) {
            double spacing = spacing_at(10, -126, wanted);
            wanted = nearbyint(wanted / spacing) * spacing;
            wanted = fabs(wanted) >= 0x1p128 ? copysign(INFINITY, wanted) : wanted;
        }
        assert_true(same((double)got, wanted));
    }
    free(x);
}

/* ---- arrays ---- */

enum { GUARD = 16 };

/* Everything one path makes of src [count], laid out one after the other with a guard between. */
typedef struct results {
    uint16_t *stored, *stochastic; /* [count + 2 GUARD] */
    float *loaded, *rounded;       /* likewise */
    size_t count;
} results;

static void *guarded(size_t count, size_t size) {
    void *block = malloc((count + 2 * GUARD) * size);
    assert_non_null(block);
    memset(block, 0x5a, (count + 2 * GUARD) * size);
    return block;
}

static results convert_all(const format *f, const float *src, size_t count, uint64_t first) {
    results r = {guarded(count, 2), guarded(count, 2), guarded(count, 4), guarded(count, 4), count};
    dtype_store(r.stored + GUARD, f->dtype, src, count);
    dtype_store_stochastic(r.stochastic + GUARD, f->dtype, src, count, 77, 3, 5, first);
    dtype_load(r.loaded + GUARD, r.stored + GUARD, f->dtype, count);
    if (count)
        memcpy(r.rounded + GUARD, src, count * sizeof *src);
    dtype_round(r.rounded + GUARD, f->dtype, count);
    return r;
}

static void results_free(results r) {
    free(r.stored);
    free(r.stochastic);
    free(r.loaded);
    free(r.rounded);
}

static void assert_same_results(results a, results b) {
    size_t count = a.count + 2 * GUARD;
    assert_memory_equal(a.stored, b.stored, count * 2);
    assert_memory_equal(a.stochastic, b.stochastic, count * 2);
    assert_memory_equal(a.loaded, b.loaded, count * 4);
    assert_memory_equal(a.rounded, b.rounded, count * 4);
}

/* The guards as they were, and each element as if it were alone. */
static void assert_elementwise(const format *f, const float *src, uint64_t first, results r) {
    const unsigned char *bytes[] = {(unsigned char *)r.stored, (unsigned char *)r.stochastic,
                                    (unsigned char *)r.loaded, (unsigned char *)r.rounded};
    const size_t size[] = {2, 2, 4, 4};
    for (int k = 0; k < 4; k++)
        for (size_t i = 0; i < GUARD * size[k]; i++)
            assert_true(bytes[k][i] == 0x5a && bytes[k][(r.count + GUARD) * size[k] + i] == 0x5a);
    for (size_t i = 0; i < r.count; i++) {
        uint16_t nearest = to(f, src[i]);
        uint32_t back = bits_of(from(f, nearest)), random = dtype_random(77, 3, 5, first + i);
        assert_true(r.stored[GUARD + i] == nearest);
        assert_true(bits_of(r.loaded[GUARD + i]) == back);
        assert_true(bits_of(r.rounded[GUARD + i]) == back);
        assert_true(r.stochastic[GUARD + i] == to_stochastic(f, src[i], random));
    }
}

static void check_array(const format *f, const float *src, size_t count, uint64_t first) {
    dtype_use_instructions(false);
    results without = convert_all(f, src, count, first);
    dtype_use_instructions(true);
    results with = convert_all(f, src, count, first);
    assert_elementwise(f, src, first, with);
    assert_same_results(with, without);
    results_free(with);
    results_free(without);
}

static void test_arrays_of_any_length_and_alignment(void **state) {
    (void)state;
    for (int k = 0; k < FORMATS; k++) {
        size_t count;
        float *x = interesting_numbers(&formats[k], &count);
        for (size_t length = 0; length <= 140; length++)
            for (size_t offset = 0; offset < 9; offset++)
                check_array(&formats[k], x + 977 * length + offset, length, 5 * length + offset);
        check_array(&formats[k], x, count, 3);
        check_array(&formats[k], x + 1, 70001, (UINT64_C(1) << 34) - 30000); /* counter past 2^32 */
        free(x);
    }
}

/* Every 16-bit pattern, signalling NaNs too, read as an array. */
static void test_arrays_of_every_pattern(void **state) {
    (void)state;
    uint16_t *patterns = malloc(65536 * sizeof *patterns);
    float *with = malloc(65536 * sizeof *with), *without = malloc(65536 * sizeof *without);
    assert_true(patterns && with && without);
    for (uint32_t p = 0; p < 65536; p++)
        patterns[p] = (uint16_t)p;
    for (int k = 0; k < FORMATS; k++) {
        dtype_use_instructions(false);
        dtype_load(without, patterns, formats[k].dtype, 65536);
        dtype_use_instructions(true);
        dtype_load(with, patterns, formats[k].dtype, 65536);
        assert_memory_equal(with, without, 65536 * sizeof *with);
        for (uint32_t p = 0; p < 65536; p++)
            assert_true(bits_of(with[p]) == bits_of(from(&formats[k], (uint16_t)p)));
    }
    free(patterns);
    free(with);
    free(without);
}

static void test_fp32_arrays_are_copied(void **state) {
    (void)state;
    float x[5] = {1.0F, -0.0F, float_of(0x7f800001), 1e-45F, 3e38F}, y[5] = {0}, z[5] = {0};
    dtype_store(y, MUONSHARD_FP32, x, 5);
    dtype_load(z, y, MUONSHARD_FP32, 5);
    assert_memory_equal(x, z, sizeof x);
    dtype_round(z, MUONSHARD_FP32, 5);
    dtype_load(z, z, MUONSHARD_FP32, 5);
    dtype_store(z, MUONSHARD_FP32, z, 5);
    assert_memory_equal(x, z, sizeof x);
    dtype_store_stochastic(y, MUONSHARD_FP32, z, 5, 1, 2, 3, 4);
    assert_memory_equal(x, y, sizeof x);
}

/* A framework that has told the processor to flush subnormals changes nothing. */
static void test_flushing_subnormals_changes_nothing(void **state) {
    (void)state;
#ifdef __x86_64__
    for (int k = 0; k < FORMATS; k++) {
        size_t count;
        float *x = interesting_numbers(&formats[k], &count);
        for (int use = 0; use < 2; use++) {
            dtype_use_instructions(use);
            results plain = convert_all(&formats[k], x, count, 0);
            const unsigned int mode = _mm_getcsr();
            _mm_setcsr(mode | 0x8040u); /* flush to zero, subnormals are zero */
            results flushed = convert_all(&formats[k], x, count, 0);
            _mm_setcsr(mode);
            assert_same_results(plain, flushed);
            results_free(plain);
            results_free(flushed);
        }
        free(x);
    }
    dtype_use_instructions(true);
#else
    skip();
#endif
}

/* ---- stochastic rounding ---- */

/* The probability of the neighbour farther from zero, from the least `random` that gives it; and
 * that there are no others. */
static double probability_up(const format *f, float x, uint16_t down, oracle_rng *rng) {
    uint64_t low = 0, high = UINT64_C(1) << 32;
    while (low < high) {
        uint64_t middle = (low + high) / 2;
        if (to_stochastic(f, x, (uint32_t)middle) == down)
            low = middle + 1;
        else
            high = middle;
    }
    for (int i = 0; i < 8; i++) {
        uint32_t random = (uint32_t)oracle_random(rng);
        assert_int_equal(to_stochastic(f, x, random), random >= low ? down + 1 : down);
    }
    return ldexp((double)((UINT64_C(1) << 32) - low), -32);
}

static void test_the_mean_of_stochastic_rounding_is_exact(void **state) {
    (void)state;
    oracle_rng rng = {3};
    for (int k = 0; k < FORMATS; k++) {
        const format *f = &formats[k];
        size_t count;
        float *x = interesting_numbers(f, &count);
        const double largest = value_of(f, (uint16_t)(f->infinite - 1));
        for (size_t i = 0; i < count; i += 3) {
            const double wanted = (double)x[i];
            if (!(fabs(wanted) <=
                  largest)) { /* as to nearest: infinite, NaN, or just the largest */
                assert_int_equal(to_stochastic(f, x[i], 0), to(f, x[i]));
                assert_int_equal(to_stochastic(f, x[i], UINT32_MAX), to(f, x[i]));
                continue;
            }
            const double spacing = spacing_at(f->bits, f->least, wanted);
            const double down = trunc(wanted / spacing) * spacing;
            const uint16_t pattern = to_stochastic(f, x[i], 0);
            assert_true(same(value_of(f, pattern), copysign(down, wanted)));
            const double up = probability_up(f, x[i], pattern, &rng);
            const double mean = down + up * copysign(spacing, wanted);
            /* fp16's fraction of a tiny number may need more than 32 bits */
            const bool lost = f->dtype == MUONSHARD_FP16 && fabs(wanted) < 0x1p-33;
            if (!(fabs(mean - wanted) <= (lost ? 0x1p-56 : 0.0)))
                fail_msg("%s of %a: mean %a", dtype_name(f->dtype), wanted, mean);
        }
        free(x);
    }
}

/* Philox 4x32-10 as the paper has it, word by word. */
static void philox_reference(uint32_t c[4], uint32_t k0, uint32_t k1) {
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = UINT64_C(0xD2511F53) * c[0], p1 = UINT64_C(0xCD9E8D57) * c[2];
        const uint32_t next[4] = {(uint32_t)(p1 / 4294967296u) ^ c[1] ^ k0, (uint32_t)p1,
                                  (uint32_t)(p0 / 4294967296u) ^ c[3] ^ k1, (uint32_t)p0};
        memcpy(c, next, sizeof next);
        k0 = (uint32_t)(k0 + UINT64_C(0x9E3779B9));
        k1 = (uint32_t)(k1 + UINT64_C(0xBB67AE85));
    }
}

/* The published answers check the reference (the first one dtype_random too), the reference checks
 * dtype_random: which cannot be given the others' counters. */
static void test_random_bits_are_philox(void **state) {
    (void)state;
    static const struct {
        uint32_t counter[4], key[2], answer[4];
    } known[] = {{{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
                 {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
                  {0xffffffff, 0xffffffff},
                  {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
                 {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
                  {0xa4093822, 0x299f31d0},
                  {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}}};
    for (int i = 0; i < 3; i++) {
        uint32_t c[4];
        memcpy(c, known[i].counter, sizeof c);
        philox_reference(c, known[i].key[0], known[i].key[1]);
        assert_memory_equal(c, known[i].answer, sizeof c);
    }
    for (uint64_t w = 0; w < 4; w++)
        assert_int_equal(dtype_random(0, 0, 0, w), known[0].answer[w]);
    oracle_rng rng = {4};
    for (int i = 0; i < 2000; i++) {
        uint64_t seed = oracle_random(&rng), element = oracle_random(&rng) >> (i % 64);
        uint32_t step = (uint32_t)oracle_random(&rng), tensor = (uint32_t)oracle_random(&rng);
        uint32_t c[4] = {(uint32_t)(element >> 2), (uint32_t)(element >> 34), step, tensor};
        philox_reference(c, (uint32_t)seed, (uint32_t)(seed >> 32));
        assert_int_equal(dtype_random(seed, step, tensor, element), c[element & 3]);
    }
}

/* A third of the way from one number to the next, many times: the mean of what is stored. */
static void test_stored_arrays_are_unbiased(void **state) {
    (void)state;
    enum { COUNT = 1 << 18 };
    float *x = malloc(COUNT * sizeof *x);
    uint16_t *stored = malloc(COUNT * sizeof *stored);
    assert_true(x && stored);
    for (int k = 0; k < FORMATS; k++) {
        const format *f = &formats[k];
        static const double at[] = {1.0, -3.0, 0x1p-15, -0x1.8p-20};
        for (int a = 0; a < 4; a++) {
            const double spacing = spacing_at(f->bits, f->least, at[a]);
            const float value = (float)(at[a] + spacing / 3.0);
            for (int i = 0; i < COUNT; i++)
                x[i] = value;
            dtype_store_stochastic(stored, f->dtype, x, COUNT, 9, 1, (uint32_t)a, 0);
            double sum = 0.0;
            for (int i = 0; i < COUNT; i++)
                sum += (value_of(f, stored[i]) - (double)value) / spacing;
            /* the deviation of one is sqrt(2)/3; five of the mean's */
            assert_true(fabs(sum / COUNT) <= 5.0 * sqrt(2.0 / 9.0 / COUNT));
            /* and of each word of Philox */
            for (int w = 0; w < 4; w++) {
                sum = 0.0;
                for (int i = w; i < COUNT; i += 4)
                    sum += (value_of(f, stored[i]) - (double)value) / spacing;
                assert_true(fabs(sum / (COUNT / 4)) <= 5.0 * sqrt(2.0 / 9.0 / (COUNT / 4)));
            }
        }
    }
    free(x);
    free(stored);
}

/* Who stores which part of a tensor is no matter; seed, step and tensor are. */
static void test_stochastic_bits_belong_to_the_element(void **state) {
    (void)state;
    enum { COUNT = 301 };
    float x[COUNT];
    uint16_t whole[COUNT], parts[COUNT];
    for (int i = 0; i < COUNT; i++)
        x[i] = 1.0F + (float)i * 0x1.234p-12F;
    for (int k = 0; k < FORMATS; k++) {
        muonshard_dtype dtype = formats[k].dtype;
        dtype_store_stochastic(whole, dtype, x, COUNT, 1, 2, 3, 1000);
        for (size_t cut = 0; cut <= COUNT; cut++) {
            dtype_use_instructions(cut % 2);
            memset(parts, 0, sizeof parts);
            dtype_store_stochastic(parts, dtype, x, cut, 1, 2, 3, 1000);
            dtype_store_stochastic(parts + cut, dtype, x + cut, COUNT - cut, 1, 2, 3, 1000 + cut);
            assert_memory_equal(whole, parts, sizeof whole);
        }
        const uint64_t other[][4] = {{2, 2, 3, 1000}, {UINT64_C(1) << 32 | 1, 2, 3, 1000},
                                     {1, 3, 3, 1000}, {1, 2, 4, 1000},
                                     {1, 2, 3, 1004}, {1, 2, 3, UINT64_C(1) << 34 | 1000}};
        for (size_t i = 0; i < sizeof other / sizeof other[0]; i++) {
            dtype_store_stochastic(parts, dtype, x, COUNT, other[i][0], (uint32_t)other[i][1],
                                   (uint32_t)other[i][2], other[i][3]);
            assert_memory_not_equal(whole, parts, sizeof whole);
        }
    }
    dtype_use_instructions(true);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_names_and_sizes),
        cmocka_unit_test(test_every_pattern_is_read_and_written_back),
        cmocka_unit_test(test_nearest_even),
        cmocka_unit_test(test_tf32_keeps_ten_bits),
        cmocka_unit_test(test_arrays_of_any_length_and_alignment),
        cmocka_unit_test(test_arrays_of_every_pattern),
        cmocka_unit_test(test_fp32_arrays_are_copied),
        cmocka_unit_test(test_flushing_subnormals_changes_nothing),
        cmocka_unit_test(test_the_mean_of_stochastic_rounding_is_exact),
        cmocka_unit_test(test_random_bits_are_philox),
        cmocka_unit_test(test_stored_arrays_are_unbiased),
        cmocka_unit_test(test_stochastic_bits_belong_to_the_element),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
