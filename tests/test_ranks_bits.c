/* The bits table, generated: where a matrix is computed, how much travels at once, what is gathered
 * and how many ranks there are change no bit of any parameter, in any dtype. Ranks are threads. */
#include <stdio.h>
#include <string.h>
#include "ranks_fixture.h"

#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

/* ---- what is trained: the zoo in every mixture of dtypes ---- */

typedef struct mixture {
    const char *name;
    muonshard_dtype params[2], grads[2]; /* of even and odd tensors */
} mixture;

static const mixture mixtures[] = {
    {"fp32", {MUONSHARD_FP32, MUONSHARD_FP32}, {MUONSHARD_FP32, MUONSHARD_FP32}},
    {"bf16", {MUONSHARD_BF16, MUONSHARD_BF16}, {MUONSHARD_BF16, MUONSHARD_BF16}},
    {"bf16, gradients fp32", {MUONSHARD_BF16, MUONSHARD_BF16}, {MUONSHARD_FP32, MUONSHARD_FP32}},
    {"fp32, gradients 16 bits", {MUONSHARD_FP32, MUONSHARD_FP32}, {MUONSHARD_BF16, MUONSHARD_FP16}},
    {"all sorts", {MUONSHARD_FP16, MUONSHARD_FP32}, {MUONSHARD_FP16, MUONSHARD_BF16}},
};
enum { MIXTURES = sizeof mixtures / sizeof mixtures[0] };

static rig_case mixed_case(const mixture *m, rig_tensor tensors[RIG_MAX_TENSORS],
                           const char *yaml) {
    memcpy(tensors, rig_zoo, rig_zoo_count * sizeof *tensors);
    for (size_t i = 0; i < rig_zoo_count; i++) {
        tensors[i].dtype = m->params[i % 2];
        tensors[i].grad_dtype = m->grads[i % 2];
    }
    return (rig_case){.tensors = tensors, .count = rig_zoo_count, .yaml = yaml, .steps = 2};
}

/* ---- how: each row computes the same ---- */

static const char *const rules[] = {
    "preset: jordan, clip_norm: 3.0",
    "preset: speedrun, ns_dtype: bf16",
    "preset: gram",
    "preset: optax, variance: normuon, momentum_dtype: bf16",
    "preset: dion_repo, decay: cautious, elementwise: lion, ns_dtype: fp16",
    "preset: torch, decay: l2, ns_dtype: tf32",
};
enum { RULES = sizeof rules / sizeof rules[0] };

static const char *const cuts[] = {"", ", bucket_bytes: 1, batch_bytes: 1",
                                   ", bucket_bytes: 20000, batch_bytes: 5000"};
static const char *const owners[] = {"", ", ownership: balanced"};
/* With masters these three keep the same fp32 values, so the same 16 bits. */
static const char *const gathers[] = {"", ", gather: params",
                                      ", gather: updates, master: replicated"};
/* And so do these, by chance keyed to the element. */
static const char *const by_chance[] = {", rounding: stochastic, seed: 7, gather: params",
                                        ", rounding: stochastic, seed: 7, gather: updates"};

static uint64_t digest_of(const mixture *m, const char *rule, const char *gather, const char *owner,
                          const char *cut, int ranks, bool same_gradients) {
    rig_tensor tensors[RIG_MAX_TENSORS];
    char yaml[512];
    snprintf(yaml, sizeof yaml, "{%s%s%s%s}", rule, gather, owner, cut);
    rig_case setup = mixed_case(m, tensors, yaml);
    setup.same_gradients = same_gradients;
    return digest_at(ranks, &setup);
}

