#include "fuzz.h"

#include <dirent.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static char open_path[64], directory[64];

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

void fuzz_write(const char *path, const void *data, size_t size) {
    FILE *file = fopen(path, "wb");
    FUZZ_CHECK(file && fwrite(data, 1, size, file) == size && fclose(file) == 0);
}

static void empty(const char *path) {
    DIR *dir = opendir(path);
    FUZZ_CHECK(dir);
    for (const struct dirent *item; (item = readdir(dir));) {
        char inside[512];
        if (strcmp(item->d_name, ".") == 0 || strcmp(item->d_name, "..") == 0)
            continue;
        snprintf(inside, sizeof inside, "%s/%s", path, item->d_name);
        if (unlink(inside) != 0) {
            empty(inside);
            FUZZ_CHECK(rmdir(inside) == 0);
        }
    }
    closedir(dir);
}

static void remove_directory(void) {
    empty(directory);
    rmdir(directory);
}

/* In memory where the system has such a place: most of what is written is synced. */
const char *fuzz_directory(void) {
    if (!*directory) {
        const char *place = access("/dev/shm", W_OK | X_OK) == 0 ? "/dev/shm" : "/tmp";
        snprintf(directory, sizeof directory, "%s/muonshard-fuzz-XXXXXX", place);
        FUZZ_CHECK(mkdtemp(directory));
        atexit(remove_directory);
    }
    return directory;
}

const char *fuzz_empty_directory(void) {
    empty(fuzz_directory());
    return directory;
}
