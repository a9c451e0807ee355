/* oracle_optimizer.h - a whole optimizer in fp64 on the mathematics of oracle.h: what the library's
 * parameters are compared with. Several ranks are a list of gradients. */
#ifndef ORACLE_OPTIMIZER_H
#define ORACLE_OPTIMIZER_H

#include "oracle.h"

typedef enum oracle_momentum {
    ORACLE_HEAVY_BALL,
    ORACLE_HEAVY_BALL_SWAPPED,
    ORACLE_EMA,
    ORACLE_EMA_CORRECTED
} oracle_momentum;
typedef enum oracle_scale {
    ORACLE_SCALE_NONE,
    ORACLE_SCALE_SHAPE,
    ORACLE_SCALE_RATIO,
    ORACLE_SCALE_SPECTRAL,
    ORACLE_SCALE_RMS,
    ORACLE_SCALE_FAN_RATIO
} oracle_scale;
typedef enum oracle_dims {
    ORACLE_FLATTENED,
    ORACLE_FIRST_TWO,
    ORACLE_LAST_TWO,
    ORACLE_FIRST_LAST
} oracle_dims;
typedef enum oracle_adam { ORACLE_EPS_OUTSIDE, ORACLE_EPS_INSIDE } oracle_adam;
typedef enum oracle_decay {
    ORACLE_DECOUPLED,
    ORACLE_INDEPENDENT,
    ORACLE_LR_SQUARED,
    ORACLE_L2,
    ORACLE_CAUTIOUS,
    ORACLE_CAUTIOUS_LR_SQUARED
} oracle_decay;
typedef enum oracle_decay_form {
    ORACLE_MULTIPLY,
    ORACLE_ADD,
    ORACLE_WITH_UPDATE
} oracle_decay_form;
typedef enum oracle_dtype { ORACLE_FP32, ORACLE_BF16, ORACLE_FP16 } oracle_dtype;

typedef struct oracle_preset {
    const char *name;
    oracle_momentum momentum_form;
    double momentum;
    double momentum_to; /* reached after momentum_over steps; 0 of them: constant */
    int momentum_over;
    bool nesterov;
    bool momentum_bf16;
    oracle_norm norm;
    double norm_eps;
    oracle_set set;
    int steps;
    double coefficient_safety;
    bool safety_powers;
    double safety_16_bits; /* coefficient_safety in fp16 */
    oracle_dtype shipped;  /* working dtype; the oracle itself doesn't round */
    bool gram;             /* as shipped */
    bool normuon, variance_auto, variance_clamped;
    double variance_beta2, variance_eps;
    oracle_scale scale;
    oracle_dims scale_dims;
    bool in_out;
    double extra_scale;
    double lr, weight_decay;
    oracle_decay decay;
    bool decay_scaled;
    oracle_decay_form decay_form;
    bool lion;
    oracle_adam adam_form;
    bool adam_nesterov;
    double adam_eps, adam_beta1, adam_beta2;
    double adam_lr, adam_weight_decay;
    oracle_decay adam_decay;
    double clip_norm; /* 0: off */
    bool sum;         /* over the ranks, instead of their mean */
} oracle_preset;

/* The published recipes. */
extern const oracle_preset oracle_presets[];
extern const size_t oracle_preset_count;

/* The update direction, of M as it stands after the step. */
double oracle_direction(oracle_momentum form, bool nesterov, double mu, int64_t t, double m,
                        double g);
/* Momentum: *m is replaced, the update direction returned. t: from 1. */
double oracle_momentum_update(oracle_momentum form, bool nesterov, double mu, int64_t t, double *m,
                              double g);
/* AdamW's own part, without decay: m and v are replaced, what is subtracted from the parameter is
 * returned. */
double oracle_adam_update(const oracle_preset *preset, double lr, int64_t t, double *m, double *v,
                          double g);
/* Lion's: lr times a sign. */
double oracle_lion_update(const oracle_preset *preset, double lr, double *m, double g);
double oracle_scale_factor(oracle_scale scale, double r, double c);
/* NorMuon: u [r, c] in place, v [r] or [c] is replaced. */
void oracle_normuon(const oracle_preset *preset, double *u, int64_t r, int64_t c, double *v);
/* To nearest even, by way of fp32. */
double oracle_round(oracle_dtype dtype, double x);

typedef struct oracle_tensor {
    /* set by the caller */
    bool elementwise; /* AdamW */
    bool flatten; /* one matrix [shape[0], rest]; otherwise leading sizes are a batch of matrices */
    bool skip_if_null;
    int dims;
    int64_t shape[8];
    const int64_t *splits; /* heights of the matrices each [rows, cols] is cut into; NULL: one */
    size_t split_count;
    double lr_multiplier, decay_multiplier;
    int group;
    /* kept by the oracle; [count] */
    size_t count;
    double *w, *m, *v; /* of a matrix, v is the variance's */
} oracle_tensor;

typedef struct oracle {
    oracle_preset preset;
    bool fp32_params; /* parameters and the factor of the decay are rounded to fp32 where
                         decay_form has them stored */
    int64_t t;        /* steps taken */
    oracle_tensor *tensors;
    size_t tensor_count;
} oracle;

/* NaN: what stands in the preset; a group's value goes before the step's. */
typedef struct oracle_group {
    double lr, momentum, weight_decay;
} oracle_group;
typedef struct oracle_step_args {
    double lr, momentum, weight_decay, adam_lr, adam_weight_decay;
    double lr_factor, grad_scale;
    const oracle_group *groups;
    size_t group_count;
} oracle_step_args;

typedef struct oracle_outcome {
    bool skipped;
    double grad_norm, clip_factor;
} oracle_outcome;

oracle oracle_open(const oracle_preset *preset, bool fp32_params);
/* Copies w0 [count of the shape]. */
void oracle_add(oracle *o, const oracle_tensor *tensor, const float *w0);
/* grads[rank * tensor_count + tensor], NULL is zero (or leaves the tensor alone if all ranks' are,
 * and it asks for that). `args` may be NULL. */
oracle_outcome oracle_step(oracle *o, const oracle_step_args *args, const float *const *grads,
                           int ranks);
void oracle_close(oracle *o);

#endif
