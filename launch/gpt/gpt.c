#include "gpt.h"

#include <math.h>
#include <stdlib.h>

#include "counter.h"
#include "gpt_layers.h"

/* n positions at most, L layers, C width, T context, H heads; all carved from one block of the
 * layers' memory */
typedef struct activations {
    gpt_real *residual;   /* [L + 1, n, C]: what enters block l; the last leaves the blocks */
    gpt_real *middle;     /* [L, n, C]: after attention */
    gpt_real *attn_norm;  /* [L, n, C] */
    gpt_real *qkv;        /* [L, n, 3C] */
    gpt_real *probs;      /* [L, n/T, H, T, T] */
    gpt_real *attn;       /* [L, n, C]: before attn_out */
    gpt_real *mlp_norm;   /* [L, n, C] */
    gpt_real *up;         /* [L, n, 4C]: before GELU */
    gpt_real *gelu;       /* [L, n, 4C] */
    gpt_real *final_norm; /* [n, C] */
    gpt_real *logits;     /* [n, 256]: probabilities after forward, gradients after backward */
    gpt_real *mean;       /* [2 L + 1, n]: attn norm of l at 2 l, mlp norm at 2 l + 1, final norm */
    gpt_real *rstd;       /* [2 L + 1, n] */
    gpt_real *scratch;    /* the layers' own */
    /* backward only */
    gpt_real *d_residual; /* [n, C] */
    gpt_real *d_narrow;   /* [n, C] */
    gpt_real *d_wide;     /* [n, 4C] */
} activations;

struct gpt {
    const gpt_layers *layers; /* borrowed */
    gpt_shape shape;
    int sequences; /* the most there is room for */
    size_t tensor_count, parameter_count;
    gpt_tensor tensors[GPT_TENSOR_MAX];
    gpt_real *params, *grads, *block; /* own, as windows: in the layers' memory */
    activations a;
    unsigned char *windows; /* [sequences, T + 1], of the latest forward */
    int forward_sequences;
};

const char *gpt_shape_error(const gpt_shape *shape) {
    if (shape->layers < 1 || shape->width < 1 || shape->heads < 1 || shape->context < 1)
        return "layers, width, heads and context must be at least 1";
    if (shape->layers > 1024 || shape->width > 65536 || shape->context > 65536)
        return "layers, width or context is too large (1024, 65536, 65536)";
    if (shape->width % shape->heads)
        return "the width must be a multiple of the heads";
    return NULL;
}

/* ---- tensors ---- */

static void describe(gpt *model, size_t id, const char *name, muonshard_role role, int dims,
                     int64_t d0, int64_t d1, int64_t d2) {
    gpt_tensor *t = &model->tensors[id];
    *t = (gpt_tensor){.name = name, .role = role, .dims = dims, .shape = {d0, d1, d2}};
    t->entries = role == MUONSHARD_ROLE_MATRIX ? d0 : 1;
    t->count = (size_t)(d0 * (dims > 1 ? d1 : 1) * (dims > 2 ? d2 : 1));
    model->parameter_count += t->count;
    model->tensor_count++;
}

