/* fake_cuda.cpp - the calls of the CUDA runtime that the backend makes. Device memory is a window
 * that faults when the host touches it. By environment: FAKE_CUDA_DEVICES (1), FAKE_CUDA_DRIVER=0
 * (none), FAKE_CUDA_MEMORY (bytes), FAKE_CUDA_SM (90), FAKE_CUDA_SEED,
 * FAKE_CUDA_PROTECT=0 (no faults). */
#include "fake.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "cuda_emulation.h"

namespace {

[[noreturn]] void die(const char *what) {
    fprintf(stderr, "fake CUDA: %s\n", what);
    abort();
}

double now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

long number(const char *name, long otherwise) {
    const char *text = getenv(name);
    return text && *text ? atol(text) : otherwise;
}

std::recursive_mutex lock;
thread_local int depth; /* of the lock, in this thread */

struct guard {
    explicit guard(std::recursive_mutex &m) : mutex(m) {
        mutex.lock();
        depth++;
    }
    ~guard() {
        depth--;
        mutex.unlock();
    }
    std::recursive_mutex &mutex;
};

struct stream {
    int device;
    std::deque<std::function<void()>> queue;
    size_t done = 0, given = 0; /* operations, in all */
    bool running = false;
    std::thread::id runner; /* while it runs */
    size_t asked = 0;       /* what somebody wants to be done */
    bool worked = false;    /* a thread is at it */
    bool issuing = false;   /* NCCL has not taken its operation yet */
    bool capturing = false;
    std::thread::id capturer;
    std::vector<std::function<void(stream *)>> captured;
};

struct event {
    stream *on = nullptr; /* NULL: never recorded */
    size_t at = 0;        /* passed once this many of its operations are done */
    double time = 0.0;
};

struct graph {
    std::vector<std::function<void(stream *)>> nodes; /* each enqueues itself */
};

std::set<stream *> streams;
stream *of(cudaStream_t given);
thread_local int current_device = 0;
std::atomic<int> live{0};
std::atomic<long> calls{0}, fail_at{0}, waits{0}, allocations{0};
unsigned long random_state = 0;

unsigned chance() {
    random_state = random_state * 6364136223846793005UL + 1442695040888963407UL;
    return (unsigned)(random_state >> 33);
}

/* ---- memory ---- */

const size_t WINDOW = (size_t)64 << 30, GUARD = 256, PAGE = 4096;
char *window;
size_t window_used, bytes_used;
struct block {
    size_t bytes;
    int device;
};
std::map<char *, block> blocks;
std::map<size_t, std::vector<char *>> free_blocks; /* by the room they take */
std::map<char *, size_t> pinned;
int touching;

bool protects() {
    static const bool yes = number("FAKE_CUDA_PROTECT", 1) != 0;
    return yes;
}

void open_window() {
    if (window)
        return;
    void *at = mmap(nullptr, WINDOW, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED)
        die("no address space");
    madvise(at, WINDOW, MADV_NOHUGEPAGE); /* blocks are small, and given back often */
    window = (char *)at;
}

bool on_device(const void *p) {
    return window && (const char *)p >= window && (const char *)p < window + WINDOW;
}

bool is_pinned(const void *p) {
    auto it = pinned.upper_bound((char *)p);
    if (it == pinned.begin())
        return false;
    --it;
    return (const char *)p < it->first + it->second;
}

void check_guards(char *at, size_t bytes) {
    for (size_t i = 0; i < GUARD; i++)
        if ((unsigned char)at[-1 - (long)i] != 0xa5 || (unsigned char)at[bytes + i] != 0xa5)
            die("device memory was written outside of a block");
}

} // namespace

void fake_touch_begin(void) {
    guard g(lock);
    if (touching++ == 0 && window_used && protects())
        mprotect(window, window_used, PROT_READ | PROT_WRITE);
}

void fake_touch_end(void) {
    guard g(lock);
    if (--touching == 0 && window_used && protects())
        mprotect(window, window_used, PROT_NONE);
}

bool fake_fails(void) {
    const long n = ++calls;
    return fail_at && n == fail_at;
}

void fake_count(int change) {
    live += change;
}

