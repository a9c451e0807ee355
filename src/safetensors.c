#include "safetensors.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <jansson.h>
#include "whole_file.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "safetensors data is little-endian and is used in place"
#endif

#define LENGTH_BYTES ((size_t)8)
#define METADATA     "__metadata__"

static const safetensors_dtype dtype_table[] = {
    {"F32", 32},    {"F64", 64},    {"F16", 16},    {"BF16", 16},   {"BOOL", 8},
    {"U8", 8},      {"I8", 8},      {"U16", 16},    {"I16", 16},    {"U32", 32},
    {"I32", 32},    {"U64", 64},    {"I64", 64},    {"C64", 64},    {"F8_E4M3", 8},
    {"F8_E5M2", 8}, {"F8_E8M0", 8}, {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"F4", 4},
};

const safetensors_dtype *safetensors_dtype_find(const char *name) {
    for (size_t i = 0; i < sizeof dtype_table / sizeof dtype_table[0]; i++)
        if (strcmp(dtype_table[i].name, name) == 0)
            return &dtype_table[i];
    return NULL;
}

const char *safetensors_shape_text(const safetensors_tensor *tensor, char *text) {
    size_t at = 1;
    text[0] = '[';
    for (int d = 0; d < tensor->dims; d++)
        at += (size_t)snprintf(text + at, SAFETENSORS_SHAPE_TEXT - at, "%s%" PRId64, d ? ", " : "",
                               tensor->shape[d]);
    text[at] = ']';
    text[at + 1] = '\0';
    return text;
}

/* elements * bits in bytes; false when it overflows or fills no whole number of bytes. */
static bool tensor_bytes(const safetensors_tensor *tensor, size_t *bytes) {
    size_t bits;
    if (__builtin_mul_overflow(tensor->elements, (size_t)tensor->dtype->bits, &bits) || bits % 8)
        return false;
    *bytes = bits / 8;
    return true;
}

/* Such a name would reach a terminal. */
static bool has_control(const char *name) {
    for (; *name; name++)
        if ((unsigned char)*name < 0x20 || *name == 0x7f)
            return true;
    return false;
}

/* ---- reading ---- */

static muonshard_status read_shape(const char *path, const json_t *shape,
                                   safetensors_tensor *tensor, error_text *error) {
    size_t index;
    json_t *item;
    if (!json_is_array(shape))
        return fail(error, MUONSHARD_ERR_FORMAT,
                    "%s: tensor \"%s\": shape is missing or not a list", path, tensor->name);
    if (json_array_size(shape) > MUONSHARD_MAX_DIMS)
        return fail(error, MUONSHARD_ERR_UNSUPPORTED,
                    "%s: tensor \"%s\" has %zu dimensions; at most %d are supported", path,
                    tensor->name, json_array_size(shape), MUONSHARD_MAX_DIMS);
    tensor->dims = (int)json_array_size(shape);
    tensor->elements = 1;
    json_array_foreach(shape, index, item) {
        if (!json_is_integer(item))
            return fail(error, MUONSHARD_ERR_FORMAT,
                        "%s: tensor \"%s\": size %zu of the shape is not an integer", path,
                        tensor->name, index);
        tensor->shape[index] = json_integer_value(item);
        if (tensor->shape[index] < 0)
            return fail(error, MUONSHARD_ERR_FORMAT,
                        "%s: tensor \"%s\": size %zu of the shape is negative (%" PRId64 ")", path,
                        tensor->name, index, tensor->shape[index]);
        if (__builtin_mul_overflow(tensor->elements, (size_t)tensor->shape[index],
                                   &tensor->elements))
            return fail(error, MUONSHARD_ERR_FORMAT,
                        "%s: tensor \"%s\": the product of the shape overflows", path,
                        tensor->name);
    }
    return MUONSHARD_OK;
}

