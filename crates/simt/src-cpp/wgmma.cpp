// wgmma: operands from shared memory by their descriptors, accumulators that are there once they have been waited for.
// PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions"; bf16 factors, f32 sums, m64nNk16.
#include "engine.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>

namespace simt {

namespace {

constexpr uint32_t K = 16, ROWS = 64;
// What reads of shared memory are booked by.
constexpr uint32_t PIECE = 16;
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

// Where register `i` of a lane of the warpgroup lies in [64, columns].
size_t place_of_sum(uint32_t columns, uint32_t lane, uint32_t i) {
    const uint32_t row = lane / 32 * 16 + lane % 32 / 4 + i / 2 % 2 * 8;
    return size_t{row} * columns + i / 4 * 8 + lane % 4 * 2 + i % 2;
}

// `lines` lines of an operand from `first` on, to values[line * strides[0] + k * strides[1]]; returns the pieces of
// shared memory that they lie in.
std::vector<uint32_t> take(Engine &engine, const Operand &operand, uint32_t first, uint32_t lines,
                           std::array<uint32_t, 2> strides, uint32_t place, float *values) {
    std::vector<uint32_t> pieces;
    for (uint32_t line = first; line < first + lines; ++line) {
        for (uint32_t k = 0; k < K; ++k) {
            const auto address = reinterpret_cast<uintptr_t>(engine.shared) + operand.address(line, k) - WINDOW;
            const uint32_t at = engine.shared_offset(address, 2, "wgmma operand", 2, place);
            if (pieces.empty() || pieces.back() != at / PIECE * PIECE) {
                pieces.push_back(at / PIECE * PIECE);
            }
            values[line * strides[0] + k * strides[1]] = bf16_at(engine.shared + at);
        }
    }
    std::sort(pieces.begin(), pieces.end());
    pieces.erase(std::unique(pieces.begin(), pieces.end()), pieces.end());
    return pieces;
}

const WgmmaRequest &asked(const Lane &lane) { return *static_cast<const WgmmaRequest *>(lane.meeting.arguments); }

bool same(const WgmmaRequest &a, const WgmmaRequest &b) {
    return a.columns == b.columns && a.a == b.a && a.b == b.b && a.a_transposed == b.a_transposed;
}

void finish_product(Engine &engine, uint32_t, uint32_t) { engine.begin_product(engine.warpgroup()); }

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

// The operands of one product, and from now on no one's to overwrite.
OperandRead Engine::begin_reads(const WgmmaRequest &request, std::vector<float> &left, std::vector<float> &right) {
    const uint32_t first = running_->index / 128 * 128, n = request.columns;
    const Operand a(request.a, request.a_transposed), b(request.b, false);
    if (a.swizzle != 1 || b.swizzle != 1) {
        fail(SIMT_UNDEFINED, first, request.place, "wgmma descriptor without the 128-byte swizzle, the only one modelled");
    }
    OperandRead read{lanes_[first].product_group, {}, {}, 15};
    for (uint32_t warp = 0; warp < 4; ++warp) {
        const uint32_t lines = ROWS / 4;
        read.of_warp[warp] = take(*this, a, warp * lines, lines, {K, 1}, request.place, left.data());
    }
    read.of_all = take(*this, b, 0, n, {1, n}, request.place, right.data());
    const auto begin = [&](uint32_t lane, const std::vector<uint32_t> &pieces) {
        for (uint32_t at : pieces) {
            read_operand(lanes_[lane], at, PIECE, false, request.place);
            shared_shadow_.begin_read(at, PIECE);
        }
    };
    for (uint32_t warp = 0; warp < 4; ++warp) {
        begin(first + warp * 32, read.of_warp[warp]);
    }
    begin(first, read.of_all);
    return read;
}

// The accumulators under way at this place in the lanes' registers; new ones start from what is there.
Product &Engine::accumulators(Warpgroup &group, const WgmmaRequest &request) {
    const uint32_t first = running_->index / 128 * 128, n = request.columns;
    for (Product &product : group.products) {
        if (product.d[0] == request.d) {
            if (product.columns != n) {
                fail(SIMT_UNDEFINED, first, request.place, "wgmma of another shape on accumulators in use");
            }
            return product;
        }
    }
    Product &product = group.products.emplace_back();
    product.columns = n;
    product.values.resize(size_t{ROWS} * n);
    for (uint32_t lane = 0; lane < 128; ++lane) {
        if (!lanes_[first + lane].accumulators_fenced) {
            fail(SIMT_UNDEFINED, first + lane, request.place,
                 "wgmma on accumulators that no wgmma.fence of this thread has handed over");
        }
        product.d[lane] = asked(lanes_[first + lane]).d;
        for (uint32_t i = 0; i < n / 2; ++i) {
            product.values[place_of_sum(n, lane, i)] = product.d[lane][i];
        }
    }
    return product;
}

void Engine::begin_product(Warpgroup &group) {
    const uint32_t first = running_->index / 128 * 128;
    const WgmmaRequest &request = asked(lanes_[first]);
    for (uint32_t lane = first; lane < first + 128; ++lane) {
        if (!same(asked(lanes_[lane]), request)) {
            fail(SIMT_WARP_DIVERGENCE, lane, request.place, "wgmma with other operands than thread %u's", first);
        }
    }
    const uint32_t n = request.columns;
    std::vector<float> left(ROWS * K), right(K * n);
    group.reads.push_back(begin_reads(request, left, right));
    Product &product = accumulators(group, request);
    product.group = lanes_[first].product_group;
    product.waiting_warps = 15;
    for (float *d : product.d) {
        // Nothing until the wait.
        std::memset(d, 0xff, n / 2 * sizeof(float));
    }
    for (uint32_t row = 0; row < ROWS; ++row) {
        float *sums = product.values.data() + size_t{row} * n;
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
        const auto end = [&](const std::vector<uint32_t> &pieces) {
            for (uint32_t at : pieces) {
                shared_shadow_.end_read(at, PIECE);
            }
        };
        end(read.of_warp[warp % 4]);
        if (read.waiting_warps == 0) {
            end(read.of_all);
        }
        used.insert(used.end(), read.of_warp[warp % 4].begin(), read.of_warp[warp % 4].end());
        used.insert(used.end(), read.of_all.begin(), read.of_all.end());
    }
    std::sort(used.begin(), used.end());
    for (size_t i = 0; i < used.size();) {
        size_t end = i + 1;
        while (end < used.size() && used[end] - used[end - 1] <= PIECE) {
            ++end;
        }
        read_operand(first, used[i], used[end - 1] + PIECE - used[i], false, place);
        i = end;
    }
    std::erase_if(group.reads, [](const OperandRead &read) { return read.waiting_warps == 0; });
    for (Product &product : group.products) {
        if (product.group >= done || !(product.waiting_warps & bit)) {
            continue;
        }
        product.waiting_warps &= ~bit;
        for (uint32_t lane = warp % 4 * 32; lane < warp % 4 * 32 + 32; ++lane) {
            for (uint32_t i = 0; i < product.columns / 2; ++i) {
                product.d[lane][i] = product.values[place_of_sum(product.columns, lane, i)];
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
