/* What goes wrong on a device, on the fake one: every call of it can fail, ranks stay away or
 * differ, something can't be had; all are told so, and nothing is left behind. Ranks are threads;
 * tensors go over the fake NCCL. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "device_fixture.h"

#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

/* ---- of one rank ---- */

static void one_fails(rig *r, outcome *out) {
    for (int s = 1; s <= 4 && r->status == MUONSHARD_OK; s++) {
        muonshard_step_args args = MUONSHARD_STEP_ARGS_INIT;
        muonshard_step_result_info result = MUONSHARD_STEP_RESULT_INIT;
        const bool bad = s == 3 && r->comm->rank == 1;
        rig_gradients(r);
        for (size_t t = 0; t < FEW; t++)
            images_upload(&r->images, r->grads[t]);
        args.lr = bad ? -1.0 : args.lr;
        muonshard_status status = muonshard_step(r->optimizer, &args);
        if (status != (bad ? MUONSHARD_ERR_ARGUMENT : MUONSHARD_OK))
            r->status = MUONSHARD_ERR_INTERNAL;
        status = muonshard_step_result(r->optimizer, s, 1, &result);
        if (s == 3 && (status != MUONSHARD_ERR_ARGUMENT ||
                       !strstr(muonshard_last_error(r->optimizer), "failed on rank 1")))
            r->status = MUONSHARD_ERR_INTERNAL;
        if (s != 3 && (status != MUONSHARD_OK || result.count != (s == 4 ? 3 : s)))
            r->status = MUONSHARD_ERR_INTERNAL;
    }
    for (size_t t = 0; t < FEW; t++)
        images_download(&r->images, r->params[t]);
    out->number[r->comm->rank] = 1.0;
}

static void test_an_error_of_one_rank_is_in_everybodys_result(void **state) {
    (void)state;
    const rig_case setup = few_case("");
    for (int n = 2; n <= 4; n++) {
        outcome out = {.setup = {&setup}, .between = one_fails};
        assert_int_equal(threads_run(n, ranks_run, &out), MUONSHARD_OK);
        for (int r = 0; r < n; r++) {
            assert_int_equal(out.status[r], MUONSHARD_OK);
            assert_true(out.digest[r] == out.digest[0]);
        }
    }
}

static void skipped(rig *r, outcome *out) {
    uint64_t before = 0;
    for (int s = 1; s <= 5 && r->status == MUONSHARD_OK; s++) {
        rig_gradients(r);
        if (s == 3 && r->comm->rank == 0)
            r->grads[1][7] = NAN;
        if (s == 4 && r->comm->rank == 0)
            r->grads[0][3] = INFINITY;
        rig_step(r);
        before = s == 2 ? rig_digest(r) : before;
        if ((s == 3 || s == 4) && rig_digest(r) != before)
            r->status = MUONSHARD_ERR_INTERNAL;
    }
    muonshard_stats_info stats = MUONSHARD_STATS_INIT;
    muonshard_stats(r->optimizer, &stats);
    out->number[r->comm->rank] = (double)stats.skipped;
}

static void test_what_is_not_finite_changes_no_byte(void **state) {
    (void)state;
    const rig_case setup = few_case("");
    for (int n = 1; n <= 3; n++) {
        outcome out = {.setup = {&setup}, .between = skipped};
        assert_int_equal(threads_run(n, ranks_run, &out), MUONSHARD_OK);
        for (int r = 0; r < n; r++) {
            assert_int_equal(out.status[r], MUONSHARD_OK);
            assert_true(out.number[r] == 2.0);
        }
    }
}

/* Rank 1 stays away from the third step: the others' device waits for it for ever, they don't. */
static void stay_away(rig *r, outcome *out) {
    for (int s = 1; s <= 4 && r->status == MUONSHARD_OK; s++) {
        if (s == 3 && r->comm->rank == 1)
            break;
        rig_gradients(r);
        rig_step(r);
    }
    snprintf(out->message[r->comm->rank], sizeof out->message[0], "%s", r->message);
}

