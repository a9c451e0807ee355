/* bench_step.c - whole optimizer steps over the tensors of a model file, with a backward pass that
 * only takes its time, and over a link if one is given. */
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

#include "bench_link.h"
#include "bench_step.h"

typedef struct step_case {
    bench *b;
    muonshard_comm *comm;           /* the command's, or a link over it, which is own */
    muonshard_optimizer *optimizer; /* own */
    void **params, **grads;         /* own, [tensor_count] */
    double backward;                /* seconds */
    double elements;                /* of all tensors */
    double bytes;                   /* of all parameters */
    const char *dtype;              /* theirs, or "mixed" */
    int64_t layers;                 /* the model has, where only a part of them is measured */
    char trace[64];                 /* a file of our own */
    bench_device_ceilings ceilings;
    char device[sizeof((backend *)0)->device_text]; /* what took the steps, or nothing */
    double *inside; /* own, [iterations]: seconds that muonshard_step took */
    int calls;      /* of it so far, while steps are timed */
} step_case;

static muonshard_status failed(const step_case *c, muonshard_status status, const char *text) {
    return status ? message_fail(c->b->message, status, "%s", text) : MUONSHARD_OK;
}

/* ---- tensors ---- */

static muonshard_status failed_backend(const step_case *c, muonshard_status status) {
    return failed(c, status, c->optimizer->backend->error.text);
}

/* Nearly normal, of deviation 1e-3, the same on all ranks, whose mean it therefore is. */
static muonshard_status fill_gradient(const step_case *c, void *grad, muonshard_dtype dtype,
                                      size_t count, uint64_t seed) {
    enum { BLOCK = 1 << 20 };
    backend *memory = c->optimizer->backend;
    float *block = malloc(2 * BLOCK * sizeof *block);
    muonshard_status status =
        block ? MUONSHARD_OK : message_fail(c->b->message, MUONSHARD_ERR_MEMORY, "out of memory");
    uint64_t state = seed * 2654435761U + 1;
    for (size_t done = 0; done < count && status == MUONSHARD_OK;) {
        const size_t n = count - done < BLOCK ? count - done : BLOCK;
        bench_normal(block, n, &state);
        for (size_t i = 0; i < n; i++)
            block[i] *= 1e-3F;
        dtype_store(block + BLOCK, dtype, block, n);
        const copy_item item = {(char *)grad + done * dtype_size(dtype), block + BLOCK,
                                n * dtype_size(dtype)};
        status = failed_backend(c, memory->ops->copy(memory, &item, 1, STREAM_COMPUTE));
        done += n;
    }
    free(block);
    return status;
}

static muonshard_dtype gradient_dtype(const muonshard_tensor_desc *d) {
    return d->grad_dtype == MUONSHARD_DTYPE_OF_PARAM ? d->dtype : d->grad_dtype;
}

static muonshard_status add_tensors(step_case *c) {
    const model_file *model = c->b->model;
    for (size_t i = 0; i < model->tensor_count; i++) {
        muonshard_tensor_desc d = model->tensors[i];
        size_t count = 1;
        for (int k = 0; k < d.dims; k++)
            count *= (size_t)d.shape[k];
        c->elements += (double)count;
        c->bytes += (double)(count * dtype_size(d.dtype));
        c->dtype =
            !c->dtype || strcmp(c->dtype, dtype_name(d.dtype)) == 0 ? dtype_name(d.dtype) : "mixed";
        /* Zeros, so that the first step leaves minus the update in their place. */
        backend *memory = c->optimizer->backend;
        muonshard_status status =
            memory->ops->alloc(memory, &c->params[i], count * dtype_size(d.dtype));
        if (status == MUONSHARD_OK)
            status =
                memory->ops->alloc(memory, &c->grads[i], count * dtype_size(gradient_dtype(&d)));
        if (status)
            return message_fail(c->b->message, status, "tensor '%s' of %zu elements: %s", d.name,
                                count, memory->error.text);
        d.param = c->params[i];
        d.grad = c->grads[i];
        TRY(fill_gradient(c, c->grads[i], gradient_dtype(&d), count, i));
        status = muonshard_add_tensor(c->optimizer, &d, NULL);
        if (status)
            return failed(c, status, muonshard_last_error(c->optimizer));
    }
    return MUONSHARD_OK;
}

