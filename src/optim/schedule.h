/* schedule.h - one optimizer step as data: a plain array of operations. The executor walks it, the
 * tracer writes down when each of them really ran, and a simulator can put a cost model in the
 * place of the machine. What it says is what runs.
 *
 *   per bucket   take | [pack] reduce-scatter      while backward still runs, in one fixed order
 *   per bucket   measure                           sums of squares of what was reduced
 *   once         agree, resolve                    skip, norm, clip: the same on every rank
 *   per batch    momentum, orthogonalize,          forward order
 *                [variance], [update] | adam       update: the owner's, where parameters are
 * gathered all-gather                        under the next batch's computation apply of the batch
 * before */
#ifndef SCHEDULE_H
#define SCHEDULE_H

#include "optim/plan.h"

#define OP_MAP(X)                                                                                  \
    X(OP_TAKE, "take")                                                                             \
    X(OP_PACK, "pack")                                                                             \
    X(OP_REDUCE_SCATTER, "reduce-scatter")                                                         \
    X(OP_MEASURE, "measure")                                                                       \
    X(OP_AGREE, "agree")                                                                           \
    X(OP_RESOLVE, "resolve")                                                                       \
    X(OP_MOMENTUM, "momentum")                                                                     \
    X(OP_ORTHOGONALIZE, "orthogonalize")                                                           \
    X(OP_VARIANCE, "variance")                                                                     \
    X(OP_UPDATE, "update")                                                                         \
    X(OP_ADAM, "adam")                                                                             \
    X(OP_ALL_GATHER, "all-gather")                                                                 \
    X(OP_APPLY, "apply")

typedef enum op_kind {
#define OP_ENUM(name, text) name,
    OP_MAP(OP_ENUM)
#undef OP_ENUM
        OP_KIND_COUNT
} op_kind;

#define OP_NONE (-1)

/* Operations of one stream run in the order of the array; waits_on is the last operation of the
 * other stream that has to be complete before, and with it everything before that on its stream. */
typedef struct op {
    op_kind kind;
    int index; /* bucket up to measure, batch from momentum on; OP_NONE for agree and resolve */
    backend_stream stream;
    int waits_on; /* index of an operation, or OP_NONE */
    int segment;  /* compute operations of one number follow each other, wait only before the first,
                     and end with an apply: a GPU gets them as one graph; OP_NONE: what differs from
                     step to step */
} op;

typedef struct schedule {
    op *ops; /* own */
    size_t count;
    int segments;
} schedule;

muonshard_status schedule_make(schedule *s, const plan *p, const settings *set, error_text *error);
uint64_t schedule_hash(const schedule *s);
void schedule_free(schedule *s);

const char *op_name(op_kind kind);
/* "all-gather batch 3": what traces, timeouts and the printed schedule call an operation; like
 * snprintf. */
int op_label(const op *o, char *text, size_t size);
static inline bool op_is_collective(op_kind kind) {
    return kind == OP_REDUCE_SCATTER || kind == OP_AGREE || kind == OP_ALL_GATHER;
}
/* The operation reads gradients: it may run as soon as its bucket is ready. */
static inline bool op_reads_gradients(op_kind kind) {
    return kind == OP_TAKE || kind == OP_PACK || kind == OP_REDUCE_SCATTER;
}

#endif
