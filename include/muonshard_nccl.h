/* muonshard_nccl.h - communicators over an ncclComm_t the program has already. Needs nccl.h; the
 * function is in libmuonshard itself, and opens libmuonshard_cuda. */
#ifndef MUONSHARD_NCCL_H
#define MUONSHARD_NCCL_H

#include <nccl.h>
#include "muonshard.h"

#ifdef __cplusplus
extern "C" {
#endif

/* A communicator over `nccl_comm`, which is borrowed until destroy: tensors go over it, and
 * messages of the host too, through memory of its device. `options` may be NULL. Operations are
 * issued in the order of calls on this communicator; the program issues none of its own between a
 * muonshard call that is collective and its return. A blocking ncclComm_t (NCCL's default) has no
 * deadline while NCCL takes an operation. Local. ERR_ARGUMENT; ERR_UNAVAILABLE: libmuonshard_cuda
 * or a device is missing; ERR_MISMATCH: the program's NCCL is another library than
 * libmuonshard_cuda's. */
static inline muonshard_status muonshard_comm_create_nccl(ncclComm_t nccl_comm,
                                                          const muonshard_comm_options *options,
                                                          muonshard_comm **comm) {
    return muonshard_comm_adopt_nccl(nccl_comm, (void (*)(void))ncclCommCount, options, comm);
}

#ifdef __cplusplus
}
#endif
#endif
