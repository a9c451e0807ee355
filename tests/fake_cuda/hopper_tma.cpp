/* hopper_tma.cpp - the emulated tensor memory accelerator: maps of arrays, as the driver makes
 * them, and copies of boxes, each made some time between its issue and what waits for it. */
#include "hopper_machine.h"

#include <cstring>
#include <list>
#include <set>
#include <tuple>

#include "fake.h"

using namespace hopper;

/* ---- maps ---- */

namespace {

const uint64_t MAGIC = 0x6d61702066616b65; /* in a map's first word */

struct array_map {
    uint64_t magic;
    char *memory;
    uint64_t size[3], stride[2]; /* elements, bytes */
    unsigned box[3], element;    /* elements, bytes */
    bool swizzle;
    unsigned row_bytes() const {
        return box[0] * element;
    }
    unsigned box_bytes() const {
        return row_bytes() * box[1] * box[2];
    }
};
static_assert(sizeof(array_map) <= sizeof(CUtensorMap), "a map has 128 bytes");

unsigned element_bytes(CUtensorMapDataType type) {
    switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT8: return 1;
    case CU_TENSOR_MAP_DATA_TYPE_UINT16:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16: return 2;
    case CU_TENSOR_MAP_DATA_TYPE_UINT32:
    case CU_TENSOR_MAP_DATA_TYPE_INT32:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32: return 4;
    default: return 0;
    }
}

bool valid(const array_map &m) {
    bool ok = m.memory && (size_t)m.memory % 16 == 0 && m.element;
    for (unsigned i = 0; i < 3; i++)
        ok = ok && m.size[i] >= 1 && m.size[i] <= (uint64_t)1 << 32 && m.box[i] >= 1 &&
             m.box[i] <= 256;
    for (unsigned i = 0; i < 2; i++)
        ok = ok && m.stride[i] % 16 == 0 && m.stride[i] < (uint64_t)1 << 40;
    ok = ok && m.stride[0] && m.stride[1] % m.stride[0] == 0; /* as the driver's manual has it */
    return ok && m.row_bytes() % 16 == 0 && (!m.swizzle || m.row_bytes() <= 128);
}

array_map opened(const CUtensorMap *map) {
    array_map m;
    memcpy(&m, map, sizeof m);
    if ((size_t)map % 64 || m.magic != MAGIC)
        broken("a tensor map that cuTensorMapEncodeTiled has not made, or not here");
    if (m.swizzle && m.row_bytes() != 128)
        broken("a swizzled box of %u bytes a row is not emulated", m.row_bytes());
    return m;
}

} // namespace

/* Of what there is, what products use: three dimensions, every element, zeros beyond. */
static CUresult encode(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *memory,
                       const cuuint64_t *size, const cuuint64_t *stride, const cuuint32_t *box,
                       const cuuint32_t *step, CUtensorMapInterleave interleave,
                       CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                       CUtensorMapFloatOOBfill fill) {
    if (fake_fails())
        return CUDA_ERROR_UNKNOWN;
    if ((size_t)map % 64 || rank != 3 || interleave != CU_TENSOR_MAP_INTERLEAVE_NONE ||
        fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE ||
        promotion > CU_TENSOR_MAP_L2_PROMOTION_L2_256B ||
        (swizzle != CU_TENSOR_MAP_SWIZZLE_NONE && swizzle != CU_TENSOR_MAP_SWIZZLE_128B) ||
        step[0] != 1 || step[1] != 1 || step[2] != 1)
        return CUDA_ERROR_INVALID_VALUE;
    const array_map m = {MAGIC,
                         (char *)memory,
                         {size[0], size[1], size[2]},
                         {stride[0], stride[1]},
                         {box[0], box[1], box[2]},
                         element_bytes(type),
                         swizzle == CU_TENSOR_MAP_SWIZZLE_128B};
    if (!valid(m))
        return CUDA_ERROR_INVALID_VALUE;
    memset(map, 0, sizeof *map);
    memcpy(map, &m, sizeof m);
    return CUDA_SUCCESS;
}

