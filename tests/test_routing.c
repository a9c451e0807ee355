#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

#include <stdio.h>
#include <string.h>

#include "routing.h"

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
                      "match=h.*.qkv role=matrix row_splits=2,2,2 group=3 null_grad=skip\n"
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
    assert_int_equal(desc.group, 3);
    assert_int_equal(desc.null_grad, MUONSHARD_NULL_GRAD_SKIP);
    assert_true(desc.lr_multiplier == 1 && desc.decay_multiplier == 1);

    desc = tensor("h.4.mlp", 2, 6, 3, 0);
    assert_int_equal(routing_apply(&rules, &desc, &rule, message), MUONSHARD_OK);
    assert_int_equal(rule, 2);
    assert_int_equal(desc.role, MUONSHARD_ROLE_FROZEN);
    desc = tensor("h.5.mlp", 2, 6, 3, 0);
    assert_int_equal(routing_apply(&rules, &desc, &rule, message), MUONSHARD_OK);
    assert_int_equal(rule, -1);

    desc = tensor("conv1", 3, 6, 3, 2);
    assert_int_equal(routing_apply(&rules, &desc, &rule, message), MUONSHARD_OK);
    assert_int_equal(rule, 3);
    assert_int_equal(desc.form, MUONSHARD_FLATTEN);
    assert_int_equal(desc.null_grad, MUONSHARD_NULL_GRAD_ZERO);
    desc = tensor("conv12", 3, 6, 3, 2); /* ? is one character, and a pattern is the whole name */
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

static void table_says_what_went_where(void **state) {
    (void)state;
    routing rules;
    muonshard_tensor_desc tensors[] = {tensor("qkv", 3, 5, 6, 3), tensor("bias", 1, 7, 0, 0),
                                       tensor("conv", 3, 6, 3, 2)};
    int chosen[3];
    assert_int_equal(routing_parse("match=qkv role=matrix row_splits=2,2,2\n"
                                   "match=conv role=matrix form=flatten\n",
                                   &rules, message),
                     MUONSHARD_OK);
    for (int i = 0; i < 3; i++)
        assert_int_equal(routing_apply(&rules, &tensors[i], &chosen[i], message), MUONSHARD_OK);
    char text[1024] = "";
    FILE *out = fmemopen(text, sizeof text, "w");
    assert_non_null(out);
    routing_print(&rules, tensors, chosen, 3, out);
    fclose(out);
    assert_string_equal(text, "# tensor  shape      role         matrices  rule\n"
                              "  qkv     [5, 6, 3]  matrix             15  1: qkv\n"
                              "  bias    [7]        elementwise         -  none\n"
                              "  conv    [6, 3, 2]  matrix              1  2: conv, flattened\n");
    routing_free(&rules);
}

static void bad_rules_are_named(void **state) {
    (void)state;
    static const struct {
        const char *groups, *text;
    } cases[] = {
        {"match=a role=matrix\nmatch=b rolle=matrix\n", "groups: rule 2: unknown word \"rolle\""},
        {"match=a role=matrix frozen\n", "rule 1: \"frozen\" is not of the form WORD=VALUE"},
        {"match=a role=matrix role=frozen\n", "rule 1: role is given twice"},
        {"match=a\n", "rule 1 has no role"},
        {"role=matrix\n", "rule 1 has no match"},
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
        {"match=a role=matrix group=-1\n", "group is \"-1\""},
        {"match=a role=matrix group=1.5\n", "group is \"1.5\""},
        {"match=a role=matrix group=99999999999999999999\n", "group is \"9999"},
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
         "rule 1 (match=a): row_splits add up to 5, tensor \"a\" has 6 rows"},
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
        cmocka_unit_test(table_says_what_went_where),
        cmocka_unit_test(bad_rules_are_named),
        cmocka_unit_test(rules_have_to_fit),
    };
    return cmocka_run_group_tests_name("routing", tests, NULL, NULL);
}
