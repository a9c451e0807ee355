#include "kernels/program.h"

#include <stdbool.h>

static bool is_wide(ns_buffer b) {
    return b == NS_X || b == NS_Y;
}

double ns_program_flops(const ns_program *program, int64_t m, int64_t n) {
    const double md = (double)m, nd = (double)n;
    double flops = 0.0;
    for (int i = 0; i < program->count; i++) {
        const ns_instruction *op = &program->code[i];
        switch (op->kind) {
        case NS_NORMALIZE: flops += op->a == NS_NONE ? 0.0 : md * md * nd; break;
        case NS_SYMMETRIC_PRODUCT: flops += md * md * (is_wide(op->a) ? nd : md); break;
        case NS_COMMUTING_PRODUCT: flops += md * md * md; break;
        case NS_PRODUCT: flops += 2.0 * md * md * (is_wide(op->b) ? nd : md); break;
        case NS_ADD_IDENTITY: break;
        }
    }
    return flops;
}
