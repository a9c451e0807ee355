/* What is promised of a device and of nothing else, on the fake one: the host doesn't wait for it,
 * a caller's stream is in order with the library's, its memory is what was planned. Ranks are
 * threads; tensors go over the fake NCCL. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "device_fixture.h"

#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

/* ---- steps that nobody waits for ---- */

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
    static const char *const yamls[] = {"",
                                        "cuda_graphs: false",
                                        "deterministic: true",
                                        "gather: params",
                                        "variance: normuon",
                                        "{gemm_kernels: hopper, ns_dtype: bf16}"};
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
                                      "{preset: gram, ns_form: gram}", "{preset: optax}",
                                      "{preset: gram, gemm_kernels: hopper}"};
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

/* Every step with values of its own: what a graph was recorded with is not what it is replayed
 * with.
 */
static void other_values_each_step(rig *r, outcome *out) {
    (void)out;
    for (int s = 0; s < STEPS && r->status == MUONSHARD_OK; s++) {
        muonshard_step_args args = MUONSHARD_STEP_ARGS_INIT;
        muonshard_step_result_info result = MUONSHARD_STEP_RESULT_INIT;
        args.lr = 0.01 * (s + 1);
        args.adam_lr = 0.002 * (s + 2);
        args.momentum = 0.5 + 0.07 * s;
        args.weight_decay = 0.3 - 0.04 * s;
        args.grad_scale = 1.0 / (1 + s);
        rig_gradients(r);
        for (size_t t = 0; t < FEW; t++)
            images_upload(&r->images, r->grads[t]);
        r->status = muonshard_step(r->optimizer, &args);
        if (r->status == MUONSHARD_OK)
            r->status = muonshard_step_result(r->optimizer, 0, 1, &result);
    }
    for (size_t t = 0; t < FEW; t++)
        images_download(&r->images, r->params[t]);
}

static void test_graphs_take_each_steps_values(void **state) {
    (void)state;
    static const char *const yamls[] = {"clip_norm: 3", "{clip_norm: 3, cuda_graphs: false}"};
    for (int n = 1; n <= 2; n++) {
        uint64_t digest[2];
        for (int y = 0; y < 2; y++) {
            const rig_case setup = few_case(yamls[y]);
            outcome out = {.setup = {&setup}, .between = other_values_each_step};
            assert_int_equal(threads_run(n, ranks_run, &out), MUONSHARD_OK);
            for (int r = 0; r < n; r++)
                assert_int_equal(out.status[r], MUONSHARD_OK);
            digest[y] = out.digest[0];
        }
        const rig_case same = few_case(yamls[0]);
        assert_true(digest[0] == digest[1]);
        assert_true(digest[0] != digest_at(n, &same));
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
        bool overlap =
            false; /* the other rank's device may be further, and take this one's along */
        for (int attempt = 0; attempt < 10 && !overlap; attempt++) {
            outcome out = {.setup = {&setup}, .between = look_at_overlap};
            assert_int_equal(threads_run(2, ranks_run, &out), MUONSHARD_OK);
            overlap = out.status[0] == MUONSHARD_OK && out.status[1] == MUONSHARD_OK;
            for (int r = 0; r < 2; r++) /* two gathers, and the last reduce-scatter */
                assert_true(out.status[r] || out.number[r] >= 102.0);
        }
        assert_true(overlap);
    }
}

/* ---- the caller's stream ---- */

enum { PLAIN, DEFERRED, DEFERRED_AND_OVERWRITTEN, CALLER_VARIANTS };

/* A stream of the program's, and pinned memory that holds a tensor's bytes twice over. */
typedef struct caller {
    void *stream;
    char *pinned[FEW];
} caller;

static void caller_open(caller *c, const rig *r, bool own_stream) {
    *c = (caller){.stream = NULL};
    if (own_stream)
        runtime.create(&c->stream, 1);
    for (size_t t = 0; t < FEW; t++) {
        void *memory = NULL;
        runtime.pin(&memory, 2 * r->elements[t] * sizeof(float), 0);
        c->pinned[t] = memory;
        memset(memory, 0xff, 2 * r->elements[t] * sizeof(float)); /* NaN */
    }
}

static void caller_close(const caller *c) {
    for (size_t t = 0; t < FEW; t++)
        runtime.unpin(c->pinned[t]);
    if (c->stream)
        runtime.destroy(c->stream);
}

