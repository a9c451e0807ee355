/* What a backend does with data as it is: copies, conversions between dtypes, and what the ranks'
 * words come to. To the bit, on every backend. */
#include "elementwise_fixture.h" /* before the rest: cmocka's macro `fail` hides a function */

#include <float.h>
#include <math.h>
#include <string.h>

/* ---- copy ---- */

static void test_copy(void **state) {
    (void)state;
    for (size_t k = 0; k < COUNTS; k++)
        for (int stream = 0; stream < STREAM_COUNT; stream++) {
            const size_t bytes = 4 * counts[k];
            const char *a = random_array(MUONSHARD_FP32, counts[k], -9.0, 9.0);
            const char *b = random_array(MUONSHARD_FP32, counts[k], -9.0, 9.0);
            char *x = guarded(bytes), *y = guarded(bytes);
            memset(x, 0x5a, bytes);
            memset(y, 0x5a, bytes);
            /* Whole, nothing, and an odd number of bytes to an odd place. */
            const copy_item items[] = {{x, a, bytes}, {y, b, 0}, {y + 1, b, bytes - 3}};
            assert_int_equal(host->ops->copy(host, items, 3, (backend_stream)stream), MUONSHARD_OK);
            assert_same(x, a, bytes, "copy");
            assert_same(y + 1, b, bytes - 3, "copy to an odd place");
            assert_true(y[0] == 0x5a && y[bytes - 2] == 0x5a && y[bytes - 1] == 0x5a);
            assert_int_equal(host->ops->copy(host, NULL, 0, (backend_stream)stream), MUONSHARD_OK);
            release();
        }
}

/* ---- convert ---- */

static const char *const ways[] = {"always", "to nearest", "by chance"};

/* What elements of a tensor become; by chance, with the host's own draws, whose statistics are
 * test_dtype's. */
static void expected_of(int way, const convert_item *it, void *want) {
    for (size_t i = 0; i < it->count; i++) {
        const float x = it->src ? at(it->src, it->src_dtype, i) : 0.0f;
        if (it->dst_dtype == MUONSHARD_FP32)
            ((float *)want)[i] = x;
        else if (way == 2)
            dtype_store_stochastic((uint16_t *)want + i, it->dst_dtype, &x, 1, context.seed,
                                   (uint32_t)record.count, (uint32_t)it->tensor, it->first + i);
        else
            dtype_store((uint16_t *)want + i, it->dst_dtype, &x, 1);
    }
}

static void check_convert(int way, muonshard_dtype to, muonshard_dtype from, size_t n,
                          bool from_nothing) {
    begin_step(41);
    context.stochastic = way == 2;
    context.seed = 0x123456789abcdefU;
    const size_t bytes = n * dtype_size(to);
    const void *src = random_array(from, n, -3.0, 3.0);
    void *dst = guarded(bytes), *want = guarded(bytes);
    memset(dst, 0xff, bytes);
    const convert_item item = {.dst = dst,
                               .dst_dtype = to,
                               .src = from_nothing ? NULL : src,
                               .src_dtype = from,
                               .count = n,
                               .tensor = TENSOR,
                               .first = ((size_t)1 << 34) + 3};
    const kernel_context *c = way ? &context : NULL;
    assert_int_equal(host->ops->convert(host, c, &item, 1, STREAM_COMPUTE), MUONSHARD_OK);
    expected_of(way, &item, want);
    if (memcmp(dst, want, bytes) != 0)
        fail_msg("%zu elements, %s to %s, %s: other bits", n, dtype_name(from), dtype_name(to),
                 ways[way]);
    memset(dst, 0x11, bytes);
    if (way)
        ASSERT_LEFT_ALONE(host->ops->convert(host, c, &item, 1, STREAM_COMPUTE), dst, bytes);
    release();
}

static void test_convert(void **state) {
    (void)state;
    for (int way = 0; way < 3; way++)
        for (int to = 0; to < DTYPES; to++)
            for (int from = 0; from < DTYPES; from++)
                for (size_t k = 0; k < COUNTS; k++)
                    check_convert(way, (muonshard_dtype)to, (muonshard_dtype)from, counts[k],
                                  k == 1);
}

