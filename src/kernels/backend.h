/* backend.h - where the numbers live and who computes: a table of operations over one memory and
 * two streams. The host backend runs each call to its end; a GPU backend enqueues. The record and
 * the flags in it are backend memory: kernels read them and do nothing on skip, so that the host
 * never has to wait to learn them. */
#ifndef BACKEND_H
#define BACKEND_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include "dtype.h"
#include "status.h"
#include "kernels/program.h"

/* Instruction sets of the host, from worst to best: a better one can do whatever those before can.
 * All but the first give the same bits, the first too where the build's baseline has fused
 * multiply-add. */
typedef enum host_isa {
    HOST_PORTABLE,
    HOST_AVX2, /* with FMA and F16C */
    HOST_AVX512,
    HOST_AVX512_BF16,
    HOST_ISA_COUNT
} host_isa;

typedef enum backend_stream { STREAM_COMPUTE, STREAM_COMM, STREAM_COUNT } backend_stream;

/* What all ranks agreed on for this step. Backend memory; written by `resolve`. */
typedef struct step_record {
    int32_t skip;      /* nothing may change */
    int32_t failed;    /* some rank had an error before the collectives: 1 + the lowest such */
    int32_t status;    /* of that rank; 0: its values differ from rank 0's */
    float grad_factor; /* multiplies the summed gradient: clip factor, grad_scale and 1/N in one */
    float clip_factor;
    double grad_norm;
    int64_t count; /* steps taken, this one included unless skipped: AdamW's t, and what stochastic
                      rounding is keyed by beside the seed */
} step_record;

typedef enum momentum_form {
    MOMENTUM_HEAVY_BALL,         /* M = mu M + G;        U = G + mu M with Nesterov, else M */
    MOMENTUM_HEAVY_BALL_SWAPPED, /* M = mu M + G;        U = M + mu G, else M */
    MOMENTUM_EMA,                /* M = mu M + (1-mu) G; U = (1-mu) G + mu M, else M */
    MOMENTUM_EMA_CORRECTED       /* M likewise; U = mu M/(1-mu^(t+1)) + (1-mu) G/(1-mu^t), else
                                    M/(1-mu^t); t from 1 */
} momentum_form;

typedef enum elementwise_rule { ELEMENTWISE_ADAMW, ELEMENTWISE_LION } elementwise_rule;

typedef enum adam_form {
    ADAM_EPS_OUTSIDE, /* W -= lr/c1 m / (sqrt(v)/sqrt(c2) + eps) */
    ADAM_EPS_INSIDE   /* W -= lr sqrt(c2)/c1 m / (sqrt(v) + eps) */
} adam_form;

/* What decay takes from W: d W. */
typedef enum decay_method {
    DECAY_DECOUPLED,          /* d = lr wd */
    DECAY_INDEPENDENT,        /* d = wd */
    DECAY_LR_SQUARED,         /* d = lr^2 wd */
    DECAY_L2,                 /* nothing: wd W is added to the gradient, before momentum */
    DECAY_CAUTIOUS,           /* decoupled, only where the update pulls W to zero, see below */
    DECAY_CAUTIOUS_LR_SQUARED /* lr_squared, likewise */
} decay_method;

typedef enum decay_form {
    DECAY_FORM_MULTIPLY,   /* W = (1-d) W - s U */
    DECAY_FORM_ADD,        /* W = W + (-d) W, then W - s U */
    DECAY_FORM_WITH_UPDATE /* W = W - (s U + d W) */
} decay_form;

typedef enum variance_denominator {
    VARIANCE_SQRT_PLUS_EPS, /* sqrt(v) + eps */
    VARIANCE_CLAMPED        /* sqrt(max(v, eps)) */
} variance_denominator;

/* What a step wants of one tensor; rewritten by every step. Multipliers, groups and the schedule
 * are in it. */
typedef struct tensor_values {
    double lr, momentum, weight_decay;
} tensor_values;

/* Common to the element-wise kernels. `values` and `active` are indexed by tensor. */
typedef struct kernel_context {
    const step_record *record;
    const tensor_values *values;
    const uint8_t *active; /* 0: no rank had a gradient and the tensor is to be left alone */
    /* How fp32 becomes a 16-bit parameter: to nearest even, or stochastically by (seed,
     * record->count, tensor, element): dtype.h. */
    bool stochastic;
    uint64_t seed;
} kernel_context;

/* dst [count] fp32 = sum over ranks of what each has sent, added in fp32 in rank order, so that
 * bits don't depend on transport. */
