/* host_threads.h - the threads of a rank. They sleep while there is nothing to do, and whoever
 * gives them work takes part in it. */
#ifndef HOST_THREADS_H
#define HOST_THREADS_H

#include <stddef.h>
#include "status.h"

typedef struct host_threads host_threads;

/* `thread` is below the number of threads; no two tasks at a time have the same. */
typedef void host_task(void *user, size_t index, int thread);

/* One caller at a time. ERR_MEMORY when the system gives no thread. */
muonshard_status host_threads_open(int count, host_threads **out, error_text *error);
/* Not from within a task. task(user, i, ...) for all i below `count`, in any order; returns when
 * all are done. NULL threads: one after the other, here. */
void host_threads_run(host_threads *threads, host_task *task, void *user, size_t count);
int host_threads_count(const host_threads *threads);
void host_threads_close(host_threads *threads);

#endif
