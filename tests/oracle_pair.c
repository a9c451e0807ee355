#include "oracle_pair.h"

#include <stdarg.h>
#include <setjmp.h>
#include <cmocka.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

static void *allocated(size_t count, size_t size) {
    void *memory = calloc(count, size);
    assert_non_null(memory);
    return memory;
}

static void assert_ok(muonshard_status status, const char *what, const char *message) {
    if (status != MUONSHARD_OK)
        fail_msg("%s: %s: %s", what, muonshard_status_string(status), message);
}

/* The upper half of an fp32 is a bf16. */
static uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static void narrow(uint16_t *to, const float *from, size_t count) {
    for (size_t i = 0; to != NULL && i < count; i++) {
        assert_int_equal(bits_of(from[i]) & 0xffff, 0);
        to[i] = (uint16_t)(bits_of(from[i]) >> 16);
    }
}

static void widen(float *to, const uint16_t *from, size_t count) {
    for (size_t i = 0; from != NULL && i < count; i++) {
        const uint32_t bits = (uint32_t)from[i] << 16;
        memcpy(&to[i], &bits, sizeof bits);
    }
}

static float rounded(double x, muonshard_dtype dtype) {
    return (float)oracle_round(dtype == MUONSHARD_BF16 ? ORACLE_BF16 : ORACLE_FP32, x);
}

static void add_to_oracle(oracle *o, const pair_tensor *t, double lr_multiplier,
                          double decay_multiplier, const float *w0) {
    oracle_tensor tensor = {
        .elementwise = t->role == MUONSHARD_ROLE_ELEMENTWISE,
        .flatten = t->form == MUONSHARD_FLATTEN,
        .skip_if_null = t->null_grad == MUONSHARD_NULL_GRAD_SKIP,
        .dims = t->dims,
        .splits = t->split_count > 0 ? t->splits : NULL,
        .split_count = t->split_count,
        .lr_multiplier = lr_multiplier,
        .decay_multiplier = decay_multiplier,
        .group = t->group,
    };
    memcpy(tensor.shape, t->shape, sizeof t->shape);
    oracle_add(o, &tensor, w0);
}

/* As the library has them. */
static void *params_of(const pair *p, size_t k) {
    return p->narrow_params[k] ? (void *)p->narrow_params[k] : p->params[k];
}

static void *grads_of(const pair *p, size_t k) {
    return p->narrow_grads[k] ? (void *)p->narrow_grads[k] : p->grads[k];
}

static void add(pair *p, size_t k) {
    const pair_tensor *t = &p->tensors[k];
    muonshard_tensor_desc desc = MUONSHARD_TENSOR_DESC_INIT;
    desc.name = t->name;
    desc.role = t->role;
    desc.form = t->form;
    desc.dims = t->dims;
    size_t elements = 1;
    for (int i = 0; i < t->dims; i++) {
        desc.shape[i] = t->shape[i];
        elements *= (size_t)t->shape[i];
    }
    if (t->split_count > 0) {
        desc.row_splits = t->splits;
        desc.row_split_count = t->split_count;
    }
    bool multiplied = t->lr_multiplier > 0.0 || t->decay_multiplier > 0.0;
    desc.lr_multiplier = multiplied ? t->lr_multiplier : 1.0;
    desc.decay_multiplier = multiplied ? t->decay_multiplier : 1.0;
    desc.group = t->group;
    desc.null_grad = t->null_grad;

    p->elements[k] = elements;
    p->start[k] = allocated(elements, sizeof(float));
    p->params[k] = allocated(elements, sizeof(float));
    p->grads[k] = allocated(elements, sizeof(float));
    p->grads_before[k] = allocated(elements, sizeof(float));
    for (size_t i = 0; i < elements; i++)
        p->start[k][i] = p->params[k][i] = rounded(0.02 * oracle_normal(&p->rng), t->dtype);
    if (t->dtype == MUONSHARD_BF16)
        p->narrow_params[k] = allocated(elements, sizeof(uint16_t));
    if (t->grad_dtype == MUONSHARD_BF16)
        p->narrow_grads[k] = allocated(elements, sizeof(uint16_t));
    narrow(p->narrow_params[k], p->params[k], elements);
    desc.dtype = t->dtype;
    desc.grad_dtype = t->grad_dtype;
    desc.param = images_add(&p->images, params_of(p, k), elements * (p->narrow_params[k] ? 2 : 4));
    desc.grad = images_add(&p->images, grads_of(p, k), elements * (p->narrow_grads[k] ? 2 : 4));
    int id = -1;
    assert_ok(muonshard_add_tensor(p->optimizer, &desc, &id), t->name,
              muonshard_last_error(p->optimizer));
    assert_int_equal(id, (int)k);
    add_to_oracle(&p->exact, t, desc.lr_multiplier, desc.decay_multiplier, p->start[k]);
    add_to_oracle(&p->rounded, t, desc.lr_multiplier, desc.decay_multiplier, p->start[k]);
}

