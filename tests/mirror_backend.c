#include "mirror_backend.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

enum { MOST = 4096, ALIGNMENT = 16 }; /* bytes: of the widest access */

/* An array of the host's and where it is on the device. */
typedef struct image {
    char *host, *device;
    size_t bytes;
    void *memory; /* own, what is to be freed */
} image;

typedef struct mirror {
    backend *inner; /* own */
    image images[MOST];
    size_t count;
    muonshard_status status;
} mirror;

static mirror *mirror_of(const backend *self) {
    return self->impl;
}

static void note(mirror *m, muonshard_status status) {
    m->status = m->status ? m->status : status;
}

/* Where [host, host + bytes) is on the device, aligned as it is on the host; NULL for NULL. What
 * lies within an array that is there already stays within it. */
static void *over(mirror *m, const void *host, size_t bytes) {
    char *at = (char *)(uintptr_t)host;
    if (!host)
        return NULL;
    for (size_t i = 0; i < m->count; i++) {
        const image *it = &m->images[i];
        if (at >= it->host && at + bytes <= it->host + it->bytes)
            return it->device + (at - it->host);
    }
    if (m->count == MOST) {
        note(m, MUONSHARD_ERR_INTERNAL);
        return NULL;
    }
    image *it = &m->images[m->count++];
    const size_t offset = (uintptr_t)host % ALIGNMENT;
    *it = (image){.host = at, .bytes = bytes};
    note(m, m->inner->ops->alloc(m->inner, &it->memory, offset + bytes));
    if (!it->memory)
        return NULL;
    it->device = (char *)it->memory + offset;
    const copy_item item = {it->device, host, bytes};
    note(m, m->inner->ops->copy(m->inner, &item, 1, STREAM_COMPUTE));
    return it->device;
}

/* Back to the host, whatever it was, behind what `stream` was given. */
static muonshard_status finish_on(backend *self, muonshard_status status, backend_stream stream) {
    mirror *m = mirror_of(self);
    note(m, status);
    note(m, m->inner->ops->fence(m->inner, stream, STREAM_COMPUTE));
    for (size_t i = 0; i < m->count; i++) {
        const image *it = &m->images[i];
        const copy_item item = {it->host, it->device, it->bytes};
        if (it->device)
            note(m, m->inner->ops->copy(m->inner, &item, 1, STREAM_COMPUTE));
        m->inner->ops->free(m->inner, it->memory);
    }
    m->count = 0;
    const muonshard_status outcome = m->status;
    m->status = MUONSHARD_OK;
    self->error = m->inner->error;
    return outcome;
}

static muonshard_status finish(backend *self, muonshard_status status) {
    return finish_on(self, status, STREAM_COMPUTE);
}

static size_t size_of(muonshard_dtype dtype, size_t count) {
    return count * dtype_size(dtype);
}

/* `tensors`: of values and active. */
static kernel_context context_over(mirror *m, const kernel_context *c, int tensors) {
    kernel_context on_device = *c;
    on_device.record = over(m, c->record, sizeof *c->record);
    on_device.values = over(m, c->values, (size_t)tensors * sizeof *c->values);
    on_device.active = over(m, c->active, (size_t)tensors);
    return on_device;
}

/* `tensor` of all items, one more than the highest. */
#define TENSORS_OF(items, count)                                                                   \
    ({                                                                                             \
        int most_ = 0;                                                                             \
        for (size_t i_ = 0; i_ < (count); i_++)                                                    \
            most_ = (items)[i_].tensor > most_ ? (items)[i_].tensor : most_;                       \
        most_ + 1;                                                                                 \
    })
#define COPY_ITEMS(items, count)                                                                   \
    memcpy(malloc((count) * sizeof *(items) + 1), items, (count) * sizeof *(items))

static muonshard_status mirror_alloc(backend *self, void **memory, size_t bytes) {
    (void)self;
    *memory = calloc(1, bytes ? bytes : 1);
    return *memory ? MUONSHARD_OK : MUONSHARD_ERR_MEMORY;
}

static void mirror_free(backend *self, void *memory) {
    (void)self;
    free(memory);
}

static muonshard_status mirror_copy(backend *self, const copy_item *items, size_t count,
                                    backend_stream stream) {
    mirror *m = mirror_of(self);
    for (size_t i = 0; i < count; i++) {
        const copy_item item = {over(m, items[i].dst, items[i].bytes),
                                over(m, items[i].src, items[i].bytes), items[i].bytes};
        note(m, m->inner->ops->copy(m->inner, &item, 1, stream));
    }
    return finish_on(self, MUONSHARD_OK, stream);
}

static muonshard_status mirror_convert(backend *self, const kernel_context *context,
                                       const convert_item *items, size_t count,
                                       backend_stream stream) {
    mirror *m = mirror_of(self);
    kernel_context c = {0};
    if (context)
        c = context_over(m, context, TENSORS_OF(items, count));
    convert_item *list = COPY_ITEMS(items, count);
    for (size_t i = 0; i < count; i++) {
        list[i].dst = over(m, list[i].dst, size_of(list[i].dst_dtype, list[i].count));
        list[i].src = over(m, list[i].src, size_of(list[i].src_dtype, list[i].count));
    }
    const muonshard_status status =
        m->inner->ops->convert(m->inner, context ? &c : NULL, list, count, stream);
    free(list);
    return finish_on(self, status, stream);
}

