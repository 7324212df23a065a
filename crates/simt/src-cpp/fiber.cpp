#include "fiber.hpp"

#include "mapping.hpp"

#include <sys/mman.h>

#if SIMT_FIBER_ASSEMBLY
// System V: rbx, rbp and r12 to r15 are the callee's to keep; everything else the compiler saves around the call.
asm(R"(
.text
.globl simt_switch_stack
.type simt_switch_stack, @function
simt_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size simt_switch_stack, .-simt_switch_stack
)");
extern "C" void simt_switch_stack(void **save, void *load);
#endif

namespace simt {

#if SIMT_FIBER_ASSEMBLY

void Fiber::start(char *stack, size_t bytes, void (*entry)()) {
    // The first switch pops six registers and returns into `entry` with the stack as a call would leave it.
    auto *top = reinterpret_cast<void **>(stack + bytes);
    *--top = nullptr;
    *--top = reinterpret_cast<void *>(entry);
    for (int i = 0; i < 6; ++i) {
        *--top = nullptr;
    }
    stack_pointer = top;
}

void switch_fiber(Fiber &from, Fiber &to) { simt_switch_stack(&from.stack_pointer, to.stack_pointer); }

#else

void Fiber::start(char *stack, size_t bytes, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = bytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
}

void switch_fiber(Fiber &from, Fiber &to) { swapcontext(&from.context, &to.context); }

#endif

Stacks::Stacks() : base_(map_bytes(COUNT * PITCH)) {
    for (size_t i = 0; i < COUNT; ++i) {
        protect_bytes(base_ + i * PITCH, GUARD, PROT_NONE);
    }
}

Stacks::~Stacks() { unmap_bytes(base_, COUNT * PITCH); }

} // namespace simt
