/* Saves that fail, and what of older ones is kept: all ranks are told, with the file's name;
 * nothing is left of it, older checkpoints load as before, and the handle goes on. */
#include <dirent.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include "checkpoint_fixture.h"

#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

enum { RANKS = 2 };

static void step(rig *r) {
    rig_gradients(r);
    rig_step(r);
}

static muonshard_status save_to(rig *r, const char *directory, int keep, int defer) {
    muonshard_save_args args = MUONSHARD_SAVE_ARGS_INIT;
    args.keep = keep;
    args.defer = defer;
    const muonshard_status status = muonshard_save(r->optimizer, directory, &args);
    return status || !defer ? status : muonshard_save_wait(r->optimizer);
}

static muonshard_status save(rig *r, int keep, int defer) {
    return save_to(r, checkpoint_directory, keep, defer);
}

/* The step that a directory goes on with; -1: none. */
static int64_t load(rig *r) {
    muonshard_load_result result = MUONSHARD_LOAD_RESULT_INIT;
    muonshard_load_args args = MUONSHARD_LOAD_ARGS_INIT;
    args.optional = 1;
    const muonshard_status status =
        muonshard_load(r->optimizer, checkpoint_directory, &args, &result);
    rig_pull(r);
    r->step = (int)result.step;
    return status ? -2 : result.found ? result.step : -1;
}

/* What `find` prints of the test's directory, sorted, in one line. */
static void listing(const char *options, char *text, size_t size) {
    char command[512];
    snprintf(command, sizeof command, "cd %s && find . -mindepth 1 %s | sort | tr '\\n' ' '",
             checkpoint_directory, options);
    FILE *pipe = popen(command, "r");
    const size_t length = pipe ? fread(text, 1, size - 1, pipe) : 0;
    text[length] = '\0';
    if (pipe)
        pclose(pipe);
}

static void assert_listing(const char *options, const char *expected) {
    char text[4096];
    listing(options, text, sizeof text);
    if (strcmp(text, expected) != 0)
        fail_msg("'%s' is there; wanted '%s'", text, expected);
}

/* ---- pretended errors ---- */

#ifdef MUONSHARD_FAULTS

static const char *const points[] = {"make directory", "file create", "file write",
                                     "file sync",      "file rename", "directory sync"};
enum { POINTS = sizeof points / sizeof points[0] };

/* Counters are the process's, and never begin again. */
static long passed;
static char log_path[80];

static long passes_of(const char *point) {
    char line[128];
    long count = 0;
    FILE *file = fopen(log_path, "r");
    while (file && fgets(line, sizeof line, file)) {
        line[strcspn(line, "\n")] = '\0';
        count += strcmp(line, point) == 0;
    }
    if (file)
        fclose(file);
    unlink(log_path);
    return count;
}

/* At the point's `number`-th pass from now on; 0: nowhere, but passes are counted. */
static void begin_fault(const char *action, const char *point, long number) {
    char text[128];
    snprintf(text, sizeof text, "%s@%s:%ld", action, point, number ? passed + number : 0);
    unlink(log_path);
    setenv("MUONSHARD_FAULT_LOG", log_path, 1);
    setenv("MUONSHARD_FAULT", text, 1);
}

static long end_fault(const char *point) {
    unsetenv("MUONSHARD_FAULT");
    unsetenv("MUONSHARD_FAULT_LOG");
    const long count = passes_of(point);
    passed += count;
    return count;
}

static struct {
    const char *action, *point, *text;
    long number, count;
    int defer;
    muonshard_status expected;
} fault;

