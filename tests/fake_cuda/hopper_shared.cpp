/* hopper_shared.cpp - shared memory of the emulated cluster: who may touch it when, the barriers
 * in it, what threads write to it themselves. */
#include "hopper_machine.h"

#include <cstring>

#include "fake.h"

using namespace hopper;

namespace hopper {

long conflicts;

unsigned shared_address(uint32_t at, unsigned bytes, unsigned alignment) {
    const block &b = *running->in;
    const unsigned address = at & ((1u << RANK_BIT) - 1);
    if (at >> RANK_BIT != b.rank)
        broken("address %#x is not of this block", at);
    if (address < b.all().begin || address + bytes > b.all().end)
        broken("%u bytes at %#x are outside of shared memory", bytes, at);
    if (address % alignment)
        broken("address %#x is no multiple of %u", at, alignment);
    return address;
}

static bool has_barrier(const block &b, range r) {
    const auto next = b.barriers.lower_bound(r.begin < 7 ? 0 : r.begin - 7);
    return next != b.barriers.end() && next->first < r.end;
}

void check_free(const block &b, range r, unsigned of, const char *access) {
    const char *by = nullptr;
    if (of & LOADS && load_pending(b, r))
        by = "a copy is still to come there";
    else if (of & READS && store_pending(b, r))
        by = "a copy from there has not been waited for";
    else if (of & READS && product_pending(b, r))
        by = "a product of what is there has not been waited for";
    else if (of & BARRIERS && has_barrier(b, r))
        by = "a barrier is there";
    if (by)
        broken("%s of +%#x to +%#x of block %u: %s", access, r.begin - BASE, r.end - BASE, b.rank,
               by);
}

/* ---- what threads have written, and not fenced ---- */

void check_fenced(const block &b, range r, const char *access) {
    for (unsigned i = (r.begin - BASE) / CHUNK; i < (r.end - BASE + CHUNK - 1) / CHUNK; i++) {
        const mark &m = b.marks[i];
        if (m.writer && b.first[m.writer - 1].fences == m.fences)
            broken("%s of +%#x, which thread %u wrote without fence_for_tma", access, i * CHUNK,
                   m.writer - 1);
    }
}

static void write(block &b, range r, const void *from, unsigned index) {
    check_free(b, r, LOADS | READS | BARRIERS, "a write");
    memcpy(b.at(r.begin), from, r.end - r.begin);
    b.marks[(r.begin - BASE) / CHUNK] = {index + 1, b.first[index].fences};
}

/* ---- barriers ---- */

barrier &barrier_of(block &b, unsigned address) {
    const auto found = b.barriers.find(address);
    if (found == b.barriers.end())
        broken("no barrier was made at +%#x of block %u", address - BASE, b.rank);
    return found->second;
}

static void end_phase(barrier &b) {
    if (b.pending || b.bytes)
        return;
    b.pending = b.count;
    b.phase++;
}

void complete_bytes(barrier &b, unsigned bytes) {
    b.bytes -= bytes;
    if (b.bytes <= -(1 << 20))
        broken("a barrier has got more bytes than it can count");
    end_phase(b);
}

static void arrive(block &b, unsigned address, unsigned bytes) {
    barrier &x = barrier_of(b, address);
    if (!x.pending)
        broken("more than %u arrivals at barrier +%#x of block %u", x.count, address - BASE,
               b.rank);
    x.bytes += bytes;
    if (x.bytes >= 1 << 20)
        broken("a barrier is to expect more bytes than it can count");
    x.pending--;
    end_phase(x);
}

} // namespace hopper

void barrier_init(uint32_t at, unsigned arrivals) {
    const unsigned address = shared_address(at, 8, 8);
    block &b = *running->in;
    if (!arrivals || arrivals >= 1 << 20)
        broken("a barrier of %u arrivals", arrivals);
    check_free(b, {address, address + 8}, LOADS | READS | BARRIERS, "barrier_init");
    b.barriers[address] = {arrivals, arrivals, 0, 0};
    running->inits_open = true;
}

void barrier_init_done(void) {
    running->inits_open = false;
}

void barrier_expect(uint32_t at, unsigned bytes) {
    arrive(*running->in, shared_address(at, 8, 8), bytes);
    may_yield();
}

void barrier_arrive_at(uint32_t at, unsigned rank) {
    const unsigned address = shared_address(at, 8, 8);
    if (rank >= CLUSTER || !blocks[rank].live)
        broken("an arrival at barrier +%#x of block %u, which is %s", address - BASE, rank,
               rank < CLUSTER ? "over" : "none of this cluster");
    arrive(blocks[rank], address, 0);
    may_yield();
}

void barrier_wait(uint32_t at, unsigned parity) {
    const unsigned address = shared_address(at, 8, 8);
    const barrier &b = barrier_of(*running->in, address);
    if (parity > 1)
        broken("barrier_wait for parity %u", parity);
    const unsigned phase = b.phase;
    if (phase % 2 == parity) {
        wait_until({&b.phase, phase + 1, "barrier +%#x parity %u", address - BASE, parity});
        if (b.phase != phase + 1)
            broken("a phase of barrier +%#x was over before who waited for the one before it had "
                   "seen that: where a warp waits, nobody may go on for it",
                   address - BASE);
    }
    may_yield();
}

/* ---- threads' own accesses ---- */

uint32_t dynamic_shared(void) {
    return (running->in->rank << RANK_BIT) + BASE;
}

void store_shared_half(uint32_t at, uint16_t x) {
    const unsigned address = shared_address(at, 2, 2);
    write(*running->in, {address, address + 2}, &x, running->index);
}

void fence_for_tma(void) {
    running->fences++;
}

/* Element (row, column) of a fragment is in lane 4 row + column / 2. */
static void store_row(block &b, const warp &w, unsigned fragment, unsigned row, unsigned first) {
    uint16_t elements[8];
    for (unsigned i = 0; i < 8; i++) {
        const unsigned r = w.turned ? i : row, c = w.turned ? row : i;
        elements[i] = (uint16_t)(w.f[4 * r + c / 2][fragment] >> 16 * (c % 2));
    }
    const unsigned lane = 8 * fragment + row;
    write(b, {w.at[lane], w.at[lane] + 16}, elements, first + lane);
}

static void store_warp(block &b, const warp &w, unsigned first) {
    for (unsigned fragment = 0; fragment < 4; fragment++) {
        unsigned banks = 0;
        for (unsigned row = 0; row < 8; row++) {
            store_row(b, w, fragment, row, first);
            banks |= 1u << (w.at[8 * fragment + row] >> 4 & 7);
        }
        conflicts += banks != 0xff;
    }
}

void emulated_fragments(uint32_t at, const uint32_t (&f)[4], bool turned) {
    warp &w = running->of_warp();
    const unsigned lane = running->index % WARP;
    if (w.stored.arrived && w.turned != turned)
        broken("store_fragments and store_fragments_turned in one warp");
    w.turned = turned;
    w.at[lane] = shared_address(at, 16, 16);
    memcpy(w.f[lane], f, sizeof f);
    if (w.stored.arrived == WARP - 1)
        store_warp(*running->in, w, running->index - lane);
    meet(w.stored, WARP, "store_fragments of warp %u", running->index / WARP);
}

long fake_hopper_conflicts(void) {
    return conflicts;
}
