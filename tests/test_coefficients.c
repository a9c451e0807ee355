/* Coefficient sets against what was published about them and against the mathematics of best
 * approximation; the check against plain sampling. Nothing here knows how a row is found. */
#include "optim/coefficients.h" /* before cmocka.h, whose macro `fail` would hide a function */

#include <stdarg.h>
#include <setjmp.h>
#include <cmocka.h>

#include <locale.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static settings settings_of(int set, int steps) {
    return (settings){.coefficients = set,
                      .ns_steps = steps,
                      .norm = NS_NORM_FROBENIUS_MAX,
                      .norm_eps = NAN,
                      .custom_coefficients = "",
                      .polar_lower_bound = 1e-3,
                      .coefficient_safety = 1.0,
                      .safety_last = 1,
                      .gram_restarts = "auto"};
}

typedef struct sequence {
    coefficient_row rows[NS_MAX_STEPS];
    int steps;
} sequence;

static sequence rows_in(const settings *s, ns_dtype dtype) {
    sequence q = {.steps = (int)s->ns_steps};
    error_text error = {""};
    if (coefficients_rows(s, dtype, q.rows, &error) != MUONSHARD_OK)
        fail_msg("%s", error.text);
    return q;
}

static sequence rows_of(const settings *s) {
    return rows_in(s, NS_FP32);
}

static void refused(const settings *s, const char *const *words) {
    coefficient_row rows[NS_MAX_STEPS];
    error_text error = {""};
    assert_int_equal(coefficients_rows(s, NS_FP32, rows, &error), MUONSHARD_ERR_CONFIG);
    for (; *words; words++)
        if (!strstr(error.text, *words))
            fail_msg("\"%s\" does not say \"%s\"", error.text, *words);
}
#define assert_refused(s, ...) refused(s, (const char *const[]){__VA_ARGS__, NULL})

static double powers(coefficient_row k, double x) {
    return k.a * x + k.b * x * x * x + k.c * x * x * x * x * x;
}

static double through(const sequence *q, double sigma) {
    for (int i = 0; i < q->steps; i++)
        sigma = powers(q->rows[i], sigma);
    return sigma;
}

static void assert_close(double found, double expected, double tolerance) {
    if (!(fabs(found - expected) <= tolerance))
        fail_msg("%.17g is not %.17g to %g", found, expected, tolerance);
}

static void assert_row(coefficient_row k, double a, double b, double c, double tolerance) {
    assert_close(k.a, a, tolerance * fabs(a));
    assert_close(k.b, b, tolerance * fabs(b));
    assert_close(k.c, c, tolerance * fabs(c));
}

/* ---- published rows and what follows the last ---- */

typedef struct published {
    int set, count, after; /* after: index of the row that follows the last */
    double rows[8][3];
} published;

