/* The step at several ranks, which are threads here: the bits table, invariants and what one rank
 * can do to the others. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "comm_threads.h"
#include "step_rig.h"

#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

enum { MAX_RANKS = 4 };

typedef struct outcome {
    const rig_case *setup[MAX_RANKS];             /* [0] where a rank has none of its own */
    void (*between)(rig *r, struct outcome *out); /* in place of plain steps */
    uint64_t digest[MAX_RANKS];
    muonshard_status status[MAX_RANKS];
    char message[MAX_RANKS][1024];
    muonshard_step_result_info result[MAX_RANKS];
    float *kept[RIG_MAX_TENSORS]; /* rank 0's final parameters, own */
    bool keep;
    double number[MAX_RANKS];
} outcome;

static void run_case(muonshard_comm *comm, void *arg) {
    outcome *out = arg;
    const int rank = muonshard_comm_rank(comm);
    rig r;
    rig_open(&r, comm, out->setup[rank] ? out->setup[rank] : out->setup[0]);
    if (out->between) {
        out->between(&r, out);
    } else {
        for (int i = 0; i < r.setup->steps && r.status == MUONSHARD_OK; i++) {
            rig_gradients(&r);
            rig_step(&r);
        }
    }
    out->digest[rank] = rig_digest(&r);
    out->status[rank] = r.status;
    memcpy(out->message[rank], r.message, sizeof r.message);
    for (size_t i = 0; out->keep && rank == 0 && i < r.setup->count; i++) {
        out->kept[i] = malloc(r.elements[i] * sizeof(float));
        memcpy(out->kept[i], r.params[i], r.elements[i] * sizeof(float));
    }
    rig_close(&r);
}

/* The digest all ranks have in common. */
static uint64_t digest_at(int ranks, const rig_case *setup) {
    outcome out = {.setup = {setup}};
    assert_int_equal(threads_run(ranks, run_case, &out), MUONSHARD_OK);
    for (int r = 0; r < ranks; r++) {
        assert_int_equal(out.status[r], MUONSHARD_OK);
        assert_true(out.digest[r] == out.digest[0]);
    }
    return out.digest[0];
}

static rig_case zoo_case(const char *yaml) {
    return (rig_case){.tensors = rig_zoo, .count = rig_zoo_count, .yaml = yaml, .steps = 3};
}

/* ---- bits ---- */

static const char *const presets[] = {"preset: jordan", "preset: moonlight", "preset: nvidia",
                                      "preset: grouped_fp16", "preset: fan_ratio"};
enum { PRESETS = sizeof presets / sizeof presets[0] };

static void test_rerun_and_wave_size_change_no_bit(void **state) {
    (void)state;
    static const char *const cuts[] = {"", ", bucket_bytes: 1", ", batch_bytes: 1",
                                       ", bucket_bytes: 20000, batch_bytes: 5000"};
    for (int n = 1; n <= MAX_RANKS; n++)
        for (size_t k = 0; k < PRESETS; k++) {
            uint64_t first = 0;
            for (size_t c = 0; c < sizeof cuts / sizeof cuts[0]; c++) {
                char yaml[256];
                snprintf(yaml, sizeof yaml, "{%s, clip_norm: 3.0%s}", presets[k], cuts[c]);
                const rig_case setup = zoo_case(yaml);
                const uint64_t digest = digest_at(n, &setup);
                if (c == 0)
                    assert_true(digest == digest_at(n, &setup));
                first = c ? first : digest;
                assert_true(digest == first);
            }
        }
}

static void test_overlap_changes_no_bit(void **state) {
    (void)state;
    for (int n = 1; n <= MAX_RANKS; n++) {
        rig_case setup = zoo_case("{preset: moonlight, bucket_bytes: 5000, batch_bytes: 5000}");
        const uint64_t plain = digest_at(n, &setup);
        const rig_overlap overlaps[] = {RIG_READY_BACKWARD, RIG_READY_SHUFFLED, RIG_DEFER};
        for (size_t i = 0; i < 3; i++) {
            setup.overlap = overlaps[i];
            assert_true(digest_at(n, &setup) == plain);
        }
    }
}

