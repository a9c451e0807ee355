/* report_series.c - sorts rows of steps into series, and prints them as a table. */
#include "report_series.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "message.h"

static const json_t *machine_of(const report_point *p) {
    return json_object_get(p->file->root, "machine");
}

static bool is_measured(const report_point *p) {
    return json_is_true(json_object_get(p->file->root, "measured")) ||
           report_number(p->file->root, "measured") > 0.0;
}

/* --link makes a step slower than the machine it was measured on. */
static bool is_slowed(const report_point *p) {
    return is_measured(p) && report_number(p->row, "link_busy_us") > 0.0;
}

/* What a series has alike beside its label: the processor and the config, without what differs from
 * run to run. */
static char *read_settings(const report_point *p) {
    char *text = NULL;
    size_t size;
    FILE *out = open_memstream(&text, &size);
    if (!out)
        return NULL;
    fprintf(out, "%s\n%s\n", report_text(machine_of(p), "cpu"),
            report_text(machine_of(p), "kernels"));
    for (const char *line = report_text(p->file->root, "config"); *line;) {
        const size_t length = strcspn(line, "\n");
        if (strncmp(line, "trace:", 6) && strncmp(line, "threads:", 8))
            fprintf(out, "%.*s\n", (int)length, line);
        line += length + (line[length] == '\n');
    }
    return fclose(out) == 0 ? text : NULL;
}

/* ---- order ---- */

/* 0: their labels are the same but for settings. */
static int compare_labels(const report_point *a, const report_point *b) {
    int order = strcmp(report_text(a->row, "model"), report_text(b->row, "model"));
    if (!order)
        order = strcmp(report_text(a->row, "scaling"), report_text(b->row, "scaling"));
    if (!order)
        order = is_measured(b) - is_measured(a);
    if (!order)
        order = strcmp(report_text(machine_of(a), "host"), report_text(machine_of(b), "host"));
    if (!order)
        order = strcmp(report_text(a->file->root, "origin"), report_text(b->file->root, "origin"));
    return order ? order : is_slowed(a) - is_slowed(b);
}

static int compare_series(const report_point *a, const report_point *b) {
    const int order = compare_labels(a, b);
    return order ? order : strcmp(a->settings, b->settings);
}

static int by_series_and_ranks(const void *left, const void *right) {
    const report_point *a = left, *b = right;
    int order = compare_series(a, b);
    if (!order)
        order = (a->ranks > b->ranks) - (a->ranks < b->ranks);
    /* The order of the command line; rows of a file lie in one array. */
    return order ? order : (a->file > b->file) - (a->file < b->file);
}

/* ---- labels ---- */

static bool has_line(const char *text, const char *line, size_t length) {
    for (; *text; text += strcspn(text, "\n"), text += *text == '\n')
        if (strcspn(text, "\n") == length && strncmp(text, line, length) == 0)
            return true;
    return false;
}

/* Of series [first, end), whose labels are the same: what series `own` has and not all others. */
static void put_differences(FILE *out, const report_steps *steps, size_t first, size_t end,
                            size_t own) {
    long written = 0;
    for (const char *line = steps->series[own].points->settings; *line;) {
        const size_t length = strcspn(line, "\n");
        bool common = true;
        for (size_t i = first; i < end && common; i++)
            common = has_line(steps->series[i].points->settings, line, length);
        if (!common && written < 80)
            written += fprintf(out, ", %.*s", (int)length, line);
        line += length + 1;
    }
    if (written >= 80)
        fputs(", ...", out);
}

static char *make_label(const report_steps *steps, size_t first, size_t end, size_t own) {
    const report_series *s = &steps->series[own];
    const report_point *p = s->points;
    char *text = NULL;
    size_t size;
    FILE *out = open_memstream(&text, &size);
    if (!out)
        return NULL;
    fprintf(out, "%s, %s %s", s->scaling, s->measured ? "measured on" : "simulated for",
            report_text(machine_of(p), "host"));
    if (!s->measured)
        fputs(strcmp(report_text(p->file->root, "origin"), "measured") ? " (datasheet)"
                                                                       : " (calibrated)",
              out);
    if (is_slowed(p))
        fputs(" over a slowed link", out);
    put_differences(out, steps, first, end, own);
    return fclose(out) == 0 ? text : NULL;
}

