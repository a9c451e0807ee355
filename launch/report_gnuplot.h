/* report_gnuplot.h - a picture by gnuplot. Numbers and names reach it as columns of a data file,
 * which it reads as data only; programs are made of constants and counts, so that nothing a file
 * says is ever run. */
#ifndef REPORT_GNUPLOT_H
#define REPORT_GNUPLOT_H

#include <stdio.h>

#include "command.h"

/* Before a program's own lines; width and height. */
#define GNUPLOT_HEAD                                                                               \
    "set terminal svg size %d,%d font 'sans-serif,13' background rgb 'white'\n"                    \
    "set output 'picture.svg'\nset datafile separator '\\t'\nset border 3\n"                       \
    "set tics nomirror out\nset grid ytics lc rgb '#dddddd' lt 1\nset key noenhanced\n"            \
    "set style fill solid 0.85\nset boxwidth 0.6\nset encoding utf8\n"

typedef struct gnuplot {
    char folder[32];
    FILE *data; /* own; the file 'data' of the program */
} gnuplot;

/* ERR_IO. After it one gnuplot_draw. */
muonshard_status gnuplot_begin(gnuplot *p, char *message);
/* Writes one <svg> to `page`. ERR_UNAVAILABLE: no gnuplot; ERR_IO. */
muonshard_status gnuplot_draw(gnuplot *p, const char *program, FILE *page, char *message);

/* A name as a field: what would end the field or start a quoted one becomes a space. Where it is
 * shown has to be `noenhanced`. */
void gnuplot_name(FILE *data, const char *text);
/* A tab and the number. */
void gnuplot_number(FILE *data, double value);

#endif
