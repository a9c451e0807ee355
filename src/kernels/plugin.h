/* plugin.h - the seam to libmuonshard_cuda: a shared library of its own, opened at run time, so
 * that nothing of CUDA has to be installed where it isn't used. It is entered through one symbol,
 * muonshard_cuda_plugin. */
#ifndef PLUGIN_H
#define PLUGIN_H

#include "kernels/backend.h"

/* Raised by every change of backend.h, program.h or this file. */
#define PLUGIN_ABI 3

typedef struct plugin_entry {
    int abi; /* PLUGIN_ABI it was built with; what follows is read only if that is ours */
    muonshard_status (*open)(backend **out, error_text *error);
} plugin_entry;

typedef const plugin_entry *(*plugin_entry_fn)(void);

#endif
