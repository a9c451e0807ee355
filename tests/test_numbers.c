/* Numbers that are not finite, too large or too small, in any tensor of any rank: what is skipped,
 * what is bounded, and that no state is lost to them. */
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "dtype.h"
#include "optim/optimizer.h"
#include "oracle_pair.h"
#include "ranks_fixture.h"

#include <setjmp.h>
#include <cmocka.h>

#define MATRIX  MUONSHARD_ROLE_MATRIX
#define ELEMENT MUONSHARD_ROLE_ELEMENTWISE
#define BF16    MUONSHARD_BF16
#define FP16    MUONSHARD_FP16

/* Full waves and what is left of them, packed shapes, row splits, the flat rest; all dtypes. */
static const rig_tensor mixed[] = {
    {RIG_TENSOR("stack", MATRIX, 3, 5, 12, 12)},
    {RIG_TENSOR("wide", MATRIX, 2, 8, 20), .grad_dtype = BF16},
    {RIG_TENSOR("tall", MATRIX, 2, 20, 8), .grad_dtype = FP16},
    {RIG_TENSOR("qkv", MATRIX, 3, 2, 18, 6), .split_count = 3, .splits = {6, 6, 6}},
    {RIG_TENSOR("convolution", MATRIX, 4, 6, 2, 3, 3), .form = MUONSHARD_FLATTEN},
    {RIG_TENSOR("brain", MATRIX, 3, 4, 10, 12), .dtype = BF16, .grad_dtype = BF16},
    {RIG_TENSOR("half", MATRIX, 2, 10, 14), .dtype = FP16, .grad_dtype = FP16},
    {RIG_TENSOR("row", MATRIX, 2, 1, 9)},
    {RIG_TENSOR("gain", ELEMENT, 1, 33)},
    {RIG_TENSOR("embedding", ELEMENT, 2, 40, 9), .grad_dtype = BF16},
    {RIG_TENSOR("bias", ELEMENT, 1, 17), .dtype = FP16, .grad_dtype = FP16},
};
enum { MIXED = sizeof mixed / sizeof mixed[0] };

/* ---- what a rank holds ---- */

static uint64_t hash_bytes(uint64_t h, const void *bytes, size_t count) {
    for (size_t i = 0; i < count; i++)
        h = (h ^ ((const unsigned char *)bytes)[i]) * 1099511628211U;
    return h;
}

typedef struct state_array {
    const void *at;
    size_t count;
    muonshard_dtype dtype;
} state_array;

enum { STATE_ARRAYS = 6 };

static void state_of(const rig *r, state_array arrays[STATE_ARRAYS]) {
    const muonshard_optimizer *o = r->optimizer;
    const workspace *m = &o->memory;
    const plan *p = &o->plan;
    const state_array all[STATE_ARRAYS] = {
        {m->momentum, p->matrix_elements, (muonshard_dtype)o->settings->momentum_dtype},
        {m->variance, p->variance_elements, MUONSHARD_FP32},
        {m->masters, p->master_elements, MUONSHARD_FP32},
        {m->flat_m, p->flat_shard, MUONSHARD_FP32},
        {m->flat_v, p->flat_shard, MUONSHARD_FP32},
        {m->flat_w, p->flat_master ? p->flat_shard : 0, MUONSHARD_FP32},
    };
    memcpy(arrays, all, sizeof all);
}

/* One array of it on the host; freed by the caller. */
static void *fetch(rig *r, const state_array *a) {
    const size_t bytes = a->count * dtype_size(a->dtype);
    void *host = malloc(bytes + 1);
    const copy_item item = {host, a->at, bytes};
    if (bytes)
        r->optimizer->backend->ops->copy(r->optimizer->backend, &item, 1, STREAM_COMPUTE);
    return host;
}

/* Of parameters and of all state. */
static uint64_t digest_of(rig *r) {
    state_array arrays[STATE_ARRAYS];
    state_of(r, arrays);
    uint64_t h = rig_digest(r);
    for (int i = 0; i < STATE_ARRAYS; i++) {
        void *bytes = fetch(r, &arrays[i]);
        h = hash_bytes(h, bytes, arrays[i].count * dtype_size(arrays[i].dtype));
        free(bytes);
    }
    return h;
}

