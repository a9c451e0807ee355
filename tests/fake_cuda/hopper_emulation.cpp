/* hopper_emulation.cpp - runs the clusters of a grid one after the other, so that one which waits
 * for a later one never ends, and the threads of a cluster's blocks by turns, each until it has to
 * wait. By environment: FAKE_HOPPER_SEED, as fake_hopper_seed. */
#include "hopper_machine.h"

#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <string>

#include <sys/mman.h>

#include "fake.h"

using namespace hopper;

namespace hopper {

block blocks[CLUSTER];
thread *running;

} // namespace hopper

namespace {

const unsigned MOST_THREADS = CLUSTER * 1024, IDLE_ROUNDS = 100000;
const size_t STACK = 64 << 10, PAGE = 4096;

thread threads[MOST_THREADS];
unsigned thread_count, cluster;
stack_top scheduler;
const std::function<void()> *body;
meeting all_of_cluster;

/* ---- policy ---- */

enum when { LATE, EARLY, EITHER };
when policy[KINDS];
unsigned long random_state;
bool random_order, seeded;

void choose(unsigned seed) {
    seeded = true;
    random_order = seed > 1;
    random_state = seed;
    for (when &w : policy)
        w = seed == 1 ? EARLY : LATE;
}

/* With a seed, each kind is late, early or either for a cluster. */
void choose_for_cluster() {
    const char *text = getenv("FAKE_HOPPER_SEED");
    if (!seeded)
        choose(text ? (unsigned)atol(text) : 0);
    if (random_order)
        for (when &w : policy)
            w = (when)(chance() % 3);
}

} // namespace

namespace hopper {

unsigned chance(void) {
    if (!random_order)
        return 0;
    random_state = random_state * 6364136223846793005UL + 1442695040888963407UL;
    return (unsigned)(random_state >> 33);
}

bool at_once(kind k) {
    return policy[k] == EARLY || (policy[k] == EITHER && chance() % 4 == 0);
}

/* ---- turns ---- */

void broken(const char *format, ...) {
    va_list list;
    va_start(list, format);
    fprintf(stderr, "hopper emulation: ");
    if (running)
        fprintf(stderr, "cluster %u, block %u, thread %u: ", cluster, running->in->rank,
                running->index);
    vfprintf(stderr, format, list);
    fprintf(stderr, "\n");
    va_end(list);
    abort();
}

static void leave(void) {
    running->context.to(scheduler);
}

void may_yield(void) {
    if (random_order && chance() % 16 == 0)
        leave();
}

static bool over(const wait &w) {
    return !w.counter || (int)(*w.counter - w.target) >= 0;
}

void wait_until(wait w) {
    if (over(w))
        return;
    running->on = w;
    leave();
}

static void end_meeting(meeting &m) {
    m.arrived = 0;
    m.phase++;
}

static std::string text(const wait &w) {
    char line[100];
    snprintf(line, sizeof line, w.format, w.where, w.detail);
    return line;
}

void meet(meeting &m, unsigned expected, const char *format, unsigned where) {
    if (m.arrived && m.expected != expected)
        broken("%s of %u threads and of %u", text({nullptr, 0, format, where, 0}).c_str(),
               m.expected, expected);
    m.expected = expected;
    const unsigned phase = m.phase;
    if (++m.arrived == expected)
        end_meeting(m);
    wait_until({&m.phase, phase + 1, format, where, 0});
}

} // namespace hopper

