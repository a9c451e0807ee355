/* host_sums.c - sums: over ranks, and of squares. */
#include "kernels/host.h"
#include "kernels/host_elementwise.h"

static void add(float *restrict sum, const float *restrict x, size_t n) {
    for (size_t i = 0; i < n; i++)
        sum[i] += x[i];
}

static size_t sum_size(const void *job, size_t item) {
    (void)item;
    return ((const sum_ranks_args *)job)->count;
}

/* What rank r has sent, elements from `start`. */
static const void *sent_by(const sum_ranks_args *s, int r, size_t start) {
    return r == s->rank ? host_at(s->own, s->dtype, start)
                        : host_at(s->received, s->dtype, (size_t)r * s->count + start);
}

/* The order of additions is that of the ranks for every element. */
static void sum_slice(const void *job, size_t item, size_t start, size_t end) {
    (void)item;
    const sum_ranks_args *s = job;
    float block[HOST_BLOCK];
    for (; start < end; start += HOST_BLOCK) {
        const size_t n = host_block(start, end);
        dtype_load(s->dst + start, sent_by(s, 0, start), s->dtype, n);
        for (int r = 1; r < s->ranks; r++)
            add(s->dst + start, host_read(sent_by(s, r, start), s->dtype, 0, n, block), n);
    }
}

muonshard_status host_sum_ranks(backend *self, const sum_ranks_args *args, backend_stream stream) {
    (void)stream;
    host_slices(self, sum_slice, sum_size, args, 1);
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

static void measure(void *user, size_t index, int thread) {
    (void)thread;
    const sum_squares_item *it = (const sum_squares_item *)user + index;
    *it->out = host_sum_squares(it->x, it->count);
}

muonshard_status host_measure(backend *self, const sum_squares_item *items, size_t count) {
    host_threads_run(host_of(self)->threads, measure, (void *)(uintptr_t)items, count);
    return MUONSHARD_OK;
}
