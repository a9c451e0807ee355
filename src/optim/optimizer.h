/* optimizer.h - what a handle holds: what was asked for (settings, tensors), what was planned,
 * memory, and where the step stands. */
#ifndef OPTIMIZER_H
#define OPTIMIZER_H

#include "comm/comm.h"
#include "config.h"
#include "optim/memory.h"
#include "optim/plan.h"
#include "optim/registry.h"
#include "optim/schedule.h"
#include "optim/trace.h"

/* Kernel arguments that stay the same from step to step. */
typedef struct bucket_work {
    sum_squares_item
        *sums; /* own, [sum_count]: what this rank owns of it; the flat rest by chunks */
    size_t sum_count;
} bucket_work;

typedef struct batch_work {
    momentum_item *momentum; /* own, [owned views of the batch] */
    orthogonalize_item *orthogonalize;
    variance_item *variance;
    size_t owned;
    /* own, [views] or, where parameters are gathered, [owned]: what this rank applies U to */
    apply_item *apply;
    size_t apply_count;
    convert_item *store; /* own, [views of the batch] gathered parameters to their place */
    size_t store_count;
    ns_program *program; /* own */
} batch_work;

typedef struct op_state {
    comm_ticket ticket;
    comm_part *parts;      /* own; collectives only */
    comm_part *host_parts; /* own; the same, staged; or NULL */
    size_t part_count;
} op_state;

/* Two steps are under way at a time at most: the one that is issued, and the one before it. */
#define STEPS_IN_FLIGHT 2

/* When an operation was where. For waits that a compute operation has before it begins, and what a
 * staged communicator needs. */
typedef enum op_stamp {
    STAMP_WAIT_FROM,
    STAMP_WAIT_TO,
    STAMP_BEGIN,
    STAMP_END,
    STAMP_STAGED,
    STAMP_COUNT
} op_stamp;

struct muonshard_optimizer {
    muonshard_comm *comm;       /* borrowed: what ranks say to each other */
    muonshard_comm *data;       /* what moves tensors: comm, or NCCL beside it, which is own */
    void *stream;               /* the caller's, unless a call gives another */
    muonshard_comm *agree_comm; /* borrowed, or NULL */
    backend *backend;           /* own */
    muonshard_config *config;   /* own */
    const settings *settings;   /* of config */
    registry registry;
    bool committed;
    muonshard_status dead; /* OK, or why no step can be taken any more */
    error_text error;

    plan plan;
    schedule schedule;
    workspace memory;
    op_state *ops;        /* own, [schedule.count] */
    op_state totals;      /* the all-gather over agree_comm */
    batch_work *batches;  /* own, [plan.batch_count] */
    bucket_work *buckets; /* own, [plan.bucket_count] */
    adam_item *adam;      /* own, [adam_count]: the tensors in this rank's shard, cut to it */
    size_t adam_count;
    convert_item *converts; /* own, room for any one operation's */
    double *word_head;      /* own, host, [1 + tensor_count]: how this rank's agree word begins */
    tensor_values *values;  /* own, host, [tensor_count] */
    size_t flat_chunks;     /* of a shard */
    size_t word_stride, sum_count;
    trace *trace;                    /* own, or NULL */
    struct saver *saver;             /* own, or NULL: checkpoint.h */
    char *loaded_path, *loaded_user; /* own, of the latest load, or NULL */
    size_t state_bytes, workspace_bytes, pinned_bytes;
    uint8_t *filled; /* own, [plan.slot_count] */

    /* Host: [STEPS_IN_FLIGHT, schedule.count, STAMP_COUNT] seconds, own. Otherwise the backend has
     * stamps of these indices. */
    double *stamps;
    double begun[STEPS_IN_FLIGHT]; /* when the host began the step */
    int64_t settled;               /* steps up to this one are over, and their results known */

    /* the step under way */
    bool graphs;         /* segments are captured and replayed */
    size_t next;         /* operation to run next; 0 or schedule.count: none is under way */
    int64_t step;        /* number of the step under way or, between steps, of the last one */
    int64_t begun_here;  /* steps begun by this handle: a load moves `step`, and not this */
    bool open;           /* a step is under way: begun by grad_ready or step, not finished */
    bool called;         /* muonshard_step has been called for it */
    uint8_t *ready;      /* own, [entries of all tensors]: marked final */
    size_t *first_entry; /* own, [tensor_count + 1] into ready */
    muonshard_status
        step_status; /* this rank's error before the first collective; its text is in error */
    bool failed;     /* some rank had one: known once resolved, to the host backend */
    double grad_scale;
    double fingerprint; /* of the step's values: they are the same on all ranks */
    muonshard_step_result_info results[STEP_RESULTS];
    struct {
        int rank; /* 1 + the lowest rank that failed; 0: none */
        muonshard_status status;
    } failures[STEP_RESULTS];

    muonshard_stats_info stats;
    double op_seconds[OP_KIND_COUNT]; /* of communication: what computation waited for it */
};

