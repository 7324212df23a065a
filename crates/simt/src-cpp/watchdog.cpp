#include "watchdog.hpp"

#include "engine.hpp"
#include "hooks.hpp"

#include <cstdio>
#include <cstdlib>
#include <unistd.h>

#ifndef sigev_notify_thread_id
#define sigev_notify_thread_id _sigev_un._tid
#endif

namespace simt {

namespace {

constexpr int SIGNAL = SIGVTALRM;
thread_local uint64_t last_seen = 0;

// Runs on the stack of the lane that spins. Nothing but kernel code goes a second without a step, so the lane holds no
// lock and may be left where it is, this handler with it.
void look(int) {
    Engine *engine = current();
    if (engine == nullptr) {
        return;
    }
    const uint64_t now = steps_left();
    if (now == last_seen) {
        engine->out_of_steps();
    }
    last_seen = now;
}

[[noreturn]] void no_timer() {
    std::perror("simt: no timer to be had");
    std::abort();
}

} // namespace

Watchdog::Watchdog() {
    struct sigaction action = {};
    action.sa_handler = look;
    // The handler may never return, and the signal must come again.
    action.sa_flags = SA_NODEFER | SA_RESTART;
    struct sigevent event = {};
    event.sigev_notify = SIGEV_THREAD_ID;
    event.sigev_signo = SIGNAL;
    event.sigev_notify_thread_id = gettid();
    if (sigaction(SIGNAL, &action, nullptr) != 0 || timer_create(CLOCK_THREAD_CPUTIME_ID, &event, &timer_) != 0) {
        no_timer();
    }
}

Watchdog::~Watchdog() { timer_delete(timer_); }

void Watchdog::set(time_t seconds) {
    last_seen = ~uint64_t{0};
    const struct itimerspec every = {{seconds, 0}, {seconds, 0}};
    if (timer_settime(timer_, 0, &every, nullptr) != 0) {
        no_timer();
    }
}

} // namespace simt
