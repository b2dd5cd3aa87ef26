"""int8 and int4 products on a GPU: x on 16-bit fixed point, and exact sums of integers on the tensor cores.

For 1 to 8 rows of x. A program is one warp. It takes PLAN.blocks of 32 inputs and a tile of PLAN.block_out outputs.
Each row's inputs of one program share a power of two as their scale. No sum of integers rounds, so no order matters,
and every number of rows has the same sums. Fixed point moves an input by at most 2^-15 of the largest one of the
program; bfloat16 itself moves each by up to 2^-9 of it. An input that is kept and not finite makes the outputs of its
programs not a number.

In int4 an input is first multiplied by its group's s, and it is these products that share a scale, in each group.
Inputs times m are added up in float32, in one order.

No weight is moved or converted for that: see "a tile" below. These kernels are written lane by lane: a tensor of 32
numbers is one register of the warp.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.few_rows import Prepared, kept_by_any, launch_prepare
from kernels.plan import chunk_of
from kernels.triton_gemv import (
    BLOCK,
    MAX_SEGMENTS,
    Norm,
    Product,
    await_inputs,
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
    zeros_of,
)


class Lanes(NamedTuple):
    """How a tile lies in the lanes of its warp. A lane has some words of each of its inputs, 8 of every block."""

    words: int  # of an input; int8: 4, int4: one of every chunk
    vector: int  # words that lie side by side
    apart: int  # bytes between these vectors
    chunk: int  # outputs of one product of int4: 8 in a word of 8 lanes, or fewer lanes where a group is no multiple
    full: bool  # segments end where a tile does
    by_word: bool  # words are loaded alone: segments end within a lane's words
    scales: int  # int4's scales of a tile that lie side by side
    add_vectors: bool  # the GPU adds neighbours at once


# ---- assembly, of one register per lane


@triton.constexpr_function
def load_assembly(words, vector, apart, once, zero):
    """Loads words to $0, $1, ...: vectors, some bytes apart. Where the operand behind the address is 0: none, or 0."""
    load = "@p ld.global" + ".L1::no_allocate" * once
    lines = [f"{{ .reg .pred p; setp.ne.s32 p, ${words + 1}, 0;"] + [f"mov.b32 ${i}, 0;" for i in range(words * zero)]
    for i in range(0, words, vector):
        registers = ", ".join(f"${j}" for j in range(i, i + vector))
        registers = f".v{vector}.b32 {{{registers}}}" if vector > 1 else f".b32 {registers}"
        lines.append(f"{load}{registers}, [${words} + {i // vector * apart}];")
    return " ".join(lines) + " }"


@triton.constexpr_function
def outputs_and_inputs(words):
    return "=&r," * words + "l,r"


@triton.jit
def load_where(
    at, wanted, WORDS: tl.constexpr, VECTOR: tl.constexpr, APART: tl.constexpr = 0, ONCE: tl.constexpr = False,
    ZERO: tl.constexpr = False,
):
    """WORDS words of each lane, int32, where wanted is not 0; else zeros or anything. See `load_assembly`."""
    return tl.inline_asm_elementwise(
        load_assembly(WORDS, VECTOR, APART, ONCE, ZERO), outputs_and_inputs(WORDS), [at.to(tl.int64), wanted],
        dtype=(tl.int32,) * WORDS, is_pure=False, pack=1,
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
def _add_two(at, wanted, v):
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; mov.u32 $0, 0; @p red.relaxed.gpu.global.add.v2.f32 [$1], {$3, $4}; }",
        "=r,l,r,f,f", [at.to(tl.int64), wanted, v[0], v[1]], dtype=tl.int32, is_pure=False, pack=1,
    )


@triton.jit
def _from_lane(x, lane):
    return tl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, $2, 0x1f, 0xffffffff;", "=r,r,r", [x, lane], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _zero_after_loads(at):
    """An int32 of each lane that is 0, which is only known when all loads before this have begun; at: of a word.

    The compiler moves no load across the barrier, and cannot know that lane 31 has no lower lanes to be its bit 31.
    """
    return tl.inline_asm_elementwise(
        "{ .reg .b32 z; bar.warp.sync 0xffffffff; ld.global.b32 $0, [$1]; mov.u32 z, %lanemask_lt; shr.u32 z, z, 31; "
        "and.b32 $0, $0, z; }", "=r,l", [at.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1,
    )


@triton.jit
def pick_bytes(word, other, choice):
    """Of each lane's two words the bytes that the digits of `choice`, 16 bits, name; 4 to 7 are the other's."""
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [word, other, choice], dtype=tl.int32, is_pure=True, pack=1
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
def _multiply_add_two(sums, a0, a1, a2, a3, b0, b1, SIGNED: tl.constexpr):
    """`_multiply_add` of two inputs: (a0, a1) times b0 and (a2, a3) times b1. SIGNED: A's bytes."""
    return tl.inline_asm_elementwise(
        "mma.sync.aligned.m16n8k32.row.col.s32." + ("s8" if SIGNED else "u8") + ".s8.s32 "
        "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};",
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
#
# A word of int4 is 8 outputs. Its even ones (word & 0x0F0F0F0F) are row g of A, its odd ones row g + 8, 16 times as
# large (word & 0xF0F0F0F0). All rows of A meet the same x, which has one group's s in it. So they are one chunk of 64
# outputs, and lane 4 g + t loads outputs 8 g .. 8 g + 7 of each chunk: it gets sums of its outputs 2 (4 g + t) and the
# one after. Of groups that 64 does not divide a chunk is a part, of which the first lanes have all words.


@triton.jit
def _load_block(weights, pairs, kept, b: tl.constexpr, tile, ALL: tl.constexpr, OP: tl.constexpr, LANES: tl.constexpr):
    """The tuples `weights`, and each lane's 8 inputs' words of block b, and `pairs`, int4's s and m of a lane's input.

    kept: bits of the block's inputs, or ALL of them are.
    tile: addresses of the lane's first weights and scales; made from one address per program: else the compiler would
        put the loads off until their products. Then the lane's first output, the tile's first, the segment's end, and
        the outputs of an input.
    """
    at, scale_at, piece, first, last, n_out = tile
    lane = tl.arange(0, BLOCK)
    WORDS: tl.constexpr = LANES.words
    n_bytes = n_out if OP.bits == 8 else n_out >> 1
    if OP.bits == 4:
        own = (kept >> lane) & 1
        scale_at += b * BLOCK * (n_out // OP.groupsize)
        if LANES.scales == WORDS:
            at_pair = scale_at + first // OP.groupsize
            pairs = pairs + load_where(at_pair, own, WORDS=WORDS, VECTOR=LANES.scales, ZERO=True)
        else:
            for c in tl.static_range(WORDS):
                output = first + c * LANES.chunk
                there = tl.where(output < last, own, 0)
                pairs = pairs + load_where(scale_at + output // OP.groupsize, there, WORDS=1, VECTOR=1, ZERO=True)

    kept = kept >> (lane % 4 * 8)
    if not LANES.full:
        kept = tl.where(piece < last, kept, 0)
    for i in tl.static_range(8):
        at_input = at + (b * BLOCK + i) * n_bytes
        wanted = tl.full((BLOCK,), 1, tl.int32) if ALL else kept & (1 << i)
        if LANES.by_word:
            for c in tl.static_range(WORDS):
                output = piece + c * (4 if OP.bits == 8 else LANES.chunk)
                there = tl.where(output < last, wanted, 0)
                weights = weights + load_where(at_input + c * LANES.apart, there, WORDS=1, VECTOR=1)
        else:
            weights = weights + load_where(at_input, wanted, WORDS, LANES.vector, LANES.apart, ONCE=True)
    return weights, pairs


@triton.jit
def _spread(x):
    """Two words of B from the lower and the upper 16 bits of x: a byte in its place, see above."""
    column = tl.arange(0, BLOCK) // 4
    place = column // 2 * 4
    choice = 0x4444 ^ ((4 ^ (1 - column % 2)) << place)  # byte 1 or 0
    return pick_bytes(x, 0, choice), pick_bytes(x, 0, choice + (2 << place))


@triton.jit
def load_factors(ptr, at, there, N: tl.constexpr):
    """What belongs to each lane's N outputs, bits of float32; zeros where ptr is None."""
    if ptr is None:
        return (tl.zeros((BLOCK,), tl.int32),) * N
    else:
        return load_where(ptr + at, there, N, N, ZERO=True)


@triton.jit
def add_to(
    out_at, there, sums, finenesses, N: tl.constexpr, OP: tl.constexpr, LANES: tl.constexpr, GRID: tl.constexpr
):
    """Adds N sums of each lane, times the multiplier and put on the grid, to its outputs."""
    out = ()
    for i in tl.static_range(N):
        x = sums[i]
        if OP.multiplier != 1.0:
            x *= OP.multiplier
        if GRID:
            x = snap(x, finenesses[i].to(tl.float32, bitcast=True))
        out = out + (x,)
    if not LANES.add_vectors:
        for i in tl.static_range(N):
            tl.atomic_add(out_at + i, out[i], mask=there != 0, sem="relaxed")
    elif N == 4:
        _add_four(out_at, there, out)
    else:
        _add_two(out_at, there, out)


# ---- int8


@triton.jit
def _add_block(low, high, weights, block: tl.constexpr, x, LANES: tl.constexpr):
    """Adds a block's products to the sums of words 0, 1 and 2, 3; x: 4 words of 2 numbers, inputs 8 t .. 8 t + 7."""
    for pair in tl.static_range(4):
        w = weights[block * 32 + pair * 8 : block * 32 + pair * 8 + 8]
        b0, b1 = _spread(x[pair])
        if LANES.vector == 2:
            low = _multiply_add_two(low, w[0], w[1], w[4], w[5], b0, b1, SIGNED=True)
            high = _multiply_add_two(high, w[2], w[3], w[6], w[7], b0, b1, SIGNED=True)
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
def _int8_sums(
    weights, made, scale, down, x_ptr, scales, offsets, ROWS: tl.constexpr, BLOCKS: tl.constexpr, LANES: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """Sums of a row of x of each lane's 4 outputs; every lane takes 8 numbers of x, two a word."""
    lane = tl.arange(0, BLOCK)
    z, t = tl.zeros((BLOCK,), tl.int32), lane % 4 * 8
    low, high = (z, z, z, z), (z, z, z, z)
    for b in tl.static_range(BLOCKS):
        if ROWS == 0:
            n = fixed(made[b], scale)
            n = pick_bytes(n, _from_lane(n, lane ^ 1), 0x5410)
            x = _from_lane(n, t), _from_lane(n, t + 2), _from_lane(n, t + 4), _from_lane(n, t + 6)
        else:
            x = load_where(x_ptr + b * BLOCK + t, tl.full((BLOCK,), 1, tl.int32), 4, 4)
        low, high = _add_block(low, high, weights, b, x, LANES)

    sums, total = (), _in_order(low, high)
    for i in tl.static_range(4):
        x, factor = total[i].to(tl.float32) * down, scales[i].to(tl.float32, bitcast=True)
        if OFFSET:
            sums = sums + (tl.fma(x, factor, offsets[i].to(tl.float32, bitcast=True)),)
        else:
            sums = sums + (x * factor,)
    return sums


# ---- int4


@triton.jit
def _int4_sums(
    weights, pairs, made, offsets, first: tl.constexpr, COUNT: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
    LANES: tl.constexpr, OFFSET: tl.constexpr,
):
    """Sums of COUNT chunks from `first` on, of each those of all rows of x, of each those of the lane's 2 outputs.

    made: x of all blocks of all rows. All that is independent comes in turn, since what follows has to wait.
    """
    WORDS: tl.constexpr = LANES.words
    ALL: tl.constexpr = COUNT * ROWS
    lane = tl.arange(0, BLOCK)
    z = tl.zeros((BLOCK,), tl.int32)

    # x times s, on fixed point; inputs of two blocks share a word, and meet in one product
    lows, largest, scaled, downs, both = (), (), (), (), ()
    for c in tl.static_range(COUNT):
        for r in tl.static_range(ROWS):
            low, most = z.to(tl.float32), z
            for b in tl.static_range(BLOCKS):
                pair, x = pairs[b * WORDS + first + c], made[r * BLOCKS + b]
                low = tl.fma(x, (pair & -65536).to(tl.float32, bitcast=True), low)
                x = x * (pair << 16).to(tl.float32, bitcast=True)
                most = tl.maximum(most, tl.abs(x).to(tl.int32, bitcast=True))
                scaled = scaled + (x,)
            lows, largest = lows + (low,), largest + (most,)
    for j in tl.static_range(ALL):
        scale, down = scales_of(tl.max(largest[j], axis=0))
        downs = downs + (down,)
        for b in tl.static_range(0, BLOCKS, 2):
            n, other = fixed(scaled[j * BLOCKS + b], scale), z
            if b + 1 < BLOCKS:
                other = fixed(scaled[j * BLOCKS + b + 1], scale)
            both = both + (pick_bytes(n, other, 0x5410),)

    # the sums over lanes of x times m, in one order
    for i in tl.static_range(5):
        new = ()
        for j in tl.static_range(ALL):
            theirs = _from_lane(lows[j].to(tl.int32, bitcast=True), lane ^ (16 >> i))
            new = new + (lows[j] + theirs.to(tl.float32, bitcast=True),)
        lows = new

    # products
    sums = ((z, z, z, z),) * ALL
    for b in tl.static_range(0, BLOCKS, 2):
        for i in tl.static_range(8):
            new = ()
            for c in tl.static_range(COUNT):
                one = weights[(8 * b + i) * WORDS + first + c]
                two = weights[(8 * min(b + 1, BLOCKS - 1) + i) * WORDS + first + c]
                a0, a1, a2, a3 = one & 0x0F0F0F0F, one & -0x0F0F0F10, two & 0x0F0F0F0F, two & -0x0F0F0F10
                for r in tl.static_range(ROWS):
                    x = _from_lane(both[(c * ROWS + r) * ((BLOCKS + 1) // 2) + b // 2], lane % 4 * 8 + i)
                    b0, b1 = _spread(x)
                    new = new + (_multiply_add_two(sums[c * ROWS + r], a0, a1, a2, a3, b0, b1, SIGNED=False),)
            sums = new

    out = ()
    for j in tl.static_range(ALL):
        even, odd = (sums[j][0] * 256 + sums[j][1]).to(tl.float32), (sums[j][2] * 256 + sums[j][3]).to(tl.float32)
        even, odd = tl.fma(even, downs[j], lows[j]), tl.fma(odd, downs[j] * 0.0625, lows[j])
        if OFFSET:
            even += offsets[2 * (first + j // ROWS)].to(tl.float32, bitcast=True)
            odd += offsets[2 * (first + j // ROWS) + 1].to(tl.float32, bitcast=True)
        out = out + ((even, odd),)
    return out


# ---- the product


@triton.jit
def _integer_kernel(
    # what makes one row of x; several, made by `kernels.few_rows.launch_prepare`
    x_ptr, gain_ptr, threshold_ptr, made_ptr, kept_ptr, down_ptr,
    # read and written
    weight_ptr, out_ptr, zero_ptr, last_rstd_ptr, offset_ptr, weight_scale_ptr, fineness_ptr,
    # tag of the step, if x is awaited
    tag_ptr,
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
    WHOLE: tl.constexpr = LANES.full and not LANES.by_word  # every lane has all its outputs
    LATE: tl.constexpr = OP.cut and not PLAN.early  # weights are loaded after the wait
    ALL: tl.constexpr = not LATE and WHOLE and OP.n_in % (32 * BLOCKS) == 0
    GROUPS: tl.constexpr = (OP.n_in + BLOCKS * BLOCK - 1) // (BLOCKS * BLOCK)
    CHUNKS: tl.constexpr = 1 if OP.bits == 8 else LANES.words
    N: tl.constexpr = 4 if OP.bits == 8 else 2  # outputs that a lane adds, of each chunk
    GRID: tl.constexpr = fineness_ptr is not None
    OFFSET: tl.constexpr = offset_ptr is not None
    AWAIT: tl.constexpr = tag_ptr is not None
    lane = tl.arange(0, BLOCK)
    group = tl.program_id(1)
    program = group * tl.num_programs(0) + tl.program_id(0)
    segment, first, last = outputs_of_tile(tl.program_id(0), tiles_1, tiles_2, start_1, start_2, n_out, PLAN.block_out)
    rows = group * (BLOCKS * BLOCK) + lane

    # the lane's outputs: the first of its weights, and the first that it adds in the end
    if OP.bits == 4:
        piece, at = first + lane // 4 * 8, first + lane * 2
    elif LANES.vector == 2:
        piece, at = first + lane // 4 * 8, first + lane // 4 * 8 + lane % 2 * 4 + lane % 4 // 2 * 64
    else:
        piece, at = first + lane // 4 * 16, first + lane * 4
    at_input = (group * (BLOCKS * BLOCK) + lane % 4 * 8).to(tl.int64)
    if OP.bits == 8:
        weights_at, scale_at = weight_ptr + at_input * n_out + piece, weight_scale_ptr
    else:
        weights_at = weight_ptr + at_input * (n_out >> 1) + (piece >> 1)
        scale_at = weight_scale_ptr + rows.to(tl.int64) * (n_out // OP.groupsize)
    tile = weights_at, scale_at, piece, first, last, n_out

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
                    rows, constants[0], first, n_out, x_ptr, gain_ptr, threshold_ptr, last_rstd, weight_ptr, OP, PLAN
                )
    if not LATE:
        for b in tl.static_range(BLOCKS):
            kept = kept_by_any(None, group * BLOCKS + b, 1, OP)
            weights, pairs = _load_block(weights, pairs, kept, b, tile, ALL, OP, LANES)

    # what belongs to the outputs that the lane adds; the first programs add the offsets
    finenesses, offsets, scales, there = (), (), (), ()
    for c in tl.static_range(CHUNKS):
        at_chunk, mine = at + c * LANES.chunk, tl.full((BLOCK,), 1, tl.int32)
        if not WHOLE:
            mine = (at_chunk < (last if OP.bits == 8 else tl.minimum(last, first + (c + 1) * LANES.chunk))).to(tl.int32)
        there = there + (mine,)
        finenesses = finenesses + load_factors(fineness_ptr, at_chunk, mine, N)
        offsets = offsets + load_factors(offset_ptr, at_chunk, tl.where(group == 0, mine, 0), N)
        if OP.bits == 8:
            scales = load_factors(weight_scale_ptr, at, mine, N)

    # the launch before has ended, or x says when it is there
    if PDL and not AWAIT:
        tl.extra.cuda.gdc_wait()
    if ZERO > 0:
        z = program * ZERO + tl.arange(0, ZERO)
        tl.store(zero_ptr + z, tl.zeros((ZERO,), tl.float32), mask=z < n_zero)

    # one row: x, and the weights that it keeps
    made, scale, down = (), 1.0, 1.0
    if ROWS == 0:
        operands, largest, rstd = (), tl.zeros((BLOCK,), tl.int32), 1.0
        if AWAIT:
            operands = await_inputs(rows, x_ptr, tag_ptr, OP, BLOCKS)
        else:
            for b in tl.static_range(BLOCKS):
                a, up = load_inputs(rows + b * BLOCK, x_ptr, OP, "")
                operands = operands + ((a, up),)
        if OP.prologue == "norm":
            rstd = shared_rstd(out_ptr + n_out, program, x_ptr, eps, OP.n_in)
            if PLAN.guess:
                if program == 0:
                    tl.store(last_rstd_ptr, rstd)
        for b in tl.static_range(BLOCKS):
            x, keep = inputs(rows + b * BLOCK, operands[b], constants[b], rstd, OP)
            x = tl.where(keep, x, 0.0)
            made = made + (x,)
            if LATE:
                kept = tl.sum(keep.to(tl.int32) << lane, axis=0)
                weights, pairs = _load_block(weights, pairs, kept, b, tile, ALL, OP, LANES)
            largest = tl.maximum(largest, tl.abs(x).to(tl.int32, bitcast=True))
        if OP.bits == 8:
            scale, down = scales_of(tl.max(largest, axis=0))

    # several: the weights that any of them keeps; where inputs are cut, each segment has its own
    elif OP.cut:
        made_ptr += segment * (ROWS * GROUPS * BLOCKS * BLOCK)
        kept_ptr += segment * (ROWS * ((OP.n_in + BLOCK - 1) // BLOCK))
        if OP.bits == 8:
            down_ptr += segment * (ROWS * GROUPS)
        for b in tl.static_range(BLOCKS if LATE else 0):
            kept = kept_by_any(kept_ptr, group * BLOCKS + b, ROWS, OP)
            weights, pairs = _load_block(weights, pairs, kept, b, tile, ALL, OP, LANES)

    # else the compiler puts some loads off until others have come: int8's step takes 1.945 instead of 1.882 ms at 50 %
    if LATE and PDL:
        zero = _zero_after_loads(threshold_ptr + rows * 0)
        if ROWS == 0:
            late = ()
            for b in tl.static_range(BLOCKS):
                late = late + ((made[b].to(tl.int32, bitcast=True) | zero).to(tl.float32, bitcast=True),)
            made = late

    # each row's sums, of some chunks at once
    R: tl.constexpr = max(ROWS, 1)
    COUNT: tl.constexpr = min(CHUNKS, 4 if R <= 2 else 2 if R <= 4 else 1)
    for first_chunk in tl.static_range(0, CHUNKS, COUNT):
        sums, x = (), made
        for r in tl.static_range(ROWS):
            x_at = made_ptr + (r * GROUPS + group) * (BLOCKS * BLOCK)
            if OP.bits == 8:
                down = tl.load(down_ptr + r * GROUPS + group)
                new = _int8_sums(weights, made, scale, down, x_at, scales, offsets, ROWS, BLOCKS, LANES, OFFSET)
                sums = sums + (new,)
            else:
                for b in tl.static_range(BLOCKS):
                    x = x + (tl.load(x_at + b * BLOCK + lane).to(tl.float32),)
        if OP.bits == 4:
            sums = _int4_sums(weights, pairs, x, offsets, first_chunk, COUNT, R, BLOCKS, LANES, OFFSET)
        elif ROWS == 0:
            sums = (_int8_sums(weights, made, scale, down, made_ptr, scales, offsets, 0, BLOCKS, LANES, OFFSET),)
        for c in tl.static_range(COUNT):
            for r in tl.static_range(R):
                out_at = out_ptr + r * out_stride + at + (first_chunk + c) * LANES.chunk
                fine = finenesses[(first_chunk + c) * N : (first_chunk + c) * N + N]
                add_to(out_at, there[first_chunk + c], sums[c * R + r], fine, N, OP, LANES, GRID)

    # the next launch relies on the end of the one before, too
    if PDL and AWAIT:
        tl.extra.cuda.gdc_wait()


# ---- launching it


def lanes_of(plan, product: Product, hopper: bool) -> Lanes:
    """How tiles of `plan` lie in the lanes."""
    segments, (_, _, groupsize) = product.segments, product.form
    full = not any(width % plan.block_out for width in segments)
    if product.form.name == "int8":
        vector = 2 if plan.blocks == 4 and full else 4
        return Lanes(4, vector, 64 if vector == 2 else 4, 0, full, any(width % 16 for width in segments), 0, hopper)
    chunk = chunk_of(groupsize)
    chunks = plan.block_out // chunk
    scales = chunks if full and chunk == groupsize else 0
    return Lanes(chunks, 1, chunk // 2, chunk, full, not full or chunk < 64, scales, hopper)


def launch_integers(
    prologue: str, x: Tensor, product: Product, out: Tensor, *,
    prepared: Prepared | None = None, norm: Norm | None = None, zero: Tensor | None = None,
    tag: Tensor | None = None, dtype: torch.dtype, pdl: bool = False,
) -> None:
    """`launch_gemv` of `kernels.triton_gemv` for int8 and int4, of several rows of any prologue with `prepared`."""
    product.check()
    weight, segments, n_in, rows = product.weight, product.segments, len(product.weight), len(x)
    scale = product.weight_scale if product.form.name == "int8" else product.weight_scale.view(torch.int32)
    read = product.offset, scale, product.fineness
    assert all(t is None or t.data_ptr() % 16 == 0 for t in (weight, out, *read))
    assert len(out) == 1 or out.stride(0) % 4 == 0
    gain, eps, last_rstd = norm or (None, 0.0, None)
    plan = product.plan(prologue, pdl, last_rstd is not None)
    if prepared:  # the sums of four blocks' words beside those words are more registers than a thread has
        plan = plan._replace(block_out=min(plan.block_out, 512 // plan.blocks))
    hopper = pdl or (x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0))
    operation, lanes = product.operation(prologue, dtype), lanes_of(plan, product, hopper)

    group, starts = BLOCK.value * plan.blocks, starts_of(segments)
    tiles = starts_of([triton.cdiv(width, plan.block_out) for width in segments])
    grid = tiles[-1], triton.cdiv(n_in, group), 1 if prepared else rows
    if prepared:
        if operation.bits == 8:
            prepared = prepared._replace(made=prepared.made.view(torch.int16))
        launch_prepare(x, operation, product.threshold, prepared, group=group, norm=norm, zero=zero, pdl=pdl)
        zero = None
    n_zero, zero_block = zeros_of(zero, grid[0] * grid[1])
    _integer_kernel[grid](
        x, gain, product.threshold, *(prepared or (None, None, None)), weight, out, zero, last_rstd, *read,
        None if prepared else tag,
        starts[-1], out.stride(0), n_zero, *tiles[1:MAX_SEGMENTS], *starts[1:MAX_SEGMENTS], eps,
        OP=operation, PLAN=plan, LANES=lanes, ROWS=rows if prepared else 0, ZERO=zero_block, PDL=pdl,
        num_warps=1, launch_pdl=pdl, maxnreg=plan.registers,
    )
