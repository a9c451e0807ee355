/* report_series.h - rows of steps as series over rank counts: one model, strong or weak, measured
 * on one machine or simulated for one, with the same settings. */
#ifndef REPORT_SERIES_H
#define REPORT_SERIES_H

#include "report.h"

typedef struct report_point {
    const report_file *file; /* borrowed */
    const json_t *row;       /* of file */
    char *settings;          /* own; "key: value" lines that points of a series have alike */
    double ranks, step_us;
    double efficiency; /* strong r0 t0 / (r t), weak t0 / t; 0: the series' smallest rank count */
} report_point;

typedef struct report_series {
    const char *model, *scaling; /* of the first row */
    bool measured;
    char *label;                /* own: "strong, measured on HOST" */
    const report_point *points; /* ascending in ranks */
    size_t count;
} report_series;

typedef struct report_steps {
    report_point *points;  /* own, [point_count] */
    report_series *series; /* own, [series_count]; those of a model one after the other */
    size_t point_count, series_count;
} report_steps;

/* All rows of kind step. ERR_MEMORY. */
muonshard_status report_steps_collect(const report_file *files, size_t count, report_steps *steps,
                                      char *message);
void report_steps_free(report_steps *steps);
/* Threads of a rank, "1" or "1 to 4". */
void report_series_threads(const report_series *series, char *text, size_t size);

/* The table for a terminal. */
void report_steps_print(const report_steps *steps, FILE *out);
/* A section a model: pictures over rank counts, table, timelines. Errors as of report_pictures. */
muonshard_status report_scaling(const report_steps *steps, FILE *page, char *message);

#endif
