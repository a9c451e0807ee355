/* The bits the host backend promises of a Newton-Schulz program; its numbers are in
 * test_orthogonalize_cases.c. */
#include "dtype.h" /* before cmocka.h, whose macro `fail` would hide a function */
#include "kernels/backend.h"
#include "mirror_backend.h"
#include "ns_fixture.h"

#include <stdarg.h>
#include <setjmp.h>
#include <cmocka.h>

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const int64_t shapes[][2] = {{1, 1},     {1, 50},   {7, 13},  {31, 17}, {64, 64},
                                    {130, 300}, {132, 68}, {66, 40}, {72, 136}};
enum { SHAPES = sizeof shapes / sizeof shapes[0], COUNT = 3 };

/* Everything a program can be made of. */
static const struct {
    coefficient_set set;
    ns_dtype_choice dtype;
    ns_form form;
    ns_norm norm;
} kinds[] = {
    {COEFFICIENTS_SIMPLE, NS_DTYPE_FP32, NS_FORM_STANDARD, NS_NORM_FROBENIUS_ADD},
    {COEFFICIENTS_SIMPLE, NS_DTYPE_FP32, NS_FORM_GRAM, NS_NORM_FROBENIUS_MAX},
    {COEFFICIENTS_QUINTIC, NS_DTYPE_TF32, NS_FORM_STANDARD, NS_NORM_FROBENIUS_SAFETY},
    {COEFFICIENTS_SIMPLE, NS_DTYPE_BF16, NS_FORM_STANDARD, NS_NORM_SCHATTEN4},
    {COEFFICIENTS_SIMPLE, NS_DTYPE_FP16, NS_FORM_GRAM, NS_NORM_AOL},
    {COEFFICIENTS_CUBIC5, NS_DTYPE_FP16, NS_FORM_STANDARD, NS_NORM_SPECTRAL},
};
enum { KINDS = sizeof kinds / sizeof kinds[0] };

static ns_program program_of(size_t kind, int64_t r, int64_t c) {
    settings s = ns_settings(kinds[kind].set, 5, kinds[kind].dtype);
    s.ns_form = (int)kinds[kind].form;
    s.norm = (int)kinds[kind].norm;
    return ns_compiled(&s, r, c);
}

static void for_all(void (*check)(const ns_program *program, int64_t r, int64_t c, float **u,
                                  float **out)) {
    for (size_t k = 0; k < KINDS; k++)
        for (size_t s = 0; s < SHAPES; s++) {
            const int64_t r = shapes[s][0], c = shapes[s][1];
            const ns_program program = program_of(k, r, c);
            oracle_rng rng = {k * 100 + s};
            float *u[COUNT], *out[COUNT];
            for (size_t i = 0; i < COUNT; i++) {
                u[i] = ns_matrix(r, c, ORACLE_GAUSSIAN, &rng);
                out[i] = ns_numbers((size_t)(r * c));
            }
            ns_run(&program, r, c, u, out, COUNT, false);
            check(&program, r, c, u, out);
            for (size_t i = 0; i < COUNT; i++) {
                free(u[i]);
                free(out[i]);
            }
        }
}

/* Twice what test_orthogonalize_cases.c allows on matrices like these: fp32, tf32, bf16, fp16. */
static const double twice[] = {4e-5, 2e-2, 5e-2, 7e-3};

/* Relative, in Frobenius norm. */
static double difference_of(const float *a, const float *b, size_t count) {
    double difference = 0.0, norm = 0.0;
    for (size_t i = 0; i < count; i++) {
        difference += pow((double)a[i] - b[i], 2.0);
        norm += pow((double)b[i], 2.0);
    }
    return sqrt(difference) / sqrt(norm);
}

static void check_single(const ns_program *program, int64_t r, int64_t c, float **u, float **out) {
    const size_t bytes = (size_t)(r * c) * sizeof(float);
    float *again = ns_numbers((size_t)(r * c));
    for (size_t i = COUNT; i-- > 0;) {
        ns_run(program, r, c, &u[i], &again, 1, i % 2 == 0);
        if (test_backend_is_card())
            assert_true(difference_of(again, out[i], (size_t)(r * c)) <= twice[program->dtype]);
        else
            assert_memory_equal(again, out[i], bytes);
    }
    free(again);
}

/* One by one, in another order, in place: the same bits; on a card, as near as both are to the
 * exact result. */
static void test_batched_equals_single(void **state) {
    (void)state;
    for_all(check_single);
}

/* A batch in which some matrices are turned, in no order, and each is what it is by itself. There
 * are DISTINCT of them, again and again. */