static void meet_fault(rig *r, outcome *out) {
    (void)out;
    const int rank = muonshard_comm_rank(r->comm);
    step(r);
    EXPECT_STATUS(save(r, 0, 0), MUONSHARD_OK, "");
    const uint64_t before = rig_digest(r);
    step(r);
    threads_barrier(r->comm);
    if (rank == 0)
        begin_fault(fault.action, fault.point, fault.number);
    threads_barrier(r->comm);
    const muonshard_status status = save(r, 0, fault.defer);
    EXPECT_STATUS(status, fault.expected, checkpoint_directory);
    EXPECT(status == MUONSHARD_OK || strstr(muonshard_last_error(r->optimizer), fault.text));
    threads_barrier(r->comm);
    if (rank == 0)
        fault.count = end_fault(fault.point);
    threads_barrier(r->comm);
    EXPECT(load(r) == (status ? 1 : 2));
    EXPECT(status == MUONSHARD_OK || rig_digest(r) == before);
    step(r);
    EXPECT_STATUS(save(r, 0, fault.defer), MUONSHARD_OK, "");
    EXPECT(load(r) == (status ? 2 : 3));
}

static void try_fault(const char *action, const char *text, size_t point, long number, int defer,
                      muonshard_status expected) {
    const rig_case setup = small_case("{preset: jordan}");
    checkpoint_empty();
    fault.action = action;
    fault.text = text;
    fault.point = points[point];
    fault.number = number;
    fault.defer = defer;
    fault.expected = expected;
    session(RANKS, &setup, meet_fault);
    assert_listing("-name '*.tmp'", "");
}

static void pretended_errors(void **state) {
    (void)state;
    static const char *const actions[] = {"ENOSPC", "EIO", "EROFS"};
    const int codes[] = {ENOSPC, EIO, EROFS};
    size_t tried = 0;
    snprintf(log_path, sizeof log_path, "%s.log", checkpoint_directory);
    for (size_t p = 0; p < POINTS; p++) {
        unsetenv("MUONSHARD_FAULT");
        try_fault("EIO", "", p, 0, 0, MUONSHARD_OK);
        const long count = fault.count;
        assert_true(count >= 2);
        for (long n = 1; n <= count; n++)
            for (int k = 0; k < 3; k++, tried++)
                try_fault(actions[k], strerror(codes[k]), p, n, (int)(n + k) % 2, MUONSHARD_ERR_IO);
    }
    for (long n = 1; n <= 3; n++)
        try_fault("short", "", 2, n, (int)n % 2, MUONSHARD_OK);
    print_message("%zu errors\n", tried);
    assert_true(tried > 40);
}
#endif

#ifdef MUONSHARD_FAULTS
static void wait_until(double when) {
    for (;;) {
        struct timespec now, pause = {0, 20000000};
        clock_gettime(CLOCK_MONOTONIC, &now);
        if ((double)now.tv_sec + 1e-9 * (double)now.tv_nsec > when)
            return;
        nanosleep(&pause, NULL);
    }
}

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* One rank's file is late: all are told, and go on. */
static void meet_late_file(rig *r, outcome *out) {
    (void)out;
    const int rank = muonshard_comm_rank(r->comm);
    step(r);
    EXPECT_STATUS(save(r, 0, 0), MUONSHARD_OK, "");
    step(r);
    threads_barrier(r->comm);
    if (rank == 0)
        begin_fault("sleep=6", "file write", 1);
    threads_barrier(r->comm);
    const double begin = seconds();
    EXPECT_STATUS(save(r, 0, fault.defer), MUONSHARD_ERR_TIMEOUT, "not written within 2 s");
    EXPECT(strstr(muonshard_last_error(r->optimizer), "step-00000002/rank-0000"));
    EXPECT_STATUS(save(r, 0, fault.defer), MUONSHARD_ERR_STATE, "is still being written");
    EXPECT(load(r) == 1);
    step(r);
    EXPECT(seconds() < begin + 5.5);
    wait_until(begin + 7);
    threads_barrier(r->comm);
    if (rank == 0)
        end_fault("file write");
    threads_barrier(r->comm);
    EXPECT_STATUS(save(r, 0, fault.defer), MUONSHARD_OK, "");
    EXPECT(load(r) == 2);
}

