/* bench_passes.c - how fast the operations of a step that only pass over memory do so. */
#include <math.h>

#include "bench_step.h"
#include "simulate.h"

/* Communication and Newton-Schulz have measures of their own; resolve reads a few numbers. */
static bool is_pass(op_kind kind) {
    return !op_is_collective(kind) && kind != OP_ORTHOGONALIZE && kind != OP_RESOLVE;
}

/* Bytes of a step, by kind, on this rank. */
static muonshard_status bytes_of_step(bench *b, const muonshard_optimizer *o,
                                      double bytes[OP_KIND_COUNT]) {
    const sim_group group = {&o->registry, o->settings, &o->plan, &o->schedule, 1.0};
    for (int k = 0; k < OP_KIND_COUNT; k++)
        bytes[k] = 0.0;
    for (size_t i = 0; i < o->schedule.count; i++) {
        const op *operation = &o->schedule.ops[i];
        if (!is_pass(operation->kind))
            continue;
        const size_t owned =
            operation->kind > OP_RESOLVE ? o->batches[operation->index].owned : (size_t)0;
        sim_work work;
        error_text error = {""};
        const muonshard_status status = simulate_work(&group, i, owned, &work, &error);
        if (status)
            return message_fail(b->message, status, "%s", error.text);
        bytes[operation->kind] += work.bytes;
    }
    return MUONSHARD_OK;
}

muonshard_status bench_pass_rates(bench *b, muonshard_optimizer *o, const double *before,
                                  double rates[OP_KIND_COUNT]) {
    double bytes[OP_KIND_COUNT], seconds_a_byte[OP_KIND_COUNT];
    TRY(bytes_of_step(b, o, bytes));
    for (int k = 0; k < OP_KIND_COUNT; k++)
        seconds_a_byte[k] =
            bytes[k] > 0.0 ? (o->op_seconds[k] - before[k]) / b->iterations / bytes[k] : 0.0;
    const muonshard_status status =
        muonshard_comm_allreduce(b->cmd->comm, seconds_a_byte, OP_KIND_COUNT, MUONSHARD_REDUCE_MAX);
    if (status)
        return message_fail(b->message, status, "%s", muonshard_comm_last_error(b->cmd->comm));
    for (int k = 0; k < OP_KIND_COUNT; k++)
        rates[k] = seconds_a_byte[k] > 0.0 ? 1.0 / seconds_a_byte[k] : NAN;
    return MUONSHARD_OK;
}

json_t *bench_pass_json(const double rates[OP_KIND_COUNT]) {
    json_t *object = json_object();
    for (int k = 0; object && k < OP_KIND_COUNT; k++)
        if (is_pass((op_kind)k))
            json_object_set_new(object, op_name((op_kind)k), bench_number(1e-9 * rates[k]));
    return object;
}

void bench_pass_print(const bench *b, const double rates[OP_KIND_COUNT],
                      const bench_device_ceilings *ceilings) {
    if (isnan(ceilings->copy_bytes))
        return;
    bench_print(b,
                "# passes over memory, GB/s and %% of a copy's %.1f:", 1e-9 * ceilings->copy_bytes);
    const char *comma = "";
    for (int k = 0; k < OP_KIND_COUNT; k++)
        if (is_pass((op_kind)k) && !isnan(rates[k])) {
            bench_print(b, "%s %s %.1f %.0f %%", comma, op_name((op_kind)k), 1e-9 * rates[k],
                        100.0 * rates[k] / ceilings->copy_bytes);
            comma = ",";
        }
    bench_print(b, "; a dense bf16 product runs at %.0f GFLOP/s\n", 1e-9 * ceilings->dense_flops);
}
