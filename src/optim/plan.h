/* plan.h - who owns which matrix, what travels together, what is computed together. A pure function
 * of the tensors, the world size, the settings and whether a device computes: every rank computes
 * the same plan, and its hash is compared at commit. */
#ifndef PLAN_H
#define PLAN_H

#include <stdbool.h>
#include "optim/registry.h"

/* Element-wise tensors lie one after the other in a flat buffer; norms and shards are made of
 * chunks of it. */
#define PLAN_FLAT_CHUNK 65536

typedef enum plan_kind { PLAN_MATRICES, PLAN_FLAT } plan_kind;

/* One slot a rank, all of one size: what one reduce-scatter or all-gather of equal counts can move.
 * The slots of a wave that is not packed are consecutive views of one tensor, contiguous in the
 * caller's memory. The flat rest is one wave. */
typedef struct wave {
    plan_kind kind;
    bool packed; /* gradients are copied to the pack arena before they are sent */
    /* Empty slots have no place in the pack arena; nor where the wave is gathered: plan_compact. */
    bool compact_pack, compact_gather;
    int64_t rows, cols;    /* of every slot's view, up to transposition; flat: [1, slot] */
    size_t slot;           /* elements */
    muonshard_dtype dtype; /* of its parameters; flat: of all of them, or fp32 where they differ */
    muonshard_dtype wire;  /* of gradients as they travel: theirs, or fp32 where they differ */
    muonshard_dtype sent;  /* of what is gathered: U, or parameters */
    size_t first_slot;     /* its world_size entries in plan.slots */
    size_t first_view;     /* lowest view in it; flat: not used */
    int first_tensor;      /* lowest tensor in it */
    int64_t priority;      /* highest in it */
    /* bytes in the pack arena, [world_size, slot] of wire; [filled slots, slot] where compact */
    size_t pack_offset;
    /* bytes in the exchange arena: reduce-scatter scratch, [world_size, slot] of wire; and once
     * gradients are reduced what is gathered, [world_size, slot] of sent, and the variance's
     * factors, [world_size, long side] fp32 */
    size_t exchange_offset, gather_offset, factor_offset;
    /* elements in what this rank owns: [slot]; [long side] of the variance; of masters [slot], or
     * [world_size, slot] where they are replicated */
    size_t owned_offset, variance_offset, master_offset;
} wave;

#define PLAN_EMPTY_SLOT SIZE_MAX

/* Consecutive waves of plan.reduce_order that are reduce-scattered as one group. */
typedef struct bucket {
    size_t first, count;
    bool packed; /* some wave in it is */
} bucket;

/* Waves [first, first + count) of one oriented shape m <= n and one dtype of parameters: one
 * batched Newton-Schulz, one group of all-gathers. */
typedef struct batch {
    plan_kind kind;
    int64_t m, n;
    muonshard_dtype dtype;
    bool gathers_params;
    size_t first, count;
} batch;

typedef struct plan {
    int world_size;
    wave *waves; /* own, [wave_count], in the order of batches */
    size_t wave_count;
    size_t *slots; /* own, views or PLAN_EMPTY_SLOT; of a flat wave not used */
    size_t slot_count;
    size_t *reduce_order; /* own, [wave_count] */
    bucket *buckets;      /* own */
    size_t bucket_count;
    batch *batches; /* own */
    size_t batch_count;
    size_t *view_wave; /* own, [view_count]: the wave a view is in */
    int *view_owner;   /* own, [view_count] */

    size_t *flat_offset; /* own, [tensor_count]: where an element-wise tensor starts in the flat
                            buffer */
    size_t flat_elements, flat_shard;

    /* Gradients travel to their owners, and what became of them to everybody: not where there is
     * one rank, nor, the former, where the caller has reduced them. */
    bool reduces, gathers;
    bool device; /* computes */
    /* arenas a rank; elements */
    size_t matrix_elements, owned_elements, variance_elements, master_elements;
    bool flat_master; /* flat parameters are kept in fp32 beside the caller's */
    /* arenas a rank, bytes; the exchange arena is first scratch, then gathered */
    size_t pack_bytes, largest_unpacked_bytes, scratch_bytes, gather_bytes;
    /* a step, bytes a rank */
    size_t bytes_reduced, bytes_gathered, bytes_packed, bytes_padded;
    double cost;      /* of Newton-Schulz, mean of a rank: ns_program_cost */
    double imbalance; /* largest / mean of it over the ranks; 1 without matrices */
} plan;

/* `device`: computed on one, where batches are larger unless the settings say how large. */
muonshard_status plan_make(plan *p, const registry *r, const settings *s, int world_size,
                           bool device, error_text *error);
/* For a transport that leaves empty slots out where they are more than a quarter: then arenas have
 * no place for them. `sums_fp32`: it sums gradients in fp32 itself; others need a slot for each
 * rank, to be added up. */
void plan_compact(plan *p, const registry *r, const settings *s, bool sums_fp32);
uint64_t plan_hash(const plan *p);
void plan_free(plan *p);

/* Slots that have a view in them; of a wave of matrices. */
size_t plan_filled_slots(const plan *p, const wave *w);
/* More than a quarter of the slots are empty. */
bool plan_is_sparse(const plan *p, const wave *w);
/* The view in rank's slot, or PLAN_EMPTY_SLOT. */
static inline size_t plan_slot_view(const plan *p, const wave *w, int rank) {
    return p->slots[w->first_slot + (size_t)rank];
}

#endif
