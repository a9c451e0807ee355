/* corpus.h - the text that is trained on: bytes of files in a fixed order, the end of it for
 * validation. Windows are functions of seed, step and number alone, so they are the same text
 * whatever the number of ranks. */
#ifndef CORPUS_H
#define CORPUS_H

#include <stddef.h>
#include <stdint.h>
#include "muonshard.h"

typedef struct corpus {
    unsigned char *text; /* [size], own: training text, then validation text */
    size_t size, train_size;
    size_t file_count;
    uint64_t hash; /* of the text: what all ranks must have in common */
} corpus;

#define CORPUS_MESSAGE 512

/* Reads every regular file that matches one of the glob(3) patterns, each of which ends with '\n';
 * sorted by name, a file once even when it has several names. The last `val_fraction` of the bytes
 * is for validation. `window`: bytes both parts need at least. Local. ERR_IO, ERR_CONFIG (no match,
 * too little text), ERR_MEMORY, with a text in `message` [CORPUS_MESSAGE]; corpus_free is allowed
 * after any outcome. */
muonshard_status corpus_load(corpus *c, const char *patterns, double val_fraction, size_t window,
                             char *message);
void corpus_free(corpus *c);

/* out [window]: sequence number `index` of the global batch of step `step`. */
void corpus_train_window(const corpus *c, uint64_t seed, int64_t step, int64_t index, size_t window,
                         unsigned char *out);
/* out [window]: window number `index` of `count`, spread evenly over the validation text. */
void corpus_validation_window(const corpus *c, int64_t index, int64_t count, size_t window,
                              unsigned char *out);

#endif
