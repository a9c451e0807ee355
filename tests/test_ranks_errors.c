/* What one of several ranks does wrong, or doesn't do: all ranks hear of it, and none waits for
 * ever. */
#include <stdio.h>
#include <string.h>
#include "ranks_fixture.h"

#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

/* ---- what one rank does wrong, all ranks hear of ---- */

/* All ranks: the same status; a text that holds `part` or, on a device, where only the rank that
 * `failed` has it, names that rank. */
static void assert_all_fail_by(int failed, outcome *out, int ranks, muonshard_status status,
                               const char *part) {
    char by[32];
    snprintf(by, sizeof by, "failed on rank %d", failed);
    assert_int_equal(threads_run(ranks, ranks_run, out), MUONSHARD_OK);
    for (int r = 0; r < ranks; r++) {
        const bool told = failed >= 0 && !images_on_host() && r != failed;
        if (out->status[r] != status || !strstr(out->message[r], told ? by : part))
            fail_msg("rank %d: %d '%s'; wanted %d '%s'", r, out->status[r], out->message[r], status,
                     part);
    }
}

static void assert_all_fail(outcome *out, int ranks, muonshard_status status, const char *part) {
    assert_all_fail_by(-1, out, ranks, status, part);
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
    rig_push(&r);
    const muonshard_status status = muonshard_commit(r.optimizer, out->setup[0]->sync);
    out->status[rank] = status;
    snprintf(out->message[rank], sizeof out->message[rank], "%s",
             muonshard_last_error(r.optimizer));
    rig_pull(&r);
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
    rig_pull(r);
    out->number[rank] = rig_digest(r) != before;
    if (rank == 1)
        muonshard_set_grad(r->optimizer, 2, rig_grad(r, 2));
    /* The handle is alive: the next step is a step. */
    if (rig_call(r, NULL) != MUONSHARD_OK || rig_digest(r) == before)
        out->number[rank] = 2;
}

static void test_local_error_in_step_is_everybodys(void **state) {
    (void)state;
    const rig_case setup = zoo_case("");
    outcome out = {.setup = {&setup}, .between = step_without_gradient};
    assert_all_fail_by(1, &out, 3, MUONSHARD_ERR_ARGUMENT, "'wide' is NULL");
    for (int r = 0; r < 3; r++)
        assert_true(out.number[r] == 0.0);
}

static void step_with_bad_lr(rig *r, outcome *out) {
    (void)out;
    const int rank = muonshard_comm_rank(r->comm);
    muonshard_step_args args = MUONSHARD_STEP_ARGS_INIT;
    if (rank == 2)
        args.lr = -1.0;
    r->status = rig_call(r, &args);
    snprintf(r->message, sizeof r->message, "%s", muonshard_last_error(r->optimizer));
}

static void test_bad_argument_on_one_rank(void **state) {
    (void)state;
    const rig_case setup = zoo_case("");
    outcome out = {.setup = {&setup}, .between = step_with_bad_lr};
    assert_all_fail_by(2, &out, 3, MUONSHARD_ERR_ARGUMENT, "lr is -1");
}

static void step_with_other_lr(rig *r, outcome *out) {
    const int rank = muonshard_comm_rank(r->comm);
    rig_gradients(r);
    const uint64_t before = rig_digest(r);
    muonshard_step_args args = MUONSHARD_STEP_ARGS_INIT;
    args.lr = rank == 1 ? 0.02 : 0.01;
    r->status = rig_call(r, &args);
    snprintf(r->message, sizeof r->message, "%s", muonshard_last_error(r->optimizer));
    out->number[rank] = rig_digest(r) != before;
    if (rig_call(r, NULL) != MUONSHARD_OK || rig_digest(r) == before)
        out->number[rank] = 2; /* the handle is alive */
}

/* Replicas would part: nobody takes the step. */
static void test_other_values_on_one_rank(void **state) {
    (void)state;
    const rig_case setup = zoo_case("");
    outcome out = {.setup = {&setup}, .between = step_with_other_lr};
    assert_all_fail(&out, 3, MUONSHARD_ERR_MISMATCH, "differ from rank 0's");
    for (int r = 0; r < 3; r++)
        assert_true(out.number[r] == 0.0);
}

static void drift(rig *r, outcome *out) {
    (void)out;
    rig_gradients(r);
    rig_step(r);
    if (muonshard_comm_rank(r->comm) == 1)
        r->params[4][0] += 1e-3F;
    rig_push(r);
    rig_step(r);
}

static void test_replicas_that_drift_are_found(void **state) {
    (void)state;
    const rig_case setup = zoo_case("check_replicas: 2");
    outcome out = {.setup = {&setup}, .between = drift};
    assert_all_fail(&out, 2, MUONSHARD_ERR_MISMATCH, "'prime' differ between rank 0 and rank 1");
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
    assert_int_equal(threads_run(2, ranks_run, &out), MUONSHARD_OK);
    assert_int_equal(out.status[1], MUONSHARD_OK);
    assert_int_equal(out.status[0], MUONSHARD_ERR_TIMEOUT);
    assert_non_null(strstr(out.message[0], "rank 0 of 2"));
    assert_non_null(strstr(out.message[0], "step 2, reduce-scatter bucket 0"));
    assert_true(out.number[0] == MUONSHARD_ERR_TIMEOUT);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_different_configs),
        cmocka_unit_test(test_different_tensors),
        cmocka_unit_test(test_sync_params),
        cmocka_unit_test(test_local_error_in_step_is_everybodys),
        cmocka_unit_test(test_bad_argument_on_one_rank),
        cmocka_unit_test(test_other_values_on_one_rank),
        cmocka_unit_test(test_replicas_that_drift_are_found),
        cmocka_unit_test(test_a_rank_that_leaves_is_missed),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
