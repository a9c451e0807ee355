/* config.h - the parser, help, dump and broadcast over tables of parameters; settings.h has the
 * library's own table. */
#ifndef CONFIG_H
#define CONFIG_H

#include "settings.h"

/* The library's values in effect. */
const settings *config_settings(const muonshard_config *config);
/* A hash of the library's own table in effect: what all ranks must have in common at create. */
uint64_t config_hash(const muonshard_config *config);
/* An independent copy holding the library's own table only. */
muonshard_status config_copy(const muonshard_config *config, muonshard_config **copy,
                             error_text *error);
/* All ranks' own tables equal rank 0's, else ERR_MISMATCH naming the lowest other rank and the
 * first key. Collective. */
muonshard_status config_check_equal(const muonshard_config *config, muonshard_comm *comm,
                                    error_text *error);

/* The line of item `index` of the list `key` in a file that loads; 0: it has no such item. */
size_t config_item_line(const char *path, const char *key, size_t index);

#endif