/* More in one call than one launch has room for, of all sizes and dtypes. */
static void test_convert_many(void **state) {
    (void)state;
    enum { MANY = 300 };
    for (int way = 0; way < 3; way++) {
        convert_item items[MANY];
        begin_step(7);
        context.stochastic = way == 2;
        context.seed = 5;
        const float *src = random_array(MUONSHARD_FP32, MANY * 64, -3.0, 3.0);
        char *dst = guarded(MANY * 64 * 4), *want = guarded(MANY * 64 * 4);
        memset(dst, 0x22, MANY * 64 * 4);
        memset(want, 0x22, MANY * 64 * 4);
        for (size_t i = 0; i < MANY; i++)
            items[i] = (convert_item){.dst = dst + i * 64 * 4,
                                      .dst_dtype = (muonshard_dtype)(i % DTYPES),
                                      .src = i % 7 ? src + i * 64 : NULL,
                                      .src_dtype = MUONSHARD_FP32,
                                      .count = i % 65,
                                      .tensor = (int)(i % 3),
                                      .first = i * 1000};
        const kernel_context *c = way ? &context : NULL;
        active[1] = way == 0;
        assert_int_equal(host->ops->convert(host, c, items, MANY, STREAM_COMPUTE), MUONSHARD_OK);
        for (size_t i = 0; i < MANY; i++)
            if (way == 0 || items[i].tensor != 1)
                expected_of(way, &items[i], want + i * 64 * 4);
        assert_same(dst, want, MANY * 64 * 4, ways[way]);
        release();
    }
}

/* ---- resolve ---- */

enum { RANKS = 5, MOST = 300, SUMS = 70, STRIDE = 1 + MOST + SUMS + 1 };

/* The words of some ranks, and what they are asked about. */
typedef struct agreement {
    double *words;
    uint8_t *skip_if_absent, *active;
    size_t *sum_index;
    double *total;
    step_record *record;
    resolve_args args;
} agreement;

static agreement agreement_of(int ranks, size_t tensors, size_t sums) {
    agreement a = {.words = guarded(RANKS * STRIDE * sizeof(double)),
                   .skip_if_absent = guarded(MOST),
                   .active = guarded(MOST),
                   .sum_index = guarded(RANKS * SUMS * sizeof(size_t)),
                   .total = guarded(2 * sizeof(double)),
                   .record = guarded(sizeof *a.record)};
    const float *random = random_array(MUONSHARD_FP32, RANKS * STRIDE, 0.0, 40.0);
    *a.record = (step_record){.count = 11};
    memset(a.active, 7, MOST);
    size_t k = 0;
    for (int r = 0; r < RANKS; r++) {
        double *word = a.words + (size_t)r * STRIDE;
        for (size_t i = 0; i < STRIDE; i++)
            word[i] = (double)random[(size_t)r * STRIDE + i] / 3.0;
        word[0] = 0.0;
        for (size_t t = 0; t < MOST; t++) /* absent everywhere, somewhere, nowhere */
            word[1 + t] = t % 3 == 0 ? 0.0 : t % 3 == 1 ? r == ranks - 1 : 1.0;
        word[STRIDE - 1] = 0.125;
    }
    for (size_t t = 0; t < MOST; t++)
        a.skip_if_absent[t] = t % 2;
    for (size_t i = 0; i < sums; i++) /* an order of its own, across the ranks */
        for (int r = 0; r < ranks; r++)
            a.sum_index[k++] = (size_t)(ranks - 1 - r) * STRIDE + 1 + MOST + i;
    a.args = (resolve_args){.words = a.words,
                            .word_count = ranks,
                            .stride = STRIDE,
                            .tensor_count = tensors,
                            .equal = STRIDE - 1,
                            .skip_if_absent = a.skip_if_absent,
                            .active = a.active,
                            .sum_index = a.sum_index,
                            .sum_count = k,
                            .total = a.total,
                            .scale = 0.25,
                            .sum_scale = 0.25,
                            .record = a.record};
    return a;
}

static double sum_of(const agreement *a) {
    double sum = 0.0;
    for (size_t i = 0; i < a->args.sum_count; i++)
        sum += a->words[a->sum_index[i]];
    return sum;
}

static void run_resolve(const agreement *a) {
    assert_int_equal(host->ops->resolve(host, &a->args), MUONSHARD_OK);
}

static void test_resolve(void **state) {
    (void)state;
    static const size_t tensors[] = {1, 3, MOST}, sums[] = {1, 13, SUMS};
    for (int ranks = 1; ranks <= RANKS; ranks++)
        for (size_t k = 0; k < 3; k++)
            for (int clips = 0; clips < 3; clips++) { /* off, above the norm, below it */
                agreement a = agreement_of(ranks, tensors[k], sums[k]);
                const double norm = sqrt(sum_of(&a)) * 0.25;
                a.args.clip_norm = clips == 0 ? 0.0 : clips == 1 ? 2.0 * norm : 0.5 * norm;
                const double clip = clips == 2 ? 0.5 * norm / (norm + 1e-6) : 1.0;
                run_resolve(&a);
                const step_record *r = a.record;
                assert_true(!r->skip && !r->failed && !r->status && r->count == 12);
                assert_true(r->grad_norm == norm);
                assert_true(r->clip_factor == (float)clip);
                assert_true(r->grad_factor == (float)(clip * 0.25));
                assert_true(a.total[0] == 0.0 && a.total[1] == sum_of(&a) * 0.0625);
                for (size_t t = 0; t < tensors[k]; t++)
                    assert_int_equal(a.active[t], t % 3 != 0 || t % 2 == 0);
                for (size_t t = tensors[k]; t < MOST; t++)
                    assert_int_equal(a.active[t], 7);
                release();
            }
}

