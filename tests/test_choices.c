/* What a device's products are chosen by, on the fake one: at commit and never again, by time if
 * wanted, and from a file that is right or refused. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "device_fixture.h"

#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

static char folder[] = "/tmp/muonshard-choices-XXXXXX";

static int begin(void **state) {
    return mkdtemp(folder) ? find_fake(state) : -1;
}

static int end(void **state) {
    (void)state;
    char command[128];
    snprintf(command, sizeof command, "rm -rf %s", folder);
    return system(command);
}

static long proposals(void) {
    long given, products;
    fake.blas(&given, &products);
    return given;
}

/* The number of algorithms that were proposed in the steps, not in commit. */
static void count_in_steps(rig *r, outcome *out) {
    threads_barrier(r->comm);
    const long before = proposals();
    threads_barrier(r->comm);
    for (int s = 0; s < STEPS && r->status == MUONSHARD_OK; s++) {
        rig_gradients(r);
        rig_step(r);
    }
    rig_pull(r);
    threads_barrier(r->comm);
    out->number[r->comm->rank] = (double)(proposals() - before);
}

static const char *const ways[] = {"",
                                   "norm: spectral",
                                   "norm: aol",
                                   "norm: schatten4",
                                   "{ns_dtype: bf16, ns_form: gram}",
                                   "{ns_dtype: fp16, ns_form: gram}",
                                   "symmetric_panels: 2",
                                   "{symmetric_panels: 3, ns_dtype: bf16}",
                                   "{gather: params, variance: normuon}",
                                   "{gemm_kernels: hopper, ns_dtype: bf16}",
                                   "{gemm_kernels: hopper, ns_dtype: fp16, norm: aol}",
                                   "coefficients: simple"};

static void test_commit_chooses(void **state) {
    (void)state;
    for (size_t y = 0; y < sizeof ways / sizeof ways[0]; y++)
        for (int n = 1; n <= 2; n++) {
            const rig_case setup = few_case(ways[y]);
            const long before = proposals();
            outcome out = {.setup = {&setup}, .between = count_in_steps};
            assert_int_equal(threads_run(n, ranks_run, &out), MUONSHARD_OK);
            for (int r = 0; r < n; r++) {
                assert_int_equal(out.status[r], MUONSHARD_OK);
                assert_true(out.number[r] == 0.0);
            }
            assert_true(proposals() > before);
        }
}

/* On the fake all algorithms give the same bits; three of each product are proposed. */
static void test_by_time(void **state) {
    (void)state;
    for (size_t y = 0; y < sizeof ways / sizeof ways[0]; y++) {
        char timed[160];
        const char *brace = strchr(ways[y], '{');
        const char *inner = brace ? brace + 1 : ways[y];
        snprintf(timed, sizeof timed, "{%.*s%sgemm_choice: measured}", (int)strcspn(inner, "}"),
                 inner, *inner ? ", " : "");
        const rig_case plain = few_case(ways[y]), measured = few_case(timed);
        const int live = fake.live();
        const long start = proposals();
        const uint64_t digest = digest_at(2, &plain);
        const long proposed = proposals() - start;
        assert_true(digest_at(2, &measured) == digest);
        assert_int_equal(proposals() - start - proposed, 3 * proposed);
        assert_int_equal(fake.live(), live);
    }
}

/* ---- the file ---- */

static char *path_of(const char *name) {
    static char path[128];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    return path;
}

static char *yaml_of(const char *name, const char *more) {
    static char yaml[256];
    snprintf(yaml, sizeof yaml, "{gemm_table: %s/%s%s}", folder, name, more);
    return yaml;
}

/* Own. */
static char *contents(const char *name, size_t *length) {
    FILE *file = fopen(path_of(name), "rb");
    assert_non_null(file);
    char *text = calloc(1, 1 << 20);
    *length = fread(text, 1, (1 << 20) - 1, file);
    fclose(file);
    return text;
}

static void write_file(const char *name, const char *text, size_t length) {
    FILE *file = fopen(path_of(name), "wb");
    assert_non_null(file);
    assert_int_equal(fwrite(text, 1, length, file), length);
    assert_int_equal(fclose(file), 0);
}

