/* check_tensors.c - what moves tensors between ranks, over sizes: one element-wise tensor, whose
 * update is made to be its summed gradient, so that every element of every rank is known. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "check_values.h"

/* AdamW without memory: W -> (1 - lr wd) W - lr g / (|g| + eps). Gradients scaled to below 2^-36
 * are lost beside an eps of 1, and wd = 1 / lr forgets W: what is left is W = -lr scale sum,
 * exactly. */
static const char *const keys[][2] = {
    {"elementwise", "adamw"},
    {"adam.form", "eps_outside"},
    {"adam.nesterov", "false"},
    {"adam.decay", "decoupled"},
    {"adam.beta1", "0"},
    {"adam.beta2", "0"},
    {"adam.eps", "1"},
    {"reduce", "sum"},
    {"clip_norm", "0"},
    {"lr_schedule", ""},
    {"weight_decay_schedule", ""},
    {"momentum_schedule", ""},
    {"check_replicas", "0"},
    {NULL, NULL},
};
static const double SCALE = 0x1p-60;

/* What is slower than LATE times the time a machine file leads to, or below LEAST of its bandwidth,
 * is told; of tensors below SMALL bytes the time is all that counts. */
static const double LATE = 3.0, LEAST = 0.7;
enum { SMALL = 1 << 19 };

/* 1 and 2 by turns, so that what a step did not write is seen. */
static double lr_of(int step) {
    return step % 2 ? 2.0 : 1.0;
}

static float factor_of(int step) {
    return step < 0 ? 0.0F : -(float)(lr_of(step) * SCALE);
}

typedef struct row {
    check_tensor t;
    check_outcome outcome;             /* the first that was not right */
    double wrong;                      /* elements, over all ranks and looks */
    double reduce_scatter, all_gather; /* seconds: the median step */
    double best_reduce_scatter, best_all_gather;
} row;

/* ---- one size ---- */

static muonshard_status look(check *c, row *w, int step) {
    const check_pattern p = check_pattern_make(c->cmd.size);
    const muonshard_status status = check_tensor_read(c, &w->t);
    if (status != MUONSHARD_OK)
        return status;
    const check_outcome o =
        check_values(&p, w->t.host, w->t.count, w->t.slot, factor_of(step), factor_of(step - 1));
    if (!w->outcome.wrong)
        w->outcome = o;
    return MUONSHARD_OK;
}

static muonshard_status take_step(check *c, row *w, int step, check_times *times) {
    muonshard_step_args args = MUONSHARD_STEP_ARGS_INIT;
    args.adam_lr = lr_of(step);
    args.adam_weight_decay = 1.0 / lr_of(step);
    args.grad_scale = SCALE;
    return check_tensor_step(c, &w->t, &args, times);
}

/* Of each step the slowest rank counts. */
static muonshard_status take_steps(check *c, row *w) {
    double rs[CHECK_TIMED_STEPS], ag[CHECK_TIMED_STEPS];
    int timed = 1;
    check_times times = {0};
    muonshard_status status = MUONSHARD_OK;
    for (int step = 0; step < CHECK_WARM_STEPS + timed && status == MUONSHARD_OK; step++) {
        status = take_step(c, w, step, &times);
        const int k = step - CHECK_WARM_STEPS;
        if (k >= 0) {
            rs[k] = times.reduce_scatter;
            ag[k] = times.all_gather;
        }
        if (status == MUONSHARD_OK && step == CHECK_WARM_STEPS - 1)
            status = check_step_count(c, times.whole, &timed);
        const bool last = step == CHECK_WARM_STEPS + timed - 1;
        if (status == MUONSHARD_OK && (step == 0 || last))
            status = look(c, w, step);
    }
    if (status == MUONSHARD_OK)
        status = check_largest(c, rs, (size_t)timed);
    if (status == MUONSHARD_OK)
        status = check_largest(c, ag, (size_t)timed);
    w->reduce_scatter = check_median(rs, (size_t)timed); /* sorts */
    w->all_gather = check_median(ag, (size_t)timed);
    w->best_reduce_scatter = rs[0];
    w->best_all_gather = ag[0];
    return status;
}

