/* What several ranks must keep to while they overlap, leave gradients out or agree in groups. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "comm_threads.h"
#include "optim/optimizer.h"
#include "step_rig.h"

#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

enum { MAX_RANKS = 4 };

typedef struct outcome {
    const rig_case *setup;
    void (*run)(rig *r, struct outcome *out);
    int variant;
    uint64_t digest[MAX_RANKS];
    muonshard_status status[MAX_RANKS];
    double number[MAX_RANKS];
} outcome;

static void run_case(muonshard_comm *comm, void *arg) {
    outcome *out = arg;
    const int rank = muonshard_comm_rank(comm);
    rig r;
    rig_open(&r, comm, out->setup);
    out->run(&r, out);
    out->digest[rank] = rig_digest(&r);
    out->status[rank] = r.status;
    rig_close(&r);
}

static uint64_t digest_of(int ranks, outcome *out) {
    assert_int_equal(threads_run(ranks, run_case, out), MUONSHARD_OK);
    for (int r = 0; r < ranks; r++) {
        assert_int_equal(out->status[r], MUONSHARD_OK);
        assert_true(out->digest[r] == out->digest[0]);
    }
    return out->digest[0];
}

/* ---- nothing is read before it is marked ---- */

static size_t entries(const rig_tensor *t) {
    size_t n = 1;
    if (t->role == MUONSHARD_ROLE_MATRIX && t->form == MUONSHARD_STACK)
        for (int k = 0; k < t->dims - 2; k++)
            n *= (size_t)t->shape[k];
    return n;
}

/* An entry's gradient is NaN until the call before it is marked; the first entry goes first. */
static void fill_and_mark(rig *r, size_t t, const float *wanted) {
    const size_t n = entries(&r->setup->tensors[t]), count = r->elements[t] / n;
    for (size_t e = 0; e < n; e++) {
        memcpy(r->grads[t] + e * count, wanted + e * count, count * sizeof(float));
        images_upload(&r->images, r->grads[t]);
        if (r->status == MUONSHARD_OK)
            r->status = muonshard_grad_ready(r->optimizer, (int)t, (int64_t)e, 1);
        if (r->status == MUONSHARD_OK)
            r->status = muonshard_progress(r->optimizer);
    }
}

static void late_gradients(rig *r, outcome *out) {
    float *wanted[RIG_MAX_TENSORS];
    for (int i = 0; i < 3; i++) {
        rig_gradients(r);
        for (size_t t = 0; t < r->setup->count; t++) {
            wanted[t] = malloc(r->elements[t] * sizeof(float));
            memcpy(wanted[t], r->grads[t], r->elements[t] * sizeof(float));
            for (size_t k = 0; out->variant && k < r->elements[t]; k++)
                r->grads[t][k] = NAN;
            images_upload(&r->images, r->grads[t]);
        }
        for (size_t t = r->setup->count; t-- > 0;) {
            if (out->variant)
                fill_and_mark(r, t, wanted[t]);
            free(wanted[t]);
        }
        rig_step(r);
    }
}

static void test_nothing_is_read_before_it_is_marked(void **state) {
    (void)state;
    static const char *const yamls[] = {"{preset: jordan, bucket_bytes: 1}",
                                        "{preset: jordan, bucket_bytes: 9000}",
                                        "{preset: jordan, reduce: none, bucket_bytes: 1}"};
    for (size_t y = 0; y < 3; y++)
        for (int n = 1; n <= MAX_RANKS; n++) {
            const rig_case setup = {.tensors = rig_zoo,
                                    .count = rig_zoo_count,
                                    .yaml = yamls[y],
                                    .same_gradients = y == 2};
            outcome plain = {.setup = &setup, .run = late_gradients};
            outcome late = {.setup = &setup, .run = late_gradients, .variant = 1};
            assert_true(digest_of(n, &late) == digest_of(n, &plain));
        }
}

/* ---- gradients that are NULL after they have not been ---- */

