/* muonshard.h - distributed Muon for data-parallel training.
 *
 * N ranks hold the same parameters. Each rank owns some of the parameter matrices; a step
 * reduce-scatters the gradients to their owners, runs momentum and Newton-Schulz there, all-gathers
 * the orthogonalised updates and applies them, identically on every rank. What is not a matrix is
 * updated by AdamW, sharded over the ranks.
 *
 *   comm_create -> config (file, string, set) + broadcast -> create -> add_tensor... -> commit
 *     -> loop { [grad_ready] step [step_result] [tensor_wait] } -> destroy
 *
 * Conventions. Functions return a muonshard_status: 0 is success, errors are negative, and the
 * handle named in the comment keeps a text that says what was found and what was allowed.
 * "Collective" means that every rank of the communicator has to make the call, in the same order;
 * every wait has a deadline. Structs passed in begin with their size: start from their _INIT macro.
 * Pointers are borrowed for the call unless a comment says otherwise. Handles are not thread-safe;
 * different handles are independent as long as their communicators are different. The library
 * prints nothing, exits nowhere, and keeps no state outside handles. */
#ifndef MUONSHARD_H
#define MUONSHARD_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ABI rule: programs built against MAJOR.MINOR run with any later library of the same MAJOR (while
 * MAJOR is 0, of the same MINOR: the soname says so). New struct fields go at the end; new
 * functions raise MINOR. */
#define MUONSHARD_VERSION_MAJOR 0
#define MUONSHARD_VERSION_MINOR 1
#define MUONSHARD_VERSION_PATCH 0
#define MUONSHARD_VERSION                                                                          \
    (MUONSHARD_VERSION_MAJOR * 10000 + MUONSHARD_VERSION_MINOR * 100 + MUONSHARD_VERSION_PATCH)

#if defined(__GNUC__)
#define MUONSHARD_API __attribute__((visibility("default")))
#else
#define MUONSHARD_API
#endif

/* ---- status ---- */

#define MUONSHARD_STATUS_MAP(X)                                                                    \
    X(0, OK, "success")                                                                            \
    X(-1, ERR_ARGUMENT, "invalid argument")                                                        \
    X(-2, ERR_CONFIG, "invalid configuration")                                                     \
    X(-3, ERR_STATE, "call not allowed in this state")                                             \
    X(-4, ERR_MEMORY, "out of memory")                                                             \
    X(-5, ERR_IO, "file cannot be read or written")                                                \
    X(-6, ERR_FORMAT, "malformed file")                                                            \
    X(-7, ERR_MISMATCH, "ranks disagree")                                                          \
    X(-8, ERR_TIMEOUT, "deadline expired")                                                         \
    X(-9, ERR_COMM, "communication failed")                                                        \
    X(-10, ERR_UNAVAILABLE, "backend or library not available")                                    \
    X(-11, ERR_UNSUPPORTED, "not supported")                                                       \
    X(-12, ERR_INTERNAL, "internal error")                                                         \
    X(-13, ERR_DIVERGED, "gradients are not finite, step after step")

typedef enum muonshard_status {
#define MUONSHARD_STATUS_ENUM(value, name, text) MUONSHARD_##name = (value),
    MUONSHARD_STATUS_MAP(MUONSHARD_STATUS_ENUM)
#undef MUONSHARD_STATUS_ENUM
} muonshard_status;

/* The text of a status; never NULL. */
MUONSHARD_API const char *muonshard_status_string(muonshard_status status);
/* MUONSHARD_VERSION of the library that runs. */
MUONSHARD_API int muonshard_version(void);
/* Lines of text: version, backends, and why one is missing. Like snprintf: writes at most `size`
 * bytes including the final zero and returns the length the whole text has. */
MUONSHARD_API size_t muonshard_info(char *text, size_t size);

typedef struct muonshard_comm muonshard_comm;
typedef struct muonshard_config muonshard_config;
typedef struct muonshard_optimizer muonshard_optimizer;

/* ---- communicators ---- */

typedef enum muonshard_log_level {
    MUONSHARD_LOG_INFO = 0,
    MUONSHARD_LOG_WARNING = 1,
    MUONSHARD_LOG_ERROR = 2
} muonshard_log_level;

