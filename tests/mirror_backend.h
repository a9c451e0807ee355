/* mirror_backend.h - a backend whose memory is the host's, as tests want it, over one whose memory
 * is not: every call takes its arrays to the device and brings them back. So one suite runs on all.
 */
#ifndef MIRROR_BACKEND_H
#define MIRROR_BACKEND_H

#include "kernels/backend.h"

/* The backend named by MUONSHARD_TEST_BACKEND (host where it is not set), mirrored where its memory
 * is a device's. ERR_UNAVAILABLE. */
muonshard_status test_backend_open(backend **out, error_text *error);
/* Whether that is the host's; whether it is a device that is there, whose libraries take another
 * algorithm, and so another order of sums, for other numbers of matrices. */
bool test_backend_is_host(void);
bool test_backend_is_card(void);

#endif
