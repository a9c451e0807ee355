/* commit.c - from tensors to a handle that can step: plan, schedule, memory, and the comparison of
 * all of it over the ranks. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "optim/checkpoint.h"

/* ---- memory ---- */

/* Where the block's pointer is. */
static void *field_of(muonshard_optimizer *o, const memory_block *block) {
    return (char *)&o->memory + block->offset;
}

static muonshard_status reserve(muonshard_optimizer *o, const memory_block *block) {
    void *memory = NULL;
    const muonshard_status status = o->backend->ops->alloc(o->backend, &memory, block->bytes);
    FAIL_IF(status, &o->error, status, "workspace of %zu bytes: %s", block->bytes,
            o->backend->error.text);
    memcpy(field_of(o, block), &memory, sizeof memory);
    o->workspace_bytes += block->bytes;
    return MUONSHARD_OK;
}

/* Memory of the host that a device copies to and from. */
static muonshard_status reserve_pinned(muonshard_optimizer *o, const memory_block *block) {
    void *memory = NULL;
    if (!runs_ahead(o))
        return host_array(o, field_of(o, block), block->bytes, 1);
    const muonshard_status status =
        o->backend->streams->alloc_pinned(o->backend, &memory, block->bytes);
    FAIL_IF(status, &o->error, status, "%s", o->backend->error.text);
    memcpy(field_of(o, block), &memory, sizeof memory);
    o->pinned_bytes += block->bytes;
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

/* What a device has beside memory: stamps and graphs. */
static muonshard_status reserve_streams(muonshard_optimizer *o) {
    const size_t stamps = o->schedule.count * STEPS_IN_FLIGHT * STAMP_COUNT;
    backend *b = o->backend;
    if (!runs_ahead(o))
        return host_array(o, &o->stamps, stamps, sizeof *o->stamps);
    muonshard_status status = b->streams->alloc_stamps(b, stamps + 1);
    if (status == MUONSHARD_OK)
        status = b->streams->alloc_segments(b, (size_t)o->schedule.segments * STEPS_IN_FLIGHT);
    FAIL_IF(status, &o->error, status, "%s", b->error.text);
    o->graphs = o->settings->cuda_graphs && o->data->ops->on_stream;
    return MUONSHARD_OK;
}

static memory_facts facts_of(const muonshard_optimizer *o) {
    const plan *p = &o->plan;
    memory_facts f = {.plan = p,
                      .settings = o->settings,
                      .tensors = o->registry.tensor_count,
                      .views = o->registry.view_count,
                      .agreeing = (size_t)agree_size(o),
                      .device = runs_ahead(o),
                      .scratch = needs_scratch(o),
                      .staged = comm_is_staged(o->data, o->backend),
                      .staged_words = o->agree_comm && comm_is_staged(o->agree_comm, o->backend)};
    for (size_t b = 0; b < p->batch_count; b++) {
        if (p->batches[b].kind == PLAN_FLAT)
            continue;
        const size_t owned = o->batches[b].owned;
        const size_t bytes = o->backend->ops->orthogonalize_workspace(
            o->backend, o->batches[b].program, p->batches[b].m, p->batches[b].n,
            backend_at_once(o->backend, owned));
        f.owned = owned > f.owned ? owned : f.owned;
        f.orthogonalize = bytes > f.orthogonalize ? bytes : f.orthogonalize;
    }
    return f;
}

static muonshard_status reserve_workspace(muonshard_optimizer *o) {
    const plan *p = &o->plan;
    o->flat_chunks = p->flat_shard / PLAN_FLAT_CHUNK;
    o->word_stride = memory_word_stride(p, o->registry.tensor_count);
    o->sum_count = memory_sum_count(p, o->registry.view_count);
    const memory_facts facts = facts_of(o);
    const memory_list list = memory_of(&facts);
    for (size_t i = 0; i < list.count; i++)
        TRY(list.blocks[i].kind == MEMORY_PINNED ? reserve_pinned(o, &list.blocks[i])
                                                 : reserve(o, &list.blocks[i]));
    o->state_bytes = memory_bytes(&list, MEMORY_STATE);
    return reserve_streams(o);
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
    TRY(plan_make(&o->plan, &o->registry, o->settings, o->comm->size, runs_ahead(o), &o->error));
    if (o->data->ops->leaves_out_empty)
        plan_compact(&o->plan, &o->registry, o->settings, comm_sums(o->data, MUONSHARD_FP32));
    TRY(schedule_make(&o->schedule, &o->plan, o->settings, &o->error));
    TRY(work_plan(o));
    TRY(reserve_workspace(o));
    TRY(work_make(o));
    TRY(upload_tables(o));
    TRY(choices_make(o));
    return step_join(o, o->stream); /* parameters are read from here on */
}

/* ---- fp32 copies of 16-bit parameters ---- */

muonshard_status commit_fill_masters(muonshard_optimizer *o) {
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
    status = commit_fill_masters(o);
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
    saver_free(o);
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
