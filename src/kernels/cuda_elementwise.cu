/* cuda_elementwise.cu - passes over arrays: a row of blocks an item, a run of elements a block. */
#include "kernels/cuda_device.cuh"

/* ---- bytes of the host as kernel arguments ---- */

enum { PAYLOAD = 3968 };

struct payload {
    unsigned char byte[PAYLOAD];
};

__global__ static void write_kernel(unsigned char *dst, const __grid_constant__ payload p,
                                    unsigned bytes) {
    for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < bytes; i += gridDim.x * blockDim.x)
        dst[i] = p.byte[i];
}

cudaError_t cuda_write(void *dst, const void *src, size_t bytes, cudaStream_t stream) {
    cudaError_t status = cudaSuccess;
    for (size_t done = 0; done < bytes && status == cudaSuccess; done += PAYLOAD) {
        payload p;
        const size_t n = bytes - done < PAYLOAD ? bytes - done : PAYLOAD;
        memcpy(p.byte, (const char *)src + done, n);
        status = launch(write_kernel, dim3(1), dim3(THREADS), stream, (unsigned char *)dst + done,
                        p, (unsigned)n);
    }
    return status;
}

/* ---- conversions ---- */

__device__ static void convert_element(const kernel_context *c, bool always, const convert_item *it,
                                       size_t i) {
    const bool same = it->src_dtype == it->dst_dtype;
    if (it->dst_dtype == MUONSHARD_FP32) {
        ((float *)it->dst)[i] = it->src ? load_element(it->src, it->src_dtype, i) : 0.0f;
    } else if (!it->src || same) {
        ((uint16_t *)it->dst)[i] = it->src ? ((const uint16_t *)it->src)[i] : 0;
    } else {
        const float x = load_element(it->src, it->src_dtype, i);
        if (!always && c->stochastic)
            store_stochastic(it->dst, it->dst_dtype, i, x, c, it->tensor, it->first + i);
        else
            store_element(it->dst, it->dst_dtype, i, x);
    }
}

__global__ static void convert_kernel(kernel_context c, bool always,
                                      const __grid_constant__ item_list<convert_item> list) {
    const convert_item *it = &list.at[blockIdx.y];
    if (!always && leave_alone(&c, it->tensor))
        return;
    const span s = block_span(it->count);
    for_each(i, s) convert_element(&c, always, it, i);
}

cudaError_t cuda_convert(const kernel_context *context, const convert_item *items, size_t count,
                         cudaStream_t stream) {
    kernel_context c = {};
    if (context)
        c = *context;
    return in_lists(
        items, count, [](const convert_item &it) { return it.count; },
        [&](const item_list<convert_item> &list, unsigned used, size_t longest) {
            return launch(convert_kernel, dim3(parts_for(longest), used), dim3(THREADS), stream, c,
                          context == NULL, list);
        });
}

/* ---- sum over ranks ---- */

__global__ static void sum_ranks_kernel(sum_ranks_args a) {
    const span s = block_span(a.count);
    for_each(i, s) {
        float sum = 0.0f;
        for (int r = 0; r < a.ranks; r++) {
            const float x = r == a.rank
                                ? load_element(a.own, a.dtype, i)
                                : load_element(a.received, a.dtype, (size_t)r * a.count + i);
            sum = r ? sum + x : x;
        }
        a.dst[i] = sum;
    }
}

cudaError_t cuda_sum_ranks(const sum_ranks_args *args, cudaStream_t stream) {
    if (!args->count)
        return cudaSuccess;
    return launch(sum_ranks_kernel, dim3(parts_for(args->count)), dim3(THREADS), stream, *args);
}

/* ---- momentum ---- */

/* One pass: M, U and the sum of U^2. parts [CUDA_LIST, CUDA_PARTS]. */
__global__ static void momentum_kernel(kernel_context c, momentum_args args,
                                       const __grid_constant__ item_list<momentum_item> list,
                                       double *parts) {
    __shared__ momentum_scalars shared;
    const momentum_item *it = &list.at[blockIdx.y];
    if (leave_alone(&c, it->tensor))
        return;
    if (threadIdx.x == 0)
        shared = momentum_scalars_of(&args, c.record, &c.values[it->tensor]);
    __syncthreads();
    const momentum_scalars scalars = shared;
    const span s = block_span(it->count);
    double squares = 0.0;
    for_each(i, s) {
        float g = scalars.factor * it->g_u[i];
        if (args.l2)
            g = g + scalars.wd * load_element(it->w, it->w_dtype, i);
        float m = next_momentum(scalars, load_element(it->momentum, args.dtype, i), g);
        store_element(it->momentum, args.dtype, i, m);
        if (args.dtype != MUONSHARD_FP32) /* U is made of M as it is stored */
            m = load_element(it->momentum, args.dtype, i);
        const float u = direction(scalars, m, g);
        it->g_u[i] = u;
        squares += (double)u * (double)u;
    }
    squares = block_sum(squares);
    if (threadIdx.x == 0)
        parts[(size_t)blockIdx.y * CUDA_PARTS + blockIdx.x] = squares;
}

