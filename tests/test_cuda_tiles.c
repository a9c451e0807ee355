/* How products of our own kernel are cut: tried for all shapes that differ in what a cut depends
 * on. What is not arithmetic is in test_tile_product.c. */
#include "kernels/cuda_tiles.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <stdlib.h>
#include <string.h>

enum { RANKS = 2, MOST_CLUSTERS = 66 };

/* ---- places ---- */

/* Blocks of 64 x 64 of a matrix, and how often each is written. */
typedef struct cover {
    int down, across;
    unsigned char *written; /* own */
} cover;

static void mark(cover *c, int row, int col) {
    assert_true(row % TILE_BLOCK == 0 && col % TILE_BLOCK == 0);
    row /= TILE_BLOCK;
    col /= TILE_BLOCK;
    assert_true(row < c->down && col < c->across);
    c->written[row * c->across + col]++;
}

static void mark_tile(cover *c, const tile_work *w, const tile_place *p) {
    for (int r = p->row; r < p->row + TILE_ROWS; r += TILE_BLOCK)
        for (int k = p->col; k < p->col + w->width; k += TILE_BLOCK) {
            const tile_role role = tile_role_of(w, r, k);
            if (role != TILE_NOTHING)
                mark(c, r, k);
            if (role == TILE_MIRRORED)
                mark(c, k, r);
            assert_true(role != TILE_DIAGONAL || r == k);
        }
}

/* Every block of every matrix is written once, by one tile. */
static void check_places(int rows, int cols, int symmetric, int matrices, int width) {
    const tile_work w = tile_work_of(rows, cols, 64, symmetric, matrices, width, 66, 0);
    for (int m = 0; m < matrices; m++) {
        cover c = {tile_parts(rows, TILE_BLOCK), tile_parts(cols, TILE_BLOCK), NULL};
        c.written = calloc((size_t)c.down * (size_t)c.across, 1);
        for (int unit = 0; unit < w.total; unit++)
            for (int rank = 0; rank < RANKS; rank++) {
                const tile_place p = tile_place_of(&w, unit, rank);
                assert_true(p.matrix == unit / w.units && p.row >= 0 && p.col >= 0);
                if (p.matrix == m)
                    mark_tile(&c, &w, &p);
            }
        for (int i = 0; i < c.down * c.across; i++)
            assert_int_equal(c.written[i], 1);
        free(c.written);
    }
}

static void test_every_block_once(void **state) {
    (void)state;
    for (int rows = 1; rows <= 1500; rows += rows < 600 ? 7 : 61)
        for (int width = 128; width <= 256; width += 128) {
            check_places(rows, rows, 1, 2, width);
            for (int cols = 1; cols <= 900; cols += 59)
                check_places(rows, cols, 0, 2, width);
        }
    for (int width = 128; width <= 256; width += 128)
        check_places(8192 + 64, 8192 + 64, 1, 1, width);
}

/* The two tiles of a unit have the same columns, or say that they haven't. */
static void test_shared_operands(void **state) {
    (void)state;
    for (int rows = 64; rows <= 4096; rows += 64)
        for (int width = 128; width <= 256; width += 128)
            for (int symmetric = 0; symmetric <= 1; symmetric++) {
                const tile_work w = tile_work_of(rows, rows, 64, symmetric, 1, width, 66, 0);
                for (int unit = 0; unit < w.total; unit++) {
                    const tile_place a = tile_place_of(&w, unit, 0), b = tile_place_of(&w, unit, 1);
                    assert_true(a.apart == b.apart && a.matrix == b.matrix);
                    assert_true(a.apart || (a.col == b.col && a.row + TILE_ROWS == b.row));
                }
            }
}

/* Of a symmetric matrix no more tiles are made than touch the lower triangle, but for one: that of
 * an odd number of rows of tiles, or of such on the diagonal that go by twos. */
