/* What `muonshard check` says of sums that are wrong, on arrays that were made wrong. The sums are
 * added up here rank by rank. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "check_values.h"

enum { SLOT = 1000 };
static const float FACTOR = -0x1p-60F, BEFORE = -0x1p-59F;

/* Ranks whose gradients go into element i of the slots [from, to): once each, as it should be, and
 * rank `also` (-1: none) `times` more. */
static float *sums(int ranks, size_t count, size_t from, size_t to, int also, int times) {
    const check_pattern p = check_pattern_make(ranks);
    float *array = malloc(count * sizeof *array);
    assert_non_null(array);
    for (size_t i = 0; i < count; i++) {
        float sum = 0.0F;
        for (int r = 0; r < ranks; r++)
            sum += check_gradient(&p, r, i);
        if (also >= 0 && i / SLOT >= from && i / SLOT < to)
            sum += (float)times * check_gradient(&p, also, i);
        array[i] = FACTOR * sum;
    }
    return array;
}

static check_outcome look(int ranks, const float *array, size_t count) {
    const check_pattern p = check_pattern_make(ranks);
    return check_values(&p, array, count, SLOT, FACTOR, BEFORE);
}

static void test_right(void **state) {
    (void)state;
    const int ranks[] = {1, 2, 3, 4, 7, 32, 33, 1025};
    for (size_t k = 0; k < sizeof ranks / sizeof ranks[0]; k++) {
        const size_t count = 4 * SLOT - 5;
        float *array = sums(ranks[k], count, 0, 0, -1, 0);
        const check_outcome o = look(ranks[k], array, count);
        assert_int_equal(o.cause, CHECK_RIGHT);
        assert_int_equal(o.wrong, 0);
        free(array);
    }
}

/* As large as they may get, sums are exact; and no two of many ranks are alike. */
static void test_exact(void **state) {
    (void)state;
    const int ranks[] = {1, 8, 1000, 16384, CHECK_MOST_RANKS};
    for (size_t k = 0; k < sizeof ranks / sizeof ranks[0]; k++) {
        const check_pattern p = check_pattern_make(ranks[k]);
        double largest = 0.0;
        assert_true(p.values >= 1);
        for (size_t i = 0; i < 300; i++) {
            double sum = 0.0;
            for (int r = 0; r < ranks[k]; r++)
                sum += (double)check_gradient(&p, r, i);
            assert_true(sum == (double)check_sum(&p, i));
            assert_true(sum != 0.0);
            largest = fmax(largest, fabs(sum));
        }
        assert_true(largest <= 0x1p24);
    }
    const check_pattern p = check_pattern_make(CHECK_MOST_RANKS);
    for (int r = 1; r < CHECK_MOST_RANKS; r += 37)
        for (int s = 0; s < r; s += 41) {
            size_t differ = 0;
            for (size_t i = 0; i < 64; i++)
                differ += check_gradient(&p, r, i) != check_gradient(&p, s, i);
            assert_true(differ > 0);
        }
}

/* What lies in another place is another number, nearly always. */
static void test_elements_differ(void **state) {
    (void)state;
    const check_pattern p = check_pattern_make(4);
    const size_t count = 100000, shifts[] = {1, 2, 16, 1024, 65536, 1 << 20};
    for (size_t k = 0; k < sizeof shifts / sizeof shifts[0]; k++) {
        size_t same = 0;
        for (size_t i = 0; i < count; i++)
            same += check_sum(&p, i) == check_sum(&p, i + shifts[k]);
        assert_true(same < count / 40);
    }
}

static void check_one(int ranks, size_t slot, int rank, int times, check_cause cause) {
    const size_t count = 4 * SLOT - 5, end = slot == 3 ? count : (slot + 1) * SLOT;
    float *array = sums(ranks, count, slot, slot + 1, rank, times);
    const check_outcome o = look(ranks, array, count);
    assert_int_equal(o.cause, cause);
    assert_int_equal(o.who, rank);
    assert_int_equal(o.wrong, end - slot * SLOT); /* every one of them */
    assert_int_equal(o.first, slot * SLOT);
    assert_int_equal(o.owner, slot);
    const check_pattern p = check_pattern_make(ranks);
    assert_true(o.expected == check_sum(&p, o.first));
    assert_true(o.found == o.expected + (float)times * check_gradient(&p, rank, o.first));
    free(array);
}