/* The data begin at byte `data_at` of the file and are `data_size` bytes. */
static muonshard_status read_tensor(const char *path, const char *name, const json_t *entry,
                                    size_t data_at, size_t data_size, safetensors_tensor *tensor,
                                    error_text *error) {
    if (!json_is_object(entry))
        return fail(error, MUONSHARD_ERR_FORMAT, "%s: tensor \"%s\": its entry is not a mapping",
                    path, name);
    tensor->name = name;
    FAIL_IF(has_control(name), error, MUONSHARD_ERR_FORMAT,
            "%s: tensor \"%s\": control character in its name", path, name);
    const json_t *dtype = json_object_get(entry, "dtype");
    if (!json_is_string(dtype))
        return fail(error, MUONSHARD_ERR_FORMAT,
                    "%s: tensor \"%s\": dtype is missing or not a string", path, name);
    tensor->dtype = safetensors_dtype_find(json_string_value(dtype));
    if (!tensor->dtype)
        return fail(error, MUONSHARD_ERR_FORMAT, "%s: tensor \"%s\": unknown dtype \"%s\"", path,
                    name, json_string_value(dtype));

    muonshard_status status = read_shape(path, json_object_get(entry, "shape"), tensor, error);
    if (status != MUONSHARD_OK)
        return status;

    const json_t *offsets = json_object_get(entry, "data_offsets");
    const json_t *first = json_array_get(offsets, 0), *second = json_array_get(offsets, 1);
    if (json_array_size(offsets) != 2 || !json_is_integer(first) || !json_is_integer(second))
        return fail(error, MUONSHARD_ERR_FORMAT,
                    "%s: tensor \"%s\": data_offsets is not a pair of integers", path, name);
    json_int_t begin = json_integer_value(first), end = json_integer_value(second);
    if (begin < 0 || begin > end)
        return fail(error, MUONSHARD_ERR_FORMAT,
                    "%s: tensor \"%s\": data_offsets [%lld, %lld] are no range", path, name,
                    (long long)begin, (long long)end);
    if ((uint64_t)end > data_size)
        return fail(error, MUONSHARD_ERR_FORMAT,
                    "%s: tensor \"%s\" ends at byte %lld of the data, but the file has "
                    "only %zu: truncated?",
                    path, name, (long long)end, data_size);
    size_t needed;
    if (!tensor_bytes(tensor, &needed))
        return fail(error, MUONSHARD_ERR_FORMAT,
                    "%s: tensor \"%s\": its shape is no possible number of bytes of %s", path, name,
                    tensor->dtype->name);
    tensor->bytes = (size_t)(end - begin);
    tensor->offset = data_at + (size_t)begin;
    if (tensor->bytes != needed) {
        char shape[SAFETENSORS_SHAPE_TEXT];
        return fail(error, MUONSHARD_ERR_FORMAT,
                    "%s: tensor \"%s\": %s %s needs %zu bytes, data_offsets [%lld, %lld] "
                    "are %zu",
                    path, name, tensor->dtype->name, safetensors_shape_text(tensor, shape), needed,
                    (long long)begin, (long long)end, tensor->bytes);
    }
    if (json_object_size(entry) != 3)
        return fail(error, MUONSHARD_ERR_FORMAT,
                    "%s: tensor \"%s\": its entry has keys other than dtype, shape and "
                    "data_offsets",
                    path, name);
    return MUONSHARD_OK;
}

static muonshard_status read_metadata(safetensors_file *file, json_t *metadata, error_text *error) {
    const char *key;
    json_t *value;
    if (!json_is_object(metadata))
        return fail(error, MUONSHARD_ERR_FORMAT, "%s: %s is not a mapping", file->path, METADATA);
    file->metadata = calloc(json_object_size(metadata) + 1, sizeof *file->metadata);
    if (!file->metadata)
        return fail(error, MUONSHARD_ERR_MEMORY, "%s: out of memory", file->path);
    json_object_foreach(metadata, key, value) {
        if (!json_is_string(value))
            return fail(error, MUONSHARD_ERR_FORMAT, "%s: %s: \"%s\" is not a string", file->path,
                        METADATA, key);
        file->metadata[file->metadata_count++] = (safetensors_pair){key, json_string_value(value)};
    }
    return MUONSHARD_OK;
}

static int compare_place(const void *left, const void *right) {
    const safetensors_tensor *a = left, *b = right;
    if (a->offset != b->offset)
        return a->offset < b->offset ? -1 : 1;
    if (a->bytes != b->bytes)
        return a->bytes < b->bytes ? -1 : 1;
    return strcmp(a->name, b->name);
}

/* The tensors, sorted by place, follow each other without overlap or gap and end where the data
 * ends. */
