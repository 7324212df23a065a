"""What every peer needs around its products, as small Triton kernels: sorting slots by expert, SwiGLU, the weighted sum.

All peers get the same, so that what is compared is their products. A group is an expert that has neurons; the slots of
experts without any have row -1 and cost nothing. A group's rows begin at a multiple of `align`.
"""

import torch
import triton
import triton.language as tl

SLOTS = 256


@triton.jit
def count_kernel(ids, group_of_expert, counts, slots, BLOCK: tl.constexpr):
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(ids + slot, mask=slot < slots, other=0)
    group = tl.load(group_of_expert + expert, mask=slot < slots, other=-1)
    tl.atomic_add(counts + group, 1, mask=group >= 0)


@triton.jit
def offsets_kernel(counts, starts, ends, places, blocks, groups, align, GROUPS: tl.constexpr):
    """Where the groups begin and end; `blocks`: how many rows there are, gaps included."""
    group = tl.arange(0, GROUPS)
    count = tl.load(counts + group, mask=group < groups, other=0)
    taken = (count + align - 1) // align * align
    start = tl.cumsum(taken, 0) - taken
    tl.store(starts + group, start, mask=group < groups)
    tl.store(places + group, start, mask=group < groups)
    tl.store(ends + group, start + count, mask=group < groups)
    tl.store(blocks, tl.sum(taken, 0))


@triton.jit
def scatter_kernel(ids, group_of_expert, places, row_of_slot, token_of_row, group_of_row, slots, top_k,
                   BLOCK: tl.constexpr):
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(ids + slot, mask=slot < slots, other=0)
    group = tl.load(group_of_expert + expert, mask=slot < slots, other=-1)
    live = group >= 0
    row = tl.atomic_add(places + group, 1, mask=live)
    tl.store(row_of_slot + slot, tl.where(live, row, -1), mask=slot < slots)
    tl.store(token_of_row + row, slot // top_k, mask=live)
    tl.store(group_of_row + row, group, mask=live)


@triton.jit
def gather_kernel(x, token_of_row, out, hidden, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(token_of_row + row).to(tl.int64)
    if token >= 0:
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        values = tl.load(x + token * hidden + column, mask=column < hidden)
        tl.store(out + row * hidden + column, values, mask=column < hidden)


@triton.jit
def swiglu_kernel(gate_up, token_of_row, h, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    if tl.load(token_of_row + row) >= 0:
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < width
        gate = tl.load(gate_up + row * 2 * width + column, mask=inside).to(tl.float32)
        up = tl.load(gate_up + (row * 2 + 1) * width + column, mask=inside).to(tl.float32)
        tl.store(h + row * width + column, (gate * tl.sigmoid(gate) * up).to(h.dtype.element_ty), mask=inside)


@triton.jit
def combine_kernel(y, row_of_slot, slot_weights, out, hidden, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """Sums in the order of the slots, in f32."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for slot in tl.static_range(TOP_K):
        row = tl.load(row_of_slot + token * TOP_K + slot).to(tl.int64)
        if row >= 0:
            weight = tl.load(slot_weights + token * TOP_K + slot)
            total += weight * tl.load(y + row * hidden + column, mask=column < hidden, other=0.0).to(tl.float32)
    tl.store(out + token * hidden + column, total.to(out.dtype.element_ty), mask=column < hidden)


def block_of(columns):
    return min(1024, triton.next_power_of_2(columns))


class Groups:
    """Sorts the slots of a case by expert, on the device, at sizes that do not depend on the routing."""

    def __init__(self, ids, group_of_expert, groups, top_k, align):
        device, slots = ids.device, ids.numel()
        self.ids, self.group_of_expert, self.top_k, self.align = ids, group_of_expert, top_k, align
        self.groups = groups
        # Every group that can have rows may leave a gap.
        self.capacity = -(-(slots + min(groups, slots) * (align - 1)) // align) * align
        ints = lambda count: torch.empty(count, dtype=torch.int32, device=device)
        self.counts, self.starts, self.ends, self.places = (ints(groups) for _ in range(4))
        self.rows, self.row_of_slot = ints(1), ints(slots)
        self.token_of_row, self.group_of_row = ints(self.capacity), ints(self.capacity)

    def run(self):
        slots = self.ids.numel()
        grid = (triton.cdiv(slots, SLOTS),)
        self.counts.zero_()
        self.token_of_row.fill_(-1)
        self.group_of_row.fill_(-1)
        count_kernel[grid](self.ids, self.group_of_expert, self.counts, slots, BLOCK=SLOTS)
        offsets_kernel[(1,)](self.counts, self.starts, self.ends, self.places, self.rows, self.groups, self.align,
                             GROUPS=triton.next_power_of_2(self.groups))
        scatter_kernel[grid](self.ids, self.group_of_expert, self.places, self.row_of_slot, self.token_of_row,
                             self.group_of_row, slots, self.top_k, BLOCK=SLOTS)

    def gather(self, x, out):
        hidden = x.shape[1]
        block = block_of(hidden)
        gather_kernel[(self.capacity, triton.cdiv(hidden, block))](x, self.token_of_row, out, hidden, BLOCK=block)

    def swiglu(self, gate_up, h):
        width = h.shape[1]
        block = block_of(width)
        swiglu_kernel[(self.capacity, triton.cdiv(width, block))](gate_up, self.token_of_row, h, width, BLOCK=block)

    def combine(self, y, slot_weights, out):
        hidden = out.shape[1]
        block = block_of(hidden)
        combine_kernel[(out.shape[0], triton.cdiv(hidden, block))](y, self.row_of_slot, slot_weights, out, hidden,
                                                                  TOP_K=self.top_k, BLOCK=block)
