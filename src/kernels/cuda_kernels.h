/* cuda_kernels.h - the kernels of the CUDA backend behind launch calls, for the C files of it.
 * Every call enqueues on `stream` and returns the launch's outcome; pointers are the device's but
 * for lists of items, which travel as kernel arguments and may be changed or freed at once. */
#ifndef CUDA_KERNELS_H
#define CUDA_KERNELS_H

#include <cuda_runtime_api.h>

#include "kernels/backend.h"
#include "kernels/cuda_layout.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---- cuda_elementwise.cu ---- */

cudaError_t cuda_write(void *dst, const void *src, size_t bytes, cudaStream_t stream);
cudaError_t cuda_convert(const kernel_context *context, const convert_item *items, size_t count,
                         cudaStream_t stream);
cudaError_t cuda_sum_ranks(const sum_ranks_args *args, cudaStream_t stream);
/* scratch [CUDA_SCRATCH_BYTES], of one stream. */
cudaError_t cuda_momentum(const kernel_context *context, const momentum_args *args,
                          const momentum_item *items, size_t count, double *scratch,
                          cudaStream_t stream);
cudaError_t cuda_apply(const kernel_context *context, const apply_args *args,
                       const apply_item *items, size_t count, cudaStream_t stream);
cudaError_t cuda_adam(const kernel_context *context, const adam_args *args, const adam_item *items,
                      size_t count, cudaStream_t stream);

/* ---- cuda_sums.cu ---- */

cudaError_t cuda_sum_squares(const sum_squares_item *items, size_t count, double *scratch,
                             cudaStream_t stream);
cudaError_t cuda_resolve(const resolve_args *args, cudaStream_t stream);
cudaError_t cuda_variance(const kernel_context *context, const variance_args *args,
                          const variance_item *items, size_t count, double *scratch,
                          cudaStream_t stream);

/* ---- cuda_normalize.cu ---- Matrices of one batch lie one after the other: x [count, m, n],
 * squares [count, m, m], factors [count, m] fp64. `ns_dtype`: fp32 for tf32. */

/* x64 = the items' matrices, oriented. */
cudaError_t cuda_load_fp64(const orthogonalize_item *items, size_t count, int64_t m, int64_t n,
                           double *x64, cudaStream_t stream);
/* factors of the Frobenius norms, from squares [count], the sums of squares. */
cudaError_t cuda_frobenius_factors(ns_norm norm, double eps, const double *squares, size_t count,
                                   int64_t m, double *factors, cudaStream_t stream);
/* factors of aol and schatten4 from gram [count, m, m]. */
cudaError_t cuda_gram_factors(ns_norm norm, double eps, const double *gram, size_t count, int64_t m,
                              double *factors, cudaStream_t stream);
/* One squaring of the way to the largest eigenvalue, the k-th from 0: g /= its trace, the logarithm
 * of which goes to logs [count] with weight 2^-k. */
cudaError_t cuda_spectral_step(double *g, size_t count, int64_t m, int k, double *logs,
                               cudaStream_t stream);
cudaError_t cuda_spectral_factors(double eps, const double *logs, size_t count, int64_t m,
                                  double *factors, cudaStream_t stream);
/* a = diag(factors) gram diag(factors) */
cudaError_t cuda_store_gram(const double *gram, const double *factors, size_t count, int64_t m,
                            ns_dtype dtype, void *a, cudaStream_t stream);
/* x = diag(factors) times the items' matrices, oriented if `orients`, else as they lie; multiplied
 * in fp64, rounded once to fp32 and from there to the dtype. */
cudaError_t cuda_store_x(const orthogonalize_item *items, size_t count, int64_t m, int64_t n,
                         bool orients, const double *factors, ns_dtype dtype, void *x,
                         cudaStream_t stream);
/* To where the items want it, as `wanted`; x is oriented, or not. */
cudaError_t cuda_give_back(const orthogonalize_item *items, size_t count, int64_t m, int64_t n,
                           bool oriented, ns_dtype dtype, const void *x, muonshard_dtype wanted,
                           cudaStream_t stream);
/* Elements above the diagonal of a [count, m, m] become those below it; and, unless it is NULL,
 * shifted [count, m, m] = a + alpha I. */
cudaError_t cuda_mirror(void *a, size_t count, int64_t m, ns_dtype dtype, float alpha,
                        void *shifted, cudaStream_t stream);
/* dst [count]: numbers that look random, in [-most, most]. */
cudaError_t cuda_noise(void *dst, size_t count, float most, ns_dtype dtype, cudaStream_t stream);
/* dst [count] of dtype = src [count] fp32 */
cudaError_t cuda_round(const float *src, size_t count, ns_dtype dtype, void *dst,
                       cudaStream_t stream);

#ifdef __cplusplus
}
#endif
#endif
