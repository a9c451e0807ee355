/* host_variance.c - variance normalisation (NorMuon): a factor a row or a column of U. */
#include "kernels/host.h"
#include "kernels/host_elementwise.h"

/* Sums of squares of rows [first, first + n). */
static void squares_of_rows(double *sums, const variance_item *it, size_t first, size_t n) {
    const size_t cols = (size_t)it->cols;
    float block[HOST_BLOCK];
    for (size_t i = 0; i < n; i++) {
        sums[i] = 0.0;
        for (size_t col = 0; col < cols; col += HOST_BLOCK) {
            const size_t length = host_block(col, cols);
            const float *u = host_read(it->u, it->u_dtype, (first + i) * cols + col, length, block);
            sums[i] += host_sum_squares(u, length);
        }
    }
}

/* Of columns [first, first + n), n <= HOST_BLOCK. */
static void squares_of_columns(double *sums, const variance_item *it, size_t first, size_t n) {
    float block[HOST_BLOCK];
    for (size_t i = 0; i < n; i++)
        sums[i] = 0.0;
    for (size_t row = 0; row < (size_t)it->rows; row++) {
        const float *u = host_read(it->u, it->u_dtype, row * (size_t)it->cols + first, n, block);
        for (size_t i = 0; i < n; i++)
            sums[i] += (double)u[i] * (double)u[i];
    }
}

static void variance(const variance_args *args, const variance_item *it) {
    const size_t lines = (size_t)(it->by_rows ? it->rows : it->cols);
    const double length = (double)(it->by_rows ? it->cols : it->rows);
    double norm2 = 0.0, divided2 = 0.0; /* squared Frobenius norms of U and of U once divided */
    double sums[HOST_BLOCK];
    for (size_t start = 0; start < lines; start += HOST_BLOCK) {
        const size_t n = host_block(start, lines);
        float *v = it->v + start;
        if (it->by_rows)
            squares_of_rows(sums, it, start, n);
        else
            squares_of_columns(sums, it, start, n);
        for (size_t i = 0; i < n; i++) {
            v[i] = variance_next(args, v[i], sums[i], length);
            const double d = variance_denominator_of(args, v[i]);
            norm2 += sums[i];
            divided2 += sums[i] / (d * d);
        }
    }
    const double rescale = variance_rescale(args, norm2, divided2);
    for (size_t i = 0; i < lines; i++)
        it->factor[i] = (float)(rescale / variance_denominator_of(args, it->v[i]));
}

typedef struct variance_job {
    const kernel_context *context;
    const variance_args *args;
    const variance_item *items;
} variance_job;

static void variance_task(void *user, size_t index, int thread) {
    (void)thread;
    const variance_job *j = user;
    if (!leave_alone(j->context, j->items[index].tensor))
        variance(j->args, &j->items[index]);
}

muonshard_status host_variance(backend *self, const kernel_context *c, const variance_args *args,
                               const variance_item *items, size_t count) {
    variance_job job = {c, args, items};
    host_threads_run(host_of(self)->threads, variance_task, &job, count);
    return MUONSHARD_OK;
}
