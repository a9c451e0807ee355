/* mpi_positions.h - the board: where every rank of a node is, in shared memory, so that a rank that
 * waits can say who keeps it waiting without that one's help. One board a node; without shared
 * memory there is none, and nobody fails. */
#ifndef MPI_POSITIONS_H
#define MPI_POSITIONS_H

#include "comm/comm.h"

typedef struct mpi_positions mpi_positions;

/* Collective, over all-gathers of `comm`; *out is NULL where a board can't be had. Fails only where
 * `comm` does. */
muonshard_status positions_open(muonshard_comm *comm, mpi_positions **out);
/* `board` may be NULL in all of these. */
void positions_close(mpi_positions *board);
/* Publishes this rank's position. */
void positions_mark(mpi_positions *board, const comm_position *position);
/* "rank 1: step 12, momentum batch 2; …": ranks of this node that are elsewhere or stopped, those
 * most behind first; like snprintf. */
size_t positions_describe(const mpi_positions *board, char *text, size_t size);
/* True for the first rank of the node that asks: of several that fail together one speaks. */
bool positions_claim(mpi_positions *board);

#endif