static const published known[] = {
    {COEFFICIENTS_SIMPLE, 1, 0, {{3.4445, -4.7750, 2.0315}}},
    {COEFFICIENTS_QUINTIC,
     5,
     0,
     {{4.0848, -6.8946, 2.9270},
      {3.9505, -6.3029, 2.6377},
      {3.7418, -5.5913, 2.3037},
      {2.8769, -3.1427, 1.2046},
      {2.8366, -3.0525, 1.2012}}},
    {COEFFICIENTS_YOU,
     5,
     0,
     {{4.0848, -6.8946, 2.9270},
      {3.9505, -6.3029, 2.6377},
      {3.7418, -5.5913, 2.3037},
      {2.8769, -3.1427, 1.2046},
      {2.8366, -3.0525, 1.2012}}},
    {COEFFICIENTS_POLAR_EXPRESS,
     8,
     7,
     {{8.28721201814563, -23.595886519098837, 17.300387312530933},
      {4.107059111542203, -2.9478499167379106, 0.5448431082926601},
      {3.9486908534822946, -2.908902115962949, 0.5518191394370137},
      {3.3184196573706015, -2.488488024314874, 0.51004894012372},
      {2.300652019954817, -1.6689039845747493, 0.4188073119525673},
      {1.891301407787398, -1.2679958271945868, 0.37680408948524835},
      {1.8750014808534479, -1.2500016453999487, 0.3750001645474248},
      {1.875, -1.25, 0.375}}},
    {COEFFICIENTS_POLAR_EXPRESS_NVIDIA,
     8,
     7,
     {{8.2051, -22.9019, 16.4607},
      {4.0664, -2.8612, 0.5184},
      {3.9096, -2.8234, 0.5250},
      {3.2856, -2.4153, 0.4853},
      {2.2779, -1.6198, 0.3985},
      {1.8726, -1.2307, 0.3585},
      {1.8564, -1.2132, 0.3568},
      {1.8750, -1.2500, 0.3750}}},
    {COEFFICIENTS_POLAR_EXPRESS_SPEEDRUN,
     5,
     4,
     {{8.156554524902461, -22.48329292557795, 15.878769915207462},
      {4.042929935166739, -2.808917465908714, 0.5000178451051316},
      {3.8916678022926607, -2.772484153217685, 0.5060648178503393},
      {3.285753657755655, -2.3681294933425376, 0.46449024233003106},
      {2.3465413258596377, -1.7097828382687081, 0.42323551169305323}}},
    {COEFFICIENTS_CANS,
     5,
     4,
     {{8.4703, -25.1081, 18.6293},
      {4.1828, -3.1087, 0.5806},
      {3.9619, -2.9541, 0.5630},
      {3.2866, -2.4647, 0.5074},
      {2.2737, -1.6447, 0.4162}}},
    {COEFFICIENTS_TURBO,
     4,
     3,
     {{3.9505, -6.3029, 2.6377},
      {3.7418, -5.5913, 2.3037},
      {2.8769, -3.1427, 1.2046},
      {2.8366, -3.0525, 1.2012}}},
    {COEFFICIENTS_AOL4,
     4,
     3,
     {{4.6051, -9.6552, 5.6769},
      {4.7505, -6.0861, 2.1790},
      {2.7763, -2.3190, 0.5523},
      {2.4231, -2.2861, 0.8193}}},
};

static void test_published_rows(void **state) {
    (void)state;
    for (size_t k = 0; k < sizeof known / sizeof *known; k++)
        for (int repeat = REPEAT_AUTO; repeat <= REPEAT_LAST; repeat++) {
            const published *p = &known[k];
            settings s = settings_of(p->set, 19);
            s.coefficient_repeat = repeat;
            const sequence q = rows_of(&s);
            const int after = repeat == REPEAT_CYCLE  ? 0
                              : repeat == REPEAT_LAST ? p->count - 1
                                                      : p->after;
            for (int i = 0; i < 19; i++) {
                const int beyond = after == 0 ? i % p->count : after;
                const double *row = p->rows[i < p->count ? i : beyond];
                assert_row(q.rows[i], row[0], row[1], row[2], 0.0);
            }
        }
    settings s = settings_of(COEFFICIENTS_DEEPSEEKV4, 10);
    sequence q = rows_of(&s);
    for (int i = 0; i < 10; i++)
        if (i < 8)
            assert_row(q.rows[i], 3.4445, -4.7750, 2.0315, 0.0);
        else
            assert_row(q.rows[i], 2.0, -1.5, 0.5, 0.0);
    s = settings_of(COEFFICIENTS_CUBIC5, 5);
    q = rows_of(&s);
    assert_row(q.rows[0], 3.3656576, -3.3420992, 0.0, 0.0);
    assert_row(q.rows[1], 2.5744352, -1.4957376, 0.0, 0.0);
    assert_row(q.rows[2], 2.5368962, -1.4312570, 0.0, 0.0);
    assert_row(q.rows[3], 2.4418906, -1.2764040, 0.0, 0.0);
    assert_row(q.rows[4], 2.2230472, -0.9630650, 0.0, 0.0);
}

