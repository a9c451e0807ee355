/* check_replicas: a bit that flips in one rank's parameters is found at the next comparison, and
 * the tensor and the rank are named. */
#include <math.h>
#include <stdio.h>
#include <string.h>
#include "comm_threads.h"
#include "step_rig.h"

#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

#define MATRIX  MUONSHARD_ROLE_MATRIX
#define ELEMENT MUONSHARD_ROLE_ELEMENTWISE

/* Those that each rank updates by itself; from "brain" on, those whose owner sends them. */
static const rig_tensor kinds[] = {
    {RIG_TENSOR("stack", MATRIX, 3, 5, 12, 12)},
    {RIG_TENSOR("tall", MATRIX, 2, 20, 8)},
    {RIG_TENSOR("qkv", MATRIX, 3, 2, 18, 6), .split_count = 3, .splits = {6, 6, 6}},
    {RIG_TENSOR("convolution", MATRIX, 4, 6, 2, 3, 3), .form = MUONSHARD_FLATTEN},
    {RIG_TENSOR("steady", MUONSHARD_ROLE_FROZEN, 2, 5, 5)},
    {RIG_TENSOR("brain", MATRIX, 2, 10, 12), .dtype = MUONSHARD_BF16, .grad_dtype = MUONSHARD_BF16},
    {RIG_TENSOR("gain", ELEMENT, 1, 33)},
    {RIG_TENSOR("bias", ELEMENT, 1, 17), .dtype = MUONSHARD_FP16, .grad_dtype = MUONSHARD_FP16},
};
enum { KINDS = sizeof kinds / sizeof kinds[0], REPLICATED = 5, GAIN = 6 };
/* Compared after steps 3 and 6. */
enum { STEPS = 6, FLIP_BEFORE = 5, RANKS = 5 };

typedef struct flip {
    size_t tensor;
    int rank;
    bool last; /* of the tensor's entries, else the first */
    int bit;   /* of the entry */
} flip;

typedef struct flips {
    flip list[4];
    size_t count;
    bool skip_last; /* they come before a step with a NaN, which is that of the comparison */
    /* a rank each */
    uint64_t digest[RANKS];
    muonshard_status status[RANKS];
    char message[RANKS][1024];
    int steps[RANKS]; /* that came back without an error */
} flips;

static void toggle(rig *r, const flip *f) {
    const size_t width = kinds[f->tensor].dtype == MUONSHARD_FP32 ? 4 : 2;
    const size_t at = f->last ? rig_bytes(r, f->tensor) - width : 0;
    unsigned char *bytes = (unsigned char *)r->params[f->tensor] + at;
    bytes[f->bit / 8] ^= (unsigned char)(1U << f->bit % 8);
    rig_push(r);
}

static void step_with_flips(muonshard_comm *comm, void *arg) {
    flips *f = arg;
    const rig_case setup = {.tensors = kinds, .count = KINDS, .yaml = "check_replicas: 3"};
    const int rank = muonshard_comm_rank(comm);
    const int before = f->skip_last ? STEPS : FLIP_BEFORE;
    rig r;
    rig_open(&r, comm, &setup);
    for (int i = 1; i <= STEPS && r.status == MUONSHARD_OK; i++) {
        for (size_t k = 0; i == before && k < f->count; k++)
            if (f->list[k].rank == rank)
                toggle(&r, &f->list[k]);
        rig_gradients(&r);
        if (f->skip_last && i == STEPS)
            r.grads[0][0] = NAN;
        rig_step(&r);
        f->steps[rank] += r.status == MUONSHARD_OK;
    }
    f->digest[rank] = rig_digest(&r);
    f->status[rank] = r.status;
    memcpy(f->message[rank], r.message, sizeof r.message);
    rig_close(&r);
}

static void run(flips *f, int ranks) {
    assert_int_equal(threads_run(ranks, step_with_flips, f), MUONSHARD_OK);
}

/* Found in the last step and not before, by all ranks in the same words. */
static void assert_found(flips *f, int ranks, const char *text) {
    run(f, ranks);
    for (int r = 0; r < ranks; r++) {
        if (f->status[r] != MUONSHARD_ERR_MISMATCH || strcmp(f->message[r], text) != 0)
            fail_msg("rank %d of %d: %d '%s'; wanted '%s'", r, ranks, f->status[r], f->message[r],
                     text);
        assert_int_equal(f->steps[r], STEPS - 1);
    }
}

