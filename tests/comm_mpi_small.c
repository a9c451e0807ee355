#define muonshard_comm_create_mpi small_comm_create_mpi
#define muonshard_mpi_abort       small_mpi_abort
#define muonshard_mpi_exit_code   small_mpi_exit_code
#define COMM_MPI_MAX_COUNT        1000
#include "comm/mpi.c"
