/* comm_mpi_small.h - mpi.c once more, with a limit of 1000 bytes where INT_MAX would be, so that
 * what is meant for slots of gigabytes runs on small ones. */
#ifndef COMM_MPI_SMALL_H
#define COMM_MPI_SMALL_H

#include "muonshard_mpi.h"

muonshard_status small_comm_create_mpi(MPI_Comm mpi_comm, const muonshard_comm_options *options,
                                       muonshard_comm **comm);

#endif
