/* The reader against files written byte by byte here, sound and broken; the writer against their
 * bytes. */
#include "safetensors.h"

#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

#include <dirent.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

static char directory[] = "/tmp/test_safetensors_XXXXXX";
static char path[128];
static error_text error;

static int make_directory(void **state) {
    (void)state;
    if (!mkdtemp(directory))
        return -1;
    snprintf(path, sizeof path, "%s/a.safetensors", directory);
    return 0;
}

static int remove_directory(void **state) {
    (void)state;
    unlink(path);
    return rmdir(directory); /* fails, and the suite with it, when a test left a file behind */
}

static void put_bytes(const char *name, const void *bytes, size_t size) {
    FILE *out = fopen(name, "wb");
    assert_non_null(out);
    assert_int_equal(fwrite(bytes, 1, size, out), size);
    assert_int_equal(fclose(out), 0);
}

static size_t get_bytes(const char *name, char *bytes, size_t size) {
    FILE *in = fopen(name, "rb");
    assert_non_null(in);
    size_t read = fread(bytes, 1, size, in);
    fclose(in);
    return read;
}

/* Length, header, data. */
static size_t put_file(char *bytes, const char *header, const void *data, size_t data_size) {
    uint64_t length = strlen(header);
    memcpy(bytes, &length, 8);
    memcpy(bytes + 8, header, length);
    if (data_size)
        memcpy(bytes + 8 + length, data, data_size);
    put_bytes(path, bytes, 8 + length + data_size);
    return 8 + length + data_size;
}

static int temporaries(void) {
    int count = 0;
    DIR *dir = opendir(directory);
    assert_non_null(dir);
    for (struct dirent *entry; (entry = readdir(dir));)
        count += strstr(entry->d_name, ".tmp") != NULL;
    closedir(dir);
    return count;
}

/* ---- reading ---- */

static const float six[6] = {1.5f, -2.0f, 3.25f, 0.0f, -0.5f, 1e-30f};

static void reads_tensors_in_file_order(void **state) {
    (void)state;
    char bytes[1024];
    /* JSON order is not file order; the header's length makes the data start at an odd address. */
    put_file(bytes,
             "{\"__metadata__\":{\"format\":\"pt\"},"
             "\"b\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[16,24]},"
             "\"a\":{\"dtype\":\"F32\",\"shape\":[2,2],\"data_offsets\":[0,16]},"
             "\"none\":{\"dtype\":\"F16\",\"shape\":[0,7],\"data_offsets\":[16,16]}} ",
             six, sizeof six);
    safetensors_file file;
    assert_int_equal(safetensors_open(path, &file, &error), MUONSHARD_OK);
    assert_int_equal(file.tensor_count, 3);
    assert_string_equal(file.tensors[0].name, "a");
    assert_string_equal(file.tensors[1].name, "none");
    assert_string_equal(file.tensors[2].name, "b");
    assert_int_equal(file.tensors[0].dims, 2);
    assert_int_equal(file.tensors[0].shape[1], 2);
    assert_int_equal(file.tensors[0].elements, 4);
    assert_int_equal(file.tensors[1].elements, 0);
    assert_memory_equal(file.tensors[0].data, six, 16);
    assert_memory_equal(file.tensors[2].data, six + 4, 8);
    assert_int_equal((uintptr_t)file.tensors[0].data % 4, 0);
    assert_int_equal((uintptr_t)file.tensors[2].data % 4, 0);
    assert_int_equal(file.metadata_count, 1);
    assert_string_equal(file.metadata[0].key, "format");
    assert_string_equal(file.metadata[0].value, "pt");
    assert_ptr_equal(safetensors_find(&file, "b"), &file.tensors[2]);
    assert_null(safetensors_find(&file, "c"));
    char shape[SAFETENSORS_SHAPE_TEXT];
    assert_string_equal(safetensors_shape_text(&file.tensors[1], shape), "[0, 7]");
    safetensors_close(&file);

    put_file(bytes, "{\"s\":{\"dtype\":\"F64\",\"shape\":[],\"data_offsets\":[0,8]}}", six, 8);
    assert_int_equal(safetensors_open(path, &file, &error), MUONSHARD_OK);
    assert_int_equal(file.tensors[0].elements, 1);
    assert_int_equal((uintptr_t)file.tensors[0].data % 8, 0);
    assert_memory_equal(file.tensors[0].data, six, 8);
    safetensors_close(&file);

    put_file(bytes, "{}", NULL, 0);
    assert_int_equal(safetensors_open(path, &file, &error), MUONSHARD_OK);
    assert_int_equal(file.tensor_count, 0);
    safetensors_close(&file);
}

