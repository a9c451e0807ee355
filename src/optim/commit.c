/* commit.c - from tensors to a handle that can step: plan, schedule, memory, kernel arguments, and
 * the comparison of all of it over the ranks. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "optim/newton_schulz.h"
#include "optim/optimizer.h"

/* ---- memory ---- */

/* `pointer` is the address of a pointer of any type. */
static muonshard_status reserve(muonshard_optimizer *o, void *pointer, size_t count, size_t item) {
    void *memory = NULL;
    size_t bytes;
    FAIL_IF(__builtin_mul_overflow(count ? count : 1, item, &bytes), &o->error,
            MUONSHARD_ERR_MEMORY, "workspace of %zu x %zu bytes", count, item);
    const muonshard_status status = o->backend->ops->alloc(o->backend, &memory, bytes);
    FAIL_IF(status, &o->error, status, "workspace of %zu bytes: %s", bytes, o->backend->error.text);
    memcpy(pointer, &memory, sizeof memory);
    o->workspace_bytes += bytes;
    return MUONSHARD_OK;
}

static muonshard_status host_array(muonshard_optimizer *o, void *pointer, size_t count,
                                   size_t item) {
    void *memory = calloc(count ? count : 1, item);
    FAIL_IF(!memory, &o->error, MUONSHARD_ERR_MEMORY, "out of memory");
    memcpy(pointer, &memory, sizeof memory);
    return MUONSHARD_OK;
}

static int agree_size(const muonshard_optimizer *o) {
    return o->agree_comm ? o->agree_comm->size : 0;
}

static muonshard_status reserve_workspace(muonshard_optimizer *o) {
    workspace *m = &o->memory;
    const plan *p = &o->plan;
    const size_t tensors = o->registry.tensor_count, agreeing = (size_t)agree_size(o);
    o->flat_chunks = p->flat_shard / PLAN_FLAT_CHUNK;
    o->word_stride = 1 + tensors + p->wave_count + o->flat_chunks + 1;
    const size_t used_chunks = (p->flat_elements + PLAN_FLAT_CHUNK - 1) / PLAN_FLAT_CHUNK;
    o->sum_count = o->registry.view_count + used_chunks;

    TRY(reserve(o, &m->momentum, p->matrix_elements, sizeof(float)));
    TRY(reserve(o, &m->flat_m, p->flat_shard, sizeof(float)));
    TRY(reserve(o, &m->flat_v, p->flat_shard, sizeof(float)));
    o->state_bytes = o->workspace_bytes;
    TRY(reserve(o, &m->owned, p->owned_elements, sizeof(float)));
    TRY(reserve(o, &m->flat_w, p->flat_shard, sizeof(float)));
    TRY(reserve(o, &m->pack, p->pack_elements, sizeof(float)));
    const size_t scratch = comm_needs_scratch(o->comm) ? p->scratch_elements : 0;
    const size_t exchange = scratch > p->gather_elements ? scratch : p->gather_elements;
    TRY(reserve(o, &m->exchange, exchange, sizeof(float)));
    const bool sends = o->settings->reduce != REDUCE_NONE;
    TRY(reserve(o, &m->zeros, sends ? p->largest_unpacked : 0, sizeof(float)));
    TRY(reserve(o, &m->word, o->word_stride, sizeof(double)));
    TRY(reserve(o, &m->words, o->word_stride * (size_t)p->world_size, sizeof(double)));
    TRY(reserve(o, &m->totals, 2 * (2 + agreeing), sizeof(double)));
    TRY(reserve(o, &m->active, tensors, 1));
    TRY(reserve(o, &m->skip_if_absent, tensors, 1));
    TRY(reserve(o, &m->values, tensors, sizeof(tensor_values)));
    TRY(reserve(o, &m->record, 1, sizeof(step_record)));
    TRY(reserve(o, &m->sum_index, o->sum_count + agreeing, sizeof(size_t)));

    size_t newton_schulz = 0;
    for (size_t b = 0; b < p->batch_count; b++) {
        if (p->batches[b].kind == PLAN_FLAT)
            continue;
        const size_t count = o->backend->ops->batched ? o->batches[b].owned : 1;
        const size_t bytes = o->backend->ops->orthogonalize_workspace(
            o->backend, o->batches[b].program, p->batches[b].m, p->batches[b].n, count);
        newton_schulz = bytes > newton_schulz ? bytes : newton_schulz;
    }
    return reserve(o, &m->newton_schulz, newton_schulz, 1);
}

