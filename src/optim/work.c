/* work.c - kernel arguments: the plan's waves and batches as lists of addresses in the workspace
 * and in the caller's memory. */
#include <stdlib.h>
#include <string.h>

#include "optim/newton_schulz.h"
#include "optim/optimizer.h"

muonshard_status host_array(muonshard_optimizer *o, void *pointer, size_t count, size_t item) {
    void *memory = calloc(count ? count : 1, item);
    FAIL_IF(!memory, &o->error, MUONSHARD_ERR_MEMORY, "out of memory");
    memcpy(pointer, &memory, sizeof memory);
    return MUONSHARD_OK;
}

/* ---- batches of matrices ---- */

static muonshard_status plan_batch(muonshard_optimizer *o, const batch *b, batch_work *work) {
    const plan *p = &o->plan;
    size_t views = 0;
    for (size_t i = 0; i < b->count; i++) {
        const wave *w = &p->waves[b->first + i];
        for (int r = 0; r < p->world_size; r++)
            views += plan_slot_view(p, w, r) != PLAN_EMPTY_SLOT;
        work->owned += plan_slot_view(p, w, o->comm->rank) != PLAN_EMPTY_SLOT;
    }
    TRY(host_array(o, &work->program, 1, sizeof *work->program));
    TRY(newton_schulz_compile(o->settings, b->dtype, p->device, b->m, b->n, work->program,
                              &o->error));
    TRY(host_array(o, &work->momentum, work->owned, sizeof *work->momentum));
    TRY(host_array(o, &work->orthogonalize, work->owned, sizeof *work->orthogonalize));
    TRY(host_array(o, &work->variance, work->owned, sizeof *work->variance));
    TRY(host_array(o, &work->apply, views, sizeof *work->apply));
    return host_array(o, &work->store, views, sizeof *work->store);
}

muonshard_status work_plan(muonshard_optimizer *o) {
    TRY(host_array(o, &o->batches, o->plan.batch_count, sizeof *o->batches));
    for (size_t b = 0; b < o->plan.batch_count; b++)
        if (o->plan.batches[b].kind == PLAN_MATRICES)
            TRY(plan_batch(o, &o->plan.batches[b], &o->batches[b]));
    return MUONSHARD_OK;
}

bool work_variance_by_rows(const settings *s, const view *v) {
    const bool turned = s->layout == LAYOUT_IN_OUT;
    const int64_t r = turned ? v->cols : v->rows, c = turned ? v->rows : v->cols;
    const bool by_outputs = s->variance_axis == VARIANCE_AXIS_ROWS || r >= c;
    return by_outputs != turned;
}

float *work_master(const muonshard_optimizer *o, const wave *w, int rank) {
    switch (registry_master(o->settings, w->dtype)) {
    case MASTER_OWNER: return rank == o->comm->rank ? o->memory.masters + w->master_offset : NULL;
    case MASTER_REPLICATED: return o->memory.masters + w->master_offset + (size_t)rank * w->slot;
    default: return NULL;
    }
}

/* U and the factors from `u` and `factor` into the parameters of a view. */
static apply_item apply_view(const muonshard_optimizer *o, const wave *w, int rank, const void *u,
                             const float *factor, muonshard_dtype u_dtype) {
    const view *v = &o->registry.views[plan_slot_view(&o->plan, w, rank)];
    const tensor *t = &o->registry.tensors[v->tensor];
    const bool varied = o->settings->variance != VARIANCE_NONE;
    return (apply_item){.w = tensor_param_at(t, v->offset),
                        .w_dtype = t->dtype,
                        .master = work_master(o, w, rank),
                        .u = u,
                        .u_dtype = u_dtype,
                        .factor = varied ? factor : NULL,
                        .by_rows = work_variance_by_rows(o->settings, v),
                        .rows = v->rows,
                        .cols = v->cols,
                        .scale = v->scale,
                        .tensor = v->tensor,
                        .first = v->offset};
}

/* Where this rank leaves U of a wave it owns a matrix of: in its place of the all-gather, which
 * then has nothing to copy; where nothing is gathered, or parameters are, or the communicator needs
 * them apart, where the gradient was. */
