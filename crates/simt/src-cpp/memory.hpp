// The memory that kernels may touch: registered buffers, between stretches of address space that fault.
#pragma once

#include "shadow.hpp"

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace simt {

struct Region {
    std::string name;
    uintptr_t base = 0;
    size_t bytes = 0;
    size_t element_bytes = 1;
    char *mapping = nullptr;
    size_t mapped_bytes = 0;
    // Null where nothing may be written.
    std::unique_ptr<Shadow> shadow;

    bool holds(uintptr_t address, size_t n) const {
        return address >= base && n <= bytes && address - base <= bytes - n;
    }
    // "element 5 of `out`".
    std::string element(uintptr_t address) const;
};

// The buffers of this thread, by address.
class Regions {
  public:
    ~Regions();
    Region *add(const char *name, size_t bytes, size_t element_bytes, bool writable);
    void remove(const Region *region);
    // The region that holds all `bytes`, or null.
    Region *find(uintptr_t address, size_t bytes);
    // In words, where an address is that no region holds.
    std::string describe(uintptr_t address) const;

  private:
    std::vector<std::unique_ptr<Region>> sorted_;
    Region *last_ = nullptr;
};

Regions &regions();

// The program's own constants: what lies between its first and its last byte.
bool in_image(uintptr_t address, size_t bytes);
// Offset of a code address in the image, as addr2line takes it.
uint32_t place_of(const void *code);

} // namespace simt
