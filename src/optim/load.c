/* load.c - continuing from a checkpoint: everything is read and checked before anything is
 * replaced.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <xxhash.h>

#include "fault.h"
#include "optim/checkpoint.h"

/* ---- the state ---- */

static muonshard_status set_count(muonshard_optimizer *o, int64_t count) {
    step_record record;
    const copy_item out = {&record, o->memory.record, sizeof record};
    const copy_item in = {o->memory.record, &record, sizeof record};
    muonshard_status status = o->backend->ops->copy(o->backend, &out, 1, STREAM_COMPUTE);
    record.count = count;
    if (status == MUONSHARD_OK)
        status = o->backend->ops->copy(o->backend, &in, 1, STREAM_COMPUTE);
    FAIL_IF(status, &o->error, status, "%s", o->backend->error.text);
    return MUONSHARD_OK;
}

/* From here on a failure leaves a mixture. */
static muonshard_status replace(muonshard_optimizer *o, const image_set *set,
                                const state_list *wanted) {
    fault_point("load replace");
    TRY(image_set_read(set, o, wanted, true));
    TRY(commit_fill_masters(o));
    TRY(image_set_read(set, o, wanted, false));
    TRY(set_count(o, image_set_facts(set)->count));
    return step_give_back(o, o->stream);
}

/* An error names the checkpoint as well. */
static muonshard_status in_checkpoint(muonshard_optimizer *o, const char *path,
                                      muonshard_status status) {
    return status && path ? fail(&o->error, status, "%s: %s", path, o->error.text) : status;
}

/* What a manifest says of its files, and what they say of themselves. `m` may be NULL. */
static muonshard_status check_manifest(const manifest *m, const image_facts *facts,
                                       error_text *error) {
    FAIL_IF(m && (m->step != facts->step || m->count != facts->count ||
                  m->world_size != facts->world_size),
            error, MUONSHARD_ERR_FORMAT,
            "the manifest is of step %" PRId64 " of %d ranks, files of step %" PRId64 " of %d",
            m->step, m->world_size, facts->step, facts->world_size);
    return MUONSHARD_OK;
}

static muonshard_status check_images(muonshard_optimizer *o, const manifest *m,
                                     const image_source *sources, size_t count,
                                     const muonshard_load_args *args, image_set **set,
                                     state_list *wanted) {
    TRY(image_set_open(&o->registry, sources, count, set, &o->error));
    TRY(check_manifest(m, image_set_facts(*set), &o->error));
    TRY(state_wanted(o, !args->keep_params, wanted, &o->error));
    return image_set_check(*set, &o->registry, wanted, o->settings->init_master != 0, &o->error);
}

/* All ranks have the same step before them, or none goes on. Collective. */
static muonshard_status compare_facts(muonshard_optimizer *o, const image_facts *facts) {
    int64_t first[2] = {facts->step, facts->count};
    TRY_COMM(o, comm_broadcast(o->comm, first, sizeof first, 0));
    muonshard_status status = MUONSHARD_OK;
    if (first[0] != facts->step || first[1] != facts->count)
        status = fail(&o->error, MUONSHARD_ERR_MISMATCH,
                      "images of step %" PRId64 " here, of step %" PRId64 " on rank 0", facts->step,
                      first[0]);
    return comm_agree(o->comm, status, &o->error);
}

static void take_step(muonshard_optimizer *o, const image_facts *facts) {
    o->step = o->settled = facts->step;
    o->next = 0;
    memset(o->results, 0, sizeof o->results);
}

/* Collective. `local`: an error found before, which becomes everybody's. `path` and
 * `m` are of the checkpoint: NULL for images in memory. */
static muonshard_status load_images(muonshard_optimizer *o, muonshard_status local,
                                    const char *path, const manifest *m,
                                    const image_source *sources, size_t count,
                                    const muonshard_load_args *args, image_facts *facts) {
    image_set *set = NULL;
    state_list wanted = {NULL, 0};
    muonshard_status status = local;
    if (status == MUONSHARD_OK)
        status = in_checkpoint(o, path, check_images(o, m, sources, count, args, &set, &wanted));
    TRY_GOTO(comm_agree(o->comm, status, &o->error), done);
    *facts = *image_set_facts(set);
    TRY_GOTO(compare_facts(o, facts), done);
    status = comm_agree(o->comm, replace(o, set, &wanted), &o->error);
    if (status == MUONSHARD_OK)
        status = replicas_check(o);
    if (status)
        step_kill(o, status, &o->error);
    else
        take_step(o, facts);
done:
    image_set_close(set);
    state_free(&wanted);
    return status;
}