void *fake_driver_entry(const char *symbol) {
    return strcmp(symbol, "cuTensorMapEncodeTiled") ? nullptr : (void *)encode;
}

/* ---- boxes ---- */

namespace {

struct box {
    array_map map;
    int x, y, z;
};

/* The part of a row of the box that is in the array. */
struct row_part {
    char *memory;
    unsigned begin, bytes; /* within the row */
};

row_part row_of(const box &b, unsigned row) {
    const array_map &m = b.map;
    const int64_t y = (int64_t)b.y + row % m.box[1], z = (int64_t)b.z + row / m.box[1];
    const int64_t size = (int64_t)m.size[0], end = (int64_t)b.x + m.box[0];
    const int64_t from = b.x < 0 ? 0 : b.x, to = end < size ? end : size;
    if (y < 0 || z < 0 || y >= (int64_t)m.size[1] || z >= (int64_t)m.size[2] || from >= to)
        return {nullptr, 0, 0};
    return {m.memory + from * m.element + y * (int64_t)m.stride[0] + z * (int64_t)m.stride[1],
            (unsigned)(from - b.x) * m.element, (unsigned)(to - from) * m.element};
}

/* The chunk of a box that is `offset` bytes into it. */
char *chunk_at(const block &b, const array_map &m, unsigned address, unsigned offset) {
    return b.at(m.swizzle ? swizzled(address + offset) : address + offset);
}

void read_box(const box &from, block &to, unsigned address) {
    const array_map &m = from.map;
    for (unsigned row = 0; row < m.box[1] * m.box[2]; row++) {
        char bytes[256 * 4] = {};
        const row_part part = row_of(from, row);
        if (part.bytes)
            memcpy(bytes + part.begin, part.memory, part.bytes);
        for (unsigned i = 0; i < m.row_bytes(); i += CHUNK)
            memcpy(chunk_at(to, m, address, row * m.row_bytes() + i), bytes + i, CHUNK);
    }
}

std::vector<char> gather(const array_map &m, const block &from, unsigned address) {
    std::vector<char> bytes(m.box_bytes());
    for (unsigned i = 0; i < m.box_bytes(); i += CHUNK)
        memcpy(&bytes[i], chunk_at(from, m, address, i), CHUNK);
    return bytes;
}

void write_box(const box &to, const std::vector<char> &bytes) {
    for (unsigned row = 0; row < to.map.box[1] * to.map.box[2]; row++) {
        const row_part part = row_of(to, row);
        if (part.bytes)
            memcpy(part.memory, &bytes[row * to.map.row_bytes() + part.begin], part.bytes);
    }
}

unsigned box_address(const array_map &m, uint32_t at) {
    return shared_address(at, m.box_bytes(), m.swizzle ? 1024 : 128);
}

/* ---- loads ---- */

struct load {
    box from;
    block *to;
    range at;
    barrier *counted;
};

std::vector<load> loads;

void make(const load &l) {
    read_box(l.from, *l.to, l.at.begin);
    complete_bytes(*l.counted, l.from.map.box_bytes());
}

void issue(block &to, const box &from, unsigned address, unsigned counted) {
    const range at = {address, address + from.map.box_bytes()};
    if (!to.live)
        broken("a copy to block %u, which is over", to.rank);
    check_free(to, at, LOADS | READS | BARRIERS, "tma_load");
    check_fenced(to, at, "tma_load");
    const load l = {from, &to, at, &barrier_of(to, counted)};
    if (at_once(LOAD))
        make(l);
    else
        loads.push_back(l);
}

/* ---- stores ---- */

struct store {
    box to;
    const thread *by;
    unsigned group;
    range at;
    bool read, written, waited;
    std::vector<char> bytes;
};

std::list<store> stores;
std::vector<thread *> waiting;                          /* for their stores' sources to be read */
std::set<std::tuple<const char *, int, int, int>> sent; /* boxes of this grid */

void read(store &s) {
    if (!s.read)
        s.bytes = gather(s.to.map, *s.by->in, s.at.begin);
    s.read = true;
}

void write(store &s) {
    read(s);
    if (!s.written)
        write_box(s.to, s.bytes);
    s.written = true;
}

/* What `t` waits for: the sources of its groups up to the one it names. */
void end_wait(thread &t) {
    const unsigned target = t.on.target;
    const bool complete = t.on.detail;
    for (auto s = stores.begin(); s != stores.end();) {
        if (s->by == &t && s->group < target) {
            read(*s);
            if (complete)
                write(*s);
            s->waited = true;
        }
        s = s->waited && s->written ? stores.erase(s) : std::next(s);
    }
    t.stores_waited = target;
}

} // namespace

