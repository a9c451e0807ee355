/* cuda_normalize.cu - matrices on their way into Newton-Schulz and out of it: turned so that rows
 * are no more than columns, divided by their norm in fp64, rounded; and turned back. */
#include "kernels/cuda_device.cuh"

/* ---- turning ---- */

static inline dim3 tiles_of(int64_t m, int64_t n, unsigned count) {
    const int64_t tiles = ((m + TILE - 1) / TILE) * ((n + TILE - 1) / TILE);
    return dim3((unsigned)(tiles < (1 << 20) ? tiles : 1 << 20), count);
}

/* Element (r, c) of an oriented [m, n] matrix, in an array that is turned or not. */
__device__ static inline size_t place(int64_t r, int64_t c, int64_t m, int64_t n, bool turned) {
    return turned ? (size_t)c * (size_t)m + (size_t)r : (size_t)r * (size_t)n + (size_t)c;
}

/* store(r, c, load(r, c)) for all elements, a tile of them a block at a time: neighbouring threads
 * read neighbours, and write neighbours, each way the array lies. */
template <typename Load, typename Store>
__device__ static void through_tiles(int64_t m, int64_t n, bool turned_in, bool turned_out,
                                     Load load, Store store) {
    __shared__ float tile[TILE][TILE + 1];
    const int64_t across = (n + TILE - 1) / TILE, tiles = across * ((m + TILE - 1) / TILE);
    for (int64_t t = blockIdx.x; t < tiles; t += gridDim.x) {
        const int64_t r0 = t / across * TILE, c0 = t % across * TILE;
        for (unsigned k = threadIdx.y; k < TILE; k += blockDim.y) {
            const unsigned r = turned_in ? threadIdx.x : k, c = turned_in ? k : threadIdx.x;
            if (r0 + r < m && c0 + c < n)
                tile[r][c] = load(r0 + r, c0 + c);
        }
        __syncthreads();
        for (unsigned k = threadIdx.y; k < TILE; k += blockDim.y) {
            const unsigned r = turned_out ? threadIdx.x : k, c = turned_out ? k : threadIdx.x;
            if (r0 + r < m && c0 + c < n)
                store(r0 + r, c0 + c, tile[r][c]);
        }
        __syncthreads();
    }
}

/* body(list, how many, how many came before) for all items. */
template <typename Body>
static cudaError_t in_order(const orthogonalize_item *items, size_t count, Body body) {
    size_t before = 0;
    return in_lists(
        items, count, [](const orthogonalize_item &) { return (size_t)1; },
        [&](const item_list<orthogonalize_item> &list, unsigned used, size_t) {
            const cudaError_t status = body(list, used, before);
            before += used;
            return status;
        });
}

__global__ static void load_fp64_kernel(const __grid_constant__ item_list<orthogonalize_item> list,
                                        int64_t m, int64_t n, double *x64) {
    const orthogonalize_item *it = &list.at[blockIdx.y];
    double *to = x64 + (size_t)blockIdx.y * (size_t)m * (size_t)n;
    const float *u = it->u;
    const bool turned = it->transposed;
    through_tiles(
        m, n, turned, false, [=](int64_t r, int64_t c) { return u[place(r, c, m, n, turned)]; },
        [=](int64_t r, int64_t c, float x) { to[place(r, c, m, n, false)] = (double)x; });
}

cudaError_t cuda_load_fp64(const orthogonalize_item *items, size_t count, int64_t m, int64_t n,
                           double *x64, cudaStream_t stream) {
    return in_order(items, count,
                    [&](const item_list<orthogonalize_item> &list, unsigned used, size_t before) {
                        return launch(load_fp64_kernel, tiles_of(m, n, used), dim3(TILE, TILE_ROWS),
                                      stream, list, m, n, x64 + before * (size_t)m * (size_t)n);
                    });
}

