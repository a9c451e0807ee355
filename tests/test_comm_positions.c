/* The board of positions, with threads as ranks: it needs shared memory and all-gathers, not MPI.
 */
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

#include "comm/mpi_positions.h"
#include "comm_threads.h"

/* After our headers: cmocka makes a macro of the name `fail`. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

enum { RANKS = 7, TEXT = 640 };

typedef struct board_test {
    bool opened[RANKS];
    char text[RANKS][TEXT], cut[RANKS][16];
    size_t length[RANKS], cut_length[RANKS];
    atomic_int claims;
} board_test;

static void mark(mpi_positions *board, int64_t step, const char *phase) {
    comm_position position = {.step = step};
    snprintf(position.phase, sizeof position.phase, "%s", phase);
    positions_mark(board, &position);
}

/* Opens, runs `place` to mark, and describes when all have marked. */
static void describe(muonshard_comm *comm, board_test *test,
                     void (*place)(mpi_positions *board, int rank)) {
    int r = comm->rank;
    mpi_positions *board = NULL;
    test->opened[r] = positions_open(comm, &board) == MUONSHARD_OK && board;
    place(board, r);
    threads_barrier(comm);
    test->length[r] = positions_describe(board, test->text[r], TEXT);
    test->cut_length[r] = positions_describe(board, test->cut[r], sizeof test->cut[r]);
    const bool early = positions_claimed(board);
    threads_barrier(comm);
    if (positions_claim(board) && !early)
        atomic_fetch_add(&test->claims, positions_claimed(board));
    threads_barrier(comm);
    positions_close(board);
}

/* Rank 0 waits in step 9; 1 is elsewhere in it, 2 further in it, 3 is with rank 0, 4 is two steps
 * behind, 5 has left step 8 for the caller's code, 6 never got into a step. */
static void place_apart(mpi_positions *board, int rank) {
    switch (rank) {
    case 1: mark(board, 9, "momentum batch 0"); break;
    case 2:
        mark(board, 9, "momentum batch 0");
        mark(board, 9, "momentum batch 1");
        break;
    case 4: mark(board, 7, "all-gather batch 3"); break;
    case 5:
        mark(board, 8, "apply");
        mark(board, 0, "outside the library");
        break;
    case 6: mark(board, 0, "commit"); break;
    default: mark(board, 9, "all-gather batch 3"); break;
    }
}

static void rank_apart(muonshard_comm *comm, void *arg) {
    describe(comm, arg, place_apart);
}

static void test_most_behind_first(void **state) {
    (void)state;
    static board_test test;
    assert_int_equal(threads_run(RANKS, rank_apart, &test), MUONSHARD_OK);
    for (int r = 0; r < RANKS; r++)
        assert_true(test.opened[r]);
    const char *want = "rank 6: commit; rank 4: step 7, all-gather batch 3; rank 5: after step 8, "
                       "outside the library; rank 1: step 9, momentum batch 0 and 1 more";
    assert_string_equal(test.text[0], want);
    assert_int_equal(test.length[0], strlen(want));
    assert_string_equal(test.text[3], want);
    /* As snprintf: cut to the size, with the length of the whole. */
    assert_string_equal(test.cut[0], "rank 6: commit;");
    assert_int_equal(test.cut_length[0], strlen(want));
    assert_int_equal(test.claims, 1);
}

static void place_together(mpi_positions *board, int rank) {
    (void)rank;
    mark(board, 3, "agree");
}

static void rank_together(muonshard_comm *comm, void *arg) {
    describe(comm, arg, place_together);
}

static void test_nobody_elsewhere(void **state) {
    (void)state;
    static board_test test;
    assert_int_equal(threads_run(3, rank_together, &test), MUONSHARD_OK);
    for (int r = 0; r < 3; r++) {
        assert_true(test.opened[r]);
        assert_string_equal(test.text[r], "");
        assert_int_equal(test.length[r], 0);
    }
}

/* ---- blame ---- */

/* Rank 0 waits in step 9; 1 is with it, 2 behind, 3 further, for 0.3 s; those that `wait` say so.
 */
