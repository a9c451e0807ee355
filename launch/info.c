/* muonshard info: what this installation is made of. Starts no MPI, so that it also helps where MPI
 * does not start. */
#include <cblas.h>
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "command.h"
#include "message.h"

static const command_usage info_usage = {
    .name = "info",
    .synopsis = "",
    .doc = "Prints versions, backends and why one is missing, and the libraries found.",
};

static muonshard_status print_library(char *message) {
    size_t size = muonshard_info(NULL, 0) + 1;
    char *text = malloc(size);
    if (!text)
        return message_fail(message, MUONSHARD_ERR_MEMORY, "out of memory");
    muonshard_info(text, size);
    size_t length = strlen(text);
    printf("%s%s", text, length > 0 && text[length - 1] == '\n' ? "" : "\n");
    free(text);
    return MUONSHARD_OK;
}

static void print_mpi(void) {
    char version[MPI_MAX_LIBRARY_VERSION_STRING] = "";
    int length = 0;
    /* One of the few calls MPI allows before MPI_Init. */
    if (MPI_Get_library_version(version, &length) == MPI_SUCCESS)
        printf("MPI: %.*s\n", (int)strcspn(version, "\n"), version);
    else
        printf("MPI: version not known\n");
}

static void print_blas(void) {
    const char *threads = getenv("MUONSHARD_THREADS");
    printf("BLAS: %s\n", openblas_get_config());
    printf("BLAS threads: %s a rank (MUONSHARD_THREADS %s); OpenBLAS alone would use %d\n",
           threads ? threads : "1", threads ? "says so" : "changes it", openblas_get_num_threads());
}

int command_info(int argc, char **argv) {
    if (command_wants_help(argc, argv))
        return command_help(&info_usage, argc, argv, NULL, 0);
    char message[COMMAND_MESSAGE] = "";
    command cmd = {.usage = &info_usage, .size = 1};
    command_args args;
    muonshard_status status = command_parse(&info_usage, argc, argv, &args, message);
    if (status == MUONSHARD_OK)
        status = print_library(message);
    if (status == MUONSHARD_OK) {
        print_mpi();
        print_blas();
    }
    return command_finish(&cmd, &args, command_told(&cmd, status, "%s", message));
}
