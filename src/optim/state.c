#include "optim/state.h"

#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

const char *state_kind_name(state_kind kind) {
    static const char *const names[] = {
#define STATE_NAME(name, text) text,
        STATE_MAP(STATE_NAME)
#undef STATE_NAME
    };
    return names[kind];
}

state_kind state_kind_find(const char *name, size_t length) {
    int kind = 0;
    while (kind < STATE_KIND_COUNT && (strlen(state_kind_name((state_kind)kind)) != length ||
                                       memcmp(state_kind_name((state_kind)kind), name, length)))
        kind++;
    return (state_kind)kind;
}

/* ---- lists ---- */

static void add(state_list *list, state_kind kind, int id, size_t first, size_t count,
                muonshard_dtype dtype, void *memory) {
    if (count)
        list->slices[list->count++] = (state_slice){.kind = kind,
                                                    .tensor = id,
                                                    .first = first,
                                                    .dims = 1,
                                                    .shape = {(int64_t)count},
                                                    .count = count,
                                                    .dtype = dtype,
                                                    .memory = memory};
}

/* A view's, as the matrix it is. */
static void add_view(state_list *list, state_kind kind, const view *v, muonshard_dtype dtype,
                     void *memory) {
    add(list, kind, v->tensor, v->offset, view_elements(v), dtype, memory);
    state_slice *slice = &list->slices[list->count - 1];
    slice->dims = 2;
    slice->shape[0] = v->rows;
    slice->shape[1] = v->cols;
}

/* Momentum and variance of the matrices this rank owns. */
static void add_batch(const muonshard_optimizer *o, const batch *b, const batch_work *work,
                      state_list *list) {
    size_t k = 0;
    for (size_t i = 0; i < b->count; i++) {
        const size_t index = plan_slot_view(&o->plan, &o->plan.waves[b->first + i], o->comm->rank);
        if (index == PLAN_EMPTY_SLOT)
            continue;
        const view *v = &o->registry.views[index];
        const variance_item *variance = &work->variance[k];
        add_view(list, STATE_MOMENTUM, v, (muonshard_dtype)o->settings->momentum_dtype,
                 work->momentum[k].momentum);
        if (o->settings->variance != VARIANCE_NONE)
            add(list, STATE_VARIANCE, v->tensor, v->offset,
                (size_t)(variance->by_rows ? v->rows : v->cols), MUONSHARD_FP32, variance->v);
        k++;
    }
}

/* Masters that lie here of matrices whose owner is `owner`. */
static void add_masters(const muonshard_optimizer *o, int owner, state_list *list) {
    const plan *p = &o->plan;
    for (size_t i = 0; i < p->wave_count; i++) {
        const wave *w = &p->waves[i];
        const size_t index =
            w->kind == PLAN_MATRICES ? plan_slot_view(p, w, owner) : PLAN_EMPTY_SLOT;
        float *master = index == PLAN_EMPTY_SLOT ? NULL : work_master(o, w, owner);
        if (master)
            add_view(list, STATE_MASTER, &o->registry.views[index], MUONSHARD_FP32, master);
    }
}

/* This rank's shard of the flat rest. */
static void add_shard(const muonshard_optimizer *o, state_list *list) {
    for (size_t i = 0; i < o->adam_count; i++) {
        const adam_item *a = &o->adam[i];
        const tensor *t = &o->registry.tensors[a->tensor];
        const size_t first = work_adam_first(o, a);
        add(list, STATE_ADAM_M, a->tensor, first, a->count, MUONSHARD_FP32, a->m);
        if (o->settings->elementwise == ELEMENTWISE_ADAMW)
            add(list, STATE_ADAM_V, a->tensor, first, a->count, MUONSHARD_FP32, a->v);
        if (registry_master(o->settings, t->dtype) != MASTER_NONE)
            add(list, STATE_MASTER, a->tensor, first, a->count, MUONSHARD_FP32, a->w);
    }
}

/* Parameters this rank writes: of what it owns; of frozen tensors by turns. */
static void add_own_params(const muonshard_optimizer *o, state_list *list) {
    const registry *r = &o->registry;
    for (size_t i = 0; i < r->view_count; i++) {
        const view *v = &r->views[i];
        const tensor *t = &r->tensors[v->tensor];
        if (o->plan.view_owner[i] == o->comm->rank)
            add_view(list, STATE_PARAM, v, t->dtype, tensor_param_at(t, v->offset));
    }
    for (size_t i = 0; i < o->adam_count; i++) {
        const adam_item *a = &o->adam[i];
        const tensor *t = &r->tensors[a->tensor];
        const size_t first = work_adam_first(o, a);
        add(list, STATE_PARAM, a->tensor, first, a->count, t->dtype, tensor_param_at(t, first));
    }
    for (size_t i = 0; i < r->tensor_count; i++) {
        const tensor *t = &r->tensors[i];
        if (t->role == MUONSHARD_ROLE_FROZEN && (int)(i % (size_t)o->comm->size) == o->comm->rank)
            add(list, STATE_PARAM, (int)i, 0, t->elements, t->dtype, t->param);
    }
}

