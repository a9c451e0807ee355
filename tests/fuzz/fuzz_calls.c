/* Calls of the public interface in any order, decoded from the bytes: each a number of what to call
 * and numbers for its arguments, sound and unsound. Pointers are what they are said to be, for
 * nobody can check those; buffers end where they should, and the address sanitizer sees it. */
#include <math.h>
#include <string.h>

#include "fuzz.h"

enum { MOST_CALLS = 48, MOST_TENSORS = 6, MOST_ELEMENTS = 512 };

typedef struct buffers {
    int id; /* -1: it was refused */
    muonshard_role role;
    muonshard_dtype dtype, grad_dtype;
    size_t bytes, grad_bytes;
    void *param, *before;  /* [bytes], before: as it was before the step under way */
    void *grads[2];        /* [grad_bytes] */
    void *grads_before[2]; /* what has to be there still */
    bool finite[2], is[2]; /* finite; the one in use */
} buffers;

typedef struct session {
    const uint8_t *at, *end; /* what is left of the input */
    muonshard_comm *comm;
    muonshard_config *config;
    muonshard_optimizer *optimizer; /* or NULL */
    bool committed;
    bool tame; /* no value so far that can make a parameter infinite */
    buffers tensors[MOST_TENSORS];
    int tensor_count;
    bool directory; /* for checkpoints: it was emptied for this input */
    void *image;    /* own, [image_bytes]: of some state; or NULL */
    size_t image_bytes;
} session;

/* ---- numbers from bytes ---- */

static uint8_t byte(session *s) {
    return s->at < s->end ? *s->at++ : 0;
}

static int64_t odd_number(session *s) {
    static const int64_t odd[] = {0, 1, 2, 3, 4, -1, 100, INT64_MAX, INT64_MIN, INT32_MAX};
    return odd[byte(s) % (sizeof odd / sizeof *odd)];
}

/* Mostly NaN: as configured. */
static double odd_value(session *s) {
    static const double sound[] = {NAN, NAN, NAN, 0.0, 0.01, 0.5, 1.0, 1e-30};
    static const double wild[] = {-1.0, 1e6, 1e300, INFINITY, -INFINITY, -0.0, 1e-300, 1000.0};
    const uint8_t b = byte(s);
    if (b < 192)
        return sound[b % 8];
    s->tame = false;
    return wild[b % 8];
}

/* Of a struct that was there in some version, or of none. */
static size_t odd_size(session *s, size_t size) {
    const size_t sizes[] = {0, 1, sizeof(size_t), size, size + 8, 4096, 4097, SIZE_MAX};
    const uint8_t b = byte(s);
    return b < 224 ? size : sizes[b % 8];
}

/* ---- what has to hold after every call ---- */

static bool is_finite(const void *data, size_t bytes, muonshard_dtype dtype) {
    const uint32_t *words = data;
    const uint16_t *halves = data;
    if (dtype == MUONSHARD_FP32) {
        for (size_t i = 0; i < bytes / 4; i++)
            if ((words[i] & 0x7f800000U) == 0x7f800000U)
                return false;
        return true;
    }
    const unsigned exponent = dtype == MUONSHARD_BF16 ? 0x7f80U : 0x7c00U;
    for (size_t i = 0; i < bytes / 2; i++)
        if ((halves[i] & exponent) == exponent)
            return false;
    return true;
}

static muonshard_status outcome(session *s, muonshard_status status) {
    fuzz_status(status, muonshard_last_error(s->optimizer));
    /* One rank waits for nobody. */
    FUZZ_CHECK(status != MUONSHARD_ERR_TIMEOUT && status != MUONSHARD_ERR_COMM &&
               status != MUONSHARD_ERR_INTERNAL && status != MUONSHARD_ERR_MISMATCH);
    for (int i = 0; i < s->tensor_count; i++) {
        const buffers *b = &s->tensors[i];
        for (int k = 0; k < 2; k++)
            FUZZ_CHECK(memcmp(b->grads[k], b->grads_before[k], b->grad_bytes) == 0);
        if (b->id < 0 || b->role == MUONSHARD_ROLE_FROZEN)
            FUZZ_CHECK(memcmp(b->param, b->before, b->bytes) == 0);
        if (s->tame)
            FUZZ_CHECK(is_finite(b->param, b->bytes, b->dtype));
    }
    return status;
}

