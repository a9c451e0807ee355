/* The GPT on a device against the GPT on the host: the same model, the same parameters, the same
 * windows. */
#include <dlfcn.h>
#include <unistd.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>
#include "gpt_device.h"

enum { ROOM = 4, SEQUENCES = 3, MESSAGE = 256 };

static const gpt_shape small = {.layers = 2, .width = 24, .heads = 3, .context = 17};

typedef struct pair {
    const gpt_layers *layers; /* own, as the models */
    gpt *host, *device;
    unsigned char *windows; /* [room, context + 1], own */
    int sequences;          /* of them in use */
    size_t count;           /* parameters */
} pair;

static uint64_t counter = 1;

/* Uniform in [-1, 1]. */
static double noise(void) {
    counter = counter * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return (double)(counter >> 11) * 0x1p-52 - 1.0;
}

static gpt_layers *open_layers(gpt_cuda_math math) {
    char message[MESSAGE] = "";
    gpt_layers *layers = gpt_device_open(math, -1, NULL, message, sizeof message);
    if (!layers)
        fail_msg("%s", message);
    return layers;
}

static const gpt_tensor *first_of(const gpt *model) {
    size_t count;
    return gpt_tensors(model, &count);
}

static void check_device(const pair *p) {
    if (gpt_error(p->device))
        fail_msg("%s", gpt_error(p->device));
}

/* Large enough that every part of the model matters: gains around 1, the rest up to 0.5. */
static void set_parameters(pair *p) {
    size_t count;
    const gpt_tensor *t = gpt_tensors(p->host, &count);
    for (size_t i = 0; i < count; i++) {
        const bool gain = i == GPT_ATTN_NORM || i == GPT_MLP_NORM || i == GPT_FINAL_NORM;
        for (size_t j = 0; j < t[i].count; j++)
            t[i].param[j] = (float)(gain ? 1.0 + 0.4 * noise() : 0.5 * noise());
    }
    p->layers->upload(p->layers->self, first_of(p->device)->param, t->param,
                      p->count * sizeof *t->param);
}

static pair open_pair(const gpt_shape *shape, int sequences, int room, gpt_cuda_math math) {
    pair p = {.layers = open_layers(math), .sequences = sequences};
    const size_t bytes = (size_t)room * ((size_t)shape->context + 1);
    p.host = gpt_create(shape, room, &gpt_host_layers);
    p.device = gpt_create(shape, room, p.layers);
    p.windows = malloc(bytes);
    assert_non_null(p.host);
    assert_non_null(p.device);
    assert_non_null(p.windows);
    p.count = gpt_parameter_count(p.host);
    for (size_t i = 0; i < bytes; i++)
        p.windows[i] = (unsigned char)((int)(128 + 128 * noise()) % 20 * 12 + 7);
    set_parameters(&p);
    return p;
}

static void close_pair(pair *p) {
    check_device(p);
    gpt_destroy(p->host);
    gpt_destroy(p->device);
    p->layers->close(p->layers->self);
    free(p->windows);
}

/* [count] of the device, own */
static float *gradients_of(const pair *p) {
    float *grads = malloc(p->count * sizeof *grads);
    assert_non_null(grads);
    p->layers->download(p->layers->self, grads, first_of(p->device)->grad,
                        p->count * sizeof *grads);
    check_device(p);
    return grads;
}

/* The largest relative difference of a tensor's gradient, in the Frobenius norm. */
static double gradient_difference(const pair *p) {
    float *grads = gradients_of(p);
    double worst = 0.0;
    size_t count;
    const gpt_tensor *t = gpt_tensors(p->host, &count);
    for (size_t i = 0; i < count; i++) {
        const float *other = grads + (t[i].grad - t[0].grad);
        double difference = 0.0, size = 0.0;
        for (size_t j = 0; j < t[i].count; j++) {
            difference += pow((double)t[i].grad[j] - (double)other[j], 2);
            size += pow((double)t[i].grad[j], 2);
        }
        assert_true(size > 0.0);
        const double relative = sqrt(difference / size);
        worst = relative > worst || isnan(relative) ? relative : worst;
    }
    free(grads);
    return worst;
}

/* Forward and backward on both; the relative difference of the losses. */
static double run_both(const pair *p, double scale, bool accumulate) {
    const double expected = gpt_forward(p->host, p->windows, p->sequences);
    const double loss = gpt_forward(p->device, p->windows, p->sequences);
    gpt_backward(p->host, scale, accumulate, NULL, NULL);
    gpt_backward(p->device, scale, accumulate, NULL, NULL);
    check_device(p);
    return fabs(loss - expected) / expected;
}

