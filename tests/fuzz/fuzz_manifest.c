/* A manifest, without the checksum that ends it: with a sound one, alone and in a directory beside
 * a sound image. What is taken is written to the same again; what is refused changes nothing. */
#include "optim/manifest.h"

#include <inttypes.h>
#include <string.h>
#include <sys/stat.h>
#include <xxhash.h>

#include "fuzz_small.h"

enum { TAIL = 28 };

/* Own, [size + TAIL]. */
static char *with_checksum(const uint8_t *data, size_t size) {
    char *text = malloc(size + TAIL + 1);
    FUZZ_CHECK(text);
    if (size)
        memcpy(text, data, size);
    snprintf(text + size, TAIL + 1, ",\"xxh3\":\"%016" PRIx64 "\"}\n",
             (uint64_t)XXH3_64bits(data, size));
    return text;
}

static void check_same(const manifest *a, const manifest *b) {
    FUZZ_CHECK(a->step == b->step && a->count == b->count && a->world_size == b->world_size);
    FUZZ_CHECK(strcmp(a->config, b->config) == 0 && strcmp(a->user, b->user) == 0);
    FUZZ_CHECK(a->tensor_count == b->tensor_count);
    for (int i = 0; i < a->world_size; i++)
        FUZZ_CHECK(a->files[i].bytes == b->files[i].bytes && a->files[i].hash == b->files[i].hash);
    for (size_t i = 0; i < a->tensor_count; i++) {
        const manifest_tensor *t = &a->tensors[i], *u = &b->tensors[i];
        FUZZ_CHECK(strcmp(t->name, u->name) == 0 && strcmp(t->role, u->role) == 0);
        FUZZ_CHECK(strcmp(t->dtype, u->dtype) == 0 && t->dims == u->dims);
        FUZZ_CHECK(memcmp(t->shape, u->shape, (size_t)t->dims * sizeof *t->shape) == 0);
    }
}

static void check_read(const char *text, size_t length) {
    manifest m, again;
    error_text error = {""};
    char *written;
    const muonshard_status status =
        fuzz_status(manifest_read("manifest", text, length, &m, &error), error.text);
    if (status) {
        FUZZ_CHECK(status == MUONSHARD_ERR_FORMAT || status == MUONSHARD_ERR_UNSUPPORTED);
        FUZZ_CHECK(!m.json && !m.files && !m.tensors);
        return;
    }
    FUZZ_CHECK(m.step >= 0 && m.count >= 0 && m.count <= m.step && m.world_size > 0);
    FUZZ_CHECK(manifest_write(&m, &written, &length, &error) == MUONSHARD_OK);
    FUZZ_CHECK(manifest_read("again", written, length, &again, &error) == MUONSHARD_OK);
    check_same(&m, &again);
    manifest_free(&again);
    manifest_free(&m);
    free(written);
}

/* The manifest alone is not enough: the image says which step it is of. */
static void check_load(const char *text, size_t length) {
    small *s = fuzz_small();
    char checkpoint[96], path[128];
    const char *directory = fuzz_empty_directory();
    snprintf(checkpoint, sizeof checkpoint, "%s/step-00000003", directory);
    FUZZ_CHECK(mkdir(checkpoint, 0755) == 0);
    snprintf(path, sizeof path, "%s/manifest.json", checkpoint);
    fuzz_write(path, text, length);
    snprintf(path, sizeof path, "%s/rank-00000.safetensors", checkpoint);
    fuzz_write(path, s->image, s->image_bytes);
    muonshard_load_result result = MUONSHARD_LOAD_RESULT_INIT;
    const muonshard_status status =
        fuzz_status(muonshard_load(s->optimizer, checkpoint, NULL, &result),
                    muonshard_last_error(s->optimizer));
    FUZZ_CHECK(status == MUONSHARD_OK || status == MUONSHARD_ERR_FORMAT ||
               status == MUONSHARD_ERR_UNSUPPORTED || status == MUONSHARD_ERR_ARGUMENT ||
               status == MUONSHARD_ERR_IO); /* of a rank whose file isn't there */
    FUZZ_CHECK(status == MUONSHARD_OK ? result.step == 3 && result.found : !result.found);
    FUZZ_CHECK(fuzz_small_unchanged(s)); /* to which the image is no news */
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    manifest m;
    error_text error = {""};
    char *text = with_checksum(data, size);
    fuzz_status(manifest_read("bare", (const char *)data, size, &m, &error), error.text);
    manifest_free(&m);
    check_read(text, size + TAIL);
    check_load(text, size + TAIL);
    free(text);
    return 0;
}
