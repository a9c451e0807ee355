#include "gpt_device.h"

#include <dlfcn.h>
#include <stdio.h>

#define GPT_CUDA_LIBRARY "libmuonshard_gpt_cuda.so.0.1"

/* The library stays open until the process ends: CUDA does not survive being unloaded. */
gpt_layers *gpt_device_open(gpt_cuda_math math, int device, void *stream, char *message,
                            size_t size) {
    void *library = dlopen(GPT_CUDA_LIBRARY, RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        snprintf(message, size, "no GPT on CUDA: %s", dlerror());
        return NULL;
    }
    gpt_device_entry_fn find;
    *(void **)&find = dlsym(library, "muonshard_gpt_cuda");
    const gpt_device_entry *entry = find ? find() : NULL;
    if (entry && entry->abi == GPT_DEVICE_ABI)
        /* cppcheck-suppress resourceLeak */
        return entry->open(math, device, stream, message, size);
    snprintf(message, size, "no GPT on CUDA: %s is of another version", GPT_CUDA_LIBRARY);
    dlclose(library);
    return NULL;
}
