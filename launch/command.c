#include "command.h"

#include <cblas.h>
#include <errno.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "deadline.h"
#include "fault.h"
#include "muonshard_mpi.h"

/* ---- arguments ---- */

static bool is_override(const char *arg) {
    size_t key = strspn(arg, "abcdefghijklmnopqrstuvwxyz0123456789_.");
    return key > 0 && arg[key] == '=';
}

static size_t find_option(const command_usage *usage, const char *name, size_t length) {
    for (size_t i = 0; i < usage->option_count; i++)
        if (strlen(usage->options[i].name) == length &&
            !memcmp(usage->options[i].name, name, length))
            return i;
    return SIZE_MAX;
}

/* argv[*i] is an option; takes its values too. */
static muonshard_status parse_option(const command_usage *usage, int argc, char **argv, int *i,
                                     command_args *args, char *message) {
    const char *arg = argv[*i], *equals = strchr(arg, '=');
    size_t length = equals ? (size_t)(equals - arg) : strlen(arg);
    size_t id = find_option(usage, arg, length);
    if (id == SIZE_MAX) {
        snprintf(message, COMMAND_MESSAGE, "unknown option %.*s; see muonshard %s --help",
                 (int)length, arg, usage->name);
        return MUONSHARD_ERR_ARGUMENT;
    }
    const command_option *option = &usage->options[id];
    command_given *given = &args->options[id];
    size_t before = given->count;
    if (option->kind != COMMAND_VALUES && before) {
        snprintf(message, COMMAND_MESSAGE, "%s is given twice", option->name);
        return MUONSHARD_ERR_ARGUMENT;
    }
    if (option->kind == COMMAND_FLAG) {
        if (equals) {
            snprintf(message, COMMAND_MESSAGE, "%s takes no value", option->name);
            return MUONSHARD_ERR_ARGUMENT;
        }
        given->count = 1;
        return MUONSHARD_OK;
    }
    if (equals) {
        given->values[given->count++] = equals + 1;
        return MUONSHARD_OK;
    }
    bool many = option->kind == COMMAND_VALUES;
    while (*i + 1 < argc && (many || given->count == before)) {
        const char *next = argv[*i + 1];
        if (!strncmp(next, "--", 2) || (many && usage->overrides && is_override(next)))
            break;
        given->values[given->count++] = next;
        (*i)++;
    }
    if (given->count == before) {
        snprintf(message, COMMAND_MESSAGE, "%s needs %s", option->name, option->placeholder);
        return MUONSHARD_ERR_ARGUMENT;
    }
    return MUONSHARD_OK;
}

static muonshard_status check_args(const command_usage *usage, const command_args *args,
                                   char *message) {
    size_t min = (size_t)usage->positional_min, max = (size_t)usage->positional_max;
    if (args->positional_count < min || args->positional_count > max) {
        const char *extra = args->positional_count > max ? args->positional[max] : NULL;
        if (extra)
            snprintf(message, COMMAND_MESSAGE, "unexpected argument %s; usage: muonshard %s %s",
                     extra, usage->name, usage->synopsis);
        else
            snprintf(message, COMMAND_MESSAGE, "too few arguments; usage: muonshard %s %s",
                     usage->name, usage->synopsis);
        return MUONSHARD_ERR_ARGUMENT;
    }
    for (size_t i = 0; i < usage->option_count; i++) {
        if (usage->options[i].required && !args->options[i].count) {
            snprintf(message, COMMAND_MESSAGE, "%s is missing; usage: muonshard %s %s",
                     usage->options[i].name, usage->name, usage->synopsis);
            return MUONSHARD_ERR_ARGUMENT;
        }
    }
    return MUONSHARD_OK;
}