static void test_little_waste(void **state) {
    (void)state;
    for (int tiles = 1; tiles <= 64; tiles++) {
        const tile_work w = tile_work_of(tiles * 128, tiles * 128, 64, 1, 1, TILE_UNIT / 2, 66, 0);
        const int needed = tiles * (tiles + 1) / 2;
        assert_true(2 * w.units >= needed);
        assert_true(2 * w.units <= needed + 1 + (tiles % 2 ? tiles : 0));
    }
    assert_int_equal(tile_work_of(768, 768, 768, 1, 48, 128, 66, 0).total, 8 * 66);
    assert_int_equal(tile_work_of(4096, 4096, 4096, 1, 1, 128, 66, 0).total, 4 * 66);
}

/* ---- segments ---- */

typedef struct seen {
    unsigned char *steps;     /* own, [units, steps]: how often each is done */
    unsigned char *published; /* own, [clusters, units] */
} seen;

static void check_cluster(const tile_work *w, int cluster, seen *s) {
    int published = 0, collected = 0, parts = 0;
    for (int i = 0;; i++) {
        const tile_segment g = tile_segment_of(w, cluster, i);
        if (g.begin >= g.end)
            break;
        assert_true(g.unit >= 0 && g.unit < w->total && g.begin >= 0 && g.end <= w->steps);
        for (int k = g.begin; k < g.end; k++)
            s->steps[g.unit * w->steps + k]++;
        assert_int_equal(g.publishes, g.end < w->steps);
        assert_int_equal(g.collects, g.begin > 0 && g.end == w->steps);
        parts += g.begin > 0 || g.end < w->steps;
        if (g.publishes) {
            assert_int_equal(i, 0); /* before anything that waits */
            s->published[cluster * w->total + g.unit] = 1;
        }
        if (g.collects) {
            assert_true(i <= 1 && g.first >= 0 && g.first < cluster);
            for (int from = 0; from < w->clusters; from++) { /* all of those, and no others */
                const int part = tile_tail_begin(w, from) < tile_tail_begin(w, from + 1);
                const int wanted = from >= g.first && from < cluster && part;
                assert_int_equal(s->published[from * w->total + g.unit], wanted);
            }
        }
        published += g.publishes;
        collected += g.collects;
    }
    assert_true(published <= 1 && collected <= 1 && parts <= 2);
}

static void check_segments(int rows, int depth, int matrices, int clusters, int sharers) {
    const tile_work w = tile_work_of(rows, rows, depth, 1, matrices, 128, clusters, sharers);
    assert_true(w.clusters >= 1 && w.clusters <= clusters);
    assert_true(w.sharers >= w.tail && w.sharers <= w.clusters);
    assert_true(w.tail || !w.sharers);
    assert_int_equal(w.clusters, w.total < clusters ? w.sharers : clusters); /* none is idle */
    seen s = {calloc((size_t)w.total, (size_t)w.steps),
              calloc((size_t)w.clusters, (size_t)w.total)};
    for (int cluster = 0; cluster < w.clusters; cluster++)
        check_cluster(&w, cluster, &s);
    for (int i = 0; i < w.total * w.steps; i++)
        assert_int_equal(s.steps[i], 1);
    free(s.steps);
    free(s.published);
}

/* Every step of every unit is done once, in order, and what is published is collected. */
static void test_every_step_once(void **state) {
    (void)state;
    static const int clusters[] = {1, 2, 3, 7, 64, MOST_CLUSTERS};
    for (size_t k = 0; k < sizeof clusters / sizeof clusters[0]; k++)
        for (int rows = 100; rows <= 1100; rows += 250)
            for (int matrices = 1; matrices <= 7; matrices += 2)
                for (int depth = 1; depth <= 1300; depth += depth < 400 ? 63 : 257)
                    for (int sharers = 0; sharers <= clusters[k]; sharers++)
                        check_segments(rows, depth, matrices, clusters[k], sharers);
}

/* Shares of the tail differ by a step at most. */
static void test_equal_shares(void **state) {
    (void)state;
    const tile_work w = tile_work_of(768, 768, 4096, 1, 1, 128, MOST_CLUSTERS, MOST_CLUSTERS);
    assert_int_equal(w.sharers, MOST_CLUSTERS);
    for (int i = 0; i < w.sharers; i++) {
        const int64_t share = tile_tail_begin(&w, i + 1) - tile_tail_begin(&w, i);
        assert_true(share == w.tail * w.steps / w.sharers ||
                    share == w.tail * w.steps / w.sharers + 1);
    }
}