/* Another matrix before the last moves the owner of the last by one rank, and the waves with it. */
static void test_ownership_changes_no_bit(void **state) {
    (void)state;
    enum { COUNT = 7 };
    rig_tensor plain[COUNT], moved[COUNT + 1];
    char names[COUNT][8];
    for (size_t i = 0; i < COUNT; i++) {
        snprintf(names[i], sizeof names[i], "w%zu", i);
        plain[i] = (rig_tensor){RIG_TENSOR(names[i], MUONSHARD_ROLE_MATRIX, 2, 12, 20)};
    }
    memcpy(moved, plain, sizeof plain);
    moved[COUNT] = moved[COUNT - 1];
    moved[COUNT - 1] = (rig_tensor){RIG_TENSOR("between", MUONSHARD_ROLE_MATRIX, 2, 20, 12)};
    const rig_case one = {.tensors = plain, .count = COUNT, .yaml = "", .steps = 3};
    const rig_case two = {.tensors = moved, .count = COUNT + 1, .yaml = "", .steps = 3};
    for (int n = 1; n <= MAX_RANKS; n++) {
        outcome a = {.setup = {&one}, .keep = true}, b = {.setup = {&two}, .keep = true};
        assert_int_equal(threads_run(n, run_case, &a), MUONSHARD_OK);
        assert_int_equal(threads_run(n, run_case, &b), MUONSHARD_OK);
        for (size_t i = 0; i < COUNT; i++)
            assert_memory_equal(a.kept[i], b.kept[i < COUNT - 1 ? i : COUNT],
                                12 * 20 * sizeof(float));
        for (size_t i = 0; i < COUNT + 1; i++) {
            free(a.kept[i]);
            free(b.kept[i]);
        }
    }
}

/* Where the mean is exact, N ranks are one rank: integers, and N a power of two. */
static void test_ranks_of_equal_gradients_are_one_rank(void **state) {
    (void)state;
    rig_case setup = zoo_case("{preset: jordan, clip_norm: 1.0}");
    setup.same_gradients = true;
    const uint64_t one = digest_at(1, &setup);
    assert_true(digest_at(2, &setup) == one);
    assert_true(digest_at(4, &setup) == one);
}

/* Rank 0 of one: the mean over `ranks` of what that many ranks would have, added in fp64. */
static void mean_gradients(rig *r, int ranks) {
    double *sum[RIG_MAX_TENSORS];
    for (size_t i = 0; i < r->setup->count; i++)
        sum[i] = calloc(r->elements[i], sizeof(double));
    for (int rank = 0; rank < ranks; rank++) {
        rig_gradients_of(r, rank);
        for (size_t i = 0; i < r->setup->count; i++)
            for (size_t k = 0; k < r->elements[i]; k++)
                sum[i][k] += (double)r->grads[i][k];
    }
    for (size_t i = 0; i < r->setup->count; i++) {
        for (size_t k = 0; k < r->elements[i]; k++)
            r->grads[i][k] = (float)(sum[i][k] / ranks);
        free(sum[i]);
    }
}

static void step_whole_batch(rig *r, outcome *out) {
    mean_gradients(r, (int)out->number[0]);
    rig_step(r);
}