typedef struct sum_ranks_args {
    float *dst;
    const void *received; /* [ranks, count] of dtype, of which slot `rank` is not read */
    const void *own;      /* [count] of dtype: that slot */
    muonshard_dtype dtype;
    int ranks, rank;
    size_t count;
} sum_ranks_args;

typedef struct sum_squares_item { /* *out = sum of x^2 in fp64; not finite iff an x is not finite */
    const float *x;
    size_t count;
    double *out;
} sum_squares_item;

/* The agree words of all ranks, turned into the record and the active flags. A word is [stride]
 * fp64: 0 or the status of a failure, a flag a tensor (1: this rank had a gradient), sums of
 * squares, and what has to be equal on all ranks. Sums are added in the order of `sum_index`, so
 * that the norm doesn't depend on who owned what. */
typedef struct resolve_args {
    const double *words; /* [word_count, stride] */
    int word_count;
    size_t stride;
    size_t tensor_count;           /* flags at [1, 1 + tensor_count) */
    size_t equal;                  /* where in a word; a difference is a failure. 0: nowhere */
    const uint8_t *skip_if_absent; /* [tensor_count] */
    uint8_t *active;               /* [tensor_count], out */
    const size_t *sum_index;       /* [sum_count] into words */
    size_t sum_count;
    double *total;    /* [2] out: 0 or the status of a failure, sum of squares once scaled */
    double scale;     /* grad_scale and 1/N in one */
    double sum_scale; /* sqrt(sum) times it is the norm: `scale`, or 1 for totals of groups, each of
                         which has scaled its own */
    double clip_norm; /* 0: off */
    step_record *record; /* out, count carried on; NULL: only totals and flags are wanted */
} resolve_args;

typedef struct momentum_args {
    momentum_form form;
    bool nesterov;
    bool l2;               /* g = gradient + weight_decay W */
    muonshard_dtype dtype; /* of M: fp32 or bf16; U is made of M as it is stored */
} momentum_args;

typedef struct momentum_item {
    float *g_u;     /* [count] in: summed gradient, out: update direction U */
    void *momentum; /* [count] of args.dtype */
    const void *w;  /* [count] of w_dtype; read with l2 only */
    muonshard_dtype w_dtype;
    size_t count;
    int tensor;
    double *squares; /* NULL, or out: the sum of U^2 */
} momentum_item;

typedef struct orthogonalize_item {
    const float *u; /* [m, n], or [n, m] when transposed */
    void *out;      /* likewise, in the dtype ns_program_output names; may be u */
    bool transposed;
    const double *squares; /* NULL, or the sum of u^2, for who has a use for it */
} orthogonalize_item;

/* NorMuon: v = beta2 v + (1-beta2) mean(U^2) a row (by_rows; v is [rows]) or a column (v is
 * [cols]); factor_i = 1/denominator(v_i), all of them times one number that gives diag(factor) U
 * (or U diag(factor)) the Frobenius norm U has: F(U)/max(F(factor U), eps). U stays as it is. */
typedef struct variance_args {
    variance_denominator denominator;
    double beta2, eps;
} variance_args;

typedef struct variance_item {
    const void *u; /* [rows, cols] of u_dtype */
    muonshard_dtype u_dtype;
    float *v;      /* [rows] or [cols], state */
    float *factor; /* likewise, out */
    int64_t rows, cols;
    bool by_rows;
    int tensor;
} variance_item;

typedef struct apply_args {
    decay_method decay; /* cautious: where W U >= 0, zero included */
    decay_form form;
    bool scaled_lr; /* the lr in d is that of U: d is multiplied by the item's scale */
} apply_args;

/* W = (1 - d) W - lr scale U, or as args.form says. W is read from the master where there is one,
 * written to both. */
typedef struct apply_item {
    void *w; /* [rows, cols] of w_dtype */
    muonshard_dtype w_dtype;
    float *master; /* [rows, cols] or NULL */
    const void *u; /* [rows, cols] of u_dtype */
    muonshard_dtype u_dtype;
    const float *factor; /* NULL; or [rows] (by_rows) or [cols]: multiplies U */
    bool by_rows;
    int64_t rows, cols;
    double scale;
    int tensor;
    size_t first; /* element of the tensor that w[0] is: stochastic rounding */
} apply_item;

typedef struct adam_args {
    elementwise_rule rule;
    adam_form form;
    bool nesterov;
    double beta1, beta2, eps;
    decay_method decay; /* cautious: where update W > 0, strictly; l2: g += wd W */
} adam_args;

typedef struct adam_item {
    float *w;       /* [count] parameters of the shard, in and out */
    const float *g; /* [count] summed gradient */
    float *m, *v;   /* [count]; v is not used by Lion */
    size_t count;
    int tensor;
} adam_item;

