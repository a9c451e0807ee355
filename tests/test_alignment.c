/* Arrays of every length that start anywhere: the bits are those of arrays that start where memory
 * does. A device has other accesses for them, which the formulas' own tests hardly come to. */
#include "mirror_backend.h" /* before cmocka.h, whose macro `fail` would hide a function */
#include "elementwise_fixture.h"

#include <string.h>

enum { SHIFTS = 8, SHORT = 70, LENGTHS = SHORT + 1 + 7 };

/* 0 to 70, and around what one block takes. */
static size_t length_of(size_t k) {
    static const size_t longer[] = {8189, 8191, 8192, 8193, 8194, 16385, 3 * 8192 + 71};
    return k <= SHORT ? k : longer[k - SHORT - 1];
}

/* What the bits are compared with: the host's on a fake device. A card has other powers, so that it
 * is compared with itself. */
static backend *reference;

static int open_both(void **state) {
    error_text error;
    if (open_host(state))
        return -1;
    reference = host;
    if (test_backend_is_host() || test_backend_is_card())
        return 0;
    return backend_open_host((host_options){.isa = host_isa_detect(), .threads = 1}, &reference,
                             &error);
}

static int close_both(void **state) {
    if (reference != host)
        backend_close(reference);
    return close_host(state);
}

/* Half of the arrays are shifted, by 1 to 7 elements, each by another number. */
static size_t any_shift(void) {
    static unsigned x = 1;
    x = x * 1103515245u + 12345u;
    return x >> 30 & 1 ? x >> 16 & (SHIFTS - 1) : 0;
}

/* A copy of an array, so many elements behind an aligned address; NULL of NULL. */
static void *shifted_by(size_t shift, const void *array, muonshard_dtype dtype, size_t count) {
    const size_t size = dtype_size(dtype);
    if (!array)
        return NULL;
    return memcpy((char *)guarded((SHIFTS + count) * size) + shift * size, array, count * size);
}

static void *shifted(const void *array, muonshard_dtype dtype, size_t count) {
    return shifted_by(any_shift(), array, dtype, count);
}

static void assert_bits(const void *a, const void *b, muonshard_dtype dtype, size_t count,
                        const char *what) {
    if (a && memcmp(a, b, count * dtype_size(dtype)) != 0)
        fail_msg("%zu elements of %s, %s: other bits", count, dtype_name(dtype), what);
}

static void begin(size_t salt) {
    begin_step(5);
    context.seed = 0x123456789abcdef;
    context.stochastic = salt % 2;
}

static void check_convert(muonshard_dtype to, muonshard_dtype from, size_t n, size_t first) {
    const void *src = random_array(from, n, -3.0, 3.0);
    const convert_item plain = {.dst = random_array(to, n, 0.0, 1.0),
                                .dst_dtype = to,
                                .src = n % 9 ? src : NULL,
                                .src_dtype = from,
                                .count = n,
                                .tensor = TENSOR,
                                .first = first};
    convert_item item = plain;
    item.dst = shifted(plain.dst, to, n);
    item.src = shifted(plain.src, from, n);
    reference->ops->convert(reference, &context, &plain, 1, STREAM_COMPUTE);
    assert_int_equal(host->ops->convert(host, &context, &item, 1, STREAM_COMPUTE), MUONSHARD_OK);
    assert_bits(item.dst, plain.dst, to, n, "converted");
    release();
}

static void test_convert(void **state) {
    (void)state;
    for (int to = 0; to < DTYPES; to++)
        for (int from = 0; from < DTYPES; from++)
            for (size_t k = 0; k < 2 * (size_t)LENGTHS; k++) {
                begin(k);
                check_convert((muonshard_dtype)to, (muonshard_dtype)from, length_of(k / 2),
                              1000 + any_shift());
            }
}

static void check_sum_ranks(muonshard_dtype dtype, int ranks, size_t n) {
    const size_t sent = n * (size_t)ranks;
    sum_ranks_args plain = {.dst = guarded(n * sizeof(float)),
                            .received = random_array(dtype, sent, -3.0, 3.0),
                            .own = random_array(dtype, n, -3.0, 3.0),
                            .dtype = dtype,
                            .ranks = ranks,
                            .rank = ranks / 2,
                            .count = n};
    sum_ranks_args args = plain;
    args.dst = shifted(plain.dst, MUONSHARD_FP32, n);
    args.received = shifted(plain.received, dtype, sent);
    args.own = shifted(plain.own, dtype, n);
    reference->ops->sum_ranks(reference, &plain, STREAM_COMPUTE);
    assert_int_equal(host->ops->sum_ranks(host, &args, STREAM_COMPUTE), MUONSHARD_OK);
    assert_bits(args.dst, plain.dst, MUONSHARD_FP32, n, "sum over ranks");
    release();
}

