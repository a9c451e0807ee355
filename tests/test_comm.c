/* Communicators that need no MPI: the contract on self, threads and callbacks, and how they fail.
 */
#include <math.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

#include "comm_contract.h"
#include "comm_threads.h"

/* After our headers: cmocka makes a macro of the name `fail`. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

enum { MAX_RANKS = 4 };

/* ---- the contract ---- */

typedef struct maker {
    const char *name;
    int min_ranks, max_ranks;
    double latency_s;
    void (*run)(muonshard_comm *threads, contract_run *run, const contract_case *one);
} maker;

static void run_self(muonshard_comm *threads, contract_run *run, const contract_case *one) {
    (void)threads;
    if (muonshard_comm_create_self(NULL, &run->comm)) {
        snprintf(run->failure, sizeof run->failure, "no communicator");
        return;
    }
    one->run(run);
    muonshard_comm_destroy(run->comm);
}

static void run_threads(muonshard_comm *threads, contract_run *run, const contract_case *one) {
    run->comm = threads;
    run->barrier = threads_barrier;
    one->run(run);
}

static int call_allgather(void *user, const void *send, void *recv, size_t bytes) {
    return muonshard_comm_allgather(user, send, recv, bytes);
}

static int call_barrier(void *user) {
    threads_barrier(user);
    return 0;
}

/* What the library sends by alltoallv are equal slots in order; anything else is an error here. */
static int call_alltoallv(void *user, const void *send, const size_t *send_bytes,
                          const size_t *send_offsets, void *recv, const size_t *recv_bytes,
                          const size_t *recv_offsets) {
    muonshard_comm *comm = user;
    for (int r = 0; r < comm->size; r++)
        if (send_bytes[r] != send_bytes[0] || recv_bytes[r] != send_bytes[0] ||
            send_offsets[r] != (size_t)r * send_bytes[0] || recv_offsets[r] != send_offsets[r])
            return 77;
    comm_part part = {.send = send, .recv = recv, .bytes = send_bytes[0]};
    comm_request request = {.kind = COMM_EXCHANGE, .parts = &part, .part_count = 1};
    return comm_run(comm, &request);
}

static void run_callbacks_over(muonshard_comm *threads, contract_run *run, const contract_case *one,
                               bool alltoallv) {
    muonshard_comm_callbacks call = MUONSHARD_COMM_CALLBACKS_INIT;
    call.rank = threads->rank;
    call.world_size = threads->size;
    call.user = threads;
    call.allgather = call_allgather;
    call.barrier = call_barrier;
    call.alltoallv = alltoallv ? call_alltoallv : NULL;
    if (muonshard_comm_create_callbacks(&call, NULL, &run->comm)) {
        snprintf(run->failure, sizeof run->failure, "no communicator");
        return;
    }
    one->run(run);
    muonshard_comm_destroy(run->comm);
}

static void run_callbacks(muonshard_comm *threads, contract_run *run, const contract_case *one) {
    run_callbacks_over(threads, run, one, true);
}

static void run_callbacks_allgather(muonshard_comm *threads, contract_run *run,
                                    const contract_case *one) {
    run_callbacks_over(threads, run, one, false);
}

static const maker makers[] = {
    {"self", 1, 1, 0.0, run_self},
    {"threads", 1, MAX_RANKS, 0.0, run_threads},
    {"threads_late", 2, 3, 0.002, run_threads},
    {"callbacks", 1, MAX_RANKS, 0.0, run_callbacks},
    {"callbacks_allgather", 1, MAX_RANKS, 0.0, run_callbacks_allgather},
};
enum { MAKERS = sizeof makers / sizeof *makers };

typedef struct contract_test {
    char name[64];
    const maker *maker;
    const contract_case *one;
    contract_run runs[MAX_RANKS];
} contract_test;

static void contract_rank(muonshard_comm *comm, void *arg) {
    contract_test *test = arg;
    test->maker->run(comm, &test->runs[comm->rank], test->one);
}

static void test_contract(void **state) {
    contract_test *test = *state;
    for (int ranks = test->maker->min_ranks; ranks <= test->maker->max_ranks; ranks++) {
        memset(test->runs, 0, sizeof test->runs);
        threads_options options = THREADS_OPTIONS_INIT;
        options.latency_s = test->maker->latency_s;
        assert_int_equal(threads_run_with(&options, ranks, contract_rank, test), MUONSHARD_OK);
        for (int r = 0; r < ranks; r++)
            if (test->runs[r].failure[0])
                fail_msg("%d ranks: %s", ranks, test->runs[r].failure);
    }
}

