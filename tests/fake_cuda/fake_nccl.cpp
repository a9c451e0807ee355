/* fake_nccl.cpp - the calls of NCCL that the communicator makes, between threads and processes of
 * one machine: a file in shared memory a communicator. Sums are made in rank order, but from the
 * last rank to the first where there are more than two, as NCCL's order is not ours either.
 * FAKE_NCCL_REFUSE=N: ranks from the N-th on can't initialise, which they learn while they poll. */
#include <nccl.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>
#include <thread>
#include <vector>

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "fake.h"

namespace {

const size_t SLOT = 1 << 20;
const int MAX_RANKS = 64;

struct shared {
    std::atomic<int> joined, aborted;
    std::atomic<unsigned long> at[MAX_RANKS];     /* barriers a rank has come to */
    std::atomic<unsigned long> wanted[MAX_RANKS]; /* operations a rank has begun */
};

enum kind { SEND, RECV, REDUCE_SCATTER, ALL_GATHER, BROADCAST, REDUCE };

struct action {
    kind what;
    const void *send;
    void *recv;
    size_t bytes;
    int peer;
};

} // namespace

struct ncclComm {
    int rank, size, device;
    shared *world;
    char *slots;
    size_t mapped;
    unsigned long barriers = 0;
    unsigned long begun = 0, issued = 0; /* operations */
    struct place {
        cudaStream_t stream;
        size_t end;
    };
    std::deque<place> places; /* of operations, in order */
    std::mutex lock;
    std::thread helper;
    std::atomic<bool> ending{false};
    int polls = 0; /* until what was issued is taken */
    cudaStream_t issuing = nullptr;
    bool is_issuing = false, initializing = false, refused = false;
};