/* ---- a checkpoint ---- */

/* Rank 0's manifest on every rank. Collective. */
static muonshard_status share_manifest(muonshard_optimizer *o, const char *path, manifest *m) {
    char *text = NULL, *where = series_path(path, MANIFEST_NAME);
    size_t length = 0;
    muonshard_status status = MUONSHARD_OK;
    *m = (manifest){.files = NULL};
    if (!where)
        status = fail(&o->error, MUONSHARD_ERR_MEMORY, "out of memory");
    else if (o->comm->rank == 0)
        status = series_read_manifest(path, &text, &length, &o->error);
    TRY_GOTO(comm_agree(o->comm, status, &o->error), done);
    status = comm_broadcast(o->comm, &length, sizeof length, 0);
    if (status == MUONSHARD_OK && o->comm->rank != 0 && !(text = malloc(length + 1)))
        status = fail(&o->error, MUONSHARD_ERR_MEMORY, "%s: out of memory", where);
    TRY_GOTO(comm_agree(o->comm, status, &o->error), done);
    status = comm_broadcast(o->comm, text, length, 0);
    if (status == MUONSHARD_OK)
        status = manifest_read(where, text, length, m, &o->error);
    if (status == MUONSHARD_OK)
        status = manifest_check_tensors(m, where, &o->registry, &o->error);
    status = comm_agree(o->comm, status, &o->error);
    if (status)
        manifest_free(m);
done:
    free(text);
    free(where);
    return status;
}

/* Every byte of a file. */
static muonshard_status check_file(const image_source *file, uint64_t expected, error_text *error) {
    enum { CHUNK = 1 << 20 };
    int opened;
    TRY(image_source_open(file, &opened, error));
    XXH3_state_t *hashing = XXH3_createState();
    char *chunk = malloc(CHUNK);
    muonshard_status status = MUONSHARD_OK;
    if (!hashing || !chunk) {
        status = fail(error, MUONSHARD_ERR_MEMORY, "out of memory");
    } else {
        XXH3_64bits_reset(hashing);
        ssize_t got;
        while ((got = read(opened, chunk, CHUNK)) > 0 || (got < 0 && errno == EINTR))
            if (got > 0)
                XXH3_64bits_update(hashing, chunk, (size_t)got);
        if (got < 0)
            status = fail(error, MUONSHARD_ERR_IO, "%s: cannot be read: %s", file->name,
                          strerror(errno));
        else if (XXH3_64bits_digest(hashing) != expected)
            status = fail(error, MUONSHARD_ERR_FORMAT, "%s: its checksum says that it is damaged",
                          file->name);
    }
    free(chunk);
    XXH3_freeState(hashing);
    close(opened);
    return status;
}

/* Ranks check the files by turns. */
static muonshard_status open_files(const muonshard_optimizer *o, const manifest *m, int directory,
                                   image_source *files, error_text *error) {
    for (int r = 0; r < m->world_size; r++) {
        files[r] = (image_source){.directory = directory, .bytes = (size_t)m->files[r].bytes};
        series_file(r, files[r].name);
    }
    for (int r = o->comm->rank; r < m->world_size; r += o->comm->size)
        TRY(check_file(&files[r], m->files[r].hash, error));
    return MUONSHARD_OK;
}

static muonshard_status keep_result(muonshard_optimizer *o, const char *path, const manifest *m) {
    char *own_path = strdup(path), *user = strdup(m ? m->user : "");
    if (!own_path || !user) {
        free(own_path);
        free(user);
        return fail(&o->error, MUONSHARD_ERR_MEMORY, "out of memory");
    }
    free(o->loaded_path);
    free(o->loaded_user);
    o->loaded_path = own_path;
    o->loaded_user = user;
    return MUONSHARD_OK;
}

