/* nccl_open.c - the way to NCCL, which lives in the CUDA plugin: beside another communicator, or
 * over one the caller has. */
#include "comm/comm.h"
#include "kernels/plugin.h"

muonshard_status comm_open_nccl(muonshard_comm *bootstrap, int device, bool deterministic,
                                muonshard_comm **out, error_text *error) {
    const plugin_entry *plugin;
    const nccl_options options = {.deterministic = deterministic, .device = device};
    muonshard_comm *made = NULL;
    muonshard_status status = plugin_open(&plugin, error);
    TRY(comm_agree(bootstrap, status, error));
    status = plugin->nccl_create(bootstrap, options, &made, error);
    status = comm_agree(bootstrap, status, error);
    if (status == MUONSHARD_OK)
        *out = made;
    else
        muonshard_comm_destroy(made);
    return status;
}

muonshard_status muonshard_comm_adopt_nccl(void *nccl_comm, void (*function)(void),
                                           const muonshard_comm_options *options,
                                           muonshard_comm **comm) {
    const plugin_entry *plugin;
    error_text error = {""};
    if (!comm)
        return comm_refuse(options, MUONSHARD_ERR_ARGUMENT, "comm is NULL");
    *comm = NULL;
    muonshard_status status = plugin_open(&plugin, &error);
    if (status == MUONSHARD_OK)
        status = plugin->nccl_adopt(nccl_comm, function, options, comm, &error);
    return status ? comm_refuse(options, status, "%s", error.text) : MUONSHARD_OK;
}
