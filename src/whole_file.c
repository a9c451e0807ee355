#include "whole_file.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>
#include "fault.h"

enum { CHUNK = 1 << 24, NAME_TRIES = 100 }; /* bytes written, and hashed while they are near */

static muonshard_status failed(const whole_file *file, const char *what, error_text *error) {
    return fail(error, MUONSHARD_ERR_IO, "%s: cannot be %s: %s", file->path, what, strerror(errno));
}

/* What a test pretends to have gone wrong; true: errno is set. */
static bool pretends(const char *point) {
    const int code = fault_point(point);
    if (code > 0)
        errno = code;
    return code > 0;
}

char *whole_file_directory(const char *path) {
    const char *slash = strrchr(path, '/');
    if (!slash)
        return strdup(".");
    return strndup(path, slash == path ? 1 : (size_t)(slash - path));
}

static const char *base_of(const whole_file *file) {
    const char *slash = strrchr(file->path, '/');
    return slash ? slash + 1 : file->path;
}

/* The number only has to get past what earlier, killed processes of the same id left. */
static muonshard_status create_temporary(whole_file *file, error_text *error) {
    const size_t size = strlen(base_of(file)) + 64;
    file->temporary = malloc(size);
    FAIL_IF(!file->temporary, error, MUONSHARD_ERR_MEMORY, "%s: out of memory", file->path);
    errno = EEXIST;
    for (int attempt = 0; attempt < NAME_TRIES && file->fd < 0 && errno == EEXIST; attempt++) {
        snprintf(file->temporary, size, "%s.%ld-%d.tmp", base_of(file), (long)getpid(), attempt);
        if (pretends("file create"))
            break;
        file->fd = openat(file->directory, file->temporary,
                          O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0644);
    }
    if (file->fd >= 0)
        return MUONSHARD_OK;
    free(file->temporary);
    file->temporary = NULL;
    return failed(file, "created", error);
}

muonshard_status whole_file_begin(whole_file *file, const char *path, error_text *error) {
    *file = (whole_file)WHOLE_FILE_NONE;
    char *directory = whole_file_directory(path);
    file->path = strdup(path);
    file->hashing = XXH3_createState();
    if (!directory || !file->path || !file->hashing) {
        free(directory);
        return fail(error, MUONSHARD_ERR_MEMORY, "%s: out of memory", path);
    }
    XXH3_64bits_reset(file->hashing);
    file->directory = open(directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    free(directory);
    if (file->directory < 0)
        return failed(file, "created", error);
    return create_temporary(file, error);
}

muonshard_status whole_file_write(whole_file *file, const void *data, size_t bytes,
                                  error_text *error) {
    const char *at = data;
    while (bytes > 0) {
        size_t count = bytes < CHUNK ? bytes : CHUNK;
        const int fault = fault_point("file write");
        if (fault == FAULT_SHORT && count > 1)
            count /= 2;
        const ssize_t wrote = fault > 0 ? -1 : write(file->fd, at, count);
        if (fault > 0)
            errno = fault;
        if (wrote < 0 && errno == EINTR)
            continue;
        if (wrote <= 0)
            return failed(file, "written", error);
        XXH3_64bits_update(file->hashing, at, (size_t)wrote);
        at += wrote;
        bytes -= (size_t)wrote;
        file->bytes += (size_t)wrote;
    }
    return MUONSHARD_OK;
}

int whole_file_open(int directory, const char *name, uint64_t *bytes) {
    struct stat info;
    /* Nonblocking: a FIFO is refused, not waited for. */
    const int fd = openat(directory, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    if (fd >= 0 && (fstat(fd, &info) != 0 || !S_ISREG(info.st_mode))) {
        close(fd);
        errno = EINVAL;
        return -1;
    }
    *bytes = fd < 0 ? 0 : (uint64_t)info.st_size;
    return fd;
}

int whole_file_sync_directory(int directory) {
    if (pretends("directory sync"))
        return -1;
    return fsync(directory) == 0 || errno == EINVAL ? 0 : -1;
}

muonshard_status whole_file_end(whole_file *file, error_text *error) {
    file->hash = XXH3_64bits_digest(file->hashing);
    if (pretends("file sync") || fsync(file->fd) != 0)
        return failed(file, "synced", error);
    const int closed = close(file->fd);
    file->fd = -1;
    if (closed != 0)
        return failed(file, "written", error);
    if (pretends("file rename") ||
        renameat(file->directory, file->temporary, file->directory, base_of(file)) != 0)
        return failed(file, "renamed to", error);
    free(file->temporary);
    file->temporary = NULL;
    FAIL_IF(whole_file_sync_directory(file->directory) != 0, error, MUONSHARD_ERR_IO,
            "%s: written, but its directory cannot be synced: %s", file->path, strerror(errno));
    return MUONSHARD_OK;
}

void whole_file_close(whole_file *file) {
    if (file->fd >= 0)
        close(file->fd);
    if (file->temporary)
        unlinkat(file->directory, file->temporary, 0);
    if (file->directory >= 0)
        close(file->directory);
    free(file->temporary);
    free(file->path);
    XXH3_freeState(file->hashing);
    *file = (whole_file)WHOLE_FILE_NONE;
}
