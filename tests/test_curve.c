/* Schedules against numbers worked by hand; cosines against libm's. */
#include "curve.h"

#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

#include <math.h>
#include <string.h>

/* No rounding of these is larger. */
#define NEAR 4e-16

static double value_at(const char *schedule, int64_t step, int64_t total) {
    double value = -99.0, same = -98.0;
    error_text error = {""};
    if (curve_value(schedule, step, total, 7.0, &value, &error) != MUONSHARD_OK)
        fail_msg("\"%s\": %s", schedule, error.text);
    assert_int_equal(muonshard_schedule_value(schedule, step, total, 7.0, &same), MUONSHARD_OK);
    assert_true(value == same);
    return value;
}

typedef struct expected {
    const char *schedule;
    int64_t step, total;
    double value;
} expected;

static void check(const expected *cases, size_t count) {
    for (size_t i = 0; i < count; i++) {
        const expected *c = &cases[i];
        const double value = value_at(c->schedule, c->step, c->total);
        if (!(fabs(value - c->value) <= NEAR))
            fail_msg("\"%s\" at %lld of %lld: %.17g, expected %.17g", c->schedule,
                     (long long)c->step, (long long)c->total, value, c->value);
    }
}
#define CHECK(cases) check(cases, sizeof cases / sizeof *cases)

static void lines_between_points(void **state) {
    (void)state;
    static const expected cases[] = {
        {"", 0, 0, 7.0},
        {"  ", 5, 10, 7.0},
        {"3:0.25", 0, 0, 0.25},
        {"3:0.25", 3, 0, 0.25},
        {"3:0.25", 1000000000000, 0, 0.25},
        {"10:1 20:2", 0, 0, 1.0},
        {"10:1 20:2", 10, 0, 1.0},
        {"10:1 20:2", 13, 0, 1.3},
        {"10:1 20:2", 19, 0, 1.9},
        {"10:1 20:2", 20, 0, 2.0},
        {"10:1 20:2", 21, 0, 2.0},
        {"0:0 4:1 8:-1", 1, 0, 0.25},
        {"0:0 4:1 8:-1", 7, 0, -0.5},
        /* Two points at one step are a jump, and the later one holds there. */
        {"0:1 5:1 5:3 10:4", 4, 0, 1.0},
        {"0:1 5:1 5:3 10:4", 5, 0, 3.0},
        {"0:1 5:1 5:3 10:4", 6, 0, 3.2},
        {" 0:+1e-2\t 4:.05,", 2, 0, 0.03},
        {"0:0,4:1,,8:0", 6, 0, 0.5},
        {"0:0, 4:1\n8:0", 2, 0, 0.5},
    };
    CHECK(cases);
    /* A constant stays one to the bit. */
    for (int64_t step = 0; step < 400; step++)
        assert_true(value_at("0:0.95 300:0.95", step, 0) == 0.95);
}

static void cosine_is_half_a_wave(void **state) {
    (void)state;
    static const expected cases[] = {
        {"0:0 cosine 12:1", 0, 0, 0.0},         {"0:0 cosine 12:1", 4, 0, 0.25},
        {"0:0 cosine 12:1", 6, 0, 0.5},         {"0:0 cosine 12:1", 8, 0, 0.75},
        {"0:0 cosine 12:1", 12, 0, 1.0},        {"0:0 cosine 12:1", 13, 0, 1.0},
        {"10:2 cosine 16:1 22:0", 12, 0, 1.75}, /* and a line after it */
        {"10:2 cosine 16:1 22:0", 19, 0, 0.5},  {"0:1,cosine,6:0", 2, 0, 0.75},
    };
    CHECK(cases);
    for (int64_t step = 0; step <= 1000; step++) {
        const double wave = 0.5 * (1.0 + cos(3.141592653589793 * (double)step / 1000.0));
        const double value = value_at("0:1 cosine 1000:0.1", step, 0);
        assert_true(fabs(value - (0.1 + 0.9 * wave)) <= NEAR);
        assert_true(step == 0 || value <= value_at("0:1 cosine 1000:0.1", step - 1, 0));
    }
}

static void end_is_total(void **state) {
    (void)state;
    const char *recipe = "0:0 100:1 cosine end:0.1";
    const char *warm = "0:0.85 300:0.95 end-50:0.95 end:0.85";
    const expected cases[] = {
        {recipe, 50, 1000, 0.5},
        {recipe, 100, 1000, 1.0},
        {recipe, 550, 1000, 0.55}, /* half way down */
        {recipe, 1000, 1000, 0.1},
        {recipe, 2000, 1000, 0.1},
        {"0:1 end:0", 1, 4, 0.75},
        {"0:1 end-2:1 end:0", 7, 10, 1.0},
        {"0:1 end-2:1 end:0", 8, 10, 1.0},
        {"0:1 end-2:1 end:0", 9, 10, 0.5},
        {"0:1 end-0:0", 5, 10, 0.5},
        {warm, 150, 1000, 0.90},
        {warm, 950, 1000, 0.95},
        {warm, 975, 1000, 0.90},
        /* total 0: points at the end are left out, with the cosine that leads to them. */
        {recipe, 50, 0, 0.5},
        {recipe, 100000, 0, 1.0},
        {"end:0.1", 3, 0, 7.0},
        {"0:2 cosine end:0 cosine end:1", 3, 0, 2.0},
        /* So are those that would come before the point before them. */
        {warm, 200, 340, 0.85 + 0.1 * 2.0 / 3.0},
        {warm, 320, 340, 0.90},
        {warm, 290, 290, 0.85 + 0.1 * 29.0 / 30.0},
        {warm, 100, 200, 0.85 + 0.1 / 3.0},
        {warm, 400, 200, 0.95},
        {"5:1 end:3", 5, 5, 3.0}, /* the same step is not before it */
        {"0:1 end-8:2 end:3", 2, 4, 2.0},
        {"end-4:1 end:0", 1, 2, 0.25}, /* nothing is before the first: it is at step -2 */
        {"end-4:1 8:0", 7, 10, 0.5},
    };
    CHECK(cases);
}