/* Small tables go over by copy: the memory may be a device's. */
static muonshard_status upload(muonshard_optimizer *o, void *dst, const void *src, size_t bytes) {
    const copy_item item = {dst, src, bytes};
    const muonshard_status status =
        o->backend->ops->copy(o->backend, &item, 1, NULL, STREAM_COMPUTE);
    FAIL_IF(status, &o->error, status, "%s", o->backend->error.text);
    return MUONSHARD_OK;
}

static muonshard_status upload_tables(muonshard_optimizer *o) {
    const plan *p = &o->plan;
    const size_t tensors = o->registry.tensor_count, agreeing = (size_t)agree_size(o);
    const size_t first_sum = 1 + tensors;
    uint8_t *skip = NULL;
    size_t *index = NULL;
    muonshard_status status;
    TRY_GOTO(host_array(o, &skip, tensors, 1), done);
    TRY_GOTO(host_array(o, &index, o->sum_count + agreeing, sizeof *index), done);
    for (size_t i = 0; i < tensors; i++)
        skip[i] = o->registry.tensors[i].null_grad == MUONSHARD_NULL_GRAD_SKIP;
    size_t k = 0;
    for (size_t v = 0; v < o->registry.view_count; v++)
        index[k++] = (size_t)p->view_owner[v] * o->word_stride + first_sum + p->view_wave[v];
    for (size_t c = 0; k < o->sum_count; c++)
        index[k++] =
            c / o->flat_chunks * o->word_stride + first_sum + p->wave_count + c % o->flat_chunks;
    for (size_t r = 0; r < agreeing; r++)
        index[k++] = 2 * r + 1;
    TRY_GOTO(upload(o, o->memory.skip_if_absent, skip, tensors), done);
    TRY_GOTO(upload(o, o->memory.sum_index, index, k * sizeof *index), done);
done:
    free(skip);
    free(index);
    return status;
}

/* ---- kernel arguments ---- */

static muonshard_status make_matrix_batch(muonshard_optimizer *o, const batch *b,
                                          batch_work *work) {
    const plan *p = &o->plan;
    const int rank = o->comm->rank;
    for (size_t i = 0; i < b->count; i++) {
        const wave *w = &p->waves[b->first + i];
        for (int r = 0; r < p->world_size; r++)
            work->views += plan_slot_view(p, w, r) != PLAN_EMPTY_SLOT;
        work->owned += plan_slot_view(p, w, rank) != PLAN_EMPTY_SLOT;
    }
    TRY(host_array(o, &work->program, 1, sizeof *work->program));
    TRY(newton_schulz_compile(o->settings, b->m, b->n, work->program, &o->error));
    TRY(host_array(o, &work->momentum, work->owned, sizeof *work->momentum));
    TRY(host_array(o, &work->orthogonalize, work->owned, sizeof *work->orthogonalize));
    return host_array(o, &work->apply, work->views, sizeof *work->apply);
}

static muonshard_status make_batches(muonshard_optimizer *o) {
    TRY(host_array(o, &o->batches, o->plan.batch_count, sizeof *o->batches));
    for (size_t b = 0; b < o->plan.batch_count; b++)
        if (o->plan.batches[b].kind == PLAN_MATRICES)
            TRY(make_matrix_batch(o, &o->plan.batches[b], &o->batches[b]));
    return MUONSHARD_OK;
}

