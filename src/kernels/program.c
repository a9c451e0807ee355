#include "kernels/program.h"

double ns_program_flops(const ns_program *program, int64_t m, int64_t n) {
    const double md = (double)m, nd = (double)n;
    double flops = 0.0;
    for (int i = 0; i < program->count; i++) {
        const ns_instruction *op = &program->code[i];
        const double inner = op->a == NS_X || op->a == NS_Y ? nd : md;
        if (op->kind == NS_SYMMETRIC_PRODUCT)
            flops += md * md * inner;
        else if (op->kind == NS_PRODUCT)
            flops += 2.0 * md * md * (op->b == NS_X || op->b == NS_Y ? nd : md);
    }
    return flops;
}
