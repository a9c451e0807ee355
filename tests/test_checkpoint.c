/* What was saved goes on as if nothing had been: to the bit on as many ranks and, where means are
 * exact, on any other number, with any ownership and cuts. Ranks are threads. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include "checkpoint_fixture.h"
#include "optim/state.h"

#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

enum { BEFORE = 2, AFTER = 2 };

static const char *const rules[] = {
    "preset: jordan, clip_norm: 3.0",
    "preset: speedrun, momentum_schedule: '0:0.5 10:0.9', lr_schedule: '0:1 10:0.2'",
    "preset: optax, variance: normuon, momentum_dtype: bf16",
    "preset: dion_repo, elementwise: lion",
};
enum { RULES = sizeof rules / sizeof rules[0] };

static const char *const ways[] = {"", ", ownership: balanced, bucket_bytes: 1, batch_bytes: 1",
                                   ", gather: params, bucket_bytes: 20000"};
enum { WAYS = sizeof ways / sizeof ways[0] };

static const char *const masters[] = {"", ", gather: updates, master: replicated",
                                      ", rounding: stochastic, seed: 7"};

/* The zoo, of one dtype. */
static rig_case zoo_of(muonshard_dtype dtype, rig_tensor tensors[RIG_MAX_TENSORS],
                       const char *yaml) {
    memcpy(tensors, rig_zoo, rig_zoo_count * sizeof *tensors);
    for (size_t i = 0; i < rig_zoo_count; i++)
        tensors[i].dtype = tensors[i].grad_dtype = dtype;
    return (rig_case){.tensors = tensors, .count = rig_zoo_count, .yaml = yaml};
}

/* Saves after BEFORE steps; the digest AFTER steps later. */
static uint64_t save_at(int ranks, const rig_case *setup, bool defer) {
    journey j = JOURNEY_INIT;
    checkpoint_empty();
    j.before = BEFORE;
    j.after = AFTER;
    j.save = true;
    j.save_args.defer = defer;
    j.save_args.user = "{\"at\": \"the end of line 7 – ü\"}";
    const uint64_t digest = travel(&j, ranks, setup);
    if (j.saved[0])
        fail_msg("save: %s", j.message[0]);
    return digest;
}

static uint64_t continue_at(int ranks, const rig_case *setup) {
    journey j = JOURNEY_INIT;
    j.load = true;
    j.after = AFTER;
    const uint64_t digest = travel(&j, ranks, setup);
    if (j.loaded[0])
        fail_msg("load: %s", j.message[0]);
    assert_int_equal(j.result[0].found, 1);
    assert_int_equal(j.result[0].step, BEFORE);
    assert_int_equal(j.result[0].count, BEFORE);
    assert_string_equal(j.user, "{\"at\": \"the end of line 7 – ü\"}");
    assert_string_equal(j.path, in_directory("step-00000002"));
    return digest;
}

static void same_ranks(void **state) {
    (void)state;
    rig_tensor tensors[RIG_MAX_TENSORS];
    char yaml[512];
    for (int dtype = 0; dtype < 3; dtype++)
        for (size_t k = 0; k < RULES; k++)
            for (int n = 1; n <= MAX_RANKS; n++) {
                const char *how = masters[dtype ? (k + (size_t)n) % 3 : 0];
                if (row_left_out(k + (size_t)n + (size_t)dtype, 5))
                    continue;
                snprintf(yaml, sizeof yaml, "{%s%s}", rules[k], how);
                const rig_case setup = zoo_of((muonshard_dtype)dtype, tensors, yaml);
                const uint64_t expected = save_at(n, &setup, n % 2);
                if (continue_at(n, &setup) != expected)
                    fail_msg("dtype %d, %s at %d ranks: other bits", dtype, yaml, n);
            }
}

static void other_ranks_and_plans(void **state) {
    (void)state;
    rig_tensor tensors[RIG_MAX_TENSORS];
    char yaml[512], other[512];
    size_t tried = 0;
    for (int dtype = 0; dtype < 2; dtype++)
        for (size_t k = 0; k < RULES; k++)
            for (int n = 1; n <= MAX_RANKS; n *= 2)
                for (int to = 1; to <= MAX_RANKS; to *= 2) {
                    const size_t way = tried++ % WAYS;
                    if (row_left_out(tried, 5))
                        continue;
                    snprintf(yaml, sizeof yaml, "{%s}", rules[k]);
                    snprintf(other, sizeof other, "{%s%s}", rules[k], ways[way]);
                    rig_case setup = zoo_of((muonshard_dtype)dtype, tensors, yaml);
                    setup.same_gradients = true;
                    const uint64_t expected = save_at(n, &setup, tried % 2);
                    setup.yaml = other;
                    if (continue_at(to, &setup) != expected)
                        fail_msg("dtype %d, %s at %d ranks, then %s at %d: other bits", dtype, yaml,
                                 n, other, to);
                }
}

