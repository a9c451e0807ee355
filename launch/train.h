/* train.h - the settings of `muonshard train`, and what it reports: a progress line and a log of
 * JSON lines. */
#ifndef TRAIN_H
#define TRAIN_H

#include "command.h"

enum { TRAIN_SCHEDULE_COSINE, TRAIN_SCHEDULE_LINEAR, TRAIN_SCHEDULE_CONSTANT };
enum { TRAIN_OPTIMIZER_MUON, TRAIN_OPTIMIZER_ADAMW };
enum { TRAIN_PROGRESS_AUTO, TRAIN_PROGRESS_ON, TRAIN_PROGRESS_OFF };

typedef struct train_settings {
    int64_t layers, width, heads, context;
    int tied;
    int math;          /* gpt_cuda_math */
    int params;        /* 0: fp32, 1: bf16 */
    const char *files; /* patterns, each followed by '\n' */
    double val_fraction;
    int64_t steps, batch, micro_batch, seed;
    int schedule;
    int64_t warmup;
    double final_lr;
    int64_t eval_every, eval_windows, max_skipped;
    int optimizer;
    const char *log;
    const char *save;
    int64_t save_every, keep;
    int save_async;
    int progress;
    const char *groups; /* rules, see routing.h */
} train_settings;

extern const muonshard_param train_table[];
extern const size_t train_table_count;

/* NULL, or the key that does not fit the others or the number of ranks, in words. */
const char *train_settings_error(const train_settings *s, int ranks, char *message);
/* What multiplies the learning rates in step 1...steps: warm-up from 1/warmup to 1, then the
 * schedule down to final_lr. */
double train_lr_factor(const train_settings *s, int64_t step);

/* ---- saving and continuing: train_checkpoint.c ---- */

/* The exit code of a run that a signal has stopped, and that was saved. */
enum { TRAIN_STOPPED = 4 };

/* What a checkpoint says of the run beside the optimizer's state. Batches follow from seed, batch,
 * context, text and step. */
typedef struct train_state {
    uint64_t text;
    int64_t seed, batch, context;
    double time_s, best; /* best: validation loss, or NaN */
    int64_t best_step, skipped;
} train_state;

/* As JSON; own. NULL: no memory. */
char *train_state_text(const train_state *s);
/* The other way: what the run would be is in `s`, and is compared; what it was so far goes there.
 * ERR_CONFIG, ERR_FORMAT, with a text in `message` [COMMAND_MESSAGE]. */
muonshard_status train_state_take(const char *text, train_state *s, char *message);
/* From now on SIGTERM and SIGUSR1 don't end the process, but are noted. */
void train_signals_note(void);
/* The one that came, or 0. */
int train_signal(void);

/* ---- report: on rank 0; every function does nothing elsewhere ---- */

typedef struct train_step_report {
    int64_t step;
    double train_loss, val_loss; /* val_loss: NaN when not evaluated */
    bool evaluated;
    double lr_factor, grad_norm;
    bool skipped;
    double tokens_per_s, time_s;
} train_step_report;

typedef struct train_report train_report;

/* Opens the log, and leaves what it says of the first `step` steps. Local. ERR_IO, ERR_MEMORY, with
 * a text in `message` [COMMAND_MESSAGE]. */
muonshard_status train_report_open(train_report **report, const train_settings *s, int rank,
                                   int64_t step, char *message);
/* What it knows of the run so far, out and in. */
void train_report_state(const train_report *report, train_state *state);
void train_report_continue(train_report *report, const train_state *state);
/* {"resumed_after": N, ...}, and a line for people. ERR_IO. */
muonshard_status train_report_resumed(train_report *report, const muonshard_load_result *from,
                                      char *message);
/* A line for people, between others. */
void train_report_say(train_report *report, const char *format, ...)
    __attribute__((format(printf, 2, 3)));
/* The log's first line: {"run": {...}}. ERR_IO. */
muonshard_status train_report_run(train_report *report, const muonshard_config *config, int ranks,
                                  size_t parameters, size_t text_bytes, char *message);
/* A line of the log and the progress line. ERR_IO. */
muonshard_status train_report_step(train_report *report, const train_step_report *step,
                                   char *message);
/* After the last step: the losses, and where the time went. */
void train_report_end(train_report *report, const muonshard_stats_info *stats);
/* NULL is allowed. */
void train_report_close(train_report *report);

#endif