static void test_a_split_batch_takes_the_same_step(void **state) {
    (void)state;
    for (int n = 2; n <= MAX_RANKS; n++)
        for (size_t k = 0; k < PRESETS; k++) {
            char yaml[128];
            snprintf(yaml, sizeof yaml,
                     "{%s, lr: 0.1, adam.lr: 0.1, adam.eps: 1e-3, clip_norm: 1.0}", presets[k]);
            rig_case setup = zoo_case(yaml);
            setup.steps = 1;
            outcome split = {.setup = {&setup}, .keep = true};
            outcome whole = {
                .setup = {&setup}, .keep = true, .between = step_whole_batch, .number = {n}};
            assert_int_equal(threads_run(n, run_case, &split), MUONSHARD_OK);
            assert_int_equal(threads_run(1, run_case, &whole), MUONSHARD_OK);
            outcome start = {.setup = {&setup}, .keep = true, .between = NULL};
            rig_case none = setup;
            none.steps = 0;
            start.setup[0] = &none;
            assert_int_equal(threads_run(1, run_case, &start), MUONSHARD_OK);
            for (size_t i = 0; i < setup.count; i++) {
                double difference = 0.0, length = 0.0;
                size_t elements = 1;
                for (int d = 0; d < setup.tensors[i].dims; d++)
                    elements *= (size_t)setup.tensors[i].shape[d];
                for (size_t e = 0; e < elements; e++) {
                    const double a = (double)split.kept[i][e], b = (double)whole.kept[i][e];
                    const double moved = b - (double)start.kept[i][e];
                    difference += (a - b) * (a - b);
                    length += moved * moved;
                }
                if (sqrt(difference) > 2e-5 * sqrt(length))
                    fail_msg("%s, %d ranks, %s: %g of the displacement", presets[k], n,
                             setup.tensors[i].name, sqrt(difference / length));
                free(split.kept[i]);
                free(whole.kept[i]);
                free(start.kept[i]);
            }
        }
}

/* reduce: none takes gradients as reduced: the same step as a mean of equal ones. */
static void test_reduced_by_the_caller(void **state) {
    (void)state;
    rig_case setup = zoo_case("{preset: jordan}");
    setup.same_gradients = true;
    const uint64_t one = digest_at(1, &setup);
    setup.yaml = "{preset: jordan, reduce: none, batch_bytes: 5000}";
    for (int n = 1; n <= MAX_RANKS; n++)
        assert_true(digest_at(n, &setup) == one);
}

/* ---- small and odd ---- */

static void test_few_tensors(void **state) {
    (void)state;
    const rig_tensor one[] = {{RIG_TENSOR("w", MUONSHARD_ROLE_MATRIX, 2, 5, 3)}};
    const rig_tensor flat[] = {{RIG_TENSOR("b", MUONSHARD_ROLE_ELEMENTWISE, 1, 11)}};
    const rig_case cases[] = {{.tensors = one, .count = 1, .yaml = "", .steps = 2},
                              {.tensors = flat, .count = 1, .yaml = "", .steps = 2},
                              {.tensors = one, .count = 0, .yaml = "", .steps = 2}};
    for (size_t c = 0; c < 3; c++)
        for (int n = 1; n <= MAX_RANKS; n++)
            digest_at(n, &cases[c]);
}

static void zero_gradients(rig *r, outcome *out) {
    (void)out;
    for (int i = 0; i < 3; i++)
        rig_step(r); /* gradients start as zeros */
}

static void test_zero_gradients_move_nothing(void **state) {
    (void)state;
    rig_case setup = zoo_case("{preset: jordan, weight_decay: 0, adam.weight_decay: 0}");
    rig_case none = setup;
    none.steps = 0;
    const uint64_t before = digest_at(1, &none);
    for (int n = 1; n <= MAX_RANKS; n++) {
        outcome out = {.setup = {&setup}, .between = zero_gradients};
        assert_int_equal(threads_run(n, run_case, &out), MUONSHARD_OK);
        for (int r = 0; r < n; r++) {
            assert_int_equal(out.status[r], MUONSHARD_OK);
            assert_true(out.digest[r] == before);
        }
    }
}

/* ---- one bad gradient ---- */

typedef struct poison {
    size_t tensor, element;
    float value;
    int rank;
} poison;
static poison bad; /* read by all threads, written between runs */

