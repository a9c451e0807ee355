/* What is promised of a device and of nothing else, on the fake one: the host doesn't wait for it,
 * its memory is what was planned, every call of it can fail, ranks that differ are told so. Ranks
 * are threads; tensors go over the fake NCCL. */
#include <dlfcn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "muonshard_nccl.h"
#include "optim/optimizer.h"
#include "ranks_fixture.h"

#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

/* ---- the fake, as a test sees it ---- */

static struct {
    void (*fail_at)(long n);
    long (*calls)(void);
    int (*live)(void);
    size_t (*bytes)(void);
    long (*waits)(void);
    long (*allocations)(void);
    void (*seed)(unsigned seed);
} fake;

/* What a program with a stream of its own calls; and one with NCCL of its own. */
static struct {
    cudaError_t (*create)(void **stream, unsigned flags);
    cudaError_t (*destroy)(void *stream);
    cudaError_t (*alloc)(void **memory, size_t bytes, unsigned flags);
    cudaError_t (*free)(void *memory);
    cudaError_t (*copy)(void *dst, const void *src, size_t bytes, int kind, void *stream);
} runtime;

static struct {
    ncclResult_t (*id)(ncclUniqueId *id);
    ncclResult_t (*init)(ncclComm_t *comm, int size, ncclUniqueId id, int rank,
                         ncclConfig_t *config);
    ncclResult_t (*state)(ncclComm_t comm, ncclResult_t *state);
    ncclResult_t (*destroy)(ncclComm_t comm);
    void (*count)(void);
    int (*set_device)(int device);
    ncclUniqueId shared;
} nccl;

static int find_fake(void **state) {
    (void)state;
    void *library = dlopen("libmuonshard_cuda.so.0.1", RTLD_NOW | RTLD_LOCAL);
    if (!library)
        return print_error("%s\n", dlerror()), -1;
    *(void **)&fake.fail_at = dlsym(library, "fake_cuda_fail_at");
    *(void **)&fake.calls = dlsym(library, "fake_cuda_calls");
    *(void **)&fake.live = dlsym(library, "fake_cuda_live");
    *(void **)&fake.bytes = dlsym(library, "fake_cuda_bytes");
    *(void **)&fake.waits = dlsym(library, "fake_cuda_waits");
    *(void **)&fake.allocations = dlsym(library, "fake_cuda_allocations");
    *(void **)&fake.seed = dlsym(library, "fake_cuda_seed");
    *(void **)&runtime.create = dlsym(library, "cudaStreamCreateWithFlags");
    *(void **)&runtime.destroy = dlsym(library, "cudaStreamDestroy");
    *(void **)&runtime.alloc = dlsym(library, "cudaHostAlloc");
    *(void **)&runtime.free = dlsym(library, "cudaFreeHost");
    *(void **)&runtime.copy = dlsym(library, "cudaMemcpyAsync");
    *(void **)&nccl.id = dlsym(library, "ncclGetUniqueId");
    *(void **)&nccl.init = dlsym(library, "ncclCommInitRankConfig");
    *(void **)&nccl.state = dlsym(library, "ncclCommGetAsyncError");
    *(void **)&nccl.destroy = dlsym(library, "ncclCommDestroy");
    *(void **)&nccl.count = dlsym(library, "ncclCommCount");
    *(void **)&nccl.set_device = dlsym(library, "cudaSetDevice");
    return fake.fail_at && fake.seed && nccl.id && nccl.count ? 0 : -1;
}

/* ---- steps that nobody waits for ---- */

static const rig_tensor few[] = {
    {RIG_TENSOR("embedding", MUONSHARD_ROLE_ELEMENTWISE, 2, 31, 8)},
    {RIG_TENSOR("square", MUONSHARD_ROLE_MATRIX, 3, 3, 12, 12)},
    {RIG_TENSOR("tall", MUONSHARD_ROLE_MATRIX, 2, 20, 8)},
    {RIG_TENSOR("wide", MUONSHARD_ROLE_MATRIX, 3, 2, 8, 20)},
};
enum { FEW = sizeof few / sizeof few[0], STEPS = 6 };

static rig_case few_case(const char *yaml) {
    return (rig_case){.tensors = few, .count = FEW, .yaml = yaml, .steps = STEPS};
}

