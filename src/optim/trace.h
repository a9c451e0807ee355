/* trace.h - when each operation of the schedule really ran, as Chrome trace events
 * (chrome://tracing, Perfetto). */
#ifndef TRACE_H
#define TRACE_H

#include "optim/schedule.h"

typedef struct trace trace;

/* The file of a rank: `path` may hold %r for its number; with several ranks and no %r, ".rank" goes
 * at the end. */
void rank_path(char *text, size_t size, const char *path, int rank, int world_size);

/* To the rank's file. Empty: *out is NULL, and the calls below do nothing. ERR_IO. */
muonshard_status trace_open(trace **out, const char *path, int rank, int world_size,
                            error_text *error);
/* One operation that ran from `start` to `end`, seconds of now_s(). Communication begins when it
 * was started and ends when it was found complete. */
void trace_op(trace *t, const op *o, int64_t step, double start, double end);
/* Closes the file; ERR_IO if something could not be written. */
muonshard_status trace_close(trace *t, error_text *error);

#endif
