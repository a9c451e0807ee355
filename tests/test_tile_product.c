/* The kernel of tiles, on the emulated instructions of fake_cuda or on a card: every element of
 * what it writes, to the bit, and that nothing beside is touched. Operands are small integers, so
 * that sums are exact in whatever order; what is read outside of a matrix would be NaN. */
#include "dtype_bits.h"
#include "kernels/cuda_tile_product.h"

#include <cudaTypedefs.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { NAN_BITS = 0x7fff, POISON = 0xcafe, MOST_CLUSTERS = 70, MOST_BATCH = 4 };

typedef struct product {
    int rows, cols, depth, symmetric, a_turned, b_turned, bf16;
    int width, clusters, sharers;
    int batch, listed; /* matrices there are, and those that are multiplied */
    int adds, shifts;
    float alpha, beta;
    int padding; /* of every row, elements, a multiple of 8 beyond what alignment asks for */
    int gap;     /* rows behind every matrix */
} product;

/* [batch, rows, pitch] of 16 bits on both sides, matrices `stride` apart. */
typedef struct array {
    int rows, cols, pitch, batch;
    size_t stride;
    uint16_t *host; /* own */
    void *device;   /* own */
} array;

static cudaStream_t stream;
static PFN_cuTensorMapEncodeTiled_v12000 encode;
static float *parts;
static unsigned *flags;
static int repeats = 1; /* MUONSHARD_TILE_REPEATS, for what goes wrong now and then on a card */
static uint32_t noise = 1;

#define cuda_ok(call) assert_int_equal((call), cudaSuccess)

static int between(int least, int most) {
    noise = noise * 1664525u + 1013904223u;
    return least + (int)((noise >> 8) % (uint32_t)(most - least + 1));
}

static uint16_t narrow(int bf16, float x) {
    return bf16 ? to_bf16(x) : to_fp16(x);
}

static float widen(int bf16, uint16_t bits) {
    return bf16 ? from_bf16(bits) : from_fp16(bits);
}

/* ---- arrays ---- */

static size_t elements_of(const array *a) {
    return (size_t)a->batch * a->stride;
}

static uint16_t *at(const array *a, int matrix, int row, int col) {
    return &a->host[(size_t)matrix * a->stride + (size_t)row * (size_t)a->pitch + (size_t)col];
}

static void upload(const array *a) {
    cuda_ok(
        cudaMemcpyAsync(a->device, a->host, 2 * elements_of(a), cudaMemcpyHostToDevice, stream));
}

static void download(const array *a) {
    cuda_ok(
        cudaMemcpyAsync(a->host, a->device, 2 * elements_of(a), cudaMemcpyDeviceToHost, stream));
}

static array make_array(const product *p, int rows, int cols, uint16_t fill) {
    array a = {.rows = rows, .cols = cols, .batch = p->batch};
    a.pitch = (cols + 7) / 8 * 8 + p->padding;
    a.stride = (size_t)(rows + p->gap) * (size_t)a.pitch;
    a.host = malloc(2 * elements_of(&a));
    assert_non_null(a.host);
    for (size_t i = 0; i < elements_of(&a); i++)
        a.host[i] = fill;
    cuda_ok(cudaMalloc(&a.device, 2 * elements_of(&a)));
    return a;
}

static array make_operand(const product *p, int rows, int cols, int most) {
    array a = make_array(p, rows, cols, NAN_BITS);
    for (int m = 0; m < a.batch; m++)
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < cols; c++)
                *at(&a, m, r, c) = narrow(p->bf16, (float)between(-most, most));
    return a;
}

static void free_array(array *a) {
    cuda_ok(cudaFree(a->device));
    free(a->host);
}