static void *update_at(const muonshard_optimizer *o, const batch *b, const wave *w) {
    size_t place = 0;
    if (b->gathers_params || !o->plan.gathers || !o->data->ops->gathers_in_place)
        return o->memory.owned + w->owned_offset;
    for (int r = 0; r < o->comm->rank; r++)
        place += !w->compact_gather || plan_slot_view(&o->plan, w, r) != PLAN_EMPTY_SLOT;
    return o->memory.exchange + w->gather_offset + place * w->slot * dtype_size(w->sent);
}

/* What the owner of a slot does with it. */
static void add_owned(muonshard_optimizer *o, const batch *b, const wave *w, batch_work *work,
                      size_t k) {
    const workspace *m = &o->memory;
    const view *v = &o->registry.views[plan_slot_view(&o->plan, w, o->comm->rank)];
    const tensor *t = &o->registry.tensors[v->tensor];
    const muonshard_dtype stored = (muonshard_dtype)o->settings->momentum_dtype;
    const float *master = work_master(o, w, o->comm->rank);
    float *u = m->owned + w->owned_offset;
    void *update = update_at(o, b, w);
    work->momentum[k] =
        (momentum_item){.g_u = u,
                        .momentum = (char *)m->momentum + w->owned_offset * dtype_size(stored),
                        .w = master ? master : tensor_param_at(t, v->offset),
                        .w_dtype = master ? MUONSHARD_FP32 : t->dtype,
                        .squares = m->squares ? m->squares + k : NULL,
                        .count = w->slot,
                        .tensor = v->tensor};
    work->orthogonalize[k] = (orthogonalize_item){.u = u,
                                                  .squares = work->momentum[k].squares,
                                                  .out = update,
                                                  .transposed = v->rows > v->cols};
    work->variance[k] = (variance_item){.u = update,
                                        .u_dtype = ns_program_output(work->program),
                                        .v = m->variance + w->variance_offset,
                                        .factor = m->factors + w->variance_offset,
                                        .rows = v->rows,
                                        .cols = v->cols,
                                        .by_rows = work_variance_by_rows(o->settings, v),
                                        .tensor = v->tensor};
}

/* `place`: of the rank's slot where the wave is gathered. */
static void add_slot(muonshard_optimizer *o, const batch *b, const wave *w, int rank, size_t place,
                     batch_work *work) {
    const workspace *m = &o->memory;
    const bool own = rank == o->comm->rank;
    const muonshard_dtype u_dtype = ns_program_output(work->program);
    const char *gathered = m->exchange + w->gather_offset;
    const char *slot = gathered + place * w->slot * dtype_size(w->sent);
    if (!o->plan.gathers || (b->gathers_params && own)) {
        work->apply[work->apply_count++] =
            apply_view(o, w, rank, update_at(o, b, w), m->factors + w->variance_offset, u_dtype);
    } else if (!b->gathers_params) {
        const float *factors = (const float *)(const void *)(m->exchange + w->factor_offset);
        work->apply[work->apply_count++] =
            apply_view(o, w, rank, slot, factors + place * (size_t)b->n, u_dtype);
    } else {
        const view *v = &o->registry.views[plan_slot_view(&o->plan, w, rank)];
        work->store[work->store_count++] =
            (convert_item){.dst = tensor_param_at(&o->registry.tensors[v->tensor], v->offset),
                           .dst_dtype = w->sent,
                           .src = slot,
                           .src_dtype = w->sent,
                           .count = w->slot,
                           .tensor = v->tensor,
                           .first = v->offset};
    }
}

static void make_batch(muonshard_optimizer *o, const batch *b, batch_work *work) {
    const plan *p = &o->plan;
    size_t owned = 0;
    for (size_t i = 0; i < b->count; i++) {
        const wave *w = &p->waves[b->first + i];
        size_t place = 0;
        for (int r = 0; r < p->world_size; r++) {
            if (plan_slot_view(p, w, r) != PLAN_EMPTY_SLOT)
                add_slot(o, b, w, r, place++, work);
            else
                place += !w->compact_gather;
        }
        if (plan_slot_view(p, w, o->comm->rank) != PLAN_EMPTY_SLOT)
            add_owned(o, b, w, work, owned++);
    }
}

