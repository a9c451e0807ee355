/* report.c - `muonshard report FILE... [--out PAGE]`: what `muonshard bench` and `muonshard plan`
 * wrote with -J, as a table of the steps and one HTML page with tables and pictures that needs
 * nothing else. */

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "message.h"
#include "muonshard_mpi.h"
#include "report_series.h"

#define SCHEMA 2 /* of muonshard bench and plan */

static const command_option options[] = {
    {"--out", COMMAND_VALUE, false, "PAGE", "where to write (default report.html)"},
};

static const command_usage usage = {
    .name = "report",
    .synopsis = "FILE... [--out PAGE]",
    .doc =
        "Prints the steps that muonshard bench -J and muonshard plan -J wrote as one table over "
        "ranks, and\nturns these and other results into a page with pictures, which opens offline.",
    .positional_min = 1,
    .positional_max = 1000,
    .options = options,
    .option_count = sizeof options / sizeof options[0],
};

/* ---- reading ---- */

/* What a row of a kind has, and the columns of its table. */
typedef struct column {
    const char *path, *head, *unit;
    int digits; /* behind the point; -1: text */
} column;

static const column ns_columns[] = {{"rows", "rows", "", 0},
                                    {"cols", "cols", "", 0},
                                    {"count", "count", "", 0},
                                    {"dtype", "type", "", -1},
                                    {"form", "form", "", -1},
                                    {"time_us.median", "time", "µs", 1},
                                    {"time_us.min", "min", "µs", 1},
                                    {"time_us.max", "max", "µs", 1},
                                    {"gflops", "flop rate", "GFLOP/s", 1},
                                    {"share", "of the ceiling", "", 2},
                                    {"three_gemm_us.median", "three products", "µs", 1},
                                    {"ratio", "ratio", "", 2},
                                    {"wrong", "#wrong", "", 0}};
static const column comm_columns[] = {{"op", "operation", "", -1},
                                      {"bytes", "size", "B", 0},
                                      {"dtype", "type", "", -1},
                                      {"time_us.median", "time", "µs", 1},
                                      {"time_us.min", "min", "µs", 1},
                                      {"time_us.max", "max", "µs", 1},
                                      {"algbw_gbs", "algbw", "GB/s", 2},
                                      {"busbw_gbs", "busbw", "GB/s", 2},
                                      {"mpi_us.median", "plain MPI", "µs", 1},
                                      {"ratio", "ratio", "", 2},
                                      {"wrong", "#wrong", "", 0}};
static const column step_columns[] = {{"model", "", "", -1},
                                      {"ranks", "", "", 0},
                                      {"scaling", "", "", -1},
                                      {"dtype", "", "", -1},
                                      {"matrices", "", "", 0},
                                      {"bytes", "", "", 0},
                                      {"step_us.median", "", "", 0},
                                      {"phases_us.pack", "", "", 0},
                                      {"phases_us.reduce-scatter", "", "", 0},
                                      {"phases_us.agree", "", "", 0},
                                      {"phases_us.momentum", "", "", 0},
                                      {"phases_us.orthogonalize", "", "", 0},
                                      {"phases_us.element-wise", "", "", 0},
                                      {"phases_us.all-gather", "", "", 0},
                                      {"phases_us.apply", "", "", 0},
                                      {"ns_gflops", "", "", 0},
                                      {"rs_busbw_gbs", "", "", 0},
                                      {"ag_busbw_gbs", "", "", 0},
                                      {"exposed", "", "", 0},
                                      {"imbalance", "", "", 0},
                                      {"memory.state", "", "", 0},
                                      {"memory.workspace", "", "", 0},
                                      {"wrong", "", "", 0}}; /* report_scaling.c has the table */

typedef struct kind {
    const char *name, *title;
    const column *columns;
    size_t count;
} kind;

static const kind kinds[] = {
    {"ns", "Newton-Schulz", ns_columns, sizeof ns_columns / sizeof *ns_columns},
    {"comm", "Collectives", comm_columns, sizeof comm_columns / sizeof *comm_columns},
    {"step", "Optimizer steps", step_columns, sizeof step_columns / sizeof *step_columns},
};

static const kind *kind_of(const char *name) {
    for (size_t i = 0; name && i < sizeof kinds / sizeof *kinds; i++)
        if (strcmp(kinds[i].name, name) == 0)
            return &kinds[i];
    return NULL;
}

