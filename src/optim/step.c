/* step.c - the executor: walks the schedule in order and runs what it says. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "fault.h"
#include "optim/optimizer.h"

muonshard_status step_kill(muonshard_optimizer *o, muonshard_status status, const error_text *why) {
    if (o->dead == MUONSHARD_OK) {
        o->dead = status;
        fail(&o->error, status, "%s", why->text);
    }
    return status;
}

static muonshard_status from_backend(muonshard_optimizer *o, muonshard_status status) {
    return status ? step_kill(o, status, &o->backend->error) : MUONSHARD_OK;
}

static muonshard_status from_comm(muonshard_optimizer *o, const muonshard_comm *comm,
                                  muonshard_status status) {
    return status ? step_kill(o, status, &comm->error) : MUONSHARD_OK;
}

static muonshard_status run_converts(muonshard_optimizer *o, const kernel_context *context,
                                     size_t count) {
    return from_backend(
        o, o->backend->ops->convert(o->backend, context, o->converts, count, STREAM_COMPUTE));
}

static muonshard_status run_copies(muonshard_optimizer *o, const copy_item *items, size_t count,
                                   backend_stream stream) {
    return from_backend(o, o->backend->ops->copy(o->backend, items, count, stream));
}

static kernel_context context(const muonshard_optimizer *o) {
    return (kernel_context){.record = o->memory.record,
                            .values = o->memory.values,
                            .active = o->memory.active,
                            .stochastic = o->settings->rounding == ROUNDING_STOCHASTIC,
                            .seed = (uint64_t)o->settings->seed};
}

/* ---- before agreement: gradients to their owners ---- */

/* Elements from `first` of a tensor's gradient, zeros for a NULL one. */
static convert_item from_grad(const tensor *t, size_t first, size_t count, void *dst,
                              muonshard_dtype dst_dtype) {
    return (convert_item){.dst = dst,
                          .dst_dtype = dst_dtype,
                          .src = tensor_grad_at(t, first),
                          .src_dtype = t->grad_dtype,
                          .count = count};
}

/* This rank's slots, from gradients that are already reduced. */
static muonshard_status run_take(muonshard_optimizer *o, const op *operation) {
    const plan *p = &o->plan;
    const bucket *b = &p->buckets[operation->index];
    size_t count = 0;
    for (size_t i = 0; i < b->count; i++) {
        const wave *w = &p->waves[p->reduce_order[b->first + i]];
        float *owned = o->memory.owned + w->owned_offset;
        for (size_t k = 0; w->kind == PLAN_FLAT && k < o->adam_count; k++) {
            const adam_item *a = &o->adam[k];
            o->converts[count++] = from_grad(&o->registry.tensors[a->tensor], work_adam_first(o, a),
                                             a->count, owned + (a->g - owned), MUONSHARD_FP32);
        }
        const size_t index =
            w->kind == PLAN_FLAT ? PLAN_EMPTY_SLOT : plan_slot_view(p, w, o->comm->rank);
        if (index == PLAN_EMPTY_SLOT)
            continue;
        const view *v = &o->registry.views[index];
        o->converts[count++] =
            from_grad(&o->registry.tensors[v->tensor], v->offset, w->slot, owned, MUONSHARD_FP32);
    }
    return run_converts(o, NULL, count);
}

