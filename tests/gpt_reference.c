#include "gpt_reference.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* out[o] = sum_i w[o, i] in[i], or added */
static void apply(double *out, const gpt_real *w, const double *in, int rows, int cols, bool add) {
    for (int o = 0; o < rows; o++) {
        double sum = add ? out[o] : 0.0;
        for (int i = 0; i < cols; i++)
            sum += (double)w[o * cols + i] * in[i];
        out[o] = sum;
    }
}

static void layer_norm(double *out, const double *in, const gpt_real *gain, int width) {
    double mean = 0.0, variance = 0.0;
    for (int i = 0; i < width; i++)
        mean += in[i] / width;
    for (int i = 0; i < width; i++)
        variance += (in[i] - mean) * (in[i] - mean) / width;
    for (int i = 0; i < width; i++)
        out[i] = (double)gain[i] * (in[i] - mean) / sqrt(variance + 1e-5);
}

static double sequence_loss(const gpt_tensor *p, const gpt_shape *s, const unsigned char *bytes) {
    int width = s->width, size = width / s->heads, context = s->context;
    double *x = malloc(sizeof *x * (size_t)(context * width));
    double *qkv = malloc(sizeof *qkv * (size_t)(context * 3 * width));
    double *normed = malloc(sizeof *normed * (size_t)width);
    double *mixed = malloc(sizeof *mixed * (size_t)width);
    double *wide = malloc(sizeof *wide * (size_t)(4 * width));
    double *score = malloc(sizeof *score * (size_t)context), logit[256], loss = 0.0;
    if (!x || !qkv || !normed || !mixed || !wide || !score)
        abort();
    for (int t = 0; t < context; t++)
        for (int c = 0; c < width; c++)
            x[t * width + c] = (double)p[GPT_TOKEN_EMBEDDING].param[bytes[t] * width + c] +
                               (double)p[GPT_POSITION_EMBEDDING].param[t * width + c];
    for (int l = 0; l < s->layers; l++) {
        for (int t = 0; t < context; t++) {
            layer_norm(normed, x + t * width, p[GPT_ATTN_NORM].param + l * width, width);
            apply(qkv + t * 3 * width, p[GPT_QKV].param + l * 3 * width * width, normed, 3 * width,
                  width, false);
        }
        for (int t = 0; t < context; t++) {
            for (int h = 0; h < s->heads; h++) {
                const double *q = qkv + t * 3 * width + h * size;
                double sum = 0.0;
                for (int u = 0; u <= t; u++) {
                    const double *k = qkv + u * 3 * width + width + h * size;
                    score[u] = 0.0;
                    for (int c = 0; c < size; c++)
                        score[u] += q[c] * k[c] / sqrt((double)size);
                    sum += score[u] = exp(score[u]);
                }
                for (int c = 0; c < size; c++) {
                    double *out = &mixed[h * size + c];
                    *out = 0.0;
                    for (int u = 0; u <= t; u++)
                        *out += score[u] / sum * qkv[u * 3 * width + 2 * width + h * size + c];
                }
            }
            apply(x + t * width, p[GPT_ATTN_OUT].param + l * width * width, mixed, width, width,
                  true);
            layer_norm(normed, x + t * width, p[GPT_MLP_NORM].param + l * width, width);
            apply(wide, p[GPT_MLP_UP].param + l * 4 * width * width, normed, 4 * width, width,
                  false);
            for (int i = 0; i < 4 * width; i++) {
                double v = wide[i];
                wide[i] =
                    0.5 * v * (1 + tanh(sqrt(2 / 3.141592653589793) * (v + 0.044715 * v * v * v)));
            }
            apply(x + t * width, p[GPT_MLP_DOWN].param + l * 4 * width * width, wide, width,
                  4 * width, true);
        }
    }
    for (int t = 0; t < context; t++) {
        double sum = 0.0;
        layer_norm(normed, x + t * width, p[GPT_FINAL_NORM].param, width);
        apply(logit, p[s->tied ? GPT_TOKEN_EMBEDDING : GPT_HEAD].param, normed, 256, width, false);
        for (int v = 0; v < 256; v++)
            sum += exp(logit[v]);
        loss += (log(sum) - logit[bytes[t + 1]]) / context;
    }
    free(x);
    free(qkv);
    free(normed);
    free(mixed);
    free(wide);
    free(score);
    return loss;
}

double gpt_reference_loss(const gpt *model, const gpt_shape *shape, const unsigned char *windows,
                          int sequences) {
    size_t count;
    const gpt_tensor *tensors = gpt_tensors(model, &count);
    double loss = 0.0;
    for (int b = 0; b < sequences; b++)
        loss += sequence_loss(tensors, shape, windows + b * (shape->context + 1)) / sequences;
    return loss;
}
