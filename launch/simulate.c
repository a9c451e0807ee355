#include "simulate.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "command.h"
#include "message.h"
#include "optim/memory.h"
#include "optim/newton_schulz.h"

/* ---- what an operation does ---- */

static double size_of(muonshard_dtype dtype) {
    return (double)dtype_size(dtype);
}

/* Elements of all ranks that a wave has. */
static double filled_elements(const sim_group *g, const wave *w) {
    return w->kind == PLAN_FLAT ? (double)g->plan->flat_elements
                                : (double)plan_filled_slots(g->plan, w) * (double)w->slot;
}

/* Of a bucket: gradients copied to be sent, or what a rank's sums of squares read. */
static sim_work bucket_work_of(const sim_group *g, const op *o) {
    const plan *p = g->plan;
    const bucket *b = &p->buckets[o->index];
    sim_work work = {.pass = o->kind == OP_MEASURE ? PASS_MEASURE : PASS_COPY};
    for (size_t i = 0; i < b->count; i++) {
        const wave *w = &p->waves[p->reduce_order[b->first + i]];
        if (o->kind == OP_MEASURE)
            work.bytes += (double)w->slot * sizeof(float);
        else if (o->kind == OP_TAKE)
            work.bytes += (double)w->slot * (size_of(w->wire) + sizeof(float));
        else if (w->packed)
            work.bytes += 2.0 * filled_elements(g, w) * size_of(w->wire);
    }
    return work;
}

/* Updates are read by every rank, U and parameters; what is gathered as parameters is copied, but
 * for a rank's own matrices. */
static sim_work apply_work_of(const sim_group *g, const batch *b, size_t owned) {
    sim_work work = {.pass = b->gathers_params ? PASS_COPY : PASS_APPLY};
    const bool master = registry_master(g->settings, b->dtype) == MASTER_REPLICATED;
    for (size_t i = 0; i < b->count; i++) {
        const wave *w = &g->plan->waves[b->first + i];
        const double each = b->gathers_params ? size_of(w->sent) + size_of(w->dtype)
                                              : size_of(w->sent) + size_of(w->dtype) +
                                                    (master ? 8.0 : size_of(w->dtype));
        work.bytes += filled_elements(g, w) * each;
        if (b->gathers_params && b->kind == PLAN_MATRICES && i < owned)
            work.bytes -= (double)w->slot * each;
    }
    return work;
}

static muonshard_status batch_work_of(const sim_group *g, const op *o, size_t owned, sim_work *work,
                                      error_text *error) {
    const batch *b = &g->plan->batches[o->index];
    const double elements = (double)owned * (double)b->m * (double)b->n;
    const double momentum = size_of((muonshard_dtype)g->settings->momentum_dtype);
    ns_program program = {.count = 0};
    *work = (sim_work){.pass = PASS_COPY};
    if (b->kind == PLAN_MATRICES)
        TRY(newton_schulz_compile(g->settings, b->dtype, g->plan->device, b->m, b->n, &program,
                                  error));
    const double u = size_of(ns_program_output(&program));
    const bool master = registry_master(g->settings, b->dtype) == MASTER_OWNER;
    switch (o->kind) {
    case OP_MOMENTUM:
        *work = (sim_work){.pass = PASS_MOMENTUM, .bytes = elements * (8.0 + 2.0 * momentum)};
        break;
    case OP_ORTHOGONALIZE:
        work->flops = ns_program_flops(&program, b->m, b->n);
        work->matrices = (double)owned;
        work->dtype = (int)program.dtype;
        break;
    case OP_VARIANCE: *work = (sim_work){.pass = PASS_MEASURE, .bytes = 2.0 * elements * u}; break;
    case OP_UPDATE:
        *work = (sim_work){
            .pass = PASS_APPLY,
            .bytes = elements * (u + (master ? 8.0 + size_of(b->dtype) : 2.0 * size_of(b->dtype)))};
        break;
    case OP_ADAM: /* gradient, m, v, w */
        *work = (sim_work){
            .pass = PASS_ADAM,
            .bytes = 28.0 * fmin((double)g->plan->flat_shard, (double)g->plan->flat_elements)};
        break;
    default: *work = apply_work_of(g, b, owned);
    }
    return MUONSHARD_OK;
}