muonshard_status command_parse(const command_usage *usage, int argc, char **argv,
                               command_args *args, char *message) {
    size_t room = (size_t)argc + 1;
    *args = (command_args){0};
    args->storage = calloc((2 + usage->option_count) * room, sizeof *args->storage);
    args->options = calloc(usage->option_count + 1, sizeof *args->options);
    if (!args->storage || !args->options) {
        snprintf(message, COMMAND_MESSAGE, "out of memory");
        return MUONSHARD_ERR_MEMORY;
    }
    args->positional = args->storage;
    args->overrides = args->storage + room;
    for (size_t i = 0; i < usage->option_count; i++)
        args->options[i].values = args->storage + (2 + i) * room;
    bool options_end = false;
    for (int i = 1; i < argc; i++) {
        if (!options_end && !strcmp(argv[i], "--")) {
            options_end = true;
        } else if (!options_end && argv[i][0] == '-' && argv[i][1]) {
            muonshard_status status = parse_option(usage, argc, argv, &i, args, message);
            if (status != MUONSHARD_OK)
                return status;
        } else if (usage->overrides && is_override(argv[i])) {
            args->overrides[args->override_count++] = argv[i];
        } else {
            args->positional[args->positional_count++] = argv[i];
        }
    }
    return check_args(usage, args, message);
}

command_given command_option_given(const command_usage *usage, const command_args *args,
                                   const char *name) {
    size_t id = find_option(usage, name, strlen(name));
    if (id == SIZE_MAX || !args->options)
        return (command_given){0};
    return args->options[id];
}

const char *command_option_value(const command_usage *usage, const command_args *args,
                                 const char *name) {
    command_given given = command_option_given(usage, args, name);
    return given.count && given.values ? given.values[0] : NULL;
}

void command_args_free(command_args *args) {
    free(args->storage);
    free(args->options);
    *args = (command_args){0};
}

#define HELP_MARKDOWN "--help=markdown"

static bool is_given(int argc, char **argv, const char *word) {
    for (int i = 1; i < argc && strcmp(argv[i], "--"); i++)
        if (!strcmp(argv[i], word))
            return true;
    return false;
}

bool command_wants_help(int argc, char **argv) {
    return is_given(argc, argv, "--help") || is_given(argc, argv, "-h") ||
           is_given(argc, argv, HELP_MARKDOWN);
}

static muonshard_status print_keys(const muonshard_param *table, size_t count,
                                   muonshard_text_format format) {
    muonshard_config *config = NULL;
    char *text = NULL;
    /* The table's values land here; none is larger than 16 bytes. */
    size_t bytes = 16;
    for (size_t i = 0; i < count; i++)
        bytes = table[i].offset + 16 > bytes ? table[i].offset + 16 : bytes;
    void *values = calloc(1, bytes);
    muonshard_status status = values ? muonshard_config_create(&config) : MUONSHARD_ERR_MEMORY;
    if (status == MUONSHARD_OK && table)
        status = muonshard_config_add_table(config, table, count, values);
    if (status == MUONSHARD_OK) {
        size_t size = muonshard_config_help(config, format, NULL, 0) + 1;
        text = malloc(size);
        if (text) {
            muonshard_config_help(config, format, text, size);
            printf("\nKeys of the config, or key=value:\n%s%s",
                   format == MUONSHARD_TEXT_MARKDOWN ? "\n" : "", text);
        } else {
            status = MUONSHARD_ERR_MEMORY;
        }
    }
    if (status != MUONSHARD_OK)
        fprintf(stderr, "muonshard: %s\n",
                config ? muonshard_config_last_error(config) : muonshard_status_string(status));
    free(text);
    muonshard_config_destroy(config);
    free(values);
    return status;
}

