#include "ranks_fixture.h"

#include <stdlib.h>
#include <string.h>

#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

void ranks_run(muonshard_comm *comm, void *arg) {
    outcome *out = arg;
    const int rank = muonshard_comm_rank(comm);
    rig r;
    rig_open(&r, comm, out->setup[rank] ? out->setup[rank] : out->setup[0]);
    if (out->between) {
        out->between(&r, out);
    } else {
        for (int i = 0; i < r.setup->steps && r.status == MUONSHARD_OK; i++) {
            rig_gradients(&r);
            rig_step(&r);
        }
    }
    out->digest[rank] = rig_digest(&r);
    out->status[rank] = r.status;
    memcpy(out->message[rank], r.message, sizeof r.message);
    for (size_t i = 0; out->keep && rank == 0 && i < r.setup->count; i++) {
        out->kept[i] = malloc(rig_bytes(&r, i));
        memcpy(out->kept[i], r.params[i], rig_bytes(&r, i));
    }
    rig_close(&r);
}

uint64_t digest_at(int ranks, const rig_case *setup) {
    outcome out = {.setup = {setup}};
    assert_int_equal(threads_run(ranks, ranks_run, &out), MUONSHARD_OK);
    for (int r = 0; r < ranks; r++) {
        assert_int_equal(out.status[r], MUONSHARD_OK);
        assert_true(out.digest[r] == out.digest[0]);
    }
    return out.digest[0];
}

rig_case zoo_case(const char *yaml) {
    return (rig_case){.tensors = rig_zoo, .count = rig_zoo_count, .yaml = yaml, .steps = 3};
}

size_t rows_apart(size_t apart) {
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
    return apart;
#else
    (void)apart;
    return 1;
#endif
}

bool row_left_out(size_t which, size_t apart) {
    return which % (images_on_host() ? rows_apart(apart) : apart) != 0;
}
