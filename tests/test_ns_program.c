/* Compiled Newton-Schulz programs, run by a small interpreter over diagonal matrices in fp64,
 * against the polynomial itself; restarts and operation counts against what is published. */
#include "config.h"
#include "optim/coefficients.h" /* before cmocka.h, whose macro `fail` would hide a function */
#include "optim/gram.h"
#include "optim/newton_schulz.h"

#include <stdarg.h>
#include <setjmp.h>
#include <cmocka.h>

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { M = 61, N = 200 }; /* as rectangular as Gram needs to be cheaper */

static settings settings_of(int set, int steps, int form) {
    return (settings){.coefficients = set,
                      .ns_steps = steps,
                      .ns_form = form,
                      .norm = NS_NORM_FROBENIUS_MAX,
                      .norm_eps = NAN,
                      .custom_coefficients = "2.5,-2.25,0.625\n2.25,-1.5,0\n0.875,0.0625,0\n"
                                             "1.875,-1.25,0.375\n",
                      .polar_lower_bound = 1e-3,
                      .coefficient_safety = 1.0,
                      .safety_last = 1,
                      .gram_restarts = "auto"};
}

static ns_program compiled_for(const settings *s, muonshard_dtype param, int64_t m, int64_t n) {
    ns_program p;
    error_text error = {""};
    memset(&p, 0xa5, sizeof p); /* no field may be taken for set */
    if (newton_schulz_compile(s, param, false, m, n, &p, &error) != MUONSHARD_OK)
        fail_msg("%s", error.text);
    return p;
}

static ns_program compiled(const settings *s) {
    return compiled_for(s, MUONSHARD_FP32, M, N);
}

static void refused(const settings *s, muonshard_dtype param, int64_t m, int64_t n,
                    muonshard_status status, const char *const *words) {
    ns_program p;
    error_text error = {""};
    assert_int_equal(newton_schulz_compile(s, param, false, m, n, &p, &error), status);
    for (; *words; words++)
        if (!strstr(error.text, *words))
            fail_msg("\"%s\" does not say \"%s\"", error.text, *words);
}
#define assert_refused(s, ...)                                                                     \
    refused(s, MUONSHARD_FP32, M, N, MUONSHARD_ERR_CONFIG, (const char *const[]){__VA_ARGS__, NULL})

/* ---- the interpreter ---- */

/* X, Y are diag(x) with columns of zeros behind, the others diagonal: one number a singular value.
 * NS_NORMALIZE leaves X as it is. */
typedef struct machine {
    double at[NS_BUFFER_COUNT][M];
    bool written[NS_BUFFER_COUNT];
    double wide[NS_MAX_STEPS][M]; /* every X after the first, in order */
    int wide_count, identity_count;
} machine;

static bool is_wide(ns_buffer b) {
    return b == NS_X || b == NS_Y;
}

static const double *operand(const machine *v, ns_buffer b, bool wide) {
    assert_true(b < NS_BUFFER_COUNT && v->written[b] && is_wide(b) == wide);
    return v->at[b];
}

/* dst = value; whether the shapes of the operands allow it. */
static void perform(machine *v, const ns_instruction *op) {
    double value[M];
    if (op->kind == NS_NORMALIZE) {
        assert_true(op->dst == NS_X && !v->wide_count && op->b == NS_NONE && op->c == NS_NONE);
        if (op->a == NS_NONE)
            return;
        assert_false(is_wide(op->a));
        for (int j = 0; j < M; j++)
            v->at[op->a][j] = v->at[NS_X][j] * v->at[NS_X][j];
        v->written[op->a] = true;
        return;
    }
    assert_true(op->dst < NS_BUFFER_COUNT && op->dst != op->a && op->dst != op->b &&
                op->dst != op->c);
    const bool wide = op->kind == NS_PRODUCT;
    assert_int_equal(is_wide(op->dst), wide);
    assert_int_equal(op->b == NS_NONE,
                     op->kind == NS_SYMMETRIC_PRODUCT || op->kind == NS_ADD_IDENTITY);
    const double *a = operand(v, op->a, op->kind == NS_SYMMETRIC_PRODUCT && is_wide(op->a));
    const double *b = op->b == NS_NONE ? a : operand(v, op->b, wide);
    const double *c = op->c == NS_NONE ? NULL : operand(v, op->c, wide);
    for (int j = 0; j < M; j++)
        if (op->kind == NS_ADD_IDENTITY)
            value[j] = a[j] + (double)op->alpha;
        else
            value[j] = (double)op->alpha * a[j] * b[j] + (c ? (double)op->beta * c[j] : 0.0);
    memcpy(v->at[op->dst], value, sizeof value);
    v->written[op->dst] = true;
    if (wide)
        memcpy(v->wide[v->wide_count++], value, sizeof value);
    v->identity_count += op->kind == NS_ADD_IDENTITY;
}