static void test_a_rank_that_stays_away_ends_by_the_deadline(void **state) {
    (void)state;
    const rig_case setup = few_case("{timeout: 0.5, first_timeout: 5}");
    outcome out = {.setup = {&setup}, .between = stay_away};
    assert_int_equal(threads_run(2, ranks_run, &out), MUONSHARD_OK);
    assert_int_equal(out.status[0], MUONSHARD_ERR_TIMEOUT);
    assert_non_null(strstr(out.message[0], "step 3, reduce-scatter bucket 0"));
    assert_int_equal(out.status[1], MUONSHARD_OK);
}

static void drift(rig *r, outcome *out) {
    (void)out;
    for (int s = 1; s <= 4 && r->status == MUONSHARD_OK; s++) {
        rig_gradients(r);
        if (s == 3 && r->comm->rank == 1) {
            r->params[2][5] += 1.0F;
            rig_push(r);
        }
        rig_step(r);
    }
}

static void test_replicas_that_drift_are_found(void **state) {
    (void)state;
    const rig_case setup = few_case("check_replicas: 2");
    outcome out = {.setup = {&setup}, .between = drift};
    assert_int_equal(threads_run(2, ranks_run, &out), MUONSHARD_OK);
    for (int r = 0; r < 2; r++) {
        assert_int_equal(out.status[r], MUONSHARD_ERR_MISMATCH);
        assert_non_null(strstr(out.message[r], "'tall' on rank 1"));
    }
}

/* ---- what cannot be had ---- */

static muonshard_status status_with(const char *variable, const char *value, const char *words) {
    const rig_case setup = few_case("");
    outcome out = {.setup = {&setup}};
    char before[32] = "";
    const bool was = getenv(variable) != NULL;
    const int live = fake.live();
    if (was)
        snprintf(before, sizeof before, "%s", getenv(variable));
    setenv(variable, value, 1);
    assert_int_equal(threads_run(2, ranks_run, &out), MUONSHARD_OK);
    was ? setenv(variable, before, 1) : unsetenv(variable);
    assert_int_equal(out.status[0], out.status[1]);
    if (out.status[0] == MUONSHARD_OK || !strstr(out.message[0], words))
        fail_msg("%s=%s: '%s' does not say '%s'", variable, value, out.message[0], words);
    assert_int_equal(fake.live(), live);
    return out.status[0];
}

static void test_what_cannot_be_had_is_said(void **state) {
    (void)state;
    assert_int_equal(status_with("FAKE_CUDA_MEMORY", "20000000", "out of device memory"),
                     MUONSHARD_ERR_MEMORY);
    assert_int_equal(status_with("FAKE_CUDA_DEVICES", "1", "same device"), MUONSHARD_ERR_CONFIG);
    assert_int_equal(status_with("FAKE_CUDA_DEVICES", "0", "no device is visible"),
                     MUONSHARD_ERR_UNAVAILABLE);
    assert_int_equal(status_with("FAKE_CUDA_DRIVER", "0", "no NVIDIA driver"),
                     MUONSHARD_ERR_UNAVAILABLE);
    setenv("FAKE_CUDA_OLD", "12020", 1);
    assert_int_equal(status_with("FAKE_CUDA_DRIVER", "0", "the driver is for CUDA 12.2"),
                     MUONSHARD_ERR_UNAVAILABLE);
    unsetenv("FAKE_CUDA_OLD");
    assert_int_equal(status_with("FAKE_CUDA_SM", "75", "too old"), MUONSHARD_ERR_UNAVAILABLE);
}

static void test_memory_of_the_host_is_refused(void **state) {
    (void)state;
    muonshard_comm *comm;
    const rig_case setup = few_case("");
    rig r;
    assert_int_equal(muonshard_comm_create_self(NULL, &comm), MUONSHARD_OK);
    rig_open(&r, comm, &setup);
    assert_int_equal(muonshard_set_grad(r.optimizer, 0, r.grads[0]), MUONSHARD_ERR_ARGUMENT);
    assert_non_null(strstr(muonshard_last_error(r.optimizer), "memory of the host"));
    assert_int_equal(muonshard_set_grad(r.optimizer, 0, rig_grad(&r, 0)), MUONSHARD_OK);
    rig_close(&r);
    muonshard_comm_destroy(comm);
}

