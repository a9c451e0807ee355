/* whole_file.h - a file that is there as a whole or not at all, whatever happens in between:
 * written under a temporary name in its directory, synced, renamed, the directory synced. What
 * stood there under its name stays until then. Errors name the file. */
#ifndef WHOLE_FILE_H
#define WHOLE_FILE_H

#include <stdbool.h>
#include "status.h"

typedef struct whole_file {
    int fd, directory;
    char *path;      /* own */
    char *temporary; /* own: its name in the directory */
    void *hashing;   /* XXH3_state_t, own */
    size_t bytes;    /* written so far */
    uint64_t hash;   /* XXH3, 64 bits, of all; once it has ended */
} whole_file;
#define WHOLE_FILE_NONE                                                                            \
    { -1, -1, NULL, NULL, NULL, 0, 0 }

/* The directory `path` is in; own. NULL: no memory. */
char *whole_file_directory(const char *path);
/* Nobody but the owner can write to it, whatever the umask. ERR_IO, ERR_MEMORY. */
muonshard_status whole_file_begin(whole_file *file, const char *path, error_text *error);
/* ERR_IO. */
muonshard_status whole_file_write(whole_file *file, const void *data, size_t bytes,
                                  error_text *error);
/* Now it is there. ERR_IO. */
muonshard_status whole_file_end(whole_file *file, error_text *error);
/* After any outcome; the temporary is gone. */
void whole_file_close(whole_file *file);
/* A file of an open directory, to be read: regular, and no link. -1 with errno, EINVAL: something
 * else than a file. */
int whole_file_open(int directory, const char *name, uint64_t *bytes);
/* So that names in it survive a crash. Some file systems cannot, and say EINVAL. -1 with errno. */
int whole_file_sync_directory(int directory);

#endif