/* Before the optimizer, whose backend has the memory. */
static void close_optimizer(step_case *c) {
    for (size_t i = 0; c->optimizer && i < c->b->model->tensor_count; i++) {
        backend *memory = c->optimizer->backend;
        if (c->params[i])
            memory->ops->free(memory, c->params[i]);
        if (c->grads[i])
            memory->ops->free(memory, c->grads[i]);
        c->params[i] = c->grads[i] = NULL;
    }
    muonshard_destroy(c->optimizer);
    c->optimizer = NULL;
}

/* ---- a step ---- */

static void pass_time(double seconds) {
    const struct timespec pause = {(time_t)seconds,
                                   (long)((seconds - (double)(time_t)seconds) * 1e9)};
    nanosleep(&pause, NULL);
}

/* Entries become ready from the last tensor to the first, each after its share of the time. */
static muonshard_status run_backward(step_case *c) {
    const registry *r = &c->optimizer->registry;
    for (size_t i = r->tensor_count; i-- > 0;) {
        const tensor *t = &r->tensors[i];
        for (int64_t e = t->entries; e-- > 0;) {
            pass_time(c->backward * (double)t->elements / (double)t->entries / c->elements);
            TRY(muonshard_grad_ready(c->optimizer, (int)i, e, 1));
        }
    }
    return MUONSHARD_OK;
}

static muonshard_status run_step(void *user) {
    step_case *c = user;
    muonshard_status status = c->backward > 0.0 ? run_backward(c) : MUONSHARD_OK;
    muonshard_step_result_info result = MUONSHARD_STEP_RESULT_INIT;
    const double start = command_now_s();
    if (status == MUONSHARD_OK)
        status = muonshard_step(c->optimizer, NULL);
    if (c->calls < c->b->iterations)
        c->inside[c->calls++] = command_now_s() - start;
    if (status == MUONSHARD_OK) /* a device is waited for */
        status = muonshard_step_result(c->optimizer, 0, 1, &result);
    return failed(c, status, muonshard_last_error(c->optimizer));
}

/* ---- the first step against the oracle ---- */

/* Parameters were zeros and momentum too, so that now W = -s NS(G). */
static muonshard_status check_view(step_case *c, const view *v, ns_dtype dtype, double *wrong) {
    const registry *r = &c->optimizer->registry;
    const tensor *t = &r->tensors[v->tensor];
    const size_t count = view_elements(v);
    backend *memory = c->optimizer->backend;
    float *g = malloc(4 * count * sizeof *g);
    if (!g)
        return message_fail(c->b->message, MUONSHARD_ERR_MEMORY, "out of memory");
    const copy_item items[] = {
        {g + 2 * count, tensor_grad_at(t, v->offset), count * dtype_size(t->grad_dtype)},
        {g + 3 * count, tensor_param_at(t, v->offset), count * dtype_size(t->dtype)}};
    const muonshard_status copied = memory->ops->copy(memory, items, 2, STREAM_COMPUTE);
    if (copied) {
        free(g);
        return failed_backend(c, copied);
    }
    dtype_load(g, g + 2 * count, t->grad_dtype, count);
    dtype_load(g + count, g + 3 * count, t->dtype, count);
    for (size_t i = 0; i < count; i++)
        g[count + i] = -g[count + i];
    if (t->dtype != MUONSHARD_FP32) /* then it is the rounding of W that is seen */
        dtype = NS_BF16;
    const muonshard_status status =
        bench_compare(c->b, g, g + count, (size_t)v->rows, (size_t)v->cols, dtype, true, wrong);
    free(g);
    return status;
}

/* A matrix of each batch. */
static muonshard_status check_first_step(step_case *c, double *wrong) {
    const muonshard_optimizer *o = c->optimizer;
    *wrong = 0.0;
    for (size_t i = 0; i < o->plan.batch_count; i++) {
        const batch *b = &o->plan.batches[i];
        if (b->kind == PLAN_FLAT)
            continue;
        double of_this;
        TRY(check_view(c, &o->registry.views[o->plan.waves[b->first].first_view],
                       o->batches[i].program->dtype, &of_this));
        *wrong += of_this;
    }
    return MUONSHARD_OK;
}