static void test_a_file_keeps_them(void **state) {
    (void)state;
    for (int n = 1; n <= 2; n++) {
        char name[16];
        snprintf(name, sizeof name, "kept%d", n);
        const rig_case setup = few_case(yaml_of(name, ", gemm_choice: measured"));
        const uint64_t digest = digest_at(n, &setup);
        for (int r = 0; r < n; r++) {
            char of_rank[32];
            size_t length;
            snprintf(of_rank, sizeof of_rank, n > 1 ? "%s.%d" : "%s", name, r);
            free(contents(of_rank, &length));
            assert_true(length > 200);
        }
        const long before = proposals();
        assert_true(digest_at(n, &setup) == digest);
        assert_int_equal(proposals(), before);
    }
}

/* A line ends with the number of the algorithm, as the fake has it. */
static void test_the_fastest_is_taken(void **state) {
    (void)state;
    for (int fastest = 0; fastest < 3; fastest++) {
        char name[16], wanted[8];
        size_t length, lines = 0;
        snprintf(name, sizeof name, "fast%d", fastest);
        snprintf(wanted, sizeof wanted, " %d", fastest);
        const rig_case setup = few_case(yaml_of(name, ", gemm_choice: measured"));
        fake.fast(fastest);
        digest_at(1, &setup);
        fake.fast(-1);
        char *text = contents(name, &length), *rest = text;
        strtok_r(rest, "\n", &rest); /* the head */
        for (const char *line; (line = strtok_r(NULL, "\n", &rest)); lines++)
            assert_string_equal(line + strlen(line) - 2, wanted);
        assert_true(lines > 3);
        free(text);
    }
}

/* A symmetric product by panels is several. */
static void test_panels_are_products(void **state) {
    (void)state;
    long proposed, products[3];
    for (int panels = 0; panels < 3; panels++) {
        char yaml[64];
        long before;
        snprintf(yaml, sizeof yaml, "{cuda_graphs: false, symmetric_panels: %d}", panels);
        const rig_case setup = few_case(yaml);
        fake.blas(&proposed, &before);
        digest_at(1, &setup);
        fake.blas(&proposed, &products[panels]);
        products[panels] -= before;
    }
    assert_int_equal(products[0], products[1]); /* so small ones are left whole */
    assert_true(products[2] > products[1]);
}

static void test_a_file_grows(void **state) {
    (void)state;
    const rig_case first = few_case(yaml_of("grows", ""));
    digest_at(1, &first);
    size_t was, is;
    char *before = contents("grows", &was);
    const rig_case second = few_case(yaml_of("grows", ", ns_dtype: fp16"));
    digest_at(1, &second);
    char *after = contents("grows", &is);
    assert_true(is > was && memcmp(before, after, was) == 0);
    const rig_case third = few_case(yaml_of("grows", ""));
    const long proposed = proposals();
    digest_at(1, &third);
    assert_int_equal(proposals(), proposed);
    free(before);
    free(after);
}

typedef struct refusal {
    muonshard_status status;
    const char *says;
} refusal;

static void expect(const char *yaml, refusal wanted) {
    const int live = fake.live();
    const rig_case setup = few_case(yaml);
    outcome out = {.setup = {&setup}};
    assert_int_equal(threads_run(1, ranks_run, &out), MUONSHARD_OK);
    if (out.status[0] != wanted.status || !strstr(out.message[0], wanted.says))
        print_error("status %d: %s\n", out.status[0], out.message[0]);
    assert_int_equal(out.status[0], wanted.status);
    assert_non_null(strstr(out.message[0], "gemm_table"));
    assert_non_null(strstr(out.message[0], wanted.says));
    assert_int_equal(fake.live(), live);
}