static void check_shape(const gpt_shape *shape, int sequences, int room) {
    pair p = open_pair(shape, sequences, room, GPT_MATH_FP32);
    const double loss = run_both(&p, 1.0, false), gradient = gradient_difference(&p);
    print_message("layers %d width %d heads %d context %d%s: loss %.1e gradient %.1e\n",
                  shape->layers, shape->width, shape->heads, shape->context,
                  shape->tied ? " tied" : "", loss, gradient);
    assert_true(loss <= 2e-6);
    assert_true(gradient <= 2e-5);
    close_pair(&p);
}

static void shapes(void **state) {
    (void)state;
    for (int tied = 0; tied < 2; tied++) {
        gpt_shape shape = small;
        shape.tied = tied;
        check_shape(&shape, SEQUENCES, ROOM);
        shape = (gpt_shape){.layers = 1, .width = 21, .heads = 1, .context = 19, .tied = tied};
        check_shape(&shape, 1, 1);
    }
    check_shape(&(gpt_shape){.layers = 3, .width = 32, .heads = 8, .context = 16}, 2, 2);
    check_shape(&(gpt_shape){.layers = 1, .width = 8, .heads = 2, .context = 1}, 2, 3);
    /* More positions than blocks that sum the loss, and uneven runs of rows */
    check_shape(&(gpt_shape){.layers = 1, .width = 8, .heads = 2, .context = 131}, 8, 9);
}

static void initial_parameters(void **state) {
    (void)state;
    pair p = open_pair(&small, SEQUENCES, ROOM, GPT_MATH_FP32);
    float *params = malloc(p.count * sizeof *params);
    assert_non_null(params);
    gpt_init(p.host, 7);
    gpt_init(p.device, 7);
    p.layers->download(p.layers->self, params, first_of(p.device)->param, p.count * sizeof *params);
    assert_memory_equal(params, first_of(p.host)->param, p.count * sizeof *params);
    free(params);
    close_pair(&p);
}

static void accumulates(void **state) {
    (void)state;
    pair p = open_pair(&small, SEQUENCES, ROOM, GPT_MATH_FP32);
    run_both(&p, 3.0, true);
    run_both(&p, 1.0, false);
    p.windows += 5;
    p.sequences--;
    run_both(&p, 0.5, true);
    p.windows -= 5;
    const double gradient = gradient_difference(&p);
    print_message("accumulated: gradient %.1e\n", gradient);
    assert_true(gradient <= 2e-5);
    close_pair(&p);
}

/* On the parameters training begins with: rounding grows with the large ones of set_parameters
 * (2.9e-2 in bf16). */
static void rounded_products(void **state) {
    (void)state;
    const gpt_cuda_math maths[] = {GPT_MATH_TF32, GPT_MATH_BF16};
    const double bounds[] = {5e-3, 2e-2};
    for (int i = 0; i < 2; i++) {
        pair p = open_pair(&small, SEQUENCES, ROOM, maths[i]);
        gpt_init(p.host, 7);
        gpt_init(p.device, 7);
        const double loss = run_both(&p, 1.0, false), gradient = gradient_difference(&p);
        print_message("%s: loss %.1e gradient %.1e\n", i ? "bf16" : "tf32", loss, gradient);
        assert_true(gradient <= bounds[i]);
        assert_true(gradient >= 1e-4); /* it is what was asked for */
        close_pair(&p);
    }
}

typedef struct calls {
    size_t tensor[64];
    int64_t first[64];
    int count;
} calls;

static void note(void *user, size_t tensor, int64_t first, int64_t n) {
    calls *c = user;
    assert_int_equal(n, 1);
    c->tensor[c->count] = tensor;
    c->first[c->count++] = first;
}

static void ready_order(void **state) {
    (void)state;
    for (int tied = 0; tied < 2; tied++) {
        gpt_shape shape = small;
        shape.tied = tied;
        pair p = open_pair(&shape, SEQUENCES, ROOM, GPT_MATH_FP32);
        calls host = {0}, device = {0};
        run_both(&p, 1.0, false);
        gpt_forward(p.host, p.windows, p.sequences);
        gpt_forward(p.device, p.windows, p.sequences);
        gpt_backward(p.host, 1.0, false, note, &host);
        gpt_backward(p.device, 1.0, false, note, &device);
        assert_true(host.count > 10);
        assert_memory_equal(&host, &device, sizeof host);
        close_pair(&p);
    }
}

static void same_bits(void **state) {
    (void)state;
    pair p = open_pair(&small, SEQUENCES, ROOM, GPT_MATH_BF16);
    const double loss = gpt_forward(p.device, p.windows, p.sequences);
    gpt_backward(p.device, 1.0, false, NULL, NULL);
    float *once = gradients_of(&p);
    gpt_forward(p.device, p.windows + 3, 2); /* what is left of other windows doesn't matter */
    assert_true(gpt_forward(p.device, p.windows, p.sequences) == loss);
    gpt_backward(p.device, 1.0, false, NULL, NULL);
    float *twice = gradients_of(&p);
    assert_memory_equal(once, twice, p.count * sizeof *once);
    free(once);
    free(twice);
    close_pair(&p);
}

