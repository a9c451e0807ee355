/* replicas.c - parameters are replicas: the same bytes on every rank, at commit and ever after. */
#include <stdio.h>
#include <stdlib.h>
#include <xxhash.h>

#include "optim/optimizer.h"

enum {
    PIECE = 1 << 24,   /* bytes of a device's memory that are on the host at a time */
    GATHERED = 1 << 17 /* hashes, likewise */
};

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

/* all [ranks, count] */
static muonshard_status gather(muonshard_optimizer *o, const uint64_t *own, uint64_t *all,
                               size_t count) {
    TRY_COMM(o, comm_allgather(o->comm, own, all, count * sizeof *own));
    return MUONSHARD_OK;
}

/* Where ranks disagree: the first tensor, and whose copy of it is the odd one. */
typedef struct drift {
    size_t tensors; /* that differ anywhere; 0: none */
    size_t first;
    int same; /* ranks that have what most have; no more than half of them: nobody is the odd one */
    int odd;  /* the first rank that has something else; without a majority, than rank 0 */
} drift;

/* What more than half of the ranks have, where there is such a hash: the majority vote of Boyer and
 * Moore. Rank r's hash is at [r * stride]. */
static uint64_t vote(const uint64_t *hashes, size_t stride, int ranks) {
    uint64_t candidate = 0;
    int lead = 0;
    for (int r = 0; r < ranks; r++) {
        const uint64_t hash = hashes[(size_t)r * stride];
        if (lead == 0)
            candidate = hash;
        lead += hash == candidate ? 1 : -1;
    }
    return candidate;
}

static int count_same(const uint64_t *hashes, size_t stride, int ranks, uint64_t hash) {
    int same = 0;
    for (int r = 0; r < ranks; r++)
        same += hashes[(size_t)r * stride] == hash;
    return same;
}

static void note_tensor(drift *d, size_t index, const uint64_t *hashes, size_t stride, int ranks) {
    if (count_same(hashes, stride, ranks, hashes[0]) == ranks || d->tensors++)
        return;
    uint64_t right = vote(hashes, stride, ranks);
    d->first = index;
    d->same = count_same(hashes, stride, ranks, right);
    if (2 * d->same <= ranks)
        right = hashes[0];
    for (d->odd = 0; hashes[(size_t)d->odd * stride] == right;)
        d->odd++;
}

static muonshard_status report(muonshard_optimizer *o, const drift *d) {
    const char *name = o->registry.tensors[d->first].name;
    const int ranks = o->comm->size, more = ranks - d->same - 1;
    char others[64] = "", rest[64] = "";
    if (d->tensors > 1)
        snprintf(rest, sizeof rest, "; so do those of %zu other tensor%s", d->tensors - 1,
                 d->tensors > 2 ? "s" : "");
    if (2 * d->same <= ranks)
        return fail(&o->error, MUONSHARD_ERR_MISMATCH,
                    "parameters of tensor '%s' differ between rank 0 and rank %d%s%s", name, d->odd,
                    ranks > 2 ? ", and no majority of the ranks agrees" : "", rest);
    if (more)
        snprintf(others, sizeof others, " and %d more", more);
    return fail(&o->error, MUONSHARD_ERR_MISMATCH,
                "parameters of tensor '%s' on rank %d%s differ from those on the other %d ranks%s",
                name, d->odd, others, d->same, rest);
}

/* The ranks are known to differ: hashes [tensor_count] of all of them, some tensors at a time. */
static muonshard_status find_drift(muonshard_optimizer *o, const uint64_t *hashes) {
    const size_t count = o->registry.tensor_count, ranks = (size_t)o->comm->size;
    const size_t most = ranks < GATHERED ? GATHERED / ranks : 1;
    drift d = {.tensors = 0};
    uint64_t *all = malloc((most < count ? most : count) * ranks * sizeof *all);
    muonshard_status status =
        comm_agree(o->comm, all ? MUONSHARD_OK : MUONSHARD_ERR_MEMORY, &o->error);
    for (size_t at = 0; at < count && status == MUONSHARD_OK; at += most) {
        const size_t n = count - at < most ? count - at : most;
        status = gather(o, hashes + at, all, n);
        for (size_t i = 0; i < n && status == MUONSHARD_OK; i++)
            note_tensor(&d, at + i, all + i, n, o->comm->size);
    }
    free(all);
    return status || !d.tensors ? status : report(o, &d);
}

/* hashes [tensor_count] of this rank; one number a rank says whether all have the same. */
static muonshard_status compare(muonshard_optimizer *o, const uint64_t *hashes, uint64_t *digests) {
    const uint64_t own = XXH64(hashes, o->registry.tensor_count * sizeof *hashes, 0);
    TRY(gather(o, &own, digests, 1));
    const bool same = count_same(digests, 1, o->comm->size, own) == o->comm->size;
    return same ? MUONSHARD_OK : find_drift(o, hashes);
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
    uint64_t *hashes = malloc((count + (size_t)o->comm->size) * sizeof *hashes);
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
