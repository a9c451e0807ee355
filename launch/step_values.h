/* step_values.h - learning rate, momentum and decay of the groups that rules made: what
 * muonshard_step gets as groups.
 *
 * lr: the rule's, else the configured lr (element-wise tensors: adam.lr), times the rule's schedule
 * or, without one, the configured lr_schedule. weight_decay likewise. momentum: the value of the
 * rule's schedule, else the rule's momentum. NaN, as configured, where the rule says neither. */
#ifndef STEP_VALUES_H
#define STEP_VALUES_H

#include "routing.h"

/* The configured value and schedule that a rule gives another for. */
typedef struct configured_value {
    double matrix, elementwise;
    char *schedule; /* own */
} configured_value;

typedef struct step_values {
    const routing *rules; /* borrowed */
    configured_value lr, weight_decay;
    int64_t total_steps;
    muonshard_group_args *args; /* own, [rules->group_count] */
} step_values;

/* Sets total_steps, what `end` is in schedules, where it is not known. ERR_CONFIG, ERR_MEMORY, with
 * `message` [COMMAND_MESSAGE]. Local. */
muonshard_status step_values_set_total(muonshard_config *config, int64_t steps, char *message);
/* Reads the config, whose schedules muonshard_create checks; checks those of the rules. ERR_CONFIG,
 * ERR_MEMORY, with `message` [COMMAND_MESSAGE]. Local. */
muonshard_status step_values_open(step_values *values, const routing *rules,
                                  const muonshard_config *config, char *message);
/* Puts those of a step, counted from 0, into `args`; they are borrowed until the next call. */
void step_values_at(step_values *values, int64_t step, muonshard_step_args *args);
void step_values_close(step_values *values);

#endif
