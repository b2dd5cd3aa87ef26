"""int8 products on a GPU: x on 16-bit fixed point, and exact sums of integers on the tensor cores. 1 to 8 rows of x.

A program is one warp. It takes PLAN.blocks of 32 inputs and a tile of 128 outputs. Each row's inputs of one program
share a power of two as their scale. No sum of integers rounds, so no order matters, and every number of rows has the
same sums. Fixed point moves an input by at most 2^-15 of the largest one of the program; bfloat16 itself moves each by
up to 2^-9 of it. An input that is kept and not finite makes the outputs of its programs not a number.

No weight is moved or widened for that: see "a tile" below. These kernels are written lane by lane: a tensor of 32
numbers is one register of the warp.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.few_rows import Prepared, kept_by_any, launch_prepare
from kernels.plan import INT8_OUT
from kernels.triton_gemv import (
    BLOCK,
    MAX_SEGMENTS,
    Norm,
    Product,
    fixed,
    inputs,
    load_constants,
    load_inputs,
    outputs_of_tile,
    prefetch_tile,
    scales_of,
    shared_rstd,
    snap,
    starts_of,
)

TILE = tl.constexpr(INT8_OUT)  # outputs of a program
CACHED = tl.constexpr("@p ld.global.v4.b32 {$0, $1, $2, $3}, [$4];")
ONCE = tl.constexpr("@p ld.global.L1::no_allocate.v4.b32 {$0, $1, $2, $3}, [$4];")
ONCE_IN_HALVES = tl.constexpr(
    "@p ld.global.L1::no_allocate.v2.b32 {$0, $1}, [$4]; @p ld.global.L1::no_allocate.v2.b32 {$2, $3}, [$4 + 64];"
)


class Lanes(NamedTuple):
    """How a tile lies in the lanes of its warp."""

    halves: bool  # a lane's outputs are 8 g .. 8 g + 7 and those 64 on, not 16 g .. 16 g + 15
    full: bool  # segments end where a tile does
    by_word: bool  # segments are no multiples of 16 bytes: words are loaded alone
    add_four: bool  # the GPU adds 4 neighbours at once


# ---- assembly, of one register per lane


@triton.jit
def _load_four(HOW: tl.constexpr, at, wanted):
    """Four words at each lane's address, int32, where wanted is not 0; else anything."""
    return tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $5, 0; " + HOW + " }", "=&r,=&r,=&r,=&r,l,r", [at.to(tl.int64), wanted],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=1,
    )


@triton.jit
def _add_four(at, wanted, v):
    """Adds four float32 to those at each lane's address, where wanted is not 0."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; mov.u32 $0, 0; "
        "@p red.relaxed.gpu.global.add.v4.f32 [$1], {$3, $4, $5, $6}; }",
        "=r,l,r,f,f,f,f", [at.to(tl.int64), wanted, v[0], v[1], v[2], v[3]], dtype=tl.int32, is_pure=False, pack=1,
    )


@triton.jit
def _from_lane(x, lane):
    return tl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, $2, 0x1f, 0xffffffff;", "=r,r,r", [x, lane], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _pick_bytes(word, choice):
    """Of each lane's word the bytes that the digits of `choice`, 16 bits, name; 4 is a zero."""
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, 0, $2;", "=r,r,r", [word, choice], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _multiply_add(sums, a0, a1, b0):
    """sums + A B of half the depth: 16 x 16 bytes times 16 x 8, to 16 x 8 int32."""
    return tl.inline_asm_elementwise(
        "mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {$0,$1,$2,$3}, {$4,$5}, {$6}, {$7,$8,$9,$10};",
        "=r,=r,=r,=r,r,r,r,r,r,r,r", [a0, a1, b0, sums[0], sums[1], sums[2], sums[3]],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
    )


@triton.jit
def _multiply_add_two(sums, a0, a1, a2, a3, b0, b1):
    """`_multiply_add` of two inputs: (a0, a1) times b0 and (a2, a3) times b1."""
    return tl.inline_asm_elementwise(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};",
        "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r", [a0, a1, a2, a3, b0, b1, sums[0], sums[1], sums[2], sums[3]],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
    )


