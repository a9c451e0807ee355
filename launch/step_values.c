#include "step_values.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "message.h"

/* ---- the config ---- */

/* The value of a key as text; own. */
static muonshard_status get_text(const muonshard_config *config, const char *key, char **text) {
    size_t length;
    muonshard_status status = muonshard_config_get(config, key, NULL, 0, &length);
    *text = NULL;
    if (status != MUONSHARD_OK)
        return status;
    *text = malloc(length + 1);
    return *text ? muonshard_config_get(config, key, *text, length + 1, NULL)
                 : MUONSHARD_ERR_MEMORY;
}

/* NaN: auto. */
static muonshard_status get_number(const muonshard_config *config, const char *key, double *value) {
    char text[64];
    muonshard_status status = muonshard_config_get(config, key, text, sizeof text, NULL);
    *value = status == MUONSHARD_OK && strcmp(text, "auto") != 0 ? strtod(text, NULL) : NAN;
    return status;
}

muonshard_status step_values_set_total(muonshard_config *config, int64_t steps, char *message) {
    double total;
    char text[32];
    muonshard_status status = get_number(config, "total_steps", &total);
    snprintf(text, sizeof text, "%" PRId64, steps);
    if (status == MUONSHARD_OK && total == 0)
        status = muonshard_config_set(config, "total_steps", text);
    if (status != MUONSHARD_OK)
        message_fail(message, status, "%s", muonshard_config_last_error(config));
    return status;
}

static muonshard_status read_config(step_values *v, const muonshard_config *config) {
    double total = 0, lr_scale = 1;
    muonshard_status status = get_number(config, "total_steps", &total);
    if (status == MUONSHARD_OK)
        status = get_number(config, "lr", &v->lr.matrix);
    if (status == MUONSHARD_OK)
        status = get_number(config, "adam.lr", &v->lr.elementwise);
    if (status == MUONSHARD_OK)
        status = get_number(config, "adam.lr_scale", &lr_scale);
    if (status == MUONSHARD_OK)
        status = get_number(config, "weight_decay", &v->weight_decay.matrix);
    if (status == MUONSHARD_OK)
        status = get_number(config, "adam.weight_decay", &v->weight_decay.elementwise);
    if (status == MUONSHARD_OK)
        status = get_text(config, "lr_schedule", &v->lr.schedule);
    if (status == MUONSHARD_OK)
        status = get_text(config, "weight_decay_schedule", &v->weight_decay.schedule);
    v->total_steps = (int64_t)total;
    if (isnan(v->lr.elementwise))
        v->lr.elementwise = v->lr.matrix * lr_scale;
    if (isnan(v->weight_decay.elementwise))
        v->weight_decay.elementwise = v->weight_decay.matrix;
    return status;
}

/* ---- the values; schedules are known to be well-formed ---- */

static double scheduled(const step_values *v, const routing_rule *rule, const routing_value *own,
                        const configured_value *configured, int64_t step) {
    const char *schedule = own->schedule ? own->schedule : configured->schedule;
    double factor = 1.0;
    if (isnan(own->value) && !own->schedule)
        return NAN;
    muonshard_schedule_value(schedule, step, v->total_steps, 1.0, &factor);
    if (!isnan(own->value))
        return factor * own->value;
    return factor *
           (rule->role == MUONSHARD_ROLE_MATRIX ? configured->matrix : configured->elementwise);
}

static muonshard_group_args group_values(const step_values *v, const routing_rule *rule,
                                         int64_t step) {
    muonshard_group_args args = {
        .lr = scheduled(v, rule, &rule->lr, &v->lr, step),
        .momentum = rule->momentum.value,
        .weight_decay = scheduled(v, rule, &rule->weight_decay, &v->weight_decay, step)};
    if (rule->momentum.schedule)
        muonshard_schedule_value(rule->momentum.schedule, step, v->total_steps,
                                 rule->momentum.value, &args.momentum);
    return args;
}

void step_values_at(step_values *values, int64_t step, muonshard_step_args *args) {
    const routing *r = values->rules;
    for (size_t i = 0; i < r->rule_count; i++)
        if (r->rules[i].group > 0)
            values->args[r->rules[i].group] = group_values(values, &r->rules[i], step);
    args->groups = values->args;
    args->group_count = r->group_count;
}

/* Each is well-formed alone, but with this number of steps a point may fall behind another. */
static muonshard_status check_schedules(const routing_rule *rule, size_t number,
                                        int64_t total_steps, char *message) {
    const char *const own[] = {rule->lr.schedule, rule->momentum.schedule,
                               rule->weight_decay.schedule};
    double value;
    for (int i = 0; i < 3; i++)
        if (own[i] && muonshard_schedule_value(own[i], 0, total_steps, 0, &value) != MUONSHARD_OK)
            return message_fail(message, MUONSHARD_ERR_CONFIG,
                                "groups: rule %zu (%s): the steps of \"%s\" fall where "
                                "total_steps is %" PRId64,
                                number, rule->text, own[i], total_steps);
    return MUONSHARD_OK;
}

muonshard_status step_values_open(step_values *values, const routing *rules,
                                  const muonshard_config *config, char *message) {
    *values = (step_values){.rules = rules};
    values->args = calloc(rules->group_count, sizeof *values->args);
    if (!values->args)
        return message_fail(message, MUONSHARD_ERR_MEMORY, "groups: out of memory");
    values->args[0] = (muonshard_group_args)MUONSHARD_GROUP_ARGS_INIT;
    muonshard_status status = read_config(values, config);
    if (status != MUONSHARD_OK)
        return message_fail(message, status, "groups: %s", muonshard_config_last_error(config));
    for (size_t i = 0; i < rules->rule_count && status == MUONSHARD_OK; i++)
        status = check_schedules(&rules->rules[i], i + 1, values->total_steps, message);
    return status;
}

void step_values_close(step_values *values) {
    free(values->lr.schedule);
    free(values->weight_decay.schedule);
    free(values->args);
    *values = (step_values){0};
}