static void keep_params(session *s) {
    for (int i = 0; i < s->tensor_count; i++)
        memcpy(s->tensors[i].before, s->tensors[i].param, s->tensors[i].bytes);
}

static void check_unchanged(const session *s) {
    for (int i = 0; i < s->tensor_count; i++)
        FUZZ_CHECK(memcmp(s->tensors[i].before, s->tensors[i].param, s->tensors[i].bytes) == 0);
}

/* ---- tensors ---- */

static size_t element_bytes(muonshard_dtype dtype) {
    return dtype == MUONSHARD_FP32 ? 4 : 2;
}

/* 0: refused by every reader of the shape. Leaves shapes whose size is what they say and small, or
 * that have a size no tensor can have. */
static size_t read_shape(session *s, muonshard_tensor_desc *d) {
    static const int64_t wrong[] = {0, -1, INT64_MIN, INT64_MAX, (int64_t)1 << 62};
    size_t elements = 1;
    d->dims = byte(s) % 16;
    d->dims = d->dims > 10 ? -1 : d->dims;
    for (int i = 0; i < d->dims && i < MUONSHARD_MAX_DIMS; i++) {
        const uint8_t b = byte(s);
        d->shape[i] = 1 + b % 16;
        if (elements * (size_t)d->shape[i] > MOST_ELEMENTS)
            d->shape[i] = 1;
        elements *= (size_t)d->shape[i];
        if (b >= 248)
            d->shape[i] = wrong[b % 5];
        if (b >= 248)
            return 0;
    }
    return d->dims < 0 || d->dims > MUONSHARD_MAX_DIMS ? 0 : elements;
}

/* Of the dtype's numbers: zeros, small ones, one that isn't finite, large ones. */
static bool fill(session *s, void *data, size_t bytes, muonshard_dtype dtype) {
    const uint8_t kind = byte(s), seed = byte(s);
    uint16_t *halves = data;
    memset(data, 0, bytes);
    if (kind < 16)
        return true;
    for (size_t i = 0; i < bytes / element_bytes(dtype); i++) {
        const double small = (double)((i * 37 + seed) % 64) / 32.0 - 1.0;
        if (dtype == MUONSHARD_FP32) {
            const float value = (float)(kind > 240 ? small * 1e30 : small);
            memcpy((char *)data + 4 * i, &value, 4);
        } else { /* a sign, an exponent next to that of 1, and some digits */
            const unsigned one = dtype == MUONSHARD_BF16 ? 0x3f80U : 0x3c00U;
            halves[i] = (uint16_t)(one - 0x40U * (i % 3) + (i + seed) % 16 + (i % 2 ? 0x8000U : 0));
        }
    }
    if (kind < 224 || kind > 240)
        return true;
    const size_t last = bytes / element_bytes(dtype) - 1;
    static const uint32_t words[] = {0x7fc00000U, 0x7f800000U, 0xff800000U};
    static const uint16_t bf16[] = {0x7fc0, 0x7f80, 0xff80}, fp16[] = {0x7e00, 0x7c00, 0xfc00};
    if (dtype == MUONSHARD_FP32)
        memcpy((char *)data + 4 * last, &words[kind % 3], 4);
    else
        halves[last] = dtype == MUONSHARD_BF16 ? bf16[kind % 3] : fp16[kind % 3];
    return false;
}

static void *copy_of(const void *data, size_t bytes) {
    void *copy = malloc(bytes);
    FUZZ_CHECK(copy);
    memcpy(copy, data, bytes);
    return copy;
}

static void make_buffers(session *s, buffers *b, size_t elements) {
    b->bytes = elements * element_bytes(b->dtype);
    b->grad_bytes = elements * element_bytes(b->grad_dtype);
    b->param = malloc(b->bytes);
    FUZZ_CHECK(b->param);
    const uint8_t *at = s->at, tame_bytes[] = {20, 1};
    s->at = tame_bytes; /* parameters are small */
    const uint8_t *end = s->end;
    s->end = tame_bytes + 2;
    fill(s, b->param, b->bytes, b->dtype);
    s->at = at;
    s->end = end;
    b->before = copy_of(b->param, b->bytes);
    for (int k = 0; k < 2; k++) {
        b->grads[k] = malloc(b->grad_bytes);
        FUZZ_CHECK(b->grads[k]);
        b->finite[k] = fill(s, b->grads[k], b->grad_bytes, b->grad_dtype);
        b->grads_before[k] = copy_of(b->grads[k], b->grad_bytes);
    }
}

