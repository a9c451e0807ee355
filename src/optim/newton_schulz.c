#include "optim/newton_schulz.h"

typedef struct coefficient_row {
    double a, b, c;
} coefficient_row;

typedef struct coefficient_table {
    const coefficient_row *rows;
    int count; /* step i takes row i mod count */
} coefficient_table;

/* Keller Jordan's quintic, the same at every step. */
static const coefficient_row simple[] = {{3.4445, -4.7750, 2.0315}};
/* You Jiacheng's five, as in the nvidia preset. */
static const coefficient_row quintic[] = {{4.0848, -6.8946, 2.9270},
                                          {3.9505, -6.3029, 2.6377},
                                          {3.7418, -5.5913, 2.3037},
                                          {2.8769, -3.1427, 1.2046},
                                          {2.8366, -3.0525, 1.2012}};

static const coefficient_table tables[] = {
    [COEFFICIENTS_SIMPLE] = {simple, sizeof simple / sizeof simple[0]},
    [COEFFICIENTS_QUINTIC] = {quintic, sizeof quintic / sizeof quintic[0]},
};

static void emit(ns_program *p, ns_instruction instruction) {
    p->code[p->count++] = instruction;
}

/* x = a x + (b A + c A A) x with A = x x^T; the result stands in `y`. */
static void emit_quintic(ns_program *p, coefficient_row k, ns_buffer x, ns_buffer y) {
    emit(p, (ns_instruction){.kind = NS_SYMMETRIC_PRODUCT,
                             .dst = NS_A,
                             .a = x,
                             .b = NS_NONE,
                             .c = NS_NONE,
                             .alpha = 1.0F});
    emit(p, (ns_instruction){.kind = NS_SYMMETRIC_PRODUCT,
                             .dst = NS_B,
                             .a = NS_A,
                             .b = NS_NONE,
                             .c = NS_A,
                             .alpha = (float)k.c,
                             .beta = (float)k.b});
    emit(p, (ns_instruction){.kind = NS_PRODUCT,
                             .dst = y,
                             .a = NS_B,
                             .b = x,
                             .c = x,
                             .alpha = 1.0F,
                             .beta = (float)k.a});
}

muonshard_status newton_schulz_compile(const settings *s, int64_t m, int64_t n, ns_program *program,
                                       error_text *error) {
    FAIL_IF(m < 1 || m > n, error, MUONSHARD_ERR_INTERNAL, "Newton-Schulz of %lld x %lld",
            (long long)m, (long long)n);
    FAIL_IF(n > INT32_MAX, error, MUONSHARD_ERR_UNSUPPORTED,
            "a matrix has a side of %lld; BLAS takes %d", (long long)n, INT32_MAX);
    FAIL_IF(s->ns_steps < 1 || s->ns_steps > NS_MAX_STEPS, error, MUONSHARD_ERR_CONFIG,
            "ns_steps is %lld; 1 to %d are allowed", (long long)s->ns_steps, NS_MAX_STEPS);
    const coefficient_table *table = &tables[s->coefficients];
    program->count = 0;
    emit(program, (ns_instruction){.kind = NS_NORMALIZE,
                                   .dst = NS_X,
                                   .a = NS_NONE,
                                   .b = NS_NONE,
                                   .c = NS_NONE,
                                   .norm = (ns_norm)s->norm,
                                   .eps = (float)s->norm_eps});
    ns_buffer x = NS_X, y = NS_Y;
    for (int64_t i = 0; i < s->ns_steps; i++) {
        coefficient_row k = table->rows[i % table->count];
        k.a /= s->coefficient_safety;
        k.b /= s->coefficient_safety;
        k.c /= s->coefficient_safety;
        emit_quintic(program, k, x, y);
        const ns_buffer swap = x;
        x = y;
        y = swap;
    }
    program->result = x;
    return MUONSHARD_OK;
}