/* A NaN parameter must show: the optimizer skips on it. */
static void nan_shows(void **state) {
    (void)state;
    const size_t where[] = {GPT_QKV, GPT_MLP_UP, GPT_MLP_DOWN, GPT_HEAD};
    for (size_t i = 0; i < sizeof where / sizeof *where; i++) {
        pair p = open_pair(&small, SEQUENCES, ROOM, GPT_MATH_FP32);
        const float bad = NAN;
        const gpt_tensor *t = first_of(p.device);
        p.layers->upload(p.layers->self, t[where[i]].param, &bad, sizeof bad);
        assert_true(isnan(gpt_forward(p.device, p.windows, p.sequences)));
        gpt_backward(p.device, 1.0, false, NULL, NULL);
        float *grads = gradients_of(&p);
        assert_true(isnan(grads[t[GPT_QKV].grad - t[0].grad]));
        free(grads);
        close_pair(&p);
    }
}

/* ---- what the fake can tell ---- */

typedef struct fake {
    void (*fail_at)(long n);
    long (*calls)(void), (*waits)(void), (*allocations)(void);
    int (*live)(void);
} fake;

static fake find_fake(void) {
    fake f;
    void *library = dlopen("libfake_cuda_runtime.so", RTLD_NOW | RTLD_NOLOAD);
    if (!library && access("/dev/nvidiactl", F_OK) == 0)
        skip(); /* a card tells nothing of the kind */
    assert_non_null(library);
    *(void **)&f.fail_at = dlsym(library, "fake_cuda_fail_at");
    *(void **)&f.calls = dlsym(library, "fake_cuda_calls");
    *(void **)&f.waits = dlsym(library, "fake_cuda_waits");
    *(void **)&f.allocations = dlsym(library, "fake_cuda_allocations");
    *(void **)&f.live = dlsym(library, "fake_cuda_live");
    assert_true(f.fail_at && f.calls && f.waits && f.allocations && f.live);
    return f;
}

/* One wait a forward pass, for the loss; none in a backward pass; memory is all there from the
 * beginning. */
static void waits(void **state) {
    (void)state;
    pair p = open_pair(&small, SEQUENCES, ROOM, GPT_MATH_FP32);
    const fake f = find_fake();
    const long allocations = f.allocations();
    for (int i = 0; i < 3; i++) {
        const long before = f.waits();
        gpt_forward(p.device, p.windows, p.sequences);
        assert_int_equal(f.waits(), before + 1);
        gpt_backward(p.device, 1.0, i > 0, NULL, NULL);
        assert_int_equal(f.waits(), before + 1);
    }
    assert_int_equal(f.allocations(), allocations);
    close_pair(&p);
}

/* Whichever call fails: an error that stays, a loss that is NaN from then on, and nothing is left
 * behind. */
static void failures(void **state) {
    (void)state;
    const gpt_shape shape = {.layers = 1, .width = 8, .heads = 2, .context = 4};
    unsigned char windows[5] = "abcd";
    char message[MESSAGE] = "";
    gpt_layers *first = open_layers(GPT_MATH_FP32);
    const fake f = find_fake();
    first->close(first->self);
    const int live = f.live();
    long n = 1;
    for (bool failed = true; failed; n++) {
        f.fail_at(n);
        gpt_layers *layers = gpt_device_open(GPT_MATH_FP32, 0, NULL, message, sizeof message);
        gpt *model = layers ? gpt_create(&shape, 1, layers) : NULL;
        double loss = NAN;
        if (model) {
            gpt_forward(model, windows, 1);
            gpt_backward(model, 1.0, false, NULL, NULL);
            loss = gpt_forward(model, windows, 1);
        }
        failed = !model || gpt_error(model);
        assert_int_equal(failed, isnan(loss));
        assert_int_equal(failed && !layers, message[0] != '\0');
        if (layers && failed)
            assert_non_null(layers->error(layers->self));
        gpt_destroy(model);
        if (layers)
            layers->close(layers->self);
        message[0] = '\0';
        assert_int_equal(f.live(), live);
    }
    f.fail_at(0);
    print_message("%ld calls that can fail\n", n - 2);
    assert_true(n > 150);
}

static void no_such_device(void **state) {
    (void)state;
    char message[MESSAGE] = "";
    assert_null(gpt_device_open(GPT_MATH_FP32, 99, NULL, message, sizeof message));
    assert_non_null(strstr(message, "no GPT on CUDA: "));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(shapes),      cmocka_unit_test(initial_parameters),
        cmocka_unit_test(accumulates), cmocka_unit_test(rounded_products),
        cmocka_unit_test(ready_order), cmocka_unit_test(same_bits),
        cmocka_unit_test(nan_shows),   cmocka_unit_test(waits),
        cmocka_unit_test(failures),    cmocka_unit_test(no_such_device),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