static size_t not_finite(const void *x, size_t count, muonshard_dtype dtype) {
    size_t bad = 0;
    for (size_t i = 0; i < count; i++) {
        const size_t size = dtype_size(dtype);
        float value;
        dtype_load(&value, (const char *)x + i * size, dtype, 1);
        bad += isfinite(value) ? 0 : 1;
    }
    return bad;
}

/* How many numbers of parameters and state that are not finite. */
static size_t lost_numbers(rig *r) {
    state_array arrays[STATE_ARRAYS];
    state_of(r, arrays);
    size_t bad = 0;
    for (int i = 0; i < STATE_ARRAYS; i++) {
        void *x = fetch(r, &arrays[i]);
        bad += not_finite(x, arrays[i].count, arrays[i].dtype);
        free(x);
    }
    for (size_t i = 0; i < r->setup->count; i++)
        bad += not_finite(r->params[i], r->elements[i], r->setup->tensors[i].dtype);
    return bad;
}

/* ---- gradients ---- */

static void put(rig *r, size_t t, size_t i, float value) {
    const muonshard_dtype dtype = r->setup->tensors[t].grad_dtype;
    dtype_store((char *)r->grads[t] + i * dtype_size(dtype), dtype, &value, 1);
}

/* The next gradients, times `factor`; 16-bit ones as far as their dtype goes. */
static void scaled_gradients(rig *r, double factor) {
    rig_gradients(r);
    for (size_t k = 0; k < r->setup->count; k++) {
        const muonshard_dtype dtype = r->setup->tensors[k].grad_dtype;
        const double most = dtype == FP16 ? 65504.0 : dtype == BF16 ? 0x1.fep127 : 0x1.fffffep127;
        for (size_t i = 0; i < r->elements[k]; i++) {
            float x;
            dtype_load(&x, (char *)r->grads[k] + i * dtype_size(dtype), dtype, 1);
            put(r, k, i, (float)fmax(-most, fmin(most, factor * (double)x)));
        }
    }
}

static void good_step(rig *r) {
    rig_gradients(r);
    rig_step(r);
}

/* The first failure is what the main thread tells. */
__attribute__((format(printf, 2, 3))) static void fail_rig(rig *r, const char *format, ...) {
    if (r->status != MUONSHARD_OK)
        return;
    va_list args;
    va_start(args, format);
    vsnprintf(r->message, sizeof r->message, format, args);
    va_end(args);
    r->status = MUONSHARD_ERR_INTERNAL;
}

#define assert_nothing_lost(r, ...)                                                                \
    do {                                                                                           \
        if (lost_numbers(r))                                                                       \
            fail_rig(r, "numbers that are not finite: " __VA_ARGS__);                              \
    } while (0)

static muonshard_step_result_info outcome_of(rig *r) {
    muonshard_step_result_info result = MUONSHARD_STEP_RESULT_INIT;
    if (r->status == MUONSHARD_OK)
        r->status = muonshard_step_result(r->optimizer, 0, 1, &result);
    return result;
}

static void assert_all_well(int ranks, outcome *out, const char *what) {
    assert_int_equal(threads_run(ranks, ranks_run, out), MUONSHARD_OK);
    for (int k = 0; k < ranks; k++) {
        if (out->status[k])
            fail_msg("%s, rank %d of %d: %s", what, k, ranks, out->message[k]);
        assert_true(out->digest[k] == out->digest[0]);
    }
}

/* ---- a number that is not finite, anywhere ---- */

static const float bad_numbers[] = {NAN, INFINITY, -INFINITY};
enum { BAD = 3 };

typedef struct bad_run {
    outcome out; /* first: what ranks_run is given */
    bool without;
} bad_run;

