/* report_scaling.c - steps over rank counts on the page: a section a model. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "message.h"
#include "report_gnuplot.h"
#include "report_series.h"

/* A line of a program at a time, for it has a plot a series. */
typedef struct program {
    char *text; /* own */
    size_t size;
    FILE *out; /* own */
} program;

static muonshard_status begin(gnuplot *p, program *code, char *message) {
    *code = (program){.text = NULL};
    const muonshard_status status = gnuplot_begin(p, message);
    code->out = status ? NULL : open_memstream(&code->text, &code->size);
    return status || code->out ? status
                               : message_fail(message, MUONSHARD_ERR_MEMORY, "out of memory");
}

static muonshard_status draw(gnuplot *p, program *code, FILE *page, char *message) {
    const bool lost = fclose(code->out) != 0;
    const muonshard_status status =
        lost ? message_fail(message, MUONSHARD_ERR_MEMORY, "out of memory")
             : gnuplot_draw(p, code->text, page, message);
    free(code->text);
    return status;
}

/* ---- speed-up and efficiency ---- */

/* Measured: filled and solid; simulated: open and dashed. */
static void put_series(FILE *out, const report_series *series, size_t count) {
    static const char *const colours[] = {"#1f5fbf", "#d1601f", "#2e8b57", "#8e6fb5",
                                          "#c0392b", "#5fa8d3", "#8a6d1f", "#444444"};
    enum { COLOURS = sizeof colours / sizeof *colours };
    for (size_t i = 0; i < count; i++)
        fprintf(
            out,
            ", \\\n '' index %zu using 1:2 with linespoints lw 2 ps 0.9 pt %d dt %d lc rgb '%s' "
            "title columnheader(1)",
            i + 1, series[i].measured ? 7 : 6, series[i].measured ? 1 : 2, colours[i % COLOURS]);
    fputc('\n', out);
}

static muonshard_status draw_over_ranks(const report_series *series, size_t count, bool speed_up,
                                        FILE *page, char *message) {
    double least = INFINITY, most = 0.0;
    for (size_t i = 0; i < count; i++) {
        least = fmin(least, series[i].points[0].ranks);
        most = fmax(most, series[i].points[series[i].count - 1].ranks);
    }
    gnuplot p = {.data = NULL};
    program code;
    const muonshard_status status = begin(&p, &code, message);
    if (status)
        return status;
    /* The ideal, a little longer than the data, for the axes end where it does. */
    least /= 1.2;
    most *= 1.2;
    fprintf(p.data, "%.9g\t%.9g\n%.9g\t%.9g\n", least, speed_up ? least : 100.0, most,
            speed_up ? most : 100.0);
    for (size_t i = 0; i < count; i++) {
        fputs("\n\n", p.data);
        gnuplot_name(p.data, series[i].label);
        fputc('\n', p.data);
        for (size_t k = 0; k < series[i].count; k++) {
            const report_point *at = &series[i].points[k];
            fprintf(p.data, "%.9g\t%.9g\n", at->ranks,
                    at->efficiency * (speed_up ? at->ranks : 100.0));
        }
    }
    fprintf(code.out, GNUPLOT_HEAD, 680, 380 + 20 * (int)(count < 40 ? count : 40));
    fprintf(code.out,
            "set xlabel 'ranks'\nset logscale x 2\nset autoscale xfix\nset xtics 1,2,1048576%s\n"
            "set grid xtics lc rgb '#eeeeee' lt 1\nset format x '%%.0f'\n"
            "set key below left vertical maxcols 1 Left reverse width 2\n",
            most / least > 256.0 ? " rotate by -40" : "");
    fputs(speed_up ? "set logscale y 2\nset ylabel 'speed-up (ranks)'\nset format y '%g'\n"
                   : "set yrange [0:*]\nset ylabel 'efficiency (%)'\n",
          code.out);
    fputs("plot 'data' index 0 using 1:2 with lines lw 1.5 lc rgb '#aaaaaa' title 'ideal'",
          code.out);
    put_series(code.out, series, count);
    return draw(&p, &code, page, message);
}

/* ---- where a step goes ---- */

static const char *const phase_names[] = {"pack",       "reduce-scatter", "agree",
                                          "momentum",   "orthogonalize",  "element-wise",
                                          "all-gather", "apply"};
enum { PHASES = sizeof phase_names / sizeof *phase_names };

