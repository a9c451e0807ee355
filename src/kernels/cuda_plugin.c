/* cuda_plugin.c - the one symbol libmuonshard_cuda is entered through. */
#include "comm/nccl_comm.h"
#include "kernels/cuda.h"
#include "kernels/plugin.h"

__attribute__((visibility("default"))) const plugin_entry *muonshard_cuda_plugin(void);

const plugin_entry *muonshard_cuda_plugin(void) {
    static const plugin_entry entry = {
        .abi = PLUGIN_ABI, .open = cuda_open, .nccl_create = nccl_create, .nccl_adopt = nccl_adopt};
    return &entry;
}