static double sigma_of(int j) {
    return 1e-3 * pow(1e3, (double)j / (M - 1)); /* 1e-3 to 1 */
}

static machine run(const ns_program *p) {
    machine v = {.written = {[NS_X] = true}};
    for (int b = 0; b < NS_BUFFER_COUNT; b++)
        for (int j = 0; j < M; j++)
            v.at[b][j] = b == NS_X ? sigma_of(j) : NAN;
    assert_true(p->count > 0 && p->count <= NS_MAX_INSTRUCTIONS);
    assert_int_equal(p->code[0].kind, NS_NORMALIZE);
    for (int i = 0; i < p->count; i++) {
        assert_true(i == 0 || p->code[i].kind != NS_NORMALIZE);
        perform(&v, &p->code[i]);
    }
    assert_true(is_wide(p->result) && v.written[p->result]);
    int squares = 0;
    for (int b = NS_A; b <= NS_D; b++)
        if (v.written[b]) {
            assert_int_equal(b - NS_A, squares);
            squares++;
        }
    assert_int_equal(p->squares, squares);
    return v;
}

static double fp32(double x) {
    const volatile float rounded = (float)x; /* gcc 12 may not round where it vectorises */
    return (double)rounded;
}

/* sigma after the first `steps` steps, with coefficients as a backend gets them. */
static double polynomial(const settings *s, ns_dtype dtype, int steps, double sigma) {
    coefficient_row rows[NS_MAX_STEPS];
    assert_int_equal(coefficients_rows(s, dtype, rows, NULL), MUONSHARD_OK);
    for (int i = 0; i < steps; i++)
        sigma = fp32(rows[i].a) * sigma + fp32(rows[i].b) * pow(sigma, 3.0) +
                fp32(rows[i].c) * pow(sigma, 5.0);
    return sigma;
}

static void assert_polynomial(const settings *s, const ns_program *p, int steps, const double *x) {
    for (int j = 0; j < M; j++) {
        const double expected = polynomial(s, p->dtype, steps, sigma_of(j));
        if (!(fabs(x[j] - expected) <= 2e-9 * fabs(expected)))
            fail_msg("set %d form %d: sigma %g: %.12g is not %.12g", s->coefficients, s->ns_form,
                     sigma_of(j), x[j], expected);
    }
}

/* ---- the forms ---- */

static int steps_of(int set) {
    return set == COEFFICIENTS_DEEPSEEKV4 ? 10 : set == COEFFICIENTS_CUBIC5 ? 5 : 0;
}

