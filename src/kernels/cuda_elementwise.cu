/* cuda_elementwise.cu - passes over arrays: a row of blocks an item, a run of elements a block. */
#include "kernels/cuda_vector.cuh"

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

template <muonshard_dtype Dst, bool Stochastic>
__device__ static void convert_item_to(const kernel_context *c, const convert_item *it) {
    const bool aligned = is_aligned(it->src, it->src_dtype) && is_aligned(it->dst, Dst);
    const random_stream random = Stochastic ? stream_for(c, it->tensor) : random_stream();
    for_each_quad<4>(
        block_span(it->count, blockIdx.x), aligned,
        [&](piece p) { return it->src ? load_bits(it->src, it->src_dtype, p) : quad_bits(); },
        [&](piece p, quad_bits b) {
            if (it->src && it->src_dtype != Dst) {
                const quad q = unpack(b, it->src_dtype);
                b = Stochastic ? pack_stochastic(q, Dst, random, it->first + p.at) : pack(q, Dst);
            }
            store_bits(it->dst, Dst, p, b);
        });
}

template <bool Stochastic>
__global__ static void convert_kernel(kernel_context c, bool always,
                                      const __grid_constant__ item_list<convert_item> list) {
    const convert_item *it = &list.at[blockIdx.y];
    if (!always && leave_alone(&c, it->tensor))
        return;
    with_dtype(it->dst_dtype, [&](auto dst) { convert_item_to<dst.dtype, Stochastic>(&c, it); });
}

cudaError_t cuda_convert(const kernel_context *context, const convert_item *items, size_t count,
                         cudaStream_t stream) {
    kernel_context c = {};
    if (context)
        c = *context;
    return in_lists(
        items, count, [](const convert_item &it) { return it.count; },
        [&](const item_list<convert_item> &list, unsigned used, size_t longest) {
            return launch(c.stochastic ? convert_kernel<true> : convert_kernel<false>,
                          dim3(parts_for(longest), used), dim3(THREADS), stream, c, context == NULL,
                          list);
        });
}

/* ---- sum over ranks ---- */

__global__ static void sum_ranks_kernel(sum_ranks_args a) {
    const bool aligned = is_aligned(a.dst, MUONSHARD_FP32) && is_aligned(a.own, a.dtype) &&
                         is_aligned(a.received, a.dtype) &&
                         (a.ranks == 1 || a.count % QUAD == 0); /* that all slots are */
    const auto sent_by = [&](int r, piece p) {
        if (r == a.rank)
            return load_bits(a.own, a.dtype, p);
        p.at += (size_t)r * a.count;
        return load_bits(a.received, a.dtype, p);
    };
    for_each_quad<1>(
        block_span(a.count, blockIdx.x), aligned, [&](piece p) { return sent_by(0, p); },
        [&](piece p, const quad_bits &first) {
            quad sum = unpack(first, a.dtype);
#pragma unroll 4
            for (int r = 1; r < a.ranks; r++) {
                const quad next = unpack(sent_by(r, p), a.dtype);
#pragma unroll
                for (unsigned j = 0; j < QUAD; j++)
                    sum.x[j] += next.x[j];
            }
            store_bits(a.dst, MUONSHARD_FP32, p, bits_of(sum));
        });
}

cudaError_t cuda_sum_ranks(const sum_ranks_args *args, cudaStream_t stream) {
    if (!args->count)
        return cudaSuccess;
    return launch(sum_ranks_kernel, dim3(parts_for(args->count)), dim3(THREADS), stream, *args);
}

/* ---- momentum ---- */

typedef struct momentum_quads {
    quad_bits g, m, w;
} momentum_quads;