static json_t *at_path(const json_t *object, const char *path) {
    const char *dot = strchr(path, '.');
    char first[64];
    if (!dot)
        return json_object_get(object, path);
    snprintf(first, sizeof first, "%.*s", (int)(dot - path), path);
    return json_object_get(json_object_get(object, first), dot + 1);
}

const char *report_text(const json_t *object, const char *path) {
    const char *text = json_string_value(at_path(object, path));
    return text ? text : "";
}

double report_number(const json_t *object, const char *path) {
    const json_t *value = at_path(object, path);
    return json_is_number(value) ? json_number_value(value) : NAN;
}

static muonshard_status check_row(const kind *k, const json_t *row, size_t index, const char *path,
                                  char *message) {
    for (size_t i = 0; i < k->count; i++) {
        const column *c = &k->columns[i];
        const json_t *value = at_path(row, c->path);
        const bool fits =
            c->digits < 0 ? json_is_string(value) : json_is_number(value) || json_is_null(value);
        if (!fits)
            return message_fail(message, MUONSHARD_ERR_CONFIG, "%s: row %zu: \"%s\" is %s", path,
                                index, c->path,
                                !value          ? "missing"
                                : c->digits < 0 ? "no text"
                                                : "no number");
    }
    return MUONSHARD_OK;
}

/* What steps are sorted and labelled by. */
static muonshard_status check_step(const json_t *row, size_t index, const char *path,
                                   char *message) {
    const double ranks = report_number(row, "ranks");
    const char *scaling = report_text(row, "scaling");
    if (!json_is_integer(json_object_get(row, "ranks")) || ranks < 1.0)
        return message_fail(message, MUONSHARD_ERR_CONFIG,
                            "%s: row %zu: \"ranks\" is no count above 0", path, index);
    if (strcmp(scaling, "strong") && strcmp(scaling, "weak"))
        return message_fail(message, MUONSHARD_ERR_CONFIG,
                            "%s: row %zu: \"scaling\" has to be \"strong\" or \"weak\"", path,
                            index);
    return report_number(row, "step_us.median") > 0.0
               ? MUONSHARD_OK
               : message_fail(message, MUONSHARD_ERR_CONFIG,
                              "%s: row %zu: \"step_us.median\" is no time above 0", path, index);
}

/* Where the numbers come from: each of them is going to be labelled by it. */
static muonshard_status check_origin(const json_t *root, const char *path, char *message) {
    const json_t *measured = json_object_get(root, "measured");
    const char *origin = report_text(root, "origin");
    const bool is_measured = json_is_true(measured) || json_integer_value(measured) == 1;
    if (!is_measured && !json_is_false(measured) &&
        !(json_is_integer(measured) && json_integer_value(measured) == 0))
        return message_fail(message, MUONSHARD_ERR_CONFIG, "%s: \"measured\" has to be 0 or 1",
                            path);
    if (!is_measured && strcmp(origin, "datasheet") && strcmp(origin, "measured"))
        return message_fail(message, MUONSHARD_ERR_CONFIG,
                            "%s: \"origin\" of what is simulated has to be \"datasheet\" or "
                            "\"measured\"",
                            path);
    return *report_text(root, "machine.host")
               ? MUONSHARD_OK
               : message_fail(message, MUONSHARD_ERR_CONFIG,
                              "%s: \"machine.host\" has to say where or for what", path);
}

