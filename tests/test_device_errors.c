/* What goes wrong on a device, on the fake one: every call of it can fail, ranks stay away or
 * differ, something can't be had; all are told so, and nothing is left behind. Ranks are threads;
 * tensors go over the fake NCCL. */
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "device_fixture.h"

#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

/* ---- what a program is told ---- */

static struct {
    pthread_mutex_t lock;
    int fatal, warned;
} heard = {.lock = PTHREAD_MUTEX_INITIALIZER};

static void hear_fatal(void *user, muonshard_status status, const char *message) {
    (void)user, (void)status, (void)message;
    pthread_mutex_lock(&heard.lock);
    heard.fatal++;
    pthread_mutex_unlock(&heard.lock);
}

static void hear_log(void *user, muonshard_log_level level, const char *message) {
    (void)user;
    pthread_mutex_lock(&heard.lock);
    heard.warned +=
        level == MUONSHARD_LOG_WARNING && strstr(message, "tensors go over threads, through memory "
                                                          "of the host (");
    pthread_mutex_unlock(&heard.lock);
}

static const threads_options hearing = {
    .comm = {sizeof hearing.comm, 20.0, hear_log, NULL, hear_fatal, NULL}};

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

/* Rank 0 calls the third step, rank 1 never does; nobody asks for the outcome. Ends by the step's
 * deadline, not when rank 1 has gone. */
static void destroy_while_waiting(muonshard_comm *comm, void *arg) {
    outcome *out = arg;
    rig r;
    rig_open(&r, comm, out->setup[0]);
    for (int s = 0; s < 2 && r.status == MUONSHARD_OK; s++) {
        rig_gradients(&r);
        rig_step(&r);
    }
    if (comm->rank == 0) {
        rig_gradients(&r);
        for (size_t t = 0; t < FEW; t++)
            images_upload(&r.images, r.grads[t]);
        if (r.status == MUONSHARD_OK)
            r.status = muonshard_step(r.optimizer, NULL);
        muonshard_destroy(r.optimizer);
        r.optimizer = NULL;
        r.images.count = 0; /* they stay with the device */
    }
    out->status[comm->rank] = r.status;
    threads_barrier(comm);
    rig_close(&r);
}

static void test_destroy_keeps_the_steps_deadline(void **state) {
    (void)state;
    static const char *const yamls[] = {
        "{timeout: 0.5, first_timeout: 5}",
        "{timeout: 0.5, first_timeout: 5, cuda_graphs: false, deterministic: true}"};
    for (size_t y = 0; y < 2; y++) {
        const rig_case setup = few_case(yamls[y]);
        outcome out = {.setup = {&setup}};
        heard.fatal = 0;
        assert_int_equal(threads_run_with(&hearing, 2, destroy_while_waiting, &out), MUONSHARD_OK);
        assert_int_equal(out.status[0], MUONSHARD_OK);
        assert_int_equal(out.status[1], MUONSHARD_OK);
        assert_int_equal(heard.fatal, 1);
    }
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
        assert_non_null(strstr(out.message[r], "'tall' differ between rank 0 and rank 1"));
    }
}

/* ---- what cannot be had ---- */

static muonshard_status status_with(int ranks, const char *variable, const char *value,
                                    const char *words) {
    const rig_case setup = few_case("");
    outcome out = {.setup = {&setup}};
    char before[32] = "";
    const bool was = getenv(variable) != NULL;
    const int live = fake.live();
    if (was)
        snprintf(before, sizeof before, "%s", getenv(variable));
    setenv(variable, value, 1);
    assert_int_equal(threads_run(ranks, ranks_run, &out), MUONSHARD_OK);
    was ? setenv(variable, before, 1) : unsetenv(variable);
    for (int r = 1; r < ranks; r++)
        assert_int_equal(out.status[0], out.status[r]);
    if (out.status[0] == MUONSHARD_OK || !strstr(out.message[0], words))
        fail_msg("%s=%s: '%s' does not say '%s'", variable, value, out.message[0], words);
    assert_int_equal(fake.live(), live);
    return out.status[0];
}

