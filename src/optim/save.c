/* save.c - a checkpoint is written: every rank's image to its file, by a thread if that is wanted;
 * then, when all are there, the manifest. */
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "fault.h"
#include "optim/checkpoint.h"
#include "whole_file.h"

/* ---- common to saving and loading ---- */

static void mark(muonshard_optimizer *o, const char *phase) {
    comm_mark(o->comm, o->step, "%s", phase);
    fault_point(phase);
}

double checkpoint_enter(muonshard_optimizer *o, const char *phase) {
    const double outside = o->comm->options.timeout_s;
    mark(o, phase);
    o->comm->options.timeout_s = o->settings->save_timeout_s;
    return outside;
}

void checkpoint_leave(muonshard_optimizer *o, double timeout_s) {
    comm_mark(o->comm, 0, "between steps");
    o->comm->options.timeout_s = timeout_s;
}

muonshard_status checkpoint_facts(muonshard_optimizer *o, image_facts *facts) {
    step_record record;
    const copy_item item = {&record, o->memory.record, sizeof record};
    const muonshard_status status = o->backend->ops->copy(o->backend, &item, 1, STREAM_COMPUTE);
    FAIL_IF(status, &o->error, status, "%s", o->backend->error.text);
    *facts = (image_facts){.step = o->step,
                           .count = record.count,
                           .rank = o->comm->rank,
                           .world_size = o->comm->size,
                           .tensors = state_tensors_hash(&o->registry)};
    return MUONSHARD_OK;
}

/* ---- a rank's file ---- */

static muonshard_status write_image(saver *s) {
    whole_file file = WHOLE_FILE_NONE;
    muonshard_status status;
    TRY_GOTO(whole_file_begin(&file, s->file, &s->error), done);
    TRY_GOTO(whole_file_write(&file, s->staging, s->bytes, &s->error), done);
    TRY_GOTO(whole_file_end(&file, &s->error), done);
    s->hash = file.hash;
done:
    whole_file_close(&file);
    return status;
}

static void *run_writer(void *argument) {
    saver *s = argument;
    s->status = write_image(s);
    atomic_store_explicit(&s->written, true, memory_order_release);
    return NULL;
}

/* Signals are the program's, and its threads'. */
static muonshard_status start_writer(saver *s) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    const int code = pthread_create(&s->thread, NULL, run_writer, s);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    FAIL_IF(code != 0, &s->error, MUONSHARD_ERR_MEMORY, "no thread to write with: %s",
            strerror(code));
    s->threaded = true;
    return MUONSHARD_OK;
}

static void join_writer(saver *s) {
    if (s->threaded)
        pthread_join(s->thread, NULL);
    s->threaded = false;
}

/* By the deadline the thread may hang in the file system: it keeps what it has. */
static muonshard_status wait_writer(muonshard_optimizer *o, saver *s) {
    const double begin = now_s(), deadline = o->settings->save_timeout_s;
    while (!atomic_load_explicit(&s->written, memory_order_acquire)) {
        const double waited = now_s() - begin;
        FAIL_IF(waited > deadline, &o->error, MUONSHARD_ERR_TIMEOUT,
                "rank %d (host %s): %s: not written within %g s", o->comm->rank, o->comm->host,
                s->file, deadline);
        comm_back_off(waited);
    }
    join_writer(s);
    FAIL_IF(s->status, &o->error, s->status, "%s", s->error.text);
    return MUONSHARD_OK;
}

/* ---- staging ---- */

static void free_staging(const muonshard_optimizer *o, saver *s) {
    if (runs_ahead(o))
        o->backend->streams->free_pinned(o->backend, s->staging);
    else
        free(s->staging);
    s->staging = NULL;
    s->room = 0;
}

static muonshard_status make_staging(muonshard_optimizer *o, saver *s, size_t bytes) {
    if (s->room >= bytes)
        return MUONSHARD_OK;
    free_staging(o, s);
    void *memory = NULL;
    muonshard_status status = MUONSHARD_ERR_MEMORY;
    if (runs_ahead(o))
        status = o->backend->streams->alloc_pinned(o->backend, &memory, bytes);
    else if ((memory = malloc(bytes)))
        status = MUONSHARD_OK;
    FAIL_IF(status, &o->error, status, "staging of %zu bytes: out of memory", bytes);
    s->staging = memory;
    s->room = bytes;
    o->stats.bytes_staging = (int64_t)bytes;
    return MUONSHARD_OK;
}