static void test_sum_ranks(void **state) {
    (void)state;
    for (int dtype = 0; dtype < DTYPES; dtype++)
        for (int ranks = 1; ranks <= 6; ranks++)
            for (size_t k = 0; k < LENGTHS; k++)
                check_sum_ranks((muonshard_dtype)dtype, ranks, length_of(k));
}

/* The sum itself, too: its order depends on the length alone. */
static void test_sum_squares(void **state) {
    (void)state;
    for (size_t k = 1; k < LENGTHS; k++) {
        const size_t n = length_of(k);
        const float *x = random_array(MUONSHARD_FP32, n, -3.0, 3.0);
        double sums[SHIFTS];
        for (size_t shift = 0; shift < SHIFTS; shift++) {
            const sum_squares_item item = {shifted_by(shift, x, MUONSHARD_FP32, n), n,
                                           &sums[shift]};
            assert_int_equal(host->ops->sum_squares(host, &item, 1), MUONSHARD_OK);
            assert_same(&sums[shift], &sums[0], sizeof sums[0], "sum of squares");
        }
        release();
    }
}

static void check_momentum(const momentum_args *args, muonshard_dtype w_dtype, size_t n) {
    double squares = 0.0, aligned_squares = 0.0, other_squares = 0.0;
    const momentum_item plain = {.g_u = random_array(MUONSHARD_FP32, n, -3.0, 3.0),
                                 .momentum = random_array(args->dtype, n, -2.0, 2.0),
                                 .w = random_array(w_dtype, n, -5.0, 5.0),
                                 .w_dtype = w_dtype,
                                 .count = n,
                                 .tensor = TENSOR,
                                 .squares = &other_squares};
    momentum_item item = plain, aligned = plain;
    item.g_u = shifted(plain.g_u, MUONSHARD_FP32, n);
    item.momentum = shifted(plain.momentum, args->dtype, n);
    item.w = shifted(plain.w, w_dtype, n);
    item.squares = &squares;
    aligned.g_u = shifted_by(0, plain.g_u, MUONSHARD_FP32, n);
    aligned.momentum = shifted_by(0, plain.momentum, args->dtype, n);
    aligned.squares = &aligned_squares;
    reference->ops->momentum(reference, &context, args, &plain, 1);
    assert_int_equal(host->ops->momentum(host, &context, args, &item, 1), MUONSHARD_OK);
    assert_int_equal(host->ops->momentum(host, &context, args, &aligned, 1), MUONSHARD_OK);
    assert_bits(item.g_u, plain.g_u, MUONSHARD_FP32, n, "U");
    assert_bits(item.momentum, plain.momentum, args->dtype, n, "M");
    assert_same(&squares, &aligned_squares, sizeof squares, "sum of U^2");
    release();
}

static void test_momentum(void **state) {
    (void)state;
    for (int form = MOMENTUM_EMA; form <= MOMENTUM_EMA_CORRECTED; form++)
        for (int dtype = MUONSHARD_FP32; dtype <= MUONSHARD_BF16; dtype++)
            for (int w = -1; w < DTYPES; w++) /* -1: no l2 */
                for (size_t k = 1; k < LENGTHS; k++) {
                    const momentum_args args = {.form = (momentum_form)form,
                                                .nesterov = k % 2,
                                                .l2 = w >= 0,
                                                .dtype = (muonshard_dtype)dtype};
                    begin(k);
                    check_momentum(&args, (muonshard_dtype)(w < 0 ? 0 : w), length_of(k));
                }
}

enum { NO_FACTOR, FACTOR_ROWS, FACTOR_COLS };