/* Needs the workspace. */
static void point_batch(muonshard_optimizer *o, const batch *b, batch_work *work) {
    const plan *p = &o->plan;
    size_t owned = 0, views = 0;
    for (size_t i = 0; i < b->count; i++) {
        const wave *w = &p->waves[b->first + i];
        for (int r = 0; r < p->world_size; r++) {
            const size_t index = plan_slot_view(p, w, r);
            if (index == PLAN_EMPTY_SLOT)
                continue;
            const view *v = &o->registry.views[index];
            const float *gathered = o->memory.exchange + w->gather_offset + (size_t)r * w->slot;
            work->apply[views++] =
                (apply_item){.w = o->registry.tensors[v->tensor].param + v->offset,
                             .u = gathered,
                             .count = w->slot,
                             .scale = v->scale,
                             .tensor = v->tensor};
            if (r != o->comm->rank)
                continue;
            float *u = o->memory.owned + w->owned_offset;
            work->momentum[owned] =
                (momentum_item){.g_u = u,
                                .momentum = o->memory.momentum + w->owned_offset,
                                .count = w->slot,
                                .tensor = v->tensor};
            work->orthogonalize[owned++] =
                (orthogonalize_item){.u = u, .transposed = v->rows > v->cols};
        }
    }
}

/* The tensors of the flat rest that reach into this rank's shard. */
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

/* Buffers of the collectives; where unpacked gradients are sent from is known in the step only. */
static muonshard_status make_parts(muonshard_optimizer *o, const op *operation, op_state *state) {
    const plan *p = &o->plan;
    const workspace *m = &o->memory;
    if (operation->kind == OP_AGREE) {
        TRY(host_array(o, &state->parts, 1, sizeof *state->parts));
        state->part_count = 1;
        state->parts[0] = (comm_part){
            .send = m->word, .recv = m->words, .bytes = o->word_stride * sizeof(double)};
        return MUONSHARD_OK;
    }
    const bool gather = operation->kind == OP_ALL_GATHER;
    const size_t first =
        gather ? p->batches[operation->index].first : p->buckets[operation->index].first;
    const size_t count =
        gather ? p->batches[operation->index].count : p->buckets[operation->index].count;
    TRY(host_array(o, &state->parts, count, sizeof *state->parts));
    state->part_count = count;
    for (size_t i = 0; i < count; i++) {
        const wave *w = &p->waves[gather ? first + i : p->reduce_order[first + i]];
        float *owned = m->owned + w->owned_offset;
        comm_part *part = &state->parts[i];
        part->bytes = w->slot * sizeof(float);
        if (gather) {
            part->send = w->kind == PLAN_FLAT ? m->flat_w : owned;
            part->recv = m->exchange + w->gather_offset;
        } else {
            part->send = m->pack + w->pack_offset;
            part->recv = owned;
            part->scratch = m->exchange + w->exchange_offset;
        }
    }
    return MUONSHARD_OK;
}

static muonshard_status make_work(muonshard_optimizer *o) {
    const plan *p = &o->plan;
    for (size_t b = 0; b < p->batch_count; b++) {
        if (p->batches[b].kind == PLAN_MATRICES)
            point_batch(o, &p->batches[b], &o->batches[b]);
        else
            TRY(make_adam(o, &p->waves[p->batches[b].first]));
    }
    TRY(host_array(o, &o->buckets, p->bucket_count, sizeof *o->buckets));
    for (size_t b = 0; b < p->bucket_count; b++)
        TRY(make_bucket(o, &p->buckets[b], &o->buckets[b]));
    TRY(host_array(o, &o->ops, o->schedule.count, sizeof *o->ops));
    for (size_t i = 0; i < o->schedule.count; i++)
        if (op_is_collective(o->schedule.ops[i].kind))
            TRY(make_parts(o, &o->schedule.ops[i], &o->ops[i]));
    const size_t tensors = o->registry.tensor_count;
    TRY(host_array(o, &o->copies, p->slot_count + tensors + 2, sizeof *o->copies));
    TRY(host_array(o, &o->word_head, 1 + tensors, sizeof *o->word_head));
    TRY(host_array(o, &o->values, tensors, sizeof *o->values));
    TRY(host_array(o, &o->first_entry, tensors + 1, sizeof *o->first_entry));
    for (size_t i = 0; i < tensors; i++)
        o->first_entry[i + 1] = o->first_entry[i] + (size_t)o->registry.tensors[i].entries;
    return host_array(o, &o->ready, o->first_entry[tensors], 1);
}

/* ---- the same on every rank ---- */

/* Rank 0's tensors are everybody's, or the message names the first that isn't. Called where the
 * lists are known to differ. */
