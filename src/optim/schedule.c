#include "optim/schedule.h"

#include <stdio.h>
#include <stdlib.h>
#include <xxhash.h>

static const char *const op_names[] = {
#define OP_NAME(name, text) [name] = text,
    OP_MAP(OP_NAME)
#undef OP_NAME
};

const char *op_name(op_kind kind) {
    return op_names[kind];
}

int op_label(const op *o, char *text, size_t size) {
    if (o->index == OP_NONE)
        return snprintf(text, size, "%s", op_name(o->kind));
    return snprintf(text, size, "%s %s %d", op_name(o->kind),
                    o->kind < OP_AGREE ? "bucket" : "batch", o->index);
}

/* Appends and returns the index. */
static int add(schedule *s, op_kind kind, size_t index, int waits_on) {
    const bool alone = kind == OP_AGREE || kind == OP_RESOLVE;
    s->ops[s->count] = (op){.kind = kind,
                            .index = alone ? OP_NONE : (int)index,
                            .stream = op_is_collective(kind) ? STREAM_COMM : STREAM_COMPUTE,
                            .waits_on = waits_on};
    return (int)s->count++;
}

/* Gradients to their owners in the order of buckets, then their sums of squares. */
static void add_reduction(schedule *s, const plan *p) {
    const size_t first = s->count;
    for (size_t b = 0; b < p->bucket_count; b++) {
        if (!p->reduces) {
            add(s, OP_TAKE, b, OP_NONE);
            continue;
        }
        const int pack = p->buckets[b].packed ? add(s, OP_PACK, b, OP_NONE) : OP_NONE;
        add(s, OP_REDUCE_SCATTER, b, pack);
    }
    const size_t end = s->count;
    for (size_t i = first; i < end; i++) {
        if (s->ops[i].kind != OP_PACK)
            add(s, OP_MEASURE, (size_t)s->ops[i].index, p->reduces ? (int)i : OP_NONE);
    }
}

static bool is_repeated(op_kind kind) {
    return !op_is_collective(kind) && kind != OP_TAKE && kind != OP_PACK && kind != OP_RESOLVE;
}

static void number_segments(schedule *s) {
    for (size_t i = 0; i < s->count; i++) {
        op *o = &s->ops[i];
        /* What waits for parameters waits for the end of a segment. */
        const bool goes_on = i > 0 && s->ops[i - 1].segment != OP_NONE &&
                             s->ops[i - 1].kind != OP_APPLY && o->waits_on == OP_NONE;
        o->segment = !is_repeated(o->kind) ? OP_NONE : goes_on ? s->segments - 1 : s->segments++;
    }
}

muonshard_status schedule_make(schedule *s, const plan *p, const settings *set, error_text *error) {
    *s = (schedule){.ops = calloc(3 * p->bucket_count + 6 * p->batch_count + 2, sizeof *s->ops)};
    FAIL_IF(!s->ops, error, MUONSHARD_ERR_MEMORY, "out of memory");
    add_reduction(s, p);
    const int agree = add(s, OP_AGREE, 0, s->count ? (int)s->count - 1 : OP_NONE);
    add(s, OP_RESOLVE, 0, agree);

    int gather = OP_NONE;
    for (size_t b = 0; b < p->batch_count; b++) {
        int computed;
        if (p->batches[b].kind == PLAN_FLAT) {
            computed = add(s, OP_ADAM, b, OP_NONE);
        } else {
            add(s, OP_MOMENTUM, b, OP_NONE);
            computed = add(s, OP_ORTHOGONALIZE, b, OP_NONE);
            if (set->variance != VARIANCE_NONE)
                computed = add(s, OP_VARIANCE, b, OP_NONE);
            if (p->batches[b].gathers_params)
                computed = add(s, OP_UPDATE, b, OP_NONE);
        }
        const int previous = gather;
        gather = p->gathers ? add(s, OP_ALL_GATHER, b, computed) : OP_NONE;
        if (b > 0)
            add(s, OP_APPLY, b - 1, previous);
    }
    if (p->batch_count)
        add(s, OP_APPLY, p->batch_count - 1, gather);
    number_segments(s);
    return MUONSHARD_OK;
}

uint64_t schedule_hash(const schedule *s) {
    uint64_t h = 0;
    for (size_t i = 0; i < s->count; i++) {
        const op *o = &s->ops[i];
        const int64_t facts[] = {o->kind, o->index, o->stream, o->waits_on};
        h = XXH64(facts, sizeof facts, h);
    }
    return h;
}

void schedule_free(schedule *s) {
    free(s->ops);
    *s = (schedule){0};
}