typedef void (*muonshard_log_fn)(void *user, muonshard_log_level level, const char *message);
/* Called once, when a deadline expired or communication broke: the communicator and everything on
 * it are dead, and other ranks may be waiting. It may end the process (muonshard_mpi_abort does);
 * if it returns, the call that waited returns `status`, and memory given to the library, gradients
 * too, may still be read until the process ends. */
typedef void (*muonshard_fatal_fn)(void *user, muonshard_status status, const char *message);

typedef struct muonshard_comm_options {
    size_t size;
    double timeout_s; /* deadline of every wait outside muonshard_step, seconds, > 0 */
    muonshard_log_fn log;
    void *log_user;
    muonshard_fatal_fn on_fatal;
    void *fatal_user;
} muonshard_comm_options;
#define MUONSHARD_COMM_OPTIONS_INIT                                                                \
    { sizeof(muonshard_comm_options), 300.0, NULL, NULL, NULL, NULL }

/* Callbacks that carry host memory between ranks; each is collective, blocking, and returns 0 on
 * success. Deadlines are the callbacks' own. `user` is passed through. */
typedef struct muonshard_comm_callbacks {
    size_t size;
    int rank;
    int world_size;
    void *user;
    /* recv [world_size, bytes] <- send [bytes] of every rank. */
    int (*allgather)(void *user, const void *send, void *recv, size_t bytes);
    int (*barrier)(void *user);
    /* Optional. Rank j gets send_bytes[j] bytes from send + send_offsets[j]; recv likewise by
     * source. Without it, reduce-scatters run as all-gathers in chunks plus an ordered sum:
     * correct, slow, and logged. */
    int (*alltoallv)(void *user, const void *send, const size_t *send_bytes,
                     const size_t *send_offsets, void *recv, const size_t *recv_bytes,
                     const size_t *recv_offsets);
} muonshard_comm_callbacks;
#define MUONSHARD_COMM_CALLBACKS_INIT                                                              \
    { sizeof(muonshard_comm_callbacks), 0, 1, NULL, NULL, NULL, NULL }

/* A communicator of one rank. `options` may be NULL. Local. ERR_ARGUMENT, ERR_MEMORY. */
MUONSHARD_API muonshard_status muonshard_comm_create_self(const muonshard_comm_options *options,
                                                          muonshard_comm **comm);
/* A communicator over the caller's callbacks, which are copied. Local. ERR_ARGUMENT, ERR_MEMORY. */
MUONSHARD_API muonshard_status
muonshard_comm_create_callbacks(const muonshard_comm_callbacks *callbacks,
                                const muonshard_comm_options *options, muonshard_comm **comm);
/* For MPI see muonshard_mpi.h. For an ncclComm_t use muonshard_comm_create_nccl of
 * muonshard_nccl.h, which calls this: `function` is the program's address of ncclCommCount. */
MUONSHARD_API muonshard_status muonshard_comm_adopt_nccl(void *nccl_comm, void (*function)(void),
                                                         const muonshard_comm_options *options,
                                                         muonshard_comm **comm);

/* This rank, from 0, and the number of ranks. Local. */
MUONSHARD_API int muonshard_comm_rank(const muonshard_comm *comm);
MUONSHARD_API int muonshard_comm_size(const muonshard_comm *comm);
/* The last error of a communicator or of a call that failed to make a handle on it. Valid until the
 * next call. */
MUONSHARD_API const char *muonshard_comm_last_error(const muonshard_comm *comm);
/* Another deadline for waits outside muonshard_step, for example once start-up is over. Local.
 * ERR_ARGUMENT: not > 0. */
MUONSHARD_API muonshard_status muonshard_comm_set_timeout(muonshard_comm *comm, double timeout_s);
/* What this rank does between two calls ("load data"), for the line that names it where others wait
 * for it; NULL: "outside the library". Up to 47 bytes are copied. Local. ERR_ARGUMENT. */
MUONSHARD_API muonshard_status muonshard_comm_set_phase(muonshard_comm *comm, const char *phase);
/* Makes a local status everybody's: all ranks return the lowest failing rank's status, and
 * muonshard_comm_last_error its message. `message` may be NULL. Collective. */
MUONSHARD_API muonshard_status muonshard_comm_agree(muonshard_comm *comm, muonshard_status status,
                                                    const char *message);
