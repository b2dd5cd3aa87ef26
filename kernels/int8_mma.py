"""int8 products of 1 to 8 rows of x on a GPU: exact sums of integers, on its tensor cores, in Triton.

A warp takes PLAN.blocks of 32 inputs x 128 outputs. Per row of x and program the inputs are put on 16-bit fixed point,
with one power of two as their scale, so that no sum rounds and no order matters. That costs at most 2^-15 of the largest
input; bfloat16's own rounding costs 2^-9 of every input. An x that is not finite makes the outputs not a number.

No weight is widened or moved. A word of W is 4 neighbouring outputs of one input, but the tensor core takes the 4 bytes
of a word for 4 inputs of one output. So each byte of x is multiplied four times, each time beside three zeros, that is,
with each of the 4 outputs alone. The 8 columns of the small operand are 4 such places times the 2 bytes of x:

    lane 4 g + t loads 16 bytes, outputs 16 g .. 16 g + 15, of inputs 8 t + i, for i = 0 .. 7
    column 2 j + p, p = 0 the high byte of x and 1 the low one: in place j of the word
    so lane 4 g + t gets for each word c the two sums of output 16 g + 4 c + t, which differ by a factor of 256

A tensor of 32 numbers is one register of the warp's 32 lanes: these kernels are written lane by lane.
"""

import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_gemv import (
    BLOCK,
    MAX_SEGMENTS,
    RSTD_BUFFER,
    Norm,
    Product,
    _prefetch_tile,
    inputs,
    load_constants,
    load_inputs,
    outputs_of_tile,
    prefetch,
    rstd_of,
    shared_rstd,
    snap,
    starts_of,
)

TILE = tl.constexpr(128)  # outputs of a program
PART = 256  # inputs that a program of the launch before several rows makes
LANEWISE = tl.constexpr(os.environ.get("TRITON_INTERPRET") != "1")  # the interpreter knows no assembly
SPLIT = tl.constexpr(12582912.0)  # 1.5 2^23: what is added to it is rounded to an integer


class IntegerPlan(NamedTuple):
    """One launch: `blocks` of 32 inputs share a scale of x, which belongs to the sums; the rest to the launch alone."""

    blocks: int
    groups: int = 1  # how often a program takes `blocks`
    block_out: int = 128
    registers: int | None = None
    prefetch: int = 0  # see `kernels.plan.Plan`
    prefetch_blocks: int = 1
    guess: bool = False
    early: bool = True  # dense: weights are loaded before the wait
    quads: bool = False  # a lane's 16 outputs lie side by side, else 8 of them 64 on


# ---- one register per lane


@triton.jit
def _load_words(at, wanted, QUADS: tl.constexpr, ALL: tl.constexpr):
    """Four words at each lane's address, or two there and two 64 bytes on. ALL: `wanted` is not 0, else anything."""
    if ALL:
        if QUADS:
            return tl.inline_asm_elementwise(
                "ld.global.L1::no_allocate.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,l", [at.to(tl.int64)],
                dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=1,
            )
        else:
            return tl.inline_asm_elementwise(
                "ld.global.L1::no_allocate.v2.b32 {$0, $1}, [$4]; ld.global.L1::no_allocate.v2.b32 {$2, $3}, [$4 + 64];",
                "=&r,=&r,=&r,=&r,l", [at.to(tl.int64)],
                dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=1,
            )
    elif QUADS:
        return tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $5, 0; @p ld.global.L1::no_allocate.v4.b32 {$0, $1, $2, $3}, [$4]; }",
            "=r,=r,=r,=r,l,r", [at.to(tl.int64), wanted], dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=False, pack=1,
        )
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $5, 0; @p ld.global.L1::no_allocate.v2.b32 {$0, $1}, [$4]; "
            "@p ld.global.L1::no_allocate.v2.b32 {$2, $3}, [$4 + 64]; }",
            "=&r,=&r,=&r,=&r,l,r", [at.to(tl.int64), wanted], dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=False, pack=1,
        )


@triton.jit
def _load_4_floats(at, wanted, other: tl.constexpr):
    """Four float32 at each lane's address, where wanted is not 0; else `other`, 0 or 1."""
    return tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $5, 0; mov.f32 $0, $6; mov.f32 $1, $6; mov.f32 $2, $6; mov.f32 $3, $6; "
        "@p ld.global.v4.f32 {$0, $1, $2, $3}, [$4]; }",
        "=&f,=&f,=&f,=&f,l,r,f", [at.to(tl.int64), wanted, 1.0 * other],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=False, pack=1,
    )


