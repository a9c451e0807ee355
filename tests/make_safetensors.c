/* Makes and compares small safetensors files for test_cli.sh.
 *
 *   make FILE SEED [NAME=ROWSxCOLS[xnan][:DTYPE]...]
 *       values in [-1, 1) from the seed and the name; xnan: the first is NaN; DTYPE: F32, BF16, F16
 *       or I32, F32 where none is given
 *   raw FILE HEADER DATA_BYTES [LENGTH]
 *       a file as given, sound or not; LENGTH: what the file says of the header's length
 *   cast FILE ONE DTYPE
 *       the same tensors, rounded to nearest even
 *   mean FILE ONE OTHER
 *       the mean of two files' tensors, in F32
 *   differ ONE OTHER [NAME]
 *       prints the largest difference of two files with the same tensors in the same order */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "safetensors.h"

#define TENSORS_MAX 32

static error_text error;

static int failed(const char *text) {
    fprintf(stderr, "make_safetensors: %s\n", text);
    return 1;
}

static uint64_t next_random(uint64_t *random) {
    *random = *random * 6364136223846793005u + 1442695040888963407u;
    return *random >> 40;
}

/* ---- numbers: bits to value and back, by arithmetic alone ---- */

static double decode(const safetensors_tensor *tensor, size_t i) {
    if (tensor->dtype->bits == 32) {
        float value;
        memcpy(&value, (const char *)tensor->data + 4 * i, 4);
        return value;
    }
    uint16_t bits;
    memcpy(&bits, (const char *)tensor->data + 2 * i, 2);
    const int digits = tensor->dtype->name[0] == 'B' ? 7 : 10, top = (1 << (15 - digits)) - 1;
    const int exponent = bits >> digits & top, fraction = bits & ((1 << digits) - 1);
    const double sign = bits & 0x8000 ? -1 : 1;
    if (exponent == top)
        return fraction ? NAN : sign * INFINITY;
    return sign * ldexp(fraction + (exponent ? 1 << digits : 0),
                        (exponent ? exponent : 1) - top / 2 - digits);
}

static void encode(const safetensors_tensor *tensor, size_t i, double value) {
    char *data = (char *)tensor->data; /* own */
    if (tensor->dtype->bits == 32) {
        const float rounded = (float)value;
        memcpy(data + 4 * i, &rounded, 4);
        return;
    }
    const int digits = tensor->dtype->name[0] == 'B' ? 7 : 10, top = (1 << (15 - digits)) - 1;
    int exponent = value == 0 || !isfinite(value) ? 0 : ilogb(value) + top / 2;
    exponent = exponent < 1 ? 1 : exponent;
    /* In units of the last digit; one too many carries into the exponent. */
    const double units = nearbyint(ldexp(fabs(value), digits + top / 2 - exponent));
    int bits = isnan(value) ? top << digits | 1 : top << digits;
    if (isfinite(value) && units + ldexp(exponent - 1, digits) < ldexp(top, digits))
        bits = (int)units + ((exponent - 1) << digits);
    const uint16_t stored = (uint16_t)(bits | (signbit(value) ? 0x8000 : 0));
    memcpy(data + 2 * i, &stored, 2);
}

/* Memory for `tensor` of a dtype of its own. */
static bool allocate(safetensors_tensor *tensor, const char *dtype) {
    tensor->dtype = safetensors_dtype_find(dtype);
    if (!tensor->dtype || (tensor->dtype->bits != 32 && tensor->dtype->bits != 16))
        return false;
    tensor->bytes = tensor->elements * tensor->dtype->bits / 8;
    tensor->data = calloc(tensor->bytes + 1, 1);
    return tensor->data != NULL;
}

/* "NAME=2x3:BF16" cut in place. */
static bool read_tensor(char *text, uint64_t seed, safetensors_tensor *tensor) {
    char *at = strchr(text, '='), *dtype = strchr(text, ':');
    if (!at)
        return false;
    *at++ = '\0';
    if (dtype)
        *dtype++ = '\0';
    *tensor = (safetensors_tensor){.name = text, .elements = 1};
    while (*at && strcmp(at, "nan") != 0) {
        int64_t length = strtoll(at, &at, 10);
        tensor->shape[tensor->dims++] = length;
        tensor->elements *= (size_t)length;
        at += *at == 'x';
    }
    if (!allocate(tensor, dtype ? dtype : "F32"))
        return false;
    for (const char *c = text; *c; c++)
        seed = seed * 131 + (unsigned char)*c;
    for (size_t i = 0; i < tensor->elements; i++)
        encode(tensor, i, (double)next_random(&seed) / 8388608.0 - 1.0);
    if (*at)
        encode(tensor, 0, NAN);
    return true;
}

