/* The image of a rank's state, as muonshard_load_memory reads it. What is refused changes nothing;
 * what is taken goes on. */
#include "fuzz_small.h"

static muonshard_load_args args_of(const uint8_t *data, size_t size) {
    muonshard_load_args args = MUONSHARD_LOAD_ARGS_INIT;
    args.keep_params = size && data[size - 1] / 2 % 2;
    return args;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    small *s = fuzz_small();
    const muonshard_load_args args = args_of(data, size);
    muonshard_load_result result = MUONSHARD_LOAD_RESULT_INIT;
    /* The whole may be two halves: images add up to the state. */
    const void *images[] = {data, s->image};
    const size_t bytes[] = {size, s->image_bytes}, count = size && data[size - 1] >= 252 ? 2 : 1;
    const muonshard_status status =
        fuzz_status(muonshard_load_memory(s->optimizer, images, bytes, count, &args, &result),
                    muonshard_last_error(s->optimizer));
    if (status) {
        FUZZ_CHECK(status == MUONSHARD_ERR_FORMAT || status == MUONSHARD_ERR_UNSUPPORTED ||
                   status == MUONSHARD_ERR_ARGUMENT);
        FUZZ_CHECK(fuzz_small_unchanged(s));
        return 0;
    }
    FUZZ_CHECK(result.found && result.step >= 0 && result.count >= 0);
    fuzz_small_goes_on(s);
    return 0;
}