__global__ static void store_x_kernel(const __grid_constant__ item_list<orthogonalize_item> list,
                                      int64_t m, int64_t n, const double *factors,
                                      muonshard_dtype dtype, char *x) {
    const orthogonalize_item *it = &list.at[blockIdx.y];
    const size_t elements = (size_t)m * (size_t)n;
    char *to = x + blockIdx.y * elements * (dtype == MUONSHARD_FP32 ? 4 : 2);
    const double *factor = factors + (size_t)blockIdx.y * (size_t)m;
    const float *u = it->u;
    const bool turned = it->transposed;
    through_tiles(
        m, n, turned, false, [=](int64_t r, int64_t c) { return u[place(r, c, m, n, turned)]; },
        [=](int64_t r, int64_t c, float value) {
            store_element(to, dtype, place(r, c, m, n, false), (float)((double)value * factor[r]));
        });
}

cudaError_t cuda_store_x(const orthogonalize_item *items, size_t count, int64_t m, int64_t n,
                         const double *factors, ns_dtype dtype, void *x, cudaStream_t stream) {
    const muonshard_dtype stored = stored_as(dtype);
    const size_t bytes = (size_t)m * (size_t)n * dtype_size(stored);
    return in_order(
        items, count, [&](const item_list<orthogonalize_item> &list, unsigned used, size_t before) {
            return launch(store_x_kernel, tiles_of(m, n, used), dim3(TILE, TILE_ROWS), stream, list,
                          m, n, factors + before * (size_t)m, stored, (char *)x + before * bytes);
        });
}

__global__ static void give_back_kernel(const __grid_constant__ item_list<orthogonalize_item> list,
                                        int64_t m, int64_t n, muonshard_dtype dtype, const char *x,
                                        muonshard_dtype wanted) {
    const orthogonalize_item *it = &list.at[blockIdx.y];
    const size_t elements = (size_t)m * (size_t)n;
    const char *from = x + blockIdx.y * elements * (dtype == MUONSHARD_FP32 ? 4 : 2);
    void *out = it->out;
    const bool turned = it->transposed;
    through_tiles(
        m, n, false, turned,
        [=](int64_t r, int64_t c) { return load_element(from, dtype, place(r, c, m, n, false)); },
        [=](int64_t r, int64_t c, float value) {
            store_element(out, wanted, place(r, c, m, n, turned), value);
        });
}

cudaError_t cuda_give_back(const orthogonalize_item *items, size_t count, int64_t m, int64_t n,
                           ns_dtype dtype, const void *x, muonshard_dtype wanted,
                           cudaStream_t stream) {
    const muonshard_dtype stored = stored_as(dtype);
    const size_t bytes = (size_t)m * (size_t)n * dtype_size(stored);
    return in_order(
        items, count, [&](const item_list<orthogonalize_item> &list, unsigned used, size_t before) {
            return launch(give_back_kernel, tiles_of(m, n, used), dim3(TILE, TILE_ROWS), stream,
                          list, m, n, stored, (const char *)x + before * bytes, wanted);
        });
}

/* ---- factors ---- */

static inline unsigned blocks_for(size_t elements) {
    const size_t blocks = (elements + 4 * THREADS - 1) / (4 * THREADS);
    return (unsigned)(blocks < 1 ? 1 : blocks > 65535 ? 65535 : blocks);
}

/* One matrix a row of blocks. */
static inline dim3 grid_for(size_t elements, size_t count) {
    return dim3(blocks_for(elements), (unsigned)count);
}

#define each_of_grid(i, count)                                                                     \
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < (size_t)(count);            \
         i += (size_t)gridDim.x * blockDim.x)

__global__ static void frobenius_kernel(ns_norm norm, double eps, const double *squares, int64_t m,
                                        double *factors) {
    const double factor = inverse_of(frobenius_divisor(norm, sqrt(squares[blockIdx.y]), eps));
    each_of_grid(i, m) factors[(size_t)blockIdx.y * (size_t)m + i] = factor;
}

cudaError_t cuda_frobenius_factors(ns_norm norm, double eps, const double *squares, size_t count,
                                   int64_t m, double *factors, cudaStream_t stream) {
    return launch(frobenius_kernel, grid_for((size_t)m, count), dim3(THREADS), stream, norm, eps,
                  squares, m, factors);
}

