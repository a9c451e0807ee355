#include "optim/trace.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct trace {
    FILE *file; /* own */
    int rank;
    double zero;
};

void rank_path(char *text, size_t size, const char *path, int rank, int world_size) {
    const char *mark = strstr(path, "%r");
    if (mark)
        snprintf(text, size, "%.*s%d%s", (int)(mark - path), path, rank, mark + 2);
    else if (world_size > 1)
        snprintf(text, size, "%s.%d", path, rank);
    else
        snprintf(text, size, "%s", path);
}

muonshard_status trace_open(trace **out, const char *path, int rank, int world_size,
                            error_text *error) {
    *out = NULL;
    if (!*path)
        return MUONSHARD_OK;
    char name[4096];
    rank_path(name, sizeof name, path, rank, world_size);
    trace *t = calloc(1, sizeof *t);
    FAIL_IF(!t, error, MUONSHARD_ERR_MEMORY, "out of memory");
    t->file = fopen(name, "w");
    if (!t->file) {
        free(t);
        return fail(error, MUONSHARD_ERR_IO, "trace %s: %s", name, strerror(errno));
    }
    t->rank = rank;
    t->zero = now_s();
    fprintf(t->file, "[");
    for (int stream = 0; stream < STREAM_COUNT; stream++)
        fprintf(t->file,
                "%s\n{\"name\":\"thread_name\",\"ph\":\"M\",\"pid\":%d,\"tid\":%d,"
                "\"args\":{\"name\":\"%s\"}}",
                stream ? "," : "", rank, stream,
                stream == STREAM_COMM ? "communication" : "compute");
    *out = t;
    return MUONSHARD_OK;
}

void trace_op(trace *t, const op *o, int64_t step, double start, double end) {
    if (!t)
        return;
    char name[64];
    op_label(o, name, sizeof name);
    /* ns as integers: a decimal point would depend on the locale */
    const long long at = (long long)(1e9 * (start - t->zero)),
                    length = (long long)(1e9 * (end - start));
    fprintf(t->file,
            ",\n{\"name\":\"%s\",\"ph\":\"X\",\"pid\":%d,\"tid\":%d,\"ts\":%lld.%03lld,\"dur\":%"
            "lld.%03lld,"
            "\"args\":{\"step\":%lld}}",
            name, t->rank, (int)o->stream, at / 1000, at % 1000, length / 1000, length % 1000,
            (long long)step);
}

muonshard_status trace_close(trace *t, error_text *error) {
    if (!t)
        return MUONSHARD_OK;
    fprintf(t->file, "\n]\n");
    const bool failed = ferror(t->file) != 0;
    const bool unclosed = fclose(t->file) != 0;
    free(t);
    FAIL_IF(failed || unclosed, error, MUONSHARD_ERR_IO, "the trace could not be written");
    return MUONSHARD_OK;
}
