"""int4 products on a GPU: x times its group's scale on 16-bit fixed point, exact sums of integers on tensor cores."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.few_rows import Prepared, kept_by_any, launch_prepare
from kernels.int8_mma import CACHED, _from_lane, _load_four, _pick_bytes
from kernels.triton_gemv import (
    BLOCK,
    MAX_SEGMENTS,
    Norm,
    Product,
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

CACHED_OR_ZERO = tl.constexpr(
    "mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; @p ld.global.v4.b32 {$0, $1, $2, $3}, [$4];"
)


class Lanes(NamedTuple):
    """How a tile lies in the lanes of its warp."""

    chunk: int  # outputs of a chunk, 8 per word
    chunks: int
    at_once: bool  # a word of each of 4 chunks is loaded at once
    full: bool  # segments end where a tile does
    pairs_at_once: bool  # the 4 chunks' scales lie side by side, aligned
    add_two: bool


@triton.constexpr_function
def _a_word_of_each(chunk, chunks):
    return " ".join(f"@p ld.global.L1::no_allocate.b32 ${c}, [${chunks} + {c * chunk // 2}];" for c in range(chunks))


@triton.jit
def _load_two_words(HOW: tl.constexpr, at, wanted):
    return tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $3, 0; " + HOW + " }", "=&r,=&r,l,r", [at.to(tl.int64), wanted],
        dtype=(tl.int32, tl.int32), is_pure=False, pack=1,
    )


@triton.jit
def _load_two(at, wanted):
    return tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $3, 0; mov.b32 $0, 0; mov.b32 $1, 0; @p ld.global.v2.b32 {$0, $1}, [$2]; }",
        "=&r,=&r,l,r", [at.to(tl.int64), wanted], dtype=(tl.int32, tl.int32), is_pure=False, pack=1,
    )


@triton.jit
def _add_two(at, wanted, v0, v1):
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; mov.u32 $0, 0; @p red.relaxed.gpu.global.add.v2.f32 [$1], {$3, $4}; }",
        "=r,l,r,f,f", [at.to(tl.int64), wanted, v0, v1], dtype=tl.int32, is_pure=False, pack=1,
    )


@triton.jit
def _multiply_add(sums, a0, a1, a2, a3, b0, b1):
    """sums + A B: 16 x 32 unsigned bytes times 32 x 8 signed ones, to 16 x 8 int32."""
    return tl.inline_asm_elementwise(
        "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};",
        "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r", [a0, a1, a2, a3, b0, b1, sums[0], sums[1], sums[2], sums[3]],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
    )


@triton.jit
def _halves(low, high):
    """The lower 16 bits of both."""
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, 0x5410;", "=r,r,r", [low, high], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _load_words(weights, at, kept, n_bytes, first, last, ALL: tl.constexpr, LANES: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    kept = kept >> (lane % 4 * 8)
    HOW: tl.constexpr = _a_word_of_each(LANES.chunk, LANES.chunks)
    if LANES.chunk < 64:
        kept = tl.where(lane // 4 * 8 < LANES.chunk, kept, 0)
    for i in tl.static_range(8):
        wanted = tl.full((BLOCK,), 1, tl.int32) if ALL else kept & (1 << i)
        if not LANES.at_once:
            for c in tl.static_range(LANES.chunks):
                mask = tl.where(first + c * LANES.chunk < last, wanted, 0) != 0
                at_word = (at + i * n_bytes + c * (LANES.chunk // 2)).to(tl.pointer_type(tl.int32))
                weights = weights + (tl.load(at_word, mask=mask, other=0),)
        elif LANES.chunks == 2:
            weights = weights + _load_two_words(HOW, at + i * n_bytes, wanted)
        else:
            weights = weights + _load_four(HOW, at + i * n_bytes, wanted)
    return weights


@triton.jit
def _load_pairs(pairs, scale_ptr, rows, kept, n_groups, first, last, OP: tl.constexpr, LANES: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    wanted = (kept >> lane) & 1
    at = scale_ptr + rows.to(tl.int64) * n_groups
    if LANES.pairs_at_once and LANES.chunks == 2:
        pairs = pairs + _load_two(at + first // OP.groupsize, wanted)
    elif LANES.pairs_at_once:
        pairs = pairs + _load_four(CACHED_OR_ZERO, at + first // OP.groupsize, wanted)
    else:
        for c in tl.static_range(LANES.chunks):
            output = first + c * LANES.chunk
            mask = tl.where(output < last, wanted, 0) != 0
            pairs = pairs + (tl.load(at + output // OP.groupsize, mask=mask, other=0),)
    return pairs


@triton.jit
def _int4_kernel(
    # what makes one row of x; several, made by `kernels.few_rows.launch_prepare`
    x_ptr, gain_ptr, threshold_ptr, made_ptr, kept_ptr,
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
    CHUNKS: tl.constexpr = LANES.chunks
    TILE: tl.constexpr = LANES.chunk * CHUNKS
    ALL: tl.constexpr = not OP.cut and LANES.full and LANES.chunk == 64 and OP.n_in % (32 * BLOCKS) == 0
    lane = tl.arange(0, BLOCK)
    group = tl.program_id(1)
    program = group * tl.num_programs(0) + tl.program_id(0)
    segment, first, last = outputs_of_tile(tl.program_id(0), tiles_1, tiles_2, start_1, start_2, n_out, TILE)
    n_bytes = n_out // 2
    n_groups = n_out // OP.groupsize
    rows = group * (BLOCKS * BLOCK) + lane
    weights_at = weight_ptr + (group * (BLOCKS * BLOCK) + lane % 4 * 8).to(tl.int64) * n_bytes + first // 2 + lane // 4 * 4

    # before the wait: what no launch of this step writes, and rows that a guess from x as it is now names
    weights, pairs, constants = (), (), ()
    if ROWS == 0:
        x_ptr += tl.program_id(2) * OP.n_in
        out_ptr += tl.program_id(2) * n_out
        threshold_ptr += segment * (2 * OP.n_in if OP.shift else OP.n_in)
        for b in tl.static_range(BLOCKS):
            gain, threshold, shift = load_constants(rows + b * BLOCK, gain_ptr, threshold_ptr, OP)
            constants = constants + ((gain, threshold, shift),)
        if PLAN.prefetch > 0:
            if program < PLAN.prefetch:
                last_rstd = 1.0
                if OP.prologue == "norm":
                    last_rstd = tl.load(last_rstd_ptr)
                prefetch_tile(
                    rows, constants[0], first, n_bytes, x_ptr, gain_ptr, threshold_ptr, last_rstd, weight_ptr, OP, PLAN
                )
    if not OP.cut:
        for b in tl.static_range(BLOCKS):
            there = kept_by_any(None, group * BLOCKS + b, 1, 1, OP)
            pairs = _load_pairs(pairs, weight_scale_ptr, rows + b * BLOCK, there, n_groups, first, last, OP, LANES)
        for b in tl.static_range(BLOCKS):
            there = kept_by_any(None, group * BLOCKS + b, 1, 1, OP)
            weights = _load_words(weights, weights_at + b * BLOCK * n_bytes, there, n_bytes, first, last, ALL, LANES)
    finenesses, offsets = (), ()
    for c in tl.static_range(CHUNKS):
        at = first + c * LANES.chunk + 2 * lane
        wanted = ((2 * lane < LANES.chunk) & (at < last)).to(tl.int32)
        if fineness_ptr is not None:
            finenesses = finenesses + _load_two(fineness_ptr + at, wanted)
        if offset_ptr is not None:
            offsets = offsets + _load_two(offset_ptr + at, tl.where(group == 0, wanted, 0))

    # the launch before has ended
    if PDL:
        tl.extra.cuda.gdc_wait()
    if ZERO > 0:
        z = program * ZERO + tl.arange(0, ZERO)
        tl.store(zero_ptr + z, tl.zeros((ZERO,), tl.float32), mask=z < n_zero)

    # one row: x, and the weights that it keeps
    made = ()
    if ROWS == 0:
        operands, rstd = (), 1.0
        for b in tl.static_range(BLOCKS):
            a, up = load_inputs(rows + b * BLOCK, x_ptr, OP, "")
            operands = operands + ((a, up),)
        if OP.prologue == "norm":
            rstd = shared_rstd(out_ptr + n_out, program, x_ptr, eps, OP.n_in)
            if PLAN.guess:
                if program == 0:
                    tl.store(last_rstd_ptr, rstd)
        bits = ()
        for b in tl.static_range(BLOCKS):
            x, keep = inputs(rows + b * BLOCK, operands[b], constants[b], rstd, OP)
            made = made + (tl.where(keep, x, 0.0),)
            if OP.cut:
                kept = tl.sum(keep.to(tl.int32) << lane, axis=0)
                bits = bits + (kept,)
                pairs = _load_pairs(pairs, weight_scale_ptr, rows + b * BLOCK, kept, n_groups, first, last, OP, LANES)
        if OP.cut:
            for b in tl.static_range(BLOCKS):
                at = weights_at + b * BLOCK * n_bytes
                weights = _load_words(weights, at, bits[b], n_bytes, first, last, ALL, LANES)

    # several: the weights that any of them keeps; where inputs are cut, each segment has its own
    elif OP.cut:
        made_ptr += segment * (ROWS * OP.n_in)
        kept_ptr += segment * (ROWS * ((OP.n_in + BLOCK - 1) // BLOCK))
        bits = ()
        for b in tl.static_range(BLOCKS):
            kept = kept_by_any(kept_ptr, group * BLOCKS + b, ROWS, ROWS, OP)
            bits = bits + (kept,)
            pairs = _load_pairs(pairs, weight_scale_ptr, rows + b * BLOCK, kept, n_groups, first, last, OP, LANES)
        for b in tl.static_range(BLOCKS):
            at = weights_at + b * BLOCK * n_bytes
            weights = _load_words(weights, at, bits[b], n_bytes, first, last, ALL, LANES)

    # each row's sums, chunk by chunk
    column = lane // 4
    place = column // 2 * 4
    choice = 0x4444 ^ ((4 ^ (1 - column % 2)) << place)  # byte 1 or 0 in its place
    z = tl.zeros((BLOCK,), tl.int32)
    for c in tl.static_range(CHUNKS):
        low_codes, high_codes = (), ()
        for i in tl.static_range(BLOCKS * 8):
            word = weights[i * CHUNKS + c]
            low_codes = low_codes + (word & 0x0F0F0F0F,)
            high_codes = high_codes + (word & -0x0F0F0F10,)
        at = first + c * LANES.chunk + 2 * lane
        wanted = (2 * lane < LANES.chunk) & (at < last)
        for r in tl.static_range(max(ROWS, 1)):
            # x times the scales, and their part of the sums
            low = tl.zeros((BLOCK,), tl.float32)
            largest = tl.zeros((BLOCK,), tl.int32)
            scaled = ()
            for b in tl.static_range(BLOCKS):
                if ROWS == 0:
                    x = made[b]
                else:
                    i = rows + b * BLOCK
                    x = tl.load(made_ptr + r * OP.n_in + i, mask=i < OP.n_in, other=0.0).to(tl.float32)
                pair = pairs[b * CHUNKS + c]
                low = tl.fma(x, (pair & -65536).to(tl.float32, bitcast=True), low)
                x = x * (pair << 16).to(tl.float32, bitcast=True)
                largest = tl.maximum(largest, tl.abs(x).to(tl.int32, bitcast=True))
                scaled = scaled + (x,)
            scale, down = scales_of(tl.max(largest, axis=0))
            for i in tl.static_range(5):
                low += _from_lane(low.to(tl.int32, bitcast=True), lane ^ (16 >> i)).to(tl.float32, bitcast=True)

            # products
            sums = (z, z, z, z)
            for p in tl.static_range(BLOCKS // 2):
                n0 = (scaled[2 * p] * scale + 12583040.0).to(tl.int32, bitcast=True)
                n1 = (scaled[2 * p + 1] * scale + 12583040.0).to(tl.int32, bitcast=True)
                both = _halves(n0, n1) ^ 0x00800080
                for i in tl.static_range(8):
                    x = _from_lane(both, lane % 4 * 8 + i)
                    b0, b1 = _pick_bytes(x, choice), _pick_bytes(x, choice + (2 << place))
                    sums = _multiply_add(
                        sums, low_codes[16 * p + i], high_codes[16 * p + i], low_codes[16 * p + 8 + i],
                        high_codes[16 * p + 8 + i], b0, b1,
                    )

            # the lane's two outputs
            y0 = tl.fma((sums[0] * 256 + sums[1]).to(tl.float32), down, low)
            y1 = tl.fma((sums[2] * 256 + sums[3]).to(tl.float32), down * 0.0625, low)
            if offset_ptr is not None:
                y0 += offsets[2 * c].to(tl.float32, bitcast=True)
                y1 += offsets[2 * c + 1].to(tl.float32, bitcast=True)
            if OP.multiplier != 1.0:
                y0 *= OP.multiplier
                y1 *= OP.multiplier
            if fineness_ptr is not None:
                y0 = snap(y0, finenesses[2 * c].to(tl.float32, bitcast=True))
                y1 = snap(y1, finenesses[2 * c + 1].to(tl.float32, bitcast=True))
            out_at = out_ptr + r * out_stride + at
            if LANES.add_two:
                _add_two(out_at, wanted.to(tl.int32), y0, y1)
            else:
                tl.atomic_add(out_at, y0, mask=wanted, sem="relaxed")
                tl.atomic_add(out_at + 1, y1, mask=wanted, sem="relaxed")


# ---- launching it


def chunk_of(groupsize: int) -> int:
    """Outputs that one product of the tensor cores takes: at most 64, of one group."""
    return next(n for n in range(64, 0, -8) if groupsize % n == 0)


CHANGES = {}


def launch_int4(
    prologue: str, x: Tensor, product: Product, out: Tensor, *,
    prepared: Prepared | None = None, norm: Norm | None = None, zero: Tensor | None = None, dtype: torch.dtype,
    pdl: bool = False,
) -> None:
    """`kernels.triton_gemv.launch_gemv` of an int4 weight, and `kernels.few_rows.launch_rows`, with `prepared`."""
    product.check()
    weight, segments, n_in, rows = product.weight, product.segments, len(product.weight), len(x)
    groupsize, n_out = product.form.groupsize, sum(segments)
    gain, eps, last_rstd = norm or (None, 0.0, None)
    plan = product.plan(prologue, pdl, last_rstd is not None)
    chunk, chunks = chunk_of(groupsize), CHANGES.get("chunks", 4)
    plan = plan._replace(blocks=CHANGES.get("blocks", 2), block_out=chunk * chunks, registers=None)
    if product.sparsity and pdl and all(width % plan.block_out == 0 for width in segments):
        plan = plan._replace(prefetch=CHANGES.get("prefetch", 1056), prefetch_blocks=plan.blocks, guess=True)
    else:
        plan = plan._replace(prefetch=0, guess=False)
    operation = product.operation(prologue, dtype)._replace(pack=2)
    full = not any(width % plan.block_out for width in segments)
    at_once = full and groupsize == chunk
    hopper = pdl or (x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0))
    lanes = Lanes(chunk, chunks, full and chunks in (2, 4), full, at_once, hopper)

    group, starts = BLOCK.value * plan.blocks, starts_of(segments)
    groups, tiles = triton.cdiv(n_in, group), starts_of([triton.cdiv(width, plan.block_out) for width in segments])
    grid, n_zero, zero_block = [tiles[-1], groups, rows if prologue == "given" else 1], 0, 0
    if prepared:
        grid[2] = 1
        launch_prepare(x, operation, product.threshold, prepared, share=1, norm=norm, zero=zero, pdl=pdl)
    elif zero is not None:
        n_zero, zero_block = zero.numel(), triton.next_power_of_2(triton.cdiv(zero.numel(), tiles[-1] * groups))
    made = (prepared.made, prepared.kept) if prepared else (None, None)
    scale = product.weight_scale.view(torch.int32)
    _int4_kernel[tuple(grid)](
        x, gain, product.threshold, *made, weight, out, zero, last_rstd, product.offset, scale, product.fineness,
        n_out, out.stride(0), n_zero, *tiles[1:MAX_SEGMENTS], *starts[1:MAX_SEGMENTS], eps,
        OP=operation, PLAN=plan, LANES=lanes, ROWS=rows if prepared else 0, ZERO=zero_block, PDL=pdl,
        num_warps=1, launch_pdl=pdl, maxnreg=CHANGES.get("registers"),
    )
