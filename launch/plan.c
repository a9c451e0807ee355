/* plan.c - `muonshard plan MODEL --ranks 8,64 [--machine FILE] [--schedule] [-J FILE]`: who owns
 * what, what travels, what it costs in memory, what a step takes on a machine, and the schedule
 * itself, without weights and without the ranks. */
#include <errno.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bench.h"
#include "command.h"
#include "message.h"
#include "muonshard_mpi.h"
#include "optim/ownership.h"
#include "planner.h"

static const command_option options[] = {
    {"--ranks", COMMAND_VALUE, false, "N[,N...]", "world sizes to plan for (default 1)"},
    {"--machine", COMMAND_VALUE, false, "FILE",
     "a machine (configs/machines/, or of bench --calibrate): predicts times"},
    {"--backward", COMMAND_VALUE, false, "MS",
     "a backward pass of so long, during which gradients become ready"},
    {"--link", COMMAND_VALUE, false, "GBS[,US]", "all collectives take turns on such a link, too"},
    {"--schedule", COMMAND_FLAG, false, NULL, "print owners and the array of operations"},
    {"-J", COMMAND_VALUE, false, "FILE", "write JSON, for muonshard report; with --machine"},
};

static const command_usage usage = {
    .name = "plan",
    .synopsis = "MODEL [--ranks N[,N...]] [--machine FILE] [--backward MS] [--link GBS[,US]] "
                "[--schedule] [-J FILE] [key=value...]",
    .doc = "Prints bytes, memory a rank and imbalance for a model file, at each world size, and "
           "with a\nmachine what a step takes on it.",
    .positional_min = 1,
    .positional_max = 1,
    .overrides = true,
    .options = options,
    .option_count = sizeof options / sizeof options[0],
};

#define MAX_RANKS 16384
enum { MAX_COUNTS = 64 };

typedef struct plans {
    planner planner;
    int ranks[MAX_COUNTS];
    rank_plan plans[MAX_COUNTS];
    size_t count;
} plans;

/* ---- options ---- */

static int by_number(const void *left, const void *right) {
    return *(const int *)left - *(const int *)right;
}

static muonshard_status read_ranks(plans *all, const char *text, char *message) {
    while (*text) {
        char *end;
        errno = 0;
        const long n = strtol(text, &end, 10);
        if (end == text || errno || n < 1 || n > MAX_RANKS || (*end && *end != ',') ||
            all->count == MAX_COUNTS)
            return message_fail(message, MUONSHARD_ERR_ARGUMENT,
                                "--ranks is '%s'; wanted are at most %d numbers from 1 to %d, "
                                "separated by commas",
                                text, MAX_COUNTS, MAX_RANKS);
        all->ranks[all->count++] = (int)n;
        text = *end ? end + 1 : end;
    }
    qsort(all->ranks, all->count, sizeof *all->ranks, by_number);
    return MUONSHARD_OK;
}

static muonshard_status read_options(plans *all, const command_args *args, char *message) {
    const char *ranks = command_option_value(&usage, args, "--ranks");
    sim_options *o = &all->planner.options;
    muonshard_status status = read_ranks(all, ranks ? ranks : "1", message);
    if (status == MUONSHARD_OK)
        status = bench_read_backward(command_option_value(&usage, args, "--backward"), &o->backward,
                                     message);
    if (status == MUONSHARD_OK)
        status = bench_read_link(command_option_value(&usage, args, "--link"), &o->bandwidth,
                                 &o->latency, message);
    const bool given = command_option_value(&usage, args, "--machine") != NULL;
    static const char *const of_a_machine[] = {"--backward", "--link", "-J"};
    for (size_t i = 0; status == MUONSHARD_OK && i < 3 && !given; i++)
        if (command_option_value(&usage, args, of_a_machine[i]))
            status = message_fail(message, MUONSHARD_ERR_ARGUMENT, "%s goes with --machine",
                                  of_a_machine[i]);
    return status;
}

/* ---- tables ---- */