/* The file is refused with this status and a line that names the file and has `text` in it. */
static void expect_refused(muonshard_status expected, const char *text) {
    safetensors_file file;
    error.text[0] = '\0';
    muonshard_status status = safetensors_open(path, &file, &error);
    if (status == MUONSHARD_OK)
        safetensors_close(&file);
    if (status != expected || !strstr(error.text, path) || !strstr(error.text, text) ||
        strchr(error.text, '\n'))
        fail_msg("expected status %d and \"%s\"; status %d, \"%s\"", (int)expected, text,
                 (int)status, error.text);
}

static void each_violation_is_named(void **state) {
    (void)state;
    static const struct {
        const char *header; /* over 24 bytes of data */
        const char *text;
    } cases[] = {
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[6],\"data_offsets\":[0,24]}", "not valid JSON"},
        {"[1,2]", "not a JSON object"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[6],\"data_offsets\":[0,24]},"
         "\"a\":{\"dtype\":\"F32\",\"shape\":[6],\"data_offsets\":[0,24]}}",
         "duplicate"},
        {"{\"__metadata__\":[],\"a\":{\"dtype\":\"F32\",\"shape\":[6],\"data_offsets\":[0,24]}}",
         "__metadata__ is not a mapping"},
        {"{\"__metadata__\":{\"x\":1}}", "__metadata__: \"x\" is not a string"},
        {"{\"a\":5}", "tensor \"a\": its entry is not a mapping"},
        {"{\"a\":{\"shape\":[6],\"data_offsets\":[0,24]}}", "tensor \"a\": dtype is missing"},
        {"{\"a\":{\"dtype\":\"F31\",\"shape\":[6],\"data_offsets\":[0,24]}}",
         "tensor \"a\": unknown dtype \"F31\""},
        {"{\"a\":{\"dtype\":\"F32\",\"data_offsets\":[0,24]}}", "tensor \"a\": shape is missing"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[6.0],\"data_offsets\":[0,24]}}",
         "tensor \"a\": size 0 of the shape is not an integer"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2,-3],\"data_offsets\":[0,24]}}",
         "tensor \"a\": size 1 of the shape is negative (-3)"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[4294967296,4294967296],\"data_offsets\":[0,24]}}",
         "tensor \"a\": the product of the shape overflows"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[4611686018427387910],\"data_offsets\":[0,24]}}",
         "tensor \"a\": its shape is no possible number of bytes"},
        {"{\"a\":{\"dtype\":\"F4\",\"shape\":[3],\"data_offsets\":[0,24]}}",
         "tensor \"a\": its shape is no possible number of bytes of F4"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[6]}}", "tensor \"a\": data_offsets is not a pair"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[6],\"data_offsets\":[0,24,48]}}",
         "tensor \"a\": data_offsets is not a pair"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[6],\"data_offsets\":[24,0]}}",
         "tensor \"a\": data_offsets [24, 0] are no range"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[6],\"data_offsets\":[-24,0]}}",
         "tensor \"a\": data_offsets [-24, 0] are no range"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[7],\"data_offsets\":[0,28]}}",
         "tensor \"a\" ends at byte 28 of the data, but the file has only 24"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[5],\"data_offsets\":[0,24]}}",
         "tensor \"a\": F32 [5] needs 20 bytes, data_offsets [0, 24] are 24"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[6],\"data_offsets\":[0,24],\"scale\":2}}",
         "tensor \"a\": its entry has keys other than"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,16]},"
         "\"b\":{\"dtype\":\"F32\",\"shape\":[3],\"data_offsets\":[12,24]}}",
         "tensors \"a\" and \"b\" overlap at byte 12"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[6],\"data_offsets\":[0,24]},"
         "\"b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,8]}}",
         "tensors \"a\" and \"b\" overlap at byte 4"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]},"
         "\"b\":{\"dtype\":\"F32\",\"shape\":[3],\"data_offsets\":[12,24]}}",
         "bytes 8 to 12 of the data, before tensor \"b\", belong to no tensor"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[5],\"data_offsets\":[0,20]}}",
         "bytes 20 to 24 of the data, at the end of the file, belong to no tensor"},
        {"{}", "bytes 0 to 24 of the data, at the end of the file"},
        {"{\"a\\nb\":{\"dtype\":\"F32\",\"shape\":[6],\"data_offsets\":[0,24]}}",
         "tensor \"a?b\": control character"},
    };
    char bytes[1024];
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        put_file(bytes, cases[i].header, six, sizeof six);
        expect_refused(MUONSHARD_ERR_FORMAT, cases[i].text);
    }
    put_file(bytes,
             "{\"a\":{\"dtype\":\"F32\",\"shape\":[1,1,1,1,1,1,1,1,6],\"data_offsets\":[0,24]}}",
             six, sizeof six);
    expect_refused(MUONSHARD_ERR_UNSUPPORTED, "tensor \"a\" has 9 dimensions; at most 8");
}