/* The step it skips is taken right after without the bad number. */
static void bad_step(rig *r, size_t t, bool last, int kind, int rank) {
    const bool mine = rank == muonshard_comm_rank(r->comm) || r->setup->same_gradients;
    const int64_t count = outcome_of(r).count;
    const uint64_t before = digest_of(r);
    rig_gradients(r);
    r->step--;
    if (mine)
        put(r, t, last ? r->elements[t] - 1 : 0, bad_numbers[kind]);
    rig_step(r);
    const muonshard_step_result_info result = outcome_of(r);
    if (!result.skipped || result.count != count || digest_of(r) != before)
        fail_rig(r, "%s, %s entry is %g on rank %d: skipped is %d, the count %lld after %lld",
                 r->setup->tensors[t].name, last ? "last" : "first", (double)bad_numbers[kind],
                 rank, result.skipped, (long long)result.count, (long long)count);
}

/* `number`: of bad steps. */
static void bad_steps(rig *r, outcome *out) {
    const bool without = ((const bad_run *)(const void *)out)->without;
    const int ranks = r->setup->same_gradients ? 1 : muonshard_comm_size(r->comm);
    good_step(r);
    for (size_t t = 0; t < r->setup->count; t++)
        for (int which = 0; which < 2 * BAD * ranks && r->status == MUONSHARD_OK; which++) {
            if (!without)
                bad_step(r, t, which / BAD % 2, which % BAD, which / BAD / 2);
            if (which % BAD == 0)
                good_step(r);
            out->number[muonshard_comm_rank(r->comm)]++;
        }
}

/* Schedules go by calls, skipped or not, and are left out. */
static void test_a_bad_gradient_changes_no_byte(void **state) {
    (void)state;
    const rig_case cases[] = {
        {.yaml = "{preset: moonlight, ns_dtype: fp32, clip_norm: 1}"},
        {.yaml = "{preset: speedrun, momentum_schedule: '', gather: params, momentum_dtype: bf16, "
                 "bucket_bytes: 1}",
         .overlap = RIG_READY_BACKWARD},
        {.yaml = "{preset: dion_repo, elementwise: lion, reduce: sum, rounding: stochastic}",
         .overlap = RIG_DEFER},
        {.yaml = "{preset: jordan, reduce: none}", .same_gradients = true},
    };
    double total = 0.0;
    for (size_t c = 0; c < sizeof cases / sizeof cases[0]; c++)
        for (int n = 1; n <= MAX_RANKS; n++) {
            rig_case setup = cases[c];
            if (row_left_out(c + (size_t)n, 3))
                continue;
            setup.tensors = mixed;
            setup.count = MIXED;
            bad_run with = {.out = {.setup = {&setup}, .between = bad_steps}};
            bad_run without = {.out = with.out, .without = true};
            assert_all_well(n, &with.out, setup.yaml);
            assert_all_well(n, &without.out, setup.yaml);
            if (with.out.digest[0] != without.out.digest[0])
                fail_msg("%s, %d ranks: good steps differ", setup.yaml, n);
            total += with.out.number[0];
        }
    print_message("%.0f bad steps\n", total);
}

/* ---- sums that are beyond fp32, of gradients that aren't ---- */

typedef struct sum_case {
    size_t tensor;
    float first, others; /* entry 0 on rank 0, on the other ranks; the rest is zero */
    float next;          /* entry 1 on rank 0 */
    int skipped[MAX_RANKS + 1];
    bool by_order; /* of additions, which is NCCL's own on a device */
} sum_case;

enum { STACK, WIDE, TALL };

static const sum_case sums[] = {
    {WIDE, 3e38F, 3e38F, 0.0F, {0, 0, 1, 1, 1}, false},
    {WIDE, 3e38F, 0.0F, 0.0F, {0}, false},
    {STACK, 3e38F, 3e38F, 0.0F, {0, 0, 1, 1, 1}, false},
    {STACK, 3e38F, -3e38F, 0.0F, {0, 0, 0, 0, 1}, true}, /* 3, 0, -3, -6 */
    {TALL, 65504.0F, 65504.0F, 65504.0F, {0}, false},
    {STACK, 3e38F, 0.0F, 3e38F, {0, 1}, false}, /* the norm is no number of fp32, the sums are */
};

