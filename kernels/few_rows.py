"""Products of 2 to 8 rows of x on a GPU, in Triton: a weight row that any row of x keeps is read once.

Two launches: one makes the inputs and lists which are kept, the other multiplies: here int4. Every row of x gets the
sums that `kernels.triton_gemv` gives it alone, to the bit. So the plan of one row says which rows of W are added up, in
which order, before a sum is put on its grid. Products of an input that a row cuts are 0.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.plan import BLOCK_IN, Plan
from kernels.triton_gemv import (
    BLOCK,
    MAX_SEGMENTS,
    ONE,
    Norm,
    Operation,
    Product,
    fixed,
    fraction,
    inputs,
    joined,
    load_constants,
    load_inputs,
    outputs_of_tile,
    prefetch,
    rstd_of,
    scales_of,
    snap,
    starts_of,
    unpacked,
)

PREPARED = 256  # inputs that a program of the first launch makes

# Rows of x that one program takes at most; what two programs read is read from memory once. More rows need registers
# that other programs lack then.
SHARE = 4
PREFETCH = 528  # programs that prefetch the rows of their first block


class RowsPlan(NamedTuple):
    """One launch of the product's kernel. Its first three fields belong to the sums, see `rows_plan`."""

    blocks: int  # of BLOCK_IN inputs between two roundings to the grid
    block_out: int  # outputs of a tile
    rows: int  # rows of W that are loaded at once
    prefetch: bool  # whether the first PREFETCH programs prefetch


def rows_plan(plan: Plan, segments: list[int], bits: int, rows: int, dependent: bool) -> RowsPlan:
    """How to launch a product of several rows of x, with the sums of the `plan` of one.

    A thread keeps 8 or 16 outputs of each row in registers.
    """
    few = rows <= 2
    block_out = 32 * (16 if few else 8)
    ahead = dependent and all(width % block_out == 0 for width in segments) and block_out * bits % 128 == 0
    return RowsPlan(plan.blocks, block_out, 16 if few else 8, ahead)