typedef struct blame_test {
    bool waits[RANKS];
    char text[TEXT];
    size_t length;
} blame_test;

static void rank_blames(muonshard_comm *comm, void *arg) {
    blame_test *test = arg;
    mpi_positions *board = NULL;
    if (positions_open(comm, &board) != MUONSHARD_OK || !board)
        return;
    mark(board, comm->rank == 2 ? 8 : comm->rank == 3 ? 10 : 9, "all-gather batch 3");
    threads_barrier(comm);
    for (double begin = now_s(); now_s() - begin < 0.3; comm_back_off(1.0))
        if (test->waits[comm->rank])
            positions_beat(board);
    if (comm->rank == 0)
        test->length = positions_blame(board, 0.3, test->text, TEXT);
    threads_barrier(comm);
    positions_close(board);
}

static void test_the_silent_are_blamed(void **state) {
    (void)state;
    static blame_test behind = {.waits = {true}}, beside = {.waits = {true, false, true}},
                      further = {.waits = {true, true, true, false}},
                      none = {.waits = {true, true, true, true}};
    const char *const want = ": no sign of life for 0.3 s (running)";
    assert_int_equal(threads_run(4, rank_blames, &behind), MUONSHARD_OK);
    assert_ptr_equal(strstr(behind.text, "rank 2 of 4 (host "), behind.text);
    assert_non_null(strstr(behind.text, "): step 8, all-gather batch 3"));
    assert_non_null(strstr(behind.text, want));
    assert_int_equal(behind.length, strlen(behind.text));
    assert_int_equal(threads_run(4, rank_blames, &beside), MUONSHARD_OK);
    assert_ptr_equal(strstr(beside.text, "rank 1 of 4 (host "), beside.text);
    assert_int_equal(threads_run(4, rank_blames, &further), MUONSHARD_OK);
    assert_string_equal(further.text, "");
    assert_int_equal(threads_run(4, rank_blames, &none), MUONSHARD_OK);
    assert_string_equal(none.text, "");
    assert_int_equal(none.length, 0);
}

/* Marks of all ranks while all read: a place is seen whole or not at all. */
enum { MARKS = 3000 };
static void rank_busy(muonshard_comm *comm, void *arg) {
    int *torn = arg;
    mpi_positions *board = NULL;
    torn[comm->rank] = positions_open(comm, &board) != MUONSHARD_OK || !board;
    for (int i = 1; i <= MARKS; i++) {
        char text[TEXT], phase[48];
        memset(phase, 'a' + i % 26, sizeof phase - 1);
        phase[sizeof phase - 1] = '\0';
        mark(board, i, phase);
        if (i % 16)
            continue;
        positions_describe(board, text, sizeof text);
        long long step;
        const char *at = strstr(text, ": step ");
        if (at && sscanf(at, ": step %lld, %47s", &step, phase) == 2)
            for (size_t k = 0; k < 47; k++)
                torn[comm->rank] += phase[k] != 'a' + step % 26;
    }
    threads_barrier(comm);
    positions_close(board);
}

static void test_reads_are_whole(void **state) {
    (void)state;
    int torn[3] = {0};
    assert_int_equal(threads_run(3, rank_busy, torn), MUONSHARD_OK);
    for (int r = 0; r < 3; r++)
        assert_int_equal(torn[r], 0);
}

static void test_no_board(void **state) {
    (void)state;
    char text[8] = "left";
    assert_int_equal(positions_describe(NULL, text, sizeof text), 0);
    assert_string_equal(text, "");
    assert_int_equal(positions_blame(NULL, 1.0, text, sizeof text), 0);
    positions_mark(NULL, NULL);
    positions_beat(NULL);
    assert_false(positions_gone(NULL));
    assert_false(positions_claimed(NULL));
    assert_true(positions_claim(NULL));
    positions_close(NULL);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_most_behind_first), cmocka_unit_test(test_nobody_elsewhere),
        cmocka_unit_test(test_the_silent_are_blamed), cmocka_unit_test(test_reads_are_whole),
        cmocka_unit_test(test_no_board)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
