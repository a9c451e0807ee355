/* Plan and schedule as data: what must hold of them for any tensors and any number of ranks. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "config.h"
#include "optim/schedule.h"
#include "step_rig.h"

#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

static const int world_sizes[] = {1, 2, 3, 4, 7, 64};
enum { WORLD_SIZES = sizeof world_sizes / sizeof world_sizes[0] };

typedef struct fixture {
    muonshard_config *config;
    const settings *settings;
    registry registry;
    plan plan;
    schedule schedule;
} fixture;

static void fixture_open(fixture *f, const rig_tensor *tensors, size_t count, const char *yaml,
                         int ranks) {
    error_text error = {""};
    memset(f, 0, sizeof *f);
    assert_int_equal(muonshard_config_create(&f->config), MUONSHARD_OK);
    assert_int_equal(muonshard_config_load_string(f->config, yaml), MUONSHARD_OK);
    f->settings = config_settings(f->config);
    f->registry.weightless = true;
    for (size_t i = 0; i < count; i++) {
        muonshard_tensor_desc d = MUONSHARD_TENSOR_DESC_INIT;
        d.name = tensors[i].name;
        d.role = tensors[i].role;
        d.form = tensors[i].form;
        d.dims = tensors[i].dims;
        memcpy(d.shape, tensors[i].shape, sizeof tensors[i].shape);
        d.row_splits = tensors[i].splits;
        d.row_split_count = tensors[i].split_count;
        d.priority = tensors[i].priority;
        d.priority_stride = tensors[i].priority_stride;
        d.dtype = tensors[i].dtype;
        d.grad_dtype = tensors[i].grad_dtype;
        assert_int_equal(registry_add(&f->registry, f->settings, &d, NULL, &error), MUONSHARD_OK);
    }
    assert_int_equal(plan_make(&f->plan, &f->registry, f->settings, ranks, false, &error),
                     MUONSHARD_OK);
    assert_int_equal(schedule_make(&f->schedule, &f->plan, f->settings, &error), MUONSHARD_OK);
}

static void fixture_close(fixture *f) {
    schedule_free(&f->schedule);
    plan_free(&f->plan);
    registry_free(&f->registry);
    muonshard_config_destroy(f->config);
}

/* Cut small, so that there are many waves in a bucket and many batches. */
static const char *const yamls[] = {"", "{bucket_bytes: 10000, batch_bytes: 5000}",
                                    "{reduce: none}",
                                    "{ns_dtype: bf16, variance: normuon, batch_bytes: 5000}",
                                    "{ownership: balanced, gather: params, batch_bytes: 5000}"};

/* Every other tensor's parameters in bf16, every third's gradients. */
static void mix_dtypes(rig_tensor *tensors) {
    memcpy(tensors, rig_zoo, rig_zoo_count * sizeof *tensors);
    for (size_t i = 0; i < rig_zoo_count; i++) {
        tensors[i].dtype = i % 2 ? MUONSHARD_BF16 : MUONSHARD_FP32;
        tensors[i].grad_dtype = i % 3 ? MUONSHARD_BF16 : MUONSHARD_FP32;
    }
}

static void for_all(void (*check)(const fixture *f)) {
    rig_tensor mixed[RIG_MAX_TENSORS];
    mix_dtypes(mixed);
    for (size_t y = 0; y < sizeof yamls / sizeof yamls[0]; y++)
        for (int n = 0; n < 2 * WORLD_SIZES; n++) {
            fixture f;
            fixture_open(&f, n % 2 ? mixed : rig_zoo, rig_zoo_count, yamls[y], world_sizes[n / 2]);
            check(&f);
            fixture_close(&f);
        }
}

static void check_views_placed_once(const fixture *f) {
    const plan *p = &f->plan;
    int *seen = calloc(f->registry.view_count, sizeof *seen);
    for (size_t w = 0; w < p->wave_count; w++)
        for (int r = 0; p->waves[w].kind == PLAN_MATRICES && r < p->world_size; r++) {
            const size_t v = plan_slot_view(p, &p->waves[w], r);
            if (v == PLAN_EMPTY_SLOT)
                continue;
            seen[v]++;
            assert_int_equal(p->view_wave[v], w);
            assert_int_equal(p->view_owner[v], r);
            assert_int_equal(view_elements(&f->registry.views[v]), p->waves[w].slot);
        }
    for (size_t v = 0; v < f->registry.view_count; v++)
        assert_int_equal(seen[v], 1);
    free(seen);
}

