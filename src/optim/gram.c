#include "optim/gram.h"

#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

/* "1, 3" */
muonshard_status gram_restarts_read(const char *text, int steps, bool *planned,
                                    gram_restarts *restarts, error_text *error) {
    *restarts = 0;
    *planned = strcmp(text, "auto") == 0;
    const char *at = text + strspn(text, " ");
    bool more = !*planned && *at;
    while (more) {
        const size_t digits = strspn(at, "0123456789");
        const long step = digits ? strtol(at, NULL, 10) : steps;
        at += digits;
        at += strspn(at, " ");
        more = *at == ',';
        FAIL_IF(step >= steps || (*at && !more), error, MUONSHARD_ERR_CONFIG,
                "gram_restarts is \"%s\"; allowed are auto, empty, and a list of steps below %d "
                "(ns_steps), separated by commas",
                text, steps);
        *restarts |= (gram_restarts)1 << step;
        at += more;
        at += strspn(at, " ");
    }
    *restarts &= ~(gram_restarts)1;
    return MUONSHARD_OK;
}

/* ---- the plan ---- */

#define POINTS        10000
#define RATIO         0.99769983406707516 /* from a sigma to the next: 10^(-10/(POINTS-1)) */
#define STRIDE        101                 /* of the coarse points; first and last are among them */
#define COARSE        100
#define CONDITION_MAX 1e8
#define WORK_MAX      20000000L /* evaluations of a polynomial, about a tenth of a second */

/* What becomes of one singular value: of X, of R, of Q. */
typedef struct followed {
    double x, r, q;
} followed;

typedef struct search {
    const coefficient_row *rows;
    int steps;
    double sigma[POINTS]; /* 1 down to 1e-10, in equal ratios */
    double perturbation;  /* what rounding takes from an eigenvalue of R */
    double best;          /* condition of the restarts found; CONDITION_MAX when none are */
    gram_restarts found;
    long work;
} search;

static followed started(const search *s, double x) {
    return (followed){x, x * x - s->perturbation, 1.0};
}

static followed stepped(const search *s, followed v, coefficient_row k, bool restart) {
    if (restart)
        v = started(s, v.x * v.q);
    const double z = k.a + v.r * (k.b + v.r * k.c);
    return (followed){v.x, v.r * z * z, v.q * z};
}

/* Largest condition Q has after a step, over all points. */
static double condition(search *s, gram_restarts restarts) {
    double largest[NS_MAX_STEPS] = {0}, smallest[NS_MAX_STEPS], worst = 0.0;
    for (int i = 0; i < s->steps; i++)
        smallest[i] = INFINITY;
    for (int point = 0; point < POINTS; point++) {
        followed v = started(s, s->sigma[point]);
        for (int i = 0; i < s->steps; i++) {
            v = stepped(s, v, s->rows[i], restarts >> i & 1);
            largest[i] = fmax(largest[i], fabs(v.q));
            smallest[i] = fmin(smallest[i], fabs(v.q));
        }
    }
    s->work += (long)s->steps * POINTS;
    for (int i = 0; i < s->steps; i++)
        if (!(largest[i] / smallest[i] <= worst)) /* NaN counts */
            worst = largest[i] / smallest[i];
    return worst;
}

/* All ways to put `left` more restarts before steps from `step` on, earlier ones first. What a step
 * does to the coarse points bounds the condition from below. */
static void place(search *s, const followed before[COARSE], gram_restarts restarts, int step,
                  int left) {
    if (step == s->steps) {
        const double c = condition(s, restarts);
        if (c < s->best) {
            s->best = c;
            s->found = restarts;
        }
        return;
    }
    for (int restart = step > 0 && left > 0; restart >= 0; restart--) {
        if (left - restart > s->steps - step - 1 || s->work > WORK_MAX)
            continue;
        followed now[COARSE];
        double largest = 0.0, smallest = INFINITY;
        for (int i = 0; i < COARSE; i++) {
            now[i] = stepped(s, before[i], s->rows[step], restart);
            largest = fmax(largest, fabs(now[i].q));
            smallest = fmin(smallest, fabs(now[i].q));
        }
        s->work += COARSE;
        if (largest / smallest < s->best)
            place(s, now, restarts | (gram_restarts)restart << step, step + 1, left - restart);
    }
}

static bool plan(const coefficient_row *rows, int steps, ns_dtype dtype, gram_restarts *restarts) {
    const bool exact = dtype == NS_BF16;
    search s = {
        .rows = rows, .steps = steps, .perturbation = exact ? 1e-6 : 4e-4, .best = CONDITION_MAX};
    followed first[COARSE];
    for (int i = 0; i < POINTS; i++) {
        s.sigma[i] = i > 0 ? s.sigma[i - 1] * RATIO : 1.0;
        if (i % STRIDE == 0)
            first[i / STRIDE] = started(&s, s.sigma[i]);
    }
    for (int count = steps > 1 && !exact; count <= steps - 1 && s.best >= CONDITION_MAX; count++)
        place(&s, first, 0, 0, count);
    *restarts = s.found;
    return s.best < CONDITION_MAX;
}

/* The last one, which every shape of a plan asks for again; some milliseconds each time. */
static struct {
    pthread_mutex_t lock;
    coefficient_row rows[NS_MAX_STEPS];
    int steps;
    ns_dtype dtype;
    bool found;
    gram_restarts restarts;
} last = {.lock = PTHREAD_MUTEX_INITIALIZER};

bool gram_restarts_plan(const coefficient_row *rows, int steps, ns_dtype dtype,
                        gram_restarts *restarts) {
    const size_t bytes = (size_t)steps * sizeof *rows;
    pthread_mutex_lock(&last.lock);
    if (last.steps != steps || last.dtype != dtype || memcmp(last.rows, rows, bytes) != 0) {
        last.found = plan(rows, steps, dtype, &last.restarts);
        memcpy(last.rows, rows, bytes);
        last.steps = steps;
        last.dtype = dtype;
    }
    *restarts = last.restarts;
    const bool found = last.found;
    pthread_mutex_unlock(&last.lock);
    return found;
}
