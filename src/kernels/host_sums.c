/* host_sums.c - sums: over ranks, and of squares. */
#include "kernels/host.h"
#include "kernels/host_elementwise.h"

static void add(float *restrict sum, const float *restrict x, size_t n) {
    for (size_t i = 0; i < n; i++)
        sum[i] += x[i];
}

/* The order of additions is that of the ranks for every element. */
muonshard_status host_sum_ranks(backend *self, float *dst, const void *src, muonshard_dtype dtype,
                                int ranks, size_t count, backend_stream stream) {
    (void)self;
    (void)stream;
    float block[HOST_BLOCK];
    for (size_t start = 0; start < count; start += HOST_BLOCK) {
        const size_t n = host_block(start, count);
        dtype_load(dst + start, host_at(src, dtype, start), dtype, n);
        for (int r = 1; r < ranks; r++)
            add(dst + start, host_read(src, dtype, (size_t)r * count + start, n, block), n);
    }
    return MUONSHARD_OK;
}

/* Eight partial sums: vectors of any width give the same bits. */
double host_sum_squares(const float *x, size_t count) {
    double part[8] = {0.0};
    size_t i = 0;
    for (; i + 8 <= count; i += 8)
        for (size_t k = 0; k < 8; k++)
            part[k] += (double)x[i + k] * (double)x[i + k];
    for (size_t k = 0; i < count; i++, k++)
        part[k] += (double)x[i] * (double)x[i];
    return ((part[0] + part[1]) + (part[2] + part[3])) +
           ((part[4] + part[5]) + (part[6] + part[7]));
}

muonshard_status host_measure(backend *self, const sum_squares_item *items, size_t count) {
    (void)self;
    for (size_t i = 0; i < count; i++)
        *items[i].out = host_sum_squares(items[i].x, items[i].count);
    return MUONSHARD_OK;
}
