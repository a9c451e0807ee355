/* commit.c - from tensors to a handle that can step: plan, schedule, memory, and the comparison of
 * all of it over the ranks. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

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

/* Memory of the host that a device copies to and from. */
static muonshard_status reserve_pinned(muonshard_optimizer *o, void *pointer, size_t count,
                                       size_t item) {
    void *memory = NULL;
    if (!runs_ahead(o))
        return host_array(o, pointer, count, item);
    const muonshard_status status =
        o->backend->streams->alloc_pinned(o->backend, &memory, count * item);
    FAIL_IF(status, &o->error, status, "%s", o->backend->error.text);
    memcpy(pointer, &memory, sizeof memory);
    o->pinned_bytes += count * item;
    return MUONSHARD_OK;
}

static void free_pinned(const muonshard_optimizer *o, void *memory) {
    if (runs_ahead(o))
        o->backend->streams->free_pinned(o->backend, memory);
    else
        free(memory);
}

static int agree_size(const muonshard_optimizer *o) {
    return o->agree_comm ? o->agree_comm->size : 0;
}

static bool needs_scratch(const muonshard_optimizer *o) {
    bool needs = false;
    for (size_t i = 0; i < o->plan.wave_count; i++)
        needs = needs || !comm_sums(o->data, o->plan.waves[i].wire);
    return needs;
}

/* What a staged communicator sends and receives, laid out as the exchange arena is. */
static muonshard_status reserve_staging(muonshard_optimizer *o, size_t exchange_bytes) {
    workspace *m = &o->memory;
    const size_t agreeing = (size_t)agree_size(o);
    const bool staged = comm_is_staged(o->data, o->backend);
    if (staged) {
        TRY(reserve_pinned(o, &m->staged_sent, exchange_bytes, 1));
        TRY(reserve_pinned(o, &m->staged_recv, exchange_bytes, 1));
    }
    if (staged || (o->agree_comm && comm_is_staged(o->agree_comm, o->backend)))
        TRY(reserve_pinned(o, &m->staged_words,
                           o->word_stride * (1 + (size_t)o->comm->size) + 2 + 2 * agreeing,
                           sizeof(double)));
    return MUONSHARD_OK;
}

/* What a device has beside memory: stamps, graphs, records that come back. */
static muonshard_status reserve_streams(muonshard_optimizer *o) {
    const size_t stamps = o->schedule.count * STEPS_IN_FLIGHT * STAMP_COUNT;
    backend *b = o->backend;
    TRY(reserve_pinned(o, &o->memory.posted, STEP_RESULTS, sizeof(step_record)));
    if (!runs_ahead(o))
        return host_array(o, &o->stamps, stamps, sizeof *o->stamps);
    muonshard_status status = b->streams->alloc_stamps(b, stamps + 1);
    if (status == MUONSHARD_OK)
        status = b->streams->alloc_segments(b, (size_t)o->schedule.segments * STEPS_IN_FLIGHT);
    FAIL_IF(status, &o->error, status, "%s", b->error.text);
    o->graphs = o->settings->cuda_graphs && o->data->ops->on_stream;
    size_t owned = 0;
    for (size_t i = 0; i < o->plan.batch_count; i++)
        owned = o->batches[i].owned > owned ? o->batches[i].owned : owned;
    return reserve(o, &o->memory.squares, owned, sizeof(double));
}

static muonshard_status reserve_workspace(muonshard_optimizer *o) {
    workspace *m = &o->memory;
    const plan *p = &o->plan;
    const size_t tensors = o->registry.tensor_count, agreeing = (size_t)agree_size(o);
    o->flat_chunks = p->flat_shard / PLAN_FLAT_CHUNK;
    o->word_stride = 1 + tensors + p->wave_count + o->flat_chunks + 1;
    const size_t used_chunks = (p->flat_elements + PLAN_FLAT_CHUNK - 1) / PLAN_FLAT_CHUNK;
    o->sum_count = o->registry.view_count + used_chunks;

    const size_t momentum_size = dtype_size((muonshard_dtype)o->settings->momentum_dtype);
    TRY(reserve(o, &m->momentum, p->matrix_elements, momentum_size));
    TRY(reserve(o, &m->variance, p->variance_elements, sizeof(float)));
    TRY(reserve(o, &m->masters, p->master_elements, sizeof(float)));
    TRY(reserve(o, &m->flat_m, p->flat_shard, sizeof(float)));
    TRY(reserve(o, &m->flat_v, p->flat_shard, sizeof(float)));
    TRY(reserve(o, &m->flat_w, p->flat_shard, sizeof(float)));
    o->state_bytes = p->bytes_state;
    TRY(reserve(o, &m->owned, p->owned_elements, sizeof(float)));
    TRY(reserve(o, &m->factors, p->variance_elements, sizeof(float)));
    for (size_t i = 0; i < p->wave_count; i++)
        if (p->waves[i].kind == PLAN_FLAT && p->waves[i].sent != MUONSHARD_FP32)
            TRY(reserve(o, &m->flat_sent, p->flat_shard, dtype_size(p->waves[i].sent)));
    TRY(reserve(o, &m->pack, p->pack_bytes, 1));
    const size_t scratch = needs_scratch(o) ? p->scratch_bytes : 0;
    const size_t exchange = scratch > p->gather_bytes ? scratch : p->gather_bytes;
    TRY(reserve(o, &m->exchange, exchange, 1));
    TRY(reserve_staging(o, exchange));
    TRY(reserve_streams(o));
    TRY(reserve(o, &m->zeros, p->largest_unpacked_bytes, 1));
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
        const size_t count = backend_at_once(o->backend, o->batches[b].owned);
        const size_t bytes = o->backend->ops->orthogonalize_workspace(
            o->backend, o->batches[b].program, p->batches[b].m, p->batches[b].n, count);
        newton_schulz = bytes > newton_schulz ? bytes : newton_schulz;
    }
    return reserve(o, &m->newton_schulz, newton_schulz, 1);
}

