/* bench.c - `muonshard bench ns|comm|step`: options, the table's head, timing, JSON. */
#include "bench.h"

#include <cblas.h>
#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "config.h"
#include "muonshard_mpi.h"
#include "optim/placement.h"

static const command_option options[] = {
    {"-b", COMMAND_VALUE, false, "SIZE", "first size: bytes (K, M, G) of comm, side of ns"},
    {"-e", COMMAND_VALUE, false, "SIZE",
     "last size; bytes of an array of --calibrate, and of the ceilings of a device"},
    {"-f", COMMAND_VALUE, false, "FACTOR", "from a size to the next"},
    {"-i", COMMAND_VALUE, false, "SIZE", "or the difference between sizes"},
    {"-n", COMMAND_VALUE, false, "N", "timed runs (default 20)"},
    {"-w", COMMAND_VALUE, false, "N", "runs before them (default 3)"},
    {"-c", COMMAND_VALUE, false, "0|1", "compare outcomes with the oracle (default 1)"},
    {"-J", COMMAND_VALUE, false, "FILE", "write JSON, for muonshard report"},
    {"--shapes", COMMAND_VALUE, false, "LIST",
     "ROWSxCOLS[xCOUNT] separated by commas; ns: default 768x768,768x3072,1024x4096; step: in "
     "place of MODEL"},
    {"--dtype", COMMAND_VALUE, false, "DTYPE",
     "step with --shapes: of the parameters, fp32, bf16 or fp16 (default fp32)"},
    {"--grad-dtype", COMMAND_VALUE, false, "DTYPE",
     "step with --shapes: of the gradients (default: the parameters')"},
    {"--layers", COMMAND_VALUE, false, "N", "step: only so many layers of the model"},
    {"--op", COMMAND_VALUE, false, "OP", "comm: reduce_scatter or all_gather (default both)"},
    {"--backward", COMMAND_VALUE, false, "MS",
     "step: a backward pass of so long, during which gradients become ready"},
    {"--link", COMMAND_VALUE, false, "GBS[,US]",
     "step: no faster than a link of so many GB/s and microseconds a message"},
    {"--calibrate", COMMAND_VALUE, false, "FILE",
     "in place of a kind: write this machine's rates and links, for muonshard plan --machine"},
    {"--weak", COMMAND_FLAG, false, NULL, "step: every tensor as often as there are ranks"},
};

static const command_usage usage = {
    .name = "bench",
    .synopsis =
        "ns|comm|step [MODEL|--shapes LIST] [-b -e -f -i SIZE] [-n -w N] [-c 0|1] [-J "
        "FILE] [key=value...]\n       muonshard bench --calibrate FILE [-n -w N] [key=value...]",
    .doc = "Times Newton-Schulz, the collectives, or whole optimizer steps of a model file or of "
           "shapes; "
           "under "
           "mpirun\non every rank, of which the slowest counts. All values of the config hold, "
           "threads=N too.",
    .positional_min = 0,
    .positional_max = 2,
    .overrides = true,
    .options = options,
    .option_count = sizeof options / sizeof options[0],
};

/* ---- timing ---- */

muonshard_status bench_barrier(bench *b) {
    char byte = 0;
    char *all = calloc((size_t)b->cmd->size, 1);
    if (!all)
        return message_fail(b->message, MUONSHARD_ERR_MEMORY, "out of memory");
    const muonshard_status status = muonshard_comm_allgather(b->cmd->comm, &byte, all, 1);
    free(all);
    return status ? message_fail(b->message, status, "%s", muonshard_comm_last_error(b->cmd->comm))
                  : MUONSHARD_OK;
}

static int by_size(const void *left, const void *right) {
    const double a = *(const double *)left, b = *(const double *)right;
    return (a > b) - (a < b);
}