/* Variant bit 0: zeros in the place of NULL; bit 1: NULL on all ranks. In steps 2 and 4. */
static void sometimes_null(rig *r, outcome *out) {
    const int rank = muonshard_comm_rank(r->comm), size = muonshard_comm_size(r->comm);
    for (int i = 0; i < 4; i++) {
        rig_gradients(r);
        const bool absent = i % 2 && (out->variant & 2 || rank == size - 1);
        for (size_t t = 0; t < r->setup->count; t++) {
            if (absent && out->variant & 1)
                memset(r->grads[t], 0, r->elements[t] * sizeof(float));
            muonshard_set_grad(r->optimizer, (int)t,
                               absent && !(out->variant & 1) ? NULL : rig_grad(r, t));
        }
        rig_step(r);
    }
}

static void test_null_after_a_gradient_is_zero(void **state) {
    (void)state;
    static const char *const yamls[] = {"preset: jordan", "{preset: jordan, reduce: none}"};
    rig_tensor tensors[RIG_MAX_TENSORS];
    memcpy(tensors, rig_zoo, rig_zoo_count * sizeof *tensors);
    for (size_t i = 0; i < rig_zoo_count; i++)
        tensors[i].null_grad = MUONSHARD_NULL_GRAD_ZERO;
    for (int y = 0; y < 2; y++)
        for (int n = 1; n <= MAX_RANKS; n++) {
            const rig_case setup = {.tensors = tensors,
                                    .count = rig_zoo_count,
                                    .yaml = yamls[y],
                                    .same_gradients = y == 1};
            for (int all = y ? 2 : 0; all <= 2; all += 2) { /* reduce: none: the ranks agree */
                outcome null = {.setup = &setup, .run = sometimes_null, .variant = all};
                outcome zero = {.setup = &setup, .run = sometimes_null, .variant = all | 1};
                assert_true(digest_of(n, &null) == digest_of(n, &zero));
            }
        }
}

/* ---- reduce ---- */

static void scaled_steps(rig *r, outcome *out) {
    const int size = muonshard_comm_size(r->comm);
    muonshard_step_args args = MUONSHARD_STEP_ARGS_INIT;
    args.grad_scale = out->variant ? 1.0 / size : 1.0;
    for (int i = 0; i < 2 && r->status == MUONSHARD_OK; i++) {
        rig_gradients(r);
        r->status = muonshard_step(r->optimizer, &args);
    }
    muonshard_step_result_info result = MUONSHARD_STEP_RESULT_INIT;
    muonshard_step_result(r->optimizer, 0, 1, &result);
    out->number[muonshard_comm_rank(r->comm)] = result.grad_norm;
}

static void test_a_sum_over_n_is_the_mean(void **state) {
    (void)state;
    rig_case mean = {.tensors = rig_zoo, .count = rig_zoo_count, .yaml = "clip_norm: 2"};
    rig_case sum = mean;
    sum.yaml = "{clip_norm: 2, reduce: sum}";
    for (int n = 1; n <= MAX_RANKS; n *= 2) {
        outcome a = {.setup = &mean, .run = scaled_steps};
        outcome b = {.setup = &sum, .run = scaled_steps, .variant = 1};
        assert_true(digest_of(n, &a) == digest_of(n, &b));
        assert_true(a.number[0] == b.number[0]);
        outcome c = {.setup = &sum, .run = scaled_steps};
        digest_of(n, &c);
        assert_true(c.number[0] == n * a.number[0]);
    }
}

/* ---- replicas are looked at every so many steps, and only then ---- */

static void drift_after_three(rig *r, outcome *out) {
    const int rank = muonshard_comm_rank(r->comm);
    for (int i = 1; i <= 6 && r->status == MUONSHARD_OK; i++) {
        if (i == 4 && rank == 1)
            r->params[4][r->elements[4] - 1] += 1e-3F;
        if (i == 4)
            rig_push(r);
        rig_gradients(r);
        rig_step(r);
        out->number[rank] = i;
    }
}