static void test_every_form_is_the_polynomial(void **state) {
    (void)state;
    static const int counts[] = {1, 2, 3, 4, 5, 8, 13};
    for (int set = COEFFICIENTS_SIMPLE; set <= COEFFICIENTS_CUSTOM; set++)
        for (size_t c = 0; c < sizeof counts / sizeof *counts; c++)
            for (int form = NS_FORM_STANDARD; form <= NS_FORM_AUTO; form++)
                for (int norm = NS_NORM_FROBENIUS_ADD; norm <= NS_NORM_SPECTRAL; norm++) {
                    const int own = steps_of(set);
                    if (own && c > 0)
                        continue;
                    settings s = settings_of(set, own ? own : counts[c], form);
                    s.norm = norm;
                    s.coefficient_check = 1;
                    /* Six steps without safety push past 1 what the Gram form takes for R. */
                    s.coefficient_safety = s.ns_steps > 5 ? 1.05 : 1.0;
                    s.coefficient_safety_form = SAFETY_POWERS;
                    const ns_program p = compiled(&s);
                    const machine v = run(&p);
                    assert_polynomial(&s, &p, (int)s.ns_steps, v.at[p.result]);
                    if (form == NS_FORM_STANDARD)
                        assert_int_equal(v.wide_count, (int)s.ns_steps);
                }
}

/* Where Gram starts again X is the polynomial's value after as many steps; between, nothing is. */
static void test_restarts_are_where_they_are_asked_for(void **state) {
    (void)state;
    static const int sets[] = {COEFFICIENTS_SIMPLE, COEFFICIENTS_QUINTIC, COEFFICIENTS_CUBIC5,
                               COEFFICIENTS_CUSTOM};
    for (size_t k = 0; k < sizeof sets / sizeof *sets; k++)
        for (int mask = 0; mask < 32; mask++) {
            char text[32] = "";
            int at[6], count = 0;
            for (int i = 0; i < 5; i++) {
                if (!(mask >> i & 1))
                    continue;
                strcat(text, *text ? mask & 2 ? ", " : "," : "");
                strcat(text, (const char[]){(char)('0' + i), '\0'});
                if (i > 0) /* the first step starts anyway */
                    at[count++] = i;
            }
            at[count++] = 5;
            settings s = settings_of(sets[k], 5, NS_FORM_GRAM);
            s.gram_restarts = text;
            s.coefficient_check = 1;
            const ns_program p = compiled(&s);
            const machine v = run(&p);
            assert_int_equal(v.wide_count, count);
            assert_int_equal(v.identity_count, count);
            for (int i = 0; i < count; i++)
                assert_polynomial(&s, &p, at[i], v.wide[i]);
        }
}

static void test_squares_and_the_longest_program(void **state) {
    (void)state;
    settings s = settings_of(COEFFICIENTS_SIMPLE, NS_MAX_STEPS, NS_FORM_STANDARD);
    s.coefficient_check = 1;
    assert_int_equal(compiled(&s).squares, 2);
    s.ns_form = NS_FORM_GRAM;
    assert_int_equal(compiled(&s).squares, 4);
    char all[4 * NS_MAX_STEPS] = "1";
    for (int i = 2; i < NS_MAX_STEPS; i++) {
        const char item[] = {',', (char)('0' + i / 10), (char)('0' + i % 10), '\0'};
        strcat(all, item);
    }
    s.gram_restarts = all;
    s.coefficients = COEFFICIENTS_CUSTOM;
    s.custom_coefficients = "1.875,-1.25,0.375\n";
    const ns_program longest = compiled(&s);
    assert_polynomial(&s, &longest, NS_MAX_STEPS, run(&longest).at[longest.result]);
    s = settings_of(COEFFICIENTS_CUBIC5, 5, NS_FORM_STANDARD);
    assert_int_equal(compiled(&s).squares, 1);
    s.coefficients = COEFFICIENTS_CUSTOM;
    assert_int_equal(compiled(&s).squares, 2);
}