static void test_what_cannot_be_had_is_said(void **state) {
    (void)state;
    assert_int_equal(status_with(2, "FAKE_CUDA_MEMORY", "20000000", "out of device memory"),
                     MUONSHARD_ERR_MEMORY);
    assert_int_equal(status_with(2, "FAKE_CUDA_DEVICES", "1", "same device"), MUONSHARD_ERR_CONFIG);
    assert_int_equal(
        status_with(3, "FAKE_CUDA_DEVICES", "2", "rank 2 of this machine finds 2 devices"),
        MUONSHARD_ERR_CONFIG);
    assert_int_equal(status_with(2, "FAKE_CUDA_DEVICES", "0", "no device is visible"),
                     MUONSHARD_ERR_UNAVAILABLE);
    assert_int_equal(status_with(2, "FAKE_CUDA_DRIVER", "0", "no NVIDIA driver"),
                     MUONSHARD_ERR_UNAVAILABLE);
    setenv("FAKE_CUDA_OLD", "12020", 1);
    assert_int_equal(status_with(2, "FAKE_CUDA_DRIVER", "0", "the driver is for CUDA 12.2"),
                     MUONSHARD_ERR_UNAVAILABLE);
    unsetenv("FAKE_CUDA_OLD");
    assert_int_equal(status_with(2, "FAKE_CUDA_SM", "75", "too old"), MUONSHARD_ERR_UNAVAILABLE);
}

static void test_memory_elsewhere_is_refused(void **state) {
    (void)state;
    muonshard_comm *comm;
    const rig_case setup = few_case("");
    muonshard_tensor_desc desc = MUONSHARD_TENSOR_DESC_INIT;
    static float on_host[8];
    void *on_other = NULL, *on_own = NULL;
    rig r;
    runtime.set_device(1);
    runtime.alloc(&on_other, sizeof on_host);
    runtime.set_device(0);
    runtime.alloc(&on_own, sizeof on_host);
    assert_int_equal(muonshard_comm_create_self(NULL, &comm), MUONSHARD_OK);
    rig_prepare(&r, comm, &setup);
    assert_int_equal(r.status, MUONSHARD_OK);
    desc.name = "elsewhere";
    desc.role = MUONSHARD_ROLE_ELEMENTWISE;
    desc.dims = 1;
    desc.shape[0] = 8;
    void *const wrong[] = {on_host, on_other};
    for (size_t i = 0; i < 2; i++) {
        desc.param = wrong[i];
        desc.grad = on_own;
        assert_int_equal(muonshard_add_tensor(r.optimizer, &desc, NULL), MUONSHARD_ERR_ARGUMENT);
        assert_non_null(strstr(muonshard_last_error(r.optimizer),
                               "'elsewhere': its parameter is memory of the host or of another "
                               "device; the backend is cuda (device 0"));
        desc.param = on_own;
        desc.grad = wrong[i];
        assert_int_equal(muonshard_add_tensor(r.optimizer, &desc, NULL), MUONSHARD_ERR_ARGUMENT);
        assert_non_null(strstr(muonshard_last_error(r.optimizer), "its gradient is memory"));
        assert_int_equal(muonshard_set_grad(r.optimizer, 0, wrong[i]), MUONSHARD_ERR_ARGUMENT);
        assert_non_null(strstr(muonshard_last_error(r.optimizer), "its gradient is memory"));
    }
    assert_int_equal(muonshard_set_grad(r.optimizer, 0, rig_grad(&r, 0)), MUONSHARD_OK);
    desc.grad = on_own;
    assert_int_equal(muonshard_add_tensor(r.optimizer, &desc, NULL), MUONSHARD_OK);
    rig_close(&r);
    muonshard_comm_destroy(comm);
    runtime.free(on_own);
    runtime.set_device(1);
    runtime.free(on_other);
    runtime.set_device(0);
}