muonshard_status report_read(const char *path, report_file *file, char *message) {
    *file = (report_file){.path = path};
    if (access(path, R_OK) != 0)
        return message_fail(message, MUONSHARD_ERR_IO, "%s: %s", path, strerror(errno));
    json_error_t error;
    file->root = json_load_file(path, JSON_REJECT_DUPLICATES, &error);
    if (!file->root)
        return message_fail(message, MUONSHARD_ERR_CONFIG, "%s:%d: %s", path, error.line,
                            error.text);
    const json_t *schema = json_object_get(file->root, "schema");
    if (json_is_integer(schema) && json_integer_value(schema) == 1)
        return message_fail(message, MUONSHARD_ERR_CONFIG,
                            "%s: \"schema\" is 1, of an earlier version, and has to be %d; measure "
                            "again with this muonshard bench",
                            path, SCHEMA);
    if (!json_is_integer(schema) || json_integer_value(schema) != SCHEMA)
        return message_fail(message, MUONSHARD_ERR_CONFIG,
                            "%s: \"schema\" has to be %d: results of this version of muonshard "
                            "bench or plan",
                            path, SCHEMA);
    file->kind = json_string_value(json_object_get(file->root, "kind"));
    const kind *k = kind_of(file->kind);
    if (!k)
        return message_fail(message, MUONSHARD_ERR_CONFIG,
                            "%s: \"kind\" has to be \"ns\", \"comm\" or \"step\"", path);
    file->rows = json_object_get(file->root, "rows");
    if (!json_is_array(file->rows) || json_array_size(file->rows) == 0)
        return message_fail(message, MUONSHARD_ERR_CONFIG, "%s: \"rows\" has no results", path);
    size_t i;
    json_t *row;
    json_array_foreach(file->rows, i, row) {
        muonshard_status status = check_row(k, row, i, path, message);
        if (status == MUONSHARD_OK && strcmp(k->name, "step") == 0)
            status = check_step(row, i, path, message);
        if (status)
            return status;
    }
    return check_origin(file->root, path, message);
}

/* ---- writing ---- */

void report_put_text(FILE *page, const char *text) {
    for (; text && *text; text++)
        switch (*text) {
        case '<': fputs("&lt;", page); break;
        case '>': fputs("&gt;", page); break;
        case '&': fputs("&amp;", page); break;
        case '"': fputs("&quot;", page); break;
        default: fputc(*text, page);
        }
}

static void put_member(FILE *page, const json_t *object, const char *key) {
    const json_t *value = json_object_get(object, key);
    if (json_is_string(value))
        report_put_text(page, json_string_value(value));
    else if (json_is_integer(value))
        fprintf(page, "%lld", (long long)json_integer_value(value));
    else
        fputs("unknown", page);
}

static void put_cell(FILE *page, const json_t *row, const column *c) {
    const double value = report_number(row, c->path);
    if (c->digits < 0) {
        fputs("<td class=\"text\">", page);
        report_put_text(page, json_string_value(at_path(row, c->path)));
        fputs("</td>", page);
    } else if (isnan(value)) {
        fputs("<td>–</td>", page);
    } else {
        fprintf(page, "<td>%.*f</td>", c->digits, value);
    }
}

static void put_table(FILE *page, const report_file *file) {
    const kind *k = kind_of(file->kind);
    fputs("<table>\n<tr>", page);
    for (size_t i = 0; i < k->count; i++)
        fprintf(page, "<th>%s<br><small>%s</small></th>", k->columns[i].head, k->columns[i].unit);
    fputs("</tr>\n", page);
    size_t i;
    json_t *row;
    json_array_foreach(file->rows, i, row) {
        fputs(report_number(row, "wrong") > 0.0 ? "<tr class=\"wrong\">" : "<tr>", page);
        for (size_t c = 0; c < k->count; c++)
            put_cell(page, row, &k->columns[c]);
        fputs("</tr>\n", page);
    }
    fputs("</table>\n", page);
}

static void put_section(FILE *page, const report_file *file) {
    const json_t *root = file->root, *machine = json_object_get(root, "machine");
    fprintf(page, "<h2>%s</h2>\n<p><code>", kind_of(file->kind)->title);
    put_member(page, root, "command");
    fputs("</code></p>\n<p>", page);
    fputs("Measured on ", page);
    put_member(page, machine, "host");
    fputs(", ", page);
    put_member(page, root, "date");
    fputs(": ranks ", page);
    put_member(page, root, "ranks");
    fputs(", threads each ", page);
    put_member(page, root, "threads");
    fputs("; ", page);
    put_member(page, machine, "cpu");
    fputs(", ", page);
    put_member(page, machine, "kernels");
    fputs(" kernels; ", page);
    put_member(page, machine, "blas");
    fputs("; median of ", page);
    put_member(page, root, "iterations");
    fputs(".</p>\n", page);
    put_table(page, file);
}

