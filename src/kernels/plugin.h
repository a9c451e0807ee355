/* plugin.h - the seam to libmuonshard_cuda: a shared library of its own, opened at run time, so
 * that nothing of CUDA has to be installed where it isn't used. It is entered through one symbol,
 * muonshard_cuda_plugin. */
#ifndef PLUGIN_H
#define PLUGIN_H

#include "kernels/backend.h"

/* Raised by every change of backend.h, program.h, comm.h or this file. */
#define PLUGIN_ABI 8

typedef struct nccl_options {
    bool deterministic; /* sums over ranks are made in rank order, by exchange */
    int device;         /* its number in this process */
} nccl_options;

typedef struct plugin_entry {
    int abi; /* PLUGIN_ABI it was built with; what follows is read only if that is ours */
    muonshard_status (*open)(cuda_options options, backend **out, error_text *error);
    /* A communicator over the ranks of `bootstrap`, which carries what NCCL needs to begin with and
     * stays borrowed. Collective; each rank's status is its own. A failure is not fatal: the caller
     * may have another way. */
    muonshard_status (*nccl_create)(muonshard_comm *bootstrap, nccl_options options,
                                    muonshard_comm **out, error_text *error);
    /* Over the caller's ncclComm_t, which is borrowed; `function` is the address the caller has for
     * ncclCommCount: another one than ours is another NCCL. Host messages go over it too. */
    muonshard_status (*nccl_adopt)(void *nccl_comm, void (*function)(void),
                                   const muonshard_comm_options *options, muonshard_comm **out,
                                   error_text *error);
} plugin_entry;

typedef const plugin_entry *(*plugin_entry_fn)(void);

/* The plugin, once it is found and of our version. ERR_UNAVAILABLE. */
muonshard_status plugin_open(const plugin_entry **out, error_text *error);

#endif
