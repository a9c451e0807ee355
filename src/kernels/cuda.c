/* cuda.c - the CUDA backend: device memory, two streams of its own, stamps on them, and what is
 * launched in a row captured as a graph. Nothing here waits for the device but alloc, copies from
 * and to memory of the host, and choosing by time. */
#include "kernels/cuda.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <nvtx3/nvToolsExt.h>

#include "kernels/cuda_kernels.h"

muonshard_status cuda_failed(backend *self, cudaError_t code, const char *what) {
    cudaGetLastError(); /* forgotten by the runtime, or later calls would report it again */
    const int length = (int)strcspn(what, "(");
    return fail(&self->error,
                code == cudaErrorMemoryAllocation ? MUONSHARD_ERR_MEMORY : MUONSHARD_ERR_INTERNAL,
                "CUDA: %.*s: %s (%s)", length, what, cudaGetErrorString(code),
                self->device_text[0] ? self->device_text : "no device");
}

static cudaStream_t stream_of(const backend *self, backend_stream stream) {
    return cuda_of(self)->streams[stream];
}

/* The calling thread may have had another device in mind. */
static cudaError_t enter(const backend *self) {
    return cudaSetDevice(self->ordinal);
}

/* ---- memory ---- */

static muonshard_status cuda_alloc(backend *self, void **memory, size_t bytes) {
    *memory = NULL;
    TRY_CUDA(self, enter(self));
    const size_t size = bytes ? bytes : 1;
    const cudaError_t code = cudaMalloc(memory, size);
    if (code == cudaErrorMemoryAllocation) {
        size_t free_bytes = 0, total = 0;
        cudaGetLastError();
        cudaMemGetInfo(&free_bytes, &total);
        return fail(&self->error, MUONSHARD_ERR_MEMORY,
                    "out of device memory: %zu bytes are wanted, %zu of %zu are free (%s)", bytes,
                    free_bytes, total, self->device_text);
    }
    TRY_CUDA(self, code);
    cudaError_t cleared = cudaMemsetAsync(*memory, 0, size, stream_of(self, STREAM_COMPUTE));
    if (cleared == cudaSuccess)
        cleared = cudaStreamSynchronize(stream_of(self, STREAM_COMPUTE));
    if (cleared != cudaSuccess) {
        cudaFree(*memory);
        *memory = NULL;
    }
    TRY_CUDA(self, cleared);
    return MUONSHARD_OK;
}

static void cuda_free(backend *self, void *memory) {
    if (memory && enter(self) == cudaSuccess)
        cudaFree(memory); /* waits for what is under way on it */
}

static muonshard_status cuda_alloc_pinned(backend *self, void **memory, size_t bytes) {
    *memory = NULL;
    TRY_CUDA(self, enter(self));
    TRY_CUDA(self, cudaHostAlloc(memory, bytes ? bytes : 1, cudaHostAllocDefault));
    memset(*memory, 0, bytes);
    return MUONSHARD_OK;
}

static void cuda_free_pinned(backend *self, void *memory) {
    if (memory && enter(self) == cudaSuccess)
        cudaFreeHost(memory);
}

static muonshard_status cuda_copy_async(backend *self, const copy_item *items, size_t count,
                                        backend_stream stream) {
    TRY_CUDA(self, enter(self));
    for (size_t i = 0; i < count; i++)
        if (items[i].bytes)
            TRY_CUDA(self, cudaMemcpyAsync(items[i].dst, items[i].src, items[i].bytes,
                                           cudaMemcpyDefault, stream_of(self, stream)));
    return MUONSHARD_OK;
}

static struct cudaPointerAttributes attributes_of(const void *memory) {
    struct cudaPointerAttributes attributes;
    if (cudaPointerGetAttributes(&attributes, memory) != cudaSuccess) {
        cudaGetLastError();
        attributes = (struct cudaPointerAttributes){.type = cudaMemoryTypeUnregistered};
    }
    return attributes;
}

static bool is_host(const void *memory) {
    const enum cudaMemoryType type = attributes_of(memory).type;
    return type != cudaMemoryTypeDevice && type != cudaMemoryTypeManaged;
}

static bool cuda_is_device(backend *self, const void *memory) {
    if (enter(self) != cudaSuccess)
        return false;
    const struct cudaPointerAttributes a = attributes_of(memory);
    return a.type == cudaMemoryTypeManaged ||
           (a.type == cudaMemoryTypeDevice && a.device == self->ordinal);
}