/* ---- the flat rest ---- */

/* The tensors that reach into this rank's shard. */
static muonshard_status make_adam(muonshard_optimizer *o, const wave *flat) {
    const plan *p = &o->plan;
    const size_t start = p->flat_shard * (size_t)o->comm->rank, end = start + p->flat_shard;
    TRY(host_array(o, &o->adam, o->registry.tensor_count, sizeof *o->adam));
    for (size_t i = 0; i < o->registry.tensor_count; i++) {
        const tensor *t = &o->registry.tensors[i];
        if (t->role != MUONSHARD_ROLE_ELEMENTWISE)
            continue;
        const size_t from = p->flat_offset[i] > start ? p->flat_offset[i] : start;
        const size_t t_end = p->flat_offset[i] + t->elements, to = t_end < end ? t_end : end;
        if (from >= to)
            continue;
        const size_t at = from - start;
        o->adam[o->adam_count++] = (adam_item){.w = o->memory.flat_w + at,
                                               .g = o->memory.owned + flat->owned_offset + at,
                                               .m = o->memory.flat_m + at,
                                               .v = o->memory.flat_v + at,
                                               .count = to - from,
                                               .tensor = (int)i};
    }
    return MUONSHARD_OK;
}

size_t work_adam_first(const muonshard_optimizer *o, const adam_item *a) {
    const size_t start = o->plan.flat_shard * (size_t)o->comm->rank;
    return start + (size_t)(a->w - o->memory.flat_w) - o->plan.flat_offset[a->tensor];
}

size_t work_load_flat(const muonshard_optimizer *o, convert_item *items, bool masters) {
    size_t filled = 0;
    for (size_t i = 0; i < o->adam_count; i++) {
        const adam_item *a = &o->adam[i];
        const tensor *t = &o->registry.tensors[a->tensor];
        if ((registry_master(o->settings, t->dtype) != MASTER_NONE) == masters)
            items[filled++] = (convert_item){.dst = a->w,
                                             .dst_dtype = MUONSHARD_FP32,
                                             .src = tensor_param_at(t, work_adam_first(o, a)),
                                             .src_dtype = t->dtype,
                                             .count = a->count};
    }
    return filled;
}

/* ---- buckets and collectives ---- */

static muonshard_status make_bucket(muonshard_optimizer *o, const bucket *b, bucket_work *work) {
    const plan *p = &o->plan;
    double *sums = o->memory.word + 1 + o->registry.tensor_count;
    TRY(host_array(o, &work->sums, b->count + o->flat_chunks, sizeof *work->sums));
    for (size_t i = 0; i < b->count; i++) {
        const size_t index = p->reduce_order[b->first + i];
        const wave *w = &p->waves[index];
        const float *x = o->memory.owned + w->owned_offset;
        if (w->kind == PLAN_FLAT) {
            for (size_t c = 0; c < o->flat_chunks; c++)
                work->sums[work->sum_count++] = (sum_squares_item){
                    x + c * PLAN_FLAT_CHUNK, PLAN_FLAT_CHUNK, sums + p->wave_count + c};
        } else if (plan_slot_view(p, w, o->comm->rank) != PLAN_EMPTY_SLOT) {
            work->sums[work->sum_count++] = (sum_squares_item){x, w->slot, sums + index};
        }
    }
    return MUONSHARD_OK;
}

const void *work_gathered_from(const muonshard_optimizer *o, const batch *b, const wave *w) {
    const workspace *m = &o->memory;
    if (w->kind == PLAN_FLAT)
        return m->flat_sent ? m->flat_sent : m->flat_w;
    const size_t index = plan_slot_view(&o->plan, w, o->comm->rank);
    if (index == PLAN_EMPTY_SLOT)
        return m->owned + w->owned_offset;
    if (!b->gathers_params)
        return update_at(o, b, w);
    const view *v = &o->registry.views[index];
    return tensor_param_at(&o->registry.tensors[v->tensor], v->offset);
}

