/* What the tracer says ran is what the schedule says: every operation of every step, in an order
 * that was possible. */
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "comm_threads.h"
#include "optim/optimizer.h"
#include "step_rig.h"

#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

enum { RANKS = 2, STEPS = 3 };
#define LATENCY_S 2e-3

typedef struct traced {
    char yaml[256];
    char labels[RANKS][256][48];
    int streams[RANKS][256], waits_on[RANKS][256];
    size_t count[RANKS];
    double elapsed_us; /* from before the files were opened to after they were closed */
    muonshard_status status[RANKS];
    muonshard_stats_info stats[RANKS];
} traced;

static void run(muonshard_comm *comm, void *arg) {
    traced *t = arg;
    const int rank = muonshard_comm_rank(comm);
    const rig_case setup = {
        .tensors = rig_zoo, .count = rig_zoo_count, .yaml = t->yaml, .overlap = RIG_READY_BACKWARD};
    rig r;
    rig_open(&r, comm, &setup);
    const schedule *s = &r.optimizer->schedule;
    t->count[rank] = s->count;
    for (size_t i = 0; i < s->count && i < 256; i++) {
        op_label(&s->ops[i], t->labels[rank][i], sizeof t->labels[rank][i]);
        t->streams[rank][i] = (int)s->ops[i].stream;
        t->waits_on[rank][i] = s->ops[i].waits_on;
    }
    for (int i = 0; i < STEPS; i++) {
        rig_gradients(&r);
        rig_step(&r);
    }
    t->status[rank] = r.status;
    t->stats[rank] = (muonshard_stats_info)MUONSHARD_STATS_INIT;
    if (r.status == MUONSHARD_OK)
        muonshard_stats(r.optimizer, &t->stats[rank]);
    rig_close(&r);
}

/* What took time, and what was waited for, is no more than there was; on the host, grad_ready's
 * part is not in time_step. */
static void check_stats(const muonshard_stats_info *s) {
    const double times[] = {s->time_pack,        s->time_reduce_scatter, s->time_agree,
                            s->time_momentum,    s->time_orthogonalize,  s->time_all_gather,
                            s->time_elementwise, s->time_apply};
    double sum = 0.0;
    for (size_t i = 0; i < sizeof times / sizeof times[0]; i++) {
        assert_true(times[i] >= 0.0);
        sum += times[i];
    }
    assert_int_equal(s->steps, STEPS);
    assert_true(s->time_orthogonalize > 0.0 && s->time_all_gather > 0.0);
    if (!images_on_host() && sum > s->time_step + 1e-5)
        fail_msg("parts of %.6f s in steps of %.6f s", sum, s->time_step);
}

static void check_file(const traced *t, int rank, const char *path) {
    json_error_t error;
    json_t *events = json_load_file(path, 0, &error);
    if (!events)
        fail_msg("%s: %s", path, error.text);
    double *start = calloc(t->count[rank], sizeof *start),
           *end = calloc(t->count[rank], sizeof *end);
    for (int step = 1; step <= STEPS; step++) {
        size_t found = 0;
        for (size_t e = 0; e < json_array_size(events); e++) {
            const json_t *event = json_array_get(events, e);
            const json_t *at = json_object_get(json_object_get(event, "args"), "step");
            if (json_integer_value(at) != step)
                continue;
            const char *name = json_string_value(json_object_get(event, "name"));
            size_t i = 0;
            while (i < t->count[rank] && strcmp(name, t->labels[rank][i]) != 0)
                i++;
            assert_true(i < t->count[rank]);
            assert_int_equal(json_integer_value(json_object_get(event, "pid")), rank);
            assert_int_equal(json_integer_value(json_object_get(event, "tid")),
                             t->streams[rank][i]);
            start[i] = json_number_value(json_object_get(event, "ts"));
            end[i] = start[i] + json_number_value(json_object_get(event, "dur"));
            assert_true(end[i] >= start[i]);
            assert_true(start[i] >= 0.0 && end[i] <= t->elapsed_us);
            if (t->streams[rank][i] == STREAM_COMM && images_on_host())
                assert_true(end[i] - start[i] >= 0.9e6 * LATENCY_S);
            found++;
        }
        assert_int_equal(found, t->count[rank]);
        for (size_t i = 0; i < t->count[rank]; i++)
            if (t->waits_on[rank][i] >= 0)
                assert_true(start[i] + 0.01 >= end[t->waits_on[rank][i]]);
    }
    free(start);
    free(end);
    json_decref(events);
}

static void test_trace_is_the_schedule(void **state) {
    (void)state;
    char directory[] = "/tmp/muonshard_trace_XXXXXX";
    assert_non_null(mkdtemp(directory));
    traced t = {.count = {0}};
    snprintf(t.yaml, sizeof t.yaml, "{trace: %s/%%r.json, bucket_bytes: 9000, batch_bytes: 9000}",
             directory);
    threads_options options = THREADS_OPTIONS_INIT;
    options.latency_s = LATENCY_S;
    const double begin = now_s();
    assert_int_equal(threads_run_with(&options, RANKS, run, &t), MUONSHARD_OK);
    t.elapsed_us = 1e6 * (now_s() - begin);
    for (int r = 0; r < RANKS; r++) {
        char path[128];
        assert_int_equal(t.status[r], MUONSHARD_OK);
        assert_in_range(t.count[r], 20, 255);
        snprintf(path, sizeof path, "%s/%d.json", directory, r);
        check_file(&t, r, path);
        check_stats(&t.stats[r]);
        unlink(path);
    }
    rmdir(directory);
}

static void run_unwritable(muonshard_comm *comm, void *arg) {
    traced *t = arg;
    const rig_case setup = {.tensors = rig_zoo, .count = 1, .yaml = "trace: /nonexistent/x.json"};
    rig r;
    rig_open(&r, comm, &setup);
    t->status[muonshard_comm_rank(comm)] =
        strstr(r.message, "/nonexistent/x.json") ? r.status : MUONSHARD_OK;
    rig_close(&r);
}

static void test_a_trace_that_cannot_be_opened_is_an_error(void **state) {
    (void)state;
    traced t = {.count = {0}};
    assert_int_equal(threads_run(RANKS, run_unwritable, &t), MUONSHARD_OK);
    for (int r = 0; r < RANKS; r++)
        assert_int_equal(t.status[r], MUONSHARD_ERR_IO);
}

/* Without %r: the name as it is for one rank, with ".rank" behind for several. */
static void test_a_name_without_a_rank_gets_one(void **state) {
    (void)state;
    char directory[] = "/tmp/muonshard_trace_XXXXXX", path[128];
    assert_non_null(mkdtemp(directory));
    static const char *const names[] = {"t", "t.0", "t.1"};
    for (int n = 1; n <= RANKS; n++) {
        traced t = {.count = {0}};
        snprintf(t.yaml, sizeof t.yaml, "trace: %s/t", directory);
        assert_int_equal(threads_run(n, run, &t), MUONSHARD_OK);
        for (int i = 0; i < 3; i++) {
            snprintf(path, sizeof path, "%s/%s", directory, names[i]);
            assert_int_equal(unlink(path) == 0, n == 1 ? i == 0 : i > 0);
        }
    }
    rmdir(directory);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_trace_is_the_schedule),
        cmocka_unit_test(test_a_name_without_a_rank_gets_one),
        cmocka_unit_test(test_a_trace_that_cannot_be_opened_is_an_error),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