/* Between any other numbers there is rounding: 3 to 4 and back, gradients being what they are. */
static void to_rounding(void **state) {
    (void)state;
    rig_tensor tensors[RIG_MAX_TENSORS];
    for (int n = 1; n <= MAX_RANKS; n++) {
        rig_case setup = zoo_of(MUONSHARD_FP32, tensors, "{preset: torch, ns_dtype: fp32}");
        setup.same_gradients = true;
        save_at(n, &setup, false);
        journey j = JOURNEY_INIT;
        j.load = true;
        travel(&j, MAX_RANKS + 1 - n, &setup);
        assert_int_equal(j.loaded[0], MUONSHARD_OK);
        journey again = JOURNEY_INIT;
        again.load = true;
        travel(&again, n, &setup);
        assert_true(j.at_end[0] == again.at_end[0]); /* the same parameters before any step */
    }
}

/* What a deferred save writes is the state when it was called. */
static void deferred_state(void **state) {
    (void)state;
    rig_tensor tensors[RIG_MAX_TENSORS];
    const rig_case setup = zoo_of(MUONSHARD_FP32, tensors, "{preset: torch}");
    for (int wait = 0; wait < 2; wait++) {
        checkpoint_empty();
        journey j = JOURNEY_INIT;
        j.before = 1;
        j.save = true;
        j.save_args.defer = 1;
        j.after = 4;
        j.wait_after = 3 * wait;
        travel(&j, 3, &setup);
        assert_int_equal(j.saved[0], MUONSHARD_OK);
        journey k = JOURNEY_INIT;
        k.load = true;
        travel(&k, 3, &setup);
        assert_int_equal(k.result[0].step, 1);
        assert_true(k.at_end[0] == j.at_save[0] && k.at_end[0] != j.at_end[0]);
    }
}

/* ---- memory ---- */

enum { MEMORY_STEPS = 2 };

typedef struct memory_run {
    void *images[MAX_RANKS];
    size_t bytes[MAX_RANKS];
    int ranks;
    bool own; /* is given its own image only, and has the parameters */
    muonshard_status status[MAX_RANKS];
    char message[MAX_RANKS][1024];
    float *params[RIG_MAX_TENSORS]; /* rank 0's, at the save; own */
} memory_run;
static memory_run *memory;

static void save_to_memory(rig *r, outcome *out) {
    (void)out;
    const int rank = muonshard_comm_rank(r->comm);
    memory_run *m = memory;
    size_t before = 0;
    muonshard_state_size(r->optimizer, &before);
    for (int i = 0; i < MEMORY_STEPS; i++) {
        rig_gradients(r);
        rig_step(r);
    }
    muonshard_state_size(r->optimizer, &m->bytes[rank]);
    m->images[rank] = malloc(m->bytes[rank]);
    m->status[rank] = before != m->bytes[rank]
                          ? MUONSHARD_ERR_INTERNAL
                          : muonshard_save_memory(r->optimizer, m->images[rank], m->bytes[rank]);
    if (muonshard_save_memory(r->optimizer, m->images[rank], m->bytes[rank] - 1) !=
        MUONSHARD_ERR_ARGUMENT)
        m->status[rank] = MUONSHARD_ERR_INTERNAL;
    for (size_t i = 0; rank == 0 && i < r->setup->count; i++) {
        m->params[i] = malloc(rig_bytes(r, i));
        memcpy(m->params[i], r->params[i], rig_bytes(r, i));
    }
    for (int i = 0; i < AFTER; i++) {
        rig_gradients(r);
        rig_step(r);
    }
}

static void load_from_memory(rig *r, outcome *out) {
    (void)out;
    const int rank = muonshard_comm_rank(r->comm);
    memory_run *m = memory;
    const void *own[1] = {m->images[rank % m->ranks]};
    muonshard_load_args args = MUONSHARD_LOAD_ARGS_INIT;
    muonshard_load_result result = MUONSHARD_LOAD_RESULT_INIT;
    args.keep_params = m->own;
    for (size_t i = 0; m->own && i < r->setup->count; i++)
        memcpy(r->params[i], m->params[i], rig_bytes(r, i));
    rig_push(r);
    m->status[rank] = m->own ? muonshard_load_memory(r->optimizer, own, &m->bytes[rank % m->ranks],
                                                     1, &args, &result)
                             : muonshard_load_memory(r->optimizer, (const void *const *)m->images,
                                                     m->bytes, (size_t)m->ranks, &args, &result);
    snprintf(m->message[rank], sizeof m->message[rank], "%s", muonshard_last_error(r->optimizer));
    r->step = (int)result.step;
    for (int i = 0; m->status[rank] == MUONSHARD_OK && i < AFTER; i++) {
        rig_gradients(r);
        rig_step(r);
    }
}