/* Adds the parts of an item up; the others' outputs stay as they are. */
__global__ static void
momentum_squares_kernel(kernel_context c, const __grid_constant__ item_list<momentum_item> list,
                        const double *parts) {
    const momentum_item *it = &list.at[blockIdx.x];
    if (!it->squares || leave_alone(&c, it->tensor))
        return;
    double sum = 0.0;
    for (unsigned i = threadIdx.x; i < parts_for(it->count); i += blockDim.x)
        sum += parts[(size_t)blockIdx.x * CUDA_PARTS + i];
    sum = block_sum(sum);
    if (threadIdx.x == 0)
        *it->squares = sum;
}

cudaError_t cuda_momentum(const kernel_context *context, const momentum_args *args,
                          const momentum_item *items, size_t count, double *scratch,
                          cudaStream_t stream) {
    return in_lists(
        items, count, [](const momentum_item &it) { return it.count; },
        [&](const item_list<momentum_item> &list, unsigned used, size_t longest) {
            const cudaError_t status =
                launch(momentum_kernel, dim3(parts_for(longest), used), dim3(THREADS), stream,
                       *context, *args, list, scratch);
            return status ? status
                          : launch(momentum_squares_kernel, dim3(used), dim3(THREADS), stream,
                                   *context, list, scratch);
        });
}

/* ---- decay and update of matrices ---- */

__device__ static float weight_after(const apply_args *args, float w, float u, apply_scalars s) {
    const bool cautious = decay_is_cautious(args->decay);
    switch (args->form) {
    case DECAY_FORM_ADD: return apply_add(w, u, s, cautious);
    case DECAY_FORM_WITH_UPDATE: return apply_with_update(w, u, s, cautious);
    default: return apply_multiply(w, u, s, cautious);
    }
}

__global__ static void apply_kernel(kernel_context c, apply_args args,
                                    const __grid_constant__ item_list<apply_item> list) {
    const apply_item *it = &list.at[blockIdx.y];
    if (leave_alone(&c, it->tensor))
        return;
    const apply_scalars scalars = apply_scalars_of(&args, it->scale, &c.values[it->tensor]);
    const size_t cols = (size_t)it->cols;
    const span s = block_span((size_t)it->rows * cols);
    for_each(i, s) {
        float u = load_element(it->u, it->u_dtype, i);
        if (it->factor)
            u = it->factor[it->by_rows ? i / cols : i % cols] * u;
        float w = it->master ? it->master[i] : load_element(it->w, it->w_dtype, i);
        w = weight_after(&args, w, u, scalars);
        if (it->master)
            it->master[i] = w;
        if (c.stochastic)
            store_stochastic(it->w, it->w_dtype, i, w, &c, it->tensor, it->first + i);
        else
            store_element(it->w, it->w_dtype, i, w);
    }
}

cudaError_t cuda_apply(const kernel_context *context, const apply_args *args,
                       const apply_item *items, size_t count, cudaStream_t stream) {
    return in_lists(
        items, count, [](const apply_item &it) { return (size_t)it.rows * (size_t)it.cols; },
        [&](const item_list<apply_item> &list, unsigned used, size_t longest) {
            return launch(apply_kernel, dim3(parts_for(longest), used), dim3(THREADS), stream,
                          *context, *args, list);
        });
}

/* ---- AdamW and Lion ---- */

__global__ static void adam_kernel(kernel_context c, adam_args args,
                                   const __grid_constant__ item_list<adam_item> list) {
    __shared__ adam_scalars shared;
    const adam_item *it = &list.at[blockIdx.y];
    if (leave_alone(&c, it->tensor))
        return;
    if (threadIdx.x == 0)
        shared = adam_scalars_of(&args, c.record, &c.values[it->tensor]);
    __syncthreads();
    const adam_scalars scalars = shared;
    const bool l2 = args.decay == DECAY_L2, cautious = decay_is_cautious(args.decay);
    const bool lion = args.rule == ELEMENTWISE_LION;
    const span s = block_span(it->count);
    for_each(i, s) {
        float w = it->w[i], m = it->m[i];
        if (lion) {
            lion_element(&w, &m, it->g[i], scalars, l2, cautious);
        } else {
            float v = it->v[i];
            adam_element(&w, &m, &v, it->g[i], scalars, l2, cautious);
            it->v[i] = v;
        }
        it->w[i] = w;
        it->m[i] = m;
    }
}

cudaError_t cuda_adam(const kernel_context *context, const adam_args *args, const adam_item *items,
                      size_t count, cudaStream_t stream) {
    return in_lists(
        items, count, [](const adam_item &it) { return it.count; },
        [&](const item_list<adam_item> &list, unsigned used, size_t longest) {
            return launch(adam_kernel, dim3(parts_for(longest), used), dim3(THREADS), stream,
                          *context, *args, list);
        });
}
