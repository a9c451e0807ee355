/* cuda_gemm_table.c - the choices as text: a head that says what they hold for, and a line a
 * product, whose numbers are the key in the order of gemm_key and the algorithm as cuBLASLt keeps
 * it. That is documented to hold for one version of the library, and means one kind of device. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda_gemm.h"

enum { KEY_NUMBERS = sizeof(gemm_key) / sizeof(int64_t), LINE_BYTES = 2048 };
enum { WORDS = sizeof(cublasLtMatmulAlgo_t) / sizeof(uint64_t) };

_Static_assert(sizeof(gemm_key) == KEY_NUMBERS * sizeof(int64_t), "a key is int64_t throughout");

static int head(const backend *self, char *text, size_t size) {
    return snprintf(text, size, "muonshard gemm table 2, %s, cuBLASLt %zu, %s\n",
                    cuda_of(self)->measures_gemms ? "measured" : "proposed", cublasLtGetVersion(),
                    cuda_of(self)->model);
}

static int line(const gemm_choice *c, char *text, size_t size) {
    int64_t numbers[KEY_NUMBERS];
    int at = 0;
    memcpy(numbers, &c->key, sizeof numbers);
    for (int i = 0; i < KEY_NUMBERS; i++)
        at += snprintf(text + at, size - (size_t)at, "%lld ", (long long)numbers[i]);
    for (int i = 0; i < WORDS; i++)
        at += snprintf(text + at, size - (size_t)at, "%llx%c",
                       (unsigned long long)c->algorithm.data[i], i + 1 < WORDS ? ' ' : '\n');
    return at;
}

muonshard_status gemm_table_text(backend *self, char **text) {
    gemm_table *table = cuda_of(self)->gemms;
    *text = NULL;
    if (!table || !table->added)
        return MUONSHARD_OK;
    char *all = malloc((table->count + 1) * LINE_BYTES);
    FAIL_IF(!all, &self->error, MUONSHARD_ERR_MEMORY, "out of memory");
    int at = head(self, all, LINE_BYTES);
    for (size_t i = 0; i < table->count; i++)
        at += line(&table->choices[i], all + at, LINE_BYTES);
    *text = all;
    return MUONSHARD_OK;
}

void gemm_table_kept(backend *self) {
    if (cuda_of(self)->gemms)
        cuda_of(self)->gemms->added = 0;
}

/* Numbers of one line, and nothing else. */
static bool parse(const char *text, const char *end, gemm_choice *c) {
    int64_t numbers[KEY_NUMBERS];
    char *after;
    *c = (gemm_choice){.operation = NULL};
    for (int i = 0; i < KEY_NUMBERS; i++, text = after) {
        numbers[i] = strtoll(text, &after, 10);
        if (after == text || after > end)
            return false;
    }
    for (int i = 0; i < WORDS; i++, text = after) {
        c->algorithm.data[i] = strtoull(text, &after, 16);
        if (after == text || after > end)
            return false;
    }
    memcpy(&c->key, numbers, sizeof numbers);
    return after == end;
}

/* A product of ours, and a way to cut it. */
static bool is_cut(const gemm_choice *c, int processors) {
    const uint64_t *words = c->algorithm.data;
    bool sound = (c->key.operands == GEMM_BF16 || c->key.operands == GEMM_FP16) &&
                 (words[0] == TILE_UNIT || words[0] == TILE_UNIT / 2) &&
                 words[1] <= (uint64_t)processors;
    for (int i = 2; i < WORDS; i++)
        sound = sound && words[i] == 0;
    return sound;
}

static bool is_usable(const cuda_impl *impl, gemm_choice *c) {
    cublasLtMatmulHeuristicResult_t result;
    if (c->key.tiles)
        return is_cut(c, impl->processors);
    return c->key.operands >= GEMM_FP32 && c->key.operands <= GEMM_FP64 &&
           c->key.stored >= GEMM_FP32 && c->key.stored <= GEMM_FP64 &&
           gemm_describe(c) == CUBLAS_STATUS_SUCCESS &&
           cublasLtMatmulAlgoCheck(impl->blas, c->operation, c->layouts[GEMM_B], c->layouts[GEMM_A],
                                   gemm_layout_of_c(c), c->layouts[GEMM_DST], &c->algorithm,
                                   &result) == CUBLAS_STATUS_SUCCESS &&
           result.workspaceSize <= GEMM_WORKSPACE;
}

muonshard_status gemm_table_read(backend *self, const char *text) {
    cuda_impl *impl = cuda_of(self);
    char wanted[LINE_BYTES];
    const size_t length = (size_t)head(self, wanted, sizeof wanted);
    FAIL_IF(strncmp(text, wanted, length) != 0, &self->error, MUONSHARD_ERR_CONFIG,
            "begins with \"%.*s\"; this is \"%.*s\"", (int)strcspn(text, "\n"), text,
            (int)length - 1, wanted);
    /* What was chosen before stays. */
    const size_t before = impl->gemms ? impl->gemms->count : 0;
    int number = 2;
    for (text += length; *text; number++) {
        const char *end = text + strcspn(text, "\n");
        gemm_choice *c = gemm_next_choice(impl);
        FAIL_IF(!c, &self->error, MUONSHARD_ERR_MEMORY, "out of memory");
        FAIL_IF(!parse(text, end, c) || *end != '\n', &self->error, MUONSHARD_ERR_CONFIG,
                "line %d is not a product", number);
        const gemm_choice *known = gemm_find(impl, &c->key);
        text = end + 1;
        if (known && known < impl->gemms->choices + before)
            continue;
        FAIL_IF(known, &self->error, MUONSHARD_ERR_CONFIG,
                "line %d has the product of a line before", number);
        if (!is_usable(impl, c)) {
            gemm_free_choice(c);
            return fail(&self->error, MUONSHARD_ERR_CONFIG,
                        "line %d: this product cannot be made so", number);
        }
        impl->gemms->count++;
    }
    return MUONSHARD_OK;
}