static void test_every_view_has_one_owner(void **state) {
    (void)state;
    for_all(check_views_placed_once);
}

/* What makes sending from the caller's memory right: slot r starts r slots behind slot 0, in one
 * tensor. */
static void check_unpacked_is_contiguous(const fixture *f) {
    const plan *p = &f->plan;
    for (size_t w = 0; w < p->wave_count; w++) {
        const wave *a = &p->waves[w];
        for (int r = 0; !a->packed && r < p->world_size; r++) {
            assert_int_not_equal(plan_slot_view(p, a, r), PLAN_EMPTY_SLOT);
            const view *first = &f->registry.views[a->first_view];
            const view *v = &f->registry.views[plan_slot_view(p, a, r)];
            assert_int_equal(v->tensor, first->tensor);
            assert_int_equal(v->offset, first->offset + (size_t)r * a->slot);
        }
    }
}

static void test_unpacked_waves_are_contiguous(void **state) {
    (void)state;
    for_all(check_unpacked_is_contiguous);
}

typedef struct range {
    size_t start, end;
} range;

static int by_start(const void *a, const void *b) {
    const range *x = a, *y = b;
    return x->start < y->start ? -1 : x->start > y->start;
}

static void assert_disjoint(range *ranges, size_t count, size_t limit) {
    qsort(ranges, count, sizeof *ranges, by_start);
    for (size_t i = 0; i < count; i++) {
        assert_true(ranges[i].end <= limit);
        if (i)
            assert_true(ranges[i - 1].end <= ranges[i].start);
    }
}

static void check_arenas(const fixture *f) {
    const plan *p = &f->plan;
    const size_t n = (size_t)p->world_size;
    range *owned = calloc(p->wave_count, sizeof *owned),
          *pack = calloc(p->wave_count, sizeof *pack);
    range *scratch = calloc(p->wave_count, sizeof *scratch);
    size_t packed = 0;
    const bool reduce = p->reduces;
    assert_true(reduce == (p->world_size > 1 && f->settings->reduce != REDUCE_NONE));
    assert_true(p->gathers == (p->world_size > 1));
    for (size_t i = 0; i < p->wave_count; i++) {
        const wave *w = &p->waves[i];
        owned[i] = (range){w->owned_offset, w->owned_offset + w->slot};
        const size_t whole = n * w->slot * dtype_size(w->wire);
        scratch[i] = (range){w->exchange_offset, w->exchange_offset + whole};
        if (w->packed && reduce)
            pack[packed++] = (range){w->pack_offset, w->pack_offset + whole};
        if (w->kind == PLAN_MATRICES)
            assert_true(owned[i].end <= p->matrix_elements);
    }
    assert_disjoint(owned, p->wave_count, p->owned_elements);
    assert_disjoint(pack, packed, p->pack_bytes);
    if (reduce)
        assert_disjoint(scratch, p->wave_count, p->scratch_bytes);
    free(owned);
    free(pack);
    free(scratch);
}

static void test_arenas_do_not_overlap(void **state) {
    (void)state;
    for_all(check_arenas);
}

/* While batch b is applied, batch b+1 is gathered: their buffers must be apart. */
static void check_gather_buffers(const fixture *f) {
    const plan *p = &f->plan;
    const size_t n = (size_t)p->world_size;
    size_t next = 0;
    for (size_t b = 0; b < p->batch_count; b++) {
        assert_int_equal(p->batches[b].first, next);
        next += p->batches[b].count;
        range *ranges = calloc(2 * p->wave_count, sizeof *ranges);
        size_t count = 0;
        for (size_t i = p->batches[b].first; i < p->wave_count; i++) {
            if (b + 1 >= p->batch_count ? i >= next : i >= next + p->batches[b + 1].count)
                break;
            const wave *w = &p->waves[i];
            const size_t whole = n * w->slot * dtype_size(w->sent);
            ranges[count++] = (range){w->gather_offset, w->gather_offset + whole};
            const size_t factors = n * (size_t)(w->rows > w->cols ? w->rows : w->cols) * 4;
            if (w->kind == PLAN_MATRICES && f->settings->variance != VARIANCE_NONE &&
                !registry_gathers_params(f->settings, w->dtype))
                ranges[count++] = (range){w->factor_offset, w->factor_offset + factors};
        }
        if (p->gathers)
            assert_disjoint(ranges, count, p->gather_bytes);
        else
            assert_int_equal(p->gather_bytes, 0);
        free(ranges);
    }
    assert_int_equal(next, p->wave_count);
}