static void test_normalisation(void **state) {
    (void)state;
    static const double own[] = {[NS_NORM_FROBENIUS_ADD] = 1e-7,    [NS_NORM_FROBENIUS_MAX] = 1e-7,
                                 [NS_NORM_FROBENIUS_SAFETY] = 1e-7, [NS_NORM_AOL] = 1e-7,
                                 [NS_NORM_SCHATTEN4] = 1e-8,        [NS_NORM_SPECTRAL] = 1e-8};
    for (int form = NS_FORM_STANDARD; form <= NS_FORM_GRAM; form++)
        for (int norm = NS_NORM_FROBENIUS_ADD; norm <= NS_NORM_SPECTRAL; norm++) {
            settings s = settings_of(COEFFICIENTS_SIMPLE, 5, form);
            s.norm = norm;
            ns_program p = compiled(&s);
            assert_int_equal(p.code[0].norm, norm);
            assert_true(p.code[0].eps == own[norm]);
            /* aol and schatten4 leave A, and nobody computes it again */
            const bool leaves = norm == NS_NORM_AOL || norm == NS_NORM_SCHATTEN4;
            assert_int_equal(p.code[0].a, leaves ? NS_A : NS_NONE);
            int of_x = 0;
            for (int i = 0; i < p.count; i++)
                of_x += p.code[i].kind == NS_SYMMETRIC_PRODUCT && p.code[i].a == NS_X;
            assert_int_equal(of_x, (form == NS_FORM_STANDARD ? 3 : 1) - leaves);
            s.norm_eps = 1e-15;
            p = compiled(&s);
            assert_true(p.code[0].eps == 1e-15);
        }
}

static void test_dtypes(void **state) {
    (void)state;
    static const ns_dtype of_param[] = {
        [MUONSHARD_FP32] = NS_FP32, [MUONSHARD_BF16] = NS_BF16, [MUONSHARD_FP16] = NS_FP16};
    static const ns_dtype of_choice[] = {[NS_DTYPE_FP32] = NS_FP32,
                                         [NS_DTYPE_TF32] = NS_TF32,
                                         [NS_DTYPE_BF16] = NS_BF16,
                                         [NS_DTYPE_FP16] = NS_FP16};
    static const muonshard_dtype params[] = {MUONSHARD_FP32, MUONSHARD_BF16, MUONSHARD_FP16};
    for (int i = 0; i < 3; i++)
        for (int choice = NS_DTYPE_FP32; choice <= NS_DTYPE_PARAM; choice++) {
            settings s = settings_of(COEFFICIENTS_SIMPLE, 5, NS_FORM_STANDARD);
            s.ns_dtype = choice;
            const ns_dtype expected =
                choice == NS_DTYPE_PARAM ? of_param[params[i]] : of_choice[choice];
            assert_int_equal(newton_schulz_dtype(&s, params[i]), expected);
            assert_int_equal(compiled_for(&s, params[i], M, N).dtype, expected);
            assert_int_equal(compiled_for(&s, params[i], M, N).square_dtype, expected);
            s.ns_form = NS_FORM_GRAM; /* of bf16 on squares in fp32 */
            const ns_program p = compiled_for(&s, params[i], M, N);
            assert_int_equal(p.dtype, expected);
            assert_int_equal(p.square_dtype, expected == NS_BF16 ? NS_FP32 : expected);
            assert_int_equal(p.squares, 4);
        }
    /* The check is made for the working dtype, the safety too. */
    settings s = settings_of(COEFFICIENTS_POLAR_EXPRESS, 5, NS_FORM_STANDARD);
    s.ns_dtype = NS_DTYPE_PARAM;
    compiled_for(&s, MUONSHARD_FP32, M, N);
    refused(&s, MUONSHARD_BF16, M, N, MUONSHARD_ERR_CONFIG,
            (const char *const[]){"polar_express", "bf16", NULL});
    s.coefficient_safety = 1.05;
    s.coefficient_safety_form = SAFETY_POWERS;
    s.coefficient_safety_for = SAFETY_FOR_FP16;
    refused(&s, MUONSHARD_BF16, M, N, MUONSHARD_ERR_CONFIG, (const char *const[]){"bf16", NULL});
    const ns_program p = compiled_for(&s, MUONSHARD_FP16, M, N);
    assert_polynomial(&s, &p, 5, run(&p).at[p.result]);
}