/* ---- deadlines ---- */

typedef struct failure_report {
    muonshard_status status, later, later_agree;
    double seconds;
    char text[1024], later_text[1024];
} failure_report;

typedef struct failure_test {
    failure_report reports[MAX_RANKS];
    atomic_int fatal_calls;
    atomic_int wrong_fatal_texts;
    muonshard_status expected;
} failure_test;

static void count_fatal(void *user, muonshard_status status, const char *message) {
    failure_test *test = user;
    atomic_fetch_add(&test->fatal_calls, 1);
    if (status != test->expected || !strstr(message, "rank"))
        atomic_fetch_add(&test->wrong_fatal_texts, 1);
}

/* Afterwards every call has to come back with the same status and text, and change nothing. */
static void report_failure(muonshard_comm *comm, failure_report *report, muonshard_status status,
                           double begin) {
    char byte = 0, bytes[MAX_RANKS];
    report->status = status;
    report->seconds = now_s() - begin;
    snprintf(report->text, sizeof report->text, "%s", muonshard_comm_last_error(comm));
    report->later = muonshard_comm_allgather(comm, &byte, bytes, 1);
    report->later_agree = muonshard_comm_agree(comm, MUONSHARD_ERR_IO, "something else");
    comm_die(comm, MUONSHARD_ERR_INTERNAL, "a second death");
    snprintf(report->later_text, sizeof report->later_text, "%s", muonshard_comm_last_error(comm));
}

static void last_rank_stays_away(muonshard_comm *comm, void *arg) {
    failure_test *test = arg;
    bool away = comm->rank == comm->size - 1;
    comm_mark(comm, 12, away ? "momentum batch %d" : "all-gather batch %d", away ? 1 : 3);
    threads_barrier(comm);
    if (away)
        return;
    double begin = now_s();
    int mine = 0, all[MAX_RANKS];
    report_failure(comm, &test->reports[comm->rank], comm_allgather(comm, &mine, all, sizeof mine),
                   begin);
}

static void test_timeout(void **state) {
    (void)state;
    failure_test test = {.expected = MUONSHARD_ERR_TIMEOUT};
    threads_options options = THREADS_OPTIONS_INIT;
    options.comm.timeout_s = 0.3;
    options.comm.on_fatal = count_fatal;
    options.comm.fatal_user = &test;
    assert_int_equal(threads_run_with(&options, 3, last_rank_stays_away, &test), MUONSHARD_OK);
    for (int r = 0; r < 2; r++) {
        const failure_report *report = &test.reports[r];
        char own[64];
        snprintf(own, sizeof own, "rank %d of 3 (host ", r);
        assert_int_equal(report->status, MUONSHARD_ERR_TIMEOUT);
        assert_true(report->seconds >= 0.3 && report->seconds < 1.3);
        assert_ptr_equal(strstr(report->text, own), report->text);
        assert_non_null(strstr(report->text, "): step 12, all-gather batch 3: no completion within "
                                             "0.3 s; rank 2: step 12, momentum batch 1"));
        assert_int_equal(report->later, MUONSHARD_ERR_TIMEOUT);
        assert_int_equal(report->later_agree, MUONSHARD_ERR_TIMEOUT);
        assert_string_equal(report->later_text, report->text);
    }
    assert_int_equal(test.fatal_calls, 2);
    assert_int_equal(test.wrong_fatal_texts, 0);
}

/* ---- ranks that start different operations ---- */

typedef struct mismatch_test {
    int variant;
    muonshard_status status[2];
    char text[2][1024];
    unsigned char recv[2][64];
} mismatch_test;

enum { MISMATCH_VARIANTS = 4 };

static void start_other_operations(muonshard_comm *comm, void *arg) {
    mismatch_test *test = arg;
    static const unsigned char send[64] = {1};
    bool odd = comm->rank == 1;
    comm_part parts[2] = {{.send = send, .recv = test->recv[comm->rank], .bytes = 8},
                          {.send = send, .recv = test->recv[comm->rank] + 32, .bytes = 8}};
    comm_request request = {.kind = COMM_ALL_GATHER, .parts = parts, .part_count = 1};
    switch (test->variant) {
    case 0: parts[0].bytes = odd ? 16 : 8; break;
    case 1: request.kind = odd ? COMM_EXCHANGE : COMM_ALL_GATHER; break;
    case 2: request.part_count = odd ? 2 : 1; break;
    default:
        request.kind = COMM_BROADCAST;
        request.root = odd;
        break;
    }
    test->status[comm->rank] = comm_run(comm, &request);
    snprintf(test->text[comm->rank], sizeof test->text[0], "%s", comm->error.text);
}