/* Small tables go over by copy: the memory may be a device's. */
static muonshard_status upload(muonshard_optimizer *o, void *dst, const void *src, size_t bytes) {
    const copy_item item = {dst, src, bytes};
    const muonshard_status status = o->backend->ops->copy(o->backend, &item, 1, STREAM_COMPUTE);
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
    TRY(work_plan(o));
    TRY(reserve_workspace(o));
    TRY(work_make(o));
    TRY(upload_tables(o));
    return step_join(o, o->stream); /* parameters are read from here on */
}

/* ---- fp32 copies of 16-bit parameters ---- */

static muonshard_status fill_masters(muonshard_optimizer *o) {
    size_t filled = 0;
    for (size_t b = 0; b < o->plan.batch_count; b++) {
        for (size_t i = 0; i < o->batches[b].apply_count; i++) {
            const apply_item *a = &o->batches[b].apply[i];
            if (a->master)
                o->converts[filled++] = (convert_item){.dst = a->master,
                                                       .dst_dtype = MUONSHARD_FP32,
                                                       .src = a->w,
                                                       .src_dtype = a->w_dtype,
                                                       .count = (size_t)(a->rows * a->cols)};
        }
    }
    filled += work_load_flat(o, o->converts + filled, true);
    const muonshard_status status =
        o->backend->ops->convert(o->backend, NULL, o->converts, filled, STREAM_COMPUTE);
    FAIL_IF(status, &o->error, status, "%s", o->backend->error.text);
    return step_give_back(o, o->stream);
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
    s->bytes_workspace = (int64_t)(o->workspace_bytes - o->state_bytes + o->backend->bytes);
    s->bytes_pinned = (int64_t)o->pinned_bytes;
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
    status = fill_masters(o);
    TRY_GOTO(comm_agree(o->comm, status, &o->error), failed);
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
    return (in_use && o->data->ops->writes_after_death) ||
           (o->totals.ticket.open && o->agree_comm->ops->writes_after_death);
}

/* Back to what it was before commit. */
void optimizer_release(muonshard_optimizer *o) {
    const workspace *m = &o->memory;
    void *memory[] = {m->momentum,  m->variance, m->masters,        m->flat_m,    m->flat_v,
                      m->flat_w,    m->owned,    m->factors,        m->flat_sent, m->pack,
                      m->exchange,  m->zeros,    m->newton_schulz,  m->word,      m->words,
                      m->totals,    m->active,   m->skip_if_absent, m->values,    m->record,
                      m->sum_index, m->squares};
    void *pinned[] = {m->posted, m->staged_sent, m->staged_recv, m->staged_words};
    const bool in_use = workspace_in_use(o);
    for (size_t i = 0; i < sizeof memory / sizeof memory[0] && !in_use; i++)
        o->backend->ops->free(o->backend, memory[i]);
    for (size_t i = 0; i < sizeof pinned / sizeof pinned[0] && !(in_use && runs_ahead(o)); i++)
        free_pinned(o, pinned[i]);
    o->memory = (workspace){0};
    free(o->stamps);
    o->stamps = NULL;
    work_free(o);
    o->state_bytes = o->workspace_bytes = o->pinned_bytes = 0;
    error_text error;
    if (trace_close(o->trace, &error))
        comm_log(o->comm, MUONSHARD_LOG_WARNING, "%s", error.text);
    o->trace = NULL;
    plan_free(&o->plan);
    schedule_free(&o->schedule);
}
