#include "status.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

const char *muonshard_status_string(muonshard_status status) {
    switch (status) {
#define CASE(value, name, text)                                                                    \
    case MUONSHARD_##name: return text;
        MUONSHARD_STATUS_MAP(CASE)
#undef CASE
    }
    return "unknown status";
}

int muonshard_version(void) {
    return MUONSHARD_VERSION;
}

muonshard_status fail(error_text *error, muonshard_status status, const char *format, ...) {
    if (error) {
        /* Through a local: an argument may be the old text itself. */
        char text[sizeof error->text];
        va_list args;
        va_start(args, format);
        vsnprintf(text, sizeof text, format, args);
        va_end(args);
        /* Names come out of files: a control character in one would break a line or a terminal. */
        for (char *c = text; *c; c++)
            if ((unsigned char)*c < 0x20 || *c == 0x7f)
                *c = '?';
        memcpy(error->text, text, sizeof text);
    }
    return status;
}

static muonshard_status struct_size(error_text *error, const void *given, size_t *size,
                                    const char *what) {
    FAIL_IF(!given, error, MUONSHARD_ERR_ARGUMENT, "%s is NULL", what);
    memcpy(size, given, sizeof *size);
    FAIL_IF(*size < sizeof *size || *size > 4096, error, MUONSHARD_ERR_ARGUMENT,
            "%s: size is %zu; start from the _INIT macro", what, *size);
    return MUONSHARD_OK;
}

muonshard_status take_struct(error_text *error, void *own, size_t own_size, const void *given,
                             const char *what) {
    size_t size = 0;
    TRY(struct_size(error, given, &size, what));
    memcpy(own, given, size < own_size ? size : own_size);
    memcpy(own, &own_size, sizeof own_size);
    return MUONSHARD_OK;
}

muonshard_status give_struct(error_text *error, const void *own, size_t own_size, void *given,
                             const char *what) {
    size_t size = 0;
    TRY(struct_size(error, given, &size, what));
    memcpy(given, own, size < own_size ? size : own_size);
    memcpy(given, &size, sizeof size);
    return MUONSHARD_OK;
}

double now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