# ---- a tile
#
# The tensor core multiplies A [16 x 32 bytes] with B [32 x 8 bytes]. A lane 4 g + t holds of A rows g and g + 8, of
# each columns 4 t .. 4 t + 3 as one word, and gets columns 2 t and 2 t + 1 of these rows of A B. It takes a word's 4
# bytes for 4 inputs of one output, but a word of W [in, out] is 4 outputs of one input. Still no weight is moved.
# Instead B holds each byte of x four times, each time alone in the place of one of the 4 outputs:
#
#     lane 4 g + t loads outputs 16 g .. 16 g + 15 of inputs 8 t .. 8 t + 7, 4 words c of each: word c is A's
#
#                     columns of B:   0    1    2    3    4    5    6    7      h, l: high and low byte of x,
#     the word's 4  { output 4 c      h    l                                    x = 256 h + l in fixed point;
#     places, of    { output 4 c + 1            h    l                          all else is 0
#     one input     { output 4 c + 2                      h    l
#                   { output 4 c + 3                                h    l
#
#     so lane 4 g + t gets, for each c, the sums of h and of l times the weights of output 16 g + 4 c + t


@triton.jit
def _outputs_of_lane(first, LANES: tl.constexpr):
    """The first output of each lane's weights, and the first of the 4 neighbours that it adds in the end."""
    lane = tl.arange(0, BLOCK)
    if LANES.halves:
        return first + lane // 4 * 8, first + lane // 4 * 8 + lane % 2 * 4 + lane % 4 // 2 * 64
    else:
        return first + lane // 4 * 16, first + lane * 4


@triton.jit
def _load_block(weights, at, kept, piece, last, n_out, ALL: tl.constexpr, LANES: tl.constexpr):
    """The tuple `weights`, and each lane's 8 x 4 words of a block; kept: bits of its inputs, or ALL of them are.

    at: of the lane's first input and output, `piece`. Made from one address per program: were it computed here, the
    compiler would put the loads off until their products.
    """
    lane = tl.arange(0, BLOCK)
    kept = kept >> (lane % 4 * 8)
    if not LANES.full:
        kept = tl.where(piece < last, kept, 0)
    for i in tl.static_range(8):
        wanted = tl.full((BLOCK,), 1, tl.int32) if ALL else kept & (1 << i)
        if LANES.by_word:
            for c in tl.static_range(4):
                mask = (wanted != 0) & (piece + 4 * c < last)
                at_word = (at + i * n_out + 4 * c).to(tl.pointer_type(tl.int32))
                weights = weights + (tl.load(at_word, mask=mask, other=0),)  # noqa: RUF005 (Triton knows no stars)
        else:
            weights = weights + _load_four(ONCE_IN_HALVES if LANES.halves else ONCE, at + i * n_out, wanted)
    return weights


@triton.jit
def _add_block(low, high, weights, block: tl.constexpr, x, LANES: tl.constexpr):
    """Adds a block's products to the sums of words 0, 1 and 2, 3; x: 4 words of 2 numbers, inputs 8 t .. 8 t + 7."""
    column = tl.arange(0, BLOCK) // 4
    place = column // 2 * 4
    choice = 0x4444 ^ ((4 ^ (1 - column % 2)) << place)  # byte 1 or 0 in its place
    for pair in tl.static_range(4):
        w = weights[block * 32 + pair * 8 : block * 32 + pair * 8 + 8]
        b0, b1 = _pick_bytes(x[pair], choice), _pick_bytes(x[pair], choice + (2 << place))
        if LANES.halves:
            low = _multiply_add_two(low, w[0], w[1], w[4], w[5], b0, b1)
            high = _multiply_add_two(high, w[2], w[3], w[6], w[7], b0, b1)
        else:  # 16 bytes come to registers of which the deeper product would have to copy some
            low = _multiply_add(low, w[0], w[1], b0)
            high = _multiply_add(high, w[2], w[3], b0)
            low = _multiply_add(low, w[4], w[5], b1)
            high = _multiply_add(high, w[6], w[7], b1)
    return low, high


