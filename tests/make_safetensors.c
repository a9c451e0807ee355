/* Makes and compares small safetensors files for test_cli.sh.
 *
 *   make_safetensors make FILE SEED [NAME=ROWSxCOLS...]   F32, values in [-1, 1) from the seed and
 * the name; ROWSxCOLSxnan: the first value is NaN make_safetensors raw FILE HEADER DATA_BYTES
 * [LENGTH]  a file as given, sound or not; LENGTH: what the file says of the header's length
 *   make_safetensors mean FILE ONE OTHER                 the mean of two files' F32 tensors
 *   make_safetensors differ ONE OTHER                     prints the largest difference of two
 * files with the same tensors in the same order */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "safetensors.h"

#define TENSORS_MAX 32

static char message[COMMAND_MESSAGE];

static int failed(const char *text) {
    fprintf(stderr, "make_safetensors: %s\n", text);
    return 1;
}

static uint64_t next_random(uint64_t *random) {
    *random = *random * 6364136223846793005u + 1442695040888963407u;
    return *random >> 40;
}

/* "NAME=2x3" cut in place. */
static bool read_tensor(char *text, uint64_t seed, safetensors_tensor *tensor) {
    char *at = strchr(text, '=');
    if (!at)
        return false;
    *at++ = '\0';
    *tensor = (safetensors_tensor){.name = text, .dtype = safetensors_dtype_find("F32")};
    tensor->elements = 1;
    while (*at && strcmp(at, "nan") != 0) {
        int64_t length = strtoll(at, &at, 10);
        tensor->shape[tensor->dims++] = length;
        tensor->elements *= (size_t)length;
        at += *at == 'x';
    }
    tensor->bytes = tensor->elements * sizeof(float);
    float *data = malloc(tensor->bytes + 1);
    if (!data)
        return false;
    for (const char *c = text; *c; c++)
        seed = seed * 131 + (unsigned char)*c;
    for (size_t i = 0; i < tensor->elements; i++)
        data[i] = (float)next_random(&seed) / 8388608.0f - 1.0f;
    if (*at)
        data[0] = NAN;
    tensor->data = data;
    return true;
}

static int make(int count, char **arguments) {
    safetensors_tensor tensors[TENSORS_MAX] = {0};
    size_t tensor_count = 0;
    bool good = count - 2 <= TENSORS_MAX;
    for (int i = 2; i < count && good; i++)
        if ((good = read_tensor(arguments[i], strtoull(arguments[1], NULL, 10),
                                &tensors[tensor_count])))
            tensor_count++;
    if (!good)
        snprintf(message, sizeof message, "not NAME=ROWSxCOLS, or out of memory");
    else
        good = safetensors_write(arguments[0], tensors, tensor_count, NULL, 0, message) ==
               MUONSHARD_OK;
    for (size_t i = 0; i < tensor_count; i++)
        free((void *)tensors[i].data);
    return good ? 0 : failed(message);
}

static int raw(int count, char **arguments) {
    uint64_t length = strlen(arguments[1]);
    FILE *out = fopen(arguments[0], "wb");
    if (!out)
        return failed(arguments[0]);
    if (count > 3)
        length = strtoull(arguments[3], NULL, 10);
    fwrite(&length, sizeof length, 1, out);
    fputs(arguments[1], out);
    for (int64_t i = strtoll(arguments[2], NULL, 10); i > 0; i--)
        fputc(0, out);
    return fclose(out) == 0 ? 0 : failed(arguments[0]);
}

static int differ(int count, char **arguments) {
    safetensors_file one, other;
    if (safetensors_open(arguments[0], &one, message) != MUONSHARD_OK)
        return failed(message);
    if (safetensors_open(arguments[1], &other, message) != MUONSHARD_OK) {
        safetensors_close(&one);
        return failed(message);
    }
    bool same = one.tensor_count == other.tensor_count;
    double largest = 0;
    int compared = 0;
    for (size_t i = 0; i < one.tensor_count && same; i++) {
        const safetensors_tensor *a = &one.tensors[i], *b = &other.tensors[i];
        const float *x = a->data, *y = b->data;
        same = strcmp(a->name, b->name) == 0 && a->dims == b->dims &&
               memcmp(a->shape, b->shape, sizeof a->shape) == 0;
        if (count > 2 && strcmp(a->name, arguments[2]) != 0)
            continue;
        compared++;
        for (size_t k = 0; k < a->elements && same; k++)
            largest =
                fmax(largest, isfinite(x[k]) && isfinite(y[k]) ? fabs((double)x[k] - (double)y[k])
                                                               : INFINITY);
    }
    safetensors_close(&one);
    safetensors_close(&other);
    if (!same || compared == 0)
        return failed("the files hold other tensors");
    printf("%.3e\n", largest);
    return 0;
}

static int mean(char **arguments) {
    safetensors_file one = {0}, other = {0};
    safetensors_tensor tensors[TENSORS_MAX] = {0};
    size_t count = 0;
    bool good = safetensors_open(arguments[1], &one, message) == MUONSHARD_OK &&
                safetensors_open(arguments[2], &other, message) == MUONSHARD_OK;
    for (size_t i = 0; good && i < one.tensor_count && i < TENSORS_MAX; i++) {
        const float *x = one.tensors[i].data, *y = other.tensors[i].data;
        float *data = malloc(one.tensors[i].bytes + 1);
        good = data && i < other.tensor_count && one.tensors[i].bytes == other.tensors[i].bytes;
        for (size_t k = 0; k < one.tensors[i].elements && good; k++)
            data[k] = (x[k] + y[k]) / 2;
        tensors[i] = one.tensors[i];
        tensors[i].data = data;
        count++;
    }
    good =
        good && safetensors_write(arguments[0], tensors, count, NULL, 0, message) == MUONSHARD_OK;
    for (size_t i = 0; i < count; i++)
        free((void *)tensors[i].data);
    safetensors_close(&one);
    safetensors_close(&other);
    return good ? 0 : failed(message);
}

int main(int argc, char **argv) {
    if (argc >= 4 && strcmp(argv[1], "make") == 0)
        return make(argc - 2, argv + 2);
    if (argc >= 5 && strcmp(argv[1], "raw") == 0)
        return raw(argc - 2, argv + 2);
    if (argc >= 4 && strcmp(argv[1], "differ") == 0)
        return differ(argc - 2, argv + 2);
    if (argc == 5 && strcmp(argv[1], "mean") == 0)
        return mean(argv + 2);
    return failed("make | raw | mean | differ");
}
