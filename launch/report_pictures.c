/* report_pictures.c - pictures by gnuplot. Numbers and names reach it as columns of data files that
 * only it reads as data; the programs are constants, so that nothing a file says is ever run. */
#include <errno.h>
#include <math.h>
#include <spawn.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "message.h"
#include "report.h"

extern char **environ;

#define HEAD                                                                                       \
    "set terminal svg size 900,%d font 'sans-serif,13' background rgb 'white'\n"                   \
    "set output 'picture.svg'\nset datafile separator '\\t'\nset border 3\n"                       \
    "set tics nomirror out\nset grid ytics lc rgb '#dddddd' lt 1\nset key noenhanced\n"            \
    "set style fill solid 0.85\nset boxwidth 0.6\n"                                                \
    "set encoding utf8\n"

/* ---- running gnuplot ---- */

typedef struct picture {
    char folder[32];
    FILE *data; /* own */
} picture;

static muonshard_status begin(picture *p, char *message) {
    snprintf(p->folder, sizeof p->folder, "/tmp/muonshard-XXXXXX");
    p->data = NULL;
    char path[64];
    if (mkdtemp(p->folder)) {
        snprintf(path, sizeof path, "%s/data", p->folder);
        p->data = fopen(path, "w");
    }
    return p->data ? MUONSHARD_OK
                   : message_fail(message, MUONSHARD_ERR_IO, "%s: %s", p->folder, strerror(errno));
}

static void remove_folder(const picture *p) {
    static const char *const names[] = {"data", "lines", "program", "picture.svg"};
    char path[64];
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        snprintf(path, sizeof path, "%s/%s", p->folder, names[i]);
        unlink(path);
    }
    rmdir(p->folder);
}

static muonshard_status write_program(const picture *p, const char *program, char *message) {
    char path[64];
    snprintf(path, sizeof path, "%s/program", p->folder);
    FILE *file = fopen(path, "w");
    const bool failed =
        !file || fprintf(file, "cd '%s'\n%s", p->folder, program) < 0 || fclose(file) != 0;
    return failed ? message_fail(message, MUONSHARD_ERR_IO, "%s: %s", path, strerror(errno))
                  : MUONSHARD_OK;
}

static muonshard_status run_gnuplot(const picture *p, char *message) {
    char path[64], name[] = "gnuplot";
    snprintf(path, sizeof path, "%s/program", p->folder);
    char *arguments[] = {name, path, NULL};
    pid_t child;
    int outcome = 0;
    if (posix_spawnp(&child, name, NULL, NULL, arguments, environ) != 0)
        return message_fail(message, MUONSHARD_ERR_UNAVAILABLE,
                            "gnuplot, which draws the pictures, isn't there; launch/setup.sh "
                            "quickstart installs it");
    while (waitpid(child, &outcome, 0) < 0 && errno == EINTR)
        ;
    return WIFEXITED(outcome) && WEXITSTATUS(outcome) == 0
               ? MUONSHARD_OK
               : message_fail(message,
                              WIFEXITED(outcome) && WEXITSTATUS(outcome) == 127
                                  ? MUONSHARD_ERR_UNAVAILABLE
                                  : MUONSHARD_ERR_IO,
                              "gnuplot ends with %d; launch/setup.sh quickstart installs it",
                              WEXITSTATUS(outcome));
}

/* From the <svg> on: what comes before is for files that stand alone. */
static muonshard_status copy_picture(const picture *p, FILE *page, char *message) {
    char path[64], line[4096];
    bool inside = false;
    snprintf(path, sizeof path, "%s/picture.svg", p->folder);
    FILE *file = fopen(path, "r");
    while (file && fgets(line, sizeof line, file)) {
        inside = inside || strncmp(line, "<svg", 4) == 0;
        if (inside)
            fputs(line, page);
    }
    if (file)
        fclose(file);
    return inside ? MUONSHARD_OK
                  : message_fail(message, MUONSHARD_ERR_IO, "%s: gnuplot left no picture", path);
}

static muonshard_status draw(picture *p, const char *program, FILE *page, char *message) {
    fclose(p->data);
    muonshard_status status = write_program(p, program, message);
    if (status == MUONSHARD_OK)
        status = run_gnuplot(p, message);
    if (status == MUONSHARD_OK)
        status = copy_picture(p, page, message);
    remove_folder(p);
    return status;
}