/* `data` [bytes], host: root's bytes on every rank. Collective. */
MUONSHARD_API muonshard_status muonshard_comm_broadcast(muonshard_comm *comm, void *data,
                                                        size_t bytes, int root);
/* recv [world_size, bytes] <- send [bytes] of every rank, host. Collective. */
MUONSHARD_API muonshard_status muonshard_comm_allgather(muonshard_comm *comm, const void *send,
                                                        void *recv, size_t bytes);
typedef enum muonshard_reduce_op { MUONSHARD_REDUCE_SUM, MUONSHARD_REDUCE_MAX } muonshard_reduce_op;

/* `values` [count], fp64, host, in place: their sum (added in rank order: the same bits on every
 * rank) or maximum over the ranks (NaN where a rank has NaN). For losses and counters, not for
 * gradients. Collective. */
MUONSHARD_API muonshard_status muonshard_comm_allreduce(muonshard_comm *comm, double *values,
                                                        size_t count, muonshard_reduce_op op);
/* Destroys what was created on it first. NULL is allowed. Local. */
MUONSHARD_API void muonshard_comm_destroy(muonshard_comm *comm);

/* ---- configuration ---- */

/* A program can add tables of its own: the keys then live in the same files, with the same checks,
 * help and dump. `offset` is where the value goes in the program's struct: BOOL -> int, INT ->
 * int64_t, REAL -> double, TEXT and LIST -> const char * (owned by the config; a list is its items,
 * each followed by '\n'), CHOICE -> int (index into choices). */
typedef enum muonshard_param_type {
    MUONSHARD_PARAM_BOOL,
    MUONSHARD_PARAM_INT,
    MUONSHARD_PARAM_REAL,
    MUONSHARD_PARAM_TEXT,
    MUONSHARD_PARAM_LIST,
    MUONSHARD_PARAM_CHOICE
} muonshard_param_type;

typedef struct muonshard_param {
    const char *name; /* dotted: `adam.lr` is `lr` under `adam:` in YAML */
    muonshard_param_type type;
    size_t offset;
    const char *initial; /* default, as text; a REAL whose default is "auto" accepts `auto`, stored
                            as NaN */
    double min, max;     /* INT and REAL: inclusive */
    const char *choices; /* CHOICE: "first|second|third" */
    const char *doc;     /* one sentence, with the unit */
} muonshard_param;

typedef enum muonshard_text_format {
    MUONSHARD_TEXT_PLAIN,
    MUONSHARD_TEXT_MARKDOWN
} muonshard_text_format;

/* A config with the library's own table and its defaults. Local. ERR_ARGUMENT, ERR_MEMORY. */
MUONSHARD_API muonshard_status muonshard_config_create(muonshard_config **config);
/* Adds a program's table and writes its defaults to `values`, which every later change of the
 * config rewrites; `table` and `values` are borrowed until destroy. Before anything is loaded.
 * ERR_ARGUMENT (name taken, a default out of range), ERR_STATE, ERR_MEMORY. */
MUONSHARD_API muonshard_status muonshard_config_add_table(muonshard_config *config,
                                                          const muonshard_param *table,
                                                          size_t count, void *values);
/* YAML: nested mappings are dotted keys, sequences are lists. All or nothing. ERR_IO: file cannot
 * be read; ERR_CONFIG: syntax, unknown or repeated key (the nearest valid one is named), wrong
 * type, out of range: the message says file and line. Local. */
MUONSHARD_API muonshard_status muonshard_config_load_file(muonshard_config *config,
                                                          const char *path);
MUONSHARD_API muonshard_status muonshard_config_load_string(muonshard_config *config,
                                                            const char *yaml);
/* One key; set after load overrides. For a LIST, `value` is one item and replaces the list.
 * ERR_CONFIG. Local. */
MUONSHARD_API muonshard_status muonshard_config_set(muonshard_config *config, const char *key,
                                                    const char *value);
/* The value in effect as text (a choice by name; presets applied); like snprintf into `text`.
 * ERR_CONFIG: no such key. Local. */
MUONSHARD_API muonshard_status muonshard_config_get(const muonshard_config *config, const char *key,
                                                    char *text, size_t size, size_t *length);
/* Rank 0's values on every rank; the hash of the outcome is compared over all ranks. Rank 0's
 * failure to load belongs before it, through muonshard_comm_agree. Collective. ERR_MISMATCH: the
 * ranks' tables differ. */
