/* What no assignment can be below, against all assignments there are; and that balanced breaks up
 * waves where it has to. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "config.h"
#include "optim/ownership.h"
#include "optim/plan.h"

#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

/* The best of all ways to give `count` matrices to ranks. */
static double best_of_all(const double *cost, size_t count, double *load, size_t ranks, size_t at) {
    double best = INFINITY;
    if (at == count) {
        double most = 0.0;
        for (size_t r = 0; r < ranks; r++)
            most = fmax(most, load[r]);
        return most;
    }
    for (size_t r = 0; r < ranks; r++) {
        load[r] += cost[at];
        best = fmin(best, best_of_all(cost, count, load, ranks, at + 1));
        load[r] -= cost[at];
        if (load[r] == 0.0) /* the other empty ranks are no different */
            break;
    }
    return best;
}

static double bound_of(const double *cost, size_t count, size_t ranks) {
    double bound = -1.0;
    error_text error;
    assert_int_equal(ownership_bound(cost, count, ranks, &bound, &error), MUONSHARD_OK);
    return bound;
}

static void test_bound_is_below_every_assignment(void **state) {
    (void)state;
    static const double sizes[] = {1.0, 2.5, 3.25, 7.0};
    unsigned random = 7;
    int exact = 0, cases = 0;
    for (size_t ranks = 1; ranks <= 4; ranks++)
        for (size_t count = 1; count <= 8; count++)
            for (int k = 0; k < 20; k++) {
                double cost[8], load[4] = {0.0};
                for (size_t i = 0; i < count; i++) {
                    random = random * 1664525U + 1013904223U;
                    cost[i] = sizes[random >> 30];
                }
                const double best = best_of_all(cost, count, load, ranks, 0);
                const double bound = bound_of(cost, count, ranks);
                assert_true(bound <= best * (1.0 + 1e-9));
                exact += bound >= best * (1.0 - 1e-9);
                cases++;
            }
    assert_true(exact * 10 > 9 * cases); /* and it is no bound from nothing */
}

/* 24 matrices of 3.25 and 48 of 1 on 32 ranks: a rank that has a large one has room for another
 * only at 4.25, and the 8 others cannot take 48. */
static void test_bound_of_gpt2(void **state) {
    (void)state;
    double cost[72];
    for (size_t i = 0; i < 72; i++)
        cost[i] = i < 24 ? 3.25 : 1.0;
    assert_true(fabs(bound_of(cost, 72, 32) - 4.25) < 1e-9);
    assert_true(fabs(bound_of(cost, 72, 16) - 126.0 / 16.0) < 1e-9);
    assert_true(fabs(bound_of(cost, 24, 48) - 3.25) < 1e-9);
    assert_true(bound_of(cost, 0, 3) == 0.0);
}

/* GPT-2's stacks on 16 ranks. */
static double imbalance_of(const char *ownership, size_t *packed) {
    muonshard_config *config;
    registry r = {.weightless = true};
    error_text error;
    plan p;
    const int64_t splits[] = {768, 768, 768};
    assert_int_equal(muonshard_config_create(&config), MUONSHARD_OK);
    assert_int_equal(muonshard_config_set(config, "ownership", ownership), MUONSHARD_OK);
    assert_int_equal(muonshard_config_set(config, "ns_form", "standard"), MUONSHARD_OK);
    static const int64_t shapes[4][3] = {
        {12, 2304, 768}, {12, 768, 768}, {12, 3072, 768}, {12, 768, 3072}};
    static const char *const names[] = {"qkv", "proj", "fc", "fcproj"};
    for (size_t i = 0; i < 4; i++) {
        muonshard_tensor_desc d = MUONSHARD_TENSOR_DESC_INIT;
        d.name = names[i];
        d.role = MUONSHARD_ROLE_MATRIX;
        d.dims = 3;
        memcpy(d.shape, shapes[i], sizeof shapes[i]);
        if (i == 0) {
            d.row_splits = splits;
            d.row_split_count = 3;
        }
        assert_int_equal(registry_add(&r, config_settings(config), &d, NULL, &error), MUONSHARD_OK);
    }
    assert_int_equal(plan_make(&p, &r, config_settings(config), 16, false, &error), MUONSHARD_OK);
    const double imbalance = p.imbalance;
    size_t held[16] = {0};
    for (size_t v = 0; v < r.view_count; v++) {
        assert_in_range(p.view_owner[v], 0, 15);
        held[p.view_owner[v]]++;
    }
    *packed = p.bytes_packed;
    plan_free(&p);
    registry_free(&r);
    muonshard_config_destroy(config);
    return imbalance;
}

static void test_balanced_breaks_up_waves(void **state) {
    (void)state;
    size_t by_turns, balanced;
    assert_true(imbalance_of("round_robin", &by_turns) > 1.2);
    assert_true(imbalance_of("balanced", &balanced) <= 1.05);
    assert_true(balanced > by_turns); /* which is what it costs */
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_bound_is_below_every_assignment),
        cmocka_unit_test(test_bound_of_gpt2),
        cmocka_unit_test(test_balanced_breaks_up_waves),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