static void test_steps_of_the_sets(void **state) {
    (void)state;
    for (int steps = 1; steps <= NS_MAX_STEPS; steps++) {
        settings s = settings_of(COEFFICIENTS_DEEPSEEKV4, steps);
        if (steps != 10)
            assert_refused(&s, "ns_steps", "deepseekv4", "only 10");
        s.coefficients = COEFFICIENTS_CUBIC5;
        if (steps != 5)
            assert_refused(&s, "ns_steps", "cubic5", "only 5");
        s.coefficients = COEFFICIENTS_TURBO;
        rows_of(&s);
    }
    const settings none = settings_of(COEFFICIENTS_SIMPLE, 0);
    assert_refused(&none, "ns_steps is 0", "1 to 32");
    const settings many = settings_of(COEFFICIENTS_SIMPLE, NS_MAX_STEPS + 1);
    assert_refused(&many, "ns_steps is 33", "1 to 32");
}

/* sigma_out of sigma_in in [0.01, 1], exact arithmetic, rounded outward at the last digit given:
 * both ends have to be met that closely too. */
static void assert_bounds(const settings *s, double low, double high, double digit) {
    const sequence q = rows_of(s);
    double smallest = INFINITY, largest = -INFINITY;
    for (int i = 0; i <= 400000; i++) {
        const double out = through(&q, 0.01 + 0.99 * i / 4e5);
        smallest = fmin(smallest, out);
        largest = fmax(largest, out);
    }
    if (!(smallest >= low && smallest < low + 1.01 * digit && largest <= high &&
          largest > high - 1.01 * digit))
        fail_msg("set %d: [%.8f, %.8f] is not [%.8f, %.8f]", s->coefficients, smallest, largest,
                 low, high);
}

static void test_bounds_of_the_sets(void **state) {
    (void)state;
    static const struct {
        int set, steps;
        double low, high, digit;
    } bounds[] = {
        {COEFFICIENTS_SIMPLE, 5, .6818, 1.1344, 1e-4},
        {COEFFICIENTS_QUINTIC, 5, .9777, 1.0318, 1e-4},
        {COEFFICIENTS_POLAR_EXPRESS, 5, .8764, 1.1236, 1e-4},
        {COEFFICIENTS_POLAR_EXPRESS_COMPUTED, 5, .8764, 1.1236, 1e-4},
        {COEFFICIENTS_POLAR_EXPRESS_NVIDIA, 8, 1.0 - 1e-6, 1.0 + 1e-6, 1e-6},
        {COEFFICIENTS_CANS, 5, .8843, 1.1199, 1e-4},
        {COEFFICIENTS_AOL4, 4, .9409, 1.0501, 1e-4},
        {COEFFICIENTS_TURBO, 4, .9726, 1.1451, 1e-4},
        {COEFFICIENTS_POLAR_EXPRESS_SPEEDRUN, 5, .8588, 1.1412, 1e-4},
        {COEFFICIENTS_DEEPSEEKV4, 10, .9999, 1.0006, 1e-4},
        {COEFFICIENTS_CUBIC5, 5, .7741, 1.3001, 1e-4},
    };
    for (size_t i = 0; i < sizeof bounds / sizeof *bounds; i++) {
        const settings s = settings_of(bounds[i].set, bounds[i].steps);
        assert_bounds(&s, bounds[i].low, bounds[i].high, bounds[i].digit);
    }
    settings s = settings_of(COEFFICIENTS_POLAR_EXPRESS, 5);
    s.coefficient_safety = 1.05;
    s.coefficient_safety_form = SAFETY_POWERS;
    assert_bounds(&s, .8460, 1.1236, 1e-4);
    s = settings_of(COEFFICIENTS_DEEPSEEKV4, 10);
    const sequence v4 = rows_of(&s);
    for (int i = 0; i <= 10000; i++)
        assert_true(through(&v4, 0.01 + 0.99 * i / 1e4) >= .99999);
    s = settings_of(COEFFICIENTS_AOL4, 4);
    const sequence aol = rows_of(&s);
    assert_close(through(&aol, 1e-3), .1466, 1e-4);
    s = settings_of(COEFFICIENTS_TURBO, 4);
    const sequence turbo = rows_of(&s);
    assert_close(through(&turbo, 1e-3), .1203, 1e-4);
}

