/* routing.h - which tensor goes to Muon, which to AdamW, which stays as it is, and with which
 * learning rate, momentum and decay: the rules under the key `groups`.
 *
 *   groups:
 *     - match: "*.bias,*norm*"   # patterns as a shell matches names
 *       role: elementwise        # matrix, elementwise or frozen
 *     - shape: "50257,*"         # sizes, * is any; or dims: 2
 *       role: elementwise
 *       lr: 3e-3
 *       lr_schedule: 0:0,100:1,cosine,end:0.1
 *     - match: "h.*.attn.qkv.weight"
 *       role: matrix
 *       row_splits: 768,768,768  # rows of each matrix, when one tensor holds several
 *
 * The first rule decides of which match, shape and dims all fit. What it does not say stays as it
 * is without the rule. A rule that gives lr, momentum, weight_decay or a schedule of one makes its
 * tensors a group of their own. */
#ifndef ROUTING_H
#define ROUTING_H

#include <stdio.h>
#include "command.h"

#define ROUTING_ANY_SIZE (-1)

/* A value over the steps: a factor of it, or momentum itself (see step_values.h). */
typedef struct routing_value {
    double value;         /* NaN: not given */
    const char *schedule; /* as muonshard_schedule_value reads it; NULL: not given */
} routing_value;

typedef struct routing_rule {
    char *line;        /* own; its words, cut at their spaces, are what the rest points into */
    char *text;        /* own; the words but role, for messages and the table */
    const char *match; /* "PATTERN,PATTERN"; NULL: every name */
    int dims;          /* -1: any number */
    int shape_dims;    /* -1: any shape */
    int64_t shape[MUONSHARD_MAX_DIMS]; /* or ROUTING_ANY_SIZE */
    muonshard_role role;
    int form, null_grad;                    /* -1: not given */
    double lr_multiplier, decay_multiplier; /* NaN: not given */
    int64_t *row_splits;                    /* own, [row_split_count] */
    size_t row_split_count;                 /* 0: not given */
    routing_value lr, momentum, weight_decay;
    int group;      /* above 0 if it gives one of these three */
    size_t matched; /* tensors this rule decided about */
} routing_rule;

typedef struct routing {
    routing_rule *rules; /* own, [rule_count] */
    size_t rule_count;
    size_t group_count; /* with group 0, of all that have no group of their own */
} routing;

#define ROUTING_DOC                                                                                \
    "Rules, first match wins: match=GLOB[,GLOB...], shape=n,*,..., dims=n, at least one of them; " \
    "role=matrix|elementwise|frozen [form=stack|flatten] [row_splits=a,b,...] [lr_multiplier=x] "  \
    "[decay_multiplier=x] [null_grad=error|zero|skip]; and for these tensors in the place of the " \
    "configured values [lr=x] [momentum=x] [weight_decay=x] [lr_schedule=points, separated by "    \
    "commas] [momentum_schedule=...] [weight_decay_schedule=...]."

/* Reads the value of a LIST parameter: rules, each followed by '\n'. ERR_CONFIG with `message`
 * [COMMAND_MESSAGE]: an unknown or repeated word, a bad value; ERR_MEMORY. On failure nothing is
 * held. Local. */
muonshard_status routing_parse(const char *groups, routing *rules, char *message);
/* Two dimensions or more: a matrix or a stack of them; else element-wise. */
void routing_default(muonshard_tensor_desc *tensor);
/* Puts what the first fitting rule says into `tensor`, whose name, dims and shape are set, and
 * whose other fields are what holds without it; row_splits are borrowed from `rules`. `rule` (may
 * be NULL) gets the rule's index, -1 when none fits. ERR_CONFIG when the rule cannot be followed.
 * Local. */
muonshard_status routing_apply(routing *rules, muonshard_tensor_desc *tensor, int *rule,
                               char *message);
void routing_free(routing *rules);

/* One line a tensor: name, shape, dtype, role, matrices, rule with all it says. `dtypes` [count]:
 * names; `chosen` [count]: what routing_apply gave as rule. */
void routing_print(const routing *rules, const muonshard_tensor_desc *tensors,
                   const char *const *dtypes, const int *chosen, size_t count, FILE *out);
/* A warning line for each rule that decided about no tensor. */
void routing_warn_unused(const routing *rules, const char *command_name, FILE *out);

#endif