/* The manifest is late: the others can't wait any longer, and their end is everybody's. */
static void meet_late_manifest(rig *r, outcome *out) {
    (void)out;
    const int rank = muonshard_comm_rank(r->comm);
    step(r);
    threads_barrier(r->comm);
    if (rank == 0)
        begin_fault("sleep=4", "file write", 3);
    threads_barrier(r->comm);
    EXPECT_STATUS(save(r, 0, fault.defer), MUONSHARD_ERR_TIMEOUT, "no completion within 2 s");
    EXPECT(save(r, 0, 0) == MUONSHARD_ERR_TIMEOUT);
    threads_barrier(r->comm);
    if (rank == 0)
        end_fault("file write");
}

/* What is not waited for is not complete, and in nobody's way. */
static void leave_pending(rig *r, outcome *out) {
    (void)out;
    const int rank = muonshard_comm_rank(r->comm);
    muonshard_save_args args = MUONSHARD_SAVE_ARGS_INIT;
    args.defer = 1;
    step(r);
    EXPECT_STATUS(save(r, 0, 0), MUONSHARD_OK, "");
    step(r);
    threads_barrier(r->comm);
    if (rank == 0)
        begin_fault("sleep=1", "file write", 1);
    threads_barrier(r->comm);
    EXPECT_STATUS(muonshard_save(r->optimizer, checkpoint_directory, &args), MUONSHARD_OK, "");
}

static void continue_from_first(rig *r, outcome *out) {
    (void)out;
    const int rank = muonshard_comm_rank(r->comm);
    EXPECT(load(r) == 1);
}

static void late(void **state) {
    (void)state;
    const rig_case setup = small_case("{preset: jordan, save_timeout: 2}");
    for (fault.defer = 0; fault.defer < 2; fault.defer++) {
        checkpoint_empty();
        session(RANKS, &setup, meet_late_file);
        assert_listing("-name '*.tmp'", "");
        session(RANKS, &setup, meet_late_manifest);
    }
    checkpoint_empty();
    session(RANKS, &setup, leave_pending);
    end_fault("file write");
    assert_listing("-name 'manifest.json' -o -name '*.tmp'", "./step-00000001/manifest.json ");
    session(RANKS, &setup, continue_from_first);
}
#endif

/* ---- real errors ---- */

static const char *target, *wanted_text;

static void fail_to_save(rig *r, outcome *out) {
    (void)out;
    step(r);
    EXPECT_STATUS(save_to(r, target, 0, 0), MUONSHARD_ERR_IO, wanted_text);
    EXPECT_STATUS(save_to(r, target, 0, 1), MUONSHARD_ERR_IO, target);
    step(r);
}

static void save_well(rig *r, outcome *out) {
    (void)out;
    step(r);
    EXPECT_STATUS(save_to(r, target, 0, 0), MUONSHARD_OK, "");
}

static void real_errors(void **state) {
    (void)state;
    const rig_case setup = small_case("{preset: jordan}");
    char path[128], beyond[160];
    snprintf(path, sizeof path, "%s", in_directory("target"));
    target = path;
    checkpoint_empty();

    /* a directory nobody may write to; root may, unless it is somebody else */
    assert_int_equal(mkdir(path, 0555), 0);
    assert_int_equal(chmod(checkpoint_directory, 0755), 0);
    assert_int_equal(geteuid() == 0 ? seteuid(65534) : 0, 0);
    wanted_text = "Permission denied";
    session(RANKS, &setup, fail_to_save);
    assert_int_equal(getuid() == 0 ? seteuid(0) : 0, 0);
    assert_listing("", "./target ");

    /* a directory that isn't one, and one whose parent isn't there */
    rmdir(path);
    assert_true(put_bytes(path, "x", 1));
    wanted_text = "Not a directory";
    session(RANKS, &setup, fail_to_save);
    unlink(path);
    snprintf(beyond, sizeof beyond, "%s/missing", path);
    target = beyond;
    wanted_text = "No such file";
    session(RANKS, &setup, fail_to_save);
    target = path;

    struct rlimit old, limit;
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &old), 0);
    limit = old;
    limit.rlim_cur = 1000;
    signal(SIGXFSZ, SIG_IGN);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &limit), 0);
    wanted_text = "File too large";
    session(RANKS, &setup, fail_to_save);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &old), 0);
    assert_listing("", "./target ");
    session(RANKS, &setup, save_well);
}