/* ---- NCCL that cannot be had ---- */

/* All ranks, or all but the first, can't have it: `auto` goes on without, `nccl` does not. */
static void test_without_nccl_tensors_go_through_the_host(void **state) {
    (void)state;
    static const char *const refused[] = {"1", "2"};
    const rig_case ordered = few_case("deterministic: true"), named = few_case("comm: nccl");
    const rig_case setup = few_case("");
    const uint64_t wanted = digest_at(2, &ordered);
    for (size_t i = 0; i < 2; i++) {
        const int live = fake.live();
        outcome staged = {.setup = {&setup}}, strict = {.setup = {&named}};
        heard.fatal = heard.warned = 0;
        setenv("FAKE_NCCL_REFUSE", refused[i], 1);
        assert_int_equal(threads_run_with(&hearing, 2, ranks_run, &staged), MUONSHARD_OK);
        assert_int_equal(heard.warned, 1);
        assert_int_equal(threads_run_with(&hearing, 2, ranks_run, &strict), MUONSHARD_OK);
        unsetenv("FAKE_NCCL_REFUSE");
        for (int r = 0; r < 2; r++) {
            assert_int_equal(staged.status[r], MUONSHARD_OK);
            assert_true(staged.digest[r] == wanted);
            assert_int_equal(strict.status[r], MUONSHARD_ERR_COMM);
            assert_non_null(strstr(strict.message[r], "NCCL"));
        }
        assert_int_equal(heard.warned, 1);
        assert_int_equal(heard.fatal, 0);
        assert_int_equal(fake.live(), live);
    }
}

/* ---- every call can fail ---- */

/* One rank; three steps. */
static muonshard_status run_once(const char *yaml, uint64_t *digest) {
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
    *digest = rig_digest(&r);
    if (r.optimizer)
        rig_close(&r);
    muonshard_comm_destroy(comm);
    return status;
}

/* An error, or the right numbers; and nothing is left. */
static void test_every_call_can_fail(void **state) {
    (void)state;
    static const char *const yamls[] = {"", "{variance: normuon, norm: spectral}", "comm: self",
                                        "{gemm_kernels: hopper, ns_dtype: bf16, ns_steps: 1}"};
    static const long apart[] = {1, 1, 1, 4}; /* emulated kernels take their time */
    const int live = fake.live();
    for (size_t y = 0; y < sizeof yamls / sizeof yamls[0]; y++) {
        const long before = fake.calls();
        uint64_t sound = 0, digest = 0;
        assert_int_equal(run_once(yamls[y], &sound), MUONSHARD_OK);
        const long calls = fake.calls() - before;
        assert_true(calls > 300);
        long failed = 0;
        for (long n = 1; n <= calls; n += apart[y]) {
            fake.fail_at(n);
            const muonshard_status status = run_once(yamls[y], &digest);
            fake.fail_at(0);
            failed += status != MUONSHARD_OK;
            if (fake.live() != live)
                fail_msg("call %ld of %ld fails, and %d things are left", n, calls,
                         fake.live() - live);
            if (status == MUONSHARD_OK && digest != sound)
                fail_msg("call %ld of %ld fails, and nobody is told", n, calls);
        }
        print_message("%ld calls of '%s' made to fail, %ld of them an error\n", calls / apart[y],
                      yamls[y], failed);
        assert_true(failed > 100);
    }
}

