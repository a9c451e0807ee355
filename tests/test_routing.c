#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "routing.h"
#include "step_values.h"

static char message[COMMAND_MESSAGE];

static muonshard_tensor_desc tensor(const char *name, int dims, int64_t a, int64_t b, int64_t c) {
    muonshard_tensor_desc desc = MUONSHARD_TENSOR_DESC_INIT;
    desc.name = name;
    desc.dims = dims;
    desc.shape[0] = a;
    desc.shape[1] = b;
    desc.shape[2] = c;
    return desc;
}

static void without_rules_dimensions_decide(void **state) {
    (void)state;
    routing rules;
    int rule;
    assert_int_equal(routing_parse("", &rules, message), MUONSHARD_OK);
    const muonshard_role expected[] = {MUONSHARD_ROLE_ELEMENTWISE, MUONSHARD_ROLE_ELEMENTWISE,
                                       MUONSHARD_ROLE_MATRIX, MUONSHARD_ROLE_MATRIX};
    for (int dims = 0; dims < 4; dims++) {
        muonshard_tensor_desc desc = tensor("x", dims, 2, 3, 4);
        routing_default(&desc);
        assert_int_equal(routing_apply(&rules, &desc, &rule, message), MUONSHARD_OK);
        assert_int_equal(desc.role, expected[dims]);
        assert_int_equal(desc.form, MUONSHARD_STACK);
        assert_int_equal(desc.null_grad, MUONSHARD_NULL_GRAD_ERROR);
        assert_int_equal(desc.row_split_count, 0);
        assert_int_equal(rule, -1);
    }
    routing_free(&rules);
}

static void first_match_wins(void **state) {
    (void)state;
    routing rules;
    int rule;
    assert_int_equal(
        routing_parse("match=wte,*norm* role=elementwise lr_multiplier=0.5 decay_multiplier=0\n"
                      "match=h.*.qkv role=matrix row_splits=2,2,2 null_grad=skip\n"
                      "role=frozen match=h.[0-4].*\n"
                      "match=conv? role=matrix form=flatten null_grad=zero\n"
                      "match=never role=frozen\n",
                      &rules, message),
        MUONSHARD_OK);
    assert_int_equal(rules.rule_count, 5);

    muonshard_tensor_desc desc = tensor("h.1.norm", 2, 6, 3, 0);
    assert_int_equal(routing_apply(&rules, &desc, &rule, message), MUONSHARD_OK);
    assert_int_equal(rule, 0);
    assert_int_equal(desc.role, MUONSHARD_ROLE_ELEMENTWISE);
    assert_true(desc.lr_multiplier == 0.5 && desc.decay_multiplier == 0);

    desc = tensor("h.1.qkv", 2, 6, 3, 0);
    assert_int_equal(routing_apply(&rules, &desc, &rule, message), MUONSHARD_OK);
    assert_int_equal(rule, 1);
    assert_int_equal(desc.role, MUONSHARD_ROLE_MATRIX);
    assert_int_equal(desc.row_split_count, 3);
    assert_int_equal(desc.row_splits[2], 2);
    assert_int_equal(desc.group, 0);
    assert_int_equal(desc.null_grad, MUONSHARD_NULL_GRAD_SKIP);
    assert_true(desc.lr_multiplier == 1 && desc.decay_multiplier == 1);

    desc = tensor("h.4.mlp", 2, 6, 3, 0);
    assert_int_equal(routing_apply(&rules, &desc, &rule, message), MUONSHARD_OK);
    assert_int_equal(rule, 2);
    assert_int_equal(desc.role, MUONSHARD_ROLE_FROZEN);
    desc = tensor("h.5.mlp", 2, 6, 3, 0);
    routing_default(&desc);
    assert_int_equal(routing_apply(&rules, &desc, &rule, message), MUONSHARD_OK);
    assert_int_equal(rule, -1);

    desc = tensor("conv1", 3, 6, 3, 2);
    assert_int_equal(routing_apply(&rules, &desc, &rule, message), MUONSHARD_OK);
    assert_int_equal(rule, 3);
    assert_int_equal(desc.form, MUONSHARD_FLATTEN);
    assert_int_equal(desc.null_grad, MUONSHARD_NULL_GRAD_ZERO);
    desc = tensor("conv12", 3, 6, 3, 2);
    routing_default(&desc);
    /* ? is one character, and a pattern is the whole name */
    assert_int_equal(routing_apply(&rules, &desc, &rule, message), MUONSHARD_OK);
    assert_int_equal(rule, -1);

    char text[1024] = "";
    FILE *out = fmemopen(text, sizeof text, "w");
    assert_non_null(out);
    routing_warn_unused(&rules, "replay", out);
    fclose(out);
    assert_string_equal(
        text, "muonshard replay: warning: groups: rule 5 (match=never) decides about no tensor\n");
    routing_free(&rules);
}