@triton.jit
def _in_order(low, high):
    """The sums of both bytes joined, and transposed among each 4 lanes, of which each then has 4 neighbours."""
    lane = tl.arange(0, BLOCK)
    odd, upper = lane % 2 != 0, lane % 4 >= 2
    v0, v1 = low[0] * 256 + low[1], low[2] * 256 + low[3]
    v2, v3 = high[0] * 256 + high[1], high[2] * 256 + high[3]
    r0, r2 = _from_lane(tl.where(odd, v0, v1), lane ^ 1), _from_lane(tl.where(odd, v2, v3), lane ^ 1)
    v0, v1 = tl.where(odd, r0, v0), tl.where(odd, v1, r0)
    v2, v3 = tl.where(odd, r2, v2), tl.where(odd, v3, r2)
    r0, r1 = _from_lane(tl.where(upper, v0, v2), lane ^ 2), _from_lane(tl.where(upper, v1, v3), lane ^ 2)
    return tl.where(upper, r0, v0), tl.where(upper, r1, v1), tl.where(upper, v2, r0), tl.where(upper, v3, r1)


@triton.jit
def _load_factors(ptr, at, last):
    """What belongs to each lane's 4 outputs, bits of float32; zeros where ptr is None."""
    if ptr is None:
        z = tl.zeros((BLOCK,), tl.int32)
        return z, z, z, z
    else:
        return _load_four(CACHED, ptr + at, (at < last).to(tl.int32))


@triton.jit
def _add_scaled(
    sums, finenesses, out_ptr, at, last, OP: tl.constexpr, ADD_FOUR: tl.constexpr, GRID: tl.constexpr,
):
    """Adds 4 float32 sums, times the multiplier and put on the grid, to the 4 outputs from `at` on."""
    out = ()
    for i in tl.static_range(4):
        x = sums[i]
        if OP.multiplier != 1.0:
            x *= OP.multiplier
        if GRID:
            x = snap(x, finenesses[i].to(tl.float32, bitcast=True))
        out = out + (x,)  # noqa: RUF005
    if ADD_FOUR:
        _add_four(out_ptr + at, (at < last).to(tl.int32), out)
    else:
        for i in tl.static_range(4):
            tl.atomic_add(out_ptr + at + i, out[i], mask=at < last, sem="relaxed")


@triton.jit
def _add_sums(
    low, high, down, scales, offsets, finenesses, out_ptr, at, last,
    OP: tl.constexpr, LANES: tl.constexpr, OFFSET: tl.constexpr, GRID: tl.constexpr,
):
    """Adds the sums, scaled and put on the grid, to the 4 outputs from `at` on. The first programs add the offsets."""
    sums, out = _in_order(low, high), ()
    for i in tl.static_range(4):
        x = sums[i].to(tl.float32) * down
        scale = scales[i].to(tl.float32, bitcast=True)
        if OFFSET:
            x = tl.fma(x, scale, tl.where(tl.program_id(1) == 0, offsets[i].to(tl.float32, bitcast=True), 0.0))
        else:
            x *= scale
        out = out + (x,)  # noqa: RUF005
    _add_scaled(out, finenesses, out_ptr, at, last, OP, LANES.add_four, GRID)


# ---- the product