/* Gradients of all steps lie on the device from the start, so that the test doesn't wait either. */
static void run_ahead(rig *r, outcome *out) {
    void *grads[STEPS][FEW];
    backend *b = r->optimizer->backend;
    for (int s = 0; s < STEPS; s++) {
        rig_gradients(r);
        for (size_t t = 0; t < FEW; t++) {
            const size_t bytes = r->elements[t] * sizeof(float);
            b->ops->alloc(b, &grads[s][t], bytes);
            const copy_item item = {grads[s][t], r->grads[t], bytes};
            b->ops->copy(b, &item, 1, STREAM_COMPUTE);
        }
    }
    long waits = 0, allocations = 0;
    for (int s = 0; s < STEPS && r->status == MUONSHARD_OK; s++) {
        if (s == 2) {
            threads_barrier(r->comm);
            waits = fake.waits();
            allocations = fake.allocations();
            threads_barrier(r->comm);
        }
        for (size_t t = 0; t < FEW; t++)
            muonshard_set_grad(r->optimizer, (int)t, grads[s][t]);
        r->status = muonshard_step(r->optimizer, NULL);
    }
    threads_barrier(r->comm);
    out->number[r->comm->rank] =
        (double)(fake.waits() - waits) + (double)(fake.allocations() - allocations);
    threads_barrier(r->comm);
    muonshard_step_result_info result = MUONSHARD_STEP_RESULT_INIT;
    if (r->status == MUONSHARD_OK)
        r->status = muonshard_step_result(r->optimizer, 0, 1, &result);
    out->result[r->comm->rank] = result;
    for (size_t t = 0; t < FEW; t++)
        images_download(&r->images, r->params[t]);
    for (int s = 0; s < STEPS; s++)
        for (size_t t = 0; t < FEW; t++)
            b->ops->free(b, grads[s][t]);
}

static void test_steps_run_ahead(void **state) {
    (void)state;
    static const char *const yamls[] = {"", "cuda_graphs: false", "deterministic: true",
                                        "gather: params", "variance: normuon"};
    const int live = fake.live();
    for (size_t y = 0; y < sizeof yamls / sizeof yamls[0]; y++)
        for (int n = 1; n <= 3; n++) {
            const rig_case setup = few_case(yamls[y]);
            const uint64_t waited_for = digest_at(n, &setup);
            for (unsigned seed = 0; seed < 4; seed++) {
                outcome out = {.setup = {&setup}, .between = run_ahead};
                fake.seed(seed);
                assert_int_equal(threads_run(n, ranks_run, &out), MUONSHARD_OK);
                fake.seed(0);
                for (int r = 0; r < n; r++) {
                    assert_int_equal(out.status[r], MUONSHARD_OK);
                    assert_true(out.digest[r] == waited_for);
                    assert_int_equal(out.result[r].count, STEPS);
                    assert_true(out.number[r] == 0.0);
                }
            }
            assert_int_equal(fake.live(), live);
        }
}

static void test_graphs_change_no_bit(void **state) {
    (void)state;
    static const char *const how[] = {"preset: jordan", "{preset: speedrun, clip_norm: 3}",
                                      "{preset: gram, ns_form: gram}", "{preset: optax}"};
    for (size_t y = 0; y < sizeof how / sizeof how[0]; y++) {
        char without[128];
        const size_t length = strlen(how[y]);
        snprintf(without, sizeof without,
                 how[y][0] == '{' ? "%.*s, cuda_graphs: false}" : "{%.*s, cuda_graphs: false}",
                 (int)(how[y][0] == '{' ? length - 1 : length), how[y]);
        const rig_case a = few_case(how[y]), b = few_case(without);
        for (int n = 1; n <= 2; n++)
            assert_true(digest_at(n, &a) == digest_at(n, &b));
    }
}

/* The fake runs nothing before somebody waits for it: what a computation waits for without need is
 * over when the computation begins. Counts the collectives that are still to come then. */
