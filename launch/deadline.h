/* deadline.h - what the command waits for outside of its communicator doesn't wait for ever: the
 * start and the end of MPI, and whoever reads its output. When a deadline is over, SIGALRM writes
 * one line to stderr that says which of the launcher's children is stopped (siblings.h), or else
 * who waited in what, and ends the process with the code of ERR_TIMEOUT; the launcher ends the
 * other ranks.
 *
 * The state is the process's, as its signals and its output are. */
#ifndef DEADLINE_H
#define DEADLINE_H

#include "muonshard.h"

/* Until a config says otherwise, deadlines are MUONSHARD_START_TIMEOUT seconds (300). Returns why
 * that is no number of seconds, or NULL. */
const char *deadline_open(void);
double deadline_seconds(void);
void deadline_set(double seconds);
/* Who speaks; before, it is what the launcher's environment says. */
void deadline_set_rank(int rank, int size);
/* The step that is in the line from now on; 0: none. */
void deadline_set_step(int64_t step);

/* What lies between these, which other ranks have a part in, is done by the deadline, or the
 * process ends. Only the outermost pair counts. */
void deadline_begin(const char *phase);
void deadline_end(void);

/* From now on writes to stdout and stderr have a deadline, half of the others': the rank that can't
 * go on speaks before those that wait for it. */
void deadline_guard_output(void);

#endif