static muonshard_status name_different_tensor(muonshard_optimizer *o) {
    const size_t own_count = o->registry.tensor_count;
    uint64_t count = own_count;
    TRY_COMM(o, comm_broadcast(o->comm, &count, sizeof count, 0));
    for (uint64_t i = 0; i < count; i++) {
        char name[256] = "";
        uint64_t hash = i < own_count ? registry_tensor_hash(&o->registry, i) : 0;
        const uint64_t own = hash;
        if (i < own_count)
            snprintf(name, sizeof name, "%s", o->registry.tensors[i].name);
        TRY_COMM(o, comm_broadcast(o->comm, &hash, sizeof hash, 0));
        TRY_COMM(o, comm_broadcast(o->comm, name, sizeof name, 0));
        error_text text = {""};
        muonshard_status status = MUONSHARD_OK;
        if (i >= own_count)
            status = fail(&text, MUONSHARD_ERR_MISMATCH,
                          "%zu tensors here, %llu on rank 0 ('%s' and on are missing)", own_count,
                          (unsigned long long)count, name);
        else if (own != hash)
            status = fail(&text, MUONSHARD_ERR_MISMATCH,
                          "tensor %llu is '%s' here and '%s' on rank 0, or differs in shape, role, "
                          "splits or multipliers",
                          (unsigned long long)i, o->registry.tensors[i].name, name);
        status = comm_agree(o->comm, status, &text);
        FAIL_IF(status, &o->error, status, "%s", text.text);
    }
    const bool more = own_count > count;
    error_text text = {""};
    muonshard_status status = MUONSHARD_OK;
    if (more)
        status = fail(&text, MUONSHARD_ERR_MISMATCH,
                      "%zu tensors here, %llu on rank 0 ('%s' is one more)", own_count,
                      (unsigned long long)count, o->registry.tensors[count].name);
    status = comm_agree(o->comm, status, &text);
    FAIL_IF(status, &o->error, status, "%s", text.text);
    return MUONSHARD_OK;
}

static muonshard_status compare_plans(muonshard_optimizer *o) {
    uint64_t own[2] = {o->registry.tensor_count, plan_hash(&o->plan) ^ schedule_hash(&o->schedule)};
    own[1] +=
        (uint64_t)agree_size(o); /* with agree_comm on some ranks only, they would never meet */
    for (size_t i = 0; i < o->registry.tensor_count; i++)
        own[0] = own[0] * 0x9E3779B97F4A7C15U + registry_tensor_hash(&o->registry, i);
    uint64_t first[2] = {own[0], own[1]};
    TRY_COMM(o, comm_broadcast(o->comm, first, sizeof first, 0));
    uint8_t differs = memcmp(own, first, sizeof own) != 0;
    uint8_t *all = calloc((size_t)o->comm->size, 1);
    muonshard_status status =
        comm_agree(o->comm, all ? MUONSHARD_OK : MUONSHARD_ERR_MEMORY, &o->error);
    if (status == MUONSHARD_OK)
        status = comm_allgather(o->comm, &differs, all, 1);
    bool any = false;
    for (int r = 0; status == MUONSHARD_OK && r < o->comm->size; r++)
        any = any || all[r];
    free(all);
    TRY_COMM(o, status);
    if (!any)
        return MUONSHARD_OK;
    TRY(name_different_tensor(o));
    return fail(&o->error, MUONSHARD_ERR_MISMATCH,
                "the ranks' plans differ for the same tensors, or agree_comm is not given on all");
}

static muonshard_status prepare(muonshard_optimizer *o) {
    TRY(plan_make(&o->plan, &o->registry, o->settings, o->comm->size, &o->error));
    TRY(schedule_make(&o->schedule, &o->plan, o->settings, &o->error));
    TRY(make_batches(o));
    TRY(reserve_workspace(o));
    TRY(make_work(o));
    return upload_tables(o);
}