/* Collective. */
static muonshard_status load_checkpoint(muonshard_optimizer *o, const char *path,
                                        const muonshard_load_args *args, image_facts *facts) {
    manifest m;
    TRY(share_manifest(o, path, &m));
    const int directory = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    image_source *files = calloc((size_t)m.world_size, sizeof *files);
    muonshard_status status = MUONSHARD_OK;
    if (!files)
        status = fail(&o->error, MUONSHARD_ERR_MEMORY, "out of memory");
    else if (directory < 0)
        status = fail(&o->error, MUONSHARD_ERR_IO, "%s: cannot be read: %s", path, strerror(errno));
    else
        status = in_checkpoint(o, path, open_files(o, &m, directory, files, &o->error));
    TRY_GOTO(comm_agree(o->comm, status, &o->error), done);
    status = load_images(o, keep_result(o, path, &m), path, &m, files, (size_t)m.world_size, args,
                         facts);
done:
    free(files);
    if (directory >= 0)
        close(directory);
    manifest_free(&m);
    return status;
}

/* ---- which ---- */

enum { PATH_ROOM = 4096 };

/* Rank 0: what there is to try, newest first. A checkpoint itself is the only one. */
typedef struct candidates {
    const char *directory;
    series_entry *entries; /* own */
    size_t count, next;
    bool itself;
} candidates;

static muonshard_status find_candidates(candidates *c, const char *directory, error_text *error) {
    char *manifest_path = series_path(directory, MANIFEST_NAME);
    FAIL_IF(!manifest_path, error, MUONSHARD_ERR_MEMORY, "out of memory");
    *c = (candidates){.directory = directory, .itself = access(manifest_path, F_OK) == 0};
    free(manifest_path);
    if (!c->itself)
        return series_list(directory, &c->entries, &c->count, error);
    c->count = 1;
    return MUONSHARD_OK;
}

/* Empty: there are no more. One without a manifest was never complete, and is no news. */
static muonshard_status next_candidate(candidates *c, char *path, error_text *error) {
    path[0] = '\0';
    while (c->next < c->count && !path[0]) {
        const size_t i = c->next++;
        const int length =
            c->itself ? snprintf(path, PATH_ROOM, "%s", c->directory)
                      : snprintf(path, PATH_ROOM, "%s/%s", c->directory, c->entries[i].name);
        FAIL_IF(length >= PATH_ROOM, error, MUONSHARD_ERR_ARGUMENT, "load: the path is too long");
        char *manifest_path = series_path(path, MANIFEST_NAME);
        FAIL_IF(!manifest_path, error, MUONSHARD_ERR_MEMORY, "out of memory");
        if (access(manifest_path, F_OK) != 0 && errno == ENOENT)
            path[0] = '\0';
        free(manifest_path);
    }
    return MUONSHARD_OK;
}

/* The next candidate on every rank. Collective. */
static muonshard_status share_candidate(muonshard_optimizer *o, candidates *c, char *path) {
    muonshard_status status =
        o->comm->rank == 0 ? next_candidate(c, path, &o->error) : MUONSHARD_OK;
    TRY(comm_agree(o->comm, status, &o->error));
    TRY_COMM(o, comm_broadcast(o->comm, path, PATH_ROOM, 0));
    return MUONSHARD_OK;
}

/* Newest first, past those that are damaged; what there is to try is known to rank 0 alone, so that
 * it is asked for the next even where there was one only. *facts of step -1: there is none.
 * Collective. */
static muonshard_status load_newest(muonshard_optimizer *o, candidates *c,
                                    const muonshard_load_args *args, image_facts *facts) {
    char path[PATH_ROOM] = "";
    muonshard_status found = MUONSHARD_OK;
    facts->step = -1;
    for (;;) {
        TRY(share_candidate(o, c, path));
        if (!path[0])
            return found;
        found = load_checkpoint(o, path, args, facts);
        if (found == MUONSHARD_OK || o->dead || o->comm->dead ||
            (found != MUONSHARD_ERR_FORMAT && found != MUONSHARD_ERR_IO))
            return found;
        facts->step = -1;
        if (o->comm->rank == 0 && !c->itself)
            comm_log(o->comm, MUONSHARD_LOG_WARNING, "passed over: %s", o->error.text);
    }
}