static void check_mixed(size_t kind, int64_t m, int64_t n, size_t count) {
    enum { DISTINCT = 5 };
    static const bool turned[DISTINCT] = {true, false, false, true, false};
    const ns_program program = program_of(kind, m, n);
    const size_t elements = (size_t)(m * n);
    oracle_rng rng = {kind};
    float *u[DISTINCT], *alone[DISTINCT], *got = ns_numbers(elements);
    orthogonalize_item *items = calloc(count, sizeof *items);
    backend *b = NULL;
    error_text error;
    void *workspace;
    for (size_t i = 0; i < DISTINCT; i++) {
        const int64_t r = turned[i] ? n : m, c = turned[i] ? m : n;
        u[i] = ns_matrix(r, c, ORACLE_GAUSSIAN, &rng);
        alone[i] = ns_numbers(elements);
        ns_run(&program, r, c, &u[i], &alone[i], 1, false);
    }
    assert_int_equal(test_backend_open(&b, &error), MUONSHARD_OK);
    const size_t bytes = b->ops->orthogonalize_workspace(b, &program, m, n, count);
    assert_int_equal(b->ops->alloc(b, &workspace, bytes), MUONSHARD_OK);
    for (size_t i = 0; i < count; i++)
        items[i] = (orthogonalize_item){
            .u = u[i % DISTINCT], .out = ns_numbers(elements), .transposed = turned[i % DISTINCT]};
    assert_int_equal(b->ops->orthogonalize(b, NULL, &program, m, n, items, count, workspace),
                     MUONSHARD_OK);
    for (size_t i = 0; i < count; i++) {
        const float *wanted = alone[i % DISTINCT];
        dtype_load(got, items[i].out, ns_program_output(&program), elements);
        if (test_backend_is_card())
            assert_true(difference_of(got, wanted, elements) <= twice[program.dtype]);
        else
            assert_memory_equal(got, wanted, elements * sizeof(float));
        free(items[i].out);
    }
    for (size_t i = 0; i < DISTINCT; i++) {
        free(u[i]);
        free(alone[i]);
    }
    free(items);
    free(got);
    b->ops->free(b, workspace);
    backend_close(b);
}

static void test_turned_ones_among_others(void **state) {
    (void)state;
    for (size_t k = 0; k < KINDS; k++) {
        check_mixed(k, 8, 24, 5);
        check_mixed(k, 72, 136, 7);
    }
}

/* More than one launch takes. */
static void test_large_batch(void **state) {
    (void)state;
    check_mixed(3, 8, 16, 1030);
}

static void check_transposed(const ns_program *program, int64_t r, int64_t c, float **u,
                             float **out) {
    if (r == c) /* X X^T of the transpose is another matrix */
        return;
    float *turned = ns_transposed(u[0], r, c), *expected = ns_transposed(out[0], r, c);
    ns_run(program, c, r, &turned, &turned, 1, true);
    assert_memory_equal(turned, expected, (size_t)(r * c) * sizeof(float));
    free(turned);
    free(expected);
}

static void test_transposed_input_gives_transposed_bits(void **state) {
    (void)state;
    for_all(check_transposed);
}

/* Matrices that start so many elements behind an aligned address, and their results elsewhere. */
static void check_shifted(const ns_program *program, int64_t r, int64_t c, float **u, float **out) {
    enum { SPARE = 8 };
    const muonshard_dtype dtype = ns_program_output(program);
    const int64_t m = r < c ? r : c, n = r < c ? c : r;
    const size_t elements = (size_t)(r * c), size = dtype_size(dtype);
    orthogonalize_item items[COUNT];
    char *memory[COUNT];
    float *in[COUNT], *got = ns_numbers(elements);
    backend *b = NULL;
    error_text error;
    void *workspace;
    assert_int_equal(test_backend_open(&b, &error), MUONSHARD_OK);
    const size_t bytes = b->ops->orthogonalize_workspace(b, program, m, n, COUNT);
    assert_int_equal(b->ops->alloc(b, &workspace, bytes), MUONSHARD_OK);
    for (size_t i = 0; i < COUNT; i++) {
        in[i] = ns_numbers(elements + SPARE);
        memory[i] = (char *)ns_numbers(elements + SPARE);
        memcpy(in[i] + i, u[i], elements * sizeof(float));
        items[i] = (orthogonalize_item){
            .u = in[i] + i, .out = memory[i] + (i * 5 + 2) % SPARE * size, .transposed = r > c};
    }
    assert_int_equal(b->ops->orthogonalize(b, NULL, program, m, n, items, COUNT, workspace),
                     MUONSHARD_OK);
    for (size_t i = 0; i < COUNT; i++) {
        dtype_load(got, items[i].out, dtype, elements);
        assert_memory_equal(got, out[i], elements * sizeof(float));
        free(in[i]);
        free(memory[i]);
    }
    free(got);
    b->ops->free(b, workspace);
    backend_close(b);
}

