/* The element-wise kernels of the host against the formulas of ALGORITHMS.md sections 2 and 8,
 * element by element in fp64, over every form, dtype and size; and what they leave alone. */
#include "elementwise_fixture.h" /* before the rest: cmocka's macro `fail` hides a function */

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- sums ---- */

static void test_sum_ranks(void **state) {
    (void)state;
    for (int dtype = 0; dtype < DTYPES; dtype++)
        for (int ranks = 1; ranks <= 5; ranks++)
            for (size_t k = 0; k < COUNTS; k++) {
                const size_t n = counts[k];
                const void *src =
                    random_array((muonshard_dtype)dtype, n * (size_t)ranks, -1e3, 1e3);
                float *sum = guarded(n * sizeof *sum);
                /* The own slot comes from where it was sent; what was received there is not read.
                 */
                const int own = ranks / 2;
                const size_t slot = n * dtype_size((muonshard_dtype)dtype);
                char *received = guarded((size_t)ranks * slot);
                memcpy(received, src, (size_t)ranks * slot);
                memset(received + (size_t)own * slot, 0xff, slot);
                const sum_ranks_args args = {.dst = sum,
                                             .received = received,
                                             .own = (const char *)src + (size_t)own * slot,
                                             .dtype = (muonshard_dtype)dtype,
                                             .ranks = ranks,
                                             .rank = own,
                                             .count = n};
                assert_int_equal(host->ops->sum_ranks(host, &args, STREAM_COMPUTE), MUONSHARD_OK);
                for (size_t i = 0; i < n; i++) {
                    float want = at(src, (muonshard_dtype)dtype, i);
                    for (int r = 1; r < ranks; r++)
                        want = (float)((double)want +
                                       (double)at(src, (muonshard_dtype)dtype, (size_t)r * n + i));
                    assert_same(&sum[i], &want, sizeof want, "sum over ranks");
                }
                release();
            }
}

static void test_sum_squares(void **state) {
    (void)state;
    for (size_t k = 0; k < COUNTS; k++) {
        const size_t n = counts[k];
        float *x = random_array(MUONSHARD_FP32, n, -1e30, 1e30); /* squares beyond fp32 */
        double got = -1.0;
        long double want = 0.0L;
        for (size_t i = 0; i < n; i++)
            want += (long double)x[i] * x[i];
        const sum_squares_item item = {x, n, &got};
        host->ops->sum_squares(host, &item, 1);
        assert_true(fabs(got - (double)want) <= 1e-14 * (double)want);
        x[n - 1] = INFINITY;
        host->ops->sum_squares(host, &item, 1);
        assert_true(!isfinite(got));
        x[n - 1] = NAN;
        host->ops->sum_squares(host, &item, 1);
        assert_true(!isfinite(got));
        release();
    }
}

/* ---- momentum ---- */

/* Section 2, one element: M after the step, and U made of the M that was stored. */
static double momentum_after(momentum_form form, double mu, double m, double g) {
    const bool ema = form == MOMENTUM_EMA || form == MOMENTUM_EMA_CORRECTED;
    return ema ? mu * m + (1.0 - mu) * g : mu * m + g;
}

static double direction(momentum_form form, bool nesterov, double mu, double t, double m,
                        double g) {
    switch (form) {
    case MOMENTUM_HEAVY_BALL: return nesterov ? g + mu * m : m;
    case MOMENTUM_HEAVY_BALL_SWAPPED: return nesterov ? m + mu * g : m;
    case MOMENTUM_EMA: return nesterov ? (1.0 - mu) * g + mu * m : m;
    case MOMENTUM_EMA_CORRECTED:
        return nesterov ? mu * m / (1.0 - pow(mu, t + 1.0)) + (1.0 - mu) * g / (1.0 - pow(mu, t))
                        : m / (1.0 - pow(mu, t));
    }
    return NAN;
}

