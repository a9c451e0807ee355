#include "optim/newton_schulz.h"

#include <math.h>
#include "optim/coefficients.h"
#include "optim/gram.h"

/* Columns a row from which `auto` thinks of it; with fewer it saves less than a tenth
 * (docs/measurements/2026-11-30-hopper-kernel.md). */
#define GRAM_PAYS 1.5
/* Above this X in bf16 and its Gram matrix can part until nothing is finite. */
enum { GRAM_BF16_SLOPE = 10000 };

ns_dtype newton_schulz_dtype(const settings *s, muonshard_dtype param) {
    switch ((ns_dtype_choice)s->ns_dtype) {
    case NS_DTYPE_FP32: return NS_FP32;
    case NS_DTYPE_TF32: return NS_TF32;
    case NS_DTYPE_BF16: return NS_BF16;
    case NS_DTYPE_FP16: return NS_FP16;
    case NS_DTYPE_PARAM: break;
    }
    return param == MUONSHARD_BF16 ? NS_BF16 : param == MUONSHARD_FP16 ? NS_FP16 : NS_FP32;
}

/* ---- instructions ---- */

static void emit(ns_program *p, ns_instruction instruction) {
    const ns_buffer written =
        instruction.kind == NS_NORMALIZE ? instruction.a : instruction.dst; /* of A to D */
    if (written >= NS_A && written <= NS_D && p->squares < (int)(written - NS_A) + 1)
        p->squares = (int)(written - NS_A) + 1;
    p->code[p->count++] = instruction;
}

/* dst = alpha a b + beta c; c with beta, or NS_NONE and 0 */
static void emit_product(ns_program *p, ns_kind kind, ns_buffer dst, double alpha, ns_buffer a,
                         ns_buffer b, double beta, ns_buffer c) {
    emit(p, (ns_instruction){.kind = kind,
                             .dst = dst,
                             .a = a,
                             .b = b,
                             .c = c,
                             .alpha = (float)alpha,
                             .beta = (float)beta});
}

/* square = wide wide^T */
static void emit_gram(ns_program *p, ns_buffer square, ns_buffer wide) {
    emit_product(p, NS_SYMMETRIC_PRODUCT, square, 1.0, wide, NS_NONE, 0.0, NS_NONE);
}

/* dst = b A + c A A */
static void emit_polynomial(ns_program *p, ns_buffer dst, ns_buffer a, coefficient_row k) {
    emit_product(p, NS_SYMMETRIC_PRODUCT, dst, k.c, a, NS_NONE, k.b, a);
}

/* X = X / norm(X), and A = X X^T, which some norms leave behind. */
static void emit_start(ns_program *p, const settings *s) {
    const ns_norm norm = (ns_norm)s->norm;
    const bool small = norm == NS_NORM_SCHATTEN4 || norm == NS_NORM_SPECTRAL;
    const bool leaves_a = norm == NS_NORM_AOL || norm == NS_NORM_SCHATTEN4;
    emit(p, (ns_instruction){.kind = NS_NORMALIZE,
                             .dst = NS_X,
                             .a = leaves_a ? NS_A : NS_NONE,
                             .b = NS_NONE,
                             .c = NS_NONE,
                             .norm = norm,
                             .eps = !isnan(s->norm_eps) ? s->norm_eps
                                    : small             ? 1e-8
                                                        : 1e-7});
    if (!leaves_a)
        emit_gram(p, NS_A, NS_X);
}

/* ---- the forms ---- */

static void compile_standard(const settings *s, const coefficient_row *rows, ns_program *p) {
    ns_buffer x = NS_X, y = NS_Y;
    emit_start(p, s);
    for (int i = 0; i < (int)s->ns_steps; i++) {
        const coefficient_row k = rows[i];
        if (i > 0)
            emit_gram(p, NS_A, x);
        if (k.c == 0.0) {
            emit_product(p, NS_PRODUCT, y, k.b, NS_A, x, k.a, x);
        } else {
            emit_polynomial(p, NS_B, NS_A, k);
            emit_product(p, NS_PRODUCT, y, 1.0, NS_B, x, k.a, x);
        }
        const ns_buffer swap = x;
        x = y;
        y = swap;
    }
    p->result = x;
}

static ns_buffer free_square(ns_buffer used, ns_buffer used_too, ns_buffer and_this) {
    ns_buffer b = NS_A;
    while (b == used || b == used_too || b == and_this)
        b++;
    return b;
}

/* Per step Z = b R + c R R; Q = Q (Z + aI); R = R (Z + aI)^2; X = Q X before a restart and at the
 * end. aI is in no stored Z, only in the sums of the products. */