static muonshard_status draw_phases(const report_series *s, FILE *page, char *message) {
    static const struct {
        double us;
        const char *name;
    } units[] = {{1.0, "µs"}, {1e3, "ms"}, {1e6, "s"}};
    double most = 0.0;
    for (size_t i = 0; i < s->count; i++)
        most = fmax(most, s->points[i].step_us);
    const size_t unit = most < 1e4 ? 0 : most < 1e7 ? 1 : 2;
    gnuplot p = {.data = NULL};
    program code;
    const muonshard_status status = begin(&p, &code, message);
    if (status)
        return status;
    for (size_t i = 0; i < s->count; i++) {
        const json_t *phases = json_object_get(s->points[i].row, "phases_us");
        fprintf(p.data, "%.0f", s->points[i].ranks);
        for (size_t k = 0; k < PHASES; k++) {
            const double us = report_number(phases, phase_names[k]);
            gnuplot_number(p.data, isfinite(us) ? us / units[unit].us : 0.0); /* null: no bar */
        }
        gnuplot_number(p.data, s->points[i].step_us / units[unit].us);
        fputc('\n', p.data);
    }
    fprintf(code.out, GNUPLOT_HEAD, 680, 360);
    fprintf(code.out,
            "set xlabel 'ranks'\nset ylabel '%s'\nset yrange [0:*]\nset style histogram "
            "rowstacked\nset style data histograms\nset xtics noenhanced%s\nset key outside right "
            "invert\nset style fill solid %s\n",
            units[unit].name, s->count > 8 ? " rotate by -40" : "",
            s->measured ? "0.9" : "0.4 border rgb '#555555'");
    fputs("array names[8] = ['pack', 'reduce-scatter', 'agree', 'momentum', 'Newton-Schulz', "
          "'element-wise', 'all-gather', 'apply']\n"
          "array colours[8] = ['#b0b0b0', '#e0902f', '#8e6fb5', '#5fa8d3', '#1f5fbf', '#2e8b57', "
          "'#c0392b', '#d8c24a']\n"
          "plot for [k = 2:9] 'data' using k:xtic(1) lc rgb colours[k - 1] title names[k - 1], "
          "'' using 0:10 with points pt 1 ps 1.2 lw 2 lc rgb '#000000' title 'step, median'\n",
          code.out);
    return draw(&p, &code, page, message);
}

/* ---- the table ---- */

typedef struct column {
    const char *path, *head, *unit;
    int digits; /* behind the point */
    double factor;
} column;

static const column columns[] = {{"matrices", "matrices", "", 0, 1.0},
                                 {"bytes", "size", "MiB", 1, 0x1p-20},
                                 {NULL, "type", "", 0, 0.0},
                                 {"step_us.median", "step", "µs", 1, 1.0},
                                 {"phases_us.pack", "pack", "µs", 1, 1.0},
                                 {"phases_us.reduce-scatter", "reduce-scatter", "µs", 1, 1.0},
                                 {"phases_us.momentum", "momentum", "µs", 1, 1.0},
                                 {"phases_us.orthogonalize", "Newton-Schulz", "µs", 1, 1.0},
                                 {"phases_us.element-wise", "element-wise", "µs", 1, 1.0},
                                 {"phases_us.all-gather", "all-gather", "µs", 1, 1.0},
                                 {"phases_us.apply", "apply", "µs", 1, 1.0},
                                 {"rs_busbw_gbs", "rs busbw", "GB/s", 2, 1.0},
                                 {"ag_busbw_gbs", "ag busbw", "GB/s", 2, 1.0},
                                 {"ns_gflops", "flop rate", "TFLOP/s", 3, 1e-3},
                                 {"exposed", "exposed", "%", 1, 100.0},
                                 {"imbalance", "imbalance", "", 2, 1.0},
                                 {"memory.state", "state", "MiB", 1, 0x1p-20},
                                 {"memory.workspace", "workspace", "MiB", 1, 0x1p-20},
                                 {"wrong", "#wrong", "", 0, 1.0}};
enum { COLUMNS = sizeof columns / sizeof *columns };

static void put_cell(FILE *page, double value, int digits) {
    if (isfinite(value)) /* large ones have digits enough */
        fprintf(page, "<td>%.*f</td>", fabs(value) < 1e4 ? digits : 0, value);
    else
        fputs("<td>–</td>", page);
}

static void put_table(FILE *page, const report_series *series, size_t count) {
    fputs("<div class=\"wide\"><table>\n<tr><th>ranks</th><th>efficiency<br><small>%</small></th>",
          page);
    for (size_t c = 0; c < COLUMNS; c++)
        fprintf(page, "<th>%s<br><small>%s</small></th>", columns[c].head, columns[c].unit);
    fputs("</tr>\n", page);
    for (size_t i = 0; i < count; i++) {
        fprintf(page, "<tr><th class=\"series\" colspan=\"%d\">", COLUMNS + 2);
        report_put_text(page, series[i].label);
        fputs("</th></tr>\n", page);
        for (size_t k = 0; k < series[i].count; k++) {
            const report_point *p = &series[i].points[k];
            fputs(report_number(p->row, "wrong") > 0.0 ? "<tr class=\"wrong\">" : "<tr>", page);
            put_cell(page, p->ranks, 0);
            put_cell(page, 100.0 * p->efficiency, 1);
            for (size_t c = 0; c < COLUMNS; c++) {
                if (columns[c].path) {
                    put_cell(page, columns[c].factor * report_number(p->row, columns[c].path),
                             columns[c].digits);
                } else {
                    fputs("<td class=\"text\">", page);
                    report_put_text(page, report_text(p->row, "dtype"));
                    fputs("</td>", page);
                }
            }
            fputs("</tr>\n", page);
        }
    }
    fputs("</table></div>\n", page);
}