/* The rule that decides about a tensor of this name and shape. */
static int rule_for(routing *rules, const char *name, int dims, int64_t a, int64_t b, int64_t c) {
    muonshard_tensor_desc desc = tensor(name, dims, a, b, c);
    int rule;
    assert_int_equal(routing_apply(rules, &desc, &rule, message), MUONSHARD_OK);
    return rule;
}

static void shapes_match(void **state) {
    (void)state;
    routing rules;
    assert_int_equal(routing_parse("shape=768,* role=elementwise\n"
                                   "match=h.* dims=3 role=frozen\n"
                                   "match=h.* shape=*,*,4 role=frozen\n"
                                   "dims=1 shape=5 role=elementwise\n"
                                   "dims=0 role=elementwise\n"
                                   "match=x shape=* role=elementwise\n",
                                   &rules, message),
                     MUONSHARD_OK);
    assert_int_equal(rule_for(&rules, "any", 2, 768, 3, 0), 0);
    assert_int_equal(rule_for(&rules, "any", 2, 767, 768, 0), -1);
    assert_int_equal(rule_for(&rules, "any", 1, 768, 0, 0), -1); /* as many sizes */
    assert_int_equal(rule_for(&rules, "any", 3, 768, 3, 3), -1);
    assert_int_equal(rule_for(&rules, "h.a", 3, 768, 3, 3), 1); /* both have to fit */
    assert_int_equal(rule_for(&rules, "h.a", 2, 7, 3, 0), -1);
    assert_int_equal(rule_for(&rules, "g.a", 3, 1, 1, 4), -1);
    assert_int_equal(rule_for(&rules, "any", 1, 5, 0, 0), 3);
    assert_int_equal(rule_for(&rules, "any", 1, 6, 0, 0), -1);
    assert_int_equal(rule_for(&rules, "any", 0, 0, 0, 0), 4);
    assert_int_equal(rule_for(&rules, "x", 1, 6, 0, 0), 5);
    assert_int_equal(rule_for(&rules, "x", 2, 6, 6, 0), -1);
    routing_free(&rules);
    assert_int_equal(routing_parse("shape=1,2,3,4,5,6,*,8 role=frozen\n", &rules, message),
                     MUONSHARD_OK);
    assert_int_equal(rules.rules[0].shape_dims, 8);
    assert_int_equal(rules.rules[0].shape[6], ROUTING_ANY_SIZE);
    assert_int_equal(rules.rules[0].shape[7], 8);
    routing_free(&rules);
}

