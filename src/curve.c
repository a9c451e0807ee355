#include "curve.h"

#include <errno.h>
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "config_internal.h"

#define SEPARATORS " ,\t\r\n"
#define WORD_MAX   80

typedef struct point {
    double step, value;
    bool cosine; /* on the way to it from the point before */
} point;

typedef struct reader {
    const char *rest; /* of the schedule */
    int64_t total;
    char word[WORD_MAX]; /* the latest */
    bool any;            /* a point was read, left out or not */
    int64_t back;        /* of the latest point counted from the end */
    point last;          /* the latest that counts; step -infinity: none */
    error_text *error;
} reader;

static reader read_from(const char *schedule, int64_t total, error_text *error) {
    return (reader){.rest = schedule,
                    .total = total,
                    .back = INT64_MAX,
                    .last = {.step = -INFINITY},
                    .error = error};
}

/* An empty word: the end. */
static muonshard_status next_word(reader *r) {
    r->rest += strspn(r->rest, SEPARATORS);
    const size_t length = strcspn(r->rest, SEPARATORS);
    FAIL_IF(length >= WORD_MAX, r->error, MUONSHARD_ERR_CONFIG,
            "point \"%.40s...\" is not of the form STEP:VALUE", r->rest);
    memcpy(r->word, r->rest, length);
    r->word[length] = '\0';
    r->rest += length;
    return MUONSHARD_OK;
}

static bool read_count(const char *text, int64_t *count) {
    char *end;
    errno = 0;
    *count = strtoll(text, &end, 10);
    return *text >= '0' && *text <= '9' && !*end && errno == 0;
}

/* "12", "end" or "end-12"; `counts` is whether the point does, or is left out. */
static muonshard_status read_step(reader *r, const char *text, point *p, bool *counts) {
    int64_t number = 0;
    const bool from_end = strncmp(text, "end", 3) == 0;
    const bool good = from_end ? !text[3] || (text[3] == '-' && read_count(text + 4, &number))
                               : read_count(text, &number);
    FAIL_IF(!good, r->error, MUONSHARD_ERR_CONFIG,
            "point \"%s\": the step is \"%s\"; allowed: an integer >= 0, end, end-N", r->word,
            text);
    p->step = (double)(from_end ? r->total - number : number);
    *counts = !from_end || (r->total > 0 && p->step >= r->last.step);
    FAIL_IF(from_end ? number > r->back : p->step < r->last.step, r->error, MUONSHARD_ERR_CONFIG,
            "point \"%s\" comes before the point before it; steps do not fall", r->word);
    r->back = from_end ? number : r->back;
    return MUONSHARD_OK;
}

/* The next point that counts; `found` is false at the end. */
static muonshard_status next_point(reader *r, point *p, bool *found) {
    for (*found = false; !*found;) {
        *p = (point){0};
        TRY(next_word(r));
        if (strcmp(r->word, "cosine") == 0) {
            FAIL_IF(!r->any, r->error, MUONSHARD_ERR_CONFIG,
                    "\"cosine\" stands before the first point; it leads from one to the next");
            p->cosine = true;
            TRY(next_word(r));
        }
        FAIL_IF(p->cosine && !*r->word, r->error, MUONSHARD_ERR_CONFIG,
                "\"cosine\" stands after the last point; it leads from one to the next");
        if (!*r->word)
            return MUONSHARD_OK;
        char step[WORD_MAX];
        const size_t length = strcspn(r->word, ":");
        memcpy(step, r->word, length);
        step[length] = '\0';
        FAIL_IF(!r->word[length], r->error, MUONSHARD_ERR_CONFIG,
                "point \"%s\" is not of the form STEP:VALUE", r->word);
        TRY(read_step(r, step, p, found));
        /* Half of the largest number, so that differences are finite too. */
        FAIL_IF(!value_parse_real(r->word + length + 1, &p->value) || fabs(p->value) > DBL_MAX / 2,
                r->error, MUONSHARD_ERR_CONFIG,
                "point \"%s\": the value is \"%s\"; allowed: a finite number", r->word,
                r->word + length + 1);
        r->any = true;
        if (*found)
            r->last = *p;
    }
    return MUONSHARD_OK;
}

/* (1 - cos(pi t))/2 = sin(pi t/2)^2 for t in [0, 1], by Taylor's series on [0, pi/4]: a libm may
 * differ from another in the last bit, these operations don't. */
static double half_wave(double t) {
    if (t > 0.5)
        return 1.0 - half_wave(1.0 - t);
    const double x = 1.5707963267948966 * t;
    double series = 1.0;
    for (int k = 16; k > 0; k -= 2)
        series = 1.0 - x * x / (k * (k + 1)) * series;
    return x * series * (x * series);
}

muonshard_status curve_value(const char *schedule, int64_t step, int64_t total, double otherwise,
                             double *value, error_text *error) {
    reader r = read_from(schedule, total, error);
    const double at = (double)step;
    point left = {.step = -INFINITY}, right = {.step = INFINITY}, p;
    bool found;
    do { /* to the end: what is malformed is so at every step */
        TRY(next_point(&r, &p, &found));
        if (found && p.step <= at)
            left = p;
        else if (found && isinf(right.step))
            right = p;
    } while (found);
    if (isinf(right.step))
        *value = isinf(left.step) ? otherwise : left.value;
    else if (isinf(left.step))
        *value = right.value;
    else {
        const double t = (at - left.step) / (right.step - left.step);
        *value = left.value + (right.value - left.value) * (right.cosine ? half_wave(t) : t);
    }
    return MUONSHARD_OK;
}

muonshard_status curve_range(const char *schedule, int64_t total, double *lowest, double *highest,
                             error_text *error) {
    reader r = read_from(schedule, total, error);
    point p;
    bool found;
    *lowest = *highest = NAN;
    TRY(next_point(&r, &p, &found));
    while (found) { /* fmin, fmax: the other where one is NaN */
        *lowest = fmin(*lowest, p.value);
        *highest = fmax(*highest, p.value);
        TRY(next_point(&r, &p, &found));
    }
    return MUONSHARD_OK;
}

muonshard_status muonshard_schedule_value(const char *schedule, int64_t step, int64_t total,
                                          double otherwise, double *value) {
    if (!schedule || !value || step < 0 || total < 0)
        return MUONSHARD_ERR_ARGUMENT;
    return curve_value(schedule, step, total, otherwise, value, NULL);
}