static void bad_files_are_refused(void **state) {
    (void)state;
    char bytes[64] = {0};
    const uint64_t beyond = 57, enormous = 100000001, wrap = UINT64_MAX;
    put_bytes(path, bytes, 0);
    expect_refused(MUONSHARD_ERR_FORMAT, "0 bytes");
    put_bytes(path, bytes, 7);
    expect_refused(MUONSHARD_ERR_FORMAT, "7 bytes");
    memcpy(bytes, &beyond, 8);
    put_bytes(path, bytes, sizeof bytes);
    expect_refused(MUONSHARD_ERR_FORMAT, "header length 57 goes past the end of the file");
    memcpy(bytes, &enormous, 8);
    put_bytes(path, bytes, sizeof bytes);
    expect_refused(MUONSHARD_ERR_FORMAT, "above the format's limit");
    memcpy(bytes, &wrap, 8);
    put_bytes(path, bytes, sizeof bytes);
    expect_refused(MUONSHARD_ERR_FORMAT, "above the format's limit");

    unlink(path);
    expect_refused(MUONSHARD_ERR_IO, "No such file");
    assert_int_equal(mkdir(path, 0777), 0);
    expect_refused(MUONSHARD_ERR_IO, "is a directory");
    rmdir(path);
    assert_int_equal(mkfifo(path, 0666), 0);
    expect_refused(MUONSHARD_ERR_IO, "is special");
    unlink(path);
}

static uint64_t next_random(uint64_t *random) {
    *random ^= *random << 13;
    *random ^= *random >> 7;
    *random ^= *random << 17;
    return *random;
}

/* Whatever is in the file: no crash, and either a error.text or tensors that lie wholly inside the
 * file. */