/* ---- commands ---- */

static int make(int count, char **arguments) {
    safetensors_tensor tensors[TENSORS_MAX] = {0};
    size_t tensor_count = 0;
    bool good = count - 2 <= TENSORS_MAX;
    for (int i = 2; i < count && good; i++)
        if ((good = read_tensor(arguments[i], strtoull(arguments[1], NULL, 10),
                                &tensors[tensor_count])))
            tensor_count++;
    if (!good)
        snprintf(error.text, sizeof error.text, "not NAME=ROWSxCOLS:DTYPE, or out of memory");
    else
        good =
            safetensors_write(arguments[0], tensors, tensor_count, NULL, 0, &error) == MUONSHARD_OK;
    for (size_t i = 0; i < tensor_count; i++)
        free((void *)tensors[i].data);
    return good ? 0 : failed(error.text);
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
    if (safetensors_open(arguments[0], &one, &error) != MUONSHARD_OK)
        return failed(error.text);
    if (safetensors_open(arguments[1], &other, &error) != MUONSHARD_OK) {
        safetensors_close(&one);
        return failed(error.text);
    }
    bool same = one.tensor_count == other.tensor_count;
    double largest = 0;
    int compared = 0;
    for (size_t i = 0; i < one.tensor_count && same; i++) {
        const safetensors_tensor *a = &one.tensors[i], *b = &other.tensors[i];
        same = strcmp(a->name, b->name) == 0 && a->dtype == b->dtype && a->dims == b->dims &&
               memcmp(a->shape, b->shape, sizeof a->shape) == 0;
        if (count > 2 && strcmp(a->name, arguments[2]) != 0)
            continue;
        compared++;
        for (size_t k = 0; k < a->elements && same; k++) {
            const double x = decode(a, k), y = decode(b, k);
            largest = fmax(largest, isfinite(x) && isfinite(y) ? fabs(x - y) : INFINITY);
        }
    }
    safetensors_close(&one);
    safetensors_close(&other);
    if (!same || compared == 0)
        return failed("the files hold other tensors");
    printf("%.3e\n", largest);
    return 0;
}

/* The mean of a file with itself is a cast. */
static int mean(const char *file, const char *first, const char *second, const char *dtype) {
    safetensors_file one = {0}, other = {0};
    safetensors_tensor tensors[TENSORS_MAX] = {0};
    size_t count = 0;
    bool good = safetensors_open(first, &one, &error) == MUONSHARD_OK &&
                safetensors_open(second, &other, &error) == MUONSHARD_OK &&
                one.tensor_count == other.tensor_count && one.tensor_count <= TENSORS_MAX;
    for (size_t i = 0; good && i < one.tensor_count; i++) {
        const safetensors_tensor *a = &one.tensors[i], *b = &other.tensors[i];
        tensors[i] = *a;
        count++;
        good = allocate(&tensors[i], dtype) && a->elements == b->elements;
        for (size_t k = 0; k < a->elements && good; k++)
            encode(&tensors[i], k, (decode(a, k) + decode(b, k)) / 2);
    }
    good = good && safetensors_write(file, tensors, count, NULL, 0, &error) == MUONSHARD_OK;
    for (size_t i = 0; i < count; i++)
        free((void *)tensors[i].data);
    safetensors_close(&one);
    safetensors_close(&other);
    return good ? 0 : failed(error.text);
}

int main(int argc, char **argv) {
    if (argc >= 4 && strcmp(argv[1], "make") == 0)
        return make(argc - 2, argv + 2);
    if (argc >= 5 && strcmp(argv[1], "raw") == 0)
        return raw(argc - 2, argv + 2);
    if (argc >= 4 && strcmp(argv[1], "differ") == 0)
        return differ(argc - 2, argv + 2);
    if (argc == 5 && strcmp(argv[1], "mean") == 0)
        return mean(argv[2], argv[3], argv[4], "F32");
    if (argc == 5 && strcmp(argv[1], "cast") == 0)
        return mean(argv[2], argv[3], argv[3], argv[4]);
    return failed("make | raw | cast | mean | differ");
}
