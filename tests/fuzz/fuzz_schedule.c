/* A schedule over steps: total and step in the first 16 bytes, then the text. What is taken has a
 * value at every step, between the lowest and the highest of its points, and the same one when it
 * is asked again. */
#include <math.h>
#include <string.h>

#include "curve.h"
#include "fuzz.h"

static void check_at(const char *text, int64_t step, int64_t total, double lowest, double highest) {
    double value = NAN, again = NAN;
    FUZZ_CHECK(muonshard_schedule_value(text, step, total, 7.0, &value) == MUONSHARD_OK);
    FUZZ_CHECK(muonshard_schedule_value(text, step, total, 7.0, &again) == MUONSHARD_OK);
    FUZZ_CHECK(value == again);
    const double slack = 1e-14 * fmax(fabs(lowest), fabs(highest)); /* of rounding */
    FUZZ_CHECK(isnan(lowest) ? value == 7.0 : value >= lowest - slack && value <= highest + slack);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    int64_t numbers[2] = {0};
    const size_t taken = size < sizeof numbers ? size : sizeof numbers;
    if (taken)
        memcpy(numbers, data, taken);
    char *text = malloc(size - taken + 1);
    FUZZ_CHECK(text);
    if (size > taken)
        memcpy(text, data + taken, size - taken);
    text[size - taken] = '\0';
    double value = NAN, lowest, highest;
    error_text error = {""};
    const muonshard_status status =
        muonshard_schedule_value(text, numbers[0], numbers[1], 7.0, &value);
    FUZZ_CHECK(status == MUONSHARD_OK || status == MUONSHARD_ERR_CONFIG ||
               (status == MUONSHARD_ERR_ARGUMENT && (numbers[0] < 0 || numbers[1] < 0)));
    if (status != MUONSHARD_ERR_ARGUMENT) {
        FUZZ_CHECK(fuzz_status(curve_range(text, numbers[1], &lowest, &highest, &error),
                               error.text) == status);
        const int64_t steps[] = {0, 1, numbers[0], numbers[1], INT64_MAX};
        for (size_t i = 0; i < sizeof steps / sizeof *steps && !status; i++)
            check_at(text, steps[i], numbers[1], lowest, highest);
    }
    free(text);
    return 0;
}