typedef struct copy_item {
    void *dst;
    const void *src;
    size_t bytes;
} copy_item;

typedef struct convert_item {
    void *dst; /* [count] */
    muonshard_dtype dst_dtype;
    const void *src; /* [count], or NULL: zeros */
    muonshard_dtype src_dtype;
    size_t count;
    int tensor; /* stochastic rounding: whose element `first` dst[0] is */
    size_t first;
} convert_item;

/* The dtype U leaves a program in: fp32 unless it works in 16 bits. */
static inline muonshard_dtype ns_program_output(const ns_program *program) {
    return program->dtype == NS_BF16   ? MUONSHARD_BF16
           : program->dtype == NS_FP16 ? MUONSHARD_FP16
                                       : MUONSHARD_FP32;
}

typedef struct backend backend;

typedef struct backend_ops {
    const char *name;
    bool batched; /* wants all matrices of a batch in one call of orthogonalize */
    /* Zeroed memory. */
    muonshard_status (*alloc)(backend *self, void **memory, size_t bytes);
    void (*free)(backend *self, void *memory);
    /* Any direction; complete on return when either side is memory of the host. */
    muonshard_status (*copy)(backend *self, const copy_item *items, size_t count,
                             backend_stream stream);
    /* From one dtype to another. `context` NULL: always, to nearest even; otherwise nothing happens
     * on skip nor to inactive tensors, and fp32 becomes 16 bits as it says. */
    muonshard_status (*convert)(backend *self, const kernel_context *context,
                                const convert_item *items, size_t count, backend_stream stream);
    muonshard_status (*sum_ranks)(backend *self, const sum_ranks_args *args, backend_stream stream);
    muonshard_status (*sum_squares)(backend *self, const sum_squares_item *items, size_t count);
    muonshard_status (*resolve)(backend *self, const resolve_args *args);
    muonshard_status (*momentum)(backend *self, const kernel_context *context,
                                 const momentum_args *args, const momentum_item *items,
                                 size_t count);
    /* Workspace one call of orthogonalize needs for `count` matrices [m, n]. */
    size_t (*orthogonalize_workspace)(backend *self, const ns_program *program, int64_t m,
                                      int64_t n, size_t count);
    muonshard_status (*orthogonalize)(backend *self, const step_record *record,
                                      const ns_program *program, int64_t m, int64_t n,
                                      const orthogonalize_item *items, size_t count,
                                      void *workspace);
    muonshard_status (*variance)(backend *self, const kernel_context *context,
                                 const variance_args *args, const variance_item *items,
                                 size_t count);
    muonshard_status (*apply)(backend *self, const kernel_context *context, const apply_args *args,
                              const apply_item *items, size_t count);
    muonshard_status (*adam)(backend *self, const kernel_context *context, const adam_args *args,
                             const adam_item *items, size_t count);
    /* What `to` does next waits for what `from` has been given so far. */
    muonshard_status (*fence)(backend *self, backend_stream from, backend_stream to);
    void (*destroy)(backend *self);
} backend_ops;

/* Compute operations that follow each other, as one launch. */
typedef enum segment_mode {
    SEGMENT_RECORD,       /* what is given to the compute stream is recorded, and runs at the end */
    SEGMENT_RECORD_ALONE, /* is recorded and doesn't run */
    SEGMENT_DROP          /* an error came between: nothing is kept */
} segment_mode;

/* What a backend has beside when its streams run by themselves and its memory is not the host's.
 * None of these waits for the device, but for prepare by time. */
