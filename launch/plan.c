/* plan.c - `muonshard plan MODEL --ranks 8,64 [--schedule]`: who owns what, what travels, what it
 * costs in memory, and the schedule itself, without weights and without the ranks. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "command.h"
#include "config.h"
#include "message.h"
#include "model_file.h"
#include "muonshard_mpi.h"
#include "optim/newton_schulz.h"
#include "optim/ownership.h"
#include "optim/schedule.h"

static const command_option options[] = {
    {"--ranks", COMMAND_VALUE, false, "N[,N...]", "world sizes to plan for (default 1)"},
    {"--machine", COMMAND_VALUE, false, "FILE",
     "links and rates to predict times from; not in this version"},
    {"--schedule", COMMAND_FLAG, false, NULL, "print owners and the array of operations"},
};

static const command_usage usage = {
    .name = "plan",
    .synopsis = "MODEL [--ranks N[,N...]] [--schedule] [key=value...]",
    .doc = "Prints bytes, memory a rank and imbalance for a model file, at each world size.",
    .positional_min = 1,
    .positional_max = 1,
    .overrides = true,
    .options = options,
    .option_count = sizeof options / sizeof options[0],
};

#define MAX_RANKS 16384

typedef struct planner {
    muonshard_config *config;
    const settings *settings;
    model_file model;
    registry registry;
    backend *host; /* own */
    int ranks[64];
    int rank_count;
} planner;

static muonshard_status read_ranks(planner *p, const char *text, char *message) {
    while (*text) {
        char *end;
        errno = 0;
        const long n = strtol(text, &end, 10);
        if (end == text || errno || n < 1 || n > MAX_RANKS || (*end && *end != ',') ||
            p->rank_count == (int)(sizeof p->ranks / sizeof p->ranks[0]))
            return message_fail(message, MUONSHARD_ERR_ARGUMENT,
                                "--ranks is '%s'; wanted are at most 64 numbers from 1 to %d, "
                                "separated by commas",
                                text, MAX_RANKS);
        p->ranks[p->rank_count++] = (int)n;
        text = *end ? end + 1 : end;
    }
    return MUONSHARD_OK;
}

static muonshard_status load(planner *p, const char *path, const command_args *args,
                             char *message) {
    muonshard_status status = muonshard_config_create(&p->config);
    if (status == MUONSHARD_OK)
        status = muonshard_config_add_table(p->config, model_file_table, model_file_table_count,
                                            &p->model);
    if (status == MUONSHARD_OK)
        status = muonshard_config_load_file(p->config, path);
    for (size_t i = 0; status == MUONSHARD_OK && i < args->override_count; i++) {
        char key[256];
        const char *equals = strchr(args->overrides[i], '=');
        snprintf(key, sizeof key, "%.*s", (int)(equals - args->overrides[i]), args->overrides[i]);
        status = muonshard_config_set(p->config, key, equals + 1);
    }
    if (status != MUONSHARD_OK)
        return message_fail(message, status, "%s", muonshard_config_last_error(p->config));
    p->settings = config_settings(p->config);
    error_text error;
    status =
        backend_open_host((host_options){.isa = host_isa_detect(), .threads = 1}, &p->host, &error);
    if (status != MUONSHARD_OK)
        return message_fail(message, status, "%s", error.text);
    status = model_file_parse(&p->model, path, message);
    if (status != MUONSHARD_OK)
        return status;
    p->registry.weightless = true;
    for (size_t i = 0; i < p->model.tensor_count; i++) {
        status = registry_add(&p->registry, p->settings, &p->model.tensors[i], NULL, &error);
        if (status != MUONSHARD_OK)
            return message_fail(message, status, "%s: %s", path, error.text);
    }
    return MUONSHARD_OK;
}

static double mib(size_t bytes) {
    return (double)bytes / (1024.0 * 1024.0);
}

static muonshard_status print_model(const planner *p, char *message) {
    const size_t views = p->registry.view_count;
    double sum = 0.0, parameters = 0.0;
    char ownership[32] = "";
    error_text error;
    double *cost = calloc(2 * views + 1, sizeof *cost);
    if (!cost)
        return message_fail(message, MUONSHARD_ERR_MEMORY, "out of memory");
    const muonshard_status status =
        ownership_price(&p->registry, p->settings, cost, cost + views, &error);
    for (size_t i = 0; status == MUONSHARD_OK && i < views; i++)
        sum += cost[views + i];
    free(cost);
    if (status != MUONSHARD_OK)
        return message_fail(message, status, "%s", error.text);
    for (size_t i = 0; i < p->registry.tensor_count; i++)
        parameters += (double)p->registry.tensors[i].elements;
    muonshard_config_get(p->config, "ownership", ownership, sizeof ownership, NULL);
    printf("# %s: %zu tensors, %.3f M parameters, %zu matrices, Newton-Schulz %.3f GFLOP a step, "
           "ownership %s\n",
           p->model.name, p->registry.tensor_count, parameters * 1e-6, views, sum * 1e-9,
           ownership);
    return MUONSHARD_OK;
}

static void print_header(void) {
    printf("#\n# %6s %6s %7s %9s %9s %9s %9s %9s %9s %9s\n", "ranks", "waves", "batches",
           "imbalance", "reduce", "gather", "packed", "padded", "state", "workspace");
    printf("# %6s %6s %7s %9s %9s %9s %9s %9s %9s %9s\n", "", "", "", "max/mean", "(MiB)", "(MiB)",
           "(MiB)", "(MiB)", "(MiB)", "(MiB)");
}

