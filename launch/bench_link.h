/* bench_link.h - a communicator that is no faster than a link: what it carries takes its turn on
 * the link for latency + bytes / bandwidth, and is not done before. The data moves as ever. */
#ifndef BENCH_LINK_H
#define BENCH_LINK_H

#include "comm/comm.h"

/* Over `inner`, which is borrowed and outlives it. Bytes a second; seconds. */
muonshard_status bench_link_create(muonshard_comm *inner, double bandwidth, double latency,
                                   muonshard_comm **out);
/* Seconds the link has been in use so far. */
double bench_link_busy(const muonshard_comm *comm);

#endif
