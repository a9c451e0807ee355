/* siblings.h - which rank of this host stands still, from /proc: before ranks know each other and
 * after they have parted, the launcher is still the parent of all. */
#ifndef SIBLINGS_H
#define SIBLINGS_H

/* The number of a stopped rank, as the launcher wrote it; NULL: none, or not known. May be called
 * in a signal handler, one at a time. */
const char *siblings_stopped(void);

#endif