static muonshard_status stage(muonshard_optimizer *o, saver *s) {
    image made;
    TRY(checkpoint_facts(o, &s->facts));
    TRY(image_make(o, &s->facts, &made, &o->error));
    muonshard_status status = make_staging(o, s, made.bytes);
    if (status == MUONSHARD_OK)
        status = image_fill(o, &made, s->staging);
    s->bytes = made.bytes;
    image_free(&made);
    return status;
}

/* ---- begin ---- */

static void forget(saver *s) {
    free(s->directory);
    free(s->path);
    free(s->file);
    free(s->user);
    s->directory = s->path = s->file = s->user = NULL;
    s->open = false;
}

void saver_free(muonshard_optimizer *o) {
    saver *s = o->saver;
    if (!s)
        return;
    if (s->threaded) {
        /* It ends when the file system lets it; a save that is not waited for is none. */
        const double begin = now_s();
        while (!atomic_load(&s->written) && now_s() - begin < o->settings->save_timeout_s)
            comm_back_off(now_s() - begin);
        if (!atomic_load(&s->written)) {
            pthread_detach(s->thread);
            return;
        }
        join_writer(s);
    }
    free_staging(o, s);
    forget(s);
    free(s);
    o->saver = NULL;
}

/* A thread writes there, and the manifest comes later, wherever the program is by then. Own. */
static char *absolute(const char *path) {
    if (*path == '/')
        return strdup(path);
    char *here = getcwd(NULL, 0);
    char *whole = here ? series_path(here, path) : NULL;
    free(here);
    return whole;
}

static muonshard_status keep_texts(muonshard_optimizer *o, saver *s, const char *directory,
                                   const muonshard_save_args *args) {
    s->keep = args->keep;
    s->directory = absolute(directory);
    s->user = strdup(args->user ? args->user : "");
    FAIL_IF(!s->directory || !s->user, &o->error, MUONSHARD_ERR_MEMORY, "out of memory");
    return MUONSHARD_OK;
}

/* Rank 0 makes the directory, and all learn its name. */
static muonshard_status agree_on_path(muonshard_optimizer *o, saver *s) {
    char name[64] = "";
    muonshard_status status = MUONSHARD_OK;
    if (o->comm->rank == 0) {
        status = series_new(s->directory, s->facts.step, &s->path, &o->error);
        if (status == MUONSHARD_OK)
            snprintf(name, sizeof name, "%s", strrchr(s->path, '/') + 1);
    }
    TRY(comm_agree(o->comm, status, &o->error));
    TRY_COMM(o, comm_broadcast(o->comm, name, sizeof name, 0));
    char file[SERIES_FILE];
    series_file(o->comm->rank, file);
    if (o->comm->rank != 0)
        s->path = series_path(s->directory, name);
    s->file = s->path ? series_path(s->path, file) : NULL;
    if (!s->file)
        status = fail(&o->error, MUONSHARD_ERR_MEMORY, "out of memory");
    return comm_agree(o->comm, status, &o->error);
}

/* Whatever a save that timed out came to later: its memory can be used again. */
static void take_back(saver *s) {
    if (!s->threaded || s->open || !atomic_load_explicit(&s->written, memory_order_acquire))
        return;
    join_writer(s);
    forget(s);
}

static muonshard_status check_save(muonshard_optimizer *o, const char *directory,
                                   const muonshard_save_args *args) {
    FAIL_IF(!directory || !*directory, &o->error, MUONSHARD_ERR_ARGUMENT, "save: directory is %s",
            directory ? "empty" : "NULL");
    FAIL_IF(args->keep < 0, &o->error, MUONSHARD_ERR_ARGUMENT,
            "save: keep is %d; 0 or more are allowed", args->keep);
    FAIL_IF(args->user && !manifest_takes(args->user), &o->error, MUONSHARD_ERR_ARGUMENT,
            "save: user is not UTF-8");
    FAIL_IF(o->open && !o->called, &o->error, MUONSHARD_ERR_STATE,
            "save: gradients are marked for step %lld, which has not been taken",
            (long long)o->step);
    if (!o->saver) {
        o->saver = calloc(1, sizeof *o->saver);
        FAIL_IF(!o->saver, &o->error, MUONSHARD_ERR_MEMORY, "out of memory");
    }
    take_back(o->saver);
    FAIL_IF(o->saver->threaded && !o->saver->open, &o->error, MUONSHARD_ERR_STATE,
            "save: %s, of one that timed out, is still being written", o->saver->file);
    return MUONSHARD_OK;
}

