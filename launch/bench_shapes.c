/* bench_shapes.c - lists of shapes: what `bench ns` runs through, and a model of nothing else. */
#include <stdlib.h>
#include <string.h>

#include "bench_step.h"

/* A side of a matrix, and how many there can be: products of them don't overflow. */
enum { MOST_ROWS = 65536, MOST_COLS = 262144, MOST_COUNT = 100000 };

static bool read_one(const char **at, bench_shape *s) {
    char *end;
    if (strspn(*at, "0123456789x,") != strlen(*at)) /* spaces and signs are numbers to strtoul */
        return false;
    *s = (bench_shape){.rows = strtoul(*at, &end, 10)};
    if (*end != 'x')
        return false;
    s->cols = strtoul(end + 1, &end, 10);
    if (*end == 'x') {
        s->count = strtoul(end + 1, &end, 10);
        if (!s->count || s->count > MOST_COUNT)
            return false;
    }
    if (*end && *end != ',')
        return false;
    *at = *end ? end + 1 : end;
    return s->rows && s->cols && s->rows <= MOST_ROWS && s->cols <= MOST_COLS;
}

muonshard_status bench_read_shape(bench *b, const char **at, bench_shape *s) {
    const char *before = *at;
    return read_one(at, s)
               ? MUONSHARD_OK
               : message_fail(b->message, MUONSHARD_ERR_ARGUMENT,
                              "--shapes: '%s' is not ROWSxCOLS or ROWSxCOLSxCOUNT, separated by "
                              "commas",
                              before);
}

static muonshard_status check_dtype(bench *b, const char *option, const char *dtype) {
    return dtype && strcmp(dtype, "fp32") && strcmp(dtype, "bf16") && strcmp(dtype, "fp16")
               ? message_fail(b->message, MUONSHARD_ERR_ARGUMENT,
                              "%s is '%s'; fp32, bf16 and fp16 are known", option, dtype)
               : MUONSHARD_OK;
}

/* What a model file would say. */
static muonshard_status write_model(bench *b, FILE *file) {
    int number = 0;
    TRY(check_dtype(b, "--dtype", b->dtype));
    TRY(check_dtype(b, "--grad-dtype", b->grad_dtype));
    fprintf(file, "model: \"%s\"\ntensors:\n", b->shapes);
    for (const char *at = b->shapes; *at;) {
        bench_shape s;
        TRY(bench_read_shape(b, &at, &s));
        fprintf(file, "  - {name: w%d, role: matrix, shape: [%zu, %zu, %zu], dtype: %s", number++,
                s.count ? s.count : 1, s.rows, s.cols, b->dtype ? b->dtype : "fp32");
        if (b->grad_dtype)
            fprintf(file, ", grad_dtype: %s", b->grad_dtype);
        fputs("}\n", file);
    }
    return MUONSHARD_OK;
}

muonshard_status bench_shapes_model(bench *b) {
    char *text = NULL;
    size_t size = 0;
    FILE *file = open_memstream(&text, &size);
    if (!file)
        return message_fail(b->message, MUONSHARD_ERR_MEMORY, "out of memory");
    muonshard_status status = write_model(b, file);
    if (fclose(file) && status == MUONSHARD_OK)
        status = message_fail(b->message, MUONSHARD_ERR_MEMORY, "out of memory");
    muonshard_config *config = b->cmd->config;
    if (status == MUONSHARD_OK) {
        status = muonshard_config_load_string(config, text);
        if (status)
            message_fail(b->message, status, "--shapes: %s", muonshard_config_last_error(config));
    }
    free(text);
    return status;
}