static bool make_labels(report_steps *steps) {
    bool made = true;
    for (size_t first = 0, end; first < steps->series_count; first = end) {
        for (end = first + 1; end < steps->series_count; end++)
            if (compare_labels(steps->series[first].points, steps->series[end].points))
                break;
        for (size_t i = first; i < end; i++) {
            steps->series[i].label = make_label(steps, first, end, i);
            made = made && steps->series[i].label;
        }
    }
    return made;
}

/* ---- collecting ---- */

static void find_efficiency(report_point *points, size_t count) {
    const report_point first = points[0];
    const bool weak = strcmp(report_text(first.row, "scaling"), "weak") == 0;
    for (size_t i = 0; i < count; i++)
        points[i].efficiency =
            first.step_us / points[i].step_us * (weak ? 1.0 : first.ranks / points[i].ranks);
}

static void cut_into_series(report_steps *steps) {
    for (size_t first = 0, end; first < steps->point_count; first = end) {
        report_point *points = &steps->points[first];
        for (end = first + 1; end < steps->point_count; end++)
            if (compare_series(points, &steps->points[end]))
                break;
        find_efficiency(points, end - first);
        steps->series[steps->series_count++] =
            (report_series){.model = report_text(points->row, "model"),
                            .scaling = report_text(points->row, "scaling"),
                            .measured = is_measured(points),
                            .points = points,
                            .count = end - first};
    }
}

muonshard_status report_steps_collect(const report_file *files, size_t count, report_steps *steps,
                                      char *message) {
    *steps = (report_steps){.points = NULL};
    size_t most = 0, i;
    for (i = 0; i < count; i++)
        most += json_array_size(files[i].rows);
    steps->points = calloc(most + 1, sizeof *steps->points);
    steps->series = calloc(most + 1, sizeof *steps->series);
    bool good = steps->points && steps->series;
    for (size_t f = 0; f < count && good; f++) {
        json_t *row;
        if (strcmp(files[f].kind, "step"))
            continue;
        json_array_foreach(files[f].rows, i, row) {
            report_point *p = &steps->points[steps->point_count++];
            *p = (report_point){.file = &files[f],
                                .row = row,
                                .ranks = report_number(row, "ranks"),
                                .step_us = report_number(row, "step_us.median")};
            p->settings = read_settings(p);
            good = good && p->settings;
        }
    }
    if (good) {
        qsort(steps->points, steps->point_count, sizeof *steps->points, by_series_and_ranks);
        cut_into_series(steps);
        good = make_labels(steps);
    }
    return good ? MUONSHARD_OK : message_fail(message, MUONSHARD_ERR_MEMORY, "out of memory");
}

void report_steps_free(report_steps *steps) {
    for (size_t i = 0; i < steps->point_count; i++)
        free(steps->points[i].settings);
    for (size_t i = 0; i < steps->series_count; i++)
        free(steps->series[i].label);
    free(steps->points);
    free(steps->series);
    *steps = (report_steps){.points = NULL};
}

void report_series_threads(const report_series *series, char *text, size_t size) {
    double least = INFINITY, most = 0.0;
    for (size_t i = 0; i < series->count; i++) {
        const double threads = report_number(series->points[i].file->root, "threads");
        least = fmin(least, threads);
        most = fmax(most, threads);
    }
    if (least < most)
        snprintf(text, size, "%.0f to %.0f", least, most);
    else
        snprintf(text, size, "%.0f", most);
}

/* ---- the table ---- */

/* Control characters, those of UTF-8 too, would reach the terminal or end the line. */
static void put_plain(FILE *out, const char *text) {
    for (; *text; text++) {
        const unsigned char byte = (unsigned char)text[0], next = (unsigned char)text[1];
        if (byte < 0x20 || byte == 0x7f) {
            fputc('?', out);
        } else if (byte == 0xc2 && next < 0xa0) {
            fputc('?', out);
            text++;
        } else {
            fputc(byte, out);
        }
    }
}