static void compile_gram(const settings *s, const coefficient_row *rows, gram_restarts restarts,
                         ns_program *p) {
    const int steps = (int)s->ns_steps;
    ns_buffer x = NS_X, y = NS_Y, r = NS_A, q = NS_NONE;
    emit_start(p, s);
    for (int i = 0; i < steps; i++) {
        const coefficient_row k = rows[i];
        /* A cubic Z is R times b, which the products can take for themselves. */
        const bool is_r = k.c == 0.0 && q != NS_NONE;
        const double factor = is_r ? k.b : 1.0;
        const ns_buffer z = is_r ? r : free_square(r, q, NS_NONE);
        if (!is_r)
            emit_polynomial(p, z, r, k);
        const ns_buffer q_before = q;
        q = free_square(r, z, q_before);
        if (q_before == NS_NONE)
            emit(p, (ns_instruction){.kind = NS_ADD_IDENTITY,
                                     .dst = q,
                                     .a = z,
                                     .b = NS_NONE,
                                     .c = NS_NONE,
                                     .alpha = (float)k.a});
        else
            emit_product(p, NS_COMMUTING_PRODUCT, q, factor, q_before, z, k.a, q_before);
        const bool last = i + 1 == steps;
        if (!last && !(restarts >> (i + 1) & 1)) {
            const ns_buffer t = free_square(r, z, q);
            emit_product(p, NS_COMMUTING_PRODUCT, t, factor, r, z, k.a, r);
            r = free_square(t, z, q);
            emit_product(p, NS_COMMUTING_PRODUCT, r, factor, t, z, k.a, t);
            continue;
        }
        emit_product(p, NS_PRODUCT, y, 1.0, q, x, 0.0, NS_NONE);
        const ns_buffer swap = x;
        x = y;
        y = swap;
        if (!last)
            emit_gram(p, r = NS_A, x);
        q = NS_NONE;
    }
    p->result = x;
}

/* Rounding X to bf16 gives it singular values where it has none; this is what they are amplified
 * by.
 */
static double slope_at_zero(const coefficient_row *rows, int steps) {
    double slope = 1.0;
    for (int i = 0; i < steps; i++)
        slope *= rows[i].a;
    return slope;
}

/* Replaces the standard form where Gram is asked for, or `auto` and cheaper. */
static muonshard_status consider_gram(const settings *s, const coefficient_row *rows, bool device,
                                      int64_t m, int64_t n, ns_program *p, error_text *error) {
    const bool forced = s->ns_form == NS_FORM_GRAM;
    const int steps = (int)s->ns_steps;
    bool planned;
    gram_restarts restarts;
    TRY(gram_restarts_read(s->gram_restarts, steps, &planned, &restarts, error));
    if (m == n || (!forced && (double)n < GRAM_PAYS * (double)m))
        return MUONSHARD_OK;
    /* On squares in bf16 it diverges. */
    const ns_dtype square = p->dtype == NS_BF16 ? NS_FP32 : p->dtype;
    if (planned && !gram_restarts_plan(rows, steps, p->dtype, &restarts)) {
        FAIL_IF(forced, error, MUONSHARD_ERR_CONFIG,
                "gram_restarts: auto finds none that keep coefficients and ns_steps %d stable; "
                "coefficient_safety helps, a list of steps is taken as it is, ns_form: standard "
                "and auto need none",
                steps);
        return MUONSHARD_OK;
    }
    const double slope = slope_at_zero(rows, steps);
    if (p->dtype == NS_BF16 && slope > GRAM_BF16_SLOPE && !s->coefficient_check) {
        FAIL_IF(forced, error, MUONSHARD_ERR_CONFIG,
                "coefficients: these multiply what bf16 rounds by %.0f, more than the %d up to "
                "which ns_form: gram stays finite; standard and auto do, fp16 and fp32 too; "
                "coefficient_check: off takes them anyway",
                slope, GRAM_BF16_SLOPE);
        return MUONSHARD_OK;
    }
    ns_program gram = {.dtype = p->dtype, .square_dtype = square};
    compile_gram(s, rows, restarts, &gram);
    if (forced || ns_program_cost(&gram, m, n, device) < ns_program_cost(p, m, n, device))
        *p = gram;
    return MUONSHARD_OK;
}

muonshard_status newton_schulz_compile(const settings *s, muonshard_dtype param, bool device,
                                       int64_t m, int64_t n, ns_program *program,
                                       error_text *error) {
    FAIL_IF(m < 1 || m > n, error, MUONSHARD_ERR_INTERNAL, "Newton-Schulz of %lld x %lld",
            (long long)m, (long long)n);
    FAIL_IF(n > INT32_MAX, error, MUONSHARD_ERR_UNSUPPORTED,
            "a matrix has a side of %lld; BLAS takes %d", (long long)n, INT32_MAX);
    const ns_dtype dtype = newton_schulz_dtype(s, param);
    coefficient_row rows[NS_MAX_STEPS];
    TRY(coefficients_rows(s, dtype, rows, error));
    TRY(coefficients_check(s, dtype, rows, error));
    *program = (ns_program){.dtype = dtype, .square_dtype = dtype};
    compile_standard(s, rows, program);
    return s->ns_form == NS_FORM_STANDARD ? MUONSHARD_OK
                                          : consider_gram(s, rows, device, m, n, program, error);
}
