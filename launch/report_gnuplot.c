/* report_gnuplot.c - runs gnuplot in a folder of its own and takes the picture over. */
#include "report_gnuplot.h"

#include <errno.h>
#include <math.h>
#include <spawn.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "message.h"

extern char **environ;

muonshard_status gnuplot_begin(gnuplot *p, char *message) {
    snprintf(p->folder, sizeof p->folder, "/tmp/muonshard-XXXXXX");
    p->data = NULL;
    char path[64];
    if (mkdtemp(p->folder)) {
        snprintf(path, sizeof path, "%s/data", p->folder);
        p->data = fopen(path, "w");
    }
    return p->data ? MUONSHARD_OK
                   : message_fail(message, MUONSHARD_ERR_IO, "%s: %s", p->folder, strerror(errno));
}

static void remove_folder(const gnuplot *p) {
    static const char *const names[] = {"data", "lines", "program", "picture.svg"};
    char path[64];
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        snprintf(path, sizeof path, "%s/%s", p->folder, names[i]);
        unlink(path);
    }
    rmdir(p->folder);
}

static muonshard_status write_program(const gnuplot *p, const char *program, char *message) {
    char path[64];
    snprintf(path, sizeof path, "%s/program", p->folder);
    FILE *file = fopen(path, "w");
    const bool failed =
        !file || fprintf(file, "cd '%s'\n%s", p->folder, program) < 0 || fclose(file) != 0;
    return failed ? message_fail(message, MUONSHARD_ERR_IO, "%s: %s", path, strerror(errno))
                  : MUONSHARD_OK;
}

static muonshard_status run(const gnuplot *p, char *message) {
    char path[64], name[] = "gnuplot";
    snprintf(path, sizeof path, "%s/program", p->folder);
    char *arguments[] = {name, path, NULL};
    setenv("LC_ALL", "C.UTF-8", 1); /* without, it warns of letters and may write decimal commas */
    pid_t child;
    int outcome = 0;
    if (posix_spawnp(&child, name, NULL, NULL, arguments, environ) != 0)
        return message_fail(message, MUONSHARD_ERR_UNAVAILABLE,
                            "gnuplot, which draws the pictures, isn't there; launch/setup.sh "
                            "quickstart installs it");
    while (waitpid(child, &outcome, 0) < 0 && errno == EINTR)
        ;
    return WIFEXITED(outcome) && WEXITSTATUS(outcome) == 0
               ? MUONSHARD_OK
               : message_fail(message,
                              WIFEXITED(outcome) && WEXITSTATUS(outcome) == 127
                                  ? MUONSHARD_ERR_UNAVAILABLE
                                  : MUONSHARD_ERR_IO,
                              "gnuplot ends with %d; launch/setup.sh quickstart installs it",
                              WEXITSTATUS(outcome));
}

/* From the <svg> on: what comes before is for files that stand alone. */
static muonshard_status copy_picture(const gnuplot *p, FILE *page, char *message) {
    char path[64], line[4096];
    bool inside = false;
    snprintf(path, sizeof path, "%s/picture.svg", p->folder);
    FILE *file = fopen(path, "r");
    while (file && fgets(line, sizeof line, file)) {
        inside = inside || strncmp(line, "<svg", 4) == 0;
        if (inside)
            fputs(line, page);
    }
    if (file)
        fclose(file);
    return inside ? MUONSHARD_OK
                  : message_fail(message, MUONSHARD_ERR_IO, "%s: gnuplot left no picture", path);
}

muonshard_status gnuplot_draw(gnuplot *p, const char *program, FILE *page, char *message) {
    fclose(p->data);
    muonshard_status status = write_program(p, program, message);
    if (status == MUONSHARD_OK)
        status = run(p, message);
    if (status == MUONSHARD_OK)
        status = copy_picture(p, page, message);
    remove_folder(p);
    return status;
}

void gnuplot_name(FILE *data, const char *text) {
    for (; text && *text; text++)
        fputc((unsigned char)*text < 0x20 || strchr("\"\\`", *text) ? ' ' : *text, data);
}

void gnuplot_number(FILE *data, double value) {
    if (isfinite(value))
        fprintf(data, "\t%.9g", value);
    else
        fputs("\tNaN", data);
}