MUONSHARD_API muonshard_status muonshard_config_broadcast(muonshard_config *config,
                                                          muonshard_comm *comm);
/* Everything in effect, as YAML that loads to the same values; like snprintf, returns the length.
 */
MUONSHARD_API size_t muonshard_config_dump(const muonshard_config *config, char *text, size_t size);
/* The tables as text or as a page: name, type, default, range, what it does; like snprintf. */
MUONSHARD_API size_t muonshard_config_help(const muonshard_config *config,
                                           muonshard_text_format format, char *text, size_t size);
/* The last error of a config; valid until the next call. Local. */
MUONSHARD_API const char *muonshard_config_last_error(const muonshard_config *config);
/* NULL is allowed. Local. */
MUONSHARD_API void muonshard_config_destroy(muonshard_config *config);

/* ---- optimizer: create, tensors, commit ---- */

typedef struct muonshard_options {
    size_t size;
    /* Optional: a wider communicator over which skip and gradient norm are agreed, when several
     * groups (expert or pipeline parallel) take one step together; each of its ranks steps exactly
     * one optimizer at a time. Borrowed. */
    muonshard_comm *agree_comm;
    /* cudaStream_t on which gradients become final and parameters are read, for calls that name
     * none. NULL: the default stream. Not used by the host backend. */
    void *stream;
} muonshard_options;
#define MUONSHARD_OPTIONS_INIT                                                                     \
    { sizeof(muonshard_options), NULL, NULL }

/* Copies the config, borrows the communicator until destroy. `options` may be NULL. Collective; a
 * local error is everybody's. ERR_MISMATCH: the ranks' configs differ (the message names rank and
 * key); ERR_UNAVAILABLE: an explicit backend or communicator cannot be had; ERR_MEMORY. The text is
 * the communicator's last error. */
MUONSHARD_API muonshard_status muonshard_create(muonshard_comm *comm,
                                                const muonshard_config *config,
                                                const muonshard_options *options,
                                                muonshard_optimizer **optimizer);

/* "host" or "cuda": in whose memory parameters and gradients have to be. Local. */
MUONSHARD_API const char *muonshard_backend(const muonshard_optimizer *optimizer);
/* What computes, for people: "avx2 kernels, 4 threads", or "device 0: NAME, sm_90, GPU-UUID". What
 * follows the colon is the card's wherever it is seen from, its number is this process's. Valid
 * until destroy. Local. */
MUONSHARD_API const char *muonshard_device(const muonshard_optimizer *optimizer);

typedef enum muonshard_dtype {
    MUONSHARD_DTYPE_OF_PARAM = -1, /* of a gradient only */
    MUONSHARD_FP32 = 0,
    MUONSHARD_BF16 = 1,
    MUONSHARD_FP16 = 2 /* IEEE binary16 */
} muonshard_dtype;

typedef enum muonshard_role {
    MUONSHARD_ROLE_UNSET = 0,   /* refused: the role is always explicit */
    MUONSHARD_ROLE_MATRIX,      /* Muon: momentum and Newton-Schulz */
    MUONSHARD_ROLE_ELEMENTWISE, /* AdamW: embeddings, heads, norms, biases, routers */
    MUONSHARD_ROLE_FROZEN       /* known, checked and broadcast, never updated */
} muonshard_role;

/* How a tensor of three or more dimensions is made of matrices. */
typedef enum muonshard_matrix_form {
    MUONSHARD_STACK = 0, /* leading sizes are a batch of [rows, cols] matrices */
    MUONSHARD_FLATTEN    /* one matrix [shape[0], product of the rest], as for convolutions */
} muonshard_matrix_form;

/* What a NULL gradient means in a step. A tensor that is NULL on some ranks only counts as zero
 * there. */
typedef enum muonshard_null_grad {
    MUONSHARD_NULL_GRAD_ERROR = 0, /* the step fails on every rank */
    MUONSHARD_NULL_GRAD_ZERO,      /* a gradient of zeros */
    MUONSHARD_NULL_GRAD_SKIP /* NULL on all ranks: the tensor and its state stay as they are */
} muonshard_null_grad;

#define MUONSHARD_MAX_DIMS 8

/* Row-major, contiguous. `param` and `grad` are borrowed until destroy, in the backend's memory
 * (host memory for the host backend). `grad` is only ever read. */