static void test_replicas_are_compared_in_their_turn(void **state) {
    (void)state;
    const rig_case setup = {
        .tensors = rig_zoo, .count = rig_zoo_count, .yaml = "check_replicas: 3"};
    outcome out = {.setup = &setup, .run = drift_after_three};
    assert_int_equal(threads_run(2, run_case, &out), MUONSHARD_OK);
    for (int r = 0; r < 2; r++) {
        assert_int_equal(out.status[r], MUONSHARD_ERR_MISMATCH);
        assert_true(out.number[r] == 6); /* not 4, not 5 */
    }
}

/* ---- groups of two ranks, of four ---- */

typedef struct pair_group {
    muonshard_comm *world;
    int first; /* world rank of the group's rank 0 */
    char all[4 * 4096];
} pair_group;

/* Both groups run the same collectives, so that one over all ranks serves both. */
static int pair_allgather(void *user, const void *send, void *recv, size_t bytes) {
    pair_group *g = user;
    if (bytes > 4096 || muonshard_comm_allgather(g->world, send, g->all, bytes))
        return 1;
    memcpy(recv, g->all + (size_t)g->first * bytes, 2 * bytes);
    return 0;
}

static int pair_barrier(void *user) {
    (void)user;
    return 0;
}

static muonshard_status open_group(pair_group *g, muonshard_comm **comm, device_images *im,
                                   float *w, float *grad) {
    muonshard_optimizer **o = &im->optimizer;
    const int rank = muonshard_comm_rank(g->world);
    muonshard_comm_callbacks callbacks = MUONSHARD_COMM_CALLBACKS_INIT;
    callbacks.rank = rank % 2;
    callbacks.world_size = 2;
    callbacks.user = g;
    callbacks.allgather = pair_allgather;
    callbacks.barrier = pair_barrier;
    muonshard_options options = MUONSHARD_OPTIONS_INIT;
    options.agree_comm = g->world;
    muonshard_tensor_desc d = MUONSHARD_TENSOR_DESC_INIT;
    d.name = "w";
    d.role = MUONSHARD_ROLE_MATRIX;
    d.dims = 2;
    d.shape[0] = 2;
    d.shape[1] = 3;
    muonshard_config *config = NULL;
    muonshard_status status = muonshard_comm_create_callbacks(&callbacks, NULL, comm);
    status = status ? status : muonshard_config_create(&config);
    if (status == MUONSHARD_OK)
        images_configure(config);
    status = status ? status : muonshard_create(*comm, config, &options, o);
    muonshard_config_destroy(config);
    if (status == MUONSHARD_OK) {
        d.param = images_add(im, w, 6 * sizeof *w);
        d.grad = images_add(im, grad, 6 * sizeof *grad);
    }
    status = status ? status : muonshard_add_tensor(*o, &d, NULL);
    return status ? status : muonshard_commit(*o, MUONSHARD_SYNC_CHECK);
}

/* The outcome on all ranks: a device's steps run ahead. */
static muonshard_status group_step(muonshard_optimizer *o, const muonshard_step_args *args) {
    muonshard_step_result_info result = MUONSHARD_STEP_RESULT_INIT;
    const muonshard_status status = muonshard_step(o, args);
    return status || images_on_host() ? status : muonshard_step_result(o, 0, 1, &result);
}