static uint64_t memory_at(int ranks, const rig_case *setup, void (*what)(rig *r, outcome *out),
                          muonshard_status expected) {
    outcome out = {.setup = {setup}, .between = what};
    assert_int_equal(threads_run(ranks, ranks_run, &out), MUONSHARD_OK);
    for (int r = 0; r < ranks; r++) {
        if (memory->status[r] != expected)
            fail_msg("rank %d: status %d: %s", r, memory->status[r], memory->message[r]);
        assert_int_equal(out.status[r], MUONSHARD_OK);
    }
    return out.digest[0];
}

static void to_memory(void **state) {
    (void)state;
    rig_tensor tensors[RIG_MAX_TENSORS];
    for (int n = 1; n <= MAX_RANKS; n *= 2)
        for (int dtype = 0; dtype < 2; dtype++) {
            memory_run m = {.ranks = n};
            memory = &m;
            rig_case setup =
                zoo_of((muonshard_dtype)dtype, tensors, "{preset: torch, variance: normuon}");
            setup.same_gradients = true;
            const uint64_t expected = memory_at(n, &setup, save_to_memory, MUONSHARD_OK);
            for (int to = 1; to <= MAX_RANKS; to *= 2)
                assert_true(memory_at(to, &setup, load_from_memory, MUONSHARD_OK) == expected);
            m.own = true;
            assert_true(memory_at(n, &setup, load_from_memory, MUONSHARD_OK) == expected);
            if (n == 2) { /* another rank count needs what others own */
                memory_at(4, &setup, load_from_memory, MUONSHARD_ERR_ARGUMENT);
                assert_non_null(strstr(m.message[0], "is not there"));
            }
            for (int r = 0; r < n; r++)
                free(m.images[r]);
            for (size_t i = 0; i < setup.count; i++)
                free(m.params[i]);
        }
}

/* ---- what `plan` says of it ---- */

typedef struct planned {
    size_t planned[MAX_RANKS], there[MAX_RANKS], image[MAX_RANKS];
} planned;
static planned *plans;

static void add_up(rig *r, outcome *out) {
    (void)out;
    const muonshard_optimizer *o = r->optimizer;
    const int rank = muonshard_comm_rank(r->comm);
    size_t each[MAX_RANKS] = {0};
    state_list owned;
    state_bytes(&o->registry, &o->plan, o->settings, each);
    plans->planned[rank] = each[rank];
    if (state_owned(o, &owned, NULL) != MUONSHARD_OK)
        return;
    for (size_t i = 0; i < owned.count; i++)
        plans->there[rank] += owned.slices[i].count * dtype_size(owned.slices[i].dtype);
    state_free(&owned);
    muonshard_state_size(o, &plans->image[rank]);
}

static void planned_bytes(void **state) {
    (void)state;
    rig_tensor tensors[RIG_MAX_TENSORS];
    for (int dtype = 0; dtype < 3; dtype++)
        for (size_t k = 0; k < RULES; k++)
            for (int n = 1; n <= MAX_RANKS; n++) {
                planned p = {.planned = {0}};
                char yaml[512];
                plans = &p;
                snprintf(yaml, sizeof yaml, "{%s%s}", rules[k], dtype ? masters[k % 3] : "");
                const rig_case setup = zoo_of((muonshard_dtype)dtype, tensors, yaml);
                outcome out = {.setup = {&setup}, .between = add_up};
                assert_int_equal(threads_run(n, ranks_run, &out), MUONSHARD_OK);
                for (int r = 0; r < n; r++) {
                    assert_int_equal(out.status[r], MUONSHARD_OK);
                    assert_int_equal(p.planned[r], p.there[r]);
                    assert_true(p.image[r] > p.there[r] && p.image[r] < p.there[r] + 20000);
                }
            }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(same_ranks),  cmocka_unit_test(other_ranks_and_plans),
        cmocka_unit_test(to_rounding), cmocka_unit_test(deferred_state),
        cmocka_unit_test(to_memory),   cmocka_unit_test(planned_bytes),
    };
    cmocka_set_test_filter(getenv("MUONSHARD_TEST_ONLY"));
    return cmocka_run_group_tests_name("checkpoint", tests, checkpoint_setup, checkpoint_teardown);
}