/* Also after a failure: what is mounted can't be emptied. */
static int unmount(void **state) {
    (void)state;
    return umount(in_directory("small")) == 0 || errno == EINVAL || errno == EPERM ? 0 : -1;
}

static void full_disk(void **state) {
    (void)state;
    const rig_case setup = small_case("{preset: jordan}");
    char path[128];
    snprintf(path, sizeof path, "%s", in_directory("small"));
    checkpoint_empty();
    assert_int_equal(mkdir(path, 0755), 0);
    target = path;
    wanted_text = "No space left";
    if (mount("tmpfs", path, "tmpfs", 0, "size=8k") != 0) {
        print_message("no mounts here: %s\n", strerror(errno));
        skip();
    }
    /* The files of ranks fit, the manifest doesn't; nothing of either is left. */
    session(RANKS, &setup, fail_to_save);
    assert_listing("-path './small/*'", "");
    assert_int_equal(mount("tmpfs", path, "tmpfs", MS_REMOUNT, "size=200k"), 0);
    session(RANKS, &setup, save_well);
}

static void permissions(void **state) {
    (void)state;
    const rig_case setup = small_case("{preset: jordan}");
    char path[128];
    snprintf(path, sizeof path, "%s", in_directory("target"));
    checkpoint_empty();
    target = path;
    const mode_t before = umask(0);
    session(RANKS, &setup, save_well);
    umask(before);
    assert_listing("-perm /022", "");
    assert_listing("-type f -perm 644", "./target/step-00000001/manifest.json "
                                        "./target/step-00000001/rank-00000.safetensors "
                                        "./target/step-00000001/rank-00001.safetensors ");
}

/* ---- what is kept ---- */

static void keep_some(rig *r, outcome *out) {
    (void)out;
    static char text[4096];
    const int rank = muonshard_comm_rank(r->comm);
    static const struct {
        int keep;
        const char *left;
    } saves[] = {
        {0, "./step-00000001 "},
        {0, "./step-00000001 ./step-00000002 "},
        {0, "./step-00000001 ./step-00000002 ./step-00000003 "},
        {2, "./step-00000003 ./step-00000004 "},
        {3, "./step-00000003 ./step-00000004 ./step-00000005 "},
        {1, "./step-00000006 "},
        {2, "./step-00000006 ./step-00000007 "},
    };
    for (size_t i = 0; i < sizeof saves / sizeof saves[0]; i++) {
        step(r);
        EXPECT_STATUS(save(r, saves[i].keep, (int)i % 2), MUONSHARD_OK, "");
        if (rank == 0)
            listing("-type d", text, sizeof text);
        EXPECT(rank != 0 || strcmp(text, saves[i].left) == 0);
    }
}

static void shell(const char *command) {
    char line[512];
    snprintf(line, sizeof line, "cd %s && %s", checkpoint_directory, command);
    assert_int_equal(system(line), 0);
}

static const char *kept_with;

static void go_on(rig *r, outcome *out) {
    (void)out;
    const int rank = muonshard_comm_rank(r->comm);
    EXPECT(load(r) == 7);
    step(r);
    EXPECT_STATUS(save(r, kept_with ? 1 : 0, 0), MUONSHARD_OK, "");
    EXPECT(rank != 0 || !kept_with || strstr(latest_warning, kept_with));
    EXPECT(load(r) == 8);
}