static double mib(double bytes) {
    return bytes / (1024.0 * 1024.0);
}

static muonshard_status print_model(const planner *p, char *message) {
    const size_t views = p->whole.view_count;
    double sum = 0.0, parameters = 0.0;
    char ownership[32] = "";
    error_text error;
    double *cost = calloc(2 * views + 1, sizeof *cost);
    if (!cost)
        return message_fail(message, MUONSHARD_ERR_MEMORY, "out of memory");
    const muonshard_status status =
        ownership_price(&p->whole, p->settings, p->on_gpu, cost, cost + views, &error);
    for (size_t i = 0; status == MUONSHARD_OK && i < views; i++)
        sum += cost[views + i];
    free(cost);
    if (status != MUONSHARD_OK)
        return message_fail(message, status, "%s", error.text);
    for (size_t i = 0; i < p->whole.tensor_count; i++)
        parameters += (double)p->whole.tensors[i].elements;
    muonshard_config_get(p->config, "ownership", ownership, sizeof ownership, NULL);
    printf("# %s: %zu tensors, %.3f M parameters, %zu matrices, Newton-Schulz %.3f GFLOP a step, "
           "ownership %s\n",
           p->model.name, p->whole.tensor_count, parameters * 1e-6, views, sum * 1e-9, ownership);
    if (planner_unit(p) > 1)
        printf("# layers over %lld stages, experts over %lld ranks: %lld groups of optimizers\n",
               (long long)p->model.pipeline_parallel, (long long)p->model.expert_parallel,
               (long long)(p->model.pipeline_parallel *
                           (p->model.expert_parallel > 1 ? p->model.expert_parallel + 1 : 1)));
    return MUONSHARD_OK;
}

static void print_plans(const plans *all) {
    printf("#\n# %6s %6s %7s %9s %9s %9s %9s %9s %9s %9s\n", "ranks", "waves", "batches",
           "imbalance", "reduce", "gather", "packed", "padded", "state", "workspace");
    printf("# %6s %6s %7s %9s %9s %9s %9s %9s %9s %9s\n", "", "", "", "max/mean", "(MiB)", "(MiB)",
           "(MiB)", "(MiB)", "(MiB)", "(MiB)");
    for (size_t i = 0; i < all->count; i++) {
        const rank_plan *r = &all->plans[i];
        size_t waves = 0, batches = 0;
        double reduced = 0.0, gathered = 0.0, packed = 0.0, padded = 0.0, most = 0.0, cost = 0.0;
        for (int part = 0; part < MODEL_PARTS; part++) {
            const plan *q = &r->groups[part].plan;
            waves += q->wave_count;
            batches += q->batch_count;
            reduced += (double)q->bytes_reduced;
            gathered += (double)q->bytes_gathered;
            packed += (double)q->bytes_packed;
            padded += (double)q->bytes_padded;
            most += q->cost * q->imbalance;
            cost += q->cost;
        }
        printf("  %6d %6zu %7zu %9.3f %9.2f %9.2f %9.2f %9.2f %9.2f %9.2f\n", r->ranks, waves,
               batches, cost > 0.0 ? most / cost : 1.0, mib(reduced), mib(gathered), mib(packed),
               mib(padded), mib(r->memory.state), mib(r->memory.workspace));
    }
}

static void print_memory(const plans *all) {
    const machine *m = &all->planner.machine;
    const bool limited = m->config && !isnan(m->memory);
    printf("#\n# memory a rank on %s; staging: of the host, once a checkpoint is saved\n"
           "# %6s %12s %12s %12s %12s %12s %12s %12s\n",
           all->planner.on_gpu ? "cuda" : "the host", "ranks", "parameters", "gradients", "state",
           "workspace", "pinned", "staging", "total");
    printf("# %6s %12s %12s %12s %12s %12s %12s %12s\n", "", "(MiB)", "(MiB)", "(MiB)", "(MiB)",
           "(MiB)", "(MiB)", "(MiB)");
    for (size_t i = 0; i < all->count; i++) {
        const plan_memory *b = &all->plans[i].memory;
        const double total = plan_memory_total(b);
        printf("  %6d %12.2f %12.2f %12.2f %12.2f %12.2f %12.2f %12.2f%s\n", all->plans[i].ranks,
               mib(b->parameters), mib(b->gradients), mib(b->state), mib(b->workspace),
               mib(b->pinned), mib(b->staging), mib(total),
               limited && total > 1e9 * m->memory ? "  does not fit" : "");
    }
}