static void put_value(FILE *out, int width, int digits, double value) {
    if (isfinite(value))
        fprintf(out, " %*.*f", width, digits, value);
    else
        fprintf(out, " %*s", width, "-");
}

static void put_heading(FILE *out, const report_series *s) {
    const json_t *machine = machine_of(s->points);
    fputs("# ", out);
    put_plain(out, s->model);
    fputs(", ", out);
    put_plain(out, s->label);
    fputs(": ", out);
    put_plain(out, report_text(machine, "cpu"));
    if (s->measured) {
        char threads[48];
        report_series_threads(s, threads, sizeof threads);
        fputs(", ", out);
        put_plain(out, report_text(machine, "kernels"));
        fprintf(out, " kernels, threads a rank %s", threads);
    }
    fputc('\n', out);
}

static void put_row(FILE *out, const report_point *p) {
    static const char *const times[] = {"phases_us.reduce-scatter", "phases_us.momentum",
                                        "phases_us.orthogonalize", "phases_us.all-gather",
                                        "phases_us.apply"};
    put_value(out, 7, 0, p->ranks);
    put_value(out, 8, 0, report_number(p->row, "matrices"));
    put_value(out, 16, 0, report_number(p->row, "bytes"));
    fputs("  ", out);
    /* A name of a file's own could be of any length, and of several words. */
    const char *dtype = report_text(p->row, "dtype");
    fprintf(out, "%-5s",
            strspn(dtype, "abcdefghijklmnopqrstuvwxyz0123456789") == strlen(dtype) && *dtype &&
                    strlen(dtype) < 6
                ? dtype
                : "?");
    put_value(out, 12, 1, p->step_us);
    for (size_t i = 0; i < sizeof times / sizeof *times; i++)
        put_value(out, 11, 1, report_number(p->row, times[i]));
    put_value(out, 9, 2, report_number(p->row, "rs_busbw_gbs"));
    put_value(out, 9, 2, report_number(p->row, "ag_busbw_gbs"));
    put_value(out, 9, 3, 1e-3 * report_number(p->row, "ns_gflops"));
    put_value(out, 7, 1, 100.0 * report_number(p->row, "exposed"));
    put_value(out, 9, 2, report_number(p->row, "imbalance"));
    put_value(out, 10, 1, 100.0 * p->efficiency);
    put_value(out, 7, 0, report_number(p->row, "wrong"));
    fputc('\n', out);
}

void report_steps_print(const report_steps *steps, FILE *out) {
    if (steps->point_count == 0)
        return;
    fputs(
        "# Steps: medians, of the slowest rank. Efficiency, t_0 being the step at a series' fewest "
        "ranks:\n# strong ranks_0 t_0 / (ranks t), weak t_0 / t.\n#\n",
        out);
    fprintf(out,
            "# %6s %8s %16s  %-5s %12s %11s %11s %11s %11s %11s %9s %9s %9s %7s %9s %10s %7s\n",
            "ranks", "matrices", "bytes", "type", "step", "rs", "momentum", "ns", "ag", "apply",
            "rs_busbw", "ag_busbw", "ns", "exposed", "imbalance", "efficiency", "#wrong");
    fprintf(out, "# %6s %8s %16s  %-5s %12s %11s %11s %11s %11s %11s %9s %9s %9s %7s %9s %10s\n",
            "", "", "(B)", "", "(us)", "(us)", "(us)", "(us)", "(us)", "(us)", "(GB/s)", "(GB/s)",
            "(TFLOP/s)", "(%)", "", "(%)");
    for (size_t i = 0; i < steps->series_count; i++) {
        put_heading(out, &steps->series[i]);
        for (size_t k = 0; k < steps->series[i].count; k++)
            put_row(out, &steps->series[i].points[k]);
    }
}