/* A name as a field: what would end the field or start a quoted one, and what gnuplot's labels mean
 * something by, becomes a space. */
static void put_name(FILE *data, const char *text) {
    for (; text && *text; text++)
        fputc((unsigned char)*text < 0x20 || strchr("\"\\`{}^@&~", *text) ? ' ' : *text, data);
}

static void put_number(FILE *data, double value) {
    if (isfinite(value))
        fprintf(data, "\t%.9g", value);
    else
        fputs("\tNaN", data);
}

/* ---- Newton-Schulz ---- */

static void put_shape(FILE *data, const json_t *row) {
    fprintf(data, "%.0fx%.0f", report_number(row, "rows"), report_number(row, "cols"));
    if (report_number(row, "count") > 1.0)
        fprintf(data, " x%.0f", report_number(row, "count"));
    fputc(' ', data);
    put_name(data, json_string_value(json_object_get(row, "dtype")));
    fputc(' ', data);
    put_name(data, json_string_value(json_object_get(row, "form")));
}

static muonshard_status draw_ns(const report_file *file, FILE *page, char *message) {
    static const char rate[] =
        "set title 'Newton-Schulz: operations it has to do a second'\n"
        "set ylabel 'GFLOP/s'\nset yrange [0:*]\nset xtics rotate by -25 noenhanced\n"
        "set key outside right\nset offsets 0,0,graph 0.08,0\n"
        "plot 'data' using 0:2:xtic(1) with boxes lc rgb '#1f5fbf' notitle, "
        "'' using 0:2:(sprintf('%%.0f', $2)) with labels offset 0,0.7 notitle, "
        "'' using 0:3 with linespoints lw 2 pt 2 lc rgb '#c0392b' title 'ceiling of the innermost "
        "loop', "
        "'' using 0:4 with linespoints lw 2 pt 1 dt 2 lc rgb '#7f8c8d' title 'OpenBLAS sgemm'\n";
    static const char ratio[] =
        "set title 'Times as fast as three plain products a step through OpenBLAS'\n"
        "set ylabel 'ratio'\nset yrange [0:*]\nset xtics rotate by -25 noenhanced\nset rmargin 6\n"
        "set offsets 0,0,graph 0.08,0\n"
        "plot 'data' using 0:5:xtic(1) with boxes lc rgb '#2e8b57' notitle, "
        "'' using 0:5:(sprintf('%%.2f', $5)) with labels offset 0,0.7 notitle, "
        "1 with lines lw 1.5 dt 2 lc rgb '#7f8c8d' notitle\n";
    const json_t *ceilings = json_object_get(file->root, "ceilings");
    for (int k = 0; k < 2; k++) {
        picture p = {.data = NULL};
        muonshard_status status = begin(&p, message);
        if (status)
            return status;
        size_t i;
        json_t *row;
        json_array_foreach(file->rows, i, row) {
            const char *dtype = json_string_value(json_object_get(row, "dtype"));
            put_shape(p.data, row);
            put_number(p.data, report_number(row, "gflops"));
            put_number(p.data, report_number(ceilings, strcmp(dtype, "bf16") ? "gemm_fp32_gflops"
                                                                             : "gemm_bf16_gflops"));
            put_number(p.data, report_number(ceilings, "blas_sgemm_gflops"));
            put_number(p.data, report_number(row, "ratio"));
            fputc('\n', p.data);
        }
        char program[4096];
        snprintf(program, sizeof program, HEAD, 420);
        const size_t length = strlen(program);
        snprintf(program + length, sizeof program - length, k ? ratio : rate);
        status = draw(&p, program, page, message);
        if (status)
            return status;
    }
    return MUONSHARD_OK;
}

/* ---- collectives ---- */

