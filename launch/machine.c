#include "machine.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "command.h"
#include "config.h"
#include "message.h"

#define KEY(name, type, field, initial, min, max, choices, doc)                                    \
    { name, MUONSHARD_PARAM_##type, offsetof(machine, field), initial, min, max, choices, doc }
#define PASS(name, pass_, doc)                                                                     \
    {                                                                                              \
        "passes." name, MUONSHARD_PARAM_REAL, offsetof(machine, pass) + (pass_) * sizeof(double),  \
            "1000", 1e-3, 1e6, NULL, doc                                                           \
    }

static const muonshard_param table[] = {
    KEY("machine", TEXT, name, "machine", 0, 0, NULL, "Name of the machine."),
    KEY("source", TEXT, source, "", 0, 0, NULL, "Where the numbers are from."),
    KEY("origin", CHOICE, measured, "datasheet", 0, 0, "datasheet|measured",
        "Whether they were measured on it."),
    KEY("runs_on", CHOICE, on_gpu, "host", 0, 0, "host|cuda", "Which backend computes."),
    KEY("collectives", CHOICE, ring, "exchange", 0, 0, "exchange|ring",
        "exchange: from every rank to every other (MPI); ring: NCCL."),
    KEY("moved_by", CHOICE, by_rank, "network", 0, 0, "network|rank",
        "rank: its own thread moves the bytes (shared memory) and does nothing else meanwhile."),
    KEY("memory_gb", REAL, memory, "auto", 1e-3, 1e9, NULL, "Memory a rank, GB (1e9 bytes)."),
    KEY("launch_us", REAL, launch, "1", 0, 1e6, NULL,
        "Microseconds an operation takes beside its work."),
    PASS("copy", PASS_COPY, "GB/s of copies, read and written."),
    PASS("sum", PASS_SUM, "GB/s of sums over ranks."),
    PASS("measure", PASS_MEASURE, "GB/s of sums of squares."),
    PASS("momentum", PASS_MOMENTUM, "GB/s of momentum."),
    PASS("apply", PASS_APPLY, "GB/s of applying updates."),
    PASS("adam", PASS_ADAM, "GB/s of AdamW."),
    KEY("newton_schulz", LIST, rate_lines, "", 0, 0, NULL,
        "Rates: dtype, gflop (of a launch: a batch on a GPU, a matrix on the host), tflops."),
    KEY("links", LIST, link_lines, "", 0, 0, NULL,
        "Levels, from the inside out: name, ranks (that it joins), gbs (a rank, each way), us (a "
        "message)."),
};

/* ---- reading ---- */

static muonshard_status at_line(const char *path, const char *key, size_t index, const char *what,
                                char *message) {
    return message_fail(message, MUONSHARD_ERR_CONFIG, "%s:%zu: %s: %s", path,
                        config_item_line(path, key, index), key, what);
}

/* The value of `key` in "key=value key=value"; NULL: it isn't there. Ends at a space. */
static const char *value_of(const char *item, const char *key) {
    const size_t length = strlen(key);
    for (const char *c = item; c; c = strchr(c, ' ')) {
        c += *c == ' ';
        if (strncmp(c, key, length) == 0 && c[length] == '=')
            return c + length + 1;
    }
    return NULL;
}

static bool number_of(const char *item, const char *key, double least, double *number) {
    const char *text = value_of(item, key);
    char *end = NULL;
    *number = text ? strtod(text, &end) : NAN;
    return text && end != text && (!*end || *end == ' ') && *number >= least && *number < 1e15;
}

/* Words other than these are refused. */
static bool only(const char *item, const char *const *keys, char *unknown, size_t size) {
    for (const char *c = item; c && *c; c = strchr(c, ' ')) {
        c += *c == ' ';
        const size_t length = strcspn(c, "=");
        bool known = false;
        for (size_t i = 0; keys[i]; i++)
            known = known || (strlen(keys[i]) == length && strncmp(keys[i], c, length) == 0);
        if (!known) {
            snprintf(unknown, size, "unknown word '%.*s'", (int)(length < 40 ? length : 40), c);
            return false;
        }
    }
    return true;
}

static const char *read_rate(const char *item, machine_rate *rate, char *text, size_t size) {
    static const char *const keys[] = {"dtype", "gflop", "tflops", NULL};
    static const char *const dtypes[] = {"fp32", "tf32", "bf16", "fp16"};
    const char *dtype = value_of(item, "dtype");
    double gflop, tflops;
    if (!only(item, keys, text, size))
        return text;
    rate->dtype = -1;
    for (int i = 0; dtype && i < 4; i++)
        if (strncmp(dtype, dtypes[i], 4) == 0 && (!dtype[4] || dtype[4] == ' '))
            rate->dtype = i;
    if (rate->dtype < 0)
        return "dtype has to be fp32, tf32, bf16 or fp16";
    if (!number_of(item, "gflop", 1e-9, &gflop) || !number_of(item, "tflops", 1e-9, &tflops))
        return "gflop and tflops have to be numbers above 0";
    rate->flops = 1e9 * gflop;
    rate->rate = 1e12 * tflops;
    return NULL;
}

static const char *read_link(const char *item, const machine_link *before, machine_link *link,
                             char *text, size_t size) {
    static const char *const keys[] = {"name", "ranks", "gbs", "us", NULL};
    const char *name = value_of(item, "name");
    double gbs, us;
    if (!only(item, keys, text, size))
        return text;
    if (!name || !*name || *name == ' ')
        return "a link needs a name";
    snprintf(link->name, sizeof link->name, "%.*s", (int)strcspn(name, " "), name);
    if (!number_of(item, "ranks", 2.0, &link->ranks) || link->ranks != floor(link->ranks))
        return "ranks has to be a whole number from 2";
    if (before && (link->ranks <= before->ranks || fmod(link->ranks, before->ranks) != 0.0))
        return "ranks has to be a multiple of the link's before";
    if (!number_of(item, "gbs", 1e-9, &gbs))
        return "gbs has to be a number above 0";
    if (!number_of(item, "us", 0.0, &us))
        return "us has to be a number from 0";
    link->bandwidth = 1e9 * gbs;
    link->latency = 1e-6 * us;
    return NULL;
}

/* Calls `read` for each item of a list. */
static muonshard_status read_items(machine *m, const char *path, const char *key, const char *lines,
                                   char *message) {
    size_t index = 0;
    for (const char *line = lines; *line; line = strchr(line, '\n') + 1, index++) {
        char item[512], text[64];
        snprintf(item, sizeof item, "%.*s", (int)strcspn(line, "\n"), line);
        const char *wrong = NULL;
        if (lines == m->rate_lines) {
            wrong = read_rate(item, &m->rates[m->rate_count++], text, sizeof text);
        } else if (m->link_count == MACHINE_LINKS) {
            wrong = "there are more than 8 links";
        } else {
            const size_t k = m->link_count++;
            wrong = read_link(item, k ? &m->links[k - 1] : NULL, &m->links[k], text, sizeof text);
        }
        if (wrong)
            return at_line(path, key, index, wrong, message);
    }
    return MUONSHARD_OK;
}

static int by_dtype_and_size(const void *left, const void *right) {
    const machine_rate *a = left, *b = right;
    return a->dtype != b->dtype ? a->dtype - b->dtype
                                : (a->flops > b->flops) - (a->flops < b->flops);
}

/* The library's own keys live in every config; here none has a meaning. */
static muonshard_status only_a_machine(const machine *m, const char *path, char *message) {
    muonshard_config *plain;
    muonshard_status status = muonshard_config_create(&plain);
    for (size_t i = 0; status == MUONSHARD_OK && i < settings_table_count; i++) {
        char given[256], usual[256];
        const char *key = settings_table[i].name;
        muonshard_config_get(m->config, key, given, sizeof given, NULL);
        muonshard_config_get(plain, key, usual, sizeof usual, NULL);
        if (strcmp(given, usual) != 0)
            status =
                message_fail(message, MUONSHARD_ERR_CONFIG,
                             "%s: '%s' is a setting of the optimizer, not of a machine", path, key);
    }
    muonshard_config_destroy(plain);
    return status;
}

static muonshard_status load(machine *m, const char *path, char *message) {
    muonshard_status status = muonshard_config_create(&m->config);
    if (status)
        return message_fail(message, status, "out of memory");
    status = muonshard_config_add_table(m->config, table, sizeof table / sizeof *table, m);
    if (status == MUONSHARD_OK)
        status = muonshard_config_load_file(m->config, path);
    if (status)
        return message_fail(message, status, "%s", muonshard_config_last_error(m->config));
    status = only_a_machine(m, path, message);
    if (status)
        return status;
    size_t lines = 1;
    for (const char *c = m->rate_lines; *c; c++)
        lines += *c == '\n';
    m->rates = calloc(lines, sizeof *m->rates);
    if (!m->rates)
        return message_fail(message, MUONSHARD_ERR_MEMORY, "out of memory");
    status = read_items(m, path, "newton_schulz", m->rate_lines, message);
    if (status == MUONSHARD_OK)
        status = read_items(m, path, "links", m->link_lines, message);
    if (status == MUONSHARD_OK && !m->rate_count)
        status =
            message_fail(message, MUONSHARD_ERR_CONFIG, "%s: newton_schulz has no rates", path);
    if (status == MUONSHARD_OK)
        qsort(m->rates, m->rate_count, sizeof *m->rates, by_dtype_and_size);
    return status;
}

muonshard_status machine_load(machine *m, const char *path, char *message) {
    *m = (machine){.config = NULL};
    const muonshard_status status = load(m, path, message);
    if (status)
        machine_free(m);
    return status;
}

void machine_free(machine *m) {
    free(m->rates);
    muonshard_config_destroy(m->config);
    *m = (machine){.config = NULL};
}

/* ---- computation ---- */

double machine_newton_schulz(const machine *m, int dtype, double flops, double count) {
    const double launch = m->on_gpu ? flops * count : flops;
    const machine_rate *below = NULL, *above = NULL;
    if (!(flops > 0.0) || !(count > 0.0))
        return 0.0;
    for (size_t i = 0; i < m->rate_count; i++) {
        const machine_rate *r = &m->rates[i];
        if (r->dtype != dtype)
            continue;
        if (r->flops <= launch)
            below = r;
        else if (!above)
            above = r;
    }
    if (!above)
        return below ? flops * count / below->rate : NAN;
    double rate = above->rate;
    if (below) {
        const double t = log(launch / below->flops) / log(above->flops / below->flops);
        rate = exp((1.0 - t) * log(below->rate) + t * log(above->rate));
    } else if (m->on_gpu) {
        /* What is too small to fill the card takes as long as what just does. */
        rate *= launch / above->flops;
    }
    return flops * count / rate;
}

double machine_pass_seconds(const machine *m, machine_pass pass, double bytes) {
    return 1e-6 * m->launch + 1e-9 * bytes / m->pass[pass];
}

/* ---- links ---- */

/* Ranks of the group that are together within level `link`; 1 below the first. */
static double together(const machine *m, size_t link, double ranks, double stride) {
    const double k = floor(m->links[link].ranks / stride);
    return k < 1.0 ? 1.0 : k > ranks ? ranks : k;
}

machine_transfer machine_collective(const machine *m, int ring, double ranks, double stride,
                                    double filled, double slot, double *bytes) {
    machine_transfer t = {0.0, 0.0, 0};
    double below = 1.0;
    for (size_t i = 0; i < m->link_count && below < ranks; i++) {
        const machine_link *link = &m->links[i];
        const double within = together(m, i, ranks, stride);
        if (within <= below)
            continue;
        /* A ring has so many edges of this level, and each passes all pieces but one. */
        const double edges = ranks / below - (within < ranks ? ranks / within : 1.0);
        const double peers = within - below;
        const double sent = ring ? filled * slot * (ranks - 1.0) / ranks / below : peers * slot;
        const double seconds = sent / link->bandwidth;
        t.latency += (ring ? edges : peers) * link->latency;
        if (seconds > t.bandwidth)
            t.slowest = i;
        t.bandwidth = m->by_rank ? t.bandwidth + seconds : fmax(t.bandwidth, seconds);
        if (bytes)
            bytes[i] += sent;
        below = within;
    }
    return t;
}