typedef struct muonshard_tensor_desc {
    size_t size;
    const char *name; /* unique; copied */
    muonshard_role role;
    muonshard_matrix_form form;
    int dims;
    int64_t shape[MUONSHARD_MAX_DIMS];
    const int64_t
        *row_splits; /* optional, copied: heights that add up to the rows; each part is a matrix */
    size_t row_split_count;
    muonshard_dtype dtype; /* of param. 16 bits: see the settings gather, master and rounding */
    void *param;
    const void *grad; /* may be NULL: see null_grad; muonshard_set_grad changes it */
    muonshard_null_grad null_grad;
    double lr_multiplier;    /* >= 0 */
    double decay_multiplier; /* >= 0 */
    int group;               /* index into muonshard_step_args.groups, >= 0 */
    /* Reduce-scatters run from low to high, then in reverse registration order; entry i of a stack
     * has priority + i * priority_stride. With a stride of -1 for all stacks, layer by layer as a
     * backward pass finishes them. */
    int priority, priority_stride;
    muonshard_dtype grad_dtype; /* travels as it is, is summed in fp32 */
} muonshard_tensor_desc;
#define MUONSHARD_TENSOR_DESC_INIT                                                                 \
    {                                                                                              \
        sizeof(muonshard_tensor_desc), NULL, MUONSHARD_ROLE_UNSET, MUONSHARD_STACK, 0, {0}, NULL,  \
            0, MUONSHARD_FP32, NULL, NULL, MUONSHARD_NULL_GRAD_ERROR, 1.0, 1.0, 0, 0, 0,           \
            MUONSHARD_DTYPE_OF_PARAM                                                               \
    }

/* Registers a tensor; `id` (may be NULL) gets its number, counted from 0. Every rank registers the
 * same tensors in the same order. Local. ERR_STATE: after commit; ERR_ARGUMENT: name, role, shape,
 * splits, or a pointer that is NULL, overlaps another tensor's (tied weights are one tensor) or is
 * memory of the host where the backend is cuda;
 * ERR_UNSUPPORTED: dtype; ERR_MEMORY. */
MUONSHARD_API muonshard_status muonshard_add_tensor(muonshard_optimizer *optimizer,
                                                    const muonshard_tensor_desc *tensor, int *id);
/* Another gradient buffer from now on. Local. ERR_STATE: entries are already marked ready in this
 * step. */
MUONSHARD_API muonshard_status muonshard_set_grad(muonshard_optimizer *optimizer, int id,
                                                  const void *grad);

typedef enum muonshard_sync_params {
    MUONSHARD_SYNC_CHECK = 0, /* ERR_MISMATCH unless all ranks hold the same bytes */
    MUONSHARD_SYNC_BROADCAST, /* rank 0's parameters on every rank */
    MUONSHARD_SYNC_NONE
} muonshard_sync_params;

/* Plans ownership and schedule, allocates all workspace, compares tensors, plan and schedule over
 * the ranks. Collective; a local error is everybody's. ERR_MISMATCH names the first tensor that
 * differs and where; ERR_MEMORY; ERR_UNSUPPORTED: a matrix too large for BLAS; ERR_IO: the trace,
 * or gemm_table; ERR_CONFIG: gemm_table is of something else. On a GPU parameters are read when the
 * stream of muonshard_options gets here, and gemm_choice measured takes seconds. A commit that
 * failed may be tried again. */
MUONSHARD_API muonshard_status muonshard_commit(muonshard_optimizer *optimizer,
                                                muonshard_sync_params sync_params);

/* ---- optimizer: the step ---- */

#if defined(__GNUC__)
#define MUONSHARD_NAN __builtin_nan("")
#else
#define MUONSHARD_NAN ((double)(0.0f / 0.0f))
#endif

/* For tensors of group g, groups[g] goes before the values of the step, for matrices and
 * element-wise tensors alike. NaN (not 0): the step's value. */
typedef struct muonshard_group_args {
    double lr;
    double momentum;
    double weight_decay;
} muonshard_group_args;
#define MUONSHARD_GROUP_ARGS_INIT                                                                  \
    { MUONSHARD_NAN, MUONSHARD_NAN, MUONSHARD_NAN }