static void print_policies(const plans *all) {
    printf("#\n# imbalance (max/mean cost) by ownership\n# %6s %9s %11s %9s %9s\n", "ranks",
           "matrices", "round_robin", "balanced", "at least");
    printf("# %6s %9s %11s %9s %9s\n", "", "a rank", "", "", "");
    for (size_t i = 0; i < all->count; i++) {
        const rank_plan *r = &all->plans[i];
        double matrices = 0.0;
        for (int part = 0; part < MODEL_PARTS; part++)
            if (r->groups[part].there)
                matrices += (double)all->planner.parts[part].view_count /
                            (double)r->groups[part].plan.world_size;
        printf("  %6d %9.2f %11.3f %9.3f %9.3f\n", r->ranks, matrices, r->imbalance.turns,
               r->imbalance.balanced, r->imbalance.bound);
    }
}

static void print_links(const plans *all) {
    const machine *m = &all->planner.machine;
    printf("#\n# bytes a rank sends over each link (MiB a step)\n# %6s", "ranks");
    for (size_t k = 0; k < m->link_count; k++)
        printf(" %12s", m->links[k].name);
    printf("\n");
    for (size_t i = 0; i < all->count; i++) {
        printf("  %6d", all->plans[i].ranks);
        for (size_t k = 0; k < m->link_count; k++) {
            double bytes = 0.0;
            for (int part = 0; part < MODEL_PARTS; part++)
                bytes += all->plans[i].groups[part].sim.bytes[k];
            printf(" %12.2f", mib(bytes));
        }
        printf("\n");
    }
}

/* ---- what a step takes ---- */

/* Of both groups, which step one after the other. */
typedef struct whole_step {
    sim_phases phases;
    double rs_bandwidth, ag_bandwidth, ns_rate, exposed, matrices, imbalance;
} whole_step;

static whole_step whole_of(const rank_plan *r) {
    whole_step w = {.exposed = 0.0};
    double *sum = (double *)(void *)&w.phases;
    double rs = 0.0, ag = 0.0, rs_busy = 0.0, ag_busy = 0.0, flops = 0.0, most = 0.0, cost = 0.0;
    for (int part = 0; part < MODEL_PARTS; part++) {
        const group_plan *g = &r->groups[part];
        if (!g->there)
            continue;
        const double *own = (const double *)(const void *)&g->sim.phases;
        for (size_t i = 0; i < sizeof w.phases / sizeof *sum; i++)
            sum[i] += own[i];
        rs += g->sim.rs_bytes;
        ag += g->sim.ag_bytes;
        rs_busy += g->sim.rs_busy;
        ag_busy += g->sim.ag_busy;
        flops += g->sim.ns_flops;
        w.matrices += g->sim.matrices;
        most += g->plan.cost * g->plan.imbalance;
        cost += g->plan.cost;
    }
    w.rs_bandwidth = rs / rs_busy;
    w.ag_bandwidth = ag / ag_busy;
    w.ns_rate = w.phases.orthogonalize > 0.0 ? flops / w.phases.orthogonalize : NAN;
    w.exposed = (w.phases.reduce_scatter + w.phases.all_gather) / r->step;
    w.imbalance = cost > 0.0 ? most / cost : 1.0;
    return w;
}