/* A row a block. aol: the factor; schatten4: the row's sum of squares, to be added up. */
__global__ static void gram_rows_kernel(ns_norm norm, double eps, const double *gram, int64_t m,
                                        double *factors) {
    const double *g = gram + (size_t)blockIdx.y * (size_t)m * (size_t)m;
    for (int64_t row = blockIdx.x; row < m; row += gridDim.x) {
        double sum = 0.0;
        for (int64_t i = threadIdx.x; i < m; i += blockDim.x) {
            const double x = g[row * m + i];
            sum += norm == NS_NORM_AOL ? fabs(x) : x * x;
        }
        sum = block_sum(sum);
        if (threadIdx.x == 0)
            factors[(int64_t)blockIdx.y * m + row] =
                norm == NS_NORM_AOL ? inverse_of(sqrt(fmax(sum, eps))) : sum;
    }
}

/* From sums of squares of rows to the one factor of the matrix. A block a matrix. */
__global__ static void schatten_kernel(double eps, int64_t m, double *factors) {
    double *mine = factors + (int64_t)blockIdx.x * m;
    double sum = 0.0;
    for (int64_t i = threadIdx.x; i < m; i += blockDim.x)
        sum += mine[i];
    sum = block_sum(sum);
    const double factor = inverse_of(sqrt(fmax(sqrt(sum), eps)));
    for (int64_t i = threadIdx.x; i < m; i += blockDim.x)
        mine[i] = factor;
}

cudaError_t cuda_gram_factors(ns_norm norm, double eps, const double *gram, size_t count, int64_t m,
                              double *factors, cudaStream_t stream) {
    const cudaError_t status =
        launch(gram_rows_kernel, dim3((unsigned)(m < 65535 ? m : 65535), (unsigned)count),
               dim3(THREADS), stream, norm, eps, gram, m, factors);
    if (status || norm == NS_NORM_AOL)
        return status;
    return launch(schatten_kernel, dim3((unsigned)count), dim3(THREADS), stream, eps, m, factors);
}

/* log(0) is -inf, which a zero matrix keeps; a matrix that is not finite keeps that. */
__global__ static void spectral_trace_kernel(const double *gram, int64_t m, int k, double *logs,
                                             double *traces) {
    const double *g = gram + (size_t)blockIdx.x * (size_t)m * (size_t)m;
    double trace = 0.0;
    for (int64_t i = threadIdx.x; i < m; i += blockDim.x)
        trace += g[i * m + i];
    trace = block_sum(trace);
    if (threadIdx.x == 0) {
        logs[blockIdx.x] = (k ? logs[blockIdx.x] : 0.0) + ldexp(log(trace), -k);
        traces[blockIdx.x] = trace;
    }
}

__global__ static void divide_kernel(double *gram, int64_t m, const double *traces) {
    double *g = gram + (size_t)blockIdx.y * (size_t)m * (size_t)m;
    const double factor = inverse_of(traces[blockIdx.y]);
    each_of_grid(i, (size_t)m * (size_t)m) g[i] *= factor;
}

cudaError_t cuda_spectral_step(double *g, size_t count, int64_t m, int k, double *logs,
                               cudaStream_t stream) {
    double *traces = logs + count;
    const cudaError_t status = launch(spectral_trace_kernel, dim3((unsigned)count), dim3(THREADS),
                                      stream, g, m, k, logs, traces);
    return status ? status
                  : launch(divide_kernel, grid_for((size_t)m * (size_t)m, count), dim3(THREADS),
                           stream, g, m, traces);
}

__global__ static void spectral_kernel(double eps, const double *logs, int64_t m, double *factors) {
    const double sigma = exp(0.5 * logs[blockIdx.y]);
    each_of_grid(i, m) factors[(size_t)blockIdx.y * (size_t)m + i] = inverse_of(sigma + eps);
}

cudaError_t cuda_spectral_factors(double eps, const double *logs, size_t count, int64_t m,
                                  double *factors, cudaStream_t stream) {
    return launch(spectral_kernel, grid_for((size_t)m, count), dim3(THREADS), stream, eps, logs, m,
                  factors);
}

/* ---- squares ---- */

__global__ static void store_gram_kernel(const double *gram, const double *factors, int64_t m,
                                         muonshard_dtype dtype, void *a) {
    const size_t elements = (size_t)m * (size_t)m, before = (size_t)blockIdx.y * elements;
    const double *factor = factors + (size_t)blockIdx.y * (size_t)m;
    each_of_grid(i, elements) {
        const double x = factor[i / (size_t)m] * gram[before + i] * factor[i % (size_t)m];
        store_element(a, dtype, before + i, (float)x);
    }
}