static void describe_all(gpt *model) {
    int64_t layers = model->shape.layers, width = model->shape.width;
    const muonshard_role matrix = MUONSHARD_ROLE_MATRIX, plain = MUONSHARD_ROLE_ELEMENTWISE;
    describe(model, GPT_TOKEN_EMBEDDING, "token_embedding", plain, 2, GPT_VOCABULARY, width, 0);
    describe(model, GPT_POSITION_EMBEDDING, "position_embedding", plain, 2, model->shape.context,
             width, 0);
    describe(model, GPT_ATTN_NORM, "blocks.attn_norm", plain, 2, layers, width, 0);
    describe(model, GPT_QKV, "blocks.qkv", matrix, 3, layers, 3 * width, width);
    describe(model, GPT_ATTN_OUT, "blocks.attn_out", matrix, 3, layers, width, width);
    describe(model, GPT_MLP_NORM, "blocks.mlp_norm", plain, 2, layers, width, 0);
    describe(model, GPT_MLP_UP, "blocks.mlp_up", matrix, 3, layers, 4 * width, width);
    describe(model, GPT_MLP_DOWN, "blocks.mlp_down", matrix, 3, layers, width, 4 * width);
    describe(model, GPT_FINAL_NORM, "final_norm", plain, 1, width, 0, 0);
    if (!model->shape.tied)
        describe(model, GPT_HEAD, "head", plain, 2, GPT_VOCABULARY, width, 0);
    gpt_tensor *qkv = &model->tensors[GPT_QKV];
    qkv->row_split_count = 3;
    for (int i = 0; i < 3; i++)
        qkv->row_splits[i] = width;
}

/* Entry l of a stack; l = 0 for what is no stack. */
static gpt_real *param(const gpt *model, size_t id, int l) {
    const gpt_tensor *t = &model->tensors[id];
    return t->param + (size_t)l * (t->count / (size_t)t->shape[0]);
}

static gpt_real *grad(const gpt *model, size_t id, int l) {
    return model->tensors[id].grad + (param(model, id, l) - model->tensors[id].param);
}

/* ---- memory ---- */

static gpt_real *allocate(gpt *model, size_t count) {
    return model->layers->alloc(model->layers->self, count * sizeof(gpt_real));
}

static bool allocate_activations(gpt *model) {
    activations *a = &model->a;
    size_t layers = (size_t)model->shape.layers, context = (size_t)model->shape.context;
    const attention_shape most = {model->sequences, model->shape.context, model->shape.heads,
                                  model->shape.width};
    size_t n = (size_t)model->sequences * context, plane = n * (size_t)model->shape.width;
    const struct {
        gpt_real **at;
        size_t count;
    } parts[] = {
        {&a->residual, (layers + 1) * plane},
        {&a->middle, layers * plane},
        {&a->attn_norm, layers * plane},
        {&a->qkv, layers * 3 * plane},
        {&a->probs, layers * n * (size_t)model->shape.heads * context},
        {&a->attn, layers * plane},
        {&a->mlp_norm, layers * plane},
        {&a->up, layers * 4 * plane},
        {&a->gelu, layers * 4 * plane},
        {&a->final_norm, plane},
        {&a->logits, n * GPT_VOCABULARY},
        {&a->mean, (2 * layers + 1) * n},
        {&a->rstd, (2 * layers + 1) * n},
        {&a->scratch, model->layers->scratch_count(&most)},
        {&a->d_residual, plane},
        {&a->d_narrow, plane},
        {&a->d_wide, 4 * plane},
    };
    const size_t part_count = sizeof parts / sizeof *parts, align = 64 / sizeof(gpt_real);
    size_t total = 0;
    for (size_t i = 0; i < part_count; i++)
        total += (parts[i].count + align - 1) / align * align;
    model->block = allocate(model, total);
    if (!model->block)
        return false;
    gpt_real *next = model->block;
    for (size_t i = 0; i < part_count; i++) {
        *parts[i].at = next;
        next += (parts[i].count + align - 1) / align * align;
    }
    return true;
}

static size_t windows_size(const gpt *model, int sequences) {
    return (size_t)sequences * ((size_t)model->shape.context + 1);
}

