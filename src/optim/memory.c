#include "optim/memory.h"

#include <stddef.h>

size_t memory_word_stride(const plan *p, size_t tensors) {
    return 1 + tensors + p->wave_count + p->flat_shard / PLAN_FLAT_CHUNK + 1;
}

size_t memory_sum_count(const plan *p, size_t views) {
    return views + (p->flat_elements + PLAN_FLAT_CHUNK - 1) / PLAN_FLAT_CHUNK;
}

static void add(memory_list *list, memory_kind kind, size_t offset, size_t count, size_t item) {
    /* Every array has an address, be it of nothing. */
    list->blocks[list->count++] = (memory_block){kind, offset, (count ? count : 1) * item};
}

#define STATE(field, count, item) add(&list, MEMORY_STATE, offsetof(workspace, field), count, item)
#define SCRATCH(field, count, item)                                                                \
    add(&list, MEMORY_WORKSPACE, offsetof(workspace, field), count, item)
#define PINNED(field, count, item)                                                                 \
    add(&list, MEMORY_PINNED, offsetof(workspace, field), count, item)

memory_list memory_of(const memory_facts *f) {
    memory_list list = {.count = 0};
    const plan *p = f->plan;
    const size_t stride = memory_word_stride(p, f->tensors), ranks = (size_t)p->world_size;
    const size_t scratch = f->scratch ? p->scratch_bytes : 0;
    const size_t exchange = scratch > p->gather_bytes ? scratch : p->gather_bytes;

    STATE(momentum, p->matrix_elements, dtype_size((muonshard_dtype)f->settings->momentum_dtype));
    STATE(variance, p->variance_elements, sizeof(float));
    STATE(masters, p->master_elements, sizeof(float));
    STATE(flat_m, p->flat_shard, sizeof(float));
    STATE(flat_v, p->flat_shard, sizeof(float));
    add(&list, p->flat_master ? MEMORY_STATE : MEMORY_WORKSPACE, offsetof(workspace, flat_w),
        p->flat_shard, sizeof(float));
    SCRATCH(owned, p->owned_elements, sizeof(float));
    SCRATCH(factors, p->variance_elements, sizeof(float));
    for (size_t i = 0; i < p->wave_count; i++)
        if (p->waves[i].kind == PLAN_FLAT && p->waves[i].sent != MUONSHARD_FP32)
            SCRATCH(flat_sent, p->flat_shard, dtype_size(p->waves[i].sent));
    SCRATCH(pack, p->pack_bytes, 1);
    SCRATCH(exchange, exchange, 1);
    SCRATCH(zeros, p->largest_unpacked_bytes, 1);
    SCRATCH(newton_schulz, f->orthogonalize, 1);
    SCRATCH(word, stride, sizeof(double));
    SCRATCH(words, stride * ranks, sizeof(double));
    SCRATCH(totals, 2 * (2 + f->agreeing), sizeof(double));
    SCRATCH(active, f->tensors, 1);
    SCRATCH(skip_if_absent, f->tensors, 1);
    SCRATCH(values, f->tensors, sizeof(tensor_values));
    SCRATCH(record, 1, sizeof(step_record));
    SCRATCH(sum_index, memory_sum_count(p, f->views) + f->agreeing, sizeof(size_t));
    if (f->device)
        SCRATCH(squares, f->owned, sizeof(double));
    PINNED(posted, STEP_RESULTS, sizeof(step_record));
    if (f->staged) {
        PINNED(staged_sent, exchange, 1);
        PINNED(staged_recv, exchange, 1);
    }
    if (f->staged || f->staged_words)
        PINNED(staged_words, stride * (1 + ranks) + 2 + 2 * f->agreeing, sizeof(double));
    return list;
}

size_t memory_bytes(const memory_list *list, memory_kind kind) {
    size_t bytes = 0;
    for (size_t i = 0; i < list->count; i++)
        if (list->blocks[i].kind == kind)
            bytes += list->blocks[i].bytes;
    return bytes;
}
