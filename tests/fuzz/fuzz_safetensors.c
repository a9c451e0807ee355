/* A safetensors file. What is refused says why; what is taken lies within the file, and written and
 * read again it is the same. */
#include "safetensors.h"

#include <string.h>

#include "fuzz.h"

static bool same_shape(const safetensors_tensor *a, const safetensors_tensor *b) {
    return strcmp(a->name, b->name) == 0 && a->dtype == b->dtype && a->dims == b->dims &&
           memcmp(a->shape, b->shape, (size_t)a->dims * sizeof a->shape[0]) == 0 &&
           a->elements == b->elements && a->bytes == b->bytes;
}

static void check_same(const safetensors_file *a, const safetensors_file *b) {
    FUZZ_CHECK(a->tensor_count == b->tensor_count && a->metadata_count == b->metadata_count);
    for (size_t i = 0; i < a->tensor_count; i++)
        FUZZ_CHECK(same_shape(&a->tensors[i], &b->tensors[i]));
    for (size_t i = 0; i < a->metadata_count; i++) {
        FUZZ_CHECK(strcmp(a->metadata[i].key, b->metadata[i].key) == 0);
        FUZZ_CHECK(strcmp(a->metadata[i].value, b->metadata[i].value) == 0);
    }
}

static void check_tensor(const safetensors_file *file, const safetensors_tensor *t,
                         const uint8_t *bytes, size_t size) {
    FUZZ_CHECK(t->dims >= 0 && t->dims <= MUONSHARD_MAX_DIMS);
    FUZZ_CHECK(t->offset <= size && t->bytes <= size - t->offset);
    FUZZ_CHECK(t->bytes * 8 == t->elements * t->dtype->bits);
    FUZZ_CHECK(!t->bytes || t->dtype->bits % 16 || (uintptr_t)t->data % (t->dtype->bits / 8) == 0);
    FUZZ_CHECK(!t->bytes || memcmp(t->data, bytes + t->offset, t->bytes) == 0);
    FUZZ_CHECK(safetensors_find(file, t->name) == t);
    char shape[SAFETENSORS_SHAPE_TEXT];
    FUZZ_CHECK(strlen(safetensors_shape_text(t, shape)) >= 2);
}

static void check_written_again(const safetensors_file *file) {
    error_text error = {""};
    safetensors_file again;
    char path[128];
    snprintf(path, sizeof path, "%s/new", fuzz_directory());
    const muonshard_status wrote = safetensors_write(path, file->tensors, file->tensor_count,
                                                     file->metadata, file->metadata_count, &error);
    if (wrote)
        fprintf(stderr, "%s\n", error.text);
    FUZZ_CHECK(wrote == MUONSHARD_OK);
    FUZZ_CHECK(safetensors_open(path, &again, &error) == MUONSHARD_OK);
    check_same(file, &again);
    for (size_t i = 0; i < file->tensor_count; i++)
        FUZZ_CHECK(!file->tensors[i].bytes || memcmp(file->tensors[i].data, again.tensors[i].data,
                                                     file->tensors[i].bytes) == 0);
    safetensors_close(&again);
}

/* From memory, with nothing behind the image; and its header alone, of a file that is longer. */
static muonshard_status check_parsed(const uint8_t *bytes, size_t size, safetensors_file *parsed) {
    error_text error = {""};
    uint64_t length = 0;
    const muonshard_status status =
        fuzz_status(safetensors_parse("image", bytes, size, size, parsed, &error), error.text);
    if (status) {
        FUZZ_CHECK(!parsed->tensors && !parsed->header);
        return status;
    }
    memcpy(&length, bytes, sizeof length);
    const size_t available = sizeof length + (size_t)length;
    uint8_t *header = malloc(available);
    safetensors_file short_one;
    FUZZ_CHECK(header);
    memcpy(header, bytes, available);
    FUZZ_CHECK(safetensors_parse("header", header, available, size, &short_one, &error) ==
               MUONSHARD_OK);
    check_same(parsed, &short_one);
    safetensors_close(&short_one);
    free(header);
    return MUONSHARD_OK;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    safetensors_file file, parsed;
    error_text error = {""};
    const muonshard_status status =
        fuzz_status(safetensors_open(fuzz_file(data, size), &file, &error), error.text);
    FUZZ_CHECK(check_parsed(data, size, &parsed) == status);
    if (status) {
        FUZZ_CHECK(status == MUONSHARD_ERR_FORMAT || status == MUONSHARD_ERR_UNSUPPORTED);
        FUZZ_CHECK(!file.tensors && !file.map);
        return 0;
    }
    check_same(&file, &parsed);
    for (size_t i = 0; i < file.tensor_count; i++)
        check_tensor(&file, &file.tensors[i], data, size);
    check_written_again(&file);
    safetensors_close(&parsed);
    safetensors_close(&file);
    return 0;
}
