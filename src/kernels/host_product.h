/* host_product.h - matrix products as Newton-Schulz needs them: half of a symmetric one is computed
 * and mirrored, alpha, beta and the rounding of the outcome happen while a tile is in the cache.
 * Panels are packed once and kept over the whole depth (Goto and van de Geijn 2008, with the loop
 * over columns outermost). */
#ifndef HOST_PRODUCT_H
#define HOST_PRODUCT_H

#include "kernels/host_threads.h"
#include "kernels/host_tile.h"
#include "kernels/program.h"

/* One side of a product. `across`: x is [depth, side], else [side, depth]. A symmetric matrix is
 * either, and cheaper to pack across. */
typedef struct product_operand {
    const float *x;
    bool across;
    bool rounded; /* to `operands` already */
} product_operand;

/* dst [rows, cols] = alpha a b + beta c. Elements of a and b are rounded to `operands` as they
 * enter, those of dst once to `stored`; arrays are of fp32 whatever they hold. */
typedef struct product {
    ns_dtype operands, stored;
    size_t rows, cols, depth;
    product_operand a, b; /* sides of `rows` and of `cols` */
    bool square;          /* b is a, and packed once */
    bool symmetric;       /* the outcome is: dst equals its transpose to the bit */
    float alpha, beta;
    const float *c; /* [rows, cols], or NULL */
    float *dst;     /* none of the others */
} product;

/* `threads` share the product; NULL: the caller's alone. Bits are the same. */
size_t host_product_workspace(host_isa isa, const product *p, const host_threads *threads);
/* The workspace is aligned to a cache line. */
void host_product(host_isa isa, const product *p, void *workspace, host_threads *threads);

#endif