static muonshard_status mirror_sum_ranks(backend *self, const sum_ranks_args *args,
                                         backend_stream stream) {
    mirror *m = mirror_of(self);
    sum_ranks_args a = *args;
    a.dst = over(m, a.dst, a.count * sizeof *a.dst);
    a.received = over(m, a.received, (size_t)a.ranks * size_of(a.dtype, a.count));
    a.own = over(m, a.own, size_of(a.dtype, a.count));
    return finish_on(self, m->inner->ops->sum_ranks(m->inner, &a, stream), stream);
}

static muonshard_status mirror_sum_squares(backend *self, const sum_squares_item *items,
                                           size_t count) {
    mirror *m = mirror_of(self);
    sum_squares_item *list = COPY_ITEMS(items, count);
    for (size_t i = 0; i < count; i++) {
        list[i].x = over(m, list[i].x, list[i].count * sizeof(float));
        list[i].out = over(m, list[i].out, sizeof(double));
    }
    const muonshard_status status = m->inner->ops->sum_squares(m->inner, list, count);
    free(list);
    return finish(self, status);
}

static muonshard_status mirror_resolve(backend *self, const resolve_args *args) {
    mirror *m = mirror_of(self);
    resolve_args a = *args;
    a.words = over(m, a.words, (size_t)a.word_count * a.stride * sizeof(double));
    a.skip_if_absent = over(m, a.skip_if_absent, a.tensor_count);
    a.active = over(m, a.active, a.tensor_count);
    a.sum_index = over(m, a.sum_index, a.sum_count * sizeof(size_t));
    a.total = over(m, a.total, 2 * sizeof(double));
    a.record = over(m, a.record, sizeof *a.record);
    return finish(self, m->inner->ops->resolve(m->inner, &a));
}

static muonshard_status mirror_momentum(backend *self, const kernel_context *context,
                                        const momentum_args *args, const momentum_item *items,
                                        size_t count) {
    mirror *m = mirror_of(self);
    const kernel_context c = context_over(m, context, TENSORS_OF(items, count));
    momentum_item *list = COPY_ITEMS(items, count);
    for (size_t i = 0; i < count; i++) {
        momentum_item *it = &list[i];
        it->g_u = over(m, it->g_u, it->count * sizeof(float));
        it->momentum = over(m, it->momentum, size_of(args->dtype, it->count));
        it->w = over(m, it->w, size_of(it->w_dtype, it->count));
        it->squares = over(m, it->squares, sizeof(double));
    }
    const muonshard_status status = m->inner->ops->momentum(m->inner, &c, args, list, count);
    free(list);
    return finish(self, status);
}

/* The device's own is taken for each call. */
static size_t mirror_orthogonalize_workspace(backend *self, const ns_program *program, int64_t m,
                                             int64_t n, size_t count) {
    (void)self, (void)program, (void)m, (void)n, (void)count;
    return 0;
}

enum { POISON_MOST = 1 << 20 };

/* Memory of the device that is NaN in any dtype, as far as a test's matrices reach: a library's
 * workspace behind them is larger. */
static void *poisoned(mirror *m, size_t bytes) {
    void *device = NULL;
    const size_t most = bytes < POISON_MOST ? bytes : POISON_MOST;
    void *poison = memset(malloc(most + 1), 0xff, most);
    note(m, m->inner->ops->alloc(m->inner, &device, bytes));
    const copy_item item = {device, poison, most};
    if (device)
        note(m, m->inner->ops->copy(m->inner, &item, 1, STREAM_COMPUTE));
    free(poison);
    return device;
}

/* In a workspace that starts as NaN. */
static muonshard_status mirror_orthogonalize(backend *self, const step_record *record,
                                             const ns_program *program, int64_t rows, int64_t cols,
                                             const orthogonalize_item *items, size_t count,
                                             void *workspace) {
    mirror *m = mirror_of(self);
    const size_t elements = (size_t)rows * (size_t)cols;
    const size_t out_bytes = size_of(ns_program_output(program), elements);
    const size_t bytes =
        m->inner->ops->orthogonalize_workspace(m->inner, program, rows, cols, count);
    void *device = poisoned(m, bytes);
    (void)workspace;
    orthogonalize_item *list = COPY_ITEMS(items, count);
    for (size_t i = 0; i < count; i++) {
        list[i].u = over(m, list[i].u, elements * sizeof(float));
        list[i].out = over(m, list[i].out, out_bytes);
        list[i].squares = over(m, list[i].squares, sizeof(double));
    }
    record = over(m, record, sizeof *record);
    const muonshard_status status =
        m->inner->ops->orthogonalize(m->inner, record, program, rows, cols, list, count, device);
    free(list);
    const muonshard_status outcome = finish(self, status);
    m->inner->ops->free(m->inner, device);
    return outcome;
}

