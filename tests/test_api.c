/* The public calls held wrong: NULL handles, wrong order, bad arguments, structs of other sizes;
 * and what the library must not do to its caller: print, set BLAS threads, leave anything half
 * applied. Public header only. */
#include <muonshard.h>
#include <cblas.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

typedef struct fixture {
    muonshard_comm *comm;
    muonshard_config *config;
    muonshard_optimizer *optimizer;
    float w[2 * 4 * 6 + 5], g[2 * 4 * 6], b[5], gb[5]; /* room for one more behind w */
} fixture;

static muonshard_tensor_desc stack_desc(fixture *f) {
    muonshard_tensor_desc d = MUONSHARD_TENSOR_DESC_INIT;
    d.name = "stack";
    d.role = MUONSHARD_ROLE_MATRIX;
    d.dims = 3;
    d.shape[0] = 2;
    d.shape[1] = 4;
    d.shape[2] = 6;
    d.param = f->w;
    d.grad = f->g;
    return d;
}

static muonshard_tensor_desc bias_desc(fixture *f) {
    muonshard_tensor_desc d = MUONSHARD_TENSOR_DESC_INIT;
    d.name = "bias";
    d.role = MUONSHARD_ROLE_ELEMENTWISE;
    d.dims = 1;
    d.shape[0] = 5;
    d.param = f->b;
    d.grad = f->gb;
    return d;
}

static int open_created(void **state) {
    fixture *f = calloc(1, sizeof *f);
    for (size_t i = 0; i < sizeof f->g / sizeof f->g[0]; i++)
        f->g[i] = sinf((float)i);
    if (muonshard_comm_create_self(NULL, &f->comm) || muonshard_config_create(&f->config) ||
        muonshard_create(f->comm, f->config, NULL, &f->optimizer))
        return -1;
    *state = f;
    return 0;
}

static int open_committed(void **state) {
    if (open_created(state))
        return -1;
    fixture *f = *state;
    const muonshard_tensor_desc stack = stack_desc(f), bias = bias_desc(f);
    return muonshard_add_tensor(f->optimizer, &stack, NULL) ||
           muonshard_add_tensor(f->optimizer, &bias, NULL) ||
           muonshard_commit(f->optimizer, MUONSHARD_SYNC_CHECK);
}

static int close_all(void **state) {
    fixture *f = *state;
    muonshard_destroy(f->optimizer);
    muonshard_config_destroy(f->config);
    muonshard_comm_destroy(f->comm);
    free(f);
    return 0;
}

static void test_null_handles(void **state) {
    (void)state;
    const muonshard_status bad = MUONSHARD_ERR_ARGUMENT;
    muonshard_optimizer *o = NULL;
    muonshard_comm *comm = NULL;
    assert_int_equal(muonshard_comm_create_self(NULL, NULL), bad);
    assert_int_equal(muonshard_comm_create_callbacks(NULL, NULL, &comm), bad);
    assert_int_equal(muonshard_comm_set_timeout(NULL, 1.0), bad);
    assert_int_equal(muonshard_comm_set_phase(NULL, "load"), bad);
    assert_int_equal(muonshard_comm_agree(NULL, MUONSHARD_OK, NULL), bad);
    assert_int_equal(muonshard_comm_broadcast(NULL, &comm, 1, 0), bad);
    assert_int_equal(muonshard_comm_allgather(NULL, &comm, &comm, 1), bad);
    assert_int_equal(muonshard_config_create(NULL), bad);
    assert_int_equal(muonshard_config_load_string(NULL, ""), bad);
    assert_int_equal(muonshard_config_set(NULL, "lr", "1"), bad);
    assert_int_equal(muonshard_create(NULL, NULL, NULL, &o), bad);
    assert_int_equal(muonshard_add_tensor(NULL, NULL, NULL), bad);
    assert_int_equal(muonshard_set_grad(NULL, 0, NULL), bad);
    assert_int_equal(muonshard_commit(NULL, MUONSHARD_SYNC_CHECK), bad);
    assert_int_equal(muonshard_grad_ready(NULL, 0, 0, 1), bad);
    assert_int_equal(muonshard_step(NULL, NULL), bad);
    assert_int_equal(muonshard_step_result(NULL, 0, 0, NULL), bad);
    assert_int_equal(muonshard_tensor_wait(NULL, 0, 0, 0, NULL), bad);
    assert_int_equal(muonshard_progress(NULL), bad);
    assert_int_equal(muonshard_stats(NULL, NULL), bad);
    assert_non_null(muonshard_last_error(NULL));
    assert_non_null(muonshard_comm_last_error(NULL));
    assert_non_null(muonshard_config_last_error(NULL));
    muonshard_destroy(NULL);
    muonshard_config_destroy(NULL);
    muonshard_comm_destroy(NULL);
}