static void test_where_matrices_start_changes_no_bit(void **state) {
    (void)state;
    for_all(check_shifted);
}

static void check_without_instructions(const ns_program *program, int64_t r, int64_t c, float **u,
                                       float **out) {
    float *plain = ns_numbers((size_t)(r * c));
    dtype_use_instructions(false);
    ns_run(program, r, c, &u[0], &plain, 1, false);
    dtype_use_instructions(true);
    assert_memory_equal(plain, out[0], (size_t)(r * c) * sizeof(float));
    free(plain);
}

static void test_instructions_change_no_bit(void **state) {
    (void)state;
    for_all(check_without_instructions);
}

/* A = X X^T, B = 0.5 A + 2 A A, C = 3 A B - 0.25 B of a square X, as results: A, B and C equal
 * their transposes, in every dtype. */
static void test_symmetric_results_equal_their_transposes(void **state) {
    (void)state;
    enum { M = 150 };
    const ns_instruction code[] = {
        {.kind = NS_NORMALIZE,
         .dst = NS_X,
         .a = NS_NONE,
         .b = NS_NONE,
         .c = NS_NONE,
         .norm = NS_NORM_FROBENIUS_ADD,
         .eps = 1e-7},
        {.kind = NS_SYMMETRIC_PRODUCT,
         .dst = NS_A,
         .a = NS_X,
         .b = NS_NONE,
         .c = NS_NONE,
         .alpha = 1.0F},
        {.kind = NS_SYMMETRIC_PRODUCT,
         .dst = NS_B,
         .a = NS_A,
         .b = NS_NONE,
         .c = NS_A,
         .alpha = 2.0F,
         .beta = 0.5F},
        {.kind = NS_COMMUTING_PRODUCT,
         .dst = NS_C,
         .a = NS_A,
         .b = NS_B,
         .c = NS_B,
         .alpha = 3.0F,
         .beta = -0.25F},
    };
    oracle_rng rng = {9};
    float *x = ns_matrix(M, M, ORACLE_GAUSSIAN, &rng), *out = ns_numbers(M * M);
    for (int dtype = NS_FP32; dtype <= NS_FP16; dtype++)
        for (int result = NS_A; result <= NS_C; result++) {
            ns_program p = {
                .dtype = (ns_dtype)dtype, .count = 4, .squares = 3, .result = (ns_buffer)result};
            memcpy(p.code, code, sizeof code);
            ns_run(&p, M, M, &x, &out, 1, false);
            double length = 0.0;
            for (size_t i = 0; i < M; i++)
                for (size_t j = 0; j < M; j++) {
                    assert_memory_equal(&out[i * M + j], &out[j * M + i], sizeof *out);
                    length += fabs((double)out[i * M + j]);
                }
            assert_true(length > 0.0 && isfinite(length));
        }
    free(x);
    free(out);
}

static void test_skip_leaves_the_matrix(void **state) {
    (void)state;
    backend *host = NULL;
    error_text error;
    assert_int_equal(
        backend_open_host((host_options){.isa = host_isa_detect(), .threads = 2}, &host, &error),
        MUONSHARD_OK);
    const ns_program program = program_of(0, 3, 4);
    float u[12] = {1, 2, 3}, before[12];
    memcpy(before, u, sizeof u);
    void *workspace;
    const size_t size = host->ops->orthogonalize_workspace(host, &program, 3, 4, 1);
    assert_int_equal(host->ops->alloc(host, &workspace, size), MUONSHARD_OK);
    step_record record = {.skip = 1};
    const orthogonalize_item item = {.u = u, .out = u};
    assert_int_equal(host->ops->orthogonalize(host, &record, &program, 3, 4, &item, 1, workspace),
                     MUONSHARD_OK);
    assert_memory_equal(u, before, sizeof u);
    record.skip = 0;
    assert_int_equal(host->ops->orthogonalize(host, &record, &program, 3, 4, &item, 1, workspace),
                     MUONSHARD_OK);
    assert_memory_not_equal(u, before, sizeof u);
    host->ops->free(host, workspace);
    backend_close(host);
}

int main(void) {
    const struct CMUnitTest all[] = {
        cmocka_unit_test(test_batched_equals_single),
        cmocka_unit_test(test_turned_ones_among_others),
        cmocka_unit_test(test_large_batch),
        cmocka_unit_test(test_transposed_input_gives_transposed_bits),
        cmocka_unit_test(test_where_matrices_start_changes_no_bit),
        cmocka_unit_test(test_instructions_change_no_bit),
        cmocka_unit_test(test_symmetric_results_equal_their_transposes),
        cmocka_unit_test(test_skip_leaves_the_matrix),
    };
    return cmocka_run_group_tests(all, NULL, NULL);
}
