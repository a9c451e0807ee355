/* The simulator against sums that can be done by hand: machines on which all but one thing takes no
 * time. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "command.h"
#include "config.h"
#include "simulate.h"

#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

#define NEAR(a, b) assert_true(fabs((a) - (b)) <= 1e-9 * fabs(b))

/* ---- a machine ---- */

static const char nothing[] = "launch_us: 0\n"
                              "passes: {copy: 1e6, sum: 1e6, measure: 1e6, momentum: 1e6, apply: "
                              "1e6, adam: 1e6}\n";

/* `yaml` beside what takes no time; rates and links have to be in it. */
static machine machine_of(const char *yaml) {
    char path[] = "/tmp/muonshard-machine-XXXXXX", message[COMMAND_MESSAGE] = "";
    const int descriptor = mkstemp(path);
    FILE *file = fdopen(descriptor, "w");
    assert_non_null(file);
    fprintf(file, "%s%s", nothing, yaml);
    fclose(file);
    machine m;
    if (machine_load(&m, path, message))
        fail_msg("%s", message);
    unlink(path);
    return m;
}

#define RATE    "newton_schulz: [{dtype: fp32, gflop: 1, tflops: 1e-3}]\n" /* 1e9 a second */
#define NO_TIME "newton_schulz: [{dtype: fp32, gflop: 1, tflops: 1e9}]\n"

/* ---- links ---- */

static void test_ring(void **state) {
    (void)state;
    machine m = machine_of(NO_TIME "collectives: ring\nruns_on: cuda\nlinks:\n"
                                   "  - {name: in, ranks: 8, gbs: 400, us: 1}\n"
                                   "  - {name: out, ranks: 1024, gbs: 50, us: 5}\n");
    /* In a node: 7 hops, 7/8 of all bytes over a rank's link. */
    machine_transfer t = machine_collective(&m, 1, 8, 1, 8, 1e6, NULL);
    NEAR(t.latency, 7e-6);
    NEAR(t.bandwidth, 7e6 / 400e9);
    assert_int_equal(t.slowest, 0);
    /* Two nodes: 14 hops inside, 1 between; all but a 16th passes between them over 8 links. */
    double bytes[MACHINE_LINKS] = {0.0};
    t = machine_collective(&m, 1, 16, 1, 16, 1e6, bytes);
    NEAR(t.latency, 14e-6 + 5e-6);
    NEAR(t.bandwidth, 15e6 / 400e9); /* 8 x 50 GB/s are as much as 400 */
    NEAR(bytes[0], 15e6);
    NEAR(bytes[1], 15e6 / 8.0);
    /* A rank of each node: nothing inside; a link of 50 GB/s. */
    t = machine_collective(&m, 1, 16, 8, 16, 1e6, NULL);
    NEAR(t.latency, 15 * 5e-6);
    NEAR(t.bandwidth, 15e6 / 50e9);
    assert_int_equal(t.slowest, 1);
    /* Alone, nothing travels. */
    t = machine_collective(&m, 1, 1, 1, 1, 1e6, NULL);
    assert_true(t.latency == 0.0 && t.bandwidth == 0.0);
    machine_free(&m);
}

static void test_exchange(void **state) {
    (void)state;
    machine m = machine_of(NO_TIME "moved_by: network\nlinks:\n"
                                   "  - {name: in, ranks: 4, gbs: 10, us: 2}\n"
                                   "  - {name: out, ranks: 64, gbs: 1, us: 20}\n");
    double bytes[MACHINE_LINKS] = {0.0};
    machine_transfer t = machine_collective(&m, 0, 8, 1, 8, 1e6, bytes);
    NEAR(t.latency, 3 * 2e-6 + 4 * 20e-6);
    NEAR(t.bandwidth, 4e6 / 1e9); /* while 3e6 go over the other */
    NEAR(bytes[0], 3e6);
    NEAR(bytes[1], 4e6);
    m.by_rank = 1; /* one after the other */
    t = machine_collective(&m, 0, 8, 1, 8, 1e6, NULL);
    NEAR(t.bandwidth, 4e6 / 1e9 + 3e6 / 10e9);
    machine_free(&m);
}

static void test_rates(void **state) {
    (void)state;
    machine m = machine_of("newton_schulz:\n"
                           "  - {dtype: bf16, gflop: 100, tflops: 4}\n"
                           "  - {dtype: bf16, gflop: 1, tflops: 1}\n");
    NEAR(machine_newton_schulz(&m, 2, 1e9, 3.0), 3e9 / 1e12);
    NEAR(machine_newton_schulz(&m, 2, 10e9, 1.0), 10e9 / 2e12); /* halfway, in logarithms */
    NEAR(machine_newton_schulz(&m, 2, 1e12, 1.0), 1e12 / 4e12);
    NEAR(machine_newton_schulz(&m, 2, 1e6, 1.0), 1e6 / 1e12);
    assert_true(isnan(machine_newton_schulz(&m, 0, 1e9, 1.0)));
    m.on_gpu = 1; /* a batch is one launch, and no launch is shorter than the least */
    NEAR(machine_newton_schulz(&m, 2, 10e9, 10.0), 100e9 / 4e12);
    NEAR(machine_newton_schulz(&m, 2, 1e6, 1.0), 1e9 / 1e12);
    machine_free(&m);
}