/* A thread writes even where it is waited for at once: what hangs in a file system can't look at a
 * clock. */
static muonshard_status begin_save(muonshard_optimizer *o, const char *directory,
                                   const muonshard_save_args *args) {
    saver *s = o->saver;
    muonshard_status status = keep_texts(o, s, directory, args);
    if (status == MUONSHARD_OK)
        status = stage(o, s);
    TRY(comm_agree(o->comm, status, &o->error));
    TRY(agree_on_path(o, s));
    fault_point("save begin");
    atomic_store(&s->written, false);
    s->status = MUONSHARD_OK;
    s->open = true;
    if (start_writer(s) != MUONSHARD_OK)
        run_writer(s);
    return MUONSHARD_OK;
}

/* What there is of a save that failed would only fill the disk. All ranks know that it did, or else
 * it may be complete. */
static void discard(muonshard_optimizer *o, const saver *s) {
    error_text why;
    if (o->comm->rank == 0 && !o->comm->dead && s->path && series_remove(s->path, &why))
        comm_log(o->comm, MUONSHARD_LOG_WARNING, "%s", why.text);
}

muonshard_status muonshard_save(muonshard_optimizer *o, const char *directory,
                                const muonshard_save_args *args) {
    TRY(optimizer_check(o));
    muonshard_save_args own = MUONSHARD_SAVE_ARGS_INIT;
    muonshard_status status = MUONSHARD_OK;
    const double outside = checkpoint_enter(o, "save");
    if (args)
        status = take_struct(&o->error, &own, sizeof own, args, "save arguments");
    if (status == MUONSHARD_OK)
        status = check_save(o, directory, &own);
    TRY_GOTO(comm_agree(o->comm, status, &o->error), done);
    TRY_GOTO(checkpoint_settle(o, "save"), done);
    status = begin_save(o, directory, &own);
    if (status) {
        discard(o, o->saver);
        forget(o->saver);
    } else if (!own.defer) {
        status = muonshard_save_wait(o);
    }
done:
    checkpoint_leave(o, outside);
    return status;
}

/* ---- end ---- */

static muonshard_status write_manifest(muonshard_optimizer *o, const saver *s, manifest *m,
                                       char *config) {
    whole_file file = WHOLE_FILE_NONE;
    char *text = NULL, *path = series_path(s->path, MANIFEST_NAME);
    size_t length;
    muonshard_status status = MUONSHARD_OK;
    m->config = config;
    m->user = s->user;
    if (!path)
        TRY_GOTO(fail(&o->error, MUONSHARD_ERR_MEMORY, "out of memory"), done);
    TRY_GOTO(manifest_take_tensors(m, &o->registry, &o->error), done);
    TRY_GOTO(manifest_write(m, &text, &length, &o->error), done);
    TRY_GOTO(whole_file_begin(&file, path, &o->error), done);
    TRY_GOTO(whole_file_write(&file, text, length, &o->error), done);
    status = whole_file_end(&file, &o->error);
done:
    whole_file_close(&file);
    free(text);
    free(path);
    return status;
}

/* Rank 0, once all ranks have written: what it doesn't see, in a directory that is every host's
 * own, is no part of a checkpoint. What can't be removed is no failure of the save. */
static muonshard_status complete(muonshard_optimizer *o, const saver *s, manifest *m) {
    TRY(series_check_files(s->path, m, &o->error));
    const size_t size = muonshard_config_dump(o->config, NULL, 0) + 1;
    char *config = malloc(size);
    FAIL_IF(!config, &o->error, MUONSHARD_ERR_MEMORY, "out of memory");
    muonshard_config_dump(o->config, config, size);
    const muonshard_status status = write_manifest(o, s, m, config);
    free(config);
    TRY(status);
    error_text why;
    if (series_prune(s->directory, s->path, s->keep, &why))
        comm_log(o->comm, MUONSHARD_LOG_WARNING, "%s", why.text);
    return MUONSHARD_OK;
}

/* Ranks that have written wait for those whose file is late, until those have given up and said so:
 * one slow file is an error of all, and no rank's end. */
static muonshard_status agree_on_files(muonshard_optimizer *o, saver *s) {
    const double deadline = o->comm->options.timeout_s;
    const muonshard_status own = wait_writer(o, s);
    o->comm->options.timeout_s = o->settings->save_timeout_s + o->settings->timeout_s;
    const muonshard_status status = comm_agree(o->comm, own, &o->error);
    o->comm->options.timeout_s = deadline;
    return status;
}