/* ---- what ran when ---- */

typedef struct span {
    double start, end;
} span;

static int by_start(const void *left, const void *right) {
    const span *a = left, *b = right;
    return (a->start > b->start) - (a->start < b->start);
}

/* Seconds in which at least one operation of the timeline whose name begins so was under way. */
static double time_under_way(const json_t *timeline, const char *name) {
    span spans[1024] = {{0.0, 0.0}};
    size_t count = 0, i;
    json_t *row;
    json_array_foreach(timeline, i, row) {
        const char *label = json_string_value(json_object_get(row, "op"));
        if (label && strncmp(label, name, strlen(name)) == 0 && count < 1024)
            spans[count++] = (span){json_number_value(json_object_get(row, "start_us")),
                                    json_number_value(json_object_get(row, "end_us"))};
    }
    qsort(spans, count, sizeof *spans, by_start);
    double sum = 0.0, until = -INFINITY;
    for (i = 0; i < count; i++) {
        const double from = fmax(spans[i].start, until);
        sum += fmax(0.0, spans[i].end - from);
        until = fmax(until, spans[i].end);
    }
    return 1e-6 * sum;
}

/* The trace's operations of the last step: [{op, stream, start_us, end_us}]. */
static json_t *read_timeline(const char *path) {
    json_t *events = json_load_file(path, 0, NULL), *timeline = json_array(), *event;
    double last = 0.0, zero = NAN;
    size_t i;
    json_array_foreach(events, i, event) {
        json_t *args = json_object_get(event, "args");
        last = fmax(last, json_number_value(json_object_get(args, "step")));
    }
    for (int pass = 0; pass < 2; pass++) {
        json_array_foreach(events, i, event) {
            json_t *args = json_object_get(event, "args");
            if (json_number_value(json_object_get(args, "step")) < last ||
                !json_object_get(event, "ts"))
                continue;
            const double start = json_number_value(json_object_get(event, "ts"));
            const double length = json_number_value(json_object_get(event, "dur"));
            if (pass == 0)
                zero = isnan(zero) ? start : fmin(zero, start);
            else
                json_array_append_new(
                    timeline,
                    json_pack("{s:O, s:s, s:f, s:f}", "op", json_object_get(event, "name"),
                              "stream",
                              json_integer_value(json_object_get(event, "tid")) == STREAM_COMM
                                  ? "comm"
                                  : "compute",
                              "start_us", start - zero, "end_us", start - zero + length));
        }
    }
    json_decref(events);
    return timeline;
}

/* ---- a row ---- */

typedef struct phases {
    double pack, reduce_scatter, agree, momentum, orthogonalize, elementwise, all_gather, apply;
} phases;

static phases phases_of(const muonshard_stats_info *s) {
    return (phases){s->time_pack,       s->time_reduce_scatter, s->time_agree,
                    s->time_momentum,   s->time_orthogonalize,  s->time_elementwise,
                    s->time_all_gather, s->time_apply};
}

/* A step, of the rank where it took longest. */
static muonshard_status mean_phases(const step_case *c, const muonshard_stats_info *before,
                                    const muonshard_stats_info *after, phases *mean) {
    phases first = phases_of(before), last = phases_of(after);
    double *a = (double *)(void *)&first, *b = (double *)(void *)&last;
    const size_t count = sizeof first / sizeof *a;
    for (size_t i = 0; i < count; i++)
        b[i] = (b[i] - a[i]) / c->b->iterations;
    const muonshard_status status =
        muonshard_comm_allreduce(c->b->cmd->comm, b, count, MUONSHARD_REDUCE_MAX);
    *mean = last;
    return failed(c, status, muonshard_comm_last_error(c->b->cmd->comm));
}

static json_t *phases_json(const phases *p) {
    return json_pack("{s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:f}", "pack", 1e6 * p->pack,
                     "reduce-scatter", 1e6 * p->reduce_scatter, "agree", 1e6 * p->agree, "momentum",
                     1e6 * p->momentum, "orthogonalize", 1e6 * p->orthogonalize, "element-wise",
                     1e6 * p->elementwise, "all-gather", 1e6 * p->all_gather, "apply",
                     1e6 * p->apply);
}