static void test_what_cannot_be(void **state) {
    (void)state;
    settings s = settings_of(COEFFICIENTS_DEEPSEEKV4, 5, NS_FORM_STANDARD);
    assert_refused(&s, "deepseekv4", "10");
    s = settings_of(COEFFICIENTS_SIMPLE, 5, NS_FORM_STANDARD);
    static const char *const side[] = {"2147483648", NULL}, *const none[] = {NULL};
    refused(&s, MUONSHARD_FP32, 4, (int64_t)1 << 31, MUONSHARD_ERR_UNSUPPORTED, side);
    refused(&s, MUONSHARD_FP32, 5, 4, MUONSHARD_ERR_INTERNAL, none);
    compiled_for(&s, MUONSHARD_FP32, 4, INT32_MAX);
    bool automatic;
    gram_restarts restarts;
    assert_int_equal(gram_restarts_read(" 0 ,2,1", 3, &automatic, &restarts, NULL), MUONSHARD_OK);
    assert_false(automatic);
    assert_int_equal(restarts, 1 << 1 | 1 << 2);
    static const char *const bad[] = {
        "5", "1,5", "-1", "1,,2", "1,", ",1", "auto,1", "1 2", "x", "1;", "99999999999999999999"};
    for (int form = NS_FORM_GRAM; form <= NS_FORM_AUTO; form++)
        for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
            s.ns_form = form;
            s.gram_restarts = bad[i];
            assert_refused(&s, "gram_restarts", bad[i], "below 5");
        }
}

/* ---- restarts and counts ---- */

static gram_restarts planned_in(const settings *s, ns_dtype dtype) {
    coefficient_row rows[NS_MAX_STEPS];
    gram_restarts restarts = 0xffffffff;
    assert_int_equal(coefficients_rows(s, NS_FP32, rows, NULL), MUONSHARD_OK);
    assert_true(gram_restarts_plan(rows, (int)s->ns_steps, dtype, &restarts));
    return restarts;
}

static gram_restarts planned(const settings *s) {
    return planned_in(s, NS_FP16);
}

static int bits(gram_restarts x) {
    int count = 0;
    for (; x; x >>= 1)
        count += (int)(x & 1);
    return count;
}

static void test_published_restarts(void **state) {
    (void)state;
    settings s = settings_of(COEFFICIENTS_SIMPLE, 5, NS_FORM_GRAM);
    assert_int_equal(planned(&s), 1 << 3);
    s.coefficients = COEFFICIENTS_POLAR_EXPRESS;
    assert_int_equal(planned(&s), 1 << 1);
    s.coefficient_safety = 1.05;
    s.coefficient_safety_form = SAFETY_POWERS;
    assert_int_equal(planned(&s), 1 << 2);
    s = settings_of(COEFFICIENTS_POLAR_EXPRESS_NVIDIA, 8, NS_FORM_GRAM);
    assert_int_equal(bits(planned(&s)), 2);
    s = settings_of(COEFFICIENTS_DEEPSEEKV4, 10, NS_FORM_GRAM);
    assert_true(bits(planned(&s)) > 2);
    s = settings_of(COEFFICIENTS_SIMPLE, 1, NS_FORM_GRAM); /* nowhere to restart */
    assert_int_equal(planned(&s), 0);
    s = settings_of(COEFFICIENTS_SIMPLE, 2, NS_FORM_GRAM);
    assert_int_equal(planned(&s), 1 << 1);
}

/* bf16, on squares in fp32, needs none in five steps. */
static void test_restarts_by_dtype(void **state) {
    (void)state;
    static const int sets[] = {COEFFICIENTS_SIMPLE, COEFFICIENTS_QUINTIC,
                               COEFFICIENTS_POLAR_EXPRESS};
    for (size_t i = 0; i < sizeof sets / sizeof *sets; i++) {
        const settings s = settings_of(sets[i], 5, NS_FORM_GRAM);
        assert_int_equal(planned_in(&s, NS_BF16), 0);
        assert_int_equal(planned_in(&s, NS_FP32), planned_in(&s, NS_FP16));
        assert_int_equal(planned_in(&s, NS_TF32), planned_in(&s, NS_FP16));
        assert_int_equal(bits(planned_in(&s, NS_FP16)), 1);
    }
    const settings s = settings_of(COEFFICIENTS_DEEPSEEKV4, 10, NS_FORM_GRAM);
    assert_true(bits(planned_in(&s, NS_BF16)) < bits(planned_in(&s, NS_FP16)));
}

