/* muonshard check: what a new cluster is like, in under a minute. Wrong numbers are problems and
 * the exit code says so; what is slow is a warning. */
#include "check.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "check_values.h"
#include "gpt_device.h"
#include "message.h"

enum { EXIT_SLOW = 3, MESSAGES = 100, LATE = 3 };

static const command_option options[] = {
    {"--machine", COMMAND_VALUE, false, "FILE",
     "a machine file (bench --calibrate): what is slower than it says is named"},
    {"--strict", COMMAND_FLAG, false, NULL, "exit code 3 where something is slow"},
    {"--largest", COMMAND_VALUE, false, "BYTES",
     "of the tensors that are moved: 16M, on GPUs 128M; K, M, G are powers of 1024"},
    {"--side", COMMAND_VALUE, false, "N",
     "of the square matrix a rank that Newton-Schulz is timed with: 512, on GPUs 2048"},
};

static const command_usage check_usage = {
    .name = "check",
    .synopsis = "[--machine FILE] [--strict] [key=value...]",
    .doc = "Looks at where the ranks are, what they compute with, whether messages, sums and\n"
           "matrices are right on all of them, and how fast. Under mpirun, on a new cluster.",
    .overrides = true,
    .options = options,
    .option_count = sizeof options / sizeof options[0],
};

/* ---- saying ---- */

static void say(const check *c, const char *prefix, const char *format, va_list list) {
    if (c->cmd.rank != 0)
        return;
    printf("%s", prefix);
    vprintf(format, list);
    printf("\n");
    fflush(stdout);
}

void check_say(const check *c, const char *format, ...) {
    va_list list;
    va_start(list, format);
    say(c, "", format, list);
    va_end(list);
}

void check_warn(check *c, const char *format, ...) {
    va_list list;
    va_start(list, format);
    say(c, "warning: ", format, list);
    va_end(list);
    c->warnings++;
}

void check_problem(check *c, muonshard_status status, const char *format, ...) {
    va_list list;
    va_start(list, format);
    say(c, "PROBLEM: ", format, list);
    va_end(list);
    if (c->problems++ == 0)
        c->worst = status;
}

/* ---- what all parts do ---- */

muonshard_status check_set(check *c, const char *const (*keys)[2]) {
    muonshard_status status = MUONSHARD_OK;
    for (size_t i = 0; keys[i][0] && status == MUONSHARD_OK; i++)
        status = muonshard_config_set(c->cmd.config, keys[i][0], keys[i][1]);
    return command_told(&c->cmd, status, "%s", muonshard_config_last_error(c->cmd.config));
}

muonshard_status check_gather(check *c, const void *send, void *recv, size_t bytes) {
    const muonshard_status status = muonshard_comm_allgather(c->cmd.comm, send, recv, bytes);
    return command_told(&c->cmd, status, "%s", muonshard_comm_last_error(c->cmd.comm));
}

muonshard_status check_largest(check *c, double *values, size_t count) {
    const muonshard_status status =
        muonshard_comm_allreduce(c->cmd.comm, values, count, MUONSHARD_REDUCE_MAX);
    return command_told(&c->cmd, status, "%s", muonshard_comm_last_error(c->cmd.comm));
}