namespace {

char *slot(ncclComm *c, int rank) {
    return c->slots + (size_t)rank * SLOT;
}

/* All ranks, or the end. */
bool barrier(ncclComm *c) {
    c->barriers++;
    c->world->at[c->rank] = c->barriers;
    for (int r = 0; r < c->size; r++)
        while (c->world->at[r] < c->barriers) {
            if (c->world->aborted)
                return false;
            fake_let_others(20);
        }
    return !c->world->aborted;
}

/* [bytes] of every rank that has something to say, through the slots; got(rank, at, data, n). */
template <typename Got> bool share(ncclComm *c, const void *mine, size_t bytes, Got got) {
    for (size_t at = 0; at < bytes; at += SLOT) {
        const size_t n = bytes - at < SLOT ? bytes - at : SLOT;
        if (mine)
            memcpy(slot(c, c->rank), (const char *)mine + at, n);
        if (!barrier(c))
            return false;
        for (int r = 0; r < c->size; r++)
            got(r, at, slot(c, r), n);
        if (!barrier(c))
            return false;
    }
    return true;
}

/* Rank `to` gets the sum of what all have. */
bool reduce(ncclComm *c, const void *mine, void *recv, size_t bytes, int to) {
    std::vector<float> parts((size_t)c->size * (bytes / 4));
    const bool ok = share(c, mine, bytes, [&](int r, size_t at, const char *data, size_t n) {
        memcpy((char *)parts.data() + (size_t)r * bytes + at, data, n);
    });
    for (size_t i = 0; ok && c->rank == to && i < bytes / 4; i++) {
        float sum = parts[(size_t)(c->size - 1) * (bytes / 4) + i];
        for (int r = c->size - 2; r >= 0; r--)
            sum += parts[(size_t)r * (bytes / 4) + i];
        ((float *)recv)[i] = sum;
    }
    return ok;
}

/* Sends and receives come in layers, one message from each to each. */
bool exchange(ncclComm *c, const std::vector<action> &sends, const std::vector<action> &recvs) {
    for (size_t layer = 0; layer * (size_t)c->size < sends.size(); layer++)
        for (int to = 0; to < c->size; to++) {
            const action &s = sends[layer * (size_t)c->size + (size_t)to];
            const bool ok =
                share(c, s.send, s.bytes, [&](int r, size_t at, const char *data, size_t n) {
                    if (to == c->rank)
                        memcpy((char *)recvs[layer * (size_t)c->size + (size_t)r].recv + at, data,
                               n);
                });
            if (!ok)
                return false;
        }
    return true;
}

void run(ncclComm *c, const std::vector<action> &actions) {
    if (c->world->aborted)
        return;
    c->world->wanted[c->rank] = ++c->begun;
    std::vector<action> sends, recvs;
    for (const action &a : actions) {
        bool ok = true;
        switch (a.what) {
        case SEND: sends.push_back(a); break;
        case RECV: recvs.push_back(a); break;
        case REDUCE_SCATTER:
            for (int r = 0; r < c->size && ok; r++)
                ok = reduce(c, (const char *)a.send + (size_t)r * a.bytes, a.recv, a.bytes, r);
            break;
        case REDUCE: ok = reduce(c, a.send, a.recv, a.bytes, a.peer); break;
        case ALL_GATHER:
            ok = share(c, a.send, a.bytes, [&](int r, size_t at, const char *data, size_t n) {
                memcpy((char *)a.recv + (size_t)r * a.bytes + at, data, n);
            });
            break;
        case BROADCAST:
            ok = share(c, c->rank == a.peer ? a.send : nullptr, a.bytes,
                       [&](int r, size_t at, const char *data, size_t n) {
                           if (r == a.peer)
                               memcpy((char *)a.recv + at, data, n);
                       });
            break;
        }
        if (!ok)
            return;
    }
    exchange(c, sends, recvs);
}

/* A device goes on by itself: where another rank waits in an operation, this one comes to it. */
void help(ncclComm *c) {
    while (!c->ending) {
        unsigned long wanted = 0;
        for (int r = 0; r < c->size; r++)
            if (c->world->wanted[r] > wanted)
                wanted = c->world->wanted[r];
        ncclComm::place p{nullptr, 0};
        bool there = false;
        c->lock.lock();
        if (wanted > c->begun && c->places.size() >= wanted) {
            p = c->places[wanted - 1];
            there = true;
        }
        c->lock.unlock();
        if (there)
            fake_run_until(p.stream, p.end);
        usleep(100);
    }
}

thread_local int group_depth;
thread_local ncclComm *group_comm;
thread_local cudaStream_t group_stream;
thread_local std::vector<action> group;

ncclResult_t end_group() {
    ncclComm *c = group_comm;
    std::vector<action> actions;
    actions.swap(group);
    group_comm = nullptr;
    if (!c || actions.empty())
        return ncclSuccess;
    if (fake_fails())
        return ncclInternalError;
    fake_issuing(group_stream, false);
    fake_enqueue(group_stream, [c, actions] { run(c, actions); });
    c->lock.lock();
    c->places.push_back({group_stream, fake_given(group_stream)});
    c->lock.unlock();
    c->issuing = group_stream;
    c->is_issuing = true;
    c->polls = 3;
    fake_issuing(group_stream, true);
    return ncclInProgress;
}

std::atomic<long> given[REDUCE + 1]; /* by kind */

ncclResult_t add(ncclComm *c, cudaStream_t stream, action a) {
    if (group_comm && (group_comm != c || group_stream != stream))
        return ncclInvalidUsage;
    group_comm = c;
    group_stream = stream;
    group.push_back(a);
    given[a.what]++;
    if (!group_depth)
        return end_group();
    return group.size() % 3 ? ncclSuccess : ncclInProgress; /* NCCL may say either */
}

} // namespace

void fake_nccl_given(fake_collectives *out) {
    *out = {given[REDUCE], given[BROADCAST], given[REDUCE_SCATTER], given[ALL_GATHER]};
}