/* The rule in plain form: the largest condition Q has after any step, over every placement. */
static double condition_of(const coefficient_row *rows, int steps, unsigned restarts) {
    double worst = 0.0;
    for (int last = 0; last < steps; last++) {
        double least = INFINITY, largest = 0.0;
        for (int j = 0; j < 10000; j++) {
            double x = pow(10.0, -10.0 * j / 9999.0), r = x * x - 4e-4, q = 1.0;
            for (int i = 0; i <= last; i++) {
                if (restarts >> i & 1) {
                    x *= q;
                    r = x * x - 4e-4;
                    q = 1.0;
                }
                const double h = rows[i].a + rows[i].b * r + rows[i].c * r * r;
                q *= h;
                r *= h * h;
            }
            least = fmin(least, fabs(q));
            largest = fmax(largest, fabs(q));
        }
        worst = fmax(worst, largest / least);
    }
    return worst;
}

static void test_planned_restarts_are_the_best(void **state) {
    (void)state;
    static const int cases[][2] = {{COEFFICIENTS_SIMPLE, 5},
                                   {COEFFICIENTS_QUINTIC, 5},
                                   {COEFFICIENTS_CANS, 5},
                                   {COEFFICIENTS_CUBIC5, 5},
                                   {COEFFICIENTS_SIMPLE, 7},
                                   {COEFFICIENTS_TURBO, 4},
                                   {COEFFICIENTS_CUSTOM, 4},
                                   {COEFFICIENTS_AOL4, 3},
                                   {COEFFICIENTS_POLAR_EXPRESS_NVIDIA, 8}};
    for (size_t k = 0; k < sizeof cases / sizeof *cases; k++) {
        const settings s = settings_of(cases[k][0], cases[k][1], NS_FORM_GRAM);
        const int steps = cases[k][1];
        coefficient_row rows[NS_MAX_STEPS];
        assert_int_equal(coefficients_rows(&s, NS_FP32, rows, NULL), MUONSHARD_OK);
        unsigned best = 0;
        double least = INFINITY;
        for (int count = 1; count < steps && !(least < 1e8); count++)
            for (unsigned mask = 2; mask < 1U << steps; mask += 2)
                if (bits(mask) == count) {
                    const double c = condition_of(rows, steps, mask);
                    best = c < least ? mask : best;
                    least = fmin(c, least);
                }
        assert_true(least < 1e8);
        assert_int_equal(planned(&s), best);
    }
}

/* Rows with a zero at sigma^2 - 4e-4 for some sigma of the scan make Q singular wherever Gram
 * starts: asked for it is refused, `auto` does without. */
static void test_no_restarts_help(void **state) {
    (void)state;
    settings s = settings_of(COEFFICIENTS_CUSTOM, 3, NS_FORM_GRAM);
    s.custom_coefficients = "1.00040016006402561,-1.0008004802561,0\n";
    s.coefficient_check = 1;
    coefficient_row rows[NS_MAX_STEPS];
    assert_int_equal(coefficients_rows(&s, NS_FP32, rows, NULL), MUONSHARD_OK);
    rows[0].b = -rows[0].a / (1.0 - 4e-4); /* sigma = 1 */
    gram_restarts restarts;
    assert_false(gram_restarts_plan(rows, 3, NS_FP16, &restarts));
    s.custom_coefficients = "1e3,-1e6,1e6\n"; /* explodes in one step */
    s.ns_steps = 32;
    assert_refused(&s, "gram_restarts", "ns_steps 32");
    s.ns_form = NS_FORM_AUTO;
    assert_int_equal(compiled(&s).squares, 2);
    s.ns_form = NS_FORM_GRAM;
    s.gram_restarts = "1"; /* a list is taken as it is */
    assert_int_equal(compiled(&s).squares, 4);
}

