/* muonshard_mpi.h - start from an MPI communicator. In libmuonshard_mpi; include mpi.h's compiler
 * flags. */
#ifndef MUONSHARD_MPI_H
#define MUONSHARD_MPI_H

#include <mpi.h>
#include "muonshard.h"

#ifdef __cplusplus
extern "C" {
#endif

/* A communicator on a duplicate of `mpi_comm`; MPI stays initialised and finalised by the caller,
 * at any thread level: all MPI calls are made in the thread that calls muonshard. `options` may be
 * NULL. Collective over `mpi_comm`. ERR_STATE: MPI is not initialised; ERR_COMM, ERR_TIMEOUT,
 * ERR_MEMORY. Destroy it before MPI_Finalize. */
MUONSHARD_API muonshard_status muonshard_comm_create_mpi(MPI_Comm mpi_comm,
                                                         const muonshard_comm_options *options,
                                                         muonshard_comm **comm);

/* A muonshard_fatal_fn: writes `message` as one line to stderr and calls MPI_Abort on
 * MPI_COMM_WORLD with muonshard_mpi_exit_code(status), so that a job with a dead or stopped rank
 * ends. Where stderr has no room for a second, the line is left out; where MPI_Abort does not end
 * the process in 3 s, SIGALRM does, with the same code. */
MUONSHARD_API void muonshard_mpi_abort(void *user, muonshard_status status, const char *message);
/* 10 - status: 11 for ERR_ARGUMENT … 18 for ERR_TIMEOUT; 0 for OK. Below 128. */
MUONSHARD_API int muonshard_mpi_exit_code(muonshard_status status);

#ifdef __cplusplus
}
#endif
#endif
