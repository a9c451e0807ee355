#include "step_rig.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MATRIX  MUONSHARD_ROLE_MATRIX
#define ELEMENT MUONSHARD_ROLE_ELEMENTWISE

const rig_tensor rig_zoo[] = {
    {RIG_TENSOR("embedding", ELEMENT, 2, 97, 24), .priority = 0},
    {RIG_TENSOR("square", MATRIX, 2, 24, 24)},
    {RIG_TENSOR("wide", MATRIX, 2, 24, 96)},
    {RIG_TENSOR("tall", MATRIX, 2, 96, 24)},
    {RIG_TENSOR("prime", MATRIX, 2, 13, 7)},
    {RIG_TENSOR("row", MATRIX, 2, 1, 37)},
    {RIG_TENSOR("column", MATRIX, 2, 37, 1)},
    {RIG_TENSOR("stack", MATRIX, 3, 5, 24, 24)},
    {RIG_TENSOR("gain", ELEMENT, 1, 24)},
    {RIG_TENSOR("qkv", MATRIX, 3, 2, 72, 24), .split_count = 3, .splits = {24, 24, 24}},
    {RIG_TENSOR("grouped_query", MATRIX, 3, 2, 32, 24), .split_count = 3, .splits = {16, 8, 8},
     .priority = -1},
    {RIG_TENSOR("convolution", MATRIX, 4, 8, 3, 5, 5), .form = MUONSHARD_FLATTEN},
    {RIG_TENSOR("steady", MUONSHARD_ROLE_FROZEN, 2, 5, 5)},
    {RIG_TENSOR("bias", ELEMENT, 1, 70001)},
};
const size_t rig_zoo_count = sizeof rig_zoo / sizeof rig_zoo[0];

static uint64_t mix(uint64_t x) {
    x += 0x9E3779B97F4A7C15U;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9U;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBU;
    return x ^ (x >> 31);
}

static uint64_t name_seed(const char *name) {
    uint64_t h = 1469598103934665603U;
    for (; *name; name++)
        h = (h ^ (unsigned char)*name) * 1099511628211U;
    return h;
}

/* In [-1, 1). */
static void fill(float *x, size_t count, uint64_t seed) {
    for (size_t i = 0; i < count; i++) {
        const uint64_t bits = mix(seed + 0x632BE59BD9B4E019U * (i + 1));
        x[i] = (float)((double)(bits >> 11) / 4503599627370496.0 - 1.0);
    }
}

static size_t size_of(muonshard_dtype dtype) {
    return dtype == MUONSHARD_FP32 ? 4 : 2;
}

/* The nearest number of the dtype towards zero; |x| < 2, and fp16 flushes what is below its normal
 * numbers. */
static uint16_t narrow(float x, muonshard_dtype dtype) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if (dtype == MUONSHARD_BF16)
        return (uint16_t)(bits >> 16);
    const uint32_t sign = bits >> 31 << 15, exponent = bits >> 23 & 255;
    return (uint16_t)(exponent < 113 ? sign : sign | (exponent - 112) << 10 | (bits >> 13 & 1023));
}

static void fill_as(void *x, muonshard_dtype dtype, size_t count, uint64_t seed) {
    float *wide = dtype == MUONSHARD_FP32 ? x : calloc(count, sizeof *wide);
    fill(wide, count, seed);
    if (dtype == MUONSHARD_FP32)
        return;
    for (size_t i = 0; i < count; i++)
        ((uint16_t *)x)[i] = narrow(wide[i], dtype);
    free(wide);
}

static void note(rig *r, muonshard_status status, const char *text) {
    if (r->status != MUONSHARD_OK || status == MUONSHARD_OK)
        return;
    r->status = status;
    snprintf(r->message, sizeof r->message, "%s", text);
}

static void add(rig *r, size_t i) {
    const rig_tensor *t = &r->setup->tensors[i];
    muonshard_tensor_desc d = MUONSHARD_TENSOR_DESC_INIT;
    r->elements[i] = 1;
    for (int k = 0; k < t->dims; k++) {
        d.shape[k] = t->shape[k];
        r->elements[i] *= (size_t)t->shape[k];
    }
    r->params[i] = calloc(r->elements[i], size_of(t->dtype));
    r->grads[i] = calloc(r->elements[i], size_of(t->grad_dtype));
    fill_as(r->params[i], t->dtype, r->elements[i], name_seed(t->name));
    d.name = t->name;
    d.role = t->role;
    d.form = t->form;
    d.dims = t->dims;
    d.row_splits = t->splits;
    d.row_split_count = t->split_count;
    d.priority = t->priority;
    d.priority_stride = t->priority_stride;
    d.null_grad = t->null_grad;
    d.dtype = t->dtype;
    d.grad_dtype = t->grad_dtype;
    d.param = images_add(&r->images, r->params[i], r->elements[i] * size_of(t->dtype));
    d.grad = images_add(&r->images, r->grads[i], r->elements[i] * size_of(t->grad_dtype));
    const muonshard_status status = muonshard_add_tensor(r->optimizer, &d, NULL);
    note(r, status, muonshard_last_error(r->optimizer));
}

void rig_prepare(rig *r, muonshard_comm *comm, const rig_case *setup) {
    *r = (rig){.setup = setup, .comm = comm};
    muonshard_config *config;
    note(r, muonshard_config_create(&config), "config");
    if (r->status == MUONSHARD_OK)
        note(r, muonshard_config_load_string(config, setup->yaml),
             muonshard_config_last_error(config));
    if (r->status == MUONSHARD_OK)
        images_configure(config);
    if (r->status == MUONSHARD_OK)
        note(r, muonshard_create(comm, config, NULL, &r->optimizer),
             muonshard_comm_last_error(comm));
    muonshard_config_destroy(config);
    r->images.optimizer = r->optimizer;
    for (size_t i = 0; r->status == MUONSHARD_OK && i < setup->count; i++)
        add(r, i);
}

