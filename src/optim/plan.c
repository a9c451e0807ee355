#include "optim/plan.h"

#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#include "optim/newton_schulz.h"
#include "optim/ownership.h"

/* Arrays in an arena begin on a line of the cache. */
#define ALIGNMENT 64

/* Matrices a rank in a batch: a GPU's grid has no more rows. */
#define MOST_WAVES 65535

/* What plan_make works with until waves have their place. */
typedef struct builder {
    plan *p;
    const registry *r;
    const settings *s;
    size_t *loose; /* own, [view_count]: views that fill no whole wave of their tensor */
    size_t loose_count;
    double *cost; /* own, [view_count]: operations of its Newton-Schulz */
    int *held;    /* own, [world_size]: loose views of the shape under way that a rank has */
    size_t slot_capacity; /* of plan.slots */
    bool sums_fp32;       /* the transport adds up gradients in fp32 itself */
} builder;

static size_t aligned(size_t bytes) {
    return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

static muonshard_dtype view_dtype(const builder *b, const view *v) {
    return b->r->tensors[v->tensor].dtype;
}

static muonshard_dtype view_wire(const builder *b, const view *v) {
    return b->r->tensors[v->tensor].grad_dtype;
}

/* NULL: out of memory. */
static wave *new_wave(builder *b, const view *v) {
    plan *p = b->p;
    const size_t ranks = (size_t)p->world_size;
    if (p->slot_count + ranks > b->slot_capacity) {
        const size_t capacity = 2 * b->slot_capacity + ranks;
        size_t *slots = realloc(p->slots, capacity * sizeof *slots);
        if (!slots)
            return NULL;
        p->slots = slots;
        b->slot_capacity = capacity;
    }
    wave *w = &p->waves[p->wave_count++];
    *w = (wave){.kind = PLAN_MATRICES,
                .rows = v->rows,
                .cols = v->cols,
                .slot = view_elements(v),
                .dtype = view_dtype(b, v),
                .wire = view_wire(b, v),
                .first_slot = p->slot_count,
                .first_view = SIZE_MAX,
                .first_tensor = v->tensor,
                .priority = INT64_MIN};
    for (size_t rank = 0; rank < ranks; rank++)
        p->slots[p->slot_count++] = PLAN_EMPTY_SLOT;
    return w;
}

static void place(builder *b, wave *w, int rank, size_t view_index) {
    plan *p = b->p;
    const view *v = &b->r->views[view_index];
    const tensor *t = &b->r->tensors[v->tensor];
    p->slots[w->first_slot + (size_t)rank] = view_index;
    p->view_wave[view_index] = (size_t)(w - p->waves);
    p->view_owner[view_index] = rank;
    if (view_index < w->first_view) {
        w->first_view = view_index;
        w->first_tensor = v->tensor;
    }
    const int64_t priority = t->priority + v->entry * t->priority_stride;
    if (priority > w->priority)
        w->priority = priority;
    if (w->wire != view_wire(b, v))
        w->wire = MUONSHARD_FP32;
}

/* Whole waves out of runs of equal consecutive views; what is left over is loose. */
static muonshard_status make_whole_waves(builder *b, const tensor *t, bool whole,
                                         error_text *error) {
    const size_t n = (size_t)b->p->world_size, end = t->first_view + t->view_count;
    size_t i = t->first_view;
    while (i < end) {
        size_t run = 1;
        while (i + run < end && run < n && b->r->views[i + run].rows == b->r->views[i].rows)
            run++;
        if (run == n && whole) {
            wave *w = new_wave(b, &b->r->views[i]);
            FAIL_IF(!w, error, MUONSHARD_ERR_MEMORY, "out of memory");
            for (size_t k = 0; k < n; k++)
                place(b, w, (int)k, i + k);
        } else {
            for (size_t k = 0; k < run; k++)
                b->loose[b->loose_count++] = i + k;
        }
        i += run;
    }
    return MUONSHARD_OK;
}

static int64_t short_side(int64_t rows, int64_t cols) {
    return rows < cols ? rows : cols;
}

static int64_t long_side(int64_t rows, int64_t cols) {
    return rows < cols ? cols : rows;
}

static bool same_oriented_shape(int64_t rows_a, int64_t cols_a, int64_t rows_b, int64_t cols_b) {
    return short_side(rows_a, cols_a) == short_side(rows_b, cols_b) &&
           long_side(rows_a, cols_a) == long_side(rows_b, cols_b);
}

/* Loose views that can share a wave, in registration order: the first of every rank, the second of
 * every rank, and so on. */
static muonshard_status make_packed_waves(builder *b, error_text *error) {
    for (size_t i = 0; i < b->loose_count; i++) {
        if (b->loose[i] == PLAN_EMPTY_SLOT)
            continue;
        const size_t first_view = b->loose[i], first_wave = b->p->wave_count;
        memset(b->held, 0, (size_t)b->p->world_size * sizeof *b->held);
        for (size_t k = i; k < b->loose_count; k++) {
            const size_t v = b->loose[k];
            if (v == PLAN_EMPTY_SLOT || !ownership_alike(b->r, first_view, v))
                continue;
            const int owner = b->p->view_owner[v];
            const size_t w = first_wave + (size_t)b->held[owner]++;
            if (w == b->p->wave_count) {
                wave *packed = new_wave(b, &b->r->views[v]);
                FAIL_IF(!packed, error, MUONSHARD_ERR_MEMORY, "out of memory");
                packed->packed = true;
            }
            place(b, &b->p->waves[w], owner, v);
            b->loose[k] = PLAN_EMPTY_SLOT;
        }
    }
    return MUONSHARD_OK;
}

static void make_flat_wave(builder *b) {
    plan *p = b->p;
    int first = -1, priority = INT32_MIN;
    muonshard_dtype dtype = MUONSHARD_FP32, wire = MUONSHARD_FP32;
    for (size_t i = 0; i < b->r->tensor_count; i++) {
        const tensor *t = &b->r->tensors[i];
        if (t->role != MUONSHARD_ROLE_ELEMENTWISE)
            continue;
        p->flat_offset[i] = p->flat_elements;
        p->flat_elements += t->elements;
        p->flat_master = p->flat_master || registry_master(b->s, t->dtype) != MASTER_NONE;
        dtype = first < 0 || dtype == t->dtype ? t->dtype : MUONSHARD_FP32;
        wire = first < 0 || wire == t->grad_dtype ? t->grad_dtype : MUONSHARD_FP32;
        first = first < 0 ? (int)i : first;
        priority = t->priority > priority ? t->priority : priority;
    }
    if (first < 0)
        return;
    const size_t n = (size_t)p->world_size;
    const size_t chunks = (p->flat_elements + PLAN_FLAT_CHUNK - 1) / PLAN_FLAT_CHUNK;
    p->flat_shard = (chunks + n - 1) / n * PLAN_FLAT_CHUNK;
    p->waves[p->wave_count++] = (wave){.kind = PLAN_FLAT,
                                       .packed = true,
                                       .rows = 1,
                                       .cols = (int64_t)p->flat_shard,
                                       .slot = p->flat_shard,
                                       .dtype = dtype,
                                       .wire = wire,
                                       .first_slot = p->slot_count,
                                       .first_view = 0,
                                       .first_tensor = first,
                                       .priority = priority};
}

/* ---- order: batches, then reductions ---- */

static int compare_sizes(size_t a, size_t b) {
    return a < b ? -1 : a > b;
}

/* Registration order; the flat rest before the views of a tensor that comes later. */
static int forward_order(const void *left, const void *right) {
    const wave *a = left, *b = right;
    if (a->first_tensor != b->first_tensor)
        return a->first_tensor < b->first_tensor ? -1 : 1;
    return compare_sizes(a->first_view, b->first_view);
}

static bool one_batch(const wave *a, const wave *b) {
    return a->kind == b->kind && a->dtype == b->dtype &&
           same_oriented_shape(a->rows, a->cols, b->rows, b->cols);
}

/* A device's products take whole waves of tiles over its processors: few matrices leave the last
 * one half empty, and 24 of 768 x 3072 take 1.3 times as long in eight batches as in one; but what
 * all ranks gather of a batch, in 16 bits mostly, is not to be much. The host has nothing of large
 * ones but memory to fill. */
static size_t batch_bytes(const builder *b) {
    const size_t gathered = ((size_t)1 << 30) / (size_t)b->p->world_size * 2;
    const size_t device = gathered < (size_t)256 << 20 ? gathered : (size_t)256 << 20;
    const size_t by_itself = b->p->device ? device : (size_t)32 << 20;
    return b->s->batch_bytes ? (size_t)b->s->batch_bytes : by_itself;
}

/* Brings waves of one oriented shape and dtype together, at the place of the first of them, and
 * cuts them into batches. */
static muonshard_status make_batches(builder *b, error_text *error) {
    plan *p = b->p;
    wave *sorted = malloc((p->wave_count + 1) * sizeof *sorted);
    p->batches = calloc(p->wave_count + 1, sizeof *p->batches);
    if (!sorted || !p->batches) {
        free(sorted);
        return fail(error, MUONSHARD_ERR_MEMORY, "out of memory");
    }
    if (p->wave_count)
        qsort(p->waves, p->wave_count, sizeof *p->waves, forward_order);
    size_t done = 0;
    for (size_t i = 0; i < p->wave_count; i++) {
        const wave *first = &p->waves[i];
        if (!first->slot)
            continue;
        size_t bytes = 0;
        batch *current = NULL;
        for (size_t k = i; k < p->wave_count; k++) {
            wave *w = &p->waves[k];
            if (!w->slot || (k != i && !one_batch(first, w)))
                continue;
            const size_t slot_bytes = w->slot * sizeof(float);
            if (!current || bytes + slot_bytes > batch_bytes(b) || current->count == MOST_WAVES) {
                current = &p->batches[p->batch_count++];
                *current = (batch){.kind = w->kind,
                                   .m = short_side(w->rows, w->cols),
                                   .n = long_side(w->rows, w->cols),
                                   .dtype = w->dtype,
                                   .gathers_params = w->kind == PLAN_FLAT ||
                                                     registry_gathers_params(b->s, w->dtype),
                                   .first = done};
                bytes = 0;
            }
            bytes += slot_bytes;
            current->count++;
            sorted[done++] = *w;
            if (k != i)
                w->slot = 0; /* taken */
        }
    }
    memcpy(p->waves, sorted, done * sizeof *sorted);
    free(sorted);
    for (size_t i = 0; i < p->wave_count; i++)
        for (int rank = 0; p->waves[i].kind == PLAN_MATRICES && rank < p->world_size; rank++) {
            const size_t v = plan_slot_view(p, &p->waves[i], rank);
            if (v != PLAN_EMPTY_SLOT)
                p->view_wave[v] = i;
        }
    return MUONSHARD_OK;
}

/* Low priority first, then the reverse of registration: what a backward pass finishes first goes
 * first. A wave is ready when its last tensor is, in backward the one registered first. */
static int reduction_order(const void *left, const void *right) {
    const wave *a = *(const wave *const *)left, *b = *(const wave *const *)right;
    if (a->priority != b->priority)
        return a->priority < b->priority ? -1 : 1;
    if (a->first_tensor != b->first_tensor)
        return a->first_tensor > b->first_tensor ? -1 : 1;
    return -compare_sizes(a->first_view, b->first_view);
}

static muonshard_status make_reduce_order(plan *p, error_text *error) {
    const wave **sorted = calloc(p->wave_count + 1, sizeof *sorted);
    FAIL_IF(!sorted, error, MUONSHARD_ERR_MEMORY, "out of memory");
    for (size_t i = 0; i < p->wave_count; i++)
        sorted[i] = &p->waves[i];
    qsort(sorted, p->wave_count, sizeof *sorted, reduction_order);
    for (size_t i = 0; i < p->wave_count; i++)
        p->reduce_order[i] = (size_t)(sorted[i] - p->waves);
    free(sorted);
    return MUONSHARD_OK;
}

static void make_buckets(builder *b) {
    plan *p = b->p;
    size_t bytes = 0;
    bucket *current = NULL;
    for (size_t i = 0; i < p->wave_count; i++) {
        const wave *w = &p->waves[p->reduce_order[i]];
        const size_t wave_bytes = w->slot * (size_t)p->world_size * dtype_size(w->wire);
        /* What doesn't travel has no use for parts. */
        if (!current || (p->reduces && bytes + wave_bytes > (size_t)b->s->bucket_bytes)) {
            current = &p->buckets[p->bucket_count++];
            *current = (bucket){.first = i};
            bytes = 0;
        }
        bytes += wave_bytes;
        current->count++;
        current->packed = current->packed || w->packed;
    }
}

/* ---- arenas and figures ---- */

static size_t factor_bytes(const builder *b, const wave *w) {
    const bool sent = w->kind == PLAN_MATRICES && b->s->variance != VARIANCE_NONE;
    return sent ? (size_t)long_side(w->rows, w->cols) * sizeof(float) : 0;
}

size_t plan_filled_slots(const plan *p, const wave *w) {
    size_t filled = 0;
    for (int rank = 0; rank < p->world_size; rank++)
        filled += plan_slot_view(p, w, rank) != PLAN_EMPTY_SLOT;
    return filled;
}

bool plan_is_sparse(const plan *p, const wave *w) {
    const size_t ranks = (size_t)p->world_size;
    return w->kind == PLAN_MATRICES && 4 * (ranks - plan_filled_slots(p, w)) > ranks;
}

/* Slots that have a place. */
static size_t places(const plan *p, const wave *w, bool compact) {
    return compact ? plan_filled_slots(p, w) : (size_t)p->world_size;
}

/* Where batch `k` is gathered, from `start`; returns the end. */
static size_t lay_out_gather(builder *b, const batch *k, size_t start) {
    for (size_t i = 0; i < k->count; i++) {
        wave *w = &b->p->waves[k->first + i];
        const size_t n = places(b->p, w, w->compact_gather);
        const ns_program working = {.dtype = newton_schulz_dtype(b->s, w->dtype)};
        w->sent = k->gathers_params ? w->dtype : ns_program_output(&working);
        w->gather_offset = start;
        start += aligned(n * w->slot * dtype_size(w->sent));
        w->factor_offset = start;
        start += k->gathers_params ? 0 : aligned(n * factor_bytes(b, w));
    }
    return start;
}

/* Batch k is applied before batch k+2 is gathered: two places. */
static void lay_out_gathers(builder *b) {
    plan *p = b->p;
    size_t largest = 0;
    for (size_t k = 0; k < p->batch_count; k++) {
        const size_t bytes = lay_out_gather(b, &p->batches[k], 0);
        largest = bytes > largest ? bytes : largest;
    }
    for (size_t k = 1; k < p->batch_count; k += 2)
        lay_out_gather(b, &p->batches[k], largest);
    p->gather_bytes = p->gathers ? 2 * largest : 0;
}

static void lay_out_reduction(builder *b, wave *w) {
    plan *p = b->p;
    const size_t slot = w->slot * dtype_size(w->wire), whole = (size_t)p->world_size * slot;
    if (!p->reduces)
        return;
    w->exchange_offset = p->scratch_bytes;
    p->scratch_bytes += b->sums_fp32 && w->wire == MUONSHARD_FP32 ? 0 : aligned(whole);
    if (w->packed) {
        w->pack_offset = p->pack_bytes;
        p->pack_bytes += aligned(places(p, w, w->compact_pack) * slot);
    } else if (whole > p->largest_unpacked_bytes) {
        p->largest_unpacked_bytes = whole;
    }
}

static void lay_out_owned(builder *b, wave *w) {
    plan *p = b->p;
    if (w->kind == PLAN_FLAT)
        return;
    w->owned_offset = p->matrix_elements;
    p->matrix_elements += w->slot;
    w->variance_offset = p->variance_elements;
    p->variance_elements += factor_bytes(b, w) / sizeof(float);
    w->master_offset = p->master_elements;
    const master_mode master = registry_master(b->s, w->dtype);
    if (master == MASTER_OWNER)
        p->master_elements += w->slot;
    else if (master == MASTER_REPLICATED)
        p->master_elements += w->slot * (size_t)p->world_size;
}

static void lay_out(builder *b) {
    plan *p = b->p;
    p->matrix_elements = p->variance_elements = p->master_elements = 0;
    p->pack_bytes = p->largest_unpacked_bytes = p->scratch_bytes = 0;
    lay_out_gathers(b);
    for (size_t i = 0; i < p->wave_count; i++) {
        lay_out_reduction(b, &p->waves[i]);
        lay_out_owned(b, &p->waves[i]);
    }
    for (size_t i = 0; i < p->wave_count; i++) /* the flat shard behind, since it has no momentum */
        if (p->waves[i].kind == PLAN_FLAT)
            p->waves[i].owned_offset = p->matrix_elements;
    p->owned_elements = p->matrix_elements + p->flat_shard;
}

static void count_bytes(builder *b) {
    plan *p = b->p;
    const size_t n = (size_t)p->world_size;
    const bool reduce = p->reduces;
    p->bytes_reduced = p->bytes_gathered = p->bytes_packed = p->bytes_padded = 0;
    for (size_t i = 0; i < p->wave_count; i++) {
        const wave *w = &p->waves[i];
        const bool params = w->kind == PLAN_FLAT || registry_gathers_params(b->s, w->dtype);
        const size_t used =
            w->kind == PLAN_FLAT ? p->flat_elements : plan_filled_slots(p, w) * w->slot;
        const size_t sent = w->slot * dtype_size(w->sent) + (params ? 0 : factor_bytes(b, w));
        /* Of a wave whose empty slots are left out every rank sends and receives the others. */
        const size_t reduced = w->compact_pack ? plan_filled_slots(p, w) : n - 1;
        p->bytes_reduced += reduce ? reduced * w->slot * dtype_size(w->wire) : 0;
        p->bytes_gathered += (w->compact_gather ? plan_filled_slots(p, w) : n - 1) * sent;
        p->bytes_packed += reduce && w->packed ? used * dtype_size(w->wire) : 0;
        p->bytes_padded += w->compact_pack ? 0 : (n * w->slot - used) * dtype_size(w->wire);
    }
}

static muonshard_status measure_imbalance(builder *b, error_text *error) {
    plan *p = b->p;
    double *cost = calloc((size_t)p->world_size, sizeof *cost), total = 0.0, largest = 0.0;
    FAIL_IF(!cost, error, MUONSHARD_ERR_MEMORY, "out of memory");
    for (size_t i = 0; i < b->r->view_count; i++) {
        cost[p->view_owner[i]] += b->cost[i];
        total += b->cost[i];
    }
    for (int rank = 0; rank < p->world_size; rank++)
        largest = cost[rank] > largest ? cost[rank] : largest;
    p->cost = total / p->world_size;
    p->imbalance = total > 0.0 ? largest * p->world_size / total : 1.0;
    free(cost);
    return MUONSHARD_OK;
}

static muonshard_status allocate(builder *b, error_text *error) {
    plan *p = b->p;
    const size_t views = b->r->view_count, waves = views + 1;
    p->waves = calloc(waves, sizeof *p->waves);
    p->reduce_order = calloc(waves, sizeof *p->reduce_order);
    p->buckets = calloc(waves, sizeof *p->buckets);
    p->view_wave = calloc(views + 1, sizeof *p->view_wave);
    p->view_owner = calloc(views + 1, sizeof *p->view_owner);
    p->flat_offset = calloc(b->r->tensor_count + 1, sizeof *p->flat_offset);
    b->slot_capacity = views + (size_t)p->world_size;
    p->slots = malloc(b->slot_capacity * sizeof *p->slots);
    b->loose = calloc(views + 1, sizeof *b->loose);
    b->cost = calloc(views + 1, sizeof *b->cost);
    b->held = calloc((size_t)p->world_size, sizeof *b->held);
    FAIL_IF(!p->waves || !p->reduce_order || !p->buckets || !p->view_wave || !p->view_owner ||
                !p->flat_offset || !p->slots || !b->loose || !b->cost || !b->held,
            error, MUONSHARD_ERR_MEMORY, "out of memory");
    return MUONSHARD_OK;
}

/* `whole`: runs of a stack as long as there are ranks stay waves, which need no packing. */
static muonshard_status build(plan *p, const registry *r, const settings *s, int world_size,
                              bool device, bool whole, error_text *error) {
    *p = (plan){.world_size = world_size,
                .device = device,
                .reduces = s->reduce != REDUCE_NONE && world_size > 1,
                .gathers = world_size > 1};
    builder b = {.p = p, .r = r, .s = s};
    muonshard_status status;
    TRY_GOTO(allocate(&b, error), done);
    TRY_GOTO(ownership_price(r, s, device, b.cost, NULL, error), done);
    for (size_t i = 0; i < r->tensor_count; i++)
        if (r->tensors[i].role == MUONSHARD_ROLE_MATRIX)
            TRY_GOTO(make_whole_waves(&b, &r->tensors[i], whole, error), done);
    TRY_GOTO(
        ownership_assign(r, s, world_size, b.cost, b.loose, b.loose_count, p->view_owner, error),
        done);
    TRY_GOTO(make_packed_waves(&b, error), done);
    make_flat_wave(&b);
    TRY_GOTO(make_batches(&b, error), done);
    TRY_GOTO(make_reduce_order(p, error), done);
    make_buckets(&b);
    lay_out(&b);
    count_bytes(&b);
    TRY_GOTO(measure_imbalance(&b, error), done);
done:
    free(b.loose);
    free(b.cost);
    free(b.held);
    if (status)
        plan_free(p);
    return status;
}

/* What a policy that goes by cost takes for even; ranks with two matrices can reach it where costs
 * allow. */
#define EVEN 1.05

muonshard_status plan_make(plan *p, const registry *r, const settings *s, int world_size,
                           bool device, error_text *error) {
    TRY(build(p, r, s, world_size, device, true, error));
    if (s->ownership != OWNERSHIP_BALANCED || p->imbalance <= EVEN)
        return MUONSHARD_OK;
    /* Whole waves give all ranks the same, and may leave too little to make up for the rest. */
    plan loose;
    const muonshard_status status = build(&loose, r, s, world_size, device, false, error);
    if (status == MUONSHARD_OK && loose.imbalance < p->imbalance - 0.01) {
        const plan kept = *p;
        *p = loose;
        loose = kept;
    }
    if (status)
        plan_free(p);
    else
        plan_free(&loose);
    return status;
}

void plan_compact(plan *p, const registry *r, const settings *s, bool sums_fp32) {
    builder b = {.p = p, .r = r, .s = s, .sums_fp32 = sums_fp32};
    for (size_t i = 0; i < p->wave_count; i++) {
        wave *w = &p->waves[i];
        w->compact_gather = plan_is_sparse(p, w);
        w->compact_pack = w->compact_gather && w->packed && sums_fp32 && w->wire == MUONSHARD_FP32;
    }
    lay_out(&b);
    count_bytes(&b);
}

uint64_t plan_hash(const plan *p) {
    uint64_t h = XXH64(p->slots, p->slot_count * sizeof *p->slots, (uint64_t)p->world_size);
    h = XXH64(p->reduce_order, p->wave_count * sizeof *p->reduce_order, h);
    for (size_t i = 0; i < p->wave_count; i++) {
        const wave *w = &p->waves[i];
        const uint64_t facts[] = {
            w->kind,          w->packed,          (uint64_t)w->rows, (uint64_t)w->cols,
            w->slot,          w->first_slot,      w->pack_offset,    w->owned_offset,
            w->gather_offset, (uint64_t)w->dtype, (uint64_t)w->wire, (uint64_t)w->sent,
            w->factor_offset, w->compact_pack,    w->compact_gather};
        h = XXH64(facts, sizeof facts, h);
    }
    for (size_t i = 0; i < p->bucket_count; i++) {
        const uint64_t facts[] = {p->buckets[i].first, p->buckets[i].count};
        h = XXH64(facts, sizeof facts, h);
    }
    for (size_t i = 0; i < p->batch_count; i++) {
        const uint64_t facts[] = {p->batches[i].first, p->batches[i].count,
                                  p->batches[i].gathers_params};
        h = XXH64(facts, sizeof facts, h);
    }
    return h;
}

void plan_free(plan *p) {
    free(p->waves);
    free(p->slots);
    free(p->reduce_order);
    free(p->buckets);
    free(p->batches);
    free(p->view_wave);
    free(p->view_owner);
    free(p->flat_offset);
    *p = (plan){0};
}