gpt *gpt_create(const gpt_shape *shape, int sequences, const gpt_layers *layers) {
    if (gpt_shape_error(shape) || sequences < 1)
        return NULL;
    gpt *model = calloc(1, sizeof *model);
    if (!model)
        return NULL;
    model->layers = layers;
    model->shape = *shape;
    model->sequences = sequences;
    describe_all(model);
    model->params = allocate(model, model->parameter_count);
    model->grads = allocate(model, model->parameter_count);
    model->windows = layers->alloc(layers->self, windows_size(model, sequences));
    if (!model->params || !model->grads || !model->windows || !allocate_activations(model)) {
        gpt_destroy(model);
        return NULL;
    }
    size_t at = 0;
    for (size_t i = 0; i < model->tensor_count; i++) {
        model->tensors[i].param = model->params + at;
        model->tensors[i].grad = model->grads + at;
        at += model->tensors[i].count;
    }
    gpt_init(model, 0);
    if (gpt_error(model)) {
        gpt_destroy(model);
        return NULL;
    }
    return model;
}

void gpt_destroy(gpt *model) {
    if (!model)
        return;
    void *const own[] = {model->params, model->grads, model->windows, model->block};
    for (size_t i = 0; i < sizeof own / sizeof *own; i++)
        model->layers->free(model->layers->self, own[i]);
    free(model);
}

const gpt_tensor *gpt_tensors(const gpt *model, size_t *count) {
    *count = model->tensor_count;
    return model->tensors;
}

size_t gpt_parameter_count(const gpt *model) {
    return model->parameter_count;
}

const char *gpt_error(const gpt *model) {
    return model->layers->error(model->layers->self);
}

/* ---- initial parameters ---- */

/* Element i of a stream: Box-Muller on two numbers of a counter. */
static double normal(uint64_t stream, uint64_t i) {
    double u = ((double)(counter_mix(stream + 2 * i) >> 11) + 0.5) * 0x1p-53;
    double v = ((double)(counter_mix(stream + 2 * i + 1) >> 11) + 0.5) * 0x1p-53;
    return sqrt(-2.0 * log(u)) * cos(6.283185307179586 * v);
}

/* Fan-in, which AdamW needs far more than Muon does: with 0.02 everywhere it stays on a plateau. */
static double initial_std(const gpt *model, size_t id) {
    const double fan_in = 1.0 / sqrt((double)model->shape.width);
    const double residual = 1.0 / sqrt(2.0 * model->shape.layers);
    switch (id) {
    case GPT_ATTN_OUT: return fan_in * residual;
    case GPT_MLP_DOWN: return 0.5 * fan_in * residual; /* its inputs are 4 C */
    case GPT_HEAD: return 0.02;
    default: return fan_in; /* embeddings likewise */
    }
}

void gpt_init(gpt *model, uint64_t seed) {
    enum { CHUNK = 4096 };
    const gpt_layers *k = model->layers;
    gpt_real chunk[CHUNK];
    for (size_t id = 0; id < model->tensor_count; id++) {
        gpt_tensor *t = &model->tensors[id];
        bool gain = id == GPT_ATTN_NORM || id == GPT_MLP_NORM || id == GPT_FINAL_NORM;
        double std = initial_std(model, id);
        uint64_t stream = counter_mix(counter_mix(seed) + id);
        for (size_t at = 0; at < t->count; at += CHUNK) {
            size_t count = t->count - at < CHUNK ? t->count - at : CHUNK;
            for (size_t i = 0; i < count; i++)
                chunk[i] = gain ? 1 : (gpt_real)(std * normal(stream, at + i));
            k->upload(k->self, t->param + at, chunk, count * sizeof *chunk);
        }
    }
    k->wait(k->self);
}

/* ---- forward ---- */

static attention_shape current(const gpt *model) {
    return (attention_shape){model->forward_sequences, model->shape.context, model->shape.heads,
                             model->shape.width};
}

static size_t head_id(const gpt *model) {
    return model->shape.tied ? GPT_TOKEN_EMBEDDING : GPT_HEAD;
}

/* Where layer l's part begins in an activation of `width` columns, which has room for all
 * sequences. */
static size_t at_layer(const gpt *model, int l, size_t width) {
    return (size_t)l * (size_t)model->sequences * (size_t)model->shape.context * width;
}

