#include "optim/series.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include "fault.h"
#include "whole_file.h"

void series_file(int rank, char *name) {
    snprintf(name, SERIES_FILE, "rank-%05d.safetensors", rank);
}

char *series_path(const char *directory, const char *name) {
    const size_t size = strlen(directory) + strlen(name) + 2;
    char *path = malloc(size);
    if (path)
        snprintf(path, size, "%s/%s", directory, name);
    return path;
}

/* ---- names ---- */

static const char *read_digits(const char *text, int64_t *number) {
    const size_t digits = strspn(text, "0123456789");
    *number = digits && digits < 19 ? strtoll(text, NULL, 10) : 0;
    return digits && digits < 19 ? text + digits : NULL;
}

static bool read_entry(const char *name, series_entry *entry) {
    *entry = (series_entry){.number = 1};
    if (strncmp(name, "step-", 5) != 0 || strlen(name) >= sizeof entry->name)
        return false;
    const char *rest = read_digits(name + 5, &entry->step);
    if (rest && *rest == '-')
        rest = read_digits(rest + 1, &entry->number);
    memcpy(entry->name, name, strlen(name) + 1);
    return rest && !*rest;
}

static int compare_entries(const void *left, const void *right) {
    const series_entry *a = left, *b = right;
    if (a->step != b->step)
        return a->step > b->step ? -1 : 1;
    return a->number > b->number ? -1 : a->number < b->number;
}

muonshard_status series_list(const char *directory, series_entry **entries, size_t *count,
                             error_text *error) {
    *entries = NULL;
    *count = 0;
    DIR *dir = opendir(directory);
    if (!dir && errno == ENOENT)
        return MUONSHARD_OK;
    FAIL_IF(!dir, error, MUONSHARD_ERR_IO, "%s: cannot be read: %s", directory, strerror(errno));
    size_t room = 0;
    muonshard_status status = MUONSHARD_OK;
    for (const struct dirent *item; status == MUONSHARD_OK && (item = readdir(dir));) {
        series_entry entry;
        if (!read_entry(item->d_name, &entry))
            continue;
        if (*count == room) {
            room = 2 * room + 16;
            series_entry *more = realloc(*entries, room * sizeof *more);
            if (!more) {
                status = fail(error, MUONSHARD_ERR_MEMORY, "%s: out of memory", directory);
                break;
            }
            *entries = more;
        }
        (*entries)[(*count)++] = entry;
    }
    closedir(dir);
    if (*count)
        qsort(*entries, *count, sizeof **entries, compare_entries);
    return status;
}

/* ---- making ---- */

static int make_directory(const char *path) {
    const int fault = fault_point("make directory");
    errno = fault;
    return fault > 0 ? -1 : mkdir(path, 0755);
}

static muonshard_status sync_directory(const char *path, error_text *error) {
    const int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    const int synced = fd < 0 ? -1 : whole_file_sync_directory(fd);
    const int code = errno;
    if (fd >= 0)
        close(fd);
    FAIL_IF(synced != 0, error, MUONSHARD_ERR_IO, "%s: cannot be synced: %s", path, strerror(code));
    return MUONSHARD_OK;
}

/* The number after the highest there is of this step: a lower one would be taken for older. */
static muonshard_status next_number(const char *directory, int64_t step, int64_t *number,
                                    error_text *error) {
    series_entry *entries;
    size_t count, i = 0;
    TRY(series_list(directory, &entries, &count, error));
    while (i < count && entries[i].step != step)
        i++;
    *number = i < count ? entries[i].number + 1 : 1;
    free(entries);
    return MUONSHARD_OK;
}

static muonshard_status make_series(const char *directory, error_text *error) {
    if (make_directory(directory) != 0) {
        FAIL_IF(errno != EEXIST, error, MUONSHARD_ERR_IO, "%s: cannot be made: %s", directory,
                strerror(errno));
        return MUONSHARD_OK;
    }
    char *parent = series_path(directory, "..");
    FAIL_IF(!parent, error, MUONSHARD_ERR_MEMORY, "out of memory");
    const muonshard_status status = sync_directory(parent, error);
    free(parent);
    return status;
}