void rig_open(rig *r, muonshard_comm *comm, const rig_case *setup) {
    rig_prepare(r, comm, setup);
    if (r->status == MUONSHARD_OK)
        note(r, muonshard_commit(r->optimizer, setup->sync), muonshard_last_error(r->optimizer));
}

void rig_gradients_of(rig *r, int rank) {
    for (size_t i = 0; i < r->setup->count; i++) {
        const uint64_t seed =
            name_seed(r->setup->tensors[i].name) ^ mix((uint64_t)r->step * 64 + (uint64_t)rank);
        fill_as(r->grads[i], r->setup->tensors[i].grad_dtype, r->elements[i], seed);
    }
}

void rig_gradients(rig *r) {
    rig_gradients_of(r, r->setup->same_gradients ? 0 : muonshard_comm_rank(r->comm));
    r->step++;
}

static int64_t entries(const rig_tensor *t) {
    int64_t n = 1;
    for (int k = 0;
         t->role == MUONSHARD_ROLE_MATRIX && t->form == MUONSHARD_STACK && k < t->dims - 2; k++)
        n *= t->shape[k];
    return n;
}

static void mark_ready(rig *r, size_t i) {
    const int64_t n = entries(&r->setup->tensors[i]);
    for (int64_t e = n - 1; e >= 0; e--) {
        note(r, muonshard_grad_ready(r->optimizer, (int)i, e, 1),
             muonshard_last_error(r->optimizer));
        note(r, muonshard_progress(r->optimizer), muonshard_last_error(r->optimizer));
    }
}

const void *rig_grad(const rig *r, size_t tensor) {
    return images_of(&r->images, r->grads[tensor]);
}

void rig_push(rig *r) {
    for (size_t i = 0; i < r->setup->count; i++)
        note(r, images_upload(&r->images, r->params[i]), "upload");
}

void rig_pull(rig *r) {
    for (size_t i = 0; i < r->setup->count; i++)
        note(r, images_download(&r->images, r->params[i]), "download");
}

/* A device's steps run ahead: other ranks' errors come with the result. */
static muonshard_status result_of(rig *r) {
    muonshard_step_result_info result = MUONSHARD_STEP_RESULT_INIT;
    return images_on_host() ? MUONSHARD_OK : muonshard_step_result(r->optimizer, 0, 1, &result);
}

muonshard_status rig_call(rig *r, const muonshard_step_args *args) {
    for (size_t i = 0; i < r->setup->count; i++)
        note(r, images_upload(&r->images, r->grads[i]), "upload");
    const muonshard_status status = muonshard_step(r->optimizer, args);
    const muonshard_status outcome = status ? status : result_of(r);
    rig_pull(r);
    return outcome;
}

void rig_step(rig *r) {
    const size_t count = r->setup->count;
    for (size_t i = 0; i < count && r->status == MUONSHARD_OK; i++)
        note(r, images_upload(&r->images, r->grads[i]), "upload");
    if (r->setup->overlap == RIG_READY_BACKWARD)
        for (size_t i = count; i-- > 0;)
            mark_ready(r, i);
    if (r->setup->overlap == RIG_READY_SHUFFLED) {
        const size_t shift = (size_t)(muonshard_comm_rank(r->comm) * 3 + r->step * 5);
        for (size_t i = 0; i < count; i++)
            if ((i + shift) % 4)
                mark_ready(r, (i + shift) % count);
    }
    muonshard_step_args args = MUONSHARD_STEP_ARGS_INIT;
    args.defer = r->setup->overlap == RIG_DEFER;
    note(r, muonshard_step(r->optimizer, &args), muonshard_last_error(r->optimizer));
    for (size_t i = 0; args.defer && r->status == MUONSHARD_OK && i < count; i++)
        note(r,
             muonshard_tensor_wait(r->optimizer, (int)i, 0, entries(&r->setup->tensors[i]), NULL),
             muonshard_last_error(r->optimizer));
    note(r, result_of(r), muonshard_last_error(r->optimizer));
    for (size_t i = 0; i < count && r->status == MUONSHARD_OK; i++)
        note(r, images_download(&r->images, r->params[i]), "download");
}

void rig_close(rig *r) {
    images_close(&r->images);
    muonshard_destroy(r->optimizer);
    for (size_t i = 0; i < r->setup->count; i++) {
        free(r->params[i]);
        free(r->grads[i]);
    }
}

size_t rig_bytes(const rig *r, size_t tensor) {
    return r->elements[tensor] * size_of(r->setup->tensors[tensor].dtype);
}

uint64_t rig_digest(const rig *r) {
    uint64_t h = 1469598103934665603U;
    for (size_t i = 0; i < r->setup->count; i++) {
        const unsigned char *bytes = (const unsigned char *)r->params[i];
        for (size_t k = 0; k < rig_bytes(r, i); k++)
            h = (h ^ bytes[k]) * 1099511628211U;
    }
    return h;
}

uint64_t rig_run(muonshard_comm *comm, const rig_case *setup, muonshard_status *status) {
    rig r;
    rig_open(&r, comm, setup);
    for (int i = 0; i < setup->steps && r.status == MUONSHARD_OK; i++) {
        rig_gradients(&r);
        rig_step(&r);
    }
    if (r.status != MUONSHARD_OK)
        fprintf(stderr, "rig: %s: %s\n", muonshard_status_string(r.status), r.message);
    const uint64_t digest = r.status == MUONSHARD_OK ? rig_digest(&r) : 0;
    *status = r.status;
    rig_close(&r);
    return digest;
}