static void assert_one_found(flips *f, int ranks) {
    char text[128];
    const char *name = kinds[f->list[0].tensor].name;
    if (ranks == 2)
        snprintf(text, sizeof text, "parameters of tensor '%s' differ between rank 0 and rank 1",
                 name);
    else
        snprintf(text, sizeof text,
                 "parameters of tensor '%s' on rank %d differ from those on the other %d ranks",
                 name, f->list[0].rank, ranks - 1);
    assert_found(f, ranks, text);
}

static uint64_t digest_of(flips *f, int ranks) {
    run(f, ranks);
    for (int r = 0; r < ranks; r++) {
        if (f->status[r])
            fail_msg("rank %d of %d: %s", r, ranks, f->message[r]);
        assert_true(f->digest[r] == f->digest[0]);
    }
    return f->digest[0];
}

/* Updates travel: nothing but the comparison looks at another rank's copy. */
static void test_every_tensor_and_rank(void **state) {
    (void)state;
    int found = 0;
    for (int n = 2; n <= 4; n++)
        for (int rank = 0; rank < n; rank++)
            for (size_t t = 0; t < REPLICATED; t++)
                for (int last = 0; last < 2; last++, found++) {
                    flips f = {.list = {{t, rank, last, 20}}, .count = 1};
                    assert_one_found(&f, n);
                }
    print_message("%d flips found and named\n", found);
}

/* Parameters travel: the owner's replace all others in every step, and come from its master where
 * there are 16 bits. A flip is mended; of what AdamW has in fp32, the owner's is everybody's. */
static void test_what_is_sent_is_mended(void **state) {
    (void)state;
    for (int n = 2; n <= 4; n++) {
        flips none = {.count = 0};
        const uint64_t undisturbed = digest_of(&none, n);
        for (int rank = 0; rank < n; rank++)
            for (size_t t = REPLICATED; t < KINDS; t++) {
                flips f = {.list = {{t, rank, false, t == GAIN ? 20 : 5}}, .count = 1};
                const bool owner = t == GAIN && rank == 0;
                assert_true((digest_of(&f, n) == undisturbed) == !owner);
            }
    }
}

/* But not by a step that is skipped. */
static void test_what_no_step_has_mended_is_found(void **state) {
    (void)state;
    for (int n = 2; n <= 4; n++)
        for (int rank = 0; rank < n; rank++)
            for (size_t t = REPLICATED; t < KINDS; t++) {
                flips f = {.list = {{t, rank, true, 5}}, .count = 1, .skip_last = true};
                assert_one_found(&f, n);
            }
}

static void test_several_flips(void **state) {
    (void)state;
    flips tensors = {.list = {{1, 1, true, 20}, {3, 2, true, 20}, {0, 1, false, 20}}, .count = 3};
    assert_found(
        &tensors, 4,
        "parameters of tensor 'stack' on rank 1 differ from those on the other 3 ranks; so "
        "do those of 2 other tensors");
    flips halves = {.list = {{1, 2, true, 20}, {1, 3, true, 20}}, .count = 2};
    assert_found(&halves, 4,
                 "parameters of tensor 'tall' differ between rank 0 and rank 2, and no majority of "
                 "the ranks agrees");
    flips all = {.list = {{1, 1, true, 20}, {1, 2, true, 21}, {4, 0, true, 20}}, .count = 3};
    assert_found(&all, 3,
                 "parameters of tensor 'tall' differ between rank 0 and rank 1, and no majority of "
                 "the ranks agrees; so do those of 1 other tensor");
    if (!images_on_host()) /* there are four devices */
        return;
    flips two = {.list = {{2, 4, true, 20}, {2, 0, true, 21}}, .count = 2};
    assert_found(&two, RANKS,
                 "parameters of tensor 'qkv' on rank 0 and 1 more differ from those on the other 3 "
                 "ranks");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_tensor_and_rank),
        cmocka_unit_test(test_what_is_sent_is_mended),
        cmocka_unit_test(test_what_no_step_has_mended_is_found),
        cmocka_unit_test(test_several_flips),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