muonshard_status simulate_work(const sim_group *g, size_t op_index, size_t owned, sim_work *work,
                               error_text *error) {
    const op *o = &g->schedule->ops[op_index];
    *work = (sim_work){.pass = PASS_MEASURE};
    if (o->kind == OP_RESOLVE)
        work->bytes = (double)memory_sum_count(g->plan, g->registry->view_count) * sizeof(double);
    else if (o->kind < OP_AGREE)
        *work = bucket_work_of(g, o);
    else if (!op_is_collective(o->kind))
        return batch_work_of(g, o, owned, work, error);
    return MUONSHARD_OK;
}

static void add_wave(const machine *m, const sim_group *g, const wave *w, double slot, bool reduces,
                     sim_traffic *t) {
    const double ranks = (double)g->plan->world_size;
    double filled = ranks;
    /* NCCL leaves empty slots out where there are many (src/comm/nccl.c). */
    if (m->ring && plan_is_sparse(g->plan, w))
        filled = (double)plan_filled_slots(g->plan, w);
    t->filled += filled * slot; /* for now bytes */
    t->slot += slot;
    if (reduces && (!m->ring || w->wire != MUONSHARD_FP32 || g->settings->deterministic)) {
        t->ring = false;
        t->sums = true;
    }
}

sim_traffic simulate_traffic(const machine *m, const sim_group *g, size_t op_index) {
    const op *o = &g->schedule->ops[op_index];
    const plan *p = g->plan;
    sim_traffic t = {.ring = m->ring};
    if (o->kind == OP_AGREE) {
        t.slot = (double)memory_word_stride(p, g->registry->tensor_count) * sizeof(double);
        t.filled = (double)p->world_size;
        return t;
    }
    if (o->kind == OP_REDUCE_SCATTER) {
        const bucket *b = &p->buckets[o->index];
        for (size_t i = 0; i < b->count; i++) {
            const wave *w = &p->waves[p->reduce_order[b->first + i]];
            add_wave(m, g, w, (double)w->slot * size_of(w->wire), true, &t);
        }
    } else {
        const batch *b = &p->batches[o->index];
        for (size_t i = 0; i < b->count; i++) {
            const wave *w = &p->waves[b->first + i];
            add_wave(m, g, w, (double)w->slot * size_of(w->sent), false, &t);
        }
    }
    t.filled = t.slot > 0.0 ? t.filled / t.slot : 0.0;
    return t;
}

/* ---- the walk ---- */

/* A collective under way. Its bytes move by themselves, until `over`; what the ranks' own threads
 * have to do about them is `copy`, from when all have begun it, and `sum` once they are there. */
typedef struct flight {
    double begun, over, copy, sum;
    bool open;
} flight;

typedef struct walk {
    const machine *m;
    const sim_group *g;
    const sim_options *options;
    simulation *out;
    size_t ranks;
    double *clock;     /* own, [ranks]: when the rank's computation is done with what it has */
    double *waited;    /* own, [ranks, OP_KIND_COUNT] */
    double *seconds;   /* own, [most matrices of a batch + 1]: the operation, by matrices owned */
    size_t *owned;     /* own, [ranks]: of the batch under way */
    flight *flights;   /* own, [schedule.count] */
    size_t closed;     /* flights before this one are over */
    double *ready;     /* own, [bucket_count]: seconds into the backward pass */
    double links_free; /* when the links are done with what they have */
    char *message;
} walk;

static double *waited_for(walk *w, size_t rank, op_kind kind) {
    return &w->waited[rank * OP_KIND_COUNT + kind];
}

/* Entries are marked from the last tensor to the first, each after its share of the time, as
 * `bench step --backward` does; a bucket is ready when its last entry is. */
