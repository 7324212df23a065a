// wgmma: operands from shared memory by their descriptors, accumulators that are there once they have been waited for.
// PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions"; bf16 factors, f32 sums, m64nNk16.
#include "engine.hpp"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>

namespace simt {

namespace {

constexpr uint32_t K = 16, ROWS = 64;
// What the hardware keeps for itself at the start of shared memory; so address 0 is never the right one.
constexpr uint32_t WINDOW = 1024;

// One operand: where element (line, k) lies; lines are rows of A or columns of B.
struct Operand {
    uint32_t start, leading, stride, swizzle;
    bool transposed;

    Operand(uint64_t descriptor, bool transposed_)
        : start(static_cast<uint32_t>(descriptor & 0x3fff) << 4), leading(static_cast<uint32_t>(descriptor >> 16 & 0x3fff) << 4),
          stride(static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4), swizzle(static_cast<uint32_t>(descriptor >> 62)),
          transposed(transposed_) {}

    // The canonical layouts of 128-byte swizzle, before the swizzle: K-major ((8,m),(8,2)):((64,SBO),(1,8)) and
    // MN-major ((8,8,m),(8,k)):((1,8,LBO),(64,SBO)) in elements of 2 bytes.
    uint32_t address(uint32_t line, uint32_t k) const {
        const uint32_t linear = transposed ? start + line % 64 * 2 + line / 64 * leading + k % 8 * 128 + k / 8 * stride
                                           : start + line % 8 * 128 + line / 8 * stride + k * 2;
        return linear ^ (linear >> 7 & 7) << 4;
    }
};

float bf16_at(const char *bytes) {
    uint16_t half;
    std::memcpy(&half, bytes, 2);
    return std::bit_cast<float>(static_cast<uint32_t>(half) << 16);
}

// The row and column of register `i` of a lane in its warp's sixteen rows.
uint32_t fragment_row(uint32_t lane, uint32_t i) { return lane / 4 + i / 2 % 2 * 8; }
uint32_t fragment_column(uint32_t lane, uint32_t i) { return i / 4 * 8 + lane % 4 * 2 + i % 2; }

void poison(float *d, uint32_t count) { std::memset(d, 0xff, count * sizeof(float)); }

bool same(const WgmmaRequest &a, const WgmmaRequest &b) {
    return a.columns == b.columns && a.a == b.a && a.b == b.b && a.a_transposed == b.a_transposed;
}

void finish_product(Engine &engine, uint32_t first_warp, uint32_t) {
    const auto &request = *static_cast<const WgmmaRequest *>(engine.warp_lanes(first_warp)[0].meeting.arguments);
    engine.begin_product(engine.warpgroup(), request);
}

struct Registers {
    uint32_t count;
    bool more;
};

void finish_registers(Engine &engine, uint32_t first_warp, uint32_t) {
    const auto &asked = *static_cast<const Registers *>(engine.warp_lanes(first_warp)[0].meeting.arguments);
    engine.set_registers(first_warp / 4, asked.count, asked.more);
}

} // namespace

// All 128 lanes come to the same place before one goes on.
void Engine::meet_warpgroup(const Meeting &meeting) {
    const uint32_t first = running_->index / 128 * 128;
    Warpgroup &group = warpgroup();
    running_->meeting = meeting;
    if (++group.waiting < 128) {
        return leave(State::AtMeeting);
    }
    for (uint32_t i = first; i < first + 128; ++i) {
        const Meeting &other = lanes_[i].meeting;
        if (i != running_->index && (lanes_[i].state != State::AtMeeting || other.finish != meeting.finish ||
                                     other.detail != meeting.detail || !same_site(other.site, meeting.site))) {
            return leave(State::AtMeeting);
        }
    }
    group.waiting = 0;
    running_->state = State::AtMeeting;
    meeting.finish(*this, first / 32, ~0u);
    for (uint32_t i = first; i < first + 128; ++i) {
        if (lanes_[i].state == State::AtMeeting) {
            release(lanes_[i]);
        }
    }
    leave(running_->state);
}

void Engine::begin_product(Warpgroup &group, const WgmmaRequest &request) {
    const uint32_t first = running_->index / 128 * 128;
    const Operand a(request.a, request.a_transposed), b(request.b, false);
    const auto of = [&](uint32_t lane) -> const WgmmaRequest & {
        return *static_cast<const WgmmaRequest *>(lanes_[first + lane].meeting.arguments);
    };
    for (uint32_t lane = 0; lane < 128; ++lane) {
        if (!same(of(lane), request)) {
            fail(SIMT_WARP_DIVERGENCE, first + lane, request.place, "wgmma with other operands than thread %u's", first);
        }
    }
    if (a.swizzle != 1 || b.swizzle != 1) {
        fail(SIMT_UNDEFINED, first, request.place, "wgmma descriptor without the 128-byte swizzle, the only one modelled");
    }
    const uint32_t n = request.columns;
    OperandRead read{lanes_[first].product_group, {}, {}, 15};
    std::vector<float> left(ROWS * K), right(K * n);
    const auto take = [&](const Operand &operand, uint32_t lines, std::vector<uint32_t> *chunks, float *to, bool by_warp) {
        for (uint32_t line = 0; line < lines; ++line) {
            for (uint32_t k = 0; k < K; ++k) {
                const uint32_t address = operand.address(line, k);
                const uint32_t at = address - WINDOW;
                if (address < WINDOW || at >= request_.shared_bytes || request_.shared_bytes - at < 2) {
                    fail(SIMT_OUT_OF_BOUNDS, first, request.place, "wgmma reads shared memory at address %u, of %u to %u",
                         address, WINDOW, WINDOW + request_.shared_bytes);
                }
                auto &of_warp = chunks[by_warp ? line / 16 : 0];
                if (of_warp.empty() || of_warp.back() != at / 16 * 16) {
                    of_warp.push_back(at / 16 * 16);
                }
                to[by_warp ? line * K + k : k * n + line] = bf16_at(shared + at);
            }
        }
    };
    take(a, ROWS, read.of_warp, left.data(), true);
    take(b, n, &read.of_all, right.data(), false);
    const auto unique = [](std::vector<uint32_t> &chunks) {
        std::sort(chunks.begin(), chunks.end());
        chunks.erase(std::unique(chunks.begin(), chunks.end()), chunks.end());
    };
    unique(read.of_all);
    for (uint32_t warp = 0; warp < 4; ++warp) {
        unique(read.of_warp[warp]);
        for (uint32_t at : read.of_warp[warp]) {
            read_operand(lanes_[first + warp * 32], at, 16, false, request.place);
            shared_shadow_.begin_read(at, 16);
        }
    }
    for (uint32_t at : read.of_all) {
        read_operand(lanes_[first], at, 16, false, request.place);
        shared_shadow_.begin_read(at, 16);
    }
    group.reads.push_back(std::move(read));

    auto product = std::find_if(group.products.begin(), group.products.end(), [&](const Product &p) { return p.d[0] == of(0).d; });
    if (product == group.products.end()) {
        group.products.emplace_back();
        product = group.products.end() - 1;
        product->columns = n;
        product->values.resize(size_t{ROWS} * n);
        for (uint32_t lane = 0; lane < 128; ++lane) {
            if (!lanes_[first + lane].accumulators_fenced) {
                fail(SIMT_UNDEFINED, first + lane, request.place,
                     "wgmma on accumulators that no wgmma.fence of this thread has handed over");
            }
            product->d[lane] = of(lane).d;
            for (uint32_t i = 0; i < n / 2; ++i) {
                product->values[(lane / 32 * 16 + fragment_row(lane % 32, i)) * n + fragment_column(lane % 32, i)] =
                    of(lane).d[i];
            }
        }
    } else if (product->columns != n) {
        fail(SIMT_UNDEFINED, first, request.place, "wgmma of another shape on accumulators in use");
    }
    for (uint32_t lane = 0; lane < 128; ++lane) {
        poison(of(lane).d, n / 2);
    }
    product->group = lanes_[first].product_group;
    product->waiting_warps = 15;
    for (uint32_t row = 0; row < ROWS; ++row) {
        float *sums = product->values.data() + size_t{row} * n;
        for (uint32_t k = 0; k < K; ++k) {
            const float factor = left[row * K + k];
            const float *line = right.data() + size_t{k} * n;
            for (uint32_t column = 0; column < n; ++column) {
                sums[column] += factor * line[column];
            }
        }
    }
}

// A warp's wait: its rows of accumulators are there, and it is done with the operands.
void Engine::finish_products(uint32_t warp, uint32_t newest_pending, uint32_t place) {
    Warpgroup &group = warpgroups_[warp / 4];
    const uint32_t bit = 1u << warp % 4;
    const uint64_t commits = lanes_[warp * 32].product_group;
    const uint64_t done = commits < newest_pending ? 0 : commits - newest_pending;
    Lane &first = lanes_[warp * 32];
    std::vector<uint32_t> used;
    for (OperandRead &read : group.reads) {
        if (read.group >= done || !(read.waiting_warps & bit)) {
            continue;
        }
        read.waiting_warps &= ~bit;
        for (uint32_t at : read.of_warp[warp % 4]) {
            shared_shadow_.end_read(at, 16);
        }
        for (uint32_t at : read.of_all) {
            if (read.waiting_warps == 0) {
                shared_shadow_.end_read(at, 16);
            }
        }
        used.insert(used.end(), read.of_warp[warp % 4].begin(), read.of_warp[warp % 4].end());
        used.insert(used.end(), read.of_all.begin(), read.of_all.end());
    }
    std::sort(used.begin(), used.end());
    for (size_t i = 0; i < used.size();) {
        size_t end = i + 1;
        while (end < used.size() && used[end] - used[end - 1] <= 16) {
            ++end;
        }
        read_operand(first, used[i], used[end - 1] + 16 - used[i], false, place);
        i = end;
    }
    std::erase_if(group.reads, [](const OperandRead &read) { return read.waiting_warps == 0; });
    for (Product &product : group.products) {
        if (product.group >= done || !(product.waiting_warps & bit)) {
            continue;
        }
        product.waiting_warps &= ~bit;
        for (uint32_t lane = 0; lane < 32; ++lane) {
            for (uint32_t i = 0; i < product.columns / 2; ++i) {
                product.d[warp % 4 * 32 + lane][i] =
                    product.values[(warp % 4 * 16 + fragment_row(lane, i)) * product.columns + fragment_column(lane, i)];
            }
        }
    }
    std::erase_if(group.products, [](const Product &product) { return product.waiting_warps == 0; });
    for (uint32_t lane = 0; lane < 32; ++lane) {
        lanes_[warp * 32 + lane].accumulators_fenced = false;
    }
}

// The block's registers are one pool; more are granted once others have given theirs up.
void Engine::set_registers(uint32_t index, uint32_t registers, bool more) {
    Warpgroup &group = warpgroups_[index];
    const uint32_t place = lanes_[index * 128].meeting.place;
    if (registers < 24 || registers > 256 || registers % 8 != 0) {
        fail(SIMT_UNDEFINED, index * 128, place, "setmaxnreg %u: a multiple of 8 from 24 to 256 is needed", registers);
    }
    if (more ? registers < group.registers : registers > group.registers) {
        fail(SIMT_UNDEFINED, index * 128, place, "setmaxnreg.%s to %u registers from %u", more ? "inc" : "dec", registers,
             group.registers);
    }
    group.wanted = registers;
    if (!more) {
        free_registers_ += (group.registers - registers) * 128;
        group.registers = registers;
    } else {
        for (uint32_t i = index * 128; i < index * 128 + 128; ++i) {
            lanes_[i].state = State::AtRegisters;
        }
    }
    grant_registers();
}

void Engine::grant_registers() {
    for (uint32_t index = 0; index < num_lanes_ / 128; ++index) {
        Warpgroup &group = warpgroups_[index];
        const uint32_t needed = group.wanted > group.registers ? (group.wanted - group.registers) * 128 : 0;
        if (needed == 0 && lanes_[index * 128].state != State::AtRegisters) {
            continue;
        }
        if (needed <= free_registers_) {
            free_registers_ -= needed;
            group.registers = group.wanted;
            for (uint32_t i = index * 128; i < index * 128 + 128; ++i) {
                release(lanes_[i]);
            }
        }
    }
}

void wgmma_bf16(float *d, uint32_t columns, bool a_transposed, uint64_t a, uint64_t b, Site site) {
    const uint32_t place = place_of(__builtin_return_address(0));
    WgmmaRequest request{d, columns, a, b, a_transposed, place};
    Meeting meeting{"wgmma", site, ~0u, columns, finish_product, &request, place};
    current()->meet_warpgroup(meeting);
}

void wgmma_fence() { current()->lane().accumulators_fenced = true; }

void wgmma_commit() { ++current()->lane().product_group; }

namespace {

struct Wait {
    uint32_t newest_pending;
};

void finish_wait(Engine &engine, uint32_t warp, uint32_t) {
    const Meeting &meeting = engine.warp_lanes(warp)[0].meeting;
    engine.finish_products(warp, static_cast<const Wait *>(meeting.arguments)->newest_pending, meeting.place);
}

} // namespace

void wgmma_wait(uint32_t newest_pending, Site site) {
    Wait wait{newest_pending};
    current()->meet({"wgmma.wait_group", site, ~0u, newest_pending, finish_wait, &wait, place_of(__builtin_return_address(0))});
}

void set_max_registers(uint32_t registers, bool more, Site site) {
    Registers asked{registers, more};
    const uint32_t place = place_of(__builtin_return_address(0));
    current()->meet_warpgroup({"setmaxnreg", site, ~0u, registers, finish_registers, &asked, place});
}

uint32_t shared_address(const void *pointer) {
    return static_cast<uint32_t>(static_cast<const char *>(pointer) - current()->shared) + WINDOW;
}

} // namespace simt
