// Every access of kernel code passes here: bounds first, then what the shadow knows.
#include "engine.hpp"

#include <algorithm>
#include <cstdio>
#include <cstring>

namespace simt {

Observer Engine::observer(bool in_shared, uint32_t place) const {
    return {running_,        in_shared ? block_start_ : launch_start_, block_start_, barrier_time_,
            warp_sync_[running_->index / 32], in_shared, place, clocks_, false, lanes_.get()};
}

void Engine::access(uintptr_t address, size_t bytes, Access kind, uint32_t place) {
    const bool writes = kind == Access::Write || kind == Access::Atomic;
    const uintptr_t in_window = address - reinterpret_cast<uintptr_t>(shared);
    Shadow *shadow = nullptr;
    const Region *region = nullptr;
    size_t at = in_window;
    if (in_window < request_.shared_bytes && bytes <= request_.shared_bytes - in_window && kind != Access::ReadOnly) {
        shadow = &shared_shadow_;
        shared_used = std::max<uint64_t>(shared_used, in_window + bytes);
    } else {
        if (!writes && address - reinterpret_cast<uintptr_t>(params_.data()) < request_.entry->params_bytes) {
            return;
        }
        region = kind == Access::Collective ? nullptr : regions().find(address, bytes);
        if (region == nullptr) {
            if (kind == Access::Read && in_image(address, bytes)) {
                return;
            }
            stray(address, bytes, kind, place);
        }
        shadow = region->shadow.get();
        at = address - region->base;
        if (shadow == nullptr) {
            if (!writes) {
                return;
            }
            fail(SIMT_READ_ONLY, running_->index, place, "writes element %zu of `%s`, an input",
                 at / region->element_bytes, region->name.c_str());
        }
    }
    const Observer by = observer(region == nullptr, place);
    if (kind == Access::ReadOnly && shadow->written_since(at, bytes, launch_start_)) {
        fail(SIMT_RACE, running_->index, place, "reads element %zu of `%s` as read-only, but this launch has written it",
             at / region->element_bytes, region->name.c_str());
    }
    const Conflict conflict = kind == Access::Write    ? shadow->write(at, bytes, by)
                              : kind == Access::Atomic ? shadow->atomic(at, bytes, by)
                                                       : shadow->read(at, bytes, by, kind == Access::Collective);
    if (conflict.trouble != Trouble::None) {
        conflicting(conflict, region, writes ? "writes" : "reads", place);
    }
}

void Engine::conflicting(const Conflict &conflict, const Region *region, const char *verb, uint32_t place) {
    char where[256];
    if (region == nullptr) {
        std::snprintf(where, sizeof where, "byte %zu of shared memory", conflict.byte);
    } else {
        std::snprintf(where, sizeof where, "element %zu of `%s`", conflict.byte / region->element_bytes,
                      region->name.c_str());
    }
    report(conflict, where, verb, place);
}

void Engine::issue_copy(const Copy &copy) {
    const auto to = reinterpret_cast<uintptr_t>(copy.shared);
    const auto from = reinterpret_cast<uintptr_t>(copy.global);
    if (to % 16 != 0 || from % 16 != 0) {
        fail(SIMT_MISALIGNED, running_->index, copy.place, "cp.async of 16 bytes %s address %#llx", to % 16 ? "to" : "from",
             static_cast<unsigned long long>(to % 16 ? to : from));
    }
    const uintptr_t at = to - reinterpret_cast<uintptr_t>(shared);
    if (at >= request_.shared_bytes || request_.shared_bytes - at < 16) {
        stray(to, 16, Access::Write, copy.place);
    }
    if (copy.valid) {
        check_source(copy);
    }
    shared_used = std::max<uint64_t>(shared_used, at + 16);
    const Conflict conflict = shared_shadow_.issue(at, 16, observer(true, copy.place));
    if (conflict.trouble != Trouble::None) {
        conflicting(conflict, nullptr, "starts a cp.async to", copy.place);
    }
    // Whatever was there is lost from now on, and what comes is not there before the wait.
    std::memset(copy.shared, 0xff, 16);
    running_->copies.push_back(copy);
}

void Engine::check_source(const Copy &copy) {
    const auto from = reinterpret_cast<uintptr_t>(copy.global);
    if (from - reinterpret_cast<uintptr_t>(shared) < MAX_SHARED) {
        stray(from, 16, Access::ReadOnly, copy.place);
    }
    access(from, 16, Access::Read, copy.place);
}

void Engine::deliver_copy(const Copy &copy, uint32_t place) {
    if (!copy.valid) {
        std::memset(copy.shared, 0, 16);
    } else {
        // The source is read as late as allowed; a write to it since the issue is a race that this read shows.
        access(reinterpret_cast<uintptr_t>(copy.global), 16, Access::Read, copy.place);
        std::memcpy(copy.shared, copy.global, 16);
    }
    shared_shadow_.deliver(copy.shared - shared, 16, observer(true, place));
}

} // namespace simt