static muonshard_status cuda_copy(backend *self, const copy_item *items, size_t count,
                                  backend_stream stream) {
    TRY(cuda_copy_async(self, items, count, stream));
    bool host = false;
    for (size_t i = 0; i < count && !host; i++)
        host = items[i].bytes && (is_host(items[i].dst) || is_host(items[i].src));
    if (host)
        TRY_CUDA(self, cudaStreamSynchronize(stream_of(self, stream)));
    return MUONSHARD_OK;
}

static muonshard_status cuda_write_bytes(backend *self, void *dst, const void *src, size_t bytes,
                                         backend_stream stream) {
    TRY_CUDA(self, enter(self));
    TRY_CUDA(self, cuda_write(dst, src, bytes, stream_of(self, stream)));
    return MUONSHARD_OK;
}

/* ---- kernels ---- */

static muonshard_status cuda_convert_items(backend *self, const kernel_context *context,
                                           const convert_item *items, size_t count,
                                           backend_stream stream) {
    TRY_CUDA(self, enter(self));
    TRY_CUDA(self, cuda_convert(context, items, count, stream_of(self, stream)));
    return MUONSHARD_OK;
}

static muonshard_status cuda_sum_of_ranks(backend *self, const sum_ranks_args *args,
                                          backend_stream stream) {
    TRY_CUDA(self, enter(self));
    TRY_CUDA(self, cuda_sum_ranks(args, stream_of(self, stream)));
    return MUONSHARD_OK;
}

static muonshard_status cuda_measure(backend *self, const sum_squares_item *items, size_t count) {
    TRY_CUDA(self, enter(self));
    TRY_CUDA(self, cuda_sum_squares(items, count, cuda_of(self)->scratch,
                                    stream_of(self, STREAM_COMPUTE)));
    return MUONSHARD_OK;
}

static muonshard_status cuda_resolve_words(backend *self, const resolve_args *args) {
    TRY_CUDA(self, enter(self));
    TRY_CUDA(self, cuda_resolve(args, stream_of(self, STREAM_COMPUTE)));
    return MUONSHARD_OK;
}

static muonshard_status cuda_momentum_items(backend *self, const kernel_context *context,
                                            const momentum_args *args, const momentum_item *items,
                                            size_t count) {
    TRY_CUDA(self, enter(self));
    TRY_CUDA(self, cuda_momentum(context, args, items, count, cuda_of(self)->scratch,
                                 stream_of(self, STREAM_COMPUTE)));
    return MUONSHARD_OK;
}

static muonshard_status cuda_variance_items(backend *self, const kernel_context *context,
                                            const variance_args *args, const variance_item *items,
                                            size_t count) {
    TRY_CUDA(self, enter(self));
    TRY_CUDA(self, cuda_variance(context, args, items, count, cuda_of(self)->scratch,
                                 stream_of(self, STREAM_COMPUTE)));
    return MUONSHARD_OK;
}

static muonshard_status cuda_apply_items(backend *self, const kernel_context *context,
                                         const apply_args *args, const apply_item *items,
                                         size_t count) {
    TRY_CUDA(self, enter(self));
    TRY_CUDA(self, cuda_apply(context, args, items, count, stream_of(self, STREAM_COMPUTE)));
    return MUONSHARD_OK;
}

static muonshard_status cuda_adam_items(backend *self, const kernel_context *context,
                                        const adam_args *args, const adam_item *items,
                                        size_t count) {
    TRY_CUDA(self, enter(self));
    TRY_CUDA(self, cuda_adam(context, args, items, count, stream_of(self, STREAM_COMPUTE)));
    return MUONSHARD_OK;
}

static muonshard_status cuda_prepare_items(backend *self, const ns_program *program, int64_t m,
                                           int64_t n, const orthogonalize_item *items, size_t count,
                                           void *workspace) {
    TRY_CUDA(self, enter(self));
    return cuda_prepare(self, program, m, n, items, count, workspace);
}

/* ---- order between streams ---- */

static muonshard_status wait_for(backend *self, cudaStream_t from, cudaEvent_t event,
                                 cudaStream_t to) {
    if (from == to)
        return MUONSHARD_OK;
    TRY_CUDA(self, enter(self));
    TRY_CUDA(self, cudaEventRecord(event, from));
    TRY_CUDA(self, cudaStreamWaitEvent(to, event, 0));
    return MUONSHARD_OK;
}

static muonshard_status cuda_fence(backend *self, backend_stream from, backend_stream to) {
    return wait_for(self, stream_of(self, from), cuda_of(self)->fences[from], stream_of(self, to));
}

static muonshard_status cuda_join_from(backend *self, void *native, backend_stream stream) {
    return wait_for(self, native, cuda_of(self)->joined, stream_of(self, stream));
}