/* {state, workspace, pinned} of the rank that has most. Collective. */
static muonshard_status most_memory(const step_case *c, const muonshard_stats_info *s,
                                    json_t **memory) {
    double most[] = {(double)s->bytes_state, (double)s->bytes_workspace, (double)s->bytes_pinned};
    muonshard_comm *comm = c->b->cmd->comm;
    TRY(failed(c, muonshard_comm_allreduce(comm, most, 3, MUONSHARD_REDUCE_MAX),
               muonshard_comm_last_error(comm)));
    *memory = json_pack("{s:I, s:I, s:I}", "state", (json_int_t)most[0], "workspace",
                        (json_int_t)most[1], "pinned", (json_int_t)most[2]);
    return MUONSHARD_OK;
}

/* What was measured of it. */
typedef struct step_times {
    bench_time step, host; /* muonshard_step and the wait for its outcome; the call alone */
    phases mean;
    double rates[OP_KIND_COUNT]; /* bench_pass_rates */
    double ns_flops, link_busy;  /* of a step */
} step_times;

static json_t *device_json(const step_case *c) {
    return *c->device ? json_pack("{s:s, s:o, s:o}", "name", c->device, "copy_gbs",
                                  bench_number(1e-9 * c->ceilings.copy_bytes), "gemm_bf16_gflops",
                                  bench_number(1e-9 * c->ceilings.dense_flops))
                      : json_null();
}

static muonshard_status add_row(const step_case *c, const step_times *t,
                                const muonshard_stats_info *s, double wrong) {
    const phases *p = &t->mean;
    const bench_time time = t->step;
    bench *b = c->b;
    const double ranks = b->cmd->size, share = (ranks - 1.0) / ranks;
    json_t *memory = NULL;
    TRY(most_memory(c, s, &memory));
    json_t *timeline = read_timeline(c->trace);
    char name[128];
    if (b->layers)
        snprintf(name, sizeof name, "%s, %lld of %lld layers", b->model->name, (long long)b->layers,
                 (long long)c->layers);
    else
        snprintf(name, sizeof name, "%s", b->model->name);
    const double rs_time = time_under_way(timeline, "reduce-scatter");
    const double ag_time = time_under_way(timeline, "all-gather");
    const double rs = rs_time > 0.0 ? (double)s->bytes_reduced * share / rs_time : 0.0;
    const double ag = ag_time > 0.0 ? (double)s->bytes_gathered * share / ag_time : 0.0;
    const double waited = p->reduce_scatter + p->all_gather;
    const double exposed = waited / time.median;
    const double ns_rate = p->orthogonalize > 0.0 ? t->ns_flops / p->orthogonalize : NAN;
    bench_print(
        b,
        "  %6d %8lld %12.0f  %-5s %10.1f %10.1f %9.1f %9.1f %9.1f %9.1f %9.1f %9.1f %9.1f %9.2f "
        "%9.2f %9.1f %8.1f %9.2f %7s\n",
        b->cmd->size, (long long)s->matrices, c->bytes, c->dtype, 1e6 * time.median,
        1e6 * t->host.median, 1e6 * p->pack, 1e6 * p->reduce_scatter, 1e6 * p->momentum,
        1e6 * p->orthogonalize, 1e6 * p->elementwise, 1e6 * p->all_gather, 1e6 * p->apply,
        1e-9 * rs, 1e-9 * ag, 1e-9 * ns_rate, 100.0 * exposed, s->imbalance,
        isnan(wrong)  ? "-"
        : wrong > 0.0 ? "WRONG"
                      : "0");
    const double link_busy = t->link_busy;
    if (link_busy > 0.0)
        bench_print(b,
                    "# the link is in use for %.1f us a step, of which %.1f us are waited for: "
                    "%.1f %%\n",
                    1e6 * link_busy, 1e6 * waited, 100.0 * waited / link_busy);
    bench_pass_print(b, t->rates, &c->ceilings);
    return bench_add_row(
        b,
        json_pack(
            "{s:s, s:i, s:s, s:s, s:o, s:I, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, "
            "s:o, s:o, s:o}",
            "model", name, "ranks", b->cmd->size, "scaling", b->weak ? "weak" : "strong", "dtype",
            c->dtype, "memory", memory, "matrices", (json_int_t)s->matrices, "bytes",
            bench_number(c->bytes), "step_us", bench_time_json(time), "host_us",
            bench_time_json(t->host), "phases_us", phases_json(p), "phases_gbs",
            bench_pass_json(t->rates), "device", device_json(c), "ns_gflops",
            bench_number(1e-9 * ns_rate), "rs_busbw_gbs", bench_number(1e-9 * rs), "ag_busbw_gbs",
            bench_number(1e-9 * ag), "exposed", bench_number(exposed), "link_busy_us",
            bench_number(link_busy > 0.0 ? 1e6 * link_busy : NAN), "imbalance",
            bench_number(s->imbalance), "wrong", bench_number(wrong), "timeline", timeline));
}

