/* host.c - the backend of machines without a GPU: host memory, every call runs to its end. */
#include "kernels/host.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define HOST_ALIGNMENT 64

/* calloc, because pages that are never touched then cost nothing; aligned by hand, with the block's
 * start kept below. */
static muonshard_status host_alloc(backend *self, void **memory, size_t bytes) {
    void *block =
        bytes < SIZE_MAX - 2 * HOST_ALIGNMENT ? calloc(1, bytes + 2 * HOST_ALIGNMENT) : NULL;
    FAIL_IF(!block, &self->error, MUONSHARD_ERR_MEMORY, "out of host memory (%zu bytes)", bytes);
    const uintptr_t start = (uintptr_t)block + HOST_ALIGNMENT;
    void **aligned = (void **)(start + HOST_ALIGNMENT - start % HOST_ALIGNMENT);
    aligned[-1] = block;
    *memory = aligned;
    return MUONSHARD_OK;
}

static void host_free(backend *self, void *memory) {
    (void)self;
    if (memory)
        free(((void **)memory)[-1]);
}

static muonshard_status host_copy(backend *self, const copy_item *items, size_t count,
                                  backend_stream stream) {
    (void)self;
    (void)stream;
    for (size_t i = 0; i < count; i++)
        if (items[i].bytes)
            memcpy(items[i].dst, items[i].src, items[i].bytes);
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

static void convert(const kernel_context *c, const convert_item *it) {
    const size_t bytes = it->count * dtype_size(it->dst_dtype);
    if (!it->src)
        memset(it->dst, 0, bytes);
    else if (it->src_dtype == it->dst_dtype)
        memmove(it->dst, it->src, bytes);
    else if (it->src_dtype == MUONSHARD_FP32)
        store(c, it, it->src, 0, it->count);
    else if (it->dst_dtype == MUONSHARD_FP32)
        dtype_load(it->dst, it->src, it->src_dtype, it->count);
    else
        for (size_t done = 0; done < it->count;) { /* from 16 bits to the other 16 */
            float block[1024];
            const size_t left = it->count - done, n = left < 1024 ? left : 1024;
            dtype_load(block, (const char *)it->src + done * 2, it->src_dtype, n);
            store(c, it, block, done, n);
            done += n;
        }
}

static muonshard_status host_convert(backend *self, const kernel_context *c,
                                     const convert_item *items, size_t count,
                                     backend_stream stream) {
    (void)self;
    (void)stream;
    for (size_t i = 0; i < count; i++)
        if (items[i].count && !(c && (c->record->skip || !c->active[items[i].tensor])))
            convert(c, &items[i]);
    return MUONSHARD_OK;
}

static void resolve_active(const resolve_args *a) {
    for (size_t t = 0; t < a->tensor_count; t++) {
        bool present = false;
        for (int r = 0; r < a->word_count; r++)
            present = present || a->words[(size_t)r * a->stride + 1 + t] != 0.0;
        a->active[t] = present || !a->skip_if_absent[t];
    }
}

static muonshard_status host_resolve(backend *self, const resolve_args *a) {
    (void)self;
    double sum = 0.0;
    bool failed = false;
    for (int r = 0; r < a->word_count; r++) {
        const double *word = a->words + (size_t)r * a->stride;
        failed = failed || word[0] != 0.0 || (a->equal && word[a->equal] != a->words[a->equal]);
    }
    for (size_t i = 0; i < a->sum_count; i++)
        sum += a->words[a->sum_index[i]];
    resolve_active(a);
    a->total[0] = failed;
    a->total[1] = sum * a->sum_scale * a->sum_scale;
    step_record *record = a->record;
    if (!record)
        return MUONSHARD_OK;
    const double norm = sqrt(sum) * a->sum_scale;
    double clip = 1.0;
    if (a->clip_norm > 0.0 && norm + 1e-6 > a->clip_norm)
        clip = a->clip_norm / (norm + 1e-6);
    record->failed = failed;
    /* Not only finite: no element may overflow fp32 once it is scaled. */
    record->skip = failed || !(norm <= FLT_MAX);
    record->grad_norm = norm;
    record->clip_factor = (float)clip;
    record->grad_factor = (float)(clip * a->scale);
    record->count += record->skip ? 0 : 1;
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
    *out = self;
    return MUONSHARD_OK;
}
