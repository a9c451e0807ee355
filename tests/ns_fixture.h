/* ns_fixture.h - Newton-Schulz programs run on the host backend for tests: whatever is to be
 * written is NaN before, and what lies around it is looked at afterwards. */
#ifndef NS_FIXTURE_H
#define NS_FIXTURE_H

#include "optim/newton_schulz.h"
#include "oracle.h"

/* The defaults, but for what most tests choose: standard form, Frobenius norm with eps 1e-7. */
settings ns_settings(coefficient_set set, int steps, ns_dtype_choice dtype);
/* For matrices [r, c] and their transposes. */
ns_program ns_compiled(const settings *s, int64_t r, int64_t c);

/* out[i] [r, c] = what the program makes of u[i] [r, c], widened to fp32; u[i] may be out[i]. In
 * place: the backend is given one piece of memory for both. */
void ns_run(const ns_program *program, int64_t r, int64_t c, float *const *u, float *const *out,
            size_t count, bool in_place);

/* Freed by the caller. */
float *ns_numbers(size_t count);
float *ns_matrix(int64_t r, int64_t c, oracle_spectrum spectrum, oracle_rng *rng);
float *ns_transposed(const float *x, int64_t r, int64_t c); /* [c, r] */

const char *ns_dtype_text(ns_dtype dtype);

#endif
