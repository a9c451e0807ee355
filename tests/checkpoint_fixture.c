#include "checkpoint_fixture.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

char checkpoint_directory[64];
static journey *current;

int checkpoint_setup(void **state) {
    (void)state;
    snprintf(checkpoint_directory, sizeof checkpoint_directory, "/tmp/test_checkpoint_XXXXXX");
    return mkdtemp(checkpoint_directory) ? 0 : -1;
}

void checkpoint_empty(void) {
    char command[128];
    snprintf(command, sizeof command, "rm -rf %s/*", checkpoint_directory);
    assert_int_equal(system(command), 0);
}

int checkpoint_teardown(void **state) {
    (void)state;
    checkpoint_empty();
    return rmdir(checkpoint_directory);
}

const char *in_directory(const char *name) {
    static _Thread_local char buffers[4][256];
    static _Thread_local int next;
    char *path = buffers[next++ % 4];
    snprintf(path, sizeof buffers[0], "%s/%s", checkpoint_directory, name);
    return path;
}

/* ---- what a rank does ---- */

static void take_steps(rig *r, int from, int to) {
    for (int i = from; i < to && r->status == MUONSHARD_OK; i++) {
        if (current->wait_after && i == current->wait_after)
            r->status = muonshard_save_wait(r->optimizer);
        rig_gradients(r);
        rig_step(r);
    }
}

static void keep_message(const rig *r, int rank) {
    snprintf(current->message[rank], sizeof current->message[rank], "%s",
             muonshard_last_error(r->optimizer));
}

static bool load(rig *r, int rank) {
    journey *j = current;
    muonshard_load_result result = MUONSHARD_LOAD_RESULT_INIT;
    j->loaded[rank] = muonshard_load(r->optimizer, j->from ? j->from : checkpoint_directory,
                                     &j->load_args, &result);
    keep_message(r, rank);
    rig_pull(r);
    j->unchanged[rank] = rig_digest(r);
    j->result[rank] = result;
    if (rank == 0 && j->loaded[rank] == MUONSHARD_OK && result.found) {
        snprintf(j->path, sizeof j->path, "%s", result.path);
        snprintf(j->user, sizeof j->user, "%s", result.user);
    }
    r->step = (int)result.step;
    return j->loaded[rank] == MUONSHARD_OK;
}

static void run(rig *r, outcome *out) {
    (void)out;
    journey *j = current;
    const int rank = muonshard_comm_rank(r->comm);
    if (r->status != MUONSHARD_OK || (j->load && !load(r, rank)))
        return;
    take_steps(r, 0, j->before);
    j->at_save[rank] = rig_digest(r);
    if (j->save && r->status == MUONSHARD_OK) {
        j->saved[rank] =
            muonshard_save(r->optimizer, j->to ? j->to : checkpoint_directory, &j->save_args);
        keep_message(r, rank);
    }
    take_steps(r, 0, j->after);
    if (j->save && j->saved[rank] == MUONSHARD_OK) {
        j->saved[rank] = muonshard_save_wait(r->optimizer);
        keep_message(r, rank);
    }
    j->stats[rank] = (muonshard_stats_info)MUONSHARD_STATS_INIT;
    muonshard_stats(r->optimizer, &j->stats[rank]);
    j->at_end[rank] = rig_digest(r);
}

uint64_t travel(journey *j, int ranks, const rig_case *setup) {
    outcome out = {.setup = {setup}, .between = run};
    current = j;
    assert_int_equal(threads_run(ranks, ranks_run, &out), MUONSHARD_OK);
    for (int r = 0; r < ranks; r++) {
        if (out.status[r] != MUONSHARD_OK)
            fail_msg("rank %d: %s", r, out.message[r]);
        assert_int_equal(j->loaded[r], j->loaded[0]);
        assert_int_equal(j->saved[r], j->saved[0]);
        assert_true(out.digest[r] == out.digest[0]);
    }
    return out.digest[0];
}

/* ---- sessions ---- */

char latest_warning[1024];
static char wrong[MAX_RANKS][1024];

bool expect(int rank, bool fine, const char *what, int line) {
    if (!fine && !wrong[rank][0])
        snprintf(wrong[rank], sizeof wrong[rank], "rank %d, line %d: not so: %s", rank, line, what);
    return fine;
}

bool expect_status(rig *r, muonshard_status status, muonshard_status wanted, const char *part,
                   int line) {
    const int rank = muonshard_comm_rank(r->comm);
    const char *text = muonshard_last_error(r->optimizer);
    const bool fine = status == wanted && (status == MUONSHARD_OK || strstr(text, part));
    if (!fine && !wrong[rank][0])
        snprintf(wrong[rank], sizeof wrong[rank],
                 "rank %d, line %d: wanted %d with '%.300s'; %d '%.600s'", rank, line, wanted, part,
                 status, text);
    return fine;
}

void assert_session_fine(void) {
    for (int r = 0; r < MAX_RANKS; r++)
        if (wrong[r][0])
            fail_msg("%s", wrong[r]);
}

/* Rank 0's thread is the only one that warns. */
static void keep_warning(void *user, muonshard_log_level level, const char *message) {
    (void)user;
    if (level == MUONSHARD_LOG_WARNING)
        snprintf(latest_warning, sizeof latest_warning, "%s", message);
}

void session(int ranks, const rig_case *setup, void (*what)(rig *r, outcome *out)) {
    outcome out = {.setup = {setup}, .between = what};
    threads_options options = THREADS_OPTIONS_INIT;
    options.comm.log = keep_warning;
    memset(wrong, 0, sizeof wrong);
    assert_int_equal(threads_run_with(&options, ranks, ranks_run, &out), MUONSHARD_OK);
    assert_session_fine();
    for (int r = 0; r < ranks; r++)
        if (out.status[r] != MUONSHARD_OK)
            fail_msg("rank %d: %s", r, out.message[r]);
}

/* ---- files ---- */

bytes bytes_of(const char *path) {
    bytes b = {NULL, 0};
    FILE *file = fopen(path, "rb");
    if (!file)
        return b;
    fseek(file, 0, SEEK_END);
    const long size = ftell(file);
    rewind(file);
    b.data = calloc((size_t)size + 1, 1);
    b.count = fread(b.data, 1, (size_t)size, file);
    fclose(file);
    return b;
}

bool put_bytes(const char *path, const char *data, size_t count) {
    FILE *file = fopen(path, "wb");
    const bool whole = file && fwrite(data, 1, count, file) == count;
    return file && fclose(file) == 0 && whole;
}

const rig_tensor small_model[] = {
    {RIG_TENSOR("w", MUONSHARD_ROLE_MATRIX, 2, 8, 6)},
    {RIG_TENSOR("blocks:attention:0", MUONSHARD_ROLE_MATRIX, 3, 3, 4, 4)},
    {RIG_TENSOR("gain", MUONSHARD_ROLE_ELEMENTWISE, 1, 5)},
    {RIG_TENSOR("steady", MUONSHARD_ROLE_FROZEN, 2, 2, 2)},
};
const size_t small_count = sizeof small_model / sizeof small_model[0];

rig_case small_case(const char *yaml) {
    return (rig_case){.tensors = small_model, .count = small_count, .yaml = yaml};
}