static void assert_flops(const ns_program *p, double m, double n, double cubes) {
    const double expected = cubes * m * m * m;
    const double found = ns_program_flops(p, (int64_t)m, (int64_t)n);
    if (!(fabs(found / expected - 1.0) <= 1e-12))
        fail_msg("%.17g flops, not %.17g", found, expected);
}

static void test_flops_are_the_published_counts(void **state) {
    (void)state;
    static const int64_t shapes[][2] = {{1, 2}, {16, 17}, {64, 256}, {100, 1700}, {4096, 16384}};
    static const char *const lists[] = {"", "2", "1,3", "1,2,3,4", "4"};
    for (size_t k = 0; k < sizeof shapes / sizeof *shapes; k++)
        for (int norm = NS_NORM_FROBENIUS_ADD; norm <= NS_NORM_SPECTRAL; norm++) {
            const double m = (double)shapes[k][0], n = (double)shapes[k][1], a = n / m;
            settings s = settings_of(COEFFICIENTS_SIMPLE, 5, NS_FORM_STANDARD);
            s.norm = norm; /* that leaves A computes what step 1 would have */
            const ns_program p = compiled_for(&s, MUONSHARD_FP32, shapes[k][0], shapes[k][1]);
            const double standard = 5.0 * (3.0 * a + 1.0);
            assert_flops(&p, m, n, standard);
            for (int r = 0; r < 5; r++) {
                static const double restarts[] = {0, 1, 2, 4, 1};
                s.ns_form = NS_FORM_GRAM;
                s.gram_restarts = lists[r];
                const ns_program g = compiled_for(&s, MUONSHARD_FP32, shapes[k][0], shapes[k][1]);
                const double gram = 4.0 * 5.0 + 3.0 * (1.0 + restarts[r]) * (a - 1.0);
                assert_flops(&g, m, n, gram);
                s.ns_form = NS_FORM_AUTO;
                const ns_program either =
                    compiled_for(&s, MUONSHARD_FP32, shapes[k][0], shapes[k][1]);
                const bool pays = n >= 1.5 * m && gram < standard;
                assert_flops(&either, m, n, pays ? gram : standard);
                assert_int_equal(either.squares, pays ? 4 : 2);
            }
        }
    /* Cubic: no product for B or Z, but where Z begins (it takes part in a sum with aI). */
    settings s = settings_of(COEFFICIENTS_CUBIC5, 5, NS_FORM_STANDARD);
    const ns_program cubic = compiled_for(&s, MUONSHARD_FP32, 64, 256);
    assert_flops(&cubic, 64, 256, 5.0 * 3.0 * 4.0);
    s.ns_form = NS_FORM_GRAM;
    s.gram_restarts = "2";
    const ns_program gram = compiled_for(&s, MUONSHARD_FP32, 64, 256);
    assert_flops(&gram, 64, 256, 4.0 * 5.0 + 3.0 * 2.0 * 3.0 - 3.0);
}

/* In bf16 squares in fp32 cost twice as much: T(3a+1) against 3a + 2(4T-3) without a restart. */
static void test_auto_goes_by_cost(void **state) {
    (void)state;
    for (int64_t a = 1; a <= 5; a++) {
        settings s = settings_of(COEFFICIENTS_SIMPLE, 5, NS_FORM_AUTO);
        s.ns_dtype = NS_DTYPE_BF16;
        const ns_program p = compiled_for(&s, MUONSHARD_FP32, 64, 64 * a);
        const double standard = 5.0 * (3.0 * (double)a + 1.0), gram = 3.0 * (double)a + 34.0;
        assert_int_equal(p.squares, a > 1 && gram < standard ? 4 : 2);
        const double cost = ns_program_cost(&p, 64, 64 * a, false) / (64.0 * 64.0 * 64.0);
        assert_true(fabs(cost - (a > 1 ? fmin(standard, gram) : standard)) < 1e-9);
    }
}