static void test_missing_and_twice(void **state) {
    (void)state;
    for (int rank = 0; rank < 4; rank++)
        for (size_t slot = 0; slot < 4; slot++) {
            check_one(4, slot, rank, -1, CHECK_MISSING);
            check_one(4, slot, rank, 1, CHECK_TWICE);
        }
    check_one(100, 1, 67, -1, CHECK_MISSING);
    check_one(100, 1, 67, 1, CHECK_TWICE);
}

static void test_replaced(void **state) {
    (void)state;
    const int pairs[][3] = {{4, 2, 1}, {4, 0, 3}, {100, 33, 1}, {100, 1, 65}};
    for (size_t k = 0; k < sizeof pairs / sizeof pairs[0]; k++) {
        const int ranks = pairs[k][0], who = pairs[k][1], whose = pairs[k][2];
        const check_pattern p = check_pattern_make(ranks);
        float *array = sums(ranks, 4 * SLOT, 2, 3, who, 1);
        for (size_t i = 2 * SLOT; i < 3 * SLOT; i++)
            array[i] -= FACTOR * check_gradient(&p, whose, i);
        const check_outcome o = look(ranks, array, 4 * SLOT);
        assert_int_equal(o.cause, CHECK_REPLACED);
        assert_true(o.wrong > SLOT / 4);
        free(array);
    }
}

static void test_swapped_slots(void **state) {
    (void)state;
    const size_t count = 4 * SLOT - 5;
    float *array = sums(4, count, 0, 0, -1, 0), kept[SLOT];
    memcpy(kept, array + SLOT, sizeof kept);
    memcpy(array + SLOT, array + 2 * SLOT, sizeof kept);
    memcpy(array + 2 * SLOT, kept, sizeof kept);
    const check_outcome o = look(4, array, count);
    assert_int_equal(o.cause, CHECK_SLOT);
    assert_int_equal(o.owner, 1);
    assert_int_equal(o.who, 2);
    assert_true(o.wrong > 2 * SLOT * 95 / 100);
    free(array);
}

/* A slot that was not gathered, one element that is off, one that is no number. */
static void test_others(void **state) {
    (void)state;
    const size_t count = 4 * SLOT - 5;
    const check_pattern p = check_pattern_make(4);
    float *array = sums(4, count, 0, 0, -1, 0);
    for (size_t i = 3 * SLOT; i < count; i++)
        array[i] = BEFORE * check_sum(&p, i);
    check_outcome o = look(4, array, count);
    assert_int_equal(o.cause, CHECK_BEFORE);
    assert_int_equal(o.wrong, count - 3 * SLOT);
    free(array);

    array = sums(4, count, 0, 0, -1, 0);
    array[count - 1] = NAN;
    o = look(4, array, count);
    assert_int_equal(o.cause, CHECK_UNKNOWN);
    assert_int_equal(o.wrong, 1);
    assert_int_equal(o.first, count - 1);
    array[count - 1] = 0.0F;
    o = look(4, array, count);
    assert_int_equal(o.wrong, 1);
    free(array);
}

static void test_words(void **state) {
    (void)state;
    char text[512];
    const check_outcome o = {.wrong = 7,
                             .first = 11,
                             .found = 1.0F,
                             .expected = 2.0F,
                             .cause = CHECK_REPLACED,
                             .who = -1,

                             .owner = 1};
    check_outcome_text(&o, "w", 99, text, sizeof text);
    assert_string_equal(text,
                        "7 of 99 elements of 'w' are wrong, the first is 11, owned by rank 1: "
                        "its sum is 1 and should be 2; as if one rank's gradient were in the place "
                        "of another's");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_right),           cmocka_unit_test(test_exact),
        cmocka_unit_test(test_elements_differ), cmocka_unit_test(test_missing_and_twice),
        cmocka_unit_test(test_replaced),        cmocka_unit_test(test_swapped_slots),
        cmocka_unit_test(test_others),          cmocka_unit_test(test_words),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