int command_help(const command_usage *usage, int argc, char **argv, const muonshard_param *table,
                 size_t count) {
    const bool markdown = is_given(argc, argv, HELP_MARKDOWN);
    if (markdown)
        printf("# muonshard %s\n\n    muonshard %s %s\n\n%s\n", usage->name, usage->name,
               usage->synopsis, usage->doc);
    else
        printf("usage: muonshard %s %s\n\n%s\n", usage->name, usage->synopsis, usage->doc);
    if (usage->option_count)
        printf("\nOptions:\n");
    for (size_t i = 0; i < usage->option_count; i++) {
        const command_option *option = &usage->options[i];
        char left[64];
        snprintf(left, sizeof left, "%s%s%s%s", option->name,
                 option->kind == COMMAND_FLAG ? "" : " ",
                 option->kind == COMMAND_FLAG ? "" : option->placeholder,
                 option->kind == COMMAND_VALUES ? "..." : "");
        printf("  %-28s %s%s\n", left, option->doc, option->required ? " (required)" : "");
    }
    muonshard_status status = MUONSHARD_OK;
    if (usage->overrides)
        status =
            print_keys(table, count, markdown ? MUONSHARD_TEXT_MARKDOWN : MUONSHARD_TEXT_PLAIN);
    return fflush(stdout) ? muonshard_mpi_exit_code(MUONSHARD_ERR_IO)
                          : muonshard_mpi_exit_code(status);
}

/* ---- ranks, config, errors ---- */

double command_now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void log_line(void *user, muonshard_log_level level, const char *message) {
    const command *cmd = user;
    const char *kind = level == MUONSHARD_LOG_ERROR     ? "error: "
                       : level == MUONSHARD_LOG_WARNING ? "warning: "
                                                        : "";
    if (cmd->rank == 0 && level >= cmd->log_from)
        fprintf(stderr, "muonshard: %s%s\n", kind, message);
}

/* One thread a rank by default, so that ranks on one machine do not fight for its cores. */
static muonshard_status set_threads(char *message) {
    const char *text = getenv("MUONSHARD_THREADS");
    long threads = 1;
    if (text) {
        char *end;
        errno = 0;
        threads = strtol(text, &end, 10);
        if (errno || end == text || *end || threads < 1 || threads > INT_MAX) {
            snprintf(message, COMMAND_MESSAGE, "MUONSHARD_THREADS is \"%s\", not a number above 0",
                     text);
            return MUONSHARD_ERR_ARGUMENT;
        }
    }
    openblas_set_num_threads((int)threads);
    return MUONSHARD_OK;
}

static bool start_mpi(command *cmd) {
    deadline_begin("start MPI");
    fault_point("start MPI");
    cmd->mpi = MPI_Init(NULL, NULL) == MPI_SUCCESS;
    deadline_end();
    if (!cmd->mpi)
        return false;
    MPI_Comm_rank(MPI_COMM_WORLD, &cmd->rank);
    MPI_Comm_size(MPI_COMM_WORLD, &cmd->size);
    deadline_set_rank(cmd->rank, cmd->size);
    deadline_guard_output();
    return true;
}

void command_enter(command *cmd, const char *phase) {
    muonshard_comm_set_phase(cmd->comm, phase);
    fault_point(phase);
}

muonshard_status command_start(command *cmd, const command_usage *usage, command_args *args,
                               int argc, char **argv) {
    char message[COMMAND_MESSAGE] = "";
    *cmd = (command){.usage = usage, .size = 1};
    const char *bad_deadline = deadline_open();
    if (!start_mpi(cmd))
        return command_told(cmd, MUONSHARD_ERR_COMM, "MPI could not be started");
    muonshard_comm_options options = MUONSHARD_COMM_OPTIONS_INIT;
    options.timeout_s = deadline_seconds();
    options.log = log_line;
    options.log_user = cmd;
    options.on_fatal = muonshard_mpi_abort;
    muonshard_status status = muonshard_comm_create_mpi(MPI_COMM_WORLD, &options, &cmd->comm);
    if (status != MUONSHARD_OK)
        return command_told(cmd, status, "no communicator: %s", muonshard_status_string(status));
    status = command_parse(usage, argc, argv, args, message);
    if (status == MUONSHARD_OK)
        status = set_threads(message);
    if (status == MUONSHARD_OK && bad_deadline) {
        snprintf(message, sizeof message, "%s", bad_deadline);
        status = MUONSHARD_ERR_ARGUMENT;
    }
    return command_agree(cmd, status, message);
}