typedef struct stream_ops {
    /* Memory of the host that copy_async knows. Zeroed. */
    muonshard_status (*alloc_pinned)(backend *self, void **memory, size_t bytes);
    void (*free_pinned)(backend *self, void *memory);
    /* Kernels may work on it: it is this device's, or managed. */
    bool (*is_device)(backend *self, const void *memory);
    /* Memory of the host is pinned and stays as it is until the stream is past the copy. */
    muonshard_status (*copy_async)(backend *self, const copy_item *items, size_t count,
                                   backend_stream stream);
    /* A few bytes of the host's, which may change as soon as the call returns. */
    muonshard_status (*write)(backend *self, void *dst, const void *src, size_t bytes,
                              backend_stream stream);
    /* `stream` waits for what the caller's stream has been given so far; or the other way round. */
    muonshard_status (*join_from)(backend *self, void *native, backend_stream stream);
    muonshard_status (*join_to)(backend *self, void *native, backend_stream stream);
    /* Room for stamps [0, count). A stamp is passed when its stream gets there. */
    muonshard_status (*alloc_stamps)(backend *self, size_t count);
    muonshard_status (*stamp)(backend *self, size_t index, backend_stream stream);
    /* Of the latest stamp of this index. Errors of the device come out here. */
    muonshard_status (*stamp_passed)(backend *self, size_t index, bool *passed);
    /* What a stream, the caller's or one of `native`, is given next waits for the latest stamp of
     * this index. */
    muonshard_status (*wait_stamp)(backend *self, size_t index, void *native);
    /* From one stamp that is passed to another. */
    muonshard_status (*stamp_seconds)(backend *self, size_t from, size_t to, double *seconds);
    /* Room for segments [0, count), recorded between begin and end, each once: after that replay
     * runs it again, as often as wanted. What is recorded has run before as it is. */
    muonshard_status (*alloc_segments)(backend *self, size_t count);
    muonshard_status (*begin_segment)(backend *self);
    muonshard_status (*end_segment)(backend *self, size_t index, segment_mode mode);
    muonshard_status (*replay_segment)(backend *self, size_t index);
    void *(*native)(backend *self, backend_stream stream); /* cudaStream_t */
    /* Chooses what orthogonalize with the same arguments needs to have chosen. By time, it waits
     * for the device and writes to the workspace and to where the items want U. */
    muonshard_status (*prepare)(backend *self, const ns_program *program, int64_t m, int64_t n,
                                const orthogonalize_item *items, size_t count, void *workspace);
    /* All that was chosen as lines of text, the caller's to free; NULL if nothing was since it was
     * kept. And back: before prepare. ERR_CONFIG: of another device or library, or no such text. */
    muonshard_status (*choices)(backend *self, char **text);
    void (*choices_kept)(backend *self);
    muonshard_status (*take_choices)(backend *self, const char *text);
    /* For profilers: what is launched between begin and end. */
    void (*range_begin)(backend *self, const char *name);
    void (*range_end)(backend *self);
} stream_ops;

struct backend {
    const backend_ops *ops;
    const stream_ops *streams; /* NULL: every call runs to its end, in memory of the host */
    void *impl;
    int threads;          /* matrices that are worked on at a time, unless all of a batch are */
    size_t bytes;         /* of memory that is its own */
    int ordinal;          /* the device's number in this process */
    uint8_t device[16];   /* the device's unique name; zeros: none */
    char device_text[96]; /* what computes, for people */
    error_text error;
};

/* A few bytes into backend memory, in the stream's order. */
static inline muonshard_status backend_write(backend *self, void *dst, const void *src,
                                             size_t bytes, backend_stream stream) {
    if (self->streams)
        return self->streams->write(self, dst, src, bytes, stream);
    const copy_item item = {dst, src, bytes};
    return self->ops->copy(self, &item, 1, stream);
}

/* Matrices of a batch that one call of orthogonalize gets; between calls communication is tested.
 */
static inline size_t backend_at_once(const backend *self, size_t matrices) {
    const size_t threads = (size_t)self->threads;
    return self->ops->batched || matrices < threads ? matrices : threads;
}

typedef enum backend_choice { BACKEND_AUTO, BACKEND_HOST, BACKEND_CUDA } backend_choice;

/* What the host backend works with. */
typedef struct host_options {
    host_isa isa;
    int threads; /* the caller's included */
} host_options;

/* What the CUDA backend works with. */
typedef struct cuda_options {
    int local_rank;     /* among the ranks of this machine: the device, where several are visible */
    bool share;         /* ranks may share a device; then nothing overlaps on it */
    bool measures;      /* prepare chooses by time */
    int panels;         /* of symmetric products; 0: as many as pay */
    bool tiles;         /* 16-bit products are our own kernel's; only for sm_90 */
    bool deterministic; /* sums don't depend on how many matrices a batch has */
} cuda_options;

/* The best this processor has. */
host_isa host_isa_detect(void);
const char *host_isa_name(host_isa isa);

/* `auto` takes CUDA where it can be had; an explicit choice that can't be had is ERR_UNAVAILABLE.
 * `why` says in one line which was taken and why not the other. */
muonshard_status backend_open(backend_choice choice, host_options host, cuda_options cuda,
                              backend **out, error_text *error, char *why, size_t why_size);
void backend_close(backend *self);
/* ERR_UNAVAILABLE: this processor has no such instructions; ERR_MEMORY: also for threads. */
muonshard_status backend_open_host(host_options options, backend **out, error_text *error);
/* The CUDA plugin, libmuonshard_cuda.so, through its one entry symbol. ERR_UNAVAILABLE: no library,
 * no driver, no device. */
muonshard_status backend_open_cuda(cuda_options options, backend **out, error_text *error);

#endif