/* What the host has, to the device, in the stream's order. */
static void send(const caller *c, const rig *r, size_t t, const void *host, size_t bytes) {
    memcpy(c->pinned[t], host, bytes);
    runtime.copy(images_of(&r->images, host), c->pinned[t], bytes, cudaMemcpyDefault, c->stream);
}

/* NaN in its place, likewise. */
static void overwrite(const caller *c, const rig *r, size_t t, const void *host, size_t bytes) {
    const size_t room = r->elements[t] * sizeof(float);
    runtime.copy(images_of(&r->images, host), c->pinned[t] + room, bytes, cudaMemcpyDefault,
                 c->stream);
}

/* Gradients are on their way on a stream of the caller's when the step is called, and parameters
 * are read on it: nothing else is waited for. */
static void on_own_stream(rig *r, outcome *out) {
    const int variant = (int)out->number[r->comm->rank];
    caller c;
    caller_open(&c, r, true);
    for (int s = 0; s < STEPS && r->status == MUONSHARD_OK; s++) {
        rig_gradients(r);
        for (size_t t = 0; t < FEW; t++)
            send(&c, r, t, r->grads[t], r->elements[t] * sizeof(float));
        muonshard_step_args args = MUONSHARD_STEP_ARGS_INIT;
        args.stream = c.stream;
        args.defer = variant != PLAIN;
        r->status = muonshard_step(r->optimizer, &args);
        for (size_t t = 0; t < FEW && variant == DEFERRED_AND_OVERWRITTEN; t++)
            overwrite(&c, r, t, r->grads[t], r->elements[t] * sizeof(float));
        for (size_t t = 0; t < FEW && args.defer && r->status == MUONSHARD_OK; t++)
            r->status = muonshard_tensor_wait(r->optimizer, (int)t, 0,
                                              few[t].dims == 3 ? few[t].shape[0] : 1, c.stream);
        for (size_t t = 0; t < FEW; t++) /* pageable: waits for this stream alone */
            runtime.copy(r->params[t], images_of(&r->images, r->params[t]),
                         r->elements[t] * sizeof(float), cudaMemcpyDefault, c.stream);
    }
    caller_close(&c);
}

static void test_the_callers_stream(void **state) {
    (void)state;
    static const char *const yamls[] = {"", "cuda_graphs: false", "deterministic: true"};
    for (size_t y = 0; y < sizeof yamls / sizeof yamls[0]; y++) {
        const rig_case setup = few_case(yamls[y]);
        for (int n = 1; n <= 2; n++) {
            const uint64_t plain = digest_at(n, &setup);
            for (int variant = 0; variant < CALLER_VARIANTS; variant++) {
                outcome out = {.setup = {&setup}, .between = on_own_stream};
                for (int r = 0; r < n; r++)
                    out.number[r] = variant;
                assert_int_equal(threads_run(n, ranks_run, &out), MUONSHARD_OK);
                for (int r = 0; r < n; r++)
                    assert_true(out.status[r] == MUONSHARD_OK && out.digest[r] == plain);
            }
        }
    }
}

/* Parameters are on their way on the caller's stream when commit is called: those are what is
 * compared, sent and copied. What is there before differs from rank to rank; where rank 0's are
 * sent, the others' own are not theirs either. */
static void commit_behind_copies(muonshard_comm *comm, void *arg) {
    outcome *out = arg;
    const rig_case *setup = out->setup[0];
    const int rank = comm->rank;
    rig r;
    caller c;
    rig_prepare(&r, comm, setup);
    caller_open(&c, &r, false);
    for (size_t t = 0; t < FEW && r.status == MUONSHARD_OK; t++) {
        const size_t bytes = rig_bytes(&r, t);
        memcpy(c.pinned[t], r.params[t], bytes);
        memset(r.params[t], rank, bytes);
        images_upload(&r.images, r.params[t]);
        if (setup->sync != MUONSHARD_SYNC_BROADCAST || rank == 0)
            memcpy(r.params[t], c.pinned[t], bytes);
        send(&c, &r, t, r.params[t], bytes);
    }
    if (r.status == MUONSHARD_OK)
        r.status = muonshard_commit(r.optimizer, setup->sync);
    for (int s = 0; s < 2 && r.status == MUONSHARD_OK; s++) {
        rig_gradients(&r);
        rig_step(&r);
    }
    out->status[rank] = r.status;
    out->digest[rank] = rig_digest(&r);
    caller_close(&c);
    rig_close(&r);
}