static void test_mismatch(void **state) {
    (void)state;
    for (int variant = 0; variant < MISMATCH_VARIANTS; variant++) {
        mismatch_test test = {.variant = variant};
        assert_int_equal(threads_run(2, start_other_operations, &test), MUONSHARD_OK);
        static const unsigned char untouched[64];
        for (int r = 0; r < 2; r++) {
            assert_int_equal(test.status[r], MUONSHARD_ERR_MISMATCH);
            assert_non_null(strstr(test.text[r], "operation 0"));
            assert_memory_equal(test.recv[r], untouched, sizeof untouched);
        }
    }
}

/* ---- latency ---- */

static void measure_latency(muonshard_comm *comm, void *arg) {
    double *seconds = arg;
    double begin = now_s();
    int mine = comm->rank, all[MAX_RANKS];
    muonshard_status status = comm_allgather(comm, &mine, all, sizeof mine);
    seconds[comm->rank] = status || all[1] != 1 ? -1.0 : now_s() - begin;
}

static void test_latency(void **state) {
    (void)state;
    double seconds[2];
    threads_options options = THREADS_OPTIONS_INIT;
    options.latency_s = 0.05;
    assert_int_equal(threads_run_with(&options, 2, measure_latency, seconds), MUONSHARD_OK);
    assert_true(seconds[0] >= 0.05 && seconds[1] >= 0.05);
}

/* ---- options and logs ---- */

typedef struct lines {
    int count, fatal;
    muonshard_log_level level;
    char text[1024];
} lines;

static void keep_line(void *user, muonshard_log_level level, const char *message) {
    lines *kept = user;
    kept->count++;
    kept->level = level;
    snprintf(kept->text, sizeof kept->text, "%s", message);
}

static void keep_fatal(void *user, muonshard_status status, const char *message) {
    (void)status;
    lines *kept = user;
    kept->fatal++;
    snprintf(kept->text, sizeof kept->text, "%s", message);
}

static muonshard_comm_options logging(lines *kept) {
    muonshard_comm_options options = MUONSHARD_COMM_OPTIONS_INIT;
    options.log = keep_line;
    options.log_user = kept;
    return options;
}

static void test_options(void **state) {
    (void)state;
    static const double bad[] = {0.0, -1.0, NAN, INFINITY};
    muonshard_comm *comm = (muonshard_comm *)&bad;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        lines kept = {0};
        muonshard_comm_options options = logging(&kept);
        options.timeout_s = bad[i];
        assert_int_equal(muonshard_comm_create_self(&options, &comm), MUONSHARD_ERR_ARGUMENT);
        assert_null(comm);
        assert_int_equal(kept.count, 1);
        assert_int_equal(kept.level, MUONSHARD_LOG_ERROR);
        assert_non_null(strstr(kept.text, "timeout_s"));
    }
    muonshard_comm_options options = MUONSHARD_COMM_OPTIONS_INIT;
    options.size = 0;
    assert_int_equal(muonshard_comm_create_self(&options, &comm), MUONSHARD_ERR_ARGUMENT);
    assert_int_equal(muonshard_comm_create_self(NULL, NULL), MUONSHARD_ERR_ARGUMENT);

    /* An older, shorter struct: what it doesn't have keeps its default. */
    options.size = offsetof(muonshard_comm_options, timeout_s);
    options.timeout_s = -5.0;
    assert_int_equal(muonshard_comm_create_self(&options, &comm), MUONSHARD_OK);
    assert_true(comm->options.timeout_s == 300.0);
    muonshard_comm_destroy(comm);
    muonshard_comm_destroy(NULL);

    assert_int_equal(muonshard_comm_rank(NULL), -1);
    assert_int_equal(muonshard_comm_size(NULL), 0);
    assert_non_null(muonshard_comm_last_error(NULL));
    assert_int_equal(muonshard_comm_agree(NULL, MUONSHARD_OK, NULL), MUONSHARD_ERR_ARGUMENT);
    assert_int_equal(muonshard_comm_broadcast(NULL, &options, 1, 0), MUONSHARD_ERR_ARGUMENT);
    assert_int_equal(muonshard_comm_allgather(NULL, &options, &comm, 1), MUONSHARD_ERR_ARGUMENT);
}

