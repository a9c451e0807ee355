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

/* Errors of a save that is only looked for, and whose memory the thread may still read, stay. */
void saver_free(muonshard_optimizer *o);

/* The facts of the state as it is now. Waits for a device. */
muonshard_status checkpoint_facts(muonshard_optimizer *o, image_facts *facts);
/* No step is begun; a deferred one is finished, and nothing is under way on the device. */
muonshard_status checkpoint_settle(muonshard_optimizer *o);
/* Inside a save or load, waits have its deadline. */
double checkpoint_enter(muonshard_optimizer *o, const char *phase);
void checkpoint_leave(muonshard_optimizer *o, double timeout_s);

#endif