static void check_momentum(const momentum_args *args, muonshard_dtype w_dtype, size_t n) {
    const double mu = values[TENSOR].momentum, t = (double)record.count;
    float *u = random_array(MUONSHARD_FP32, n, -3.0, 3.0);
    void *m = random_array(args->dtype, n, -2.0, 2.0);
    const void *w = args->l2 ? random_array(w_dtype, n, -5.0, 5.0) : NULL;
    const float *s = copy_of(u, n * sizeof *u);
    const void *m0 = copy_of(m, n * dtype_size(args->dtype));
    const momentum_item item = {
        .g_u = u, .momentum = m, .w = w, .w_dtype = w_dtype, .count = n, .tensor = TENSOR};
    ASSERT_LEFT_ALONE(host->ops->momentum(host, &context, args, &item, 1), u, n * sizeof *u);
    ASSERT_LEFT_ALONE(host->ops->momentum(host, &context, args, &item, 1), m,
                      n * dtype_size(args->dtype));
    assert_int_equal(host->ops->momentum(host, &context, args, &item, 1), MUONSHARD_OK);
    for (size_t i = 0; i < n; i++) {
        const double decay = args->l2 ? values[TENSOR].weight_decay * at(w, w_dtype, i) : 0.0;
        const double g = (double)record.grad_factor * s[i] + decay;
        const double error = 4.0 * UNIT * (fabs((double)record.grad_factor * s[i]) + fabs(decay));
        const double before = at(m0, args->dtype, i), stored = at(m, args->dtype, i);
        assert_stored(m, args->dtype, i, momentum_after(args->form, mu, before, g),
                      error + 4.0 * UNIT * (fabs(before) + fabs(g)), "M");
        const double of_m = direction(args->form, args->nesterov, mu, t, 1.0, 0.0);
        const double of_g = direction(args->form, args->nesterov, mu, t, 0.0, 1.0);
        assert_near(u[i], direction(args->form, args->nesterov, mu, t, stored, g),
                    error + 4.0 * UNIT * (fabs(of_m * stored) + fabs(of_g * g) + fabs(g)), "U", i);
    }
    release();
}

static void test_momentum(void **state) {
    (void)state;
    static const int64_t steps[] = {1, 2, 60};
    for (size_t k = 0; k < COUNTS; k++)
        for (int t = 0; t < 3; t++)
            for (int form = MOMENTUM_HEAVY_BALL; form <= MOMENTUM_EMA_CORRECTED; form++)
                for (int nesterov = 0; nesterov < 2; nesterov++)
                    for (int dtype = MUONSHARD_FP32; dtype <= MUONSHARD_BF16; dtype++)
                        for (int w = -1; w < DTYPES; w++) { /* -1: no l2 */
                            const momentum_args args = {.form = (momentum_form)form,
                                                        .nesterov = nesterov,
                                                        .l2 = w >= 0,
                                                        .dtype = (muonshard_dtype)dtype};
                            begin_step(steps[t]);
                            check_momentum(&args, (muonshard_dtype)(w < 0 ? 0 : w), counts[k]);
                        }
}

/* ---- AdamW and Lion ---- */

typedef struct adam_want { /* and how far fp32 may be from it */
    double m, m_error, v, v_error, w, w_error;
} adam_want;