/* ---- Polar Express for any lower bound ---- */

static void test_computed_equals_published(void **state) {
    (void)state;
    settings s = settings_of(COEFFICIENTS_POLAR_EXPRESS_COMPUTED, 12);
    const sequence computed = rows_of(&s);
    s.coefficients = COEFFICIENTS_POLAR_EXPRESS;
    const sequence rows = rows_of(&s);
    /* From the seventh row on l/u is so near to 1 that coefficients, not values of p, lose digits
     * in fp64; the published eighth is the limit for l = u. */
    static const double tolerance[] = {3e-15, 3e-15, 3e-15, 3e-15, 3e-15, 3e-15, 1e-10, 1e-8};
    for (int i = 0; i < 8; i++)
        assert_row(computed.rows[i], rows.rows[i].a, rows.rows[i].b, rows.rows[i].c, tolerance[i]);
}

/* p alternates on [l, u] as Chebyshev wants it: centre - e, + e, - e, + e, at l, two points in
 * between, and u, and nowhere else is it further from the centre. The grid meets an extreme to a
 * step, its value to the square of that. */
static void assert_alternates(coefficient_row k, double l, double u) {
    enum { GRID = 20000 };
    const double centre = 0.5 * (powers(k, l) + powers(k, u)), e = powers(k, u) - centre;
    const double tolerance = 3e-8 * e + 2e-15;
    double up = -INFINITY, down_after = INFINITY;
    bool found = false;
    for (int i = 1; i < GRID; i++) {
        const double p = powers(k, l + (u - l) * i / GRID) - centre;
        assert_true(fabs(p) <= e + tolerance);
        if (found)
            continue;
        down_after = p > up ? p : fmin(down_after, p);
        up = fmax(up, p);
        found = up >= e - tolerance && down_after <= -e + tolerance;
    }
    assert_close(up, e, tolerance);
    assert_close(down_after, -e, tolerance);
    assert_true(e > 0.0);
}

/* Chebyshev: an odd quintic (three coefficients) is the nearest to 1 on [l, u] exactly when 1 - p
 * takes its largest size at four points with alternating signs. Where l is below the cushion that
 * holds on [cushion u, u] but for one factor, which centres p on 1 over [l, u]. */
static void test_computed_is_best_at_every_step(void **state) {
    (void)state;
    static const double bounds[] = {1e-10, 1e-6, 1e-3, 0.02, 0.024, 0.0241, 0.1, 0.5, 0.9, 0.98};
    const double cushion = 0.02407327424182761;
    int best = 0, cushioned = 0, converged = 0;
    for (size_t b = 0; b < sizeof bounds / sizeof *bounds; b++) {
        settings s = settings_of(COEFFICIENTS_POLAR_EXPRESS_COMPUTED, 24);
        s.polar_lower_bound = bounds[b];
        const sequence q = rows_of(&s);
        double l = bounds[b], u = 1.0;
        for (int i = 0; i < q.steps; i++) {
            const coefficient_row k = q.rows[i];
            const double low = powers(k, l), high = powers(k, u);
            if (1.0 - l / u < 5e-6) {
                assert_row(k, 15.0 / 8.0 / u, -10.0 / 8.0 / pow(u, 3.0), 3.0 / 8.0 / pow(u, 5.0),
                           4e-15);
                converged++;
            } else if (1.0 - l / u < 1e-3) { /* too near to 1 for extremes to be told apart */
                assert_close(low, 1.0, 1e-10);
                assert_close(high, 1.0, 1e-10);
            } else {
                const bool small = l < cushion * u;
                assert_alternates(k, small ? cushion * u : l, u);
                assert_close(0.5 * (low + high), 1.0, 5e-14);
                *(small ? &cushioned : &best) += 1;
            }
            l = low;
            u = 2.0 - l;
        }
        assert_close(l, 1.0, 5e-14);
    }
    assert_true(best > 20 && cushioned > 20 && converged > 20);
}

