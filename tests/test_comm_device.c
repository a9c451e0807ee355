/* The contract of communicators over NCCL, between devices: every request of the suite, whose
 * memory is the host's, goes to the device, over NCCL, and comes back. Ranks are threads. */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "comm_contract.h"
#include "comm_threads.h"

#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

enum { MAX_RANKS = 4, STAMPS = 512 };

typedef struct shim {
    muonshard_comm *outer, *nccl; /* threads', borrowed; own */
    backend *cuda;                /* own */
    size_t next_stamp;
} shim;

/* An array of the suite's and its place on the device. */
typedef struct image {
    void *host, *device; /* own */
    size_t bytes;
} image;

/* One request under way: for each part what is sent, received, and scratch. */
typedef struct carried {
    comm_ticket ticket;
    comm_part *parts; /* own */
    image *images;    /* own, [part_count, 3] */
    size_t stamp;
    bool in_order;
} carried;

static muonshard_status died(muonshard_comm *comm, muonshard_status status, const char *text) {
    return status ? comm_die(comm, status, "%s", text) : MUONSHARD_OK;
}

static void *place(backend *cuda, image *im, const void *host, size_t bytes) {
    *im = (image){.host = (void *)(uintptr_t)host, .bytes = bytes};
    if (!host || !bytes || cuda->ops->alloc(cuda, &im->device, bytes))
        return NULL;
    const copy_item item = {im->device, host, bytes};
    cuda->ops->copy(cuda, &item, 1, STREAM_COMPUTE);
    return im->device;
}

static void drop(shim *s, carried *c) {
    for (size_t i = 0; i < 3 * c->ticket.request.part_count; i++)
        s->cuda->ops->free(s->cuda, c->images[i].device);
    free(c->parts);
    free(c->images);
    free(c);
}

static muonshard_status shim_start(muonshard_comm *comm, comm_ticket *ticket) {
    shim *s = comm->impl;
    const comm_request *r = &ticket->request;
    const size_t size = (size_t)comm->size;
    carried *c = calloc(1, sizeof *c);
    c->parts = calloc(r->part_count + 1, sizeof *c->parts);
    c->images = calloc(3 * r->part_count + 1, sizeof *c->images);
    for (size_t i = 0; i < r->part_count; i++) {
        const comm_part *p = &r->parts[i];
        image *im = &c->images[3 * i];
        const bool sums = r->kind == COMM_REDUCE_SCATTER;
        const size_t sent = r->kind == COMM_ALL_GATHER  ? p->bytes
                            : r->kind == COMM_BROADCAST ? 0
                                                        : size * p->bytes;
        const size_t received = sums ? p->bytes / dtype_size(p->dtype) * sizeof(float)
                                : r->kind == COMM_BROADCAST ? p->bytes
                                                            : size * p->bytes;
        c->parts[i] = *p;
        c->parts[i].send = place(s->cuda, im, p->send, sent);
        c->parts[i].recv = place(s->cuda, im + 1, p->recv, received);
        c->parts[i].scratch = place(s->cuda, im + 2, sums ? p->scratch : NULL, size * p->bytes);
    }
    comm_request on_device = *r;
    on_device.parts = c->parts;
    on_device.backend = s->cuda;
    on_device.stream = STREAM_COMM;
    c->stamp = s->next_stamp++ % STAMPS;
    ticket->impl = c;
    muonshard_status status = s->cuda->ops->fence(s->cuda, STREAM_COMPUTE, STREAM_COMM);
    if (status == MUONSHARD_OK)
        status = comm_start(s->nccl, &on_device, &c->ticket);
    c->ticket.request.part_count = r->part_count;
    return died(comm, status, s->nccl->error.text);
}

static muonshard_status shim_test(muonshard_comm *comm, comm_ticket *ticket, bool *done) {
    shim *s = comm->impl;
    carried *c = ticket->impl;
    bool passed = false;
    if (!c->in_order) {
        bool issued = false;
        muonshard_status status = comm_test(s->nccl, &c->ticket, &issued);
        if (status == MUONSHARD_OK && issued) {
            status = s->cuda->streams->stamp(s->cuda, c->stamp, STREAM_COMM);
            c->in_order = true;
        }
        if (status || !issued)
            return died(comm, status, s->nccl->error.text);
    }
    muonshard_status status = s->cuda->streams->stamp_passed(s->cuda, c->stamp, &passed);
    for (size_t i = 0; i < c->ticket.request.part_count && !status && passed; i++) {
        const image *im = &c->images[3 * i + 1];
        const copy_item item = {im->host, im->device, im->bytes};
        if (im->device)
            status = s->cuda->ops->copy(s->cuda, &item, 1, STREAM_COMM);
    }
    if (passed)
        drop(s, c);
    *done = passed;
    return died(comm, status, s->cuda->error.text);
}

