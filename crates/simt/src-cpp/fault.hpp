// What went wrong, as it crosses to Rust (crates/simt/src/ffi.rs has the same structures).
#pragma once

#include <cstdint>

extern "C" {

// In the order of FaultKind in fault.rs.
enum SimtKind : uint32_t {
    SIMT_LAUNCH,
    SIMT_OUT_OF_BOUNDS,
    SIMT_READ_ONLY,
    SIMT_UNINITIALISED,
    SIMT_PENDING_COPY,
    SIMT_RACE,
    SIMT_MISALIGNED,
    SIMT_BARRIER_DIVERGENCE,
    SIMT_WARP_DIVERGENCE,
    SIMT_UNDEFINED,
    SIMT_STEP_LIMIT,
    SIMT_UNWRITTEN,
};

struct SimtFault {
    uint32_t kind;
    uint32_t lane; // ~0: none in particular
    uint32_t block[3];
    uint32_t num_places;
    // Return addresses, from the image's start: the access at fault, then the one it collides with.
    uint64_t places[2];
    char detail[2048];
};

} // extern "C"
