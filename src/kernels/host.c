/* host.c - the backend of machines without a GPU: host memory, every call runs to its end. */
#define _DEFAULT_SOURCE /* madvise */
#include "kernels/host_elementwise.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { ALIGNMENT = 64, HUGE_PAGE = 2 << 20 };

/* Large blocks on huge pages where the system gives them, and touched here, not by the first step.
 */
static muonshard_status host_alloc(backend *self, void **memory, size_t bytes) {
    const size_t unit = bytes >= 2 * (size_t)HUGE_PAGE ? HUGE_PAGE : ALIGNMENT;
    const bool fits = bytes <= SIZE_MAX - HUGE_PAGE;
    const size_t size = fits ? (bytes + unit - 1) / unit * unit : 0;
    *memory = fits ? aligned_alloc(unit, size > 0 ? size : unit) : NULL;
    FAIL_IF(!*memory, &self->error, MUONSHARD_ERR_MEMORY, "out of host memory (%zu bytes)", bytes);
    if (unit == HUGE_PAGE)
        madvise(*memory, size, MADV_HUGEPAGE);
    memset(*memory, 0, bytes);
    return MUONSHARD_OK;
}

static void host_free(backend *self, void *memory) {
    (void)self;
    free(memory);
}

/* ---- slices ---- */

enum { SMALL = 1 << 16 }; /* elements of all items together: threads would take longer to wake up */

typedef struct slices {
    host_pass *pass;
    size_t (*size)(const void *job, size_t item);
    const void *job;
    size_t items, count;
} slices;

static size_t slice_end(size_t size, size_t slice, size_t count) {
    const size_t blocks = (size + HOST_BLOCK - 1) / HOST_BLOCK;
    const size_t end = (blocks * (slice + 1) / count) * HOST_BLOCK;
    return end < size ? end : size;
}

static void run_slice(void *user, size_t slice, int thread) {
    (void)thread;
    const slices *s = user;
    for (size_t i = 0; i < s->items; i++) {
        const size_t size = s->size(s->job, i);
        const size_t start = slice > 0 ? slice_end(size, slice - 1, s->count) : 0;
        const size_t end = slice_end(size, slice, s->count);
        if (start < end)
            s->pass(s->job, i, start, end);
    }
}

void host_slices(backend *self, host_pass *pass, size_t (*size)(const void *job, size_t item),
                 const void *job, size_t count) {
    size_t elements = 0;
    for (size_t i = 0; i < count && elements < SMALL; i++)
        elements += size(job, i);
    slices s = {.pass = pass,
                .size = size,
                .job = job,
                .items = count,
                .count = elements < SMALL ? 1 : (size_t)self->threads};
    host_threads_run(host_of(self)->threads, run_slice, &s, s.count);
}

/* ---- copies ---- */

static size_t copy_size(const void *job, size_t item) {
    return ((const copy_item *)job)[item].bytes;
}

static void copy_slice(const void *job, size_t item, size_t start, size_t end) {
    const copy_item *it = (const copy_item *)job + item;
    memcpy((char *)it->dst + start, (const char *)it->src + start, end - start);
}

static muonshard_status host_copy(backend *self, const copy_item *items, size_t count,
                                  backend_stream stream) {
    (void)stream;
    host_slices(self, copy_slice, copy_size, items, count);
    return MUONSHARD_OK;
}

/* `src` [count] of another dtype than the item's dst; `done` elements of the item come before. */
static void store(const kernel_context *c, const convert_item *it, const float *src, size_t done,
                  size_t count) {
    void *dst = (char *)it->dst + done * dtype_size(it->dst_dtype);
    if (c && c->stochastic)
        dtype_store_stochastic(dst, it->dst_dtype, src, count, c->seed, (uint32_t)c->record->count,
                               (uint32_t)it->tensor, it->first + done);
    else
        dtype_store(dst, it->dst_dtype, src, count);
}