/* Names the first ranks that are wrong. */
static muonshard_status tell_wrong(check *c, row *w) {
    const size_t ranks = (size_t)c->cmd.size;
    check_outcome *all = calloc(ranks, sizeof *all);
    muonshard_status status =
        command_agree(&c->cmd, all ? MUONSHARD_OK : MUONSHARD_ERR_MEMORY, "out of memory");
    if (status == MUONSHARD_OK)
        status = check_gather(c, &w->outcome, all, sizeof *all);
    int told = 0;
    for (size_t r = 0; r < ranks && status == MUONSHARD_OK; r++) {
        char text[512];
        w->wrong += (double)all[r].wrong;
        if (!all[r].wrong || told++ >= 3)
            continue;
        check_outcome_text(&all[r], "check", w->t.count, text, sizeof text);
        check_problem(c, MUONSHARD_ERR_COMM, "on rank %zu %s", r, text);
    }
    if (told > 3)
        check_say(c, "         and so on %d more ranks", told - 3);
    free(all);
    return status;
}

/* ---- times against expectation ---- */

/* Seconds; NaN: nothing is expected. */
static double expected(const check *c, const row *w, bool reduces) {
    const machine *m = &c->machine;
    const double ranks = c->cmd.size, slot = sizeof(float) * (double)w->t.slot;
    const double filled = ceil((double)w->t.count / (double)w->t.slot);
    if (!c->machine_path || c->cmd.rank != 0)
        return NAN;
    const machine_transfer t = machine_collective(m, m->ring, ranks, 1.0, filled, slot, NULL);
    double seconds = t.latency + t.bandwidth;
    if (!m->ring && reduces) /* the ranks add for themselves */
        seconds += machine_pass_seconds(m, PASS_SUM, (ranks + 1.0) * slot);
    if (!m->ring && !reduces)
        seconds += machine_pass_seconds(m, PASS_COPY, 2.0 * slot);
    return seconds;
}

/* `seconds` of the best step: what else runs makes one slower, never faster. */
static void judge(check *c, const row *w, bool reduces, double seconds) {
    const char *what = reduces ? "a reduce-scatter" : "an all-gather";
    const double usual = expected(c, w, reduces);
    const double bytes = sizeof(float) * (double)w->t.slot * (c->cmd.size - 1);
    const size_t size = sizeof(float) * w->t.count;
    const bool small = size < SMALL;
    /* Also where nothing is expected. */
    if (!(seconds > (small ? LATE : 1.0 / LEAST) * usual))
        return;
    if (small)
        check_warn(c,
                   "%s of a tensor of %zu bytes takes %.1f us at best, more than %.0f times the "
                   "%.1f us that "
                   "%s expects",
                   what, size, 1e6 * seconds, LATE, 1e6 * usual, c->machine_path);
    else
        check_warn(
            c, "%s of a tensor of %zu bytes runs at %.3g GB/s a rank at best; %s expects %.3g GB/s",
            what, size, 1e-9 * bytes / seconds, c->machine_path, 1e-9 * bytes / usual);
    c->slow_links = true;
}

/* Once, behind the table. */
static void advise(const check *c) {
    if (!c->slow_links)
        return;
    if (c->device)
        check_say(c, "         look at NCCL_DEBUG=INFO (which interface, whether GPUDirect), at "
                     "binding (MUONSHARD_BIND_VERBOSE=1) and at who else is on the links");
    else
        check_say(c, "         look at which interface MPI takes (--mca btl_tcp_if_include, "
                     "UCX_NET_DEVICES), at binding (MUONSHARD_BIND_VERBOSE=1) and at who else is "
                     "on the links");
}

