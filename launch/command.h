/* command.h - what the subcommands of `muonshard` share: arguments, MPI and its communicator, the
 * config with its overrides, errors told once, exit codes. Sees only the public headers.
 *
 *   int command_NAME(int argc, char **argv)              argv[0] is the subcommand's name
 *   {
 *       if (command_wants_help(argc, argv))
 *           return command_help(&usage, argc, argv, table, count);
 *       command cmd;
 *       command_args args = {0};
 *       muonshard_status status = command_start(&cmd, &usage, &args, argc, argv);
 *       if (status == MUONSHARD_OK)
 *           status = command_configure(&cmd, args.positional[0], &args, table, count, &values);
 *       ...
 *       return command_finish(&cmd, &args, status);
 *   }
 *
 * Every status that leaves one of these functions has been told to the user already, once, by rank
 * 0, and is the same on all ranks. */
#ifndef COMMAND_H
#define COMMAND_H

#include <stdbool.h>
#include <stddef.h>
#include "muonshard.h"

/* The subcommands: argv[0] is the name; the value is the exit code. */
int command_train(int argc, char **argv);
int command_replay(int argc, char **argv);
int command_plan(int argc, char **argv);
int command_bench(int argc, char **argv);
int command_report(int argc, char **argv);
int command_check(int argc, char **argv);
int command_info(int argc, char **argv);

/* ---- arguments ---- */

typedef enum command_option_kind {
    COMMAND_FLAG,  /* --name */
    COMMAND_VALUE, /* --name VALUE or --name=VALUE; at most once */
    COMMAND_VALUES /* --name V1 [V2...], up to the next option or key=value; may be repeated */
} command_option_kind;

typedef struct command_option {
    const char *name; /* "--grads" */
    command_option_kind kind;
    bool required;
    const char *placeholder; /* "FILE"; not used by a flag */
    const char *doc;
} command_option;

typedef struct command_usage {
    const char *name;     /* "replay" */
    const char *synopsis; /* "CONFIG --params IN --grads G1 [G2...] --out OUT [key=value...]" */
    const char *doc;      /* a sentence or some lines */
    int positional_min, positional_max;
    bool overrides; /* key=value is allowed */
    const command_option *options;
    size_t option_count;
} command_usage;

typedef struct command_given {
    const char **values; /* borrowed from argv; NULL-terminated */
    size_t count;        /* a flag: 1 when given */
} command_given;

typedef struct command_args {
    const char **positional; /* in order */
    size_t positional_count;
    const char **overrides; /* "key=value", in order */
    size_t override_count;
    command_given *options; /* [usage.option_count], same order as usage.options */
    const char **storage;   /* what the arrays above point into */
} command_args;

#define COMMAND_MESSAGE 1024

/* Sorts argv[1...] into `args`. "KEY=VALUE" with KEY of [a-z0-9_.] is an override; "--" ends the
 * options. Local. ERR_ARGUMENT with a text in `message` [COMMAND_MESSAGE]: unknown, repeated or
 * missing; ERR_MEMORY. */
muonshard_status command_parse(const command_usage *usage, int argc, char **argv,
                               command_args *args, char *message);
/* The values given for an option by name ("--out"); count 0 when it was not given. */
command_given command_option_given(const command_usage *usage, const command_args *args,
                                   const char *name);
/* The option's only value, or NULL. */
const char *command_option_value(const command_usage *usage, const command_args *args,
                                 const char *name);
void command_args_free(command_args *args);

/* "--help", "-h" or "--help=markdown" is among the arguments. */
bool command_wants_help(int argc, char **argv);
/* Writes usage, options, and (if usage.overrides) the keys: the program's table, which may be NULL,
 * and the library's. Needs no MPI. Returns the exit code. */
int command_help(const command_usage *usage, int argc, char **argv, const muonshard_param *table,
                 size_t count);

/* ---- ranks, config, errors ---- */

typedef struct command {
    const command_usage *usage;
    int rank, size;
    bool mpi;                     /* started here */
    muonshard_log_level log_from; /* what the library says below it is left out */
    muonshard_comm *comm;         /* own; NULL before start */
    muonshard_config *config;     /* own; NULL before configure */
} command;

/* BLAS threads (MUONSHARD_THREADS, else 1), MPI_Init, a communicator over all ranks whose deadline
 * (MUONSHARD_START_TIMEOUT, then the config's) ends the job (muonshard_mpi_abort), and the parsed
 * arguments. Output has a deadline from here on. Collective. On failure call
 * command_finish all the same. */
muonshard_status command_start(command *cmd, const command_usage *usage, command_args *args,
                               int argc, char **argv);
/* cmd->config: the library's table and the program's (may be NULL), the file `path` (NULL: none),
 * the overrides. Rank 0 reads; every rank gets its values. `values` is borrowed until
 * command_finish. Collective. */
muonshard_status command_configure(command *cmd, const char *path, const command_args *args,
                                   const muonshard_param *table, size_t count, void *values);
/* What this rank does from now on, for the line that names it where others wait for it. Local. */
void command_enter(command *cmd, const char *phase);
/* For commands whose tensors are in the host's memory: `backend: auto` is host. Local. */
muonshard_status command_on_host(command *cmd);
/* A local outcome becomes everybody's: returns the lowest failing rank's status after rank 0 has
 * told its message. `message` may be NULL when the status is OK. Collective. */
muonshard_status command_agree(command *cmd, muonshard_status status, const char *message);
/* For an error that all ranks have alike, as the collective calls of muonshard.h return: rank 0
 * tells the message
 * ("muonshard NAME: ..." on stderr) when the status is not OK. Returns `status`. Local. */
muonshard_status command_told(const command *cmd, muonshard_status status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
/* Meets the other ranks, frees all, finalises MPI. Returns muonshard_mpi_exit_code(status).
 * Collective. */
int command_finish(command *cmd, command_args *args, muonshard_status status);

/* Seconds of a monotonic clock. */
double command_now_s(void);

#endif