/* ---- safety ---- */

static void test_safety(void **state) {
    (void)state;
    static const double t = 1.02;
    for (int form = SAFETY_FACTOR; form <= SAFETY_POWERS; form++)
        for (int last = 0; last <= 1; last++)
            for (int only_fp16 = 0; only_fp16 <= 1; only_fp16++)
                for (int dtype = NS_FP32; dtype <= NS_FP16; dtype++) {
                    settings s = settings_of(COEFFICIENTS_POLAR_EXPRESS, 5);
                    const sequence raw = rows_of(&s);
                    s.coefficient_safety = t;
                    s.coefficient_safety_form = form;
                    s.coefficient_safety_for = only_fp16 ? SAFETY_FOR_FP16 : SAFETY_FOR_ALL;
                    s.safety_last = last;
                    const sequence q = rows_in(&s, (ns_dtype)dtype);
                    for (int i = 0; i < 5; i++) {
                        const bool safe = (i < 4 || last) && (!only_fp16 || dtype == NS_FP16);
                        const double odd = form == SAFETY_POWERS ? 1.0 : 0.0;
                        assert_row(q.rows[i], raw.rows[i].a * pow(t, safe ? -1.0 : 0.0),
                                   raw.rows[i].b * pow(t, safe ? -1.0 - 2.0 * odd : 0.0),
                                   raw.rows[i].c * pow(t, safe ? -1.0 - 4.0 * odd : 0.0), 4e-16);
                    }
                }
    /* "the last" is the last step's, however many rows there are */
    settings s = settings_of(COEFFICIENTS_SIMPLE, 3);
    s.coefficient_safety = 2.0;
    s.safety_last = 0;
    const sequence q = rows_of(&s);
    assert_row(q.rows[1], 3.4445 / 2.0, -4.7750 / 2.0, 2.0315 / 2.0, 0.0);
    assert_row(q.rows[2], 3.4445, -4.7750, 2.0315, 0.0);
}

/* ---- lists ---- */

static void test_custom_lists(void **state) {
    (void)state;
    static const char *const locales[] = {"C", "de_DE.UTF-8", "fr_FR.UTF-8", "de_DE.utf8"};
    settings s = settings_of(COEFFICIENTS_CUSTOM, 4);
    s.custom_coefficients = "3.5,-4.25,2\n  1.5 , -.5e0,+0.0  \n";
    for (size_t i = 0; i < sizeof locales / sizeof *locales; i++) {
        if (!setlocale(LC_NUMERIC, locales[i]))
            continue;
        const sequence q = rows_of(&s);
        assert_row(q.rows[0], 3.5, -4.25, 2.0, 0.0);
        for (int k = 1; k < 4; k++)
            assert_row(q.rows[k], 1.5, -0.5, 0.0, 0.0);
    }
    setlocale(LC_NUMERIC, "C");
    s.coefficient_repeat = REPEAT_CYCLE;
    const sequence q = rows_of(&s);
    assert_row(q.rows[2], 3.5, -4.25, 2.0, 0.0);
    assert_row(q.rows[3], 1.5, -0.5, 0.0, 0.0);
    s.ns_steps = 1; /* more rows than steps, as with published sets */
    assert_row(rows_of(&s).rows[0], 3.5, -4.25, 2.0, 0.0);

    s.custom_coefficients = "";
    assert_refused(&s, "custom_coefficients is empty", "a,b,c");
    static const char *const bad[] = {"1,2",      "1,2,3,4", "1,,3",     "1,2,",    "a,b,c",
                                      "1,2,nan",  "1,2,inf", "0x1,2,3",  "1,2,1e7", "1,2,3 4",
                                      "1,2,1e99", "",        "1,2,1e999"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        char list[64], quoted[64];
        snprintf(list, sizeof list, "1,2,3\n%s\n4,5,6\n", bad[i]);
        snprintf(quoted, sizeof quoted, "item 2 is \"%s\"", bad[i]);
        s.custom_coefficients = list;
        assert_refused(&s, "custom_coefficients", quoted);
    }
    char longest[200];
    memset(longest, '1', sizeof longest);
    memcpy(longest + sizeof longest - 2, "\n", 2);
    s.custom_coefficients = longest;
    assert_refused(&s, "custom_coefficients", "item 1 is \"1111");
    char list[7 * NS_MAX_STEPS + 8] = "";
    for (int i = 0; i < NS_MAX_STEPS; i++)
        strcat(list, "2,-1,0\n");
    s.custom_coefficients = list;
    s.ns_steps = NS_MAX_STEPS;
    assert_row(rows_of(&s).rows[NS_MAX_STEPS - 1], 2.0, -1.0, 0.0, 0.0);
    strcat(list, "2,-1,0\n");
    assert_refused(&s, "custom_coefficients", "more than 32");
}