static void time_buckets(walk *w) {
    const registry *r = w->g->registry;
    const plan *p = w->g->plan;
    double all = 0.0, before = 0.0;
    for (size_t i = 0; i < r->tensor_count; i++)
        all += (double)r->tensors[i].elements;
    for (size_t k = 0; k < p->bucket_count; k++)
        w->ready[k] = 0.0;
    if (!(w->options->backward > 0.0))
        return;
    size_t *bucket_of = calloc(p->wave_count + 1, sizeof *bucket_of);
    for (size_t k = 0; bucket_of && k < p->bucket_count; k++)
        for (size_t i = 0; i < p->buckets[k].count; i++)
            bucket_of[p->reduce_order[p->buckets[k].first + i]] = k;
    size_t flat = 0;
    for (size_t i = 0; i < p->wave_count; i++)
        flat = p->waves[i].kind == PLAN_FLAT ? i : flat;
    for (size_t i = r->tensor_count; bucket_of && i-- > 0;) {
        const tensor *t = &r->tensors[i];
        const double each = (double)t->elements / (double)t->entries;
        for (size_t v = t->view_count; v-- > 0;) {
            const view *at = &r->views[t->first_view + v];
            double *ready = &w->ready[bucket_of[p->view_wave[t->first_view + v]]];
            const double done = before + each * (double)(t->entries - at->entry);
            *ready = fmax(*ready, w->options->backward * done / all);
        }
        before += (double)t->elements;
        if (t->role == MUONSHARD_ROLE_ELEMENTWISE && p->flat_elements) {
            double *ready = &w->ready[bucket_of[flat]];
            *ready = fmax(*ready, w->options->backward * before / all);
        }
    }
    free(bucket_of);
    for (size_t k = 1; k < p->bucket_count; k++) /* they go in this order */
        w->ready[k] = fmax(w->ready[k], w->ready[k - 1]);
}

/* How long the operation takes for every number of matrices a rank can own of its batch. */
static muonshard_status price(walk *w, size_t index) {
    const op *o = &w->g->schedule->ops[index];
    const plan *p = w->g->plan;
    error_text error;
    const bool by_rank = o->kind == OP_MOMENTUM || o->kind == OP_ORTHOGONALIZE ||
                         o->kind == OP_VARIANCE || o->kind == OP_UPDATE;
    const size_t most = by_rank ? p->batches[o->index].count : 0;
    memset(w->owned, 0, w->ranks * sizeof *w->owned);
    for (size_t i = 0; by_rank && i < most; i++)
        for (size_t r = 0; r < w->ranks; r++)
            w->owned[r] += plan_slot_view(p, &p->waves[p->batches[o->index].first + i], (int)r) !=
                           PLAN_EMPTY_SLOT;
    for (size_t k = 0; k <= most; k++) {
        sim_work work;
        const muonshard_status status = simulate_work(w->g, index, k, &work, &error);
        if (status)
            return message_fail(w->message, status, "%s", error.text);
        w->seconds[k] = machine_pass_seconds(w->m, work.pass, work.bytes);
        if (o->kind == OP_ORTHOGONALIZE && k > 0)
            w->seconds[k] = 1e-6 * w->m->launch +
                            machine_newton_schulz(w->m, work.dtype, work.flops, work.matrices);
        if (isnan(w->seconds[k])) {
            static const char *const names[] = {"fp32", "tf32", "bf16", "fp16"};
            return message_fail(w->message, MUONSHARD_ERR_CONFIG,
                                "machine '%s' has no rate of Newton-Schulz in %s", w->m->name,
                                names[work.dtype]);
        }
    }
    return MUONSHARD_OK;
}

