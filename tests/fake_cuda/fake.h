/* fake.h - a device that isn't there: what the files of the fake share. Streams are lists of what
 * was enqueued; nothing of it runs until somebody asks for the outcome, so that a wait that is
 * missing gives wrong numbers every time. */
#ifndef FAKE_H
#define FAKE_H

#include <cuda_runtime_api.h>

#include <functional>

/* Enqueues on `stream`; in a capture, into the graph. */
cudaError_t fake_enqueue(cudaStream_t stream, std::function<void()> run);
/* True once, when the call whose failure was asked for has come. */
bool fake_fails(void);
/* Runs what `stream` has been given up to now. Its device memory can be touched only inside of
 * operations, or between fake_touch_begin and end. */
void fake_run_all(cudaStream_t stream);
size_t fake_given(cudaStream_t stream);
void fake_run_until(cudaStream_t stream, size_t end);
/* Within an operation that waits for another rank: other threads may go on. */
void fake_let_others(unsigned microseconds);
/* Meanwhile nothing else may be given to the stream. */
void fake_issuing(cudaStream_t stream, bool issuing);
void fake_touch_begin(void);
void fake_touch_end(void);
/* A function of the driver; NULL: the fake has none of this name. */
void *fake_driver_entry(const char *symbol);
/* `change` to the number of things that were made and not destroyed. */
void fake_count(int change);

extern "C" {
/* From outside, by dlsym. The n-th call from now on that can fail does; 0: none. */
__attribute__((visibility("default"))) void fake_cuda_fail_at(long n);
/* Calls that can fail, so far. */
__attribute__((visibility("default"))) long fake_cuda_calls(void);
/* Things that were made and not destroyed. */
__attribute__((visibility("default"))) int fake_cuda_live(void);
/* Bytes of device memory in use. */
__attribute__((visibility("default"))) size_t fake_cuda_bytes(void);
/* Calls so far that waited for the device, or allocated. */
__attribute__((visibility("default"))) long fake_cuda_waits(void);
__attribute__((visibility("default"))) long fake_cuda_allocations(void);
/* Reduces, broadcasts, reduce-scatters and all-gathers that NCCL was given so far, by all ranks. */
typedef struct fake_collectives {
    long reduces, broadcasts, reduce_scatters, all_gathers;
} fake_collectives;
__attribute__((visibility("default"))) void fake_nccl_given(fake_collectives *given);
/* Algorithms that cuBLASLt proposed so far, and products it was given. */
__attribute__((visibility("default"))) void fake_blas_given(long *proposals, long *multiplications);
/* The algorithm of this number, of the three that are proposed, takes half a millisecond less than
 * the others; below 0: none does. */
__attribute__((visibility("default"))) void fake_blas_fast(int number);
/* What is ready may run before it is asked for, as the seed has it; 0: never. */
__attribute__((visibility("default"))) void fake_cuda_seed(unsigned seed);
/* When copies and products of a cluster happen that nothing waits for yet: 0: as late as can be; 1:
 * at once; else: as the seed has it, as is the order of threads. */
__attribute__((visibility("default"))) void fake_hopper_seed(unsigned seed);
/* Fragments so far of which two rows were stored to the same banks of shared memory. */
__attribute__((visibility("default"))) long fake_hopper_conflicts(void);
/* Kernels of clusters that were started so far. */
__attribute__((visibility("default"))) long fake_hopper_launches(void);
}

#endif