/* Of the largest batch, on the host. */
static muonshard_status newton_schulz_bytes(const planner *p, const plan *q, size_t *bytes,
                                            error_text *error) {
    *bytes = 0;
    for (size_t i = 0; i < q->batch_count; i++) {
        const batch *b = &q->batches[i];
        ns_program program;
        if (b->kind == PLAN_FLAT)
            continue;
        TRY(newton_schulz_compile(p->settings, b->dtype, b->m, b->n, &program, error));
        const size_t needed =
            p->host->ops->orthogonalize_workspace(p->host, &program, b->m, b->n, 1);
        *bytes = needed > *bytes ? needed : *bytes;
    }
    return MUONSHARD_OK;
}

/* What commit allocates beside the state; tables of a word a tensor are left out. */
static size_t arena_bytes(const plan *q) {
    const size_t scratch = q->world_size > 1 ? q->scratch_bytes : 0;
    const size_t exchange = scratch > q->gather_bytes ? scratch : q->gather_bytes;
    size_t bytes = (q->owned_elements + q->variance_elements) * sizeof(float) + q->pack_bytes +
                   exchange + q->largest_unpacked_bytes;
    if (!q->flat_master)
        bytes += q->flat_shard * sizeof(float);
    for (size_t i = 0; i < q->wave_count; i++)
        if (q->waves[i].kind == PLAN_FLAT && q->waves[i].sent != MUONSHARD_FP32)
            bytes += q->flat_shard * dtype_size(q->waves[i].sent);
    return bytes;
}

static muonshard_status print_row(const planner *p, const plan *q, error_text *error) {
    size_t newton_schulz;
    TRY(newton_schulz_bytes(p, q, &newton_schulz, error));
    printf("  %6d %6zu %7zu %9.3f %9.2f %9.2f %9.2f %9.2f %9.2f %9.2f\n", q->world_size,
           q->wave_count, q->batch_count, q->imbalance, mib(q->bytes_reduced),
           mib(q->bytes_gathered), mib(q->bytes_packed), mib(q->bytes_padded), mib(q->bytes_state),
           mib(arena_bytes(q) + newton_schulz));
    return MUONSHARD_OK;
}

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

static void print_schedule(const plan *q, const schedule *s) {
    printf("# schedule for %d ranks\n#   op  %-24s %-8s waits_on  what\n", q->world_size,
           "operation", "stream");
    for (size_t i = 0; i < s->count; i++) {
        const op *o = &s->ops[i];
        char label[64], waits[16] = "-";
        op_label(o, label, sizeof label);
        if (o->waits_on != OP_NONE)
            snprintf(waits, sizeof waits, "%d", o->waits_on);
        printf("  %4zu  %-24s %-8s %8s", i, label, o->stream == STREAM_COMM ? "comm" : "compute",
               waits);
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

static muonshard_status print_plans(const planner *p, bool with_schedule, char *message) {
    muonshard_status status = print_model(p, message);
    if (status == MUONSHARD_OK)
        print_header();
    for (int i = 0; i < p->rank_count && status == MUONSHARD_OK; i++) {
        plan q;
        schedule s = {0};
        error_text error;
        status = plan_make(&q, &p->registry, p->settings, p->ranks[i], &error);
        if (status == MUONSHARD_OK)
            status = schedule_make(&s, &q, p->settings, &error);
        if (status == MUONSHARD_OK)
            status = print_row(p, &q, &error);
        if (status != MUONSHARD_OK)
            message_fail(message, status, "%s", error.text);
        if (status == MUONSHARD_OK && with_schedule) {
            print_owners(&p->registry, &q);
            print_schedule(&q, &s);
        }
        schedule_free(&s);
        plan_free(&q);
    }
    return status;
}

int command_plan(int argc, char **argv) {
    if (command_wants_help(argc, argv))
        return command_help(&usage, argc, argv, model_file_table, model_file_table_count);
    planner p = {0};
    command_args args = {0};
    char message[COMMAND_MESSAGE] = "";
    muonshard_status status = command_parse(&usage, argc, argv, &args, message);
    if (status == MUONSHARD_OK) {
        const char *ranks = command_option_value(&usage, &args, "--ranks");
        status = read_ranks(&p, ranks ? ranks : "1", message);
    }
    if (status == MUONSHARD_OK && command_option_given(&usage, &args, "--machine").count)
        status = message_fail(message, MUONSHARD_ERR_UNSUPPORTED,
                              "--machine: this version predicts no times; without it, plan shows "
                              "owners, bytes, memory and the schedule");
    if (status == MUONSHARD_OK)
        status = load(&p, args.positional[0], &args, message);
    if (status == MUONSHARD_OK)
        status =
            print_plans(&p, command_option_given(&usage, &args, "--schedule").count > 0, message);
    if (status != MUONSHARD_OK)
        fprintf(stderr, "muonshard plan: %s\n", message);
    if (p.host)
        backend_close(p.host);
    registry_free(&p.registry);
    model_file_free(&p.model);
    muonshard_config_destroy(p.config);
    command_args_free(&args);
    return muonshard_mpi_exit_code(status);
}