/* ---- steps ---- */

typedef struct model {
    muonshard_config *config;
    registry registry;
    plan plan;
    schedule schedule;
    sim_group group;
} model;

/* Stacks [count, m, m] of the sides given, 0-terminated. */
static void open_model(model *k, const char *yaml, int ranks, const int64_t (*stacks)[2]) {
    error_text error;
    memset(k, 0, sizeof *k);
    assert_int_equal(muonshard_config_create(&k->config), MUONSHARD_OK);
    assert_int_equal(muonshard_config_load_string(k->config, yaml), MUONSHARD_OK);
    k->registry.weightless = true;
    for (size_t i = 0; stacks[i][0]; i++) {
        char name[24];
        muonshard_tensor_desc d = MUONSHARD_TENSOR_DESC_INIT;
        snprintf(name, sizeof name, "w%zu", i);
        d.name = name;
        d.role = MUONSHARD_ROLE_MATRIX;
        d.dims = 3;
        d.shape[0] = stacks[i][0];
        d.shape[1] = d.shape[2] = stacks[i][1];
        assert_int_equal(registry_add(&k->registry, config_settings(k->config), &d, NULL, &error),
                         MUONSHARD_OK);
    }
    assert_int_equal(
        plan_make(&k->plan, &k->registry, config_settings(k->config), ranks, false, &error),
        MUONSHARD_OK);
    assert_int_equal(schedule_make(&k->schedule, &k->plan, config_settings(k->config), &error),
                     MUONSHARD_OK);
    k->group = (sim_group){&k->registry, config_settings(k->config), &k->plan, &k->schedule, 1.0};
}

static void close_model(model *k) {
    schedule_free(&k->schedule);
    plan_free(&k->plan);
    registry_free(&k->registry);
    muonshard_config_destroy(k->config);
}

static simulation run(const machine *m, const model *k, sim_options options) {
    simulation s;
    char message[COMMAND_MESSAGE] = "";
    if (simulate(m, &k->group, &options, &s, message))
        fail_msg("%s", message);
    for (size_t i = 0; i < k->schedule.count; i++) {
        const int before = k->schedule.ops[i].waits_on;
        assert_true(s.spans[i].end >= s.spans[i].begin);
        if (before != OP_NONE)
            assert_true(s.spans[i].begin >= s.spans[before].end - 1e-12);
    }
    return s;
}

#define CLOSE(a, b, off) assert_true(fabs((a) - (b)) <= (off)*fabs(b))

/* Five matrices on two ranks: the busier has three. 5 steps of m^3 (1 + 1 + 2). */
static void test_computation(void **state) {
    (void)state;
    machine m =
        machine_of(RATE "collectives: ring\nlinks: [{name: l, ranks: 2, gbs: 1e6, us: 0}]\n");
    static const int64_t stacks[][2] = {{5, 64}, {0, 0}};
    model k;
    open_model(&k, "{}", 2, stacks);
    simulation s = run(&m, &k, (sim_options){.backward = 0.0});
    const double one = 5.0 * 4.0 * 64 * 64 * 64 / 1e9;
    CLOSE(s.step, 3.0 * one, 1e-3);
    CLOSE(s.phases.orthogonalize, 3.0 * one, 1e-3);
    assert_true(s.matrices == 3.0);
    simulation_free(&s);
    close_model(&k);
    machine_free(&m);
}

/* Where only links take time: a reduce-scatter, the agreement, a gather, one after the other. */
static void test_communication(void **state) {
    (void)state;
    machine m = machine_of(NO_TIME "moved_by: network\nlinks: [{name: l, ranks: 2, gbs: 1, us: "
                                   "1000}]\n");
    static const int64_t stacks[][2] = {{2, 64}, {0, 0}};
    model k;
    open_model(&k, "{}", 2, stacks);
    simulation s = run(&m, &k, (sim_options){.backward = 0.0});
    const double slot = 64 * 64 * 4, word = (1 + 1 + 1 + 0 + 1) * 8;
    const double expected = 3 * 1e-3 + (2 * slot + word) / 1e9;
    CLOSE(s.step, expected, 1e-3);
    CLOSE(s.phases.reduce_scatter, 1e-3 + slot / 1e9, 1e-3);
    CLOSE(s.phases.all_gather, 1e-3 + slot / 1e9, 1e-3);
    CLOSE(s.latency, 2e-3, 1e-9);
    simulation_free(&s);
    /* Under a backward pass of 10 ms the reduction is not seen, but for the last gradients'. */
    s = run(&m, &k, (sim_options){.backward = 10e-3});
    CLOSE(s.step, 10e-3 + expected, 1e-3); /* one bucket: it is ready at the end */
    simulation_free(&s);
    close_model(&k);
    open_model(&k, "bucket_bytes: 16384", 2, (const int64_t[][2]){{20, 64}, {0, 0}});
    assert_int_equal(k.plan.bucket_count, 10);
    s = run(&m, &k, (sim_options){.backward = 100e-3});
    assert_true(s.phases.reduce_scatter < 1.2e-3); /* of ten */
    simulation_free(&s);
    close_model(&k);
    machine_free(&m);
}