static void test_create_without_config(void **state) {
    fixture *f = *state;
    muonshard_optimizer *o = f->optimizer;
    assert_int_equal(muonshard_create(f->comm, NULL, NULL, &o), MUONSHARD_ERR_ARGUMENT);
    assert_null(o);
    assert_non_null(strstr(muonshard_comm_last_error(f->comm), "config is NULL"));
    assert_int_equal(muonshard_create(f->comm, f->config, NULL, NULL), MUONSHARD_ERR_ARGUMENT);
}

static void test_explicit_backend_that_is_not_there(void **state) {
    fixture *f = *state;
    muonshard_optimizer *o = NULL;
    assert_int_equal(muonshard_config_set(f->config, "backend", "cuda"), MUONSHARD_OK);
    assert_int_equal(muonshard_create(f->comm, f->config, NULL, &o), MUONSHARD_ERR_UNAVAILABLE);
    assert_null(o);
    assert_non_null(strstr(muonshard_comm_last_error(f->comm), "no CUDA backend"));
}

/* What was asked for is never replaced. */
static void test_explicit_communicators_that_are_not_there(void **state) {
    fixture *f = *state;
    static const char *const choices[][2] = {{"nccl", "moves memory of GPUs; the backend is host"},
                                             {"mpi", "comm: mpi is configured; the program came "
                                                     "with a communicator over self"}};
    assert_int_equal(muonshard_config_set(f->config, "backend", "host"), MUONSHARD_OK);
    for (size_t i = 0; i < 2; i++) {
        muonshard_optimizer *o = NULL;
        assert_int_equal(muonshard_config_set(f->config, "comm", choices[i][0]), MUONSHARD_OK);
        assert_int_equal(muonshard_create(f->comm, f->config, NULL, &o), MUONSHARD_ERR_UNAVAILABLE);
        assert_null(o);
        assert_non_null(strstr(muonshard_comm_last_error(f->comm), choices[i][1]));
    }
}

static void test_the_order_of_calls(void **state) {
    fixture *f = *state;
    muonshard_stats_info stats = MUONSHARD_STATS_INIT;
    assert_int_equal(muonshard_step(f->optimizer, NULL), MUONSHARD_ERR_STATE);
    assert_int_equal(muonshard_grad_ready(f->optimizer, 0, 0, 1), MUONSHARD_ERR_STATE);
    assert_int_equal(muonshard_stats(f->optimizer, &stats), MUONSHARD_ERR_STATE);
    const muonshard_tensor_desc stack = stack_desc(f), bias = bias_desc(f);
    assert_int_equal(muonshard_add_tensor(f->optimizer, &stack, NULL), MUONSHARD_OK);
    assert_int_equal(muonshard_commit(f->optimizer, (muonshard_sync_params)7),
                     MUONSHARD_ERR_ARGUMENT);
    assert_int_equal(muonshard_commit(f->optimizer, MUONSHARD_SYNC_CHECK), MUONSHARD_OK);
    assert_int_equal(muonshard_add_tensor(f->optimizer, &bias, NULL), MUONSHARD_ERR_STATE);
    assert_non_null(strstr(muonshard_last_error(f->optimizer), "after muonshard_commit"));
    assert_int_equal(muonshard_commit(f->optimizer, MUONSHARD_SYNC_CHECK), MUONSHARD_ERR_STATE);
    assert_int_equal(muonshard_step(f->optimizer, NULL), MUONSHARD_OK);
}

