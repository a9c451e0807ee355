#include "bench_link.h"

#include <stdlib.h>

#include "command.h"

typedef struct passage {
    comm_ticket inner;
    bool moved; /* by the transport */
    double arrives;
    struct passage *next_free;
} passage;

typedef struct link {
    muonshard_comm *inner; /* borrowed */
    double bandwidth, latency;
    double free_at, busy;
    passage *free; /* own: what is not under way */
} link;

static muonshard_status link_start(muonshard_comm *comm, comm_ticket *ticket) {
    link *l = comm->impl;
    passage *p = l->free;
    if (p)
        l->free = p->next_free;
    else if (!(p = calloc(1, sizeof *p)))
        return comm_die(comm, MUONSHARD_ERR_MEMORY, "link: out of memory");
    size_t bytes = 0;
    for (size_t i = 0; i < ticket->request.part_count; i++)
        bytes += ticket->request.parts[i].bytes;
    bytes *= (size_t)comm->size - 1;
    const double now = command_now_s(), takes = l->latency + (double)bytes / l->bandwidth;
    l->free_at = (l->free_at > now ? l->free_at : now) + takes;
    l->busy += takes;
    p->arrives = l->free_at;
    p->moved = false;
    /* The transport's part alone: sums over ranks happen above, when this one is done. */
    p->inner = (comm_ticket){.request = ticket->request};
    const muonshard_status status = l->inner->ops->start(l->inner, &p->inner);
    ticket->impl = p;
    return status ? comm_die(comm, status, "%s", l->inner->error.text) : MUONSHARD_OK;
}

static muonshard_status link_test(muonshard_comm *comm, comm_ticket *ticket, bool *done) {
    link *l = comm->impl;
    passage *p = ticket->impl;
    if (!p->moved) {
        const muonshard_status status = l->inner->ops->test(l->inner, &p->inner, &p->moved);
        if (status)
            return comm_die(comm, status, "%s", l->inner->error.text);
    }
    if (!p->moved || command_now_s() < p->arrives)
        return MUONSHARD_OK;
    p->next_free = l->free;
    l->free = p;
    *done = true;
    return MUONSHARD_OK;
}

static void link_destroy(muonshard_comm *comm) {
    link *l = comm->impl;
    while (l->free) {
        passage *next = l->free->next_free;
        free(l->free);
        l->free = next;
    }
    free(l);
}

double bench_link_busy(const muonshard_comm *comm) {
    return ((const link *)comm->impl)->busy;
}

muonshard_status bench_link_create(muonshard_comm *inner, double bandwidth, double latency,
                                   muonshard_comm **out) {
    static const comm_ops shared_sum = {
        .name = "link", .start = link_start, .test = link_test, .destroy = link_destroy};
    static const comm_ops native_sum = {.name = "link",
                                        .native_reduce_scatter = true,
                                        .start = link_start,
                                        .test = link_test,
                                        .destroy = link_destroy};
    link *l = calloc(1, sizeof *l);
    if (!l)
        return MUONSHARD_ERR_MEMORY;
    *l = (link){.inner = inner, .bandwidth = bandwidth, .latency = latency};
    const muonshard_status status =
        comm_create(inner->ops->native_reduce_scatter ? &native_sum : &shared_sum, l, inner->rank,
                    inner->size, &inner->options, out);
    if (status)
        free(l);
    return status;
}