static muonshard_status cuda_join_to(backend *self, void *native, backend_stream stream) {
    return wait_for(self, stream_of(self, stream), cuda_of(self)->joined, native);
}

static void *cuda_native(backend *self, backend_stream stream) {
    return stream_of(self, stream);
}

/* ---- stamps ---- */

static void free_stamps(cuda_impl *impl) {
    for (size_t i = 0; i < impl->stamp_count; i++)
        cudaEventDestroy(impl->stamps[i]);
    free(impl->stamps);
    impl->stamps = NULL;
    impl->stamp_count = 0;
}

static muonshard_status cuda_alloc_stamps(backend *self, size_t count) {
    cuda_impl *impl = cuda_of(self);
    TRY_CUDA(self, enter(self));
    free_stamps(impl);
    cudaEvent_t *stamps = calloc(count, sizeof *stamps);
    FAIL_IF(!stamps, &self->error, MUONSHARD_ERR_MEMORY, "out of memory");
    impl->stamps = stamps;
    for (; impl->stamp_count < count; impl->stamp_count++)
        TRY_CUDA(self, cudaEventCreate(&stamps[impl->stamp_count]));
    return MUONSHARD_OK;
}

/* In a graph a stamp is a node, which is passed again by every replay. */
static muonshard_status cuda_stamp(backend *self, size_t index, backend_stream stream) {
    cuda_impl *impl = cuda_of(self);
    TRY_CUDA(self, enter(self));
    TRY_CUDA(self, cudaEventRecordWithFlags(impl->stamps[index], stream_of(self, stream),
                                            impl->capturing && stream == STREAM_COMPUTE
                                                ? cudaEventRecordExternal
                                                : cudaEventRecordDefault));
    return MUONSHARD_OK;
}

static muonshard_status cuda_stamp_passed(backend *self, size_t index, bool *passed) {
    const cudaError_t code = cudaEventQuery(cuda_of(self)->stamps[index]);
    *passed = code == cudaSuccess;
    if (code == cudaErrorNotReady) {
        cudaGetLastError();
        return MUONSHARD_OK;
    }
    TRY_CUDA(self, code);
    return MUONSHARD_OK;
}

static muonshard_status cuda_wait_stamp(backend *self, size_t index, void *native) {
    TRY_CUDA(self, enter(self));
    TRY_CUDA(self, cudaStreamWaitEvent(native, cuda_of(self)->stamps[index], 0));
    return MUONSHARD_OK;
}

static muonshard_status cuda_stamp_seconds(backend *self, size_t from, size_t to, double *seconds) {
    const cuda_impl *impl = cuda_of(self);
    float ms = 0.0f;
    TRY_CUDA(self, cudaEventElapsedTime(&ms, impl->stamps[from], impl->stamps[to]));
    *seconds = (double)ms * 1e-3;
    return MUONSHARD_OK;
}

/* ---- segments ---- */

/* A capture that an error has cut off ends here. */
static void free_segments(cuda_impl *impl) {
    cudaGraph_t graph = NULL;
    if (impl->capturing &&
        cudaStreamEndCapture(impl->streams[STREAM_COMPUTE], &graph) == cudaSuccess)
        cudaGraphDestroy(graph);
    impl->capturing = false;
    for (size_t i = 0; i < impl->segment_count; i++)
        if (impl->segments[i])
            cudaGraphExecDestroy(impl->segments[i]);
    free(impl->segments);
    impl->segments = NULL;
    impl->segment_count = 0;
}

static muonshard_status cuda_alloc_segments(backend *self, size_t count) {
    cuda_impl *impl = cuda_of(self);
    free_segments(impl);
    impl->segments = calloc(count ? count : 1, sizeof *impl->segments);
    FAIL_IF(!impl->segments, &self->error, MUONSHARD_ERR_MEMORY, "out of memory");
    impl->segment_count = count;
    return MUONSHARD_OK;
}

static muonshard_status cuda_begin_segment(backend *self) {
    TRY_CUDA(self, enter(self));
    TRY_CUDA(self, cudaStreamBeginCapture(stream_of(self, STREAM_COMPUTE),
                                          cudaStreamCaptureModeThreadLocal));
    cuda_of(self)->capturing = true;
    return MUONSHARD_OK;
}

static muonshard_status cuda_replay_segment(backend *self, size_t index) {
    TRY_CUDA(self, enter(self));
    TRY_CUDA(self,
             cudaGraphLaunch(cuda_of(self)->segments[index], stream_of(self, STREAM_COMPUTE)));
    return MUONSHARD_OK;
}

