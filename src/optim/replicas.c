/* replicas.c - parameters are replicas: the same bytes on every rank, at commit and ever after. */
#include <stdlib.h>
#include <xxhash.h>

#include "optim/optimizer.h"

enum { PIECE = 1 << 24 }; /* bytes of a device's memory that are on the host at a time */

/* Bytes [at, at + count) of a tensor's parameters, to the host or back. */
static muonshard_status move(muonshard_optimizer *o, const tensor *t, size_t at, size_t count,
                             void *host, bool back) {
    char *param = (char *)t->param + at;
    const copy_item item = {back ? (void *)param : host, back ? host : (void *)param, count};
    const muonshard_status status = o->backend->ops->copy(o->backend, &item, 1, STREAM_COMPUTE);
    FAIL_IF(status, &o->error, status, "%s", o->backend->error.text);
    return MUONSHARD_OK;
}

static size_t bytes_of(const tensor *t) {
    return t->elements * dtype_size(t->dtype);
}

static size_t piece_at(const tensor *t, size_t at) {
    return bytes_of(t) - at < PIECE ? bytes_of(t) - at : PIECE;
}

/* piece [PIECE], of memory that isn't the host's. */
static muonshard_status hash_tensor(muonshard_optimizer *o, const tensor *t, void *piece,
                                    uint64_t *hash) {
    if (!piece) {
        *hash = XXH64(t->param, bytes_of(t), 0);
        return MUONSHARD_OK;
    }
    *hash = 0;
    for (size_t at = 0; at < bytes_of(t); at += PIECE) {
        TRY(move(o, t, at, piece_at(t, at), piece, false));
        *hash = XXH64(piece, piece_at(t, at), *hash);
    }
    return MUONSHARD_OK;
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

/* What a device's memory goes through, on every rank or none. */
static muonshard_status take_piece(muonshard_optimizer *o, void **piece) {
    *piece = o->backend->streams ? malloc(PIECE) : NULL;
    const muonshard_status status =
        o->backend->streams && !*piece ? MUONSHARD_ERR_MEMORY : MUONSHARD_OK;
    return comm_agree(o->comm, status, &o->error);
}

muonshard_status replicas_check(muonshard_optimizer *o) {
    const size_t count = o->registry.tensor_count;
    void *piece = NULL;
    uint64_t *hashes = malloc((2 * count + 1) * sizeof *hashes);
    muonshard_status status = hashes ? MUONSHARD_OK : MUONSHARD_ERR_MEMORY;
    TRY_GOTO(comm_agree(o->comm, status, &o->error), done);
    TRY_GOTO(take_piece(o, &piece), done);
    for (size_t i = 0; i < count && status == MUONSHARD_OK; i++)
        status = hash_tensor(o, &o->registry.tensors[i], piece, &hashes[i]);
    TRY_GOTO(comm_agree(o->comm, status, &o->error), done);
    status = compare(o, hashes, hashes + count);
done:
    free(piece);
    free(hashes);
    return status;
}

static muonshard_status broadcast_tensor(muonshard_optimizer *o, const tensor *t, void *piece) {
    if (!piece) {
        TRY_COMM(o, comm_broadcast(o->comm, t->param, bytes_of(t), 0));
        return MUONSHARD_OK;
    }
    for (size_t at = 0; at < bytes_of(t); at += PIECE) {
        const size_t count = piece_at(t, at);
        muonshard_status status =
            o->comm->rank == 0 ? move(o, t, at, count, piece, false) : MUONSHARD_OK;
        TRY(comm_agree(o->comm, status, &o->error));
        TRY_COMM(o, comm_broadcast(o->comm, piece, count, 0));
        status = move(o, t, at, count, piece, true);
        TRY(comm_agree(o->comm, status, &o->error));
    }
    return MUONSHARD_OK;
}

muonshard_status replicas_broadcast(muonshard_optimizer *o) {
    void *piece;
    muonshard_status status = take_piece(o, &piece);
    for (size_t i = 0; i < o->registry.tensor_count && status == MUONSHARD_OK; i++)
        status = broadcast_tensor(o, &o->registry.tensors[i], piece);
    free(piece);
    return status;
}
