// Zeroed pages that cost nothing until they are touched.
#pragma once

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <sys/mman.h>

namespace simt {

// Ends the process with a word about it: without memory there is nothing to run.
[[noreturn]] inline void out_of_memory(size_t bytes) {
    std::fprintf(stderr, "simt: %zu bytes of address space are not to be had\n", bytes);
    std::abort();
}

inline char *map_bytes(size_t bytes, int protection = PROT_READ | PROT_WRITE) {
    void *base = mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) {
        out_of_memory(bytes);
    }
    return static_cast<char *>(base);
}

inline void protect_bytes(void *base, size_t bytes, int protection) {
    if (mprotect(base, bytes, protection) != 0) {
        out_of_memory(bytes);
    }
}

inline void unmap_bytes(void *base, size_t bytes) { munmap(base, bytes); }

} // namespace simt