static void retention(void **state) {
    (void)state;
    const rig_case setup = small_case("{preset: jordan}");
    checkpoint_empty();
    session(RANKS, &setup, keep_some);

    /* Older ones without a manifest go, newer ones stay and aren't loaded, damaged ones stay. */
    shell("mkdir step-00000005 step-00000099 && cp step-00000007/rank* step-00000005 && "
          "cp step-00000007/rank* step-00000099 && cp -r step-00000006 step-00000004 && "
          "echo x >>step-00000004/manifest.json && echo x >notes");
    kept_with = NULL;
    latest_warning[0] = '\0';
    session(RANKS, &setup, go_on);
    assert_listing("-maxdepth 1", "./notes ./step-00000004 ./step-00000006 ./step-00000007 "
                                  "./step-00000008 ./step-00000099 ");
    assert_string_equal(latest_warning, "");

    /* With a number to keep damaged ones go too; files that aren't ours stay. */
    shell("rm -r step-00000008 && cd step-00000006 && echo x >notes && echo x >manifest.json.old "
          "&& echo x >rank-00000.safetensors.mine && echo x >rank-00000.safetensors.12-3.tmp");
    kept_with = "step-00000006: cannot be removed";
    session(RANKS, &setup, go_on);
    assert_listing("-mindepth 1", "./notes ./step-00000006 ./step-00000006/manifest.json.old "
                                  "./step-00000006/notes "
                                  "./step-00000006/rank-00000.safetensors.mine ./step-00000008 "
                                  "./step-00000008/manifest.json "
                                  "./step-00000008/rank-00000.safetensors "
                                  "./step-00000008/rank-00001.safetensors ./step-00000099 "
                                  "./step-00000099/rank-00000.safetensors "
                                  "./step-00000099/rank-00001.safetensors ");
}

/* A step that is saved again and again: the latest is what counts, and the only one that stays. */
static void save_again(rig *r, outcome *out) {
    (void)out;
    static char text[4096];
    static const char *const left[] = {"./step-00000001 ", "./step-00000001-2 ",
                                       "./step-00000001-3 ", "./step-00000001-4 "};
    const int rank = muonshard_comm_rank(r->comm);
    muonshard_save_args args = MUONSHARD_SAVE_ARGS_INIT;
    step(r);
    for (int i = 0; i < 4; i++) {
        const char *const users[] = {"first", "second", "third", "fourth"};
        muonshard_load_result result = MUONSHARD_LOAD_RESULT_INIT;
        args.user = users[i];
        EXPECT_STATUS(muonshard_save(r->optimizer, checkpoint_directory, &args), MUONSHARD_OK, "");
        if (rank == 0)
            listing("-type d", text, sizeof text);
        EXPECT(rank != 0 || strcmp(text, left[i]) == 0);
        EXPECT_STATUS(muonshard_load(r->optimizer, checkpoint_directory, NULL, &result),
                      MUONSHARD_OK, "");
        EXPECT(strcmp(result.user, users[i]) == 0 && result.step == 1);
    }
}

static void same_step(void **state) {
    (void)state;
    const rig_case setup = small_case("{preset: jordan}");
    checkpoint_empty();
    session(RANKS, &setup, save_again);
}

/* ---- calls that make no sense ---- */