static void convert(const kernel_context *c, const convert_item *it, size_t start, size_t end) {
    void *dst = host_at(it->dst, it->dst_dtype, start);
    const void *src = it->src ? host_at(it->src, it->src_dtype, start) : NULL;
    const size_t count = end - start;
    if (!src)
        memset(dst, 0, count * dtype_size(it->dst_dtype));
    else if (it->src_dtype == it->dst_dtype)
        memmove(dst, src, count * dtype_size(it->dst_dtype));
    else if (it->src_dtype == MUONSHARD_FP32)
        store(c, it, src, start, count);
    else if (it->dst_dtype == MUONSHARD_FP32)
        dtype_load(dst, src, it->src_dtype, count);
    else
        for (; start < end; start += HOST_BLOCK) { /* from 16 bits to the other 16 */
            float block[HOST_BLOCK];
            const size_t n = host_block(start, end);
            dtype_load(block, host_at(it->src, it->src_dtype, start), it->src_dtype, n);
            store(c, it, block, start, n);
        }
}

typedef struct convert_job {
    const kernel_context *context;
    const convert_item *items;
} convert_job;

static size_t convert_size(const void *job, size_t item) {
    const convert_job *j = job;
    const convert_item *it = &j->items[item];
    return j->context && leave_alone(j->context, it->tensor) ? 0 : it->count;
}

static void convert_slice(const void *job, size_t item, size_t start, size_t end) {
    const convert_job *j = job;
    convert(j->context, &j->items[item], start, end);
}

static muonshard_status host_convert(backend *self, const kernel_context *c,
                                     const convert_item *items, size_t count,
                                     backend_stream stream) {
    (void)stream;
    const convert_job job = {c, items};
    host_slices(self, convert_slice, convert_size, &job, count);
    return MUONSHARD_OK;
}

static muonshard_status host_resolve(backend *self, const resolve_args *a) {
    (void)self;
    double sum = 0.0;
    for (size_t i = 0; i < a->sum_count; i++)
        sum += a->words[a->sum_index[i]];
    for (size_t t = 0; t < a->tensor_count; t++)
        a->active[t] = tensor_is_active(a, t);
    resolve_record(a, sum);
    return MUONSHARD_OK;
}

static muonshard_status host_fence(backend *self, backend_stream from, backend_stream to) {
    (void)self;
    (void)from;
    (void)to;
    return MUONSHARD_OK;
}

static void host_destroy(backend *self) {
    host_threads_close(host_of(self)->threads);
    free(self->impl);
    free(self);
}

static const backend_ops host_ops = {
    .name = "host",
    .batched = false,
    .alloc = host_alloc,
    .free = host_free,
    .copy = host_copy,
    .convert = host_convert,
    .sum_ranks = host_sum_ranks,
    .sum_squares = host_measure,
    .resolve = host_resolve,
    .momentum = host_momentum,
    .orthogonalize_workspace = host_orthogonalize_workspace,
    .orthogonalize = host_orthogonalize,
    .variance = host_variance,
    .apply = host_apply,
    .adam = host_adam,
    .fence = host_fence,
    .destroy = host_destroy,
};

muonshard_status backend_open_host(host_options options, backend **out, error_text *error) {
    *out = NULL;
    FAIL_IF(options.isa > host_isa_detect(), error, MUONSHARD_ERR_UNAVAILABLE,
            "instructions: %s is more than this processor has, which is %s",
            host_isa_name(options.isa), host_isa_name(host_isa_detect()));
    backend *self = calloc(1, sizeof *self);
    host_impl *impl = calloc(1, sizeof *impl);
    muonshard_status status = self && impl
                                  ? host_threads_open(options.threads, &impl->threads, error)
                                  : fail(error, MUONSHARD_ERR_MEMORY, "out of memory");
    if (status) {
        free(self);
        free(impl);
        return status;
    }
    impl->isa = options.isa;
    self->ops = &host_ops;
    self->impl = impl;
    self->threads = host_threads_count(impl->threads);
    snprintf(self->device_text, sizeof self->device_text, "%s kernels, %d thread%s",
             host_isa_name(options.isa), self->threads, self->threads == 1 ? "" : "s");
    *out = self;
    return MUONSHARD_OK;
}