typedef struct sum_run {
    outcome out;
    const sum_case *sum;
} sum_run;

static void one_sum(rig *r, outcome *out) {
    const sum_case *c = ((const sum_run *)(const void *)out)->sum;
    const bool first = muonshard_comm_rank(r->comm) == 0;
    good_step(r);
    scaled_gradients(r, 0.0);
    put(r, c->tensor, 0, first ? c->first : c->others);
    put(r, c->tensor, 1, first ? c->next : 0.0F);
    const uint64_t before = digest_of(r);
    rig_step(r);
    const int skipped = outcome_of(r).skipped;
    if (skipped != c->skipped[muonshard_comm_size(r->comm)] || (skipped && digest_of(r) != before))
        fail_rig(r, "%s: %g, %g elsewhere, and %g: skipped is %d",
                 r->setup->tensors[c->tensor].name, (double)c->first, (double)c->others,
                 (double)c->next, skipped);
    good_step(r);
    assert_nothing_lost(r, "after a large sum");
}

static void test_sums_beyond_fp32_are_skipped(void **state) {
    (void)state;
    const rig_case setup = {
        .tensors = mixed, .count = MIXED, .yaml = "{preset: moonlight, ns_dtype: fp32}"};
    for (int n = 1; n <= MAX_RANKS; n++)
        for (size_t i = 0; i < sizeof sums / sizeof sums[0]; i++) {
            sum_run run = {.out = {.setup = {&setup}, .between = one_sum}, .sum = &sums[i]};
            if (!sums[i].by_order || n <= 2 || images_on_host())
                assert_all_well(n, &run.out, "a sum");
        }
}

/* What multiplies gradients is no number of fp32, where they are too small for the norm to tell. */
static void scale_beyond_fp32(rig *r, outcome *out) {
    (void)out;
    good_step(r);
    const uint64_t before = digest_of(r);
    scaled_gradients(r, 1e-30);
    muonshard_step_args args = MUONSHARD_STEP_ARGS_INIT;
    args.grad_scale = 1e40;
    if (rig_call(r, &args) || !outcome_of(r).skipped || digest_of(r) != before)
        fail_rig(r, "grad_scale of 1e40 is not skipped");
}

static void test_scales_beyond_fp32_are_skipped(void **state) {
    (void)state;
    const rig_case setup = {
        .tensors = mixed, .count = MIXED, .yaml = "{preset: moonlight, ns_dtype: fp32}"};
    outcome out = {.setup = {&setup}, .between = scale_beyond_fp32};
    assert_all_well(2, &out, "a scale");
}

/* ---- momentum that would leave fp32, or bf16 ---- */

/* One entry alone is as large as a norm can be: it adds up, or changes sign, for some steps. */
static void largest_steps(rig *r, outcome *out) {
    const bool turns = out->keep;
    good_step(r);
    for (int i = 0; i < 6; i++) {
        scaled_gradients(r, 0.0);
        put(r, STACK, 7, turns && i % 2 ? -3.4e38F : 3.4e38F);
        rig_step(r);
        if (outcome_of(r).skipped)
            fail_rig(r, "3.4e38 alone was skipped");
        assert_nothing_lost(r, "large step %d", i);
    }
    good_step(r);
    assert_nothing_lost(r, "the step after");
}

static void test_momentum_stays_finite(void **state) {
    (void)state;
    static const char *const forms[] = {"heavy_ball", "heavy_ball_swapped", "ema", "ema_corrected"};
    int runs = 0;
    for (int form = 0; form < 4; form++)
        for (int which = 0; which < 16; which++) {
            char yaml[160];
            snprintf(yaml, sizeof yaml,
                     "{preset: moonlight, ns_dtype: fp32, momentum_form: %s, nesterov: %s, "
                     "momentum_dtype: %s, decay: %s}",
                     forms[form], which & 1 ? "true" : "false", which & 2 ? "bf16" : "fp32",
                     which & 4 ? "l2" : "decoupled");
            const rig_case setup = {.tensors = mixed, .count = MIXED, .yaml = yaml};
            outcome out = {.setup = {&setup}, .between = largest_steps, .keep = which & 8};
            assert_all_well(1, &out, yaml);
            for (size_t k = 0; out.keep && k < MIXED; k++)
                free(out.kept[k]);
            runs++;
        }
    print_message("%d runs\n", runs);
}