static void print_steps(const plans *all) {
    const planner *p = &all->planner;
    const double first = all->plans[0].step * all->plans[0].ranks;
    double elements = 0.0, bytes = 0.0;
    for (size_t i = 0; i < p->whole.tensor_count; i++) {
        elements += (double)p->whole.tensors[i].elements;
        bytes +=
            (double)p->whole.tensors[i].elements * (double)dtype_size(p->whole.tensors[i].dtype);
    }
    printf("#\n# simulated on %s (%s%s%s)\n", p->machine.name,
           p->machine.measured ? "measured" : "from datasheets", *p->machine.source ? ": " : "",
           p->machine.source);
    printf("# %6s %8s %14s  %-5s %10s %9s %9s %9s %9s %9s %9s %9s %9s %9s %9s %8s %9s %10s\n",
           "ranks", "matrices", "bytes", "type", "step", "pack", "rs", "momentum", "ns", "adamw",
           "ag", "apply", "rs_busbw", "ag_busbw", "ns", "exposed", "imbalance", "efficiency");
    printf("# %6s %8s %14s  %-5s %10s %9s %9s %9s %9s %9s %9s %9s %9s %9s %9s %8s\n", "", "", "(B)",
           "", "(us)", "(us)", "(us)", "(us)", "(us)", "(us)", "(us)", "(us)", "(GB/s)", "(GB/s)",
           "(TFLOP/s)", "(%)");
    const char *type = bytes == 4.0 * elements   ? "fp32"
                       : bytes == 2.0 * elements ? "16bit"
                                                 : "mixed";
    for (size_t i = 0; i < all->count; i++) {
        const rank_plan *r = &all->plans[i];
        const whole_step w = whole_of(r);
        const sim_phases *s = &w.phases;
        printf(
            "  %6d %8zu %14.0f  %-5s %10.1f %9.1f %9.1f %9.1f %9.1f %9.1f %9.1f %9.1f %9.2f %9.2f "
            "%9.2f %8.1f %9.2f %10.3f\n",
            r->ranks, p->whole.view_count, bytes, type, 1e6 * r->step, 1e6 * s->pack,
            1e6 * s->reduce_scatter, 1e6 * s->momentum, 1e6 * s->orthogonalize,
            1e6 * s->elementwise, 1e6 * s->all_gather, 1e6 * s->apply,
            r->ranks > 1 ? 1e-9 * w.rs_bandwidth : 0.0, r->ranks > 1 ? 1e-9 * w.ag_bandwidth : 0.0,
            1e-12 * w.ns_rate, 100.0 * w.exposed, w.imbalance, first / (r->step * r->ranks));
    }
}

/* ---- owners and schedule ---- */

/* The ranks that own a tensor's matrices, in their order; or whose shards hold it. */
static void print_owners(const registry *r, const plan *q) {
    const size_t shown = 16;
    printf("# owners\n");
    for (size_t i = 0; i < r->tensor_count; i++) {
        const tensor *t = &r->tensors[i];
        if (t->role == MUONSHARD_ROLE_ELEMENTWISE) {
            const size_t last = q->flat_offset[i] + t->elements - 1;
            printf("  %-24s element-wise, shards of ranks %zu to %zu\n", t->name,
                   q->flat_offset[i] / q->flat_shard, last / q->flat_shard);
        } else if (t->role == MUONSHARD_ROLE_MATRIX) {
            printf("  %-24s %zu matrices, ranks", t->name, t->view_count);
            for (size_t v = 0; v < t->view_count && v < shown; v++)
                printf(" %d", q->view_owner[t->first_view + v]);
            printf(t->view_count > shown ? " ...\n" : "\n");
        }
    }
}