static void skip_one(rig *r, outcome *out) {
    const int rank = muonshard_comm_rank(r->comm);
    rig_gradients(r);
    rig_step(r);
    const uint64_t before = rig_digest(r);
    const int step = r->step;
    rig_gradients(r);
    if (rank == bad.rank)
        r->grads[bad.tensor][bad.element % r->elements[bad.tensor]] = bad.value;
    rig_step(r);
    out->result[rank] = (muonshard_step_result_info)MUONSHARD_STEP_RESULT_INIT;
    if (muonshard_step_result(r->optimizer, 0, 1, &out->result[rank]) || rig_digest(r) != before)
        out->number[rank] = 1.0;
    r->step = step; /* as if that step had never been */
    rig_gradients(r);
    rig_step(r);
}

static void test_non_finite_gradient_skips_everywhere(void **state) {
    (void)state;
    rig_case setup = zoo_case("{preset: moonlight, clip_norm: 1.0}");
    setup.steps = 2;
    for (int n = 1; n <= MAX_RANKS; n++) {
        const uint64_t clean = digest_at(n, &setup);
        for (size_t t = 0; t < setup.count; t++) {
            if (setup.tensors[t].role == MUONSHARD_ROLE_FROZEN)
                continue;
            bad = (poison){t, 17 + t,
                           t % 3 == 0   ? NAN
                           : t % 3 == 1 ? INFINITY
                                        : -INFINITY,
                           (int)t % n};
            outcome out = {.setup = {&setup}, .between = skip_one};
            assert_int_equal(threads_run(n, run_case, &out), MUONSHARD_OK);
            for (int r = 0; r < n; r++) {
                assert_int_equal(out.status[r], MUONSHARD_OK);
                assert_true(out.number[r] == 0.0); /* no byte moved in the skipped step */
                assert_true(out.result[r].skipped);
                assert_int_equal(out.result[r].step, 2);
                assert_int_equal(out.result[r].count, 1);
                assert_true(out.digest[r] == clean);
            }
        }
    }
}

/* ---- what one rank does wrong, all ranks hear of ---- */

/* All ranks: the same status; a text that holds `part`. */
static void assert_all_fail(outcome *out, int ranks, muonshard_status status, const char *part) {
    assert_int_equal(threads_run(ranks, run_case, out), MUONSHARD_OK);
    for (int r = 0; r < ranks; r++) {
        if (out->status[r] != status || !strstr(out->message[r], part))
            fail_msg("rank %d: %d '%s'; wanted %d '%s'", r, out->status[r], out->message[r], status,
                     part);
    }
}

static void test_different_configs(void **state) {
    (void)state;
    const rig_case same = zoo_case("{preset: jordan, lr: 0.5}");
    const rig_case other = zoo_case("{preset: jordan, lr: 0.25}");
    outcome out = {.setup = {&same, NULL, &other}};
    assert_all_fail(&out, 3, MUONSHARD_ERR_MISMATCH, "lr");
}

static void test_different_tensors(void **state) {
    (void)state;
    rig_tensor changed[RIG_MAX_TENSORS];
    memcpy(changed, rig_zoo, rig_zoo_count * sizeof *changed);
    changed[2].shape[1] = 97;
    const rig_case same = zoo_case("");
    rig_case other = zoo_case("");
    other.tensors = changed;
    outcome shape = {.setup = {&same, NULL, NULL, &other}};
    assert_all_fail(&shape, 4, MUONSHARD_ERR_MISMATCH, "wide");
    other.tensors = rig_zoo;
    other.count = rig_zoo_count - 1;
    outcome fewer = {.setup = {&same, &other}};
    assert_all_fail(&fewer, 2, MUONSHARD_ERR_MISMATCH, "bias");
    outcome more = {.setup = {&other, &same}};
    assert_all_fail(&more, 2, MUONSHARD_ERR_MISMATCH, "bias");
}

