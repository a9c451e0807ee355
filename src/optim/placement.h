/* placement.h - where the ranks are: which of them share a machine and its cores, and what
 * instructions all of them have. */
#ifndef PLACEMENT_H
#define PLACEMENT_H

#include "comm/comm.h"
#include "settings.h"

typedef struct placement {
    int cores;      /* this process may run on */
    int sharing;    /* ranks that may run on some of them, this one included */
    host_isa isa;   /* the best that every rank has */
    int local_rank; /* among those on this machine */
} placement;

/* Collective. */
muonshard_status placement_find(muonshard_comm *comm, placement *p, error_text *error);
/* With `auto` filled in: the cores, divided among those who share them, and what all ranks have. */
host_options placement_options(const placement *p, const settings *s);

#endif
