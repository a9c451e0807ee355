#include "train.h"

#include <errno.h>
#include <inttypes.h>
#include <jansson.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- signals ---- */

static volatile sig_atomic_t arrived;

static void note_signal(int number) {
    arrived = number;
}

void train_signals_note(void) {
    const struct sigaction action = {.sa_handler = note_signal, .sa_flags = SA_RESTART};
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGUSR1, &action, NULL);
}

int train_signal(void) {
    return arrived;
}

/* ---- what a checkpoint says of the run ---- */

static json_t *hex(uint64_t number) {
    char text[17];
    snprintf(text, sizeof text, "%016" PRIx64, number);
    return json_string(text);
}

char *train_state_text(const train_state *s) {
    json_t *best = isfinite(s->best) ? json_real(s->best) : json_null();
    json_t *json =
        json_pack("{s:{s:o, s:I, s:I, s:I}, s:{s:o, s:I, s:I, s:f}}", "train", "text", hex(s->text),
                  "seed", (json_int_t)s->seed, "batch", (json_int_t)s->batch, "context",
                  (json_int_t)s->context, "so_far", "best", best, "best_step",
                  (json_int_t)s->best_step, "skipped", (json_int_t)s->skipped, "time_s", s->time_s);
    char *text = json ? json_dumps(json, JSON_COMPACT) : NULL;
    json_decref(json);
    return text;
}

static muonshard_status compare(const char *key, int64_t there, int64_t here, char *message) {
    if (there == here)
        return MUONSHARD_OK;
    snprintf(message, COMMAND_MESSAGE,
             "%s is %" PRId64 "; the checkpoint's is %" PRId64 ", and its text would not go on",
             key, here, there);
    return MUONSHARD_ERR_CONFIG;
}

muonshard_status train_state_take(const char *text, train_state *s, char *message) {
    json_error_t where;
    const char *hash;
    json_int_t seed, batch, context, best_step, skipped;
    json_t *best, *json = json_loads(text, JSON_REJECT_DUPLICATES, &where);
    if (!json || json_unpack(json, "{s:{s:s, s:I, s:I, s:I}, s:{s:o, s:I, s:I, s:F}}", "train",
                             "text", &hash, "seed", &seed, "batch", &batch, "context", &context,
                             "so_far", "best", &best, "best_step", &best_step, "skipped", &skipped,
                             "time_s", &s->time_s) != 0) {
        json_decref(json);
        snprintf(message, COMMAND_MESSAGE, "the checkpoint is of another program than train");
        return MUONSHARD_ERR_FORMAT;
    }
    char own[17];
    snprintf(own, sizeof own, "%016" PRIx64, s->text);
    muonshard_status status = compare("train.seed", seed, s->seed, message);
    if (status == MUONSHARD_OK)
        status = compare("train.batch", batch, s->batch, message);
    if (status == MUONSHARD_OK)
        status = compare("model.context", context, s->context, message);
    if (status == MUONSHARD_OK && strcmp(own, hash) != 0) {
        snprintf(message, COMMAND_MESSAGE,
                 "data.files: other text than that of the checkpoint, which could not go on");
        status = MUONSHARD_ERR_CONFIG;
    }
    s->best = json_is_real(best) ? json_real_value(best) : NAN;
    s->best_step = best_step;
    s->skipped = skipped;
    json_decref(json);
    return status;
}
