#include "config_internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

/* Only the public side of the communicator is used here: the config stands below src/comm. */

static uint64_t hash_text(uint64_t hash, const char *text) {
    return XXH3_64bits_withSeed(text, strlen(text) + 1, hash);
}

static uint64_t hash_structure(const muonshard_config *config) {
    uint64_t hash = 0;
    for (size_t i = 0; i < config->row_count; ++i) {
        const muonshard_param *param = config->rows[i].param;
        hash = hash_text(hash, param->name);
        hash = hash_text(hash, value_type_name(param->type));
        hash = hash_text(hash, param->choices ? param->choices : "");
    }
    return hash;
}

static uint64_t hash_values(const muonshard_config *config, char *const *given, size_t rows) {
    uint64_t hash = 0;
    for (size_t i = 0; i < rows; ++i) {
        char buffer[VALUE_TEXT_MAX];
        hash = hash_text(hash, config->rows[i].param->name);
        hash = hash_text(hash, config_row_text(config, given, i, buffer));
    }
    return hash;
}

uint64_t config_hash(const muonshard_config *config) {
    return hash_values(config, config->given, settings_table_count);
}

/* ---- collectives whose failure leaves its text in `error` ---- */

static muonshard_status comm_result(muonshard_comm *comm, muonshard_status status,
                                    error_text *error) {
    return status ? fail(error, status, "%s", muonshard_comm_last_error(comm)) : MUONSHARD_OK;
}

static muonshard_status agree(muonshard_comm *comm, muonshard_status status, error_text *error) {
    return comm_result(comm, muonshard_comm_agree(comm, status, status ? error->text : NULL),
                       error);
}

/* ERR_MISMATCH on all ranks unless all have rank 0's hash. all [world size]. */
static muonshard_status same_hash(muonshard_comm *comm, uint64_t mine, uint64_t *all,
                                  const char *what, error_text *error) {
    TRY(comm_result(comm, muonshard_comm_allgather(comm, &mine, all, sizeof mine), error));
    for (int rank = 1; rank < muonshard_comm_size(comm); ++rank)
        FAIL_IF(all[rank] != all[0], error, MUONSHARD_ERR_MISMATCH,
                "rank %d's %s differ from rank 0's", rank, what);
    return MUONSHARD_OK;
}

/* Rank 0's text [*length + 1] on all ranks; `status` is how making it there went. New memory on the
 * others; *text is the caller's to free whatever the outcome. */
static muonshard_status share_text(muonshard_comm *comm, muonshard_status status, char **text,
                                   size_t *length, error_text *error) {
    const int rank = muonshard_comm_rank(comm);
    TRY(agree(comm, status, error));
    uint64_t bytes = *length + 1;
    TRY(comm_result(comm, muonshard_comm_broadcast(comm, &bytes, sizeof bytes, 0), error));
    if (rank != 0) {
        *length = (size_t)bytes - 1;
        *text = malloc((size_t)bytes);
        if (!*text)
            status = fail(error, MUONSHARD_ERR_MEMORY, "out of memory");
    }
    TRY(agree(comm, status, error));
    return comm_result(comm, muonshard_comm_broadcast(comm, *text, (size_t)bytes, 0), error);
}

/* ---- broadcast ---- */

static muonshard_status dump_given(const muonshard_config *config, char **text, size_t *length,
                                   error_text *error) {
    *length = config_text_dump(config, true, NULL, 0);
    *text = malloc(*length + 1);
    FAIL_IF(!*text, error, MUONSHARD_ERR_MEMORY, "out of memory");
    config_text_dump(config, true, *text, *length + 1);
    return MUONSHARD_OK;
}

