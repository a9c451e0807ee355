/* soak.c - a long run of a small model, for soak.sh: soak STEPS [KEY=VALUE...]
 *
 * Every step's gradient is a sum over 12 samples of multiples of 2^-10, small enough that fp32 adds
 * them exactly: parameters have the same bits on 1, 2, 3 and 4 ranks, whatever happened on the way.
 * The gradient follows the parameters, so that a bit that is wrong once stays wrong. */
#include <dirent.h>
#include <inttypes.h>
#include <math.h>
#include <muonshard_mpi.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SAMPLES = 12, TENSORS = 5, MOST = 70001, SAMPLE_EVERY = 500, STOPPED = 4 };

static const char settings[] = "preset: jordan\n"
                               "lr: 0.02\n"
                               "adam.lr: 0.01\n"
                               "weight_decay: 0.05\n"
                               "ns_dtype: fp32\n"
                               "variance: normuon\n"
                               "clip_norm: 20\n"
                               "reduce: sum\n"
                               "threads: 1\n"
                               "timeout: 60\n";

typedef struct layout {
    const char *name;
    muonshard_role role;
    muonshard_dtype dtype;
    int dims;
    int64_t shape[3], splits[2]; /* splits: rows, or 0 */
} layout;

/* The last is long enough for two chunks, and every element of it has one sample only. */
static const layout layouts[TENSORS] = {
    {"stack", MUONSHARD_ROLE_MATRIX, MUONSHARD_FP32, 3, {5, 24, 16}, {0}},
    {"wide", MUONSHARD_ROLE_MATRIX, MUONSHARD_BF16, 2, {16, 48}, {0}},
    {"tall", MUONSHARD_ROLE_MATRIX, MUONSHARD_FP32, 2, {40, 12}, {24, 16}},
    {"embedding", MUONSHARD_ROLE_ELEMENTWISE, MUONSHARD_FP32, 2, {61, 8}, {0}},
    {"bias", MUONSHARD_ROLE_ELEMENTWISE, MUONSHARD_FP32, 1, {MOST}, {0}},
};

typedef struct soak {
    int rank, size;
    int64_t steps, save_every, keep, nan_every, back_every, seed; /* arguments; 0: never */
    const char *save, *memory;                                    /* a directory, a file; or NULL */
    muonshard_comm *comm;
    muonshard_optimizer *optimizer;
    size_t count[TENSORS];
    void *param[TENSORS]; /* of their dtypes */
    float *grad[TENSORS];
    int64_t step;   /* taken, those that were repeated once */
    int64_t passes; /* of the loop, in this process */
    int saving;
} soak;

static volatile sig_atomic_t signalled;

static void note_signal(int number) {
    signalled = number;
}

/* A line on rank 0, at once: a run may be killed any moment. */
__attribute__((format(printf, 2, 3))) static void say(const soak *s, const char *format, ...) {
    va_list list;
    if (s->rank != 0)
        return;
    va_start(list, format);
    vprintf(format, list);
    va_end(list);
    printf("\n");
    fflush(stdout);
}

static void log_line(void *user, muonshard_log_level level, const char *message) {
    if (level != MUONSHARD_LOG_INFO)
        say(user, "%s", message);
}

/* An error ends the job. */
static void check(const soak *s, muonshard_status status) {
    if (status != MUONSHARD_OK)
        muonshard_mpi_abort(NULL, status,
                            s->optimizer ? muonshard_last_error(s->optimizer)
                                         : muonshard_comm_last_error(s->comm));
}

static uint64_t mix(uint64_t x) {
    x += 0x9E3779B97F4A7C15U;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9U;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBU;
    return x ^ (x >> 31);
}

/* ---- the model ---- */

/* In [-1, 1). */
static float unit(uint64_t seed) {
    return (float)(int32_t)(mix(seed) >> 32) / 2147483648.0F;
}

