/* The muonshard command: a table of subcommands. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "command.h"
#include "muonshard_mpi.h"

#define EXIT_USAGE 2

typedef struct subcommand {
    const char *name;
    int (*run)(int argc, char **argv); /* argv[0] is the name; returns the exit code */
    const char *summary;
} subcommand;

static const subcommand subcommands[] = {
    {"train", command_train, "train a GPT on text files"},
    {"replay", command_replay, "run recorded gradients through the optimizer"},
    {"plan", command_plan, "show who owns what, and the schedule, without running it"},
    {"bench", command_bench, "time Newton-Schulz, the collectives, or whole steps"},
    {"report", command_report, "turn results of bench into a page with pictures"},
    {"check", command_check, "look at a new cluster: devices, messages, sums, rates"},
    {"info", command_info, "versions, backends, libraries"},
};
#define SUBCOMMANDS (sizeof subcommands / sizeof subcommands[0])

static const subcommand *find_subcommand(const char *name) {
    for (size_t i = 0; i < SUBCOMMANDS; i++)
        if (strcmp(subcommands[i].name, name) == 0)
            return &subcommands[i];
    return NULL;
}

static size_t smaller(size_t a, size_t b) {
    return a < b ? a : b;
}

/* Letters to insert, delete or replace (Levenshtein); both names end after at most NAME_MAX_LENGTH
 * letters. */
#define NAME_MAX_LENGTH 32
static size_t distance(const char *one, const char *other) {
    size_t row[NAME_MAX_LENGTH + 1];
    size_t columns = strnlen(other, NAME_MAX_LENGTH);
    for (size_t j = 0; j <= columns; j++)
        row[j] = j;
    for (size_t i = 1; i <= strnlen(one, NAME_MAX_LENGTH); i++) {
        size_t diagonal = row[0];
        row[0] = i;
        for (size_t j = 1; j <= columns; j++) {
            size_t replaced = diagonal + (one[i - 1] != other[j - 1]);
            diagonal = row[j];
            row[j] = smaller(replaced, 1 + smaller(row[j], row[j - 1]));
        }
    }
    return row[columns];
}

static int unknown_subcommand(const char *name) {
    const subcommand *nearest = &subcommands[0];
    for (size_t i = 1; i < SUBCOMMANDS; i++)
        if (distance(name, subcommands[i].name) < distance(name, nearest->name))
            nearest = &subcommands[i];
    fprintf(stderr,
            "muonshard: unknown command \"%.64s\"; the nearest is \"%s\"; see muonshard --help\n",
            name, nearest->name);
    return EXIT_USAGE;
}

static void print_usage(FILE *out) {
    fprintf(out, "usage: muonshard COMMAND [ARGUMENT...]\n"
                 "       mpirun -n RANKS muonshard COMMAND [ARGUMENT...]\n\nCommands:\n");
    for (size_t i = 0; i < SUBCOMMANDS; i++)
        fprintf(out, "  %-8s %s\n", subcommands[i].name, subcommands[i].summary);
    fprintf(out, "\nmuonshard COMMAND --help: its arguments and the keys of its config\n"
                 "muonshard --version\n\n"
                 "Exit codes: 0 success, 2 no such command, 3 slow (check --strict), "
                 "10 + n for error -n of muonshard.h (12: configuration, 15: file).\n");
}

static int run_help(const char *name) {
    const subcommand *found = find_subcommand(name);
    if (!found)
        return unknown_subcommand(name);
    char own_name[NAME_MAX_LENGTH], help[] = "--help";
    char *arguments[] = {own_name, help, NULL};
    snprintf(own_name, sizeof own_name, "%s", found->name);
    return found->run(2, arguments);
}

static int run(int argc, char **argv) {
    const char *name = argc > 1 ? argv[1] : "";
    if (argc < 2) {
        print_usage(stderr);
        return EXIT_USAGE;
    }
    if (strcmp(name, "--version") == 0) {
        int version = muonshard_version();
        printf("muonshard %d.%d.%d\n", version / 10000, version / 100 % 100, version % 100);
        return EXIT_SUCCESS;
    }
    if (strcmp(name, "--help") == 0 || strcmp(name, "-h") == 0 || strcmp(name, "help") == 0) {
        if (argc > 2)
            return run_help(argv[2]);
        print_usage(stdout);
        return EXIT_SUCCESS;
    }
    const subcommand *found = find_subcommand(name);
    return found ? found->run(argc - 1, argv + 1) : unknown_subcommand(name);
}

int main(int argc, char **argv) {
    int code = run(argc, argv);
    /* A full disk or a closed pipe must not look like success. */
    if ((fflush(stdout) != 0 || ferror(stdout)) && code == EXIT_SUCCESS) {
        fprintf(stderr, "muonshard: the output cannot be written\n");
        code = muonshard_mpi_exit_code(MUONSHARD_ERR_IO);
    }
    return code;
}