muonshard_status bench_time_of(bench *b, double *seconds, size_t count, bench_time *time) {
    const muonshard_status status =
        muonshard_comm_allreduce(b->cmd->comm, seconds, count, MUONSHARD_REDUCE_MAX);
    if (status)
        return message_fail(b->message, status, "%s", muonshard_comm_last_error(b->cmd->comm));
    qsort(seconds, count, sizeof *seconds, by_size);
    *time = (bench_time){.median = (seconds[(count - 1) / 2] + seconds[count / 2]) / 2.0,
                         .min = seconds[0],
                         .max = seconds[count - 1]};
    return MUONSHARD_OK;
}

muonshard_status bench_measure(bench *b, bench_run *run, void *user, bench_time *time) {
    for (int i = -b->warmup; i < b->iterations; i++) {
        TRY(bench_barrier(b));
        const double start = command_now_s();
        TRY(run(user));
        if (i >= 0)
            b->seconds[i] = command_now_s() - start;
    }
    return bench_time_of(b, b->seconds, (size_t)b->iterations, time);
}

muonshard_status bench_sum(bench *b, double *value) {
    const muonshard_status status =
        muonshard_comm_allreduce(b->cmd->comm, value, 1, MUONSHARD_REDUCE_SUM);
    return status ? message_fail(b->message, status, "%s", muonshard_comm_last_error(b->cmd->comm))
                  : MUONSHARD_OK;
}

double bench_next_size(const bench *b, double size) {
    return b->step > 0.0 ? size + b->step : size * b->factor;
}

/* ---- output ---- */

void bench_print(const bench *b, const char *format, ...) {
    if (b->cmd->rank != 0)
        return;
    va_list list;
    va_start(list, format);
    vprintf(format, list);
    va_end(list);
    fflush(stdout);
}

json_t *bench_number(double value) {
    return isfinite(value) ? json_real(value) : json_null();
}

json_t *bench_time_json(bench_time time) {
    return json_pack("{s:o, s:o, s:o}", "median", bench_number(1e6 * time.median), "min",
                     bench_number(1e6 * time.min), "max", bench_number(1e6 * time.max));
}

muonshard_status bench_add_row(bench *b, json_t *row) {
    return !row || json_array_append_new(b->rows, row)
               ? message_fail(b->message, MUONSHARD_ERR_MEMORY, "out of memory")
               : MUONSHARD_OK;
}

void bench_processor(char *name, size_t size) {
    FILE *file = fopen("/proc/cpuinfo", "r");
    char line[256];
    snprintf(name, size, "unknown");
    while (file && fgets(line, sizeof line, file)) {
        const char *value = strchr(line, ':');
        if (strncmp(line, "model name", 10) == 0 && value) {
            snprintf(name, size, "%.*s", (int)strcspn(value + 2, "\n"), value + 2);
            break;
        }
    }
    if (file)
        fclose(file);
}

static void blas_name(char *name, size_t size) {
    const char *config = openblas_get_config();
    int words = 0, length = 0;
    while (config[length] && (config[length] != ' ' || ++words < 2))
        length++;
    snprintf(name, size, "%.*s %s", length, config, openblas_get_corename());
}

static json_t *machine_json(const bench *b) {
    char host[64] = "", cpu[128], blas[64];
    gethostname(host, sizeof host - 1);
    bench_processor(cpu, sizeof cpu);
    blas_name(blas, sizeof blas);
    return json_pack("{s:s, s:s, s:I, s:s, s:s}", "host", host, "cpu", cpu, "cores",
                     (json_int_t)sysconf(_SC_NPROCESSORS_ONLN), "kernels",
                     host_isa_name(host_of(b->host)->isa), "blas", blas);
}

static json_t *ceilings_json(const bench_ceilings *c) {
    return json_pack(
        "{s:o, s:o, s:o, s:o, s:o}", "gemm_fp32_gflops", bench_number(1e-9 * c->fp32_flops),
        "gemm_bf16_gflops", bench_number(1e-9 * c->bf16_flops), "blas_sgemm_gflops",
        bench_number(1e-9 * c->blas_flops), "triad_gbs", bench_number(1e-9 * c->triad_bytes),
        "memcpy_gbs", bench_number(1e-9 * c->memcpy_bytes));
}