/* Totals for another agreement, whose sums come scaled and with no flags. */
static void test_resolve_of_totals(void **state) {
    (void)state;
    agreement a = agreement_of(3, 3, 13);
    a.args.record = NULL;
    run_resolve(&a);
    assert_true(a.total[0] == 0.0 && a.total[1] == sum_of(&a) * 0.0625);
    assert_int_equal(a.record->count, 11);
    assert_int_equal(a.active[0], 1);
    release();
    a = agreement_of(3, 0, 2);
    a.args.sum_scale = 1.0;
    a.args.equal = 0;
    a.words[2 * STRIDE - 1] = 3.0; /* which nobody compares */
    run_resolve(&a);
    assert_true(!a.record->failed && a.record->grad_norm == sqrt(sum_of(&a)));
    assert_true(a.record->grad_factor == 0.25f);
    assert_int_equal(a.active[0], 7);
    release();
}

/* Down to 2^110, whatever clip_norm and the scale are. */
static void test_resolve_long_gradients(void **state) {
    (void)state;
    const double norms[] = {1e30, 1e34, FLT_MAX};
    for (size_t k = 0; k < 3; k++)
        for (int clips = 0; clips < 2; clips++) {
            agreement a = agreement_of(2, 3, 13);
            a.words[a.sum_index[5]] = norms[k] * norms[k];
            a.args.clip_norm = clips ? 1e25 : 0.0;
            a.args.sum_scale = a.args.scale = 0.5;
            run_resolve(&a);
            const double norm = a.record->grad_norm;
            assert_true(!a.record->skip && a.record->count == 12 && norm >= 0.49 * norms[k]);
            assert_true(a.record->clip_factor ==
                        (clips && norm > 1e25 ? (float)(1e25 / (norm + 1e-6)) : 1.0F));
            assert_true(a.record->grad_factor ==
                        (float)(fmin(a.record->clip_factor, 0x1p110 / norm) * 0.5));
            release();
        }
}

static void test_resolve_failures(void **state) {
    (void)state;
    /* The lowest rank that failed counts, and its status; other values are a failure without one.
     */
    static const struct {
        double first, second, third; /* statuses of ranks 1, 2 and 3 */
        int other;                   /* rank with other values, or 0 */
        int failed, status;
    } cases[] = {{0, -5, -7, 0, 3, -5}, {-2, 0, -7, 0, 2, -2}, {0, 0, 0, 2, 3, 0},
                 {0, 0, -4, 1, 2, 0},   {-4, 0, 0, 3, 2, -4},  {0, 0, -6, 4, 4, -6}};
    for (size_t k = 0; k < sizeof cases / sizeof cases[0]; k++) {
        agreement a = agreement_of(RANKS, 3, 13);
        a.words[STRIDE] = cases[k].first;
        a.words[2 * STRIDE] = cases[k].second;
        a.words[3 * STRIDE] = cases[k].third;
        if (cases[k].other)
            a.words[(size_t)(cases[k].other + 1) * STRIDE - 1] = 0.25;
        run_resolve(&a);
        assert_true(a.record->skip && a.record->count == 11);
        assert_int_equal(a.record->failed, cases[k].failed);
        assert_int_equal(a.record->status, cases[k].status);
        assert_true(a.total[0] ==
                    (cases[k].status ? cases[k].status : (double)MUONSHARD_ERR_MISMATCH));
        release();
    }
    /* What is not finite, or would not be in fp32, is skipped and no failure; so is such a scale.
     */
    const double sums[] = {NAN, INFINITY, (double)FLT_MAX * FLT_MAX * 17.0, 1.0};
    for (size_t k = 0; k < 4; k++) {
        agreement a = agreement_of(2, 3, 13);
        a.words[a.sum_index[5]] = sums[k];
        a.args.scale = k == 3 ? 1e40 : a.args.scale;
        run_resolve(&a);
        assert_true(a.record->skip && !a.record->failed && a.record->count == 11);
        release();
    }
}

int main(void) {
    const struct CMUnitTest all[] = {
        cmocka_unit_test(test_copy),
        cmocka_unit_test(test_convert),
        cmocka_unit_test(test_convert_many),
        cmocka_unit_test(test_resolve),
        cmocka_unit_test(test_resolve_of_totals),
        cmocka_unit_test(test_resolve_long_gradients),
        cmocka_unit_test(test_resolve_failures),
    };
    return cmocka_run_group_tests(all, open_host, close_host);
}