/* Section 8. */
static adam_want adam_after(const adam_args *a, double m, double v, double w, double s) {
    const tensor_values *values_of = &values[TENSOR];
    const double t = (double)record.count, lr = values_of->lr, wd = values_of->weight_decay;
    const double b1 = a->beta1, b2 = a->beta2, factor = record.grad_factor;
    const double c1 = 1.0 - pow(b1, t), c2 = 1.0 - pow(b2, t);
    const double added = a->decay == DECAY_L2 ? wd * w : 0.0, g = factor * s + added;
    const double g_error = 4.0 * UNIT * (fabs(factor * s) + fabs(added));
    adam_want want = {0};
    double update, error = 0.0;
    if (a->rule == ELEMENTWISE_LION) {
        want.m = b2 * m + (1.0 - b2) * g;
        want.m_error = 4.0 * UNIT * (fabs(m) + fabs(g)) + g_error;
        const double u = b1 * m + (1.0 - b1) * g;
        if (u != 0.0 && fabs(u) <= want.m_error) /* fp32 may see the other sign */
            error = 2.0 * lr;
        update = lr * sign(u);
    } else {
        want.m = b1 * m + (1.0 - b1) * g;
        want.m_error = 4.0 * UNIT * (fabs(m) + fabs(g)) + g_error;
        want.v = b2 * v + (1.0 - b2) * g * g;
        want.v_error = 6.0 * UNIT * want.v + 2.0 * fabs(g) * g_error;
        const double of_m = a->nesterov ? b1 / (1.0 - pow(b1, t + 1.0)) : 1.0 / c1;
        const double of_g = a->nesterov ? (1.0 - b1) / c1 : 0.0;
        const double scale = a->form == ADAM_EPS_INSIDE ? lr * sqrt(c2) : lr;
        const double divisor =
            a->form == ADAM_EPS_INSIDE ? sqrt(want.v) + a->eps : sqrt(want.v) / sqrt(c2) + a->eps;
        update = scale * (of_m * want.m + of_g * g) / divisor;
        error = scale / divisor *
                    (of_m * want.m_error + of_g * g_error +
                     4.0 * UNIT * (fabs(of_m * want.m) + fabs(of_g * g))) +
                fabs(update) * (8.0 * UNIT + (want.v > 0.0 ? want.v_error / want.v : 0.0));
    }
    const bool cautious = a->decay == DECAY_CAUTIOUS || a->decay == DECAY_CAUTIOUS_LR_SQUARED;
    const bool spared = cautious && sign(update) * sign(w) <= 0;
    const double full = decay_of(a->decay, lr, wd, 1.0), d = spared ? 0.0 : full;
    if (cautious && update != 0.0 && fabs(update) <= error)
        error += fabs(full * w);
    want.w = (1.0 - d) * w - update;
    want.w_error = 4.0 * UNIT * (fabs(w) + fabs(d * w) + fabs(update)) + error;
    return want;
}

static void check_adam(const adam_args *args, size_t n) {
    const size_t bytes = n * sizeof(float);
    const bool adamw = args->rule == ELEMENTWISE_ADAMW;
    float *w = random_array(MUONSHARD_FP32, n, -2.0, 2.0);
    float *m = random_array(MUONSHARD_FP32, n, -1.0, 1.0);
    float *v = adamw ? random_array(MUONSHARD_FP32, n, 0.0, 2.0) : NULL;
    const float *g = random_array(MUONSHARD_FP32, n, -4.0, 4.0);
    const float *w0 = copy_of(w, bytes), *m0 = copy_of(m, bytes), *g0 = copy_of(g, bytes);
    const float *v0 = adamw ? copy_of(v, bytes) : NULL;
    const adam_item item = {.w = w, .g = g, .m = m, .v = v, .count = n, .tensor = TENSOR};
    ASSERT_LEFT_ALONE(host->ops->adam(host, &context, args, &item, 1), w, bytes);
    ASSERT_LEFT_ALONE(host->ops->adam(host, &context, args, &item, 1), m, bytes);
    if (adamw)
        ASSERT_LEFT_ALONE(host->ops->adam(host, &context, args, &item, 1), v, bytes);
    assert_int_equal(host->ops->adam(host, &context, args, &item, 1), MUONSHARD_OK);
    for (size_t i = 0; i < n; i++) {
        const adam_want want = adam_after(args, m0[i], adamw ? v0[i] : 0.0, w0[i], g[i]);
        assert_near(m[i], want.m, want.m_error, "m", i);
        if (adamw)
            assert_near(v[i], want.v, want.v_error, "v", i);
        assert_near(w[i], want.w, want.w_error, "w", i);
    }
    assert_same(g, g0, bytes, "gradient");
    release();
}

static void test_adam(void **state) {
    (void)state;
    static const int64_t steps[] = {1, 2, 60};
    for (size_t k = 0; k < COUNTS; k++)
        for (int t = 0; t < 3; t++)
            for (int rule = ELEMENTWISE_ADAMW; rule <= ELEMENTWISE_LION; rule++)
                for (int form = ADAM_EPS_OUTSIDE; form <= ADAM_EPS_INSIDE; form++)
                    for (int nesterov = 0; nesterov < 2; nesterov++)
                        for (int decay = DECAY_DECOUPLED; decay <= DECAY_CAUTIOUS_LR_SQUARED;
                             decay++) {
                            /* an eps that is seen where it stands */
                            const adam_args args = {.rule = (elementwise_rule)rule,
                                                    .form = (adam_form)form,
                                                    .nesterov = nesterov,
                                                    .beta1 = 0.9,
                                                    .beta2 = 0.98,
                                                    .eps = 1e-2,
                                                    .decay = (decay_method)decay};
                            begin_step(steps[t]);
                            check_adam(&args, counts[k]);
                        }
}

