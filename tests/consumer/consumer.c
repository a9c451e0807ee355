/* mpirun -n 2 ./consumer CONFIG: fits W [4, 24, 16] and b [24] to targets spread over the ranks. */
#include <inttypes.h>
#include <math.h>
#include <muonshard_mpi.h>
#include <stdio.h>
#include <string.h>

enum { LAYERS = 4, ROWS = 24, COLS = 16, STEPS = 100 };
static struct model { float W[LAYERS][ROWS][COLS], b[ROWS]; } param, grad;

/* An error ends the job: a line on stderr, and an exit code of its own. */
#define CHECK(call, text)                                                                          \
    do {                                                                                           \
        muonshard_status status_ = (call);                                                         \
        if (status_ != MUONSHARD_OK)                                                               \
            muonshard_mpi_abort(NULL, status_, text);                                              \
    } while (0)

/* Loss of layer l on this rank, |W[l] + b - target|^2 / 2; adds its gradients. */
static double layer(int l, int rank) {
    double loss = 0.0;
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < COLS; j++) {
            float error = param.W[l][i][j] + param.b[i] - sinf((float)(l + i * j)) - (float)rank;
            grad.W[l][i][j] += error;
            grad.b[i] += error;
            loss += 0.5 * error * error;
        }
    return loss;
}

int main(int argc, char **argv) {
    int rank, w_id;
    muonshard_comm *comm;
    muonshard_config *config;
    muonshard_optimizer *opt;
    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    muonshard_comm_options options = MUONSHARD_COMM_OPTIONS_INIT;
    options.on_fatal = muonshard_mpi_abort; /* a rank that is dead or stuck ends the job, too */
    CHECK(muonshard_comm_create_mpi(MPI_COMM_WORLD, &options, &comm), "no communicator");
    CHECK(muonshard_config_create(&config), "no memory for the config");
    if (rank == 0) /* it reads; every rank gets its values */
        CHECK(muonshard_config_load_file(config, argv[1]), muonshard_config_last_error(config));
    CHECK(muonshard_config_broadcast(config, comm), muonshard_config_last_error(config));
    CHECK(muonshard_create(comm, config, NULL, &opt), muonshard_comm_last_error(comm));

    muonshard_tensor_desc w = MUONSHARD_TENSOR_DESC_INIT, bias = MUONSHARD_TENSOR_DESC_INIT;
    w.name = "W", w.role = MUONSHARD_ROLE_MATRIX, w.param = param.W, w.grad = grad.W;
    w.dims = 3, w.shape[0] = LAYERS, w.shape[1] = ROWS, w.shape[2] = COLS;
    bias.name = "b", bias.role = MUONSHARD_ROLE_ELEMENTWISE, bias.param = param.b;
    bias.grad = grad.b, bias.dims = 1, bias.shape[0] = ROWS;
    CHECK(muonshard_add_tensor(opt, &w, &w_id), muonshard_last_error(opt));
    CHECK(muonshard_add_tensor(opt, &bias, NULL), muonshard_last_error(opt));
    CHECK(muonshard_commit(opt, MUONSHARD_SYNC_BROADCAST), muonshard_last_error(opt));
    muonshard_step_args args = MUONSHARD_STEP_ARGS_INIT;
    muonshard_step_result_info result = MUONSHARD_STEP_RESULT_INIT;
    for (int step = 1; step <= STEPS; step++) {
        double loss = 0.0;
        memset(&grad, 0, sizeof grad);
        for (int l = LAYERS - 1; l >= 0; l--) { /* what is final travels under the rest */
            loss += layer(l, rank);
            CHECK(muonshard_grad_ready(opt, w_id, l, 1), muonshard_last_error(opt));
        }
        args.lr_factor = 1.0 - (step - 1.0) / STEPS;
        CHECK(muonshard_step(opt, &args), muonshard_last_error(opt));
        CHECK(muonshard_step_result(opt, 0, 1, &result), muonshard_last_error(opt));
        printf("rank %d step %d: loss %.3f%s\n", rank, step, loss,
               result.skipped ? " skipped" : "");
    }
    uint64_t hash = 0;
    for (size_t i = 0; i < sizeof param; i++)
        hash = (hash ^ ((const unsigned char *)&param)[i]) * 1099511628211u;
    printf("rank %d: parameters %016" PRIx64 "\n", rank, hash);
    muonshard_destroy(opt);
    muonshard_config_destroy(config);
    muonshard_comm_destroy(comm);
    return MPI_Finalize();
}
