/* program.h - orthogonalisation as data: a short array of matrix operations on named buffers,
 * compiled by optim/newton_schulz.c from form, coefficients and normalisation, run by a backend,
 * fused where it can. */
#ifndef PROGRAM_H
#define PROGRAM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* X and Y are [m, n] with m <= n; the others are [m, m], symmetric. In the Gram form A, B, C and D
 * hold R, Z and Q by turns. */
typedef enum ns_buffer { NS_X, NS_Y, NS_A, NS_B, NS_C, NS_D, NS_BUFFER_COUNT, NS_NONE } ns_buffer;

/* Storage between instructions. Products accumulate in fp32; each result is rounded once, to
 * nearest even, when it is stored. tf32 is stored as fp32 and rounded where it enters a product. */
typedef enum ns_dtype { NS_FP32, NS_TF32, NS_BF16, NS_FP16 } ns_dtype;

typedef enum ns_kind {
    NS_NORMALIZE, /* dst = dst / norm(dst), see ns_norm, in fp32 or better, before anything is
                     rounded; a zero matrix stays zero. `a`, unless none, gets dst dst^T of
                     the outcome, which aol and schatten4 have at hand */
    NS_SYMMETRIC_PRODUCT, /* dst = alpha a a^T + beta c, with c symmetric; dst equals its transpose
                             to the bit, but through a library that has no such product */
    NS_COMMUTING_PRODUCT, /* dst = alpha a b + beta c of symmetric [m, m] that commute: dst equals
                             its transpose to the bit */
    NS_PRODUCT,           /* dst = alpha a b + beta c */
    NS_ADD_IDENTITY       /* dst = a + alpha I */
} ns_kind;

/* F: Frobenius norm of X; A = X X^T. */
typedef enum ns_norm {
    NS_NORM_FROBENIUS_ADD,    /* X / (F + eps) */
    NS_NORM_FROBENIUS_MAX,    /* X / max(F, eps) */
    NS_NORM_FROBENIUS_SAFETY, /* X / (1.02 F + eps) */
    NS_NORM_AOL,              /* s_i = 1/sqrt(max(sum_j |A_ij|, eps)); X = diag(s) X */
    NS_NORM_SCHATTEN4,        /* s = 1/sqrt(max(F(A), eps)); X = s X */
    NS_NORM_SPECTRAL          /* X / (largest singular value + eps) */
} ns_norm;

typedef struct ns_instruction {
    ns_kind kind;
    ns_buffer dst, a, b, c; /* NS_NONE where unused; dst is none of a, b, c */
    float alpha, beta;
    ns_norm norm; /* NS_NORMALIZE */
    double eps;
} ns_instruction;

#define NS_MAX_STEPS        32
#define NS_MAX_INSTRUCTIONS (2 + 7 * NS_MAX_STEPS)

/* Input in NS_X (oriented: rows <= columns), output in `result`. */
typedef struct ns_program {
    ns_dtype dtype;        /* X and Y, and what enters a product with one of them */
    ns_dtype square_dtype; /* A to D, and products of these alone */
    int count;
    ns_buffer result;
    int squares; /* how many of A, B, C, D are used, in that order */
    ns_instruction code[NS_MAX_INSTRUCTIONS];
} ns_program;

/* Floating-point operations the program needs for one [m, n] matrix; symmetric results count half.
 */
double ns_program_flops(const ns_program *program, int64_t m, int64_t n);
/* What they cost, in operations of 16 bits: twice as much in fp32 and tf32; on a device 16 times as
 * much in fp32, which its tensor cores don't have (990 and 67 TFLOP/s on an H100 or H200, 312 and
 * 19.5 on an A100). Processors with and without 16-bit units differ in it, ranks must not. */
double ns_program_cost(const ns_program *program, int64_t m, int64_t n, bool device);

/* Bytes of a number as it is stored. */
static inline size_t ns_dtype_size(ns_dtype dtype) {
    return dtype == NS_BF16 || dtype == NS_FP16 ? 2 : 4;
}
static inline int ns_is_wide(ns_buffer b) {
    return b == NS_X || b == NS_Y;
}
/* The dtype a buffer is stored in. */
static inline ns_dtype ns_stored(const ns_program *program, ns_buffer b) {
    return ns_is_wide(b) ? program->dtype : program->square_dtype;
}
/* The dtype a product's operands are rounded to as they enter it. */
static inline ns_dtype ns_operands(const ns_program *program, const ns_instruction *op) {
    return ns_is_wide(op->a) || ns_is_wide(op->b) ? program->dtype : program->square_dtype;
}

#endif
