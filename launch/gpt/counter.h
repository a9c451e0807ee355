/* counter.h - random bits as a function of a counter: the same on every rank and for any number of
 * ranks. */
#ifndef COUNTER_H
#define COUNTER_H

#include <stdint.h>

/* splitmix64's output function: bits that depend on all of x. */
static inline uint64_t counter_mix(uint64_t x) {
    x += UINT64_C(0x9e3779b97f4a7c15);
    x = (x ^ (x >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ (x >> 27)) * UINT64_C(0x94d049bb133111eb);
    return x ^ (x >> 31);
}

#endif