/* Each refusal names what is wrong and leaves the registry as it was. */
static void test_bad_tensors(void **state) {
    fixture *f = *state;
    const int64_t splits[] = {2, 3}, good_splits[] = {1, 3}, zero[] = {0, 4};
    enum { CASES = 18 };
    muonshard_tensor_desc d[CASES];
    const char *part[CASES] = {
        "no name",       "role",          "dimensions",         "dimensions", "size 1",
        "param is NULL", "lr_multiplier", "decay_multiplier",   "group",      "row split 1",
        "row split 0",   "leave 0",       "row_splits is NULL", "dtype",      "too many",
        "form",          "null_grad",     "grad_dtype"};
    for (int i = 0; i < CASES; i++)
        d[i] = stack_desc(f);
    d[0].name = NULL;
    d[1].role = MUONSHARD_ROLE_UNSET;
    d[2].dims = 1;
    d[3].dims = MUONSHARD_MAX_DIMS + 1;
    d[4].shape[1] = 0;
    d[5].param = NULL;
    d[6].lr_multiplier = NAN;
    d[7].decay_multiplier = -1;
    d[8].group = -1;
    d[9].row_splits = splits;
    d[9].row_split_count = 2;
    d[10].row_splits = zero;
    d[10].row_split_count = 2;
    d[11].row_splits = good_splits;
    d[11].row_split_count = 1;
    part[11] = "leave 3";
    d[12].row_split_count = 2;
    d[13].dtype = (muonshard_dtype)9;
    d[14].shape[0] = d[14].shape[1] = d[14].shape[2] = INT64_MAX / 2;
    d[15].form = (muonshard_matrix_form)5;
    d[16].null_grad = (muonshard_null_grad)5;
    d[17].grad_dtype = (muonshard_dtype)9;
    for (int i = 0; i < CASES; i++) {
        int id = 77;
        const muonshard_status status = muonshard_add_tensor(f->optimizer, &d[i], &id);
        assert_int_equal(status,
                         i == 13 || i == 17 ? MUONSHARD_ERR_UNSUPPORTED : MUONSHARD_ERR_ARGUMENT);
        assert_int_equal(id, 77);
        if (!strstr(muonshard_last_error(f->optimizer), part[i]))
            fail_msg("case %d: '%s'", i, muonshard_last_error(f->optimizer));
    }
    muonshard_tensor_desc many = stack_desc(f); /* views whose bytes overflow size_t */
    many.shape[0] = ((int64_t)1 << 59) + 1;
    many.shape[1] = many.shape[2] = 1;
    assert_int_equal(muonshard_add_tensor(f->optimizer, &many, NULL), MUONSHARD_ERR_MEMORY);
    const muonshard_tensor_desc good = stack_desc(f);
    int id = -1;
    assert_int_equal(muonshard_add_tensor(f->optimizer, &good, &id), MUONSHARD_OK);
    assert_int_equal(id, 0);
    assert_int_equal(muonshard_add_tensor(f->optimizer, &good, &id), MUONSHARD_ERR_ARGUMENT);
    assert_non_null(strstr(muonshard_last_error(f->optimizer), "registered already"));
    muonshard_tensor_desc tied = bias_desc(f);
    tied.param = f->w + 47; /* its last element */
    assert_int_equal(muonshard_add_tensor(f->optimizer, &tied, &id), MUONSHARD_ERR_ARGUMENT);
    assert_non_null(strstr(muonshard_last_error(f->optimizer), "overlaps that of 'stack'"));
    tied.param = f->w + 48;
    assert_int_equal(muonshard_add_tensor(f->optimizer, &tied, &id), MUONSHARD_OK);
}

/* 16-bit parameters are taken where small updates survive, and refused, naming the keys, elsewhere.
 */