static void misuse(rig *r, outcome *out) {
    (void)out;
    muonshard_optimizer *o = r->optimizer;
    const int rank = muonshard_comm_rank(r->comm);
    const char *to = checkpoint_directory;
    muonshard_save_args args = MUONSHARD_SAVE_ARGS_INIT;
    muonshard_load_args load_args = MUONSHARD_LOAD_ARGS_INIT;
    muonshard_load_result result = MUONSHARD_LOAD_RESULT_INIT;
    const muonshard_status bad = MUONSHARD_ERR_ARGUMENT, wrong = MUONSHARD_ERR_STATE;
    const void *const none[] = {NULL};
    size_t room = 0;
    int done = 0;
    EXPECT(muonshard_save(NULL, to, NULL) == bad);
    EXPECT(muonshard_save_wait(NULL) == bad);
    EXPECT(muonshard_save_test(o, NULL) == bad && muonshard_save_test(NULL, &done) == bad);
    EXPECT(muonshard_load(NULL, to, NULL, NULL) == bad);
    EXPECT(muonshard_state_size(o, NULL) == bad && muonshard_state_size(NULL, &room) == bad);
    EXPECT_STATUS(muonshard_save(o, NULL, NULL), bad, "directory is NULL");
    EXPECT_STATUS(muonshard_save(o, "", NULL), bad, "directory is empty");
    EXPECT_STATUS(muonshard_load(o, NULL, NULL, NULL), bad, "directory is NULL");
    EXPECT_STATUS(muonshard_load(o, "", NULL, NULL), bad, "directory is empty");
    EXPECT_STATUS(muonshard_save_memory(o, NULL, 1), bad, "memory is NULL");
    EXPECT_STATUS(muonshard_load_memory(o, NULL, NULL, 0, NULL, NULL), bad, "no images");
    EXPECT_STATUS(muonshard_load_memory(o, none, &room, 1, NULL, NULL), bad, "image 0 is NULL");
    args.keep = -1;
    EXPECT_STATUS(muonshard_save(o, to, &args), bad, "keep is -1");
    args.keep = 0;
    args.user = "\xff";
    EXPECT_STATUS(muonshard_save(o, to, &args), bad, "UTF-8");
    args.user = NULL;
    args.size = rank == 1 ? 3 : sizeof args; /* one rank's is everybody's */
    EXPECT_STATUS(muonshard_save(o, to, &args), bad, "save arguments: size is 3");
    args.size = sizeof args;
    load_args.size = rank == 1 ? 3 : sizeof load_args;
    EXPECT_STATUS(muonshard_load(o, to, &load_args, NULL), bad, "load arguments: size is 3");

    /* nothing there */
    EXPECT_STATUS(muonshard_load(o, to, NULL, &result), MUONSHARD_ERR_IO, "no complete checkpoint");
    EXPECT(load(r) == -1);
    EXPECT_STATUS(muonshard_save_wait(o), MUONSHARD_OK, "");
    EXPECT(muonshard_save_test(o, &done) == MUONSHARD_OK && done);

    /* a result that can't be given is refused before anything is replaced */
    EXPECT_STATUS(save(r, 0, 0), MUONSHARD_OK, "");
    step(r);
    const uint64_t before = rig_digest(r);
    result.size = 1;
    EXPECT_STATUS(muonshard_load(o, to, NULL, &result), bad, "load result: size is 1");
    rig_pull(r);
    EXPECT(rig_digest(r) == before);

    /* a step that is marked and not taken */
    rig_gradients(r);
    EXPECT_STATUS(muonshard_grad_ready(o, 0, 0, 1), MUONSHARD_OK, "");
    EXPECT_STATUS(muonshard_save(o, to, NULL), wrong, "marked for step 2");
    EXPECT_STATUS(muonshard_load(o, to, NULL, NULL), wrong, "step 2 is not finished");
    room = 1 << 20;
    void *memory = malloc(room);
    EXPECT_STATUS(muonshard_save_memory(o, memory, room), wrong, "step 2 is not finished");
    free(memory);
    rig_step(r);
}

/* Saving finishes a deferred step, and completes a save that is pending; loading takes that one. */
static void defer_all(rig *r, outcome *out) {
    (void)out;
    const int rank = muonshard_comm_rank(r->comm);
    muonshard_step_args deferred = MUONSHARD_STEP_ARGS_INIT;
    muonshard_save_args args = MUONSHARD_SAVE_ARGS_INIT;
    deferred.defer = 1;
    args.defer = 1;
    args.keep = 1;
    for (int i = 0; i < 4; i++) {
        rig_gradients(r);
        EXPECT_STATUS(rig_call(r, &deferred), MUONSHARD_OK, "");
        EXPECT_STATUS(muonshard_save(r->optimizer, checkpoint_directory, &args), MUONSHARD_OK, "");
    }
    rig_pull(r);
    const uint64_t saved = rig_digest(r);
    EXPECT(load(r) == 4);
    EXPECT(rig_digest(r) == saved);
    step(r);
    EXPECT(rig_digest(r) != saved);
}

