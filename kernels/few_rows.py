"""The inputs of a product of 2 to 8 rows of x on a GPU, and which are kept: made by a launch before it, in Triton.

A weight row that any row of x keeps is read once.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from kernels.plan import BLOCK_IN
from kernels.triton_gemv import (
    BLOCK,
    Norm,
    Operation,
    fixed,
    inputs,
    load_constants,
    load_inputs,
    rstd_of,
    scales_of,
    zeros_of,
)

PREPARED = 256  # inputs that a program of the first launch makes


@triton.jit
def _prepare_kernel(
    x_ptr, gain_ptr, threshold_ptr, zero_ptr, made_ptr, kept_ptr, down_ptr, x_stride, n_zero, eps,
    # compiled in: inputs made, with those beyond the last, which are 0; rows side by side; inputs with one scale
    MADE: tl.constexpr, SHARE: tl.constexpr, GROUP: tl.constexpr, OP: tl.constexpr, PART: tl.constexpr,
    ZERO: tl.constexpr, PDL: tl.constexpr,
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
    if OP.bits == 8:
        x = tl.reshape(x, (PART // GROUP, GROUP))
        up, down = scales_of(tl.max(tl.abs(x).to(tl.int32, bitcast=True), axis=1))
        x = tl.reshape(fixed(x, up[:, None]), (PART,)).to(tl.int16)
        group = tl.program_id(0) * (PART // GROUP) + tl.arange(0, PART // GROUP)
        tl.store(down_ptr + copy * (MADE // GROUP) + group, down, mask=group < MADE // GROUP)
    tl.store(made_ptr + row % SHARE + (share * MADE + i) * SHARE, x, mask=i < MADE)
    if OP.cut:
        bits = tl.reshape(keep.to(tl.int32) << (i % BLOCK), (PART // BLOCK, BLOCK))
        block = tl.program_id(0) * (PART // BLOCK) + tl.arange(0, PART // BLOCK)
        n_blocks: tl.constexpr = (OP.n_in + BLOCK - 1) // BLOCK
        tl.store(kept_ptr + copy * n_blocks + block, tl.sum(bits, axis=1), mask=block < n_blocks)


@triton.jit
def kept_by_any(kept_ptr, block, ROWS: tl.constexpr, OP: tl.constexpr):
    """Bits of a block's inputs that any of the rows keeps, without `kept_ptr` all; none beyond the last block."""
    n_blocks: tl.constexpr = (OP.n_in + BLOCK - 1) // BLOCK
    if OP.cut and kept_ptr is not None:
        kept = 0
        for r in tl.static_range(ROWS):
            kept = kept | tl.load(kept_ptr + r * n_blocks + block, mask=block < n_blocks, other=0)
    else:
        in_block = tl.minimum(tl.maximum(OP.n_in - block * BLOCK, 0), BLOCK)
        kept = tl.where(in_block == BLOCK, -1, (1 << in_block) - 1)
    return kept


class Prepared(NamedTuple):
    """Room for the inputs of a product: made [most], in the model's dtype, and which are kept, one bit each, int32.

    Of int8 its own inputs, 16 bits each, and their scales `down`, float32.
    """

    made: Tensor
    kept: Tensor
    down: Tensor | None = None


def launch_prepare(
    x: Tensor, operation: Operation, threshold: Tensor | None, prepared: Prepared, *, paired: bool = False,
    group: int = 0, norm: Norm | None = None, zero: Tensor | None = None, pdl: bool = False,
) -> None:
    """Makes the inputs of a product, [segments, rows, in], and lists the kept ones.

    paired: two rows lie side by side: [segments, pairs of rows, inputs in whole blocks, 2].
    group: integers' inputs of one program: [segments, rows, inputs in whole groups]; int8's scales, too.
    threshold: see `Product`; where the operation cuts nothing, one copy of the inputs serves all segments.
    """
    gain, eps, _ = norm or (None, 0.0, None)
    grid = (triton.cdiv(operation.n_in, PREPARED), len(x), len(threshold) if operation.cut else 1)
    n_zero, zero_block = zeros_of(zero, grid[0] * grid[1] * grid[2])
    whole = group or (BLOCK_IN if paired else 1)
    made = triton.cdiv(operation.n_in, whole) * whole
    _prepare_kernel[grid](
        x, gain, threshold, zero, *prepared, x.stride(0), n_zero, eps,
        MADE=made, SHARE=2 if paired else 1, GROUP=group, OP=operation, PART=PREPARED,
        ZERO=zero_block, PDL=pdl, num_warps=1, launch_pdl=pdl,
    )
