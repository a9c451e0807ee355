#include "check_values.h"

#include <stdbool.h>
#include <stdio.h>

/* ---- the pattern ---- */

enum { MOST_VALUE = 61, EXACT = 1 << 24, EXAMINED = 64 };

/* Spreads the bits of a number (the finaliser of MurmurHash3). */
static uint32_t mix(size_t i) {
    uint32_t h = (uint32_t)i ^ (uint32_t)((uint64_t)i >> 32);
    h ^= h >> 16;
    h *= 0x85ebca6bU;
    h ^= h >> 13;
    h *= 0xc2b2ae35U;
    return h ^ h >> 16;
}

static int64_t weight(int rank, size_t digit) {
    return 1 + (rank >> (5 * digit) & (CHECK_BASE - 1));
}

static size_t digit_of(uint32_t h) {
    return h % CHECK_DIGITS;
}

static int64_t value_of(const check_pattern *p, uint32_t h) {
    const int64_t value = 1 + (int64_t)((h >> 12) % p->values);
    return h & 0x800 ? value : -value;
}

check_pattern check_pattern_make(int ranks) {
    check_pattern p = {.ranks = ranks};
    int64_t largest = 1;
    for (size_t d = 0; d < CHECK_DIGITS; d++) {
        for (int r = 0; r < ranks; r++)
            p.total[d] += weight(r, d);
        largest = p.total[d] > largest ? p.total[d] : largest;
    }
    p.values = EXACT / largest < MOST_VALUE ? (uint32_t)(EXACT / largest) : MOST_VALUE;
    return p;
}

float check_gradient(const check_pattern *p, int rank, size_t i) {
    const uint32_t h = mix(i);
    return (float)(weight(rank, digit_of(h)) * value_of(p, h));
}

float check_sum(const check_pattern *p, size_t i) {
    const uint32_t h = mix(i);
    return (float)(p->total[digit_of(h)] * value_of(p, h));
}

/* ---- what is wrong ---- */

/* Elements from the first wrong one on, in its slot, right ones too: what explains the wrong ones
 * has to explain why the others are right. */
typedef struct evidence {
    const check_pattern *p;
    const float *found;
    size_t count, slot;
    float factor;
    size_t first, length;
} evidence;

static size_t slots_of(const evidence *e) {
    return (e->count + e->slot - 1) / e->slot;
}

/* Whether weights `plus` more and `minus` less explain it; a rank below 0 adds nothing. */
static bool is_sum_with(const evidence *e, int plus, int minus) {
    for (size_t i = e->first; i < e->first + e->length; i++) {
        const float more = plus < 0 ? 0.0F : check_gradient(e->p, plus, i);
        const float less = minus < 0 ? 0.0F : check_gradient(e->p, minus, i);
        if (e->found[i] != e->factor * (check_sum(e->p, i) + more - less))
            return false;
    }
    return true;
}

static bool is_of_slot(const evidence *e, size_t other) {
    const size_t own = e->first / e->slot;
    for (size_t i = e->first; i < e->first + e->length; i++) {
        const size_t j = i - own * e->slot + other * e->slot;
        if (j < e->count && e->found[i] != e->factor * check_sum(e->p, j))
            return false;
    }
    return other != own;
}

static bool is_as_before(const evidence *e, float before) {
    for (size_t i = e->first; i < e->first + e->length; i++)
        if (e->found[i] != before * check_sum(e->p, i))
            return false;
    return true;
}

/* Several pairs of ranks explain the same sum. Every pair would be too many at thousands of ranks.
 */
static bool is_replaced(const evidence *e) {
    for (int r = 0; r < e->p->ranks && e->p->ranks <= 1024; r++)
        for (int s = 0; s < e->p->ranks; s++)
            if (r != s && is_sum_with(e, r, s))
                return true;
    return false;
}

static void find_cause(const evidence *e, float before, check_outcome *o) {
    o->cause = CHECK_BEFORE;
    if (is_as_before(e, before))
        return;
    for (o->who = 0; o->who < e->p->ranks; o->who++) {
        o->cause = is_sum_with(e, -1, o->who)   ? CHECK_MISSING
                   : is_sum_with(e, o->who, -1) ? CHECK_TWICE
                                                : CHECK_UNKNOWN;
        if (o->cause != CHECK_UNKNOWN)
            return;
    }
    o->cause = CHECK_SLOT;
    for (size_t s = 0; s < slots_of(e); s++)
        if (is_of_slot(e, s)) {
            o->who = (int32_t)s;
            return;
        }
    o->who = -1;
    o->cause = is_replaced(e) ? CHECK_REPLACED : CHECK_UNKNOWN;
}

check_outcome check_values(const check_pattern *p, const float *found, size_t count, size_t slot,
                           float factor, float before) {
    check_outcome o = {.cause = CHECK_RIGHT};
    evidence e = {p, found, count, slot, factor, 0, 0};
    for (size_t i = 0; i < count; i++) {
        const float expected = factor * check_sum(p, i);
        if (found[i] == expected)
            continue;
        if (o.wrong++ == 0) {
            o.first = i;
            o.found = found[i] / factor;
            o.expected = check_sum(p, i);
            o.owner = (int32_t)(i / slot);
        }
    }
    if (o.wrong == 0)
        return o;
    const size_t end = ((size_t)o.owner + 1) * slot, left = (end < count ? end : count) - o.first;
    e.first = o.first;
    e.length = left < EXAMINED ? left : EXAMINED;
    find_cause(&e, before, &o);
    return o;
}

static void cause_text(const check_outcome *o, char *text, size_t size) {
    switch ((check_cause)o->cause) {
    case CHECK_MISSING:
        snprintf(text, size, "as if rank %d's gradient were missing from the sum", o->who);
        break;
    case CHECK_TWICE:
        snprintf(text, size, "as if rank %d's gradient were added twice", o->who);
        break;
    case CHECK_REPLACED:
        snprintf(text, size, "as if one rank's gradient were in the place of another's");
        break;
    case CHECK_SLOT:
        snprintf(text, size, "it is what belongs in the slot of rank %d", o->who);
        break;
    case CHECK_BEFORE: snprintf(text, size, "it is what was there before the step"); break;
    default: snprintf(text, size, "nothing that is known explains it");
    }
}

void check_outcome_text(const check_outcome *o, const char *tensor, size_t count, char *text,
                        size_t size) {
    char cause[128];
    cause_text(o, cause, sizeof cause);
    snprintf(text, size,
             "%llu of %zu elements of '%s' are wrong, the first is %llu, owned by rank %d: its "
             "sum is %.9g and should be %.9g; %s",
             (unsigned long long)o->wrong, count, tensor, (unsigned long long)o->first, o->owner,
             (double)o->found, (double)o->expected, cause);
}