/* No sum of indices leaves 32 bits where 64 are not used. */
static void test_large(void **state) {
    (void)state;
    const tile_work w = tile_work_of(65536, 65536, INT32_MAX, 1, TILE_MATRICES, 128, 66, 66);
    assert_true(w.total > 0 && w.steps == INT32_MAX / 64 + 1);
    const tile_place last = tile_place_of(&w, w.total - 1, 1);
    assert_int_equal(last.matrix, TILE_MATRICES - 1);
    int64_t steps = 0;
    for (int i = 0; i < w.sharers; i++)
        steps += tile_tail_begin(&w, i + 1) - tile_tail_begin(&w, i);
    assert_true(steps == (int64_t)w.tail * w.steps);
}

/* ---- the model ---- */

/* Parts of a tail that there is, neither too small nor for more clusters than there are, which the
 * file of choices would not take back. */
static void check_parts(const tile_work *w, const tile_cut *cut) {
    assert_true(w->tail && cut->sharers > w->tail && cut->sharers <= w->clusters);
    assert_true((int64_t)w->tail * w->steps >= (int64_t)cut->sharers * TILE_LEAST_STEPS);
    assert_true(cut->sharers <= w->tail * TILE_MOST_PARTS);
}

static void test_cuts(void **state) {
    (void)state;
    for (int rows = 1; rows <= 5000; rows += 173)
        for (int matrices = 1; matrices <= 48; matrices += 11)
            for (int may_cut = 0; may_cut <= 1; may_cut++) {
                tile_cut cuts[TILE_MOST_CUTS];
                const int count = tile_cuts(rows, rows, rows, 1, matrices, 66, may_cut, cuts);
                const tile_cut best = tile_choose(rows, rows, rows, 1, matrices, 66, may_cut);
                int found = 0;
                assert_true(count >= 2 && count <= TILE_MOST_CUTS);
                for (int i = 0; i < count; i++) {
                    const tile_work w = tile_work_of(rows, rows, rows, 1, matrices, cuts[i].width,
                                                     66, cuts[i].sharers);
                    assert_true(may_cut || cuts[i].sharers == 0);
                    if (cuts[i].sharers)
                        check_parts(&w, &cuts[i]);
                    found += cuts[i].width == best.width && cuts[i].sharers == best.sharers;
                }
                assert_int_equal(found, 1);
            }
}

static double us(int rows, int depth, int matrices, int may_cut) {
    const tile_cut cut = tile_choose(rows, rows, depth, 1, matrices, 66, may_cut);
    const tile_work w = tile_work_of(rows, rows, depth, 1, matrices, cut.width, 66, cut.sharers);
    return tile_us(&w);
}

/* A lone small product is cut, one that fills all waves isn't, and cutting is never chosen to
 * lose. */
static void test_what_the_model_says(void **state) {
    (void)state;
    assert_true(tile_choose(768, 768, 3072, 1, 1, 66, 1).sharers > 11);
    assert_int_equal(tile_choose(4096, 4096, 4096, 1, 1, 66, 1).sharers, 0);
    for (int rows = 128; rows <= 4096; rows += 128)
        for (int matrices = 1; matrices <= 9; matrices++) {
            assert_true(us(rows, 4096, matrices, 1) <= us(rows, 4096, matrices, 0));
            assert_true(us(rows, 4096, matrices, 0) <= us(rows, 4096, matrices + 1, 0) + 1e-9);
        }
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_every_block_once),
                                       cmocka_unit_test(test_shared_operands),
                                       cmocka_unit_test(test_little_waste),
                                       cmocka_unit_test(test_every_step_once),
                                       cmocka_unit_test(test_equal_shares),
                                       cmocka_unit_test(test_large),
                                       cmocka_unit_test(test_cuts),
                                       cmocka_unit_test(test_what_the_model_says)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
