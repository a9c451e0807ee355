/* The step at several ranks, which are threads here: the bits table and the invariants of a step.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "ranks_fixture.h"

#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

/* ---- bits ---- */

static const char *const presets[] = {
    "preset: jordan",       "preset: moonlight", "preset: torch",     "preset: nvidia",
    "preset: grouped_fp16", "preset: fan_ratio", "preset: dion_repo", "preset: gram",
    "preset: speedrun",     "preset: optax"};
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
        assert_int_equal(threads_run(n, ranks_run, &a), MUONSHARD_OK);
        assert_int_equal(threads_run(n, ranks_run, &b), MUONSHARD_OK);
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
                     "{%s, ns_dtype: fp32, lr: 0.1, adam.lr: 0.1, adam.eps: 1e-3, clip_norm: 1.0}",
                     presets[k]);
            rig_case setup = zoo_case(yaml);
            setup.steps = 1;
            outcome split = {.setup = {&setup}, .keep = true};
            outcome whole = {
                .setup = {&setup}, .keep = true, .between = step_whole_batch, .number = {n}};
            assert_int_equal(threads_run(n, ranks_run, &split), MUONSHARD_OK);
            assert_int_equal(threads_run(1, ranks_run, &whole), MUONSHARD_OK);
            outcome start = {.setup = {&setup}, .keep = true, .between = NULL};
            rig_case none = setup;
            none.steps = 0;
            start.setup[0] = &none;
            assert_int_equal(threads_run(1, ranks_run, &start), MUONSHARD_OK);
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
                if (sqrt(difference) > 4e-5 * sqrt(length))
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
        assert_int_equal(threads_run(n, ranks_run, &out), MUONSHARD_OK);
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
            assert_int_equal(threads_run(n, ranks_run, &out), MUONSHARD_OK);
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
                                   here || out->number[1] == 1.0 ? rig_grad(r, t) : NULL);
            }
        }
        rig_step(r);
    }
}

/* number[0]: the rank without (-1: all); number[1]: 1 for zeros in the place of NULL. */
static uint64_t digest_with_absent(int ranks, const rig_case *setup, int without, bool zeros) {
    outcome out = {.setup = {setup}, .between = some_have_none, .number = {without, zeros}};
    assert_int_equal(threads_run(ranks, ranks_run, &out), MUONSHARD_OK);
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
        cmocka_unit_test(test_null_on_some_ranks_counts_as_zero),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