/* A schedule is points "step:value" separated by spaces or commas, steps counted from 0 and not
 * falling: linear between points, constant before the first and after the last. "cosine" before a
 * point: half a cosine wave from the point before it. "end" and "end-N" are steps counted back from
 * `total`; such a point is left out where total is 0, or where it would come before the point
 * before it. "0:0 100:1 cosine end:0.1" is a warm-up over 100 steps and a cosine to a tenth. Empty:
 * *value = otherwise. Local. ERR_CONFIG: malformed. */
MUONSHARD_API muonshard_status muonshard_schedule_value(const char *schedule, int64_t step,
                                                        int64_t total, double otherwise,
                                                        double *value);

/* NaN: as configured, schedules included; adam_lr configured as auto follows this step's lr (times
 * adam.lr_scale), and adam_weight_decay likewise. AdamW's t counts the steps of the optimizer that
 * were not skipped, for every tensor alike. */
typedef struct muonshard_step_args {
    size_t size;
    double lr;                /* matrices */
    double momentum;          /* matrices */
    double weight_decay;      /* matrices */
    double adam_lr;           /* element-wise tensors */
    double adam_weight_decay; /* element-wise tensors */
    double lr_factor;         /* the schedule's: multiplies every learning rate of this step */
    double grad_scale;        /* gradients are multiplied by it (1 / loss scale) */
    const muonshard_group_args *groups;
    size_t group_count;
    void *stream; /* cudaStream_t on which gradients are ready and parameters will be; NULL: that of
                     muonshard_options */
    int defer;    /* non-zero: return when all is computed and the last all-gather has started; see
                     muonshard_tensor_wait. On a GPU the stream then waits for no parameters but
                     through that call */
} muonshard_step_args;
#define MUONSHARD_STEP_ARGS_INIT                                                                   \
    {                                                                                              \
        sizeof(muonshard_step_args), MUONSHARD_NAN, MUONSHARD_NAN, MUONSHARD_NAN, MUONSHARD_NAN,   \
            MUONSHARD_NAN, 1.0, 1.0, NULL, 0, NULL, 0                                              \
    }

typedef struct muonshard_step_result_info {
    size_t size;
    int64_t step;       /* number of the call of muonshard_step, from 1 */
    int64_t count;      /* steps taken, skipped ones left out */
    int skipped;        /* a gradient was NaN or infinite somewhere: nothing changed anywhere */
    double grad_norm;   /* of the whole gradient after grad_scale and reduction, before clipping */
    double clip_factor; /* min(1, clip_norm / (grad_norm + 1e-6)); a norm above 2^110 is brought
                           down to that beside it */
} muonshard_step_result_info;
#define MUONSHARD_STEP_RESULT_INIT                                                                 \
    { sizeof(muonshard_step_result_info), 0, 0, 0, 0.0, 0.0 }

/* Entries [first, first+count) of a stack (a tensor that is no stack has one entry) hold their
 * final gradient (on a GPU: where the stream of muonshard_options is now): their reduce-scatter may
 * start under the rest of the backward pass. They must not change until the step returns. Optional:
 * muonshard_step marks what is left. Local call; what it starts is collective, in one order on all
 * ranks; ranks that mark in different orders use no other collective of this communicator until the
 * step returns. ERR_ARGUMENT: range, marked twice; ERR_STATE: before commit, or a step is deferred
 * and unfinished. */
MUONSHARD_API muonshard_status muonshard_grad_ready(muonshard_optimizer *optimizer, int id,
                                                    int64_t first, int64_t count);
/* One optimizer step, once per accumulated gradient. `args` may be NULL. Collective. A non-finite
 * gradient anywhere skips the step everywhere: OK is returned and muonshard_step_result says so. An
 * error found before the first collective is returned by all ranks and nothing changes; a later one
 * ends by the deadline (ERR_TIMEOUT, ERR_COMM) and kills the handle.
 *
 * On a GPU the call doesn't wait for the device: it returns when the step is enqueued, and waits at
 * most for the step before the last one. So an error of this rank is returned here, one of another
 * rank by muonshard_step_result. The calling thread's current device becomes the optimizer's. */
MUONSHARD_API muonshard_status muonshard_step(muonshard_optimizer *optimizer,
                                              const muonshard_step_args *args);