muonshard_status muonshard_config_broadcast(muonshard_config *config, muonshard_comm *comm) {
    if (!config || !comm)
        return MUONSHARD_ERR_ARGUMENT;
    error_text *error = &config->error;
    muonshard_status status = MUONSHARD_OK;
    char *text = NULL, **given = NULL;
    size_t length = 0;
    uint64_t *hashes = calloc((size_t)muonshard_comm_size(comm), sizeof *hashes);
    if (!hashes)
        status = fail(error, MUONSHARD_ERR_MEMORY, "out of memory");
    TRY_GOTO(agree(comm, status, error), out);
    TRY_GOTO(same_hash(comm, hash_structure(config), hashes, "tables of parameters", error), out);

    if (muonshard_comm_rank(comm) == 0)
        status = dump_given(config, &text, &length, error);
    TRY_GOTO(share_text(comm, status, &text, &length, error), out);
    /* Rank 0 too reads the text, so that all ranks hold what it says. */
    status = config_given_load(config, NULL, text, length, "<rank 0>", &given, error);
    TRY_GOTO(agree(comm, status, error), out);
    TRY_GOTO(same_hash(comm, hash_values(config, given, config->row_count), hashes,
                       "values after the broadcast", error),
             out);
    config_given_commit(config, given);
    given = NULL;
    config->loaded = true;
out:
    config_given_free(given, config->row_count);
    free(text);
    free(hashes);
    return status;
}

/* ---- comparison ---- */

/* The own table's values, each with its final zero; `text` NULL: only their length. */
static size_t own_values(const muonshard_config *config, char *text) {
    size_t length = 0;
    for (size_t i = 0; i < settings_table_count; ++i) {
        char buffer[VALUE_TEXT_MAX];
        const char *value = config_row_text(config, config->given, i, buffer);
        const size_t bytes = strlen(value) + 1;
        if (text)
            memcpy(text + length, value, bytes);
        length += bytes;
    }
    return length;
}

/* The first row whose value is not the one in theirs [length], or the number of rows. */
static size_t first_difference(const muonshard_config *config, const char *theirs, size_t length,
                               const char **at) {
    size_t row = 0, used = 0;
    for (; row < settings_table_count; ++row) {
        char buffer[VALUE_TEXT_MAX];
        *at = used < length ? theirs + used : "";
        if (strcmp(config_row_text(config, config->given, row, buffer), *at) != 0)
            break;
        used += strlen(*at) + 1;
    }
    return row;
}

muonshard_status config_check_equal(const muonshard_config *config, muonshard_comm *comm,
                                    error_text *error) {
    const int rank = muonshard_comm_rank(comm), size = muonshard_comm_size(comm);
    muonshard_status status = MUONSHARD_OK;
    error_text mine = {{0}};
    char *text = NULL;
    size_t length = 0;
    int32_t *differs = calloc((size_t)size, sizeof *differs);
    if (rank == 0) {
        length = own_values(config, NULL);
        text = malloc(length + 1);
        if (text) {
            own_values(config, text);
            text[length] = '\0';
        }
    }
    if (!differs || (rank == 0 && !text))
        status = fail(&mine, MUONSHARD_ERR_MEMORY, "out of memory");
    TRY_GOTO(share_text(comm, status, &text, &length, &mine), out);

    const char *theirs;
    const size_t row = first_difference(config, text, length, &theirs);
    const int32_t differing = row < settings_table_count;
    if (differing) {
        char buffer[VALUE_TEXT_MAX];
        const char *quote = config->rows[row].param->type == MUONSHARD_PARAM_TEXT ? "'" : "";
        const char *value = config_row_text(config, config->given, row, buffer);
        fail(&mine, MUONSHARD_OK,
             "rank %d's config differs from rank 0's: %s is %s%.200s%s, rank 0 has %s%.200s%s",
             rank, config->rows[row].param->name, quote, value, quote, quote, theirs, quote);
    }
    TRY_GOTO(comm_result(comm,
                         muonshard_comm_allgather(comm, &differing, differs, sizeof differing),
                         &mine),
             out);
    for (int other = 1; other < size && status == MUONSHARD_OK; ++other) {
        if (!differs[other])
            continue;
        TRY_GOTO(comm_result(comm,
                             muonshard_comm_broadcast(comm, mine.text, sizeof mine.text, other),
                             &mine),
                 out);
        status = MUONSHARD_ERR_MISMATCH;
    }
out:
    if (status != MUONSHARD_OK)
        fail(error, status, "%s", mine.text);
    free(differs);
    free(text);
    return status;
}