static void check_row(const mixture *m, const char *rule, const char *const *gather_modes,
                      size_t gather_count, int ranks, bool same_gradients, uint64_t *expected) {
    for (size_t g = 0; g < gather_count; g++)
        for (size_t o = 0; o < sizeof owners / sizeof owners[0]; o++) {
            const size_t c = (g + o + (size_t)ranks) % (sizeof cuts / sizeof cuts[0]);
            const uint64_t digest =
                digest_of(m, rule, gather_modes[g], owners[o], cuts[c], ranks, same_gradients);
            *expected = *expected ? *expected : digest;
            if (digest != *expected)
                fail_msg("%s, %s%s%s%s at %d ranks: other bits", m->name, rule, gather_modes[g],
                         owners[o], cuts[c], ranks);
        }
}

static void test_gather_ownership_and_cuts(void **state) {
    (void)state;
    for (size_t m = 0; m < MIXTURES; m++)
        for (size_t k = 0; k < RULES; k++)
            for (int n = 1; n <= MAX_RANKS; n++) {
                uint64_t expected = 0;
                if (row_left_out(m + k + (size_t)n, 5))
                    continue;
                check_row(&mixtures[m], rules[k], gathers, 3, n, false, &expected);
            }
}

static void test_stochastic_rounding(void **state) {
    (void)state;
    for (size_t m = 1; m < MIXTURES; m++)
        for (int n = 1; n <= MAX_RANKS; n++) {
            uint64_t expected = 0;
            if (row_left_out(m + (size_t)n, 5))
                continue;
            check_row(&mixtures[m], rules[0], by_chance, 2, n, false, &expected);
        }
}

/* With the mean exact (equal gradients, powers of two), the number of ranks changes no bit either.
 */
static void test_rank_counts(void **state) {
    (void)state;
    for (size_t m = 0; m < MIXTURES; m++)
        for (size_t k = 0; k < 3; k++) {
            uint64_t expected = 0, chance = 0;
            if (row_left_out(m + 2 * k + 4, 5))
                continue;
            for (int n = 1; n <= MAX_RANKS; n *= 2) {
                check_row(&mixtures[m], rules[k], gathers, 1, n, true, &expected);
                check_row(&mixtures[m], rules[k], by_chance, 2, n, true, &chance);
            }
            if (m == 1) /* the test would not notice rounding that isn't stochastic */
                assert_true(expected != chance);
        }
}

/* Nor do threads, nor instructions that fuse; those the processor lacks are refused. */
static void test_threads_and_instructions(void **state) {
    (void)state;
    if (!images_on_host()) /* which has neither */
        skip();
    static const char *const how[] = {", threads: 1", ", threads: 3", ", threads: 64",
                                      ", instructions: avx2, threads: 2", ", instructions: avx512"};
    static const host_isa needs[] = {HOST_PORTABLE, HOST_PORTABLE, HOST_PORTABLE, HOST_AVX2,
                                     HOST_AVX512};
    for (size_t m = 0; m < MIXTURES; m++)
        for (size_t k = 0; k < RULES; k++) {
            if (row_left_out(m + k, 5))
                continue;
            const uint64_t expected = digest_of(&mixtures[m], rules[k], "", "", "", 2, false);
            for (size_t h = 0; h < sizeof how / sizeof how[0]; h++)
                if (needs[h] <= host_isa_detect() &&
                    digest_of(&mixtures[m], rules[k], how[h], "", "", 2, false) != expected)
                    fail_msg("%s, %s%s: other bits", mixtures[m].name, rules[k], how[h]);
        }
}

/* Another seed, and another step, draw other numbers. */
static void test_seeds_differ(void **state) {
    (void)state;
    const mixture *m = &mixtures[1];
    const uint64_t seven = digest_of(m, rules[0], by_chance[0], "", "", 2, false);
    assert_true(seven == digest_of(m, rules[0], by_chance[0], "", "", 2, false));
    assert_true(seven !=
                digest_of(m, rules[0], ", rounding: stochastic, seed: 8", "", "", 2, false));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_gather_ownership_and_cuts),
        cmocka_unit_test(test_stochastic_rounding),
        cmocka_unit_test(test_rank_counts),
        cmocka_unit_test(test_threads_and_instructions),
        cmocka_unit_test(test_seeds_differ),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
