/* The model built in fp64: its loss against a second implementation, its gradient against central
 * differences of that loss. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <cmocka.h>
#include "gpt_reference.h"

enum { SEQUENCES = 3, ENTRIES = 8 };

static uint64_t counter = 1;

/* Uniform in [-1, 1]. */
static double noise(void) {
    counter = counter * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return (double)(counter >> 11) * 0x1p-52 - 1.0;
}

/* Parameters large enough that every part of the model matters: gains around 1, the rest up to 0.6.
 */
static gpt *random_model(const gpt_shape *shape, unsigned char *windows) {
    gpt *model = gpt_create(shape, SEQUENCES, &gpt_host_layers);
    assert_non_null(model);
    size_t count;
    const gpt_tensor *tensors = gpt_tensors(model, &count);
    assert_int_equal(count, shape->tied ? 9 : 10);
    for (size_t i = 0; i < count; i++) {
        bool gain = i == GPT_ATTN_NORM || i == GPT_MLP_NORM || i == GPT_FINAL_NORM;
        for (size_t j = 0; j < tensors[i].count; j++)
            tensors[i].param[j] = gain ? 1 + 0.4 * noise() : 0.6 * noise();
    }
    for (int i = 0; i < SEQUENCES * (shape->context + 1); i++)
        windows[i] = (unsigned char)((int)(128 + 128 * noise()) % 20 * 12 + 7);
    return model;
}

/* f'(x) with an error of order h^4. */
static double slope(const gpt *model, const gpt_shape *shape, const unsigned char *windows,
                    gpt_real *x) {
    const double h = 1e-3, at = *x, steps[4] = {-2, -1, 1, 2}, weights[4] = {1, -8, 8, -1};
    double sum = 0.0;
    for (int i = 0; i < 4; i++) {
        *x = at + steps[i] * h;
        sum += weights[i] * gpt_reference_loss(model, shape, windows, SEQUENCES);
    }
    *x = at;
    return sum / (12 * h);
}

static void check_gradient(const gpt_shape *shape) {
    unsigned char windows[SEQUENCES * 64];
    gpt *model = random_model(shape, windows);
    size_t count;
    const gpt_tensor *tensors = gpt_tensors(model, &count);
    double loss = gpt_forward(model, windows, SEQUENCES);
    assert_true(fabs(loss - gpt_reference_loss(model, shape, windows, SEQUENCES)) < 1e-12 * loss);
    gpt_backward(model, 1.0, false, NULL, NULL);
    for (size_t i = 0; i < count; i++) {
        double largest = 0.0;
        for (size_t j = 0; j < tensors[i].count; j++)
            largest = fmax(largest, fabs(tensors[i].grad[j]));
        assert_true(largest > 1e-3);
        for (int n = 0; n < ENTRIES; n++) {
            size_t j = (size_t)(0.5 * (1 + noise()) * (double)tensors[i].count);
            /* Rows of bytes that occur, else the embedding's entries are mostly zero. */
            if (i == GPT_TOKEN_EMBEDDING)
                j = windows[n % shape->context] * (size_t)shape->width + j % (size_t)shape->width;
            double expected = slope(model, shape, windows, &tensors[i].param[j]);
            double error = fabs(tensors[i].grad[j] - expected);
            if (error > 1e-6 * fmax(fabs(expected), 1e-2 * largest))
                fail_msg("%s[%zu]: gradient %.12g, differences %.12g", tensors[i].name, j,
                         tensors[i].grad[j], expected);
        }
    }
    gpt_destroy(model);
}

static void untied(void **state) {
    (void)state;
    check_gradient(&(gpt_shape){.layers = 2, .width = 12, .heads = 3, .context = 9});
}

static void tied(void **state) {
    (void)state;
    check_gradient(&(gpt_shape){.layers = 2, .width = 12, .heads = 3, .context = 9, .tied = true});
}

/* Widths above and not a multiple of the partial sums' 16 lanes; one head; one position. */
static void other_sizes(void **state) {
    (void)state;
    check_gradient(&(gpt_shape){.layers = 1, .width = 21, .heads = 1, .context = 19});
    check_gradient(&(gpt_shape){.layers = 3, .width = 32, .heads = 8, .context = 17, .tied = true});
}

static void one_position(void **state) {
    (void)state;
    const gpt_shape shape = {.layers = 1, .width = 8, .heads = 2, .context = 1};
    unsigned char windows[SEQUENCES * 2];
    gpt *model = random_model(&shape, windows);
    double loss = gpt_forward(model, windows, SEQUENCES);
    assert_true(fabs(loss - gpt_reference_loss(model, &shape, windows, SEQUENCES)) < 1e-12 * loss);
    gpt_destroy(model);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(untied),
        cmocka_unit_test(tied),
        cmocka_unit_test(other_sizes),
        cmocka_unit_test(one_position),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
