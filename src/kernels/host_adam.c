/* host_adam.c - AdamW and Lion, for what is not a matrix. */
#include "kernels/host.h"
#include "kernels/host_elementwise.h"

/* `l2` and `cautious` are constant where they are called, for a loop of its own each way. */
static inline void adam(const adam_item *it, size_t start, size_t end, adam_scalars s, bool l2,
                        bool cautious) {
    float *restrict w = it->w, *restrict m = it->m, *restrict v = it->v;
    const float *restrict sum = it->g;
    for (size_t i = start; i < end; i++)
        adam_element(&w[i], &m[i], &v[i], sum[i], s, l2, cautious);
}

static inline void lion(const adam_item *it, size_t start, size_t end, adam_scalars s, bool l2,
                        bool cautious) {
    float *restrict w = it->w, *restrict m = it->m;
    const float *restrict sum = it->g;
    for (size_t i = start; i < end; i++)
        lion_element(&w[i], &m[i], sum[i], s, l2, cautious);
}

static void adam_step(const adam_item *it, size_t start, size_t end, adam_scalars s,
                      decay_method decay) {
    if (decay == DECAY_L2)
        adam(it, start, end, s, true, false);
    else if (decay_is_cautious(decay))
        adam(it, start, end, s, false, true);
    else
        adam(it, start, end, s, false, false);
}

static void lion_step(const adam_item *it, size_t start, size_t end, adam_scalars s,
                      decay_method decay) {
    if (decay == DECAY_L2)
        lion(it, start, end, s, true, false);
    else if (decay_is_cautious(decay))
        lion(it, start, end, s, false, true);
    else
        lion(it, start, end, s, false, false);
}

typedef struct adam_job {
    const kernel_context *context;
    const adam_args *args;
    const adam_item *items;
} adam_job;

static size_t adam_size(const void *job, size_t item) {
    const adam_job *j = job;
    const adam_item *it = &j->items[item];
    return leave_alone(j->context, it->tensor) ? 0 : it->count;
}

static void adam_slice(const void *job, size_t item, size_t start, size_t end) {
    const adam_job *j = job;
    const kernel_context *c = j->context;
    const adam_item *it = &j->items[item];
    const adam_scalars s = adam_scalars_of(j->args, c->record, &c->values[it->tensor]);
    (j->args->rule == ELEMENTWISE_LION ? lion_step : adam_step)(it, start, end, s, j->args->decay);
}

muonshard_status host_adam(backend *self, const kernel_context *c, const adam_args *args,
                           const adam_item *items, size_t count) {
    const adam_job job = {c, args, items};
    host_slices(self, adam_slice, adam_size, &job, count);
    return MUONSHARD_OK;
}
