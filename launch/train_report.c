#include "train.h"

#include <errno.h>
#include <inttypes.h>
#include <jansson.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct train_report {
    const train_settings *settings; /* borrowed */
    FILE *log;                      /* own; NULL: off */
    bool line, line_open;           /* the kept-up-to-date form; it stands unfinished */
    double val_loss, best;
    int64_t val_step, best_step, skipped;
};

/* mpirun gives its ranks a terminal of their own even when it writes to a file: look at its output
 * then. */
static bool output_is_terminal(void) {
    if (!isatty(STDOUT_FILENO))
        return false;
    if (!getenv("OMPI_COMM_WORLD_SIZE"))
        return true;
    char link[64], target[64];
    snprintf(link, sizeof link, "/proc/%ld/fd/1", (long)getppid());
    ssize_t length = readlink(link, target, sizeof target - 1);
    if (length < 0)
        return false;
    target[length] = '\0';
    return !strncmp(target, "/dev/pts/", 9) || !strncmp(target, "/dev/tty", 8);
}

/* Cut off after the line of step `step`; what a killed run left of later ones goes. */
static FILE *reopen_log(const char *path, int64_t step) {
    FILE *log = fopen(path, "r+");
    if (!log && errno == ENOENT)
        return fopen(path, "w");
    char *line = NULL;
    size_t room = 0;
    off_t end = 0;
    ssize_t length;
    while (log && (length = getline(&line, &room, log)) > 0) {
        long long number = 0;
        if (line[length - 1] != '\n' ||
            (sscanf(line, "{\"step\":%lld", &number) == 1 && number > step))
            break;
        end += length;
    }
    free(line);
    if (log && (ftruncate(fileno(log), end) != 0 || fseeko(log, end, SEEK_SET) != 0)) {
        const int error = errno;
        fclose(log);
        errno = error;
        return NULL;
    }
    return log;
}

muonshard_status train_report_open(train_report **report, const train_settings *s, int rank,
                                   int64_t step, char *message) {
    *report = NULL;
    if (rank != 0)
        return MUONSHARD_OK;
    train_report *r = calloc(1, sizeof *r);
    if (!r) {
        snprintf(message, COMMAND_MESSAGE, "out of memory");
        return MUONSHARD_ERR_MEMORY;
    }
    r->settings = s;
    r->val_loss = r->best = NAN;
    r->line = s->progress == TRAIN_PROGRESS_ON ||
              (s->progress == TRAIN_PROGRESS_AUTO && output_is_terminal());
    if (*s->log && !(r->log = step ? reopen_log(s->log, step) : fopen(s->log, "w"))) {
        snprintf(message, COMMAND_MESSAGE, "train.log: %s: %s", s->log, strerror(errno));
        free(r);
        return MUONSHARD_ERR_IO;
    }
    *report = r;
    return MUONSHARD_OK;
}

/* Takes `value` over; NULL is out of memory. */
static muonshard_status write_line(train_report *report, json_t *value, char *message) {
    char *text = value ? json_dumps(value, JSON_COMPACT | JSON_REAL_PRECISION(9)) : NULL;
    json_decref(value);
    if (!text) {
        snprintf(message, COMMAND_MESSAGE, "train.log: out of memory");
        return MUONSHARD_ERR_MEMORY;
    }
    bool ok = fprintf(report->log, "%s\n", text) > 0 && !fflush(report->log);
    free(text);
    if (ok)
        return MUONSHARD_OK;
    snprintf(message, COMMAND_MESSAGE, "train.log: %s: %s", report->settings->log, strerror(errno));
    return MUONSHARD_ERR_IO;
}

muonshard_status train_report_run(train_report *report, const muonshard_config *config, int ranks,
                                  size_t parameters, size_t text_bytes, char *message) {
    if (!report)
        return MUONSHARD_OK;
    if (report->settings->progress != TRAIN_PROGRESS_OFF)
        printf("%zu parameters, %.1f MB of text, %d rank%s, %" PRId64 " steps\n", parameters,
               (double)text_bytes / 1e6, ranks, ranks == 1 ? "" : "s", report->settings->steps);
    fflush(stdout);
    if (!report->log)
        return MUONSHARD_OK;
    size_t size = muonshard_config_dump(config, NULL, 0) + 1;
    char *dump = malloc(size);
    if (!dump) {
        snprintf(message, COMMAND_MESSAGE, "train.log: out of memory");
        return MUONSHARD_ERR_MEMORY;
    }
    muonshard_config_dump(config, dump, size);
    int v = muonshard_version();
    char version[32];
    snprintf(version, sizeof version, "%d.%d.%d", v / 10000, v / 100 % 100, v % 100);
    json_t *line = json_pack("{s:{s:s, s:i, s:I, s:I, s:s}}", "run", "version", version, "ranks",
                             ranks, "parameters", (json_int_t)parameters, "text_bytes",
                             (json_int_t)text_bytes, "config", dump);
    free(dump);
    return write_line(report, line, message);
}

static void end_line(train_report *report) {
    if (report->line_open)
        printf("\n");
    report->line_open = false;
    fflush(stdout);
}

void train_report_state(const train_report *report, train_state *state) {
    if (!report)
        return;
    state->best = report->best;
    state->best_step = report->best_step;
    state->skipped = report->skipped;
}