void pair_open(pair *p, const char *yaml, const oracle_preset *preset, const pair_tensor *tensors,
               size_t count, uint64_t seed) {
    memset(p, 0, sizeof *p);
    p->tensors = tensors;
    p->count = count;
    p->rng.state = seed;
    p->elements = allocated(count, sizeof *p->elements);
    p->start = allocated(count, sizeof *p->start);
    p->params = allocated(count, sizeof *p->params);
    p->grads = allocated(count, sizeof *p->grads);
    p->grads_before = allocated(count, sizeof *p->grads_before);
    p->narrow_params = allocated(count, sizeof *p->narrow_params);
    p->narrow_grads = allocated(count, sizeof *p->narrow_grads);
    p->absent = allocated(count, sizeof *p->absent);
    p->exact = oracle_open(preset, false);
    p->rounded = oracle_open(preset, true);

    muonshard_config *config = NULL;
    assert_ok(muonshard_config_create(&config), "config", "");
    assert_ok(muonshard_config_load_string(config, yaml), yaml,
              muonshard_config_last_error(config));
    images_configure(config);
    assert_ok(muonshard_comm_create_self(NULL, &p->comm), "communicator", "");
    assert_ok(muonshard_create(p->comm, config, NULL, &p->optimizer), "create",
              muonshard_comm_last_error(p->comm));
    muonshard_config_destroy(config);
    p->images.optimizer = p->optimizer;
    for (size_t k = 0; k < count; k++)
        add(p, k);
    assert_ok(muonshard_commit(p->optimizer, MUONSHARD_SYNC_CHECK), "commit",
              muonshard_last_error(p->optimizer));
}

void pair_close(pair *p) {
    images_close(&p->images);
    muonshard_destroy(p->optimizer);
    muonshard_comm_destroy(p->comm);
    oracle_close(&p->exact);
    oracle_close(&p->rounded);
    for (size_t k = 0; k < p->count; k++) {
        free(p->start[k]);
        free(p->params[k]);
        free(p->grads[k]);
        free(p->grads_before[k]);
        free(p->narrow_params[k]);
        free(p->narrow_grads[k]);
    }
    free(p->elements);
    free(p->start);
    free(p->params);
    free(p->grads);
    free(p->grads_before);
    free(p->narrow_params);
    free(p->narrow_grads);
    free(p->absent);
    memset(p, 0, sizeof *p);
}

void pair_set_absent(pair *p, size_t tensor, bool absent) {
    p->absent[tensor] = absent;
    const void *grad = images_of(&p->images, grads_of(p, tensor));
    assert_ok(muonshard_set_grad(p->optimizer, (int)tensor, absent ? NULL : grad), "set_grad",
              muonshard_last_error(p->optimizer));
}

void pair_new_gradients(pair *p) {
    for (size_t k = 0; k < p->count; k++) {
        double size = p->tensors[k].grad_size * pow(10.0, 2.0 * oracle_uniform(&p->rng) - 1.0);
        for (size_t i = 0; i < p->elements[k]; i++) {
            double entry = size;
            if (p->tensors[k].grad_size == 0.0)
                entry = pow(10.0, -12.0 * oracle_uniform(&p->rng));
            p->grads[k][i] = rounded(entry * oracle_normal(&p->rng), p->tensors[k].grad_dtype);
        }
    }
}