/* Room for `count` parts, and for as many in memory of the host where they are staged. */
static muonshard_status make_room(muonshard_optimizer *o, const muonshard_comm *comm,
                                  op_state *state, size_t count) {
    TRY(host_array(o, &state->parts, count, sizeof *state->parts));
    return comm_is_staged(comm, o->backend)
               ? host_array(o, &state->host_parts, count, sizeof *state->host_parts)
               : MUONSHARD_OK;
}

static void free_parts(op_state *state) {
    free(state->parts);
    free(state->host_parts);
    *state = (op_state){.part_count = 0};
}

/* NULL where all slots are. */
static const uint8_t *filled_slots(const muonshard_optimizer *o, const wave *w) {
    if (w->kind == PLAN_FLAT)
        return NULL;
    const uint8_t *filled = o->filled + w->first_slot;
    for (int r = 0; r < o->plan.world_size; r++)
        if (!filled[r])
            return filled;
    return NULL;
}

static muonshard_status make_filled(muonshard_optimizer *o) {
    TRY(host_array(o, &o->filled, o->plan.slot_count, 1));
    for (size_t i = 0; i < o->plan.slot_count; i++)
        o->filled[i] = o->plan.slots[i] != PLAN_EMPTY_SLOT;
    return MUONSHARD_OK;
}

/* `offset` in the exchange arena, and in what it is staged by. */
static void add_gathered(muonshard_optimizer *o, op_state *state, const void *send, size_t offset,
                         size_t bytes, const uint8_t *filled, bool compact) {
    const workspace *m = &o->memory;
    comm_part *part = &state->parts[state->part_count];
    *part = (comm_part){.send = send,
                        .recv = m->exchange + offset,
                        .bytes = bytes,
                        .filled = filled,
                        .compact = compact};
    if (state->host_parts) {
        comm_part *host = &state->host_parts[state->part_count];
        *host = *part;
        host->send = m->staged_sent + offset + (size_t)o->comm->rank * bytes;
        host->recv = m->staged_recv + offset;
    }
    state->part_count++;
}

static muonshard_status make_gather(muonshard_optimizer *o, const batch *b, op_state *state) {
    const workspace *m = &o->memory;
    const bool factors =
        b->kind == PLAN_MATRICES && !b->gathers_params && o->settings->variance != VARIANCE_NONE;
    TRY(make_room(o, o->data, state, 2 * b->count));
    for (size_t i = 0; i < b->count; i++) {
        const wave *w = &o->plan.waves[b->first + i];
        const uint8_t *filled = filled_slots(o, w);
        add_gathered(o, state, work_gathered_from(o, b, w), w->gather_offset,
                     w->slot * dtype_size(w->sent), filled, w->compact_gather);
        if (factors)
            add_gathered(o, state, m->factors + w->variance_offset, w->factor_offset,
                         (size_t)b->n * sizeof(float), filled, w->compact_gather);
    }
    return MUONSHARD_OK;
}

/* Where gradients that are not packed are sent from is known in the step only. */
static muonshard_status make_reduction(muonshard_optimizer *o, const bucket *b, op_state *state) {
    const workspace *m = &o->memory;
    TRY(make_room(o, o->data, state, b->count));
    state->part_count = b->count;
    for (size_t i = 0; i < b->count; i++) {
        const wave *w = &o->plan.waves[o->plan.reduce_order[b->first + i]];
        state->parts[i] = (comm_part){.send = m->pack + w->pack_offset,
                                      .recv = m->owned + w->owned_offset,
                                      .scratch = m->exchange + w->exchange_offset,
                                      .bytes = w->slot * dtype_size(w->wire),
                                      .dtype = w->wire,
                                      .filled = filled_slots(o, w),
                                      .compact = w->compact_pack};
        if (state->host_parts) {
            state->host_parts[i] = state->parts[i];
            state->host_parts[i].send = m->staged_sent + w->exchange_offset;
            state->host_parts[i].scratch = m->staged_recv + w->exchange_offset;
        }
    }
    return MUONSHARD_OK;
}