static void block_forward(gpt *model, int l) {
    const gpt_layers *k = model->layers;
    const activations *a = &model->a;
    attention_shape s = current(model);
    int n = s.sequences * s.context, width = s.width;
    size_t plane = at_layer(model, l, (size_t)width), row = at_layer(model, 1, 1);
    gpt_real *in = a->residual + plane, *middle = a->middle + plane;
    gpt_real *out = a->residual + at_layer(model, l + 1, (size_t)width);
    gpt_real *up = a->up + 4 * plane, *gelu = a->gelu + 4 * plane, *qkv = a->qkv + 3 * plane;
    gpt_real *mean = a->mean + 2 * (size_t)l * row, *rstd = a->rstd + 2 * (size_t)l * row;
    gpt_real *probs = a->probs + at_layer(model, l, (size_t)s.heads * (size_t)s.context);

    k->norm_forward(k->self, a->attn_norm + plane, mean, rstd, in, param(model, GPT_ATTN_NORM, l),
                    n, width);
    k->linear_forward(k->self, qkv, a->attn_norm + plane, param(model, GPT_QKV, l), NULL, n, width,
                      3 * width);
    k->attention_forward(k->self, a->attn + plane, probs, qkv, a->scratch, &s);
    k->linear_forward(k->self, middle, a->attn + plane, param(model, GPT_ATTN_OUT, l), in, n, width,
                      width);

    k->norm_forward(k->self, a->mlp_norm + plane, mean + row, rstd + row, middle,
                    param(model, GPT_MLP_NORM, l), n, width);
    k->linear_forward(k->self, up, a->mlp_norm + plane, param(model, GPT_MLP_UP, l), NULL, n, width,
                      4 * width);
    k->gelu_forward(k->self, gelu, up, 4 * (size_t)n * (size_t)width);
    k->linear_forward(k->self, out, gelu, param(model, GPT_MLP_DOWN, l), middle, n, 4 * width,
                      width);
}

double gpt_forward(gpt *model, const unsigned char *windows, int sequences) {
    const gpt_layers *k = model->layers;
    const activations *a = &model->a;
    int layers = model->shape.layers, width = model->shape.width;
    k->upload(k->self, model->windows, windows, windows_size(model, sequences));
    model->forward_sequences = sequences;
    attention_shape s = current(model);
    int n = s.sequences * s.context;
    size_t last = 2 * (size_t)layers * at_layer(model, 1, 1);

    k->embed_forward(k->self, a->residual, param(model, GPT_TOKEN_EMBEDDING, 0),
                     param(model, GPT_POSITION_EMBEDDING, 0), model->windows, &s);
    for (int l = 0; l < layers; l++)
        block_forward(model, l);
    k->norm_forward(k->self, a->final_norm, a->mean + last, a->rstd + last,
                    a->residual + at_layer(model, layers, (size_t)width),
                    param(model, GPT_FINAL_NORM, 0), n, width);
    k->linear_forward(k->self, a->logits, a->final_norm, param(model, head_id(model), 0), NULL, n,
                      width, GPT_VOCABULARY);
    return k->cross_entropy_forward(k->self, a->logits, model->windows, &s);
}

/* ---- backward ---- */

typedef struct announcer {
    gpt_ready_fn ready;
    void *user;
} announcer;

static void announce(const announcer *to, size_t tensor, int l) {
    if (to->ready)
        to->ready(to->user, tensor, l, 1);
}