/* Room for either list: a master for every view beside what a view or a tensor has. */
static muonshard_status make_room(const muonshard_optimizer *o, state_list *list,
                                  error_text *error) {
    const size_t most = 4 * o->registry.view_count + 5 * o->registry.tensor_count + 1;
    *list = (state_list){calloc(most, sizeof *list->slices), 0};
    FAIL_IF(!list->slices, error, MUONSHARD_ERR_MEMORY, "out of memory");
    return MUONSHARD_OK;
}

static void add_batches(const muonshard_optimizer *o, state_list *list) {
    for (size_t b = 0; b < o->plan.batch_count; b++)
        if (o->plan.batches[b].kind == PLAN_MATRICES)
            add_batch(o, &o->plan.batches[b], &o->batches[b], list);
}

/* Elements then lie at multiples of their size, one slice after the other. */
static int compare_sizes(const void *left, const void *right) {
    const state_slice *a = left, *b = right;
    const size_t size_a = dtype_size(a->dtype), size_b = dtype_size(b->dtype);
    if (size_a != size_b)
        return size_a > size_b ? -1 : 1;
    if (a->kind != b->kind)
        return a->kind < b->kind ? -1 : 1;
    if (a->tensor != b->tensor)
        return a->tensor < b->tensor ? -1 : 1;
    return a->first < b->first ? -1 : a->first > b->first;
}

muonshard_status state_owned(const muonshard_optimizer *o, state_list *list, error_text *error) {
    TRY(make_room(o, list, error));
    add_own_params(o, list);
    add_batches(o, list);
    add_masters(o, o->comm->rank, list);
    add_shard(o, list);
    qsort(list->slices, list->count, sizeof *list->slices, compare_sizes);
    return MUONSHARD_OK;
}

muonshard_status state_wanted(const muonshard_optimizer *o, bool params, state_list *list,
                              error_text *error) {
    TRY(make_room(o, list, error));
    for (size_t i = 0; params && i < o->registry.tensor_count; i++) {
        const tensor *t = &o->registry.tensors[i];
        add(list, STATE_PARAM, (int)i, 0, t->elements, t->dtype, t->param);
    }
    add_batches(o, list);
    for (int r = 0; r < o->comm->size; r++)
        add_masters(o, r, list); /* where they are replicated, all */
    add_shard(o, list);
    return MUONSHARD_OK;
}

/* ---- how much it is, of ranks that need not be there ---- */

static size_t master_bytes(const settings *s, muonshard_dtype dtype) {
    return registry_master(s, dtype) == MASTER_NONE ? 0 : sizeof(float);
}

static size_t view_bytes(const view *v, const tensor *t, const settings *s) {
    const size_t element = dtype_size(t->dtype) + dtype_size((muonshard_dtype)s->momentum_dtype) +
                           master_bytes(s, t->dtype);
    const size_t variance =
        s->variance == VARIANCE_NONE
            ? 0
            : (size_t)(work_variance_by_rows(s, v) ? v->rows : v->cols) * sizeof(float);
    return view_elements(v) * element + variance;
}

/* An element-wise tensor, over the ranks whose shards it is in. */
static void add_flat_bytes(const tensor *t, size_t at, const plan *p, const settings *s,
                           size_t *bytes) {
    const size_t element = dtype_size(t->dtype) + master_bytes(s, t->dtype) +
                           (s->elementwise == ELEMENTWISE_ADAMW ? 2 : 1) * sizeof(float);
    for (size_t left = t->elements; left > 0;) {
        const size_t rank = at / p->flat_shard, room = (rank + 1) * p->flat_shard - at;
        const size_t here = left < room ? left : room;
        bytes[rank] += here * element;
        at += here;
        left -= here;
    }
}

void state_bytes(const registry *r, const plan *p, const settings *s, size_t *bytes) {
    for (size_t i = 0; i < r->view_count; i++)
        bytes[p->view_owner[i]] += view_bytes(&r->views[i], &r->tensors[r->views[i].tensor], s);
    for (size_t i = 0; i < r->tensor_count; i++) {
        const tensor *t = &r->tensors[i];
        if (t->role == MUONSHARD_ROLE_ELEMENTWISE)
            add_flat_bytes(t, p->flat_offset[i], p, s, bytes);
        else if (t->role == MUONSHARD_ROLE_FROZEN)
            bytes[i % (size_t)p->world_size] += t->elements * dtype_size(t->dtype);
    }
}

void state_free(state_list *list) {
    free(list->slices);
    *list = (state_list){NULL, 0};
}

uint64_t state_tensors_hash(const registry *r) {
    uint64_t hash = r->tensor_count;
    for (size_t i = 0; i < r->tensor_count; i++) {
        const tensor *t = &r->tensors[i];
        const int64_t facts[] = {t->role, t->dtype, t->dims};
        hash = XXH64(t->name, strlen(t->name), hash);
        hash = XXH64(facts, sizeof facts, hash);
        hash = XXH64(t->shape, (size_t)t->dims * sizeof *t->shape, hash);
    }
    return hash;
}