static muonshard_status check_places(const safetensors_file *file, size_t first, size_t data_size,
                                     error_text *error) {
    size_t expected = 0;
    for (size_t i = 0; i < file->tensor_count; i++) {
        const safetensors_tensor *tensor = &file->tensors[i];
        size_t begin = tensor->offset - first;
        if (begin < expected)
            return fail(error, MUONSHARD_ERR_FORMAT,
                        "%s: tensors \"%s\" and \"%s\" overlap at byte %zu of the data", file->path,
                        file->tensors[i - 1].name, tensor->name, begin);
        if (begin > expected)
            return fail(error, MUONSHARD_ERR_FORMAT,
                        "%s: bytes %zu to %zu of the data, before tensor \"%s\", belong to "
                        "no tensor",
                        file->path, expected, begin, tensor->name);
        expected = begin + tensor->bytes;
    }
    if (expected != data_size)
        return fail(error, MUONSHARD_ERR_FORMAT,
                    "%s: bytes %zu to %zu of the data, at the end of the file, belong to "
                    "no tensor",
                    file->path, expected, data_size);
    return MUONSHARD_OK;
}

/* The format packs tensors without padding; a float at an odd address is undefined behaviour, so
 * those are copied. */
static muonshard_status align_tensors(safetensors_file *file, error_text *error) {
    file->copies = calloc(file->tensor_count + 1, sizeof *file->copies);
    if (!file->copies)
        return fail(error, MUONSHARD_ERR_MEMORY, "%s: out of memory", file->path);
    for (size_t i = 0; i < file->tensor_count; i++) {
        safetensors_tensor *tensor = &file->tensors[i];
        tensor->data = (const char *)file->map + tensor->offset;
        size_t alignment = tensor->dtype->bits / 8;
        if (alignment < 2 || (uintptr_t)tensor->data % alignment == 0 || tensor->bytes == 0)
            continue;
        file->copies[i] = malloc(tensor->bytes);
        if (!file->copies[i])
            return fail(error, MUONSHARD_ERR_MEMORY,
                        "%s: tensor \"%s\": out of memory for %zu bytes", file->path, tensor->name,
                        tensor->bytes);
        memcpy(file->copies[i], tensor->data, tensor->bytes);
        tensor->data = file->copies[i];
    }
    return MUONSHARD_OK;
}

static muonshard_status read_header(safetensors_file *file, const char *bytes, size_t available,
                                    size_t size, error_text *error) {
    uint64_t length;
    FAIL_IF(available < LENGTH_BYTES + 2 || size < available, error, MUONSHARD_ERR_FORMAT,
            "%s: %zu bytes are no safetensors file", file->path, available);
    memcpy(&length, bytes, LENGTH_BYTES);
    FAIL_IF(length > SAFETENSORS_HEADER_MAX, error, MUONSHARD_ERR_FORMAT,
            "%s: header length %" PRIu64 " is above the format's limit of %zu"
            ": not a safetensors file?",
            file->path, length, SAFETENSORS_HEADER_MAX);
    FAIL_IF(length > available - LENGTH_BYTES, error, MUONSHARD_ERR_FORMAT,
            "%s: header length %" PRIu64 " goes past the end of the file (%zu bytes): truncated?",
            file->path, length, available);
    json_error_t where;
    json_t *header =
        json_loadb(bytes + LENGTH_BYTES, (size_t)length, JSON_REJECT_DUPLICATES, &where);
    file->header = header;
    FAIL_IF(!header, error, MUONSHARD_ERR_FORMAT, "%s: header is not valid JSON: %s (byte %d)",
            file->path, where.text, where.position);
    FAIL_IF(!json_is_object(header), error, MUONSHARD_ERR_FORMAT, "%s: header is not a JSON object",
            file->path);

    const size_t first = LENGTH_BYTES + (size_t)length, data_size = size - first;
    file->tensors = calloc(json_object_size(header) + 1, sizeof *file->tensors);
    FAIL_IF(!file->tensors, error, MUONSHARD_ERR_MEMORY, "%s: out of memory", file->path);
    const char *name;
    json_t *entry;
    json_object_foreach(header, name, entry) {
        if (strcmp(name, METADATA) == 0)
            TRY(read_metadata(file, entry, error));
        else
            TRY(read_tensor(file->path, name, entry, first, data_size,
                            &file->tensors[file->tensor_count++], error));
    }
    qsort(file->tensors, file->tensor_count, sizeof *file->tensors, compare_place);
    return check_places(file, first, data_size, error);
}

