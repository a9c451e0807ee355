#include "optim/coefficients.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "config_internal.h"

typedef struct published_set {
    const char *name;
    const coefficient_row *rows;
    int count;
    bool cycle; /* steps beyond the last row begin again; else they repeat it */
    int steps;  /* the only number of steps; 0: any */
} published_set;

#define SIMPLE_ROW                                                                                 \
    { 3.4445, -4.7750, 2.0315 }

/* Keller Jordan 2024. */
static const coefficient_row simple[] = {SIMPLE_ROW};
/* You Jiacheng 2025; the last four are Turbo-Muon's (Boissin et al. 2025). */
static const coefficient_row quintic[] = {{4.0848, -6.8946, 2.9270},
                                          {3.9505, -6.3029, 2.6377},
                                          {3.7418, -5.5913, 2.3037},
                                          {2.8769, -3.1427, 1.2046},
                                          {2.8366, -3.0525, 1.2012}};
/* Amsel, Persson, Musco, Gower 2025, for a lower bound of 1e-3, without safety. */
static const coefficient_row polar_express[] = {
    {8.28721201814563, -23.595886519098837, 17.300387312530933},
    {4.107059111542203, -2.9478499167379106, 0.5448431082926601},
    {3.9486908534822946, -2.908902115962949, 0.5518191394370137},
    {3.3184196573706015, -2.488488024314874, 0.51004894012372},
    {2.300652019954817, -1.6689039845747493, 0.4188073119525673},
    {1.891301407787398, -1.2679958271945868, 0.37680408948524835},
    {1.8750014808534479, -1.2500016453999487, 0.3750001645474248},
    {1.875, -1.25, 0.375}};
/* NVIDIA Emerging-Optimizers: Polar Express with its safety in the rows. */
static const coefficient_row polar_express_nvidia[] = {
    {8.2051, -22.9019, 16.4607}, {4.0664, -2.8612, 0.5184}, {3.9096, -2.8234, 0.5250},
    {3.2856, -2.4153, 0.4853},   {2.2779, -1.6198, 0.3985}, {1.8726, -1.2307, 0.3585},
    {1.8564, -1.2132, 0.3568},   {1.8750, -1.2500, 0.3750}};
/* Likewise, as modded-nanogpt and Dion have it. */
static const coefficient_row polar_express_speedrun[] = {
    {8.156554524902461, -22.48329292557795, 15.878769915207462},
    {4.042929935166739, -2.808917465908714, 0.5000178451051316},
    {3.8916678022926607, -2.772484153217685, 0.5060648178503393},
    {3.285753657755655, -2.3681294933425376, 0.46449024233003106},
    {2.3465413258596377, -1.7097828382687081, 0.42323551169305323}};
/* Grishina, Smirnov, Rakhuba 2025. */
static const coefficient_row cans[] = {{8.4703, -25.1081, 18.6293},
                                       {4.1828, -3.1087, 0.5806},
                                       {3.9619, -2.9541, 0.5630},
                                       {3.2866, -2.4647, 0.5074},
                                       {2.2737, -1.6447, 0.4162}};
static const coefficient_row aol4[] = {{4.6051, -9.6552, 5.6769},
                                       {4.7505, -6.0861, 2.1790},
                                       {2.7763, -2.3190, 0.5523},
                                       {2.4231, -2.2861, 0.8193}};
static const coefficient_row deepseekv4[] = {
    SIMPLE_ROW, SIMPLE_ROW, SIMPLE_ROW, SIMPLE_ROW,       SIMPLE_ROW,
    SIMPLE_ROW, SIMPLE_ROW, SIMPLE_ROW, {2.0, -1.5, 0.5}, {2.0, -1.5, 0.5}};
static const coefficient_row cubic5[] = {{3.3656576, -3.3420992, 0.0},
                                         {2.5744352, -1.4957376, 0.0},
                                         {2.5368962, -1.4312570, 0.0},
                                         {2.4418906, -1.2764040, 0.0},
                                         {2.2230472, -0.9630650, 0.0}};

