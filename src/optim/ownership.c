#include "optim/ownership.h"

#include <math.h>
#include <stdlib.h>

#include "optim/newton_schulz.h"

static int64_t short_side(const view *v) {
    return v->rows < v->cols ? v->rows : v->cols;
}

static int64_t long_side(const view *v) {
    return v->rows < v->cols ? v->cols : v->rows;
}

bool ownership_alike(const registry *r, size_t a, size_t b) {
    const view *v = &r->views[a], *w = &r->views[b];
    return short_side(v) == short_side(w) && long_side(v) == long_side(w) &&
           r->tensors[v->tensor].dtype == r->tensors[w->tensor].dtype;
}

muonshard_status ownership_price(const registry *r, const settings *s, bool device, double *cost,
                                 double *flops, error_text *error) {
    for (size_t i = 0; i < r->view_count; i++) {
        size_t k = 0;
        while (k < i && !ownership_alike(r, k, i))
            k++;
        if (k < i) {
            cost[i] = cost[k];
            if (flops)
                flops[i] = flops[k];
            continue;
        }
        const view *v = &r->views[i];
        ns_program program;
        TRY(newton_schulz_compile(s, r->tensors[v->tensor].dtype, device, short_side(v),
                                  long_side(v), &program, error));
        cost[i] = ns_program_cost(&program, short_side(v), long_side(v), device);
        if (flops)
            flops[i] = ns_program_flops(&program, short_side(v), long_side(v));
    }
    return MUONSHARD_OK;
}

/* Shape by shape, going round; what does not fill a round begins where the last such rest ended. */
static void assign_by_turns(const registry *r, size_t ranks, const size_t *loose, size_t count,
                            int *owner) {
    size_t turn = 0;
    for (size_t i = 0; i < count; i++) {
        size_t earlier = 0, same = 0, placed = 0;
        while (!ownership_alike(r, loose[earlier], loose[i]))
            earlier++;
        if (earlier < i)
            continue; /* its shape is done */
        for (size_t k = i; k < count; k++)
            same += ownership_alike(r, loose[i], loose[k]);
        const size_t rest = same % ranks;
        for (size_t k = i; k < count; k++) {
            if (!ownership_alike(r, loose[i], loose[k]))
                continue;
            const size_t start = placed < same - rest ? 0 : turn;
            owner[loose[k]] = (int)((start + placed++ % ranks) % ranks);
        }
        turn = (turn + rest) % ranks;
    }
}

typedef struct priced_view {
    size_t view;
    double cost;
} priced_view;

static int costly_first(const void *left, const void *right) {
    const priced_view *a = left, *b = right;
    if (a->cost != b->cost)
        return a->cost > b->cost ? -1 : 1;
    return a->view < b->view ? -1 : 1;
}

static muonshard_status assign_by_cost(size_t ranks, const double *cost, const size_t *loose,
                                       size_t count, int *owner, error_text *error) {
    muonshard_status status = MUONSHARD_OK;
    double *load = calloc(ranks, sizeof *load);
    priced_view *order = calloc(count + 1, sizeof *order);
    if (!load || !order) {
        status = fail(error, MUONSHARD_ERR_MEMORY, "out of memory");
        goto done;
    }
    for (size_t i = 0; i < count; i++)
        order[i] = (priced_view){loose[i], cost[loose[i]]};
    qsort(order, count, sizeof *order, costly_first);
    for (size_t i = 0; i < count; i++) {
        size_t least = 0;
        for (size_t rank = 1; rank < ranks; rank++)
            least = load[rank] < load[least] ? rank : least;
        load[least] += order[i].cost;
        owner[order[i].view] = (int)least;
    }
done:
    free(load);
    free(order);
    return status;
}

muonshard_status ownership_assign(const registry *r, const settings *s, int world_size,
                                  const double *cost, const size_t *loose, size_t count, int *owner,
                                  error_text *error) {
    if (s->ownership == OWNERSHIP_BALANCED)
        return assign_by_cost((size_t)world_size, cost, loose, count, owner, error);
    assign_by_turns(r, (size_t)world_size, loose, count, owner);
    return MUONSHARD_OK;
}

/* How many matrices cost the same. */
typedef struct cost_class {
    double cost;
    double count;
} cost_class;

static int rising(const void *left, const void *right) {
    const double a = *(const double *)left, b = *(const double *)right;
    return (a > b) - (a < b);
}

/* Ranks it takes at least if none may have more than `most`: for any size, what is so large that
 * nothing of that size fits beside it is alone on its rank, and what is more than half is the only
 * such thing there (bound L2 of Martello and Toth 1990 for packing bins). */
static double ranks_needed(const cost_class *classes, size_t count, double most) {
    double needed = 0.0;
    for (size_t k = 0; k < count; k++) {
        double alone = 0.0, large = 0.0, room = 0.0, small = 0.0;
        for (size_t i = k; i < count; i++) {
            const cost_class *c = &classes[i];
            if (c->cost > most)
                return INFINITY;
            if (c->cost > most - classes[k].cost) {
                alone += c->count;
            } else if (c->cost > most / 2.0) {
                large += c->count;
                room += c->count * (most - c->cost);
            } else {
                small += c->count * c->cost;
            }
        }
        const double more = small > room ? ceil((small - room) / most * (1.0 - 1e-12)) : 0.0;
        needed = fmax(needed, alone + large + more);
    }
    return needed;
}

/* Of the (k-1) ranks + 1 most costly some rank has k. `rising` [count]. */
static double most_crowded(const double *rising_cost, size_t count, size_t ranks) {
    double bound = 0.0;
    for (size_t k = 1; (k - 1) * ranks < count; k++) {
        double least = 0.0; /* the k smallest of these */
        for (size_t i = 0; i < k; i++)
            least += rising_cost[count - 1 - (k - 1) * ranks + i];
        bound = fmax(bound, least);
    }
    return bound;
}

muonshard_status ownership_bound(const double *cost, size_t count, size_t ranks, double *bound,
                                 error_text *error) {
    double *sorted = malloc((count + 1) * sizeof *sorted), total = 0.0;
    cost_class *classes = calloc(count + 1, sizeof *classes);
    size_t kinds = 0;
    muonshard_status status = MUONSHARD_OK;
    if (!sorted || !classes) {
        status = fail(error, MUONSHARD_ERR_MEMORY, "out of memory");
        goto done;
    }
    for (size_t i = 0; i < count; i++)
        total += sorted[i] = cost[i];
    qsort(sorted, count, sizeof *sorted, rising);
    for (size_t i = 0; i < count; i++) {
        if (!kinds || classes[kinds - 1].cost != sorted[i])
            classes[kinds++].cost = sorted[i];
        classes[kinds - 1].count += 1.0;
    }
    double below = fmax(total / (double)ranks, most_crowded(sorted, count, ranks)), above = total;
    if (ranks_needed(classes, kinds, below) <= (double)ranks)
        above = below;
    for (int i = 0; i < 60 && above > below; i++) {
        const double middle = (below + above) / 2.0;
        if (ranks_needed(classes, kinds, middle) > (double)ranks)
            below = middle;
        else
            above = middle;
    }
    *bound = below;
done:
    free(sorted);
    free(classes);
    return status;
}
