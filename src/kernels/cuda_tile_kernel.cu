/* cuda_tile_kernel.cu - products of 16-bit matrices on a Hopper GPU: dst = alpha a b^T + beta c,
 * cut as cuda_tiles.h has it. A block has a thread that fetches and two groups of threads that
 * multiply; what is fetched goes round a ring of stages in shared memory. Narrow units are a
 * group's each, by turns, so that one writes while the other multiplies (ping-pong); wide ones are
 * shared by both, half of the rows each (cooperative). Everything in memory, operands and results,
 * is read and written as boxes of 64 x 64 elements, whose rows are the 128 bytes that TMA and wgmma
 * swizzle.
 *
 * Both halves of a symmetric result are written from the same registers. */
#include "dtype_bits.h"
#include "kernels/cuda_hopper.cuh"
#include "kernels/cuda_tile_product.h"

namespace {

enum {
    BOX_BYTES = TILE_BLOCK * TILE_BLOCK * 2,
    GROUPS = 2,
    WARPS = GROUP / 32,
    BLOCK_THREADS = (1 + GROUPS) * GROUP,
    SLOTS = 2, /* of a group, boxes on their way out */
    FRAGMENTS = 16
};

template <int Width> struct shape {
    static constexpr int stages = Width == TILE_UNIT ? 4 : 6;
    static constexpr bool shared = Width == TILE_UNIT; /* a unit is both groups' */
    static constexpr int halves = shared ? 1 : 2;      /* of 64 rows, of a group */
    static constexpr int boxes_a = TILE_ROWS / TILE_BLOCK, boxes_b = Width / TILE_BLOCK;
    static constexpr int stage_bytes = (boxes_a + boxes_b) * BOX_BYTES;
    static constexpr int slots_at = stages * stage_bytes;
    static constexpr int barriers_at = slots_at + GROUPS * SLOTS * BOX_BYTES;
    static constexpr int bytes = barriers_at + (2 * stages + GROUPS) * 8;
    /* A stage is empty when the warps that use it are done with it, in both blocks. */
    static constexpr unsigned users = CLUSTER * WARPS * (shared ? GROUPS : 1);
};

/* A place in the ring: which stage, and which time round. */
template <int Width> struct ring {
    uint32_t base;
    int stage = 0;
    unsigned phase = 0;

    __device__ explicit ring(uint32_t shared) : base(shared) {
    }
    __device__ uint32_t a() const {
        return base + (uint32_t)stage * shape<Width>::stage_bytes;
    }
    __device__ uint32_t b() const {
        return a() + shape<Width>::boxes_a * BOX_BYTES;
    }
    __device__ uint32_t full() const {
        return base + shape<Width>::barriers_at + 8u * (uint32_t)stage;
    }
    __device__ uint32_t empty() const {
        return full() + 8u * shape<Width>::stages;
    }
    /* It is the group's turn to multiply. */
    __device__ uint32_t turn(int group) const {
        return base + shape<Width>::barriers_at +
               8u * (2u * shape<Width>::stages + (uint32_t)group);
    }
    __device__ void next() {
        if (++stage == shape<Width>::stages) {
            stage = 0;
            phase ^= 1;
        }
    }
    __device__ void skip(int steps) {
        stage += steps % shape<Width>::stages;
        phase ^= (unsigned)(steps / shape<Width>::stages) & 1;
        if (stage >= shape<Width>::stages) {
            stage -= shape<Width>::stages;
            phase ^= 1;
        }
    }
};

/* ---- fetching ---- */

/* Rows [row, row + 64) and a step's depth of an operand. */
template <bool Turned, typename Load>
__device__ void fetch_box(Load load, uint32_t to, const CUtensorMap *map, uint32_t barrier, int row,
                          int depth, int matrix) {
    if (Turned)
        load(to, map, barrier, row, depth, matrix);
    else
        load(to, map, barrier, depth, row, matrix);
}

template <int Width, bool ATurned, bool BTurned>
__device__ void fetch(const tile_product_args &p, uint32_t shared, unsigned rank, int cluster) {
    typedef shape<Width> S;
    ring<Width> at(shared);
    for (int i = 0;; i++) {
        const tile_segment s = tile_segment_of(&p.work, cluster, i);
        if (s.begin >= s.end)
            return;
        const tile_place tile = tile_place_of(&p.work, s.unit, (int)rank);
        const int matrix = p.matrices[tile.matrix];
#pragma unroll 1
        for (int step = s.begin; step < s.end; step++, at.next()) {
            barrier_wait(at.empty(), at.phase ^ 1);
            barrier_expect(at.full(), S::stage_bytes);
            for (int k = 0; k < S::boxes_a; k++)
                fetch_box<ATurned>(tma_load, at.a() + k * BOX_BYTES, &p.a, at.full(),
                                   tile.row + k * TILE_BLOCK, step * TILE_DEPTH, matrix);
            for (int k = 0; k < S::boxes_b; k++)
                if (tile.apart)
                    fetch_box<BTurned>(tma_load, at.b() + k * BOX_BYTES, &p.b, at.full(),
                                       tile.col + k * TILE_BLOCK, step * TILE_DEPTH, matrix);
                else if (k % CLUSTER == (int)rank)
                    fetch_box<BTurned>(tma_load_to_all, at.b() + k * BOX_BYTES, &p.b, at.full(),
                                       tile.col + k * TILE_BLOCK, step * TILE_DEPTH, matrix);
        }
    }
}

/* ---- multiplying ---- */

/* Descriptor of an operand at `at`, in whose lowest bits a sixteenth of the address is: boxes of 64
 * rows, 128 bytes swizzle. Along the depth rows are 128 bytes, eight of them 1024, and a box
 * follows its neighbour. Turned ones have 64 rows in 128 bytes, eight of the depth in 1024, and the
 * next rows a box further on. */
__device__ static inline uint64_t descriptor(uint32_t at, bool turned) {
    const uint64_t stride = 1024 >> 4, leading = turned ? BOX_BYTES >> 4 : 1;
    return (uint64_t)((at & 0x3ffff) >> 4) | leading << 16 | stride << 32 | (uint64_t)1 << 62;
}

/* Bytes to the next 16 of the depth. */
__device__ static constexpr uint32_t depth_bytes(bool turned) {
    return turned ? 16 * 128 : 16 * 2;
}

/* This warp is done with a stage, tells a lane of it to each block. */
__device__ static inline void release(uint32_t empty) {
    const unsigned lane = threadIdx.x % 32;
    if (lane < CLUSTER)
        barrier_arrive_at(empty, lane);
}

/* sums (+)= a b^T over a segment's steps. `hands_on`: the other group has the next segment. It may
 * not look at a stage before this one has seen the last of its own: a barrier tells two phases
 * apart, no more. */
template <int Width, bool Bf16, bool ATurned, bool BTurned>
__device__ void multiply(const tile_segment &s, int group, bool hands_on, ring<Width> &at,
                         float (&sums)[shape<Width>::halves][Width / 2]) {
    typedef shape<Width> S;
    const uint32_t mine = S::shared ? (uint32_t)group * BOX_BYTES : 0;
    uint32_t done = 0; /* barrier of the stage before */
#pragma unroll 1
    for (int step = s.begin; step < s.end; step++, at.next()) {
        const uint64_t a = descriptor(at.a() + mine, ATurned), b = descriptor(at.b(), BTurned);
        barrier_wait(at.full(), at.phase);
#pragma unroll
        for (int h = 0; h < S::halves; h++)
            hold(sums[h]);
        wgmma_fence();
#pragma unroll
        for (uint32_t k = 0; k < TILE_DEPTH / 16; k++)
#pragma unroll
            for (int h = 0; h < S::halves; h++)
                wgmma<Bf16, ATurned, BTurned>(
                    sums[h], a + (h * BOX_BYTES + k * depth_bytes(ATurned)) / 16,
                    b + k * depth_bytes(BTurned) / 16, step > s.begin || k);
        wgmma_commit();
#pragma unroll
        for (int h = 0; h < S::halves; h++)
            hold(sums[h]);
        wgmma_wait<1>();
        if (done)
            release(done);
        done = at.empty();
    }
    if (hands_on && threadIdx.x % 32 == 0)
        barrier_arrive_at(at.turn(1 - group), blockIdx.x % CLUSTER);
    wgmma_wait<0>();
#pragma unroll
    for (int h = 0; h < S::halves; h++)
        hold(sums[h]);
    release(done);
}

/* ---- parts of a unit ---- */

/* A block's part, and the flag that says it is there. */
template <int Width> struct part {
    float *sums;
    unsigned *flag;
    __device__ part(const tile_product_args &p, unsigned block, int group) {
        const unsigned half = shape<Width>::shared ? (unsigned)group : 0;
        sums = p.parts + ((size_t)block * GROUPS + half) * (TILE_ROWS * Width / 2);
        flag = p.flags + (size_t)block * GROUPS + half;
    }
};

/* The threads of a group. */
__device__ static inline void group_sync(int group) {
    named_barrier(1 + (unsigned)group, GROUP);
}

template <int Width>
__device__ void publish(const tile_product_args &p, int group,
                        const float (&sums)[shape<Width>::halves][Width / 2]) {
    const unsigned t = threadIdx.x % GROUP;
    const part<Width> mine(p, blockIdx.x, group);
#pragma unroll
    for (int h = 0; h < shape<Width>::halves; h++)
#pragma unroll
        for (int i = 0; i < Width / 2; i++)
            mine.sums[(size_t)(h * Width / 2 + i) * GROUP + t] = sums[h][i];
    fence_device();
    group_sync(group);
    if (t == 0)
        store_release(mine.flag, 1);
}

/* Added in the order of the depth but for the end, which is there already: the same sums every
 * time. A flag is taken down by the one who waited for it, for the next launch. */
template <int Width>
__device__ void collect(const tile_product_args &p, const tile_segment &s, int cluster, int group,
                        float (&sums)[shape<Width>::halves][Width / 2]) {
    const unsigned t = threadIdx.x % GROUP;
    for (int from = s.first; from < cluster; from++) {
        if (tile_tail_begin(&p.work, from) == tile_tail_begin(&p.work, from + 1))
            continue;
        const part<Width> theirs(p, (unsigned)from * CLUSTER + blockIdx.x % CLUSTER, group);
        if (t == 0) {
            while (!load_acquire(theirs.flag)) {
            }
            *theirs.flag = 0;
        }
        group_sync(group);
#pragma unroll
        for (int h = 0; h < shape<Width>::halves; h++)
#pragma unroll
            for (int i = 0; i < Width / 2; i++)
                sums[h][i] +=
                    load_from_device(&theirs.sums[(size_t)(h * Width / 2 + i) * GROUP + t]);
    }
}

/* ---- writing ---- */

typedef enum manner { AS_IT_IS, TURNED, SYMMETRIC } manner;

/* The boxes of a group that are on their way out. */
struct outbox {
    uint32_t slots;
    int group;
    int next = 0;
};

/* Words of two elements: word 2 j + i of a thread is of row 16 warp + lane / 4 + 8 i and columns
 * from 8 j + 2 (lane % 4) on, of the block of 64 x 64. Its lower half is written to its upper half,
 * too. */
__device__ static inline void write_upper(uint32_t slot, const uint32_t (&words)[FRAGMENTS]) {
    const unsigned t = threadIdx.x % GROUP;
    const unsigned row = t / 32 * 16 + t % 32 / 4, col = t % 4 * 2;
#pragma unroll
    for (unsigned i = 0; i < FRAGMENTS; i++)
#pragma unroll
        for (unsigned half = 0; half < 2; half++) {
            const unsigned r = row + i % 2 * 8, c = col + i / 2 * 8 + half;
            if (c < r)
                store_shared_half(slot + c * 128 + ((r / 8 ^ c % 8) * 16 + r % 8 * 2),
                                  (uint16_t)(words[i] >> 16 * half));
        }
}

/* Sends the block of words to (row, col), and to the same place of `copy` unless it is NULL. */
__device__ static inline void send(outbox &out, manner how, const uint32_t (&words)[FRAGMENTS],
                                   const CUtensorMap *map, const CUtensorMap *copy, int row,
                                   int col, int matrix) {
    const unsigned t = threadIdx.x % GROUP, warp = t / 32, lane = t % 32;
    const uint32_t slot = out.slots + (uint32_t)out.next * BOX_BYTES;
    out.next = (out.next + 1) % SLOTS;
    if (t == 0)
        tma_wait_read<SLOTS - 1>();
    group_sync(out.group);
#pragma unroll
    for (unsigned pair = 0; pair < FRAGMENTS / 4; pair++) { /* of 8 columns each */
        const uint32_t four[4] = {words[4 * pair], words[4 * pair + 1], words[4 * pair + 2],
                                  words[4 * pair + 3]};
        if (how == TURNED) {
            const unsigned r = 16 * pair + lane / 16 * 8 + lane % 8;
            const unsigned chunk = 2 * warp + lane / 8 % 2;
            store_fragments_turned(slot + r * 128 + (chunk ^ r % 8) * 16, four);
        } else {
            const unsigned r = 16 * warp + lane / 8 % 2 * 8 + lane % 8;
            const unsigned chunk = 2 * pair + lane / 16;
            store_fragments(slot + r * 128 + (chunk ^ r % 8) * 16, four);
        }
    }
    if (how == SYMMETRIC) {
        group_sync(out.group);
        write_upper(slot, words);
    }
    fence_for_tma();
    group_sync(out.group);
    if (t == 0) {
        tma_store(map, slot, col, row, matrix);
        if (copy)
            tma_store(copy, slot, col, row, matrix);
        tma_commit();
    }
}

/* Adds gamma to what is on the diagonal, as it was rounded. */
template <bool Bf16> __device__ void shift_diagonal(uint32_t (&words)[FRAGMENTS], float gamma) {
    const unsigned t = threadIdx.x % GROUP;
    const unsigned row = t / 32 * 16 + t % 32 / 4, col = t % 4 * 2;
#pragma unroll
    for (unsigned i = 0; i < FRAGMENTS; i++) {
        const unsigned r = row + i % 2 * 8, c = col + i / 2 * 8;
        const float first = unpack_half<Bf16>((uint16_t)words[i]);
        const float second = unpack_half<Bf16>((uint16_t)(words[i] >> 16));
        if (r - c < 2)
            words[i] = pack_two<Bf16>(r == c ? first + gamma : first,
                                      r == c + 1 ? second + gamma : second);
    }
}

/* c of the block at (row, col). */
__device__ static inline void load_c(const tile_product_args &p, int row, int col, int matrix,
                                     uint32_t (&words)[FRAGMENTS]) {
    const unsigned t = threadIdx.x % GROUP;
    const int r = row + (int)(t / 32 * 16 + t % 32 / 4), c = col + (int)(t % 4) * 2;
    const uint16_t *from =
        (const uint16_t *)p.c + (int64_t)matrix * p.c_stride + (int64_t)r * p.c_pitch + c;
#pragma unroll
    for (int i = 0; i < FRAGMENTS; i++) {
        const bool inside = p.c && r + i % 2 * 8 < p.work.rows && c + i / 2 * 8 < p.work.cols;
        const uint16_t *at = from + i % 2 * 8 * p.c_pitch + i / 2 * 8;
        words[i] = inside ? *(const uint32_t *)(const void *)at : 0;
    }
}

/* alpha sums + beta c, rounded, in c's place. */
template <bool Bf16>
__device__ void round_block(const tile_product_args &p, const float *sums,
                            uint32_t (&words)[FRAGMENTS]) {
#pragma unroll
    for (int i = 0; i < FRAGMENTS; i++) {
        float first = p.alpha * sums[2 * i], second = p.alpha * sums[2 * i + 1];
        if (p.c) {
            first = fmaf(p.beta, unpack_half<Bf16>((uint16_t)words[i]), first);
            second = fmaf(p.beta, unpack_half<Bf16>((uint16_t)(words[i] >> 16)), second);
        }
        words[i] = pack_two<Bf16>(first, second);
    }
}

/* A block, and what is to become of it beside: a second time turned; or, on the diagonal, what is
 * shifted. Elsewhere what is shifted is the same. */
template <bool Bf16>
__device__ void send_all(const tile_product_args &p, outbox &out, tile_role role,
                         uint32_t (&words)[FRAGMENTS], int row, int col, int matrix) {
    const bool diagonal = role == TILE_DIAGONAL;
    const CUtensorMap *map = &p.dst, *copy = p.shifts && !diagonal ? &p.shifted : NULL;
    const bool twice = diagonal ? p.shifts : role == TILE_MIRRORED;
    manner how = diagonal ? SYMMETRIC : AS_IT_IS;
#pragma unroll 1
    for (int i = 0; i <= (int)twice; i++) {
        if (i && diagonal) {
            shift_diagonal<Bf16>(words, p.gamma);
            map = &p.shifted;
        } else if (i) {
            how = TURNED;
        }
        send(out, how, words, map, copy, how == TURNED ? col : row, how == TURNED ? row : col,
             matrix);
    }
}

/* `words`: c of the first block; that of the others is on its way while the one before is sent. */
template <int Width, bool Bf16>
__device__ void write(const tile_product_args &p, const tile_place &at,
                      const float (&sums)[shape<Width>::halves][Width / 2],
                      uint32_t (&words)[FRAGMENTS], outbox &out) {
    constexpr int across = Width / TILE_BLOCK, blocks = shape<Width>::halves * across;
#pragma unroll
    for (int k = 0; k < blocks; k++) {
        const int row = at.row + k / across * TILE_BLOCK, col = at.col + k % across * TILE_BLOCK;
        const tile_role role = tile_role_of(&p.work, row, col);
        uint32_t next[FRAGMENTS];
        round_block<Bf16>(p, &sums[k / across][k % across * 2 * FRAGMENTS], words);
        if (k + 1 < blocks)
            load_c(p, at.row + (k + 1) / across * TILE_BLOCK,
                   at.col + (k + 1) % across * TILE_BLOCK, at.matrix, next);
        if (role != TILE_NOTHING)
            send_all<Bf16>(p, out, role, words, row, col, at.matrix);
#pragma unroll
        for (int i = 0; k + 1 < blocks && i < FRAGMENTS; i++)
            words[i] = next[i];
    }
}

/* ---- the kernel ---- */

template <int Width, bool Bf16, bool ATurned, bool BTurned>
__device__ void compute(const tile_product_args &p, uint32_t shared, int cluster, int group) {
    typedef shape<Width> S;
    ring<Width> at(shared);
    outbox out;
    out.slots = shared + S::slots_at + (uint32_t)group * SLOTS * BOX_BYTES;
    out.group = group;
    float sums[S::halves][Width / 2];
    tile_segment s, next = tile_segment_of(&p.work, cluster, 0);
    for (int i = 0; next.begin < next.end; i++) {
        s = next;
        next = tile_segment_of(&p.work, cluster, i + 1);
        if (!S::shared && i % GROUPS != group) {
            at.skip(s.end - s.begin);
            continue;
        }
        if (!S::shared && i)
            barrier_wait(at.turn(group), (unsigned)(i - 1) / GROUPS % 2);
        tile_place mine = tile_place_of(&p.work, s.unit, (int)(blockIdx.x % CLUSTER));
        mine.matrix = p.matrices[mine.matrix];
        mine.row += S::shared ? group * TILE_BLOCK : 0;
        uint32_t words[FRAGMENTS];
        load_c(p, mine.row, mine.col, mine.matrix, words);
        multiply<Width, Bf16, ATurned, BTurned>(s, group, !S::shared && next.begin < next.end, at,
                                                sums);
        if (s.publishes) {
            publish<Width>(p, group, sums);
            continue;
        }
        if (s.collects)
            collect<Width>(p, s, cluster, group, sums);
        write<Width, Bf16>(p, mine, sums, words, out);
    }
    if (threadIdx.x % GROUP == 0)
        tma_wait();
    warp_sync();
}

template <int Width> __device__ void begin(const tile_product_args &p, uint32_t shared) {
    typedef shape<Width> S;
    if (threadIdx.x == 0) {
        ring<Width> at(shared);
        for (int i = 0; i < S::stages; i++, at.next()) {
            barrier_init(at.full(), 1);
            barrier_init(at.empty(), S::users);
        }
        for (int i = 0; i < GROUPS; i++)
            barrier_init(at.turn(i), WARPS);
        barrier_init_done();
        tma_prefetch(&p.a);
        tma_prefetch(&p.b);
        tma_prefetch(&p.dst);
    }
    warp_sync();
    cluster_sync();
}

/* Registers: 40 a thread for what fetches, 232 for what multiplies: 64512 of 65536. */
template <int Width, bool Bf16, bool ATurned, bool BTurned>
__global__ void KERNEL_OF_CLUSTER(BLOCK_THREADS)
    tile_kernel(const __grid_constant__ tile_product_args p) {
    const uint32_t shared = dynamic_shared();
    const int cluster = (int)(blockIdx.x / CLUSTER), group = (int)(threadIdx.x / GROUP) - 1;
    begin<Width>(p, shared);
    if (group < 0) {
        give_registers<40>();
        if (threadIdx.x == 0)
            fetch<Width, ATurned, BTurned>(p, shared, cluster_rank(), cluster);
        warp_sync();
    } else {
        take_registers<232>();
        compute<Width, Bf16, ATurned, BTurned>(p, shared, cluster, group);
    }
    cluster_sync(); /* the other block may still write to this one's memory, or arrive */
}

template <int Width, bool Bf16>
cudaError_t start(const tile_product_args *p, bool a_turned, bool b_turned, cudaStream_t stream) {
    void (*const kernel)(tile_product_args) = a_turned   ? tile_kernel<Width, Bf16, true, true>
                                              : b_turned ? tile_kernel<Width, Bf16, false, true>
                                                         : tile_kernel<Width, Bf16, false, false>;
    return launch_clusters(kernel, (unsigned)p->work.clusters, BLOCK_THREADS, shape<Width>::bytes,
                           stream, *p);
}

} // namespace

extern "C" cudaError_t cuda_tile_product(const tile_product_args *p, bool bf16, bool a_turned,
                                         bool b_turned, cudaStream_t stream) {
    if (p->work.width == TILE_UNIT)
        return bf16 ? start<TILE_UNIT, true>(p, a_turned, b_turned, stream)
                    : start<TILE_UNIT, false>(p, a_turned, b_turned, stream);
    return bf16 ? start<TILE_UNIT / 2, true>(p, a_turned, b_turned, stream)
                : start<TILE_UNIT / 2, false>(p, a_turned, b_turned, stream);
}
