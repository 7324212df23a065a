// Copies that arrive later: nothing is there before the wait that asks for it.
#include "engine.hpp"

#include <algorithm>
#include <cstring>

namespace simt {

void cp_async_16(void *shared, const void *global, bool valid) {
    Engine &engine = *current();
    const uint32_t place = place_of(__builtin_return_address(0));
    engine.issue_copy({static_cast<char *>(shared), static_cast<const char *>(global), valid, engine.lane().group, place});
}

void cp_async_commit() { ++current()->lane().group; }

void cp_async_wait(uint32_t newest_pending) {
    Engine &engine = *current();
    Lane &lane = engine.lane();
    const uint32_t place = place_of(__builtin_return_address(0));
    // Copies since the last commit belong to no group yet: no wait covers them.
    const uint64_t done = lane.group < newest_pending ? 0 : lane.group - newest_pending;
    auto &copies = lane.copies;
    const auto end = std::find_if(copies.begin(), copies.end(), [=](const Copy &c) { return c.group >= done; });
    std::for_each(copies.begin(), end, [&](const Copy &c) { engine.deliver_copy(c, place); });
    copies.erase(copies.begin(), end);
}

void load_read_only_16(void *destination, const void *global) {
    Engine &engine = *current();
    const uint32_t place = place_of(__builtin_return_address(0));
    const auto from = reinterpret_cast<uintptr_t>(global);
    if (from % 16 != 0) {
        engine.fail(SIMT_MISALIGNED, engine.lane().index, place, "16-byte load from address %#llx",
                    static_cast<unsigned long long>(from));
    }
    engine.access(from, 16, Access::ReadOnly, place);
    std::memcpy(destination, global, 16);
}

} // namespace simt