static muonshard_status draw_comm(const report_file *file, FILE *page, char *message) {
    static const char *const ops[] = {"reduce_scatter", "all_gather"};
    picture p = {.data = NULL};
    muonshard_status status = begin(&p, message);
    if (status)
        return status;
    const double ranks = report_number(file->root, "ranks");
    for (size_t k = 0; k < 2; k++) {
        size_t i;
        json_t *row;
        json_array_foreach(file->rows, i, row) {
            if (strcmp(json_string_value(json_object_get(row, "op")), ops[k]))
                continue;
            const double bytes = report_number(row, "bytes");
            fprintf(p.data, "%.9g", bytes / 1048576.0);
            put_number(p.data, report_number(row, "busbw_gbs"));
            put_number(p.data,
                       1e-3 * bytes * (ranks - 1.0) / ranks / report_number(row, "mpi_us.median"));
            fputc('\n', p.data);
        }
        fputs("NaN\tNaN\tNaN\n\n\n",
              p.data); /* so that an operation without rows is a block, too */
    }
    char program[4096];
    snprintf(
        program, sizeof program, HEAD "%s", 420,
        "set title 'Bus bandwidth over size'\nset xlabel 'MiB'\nset ylabel 'GB/s'\n"
        "set logscale x 2\nset yrange [0:*]\nset key outside right\n"
        "plot 'data' index 0 using 1:2 with linespoints lw 2.5 pt 7 lc rgb '#1f5fbf' title "
        "'reduce-scatter', "
        "'' index 0 using 1:3 with linespoints lw 1.5 dt 2 pt 6 lc rgb '#1f5fbf' title 'MPI Reduce "
        "scatter', "
        "'' index 1 using 1:2 with linespoints lw 2.5 pt 5 lc rgb '#d1601f' title 'all-gather', "
        "'' index 1 using 1:3 with linespoints lw 1.5 dt 2 pt 4 lc rgb '#d1601f' title 'MPI "
        "Allgather'\n");
    return draw(&p, program, page, message);
}

/* ---- steps ---- */

static const char *const phase_names[] = {"pack",       "reduce-scatter", "agree",
                                          "momentum",   "orthogonalize",  "element-wise",
                                          "all-gather", "apply"};
enum { PHASES = sizeof phase_names / sizeof *phase_names };

static muonshard_status draw_phases(const report_file *file, FILE *page, char *message) {
    picture p = {.data = NULL};
    muonshard_status status = begin(&p, message);
    if (status)
        return status;
    size_t i;
    json_t *row;
    json_array_foreach(file->rows, i, row) {
        const json_t *phases = json_object_get(row, "phases_us");
        put_name(p.data, json_string_value(json_object_get(row, "model")));
        for (size_t k = 0; k < PHASES; k++)
            put_number(p.data, 1e-3 * report_number(phases, phase_names[k]));
        fputc('\n', p.data);
    }
    char program[4096];
    snprintf(
        program, sizeof program, HEAD "%s", 360,
        "set title 'Where a step goes: computation, and communication that is waited for'\n"
        "set ylabel 'ms'\nset yrange [0:*]\nset style histogram rowstacked\nset style data "
        "histograms\n"
        "set xtics noenhanced\nset key outside right invert\n"
        "array names[8] = ['pack', 'reduce-scatter', 'agree', 'momentum', 'Newton-Schulz', "
        "'element-wise', "
        "'all-gather', 'apply']\n"
        "array colours[8] = ['#b0b0b0', '#e0902f', '#8e6fb5', '#5fa8d3', '#1f5fbf', '#2e8b57', "
        "'#c0392b', '#d8c24a']\n"
        "plot for [k = 2:9] 'data' using k:xtic(1) lc rgb colours[k - 1] title names[k - 1]\n");
    return draw(&p, program, page, message);
}

/* The first word of an operation, which is its kind. */
static int colour_of(const char *op) {
    static const struct {
        const char *kind;
        int colour;
    } colours[] = {
        {"pack", 0xb0b0b0},       {"take", 0xb0b0b0},          {"reduce-scatter", 0xe0902f},
        {"measure", 0x8e6fb5},    {"agree", 0x8e6fb5},         {"resolve", 0x8e6fb5},
        {"momentum", 0x5fa8d3},   {"orthogonalize", 0x1f5fbf}, {"adam", 0x2e8b57},
        {"all-gather", 0xc0392b}, {"apply", 0xd8c24a},         {"update", 0xd8c24a}};
    for (size_t i = 0; op && i < sizeof colours / sizeof *colours; i++)
        if (strncmp(op, colours[i].kind, strlen(colours[i].kind)) == 0)
            return colours[i].colour;
    return 0x777777;
}