static void test_commit_is_in_order_with_the_callers_stream(void **state) {
    (void)state;
    static const muonshard_sync_params syncs[] = {MUONSHARD_SYNC_CHECK, MUONSHARD_SYNC_BROADCAST,
                                                  MUONSHARD_SYNC_NONE};
    static const char *const yamls[] = {"master: owner", "{master: replicated, gather: updates}"};
    rig_tensor bf16[FEW];
    memcpy(bf16, few, sizeof bf16);
    for (size_t t = 0; t < FEW; t++)
        bf16[t].dtype = MUONSHARD_BF16;
    for (size_t i = 0; i < 3; i++)
        for (size_t y = 0; y < 2; y++)
            for (int sixteen = 0; sixteen < 2; sixteen++) {
                rig_case setup = few_case(yamls[y]);
                setup.tensors = sixteen ? bf16 : few;
                setup.sync = syncs[i];
                setup.steps = 2;
                const uint64_t plain = digest_at(2, &setup);
                outcome out = {.setup = {&setup}};
                assert_int_equal(threads_run(2, commit_behind_copies, &out), MUONSHARD_OK);
                for (int r = 0; r < 2; r++)
                    assert_true(out.status[r] == MUONSHARD_OK && out.digest[r] == plain);
            }
}

/* ---- what a step costs the host ---- */

/* GPT-2 124M with sides of a sixteenth: what is cut by bytes is cut alike. */
static const rig_tensor gpt2[] = {
    {RIG_TENSOR("wte", MUONSHARD_ROLE_ELEMENTWISE, 2, 3142, 48)},
    {RIG_TENSOR("wpe", MUONSHARD_ROLE_ELEMENTWISE, 2, 64, 48)},
    {RIG_TENSOR("ln1w", MUONSHARD_ROLE_ELEMENTWISE, 2, 12, 48)},
    {RIG_TENSOR("ln1b", MUONSHARD_ROLE_ELEMENTWISE, 2, 12, 48)},
    {RIG_TENSOR("qkvw", MUONSHARD_ROLE_MATRIX, 3, 12, 144, 48), .split_count = 3,
     .splits = {48, 48, 48}},
    {RIG_TENSOR("qkvb", MUONSHARD_ROLE_ELEMENTWISE, 2, 12, 144)},
    {RIG_TENSOR("attprojw", MUONSHARD_ROLE_MATRIX, 3, 12, 48, 48)},
    {RIG_TENSOR("attprojb", MUONSHARD_ROLE_ELEMENTWISE, 2, 12, 48)},
    {RIG_TENSOR("ln2w", MUONSHARD_ROLE_ELEMENTWISE, 2, 12, 48)},
    {RIG_TENSOR("ln2b", MUONSHARD_ROLE_ELEMENTWISE, 2, 12, 48)},
    {RIG_TENSOR("fcw", MUONSHARD_ROLE_MATRIX, 3, 12, 192, 48)},
    {RIG_TENSOR("fcb", MUONSHARD_ROLE_ELEMENTWISE, 2, 12, 192)},
    {RIG_TENSOR("fcprojw", MUONSHARD_ROLE_MATRIX, 3, 12, 48, 192)},
    {RIG_TENSOR("fcprojb", MUONSHARD_ROLE_ELEMENTWISE, 2, 12, 48)},
    {RIG_TENSOR("lnfw", MUONSHARD_ROLE_ELEMENTWISE, 1, 48)},
    {RIG_TENSOR("lnfb", MUONSHARD_ROLE_ELEMENTWISE, 1, 48)},
};

/* Of the runtime's calls, those of the latest step, which is replayed. */
static void count_calls(rig *r, outcome *out) {
    for (int s = 0; s < 5 && r->status == MUONSHARD_OK; s++) {
        rig_gradients(r);
        threads_barrier(r->comm);
        const long before = fake.calls();
        threads_barrier(r->comm);
        r->status = muonshard_step(r->optimizer, NULL);
        threads_barrier(r->comm);
        out->number[r->comm->rank] = (double)(fake.calls() - before) / r->comm->size;

        threads_barrier(r->comm);
        muonshard_step_result_info result = MUONSHARD_STEP_RESULT_INIT;
        if (r->status == MUONSHARD_OK)
            r->status = muonshard_step_result(r->optimizer, 0, 1, &result);
    }
}

