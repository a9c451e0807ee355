#include "settings.h"

/* What most published recipes have in common; a preset row says where it differs, for a later value
 * of a key goes before an earlier one. */
#define PUBLISHED                                                                                  \
    "weight_decay=0", "decay=decoupled", "decay_lr=base", "decay_form=multiply", "momentum=0.95",  \
        "momentum_schedule=", "momentum_form=ema", "nesterov=true", "norm=frobenius_add",          \
        "norm_eps=1e-7", "coefficients=simple", "coefficient_safety=1",                            \
        "coefficient_safety_form=factor", "coefficient_safety_for=all", "safety_last=true",        \
        "ns_steps=5", "ns_dtype=bf16", "ns_form=standard", "variance=none", "scale=shape",         \
        "scale_dims=flattened", "layout=out_in", "extra_scale=1", "elementwise=adamw",             \
        "adam.lr=auto", "adam.lr_scale=1", "adam.weight_decay=auto", "adam.beta1=0.9",             \
        "adam.beta2=0.95", "adam.eps=1e-8", "adam.form=eps_outside", "adam.nesterov=false",        \
        "adam.decay=decoupled"

/* The published conventions, as docs/algorithms.md names them. A row here is all that a new preset
 * needs; `none` comes first. */
#define PRESETS(X)                                                                                 \
    X(none, "adam.weight_decay=0.01") /* the table's defaults; its `auto` is for presets */        \
    X(jordan, PUBLISHED, "lr=0.02", "scale_dims=last_two", "adam.lr=3e-4", "adam.weight_decay=0",  \
      "adam.eps=1e-10")                                                                            \
    X(moonlight, PUBLISHED, "lr=1e-3", "weight_decay=0.1", "momentum_form=heavy_ball",             \
      "scale=rms", "scale_dims=first_two", "adam.form=eps_inside")                                 \
    X(torch, PUBLISHED, "lr=1e-3", "weight_decay=0.1", "norm=frobenius_max", "adam.lr=1e-3",       \
      "adam.weight_decay=0.01", "adam.beta2=0.999")                                                \
    X(nvidia, PUBLISHED, "lr=3e-4", "weight_decay=0.01", "nesterov=false", "norm=frobenius_max",   \
      "coefficients=quintic", "scale=spectral", "decay_form=add", "adam.lr=3e-4",                  \
      "adam.weight_decay=0.01")                                                                    \
    X(grouped_fp16, PUBLISHED, "lr=3e-4", "weight_decay=0.01", "momentum_form=heavy_ball",         \
      "coefficient_safety=1.02", "coefficient_safety_for=fp16", "ns_dtype=fp16", "scale=rms")      \
    X(fan_ratio, PUBLISHED, "lr=0.02", "momentum_form=heavy_ball_swapped", "ns_dtype=fp32",        \
      "scale=fan_ratio", "scale_dims=first_last", "adam.lr=3e-4", "adam.weight_decay=0.01")        \
    X(dion_repo, PUBLISHED, "lr=0.01", "weight_decay=0.01", "momentum_form=heavy_ball",            \
      "nesterov=false", "norm=frobenius_safety", "norm_eps=1e-8",                                  \
      "coefficients=polar_express_speedrun", "scale=ratio", "scale_dims=last_two")                 \
    X(gram, PUBLISHED, "lr=1e-3", "weight_decay=0.1", "momentum_form=heavy_ball",                  \
      "coefficients=polar_express", "coefficient_safety=1.05", "coefficient_safety_form=powers",   \
      "ns_dtype=fp16", "ns_form=gram", "scale=rms")                                                \
    X(speedrun, PUBLISHED, "lr=0.023", "weight_decay=1.2", "decay=cautious_lr_squared",            \
      "decay_lr=scaled", "momentum_schedule=0:0.85 300:0.95 end-50:0.95 end:0.85",                 \
      "norm=frobenius_safety", "norm_eps=1e-6", "coefficients=polar_express_speedrun",             \
      "variance=normuon", "variance_axis=auto", "variance_denominator=clamped",                    \
      "variance_beta2=0.9", "variance_eps=1e-10", "adam.lr=0.008", "adam.weight_decay=0.005",      \
      "adam.eps=1e-10", "adam.form=eps_inside", "adam.decay=cautious_lr_squared")                  \
    X(optax, PUBLISHED, "lr=1e-3", "momentum_form=ema_corrected", "norm_eps=1e-8",                 \
      "ns_dtype=param", "layout=in_out", "decay_form=with_update", "adam.weight_decay=0",          \
      "adam.beta2=0.999", "adam.nesterov=true")

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
#define LIST(name, field, initial, doc)                                                            \
    { name, MUONSHARD_PARAM_LIST, offsetof(settings, field), initial, 0, 0, NULL, doc }
