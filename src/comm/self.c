/* self.c - one rank: every collective is a copy, done when it starts. */
#include "comm/comm.h"

#include <string.h>

static muonshard_status self_copy(muonshard_comm *comm, const comm_request *request,
                                  const comm_part *part) {
    if (!part->bytes || part->send == part->recv)
        return MUONSHARD_OK;
    if (!request->backend) {
        memcpy(part->recv, part->send, part->bytes);
        return MUONSHARD_OK;
    }
    backend *memory = request->backend;
    muonshard_status status;
    if (request->kind == COMM_REDUCE_SCATTER) {
        const convert_item item = {.dst = part->recv,
                                   .dst_dtype = MUONSHARD_FP32,
                                   .src = part->send,
                                   .src_dtype = part->dtype,
                                   .count = part->bytes / dtype_size(part->dtype)};
        status = memory->ops->convert(memory, NULL, &item, 1, request->stream);
    } else {
        const copy_item item = {.dst = part->recv, .src = part->send, .bytes = part->bytes};
        status = memory->ops->copy(memory, &item, 1, request->stream);
    }
    return status ? comm_die(comm, status, "self: copy: %s", request->backend->error.text)
                  : MUONSHARD_OK;
}

static muonshard_status self_start(muonshard_comm *comm, comm_ticket *ticket) {
    const comm_request *request = &ticket->request;
    if (request->kind == COMM_BROADCAST)
        return MUONSHARD_OK;
    for (size_t i = 0; i < request->part_count; i++)
        TRY(self_copy(comm, request, &request->parts[i]));
    return MUONSHARD_OK;
}

static muonshard_status self_test(muonshard_comm *comm, comm_ticket *ticket, bool *done) {
    (void)comm;
    (void)ticket;
    *done = true;
    return MUONSHARD_OK;
}

static void self_destroy(muonshard_comm *comm) {
    (void)comm;
}

/* The sum over one rank is a copy to fp32: native. */
static const comm_ops self_ops = {.name = "self",
                                  .native_reduce_scatter = true,
                                  .on_stream = true,
                                  .gathers_in_place = true,
                                  .start = self_start,
                                  .test = self_test,
                                  .destroy = self_destroy};

muonshard_status muonshard_comm_create_self(const muonshard_comm_options *options,
                                            muonshard_comm **comm) {
    if (!comm)
        return comm_refuse(options, MUONSHARD_ERR_ARGUMENT, "comm is NULL");
    *comm = NULL;
    return comm_create(&self_ops, NULL, 0, 1, options, comm);
}
