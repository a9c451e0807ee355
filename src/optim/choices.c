/* choices.c - what a backend chooses for each batch before the first step, and the file that keeps
 * it. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "optim/optimizer.h"
#include "whole_file.h"

enum { MOST_BYTES = 16 << 20 };

/* NULL: there is no such file, or an error. */
static muonshard_status read_text(const char *path, char **text, error_text *error) {
    *text = NULL;
    FILE *file = fopen(path, "rb");
    if (!file && errno == ENOENT)
        return MUONSHARD_OK;
    FAIL_IF(!file, error, MUONSHARD_ERR_IO, "gemm_table %s: %s", path, strerror(errno));
    char *all = malloc(MOST_BYTES + 1);
    const size_t length = all ? fread(all, 1, MOST_BYTES + 1, file) : 0;
    const bool failed = ferror(file) != 0;
    fclose(file);
    muonshard_status status = MUONSHARD_OK;
    if (!all)
        status = fail(error, MUONSHARD_ERR_MEMORY, "out of memory");
    else if (failed)
        status = fail(error, MUONSHARD_ERR_IO, "gemm_table %s: cannot be read", path);
    else if (length > MOST_BYTES || memchr(all, 0, length))
        status = fail(error, MUONSHARD_ERR_CONFIG, "gemm_table %s: no text of at most %d bytes",
                      path, MOST_BYTES);
    else
        all[length] = 0;
    if (status) {
        free(all);
        all = NULL;
    }
    *text = all;
    return status;
}

static muonshard_status take(muonshard_optimizer *o, const char *path) {
    char *text;
    TRY(read_text(path, &text, &o->error));
    if (!text)
        return MUONSHARD_OK;
    const muonshard_status status = o->backend->streams->take_choices(o->backend, text);
    free(text);
    FAIL_IF(status, &o->error, status, "gemm_table %s: %s", path, o->backend->error.text);
    return MUONSHARD_OK;
}

static muonshard_status keep(muonshard_optimizer *o, const char *path) {
    char *text;
    error_text why = {""};
    whole_file file = WHOLE_FILE_NONE;
    muonshard_status status = o->backend->streams->choices(o->backend, &text);
    FAIL_IF(status, &o->error, status, "gemm_table %s: %s", path, o->backend->error.text);
    if (!text)
        return MUONSHARD_OK;
    TRY_GOTO(whole_file_begin(&file, path, &why), done);
    TRY_GOTO(whole_file_write(&file, text, strlen(text), &why), done);
    TRY_GOTO(whole_file_end(&file, &why), done);
    o->backend->streams->choices_kept(o->backend);
done:
    whole_file_close(&file);
    free(text);
    FAIL_IF(status, &o->error, status, "gemm_table: %s", why.text);
    return MUONSHARD_OK;
}

muonshard_status choices_make(muonshard_optimizer *o) {
    const plan *p = &o->plan;
    const bool filed = *o->settings->gemm_table != 0;
    char path[4096];
    if (!runs_ahead(o))
        return MUONSHARD_OK;
    rank_path(path, sizeof path, o->settings->gemm_table, o->comm->rank, o->comm->size);
    if (filed)
        TRY(take(o, path));
    for (size_t b = 0; b < p->batch_count; b++) {
        const batch_work *work = &o->batches[b];
        if (p->batches[b].kind == PLAN_FLAT)
            continue;
        const muonshard_status status = o->backend->streams->prepare(
            o->backend, work->program, p->batches[b].m, p->batches[b].n, work->orthogonalize,
            work->owned, o->memory.newton_schulz);
        FAIL_IF(status, &o->error, status, "%s", o->backend->error.text);
    }
    return filed ? keep(o, path) : MUONSHARD_OK;
}