static void mutated_files(void **state) {
    (void)state;
    static const char *const headers[] = {
        "{\"__metadata__\":{\"k\":\"v\"},\"a\":{\"dtype\":\"F32\",\"shape\":[2,2],\"data_offsets\":"
        "[0,16]},\"b\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[16,24]}}",
        "{\"a\":{\"dtype\":\"BF16\",\"shape\":[12],\"data_offsets\":[0,24]}}    ",
    };
    static const char interesting[] = "0123456789-{}[]\":,. e\xff\x80";
    char bytes[512], good[512];
    uint64_t random = 88172645463325252u;
    int refused = 0, accepted = 0;
    for (int round = 0; round < 6000; round++) {
        size_t size = put_file(good, headers[round % 2], six, sizeof six);
        memcpy(bytes, good, sizeof bytes);
        int changes = 1 + (int)(next_random(&random) % 4) / 2;
        for (int c = 0; c < changes && size > 0; c++) {
            size_t at = next_random(&random) % size;
            switch (next_random(&random) % 6) {
            case 0: bytes[at] = (char)(bytes[at] ^ (1 << next_random(&random) % 8)); break;
            case 1: bytes[at] = interesting[next_random(&random) % (sizeof interesting - 1)]; break;
            case 2: size = at; break;
            case 3: bytes[next_random(&random) % 8] = (char)next_random(&random); break;
            case 4: /* a byte less, so that what follows moves */
                memmove(bytes + at, bytes + at + 1, size - at - 1);
                size--;
                break;
            case 5: /* a byte more */
                memmove(bytes + at + 1, bytes + at, size - at);
                bytes[at] = interesting[next_random(&random) % (sizeof interesting - 1)];
                size++;
                break;
            }
        }
        put_bytes(path, bytes, size);
        safetensors_file file;
        error.text[0] = '\0';
        if (safetensors_open(path, &file, &error) != MUONSHARD_OK) {
            assert_non_null(strstr(error.text, path));
            assert_null(strchr(error.text, '\n'));
            refused++;
            continue;
        }
        accepted++;
        for (size_t i = 0; i < file.tensor_count; i++) {
            const safetensors_tensor *tensor = &file.tensors[i];
            const char *first = tensor->data;
            const char *map = file.map;
            if (!file.copies[i])
                assert_true(first >= map && first + tensor->bytes <= map + size);
            assert_int_equal(tensor->bytes, tensor->elements * tensor->dtype->bits / 8);
            unsigned sum = 0;
            for (size_t b = 0; b < tensor->bytes; b++)
                sum += (unsigned char)first[b];
            assert_true(sum <= 255 * tensor->bytes);
        }
        safetensors_close(&file);
    }
    print_message("%d refused, %d accepted\n", refused, accepted);
    assert_true(refused > 2000 && accepted > 200); /* both have been seen */
    unlink(path);
}

/* ---- writing ---- */

static safetensors_tensor f32(const char *name, int dims, int64_t rows, int64_t cols,
                              const float *data) {
    safetensors_tensor tensor = {.name = name,
                                 .dtype = safetensors_dtype_find("F32"),
                                 .dims = dims,
                                 .shape = {rows, cols},
                                 .data = data};
    tensor.elements = (size_t)(rows * cols);
    tensor.bytes = tensor.elements * sizeof(float);
    return tensor;
}

static void writes_the_format(void **state) {
    (void)state;
    const safetensors_tensor tensors[] = {f32("z", 2, 2, 2, six), f32("b", 1, 2, 1, six + 4)};
    const safetensors_pair metadata[] = {{"format", "pt"}};
    assert_int_equal(safetensors_write(path, tensors, 2, metadata, 1, &error), MUONSHARD_OK);
    assert_int_equal(temporaries(), 0);

    static const char header[] =
        "{\"__metadata__\":{\"format\":\"pt\"},\"z\":{\"dtype\":\"F32\",\"shape\":[2,2],"
        "\"data_offsets\":[0,16]},\"b\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[16,24]}"
        "}";
    char bytes[512];
    size_t size = get_bytes(path, bytes, sizeof bytes);
    uint64_t length;
    memcpy(&length, bytes, 8);
    assert_int_equal(length % 8, 0);
    assert_true(length >= strlen(header) && length < strlen(header) + 8);
    assert_memory_equal(bytes + 8, header, strlen(header));
    for (size_t i = strlen(header); i < length; i++)
        assert_int_equal(bytes[8 + i], ' ');
    assert_int_equal(size, 8 + length + sizeof six);
    assert_memory_equal(bytes + 8 + length, six, sizeof six);

    /* and over an older file */
    assert_int_equal(safetensors_write(path, tensors + 1, 1, NULL, 0, &error), MUONSHARD_OK);
    safetensors_file file;
    assert_int_equal(safetensors_open(path, &file, &error), MUONSHARD_OK);
    assert_int_equal(file.tensor_count, 1);
    assert_int_equal(file.metadata_count, 0);
    assert_memory_equal(file.tensors[0].data, six + 4, 8);
    safetensors_close(&file);
    unlink(path);
}