static void test_storage_of_16_bit_parameters(void **state) {
    fixture *f = *state;
    static const char *const masters[] = {"auto", "owner", "replicated", "none"};
    static const char *const gathers[] = {"auto", "updates", "params"};
    static const char *const roundings[] = {"nearest", "stochastic"};
    static const char *const refused[] = {
        "updates auto nearest",      "updates owner nearest",        "updates owner stochastic",
        "params replicated nearest", "params replicated stochastic", "auto none nearest",
        "updates none nearest",      "params none nearest"};
    uint16_t narrow[48], frozen[48]; /* never read: there is no commit */
    int refusals = 0;
    for (int k = 0; k < 24; k++) {
        char yaml[128], name[64];
        const char *m = masters[k % 4], *g = gathers[k / 4 % 3], *r = roundings[k / 12];
        snprintf(yaml, sizeof yaml, "{master: %s, gather: %s, rounding: %s}", m, g, r);
        snprintf(name, sizeof name, "%s %s %s", g, m, r);
        bool expected = true;
        for (size_t i = 0; i < sizeof refused / sizeof refused[0]; i++)
            expected = expected && strcmp(name, refused[i]) != 0;
        muonshard_config *config;
        muonshard_optimizer *o;
        assert_int_equal(muonshard_config_create(&config), MUONSHARD_OK);
        assert_int_equal(muonshard_config_load_string(config, yaml), MUONSHARD_OK);
        assert_int_equal(muonshard_create(f->comm, config, NULL, &o), MUONSHARD_OK);
        muonshard_tensor_desc d = stack_desc(f);
        assert_int_equal(muonshard_add_tensor(o, &d, NULL), MUONSHARD_OK); /* fp32: always */
        d.name = "narrow";
        d.dtype = MUONSHARD_BF16;
        d.param = narrow;
        const muonshard_status status = muonshard_add_tensor(o, &d, NULL);
        if (status != (expected ? MUONSHARD_OK : MUONSHARD_ERR_CONFIG))
            fail_msg("%s: %s", name, muonshard_status_string(status));
        if (!expected) {
            assert_non_null(strstr(muonshard_last_error(o), "'narrow' is bf16"));
            assert_non_null(strstr(muonshard_last_error(o), "master"));
        }
        refusals += !expected;
        d.name = "frozen";
        d.role = MUONSHARD_ROLE_FROZEN;
        d.param = frozen;
        assert_int_equal(muonshard_add_tensor(o, &d, NULL), MUONSHARD_OK);
        muonshard_destroy(o);
        muonshard_config_destroy(config);
    }
    assert_int_equal(refusals, sizeof refused / sizeof refused[0]);
}

static void test_sizes_of_structs(void **state) {
    fixture *f = *state;
    muonshard_step_args args = MUONSHARD_STEP_ARGS_INIT;
    args.size = 0;
    assert_int_equal(muonshard_step(f->optimizer, &args), MUONSHARD_ERR_ARGUMENT);
    /* An older caller's struct ends before lr_factor: what it doesn't know keeps its default. */
    struct {
        muonshard_step_args args;
    } old = {.args = MUONSHARD_STEP_ARGS_INIT};
    old.args.size = offsetof(muonshard_step_args, lr_factor);
    old.args.lr_factor = NAN;
    assert_int_equal(muonshard_step(f->optimizer, &old.args), MUONSHARD_OK);
    /* And gets no more than it has room for. */
    muonshard_step_result_info result = MUONSHARD_STEP_RESULT_INIT;
    result.size = offsetof(muonshard_step_result_info, skipped);
    result.skipped = 55;
    assert_int_equal(muonshard_step_result(f->optimizer, 0, 1, &result), MUONSHARD_OK);
    assert_int_equal(result.count, 1);
    assert_int_equal(result.skipped, 55);
}