static muonshard_status end_save(muonshard_optimizer *o, saver *s) {
    fault_point("save end");
    TRY(agree_on_files(o, s));
    manifest m = {.step = s->facts.step,
                  .count = s->facts.count,
                  .world_size = o->comm->size,
                  .files = calloc((size_t)o->comm->size, sizeof *m.files)};
    const manifest_file own = {s->bytes, s->hash};
    muonshard_status status =
        m.files ? MUONSHARD_OK : fail(&o->error, MUONSHARD_ERR_MEMORY, "out of memory");
    TRY_GOTO(comm_agree(o->comm, status, &o->error), done);
    status = comm_allgather(o->comm, &own, m.files, sizeof own);
    if (status)
        TRY_GOTO(fail(&o->error, status, "%s", o->comm->error.text), done);
    fault_point("save complete");
    if (o->comm->rank == 0)
        status = complete(o, s, &m);
    status = comm_agree(o->comm, status, &o->error);
done:
    manifest_free(&m);
    return status;
}

muonshard_status muonshard_save_test(const muonshard_optimizer *o, int *done) {
    if (!o)
        return MUONSHARD_ERR_ARGUMENT;
    /* Const is for the optimizer; the text of the last error may change. */
    FAIL_IF(!done, &((muonshard_optimizer *)o)->error, MUONSHARD_ERR_ARGUMENT, "done is NULL");
    const saver *s = o->saver;
    *done = !s || !s->open || atomic_load_explicit(&s->written, memory_order_acquire);
    return MUONSHARD_OK;
}

muonshard_status muonshard_save_wait(muonshard_optimizer *o) {
    TRY(optimizer_check(o));
    if (!o->saver || !o->saver->open)
        return MUONSHARD_OK;
    const double outside = checkpoint_enter(o, "save");
    const muonshard_status status = end_save(o, o->saver);
    if (status)
        discard(o, o->saver);
    if (!o->saver->threaded) /* else the file's name is the thread's still */
        forget(o->saver);
    o->saver->open = false;
    checkpoint_leave(o, outside);
    return status;
}

static muonshard_status settle_steps(muonshard_optimizer *o) {
    if (o->open)
        TRY(step_run_until(o, o->schedule.count));
    TRY(settle_until(o, o->step));
    return step_join(o, o->stream);
}

muonshard_status checkpoint_settle(muonshard_optimizer *o, const char *phase) {
    TRY(muonshard_save_wait(o));
    TRY(settle_steps(o));
    mark(o, phase);
    return MUONSHARD_OK;
}

/* ---- memory of the caller's ---- */

muonshard_status muonshard_state_size(const muonshard_optimizer *o, size_t *bytes) {
    if (!o)
        return MUONSHARD_ERR_ARGUMENT;
    error_text *error = &((muonshard_optimizer *)o)->error; /* as above */
    FAIL_IF(!bytes, error, MUONSHARD_ERR_ARGUMENT, "bytes is NULL");
    FAIL_IF(!o->committed, error, MUONSHARD_ERR_STATE, "muonshard_commit comes first");
    image made;
    const image_facts facts = {.rank = o->comm->rank, .world_size = o->comm->size};
    TRY(image_make(o, &facts, &made, error));
    *bytes = made.bytes;
    image_free(&made);
    return MUONSHARD_OK;
}

muonshard_status muonshard_save_memory(muonshard_optimizer *o, void *memory, size_t bytes) {
    TRY(optimizer_check(o));
    image made;
    image_facts facts;
    FAIL_IF(!memory, &o->error, MUONSHARD_ERR_ARGUMENT, "save: memory is NULL");
    FAIL_IF(o->open, &o->error, MUONSHARD_ERR_STATE, "save: step %lld is not finished",
            (long long)o->step);
    TRY(settle_steps(o));
    TRY(checkpoint_facts(o, &facts));
    TRY(image_make(o, &facts, &made, &o->error));
    muonshard_status status = MUONSHARD_OK;
    if (bytes < made.bytes)
        status = fail(&o->error, MUONSHARD_ERR_ARGUMENT, "save: %zu bytes; %zu are needed", bytes,
                      made.bytes);
    else
        status = image_fill(o, &made, memory);
    image_free(&made);
    return status;
}
