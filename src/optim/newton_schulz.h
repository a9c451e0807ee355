/* newton_schulz.h - the orthogonalisation, compiled from settings into a program a backend runs. */
#ifndef NEWTON_SCHULZ_H
#define NEWTON_SCHULZ_H

#include "settings.h"

/* For matrices oriented to m <= n. Per step with coefficients (a, b, c): A = X X^T; B = b A + c A
 * A; X = a X + B X (Jordan et al. 2024). The polynomial, the normalisation before it and the number
 * of steps come from `s`. */
muonshard_status newton_schulz_compile(const settings *s, int64_t m, int64_t n, ns_program *program,
                                       error_text *error);

#endif