static void what_a_rule_does_not_say_stays(void **state) {
    (void)state;
    static const int64_t splits[] = {2, 4};
    routing rules;
    assert_int_equal(routing_parse("match=a role=matrix\n"
                                   "match=b role=matrix row_splits=3,3 lr_multiplier=2\n"
                                   "match=c role=matrix form=stack\n"
                                   "match=d role=elementwise null_grad=error\n",
                                   &rules, message),
                     MUONSHARD_OK);
    static const struct {
        const char *name;
        size_t count;
        int64_t first; /* split */
        double lr;
        muonshard_null_grad null_grad;
        muonshard_matrix_form form;
    } cases[] = {
        {"a", 2, 2, 0.5, MUONSHARD_NULL_GRAD_ZERO, MUONSHARD_FLATTEN},
        {"b", 2, 3, 2.0, MUONSHARD_NULL_GRAD_ZERO, MUONSHARD_FLATTEN},
        {"c", 0, 0, 0.5, MUONSHARD_NULL_GRAD_ZERO, MUONSHARD_STACK}, /* splits of another form */
        {"d", 0, 0, 0.5, MUONSHARD_NULL_GRAD_ERROR, MUONSHARD_STACK},
        {"none", 2, 2, 0.5, MUONSHARD_NULL_GRAD_ZERO, MUONSHARD_FLATTEN},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        muonshard_tensor_desc desc = tensor(cases[i].name, 3, 6, 5, 4);
        desc.role = MUONSHARD_ROLE_MATRIX;
        desc.form = MUONSHARD_FLATTEN;
        desc.row_splits = splits;
        desc.row_split_count = 2;
        desc.lr_multiplier = 0.5;
        desc.decay_multiplier = 0.0;
        desc.null_grad = MUONSHARD_NULL_GRAD_ZERO;
        assert_int_equal(routing_apply(&rules, &desc, NULL, message), MUONSHARD_OK);
        assert_int_equal(desc.row_split_count, cases[i].count);
        if (cases[i].count)
            assert_int_equal(desc.row_splits[0], cases[i].first);
        assert_true(desc.lr_multiplier == cases[i].lr && desc.decay_multiplier == 0.0);
        assert_int_equal(desc.null_grad, cases[i].null_grad);
        assert_int_equal(desc.form, cases[i].form);
    }
    routing_free(&rules);
}

static void table_says_what_went_where(void **state) {
    (void)state;
    static const char *const dtypes[] = {"F32", "BF16", "I64"};
    routing rules;
    muonshard_tensor_desc tensors[] = {tensor("qkv", 3, 5, 6, 3), tensor("bias", 1, 7, 0, 0),
                                       tensor("conv", 3, 6, 3, 2)};
    int chosen[3];
    assert_int_equal(routing_parse("match=qkv role=matrix  row_splits=2,2,2 lr=3e-3\n"
                                   "shape=6,3,* form=flatten role=matrix\n",
                                   &rules, message),
                     MUONSHARD_OK);
    for (int i = 0; i < 3; i++) {
        routing_default(&tensors[i]);
        assert_int_equal(routing_apply(&rules, &tensors[i], &chosen[i], message), MUONSHARD_OK);
    }
    char text[1024] = "";
    FILE *out = fmemopen(text, sizeof text, "w");
    assert_non_null(out);
    routing_print(&rules, tensors, dtypes, chosen, 3, out);
    fclose(out);
    assert_string_equal(
        text, "# tensor  shape      dtype  role         matrices  rule\n"
              "  qkv     [5, 6, 3]  F32    matrix             15  1: match=qkv row_splits=2,2,2 "
              "lr=3e-3\n"
              "  bias    [7]        BF16   elementwise         -  none\n"
              "  conv    [6, 3, 2]  I64    matrix              1  2: shape=6,3,* form=flatten\n");
    routing_free(&rules);
}

/* ---- values of groups ---- */

/* One rule and, as YAML, a config; the groups of a step. */
typedef struct values_case {
    const char *rule, *config;
    int64_t step;
    double lr, momentum, weight_decay; /* expected; NaN: as configured */
} values_case;

static bool equal(double one, double other) {
    return isnan(one) ? isnan(other) : fabs(one - other) <= 1e-15;
}

