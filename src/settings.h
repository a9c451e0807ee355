/* settings.h - every setting of the optimizer: one table that is parser, help, docs page and dump;
 * and the presets, which are rows of values for that table. */
#ifndef SETTINGS_H
#define SETTINGS_H

#include "status.h"
#include "kernels/backend.h"

typedef enum scale_mode { /* factor of U; r, c: rows, columns */
                          SCALE_NONE,
                          SCALE_SHAPE,    /* sqrt(max(1, r/c)) */
                          SCALE_RATIO,    /* sqrt(r/c) */
                          SCALE_SPECTRAL, /* sqrt(max(r, c)) */
                          SCALE_RMS,      /* 0.2 sqrt(max(r, c)) */
                          SCALE_FAN_RATIO /* sqrt(max(r, c)/min(r, c)) */
} scale_mode;

/* Which sizes of a flattened tensor count as r, c in the scale. */
typedef enum scale_dims {
    SCALE_DIMS_FLATTENED,
    SCALE_DIMS_FIRST_TWO,
    SCALE_DIMS_LAST_TWO,
    SCALE_DIMS_FIRST_LAST
} scale_dims;

typedef enum coefficient_set { COEFFICIENTS_SIMPLE, COEFFICIENTS_QUINTIC } coefficient_set;
typedef enum ns_dtype { NS_DTYPE_FP32 } ns_dtype;
typedef enum ns_form { NS_FORM_STANDARD } ns_form;
typedef enum reduce_mode { REDUCE_MEAN, REDUCE_SUM, REDUCE_NONE } reduce_mode;
typedef enum gather_mode { GATHER_UPDATES } gather_mode;
typedef enum ownership_policy { OWNERSHIP_ROUND_ROBIN } ownership_policy;

typedef struct settings {
    int preset; /* index into the preset table; 0: none */
    /* matrices */
    double lr, weight_decay;
    int decay; /* decay_method */
    double momentum;
    int momentum_form; /* momentum_form */
    int nesterov;
    int norm; /* ns_norm */
    double norm_eps;
    int coefficients;          /* coefficient_set */
    double coefficient_safety; /* divides a, b and c */
    int64_t ns_steps;
    int ns_dtype, ns_form;
    int scale, scale_dims;
    double extra_scale;
    /* element-wise tensors */
    double adam_lr; /* NaN (auto): lr * adam_lr_scale */
    double adam_lr_scale;
    double adam_weight_decay; /* NaN (auto): weight_decay */
    double adam_beta1, adam_beta2, adam_eps;
    int adam_form;
    /* the step */
    double clip_norm; /* 0: off */
    int reduce, gather, ownership;
    int64_t check_replicas; /* every N steps; 0: off */
    /* the machine */
    int backend; /* backend_choice */
    int64_t
        bucket_bytes; /* of gradient a rank sends in one reduce-scatter group; at least one wave */
    int64_t batch_bytes; /* of updates a rank owns in one Newton-Schulz batch; at least one wave */
    double timeout_s;    /* of each wait in a step */
    double first_timeout_s; /* of each wait in the first step */
    const char *trace;      /* Chrome trace file, %r: rank; empty: off */
} settings;

extern const muonshard_param settings_table[];
extern const size_t settings_table_count;

/* A preset: "key=value" strings over the defaults; a key that is set explicitly goes before its
 * preset, in any order. */
typedef struct preset {
    const char *name;
    const char *const *values; /* NULL-terminated */
} preset;
extern const preset preset_table[];
extern const size_t preset_count;

#endif
