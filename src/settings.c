#include "settings.h"

/* The presets: the published conventions named in docs, with orthogonalisation in fp32. Rows come
 * after `none` in any order; a row here is all that a new preset needs. */
#define PRESETS(X)                                                                                 \
    X(none, "adam.weight_decay=0.01") /* the table's defaults; its `auto` is for presets */        \
    X(jordan, "lr=0.02", "weight_decay=0", "decay=decoupled", "momentum=0.95",                     \
      "momentum_form=ema", "nesterov=true", "norm=frobenius_add", "norm_eps=1e-7",                 \
      "coefficients=simple", "coefficient_safety=1", "ns_steps=5", "ns_dtype=fp32",                \
      "ns_form=standard", "scale=shape", "scale_dims=last_two", "extra_scale=1", "adam.lr=3e-4",   \
      "adam.lr_scale=1", "adam.weight_decay=0", "adam.beta1=0.9", "adam.beta2=0.95",               \
      "adam.eps=1e-10", "adam.form=eps_outside")                                                   \
    X(moonlight, "lr=1e-3", "weight_decay=0.1", "decay=decoupled", "momentum=0.95",                \
      "momentum_form=heavy_ball", "nesterov=true", "norm=frobenius_add", "norm_eps=1e-7",          \
      "coefficients=simple", "coefficient_safety=1", "ns_steps=5", "ns_dtype=fp32",                \
      "ns_form=standard", "scale=rms", "scale_dims=first_two", "extra_scale=1", "adam.lr=auto",    \
      "adam.lr_scale=1", "adam.weight_decay=auto", "adam.beta1=0.9", "adam.beta2=0.95",            \
      "adam.eps=1e-8", "adam.form=eps_inside")                                                     \
    X(nvidia, "lr=3e-4", "weight_decay=0.01", "decay=decoupled", "momentum=0.95",                  \
      "momentum_form=ema", "nesterov=false", "norm=frobenius_max", "norm_eps=1e-7",                \
      "coefficients=quintic", "coefficient_safety=1", "ns_steps=5", "ns_dtype=fp32",               \
      "ns_form=standard", "scale=spectral", "scale_dims=flattened", "extra_scale=1",               \
      "adam.lr=3e-4", "adam.lr_scale=1", "adam.weight_decay=0.01", "adam.beta1=0.9",               \
      "adam.beta2=0.95", "adam.eps=1e-8", "adam.form=eps_outside")                                 \
    /* coefficient_safety 1.02 belongs to its fp16; fp32 drops it */                               \
    X(grouped_fp16, "lr=3e-4", "weight_decay=0.01", "decay=decoupled", "momentum=0.95",            \
      "momentum_form=heavy_ball", "nesterov=true", "norm=frobenius_add", "norm_eps=1e-7",          \
      "coefficients=simple", "coefficient_safety=1", "ns_steps=5", "ns_dtype=fp32",                \
      "ns_form=standard", "scale=rms", "scale_dims=flattened", "extra_scale=1", "adam.lr=auto",    \
      "adam.lr_scale=1", "adam.weight_decay=auto", "adam.beta1=0.9", "adam.beta2=0.95",            \
      "adam.eps=1e-8", "adam.form=eps_outside")                                                    \
    X(fan_ratio, "lr=0.02", "weight_decay=0", "decay=decoupled", "momentum=0.95",                  \
      "momentum_form=heavy_ball_swapped", "nesterov=true", "norm=frobenius_add", "norm_eps=1e-7",  \
      "coefficients=simple", "coefficient_safety=1", "ns_steps=5", "ns_dtype=fp32",                \
      "ns_form=standard", "scale=fan_ratio", "scale_dims=first_last", "extra_scale=1",             \
      "adam.lr=3e-4", "adam.lr_scale=1", "adam.weight_decay=0.01", "adam.beta1=0.9",               \
      "adam.beta2=0.95", "adam.eps=1e-8", "adam.form=eps_outside")

#define PRESET_ROW(name, ...) {#name, (const char *const[]){__VA_ARGS__, NULL}},
const preset preset_table[] = {PRESETS(PRESET_ROW)};
const size_t preset_count = sizeof preset_table / sizeof *preset_table;

#define PRESET_CHOICE(name, ...) "|" #name
#define PRESET_CHOICES           (&(PRESETS(PRESET_CHOICE))[1])

#define BOOL(name, field, initial, doc)                                                            \
    { name, MUONSHARD_PARAM_BOOL, offsetof(settings, field), initial, 0, 0, NULL, doc }
#define INT(name, field, initial, min, max, doc)                                                   \
    { name, MUONSHARD_PARAM_INT, offsetof(settings, field), initial, min, max, NULL, doc }
#define REAL(name, field, initial, min, max, doc)                                                  \
    { name, MUONSHARD_PARAM_REAL, offsetof(settings, field), initial, min, max, NULL, doc }
#define TEXT(name, field, initial, doc)                                                            \
    { name, MUONSHARD_PARAM_TEXT, offsetof(settings, field), initial, 0, 0, NULL, doc }
#define CHOICE(name, field, initial, choices, doc)                                                 \
    { name, MUONSHARD_PARAM_CHOICE, offsetof(settings, field), initial, 0, 0, choices, doc }

