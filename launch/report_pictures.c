/* report_pictures.c - Newton-Schulz, collectives, and what ran when. */
#include <math.h>
#include <string.h>

#include "report.h"
#include "report_gnuplot.h"

/* ---- Newton-Schulz ---- */

static void put_shape(FILE *data, const json_t *row) {
    fprintf(data, "%.0fx%.0f", report_number(row, "rows"), report_number(row, "cols"));
    if (report_number(row, "count") > 1.0)
        fprintf(data, " x%.0f", report_number(row, "count"));
    fputc(' ', data);
    gnuplot_name(data, json_string_value(json_object_get(row, "dtype")));
    fputc(' ', data);
    gnuplot_name(data, json_string_value(json_object_get(row, "form")));
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
        gnuplot p = {.data = NULL};
        muonshard_status status = gnuplot_begin(&p, message);
        if (status)
            return status;
        size_t i;
        json_t *row;
        json_array_foreach(file->rows, i, row) {
            const char *dtype = json_string_value(json_object_get(row, "dtype"));
            put_shape(p.data, row);
            gnuplot_number(p.data, report_number(row, "gflops"));
            gnuplot_number(p.data,
                           report_number(ceilings, strcmp(dtype, "bf16") ? "gemm_fp32_gflops"
                                                                         : "gemm_bf16_gflops"));
            gnuplot_number(p.data, report_number(ceilings, "blas_sgemm_gflops"));
            gnuplot_number(p.data, report_number(row, "ratio"));
            fputc('\n', p.data);
        }
        char program[4096];
        snprintf(program, sizeof program, GNUPLOT_HEAD, 900, 420);
        const size_t length = strlen(program);
        snprintf(program + length, sizeof program - length, k ? ratio : rate);
        status = gnuplot_draw(&p, program, page, message);
        if (status)
            return status;
    }
    return MUONSHARD_OK;
}

/* ---- collectives ---- */

static muonshard_status draw_comm(const report_file *file, FILE *page, char *message) {
    static const char *const ops[] = {"reduce_scatter", "all_gather"};
    gnuplot p = {.data = NULL};
    muonshard_status status = gnuplot_begin(&p, message);
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
            gnuplot_number(p.data, report_number(row, "busbw_gbs"));
            gnuplot_number(p.data, 1e-3 * bytes * (ranks - 1.0) / ranks /
                                       report_number(row, "mpi_us.median"));
            fputc('\n', p.data);
        }
        fputs("NaN\tNaN\tNaN\n\n\n",
              p.data); /* so that an operation without rows is a block, too */
    }
    char program[4096];
    snprintf(
        program, sizeof program, GNUPLOT_HEAD "%s", 900, 420,
        "set title 'Bus bandwidth over size'\nset xlabel 'MiB'\nset ylabel 'GB/s'\n"
        "set logscale x 2\nset yrange [0:*]\nset key outside right\n"
        "plot 'data' index 0 using 1:2 with linespoints lw 2.5 pt 7 lc rgb '#1f5fbf' title "
        "'reduce-scatter', "
        "'' index 0 using 1:3 with linespoints lw 1.5 dt 2 pt 6 lc rgb '#1f5fbf' title 'MPI Reduce "
        "scatter', "
        "'' index 1 using 1:2 with linespoints lw 2.5 pt 5 lc rgb '#d1601f' title 'all-gather', "
        "'' index 1 using 1:3 with linespoints lw 1.5 dt 2 pt 4 lc rgb '#d1601f' title 'MPI "
        "Allgather'\n");
    return gnuplot_draw(&p, program, page, message);
}

muonshard_status report_pictures(const report_file *file, FILE *page, char *message) {
    return strcmp(file->kind, "ns") == 0 ? draw_ns(file, page, message)
                                         : draw_comm(file, page, message);
}

/* ---- what ran when ---- */

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

muonshard_status report_timeline(const json_t *timeline, FILE *page, char *message) {
    gnuplot p = {.data = NULL};
    muonshard_status status = gnuplot_begin(&p, message);
    if (status)
        return status;
    size_t i;
    json_t *event;
    json_array_foreach(timeline, i, event) {
        const char *stream = json_string_value(json_object_get(event, "stream"));
        fprintf(p.data, "%d", stream && strcmp(stream, "comm") == 0 ? 1 : 2);
        gnuplot_number(p.data, 1e-3 * report_number(event, "start_us"));
        gnuplot_number(p.data, 1e-3 * report_number(event, "end_us"));
        fprintf(p.data, "\t%d\n", colour_of(json_string_value(json_object_get(event, "op"))));
    }
    char program[4096];
    snprintf(
        program, sizeof program, GNUPLOT_HEAD "%s", 900, 200,
        "set xlabel 'ms'\nset yrange [0.4:2.6]\nset ytics ('communication' 1, 'computation' 2)\n"
        "unset key\nunset grid\nset style fill solid 0.9 border rgb '#ffffff'\n"
        "plot 'data' using 2:1:2:3:($1 - 0.35):($1 + 0.35):4 with boxxyerror lc rgb variable\n");
    return gnuplot_draw(&p, program, page, message);
}