static void test_two_gathers_fit_side_by_side(void **state) {
    (void)state;
    for_all(check_gather_buffers);
}

static void check_batches_have_one_shape(const fixture *f) {
    const plan *p = &f->plan;
    for (size_t b = 0; b < p->batch_count; b++)
        for (size_t i = 0; i < p->batches[b].count; i++) {
            const wave *w = &p->waves[p->batches[b].first + i];
            assert_int_equal(w->kind, p->batches[b].kind);
            assert_true(p->batches[b].m <= p->batches[b].n);
            assert_int_equal(w->dtype, p->batches[b].dtype);
            for (int r = 0; w->kind == PLAN_MATRICES && r < p->world_size; r++) {
                const size_t v = plan_slot_view(p, w, r);
                if (v == PLAN_EMPTY_SLOT)
                    continue;
                const tensor *t = &f->registry.tensors[f->registry.views[v].tensor];
                assert_int_equal(t->dtype, w->dtype);
                assert_true(t->grad_dtype == w->wire || w->wire == MUONSHARD_FP32);
            }
            assert_true((w->rows == p->batches[b].m && w->cols == p->batches[b].n) ||
                        (w->cols == p->batches[b].m && w->rows == p->batches[b].n));
        }
}

static void test_batches_have_one_oriented_shape(void **state) {
    (void)state;
    for_all(check_batches_have_one_shape);
}

/* Every operation's inputs are there when it runs, by the order of its stream or by waits_on. */
static void check_schedule(const fixture *f) {
    const plan *p = &f->plan;
    const schedule *s = &f->schedule;
    const bool reduce = p->reduces;
    int *reduced = calloc(p->bucket_count + 1, sizeof *reduced);
    int *measured = calloc(p->bucket_count + 1, sizeof *measured);
    int *stage = calloc(p->batch_count + 1, sizeof *stage);
    int *varied = calloc(p->batch_count + 1, sizeof *varied);
    int *updated = calloc(p->batch_count + 1, sizeof *updated);
    int *gather = calloc(p->batch_count + 1, sizeof *gather);
    int *computed = calloc(p->batch_count + 1, sizeof *computed); /* its last operation so far */
    int agree = -1, resolve = -1;
    for (int i = 0; i < (int)s->count; i++) {
        const op *o = &s->ops[i];
        assert_true(o->waits_on < i);
        if (o->waits_on != OP_NONE && reduce)
            assert_int_not_equal(s->ops[o->waits_on].stream, o->stream);
        switch (o->kind) {
        case OP_TAKE:
            assert_false(reduce);
            reduced[o->index] = 1;
            break;
        case OP_PACK: assert_true(p->buckets[o->index].packed); break;
        case OP_REDUCE_SCATTER:
            assert_true(reduce);
            if (p->buckets[o->index].packed) {
                assert_int_equal(o->waits_on, i - 1);
                assert_int_equal(s->ops[i - 1].kind, OP_PACK);
                assert_int_equal(s->ops[i - 1].index, o->index);
            }
            reduced[o->index]++;
            break;
        case OP_MEASURE:
            assert_int_equal(reduced[o->index], 1);
            if (reduce) {
                assert_int_equal(s->ops[o->waits_on].kind, OP_REDUCE_SCATTER);
                assert_int_equal(s->ops[o->waits_on].index, o->index);
            }
            measured[o->index]++;
            break;
        case OP_AGREE:
            agree = i;
            for (size_t b = 0; b < p->bucket_count; b++)
                assert_int_equal(measured[b], 1);
            if (p->bucket_count)
                assert_int_equal(o->waits_on, i - 1);
            break;
        case OP_RESOLVE:
            resolve = i;
            assert_int_equal(o->waits_on, agree);
            break;
        case OP_MOMENTUM:
        case OP_ADAM:
            assert_true(resolve >= 0);
            assert_int_equal(stage[o->index], 0);
            stage[o->index] = o->kind == OP_ADAM ? 2 : 1;
            computed[o->index] = i;
            break;
        case OP_ORTHOGONALIZE:
            assert_int_equal(stage[o->index], 1);
            stage[o->index] = 2;
            computed[o->index] = i;
            break;
        case OP_VARIANCE:
            assert_int_equal(stage[o->index], 2);
            varied[o->index]++;
            computed[o->index] = i;
            break;
        case OP_UPDATE:
            assert_int_equal(stage[o->index], 2);
            assert_int_equal(varied[o->index], f->settings->variance != VARIANCE_NONE);
            updated[o->index]++;
            computed[o->index] = i;
            break;
        case OP_ALL_GATHER:
            assert_true(p->gathers);
            assert_int_equal(stage[o->index], 2);
            assert_int_equal(s->ops[o->waits_on].index, o->index);
            assert_int_equal(o->waits_on, computed[o->index]);
            const bool matrices = p->batches[o->index].kind == PLAN_MATRICES;
            assert_int_equal(varied[o->index], matrices && f->settings->variance != VARIANCE_NONE);
            assert_int_equal(updated[o->index], matrices && p->batches[o->index].gathers_params);
            if (o->index >= 2) /* its buffer was applied */
                assert_int_equal(stage[o->index - 2], 4);
            stage[o->index] = 3;
            gather[o->index] = i;
            break;
        case OP_APPLY:
            assert_int_equal(stage[o->index], p->gathers ? 3 : 2);
            assert_int_equal(o->waits_on, p->gathers ? gather[o->index] : OP_NONE);
            stage[o->index] = 4;
            break;
        default: fail_msg("unknown operation");
        }
    }
    for (size_t b = 0; b < p->batch_count; b++)
        assert_int_equal(stage[b], 4);
    free(reduced);
    free(measured);
    free(stage);
    free(varied);
    free(computed);
    free(updated);
    free(gather);
}