#define ROWS(x) x, sizeof x / sizeof x[0]
static const published_set sets[] = {
    [COEFFICIENTS_SIMPLE] = {"simple", ROWS(simple), true, 0},
    [COEFFICIENTS_QUINTIC] = {"quintic", ROWS(quintic), true, 0},
    [COEFFICIENTS_YOU] = {"you", ROWS(quintic), true, 0},
    [COEFFICIENTS_POLAR_EXPRESS] = {"polar_express", ROWS(polar_express), false, 0},
    [COEFFICIENTS_POLAR_EXPRESS_NVIDIA] = {"polar_express_nvidia", ROWS(polar_express_nvidia),
                                           false, 0},
    [COEFFICIENTS_POLAR_EXPRESS_SPEEDRUN] = {"polar_express_speedrun", ROWS(polar_express_speedrun),
                                             false, 0},
    [COEFFICIENTS_POLAR_EXPRESS_COMPUTED] = {"polar_express_computed", NULL, 0, false, 0},
    [COEFFICIENTS_CANS] = {"cans", ROWS(cans), false, 0},
    [COEFFICIENTS_TURBO] = {"turbo", quintic + 1, 4, false, 0},
    [COEFFICIENTS_AOL4] = {"aol4", ROWS(aol4), false, 0},
    [COEFFICIENTS_DEEPSEEKV4] = {"deepseekv4", ROWS(deepseekv4), false, 10},
    [COEFFICIENTS_CUBIC5] = {"cubic5", ROWS(cubic5), false, 5},
    [COEFFICIENTS_CUSTOM] = {"custom", NULL, 0, false, 0},
};

/* p(x) / x: what a singular value is multiplied by. */
static double factor(coefficient_row k, double x) {
    const double y = x * x;
    return k.a + y * (k.b + y * k.c);
}

/* Where p' = 0, ascending; how many there are. */
static int critical_points(coefficient_row k, double x[2]) {
    if (k.c == 0.0) {
        x[0] = sqrt(-k.a / (3.0 * k.b));
        return -k.a / k.b > 0.0;
    }
    const double root = sqrt(9.0 * k.b * k.b - 20.0 * k.a * k.c);
    int count = 0;
    for (int sign = -1; sign <= 1; sign += 2) {
        const double y = (-3.0 * k.b + sign * copysign(root, k.c)) / (10.0 * k.c);
        if (y > 0.0) /* false for NaN: p is monotone */
            x[count++] = sqrt(y);
    }
    return count;
}

/* ---- Polar Express for any lower bound: Amsel, Persson, Musco, Gower 2025 ---- */

#define POLAR_CUSHION 0.02407327424182761
/* l/u from where the best polynomial is that of l = u in fp64. */
#define POLAR_CONVERGED (1.0 - 5e-6)

/* The quintic nearest to 1 on [l, 1], in the largest norm: 1 - p is e, -e, e, -e at l, q, r, 1 with
 * q < r the critical points (Chebyshev), found by exchange (Remez). In y = x^2 the factor p(x)/x =
 * (1 -+ e)/x is a parabola through four points, hence its third divided difference vanishes, which
 * gives *largest = e. */
static coefficient_row minimax_quintic(double l, double *largest) {
    double x[4] = {l, (3.0 * l + 1.0) / 4.0, (l + 3.0) / 4.0, 1.0};
    coefficient_row k = {0};
    double e = 0.0, before = 1.0;
    for (int round = 0; round < 100 && fabs(e - before) > 1e-16; round++) {
        double one[4], sign[4]; /* divided differences of 1/x and of +-1/x, in place */
        for (int i = 0; i < 4; i++) {
            one[i] = 1.0 / x[i];
            sign[i] = i % 2 ? -one[i] : one[i];
        }
        for (int order = 1; order < 4; order++)
            for (int i = 3; i >= order; i--) {
                const double gap = (x[i] - x[i - order]) * (x[i] + x[i - order]);
                one[i] = (one[i] - one[i - 1]) / gap;
                sign[i] = (sign[i] - sign[i - 1]) / gap;
            }
        before = e;
        e = one[3] / sign[3];
        const double d0 = one[0] - e * sign[0], d1 = one[1] - e * sign[1],
                     d2 = one[2] - e * sign[2];
        const double y0 = x[0] * x[0], y1 = x[1] * x[1];
        k = (coefficient_row){d0 - d1 * y0 + d2 * y0 * y1, d1 - d2 * (y0 + y1), d2};
        critical_points(k, x + 1);
    }
    *largest = e;
    return k;
}

static double image(coefficient_row k, double x) {
    return x * factor(k, x);
}

static coefficient_row scaled(coefficient_row k, double s) {
    return (coefficient_row){k.a * s, k.b * s, k.c * s};
}

/* The best quintic on [l, u]; l too small for it counts as the cushion, and the result is centred
 * on 1 again: 1 - p(l) = p(u) - 1. */
