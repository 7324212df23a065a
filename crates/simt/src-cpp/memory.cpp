#include "memory.hpp"

#include "mapping.hpp"

#include <algorithm>
#include <cstring>

extern "C" const char __executable_start[];
extern "C" const char _end[];

namespace simt {

namespace {

// No row, pitch or tile of a test is as long, so an index gone wrong does not reach a neighbour.
constexpr size_t GUARD = size_t{16} << 20;
constexpr size_t PAGE = 4096;
// Read by no right kernel: NaN as bf16, f32 and f64, -1 as an integer.
constexpr int POISON = 0xff;

} // namespace

std::string Region::element(uintptr_t address) const {
    return "element " + std::to_string((address - base) / element_bytes) + " of `" + name + "`";
}

Regions::~Regions() {
    for (const auto &region : sorted_) {
        unmap_bytes(region->mapping, region->mapped_bytes);
    }
}

Region *Regions::add(const char *name, size_t bytes, size_t element_bytes, bool writable) {
    auto region = std::make_unique<Region>();
    const size_t pages = std::max<size_t>((bytes + PAGE - 1) / PAGE, 1) * PAGE;
    region->name = name;
    region->bytes = bytes;
    region->element_bytes = element_bytes;
    region->mapped_bytes = pages + 2 * GUARD;
    region->mapping = map_bytes(region->mapped_bytes, PROT_NONE);
    region->base = reinterpret_cast<uintptr_t>(region->mapping) + GUARD;
    void *data = reinterpret_cast<void *>(region->base);
    protect_bytes(data, pages, PROT_READ | PROT_WRITE);
    std::memset(data, POISON, bytes);
    if (writable) {
        region->shadow = std::make_unique<Shadow>(bytes);
    }
    Region *added = region.get();
    const auto place = std::upper_bound(sorted_.begin(), sorted_.end(), added->base,
                                        [](uintptr_t base, const auto &other) { return base < other->base; });
    sorted_.insert(place, std::move(region));
    return added;
}

void Regions::remove(const Region *region) {
    const auto found =
        std::find_if(sorted_.begin(), sorted_.end(), [=](const auto &other) { return other.get() == region; });
    if (found != sorted_.end()) {
        unmap_bytes(region->mapping, region->mapped_bytes);
        sorted_.erase(found);
        last_ = nullptr;
    }
}

Region *Regions::find(uintptr_t address, size_t bytes) {
    if (last_ != nullptr && last_->holds(address, bytes)) {
        return last_;
    }
    const auto after = std::upper_bound(sorted_.begin(), sorted_.end(), address,
                                        [](uintptr_t a, const auto &region) { return a < region->base; });
    if (after == sorted_.begin() || !(*std::prev(after))->holds(address, bytes)) {
        return nullptr;
    }
    last_ = std::prev(after)->get();
    return last_;
}

std::string Regions::describe(uintptr_t address) const {
    if (address < PAGE) {
        return "a null pointer (+" + std::to_string(address) + ")";
    }
    for (const auto &region : sorted_) {
        const auto mapping = reinterpret_cast<uintptr_t>(region->mapping);
        if (address - mapping >= region->mapped_bytes) {
            continue;
        }
        const std::string of = " of `" + region->name + "` (" + std::to_string(region->bytes / region->element_bytes) +
                               " elements of " + std::to_string(region->element_bytes) + " bytes)";
        if (address < region->base) {
            return std::to_string(region->base - address) + " bytes before the start" + of;
        }
        const uintptr_t end = region->base + region->bytes;
        return address >= end ? std::to_string(address - end) + " bytes past the end" + of
                              : std::to_string(end - address) + " bytes before the end" + of;
    }
    return "memory of no buffer";
}

Regions &regions() {
    thread_local Regions instance;
    return instance;
}

bool in_image(uintptr_t address, size_t bytes) {
    const auto start = reinterpret_cast<uintptr_t>(__executable_start);
    const auto end = reinterpret_cast<uintptr_t>(_end);
    return address >= start && address <= end - bytes;
}

uint32_t place_of(const void *code) {
    // The instruction before the return address belongs to the call.
    return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(code) -
                                 reinterpret_cast<uintptr_t>(__executable_start) - 1);
}

} // namespace simt