static void test_schedule_orders_what_depends(void **state) {
    (void)state;
    for_all(check_schedule);
}

static void test_round_robin_of_a_stack(void **state) {
    (void)state;
    const rig_tensor stack = {RIG_TENSOR("stack", MUONSHARD_ROLE_MATRIX, 3, 10, 8, 8)};
    for (int n = 0; n < WORLD_SIZES; n++) {
        fixture f;
        fixture_open(&f, &stack, 1, "", world_sizes[n]);
        for (size_t v = 0; v < 10; v++)
            assert_int_equal(f.plan.view_owner[v], v % (size_t)world_sizes[n]);
        fixture_close(&f);
    }
}

/* Matrices registered one by one go round the ranks as well, packed. */
static void test_round_robin_of_single_matrices(void **state) {
    (void)state;
    rig_tensor tensors[9];
    char names[9][8];
    for (size_t i = 0; i < 9; i++) {
        snprintf(names[i], sizeof names[i], "w%zu", i);
        tensors[i] = (rig_tensor){RIG_TENSOR(names[i], MUONSHARD_ROLE_MATRIX, 2, 8, 8)};
    }
    fixture f;
    fixture_open(&f, tensors, 9, "", 4);
    for (size_t v = 0; v < 9; v++)
        assert_int_equal(f.plan.view_owner[v], v % 4);
    assert_int_equal(f.plan.wave_count, 3);
    assert_int_equal(f.plan.bytes_packed, 9 * 64 * 4);
    assert_int_equal(f.plan.bytes_padded, 3 * 64 * 4);
    fixture_close(&f);
}

/* GPT-2 124M's matrices: at many ranks most are loose, and they differ in cost by 3.25. */
static const rig_tensor gpt2[] = {
    {RIG_TENSOR("qkv", MUONSHARD_ROLE_MATRIX, 3, 12, 2304, 768), .split_count = 3,
     .splits = {768, 768, 768}},
    {RIG_TENSOR("proj", MUONSHARD_ROLE_MATRIX, 3, 12, 768, 768)},
    {RIG_TENSOR("fc", MUONSHARD_ROLE_MATRIX, 3, 12, 3072, 768)},
    {RIG_TENSOR("fcproj", MUONSHARD_ROLE_MATRIX, 3, 12, 768, 3072)},
};