void train_report_continue(train_report *report, const train_state *state) {
    if (!report)
        return;
    report->best = state->best;
    report->best_step = state->best_step;
    report->skipped = state->skipped;
}

void train_report_say(train_report *report, const char *format, ...) {
    if (!report)
        return;
    va_list list;
    end_line(report);
    fprintf(stderr, "muonshard train: ");
    va_start(list, format);
    vfprintf(stderr, format, list);
    va_end(list);
    fprintf(stderr, "\n");
}

muonshard_status train_report_resumed(train_report *report, const muonshard_load_result *from,
                                      char *message) {
    if (!report)
        return MUONSHARD_OK;
    train_report_say(report, "goes on after step %" PRId64 ", from %s of %d rank%s", from->step,
                     from->path, from->world_size, from->world_size == 1 ? "" : "s");
    return report->log
               ? write_line(report,
                            json_pack("{s:I, s:s, s:i}", "resumed_after", (json_int_t)from->step,
                                      "from", from->path, "ranks", from->world_size),
                            message)
               : MUONSHARD_OK;
}

/* JSON has no NaN. */
static json_t *number(double value) {
    return isfinite(value) ? json_real(value) : json_null();
}

static muonshard_status log_step(train_report *report, const train_step_report *s, char *message) {
    json_t *line = json_pack("{s:I, s:o, s:o, s:o, s:b, s:o, s:o}", "step", (json_int_t)s->step,
                             "train_loss", number(s->train_loss), "lr_factor", number(s->lr_factor),
                             "grad_norm", number(s->grad_norm), "skipped", (int)s->skipped,
                             "tokens_per_s", number(s->tokens_per_s), "time_s", number(s->time_s));
    if (line && s->evaluated && json_object_set_new(line, "val_loss", number(s->val_loss))) {
        json_decref(line);
        line = NULL;
    }
    return write_line(report, line, message);
}

static void print_step(train_report *report, const train_step_report *s) {
    int64_t steps = report->settings->steps;
    double left = s->time_s / (double)s->step * (double)(steps - s->step);
    char val[48] = "", skipped[48] = "";
    if (report->val_step)
        snprintf(val, sizeof val, "  val loss %.4f", report->val_loss);
    if (report->skipped)
        snprintf(skipped, sizeof skipped, "  %" PRId64 " skipped", report->skipped);
    printf("%sstep %*" PRId64 "/%" PRId64 "  loss %.4f%s%s  %.0f tokens/s  %d:%02d left%s",
           report->line ? "\r" : "", (int)snprintf(NULL, 0, "%" PRId64, steps), s->step, steps,
           s->train_loss, val, skipped, s->tokens_per_s, (int)(left / 60), (int)left % 60,
           report->line ? "\033[K" : "\n");
    report->line_open = report->line;
    fflush(stdout);
}

muonshard_status train_report_step(train_report *report, const train_step_report *step,
                                   char *message) {
    if (!report)
        return MUONSHARD_OK;
    report->skipped += step->skipped;
    if (step->evaluated) {
        report->val_loss = step->val_loss;
        report->val_step = step->step;
        if (isnan(report->best) || step->val_loss < report->best) {
            report->best = step->val_loss;
            report->best_step = step->step;
        }
    }
    if (report->settings->progress != TRAIN_PROGRESS_OFF && (report->line || step->evaluated))
        print_step(report, step);
    return report->log ? log_step(report, step, message) : MUONSHARD_OK;
}

void train_report_end(train_report *report, const muonshard_stats_info *t) {
    if (!report)
        return;
    end_line(report);
    printf("validation loss: last %.4f, best %.4f at step %" PRId64 "\n", report->val_loss,
           report->best, report->best_step);
    double ms = t->steps ? 1e3 / (double)t->steps : 0.0;
    /* Without the backward pass that runs while gradients travel, which time_step includes. */
    double total = t->time_pack + t->time_reduce_scatter + t->time_agree + t->time_momentum +
                   t->time_orthogonalize + t->time_all_gather + t->time_elementwise + t->time_apply;
    printf("optimizer: %.2f ms a step (pack %.2f, reduce-scatter %.2f, agree %.2f, momentum %.2f, "
           "Newton-Schulz %.2f at %.1f GFLOP/s, all-gather %.2f, element-wise %.2f, apply %.2f); "
           "%" PRId64 " of %" PRId64 " matrices owned, imbalance %.2f, state %.1f MB, "
           "%" PRId64 " of %" PRId64 " steps skipped\n",
           ms * total, ms * t->time_pack, ms * t->time_reduce_scatter, ms * t->time_agree,
           ms * t->time_momentum, ms * t->time_orthogonalize,
           t->time_orthogonalize > 0 ? 1e-9 * t->ns_flops / t->time_orthogonalize : 0.0,
           ms * t->time_all_gather, ms * t->time_elementwise, ms * t->time_apply, t->matrices_owned,
           t->matrices, t->imbalance, (double)t->bytes_state / 1e6, t->skipped, t->steps);
    fflush(stdout);
}

void train_report_close(train_report *report) {
    if (!report)
        return;
    end_line(report);
    if (report->log)
        fclose(report->log);
    free(report);
}
