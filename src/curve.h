/* curve.h - schedules: a value over the steps, written as points. The text is read at every call:
 * nothing is allocated, nothing is kept. */
#ifndef CURVE_H
#define CURVE_H

#include "status.h"

/* muonshard_schedule_value with a text that names the point and what is wrong with it; steps and
 * total are not negative. The same bits on every machine. ERR_CONFIG. */
muonshard_status curve_value(const char *schedule, int64_t step, int64_t total, double otherwise,
                             double *value, error_text *error);
/* The lowest and the highest value of any step; NaN when no point is left. ERR_CONFIG. */
muonshard_status curve_range(const char *schedule, int64_t total, double *lowest, double *highest,
                             error_text *error);

#endif