void fake_cuda_fail_at(long n) {
    fail_at = n ? calls + n : 0;
}
long fake_cuda_calls(void) {
    return calls;
}
int fake_cuda_live(void) {
    return live;
}
size_t fake_cuda_bytes(void) {
    guard g(lock);
    return bytes_used;
}
long fake_cuda_waits(void) {
    return waits;
}
long fake_cuda_allocations(void) {
    return allocations;
}
void fake_cuda_seed(unsigned seed) {
    random_state = seed;
}

#define MAY_FAIL(code)                                                                             \
    do {                                                                                           \
        if (fake_fails())                                                                          \
            return code;                                                                           \
    } while (0)

/* ---- streams ---- */

namespace {

/* A stream that waits for one that waits for it would never end. */
void run_until(stream *s, size_t end) {
    while (s->running && s->runner != std::this_thread::get_id() && s->done < end)
        fake_let_others(50);
    if (s->running || s->done >= end)
        return;
    s->running = true;
    s->runner = std::this_thread::get_id();
    fake_touch_begin();
    while (s->done < end) {
        std::function<void()> run = std::move(s->queue.front());
        s->queue.pop_front();
        run();
        s->done++;
    }
    fake_touch_end();
    s->running = false;
}

void work(stream *s) {
    guard g(lock);
    while (s->done < s->asked)
        run_until(s, s->asked);
    s->worked = false;
}

/* Sooner or later, in a thread, which may wait for other ranks. */
void ask(stream *s, size_t end) {
    s->asked = s->asked > end ? s->asked : end;
    if (!s->worked) {
        s->worked = true;
        std::thread(work, s).detach();
    }
}

void maybe_run() {
    if (!random_state || streams.empty() || chance() % 4)
        return;
    auto it = streams.begin();
    std::advance(it, chance() % streams.size());
    if ((*it)->done < (*it)->given)
        ask(*it, (*it)->done + 1 + chance() % ((*it)->given - (*it)->done));
}

cudaError_t enqueue(stream *s, std::function<void()> run) {
    if (s->issuing)
        die("a call on a stream before NCCL has taken what came before");
    s->queue.push_back(std::move(run));
    s->given++;
    maybe_run();
    return cudaSuccess;
}

void run_device() {
    const std::vector<stream *> all(streams.begin(), streams.end());
    for (stream *s : all)
        if (s->device == current_device)
            run_until(s, s->given);
}

bool any_capture() {
    for (stream *s : streams)
        if (s->capturing && s->capturer == std::this_thread::get_id())
            return true;
    return false;
}

} // namespace

/* NULL is the default stream. */
static stream *default_streams[16];
namespace {
stream *of(cudaStream_t given) {
    if (given)
        return (stream *)given;
    stream *&s = default_streams[current_device];
    if (!s) {
        s = new stream;
        s->device = current_device;
        streams.insert(s);
    }
    return s;
}
} // namespace

void fake_let_others(unsigned microseconds) {
    const int held = depth;
    for (depth = 0; depth > -held; depth--)
        lock.unlock();
    depth = 0;
    usleep(microseconds);
    for (; depth < held; depth++)
        lock.lock();
}

void fake_issuing(cudaStream_t given, bool issuing) {
    guard g(lock);
    of(given)->issuing = issuing;
}

size_t fake_given(cudaStream_t given) {
    guard g(lock);
    return of(given)->given;
}

void fake_run_until(cudaStream_t given, size_t end) {
    guard g(lock);
    run_until(of(given), end);
}

cudaError_t fake_enqueue(cudaStream_t given, std::function<void()> run) {
    guard g(lock);
    stream *s = of(given);
    if (!streams.count(s))
        return cudaErrorInvalidResourceHandle;
    if (s->device != current_device)
        return cudaErrorInvalidResourceHandle;
    if (!s->capturing)
        return enqueue(s, std::move(run));
    s->captured.push_back([run](stream *to) { enqueue(to, run); });
    return cudaSuccess;
}

void fake_run_all(cudaStream_t given) {
    guard g(lock);
    stream *s = of(given);
    run_until(s, s->given);
}

static void wait_for_worker(stream *s) {
    while (s->worked)
        fake_let_others(50);
}

