/* hopper_wgmma.cpp - the emulated products of a group of four warps: operands as descriptors and
 * the 128-byte swizzle place them in shared memory, sums in the threads' own variables. A product
 * is made when its group waits for it, or before, as the policy has it: until then who reads the
 * sums reads what they were. */
#include "hopper_machine.h"

#include <cstring>

#include "dtype_bits.h"

using namespace hopper;

namespace {

enum { ROWS = 64, DEPTH = 16, MOST_COLUMNS = 256, SPAN = 64 };

/* ---- operands ---- */

/* K-major: 8 rows of 128 bytes are stride apart. Turned: 8 k of 64 elements are, and every 64
 * elements `leading` apart. */
operand decode(uint64_t bits, unsigned rows, bool turned) {
    const uint64_t used = 0x3fffull | 0x3fffull << 16 | 0x3fffull << 32 | 7ull << 49 | 3ull << 62;
    if (bits & ~used || bits >> 62 != 1 || bits >> 49 & 7)
        broken("descriptor %#llx: bits that are no part of it, no swizzle of 128 bytes, or a base",
               (unsigned long long)bits);
    const operand o = {(unsigned)(bits & 0x3fff) << 4, (unsigned)(bits >> 16 & 0x3fff) << 4,
                       (unsigned)(bits >> 32 & 0x3fff) << 4, rows, turned};
    if (o.start >> 7 & 7)
        broken("an operand at +%#x is in the midst of a swizzle", o.start - BASE);
    return o;
}

/* Calls for every 1024 bytes that hold a part of it. */
template <typename Call> void for_each_atom(const operand &o, Call call) {
    const unsigned start = o.start / 1024 * 1024;
    if (!o.turned)
        for (unsigned i = 0; i < o.rows / 8; i++)
            call(range{start + i * o.stride, start + i * o.stride + 1024});
    else
        for (unsigned i = 0; i < o.rows / 64 * 2; i++) {
            const unsigned at = start + i / 2 * o.leading + i % 2 * o.stride;
            call(range{at, at + 1024});
        }
}

bool reads(const operand &o, range r) {
    bool any = false;
    for_each_atom(o, [&](range atom) { any = any || atom.meets(r); });
    return any;
}

void check_operand(const block &b, const operand &o) {
    for_each_atom(o, [&](range atom) {
        if (atom.begin < b.all().begin || atom.end > b.all().end)
            broken("an operand's part at +%#x is outside of shared memory", atom.begin - BASE);
        check_free(b, atom, LOADS | BARRIERS, "wgmma");
        check_fenced(b, atom, "wgmma");
    });
}

/* 8 elements of an operand, `step` apart in `to`. */
void convert(const block &b, unsigned address, bool bf16, float *to, unsigned step) {
    uint16_t elements[8];
    memcpy(elements, b.at(swizzled(address)), sizeof elements);
    for (unsigned i = 0; i < 8; i++)
        to[i * step] = bf16 ? from_bf16(elements[i]) : from_fp16(elements[i]);
}

/* to[k][row]. */
void unpack(const block &b, const operand &o, bool bf16, float *to) {
    if (!o.turned)
        for (unsigned row = 0; row < o.rows; row++)
            for (unsigned k = 0; k < DEPTH; k += 8)
                convert(b, o.start + row / 8 * o.stride + row % 8 * 128 + k * 2, bf16,
                        to + k * o.rows + row, o.rows);
    else
        for (unsigned k = 0; k < DEPTH; k++)
            for (unsigned row = 0; row < o.rows; row += 8)
                convert(b,
                        o.start + row / 64 * o.leading + k / 8 * o.stride + k % 8 * 128 +
                            row % 64 * 2,
                        bf16, to + k * o.rows + row, 1);
}

/* ---- products ---- */

#if defined(__x86_64__) && defined(__linux__)
#define WIDE __attribute__((target_clones("avx2", "default")))
#else
#define WIDE
#endif

/* sums[column] += a[k][row] b[k][column], in the order of k. */
WIDE void multiply_row(float *sums, const float *a, const float *b, size_t columns) {
    for (size_t from = 0; from < columns; from += SPAN) {
        float s[SPAN];
        memcpy(s, sums + from, sizeof s);
        for (size_t k = 0; k < DEPTH; k++) {
            const float x = a[k * ROWS], *y = b + k * columns + from;
            for (size_t i = 0; i < SPAN; i++)
                s[i] += x * y[i];
        }
        memcpy(sums + from, s, sizeof s);
    }
}

/* A row's sums are those of four lanes, two of every eight columns each. */
template <typename Move> void for_each_sum(const product &p, unsigned row, Move move) {
    float *const *lanes = p.sums + row / 16 * WARP + row % 8 * 4;
    for (unsigned lane = 0; lane < 4; lane++) {
        float *d = lanes[lane] + row % 16 / 8 * 2;
        for (unsigned i = 0; i < p.form.columns / 8; i++)
            move(8 * i + 2 * lane, d + 4 * i);
    }
}

void multiply(const block &in, const product &p) {
    static float a[DEPTH * ROWS], b[DEPTH * MOST_COLUMNS];
    unpack(in, p.a, p.form.bf16, a);
    unpack(in, p.b, p.form.bf16, b);
    for (unsigned row = 0; row < ROWS; row++) {
        float sums[MOST_COLUMNS] = {};
        if (p.adds)
            for_each_sum(p, row, [&](unsigned at, float *d) { memcpy(sums + at, d, 8); });
        multiply_row(sums, a + row, b, p.form.columns);
        for_each_sum(p, row, [&](unsigned at, float *d) { memcpy(d, sums + at, 8); });
    }
}

void multiply_up_to(const block &in, group &g, unsigned end) {
    for (; g.executed < end; g.executed++)
        multiply(in, g.queue[g.executed - g.retired]);
}

unsigned ready(const group &g) {
    unsigned end = g.executed;
    while (end - g.retired < g.queue.size() && g.queue[end - g.retired].issued == GROUP)
        end++;
    return end;
}

void end_wait(const block &in, group &g) {
    const unsigned end = g.waits[g.waited];
    multiply_up_to(in, g, end);
    for (; g.retired < end; g.retired++)
        g.queue.pop_front();
    g.waited++;
}

bool waits(const group &g) {
    return g.waited < g.waits.size() && g.waiting[g.waited] == GROUP;
}

group &own_group(void) {
    const unsigned index = running->index / GROUP;
    if (index >= running->in->groups.size())
        broken("wgmma by a thread of no whole group");
    return running->in->groups[index];
}

} // namespace