/* ---- the run ---- */

static muonshard_status measure(step_case *c, bool linked) {
    bench *b = c->b;
    muonshard_stats_info before = MUONSHARD_STATS_INIT, after = MUONSHARD_STATS_INIT;
    double wrong = NAN, before_ops[OP_KIND_COUNT];
    step_times t;
    c->calls = b->iterations; /* not timed */
    TRY(run_step(c));
    if (b->check && b->settings->variance == VARIANCE_NONE)
        TRY(check_first_step(c, &wrong));
    TRY(bench_sum(b, &wrong));
    const int warmup = b->warmup;
    b->warmup = 0;
    for (int i = 1; i < warmup; i++)
        TRY(run_step(c));
    muonshard_stats(c->optimizer, &before);
    memcpy(before_ops, c->optimizer->op_seconds, sizeof before_ops);
    c->calls = 0;
    const double busy = linked ? bench_link_busy(c->comm) : 0.0;
    TRY(bench_measure(b, run_step, c, &t.step));
    t.link_busy = linked ? (bench_link_busy(c->comm) - busy) / b->iterations : 0.0;
    b->warmup = warmup;
    TRY(bench_time_of(b, c->inside, (size_t)b->iterations, &t.host));
    muonshard_stats(c->optimizer, &after);
    TRY(mean_phases(c, &before, &after, &t.mean));
    TRY(bench_pass_rates(b, c->optimizer, before_ops, t.rates));
    t.ns_flops = (after.ns_flops - before.ns_flops) / b->iterations;
    close_optimizer(c); /* and the trace with it */
    return add_row(c, &t, &after, wrong);
}

static muonshard_status prepare(step_case *c) {
    bench *b = c->b;
    char message[COMMAND_MESSAGE] = "";
    if (b->shapes)
        TRY(bench_shapes_model(b));
    const muonshard_status status =
        model_file_parse(b->model, b->shapes ? "--shapes" : b->model_path, message);
    if (status)
        return message_fail(b->message, status, "%s", message);
    if (b->layers)
        TRY(model_file_layers(b->model, b->layers, &c->layers, b->message));
    if (b->model->expert_parallel > 1 || b->model->pipeline_parallel > 1)
        return message_fail(
            b->message, MUONSHARD_ERR_UNSUPPORTED,
            "%s: expert_parallel is %lld and pipeline_parallel %lld, but a bench is "
            "one data-parallel group; set expert_parallel=1 pipeline_parallel=1",
            b->shapes ? "--shapes" : b->model_path, (long long)b->model->expert_parallel,
            (long long)b->model->pipeline_parallel);
    if (b->weak)
        TRY(model_file_repeat(b->model, b->cmd->size, b->message));
    c->params = calloc(b->model->tensor_count + 1, sizeof *c->params);
    c->grads = calloc(b->model->tensor_count + 1, sizeof *c->grads);
    c->inside = calloc((size_t)b->iterations, sizeof *c->inside);
    return c->params && c->grads && c->inside
               ? MUONSHARD_OK
               : message_fail(b->message, MUONSHARD_ERR_MEMORY, "out of memory");
}