/* Gradients that don't lie as they travel, into the pack arena; empty slots there stay zero. */
static muonshard_status run_pack(muonshard_optimizer *o, const op *operation) {
    const plan *p = &o->plan;
    const bucket *b = &p->buckets[operation->index];
    size_t count = 0;
    for (size_t i = 0; i < b->count; i++) {
        const wave *w = &p->waves[p->reduce_order[b->first + i]];
        if (!w->packed)
            continue;
        char *to = o->memory.pack + w->pack_offset;
        for (size_t k = 0; w->kind == PLAN_FLAT && k < o->registry.tensor_count; k++) {
            const tensor *t = &o->registry.tensors[k];
            if (t->role == MUONSHARD_ROLE_ELEMENTWISE)
                o->converts[count++] = from_grad(
                    t, 0, t->elements, to + p->flat_offset[k] * dtype_size(w->wire), w->wire);
        }
        size_t place = 0;
        for (int r = 0; w->kind == PLAN_MATRICES && r < p->world_size; r++) {
            const size_t index = plan_slot_view(p, w, r);
            if (index == PLAN_EMPTY_SLOT) {
                place += !w->compact_pack;
                continue;
            }
            const view *v = &o->registry.views[index];
            o->converts[count++] = from_grad(&o->registry.tensors[v->tensor], v->offset, w->slot,
                                             to + place++ * w->slot * dtype_size(w->wire), w->wire);
        }
    }
    return run_converts(o, NULL, count);
}

/* Waves that are not packed are sent from where the caller has them. */
static void point_gradients(muonshard_optimizer *o, const op *operation, op_state *state) {
    const plan *p = &o->plan;
    const bucket *b = &p->buckets[operation->index];
    for (size_t i = 0; i < b->count; i++) {
        const wave *w = &p->waves[p->reduce_order[b->first + i]];
        if (w->packed)
            continue;
        const view *v = &o->registry.views[w->first_view];
        const void *grad = tensor_grad_at(&o->registry.tensors[v->tensor], v->offset);
        state->parts[i].send = grad ? grad : o->memory.zeros;
    }
}

static muonshard_status run_measure(muonshard_optimizer *o, const op *operation) {
    const bucket_work *b = &o->buckets[operation->index];
    return from_backend(o, o->backend->ops->sum_squares(o->backend, b->sums, b->sum_count));
}

/* ---- agreement ---- */

static muonshard_status write_memory(muonshard_optimizer *o, void *dst, const void *src,
                                     size_t bytes, backend_stream stream) {
    return from_backend(o, backend_write(o->backend, dst, src, bytes, stream));
}

static muonshard_status write_word(muonshard_optimizer *o) {
    const workspace *m = &o->memory;
    o->word_head[0] = (double)o->step_status;
    for (size_t i = 0; i < o->registry.tensor_count; i++)
        o->word_head[1 + i] = o->registry.tensors[i].grad != NULL;
    /* On the stream of the all-gather: the fence before it came before this copy. */
    TRY(write_memory(o, m->word, o->word_head,
                     (1 + o->registry.tensor_count) * sizeof *o->word_head, STREAM_COMM));
    return write_memory(o, m->word + o->word_stride - 1, &o->fingerprint, sizeof o->fingerprint,
                        STREAM_COMM);
}

/* Group totals over agree_comm: rank 0 of each group brings its sum, the others zero. */
static muonshard_status gather_totals(muonshard_optimizer *o) {
    static const double zero = 0.0;
    double *own = o->memory.totals, *contribution = own + 2;
    const copy_item item = {contribution, own, 2 * sizeof *own};
    TRY(run_copies(o, &item, 1, STREAM_COMPUTE));
    if (o->comm->rank != 0)
        TRY(write_memory(o, contribution + 1, &zero, sizeof zero, STREAM_COMPUTE));
    comm_request request = {.kind = COMM_ALL_GATHER,
                            .parts = o->totals.parts,
                            .host_parts = o->totals.host_parts,
                            .part_count = 1,
                            .backend = o->backend,
                            .stamp = o->schedule.count * STEPS_IN_FLIGHT * STAMP_COUNT,
                            .stream = STREAM_COMM};
    comm_mark(o->agree_comm, o->step, "agreement of groups");
    TRY(from_backend(o, o->backend->ops->fence(o->backend, STREAM_COMPUTE, STREAM_COMM)));
    TRY(from_comm(o, o->agree_comm, comm_start(o->agree_comm, &request, &o->totals.ticket)));
    TRY(from_comm(o, o->agree_comm,
                  comm_wait(o->agree_comm, &o->totals.ticket, step_deadline(o, o->step))));
    comm_mark(o->agree_comm, 0, "outside the library");
    return from_backend(o, o->backend->ops->fence(o->backend, STREAM_COMM, STREAM_COMPUTE));
}

