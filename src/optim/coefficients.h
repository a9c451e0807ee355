/* coefficients.h - the odd polynomials p(x) = a x + b x^3 + c x^5 that the steps of Newton-Schulz
 * apply to singular values: published sets, lists from the config, Polar Express for any lower
 * bound; and the check that rounding can't drive them out of the range they were made for. */
#ifndef COEFFICIENTS_H
#define COEFFICIENTS_H

#include "settings.h"

typedef struct coefficient_row {
    double a, b, c;
} coefficient_row;

/* The rows of steps 0 to ns_steps-1, in fp64, with their safety. ERR_CONFIG: steps the set does not
 * have, a bad item in custom_coefficients. */
muonshard_status coefficients_rows(const settings *s, ns_dtype dtype,
                                   coefficient_row rows[NS_MAX_STEPS], error_text *error);

/* Follows singular values from [1e-3, 1 + 2u], u the unit roundoff of `dtype` (over 1.02 with
 * frobenius_safety), through the ns_steps rows as the backend gets them, in fp32. ERR_CONFIG: one
 * meets a factor a + b x^2 + c x^4 <= 0, which flips it, or ends above 1.5. Always OK with
 * coefficient_check off. */
muonshard_status coefficients_check(const settings *s, ns_dtype dtype, const coefficient_row *rows,
                                    error_text *error);

#endif