muonshard_status series_new(const char *directory, int64_t step, char **path, error_text *error) {
    int64_t number;
    *path = NULL;
    TRY(make_series(directory, error));
    TRY(next_number(directory, step, &number, error));
    for (;; number++) {
        char name[64], after[24] = "";
        if (number > 1)
            snprintf(after, sizeof after, "-%" PRId64, number);
        snprintf(name, sizeof name, "step-%08" PRId64 "%s", step, after);
        free(*path);
        *path = series_path(directory, name);
        FAIL_IF(!*path, error, MUONSHARD_ERR_MEMORY, "out of memory");
        if (make_directory(*path) == 0)
            return sync_directory(directory, error);
        if (errno != EEXIST) {
            fail(error, MUONSHARD_ERR_IO, "%s: cannot be made: %s", *path, strerror(errno));
            free(*path);
            *path = NULL;
            return MUONSHARD_ERR_IO;
        }
    }
}

/* ---- looking ---- */

/* A file of a checkpoint; -1 with errno. */
static int open_file(const char *checkpoint, const char *name, uint64_t *bytes) {
    const int directory = open(checkpoint, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    const int fd = directory < 0 ? -1 : whole_file_open(directory, name, bytes);
    const int code = errno;
    if (directory >= 0)
        close(directory);
    errno = code;
    return fd;
}

static bool read_all(int fd, char *to, size_t bytes) {
    size_t at = 0;
    while (at < bytes) {
        const ssize_t got = read(fd, to + at, bytes - at);
        if (got <= 0 && !(got < 0 && errno == EINTR))
            return false;
        at += got > 0 ? (size_t)got : 0;
    }
    return true;
}

muonshard_status series_read_manifest(const char *checkpoint, char **text, size_t *length,
                                      error_text *error) {
    uint64_t bytes;
    *text = NULL;
    const int fd = open_file(checkpoint, MANIFEST_NAME, &bytes);
    FAIL_IF(fd < 0, error, MUONSHARD_ERR_IO, "%s/" MANIFEST_NAME ": cannot be read: %s", checkpoint,
            strerror(errno));
    *length = (size_t)bytes;
    muonshard_status status = MUONSHARD_OK;
    if (*length > MANIFEST_MOST)
        status = fail(error, MUONSHARD_ERR_FORMAT, "%s/" MANIFEST_NAME ": %zu bytes are too many",
                      checkpoint, *length);
    else if (!(*text = malloc(*length + 1)))
        status = fail(error, MUONSHARD_ERR_MEMORY, "%s: out of memory", checkpoint);
    else if (!read_all(fd, *text, *length))
        status = fail(error, MUONSHARD_ERR_IO, "%s/" MANIFEST_NAME ": cannot be read", checkpoint);
    close(fd);
    if (status) {
        free(*text);
        *text = NULL;
    }
    return status;
}

muonshard_status series_check_files(const char *checkpoint, const manifest *m, error_text *error) {
    for (int r = 0; r < m->world_size; r++) {
        char name[SERIES_FILE];
        uint64_t bytes;
        series_file(r, name);
        const int fd = open_file(checkpoint, name, &bytes);
        FAIL_IF(fd < 0, error, MUONSHARD_ERR_IO, "%s/%s: cannot be read: %s", checkpoint, name,
                strerror(errno));
        close(fd);
        FAIL_IF(bytes != m->files[r].bytes, error, MUONSHARD_ERR_FORMAT,
                "%s/%s: has %" PRIu64 " bytes of %" PRIu64, checkpoint, name, bytes,
                m->files[r].bytes);
    }
    return MUONSHARD_OK;
}

muonshard_status series_check(const char *checkpoint, error_text *error) {
    char *text;
    size_t length;
    manifest m;
    TRY(series_read_manifest(checkpoint, &text, &length, error));
    char *where = series_path(checkpoint, MANIFEST_NAME);
    muonshard_status status = where ? manifest_read(where, text, length, &m, error)
                                    : fail(error, MUONSHARD_ERR_MEMORY, "out of memory");
    free(where);
    free(text);
    TRY(status);
    status = series_check_files(checkpoint, &m, error);
    manifest_free(&m);
    return status;
}

/* ---- removing ---- */

/* The end of a temporary's name: .PROCESS-ATTEMPT.tmp. Or nothing. */
static bool is_end(const char *text) {
    int64_t number;
    if (!*text)
        return true;
    text = *text == '.' ? read_digits(text + 1, &number) : NULL;
    text = text && *text == '-' ? read_digits(text + 1, &number) : NULL;
    return text && strcmp(text, ".tmp") == 0;
}

static bool is_ours(const char *name) {
    static const char file[] = ".safetensors";
    int64_t rank;
    if (strncmp(name, MANIFEST_NAME, sizeof MANIFEST_NAME - 1) == 0)
        return is_end(name + sizeof MANIFEST_NAME - 1);
    name = strncmp(name, "rank-", 5) == 0 ? read_digits(name + 5, &rank) : NULL;
    return name && strncmp(name, file, sizeof file - 1) == 0 && is_end(name + sizeof file - 1);
}

/* The manifest first: what is half removed is no checkpoint. */
static int remove_files(int fd) {
    fault_point("remove manifest");
    if (unlinkat(fd, MANIFEST_NAME, 0) != 0 && errno != ENOENT)
        return -1;
    if (whole_file_sync_directory(fd) != 0)
        return -1;
    const int listed = dup(fd);
    DIR *dir = listed < 0 ? NULL : fdopendir(listed);
    if (!dir)
        return -1;
    int failed = 0;
    for (const struct dirent *item; (item = readdir(dir));) {
        if (!is_ours(item->d_name))
            continue;
        fault_point("remove file");
        failed |= unlinkat(fd, item->d_name, 0);
    }
    closedir(dir);
    return failed;
}

muonshard_status series_remove(const char *path, error_text *error) {
    const int fd = open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    int failed = fd < 0 ? -1 : remove_files(fd);
    if (failed == 0) {
        fault_point("remove directory");
        failed = rmdir(path);
    }
    const int code = errno;
    if (fd >= 0)
        close(fd);
    FAIL_IF(failed != 0, error, MUONSHARD_ERR_IO, "%s: cannot be removed: %s", path,
            strerror(code));
    return MUONSHARD_OK;
}

/* Without a manifest it never was a checkpoint. What has one goes only once `keep` newer ones are
 * complete, however damaged it is; and never what another version of the format may be able to
 * read. *complete counts. */
static bool is_kept(const char *checkpoint, int keep, int *complete) {
    error_text why;
    char *manifest_path = series_path(checkpoint, MANIFEST_NAME);
    const bool has_none = manifest_path && access(manifest_path, F_OK) != 0 && errno == ENOENT;
    free(manifest_path);
    if (has_none)
        return false;
    const muonshard_status status = series_check(checkpoint, &why);
    if (status == MUONSHARD_ERR_UNSUPPORTED)
        return true;
    const bool kept = keep == 0 || *complete < keep;
    *complete += kept && status == MUONSHARD_OK;
    return kept;
}

muonshard_status series_prune(const char *directory, const char *checkpoint, int keep,
                              error_text *error) {
    series_entry *entries, newest;
    size_t count;
    const char *slash = strrchr(checkpoint, '/');
    int complete = 1;
    if (!slash || !read_entry(slash + 1, &newest))
        return MUONSHARD_OK;
    muonshard_status status = series_list(directory, &entries, &count, error);
    for (size_t i = 0; i < count && status != MUONSHARD_ERR_MEMORY; i++) {
        error_text why;
        if (compare_entries(&entries[i], &newest) <= 0)
            continue;
        char *path = series_path(directory, entries[i].name);
        if (!path) {
            status = fail(error, MUONSHARD_ERR_MEMORY, "out of memory");
            break;
        }
        const int most = entries[i].step == newest.step ? 1 : keep;
        if (!is_kept(path, most, &complete) && series_remove(path, &why))
            status = fail(error, MUONSHARD_ERR_IO, "%s", why.text);
        free(path);
    }
    free(entries);
    return status;
}