/* d_residual: the gradient of the block's output on entry, of its input on return. */
static void block_backward(gpt *model, int l, const announcer *to) {
    const gpt_layers *k = model->layers;
    const activations *a = &model->a;
    attention_shape s = current(model);
    int n = s.sequences * s.context, width = s.width;
    size_t plane = at_layer(model, l, (size_t)width), row = at_layer(model, 1, 1);
    const gpt_real *mean = a->mean + 2 * (size_t)l * row, *rstd = a->rstd + 2 * (size_t)l * row;
    const gpt_real *probs = a->probs + at_layer(model, l, (size_t)s.heads * (size_t)s.context);

    k->linear_backward(k->self, a->d_wide, grad(model, GPT_MLP_DOWN, l), a->d_residual,
                       a->gelu + 4 * plane, param(model, GPT_MLP_DOWN, l), n, 4 * width, width);
    announce(to, GPT_MLP_DOWN, l);
    k->gelu_backward(k->self, a->d_wide, a->up + 4 * plane, 4 * (size_t)n * (size_t)width);
    k->linear_backward(k->self, a->d_narrow, grad(model, GPT_MLP_UP, l), a->d_wide,
                       a->mlp_norm + plane, param(model, GPT_MLP_UP, l), n, width, 4 * width);
    announce(to, GPT_MLP_UP, l);
    k->norm_backward(k->self, a->d_residual, grad(model, GPT_MLP_NORM, l), a->d_narrow,
                     a->middle + plane, param(model, GPT_MLP_NORM, l), mean + row, rstd + row, n,
                     width);
    if (l == 0)
        announce(to, GPT_MLP_NORM, 0);

    k->linear_backward(k->self, a->d_narrow, grad(model, GPT_ATTN_OUT, l), a->d_residual,
                       a->attn + plane, param(model, GPT_ATTN_OUT, l), n, width, width);
    announce(to, GPT_ATTN_OUT, l);
    k->attention_backward(k->self, a->d_wide, a->d_narrow, probs, a->qkv + 3 * plane, a->scratch,
                          &s);
    k->linear_backward(k->self, a->d_narrow, grad(model, GPT_QKV, l), a->d_wide,
                       a->attn_norm + plane, param(model, GPT_QKV, l), n, width, 3 * width);
    announce(to, GPT_QKV, l);
    k->norm_backward(k->self, a->d_residual, grad(model, GPT_ATTN_NORM, l), a->d_narrow,
                     a->residual + plane, param(model, GPT_ATTN_NORM, l), mean, rstd, n, width);
    if (l == 0)
        announce(to, GPT_ATTN_NORM, 0);
}

void gpt_backward(gpt *model, double scale, bool accumulate, gpt_ready_fn ready, void *user) {
    const gpt_layers *k = model->layers;
    const activations *a = &model->a;
    const announcer to = {ready, user};
    int layers = model->shape.layers, width = model->shape.width;
    attention_shape s = current(model);
    int n = s.sequences * s.context;
    size_t last = 2 * (size_t)layers * at_layer(model, 1, 1);

    if (!accumulate)
        k->zero(k->self, model->grads, model->parameter_count * sizeof *model->grads);
    k->cross_entropy_backward(k->self, a->logits, scale, model->windows, &s);
    k->linear_backward(k->self, a->d_narrow, grad(model, head_id(model), 0), a->logits,
                       a->final_norm, param(model, head_id(model), 0), n, width, GPT_VOCABULARY);
    if (!model->shape.tied)
        announce(&to, GPT_HEAD, 0);
    k->zero(k->self, a->d_residual, (size_t)n * (size_t)width * sizeof *a->d_residual);
    k->norm_backward(k->self, a->d_residual, grad(model, GPT_FINAL_NORM, 0), a->d_narrow,
                     a->residual + at_layer(model, layers, (size_t)width),
                     param(model, GPT_FINAL_NORM, 0), a->mean + last, a->rstd + last, n, width);
    announce(&to, GPT_FINAL_NORM, 0);
    for (int l = layers - 1; l >= 0; l--)
        block_backward(model, l, &to);
    k->embed_backward(k->self, grad(model, GPT_TOKEN_EMBEDDING, 0),
                      grad(model, GPT_POSITION_EMBEDDING, 0), a->d_residual, model->windows,
                      a->scratch, &s);
    announce(&to, GPT_POSITION_EMBEDDING, 0);
    announce(&to, GPT_TOKEN_EMBEDDING, 0);
}