/* ---- gradients of 1e30 and of 1e-30 in every tensor ---- */

static bool moved(rig *r, size_t t, const void *before) {
    return memcmp(r->params[t], before, rig_bytes(r, t)) != 0;
}

/* An ordinary step, an extreme one, ordinary ones, which move every matrix. */
static void extreme_steps(rig *r, outcome *out) {
    const double factor = out->number[0];
    good_step(r);
    scaled_gradients(r, factor);
    rig_step(r);
    if (outcome_of(r).skipped)
        fail_rig(r, "gradients of %g were skipped", factor);
    assert_nothing_lost(r, "gradients of %g", factor);
    for (int i = 0; i < 2; i++) {
        void *before[MIXED];
        for (size_t t = 0; t < MIXED; t++) {
            before[t] = malloc(rig_bytes(r, t));
            memcpy(before[t], r->params[t], rig_bytes(r, t));
        }
        good_step(r);
        assert_nothing_lost(r, "after gradients of %g", factor);
        for (size_t t = 0; t < MIXED; t++) {
            if (r->setup->tensors[t].role == MATRIX && !moved(r, t, before[t]))
                fail_rig(r, "%s stays after gradients of %g", r->setup->tensors[t].name, factor);
            free(before[t]);
        }
    }
}

static void test_extreme_gradients_lose_nothing(void **state) {
    (void)state;
    static const char *const norms[] = {"frobenius_add", "frobenius_max", "frobenius_safety",
                                        "aol",           "schatten4",     "spectral"};
    static const char *const forms[] = {"heavy_ball", "heavy_ball_swapped", "ema", "ema_corrected"};
    static const char *const dtypes[] = {"fp32", "bf16", "fp16"};
    static const char *const more[] = {"adam: {form: eps_inside}",
                                       "clip_norm: 1",
                                       "elementwise: lion",
                                       "variance: normuon",
                                       "momentum_dtype: bf16",
                                       "decay: l2, adam: {decay: l2}",
                                       "adam: {nesterov: true, eps: 1e-30}",
                                       "gather: params"};
    static const double factors[] = {1e30, 1e-30};
    int runs = 0;
    for (int norm = 0; norm < 6; norm++)
        for (int dtype = 0; dtype < 3; dtype++)
            for (int gram = 0; gram < 2; gram++)
                for (int k = 0; k < 8; k++, runs++) {
                    char yaml[256];
                    if (row_left_out((size_t)(runs + norm), 3))
                        continue;
                    snprintf(yaml, sizeof yaml,
                             "{preset: jordan, lr: 0.1, norm: %s, ns_dtype: %s, ns_form: %s, "
                             "momentum_form: %s, %s}",
                             norms[norm], dtypes[dtype], gram ? "gram" : "standard",
                             forms[(runs + runs / 8) % 4], more[k]);
                    const rig_case setup = {.tensors = mixed, .count = MIXED, .yaml = yaml};
                    outcome out = {.setup = {&setup}, .between = extreme_steps};
                    out.number[0] = factors[(runs / 2 + runs / 48) % 2];
                    assert_all_well(1 + runs % 3, &out, yaml);
                }
    print_message("%d runs\n", runs);
}

/* The oracle has no largest number: presets over an extreme step, and after it. */
static const pair_tensor paired[] = {
    {"square", MATRIX, MUONSHARD_STACK, 2, {20, 20}, .grad_size = 1.0},
    {"stack", MATRIX, MUONSHARD_STACK, 3, {3, 14, 9}, 2, {6, 8}, .grad_size = 1.0},
    {"gain", ELEMENT, MUONSHARD_STACK, 1, {33}, .grad_size = 1.0},
    {"convolution", MATRIX, MUONSHARD_FLATTEN, 4, {6, 2, 3, 3}, .grad_size = 1.0},
    {"embedding", ELEMENT, MUONSHARD_STACK, 2, {11, 5}, .grad_size = 1.0},
};