static CUtensorMap map_of(const product *p, const array *a) {
    CUtensorMap map;
    const cuuint64_t sizes[] = {(cuuint64_t)a->cols, (cuuint64_t)a->rows, (cuuint64_t)a->batch};
    const cuuint64_t strides[] = {2 * (cuuint64_t)a->pitch, 2 * (cuuint64_t)a->stride};
    const cuuint32_t box[] = {TILE_BLOCK, TILE_BLOCK, 1}, steps[] = {1, 1, 1};
    assert_int_equal(
        encode(&map, p->bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
               3, a->device, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
               CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
        CUDA_SUCCESS);
    return map;
}

/* ---- one product ---- */

enum { GAMMA = 3 };

typedef struct operands {
    array a, b, c, dst, shifted;
} operands;

/* The sum is exact; what is made of it is rounded as the kernel does. */
static float element(const product *p, const operands *o, int m, int row, int col) {
    double sum = 0.0;
    for (int k = 0; k < p->depth; k++)
        sum += (double)widen(p->bf16, p->a_turned ? *at(&o->a, m, k, row) : *at(&o->a, m, row, k)) *
               (double)widen(p->bf16, p->b_turned ? *at(&o->b, m, k, col) : *at(&o->b, m, col, k));
    const float multiple = p->alpha * (float)sum;
    return p->adds ? fmaf(p->beta, widen(p->bf16, *at(&o->c, m, row, col)), multiple) : multiple;
}

/* To the bit, but for the sign of a zero, which depends on where a device begins to add. */
static bool same(uint16_t got, uint16_t wanted) {
    return got == wanted || !((got | wanted) & 0x7fff);
}

static void check(const product *p, const operands *o, int m, int row, int col, uint16_t wanted) {
    const uint16_t got = *at(&o->dst, m, row, col), moved = *at(&o->shifted, m, row, col);
    const uint16_t diagonal =
        narrow(p->bf16, widen(p->bf16, wanted) + (row == col ? (float)GAMMA : 0.0f));
    const bool right = same(got, wanted) && (!p->shifts || same(moved, diagonal));
    if (!right)
        print_message("%d x %d x %d, symmetric %d, turned %d %d, bf16 %d, width %d, clusters %d, "
                      "sharers %d: matrix %d (%d, %d) is %g and %g, not %g\n",
                      p->rows, p->cols, p->depth, p->symmetric, p->a_turned, p->b_turned, p->bf16,
                      p->width, p->clusters, p->sharers, m, row, col, (double)widen(p->bf16, got),
                      (double)widen(p->bf16, moved), (double)widen(p->bf16, wanted));
    assert_true(right);
}

static void check_matrix(const product *p, const operands *o, int m) {
    for (int row = 0; row < p->rows; row++)
        for (int col = 0; col < p->cols; col++) {
            if (p->symmetric && col > row)
                continue;
            const uint16_t wanted = narrow(p->bf16, element(p, o, m, row, col));
            check(p, o, m, row, col, wanted);
            if (p->symmetric)
                check(p, o, m, col, row, wanted);
        }
}

static void check_untouched(const array *a, const uint8_t *written) {
    for (int m = 0; m < a->batch; m++) {
        for (int row = 0; row < a->rows; row++)
            for (int col = written[m] ? a->cols : 0; col < a->pitch; col++)
                assert_int_equal(*at(a, m, row, col), POISON);
        for (uint16_t *rest = at(a, m, a->rows, 0); rest < at(a, m + 1, 0, 0); rest++)
            assert_int_equal(*rest, POISON);
    }
}

/* Here, as what fails when all tests are over fails none of them. */
static void check_flags_are_down(void) {
    unsigned left[4 * MOST_CLUSTERS];
    cuda_ok(cudaMemcpyAsync(left, flags, sizeof left, cudaMemcpyDeviceToHost, stream));
    cuda_ok(cudaStreamSynchronize(stream));
    for (int i = 0; i < 4 * MOST_CLUSTERS; i++)
        assert_int_equal(left[i], 0);
}

static void run(const product *p) {
    operands o = {
        .a = make_operand(p, p->a_turned ? p->depth : p->rows, p->a_turned ? p->rows : p->depth, 3),
        .b = make_operand(p, p->b_turned ? p->depth : p->cols, p->b_turned ? p->cols : p->depth, 3),
        .c = make_operand(p, p->rows, p->cols, 8),
        .dst = make_array(p, p->rows, p->cols, POISON),
        .shifted = make_array(p, p->rows, p->cols, POISON)};
    array *const all[] = {&o.a, &o.b, &o.c, &o.dst, &o.shifted};
    for (size_t i = 0; i < 5; i++)
        upload(all[i]);
    tile_product_args args = {.a = map_of(p, &o.a),
                              .b = map_of(p, &o.b),
                              .dst = map_of(p, &o.dst),
                              .shifted = map_of(p, &o.shifted),
                              .work = tile_work_of(p->rows, p->cols, p->depth, p->symmetric,
                                                   p->listed, p->width, p->clusters, p->sharers),
                              .c = p->adds ? o.c.device : NULL,
                              .c_pitch = o.c.pitch,
                              .c_stride = (int64_t)o.c.stride,
                              .alpha = p->alpha,
                              .beta = p->beta,
                              .gamma = GAMMA,
                              .shifts = p->shifts,
                              .parts = parts,
                              .flags = flags};
    uint8_t written[MOST_BATCH] = {0};
    for (int i = 0; i < p->listed; i++) { /* the last ones, backwards */
        args.matrices[i] = (uint16_t)(p->batch - 1 - i);
        written[p->batch - 1 - i] = 1;
    }
    for (int i = 0; i < repeats; i++)
        cuda_ok(cuda_tile_product(&args, p->bf16, p->a_turned, p->b_turned, stream));
    download(&o.dst);
    download(&o.shifted);
    check_flags_are_down();
    for (int m = 0; m < p->batch; m++)
        if (written[m])
            check_matrix(p, &o, m);
    check_untouched(&o.dst, written);
    check_untouched(&o.shifted, p->shifts ? written : (uint8_t[MOST_BATCH]){0});
    for (size_t i = 0; i < 5; i++)
        free_array(all[i]);
}

/* ---- products ---- */

static const product plain = {.rows = 256,
                              .cols = 256,
                              .depth = 64,
                              .width = 128,
                              .clusters = 3,
                              .bf16 = 1,
                              .alpha = 0.5f,
                              .beta = -2.0f,
                              .batch = 1,
                              .listed = 1};

/* Which of the three ways operands lie, `way` 0 to 2. */
static void lie(product *p, int way) {
    p->a_turned = way == 2;
    p->b_turned = way >= 1;
}

/* Every kernel, as symmetric and as any product, with all that can be added. */
static void test_every_kernel(void **state) {
    (void)state;
    for (int kernel = 0; kernel < 12; kernel++)
        for (int symmetric = 0; symmetric <= 1; symmetric++) {
            product p = plain;
            p.rows = 328;
            p.cols = symmetric ? p.rows : 200;
            p.depth = 152;
            p.symmetric = symmetric;
            p.adds = 1;
            p.alpha = 0.3f; /* nothing is exact any more */
            p.beta = -0.7f;
            p.shifts = symmetric;
            p.bf16 = kernel % 2;
            p.width = kernel / 2 % 2 ? 256 : 128;
            lie(&p, kernel / 4);
            run(&p);
        }
}

/* Rows, columns and depths about the edges of blocks, tiles, units and steps. */
static void test_edges(void **state) {
    (void)state;
    static const int edges[] = {1, 7, 8, 63, 64, 65, 127, 128, 129, 191, 192, 255, 256, 257, 321};
    enum { EDGES = sizeof edges / sizeof edges[0] };
    for (int i = 0; i < EDGES; i++)
        for (int way = 0; way < 3; way++)
            for (int width = 128; width <= 256; width += 128) {
                product p = plain;
                p.width = width;
                p.adds = i % 2;
                lie(&p, way);
                p.rows = edges[i];
                p.cols = edges[(i + 4) % EDGES];
                p.depth = edges[(i + 9) % EDGES];
                run(&p);
                p.cols = p.rows;
                p.symmetric = 1;
                p.shifts = way % 2;
                run(&p);
            }
}

/* Units that are cut into up to eight parts, more clusters than units and fewer, several launches
 * with the same flags. */
static void test_parts(void **state) {
    (void)state;
    for (int clusters = 1; clusters <= 9; clusters += 2)
        for (int sharers = 0; sharers <= clusters; sharers += 2)
            for (int width = 128; width <= 256; width += 128) {
                product p = plain;
                p.width = width;
                p.depth = 64 * 7 - 30;
                p.symmetric = 1;
                p.clusters = clusters;
                p.sharers = sharers;
                p.adds = 1;
                run(&p);
            }
}

/* Some matrices of a batch, and more than a ring of stages has steps. */
static void test_lists(void **state) {
    (void)state;
    for (int listed = 1; listed <= 4; listed++)
        for (int width = 128; width <= 256; width += 128) {
            product p = plain;
            p.width = width;
            p.rows = p.cols = 136;
            p.depth = 200;
            p.symmetric = listed % 2;
            p.batch = 4;
            p.listed = listed;
            p.clusters = 2;
            p.adds = 1;
            p.padding = 16;
            p.gap = listed;
            run(&p);
        }
}

/* MUONSHARD_TILE_CASES of them. */
static void test_by_chance(void **state) {
    (void)state;
    const char *wanted = getenv("MUONSHARD_TILE_CASES");
    const int cases = wanted ? atoi(wanted) : 60;
    for (int i = 0; i < cases; i++) {
        product p = {.rows = between(1, 520),
                     .cols = between(1, 520),
                     .depth = between(1, 420),
                     .symmetric = between(0, 1),
                     .bf16 = between(0, 1),
                     .width = 128 * between(1, 2),
                     .clusters = between(1, 12),
                     .sharers = between(0, 12),
                     .batch = between(1, MOST_BATCH),
                     .adds = between(0, 1),
                     .alpha = 0.25f * (float)between(1, 8),
                     .beta = 0.1f * (float)between(-9, 9),
                     .padding = 8 * between(0, 2),
                     .gap = between(0, 3)};
        lie(&p, between(0, 2));
        p.listed = between(1, p.batch);
        if (p.symmetric) {
            p.cols = p.rows;
            p.shifts = between(0, 1);
        }
        run(&p);
    }
}

static int begin(void **state) {
    (void)state;
    const char *wanted = getenv("MUONSHARD_TILE_REPEATS");
    repeats = wanted ? atoi(wanted) : 1;
    void *found = NULL;
    enum cudaDriverEntryPointQueryResult result;
    const size_t bytes = sizeof(float) * 2 * TILE_ROWS * TILE_UNIT * MOST_CLUSTERS;
    void *memory;
    cuda_ok(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    cuda_ok(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                             cudaEnableDefault, &result));
    memcpy(&encode, &found, sizeof found);
    cuda_ok(cudaMalloc(&memory, bytes));
    parts = memory;
    cuda_ok(cudaMalloc(&memory, 4 * sizeof(unsigned) * MOST_CLUSTERS));
    flags = memory;
    cuda_ok(cudaMemsetAsync(flags, 0, 4 * sizeof(unsigned) * MOST_CLUSTERS, stream));
    return encode ? 0 : -1;
}

static int end(void **state) {
    (void)state;
    cuda_ok(cudaFree(parts));
    cuda_ok(cudaFree(flags));
    cuda_ok(cudaStreamDestroy(stream));
    return 0;
}

#pragma weak fake_hopper_conflicts
extern long fake_hopper_conflicts(void);

/* After all others: no fragment went to banks that another one's row was on its way to. */
static void test_no_conflicts(void **state) {
    (void)state;
    assert_true(!fake_hopper_conflicts || fake_hopper_conflicts() == 0);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_kernel), cmocka_unit_test(test_edges),
        cmocka_unit_test(test_parts),        cmocka_unit_test(test_lists),
        cmocka_unit_test(test_by_chance),    cmocka_unit_test(test_no_conflicts)};
    return cmocka_run_group_tests(tests, begin, end);
}