static void look_at_overlap(rig *r, outcome *out) {
    const muonshard_optimizer *o = r->optimizer;
    backend *b = o->backend;
    for (int s = 0; s < 4 && r->status == MUONSHARD_OK; s++) {
        rig_gradients(r);
        rig_step(r);
    }
    for (size_t i = 0; i + 1 < o->schedule.count && r->status == MUONSHARD_OK; i++) {
        const op *collective = &o->schedule.ops[i], *next = collective + 1;
        const bool gather = collective->kind == OP_ALL_GATHER && next->kind == OP_APPLY &&
                            next->index < collective->index;
        const bool reduction = collective->kind == OP_REDUCE_SCATTER && next->kind == OP_MEASURE;
        double later = 0.0;
        if (gather || reduction)
            r->status = b->streams->stamp_seconds(b, stamp_index(o, o->step, i + 1, STAMP_BEGIN),
                                                  stamp_index(o, o->step, i, STAMP_END), &later);
        if ((gather || reduction) && !(later > 0.0))
            r->status = MUONSHARD_ERR_INTERNAL;
        out->number[r->comm->rank] += gather ? 1.0 : reduction ? 100.0 : 0.0;
    }
}

static void test_only_what_is_needed_is_waited_for(void **state) {
    (void)state;
    static const char *const yamls[] = {
        "{bucket_bytes: 1500, batch_bytes: 1500}",
        "{bucket_bytes: 1500, batch_bytes: 1500, cuda_graphs: false}",
        "{bucket_bytes: 1500, batch_bytes: 1500, deterministic: true}"};
    for (size_t y = 0; y < sizeof yamls / sizeof yamls[0]; y++) {
        const rig_case setup = few_case(yamls[y]);
        outcome out = {.setup = {&setup}, .between = look_at_overlap};
        assert_int_equal(threads_run(2, ranks_run, &out), MUONSHARD_OK);
        for (int r = 0; r < 2; r++) {
            assert_int_equal(out.status[r], MUONSHARD_OK);
            assert_true(out.number[r] >= 102.0); /* two gathers, and the last reduce-scatter */
        }
    }
}

/* ---- the caller's stream ---- */

/* Gradients are on their way on a stream of the caller's when the step is called, and parameters
 * are read on it: nothing else is waited for. */
static void on_own_stream(rig *r, outcome *out) {
    const int rank = r->comm->rank;
    void *stream = NULL, *pinned = NULL;
    size_t largest = 0;
    for (size_t t = 0; t < FEW; t++)
        largest = r->elements[t] > largest ? r->elements[t] : largest;
    runtime.create(&stream, 1);
    runtime.alloc(&pinned, FEW * largest * sizeof(float), 0);
    for (int s = 0; s < STEPS && r->status == MUONSHARD_OK; s++) {
        rig_gradients(r);
        for (size_t t = 0; t < FEW; t++) {
            float *sent = (float *)pinned + t * largest;
            const size_t bytes = r->elements[t] * sizeof *sent;
            memcpy(sent, r->grads[t], bytes);
            runtime.copy((void *)(uintptr_t)rig_grad(r, t), sent, bytes, cudaMemcpyDefault, stream);
        }
        muonshard_step_args args = MUONSHARD_STEP_ARGS_INIT;
        args.stream = stream;
        args.defer = out->number[rank] != 0.0;
        r->status = muonshard_step(r->optimizer, &args);
        for (size_t t = 0; t < FEW && args.defer && r->status == MUONSHARD_OK; t++)
            r->status = muonshard_tensor_wait(r->optimizer, (int)t, 0,
                                              few[t].dims == 3 ? few[t].shape[0] : 1, stream);
        for (size_t t = 0; t < FEW; t++) /* pageable: waits for this stream alone */
            runtime.copy(r->params[t], images_of(&r->images, r->params[t]),
                         r->elements[t] * sizeof(float), cudaMemcpyDefault, stream);
    }
    runtime.free(pinned);
    runtime.destroy(stream);
}

static void test_the_callers_stream(void **state) {
    (void)state;
    const rig_case setup = few_case("");
    for (int n = 1; n <= 2; n++)
        for (int defer = 0; defer < 2; defer++) {
            outcome out = {.setup = {&setup}, .between = on_own_stream};
            const uint64_t plain = digest_at(n, &setup);
            for (int r = 0; r < n; r++)
                out.number[r] = defer;
            assert_int_equal(threads_run(n, ranks_run, &out), MUONSHARD_OK);
            for (int r = 0; r < n; r++)
                assert_true(out.status[r] == MUONSHARD_OK && out.digest[r] == plain);
        }
}