static void run_pair(const char *yaml, const oracle_preset *recipe, double factor, int extreme,
                     double worst[2]) {
    pair p;
    char text[320];
    snprintf(text, sizeof text, "%s, gradients of %g in step %d", yaml, factor, extreme);
    pair_open(&p, yaml, recipe, paired, sizeof paired / sizeof paired[0], 77);
    muonshard_step_args args = MUONSHARD_STEP_ARGS_INIT;
    args.lr = args.adam_lr = 0.1;
    for (int step = 1; step <= 6; step++) {
        pair_new_gradients(&p);
        for (size_t k = 0; step == extreme && k < p.count; k++)
            for (size_t i = 0; i < p.elements[k]; i++)
                p.grads[k][i] *= (float)factor;
        pair_step(&p, &args);
        assert_int_equal(p.result.skipped, 0);
        if (step > 1 || factor > 1.0) /* eps has left nothing of a first tiny step */
            pair_check(&p, text, 1e-4, 1e-4, worst);
    }
    pair_close(&p);
}

static void test_extreme_gradients_against_the_oracle(void **state) {
    (void)state;
    static const double factors[] = {1e30, 1e-30};
    double worst[2] = {0.0, 0.0};
    int runs = 0;
    for (size_t k = 0; k < oracle_preset_count; k++)
        for (int which = 0; which < 8; which++, runs++) {
            oracle_preset recipe = oracle_presets[k];
            char yaml[160];
            recipe.clip_norm = which & 4 ? 1.0 : 0.0;
            snprintf(yaml, sizeof yaml, "{preset: %s, ns_dtype: fp32, ns_form: standard%s}",
                     recipe.name, which & 4 ? ", clip_norm: 1" : "");
            run_pair(yaml, &recipe, factors[which & 1], which & 2 ? 3 : 1, worst);
        }
    print_message("%d runs, worst error %.1e of a displacement\n", runs, fmax(worst[0], worst[1]));
}

/* The published eps is larger than a first gradient of 1e-30, and nothing moves; an eps that is
 * smaller leaves the polar factor. */
static void test_eps_decides_about_tiny_gradients(void **state) {
    (void)state;
    static const struct {
        const char *yaml;
        double eps;
        bool moves;
    } cases[] = {
        {"{preset: torch, ns_dtype: fp32, weight_decay: 0}", 1e-7, false},
        {"{preset: torch, ns_dtype: fp32, weight_decay: 0, norm_eps: 1e-30}", 1e-30, true}};
    for (size_t c = 0; c < 2; c++) {
        oracle_preset recipe = oracle_presets[2];
        recipe.weight_decay = 0.0;
        recipe.norm_eps = cases[c].eps;
        pair p;
        pair_open(&p, cases[c].yaml, &recipe, paired, 2, 78);
        pair_new_gradients(&p);
        for (size_t k = 0; k < p.count; k++)
            for (size_t i = 0; i < p.elements[k]; i++)
                p.grads[k][i] *= 1e-28F;
        muonshard_step_args args = MUONSHARD_STEP_ARGS_INIT;
        args.lr = 0.1;
        pair_step(&p, &args);
        if (cases[c].moves)
            pair_check(&p, cases[c].yaml, 1e-4, 1e-5, NULL);
        for (size_t k = 0; k < p.count; k++)
            assert_true(cases[c].moves ==
                        (memcmp(p.params[k], p.start[k], p.elements[k] * sizeof(float)) != 0));
        pair_close(&p);
    }
}

/* ---- AdamW recovers ---- */

enum { RECOVERY = 150 };

static void last_displacement(rig *r, outcome *out) {
    const float *w = r->params[0];
    float before = 0.0F;
    double largest = 0.0;
    for (int i = 0; i < RECOVERY; i++) {
        scaled_gradients(r, i ? 1.0 : out->number[1]);
        before = w[0];
        rig_step(r);
        largest = fmax(largest, fabs((double)w[0] - (double)before));
    }
    out->number[2] = largest;
    out->number[0] = (double)w[0] - (double)before;
}

