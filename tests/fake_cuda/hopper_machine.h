/* hopper_machine.h - the two blocks of a cluster while they are run: what the files of the
 * emulation of sm_90a share. hopper_emulation.cpp gives its threads turns, hopper_shared.cpp has
 * shared memory and its barriers, hopper_tma.cpp the copies of boxes, hopper_wgmma.cpp products.
 * A copy or a product that is asynchronous is made at a time that a policy chooses. */
#ifndef HOPPER_MACHINE_H
#define HOPPER_MACHINE_H

#include <cuda.h>
#include <deque>
#include <map>
#include <vector>

#include "fibers.h"
#include "kernels/cuda_hopper.cuh"

/* True in a thread of a cluster. */
bool hopper_runs(void);

namespace hopper {

/* A block's shared memory is addressed from BASE on, in the 18 bits that descriptors have; the
 * bits from RANK_BIT on name the block. */
enum { WARP = 32, BASE = 1024, MOST_SHARED = 232448, RANK_BIT = 24, CHUNK = 16, NAMED = 16 };

/* Of addresses within a block. */
struct range {
    unsigned begin, end;
    bool meets(range r) const {
        return begin < r.end && r.begin < end;
    }
};

struct barrier {
    unsigned count, pending; /* arrivals */
    long bytes;              /* that are still to come */
    unsigned phase;
};

/* Threads that wait for each other, and how often they have. */
struct meeting {
    unsigned expected = 0, arrived = 0, phase = 0;
};

/* Who has written 16 bytes last, and how many fences it had made by then. */
struct mark {
    unsigned writer, fences; /* writer: 1 more than the thread's index; 0: nobody */
};

struct warp {
    meeting stored; /* fragments: what its lanes have brought so far */
    uint32_t at[WARP], f[WARP][4];
    bool turned;
    unsigned sleep = 0; /* rounds */
};

struct operand {
    unsigned start, leading, stride, rows;
    bool turned;
};

struct product {
    uint64_t a_bits, b_bits;
    operand a, b;
    product_form form;
    bool adds;
    unsigned issued = 0;
    float *sums[GROUP];
};

/* Products in the order they were issued in; counts are from the start of the block. */
struct group {
    std::deque<product> queue;            /* those no wait has covered, from number `retired` on */
    unsigned retired = 0, executed = 0;   /* products */
    std::vector<unsigned> commits;        /* products up to each of them */
    std::vector<unsigned> waits, waiting; /* what each waits for, threads that have come to it */
    unsigned waited = 0;
};

struct thread;

struct block {
    unsigned rank, threads, live, bytes;
    char *memory;  /* what BASE addresses is its start */
    thread *first; /* of its threads, which lie one after the other */
    std::map<unsigned, barrier> barriers;
    std::vector<mark> marks;
    std::vector<warp> warps;
    std::vector<group> groups;
    std::vector<unsigned> registers; /* of a thread of each group; 0: as at the start */
    meeting named[NAMED];
    char *at(unsigned address) const {
        return memory + (address - BASE);
    }
    range all() const {
        return {BASE, BASE + bytes};
    }
};

/* Until *counter has come to `target`. */
struct wait {
    const unsigned *counter = nullptr;
    unsigned target = 0;
    const char *format = "nothing"; /* for the two numbers */
    unsigned where = 0, detail = 0;
};

struct thread {
    block *in;
    unsigned index;
    stack_top context;
    bool done = false, polls = false;
    wait on;
    unsigned fences = 0;
    bool inits_open = false;  /* barriers it has made are not known to others yet */
    bool sums_fenced = false; /* its registers, for products */
    unsigned products = 0, commits = 0, waits = 0;
    unsigned stores_committed = 0, stores_waited = 0; /* groups */
    bool stores_open = false;                         /* some are in no group yet */
    warp &of_warp() {
        return in->warps[index / WARP];
    }
};

extern block blocks[CLUSTER];
extern thread *running;
extern long conflicts;

/* Ends the program. */
[[noreturn]] void broken(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* ---- turns ---- */

void wait_until(wait w);
/* Comes to the meeting, and waits for the others there. */
void meet(meeting &m, unsigned expected, const char *format, unsigned where);
/* Where another thread may as well go on. */
void may_yield(void);

/* ---- policy ---- */

enum kind { LOAD, STORE, PRODUCT, KINDS };
/* If what is issued now happens now. */
bool at_once(kind k);
/* A random number; 0 where the policy leaves nothing to chance. */
unsigned chance(void);

/* One step of what is pending, if there is any: of what somebody waits for, but for loads. */
bool load_one(void);
bool store_for_wait(void);
bool multiply_for_wait(void);
/* Of what nobody need wait for yet. */
void store_some(void);
void multiply_some(void);
/* All that is left at the end of a grid. */
void store_rest(void);

/* ---- shared memory ---- */

/* The address within the running thread's block; `bytes` from it on are there. */
unsigned shared_address(uint32_t at, unsigned bytes, unsigned alignment);
barrier &barrier_of(block &b, unsigned address);
void complete_bytes(barrier &b, unsigned bytes);
/* Ends the program if a pending copy or product, or a barrier, is in the way of an access. */
enum { LOADS = 1, READS = 2, BARRIERS = 4 };
void check_free(const block &b, range r, unsigned of, const char *access);
void check_fenced(const block &b, range r, const char *access);

bool load_pending(const block &b, range r);
bool store_pending(const block &b, range r);
bool product_pending(const block &b, range r);

/* ---- what must be over when a thread or a block ends ---- */

void end_stores(const thread &t);
void check_loads(const block &b);
void check_products(const block &b);

/* With 128 bytes a row, 16 at a time, by the row's number. */
static inline unsigned swizzled(unsigned address) {
    return address ^ (address >> 3 & 0x70);
}

} // namespace hopper

#endif