/* A collective on the handle's communicator; its text becomes the handle's. */
#define TRY_COMM(o, call)                                                                          \
    do {                                                                                           \
        muonshard_status try_comm_ = (call);                                                       \
        if (try_comm_ != MUONSHARD_OK)                                                             \
            return fail(&(o)->error, try_comm_, "%s", (o)->comm->error.text);                      \
    } while (0)

/* Operations are issued, and the device does them when it gets there. */
static inline bool runs_ahead(const muonshard_optimizer *o) {
    return o->backend->streams != NULL;
}

/* work.c: kernel arguments that stay the same from step to step. */
/* Counts and programs; what the workspace is sized by. */
muonshard_status work_plan(muonshard_optimizer *o);
/* The arguments themselves; needs the workspace. */
muonshard_status work_make(muonshard_optimizer *o);
void work_free(muonshard_optimizer *o);
/* The variance has one number a row of the array, rather than one a column. Its rows are the output
 * features, of which `auto` asks that there are no fewer than inputs. */
bool work_variance_by_rows(const settings *s, const view *v);
/* Where this rank keeps the fp32 copy of the matrix in rank's slot; NULL: it has none. */
float *work_master(const muonshard_optimizer *o, const wave *w, int rank);
/* What this rank sends of a wave that is gathered: U, or the parameters it has updated where they
 * are. An empty slot sends what lies there. */
const void *work_gathered_from(const muonshard_optimizer *o, const batch *b, const wave *w);
/* Which element of its tensor a shard's part begins with. */
size_t work_adam_first(const muonshard_optimizer *o, const adam_item *a);
/* Parameters into the shard: those that have a master, or those that have none. Returns how many
 * items. */
size_t work_load_flat(const muonshard_optimizer *o, convert_item *items, bool masters);
/* Zeroed host memory; `pointer` is the address of a pointer of any type. */
muonshard_status host_array(muonshard_optimizer *o, void *pointer, size_t count, size_t item);

/* choices.c: what the backend has to choose for the plan's batches, from and to a file. Local. */
muonshard_status choices_make(muonshard_optimizer *o);

/* api.c: the handle is alive and committed. */
muonshard_status optimizer_check(muonshard_optimizer *o);

/* commit.c */
/* `local`: an error found before, which becomes everybody's. */
muonshard_status optimizer_commit(muonshard_optimizer *o, muonshard_status local,
                                  muonshard_sync_params sync);
void optimizer_release(muonshard_optimizer *o);
/* The fp32 copies of 16-bit parameters, from those. */
muonshard_status commit_fill_masters(muonshard_optimizer *o);

/* replicas.c: the same bytes on every rank. Collective. */
muonshard_status replicas_check(muonshard_optimizer *o);
muonshard_status replicas_broadcast(muonshard_optimizer *o);

/* settle.c: what came of a step, and when its operations ran. */
/* Where the backend keeps a stamp. */
static inline size_t stamp_index(const muonshard_optimizer *o, int64_t step, size_t index,
                                 op_stamp which) {
    return ((size_t)(step % STEPS_IN_FLIGHT) * o->schedule.count + index) * STAMP_COUNT + which;
}
/* How long a wait of step number `step` may take, seconds. */
static inline double step_deadline(const muonshard_optimizer *o, int64_t step) {
    return step == o->step - o->begun_here + 1 ? o->settings->first_timeout_s
                                               : o->settings->timeout_s;
}
muonshard_status settle_stamp(muonshard_optimizer *o, size_t index, op_stamp which,
                              backend_stream stream);
/* The step's record has arrived in memory.posted. */
void settle_record(muonshard_optimizer *o, int64_t step);
/* Waits until step number `step` is over, and all before it. */
muonshard_status settle_until(muonshard_optimizer *o, int64_t step);
/* Nothing of the handle's is under way on the device any more; or, by the deadline, its
 * communicator is dead. */
void settle_idle(muonshard_optimizer *o);
/* Every operation is issued: what has to be said among the ranks, of errors and of replicas. */
muonshard_status settle_finish(muonshard_optimizer *o);
/* Without waiting: as far as steps are over. */
muonshard_status settle_what_is_over(muonshard_optimizer *o);

/* step.c */
muonshard_status step_begin(muonshard_optimizer *o);
/* Reduce-scatters whose gradients are ready, and all before them, are started. */
muonshard_status step_start_ready(muonshard_optimizer *o);
/* What the caller's stream has been given comes before the step's operations. */
muonshard_status step_join(muonshard_optimizer *o, void *stream);
/* What the caller's stream is given next comes after what was issued; or after what reads the
 * step's gradients; or after operation `index` of step `step` (NULL: the handle's stream). */
muonshard_status step_give_back(muonshard_optimizer *o, void *stream);
muonshard_status step_give_back_gradients(muonshard_optimizer *o, void *stream);
muonshard_status step_give_back_op(muonshard_optimizer *o, size_t index, int64_t step,
                                   void *stream);
/* Runs operations [next, end); finishes the step when that was the last. */
muonshard_status step_run_until(muonshard_optimizer *o, size_t end);
/* Lets operations that were started advance. */
muonshard_status step_progress(muonshard_optimizer *o);
/* The handle is dead: what was found becomes its text. */
muonshard_status step_kill(muonshard_optimizer *o, muonshard_status status, const error_text *why);

#endif
