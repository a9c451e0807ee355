/* Where ranks are: those of one process share all of its cores, and what is configured goes before
 * what is found. */
#define _GNU_SOURCE
#include <sched.h>
#include <stdlib.h>

#include "comm_threads.h"
#include "optim/placement.h"

#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

enum { RANKS = 3 };

static void find(muonshard_comm *comm, void *arg) {
    error_text error;
    placement *p = (placement *)arg + comm->rank;
    if (placement_find(comm, p, &error))
        p->cores = -1;
}

static void test_ranks_share_cores(void **state) {
    (void)state;
    placement found[RANKS] = {{0}};
    cpu_set_t set;
    assert_int_equal(sched_getaffinity(0, sizeof set, &set), 0);
    assert_int_equal(threads_run(RANKS, find, found), MUONSHARD_OK);
    for (int r = 0; r < RANKS; r++) {
        assert_in_range(found[r].cores, 1, CPU_COUNT(&set));
        assert_int_equal(found[r].cores, found[0].cores);
        assert_int_equal(found[r].sharing, RANKS);
        assert_int_equal(found[r].isa, host_isa_detect());
    }
}

/* A rank that may run on one core alone shares it with those that may run on it, too. */
static void pinned(muonshard_comm *comm, void *arg) {
    cpu_set_t all, one;
    sched_getaffinity(0, sizeof all, &all);
    size_t first = 0;
    while (!CPU_ISSET(first, &all))
        first++;
    CPU_ZERO(&one);
    CPU_SET(first, &one);
    CPU_CLR(first, &all);
    if (comm->rank == 0)
        sched_setaffinity(0, sizeof one, &one);
    else
        sched_setaffinity(0, sizeof all, &all);
    find(comm, arg);
}

static void test_pinned_ranks(void **state) {
    (void)state;
    cpu_set_t set;
    assert_int_equal(sched_getaffinity(0, sizeof set, &set), 0);
    if (CPU_COUNT(&set) < 2)
        skip();
    placement found[RANKS] = {{0}};
    assert_int_equal(threads_run(RANKS, pinned, found), MUONSHARD_OK);
    assert_int_equal(found[0].cores, 1);
    assert_int_equal(found[0].sharing, 1);
    for (int r = 1; r < RANKS; r++)
        assert_int_equal(found[r].sharing, RANKS - 1);
}

static void test_options(void **state) {
    (void)state;
    settings s = {.threads = 0, .instructions = 0};
    const placement eight = {.cores = 8, .sharing = 3, .isa = HOST_AVX2};
    assert_int_equal(placement_options(&eight, &s).threads, 2);
    assert_int_equal(placement_options(&eight, &s).isa, HOST_AVX2);
    const placement few = {.cores = 2, .sharing = 5, .isa = HOST_AVX512};
    assert_int_equal(placement_options(&few, &s).threads, 1);
    s.threads = 7;
    s.instructions = 1 + HOST_PORTABLE;
    assert_int_equal(placement_options(&few, &s).threads, 7);
    assert_int_equal(placement_options(&few, &s).isa, HOST_PORTABLE);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_ranks_share_cores),
        cmocka_unit_test(test_pinned_ranks),
        cmocka_unit_test(test_options),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