/* The host backend knows at once; a device posts the record, to be read when the step is settled.
 */
static muonshard_status post_record(muonshard_optimizer *o) {
    step_record *posted = &o->memory.posted[o->step % STEP_RESULTS];
    const copy_item item = {posted, o->memory.record, sizeof *posted};
    if (runs_ahead(o))
        return from_backend(o,
                            o->backend->streams->copy_async(o->backend, &item, 1, STREAM_COMPUTE));
    TRY(run_copies(o, &item, 1, STREAM_COMPUTE));
    o->failed = posted->failed != 0;
    settle_record(o, o->step);
    return MUONSHARD_OK;
}

static muonshard_status run_resolve(muonshard_optimizer *o, const op *operation) {
    (void)operation;
    const workspace *m = &o->memory;
    const double mean = o->settings->reduce == REDUCE_MEAN ? o->comm->size : 1.0;
    resolve_args args = {.words = m->words,
                         .word_count = o->comm->size,
                         .stride = o->word_stride,
                         .tensor_count = o->registry.tensor_count,
                         .equal = o->word_stride - 1,
                         .skip_if_absent = m->skip_if_absent,
                         .active = m->active,
                         .sum_index = m->sum_index,
                         .sum_count = o->sum_count,
                         .total = m->totals,
                         .scale = o->grad_scale / mean,
                         .sum_scale = o->grad_scale / mean,
                         .clip_norm = o->settings->clip_norm,
                         .record = o->agree_comm ? NULL : m->record};
    TRY(from_backend(o, o->backend->ops->resolve(o->backend, &args)));
    if (o->agree_comm) {
        TRY(gather_totals(o));
        args.words = m->totals + 4;
        args.word_count = o->agree_comm->size;
        args.stride = 2;
        args.equal = 0;
        args.sum_scale = 1.0;
        args.tensor_count = 0;
        args.sum_index = m->sum_index + o->sum_count;
        args.sum_count = (size_t)o->agree_comm->size;
        args.record = m->record;
        TRY(from_backend(o, o->backend->ops->resolve(o->backend, &args)));
    }
    return post_record(o);
}

/* ---- after agreement: updates ---- */

static muonshard_status run_momentum(muonshard_optimizer *o, const op *operation) {
    const batch_work *b = &o->batches[operation->index];
    const settings *s = o->settings;
    const kernel_context c = context(o);
    const momentum_args args = {.form = (momentum_form)s->momentum_form,
                                .nesterov = s->nesterov != 0,
                                .l2 = s->decay == DECAY_L2,
                                .dtype = (muonshard_dtype)s->momentum_dtype};
    return from_backend(o, o->backend->ops->momentum(o->backend, &c, &args, b->momentum, b->owned));
}

static muonshard_status run_orthogonalize(muonshard_optimizer *o, const op *operation) {
    const batch *b = &o->plan.batches[operation->index];
    const batch_work *work = &o->batches[operation->index];
    const size_t at_once = backend_at_once(o->backend, work->owned);
    for (size_t i = 0; i < work->owned; i += at_once) {
        const size_t left = work->owned - i, count = left < at_once ? left : at_once;
        TRY(from_backend(o, o->backend->ops->orthogonalize(
                                o->backend, o->memory.record, work->program, b->m, b->n,
                                work->orthogonalize + i, count, o->memory.newton_schulz)));
        TRY(step_progress(o));
    }
    return MUONSHARD_OK;
}

static muonshard_status run_variance(muonshard_optimizer *o, const op *operation) {
    const batch_work *b = &o->batches[operation->index];
    const settings *s = o->settings;
    const kernel_context c = context(o);
    const variance_args args = {.denominator = (variance_denominator)s->variance_denominator,
                                .beta2 = s->variance_beta2,
                                .eps = s->variance_eps};
    return from_backend(o, o->backend->ops->variance(o->backend, &c, &args, b->variance, b->owned));
}