static coefficient_row polar_quintic(double l, double u) {
    const double ratio = l / u;
    coefficient_row k = {1.875, -1.25, 0.375};
    if (ratio < POLAR_CONVERGED) {
        double e;
        k = minimax_quintic(fmax(ratio, POLAR_CUSHION), &e);
        if (ratio < POLAR_CUSHION) /* p(1) is 1 + e */
            k = scaled(k, 2.0 / (image(k, ratio) + 1.0 + e));
    }
    return (coefficient_row){k.a / u, k.b / (u * u * u), k.c / (u * u * u * u * u)};
}

static void polar_rows(double lower_bound, int steps, coefficient_row *rows) {
    double l = lower_bound, u = 1.0;
    for (int i = 0; i < steps; i++) {
        rows[i] = polar_quintic(l, u);
        l = image(rows[i], l);
        u = 2.0 - l;
    }
}

/* ---- lists from the config ---- */

#define ITEM_MAX      128
#define LARGEST_VALUE 1e6

/* "a,b,c", with spaces wherever. */
static bool parse_row(char *text, coefficient_row *row) {
    double value[3];
    for (int i = 0; i < 3; i++) {
        text += strspn(text, " ");
        char *end = text + strcspn(text, i < 2 ? "," : "");
        if (i < 2 && !*end)
            return false;
        char *next = end + (i < 2);
        while (end > text && end[-1] == ' ')
            end--;
        *end = '\0';
        if (!value_parse_real(text, &value[i]) || !(fabs(value[i]) <= LARGEST_VALUE))
            return false;
        text = next;
    }
    *row = (coefficient_row){value[0], value[1], value[2]};
    return true;
}

static muonshard_status parse_list(const char *list, coefficient_row rows[NS_MAX_STEPS], int *count,
                                   error_text *error) {
    *count = 0;
    for (const char *item = list, *end; *item; item = end + 1) {
        end = strchr(item, '\n');
        const size_t length = (size_t)(end - item);
        char text[ITEM_MAX] = "";
        FAIL_IF(*count == NS_MAX_STEPS, error, MUONSHARD_ERR_CONFIG,
                "custom_coefficients has more than %d items; there is one a step", NS_MAX_STEPS);
        if (length < ITEM_MAX)
            memcpy(text, item, length);
        FAIL_IF(!parse_row(text, &rows[*count]), error, MUONSHARD_ERR_CONFIG,
                "custom_coefficients: item %d is \"%.*s\"; allowed is \"a,b,c\", three numbers of "
                "at most %g",
                *count + 1, (int)(length < ITEM_MAX ? length : ITEM_MAX), item, LARGEST_VALUE);
        ++*count;
    }
    FAIL_IF(*count == 0, error, MUONSHARD_ERR_CONFIG,
            "custom_coefficients is empty; coefficients: custom needs an item \"a,b,c\" a step");
    return MUONSHARD_OK;
}

/* ---- one row a step ---- */

static coefficient_row with_safety(const settings *s, coefficient_row k) {
    const double d = s->coefficient_safety;
    const double d2 = s->coefficient_safety_form == SAFETY_POWERS ? d * d : 1.0;
    return (coefficient_row){k.a / d, k.b / (d * d2), k.c / (d * d2 * d2)};
}

muonshard_status coefficients_rows(const settings *s, ns_dtype dtype,
                                   coefficient_row rows[NS_MAX_STEPS], error_text *error) {
    FAIL_IF(s->ns_steps < 1 || s->ns_steps > NS_MAX_STEPS, error, MUONSHARD_ERR_CONFIG,
            "ns_steps is %lld; 1 to %d are allowed", (long long)s->ns_steps, NS_MAX_STEPS);
    const int steps = (int)s->ns_steps;
    published_set set = sets[s->coefficients];
    FAIL_IF(set.steps && set.steps != steps, error, MUONSHARD_ERR_CONFIG,
            "ns_steps is %d; with coefficients: %s only %d is allowed", steps, set.name, set.steps);
    coefficient_row own[NS_MAX_STEPS];
    if (s->coefficients == COEFFICIENTS_CUSTOM) {
        TRY(parse_list(s->custom_coefficients, own, &set.count, error));
        set.rows = own;
    } else if (s->coefficients == COEFFICIENTS_POLAR_EXPRESS_COMPUTED) {
        polar_rows(s->polar_lower_bound, steps, own);
        set.rows = own;
        set.count = steps;
    }
    const bool cycle =
        s->coefficient_repeat == REPEAT_AUTO ? set.cycle : s->coefficient_repeat == REPEAT_CYCLE;
    const bool safe = s->coefficient_safety_for == SAFETY_FOR_ALL || dtype == NS_FP16;
    for (int i = 0; i < steps; i++) {
        rows[i] = set.rows[i < set.count ? i : cycle ? i % set.count : set.count - 1];
        if (safe && (i + 1 < steps || s->safety_last))
            rows[i] = with_safety(s, rows[i]);
    }
    return MUONSHARD_OK;
}

