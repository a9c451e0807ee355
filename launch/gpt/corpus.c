#include "corpus.h"

#include <errno.h>
#include <glob.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "counter.h"

typedef struct source {
    char *path; /* own */
    dev_t device;
    ino_t inode;
    size_t bytes;
} source;

typedef struct sources {
    source *items; /* own */
    size_t count, room;
} sources;

static void sources_free(sources *s) {
    for (size_t i = 0; i < s->count; i++)
        free(s->items[i].path);
    free(s->items);
}

static muonshard_status add_source(sources *s, const char *path, char *message) {
    struct stat info;
    if (stat(path, &info)) {
        snprintf(message, CORPUS_MESSAGE, "data.files: %s: %s", path, strerror(errno));
        return MUONSHARD_ERR_IO;
    }
    if (!S_ISREG(info.st_mode))
        return MUONSHARD_OK;
    if (s->count == s->room) {
        size_t room = s->room ? 2 * s->room : 64;
        source *items = realloc(s->items, room * sizeof *items);
        if (!items)
            goto memory;
        s->items = items;
        s->room = room;
    }
    char *copy = strdup(path);
    if (!copy)
        goto memory;
    s->items[s->count++] = (source){copy, info.st_dev, info.st_ino, (size_t)info.st_size};
    return MUONSHARD_OK;
memory:
    snprintf(message, CORPUS_MESSAGE, "data.files: out of memory");
    return MUONSHARD_ERR_MEMORY;
}

/* A folder that is not there is no match; one that cannot be read ends the search. */
static int glob_error(const char *path, int error) {
    (void)path;
    return error != ENOENT && error != ENOTDIR;
}

static muonshard_status add_pattern(sources *s, const char *pattern, char *message) {
    glob_t found;
    size_t before = s->count;
    muonshard_status status = MUONSHARD_OK;
    int rc = glob(pattern, GLOB_NOSORT, glob_error, &found);
    if (rc == GLOB_NOMATCH) {
        snprintf(message, CORPUS_MESSAGE, "data.files: no file matches %s", pattern);
        return MUONSHARD_ERR_CONFIG;
    }
    if (rc) {
        snprintf(message, CORPUS_MESSAGE, "data.files: %s: %s", pattern,
                 rc == GLOB_NOSPACE ? "out of memory" : "a directory cannot be read");
        return rc == GLOB_NOSPACE ? MUONSHARD_ERR_MEMORY : MUONSHARD_ERR_IO;
    }
    for (size_t i = 0; i < found.gl_pathc && status == MUONSHARD_OK; i++)
        status = add_source(s, found.gl_pathv[i], message);
    if (status == MUONSHARD_OK && s->count == before) {
        snprintf(message, CORPUS_MESSAGE, "data.files: %s matches no regular file", pattern);
        status = MUONSHARD_ERR_CONFIG;
    }
    globfree(&found);
    return status;
}

static int by_inode(const void *a, const void *b) {
    const source *x = a, *y = b;
    if (x->device != y->device)
        return x->device < y->device ? -1 : 1;
    if (x->inode != y->inode)
        return x->inode < y->inode ? -1 : 1;
    return strcmp(x->path, y->path);
}

static int by_path(const void *a, const void *b) {
    const source *x = a, *y = b;
    return strcmp(x->path, y->path);
}

/* A file with several names (a linked directory) stays under the first; else validation text would
 * be trained on. */
static void drop_repeats(sources *s) {
    size_t kept = 0;
    if (!s->count)
        return;
    qsort(s->items, s->count, sizeof *s->items, by_inode);
    for (size_t i = 0; i < s->count; i++) {
        if (kept && s->items[kept - 1].device == s->items[i].device &&
            s->items[kept - 1].inode == s->items[i].inode)
            free(s->items[i].path);
        else
            s->items[kept++] = s->items[i];
    }
    s->count = kept;
    qsort(s->items, s->count, sizeof *s->items, by_path);
}

static muonshard_status read_source(corpus *c, const source *from, char *message) {
    FILE *file = fopen(from->path, "rb");
    if (!file) {
        snprintf(message, CORPUS_MESSAGE, "data.files: %s: %s", from->path, strerror(errno));
        return MUONSHARD_ERR_IO;
    }
    size_t got = fread(c->text + c->size, 1, from->bytes, file);
    fclose(file);
    if (got != from->bytes) {
        snprintf(message, CORPUS_MESSAGE, "data.files: %s: %zu of %zu bytes could be read",
                 from->path, got, from->bytes);
        return MUONSHARD_ERR_IO;
    }
    c->size += got;
    return MUONSHARD_OK;
}

static uint64_t hash_text(const unsigned char *text, size_t size) {
    uint64_t hash = counter_mix(size);
    for (size_t i = 0; i < size; i += 8) {
        uint64_t word = 0;
        memcpy(&word, text + i, size - i < 8 ? size - i : 8);
        hash = counter_mix(hash ^ word);
    }
    return hash;
}

muonshard_status corpus_load(corpus *c, const char *patterns, double val_fraction, size_t window,
                             char *message) {
    sources s = {0};
    muonshard_status status = MUONSHARD_OK;
    *c = (corpus){0};
    char *list = strdup(patterns);
    if (!list)
        goto memory;
    char *next = list;
    for (char *end; (end = strchr(next, '\n')) && status == MUONSHARD_OK; next = end + 1) {
        *end = '\0';
        status = add_pattern(&s, next, message);
    }
    if (status != MUONSHARD_OK)
        goto done;
    drop_repeats(&s);
    size_t total = 0;
    for (size_t i = 0; i < s.count; i++)
        total += s.items[i].bytes;
    c->text = malloc(total ? total : 1);
    if (!c->text)
        goto memory;
    for (size_t i = 0; i < s.count && status == MUONSHARD_OK; i++)
        status = read_source(c, &s.items[i], message);
    if (status != MUONSHARD_OK)
        goto done;
    c->file_count = s.count;
    c->train_size = c->size - (size_t)((double)c->size * val_fraction);
    if (c->train_size < window || c->size - c->train_size < window) {
        snprintf(message, CORPUS_MESSAGE,
                 "data.files: %zu bytes for training and %zu for validation (data.val_fraction); "
                 "each needs at least model.context + 1 = %zu",
                 c->train_size, c->size - c->train_size, window);
        status = MUONSHARD_ERR_CONFIG;
        goto done;
    }
    c->hash = hash_text(c->text, c->size);
    goto done;
memory:
    snprintf(message, CORPUS_MESSAGE, "data.files: out of memory");
    status = MUONSHARD_ERR_MEMORY;
done:
    sources_free(&s);
    free(list);
    return status;
}

void corpus_free(corpus *c) {
    free(c->text);
    *c = (corpus){0};
}

void corpus_train_window(const corpus *c, uint64_t seed, int64_t step, int64_t index, size_t window,
                         unsigned char *out) {
    uint64_t starts = c->train_size - window + 1;
    uint64_t start =
        counter_mix(counter_mix(counter_mix(seed) + (uint64_t)step) + (uint64_t)index) % starts;
    memcpy(out, c->text + start, window);
}

void corpus_validation_window(const corpus *c, int64_t index, int64_t count, size_t window,
                              unsigned char *out) {
    size_t last = c->size - c->train_size - window;
    double part = count > 1 ? (double)index / (double)(count - 1) : 0.0;
    memcpy(out, c->text + c->train_size + (size_t)((double)last * part), window);
}