void bench_stamp(char date[32], char version[32]) {
    const time_t now = time(NULL);
    struct tm utc;
    gmtime_r(&now, &utc);
    strftime(date, 32, "%Y-%m-%dT%H:%M:%SZ", &utc);
    const int v = muonshard_version();
    snprintf(version, 32, "%d.%d.%d", v / 10000, v / 100 % 100, v % 100);
}

static muonshard_status write_json(bench *b, const char *path, const char *line) {
    if (!path || b->cmd->rank != 0)
        return MUONSHARD_OK;
    char date[32], version[32];
    bench_stamp(date, version);
    const size_t size = muonshard_config_dump(b->cmd->config, NULL, 0) + 1;
    char *config = malloc(size);
    if (config)
        muonshard_config_dump(b->cmd->config, config, size);
    json_t *root =
        config ? json_pack("{s:i, s:s, s:s, s:s, s:s, s:b, s:o, s:i, s:i, s:i, s:i, s:s, s:o, s:O}",
                           "schema", BENCH_SCHEMA, "kind", b->kind, "version", version, "date",
                           date, "command", line, "measured", 1, "machine", machine_json(b),
                           "ranks", b->cmd->size, "threads", b->host->threads, "iterations",
                           b->iterations, "warmup", b->warmup, "config", config, "ceilings",
                           ceilings_json(&b->ceilings), "rows", b->rows)
               : NULL;
    free(config);
    if (!root)
        return message_fail(b->message, MUONSHARD_ERR_MEMORY, "out of memory");
    const int failed = json_dump_file(root, path, JSON_INDENT(1) | JSON_REAL_PRECISION(9));
    json_decref(root);
    return failed ? message_fail(b->message, MUONSHARD_ERR_IO, "%s: %s", path, strerror(errno))
                  : MUONSHARD_OK;
}

static void print_head(const bench *b, const char *line) {
    char cpu[128], blas[64];
    bench_processor(cpu, sizeof cpu);
    blas_name(blas, sizeof blas);
    const bench_ceilings *c = &b->ceilings;
    bench_print(b, "# %s\n# %d rank%s, %d thread%s each; %s, %s kernels; %s\n", line, b->cmd->size,
                b->cmd->size == 1 ? "" : "s", b->host->threads, b->host->threads == 1 ? "" : "s",
                cpu, host_isa_name(host_of(b->host)->isa), blas);
    if (!isnan(c->memcpy_bytes))
        bench_print(b,
                    "# ceilings a rank: tiles fp32 %.0f, bf16 %.0f GFLOP/s; OpenBLAS sgemm %.0f "
                    "GFLOP/s; triad %.1f, memcpy %.1f GB/s\n",
                    1e-9 * c->fp32_flops, 1e-9 * c->bf16_flops, 1e-9 * c->blas_flops,
                    1e-9 * c->triad_bytes, 1e-9 * c->memcpy_bytes);
}

/* ---- options ---- */

/* "64M" */
static muonshard_status read_size(const command_args *args, const char *name, double initial,
                                  double *value, char *message) {
    const char *text = command_option_value(&usage, args, name);
    *value = initial;
    if (!text)
        return MUONSHARD_OK;
    char *end;
    *value = strtod(text, &end);
    const char *units = "KMG", *unit = *end ? strchr(units, *end) : NULL;
    if (unit) {
        *value *= pow(1024.0, (double)(unit - units + 1));
        end++;
    }
    return end == text || *end || !(*value > 0.0) || !(*value < 1e15)
               ? message_fail(message, MUONSHARD_ERR_ARGUMENT,
                              "%s is '%s', not a number above 0, which K, M or G may follow", name,
                              text)
               : MUONSHARD_OK;
}