static float param_at(const soak *s, int t, size_t i) {
    uint32_t bits;
    float value;
    if (layouts[t].dtype == MUONSHARD_FP32)
        return ((const float *)s->param[t])[i];
    bits = (uint32_t)((const uint16_t *)s->param[t])[i] << 16;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* What sample `sample` of a step adds to a gradient, in units of 2^-10. */
static int pull(float param, uint64_t place, int64_t step, int sample) {
    const float noise = unit(place + (uint64_t)(step * SAMPLES + sample + 1) * 0xD1342543DE82EF95U);
    float away = (param - unit(place) + noise) * 1024.0F;
    away = away > 8191.0F ? 8191.0F : away;
    away = away < -8191.0F ? -8191.0F : away;
    return (int)lrintf(away);
}

/* This rank's samples of the step. */
static void gradients(const soak *s, int64_t step) {
    const int share = SAMPLES / s->size, first = share * s->rank;
    for (int t = 0; t < TENSORS; t++)
        for (size_t i = 0; i < s->count[t]; i++) {
            const float param = param_at(s, t, i);
            const uint64_t place = (uint64_t)t << 32 | i;
            const int own = (int)(i % SAMPLES);
            int sum = 0;
            for (int k = first; k < first + share; k++)
                if (t < TENSORS - 1 || k == own)
                    sum += pull(param, place, step, k);
            s->grad[t][i] = (float)sum / 1024.0F;
        }
}

static uint64_t digest(const soak *s) {
    uint64_t hash = 1469598103934665603U, others[SAMPLES];
    for (int t = 0; t < TENSORS; t++)
        for (size_t i = 0; i < s->count[t]; i++) {
            const float value = param_at(s, t, i);
            uint32_t bits;
            memcpy(&bits, &value, sizeof bits);
            hash = (hash ^ bits) * 1099511628211U;
        }
    check(s, muonshard_comm_allgather(s->comm, &hash, others, sizeof hash));
    for (int r = 0; r < s->size; r++)
        if (others[r] != hash)
            muonshard_mpi_abort(NULL, MUONSHARD_ERR_MISMATCH, "ranks have other parameters");
    return hash;
}

/* ---- set-up ---- */

static void add_tensor(soak *s, int t) {
    muonshard_tensor_desc desc = MUONSHARD_TENSOR_DESC_INIT;
    const layout *from = &layouts[t];
    s->count[t] = 1;
    for (int d = 0; d < from->dims; d++)
        s->count[t] *= (size_t)(desc.shape[d] = from->shape[d]);
    s->param[t] = calloc(s->count[t], from->dtype == MUONSHARD_FP32 ? 4 : 2);
    s->grad[t] = calloc(s->count[t], sizeof(float));
    desc.name = from->name;
    desc.role = from->role;
    desc.dims = from->dims;
    desc.dtype = from->dtype;
    desc.grad_dtype = MUONSHARD_FP32;
    desc.param = s->param[t];
    desc.grad = s->grad[t];
    desc.row_splits = from->splits[0] ? from->splits : NULL;
    desc.row_split_count = from->splits[0] ? 2 : 0;
    check(s, muonshard_add_tensor(s->optimizer, &desc, NULL));
}

static void make_optimizer(soak *s) {
    muonshard_comm_options options = MUONSHARD_COMM_OPTIONS_INIT;
    muonshard_config *config = NULL;
    options.on_fatal = muonshard_mpi_abort;
    options.log = log_line;
    options.log_user = s;
    options.timeout_s = 60.0;
    muonshard_status status = muonshard_comm_create_mpi(MPI_COMM_WORLD, &options, &s->comm);
    if (status == MUONSHARD_OK)
        status = muonshard_config_create(&config);
    if (status != MUONSHARD_OK)
        muonshard_mpi_abort(NULL, status, "no communicator, or no memory");
    status = muonshard_config_load_string(config, settings);
    if (status != MUONSHARD_OK)
        muonshard_mpi_abort(NULL, status, muonshard_config_last_error(config));
    check(s, muonshard_create(s->comm, config, NULL, &s->optimizer));
    muonshard_config_destroy(config);
    for (int t = 0; t < TENSORS; t++)
        add_tensor(s, t);
    check(s, muonshard_commit(s->optimizer, MUONSHARD_SYNC_CHECK));
}

/* ---- saving and continuing ---- */

static void note_saved(const soak *s, muonshard_status status) {
    if (status != MUONSHARD_OK)
        say(s, "not saved: %s", muonshard_last_error(s->optimizer));
}

static void finish_save(soak *s) {
    if (s->saving)
        note_saved(s, muonshard_save_wait(s->optimizer));
    s->saving = 0;
}

/* Every other one is written while steps go on. */
static void save(soak *s, int last) {
    char user[32];
    muonshard_save_args args = MUONSHARD_SAVE_ARGS_INIT;
    finish_save(s);
    snprintf(user, sizeof user, "%" PRId64, s->step);
    args.user = user;
    args.keep = (int)s->keep;
    args.defer = !last && s->step / s->save_every % 2;
    const muonshard_status status = muonshard_save(s->optimizer, s->save, &args);
    note_saved(s, status);
    s->saving = status == MUONSHARD_OK && args.defer;
}

/* To the newest checkpoint; nothing where there is none. */
static void load(soak *s, const char *word) {
    muonshard_load_args args = MUONSHARD_LOAD_ARGS_INIT;
    muonshard_load_result from = MUONSHARD_LOAD_RESULT_INIT;
    finish_save(s);
    args.optional = 1;
    check(s, muonshard_load(s->optimizer, s->save, &args, &from));
    if (!from.found)
        return;
    say(s, "%s after step %s of %d ranks, from %s", word, from.user, from.world_size, from.path);
    s->step = strtoll(from.user, NULL, 10);
}

/* ---- the loop ---- */

/* Whether something that happens every so many passes happens in this one; on all ranks alike. */
static int happens(const soak *s, int64_t every, uint64_t what) {
    return every && mix(mix((uint64_t)s->seed) + what * 0x632BE59BD9B4E019U + (uint64_t)s->passes) %
                            (uint64_t)every ==
                        0;
}

static int take_step(const soak *s) {
    muonshard_step_args args = MUONSHARD_STEP_ARGS_INIT;
    muonshard_step_result_info result = MUONSHARD_STEP_RESULT_INIT;
    args.grad_scale = 0.0625;
    args.lr_factor = 1.0 - 0.5 * (double)s->step / (double)s->steps;
    check(s, muonshard_step(s->optimizer, &args));
    check(s, muonshard_step_result(s->optimizer, 0, 1, &result));
    return !result.skipped;
}

/* A gradient of one rank is spoilt: the step is skipped, on all, and taken again. */
static void spoil(const soak *s) {
    const uint64_t chance = mix((uint64_t)(s->seed + s->passes));
    const int t = (int)(chance % TENSORS), rank = (int)(chance / 64 % (uint64_t)s->size);
    float *spoilt = &s->grad[t][chance / 4096 % s->count[t]];
    const float good = *spoilt;
    if (s->rank == rank)
        *spoilt = chance / 1024 % 2 ? NAN : -INFINITY;
    if (take_step(s))
        muonshard_mpi_abort(NULL, MUONSHARD_ERR_INTERNAL, "a step with NaN was not skipped");
    say(s, "skipped once: step %" PRId64 ", %s of rank %d", s->step + 1, layouts[t].name, rank);
    *spoilt = good;
}

static int open_descriptors(void) {
    DIR *dir = opendir("/proc/self/fd");
    int count = 0;
    while (dir && readdir(dir))
        count++;
    if (dir)
        closedir(dir);
    return count;
}

/* PID, rank, step, resident KiB, descriptors. */
static void sample_memory(soak *s) {
    long pages = 0;
    finish_save(s);
    FILE *from = fopen("/proc/self/statm", "r"), *to = fopen(s->memory, "a");
    if (!from || !to || fscanf(from, "%*d %ld", &pages) != 1)
        muonshard_mpi_abort(NULL, MUONSHARD_ERR_IO, "memory cannot be sampled");
    fclose(from);
    fprintf(to, "%ld %d %" PRId64 " %ld %d\n", (long)getpid(), s->rank, s->step,
            pages * (sysconf(_SC_PAGESIZE) / 1024), open_descriptors());
    fclose(to);
}

/* Whether some rank has had a signal; and what all have written of a checkpoint becomes one. */
static int anybody_signalled(soak *s) {
    int written = 1;
    muonshard_save_test(s->optimizer, &written);
    double sums[2] = {signalled ? 1.0 : 0.0, written ? 0.0 : 1.0};
    check(s, muonshard_comm_allreduce(s->comm, sums, 2, MUONSHARD_REDUCE_SUM));
    if (sums[1] == 0.0)
        finish_save(s);
    return sums[0] > 0.0;
}

static int one_pass(soak *s) {
    s->passes++;
    if (s->save && happens(s, s->back_every, 1))
        load(s, "went back");
    gradients(s, s->step + 1);
    if (happens(s, s->nan_every, 2))
        spoil(s);
    if (!take_step(s))
        muonshard_mpi_abort(NULL, MUONSHARD_ERR_INTERNAL, "a step with numbers was skipped");
    s->step++;
    const int stop = anybody_signalled(s) && s->step < s->steps;
    if (s->save && (stop || s->step == s->steps || s->step % s->save_every == 0))
        save(s, stop || s->step == s->steps);
    if (s->step % SAMPLE_EVERY == 0)
        say(s, "at %" PRId64 " %016" PRIx64, s->step, digest(s));
    if (s->memory && s->passes % SAMPLE_EVERY == 0)
        sample_memory(s);
    return stop;
}

static void read_arguments(soak *s, int argc, char **argv) {
    const struct {
        const char *key;
        int64_t *value;
    } numbers[] = {{"save_every=", &s->save_every},
                   {"keep=", &s->keep},
                   {"nan=", &s->nan_every},
                   {"back=", &s->back_every},
                   {"seed=", &s->seed}};
    s->steps = argc > 1 ? strtoll(argv[1], NULL, 10) : 0;
    for (int i = 2; i < argc; i++) {
        if (strncmp(argv[i], "save=", 5) == 0)
            s->save = argv[i] + 5;
        if (strncmp(argv[i], "memory=", 7) == 0)
            s->memory = argv[i] + 7;
        for (size_t k = 0; k < sizeof numbers / sizeof *numbers; k++)
            if (strncmp(argv[i], numbers[k].key, strlen(numbers[k].key)) == 0)
                *numbers[k].value = strtoll(argv[i] + strlen(numbers[k].key), NULL, 10);
    }
}

int main(int argc, char **argv) {
    soak s = {.save_every = 100, .keep = 3, .seed = 1};
    const struct sigaction action = {.sa_handler = note_signal, .sa_flags = SA_RESTART};
    int stopped = 0;
    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &s.rank);
    MPI_Comm_size(MPI_COMM_WORLD, &s.size);
    sigaction(SIGUSR1, &action, NULL);
    read_arguments(&s, argc, argv);
    if (s.steps < 1 || SAMPLES % s.size)
        muonshard_mpi_abort(NULL, MUONSHARD_ERR_ARGUMENT, "soak STEPS, on 1, 2, 3, 4, 6 or 12");
    make_optimizer(&s);
    say(&s, "%d ranks", s.size); /* from here on a signal stops the run */
    if (s.save)
        load(&s, "goes on");
    while (s.step < s.steps && !stopped)
        stopped = one_pass(&s);
    finish_save(&s);
    if (stopped)
        say(&s, "stopped after step %" PRId64, s.step);
    else
        say(&s, "parameters %016" PRIx64 " after %" PRId64, digest(&s), s.step);
    muonshard_destroy(s.optimizer);
    for (int t = 0; t < TENSORS; t++) {
        free(s.param[t]);
        free(s.grad[t]);
    }
    muonshard_comm_destroy(s.comm);
    MPI_Finalize();
    return stopped ? STOPPED : 0;
}
