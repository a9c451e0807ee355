/* fuzz.h - what the fuzz targets share. A target is a file fuzz_NAME.c with LLVMFuzzerTestOneInput;
 * libFuzzer calls it with bytes of its own (run.sh), replay_corpus.c with the files of
 * corpus/NAME/. */
#ifndef FUZZ_H
#define FUZZ_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "muonshard.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* What has to hold; libFuzzer keeps the input of an abort. */
#define FUZZ_CHECK(condition)                                                                      \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "%s:%d: does not hold: %s\n", __FILE__, __LINE__, #condition);         \
            abort();                                                                               \
        }                                                                                          \
    } while (0)

/* One of the header's, and an error comes with a text. Returns `status`. */
static inline muonshard_status fuzz_status(muonshard_status status, const char *text) {
    bool known = false;
#define FUZZ_KNOWN(value, name, words) known = known || status == MUONSHARD_##name;
    MUONSHARD_STATUS_MAP(FUZZ_KNOWN)
#undef FUZZ_KNOWN
    FUZZ_CHECK(known && (status == MUONSHARD_OK || *text));
    return status;
}

/* The bytes as a file without a name; the path is good until the next call. */
const char *fuzz_file(const uint8_t *data, size_t size);
void fuzz_write(const char *path, const void *data, size_t size);
/* A directory that goes when the program ends; and with nothing in it. */
const char *fuzz_directory(void);
const char *fuzz_empty_directory(void);

#endif
