#include "planner.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "config.h"
#include "kernels/cuda_layout.h"
#include "message.h"
#include "optim/newton_schulz.h"
#include "optim/ownership.h"
#include "optim/state.h"

/* ---- model and machine ---- */

static muonshard_status load_model(planner *p, const command_args *args, char *message) {
    muonshard_status status = muonshard_config_create(&p->config);
    if (status == MUONSHARD_OK)
        status = muonshard_config_add_table(p->config, model_file_table, model_file_table_count,
                                            &p->model);
    if (status == MUONSHARD_OK)
        status = muonshard_config_load_file(p->config, p->path);
    for (size_t i = 0; status == MUONSHARD_OK && i < args->override_count; i++) {
        char key[256];
        const char *equals = strchr(args->overrides[i], '=');
        snprintf(key, sizeof key, "%.*s", (int)(equals - args->overrides[i]), args->overrides[i]);
        status = muonshard_config_set(p->config, key, equals + 1);
    }
    if (status != MUONSHARD_OK)
        return message_fail(message, status, "%s", muonshard_config_last_error(p->config));
    p->settings = config_settings(p->config);
    return model_file_parse(&p->model, p->path, message);
}

static muonshard_status add(const planner *p, registry *r, const muonshard_tensor_desc *desc,
                            char *message) {
    error_text error;
    r->weightless = true;
    const muonshard_status status = registry_add(r, p->settings, desc, NULL, &error);
    return status ? message_fail(message, status, "%s: %s", p->path, error.text) : MUONSHARD_OK;
}

static muonshard_status register_tensors(planner *p, char *message) {
    for (size_t i = 0; i < p->model.tensor_count; i++) {
        muonshard_status status = add(p, &p->whole, &p->model.tensors[i], message);
        for (int part = 0; part < MODEL_PARTS && status == MUONSHARD_OK; part++) {
            muonshard_tensor_desc desc;
            if (model_file_tensor(&p->model, i, (model_part)part, &desc))
                status = add(p, &p->parts[part], &desc, message);
        }
        if (status)
            return status;
    }
    return MUONSHARD_OK;
}

muonshard_status planner_open(planner *p, const char *path, const char *machine_path,
                              const command_args *args, char *message) {
    error_text error;
    p->path = path;
    muonshard_status status = load_model(p, args, message);
    if (status)
        return status;
    const int threads = p->settings->threads > 0 ? (int)p->settings->threads : 1;
    status = backend_open_host((host_options){.isa = host_isa_detect(), .threads = threads},
                               &p->host, &error);
    if (status)
        return message_fail(message, status, "%s", error.text);
    if (machine_path)
        status = machine_load(&p->machine, machine_path, message);
    /* Explicit settings go before the machine's. */
    p->on_gpu = p->settings->backend == BACKEND_CUDA ||
                (p->settings->backend == BACKEND_AUTO && p->machine.on_gpu);
    return status ? status : register_tensors(p, message);
}

void planner_close(planner *p) {
    if (p->host)
        backend_close(p->host);
    registry_free(&p->whole);
    for (int part = 0; part < MODEL_PARTS; part++)
        registry_free(&p->parts[part]);
    machine_free(&p->machine);
    model_file_free(&p->model);
    muonshard_config_destroy(p->config);
}

int planner_unit(const planner *p) {
    return (int)(p->model.pipeline_parallel * p->model.expert_parallel);
}

/* ---- groups ---- */

static bool over_nccl(const planner *p) {
    return p->on_gpu && p->settings->comm != COMM_MPI;
}

static muonshard_status group_make(const planner *p, const settings *s, int part, int ranks,
                                   group_plan *g, char *message) {
    const int experts = part == MODEL_EXPERTS ? (int)p->model.expert_parallel : 1;
    const int world = ranks / (int)p->model.pipeline_parallel / experts;
    error_text error;
    *g = (group_plan){.there = p->parts[part].tensor_count > 0, .stride = experts};
    if (!g->there)
        return MUONSHARD_OK;
    muonshard_status status = plan_make(&g->plan, &p->parts[part], s, world, p->on_gpu, &error);
    if (status == MUONSHARD_OK && over_nccl(p))
        plan_compact(&g->plan, &p->parts[part], s, !s->deterministic);
    if (status == MUONSHARD_OK)
        status = schedule_make(&g->schedule, &g->plan, s, &error);
    return status ? message_fail(message, status, "%s", error.text) : MUONSHARD_OK;
}

