/* wrong_mpi.c - an MPI that loses, doubles and misplaces tensors, for test_check.sh: to be loaded
 * before the real one (LD_PRELOAD), whose calls it makes by their second names. WRONG_MPI names the
 * fault. Only large messages are touched; reduce-scatters and all-gathers take turns in them. */
#include <mpi.h>
#include <stdlib.h>
#include <string.h>

enum { LARGE = 65536 };

static int world_rank(void) {
    int rank = 0;
    PMPI_Comm_rank(MPI_COMM_WORLD, &rank);
    return rank;
}

static int is_fault(const char *name) {
    const char *fault = getenv("WRONG_MPI");
    return fault && strcmp(fault, name) == 0;
}

/* Whether a message, one of size - 1 of its kind in each collective, is of a reduce-scatter. */
static int of_reduce_scatter(long *seen) {
    int size = 1;
    PMPI_Comm_size(MPI_COMM_WORLD, &size);
    return (*seen)++ / (size - 1) % 2 == 0;
}

/* What rank 1 sends is `factor` of what it should be. The copy is left to the process. */
static const void *spoil(const void *data, int count, float factor) {
    float *copy = malloc((size_t)count);
    if (!copy)
        return data;
    memcpy(copy, data, (size_t)count);
    for (size_t i = 0; i < (size_t)count / sizeof *copy; i++)
        copy[i] *= factor;
    return copy;
}

int MPI_Isend(const void *data, int count, MPI_Datatype type, int target, int tag, MPI_Comm comm,
              MPI_Request *request) {
    static long seen;
    if (type == MPI_BYTE && count >= LARGE && of_reduce_scatter(&seen) && world_rank() == 1) {
        if (is_fault("missing"))
            data = spoil(data, count, 0.0F);
        if (is_fault("twice"))
            data = spoil(data, count, 2.0F);
    }
    return PMPI_Isend(data, count, type, target, tag, comm, request);
}

/* Rank 0 gathers what the others own into each other's places. */
int MPI_Irecv(void *data, int count, MPI_Datatype type, int source, int tag, MPI_Comm comm,
              MPI_Request *request) {
    static long seen;
    if (type == MPI_BYTE && count >= LARGE && !of_reduce_scatter(&seen) && world_rank() == 0 &&
        is_fault("swapped"))
        source = 3 - source; /* of three ranks */
    return PMPI_Irecv(data, count, type, source, tag, comm, request);
}
