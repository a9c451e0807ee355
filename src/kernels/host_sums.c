/* host_sums.c - sums: over ranks, and of squares. */
#include "kernels/host.h"
#include "kernels/host_elementwise.h"

HOST_WIDE static void add_arrays(float *sum, const float *a, const float *b, size_t n) {
    for (size_t i = 0; i < n; i++)
        sum[i] = a[i] + b[i];
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
    float first[HOST_BLOCK], next[HOST_BLOCK];
    for (; start < end; start += HOST_BLOCK) {
        const size_t n = host_block(start, end);
        float *dst = s->dst + start;
        const float *sum = host_read(sent_by(s, 0, start), s->dtype, 0, n, first);
        for (int r = 1; r < s->ranks; r++, sum = dst)
            add_arrays(dst, sum, host_read(sent_by(s, r, start), s->dtype, 0, n, next), n);
        if (s->ranks == 1)
            dtype_load(dst, sent_by(s, 0, start), s->dtype, n);
    }
}

muonshard_status host_sum_ranks(backend *self, const sum_ranks_args *args, backend_stream stream) {
    (void)stream;
    host_slices(self, sum_slice, sum_size, args, 1);
    return MUONSHARD_OK;
}

enum { PARTS = 32 };

/* Partial sums, more than vectors of any width need to keep adding: all widths give the same bits.
 */
HOST_WIDE static double sum_squares(const float *x, size_t count) {
    double part[PARTS] = {0.0};
    size_t i = 0;
    for (; i + PARTS <= count; i += PARTS)
        for (size_t k = 0; k < PARTS; k++)
            part[k] += (double)x[i + k] * (double)x[i + k];
    for (size_t k = 0; i < count; i++, k++)
        part[k] += (double)x[i] * (double)x[i];
    for (size_t half = PARTS / 2; half > 0; half /= 2)
        for (size_t k = 0; k < half; k++)
            part[k] += part[k + half];
    return part[0];
}

double host_sum_squares(const float *x, size_t count) {
    return sum_squares(x, count);
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