/* ---- an ncclComm_t of the program's own ---- */

static void over_adopted(muonshard_comm *outer, void *arg) {
    outcome *out = arg;
    const int rank = outer->rank;
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    ncclResult_t state = ncclInProgress;
    ncclComm_t own = NULL;
    config.blocking = 0;
    nccl.set_device(rank);
    nccl.init(&own, outer->size, nccl.shared, rank, &config);
    while (own && state == ncclInProgress)
        nccl.state(own, &state);
    muonshard_comm *comm = NULL;
    out->status[rank] =
        muonshard_comm_adopt_nccl(own, (void (*)(void))muonshard_version, NULL, &comm);
    if (out->status[rank] == MUONSHARD_ERR_MISMATCH && !comm)
        out->status[rank] = muonshard_comm_adopt_nccl(own, nccl.count, NULL, &comm);
    if (out->status[rank] == MUONSHARD_OK) {
        double values[3] = {rank, 1.0, -rank};
        muonshard_comm_allreduce(comm, values, 3, MUONSHARD_REDUCE_SUM);
        out->number[rank] = values[0] + 100.0 * values[1] + values[2];
        out->digest[rank] = rig_run(comm, out->setup[0], &out->status[rank]);
    }
    muonshard_comm_destroy(comm);
    threads_barrier(outer); /* the program's communicator ends with all of its ranks */
    nccl.destroy(own);
}

static void test_an_adopted_communicator(void **state) {
    (void)state;
    const rig_case setup = few_case("deterministic: true");
    for (int n = 1; n <= 3; n += 2) {
        outcome out = {.setup = {&setup}};
        const uint64_t own = digest_at(n, &setup);
        assert_int_equal(nccl.id(&nccl.shared), ncclSuccess);
        assert_int_equal(threads_run(n, over_adopted, &out), MUONSHARD_OK);
        for (int r = 0; r < n; r++) {
            assert_int_equal(out.status[r], MUONSHARD_OK);
            assert_true(out.number[r] == 100.0 * n);
            assert_true(n > 1 || out.digest[r] == own);
            assert_true(out.digest[r] == out.digest[0]);
        }
    }
}

/* ---- errors ---- */

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

/* ---- memory ---- */

static void measure(rig *r, outcome *out) {
    size_t given = 0;
    muonshard_stats_info stats = MUONSHARD_STATS_INIT;
    for (size_t t = 0; t < r->images.count; t++)
        given += r->images.list[t].bytes;
    rig_gradients(r);
    rig_step(r);
    muonshard_stats(r->optimizer, &stats);
    out->number[r->comm->rank] =
        (double)(fake.bytes() - given) / (double)(stats.bytes_state + stats.bytes_workspace);
}

static void test_memory_is_what_the_stats_say(void **state) {
    (void)state;
    const rig_case setup = zoo_case("");
    outcome out = {.setup = {&setup}, .between = measure};
    assert_int_equal(threads_run(1, ranks_run, &out), MUONSHARD_OK);
    assert_int_equal(out.status[0], MUONSHARD_OK);
    if (!(fabs(out.number[0] - 1.0) <= 0.001))
        fail_msg("%.4f of what the stats say", out.number[0]);
}

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
        cmocka_unit_test(test_steps_run_ahead),
        cmocka_unit_test(test_graphs_change_no_bit),
        cmocka_unit_test(test_only_what_is_needed_is_waited_for),
        cmocka_unit_test(test_the_callers_stream),
        cmocka_unit_test(test_an_adopted_communicator),
        cmocka_unit_test(test_an_error_of_one_rank_is_in_everybodys_result),
        cmocka_unit_test(test_what_is_not_finite_changes_no_byte),
        cmocka_unit_test(test_replicas_that_drift_are_found),
        cmocka_unit_test(test_memory_is_what_the_stats_say),
        cmocka_unit_test(test_what_cannot_be_had_is_said),
        cmocka_unit_test(test_memory_of_the_host_is_refused),
        cmocka_unit_test(test_every_call_can_fail),
        cmocka_unit_test(test_a_rank_that_stays_away_ends_by_the_deadline),
        cmocka_unit_test(test_every_call_of_several_ranks_can_fail),
    };
    return cmocka_run_group_tests(tests, find_fake, NULL);
}
