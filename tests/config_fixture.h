/* config_fixture.h - a config under test, with a program's table of every type beside the library's
 * own. */
#ifndef CONFIG_FIXTURE_H
#define CONFIG_FIXTURE_H

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "config.h" /* before cmocka, which has a macro `fail` */
#include <cmocka.h>

typedef struct program_values {
    int flag, mode;
    int64_t count;
    double rate, limit;
    const char *name, *groups;
} program_values;

#define PROGRAM_ROWS 7
extern const muonshard_param program_table[PROGRAM_ROWS];

/* A valid file that touches every type. */
extern const char *const valid_yaml;

/* These fail the test when they fail. */
muonshard_config *config_fresh(void);
muonshard_config *config_fresh_with_program(program_values *values);
void config_put(muonshard_config *config, const char *key, const char *value);
void config_load(muonshard_config *config, const char *yaml);
/* Owned by the caller; length and termination are checked on the way. */
char *config_dump(const muonshard_config *config);

/* Equal, or both NaN. */
void assert_real(double value, double expected);
void assert_config_value(const muonshard_config *config, const char *key, const char *expected);
/* The dump loads to the same values, and their dump is the same. */
void assert_config_round_trip(const muonshard_config *config, const program_values *values);

#endif