static void range_is_that_of_the_points(void **state) {
    (void)state;
    static const struct {
        const char *schedule;
        int64_t total;
        double lowest, highest;
    } cases[] = {
        {"0:1", 0, 1, 1},         {"0:0.5 3:-2 cosine 9:4 10:1", 0, -2, 4},
        {"0:1 end:-3", 5, -3, 1}, {"0:1 end:-3", 0, 1, 1},
        {"9:1 end:-3", 5, 1, 1},
    };
    double lowest, highest;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        assert_int_equal(curve_range(cases[i].schedule, cases[i].total, &lowest, &highest, NULL),
                         MUONSHARD_OK);
        assert_true(lowest == cases[i].lowest && highest == cases[i].highest);
    }
    assert_int_equal(curve_range("end:1", 0, &lowest, &highest, NULL), MUONSHARD_OK);
    assert_true(isnan(lowest) && isnan(highest));
}

static void what_is_malformed_is_named(void **state) {
    (void)state;
    static const struct {
        const char *schedule, *text;
    } cases[] = {
        {"0", "point \"0\" is not of the form STEP:VALUE"},
        {"0:1 end", "point \"end\" is not of the form STEP:VALUE"},
        {"0;1", "point \"0;1\" is not of the form"},
        {"Cosine", "point \"Cosine\" is not of the form"},
        {":1", "point \":1\": the step is \"\"; allowed: an integer >= 0, end, end-N"},
        {"-1:1", "the step is \"-1\""},
        {"+1:1", "the step is \"+1\""},
        {"1.5:1", "the step is \"1.5\""},
        {"1e3:1", "the step is \"1e3\""},
        {"99999999999999999999:1", "the step is \"99999999999999999999\""},
        {"End:1", "the step is \"End\""},
        {"ended:1", "the step is \"ended\""},
        {"end+1:1", "the step is \"end+1\""},
        {"end-:1", "the step is \"end-\""},
        {"end--1:1", "the step is \"end--1\""},
        {"end-x:1", "the step is \"end-x\""},
        {"0:", "point \"0:\": the value is \"\"; allowed: a finite number"},
        {"0:x", "the value is \"x\""},
        {"0:1:2", "the value is \"1:2\""},
        {"0:nan", "the value is \"nan\""},
        {"0:inf", "the value is \"inf\""},
        {"0:1e999", "the value is \"1e999\""},
        {"0:1.7e308", "the value is \"1.7e308\""},
        {"0:0x1", "the value is \"0x1\""},
        {"end:x", "point \"end:x\": the value is \"x\""}, /* left out, but not unread */
        {"5:1 4:1", "point \"4:1\" comes before the point before it; steps do not fall"},
        {"0:1 5:1 end:1 4:1", "point \"4:1\" comes before"},
        {"end:1 end-1:1", "point \"end-1:1\" comes before"},
        {"cosine 1:2", "\"cosine\" stands before the first point"},
        {"0:1 cosine", "\"cosine\" stands after the last point"},
        {"0:1 cosine cosine 3:1", "point \"cosine\" is not of the form"},
        {"0:1 "
         "000000000000000000000000000000000000000000000000000000000000000000000000000000000001:2",
         "point \"0000000000000000000000000000000000000000...\" is not of the form"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        for (int64_t total = 0; total <= 20; total += 20) {
            double value = 3.0, lowest, highest;
            error_text error = {""};
            const muonshard_status status =
                curve_value(cases[i].schedule, 0, total, 7.0, &value, &error);
            if (status != MUONSHARD_ERR_CONFIG || !strstr(error.text, cases[i].text))
                fail_msg("\"%s\": status %d, \"%s\"", cases[i].schedule, status, error.text);
            assert_true(value == 3.0);
            assert_int_equal(curve_range(cases[i].schedule, total, &lowest, &highest, NULL),
                             MUONSHARD_ERR_CONFIG);
            assert_int_equal(muonshard_schedule_value(cases[i].schedule, 0, total, 7.0, &value),
                             MUONSHARD_ERR_CONFIG);
        }
    }
    double value;
    assert_int_equal(muonshard_schedule_value(NULL, 0, 0, 1, &value), MUONSHARD_ERR_ARGUMENT);
    assert_int_equal(muonshard_schedule_value("0:1", 0, 0, 1, NULL), MUONSHARD_ERR_ARGUMENT);
    assert_int_equal(muonshard_schedule_value("0:1", -1, 0, 1, &value), MUONSHARD_ERR_ARGUMENT);
    assert_int_equal(muonshard_schedule_value("0:1", 0, -1, 1, &value), MUONSHARD_ERR_ARGUMENT);
    /* A fixed point that only some totals put before a point at the end. */
    assert_int_equal(muonshard_schedule_value("end:1 50:0", 0, 40, 1, &value), MUONSHARD_OK);
    assert_int_equal(muonshard_schedule_value("end:1 50:0", 0, 60, 1, &value),
                     MUONSHARD_ERR_CONFIG);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(lines_between_points),
        cmocka_unit_test(cosine_is_half_a_wave),
        cmocka_unit_test(end_is_total),
        cmocka_unit_test(range_is_that_of_the_points),
        cmocka_unit_test(what_is_malformed_is_named),
    };
    return cmocka_run_group_tests_name("curve", tests, NULL, NULL);
}
