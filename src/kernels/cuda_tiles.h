/* cuda_tiles.h - how products of our own are cut for a Hopper GPU, as arithmetic: for the kernel
 * (cuda_tile_kernel.cu), for the model that chooses, and for tests that try all of it.
 *
 * A result is cut into units of 256 rows and 128 or 256 columns. A unit is a cluster's, whose two
 * blocks of threads have a tile of 128 rows each and share what both need of the right operand. Of
 * a symmetric result only the lower triangle is made; where a unit as narrow as a tile is high
 * would be half above the diagonal, the tile that is on it goes into a unit with another such
 * tile, and they share nothing. Within a tile the unit of writing is a block of 64 x 64: below the
 * diagonal it is written twice, the second time turned; on the diagonal its upper half is its lower
 * half; above it is nobody's.
 *
 * Units of all matrices of a batch are one list. Clusters take whole units by turns; the units that
 * are left over when all clusters have as many (the tail) may be cut along the depth, so that
 * `sharers` clusters have equal parts of them: of a unit that is cut the cluster with its end
 * collects what those before it publish (stream-K: Osama et al., 2023). A cluster publishes first,
 * then collects, then does whole units, and waits only for clusters before it. Clusters start in
 * the order of their numbers, so that none waits for one that has no room to start; that is not
 * documented, and matters only where others leave no room for all of them. */
#ifndef CUDA_TILES_H
#define CUDA_TILES_H

#include <stdint.h>

#ifdef __CUDACC__
#define TILES static __host__ __device__ __forceinline__
#else
#define TILES static inline __attribute__((unused))
#endif

enum {
    TILE_ROWS = 128,     /* of a block of threads */
    TILE_UNIT = 256,     /* rows of a cluster */
    TILE_DEPTH = 64,     /* of a step */
    TILE_BLOCK = 64,     /* rows and columns that are written at a time */
    TILE_MATRICES = 1024 /* of a launch, at most */
};

/* What one launch does. */
typedef struct tile_work {
    int rows, cols;
    int symmetric;
    int width;    /* columns of a unit: 128 or 256 */
    int pairs;    /* units down */
    int across;   /* units across, unless symmetric */
    int units;    /* of a matrix */
    int before;   /* of them, those whose tiles are one above the other; if symmetric */
    int total;    /* of all */
    int steps;    /* of a unit */
    int clusters; /* that run */
    int tail;     /* units that are shared, the first ones */
    int sharers;  /* clusters that share them, at least `tail`; that many: nothing is cut */
} tile_work;

/* Of a unit, a range of steps. */
typedef struct tile_segment {
    int unit;
    int begin, end; /* steps; none: there is no such segment */
    int publishes;  /* another has the end of the unit */
    int collects;   /* from clusters [first, this one) that have a part of it */
    int first;
} tile_segment;

/* Of a tile: which matrix of the list, and its first row and column, which may be outside. */
typedef struct tile_place {
    int matrix, row, col;
    int apart; /* the two of the unit share nothing */
} tile_place;

typedef enum tile_role { TILE_NOTHING, TILE_PLAIN, TILE_DIAGONAL, TILE_MIRRORED } tile_role;

TILES int tile_parts(int64_t of, int size) {
    return (int)((of + size - 1) / size);
}

/* Units of a symmetric matrix before row `pair` of units: 1, 2, ... of them in a row where units
 * are square, 1, 3, ... where they are half as wide. */
TILES int tile_units_before(int pair, int width) {
    return width == TILE_UNIT ? pair * (pair + 1) / 2 : pair * pair;
}

/* `sharers`: clusters that are to share the tail, at most; 0: none. */
TILES tile_work tile_work_of(int rows, int cols, int depth, int symmetric, int matrices, int width,
                             int clusters, int sharers) {
    tile_work w;
    w.rows = rows;
    w.cols = cols;
    w.symmetric = symmetric;
    w.width = width;
    w.pairs = tile_parts(rows, TILE_UNIT);
    w.across = tile_parts(cols, width);
    w.units = w.pairs * w.across;
    w.before = tile_units_before(w.pairs, width);
    if (symmetric) /* and every other tile of the diagonal, by twos */
        w.units = w.before + (width < TILE_UNIT ? (w.across / 2 + 1) / 2 : 0);
    w.total = w.units * matrices;
    w.steps = tile_parts(depth, TILE_DEPTH);
    w.tail = w.total % clusters;
    w.sharers = sharers < clusters ? sharers : clusters;
    if (w.sharers < w.tail || !w.tail)
        w.sharers = w.tail;
    w.clusters = w.total < clusters ? w.sharers : clusters;
    return w;
}

