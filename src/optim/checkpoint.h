/* checkpoint.h - saving and continuing: images of ranks, through staging to files, and back. */
#ifndef CHECKPOINT_H
#define CHECKPOINT_H

#include <pthread.h>
#include <stdatomic.h>
#include "optim/image.h"
#include "optim/manifest.h"
#include "optim/series.h"

/* A save: staging stays from one to the next, the rest is that of the save under way. */
typedef struct saver {
    char *staging; /* own, [room]; pinned, of a device */
    size_t room;
    bool open;     /* begun, and not waited for */
    bool threaded; /* `thread` is there */
    pthread_t thread;
    atomic_bool written; /* or failed: the thread leaves the rest alone from then on */
    muonshard_status status;
    error_text error;
    uint64_t hash; /* of this rank's file */
    size_t bytes;
    image_facts facts;
    char *directory, *path, *file, *user; /* own: the series, the checkpoint, this rank's file */
    int keep;
} saver;

/* Waits for the thread, by `save_timeout`; one that hangs keeps the memory it may still read. */
void saver_free(muonshard_optimizer *o);

/* The facts of the state as it is now. Waits for a device. */
muonshard_status checkpoint_facts(muonshard_optimizer *o, image_facts *facts);
/* Inside a save or load, `phase`, waits have its deadline; returns the one outside, for leave. */
double checkpoint_enter(muonshard_optimizer *o, const char *phase);
void checkpoint_leave(muonshard_optimizer *o, double timeout_s);
/* A save before is completed, a deferred step finished, and nothing under way on the device: the
 * state is that after the latest step. No step is half marked. Collective. */
muonshard_status checkpoint_settle(muonshard_optimizer *o, const char *phase);

#endif