static void test_bad_step_arguments_change_nothing(void **state) {
    fixture *f = *state;
    float before[2 * 4 * 6];
    memcpy(before, f->w, sizeof before);
    const double bad[] = {-1, INFINITY, 1e9};
    for (size_t i = 0; i < 3; i++) {
        muonshard_step_args args = MUONSHARD_STEP_ARGS_INIT;
        args.lr = bad[i];
        assert_int_equal(muonshard_step(f->optimizer, &args), MUONSHARD_ERR_ARGUMENT);
        assert_non_null(strstr(muonshard_last_error(f->optimizer), "lr"));
    }
    muonshard_step_args args = MUONSHARD_STEP_ARGS_INIT;
    args.grad_scale = 0.0;
    assert_int_equal(muonshard_step(f->optimizer, &args), MUONSHARD_ERR_ARGUMENT);
    args = (muonshard_step_args)MUONSHARD_STEP_ARGS_INIT;
    args.lr_factor = NAN;
    assert_int_equal(muonshard_step(f->optimizer, &args), MUONSHARD_ERR_ARGUMENT);
    args = (muonshard_step_args)MUONSHARD_STEP_ARGS_INIT;
    args.group_count = 1;
    assert_int_equal(muonshard_step(f->optimizer, &args), MUONSHARD_ERR_ARGUMENT);
    const muonshard_group_args group = {NAN, 2.0, NAN};
    args.groups = &group;
    assert_int_equal(muonshard_step(f->optimizer, &args), MUONSHARD_ERR_ARGUMENT);
    assert_memory_equal(before, f->w, sizeof before);
    assert_int_equal(muonshard_step(f->optimizer, NULL), MUONSHARD_OK);
    muonshard_step_result_info result = MUONSHARD_STEP_RESULT_INIT;
    assert_int_equal(muonshard_step_result(f->optimizer, 0, 0, &result), MUONSHARD_OK);
    assert_int_equal(result.count, 1); /* none of the refused ones */
}

static void test_grad_ready_ranges(void **state) {
    fixture *f = *state;
    muonshard_optimizer *o = f->optimizer;
    const muonshard_status bad = MUONSHARD_ERR_ARGUMENT;
    assert_int_equal(muonshard_grad_ready(o, 2, 0, 1), bad);
    assert_int_equal(muonshard_grad_ready(o, -1, 0, 1), bad);
    assert_int_equal(muonshard_grad_ready(o, 0, 0, 3), bad);
    assert_int_equal(muonshard_grad_ready(o, 0, 2, 1), bad);
    assert_int_equal(muonshard_grad_ready(o, 0, -1, 1), bad);
    assert_int_equal(muonshard_grad_ready(o, 0, INT64_MAX, INT64_MAX), bad);
    assert_int_equal(muonshard_grad_ready(o, 1, 0, 2), bad); /* no stack: one entry */
    assert_int_equal(muonshard_grad_ready(o, 0, 1, 1), MUONSHARD_OK);
    assert_int_equal(muonshard_grad_ready(o, 0, 0, 2), bad);
    assert_non_null(strstr(muonshard_last_error(o), "twice"));
    assert_int_equal(muonshard_set_grad(o, 0, f->g), MUONSHARD_ERR_STATE);
    assert_int_equal(muonshard_set_grad(o, 1, f->gb), MUONSHARD_OK);
    assert_int_equal(muonshard_grad_ready(o, 0, 0, 1),
                     MUONSHARD_OK); /* nothing of it was applied */
    assert_int_equal(muonshard_step(o, NULL), MUONSHARD_OK);
    assert_int_equal(muonshard_set_grad(o, 0, f->g), MUONSHARD_OK);
}

static void test_results_are_kept_and_forgotten(void **state) {
    fixture *f = *state;
    muonshard_step_result_info r = MUONSHARD_STEP_RESULT_INIT;
    assert_int_equal(muonshard_step_result(f->optimizer, 0, 1, &r), MUONSHARD_ERR_ARGUMENT);
    for (int i = 0; i < 20; i++)
        assert_int_equal(muonshard_step(f->optimizer, NULL), MUONSHARD_OK);
    assert_int_equal(muonshard_step_result(f->optimizer, 21, 0, &r), MUONSHARD_ERR_ARGUMENT);
    assert_int_equal(muonshard_step_result(f->optimizer, 4, 0, &r), MUONSHARD_ERR_ARGUMENT);
    assert_int_equal(muonshard_step_result(f->optimizer, 5, 0, &r), MUONSHARD_OK);
    assert_int_equal(r.step, 5);
    double sum = 0.0;
    for (size_t i = 0; i < sizeof f->g / sizeof f->g[0]; i++)
        sum += (double)f->g[i] * (double)f->g[i];
    assert_true(fabs(r.grad_norm - sqrt(sum)) < 1e-12);
    assert_int_equal(muonshard_step_result(f->optimizer, 5, 0, NULL), MUONSHARD_ERR_ARGUMENT);
}

