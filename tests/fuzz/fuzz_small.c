#include "fuzz_small.h"

#include <string.h>

enum { STEPS = 3 };

static const struct {
    const char *name;
    muonshard_role role;
    muonshard_matrix_form form;
    muonshard_dtype dtype;
    int dims;
    int64_t shape[4];
    size_t at, bytes; /* in params */
} tensors[] = {
    {"stack", MUONSHARD_ROLE_MATRIX, MUONSHARD_STACK, MUONSHARD_BF16, 3, {2, 4, 3}, 0, 48},
    {"conv", MUONSHARD_ROLE_MATRIX, MUONSHARD_FLATTEN, MUONSHARD_FP32, 4, {2, 1, 3, 1}, 48, 24},
    {"bias", MUONSHARD_ROLE_ELEMENTWISE, MUONSHARD_STACK, MUONSHARD_FP16, 1, {6}, 72, 12},
    {"frozen", MUONSHARD_ROLE_FROZEN, MUONSHARD_STACK, MUONSHARD_FP32, 1, {3}, 84, 12},
};
enum { PARAMS_BYTES = 96 };

static void set(muonshard_config *config, const char *key, const char *value) {
    FUZZ_CHECK(muonshard_config_set(config, key, value) == MUONSHARD_OK);
}

static void add_tensors(small *s) {
    for (size_t i = 0; i < sizeof tensors / sizeof *tensors; i++) {
        muonshard_tensor_desc d = MUONSHARD_TENSOR_DESC_INIT;
        d.name = tensors[i].name;
        d.role = tensors[i].role;
        d.form = tensors[i].form;
        d.dtype = tensors[i].dtype;
        d.dims = tensors[i].dims;
        memcpy(d.shape, tensors[i].shape, sizeof tensors[i].shape);
        d.param = (char *)s->params + tensors[i].at;
        d.grad = (char *)s->grads + tensors[i].at;
        FUZZ_CHECK(muonshard_add_tensor(s->optimizer, &d, NULL) == MUONSHARD_OK);
    }
}

/* Zeros, but one element of each: 0x3f80 is 1.0, 1.875 or a part of either. */
static void fill(void *to, uint16_t offset) {
    const uint16_t some = (uint16_t)(0x3f80 + offset);
    memset(to, 0, PARAMS_BYTES);
    for (size_t i = 0; i < sizeof tensors / sizeof *tensors; i++)
        memcpy((char *)to + tensors[i].at + 2, &some, sizeof some);
}

static void save(const small *s, void *image) {
    FUZZ_CHECK(muonshard_save_memory(s->optimizer, image, s->image_bytes) == MUONSHARD_OK);
}

static void load(small *s, const void *image) {
    FUZZ_CHECK(muonshard_load_memory(s->optimizer, &image, &s->image_bytes, 1, NULL, NULL) ==
               MUONSHARD_OK);
}

static void make(small *s) {
    s->params_bytes = PARAMS_BYTES;
    s->params = malloc(PARAMS_BYTES);
    s->grads = malloc(PARAMS_BYTES);
    FUZZ_CHECK(s->params && s->grads);
    fill(s->params, 0);
    fill(s->grads, 3);
    FUZZ_CHECK(muonshard_comm_create_self(NULL, &s->comm) == MUONSHARD_OK);
    FUZZ_CHECK(muonshard_config_create(&s->config) == MUONSHARD_OK);
    set(s->config, "backend", "host");
    set(s->config, "threads", "1");
    set(s->config, "variance", "normuon");
    set(s->config, "init_master", "from_params"); /* an image without masters is whole */
    FUZZ_CHECK(muonshard_create(s->comm, s->config, NULL, &s->optimizer) == MUONSHARD_OK);
    add_tensors(s);
    FUZZ_CHECK(muonshard_commit(s->optimizer, MUONSHARD_SYNC_CHECK) == MUONSHARD_OK);
    for (int i = 0; i < STEPS; i++)
        FUZZ_CHECK(muonshard_step(s->optimizer, NULL) == MUONSHARD_OK);
    FUZZ_CHECK(muonshard_state_size(s->optimizer, &s->image_bytes) == MUONSHARD_OK);
    s->image = malloc(s->image_bytes);
    FUZZ_CHECK(s->image);
    save(s, s->image);
}

small *fuzz_small(void) {
    static small s;
    if (!s.optimizer)
        make(&s);
    load(&s, s.image);
    return &s;
}

bool fuzz_small_unchanged(const small *s) {
    void *now = malloc(s->image_bytes);
    FUZZ_CHECK(now);
    save(s, now);
    const bool same = memcmp(now, s->image, s->image_bytes) == 0;
    free(now);
    return same;
}

void fuzz_small_goes_on(small *s) {
    void *first = malloc(s->image_bytes), *second = malloc(s->image_bytes);
    muonshard_step_result_info r = MUONSHARD_STEP_RESULT_INIT;
    FUZZ_CHECK(first && second);
    save(s, first);
    load(s, first);
    save(s, second);
    FUZZ_CHECK(memcmp(first, second, s->image_bytes) == 0);
    FUZZ_CHECK(muonshard_step(s->optimizer, NULL) == MUONSHARD_OK);
    FUZZ_CHECK(muonshard_step_result(s->optimizer, 0, 1, &r) == MUONSHARD_OK);
    FUZZ_CHECK(r.step > 0 && r.count >= 0 && r.count <= r.step);
    free(first);
    free(second);
}
