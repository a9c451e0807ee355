/* Steps whose products are made by our own kernel for Hopper, on the fake device: that they are, on
 * which devices, that they are near cuBLASLt's, and what their bits depend on. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "device_fixture.h"

#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

/* Both orientations of one shape in a batch, a stack, more rows than a unit has, and a depth that
 * is worth cutting. */
enum { SOME = 4 };
static const rig_tensor some[SOME] = {
    {RIG_TENSOR("square", MUONSHARD_ROLE_MATRIX, 3, 3, 72, 72)},
    {RIG_TENSOR("tall", MUONSHARD_ROLE_MATRIX, 2, 200, 136)},
    {RIG_TENSOR("wide", MUONSHARD_ROLE_MATRIX, 3, 2, 136, 200)},
    {RIG_TENSOR("deep", MUONSHARD_ROLE_MATRIX, 2, 264, 2560)},
};
/* A side that is no multiple of 8. */
static const rig_tensor odd[] = {{RIG_TENSOR("odd", MUONSHARD_ROLE_MATRIX, 2, 12, 24)}};

static rig_case some_case(const char *yaml) {
    return (rig_case){.tensors = some, .count = SOME, .yaml = yaml, .steps = 2};
}

static long products_of(const rig_case *setup) {
    long proposals, before, after;
    fake.blas(&proposals, &before);
    digest_at(1, setup);
    fake.blas(&proposals, &after);
    return after - before;
}

/* No product is cuBLASLt's, but those of other dtypes and sides; norms that need X X^T make it in
 * fp64. */
static void test_whose_products(void **state) {
    (void)state;
    const rig_case own[] = {some_case("{gemm_kernels: hopper, ns_dtype: bf16, ns_steps: 2}"),
                            some_case("{gemm_kernels: hopper, preset: gram}")};
    const rig_case others[] = {some_case("{gemm_kernels: hopper, ns_dtype: fp32, ns_steps: 1}"),
                               some_case("{gemm_kernels: cublaslt, ns_dtype: bf16, ns_steps: 1}"),
                               some_case("{gemm_kernels: hopper, ns_dtype: bf16, ns_form: gram}"),
                               {.tensors = odd,
                                .count = 1,
                                .yaml = "{gemm_kernels: hopper, ns_dtype: bf16, ns_steps: 1}",
                                .steps = 2}};
    for (size_t i = 0; i < sizeof own / sizeof own[0]; i++)
        assert_int_equal(products_of(&own[i]), 0);
    for (size_t i = 0; i < sizeof others / sizeof others[0]; i++)
        assert_true(products_of(&others[i]) > 0);
}

static void take_step(const char *yaml, float **kept) {
    const rig_case setup = some_case(yaml);
    outcome out = {.setup = {&setup}, .keep = true};
    assert_int_equal(threads_run(1, ranks_run, &out), MUONSHARD_OK);
    assert_int_equal(out.status[0], MUONSHARD_OK);
    for (size_t t = 0; t < SOME; t++)
        kept[t] = out.kept[t];
}

static size_t elements_of(const rig_tensor *t) {
    size_t count = 1;
    for (int i = 0; i < t->dims; i++)
        count *= (size_t)t->shape[i];
    return count;
}

#define CUBIC "ns_dtype: bf16, coefficients: cubic5, coefficient_check: off"

/* The kernels differ in the order of sums, and so in what is rounded to 16 bits: after two steps of
 * the same update by a part of it. */
