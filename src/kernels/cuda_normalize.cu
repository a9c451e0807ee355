/* cuda_normalize.cu - matrices on their way into Newton-Schulz and out of it: turned so that rows
 * are no more than columns, divided by their norm in fp64, rounded; and turned back. */
#include "kernels/cuda_vector.cuh"

/* ---- turning ---- */

enum {
    SIDE = 64,                      /* of a tile, elements */
    ACROSS = SIDE / QUAD,           /* fours in a row of it */
    FOURS = SIDE * ACROSS / THREADS /* a thread */
};

/* The k-th four of this thread in a tile at (row, col) of an array [rows, cols]. */
__device__ static inline piece piece_of_tile(unsigned k, size_t row, size_t col, size_t rows,
                                             size_t cols, bool aligned) {
    const unsigned four = k * THREADS + threadIdx.x;
    row += four / ACROSS;
    col += four % ACROSS * QUAD;
    piece p = {row * cols + col, 0, false};
    if (row < rows && col < cols)
        p.count = cols - col < QUAD ? (unsigned)(cols - col) : QUAD;
    p.whole = aligned && p.count == QUAD;
    return p;
}

/* A tile's elements, one a word. A word more a row: columns are read without conflicts. */
typedef uint32_t tile_words[SIDE][SIDE + 1];

/* This thread's fours of the tile at (row, col) of src [rows, cols], all of them on the way at a
 * time, and to their places in the tile. */
__device__ static inline void load_tile(const void *src, muonshard_dtype dtype, size_t row,
                                        size_t col, size_t rows, size_t cols, bool aligned,
                                        quad_bits (&got)[FOURS], tile_words &tile) {
#pragma unroll
    for (unsigned k = 0; k < FOURS; k++)
        got[k] = load_bits(src, dtype, piece_of_tile(k, row, col, rows, cols, aligned));
#pragma unroll
    for (unsigned k = 0; k < FOURS; k++) {
        const unsigned four = k * THREADS + threadIdx.x;
#pragma unroll
        for (unsigned j = 0; j < QUAD; j++)
            tile[four / ACROSS][four % ACROSS * QUAD + j] = one_of(got[k], dtype, j);
    }
}

/* use(piece, place, bits) for all of the transpose [cols, rows] of src [rows, cols], through tiles
 * in shared memory: both ways neighbouring threads have neighbouring fours. This block's are those
 * of `part`; `aligned`: that is what `use` writes. */
template <typename Use>
__device__ static void turn(const void *src, muonshard_dtype dtype, size_t rows, size_t cols,
                            unsigned part, bool aligned, Use use) {
    __shared__ tile_words tile;
    const bool whole_in = is_aligned(src, dtype) && cols % QUAD == 0;
    const bool whole_out = aligned && rows % QUAD == 0;
    const size_t across = (cols + SIDE - 1) / SIDE, tiles = across * ((rows + SIDE - 1) / SIDE);
    const size_t end = tiles * (part + 1) / gridDim.x;
    for (size_t t = tiles * part / gridDim.x; t < end; t++) {
        const size_t row = t / across * SIDE, col = t % across * SIDE;
        quad_bits got[FOURS];
        load_tile(src, dtype, row, col, rows, cols, whole_in, got, tile);
        __syncthreads();
#pragma unroll
        for (unsigned k = 0; k < FOURS; k++) {
            const unsigned four = k * THREADS + threadIdx.x;
            const piece p = piece_of_tile(k, col, row, cols, rows, whole_out);
            quad_bits b = {};
#pragma unroll
            for (unsigned j = 0; j < QUAD; j++)
                put_one(&b, dtype, j, tile[four % ACROSS * QUAD + j][four / ACROSS]);
            if (p.count)
                use(p, place_in{col + four / ACROSS, row + four % ACROSS * QUAD, p.count}, b);
        }
        __syncthreads();
    }
}

/* use(piece, place, bits) for all of an array [rows, cols] as it lies, or of its transpose: `place`
 * is where in what is written the piece begins. */
template <typename Use>
__device__ static void each_quad(const void *src, muonshard_dtype dtype, size_t rows, size_t cols,
                                 bool turned, unsigned part, bool aligned, Use use) {
    if (turned)
        turn(src, dtype, rows, cols, part, aligned, use);
    else
        for_each_quad<4>(
            block_span(rows * cols, part), aligned && is_aligned(src, dtype),
            [=](piece p) { return load_bits(src, dtype, p); },
            [&](piece p, const quad_bits &b) { use(p, place_of(p.at, cols), b); });
}