static void free_buffers(buffers *b) {
    for (int k = 0; k < 2; k++) {
        free(b->grads[k]);
        free(b->grads_before[k]);
    }
    free(b->param);
    free(b->before);
}

static const char *odd_name(session *s) {
    static char of[4] = "a", longest[3000];
    memset(longest, 'x', sizeof longest - 1);
    const uint8_t b = byte(s);
    of[0] = (char)('a' + b % 16);
    return b < 240 ? of : b < 246 ? longest : b < 251 ? "" : b < 253 ? "a\n\x1b[31m\xff" : NULL;
}

static muonshard_dtype dtype_of(session *s) {
    const uint8_t b = byte(s);
    return b < 250 ? (muonshard_dtype)(b % 3) : (muonshard_dtype)(b - 250 + 3);
}

static void add_tensor(session *s) {
    muonshard_tensor_desc d = MUONSHARD_TENSOR_DESC_INIT;
    int64_t splits[3];
    int id = -1;
    if (s->tensor_count == MOST_TENSORS)
        return;
    buffers *b = &s->tensors[s->tensor_count];
    *b = (buffers){.id = -1};
    d.name = odd_name(s);
    const uint8_t kinds = byte(s);
    d.role = (muonshard_role)(kinds % 8 ? 1 + kinds % 3 : kinds % 5);
    d.form = (muonshard_matrix_form)(kinds > 250 ? 7 : kinds / 16 % 2);
    d.dtype = dtype_of(s);
    d.grad_dtype = byte(s) % 2 ? MUONSHARD_DTYPE_OF_PARAM : dtype_of(s);
    const bool known = (unsigned)d.dtype < 3 && d.grad_dtype < 3;
    const size_t elements = read_shape(s, &d);
    const uint8_t policy = byte(s);
    d.null_grad = (muonshard_null_grad)(policy > 250 ? 9 : policy % 3);
    d.row_split_count = policy / 3 % 4;
    for (size_t i = 0; i < 3; i++)
        splits[i] = d.row_split_count ? odd_number(s) : 0;
    d.row_splits = policy > 240 ? NULL : splits;
    if (policy / 12 % 4 == 0) {
        d.lr_multiplier = odd_value(s);
        d.decay_multiplier = odd_value(s);
        d.group = (int)odd_number(s);
        d.priority = (int)odd_number(s);
        d.priority_stride = (int)odd_number(s);
    }
    b->role = d.role;
    b->dtype = known ? d.dtype : MUONSHARD_FP32;
    b->grad_dtype = !known                                     ? MUONSHARD_FP32
                    : d.grad_dtype == MUONSHARD_DTYPE_OF_PARAM ? d.dtype
                                                               : d.grad_dtype;
    make_buffers(s, b, elements ? elements : 1);
    const uint8_t pointers = byte(s);
    d.param = pointers == 255 ? NULL : pointers == 254 ? s->tensors[0].param : b->param;
    d.grad = pointers < 16 ? NULL : b->grads[0];
    b->is[0] = d.grad != NULL;
    d.size = odd_size(s, sizeof d);
    s->tensor_count++;
    const muonshard_status status =
        outcome(s, muonshard_add_tensor(s->optimizer, &d, byte(s) == 255 ? NULL : &id));
    FUZZ_CHECK(status == MUONSHARD_ERR_ARGUMENT || status == MUONSHARD_ERR_STATE ||
               status == MUONSHARD_ERR_UNSUPPORTED || status == MUONSHARD_ERR_CONFIG ||
               status == MUONSHARD_OK);
    FUZZ_CHECK(status != MUONSHARD_OK || (elements && known && d.size >= sizeof d));
    b->id = status == MUONSHARD_OK ? id : -1;
    if (status == MUONSHARD_OK) /* numbered from 0, the refused ones left out */
        for (int i = b->id = 0; i < s->tensor_count - 1; i++)
            b->id += s->tensors[i].id >= 0;
    FUZZ_CHECK(id < 0 || id == b->id);
}

