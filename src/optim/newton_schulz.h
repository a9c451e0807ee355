/* newton_schulz.h - the orthogonalisation, compiled from settings into a program a backend runs. */
#ifndef NEWTON_SCHULZ_H
#define NEWTON_SCHULZ_H

#include "settings.h"

/* The dtype Newton-Schulz works in for a parameter of dtype `param`. */
ns_dtype newton_schulz_dtype(const settings *s, muonshard_dtype param);

/* For matrices oriented to m <= n of parameters of dtype `param`. Standard form, per step with
 * coefficients (a, b, c): A = X X^T; B = b A + c A A; X = a X + B X (Jordan et al. 2024); the Gram
 * form takes the same polynomial on X X^T (Dao-AILab 2025). Coefficients, form, normalisation and
 * number of steps come from `s`; where it leaves the form open, the cheaper one is taken, which on
 * a device may be another. ERR_CONFIG names the setting that cannot be: coefficients the check
 * refuses, steps a set does not have, Gram in bf16; ERR_UNSUPPORTED: a side too large for BLAS. */
muonshard_status newton_schulz_compile(const settings *s, muonshard_dtype param, bool device,
                                       int64_t m, int64_t n, ns_program *program,
                                       error_text *error);

#endif
