/* A libmuonshard_cuda that is none: what the seam does with another version, and with one that
 * finds no device. */
#include <string.h>
#include "kernels/plugin.h"

#ifndef FAKE_ABI
#define FAKE_ABI PLUGIN_ABI
#endif

static muonshard_status open_nothing(cuda_options options, backend **out, error_text *error) {
    (void)options;
    *out = NULL;
    memcpy(error->text, "fake: no device", sizeof "fake: no device");
    return MUONSHARD_ERR_UNAVAILABLE;
}

__attribute__((visibility("default"))) const plugin_entry *muonshard_cuda_plugin(void);

const plugin_entry *muonshard_cuda_plugin(void) {
    static const plugin_entry entry = {.abi = FAKE_ABI, .open = open_nothing};
    return &entry;
}
