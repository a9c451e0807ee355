/* Decay, update and variance of matrices on the host against the formulas of ALGORITHMS.md sections
 * 7 and 9, over every method, form, dtype and shape; and what they leave alone. */
#include "elementwise_fixture.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const int64_t shapes[][2] = {{1, 1},   {7, 1},    {1, 7},    {33, 31},
                                    {25, 41}, {17, 241}, {3, 1025}, {1025, 2}};
enum { SHAPES = sizeof shapes / sizeof shapes[0] };

/* ---- apply ---- */

/* fp32 arithmetic spelt out: one rounding for every operation of the form (rounding twice is
 * harmless from fp64). */
static float weight_after(decay_form form, float w, float u, double d, double step) {
    const float s = (float)step, su = (float)((double)s * (double)u);
    const float keep = (float)(1.0 - d), dw = (float)((double)(float)d * (double)w);
    switch (form) {
    case DECAY_FORM_MULTIPLY:
        return (float)((double)(float)((double)keep * (double)w) - (double)su);
    case DECAY_FORM_ADD: return (float)((double)(float)((double)w - (double)dw) - (double)su);
    case DECAY_FORM_WITH_UPDATE:
        return (float)((double)w - (double)(float)((double)su + (double)dw));
    }
    return NAN;
}

enum { NO_FACTOR, FACTOR_ROWS, FACTOR_COLS };

typedef struct apply_case {
    apply_args args;
    muonshard_dtype w, u;
    bool master;
    int factor;
    int64_t rows, cols;
} apply_case;

static void check_apply(const apply_case *c) {
    const size_t n = (size_t)(c->rows * c->cols), w_bytes = n * dtype_size(c->w);
    const tensor_values *v = &values[TENSOR];
    void *w = random_array(c->w, n, -2.0, 2.0);
    float *master = c->master ? random_array(MUONSHARD_FP32, n, -2.0, 2.0) : NULL;
    const void *u = random_array(c->u, n, -1.5, 1.5);
    const float *factor = random_array(
        MUONSHARD_FP32, (size_t)(c->factor == FACTOR_ROWS ? c->rows : c->cols), 0.0, 2.0);
    const apply_item item = {.w = w,
                             .w_dtype = c->w,
                             .master = master,
                             .u = u,
                             .u_dtype = c->u,
                             .factor = c->factor == NO_FACTOR ? NULL : factor,
                             .by_rows = c->factor == FACTOR_ROWS,
                             .rows = c->rows,
                             .cols = c->cols,
                             .scale = 1.7,
                             .tensor = TENSOR,
                             .first = 0x100000007};
    const void *w0 = copy_of(w, w_bytes);
    const float *master0 = c->master ? copy_of(master, n * sizeof *master) : NULL;
    ASSERT_LEFT_ALONE(host->ops->apply(host, &context, &c->args, &item, 1), w, w_bytes);
    if (c->master)
        ASSERT_LEFT_ALONE(host->ops->apply(host, &context, &c->args, &item, 1), master,
                          n * sizeof *master);
    assert_int_equal(host->ops->apply(host, &context, &c->args, &item, 1), MUONSHARD_OK);

    const bool scaled = c->args.scaled_lr && c->args.decay != DECAY_INDEPENDENT; /* it has no lr */
    const double full = decay_of(c->args.decay, v->lr, v->weight_decay, scaled ? item.scale : 1.0);
    const bool cautious =
        c->args.decay == DECAY_CAUTIOUS || c->args.decay == DECAY_CAUTIOUS_LR_SQUARED;
    for (size_t i = 0; i < n; i++) {
        const float before = c->master ? master0[i] : at(w0, c->w, i);
        float update = at(u, c->u, i);
        if (c->factor != NO_FACTOR) {
            const size_t cols = (size_t)c->cols;
            const float f = factor[c->factor == FACTOR_ROWS ? i / cols : i % cols];
            update = (float)((double)f * (double)update);
        }
        const double d = cautious && sign(before) * sign(update) < 0 ? 0.0 : full;
        const float want = weight_after(c->args.form, before, update, d, v->lr * item.scale);
        assert_near(want, (1.0 - d) * before - v->lr * item.scale * update,
                    4.0 * UNIT * (fabs(before) + fabs(d * before) + fabs((double)update)),
                    "the forms' own W", i);
        if (c->master)
            assert_near(master[i], want, 0.0, "master", i);
        float stored = rounded(c->w, want);
        const uint32_t random =
            dtype_random(context.seed, (uint32_t)record.count, TENSOR, item.first + i);
        if (context.stochastic && c->w == MUONSHARD_BF16)
            stored = dtype_from_bf16(dtype_to_bf16_stochastic(want, random));
        if (context.stochastic && c->w == MUONSHARD_FP16)
            stored = dtype_from_fp16(dtype_to_fp16_stochastic(want, random));
        assert_near(at(w, c->w, i), stored, 0.0, "W", i);
    }
    release();
}