static void commit_other_params(muonshard_comm *comm, void *arg) {
    outcome *out = arg;
    const int rank = muonshard_comm_rank(comm);
    rig r;
    rig_prepare(&r, comm, out->setup[0]);
    if (rank == 1)
        r.params[3][5] += 1.0F;
    const muonshard_status status = muonshard_commit(r.optimizer, out->setup[0]->sync);
    out->status[rank] = status;
    snprintf(out->message[rank], sizeof out->message[rank], "%s",
             muonshard_last_error(r.optimizer));
    out->digest[rank] = rig_digest(&r);
    rig_close(&r);
}

static void test_sync_params(void **state) {
    (void)state;
    rig_case setup = zoo_case("");
    outcome out = {.setup = {&setup}};
    assert_int_equal(threads_run(3, commit_other_params, &out), MUONSHARD_OK);
    for (int r = 0; r < 3; r++) {
        assert_int_equal(out.status[r], MUONSHARD_ERR_MISMATCH);
        assert_non_null(strstr(out.message[r], "'tall' on rank 1"));
    }
    setup.sync = MUONSHARD_SYNC_BROADCAST;
    outcome broadcast = {.setup = {&setup}};
    assert_int_equal(threads_run(3, commit_other_params, &broadcast), MUONSHARD_OK);
    for (int r = 0; r < 3; r++) {
        assert_int_equal(broadcast.status[r], MUONSHARD_OK);
        assert_true(broadcast.digest[r] == out.digest[0]);
    }
    setup.sync = MUONSHARD_SYNC_NONE;
    outcome none = {.setup = {&setup}};
    assert_int_equal(threads_run(3, commit_other_params, &none), MUONSHARD_OK);
    assert_int_equal(none.status[1], MUONSHARD_OK);
    assert_true(none.digest[1] != none.digest[0]);
}

static void step_without_gradient(rig *r, outcome *out) {
    const int rank = muonshard_comm_rank(r->comm);
    rig_gradients(r);
    rig_step(r);
    const uint64_t before = rig_digest(r);
    rig_gradients(r);
    if (rank == 1)
        muonshard_set_grad(r->optimizer, 2, NULL);
    rig_step(r);
    out->number[rank] = rig_digest(r) != before;
    if (rank == 1)
        muonshard_set_grad(r->optimizer, 2, r->grads[2]);
    /* The handle is alive: the next step is a step. */
    if (muonshard_step(r->optimizer, NULL) != MUONSHARD_OK || rig_digest(r) == before)
        out->number[rank] = 2;
}

static void test_local_error_in_step_is_everybodys(void **state) {
    (void)state;
    const rig_case setup = zoo_case("");
    outcome out = {.setup = {&setup}, .between = step_without_gradient};
    assert_all_fail(&out, 3, MUONSHARD_ERR_ARGUMENT, "'wide' is NULL");
    for (int r = 0; r < 3; r++)
        assert_true(out.number[r] == 0.0);
}

static void step_with_bad_lr(rig *r, outcome *out) {
    (void)out;
    const int rank = muonshard_comm_rank(r->comm);
    muonshard_step_args args = MUONSHARD_STEP_ARGS_INIT;
    if (rank == 2)
        args.lr = -1.0;
    r->status = muonshard_step(r->optimizer, &args);
    snprintf(r->message, sizeof r->message, "%s", muonshard_last_error(r->optimizer));
}

static void test_bad_argument_on_one_rank(void **state) {
    (void)state;
    const rig_case setup = zoo_case("");
    outcome out = {.setup = {&setup}, .between = step_with_bad_lr};
    assert_all_fail(&out, 3, MUONSHARD_ERR_ARGUMENT, "lr is -1");
}

static void drift(rig *r, outcome *out) {
    (void)out;
    rig_gradients(r);
    rig_step(r);
    if (muonshard_comm_rank(r->comm) == 1)
        r->params[4][0] += 1e-3F;
    rig_step(r);
}

