// ldmatrix, stmatrix and mma, by the fragment layouts of the PTX ISA.
#include "engine.hpp"

#include <cstring>

namespace simt {

namespace {

constexpr uint32_t WHOLE_WARP = 0xffffffffu;

struct Load {
    uint32_t *registers;
    uint32_t matrices;
    bool transposed;
    const void *row;
};

// Lanes 8m..8m+7 hold the row addresses of matrix m; each row is 8 elements of 16 bits.
void finish_ldmatrix(Engine &engine, uint32_t warp, uint32_t) {
    Lane *lanes = engine.warp_lanes(warp);
    const uint32_t matrices = static_cast<const Load *>(lanes[0].meeting.arguments)->matrices;
    const bool transposed = static_cast<const Load *>(lanes[0].meeting.arguments)->transposed;
    for (uint32_t m = 0; m < matrices; ++m) {
        uint16_t tile[8][8];
        for (uint32_t row = 0; row < 8; ++row) {
            Lane &giver = lanes[8 * m + row];
            const void *address = static_cast<const Load *>(giver.meeting.arguments)->row;
            const auto at = reinterpret_cast<uintptr_t>(address);
            if (at % 16 != 0) {
                engine.fail(SIMT_MISALIGNED, giver.index, giver.meeting.place, "ldmatrix row at address %#llx",
                            static_cast<unsigned long long>(at));
            }
            engine.access_for(giver, at, 16, Access::Collective, giver.meeting.place);
            std::memcpy(tile[row], address, 16);
        }
        for (uint32_t lane = 0; lane < 32; ++lane) {
            const uint32_t group = lane / 4, pair = lane % 4 * 2;
            const uint32_t low = transposed ? tile[pair][group] : tile[group][pair];
            const uint32_t high = transposed ? tile[pair + 1][group] : tile[group][pair + 1];
            static_cast<const Load *>(lanes[lane].meeting.arguments)->registers[m] = low | high << 16;
        }
    }
}

struct Store {
    const uint32_t *registers;
    uint32_t matrices;
    void *row;
};

// The mirror of finish_ldmatrix, of the transpose: lane l holds elements (2 (l % 4), l / 4) and (2 (l % 4) + 1, l / 4).
void finish_stmatrix(Engine &engine, uint32_t warp, uint32_t) {
    Lane *lanes = engine.warp_lanes(warp);
    const auto of = [&](uint32_t lane) { return *static_cast<const Store *>(lanes[lane].meeting.arguments); };
    for (uint32_t m = 0; m < of(0).matrices; ++m) {
        for (uint32_t row = 0; row < 8; ++row) {
            uint16_t line[8];
            for (uint32_t column = 0; column < 8; ++column) {
                const uint32_t bits = of(column * 4 + row / 2).registers[m];
                line[column] = static_cast<uint16_t>(row % 2 == 0 ? bits : bits >> 16);
            }
            Lane &giver = lanes[8 * m + row];
            void *to = of(8 * m + row).row;
            const auto at = reinterpret_cast<uintptr_t>(to);
            if (at % 16 != 0) {
                engine.fail(SIMT_MISALIGNED, giver.index, giver.meeting.place, "stmatrix row at address %#llx",
                            static_cast<unsigned long long>(at));
            }
            engine.shared_offset(at, 16, "stmatrix", 16, giver.meeting.place);
            engine.access_for(giver, at, 16, Access::Write, giver.meeting.place);
            std::memcpy(to, line, 16);
        }
    }
}

struct Multiply {
    float *d;
    const uint32_t *a;
    const uint32_t *b;
};

float half_of(uint32_t pair, bool high) {
    const uint32_t bits = high ? pair & 0xffff0000u : pair << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// Products of bf16 are exact in f32; the sum runs over k in order.
void finish_mma(Engine &engine, uint32_t warp, uint32_t) {
    Lane *lanes = engine.warp_lanes(warp);
    float a[16][16], b[16][8], d[16][8];
    const auto arguments = [&](uint32_t lane) { return *static_cast<const Multiply *>(lanes[lane].meeting.arguments); };
    for (uint32_t lane = 0; lane < 32; ++lane) {
        const Multiply m = arguments(lane);
        const uint32_t group = lane / 4, pair = lane % 4 * 2;
        for (uint32_t high = 0; high < 2; ++high) {
            for (uint32_t i = 0; i < 4; ++i) {
                a[group + i % 2 * 8][pair + i / 2 * 8 + high] = half_of(m.a[i], high != 0);
            }
            for (uint32_t i = 0; i < 2; ++i) {
                b[pair + i * 8 + high][group] = half_of(m.b[i], high != 0);
                d[group + i * 8][pair + high] = m.d[i * 2 + high];
            }
        }
    }
    for (uint32_t row = 0; row < 16; ++row) {
        for (uint32_t k = 0; k < 16; ++k) {
            for (uint32_t column = 0; column < 8; ++column) {
                d[row][column] += a[row][k] * b[k][column];
            }
        }
    }
    for (uint32_t lane = 0; lane < 32; ++lane) {
        const Multiply m = arguments(lane);
        const uint32_t group = lane / 4, pair = lane % 4 * 2;
        for (uint32_t i = 0; i < 4; ++i) {
            m.d[i] = d[group + i / 2 * 8][pair + i % 2];
        }
    }
}

} // namespace

void ldmatrix(uint32_t *registers, uint32_t matrices, bool transposed, const void *row, Site site) {
    Load arguments{registers, matrices, transposed, row};
    const uint32_t place = place_of(__builtin_return_address(0));
    current()->meet({"ldmatrix", site, WHOLE_WARP, matrices * 2 + transposed, finish_ldmatrix, &arguments, place});
}

void stmatrix_transposed(const uint32_t *registers, uint32_t matrices, void *row, Site site) {
    Store arguments{registers, matrices, row};
    const uint32_t place = place_of(__builtin_return_address(0));
    current()->meet({"stmatrix", site, WHOLE_WARP, matrices, finish_stmatrix, &arguments, place});
}

void mma_bf16(float *d, const uint32_t *a, const uint32_t *b, Site site) {
    Multiply arguments{d, a, b};
    const uint32_t place = place_of(__builtin_return_address(0));
    current()->meet({"mma", site, WHOLE_WARP, 0, finish_mma, &arguments, place});
}

} // namespace simt
