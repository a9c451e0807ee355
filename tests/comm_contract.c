#include "comm_contract.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- a backend that copies and sums ---- */

static muonshard_status plain_copy(backend *self, const copy_item *items, size_t count,
                                   backend_stream stream) {
    (void)self;
    (void)stream;
    for (size_t i = 0; i < count; i++)
        memcpy(items[i].dst, items[i].src, items[i].bytes);
    return MUONSHARD_OK;
}

/* Element i of an array of fp32 or bf16, which is the upper half of an fp32. */
static float plain_element(const void *x, muonshard_dtype dtype, size_t i) {
    if (dtype == MUONSHARD_FP32)
        return ((const float *)x)[i];
    const uint32_t bits = (uint32_t)((const uint16_t *)x)[i] << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static muonshard_status plain_sum_ranks(backend *self, const sum_ranks_args *a,
                                        backend_stream stream) {
    (void)self;
    (void)stream;
    for (size_t i = 0; i < a->count; i++) {
        float sum = 0.0f;
        for (int r = 0; r < a->ranks; r++) {
            const float x = r == a->rank
                                ? plain_element(a->own, a->dtype, i)
                                : plain_element(a->received, a->dtype, (size_t)r * a->count + i);
            sum = r > 0 ? sum + x : x;
        }
        a->dst[i] = sum;
    }
    return MUONSHARD_OK;
}

/* To fp32. */
static muonshard_status plain_convert(backend *self, const kernel_context *context,
                                      const convert_item *items, size_t count,
                                      backend_stream stream) {
    (void)context;
    for (size_t i = 0; i < count; i++)
        plain_sum_ranks(self,
                        &(sum_ranks_args){.dst = items[i].dst,
                                          .own = items[i].src,
                                          .dtype = items[i].src_dtype,
                                          .ranks = 1,
                                          .count = items[i].count},
                        stream);
    return MUONSHARD_OK;
}

backend *contract_backend(void) {
    static const backend_ops ops = {.name = "plain",
                                    .copy = plain_copy,
                                    .convert = plain_convert,
                                    .sum_ranks = plain_sum_ranks};
    static backend plain = {.ops = &ops};
    return &plain;
}

/* ---- checks ---- */

static void failed(contract_run *run, int line, const char *condition, const char *format, ...)
    __attribute__((format(printf, 4, 5)));
static void failed(contract_run *run, int line, const char *condition, const char *format, ...) {
    if (run->failure[0])
        return;
    int length = snprintf(run->failure, sizeof run->failure,
                          "rank %d, line %d: %s: ", run->comm->rank, line, condition);
    va_list args;
    va_start(args, format);
    if (length >= 0 && (size_t)length < sizeof run->failure)
        vsnprintf(run->failure + length, sizeof run->failure - (size_t)length, format, args);
    va_end(args);
}

/* Records the first failure; the case goes on, so that no rank is left alone. */
#define CHECK(run, condition, ...)                                                                 \
    do {                                                                                           \
        if (!(condition))                                                                          \
            failed(run, __LINE__, #condition, __VA_ARGS__);                                        \
    } while (0)

#define CHECK_OK(run, call)                                                                        \
    do {                                                                                           \
        muonshard_status status_ = (call);                                                         \
        CHECK(run, status_ == MUONSHARD_OK, "%s: %s", muonshard_status_string(status_),            \
              (run)->comm->error.text);                                                            \
    } while (0)

enum { GUARD = 64, POISON = 0xA5 };

static uint64_t mix(uint64_t x) {
    x += 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

/* Byte i of what rank `from` has for rank `to` in part `part`: any value, NaN patterns included. */
static unsigned char byte_of(int from, int to, size_t part, size_t i) {
    uint64_t key = ((uint64_t)(unsigned)from << 8 | (unsigned)to) << 48 | (uint64_t)part << 36;
    return (unsigned char)mix(key ^ i);
}

/* Element i of slot `to` of rank `from`: magnitudes over 40 binades, both signs, so that the order
 * of a sum shows. */
static float float_of(int from, int to, size_t part, size_t i) {
    uint64_t key = ((uint64_t)(unsigned)from << 8 | (unsigned)to) << 48 | (uint64_t)part << 36;
    uint64_t bits = mix(key ^ i);
    float fraction = 1.0f + (float)(bits & 0xFFFFFF) / 16777216.0f;
    return ldexpf(bits >> 63 ? -fraction : fraction, (int)((bits >> 32) % 40) - 20);
}

/* The sum the library promises: rank 0 first. */
static float ordered_sum(int size, int to, size_t part, size_t i) {
    volatile float sum = float_of(0, to, part, i);
    for (int r = 1; r < size; r++)
        sum = sum + float_of(r, to, part, i);
    return sum;
}

/* Buffers of one part, with poison in and behind what is received. */
typedef struct buffers {
    comm_kind kind;
    int root;
    size_t bytes, number; /* slot, and what tells this part's data from another's */
    size_t send_bytes, recv_bytes, scratch_bytes;
    unsigned char *send, *recv, *scratch;
} buffers;

static unsigned char *guarded(size_t bytes) {
    unsigned char *memory = malloc(bytes + GUARD);
    if (!memory)
        abort(); /* a test without memory has nothing to say */
    memset(memory, POISON, bytes + GUARD);
    return memory;
}

static buffers make_buffers(const muonshard_comm *comm, comm_kind kind, size_t bytes, size_t number,
                            int root) {
    const size_t all = (size_t)comm->size * bytes;
    bool many_out = kind == COMM_EXCHANGE || kind == COMM_REDUCE_SCATTER;
    buffers b = {.kind = kind, .root = root, .bytes = bytes, .number = number};
    b.send_bytes = kind == COMM_BROADCAST ? 0 : many_out ? all : bytes;
    b.recv_bytes = kind == COMM_EXCHANGE || kind == COMM_ALL_GATHER ? all : bytes;
    b.scratch_bytes = kind == COMM_REDUCE_SCATTER ? all : 0;
    b.send = guarded(b.send_bytes);
    b.recv = guarded(b.recv_bytes);
    b.scratch = guarded(b.scratch_bytes);
    for (int to = 0; many_out && to < comm->size; to++)
        for (size_t i = 0; kind == COMM_EXCHANGE && i < bytes; i++)
            b.send[(size_t)to * bytes + i] = byte_of(comm->rank, to, number, i);
    for (int to = 0; kind == COMM_REDUCE_SCATTER && to < comm->size; to++)
        for (size_t i = 0; i < bytes / sizeof(float); i++) {
            float value = float_of(comm->rank, to, number, i);
            memcpy(b.send + (size_t)to * bytes + i * sizeof value, &value, sizeof value);
        }
    for (size_t i = 0; kind == COMM_ALL_GATHER && i < bytes; i++)
        b.send[i] = byte_of(comm->rank, 0, number, i);
    for (size_t i = 0; kind == COMM_BROADCAST && comm->rank == root && i < bytes; i++)
        b.recv[i] = byte_of(root, 0, number, i);
    return b;
}

static comm_part part_of(const buffers *b) {
    return (comm_part){.send = b->kind == COMM_BROADCAST ? NULL : b->send,
                       .recv = b->recv,
                       .scratch = b->scratch,
                       .bytes = b->bytes};
}

static bool guard_is_whole(const unsigned char *memory, size_t bytes) {
    for (size_t i = 0; i < GUARD; i++)
        if (memory[bytes + i] != POISON)
            return false;
    return true;
}

/* Every received byte is the one it has to be, and nothing behind it was written. */
static void check_buffers(contract_run *run, const buffers *b) {
    const muonshard_comm *comm = run->comm;
    if (b->kind == COMM_REDUCE_SCATTER) {
        for (size_t i = 0; i < b->bytes / sizeof(float); i++) {
            float want = ordered_sum(comm->size, comm->rank, b->number, i), got;
            memcpy(&got, b->recv + i * sizeof got, sizeof got);
            CHECK(run, memcmp(&want, &got, sizeof got) == 0, "part %zu [%zu]: %a, want %a",
                  b->number, i, (double)got, (double)want);
        }
    } else {
        int slots = b->kind == COMM_BROADCAST ? 1 : comm->size;
        for (int from = 0; from < slots; from++)
            for (size_t i = 0; i < b->bytes; i++) {
                unsigned char got = b->recv[(size_t)from * b->bytes + i];
                unsigned char want = b->kind == COMM_EXCHANGE
                                         ? byte_of(from, comm->rank, b->number, i)
                                     : b->kind == COMM_BROADCAST ? byte_of(b->root, 0, b->number, i)
                                                                 : byte_of(from, 0, b->number, i);
                CHECK(run, got == want, "part %zu slot %d byte %zu of %zu: %d, want %d", b->number,
                      from, i, b->bytes, got, want);
            }
    }
    CHECK(run, guard_is_whole(b->recv, b->recv_bytes), "part %zu: written past recv", b->number);
    CHECK(run, guard_is_whole(b->scratch, b->scratch_bytes), "part %zu: written past scratch",
          b->number);
    CHECK(run, guard_is_whole(b->send, b->send_bytes), "part %zu: written past send", b->number);
}

static void free_buffers(buffers *b) {
    free(b->send);
    free(b->recv);
    free(b->scratch);
}

static comm_request request_of(comm_kind kind, const comm_part *parts, size_t count, int root) {
    return (comm_request){.kind = kind,
                          .parts = parts,
                          .part_count = count,
                          .root = root,
                          .backend = contract_backend(),
                          .stream = STREAM_COMM};
}

static void run_one(contract_run *run, comm_kind kind, size_t bytes, size_t number, int root) {
    buffers b = make_buffers(run->comm, kind, bytes, number, root);
    comm_part part = part_of(&b);
    comm_request request = request_of(kind, &part, 1, root);
    CHECK_OK(run, comm_run(run->comm, &request));
    check_buffers(run, &b);
    free_buffers(&b);
}

/* ---- cases: data ---- */

static void exchange(contract_run *run) {
    run_one(run, COMM_EXCHANGE, 4096, 1, 0);
}

static void reduce_scatter(contract_run *run) {
    const size_t count = 3001;
    run_one(run, COMM_REDUCE_SCATTER, count * sizeof(float), 2, 0);
    /* From three ranks on the data has to be able to tell one order from another. */
    size_t differ = 0;
    for (size_t i = 0; i < count; i++) {
        volatile float backwards = float_of(run->comm->size - 1, run->comm->rank, 2, i);
        for (int r = run->comm->size - 2; r >= 0; r--)
            backwards = backwards + float_of(r, run->comm->rank, 2, i);
        float want = ordered_sum(run->comm->size, run->comm->rank, 2, i);
        differ += backwards != want;
    }
    CHECK(run, run->comm->size < 3 || differ > 0, "test data adds up the same in any order");
}

static void all_gather(contract_run *run) {
    run_one(run, COMM_ALL_GATHER, 4096, 3, 0);
}

static void broadcast(contract_run *run) {
    for (int root = 0; root < run->comm->size; root++)
        run_one(run, COMM_BROADCAST, 4099, 4 + (size_t)root, root);
}

/* Parts of unequal sizes, empty ones among them, travel in one request of every kind. */
static void several_parts(contract_run *run) {
    static const size_t sizes[] = {4, 0, 40000, 12, 0, 1004};
    enum { PARTS = sizeof sizes / sizeof *sizes };
    for (int kind = COMM_EXCHANGE; kind <= COMM_BROADCAST; kind++) {
        buffers b[PARTS];
        comm_part parts[PARTS];
        int root = run->comm->size - 1;
        for (size_t p = 0; p < PARTS; p++) {
            b[p] = make_buffers(run->comm, (comm_kind)kind, sizes[p], 20 + p, root);
            parts[p] = part_of(&b[p]);
        }
        comm_request request = request_of((comm_kind)kind, parts, PARTS, root);
        CHECK_OK(run, comm_run(run->comm, &request));
        for (size_t p = 0; p < PARTS; p++) {
            check_buffers(run, &b[p]);
            free_buffers(&b[p]);
        }
    }
}

static void odd_sizes(contract_run *run) {
    static const size_t sizes[] = {1, 3, 7, 499, 501, 1001, 65537, (1 << 20) + 17};
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
        run_one(run, COMM_EXCHANGE, sizes[s], 30 + s, 0);
        run_one(run, COMM_ALL_GATHER, sizes[s], 40 + s, 0);
        run_one(run, COMM_BROADCAST, sizes[s], 50 + s, run->comm->size / 2);
        run_one(run, COMM_REDUCE_SCATTER, sizes[s] / 4 * 4, 60 + s, 0);
    }
}

static void zero_bytes(contract_run *run) {
    for (int kind = COMM_EXCHANGE; kind <= COMM_BROADCAST; kind++) {
        run_one(run, (comm_kind)kind, 0, 70, 0);
        comm_request request = request_of((comm_kind)kind, NULL, 0, 0);
        CHECK_OK(run, comm_run(run->comm, &request));
    }
    CHECK_OK(run, muonshard_comm_allgather(run->comm, NULL, NULL, 0));
    CHECK_OK(run, muonshard_comm_broadcast(run->comm, NULL, 0, 0));
}

/* Bits travel as they are, and a NaN or an infinity on one rank is in the sum. */
static void special_values(contract_run *run) {
    muonshard_comm *comm = run->comm;
    static const uint32_t words[] = {0x7FC12345u, 0x7F800001u, 0xFFFFFFFFu, 0x80000000u,
                                     0x7F800000u, 0x00000001u, 0xFF800000u, 0x7FA00000u};
    enum { WORDS = sizeof words / sizeof *words };
    uint32_t *all = calloc((size_t)comm->size * WORDS, sizeof *all);
    float *send = calloc((size_t)comm->size, 3 * sizeof *send);
    float *scratch = calloc((size_t)comm->size, 3 * sizeof *scratch);
    if (!all || !send || !scratch)
        abort();
    CHECK_OK(run, comm_allgather(comm, words, all, sizeof words));
    for (int r = 0; r < comm->size; r++)
        CHECK(run, memcmp(all + (size_t)r * WORDS, words, sizeof words) == 0, "slot %d", r);

    /* The last rank has a NaN, an infinity and -0 for everybody; the others have 1, 1 and -0. */
    bool last = comm->rank == comm->size - 1;
    for (int r = 0; r < comm->size; r++) {
        send[3 * r] = last ? NAN : 1.0f;
        send[3 * r + 1] = last ? INFINITY : 1.0f;
        send[3 * r + 2] = -0.0f;
    }
    float sum[3] = {0.0f, 0.0f, 1.0f};
    comm_part part = {.send = send, .recv = sum, .scratch = scratch, .bytes = sizeof sum};
    comm_request request = request_of(COMM_REDUCE_SCATTER, &part, 1, 0);
    CHECK_OK(run, comm_run(comm, &request));
    CHECK(run, isnan(sum[0]) && isinf(sum[1]), "NaN became %g, infinity %g", (double)sum[0],
          (double)sum[1]);
    CHECK(run, sum[2] == 0.0f && signbit(sum[2]), "-0 became %g", (double)sum[2]);
    free(all);
    free(send);
    free(scratch);
}

/* Gradients of 16 bits are sent as they are and added in fp32, in rank order. */
static void sixteen_bits(contract_run *run) {
    muonshard_comm *comm = run->comm;
    enum { COUNT = 1001 };
    const size_t slots = (size_t)comm->size * COUNT;
    uint16_t *send = calloc(slots, sizeof *send), *scratch = calloc(slots, sizeof *scratch);
    float *sum = calloc(COUNT, sizeof *sum);
    if (!send || !scratch || !sum)
        abort();
    for (size_t i = 0; i < slots;
         i++) /* bf16 of 1 + (rank + i mod 128) / 128, times 2^-(i mod 9) */
        send[i] = (uint16_t)((127 - i % 9) << 7 | ((size_t)comm->rank + i) % 128);
    comm_part part = {.send = send,
                      .recv = sum,
                      .scratch = scratch,
                      .bytes = COUNT * sizeof *send,
                      .dtype = MUONSHARD_BF16};
    comm_request request = request_of(COMM_REDUCE_SCATTER, &part, 1, 0);
    CHECK_OK(run, comm_run(comm, &request));
    for (size_t k = 0; k < COUNT; k++) {
        const size_t i = (size_t)comm->rank * COUNT + k;
        float want = 0.0f;
        for (int r = 0; r < comm->size; r++)
            want += ldexpf(1.0f + (float)(((size_t)r + i) % 128) / 128.0f, -(int)(i % 9));
        CHECK(run, sum[k] == want, "element %zu: %g, expected %g", k, (double)sum[k], (double)want);
    }
    free(send);
    free(scratch);
    free(sum);
}

/* ---- cases: tickets ---- */

/* Twelve requests of mixed kinds open at once; waited for in the order started, then in reverse. */
static void open_tickets(contract_run *run) {
    enum { TICKETS = 12 };
    for (int reverse = 0; reverse < 2; reverse++) {
        buffers b[TICKETS];
        comm_part parts[TICKETS];
        comm_ticket tickets[TICKETS];
        for (size_t t = 0; t < TICKETS; t++) {
            comm_kind kind = (comm_kind)(t % 4);
            int root = (int)t % run->comm->size;
            b[t] = make_buffers(run->comm, kind, 4 * (1 + 997 * t), 80 + t, root);
            parts[t] = part_of(&b[t]);
            comm_request request = request_of(kind, &parts[t], 1, root);
            CHECK_OK(run, comm_start(run->comm, &request, &tickets[t]));
        }
        for (size_t t = 0; t < TICKETS; t++)
            CHECK_OK(run, comm_wait(run->comm, &tickets[reverse ? TICKETS - 1 - t : t],
                                    run->comm->options.timeout_s));
        for (size_t t = 0; t < TICKETS; t++) {
            check_buffers(run, &b[t]);
            free_buffers(&b[t]);
        }
    }
}

/* A long sequence with a few open at any time: operation n of one rank meets operation n of the
 * others. */
static void long_sequence(contract_run *run) {
    enum { OPEN = 3, ROUNDS = 200 };
    muonshard_comm *comm = run->comm;
    int64_t mine[OPEN];
    int64_t *all = calloc((size_t)comm->size * OPEN, sizeof *all);
    comm_part parts[OPEN];
    comm_ticket tickets[OPEN];
    if (!all)
        abort();
    for (int i = 0; i < ROUNDS + OPEN; i++) {
        int at = i % OPEN;
        int64_t *slots = all + (size_t)at * (size_t)comm->size;
        if (i >= OPEN) {
            CHECK_OK(run, comm_wait(comm, &tickets[at], comm->options.timeout_s));
            for (int r = 0; r < comm->size; r++)
                CHECK(run, slots[r] == (int64_t)(i - OPEN) * 1000 + r, "round %d slot %d: %lld",
                      i - OPEN, r, (long long)slots[r]);
        }
        if (i < ROUNDS) {
            mine[at] = (int64_t)i * 1000 + comm->rank;
            parts[at] = (comm_part){.send = &mine[at], .recv = slots, .bytes = sizeof *mine};
            comm_request request = request_of(COMM_ALL_GATHER, &parts[at], 1, 0);
            CHECK_OK(run, comm_start(comm, &request, &tickets[at]));
        }
    }
    free(all);
}

/* With the last rank not there yet, start and test come back, and not with success. */
static void test_never_waits(contract_run *run) {
    muonshard_comm *comm = run->comm;
    if (!run->barrier || comm->size == 1)
        return;
    buffers b = make_buffers(comm, COMM_ALL_GATHER, 64, 100, 0);
    comm_part part = part_of(&b);
    comm_request request = request_of(COMM_ALL_GATHER, &part, 1, 0);
    comm_ticket ticket = {.open = false};
    bool late = comm->rank == comm->size - 1;
    if (!late)
        CHECK_OK(run, comm_start(comm, &request, &ticket));
    for (int i = 0; !late && i < 100; i++) {
        bool done = true;
        CHECK_OK(run, comm_test(comm, &ticket, &done));
        CHECK(run, !done, "done before the last rank started");
    }
    run->barrier(comm);
    if (late)
        CHECK_OK(run, comm_start(comm, &request, &ticket));
    CHECK_OK(run, comm_wait(comm, &ticket, comm->options.timeout_s));
    check_buffers(run, &b);
    free_buffers(&b);
}

/* A ticket that is done stays done, and is summed once only. */
static void done_stays_done(contract_run *run) {
    buffers b = make_buffers(run->comm, COMM_REDUCE_SCATTER, 64, 101, 0);
    comm_part part = part_of(&b);
    comm_request request = request_of(COMM_REDUCE_SCATTER, &part, 1, 0);
    comm_ticket ticket;
    CHECK_OK(run, comm_start(run->comm, &request, &ticket));
    CHECK_OK(run, comm_wait(run->comm, &ticket, run->comm->options.timeout_s));
    check_buffers(run, &b);
    memset(b.recv, POISON, b.recv_bytes);
    bool done = false;
    CHECK_OK(run, comm_test(run->comm, &ticket, &done));
    CHECK(run, done && !ticket.open, "no longer done");
    CHECK_OK(run, comm_wait(run->comm, &ticket, 1.0));
    CHECK(run, b.recv[0] == POISON && guard_is_whole(b.recv, 0), "written again");
    free_buffers(&b);
}

/* ---- cases: host messages and agreement ---- */

static void public_calls(contract_run *run) {
    muonshard_comm *comm = run->comm;
    CHECK(run, muonshard_comm_rank(comm) == comm->rank, "rank");
    CHECK(run, muonshard_comm_size(comm) == comm->size, "size");
    int64_t mine = 7000 + comm->rank, all[64] = {0};
    CHECK_OK(run, muonshard_comm_allgather(comm, &mine, all, sizeof mine));
    for (int r = 0; r < comm->size; r++)
        CHECK(run, all[r] == 7000 + r, "slot %d: %lld", r, (long long)all[r]);
    for (int root = 0; root < comm->size; root++) {
        char text[32] = "not yet";
        if (comm->rank == root)
            snprintf(text, sizeof text, "from rank %d", root);
        char want[32];
        snprintf(want, sizeof want, "from rank %d", root);
        CHECK_OK(run, muonshard_comm_broadcast(comm, text, sizeof text, root));
        CHECK(run, strcmp(text, want) == 0, "root %d: %s", root, text);
    }
    /* Bad arguments are refused on the spot, with a text, and kill nothing. */
    CHECK(run, muonshard_comm_broadcast(comm, all, 8, comm->size) == MUONSHARD_ERR_ARGUMENT,
          "root");
    CHECK(run, strstr(muonshard_comm_last_error(comm), "root is"), "%s", comm->error.text);
    CHECK(run, muonshard_comm_broadcast(comm, all, 8, -1) == MUONSHARD_ERR_ARGUMENT, "root");
    CHECK(run, muonshard_comm_broadcast(comm, NULL, 8, 0) == MUONSHARD_ERR_ARGUMENT, "data");
    CHECK(run, muonshard_comm_allgather(comm, &mine, NULL, 8) == MUONSHARD_ERR_ARGUMENT, "recv");
    CHECK(run, muonshard_comm_allgather(comm, NULL, all, 8) == MUONSHARD_ERR_ARGUMENT, "send");
    CHECK_OK(run, muonshard_comm_allgather(comm, &mine, all, sizeof mine));
}

/* One round of agreement in which the ranks of the bit mask fail, each with a status and text of
 * its own. */
static void agree_round(contract_run *run, unsigned failing, bool with_text) {
    muonshard_comm *comm = run->comm;
    static const muonshard_status statuses[] = {MUONSHARD_ERR_CONFIG, MUONSHARD_ERR_IO,
                                                MUONSHARD_ERR_MEMORY, MUONSHARD_ERR_FORMAT};
    int lowest = 0;
    while (lowest < comm->size && !(failing >> lowest & 1))
        lowest++;
    bool fails = failing >> comm->rank & 1;
    muonshard_status mine = fails ? statuses[comm->rank % 4] : MUONSHARD_OK;
    char text[64], want[128];
    snprintf(text, sizeof text, "file of rank %d is broken", comm->rank);
    muonshard_status agreed = muonshard_comm_agree(comm, mine, fails && with_text ? text : NULL);
    if (lowest == comm->size) {
        CHECK(run, agreed == MUONSHARD_OK, "nobody failed, agreed on %d", agreed);
        return;
    }
    char prefix[32] = "", body[64];
    if (lowest != comm->rank)
        snprintf(prefix, sizeof prefix, "rank %d: ", lowest);
    snprintf(body, sizeof body, "file of rank %d is broken", lowest);
    snprintf(want, sizeof want, "%s%s", prefix,
             with_text ? body : muonshard_status_string(statuses[lowest % 4]));
    CHECK(run, agreed == statuses[lowest % 4], "agreed on %d, want %d", agreed,
          statuses[lowest % 4]);
    CHECK(run, strcmp(muonshard_comm_last_error(comm), want) == 0, "'%s', want '%s'",
          comm->error.text, want);
}

/* Every set of failing ranks, none and all included. */
static void agreement(contract_run *run) {
    unsigned sets = 1u << (run->comm->size < 6 ? run->comm->size : 6);
    for (unsigned failing = 0; failing < sets; failing++) {
        agree_round(run, failing, true);
        agree_round(run, failing, false);
    }
}

/* The internal form gives the text to every rank's error, also where that is the communicator's
 * own. */
static void agreement_inside(contract_run *run) {
    muonshard_comm *comm = run->comm;
    error_text error = {"leftover"};
    int last = comm->size - 1;
    muonshard_status mine = MUONSHARD_OK;
    if (comm->rank == last)
        mine = fail(&error, MUONSHARD_ERR_MISMATCH, "tensor 3 differs");
    CHECK(run, comm_agree(comm, mine, &error) == MUONSHARD_ERR_MISMATCH, "status");
    CHECK(run, strstr(error.text, "tensor 3 differs"), "%s", error.text);
    CHECK(run, (comm->rank == last) == (strncmp(error.text, "rank ", 5) != 0), "%s", error.text);

    mine = comm->rank == 0 ? fail(&comm->error, MUONSHARD_ERR_STATE, "own text") : MUONSHARD_OK;
    CHECK(run, comm_agree(comm, mine, &comm->error) == MUONSHARD_ERR_STATE, "status");
    CHECK(run, strstr(comm->error.text, "own text"), "%s", comm->error.text);
    CHECK_OK(run, comm_agree(comm, MUONSHARD_OK, NULL));
    CHECK(run, comm_agree(comm, MUONSHARD_ERR_IO, NULL) == MUONSHARD_ERR_IO, "status");
}

/* Sums in rank order, which for these values is another number than in any other order. */
static void allreduce(contract_run *run) {
    muonshard_comm *comm = run->comm;
    const double own = comm->rank == 0 ? 1e16 : comm->rank == 1 ? 1.0 : -1e16;
    double values[3] = {own, (double)comm->rank, comm->rank == comm->size - 1 ? NAN : 1.0};
    double sum = 1e16;
    for (int r = 1; r < comm->size; r++)
        sum += r == 1 ? 1.0 : -1e16;
    double maxima[3];
    memcpy(maxima, values, sizeof maxima);
    CHECK_OK(run, muonshard_comm_allreduce(comm, values, 3, MUONSHARD_REDUCE_SUM));
    CHECK(run, values[0] == sum, "sum is %g, want %g", values[0], sum);
    CHECK(run, values[1] == comm->size * (comm->size - 1) / 2, "sum of ranks is %g", values[1]);
    CHECK(run, isnan(values[2]), "NaN was lost in a sum");
    CHECK_OK(run, muonshard_comm_allreduce(comm, maxima, 3, MUONSHARD_REDUCE_MAX));
    CHECK(run, maxima[0] == 1e16, "maximum is %g", maxima[0]);
    CHECK(run, maxima[1] == comm->size - 1, "maximum of ranks is %g", maxima[1]);
    CHECK(run, isnan(maxima[2]), "NaN was lost in a maximum");
    CHECK_OK(run, muonshard_comm_allreduce(comm, NULL, 0, MUONSHARD_REDUCE_SUM));
    CHECK(run,
          muonshard_comm_allreduce(comm, NULL, 1, MUONSHARD_REDUCE_SUM) == MUONSHARD_ERR_ARGUMENT,
          "NULL was taken");
}

const contract_case contract_cases[CONTRACT_CASES] = {
    {"exchange", exchange},
    {"reduce_scatter", reduce_scatter},
    {"all_gather", all_gather},
    {"broadcast", broadcast},
    {"several_parts", several_parts},
    {"odd_sizes", odd_sizes},
    {"zero_bytes", zero_bytes},
    {"special_values", special_values},
    {"sixteen_bits", sixteen_bits},
    {"open_tickets", open_tickets},
    {"long_sequence", long_sequence},
    {"test_never_waits", test_never_waits},
    {"done_stays_done", done_stays_done},
    {"public_calls", public_calls},
    {"allreduce", allreduce},
    {"agreement", agreement},
    {"agreement_inside", agreement_inside},
};