static void print_schedule(const group_plan *g, bool timed) {
    const plan *q = &g->plan;
    const schedule *s = &g->schedule;
    printf("# schedule for %d ranks\n#   op  %-24s %-8s waits_on%s  what\n", q->world_size,
           "operation", "stream", timed ? "   from (us)     to (us)" : "");
    for (size_t i = 0; i < s->count; i++) {
        const op *o = &s->ops[i];
        char label[64], waits[16] = "-";
        op_label(o, label, sizeof label);
        if (o->waits_on != OP_NONE)
            snprintf(waits, sizeof waits, "%d", o->waits_on);
        printf("  %4zu  %-24s %-8s %8s", i, label, o->stream == STREAM_COMM ? "comm" : "compute",
               waits);
        if (timed)
            printf(" %11.1f %11.1f", 1e6 * g->sim.spans[i].begin, 1e6 * g->sim.spans[i].end);
        if (o->index != OP_NONE && o->kind < OP_AGREE) {
            const bucket *b = &q->buckets[o->index];
            printf("  %zu wave%s%s", b->count, b->count == 1 ? "" : "s",
                   b->packed ? ", packed" : "");
        } else if (o->index != OP_NONE) {
            const batch *b = &q->batches[o->index];
            if (b->kind == PLAN_FLAT)
                printf("  flat, %lld elements a rank", (long long)b->n);
            else
                printf("  %zu wave%s of %s %lld x %lld", b->count, b->count == 1 ? "" : "s",
                       dtype_name(b->dtype), (long long)b->m, (long long)b->n);
        }
        printf("\n");
    }
}

/* ---- JSON, as of bench step ---- */

static json_t *timeline_of(const group_plan *g, double after, json_t *timeline) {
    for (size_t i = 0; g->there && i < g->schedule.count; i++) {
        char label[64];
        const op *o = &g->schedule.ops[i];
        op_label(o, label, sizeof label);
        json_array_append_new(timeline, json_pack("{s:s, s:s, s:f, s:f}", "op", label, "stream",
                                                  o->stream == STREAM_COMM ? "comm" : "compute",
                                                  "start_us", 1e6 * (after + g->sim.spans[i].begin),
                                                  "end_us", 1e6 * (after + g->sim.spans[i].end)));
    }
    return timeline;
}

static json_t *row_of(const planner *p, const rank_plan *r) {
    const whole_step w = whole_of(r);
    const sim_phases *s = &w.phases;
    const bench_time step = {r->step, r->step, r->step};
    double bytes = 0.0;
    for (size_t i = 0; i < p->whole.tensor_count; i++)
        bytes +=
            (double)p->whole.tensors[i].elements * (double)dtype_size(p->whole.tensors[i].dtype);
    json_t *phases =
        json_pack("{s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:f}", "pack", 1e6 * s->pack,
                  "reduce-scatter", 1e6 * s->reduce_scatter, "agree", 1e6 * s->agree, "momentum",
                  1e6 * s->momentum, "orthogonalize", 1e6 * s->orthogonalize, "element-wise",
                  1e6 * s->elementwise, "all-gather", 1e6 * s->all_gather, "apply", 1e6 * s->apply);
    json_t *timeline = timeline_of(&r->groups[MODEL_SHARED], 0.0, json_array());
    timeline_of(&r->groups[MODEL_EXPERTS], r->groups[MODEL_SHARED].sim.step, timeline);
    return json_pack(
        "{s:s, s:i, s:s, s:s, s:I, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:n, s:o, s:n, s:{s:f, s:f, "
        "s:f, s:f}, s:o}",
        "model", p->model.name, "ranks", r->ranks, "scaling", "strong", "dtype",
        dtype_name(p->whole.tensors[0].dtype), "matrices", (json_int_t)p->whole.view_count, "bytes",
        bench_number(bytes), "step_us", bench_time_json(step), "phases_us", phases, "ns_gflops",
        bench_number(1e-9 * w.ns_rate), "rs_busbw_gbs",
        bench_number(r->ranks > 1 ? 1e-9 * w.rs_bandwidth : NAN), "ag_busbw_gbs",
        bench_number(r->ranks > 1 ? 1e-9 * w.ag_bandwidth : NAN), "exposed",
        bench_number(w.exposed), "link_busy_us", "imbalance", bench_number(w.imbalance), "wrong",
        "memory", "state", r->memory.state, "workspace", r->memory.workspace, "pinned",
        r->memory.pinned, "staging", r->memory.staging, "timeline", timeline);
}