static void test_near_cublaslt(void **state) {
    (void)state;
    static const char *const ways[] = {"ns_dtype: bf16",
                                       "ns_dtype: fp16, norm: aol",
                                       "ns_dtype: fp16, norm: schatten4, ns_form: standard",
                                       "preset: gram",
                                       "ns_dtype: bf16, gather: params, variance: normuon",
                                       CUBIC};
    for (size_t w = 0; w < sizeof ways / sizeof ways[0]; w++) {
        char own[200], theirs[200], none[200];
        float *a[SOME], *b[SOME], *start[SOME];
        snprintf(own, sizeof own, "{%s, lr: 0.1, gemm_kernels: hopper}", ways[w]);
        snprintf(theirs, sizeof theirs, "{%s, lr: 0.1}", ways[w]);
        snprintf(none, sizeof none, "{%s, lr: 0, weight_decay: 0}", ways[w]);
        take_step(own, a);
        take_step(theirs, b);
        take_step(none, start);
        for (size_t t = 0; t < SOME; t++) {
            double apart = 0.0, moved = 0.0;
            for (size_t i = 0; i < elements_of(&some[t]); i++) {
                apart += pow((double)a[t][i] - (double)b[t][i], 2.0);
                moved += pow((double)b[t][i] - (double)start[t][i], 2.0);
            }
            if (!(moved > 0.0 && apart <= 0.02 * 0.02 * moved))
                fail_msg("%s, %s: %g of the displacement", ways[w], some[t].name,
                         sqrt(apart / moved));
            free(a[t]);
            free(b[t]);
            free(start[t]);
        }
    }
}

/* Deterministic, nothing is cut along the depth, and sums don't depend on who else is in a launch;
 * otherwise a lone product is cut, and its last bits are others. */
static void test_what_bits_depend_on(void **state) {
    (void)state;
    static const char *const same[] = {"",
                                       ", batch_bytes: 60000",
                                       ", bucket_bytes: 60000",
                                       ", ownership: balanced",
                                       ", cuda_graphs: false",
                                       ", gemm_choice: measured"};
    const rig_case first =
        some_case("{gemm_kernels: hopper, ns_dtype: bf16, ns_steps: 2, deterministic: true}");
    const rig_case cut = some_case("{gemm_kernels: hopper, ns_dtype: bf16, ns_steps: 2}");
    const uint64_t digest = digest_at(1, &first);
    for (size_t i = 0; i < sizeof same / sizeof same[0]; i++) {
        char yaml[200];
        snprintf(yaml, sizeof yaml,
                 "{gemm_kernels: hopper, ns_dtype: bf16, ns_steps: 2, deterministic: true%s}",
                 same[i]);
        const rig_case other = some_case(yaml);
        assert_true(digest_at(1, &other) == digest);
    }
    assert_true(digest_at(1, &cut) != digest);
    assert_true(digest_at(1, &cut) == digest_at(1, &cut));
}

/* ---- the file of choices ---- */

static char folder[] = "/tmp/muonshard-tiles-XXXXXX";
static char file_name[sizeof folder + 8];

static int begin(void **state) {
    if (!mkdtemp(folder))
        return -1;
    snprintf(file_name, sizeof file_name, "%s/table", folder);
    return find_fake(state);
}

static int end(void **state) {
    (void)state;
    remove(file_name);
    return rmdir(folder);
}

/* With the file, and more settings; without NCCL, which is asked how far it is a number of times.
 */
static uint64_t digest_with_file(const char *more) {
    char yaml[240];
    snprintf(yaml, sizeof yaml,
             "{gemm_kernels: hopper, ns_dtype: bf16, ns_steps: 2, comm: self, gemm_table: %s%s}",
             file_name, more);
    const rig_case setup = some_case(yaml);
    muonshard_comm *comm;
    muonshard_status status;
    assert_int_equal(muonshard_comm_create_self(NULL, &comm), MUONSHARD_OK);
    const uint64_t digest = rig_run(comm, &setup, &status);
    assert_int_equal(status, MUONSHARD_OK);
    muonshard_comm_destroy(comm);
    return digest;
}

/* All products of ours in the file are not to be cut any more: how many were. The second word of
 * the algorithm, behind the key, is how many clusters share. */