/* Two batches: the first one's gather runs under the second one's computation. */
static void test_overlap(void **state) {
    (void)state;
    static const int64_t stacks[][2] = {{2, 64}, {2, 96}, {0, 0}};
    const double first = 20.0 * 64 * 64 * 64 / 1e9, second = 20.0 * 96 * 96 * 96 / 1e9;
    for (int slow = 0; slow < 2; slow++) {
        const double us = slow ? 50000.0 : 1000.0;
        char yaml[256];
        snprintf(yaml, sizeof yaml,
                 "%smoved_by: network\nlinks: [{name: l, ranks: 2, gbs: 1e6, us: %g}]\n", RATE, us);
        machine m = machine_of(yaml);
        model k;
        open_model(&k, "{}", 2, stacks);
        assert_int_equal(k.plan.batch_count, 2);
        simulation s = run(&m, &k, (sim_options){.backward = 0.0});
        const double link = 1e-6 * us, reduced = (double)k.plan.bucket_count * link + link;
        const double there = first + link; /* the first gather, from the beginning of the first */
        const double ready = first + second;
        CLOSE(s.step, reduced + fmax(there, ready) + link, 1e-3);
        simulation_free(&s);
        close_model(&k);
        machine_free(&m);
    }
}

/* The link of bench step --link: all collectives take turns on it. */
static void test_injected_link(void **state) {
    (void)state;
    machine m =
        machine_of(NO_TIME "moved_by: network\nlinks: [{name: l, ranks: 4, gbs: 1e6, us: 0}]\n");
    static const int64_t stacks[][2] = {{4, 64}, {0, 0}};
    model k;
    open_model(&k, "{}", 4, stacks);
    const sim_options options = {.bandwidth = 1e9, .latency = 5e-3};
    simulation s = run(&m, &k, options);
    const double slot = 64 * 64 * 4, word = (1 + 1 + 1 + 0 + 1) * 8;
    CLOSE(s.step, 3 * 5e-3 + 3.0 * (2 * slot + word) / 1e9, 1e-3);
    simulation_free(&s);
    close_model(&k);
    machine_free(&m);
}

/* Where the rank's own thread moves bytes nothing is hidden. */
static void test_moved_by_rank(void **state) {
    (void)state;
    machine m =
        machine_of(RATE "moved_by: rank\nlinks: [{name: l, ranks: 2, gbs: 1e6, us: 20000}]\n");
    static const int64_t stacks[][2] = {{2, 64}, {2, 96}, {0, 0}};
    model k;
    open_model(&k, "{}", 2, stacks);
    simulation s = run(&m, &k, (sim_options){.backward = 0.0});
    const double compute = 20.0 * (64.0 * 64 * 64 + 96.0 * 96 * 96) / 1e9;
    CLOSE(s.step, compute + 20e-3 * ((double)k.plan.bucket_count + 1 + 2), 1e-3);
    simulation_free(&s);
    close_model(&k);
    machine_free(&m);
}

static void test_what_the_machine_lacks(void **state) {
    (void)state;
    char message[COMMAND_MESSAGE] = "";
    machine m = machine_of(RATE "links: [{name: l, ranks: 2, gbs: 1, us: 0}]\n");
    static const int64_t stacks[][2] = {{4, 64}, {0, 0}};
    const sim_options options = {.backward = 0.0};
    simulation s;
    model k;
    open_model(&k, "{}", 4, stacks);
    assert_int_equal(simulate(&m, &k.group, &options, &s, message), MUONSHARD_ERR_CONFIG);
    assert_non_null(strstr(message, "join 2 ranks, not 4"));
    close_model(&k);
    open_model(&k, "ns_dtype: bf16", 2, stacks);
    assert_int_equal(simulate(&m, &k.group, &options, &s, message), MUONSHARD_ERR_CONFIG);
    assert_non_null(strstr(message, "no rate of Newton-Schulz in bf16"));
    close_model(&k);
    machine_free(&m);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_ring),
        cmocka_unit_test(test_exchange),
        cmocka_unit_test(test_rates),
        cmocka_unit_test(test_computation),
        cmocka_unit_test(test_communication),
        cmocka_unit_test(test_overlap),
        cmocka_unit_test(test_injected_link),
        cmocka_unit_test(test_moved_by_rank),
        cmocka_unit_test(test_what_the_machine_lacks),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