/* The result too: once the state is replaced it is too late to find that it can't be given. */
static muonshard_status check_load(muonshard_optimizer *o, const muonshard_load_args *args,
                                   muonshard_load_args *own, const muonshard_load_result *result) {
    muonshard_load_result unused = MUONSHARD_LOAD_RESULT_INIT;
    if (args)
        TRY(take_struct(&o->error, own, sizeof *own, args, "load arguments"));
    if (result)
        TRY(take_struct(&o->error, &unused, sizeof unused, result, "load result"));
    FAIL_IF(o->open, &o->error, MUONSHARD_ERR_STATE, "load: step %lld is not finished",
            (long long)o->step);
    return MUONSHARD_OK;
}

static muonshard_status give_result(muonshard_optimizer *o, const image_facts *facts,
                                    muonshard_load_result *result) {
    const bool found = facts->step >= 0;
    muonshard_load_result own = MUONSHARD_LOAD_RESULT_INIT;
    if (found)
        own = (muonshard_load_result){.size = sizeof own,
                                      .found = 1,
                                      .world_size = facts->world_size,
                                      .step = facts->step,
                                      .count = facts->count,
                                      .path = o->loaded_path,
                                      .user = o->loaded_user};
    return result ? give_struct(&o->error, &own, sizeof own, result, "load result") : MUONSHARD_OK;
}

muonshard_status muonshard_load(muonshard_optimizer *o, const char *directory,
                                const muonshard_load_args *args, muonshard_load_result *result) {
    TRY(optimizer_check(o));
    muonshard_load_args own = MUONSHARD_LOAD_ARGS_INIT;
    candidates c = {.entries = NULL};
    image_facts facts;
    const double outside = checkpoint_enter(o, "load");
    muonshard_status status = check_load(o, args, &own, result);
    if (status == MUONSHARD_OK && (!directory || !*directory))
        status = fail(&o->error, MUONSHARD_ERR_ARGUMENT, "load: directory is %s",
                      directory ? "empty" : "NULL");
    TRY_GOTO(comm_agree(o->comm, status, &o->error), done);
    TRY_GOTO(checkpoint_settle(o, "load"), done); /* a save completes and removes: look then */
    if (o->comm->rank == 0)
        status = find_candidates(&c, directory, &o->error);
    TRY_GOTO(comm_agree(o->comm, status, &o->error), done);
    TRY_GOTO(load_newest(o, &c, &own, &facts), done);
    if (facts.step < 0 && !own.optional)
        TRY_GOTO(fail(&o->error, MUONSHARD_ERR_IO, "%s: no complete checkpoint in it", directory),
                 done);
    status = give_result(o, &facts, result);
done:
    free(c.entries);
    checkpoint_leave(o, outside);
    return status;
}

/* ---- memory of the caller's ---- */

static muonshard_status check_memory(muonshard_optimizer *o, const void *const *images,
                                     const size_t *bytes, size_t count, image_source *sources) {
    FAIL_IF(!sources, &o->error, MUONSHARD_ERR_MEMORY, "out of memory");
    FAIL_IF(!images || !bytes || !count, &o->error, MUONSHARD_ERR_ARGUMENT, "load: no images");
    for (size_t i = 0; i < count; i++) {
        FAIL_IF(!images[i], &o->error, MUONSHARD_ERR_ARGUMENT, "load: image %zu is NULL", i);
        sources[i] = (image_source){.memory = images[i], .directory = -1, .bytes = bytes[i]};
        snprintf(sources[i].name, sizeof sources[i].name, "image %zu", i);
    }
    return MUONSHARD_OK;
}

muonshard_status muonshard_load_memory(muonshard_optimizer *o, const void *const *images,
                                       const size_t *bytes, size_t count,
                                       const muonshard_load_args *args,
                                       muonshard_load_result *result) {
    TRY(optimizer_check(o));
    muonshard_load_args own = MUONSHARD_LOAD_ARGS_INIT;
    image_facts facts = {.step = -1};
    const double outside = checkpoint_enter(o, "load");
    image_source *sources = calloc(count ? count : 1, sizeof *sources);
    muonshard_status status = check_load(o, args, &own, result);
    if (status == MUONSHARD_OK)
        status = check_memory(o, images, bytes, count, sources);
    TRY_GOTO(comm_agree(o->comm, status, &o->error), done);
    TRY_GOTO(checkpoint_settle(o, "load"), done);
    TRY_GOTO(load_images(o, keep_result(o, "", NULL), NULL, NULL, sources, count, &own, &facts),
             done);
    status = give_result(o, &facts, result);
done:
    free(sources);
    checkpoint_leave(o, outside);
    return status;
}
