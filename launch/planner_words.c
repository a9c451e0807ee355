/* planner_words.c - advice: what of a plan a person should know, in sentences. */
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "message.h"
#include "planner.h"

#define GIB (1024.0 * 1024.0 * 1024.0)

static void say(const char *format, ...) __attribute__((format(printf, 1, 2)));

static void say(const char *format, ...) {
    va_list list;
    va_start(list, format);
    printf("# ");
    vprintf(format, list);
    printf("\n");
    va_end(list);
}

/* ---- who computes ---- */

static double matrices_of(const planner *p, const rank_plan *r) {
    double matrices = 0.0;
    for (int part = 0; part < MODEL_PARTS; part++)
        if (r->groups[part].there)
            matrices += (double)p->parts[part].view_count / (double)r->groups[part].plan.world_size;
    return matrices;
}

static void advise_ownership(const planner *p, const rank_plan *r) {
    const plan_imbalance *of = &r->imbalance;
    if (of->turns > of->balanced + 0.02)
        say("%d ranks: ownership=balanced cuts the busiest rank's Newton-Schulz from %.2f to %.2f "
            "times the mean",
            r->ranks, of->turns, of->balanced);
    if (of->balanced > 1.05)
        say("%d ranks: imbalance %.2f with balanced, for a matrix is computed whole and there are "
            "%.2f a rank; no assignment has less than %.2f",
            r->ranks, of->balanced, matrices_of(p, r), of->bound);
}

/* ---- memory ---- */

static bool fits(const planner *p, const plan_memory *m) {
    return plan_memory_total(m) <= 1e9 * p->machine.memory;
}

static muonshard_status advise_memory(const planner *p, const rank_plan *plans, size_t count,
                                      char *message) {
    plan_memory m = plans[count - 1].memory, least = m;
    int first = 0, last = 0;
    if (!p->machine.config || isnan(p->machine.memory))
        return MUONSHARD_OK;
    for (int n = planner_unit(p); n <= 16384; n *= 2) {
        const muonshard_status status = planner_memory(p, n, &m, message);
        if (status)
            return status;
        if (!fits(p, &m))
            continue;
        least = first ? least : m;
        first = first ? first : n;
        last = n;
    }
    if (first) {
        say("memory: %.1f GB a rank hold it from %d rank%s (%.1f GB there) to %d; activations are "
            "left out",
            p->machine.memory, first, first == 1 ? "" : "s", 1e-9 * plan_memory_total(&least),
            last);
        if (last < 16384)
            say("memory: beyond that workspace grows with the ranks (%.1f GB at 16384): a wave has "
                "a slot for every rank, and is gathered whole",
                1e-9 * m.workspace);
        return MUONSHARD_OK;
    }
    const double fixed = m.parameters + m.gradients;
    say("memory: %.1f GB a rank hold it at no number of ranks: parameters and gradients take %.1f "
        "GB "
        "whatever their number%s",
        p->machine.memory, 1e-9 * fixed,
        fixed > 1e9 * p->machine.memory
            ? "; spread layers or experts further (pipeline_parallel, expert_parallel)"
            : "");
    return MUONSHARD_OK;
}

/* ---- what travels ---- */

static void advise_padding(const rank_plan *r) {
    double padded = 0.0, moved = 0.0;
    for (int part = 0; part < MODEL_PARTS; part++) {
        const plan *q = &r->groups[part].plan;
        padded += (double)q->bytes_padded;
        moved += (double)q->bytes_reduced;
    }
    if (padded > 0.25 * moved && moved > 0.0)
        say("%d ranks: %.2f GiB of what is reduced are empty slots", r->ranks, padded / GIB);
}

/* ---- where it stops ---- */

typedef struct cost {
    double seconds;
    const char *what;
    bool on_link;
} cost;

static cost largest_cost(const planner *p, const rank_plan *r, size_t *link) {
    cost costs[8] = {{0.0, NULL, false}};
    double latency = 0.0, bandwidth = 0.0, waited = 0.0, matrices = 0.0, longest = 0.0;
    for (int part = 0; part < MODEL_PARTS; part++) {
        const simulation *s = &r->groups[part].sim;
        if (!r->groups[part].there)
            continue;
        latency += s->latency;
        bandwidth += s->bandwidth;
        waited += s->phases.reduce_scatter + s->phases.all_gather;
        matrices += s->matrices;
        costs[0].seconds += s->phases.orthogonalize;
        costs[1].seconds += s->phases.apply;
        costs[2].seconds += s->phases.elementwise;
        costs[3].seconds += s->phases.momentum;
        costs[4].seconds += s->phases.pack;
        costs[5].seconds += s->phases.agree;
        if (s->bandwidth > longest) {
            longest = s->bandwidth;
            *link = s->slowest;
        }
    }
    const double share = latency + bandwidth > 0.0 ? latency / (latency + bandwidth) : 0.0;
    costs[6].seconds = waited * share;
    costs[7].seconds = waited * (1.0 - share);
    costs[0].what = matrices <= 1.0 ? "the Newton-Schulz of one matrix, which is computed whole"
                                    : "Newton-Schulz";
    costs[1].what = "applying updates, which every rank does for the whole model";
    costs[2].what = "AdamW";
    costs[3].what = "momentum";
    costs[4].what = "packing gradients";
    costs[5].what = "agreeing on norm and skip";
    costs[6].what = "messages over";
    costs[7].what = "bytes over";
    costs[6].on_link = costs[7].on_link = p->machine.link_count > 0;
    cost largest = costs[0];
    for (size_t i = 1; i < sizeof costs / sizeof *costs; i++)
        if (costs[i].seconds > largest.seconds)
            largest = costs[i];
    return largest;
}

/* The optimizer's part of a step: what comes after the backward pass. */
static double own_seconds(const planner *p, const rank_plan *r) {
    return r->step - p->options.backward;
}

static void advise_scaling(const planner *p, const rank_plan *plans, size_t count) {
    size_t last = count - 1, link = 0;
    for (size_t i = 0; i + 1 < count && last == count - 1; i++)
        if (own_seconds(p, &plans[i + 1]) > 0.9 * own_seconds(p, &plans[i]))
            last = i;
    const rank_plan *at = &plans[last + 1 < count ? last + 1 : last];
    const cost largest = largest_cost(p, at, &link);
    const char *name = largest.on_link ? p->machine.links[link].name : "";
    const double own = own_seconds(p, at);
    if (last + 1 < count)
        say("scaling: up to %d rank%s; %d take %.2f of the time, of which most (%.0f of %.0f us) "
            "is "
            "%s%s%s",
            plans[last].ranks, plans[last].ranks == 1 ? "" : "s", at->ranks,
            own / own_seconds(p, &plans[last]), 1e6 * largest.seconds, 1e6 * own, largest.what,
            *name ? " " : "", name);
    else
        say("scaling: at %d ranks most of the time (%.0f of %.0f us) is %s%s%s", at->ranks,
            1e6 * largest.seconds, 1e6 * own, largest.what, *name ? " " : "", name);
}

muonshard_status planner_advise(const planner *p, const rank_plan *plans, size_t count,
                                char *message) {
    printf("#\n");
    for (size_t i = 0; i < count; i++) {
        advise_ownership(p, &plans[i]);
        advise_padding(&plans[i]);
    }
    if (p->machine.config)
        advise_scaling(p, plans, count);
    return advise_memory(p, plans, count, message);
}