/* The second step records: whatever fails in it, the thread is not left recording. */
static void test_a_recording_that_fails_ends(void **state) {
    (void)state;
    const rig_case setup = few_case("");
    long calls = 1000;
    for (long n = 1; n <= calls; n++) {
        muonshard_comm *comm = NULL;
        rig r;
        assert_int_equal(muonshard_comm_create_self(NULL, &comm), MUONSHARD_OK);
        rig_open(&r, comm, &setup);
        rig_gradients(&r);
        rig_step(&r);
        assert_int_equal(r.status, MUONSHARD_OK);
        rig_gradients(&r);
        const long before = fake.calls();
        fake.fail_at(n);
        rig_step(&r);
        fake.fail_at(0);
        calls = n == 1 ? 1000 : r.status == MUONSHARD_OK ? fake.calls() - before : calls;
        void *memory = NULL;
        if (runtime.alloc(&memory, 16) != cudaSuccess || runtime.free(memory) != cudaSuccess)
            fail_msg("call %ld of the step fails, and the thread is left recording", n);
        rig_close(&r);
        muonshard_comm_destroy(comm);
    }
    assert_in_range(calls, 50, 999);
}

/* Kernels that wait for a rank that has died may never end, and memory they work on is kept:
 * nothing is left only where no communicator died. */
static void test_every_call_of_several_ranks_can_fail(void **state) {
    (void)state;
    static const char *const refuse[] = {NULL, "1"}; /* over NCCL, and through the host's memory */
    const rig_case setup = {
        .tensors = few, .count = FEW, .yaml = "{timeout: 0.3, first_timeout: 0.3}", .steps = 3};
    for (int n = 2; n <= 3; n++)
        for (size_t way = 0; way < 2; way++) {
            if (refuse[way])
                setenv("FAKE_NCCL_REFUSE", refuse[way], 1);
            const long before = fake.calls();
            outcome sound = {.setup = {&setup}};
            assert_int_equal(threads_run(n, ranks_run, &sound), MUONSHARD_OK);
            const long calls = fake.calls() - before;
            long whole = 0;
            for (long k = 1; k <= calls; k += 1 + calls / 20) {
                outcome out = {.setup = {&setup}};
                threads_options options = hearing;
                options.comm.timeout_s = 0.3;
                heard.fatal = 0;
                const int live = fake.live();
                fake.fail_at(k);
                assert_int_equal(threads_run_with(&options, n, ranks_run, &out), MUONSHARD_OK);
                fake.fail_at(0);
                bool failed = false; /* the call may come too late for it to matter to anybody */
                for (int r = 0; r < n; r++)
                    failed = failed || out.status[r] != MUONSHARD_OK;
                for (int r = 0; r < n && !failed; r++)
                    assert_true(out.digest[r] == sound.digest[0]);
                whole += heard.fatal == 0;
                if (!heard.fatal && fake.live() != live)
                    fail_msg("%d ranks: call %ld of %ld fails, and %d things are left", n, k, calls,
                             fake.live() - live);
            }
            print_message("%d ranks, way %zu: %ld calls; no communicator died at %ld points\n", n,
                          way, calls, whole);
            unsetenv("FAKE_NCCL_REFUSE");
            assert_true(whole > 0);
        }
}

int main(void) {
    setenv("FAKE_CUDA_DEVICES", "4", 1);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_an_error_of_one_rank_is_in_everybodys_result),
        cmocka_unit_test(test_what_is_not_finite_changes_no_byte),
        cmocka_unit_test(test_replicas_that_drift_are_found),
        cmocka_unit_test(test_what_cannot_be_had_is_said),
        cmocka_unit_test(test_memory_elsewhere_is_refused),
        cmocka_unit_test(test_without_nccl_tensors_go_through_the_host),
        cmocka_unit_test(test_a_recording_that_fails_ends),
        cmocka_unit_test(test_every_call_can_fail),
        cmocka_unit_test(test_a_rank_that_stays_away_ends_by_the_deadline),
        cmocka_unit_test(test_destroy_keeps_the_steps_deadline),
        cmocka_unit_test(test_every_call_of_several_ranks_can_fail),
    };
    return cmocka_run_group_tests(tests, find_fake, NULL);
}
