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

/* Which size of a matrix is r, the output features: rows, or columns (optax). */
typedef enum matrix_layout { LAYOUT_OUT_IN, LAYOUT_IN_OUT } matrix_layout;

typedef enum coefficient_set {
    COEFFICIENTS_SIMPLE,
    COEFFICIENTS_QUINTIC,
    COEFFICIENTS_YOU, /* another name of quintic */
    COEFFICIENTS_POLAR_EXPRESS,
    COEFFICIENTS_POLAR_EXPRESS_NVIDIA,
    COEFFICIENTS_POLAR_EXPRESS_SPEEDRUN,
    COEFFICIENTS_POLAR_EXPRESS_COMPUTED, /* for any lower bound and number of steps */
    COEFFICIENTS_CANS,
    COEFFICIENTS_TURBO,
    COEFFICIENTS_AOL4,
    COEFFICIENTS_DEEPSEEKV4,
    COEFFICIENTS_CUBIC5,
    COEFFICIENTS_CUSTOM
} coefficient_set;
/* Which row a step takes when there are more steps than rows; auto: the set's own. */
typedef enum coefficient_repeat { REPEAT_AUTO, REPEAT_CYCLE, REPEAT_LAST } coefficient_repeat;
typedef enum safety_form {
    SAFETY_FACTOR, /* (a, b, c) / s */
    SAFETY_POWERS  /* (a/s, b/s^3, c/s^5) */
} safety_form;
typedef enum safety_for { SAFETY_FOR_ALL, SAFETY_FOR_FP16 } safety_for;
typedef enum ns_dtype_choice {
    NS_DTYPE_FP32,
    NS_DTYPE_TF32,
    NS_DTYPE_BF16,
    NS_DTYPE_FP16,
    NS_DTYPE_PARAM /* that of the parameter */
} ns_dtype_choice;
typedef enum ns_form { NS_FORM_STANDARD, NS_FORM_GRAM, NS_FORM_AUTO } ns_form;
typedef enum variance_mode { VARIANCE_NONE, VARIANCE_NORMUON } variance_mode;
typedef enum variance_axis { VARIANCE_AXIS_ROWS, VARIANCE_AXIS_AUTO } variance_axis;
typedef enum decay_lr { DECAY_LR_BASE, DECAY_LR_SCALED } decay_lr;

typedef enum reduce_mode { REDUCE_MEAN, REDUCE_SUM, REDUCE_NONE } reduce_mode;
typedef enum gather_mode { GATHER_AUTO, GATHER_UPDATES, GATHER_PARAMS } gather_mode;
/* Where the fp32 values of 16-bit parameters are kept. */
typedef enum master_mode { MASTER_AUTO, MASTER_OWNER, MASTER_REPLICATED, MASTER_NONE } master_mode;
typedef enum rounding_mode { ROUNDING_NEAREST, ROUNDING_STOCHASTIC } rounding_mode;
/* What moves tensors; auto: nccl where the backend is cuda and there are several ranks, otherwise
 * the communicator the program gives. */
typedef enum comm_choice { COMM_AUTO, COMM_SELF, COMM_MPI, COMM_NCCL } comm_choice;
typedef enum ownership_policy { OWNERSHIP_ROUND_ROBIN, OWNERSHIP_BALANCED } ownership_policy;

typedef struct settings {
    int preset; /* index into the preset table; 0: none */
    /* matrices */
    double lr, weight_decay, momentum;
    const char *lr_schedule, *weight_decay_schedule, *momentum_schedule; /* see curve.h */
    int64_t total_steps; /* what `end` is in a schedule; 0: not known */
    int decay;           /* decay_method */
    int decay_lr, decay_form;
    int momentum_form;  /* momentum_form */
    int momentum_dtype; /* muonshard_dtype */
    int nesterov;
    int norm;                        /* ns_norm */
    double norm_eps;                 /* NaN (auto): the norm's own */
    int coefficients;                /* coefficient_set */
    const char *custom_coefficients; /* "a,b,c" a step, each followed by '\n' */
    int coefficient_repeat;
    double polar_lower_bound;
    double coefficient_safety;
    int coefficient_safety_form, coefficient_safety_for;
    int safety_last;       /* the last row of the sequence has it too */
    int coefficient_check; /* 0: on, 1: off */
    int64_t ns_steps;
    int ns_dtype, ns_form;
    const char
        *gram_restarts; /* "auto", or steps counted from 0, separated by commas; empty: none */
    int variance, variance_axis, variance_denominator;
    double variance_beta2, variance_eps;
    int scale, scale_dims, layout;
    double extra_scale;
    /* element-wise tensors */
    int elementwise; /* elementwise_rule */
    double adam_lr;  /* NaN (auto): lr * adam_lr_scale */
    double adam_lr_scale;
    double adam_weight_decay; /* NaN (auto): weight_decay */
    double adam_beta1, adam_beta2, adam_eps;
    int adam_form, adam_nesterov, adam_decay;
    /* the step */
    double clip_norm; /* 0: off */
    int reduce, gather, master, init_master, rounding, ownership;
    int64_t seed;           /* of stochastic rounding */
    int64_t check_replicas; /* every N steps; 0: off */
    /* the machine */
    int backend;       /* backend_choice */
    int comm;          /* comm_choice */
    int share_gpu;     /* ranks may share a device */
    int deterministic; /* over NCCL: sums in rank order */
    int cuda_graphs;
    int gemm_kernels; /* 1: our own for Hopper */
    int gemm_choice;  /* 1: measured */
    const char *gemm_table;
    int64_t symmetric_panels; /* 0: auto */
    int64_t threads;          /* 0: auto */
    int instructions;         /* 0: auto, else 1 + host_isa */
    int64_t
        bucket_bytes; /* of gradient a rank sends in one reduce-scatter group; at least one wave */
    int64_t batch_bytes;    /* of updates a rank owns in one Newton-Schulz batch; 0: auto */
    double timeout_s;       /* of each wait in a step */
    double first_timeout_s; /* of each wait in the first step */
    double save_timeout_s;  /* of each wait in saving and loading */
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
