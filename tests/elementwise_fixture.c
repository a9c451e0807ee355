#include "mirror_backend.h" /* before cmocka.h, whose macro `fail` would hide a function */
#include "elementwise_fixture.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { GUARD = 64 };
const size_t counts[COUNTS] = {1, 7, 1023, 1025, LARGEST};
const size_t cuts[CUTS] = {1, 3, 1023, 1024, 1025, 2051, 4096};

backend *host;

int open_host(void **state) {
    (void)state;
    error_text error = {""};
    const muonshard_status status = test_backend_open(&host, &error);
    if (status)
        print_error("%s\n", error.text);
    return status;
}

int close_host(void **state) {
    (void)state;
    backend_close(host);
    return 0;
}

static struct {
    unsigned char *memory;
    size_t bytes;
} blocks[32];
static size_t block_count;

void *guarded(size_t bytes) {
    assert_true(block_count < sizeof blocks / sizeof blocks[0]);
    unsigned char *memory = malloc(bytes + 2 * GUARD);
    assert_non_null(memory);
    memset(memory, 0xa5, bytes + 2 * GUARD);
    blocks[block_count].memory = memory;
    blocks[block_count++].bytes = bytes;
    return memory + GUARD;
}

void release(void) {
    for (size_t b = 0; b < block_count; b++) {
        const unsigned char *memory = blocks[b].memory;
        for (size_t i = 0; i < GUARD; i++)
            if (memory[i] != 0xa5 || memory[GUARD + blocks[b].bytes + i] != 0xa5)
                fail_msg("written outside of array %zu of the case", b);
        free(blocks[b].memory);
    }
    block_count = 0;
}

void *copy_of(const void *array, size_t bytes) {
    return memcpy(guarded(bytes), array, bytes);
}

static uint32_t random_bits(void) {
    static uint32_t x = 2463534242u;
    x ^= x << 13;
    x ^= x >> 17;
    x ^= x << 5;
    return x;
}

static float uniform(double low, double high) {
    return (float)(low + (high - low) * random_bits() * 0x1p-32);
}

void *random_array(muonshard_dtype dtype, size_t count, double low, double high) {
    void *array = guarded(count * dtype_size(dtype));
    for (size_t i = 0; i < count; i++) {
        const uint32_t kind = random_bits() % 16;
        const float x = kind == 0 ? 0.0f : kind == 1 && low < 0.0 ? -0.0f : uniform(low, high);
        if (dtype == MUONSHARD_FP32)
            ((float *)array)[i] = x;
        else
            ((uint16_t *)array)[i] = dtype == MUONSHARD_BF16 ? dtype_to_bf16(x) : dtype_to_fp16(x);
    }
    return array;
}

float at(const void *array, muonshard_dtype dtype, size_t i) {
    if (dtype == MUONSHARD_FP32)
        return ((const float *)array)[i];
    const uint16_t bits = ((const uint16_t *)array)[i];
    return dtype == MUONSHARD_BF16 ? dtype_from_bf16(bits) : dtype_from_fp16(bits);
}

float rounded(muonshard_dtype dtype, float x) {
    return dtype == MUONSHARD_FP32   ? x
           : dtype == MUONSHARD_BF16 ? dtype_from_bf16(dtype_to_bf16(x))
                                     : dtype_from_fp16(dtype_to_fp16(x));
}

void assert_near(float got, double want, double tolerance, const char *what, size_t i) {
    if (!(fabs((double)got - want) <= tolerance))
        fail_msg("%s[%zu] is %.9g, not %.9g +- %.1e", what, i, (double)got, want, tolerance);
}

void assert_stored(const void *array, muonshard_dtype dtype, size_t i, double want,
                   double tolerance, const char *what) {
    const float got = at(array, dtype, i);
    if (!(got >= rounded(dtype, (float)(want - tolerance)) &&
          got <= rounded(dtype, (float)(want + tolerance))))
        fail_msg("%s[%zu] is %.9g, not %.9g rounded to %s", what, i, (double)got, want,
                 dtype_name(dtype));
}

void assert_same(const void *a, const void *b, size_t bytes, const char *what) {
    if (memcmp(a, b, bytes) != 0)
        fail_msg("%s: other bits", what);
}

step_record record;
tensor_values values[3];
uint8_t active[3];
kernel_context context;

void begin_step(int64_t t) {
    record = (step_record){.grad_factor = 0.37f, .clip_factor = 1.0f, .count = t};
    for (int i = 0; i < 3; i++)
        values[i] = (tensor_values){.lr = 77.0, .momentum = 0.5, .weight_decay = 55.0};
    values[TENSOR] = (tensor_values){.lr = 0.3, .momentum = 0.93, .weight_decay = 0.57};
    memset(active, 1, sizeof active);
    context = (kernel_context){.record = &record, .values = values, .active = active};
}

double decay_of(decay_method method, double lr, double wd, double scale) {
    switch (method) {
    case DECAY_DECOUPLED:
    case DECAY_CAUTIOUS: return scale * lr * wd;
    case DECAY_INDEPENDENT: return scale * wd;
    case DECAY_LR_SQUARED:
    case DECAY_CAUTIOUS_LR_SQUARED: return scale * lr * lr * wd;
    case DECAY_L2: return 0.0;
    }
    return NAN;
}

int sign(double x) {
    return (x > 0.0) - (x < 0.0);
}
