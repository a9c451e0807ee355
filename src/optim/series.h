/* series.h - a directory of checkpoints: directories step-STEP, or step-STEP-N where one of that
 * step was there already. Each is new when it is made, so that nothing else, not even a process of
 * an earlier job, writes to it. Which are complete, which may go. */
#ifndef SERIES_H
#define SERIES_H

#include "optim/manifest.h"

typedef struct series_entry {
    int64_t step;
    int64_t number; /* of those of this step, from 1 */
    char name[64];
} series_entry;

/* The checkpoints in `directory`, newest first; own [*count]. A directory that isn't there has
 * none. ERR_IO, ERR_MEMORY. */
muonshard_status series_list(const char *directory, series_entry **entries, size_t *count,
                             error_text *error);
/* A new directory for a checkpoint of this step; `directory` is made too where it isn't there. Own
 * path; NULL: nothing was made. ERR_IO, ERR_MEMORY. */
muonshard_status series_new(const char *directory, int64_t step, char **path, error_text *error);
/* The text of the manifest in `checkpoint`; own [*length]. ERR_IO: none, or unreadable. */
muonshard_status series_read_manifest(const char *checkpoint, char **text, size_t *length,
                                      error_text *error);
/* Every file of the manifest has its size. ERR_IO, ERR_FORMAT. */
muonshard_status series_check_files(const char *checkpoint, const manifest *m, error_text *error);
/* The manifest is sound, and every file has its size. ERR_IO, ERR_FORMAT, ERR_UNSUPPORTED. */
muonshard_status series_check(const char *checkpoint, error_text *error);
/* After `checkpoint`, of `directory`, has become complete: what is older goes, where it has no
 * manifest, or is older than the newest `keep` that are complete, it included (0: all of them); and
 * what is of the same step. Only files of ours are removed. What can't be is left, and named. */
muonshard_status series_prune(const char *directory, const char *checkpoint, int keep,
                              error_text *error);
/* The checkpoint, or what there is of it. Only files of ours are removed. ERR_IO. */
muonshard_status series_remove(const char *checkpoint, error_text *error);

/* The file of a rank: [SERIES_FILE]. */
#define SERIES_FILE 32
void series_file(int rank, char *name);
/* "directory/name"; own. NULL: no memory. */
char *series_path(const char *directory, const char *name);

#endif