static muonshard_status cuda_end_segment(backend *self, size_t index, segment_mode mode) {
    cuda_impl *impl = cuda_of(self);
    cudaGraph_t graph = NULL;
    impl->capturing = false;
    cudaError_t code = cudaStreamEndCapture(stream_of(self, STREAM_COMPUTE), &graph);
    if (code == cudaSuccess && mode != SEGMENT_DROP)
        code = cudaGraphInstantiate(&impl->segments[index], graph, 0);
    if (graph)
        cudaGraphDestroy(graph);
    if (mode == SEGMENT_DROP) {
        cudaGetLastError(); /* what went wrong in it is known */
        return MUONSHARD_OK;
    }
    TRY_CUDA(self, code);
    return mode == SEGMENT_RECORD ? cuda_replay_segment(self, index) : MUONSHARD_OK;
}

/* ---- ranges ---- */

static void cuda_range_begin(backend *self, const char *name) {
    (void)self;
    nvtxRangePushA(name);
}

static void cuda_range_end(backend *self) {
    (void)self;
    nvtxRangePop();
}

/* ---- life ---- */

static void cuda_destroy(backend *self) {
    cuda_impl *impl = cuda_of(self);
    enter(self);
    free_segments(impl);
    free_stamps(impl);
    gemm_table_free(impl->gemms);
    tile_products_close(self);
    if (impl->blas)
        cublasLtDestroy(impl->blas);
    cudaFree(impl->scratch);
    for (int i = 0; i < STREAM_COUNT; i++)
        if (impl->fences[i])
            cudaEventDestroy(impl->fences[i]);
    if (impl->joined)
        cudaEventDestroy(impl->joined);
    for (int i = STREAM_COUNT - 1; i >= 0; i--)
        if (impl->streams[i] && (i == 0 || impl->streams[i] != impl->streams[0]))
            cudaStreamDestroy(impl->streams[i]);
    free(impl);
    free(self);
}

static const backend_ops cuda_ops = {
    .name = "cuda",
    .batched = true,
    .alloc = cuda_alloc,
    .free = cuda_free,
    .copy = cuda_copy,
    .convert = cuda_convert_items,
    .sum_ranks = cuda_sum_of_ranks,
    .sum_squares = cuda_measure,
    .resolve = cuda_resolve_words,
    .momentum = cuda_momentum_items,
    .orthogonalize_workspace = cuda_orthogonalize_workspace,
    .orthogonalize = cuda_orthogonalize,
    .variance = cuda_variance_items,
    .apply = cuda_apply_items,
    .adam = cuda_adam_items,
    .fence = cuda_fence,
    .destroy = cuda_destroy,
};

static const stream_ops cuda_streams = {
    .alloc_pinned = cuda_alloc_pinned,
    .free_pinned = cuda_free_pinned,
    .is_device = cuda_is_device,
    .copy_async = cuda_copy_async,
    .write = cuda_write_bytes,
    .join_from = cuda_join_from,
    .join_to = cuda_join_to,
    .alloc_stamps = cuda_alloc_stamps,
    .stamp = cuda_stamp,
    .stamp_passed = cuda_stamp_passed,
    .wait_stamp = cuda_wait_stamp,
    .stamp_seconds = cuda_stamp_seconds,
    .alloc_segments = cuda_alloc_segments,
    .begin_segment = cuda_begin_segment,
    .end_segment = cuda_end_segment,
    .replay_segment = cuda_replay_segment,
    .native = cuda_native,
    .prepare = cuda_prepare_items,
    .choices = gemm_table_text,
    .choices_kept = gemm_table_kept,
    .take_choices = gemm_table_read,
    .range_begin = cuda_range_begin,
    .range_end = cuda_range_end,
};

/* ---- which device ---- */

static muonshard_status choose_device(cuda_options options, int *device, error_text *error) {
    int count = 0, driver = 0, runtime = 0;
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    const cudaError_t code = cudaGetDeviceCount(&count);
    if (code != cudaSuccess)
        cudaGetLastError();
    FAIL_IF(code == cudaErrorInsufficientDriver || code == cudaErrorStubLibrary, error,
            MUONSHARD_ERR_UNAVAILABLE,
            driver ? "no CUDA backend: the driver is for CUDA %d.%d, %d.%d is needed"
                   : "no CUDA backend: no NVIDIA driver",
            driver / 1000, driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10);
    FAIL_IF(code != cudaSuccess && code != cudaErrorNoDevice, error, MUONSHARD_ERR_UNAVAILABLE,
            "no CUDA backend: %s", cudaGetErrorString(code));
    FAIL_IF(count == 0, error, MUONSHARD_ERR_UNAVAILABLE, "no CUDA backend: no device is visible");
    *device = count == 1 ? 0 : options.local_rank;
    if (options.share)
        *device = options.local_rank % count;
    FAIL_IF(*device >= count, error, MUONSHARD_ERR_CONFIG,
            "rank %d of this machine finds %d devices; a rank needs one of its own, or share_gpu",
            options.local_rank, count);
    return MUONSHARD_OK;
}

