/* Fits W [4, 24, 16] and b [24] to samples that are spread over the ranks: mpirun -n 2 ./consumer */
#include <math.h>
#include <muonshard_mpi.h>
#include <stdio.h>
#include <string.h>

enum { LAYERS = 4, ROWS = 24, COLS = 16, SAMPLES = 64, STEPS = 60 };
static float W[LAYERS][ROWS][COLS], W_grad[LAYERS][ROWS][COLS], b[ROWS], b_grad[ROWS];
static int rank, w_id;
static muonshard_comm *comm;
static muonshard_config *config;
static muonshard_optimizer *opt;

/* The loss of layer l, mean over this rank's samples of |W[l] x + b - y|^2 / 2 where
 * y[i] = sin(i + l) sum(x) + 1; adds to the gradients. */
static double layer(int l) {
    double loss = 0.0;
    for (int s = 0; s < SAMPLES; s++)
        for (int i = 0; i < ROWS; i++) {
            float x[COLS], error = b[i] - 1.0f;
            for (int j = 0; j < COLS; j++) {
                x[j] = sinf((float)((1 + j) * (1 + s + SAMPLES * rank)));
                error += (W[l][i][j] - sinf((float)(i + l))) * x[j];
            }
            loss += error * error / (2.0 * SAMPLES);
            b_grad[i] += error / SAMPLES;
            for (int j = 0; j < COLS; j++)
                W_grad[l][i][j] += error * x[j] / SAMPLES;
        }
    return loss;
}

/* Collective calls fail on all ranks with the same status and text: one of them tells it. */
#define TRY(call, text)                                                                            \
    do {                                                                                           \
        muonshard_status status_ = (call);                                                         \
        if (status_ != MUONSHARD_OK && rank == 0)                                                  \
            fprintf(stderr, "consumer: %s\n", text);                                               \
        if (status_ != MUONSHARD_OK)                                                               \
            return status_;                                                                        \
    } while (0)

static muonshard_status add_tensors(void) {
    muonshard_tensor_desc w = MUONSHARD_TENSOR_DESC_INIT, bias = MUONSHARD_TENSOR_DESC_INIT;
    w.name = "W", w.role = MUONSHARD_ROLE_MATRIX, w.param = W, w.grad = W_grad;
    w.dims = 3, w.shape[0] = LAYERS, w.shape[1] = ROWS, w.shape[2] = COLS;
    bias.name = "b", bias.role = MUONSHARD_ROLE_ELEMENTWISE, bias.param = b, bias.grad = b_grad;
    bias.dims = 1, bias.shape[0] = ROWS;
    muonshard_status status = muonshard_add_tensor(opt, &w, &w_id);
    return status == MUONSHARD_OK ? muonshard_add_tensor(opt, &bias, NULL) : status;
}

static muonshard_status set_up(const char *path) {
    muonshard_status status = muonshard_config_create(&config);
    if (status == MUONSHARD_OK && rank == 0)
        status = muonshard_config_load_file(config, path);
    TRY(muonshard_comm_agree(comm, status, muonshard_config_last_error(config)),
        muonshard_comm_last_error(comm));
    TRY(muonshard_config_broadcast(config, comm), muonshard_config_last_error(config));
    TRY(muonshard_create(comm, config, NULL, &opt), muonshard_comm_last_error(comm));
    status = add_tensors();
    TRY(muonshard_comm_agree(comm, status, muonshard_last_error(opt)),
        muonshard_comm_last_error(comm));
    TRY(muonshard_commit(opt, MUONSHARD_SYNC_BROADCAST), muonshard_last_error(opt));
    return MUONSHARD_OK;
}
