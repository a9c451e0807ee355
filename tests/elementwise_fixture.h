/* elementwise_fixture.h - what the tests of the element-wise kernels share: arrays with guards
 * around them, their elements in any dtype, the state of a step. */
#ifndef ELEMENTWISE_FIXTURE_H
#define ELEMENTWISE_FIXTURE_H

#include "kernels/backend.h"

#include <stdarg.h>
#include <setjmp.h>
#include <cmocka.h>

enum { DTYPES = 3, COUNTS = 5, CUTS = 7, LARGEST = 4097 };
extern const size_t counts[COUNTS];
extern const size_t cuts[CUTS]; /* of LARGEST */

#define UNIT 0x1p-24 /* roundoff of fp32 */

extern backend *host; /* between open_host and close_host, a test's setup and teardown */
int open_host(void **state);
int close_host(void **state);

/* Memory that `release` frees, once it has seen that nothing was written around it. */
void *guarded(size_t bytes);
void *copy_of(const void *array, size_t bytes);
/* Values in [low, high] with zeros of either sign among them. */
void *random_array(muonshard_dtype dtype, size_t count, double low, double high);
void release(void);

float at(const void *array, muonshard_dtype dtype, size_t i);
/* x as `dtype` stores it, to nearest even. */
float rounded(muonshard_dtype dtype, float x);

void assert_near(float got, double want, double tolerance, const char *what, size_t i);
/* Element i of `array` is what some fp32 number within the tolerance is rounded to. */
void assert_stored(const void *array, muonshard_dtype dtype, size_t i, double want,
                   double tolerance, const char *what);
void assert_same(const void *a, const void *b, size_t bytes, const char *what);

enum { TENSOR = 2 }; /* the one under test, of three with values that differ */
extern step_record record;
extern tensor_values values[3];
extern uint8_t active[3];
extern kernel_context context;
/* The state of the step that counts `t`. */
void begin_step(int64_t t);

/* On skip, and for a tensor that isn't active: `call` leaves the bytes as they are. */
#define ASSERT_LEFT_ALONE(call, array, bytes)                                                      \
    do {                                                                                           \
        const void *before = copy_of(array, bytes);                                                \
        record.skip = 1;                                                                           \
        assert_int_equal(call, MUONSHARD_OK);                                                      \
        assert_same(array, before, bytes, "on skip, " #array);                                     \
        record.skip = 0;                                                                           \
        active[TENSOR] = 0;                                                                        \
        assert_int_equal(call, MUONSHARD_OK);                                                      \
        assert_same(array, before, bytes, "inactive, " #array);                                    \
        active[TENSOR] = 1;                                                                        \
    } while (0)

/* Section 7: what is taken from W is d W. */
double decay_of(decay_method method, double lr, double wd, double scale);
int sign(double x);

#endif