/* ---- the check ---- */

static const double roundoff[] = {
    [NS_FP32] = 0x1p-24, [NS_TF32] = 0x1p-11, [NS_BF16] = 0x1p-8, [NS_FP16] = 0x1p-11};

static muonshard_status checked(const settings *s, ns_dtype dtype, error_text *error) {
    const sequence q = rows_in(s, dtype);
    return coefficients_check(s, dtype, q.rows, error);
}

static double fp32(double x) {
    const volatile float rounded = (float)x; /* gcc 12 may not round where it vectorises */
    return (double)rounded;
}

/* What the rule says, by sampling: a log grid, a dense one near the top, the top. *margin: how far
 * from the other verdict. */
static bool sampled(const settings *s, ns_dtype dtype, double *margin) {
    enum { GRID = 4000 };
    const double top =
        (1.0 + 2.0 * roundoff[dtype]) / (s->norm == NS_NORM_FROBENIUS_SAFETY ? 1.02 : 1.0);
    const sequence q = rows_in(s, dtype);
    double least = INFINITY, largest = 0.0;
    for (int i = 0; i <= 2 * GRID; i++) {
        double x = i <= GRID ? 1e-3 * pow(top / 1e-3, (double)i / GRID)
                             : top - 0.02 * pow((double)(i - GRID) / GRID, 3.0);
        for (int k = 0; k < q.steps; k++) {
            const double y = x * x;
            const double f = fp32(q.rows[k].a) + fp32(q.rows[k].b) * y + fp32(q.rows[k].c) * y * y;
            least = fmin(least, f);
            x *= f;
            if (least <= 0.0)
                break;
        }
        largest = fmax(largest, x);
    }
    *margin = fmin(fabs(least), fabs(1.5 - largest));
    return least > 0.0 && largest <= 1.5;
}