/* A tensor that fills few slots doesn't travel as so many bytes. */
static void bandwidth_text(const check *c, const row *w, double seconds, char *text, size_t size) {
    const double bytes = sizeof(float) * (double)w->t.slot * (c->cmd.size - 1);
    const bool full = 4 * w->t.count >= 3 * w->t.slot * (size_t)c->cmd.size;
    if (full && seconds > 0.0 && c->cmd.size > 1)
        snprintf(text, size, "%.2f", 1e-9 * bytes / seconds);
    else
        snprintf(text, size, "-");
}

static void print_row(check *c, const row *w) {
    char rs[32], ag[32];
    bandwidth_text(c, w, w->reduce_scatter, rs, sizeof rs);
    bandwidth_text(c, w, w->all_gather, ag, sizeof ag);
    check_say(c, "  %11zu %12zu   %11.1f %9s   %11.1f %9s   %8.0f", sizeof(float) * w->t.count,
              sizeof(float) * w->t.slot, 1e6 * w->reduce_scatter, rs, 1e6 * w->all_gather, ag,
              w->wrong);
}

/* What carries them can be told from outside: over MPI they pass pinned memory of the host. */
static void print_head(check *c, const row *w) {
    const bool host = strcmp(muonshard_backend(w->t.optimizer), "host") == 0;
    const bool staged = !host && (size_t)w->t.bytes_pinned >= sizeof(float) * w->t.slot;
    const char *over = c->cmd.size == 1 ? "nothing, there is one rank"
                       : host           ? "MPI"
                       : staged         ? "MPI, through memory of the host"
                                        : "NCCL";
    check_say(c, "tensors: moved by %s; every element is checked", over);
    check_say(c, "  %11s %12s   %11s %9s   %11s %9s   %8s", "tensor", "a rank", "red.-scatter",
              "busbw", "all-gather", "busbw", "#wrong");
    check_say(c, "  %11s %12s   %11s %9s   %11s %9s", "(B)", "(B)", "(us)", "(GB/s)", "(us)",
              "(GB/s)");
    if (c->machine_path && c->machine.on_gpu == host)
        check_say(c, "note: %s is of a machine that computes on its %s; this one does not",
                  c->machine_path, c->machine.on_gpu ? "GPUs" : "host");
    if (staged && c->cmd.size > 1)
        check_warn(c, "GPUs exchange tensors through memory of the host; NCCL would be faster: see "
                      "the library's warning above, and `comm`");
}

static muonshard_status check_size(check *c, double bytes, bool first) {
    row w = {.wrong = 0.0};
    const int64_t count = (int64_t)(bytes / sizeof(float));
    muonshard_status status = check_tensor_open(c, &w.t, MUONSHARD_ROLE_ELEMENTWISE, 1, &count);
    if (status == MUONSHARD_OK && first)
        print_head(c, &w);
    if (status == MUONSHARD_OK)
        status = take_steps(c, &w);
    if (status == MUONSHARD_OK)
        status = tell_wrong(c, &w);
    if (status == MUONSHARD_OK) {
        print_row(c, &w);
        if (c->cmd.size > 1) {
            judge(c, &w, true, w.best_reduce_scatter);
            judge(c, &w, false, w.best_all_gather);
        }
    }
    check_tensor_close(c, &w.t);
    return status;
}

/* The first is a tensor of one owner. The others fill every rank's slot, which is 256 KiB or a
 * multiple, but for the last elements. */
muonshard_status check_tensors(check *c) {
    const double wave = 262144.0 * c->cmd.size;
    double last = 0.0;
    muonshard_status status = check_set(c, keys);
    if (status == MUONSHARD_OK)
        status = check_size(c, 65536.0, true);
    for (int k = 0; k < 3 && status == MUONSHARD_OK; k++) {
        const double usual[] = {0x1p20, 0x1p24, 0x1p27};
        const double largest = c->largest > 0.0 ? c->largest : c->device ? 0x1p27 : 0x1p24;
        const double bytes = ceil(usual[k] / wave) * wave;
        if (usual[k] > largest || bytes <= last)
            continue;
        last = bytes;
        status = check_size(c, bytes - 20.0, false);
    }
    advise(c);
    return status;
}