static void shim_destroy(muonshard_comm *comm) {
    shim *s = comm->impl;
    muonshard_comm_destroy(s->nccl);
    backend_close(s->cuda);
}

static const comm_ops shim_ops = {.name = "nccl on a device",
                                  .native_reduce_scatter = true,
                                  .start = shim_start,
                                  .test = shim_test,
                                  .destroy = shim_destroy};

static void shim_barrier(muonshard_comm *comm) {
    threads_barrier(((shim *)comm->impl)->outer);
}

typedef struct suite {
    const contract_case *which;
    char failure[MAX_RANKS][512];
} suite;

static void run_case(muonshard_comm *outer, void *arg) {
    suite *out = arg;
    const int rank = outer->rank;
    shim s = {.outer = outer};
    muonshard_comm *comm = NULL;
    error_text error = {""};
    muonshard_status status =
        backend_open_cuda((cuda_options){.local_rank = rank}, &s.cuda, &error);
    if (status == MUONSHARD_OK)
        status = s.cuda->streams->alloc_stamps(s.cuda, STAMPS);
    if (comm_agree(outer, status, &error) == MUONSHARD_OK)
        status = comm_open_nccl(outer, s.cuda->ordinal, true, &s.nccl, &error);
    if (status == MUONSHARD_OK)
        status = comm_create(&shim_ops, &s, rank, outer->size, NULL, &comm);
    if (status) {
        memcpy(out->failure[rank], error.text, sizeof out->failure[rank] - 1);
        return;
    }
    contract_run run = {.comm = comm, .barrier = shim_barrier};
    out->which->run(&run);
    memcpy(out->failure[rank], run.failure, sizeof run.failure);
    threads_barrier(outer);
    muonshard_comm_destroy(comm);
}

/* A rank wants a device: MUONSHARD_TEST_RANKS, where there are fewer than four. */
static int most_ranks(void) {
    const char *most = getenv("MUONSHARD_TEST_RANKS");
    return most && atoi(most) < MAX_RANKS ? atoi(most) : MAX_RANKS;
}

static void test_contract(void **state) {
    (void)state;
    for (int n = 1; n <= most_ranks(); n++)
        for (size_t i = 0; i < CONTRACT_CASES; i++) {
            suite out = {.which = &contract_cases[i]};
            assert_int_equal(threads_run(n, run_case, &out), MUONSHARD_OK);
            for (int r = 0; r < n; r++)
                if (out.failure[r][0])
                    fail_msg("%s at %d ranks, rank %d: %s", contract_cases[i].name, n, r,
                             out.failure[r]);
        }
}

/* ---- slots that mean nothing ---- */

/* As fake_cuda/fake.h has them. */
typedef struct collectives {
    long reduces, broadcasts, reduce_scatters, all_gathers;
} collectives;

enum { SLOT = 300, KINDS = 2 };

typedef struct slots {
    comm_kind kind;
    uint8_t filled[MAX_RANKS];
    bool right[MAX_RANKS];
    char failure[MAX_RANKS][256];
} slots;

static float number_of(int rank, int slot, size_t i) {
    return (float)(rank * 1000 + slot * 100 + (int)i % 97); /* sums are exact in any order */
}

/* Whether every slot that is filled came as it has to; `all` is memory of the host. */
static bool is_right(const slots *s, int size, int rank, const float *all) {
    for (int k = 0; k < size; k++)
        for (size_t i = 0; i < SLOT; i++) {
            float want = 0.0F;
            for (int r = 0; s->kind == COMM_REDUCE_SCATTER && r < size; r++)
                want += number_of(r, rank, i);
            if (s->kind == COMM_ALL_GATHER)
                want = number_of(k, 0, i);
            const bool means = s->filled[s->kind == COMM_REDUCE_SCATTER ? rank : k];
            const size_t at = s->kind == COMM_REDUCE_SCATTER ? i : (size_t)k * SLOT + i;
            if (means && all[at] != want)
                return false;
        }
    return true;
}

