// What the instrumentation of kernel code needs at every step, kept in thread-local variables.
#pragma once

#include <cstdint>

namespace simt {

class Engine;

// Null: kernel code that runs now is no launch's (static constructors).
void enter_engine(Engine *engine);
// The stack on which accesses are the lane's own affair.
void enter_lane(const char *stack);
void begin_steps(uint64_t limit);
uint64_t steps_left();

} // namespace simt