static muonshard_status read_count(const command_args *args, const char *name, int initial, int min,
                                   int max, int *value, char *message) {
    const char *text = command_option_value(&usage, args, name);
    *value = initial;
    if (!text)
        return MUONSHARD_OK;
    char *end;
    const long n = strtol(text, &end, 10);
    *value = (int)n;
    return end == text || *end || n < min || n > max
               ? message_fail(message, MUONSHARD_ERR_ARGUMENT,
                              "%s is '%s'; wanted is a number from %d to %d", name, text, min, max)
               : MUONSHARD_OK;
}

/* Whose steps are measured, if they are. */
static muonshard_status read_model_options(bench *b, const command_args *args) {
    const bool step = strcmp(b->kind, "step") == 0, has_model = args->positional_count == 2;
    b->shapes = command_option_value(&usage, args, "--shapes");
    b->dtype = command_option_value(&usage, args, "--dtype");
    b->grad_dtype = command_option_value(&usage, args, "--grad-dtype");
    int layers;
    TRY(read_count(args, "--layers", 0, 1, 1000000, &layers, b->message));
    b->layers = layers;
    if (step && has_model == (b->shapes != NULL))
        return message_fail(b->message, MUONSHARD_ERR_ARGUMENT,
                            has_model ? "step takes a model file or --shapes, and not both"
                                      : "step needs a model file, or --shapes");
    if (!step && has_model)
        return message_fail(b->message, MUONSHARD_ERR_ARGUMENT, "%s takes no further argument",
                            b->kind);
    if ((b->dtype || b->grad_dtype) && !(step && b->shapes))
        return message_fail(b->message, MUONSHARD_ERR_ARGUMENT,
                            "--dtype and --grad-dtype belong to step with --shapes; a model file "
                            "has its own");
    return layers && !has_model ? message_fail(b->message, MUONSHARD_ERR_ARGUMENT,
                                               "--layers belongs to step with a model file")
                                : MUONSHARD_OK;
}

static muonshard_status read_options(bench *b, const command_args *args) {
    int check;
    TRY(read_count(args, "-n", 20, 1, 1000000, &b->iterations, b->message));
    TRY(read_count(args, "-w", 3, 0, 1000000, &b->warmup, b->message));
    TRY(read_count(args, "-c", 1, 0, 1, &check, b->message));
    b->check = check != 0;
    b->weak = command_option_given(&usage, args, "--weak").count > 0;
    TRY(read_size(args, "-b", 0.0, &b->begin, b->message));
    TRY(read_size(args, "-e", 0.0, &b->end, b->message));
    TRY(read_size(args, "-f", 2.0, &b->factor, b->message));
    TRY(read_size(args, "-i", 0.0, &b->step, b->message));
    if (b->factor <= 1.0)
        return message_fail(b->message, MUONSHARD_ERR_ARGUMENT, "-f is %g; it has to be above 1",
                            b->factor);
    const bool calibrates = command_option_value(&usage, args, "--calibrate") != NULL;
    if (calibrates == (args->positional_count > 0))
        return message_fail(
            b->message, MUONSHARD_ERR_ARGUMENT,
            calibrates ? "--calibrate takes no kind and no model"
                       : "too few arguments: ns, comm or step is to be said, or --calibrate");
    if (strcmp(b->kind, "ns") && strcmp(b->kind, "comm") && strcmp(b->kind, "step") && !calibrates)
        return message_fail(b->message, MUONSHARD_ERR_ARGUMENT,
                            "'%s' can't be measured; ns, comm and step can", b->kind);
    if (!calibrates)
        TRY(read_model_options(b, args));
    b->seconds = calloc((size_t)b->iterations, sizeof *b->seconds);
    b->rows = json_array();
    return b->seconds && b->rows ? MUONSHARD_OK
                                 : message_fail(b->message, MUONSHARD_ERR_MEMORY, "out of memory");
}