static const char head[] =
    "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n"
    "<title>Muonshard benchmark</title>\n<style>\n"
    "body { font: 15px/1.5 sans-serif; color: #222; margin: 2em auto; max-width: 92em; "
    "padding: 0 1em }\n"
    "table { border-collapse: collapse; font-variant-numeric: tabular-nums }\n"
    "th, td { padding: .2em .7em; text-align: right; border-bottom: 1px solid #ddd }\n"
    "th { vertical-align: bottom; font-weight: 600 } small { color: #777; font-weight: 400 }\n"
    "td.text { text-align: left } tr.wrong td { background: #fbd0cc }\n"
    "th.series { text-align: left; padding-top: 1em } .wide { overflow-x: auto; margin: 1.5em 0; "
    "font-size: 13px }\n"
    ".wide td, .wide th { padding: .2em .35em }\n"
    ".figures { display: flex; flex-wrap: wrap; gap: 1em 2em } figure { margin: 0; flex: 1 1 34em; "
    "max-width: 48em }\n"
    "figcaption { color: #555 } summary { cursor: pointer }\n"
    "svg { max-width: 100%; height: auto; margin: 1em 0 0 } code { background: #f4f4f4; "
    "padding: .2em .4em }\n"
    "</style>\n</head>\n<body>\n<h1>Muonshard benchmark</h1>\n";

static muonshard_status write_page(FILE *page, const report_file *files, size_t count,
                                   const report_steps *steps, char *message) {
    fputs(head, page);
    muonshard_status status = report_scaling(steps, page, message);
    for (size_t i = 0; i < count && status == MUONSHARD_OK; i++) {
        if (strcmp(files[i].kind, "step") == 0)
            continue;
        put_section(page, &files[i]);
        status = report_pictures(&files[i], page, message);
    }
    fputs("</body>\n</html>\n", page);
    return status;
}

/* To a temporary name first: a page is whole or as it was. */
static muonshard_status write_file(const char *path, const report_file *files, size_t count,
                                   const report_steps *steps, char *message) {
    char temporary[4096];
    if (snprintf(temporary, sizeof temporary, "%s.XXXXXX", path) >= (int)sizeof temporary)
        return message_fail(message, MUONSHARD_ERR_ARGUMENT, "--out: the name is too long");
    const int descriptor = mkstemp(temporary);
    FILE *page = descriptor < 0 ? NULL : fdopen(descriptor, "w");
    if (!page)
        return message_fail(message, MUONSHARD_ERR_IO, "%s: %s", temporary, strerror(errno));
    const mode_t mask = umask(0);
    umask(mask);
    muonshard_status status =
        fchmod(descriptor, 0666 & ~mask) == 0
            ? write_page(page, files, count, steps, message)
            : message_fail(message, MUONSHARD_ERR_IO, "%s: %s", temporary, strerror(errno));
    const int unwritten = ferror(page) | fclose(page);
    if (status == MUONSHARD_OK && (unwritten || rename(temporary, path)))
        status = message_fail(message, MUONSHARD_ERR_IO, "%s: %s", path, strerror(errno));
    if (status)
        unlink(temporary);
    return status;
}

int command_report(int argc, char **argv) {
    if (command_wants_help(argc, argv))
        return command_help(&usage, argc, argv, NULL, 0);
    command_args args = {0};
    char message[COMMAND_MESSAGE] = "";
    muonshard_status status = command_parse(&usage, argc, argv, &args, message);
    const size_t count = status ? 0 : args.positional_count;
    report_file *files = calloc(count + 1, sizeof *files);
    if (!files)
        status = message_fail(message, MUONSHARD_ERR_MEMORY, "out of memory");
    for (size_t i = 0; i < count && status == MUONSHARD_OK; i++)
        status = report_read(args.positional[i], &files[i], message);
    const char *out = status ? NULL : command_option_value(&usage, &args, "--out");
    report_steps steps = {.points = NULL};
    if (status == MUONSHARD_OK)
        status = report_steps_collect(files, count, &steps, message);
    if (status == MUONSHARD_OK) {
        report_steps_print(&steps, stdout);
        fflush(stdout);
        status = write_file(out ? out : "report.html", files, count, &steps, message);
    }
    report_steps_free(&steps);
    if (status)
        fprintf(stderr, "muonshard report: %s\n", message);
    for (size_t i = 0; files && i < count; i++)
        json_decref(files[i].root);
    free(files);
    command_args_free(&args);
    return muonshard_mpi_exit_code(status);
}