@triton.jit
def _add_4_floats(at, wanted, v):
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p red.relaxed.gpu.global.add.v4.f32 [$1], {$3, $4, $5, $6}; mov.u32 $0, 0; }",
        "=r,l,r,f,f,f,f", [at.to(tl.int64), wanted, v[0], v[1], v[2], v[3]], dtype=tl.int32, is_pure=False, pack=1,
    )


@triton.jit
def _from_lane(x, lane):
    return tl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, $2, 0x1f, 0xffffffff;", "=r,r,r", [x, lane], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _from_neighbour(x, distance: tl.constexpr):
    """x of the lane whose number differs by the bit `distance`."""
    if distance == 1:
        return tl.inline_asm_elementwise(
            "shfl.sync.bfly.b32 $0, $1, 1, 0x1f, 0xffffffff;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return tl.inline_asm_elementwise(
            "shfl.sync.bfly.b32 $0, $1, 2, 0x1f, 0xffffffff;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def _byte_in_place(word, choice):
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, 0, $2;", "=r,r,r", [word, choice], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _multiply_add(sums, a0, a1, a2, a3, b0, b1):
    """sums + A B, a step of a tensor core: 16 x 32 bytes times 32 x 8, to 16 x 8 int32."""
    return tl.inline_asm_elementwise(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};",
        "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r", [a0, a1, a2, a3, b0, b1, sums[0], sums[1], sums[2], sums[3]],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
    )


@triton.jit
def _multiply_add_half(sums, a0, a1, b0):
    """The same of 16 x 16 bytes and 16 x 8."""
    return tl.inline_asm_elementwise(
        "mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {$0,$1,$2,$3}, {$4,$5}, {$6}, {$7,$8,$9,$10};",
        "=r,=r,=r,=r,r,r,r,r,r,r,r", [a0, a1, b0, sums[0], sums[1], sums[2], sums[3]],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
    )


# ---- x on fixed point


@triton.jit
def scales_of(largest):
    """(2^s, 2^-s) such that |x| 2^s stays below 32,640 where the bits of |x| are at most `largest`, int32.

    The second is not a number if x is not finite.
    """
    exponent = (largest.to(tl.float32, bitcast=True) * 1.004).to(tl.int32, bitcast=True) >> 23
    exponent = tl.maximum(exponent, 15)
    up = ((268 - exponent) << 23).to(tl.float32, bitcast=True)
    down = ((exponent - 14) << 23).to(tl.float32, bitcast=True)
    return up, tl.where(exponent >= 255, float("nan"), down)


@triton.jit
def fixed(x, up):
    """x 2^s rounded to integers, int32."""
    return (x * up + SPLIT).to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def two_bytes(n):
    """Signed bytes h and l, in the low half of a word, of which 256 h + l = n."""
    return ((n + 128) & 0xFF00) | (n & 0xFF)


# ---- the tile


@triton.jit
def _lane_outputs(first, QUADS: tl.constexpr):
    """The first output of each lane's weights, and of the 4 neighbours that it adds up in the end."""
    lane = tl.arange(0, BLOCK)
    if QUADS:
        return first + lane // 4 * 16, first + lane * 4
    else:
        return first + lane // 4 * 8, first + lane // 4 * 8 + lane % 2 * 4 + lane % 4 // 2 * 64


