// What kernel code calls in the executor. Everything here runs on the fiber of the calling lane.
#pragma once

#include <cstdint>
#include <source_location>

namespace simt {

// Where in the sources a lane stands: lanes meet only at the same place.
using Site = std::source_location;

struct Index {
    unsigned x, y, z;
};

// Puts an entry into the table that launches look names up in.
struct Registration {
    Registration(const char *name, uint64_t params_bytes, unsigned max_threads, void (*run)(const void *));
};

// Constant while a lane lives, so that the compiler may keep them.
[[gnu::const]] Index thread_index();
[[gnu::const]] Index block_index();
[[gnu::const]] Index block_size();
[[gnu::const]] Index grid_size();
[[gnu::const]] void *shared_window();

void sync_threads(Site site);
void sync_warp(uint32_t mask, Site site);

enum class Shuffle : uint32_t { Index, Up, Down, Xor };
// `operand` is the lane, the distance or the lane mask; `value` holds up to 8 bytes.
uint64_t shuffle(Shuffle kind, uint32_t mask, uint64_t value, uint32_t operand, uint32_t width, Site site);
uint32_t ballot(uint32_t mask, bool predicate, Site site);

// Returns the old value.
enum class Atomic : uint32_t { Add, MaxSigned, MaxUnsigned };
uint32_t atomic(Atomic kind, void *address, uint32_t operand);

void cp_async_16(void *shared, const void *global, bool valid);
void cp_async_commit();
void cp_async_wait(uint32_t newest_pending);
// `matrices` is 2 or 4, one register each.
void ldmatrix(uint32_t *registers, uint32_t matrices, bool transposed, const void *row, Site site);
void mma_bf16(float *d, const uint32_t *a, const uint32_t *b, Site site);
// Stores matrices of 8 rows of 8 halves, one register each.
void stmatrix_transposed(const uint32_t *registers, uint32_t matrices, void *row, Site site);

// sm_90. Barriers of some lanes: `threads` of the block, or `arrivals` a phase.
void part_barrier(uint32_t id, uint32_t threads, Site site);
void mbarrier_init(void *barrier, uint32_t arrivals);
void mbarrier_arrive(void *barrier, uint32_t expected_bytes);
void mbarrier_wait(void *barrier, uint32_t parity, Site site);
void fence_proxy_async();
// Boxes by a TensorMap (hopper.hpp).
void load_box(const void *map, void *shared, void *barrier, int inner, int row);
void load_groups(const void *map, void *shared, void *barrier, int inner, int group);
void store_box(const void *map, const void *shared, int inner, int row);
void store_commit();
void store_wait(uint32_t newest_pending);
// `d` holds columns / 2 sums and keeps its place until they have been waited for.
void wgmma_bf16(float *d, uint32_t columns, bool a_transposed, uint64_t a, uint64_t b, Site site);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(uint32_t newest_pending, Site site);
void set_max_registers(uint32_t registers, bool more, Site site);
uint32_t shared_address(const void *pointer);

// 16 bytes through the read-only path.
void load_read_only_16(void *destination, const void *global);

// Instead of the library's, which no instrumentation sees.
void *copy_bytes(void *destination, const void *source, uint64_t bytes);
void *set_bytes(void *destination, int value, uint64_t bytes);

} // namespace simt
