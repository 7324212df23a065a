// computes: the slots grouped by expert, in token order inside an expert: a stable counting sort (ExpertGroups)
// layout:   expert_ids, slot_weights, row_of_slot [T, k]; token_of_row, row_weights [T*k]; group_offsets [E + 1]
// requires: E <= 1023; slots with an id outside 0..E come last and are in no group, their row_of_slot is -1
// launch:   in this order tenp_moe_count: grid (num_chunks), block (256), shared 4096 bytes; tenp_moe_offsets: grid (1),
//           block (1024), shared 8320 + 4 (E + 1); tenp_moe_group: as tenp_moe_count. Or, for num_slots <=
//           TENP_GROUP_CHUNK, only tenp_moe_group_small: grid (1), block (256), shared 4224 + 8 (E + 1).
//           tenp_gather_rows: grid (ceil(num_rows / 8)), block (256), no shared memory
// flops:    none. bytes: 8 read and 12 written a slot, twice 4 (E + 1) a chunk; gather 4 cols a row
#include "kernel.cuh"

namespace {

constexpr int CHUNK = TENP_GROUP_CHUNK;

// Copies a chunk's ids to shared memory, those outside 0..E as E, and the places past its end as -1.
__device__ __forceinline__ void load_ids(const TenpMoeGroupParams &p, int first, int count, int32_t *ids) {
    for (int i = threadIdx.x; i < CHUNK; i += blockDim.x) {
        int id = -1;
        if (i < count) {
            id = p.expert_ids[first + i];
            id = id < 0 || id > p.num_experts ? p.num_experts : id;
        }
        ids[i] = id;
    }
}

__device__ __forceinline__ int count_of(const int32_t *ids, int count, int expert) {
    const int4 *quads = reinterpret_cast<const int4 *>(ids);
    int sum = 0;
    for (int i = 0; i < (count + 3) / 4; ++i) {
        const int4 quad = quads[i];
        sum += (quad.x == expert ? 1 : 0) + (quad.y == expert ? 1 : 0) + (quad.z == expert ? 1 : 0) +
               (quad.w == expert ? 1 : 0);
    }
    return sum;
}

// Gives the chunk's slots of one expert their rows, the first of which is `row`.
__device__ __forceinline__ void place(const TenpMoeGroupParams &p, int first, int count, const int32_t *ids, int expert,
                                      int row) {
    const bool live = expert < p.num_experts;
    for (int i = 0; i < count; ++i) {
        if (ids[i] == expert) {
            const int slot = first + i;
            p.token_of_row[row] = slot / p.top_k;
            p.row_weights[row] = p.slot_weights[slot];
            p.row_of_slot[slot] = live ? row : -1;
            ++row;
        }
    }
}

// offsets[c] = sum of counts[0..c] for c <= classes; the first 32 threads take a run of classes each.
__device__ __forceinline__ void prefix_sums(const int32_t *counts, int classes, int32_t *runs, int32_t *offsets) {
    const int lane = threadIdx.x;
    const int per_lane = (classes + 31) / 32;
    const int begin = lane * per_lane < classes ? lane * per_lane : classes;
    const int end = begin + per_lane < classes ? begin + per_lane : classes;
    if (lane < 32) {
        int sum = 0;
        for (int c = begin; c < end; ++c) {
            sum += counts[c];
        }
        runs[lane] = sum;
    }
    __syncthreads();
    if (lane < 32) {
        int sum = 0;
        for (int i = 0; i < lane; ++i) {
            sum += runs[i];
        }
        for (int c = begin; c < end; ++c) {
            offsets[c] = sum;
            sum += counts[c];
        }
    }
    __syncthreads();
}

__device__ __forceinline__ int slots_of_chunk(const TenpMoeGroupParams &p) {
    const int left = p.num_slots - static_cast<int>(blockIdx.x) * CHUNK;
    return left < CHUNK ? left : CHUNK;
}

} // namespace

TENP_KERNEL(tenp_moe_count, TenpMoeGroupParams, 256, 1) {
    TENP_SHARED(int32_t, ids);
    const int count = slots_of_chunk(p);
    load_ids(p, blockIdx.x * CHUNK, count, ids);
    __syncthreads();
    const int classes = p.num_experts + 1;
    for (int c = threadIdx.x; c < classes; c += blockDim.x) {
        p.chunk_counts[static_cast<int64_t>(blockIdx.x) * classes + c] = count_of(ids, count, c);
    }
}