@triton.jit
def _load_block(
    weights, at, kept, piece, last, n_out, WIDE: tl.constexpr, ALL: tl.constexpr, QUADS: tl.constexpr
):
    """weights, a tuple, and the lane's 8 x 4 words of a block; kept: bits of its inputs.

    at: of the lane's first input and output, `piece`. WIDE: whether all segments end where a tile does.
    ALL: all inputs are kept.
    """
    lane = tl.arange(0, BLOCK)
    kept = kept >> (lane % 4 * 8)
    for i in tl.static_range(8):
        if not WIDE:
            for word in tl.static_range(4):
                step = 4 * word if QUADS else 4 * (word % 2) + 64 * (word // 2)
                mask = ((kept & (1 << i)) != 0) & (piece + step < last)
                at_word = (at + i * n_out + step).to(tl.pointer_type(tl.int32))
                weights = weights + (tl.load(at_word, mask=mask, other=0, eviction_policy="evict_first"),)
        else:
            a, b, c, d = _load_words(at + i * n_out, kept & (1 << i), QUADS, ALL)
            weights = weights + (a, b, c, d)
    return weights


@triton.jit
def _add_block(low, high, weights, block: tl.constexpr, x, QUADS: tl.constexpr):
    """Adds a block's products to the sums of words 0, 1 and 2, 3; x: 4 words of 2 numbers, inputs 8 t .. 8 t + 7."""
    lane = tl.arange(0, BLOCK)
    column = lane // 4
    shift = column // 2 * 4
    choice = 0x4444 ^ ((4 ^ (1 - column % 2)) << shift)  # the byte of x in its place, zeros elsewhere
    other_choice = choice + (2 << shift)
    for pair in tl.static_range(4):
        w = weights[block * 32 + pair * 8 : block * 32 + pair * 8 + 8]
        b0, b1 = _byte_in_place(x[pair], choice), _byte_in_place(x[pair], other_choice)
        if QUADS:
            low = _multiply_add_half(low, w[0], w[1], b0)
            high = _multiply_add_half(high, w[2], w[3], b0)
            low = _multiply_add_half(low, w[4], w[5], b1)
            high = _multiply_add_half(high, w[6], w[7], b1)
        else:
            low = _multiply_add(low, w[0], w[1], w[4], w[5], b0, b1)
            high = _multiply_add(high, w[2], w[3], w[6], w[7], b0, b1)
    return low, high


@triton.jit
def _in_order(low, high):
    """The sums of the lane's outputs 16 g + 4 t .. 16 g + 4 t + 3: both bytes' put together, changed among 4 lanes."""
    lane = tl.arange(0, BLOCK)
    odd, upper = lane % 2 != 0, lane % 4 >= 2
    v0, v1 = low[0] * 256 + low[1], low[2] * 256 + low[3]
    v2, v3 = high[0] * 256 + high[1], high[2] * 256 + high[3]
    r0, r2 = _from_neighbour(tl.where(odd, v0, v1), 1), _from_neighbour(tl.where(odd, v2, v3), 1)
    v0, v1 = tl.where(odd, r0, v0), tl.where(odd, v1, r0)
    v2, v3 = tl.where(odd, r2, v2), tl.where(odd, v3, r2)
    r0, r1 = _from_neighbour(tl.where(upper, v0, v2), 2), _from_neighbour(tl.where(upper, v1, v3), 2)
    return tl.where(upper, r0, v0), tl.where(upper, r1, v1), tl.where(upper, v2, r0), tl.where(upper, v3, r1)


@triton.jit
def _of_outputs(ptr, first, last, other: tl.constexpr, QUADS: tl.constexpr):
    """What belongs to the lane's 4 outputs (in the interpreter, to all of the tile's), a tuple; None: `other`."""
    if ptr is None:
        if LANEWISE:
            return (other, other, other, other)
        else:
            return (other,)
    elif LANEWISE:
        _piece, at = _lane_outputs(first, QUADS)
        a, b, c, d = _load_4_floats(ptr + at, (at < last).to(tl.int32), other)
        return (a, b, c, d)
    else:
        at = first + tl.arange(0, TILE)
        return (tl.load(ptr + at, mask=at < last, other=other),)


@triton.jit
def _on_grid(sums, down, scales, offsets, finenesses, OFFSET: tl.constexpr, GRID: tl.constexpr, MULTIPLIER: tl.constexpr):
    """The outputs, of their sums of integers."""
    out = ()
    for i in tl.static_range(4 if LANEWISE else 1):
        x = sums[i].to(tl.float32) * down * scales[i]
        if OFFSET:
            x = tl.fma(sums[i].to(tl.float32) * down, scales[i], offsets[i])
        if MULTIPLIER != 1.0:
            x *= MULTIPLIER
        if GRID:
            x = snap(x, finenesses[i])
        out = out + (x,)
    return out


@triton.jit
def _add_outputs(out_ptr, first, last, out, QUADS: tl.constexpr):
    if LANEWISE:
        _piece, at = _lane_outputs(first, QUADS)
        _add_4_floats(out_ptr + at, (at < last).to(tl.int32), out)
    else:
        at = first + tl.arange(0, TILE)
        tl.atomic_add(out_ptr + at, out[0], mask=at < last, sem="relaxed")


@triton.jit
def _interpreted_block(weight_ptr, first, last, n_out, kept, n):
    """The block's sums of all outputs; n: fixed-point numbers [32]."""
    row, at = tl.arange(0, BLOCK), first + tl.arange(0, TILE)
    mask = ((kept >> row) & 1 != 0)[:, None] & (at < last)[None, :]
    weight = tl.load(weight_ptr + row[:, None] * n_out + at[None, :], mask=mask, other=0).to(tl.int32)
    return tl.sum(weight * n[:, None], axis=0)


# ---- one row of x


@triton.jit
def _bits_in_range(row, n_in):
    """Bits of a block's inputs, from `row` on, that there are."""
    there = tl.minimum(tl.maximum(n_in - row, 0), BLOCK)
    return tl.where(there == BLOCK, -1, (1 << there) - 1)


@triton.jit
def _one_row_kernel(
    # read and written
    x_ptr, gain_ptr, weight_ptr, threshold_ptr, out_ptr, zero_ptr, last_rstd_ptr, offset_ptr, weight_scale_ptr,
    fineness_ptr,
    # sizes; tiles_i and start_i: first tile and first output of segment i; the norm's epsilon
    n_out, n_zero, tiles_1, tiles_2, start_1, start_2, eps,
    # compiled in; ZERO: how much of zero_ptr each program fills; WIDE: see `_load_block`
    OP: tl.constexpr, PLAN: tl.constexpr, ZERO: tl.constexpr, WIDE: tl.constexpr, PDL: tl.constexpr,
):
    """`kernels.triton_gemv._gemv_kernel` for int8."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    BLOCKS: tl.constexpr = PLAN.blocks
    GROUPS: tl.constexpr = 1
    lane = tl.arange(0, BLOCK)
    tile = tl.program_id(0)
    program = tl.program_id(1) * tl.num_programs(0) + tile
    x_ptr += tl.program_id(2) * OP.n_in
    out_ptr += tl.program_id(2) * n_out
    segment, first, last = outputs_of_tile(tile, tiles_1, tiles_2, start_1, start_2, n_out, TILE)
    threshold_ptr += segment * (2 * OP.n_in if OP.shift else OP.n_in)
    row = tl.program_id(1) * BLOCKS * BLOCK
    piece, _outputs = _lane_outputs(first, PLAN.quads)
    at = weight_ptr + (row + lane % 4 * 8).to(tl.int64) * n_out + piece

    # before the wait: what no launch of this step writes: constants, dense weights, and rows that a guess names
    constants = ()
    for b in tl.static_range(BLOCKS):
        gain, threshold, shift = load_constants(row + b * BLOCK + lane, gain_ptr, threshold_ptr, OP)
        constants = constants + ((gain, threshold, shift),)
    if PLAN.prefetch > 0:
        if program < PLAN.prefetch:
            last_rstd = 1.0
            if PLAN.guess and OP.prologue == "norm":
                last_rstd = tl.load(last_rstd_ptr)
            _prefetch_tile(
                row + lane, constants[0], first, n_out,
                x_ptr, gain_ptr, threshold_ptr, last_rstd, weight_ptr, OP, PLAN,
            )
    weights = ()
    EARLY: tl.constexpr = LANEWISE and PLAN.early and not OP.cut
    ALL: tl.constexpr = not OP.cut and OP.n_in % (32 * BLOCKS * GROUPS) == 0
    if EARLY:
        for b in tl.static_range(BLOCKS):
            there = _bits_in_range(row + b * BLOCK, OP.n_in)
            weights = _load_block(weights, at + b * BLOCK * n_out, there, piece, last, n_out, WIDE, ALL, PLAN.quads)
    scales = _of_outputs(weight_scale_ptr, first, last, 0, PLAN.quads)
    finenesses = _of_outputs(fineness_ptr, first, last, 1, PLAN.quads)
    offsets = _of_outputs(offset_ptr, first, tl.where(tl.program_id(1) == 0, last, 0), 0, PLAN.quads)

    # the launch before has ended
    if PDL:
        tl.extra.cuda.gdc_wait()
    if ZERO > 0:
        z = program * ZERO + tl.arange(0, ZERO)
        tl.store(zero_ptr + z, tl.zeros((ZERO,), tl.float32), mask=z < n_zero)
    operands = ()
    for b in tl.static_range(BLOCKS):
        a, up = load_inputs(row + b * BLOCK + lane, x_ptr, OP, "")
        operands = operands + ((a, up),)
    rstd = 1.0
    if OP.prologue == "norm":
        rstd = shared_rstd(out_ptr + n_out, program, x_ptr, eps, OP.n_in)
        if PLAN.guess:
            if program == 0:
                tl.store(last_rstd_ptr, rstd)

    # x, the kept ones' weights, and the scale of x
    made, kept = (), ()
    largest = tl.zeros((BLOCK,), tl.int32)
    for b in tl.static_range(BLOCKS):
        x, keep = inputs(row + b * BLOCK + lane, operands[b], constants[b], rstd, OP)
        x = tl.where(keep, x, 0.0)
        made = made + (x,)
        bits = tl.sum(keep.to(tl.int32) << lane, axis=0)
        kept = kept + (bits,)
        if LANEWISE and not EARLY:
            weights = _load_block(weights, at + b * BLOCK * n_out, bits, piece, last, n_out, WIDE, ALL, PLAN.quads)
        largest = tl.maximum(largest, tl.abs(x).to(tl.int32, bitcast=True))
    up, down = scales_of(tl.max(largest, axis=0))

    # the sums
    if LANEWISE:
        z = tl.zeros((BLOCK,), tl.int32)
        low, high = (z, z, z, z), (z, z, z, z)
        for b in tl.static_range(BLOCKS):
            n = two_bytes(fixed(made[b], up))
            n = n | (_from_neighbour(n, 1) << 16)
            source = lane % 4 * 8
            x0, x1 = _from_lane(n, source), _from_lane(n, source + 2)
            x2, x3 = _from_lane(n, source + 4), _from_lane(n, source + 6)
            low, high = _add_block(low, high, weights, b, (x0, x1, x2, x3), PLAN.quads)
        s0, s1, s2, s3 = _in_order(low, high)
        sums = (s0, s1, s2, s3)
    else:
        total = tl.zeros((TILE,), tl.int32)
        for b in tl.static_range(BLOCKS):
            w_ptr = weight_ptr + (row + b * BLOCK) * n_out
            total += _interpreted_block(w_ptr, first, last, n_out, kept[b], fixed(made[b], up))
        sums = (total,)
    out = _on_grid(
        sums, down, scales, offsets, finenesses, offset_ptr is not None, fineness_ptr is not None, OP.multiplier
    )
    _add_outputs(out_ptr, first, last, out, PLAN.quads)


# ---- several rows


@triton.jit
def _fixed_kernel(
    x_ptr, gain_ptr, threshold_ptr, zero_ptr, made_ptr, down_ptr, kept_ptr, x_stride, n_zero, eps,
    OP: tl.constexpr, GROUP: tl.constexpr, ROOM: tl.constexpr, PART: tl.constexpr, ZERO: tl.constexpr,
    PDL: tl.constexpr,
):
    """PART inputs of one row of x and one segment on fixed point, their scales, and which are kept, one bit each.

    made [segments, rows, ROOM] int16, as `two_bytes`; down [segments, rows, ROOM / GROUP] float32; kept [segments,
    rows, ROOM / 32] int32.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    copy = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    program = copy * tl.num_programs(0) + tl.program_id(0)
    i = tl.program_id(0) * PART + tl.arange(0, PART)
    if OP.cut:
        threshold_ptr += tl.program_id(2) * (2 * OP.n_in if OP.shift else OP.n_in)
    constants = load_constants(i, gain_ptr, threshold_ptr, OP)
    if PDL:
        tl.extra.cuda.gdc_wait()
    if ZERO > 0:
        z = program * ZERO + tl.arange(0, ZERO)
        tl.store(zero_ptr + z, tl.zeros((ZERO,), tl.float32), mask=z < n_zero)

    x_ptr += tl.program_id(1) * x_stride
    rstd = 1.0
    if OP.prologue == "norm":
        rstd = rstd_of(x_ptr, eps, OP.n_in)
    x, keep = inputs(i, load_inputs(i, x_ptr, OP, ""), constants, rstd, OP)
    x = tl.reshape(tl.where(keep, x, 0.0), (PART // GROUP, GROUP))
    up, down = scales_of(tl.max(tl.abs(x).to(tl.int32, bitcast=True), axis=1))
    n = tl.reshape(two_bytes(fixed(x, up[:, None])), (PART,))
    tl.store(made_ptr + copy * ROOM + i, n.to(tl.int16), mask=i < ROOM)
    group = tl.program_id(0) * (PART // GROUP) + tl.arange(0, PART // GROUP)
    tl.store(down_ptr + copy * (ROOM // GROUP) + group, down, mask=group < ROOM // GROUP)
    if OP.cut:
        bits = tl.sum(tl.reshape(keep.to(tl.int32) << (i % BLOCK), (PART // BLOCK, BLOCK)), axis=1)
        block = tl.program_id(0) * (PART // BLOCK) + tl.arange(0, PART // BLOCK)
        tl.store(kept_ptr + copy * (ROOM // BLOCK) + block, bits, mask=block < ROOM // BLOCK)


@triton.jit
def _kept_by_any(kept_ptr, block, row, N_IN: tl.constexpr, ROWS: tl.constexpr, CUT: tl.constexpr, STRIDE: tl.constexpr):
    """Bits of a block's inputs, from `row` on, that any row of x keeps."""
    if CUT:
        kept = 0
        for r in tl.static_range(ROWS):
            kept = kept | tl.load(kept_ptr + r * STRIDE + block)
    else:
        kept = _bits_in_range(row, N_IN)
    return kept


@triton.jit
def _rows_kernel(
    made_ptr, down_ptr, kept_ptr, weight_ptr, out_ptr, offset_ptr, weight_scale_ptr, fineness_ptr,
    n_out, out_stride, tiles_1, tiles_2, start_1, start_2,
    OP: tl.constexpr, PLAN: tl.constexpr, ROWS: tl.constexpr, ROOM: tl.constexpr, WIDE: tl.constexpr,
    PDL: tl.constexpr,
):
    """out += m (W^T x + offset) for ROWS rows of x that `_fixed_kernel` has made: PLAN.groups of them, one tile."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    BLOCKS: tl.constexpr = PLAN.blocks
    GROUPS: tl.constexpr = PLAN.groups
    lane = tl.arange(0, BLOCK)
    segment, first, last = outputs_of_tile(tl.program_id(0), tiles_1, tiles_2, start_1, start_2, n_out, TILE)
    group = tl.program_id(1) * GROUPS
    piece, _outputs = _lane_outputs(first, PLAN.quads)
    if OP.cut:
        made_ptr += segment * ROWS * ROOM
        down_ptr += segment * ROWS * (ROOM // (BLOCKS * BLOCK))
        kept_ptr += segment * ROWS * (ROOM // BLOCK)

    # before the wait: dense weights
    EARLY: tl.constexpr = LANEWISE and PLAN.early and not OP.cut
    ALL: tl.constexpr = not OP.cut and OP.n_in % (32 * BLOCKS * GROUPS) == 0
    weights = ()
    if PLAN.prefetch > 0:
        if tl.program_id(1) * tl.num_programs(0) + tl.program_id(0) < PLAN.prefetch:
            rows = group * (BLOCKS * BLOCK) + lane
            prefetch(weight_ptr + rows.to(tl.int64) * n_out + first, rows < OP.n_in, TILE)
    if EARLY:
        for b in tl.static_range(BLOCKS):
            row = (group * BLOCKS + b) * BLOCK
            at = weight_ptr + (row + lane % 4 * 8).to(tl.int64) * n_out + piece
            weights = _load_block(weights, at, _bits_in_range(row, OP.n_in), piece, last, n_out, WIDE, ALL, PLAN.quads)
    scales = _of_outputs(weight_scale_ptr, first, last, 0, PLAN.quads)
    finenesses = _of_outputs(fineness_ptr, first, last, 1, PLAN.quads)
    offsets = _of_outputs(offset_ptr, first, tl.where(group == 0, last, 0), 0, PLAN.quads)
    if PDL:
        tl.extra.cuda.gdc_wait()

    totals = ()
    for g in tl.static_range(GROUPS):
        # this group's weights
        kept = ()
        if not EARLY or g > 0:
            weights = ()
            for b in tl.static_range(BLOCKS):
                block = (group + g) * BLOCKS + b
                bits = 0
                if (group + g) * (BLOCKS * BLOCK) < OP.n_in:
                    bits = _kept_by_any(kept_ptr, block, block * BLOCK, OP.n_in, ROWS, OP.cut, ROOM // BLOCK)
                kept = kept + (bits,)
                if LANEWISE:
                    at = weight_ptr + (block * BLOCK + lane % 4 * 8).to(tl.int64) * n_out + piece
                    weights = _load_block(weights, at, bits, piece, last, n_out, WIDE, ALL, PLAN.quads)

        # each row's sums, on the grid
        new_totals = ()
        there = tl.minimum(group + g, (ROOM // (BLOCKS * BLOCK)) - 1)
        for r in tl.static_range(ROWS):
            down = tl.load(down_ptr + r * (ROOM // (BLOCKS * BLOCK)) + there)
            if LANEWISE:
                z = tl.zeros((BLOCK,), tl.int32)
                low, high = (z, z, z, z), (z, z, z, z)
                for b in tl.static_range(BLOCKS):
                    at = made_ptr + r * ROOM + (there * BLOCKS + b) * BLOCK + lane % 4 * 8
                    x0, x1, x2, x3 = _load_made(at)
                    low, high = _add_block(low, high, weights, b, (x0, x1, x2, x3), PLAN.quads)
                s0, s1, s2, s3 = _in_order(low, high)
                sums = (s0, s1, s2, s3)
            else:
                total = tl.zeros((TILE,), tl.int32)
                for b in tl.static_range(BLOCKS):
                    n = tl.load(made_ptr + r * ROOM + (there * BLOCKS + b) * BLOCK + lane).to(tl.int32)
                    low_byte = ((n & 0xFF) ^ 128) - 128
                    n = (n >> 8) * 256 + low_byte
                    w_ptr = weight_ptr + ((group + g) * BLOCKS + b) * BLOCK * n_out
                    total += _interpreted_block(w_ptr, first, last, n_out, kept[b], n)
                sums = (total,)
            out = _on_grid(
                sums, down, scales, offsets, finenesses, offset_ptr is not None, fineness_ptr is not None,
                OP.multiplier,
            )
            if g > 0:
                more = ()
                for i in tl.static_range(4 if LANEWISE else 1):
                    more = more + (totals[r][i] + tl.where(group + g == there, out[i], 0.0),)
                out = more
            new_totals = new_totals + (out,)
        totals = new_totals
        if offset_ptr is not None:
            offsets = _of_outputs(offset_ptr, first, 0, 0, PLAN.quads)
    for r in tl.static_range(ROWS):
        _add_outputs(out_ptr + r * out_stride, first, last, totals[r], PLAN.quads)


@triton.jit
def _load_made(at):
    """8 neighbouring numbers of x at each lane's address, in 4 words."""
    return tl.inline_asm_elementwise(
        "ld.global.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,l", [at.to(tl.int64)],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=1,
    )


# ---- launching it


BLOCKS = None  # in place of `integer_plan`'s
CHANGES: dict = {}
PROGRAMS = 2112


def integer_plan(prologue: str, n_in: int, segments: list[int], sparsity: float, rows: int, dependent: bool) -> IntegerPlan:
    """How to launch an int8 product; `blocks` is the same for every number of rows."""
    tiles, n_blocks = sum(triton.cdiv(width, TILE.value) for width in segments), triton.cdiv(n_in, BLOCK.value)
    blocks = BLOCKS
    if blocks is None:
        blocks = next((b for b in (4, 2) if tiles * (n_blocks // b) >= PROGRAMS), 1)
    plan = IntegerPlan(blocks)
    divides = all(width % TILE.value == 0 for width in segments) and n_in % (BLOCK.value * blocks) == 0
    if dependent and divides and sparsity and rows == 1:
        plan = plan._replace(prefetch=1056, prefetch_blocks=blocks, guess=True)
    return plan._replace(**CHANGES.get("one" if rows == 1 else "few", {}))


def _checked(product: Product, out: Tensor) -> bool:
    """Whether all segments end where a tile does."""
    product.check()
    assert out.data_ptr() % 16 == 0 and out.stride(0) % 4 == 0 and product.weight.data_ptr() % 16 == 0
    return all(width % TILE.value == 0 for width in product.segments)


def launch_one_row(
    prologue: str, x: Tensor, product: Product, out: Tensor, *,
    norm: Norm | None = None, zero: Tensor | None = None, dtype: torch.dtype | None = None, pdl: bool = False,
) -> None:
    """`kernels.triton_gemv.launch_gemv` of an int8 weight."""
    wide, n_in = _checked(product, out), len(product.weight)
    gain, eps, last_rstd = norm or (None, 0.0, None)
    plan = integer_plan(prologue, n_in, product.segments, product.sparsity, 1, pdl)
    if plan.guess and prologue == "norm" and last_rstd is None:
        plan = plan._replace(guess=False, prefetch=0)
    starts = starts_of(product.segments)
    tiles = starts_of([triton.cdiv(width, TILE.value) for width in product.segments])
    grid = (tiles[-1], triton.cdiv(n_in, BLOCK.value * plan.blocks), x.shape[0] if prologue == "given" else 1)
    n_zero = 0 if zero is None else zero.numel()
    zero_block = triton.next_power_of_2(triton.cdiv(n_zero, grid[0] * grid[1])) if n_zero else 0
    operation = product.operation(prologue, dtype or product.weight.dtype)._replace(pack=1)
    _one_row_kernel[grid](
        x, gain, product.weight, product.threshold, out, zero, last_rstd, product.offset, product.weight_scale,
        product.fineness,
        starts[-1], n_zero, *tiles[1:MAX_SEGMENTS], *starts[1:MAX_SEGMENTS], eps,
        OP=operation, PLAN=plan, ZERO=zero_block, WIDE=wide, PDL=pdl,
        num_warps=1, launch_pdl=pdl, maxnreg=plan.registers,
    )


class Fixed(NamedTuple):
    """Room for what `_fixed_kernel` makes."""

    made: Tensor
    down: Tensor
    kept: Tensor

    @classmethod
    def empty(cls, n: int, device) -> "Fixed":
        """n: inputs of all segments and rows, each in whole PARTs."""
        def buffer(n, dtype):
            return torch.zeros(n, device=device, dtype=dtype)
        return cls(buffer(n, torch.int16), buffer(n // 32, torch.float32), buffer(n // 32, torch.int32))


def launch_few_rows(
    prologue: str, x: Tensor, product: Product, out: Tensor, *,
    prepared: Fixed, norm: Norm | None = None, zero: Tensor | None = None, dtype: torch.dtype, pdl: bool = False,
) -> None:
    """`kernels.few_rows.launch_rows` of an int8 weight: the sums that `launch_one_row` gives each row, to the bit."""
    wide, (n_in, rows) = _checked(product, out), (len(product.weight), len(x))
    gain, eps, _ = norm or (None, 0.0, None)
    plan = integer_plan(prologue, n_in, product.segments, product.sparsity, rows, pdl)
    group = BLOCK.value * plan.blocks
    room = triton.cdiv(n_in, group) * group
    operation = product.operation(prologue, dtype)._replace(pack=1)
    grid = (triton.cdiv(room, PART), rows, len(product.threshold) if operation.cut else 1)
    n_zero = 0 if zero is None else zero.numel()
    zero_block = triton.next_power_of_2(triton.cdiv(n_zero, grid[0] * grid[1] * grid[2])) if n_zero else 0
    _fixed_kernel[grid](
        x, gain, product.threshold, zero, *prepared, x.stride(0), n_zero, eps,
        OP=operation, GROUP=group, ROOM=room, PART=PART, ZERO=zero_block, PDL=pdl, num_warps=1, launch_pdl=pdl,
    )
    starts = starts_of(product.segments)
    tiles = starts_of([triton.cdiv(width, TILE.value) for width in product.segments])
    _rows_kernel[(tiles[-1], triton.cdiv(room, group * plan.groups))](
        *prepared, product.weight, out, product.offset, product.weight_scale, product.fineness,
        starts[-1], out.stride(0), *tiles[1:MAX_SEGMENTS], *starts[1:MAX_SEGMENTS],
        OP=operation, PLAN=plan, ROWS=rows, ROOM=room, WIDE=wide, PDL=pdl,
        num_warps=1, launch_pdl=pdl, maxnreg=plan.registers,
    )