static void group_free(group_plan *g) {
    simulation_free(&g->sim);
    schedule_free(&g->schedule);
    plan_free(&g->plan);
}

/* Bytes the backend wants for the batch that takes most, and how many matrices a rank owns of one
 * at most. */
static muonshard_status workspace_of(const planner *p, const plan *q, memory_facts *facts,
                                     char *message) {
    for (size_t i = 0; i < q->batch_count; i++) {
        const batch *b = &q->batches[i];
        ns_program program;
        error_text error;
        if (b->kind == PLAN_FLAT)
            continue;
        const muonshard_status status =
            newton_schulz_compile(p->settings, b->dtype, p->on_gpu, b->m, b->n, &program, &error);
        if (status)
            return message_fail(message, status, "%s", error.text);
        const size_t bytes =
            p->on_gpu ? cuda_layout_of(&program, b->m, b->n, b->count).bytes
                      : p->host->ops->orthogonalize_workspace(p->host, &program, b->m, b->n,
                                                              backend_at_once(p->host, b->count));
        facts->owned = b->count > facts->owned ? b->count : facts->owned;
        facts->orthogonalize = bytes > facts->orthogonalize ? bytes : facts->orthogonalize;
    }
    return MUONSHARD_OK;
}

/* Of the rank that writes most. */
static muonshard_status add_staging(const planner *p, const registry *r, const plan *q,
                                    plan_memory *m, char *message) {
    size_t *bytes = calloc((size_t)q->world_size, sizeof *bytes), most = 0;
    if (!bytes)
        return message_fail(message, MUONSHARD_ERR_MEMORY, "out of memory");
    state_bytes(r, q, p->settings, bytes);
    for (int i = 0; i < q->world_size; i++)
        most = bytes[i] > most ? bytes[i] : most;
    m->staging += (double)most;
    free(bytes);
    return MUONSHARD_OK;
}

/* As commit finds it in a program that came with MPI: of the rank that has most. */
static muonshard_status add_memory(const planner *p, int part, const group_plan *g, plan_memory *m,
                                   char *message) {
    const registry *r = &p->parts[part];
    const plan *q = &g->plan;
    const bool nccl = over_nccl(p);
    memory_facts facts = {.plan = q,
                          .settings = p->settings,
                          .tensors = r->tensor_count,
                          .views = r->view_count,
                          .device = p->on_gpu,
                          .staged = p->on_gpu && !nccl};
    for (size_t i = 0; i < q->wave_count; i++)
        facts.scratch = facts.scratch || !nccl || p->settings->deterministic ||
                        q->waves[i].wire != MUONSHARD_FP32;
    const muonshard_status status = workspace_of(p, q, &facts, message);
    if (status)
        return status;
    const memory_list list = memory_of(&facts);
    for (size_t i = 0; i < r->tensor_count; i++) {
        const tensor *t = &r->tensors[i];
        m->parameters += (double)t->elements * (double)dtype_size(t->dtype);
        if (t->role != MUONSHARD_ROLE_FROZEN)
            m->gradients += (double)t->elements * (double)dtype_size(t->grad_dtype);
    }
    m->state += (double)memory_bytes(&list, MEMORY_STATE);
    m->workspace += (double)memory_bytes(&list, MEMORY_WORKSPACE) +
                    (p->on_gpu ? (double)CUDA_SCRATCH_BYTES : 0.0);
    if (p->on_gpu)
        m->pinned += (double)memory_bytes(&list, MEMORY_PINNED);
    return add_staging(p, r, q, m, message);
}