/* On a device fp32 has no tensor cores: nothing makes up for squares in it, but fp16 has none. */
static void test_auto_on_a_device(void **state) {
    (void)state;
    static const ns_dtype_choice dtypes[] = {NS_DTYPE_BF16, NS_DTYPE_FP16};
    for (int64_t a = 2; a <= 4; a++)
        for (int d = 0; d < 2; d++) {
            settings s = settings_of(COEFFICIENTS_SIMPLE, 5, NS_FORM_AUTO);
            ns_program p;
            error_text error;
            s.ns_dtype = (int)dtypes[d];
            assert_int_equal(
                newton_schulz_compile(&s, MUONSHARD_FP32, true, 64, 64 * a, &p, &error),
                MUONSHARD_OK);
            assert_int_equal(p.squares, dtypes[d] == NS_DTYPE_FP16 ? 4 : 2);
        }
}

static void test_square_matrices_take_the_standard_form(void **state) {
    (void)state;
    settings s = settings_of(COEFFICIENTS_SIMPLE, 5, NS_FORM_STANDARD);
    const ns_program standard = compiled_for(&s, MUONSHARD_FP32, 64, 64);
    for (int form = NS_FORM_GRAM; form <= NS_FORM_AUTO; form++) {
        s.ns_form = form;
        const ns_program p = compiled_for(&s, MUONSHARD_FP32, 64, 64);
        assert_int_equal(p.count, standard.count);
        assert_int_equal(p.squares, 2);
        assert_flops(&p, 64, 64, 20.0);
        const ns_program wider = compiled_for(&s, MUONSHARD_FP32, 64, 65);
        assert_int_equal(wider.squares, form == NS_FORM_GRAM ? 4 : 2);
    }
}

/* Without a preset Gram is taken where it pays, on the host and on a device; presets that name a
 * system have its form. */
static void test_gram_by_default(void **state) {
    (void)state;
    static const struct {
        const char *yaml;
        bool gram[2]; /* [device], of 64 x 96 */
    } rows[] = {{"ns_dtype: fp16", {true, true}},
                {"ns_dtype: fp32", {true, true}},
                {"ns_dtype: bf16", {false, false}},
                {"{ns_dtype: fp16, ns_form: standard}", {false, false}},
                {"{ns_dtype: fp16, coefficients: deepseekv4, ns_steps: 10}", {true, true}},
                {"preset: grouped_fp16", {false, false}},
                {"{preset: grouped_fp16, ns_form: auto}", {true, true}},
                {"preset: jordan", {false, false}},
                {"preset: gram", {true, true}}};
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++)
        for (int device = 0; device <= 1; device++)
            for (int64_t n = 88; n <= 96; n += 8) {
                muonshard_config *config;
                ns_program p;
                assert_int_equal(muonshard_config_create(&config), MUONSHARD_OK);
                assert_int_equal(muonshard_config_load_string(config, rows[i].yaml), MUONSHARD_OK);
                assert_int_equal(newton_schulz_compile(config_settings(config), MUONSHARD_FP32,
                                                       device, 64, n, &p, NULL),
                                 MUONSHARD_OK);
                const bool asked = config_settings(config)->ns_form == NS_FORM_GRAM;
                assert_int_equal(p.squares, rows[i].gram[device] && (asked || n == 96) ? 4 : 2);
                muonshard_config_destroy(config);
            }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_form_is_the_polynomial),
        cmocka_unit_test(test_restarts_are_where_they_are_asked_for),
        cmocka_unit_test(test_squares_and_the_longest_program),
        cmocka_unit_test(test_normalisation),
        cmocka_unit_test(test_dtypes),
        cmocka_unit_test(test_what_cannot_be),
        cmocka_unit_test(test_published_restarts),
        cmocka_unit_test(test_restarts_by_dtype),
        cmocka_unit_test(test_planned_restarts_are_the_best),
        cmocka_unit_test(test_no_restarts_help),
        cmocka_unit_test(test_flops_are_the_published_counts),
        cmocka_unit_test(test_auto_goes_by_cost),
        cmocka_unit_test(test_auto_on_a_device),
        cmocka_unit_test(test_square_matrices_take_the_standard_form),
        cmocka_unit_test(test_gram_by_default),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