static void test_apply(void **state) {
    (void)state;
    begin_step(5);
    for (int decay = DECAY_DECOUPLED; decay <= DECAY_CAUTIOUS_LR_SQUARED; decay++)
        for (int form = DECAY_FORM_MULTIPLY; form <= DECAY_FORM_WITH_UPDATE; form++)
            for (int scaled = 0; scaled < 2; scaled++)
                for (int factor = NO_FACTOR; factor <= FACTOR_COLS; factor++)
                    for (size_t k = 0; k < SHAPES; k++) {
                        apply_case c = {{(decay_method)decay, (decay_form)form, scaled},
                                        .factor = factor,
                                        .rows = shapes[k][0],
                                        .cols = shapes[k][1]};
                        check_apply(&c);
                    }
}

static void test_apply_storage(void **state) {
    (void)state;
    begin_step(5);
    context.seed = 0x123456789abcdef;
    for (int stochastic = 0; stochastic < 2; stochastic++)
        for (int w = 0; w < DTYPES; w++)
            for (int u = 0; u < DTYPES; u++)
                for (int master = 0; master < 2; master++)
                    for (int factor = NO_FACTOR; factor <= FACTOR_COLS; factor++)
                        for (size_t k = 0; k < SHAPES; k++) {
                            const apply_case c = {{DECAY_CAUTIOUS, DECAY_FORM_MULTIPLY, false},
                                                  (muonshard_dtype)w,
                                                  (muonshard_dtype)u,
                                                  master,
                                                  factor,
                                                  shapes[k][0],
                                                  shapes[k][1]};
                            context.stochastic = stochastic;
                            check_apply(&c);
                        }
}

/* ---- variance ---- */

static double denominator(const variance_args *args, double v) {
    return args->denominator == VARIANCE_CLAMPED ? sqrt(v > args->eps ? v : args->eps)
                                                 : sqrt(v) + args->eps;
}

/* Section 9. */
static void check_variance_item(const variance_args *args, const variance_item *it,
                                const float *v0) {
    const size_t lines = (size_t)(it->by_rows ? it->rows : it->cols), cols = (size_t)it->cols;
    const size_t n = (size_t)(it->rows * it->cols);
    double *sums = calloc(lines, sizeof *sums), norm2 = 0.0, divided2 = 0.0;
    assert_non_null(sums);
    for (size_t i = 0; i < n; i++) {
        const double x = at(it->u, it->u_dtype, i);
        sums[it->by_rows ? i / cols : i % cols] += x * x;
        norm2 += x * x;
    }
    for (size_t i = 0; i < lines; i++) {
        const double mean = sums[i] * (double)lines / (double)n;
        const double want = args->beta2 * v0[i] + (1.0 - args->beta2) * mean;
        assert_near(it->v[i], want, 2.0 * UNIT * want, "v", i);
        divided2 += sums[i] / pow(denominator(args, it->v[i]), 2.0);
    }
    const double rescale = sqrt(norm2) / fmax(sqrt(divided2), args->eps);
    for (size_t i = 0; i < lines; i++) {
        const double want = rescale / denominator(args, it->v[i]);
        assert_near(it->factor[i], want, 2.0 * UNIT * want, "factor", i);
    }
    free(sums);
}

static void check_variance(const variance_args *args, muonshard_dtype dtype, bool by_rows,
                           int64_t rows, int64_t cols, double size) {
    const size_t lines = (size_t)(by_rows ? rows : cols), bytes = lines * sizeof(float);
    const size_t u_bytes = (size_t)(rows * cols) * dtype_size(dtype);
    const void *u = random_array(dtype, (size_t)(rows * cols), -size, size);
    const void *u0 = copy_of(u, u_bytes);
    float *v = random_array(MUONSHARD_FP32, lines, 0.0, 1.0), *factor = guarded(bytes);
    const float *v0 = copy_of(v, bytes);
    const variance_item item = {.u = u,
                                .u_dtype = dtype,
                                .v = v,
                                .factor = factor,
                                .rows = rows,
                                .cols = cols,
                                .by_rows = by_rows,
                                .tensor = TENSOR};
    ASSERT_LEFT_ALONE(host->ops->variance(host, &context, args, &item, 1), v, bytes);
    ASSERT_LEFT_ALONE(host->ops->variance(host, &context, args, &item, 1), factor, bytes);
    assert_int_equal(host->ops->variance(host, &context, args, &item, 1), MUONSHARD_OK);
    assert_same(u, u0, u_bytes, "U of variance");
    check_variance_item(args, &item, v0);
    release();
}

