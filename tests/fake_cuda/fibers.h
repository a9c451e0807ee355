/* fibers.h - a change of stacks, for threads of a device that are run by turns in one of the host.
 */
#ifndef FIBERS_H
#define FIBERS_H

#include <stddef.h>

#ifdef __x86_64__
/* What a call keeps goes to the old stack, whose top is left in *from. */
extern "C" void change_stacks(void **from, void *to);

struct stack_top {
    void *at = nullptr;
    void prepare(char *stack, size_t size, void (*entry)()) {
        void **top = (void **)(((size_t)(stack + size)) / 16 * 16);
        *--top = nullptr; /* where entry, which never returns, would return to */
        *--top = (void *)entry;
        at = top - 6;
    }
    void to(stack_top &other) {
        change_stacks(&at, other.at);
    }
};
#else
#include <ucontext.h>

struct stack_top {
    ucontext_t context;
    void prepare(char *stack, size_t size, void (*entry)()) {
        getcontext(&context);
        context.uc_stack.ss_sp = stack;
        context.uc_stack.ss_size = size;
        context.uc_link = nullptr;
        makecontext(&context, entry, 0);
    }
    void to(stack_top &other) {
        swapcontext(&context, &other.context);
    }
};
#endif

#endif
