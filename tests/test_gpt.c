/* The model as it trains, in fp32. Its gradient is checked in test_gpt_gradient. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>
#include "gpt_reference.h"

static const gpt_shape small = {.layers = 2, .width = 32, .heads = 4, .context = 24};
enum { SEQUENCES = 4, WINDOW = 25 };

static const unsigned char *text(void) {
    static const char words[] = "It is a truth universally acknowledged, that a single man in "
                                "possession of a good fortune, must be in want of a wife.";
    _Static_assert(sizeof words > SEQUENCES * WINDOW, "a batch");
    return (const unsigned char *)words;
}

static gpt *new_model(const gpt_shape *shape) {
    gpt *model = gpt_create(shape, SEQUENCES, &gpt_host_layers);
    assert_non_null(model);
    gpt_init(model, 7);
    return model;
}

/* Parameters and gradients lie in one piece each, in the order of the table. */
static void arenas(void **state) {
    (void)state;
    for (int tied = 0; tied < 2; tied++) {
        gpt_shape shape = small;
        shape.tied = tied;
        gpt *model = new_model(&shape);
        size_t count, total = 0;
        const gpt_tensor *t = gpt_tensors(model, &count);
        for (size_t i = 0; i < count; i++) {
            assert_ptr_equal(t[i].param, t[0].param + total);
            assert_ptr_equal(t[i].grad, t[0].grad + total);
            total += t[i].count;
        }
        assert_int_equal(total, gpt_parameter_count(model));
        /* 12 C^2 and two gains a block, embeddings, final gain, head */
        assert_int_equal(total,
                         2 * (12 * 32 * 32 + 2 * 32) + (256 + 24 + 1) * 32 + (tied ? 0 : 256 * 32));
        assert_int_equal(t[GPT_QKV].row_split_count, 3);
        assert_int_equal(t[GPT_QKV].row_splits[0] + t[GPT_QKV].row_splits[1] +
                             t[GPT_QKV].row_splits[2],
                         t[GPT_QKV].shape[1]);
        gpt_destroy(model);
    }
}

static double deviation(const gpt_tensor *t) {
    double sum = 0.0;
    for (size_t i = 0; i < t->count; i++)
        sum += (double)t->param[i] * (double)t->param[i];
    return sqrt(sum / (double)t->count);
}

static void initial_parameters(void **state) {
    (void)state;
    gpt *a = new_model(&small), *b = new_model(&small);
    size_t count, bytes = gpt_parameter_count(a) * sizeof(gpt_real);
    const gpt_tensor *t = gpt_tensors(a, &count), *u = gpt_tensors(b, &count);
    assert_memory_equal(t[0].param, u[0].param, bytes);
    gpt_init(b, 8);
    assert_memory_not_equal(t[0].param, u[0].param, bytes);
    /* A deviation estimated from n numbers is within 5/sqrt(2 n) of the true one. */
    const double qkv = 1 / sqrt((double)small.width);
    const double down = 1 / sqrt(4.0 * small.width * 2.0 * small.layers);
    assert_true(fabs(deviation(&t[GPT_QKV]) / qkv - 1) < 5 / sqrt(2.0 * (double)t[GPT_QKV].count));
    assert_true(fabs(deviation(&t[GPT_MLP_DOWN]) / down - 1) <
                5 / sqrt(2.0 * (double)t[GPT_MLP_DOWN].count));
    assert_true(fabs(deviation(&t[GPT_HEAD]) / 0.02 - 1) <
                5 / sqrt(2.0 * (double)t[GPT_HEAD].count));
    assert_true(t[GPT_FINAL_NORM].param[31] == 1.0f);
    gpt_destroy(a);
    gpt_destroy(b);
}

/* fp32 against the fp64 reference on large parameters: rounding only, in exponentials too. */
static void loss_of_definition(void **state) {
    (void)state;
    gpt *model = new_model(&small);
    size_t count;
    const gpt_tensor *t = gpt_tensors(model, &count);
    for (size_t i = 0; i < count; i++)
        for (size_t j = 0; j < t[i].count; j++)
            t[i].param[j] *= t[i].param[j] == 1.0f ? 1.0f : i == GPT_HEAD ? 15.0f : 2.0f;
    double loss = gpt_forward(model, text(), SEQUENCES);
    double expected = gpt_reference_loss(model, &small, text(), SEQUENCES);
    assert_true(expected > 6.0);
    assert_true(fabs(loss - expected) < 3e-6 * expected);
    gpt_destroy(model);
}

/* Plain Adam on four sequences: the model must learn them by heart. */
static void overfits(void **state) {
    (void)state;
    gpt *model = new_model(&small);
    size_t tensors, count = gpt_parameter_count(model);
    const gpt_tensor *t = gpt_tensors(model, &tensors);
    float *m = calloc(2 * count, sizeof *m), *v = m + count;
    assert_non_null(m);
    double first = 0.0, loss = 0.0;
    for (int step = 1; step <= 150; step++) {
        loss = gpt_forward(model, text(), SEQUENCES);
        first = step == 1 ? loss : first;
        gpt_backward(model, 1.0, false, NULL, NULL);
        for (size_t i = 0; i < count; i++) {
            float g = t[0].grad[i];
            m[i] = 0.9f * m[i] + 0.1f * g;
            v[i] = 0.95f * v[i] + 0.05f * g * g;
            t[0].param[i] -= 3e-3f * m[i] / (sqrtf(v[i]) + 1e-8f);
        }
    }
    assert_true(fabs(first - log(256.0)) < 0.1);
    assert_true(loss < 0.05);
    free(m);
    gpt_destroy(model);
}

/* Two halves accumulated with factor 1/2 are the whole; and accumulate = false forgets what was
 * there. */