extern "C" {

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *out, unsigned, int) {
    MAY_FAIL(cudaErrorMemoryAllocation);
    guard g(lock);
    if (!random_state)
        random_state = (unsigned long)number("FAKE_CUDA_SEED", 0);
    stream *s = new stream;
    s->device = current_device;
    streams.insert(s);
    fake_count(1);
    *out = (cudaStream_t)s;
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *out, unsigned flags) {
    return cudaStreamCreateWithPriority(out, flags, 0);
}

cudaError_t cudaStreamDestroy(cudaStream_t given) {
    guard g(lock);
    stream *s = of(given);
    if (!given || !streams.count(s))
        return cudaErrorInvalidResourceHandle;
    wait_for_worker(s);
    run_until(s, s->given);
    streams.erase(s);
    fake_count(-1); /* its memory stays, for events on it */
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t given) {
    MAY_FAIL(cudaErrorLaunchFailure);
    guard g(lock);
    waits++;
    stream *s = of(given);
    if (any_capture())
        return cudaErrorStreamCaptureUnsupported;
    run_until(s, s->given);
    return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize(void) {
    MAY_FAIL(cudaErrorLaunchFailure);
    guard g(lock);
    waits++;
    run_device();
    return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *lowest, int *highest) {
    MAY_FAIL(cudaErrorInvalidValue);
    *lowest = 0;
    *highest = -5;
    return cudaSuccess;
}

/* ---- events ---- */

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *out, unsigned) {
    MAY_FAIL(cudaErrorMemoryAllocation);
    *out = (cudaEvent_t) new event;
    fake_count(1);
    return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t *out) {
    return cudaEventCreateWithFlags(out, 0);
}

cudaError_t cudaEventDestroy(cudaEvent_t given) {
    guard g(lock);
    event *e = (event *)given;
    if (e->on && streams.count(e->on)) /* its time is still to be written */
        run_until(e->on, e->at);
    delete e;
    fake_count(-1);
    return cudaSuccess;
}

static cudaError_t record(event *e, stream *s) {
    e->on = s;
    e->at = s->given + 1;
    return enqueue(s, [e] { e->time = now(); });
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t given, cudaStream_t on, unsigned flags) {
    MAY_FAIL(cudaErrorLaunchFailure);
    guard g(lock);
    event *e = (event *)given;
    stream *s = of(on);
    if (s->capturing != (flags == cudaEventRecordExternal))
        return cudaErrorStreamCaptureUnsupported;
    if (!s->capturing)
        return record(e, s);
    /* Until the graph gets there, who asks or waits meets the record before: nothing promises more.
     */
    s->captured.push_back([e](stream *to) {
        enqueue(to, [e, to] {
            e->on = to;
            e->at = 0;
            e->time = now();
        });
    });
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t given, cudaStream_t on) {
    return cudaEventRecordWithFlags(given, on, 0);
}

cudaError_t cudaStreamWaitEvent(cudaStream_t given, cudaEvent_t what, unsigned) {
    MAY_FAIL(cudaErrorLaunchFailure);
    guard g(lock);
    stream *s = of(given);
    const event e = *(event *)what;
    if (s->capturing)
        return cudaErrorStreamCaptureIsolation;
    if (!e.on)
        return cudaSuccess;
    return enqueue(s, [e] { run_until(e.on, e.at); });
}

/* A device goes on by itself: in a thread, which may wait for other ranks; who asks never does. */
cudaError_t cudaEventQuery(cudaEvent_t given) {
    MAY_FAIL(cudaErrorLaunchFailure);
    guard g(lock);
    event *e = (event *)given;
    if (any_capture())
        return cudaErrorStreamCaptureUnsupported;
    if (!e->on || e->on->done >= e->at)
        return cudaSuccess;
    ask(e->on, e->at);
    return cudaErrorNotReady;
}

cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to) {
    MAY_FAIL(cudaErrorInvalidResourceHandle);
    guard g(lock);
    const event *a = (event *)from, *b = (event *)to;
    if (!a->on || !b->on)
        return cudaErrorInvalidResourceHandle;
    if (a->on->done < a->at || b->on->done < b->at)
        return cudaErrorNotReady;
    *ms = (float)(1e3 * (b->time - a->time));
    return cudaSuccess;
}

/* ---- memory ---- */

/* What might wait for the device, or reach into other streams, is refused to a thread that
 * captures.
 */
