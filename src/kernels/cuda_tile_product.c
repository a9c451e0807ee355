/* cuda_tile_product.c - products through the kernel of tiles: maps of what is read and written, how
 * it is cut, launches. */
#include "kernels/cuda_tile_product.h"

#include <cudaTypedefs.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda_gemm.h"

enum {
    MOST_MATRICES = 1 << 16,
    TMA_BYTES = 16,
    CLUSTER_BLOCKS = TILE_UNIT / TILE_ROWS,
    FLAGS = 4 /* a cluster */
};

typedef struct tile_products {
    PFN_cuTensorMapEncodeTiled_v12000 encode;
    unsigned *flags; /* own, device, [clusters, FLAGS] */
    int clusters;    /* that run at a time */
    bool may_cut;    /* units along the depth: it is allowed, and there is room for their sums */
} tile_products;

muonshard_status tile_products_open(backend *self, bool may_cut) {
    cuda_impl *impl = cuda_of(self);
    enum cudaDriverEntryPointQueryResult found;
    void *encode = NULL, *flags;
    FAIL_IF(impl->capability != 90, &self->error, MUONSHARD_ERR_CONFIG,
            "gemm_kernels: hopper is for sm_90, this is %s; cublaslt is for all",
            self->device_text);
    TRY_CUDA(self, cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &encode, 12000,
                                                    cudaEnableDefault, &found));
    FAIL_IF(found != cudaDriverEntryPointSuccess || !encode, &self->error, MUONSHARD_ERR_CONFIG,
            "gemm_kernels: hopper: the driver has no tensor maps");
    tile_products *tiles = calloc(1, sizeof *tiles);
    FAIL_IF(!tiles, &self->error, MUONSHARD_ERR_MEMORY, "out of memory");
    impl->tiles = tiles;
    memcpy(&tiles->encode, &encode, sizeof encode);
    tiles->clusters = impl->processors / CLUSTER_BLOCKS;
    const size_t sums = sizeof(float) * CLUSTER_BLOCKS * TILE_ROWS * TILE_UNIT; /* a cluster's */
    tiles->may_cut = may_cut && (size_t)tiles->clusters * sums <= GEMM_WORKSPACE;
    const size_t bytes = (size_t)tiles->clusters * FLAGS * sizeof(unsigned);
    TRY(self->ops->alloc(self, &flags, bytes));
    tiles->flags = flags;
    self->bytes += bytes;
    return MUONSHARD_OK;
}

void tile_products_close(backend *self) {
    tile_products *tiles = cuda_of(self)->tiles;
    if (tiles)
        self->ops->free(self, tiles->flags);
    free(tiles);
    cuda_of(self)->tiles = NULL;
}

bool tile_takes(const backend *self, const ns_program *program, int64_t m, int64_t n,
                size_t count) {
    const int64_t unit = TMA_BYTES / 2;
    return cuda_of(self)->tiles && ns_dtype_size(program->dtype) == 2 &&
           program->square_dtype == program->dtype && m % unit == 0 && n % unit == 0 &&
           count < MOST_MATRICES;
}

bool tile_takes_places(gemm_matrices of, int64_t m, int64_t n) {
    return (uintptr_t)of.at % TMA_BYTES == 0 && of.stride % m == 0 && of.stride % n == 0;
}

/* ---- maps ---- */