/* U into parameters: of all matrices where updates are gathered, of this rank's otherwise. */
static muonshard_status run_update(muonshard_optimizer *o, const op *operation) {
    const batch_work *b = &o->batches[operation->index];
    const settings *s = o->settings;
    const kernel_context c = context(o);
    const apply_args args = {.decay = (decay_method)s->decay,
                             .form = (decay_form)s->decay_form,
                             .scaled_lr = s->decay_lr == DECAY_LR_SCALED};
    return from_backend(o, o->backend->ops->apply(o->backend, &c, &args, b->apply, b->apply_count));
}

static muonshard_status run_adam(muonshard_optimizer *o, const op *operation) {
    const settings *s = o->settings;
    const wave *flat = &o->plan.waves[o->plan.batches[operation->index].first];
    TRY(run_converts(o, NULL, work_load_flat(o, o->converts, false)));
    const kernel_context c = context(o);
    const adam_args args = {.rule = (elementwise_rule)s->elementwise,
                            .form = (adam_form)s->adam_form,
                            .nesterov = s->adam_nesterov != 0,
                            .beta1 = s->adam_beta1,
                            .beta2 = s->adam_beta2,
                            .eps = s->adam_eps,
                            .decay = (decay_method)s->adam_decay};
    TRY(from_backend(o, o->backend->ops->adam(o->backend, &c, &args, o->adam, o->adam_count)));
    if (!o->memory.flat_sent)
        return MUONSHARD_OK;
    for (size_t i = 0; i < o->adam_count; i++) {
        const adam_item *a = &o->adam[i];
        const size_t at = (size_t)(a->w - o->memory.flat_w) * dtype_size(flat->sent);
        o->converts[i] = (convert_item){.dst = (char *)o->memory.flat_sent + at,
                                        .dst_dtype = flat->sent,
                                        .src = a->w,
                                        .src_dtype = MUONSHARD_FP32,
                                        .count = a->count,
                                        .tensor = a->tensor,
                                        .first = work_adam_first(o, a)};
    }
    return run_converts(o, &c, o->adam_count);
}

static muonshard_status run_apply(muonshard_optimizer *o, const op *operation) {
    const plan *p = &o->plan;
    const batch *b = &p->batches[operation->index];
    const batch_work *work = &o->batches[operation->index];
    const kernel_context c = context(o);
    if (b->kind == PLAN_MATRICES && !b->gathers_params)
        return run_update(o, operation);
    if (b->kind == PLAN_MATRICES)
        return from_backend(o, o->backend->ops->convert(o->backend, &c, work->store,
                                                        work->store_count, STREAM_COMPUTE));
    const wave *flat = &p->waves[b->first];
    const char *gathered =
        p->gathers ? o->memory.exchange + flat->gather_offset : work_gathered_from(o, b, flat);
    size_t filled = 0;
    for (size_t i = 0; i < o->registry.tensor_count; i++) {
        const tensor *t = &o->registry.tensors[i];
        if (t->role == MUONSHARD_ROLE_ELEMENTWISE)
            o->converts[filled++] =
                (convert_item){.dst = t->param,
                               .dst_dtype = t->dtype,
                               .src = gathered + p->flat_offset[i] * dtype_size(flat->sent),
                               .src_dtype = flat->sent,
                               .count = t->elements,
                               .tensor = (int)i};
    }
    return run_converts(o, &c, filled);
}

/* ---- collectives ---- */

/* The ticket of operation `index` is done. */
static muonshard_status note_arrival(muonshard_optimizer *o, size_t index) {
    return settle_stamp(o, index, STAMP_END, o->schedule.ops[index].stream);
}