cudaError_t cudaMalloc(void **out, size_t bytes) {
    MAY_FAIL(cudaErrorMemoryAllocation);
    guard g(lock);
    if (any_capture())
        return cudaErrorStreamCaptureUnsupported;
    allocations++;
    open_window();
    if (bytes_used + bytes > (size_t)number("FAKE_CUDA_MEMORY", 8L << 30))
        return cudaErrorMemoryAllocation;
    const size_t room = (GUARD + bytes + GUARD + PAGE - 1) / PAGE * PAGE;
    std::vector<char *> &freed = free_blocks[room];
    char *at;
    if (!freed.empty()) {
        at = freed.back();
        freed.pop_back();
    } else {
        if (window_used + room > WINDOW)
            die("the window is used up");
        at = window + window_used + GUARD;
        mprotect(window + window_used, room,
                 touching || !protects() ? PROT_READ | PROT_WRITE : PROT_NONE);
        window_used += room;
    }
    fake_touch_begin();
    memset(at - GUARD, 0xa5, GUARD);
    memset(at + bytes, 0xa5, GUARD);
    memset(at, 0xff, bytes < ((size_t)1 << 20) ? bytes : (size_t)1 << 16); /* NaN in any dtype */
    fake_touch_end();
    blocks[at] = {bytes, current_device};
    bytes_used += bytes;
    fake_count(1);
    *out = at;
    return cudaSuccess;
}

cudaError_t cudaFree(void *memory) {
    guard g(lock);
    if (!memory)
        return cudaSuccess;
    if (any_capture())
        return cudaErrorStreamCaptureUnsupported;
    run_device();
    auto it = blocks.find((char *)memory);
    if (it == blocks.end())
        die("cudaFree of what was not allocated");
    const size_t bytes = it->second.bytes;
    fake_touch_begin();
    check_guards((char *)memory, bytes);
    fake_touch_end();
    char *page = (char *)memory - GUARD;
    const size_t room = (2 * GUARD + bytes + PAGE - 1) / PAGE * PAGE;
    madvise(page, room, MADV_DONTNEED);
    free_blocks[room].push_back((char *)memory);
    blocks.erase(it);
    bytes_used -= bytes;
    fake_count(-1);
    return cudaSuccess;
}

cudaError_t cudaHostAlloc(void **out, size_t bytes, unsigned) {
    MAY_FAIL(cudaErrorMemoryAllocation);
    guard g(lock);
    if (any_capture())
        return cudaErrorStreamCaptureUnsupported;
    allocations++;
    *out = malloc(bytes);
    if (!*out)
        return cudaErrorMemoryAllocation;
    memset(*out, 0xff, bytes);
    pinned[(char *)*out] = bytes;
    fake_count(1);
    return cudaSuccess;
}

cudaError_t cudaFreeHost(void *memory) {
    guard g(lock);
    if (any_capture())
        return cudaErrorStreamCaptureUnsupported;
    run_device();
    if (!pinned.erase((char *)memory))
        die("cudaFreeHost of what was not allocated");
    free(memory);
    fake_count(-1);
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void *memory, int value, size_t bytes, cudaStream_t on) {
    MAY_FAIL(cudaErrorInvalidValue);
    return fake_enqueue(on, [=] {
        if (value == 0 && bytes > PAGE * 4) { /* pages nobody touches cost nothing */
            char *first = (char *)(((size_t)memory + PAGE - 1) / PAGE * PAGE);
            char *last = (char *)(((size_t)memory + bytes) / PAGE * PAGE);
            memset(memory, 0, (size_t)(first - (char *)memory));
            madvise(first, (size_t)(last - first), MADV_DONTNEED);
            memset(last, 0, (size_t)((char *)memory + bytes - last));
        } else {
            memset(memory, value, bytes);
        }
    });
}