/* Group 1 scales its gradients by `variant` hundredths. */
static void run_pairs(muonshard_comm *world, void *arg) {
    outcome *out = arg;
    const int rank = muonshard_comm_rank(world);
    pair_group *g = calloc(1, sizeof *g);
    g->world = world;
    g->first = rank / 2 * 2;
    float w[6] = {1, 2, 3, 4, 5, 6}, grad[6];
    for (int i = 0; i < 6; i++)
        grad[i] = (float)(rank + 1);
    muonshard_comm *comm = NULL;
    device_images im = {.optimizer = NULL};
    muonshard_step_args args = MUONSHARD_STEP_ARGS_INIT;
    args.grad_scale = rank / 2 ? out->variant / 100.0 : 1.0;
    muonshard_step_result_info result = MUONSHARD_STEP_RESULT_INIT;
    muonshard_status status = open_group(g, &comm, &im, w, grad);
    muonshard_optimizer *o = im.optimizer;
    status = status ? status : muonshard_step(o, &args);
    status = status ? status : muonshard_step_result(o, 0, 1, &result);
    out->number[rank] = result.grad_norm;
    /* Two ranks of different groups fail: all hear of the lower. */
    args.lr = rank == 1 || rank == 2 ? -rank : 0.1;
    const char *text = images_on_host() || rank == 1 ? "lr is -1"
                       : rank == 2                   ? "lr is -2"
                                                     : "failed on rank ";
    out->digest[rank] = status == MUONSHARD_OK && group_step(o, &args) == MUONSHARD_ERR_ARGUMENT &&
                        strstr(muonshard_last_error(o), text) != NULL;
    args.lr = 0.1; /* and the handles live on */
    status = status ? status : group_step(o, &args);
    /* A gradient of one rank of one group: both groups skip. */
    images_download(&im, w);
    const float before = w[0];
    grad[3] = rank == 1 ? NAN : grad[3];
    images_upload(&im, grad);
    status = status ? status : muonshard_step(o, &args);
    status = status ? status : muonshard_step_result(o, 0, 1, &result);
    images_download(&im, w);
    out->digest[rank] = out->digest[rank] && result.skipped && result.count == 2 && w[0] == before;
    out->status[rank] = status;
    images_close(&im);
    muonshard_destroy(o);
    muonshard_comm_destroy(comm);
    free(g);
}

static void test_groups_of_ranks_agree(void **state) {
    (void)state;
    static const int hundredths[] = {100, 50}; /* grad_scale of the second group */
    for (size_t i = 0; i < 2; i++) {
        outcome out = {.variant = hundredths[i]};
        assert_int_equal(threads_run(4, run_pairs, &out), MUONSHARD_OK);
        const double a = 1.5, b = 3.5 * hundredths[i] / 100.0; /* means of the groups */
        for (int r = 0; r < 4; r++) {
            assert_int_equal(out.status[r], MUONSHARD_OK);
            assert_true(fabs(out.number[r] - sqrt(6 * (a * a + b * b))) < 1e-12);
            assert_int_equal(out.digest[r], 1);
        }
    }
}

/* ---- an error in a step that is deferred ---- */

static void deferred_error(rig *r, outcome *out) {
    const int rank = muonshard_comm_rank(r->comm);
    muonshard_step_args args = MUONSHARD_STEP_ARGS_INIT;
    args.defer = 1;
    if (rank == 1)
        args.lr = -1;
    const uint64_t before = rig_digest(r);
    out->number[rank] = muonshard_step(r->optimizer, &args);
    rig_pull(r);
    r->status = rig_digest(r) == before ? MUONSHARD_OK : MUONSHARD_ERR_INTERNAL;
    args.lr = 0.1;
    if (r->status == MUONSHARD_OK)
        r->status = muonshard_step(r->optimizer, &args);
    muonshard_step_result_info result = MUONSHARD_STEP_RESULT_INIT;
    if (r->status == MUONSHARD_OK)
        r->status = muonshard_step_result(r->optimizer, 0, 1, &result);
    if (result.step != 2 || result.count != 1)
        r->status = MUONSHARD_ERR_INTERNAL;
}

static void test_an_error_is_not_deferred(void **state) {
    (void)state;
    const rig_case setup = {.tensors = rig_zoo, .count = rig_zoo_count, .yaml = ""};
    outcome out = {.setup = &setup, .run = deferred_error};
    digest_of(3, &out);
    for (int r = 0; r < 3; r++)
        assert_true(out.number[r] ==
                    (images_on_host() || r == 1 ? MUONSHARD_ERR_ARGUMENT : MUONSHARD_OK));
}