/* The program goes elsewhere before a deferred save is complete. */
static void leave_directory(rig *r, outcome *out) {
    (void)out;
    const int rank = muonshard_comm_rank(r->comm);
    muonshard_save_args args = MUONSHARD_SAVE_ARGS_INIT;
    args.defer = 1;
    step(r);
    EXPECT_STATUS(muonshard_save(r->optimizer, "relative", &args), MUONSHARD_OK, "");
    threads_barrier(r->comm);
    EXPECT(rank != 0 || chdir("/") == 0);
    threads_barrier(r->comm);
    EXPECT_STATUS(muonshard_save_wait(r->optimizer), MUONSHARD_OK, "");
}

static void before_commit(muonshard_comm *comm, void *arg) {
    rig *const r = arg;
    const int rank = muonshard_comm_rank(comm);
    const rig_case setup = small_case("");
    size_t room;
    rig_prepare(r, comm, &setup);
    EXPECT_STATUS(muonshard_save(r->optimizer, "x", NULL), MUONSHARD_ERR_STATE, "commit");
    EXPECT_STATUS(muonshard_save_wait(r->optimizer), MUONSHARD_ERR_STATE, "commit");
    EXPECT_STATUS(muonshard_load(r->optimizer, "x", NULL, NULL), MUONSHARD_ERR_STATE, "commit");
    EXPECT_STATUS(muonshard_save_memory(r->optimizer, r, 1), MUONSHARD_ERR_STATE, "commit");
    EXPECT(muonshard_state_size(r->optimizer, &room) == MUONSHARD_ERR_STATE);
    rig_close(r);
}

/* Names that no file may hold. */
static void bad_names(void **state) {
    (void)state;
    const rig_tensor odd[] = {{RIG_TENSOR("a\nb", MUONSHARD_ROLE_MATRIX, 2, 4, 4)}};
    const rig_case setup = {.tensors = odd, .count = 1, .yaml = ""};
    journey j = JOURNEY_INIT;
    j.save = true;
    checkpoint_empty();
    travel(&j, RANKS, &setup);
    assert_int_equal(j.saved[0], MUONSHARD_ERR_ARGUMENT);
    assert_non_null(strstr(j.message[0], "control character"));
}

static void calls(void **state) {
    (void)state;
    static rig alone;
    const rig_case setup = small_case("{preset: jordan}");
    checkpoint_empty();
    session(RANKS, &setup, misuse);
    checkpoint_empty();
    session(RANKS, &setup, defer_all);
    assert_listing("-type d", "./step-00000004 ");
    checkpoint_empty();
    assert_int_equal(chdir(checkpoint_directory), 0);
    session(RANKS, &setup, leave_directory);
    assert_listing("-name manifest.json", "./relative/step-00000001/manifest.json ");
    assert_int_equal(threads_run(1, before_commit, &alone), MUONSHARD_OK);
    assert_session_fine();
}

int main(void) {
    const struct CMUnitTest tests[] = {
#ifdef MUONSHARD_FAULTS
        cmocka_unit_test(pretended_errors), cmocka_unit_test(late),
#endif
        cmocka_unit_test(real_errors),      cmocka_unit_test_teardown(full_disk, unmount),
        cmocka_unit_test(permissions),      cmocka_unit_test(retention),
        cmocka_unit_test(same_step),        cmocka_unit_test(calls),
        cmocka_unit_test(bad_names),
    };
    return cmocka_run_group_tests_name("checkpoint_failures", tests, checkpoint_setup,
                                       checkpoint_teardown);
}
