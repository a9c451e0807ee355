#include "optim/scale.h"

#include <math.h>

static void dims_of(const settings *s, const tensor *t, const view *v, double *r, double *c) {
    *r = (double)v->rows;
    *c = (double)v->cols;
    if (t->form != MUONSHARD_FLATTEN || t->dims < 3)
        return;
    const int64_t *n = t->shape;
    switch ((scale_dims)s->scale_dims) {
    case SCALE_DIMS_FLATTENED: break;
    case SCALE_DIMS_FIRST_TWO: *c = (double)n[1]; break;
    case SCALE_DIMS_LAST_TWO:
        *r = (double)n[t->dims - 2];
        *c = (double)n[t->dims - 1];
        break;
    case SCALE_DIMS_FIRST_LAST: *c = (double)n[t->dims - 1]; break;
    }
}

double scale_factor(const settings *s, const tensor *t, const view *v) {
    double r, c, factor = 1.0;
    dims_of(s, t, v, &r, &c);
    if (s->layout == LAYOUT_IN_OUT) {
        const double in = r;
        r = c;
        c = in;
    }
    switch ((scale_mode)s->scale) {
    case SCALE_NONE: break;
    case SCALE_SHAPE: factor = sqrt(fmax(1.0, r / c)); break;
    case SCALE_RATIO: factor = sqrt(r / c); break;
    case SCALE_SPECTRAL: factor = sqrt(fmax(r, c)); break;
    case SCALE_RMS: factor = 0.2 * sqrt(fmax(r, c)); break;
    case SCALE_FAN_RATIO: factor = sqrt(fmax(r, c) / fmin(r, c)); break;
    }
    return factor * s->extra_scale;
}
