/* scale.h - the factor a matrix's update is multiplied by, from its shape. */
#ifndef SCALE_H
#define SCALE_H

#include "optim/registry.h"

/* For an [r, c] view: shape sqrt(max(1, r/c)), ratio sqrt(r/c), spectral sqrt(max(r, c)), rms 0.2
 * sqrt(max(r, c)), fan_ratio sqrt(max(r, c)/min(r, c)); times extra_scale. r, c are the view's own,
 * except that a flattened tensor takes the sizes scale_dims names; layout in_out changes them
 * round. */
double scale_factor(const settings *s, const tensor *t, const view *v);

#endif