/* ---- memory that a transport may still write to ---- */

/* One of two ranks, whose messages arrive at once and are what the other says too, and whose step's
 * never do. */
static muonshard_status stuck_start(muonshard_comm *comm, comm_ticket *ticket) {
    const comm_request *request = &ticket->request;
    for (size_t i = 0; !request->backend && i < request->part_count; i++)
        for (int r = 0;
             request->kind == COMM_ALL_GATHER && request->parts[i].bytes && r < comm->size; r++)
            memcpy((char *)request->parts[i].recv + (size_t)r * request->parts[i].bytes,
                   request->parts[i].send, request->parts[i].bytes);
    return MUONSHARD_OK;
}

static muonshard_status stuck_test(muonshard_comm *comm, comm_ticket *ticket, bool *done) {
    (void)comm;
    *done = !ticket->request.backend;
    return MUONSHARD_OK;
}

static void stuck_destroy(muonshard_comm *comm) {
    (void)comm;
}

static const comm_ops stuck_ops = {.name = "stuck",
                                   .native_reduce_scatter = true,
                                   .writes_after_death = true,
                                   .start = stuck_start,
                                   .test = stuck_test,
                                   .destroy = stuck_destroy};

static const backend_ops *host;
static size_t freed;

static void count_free(backend *self, void *memory) {
    freed++;
    host->free(self, memory);
}

static void test_a_transport_keeps_its_memory(void **state) {
    (void)state;
    if (!images_on_host())
        skip();
    const rig_case setup = {
        .tensors = rig_zoo, .count = 3, .yaml = "{timeout: 0.05, first_timeout: 0.05}"};
    for (int half_way = 0; half_way < 3; half_way++) { /* 2: nothing was begun */
        muonshard_comm *comm = NULL;
        assert_int_equal(comm_create(&stuck_ops, NULL, 0, 2, NULL, &comm), MUONSHARD_OK);
        rig r;
        rig_open(&r, comm, &setup);
        assert_int_equal(r.status, MUONSHARD_OK);
        host = r.optimizer->backend->ops;
        backend_ops counting = *host;
        counting.free = count_free;
        r.optimizer->backend->ops = &counting;
        if (half_way == 1)
            for (int t = 2; t >= 0; t--)
                assert_int_equal(muonshard_grad_ready(r.optimizer, t, 0, 1), MUONSHARD_OK);
        else if (half_way == 0)
            assert_int_equal(muonshard_step(r.optimizer, NULL), MUONSHARD_ERR_TIMEOUT);
        const workspace kept = r.optimizer->memory;
        freed = 0;
        rig_close(&r);
        if (half_way < 2) {
            assert_int_equal(freed, 0);
            void *memory[] = {
                kept.owned,         kept.momentum,       kept.pack,     kept.exchange, kept.zeros,
                kept.flat_m,        kept.flat_v,         kept.flat_w,   kept.word,     kept.words,
                kept.newton_schulz, kept.totals,         kept.active,   kept.values,   kept.record,
                kept.sum_index,     kept.skip_if_absent, kept.variance, kept.masters,  kept.factors,
                kept.flat_sent};
            for (size_t i = 0; i < sizeof memory / sizeof memory[0]; i++)
                host->free(NULL, memory[i]);
        } else {
            assert_true(freed > 0);
        }
        muonshard_comm_destroy(comm);
    }
}

/* ---- what is deferred and what isn't ---- */

/* Rank 0 comes back with its last all-gather under way: rank 1 needs nothing more of it. */
static void one_defers(rig *r, outcome *out) {
    (void)out;
    const int rank = muonshard_comm_rank(r->comm);
    muonshard_step_args args = MUONSHARD_STEP_ARGS_INIT;
    args.defer = rank == 0;
    rig_gradients(r);
    const muonshard_status status = muonshard_step(r->optimizer, &args);
    threads_barrier(r->comm);
    r->status = status ? status : muonshard_tensor_wait(r->optimizer, 0, 0, 6, NULL);
}

