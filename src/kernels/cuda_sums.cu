/* cuda_sums.cu - sums, in fp64 and in an order that depends on lengths alone: of squares, of what
 * the ranks say, of the rows or columns of U. */
#include "kernels/cuda_vector.cuh"

/* ---- sums of squares ---- */

__global__ static void squares_kernel(const __grid_constant__ item_list<sum_squares_item> list,
                                      double *parts) {
    const sum_squares_item *it = &list.at[blockIdx.y];
    if (blockIdx.x >= parts_for(it->count))
        return;
    double sum = 0.0;
    for_each_quad<4>(
        block_span(it->count, blockIdx.x), is_aligned(it->x, MUONSHARD_FP32),
        [&](piece p) { return load_bits(it->x, MUONSHARD_FP32, p); },
        [&](piece p, const quad_bits &b) {
            const quad x = unpack(b, MUONSHARD_FP32);
#pragma unroll
            for (unsigned j = 0; j < QUAD; j++)
                if (j < p.count)
                    sum += (double)x.x[j] * (double)x.x[j];
        });
    sum = block_sum(sum);
    if (threadIdx.x == 0)
        parts[(size_t)blockIdx.y * CUDA_PARTS + blockIdx.x] = sum;
}

__global__ static void squares_sum_kernel(const __grid_constant__ item_list<sum_squares_item> list,
                                          const double *parts) {
    const sum_squares_item *it = &list.at[blockIdx.x];
    double sum = 0.0;
    for (unsigned i = threadIdx.x; i < parts_for(it->count); i += blockDim.x)
        sum += parts[(size_t)blockIdx.x * CUDA_PARTS + i];
    sum = block_sum(sum);
    if (threadIdx.x == 0)
        *it->out = sum;
}

cudaError_t cuda_sum_squares(const sum_squares_item *items, size_t count, double *scratch,
                             cudaStream_t stream) {
    return in_lists(
        items, count, [](const sum_squares_item &it) { return it.count ? it.count : 1; },
        [&](const item_list<sum_squares_item> &list, unsigned used, size_t longest) {
            const cudaError_t status = launch(squares_kernel, dim3(parts_for(longest), used),
                                              dim3(THREADS), stream, list, scratch);
            return status ? status
                          : launch(squares_sum_kernel, dim3(used), dim3(THREADS), stream, list,
                                   scratch);
        });
}

/* ---- the outcome of agreement ---- */

/* One block. The sum has the order of sum_index and its rounding, whatever the number of threads:
 * they only fetch. */
__global__ static void resolve_kernel(resolve_args a) {
    __shared__ double fetched[THREADS];
    double sum = 0.0;
    for (size_t first = 0; first < a.sum_count; first += blockDim.x) {
        if (first + threadIdx.x < a.sum_count)
            fetched[threadIdx.x] = a.words[a.sum_index[first + threadIdx.x]];
        __syncthreads();
        for (size_t i = 0; threadIdx.x == 0 && i < blockDim.x && first + i < a.sum_count; i++)
            sum += fetched[i];
        __syncthreads();
    }
    for (size_t t = threadIdx.x; t < a.tensor_count; t += blockDim.x)
        a.active[t] = tensor_is_active(&a, t);
    if (threadIdx.x == 0)
        resolve_record(&a, sum);
}

cudaError_t cuda_resolve(const resolve_args *args, cudaStream_t stream) {
    return launch(resolve_kernel, dim3(1), dim3(THREADS), stream, *args);
}

/* ---- variance ---- */

/* What a line (row or column) adds to the squared norms of U and of U once divided. */
__device__ static void add_line(const variance_args *args, const variance_item *it, int64_t line,
                                double sum, double *norm2, double *divided2) {
    const double length = (double)(it->by_rows ? it->cols : it->rows);
    it->v[line] = variance_next(args, it->v[line], sum, length);
    const double d = variance_denominator_of(args, it->v[line]);
    *norm2 += sum;
    *divided2 += sum / (d * d);
}

__device__ static double square_at(const variance_item *it, int64_t row, int64_t col) {
    const double u =
        (double)load_element(it->u, it->u_dtype, (size_t)row * (size_t)it->cols + (size_t)col);
    return u * u;
}

/* Rows one after the other, each by the whole block; columns one a thread. parts [CUDA_LIST,
 * CUDA_PARTS, 2]. */
__global__ static void variance_kernel(kernel_context c, variance_args args,
                                       const __grid_constant__ item_list<variance_item> list,
                                       double *parts) {
    const variance_item *it = &list.at[blockIdx.y];
    if (leave_alone(&c, it->tensor))
        return;
    double norm2 = 0.0, divided2 = 0.0;
    if (it->by_rows) {
        for (int64_t row = blockIdx.x; row < it->rows; row += gridDim.x) {
            double sum = 0.0;
            for (int64_t col = threadIdx.x; col < it->cols; col += blockDim.x)
                sum += square_at(it, row, col);
            sum = block_sum(sum);
            if (threadIdx.x == 0)
                add_line(&args, it, row, sum, &norm2, &divided2);
        }
    } else {
        const int64_t stride = (int64_t)gridDim.x * blockDim.x;
        for (int64_t col = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; col < it->cols;
             col += stride) {
            double sum = 0.0;
            for (int64_t row = 0; row < it->rows; row++)
                sum += square_at(it, row, col);
            add_line(&args, it, col, sum, &norm2, &divided2);
        }
    }
    norm2 = block_sum(norm2);
    divided2 = block_sum(divided2);
    if (threadIdx.x == 0) {
        double *mine = parts + 2 * ((size_t)blockIdx.y * CUDA_PARTS + blockIdx.x);
        mine[0] = norm2;
        mine[1] = divided2;
    }
}

__global__ static void variance_factor_kernel(kernel_context c, variance_args args,
                                              const __grid_constant__ item_list<variance_item> list,
                                              const double *parts, unsigned count) {
    const variance_item *it = &list.at[blockIdx.x];
    if (leave_alone(&c, it->tensor))
        return;
    const double *mine = parts + 2 * (size_t)blockIdx.x * CUDA_PARTS;
    double norm2 = 0.0, divided2 = 0.0;
    for (unsigned i = threadIdx.x; i < count; i += blockDim.x) {
        norm2 += mine[2 * i];
        divided2 += mine[2 * i + 1];
    }
    norm2 = block_sum(norm2);
    divided2 = block_sum(divided2);
    const double rescale = variance_rescale(&args, norm2, divided2);
    const int64_t lines = it->by_rows ? it->rows : it->cols;
    for (int64_t i = threadIdx.x; i < lines; i += blockDim.x)
        it->factor[i] = (float)(rescale / variance_denominator_of(&args, it->v[i]));
}

/* All items of a call have one oriented shape, so that the width of the grid is theirs. */
cudaError_t cuda_variance(const kernel_context *context, const variance_args *args,
                          const variance_item *items, size_t count, double *scratch,
                          cudaStream_t stream) {
    return in_lists(
        items, count, [](const variance_item &it) { return (size_t)it.rows * (size_t)it.cols; },
        [&](const item_list<variance_item> &list, unsigned used, size_t longest) {
            const unsigned parts = parts_for(longest);
            const cudaError_t status = launch(variance_kernel, dim3(parts, used), dim3(THREADS),
                                              stream, *context, *args, list, scratch);
            return status ? status
                          : launch(variance_factor_kernel, dim3(used), dim3(THREADS), stream,
                                   *context, *args, list, scratch, parts);
        });
}
