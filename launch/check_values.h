/* check_values.h - gradients whose sum over the ranks gives away what went wrong with it.
 *
 * Rank r's gradient has weight(r, i) value(i) at element i. Values are small integers that differ
 * from element to element, so that what lands in another place is seen. A weight is 1 and one of
 * the three digits of r in base 32, by turns of the elements: it is never zero, so that a rank that
 * is missing or counted twice is seen everywhere, and no two ranks have the same three, so that one
 * in the place of the other is seen in one element of three at least. Sums are exact in fp32. */
#ifndef CHECK_VALUES_H
#define CHECK_VALUES_H

#include <stddef.h>
#include <stdint.h>

enum { CHECK_DIGITS = 3, CHECK_BASE = 32, CHECK_MOST_RANKS = 32768 };

typedef struct check_pattern {
    int ranks;
    uint32_t values;             /* of a value without its sign: 1 to this */
    int64_t total[CHECK_DIGITS]; /* weights of all ranks, by digit */
} check_pattern;

check_pattern check_pattern_make(int ranks);
float check_gradient(const check_pattern *p, int rank, size_t i);
/* Over all ranks. */
float check_sum(const check_pattern *p, size_t i);

typedef enum check_cause {
    CHECK_RIGHT,
    CHECK_MISSING,  /* as if the gradient of rank `who` were missing */
    CHECK_TWICE,    /* as if it were counted twice */
    CHECK_REPLACED, /* as if one rank's were in the place of another's */
    CHECK_SLOT,     /* what belongs in the slot of rank `who` */
    CHECK_BEFORE,   /* what was there before the step */
    CHECK_UNKNOWN
} check_cause;

/* The same on all ranks' machines: it is sent between them. */
typedef struct check_outcome {
    uint64_t wrong, first; /* elements; the first of them */
    float found, expected; /* sums, without the factor */
    int32_t cause, who;
    int32_t owner; /* of the first wrong element */
} check_outcome;

/* Whether found [count] is factor * check_sum; rank r owns elements [r slot, (r+1) slot). `before`:
 * the factor that held before the step. `factor` and `before` are powers of two but for the
 * sign; `before` may be 0. */
check_outcome check_values(const check_pattern *p, const float *found, size_t count, size_t slot,
                           float factor, float before);
/* "element 5 of 99, ...", for people; `tensor` is its name. */
void check_outcome_text(const check_outcome *o, const char *tensor, size_t count, char *text,
                        size_t size);

#endif
