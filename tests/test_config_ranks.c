/* The same config on all ranks, which are threads of this process. */
#include "config_fixture.h"

#include "comm_threads.h"

enum { RANKS = 3 };

typedef struct rank_state {
    int scenario;
    muonshard_status status;
    program_values values;
    muonshard_config *config;
    error_text error;
} rank_state;

enum { BROADCAST, OTHER_TABLES, OTHER_DEFAULTS, CHECK_EQUAL, CHECK_DIFFERENT };

static const muonshard_param other_default[] = {
    {"flag", MUONSHARD_PARAM_BOOL, offsetof(program_values, flag), "false", 0, 0, NULL, "A flag."}};

/* Rank 2 has fewer rows, or another default; elsewhere all have the same table. */
static muonshard_status add_table(rank_state *r, int rank) {
    const bool odd = rank == 2;
    if (r->scenario == OTHER_TABLES)
        return muonshard_config_add_table(r->config, program_table, odd ? 1 : PROGRAM_ROWS,
                                          &r->values);
    if (r->scenario == OTHER_DEFAULTS)
        return muonshard_config_add_table(r->config, odd ? other_default : program_table, 1,
                                          &r->values);
    return muonshard_config_add_table(r->config, program_table, PROGRAM_ROWS, &r->values);
}

static muonshard_status broadcast(rank_state *r, muonshard_comm *comm) {
    const bool first = muonshard_comm_rank(comm) == 0;
    /* What the other ranks had set themselves has to go. */
    TRY(muonshard_config_load_string(
        r->config, first && r->scenario == BROADCAST ? valid_yaml : "momentum: 0.5\nlr: 0.125\n"));
    return muonshard_config_broadcast(r->config, comm);
}

static muonshard_status check_equal(rank_state *r, muonshard_comm *comm) {
    const int rank = muonshard_comm_rank(comm);
    TRY(muonshard_config_set(r->config, "lr",
                             r->scenario == CHECK_DIFFERENT && rank > 0 ? "0.02" : "1e-2"));
    TRY(muonshard_config_set(r->config, "name", rank == 2 ? "a" : "b")); /* not the library's */
    return config_check_equal(r->config, comm, &r->error);
}

static void run_rank(muonshard_comm *comm, void *arg) {
    rank_state *r = (rank_state *)arg + muonshard_comm_rank(comm);
    r->status = muonshard_config_create(&r->config);
    if (r->status == MUONSHARD_OK)
        r->status = add_table(r, muonshard_comm_rank(comm));
    if (r->status == MUONSHARD_OK)
        r->status = r->scenario <= OTHER_DEFAULTS ? broadcast(r, comm) : check_equal(r, comm);
}

static void run_ranks(int scenario, rank_state ranks[RANKS]) {
    for (int i = 0; i < RANKS; ++i)
        ranks[i] = (rank_state){.scenario = scenario};
    assert_int_equal(threads_run(RANKS, run_rank, ranks), MUONSHARD_OK);
}

static void destroy_configs(rank_state ranks[RANKS]) {
    for (int i = 0; i < RANKS; ++i)
        muonshard_config_destroy(ranks[i].config);
}

static void test_broadcast(void **state) {
    (void)state;
    rank_state ranks[RANKS];
    run_ranks(BROADCAST, ranks);
    char *expected = config_dump(ranks[0].config);
    assert_non_null(strstr(expected, "preset: moonlight\nlr: 0.02\n"));
    for (int i = 0; i < RANKS; ++i) {
        assert_int_equal(ranks[i].status, MUONSHARD_OK);
        char *text = config_dump(ranks[i].config);
        assert_string_equal(text, expected);
        free(text);
        assert_string_equal(ranks[i].values.groups, "a=b c=d,e\nplain item\n");
        assert_real(config_settings(ranks[i].config)->momentum, 0.95);
        /* lr was explicit on rank 0, the momentum form wasn't: only the one stays. */
        config_put(ranks[i].config, "preset", "jordan");
        assert_real(config_settings(ranks[i].config)->lr, 0.02);
        assert_int_equal(config_settings(ranks[i].config)->momentum_form, MOMENTUM_EMA);
    }
    free(expected);
    destroy_configs(ranks);
}

/* All ranks get the same answer and keep what they had. */
static void test_broadcast_mismatch(void **state) {
    (void)state;
    rank_state ranks[RANKS];
    static const char *const messages[] = {
        [OTHER_TABLES] = "rank 2's tables of parameters differ from rank 0's",
        [OTHER_DEFAULTS] = "rank 2's values after the broadcast differ from rank 0's",
    };
    for (int scenario = OTHER_TABLES; scenario <= OTHER_DEFAULTS; ++scenario) {
        run_ranks(scenario, ranks);
        for (int i = 0; i < RANKS; ++i) {
            assert_int_equal(ranks[i].status, MUONSHARD_ERR_MISMATCH);
            assert_string_equal(muonshard_config_last_error(ranks[i].config), messages[scenario]);
            assert_real(config_settings(ranks[i].config)->lr, 0.125);
        }
        destroy_configs(ranks);
    }
}

static void test_check_equal(void **state) {
    (void)state;
    rank_state ranks[RANKS];
    run_ranks(CHECK_EQUAL, ranks);
    for (int i = 0; i < RANKS; ++i)
        assert_int_equal(ranks[i].status, MUONSHARD_OK);
    destroy_configs(ranks);
    run_ranks(CHECK_DIFFERENT, ranks);
    for (int i = 0; i < RANKS; ++i) {
        assert_int_equal(ranks[i].status, MUONSHARD_ERR_MISMATCH);
        assert_string_equal(ranks[i].error.text,
                            "rank 1's config differs from rank 0's: lr is 0.02, rank 0 has 0.01");
    }
    destroy_configs(ranks);
}

static void test_broadcast_to_self(void **state) {
    (void)state;
    program_values v;
    muonshard_config *config = config_fresh_with_program(&v);
    muonshard_comm *comm = NULL;
    error_text error;
    assert_int_equal(muonshard_comm_create_self(NULL, &comm), MUONSHARD_OK);
    config_load(config, valid_yaml);
    char *before = config_dump(config);
    assert_int_equal(muonshard_config_broadcast(config, comm), MUONSHARD_OK);
    char *after = config_dump(config);
    assert_string_equal(after, before);
    assert_int_equal(config_check_equal(config, comm, &error), MUONSHARD_OK);
    assert_int_equal(muonshard_config_broadcast(NULL, comm), MUONSHARD_ERR_ARGUMENT);
    assert_int_equal(muonshard_config_broadcast(config, NULL), MUONSHARD_ERR_ARGUMENT);
    assert_int_equal(muonshard_config_add_table(config, other_default, 1, &v), MUONSHARD_ERR_STATE);
    free(before);
    free(after);
    muonshard_comm_destroy(comm);
    muonshard_config_destroy(config);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_broadcast),
        cmocka_unit_test(test_broadcast_mismatch),
        cmocka_unit_test(test_check_equal),
        cmocka_unit_test(test_broadcast_to_self),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