/* Where it was said that a device takes the steps, they say nothing. */
static muonshard_status measure_ceilings(bench *b) {
    b->ceilings = (bench_ceilings){NAN, NAN, NAN, NAN, NAN};
    return strcmp(b->kind, "step") == 0 && b->settings->backend == BACKEND_CUDA
               ? MUONSHARD_OK
               : bench_ceilings_measure(b);
}

static muonshard_status open_host(bench *b) {
    placement at;
    error_text error = {""};
    muonshard_status status = placement_find(b->cmd->comm, &at, &error);
    if (status == MUONSHARD_OK)
        status = backend_open_host(placement_options(&at, b->settings), &b->host, &error);
    return status ? message_fail(b->message, status, "%s", error.text) : MUONSHARD_OK;
}

static void join(char *line, size_t size, int argc, char **argv) {
    size_t length = (size_t)snprintf(line, size, "muonshard");
    for (int i = 0; i < argc && length < size; i++)
        length += (size_t)snprintf(line + length, size - length, " %s", argv[i]);
}

static muonshard_status run(bench *b, const command_args *args, const char *line) {
    print_head(b, line);
    const char *machine = command_option_value(&usage, args, "--calibrate");
    if (machine)
        return bench_calibrate(b, machine);
    if (strcmp(b->kind, "ns") == 0)
        TRY(bench_ns(b, b->shapes));
    else if (strcmp(b->kind, "comm") == 0)
        TRY(bench_comm(b, command_option_value(&usage, args, "--op")));
    else
        TRY(bench_step(b, command_option_value(&usage, args, "--backward"),
                       command_option_value(&usage, args, "--link")));
    return write_json(b, command_option_value(&usage, args, "-J"), line);
}

/* Of all rows. */
static double wrong(const bench *b) {
    double sum = 0.0;
    size_t i;
    json_t *row;
    json_array_foreach(b->rows, i, row) sum += json_number_value(json_object_get(row, "wrong"));
    return sum;
}

int command_bench(int argc, char **argv) {
    if (command_wants_help(argc, argv))
        return command_help(&usage, argc, argv, NULL, 0);
    command cmd;
    command_args args = {0};
    bench b = {.cmd = &cmd, .kind = ""};
    muonshard_status status = command_start(&cmd, &usage, &args, argc, argv);
    if (status == MUONSHARD_OK) {
        b.kind = args.positional_count ? args.positional[0] : "";
        status = command_agree(&cmd, read_options(&b, &args), b.message);
    }
    const bool has_model = status == MUONSHARD_OK && args.positional_count == 2;
    const bool steps = status == MUONSHARD_OK && strcmp(b.kind, "step") == 0;
    model_file model = {0};
    if (status == MUONSHARD_OK)
        status = command_configure(&cmd, has_model ? args.positional[1] : NULL, &args,
                                   steps ? model_file_table : NULL,
                                   steps ? model_file_table_count : 0, &model);
    const bool on_backend = steps || (status == MUONSHARD_OK && !args.positional_count);
    if (status == MUONSHARD_OK && !on_backend) /* ns and comm measure the host's */
        status = command_on_host(&cmd);
    char line[1024];
    join(line, sizeof line, argc, argv);
    if (status == MUONSHARD_OK) {
        b.settings = config_settings(cmd.config);
        b.model = &model;
        b.model_path = has_model ? args.positional[1] : NULL;
        status = command_agree(&cmd, open_host(&b), b.message);
    }
    if (status == MUONSHARD_OK)
        status = command_agree(&cmd, measure_ceilings(&b), b.message);
    if (status == MUONSHARD_OK)
        status = command_agree(&cmd, run(&b, &args, line), b.message);
    if (status == MUONSHARD_OK && wrong(&b) > 0.0)
        status = command_told(&cmd, MUONSHARD_ERR_INTERNAL, "%g results are wrong", wrong(&b));
    backend_close(b.host);
    json_decref(b.rows);
    free(b.seconds);
    model_file_free(&model);
    return command_finish(&cmd, &args, status);
}