/* One pass: M, U and the sum of U^2. parts [CUDA_LIST, CUDA_PARTS]. */
template <muonshard_dtype M, bool L2>
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
    const bool aligned = is_aligned(it->g_u, MUONSHARD_FP32) && is_aligned(it->momentum, M) &&
                         (!L2 || is_aligned(it->w, it->w_dtype));
    double squares = 0.0;
    for_each_quad<2>(
        block_span(it->count, blockIdx.x), aligned,
        [&](piece p) {
            momentum_quads in;
            in.g = load_bits(it->g_u, MUONSHARD_FP32, p);
            in.m = load_bits(it->momentum, M, p);
            if (L2)
                in.w = load_bits(it->w, it->w_dtype, p);
            return in;
        },
        [&](piece p, const momentum_quads &in) {
            quad g = unpack(in.g, MUONSHARD_FP32), m = unpack(in.m, M), u;
#pragma unroll
            for (unsigned j = 0; j < QUAD; j++)
                g.x[j] = scalars.factor * g.x[j];
            if (L2) {
                const quad w = unpack(in.w, it->w_dtype);
#pragma unroll
                for (unsigned j = 0; j < QUAD; j++)
                    g.x[j] = g.x[j] + scalars.wd * w.x[j];
            }
#pragma unroll
            for (unsigned j = 0; j < QUAD; j++)
                m.x[j] = next_momentum(scalars, m.x[j], g.x[j]);
            const quad_bits stored = pack(m, M);
            store_bits(it->momentum, M, p, stored);
            m = unpack(stored, M); /* U is made of M as it is stored */
#pragma unroll
            for (unsigned j = 0; j < QUAD; j++) {
                u.x[j] = direction(scalars, m.x[j], g.x[j]);
                if (j < p.count)
                    squares += (double)u.x[j] * (double)u.x[j];
            }
            store_bits(it->g_u, MUONSHARD_FP32, p, bits_of(u));
        });
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

/* By [dtype of M][l2]. */
static void (*const momentum_kernels[2][2])(kernel_context, momentum_args, item_list<momentum_item>,
                                            double *) = {
    {momentum_kernel<MUONSHARD_FP32, false>, momentum_kernel<MUONSHARD_FP32, true>},
    {momentum_kernel<MUONSHARD_BF16, false>, momentum_kernel<MUONSHARD_BF16, true>}};

cudaError_t cuda_momentum(const kernel_context *context, const momentum_args *args,
                          const momentum_item *items, size_t count, double *scratch,
                          cudaStream_t stream) {
    return in_lists(
        items, count, [](const momentum_item &it) { return it.count; },
        [&](const item_list<momentum_item> &list, unsigned used, size_t longest) {
            const cudaError_t status =
                launch(momentum_kernels[args->dtype == MUONSHARD_BF16][args->l2],
                       dim3(parts_for(longest), used), dim3(THREADS), stream, *context, *args, list,
                       scratch);
            return status ? status
                          : launch(momentum_squares_kernel, dim3(used), dim3(THREADS), stream,
                                   *context, list, scratch);
        });
}

/* ---- decay and update of matrices ---- */

/* The weights; of the form, which is one for all. */
__device__ static quad weights_after(const apply_args *args, quad w, quad u, apply_scalars s) {
    const bool cautious = decay_is_cautious(args->decay);
    switch (args->form) {
    case DECAY_FORM_ADD:
#pragma unroll
        for (unsigned j = 0; j < QUAD; j++)
            w.x[j] = apply_add(w.x[j], u.x[j], s, cautious);
        break;
    case DECAY_FORM_WITH_UPDATE:
#pragma unroll
        for (unsigned j = 0; j < QUAD; j++)
            w.x[j] = apply_with_update(w.x[j], u.x[j], s, cautious);
        break;
    default:
#pragma unroll
        for (unsigned j = 0; j < QUAD; j++)
            w.x[j] = apply_multiply(w.x[j], u.x[j], s, cautious);
    }
    return w;
}

/* U times the factors of its rows or columns. */
__device__ static quad times_factor(const apply_item *it, piece p, quad u) {
    const size_t cols = (size_t)it->cols;
    place_in at = place_of(p.at, cols);
    float f = it->factor[it->by_rows ? at.row : at.col];
#pragma unroll
    for (unsigned j = 0; j < QUAD; j++)
        if (j < p.count) {
            if (j && (next_place(&at, cols) || !it->by_rows))
                f = it->factor[it->by_rows ? at.row : at.col];
            u.x[j] = f * u.x[j];
        }
    return u;
}

typedef struct apply_quads {
    quad_bits w, u; /* w: of the master where there is one */
} apply_quads;