static int by_value(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

double check_median(double *values, size_t count) {
    qsort(values, count, sizeof *values, by_value);
    return count % 2 ? values[count / 2] : 0.5 * (values[count / 2 - 1] + values[count / 2]);
}

/* ---- a tensor and its optimizer ---- */

/* The first time, ranks are shown too: even where it fails, since it may be one of them that has no
 * device. */
static muonshard_status open_optimizer(check *c, muonshard_optimizer **optimizer) {
    muonshard_status status = muonshard_create(c->cmd.comm, c->cmd.config, NULL, optimizer);
    char *why = status ? strdup(muonshard_comm_last_error(c->cmd.comm)) : NULL;
    if (!c->opened && status != MUONSHARD_ERR_COMM && status != MUONSHARD_ERR_TIMEOUT) {
        const muonshard_status shown = check_ranks(c, *optimizer);
        status = status ? status : shown;
    }
    if (why)
        command_told(&c->cmd, status, "%s", why);
    free(why);
    c->opened = true;
    c->cmd.log_from = MUONSHARD_LOG_ERROR; /* the next ones would say the same again */
    return status;
}

/* In the memory of the optimizer's device, which is the thread's current one. */
static muonshard_status open_layers(check *c, const muonshard_optimizer *optimizer) {
    muonshard_status status = MUONSHARD_OK;
    if (c->layers)
        return MUONSHARD_OK;
    if (strcmp(muonshard_backend(optimizer), "host") != 0) {
        c->device = gpt_device_open(GPT_MATH_FP32, -1, NULL, c->message, sizeof c->message);
        status = c->device ? MUONSHARD_OK : MUONSHARD_ERR_UNAVAILABLE;
    }
    c->layers = c->device ? c->device : &gpt_host_layers;
    return command_agree(&c->cmd, status, c->message);
}

/* Local: the device's error, if there is one. */
static muonshard_status device_status(check *c) {
    const char *error = c->layers->error ? c->layers->error(c->layers->self) : NULL;
    return error
               ? message_fail(c->message, MUONSHARD_ERR_INTERNAL, "rank %d: %s", c->cmd.rank, error)
               : MUONSHARD_OK;
}

static muonshard_status fill(check *c, check_tensor *t) {
    const check_pattern pattern = check_pattern_make(c->cmd.size);
    const size_t bytes = t->count * sizeof(float);
    t->param = c->layers->alloc(c->layers->self, bytes);
    t->grad = c->layers->alloc(c->layers->self, bytes);
    t->host = malloc(bytes);
    if (!t->param || !t->grad || !t->host)
        return message_fail(c->message, MUONSHARD_ERR_MEMORY,
                            "out of memory for a tensor of %zu bytes; see --largest", bytes);
    for (size_t i = 0; i < t->count; i++)
        t->host[i] = check_gradient(&pattern, c->cmd.rank, i);
    c->layers->upload(c->layers->self, t->grad, t->host, bytes);
    return device_status(c);
}

static muonshard_status add(check *c, check_tensor *t, muonshard_role role, int dims,
                            const int64_t *shape) {
    muonshard_tensor_desc desc = MUONSHARD_TENSOR_DESC_INIT;
    desc.name = "check";
    desc.role = role;
    desc.dims = dims;
    memcpy(desc.shape, shape, (size_t)dims * sizeof *shape);
    desc.param = t->param;
    desc.grad = t->grad;
    const muonshard_status status = muonshard_add_tensor(t->optimizer, &desc, NULL);
    return status ? message_fail(c->message, status, "%s", muonshard_last_error(t->optimizer))
                  : MUONSHARD_OK;
}

muonshard_status check_tensor_open(check *c, check_tensor *t, muonshard_role role, int dims,
                                   const int64_t *shape) {
    muonshard_stats_info stats = MUONSHARD_STATS_INIT;
    *t = (check_tensor){.count = 1};
    for (int d = 0; d < dims; d++)
        t->count *= (size_t)shape[d];
    muonshard_status status = open_optimizer(c, &t->optimizer);
    if (status == MUONSHARD_OK)
        status = open_layers(c, t->optimizer);
    if (status != MUONSHARD_OK)
        return status;
    status = fill(c, t);
    if (status == MUONSHARD_OK)
        status = add(c, t, role, dims, shape);
    status = command_agree(&c->cmd, status, c->message);
    if (status != MUONSHARD_OK)
        return status;
    status = muonshard_commit(t->optimizer, MUONSHARD_SYNC_CHECK);
    if (status == MUONSHARD_OK)
        status = muonshard_stats(t->optimizer, &stats);
    const size_t others = (size_t)c->cmd.size - 1;
    t->slot = others ? (size_t)stats.bytes_gathered / others / sizeof(float) : t->count;
    t->bytes_pinned = stats.bytes_pinned;
    return command_told(&c->cmd, status, "%s", muonshard_last_error(t->optimizer));
}

muonshard_status check_tensor_step(check *c, check_tensor *t, const muonshard_step_args *args,
                                   check_times *times) {
    muonshard_stats_info before = MUONSHARD_STATS_INIT, after = MUONSHARD_STATS_INIT;
    muonshard_step_result_info result = MUONSHARD_STEP_RESULT_INIT;
    double together = 0.0; /* the ranks begin at the same time */
    muonshard_status status = muonshard_stats(t->optimizer, &before);
    if (status == MUONSHARD_OK && (status = check_largest(c, &together, 1)) != MUONSHARD_OK)
        return status;
    if (status == MUONSHARD_OK)
        status = muonshard_step(t->optimizer, args);
    if (status == MUONSHARD_OK)
        status = muonshard_step_result(t->optimizer, 0, 1, &result);
    if (status == MUONSHARD_OK)
        status = muonshard_stats(t->optimizer, &after);
    *times = (check_times){
        .reduce_scatter = after.time_reduce_scatter - before.time_reduce_scatter,
        .all_gather = after.time_all_gather - before.time_all_gather,
        .orthogonalize = after.time_orthogonalize - before.time_orthogonalize,
        .whole = after.time_step - before.time_step,
        .flops = after.ns_flops - before.ns_flops,
    };
    command_told(&c->cmd, status, "%s", muonshard_last_error(t->optimizer));
    if (status == MUONSHARD_OK && result.skipped)
        check_problem(c, MUONSHARD_ERR_COMM,
                      "a step was skipped: a sum of finite gradients was not finite");
    return status;
}

muonshard_status check_tensor_read(check *c, check_tensor *t) {
    c->layers->download(c->layers->self, t->host, t->param, t->count * sizeof(float));
    return command_agree(&c->cmd, device_status(c), c->message);
}

/* Two seconds of them. */
muonshard_status check_step_count(check *c, double seconds, int *count) {
    const muonshard_status status = check_largest(c, &seconds, 1);
    const double fit = 2.0 / (seconds > 1e-9 ? seconds : 1e-9);
    *count = fit < 1.0 ? 1 : fit < CHECK_TIMED_STEPS ? (int)fit : CHECK_TIMED_STEPS;
    return status;
}

void check_tensor_close(check *c, check_tensor *t) {
    muonshard_destroy(t->optimizer);
    if (c->layers) {
        c->layers->free(c->layers->self, t->param);
        c->layers->free(c->layers->self, t->grad);
    }
    free(t->host);
    *t = (check_tensor){.optimizer = NULL};
}

/* ---- messages of the host ---- */

static uint64_t word_of(int rank, int number) {
    return (uint64_t)(rank + 1) * 0x9e3779b97f4a7c15U + (uint64_t)number;
}

/* Wrong words of all gathers; each rank's median seconds. */
static muonshard_status gather_words(check *c, uint64_t *words, double *wrong, double *seconds) {
    double times[MESSAGES];
    for (int k = -10; k < MESSAGES; k++) {
        const uint64_t word = word_of(c->cmd.rank, k);
        const double begin = command_now_s();
        const muonshard_status status = check_gather(c, &word, words, sizeof word);
        if (status != MUONSHARD_OK)
            return status;
        if (k >= 0)
            times[k] = command_now_s() - begin;
        for (int r = 0; r < c->cmd.size; r++)
            *wrong += words[r] != word_of(r, k);
    }
    *seconds = check_median(times, MESSAGES);
    return MUONSHARD_OK;
}

static muonshard_status broadcast_words(check *c, double *wrong) {
    const int roots[] = {0, c->cmd.size / 2, c->cmd.size - 1};
    for (int k = 0; k < 3; k++) {
        uint64_t word = word_of(c->cmd.rank, k);
        const muonshard_status status =
            muonshard_comm_broadcast(c->cmd.comm, &word, sizeof word, roots[k]);
        if (status != MUONSHARD_OK)
            return command_told(&c->cmd, status, "%s", muonshard_comm_last_error(c->cmd.comm));
        *wrong += word != word_of(roots[k], k);
    }
    return MUONSHARD_OK;
}

/* The machine file knows the host's links only where the host's messages go over them. */
static void judge_messages(check *c, double seconds) {
    if (!c->machine_path || c->machine.on_gpu || c->cmd.size < 2)
        return;
    const double ranks = c->cmd.size;
    const machine_transfer t = machine_collective(&c->machine, 0, ranks, 1.0, ranks, 8.0, NULL);
    const double expected = t.latency + t.bandwidth;
    if (seconds > LATE * expected)
        check_warn(c,
                   "an all-gather of 8 bytes took %.1f us, more than %d times the %.1f us that %s "
                   "expects; look at which interface MPI takes (--mca btl_tcp_if_include, "
                   "UCX_NET_DEVICES) and at binding (MUONSHARD_BIND_VERBOSE=1)",
                   1e6 * seconds, LATE, 1e6 * expected, c->machine_path);
}

static muonshard_status check_messages(check *c) {
    double found[2] = {0.0, 0.0}; /* wrong words, seconds */
    uint64_t *words = calloc((size_t)c->cmd.size, sizeof *words);
    muonshard_status status =
        command_agree(&c->cmd, words ? MUONSHARD_OK : MUONSHARD_ERR_MEMORY, "out of memory");
    if (status == MUONSHARD_OK)
        status = gather_words(c, words, &found[0], &found[1]);
    if (status == MUONSHARD_OK)
        status = broadcast_words(c, &found[0]);
    free(words);
    if (status == MUONSHARD_OK)
        status = check_largest(c, found, 2);
    if (status != MUONSHARD_OK)
        return status;
    if (found[0] > 0.0)
        check_problem(c, MUONSHARD_ERR_COMM,
                      "messages of the host are wrong: on one rank %.0f words are not what was "
                      "sent; this is MPI itself",
                      found[0]);
    check_say(c, "messages: an all-gather of 8 bytes takes %.1f us (median of %d, slowest rank)%s",
              1e6 * found[1], MESSAGES, found[0] > 0.0 ? "" : "; all words arrive");
    judge_messages(c, found[1]);
    return MUONSHARD_OK;
}

/* ---- the command ---- */

static muonshard_status read_number(check *c, const command_args *args, const char *name,
                                    double max, double *number) {
    const char *text = command_option_value(&check_usage, args, name), *units = "KMG";
    char *end;
    if (!text)
        return MUONSHARD_OK;
    errno = 0;
    *number = (double)strtoull(text, &end, 10);
    const char *unit = *end ? strchr(units, *end) : NULL;
    for (const char *u = units; unit && u <= unit; u++)
        *number *= 1024.0;
    if (errno || text[0] < '0' || text[0] > '9' || end[unit != NULL] || *number < 1.0 ||
        *number > max)
        return message_fail(c->message, MUONSHARD_ERR_ARGUMENT,
                            "%s is \"%s\", not a number from 1 to %.0f", name, text, max);
    return MUONSHARD_OK;
}

static muonshard_status read_options(check *c, const command_args *args) {
    c->strict = command_option_given(&check_usage, args, "--strict").count > 0;
    c->machine_path = command_option_value(&check_usage, args, "--machine");
    for (size_t i = 0; i < args->override_count; i++)
        c->dtype_given = c->dtype_given || strncmp(args->overrides[i], "ns_dtype=", 9) == 0;
    muonshard_status status = read_number(c, args, "--largest", 0x1p34, &c->largest);
    if (status == MUONSHARD_OK)
        status = read_number(c, args, "--side", 16384.0, &c->side);
    if (status == MUONSHARD_OK && c->cmd.size > CHECK_MOST_RANKS)
        status = message_fail(c->message, MUONSHARD_ERR_UNSUPPORTED, "%d ranks; at most %d",
                              c->cmd.size, CHECK_MOST_RANKS);
    if (status == MUONSHARD_OK && c->machine_path && c->cmd.rank == 0)
        status = machine_load(&c->machine, c->machine_path, c->message);
    return command_agree(&c->cmd, status, c->message);
}

/* A link that the file lacks would count as free. */
static muonshard_status check_links(check *c) {
    const machine *m = &c->machine;
    const double joined = m->link_count ? m->links[m->link_count - 1].ranks : 1.0;
    muonshard_status status = MUONSHARD_OK;
    if (c->machine_path && c->cmd.rank == 0 && joined < c->cmd.size)
        status = message_fail(c->message, MUONSHARD_ERR_CONFIG,
                              "%s: its links join %.0f ranks; there are %d", c->machine_path,
                              joined, c->cmd.size);
    return command_agree(&c->cmd, status, c->message);
}

/* Rank 0's verdict is everybody's. */
static muonshard_status conclude(check *c, double seconds) {
    int verdict[3] = {c->problems, c->warnings, c->worst};
    const muonshard_status status =
        muonshard_comm_broadcast(c->cmd.comm, verdict, sizeof verdict, 0);
    if (status != MUONSHARD_OK)
        return command_told(&c->cmd, status, "%s", muonshard_comm_last_error(c->cmd.comm));
    c->problems = verdict[0];
    c->warnings = verdict[1];
    const char *ranks = c->cmd.size == 1 ? "" : "s", *hosts = c->hosts == 1 ? "" : "s";
    if (c->problems)
        check_say(c, "%d problem%s, %d warning%s: %d rank%s on %d host%s, %.1f s", c->problems,
                  c->problems == 1 ? "" : "s", c->warnings, c->warnings == 1 ? "" : "s",
                  c->cmd.size, ranks, c->hosts, hosts, seconds);
    else if (c->warnings)
        check_say(c, "all is right, but %d warning%s: %d rank%s on %d host%s, %.1f s", c->warnings,
                  c->warnings == 1 ? "" : "s", c->cmd.size, ranks, c->hosts, hosts, seconds);
    else
        check_say(c, "all is well: %d rank%s on %d host%s, %.1f s", c->cmd.size, ranks, c->hosts,
                  hosts, seconds);
    return (muonshard_status)verdict[2];
}

static muonshard_status run(check *c) {
    const double begin = command_now_s();
    muonshard_status status = check_links(c);
    if (status == MUONSHARD_OK)
        status = check_messages(c);
    if (status == MUONSHARD_OK)
        status = check_tensors(c);
    if (status == MUONSHARD_OK)
        status = check_matrices(c);
    return status == MUONSHARD_OK ? conclude(c, command_now_s() - begin) : status;
}

int command_check(int argc, char **argv) {
    if (command_wants_help(argc, argv))
        return command_help(&check_usage, argc, argv, NULL, 0);
    check c = {.layers = NULL};
    command_args args = {0};
    muonshard_status status = command_start(&c.cmd, &check_usage, &args, argc, argv);
    if (status == MUONSHARD_OK)
        status = command_configure(&c.cmd, NULL, &args, NULL, 0, NULL);
    if (status == MUONSHARD_OK)
        status = read_options(&c, &args);
    if (status == MUONSHARD_OK)
        status = run(&c);
    if (c.device)
        c.device->close(c.device->self);
    machine_free(&c.machine);
    const int code = command_finish(&c.cmd, &args, status);
    return code == 0 && c.strict && c.warnings ? EXIT_SLOW : code;
}