/* The words of a choice stand in the order of its enum. `preset` stays the first row. */
const muonshard_param settings_table[] = {
    CHOICE("preset", preset, "none", PRESET_CHOICES,
           "Published convention to start from; keys set explicitly go before it, in any order."),

    REAL("lr", lr, "1e-3", 0, 1e6, "Learning rate of matrices."),
    REAL("weight_decay", weight_decay, "0.1", 0, 1e6, "Weight decay wd of matrices."),
    CHOICE("decay", decay, "decoupled", "decoupled",
           "How matrices decay; decoupled: W -= lr wd W, with the unscaled lr."),
    REAL("momentum", momentum, "0.95", 0, 1, "Momentum factor mu of matrices."),
    CHOICE("momentum_form", momentum_form, "ema", "heavy_ball|heavy_ball_swapped|ema",
           "M = mu M + G (with Nesterov: U = G + mu M, or M + mu G when swapped), or "
           "M = mu M + (1-mu) G (with Nesterov: U = (1-mu) G + mu M)."),
    BOOL("nesterov", nesterov, "true", "Nesterov momentum; without it U = M."),
    CHOICE("norm", norm, "frobenius_max", "frobenius_add|frobenius_max",
           "Normalisation before Newton-Schulz: X/(F+eps) or X/max(F,eps), F the Frobenius norm."),
    REAL("norm_eps", norm_eps, "1e-7", 1e-30, 1, "eps of the normalisation."),
    CHOICE("coefficients", coefficients, "simple", "simple|quintic",
           "Newton-Schulz coefficients (a,b,c) a step: simple repeats (3.4445,-4.7750,2.0315), "
           "quintic cycles through five triples."),
    REAL("coefficient_safety", coefficient_safety, "1", 1, 2, "Divides a, b and c of each step."),
    INT("ns_steps", ns_steps, "5", 1, NS_MAX_STEPS, "Newton-Schulz steps."),
    CHOICE("ns_dtype", ns_dtype, "fp32", "fp32", "Working dtype of Newton-Schulz."),
    CHOICE("ns_form", ns_form, "standard", "standard",
           "standard: A = X X^T, B = b A + c A A, X = a X + B X."),
    CHOICE("scale", scale, "shape", "none|shape|ratio|spectral|rms|fan_ratio",
           "Factor of U for r rows and c columns: 1, sqrt(max(1,r/c)), sqrt(r/c), sqrt(max(r,c)), "
           "0.2 sqrt(max(r,c)), sqrt(max(r,c)/min(r,c))."),
    CHOICE("scale_dims", scale_dims, "flattened", "flattened|first_two|last_two|first_last",
           "Which sizes of a flattened tensor count as r and c in the scale."),
    REAL("extra_scale", extra_scale, "1", 0, 1e6, "Factor of U on top of the scale."),

    REAL("adam.lr", adam_lr, "auto", 0, 1e6,
         "Learning rate of element-wise tensors; auto: lr * adam.lr_scale."),
    REAL("adam.lr_scale", adam_lr_scale, "1", 0, 1e6,
         "Factor of lr that gives adam.lr where that is auto."),
    REAL("adam.weight_decay", adam_weight_decay, "auto", 0, 1e6,
         "Weight decay of element-wise tensors, W *= 1 - lr wd; auto: weight_decay; 0.01 without a "
         "preset."),
    REAL("adam.beta1", adam_beta1, "0.9", 0, 0.999999, "m = beta1 m + (1-beta1) g."),
    REAL("adam.beta2", adam_beta2, "0.999", 0, 0.999999, "v = beta2 v + (1-beta2) g^2."),
    REAL("adam.eps", adam_eps, "1e-8", 1e-30, 1, "eps of AdamW's denominator."),
    CHOICE("adam.form", adam_form, "eps_outside", "eps_outside|eps_inside",
           "Step lr/c1 m/(sqrt(v)/sqrt(c2)+eps), or lr sqrt(c2)/c1 m/(sqrt(v)+eps); "
           "c = 1 - beta^t."),

    REAL("clip_norm", clip_norm, "0", 0, 1e6,
         "Clips the whole gradient before momentum: factor min(1, clip_norm/(norm+1e-6)); 0: off."),
    CHOICE("reduce", reduce, "mean", "mean|sum|none",
           "How gradients of the ranks become one; none: the caller has reduced them already."),
    CHOICE("gather", gather, "updates", "updates",
           "What owners send to all ranks; updates: U as Newton-Schulz left it."),
    CHOICE("ownership", ownership, "round_robin", "round_robin",
           "Which rank computes a matrix; never changes the result."),
    INT("check_replicas", check_replicas, "0", 0, 1e9,
        "Compare the parameters of all ranks every so many steps; 0: off."),

    CHOICE("backend", backend, "auto", "auto|host|cuda",
           "Who computes; auto: cuda where it can be had, else host."),
    INT("bucket_bytes", bucket_bytes, "26214400", 1, 1099511627776.0,
        "Bytes of gradient a rank sends in one reduce-scatter group; at least one wave."),
    INT("batch_bytes", batch_bytes, "33554432", 1, 1099511627776.0,
        "Bytes of updates a rank owns in one Newton-Schulz batch; at least one wave."),
    REAL("timeout", timeout_s, "100", 0.001, 1e6, "Deadline of each wait in a step, seconds."),
    REAL("first_timeout", first_timeout_s, "300", 0.001, 1e6,
         "Deadline of each wait in the first step, seconds."),
    TEXT("trace", trace, "",
         "File for a Chrome trace of what ran, %r becomes the rank; empty: off."),
};
const size_t settings_table_count = sizeof settings_table / sizeof *settings_table;