/* Never more than 4/3 of what the best assignment needs (Graham 1969), which is no less than the
 * mean nor than the largest matrix; costs from the formula: per step m^2 (3n + m). */
static void test_balanced_ownership(void **state) {
    (void)state;
    const double square = 4.0, wide = 13.0, total = 48 * square + 24 * wide;
    for (int ranks = 1; ranks <= 80; ranks += 3) {
        fixture turns, balanced;
        fixture_open(&turns, gpt2, 4, "{ns_form: standard}", ranks);
        fixture_open(&balanced, gpt2, 4, "{ns_form: standard, ownership: balanced}", ranks);
        const double mean = total / ranks, best = mean > wide ? mean : wide;
        double *load = calloc((size_t)ranks, sizeof *load), most = 0.0;
        for (size_t v = 0; v < balanced.registry.view_count; v++) {
            const view *one = &balanced.registry.views[v];
            load[balanced.plan.view_owner[v]] += one->rows == one->cols ? square : wide;
        }
        for (int r = 0; r < ranks; r++)
            most = fmax(most, load[r]);
        free(load);
        assert_true(most <= 4.0 / 3.0 * best);
        assert_true(fabs(balanced.plan.imbalance - most / mean) < 1e-9);
        assert_true(balanced.plan.imbalance <= turns.plan.imbalance + 1e-9);
        if (ranks == 64) {
            assert_true(turns.plan.imbalance > 2.1 && most == wide);
            print_message("GPT-2 at 64 ranks, largest / mean cost: %.3f by turns, %.3f balanced\n",
                          turns.plan.imbalance, balanced.plan.imbalance);
        }
        fixture_close(&turns);
        fixture_close(&balanced);
    }
}

/* 16 bits are half the bytes: of gradients by their dtype, of updates by Newton-Schulz's, of
 * parameters by theirs. */
static void test_bytes_of_16_bits(void **state) {
    (void)state;
    rig_tensor t = {RIG_TENSOR("w", MUONSHARD_ROLE_MATRIX, 3, 2, 8, 8)};
    const size_t slot = 64;
    const struct {
        const char *yaml;
        muonshard_dtype dtype, grad_dtype;
        size_t reduced, gathered;
    } cases[] = {
        {"", MUONSHARD_FP32, MUONSHARD_FP32, 4, 4},
        {"", MUONSHARD_FP32, MUONSHARD_BF16, 2, 4},
        {"{ns_dtype: bf16}", MUONSHARD_FP32, MUONSHARD_FP32, 4, 2},
        {"{ns_dtype: tf32}", MUONSHARD_FP32, MUONSHARD_FP32, 4, 4},
        {"{ns_dtype: bf16, gather: params}", MUONSHARD_FP32, MUONSHARD_FP32, 4, 4},
        {"", MUONSHARD_BF16, MUONSHARD_FP16, 2, 2},
        {"{gather: updates, master: replicated}", MUONSHARD_BF16, MUONSHARD_BF16, 2, 4},
        {"{ns_dtype: param, gather: updates, master: replicated}", MUONSHARD_FP16, MUONSHARD_FP16,
         2, 2},
    };
    for (size_t c = 0; c < sizeof cases / sizeof cases[0]; c++) {
        fixture f;
        t.dtype = cases[c].dtype;
        t.grad_dtype = cases[c].grad_dtype;
        fixture_open(&f, &t, 1, cases[c].yaml, 2);
        assert_int_equal(f.plan.bytes_reduced, slot * cases[c].reduced);
        assert_int_equal(f.plan.bytes_gathered, slot * cases[c].gathered);
        fixture_close(&f);
    }
    t.dtype = MUONSHARD_FP32; /* the variance's factors go along, 8 of them */
    fixture f;
    fixture_open(&f, &t, 1, "{variance: normuon}", 2);
    assert_int_equal(f.plan.bytes_gathered, slot * 4 + 8 * 4);
    fixture_close(&f);
}

