/* bench_random.c - numbers for matrices whose products are timed. */
#include <math.h>

#include "bench.h"

/* splitmix64 (Steele, Lea and Flood 2014): 64 bits are four uniform numbers, whose variance is
 * 65536^2 / 12 each. */
void bench_normal(float *numbers, size_t count, uint64_t *state) {
    const float factor = (float)(sqrt(3.0) / 65536.0);
    for (size_t i = 0; i < count; i++) {
        uint64_t z = *state += 0x9e3779b97f4a7c15U;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9U;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebU;
        z ^= z >> 31;
        const int32_t sum =
            (int32_t)((z & 0xffff) + (z >> 16 & 0xffff) + (z >> 32 & 0xffff) + (z >> 48));
        numbers[i] = factor * (float)(sum - 2 * 65535);
    }
}