template <muonshard_dtype W, bool Stochastic>
__device__ static void apply_to(const kernel_context *c, const apply_args *args,
                                const apply_item *it) {
    const apply_scalars scalars = apply_scalars_of(args, it->scale, &c->values[it->tensor]);
    const random_stream random = Stochastic ? stream_for(c, it->tensor) : random_stream();
    const void *from = it->master ? it->master : it->w;
    const muonshard_dtype from_dtype = it->master ? MUONSHARD_FP32 : W;
    const bool aligned =
        is_aligned(it->w, W) && is_aligned(from, from_dtype) && is_aligned(it->u, it->u_dtype);
    for_each_quad<2>(
        block_span((size_t)it->rows * (size_t)it->cols, blockIdx.x), aligned,
        [&](piece p) {
            return apply_quads{load_bits(from, from_dtype, p), load_bits(it->u, it->u_dtype, p)};
        },
        [&](piece p, const apply_quads &in) {
            quad w = unpack(in.w, from_dtype), u = unpack(in.u, it->u_dtype);
            if (it->factor)
                u = times_factor(it, p, u);
            w = weights_after(args, w, u, scalars);
            if (it->master)
                store_bits(it->master, MUONSHARD_FP32, p, bits_of(w));
            store_bits(it->w, W, p,
                       Stochastic ? pack_stochastic(w, W, random, it->first + p.at) : pack(w, W));
        });
}

template <bool Stochastic>
__global__ static void apply_kernel(kernel_context c, apply_args args,
                                    const __grid_constant__ item_list<apply_item> list) {
    const apply_item *it = &list.at[blockIdx.y];
    if (!leave_alone(&c, it->tensor))
        with_dtype(it->w_dtype, [&](auto w) { apply_to<w.dtype, Stochastic>(&c, &args, it); });
}

cudaError_t cuda_apply(const kernel_context *context, const apply_args *args,
                       const apply_item *items, size_t count, cudaStream_t stream) {
    return in_lists(
        items, count, [](const apply_item &it) { return (size_t)it.rows * (size_t)it.cols; },
        [&](const item_list<apply_item> &list, unsigned used, size_t longest) {
            return launch(context->stochastic ? apply_kernel<true> : apply_kernel<false>,
                          dim3(parts_for(longest), used), dim3(THREADS), stream, *context, *args,
                          list);
        });
}

/* ---- AdamW and Lion ---- */

typedef struct adam_quads {
    quad_bits w, g, m, v;
} adam_quads;

template <bool Lion>
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
    const bool aligned = is_aligned(it->w, MUONSHARD_FP32) && is_aligned(it->g, MUONSHARD_FP32) &&
                         is_aligned(it->m, MUONSHARD_FP32) &&
                         (Lion || is_aligned(it->v, MUONSHARD_FP32));
    for_each_quad<1>(
        block_span(it->count, blockIdx.x), aligned,
        [&](piece p) {
            adam_quads in;
            in.w = load_bits(it->w, MUONSHARD_FP32, p);
            in.g = load_bits(it->g, MUONSHARD_FP32, p);
            in.m = load_bits(it->m, MUONSHARD_FP32, p);
            if (!Lion)
                in.v = load_bits(it->v, MUONSHARD_FP32, p);
            return in;
        },
        [&](piece p, const adam_quads &in) {
            quad w = unpack(in.w, MUONSHARD_FP32), g = unpack(in.g, MUONSHARD_FP32);
            quad m = unpack(in.m, MUONSHARD_FP32), v = {};
            if (!Lion)
                v = unpack(in.v, MUONSHARD_FP32);
#pragma unroll
            for (unsigned j = 0; j < QUAD; j++)
                if (Lion)
                    lion_element(&w.x[j], &m.x[j], g.x[j], scalars, l2, cautious);
                else
                    adam_element(&w.x[j], &m.x[j], &v.x[j], g.x[j], scalars, l2, cautious);
            store_bits(it->w, MUONSHARD_FP32, p, bits_of(w));
            store_bits(it->m, MUONSHARD_FP32, p, bits_of(m));
            if (!Lion)
                store_bits(it->v, MUONSHARD_FP32, p, bits_of(v));
        });
}

cudaError_t cuda_adam(const kernel_context *context, const adam_args *args, const adam_item *items,
                      size_t count, cudaStream_t stream) {
    return in_lists(
        items, count, [](const adam_item &it) { return it.count; },
        [&](const item_list<adam_item> &list, unsigned used, size_t longest) {
            return launch(args->rule == ELEMENTWISE_LION ? adam_kernel<true> : adam_kernel<false>,
                          dim3(parts_for(longest), used), dim3(THREADS), stream, *context, *args,
                          list);
        });
}
