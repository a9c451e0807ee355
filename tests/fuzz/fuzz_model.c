/* Files the command reads beside the configuration, all of them YAML: the bytes as a model with
 * rules for its tensors, and as a machine. What is taken can be spread, repeated, registered and
 * asked for times. */
#include <math.h>
#include <string.h>

#include "config.h"
#include "fuzz.h"
#include "machine.h"
#include "model_file.h"
#include "optim/registry.h"
#include "routing.h"

typedef struct model_and_rules {
    model_file model;
    const char *groups;
} model_and_rules;

static const muonshard_param groups_table[] = {
    {"groups", MUONSHARD_PARAM_LIST, offsetof(model_and_rules, groups), "", 0, 0, NULL, "Rules."}};

/* Refused or not, it has to be a tensor the library can look at. */
static void register_tensor(const muonshard_config *config, registry *r,
                            const muonshard_tensor_desc *desc) {
    error_text error = {""};
    const muonshard_status status =
        fuzz_status(registry_add(r, config_settings(config), desc, NULL, &error), error.text);
    FUZZ_CHECK(status != MUONSHARD_ERR_INTERNAL);
}

static void register_parts(const muonshard_config *config, const model_file *model) {
    for (int part = 0; part < MODEL_PARTS; part++) {
        registry r = {.weightless = true};
        for (size_t i = 0; i < model->tensor_count; i++) {
            muonshard_tensor_desc desc;
            if (!model_file_tensor(model, i, (model_part)part, &desc))
                continue;
            FUZZ_CHECK(desc.shape[0] > 0);
            register_tensor(config, &r, &desc);
        }
        registry_free(&r);
    }
}

static void check_rules(const model_and_rules *m) {
    char message[COMMAND_MESSAGE] = "";
    routing rules;
    if (fuzz_status(routing_parse(m->groups, &rules, message), message))
        return;
    for (size_t i = 0; i < m->model.tensor_count; i++) {
        muonshard_tensor_desc desc = m->model.tensors[i];
        int chosen = -2;
        *message = '\0';
        fuzz_status(routing_apply(&rules, &desc, &chosen, message), message);
        FUZZ_CHECK(chosen >= -1 && chosen < (int)rules.rule_count);
        FUZZ_CHECK(desc.group >= 0 && (size_t)desc.group < rules.group_count);
    }
    routing_free(&rules);
}

static void fuzz_model(const char *path) {
    model_and_rules m = {.groups = NULL};
    muonshard_config *config;
    char message[COMMAND_MESSAGE] = "";
    FUZZ_CHECK(muonshard_config_create(&config) == MUONSHARD_OK);
    FUZZ_CHECK(muonshard_config_add_table(config, model_file_table, model_file_table_count,
                                          &m.model) == MUONSHARD_OK);
    FUZZ_CHECK(muonshard_config_add_table(config, groups_table, 1, &m) == MUONSHARD_OK);
    if (muonshard_config_load_file(config, path) == MUONSHARD_OK &&
        fuzz_status(model_file_parse(&m.model, path, message), message) == MUONSHARD_OK) {
        check_rules(&m);
        register_parts(config, &m.model);
        if (fuzz_status(model_file_repeat(&m.model, 1024, message), message) == MUONSHARD_OK)
            register_parts(config, &m.model);
    }
    model_file_free(&m.model);
    muonshard_config_destroy(config);
}

static void check_machine(const machine *m) {
    for (int dtype = 0; dtype < 4; dtype++) {
        const double seconds = machine_newton_schulz(m, dtype, 1e9, 12.0);
        FUZZ_CHECK(isnan(seconds) || seconds > 0.0);
    }
    for (int pass = 0; pass < PASS_COUNT; pass++)
        FUZZ_CHECK(machine_pass_seconds(m, (machine_pass)pass, 1e9) > 0.0);
    for (int ring = 0; ring < 2; ring++) {
        double bytes[MACHINE_LINKS] = {0.0};
        const machine_transfer t = machine_collective(m, ring, 64.0, 2.0, 60.0, 1e6, bytes);
        FUZZ_CHECK(t.latency >= 0.0 && t.bandwidth >= 0.0 && t.slowest < MACHINE_LINKS);
        FUZZ_CHECK(isfinite(t.latency) && isfinite(t.bandwidth));
        for (size_t i = 0; i < m->link_count; i++)
            FUZZ_CHECK(bytes[i] >= 0.0 && isfinite(bytes[i]));
    }
}

static void fuzz_machine(const char *path) {
    machine m;
    char message[COMMAND_MESSAGE] = "";
    if (fuzz_status(machine_load(&m, path, message), message))
        return;
    check_machine(&m);
    machine_free(&m);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    const char *path = fuzz_file(data, size);
    fuzz_model(path);
    fuzz_machine(path);
    return 0;
}