/* ---- where an array is cut, no bit depends ---- */

static void test_momentum_in_pieces(void **state) {
    (void)state;
    begin_step(4);
    const size_t n = LARGEST;
    for (int form = MOMENTUM_HEAVY_BALL; form <= MOMENTUM_EMA_CORRECTED; form++)
        for (int dtype = MUONSHARD_FP32; dtype <= MUONSHARD_BF16; dtype++)
            for (size_t k = 0; k < CUTS; k++) {
                const momentum_args args = {(momentum_form)form, form % 2, true,
                                            (muonshard_dtype)dtype};
                const size_t cut = cuts[k];
                const size_t width = dtype_size(args.dtype);
                char *m = random_array(args.dtype, n, -1.0, 1.0), *m2 = copy_of(m, n * width);
                float *u = random_array(MUONSHARD_FP32, n, -1.0, 1.0);
                float *u2 = copy_of(u, n * sizeof *u);
                const uint16_t *w = random_array(MUONSHARD_FP16, n, -1.0, 1.0);
                const momentum_item whole = {u, m, w, MUONSHARD_FP16, n, TENSOR, NULL};
                const momentum_item pieces[] = {
                    {u2, m2, w, MUONSHARD_FP16, cut, TENSOR, NULL},
                    {u2 + cut, m2 + cut * width, w + cut, MUONSHARD_FP16, n - cut, TENSOR, NULL}};
                host->ops->momentum(host, &context, &args, &whole, 1);
                host->ops->momentum(host, &context, &args, pieces, 2);
                assert_same(m, m2, n * width, "M in pieces");
                assert_same(u, u2, n * sizeof *u, "U in pieces");
                release();
            }
}

static void test_adam_in_pieces(void **state) {
    (void)state;
    begin_step(4);
    const size_t n = LARGEST, bytes = n * sizeof(float);
    for (int rule = ELEMENTWISE_ADAMW; rule <= ELEMENTWISE_LION; rule++)
        for (int decay = DECAY_DECOUPLED; decay <= DECAY_CAUTIOUS_LR_SQUARED; decay++)
            for (size_t k = 0; k < CUTS; k++) {
                const adam_args args = {
                    (elementwise_rule)rule, ADAM_EPS_OUTSIDE, decay % 2, 0.9, 0.95, 1e-8,
                    (decay_method)decay};
                const size_t cut = cuts[k];
                float *w = random_array(MUONSHARD_FP32, n, -1.0, 1.0), *w2 = copy_of(w, bytes);
                float *m = random_array(MUONSHARD_FP32, n, -1.0, 1.0), *m2 = copy_of(m, bytes);
                float *v = random_array(MUONSHARD_FP32, n, 0.0, 1.0), *v2 = copy_of(v, bytes);
                const float *g = random_array(MUONSHARD_FP32, n, -1.0, 1.0);
                const adam_item whole = {w, g, m, v, n, TENSOR};
                const adam_item pieces[] = {
                    {w2, g, m2, v2, cut, TENSOR},
                    {w2 + cut, g + cut, m2 + cut, v2 + cut, n - cut, TENSOR}};
                host->ops->adam(host, &context, &args, &whole, 1);
                host->ops->adam(host, &context, &args, pieces, 2);
                assert_same(w, w2, bytes, "w in pieces");
                assert_same(m, m2, bytes, "m in pieces");
                assert_same(v, v2, bytes, "v in pieces");
                release();
            }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_sum_ranks),          cmocka_unit_test(test_sum_squares),
        cmocka_unit_test(test_momentum),           cmocka_unit_test(test_adam),
        cmocka_unit_test(test_momentum_in_pieces), cmocka_unit_test(test_adam_in_pieces),
    };
    return cmocka_run_group_tests(tests, open_host, close_host);
}
