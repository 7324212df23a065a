// Arithmetic of the persistent grouped products: which tile is whose. Plain functions, usable on the host as well.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define TENP_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define TENP_HOST_DEVICE inline
#endif

namespace tenp {

// Weight tiles that share their token tiles in L2 before the next ones are begun.
constexpr int TILE_GROUP = 8;

TENP_HOST_DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Tiles of an expert; none without rows or without neurons.
TENP_HOST_DEVICE int tiles_of_expert(int rows, int width_padded, int outputs, int token_tile, int weight_tile) {
    if (rows <= 0 || width_padded <= 0) {
        return 0;
    }
    const int weights = outputs > 0 ? outputs : width_padded;
    return ceil_div(rows, token_tile) * ceil_div(weights, weight_tile);
}

// Elements of an expert's per-tile partials: [token tiles, padded width].
TENP_HOST_DEVICE int64_t partials_of_expert(int rows, int width_padded, int token_tile) {
    return rows <= 0 || width_padded <= 0 ? 0 : static_cast<int64_t>(ceil_div(rows, token_tile)) * width_padded;
}

struct TilePlace {
    int weight;
    int token;
};

// The `index`-th tile of an expert: all token tiles with one group of TILE_GROUP weight tiles, then with the next; weight
// tiles fastest inside, so that tiles running together share both operands. Were token tiles fastest inside, the order would be
// the same without groups, and tiles running together would share one operand where there are many token tiles.
TENP_HOST_DEVICE TilePlace place_of_tile(int index, int weight_tiles, int token_tiles) {
    const int per_group = TILE_GROUP * token_tiles;
    const int first = index / per_group * TILE_GROUP;
    const int rest = index % per_group;
    const int size = weight_tiles - first < TILE_GROUP ? weight_tiles - first : TILE_GROUP;
    return {first + rest % size, rest / size};
}

// The last place whose tiles begin at or before `tile`: the one that holds it, as empty places begin where the next does.
TENP_HOST_DEVICE int find_place(const int32_t *tile_offsets, int num_places, int tile) {
    int low = 0;
    int high = num_places;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (tile_offsets[middle] <= tile) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

} // namespace tenp
