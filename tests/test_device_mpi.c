/* The bits table's rows for devices, rank by rank in processes: NCCL with sums in rank order, and
 * MPI through memory of the host, give the same bits at any number of ranks; NCCL's own sums do at
 * two ranks, and on integers. With MUONSHARD_TEST_SHARE all ranks use one device. */
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "muonshard_mpi.h"
#include "step_rig.h"

#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

static int rank, size;

static void assert_on_all(bool good) {
    int own = good, all = 0;
    MPI_Allreduce(&own, &all, 1, MPI_INT, MPI_MIN, MPI_COMM_WORLD);
    assert_true(all);
}

/* Three steps; gradients of small integers where `integers`. */
static uint64_t digest_with(const char *keys, const rig_case *base, bool integers) {
    char yaml[512];
    rig_case setup = *base;
    snprintf(yaml, sizeof yaml, "{%s, %s%s}", base->yaml, keys,
             getenv("MUONSHARD_TEST_SHARE") ? ", share_gpu: true" : "");
    setup.yaml = yaml;
    muonshard_comm *comm = NULL;
    muonshard_status status = muonshard_comm_create_mpi(MPI_COMM_WORLD, NULL, &comm);
    assert_on_all(status == MUONSHARD_OK);
    rig r;
    rig_open(&r, comm, &setup);
    for (int s = 0; s < 3 && r.status == MUONSHARD_OK; s++) {
        rig_gradients(&r);
        for (size_t t = 0; t < setup.count && integers; t++)
            for (size_t i = 0; i < r.elements[t]; i++)
                r.grads[t][i] = (float)(int)(r.grads[t][i] * 9.0F);
        rig_step(&r);
    }
    if (r.status != MUONSHARD_OK)
        print_error("rank %d: %s: %s\n", rank, yaml, r.message);
    assert_on_all(r.status == MUONSHARD_OK);
    uint64_t digest = rig_digest(&r), first = digest;
    MPI_Bcast(&first, 1, MPI_UINT64_T, 0, MPI_COMM_WORLD);
    assert_on_all(first == digest);
    rig_close(&r);
    muonshard_comm_destroy(comm);
    return digest;
}

static const char *const rules[] = {"preset: jordan, clip_norm: 3", "preset: gram",
                                    "preset: speedrun, bucket_bytes: 9000", "preset: optax",
                                    "preset: moonlight, gather: params, batch_bytes: 5000"};
enum { RULES = sizeof rules / sizeof rules[0] };

static rig_case mixed_case(rig_tensor tensors[RIG_MAX_TENSORS], const char *yaml, bool sixteen) {
    memcpy(tensors, rig_zoo, rig_zoo_count * sizeof *tensors);
    for (size_t i = 0; i < rig_zoo_count && sixteen; i++) {
        tensors[i].dtype = (muonshard_dtype)(i % 3);
        tensors[i].grad_dtype = (muonshard_dtype)(i % 2);
    }
    return (rig_case){.tensors = tensors, .count = rig_zoo_count, .yaml = yaml};
}

/* One tensor over NCCL: whether it works here at all. */
static void test_smoke(void **state) {
    (void)state;
    const rig_case c = {
        .tensors = rig_zoo + 1, .count = 1, .yaml = "timeout: 20, first_timeout: 30"};
    digest_with("comm: nccl", &c, true);
}

static void test_sums_in_rank_order(void **state) {
    (void)state;
    rig_tensor tensors[RIG_MAX_TENSORS];
    for (size_t k = 0; k < RULES; k++)
        for (int sixteen = 0; sixteen < 2; sixteen++) {
            const rig_case c = mixed_case(tensors, rules[k], sixteen);
            const uint64_t staged = digest_with("comm: mpi", &c, false);
            assert_on_all(staged == digest_with("comm: nccl, deterministic: true", &c, false));
            assert_on_all(staged == digest_with("comm: mpi, cuda_graphs: false", &c, false));
            if (size <= 2)
                assert_on_all(staged == digest_with("comm: nccl", &c, false));
        }
}

static void test_sums_of_integers(void **state) {
    (void)state;
    rig_tensor tensors[RIG_MAX_TENSORS];
    for (size_t k = 0; k < RULES; k++) {
        const rig_case c = mixed_case(tensors, rules[k], false);
        assert_on_all(digest_with("comm: nccl", &c, true) == digest_with("comm: mpi", &c, true));
    }
}

/* Under MPI and NCCL alike, whatever overlaps. */
static void test_overlap(void **state) {
    (void)state;
    rig_tensor tensors[RIG_MAX_TENSORS];
    rig_case c = mixed_case(tensors, rules[2], true);
    const uint64_t plain = digest_with("comm: mpi", &c, false);
    static const rig_overlap overlaps[] = {RIG_READY_BACKWARD, RIG_READY_SHUFFLED, RIG_DEFER};
    for (size_t i = 0; i < 3; i++) {
        c.overlap = overlaps[i];
        assert_on_all(digest_with("comm: mpi", &c, false) == plain);
        assert_on_all(digest_with("comm: nccl, deterministic: true", &c, false) == plain);
    }
}

int main(int argc, char **argv) {
    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    if (getenv("MUONSHARD_TEST_ONLY")) /* a pattern: where a card is slow, or paid for */
        cmocka_set_test_filter(getenv("MUONSHARD_TEST_ONLY"));
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_smoke), cmocka_unit_test(test_sums_in_rank_order),
        cmocka_unit_test(test_sums_of_integers), cmocka_unit_test(test_overlap)};
    const int failed = cmocka_run_group_tests(tests, NULL, NULL);
    MPI_Finalize();
    return failed;
}