// Counts of the chunks become the first rows of each (chunk, class): threads take runs of chunks of one class.
TENP_KERNEL(tenp_moe_offsets, TenpMoeGroupParams, 1024, 1) {
    TENP_SHARED(int32_t, sums);
    int32_t *totals = sums + 1024;
    int32_t *offsets = totals + 1024;
    const int classes = p.num_experts + 1;
    const int num_runs = blockDim.x / classes;
    const int c = threadIdx.x % classes;
    const int run = threadIdx.x / classes;
    const bool live = run < num_runs;
    const int per_run = (p.num_chunks + num_runs - 1) / num_runs;
    const int begin = run * per_run < p.num_chunks ? run * per_run : p.num_chunks;
    const int end = begin + per_run < p.num_chunks ? begin + per_run : p.num_chunks;
    int32_t *counts = p.chunk_counts + c;
    if (live) {
        int sum = 0;
        for (int chunk = begin; chunk < end; ++chunk) {
            sum += counts[static_cast<int64_t>(chunk) * classes];
        }
        sums[run * classes + c] = sum;
    }
    __syncthreads();
    if (run == 0) {
        int sum = 0;
        for (int i = 0; i < num_runs; ++i) {
            const int own = sums[i * classes + c];
            sums[i * classes + c] = sum;
            sum += own;
        }
        totals[c] = sum;
    }
    __syncthreads();
    int32_t *runs = offsets + classes;
    prefix_sums(totals, classes, runs, offsets);
    if (live) {
        if (run == 0) {
            p.group_offsets[c] = offsets[c];
        }
        int row = offsets[c] + sums[run * classes + c];
        for (int chunk = begin; chunk < end; ++chunk) {
            const int64_t at = static_cast<int64_t>(chunk) * classes;
            const int own = counts[at];
            counts[at] = row;
            row += own;
        }
    }
}

TENP_KERNEL(tenp_moe_group, TenpMoeGroupParams, 256, 1) {
    TENP_SHARED(int32_t, ids);
    const int count = slots_of_chunk(p);
    load_ids(p, blockIdx.x * CHUNK, count, ids);
    __syncthreads();
    const int classes = p.num_experts + 1;
    for (int c = threadIdx.x; c < classes; c += blockDim.x) {
        place(p, blockIdx.x * CHUNK, count, ids, c, p.chunk_counts[static_cast<int64_t>(blockIdx.x) * classes + c]);
    }
}

TENP_KERNEL(tenp_moe_group_small, TenpMoeGroupParams, 256, 1) {
    TENP_SHARED(int32_t, ids);
    int32_t *runs = ids + CHUNK;
    int32_t *counts = runs + 32;
    const int classes = p.num_experts + 1;
    int32_t *offsets = counts + classes;
    load_ids(p, 0, p.num_slots, ids);
    __syncthreads();
    for (int c = threadIdx.x; c < classes; c += blockDim.x) {
        counts[c] = count_of(ids, p.num_slots, c);
    }
    __syncthreads();
    prefix_sums(counts, classes, runs, offsets);
    for (int c = threadIdx.x; c < classes; c += blockDim.x) {
        p.group_offsets[c] = offsets[c];
        place(p, 0, p.num_slots, ids, c, offsets[c]);
    }
}

// A warp per row.
TENP_KERNEL(tenp_gather_rows, TenpGatherRowsParams, 256, 1) {
    const int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    const int live = p.num_live_rows == nullptr ? p.num_rows : *p.num_live_rows;
    if (row >= p.num_rows || row >= live) {
        return;
    }
    const int id = p.row_ids[row];
    const int64_t pitch = p.cols / 8;
    const uint4 *from = reinterpret_cast<const uint4 *>(p.in) + id * pitch;
    uint4 *to = reinterpret_cast<uint4 *>(p.out) + row * pitch;
    for (int i = threadIdx.x % 32; i < pitch; i += 32) {
        to[i] = id < 0 ? make_uint4(0, 0, 0, 0) : from[i];
    }
}