static void test_a_deferred_step_has_sent_all_it_sends(void **state) {
    (void)state;
    const rig_tensor stack = {RIG_TENSOR("stack", MUONSHARD_ROLE_MATRIX, 3, 6, 4, 4)};
    const rig_case setup = {
        .tensors = &stack, .count = 1, .yaml = "{batch_bytes: 1, timeout: 1, first_timeout: 1}"};
    outcome out = {.setup = &setup, .run = one_defers};
    digest_of(2, &out);
}

/* Six entries, a batch each: the last two wait for their tensor_wait, then both are new. */
static void wait_for_two(rig *r, outcome *out) {
    float *w = r->params[0], before[6 * 16];
    memcpy(before, w, sizeof before);
    muonshard_step_args args = MUONSHARD_STEP_ARGS_INIT;
    args.defer = 1;
    rig_gradients(r);
    r->status = muonshard_step(r->optimizer, &args);
    out->number[0] = w[4 * 16] == before[4 * 16] && w[5 * 16] == before[5 * 16];
    if (r->status == MUONSHARD_OK)
        r->status = muonshard_tensor_wait(r->optimizer, 0, 4, 2, NULL);
    out->number[1] = w[4 * 16] != before[4 * 16] && w[5 * 16] != before[5 * 16];
}

static void test_tensor_wait_waits_for_all_its_entries(void **state) {
    (void)state;
    if (!images_on_host())
        skip();
    const rig_tensor stack = {RIG_TENSOR("stack", MUONSHARD_ROLE_MATRIX, 3, 6, 4, 4)};
    const rig_case setup = {.tensors = &stack, .count = 1, .yaml = "batch_bytes: 1"};
    outcome out = {.setup = &setup, .run = wait_for_two};
    digest_of(1, &out);
    assert_true(out.number[0] == 1); /* the last two batches are what is deferred */
    assert_true(out.number[1] == 1);
}

/* ---- an error of one rank before the step ---- */

static void commit_badly(muonshard_comm *comm, void *arg) {
    outcome *out = arg;
    const int rank = muonshard_comm_rank(comm);
    rig r;
    rig_prepare(&r, comm, out->setup);
    const muonshard_sync_params sync = rank == 1 ? (muonshard_sync_params)7 : MUONSHARD_SYNC_CHECK;
    out->status[rank] = muonshard_commit(r.optimizer, sync);
    out->digest[rank] = strstr(muonshard_last_error(r.optimizer), "sync_params 7") != NULL;
    if (muonshard_commit(r.optimizer, MUONSHARD_SYNC_CHECK) != MUONSHARD_OK)
        out->status[rank] = MUONSHARD_ERR_INTERNAL; /* nothing was half applied */
    rig_close(&r);
}

static void create_without_a_place(muonshard_comm *comm, void *arg) {
    outcome *out = arg;
    const int rank = muonshard_comm_rank(comm);
    muonshard_config *config = NULL;
    muonshard_optimizer *o = NULL;
    muonshard_config_create(&config);
    out->status[rank] = muonshard_create(comm, config, NULL, rank == 1 ? NULL : &o);
    out->digest[rank] = strstr(muonshard_comm_last_error(comm), "optimizer is NULL") != NULL;
    muonshard_destroy(o);
    muonshard_config_destroy(config);
}

static void test_bad_calls_of_one_rank_are_everybodys(void **state) {
    (void)state;
    void (*const calls[])(muonshard_comm *, void *) = {commit_badly, create_without_a_place};
    const rig_case setup = {.tensors = rig_zoo, .count = rig_zoo_count, .yaml = ""};
    for (size_t i = 0; i < 2; i++) {
        outcome out = {.setup = &setup};
        assert_int_equal(threads_run(3, calls[i], &out), MUONSHARD_OK);
        for (int r = 0; r < 3; r++) {
            assert_int_equal(out.status[r], MUONSHARD_ERR_ARGUMENT);
            assert_int_equal(out.digest[r], 1);
        }
    }
}