static void begin_collective(walk *w, size_t index) {
    const op *o = &w->g->schedule->ops[index];
    const machine *m = w->m;
    const sim_traffic t = simulate_traffic(m, w->g, index);
    flight *f = &w->flights[index];
    const double ranks = (double)w->ranks;
    *f = (flight){.open = true};
    for (size_t r = 0; r < w->ranks; r++)
        f->begun = fmax(f->begun, w->clock[r]);
    if (o->kind == OP_REDUCE_SCATTER)
        f->begun = fmax(f->begun, w->ready[o->index]);
    machine_transfer links =
        machine_collective(m, t.ring, ranks, w->g->stride, t.filled, t.slot, w->out->bytes);
    double takes = m->by_rank ? 0.0 : links.latency + links.bandwidth;
    f->copy = m->by_rank ? links.latency + links.bandwidth : 0.0;
    if (w->options->bandwidth > 0.0) {
        links.latency += w->options->latency;
        links.bandwidth += (ranks - 1.0) * t.slot / w->options->bandwidth;
        takes += w->options->latency + (ranks - 1.0) * t.slot / w->options->bandwidth;
    }
    if (!m->on_gpu && o->kind != OP_AGREE) {
        /* A rank's own slot of parameters; updates are computed where they are gathered. */
        if (o->kind == OP_ALL_GATHER && w->g->plan->batches[o->index].gathers_params)
            f->copy += machine_pass_seconds(m, PASS_COPY, 2.0 * t.slot);
    }
    if (t.sums && ranks > 1.0)
        f->sum = machine_pass_seconds(m, PASS_SUM, (ranks + 1.0) * t.slot);
    const double start = fmax(f->begun, w->links_free);
    f->over = start + takes;
    w->links_free = f->over;
    if (o->kind != OP_AGREE) {
        double *busy = o->kind == OP_REDUCE_SCATTER ? &w->out->rs_busy : &w->out->ag_busy;
        double *moved = o->kind == OP_REDUCE_SCATTER ? &w->out->rs_bytes : &w->out->ag_bytes;
        *busy += takes + f->copy + f->sum;
        *moved += t.filled * t.slot * (ranks - 1.0) / ranks;
        w->out->latency += links.latency;
        w->out->bandwidth += links.bandwidth;
        w->out->slowest = links.slowest;
    }
    w->out->spans[index] = (sim_span){f->begun, f->over + f->copy + f->sum};
}

/* The rank goes on when the collective is there, and all before it. */
static double arrive(walk *w, size_t index, size_t rank, double now) {
    for (size_t i = w->closed; i <= index; i++) {
        const flight *f = &w->flights[i];
        if (!f->open)
            continue;
        now = fmax(f->over, fmax(now, f->begun) + f->copy) + f->sum;
        if (rank == 0)
            w->out->spans[i].end = fmax(w->out->spans[i].begin, now);
    }
    return now;
}

static void compute(walk *w, size_t index) {
    const op *o = &w->g->schedule->ops[index];
    const bool waits =
        o->waits_on != OP_NONE && op_is_collective(w->g->schedule->ops[o->waits_on].kind);
    const double ready = (o->kind == OP_PACK || o->kind == OP_TAKE) ? w->ready[o->index] : 0.0;
    for (size_t r = 0; r < w->ranks; r++) {
        double now = fmax(w->clock[r], ready);
        if (waits) {
            const double there = arrive(w, (size_t)o->waits_on, r, now);
            *waited_for(w, r, w->g->schedule->ops[o->waits_on].kind) += there - now;
            now = there;
        }
        const double takes = w->seconds[w->owned[r]];
        *waited_for(w, r, o->kind) += takes;
        if (r == 0)
            w->out->spans[index] = (sim_span){now, now + takes};
        w->clock[r] = now + takes;
    }
    if (waits && (size_t)o->waits_on >= w->closed)
        w->closed = (size_t)o->waits_on + 1;
}

/* The longest of any rank, phase by phase, as the benchmark has it. */
static void sum_up(walk *w) {
    sim_phases *p = &w->out->phases;
    for (size_t r = 0; r < w->ranks; r++) {
        const double *k = waited_for(w, r, 0);
        w->out->step = fmax(w->out->step, w->clock[r]);
        p->pack = fmax(p->pack, k[OP_PACK] + k[OP_TAKE]);
        p->reduce_scatter = fmax(p->reduce_scatter, k[OP_REDUCE_SCATTER]);
        p->agree = fmax(p->agree, k[OP_MEASURE] + k[OP_AGREE] + k[OP_RESOLVE]);
        p->momentum = fmax(p->momentum, k[OP_MOMENTUM]);
        p->orthogonalize = fmax(p->orthogonalize, k[OP_ORTHOGONALIZE]);
        p->elementwise = fmax(p->elementwise, k[OP_ADAM]);
        p->all_gather = fmax(p->all_gather, k[OP_ALL_GATHER]);
        p->apply = fmax(p->apply, k[OP_VARIANCE] + k[OP_UPDATE] + k[OP_APPLY]);
    }
}

