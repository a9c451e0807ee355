#include "kernels/cuda_tiles.h"

/* Of one multiprocessor of an H200, which does 5.98e6 flop/us at 790 TFLOP/s; estimates, which
 * gemm_choice: measured overrules. Narrow units move half as much again through shared memory for
 * what they multiply. */
#define WIDE_RATE   5.6e6 /* flop a microsecond */
#define NARROW_RATE 5.2e6
#define WRITE_US    2.0 /* a tile, from sums to memory */
#define PART_US     1.5 /* to publish or to collect 128 x 256 sums */
#define START_US    2.0 /* a launch, until it multiplies */

double tile_us(const tile_work *w) {
    const int wide = w->width == TILE_UNIT;
    const double step = 2.0 * TILE_ROWS * w->width * TILE_DEPTH / (wide ? WIDE_RATE : NARROW_RATE);
    const double part = PART_US * w->width / TILE_UNIT, multiply = step * w->steps;
    /* Of narrow units one is written while the next is multiplied. */
    const double next = wide                  ? multiply + WRITE_US
                        : multiply > WRITE_US ? multiply
                                              : (multiply + WRITE_US) / 2.0;
    double us = START_US + (wide ? 0.0 : WRITE_US) + (w->total - w->tail) / w->clusters * next;
    if (w->tail && w->sharers == w->tail)
        return us + next;
    if (w->tail) {
        const double parts = (double)w->sharers / w->tail;
        us += step * tile_parts((int64_t)w->tail * w->steps, w->sharers) + (parts + 1.0) * part +
              (wide ? WRITE_US : 0.0);
    }
    return us;
}

int tile_cuts(int rows, int cols, int depth, int symmetric, int matrices, int clusters, int may_cut,
              tile_cut *cuts) {
    int count = 0;
    for (int width = TILE_UNIT / 2; width <= TILE_UNIT; width *= 2) {
        const tile_work whole =
            tile_work_of(rows, cols, depth, symmetric, matrices, width, clusters, 0);
        cuts[count++] = (tile_cut){width, 0};
        for (int parts = 2; may_cut && whole.tail && parts <= TILE_MOST_PARTS; parts++) {
            const int sharers = whole.tail * parts;
            if (whole.steps < parts * TILE_LEAST_STEPS)
                break;
            cuts[count++] = (tile_cut){width, sharers < clusters ? sharers : clusters};
            if (sharers >= clusters)
                break;
        }
    }
    return count;
}

tile_cut tile_choose(int rows, int cols, int depth, int symmetric, int matrices, int clusters,
                     int may_cut) {
    tile_cut cuts[TILE_MOST_CUTS];
    const int count = tile_cuts(rows, cols, depth, symmetric, matrices, clusters, may_cut, cuts);
    double least = 0.0;
    int best = 0;
    for (int i = 0; i < count; i++) {
        const tile_work w = tile_work_of(rows, cols, depth, symmetric, matrices, cuts[i].width,
                                         clusters, cuts[i].sharers);
        const double us = tile_us(&w);
        if (i == 0 || us < least) {
            least = us;
            best = i;
        }
    }
    return cuts[best];
}