static void test_replicas_that_drift_are_found(void **state) {
    (void)state;
    const rig_case setup = zoo_case("check_replicas: 2");
    outcome out = {.setup = {&setup}, .between = drift};
    assert_all_fail(&out, 2, MUONSHARD_ERR_MISMATCH, "'prime' on rank 1");
}

/* ---- null gradients ---- */

static void some_have_none(rig *r, outcome *out) {
    const int rank = muonshard_comm_rank(r->comm);
    for (int i = 0; i < 3; i++) {
        rig_gradients(r);
        for (size_t t = 0; t < r->setup->count; t++) {
            const bool here = rank != (int)out->number[0] && out->number[0] >= 0.0;
            if (r->setup->tensors[t].null_grad != MUONSHARD_NULL_GRAD_ERROR) {
                if (!here && out->number[1] == 1.0)
                    memset(r->grads[t], 0, r->elements[t] * sizeof(float));
                muonshard_set_grad(r->optimizer, (int)t,
                                   here || out->number[1] == 1.0 ? r->grads[t] : NULL);
            }
        }
        rig_step(r);
    }
}

/* number[0]: the rank without (-1: all); number[1]: 1 for zeros in the place of NULL. */
static uint64_t digest_with_absent(int ranks, const rig_case *setup, int without, bool zeros) {
    outcome out = {.setup = {setup}, .between = some_have_none, .number = {without, zeros}};
    assert_int_equal(threads_run(ranks, run_case, &out), MUONSHARD_OK);
    for (int r = 0; r < ranks; r++) {
        assert_int_equal(out.status[r], MUONSHARD_OK);
        assert_true(out.digest[r] == out.digest[0]);
    }
    return out.digest[0];
}

static void test_null_on_some_ranks_counts_as_zero(void **state) {
    (void)state;
    rig_tensor tensors[RIG_MAX_TENSORS];
    memcpy(tensors, rig_zoo, rig_zoo_count * sizeof *tensors);
    for (size_t i = 0; i < rig_zoo_count; i += 2)
        tensors[i].null_grad = i % 4 ? MUONSHARD_NULL_GRAD_SKIP : MUONSHARD_NULL_GRAD_ZERO;
    rig_case setup = zoo_case("{preset: jordan, weight_decay: 0.1}");
    setup.tensors = tensors;
    for (int n = 2; n <= MAX_RANKS; n++)
        assert_true(digest_with_absent(n, &setup, 1, false) ==
                    digest_with_absent(n, &setup, 1, true));
    /* NULL everywhere is not the same: what may be skipped does not even decay. */
    assert_true(digest_with_absent(2, &setup, -1, false) !=
                digest_with_absent(2, &setup, -1, true));
}

/* ---- groups of groups ---- */

/* Each rank a group of its own, agreeing with the others. */
static void run_groups(muonshard_comm *world, void *arg) {
    outcome *out = arg;
    const int rank = muonshard_comm_rank(world);
    float w[6] = {1, 2, 3, 4, 5, 6}, g[6] = {0};
    for (int i = 0; i < 6; i++)
        g[i] = (float)(rank + 1);
    muonshard_comm *self = NULL;
    muonshard_config *config = NULL;
    muonshard_optimizer *optimizer = NULL;
    muonshard_options options = MUONSHARD_OPTIONS_INIT;
    options.agree_comm = world;
    muonshard_tensor_desc d = MUONSHARD_TENSOR_DESC_INIT;
    d.name = "w";
    d.role = MUONSHARD_ROLE_MATRIX;
    d.dims = 2;
    d.shape[0] = 2;
    d.shape[1] = 3;
    d.param = w;
    d.grad = g;
    muonshard_status status = muonshard_comm_create_self(NULL, &self);
    status = status ? status : muonshard_config_create(&config);
    status = status ? status : muonshard_create(self, config, &options, &optimizer);
    status = status ? status : muonshard_add_tensor(optimizer, &d, NULL);
    status = status ? status : muonshard_commit(optimizer, MUONSHARD_SYNC_CHECK);
    status = status ? status : muonshard_step(optimizer, NULL);
    out->result[rank] = (muonshard_step_result_info)MUONSHARD_STEP_RESULT_INIT;
    status = status ? status : muonshard_step_result(optimizer, 0, 1, &out->result[rank]);
    out->number[rank] = out->result[rank].grad_norm;
    const float before = w[0];
    if (rank == 1)
        g[3] = NAN;
    status = status ? status : muonshard_step(optimizer, NULL);
    status = status ? status : muonshard_step_result(optimizer, 0, 1, &out->result[rank]);
    out->digest[rank] = w[0] == before;
    out->status[rank] = status;
    muonshard_destroy(optimizer);
    muonshard_config_destroy(config);
    muonshard_comm_destroy(self);
}