/* Few numbers of every rank. `staged`: [1 + ranks, count], where there is such a thing. */
static muonshard_status make_numbers(muonshard_optimizer *o, const muonshard_comm *comm,
                                     op_state *state, const double *send, double *recv,
                                     size_t count, double *staged) {
    TRY(make_room(o, comm, state, 1));
    state->part_count = 1;
    state->parts[0] = (comm_part){.send = send, .recv = recv, .bytes = count * sizeof(double)};
    if (state->host_parts)
        state->host_parts[0] =
            (comm_part){.send = staged, .recv = staged + count, .bytes = count * sizeof(double)};
    return MUONSHARD_OK;
}

static muonshard_status make_totals(muonshard_optimizer *o) {
    const workspace *m = &o->memory;
    double *staged = m->staged_words;
    if (staged)
        staged += o->word_stride * (1 + (size_t)o->comm->size);
    return make_numbers(o, o->agree_comm, &o->totals, m->totals + 2, m->totals + 4, 2, staged);
}

static muonshard_status make_parts(muonshard_optimizer *o, const op *operation, op_state *state) {
    if (operation->kind == OP_REDUCE_SCATTER)
        return make_reduction(o, &o->plan.buckets[operation->index], state);
    if (operation->kind == OP_ALL_GATHER)
        return make_gather(o, &o->plan.batches[operation->index], state);
    const workspace *m = &o->memory;
    return make_numbers(o, o->data, state, m->word, m->words, o->word_stride, m->staged_words);
}

muonshard_status work_make(muonshard_optimizer *o) {
    const plan *p = &o->plan;
    TRY(make_filled(o));
    for (size_t b = 0; b < p->batch_count; b++) {
        if (p->batches[b].kind == PLAN_MATRICES)
            make_batch(o, &p->batches[b], &o->batches[b]);
        else
            TRY(make_adam(o, &p->waves[p->batches[b].first]));
    }
    TRY(host_array(o, &o->buckets, p->bucket_count, sizeof *o->buckets));
    for (size_t b = 0; b < p->bucket_count; b++)
        TRY(make_bucket(o, &p->buckets[b], &o->buckets[b]));
    TRY(host_array(o, &o->ops, o->schedule.count, sizeof *o->ops));
    if (o->agree_comm)
        TRY(make_totals(o));
    for (size_t i = 0; i < o->schedule.count; i++)
        if (op_is_collective(o->schedule.ops[i].kind))
            TRY(make_parts(o, &o->schedule.ops[i], &o->ops[i]));
    const size_t tensors = o->registry.tensor_count;
    TRY(host_array(o, &o->converts, p->slot_count + tensors, sizeof *o->converts));
    TRY(host_array(o, &o->word_head, 1 + tensors, sizeof *o->word_head));
    TRY(host_array(o, &o->values, tensors, sizeof *o->values));
    TRY(host_array(o, &o->first_entry, tensors + 1, sizeof *o->first_entry));
    for (size_t i = 0; i < tensors; i++)
        o->first_entry[i + 1] = o->first_entry[i] + (size_t)o->registry.tensors[i].entries;
    return host_array(o, &o->ready, o->first_entry[tensors], 1);
}

void work_free(muonshard_optimizer *o) {
    for (size_t b = 0; o->batches && b < o->plan.batch_count; b++) {
        const batch_work *work = &o->batches[b];
        void *lists[] = {work->momentum, work->orthogonalize, work->variance,
                         work->apply,    work->store,         work->program};
        for (size_t i = 0; i < sizeof lists / sizeof lists[0]; i++)
            free(lists[i]);
    }
    for (size_t b = 0; o->buckets && b < o->plan.bucket_count; b++)
        free(o->buckets[b].sums);
    for (size_t i = 0; o->ops && i < o->schedule.count; i++)
        free_parts(&o->ops[i]);
    free_parts(&o->totals);
    void *lists[] = {o->batches,   o->buckets, o->ops,         o->adam,  o->converts,
                     o->word_head, o->values,  o->first_entry, o->ready, o->filled};
    for (size_t i = 0; i < sizeof lists / sizeof lists[0]; i++)
        free(lists[i]);
    o->batches = NULL;
    o->buckets = NULL;
    o->ops = NULL;
    o->adam = NULL;
    o->adam_count = 0;
    o->converts = NULL;
    o->word_head = NULL;
    o->values = NULL;
    o->first_entry = NULL;
    o->ready = NULL;
    o->filled = NULL;
}