muonshard_status safetensors_parse(const char *name, const void *bytes, size_t available,
                                   size_t size, safetensors_file *file, error_text *error) {
    *file = (safetensors_file){.path = strdup(name)};
    FAIL_IF(!file->path, error, MUONSHARD_ERR_MEMORY, "%s: out of memory", name);
    const muonshard_status status = read_header(file, bytes, available, size, error);
    if (status != MUONSHARD_OK)
        safetensors_close(file);
    return status;
}

static muonshard_status map_file(safetensors_file *file, error_text *error) {
    struct stat info;
    muonshard_status status = MUONSHARD_OK;
    /* Nonblocking: a FIFO must be refused, not waited for. */
    int fd = open(file->path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0 || fstat(fd, &info) != 0)
        status =
            fail(error, MUONSHARD_ERR_IO, "%s: cannot be read: %s", file->path, strerror(errno));
    else if (!S_ISREG(info.st_mode))
        status = fail(error, MUONSHARD_ERR_IO, "%s: is %s, not a file", file->path,
                      S_ISDIR(info.st_mode) ? "a directory" : "special");
    else if ((size_t)info.st_size < LENGTH_BYTES + 2)
        status = fail(error, MUONSHARD_ERR_FORMAT, "%s: %zu bytes are no safetensors file",
                      file->path, (size_t)info.st_size);
    else {
        file->map_size = (size_t)info.st_size;
        file->map = mmap(NULL, file->map_size, PROT_READ, MAP_PRIVATE, fd, 0);
        if (file->map == MAP_FAILED) {
            file->map = NULL;
            status = fail(error, MUONSHARD_ERR_IO, "%s: cannot be mapped: %s", file->path,
                          strerror(errno));
        }
    }
    if (fd >= 0)
        close(fd);
    return status;
}

muonshard_status safetensors_open(const char *path, safetensors_file *file, error_text *error) {
    *file = (safetensors_file){.path = strdup(path)};
    FAIL_IF(!file->path, error, MUONSHARD_ERR_MEMORY, "%s: out of memory", path);
    muonshard_status status = map_file(file, error);
    if (status == MUONSHARD_OK)
        status = read_header(file, file->map, file->map_size, file->map_size, error);
    if (status == MUONSHARD_OK)
        status = align_tensors(file, error);
    if (status != MUONSHARD_OK)
        safetensors_close(file);
    return status;
}

const safetensors_tensor *safetensors_find(const safetensors_file *file, const char *name) {
    for (size_t i = 0; i < file->tensor_count; i++)
        if (strcmp(file->tensors[i].name, name) == 0)
            return &file->tensors[i];
    return NULL;
}

void safetensors_close(safetensors_file *file) {
    for (size_t i = 0; file->copies && i < file->tensor_count; i++)
        free(file->copies[i]);
    free(file->copies);
    free(file->tensors);
    free(file->metadata);
    json_decref(file->header);
    if (file->map)
        munmap(file->map, file->map_size);
    free(file->path);
    *file = (safetensors_file){0};
}

/* ---- writing ---- */

muonshard_status safetensors_can_write(const char *path, error_text *error) {
    struct stat info;
    muonshard_status status = MUONSHARD_OK;
    size_t length = strlen(path);
    char *directory = whole_file_directory(path);
    if (!directory)
        return fail(error, MUONSHARD_ERR_MEMORY, "%s: out of memory", path);
    if (length == 0 || path[length - 1] == '/')
        status = fail(error, MUONSHARD_ERR_IO, "\"%s\" is not the name of a file", path);
    else if (stat(directory, &info) != 0)
        status = fail(error, MUONSHARD_ERR_IO, "%s: cannot be written: directory %s: %s", path,
                      directory, strerror(errno));
    else if (!S_ISDIR(info.st_mode) || access(directory, W_OK | X_OK) != 0)
        status = fail(error, MUONSHARD_ERR_IO, "%s: cannot be written: %s: %s", path, directory,
                      strerror(S_ISDIR(info.st_mode) ? errno : ENOTDIR));
    else if (lstat(path, &info) == 0 && !S_ISREG(info.st_mode))
        status = fail(error, MUONSHARD_ERR_IO, "%s: cannot be written: %s stands there, not a file",
                      path,
                      S_ISDIR(info.st_mode)   ? "a directory"
                      : S_ISLNK(info.st_mode) ? "a symbolic link"
                                              : "something special");
    free(directory);
    return status;
}