static void test_check_agrees_with_sampling(void **state) {
    (void)state;
    int good = 0, bad = 0;
    for (int set = COEFFICIENTS_SIMPLE; set < COEFFICIENTS_CUSTOM; set++)
        for (int steps = 1; steps <= 10; steps++)
            for (int dtype = NS_FP32; dtype <= NS_FP16; dtype++)
                for (int variant = 0; variant < 4; variant++) {
                    settings s = settings_of(set, steps);
                    if ((set == COEFFICIENTS_DEEPSEEKV4 && steps != 10) ||
                        (set == COEFFICIENTS_CUBIC5 && steps != 5))
                        continue;
                    s.coefficient_safety = variant == 1 ? 1.01 : 1.0;
                    s.coefficient_safety_form = SAFETY_POWERS;
                    s.norm = variant == 2 ? NS_NORM_FROBENIUS_SAFETY : NS_NORM_FROBENIUS_ADD;
                    s.coefficient_repeat = variant == 3 ? REPEAT_CYCLE : REPEAT_AUTO;
                    double margin;
                    error_text error = {""};
                    const bool expected = sampled(&s, (ns_dtype)dtype, &margin);
                    const bool found = checked(&s, (ns_dtype)dtype, &error) == MUONSHARD_OK;
                    if (found != expected && margin > 1e-4)
                        fail_msg("set %d, %d steps, dtype %d, variant %d: %s", set, steps, dtype,
                                 variant, error.text);
                    *(found ? &good : &bad) += 1;
                }
    assert_true(good > 300 && bad > 100);
}

static void assert_checked(const settings *s, ns_dtype dtype, bool passes) {
    static const char *const names[] = {"fp32", "tf32", "bf16", "fp16"};
    error_text error = {""};
    const muonshard_status status = checked(s, dtype, &error);
    if ((status == MUONSHARD_OK) != passes)
        fail_msg("set %d in %s: %s", s->coefficients, names[dtype], error.text);
    if (passes)
        return;
    assert_int_equal(status, MUONSHARD_ERR_CONFIG);
    assert_non_null(strstr(error.text, names[dtype]));
    assert_non_null(strstr(error.text, "coefficient_check: off"));
    settings off = *s;
    off.coefficient_check = 1;
    assert_int_equal(checked(&off, dtype, &error), MUONSHARD_OK);
}

static void test_check_of_the_published(void **state) {
    (void)state;
    for (int dtype = NS_FP32; dtype <= NS_FP16; dtype++) {
        const bool fp32 = dtype == NS_FP32;
        settings s = settings_of(COEFFICIENTS_POLAR_EXPRESS, 5);
        assert_checked(&s, (ns_dtype)dtype, fp32);
        s.coefficient_safety = 1.05;
        s.coefficient_safety_form = SAFETY_POWERS;
        assert_checked(&s, (ns_dtype)dtype, true);
        s = settings_of(COEFFICIENTS_CANS, 5);
        assert_checked(&s, (ns_dtype)dtype, fp32);
        s = settings_of(COEFFICIENTS_CUBIC5, 5);
        assert_checked(&s, (ns_dtype)dtype, dtype != NS_BF16);
        static const int fine[][2] = {
            {COEFFICIENTS_SIMPLE, 5},     {COEFFICIENTS_QUINTIC, 5},
            {COEFFICIENTS_YOU, 5},        {COEFFICIENTS_POLAR_EXPRESS_NVIDIA, 8},
            {COEFFICIENTS_TURBO, 4},      {COEFFICIENTS_AOL4, 4},
            {COEFFICIENTS_DEEPSEEKV4, 10}};
        for (size_t i = 0; i < sizeof fine / sizeof *fine; i++) {
            s = settings_of(fine[i][0], fine[i][1]);
            assert_checked(&s, (ns_dtype)dtype, true);
        }
        s = settings_of(COEFFICIENTS_POLAR_EXPRESS_SPEEDRUN, 5);
        s.norm = NS_NORM_FROBENIUS_SAFETY;
        assert_checked(&s, (ns_dtype)dtype, true);
        s = settings_of(COEFFICIENTS_SIMPLE, 5); /* grouped_fp16 */
        s.coefficient_safety = 1.02;
        assert_checked(&s, (ns_dtype)dtype, true);
    }
}