static void groups_have_values(void **state) {
    (void)state;
    const char *config = "lr: 0.5\nweight_decay: 0.1\nmomentum: 0.9\ntotal_steps: 100\n"
                         "lr_schedule: 0:0 10:1\nweight_decay_schedule: 0:1 10:2\n"
                         "momentum_schedule: 0:0.8 10:0.9\n"
                         "adam: {lr: 0.2, weight_decay: 0.03}\n";
    const char *automatic = "lr: 0.5\nweight_decay: 0.1\nadam: {lr: auto, lr_scale: 0.1, "
                            "weight_decay: auto}\n";
    const values_case cases[] = {
        {"role=matrix lr=2", config, 5, 1.0, NAN, NAN}, /* the configured schedule is a factor */
        {"role=elementwise lr=2", config, 5, 1.0, NAN, NAN},
        {"role=matrix lr_schedule=0:0.5,end:0", config, 50, 0.125, NAN, NAN},
        {"role=elementwise lr_schedule=0:0.5,end:0", config, 50, 0.05, NAN, NAN},
        {"role=matrix lr=2 lr_schedule=0:1", config, 5, 2.0, NAN, NAN},
        {"role=matrix momentum=0.5", config, 5, NAN, 0.5, NAN}, /* no factor: its own value */
        {"role=matrix momentum_schedule=0:0.5,10:0.6", config, 5, NAN, 0.55, NAN},
        {"role=matrix momentum=0.7 momentum_schedule=0:0.5,10:0.6", config, 5, NAN, 0.55, NAN},
        {"role=matrix weight_decay=0.2", config, 5, NAN, NAN, 0.3},
        {"role=matrix weight_decay=0", config, 5, NAN, NAN, 0.0},
        {"role=matrix weight_decay_schedule=0:0.5", config, 5, NAN, NAN, 0.05},
        {"role=elementwise weight_decay_schedule=0:0.5", config, 5, NAN, NAN, 0.015},
        {"role=elementwise lr_schedule=4:1,8:0", automatic, 6, 0.025, NAN, NAN},
        {"role=elementwise weight_decay_schedule=0:3", automatic, 6, NAN, NAN, 0.3},
        {"role=matrix lr=3", automatic, 6, 3.0, NAN, NAN},
        {"role=matrix momentum=0.7 momentum_schedule=end:0.1", automatic, 6, NAN, 0.7, NAN},
        {"role=matrix momentum_schedule=end:0.1", automatic, 6, NAN, NAN, NAN},
        {"role=matrix lr_multiplier=2", config, 5, NAN, NAN, NAN},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const values_case *c = &cases[i];
        char text[256];
        routing rules;
        step_values values;
        muonshard_config *yaml = NULL;
        muonshard_step_args args = MUONSHARD_STEP_ARGS_INIT;
        snprintf(text, sizeof text, "match=other role=matrix lr=0.125\nmatch=a %s\n", c->rule);
        assert_int_equal(routing_parse(text, &rules, message), MUONSHARD_OK);
        assert_int_equal(muonshard_config_create(&yaml), MUONSHARD_OK);
        assert_int_equal(muonshard_config_load_string(yaml, c->config), MUONSHARD_OK);
        assert_int_equal(step_values_open(&values, &rules, yaml, message), MUONSHARD_OK);
        step_values_at(&values, 99, &args);
        step_values_at(&values, c->step, &args);

        muonshard_tensor_desc desc = tensor("a", 2, 6, 4, 0);
        assert_int_equal(routing_apply(&rules, &desc, NULL, message), MUONSHARD_OK);
        const bool own = !strstr(c->rule, "lr_multiplier");
        assert_int_equal(desc.group, own ? 2 : 0);
        assert_int_equal(args.group_count, own ? 3 : 2);
        const muonshard_group_args *g = &args.groups[desc.group];
        if (!equal(g->lr, c->lr) || !equal(g->momentum, c->momentum) ||
            !equal(g->weight_decay, c->weight_decay))
            fail_msg("%s: %g %g %g", c->rule, g->lr, g->momentum, g->weight_decay);
        assert_true(isnan(args.groups[0].lr) && isnan(args.groups[0].momentum) &&
                    isnan(args.groups[0].weight_decay));
        step_values_close(&values);
        muonshard_config_destroy(yaml);
        routing_free(&rules);
    }
}