static muonshard_status start_collective(muonshard_optimizer *o, const op *operation) {
    const size_t index = (size_t)(operation - o->schedule.ops);
    op_state *state = &o->ops[index];
    if (operation->kind == OP_REDUCE_SCATTER)
        point_gradients(o, operation, state);
    else if (operation->kind == OP_AGREE)
        TRY(write_word(o));
    const comm_request request = {.kind = operation->kind == OP_REDUCE_SCATTER ? COMM_REDUCE_SCATTER
                                                                               : COMM_ALL_GATHER,
                                  .parts = state->parts,
                                  .host_parts = state->host_parts,
                                  .part_count = state->part_count,
                                  .backend = o->backend,
                                  .stamp = stamp_index(o, o->step, index, STAMP_STAGED),
                                  .stream = operation->stream};
    TRY(from_comm(o, o->data, comm_start(o->data, &request, &state->ticket)));
    bool done = false;
    if (o->data->ops->on_stream) /* it is in the stream's order already */
        TRY(from_comm(o, o->data, comm_test(o->data, &state->ticket, &done)));
    return done ? note_arrival(o, index) : MUONSHARD_OK;
}

static muonshard_status wait_collective(muonshard_optimizer *o, size_t index) {
    op_state *state = &o->ops[index];
    if (!state->ticket.open)
        return MUONSHARD_OK;
    TRY(from_comm(o, o->data, comm_wait(o->data, &state->ticket, step_deadline(o, o->step))));
    return note_arrival(o, index);
}

muonshard_status step_progress(muonshard_optimizer *o) {
    for (size_t i = 0; i < o->next; i++) {
        if (!o->ops[i].ticket.open)
            continue;
        bool done = false;
        TRY(from_comm(o, o->data, comm_test(o->data, &o->ops[i].ticket, &done)));
        if (!done)
            return MUONSHARD_OK; /* later ones come later */
        TRY(note_arrival(o, i));
    }
    return MUONSHARD_OK;
}

/* ---- the walk ---- */

static muonshard_status (*const run_kind[OP_KIND_COUNT])(muonshard_optimizer *o,
                                                         const op *operation) = {
    [OP_TAKE] = run_take,
    [OP_PACK] = run_pack,
    [OP_REDUCE_SCATTER] = start_collective,
    [OP_MEASURE] = run_measure,
    [OP_AGREE] = start_collective,
    [OP_RESOLVE] = run_resolve,
    [OP_MOMENTUM] = run_momentum,
    [OP_ORTHOGONALIZE] = run_orthogonalize,
    [OP_VARIANCE] = run_variance,
    [OP_UPDATE] = run_update,
    [OP_ADAM] = run_adam,
    [OP_ALL_GATHER] = start_collective,
    [OP_APPLY] = run_apply,
};

/* For this collective alone: others that come later are on its stream by now. */
static muonshard_status wait_arrival(muonshard_optimizer *o, size_t index, backend_stream stream) {
    const stream_ops *streams = o->backend->streams;
    return from_backend(o,
                        streams->wait_stamp(o->backend, stamp_index(o, o->step, index, STAMP_END),
                                            streams->native(o->backend, stream)));
}

/* What an operation waits for of the other stream, and of the ranks. */
static muonshard_status await(muonshard_optimizer *o, size_t index) {
    const op *operation = &o->schedule.ops[index];
    const size_t before = (size_t)operation->waits_on;
    const bool collective = op_is_collective(o->schedule.ops[before].kind);
    if (collective) {
        char awaited[sizeof o->comm->position.phase];
        op_label(&o->schedule.ops[before], awaited, sizeof awaited);
        comm_mark(o->data, o->step, "%s", awaited);
        TRY(settle_stamp(o, index, STAMP_WAIT_FROM, operation->stream));
        TRY(wait_collective(o, before));
    }
    TRY(collective && runs_ahead(o)
            ? wait_arrival(o, before, operation->stream)
            : from_backend(o, o->backend->ops->fence(o->backend, o->schedule.ops[before].stream,
                                                     operation->stream)));
    return collective ? settle_stamp(o, index, STAMP_WAIT_TO, operation->stream) : MUONSHARD_OK;
}

