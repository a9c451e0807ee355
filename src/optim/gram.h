/* gram.h - where the Gram form of Newton-Schulz starts again from X. R = X X^T loses its small
 * eigenvalues to rounding, which may even turn them negative, and every step amplifies that in Q; a
 * restart (X = Q X, R = X X^T) forgets it. */
#ifndef GRAM_H
#define GRAM_H

#include <stdbool.h>
#include "optim/coefficients.h"

/* Bit i: before step i. Bit 0 is never set, the first step starts anyway. */
typedef uint32_t gram_restarts;

/* gram_restarts of the config, which is "auto" when *planned comes back true. ERR_CONFIG: no list
 * of steps below `steps`. */
muonshard_status gram_restarts_read(const char *text, int steps, bool *planned,
                                    gram_restarts *restarts, error_text *error);

/* Restarts for `steps` rows that work in `dtype`: the best one, or as few more as it takes to keep
 * the condition of Q below 1e8 where rounding has taken 4e-4 from the eigenvalues of R (Dao-AILab
 * 2026). In bf16, whose R is in fp32, it takes 1e-6 and none may do: what X and U are rounded by is
 * more. False: none were found, as may happen with many more steps than are of use. */
bool gram_restarts_plan(const coefficient_row *rows, int steps, ns_dtype dtype,
                        gram_restarts *restarts);

#endif
