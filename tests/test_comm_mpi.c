/* The mpi communicator at any number of ranks. Ranks agree on every outcome, so that one that fails
 * leaves none alone. */
#include <dirent.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "muonshard_mpi.h"
#include "comm_contract.h"
#include "comm_mpi_small.h"

/* After our headers: cmocka makes a macro of the name `fail`. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

static int world_rank, world_size;

/* Fails on every rank where `failure` is not empty on some rank, with the lowest such rank's text.
 */
static void agree_on(const char *failure) {
    char text[512] = "";
    int mine = failure[0] ? world_rank : world_size, lowest;
    MPI_Allreduce(&mine, &lowest, 1, MPI_INT, MPI_MIN, MPI_COMM_WORLD);
    if (lowest == world_size)
        return;
    snprintf(text, sizeof text, "%s", failure);
    MPI_Bcast(text, sizeof text, MPI_CHAR, lowest, MPI_COMM_WORLD);
    fail_msg("rank %d: %s", lowest, text);
}

/* The first condition that fails on this rank, as text for agree_on. */
#define EXPECT(failure, condition)                                                                 \
    do {                                                                                           \
        if (!(condition) && !(failure)[0])                                                         \
            snprintf(failure, sizeof(failure), "line %d: %s", __LINE__, #condition);               \
    } while (0)

/* ---- the contract ---- */

typedef muonshard_status (*create_fn)(MPI_Comm mpi_comm, const muonshard_comm_options *options,
                                      muonshard_comm **comm);

static const struct {
    const char *name;
    create_fn create;
} makers[] = {{"mpi", muonshard_comm_create_mpi}, {"mpi_large", small_comm_create_mpi}};
enum { MAKERS = sizeof makers / sizeof *makers };

typedef struct contract_test {
    char name[64];
    create_fn create;
    const contract_case *one;
} contract_test;

static void world_barrier(muonshard_comm *comm) {
    (void)comm;
    MPI_Barrier(MPI_COMM_WORLD);
}

static void test_contract(void **state) {
    const contract_test *test = *state;
    contract_run run = {.barrier = world_barrier};
    muonshard_comm_options options = MUONSHARD_COMM_OPTIONS_INIT;
    options.timeout_s = 30.0;
    if (test->create(MPI_COMM_WORLD, &options, &run.comm)) {
        agree_on("no communicator");
        return;
    }
    test->one->run(&run);
    agree_on(run.failure);
    muonshard_comm_destroy(run.comm);
}

/* ---- creation ---- */

static void keep_line(void *user, muonshard_log_level level, const char *message) {
    (void)level;
    snprintf(user, 256, "%s", message);
}

static void test_bad_communicators(void **state) {
    (void)state;
    char failure[256] = "", line[256] = "";
    muonshard_comm_options options = MUONSHARD_COMM_OPTIONS_INIT;
    options.log = keep_line;
    options.log_user = line;
    muonshard_comm *comm = (muonshard_comm *)&options;
    EXPECT(failure,
           muonshard_comm_create_mpi(MPI_COMM_NULL, &options, &comm) == MUONSHARD_ERR_ARGUMENT);
    EXPECT(failure, comm == NULL && strstr(line, "MPI_COMM_NULL"));
    EXPECT(failure,
           muonshard_comm_create_mpi(MPI_COMM_WORLD, &options, NULL) == MUONSHARD_ERR_ARGUMENT);
    options.timeout_s = 0.0;
    EXPECT(failure,
           muonshard_comm_create_mpi(MPI_COMM_WORLD, &options, &comm) == MUONSHARD_ERR_ARGUMENT);
    EXPECT(failure, strstr(line, "timeout_s"));
    options.timeout_s = 30.0;
    if (world_size >= 2) {
        MPI_Comm half, inter;
        MPI_Comm_split(MPI_COMM_WORLD, world_rank % 2, 0, &half);
        MPI_Intercomm_create(half, 0, MPI_COMM_WORLD, 1 - world_rank % 2, 1, &inter);
        EXPECT(failure,
               muonshard_comm_create_mpi(inter, &options, &comm) == MUONSHARD_ERR_ARGUMENT);
        EXPECT(failure, strstr(line, "inter-communicator"));
        MPI_Comm_free(&inter);
        MPI_Comm_free(&half);
    }
    agree_on(failure);
}

/* Ranks are those of the communicator given, and two communicators of one program don't mix. */
static void test_reversed_ranks(void **state) {
    (void)state;
    char failure[256] = "";
    MPI_Comm reversed;
    MPI_Comm_split(MPI_COMM_WORLD, 0, -world_rank, &reversed);
    muonshard_comm *plain = NULL, *other = NULL;
    EXPECT(failure, muonshard_comm_create_mpi(MPI_COMM_WORLD, NULL, &plain) == MUONSHARD_OK);
    EXPECT(failure, muonshard_comm_create_mpi(reversed, NULL, &other) == MUONSHARD_OK);
    MPI_Comm_free(&reversed); /* ours is a duplicate */
    agree_on(failure);
    EXPECT(failure, muonshard_comm_rank(other) == world_size - 1 - world_rank);
    EXPECT(failure, muonshard_comm_size(other) == world_size);

    int mine = world_rank, *in_order = calloc((size_t)world_size, sizeof *in_order),
        *backwards = calloc((size_t)world_size, sizeof *backwards);
    assert_non_null(in_order);
    assert_non_null(backwards);
    comm_part parts[2] = {{.send = &mine, .recv = in_order, .bytes = sizeof mine},
                          {.send = &mine, .recv = backwards, .bytes = sizeof mine}};
    comm_request requests[2] = {{.kind = COMM_ALL_GATHER, .parts = &parts[0], .part_count = 1},
                                {.kind = COMM_ALL_GATHER, .parts = &parts[1], .part_count = 1}};
    comm_ticket tickets[2];
    EXPECT(failure, comm_start(plain, &requests[0], &tickets[0]) == MUONSHARD_OK);
    EXPECT(failure, comm_start(other, &requests[1], &tickets[1]) == MUONSHARD_OK);
    EXPECT(failure, comm_wait(other, &tickets[1], 30.0) == MUONSHARD_OK);
    EXPECT(failure, comm_wait(plain, &tickets[0], 30.0) == MUONSHARD_OK);
    for (int r = 0; r < world_size; r++) {
        EXPECT(failure, in_order[r] == r);
        EXPECT(failure, backwards[r] == world_size - 1 - r);
    }
    free(in_order);
    free(backwards);
    muonshard_comm_destroy(plain);
    muonshard_comm_destroy(other);
    agree_on(failure);
}

/* The board has no name once all are attached: a job that is killed leaves nothing in /dev/shm. */
static void test_board_leaves_nothing(void **state) {
    (void)state;
    char failure[256] = "", prefix[64];
    long pid = getpid();
    MPI_Bcast(&pid, 1, MPI_LONG, 0, MPI_COMM_WORLD);
    snprintf(prefix, sizeof prefix, "muonshard-%ld-", pid);
    muonshard_comm *comm = NULL;
    EXPECT(failure, muonshard_comm_create_mpi(MPI_COMM_WORLD, NULL, &comm) == MUONSHARD_OK);
    MPI_Barrier(MPI_COMM_WORLD);
    DIR *shm = opendir("/dev/shm");
    for (struct dirent *entry; shm && (entry = readdir(shm));)
        EXPECT(failure, strncmp(entry->d_name, prefix, strlen(prefix)) != 0);
    if (shm)
        closedir(shm);
    muonshard_comm_destroy(comm);
    agree_on(failure);
}

static void test_exit_codes(void **state) {
    (void)state;
    assert_int_equal(muonshard_mpi_exit_code(MUONSHARD_OK), 0);
    assert_int_equal(muonshard_mpi_exit_code(MUONSHARD_ERR_ARGUMENT), 11);
    assert_int_equal(muonshard_mpi_exit_code(MUONSHARD_ERR_TIMEOUT), 18);
    assert_int_equal(muonshard_mpi_exit_code(MUONSHARD_ERR_INTERNAL), 22);
}

/* ---- deadlines ---- */

typedef struct fatal_count {
    int calls;
    muonshard_status status;
    char text[1024];
} fatal_count;

static void count_fatal(void *user, muonshard_status status, const char *message) {
    fatal_count *count = user;
    count->calls++;
    count->status = status;
    snprintf(count->text, sizeof count->text, "%s", message);
}

static muonshard_comm_options counting(fatal_count *count, double timeout_s) {
    muonshard_comm_options options = MUONSHARD_COMM_OPTIONS_INIT;
    options.timeout_s = timeout_s;
    options.on_fatal = count_fatal;
    options.fatal_user = count;
    return options;
}

/* The last rank doesn't come to a collective. The others say where it is, and where they were. */
static void test_timeout(void **state) {
    (void)state;
    if (world_size == 1)
        return;
    char failure[256] = "", own[96];
    fatal_count count = {0};
    muonshard_comm_options options = counting(&count, 20.0);
    muonshard_comm *comm = NULL;
    if (muonshard_comm_create_mpi(MPI_COMM_WORLD, &options, &comm)) {
        agree_on("no communicator");
        return;
    }
    bool away = world_rank == world_size - 1;
    comm_mark(comm, 12, away ? "momentum batch %d" : "all-gather batch %d", away ? 1 : 3);
    MPI_Barrier(MPI_COMM_WORLD);
    int mine = 0, *all = calloc((size_t)world_size, sizeof *all);
    assert_non_null(all);
    comm_part part = {.send = &mine, .recv = all, .bytes = sizeof mine};
    comm_request request = {.kind = COMM_ALL_GATHER, .parts = &part, .part_count = 1};
    comm_ticket ticket;
    if (!away) {
        double begin = now_s();
        EXPECT(failure, comm_start(comm, &request, &ticket) == MUONSHARD_OK);
        EXPECT(failure, comm_wait(comm, &ticket, 0.5) == MUONSHARD_ERR_TIMEOUT);
        double seconds = now_s() - begin;
        EXPECT(failure, seconds >= 0.5 && seconds < 1.5);
        EXPECT(failure, count.calls == 1 && count.status == MUONSHARD_ERR_TIMEOUT);
        EXPECT(failure, strcmp(count.text, muonshard_comm_last_error(comm)) == 0);
        snprintf(own, sizeof own, "rank %d of %d (host ", world_size - 1, world_size);
        EXPECT(failure, strstr(count.text, own) == count.text);
        EXPECT(failure, strstr(count.text, "): step 12, momentum batch 1: no sign of life for "));
        snprintf(own, sizeof own,
                 " (running); rank %d waited 0.5 s for it in step 12, all-gather batch 3",
                 world_rank);
        EXPECT(failure, strstr(count.text, own));
        EXPECT(failure,
               muonshard_comm_allgather(comm, &mine, all, sizeof mine) == MUONSHARD_ERR_TIMEOUT);
        EXPECT(failure, muonshard_comm_agree(comm, MUONSHARD_OK, NULL) == MUONSHARD_ERR_TIMEOUT);
        EXPECT(failure, count.calls == 1);
    }
    MPI_Barrier(MPI_COMM_WORLD);
    /* MPI still has the buffers of what never ended: the dead rank's part comes now, then they may
     * go. */
    if (away) {
        EXPECT(failure, comm_start(comm, &request, &ticket) == MUONSHARD_OK);
        EXPECT(failure, comm_wait(comm, &ticket, 10.0) == MUONSHARD_OK);
    }
    MPI_Barrier(MPI_COMM_WORLD);
    muonshard_comm_destroy(comm);
    free(all);
    agree_on(failure);
}

/* A stopped process is named, also where it stands at the same place as who asks. */
static void test_stopped_rank(void **state) {
    (void)state;
    if (world_size == 1)
        return;
    char failure[256] = "", want[64], text[256] = "";
    muonshard_comm *comm = NULL;
    EXPECT(failure, muonshard_comm_create_mpi(MPI_COMM_WORLD, NULL, &comm) == MUONSHARD_OK);
    agree_on(failure);
    comm_mark(comm, 5, "agree");
    long pid = getpid();
    MPI_Bcast(&pid, 1, MPI_LONG, world_size - 1, MPI_COMM_WORLD);
    MPI_Barrier(MPI_COMM_WORLD);
    if (world_rank == 0) {
        snprintf(want, sizeof want, "rank %d: step 5, agree (stopped)", world_size - 1);
        EXPECT(failure, comm->ops->describe(comm, text, sizeof text) == 0);
        EXPECT(failure, comm->ops->blame(comm, 20.0, text, sizeof text) == 0);
        EXPECT(failure, kill((pid_t)pid, SIGSTOP) == 0);
        for (double begin = now_s(); !text[0] && now_s() - begin < 5.0;)
            comm->ops->describe(comm, text, sizeof text);
        EXPECT(failure, strcmp(text, want) == 0);
        EXPECT(failure, comm->ops->blame(comm, 20.0, text, sizeof text) > 0);
        EXPECT(failure, kill((pid_t)pid, SIGCONT) == 0);
        snprintf(want, sizeof want, "rank %d of %d (host ", world_size - 1, world_size);
        EXPECT(failure, strstr(text, want) == text && strstr(text, "): step 5, agree: no sign of"));
        EXPECT(failure, strstr(text, " s (stopped)"));
    }
    MPI_Barrier(MPI_COMM_WORLD);
    muonshard_comm_destroy(comm);
    agree_on(failure);
}

/* The last rank comes late to the creation, when the others have given up. Last of all tests: MPI
 * can't take back a duplication under way. */
static void test_creation_timeout(void **state) {
    (void)state;
    if (world_size == 1)
        return;
    char failure[256] = "";
    fatal_count count = {0};
    muonshard_comm_options options = counting(&count, 0.5);
    muonshard_comm *comm = NULL;
    if (world_rank != world_size - 1) {
        double begin = now_s();
        EXPECT(failure,
               muonshard_comm_create_mpi(MPI_COMM_WORLD, &options, &comm) == MUONSHARD_ERR_TIMEOUT);
        double seconds = now_s() - begin;
        EXPECT(failure, seconds >= 0.5 && seconds < 1.5);
        EXPECT(failure, comm == NULL && count.calls == 1);
        EXPECT(failure, strstr(count.text, "create communicator"));
    }
    agree_on(failure);
}

int main(int argc, char **argv) {
    muonshard_comm *comm = NULL;
    bool refused = muonshard_comm_create_mpi(MPI_COMM_NULL, NULL, &comm) == MUONSHARD_ERR_STATE;
    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &world_rank);
    MPI_Comm_size(MPI_COMM_WORLD, &world_size);
    if (world_rank != 0 && !freopen("/dev/null", "w", stdout))
        MPI_Abort(MPI_COMM_WORLD, 1);

    static contract_test contracts[MAKERS * CONTRACT_CASES];
    static struct CMUnitTest tests[MAKERS * CONTRACT_CASES];
    for (size_t i = 0; i < MAKERS * CONTRACT_CASES; i++) {
        contract_test *one = &contracts[i];
        one->create = makers[i / CONTRACT_CASES].create;
        one->one = &contract_cases[i % CONTRACT_CASES];
        snprintf(one->name, sizeof one->name, "%s/%s", makers[i / CONTRACT_CASES].name,
                 one->one->name);
        tests[i] = (struct CMUnitTest){one->name, test_contract, NULL, NULL, one};
    }
    const struct CMUnitTest others[] = {
        cmocka_unit_test(test_bad_communicators),    cmocka_unit_test(test_reversed_ranks),
        cmocka_unit_test(test_board_leaves_nothing), cmocka_unit_test(test_exit_codes),
        cmocka_unit_test(test_stopped_rank),         cmocka_unit_test(test_timeout),
        cmocka_unit_test(test_creation_timeout),
    };
    int failed = cmocka_run_group_tests_name("contract", tests, NULL, NULL);
    failed += cmocka_run_group_tests_name("mpi", others, NULL, NULL);
    MPI_Finalize();
    bool refused_after =
        muonshard_comm_create_mpi(MPI_COMM_NULL, NULL, &comm) == MUONSHARD_ERR_STATE;
    if (!refused || !refused_after)
        fprintf(stderr, "creation without MPI was not refused\n");
    return failed != 0 || !refused || !refused_after;
}
