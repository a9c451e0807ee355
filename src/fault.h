/* fault.h - faults on demand, for tests: in builds with MUONSHARD_FAULTS; nothing at all in others.
 *
 * MUONSHARD_FAULT holds faults separated by ';', each ACTION@POINT:N or ACTION@POINT:N/RANK: what
 * happens to a rank (to every rank) when it passes POINT for the N-th time. A POINT that ends with
 * '*' stands for all that begin so, counted together. ACTION is kill, stop, exit, sleep=SECONDS,
 * short (a write that writes less), or an error: ENOSPC, EIO, EROFS. With MUONSHARD_FAULT_LOG, the
 * name of a file (%r: the rank), every point that is passed is a line in it. */
#ifndef FAULT_H
#define FAULT_H

/* What the caller is to pretend, where the process goes on: 0: nothing; FAULT_SHORT; or an errno
 * value. */
#define FAULT_SHORT (-1)

#ifdef MUONSHARD_FAULTS
/* tests/fault.c, where it is linked; the shared library is as it is shipped and never has it. */
int fault_act(const char *name) __attribute__((weak));
static inline int fault_point(const char *name) {
    return fault_act ? fault_act(name) : 0;
}
#else
static inline int fault_point(const char *name) {
    (void)name;
    return 0;
}
#endif

#endif