static muonshard_status describe_device(backend *self, error_text *error) {
    struct cudaDeviceProp p;
    const int device = self->ordinal;
    const cudaError_t code = cudaGetDeviceProperties(&p, device);
    FAIL_IF(code != cudaSuccess, error, MUONSHARD_ERR_UNAVAILABLE, "no CUDA backend: %s",
            cudaGetErrorString(code));
    memcpy(self->device, p.uuid.bytes, sizeof self->device);
    cuda_of(self)->processors = p.multiProcessorCount;
    cuda_of(self)->capability = 10 * p.major + p.minor;
    snprintf(cuda_of(self)->model, sizeof cuda_of(self)->model, "%.30s, sm_%d%d", p.name, p.major,
             p.minor);
    int at = snprintf(self->device_text, sizeof self->device_text,
                      "device %d: %.30s, sm_%d%d, GPU-", device, p.name, p.major, p.minor);
    for (int i = 0; i < 16; i++) /* as nvidia-smi -L writes it */
        at += snprintf(self->device_text + at, sizeof self->device_text - (size_t)at, "%s%02x",
                       i == 4 || i == 6 || i == 8 || i == 10 ? "-" : "", self->device[i]);
    FAIL_IF(p.major < 8, error, MUONSHARD_ERR_UNAVAILABLE,
            "no CUDA backend: %s is too old; sm_80 and later are supported", self->device_text);
    return MUONSHARD_OK;
}

/* Communication goes first where both have something to do. */
static muonshard_status open_streams(backend *self, bool share) {
    cuda_impl *impl = cuda_of(self);
    int lowest = 0, highest = 0;
    TRY_CUDA(self, enter(self));
    TRY_CUDA(self, cudaDeviceGetStreamPriorityRange(&lowest, &highest));
    TRY_CUDA(self, cudaStreamCreateWithPriority(&impl->streams[STREAM_COMPUTE],
                                                cudaStreamNonBlocking, lowest));
    if (share)
        impl->streams[STREAM_COMM] = impl->streams[STREAM_COMPUTE];
    else
        TRY_CUDA(self, cudaStreamCreateWithPriority(&impl->streams[STREAM_COMM],
                                                    cudaStreamNonBlocking, highest));
    for (int i = 0; i < STREAM_COUNT; i++)
        TRY_CUDA(self, cudaEventCreateWithFlags(&impl->fences[i], cudaEventDisableTiming));
    TRY_CUDA(self, cudaEventCreateWithFlags(&impl->joined, cudaEventDisableTiming));
    void *scratch;
    TRY(cuda_alloc(self, &scratch, CUDA_SCRATCH_BYTES));
    impl->scratch = scratch;
    self->bytes = CUDA_SCRATCH_BYTES;
    const cublasStatus_t code = cublasLtCreate(&impl->blas);
    FAIL_IF(code != CUBLAS_STATUS_SUCCESS, &self->error, MUONSHARD_ERR_UNAVAILABLE,
            "no CUDA backend: cuBLASLt: %s", cublasLtGetStatusString(code));
    return MUONSHARD_OK;
}

muonshard_status cuda_open(cuda_options options, backend **out, error_text *error) {
    int device = 0;
    *out = NULL;
    TRY(choose_device(options, &device, error));
    backend *self = calloc(1, sizeof *self);
    cuda_impl *impl = calloc(1, sizeof *impl);
    if (!self || !impl) {
        free(self);
        free(impl);
        return fail(error, MUONSHARD_ERR_MEMORY, "out of memory");
    }
    self->ordinal = device;
    self->impl = impl;
    impl->measures_gemms = options.measures;
    impl->panels = options.panels;
    self->ops = &cuda_ops;
    self->streams = &cuda_streams;
    self->threads = 1;
    muonshard_status status = describe_device(self, error);
    if (status == MUONSHARD_OK) {
        status = open_streams(self, options.share);
        if (status == MUONSHARD_OK && options.tiles)
            status = tile_products_open(self, !options.deterministic);
        if (status)
            fail(error, status, "%s", self->error.text);
    }
    if (status) {
        cuda_destroy(self);
        return status;
    }
    *out = self;
    return MUONSHARD_OK;
}