static void fill_stats(muonshard_optimizer *o) {
    muonshard_stats_info *s = &o->stats;
    s->matrices = (int64_t)o->registry.view_count;
    for (size_t i = 0; i < o->plan.batch_count; i++)
        s->matrices_owned += (int64_t)o->batches[i].owned;
    s->imbalance = o->plan.imbalance;
    s->bytes_reduced = (int64_t)o->plan.bytes_reduced;
    s->bytes_gathered = (int64_t)o->plan.bytes_gathered;
    s->bytes_packed = (int64_t)o->plan.bytes_packed;
    s->bytes_padded = (int64_t)o->plan.bytes_padded;
    s->bytes_state = (int64_t)o->state_bytes;
    s->bytes_workspace = (int64_t)(o->workspace_bytes - o->state_bytes);
}

muonshard_status optimizer_commit(muonshard_optimizer *o, muonshard_status local,
                                  muonshard_sync_params sync) {
    comm_mark(o->comm, 0, "commit");
    muonshard_status status = local ? local : prepare(o);
    TRY_GOTO(comm_agree(o->comm, status, &o->error), failed);
    TRY_GOTO(compare_plans(o), failed);
    status = trace_open(&o->trace, o->settings->trace, o->comm->rank, o->comm->size, &o->error);
    TRY_GOTO(comm_agree(o->comm, status, &o->error), failed);
    if (sync == MUONSHARD_SYNC_BROADCAST)
        TRY_GOTO(replicas_broadcast(o), failed);
    else if (sync == MUONSHARD_SYNC_CHECK)
        TRY_GOTO(replicas_check(o), failed);
    fill_stats(o);
    o->committed = true;
    comm_mark(o->comm, 0, "outside the library");
    return MUONSHARD_OK;
failed:
    comm_mark(o->comm, 0, "outside the library");
    optimizer_release(o);
    return status;
}

/* A collective that is not complete, in a step that timed out or was left half way, may still write
 * to the workspace when a late rank arrives. */
static bool workspace_in_use(const muonshard_optimizer *o) {
    bool in_use = false;
    for (size_t i = 0; o->ops && i < o->schedule.count; i++)
        in_use = in_use || o->ops[i].ticket.open;
    return (in_use && o->comm->ops->writes_after_death) ||
           (o->totals.ticket.open && o->agree_comm->ops->writes_after_death);
}

/* Back to what it was before commit. */
void optimizer_release(muonshard_optimizer *o) {
    void *memory[] = {o->memory.owned,    o->memory.momentum,       o->memory.pack,
                      o->memory.exchange, o->memory.zeros,          o->memory.flat_m,
                      o->memory.flat_v,   o->memory.flat_w,         o->memory.newton_schulz,
                      o->memory.word,     o->memory.words,          o->memory.totals,
                      o->memory.active,   o->memory.skip_if_absent, o->memory.values,
                      o->memory.record,   o->memory.sum_index};
    for (size_t i = 0; i < sizeof memory / sizeof memory[0] && !workspace_in_use(o); i++)
        o->backend->ops->free(o->backend, memory[i]);
    o->memory = (workspace){0};
    for (size_t b = 0; o->batches && b < o->plan.batch_count; b++) {
        free(o->batches[b].momentum);
        free(o->batches[b].orthogonalize);
        free(o->batches[b].apply);
        free(o->batches[b].program);
    }
    for (size_t b = 0; o->buckets && b < o->plan.bucket_count; b++)
        free(o->buckets[b].sums);
    for (size_t i = 0; o->ops && i < o->schedule.count; i++)
        free(o->ops[i].parts);
    void *host[] = {o->batches,   o->buckets, o->ops,         o->adam, o->copies,
                    o->word_head, o->values,  o->first_entry, o->ready};
    for (size_t i = 0; i < sizeof host / sizeof host[0]; i++)
        free(host[i]);
    o->batches = NULL;
    o->buckets = NULL;
    o->ops = NULL;
    o->adam = NULL;
    o->adam_count = 0;
    o->copies = NULL;
    o->word_head = NULL;
    o->values = NULL;
    o->first_entry = NULL;
    o->ready = NULL;
    o->state_bytes = o->workspace_bytes = 0;
    error_text error;
    if (trace_close(o->trace, &error))
        comm_log(o->comm, MUONSHARD_LOG_WARNING, "%s", error.text);
    o->trace = NULL;
    plan_free(&o->plan);
    schedule_free(&o->schedule);
}