static muonshard_status mirror_variance(backend *self, const kernel_context *context,
                                        const variance_args *args, const variance_item *items,
                                        size_t count) {
    mirror *m = mirror_of(self);
    const kernel_context c = context_over(m, context, TENSORS_OF(items, count));
    variance_item *list = COPY_ITEMS(items, count);
    for (size_t i = 0; i < count; i++) {
        variance_item *it = &list[i];
        const size_t lines = (size_t)(it->by_rows ? it->rows : it->cols);
        it->u = over(m, it->u, size_of(it->u_dtype, (size_t)(it->rows * it->cols)));
        it->v = over(m, it->v, lines * sizeof(float));
        it->factor = over(m, it->factor, lines * sizeof(float));
    }
    const muonshard_status status = m->inner->ops->variance(m->inner, &c, args, list, count);
    free(list);
    return finish(self, status);
}

static muonshard_status mirror_apply(backend *self, const kernel_context *context,
                                     const apply_args *args, const apply_item *items,
                                     size_t count) {
    mirror *m = mirror_of(self);
    const kernel_context c = context_over(m, context, TENSORS_OF(items, count));
    apply_item *list = COPY_ITEMS(items, count);
    for (size_t i = 0; i < count; i++) {
        apply_item *it = &list[i];
        const size_t elements = (size_t)(it->rows * it->cols);
        it->w = over(m, it->w, size_of(it->w_dtype, elements));
        it->master = over(m, it->master, elements * sizeof(float));
        it->u = over(m, it->u, size_of(it->u_dtype, elements));
        it->factor =
            over(m, it->factor, (size_t)(it->by_rows ? it->rows : it->cols) * sizeof(float));
    }
    const muonshard_status status = m->inner->ops->apply(m->inner, &c, args, list, count);
    free(list);
    return finish(self, status);
}

static muonshard_status mirror_adam(backend *self, const kernel_context *context,
                                    const adam_args *args, const adam_item *items, size_t count) {
    mirror *m = mirror_of(self);
    const kernel_context c = context_over(m, context, TENSORS_OF(items, count));
    adam_item *list = COPY_ITEMS(items, count);
    for (size_t i = 0; i < count; i++) {
        adam_item *it = &list[i];
        it->w = over(m, it->w, it->count * sizeof(float));
        it->g = over(m, it->g, it->count * sizeof(float));
        it->m = over(m, it->m, it->count * sizeof(float));
        it->v = over(m, it->v, it->count * sizeof(float));
    }
    const muonshard_status status = m->inner->ops->adam(m->inner, &c, args, list, count);
    free(list);
    return finish(self, status);
}

static muonshard_status mirror_fence(backend *self, backend_stream from, backend_stream to) {
    backend *inner = mirror_of(self)->inner;
    return inner->ops->fence(inner, from, to);
}

static void mirror_destroy(backend *self) {
    backend_close(mirror_of(self)->inner);
    free(self->impl);
    free(self);
}

static const backend_ops mirror_ops = {
    .name = "mirror",
    .batched = true,
    .alloc = mirror_alloc,
    .free = mirror_free,
    .copy = mirror_copy,
    .convert = mirror_convert,
    .sum_ranks = mirror_sum_ranks,
    .sum_squares = mirror_sum_squares,
    .resolve = mirror_resolve,
    .momentum = mirror_momentum,
    .orthogonalize_workspace = mirror_orthogonalize_workspace,
    .orthogonalize = mirror_orthogonalize,
    .variance = mirror_variance,
    .apply = mirror_apply,
    .adam = mirror_adam,
    .fence = mirror_fence,
    .destroy = mirror_destroy,
};

bool test_backend_is_host(void) {
    const char *name = getenv("MUONSHARD_TEST_BACKEND");
    return !name || strcmp(name, "host") == 0;
}

bool test_backend_is_card(void) {
    void *library =
        test_backend_is_host() ? NULL : dlopen("libmuonshard_cuda.so.0.1", RTLD_NOW | RTLD_LOCAL);
    return library && !dlsym(library, "fake_cuda_calls"); /* stays open, as the backend's does */
}

muonshard_status test_backend_open(backend **out, error_text *error) {
    *out = NULL;
    if (test_backend_is_host())
        return backend_open_host((host_options){.isa = host_isa_detect(), .threads = 2}, out,
                                 error);
    const char *panels = getenv("MUONSHARD_TEST_PANELS");
    const cuda_options options = {.panels = panels ? atoi(panels) : 0,
                                  .tiles = getenv("MUONSHARD_TEST_TILES") != NULL};
    backend *self = calloc(1, sizeof *self);
    mirror *m = calloc(1, sizeof *m);
    muonshard_status status =
        self && m ? backend_open_cuda(options, &m->inner, error) : MUONSHARD_ERR_MEMORY;
    if (status) {
        free(self);
        free(m);
        return status;
    }
    self->ops = &mirror_ops;
    self->impl = m;
    self->threads = 1;
    *out = self;
    return MUONSHARD_OK;
}
