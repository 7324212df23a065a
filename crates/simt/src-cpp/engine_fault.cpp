// How a launch ends early: in words, and for good.
#include "engine.hpp"

#include "hooks.hpp"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace simt {

namespace {

const char *file_of(const Site &site) {
    const char *slash = std::strrchr(site.file_name(), '/');
    return slash == nullptr ? site.file_name() : slash + 1;
}

std::string hexadecimal(uint32_t value) {
    char text[16];
    std::snprintf(text, sizeof text, "%08x", value);
    return text;
}

} // namespace

// Leaves the lanes where they stand; the next block starts their stacks anew.
void Engine::abandon() {
    failed_ = true;
    switch_fiber(running_->fiber, main_);
    std::abort(); // a failed launch chooses no lane again
}

void Engine::fail(SimtKind kind, uint32_t lane, uint32_t place, const char *format, ...) {
    fault.kind = kind;
    fault.lane = lane;
    fault.block[0] = block_index.x;
    fault.block[1] = block_index.y;
    fault.block[2] = block_index.z;
    if (place != 0 && fault.num_places < 2) {
        // The access at fault comes first, whatever was noted before.
        fault.places[1] = fault.places[0];
        fault.places[0] = place;
        ++fault.num_places;
    }
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(fault.detail, sizeof fault.detail, format, arguments);
    va_end(arguments);
    abandon();
}

void Engine::out_of_steps() {
    const Meeting &last = running_->meeting;
    fail(SIMT_STEP_LIMIT, running_->index, last.place, "no end after %llu steps in this block; last met others at %s%s%s",
         static_cast<unsigned long long>(request_.step_limit - steps_left()), last.what == nullptr ? "no place" : last.what,
         last.what == nullptr ? "" : " in ", last.what == nullptr ? "" : file_of(last.site));
}

std::string Engine::waiting() const {
    std::string text;
    const auto same = [](const Lane &a, const Lane &b) {
        return a.state == b.state && (a.state == State::Exited ||
                                      (a.meeting.what == b.meeting.what && a.meeting.mask == b.meeting.mask &&
                                       a.meeting.site.line() == b.meeting.site.line() &&
                                       std::strcmp(a.meeting.site.file_name(), b.meeting.site.file_name()) == 0));
    };
    for (unsigned first = 0; first < num_lanes_;) {
        unsigned end = first + 1;
        while (end < num_lanes_ && same(lanes_[first], lanes_[end])) {
            ++end;
        }
        const Lane &lane = lanes_[first];
        const Meeting &at = lane.meeting;
        text += text.empty() ? "" : "; ";
        text += end - first == 1 ? "thread " + std::to_string(first)
                                 : "threads " + std::to_string(first) + "-" + std::to_string(end - 1);
        if (lane.state == State::Exited) {
            text += end - first == 1 ? " has exited" : " have exited";
        } else {
            text += end - first == 1 ? " waits at " : " wait at ";
            text += std::string(at.what) + " (" + file_of(at.site) + ":" + std::to_string(at.site.line());
            text += lane.state == State::AtMeeting       ? ", mask " + hexadecimal(at.mask) + ")"
                    : lane.state == State::AtPartBarrier ? ", barrier " + std::to_string(at.mask) + ")"
                                                         : ")";
        }
        first = end;
    }
    if (num_lanes_ % 32 != 0) {
        text += "; the last warp has " + std::to_string(num_lanes_ % 32) + " lanes";
    }
    return text;
}

void Engine::deadlock() {
    bool barrier = false;
    uint32_t first = ~0u;
    for (unsigned i = 0; i < num_lanes_; ++i) {
        barrier |= lanes_[i].state != State::AtMeeting && lanes_[i].state != State::Exited;
        if (lanes_[i].state != State::Exited && first == ~0u) {
            first = i;
        }
    }
    // `fail` does not return, so what it needs may not own memory.
    char text[1536];
    std::snprintf(text, sizeof text, "%s", waiting().c_str());
    fail(barrier ? SIMT_BARRIER_DIVERGENCE : SIMT_WARP_DIVERGENCE, first, lanes_[first].meeting.place, "%s", text);
}

void Engine::stray(uintptr_t address, size_t bytes, Access kind, uint32_t place) {
    char text[512];
    const auto window = reinterpret_cast<uintptr_t>(shared);
    const bool writes = kind == Access::Write || kind == Access::Atomic;
    if (address - reinterpret_cast<uintptr_t>(shared_mapping_) < SHARED_MAPPING) {
        std::snprintf(text, sizeof text, "at byte %lld of shared memory (%u bytes)%s",
                      static_cast<long long>(address) - static_cast<long long>(window), request_.shared_bytes,
                      kind == Access::ReadOnly ? ", which is not global memory" : "");
    } else if (stacks_.holds(address)) {
        std::snprintf(text, sizeof text, "at local variables, of this thread or another");
    } else {
        std::snprintf(text, sizeof text, "at %s", regions().describe(address).c_str());
    }
    fail(SIMT_OUT_OF_BOUNDS, running_->index, place, "%s %zu bytes %s", writes ? "writes" : "reads", bytes, text);
}

void Engine::report(const Conflict &c, const char *where, const char *verb, uint32_t place) {
    char other[128] = "several threads";
    SimtKind kind = SIMT_RACE;
    char text[768];
    if (c.time >= launch_start_ && c.lane != ~0u) {
        const Index block = block_from(block_at(c.time));
        std::snprintf(other, sizeof other, "thread %u of block (%u, %u, %u)", c.lane, block.x, block.y, block.z);
    }
    switch (c.trouble) {
    case Trouble::Uninitialised:
        kind = SIMT_UNINITIALISED;
        std::snprintf(text, sizeof text, "%s %s, which nothing has written yet", verb, where);
        break;
    case Trouble::Pending:
        kind = SIMT_PENDING_COPY;
        std::snprintf(text, sizeof text, "%s %s, which an asynchronous copy of %s fills and no wait has completed", verb,
                      where, other);
        break;
    case Trouble::AfterAsync:
        std::snprintf(text, sizeof text, "%s %s while an asynchronous copy of %s fills it", verb, where, other);
        break;
    case Trouble::Proxy:
        std::snprintf(text, sizeof text,
                      "%s %s through the asynchronous proxy, written by ordinary stores of %s that no fence.proxy.async of "
                      "its own has followed",
                      verb, where, other);
        break;
    case Trouble::BeingRead:
        std::snprintf(text, sizeof text, "%s %s while a bulk copy or a wgmma still reads it", verb, where);
        break;
    case Trouble::AfterWrite:
    case Trouble::AfterRead:
    case Trouble::None:
        std::snprintf(text, sizeof text, "%s %s, %s by %s with no synchronisation between", verb, where,
                      c.trouble == Trouble::AfterWrite ? "written" : "read", other);
        break;
    }
    if (c.place != 0) {
        fault.places[0] = c.place;
        fault.num_places = 1;
    }
    fail(kind, running_->index, place, "%s", text);
}

} // namespace simt
