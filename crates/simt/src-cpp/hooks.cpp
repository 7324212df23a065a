// What g++ calls in instrumented code: -fsanitize=thread at every load and store, -fsanitize-coverage=trace-pc at every
// basic block, -fsanitize=alignment,... at what C++ leaves undefined. The sanitizers' own libraries are not linked.
#include "hooks.hpp"

#include "engine.hpp"

#include <cstdio>
#include <cstring>

namespace simt {

namespace {

thread_local Engine *active = nullptr;
thread_local uintptr_t stack_low = 0;
// Counts down; far from zero where no launch runs.
thread_local uint64_t left = ~uint64_t{0};

inline void touch(const void *pointer, size_t bytes, Access kind, const void *code) {
    const auto address = reinterpret_cast<uintptr_t>(pointer);
    if (address - stack_low < Stacks::BYTES || active == nullptr) {
        return;
    }
    if (--left == 0) {
        active->out_of_steps();
    }
    active->access(address, bytes, kind, place_of(code));
}

} // namespace

Engine *current() { return active; }
void enter_engine(Engine *engine) {
    active = engine;
    stack_low = 0;
    left = ~uint64_t{0};
}
void enter_lane(const char *stack) { stack_low = reinterpret_cast<uintptr_t>(stack); }
void begin_steps(uint64_t limit) { left = limit; }
uint64_t steps_left() { return left; }

void *copy_bytes(void *destination, const void *source, uint64_t bytes) {
    touch(source, bytes, Access::Read, __builtin_return_address(0));
    touch(destination, bytes, Access::Write, __builtin_return_address(0));
    return std::memmove(destination, source, bytes);
}

void *set_bytes(void *destination, int value, uint64_t bytes) {
    touch(destination, bytes, Access::Write, __builtin_return_address(0));
    return std::memset(destination, value, bytes);
}

// Undefined behaviour, named.
[[gnu::noinline]] void undefined(SimtKind kind, const char *what, const void *code) {
    if (active != nullptr) {
        active->fail(kind, active->lane().index, place_of(code), "%s", what);
    }
}

} // namespace simt

#define SIMT_CODE __builtin_return_address(0)
#define SIMT_HOOKS(bytes)                                                                           \
    void __tsan_read##bytes(void *p) { simt::touch(p, bytes, simt::Access::Read, SIMT_CODE); }      \
    void __tsan_write##bytes(void *p) { simt::touch(p, bytes, simt::Access::Write, SIMT_CODE); }    \
    void __tsan_unaligned_read##bytes(void *p) { simt::touch(p, bytes, simt::Access::Read, SIMT_CODE); } \
    void __tsan_unaligned_write##bytes(void *p) { simt::touch(p, bytes, simt::Access::Write, SIMT_CODE); }

extern "C" {

SIMT_HOOKS(1)
SIMT_HOOKS(2)
SIMT_HOOKS(4)
SIMT_HOOKS(8)
SIMT_HOOKS(16)
void __tsan_read_range(void *p, size_t bytes) { simt::touch(p, bytes, simt::Access::Read, SIMT_CODE); }
void __tsan_write_range(void *p, size_t bytes) { simt::touch(p, bytes, simt::Access::Write, SIMT_CODE); }
void __tsan_init() {}
void __tsan_func_entry(void *) {}
void __tsan_func_exit() {}

void __sanitizer_cov_trace_pc() {
    if (--simt::left == 0 && simt::active != nullptr) {
        simt::active->out_of_steps();
    }
}

// The layout of UndefinedBehaviorSanitizer's TypeMismatchData: a location, a type, the alignment's logarithm.
struct SimtTypeMismatch {
    const char *file;
    uint32_t line, column;
    const void *type;
    unsigned char log_alignment;
};

void __ubsan_handle_type_mismatch_v1(const SimtTypeMismatch *data, uintptr_t address) {
    if (simt::active == nullptr) {
        return;
    }
    simt::active->fail(SIMT_MISALIGNED, simt::active->lane().index, simt::place_of(SIMT_CODE),
                       "address %#llx where a multiple of %u is needed", static_cast<unsigned long long>(address),
                       1u << data->log_alignment);
}
void __ubsan_handle_out_of_bounds(void *, uintptr_t index) {
    char what[96];
    std::snprintf(what, sizeof what, "index %lld outside an array", static_cast<long long>(index));
    simt::undefined(SIMT_OUT_OF_BOUNDS, what, SIMT_CODE);
}
void __ubsan_handle_add_overflow(void *, uintptr_t, uintptr_t) {
    simt::undefined(SIMT_UNDEFINED, "signed addition overflows", SIMT_CODE);
}
void __ubsan_handle_sub_overflow(void *, uintptr_t, uintptr_t) {
    simt::undefined(SIMT_UNDEFINED, "signed subtraction overflows", SIMT_CODE);
}
void __ubsan_handle_mul_overflow(void *, uintptr_t, uintptr_t) {
    simt::undefined(SIMT_UNDEFINED, "signed multiplication overflows", SIMT_CODE);
}
void __ubsan_handle_negate_overflow(void *, uintptr_t) {
    simt::undefined(SIMT_UNDEFINED, "signed negation overflows", SIMT_CODE);
}
void __ubsan_handle_divrem_overflow(void *, uintptr_t, uintptr_t) {
    simt::undefined(SIMT_UNDEFINED, "division by zero, or that overflows", SIMT_CODE);
}
void __ubsan_handle_shift_out_of_bounds(void *, uintptr_t, uintptr_t) {
    simt::undefined(SIMT_UNDEFINED, "shift by more bits than there are", SIMT_CODE);
}
void __ubsan_handle_float_cast_overflow(void *, uintptr_t) {
    simt::undefined(SIMT_UNDEFINED, "conversion of a floating-point value that the integer cannot hold", SIMT_CODE);
}

} // extern "C"