/* One of the tensors, a number mostly within. */
static int odd_id(session *s) {
    const uint8_t b = byte(s);
    return b < 240 ? b % (s->tensor_count ? s->tensor_count : 1) : (int)odd_number(s);
}

static void set_grad(session *s) {
    const int id = odd_id(s), k = byte(s) % 3;
    buffers *b = NULL;
    for (int i = 0; i < s->tensor_count; i++)
        if (s->tensors[i].id == id)
            b = &s->tensors[i];
    const void *grad = b && k < 2 ? b->grads[k] : NULL;
    if (outcome(s, muonshard_set_grad(s->optimizer, id, grad)) == MUONSHARD_OK) {
        FUZZ_CHECK(b);
        b->is[0] = k == 0;
        b->is[1] = k == 1;
    }
}

/* ---- the optimizer ---- */

static void forget_tensors(session *s) {
    for (int i = 0; i < s->tensor_count; i++)
        free_buffers(&s->tensors[i]);
    s->tensor_count = 0;
}

static void destroy(session *s) {
    muonshard_destroy(s->optimizer);
    s->optimizer = NULL;
    s->committed = false;
    forget_tensors(s);
}

static void create(session *s) {
    muonshard_options options = MUONSHARD_OPTIONS_INIT;
    const uint8_t b = byte(s);
    destroy(s);
    options.size = odd_size(s, sizeof options);
    options.agree_comm = b % 8 == 1 ? s->comm : NULL;
    muonshard_optimizer **out = b == 255 ? NULL : &s->optimizer;
    const muonshard_status status =
        muonshard_create(s->comm, b == 254 ? NULL : s->config, b % 2 ? &options : NULL, out);
    fuzz_status(status, muonshard_comm_last_error(s->comm));
    FUZZ_CHECK((status == MUONSHARD_OK) == (s->optimizer != NULL));
}

static void commit(session *s) {
    const uint8_t b = byte(s);
    const muonshard_sync_params sync = (muonshard_sync_params)(b < 250 ? b % 3 : b);
    if (outcome(s, muonshard_commit(s->optimizer, sync)) == MUONSHARD_OK)
        s->committed = true;
}

static void grad_ready(session *s) {
    const int id = odd_id(s);
    const int64_t first = odd_number(s), count = odd_number(s);
    outcome(s, muonshard_grad_ready(s->optimizer, id, first, count));
}

static bool gradients_finite(const session *s) {
    for (int i = 0; i < s->tensor_count; i++) {
        const buffers *b = &s->tensors[i];
        for (int k = 0; k < 2; k++)
            if (b->id >= 0 && b->role != MUONSHARD_ROLE_FROZEN && b->is[k] && !b->finite[k])
                return false;
    }
    return true;
}

/* Of the latest step, which is complete. */
static void check_result(session *s, bool usual) {
    muonshard_step_result_info r = MUONSHARD_STEP_RESULT_INIT;
    FUZZ_CHECK(outcome(s, muonshard_step_result(s->optimizer, 0, 1, &r)) == MUONSHARD_OK);
    FUZZ_CHECK(r.step > 0 && r.count >= 0 && r.count <= r.step);
    if (r.skipped)
        check_unchanged(s);
    else
        FUZZ_CHECK(isfinite(r.grad_norm) && r.clip_factor >= 0.0 && r.clip_factor <= 1.0);
    if (usual)
        FUZZ_CHECK(r.skipped == !gradients_finite(s));
}

/* One that was deferred ends in the next call of a step, a save or a load; what that does itself
 * comes after. */
static void finish_step(session *s) {
    muonshard_step_result_info r = MUONSHARD_STEP_RESULT_INIT;
    if (s->committed)
        outcome(s, muonshard_step_result(s->optimizer, 0, 1, &r));
    keep_params(s);
}