static muonshard_status create(step_case *c) {
    bench *b = c->b;
    muonshard_config *config = b->cmd->config;
    /* A name nobody else has, the same for all ranks but for the rank. */
    uint64_t key = 0;
    if (b->cmd->rank == 0 && getrandom(&key, sizeof key, 0) != (ssize_t)sizeof key)
        key = (uint64_t)getpid();
    muonshard_status status = muonshard_comm_broadcast(b->cmd->comm, &key, sizeof key, 0);
    if (status)
        return failed(c, status, muonshard_comm_last_error(b->cmd->comm));
    char pattern[sizeof c->trace];
    snprintf(pattern, sizeof pattern, "/tmp/muonshard-%016" PRIx64 "-%%r.json", key);
    snprintf(c->trace, sizeof c->trace, "/tmp/muonshard-%016" PRIx64 "-%d.json", key, b->cmd->rank);
    status = muonshard_config_set(config, "trace", pattern);
    if (status)
        return failed(c, status, muonshard_config_last_error(config));
    status = muonshard_create(c->comm, config, NULL, &c->optimizer);
    if (status)
        return failed(c, status, muonshard_comm_last_error(c->comm));
    const backend *memory = c->optimizer->backend;
    if (memory->streams)
        snprintf(c->device, sizeof c->device, "%s", memory->device_text);
    status = add_tensors(c);
    TRY(command_agree(b->cmd, status, b->message));
    status = muonshard_commit(c->optimizer, MUONSHARD_SYNC_CHECK);
    TRY(failed(c, status, muonshard_last_error(c->optimizer)));
    /* Now that its products can't get into the file of choices. */
    return bench_device_measure(b, c->optimizer, &c->ceilings);
}

muonshard_status bench_read_link(const char *text, double *bandwidth, double *latency,
                                 char *message) {
    *bandwidth = *latency = 0.0;
    if (!text)
        return MUONSHARD_OK;
    char *end;
    *bandwidth = 1e9 * strtod(text, &end);
    if (*end == ',')
        *latency = 1e-6 * strtod(end + 1, &end);
    return *end || !(*bandwidth > 0.0) || !(*latency >= 0.0) || isinf(*bandwidth + *latency)
               ? message_fail(message, MUONSHARD_ERR_ARGUMENT,
                              "--link is '%s', not GB/s and perhaps microseconds after a comma",
                              text)
               : MUONSHARD_OK;
}

muonshard_status bench_read_backward(const char *text, double *seconds, char *message) {
    char *end = NULL;
    *seconds = text ? 1e-3 * strtod(text, &end) : 0.0;
    return text && (*end || !(*seconds >= 0.0) || *seconds > 3600.0)
               ? message_fail(message, MUONSHARD_ERR_ARGUMENT,
                              "--backward is '%s', not milliseconds", text)
               : MUONSHARD_OK;
}

muonshard_status bench_step(bench *b, const char *backward, const char *link) {
    step_case c = {.b = b, .comm = b->cmd->comm};
    double bandwidth, latency;
    TRY(bench_read_link(link, &bandwidth, &latency, b->message));
    TRY(bench_read_backward(backward, &c.backward, b->message));
    bench_print(
        b,
        "#\n# %6s %8s %12s  %-5s %10s %10s %9s %9s %9s %9s %9s %9s %9s %9s %9s %9s %8s %9s %7s\n",
        "ranks", "matrices", "bytes", "type", "step", "host", "pack", "rs", "momentum", "ns",
        "adamw", "ag", "apply", "rs_busbw", "ag_busbw", "ns", "exposed", "imbalance", "#wrong");
    bench_print(b, "# %6s %8s %12s  %-5s %10s %10s %9s %9s %9s %9s %9s %9s %9s %9s %9s %9s %8s\n",
                "", "", "(B)", "", "(us)", "(us)", "(us)", "(us)", "(us)", "(us)", "(us)", "(us)",
                "(us)", "(GB/s)", "(GB/s)", "(GFLOP/s)", "(%)");
    muonshard_status status = prepare(&c);
    if (status == MUONSHARD_OK && link)
        status = failed(&c, bench_link_create(b->cmd->comm, bandwidth, latency, &c.comm),
                        "no link over the communicator");
    if (status == MUONSHARD_OK)
        status = create(&c);
    if (status == MUONSHARD_OK)
        status = measure(&c, link != NULL);
    close_optimizer(&c);
    unlink(c.trace);
    if (c.comm != b->cmd->comm)
        muonshard_comm_destroy(c.comm);
    free(c.params);
    free(c.grads);
    free(c.inside);
    return status;
}