static void test_reductions_run_backwards_unless_priorities_say(void **state) {
    (void)state;
    const rig_tensor tensors[] = {
        {RIG_TENSOR("a", MUONSHARD_ROLE_MATRIX, 3, 4, 8, 8)},
        {RIG_TENSOR("b", MUONSHARD_ROLE_MATRIX, 3, 4, 8, 16)},
        {RIG_TENSOR("c", MUONSHARD_ROLE_MATRIX, 3, 2, 4, 8), .priority = 1},
        {RIG_TENSOR("d", MUONSHARD_ROLE_MATRIX, 3, 2, 4, 4), .priority = -1}};
    fixture f;
    fixture_open(&f, tensors, 4, "", 2);
    static const int tensor_of[] = {3, 1, 1, 0, 0, 2};
    static const size_t entry_of[] = {0, 2, 0, 2, 0, 0};
    assert_int_equal(f.plan.wave_count, 6);
    for (size_t i = 0; i < 6; i++) {
        const wave *w = &f.plan.waves[f.plan.reduce_order[i]];
        assert_int_equal(w->first_tensor, tensor_of[i]);
        assert_int_equal(f.registry.views[w->first_view].entry, entry_of[i]);
    }
    fixture_close(&f);
}

/* A stride of -1 over all stacks: the last layers of every stack, then the layers before. */
static void test_priority_stride_goes_layer_by_layer(void **state) {
    (void)state;
    const rig_tensor tensors[] = {
        {RIG_TENSOR("up", MUONSHARD_ROLE_MATRIX, 3, 6, 8, 4), .priority_stride = -1},
        {RIG_TENSOR("down", MUONSHARD_ROLE_MATRIX, 3, 6, 4, 8), .priority_stride = -1},
        {RIG_TENSOR("head", MUONSHARD_ROLE_MATRIX, 3, 2, 5, 5), .priority = -100}};
    fixture f;
    fixture_open(&f, tensors, 3, "", 2);
    static const int tensor_of[] = {2, 1, 0, 1, 0, 1, 0};
    static const int64_t entry_of[] = {0, 4, 4, 2, 2, 0, 0};
    assert_int_equal(f.plan.wave_count, 7);
    for (size_t i = 0; i < 7; i++) {
        const wave *w = &f.plan.waves[f.plan.reduce_order[i]];
        assert_int_equal(w->first_tensor, tensor_of[i]);
        assert_int_equal(f.registry.views[w->first_view].entry, entry_of[i]);
    }
    fixture_close(&f);
}

static void test_flat_shards_are_whole_chunks(void **state) {
    (void)state;
    for (int n = 0; n < WORLD_SIZES; n++) {
        fixture f;
        fixture_open(&f, rig_zoo, rig_zoo_count, "", world_sizes[n]);
        assert_int_equal(f.plan.flat_elements, 97 * 24 + 24 + 70001);
        assert_int_equal(f.plan.flat_shard % PLAN_FLAT_CHUNK, 0);
        assert_true(f.plan.flat_shard * (size_t)world_sizes[n] >= f.plan.flat_elements);
        fixture_close(&f);
    }
}

static void test_hash_tells_plans_apart(void **state) {
    (void)state;
    fixture a, b, c, d;
    fixture_open(&a, rig_zoo, rig_zoo_count, "", 2);
    fixture_open(&b, rig_zoo, rig_zoo_count, "", 2);
    fixture_open(&c, rig_zoo, rig_zoo_count, "", 3);
    fixture_open(&d, rig_zoo, rig_zoo_count, "{batch_bytes: 5000}", 2);
    assert_true(plan_hash(&a.plan) == plan_hash(&b.plan));
    assert_true(plan_hash(&a.plan) != plan_hash(&c.plan));
    assert_true(plan_hash(&a.plan) != plan_hash(&d.plan));
    assert_true(schedule_hash(&a.schedule) == schedule_hash(&b.schedule));
    assert_true(schedule_hash(&a.schedule) != schedule_hash(&d.schedule));
    b.schedule.ops[b.schedule.count - 1].waits_on--; /* what it waits for is part of it */
    assert_true(schedule_hash(&a.schedule) != schedule_hash(&b.schedule));
    fixture_close(&a);
    fixture_close(&b);
    fixture_close(&c);
    fixture_close(&d);
}