static void end_is_the_number_of_steps(void **state) {
    (void)state;
    char text[32];
    muonshard_config *config = NULL;
    assert_int_equal(muonshard_config_create(&config), MUONSHARD_OK);
    assert_int_equal(step_values_set_total(config, 12, message), MUONSHARD_OK);
    assert_int_equal(muonshard_config_get(config, "total_steps", text, sizeof text, NULL),
                     MUONSHARD_OK);
    assert_string_equal(text, "12");
    assert_int_equal(step_values_set_total(config, 13, message), MUONSHARD_OK); /* known already */
    assert_int_equal(muonshard_config_get(config, "total_steps", text, sizeof text, NULL),
                     MUONSHARD_OK);
    assert_string_equal(text, "12");

    routing rules;
    step_values values;
    assert_int_equal(
        routing_parse("match=a role=matrix lr_schedule=end-4:1,10:2\n", &rules, message),
        MUONSHARD_OK);
    assert_int_equal(step_values_open(&values, &rules, config, message), MUONSHARD_OK);
    step_values_close(&values);
    assert_int_equal(muonshard_config_set(config, "total_steps", "15"), MUONSHARD_OK);
    assert_int_equal(step_values_open(&values, &rules, config, message), MUONSHARD_ERR_CONFIG);
    assert_non_null(strstr(message, "groups: rule 1 (match=a lr_schedule=end-4:1,10:2): the "
                                    "steps of \"end-4:1,10:2\" fall where total_steps is 15"));
    step_values_close(&values);
    routing_free(&rules);
    muonshard_config_destroy(config);
}

/* ---- what is refused ---- */