static void test_calls_of_a_step(void **state) {
    (void)state;
    const rig_case setup = {.tensors = gpt2,
                            .count = sizeof gpt2 / sizeof gpt2[0],
                            .yaml = "{bucket_bytes: 102400, batch_bytes: 1048576}",
                            .steps = 5};
    for (int n = 1; n <= 4; n++) {
        outcome out = {.setup = {&setup}, .between = count_calls};
        assert_int_equal(threads_run(n, ranks_run, &out), MUONSHARD_OK);
        for (int r = 0; r < n; r++)
            assert_true(out.status[r] == MUONSHARD_OK && out.number[r] > 0.0 &&
                        out.number[r] <= (n == 1 ? 40.0 : 220.0));
    }
}

/* ---- updates are where they are gathered ---- */

/* Counts matrices whose U does not lie in this rank's place of its all-gather. */
static void look_at_places(rig *r, outcome *out) {
    const muonshard_optimizer *o = r->optimizer;
    size_t elsewhere = 0, matrices = 0;
    for (size_t i = 0; i < o->schedule.count; i++) {
        const op *operation = &o->schedule.ops[i];
        if (operation->kind != OP_ALL_GATHER ||
            o->plan.batches[operation->index].kind != PLAN_MATRICES)
            continue;
        const batch *b = &o->plan.batches[operation->index];
        for (size_t w = 0, k = 0; w < b->count; w++) {
            if (plan_slot_view(&o->plan, &o->plan.waves[b->first + w], r->comm->rank) ==
                PLAN_EMPTY_SLOT)
                continue;
            const comm_part *part = &o->ops[i].parts[w];
            const char *place = (const char *)part->recv + (size_t)r->comm->rank * part->bytes;
            matrices++;
            elsewhere += part->send != place && !part->compact;
            elsewhere += o->batches[operation->index].orthogonalize[k++].out != part->send;
        }
    }
    out->number[r->comm->rank] = matrices ? (double)elsewhere : 1.0;
}

static void test_updates_are_gathered_in_place(void **state) {
    (void)state;
    const rig_case setup = few_case("gather: updates");
    for (int n = 2; n <= 3; n++) {
        outcome out = {.setup = {&setup}, .between = look_at_places};
        assert_int_equal(threads_run(n, ranks_run, &out), MUONSHARD_OK);
        for (int r = 0; r < n; r++)
            assert_true(out.status[r] == MUONSHARD_OK && out.number[r] == 0.0);
    }
}

/* ---- an ncclComm_t of the program's own ---- */

static ncclUniqueId shared_id;

static void over_adopted(muonshard_comm *outer, void *arg) {
    outcome *out = arg;
    const int rank = outer->rank;
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    ncclResult_t state = ncclInProgress;
    ncclComm_t own = NULL;
    config.blocking = 0;
    runtime.set_device(rank);
    nccl.init(&own, outer->size, shared_id, rank, &config);
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
        assert_int_equal(nccl.id(&shared_id), ncclSuccess);
        assert_int_equal(threads_run(n, over_adopted, &out), MUONSHARD_OK);
        for (int r = 0; r < n; r++) {
            assert_int_equal(out.status[r], MUONSHARD_OK);
            assert_true(out.number[r] == 100.0 * n);
            assert_true(n > 1 || out.digest[r] == own);
            assert_true(out.digest[r] == out.digest[0]);
        }
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

int main(void) {
    setenv("FAKE_CUDA_DEVICES", "4", 1);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_steps_run_ahead),
        cmocka_unit_test(test_graphs_change_no_bit),
        cmocka_unit_test(test_graphs_take_each_steps_values),
        cmocka_unit_test(test_only_what_is_needed_is_waited_for),
        cmocka_unit_test(test_the_callers_stream),
        cmocka_unit_test(test_calls_of_a_step),
        cmocka_unit_test(test_updates_are_gathered_in_place),
        cmocka_unit_test(test_commit_is_in_order_with_the_callers_stream),
        cmocka_unit_test(test_an_adopted_communicator),
        cmocka_unit_test(test_memory_is_what_the_stats_say),
    };
    return cmocka_run_group_tests(tests, find_fake, NULL);
}
