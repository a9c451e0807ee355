#include "kernels/program.h"

static double flops_of(const ns_instruction *op, double m, double n) {
    switch (op->kind) {
    case NS_NORMALIZE: return op->a == NS_NONE ? 0.0 : m * m * n;
    case NS_SYMMETRIC_PRODUCT: return m * m * (ns_is_wide(op->a) ? n : m);
    case NS_COMMUTING_PRODUCT: return m * m * m;
    case NS_PRODUCT: return 2.0 * m * m * (ns_is_wide(op->b) ? n : m);
    case NS_ADD_IDENTITY: break;
    }
    return 0.0;
}

double ns_program_flops(const ns_program *program, int64_t m, int64_t n) {
    double flops = 0.0;
    for (int i = 0; i < program->count; i++)
        flops += flops_of(&program->code[i], (double)m, (double)n);
    return flops;
}

double ns_program_cost(const ns_program *program, int64_t m, int64_t n, bool device) {
    double cost = 0.0;
    for (int i = 0; i < program->count; i++) {
        const ns_dtype dtype = ns_operands(program, &program->code[i]);
        const double price = dtype == NS_FP32   ? (device ? 16.0 : 2.0)
                             : dtype == NS_TF32 ? 2.0
                                                : 1.0;
        cost += price * flops_of(&program->code[i], (double)m, (double)n);
    }
    return cost;
}
