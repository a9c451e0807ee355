/* comm_contract.h - what every communicator has to do, as cases that run on any of them at any
 * number of ranks. */
#ifndef COMM_CONTRACT_H
#define COMM_CONTRACT_H

#include "comm/comm.h"

/* One run of a case on one rank. Cases use no cmocka: ranks may be threads. */
typedef struct contract_run {
    muonshard_comm *comm;
    /* Waits for all ranks by other means than `comm`; NULL for a communicator whose start waits for
     * the others. */
    void (*barrier)(muonshard_comm *comm);
    char failure[512]; /* empty: passed. The first failure is kept. */
} contract_run;

typedef struct contract_case {
    const char *name;
    void (*run)(contract_run *run);
} contract_case;

enum { CONTRACT_CASES = 17 };
extern const contract_case contract_cases[CONTRACT_CASES];

/* Memory and sums in plain C, so that the suite needs no backend under test. */
backend *contract_backend(void);

#endif