namespace {

/* ---- threads ---- */

/* The lowest page of a stack is out of bounds. */
char *stack_of(unsigned i) {
    static char *all;
    if (!all)
        all = (char *)mmap(nullptr, MOST_THREADS * STACK, PROT_NONE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (all == MAP_FAILED)
        broken("no address space for stacks");
    return all + i * STACK;
}

unsigned live() {
    return blocks[0].live + blocks[1].live;
}

void end_thread() {
    thread &t = *running;
    end_stores(t);
    t.done = true;
    if (--t.in->live == 0) {
        check_loads(*t.in);
        check_products(*t.in);
    }
    all_of_cluster.expected--;
    if (all_of_cluster.arrived && all_of_cluster.arrived == live())
        end_meeting(all_of_cluster);
}

void enter() {
    (*body)();
    end_thread();
    leave();
}

/* Tops that are a multiple of 64 KiB apart would share a few lines of a cache. */
void start(thread &t, block &in, unsigned index) {
    static unsigned mapped;
    const unsigned i = (unsigned)(&t - threads);
    t = thread();
    t.in = &in;
    t.index = index;
    if (i >= mapped) {
        mprotect(stack_of(i) + PAGE, STACK - PAGE, PROT_READ | PROT_WRITE);
        mapped = i + 1;
    }
    t.context.prepare(stack_of(i), STACK - i % 32 * 192, enter);
}

void resume(thread &t) {
    running = &t;
    t.on = wait();
    t.polls = false;
    blockIdx.x = cluster * CLUSTER + t.in->rank;
    threadIdx.x = t.index;
    scheduler.to(t.context);
    running = nullptr;
}

/* ---- a cluster ---- */

void start_block(block &b, unsigned rank, unsigned count, unsigned bytes) {
    if (!b.memory)
        b.memory = (char *)aligned_alloc(1024, MOST_SHARED);
    b.rank = rank;
    b.threads = b.live = count;
    b.bytes = bytes;
    b.first = threads + rank * count;
    memset(b.memory, 0xff, bytes); /* NaN in any dtype */
    b.barriers.clear();
    b.marks.assign((bytes + CHUNK - 1) / CHUNK, mark());
    b.warps.assign((count + WARP - 1) / WARP, warp());
    b.groups.assign(count / GROUP, group());
    b.registers.assign(count / GROUP, 0);
    for (meeting &m : b.named)
        m = meeting();
    for (unsigned i = 0; i < count; i++)
        start(b.first[i], b, i);
}

/* With a seed, warps may stay behind for a while. */
void put_to_sleep() {
    for (block &b : blocks)
        for (warp &w : b.warps)
            if (w.sleep)
                w.sleep--;
            else if (chance() % 16 == 1)
                w.sleep = 1 + chance() % 32;
}

struct outcome {
    bool went_on = false, slept = false, polled = false;
};

outcome run_round() {
    outcome o;
    put_to_sleep();
    unsigned i = chance() % thread_count, step = 1 + chance() % thread_count;
    while (std::gcd(step, thread_count) != 1)
        step++;
    for (unsigned n = 0; n < thread_count; n++, i = (i + step) % thread_count) {
        thread &t = threads[i];
        if (t.done || !over(t.on))
            continue;
        if (t.of_warp().sleep) {
            o.slept = true;
            continue;
        }
        resume(t);
        o.polled = o.polled || t.polls;
        o.went_on = o.went_on || !t.polls;
    }
    return o;
}

/* Something that is pending happens: what waits are for last, as each of them is latest then. */
bool run_pending() {
    return multiply_for_wait() || store_for_wait() || load_one();
}

void run_some() {
    if (policy[LOAD] != LATE && chance() % 4 == 0)
        load_one();
    if (policy[STORE] != LATE)
        store_some();
    if (policy[PRODUCT] != LATE)
        multiply_some();
}

[[noreturn]] void deadlock() {
    std::map<std::string, unsigned> waits[CLUSTER];
    for (unsigned i = 0; i < thread_count; i++)
        if (!threads[i].done)
            waits[threads[i].in->rank][text(threads[i].on)]++;
    fprintf(stderr, "hopper emulation: cluster %u waits for ever:\n", cluster);
    for (const block &b : blocks)
        for (const auto &w : waits[b.rank])
            fprintf(stderr, "  block %u: %u threads at %s\n", b.rank, w.second, w.first.c_str());
    abort();
}

void run_cluster() {
    unsigned idle = 0;
    while (live()) {
        if (random_order)
            run_some();
        const outcome o = run_round();
        if (o.went_on || (!o.slept && run_pending()))
            idle = 0;
        else if (live() && ((!o.polled && !o.slept) || ++idle == IDLE_ROUNDS))
            deadlock();
    }
}

void run_grid(unsigned clusters, unsigned count, unsigned bytes) {
    blockDim = dim3(count);
    gridDim = dim3(CLUSTER * clusters);
    blockIdx = threadIdx = {0, 0, 0};
    thread_count = CLUSTER * count;
    for (cluster = 0; cluster < clusters; cluster++) {
        choose_for_cluster();
        all_of_cluster = meeting();
        for (unsigned rank = 0; rank < CLUSTER; rank++)
            start_block(blocks[rank], rank, count, bytes);
        run_cluster();
    }
    store_rest();
}

} // namespace

bool hopper_runs(void) {
    return running;
}

void fake_hopper_seed(unsigned seed) {
    choose(seed);
}

/* The kernels are made for sm_90a alone. */
static std::atomic<long> launches{0};

long fake_hopper_launches(void) {
    return launches;
}

cudaError_t emulated_clusters(cudaStream_t stream, unsigned clusters, unsigned count,
                              size_t parameter_bytes, size_t shared_bytes,
                              std::function<void()> thread) {
    const char *sm = getenv("FAKE_CUDA_SM");
    if (fake_fails())
        return cudaErrorLaunchFailure;
    if (sm && *sm && atol(sm) != 90)
        return cudaErrorNoKernelImageForDevice;
    if (shared_bytes > MOST_SHARED || parameter_bytes > 4096)
        return cudaErrorInvalidValue;
    if (!clusters || clusters > 0x7fffffff / CLUSTER || !count || count > MOST_THREADS / CLUSTER)
        return cudaErrorInvalidConfiguration;
    launches++;
    return fake_enqueue(stream, [=] {
        body = &thread;
        run_grid(clusters, count, (unsigned)shared_bytes);
    });
}

/* ---- what threads call ---- */

unsigned cluster_rank(void) {
    return running->in->rank;
}

void cluster_sync(void) {
    if (running->inits_open)
        broken("cluster_sync after barrier_init without barrier_init_done");
    meet(all_of_cluster, live(), "cluster_sync", 0);
}

void named_barrier(unsigned barrier, unsigned count) {
    if (barrier >= NAMED || !count || count > running->in->threads ||
        (count % WARP && count != running->in->threads))
        broken("named_barrier %u of %u threads", barrier, count);
    meet(running->in->named[barrier], count, "named_barrier %u", barrier);
    may_yield();
}

/* As many as there are have to do for all groups, once each has said how many it wants. */
void emulated_registers(unsigned registers) {
    block &b = *running->in;
    const unsigned index = running->index / GROUP;
    if (index >= b.registers.size())
        return;
    b.registers[index] = registers;
    unsigned sum = 0;
    for (unsigned r : b.registers) {
        if (!r)
            return;
        sum += GROUP * r;
    }
    if (sum > 65536)
        broken("the groups of a block want %u registers of 65536", sum);
}

void store_release(unsigned *to, unsigned x) {
    __atomic_store_n(to, x, __ATOMIC_RELEASE);
    may_yield();
}

unsigned load_acquire(const unsigned *from) {
    running->polls = true;
    running->on.format = "load_acquire";
    leave();
    return __atomic_load_n(from, __ATOMIC_ACQUIRE);
}