static muonshard_status load(command *cmd, const char *path, const command_args *args,
                             char *message) {
    muonshard_status status = MUONSHARD_OK;
    if (path)
        status = muonshard_config_load_file(cmd->config, path);
    for (size_t i = 0; i < args->override_count && status == MUONSHARD_OK; i++) {
        const char *text = args->overrides[i], *equals = strchr(text, '=');
        char *key = strndup(text, (size_t)(equals - text));
        if (!key) {
            snprintf(message, COMMAND_MESSAGE, "out of memory");
            return MUONSHARD_ERR_MEMORY;
        }
        status = muonshard_config_set(cmd->config, key, equals + 1);
        free(key);
    }
    if (status != MUONSHARD_OK)
        snprintf(message, COMMAND_MESSAGE, "%s", muonshard_config_last_error(cmd->config));
    return status;
}

/* What the command waits for between steps waits no longer than a step does. */
static muonshard_status set_deadline(command *cmd) {
    char text[64];
    const muonshard_status status =
        muonshard_config_get(cmd->config, "timeout", text, sizeof text, NULL);
    if (status != MUONSHARD_OK)
        return status;
    deadline_set(strtod(text, NULL));
    return muonshard_comm_set_timeout(cmd->comm, deadline_seconds());
}

muonshard_status command_configure(command *cmd, const char *path, const command_args *args,
                                   const muonshard_param *table, size_t count, void *values) {
    char message[COMMAND_MESSAGE] = "";
    command_enter(cmd, "configure");
    muonshard_status status = muonshard_config_create(&cmd->config);
    if (status != MUONSHARD_OK)
        snprintf(message, sizeof message, "config: %s", muonshard_status_string(status));
    if (status == MUONSHARD_OK && table) {
        status = muonshard_config_add_table(cmd->config, table, count, values);
        if (status != MUONSHARD_OK)
            snprintf(message, sizeof message, "%s", muonshard_config_last_error(cmd->config));
    }
    if (status == MUONSHARD_OK && cmd->rank == 0)
        status = load(cmd, path, args, message);
    status = command_agree(cmd, status, message);
    if (status != MUONSHARD_OK)
        return status;
    status = muonshard_config_broadcast(cmd->config, cmd->comm);
    if (status == MUONSHARD_OK)
        status = set_deadline(cmd);
    return command_told(cmd, status, "%s", muonshard_config_last_error(cmd->config));
}

muonshard_status command_on_host(command *cmd) {
    char backend[16] = "";
    muonshard_status status =
        muonshard_config_get(cmd->config, "backend", backend, sizeof backend, NULL);
    if (status == MUONSHARD_OK && strcmp(backend, "auto") == 0)
        status = muonshard_config_set(cmd->config, "backend", "host");
    return command_told(cmd, status, "%s", muonshard_config_last_error(cmd->config));
}

muonshard_status command_agree(command *cmd, muonshard_status status, const char *message) {
    status = muonshard_comm_agree(cmd->comm, status, message);
    return command_told(cmd, status, "%s", muonshard_comm_last_error(cmd->comm));
}

muonshard_status command_told(const command *cmd, muonshard_status status, const char *format,
                              ...) {
    if (status == MUONSHARD_OK || cmd->rank != 0)
        return status;
    char text[2 * COMMAND_MESSAGE];
    va_list list;
    va_start(list, format);
    vsnprintf(text, sizeof text, format, list);
    va_end(list);
    fflush(stdout);
    fprintf(stderr, "muonshard %s: %s\n", cmd->usage->name, text);
    return status;
}

int command_finish(command *cmd, command_args *args, muonshard_status status) {
    /* Where all meet, who doesn't come can be named; in MPI_Finalize it could not. */
    if (cmd->comm) {
        command_enter(cmd, "finish");
        muonshard_comm_agree(cmd->comm, MUONSHARD_OK, NULL);
    }
    muonshard_config_destroy(cmd->config);
    muonshard_comm_destroy(cmd->comm);
    command_args_free(args);
    if (cmd->mpi) {
        deadline_begin("end MPI");
        fault_point("end MPI");
        MPI_Finalize();
        deadline_end();
    }
    cmd->config = NULL;
    cmd->comm = NULL;
    cmd->mpi = false;
    return muonshard_mpi_exit_code(status);
}
