// One lane is one fiber: a stack and a saved stack pointer.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__x86_64__) && !defined(SIMT_UCONTEXT)
#define SIMT_FIBER_ASSEMBLY 1
#else
#define SIMT_FIBER_ASSEMBLY 0
#include <ucontext.h>
#endif

namespace simt {

struct Fiber {
#if SIMT_FIBER_ASSEMBLY
    void *stack_pointer = nullptr;
#else
    ucontext_t context;
#endif
    // Makes the next switch to this fiber call `entry`, which never returns.
    void start(char *stack, size_t bytes, void (*entry)());
};

// Stops `from` here and goes on where `to` stopped.
void switch_fiber(Fiber &from, Fiber &to);

// Stacks of equal size with a page between them that no one may touch.
class Stacks {
  public:
    static constexpr size_t BYTES = size_t{256} << 10;

    Stacks();
    ~Stacks();
    Stacks(const Stacks &) = delete;
    Stacks &operator=(const Stacks &) = delete;

    char *stack(unsigned index) const { return base_ + index * PITCH + GUARD; }
    bool holds(uintptr_t address) const { return address - reinterpret_cast<uintptr_t>(base_) < COUNT * PITCH; }

  private:
    static constexpr size_t GUARD = 4096;
    static constexpr size_t PITCH = BYTES + GUARD;
    static constexpr size_t COUNT = 1024;
    char *base_;
};

} // namespace simt