#define CHOICE(name, field, initial, choices, doc)                                                 \
    { name, MUONSHARD_PARAM_CHOICE, offsetof(settings, field), initial, 0, 0, choices, doc }

/* The words of a choice stand in the order of its enum. `preset` stays the first row. */
const muonshard_param settings_table[] = {
    CHOICE("preset", preset, "none", PRESET_CHOICES,
           "Published convention to start from; keys set explicitly go before it, in any order."),

    REAL("lr", lr, "1e-3", 0, 1e6, "Learning rate of matrices."),
    TEXT("lr_schedule", lr_schedule, "",
         "Factor of lr and adam.lr over the steps: points step:value, linear between; cosine "
         "before a "
         "point; steps end and end-N with total_steps. Example: 0:0 100:1 cosine end:0.1."),
    REAL("weight_decay", weight_decay, "0.1", 0, 1e6, "Weight decay wd of matrices."),
    TEXT("weight_decay_schedule", weight_decay_schedule, "",
         "Factor of weight_decay and adam.weight_decay over the steps, written like lr_schedule."),
    CHOICE("decay", decay, "decoupled",
           "decoupled|independent|lr_squared|l2|cautious|cautious_lr_squared",
           "How matrices decay. W -= d W with d = lr wd, wd, or lr^2 wd; l2: G += wd W before "
           "momentum; cautious: as decoupled or lr_squared, only where W U >= 0."),
    CHOICE("decay_lr", decay_lr, "base", "base|scaled",
           "scaled: the lr in d is multiplied by the scale of the update."),
    CHOICE("decay_form", decay_form, "multiply", "multiply|add|with_update",
           "Rounding of the decay: W = (1-d) W - s U; W = W + (-d) W, then W - s U; or "
           "W = W - (s U + d W)."),
    REAL("momentum", momentum, "0.95", 0, 1, "Momentum factor mu of matrices."),
    TEXT("momentum_schedule", momentum_schedule, "",
         "Value of mu over the steps, written like lr_schedule; empty: momentum."),
    INT("total_steps", total_steps, "0", 0, 1e15,
        "Where `end` is in a schedule, in steps; 0: not known, points at `end` are left out."),
    CHOICE("momentum_form", momentum_form, "ema", "heavy_ball|heavy_ball_swapped|ema|ema_corrected",
           "M = mu M + G (with Nesterov: U = G + mu M, or M + mu G when swapped), or "
           "M = mu M + (1-mu) G (with Nesterov: U = (1-mu) G + mu M); ema_corrected divides M by "
           "1-mu^t (with Nesterov: U = mu M/(1-mu^(t+1)) + (1-mu) G/(1-mu^t))."),
    CHOICE("momentum_dtype", momentum_dtype, "fp32", "fp32|bf16",
           "Storage of momentum; U is made of M as it is stored."),
    BOOL("nesterov", nesterov, "true", "Nesterov momentum; without it U = M."),
    CHOICE("norm", norm, "frobenius_max",
           "frobenius_add|frobenius_max|frobenius_safety|aol|schatten4|spectral",
           "Normalisation before Newton-Schulz, F the Frobenius norm, A = X X^T: X/(F+eps), "
           "X/max(F,eps), X/(1.02F+eps), diag(1/sqrt(max(sum_j|A_ij|,eps))) X, "
           "X/sqrt(max(F(A),eps)), X/(largest singular value + eps)."),
    REAL("norm_eps", norm_eps, "auto", 1e-30, 1,
         "eps of the normalisation; auto: 1e-7, for schatten4 and spectral 1e-8."),
    CHOICE("coefficients", coefficients, "simple",
           "simple|quintic|you|polar_express|polar_express_nvidia|polar_express_speedrun|"
           "polar_express_computed|cans|turbo|aol4|deepseekv4|cubic5|custom",
           "Newton-Schulz coefficients (a,b,c) a step, by published name; computed: from "
           "polar_lower_bound and ns_steps; custom: custom_coefficients."),
    LIST("custom_coefficients", custom_coefficients, "",
         "Coefficients of `custom`: an item \"a,b,c\" a step."),
    CHOICE("coefficient_repeat", coefficient_repeat, "auto", "auto|cycle|repeat_last",
           "What steps beyond the last row of coefficients take; auto: as published, custom: "
           "repeat_last."),
    REAL("polar_lower_bound", polar_lower_bound, "1e-3", 1e-10, 0.999,
         "Smallest singular value polar_express_computed is made for, relative to the largest."),
    REAL("coefficient_safety", coefficient_safety, "1", 1, 2,
         "Safety s of the coefficients, see coefficient_safety_form."),
    CHOICE("coefficient_safety_form", coefficient_safety_form, "factor", "factor|powers",
           "(a,b,c)/s, or (a/s, b/s^3, c/s^5)."),
    CHOICE("coefficient_safety_for", coefficient_safety_for, "all", "all|fp16",
           "Working dtypes the safety is for."),
    BOOL("safety_last", safety_last, "true", "The last row of the sequence has the safety too."),
    CHOICE(
        "coefficient_check", coefficient_check, "on", "on|off",
        "Refuse coefficients that, with the rounding of ns_dtype, can flip or blow up a singular "
        "value in [1e-3, 1+2u]."),
    INT("ns_steps", ns_steps, "5", 1, NS_MAX_STEPS, "Newton-Schulz steps."),
    CHOICE("ns_dtype", ns_dtype, "fp32", "fp32|tf32|bf16|fp16|param",
           "Working dtype of Newton-Schulz: results are stored in it, products accumulate in fp32; "
           "param: the parameter's. Updates travel in it."),
    CHOICE(
        "ns_form", ns_form, "auto", "standard|gram|auto",
        "standard: A = X X^T, B = b A + c A A, X = a X + B X; gram: the same polynomial on X X^T, "
        "of bf16 in fp32; auto: gram where there are 1.5 times as many columns as rows, or more, "
        "and it costs less."),
    TEXT("gram_restarts", gram_restarts, "auto",
         "Steps, counted from 0 and separated by commas, before which the Gram form starts again "
         "from "
         "X; auto: planned in fp64; empty: none."),
    CHOICE(
        "variance", variance, "none", "none|normuon",
        "normuon: U is divided by the root of a running mean of U^2 a row or column, and brought "
        "back to its norm."),
    CHOICE("variance_axis", variance_axis, "rows", "rows|auto",
           "Means over columns, one a row; auto: one a row where r >= c, else one a column."),
    CHOICE("variance_denominator", variance_denominator, "sqrt_plus_eps", "sqrt_plus_eps|clamped",
           "sqrt(v) + eps, or sqrt(max(v, eps))."),
    REAL("variance_beta2", variance_beta2, "0.95", 0, 0.999999,
         "v = beta2 v + (1-beta2) mean(U^2)."),
    REAL("variance_eps", variance_eps, "1e-10", 1e-30, 1, "eps of the variance's denominator."),
    CHOICE("scale", scale, "shape", "none|shape|ratio|spectral|rms|fan_ratio",
           "Factor of U for r rows and c columns: 1, sqrt(max(1,r/c)), sqrt(r/c), sqrt(max(r,c)), "
           "0.2 sqrt(max(r,c)), sqrt(max(r,c)/min(r,c))."),
    CHOICE("scale_dims", scale_dims, "flattened", "flattened|first_two|last_two|first_last",
           "Which sizes of a flattened tensor count as r and c in the scale."),
    CHOICE("layout", layout, "out_in", "out_in|in_out",
           "How arrays lie; in_out (optax): r is the number of columns, c of rows."),
    REAL("extra_scale", extra_scale, "1", 0, 1e6, "Factor of U on top of the scale."),

    CHOICE("elementwise", elementwise, "adamw", "adamw|lion",
           "Rule of element-wise tensors; lion: u = sign(b1 m + (1-b1) g), m = b2 m + (1-b2) g, "
           "W -= lr u, with lr, decay and betas of `adam`."),
    REAL("adam.lr", adam_lr, "auto", 0, 1e6,
         "Learning rate of element-wise tensors; auto: lr * adam.lr_scale."),
    REAL("adam.lr_scale", adam_lr_scale, "1", 0, 1e6,
         "Factor of lr that gives adam.lr where that is auto."),
    REAL("adam.weight_decay", adam_weight_decay, "auto", 0, 1e6,
         "Weight decay of element-wise tensors; auto: weight_decay; 0.01 without a preset."),
    REAL("adam.beta1", adam_beta1, "0.9", 0, 0.999999, "m = beta1 m + (1-beta1) g."),
    REAL("adam.beta2", adam_beta2, "0.999", 0, 0.999999, "v = beta2 v + (1-beta2) g^2."),
    REAL("adam.eps", adam_eps, "1e-8", 1e-30, 1, "eps of AdamW's denominator."),
    CHOICE("adam.form", adam_form, "eps_outside", "eps_outside|eps_inside",
           "Step lr/c1 m/(sqrt(v)/sqrt(c2)+eps), or lr sqrt(c2)/c1 m/(sqrt(v)+eps); "
           "c = 1 - beta^t."),
    BOOL("adam.nesterov", adam_nesterov, "false",
         "beta1 m/(1-beta1^(t+1)) + (1-beta1) g/c1 in the place of m/c1."),
    CHOICE("adam.decay", adam_decay, "decoupled",
           "decoupled|independent|lr_squared|l2|cautious|cautious_lr_squared",
           "How element-wise tensors decay, as `decay`; cautious: only where update W > 0."),

    REAL("clip_norm", clip_norm, "0", 0, 1e6,
         "Clips the whole gradient before momentum: factor min(1, clip_norm/(norm+1e-6)); 0: off."),
    CHOICE("reduce", reduce, "mean", "mean|sum|none",
           "How gradients of the ranks become one; none: the caller has reduced them already."),
    CHOICE("gather", gather, "auto", "auto|updates|params",
           "What owners of matrices send to all ranks: U as Newton-Schulz left it, or the new "
           "parameters; auto: params for 16-bit parameters, else updates."),
    CHOICE(
        "master", master, "auto", "auto|owner|replicated|none",
        "Who keeps 16-bit parameters in fp32: their owner (with gather params), every rank "
        "(with gather updates), or nobody (with stochastic rounding); auto: none with stochastic "
        "rounding, else owner."),
    CHOICE(
        "init_master", init_master, "refuse", "refuse|from_params",
        "Masters that a checkpoint hasn't: it is refused, or they are made from the parameters."),
    CHOICE(
        "rounding", rounding, "nearest", "nearest|stochastic",
        "How fp32 becomes a 16-bit parameter; stochastic: keyed by seed, step, tensor and element, "
        "the same at any number of ranks."),
    INT("seed", seed, "0", 0, 9e15, "Seed of stochastic rounding."),
    CHOICE("ownership", ownership, "round_robin", "round_robin|balanced",
           "Which rank computes a matrix: by turns, or the most costly first to the least loaded; "
           "never changes the result."),
    INT("check_replicas", check_replicas, "0", 0, 1e9,
        "Compare the parameters of all ranks every so many steps; 0: off."),

    CHOICE("backend", backend, "auto", "auto|host|cuda",
           "Who computes; auto: cuda where it can be had, else host."),
    CHOICE("comm", comm, "auto", "auto|self|mpi|nccl",
           "What moves tensors between ranks; auto: nccl on GPUs where it can be had, else the "
           "communicator the program came with; mpi on GPUs: through pinned memory of the host."),
    BOOL("share_gpu", share_gpu, "false",
         "Several ranks may use one GPU, without overlap; for tests, not for speed."),
    BOOL("deterministic", deterministic, "false",
         "Over NCCL gradients are exchanged and summed in rank order: bits as over MPI at any "
         "number "
         "of ranks; otherwise NCCL sums fp32 itself, in an order of its own. Products of our own "
         "(gemm_kernels) are not cut along the depth."),
    BOOL("cuda_graphs", cuda_graphs, "true",
         "What a GPU computes between two collectives, or up to where parameters are applied, is "
         "launched as one CUDA graph."),
    CHOICE(
        "gemm_kernels", gemm_kernels, "cublaslt", "cublaslt|hopper",
        "Whose kernels multiply in Newton-Schulz on a GPU. hopper: programs in bf16 or fp16 alone "
        "(not bf16 in the Gram form), of matrices whose sides are multiples of 8, through a "
        "kernel of ours for sm_90, which makes half of a symmetric result; not run on a card "
        "yet. All others, and cublaslt: cuBLASLt."),
    CHOICE("gemm_choice", gemm_choice, "proposed", "proposed|measured",
           "Which of cuBLASLt's algorithms multiplies in Newton-Schulz, and how products of our "
           "own kernel are cut, chosen once a shape, at commit: the first it proposes and what a "
           "model has, or the fastest of those, which takes seconds and may come out otherwise "
           "the next time, unless gemm_table keeps it."),
    TEXT("gemm_table", gemm_table, "",
         "File of chosen algorithms, read at commit and written when there are new ones; %r "
         "becomes the rank; it is of one gemm_choice, one kind of GPU and one version of cuBLASLt. "
         "Empty: "
         "none."),
    INT("symmetric_panels", symmetric_panels, "0", 0, 16,
        "Panels a symmetric product is made of on a GPU, each up to the diagonal; 1: whole; 0: as "
        "many as take the least time by a model."),
    INT("threads", threads, "0", 0, 4096,
        "Threads of a rank on the host, a matrix each; 0: the cores the rank may run on, divided "
        "among the ranks that may run on them."),
    CHOICE("instructions", instructions, "auto", "auto|portable|avx2|avx512|avx512_bf16",
           "Instructions of the host's kernels; auto: the best that every rank has."),
    INT("bucket_bytes", bucket_bytes, "26214400", 1, 1099511627776.0,
        "Bytes of gradient a rank sends in one reduce-scatter group; at least one wave."),
    INT("batch_bytes", batch_bytes, "0", 0, 1099511627776.0,
        "Bytes of updates a rank owns in one Newton-Schulz batch, as fp32; at least one wave. "
        "0: 32 MiB on the host; on a GPU 256 MiB, but at most 2 GiB of all ranks together."),
    REAL("timeout", timeout_s, "100", 0.001, 1e6, "Deadline of each wait in a step, seconds."),
    REAL("first_timeout", first_timeout_s, "300", 0.001, 1e6,
         "Deadline of each wait in the first step, seconds."),
    REAL("save_timeout", save_timeout_s, "600", 0.001, 1e6,
         "Deadline of each wait in saving and loading a checkpoint, seconds."),
    TEXT("trace", trace, "",
         "File for a Chrome trace of what ran, %r becomes the rank; empty: off."),
};
const size_t settings_table_count = sizeof settings_table / sizeof *settings_table;
