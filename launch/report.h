/* report.h - benchmark results as a page: what is read from a file of `muonshard bench`, and the
 * pictures made of it. */
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

/* Pictures as SVG, by gnuplot. Each writes one <svg> to `page`, or nothing where there is nothing
 * to show. ERR_UNAVAILABLE: no gnuplot; ERR_IO, ERR_MEMORY. */
muonshard_status report_pictures(const report_file *file, FILE *page, char *message);
/* Speed-up over ranks, of all step files of a model at once. */
muonshard_status report_scaling(const report_file *files, size_t count, FILE *page, char *message);

/* A number, or NaN. `path` is "time_us.median". */
double report_number(const json_t *object, const char *path);

#endif
