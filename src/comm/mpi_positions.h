/* mpi_positions.h - the board: where every rank of a node is and when it last gave a sign of life,
 * in shared memory, so that a rank that waits can say who keeps it waiting without that one's help.
 * One board a node; without shared memory there is none, and nobody fails. */
#ifndef MPI_POSITIONS_H
#define MPI_POSITIONS_H

#include "comm/comm.h"

typedef struct mpi_positions mpi_positions;

/* Collective, over all-gathers of `comm`; *out is NULL where a board can't be had. Fails only where
 * `comm` does. */
muonshard_status positions_open(muonshard_comm *comm, mpi_positions **out);
/* `board` may be NULL in all of these. */
void positions_close(mpi_positions *board);
/* Publishes this rank's position, which is a sign of life too. */
void positions_mark(mpi_positions *board, const comm_position *position);
/* A sign of life of a rank that waits; cheap enough for every look. */
void positions_beat(mpi_positions *board);
/* "rank 1 of 3 (host X): step 12, momentum batch 2: no sign of life for 3.0 s (stopped)": the rank
 * of this node that keeps one waiting that has waited `timeout_s`: one that is stopped or gone, or
 * that gives no sign of life and is no further than this rank. "" where none is to blame; like
 * snprintf. */
size_t positions_blame(const mpi_positions *board, double timeout_s, char *text, size_t size);
/* "rank 1: step 12, momentum batch 2; …": ranks of this node that are elsewhere or stopped, those
 * most behind first, and whether there are other nodes; like snprintf. */
size_t positions_describe(const mpi_positions *board, char *text, size_t size);
/* Whether the process of a rank of this node is no more. */
bool positions_gone(const mpi_positions *board);
/* True for the first rank of the node that asks: of several that fail together one speaks. */
bool positions_claim(mpi_positions *board);
/* Whether one has. */
bool positions_claimed(const mpi_positions *board);

#endif