static int undo_cuts(void) {
    char lines[64][512];
    int count = 0, cuts = 0;
    FILE *file = fopen(file_name, "r");
    assert_non_null(file);
    while (count < 64 && fgets(lines[count], sizeof lines[0], file))
        count++;
    fclose(file);
    assert_true(count < 64);
    file = fopen(file_name, "w");
    for (int i = 0; i < count; i++) {
        char *width = i ? strstr(lines[i], " 80 ") : NULL;
        if (i && !width)
            width = strstr(lines[i], " 100 ");
        if (width) {
            char *sharers = strchr(width + 1, ' ') + 1, *rest = strchr(sharers, ' ');
            cuts += *sharers != '0';
            fprintf(file, "%.*s0%s", (int)(sharers - lines[i]), lines[i], rest);
        } else {
            fputs(lines[i], file);
        }
    }
    fclose(file);
    return cuts;
}

/* What is in it is what runs; what was chosen where nothing may be cut is not taken where it may.
 */
static void test_file_of_cuts(void **state) {
    (void)state;
    const uint64_t whole = digest_with_file(", deterministic: true");
    const uint64_t cut = digest_with_file("");
    assert_true(whole != cut);
    assert_true(digest_with_file("") == cut);
    assert_true(digest_with_file(", deterministic: true") == whole);
    assert_true(undo_cuts() > 0);
    assert_true(digest_with_file("") == whole);
    remove(file_name);
}

static long launches_of(const char *more) {
    const long before = fake.launches();
    digest_with_file(more);
    return fake.launches() - before;
}

/* At commit each cut runs six times, two cuts at least, and then each product once; where the file
 * has the fastest, only that. The second iteration's products are the first's. */
static void test_cuts_by_time(void **state) {
    (void)state;
    const long proposed = launches_of("");
    remove(file_name);
    const long measured = launches_of(", gemm_choice: measured");
    const long again = launches_of(", gemm_choice: measured");
    assert_true(again > proposed && again <= proposed + proposed / 2);
    assert_true(measured >= again + 6 * (again - proposed));
    remove(file_name);
}

/* Each rank gets what one would have; the mean of the same gradients is the gradient. */
static void test_ranks(void **state) {
    (void)state;
    rig_case setup =
        some_case("{gemm_kernels: hopper, ns_dtype: bf16, ns_steps: 2, deterministic: true}");
    setup.same_gradients = true;
    const uint64_t alone = digest_at(1, &setup);
    for (int n = 2; n <= 4; n += 2)
        assert_true(digest_at(n, &setup) == alone);
    setup.yaml = "{gemm_kernels: hopper, ns_dtype: bf16, ns_steps: 2, deterministic: true, "
                 "ownership: balanced}";
    assert_true(digest_at(2, &setup) == alone);
}

static void test_only_for_hopper(void **state) {
    (void)state;
    static const char *const others[] = {"80", "89", "100"};
    const rig_case setup = some_case("{gemm_kernels: hopper, ns_dtype: bf16}");
    const int live = fake.live();
    for (size_t i = 0; i < sizeof others / sizeof others[0]; i++) {
        outcome out = {.setup = {&setup}};
        setenv("FAKE_CUDA_SM", others[i], 1);
        assert_int_equal(threads_run(1, ranks_run, &out), MUONSHARD_OK);
        unsetenv("FAKE_CUDA_SM");
        assert_int_equal(out.status[0], MUONSHARD_ERR_CONFIG);
        assert_non_null(strstr(out.message[0], "gemm_kernels"));
        assert_int_equal(fake.live(), live);
    }
}

int main(void) {
    setenv("FAKE_CUDA_DEVICES", "4", 1);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_whose_products),      cmocka_unit_test(test_near_cublaslt),
        cmocka_unit_test(test_what_bits_depend_on), cmocka_unit_test(test_ranks),
        cmocka_unit_test(test_file_of_cuts),        cmocka_unit_test(test_cuts_by_time),
        cmocka_unit_test(test_only_for_hopper),
    };
    return cmocka_run_group_tests(tests, begin, end);
}