muonshard_status safetensors_header(const char *path, const safetensors_tensor *tensors,
                                    size_t tensor_count, const safetensors_pair *metadata,
                                    size_t metadata_count, char **text, size_t *length,
                                    error_text *error) {
    muonshard_status status = MUONSHARD_OK;
    bool complete = false;
    json_t *header = json_object(), *pairs = json_object();
    char *json = NULL;
    uint64_t offset = 0;
    for (size_t i = 0; i < metadata_count; i++)
        if (json_object_set_new(pairs, metadata[i].key, json_string(metadata[i].value)) != 0)
            goto done;
    if (metadata_count > 0 && json_object_set(header, METADATA, pairs) != 0)
        goto done;
    for (size_t i = 0; i < tensor_count; i++) {
        const safetensors_tensor *tensor = &tensors[i];
        json_t *shape = json_array(), *entry = NULL;
        bool good = shape != NULL;
        if (has_control(tensor->name)) {
            status = fail(error, MUONSHARD_ERR_ARGUMENT,
                          "%s: tensor \"%s\": control character in its name", path, tensor->name);
            json_decref(shape);
            goto done;
        }
        if (strcmp(tensor->name, METADATA) == 0 || json_object_get(header, tensor->name)) {
            status = fail(error, MUONSHARD_ERR_ARGUMENT, "%s: tensor name \"%s\" is taken", path,
                          tensor->name);
            json_decref(shape);
            goto done;
        }
        for (int d = 0; d < tensor->dims && good; d++)
            good = json_array_append_new(shape, json_integer(tensor->shape[d])) == 0;
        if (good) /* takes over the shape */
            entry =
                json_pack("{s:s, s:o, s:[I, I]}", "dtype", tensor->dtype->name, "shape", shape,
                          "data_offsets", (json_int_t)offset, (json_int_t)(offset + tensor->bytes));
        else
            json_decref(shape);
        if (json_object_set_new(header, tensor->name, entry) != 0)
            goto done;
        offset += tensor->bytes;
    }
    json = json_dumps(header, JSON_COMPACT);
    if (!json)
        goto done;
    size_t bare = strlen(json);
    const uint64_t padded = (bare + 7) / 8 * 8;
    if (padded > SAFETENSORS_HEADER_MAX) {
        status = fail(error, MUONSHARD_ERR_ARGUMENT,
                      "%s: a header of %" PRIu64 " bytes is above the format's limit of %zu", path,
                      padded, SAFETENSORS_HEADER_MAX);
        goto done;
    }
    *length = LENGTH_BYTES + (size_t)padded;
    *text = malloc(*length);
    if (!*text)
        goto done;
    memcpy(*text, &padded, LENGTH_BYTES);
    memset(*text + LENGTH_BYTES, ' ', (size_t)padded);
    memcpy(*text + LENGTH_BYTES, json, bare);
    complete = true;
done:
    free(json);
    json_decref(pairs);
    json_decref(header);
    if (!complete && status == MUONSHARD_OK)
        status =
            fail(error, MUONSHARD_ERR_ARGUMENT, "%s: a name is not UTF-8, or memory is out", path);
    return status;
}

muonshard_status safetensors_write(const char *path, const safetensors_tensor *tensors,
                                   size_t tensor_count, const safetensors_pair *metadata,
                                   size_t metadata_count, error_text *error) {
    whole_file file = WHOLE_FILE_NONE;
    char *header = NULL;
    size_t length = 0;
    muonshard_status status = safetensors_can_write(path, error);
    if (status == MUONSHARD_OK)
        status = safetensors_header(path, tensors, tensor_count, metadata, metadata_count, &header,
                                    &length, error);
    TRY_GOTO(status, done);
    TRY_GOTO(whole_file_begin(&file, path, error), done);
    TRY_GOTO(whole_file_write(&file, header, length, error), done);
    for (size_t i = 0; i < tensor_count; i++)
        TRY_GOTO(whole_file_write(&file, tensors[i].data, tensors[i].bytes, error), done);
    status = whole_file_end(&file, error);
done:
    whole_file_close(&file);
    free(header);
    return status;
}
