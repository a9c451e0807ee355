/* The same bits whatever carries them: a step over MPI, and over callbacks, against the same step
 * over threads. */
#include <mpi.h>
#include <stdio.h>
#include <string.h>
#include "comm_threads.h"
#include "muonshard_mpi.h"
#include "step_rig.h"

#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

static int rank, size;

/* All ranks go on together or fail together. */
static void assert_on_all(bool good) {
    int own = good, all = 0;
    MPI_Allreduce(&own, &all, 1, MPI_INT, MPI_MIN, MPI_COMM_WORLD);
    assert_true(all);
}

typedef struct outcome {
    const rig_case *setup;
    uint64_t digest[64];
    muonshard_status status[64];
} outcome;

static void run_case(muonshard_comm *comm, void *arg) {
    outcome *out = arg;
    const int r = muonshard_comm_rank(comm);
    out->digest[r] = rig_run(comm, out->setup, &out->status[r]);
}

static uint64_t over_threads(const rig_case *setup) {
    outcome out = {.setup = setup};
    uint64_t digest = 0;
    if (rank == 0 && threads_run(size, run_case, &out) == MUONSHARD_OK)
        digest = out.digest[0];
    MPI_Bcast(&digest, 1, MPI_UINT64_T, 0, MPI_COMM_WORLD);
    return digest;
}

static uint64_t over_mpi(const rig_case *setup) {
    muonshard_comm *comm = NULL;
    muonshard_status status = muonshard_comm_create_mpi(MPI_COMM_WORLD, NULL, &comm);
    assert_on_all(status == MUONSHARD_OK);
    const uint64_t digest = rig_run(comm, setup, &status);
    muonshard_comm_destroy(comm);
    assert_on_all(status == MUONSHARD_OK);
    return digest;
}

static int allgather(void *user, const void *send, void *recv, size_t bytes) {
    (void)user;
    return MPI_Allgather(send, (int)bytes, MPI_BYTE, recv, (int)bytes, MPI_BYTE, MPI_COMM_WORLD);
}

static int barrier(void *user) {
    (void)user;
    return MPI_Barrier(MPI_COMM_WORLD);
}

static uint64_t over_callbacks(const rig_case *setup) {
    muonshard_comm_callbacks callbacks = MUONSHARD_COMM_CALLBACKS_INIT;
    callbacks.rank = rank;
    callbacks.world_size = size;
    callbacks.allgather = allgather;
    callbacks.barrier = barrier;
    muonshard_comm *comm = NULL;
    muonshard_status status = muonshard_comm_create_callbacks(&callbacks, NULL, &comm);
    assert_on_all(status == MUONSHARD_OK);
    const uint64_t digest = rig_run(comm, setup, &status);
    muonshard_comm_destroy(comm);
    assert_on_all(status == MUONSHARD_OK);
    return digest;
}

static void test_communicators_agree_to_the_bit(void **state) {
    (void)state;
    static const char *const yamls[] = {"{preset: jordan, clip_norm: 3}",
                                        "preset: moonlight",
                                        "{preset: nvidia, bucket_bytes: 9000, batch_bytes: 5000}",
                                        "{preset: grouped_fp16, ownership: balanced}",
                                        "{preset: fan_ratio, reduce: sum, gather: params}",
                                        "{preset: speedrun, bucket_bytes: 9000}",
                                        "{preset: gram, rounding: stochastic, gather: updates}"};
    rig_tensor mixed[RIG_MAX_TENSORS]; /* parameters and gradients of all dtypes */
    memcpy(mixed, rig_zoo, rig_zoo_count * sizeof *mixed);
    for (size_t i = 0; i < rig_zoo_count; i++) {
        mixed[i].dtype = (muonshard_dtype)(i % 3);
        mixed[i].grad_dtype = (muonshard_dtype)(i % 2);
    }
    for (size_t i = 0; i < 2 * sizeof yamls / sizeof yamls[0]; i++) {
        rig_case setup = {.tensors = i % 2 ? mixed : rig_zoo,
                          .count = rig_zoo_count,
                          .yaml = yamls[i / 2],
                          .steps = 3};
        const uint64_t wanted = over_threads(&setup);
        assert_on_all(wanted != 0);
        assert_on_all(over_mpi(&setup) == wanted);
        setup.overlap = RIG_READY_BACKWARD;
        assert_on_all(over_mpi(&setup) == wanted);
        setup.overlap = RIG_DEFER;
        assert_on_all(over_mpi(&setup) == wanted);
        setup.overlap = RIG_STEP_ONLY;
        assert_on_all(over_callbacks(&setup) == wanted);
    }
}

int main(int argc, char **argv) {
    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_communicators_agree_to_the_bit)};
    const int failed = cmocka_run_group_tests(tests, NULL, NULL);
    MPI_Finalize();
    return failed;
}
