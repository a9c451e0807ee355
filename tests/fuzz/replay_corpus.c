/* replay_corpus.c - a fuzz target over files that are there already: replay_NAME DIRECTORY. For the
 * ordinary tests, which need no libFuzzer. */
#include <dirent.h>
#include <string.h>

#include "fuzz.h"

static void replay_file(const char *path) {
    FILE *file = fopen(path, "rb");
    FUZZ_CHECK(file && fseek(file, 0, SEEK_END) == 0);
    const long size = ftell(file);
    FUZZ_CHECK(size >= 0 && fseek(file, 0, SEEK_SET) == 0);
    /* As long as the input is and no longer, so that the address sanitizer sees its end. */
    uint8_t *data = malloc(size ? (size_t)size : 1);
    FUZZ_CHECK(data && fread(data, 1, (size_t)size, file) == (size_t)size);
    fclose(file);
    LLVMFuzzerTestOneInput(data, (size_t)size);
    free(data);
}

int main(int argc, char **argv) {
    FUZZ_CHECK(argc == 2);
    DIR *directory = opendir(argv[1]);
    FUZZ_CHECK(directory);
    int files = 0;
    for (struct dirent *entry; (entry = readdir(directory));) {
        char path[4096];
        if (entry->d_name[0] == '.')
            continue;
        snprintf(path, sizeof path, "%s/%s", argv[1], entry->d_name);
        fprintf(stderr, "%s\n", path); /* the last one is whose fault a crash is */
        replay_file(path);
        files++;
    }
    closedir(directory);
    printf("%d files\n", files);
    return files > 0 ? 0 : 1;
}
