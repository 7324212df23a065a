"""A fused MoE in Triton of the usual shape: tokens sorted into blocks of one expert each, all experts of one width.

The first launch gathers tokens and does the gate and up products with SwiGLU, the second the down product. Weights are
[E, 2W, H] and [E, H, W]; narrower experts are padded with zeros to the widest.
"""

import triton
import triton.language as tl


@triton.jit
def block_of_program(blocks, columns, NEAR: tl.constexpr):
    """Blocks of tokens in bundles of NEAR, so that programs at work together share tiles of weights."""
    program = tl.program_id(0)
    bundle = NEAR * columns
    first = program // bundle * NEAR
    size = tl.minimum(blocks - first, NEAR)
    return first + program % bundle % size, program % bundle // size


@triton.jit
def gate_up_kernel(x, gate_up, h, token_of_row, group_of_row, num_rows, blocks, hidden, width,
                   M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, NEAR: tl.constexpr, WHOLE_K: tl.constexpr):
    block, n = block_of_program(blocks, tl.cdiv(width, N), NEAR)
    if block * M < tl.load(num_rows):
        row = (block * M + tl.arange(0, M)).to(tl.int64)
        token = tl.load(token_of_row + row).to(tl.int64)
        live = token >= 0
        # A block's first row is never a gap.
        group = tl.load(group_of_row + block * M).to(tl.int64)
        neuron = n * N + tl.arange(0, N)
        depth = tl.arange(0, K)
        x_at = x + tl.where(live, token, 0)[:, None] * hidden + depth[None, :]
        weight_at = gate_up + (group * 2 * width + neuron)[None, :] * hidden + depth[:, None]
        gate_sum = tl.zeros((M, N), tl.float32)
        up_sum = tl.zeros((M, N), tl.float32)
        for k in range(0, hidden, K):
            row_mask, neuron_mask = live[:, None], (neuron < width)[None, :]
            if not WHOLE_K:
                row_mask = row_mask & (depth < hidden - k)[None, :]
                neuron_mask = neuron_mask & (depth < hidden - k)[:, None]
            tokens = tl.load(x_at + k, mask=row_mask, other=0.0)
            gate_sum = tl.dot(tokens, tl.load(weight_at + k, mask=neuron_mask, other=0.0), gate_sum)
            up_weights = tl.load(weight_at + (width * hidden + k), mask=neuron_mask, other=0.0)
            up_sum = tl.dot(tokens, up_weights, up_sum)
        values = gate_sum * tl.sigmoid(gate_sum) * up_sum
        tl.store(h + row[:, None] * width + neuron[None, :], values.to(h.dtype.element_ty),
                 mask=live[:, None] & (neuron < width)[None, :])


@triton.jit
def down_kernel(h, down, y, token_of_row, group_of_row, num_rows, blocks, hidden, width,
                M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, NEAR: tl.constexpr, WHOLE_K: tl.constexpr):
    block, n = block_of_program(blocks, tl.cdiv(hidden, N), NEAR)
    if block * M < tl.load(num_rows):
        row = (block * M + tl.arange(0, M)).to(tl.int64)
        live = tl.load(token_of_row + row) >= 0
        group = tl.load(group_of_row + block * M).to(tl.int64)
        column = n * N + tl.arange(0, N)
        depth = tl.arange(0, K)
        h_at = h + row[:, None] * width + depth[None, :]
        weight_at = down + (group * hidden + column)[None, :] * width + depth[:, None]
        total = tl.zeros((M, N), tl.float32)
        for k in range(0, width, K):
            row_mask, column_mask = live[:, None], (column < hidden)[None, :]
            if not WHOLE_K:
                row_mask = row_mask & (depth < width - k)[None, :]
                column_mask = column_mask & (depth < width - k)[:, None]
            values = tl.load(h_at + k, mask=row_mask, other=0.0)
            total = tl.dot(values, tl.load(weight_at + k, mask=column_mask, other=0.0), total)
        tl.store(y + row[:, None] * hidden + column[None, :], total.to(y.dtype.element_ty),
                 mask=live[:, None] & (column < hidden)[None, :])


def launch(kernel, groups, a, weights, out, outputs, inner, hidden, width, config):
    blocks = groups.capacity // config.m
    kernel[(blocks * triton.cdiv(outputs, config.n),)](
        a, weights, out, groups.token_of_row, groups.group_of_row, groups.rows, blocks, hidden, width,
        M=config.m, N=config.n, K=config.k, NEAR=8, WHOLE_K=inner % config.k == 0,
        num_warps=config.warps, num_stages=config.stages)


def gate_up(groups, x, weights, h, config):
    hidden, width = x.shape[1], h.shape[1]
    launch(gate_up_kernel, groups, x, weights, h, width, hidden, hidden, width, config)


def down(groups, h, weights, y, config):
    hidden, width = y.shape[1], h.shape[1]
    launch(down_kernel, groups, h, weights, y, hidden, width, hidden, width, config)