static void test_deferred_step(void **state) {
    fixture *f = *state;
    muonshard_step_args args = MUONSHARD_STEP_ARGS_INIT;
    args.defer = 1;
    assert_int_equal(muonshard_step(f->optimizer, &args), MUONSHARD_OK);
    assert_int_equal(muonshard_grad_ready(f->optimizer, 0, 0, 1), MUONSHARD_ERR_STATE);
    assert_int_equal(muonshard_tensor_wait(f->optimizer, 0, 0, 3, NULL), MUONSHARD_ERR_ARGUMENT);
    assert_int_equal(muonshard_tensor_wait(f->optimizer, 0, 0, 2, NULL), MUONSHARD_OK);
    assert_true(f->w[0] != 0.0F);
    muonshard_step_result_info r = MUONSHARD_STEP_RESULT_INIT;
    assert_int_equal(muonshard_step_result(f->optimizer, 0, 1, &r), MUONSHARD_OK);
    assert_int_equal(muonshard_grad_ready(f->optimizer, 0, 0, 1), MUONSHARD_OK);
    assert_int_equal(muonshard_step(f->optimizer, &args), MUONSHARD_OK);
    assert_int_equal(muonshard_step(f->optimizer, NULL), MUONSHARD_OK); /* finishes it first */
}

static void test_stats_count(void **state) {
    fixture *f = *state;
    muonshard_stats_info s = MUONSHARD_STATS_INIT;
    assert_int_equal(muonshard_step(f->optimizer, NULL), MUONSHARD_OK);
    f->g[3] = NAN;
    assert_int_equal(muonshard_step(f->optimizer, NULL), MUONSHARD_OK);
    assert_int_equal(muonshard_stats(f->optimizer, &s), MUONSHARD_OK);
    assert_int_equal(s.steps, 2);
    assert_int_equal(s.skipped, 1);
    assert_int_equal(s.matrices, 2);
    assert_int_equal(s.matrices_owned, 2);
    assert_true(s.imbalance == 1.0);
    /* The Gram form of [4, 6], which has half as many columns again, with one restart: in m^3 20 +
     * 3 (1 + 1) (n/m - 1) for 5 steps; 2 matrices, one step taken. */
    assert_true(s.ns_flops == 2 * 64.0 * (20.0 + 6.0 * 0.5));
    assert_true(s.bytes_state >= 2 * 24 * 4 && s.bytes_workspace > 0);
    assert_true(s.time_step > 0.0);
}

/* Everything a program might find on its terminal or in its BLAS afterwards. */
static void test_the_library_is_a_quiet_guest(void **state) {
    (void)state;
    char name[] = "/tmp/muonshard_quiet_XXXXXX";
    const int file = mkstemp(name), out = dup(1), err = dup(2),
              threads = openblas_get_num_threads();
    fflush(stdout);
    fflush(stderr);
    dup2(file, 1);
    dup2(file, 2);
    void *fixture_state = NULL;
    int failed = open_committed(&fixture_state);
    fixture *f = fixture_state;
    failed = failed || muonshard_step(f->optimizer, NULL) != MUONSHARD_OK;
    failed = failed || muonshard_grad_ready(f->optimizer, 9, 0, 1) != MUONSHARD_ERR_ARGUMENT;
    failed = failed || muonshard_config_set(f->config, "no", "1") != MUONSHARD_ERR_CONFIG;
    close_all(&fixture_state);
    fflush(stdout);
    fflush(stderr);
    dup2(out, 1);
    dup2(err, 2);
    const off_t written = lseek(file, 0, SEEK_END);
    close(file);
    unlink(name);
    assert_false(failed);
    assert_int_equal(written, 0);
    assert_int_equal(openblas_get_num_threads(), threads);
}