/* ---- the check ---- */

#define CHECK_SMALLEST 1e-3
#define CHECK_LARGEST  1.5 /* of sigma_out */

typedef struct followed {
    double sigma, value; /* a singular value before the first step, and what it has become */
} followed;

/* A sigma between those of low and high that becomes `value` in between: the steps are continuous,
 * so there is one. */
static followed traced_back(const coefficient_row *rows, int steps, followed low, followed high,
                            double value) {
    for (int halving = 0; halving < 100; halving++) {
        followed middle = {0.5 * (low.sigma + high.sigma), 0.0};
        middle.value = middle.sigma;
        for (int i = 0; i < steps; i++)
            middle.value = image(rows[i], middle.value);
        *(middle.value < value ? &low : &high) = middle;
    }
    return (followed){low.sigma, value};
}

/* The values between low and high at which a step's image can be extreme, and its factor <= 0 if
 * it is anywhere: the ends, and where p' = 0. */
static int extremes(const coefficient_row *rows, int step, followed low, followed high,
                    followed points[4]) {
    double x[2];
    const int critical = critical_points(rows[step], x);
    int count = 2;
    points[0] = high;
    points[1] = low;
    for (int i = 0; i < critical; i++)
        if (x[i] > low.value && x[i] < high.value)
            points[count++] = traced_back(rows, step, low, high, x[i]);
    return count;
}

/* volatile: gcc 12 leaves the rounding out where it turns two neighbours into fp32 and back at
 * once.
 */
static double to_fp32(double x) {
    volatile float narrow = (float)x;
    return (double)narrow;
}

/* Exact, not sampled: a continuous image of an interval is the interval between its extremes. */
muonshard_status coefficients_check(const settings *s, ns_dtype dtype, const coefficient_row *rows,
                                    error_text *error) {
    static const char *const names[] = {"fp32", "tf32", "bf16", "fp16"};
    static const double roundoff[] = {0x1p-24, 0x1p-11, 0x1p-8, 0x1p-11};
    if (s->coefficient_check)
        return MUONSHARD_OK;
    const double top =
        (1.0 + 2.0 * roundoff[dtype]) / (s->norm == NS_NORM_FROBENIUS_SAFETY ? 1.02 : 1.0);
    const char *set = sets[s->coefficients].name;
    coefficient_row fp32[NS_MAX_STEPS];
    followed low = {CHECK_SMALLEST, CHECK_SMALLEST}, high = {top, top};
    for (int i = 0; i < (int)s->ns_steps; i++) {
        fp32[i] = (coefficient_row){to_fp32(rows[i].a), to_fp32(rows[i].b), to_fp32(rows[i].c)};
        followed points[4];
        const int count = extremes(fp32, i, low, high, points);
        for (int p = 0; p < count; p++) {
            const double f = factor(fp32[i], points[p].value);
            FAIL_IF(!(f > 0.0), error, MUONSHARD_ERR_CONFIG,
                    "coefficients: %s with ns_dtype %s: step %d of %d flips the singular value "
                    "%.9g (there %.4g, times %.3g); coefficient_check: off takes them anyway",
                    set, names[dtype], i + 1, (int)s->ns_steps, points[p].sigma, points[p].value,
                    f);
            points[p].value *= f;
        }
        low = high = points[0];
        for (int p = 1; p < count; p++) {
            low = points[p].value < low.value ? points[p] : low;
            high = points[p].value > high.value ? points[p] : high;
        }
    }
    FAIL_IF(!(high.value <= CHECK_LARGEST), error, MUONSHARD_ERR_CONFIG,
            "coefficients: %s with ns_dtype %s: %d steps make %.4g of the singular value %.9g, "
            "more than %g; coefficient_check: off takes them anyway",
            set, names[dtype], (int)s->ns_steps, high.value, high.sigma, CHECK_LARGEST);
    return MUONSHARD_OK;
}