static inline dim3 blocks_of(int64_t m, int64_t n, unsigned count) {
    return dim3(parts_for((size_t)m * (size_t)n), count);
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
    const int64_t rows = it->transposed ? n : m, cols = it->transposed ? m : n;
    each_quad(it->u, MUONSHARD_FP32, (size_t)rows, (size_t)cols, it->transposed, blockIdx.x, true,
              [=](piece p, place_in, const quad_bits &b) {
                  const quad q = unpack(b, MUONSHARD_FP32);
#pragma unroll
                  for (unsigned j = 0; j < QUAD; j++)
                      if (j < p.count)
                          to[p.at + j] = (double)q.x[j];
              });
}

cudaError_t cuda_load_fp64(const orthogonalize_item *items, size_t count, int64_t m, int64_t n,
                           double *x64, cudaStream_t stream) {
    return in_order(items, count,
                    [&](const item_list<orthogonalize_item> &list, unsigned used, size_t before) {
                        return launch(load_fp64_kernel, blocks_of(m, n, used), dim3(THREADS),
                                      stream, list, m, n, x64 + before * (size_t)m * (size_t)n);
                    });
}

/* Items and parts from the last to the first, within a launch: momentum has written U from the
 * first to the last, so that what comes last is still in the cache. The factors are those of rows
 * as they are oriented, of columns where such an item is stored as it lies. */
template <muonshard_dtype Dtype>
__global__ static void store_x_kernel(const __grid_constant__ item_list<orthogonalize_item> list,
                                      int64_t m, int64_t n, bool orients, const double *factors,
                                      char *x) {
    const unsigned item = gridDim.y - 1 - blockIdx.y, part = gridDim.x - 1 - blockIdx.x;
    const orthogonalize_item *it = &list.at[item];
    const size_t elements = (size_t)m * (size_t)n;
    char *to = x + item * elements * (Dtype == MUONSHARD_FP32 ? 4 : 2);
    const double *factor = factors + (size_t)item * (size_t)m;
    const int64_t rows = it->transposed ? n : m, cols = it->transposed ? m : n;
    const bool turns = it->transposed && orients, by_col = it->transposed && !orients;
    const size_t across = by_col ? (size_t)m : (size_t)n;
    each_quad(it->u, MUONSHARD_FP32, (size_t)rows, (size_t)cols, turns, part, is_aligned(to, Dtype),
              [=](piece p, place_in at, const quad_bits &b) {
                  quad q = unpack(b, MUONSHARD_FP32);
                  double f = factor[by_col ? at.col : at.row];
#pragma unroll
                  for (unsigned j = 0; j < QUAD; j++)
                      if (j < p.count) {
                          if (j && (next_place(&at, across) || by_col))
                              f = factor[by_col ? at.col : at.row];
                          q.x[j] = (float)((double)q.x[j] * f);
                      }
                  store_bits(to, Dtype, p, pack(q, Dtype));
              });
}

static void (*const store_x_kernels[])(item_list<orthogonalize_item>, int64_t, int64_t, bool,
                                       const double *, char *) = {
    store_x_kernel<MUONSHARD_FP32>, store_x_kernel<MUONSHARD_BF16>, store_x_kernel<MUONSHARD_FP16>};

cudaError_t cuda_store_x(const orthogonalize_item *items, size_t count, int64_t m, int64_t n,
                         bool orients, const double *factors, ns_dtype dtype, void *x,
                         cudaStream_t stream) {
    const muonshard_dtype stored = stored_as(dtype);
    const size_t bytes = (size_t)m * (size_t)n * dtype_size(stored);
    return in_order(items, count,
                    [&](const item_list<orthogonalize_item> &list, unsigned used, size_t before) {
                        return launch(store_x_kernels[stored], blocks_of(m, n, used), dim3(THREADS),
                                      stream, list, m, n, orients, factors + before * (size_t)m,
                                      (char *)x + before * bytes);
                    });
}

template <muonshard_dtype Wanted>
__global__ static void give_back_kernel(const __grid_constant__ item_list<orthogonalize_item> list,
                                        int64_t m, int64_t n, bool oriented, muonshard_dtype dtype,
                                        const char *x) {
    const orthogonalize_item *it = &list.at[blockIdx.y];
    const size_t elements = (size_t)m * (size_t)n;
    const char *from = x + blockIdx.y * elements * (dtype == MUONSHARD_FP32 ? 4 : 2);
    void *out = it->out;
    each_quad(from, dtype, (size_t)m, (size_t)n, it->transposed && oriented, blockIdx.x,
              is_aligned(out, Wanted), [=](piece p, place_in, const quad_bits &b) {
                  store_bits(out, Wanted, p, dtype == Wanted ? b : pack(unpack(b, dtype), Wanted));
              });
}