/* The outcome of step number `step` (0: the latest; the last 16 are kept). wait = 0: ERR_STATE if
 * not known yet; otherwise the step is finished first (on a GPU: waited for). A step in which a
 * rank had an error returns it. Local, or collective where it finishes a deferred step. */
MUONSHARD_API muonshard_status muonshard_step_result(muonshard_optimizer *optimizer, int64_t step,
                                                     int wait, muonshard_step_result_info *result);
/* After a deferred step: entries [first, first+count) have their new value when it returns (on a
 * GPU: `stream` waits for them). The same calls in the same order on all ranks. ERR_ARGUMENT. */
MUONSHARD_API muonshard_status muonshard_tensor_wait(muonshard_optimizer *optimizer, int id,
                                                     int64_t first, int64_t count, void *stream);
/* Lets communication in flight advance; for long backward passes on the host. Local, never waits.
 */
MUONSHARD_API muonshard_status muonshard_progress(muonshard_optimizer *optimizer);

/* ---- optimizer: checkpoints ---- */

/* A checkpoint is a directory step-N with a safetensors file a rank, which holds what the rank owns
 * (parameters, masters, momentum, variance, AdamW state), and a manifest, written last: without it
 * there is no checkpoint. Files are synced and renamed into place; checksums say what is damaged.
 * docs/checkpoints.md has the format. */

typedef struct muonshard_save_args {
    size_t size;
    const char *user; /* UTF-8 text of the program's own, rank 0's counts, which muonshard_load
                         gives back: where it is in its data, say. NULL: none */
    int keep;  /* complete checkpoints that stay in the directory, this one included; 0: all */
    int defer; /* non-zero: return once the state is copied; a thread writes it, and the checkpoint
                  is complete after muonshard_save_wait */
} muonshard_save_args;
#define MUONSHARD_SAVE_ARGS_INIT                                                                   \
    { sizeof(muonshard_save_args), NULL, 0, 0 }

/* Saves the state after the latest step, which is finished first, to a new directory
 * `directory`/step-N; `directory`, which all ranks see, is made where it is not there. A save
 * before that was deferred is waited for, and its failure returned. `args` may be NULL. Collective;
 * one rank's error is everybody's, what was written is removed again, and earlier checkpoints stay
 * as they are. ERR_IO names the file; ERR_TIMEOUT: a file not written within `save_timeout`; the
 * optimizer goes on, and saves again (until then ERR_STATE) once the file system has let go;
 * ERR_STATE: also where gradients are marked for a step that has not been taken; ERR_ARGUMENT;
 * ERR_MEMORY. */
MUONSHARD_API muonshard_status muonshard_save(muonshard_optimizer *optimizer, const char *directory,
                                              const muonshard_save_args *args);
/* *done: this rank's part of a deferred save is written, or there is none. Local, never waits. */
MUONSHARD_API muonshard_status muonshard_save_test(const muonshard_optimizer *optimizer, int *done);
/* Completes a deferred save; OK where there is none. Collective; errors as muonshard_save. */
MUONSHARD_API muonshard_status muonshard_save_wait(muonshard_optimizer *optimizer);

typedef struct muonshard_load_args {
    size_t size;
    int optional;    /* non-zero: no complete checkpoint is no error: found is 0 */
    int keep_params; /* non-zero: parameters are in place, and are not read */
} muonshard_load_args;
#define MUONSHARD_LOAD_ARGS_INIT                                                                   \
    { sizeof(muonshard_load_args), 0, 0 }

typedef struct muonshard_load_result {
    size_t size;
    int found;
    int world_size;      /* ranks that wrote it */
    int64_t step, count; /* calls of muonshard_step until then, and those that were not skipped */
    const char *path;    /* of the checkpoint; this and user: until the next load, or destroy */
    const char *user;
} muonshard_load_result;
#define MUONSHARD_LOAD_RESULT_INIT                                                                 \
    { sizeof(muonshard_load_result), 0, 0, 0, 0, NULL, NULL }

/* Continues from a checkpoint: parameters and all state, on any number of ranks, with any
 * ownership, bucket and batch sizes and backend; with the same ranks and plan, to the bit (on
 * a GPU with gemm_choice measured: with the same gemm_table).
 * `directory` is a checkpoint, or holds some: then the newest that is complete and undamaged is
 * taken, and a warning names those passed over. After commit; the next step is number result->step
 * + 1. `args` and `result` may be NULL. Collective; one rank's error is everybody's. Nothing
 * changes on ERR_ARGUMENT (other tensors, a dtype of state or a master that is not there: the
 * message names it), ERR_FORMAT (damaged), ERR_UNSUPPORTED (another version of the format),
 * ERR_STATE and ERR_MEMORY; nor on ERR_IO, unless a file that has just been checked cannot be read
 * once more: then the handle is dead.
 */
