#include "kernels/plugin.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CUDA_LIBRARY "libmuonshard_cuda.so.0.1"
#define CUDA_DRIVER  "libcuda.so.1"

/* The driver is looked for first: without it, opening the library would cost a third of a second
 * and 200 MB for nothing. Both stay open until the process ends: CUDA does not survive being
 * unloaded. */
muonshard_status plugin_open(const plugin_entry **out, error_text *error) {
    *out = NULL;
    const void *driver = dlopen(CUDA_DRIVER, RTLD_LAZY | RTLD_LOCAL);
    FAIL_IF(!driver, error, MUONSHARD_ERR_UNAVAILABLE, "no CUDA backend: no NVIDIA driver (%s)",
            dlerror());
    void *library = dlopen(CUDA_LIBRARY, RTLD_NOW | RTLD_LOCAL);
    FAIL_IF(!library, error, MUONSHARD_ERR_UNAVAILABLE, "no CUDA backend: %s", dlerror());
    plugin_entry_fn entry;
    *(void **)&entry = dlsym(library, "muonshard_cuda_plugin");
    const plugin_entry *plugin = entry ? entry() : NULL;
    if (plugin && plugin->abi == PLUGIN_ABI) {
        *out = plugin;
        return MUONSHARD_OK;
    }
    const int abi = plugin ? plugin->abi : 0;
    dlclose(library);
    FAIL_IF(!plugin, error, MUONSHARD_ERR_UNAVAILABLE, "no CUDA backend: %s is no muonshard plugin",
            CUDA_LIBRARY);
    return fail(error, MUONSHARD_ERR_UNAVAILABLE,
                "no CUDA backend: %s is of another version (plugin ABI %d, wanted %d)",
                CUDA_LIBRARY, abi, PLUGIN_ABI);
}

muonshard_status backend_open_cuda(cuda_options options, backend **out, error_text *error) {
    const plugin_entry *plugin;
    *out = NULL;
    TRY(plugin_open(&plugin, error));
    return plugin->open(options, out, error);
}

muonshard_status backend_open(backend_choice choice, host_options host, cuda_options cuda,
                              backend **out, error_text *error, char *why, size_t why_size) {
    *out = NULL;
    error_text no_cuda = {"not looked for"};
    const muonshard_status status =
        choice == BACKEND_HOST ? MUONSHARD_ERR_UNAVAILABLE : backend_open_cuda(cuda, out, &no_cuda);
    if (status == MUONSHARD_OK) {
        snprintf(why, why_size, "backend: cuda, %s%s", (*out)->device_text,
                 choice == BACKEND_CUDA ? " (as configured)" : "");
        return MUONSHARD_OK;
    }
    if (choice == BACKEND_CUDA || (choice == BACKEND_AUTO && status != MUONSHARD_ERR_UNAVAILABLE))
        return fail(error, status, "%s", no_cuda.text);
    TRY(backend_open_host(host, out, error));
    snprintf(why, why_size, "backend: host, %s a rank (%s)", (*out)->device_text,
             choice == BACKEND_HOST ? "as configured" : no_cuda.text);
    return MUONSHARD_OK;
}

void backend_close(backend *self) {
    if (self)
        self->ops->destroy(self);
}

size_t muonshard_info(char *text, size_t size) {
    backend *cuda;
    error_text why;
    char device[sizeof cuda->device_text] = "";
    const muonshard_status status = backend_open_cuda((cuda_options){0}, &cuda, &why);
    if (status == MUONSHARD_OK) {
        memcpy(device, cuda->device_text, sizeof device);
        backend_close(cuda);
    }
    const int length =
        snprintf(text, size,
                 "muonshard %d.%d.%d\n"
                 "backend host: fp32, tf32, bf16, fp16; %s kernels, OpenBLAS\n"
                 "%s%s\n"
                 "communicators: self, callbacks, mpi%s\n",
                 MUONSHARD_VERSION_MAJOR, MUONSHARD_VERSION_MINOR, MUONSHARD_VERSION_PATCH,
                 host_isa_name(host_isa_detect()),
                 status ? "not available: " : "backend cuda: ", status ? why.text : device,
                 status ? "" : ", nccl");
    return length < 0 ? 0 : (size_t)length;
}
