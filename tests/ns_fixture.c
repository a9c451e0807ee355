#include "mirror_backend.h" /* before cmocka.h, whose macro `fail` would hide a function */
#include "ns_fixture.h"

#include <stdarg.h>
#include <setjmp.h>
#include <cmocka.h>

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { GUARD = 256, POISON = 0xff }; /* bytes; NaN in every dtype */

settings ns_settings(coefficient_set set, int steps, ns_dtype_choice dtype) {
    return (settings){.coefficients = (int)set,
                      .ns_steps = steps,
                      .ns_dtype = (int)dtype,
                      .ns_form = NS_FORM_STANDARD,
                      .norm = NS_NORM_FROBENIUS_MAX,
                      .norm_eps = 1e-7,
                      .polar_lower_bound = 1e-3,
                      .coefficient_safety = 1.0,
                      .safety_last = 1,
                      .gram_restarts = "auto"};
}

ns_program ns_compiled(const settings *s, int64_t r, int64_t c) {
    ns_program program;
    error_text error = {""};
    const int64_t m = r < c ? r : c, n = r < c ? c : r;
    if (newton_schulz_compile(s, MUONSHARD_FP32, false, m, n, &program, &error) != MUONSHARD_OK)
        fail_msg("%s", error.text);
    return program;
}

float *ns_numbers(size_t count) {
    float *x = calloc(count, sizeof *x);
    assert_non_null(x);
    return x;
}

float *ns_matrix(int64_t r, int64_t c, oracle_spectrum spectrum, oracle_rng *rng) {
    float *x = ns_numbers((size_t)(r * c));
    oracle_matrix(x, r, c, spectrum, rng);
    return x;
}

float *ns_transposed(const float *x, int64_t r, int64_t c) {
    float *t = ns_numbers((size_t)(r * c));
    for (int64_t i = 0; i < r; i++)
        for (int64_t j = 0; j < c; j++)
            t[j * r + i] = x[i * c + j];
    return t;
}

const char *ns_dtype_text(ns_dtype dtype) {
    static const char *const names[] = {"fp32", "tf32", "bf16", "fp16"};
    return names[dtype];
}

/* [bytes] of poison with guards before and after. */
static unsigned char *guarded(size_t bytes) {
    unsigned char *block = malloc(bytes + 2 * GUARD);
    assert_non_null(block);
    memset(block, POISON, bytes + 2 * GUARD);
    return block + GUARD;
}

static void check_guards(const unsigned char *memory, size_t bytes) {
    for (size_t i = 0; i < GUARD; i++)
        assert_true(memory[bytes + i] == POISON && (memory - GUARD)[i] == POISON);
}

void ns_run(const ns_program *program, int64_t r, int64_t c, float *const *u, float *const *out,
            size_t count, bool in_place) {
    const int64_t m = r < c ? r : c, n = r < c ? c : r;
    const size_t elements = (size_t)(r * c), bytes = elements * sizeof(float);
    const muonshard_dtype dtype = ns_program_output(program);
    const size_t out_bytes = in_place ? bytes : elements * dtype_size(dtype);
    backend *host = NULL;
    error_text error;
    assert_int_equal(test_backend_open(&host, &error), MUONSHARD_OK);
    const size_t size = host->ops->orthogonalize_workspace(host, program, m, n, count);
    void *workspace;
    assert_int_equal(host->ops->alloc(host, &workspace, size + GUARD), MUONSHARD_OK);
    memset(workspace, POISON, size + GUARD);
    orthogonalize_item *items = calloc(count, sizeof *items);
    unsigned char **written = calloc(count, sizeof *written);
    assert_true(items && written);
    for (size_t i = 0; i < count; i++) {
        written[i] = guarded(out_bytes);
        if (in_place)
            memcpy(written[i], u[i], bytes);
        const void *in = in_place ? (const void *)written[i] : u[i];
        items[i] = (orthogonalize_item){.u = in, .out = written[i], .transposed = r > c};
    }
    assert_int_equal(host->ops->orthogonalize(host, NULL, program, m, n, items, count, workspace),
                     MUONSHARD_OK);
    for (size_t i = 0; i < GUARD; i++)
        assert_true(((unsigned char *)workspace)[size + i] == POISON);
    for (size_t i = 0; i < count; i++) {
        check_guards(written[i], out_bytes);
        dtype_load(out[i], written[i], dtype, elements);
        free(written[i] - GUARD);
    }
    free(written);
    free(items);
    host->ops->free(host, workspace);
    backend_close(host);
}