static void run_slots(muonshard_comm *outer, void *arg) {
    slots *s = arg;
    const int rank = outer->rank, size = outer->size;
    const bool sums = s->kind == COMM_REDUCE_SCATTER;
    const size_t bytes = SLOT * sizeof(float), room = (size_t)size * bytes;
    static float host[MAX_RANKS][MAX_RANKS * SLOT];
    backend *cuda = NULL;
    muonshard_comm *nccl = NULL;
    void *send = NULL, *recv = NULL;
    error_text error = {""};
    muonshard_status status = backend_open_cuda((cuda_options){.local_rank = rank}, &cuda, &error);
    if (comm_agree(outer, status, &error) == MUONSHARD_OK)
        status = comm_open_nccl(outer, cuda->ordinal, false, &nccl, &error);
    if (status == MUONSHARD_OK)
        status = cuda->ops->alloc(cuda, &send, room);
    if (status == MUONSHARD_OK)
        status = cuda->ops->alloc(cuda, &recv, room);
    for (int k = 0; k < size; k++)
        for (size_t i = 0; i < SLOT; i++)
            host[rank][(size_t)k * SLOT + i] = number_of(rank, k, i);
    const copy_item up = {send, host[rank], room}, down = {host[rank], recv, room};
    if (status == MUONSHARD_OK)
        status = cuda->ops->copy(cuda, &up, 1, STREAM_COMM);
    const comm_part part = {
        .send = send, .recv = recv, .bytes = bytes, .dtype = MUONSHARD_FP32, .filled = s->filled};
    const comm_request request = {
        .kind = s->kind, .parts = &part, .part_count = 1, .backend = cuda, .stream = STREAM_COMM};
    comm_ticket ticket;
    bool done = false;
    if (status == MUONSHARD_OK && comm_sums(nccl, MUONSHARD_FP32))
        status = comm_start(nccl, &request, &ticket);
    if (status == MUONSHARD_OK)
        status = comm_test(nccl, &ticket, &done);
    if (status == MUONSHARD_OK)
        status = cuda->ops->copy(cuda, &down, 1, STREAM_COMM);
    s->right[rank] = status == MUONSHARD_OK && is_right(s, size, rank, host[rank]);
    snprintf(s->failure[rank], sizeof s->failure[rank], "%s: %.100s%.100s", sums ? "sum" : "gather",
             error.text, nccl ? nccl->error.text : "");
    threads_barrier(outer);
    if (cuda) {
        cuda->ops->free(cuda, send);
        cuda->ops->free(cuda, recv);
    }
    muonshard_comm_destroy(nccl);
    if (cuda)
        backend_close(cuda);
}

/* Up to a quarter of them travel along; more are left out, by a collective a slot. What was given
 * to NCCL only the fake can say. */
static void test_slots_that_mean_nothing(void **state) {
    (void)state;
    static const struct {
        int ranks;
        uint8_t filled[MAX_RANKS];
        bool grouped;
    } cases[] = {{4, {1, 1, 1, 1}, false}, {4, {1, 1, 0, 1}, false}, {4, {0, 1, 1, 0}, true},
                 {4, {0, 0, 1, 0}, true},  {3, {1, 1, 0}, true},     {2, {0, 1}, true}};
    void (*given)(collectives * out) = NULL;
    *(void **)&given = dlsym(dlopen("libmuonshard_cuda.so.0.1", RTLD_NOW), "fake_nccl_given");
    for (size_t c = 0; c < sizeof cases / sizeof cases[0]; c++)
        for (int kind = 0; kind < KINDS && cases[c].ranks <= most_ranks(); kind++) {
            const int n = cases[c].ranks;
            slots s = {.kind = kind ? COMM_ALL_GATHER : COMM_REDUCE_SCATTER};
            collectives before = {0}, after = {0};
            memcpy(s.filled, cases[c].filled, sizeof s.filled);
            if (given)
                given(&before);
            assert_int_equal(threads_run(n, run_slots, &s), MUONSHARD_OK);
            if (given)
                given(&after);
            long filled = 0;
            for (int r = 0; r < n; r++) {
                filled += s.filled[r];
                if (!s.right[r])
                    fail_msg("case %zu, rank %d: %s", c, r, s.failure[r]);
            }
            const long whole = cases[c].grouped ? 0 : n, apart = cases[c].grouped ? n * filled : 0;
            if (!given)
                continue;
            assert_int_equal(after.reduce_scatters - before.reduce_scatters, kind ? 0 : whole);
            assert_int_equal(after.reduces - before.reduces, kind ? 0 : apart);
            assert_int_equal(after.all_gathers - before.all_gathers, kind ? whole : 0);
            assert_int_equal(after.broadcasts - before.broadcasts, kind ? apart : 0);
        }
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_contract),
                                       cmocka_unit_test(test_slots_that_mean_nothing)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
