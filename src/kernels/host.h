/* host.h - what the files of the host backend share. */
#ifndef HOST_H
#define HOST_H

#include "kernels/backend.h"
#include "kernels/host_threads.h"

typedef struct host_impl {
    host_isa isa;
    host_threads *threads; /* own; NULL: the caller's only */
} host_impl;

static inline host_impl *host_of(const backend *self) {
    return self->impl;
}

size_t host_orthogonalize_workspace(backend *self, const ns_program *program, int64_t m, int64_t n,
                                    size_t count);
muonshard_status host_orthogonalize(backend *self, const step_record *record,
                                    const ns_program *program, int64_t m, int64_t n,
                                    const orthogonalize_item *items, size_t count, void *workspace);

/* X [m, n] = X / norm(X) as op->norm and op->eps say; a [m, m] = X X^T of the outcome, unless `a`
 * is NULL. The workspace is aligned for fp64. */
size_t host_normalize_workspace(const ns_instruction *op, size_t m);
muonshard_status host_normalize(const ns_instruction *op, float *x, float *a, size_t m, size_t n,
                                void *workspace, error_text *error);

/* Sum of x^2 in fp64, in an order that depends on count alone. */
double host_sum_squares(const float *x, size_t count);

/* Element-wise passes, a slice of every item a thread. */
muonshard_status host_sum_ranks(backend *self, const sum_ranks_args *args, backend_stream stream);
muonshard_status host_measure(backend *self, const sum_squares_item *items, size_t count);
muonshard_status host_momentum(backend *self, const kernel_context *context,
                               const momentum_args *args, const momentum_item *items, size_t count);
muonshard_status host_variance(backend *self, const kernel_context *context,
                               const variance_args *args, const variance_item *items, size_t count);
muonshard_status host_apply(backend *self, const kernel_context *context, const apply_args *args,
                            const apply_item *items, size_t count);
muonshard_status host_adam(backend *self, const kernel_context *context, const adam_args *args,
                           const adam_item *items, size_t count);

#endif