/* By one policy; the sums of the groups' mean, largest and bound are added up. */
static muonshard_status add_imbalance(const planner *p, int ranks, ownership_policy policy,
                                      double *mean, double *largest, double *bound, char *message) {
    settings s = *p->settings;
    s.ownership = (int)policy;
    *mean = *largest = *bound = 0.0;
    for (int part = 0; part < MODEL_PARTS; part++) {
        const registry *r = &p->parts[part];
        error_text error;
        group_plan g;
        double *cost = calloc(r->view_count + 1, sizeof *cost), least = 0.0;
        muonshard_status status = group_make(p, &s, part, ranks, &g, message);
        if (status == MUONSHARD_OK && !cost)
            status = message_fail(message, MUONSHARD_ERR_MEMORY, "out of memory");
        if (status == MUONSHARD_OK && g.there) {
            status = ownership_price(r, &s, p->on_gpu, cost, NULL, &error);
            if (status == MUONSHARD_OK)
                status =
                    ownership_bound(cost, r->view_count, (size_t)g.plan.world_size, &least, &error);
            if (status)
                message_fail(message, status, "%s", error.text);
            *mean += g.plan.cost;
            *largest += g.plan.cost * g.plan.imbalance;
            *bound += least;
        }
        free(cost);
        group_free(&g);
        if (status)
            return status;
    }
    return MUONSHARD_OK;
}

static muonshard_status find_imbalance(const planner *p, int ranks, plan_imbalance *of,
                                       char *message) {
    double mean, largest, bound;
    *of = (plan_imbalance){1.0, 1.0, 1.0};
    muonshard_status status =
        add_imbalance(p, ranks, OWNERSHIP_ROUND_ROBIN, &mean, &largest, &bound, message);
    if (status || !(mean > 0.0))
        return status;
    of->turns = largest / mean;
    of->bound = bound / mean;
    status = add_imbalance(p, ranks, OWNERSHIP_BALANCED, &mean, &largest, &bound, message);
    of->balanced = largest / mean;
    return status;
}

static muonshard_status check_ranks(const planner *p, int ranks, char *message) {
    return ranks % planner_unit(p)
               ? message_fail(message, MUONSHARD_ERR_ARGUMENT,
                              "%d ranks: pipeline_parallel %lld x expert_parallel %lld takes a "
                              "multiple of %d",
                              ranks, (long long)p->model.pipeline_parallel,
                              (long long)p->model.expert_parallel, planner_unit(p))
               : MUONSHARD_OK;
}

muonshard_status planner_plan(const planner *p, int ranks, rank_plan *r, char *message) {
    *r = (rank_plan){.ranks = ranks};
    muonshard_status status = check_ranks(p, ranks, message);
    if (status == MUONSHARD_OK)
        status = find_imbalance(p, ranks, &r->imbalance, message);
    for (int part = 0; part < MODEL_PARTS && status == MUONSHARD_OK; part++) {
        group_plan *g = &r->groups[part];
        status = group_make(p, p->settings, part, ranks, g, message);
        if (status == MUONSHARD_OK && g->there)
            status = add_memory(p, part, g, &r->memory, message);
        if (status || !g->there || !p->machine.config)
            continue;
        const sim_group group = {.registry = &p->parts[part],
                                 .settings = p->settings,
                                 .plan = &g->plan,
                                 .schedule = &g->schedule,
                                 .stride = g->stride};
        sim_options options = p->options;
        options.backward = part == MODEL_SHARED ? options.backward : 0.0;
        status = simulate(&p->machine, &group, &options, &g->sim, message);
        r->step += g->sim.step;
    }
    return status;
}

void planner_free(rank_plan *r) {
    for (int part = 0; part < MODEL_PARTS; part++)
        group_free(&r->groups[part]);
}

muonshard_status planner_memory(const planner *p, int ranks, plan_memory *memory, char *message) {
    *memory = (plan_memory){.state = 0.0};
    muonshard_status status = check_ranks(p, ranks, message);
    for (int part = 0; part < MODEL_PARTS && status == MUONSHARD_OK; part++) {
        group_plan g;
        status = group_make(p, p->settings, part, ranks, &g, message);
        if (status == MUONSHARD_OK && g.there)
            status = add_memory(p, part, &g, memory, message);
        group_free(&g);
    }
    return status;
}