static void test_check_says_what_is_wrong(void **state) {
    (void)state;
    error_text error = {""};
    settings s = settings_of(COEFFICIENTS_CANS, 5);
    assert_int_equal(checked(&s, NS_BF16, &error), MUONSHARD_ERR_CONFIG);
    assert_non_null(strstr(error.text, "cans"));
    assert_non_null(strstr(error.text, "bf16"));
    assert_non_null(strstr(error.text, "1.0078125")); /* 1 + 2u */

    /* 1 - 4y + (4 - 2^-21) y^2 is negative only within 2e-4 of sigma^2 = 1/2; a hair above it the
     * set is sound. */
    s = settings_of(COEFFICIENTS_CUSTOM, 1);
    s.custom_coefficients = "1,-4,3.999999523162841796875\n";
    assert_int_equal(checked(&s, NS_FP32, &error), MUONSHARD_ERR_CONFIG);
    const char *at = strstr(error.text, "singular value ");
    assert_non_null(at);
    assert_close(strtod(at + strlen("singular value "), NULL), sqrt(0.5), 1e-4);
    s.custom_coefficients = "1,-4,4.0000004\n";
    assert_checked(&s, NS_FP32, true);

    /* In fp64 a window, rounded to fp32 none: b^2 - 4ac changes its sign. */
    s.custom_coefficients = "0.99999998,-4.00000023,4.000000476837158\n";
    assert_checked(&s, NS_FP32, true);

    /* -a + y <= 0 up to sigma = sqrt(a): below 1e-3 nobody looks. */
    s.custom_coefficients = "-1.1e-6,1,0\n";
    assert_checked(&s, NS_FP32, false);
    s.custom_coefficients = "-0.9e-6,1,0\n";
    assert_checked(&s, NS_FP32, true);

    /* The same window at the second step: sigma^2 = 1/2 there is sigma = sqrt(1/2)/1.25 here, for
     * the first step is 1.25 x. */
    s = settings_of(COEFFICIENTS_CUSTOM, 2);
    s.custom_coefficients = "1.25,0,0\n1,-4,3.999999523162841796875\n";
    assert_int_equal(checked(&s, NS_FP32, &error), MUONSHARD_ERR_CONFIG);
    at = strstr(error.text, "singular value ");
    assert_non_null(at);
    assert_close(strtod(at + strlen("singular value "), NULL), sqrt(0.5) / 1.25, 1e-4);
    assert_non_null(strstr(error.text, "step 2 of 2"));

    /* p = 3x - c x^3 has its maximum 2/sqrt(c) at sqrt(1/c): the limit is met inside, not at an
     * end. 2/sqrt(1.8) = 1.491, 2/sqrt(1.7) = 1.534. */
    s = settings_of(COEFFICIENTS_CUSTOM, 1);
    s.custom_coefficients = "3,-1.8,0\n";
    assert_checked(&s, NS_FP32, true);
    s.custom_coefficients = "3,-1.7,0\n";
    assert_int_equal(checked(&s, NS_FP32, &error), MUONSHARD_ERR_CONFIG);
    at = strstr(error.text, "singular value ");
    assert_non_null(at);
    assert_close(strtod(at + strlen("singular value "), NULL), sqrt(1.0 / 1.7), 1e-6);
    assert_non_null(strstr(error.text, "1.534"));

    /* Without an end, to infinity and beyond. */
    s = settings_of(COEFFICIENTS_CUSTOM, NS_MAX_STEPS);
    s.custom_coefficients = "1e6,1e6,1e6\n";
    assert_checked(&s, NS_FP32, false);
    s.custom_coefficients = "0,0,0\n";
    assert_checked(&s, NS_FP32, false);
    s.custom_coefficients = "1,0,0\n";
    assert_checked(&s, NS_FP32, true);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_published_rows),
        cmocka_unit_test(test_steps_of_the_sets),
        cmocka_unit_test(test_bounds_of_the_sets),
        cmocka_unit_test(test_computed_equals_published),
        cmocka_unit_test(test_computed_is_best_at_every_step),
        cmocka_unit_test(test_safety),
        cmocka_unit_test(test_custom_lists),
        cmocka_unit_test(test_check_agrees_with_sampling),
        cmocka_unit_test(test_check_of_the_published),
        cmocka_unit_test(test_check_says_what_is_wrong),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