static muonshard_status count_work(walk *w) {
    const plan *p = w->g->plan;
    double *flops = calloc(2 * w->ranks, sizeof *flops);
    if (!flops)
        return message_fail(w->message, MUONSHARD_ERR_MEMORY, "out of memory");
    double *matrices = flops + w->ranks;
    for (size_t i = 0; i < w->g->schedule->count; i++) {
        if (w->g->schedule->ops[i].kind != OP_ORTHOGONALIZE)
            continue;
        sim_work work;
        error_text error;
        const batch *b = &p->batches[w->g->schedule->ops[i].index];
        if (simulate_work(w->g, i, 1, &work, &error))
            continue;
        for (size_t k = 0; k < b->count; k++)
            for (size_t r = 0; r < w->ranks; r++)
                if (plan_slot_view(p, &p->waves[b->first + k], (int)r) != PLAN_EMPTY_SLOT) {
                    flops[r] += work.flops;
                    matrices[r] += 1.0;
                }
    }
    for (size_t r = 0; r < w->ranks; r++) {
        w->out->ns_flops = fmax(w->out->ns_flops, flops[r]);
        w->out->matrices = fmax(w->out->matrices, matrices[r]);
    }
    free(flops);
    return MUONSHARD_OK;
}

static muonshard_status run(walk *w) {
    const schedule *s = w->g->schedule;
    time_buckets(w);
    for (size_t i = 0; i < s->count; i++) {
        if (op_is_collective(s->ops[i].kind)) {
            begin_collective(w, i);
            continue;
        }
        const muonshard_status status = price(w, i);
        if (status)
            return status;
        if (s->ops[i].kind == OP_MEASURE && i > 0 && op_reads_gradients(s->ops[i - 1].kind))
            for (size_t r = 0; r < w->ranks; r++) /* the backward pass ends before */
                w->clock[r] = fmax(w->clock[r], w->options->backward);
        compute(w, i);
    }
    sum_up(w);
    return count_work(w);
}

static muonshard_status check(const machine *m, const sim_group *g, char *message) {
    const double ranks = (double)g->plan->world_size;
    const double joined = m->link_count ? m->links[m->link_count - 1].ranks : 1.0;
    return (ranks - 1.0) * g->stride + 1.0 > joined
               ? message_fail(message, MUONSHARD_ERR_CONFIG,
                              "machine '%s': its links join %.0f ranks, not %.0f", m->name, joined,
                              ranks * g->stride)
               : MUONSHARD_OK;
}

muonshard_status simulate(const machine *m, const sim_group *g, const sim_options *options,
                          simulation *out, char *message) {
    const plan *p = g->plan;
    *out = (simulation){.step = 0.0};
    muonshard_status status = check(m, g, message);
    if (status)
        return status;
    size_t most = 0;
    for (size_t b = 0; b < p->batch_count; b++)
        most = p->batches[b].count > most ? p->batches[b].count : most;
    const size_t ranks = (size_t)p->world_size;
    walk w = {.m = m, .g = g, .options = options, .out = out, .ranks = ranks, .message = message};
    w.clock = calloc(ranks, sizeof *w.clock);
    w.waited = calloc(ranks * OP_KIND_COUNT, sizeof *w.waited);
    w.seconds = calloc(most + 1, sizeof *w.seconds);
    w.owned = calloc(ranks, sizeof *w.owned);
    w.flights = calloc(g->schedule->count + 1, sizeof *w.flights);
    w.ready = calloc(p->bucket_count + 1, sizeof *w.ready);
    out->spans = calloc(g->schedule->count + 1, sizeof *out->spans);
    if (!w.clock || !w.waited || !w.seconds || !w.owned || !w.flights || !w.ready || !out->spans)
        status = message_fail(message, MUONSHARD_ERR_MEMORY, "out of memory");
    else
        status = run(&w);
    free(w.clock);
    free(w.waited);
    free(w.seconds);
    free(w.owned);
    free(w.flights);
    free(w.ready);
    if (status)
        simulation_free(out);
    return status;
}

void simulation_free(simulation *s) {
    free(s->spans);
    s->spans = NULL;
}