static muonshard_status draw_timeline(const json_t *timeline, FILE *page, char *message) {
    picture p = {.data = NULL};
    if (json_array_size(timeline) == 0)
        return MUONSHARD_OK;
    muonshard_status status = begin(&p, message);
    if (status)
        return status;
    size_t i;
    json_t *event;
    json_array_foreach(timeline, i, event) {
        const char *stream = json_string_value(json_object_get(event, "stream"));
        fprintf(p.data, "%d", stream && strcmp(stream, "comm") == 0 ? 1 : 2);
        put_number(p.data, 1e-3 * report_number(event, "start_us"));
        put_number(p.data, 1e-3 * report_number(event, "end_us"));
        fprintf(p.data, "\t%d\n", colour_of(json_string_value(json_object_get(event, "op"))));
    }
    char program[4096];
    snprintf(
        program, sizeof program, HEAD "%s", 260,
        "set title 'The last step on rank 0: grey and yellow copies, blue computation, orange "
        "reduce-scatter, red all-gather'\n"
        "set xlabel 'ms'\nset yrange [0.4:2.6]\nset ytics ('communication' 1, 'computation' 2)\n"
        "unset key\nunset grid\nset style fill solid 0.9 border rgb '#ffffff'\n"
        "plot 'data' using 2:1:2:3:($1 - 0.35):($1 + 0.35):4 with boxxyerror lc rgb variable\n");
    return draw(&p, program, page, message);
}

static muonshard_status draw_step(const report_file *file, FILE *page, char *message) {
    muonshard_status status = draw_phases(file, page, message);
    size_t i;
    json_t *row;
    json_array_foreach(file->rows, i, row) {
        if (status == MUONSHARD_OK)
            status = draw_timeline(json_object_get(row, "timeline"), page, message);
    }
    return status;
}

muonshard_status report_pictures(const report_file *file, FILE *page, char *message) {
    if (strcmp(file->kind, "ns") == 0)
        return draw_ns(file, page, message);
    if (strcmp(file->kind, "comm") == 0)
        return draw_comm(file, page, message);
    return draw_step(file, page, message);
}

/* ---- over ranks ---- */

typedef struct point {
    double ranks, step;
} point;

static int by_ranks(const void *left, const void *right) {
    const point *a = left, *b = right;
    return (a->ranks > b->ranks) - (a->ranks < b->ranks);
}

/* Of the model of the first step file. */
muonshard_status report_scaling(const report_file *files, size_t count, FILE *page, char *message) {
    const char *model = NULL;
    point *points = calloc(count + 1, sizeof *points);
    size_t found = 0;
    if (!points)
        return message_fail(message, MUONSHARD_ERR_MEMORY, "out of memory");
    for (size_t i = 0; i < count; i++) {
        const json_t *row = json_array_get(files[i].rows, 0);
        const char *own = json_string_value(json_object_get(row, "model"));
        if (strcmp(files[i].kind, "step") || (model && strcmp(model, own)))
            continue;
        model = own;
        points[found++] =
            (point){report_number(files[i].root, "ranks"), report_number(row, "step_us.median")};
    }
    qsort(points, found, sizeof *points, by_ranks);
    picture p = {.data = NULL};
    if (found < 2 || points[0].ranks == points[found - 1].ranks) {
        free(points);
        return MUONSHARD_OK;
    }
    const muonshard_status status = begin(&p, message);
    for (size_t i = 0; i < found && status == MUONSHARD_OK; i++)
        fprintf(p.data, "%.9g\t%.9g\t%.9g\n", points[i].ranks, points[0].step / points[i].step,
                points[i].ranks / points[0].ranks);
    free(points);
    char program[4096];
    snprintf(
        program, sizeof program, HEAD "%s", 420,
        "set title 'Speed-up of the step over ranks'\nset xlabel 'ranks'\nset ylabel 'speed-up'\n"
        "set logscale xy 2\nset key top left\n"
        "plot 'data' using 1:2 with linespoints lw 2.5 pt 7 lc rgb '#1f5fbf' title 'measured', "
        "'' using 1:3 with lines dt 2 lc rgb '#7f8c8d' title 'ideal'\n");
    return status ? status : draw(&p, program, page, message);
}
