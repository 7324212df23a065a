// The C functions that crates/simt/src/ffi.rs declares.
#include "engine.hpp"

#include <cstring>
#include <memory>

namespace {

simt::Engine &engine() {
    thread_local std::unique_ptr<simt::Engine> instance = std::make_unique<simt::Engine>();
    return *instance;
}

const simt::Entry *find_entry(const char *name) {
    for (const simt::Entry &entry : simt::entries()) {
        if (std::strcmp(entry.name, name) == 0) {
            return &entry;
        }
    }
    return nullptr;
}

} // namespace

extern "C" {

struct SimtRequest {
    uint32_t grid[3];
    uint32_t block[3];
    uint32_t shared_bytes;
    uint32_t order;
    uint64_t seed;
    uint64_t step_limit;
};

struct SimtReport {
    uint64_t steps;
    uint64_t shared_used;
};

// Address space of this thread only.
void *simt_buffer_new(const char *name, uint64_t bytes, uint64_t element_bytes, uint32_t writable, void **data) {
    simt::Region *region = simt::regions().add(name, bytes, element_bytes, writable != 0);
    *data = reinterpret_cast<void *>(region->base);
    return region;
}

void simt_buffer_free(void *region) { simt::regions().remove(static_cast<simt::Region *>(region)); }

void simt_buffer_set_written(void *region) {
    const auto *of = static_cast<simt::Region *>(region);
    if (of->shadow != nullptr) {
        of->shadow->set_written(0, of->bytes);
    }
}

// Before the host reads or writes memory between launches. 0: it may; 1: no buffer holds these bytes; 2: some that it
// would read were never written.
uint32_t simt_host_access(uint64_t address, uint64_t bytes, uint32_t writes) {
    simt::Region *region = simt::regions().find(address, bytes);
    if (region == nullptr) {
        return 1;
    }
    if (region->shadow == nullptr) {
        return 0;
    }
    const size_t at = address - region->base;
    if (writes != 0) {
        region->shadow->set_written(at, bytes);
        return 0;
    }
    for (size_t i = 0; i < bytes; ++i) {
        if (!region->shadow->written(at + i)) {
            return 2;
        }
    }
    return 0;
}

uint32_t simt_buffer_written(const void *region, uint64_t byte) {
    const auto &shadow = static_cast<const simt::Region *>(region)->shadow;
    return shadow == nullptr || shadow->written(byte);
}

uint64_t simt_num_entries() { return simt::entries().size(); }

const char *simt_entry_name(uint64_t index) { return simt::entries()[index].name; }

// 0: no such entry.
uint64_t simt_entry(const char *name, uint64_t *params_bytes, uint32_t *max_threads) {
    const simt::Entry *entry = find_entry(name);
    if (entry != nullptr) {
        *params_bytes = entry->params_bytes;
        *max_threads = entry->max_threads;
    }
    return entry != nullptr;
}

// `name` is an entry's, `params` points to as many bytes as it takes.
uint32_t simt_launch(const char *name, const SimtRequest *r, const void *params, SimtReport *report, SimtFault *fault) {
    simt::Engine &on = engine();
    const bool done = on.launch({find_entry(name),
                                 {r->grid[0], r->grid[1], r->grid[2]},
                                 {r->block[0], r->block[1], r->block[2]},
                                 r->shared_bytes,
                                 static_cast<simt::Order>(r->order),
                                 r->seed,
                                 r->step_limit,
                                 params});
    *report = {on.steps, on.shared_used};
    *fault = on.fault;
    return done;
}

} // extern "C"
