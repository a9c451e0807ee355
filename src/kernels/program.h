/* program.h - orthogonalisation as data: a short array of matrix operations on named buffers,
 * compiled by optim/newton_schulz.c from form, coefficients and normalisation, run by a backend,
 * fused where it can. */
#ifndef PROGRAM_H
#define PROGRAM_H

#include <stdint.h>

/* X and Y are [m, n] with m <= n; A and B are [m, m], symmetric. */
typedef enum ns_buffer { NS_X, NS_Y, NS_A, NS_B, NS_BUFFER_COUNT, NS_NONE } ns_buffer;

typedef enum ns_kind {
    NS_NORMALIZE,         /* dst = dst / norm(dst), see ns_norm; a zero matrix stays zero */
    NS_SYMMETRIC_PRODUCT, /* dst = alpha a a^T + beta c, with c symmetric; dst equals its transpose
                             to the bit */
    NS_PRODUCT,           /* dst = alpha a b + beta c */
    NS_AXPBY              /* dst = alpha a + beta c */
} ns_kind;

typedef enum ns_norm {
    NS_NORM_FROBENIUS_ADD, /* x / (F + eps) */
    NS_NORM_FROBENIUS_MAX  /* x / max(F, eps) */
} ns_norm;

typedef struct ns_instruction {
    ns_kind kind;
    ns_buffer dst, a, b, c; /* NS_NONE where unused; dst is none of a, b */
    float alpha, beta;
    ns_norm norm; /* NS_NORMALIZE */
    float eps;
} ns_instruction;

#define NS_MAX_STEPS        32
#define NS_MAX_INSTRUCTIONS (1 + 4 * NS_MAX_STEPS)

/* Input in NS_X (oriented: rows <= columns), output in `result`. */
typedef struct ns_program {
    int count;
    ns_buffer result;
    ns_instruction code[NS_MAX_INSTRUCTIONS];
} ns_program;

/* Floating-point operations the program needs for one [m, n] matrix; symmetric products count half.
 */
double ns_program_flops(const ns_program *program, int64_t m, int64_t n);

#endif