static void test_groups_agree_on_norm_and_skip(void **state) {
    (void)state;
    outcome out = {.keep = false};
    assert_int_equal(threads_run(3, run_groups, &out), MUONSHARD_OK);
    for (int r = 0; r < 3; r++) {
        assert_int_equal(out.status[r], MUONSHARD_OK);
        assert_true(fabs(out.number[r] - sqrt(6.0 * (1 + 4 + 9))) < 1e-12);
        assert_true(out.result[r].skipped);
        assert_int_equal(out.result[r].count, 1);
        assert_int_equal(out.digest[r], 1);
    }
}

/* ---- no wait is endless ---- */

static void one_leaves(rig *r, outcome *out) {
    const int rank = muonshard_comm_rank(r->comm);
    rig_gradients(r);
    rig_step(r);
    if (rank == 1)
        return;
    rig_step(r);
    out->number[rank] = muonshard_step(r->optimizer, NULL); /* dead, at once */
}

static void test_a_rank_that_leaves_is_missed(void **state) {
    (void)state;
    const rig_case setup = zoo_case("{timeout: 0.3}");
    outcome out = {.setup = {&setup}, .between = one_leaves};
    assert_int_equal(threads_run(2, run_case, &out), MUONSHARD_OK);
    assert_int_equal(out.status[1], MUONSHARD_OK);
    assert_int_equal(out.status[0], MUONSHARD_ERR_TIMEOUT);
    assert_non_null(strstr(out.message[0], "rank 0 of 2"));
    assert_non_null(strstr(out.message[0], "step 2, reduce-scatter bucket 0"));
    assert_true(out.number[0] == MUONSHARD_ERR_TIMEOUT);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rerun_and_wave_size_change_no_bit),
        cmocka_unit_test(test_overlap_changes_no_bit),
        cmocka_unit_test(test_ownership_changes_no_bit),
        cmocka_unit_test(test_ranks_of_equal_gradients_are_one_rank),
        cmocka_unit_test(test_a_split_batch_takes_the_same_step),
        cmocka_unit_test(test_reduced_by_the_caller),
        cmocka_unit_test(test_few_tensors),
        cmocka_unit_test(test_zero_gradients_move_nothing),
        cmocka_unit_test(test_non_finite_gradient_skips_everywhere),
        cmocka_unit_test(test_different_configs),
        cmocka_unit_test(test_different_tensors),
        cmocka_unit_test(test_sync_params),
        cmocka_unit_test(test_local_error_in_step_is_everybodys),
        cmocka_unit_test(test_bad_argument_on_one_rank),
        cmocka_unit_test(test_replicas_that_drift_are_found),
        cmocka_unit_test(test_null_on_some_ranks_counts_as_zero),
        cmocka_unit_test(test_groups_agree_on_norm_and_skip),
        cmocka_unit_test(test_a_rank_that_leaves_is_missed),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
