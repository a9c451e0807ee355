/* message.h - an error on its way to the one place that tells it: a status and a line of text. */
#ifndef MESSAGE_H
#define MESSAGE_H

#include <stdarg.h>
#include <stdio.h>
#include "command.h"

/* Writes `message` [COMMAND_MESSAGE] and returns `status`, so that failing is one line. Names come
 * out of files: a control character in one would break the line or the terminal, so it becomes '?'.
 */
__attribute__((format(printf, 3, 4))) static inline muonshard_status
message_fail(char *message, muonshard_status status, const char *format, ...) {
    va_list list;
    va_start(list, format);
    vsnprintf(message, COMMAND_MESSAGE, format, list);
    va_end(list);
    for (char *c = message; *c; c++)
        if ((unsigned char)*c < 0x20 || *c == 0x7f)
            *c = '?';
    return status;
}

#endif