@triton.constexpr_function
def x_words(rows, dtype):
    """How many words of 64 bits hold an input of all rows, in the model's dtype."""
    return -(-rows * dtype.primitive_bitwidth // 64)


@triton.jit
def _prepare_kernel(
    x_ptr, gain_ptr, threshold_ptr, zero_ptr, made_ptr, kept_ptr, down_ptr, x_stride, n_zero, eps,
    # compiled in: strides of made, inputs of it with those beyond the last, which are 0; int8's inputs with one scale
    ROW: tl.constexpr, INPUT: tl.constexpr, MADE: tl.constexpr, SHARE: tl.constexpr, GROUP: tl.constexpr,
    OP: tl.constexpr, PART: tl.constexpr, ZERO: tl.constexpr, PDL: tl.constexpr,
):
    """Inputs of one row of x, PART of them, and which are kept by one segment: 0 where cut, one bit each in kept."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row, segment = tl.program_id(1), tl.program_id(2)
    copy = segment * tl.num_programs(1) + row
    program = copy * tl.num_programs(0) + tl.program_id(0)
    i = tl.program_id(0) * PART + tl.arange(0, PART)
    if OP.cut:
        threshold_ptr += segment * (2 * OP.n_in if OP.shift else OP.n_in)
    constants = load_constants(i, gain_ptr, threshold_ptr, OP)
    if PDL:
        tl.extra.cuda.gdc_wait()
    if ZERO > 0:
        z = program * ZERO + tl.arange(0, ZERO)
        tl.store(zero_ptr + z, tl.zeros((ZERO,), tl.float32), mask=z < n_zero)

    x_ptr += row * x_stride
    rstd = 1.0
    if OP.prologue == "norm":
        rstd = rstd_of(x_ptr, eps, OP.n_in)
    x, keep = inputs(i, load_inputs(i, x_ptr, OP, ""), constants, rstd, OP)
    share = segment * tl.cdiv(tl.num_programs(1), SHARE) + row // SHARE
    x = tl.where(keep, x, 0.0)
    if GROUP > 0:
        x = tl.reshape(x, (PART // GROUP, GROUP))
        up, down = scales_of(tl.max(tl.abs(x).to(tl.int32, bitcast=True), axis=1))
        x = tl.reshape(fixed(x, up[:, None]), (PART,)).to(tl.int16)
        group = tl.program_id(0) * (PART // GROUP) + tl.arange(0, PART // GROUP)
        tl.store(down_ptr + copy * (MADE // GROUP) + group, down, mask=group < MADE // GROUP)
    tl.store(made_ptr + row % SHARE * ROW + (share * MADE + i) * INPUT, x, mask=i < MADE)
    if OP.cut:
        bits = tl.reshape(keep.to(tl.int32) << (i % BLOCK), (PART // BLOCK, BLOCK))
        block = tl.program_id(0) * (PART // BLOCK) + tl.arange(0, PART // BLOCK)
        n_blocks: tl.constexpr = (OP.n_in + BLOCK - 1) // BLOCK
        tl.store(kept_ptr + copy * n_blocks + block, tl.sum(bits, axis=1), mask=block < n_blocks)


@triton.jit
def kept_by_any(kept_ptr, block, n_rows, ROWS: tl.constexpr, OP: tl.constexpr):
    """Bits of a block's inputs that any of the rows keeps; none beyond the last block."""
    n_blocks: tl.constexpr = (OP.n_in + BLOCK - 1) // BLOCK
    if OP.cut:
        kept = 0
        for r in tl.static_range(ROWS):
            kept = kept | tl.load(kept_ptr + r * n_blocks + block, mask=(block < n_blocks) & (r < n_rows), other=0)
    else:
        in_block = tl.minimum(tl.maximum(OP.n_in - block * BLOCK, 0), BLOCK)
        kept = tl.where(in_block == BLOCK, -1, (1 << in_block) - 1)
    return kept


@triton.jit
def _zeros(OP: tl.constexpr, PLAN: tl.constexpr, ROWS: tl.constexpr):
    """The sums that `_add_rows` adds to."""
    PACK: tl.constexpr = OP.pack
    WORDS: tl.constexpr = PLAN.block_out // PACK
    ones = (tl.zeros((WORDS // 2,), tl.float32),) * ROWS
    return (tl.zeros((WORDS,), tl.float32),) * (ROWS * PACK), ones, ones


@triton.jit
def _fetch_x(x_ptr, X_WORDS: tl.constexpr):
    """Brings a block's x into L1, whose latency every row of W would wait for; nothing waits for the result."""
    at = x_ptr + tl.arange(0, BLOCK) * X_WORDS
    tl.inline_asm_elementwise(
        "ld.global.b32 $0, [$1];", "=r,l", [at.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _add_rows(
    # sums, a tuple of each row's in turn, as `add_products` has them; ones and low too
    acc, ones, low,
    # which of the block's rows any row of x keeps; words of x at the block's first input; its weights and the tile; the
    # bits of 1.0
    kept, x_ptr, weight_ptr, weight_scale_ptr, n_out, first, last, one,
    OP: tl.constexpr, PLAN: tl.constexpr, ROWS: tl.constexpr,
):
    """Adds the block's rows of W, PLAN.rows at a time, to the sums of every row of x."""
    PACK: tl.constexpr = OP.pack
    WORDS: tl.constexpr = PLAN.block_out // PACK
    AT_ONCE: tl.constexpr = PLAN.rows
    X_WORDS: tl.constexpr = x_words(ROWS, OP.dtype)
    IN_WORD: tl.constexpr = 64 // OP.dtype.primitive_bitwidth
    words = first // PACK + tl.arange(0, WORDS)
    in_words = words < last // PACK
    for part in range(0, BLOCK, AT_ONCE):
        # the weights, with pairs of scale and minimum of two words
        weights, scales = (), ()
        for j in tl.static_range(AT_ONCE):
            mask = in_words & ((kept >> (part + j)) & 1 != 0)
            at = weight_ptr + (part + j) * (n_out // PACK) + words
            weights = weights + (tl.load(at, mask=mask, other=0, eviction_policy="evict_first"),)  # noqa: RUF005
            two = first // (2 * PACK) + tl.arange(0, WORDS // 2)
            at = weight_scale_ptr + (part + j) * (n_out // OP.groupsize) + two * (2 * PACK) // OP.groupsize
            mask = (two < last // (2 * PACK)) & ((kept >> (part + j)) & 1 != 0)
            scales = scales + (tl.load(at, mask=mask, other=0),)  # noqa: RUF005 (Triton knows no stars)

        # their products with every row of x
        for j in tl.static_range(AT_ONCE):
            sums, new_ones, new_low = (), (), ()
            # integers are widened once for all rows, see `fraction`
            fractions = ()
            for k in tl.static_range(PACK):
                fractions = fractions + (fraction(weights[j], one, k),)  # noqa: RUF005
            # x is multiplied by the scale of its group
            for r in tl.static_range(ROWS):
                if r % IN_WORD == 0:
                    some = tl.load(x_ptr + (part + j) * X_WORDS + r // IN_WORD)
                x = unpacked(some, r, OP.dtype)
                new_low = new_low + (low[r] + x * (scales[j] & -65536).to(tl.float32, bitcast=True),)  # noqa: RUF005
                x = x * (scales[j] << 16).to(tl.float32, bitcast=True)
                new_ones = new_ones + (ones[r] + x,)  # noqa: RUF005
                x = tl.interleave(x, x)
                for k in tl.static_range(PACK):
                    sums = sums + (acc[r * PACK + k] + x * fractions[k],)  # noqa: RUF005
            acc, ones, low = sums, new_ones, new_low
    return acc, ones, low


@triton.jit
def _rows_kernel(
    x_ptr, kept_ptr, weight_ptr, out_ptr, offset_ptr, weight_scale_ptr, fineness_ptr,
    n_out, out_stride, n_rows, tiles_1, tiles_2, start_1, start_2, one,
    OP: tl.constexpr, PLAN: tl.constexpr, ROWS: tl.constexpr, SHARES: tl.constexpr, PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
):
    """out += m (W^T x + offset) for prepared x: a program takes PLAN.blocks, a tile and ROWS rows, one of SHARES."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    PACK: tl.constexpr = OP.pack
    BLOCKS: tl.constexpr = PLAN.blocks
    BLOCK_OUT: tl.constexpr = PLAN.block_out
    X_WORDS: tl.constexpr = x_words(ROWS, OP.dtype)
    n_blocks: tl.constexpr = (OP.n_in + BLOCK - 1) // BLOCK
    tile, share = tl.program_id(0) // SHARES, tl.program_id(0) % SHARES
    segment, first, last = outputs_of_tile(tile, tiles_1, tiles_2, start_1, start_2, n_out, BLOCK_OUT)
    cols = first + tl.arange(0, BLOCK_OUT)
    in_cols = cols < last
    n_words = n_out // PACK
    block = tl.program_id(1) * BLOCKS

    # before the wait: weights, which no launch writes
    if PREFETCH > 0:
        if tl.program_id(1) * tl.num_programs(0) + tl.program_id(0) < PREFETCH:
            rows = block * BLOCK + tl.arange(0, BLOCK)
            at = weight_ptr + rows.to(tl.int64) * n_words + first // PACK
            prefetch(at, rows < OP.n_in, BLOCK_OUT * OP.bits // 8)
    x_part = share
    if OP.cut:  # each segment has inputs of its own
        x_part += segment * SHARES
        kept_ptr += segment * n_rows * n_blocks
    x_ptr += x_part * n_blocks * (BLOCK * X_WORDS)
    kept_ptr += share * ROWS * n_blocks
    n_rows -= share * ROWS  # that are left for this program
    out_ptr += share * ROWS * out_stride

    # the inputs are made
    if PDL:
        tl.extra.cuda.gdc_wait()
        _fetch_x(x_ptr + block * (BLOCK * X_WORDS), X_WORDS)
    kept = kept_by_any(kept_ptr, block, n_rows, ROWS, OP)
    acc, ones, low = _zeros(OP, PLAN, ROWS)
    for _block in range(BLOCKS):
        at = weight_ptr + block.to(tl.int64) * (BLOCK * n_words)
        scale_at = weight_scale_ptr + block.to(tl.int64) * (BLOCK * (n_out // OP.groupsize))
        # the next block's inputs come while this one's weights do
        next_kept = kept_by_any(kept_ptr, block + 1, n_rows, ROWS, OP)
        if PDL:
            _fetch_x(x_ptr + tl.minimum(block + 1, n_blocks - 1) * (BLOCK * X_WORDS), X_WORDS)
        x_at = x_ptr + tl.minimum(block, n_blocks - 1) * (BLOCK * X_WORDS)  # beyond it nothing is kept
        acc, ones, low = _add_rows(acc, ones, low, kept, x_at, at, scale_at, n_out, first, last, one, OP, PLAN, ROWS)
        block += 1
        kept = next_kept

    # the outputs in their order, with the offsets, on their grid
    for r in tl.static_range(ROWS):
        acc_r = acc[r * PACK : r * PACK + PACK]
        out = joined(acc_r, tl.interleave(ones[r], ones[r]), tl.interleave(low[r], low[r]))
        if offset_ptr is not None:
            if tl.program_id(1) == 0:
                out += tl.load(offset_ptr + cols, mask=in_cols, other=0.0)
        if OP.multiplier != 1.0:
            out *= OP.multiplier
        if fineness_ptr is not None:
            out = snap(out, tl.load(fineness_ptr + cols, mask=in_cols, other=1.0))
        tl.atomic_add(out_ptr + r * out_stride + cols, out, mask=in_cols & (r < n_rows), sem="relaxed")


class Prepared(NamedTuple):
    """Room for the inputs of a product: made [most], in the model's dtype, and which are kept, one bit each, int32.

    Of int8 its own inputs, 16 bits each, and their scales `down`, float32.
    """

    made: Tensor
    kept: Tensor
    down: Tensor | None = None


def launch_rows(
    prologue: str, x: Tensor, product: Product, out: Tensor, *,
    prepared: Prepared, norm: Norm | None = None, zero: Tensor | None = None, dtype: torch.dtype, pdl: bool = False,
) -> None:
    """`kernels.triton_gemv.launch_gemv` for 2 to 8 rows of x and int4, each with the sums that it has alone.

    x: "given" [rows, in]; else float32: h [rows, in] or gate|up [rows, 2 in and room].
    out: [rows, out and room], float32.
    """
    product.check()
    form, n_in = product.form, len(product.weight)
    rows, segments = len(x), product.segments
    operation = product.operation(prologue, dtype)
    shares = triton.cdiv(rows, SHARE)
    share = triton.cdiv(rows, shares)
    room = x_words(share, operation.dtype) * 64 // operation.dtype.primitive_bitwidth
    launch_prepare(x, operation, product.threshold, prepared, room, share, norm=norm, zero=zero, pdl=pdl)
    plan = rows_plan(product.plan(prologue, pdl), segments, form.bits, share, pdl)

    # the kernel takes int4, and its pairs of scale and minimum, as words of 32 bits
    weight, weight_scale = product.weight.view(torch.int32), product.weight_scale.view(torch.int32)
    starts = starts_of(segments)
    tiles = starts_of([triton.cdiv(width, plan.block_out) for width in segments])
    _rows_kernel[(tiles[-1] * shares, triton.cdiv(n_in, BLOCK_IN * plan.blocks))](
        prepared.made.view(torch.int64), prepared.kept, weight, out, product.offset, weight_scale, product.fineness,
        starts[-1], out.stride(0), rows, *tiles[1:MAX_SEGMENTS], *starts[1:MAX_SEGMENTS], ONE,
        OP=operation, PLAN=plan, ROWS=share, SHARES=shares, PREFETCH=PREFETCH * plan.prefetch, PDL=pdl,
        num_warps=1, launch_pdl=pdl,
    )


def launch_prepare(
    x: Tensor, operation: Operation, threshold: Tensor | None, prepared: Prepared, room: int = 0, share: int = 8, *,
    group: int = 0, norm: Norm | None = None, zero: Tensor | None = None, pdl: bool = False,
) -> None:
    """Makes the inputs of a product and lists the kept ones; see `launch_rows`.

    room: rows that lie side by side in what is made, [segments, shares, inputs in whole blocks, room]; 0: it is
        [rows, in].
    share: rows that one program of the product takes.
    group: int8's inputs that have one scale: it makes [segments, rows, inputs in whole groups] and as many scales.
    threshold: see `Product`; where the operation cuts nothing, one copy of the inputs serves all segments.
    """
    gain, eps, _ = norm or (None, 0.0, None)
    grid = (triton.cdiv(operation.n_in, PREPARED), len(x), len(threshold) if operation.cut else 1)
    n_zero = 0 if zero is None else zero.numel()
    zero_block = triton.next_power_of_2(triton.cdiv(n_zero, grid[0] * grid[1] * grid[2])) if n_zero else 0
    whole = group or (BLOCK_IN if room else 1)
    made = triton.cdiv(operation.n_in, whole) * whole
    _prepare_kernel[grid](
        x, gain, threshold, zero, *prepared, x.stride(0), n_zero, eps,
        ROW=1 if room else made, INPUT=room or 1, MADE=made, SHARE=share, GROUP=group, OP=operation,
        PART=PREPARED, ZERO=zero_block, PDL=pdl, num_warps=1, launch_pdl=pdl,
    )