static void failed_write_leaves_the_old_file(void **state) {
    (void)state;
    static float large[4096];
    const safetensors_tensor small = f32("a", 1, 6, 1, six), big = f32("a", 1, 4096, 1, large);
    assert_int_equal(safetensors_write(path, &small, 1, NULL, 0, &error), MUONSHARD_OK);
    char before[512], after[512];
    size_t size = get_bytes(path, before, sizeof before);

    struct rlimit old, limit;
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &old), 0);
    limit = old;
    limit.rlim_cur = 1000; /* the write fails midway */
    signal(SIGXFSZ, SIG_IGN);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &limit), 0);
    muonshard_status status = safetensors_write(path, &big, 1, NULL, 0, &error);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &old), 0);
    assert_int_equal(status, MUONSHARD_ERR_IO);
    assert_non_null(strstr(error.text, path));
    assert_non_null(strstr(error.text, "File too large"));
    assert_int_equal(temporaries(), 0);
    assert_int_equal(get_bytes(path, after, sizeof after), size);
    assert_memory_equal(after, before, size);

    const safetensors_tensor twice[] = {small, small};
    assert_int_equal(safetensors_write(path, twice, 2, NULL, 0, &error), MUONSHARD_ERR_ARGUMENT);
    assert_non_null(strstr(error.text, "\"a\" is taken"));
    const safetensors_tensor latin = f32("\xe9", 1, 6, 1, six);
    assert_int_equal(safetensors_write(path, &latin, 1, NULL, 0, &error), MUONSHARD_ERR_ARGUMENT);
    assert_non_null(strstr(error.text, "UTF-8"));
    assert_int_equal(get_bytes(path, after, sizeof after), size);
    assert_memory_equal(after, before, size);
    unlink(path);
}

static void unwritable_places(void **state) {
    (void)state;
    const safetensors_tensor tensor = f32("a", 1, 6, 1, six);
    char name[256];
    snprintf(name, sizeof name, "%s/missing/a.safetensors", directory);
    assert_int_equal(safetensors_can_write(name, &error), MUONSHARD_ERR_IO);
    assert_non_null(strstr(error.text, name));
    assert_int_equal(safetensors_write(name, &tensor, 1, NULL, 0, &error), MUONSHARD_ERR_IO);
    assert_int_equal(safetensors_can_write(directory, &error), MUONSHARD_ERR_IO);
    assert_non_null(strstr(error.text, "a directory stands there"));
    assert_int_equal(safetensors_can_write("/dev/null", &error), MUONSHARD_ERR_IO);
    snprintf(name, sizeof name, "%s/", directory);
    assert_int_equal(safetensors_can_write(name, &error), MUONSHARD_ERR_IO);
    assert_int_equal(safetensors_can_write("", &error), MUONSHARD_ERR_IO);
    put_bytes(path, "x", 1);
    snprintf(name, sizeof name, "%s/under", path);
    assert_int_equal(safetensors_can_write(name, &error), MUONSHARD_ERR_IO);
    assert_non_null(strstr(error.text, "Not a directory"));
    assert_int_equal(safetensors_can_write(path, &error), MUONSHARD_OK);
    unlink(path);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(reads_tensors_in_file_order),
        cmocka_unit_test(each_violation_is_named),
        cmocka_unit_test(bad_files_are_refused),
        cmocka_unit_test(mutated_files),
        cmocka_unit_test(writes_the_format),
        cmocka_unit_test(failed_write_leaves_the_old_file),
        cmocka_unit_test(unwritable_places),
    };
    return cmocka_run_group_tests_name("safetensors", tests, make_directory, remove_directory);
}