/* v of a gradient of 1e30 is finite, the step is no larger for it, and once it has decayed the
 * parameter moves as if it had never been. */
static void test_adamw_recovers(void **state) {
    (void)state;
    const rig_tensor gain = {RIG_TENSOR("gain", ELEMENT, 1, 5)};
    const rig_case setup = {.tensors = &gain,
                            .count = 1,
                            .yaml = "{adam: {beta1: 0.5, beta2: 0.5, lr: 0.01, weight_decay: 0}}"};
    outcome ordinary = {.setup = {&setup}, .between = last_displacement, .number = {0.0, 1.0}};
    outcome extreme = {.setup = {&setup}, .between = last_displacement, .number = {0.0, 1e30}};
    assert_all_well(1, &ordinary, "ordinary gradients");
    assert_all_well(1, &extreme, "one of 1e30");
    assert_true(fabs(ordinary.number[0]) > 1e-4);
    if (!(fabs(extreme.number[0] - ordinary.number[0]) < 1e-6 && extreme.number[2] < 0.02))
        fail_msg("the last step is %g, without 1e30 it is %g; the largest is %g", extreme.number[0],
                 ordinary.number[0], extreme.number[2]);
}

/* ---- parameters beyond their dtype ---- */

/* Lion: lr down or up, then back. `number`: entries that are infinite after each step. */
static void there_and_back(rig *r, outcome *out) {
    const uint16_t *w = (const uint16_t *)(const void *)r->params[0];
    for (int step = 0; step < 2; step++) {
        for (size_t i = 0; i < r->elements[0]; i++)
            put(r, 0, i, step ? -100.0F : 1.0F);
        rig_step(r);
        for (size_t i = 0; i < r->elements[0]; i++) {
            out->number[step] += w[i] == 0xfc00;
            if (isnan(dtype_from_fp16(w[i])))
                fail_rig(r, "a parameter is NaN");
        }
    }
    state_array arrays[STATE_ARRAYS];
    state_of(r, arrays);
    for (int i = 0; i < STATE_ARRAYS; i++) {
        void *x = fetch(r, &arrays[i]);
        if (not_finite(x, arrays[i].count, arrays[i].dtype))
            fail_rig(r, "state is not finite");
        free(x);
    }
}

/* As IEEE and torch have it: what is beyond 65504 is infinite, which the next gradients show. A
 * master is not, and brings the parameter back; without one it stays. */
static void test_parameters_beyond_fp16_are_infinite(void **state) {
    (void)state;
    const rig_tensor bias = {RIG_TENSOR("bias", ELEMENT, 1, 17), .dtype = FP16, .grad_dtype = FP16};
    static const char *const yaml[] = {
        "{elementwise: lion, adam: {lr: 7e4, weight_decay: 0}}",
        "{elementwise: lion, adam: {lr: 7e4, weight_decay: 0}, rounding: stochastic}"};
    for (int c = 0; c < 2; c++) {
        const rig_case setup = {.tensors = &bias, .count = 1, .yaml = yaml[c]};
        outcome out = {.setup = {&setup}, .between = there_and_back};
        assert_all_well(1, &out, yaml[c]);
        assert_true(out.number[0] == 17 && out.number[1] == (c ? 17 : 0));
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_bad_gradient_changes_no_byte),
        cmocka_unit_test(test_sums_beyond_fp32_are_skipped),
        cmocka_unit_test(test_scales_beyond_fp32_are_skipped),
        cmocka_unit_test(test_momentum_stays_finite),
        cmocka_unit_test(test_extreme_gradients_lose_nothing),
        cmocka_unit_test(test_extreme_gradients_against_the_oracle),
        cmocka_unit_test(test_eps_decides_about_tiny_gradients),
        cmocka_unit_test(test_adamw_recovers),
        cmocka_unit_test(test_parameters_beyond_fp16_are_infinite),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