static void (*const give_back_kernels[])(item_list<orthogonalize_item>, int64_t, int64_t, bool,
                                         muonshard_dtype, const char *) = {
    give_back_kernel<MUONSHARD_FP32>, give_back_kernel<MUONSHARD_BF16>,
    give_back_kernel<MUONSHARD_FP16>};

cudaError_t cuda_give_back(const orthogonalize_item *items, size_t count, int64_t m, int64_t n,
                           bool oriented, ns_dtype dtype, const void *x, muonshard_dtype wanted,
                           cudaStream_t stream) {
    const muonshard_dtype stored = stored_as(dtype);
    const size_t bytes = (size_t)m * (size_t)n * dtype_size(stored);
    return in_order(
        items, count, [&](const item_list<orthogonalize_item> &list, unsigned used, size_t before) {
            return launch(give_back_kernels[wanted], blocks_of(m, n, used), dim3(THREADS), stream,
                          list, m, n, oriented, stored, (const char *)x + before * bytes);
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
template <muonshard_dtype Dtype>
__global__ static void mirror_kernel(char *a, size_t m, float alpha, char *shifted) {
    __shared__ tile_words tile;
    const size_t row = (size_t)blockIdx.x * SIDE, col = (size_t)blockIdx.y * SIDE;
    if (col > row)
        return;
    const size_t before = (size_t)blockIdx.z * m * m * (Dtype == MUONSHARD_FP32 ? 4 : 2);
    char *mine = a + before, *other = shifted + (shifted ? before : 0);
    const bool whole = m % QUAD == 0 && is_aligned(mine, Dtype) && is_aligned(other, Dtype);
    quad_bits got[FOURS];
    load_tile(mine, Dtype, row, col, m, m, whole, got, tile);
#pragma unroll
    for (unsigned k = 0; shifted && k < FOURS; k++) {
        const unsigned four = k * THREADS + threadIdx.x;
        const unsigned r = four / ACROSS, c = four % ACROSS * QUAD;
        if (row == col && r - c < QUAD) {
            quad q = unpack(got[k], Dtype);
#pragma unroll
            for (unsigned j = 0; j < QUAD; j++)
                q.x[j] = r == c + j ? q.x[j] + alpha : q.x[j];
            got[k] = pack(q, Dtype);
        }
        const piece p = piece_of_tile(k, row, col, m, m, whole);
        store_bits(other, Dtype, p, got[k]); /* above the diagonal once more below */
    }
    __syncthreads();
#pragma unroll
    for (unsigned k = 0; k < FOURS; k++) {
        const unsigned four = k * THREADS + threadIdx.x;
        const unsigned r = four / ACROSS, c = four % ACROSS * QUAD;
        const piece p = piece_of_tile(k, col, row, m, m, whole);
        quad_bits b = {};
#pragma unroll
        for (unsigned j = 0; j < QUAD; j++)
            put_one(&b, Dtype, j, tile[c + j][r]);
        if (row != col || c > r) {
            store_bits(mine, Dtype, p, b);
            if (shifted)
                store_bits(other, Dtype, p, b);
            continue;
        }
#pragma unroll
        for (unsigned j = 0; j < QUAD; j++)
            if (j < p.count && c + j > r) {
                const quad_bits one = {{tile[c + j][r]}};
                store_bits(mine, Dtype, piece{p.at + j, 1, false}, one);
                if (shifted)
                    store_bits(other, Dtype, piece{p.at + j, 1, false}, one);
            }
    }
}

static void (*const mirror_kernels[])(char *, size_t, float, char *) = {
    mirror_kernel<MUONSHARD_FP32>, mirror_kernel<MUONSHARD_BF16>, mirror_kernel<MUONSHARD_FP16>};

cudaError_t cuda_mirror(void *a, size_t count, int64_t m, ns_dtype dtype, float alpha,
                        void *shifted, cudaStream_t stream) {
    const muonshard_dtype stored = stored_as(dtype);
    const size_t matrix = (size_t)m * (size_t)m * dtype_size(stored);
    const unsigned tiles = (unsigned)((m + SIDE - 1) / SIDE);
    cudaError_t status = cudaSuccess;
    for (size_t done = 0; done < count && status == cudaSuccess; done += 65535) {
        const unsigned z = (unsigned)(count - done < 65535 ? count - done : 65535);
        status = launch(mirror_kernels[stored], dim3(tiles, tiles, z), dim3(THREADS), stream,
                        (char *)a + done * matrix, (size_t)m, alpha,
                        shifted ? (char *)shifted + done * matrix : (char *)NULL);
    }
    return status;
}