static muonshard_status run_kind_of(muonshard_optimizer *o, size_t index, const char *label,
                                    bool stamp_end) {
    const op *operation = &o->schedule.ops[index];
    const stream_ops *streams = o->backend->streams;
    if (streams)
        streams->range_begin(o->backend, label);
    muonshard_status status = settle_stamp(o, index, STAMP_BEGIN, operation->stream);
    if (status == MUONSHARD_OK)
        status = run_kind[operation->kind](o, operation);
    if (status == MUONSHARD_OK && stamp_end)
        status = settle_stamp(o, index, STAMP_END, operation->stream);
    if (streams)
        streams->range_end(o->backend);
    return status;
}

/* Waits, then runs operation `index`. */
static muonshard_status run_op(muonshard_optimizer *o, size_t index) {
    char label[sizeof o->comm->position.phase];
    op_label(&o->schedule.ops[index], label, sizeof label);
    if (o->schedule.ops[index].waits_on != OP_NONE)
        TRY(await(o, index));
    comm_mark(o->data, o->step, "%s", label);
    fault_point(label);
    return run_kind_of(o, index, label, !op_is_collective(o->schedule.ops[index].kind));
}

/* ---- segments ---- */

/* Operations [first, end) into a graph, with the stamps of step `step` but for the last: who asks
 * for it, or waits for it, has to meet this step's, which a graph that is not there yet doesn't
 * promise. */
static muonshard_status record_segment(muonshard_optimizer *o, size_t first, size_t end,
                                       int64_t step, segment_mode mode) {
    const size_t segment = (size_t)o->schedule.ops[first].segment * STEPS_IN_FLIGHT;
    const int64_t now = o->step;
    TRY(from_backend(o, o->backend->streams->begin_segment(o->backend)));
    muonshard_status status = MUONSHARD_OK;
    o->step = step;
    for (size_t i = first; i < end && status == MUONSHARD_OK; i++) {
        char label[sizeof o->comm->position.phase];
        op_label(&o->schedule.ops[i], label, sizeof label);
        status = run_kind_of(o, i, label, i + 1 < end);
    }
    o->step = now;
    const muonshard_status ended = o->backend->streams->end_segment(
        o->backend, segment + (size_t)(step % STEPS_IN_FLIGHT), status ? SEGMENT_DROP : mode);
    return status ? status : from_backend(o, ended);
}

/* As it is in the first step, when kernels are loaded; recorded in the second, for each of the
 * steps that can be in flight, and replayed from then on. */
static muonshard_status run_segment(muonshard_optimizer *o, size_t first, size_t end) {
    const size_t segment = (size_t)o->schedule.ops[first].segment * STEPS_IN_FLIGHT;
    const stream_ops *streams = o->backend->streams;
    if (o->schedule.ops[first].waits_on != OP_NONE)
        TRY(await(o, first));
    fault_point("segment");
    if (o->begun_here > 2) {
        char label[sizeof o->comm->position.phase];
        op_label(&o->schedule.ops[first], label, sizeof label);
        streams->range_begin(o->backend, label);
        const muonshard_status status =
            streams->replay_segment(o->backend, segment + (size_t)(o->step % STEPS_IN_FLIGHT));
        streams->range_end(o->backend);
        TRY(from_backend(o, status));
    } else {
        TRY(record_segment(o, first, end, o->step, SEGMENT_RECORD));
        TRY(record_segment(o, first, end, o->step + 1, SEGMENT_RECORD_ALONE));
    }
    return settle_stamp(o, end - 1, STAMP_END, STREAM_COMPUTE);
}

/* Where the segment that operation `index` is in ends; `index` where it is in none. */
static size_t segment_end(const muonshard_optimizer *o, size_t index) {
    const int segment = o->schedule.ops[index].segment;
    size_t end = index;
    if (!o->graphs || segment == OP_NONE || o->begun_here == 1)
        return index;
    while (end < o->schedule.count && o->schedule.ops[end].segment == segment)
        end++;
    return end;
}

