/* checkpoint_fixture.h - rigs that save and continue, the ranks being threads, in a directory that
 * goes away with the test. */
#ifndef CHECKPOINT_FIXTURE_H
#define CHECKPOINT_FIXTURE_H

#include "ranks_fixture.h"

/* What the ranks do: load, take steps, save, take more. */
typedef struct journey {
    bool load;
    muonshard_load_args load_args;
    const char *from; /* NULL: the test's directory */
    int before;       /* steps, then */
    bool save;
    muonshard_save_args save_args;
    const char *to; /* NULL: the test's directory */
    int after;      /* steps */
    int wait_after; /* a deferred save is waited for before this step; 0: at the end */
    /* out */
    muonshard_status loaded[MAX_RANKS], saved[MAX_RANKS];
    char message[MAX_RANKS][1024];
    muonshard_load_result result[MAX_RANKS]; /* without its texts */
    char path[1024], user[256];              /* rank 0's */
    uint64_t unchanged[MAX_RANKS], at_save[MAX_RANKS], at_end[MAX_RANKS];
    muonshard_stats_info stats[MAX_RANKS];
} journey;
#define JOURNEY_INIT                                                                               \
    { .load_args = MUONSHARD_LOAD_ARGS_INIT, .save_args = MUONSHARD_SAVE_ARGS_INIT }

/* The test's directory, empty; for setup and teardown of a group. */
extern char checkpoint_directory[64];
int checkpoint_setup(void **state);
int checkpoint_teardown(void **state);
void checkpoint_empty(void);

/* Asserts that statuses and digests are the same on all ranks, and returns the last digest. */
uint64_t travel(journey *j, int ranks, const rig_case *setup);
/* "directory/name", in one of some buffers of the thread. */
const char *in_directory(const char *name);

/* ---- what threads find, the main thread asserts ---- */

/* Ranks that run `what`, each with a rig; fails with the first thing a rank found wrong. */
void session(int ranks, const rig_case *setup, void (*what)(rig *r, outcome *out));
/* Of expectations outside of sessions. */
void assert_session_fine(void);
/* In a rank of a session; `rank` is in scope. */
#define EXPECT(condition) expect(rank, (condition), #condition, __LINE__)
bool expect(int rank, bool fine, const char *what, int line);
/* With what came of the latest call, and in its text. */
#define EXPECT_STATUS(status, wanted, part) expect_status(r, (status), (wanted), (part), __LINE__)
bool expect_status(rig *r, muonshard_status status, muonshard_status wanted, const char *part,
                   int line);
/* The latest warning that rank 0 gave in this session; to be set to "" between. */
extern char latest_warning[1024];

/* ---- files ---- */

typedef struct bytes {
    char *data; /* own */
    size_t count;
} bytes;

/* Of a file; data NULL: it can't be read. */
bytes bytes_of(const char *path);
bool put_bytes(const char *path, const char *data, size_t count);

/* Matrices of all kinds, element-wise and frozen; names with colons. Small. */
extern const rig_tensor small_model[];
extern const size_t small_count;
rig_case small_case(const char *yaml);

#endif