static muonshard_status write_json(const plans *all, const char *path, char *message) {
    const machine *m = &all->planner.machine;
    char date[32], version[32];
    bench_stamp(date, version);
    json_t *rows = json_array();
    for (size_t i = 0; i < all->count; i++)
        json_array_append_new(rows, row_of(&all->planner, &all->plans[i]));
    json_t *root = json_pack(
        "{s:i, s:s, s:s, s:s, s:s, s:b, s:s, s:{s:s, s:s, s:s, s:s, s:i}, s:i, s:i, s:i, s:i, s:s, "
        "s:o}",
        "schema", BENCH_SCHEMA, "kind", "step", "version", version, "date", date, "command",
        "muonshard plan", "measured", 0, "origin", m->measured ? "measured" : "datasheet",
        "machine", "host", m->name, "cpu", m->source, "kernels", "simulated", "blas", "", "cores",
        0, "ranks", all->plans[all->count - 1].ranks, "threads", 1, "iterations", 1, "warmup", 0,
        "tensors", all->planner.model.tensor_lines, "rows", rows);
    if (!root)
        return message_fail(message, MUONSHARD_ERR_MEMORY, "out of memory");
    const int failed = json_dump_file(root, path, JSON_INDENT(1) | JSON_REAL_PRECISION(9));
    json_decref(root);
    return failed ? message_fail(message, MUONSHARD_ERR_IO, "%s: %s", path, strerror(errno))
                  : MUONSHARD_OK;
}

/* ---- the command ---- */

static muonshard_status make_plans(plans *all, char *message) {
    muonshard_status status = MUONSHARD_OK;
    for (size_t i = 0; i < all->count && status == MUONSHARD_OK; i++)
        status = planner_plan(&all->planner, all->ranks[i], &all->plans[i], message);
    return status;
}

static muonshard_status print_all(const plans *all, bool with_schedule, char *message) {
    const planner *p = &all->planner;
    muonshard_status status = print_model(p, message);
    if (status)
        return status;
    print_plans(all);
    print_memory(all);
    print_policies(all);
    if (p->machine.config) {
        print_links(all);
        print_steps(all);
    }
    status = planner_advise(p, all->plans, all->count, message);
    for (size_t i = 0; i < all->count && with_schedule && status == MUONSHARD_OK; i++)
        for (int part = 0; part < MODEL_PARTS; part++)
            if (all->plans[i].groups[part].there) {
                print_owners(&p->parts[part], &all->plans[i].groups[part].plan);
                print_schedule(&all->plans[i].groups[part], p->machine.config != NULL);
            }
    return status;
}

int command_plan(int argc, char **argv) {
    if (command_wants_help(argc, argv))
        return command_help(&usage, argc, argv, model_file_table, model_file_table_count);
    static plans all; /* too large for the stack */
    command_args args = {0};
    char message[COMMAND_MESSAGE] = "";
    muonshard_status status = command_parse(&usage, argc, argv, &args, message);
    if (status == MUONSHARD_OK)
        status = read_options(&all, &args, message);
    if (status == MUONSHARD_OK)
        status = planner_open(&all.planner, args.positional[0],
                              command_option_value(&usage, &args, "--machine"), &args, message);
    if (status == MUONSHARD_OK)
        status = make_plans(&all, message);
    if (status == MUONSHARD_OK)
        status =
            print_all(&all, command_option_given(&usage, &args, "--schedule").count > 0, message);
    const char *json = command_option_value(&usage, &args, "-J");
    if (status == MUONSHARD_OK && json)
        status = write_json(&all, json, message);
    if (status != MUONSHARD_OK)
        fprintf(stderr, "muonshard plan: %s\n", message);
    for (size_t i = 0; i < all.count; i++)
        planner_free(&all.plans[i]);
    planner_close(&all.planner);
    command_args_free(&args);
    return muonshard_mpi_exit_code(status);
}