/* The latest result while the next step is being marked ready is still the last step's. */
static void test_result_while_gradients_come_in(void **state) {
    fixture *f = *state;
    muonshard_step_result_info r = MUONSHARD_STEP_RESULT_INIT;
    assert_int_equal(muonshard_step(f->optimizer, NULL), MUONSHARD_OK);
    assert_int_equal(muonshard_grad_ready(f->optimizer, 0, 0, 1), MUONSHARD_OK);
    for (int wait = 0; wait < 2; wait++) {
        assert_int_equal(muonshard_step_result(f->optimizer, 0, wait, &r), MUONSHARD_OK);
        assert_int_equal(r.step, 1);
        assert_int_equal(muonshard_step_result(f->optimizer, 2, wait, &r), MUONSHARD_ERR_ARGUMENT);
    }
}

/* An error is no skip. */
static void test_failed_steps_are_not_skipped_ones(void **state) {
    fixture *f = *state;
    muonshard_step_args args = MUONSHARD_STEP_ARGS_INIT;
    args.lr = -1.0;
    assert_int_equal(muonshard_step(f->optimizer, &args), MUONSHARD_ERR_ARGUMENT);
    muonshard_stats_info s = MUONSHARD_STATS_INIT;
    assert_int_equal(muonshard_stats(f->optimizer, &s), MUONSHARD_OK);
    assert_int_equal(s.steps, 1);
    assert_int_equal(s.skipped, 0);
}

/* min(1, clip_norm / (norm + 1e-6)) where the 1e-6 counts; and what grad_scale makes overflow is
 * as infinite as what was so before. */
static void test_clip_factor_and_overflow(void **state) {
    fixture *f = *state;
    muonshard_optimizer *o = NULL;
    muonshard_step_result_info r = MUONSHARD_STEP_RESULT_INIT;
    assert_int_equal(muonshard_config_set(f->config, "clip_norm", "1e-6"), MUONSHARD_OK);
    assert_int_equal(muonshard_create(f->comm, f->config, NULL, &o), MUONSHARD_OK);
    muonshard_tensor_desc bias = bias_desc(f);
    f->gb[2] = 2e-6F;
    assert_int_equal(muonshard_add_tensor(o, &bias, NULL), MUONSHARD_OK);
    assert_int_equal(muonshard_commit(o, MUONSHARD_SYNC_CHECK), MUONSHARD_OK);
    assert_int_equal(muonshard_step(o, NULL), MUONSHARD_OK);
    assert_int_equal(muonshard_step_result(o, 0, 0, &r), MUONSHARD_OK);
    assert_true(fabs(r.clip_factor - 1.0 / 3.0) < 1e-6);
    muonshard_step_args args = MUONSHARD_STEP_ARGS_INIT;
    args.grad_scale = 1e300;
    const float before = f->b[2];
    assert_int_equal(muonshard_step(o, &args), MUONSHARD_OK);
    assert_int_equal(muonshard_step_result(o, 0, 0, &r), MUONSHARD_OK);
    assert_true(r.skipped && r.count == 1 && f->b[2] == before);
    muonshard_destroy(o);
}

int main(void) {
#define CREATED(test)   cmocka_unit_test_setup_teardown(test, open_created, close_all)
#define COMMITTED(test) cmocka_unit_test_setup_teardown(test, open_committed, close_all)
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_null_handles),
        CREATED(test_create_without_config),
        CREATED(test_explicit_backend_that_is_not_there),
        CREATED(test_explicit_communicators_that_are_not_there),
        CREATED(test_the_order_of_calls),
        CREATED(test_bad_tensors),
        CREATED(test_storage_of_16_bit_parameters),
        COMMITTED(test_sizes_of_structs),
        COMMITTED(test_bad_step_arguments_change_nothing),
        COMMITTED(test_grad_ready_ranges),
        COMMITTED(test_results_are_kept_and_forgotten),
        COMMITTED(test_deferred_step),
        COMMITTED(test_stats_count),
        COMMITTED(test_result_while_gradients_come_in),
        COMMITTED(test_failed_steps_are_not_skipped_ones),
        CREATED(test_clip_factor_and_overflow),
        cmocka_unit_test(test_the_library_is_a_quiet_guest),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
