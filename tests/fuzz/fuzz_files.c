#include "fuzz.h"

#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static char open_path[64];
static char new_directory[256], new_path[300];

static int file_without_name(void) {
    static int fd = -1;
    if (fd < 0) {
        char name[] = "/tmp/muonshard-fuzz-XXXXXX";
        fd = mkstemp(name);
        FUZZ_CHECK(fd >= 0 && unlink(name) == 0);
        snprintf(open_path, sizeof open_path, "/proc/self/fd/%d", fd);
    }
    return fd;
}

const char *fuzz_file(const uint8_t *data, size_t size) {
    const int fd = file_without_name();
    FUZZ_CHECK(ftruncate(fd, 0) == 0 && pwrite(fd, data, size, 0) == (ssize_t)size);
    return open_path;
}

static void remove_directory(void) {
    unlink(new_path);
    rmdir(new_directory);
}

/* In memory where the system has such a place: each write is synced. */
const char *fuzz_new_file(void) {
    if (!*new_directory) {
        const char *place = access("/dev/shm", W_OK | X_OK) == 0 ? "/dev/shm" : "/tmp";
        snprintf(new_directory, sizeof new_directory, "%s/muonshard-fuzz-XXXXXX", place);
        FUZZ_CHECK(mkdtemp(new_directory));
        snprintf(new_path, sizeof new_path, "%s/new", new_directory);
        atexit(remove_directory);
    }
    return new_path;
}