MUONSHARD_API muonshard_status muonshard_load(muonshard_optimizer *optimizer, const char *directory,
                                              const muonshard_load_args *args,
                                              muonshard_load_result *result);

/* For programs with checkpoints of their own: the bytes of this rank's image, which are those of
 * the file it would write, and the same number after every step. Local. ERR_STATE: before commit.
 */
MUONSHARD_API muonshard_status muonshard_state_size(const muonshard_optimizer *optimizer,
                                                    size_t *bytes);
/* memory [bytes], host: this rank's image. On a GPU it waits for the device. Local. ERR_STATE: a
 * step is begun or deferred and not finished; ERR_ARGUMENT: fewer bytes than muonshard_state_size.
 */
MUONSHARD_API muonshard_status muonshard_save_memory(muonshard_optimizer *optimizer, void *memory,
                                                     size_t bytes);
/* images [count] of images[i], bytes[i] long, host: between them all that this rank needs, which
 * all images always are; with the ranks and plan that saved them and keep_params, its own.
 * Collective; `optional` is not used; errors as muonshard_load. */
MUONSHARD_API muonshard_status muonshard_load_memory(muonshard_optimizer *optimizer,
                                                     const void *const *images, const size_t *bytes,
                                                     size_t count, const muonshard_load_args *args,
                                                     muonshard_load_result *result);

/* ---- optimizer: looking in ---- */

typedef struct muonshard_stats_info {
    size_t size;
    int64_t steps;   /* calls of muonshard_step */
    int64_t skipped; /* of these */
    /* seconds of this rank, summed over all steps */
    double time_step, time_pack, time_reduce_scatter, time_agree, time_momentum;
    double time_orthogonalize, time_all_gather, time_elementwise,
        time_apply;          /* communication: exposed waiting */
    double ns_flops;         /* floating-point operations of Newton-Schulz on this rank, summed */
    int64_t matrices;        /* matrix views */
    int64_t matrices_owned;  /* of these, on this rank */
    double imbalance;        /* largest / mean Newton-Schulz cost over the ranks */
    int64_t bytes_reduced;   /* a step: bytes this rank sends in reduce-scatters */
    int64_t bytes_gathered;  /* a step: bytes this rank receives in all-gathers */
    int64_t bytes_packed;    /* a step: gradient bytes copied before they can be sent */
    int64_t bytes_padded;    /* a step: bytes of empty slots, whether or not they travel */
    int64_t bytes_state;     /* momentum and AdamW state on this rank */
    int64_t bytes_workspace; /* everything else the optimizer allocated on this rank */
    double grad_norm;        /* latest */
    int64_t bytes_pinned;    /* memory of the host that a device copies to and from */
    int64_t bytes_staging;   /* memory of the host for what checkpoints are written from */
} muonshard_stats_info;
#define MUONSHARD_STATS_INIT                                                                       \
    {                                                                                              \
        sizeof(muonshard_stats_info), 0, 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0,   \
            0, 0.0, 0, 0, 0, 0, 0, 0, 0.0, 0, 0                                                    \
    }

/* Local. ERR_ARGUMENT, ERR_STATE: before commit. */
MUONSHARD_API muonshard_status muonshard_stats(const muonshard_optimizer *optimizer,
                                               muonshard_stats_info *stats);
/* The last error of an optimizer; valid until the next call. Local. */
MUONSHARD_API const char *muonshard_last_error(const muonshard_optimizer *optimizer);
/* Waits for no rank; on a GPU, by the step's deadline, for what is under way; and, by
 * `save_timeout`, for the thread of a save that was deferred and not waited for, which stays
 * incomplete. A step that was begun or deferred is finished with muonshard_step_result(wait)
 * before, or its parameters stay as they are and other ranks wait. NULL is allowed. Local. */
MUONSHARD_API void muonshard_destroy(muonshard_optimizer *optimizer);

#ifdef __cplusplus
}
#endif
#endif