namespace hopper {

bool multiply_for_wait(void) {
    for (block &b : blocks)
        for (group &g : b.groups)
            if (waits(g)) {
                end_wait(b, g);
                return true;
            }
    return false;
}

void multiply_some(void) {
    for (block &b : blocks)
        for (group &g : b.groups)
            if (chance() % 4 == 0 && ready(g) > g.executed)
                multiply_up_to(b, g, g.executed + 1);
            else if (chance() % 4 == 0 && waits(g))
                end_wait(b, g);
}

bool product_pending(const block &b, range r) {
    for (const group &g : b.groups)
        for (const product &p : g.queue)
            if (reads(p.a, r) || reads(p.b, r))
                return true;
    return false;
}

void check_products(const block &b) {
    for (const group &g : b.groups)
        if (!g.queue.empty())
            broken("block %u is over before all its products have been waited for", b.rank);
}

} // namespace hopper

void wgmma_fence(void) {
    running->sums_fenced = true;
}

static bool same(const product &p, uint64_t a, uint64_t b, bool adds, product_form f) {
    return p.a_bits == a && p.b_bits == b && p.adds == adds && p.form.bf16 == f.bf16 &&
           p.form.a_turned == f.a_turned && p.form.b_turned == f.b_turned &&
           p.form.columns == f.columns;
}

void emulated_wgmma(float *d, uint64_t a, uint64_t b, bool adds, product_form form) {
    group &g = own_group();
    block &in = *running->in;
    if (!running->sums_fenced)
        broken("wgmma without a wgmma_fence before it");
    const unsigned number = running->products++ - g.retired;
    if (number == g.queue.size()) {
        g.queue.push_back({a,
                           b,
                           decode(a, ROWS, form.a_turned),
                           decode(b, form.columns, form.b_turned),
                           form,
                           adds,
                           0,
                           {}});
        check_operand(in, g.queue.back().a);
        check_operand(in, g.queue.back().b);
    }
    product &p = g.queue[number];
    if (!same(p, a, b, adds, form))
        broken("a group's threads have different operands for one wgmma");
    p.sums[running->index % GROUP] = d;
    p.issued++;
    if (p.issued == GROUP && at_once(PRODUCT))
        multiply_up_to(in, g, ready(g));
}

void wgmma_commit(void) {
    group &g = own_group();
    if (running->commits == g.commits.size())
        g.commits.push_back(running->products);
    if (g.commits[running->commits++] != running->products)
        broken("a group's threads commit different products");
    may_yield();
}

void emulated_wgmma_wait(unsigned left) {
    group &g = own_group();
    thread &t = *running;
    unsigned end = t.commits > left ? g.commits[t.commits - left - 1] : 0;
    if (t.waits == g.waits.size()) {
        g.waits.push_back(end);
        g.waiting.push_back(0);
    }
    if (g.waits[t.waits] != end)
        broken("a group's threads wait for different products");
    g.waiting[t.waits++]++;
    wait_until({&g.waited, t.waits, "wgmma_wait of group %u", t.index / GROUP, left});
    if (!left)
        t.sums_fenced = false;
}
