/* status.h - how errors travel inside the library: a status, and a text in the nearest handle. */
#ifndef STATUS_H
#define STATUS_H

#include "muonshard.h"

typedef struct error_text {
    char text[1024];
} error_text;

/* Writes the text and returns `status`, so that `return fail(...)` is one line. `error` may be
 * NULL. */
muonshard_status fail(error_text *error, muonshard_status status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

#define TRY(call)                                                                                  \
    do {                                                                                           \
        muonshard_status try_status_ = (call);                                                     \
        if (try_status_ != MUONSHARD_OK)                                                           \
            return try_status_;                                                                    \
    } while (0)

/* For functions with one clean-up label; needs a local `status`. */
#define TRY_GOTO(call, label)                                                                      \
    do {                                                                                           \
        status = (call);                                                                           \
        if (status != MUONSHARD_OK)                                                                \
            goto label;                                                                            \
    } while (0)

#define FAIL_IF(condition, error, status, ...)                                                     \
    do {                                                                                           \
        if (condition)                                                                             \
            return fail(error, status, __VA_ARGS__);                                               \
    } while (0)

/* Copies a caller's versioned struct over `own`, which holds the defaults: an older, shorter struct
 * leaves the newer fields as they are. ERR_ARGUMENT when `size` (the struct's first field) is no
 * size this library can have seen. */
muonshard_status take_struct(error_text *error, void *own, size_t own_size, const void *given,
                             const char *what);
/* The other way: as much of `own` as the caller's struct has room for; its size field is kept. */
muonshard_status give_struct(error_text *error, const void *own, size_t own_size, void *given,
                             const char *what);

/* Seconds of a monotonic clock. */
double now_s(void);

#endif