/* A rank that doesn't come to commit: the others say where they were. */
static void one_stays_away(muonshard_comm *comm, void *arg) {
    outcome *out = arg;
    const int rank = muonshard_comm_rank(comm);
    rig r;
    rig_prepare(&r, comm, out->setup);
    if (rank == 0) {
        out->status[0] = muonshard_commit(r.optimizer, MUONSHARD_SYNC_CHECK);
        out->digest[0] = strstr(muonshard_last_error(r.optimizer), "commit: no completion") &&
                         strstr(muonshard_last_error(r.optimizer), "rank 1: step 0, outside");
    }
    rig_close(&r);
}

static void test_a_rank_that_does_not_commit_is_missed(void **state) {
    (void)state;
    const rig_case setup = {.tensors = rig_zoo, .count = 2, .yaml = ""};
    threads_options options = THREADS_OPTIONS_INIT;
    options.comm.timeout_s = 0.2;
    outcome out = {.setup = &setup};
    assert_int_equal(threads_run_with(&options, 2, one_stays_away, &out), MUONSHARD_OK);
    assert_int_equal(out.status[0], MUONSHARD_ERR_TIMEOUT);
    assert_int_equal(out.digest[0], 1);
}

/* Collectives at the end of a step have the step's deadline, and say what they are. */
static void one_skips_the_comparison(rig *r, outcome *out) {
    const int rank = muonshard_comm_rank(r->comm);
    muonshard_step_args args = MUONSHARD_STEP_ARGS_INIT;
    args.defer = rank == 1; /* never finished there */
    rig_gradients(r);
    r->status = muonshard_step(r->optimizer, &args);
    threads_barrier(r->comm);
    out->digest[rank] =
        strstr(muonshard_last_error(r->optimizer), "step 1, comparison of replicas") != NULL;
}

static void run_timed(muonshard_comm *comm, void *arg) {
    outcome *out = arg;
    const int rank = muonshard_comm_rank(comm);
    rig r;
    rig_open(&r, comm, out->setup);
    one_skips_the_comparison(&r, out);
    out->status[rank] = r.status;
    rig_close(&r);
}

static void test_the_comparison_has_the_steps_deadline(void **state) {
    (void)state;
    if (!images_on_host())
        skip();
    const rig_tensor one = {RIG_TENSOR("w", MUONSHARD_ROLE_MATRIX, 2, 4, 4)};
    const rig_case setup = {
        .tensors = &one, .count = 1, .yaml = "{check_replicas: 1, first_timeout: 0.3}"};
    outcome out = {.setup = &setup};
    assert_int_equal(threads_run(2, run_timed, &out), MUONSHARD_OK);
    assert_int_equal(out.status[0], MUONSHARD_ERR_TIMEOUT);
    assert_int_equal(out.digest[0], 1);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_nothing_is_read_before_it_is_marked),
        cmocka_unit_test(test_null_after_a_gradient_is_zero),
        cmocka_unit_test(test_a_sum_over_n_is_the_mean),
        cmocka_unit_test(test_replicas_are_compared_in_their_turn),
        cmocka_unit_test(test_groups_of_ranks_agree),
        cmocka_unit_test(test_an_error_is_not_deferred),
        cmocka_unit_test(test_a_transport_keeps_its_memory),
        cmocka_unit_test(test_a_deferred_step_has_sent_all_it_sends),
        cmocka_unit_test(test_tensor_wait_waits_for_all_its_entries),
        cmocka_unit_test(test_bad_calls_of_one_rank_are_everybodys),
        cmocka_unit_test(test_a_rank_that_does_not_commit_is_missed),
        cmocka_unit_test(test_the_comparison_has_the_steps_deadline),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