namespace hopper {

bool load_one(void) {
    if (loads.empty())
        return false;
    const size_t i = chance() % loads.size();
    const load l = loads[i];
    loads.erase(loads.begin() + (long)i);
    make(l);
    return true;
}

bool store_for_wait(void) {
    if (waiting.empty())
        return false;
    const size_t i = chance() % waiting.size();
    thread &t = *waiting[i];
    waiting.erase(waiting.begin() + (long)i);
    end_wait(t);
    return true;
}

void store_some(void) {
    for (store &s : stores)
        if (chance() % 4 == 0)
            chance() % 2 ? read(s) : write(s);
}

void store_rest(void) {
    for (store &s : stores)
        write(s);
    stores.clear();
    sent.clear();
}

bool load_pending(const block &b, range r) {
    for (const load &l : loads)
        if (l.to == &b && l.at.meets(r))
            return true;
    return false;
}

bool store_pending(const block &b, range r) {
    for (const store &s : stores)
        if (!s.waited && s.by->in == &b && s.at.meets(r))
            return true;
    return false;
}

/* The writes may come later. */
void end_stores(const thread &t) {
    if (t.stores_open || t.stores_waited < t.stores_committed)
        broken("a thread is over before its stores have read their sources");
    for (store &s : stores)
        if (s.by == &t)
            s.by = nullptr;
}

void check_loads(const block &b) {
    if (load_pending(b, b.all()))
        broken("block %u is over before all copies to it have come", b.rank);
}

} // namespace hopper

void tma_prefetch(const CUtensorMap *map) {
    opened(map);
}

void tma_load(uint32_t dst, const CUtensorMap *map, uint32_t counted, int x, int y, int z) {
    const array_map m = opened(map);
    issue(*running->in, {m, x, y, z}, box_address(m, dst), shared_address(counted, 8, 8));
    may_yield();
}

void tma_load_to_all(uint32_t dst, const CUtensorMap *map, uint32_t counted, int x, int y, int z) {
    const array_map m = opened(map);
    for (block &to : blocks)
        issue(to, {m, x, y, z}, box_address(m, dst), shared_address(counted, 8, 8));
    may_yield();
}

void tma_store(const CUtensorMap *map, uint32_t src, int x, int y, int z) {
    const array_map m = opened(map);
    const unsigned address = box_address(m, src);
    const range at = {address, address + m.box_bytes()};
    check_free(*running->in, at, LOADS | BARRIERS, "tma_store");
    check_fenced(*running->in, at, "tma_store");
    if (!sent.insert({m.memory, x, y, z}).second)
        broken("a second tma_store to (%d, %d, %d) in one grid: nothing orders the two", x, y, z);
    stores.push_back(
        {{m, x, y, z}, running, running->stores_committed, at, false, false, false, {}});
    running->stores_open = true;
    if (at_once(STORE))
        write(stores.back());
    may_yield();
}

void tma_commit(void) {
    running->stores_committed++;
    running->stores_open = false;
}

void emulated_tma_wait(unsigned left, bool complete) {
    thread &t = *running;
    if (t.stores_committed <= left)
        return;
    const unsigned target = t.stores_committed - left;
    /* Those that were waited for may still have to be complete. */
    if (complete)
        t.stores_waited = 0;
    if (t.stores_waited >= target)
        return;
    waiting.push_back(&t);
    wait_until({&t.stores_waited, target, "tma_wait for %u groups", target, complete});
}
