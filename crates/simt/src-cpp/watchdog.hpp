// Ends what no step counter sees: a loop that the compiler has emptied, such as a wait for a value it need not read again.
#pragma once

#include <csignal>
#include <ctime>

namespace simt {

// Looks once a second of this thread's processor time, while armed, whether steps are being counted.
class Watchdog {
  public:
    Watchdog();
    ~Watchdog();
    Watchdog(const Watchdog &) = delete;
    Watchdog &operator=(const Watchdog &) = delete;

    void arm() { set(1); }
    void disarm() { set(0); }

  private:
    void set(time_t seconds);
    timer_t timer_;
};

} // namespace simt