/* Of [batch, rows, cols], for boxes of 64 x 64. */
static muonshard_status make_map(backend *self, const tile_product *t, gemm_matrices of,
                                 int64_t rows, int64_t cols, CUtensorMap *map) {
    const cuuint64_t sizes[] = {(cuuint64_t)cols, (cuuint64_t)rows, t->count};
    const cuuint64_t strides[] = {(cuuint64_t)of.pitch * 2, (cuuint64_t)of.stride * 2};
    const cuuint32_t box[] = {TILE_BLOCK, TILE_BLOCK, 1}, steps[] = {1, 1, 1};
    const CUresult code = cuda_of(self)->tiles->encode(
        map,
        t->dtype == NS_BF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 3,
        (void *)(uintptr_t)of.at, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
        CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    FAIL_IF(code != CUDA_SUCCESS, &self->error, MUONSHARD_ERR_INTERNAL,
            "CUDA: cuTensorMapEncodeTiled: %d, for %zu matrices of [%lld, %lld], pitch %lld",
            (int)code, t->count, (long long)rows, (long long)cols, (long long)of.pitch);
    return MUONSHARD_OK;
}

static muonshard_status make_args(backend *self, const tile_product *t, void *workspace,
                                  tile_product_args *args) {
    *args = (tile_product_args){.c = t->c.at,
                                .c_pitch = t->c.pitch,
                                .c_stride = t->c.stride,
                                .alpha = t->alpha,
                                .beta = t->beta,
                                .gamma = t->gamma,
                                .shifts = t->shifted.at != NULL,
                                .parts = workspace,
                                .flags = cuda_of(self)->tiles->flags};
    TRY(make_map(self, t, t->a, t->a_turned ? t->depth : t->rows, t->a_turned ? t->rows : t->depth,
                 &args->a));
    TRY(make_map(self, t, t->b, t->b_turned ? t->depth : t->cols, t->b_turned ? t->cols : t->depth,
                 &args->b));
    TRY(make_map(self, t, t->dst, t->rows, t->cols, &args->dst));
    return t->shifted.at ? make_map(self, t, t->shifted, t->rows, t->cols, &args->shifted)
                         : MUONSHARD_OK;
}

/* The matrices that are meant, from `next` on, as many as a launch takes. */
static int fill_list(const tile_product *t, size_t *next, uint16_t *list) {
    int count = 0;
    for (; *next < t->count && count < TILE_MATRICES; ++*next)
        if (t->which == TILE_ALL || t->items[*next].transposed == (t->which == TILE_TURNED))
            list[count++] = (uint16_t)*next;
    return count;
}

/* ---- how it is cut ---- */

/* One launch. */
typedef struct tile_launch {
    backend *self;
    const tile_product *product;
    tile_product_args args;
    int matrices;
    const tile_cut *cuts; /* to be tried */
} tile_launch;

static tile_work work_of(const tile_launch *l, tile_cut cut) {
    const tile_product *t = l->product;
    return tile_work_of((int)t->rows, (int)t->cols, (int)t->depth, t->symmetric, l->matrices,
                        cut.width, cuda_of(l->self)->tiles->clusters, cut.sharers);
}

static cudaError_t launch(const tile_launch *l, tile_cut cut) {
    tile_product_args args = l->args;
    args.work = work_of(l, cut);
    return cuda_tile_product(&args, l->product->dtype == NS_BF16, l->product->a_turned,
                             l->product->b_turned, cuda_of(l->self)->streams[STREAM_COMPUTE]);
}

static bool run_cut(const void *context, int i) {
    const tile_launch *l = context;
    return launch(l, l->cuts[i]) == cudaSuccess;
}

static muonshard_status choose(tile_launch *l, bool by_time, tile_cut *cut) {
    const tile_product *t = l->product;
    const tile_products *tiles = cuda_of(l->self)->tiles;
    const int rows = (int)t->rows, cols = (int)t->cols, depth = (int)t->depth;
    tile_cut cuts[TILE_MOST_CUTS];
    int best = 0;
    if (!by_time) {
        *cut = tile_choose(rows, cols, depth, t->symmetric, l->matrices, tiles->clusters,
                           tiles->may_cut);
        return MUONSHARD_OK;
    }
    const int count = tile_cuts(rows, cols, depth, t->symmetric, l->matrices, tiles->clusters,
                                tiles->may_cut, cuts);
    l->cuts = cuts;
    TRY(gemm_fastest(l->self, run_cut, l, count, &best));
    *cut = cuts[best];
    return MUONSHARD_OK;
}

static muonshard_status find_cut(tile_launch *l, bool by_time, tile_cut *cut) {
    const tile_product *t = l->product;
    cuda_impl *impl = cuda_of(l->self);
    gemm_key key;
    memset(&key, 0, sizeof key);
    key.tiles = 1 + t->a_turned + 2 * impl->tiles->may_cut;
    key.symmetric = t->symmetric;
    key.operands = key.stored = t->dtype == NS_BF16 ? GEMM_BF16 : GEMM_FP16;
    key.b_transposed = !t->b_turned;
    key.adds = t->c.at != NULL;
    key.rows = t->rows;
    key.cols = t->cols;
    key.depth = t->depth;
    key.batch = l->matrices;
    const gemm_choice *known = gemm_find(impl, &key);
    if (known) {
        *cut = gemm_cut(known);
        return MUONSHARD_OK;
    }
    TRY(choose(l, by_time, cut));
    gemm_choice *c = gemm_next_choice(impl);
    FAIL_IF(!c, &l->self->error, MUONSHARD_ERR_MEMORY, "out of memory");
    *c = (gemm_choice){.key = key};
    c->algorithm.data[0] = (uint64_t)cut->width;
    c->algorithm.data[1] = (uint64_t)cut->sharers;
    impl->gemms->count++;
    impl->gemms->added++;
    return MUONSHARD_OK;
}

static muonshard_status each_launch(backend *self, const tile_product *t, bool prepares,
                                    void *workspace) {
    tile_launch l = {.self = self, .product = t};
    uint16_t list[TILE_MATRICES];
    size_t next = 0;
    while ((l.matrices = fill_list(t, &next, list)) > 0) {
        tile_cut cut;
        TRY(make_args(self, t, workspace, &l.args));
        memcpy(l.args.matrices, list, sizeof list[0] * (size_t)l.matrices);
        TRY(find_cut(&l, prepares && cuda_of(self)->measures_gemms, &cut));
        if (!prepares)
            TRY_CUDA(self, launch(&l, cut));
    }
    return MUONSHARD_OK;
}

muonshard_status tile_run(backend *self, const tile_product *t, void *workspace) {
    return each_launch(self, t, false, workspace);
}

muonshard_status tile_prepare(backend *self, const tile_product *t, void *workspace) {
    return each_launch(self, t, true, workspace);
}
