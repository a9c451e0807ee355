/* nccl_comm.h - device memory over NCCL, in the order of the backend's stream; see plugin.h. */
#ifndef COMM_NCCL_COMM_H
#define COMM_NCCL_COMM_H

#include "kernels/plugin.h"

muonshard_status nccl_create(muonshard_comm *bootstrap, nccl_options options, muonshard_comm **out,
                             error_text *error);
muonshard_status nccl_adopt(void *nccl_comm, void (*function)(void),
                            const muonshard_comm_options *options, muonshard_comm **out,
                            error_text *error);

#endif