static void check_apply(const apply_args *args, muonshard_dtype w, muonshard_dtype u, bool master,
                        int factor, int64_t rows, int64_t cols) {
    const size_t n = (size_t)(rows * cols);
    const size_t factors = (size_t)(factor == FACTOR_ROWS ? rows : cols);
    const float *f = random_array(MUONSHARD_FP32, factors, 0.0, 2.0);
    const apply_item plain = {.w = random_array(w, n, -2.0, 2.0),
                              .w_dtype = w,
                              .master = master ? random_array(MUONSHARD_FP32, n, -2.0, 2.0) : NULL,
                              .u = random_array(u, n, -1.5, 1.5),
                              .u_dtype = u,
                              .factor = factor == NO_FACTOR ? NULL : f,
                              .by_rows = factor == FACTOR_ROWS,
                              .rows = rows,
                              .cols = cols,
                              .scale = 1.7,
                              .tensor = TENSOR,
                              .first = 0x100000000 + any_shift()};
    apply_item item = plain;
    item.w = shifted(plain.w, w, n);
    item.master = shifted(plain.master, MUONSHARD_FP32, n);
    item.u = shifted(plain.u, u, n);
    item.factor = shifted(plain.factor, MUONSHARD_FP32, factors);
    reference->ops->apply(reference, &context, args, &plain, 1);
    assert_int_equal(host->ops->apply(host, &context, args, &item, 1), MUONSHARD_OK);
    assert_bits(item.w, plain.w, w, n, "W");
    assert_bits(item.master, plain.master, MUONSHARD_FP32, n, "master");
    release();
}

static void test_apply(void **state) {
    (void)state;
    for (int w = 0; w < DTYPES; w++)
        for (int u = 0; u < DTYPES; u++)
            for (int master = 0; master < 2; master++)
                for (int factor = NO_FACTOR; factor <= FACTOR_COLS; factor++)
                    for (size_t k = (size_t)(1 + factor); k < LENGTHS; k += 2) {
                        const size_t n = length_of(k), rows = k % 5 && n >= k % 5 ? k % 5 : n;
                        const apply_args args = {DECAY_CAUTIOUS, (decay_form)(k % 3), true};
                        begin(k / 2);
                        check_apply(&args, (muonshard_dtype)w, (muonshard_dtype)u, master, factor,
                                    (int64_t)rows, (int64_t)(n / rows));
                    }
}

static void check_adam(const adam_args *args, size_t n) {
    const bool lion = args->rule == ELEMENTWISE_LION;
    const adam_item plain = {.w = random_array(MUONSHARD_FP32, n, -2.0, 2.0),
                             .g = random_array(MUONSHARD_FP32, n, -4.0, 4.0),
                             .m = random_array(MUONSHARD_FP32, n, -1.0, 1.0),
                             .v = lion ? NULL : random_array(MUONSHARD_FP32, n, 0.0, 2.0),
                             .count = n,
                             .tensor = TENSOR};
    adam_item item = plain;
    item.w = shifted(plain.w, MUONSHARD_FP32, n);
    item.g = shifted(plain.g, MUONSHARD_FP32, n);
    item.m = shifted(plain.m, MUONSHARD_FP32, n);
    item.v = shifted(plain.v, MUONSHARD_FP32, n);
    reference->ops->adam(reference, &context, args, &plain, 1);
    assert_int_equal(host->ops->adam(host, &context, args, &item, 1), MUONSHARD_OK);
    assert_bits(item.w, plain.w, MUONSHARD_FP32, n, "w");
    assert_bits(item.m, plain.m, MUONSHARD_FP32, n, "m");
    assert_bits(item.v, plain.v, MUONSHARD_FP32, n, "v");
    release();
}

static void test_adam(void **state) {
    (void)state;
    for (int rule = ELEMENTWISE_ADAMW; rule <= ELEMENTWISE_LION; rule++)
        for (int decay = DECAY_DECOUPLED; decay <= DECAY_CAUTIOUS_LR_SQUARED; decay++)
            for (size_t k = 1; k < LENGTHS; k++) {
                const adam_args args = {.rule = (elementwise_rule)rule,
                                        .nesterov = k % 2,
                                        .beta1 = 0.9,
                                        .beta2 = 0.95,
                                        .eps = 1e-8,
                                        .decay = (decay_method)decay};
                begin(k);
                check_adam(&args, length_of(k));
            }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_convert),     cmocka_unit_test(test_sum_ranks),
        cmocka_unit_test(test_sum_squares), cmocka_unit_test(test_momentum),
        cmocka_unit_test(test_apply),       cmocka_unit_test(test_adam),
    };
    return cmocka_run_group_tests(tests, open_both, close_both);
}