void pair_step_library(pair *p, const muonshard_step_args *args) {
    for (size_t k = 0; k < p->count; k++) {
        memcpy(p->grads_before[k], p->grads[k], p->elements[k] * sizeof(float));
        narrow(p->narrow_grads[k], p->grads[k], p->elements[k]);
        assert_ok(images_upload(&p->images, grads_of(p, k)), "upload", "");
    }
    assert_ok(muonshard_step(p->optimizer, args), "step", muonshard_last_error(p->optimizer));
    p->result = (muonshard_step_result_info)MUONSHARD_STEP_RESULT_INIT;
    assert_ok(muonshard_step_result(p->optimizer, 0, 1, &p->result), "step_result",
              muonshard_last_error(p->optimizer));
    for (size_t k = 0; k < p->count; k++) {
        assert_ok(images_download(&p->images, params_of(p, k)), "download", "");
        assert_ok(images_download(&p->images, grads_of(p, k)), "download", "");
        widen(p->params[k], p->narrow_params[k], p->elements[k]);
        widen(p->grads[k], p->narrow_grads[k], p->elements[k]);
        if (memcmp(p->grads_before[k], p->grads[k], p->elements[k] * sizeof(float)) != 0)
            fail_msg("step %lld wrote to the gradient of %s", (long long)p->result.step,
                     p->tensors[k].name);
    }
}

void pair_step(pair *p, const muonshard_step_args *args) {
    pair_step_library(p, args);
    oracle_step_args same = {NAN, NAN, NAN, NAN, NAN, 1.0, 1.0, NULL, 0};
    oracle_group groups[8];
    if (args != NULL) {
        same = (oracle_step_args){args->lr,
                                  args->momentum,
                                  args->weight_decay,
                                  args->adam_lr,
                                  args->adam_weight_decay,
                                  args->lr_factor,
                                  args->grad_scale,
                                  groups,
                                  args->group_count};
        assert_true(args->group_count <= sizeof groups / sizeof groups[0]);
        for (size_t i = 0; i < args->group_count; i++)
            groups[i] = (oracle_group){args->groups[i].lr, args->groups[i].momentum,
                                       args->groups[i].weight_decay};
    }
    const float **grads = allocated(p->count, sizeof *grads);
    for (size_t k = 0; k < p->count; k++)
        grads[k] = p->absent[k] ? NULL : p->grads[k];
    oracle_outcome outcome = oracle_step(&p->exact, &same, grads, 1);
    oracle_step(&p->rounded, &same, grads, 1);
    free(grads);
    assert_int_equal(p->result.skipped, outcome.skipped);
    assert_int_equal(p->result.count, p->exact.t);
    if (outcome.skipped)
        return;
    if (!(fabs(p->result.grad_norm - outcome.grad_norm) <= 1e-6 * outcome.grad_norm))
        fail_msg("step %lld: grad_norm %.9g, expected %.9g", (long long)p->result.step,
                 p->result.grad_norm, outcome.grad_norm);
    if (!(fabs(p->result.clip_factor - outcome.clip_factor) <= 1e-6))
        fail_msg("step %lld: clip_factor %.9g, expected %.9g", (long long)p->result.step,
                 p->result.clip_factor, outcome.clip_factor);
}

double pair_error(const pair *p, const oracle *o, size_t tensor) {
    size_t count = p->elements[tensor];
    double *got = allocated(count, sizeof *got), *expected = allocated(count, sizeof *expected);
    for (size_t i = 0; i < count; i++) {
        double start = (double)p->start[tensor][i];
        got[i] = (double)p->params[tensor][i] - start;
        expected[i] = o->tensors[tensor].w[i] - start;
    }
    double error = oracle_relative_error(got, expected, count);
    free(got);
    free(expected);
    return error;
}

void pair_check(const pair *p, const char *what, double tolerance_exact, double tolerance_rounded,
                double worst[2]) {
    const oracle *const oracles[2] = {&p->exact, &p->rounded};
    const double tolerance[2] = {tolerance_exact, tolerance_rounded};
    static const char *const storage[2] = {"fp64", "fp32"};
    for (size_t k = 0; k < p->count; k++) {
        for (int i = 0; i < 2; i++) {
            double error = pair_error(p, oracles[i], k);
            if (!(error <= tolerance[i]))
                fail_msg(
                    "%s, tensor %s, step %lld: displacement is off by %.3e of its size against "
                    "the oracle with %s parameters; %.1e is allowed",
                    what, p->tensors[k].name, (long long)p->result.step, error, storage[i],
                    tolerance[i]);
            if (worst != NULL)
                worst[i] = fmax(worst[i], error);
        }
    }
}

void pair_assert_same_params(const pair *a, const pair *b) {
    for (size_t k = 0; k < a->count; k++)
        if (memcmp(a->params[k], b->params[k], a->elements[k] * sizeof(float)) != 0)
            fail_msg("parameters of %s differ", a->tensors[k].name);
}