static void test_nothing_and_little(void **state) {
    (void)state;
    const rig_tensor one = {RIG_TENSOR("one", MUONSHARD_ROLE_MATRIX, 2, 3, 5)};
    for (int n = 0; n < WORLD_SIZES; n++) {
        fixture f;
        fixture_open(&f, NULL, 0, "", world_sizes[n]);
        assert_int_equal(f.plan.wave_count, 0);
        check_schedule(&f);
        fixture_close(&f);
        fixture_open(&f, &one, 1, "", world_sizes[n]);
        assert_int_equal(f.plan.wave_count, 1);
        check_views_placed_once(&f);
        check_schedule(&f);
        fixture_close(&f);
    }
}

/* Views that share no shape still take turns: no rank gets them all. */
static void test_round_robin_of_different_shapes(void **state) {
    (void)state;
    rig_tensor tensors[6];
    char names[6][8];
    for (size_t i = 0; i < 6; i++) {
        snprintf(names[i], sizeof names[i], "w%zu", i);
        tensors[i] = (rig_tensor){RIG_TENSOR(names[i], MUONSHARD_ROLE_MATRIX, 2, 8, 8 + (int)i)};
    }
    fixture f;
    fixture_open(&f, tensors, 6, "{ns_form: standard}", 4);
    for (size_t v = 0; v < 6; v++)
        assert_int_equal(f.plan.view_owner[v], v % 4);
    /* By hand: m m (3 n + m) each; ranks 0 and 1 have two. */
    const double cost[] = {2048, 2240, 2432, 2624, 2816, 3008};
    double total = 0.0;
    for (size_t v = 0; v < 6; v++)
        total += cost[v];
    assert_true(fabs(f.plan.imbalance - (2240 + 3008) * 4 / total) < 1e-12);
    fixture_close(&f);
}

/* What is packed together, and the flat rest, is reduced when its last tensor is. */
static void test_a_wave_has_its_highest_priority(void **state) {
    (void)state;
    const rig_tensor tensors[] = {
        {RIG_TENSOR("a", MUONSHARD_ROLE_MATRIX, 2, 8, 8), .priority = 1},
        {RIG_TENSOR("b", MUONSHARD_ROLE_MATRIX, 2, 8, 8), .priority = 5},
        {RIG_TENSOR("c", MUONSHARD_ROLE_MATRIX, 2, 4, 4), .priority = 4},
        {RIG_TENSOR("d", MUONSHARD_ROLE_ELEMENTWISE, 1, 9), .priority = 2},
        {RIG_TENSOR("e", MUONSHARD_ROLE_ELEMENTWISE, 1, 9), .priority = 3}};
    fixture f;
    fixture_open(&f, tensors, 5, "", 2);
    static const int tensor_of[] = {3, 2, 0}, priority_of[] = {3, 4, 5};
    assert_int_equal(f.plan.wave_count, 3);
    for (size_t i = 0; i < 3; i++) {
        const wave *w = &f.plan.waves[f.plan.reduce_order[i]];
        assert_int_equal(w->first_tensor, tensor_of[i]);
        assert_int_equal(w->priority, priority_of[i]);
    }
    fixture_close(&f);
}

/* 12 entries of 256 bytes over 2 ranks: 6 waves, of which a rank sends 512 bytes and owns 256. */
static void test_buckets_and_batches_keep_to_their_bytes(void **state) {
    (void)state;
    const rig_tensor stack = {RIG_TENSOR("stack", MUONSHARD_ROLE_MATRIX, 3, 12, 8, 8)};
    static const struct {
        const char *yaml;
        size_t buckets, batches;
    } cases[] = {{"{bucket_bytes: 1536, batch_bytes: 768}", 2, 2},
                 {"{bucket_bytes: 1535, batch_bytes: 767}", 3, 3},
                 {"{bucket_bytes: 1, batch_bytes: 1}", 6, 6},
                 {"", 1, 1}};
    for (size_t i = 0; i < 4; i++) {
        fixture f;
        fixture_open(&f, &stack, 1, cases[i].yaml, 2);
        assert_int_equal(f.plan.bucket_count, cases[i].buckets);
        assert_int_equal(f.plan.batch_count, cases[i].batches);
        fixture_close(&f);
    }
}

