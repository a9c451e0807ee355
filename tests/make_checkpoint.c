/* make_checkpoint DIRECTORY: a checkpoint of three ranks and of all dtypes in it, and beside it the
 * parameters as they lie in memory, a file TENSOR.raw each. */
#include <stdio.h>
#include <string.h>
#include "comm_threads.h"
#include "step_rig.h"

enum { RANKS = 3, STEPS = 2 };
static const char *directory;
static rig_tensor tensors[RIG_MAX_TENSORS];
static muonshard_status outcome[RANKS];

static muonshard_status write_raw(const rig *r, size_t tensor) {
    char path[1024];
    snprintf(path, sizeof path, "%s/%s.raw", directory, tensors[tensor].name);
    FILE *file = fopen(path, "wb");
    if (!file)
        return MUONSHARD_ERR_IO;
    const size_t bytes = rig_bytes(r, tensor);
    const size_t wrote = fwrite(r->params[tensor], 1, bytes, file);
    return fclose(file) == 0 && wrote == bytes ? MUONSHARD_OK : MUONSHARD_ERR_IO;
}

static void run(muonshard_comm *comm, void *arg) {
    const int rank = muonshard_comm_rank(comm);
    rig r;
    rig_open(&r, comm, arg);
    for (int i = 0; i < STEPS && r.status == MUONSHARD_OK; i++) {
        rig_gradients(&r);
        rig_step(&r);
    }
    muonshard_save_args args = MUONSHARD_SAVE_ARGS_INIT;
    args.user = "line 7 – ü";
    if (r.status == MUONSHARD_OK)
        r.status = muonshard_save(r.optimizer, directory, &args);
    for (size_t i = 0; rank == 0 && r.status == MUONSHARD_OK && i < r.setup->count; i++)
        r.status = write_raw(&r, i);
    if (r.status != MUONSHARD_OK)
        fprintf(stderr, "rank %d: %s\n", rank, muonshard_last_error(r.optimizer));
    outcome[rank] = r.status;
    rig_close(&r);
}

int main(int argc, char **argv) {
    if (argc != 2)
        return 2;
    directory = argv[1];
    memcpy(tensors, rig_zoo, rig_zoo_count * sizeof *tensors);
    for (size_t i = 0; i < rig_zoo_count; i++)
        tensors[i].dtype = tensors[i].grad_dtype = (muonshard_dtype)(i % 3);
    rig_case setup = {
        .tensors = tensors, .count = rig_zoo_count, .yaml = "{preset: jordan, variance: normuon}"};
    if (threads_run(RANKS, run, &setup) != MUONSHARD_OK)
        return 1;
    return outcome[0] || outcome[1] || outcome[2];
}
