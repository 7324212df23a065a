"""A grouped product in Triton whose groups differ in width: the gate and up products with SwiGLU, then the down product.

Persistent programs walk a list of tiles that a first launch makes on the device. Neurons lie one after another, as our
own kernels have them: gate and up as [S, H], down transposed as [S, H]; so a width is any number and nothing is padded.
Plain pointers.
"""

import triton
import triton.language as tl


@triton.jit
def tiles_kernel(counts, widths, up_tiles, down_tiles, groups, hidden, up_m, up_n, down_m, down_n, GROUPS: tl.constexpr):
    """Ends of the groups' tiles, for either launch."""
    group = tl.arange(0, GROUPS)
    count = tl.load(counts + group, mask=group < groups, other=0)
    width = tl.load(widths + group, mask=group < groups, other=0)
    up = (count + up_m - 1) // up_m * ((width + up_n - 1) // up_n)
    down = (count + down_m - 1) // down_m * ((hidden + down_n - 1) // down_n)
    tl.store(up_tiles + group, tl.cumsum(up, 0), mask=group < groups)
    tl.store(down_tiles + group, tl.cumsum(down, 0), mask=group < groups)


@triton.jit
def find_tile(tile, tile_ends, counts, groups, STEPS: tl.constexpr, M: tl.constexpr):
    """The group of a tile and its place in there: tokens first, so that a tile of weights is used while it is near."""
    low, high = tile * 0, tile * 0 + groups - 1
    for _ in tl.static_range(STEPS):
        middle = (low + high) // 2
        before = tl.load(tile_ends + middle) <= tile
        low = tl.where(before, middle + 1, low)
        high = tl.where(before, high, middle)
    first = tl.load(tile_ends + low - 1, mask=low > 0, other=0)
    count = tl.load(counts + low)
    tiles_m = (count + M - 1) // M
    return low, count, (tile - first) % tiles_m, (tile - first) // tiles_m


@triton.jit
def gate_up_kernel(x, gate, up, h, token_of_row, starts, counts, widths, neurons, tile_ends, groups, hidden, pitch,
                   STEPS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, WHOLE_K: tl.constexpr,
                   STEP: tl.constexpr):
    tile = tl.program_id(0)
    tiles = tl.load(tile_ends + groups - 1)
    while tile < tiles:
        group, count, m, n = find_tile(tile, tile_ends, counts, groups, STEPS, M)
        # What all widths are multiples of: without it the compiler moves one number at a time.
        width = tl.multiple_of(tl.load(widths + group), STEP)
        row = m * M + tl.arange(0, M)
        neuron = n * N + tl.arange(0, N)
        depth = tl.arange(0, K)
        out_row = (tl.load(starts + group) + row).to(tl.int64)
        token = tl.load(token_of_row + out_row, mask=row < count, other=0).to(tl.int64)
        first = (tl.load(neurons + group) + neuron).to(tl.int64)
        x_at = x + token[:, None] * hidden + depth[None, :]
        weight_at = first[None, :] * hidden + depth[:, None]
        gate_sum = tl.zeros((M, N), tl.float32)
        up_sum = tl.zeros((M, N), tl.float32)
        for k in range(0, hidden, K):
            row_mask, neuron_mask = (row < count)[:, None], (neuron < width)[None, :]
            if not WHOLE_K:
                row_mask = row_mask & (depth < hidden - k)[None, :]
                neuron_mask = neuron_mask & (depth < hidden - k)[:, None]
            tokens = tl.load(x_at + k, mask=row_mask, other=0.0)
            gate_sum = tl.dot(tokens, tl.load(gate + weight_at + k, mask=neuron_mask, other=0.0), gate_sum)
            up_sum = tl.dot(tokens, tl.load(up + weight_at + k, mask=neuron_mask, other=0.0), up_sum)
        values = gate_sum * tl.sigmoid(gate_sum) * up_sum
        tl.store(h + out_row[:, None] * pitch + neuron[None, :], values.to(h.dtype.element_ty),
                 mask=(row < count)[:, None] & (neuron < width)[None, :])
        tile += tl.num_programs(0)


@triton.jit
def down_kernel(h, down_t, y, starts, counts, widths, neurons, tile_ends, groups, hidden, pitch,
                STEPS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, STEP: tl.constexpr):
    tile = tl.program_id(0)
    tiles = tl.load(tile_ends + groups - 1)
    while tile < tiles:
        group, count, m, n = find_tile(tile, tile_ends, counts, groups, STEPS, M)
        width = tl.multiple_of(tl.load(widths + group), STEP)
        row = m * M + tl.arange(0, M)
        column = n * N + tl.arange(0, N)
        depth = tl.arange(0, K)
        at_row = (tl.load(starts + group) + row).to(tl.int64)
        first = (tl.load(neurons + group) + depth).to(tl.int64)
        h_at = h + at_row[:, None] * pitch + depth[None, :]
        weight_at = down_t + first[:, None] * hidden + column[None, :]
        total = tl.zeros((M, N), tl.float32)
        for k in range(0, width, K):
            inside = depth < width - k
            values = tl.load(h_at + k, mask=(row < count)[:, None] & inside[None, :], other=0.0)
            weight_mask = inside[:, None] & (column < hidden)[None, :]
            weights = tl.load(weight_at + k * hidden, mask=weight_mask, other=0.0)
            total = tl.dot(values, weights, total)
        tl.store(y + at_row[:, None] * hidden + column[None, :], total.to(y.dtype.element_ty),
                 mask=(row < count)[:, None] & (column < hidden)[None, :])
        tile += tl.num_programs(0)


def tiles(groups, widths, up_tiles, down_tiles, hidden, up, down):
    tiles_kernel[(1,)](groups.counts, widths, up_tiles, down_tiles, groups.groups, hidden, up.m, up.n, down.m, down.n,
                       GROUPS=triton.next_power_of_2(groups.groups))


def gate_up(programs, groups, x, gate, up, h, widths, step, neurons, tile_ends, config):
    gate_up_kernel[(programs,)](x, gate, up, h, groups.token_of_row, groups.starts, groups.counts, widths, neurons,
                                tile_ends, groups.groups, x.shape[1], h.shape[1],
                                STEPS=groups.groups.bit_length(), M=config.m, N=config.n, K=config.k,
                                WHOLE_K=x.shape[1] % config.k == 0, STEP=step, num_warps=config.warps,
                                num_stages=config.stages)


def down(programs, groups, h, down_t, y, widths, step, neurons, tile_ends, config):
    down_kernel[(programs,)](h, down_t, y, groups.starts, groups.counts, widths, neurons, tile_ends, groups.groups,
                             y.shape[1], h.shape[1], STEPS=groups.groups.bit_length(),
                             M=config.m, N=config.n, K=config.k, STEP=step, num_warps=config.warps,
                             num_stages=config.stages)