cudaError_t cuda_store_gram(const double *gram, const double *factors, size_t count, int64_t m,
                            ns_dtype dtype, void *a, cudaStream_t stream) {
    return launch(store_gram_kernel, grid_for((size_t)m * (size_t)m, count), dim3(THREADS), stream,
                  gram, factors, m, stored_as(dtype), a);
}

__global__ static void round_kernel(const float *src, size_t count, muonshard_dtype dtype,
                                    void *dst) {
    each_of_grid(i, count) store_element(dst, dtype, i, src[i]);
}

cudaError_t cuda_round(const float *src, size_t count, ns_dtype dtype, void *dst,
                       cudaStream_t stream) {
    return launch(round_kernel, dim3(blocks_for(count)), dim3(THREADS), stream, src, count,
                  stored_as(dtype), dst);
}

/* A multiplicative hash of the index: what a product takes depends on its numbers, and on zeros it
 * is faster than it ever is in a step. */
__global__ static void noise_kernel(void *dst, size_t count, float most, muonshard_dtype dtype) {
    each_of_grid(i, count) {
        uint32_t h = (uint32_t)i * 2654435769U;
        h = (h ^ h >> 15) * 2246822519U;
        store_element(dst, dtype, i, most * ((float)(int32_t)(h ^ h >> 13) * 0x1p-31f));
    }
}

cudaError_t cuda_noise(void *dst, size_t count, float most, ns_dtype dtype, cudaStream_t stream) {
    return launch(noise_kernel, dim3(blocks_for(count)), dim3(THREADS), stream, dst, count, most,
                  stored_as(dtype));
}

/* A tile below the diagonal, or on it, a block: turned, it takes the place of the one above. */
__global__ static void mirror_kernel(char *a, int64_t m, muonshard_dtype dtype, float alpha,
                                     char *shifted) {
    __shared__ float tile[TILE][TILE + 1];
    const int64_t row = (int64_t)blockIdx.x * TILE, col = (int64_t)blockIdx.y * TILE;
    const size_t before = (size_t)blockIdx.z * (size_t)m * (size_t)m;
    if (col > row)
        return;
    for (unsigned k = threadIdx.y; k < TILE; k += blockDim.y)
        if (row + k < m && col + threadIdx.x < m) {
            const size_t at = before + place(row + k, col + threadIdx.x, m, m, false);
            const float x = load_element(a, dtype, at);
            tile[k][threadIdx.x] = x;
            if (shifted && row + k >= col + threadIdx.x)
                store_element(shifted, dtype, at, row + k == col + threadIdx.x ? x + alpha : x);
        }
    __syncthreads();
    for (unsigned k = threadIdx.y; k < TILE; k += blockDim.y)
        if (col + k < m && row + threadIdx.x < m && row + threadIdx.x > col + k) {
            const size_t at = before + place(col + k, row + threadIdx.x, m, m, false);
            store_element(a, dtype, at, tile[threadIdx.x][k]);
            if (shifted)
                store_element(shifted, dtype, at, tile[threadIdx.x][k]);
        }
}

cudaError_t cuda_mirror(void *a, size_t count, int64_t m, ns_dtype dtype, float alpha,
                        void *shifted, cudaStream_t stream) {
    const muonshard_dtype stored = stored_as(dtype);
    const size_t matrix = (size_t)m * (size_t)m * dtype_size(stored);
    const unsigned tiles = (unsigned)((m + TILE - 1) / TILE);
    cudaError_t status = cudaSuccess;
    for (size_t done = 0; done < count && status == cudaSuccess; done += 65535) {
        const unsigned z = (unsigned)(count - done < 65535 ? count - done : 65535);
        status = launch(mirror_kernel, dim3(tiles, tiles, z), dim3(TILE, TILE_ROWS), stream,
                        (char *)a + done * matrix, m, stored, alpha,
                        shifted ? (char *)shifted + done * matrix : (char *)NULL);
    }
    return status;
}