static void step(session *s) {
    muonshard_step_args a = MUONSHARD_STEP_ARGS_INIT;
    muonshard_group_args groups[2] = {MUONSHARD_GROUP_ARGS_INIT, MUONSHARD_GROUP_ARGS_INIT};
    const uint8_t b = byte(s);
    if (b % 2) {
        a.lr = odd_value(s);
        a.momentum = odd_value(s);
        a.weight_decay = odd_value(s);
        a.adam_lr = odd_value(s);
        a.adam_weight_decay = odd_value(s);
    }
    if (b / 2 % 4 == 0) {
        groups[0].lr = odd_value(s);
        groups[1].weight_decay = odd_value(s);
        a.group_count = byte(s) % 3;
        a.groups = a.group_count && byte(s) == 255 ? NULL : groups;
    }
    if (b / 8 % 4 == 0) {
        const double factor = odd_value(s), scale = odd_value(s);
        a.lr_factor = isnan(factor) && byte(s) < 250 ? 1.0 : factor;
        a.grad_scale = isnan(scale) && byte(s) < 250 ? 1.0 : scale;
    }
    a.defer = b >= 192;
    a.size = b % 2 ? odd_size(s, sizeof a) : sizeof a;
    finish_step(s);
    const muonshard_status status = outcome(s, muonshard_step(s->optimizer, b == 64 ? NULL : &a));
    if (status != MUONSHARD_OK)
        check_unchanged(s);
    else if (!a.defer)
        check_result(s, s->tame && !isnan(a.grad_scale));
}

static void step_result(session *s) {
    muonshard_step_result_info r = MUONSHARD_STEP_RESULT_INIT;
    r.size = odd_size(s, sizeof r);
    const int64_t wanted = odd_number(s);
    const uint8_t b = byte(s);
    outcome(s, muonshard_step_result(s->optimizer, wanted, b % 2, b == 255 ? NULL : &r));
}

static void tensor_wait(session *s) {
    const int id = odd_id(s);
    const int64_t first = odd_number(s), count = odd_number(s);
    outcome(s, muonshard_tensor_wait(s->optimizer, id, first, count, NULL));
}

static void progress(session *s) {
    outcome(s, muonshard_progress(s->optimizer));
}

static void stats(session *s) {
    muonshard_stats_info info = MUONSHARD_STATS_INIT;
    info.size = odd_size(s, sizeof info);
    const muonshard_status status =
        outcome(s, muonshard_stats(s->optimizer, byte(s) == 255 ? NULL : &info));
    FUZZ_CHECK(status != MUONSHARD_OK || s->committed);
    FUZZ_CHECK(*muonshard_backend(s->optimizer) || !s->optimizer);
    FUZZ_CHECK(*muonshard_device(s->optimizer) || !s->optimizer);
}

/* ---- checkpoints ---- */

static const char *odd_directory(session *s) {
    static const char *const odd[] = {"", NULL, "/proc/self/stat", "/dev/null/x"};
    if (!s->directory) {
        fuzz_empty_directory();
        s->directory = true;
    }
    const uint8_t b = byte(s);
    return b < 224 ? fuzz_directory() : odd[b % 4];
}

static void save(session *s) {
    muonshard_save_args a = MUONSHARD_SAVE_ARGS_INIT;
    static const char *const users[] = {NULL, "", "user", "\xff", "\n\"\\\x01\u00e9"};
    const char *directory = odd_directory(s);
    const uint8_t b = byte(s);
    a.user = users[b % 5];
    a.keep = b > 250 ? -1 : b / 5 % 3;
    a.defer = b >= 128;
    a.size = odd_size(s, sizeof a);
    finish_step(s);
    outcome(s, muonshard_save(s->optimizer, directory, b == 127 ? NULL : &a));
    check_unchanged(s);
}

static void save_wait(session *s) {
    int done = 0;
    const uint8_t b = byte(s);
    outcome(s, muonshard_save_test(s->optimizer, b == 255 ? NULL : &done));
    outcome(s, muonshard_save_wait(s->optimizer));
    FUZZ_CHECK(muonshard_save_test(s->optimizer, &done) != MUONSHARD_OK || done);
}