/* The caller's gradients are final where its stream is now. */
muonshard_status step_join(muonshard_optimizer *o, void *stream) {
    for (int own = 0; runs_ahead(o) && own < STREAM_COUNT; own++)
        TRY(from_backend(o,
                         o->backend->streams->join_from(o->backend, stream, (backend_stream)own)));
    return MUONSHARD_OK;
}

muonshard_status step_give_back(muonshard_optimizer *o, void *stream) {
    return runs_ahead(o)
               ? from_backend(o, o->backend->streams->join_to(o->backend, stream, STREAM_COMPUTE))
               : MUONSHARD_OK;
}

muonshard_status step_give_back_gradients(muonshard_optimizer *o, void *stream) {
    size_t resolve = 0; /* once it is there all gradients have been read */
    while (o->schedule.ops[resolve].kind != OP_RESOLVE)
        resolve++;
    return step_give_back_op(o, resolve, o->step, stream);
}

muonshard_status step_give_back_op(muonshard_optimizer *o, size_t index, int64_t step,
                                   void *stream) {
    return runs_ahead(o) ? from_backend(o, o->backend->streams->wait_stamp(
                                               o->backend, stamp_index(o, step, index, STAMP_END),
                                               stream ? stream : o->stream))
                         : MUONSHARD_OK;
}

muonshard_status step_begin(muonshard_optimizer *o) {
    TRY(settle_until(o, o->step + 1 - STEPS_IN_FLIGHT));
    o->next = 0;
    o->step++;
    o->begun_here++;
    o->open = true;
    o->called = false;
    o->failed = false;
    o->step_status = MUONSHARD_OK;
    o->begun[o->step % STEPS_IN_FLIGHT] = now_s();
    o->data->options.timeout_s =
        o->data == o->comm ? o->comm->options.timeout_s : step_deadline(o, o->step);
    memset(o->ready, 0, o->first_entry[o->registry.tensor_count]);
    /* What travels now lands where the last step's updates are read. */
    return from_backend(o, o->backend->ops->fence(o->backend, STREAM_COMPUTE, STREAM_COMM));
}

muonshard_status step_run_until(muonshard_optimizer *o, size_t end) {
    const double start = now_s();
    while (o->next < end) {
        const size_t after = segment_end(o, o->next);
        TRY(after > o->next ? run_segment(o, o->next, after) : run_op(o, o->next));
        o->next = after > o->next ? after : o->next + 1;
    }
    const bool last = o->next == o->schedule.count && o->open;
    const muonshard_status status = last ? settle_finish(o) : MUONSHARD_OK;
    if (!runs_ahead(o))
        o->stats.time_step += now_s() - start;
    return status;
}

/* All tensors whose gradients the bucket sends are marked. */
static bool bucket_ready(const muonshard_optimizer *o, const bucket *b) {
    const plan *p = &o->plan;
    for (size_t i = 0; i < b->count; i++) {
        const wave *w = &p->waves[p->reduce_order[b->first + i]];
        for (size_t k = 0; w->kind == PLAN_FLAT && k < o->registry.tensor_count; k++)
            if (o->registry.tensors[k].role == MUONSHARD_ROLE_ELEMENTWISE &&
                !o->ready[o->first_entry[k]])
                return false;
        for (int r = 0; w->kind == PLAN_MATRICES && r < p->world_size; r++) {
            const size_t index = plan_slot_view(p, w, r);
            if (index == PLAN_EMPTY_SLOT)
                continue;
            const view *v = &o->registry.views[index];
            if (!o->ready[o->first_entry[v->tensor] + (size_t)v->entry])
                return false;
        }
    }
    return true;
}

muonshard_status step_start_ready(muonshard_optimizer *o) {
    while (o->next < o->schedule.count) {
        const op *operation = &o->schedule.ops[o->next];
        if (!op_reads_gradients(operation->kind) ||
            !bucket_ready(o, &o->plan.buckets[operation->index]))
            break;
        TRY(run_op(o, o->next));
        o->next++;
    }
    return step_progress(o);
}