/* ---- every call can fail ---- */

/* One rank, no images of the rig's own: what fails is the library's. */
static muonshard_status run_once(const char *yaml) {
    muonshard_comm *comm = NULL;
    const rig_case setup = {.tensors = few, .count = FEW, .yaml = yaml, .steps = 3};
    rig r;
    if (muonshard_comm_create_self(NULL, &comm) != MUONSHARD_OK)
        return MUONSHARD_ERR_MEMORY;
    rig_open(&r, comm, &setup);
    for (int s = 0; s < 3 && r.status == MUONSHARD_OK; s++) {
        rig_gradients(&r);
        rig_step(&r);
    }
    const muonshard_status status = r.status;
    if (r.optimizer)
        rig_close(&r);
    muonshard_comm_destroy(comm);
    return status;
}

static void test_every_call_can_fail(void **state) {
    (void)state;
    static const char *const yamls[] = {"", "{variance: normuon, norm: spectral}"};
    const int live = fake.live();
    for (size_t y = 0; y < sizeof yamls / sizeof yamls[0]; y++) {
        const long before = fake.calls();
        assert_int_equal(run_once(yamls[y]), MUONSHARD_OK);
        const long calls = fake.calls() - before;
        assert_true(calls > 300);
        long failed = 0;
        for (long n = 1; n <= calls; n += n < 200 ? 1 : 1 + n % 7) {
            fake.fail_at(n);
            failed += run_once(yamls[y]) != MUONSHARD_OK;
            fake.fail_at(0);
            if (fake.live() != live)
                fail_msg("call %ld of %ld fails, and %d things are left", n, calls,
                         fake.live() - live);
        }
        assert_true(failed > 100);
    }
}

static void test_every_call_of_several_ranks_can_fail(void **state) {
    (void)state;
    const rig_case setup = {
        .tensors = few, .count = FEW, .yaml = "{timeout: 0.3, first_timeout: 0.3}", .steps = 3};
    for (int n = 2; n <= 3; n++) {
        const long before = fake.calls();
        outcome sound = {.setup = {&setup}};
        assert_int_equal(threads_run(n, ranks_run, &sound), MUONSHARD_OK);
        const long calls = fake.calls() - before;
        for (long k = 1; k <= calls; k += 1 + calls / 12) {
            outcome out = {.setup = {&setup}};
            const threads_options options = {
                .comm = {sizeof options.comm, 0.3, NULL, NULL, NULL, NULL}};
            fake.fail_at(k);
            assert_int_equal(threads_run_with(&options, n, ranks_run, &out), MUONSHARD_OK);
            fake.fail_at(0);
            bool failed = false; /* the call may come too late for it to matter to anybody */
            for (int r = 0; r < n; r++)
                failed = failed || out.status[r] != MUONSHARD_OK;
            for (int r = 0; r < n && !failed; r++)
                assert_true(out.digest[r] == sound.digest[0]);
        }
    }
}

int main(void) {
    setenv("FAKE_CUDA_DEVICES", "4", 1);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_an_error_of_one_rank_is_in_everybodys_result),
        cmocka_unit_test(test_what_is_not_finite_changes_no_byte),
        cmocka_unit_test(test_replicas_that_drift_are_found),
        cmocka_unit_test(test_what_cannot_be_had_is_said),
        cmocka_unit_test(test_memory_of_the_host_is_refused),
        cmocka_unit_test(test_every_call_can_fail),
        cmocka_unit_test(test_a_rank_that_stays_away_ends_by_the_deadline),
        cmocka_unit_test(test_every_call_of_several_ranks_can_fail),
    };
    return cmocka_run_group_tests(tests, find_fake, NULL);
}