/* Any state may come, but nothing changes on failure. */
static void loaded(session *s, muonshard_status status) {
    if (status == MUONSHARD_OK)
        keep_params(s);
    else
        check_unchanged(s);
    outcome(s, status);
}

static muonshard_load_args odd_load_args(session *s) {
    muonshard_load_args a = MUONSHARD_LOAD_ARGS_INIT;
    const uint8_t b = byte(s);
    a.optional = b % 2;
    a.keep_params = b / 4 % 2;
    a.size = odd_size(s, sizeof a);
    return a;
}

static void load(session *s) {
    muonshard_load_result r = MUONSHARD_LOAD_RESULT_INIT;
    const char *directory = odd_directory(s);
    const muonshard_load_args a = odd_load_args(s);
    finish_step(s);
    const muonshard_status status = muonshard_load(s->optimizer, directory, &a, &r);
    loaded(s, status);
    FUZZ_CHECK(status != MUONSHARD_OK || a.optional || (r.found && r.path && r.user));
}

static void save_memory(session *s) {
    size_t bytes = 0;
    const uint8_t b = byte(s);
    finish_step(s);
    if (outcome(s, muonshard_state_size(s->optimizer, b == 255 ? NULL : &bytes)) != MUONSHARD_OK)
        return;
    const size_t room = b < 240 ? bytes : bytes - 1;
    void *image = malloc(room);
    FUZZ_CHECK(image);
    const muonshard_status status = outcome(s, muonshard_save_memory(s->optimizer, image, room));
    FUZZ_CHECK(status == MUONSHARD_OK ? room == bytes
                                      : room < bytes || status == MUONSHARD_ERR_STATE);
    free(s->image);
    s->image = status ? NULL : image;
    s->image_bytes = status ? 0 : room;
    if (status)
        free(image);
    check_unchanged(s);
}

/* The image as it was saved, cut off, or with a byte changed. */
static void load_memory(session *s) {
    const muonshard_load_args a = odd_load_args(s);
    const uint8_t b = byte(s), where = byte(s);
    size_t bytes[2] = {s->image_bytes, s->image_bytes};
    char *image = copy_of(s->image ? s->image : "", s->image ? s->image_bytes : 1);
    const void *images[2] = {s->image ? image : NULL, image};
    if (b % 4 == 1)
        bytes[0] = bytes[0] * where / 256;
    if (b % 4 == 2 && s->image) {
        image[s->image_bytes * where / 256] ^= (char)(1 << b / 32);
        s->tame = false;
    }
    finish_step(s);
    loaded(s, muonshard_load_memory(s->optimizer, b == 255 ? NULL : images, bytes,
                                    s->image ? b / 4 % 3 : b / 4 % 2, &a, NULL));
    free(image);
}

/* ---- configuration and communicator ---- */

static const char *const sound_settings[] = {
    "preset=none",
    "preset=jordan",
    "preset=moonlight",
    "preset=torch",
    "preset=nvidia",
    "preset=grouped_fp16",
    "preset=fan_ratio",
    "preset=dion_repo",
    "preset=gram",
    "preset=speedrun",
    "preset=optax",
    "lr=0.01",
    "lr=0",
    "weight_decay=0.1",
    "decay=independent",
    "decay=cautious_lr_squared",
    "decay_form=add",
    "momentum=0",
    "momentum_form=ema_corrected",
    "momentum_form=heavy_ball_swapped",
    "momentum_dtype=bf16",
    "nesterov=true",
    "norm=schatten4",
    "norm=spectral",
    "ns_steps=1",
    "ns_steps=9",
    "ns_dtype=param",
    "ns_dtype=tf32",
    "ns_form=gram",
    "ns_form=auto",
    "gram_restarts=1,3",
    "variance=normuon",
    "variance_axis=auto",
    "scale=rms",
    "scale=spectral",
    "scale_dims=first_last",
    "layout=in_out",
    "elementwise=lion",
    "adam.nesterov=true",
    "adam.decay=l2",
    "clip_norm=1",
    "clip_norm=0.001",
    "reduce=sum",
    "reduce=none",
    "gather=params",
    "gather=updates",
    "master=owner",
    "master=replicated",
    "master=none",
    "rounding=stochastic",
    "seed=7",
    "ownership=balanced",
    "check_replicas=1",
    "bucket_bytes=1",
    "bucket_bytes=512",
    "batch_bytes=1",
    "batch_bytes=700",
    "threads=2",
    "instructions=portable",
    "lr_schedule=0:0 2:1 cosine end:0.1",
    "total_steps=5",
    "momentum_schedule=0:0.85 3:0.95",
    "coefficients=polar_express_computed",
    "coefficients=cans",
    "coefficients=aol4",
    "coefficient_check=off",
    "init_master=from_params",
};
static const char *const wild_settings[] = {
    "lr=1e6",
    "weight_decay=1e6",
    "momentum=1",
    "extra_scale=1e6",
    "adam.eps=1e-30",
    "norm_eps=1e-30",
    "coefficients=custom",
    "custom_coefficients=9,9,9",
    "ns_steps=32",
    "lr_schedule=0:1e9",
    "lr_schedule=x",
    "gram_restarts=x",
    "backend=cuda",
    "comm=nccl",
    "comm=mpi",
    "adam.lr=1e6",
    "coefficient_safety=2",
    "no=1",
    "lr",
    "=1",
    "momentum_schedule=0:2",
};
#define COUNT(array) (sizeof(array) / sizeof *(array))

