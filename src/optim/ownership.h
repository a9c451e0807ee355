/* ownership.h - which rank computes a matrix. A policy never changes the result, only who has the
 * work. */
#ifndef OWNERSHIP_H
#define OWNERSHIP_H

#include "optim/registry.h"

/* Views a and b are of one oriented shape and one dtype of parameters: they can travel in one wave
 * and be computed in one batch. */
bool ownership_alike(const registry *r, size_t a, size_t b);
/* What each view's Newton-Schulz takes in its form, [view_count]: ns_program_cost, and, unless
 * NULL, ns_program_flops. */
muonshard_status ownership_price(const registry *r, const settings *s, bool device, double *cost,
                                 double *flops, error_text *error);
/* owner[v] for each v of `loose` [count], views that are in no whole wave of their tensor (those
 * give every rank the same). round_robin: by turns, shape by shape. balanced: the most costly
 * first, each to the rank with the least so far (longest processing time, Graham 1969). */
muonshard_status ownership_assign(const registry *r, const settings *s, int world_size,
                                  const double *cost, const size_t *loose, size_t count, int *owner,
                                  error_text *error);

/* No assignment of matrices with these costs [count] keeps all ranks below *bound. */
muonshard_status ownership_bound(const double *cost, size_t count, size_t ranks, double *bound,
                                 error_text *error);

#endif
