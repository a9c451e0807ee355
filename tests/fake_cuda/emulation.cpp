/* emulation.cpp - runs the blocks of a grid one after the other, and the threads of a block by
 * turns from barrier to barrier. */
#include "cuda_emulation.h"

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "fake.h"
#include "fibers.h"
#include "hopper_machine.h"

#ifdef __x86_64__
__asm__(".text\n"
        ".globl change_stacks\n"
        ".hidden change_stacks\n"
        "change_stacks:\n"
        "push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
        "mov %rsp, (%rdi)\n"
        "mov %rsi, %rsp\n"
        "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n"
        "ret\n");
#endif

thread_local uint3 threadIdx, blockIdx;
thread_local dim3 blockDim, gridDim;

namespace {

const size_t STACK = 128 << 10;

struct fiber {
    stack_top context;
    std::vector<char> stack;
    bool done = true;
};

thread_local std::vector<fiber> fibers;
thread_local stack_top scheduler;
thread_local fiber *running; /* NULL: a thread that runs on the caller's stack */
thread_local const std::function<void()> *body;

void enter() {
    (*body)();
    running->done = true;
    running->context.to(scheduler);
}

void set_thread(unsigned i) {
    threadIdx.x = i % blockDim.x;
    threadIdx.y = i / blockDim.x % blockDim.y;
    threadIdx.z = i / blockDim.x / blockDim.y;
}

void resume(unsigned i) {
    running = &fibers[i];
    set_thread(i);
    scheduler.to(running->context);
    running = nullptr;
}

void start(unsigned i) {
    fiber &f = fibers[i];
    if (f.stack.empty())
        f.stack.resize(STACK);
    f.done = false;
    f.context.prepare(f.stack.data(), STACK, enter);
    resume(i);
}

void run_block(const std::function<void()> &thread) {
    const unsigned count = blockDim.x * blockDim.y * blockDim.z;
    if (fibers.size() < count)
        fibers.resize(count);
    body = &thread;
    start(0);
    if (fibers[0].done) { /* no barrier in this block */
        for (unsigned i = 1; i < count; i++) {
            set_thread(i);
            thread();
        }
        return;
    }
    for (unsigned i = 1; i < count; i++)
        start(i);
    for (bool any = true; any;) {
        any = false;
        for (unsigned i = 0; i < count; i++)
            if (!fibers[i].done) {
                resume(i);
                any = true;
            }
    }
}

} // namespace

void emulated_barrier(void) {
    if (hopper_runs())
        return named_barrier(0, blockDim.x);
    if (!running) {
        fprintf(stderr, "emulation: a barrier that not all threads of a block come to\n");
        abort();
    }
    running->context.to(scheduler);
}

void emulated_wide_access(const void *at, size_t bytes) {
    if ((size_t)at % bytes) {
        fprintf(stderr, "emulation: %zu bytes at an address that is no multiple of it\n", bytes);
        abort();
    }
}

/* The limits of every device there is. */
cudaError_t emulated_launch(cudaStream_t stream, dim3 grid, dim3 block, size_t parameter_bytes,
                            std::function<void()> thread) {
    if (fake_fails())
        return cudaErrorLaunchFailure;
    if (!grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535 ||
        block.x * block.y * block.z > 1024 || parameter_bytes > 4096)
        return cudaErrorInvalidConfiguration;
    return fake_enqueue(stream, [=] {
        gridDim = grid;
        blockDim = block;
        for (unsigned z = 0; z < grid.z; z++)
            for (unsigned y = 0; y < grid.y; y++)
                for (unsigned x = 0; x < grid.x; x++) {
                    blockIdx = {x, y, z};
                    run_block(thread);
                }
    });
}