static void set_config(session *s) {
    char text[64];
    const uint8_t b = byte(s);
    const bool wild = b >= COUNT(sound_settings) + 128;
    s->tame = s->tame && !wild;
    snprintf(text, sizeof text, "%s",
             wild ? wild_settings[b % COUNT(wild_settings)]
                  : sound_settings[b % COUNT(sound_settings)]);
    char *value = strchr(text, '=');
    if (value)
        *value++ = '\0';
    fuzz_status(muonshard_config_set(s->config, text, value),
                muonshard_config_last_error(s->config));
}

static void collectives(session *s) {
    const uint8_t b = byte(s);
    double values[2] = {1.0, NAN};
    char sent[4] = "abc", received[4] = "";
    muonshard_status status = MUONSHARD_OK;
    switch (b % 6) {
    case 0:
        status = muonshard_comm_allreduce(s->comm, b > 200 ? NULL : values, b > 200 ? 0 : 2,
                                          (muonshard_reduce_op)(b / 5 % 3));
        break;
    case 1: status = muonshard_comm_broadcast(s->comm, sent, 4, (int)odd_number(s)); break;
    case 2: status = muonshard_comm_allgather(s->comm, sent, received, 4); break;
    case 3: status = muonshard_comm_set_timeout(s->comm, b > 128 ? 10.0 : odd_value(s)); break;
    case 4: status = muonshard_comm_set_phase(s->comm, odd_name(s)); break;
    default:
        status = muonshard_comm_agree(s->comm, (muonshard_status)(b > 128 ? 0 : -(b % 13)),
                                      b % 2 ? NULL : "a message");
    }
    fuzz_status(status, muonshard_comm_last_error(s->comm));
    FUZZ_CHECK(muonshard_comm_rank(s->comm) == 0 && muonshard_comm_size(s->comm) == 1);
}

static void call(session *s) {
    static void (*const calls[])(session *) = {
        set_config, create,      add_tensor,  add_tensor, commit,      step,        step,
        grad_ready, step_result, tensor_wait, set_grad,   progress,    stats,       collectives,
        destroy,    save,        save_wait,   load,       save_memory, load_memory,
    };
    calls[byte(s) % COUNT(calls)](s);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    session s = {.at = data, .end = data + size, .tame = true};
    FUZZ_CHECK(muonshard_comm_create_self(NULL, &s.comm) == MUONSHARD_OK);
    FUZZ_CHECK(muonshard_config_create(&s.config) == MUONSHARD_OK);
    FUZZ_CHECK(muonshard_config_set(s.config, "backend", "host") == MUONSHARD_OK);
    FUZZ_CHECK(muonshard_config_set(s.config, "threads", "1") == MUONSHARD_OK);
    for (int i = 0; i < MOST_CALLS && s.at < s.end; i++)
        call(&s);
    destroy(&s);
    free(s.image);
    muonshard_config_destroy(s.config);
    muonshard_comm_destroy(s.comm);
    return 0;
}
