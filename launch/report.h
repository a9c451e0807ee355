/* report.h - results as a table and a page: what is read from a file of `muonshard bench` or
 * `muonshard plan`, and the parts of the page. */
#ifndef REPORT_H
#define REPORT_H

#include <jansson.h>
#include <stdio.h>

#include "command.h"

typedef struct report_file {
    const char *path; /* borrowed */
    json_t *root;     /* own; checked: schema, kind, rows and what every row has to have */
    const char *kind; /* of root */
    json_t *rows;     /* of root */
} report_file;

/* ERR_IO: cannot be read; ERR_CONFIG: no result of this version of the benchmark. */
muonshard_status report_read(const char *path, report_file *file, char *message);

/* A number, or NaN. `path` is "time_us.median". */
double report_number(const json_t *object, const char *path);
/* A text, or "". */
const char *report_text(const json_t *object, const char *path);
/* `text` for a page: what would be markup is written as text. */
void report_put_text(FILE *page, const char *text);

/* Pictures as SVG, of a file of kind ns or comm. ERR_UNAVAILABLE: no gnuplot; ERR_IO. */
muonshard_status report_pictures(const report_file *file, FILE *page, char *message);
/* What ran when, of a row's timeline. As above. */
muonshard_status report_timeline(const json_t *timeline, FILE *page, char *message);

#endif