/* The tile of block `rank` of a cluster, 0 or 1. */
TILES tile_place tile_place_of(const tile_work *w, int unit, int rank) {
    tile_place p;
    p.matrix = unit / w->units;
    p.apart = 0;
    const int left = unit - p.matrix * w->units;
    int pair = 0, across;
    if (!w->symmetric) { /* downwards, so that clusters side by side share columns */
        across = left / w->pairs;
        pair = left - across * w->pairs;
    } else if (left < w->before) {
        while (tile_units_before(pair + 1, w->width) <= left)
            pair++;
        across = left - tile_units_before(pair, w->width);
    } else {
        p.apart = 1;
        p.row = p.col = (4 * (left - w->before) + 2 * rank + 1) * TILE_ROWS;
        return p;
    }
    p.row = pair * TILE_UNIT + rank * TILE_ROWS;
    p.col = across * w->width;
    return p;
}

/* Where cluster `cluster` begins in the tail, in steps. */
TILES int64_t tile_tail_begin(const tile_work *w, int cluster) {
    const int at = cluster < w->sharers ? cluster : w->sharers;
    return w->sharers ? (int64_t)w->tail * w->steps * at / w->sharers : 0;
}

TILES tile_segment tile_part_of(const tile_work *w, int64_t begin, int64_t end, int cluster) {
    tile_segment s;
    s.unit = (int)(begin / w->steps);
    const int64_t start = (int64_t)s.unit * w->steps;
    s.begin = (int)(begin - start);
    s.end = (int)(end - start);
    s.publishes = s.end < w->steps;
    s.collects = !s.publishes && s.begin > 0;
    s.first = cluster;
    if (s.collects) /* who has the unit's first step */
        s.first = (int)(((start + 1) * w->sharers - 1) / ((int64_t)w->tail * w->steps));
    return s;
}

/* The index-th segment of a cluster, in the order they are done; empty when there are no more. */
TILES tile_segment tile_segment_of(const tile_work *w, int cluster, int index) {
    const int64_t begin = tile_tail_begin(w, cluster), end = tile_tail_begin(w, cluster + 1);
    const int64_t cut = end > begin ? (end - 1) / w->steps * w->steps : 0; /* of the last unit */
    const int parts = end <= begin ? 0 : cut > begin ? 2 : 1;
    if (index < parts)
        return index == 0 && parts == 2 ? tile_part_of(w, cut, end, cluster)
                                        : tile_part_of(w, begin, parts == 2 ? cut : end, cluster);
    tile_segment s;
    const int64_t unit = w->tail + (int64_t)(index - parts) * w->clusters + cluster;
    s.unit = (int)unit;
    s.begin = 0;
    s.end = unit < w->total ? w->steps : 0;
    s.publishes = s.collects = 0;
    s.first = cluster;
    return s;
}

/* What becomes of the block of 64 x 64 at (row, col). */
TILES tile_role tile_role_of(const tile_work *w, int row, int col) {
    if (row >= w->rows || col >= w->cols || (w->symmetric && col > row))
        return TILE_NOTHING;
    return !w->symmetric ? TILE_PLAIN : col == row ? TILE_DIAGONAL : TILE_MIRRORED;
}

/* ---- how to cut ---- */

enum {
    TILE_MOST_PARTS = 8,  /* of a unit */
    TILE_LEAST_STEPS = 3, /* of a part */
    TILE_MOST_CUTS = 2 * TILE_MOST_PARTS
};

typedef struct tile_cut {
    int width, sharers;
} tile_cut;

#ifndef __CUDACC__
/* Microseconds it takes on an H200 by a model of waves. */
double tile_us(const tile_work *work);
/* What is worth trying, TILE_MOST_CUTS at most. may_cut: units may be cut along the depth, so that
 * what is added up in which order depends on how many units and clusters there are. */
int tile_cuts(int rows, int cols, int depth, int symmetric, int matrices, int clusters, int may_cut,
              tile_cut *cuts);
/* What takes the least time by the model. */
tile_cut tile_choose(int rows, int cols, int depth, int symmetric, int matrices, int clusters,
                     int may_cut);
#endif

#endif