/* One message, one way: to on_fatal where there is one, else to the log. */
static void test_death_is_told_once(void **state) {
    (void)state;
    lines kept = {0};
    muonshard_comm_options options = logging(&kept);
    muonshard_comm *comm;
    assert_int_equal(muonshard_comm_create_self(&options, &comm), MUONSHARD_OK);
    assert_int_equal(comm_die(comm, MUONSHARD_ERR_COMM, "cable %d", 7), MUONSHARD_ERR_COMM);
    assert_int_equal(comm_die(comm, MUONSHARD_ERR_TIMEOUT, "again"), MUONSHARD_ERR_COMM);
    assert_int_equal(kept.count, 1);
    assert_string_equal(kept.text, "cable 7");
    assert_string_equal(muonshard_comm_last_error(comm), "cable 7");
    muonshard_comm_destroy(comm);

    memset(&kept, 0, sizeof kept);
    options.on_fatal = keep_fatal;
    options.fatal_user = &kept;
    assert_int_equal(muonshard_comm_create_self(&options, &comm), MUONSHARD_OK);
    comm_die(comm, MUONSHARD_ERR_COMM, "cable %d", 8);
    comm_die(comm, MUONSHARD_ERR_COMM, "cable %d", 9);
    assert_int_equal(kept.fatal, 1);
    assert_int_equal(kept.count, 0);
    assert_string_equal(kept.text, "cable 8");
    comm_mark(comm, 3, "elsewhere"); /* others go on reading where it died */
    assert_string_equal(comm->position.phase, "create communicator");
    error_text error = {"own"};
    assert_int_equal(comm_agree(comm, MUONSHARD_ERR_IO, &error), MUONSHARD_ERR_COMM);
    assert_string_equal(error.text, "cable 8");
    muonshard_comm_destroy(comm);
}

/* ---- callbacks ---- */

static int one_rank_allgather(void *user, const void *send, void *recv, size_t bytes) {
    int *fails = user;
    memcpy(recv, send, bytes);
    return *fails;
}

static int one_rank_barrier(void *user) {
    (void)user;
    return 0;
}

static muonshard_comm_callbacks one_rank(int *fails) {
    muonshard_comm_callbacks call = MUONSHARD_COMM_CALLBACKS_INIT;
    call.user = fails;
    call.allgather = one_rank_allgather;
    call.barrier = one_rank_barrier;
    return call;
}

static void refuse_callbacks(const muonshard_comm_callbacks *call, const char *what) {
    lines kept = {0};
    muonshard_comm_options options = logging(&kept);
    muonshard_comm *comm = NULL;
    assert_int_equal(muonshard_comm_create_callbacks(call, &options, &comm),
                     MUONSHARD_ERR_ARGUMENT);
    assert_null(comm);
    assert_int_equal(kept.count, 1);
    assert_non_null(strstr(kept.text, what));
}

static void test_bad_callbacks(void **state) {
    (void)state;
    int fails = 0;
    refuse_callbacks(NULL, "callbacks is NULL");
    muonshard_comm_callbacks call = one_rank(&fails);
    call.rank = -1;
    refuse_callbacks(&call, "rank is -1");
    call.rank = 1;
    refuse_callbacks(&call, "rank is 1; it has to be in 0..0");
    call = one_rank(&fails);
    call.world_size = 0;
    refuse_callbacks(&call, "world_size is 0");
    call = one_rank(&fails);
    call.allgather = NULL;
    refuse_callbacks(&call, "allgather is NULL");
    call = one_rank(&fails);
    call.barrier = NULL;
    refuse_callbacks(&call, "barrier is NULL");
    call = one_rank(&fails);
    call.size = 1;
    refuse_callbacks(&call, "size is 1");
    assert_int_equal(muonshard_comm_create_callbacks(&call, NULL, NULL), MUONSHARD_ERR_ARGUMENT);
}

static void test_callback_failure(void **state) {
    (void)state;
    lines kept = {0};
    int fails = 0;
    muonshard_comm_options options = logging(&kept);
    options.on_fatal = keep_fatal;
    options.fatal_user = &kept;
    muonshard_comm_callbacks call = one_rank(&fails);
    muonshard_comm *comm;
    assert_int_equal(muonshard_comm_create_callbacks(&call, &options, &comm), MUONSHARD_OK);
    int mine = 5, all = 0;
    assert_int_equal(muonshard_comm_allgather(comm, &mine, &all, sizeof mine), MUONSHARD_OK);
    assert_int_equal(all, 5);
    fails = 3;
    assert_int_equal(muonshard_comm_broadcast(comm, &mine, sizeof mine, 0), MUONSHARD_ERR_COMM);
    assert_int_equal(kept.fatal, 1);
    assert_non_null(strstr(kept.text, "broadcast: the allgather callback returned 3"));
    fails = 0;
    assert_int_equal(muonshard_comm_allgather(comm, &mine, &all, sizeof mine), MUONSHARD_ERR_COMM);
    assert_int_equal(kept.fatal, 1);
    muonshard_comm_destroy(comm);
}