static void test_other_files_are_refused(void **state) {
    (void)state;
    const rig_case setup = few_case(yaml_of("right", ""));
    digest_at(1, &setup);
    size_t length;
    char *right = contents("right", &length), *wrong = malloc(2 * length);
    char *head_end = strchr(right, '\n') + 1, *line_end = strchr(head_end, '\n') + 1;
    const refusal other = {MUONSHARD_ERR_CONFIG, "begins with"};
    const refusal cut = {MUONSHARD_ERR_CONFIG, "is not a product"};

    memcpy(wrong, right, length); /* a device of another name */
    wrong[head_end - right - 2] ^= 1;
    write_file("wrong", wrong, length);
    expect(yaml_of("wrong", ""), other);
    write_file("wrong", "", 0);
    expect(yaml_of("wrong", ""), other);
    expect(yaml_of("right", ", gemm_choice: measured"), other); /* not what the file was made by */
    for (size_t short_by = 1; short_by < 60; short_by++) {      /* the last line, cut */
        write_file("wrong", right, length - short_by);
        expect(yaml_of("wrong", ""), cut);
    }
    memcpy(wrong, right, length); /* a line twice */
    memcpy(wrong + length, head_end, (size_t)(line_end - head_end));
    write_file("wrong", wrong, length + (size_t)(line_end - head_end));
    expect(yaml_of("wrong", ""), (refusal){MUONSHARD_ERR_CONFIG, "of a line before"});
    memcpy(wrong, right, length); /* a number more, not a number, a key that is none */
    memcpy(wrong + (head_end - right), "x", 1);
    write_file("wrong", wrong, length);
    expect(yaml_of("wrong", ""), (refusal){MUONSHARD_ERR_CONFIG, "line 2 is not a product"});
    memcpy(wrong, right, length);
    memcpy(wrong + (head_end - right) + 4, "9", 1); /* the type of its operands */
    write_file("wrong", wrong, length);
    expect(yaml_of("wrong", ""), (refusal){MUONSHARD_ERR_CONFIG, "line 2: this product cannot"});
    char *mark = strstr(right, "616c676f"); /* what the fake knows its algorithms by */
    assert_non_null(mark);
    memcpy(wrong, right, length);
    wrong[mark - right] ^= 1;
    write_file("wrong", wrong, length);
    expect(yaml_of("wrong", ""), (refusal){MUONSHARD_ERR_CONFIG, "cannot be made so"});
    memcpy(wrong, right, length);
    wrong[length / 2] = 0;
    write_file("wrong", wrong, length);
    expect(yaml_of("wrong", ""), (refusal){MUONSHARD_ERR_CONFIG, "no text"});
    expect("gemm_table: /nonexistent/table", (refusal){MUONSHARD_ERR_IO, "/nonexistent"});
    expect(yaml_of("", ""), (refusal){MUONSHARD_ERR_IO, folder}); /* a directory */
    free(right);
    free(wrong);
}

/* A commit that could not write its file, and one more when it can. */
static void commit_twice(muonshard_comm *comm, void *arg) {
    outcome *out = arg;
    rig r;
    rig_prepare(&r, comm, out->setup[0]);
    out->status[0] = muonshard_commit(r.optimizer, MUONSHARD_SYNC_CHECK);
    mkdir(path_of("later"), 0700);
    out->number[0] = muonshard_commit(r.optimizer, MUONSHARD_SYNC_CHECK);
    rig_close(&r);
}

static void test_a_commit_is_tried_again(void **state) {
    (void)state;
    const rig_case setup = few_case(yaml_of("later/table", ""));
    outcome out = {.setup = {&setup}};
    assert_int_equal(threads_run(1, commit_twice, &out), MUONSHARD_OK);
    assert_int_equal(out.status[0], MUONSHARD_ERR_IO);
    assert_true(out.number[0] == (double)MUONSHARD_OK);
    size_t length;
    free(contents("later/table", &length));
    assert_true(length > 200);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_commit_chooses),
        cmocka_unit_test(test_by_time),
        cmocka_unit_test(test_a_file_keeps_them),
        cmocka_unit_test(test_the_fastest_is_taken),
        cmocka_unit_test(test_panels_are_products),
        cmocka_unit_test(test_a_file_grows),
        cmocka_unit_test(test_other_files_are_refused),
        cmocka_unit_test(test_a_commit_is_tried_again),
    };
    return cmocka_run_group_tests(tests, begin, end);
}
