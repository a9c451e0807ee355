/* replicas.c - parameters are replicas: the same bytes on every rank, at commit and ever after. */
#include <stdlib.h>
#include <xxhash.h>

#include "optim/optimizer.h"

static uint64_t hash_tensor(const tensor *t) {
    return XXH64(t->param, t->elements * dtype_size(t->dtype), 0);
}

/* hashes [tensor_count] of this rank against rank 0's. */
static muonshard_status compare(muonshard_optimizer *o, const uint64_t *hashes, uint64_t *first) {
    const size_t count = o->registry.tensor_count;
    for (size_t i = 0; i < count; i++)
        first[i] = hashes[i];
    TRY_COMM(o, comm_broadcast(o->comm, first, count * sizeof *first, 0));
    error_text text = {""};
    muonshard_status status = MUONSHARD_OK;
    for (size_t i = 0; i < count && status == MUONSHARD_OK; i++)
        if (hashes[i] != first[i])
            status = fail(&text, MUONSHARD_ERR_MISMATCH,
                          "parameters of tensor '%s' on rank %d differ from rank 0's",
                          o->registry.tensors[i].name, o->comm->rank);
    status = comm_agree(o->comm, status, &text);
    FAIL_IF(status, &o->error, status, "%s", text.text);
    return MUONSHARD_OK;
}

muonshard_status replicas_check(muonshard_optimizer *o) {
    const size_t count = o->registry.tensor_count;
    uint64_t *hashes = malloc((2 * count + 1) * sizeof *hashes);
    muonshard_status status = hashes ? MUONSHARD_OK : MUONSHARD_ERR_MEMORY;
    status = comm_agree(o->comm, status, &o->error);
    if (status == MUONSHARD_OK) {
        for (size_t i = 0; i < count; i++)
            hashes[i] = hash_tensor(&o->registry.tensors[i]);
        status = compare(o, hashes, hashes + count);
    }
    free(hashes);
    return status;
}

muonshard_status replicas_broadcast(muonshard_optimizer *o) {
    for (size_t i = 0; i < o->registry.tensor_count; i++) {
        const tensor *t = &o->registry.tensors[i];
        TRY_COMM(o, comm_broadcast(o->comm, t->param, t->elements * dtype_size(t->dtype), 0));
    }
    return MUONSHARD_OK;
}