/* Pageable memory of the host is read, or written, before the call returns: after a wait. */
cudaError_t cudaMemcpyAsync(void *dst, const void *src, size_t bytes, cudaMemcpyKind,
                            cudaStream_t on) {
    MAY_FAIL(cudaErrorInvalidValue);
    guard g(lock);
    const bool pageable =
        (!on_device(dst) && !is_pinned(dst)) || (!on_device(src) && !is_pinned(src));
    const cudaError_t status = fake_enqueue(on, [=] { memmove(dst, src, bytes); });
    if (status == cudaSuccess && pageable) {
        if (of(on)->capturing)
            return cudaErrorStreamCaptureUnsupported;
        waits++;
        fake_run_all(on);
    }
    return status;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *out, const void *memory) {
    guard g(lock);
    memset(out, 0, sizeof *out);
    out->type = on_device(memory)   ? cudaMemoryTypeDevice
                : is_pinned(memory) ? cudaMemoryTypeHost
                                    : cudaMemoryTypeUnregistered;
    auto block = blocks.upper_bound((char *)memory);
    if (on_device(memory) && block != blocks.begin())
        out->device = (--block)->second.device;
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total) {
    guard g(lock);
    *total = (size_t)number("FAKE_CUDA_MEMORY", 8L << 30);
    *free_bytes = *total - bytes_used;
    return cudaSuccess;
}

/* ---- graphs ---- */

cudaError_t cudaStreamBeginCapture(cudaStream_t given, cudaStreamCaptureMode) {
    MAY_FAIL(cudaErrorStreamCaptureUnsupported);
    guard g(lock);
    stream *s = of(given);
    if (s->capturing)
        return cudaErrorIllegalState;
    s->capturing = true;
    s->capturer = std::this_thread::get_id();
    s->captured.clear();
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t given, cudaGraph_t *out) {
    guard g(lock);
    stream *s = of(given);
    *out = nullptr;
    if (!s->capturing)
        return cudaErrorIllegalState;
    s->capturing = false;
    if (fake_fails())
        return cudaErrorStreamCaptureInvalidated;
    *out = (cudaGraph_t) new graph{std::move(s->captured)};
    fake_count(1);
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *out, cudaGraph_t from, unsigned long long) {
    MAY_FAIL(cudaErrorMemoryAllocation);
    *out = (cudaGraphExec_t) new graph(*(graph *)from);
    fake_count(1);
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t given) {
    delete (graph *)given;
    fake_count(-1);
    return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t given) {
    delete (graph *)given;
    fake_count(-1);
    return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t given, cudaStream_t on) {
    MAY_FAIL(cudaErrorLaunchFailure);
    guard g(lock);
    for (auto &node : ((graph *)given)->nodes)
        node(of(on));
    return cudaSuccess;
}

/* ---- devices ---- */

cudaError_t cudaGetDeviceCount(int *count) {
    *count = 0;
    if (!number("FAKE_CUDA_DRIVER", 1))
        return cudaErrorInsufficientDriver;
    MAY_FAIL(cudaErrorUnknown);
    *count = (int)number("FAKE_CUDA_DEVICES", 1);
    return *count ? cudaSuccess : cudaErrorNoDevice;
}

cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= number("FAKE_CUDA_DEVICES", 1))
        return cudaErrorInvalidDevice;
    current_device = device;
    return cudaSuccess;
}

cudaError_t cudaGetDevice(int *device) {
    *device = current_device;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int device) {
    MAY_FAIL(cudaErrorInvalidDevice);
    const long sm = number("FAKE_CUDA_SM", 90);
    memset(p, 0, sizeof *p);
    snprintf(p->name, sizeof p->name, "Fake");
    snprintf((char *)p->uuid.bytes, sizeof p->uuid.bytes, "fake %d", device);
    p->major = (int)(sm / 10);
    p->multiProcessorCount = 132;
    p->minor = (int)(sm % 10);
    return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int *version) {
    *version = number("FAKE_CUDA_DRIVER", 1) ? CUDART_VERSION : (int)number("FAKE_CUDA_OLD", 0);
    return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char *symbol, void **function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult *found) {
    MAY_FAIL(cudaErrorUnknown);
    *function = fake_driver_entry(symbol);
    if (found)
        *found = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int *version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}

cudaError_t cudaGetLastError(void) {
    return cudaSuccess;
}

const char *cudaGetErrorString(cudaError_t code) {
    switch (code) {
    case cudaSuccess: return "no error";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorStreamCaptureUnsupported:
        return "operation not permitted when stream is capturing";
    case cudaErrorInvalidResourceHandle: return "invalid resource handle";
    default: return "a fake failure";
    }
}

} // extern "C"
