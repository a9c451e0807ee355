#include "kernels/host_threads.h"

#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>

struct host_threads {
    int count;          /* the caller included */
    pthread_t *workers; /* own, [started] */
    int started;
    pthread_mutex_t lock; /* of all that follows */
    pthread_cond_t work, done;
    host_task *task;
    void *user;
    size_t next, end;
    int busy, names; /* workers in a task; thread numbers given out */
    bool closing;
};

int host_threads_count(const host_threads *t) {
    return t ? t->count : 1;
}

/* Called and returns with the lock held. */
static void take_tasks(host_threads *t, int thread) {
    t->busy++;
    while (t->next < t->end) {
        const size_t index = t->next++;
        pthread_mutex_unlock(&t->lock);
        t->task(t->user, index, thread);
        pthread_mutex_lock(&t->lock);
    }
    if (--t->busy == 0)
        pthread_cond_signal(&t->done);
}

static void *worker(void *user) {
    host_threads *t = user;
    pthread_mutex_lock(&t->lock);
    const int thread = ++t->names;
    while (!t->closing) {
        if (t->next < t->end)
            take_tasks(t, thread);
        else
            pthread_cond_wait(&t->work, &t->lock);
    }
    pthread_mutex_unlock(&t->lock);
    return NULL;
}

void host_threads_run(host_threads *t, host_task *task, void *user, size_t count) {
    if (!t || count < 2) {
        for (size_t i = 0; i < count; i++)
            task(user, i, 0);
        return;
    }
    pthread_mutex_lock(&t->lock);
    t->task = task;
    t->user = user;
    t->next = 0;
    t->end = count;
    pthread_cond_broadcast(&t->work);
    take_tasks(t, 0);
    while (t->busy > 0)
        pthread_cond_wait(&t->done, &t->lock);
    pthread_mutex_unlock(&t->lock);
}

void host_threads_close(host_threads *t) {
    if (!t)
        return;
    pthread_mutex_lock(&t->lock);
    t->closing = true;
    pthread_cond_broadcast(&t->work);
    pthread_mutex_unlock(&t->lock);
    for (int i = 0; i < t->started; i++)
        pthread_join(t->workers[i], NULL);
    pthread_cond_destroy(&t->work);
    pthread_cond_destroy(&t->done);
    pthread_mutex_destroy(&t->lock);
    free(t->workers);
    free(t);
}

/* Signals are for the threads of the program: workers block them all. */
muonshard_status host_threads_open(int count, host_threads **out, error_text *error) {
    *out = NULL;
    if (count <= 1)
        return MUONSHARD_OK;
    host_threads *t = calloc(1, sizeof *t);
    pthread_t *workers = calloc((size_t)count, sizeof *workers);
    if (!t || !workers) {
        free(t);
        free(workers);
        return fail(error, MUONSHARD_ERR_MEMORY, "out of memory");
    }
    t->count = count;
    t->workers = workers;
    pthread_mutex_init(&t->lock, NULL);
    pthread_cond_init(&t->work, NULL);
    pthread_cond_init(&t->done, NULL);
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (t->started < count - 1 && pthread_create(&workers[t->started], NULL, worker, t) == 0)
        t->started++;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (t->started < count - 1) {
        const int started = t->started;
        host_threads_close(t);
        return fail(error, MUONSHARD_ERR_MEMORY, "threads: the system gives %d of %d", started + 1,
                    count);
    }
    *out = t;
    return MUONSHARD_OK;
}