/* What was run where. */
static void put_origins(FILE *page, const report_series *series, size_t count) {
    fputs("<ul>\n", page);
    for (size_t i = 0; i < count; i++) {
        const report_series *s = &series[i];
        const json_t *root = s->points->file->root, *machine = json_object_get(root, "machine");
        fputs("<li>", page);
        report_put_text(page, s->label);
        fputs(": ", page);
        report_put_text(page, report_text(machine, "cpu"));
        if (s->measured) {
            char threads[48];
            report_series_threads(s, threads, sizeof threads);
            fputs(", ", page);
            report_put_text(page, report_text(machine, "kernels"));
            fputs(" kernels, ", page);
            report_put_text(page, report_text(machine, "blas"));
            fprintf(page, ", threads a rank %s", threads);
        }
        fputs("; ", page);
        report_put_text(page, report_text(root, "date"));
        fputs(", <code>", page);
        report_put_text(page, report_text(root, "command"));
        fputs("</code></li>\n", page);
    }
    fputs("</ul>\n", page);
}

/* ---- a model ---- */

static muonshard_status put_timelines(const report_series *s, FILE *page, char *message) {
    muonshard_status status = MUONSHARD_OK;
    bool open = true; /* the one of most ranks */
    for (size_t i = s->count; i-- > 0 && status == MUONSHARD_OK;) {
        const json_t *timeline = json_object_get(s->points[i].row, "timeline");
        if (json_array_size(timeline) == 0)
            continue;
        fprintf(page, "<details%s><summary>", open ? " open" : "");
        open = false;
        report_put_text(page, s->label);
        fprintf(page, ", %.0f rank%s</summary>\n", s->points[i].ranks,
                s->points[i].ranks > 1.0 ? "s" : "");
        status = report_timeline(timeline, page, message);
        fputs("</details>\n", page);
    }
    return status;
}

static bool has_timeline(const report_series *series, size_t count) {
    for (size_t i = 0; i < count; i++)
        for (size_t k = 0; k < series[i].count; k++)
            if (json_array_size(json_object_get(series[i].points[k].row, "timeline")))
                return true;
    return false;
}

static muonshard_status put_model(const report_series *series, size_t count, FILE *page,
                                  char *message) {
    muonshard_status status = MUONSHARD_OK;
    bool several = false;
    for (size_t i = 0; i < count; i++)
        several =
            several || series[i].points[0].ranks < series[i].points[series[i].count - 1].ranks;
    fputs("<h2>Optimizer steps: ", page);
    report_put_text(page, series->model);
    fputs("</h2>\n<div class=\"figures\">\n", page);
    for (int k = 0; k < 2 && several && status == MUONSHARD_OK; k++) {
        fputs("<figure>", page);
        status = draw_over_ranks(series, count, k == 0, page, message);
        fputs(k ? "<figcaption>Efficiency over ranks, t<sub>0</sub> being the step at a series’ "
                  "fewest ranks: strong ranks<sub>0</sub> t<sub>0</sub> / (ranks t), weak "
                  "t<sub>0</sub> / t</figcaption></figure>\n"
                : "<figcaption>Speed-up over ranks: efficiency times ranks</figcaption></figure>\n",
              page);
    }
    for (size_t i = 0; i < count && status == MUONSHARD_OK; i++) {
        fputs("<figure>", page);
        status = draw_phases(&series[i], page, message);
        fputs("<figcaption>Where a step goes, means (communication as far as it is waited for, "
              "each phase "
              "on its slowest rank): ",
              page);
        report_put_text(page, series[i].label);
        fputs("</figcaption></figure>\n", page);
    }
    fputs("</div>\n", page);
    put_table(page, series, count);
    put_origins(page, series, count);
    if (has_timeline(series, count))
        fputs("<h3>A step on rank 0</h3>\n<p>Grey and yellow: copies; blue: computation; orange: "
              "reduce-scatter; red: all-gather.</p>\n",
              page);
    for (size_t i = 0; i < count && status == MUONSHARD_OK; i++)
        status = put_timelines(&series[i], page, message);
    return status;
}

muonshard_status report_scaling(const report_steps *steps, FILE *page, char *message) {
    muonshard_status status = MUONSHARD_OK;
    for (size_t first = 0, end; first < steps->series_count && status == MUONSHARD_OK;
         first = end) {
        for (end = first + 1; end < steps->series_count; end++)
            if (strcmp(steps->series[first].model, steps->series[end].model))
                break;
        status = put_model(&steps->series[first], end - first, page, message);
    }
    return status;
}