static void accumulates(void **state) {
    (void)state;
    gpt *whole = new_model(&small), *halves = new_model(&small);
    size_t tensors, count = gpt_parameter_count(whole);
    const float *a = gpt_tensors(whole, &tensors)[0].grad,
                *b = gpt_tensors(halves, &tensors)[0].grad;
    double loss = gpt_forward(whole, text(), SEQUENCES), sum = 0.0;
    gpt_backward(whole, 1.0, false, NULL, NULL);
    gpt_forward(halves, text() + 11, SEQUENCES);
    gpt_backward(halves, 1.0, true, NULL, NULL);
    for (int half = 0; half < 2; half++) {
        sum += gpt_forward(halves, text() + half * (SEQUENCES / 2) * WINDOW, SEQUENCES / 2);
        gpt_backward(halves, 0.5, half > 0, NULL, NULL);
    }
    assert_true(fabs(0.5 * sum - loss) < 1e-6 * loss);
    double difference = 0.0, size = 0.0;
    for (size_t i = 0; i < count; i++) {
        difference += pow((double)a[i] - (double)b[i], 2);
        size += pow((double)a[i], 2);
    }
    assert_true(size > 1e-2);
    assert_true(sqrt(difference / size) < 2e-6);
    gpt_destroy(whole);
    gpt_destroy(halves);
}

typedef struct calls {
    const gpt_tensor *tensors;
    int ready[GPT_TENSOR_MAX][8];
    int64_t last_layer;
    int count, mark[GPT_TENSOR_MAX];
    float *snapshot; /* of the gradients of the first entry announced as ready */
    size_t first_tensor;
} calls;

static void note(void *user, size_t tensor, int64_t first, int64_t n) {
    calls *c = user;
    const gpt_tensor *t = &c->tensors[tensor];
    size_t entry = t->count / (size_t)t->entries;
    assert_int_equal(n, 1);
    assert_true(first >= 0 && first < t->entries);
    c->ready[tensor][first]++;
    c->mark[tensor] = c->count++;
    if (t->role == MUONSHARD_ROLE_MATRIX) {
        assert_true(first <= c->last_layer);
        c->last_layer = first;
    }
    memcpy(c->snapshot + (t->grad - c->tensors[0].grad) + (size_t)first * entry,
           t->grad + (size_t)first * entry, entry * sizeof(float));
}

/* Every entry once, layers downwards, and what was announced does not change any more. */
static void ready_calls(void **state) {
    (void)state;
    for (int tied = 0; tied < 2; tied++) {
        gpt_shape shape = small;
        shape.tied = tied;
        gpt *model = new_model(&shape);
        size_t count;
        calls c = {.tensors = gpt_tensors(model, &count), .last_layer = shape.layers - 1};
        c.snapshot = calloc(gpt_parameter_count(model), sizeof(float));
        assert_non_null(c.snapshot);
        gpt_forward(model, text(), SEQUENCES);
        gpt_backward(model, 1.0, false, note, &c);
        for (size_t i = 0; i < count; i++)
            for (int e = 0; e < 8; e++)
                assert_int_equal(c.ready[i][e], e < c.tensors[i].entries);
        assert_memory_equal(c.snapshot, c.tensors[0].grad,
                            gpt_parameter_count(model) * sizeof(float));
        /* The last block's gradients are there before the first block's. */
        assert_true(c.mark[GPT_FINAL_NORM] < c.mark[GPT_MLP_DOWN]);
        assert_true(c.mark[GPT_MLP_DOWN] < c.mark[GPT_QKV]);
        assert_int_equal(c.mark[GPT_TOKEN_EMBEDDING], c.count - 1);
        free(c.snapshot);
        gpt_destroy(model);
    }
}

/* A NaN parameter must show: the optimizer skips on it. */
static void nan_shows(void **state) {
    (void)state;
    const size_t where[] = {GPT_TOKEN_EMBEDDING, GPT_QKV, GPT_MLP_UP, GPT_MLP_DOWN, GPT_HEAD};
    for (size_t i = 0; i < sizeof where / sizeof *where; i++) {
        gpt *model = new_model(&small);
        size_t count;
        const gpt_tensor *t = gpt_tensors(model, &count);
        /* of a byte that occurs */
        t[where[i]].param[where[i] == GPT_TOKEN_EMBEDDING ? 'I' * 32 : 0] = NAN;
        assert_true(isnan(gpt_forward(model, text(), SEQUENCES)));
        gpt_backward(model, 1.0, false, NULL, NULL);
        assert_true(isnan(t[GPT_QKV].grad[0]));
        gpt_destroy(model);
    }
}

static void bad_shapes(void **state) {
    (void)state;
    const gpt_shape bad[] = {
        {.layers = 0, .width = 8, .heads = 2, .context = 4},
        {.layers = 1, .width = 9, .heads = 2, .context = 4},
        {.layers = 1, .width = 8, .heads = 0, .context = 4},
        {.layers = 1, .width = 8, .heads = 2, .context = 0},
        {.layers = 1 << 20, .width = 8, .heads = 2, .context = 4},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        assert_non_null(gpt_shape_error(&bad[i]));
        assert_null(gpt_create(&bad[i], 1, &gpt_host_layers));
    }
    assert_null(gpt_shape_error(&small));
    assert_null(gpt_create(&small, 0, &gpt_host_layers));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(arenas),      cmocka_unit_test(initial_parameters),
        cmocka_unit_test(overfits),    cmocka_unit_test(loss_of_definition),
        cmocka_unit_test(accumulates), cmocka_unit_test(ready_calls),
        cmocka_unit_test(nan_shows),   cmocka_unit_test(bad_shapes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