/* A wave of 3 slots of 64 elements and one of a shard: what a rank moves, by hand. */
static void test_bytes_are_counted(void **state) {
    (void)state;
    const rig_tensor tensors[] = {{RIG_TENSOR("stack", MUONSHARD_ROLE_MATRIX, 3, 3, 8, 8)},
                                  {RIG_TENSOR("gain", MUONSHARD_ROLE_ELEMENTWISE, 1, 100)}};
    fixture f;
    fixture_open(&f, tensors, 2, "", 3);
    const plan *p = &f.plan;
    assert_int_equal(p->flat_shard, PLAN_FLAT_CHUNK);
    assert_int_equal(p->bytes_reduced, 2 * (64 + PLAN_FLAT_CHUNK) * 4);
    assert_int_equal(p->bytes_gathered, 2 * (64 + PLAN_FLAT_CHUNK) * 4);
    assert_int_equal(p->bytes_packed, 100 * 4);
    assert_int_equal(p->bytes_padded, (3 * PLAN_FLAT_CHUNK - 100) * 4);
    assert_int_equal(p->largest_unpacked_bytes,
                     3 * 64 * 4); /* zeros sent where a gradient is NULL */
    fixture_close(&f);
    fixture_open(&f, tensors, 2, "{reduce: none}", 3);
    assert_int_equal(f.plan.bytes_reduced, 0);
    assert_int_equal(f.plan.bytes_packed, 0);
    fixture_close(&f);
}

/* Every fact two ranks can differ in without a plan that differs. */
static void test_hash_tells_tensors_apart(void **state) {
    (void)state;
    enum { CASES = 8 };
    static const int64_t halves[] = {4, 4}, quarters[] = {2, 6};
    registry r = {.weightless = true};
    error_text error;
    muonshard_config *config;
    assert_int_equal(muonshard_config_create(&config), MUONSHARD_OK);
    for (int i = 0; i < CASES; i++) {
        char name[] = "w";
        muonshard_tensor_desc d = MUONSHARD_TENSOR_DESC_INIT;
        d.name = name;
        d.role = MUONSHARD_ROLE_MATRIX;
        d.dims = 2;
        d.shape[0] = d.shape[1] = 8;
        d.row_splits = i == 7 ? quarters : halves;
        d.row_split_count = 2;
        d.priority = i == 1;
        d.null_grad = i == 2 ? MUONSHARD_NULL_GRAD_SKIP : MUONSHARD_NULL_GRAD_ERROR;
        d.group = i == 3;
        d.lr_multiplier = i == 4 ? 0.5 : 1.0;
        d.decay_multiplier = i == 5 ? 0.5 : 1.0;
        d.form = i == 6 ? MUONSHARD_FLATTEN : MUONSHARD_STACK;
        assert_int_equal(registry_add(&r, config_settings(config), &d, NULL, &error), MUONSHARD_OK);
        r.tensors[i].name[0] = 'x'; /* the next may be called the same */
    }
    for (size_t i = 0; i < CASES; i++)
        for (size_t k = 0; k < i; k++)
            assert_true(registry_tensor_hash(&r, i) != registry_tensor_hash(&r, k));
    registry_free(&r);
    muonshard_config_destroy(config);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_view_has_one_owner),
        cmocka_unit_test(test_unpacked_waves_are_contiguous),
        cmocka_unit_test(test_arenas_do_not_overlap),
        cmocka_unit_test(test_two_gathers_fit_side_by_side),
        cmocka_unit_test(test_batches_have_one_oriented_shape),
        cmocka_unit_test(test_schedule_orders_what_depends),
        cmocka_unit_test(test_round_robin_of_a_stack),
        cmocka_unit_test(test_round_robin_of_single_matrices),
        cmocka_unit_test(test_balanced_ownership),
        cmocka_unit_test(test_bytes_of_16_bits),
        cmocka_unit_test(test_reductions_run_backwards_unless_priorities_say),
        cmocka_unit_test(test_priority_stride_goes_layer_by_layer),
        cmocka_unit_test(test_flat_shards_are_whole_chunks),
        cmocka_unit_test(test_hash_tells_plans_apart),
        cmocka_unit_test(test_nothing_and_little),
        cmocka_unit_test(test_round_robin_of_different_shapes),
        cmocka_unit_test(test_a_wave_has_its_highest_priority),
        cmocka_unit_test(test_buckets_and_batches_keep_to_their_bytes),
        cmocka_unit_test(test_bytes_are_counted),
        cmocka_unit_test(test_hash_tells_tensors_apart),

    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