extern "C" {

ncclResult_t ncclGetVersion(int *version) {
    *version = NCCL_VERSION_CODE;
    return ncclSuccess;
}

ncclResult_t ncclGetUniqueId(ncclUniqueId *id) {
    static std::atomic<int> next{0};
    if (fake_fails())
        return ncclSystemError;
    memset(id, 0, sizeof *id);
    snprintf(id->internal, sizeof id->internal, "/fake_nccl_%d_%d", (int)getpid(), ++next);
    return ncclSuccess;
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t *out, int size, ncclUniqueId id, int rank,
                                    ncclConfig_t *config) {
    *out = nullptr;
    if (fake_fails())
        return ncclSystemError;
    if (size > MAX_RANKS || config->blocking)
        return ncclInvalidArgument;
    const size_t head = (sizeof(shared) + 4095) / 4096 * 4096;
    const size_t bytes = head + (size_t)size * SLOT;
    const int file = shm_open(id.internal, O_CREAT | O_RDWR, 0600);
    if (file < 0 || ftruncate(file, (off_t)bytes) != 0)
        return ncclSystemError;
    void *at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (at == MAP_FAILED)
        return ncclSystemError;
    ncclComm *c = new ncclComm;
    c->rank = rank;
    c->size = size;
    cudaGetDevice(&c->device);
    c->world = (shared *)at;
    c->slots = (char *)at + head;
    c->mapped = bytes;
    c->initializing = true;
    const char *refuse = getenv("FAKE_NCCL_REFUSE");
    c->refused = refuse && rank + 1 >= atoi(refuse);
    if (++c->world->joined == size)
        shm_unlink(id.internal);
    c->helper = std::thread(help, c);
    fake_count(1);
    *out = c;
    return ncclInProgress;
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t c, ncclResult_t *state) {
    *state = ncclSuccess;
    if (c->refused)
        *state = ncclSystemError;
    else if (c->world->aborted)
        *state = ncclRemoteError;
    else if (c->initializing && c->world->joined < c->size)
        *state = ncclInProgress;
    else if (c->is_issuing && c->polls-- > 0)
        *state = ncclInProgress;
    if (*state == ncclSuccess) {
        c->initializing = false;
        if (c->is_issuing)
            fake_issuing(c->issuing, false);
        c->is_issuing = false;
    }
    return ncclSuccess;
}

static ncclResult_t end(ncclComm_t c) {
    c->ending = true;
    c->helper.join();
    if (c->is_issuing)
        fake_issuing(c->issuing, false);
    fake_count(-1);
    if (!c->world->aborted) { /* otherwise operations may still be on their streams */
        munmap(c->world, c->mapped);
        delete c;
    }
    return ncclSuccess;
}

/* Streams run to the last operation; the others are helped there. */
ncclResult_t ncclCommFinalize(ncclComm_t c) {
    ncclComm::place last{nullptr, 0};
    c->lock.lock();
    const bool any = !c->places.empty();
    if (any)
        last = c->places.back();
    c->lock.unlock();
    if (any)
        fake_run_until(last.stream, last.end);
    return ncclSuccess;
}

ncclResult_t ncclCommDestroy(ncclComm_t c) {
    return end(c);
}

ncclResult_t ncclCommAbort(ncclComm_t c) {
    c->world->aborted = 1;
    return end(c);
}

ncclResult_t ncclCommCount(const ncclComm_t c, int *size) {
    *size = c->size;
    return ncclSuccess;
}
ncclResult_t ncclCommUserRank(const ncclComm_t c, int *rank) {
    *rank = c->rank;
    return ncclSuccess;
}
ncclResult_t ncclCommCuDevice(const ncclComm_t c, int *device) {
    *device = c->device;
    return ncclSuccess;
}

const char *ncclGetErrorString(ncclResult_t) {
    return "a fake failure";
}
const char *ncclGetLastError(ncclComm_t) {
    return "";
}

ncclResult_t ncclGroupStart(void) {
    group_depth++;
    return ncclSuccess;
}
ncclResult_t ncclGroupEnd(void) {
    return --group_depth ? ncclSuccess : end_group();
}

static size_t size_of(ncclDataType_t type) {
    return type == ncclFloat32 ? 4 : 1;
}

ncclResult_t ncclSend(const void *send, size_t count, ncclDataType_t type, int peer, ncclComm_t c,
                      cudaStream_t stream) {
    return add(c, stream, {SEND, send, nullptr, count * size_of(type), peer});
}
ncclResult_t ncclRecv(void *recv, size_t count, ncclDataType_t type, int peer, ncclComm_t c,
                      cudaStream_t stream) {
    return add(c, stream, {RECV, nullptr, recv, count * size_of(type), peer});
}
ncclResult_t ncclReduceScatter(const void *send, void *recv, size_t count, ncclDataType_t type,
                               ncclRedOp_t op, ncclComm_t c, cudaStream_t stream) {
    if (type != ncclFloat32 || op != ncclSum)
        return ncclInvalidArgument;
    return add(c, stream, {REDUCE_SCATTER, send, recv, count * 4, 0});
}
ncclResult_t ncclAllGather(const void *send, void *recv, size_t count, ncclDataType_t type,
                           ncclComm_t c, cudaStream_t stream) {
    return add(c, stream, {ALL_GATHER, send, recv, count * size_of(type), 0});
}
ncclResult_t ncclBroadcast(const void *send, void *recv, size_t count, ncclDataType_t type,
                           int root, ncclComm_t c, cudaStream_t stream) {
    return add(c, stream, {BROADCAST, send, recv, count * size_of(type), root});
}
ncclResult_t ncclReduce(const void *send, void *recv, size_t count, ncclDataType_t type,
                        ncclRedOp_t op, int root, ncclComm_t c, cudaStream_t stream) {
    if (type != ncclFloat32 || op != ncclSum)
        return ncclInvalidArgument;
    return add(c, stream, {REDUCE, send, recv, count * 4, root});
}

} // extern "C"
