/* memory.h - what a rank allocates at commit, as a list: commit goes through it, and `muonshard
 * plan` adds it up for ranks and machines that aren't there. */
#ifndef MEMORY_H
#define MEMORY_H

#include "optim/plan.h"

/* Backend memory, sized at commit; a step allocates nothing. */
typedef struct workspace {
    /* state */
    void *momentum;         /* [matrix_elements] of momentum_dtype */
    float *variance;        /* [variance_elements] */
    float *masters;         /* [master_elements] fp32 of 16-bit matrices */
    float *flat_m, *flat_v; /* [flat_shard] AdamW */
    float *flat_w; /* [flat_shard] parameters of the shard: a master, or loaded by each step */
    /* scratch */
    float *owned;    /* [owned_elements] summed gradients of what this rank owns, then U in their
                        place, in the dtype Newton-Schulz leaves it in */
    float *factors;  /* [variance_elements] of U, from the variance */
    void *flat_sent; /* [flat_shard] new parameters in the dtype they travel in; NULL: as flat_w */
    char *pack;      /* [pack_bytes] gradients that had to be copied to be sent */
    char *exchange;  /* scratch of reduce-scatters; once they are done, what is gathered */
    void *zeros;     /* [largest_unpacked_bytes] sent in the place of a NULL gradient */
    void *newton_schulz;
    double *word;    /* [word_stride] this rank's agree word */
    double *words;   /* [world_size, word_stride] */
    double *totals;  /* [2 + agree world size, 2]: of this group, what it contributes to agree_comm,
                        what all do */
    uint8_t *active; /* [tensor_count] */
    uint8_t *skip_if_absent; /* [tensor_count] */
    tensor_values *values;   /* [tensor_count] */
    step_record *record;
    size_t *sum_index; /* [sum_count] into words, then [agree world size] into totals */
    /* of a backend with streams */
    double *squares; /* [most matrices owned of a batch] sums of U^2, from momentum on */
    /* pinned, of the host */
    step_record *posted;             /* [STEP_RESULTS] records of steps, as they become known */
    char *staged_sent, *staged_recv; /* [exchange] what a staged communicator sends and receives */
    double *staged_words;            /* [1 + world size, word_stride], and totals of agree_comm */
} workspace;

#define STEP_RESULTS 16

/* What sizes depend on beside the plan. */
typedef struct memory_facts {
    const plan *plan;
    const settings *settings;
    size_t tensors, views;
    size_t agreeing;      /* ranks of agree_comm */
    bool device;          /* the backend has streams */
    bool scratch;         /* some reduce-scatter is an exchange and a sum of the backend's */
    bool staged;          /* tensors travel through memory of the host */
    bool staged_words;    /* so does what agree_comm carries */
    size_t owned;         /* most matrices this rank has of a batch */
    size_t orthogonalize; /* bytes the backend wants for the batch that takes most */
} memory_facts;

typedef enum memory_kind { MEMORY_STATE, MEMORY_WORKSPACE, MEMORY_PINNED } memory_kind;

typedef struct memory_block {
    memory_kind kind;
    size_t offset; /* of its pointer in a workspace */
    size_t bytes;
} memory_block;

enum { MEMORY_MOST = 32 };

typedef struct memory_list {
    memory_block blocks[MEMORY_MOST];
    size_t count;
} memory_list;

memory_list memory_of(const memory_facts *facts);
/* Of one kind. */
size_t memory_bytes(const memory_list *list, memory_kind kind);

/* Numbers in an agree word: a failure, a flag a tensor, sums of squares of this rank's waves and
 * chunks, a fingerprint. */
size_t memory_word_stride(const plan *p, size_t tensors);
/* Sums of squares of all ranks: one a view, one a chunk of the flat rest. */
size_t memory_sum_count(const plan *p, size_t views);

#endif