@triton.jit
def _int8_kernel(
    # what makes one row of x; several, made by `kernels.few_rows.launch_prepare`
    x_ptr, gain_ptr, threshold_ptr, made_ptr, kept_ptr, down_ptr,
    # read and written
    weight_ptr, out_ptr, zero_ptr, last_rstd_ptr, offset_ptr, weight_scale_ptr, fineness_ptr,
    # sizes; tiles_i and start_i: first tile and first output of segment i; the norm's epsilon
    n_out, out_stride, n_zero, tiles_1, tiles_2, start_1, start_2, eps,
    # compiled in; ROWS: of those made, or 0; ZERO: how much of zero_ptr each program fills
    OP: tl.constexpr, PLAN: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, ZERO: tl.constexpr,
    PDL: tl.constexpr,
):
    """out += m (W^T cut(x - shift) + offset), as `kernels.triton_gemv` has it of other forms."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    BLOCKS: tl.constexpr = PLAN.blocks
    ALL: tl.constexpr = not OP.cut and LANES.full and OP.n_in % (32 * BLOCKS) == 0
    GROUPS: tl.constexpr = (OP.n_in + BLOCKS * BLOCK - 1) // (BLOCKS * BLOCK)
    lane = tl.arange(0, BLOCK)
    group = tl.program_id(1)
    program = group * tl.num_programs(0) + tl.program_id(0)
    segment, first, last = outputs_of_tile(tl.program_id(0), tiles_1, tiles_2, start_1, start_2, n_out, TILE)
    piece, at = _outputs_of_lane(first, LANES)
    rows = group * (BLOCKS * BLOCK) + lane
    weights_at = weight_ptr + (group * (BLOCKS * BLOCK) + lane % 4 * 8).to(tl.int64) * n_out + piece

    # before the wait: what no launch of this step writes, and rows that a guess from x as it is now names
    weights, constants = (), ()
    if ROWS == 0:
        x_ptr += tl.program_id(2) * OP.n_in
        out_ptr += tl.program_id(2) * n_out
        threshold_ptr += segment * (2 * OP.n_in if OP.shift else OP.n_in)
        for b in tl.static_range(BLOCKS):
            gain, threshold, shift = load_constants(rows + b * BLOCK, gain_ptr, threshold_ptr, OP)
            constants = constants + ((gain, threshold, shift),)  # noqa: RUF005
        if PLAN.prefetch > 0:
            if program < PLAN.prefetch:
                last_rstd = 1.0
                if OP.prologue == "norm":
                    last_rstd = tl.load(last_rstd_ptr)
                prefetch_tile(
                    rows, constants[0], first, n_out, x_ptr, gain_ptr, threshold_ptr, last_rstd, weight_ptr, OP, PLAN
                )
    if not OP.cut:
        for b in tl.static_range(BLOCKS):
            there = kept_by_any(None, group * BLOCKS + b, 1, 1, OP)
            weights = _load_block(weights, weights_at + b * BLOCK * n_out, there, piece, last, n_out, ALL, LANES)
    scales = _load_factors(weight_scale_ptr, at, last)
    finenesses = _load_factors(fineness_ptr, at, last)
    offsets = _load_factors(offset_ptr, at, tl.where(group == 0, last, 0))

    # the launch before has ended
    if PDL:
        tl.extra.cuda.gdc_wait()
    if ZERO > 0:
        z = program * ZERO + tl.arange(0, ZERO)
        tl.store(zero_ptr + z, tl.zeros((ZERO,), tl.float32), mask=z < n_zero)

    # one row: x and its scale, and the weights that it keeps
    made, down = (), 1.0
    if ROWS == 0:
        operands, largest, rstd = (), tl.zeros((BLOCK,), tl.int32), 1.0
        for b in tl.static_range(BLOCKS):
            a, up = load_inputs(rows + b * BLOCK, x_ptr, OP, "")
            operands = operands + ((a, up),)  # noqa: RUF005
        if OP.prologue == "norm":
            rstd = shared_rstd(out_ptr + n_out, program, x_ptr, eps, OP.n_in)
            if PLAN.guess:
                if program == 0:
                    tl.store(last_rstd_ptr, rstd)
        for b in tl.static_range(BLOCKS):
            x, keep = inputs(rows + b * BLOCK, operands[b], constants[b], rstd, OP)
            x = tl.where(keep, x, 0.0)
            made = made + (x,)  # noqa: RUF005
            if OP.cut:
                kept = tl.sum(keep.to(tl.int32) << lane, axis=0)
                weights = _load_block(weights, weights_at + b * BLOCK * n_out, kept, piece, last, n_out, ALL, LANES)
            largest = tl.maximum(largest, tl.abs(x).to(tl.int32, bitcast=True))
        scale, down = scales_of(tl.max(largest, axis=0))

    # several: the weights that any of them keeps; where inputs are cut, each segment has its own
    elif OP.cut:
        made_ptr += segment * (ROWS * GROUPS * BLOCKS * BLOCK)
        down_ptr += segment * (ROWS * GROUPS)
        kept_ptr += segment * (ROWS * ((OP.n_in + BLOCK - 1) // BLOCK))
        for b in tl.static_range(BLOCKS):
            kept = kept_by_any(kept_ptr, group * BLOCKS + b, ROWS, ROWS, OP)
            weights = _load_block(weights, weights_at + b * BLOCK * n_out, kept, piece, last, n_out, ALL, LANES)

    # each row's sums; every lane takes 8 numbers of x, two a word
    z, t = tl.zeros((BLOCK,), tl.int32), lane % 4 * 8
    for r in tl.static_range(max(ROWS, 1)):
        low, high = (z, z, z, z), (z, z, z, z)
        for b in tl.static_range(BLOCKS):
            if ROWS == 0:
                n = fixed(made[b], scale)
                n = n | (_from_lane(n, lane ^ 1) << 16)
                x = _from_lane(n, t), _from_lane(n, t + 2), _from_lane(n, t + 4), _from_lane(n, t + 6)
            else:
                x_at = made_ptr + ((r * GROUPS + group) * BLOCKS + b) * BLOCK + t
                x = _load_four(CACHED, x_at, tl.full((BLOCK,), 1, tl.int32))
            low, high = _add_block(low, high, weights, b, x, LANES)
        if ROWS > 0:
            down = tl.load(down_ptr + r * GROUPS + group)
        _add_sums(
            low, high, down, scales, offsets, finenesses, out_ptr + r * out_stride, at, last,
            OP, LANES, offset_ptr is not None, fineness_ptr is not None,
        )


# ---- launching it


def launch_int8(
    prologue: str, x: Tensor, product: Product, out: Tensor, *,
    prepared: Prepared | None = None, norm: Norm | None = None, zero: Tensor | None = None, dtype: torch.dtype,
    pdl: bool = False,
) -> None:
    """`kernels.triton_gemv.launch_gemv` of an int8 weight, and `kernels.few_rows.launch_rows`, with `prepared`."""
    product.check()
    weight, segments, n_in, rows = product.weight, product.segments, len(product.weight), len(x)
    read = product.offset, product.weight_scale, product.fineness
    assert all(t is None or t.data_ptr() % 16 == 0 for t in (weight, out, *read))
    assert len(out) == 1 or out.stride(0) % 4 == 0
    gain, eps, last_rstd = norm or (None, 0.0, None)
    plan = product.plan(prologue, pdl, last_rstd is not None)
    operation, full = product.operation(prologue, dtype), not any(width % TILE.value for width in segments)
    hopper = pdl or (x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0))
    lanes = Lanes(plan.blocks == 4 and full, full, any(width % 16 for width in segments), hopper)

    group, starts = BLOCK.value * plan.blocks, starts_of(segments)
    groups, tiles = triton.cdiv(n_in, group), starts_of([triton.cdiv(width, TILE.value) for width in segments])
    grid, n_zero, zero_block = [tiles[-1], groups, rows if prologue == "given" else 1], 0, 0
    if prepared:
        prepared, grid[2] = prepared._replace(made=prepared.made.view(torch.int16)), 1
        launch_prepare(x, operation, product.threshold, prepared, share=1, group=group, norm=norm, zero=zero, pdl=pdl)
    elif zero is not None:
        n_zero, zero_block = zero.numel(), triton.next_power_of_2(triton.cdiv(zero.numel(), tiles[-1] * groups))
    _int8_kernel[tuple(grid)](
        x, gain, product.threshold, *(prepared or (None, None, None)), weight, out, zero, last_rstd, *read,
        starts[-1], out.stride(0), n_zero, *tiles[1:MAX_SEGMENTS], *starts[1:MAX_SEGMENTS], eps,
        OP=operation, PLAN=plan, LANES=lanes, ROWS=rows if prepared else 0, ZERO=zero_block, PDL=pdl,
        num_warps=1, launch_pdl=pdl,
    )