/* The slow way is taken with a warning, once. */
static void test_slow_exchange_is_logged(void **state) {
    (void)state;
    lines kept = {0};
    int fails = 0;
    muonshard_comm_options options = logging(&kept);
    muonshard_comm_callbacks call = one_rank(&fails);
    muonshard_comm *comm;
    assert_int_equal(muonshard_comm_create_callbacks(&call, &options, &comm), MUONSHARD_OK);
    float send = 2.0f, recv = 0.0f, scratch = 0.0f;
    comm_part part = {.send = &send, .recv = &recv, .scratch = &scratch, .bytes = sizeof send};
    comm_request request = {.kind = COMM_REDUCE_SCATTER,
                            .parts = &part,
                            .part_count = 1,
                            .backend = contract_backend()};
    for (int i = 0; i < 3; i++)
        assert_int_equal(comm_run(comm, &request), MUONSHARD_OK);
    assert_true(recv == 2.0f);
    assert_int_equal(kept.count, 1);
    assert_int_equal(kept.level, MUONSHARD_LOG_WARNING);
    assert_non_null(strstr(kept.text, "alltoallv"));
    muonshard_comm_destroy(comm);
}

/* ---- a backend that fails ---- */

static muonshard_status failing_sum(backend *self, const sum_ranks_args *args,
                                    backend_stream stream) {
    (void)args;
    (void)stream;
    snprintf(self->error.text, sizeof self->error.text, "sum is out of order");
    return MUONSHARD_ERR_INTERNAL;
}

static void test_failing_sum(void **state) {
    (void)state;
    static const backend_ops ops = {.name = "failing", .sum_ranks = failing_sum};
    backend failing = {.ops = &ops};
    int fails = 0;
    muonshard_comm_callbacks call = one_rank(&fails);
    muonshard_comm *comm;
    assert_int_equal(muonshard_comm_create_callbacks(&call, NULL, &comm), MUONSHARD_OK);
    float send = 2.0f, recv = 0.0f, scratch = 0.0f;
    comm_part part = {.send = &send, .recv = &recv, .scratch = &scratch, .bytes = sizeof send};
    comm_request request = {
        .kind = COMM_REDUCE_SCATTER, .parts = &part, .part_count = 1, .backend = &failing};
    assert_int_equal(comm_run(comm, &request), MUONSHARD_ERR_INTERNAL);
    assert_non_null(strstr(comm->error.text, "sum is out of order"));
    /* Requests that can't be: no scratch, no backend, half a number. */
    part.scratch = NULL;
    assert_int_equal(comm_run(comm, &request), MUONSHARD_ERR_INTERNAL);
    assert_non_null(strstr(comm->error.text, "scratch"));
    part.scratch = &scratch;
    request.backend = NULL;
    assert_int_equal(comm_run(comm, &request), MUONSHARD_ERR_INTERNAL);
    part.bytes = 3;
    assert_int_equal(comm_run(comm, &request), MUONSHARD_ERR_INTERNAL);
    assert_non_null(strstr(comm->error.text, "3 bytes"));
    muonshard_comm_destroy(comm);
}

int main(void) {
    static contract_test contracts[MAKERS * CONTRACT_CASES];
    static struct CMUnitTest tests[MAKERS * CONTRACT_CASES];
    for (size_t i = 0; i < MAKERS * CONTRACT_CASES; i++) {
        contract_test *one = &contracts[i];
        one->maker = &makers[i / CONTRACT_CASES];
        one->one = &contract_cases[i % CONTRACT_CASES];
        snprintf(one->name, sizeof one->name, "%s/%s", one->maker->name, one->one->name);
        tests[i] = (struct CMUnitTest){one->name, test_contract, NULL, NULL, one};
    }
    const struct CMUnitTest failures[] = {
        cmocka_unit_test(test_timeout),
        cmocka_unit_test(test_mismatch),
        cmocka_unit_test(test_latency),
        cmocka_unit_test(test_options),
        cmocka_unit_test(test_death_is_told_once),
        cmocka_unit_test(test_bad_callbacks),
        cmocka_unit_test(test_callback_failure),
        cmocka_unit_test(test_slow_exchange_is_logged),
        cmocka_unit_test(test_failing_sum),
    };
    int failed = cmocka_run_group_tests_name("contract", tests, NULL, NULL);
    failed += cmocka_run_group_tests_name("failures", failures, NULL, NULL);
    return failed != 0;
}
