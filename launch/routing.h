/* routing.h - which tensor goes to Muon, which to AdamW, which stays as it is: the rules under the
 * key `groups`.
 *
 *   groups:
 *     - match: "*.bias,*norm*"     # patterns as a shell matches names; the first rule that matches
 * a tensor wins role: elementwise          # matrix, elementwise or frozen
 *     - match: "h.*.attn.qkv.weight"
 *       role: matrix
 *       row_splits: 768,768,768    # rows of each matrix, when one tensor holds several
 *
 * Optional words: form=stack|flatten, lr_multiplier, decay_multiplier, group,
 * null_grad=error|zero|skip. A tensor that no rule matches is a matrix (a stack of them) if it has
 * two dimensions or more, else element-wise. */
#ifndef ROUTING_H
#define ROUTING_H

#include <stdio.h>
#include "command.h"

typedef struct routing_rule {
    char *line;  /* own; its words, cut at their spaces, are what the rest points into */
    char *match; /* "PATTERN,PATTERN" */
    muonshard_role role;
    muonshard_matrix_form form;
    muonshard_null_grad null_grad;
    double lr_multiplier, decay_multiplier;
    int group;
    int64_t *row_splits; /* own, [row_split_count] */
    size_t row_split_count;
    size_t matched; /* tensors this rule decided about */
} routing_rule;

typedef struct routing {
    routing_rule *rules; /* own, [rule_count] */
    size_t rule_count;
} routing;

#define ROUTING_DOC                                                                                \
    "rules, first match wins: match=GLOB[,GLOB...] role=matrix|elementwise|frozen "                \
    "[form=stack|flatten] [row_splits=a,b,...] [lr_multiplier=x] [decay_multiplier=x] [group=n] "  \
    "[null_grad=error|zero|skip]; without a rule, two dimensions or more are a matrix"

/* Reads the value of a LIST parameter: rules, each followed by '\n'. ERR_CONFIG with `message`
 * [COMMAND_MESSAGE]: an unknown or repeated word, a bad value; ERR_MEMORY. On failure nothing is
 * held. Local. */
muonshard_status routing_parse(const char *groups, routing *rules, char *message);
/* Fills role, form, row_splits (borrowed from `rules`), multipliers, group and null_grad of
 * `tensor`, whose name, dims and shape are set. `rule` (may be NULL) gets the rule's index, -1 when
 * none matches. ERR_CONFIG when the rule does not fit the tensor. Local. */
muonshard_status routing_apply(routing *rules, muonshard_tensor_desc *tensor, int *rule,
                               char *message);
void routing_free(routing *rules);

/* One line a tensor: name, shape, role, matrices, rule. `chosen` [count]: what routing_apply gave
 * as rule. */
void routing_print(const routing *rules, const muonshard_tensor_desc *tensors, const int *chosen,
                   size_t count, FILE *out);
/* A warning line for each rule that decided about no tensor. */
void routing_warn_unused(const routing *rules, const char *command_name, FILE *out);

#endif