static void bad_rules_are_named(void **state) {
    (void)state;
    static const struct {
        const char *groups, *text;
    } cases[] = {
        {"match=a role=matrix\nmatch=b rolle=matrix\n", "groups: rule 2: unknown word \"rolle\""},
        {"match=a role=matrix frozen\n", "rule 1: \"frozen\" is not of the form WORD=VALUE"},
        {"match=a role=matrix role=frozen\n", "rule 1: role is given twice"},
        {"match=a\n", "rule 1 has no role"},
        {"role=matrix\n", "rule 1 has no match, shape or dims"},
        {"\n", "rule 1 has no match"},
        {"match= role=matrix\n", "match is \"\""},
        {"match=a,,b role=matrix\n", "match is \"a,,b\""},
        {"match=a role=Matrix\n", "role is \"Matrix\"; allowed: matrix, elementwise or frozen"},
        {"match=a role=matrix form=flat\n", "form is \"flat\"; allowed: stack or flatten"},
        {"match=a role=matrix null_grad=no\n", "null_grad is \"no\"; allowed: error, zero or skip"},
        {"match=a role=matrix lr_multiplier=-1\n", "lr_multiplier is \"-1\"; allowed: a number"},
        {"match=a role=matrix lr_multiplier=nan\n", "lr_multiplier is \"nan\""},
        {"match=a role=matrix decay_multiplier=1x\n", "decay_multiplier is \"1x\""},
        {"match=a role=matrix decay_multiplier=\n", "decay_multiplier is \"\""},
        {"match=a role=matrix group=1\n", "unknown word \"group\""},
        {"match=a role=matrix shape=\n", "shape is \"\"; allowed: up to 8 sizes"},
        {"shape=2,,3 role=matrix\n", "shape is \"2,,3\""},
        {"shape=2, role=matrix\n", "shape is \"2,\""},
        {"shape=*, role=matrix\n", "shape is \"*,\""},
        {"shape=0 role=matrix\n", "shape is \"0\""},
        {"shape=*2 role=matrix\n", "shape is \"*2\""},
        {"shape=2x3 role=matrix\n", "shape is \"2x3\""},
        {"shape=1,2,3,4,5,6,7,8,9 role=matrix\n", "shape is \"1,2,"},
        {"dims=9 role=matrix\n", "dims is \"9\"; allowed: an integer from 0 to 8"},
        {"dims=-1 role=matrix\n", "dims is \"-1\""},
        {"dims=2. role=matrix\n", "dims is \"2.\""},
        {"dims= role=matrix\n", "dims is \"\""},
        {"dims=2 role=matrix lr=-1\n", "lr is \"-1\"; allowed: a number from 0 to 1e6"},
        {"dims=2 role=matrix lr=2e6\n", "lr is \"2e6\""},
        {"dims=2 role=matrix lr=nan\n", "lr is \"nan\""},
        {"dims=2 role=matrix momentum=1.5\n", "momentum is \"1.5\"; allowed: a number from 0 to 1"},
        {"dims=2 role=matrix weight_decay=x\n", "weight_decay is \"x\""},
        {"dims=2 role=matrix lr_schedule=\n", "lr_schedule is \"\"; allowed: points step:value"},
        {"dims=2 role=matrix lr_schedule=5:1,4:1\n", "lr_schedule is \"5:1,4:1\""},
        {"dims=2 role=matrix lr_schedule=0:1,cosine,9:-1\n", "0:1,cosine,9:-1\"; allowed"},
        {"dims=2 role=matrix lr_schedule=0:1,end:2e6\n", "0:1,end:2e6\"; allowed"},
        {"dims=2 role=matrix momentum_schedule=0:1.5\n", "momentum_schedule is \"0:1.5\""},
        {"dims=2 role=matrix weight_decay_schedule=0\n", "weight_decay_schedule is \"0\""},
        {"dims=2 role=elementwise momentum=0.5\n", "(dims=2 momentum=0.5): momentum is for "
                                                   "role=matrix only"},
        {"dims=2 role=elementwise momentum_schedule=0:0.5\n", "momentum_schedule is for role=m"},
        {"dims=2 role=frozen lr=0.5\n", "lr is for role=matrix and role=elementwise only"},
        {"dims=2 role=frozen weight_decay_schedule=0:1\n", "weight_decay_schedule is for role=m"},
        {"dims=2 role=frozen lr_multiplier=1\n", "lr_multiplier is for role=matrix and role=e"},
        {"match=a role=matrix row_splits=1,0\n", "row_splits is \"1,0\""},
        {"match=a role=matrix row_splits=1,\n", "row_splits is \"1,\""},
        {"match=a role=matrix row_splits=,1\n", "row_splits is \",1\""},
        {"match=a role=matrix row_splits=1;2\n", "row_splits is \"1;2\""},
        {"match=a role=elementwise row_splits=1\n", "row_splits is for role=matrix only"},
        {"match=a role=frozen form=stack\n", "form is for role=matrix only"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        routing rules;
        message[0] = '\0';
        muonshard_status status = routing_parse(cases[i].groups, &rules, message);
        if (status != MUONSHARD_ERR_CONFIG || !strstr(message, cases[i].text))
            fail_msg("%s: status %d, \"%s\"", cases[i].groups, (int)status, message);
    }
}

static void rules_have_to_fit(void **state) {
    (void)state;
    static const struct {
        const char *groups;
        int dims;
        const char *text;
    } cases[] = {
        {"match=a role=matrix row_splits=2,3\n", 2,
         "rule 1 (match=a row_splits=2,3): row_splits add up to 5, tensor \"a\" has 6 rows"},
        {"match=a role=matrix row_splits=6\n", 3, "add up to 6, tensor \"a\" has 4 rows"},
        {"match=a role=matrix form=flatten row_splits=4\n", 3, "to 4, tensor \"a\" has 6 rows"},
        {"match=a role=matrix row_splits=9223372036854775807,9223372036854775807\n", 2, "has 6"},
        {"match=a role=matrix\n", 1, "makes tensor \"a\" a matrix, but it has 1 dimension;"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        routing rules;
        assert_int_equal(routing_parse(cases[i].groups, &rules, message), MUONSHARD_OK);
        muonshard_tensor_desc desc = tensor("a", cases[i].dims, 6, 4, 5);
        muonshard_status status = routing_apply(&rules, &desc, NULL, message);
        if (status != MUONSHARD_ERR_CONFIG || !strstr(message, cases[i].text))
            fail_msg("%s: status %d, \"%s\"", cases[i].groups, (int)status, message);
        routing_free(&rules);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(without_rules_dimensions_decide),
        cmocka_unit_test(first_match_wins),
        cmocka_unit_test(shapes_match),
        cmocka_unit_test(what_a_rule_does_not_say_stays),
        cmocka_unit_test(groups_have_values),
        cmocka_unit_test(end_is_the_number_of_steps),
        cmocka_unit_test(table_says_what_went_where),
        cmocka_unit_test(bad_rules_are_named),
        cmocka_unit_test(rules_have_to_fit),
    };
    return cmocka_run_group_tests_name("routing", tests, NULL, NULL);
}