static void test_variance(void **state) {
    (void)state;
    static const double sizes[] = {1.0, 1e-6}, epsilons[] = {1e-10, 1e-2}; /* the last: floored */
    begin_step(3);
    for (int clamped = 0; clamped < 2; clamped++)
        for (int dtype = 0; dtype < DTYPES; dtype++)
            for (int by_rows = 0; by_rows < 2; by_rows++)
                for (size_t k = 0; k < SHAPES; k++)
                    for (int e = 0; e < 2; e++)
                        for (int s = 0; s < 2; s++) {
                            const variance_args args = {clamped ? VARIANCE_CLAMPED
                                                                : VARIANCE_SQRT_PLUS_EPS,
                                                        0.9, epsilons[e]};
                            check_variance(&args, (muonshard_dtype)dtype, by_rows, shapes[k][0],
                                           shapes[k][1], sizes[s]);
                        }
}

/* A zero matrix, or a line of one, gets factors that are finite, first step and fp32 underflow
 * included. */
static void test_variance_of_zero(void **state) {
    (void)state;
    begin_step(1);
    for (int variant = 0; variant < 16; variant++) {
        const bool by_rows = variant & 2, zero_line_only = variant & 4;
        float u[6] = {0.0f}, v[3] = {0.0f}, factor[3] = {NAN, NAN, NAN};
        if (zero_line_only) /* line 0 */
            for (int i = 1; i < (by_rows ? 3 : 2); i++)
                u[by_rows ? 2 * i + 1 : 2 + i] = 0.5f;
        const variance_args args = {variant & 1 ? VARIANCE_CLAMPED : VARIANCE_SQRT_PLUS_EPS, 0.95,
                                    variant & 8 ? 1e-30 : 1e-10};
        const variance_item item = {.u = u,
                                    .v = v,
                                    .factor = factor,
                                    .rows = 3,
                                    .cols = 2,
                                    .by_rows = by_rows,
                                    .tensor = TENSOR};
        host->ops->variance(host, &context, &args, &item, 1);
        for (int i = 0; i < (by_rows ? 3 : 2); i++)
            assert_true(isfinite(factor[i]));
        if (!zero_line_only)
            assert_true(v[0] == 0.0f && factor[0] * u[0] == 0.0f);
    }
}

/* ---- where an array is cut, no bit depends ---- */

/* One row is cut between any two columns, with its column factors. */
static void test_apply_in_pieces(void **state) {
    (void)state;
    begin_step(4);
    context.stochastic = true;
    context.seed = 99;
    const apply_args args = {DECAY_CAUTIOUS, DECAY_FORM_ADD, true};
    for (int dtype = 0; dtype < DTYPES; dtype++)
        for (size_t k = 0; k < CUTS; k++) {
            const size_t width = dtype_size((muonshard_dtype)dtype), cut = cuts[k];
            char *w = random_array((muonshard_dtype)dtype, LARGEST, -1.0, 1.0);
            char *w2 = copy_of(w, LARGEST * width);
            const uint16_t *u = random_array(MUONSHARD_BF16, LARGEST, -1.0, 1.0);
            const float *factor = random_array(MUONSHARD_FP32, LARGEST, 0.0, 2.0);
            apply_item whole = {.w = w,
                                .w_dtype = (muonshard_dtype)dtype,
                                .u = u,
                                .u_dtype = MUONSHARD_BF16,
                                .factor = factor,
                                .rows = 1,
                                .cols = LARGEST,
                                .scale = 0.3,
                                .tensor = TENSOR,
                                .first = 1234567};
            apply_item pieces[] = {whole, whole};
            pieces[0].w = w2;
            pieces[0].cols = (int64_t)cut;
            pieces[1].w = w2 + cut * width;
            pieces[1].u = u + cut;
            pieces[1].factor = factor + cut;
            pieces[1].cols = LARGEST - (int64_t)cut;
            pieces[1].first += cut;
            host->ops->apply(host, &context, &args, &whole, 1);
            host->ops->apply(host, &context, &args, pieces, 2);
            assert_same(w, w2, LARGEST * width, "W in pieces");
            release();
        }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_apply),           cmocka_unit_test(test_apply_storage),
        cmocka_unit_test(test_variance),        cmocka_unit_test(test_variance_of_zero),
        cmocka_unit_test(test_apply_in_pieces),
    };
    return cmocka_run_group_tests(tests, open_host, close_host);
}
