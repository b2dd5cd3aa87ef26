"""The sparse product on a GPU, in Triton: a warp takes a tile of inputs x outputs, and masks or skips the cut rows.

On an H100 many small programs that add their sums by atomics beat one program that loops down a strip of columns, lists
of indices, and larger tiles (benchmarks/NOTES.md). Neighbouring programs share inputs and differ in outputs, so that x
stays in L1 and concurrent atomics meet different addresses: that order alone took 4096 -> 28672 at 50 % from 46.0 to
41.3 us.
"""

from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.packed import GROUP
from kernels.plan import AHEAD_BYTES, AHEAD_ROWS, BLOCK_IN, Plan, plan_for
from kernels.quantized import Form, form_of

MAX_SEGMENTS = 3
SLOTS, STRIDE = tl.constexpr(64), tl.constexpr(32)  # copies of a norm's rstd, one per cache line of 32 float32
RSTD_BUFFER = SLOTS.value * STRIDE.value  # behind the outputs of a product with a norm before it
ONE = 0x3F800000  # bits of 1.0, see `fraction`
BLOCK = tl.constexpr(BLOCK_IN)
PIECE_ROWS, PIECE_BYTES = tl.constexpr(AHEAD_ROWS), tl.constexpr(AHEAD_BYTES)


class Operation(NamedTuple):
    """What a product's kernel computes: compiled in, as its `Plan` is, both as the kernels' uppercase OP and PLAN."""

    prologue: str  # what x is. "given"; "norm": RMSNorm of h; the name of an activation: that of gate, times up
    cut: bool  # whether inputs are compared with thresholds
    shift: bool  # whether thresholds come with shifts
    n_in: int
    dtype: tl.dtype  # in which inputs are rounded and compared
    bits: int = 16  # of a weight
    pack: int = 1  # outputs of a word, as it is loaded
    groupsize: int = 0  # int4's outputs per scale
    multiplier: float = 1.0  # of the sums


def operation_of(prologue: str, n_in: int, dtype: torch.dtype) -> Operation:
    """That of dense inputs in the model's dtype."""
    return Operation(prologue, False, False, n_in, getattr(tl, str(dtype).removeprefix("torch.")))


# ---- what a product multiplies: the prologue's inputs, and their norm's rstd


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """float32 values as the model's dtype would hold them. Inputs are compared with thresholds in that dtype."""
    return x.to(DTYPE).to(tl.float32)


@triton.jit
def rstd_of(h_ptr, eps, N: tl.constexpr):
    """RMSNorm's 1 / sqrt(mean(h^2) + eps) of h [N] float32, by one warp: more would add in another order."""
    PASS: tl.constexpr = min(4096, triton.next_power_of_2(N))
    squares = tl.zeros((PASS,), tl.float32)
    for start in tl.static_range(0, N, PASS):
        i = start + tl.arange(0, PASS)
        h = tl.load(h_ptr + i, mask=i < N, other=0.0)
        squares += h * h
    rstd = tl.rsqrt(tl.sum(squares, axis=0) / N + eps)
    return tl.where(rstd == 0.0, float("nan"), rstd)  # infinite h: not a number, but no wait without end


@triton.jit
def shared_rstd(slots_ptr, program, h_ptr, eps, N: tl.constexpr):
    """`rstd_of` h: the first program computes it, the others wait for it.

    The slots hold 0 until then (an earlier launch has zeroed them). There are many, one per cache line, since thousands
    of programs that poll one address queue for it: 4096 -> 6144 at 50 % took 13.5 us so, 12.7 us with 64 (H100).
    """
    if program == 0:
        share_rstd(slots_ptr, h_ptr, eps, N)
    return wait_for_rstd(slots_ptr, program)


@triton.jit
def share_rstd(slots_ptr, h_ptr, eps, N: tl.constexpr):
    """Fills the slots with `rstd_of` h."""
    rstd = rstd_of(h_ptr, eps, N)
    tl.store(slots_ptr + tl.arange(0, SLOTS) * STRIDE, rstd + tl.zeros((SLOTS,), tl.float32))


@triton.jit
def wait_for_rstd(slots_ptr, program):
    """What the slots hold, as soon as it is there."""
    slot = slots_ptr + (program % SLOTS) * STRIDE
    rstd = tl.load(slot, volatile=True)
    while rstd == 0.0:
        rstd = tl.load(slot, volatile=True)
    return rstd


@triton.jit
def load_constants(rows, gain_ptr, threshold_ptr, OP: tl.constexpr):
    """Loads the constants of inputs `rows`: the norm's gain, thresholds and shifts, float32."""
    in_range = rows < OP.n_in
    gain = tl.zeros_like(rows).to(tl.float32)
    threshold, shift = gain, gain
    if OP.prologue == "norm":
        gain = tl.load(gain_ptr + rows, mask=in_range, other=0.0).to(tl.float32)
    if OP.shift:
        pairs = 2 * rows[:, None] + tl.arange(0, 2)[None, :]
        threshold, shift = tl.split(tl.load(threshold_ptr + pairs, mask=in_range[:, None], other=0.0))
    elif OP.cut:
        threshold = tl.load(threshold_ptr + rows, mask=in_range, other=0.0)
    return gain, threshold, shift


@triton.jit
def load_inputs(rows, x_ptr, OP: tl.constexpr, CACHE: tl.constexpr):
    """Loads the two float32 operands from which `inputs` makes x[rows]; the second is `up`, or zero.

    CACHE ".cg" leaves nothing in L1: what is read before the wait may change.
    """
    in_range = rows < OP.n_in
    a = tl.load(x_ptr + rows, mask=in_range, other=0.0, cache_modifier=CACHE).to(tl.float32)
    b = tl.zeros_like(a)
    if OP.prologue != "given" and OP.prologue != "norm":
        b = tl.load(x_ptr + OP.n_in + rows, mask=in_range, other=0.0, cache_modifier=CACHE)
    return a, b


@triton.jit
def activated(x, OP: tl.constexpr):
    """The activation that is the prologue, one of `model.ACTIVATIONS`."""
    if OP.prologue == "silu":
        y = x * tl.sigmoid(x)
    elif OP.prologue == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif OP.prologue == "gelu_tanh":  # 0.5 (1 + tanh z) is the sigmoid of 2 z
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        tl.static_assert(OP.prologue == "relu")
        y = tl.where(x < 0.0, 0.0, x)
    return y


@triton.jit
def inputs(rows, operands, constants, rstd, OP: tl.constexpr):
    """x[rows] - shift, float32, rounded where the unfused model rounds; and which of them are kept."""
    x, up = operands
    gain, threshold, shift = constants
    if OP.prologue == "norm":
        x = rounded(rounded(x * rstd, OP.dtype) * gain, OP.dtype)
    elif OP.prologue != "given":
        gate = activated(rounded(x, OP.dtype), OP)
        x = rounded(rounded(gate, OP.dtype) * rounded(up, OP.dtype), OP.dtype)
    if OP.shift:
        x = rounded(x - shift, OP.dtype)

    keep = rows < OP.n_in
    if OP.cut:
        keep = keep & ~(tl.abs(x) <= threshold)
    return x, keep


# ---- int8: x on 16-bit fixed point, see `kernels.int8_mma`


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
    """x 2^s rounded to an integer 256 h + l, as the signed bytes h and l in the low half of an int32."""
    n = (x * up + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000  # what is added to 1.5 2^23 loses its fraction
    return ((n + 128) & 0xFF00) | (n & 0xFF)


# ---- prefetching rows to L2, while the launch before still runs


@triton.jit
def prefetch(rows_ptr, wanted, n_bytes):
    """Asks for n_bytes (a multiple of 16) at each wanted pointer, 16-byte aligned, to be brought into L2."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], $3; mov.u32 $0, 0; }",
        "=r,l,r,r", [rows_ptr.to(tl.int64), wanted.to(tl.int32), n_bytes], dtype=tl.int32, is_pure=False, pack=1,
    )


@triton.jit
def prefetch_tile(
    # the tile's first inputs and their constants, its first output, and the words of a row
    rows, constants, first, n_words,
    # what guesses which rows are kept, and the rows
    x_ptr, gain_ptr, threshold_ptr, last_rstd, weight_ptr,
    OP: tl.constexpr, PLAN: tl.constexpr,
):
    """Prefetches the tile's part of the first blocks' rows, all of them or those that it guesses to be kept."""
    BLOCKS: tl.constexpr = PLAN.prefetch_blocks
    TILE_BYTES: tl.constexpr = PLAN.block_out * OP.bits // 8
    WORD_BITS: tl.constexpr = 32 if OP.pack > 1 else OP.bits
    tl.static_assert(TILE_BYTES % 16 == 0)
    for block in tl.static_range(BLOCKS):
        ahead = rows + block * BLOCK
        wanted = ahead < OP.n_in
        if PLAN.guess:
            ahead_constants = constants
            if block > 0:
                ahead_constants = load_constants(ahead, gain_ptr, threshold_ptr, OP)
            _x, wanted = inputs(ahead, load_inputs(ahead, x_ptr, OP, ".cg"), ahead_constants, last_rstd, OP)
        prefetch(weight_ptr + ahead.to(tl.int64) * n_words + first * OP.bits // WORD_BITS, wanted, TILE_BYTES)


@triton.jit
def prefetch_gate_up(
    # which piece, of how many; neighbouring pieces are of the same rows
    piece, n_pieces,
    # the input of gate|up as it is now, and its norm
    h_ptr, gain_ptr, threshold_ptr, last_rstd_ptr,
    # gate|up as uint8: a row is gate's half_bytes, then up's
    weight_ptr, half_bytes, OP: tl.constexpr,
):
    """Prefetches one piece of gate|up while attention runs: of the rows that h and its norm's last rstd keep.

    A piece is PIECE_BYTES of each of PIECE_ROWS rows. It waits for qkv to end first: sooner it would hold up qkv, and
    llama-3-8b's step at 50 % takes 3.03 instead of 2.96 ms (512 rows, H100).
    """
    tl.extra.cuda.gdc_wait()
    if piece < n_pieces:
        pieces = tl.cdiv(half_bytes, PIECE_BYTES)
        rows = piece // (2 * pieces) * PIECE_ROWS + tl.arange(0, PIECE_ROWS)
        up = piece // pieces % 2
        start = piece % pieces * PIECE_BYTES

        wanted = rows < OP.n_in
        if OP.cut:
            threshold_ptr += up * (2 * OP.n_in if OP.shift else OP.n_in)
            constants = load_constants(rows, gain_ptr, threshold_ptr, OP)
            h = load_inputs(rows, h_ptr, OP, ".cg")
            _x, wanted = inputs(rows, h, constants, tl.load(last_rstd_ptr), OP)

        rows_ptr = weight_ptr + rows.to(tl.int64) * (2 * half_bytes) + up * half_bytes + start
        prefetch(rows_ptr, wanted, tl.minimum(half_bytes - start, PIECE_BYTES))


@triton.jit
def unpacked(word, i: tl.constexpr, DTYPE: tl.constexpr):
    """The i-th number, as float32, of a run of DTYPE, from the word of 64 bits that holds it."""
    if DTYPE == tl.float32:
        bits = (word >> 32 * (i % 2)).to(tl.int32)
        x = bits.to(tl.float32, bitcast=True)
    elif DTYPE == tl.bfloat16:  # half the work of a conversion
        half = (word >> 32 * (i // 2 % 2)).to(tl.int32)
        half = half & -65536 if i % 2 else half << 16
        x = half.to(tl.float32, bitcast=True)
    else:
        x = (word >> 16 * (i % 4)).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
    return x


# ---- int4: sums of x times integer, taken without converting the integers


@triton.jit
def fraction(word, one, k: tl.constexpr):
    """1 + n / 2^(23 - PLACE) as float32, where n is the k-th integer of 4 bits of each int32 word.

    n becomes part of the mantissa. That takes a shift for every two integers and one operation at the full rate (LOP3);
    a conversion instruction runs at a quarter of it. At lower places float32 sums of these fractions would lose too
    much of n. `one` holds the bits of 1.0, and is an argument because the compiler makes two operations of LOP3's two
    constants.
    """
    PLACE: tl.constexpr = 15 + 4 * (k % 2)
    SHIFT: tl.constexpr = 4 * k - PLACE
    word = word >> SHIFT if SHIFT > 0 else word << -SHIFT
    return ((word & (15 << PLACE)) | one).to(tl.float32, bitcast=True)


@triton.jit
def add_products(acc, x, word, one):
    """acc[k] + x * the `fraction` of the k-th integer of each word, for all k."""
    out = ()
    for k in tl.static_range(8):
        out = out + (acc[k] + x * fraction(word, one, k),)  # noqa: RUF005 (Triton knows no stars)
    return out


@triton.jit
def joined(acc, ones, low):
    """The sums of x * integer, plus `low`, in the outputs' order, from those of x * fraction and `ones`, that of x."""
    s = ()
    for k in tl.static_range(8):
        s = s + ((acc[k] - ones) * 2.0 ** (8 - 4 * (k % 2)) + low,)  # noqa: RUF005
    even = tl.interleave(tl.interleave(s[0], s[4]), tl.interleave(s[2], s[6]))
    odd = tl.interleave(tl.interleave(s[1], s[5]), tl.interleave(s[3], s[7]))
    return tl.interleave(even, odd)


@triton.jit
def lowest_bit(bits):
    """Index of the lowest bit set of an int32; below 0 for 0."""
    low = (bits & -bits).to(tl.uint32).to(tl.float32)
    return (low.to(tl.int32, bitcast=True) >> 23) - 127


# ---- the product


@triton.jit
def snap(x, fineness):
    """x float32 rounded to a multiple of 1 / fineness, a power of two: see `kernels.grids`."""
    spacing = (0x7F000000 - fineness.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)  # 1 / fineness, exactly
    return tl.floor(x * fineness + 0.5) * spacing


@triton.jit
def outputs_of_tile(tile, tiles_1, tiles_2, start_1, start_2, n_out, BLOCK_OUT: tl.constexpr):
    """Segment of a tile, its first output, and the end of its segment's outputs."""
    in_1, in_2 = (tile >= tiles_1).to(tl.int32), (tile >= tiles_2).to(tl.int32)
    first = tl.where(in_2 > 0, start_2, tl.where(in_1 > 0, start_1, 0))
    last = tl.where(in_2 > 0, n_out, tl.where(in_1 > 0, start_2, start_1))
    first += (tile - tl.where(in_2 > 0, tiles_2, tl.where(in_1 > 0, tiles_1, 0))) * BLOCK_OUT
    return in_1 + in_2, first, last


@triton.jit
def _add_kept_rows(
    # sums of the tile so far, see `add_products`
    acc, ones, low,
    # the block's inputs, its rows, and the end of the tile's segment of outputs
    x, keep, weight_ptr, weight_scale_ptr, n_out, first, last, one,
    OP: tl.constexpr, PLAN: tl.constexpr,
):
    """Adds the block's kept rows, some at a time, each loaded by the whole warp; a cut row costs no instruction."""
    PACK: tl.constexpr = OP.pack
    WORDS: tl.constexpr = PLAN.block_out // PACK
    ROWS: tl.constexpr = PLAN.rows
    words = first // PACK + tl.arange(0, WORDS)
    lane = tl.arange(0, BLOCK)
    kept = tl.sum(keep.to(tl.int32) << lane, axis=0)
    while kept != 0:
        for _row in tl.static_range(ROWS):
            i = lowest_bit(kept)
            x_i = tl.sum(tl.where(lane == i, x.to(tl.int32, bitcast=True), 0), axis=0)
            x_i = x_i.to(tl.float32, bitcast=True)
            mask = words < tl.where(kept != 0, last // PACK, 0)
            at = weight_ptr + i * (n_out // PACK) + words
            word = tl.load(at, mask=mask, other=0, eviction_policy="evict_first")

            # two bfloat16, a scale and a minimum, for two words
            pairs = first // (2 * PACK) + tl.arange(0, WORDS // 2)
            at = weight_scale_ptr + i * (n_out // OP.groupsize) + pairs * (2 * PACK) // OP.groupsize
            pair = tl.load(at, mask=pairs < tl.where(kept != 0, last // (2 * PACK), 0), other=0)
            low += x_i * (pair & -65536).to(tl.float32, bitcast=True)
            x_i *= (pair << 16).to(tl.float32, bitcast=True)
            ones += x_i
            acc = add_products(acc, tl.interleave(x_i, x_i), word, one)
            kept = kept & (kept - 1)
    return acc, ones, low


@triton.jit
def _masked_sum(x, keep, weight_ptr, n_out, cols, in_cols):
    """The block's sum by a tile that is loaded at once, its cut rows masked."""
    mask = keep[:, None] & in_cols[None, :]
    offsets = tl.arange(0, BLOCK)[:, None] * n_out + cols[None, :]
    weight = tl.load(weight_ptr + offsets, mask=mask, other=0.0, eviction_policy="evict_first")
    return tl.sum(x[:, None] * weight.to(tl.float32), axis=0)


@triton.jit
def _gemv_kernel(
    # read and written
    x_ptr, gain_ptr, weight_ptr, threshold_ptr, out_ptr, zero_ptr, last_rstd_ptr, offset_ptr, weight_scale_ptr,
    fineness_ptr,
    # sizes; tiles_i and start_i: first tile and first output of segment i
    n_out, x_stride, out_stride, n_zero, tiles_1, tiles_2, start_1, start_2,
    # the norm's epsilon, and the bits of 1.0, see `fraction`
    eps, one,
    # compiled in; ZERO: how much of zero_ptr each program fills
    OP: tl.constexpr, PLAN: tl.constexpr, ZERO: tl.constexpr, PDL: tl.constexpr,
):
    """out += m (W^T cut(x - shift) + offset): a program takes PLAN.blocks of inputs, a tile of outputs, a row of x.

    What a program adds lies on the outputs' grid, so that the order in which programs add changes nothing. int4 comes
    as int32 words of eight outputs, by row. int8 and 16 bits have kernels of their own, `kernels.int8_mma` and
    `kernels.half_mma`, of which this one takes segments that 8 does not divide.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    PACK: tl.constexpr = OP.pack
    BLOCKS: tl.constexpr = PLAN.blocks
    BLOCK_OUT: tl.constexpr = PLAN.block_out
    tl.static_assert((PACK > 1) == (PLAN.rows > 0))

    # the program's tile: inputs from `row` on, outputs from `first` on
    tile = tl.program_id(0)
    program = tl.program_id(1) * tl.num_programs(0) + tile
    x_ptr += tl.program_id(2) * x_stride
    out_ptr += tl.program_id(2) * out_stride
    segment, first, last = outputs_of_tile(tile, tiles_1, tiles_2, start_1, start_2, n_out, BLOCK_OUT)
    threshold_ptr += segment * (2 * OP.n_in if OP.shift else OP.n_in)
    cols = first + tl.arange(0, BLOCK_OUT)
    in_cols = cols < last
    row = tl.program_id(1) * BLOCKS * BLOCK
    n_words = n_out // PACK

    # before the wait: what no launch of this step writes, and rows that a guess from x as it is now names
    rows = row + tl.arange(0, BLOCK)
    last_rstd = 1.0
    if PLAN.guess and OP.prologue == "norm":
        last_rstd = tl.load(last_rstd_ptr)
    constants = load_constants(rows, gain_ptr, threshold_ptr, OP)
    if PLAN.prefetch > 0:
        if program < PLAN.prefetch:
            prefetch_tile(
                rows, constants, first, n_words,
                x_ptr, gain_ptr, threshold_ptr, last_rstd, weight_ptr, OP, PLAN,
            )
    # a small product would wait for its offsets and grid at the end: 4 to 7 % of SmolLM2-135M's step (H100). A larger
    # tile has no registers to hold the grid
    offset = tl.zeros((BLOCK_OUT,), tl.float32)
    fineness = offset
    EARLY: tl.constexpr = BLOCK_OUT <= 64
    if fineness_ptr is not None and EARLY:
        fineness = tl.load(fineness_ptr + cols, mask=in_cols, other=1.0)
    if offset_ptr is not None:
        if tl.program_id(1) == 0:
            offset = tl.load(offset_ptr + cols, mask=in_cols, other=0.0)

    # the launch before has ended
    if PDL:
        tl.extra.cuda.gdc_wait()
    if ZERO > 0:
        z = program * ZERO + tl.arange(0, ZERO)
        tl.store(zero_ptr + z, tl.zeros((ZERO,), tl.float32), mask=z < n_zero)
    operands = load_inputs(rows, x_ptr, OP, "")
    rstd = 1.0
    if OP.prologue == "norm":
        rstd = shared_rstd(out_ptr + n_out, program, x_ptr, eps, OP.n_in)
        if PLAN.guess:
            if program == 0:
                tl.store(last_rstd_ptr, rstd)

    # sums of x times weight, of every output that a word holds; int4's scales lie beside the rows
    acc = (tl.zeros((BLOCK_OUT // PACK,), tl.float32),) * PACK
    weight_ptr += row.to(tl.int64) * n_words
    ones, low = 0.0, 0.0
    if OP.bits == 4:
        ones = tl.zeros((BLOCK_OUT // (2 * PACK),), tl.float32)
        low = ones
        weight_scale_ptr += row.to(tl.int64) * (n_out // OP.groupsize)

    for _block in tl.static_range(BLOCKS):
        x, keep = inputs(rows, operands, constants, rstd, OP)
        if BLOCKS > 1:  # the next block's inputs come while this one's weights do
            rows += BLOCK
            operands = load_inputs(rows, x_ptr, OP, "")
            constants = load_constants(rows, gain_ptr, threshold_ptr, OP)

        if PLAN.rows > 0:
            acc, ones, low = _add_kept_rows(
                acc, ones, low, x, keep, weight_ptr, weight_scale_ptr, n_out, first, last, one, OP, PLAN
            )
        else:
            x = tl.where(keep, x, 0.0) if OP.cut else x
            acc = (acc[0] + _masked_sum(x, keep, weight_ptr, n_out, cols, in_cols),)
        weight_ptr += BLOCK * n_words
        if OP.bits == 4:
            weight_scale_ptr += BLOCK * (n_out // OP.groupsize)

    # the sums of the outputs in their order; the first row of programs adds the offsets
    total = acc[0]
    if OP.bits == 4:
        total = joined(acc, tl.interleave(ones, ones), tl.interleave(low, low))
    if offset_ptr is not None:
        total += offset
    if OP.multiplier != 1.0:
        total *= OP.multiplier
    if fineness_ptr is not None:
        if not EARLY:
            fineness = tl.load(fineness_ptr + cols, mask=in_cols, other=1.0)
        total = snap(total, fineness)
    tl.atomic_add(out_ptr + cols, total, mask=in_cols, sem="relaxed")


# ---- launching it


class Product(NamedTuple):
    """What a product multiplies with, the same at every token.

    weight: [in, out], contiguous, of a `kernels.quantized.Form`, as its weight_scale.
    threshold: [S, in], float32; with shifts [S, in, 2]: threshold and shift of each input.
    segments: widths of the S output segments, which add up to out.
    sparsity: about the share that the thresholds cut, which chooses the plan; 0 compiles the test out.
    offset: [out], float32, what is added to a product, the shifts' product and a bias; or None.
    fineness: [out], float32, of the outputs' grid, see `kernels.grids`; None: sums depend on the order of the programs.
    multiplier: of the product, the offset included.
    whole: inputs and segments of the weight that this one is a rank's part of; None: it is no part.
    """

    weight: Tensor
    threshold: Tensor
    segments: list[int]
    sparsity: float = 0.5
    weight_scale: Tensor | None = None
    offset: Tensor | None = None
    fineness: Tensor | None = None
    multiplier: float = 1.0
    whole: tuple[int, list[int]] | None = None

    @property
    def form(self) -> Form:
        return form_of(self.weight, self.weight_scale)

    def plan(self, prologue: str, dependent: bool, last_rstd: bool = True) -> Plan:
        """See `plan_for`. A part's sums are those of the whole, so that any number of ranks gets the same bits."""
        shape = self.whole or (len(self.weight), self.segments)
        return plan_for(prologue, *shape, self.sparsity, self.form, dependent, last_rstd, self.segments)

    def operation(self, prologue: str, dtype: torch.dtype) -> Operation:
        """What a launch with this prologue computes, in the model's dtype."""
        operation, bits = operation_of(prologue, len(self.weight), dtype), self.form.bits
        cut, shift, pack = self.sparsity > 0, self.threshold.dim() == 3, 8 if bits in (4, 12) else 1
        operation = operation._replace(cut=cut, shift=shift, bits=bits, pack=pack)
        return operation._replace(groupsize=self.form.groupsize, multiplier=self.multiplier)

    def check(self) -> None:
        """Asserts what the kernel relies on."""
        n_in, n_out, form = len(self.weight), sum(self.segments), self.form
        assert self.threshold.shape in {(len(self.segments), n_in), (len(self.segments), n_in, 2)}
        assert self.threshold.is_contiguous() and len(self.segments) <= MAX_SEGMENTS
        assert self.weight.is_contiguous() and 8 * self.weight.nbytes == form.bits * n_in * n_out
        if form.name != "none":
            assert all(width * form.bits % 32 == 0 for width in self.segments) and self.weight_scale.is_contiguous()
        if form.name == "packed":
            assert all(width % GROUP == 0 for width in self.segments) and self.weight_scale.dtype == torch.int32
        if form.name == "int4":
            assert form.groupsize % 16 == 0 and all(width % form.groupsize == 0 for width in self.segments)


class Norm(NamedTuple):
    """An RMSNorm: gain [in] in the model's dtype, eps, and its rstd at the last token, [1] float32.

    last_rstd is kept from launch to launch. The rows that it would keep are prefetched before the new one is known;
    without it no row of a cut product is.
    """

    gain: Tensor
    eps: float
    last_rstd: Tensor | None = None


def starts_of(widths: list[int]) -> list[int]:
    """Where each segment starts and the last one ends, the end repeated up to MAX_SEGMENTS."""
    starts = [0, *accumulate(widths)]
    return starts + starts[-1:] * (MAX_SEGMENTS - len(widths))


def launch_gemv(
    prologue: str, x: Tensor, product: Product, out: Tensor, *,
    norm: Norm | None = None, zero: Tensor | None = None, dtype: torch.dtype | None = None, pdl: bool = False,
    plan: Plan | None = None,
) -> None:
    """Adds multiplier (W^T cut(x - shift) + offset) to `out`, with x made by the prologue, see `Operation`.

    x: "given" [B, in]; else float32: h [B, in] or gate|up [B, 2 in and room]. With `pdl` it is read before the launch
        before has ended, too, to guess what is kept: rows given are best kept in a buffer from step to step.
    out: [B, out and room], float32; with "norm" [B, out + RSTD_BUFFER], the rest zeros that take the norm's rstd.
    norm, zero: of the prologue "norm"; a float32 buffer to fill with zeros.
    dtype: in which the inputs are rounded and compared; the weight's, if that is a floating type.
    pdl, plan: programmatic dependent launch; a plan in place of `plan_for`'s.
    """
    product.check()
    assert product.form.name != "int8"
    weight, weight_scale, form, n_in = product.weight, product.weight_scale, product.form, len(product.weight)
    gain, eps, last_rstd = norm or (None, 0.0, None)
    if plan is None:
        plan = product.plan(prologue, pdl, last_rstd is not None)

    # the kernel takes int4, and its pairs of scale and minimum, as words of 32 bits
    if form.name == "int4":
        weight, weight_scale = weight.view(torch.int32), weight_scale.view(torch.int32)

    # one program per tile of outputs, blocks of inputs and row of x; together they fill `zero`
    starts = starts_of(product.segments)
    tiles = starts_of([triton.cdiv(width, plan.block_out) for width in product.segments])
    grid = (tiles[-1], triton.cdiv(n_in, BLOCK_IN * plan.blocks), len(x))
    n_zero = 0 if zero is None else zero.numel()
    zero_block = triton.next_power_of_2(triton.cdiv(n_zero, grid[0] * grid[1])) if n_zero else 0

    _gemv_kernel[grid](
        x, gain, weight, product.threshold, out, zero, last_rstd, product.offset, weight_scale,
        product.fineness,
        starts[-1], x.stride(0), out.stride(0), n_zero, *tiles[1:MAX_SEGMENTS], *starts[1:MAX_SEGMENTS], eps, ONE,
        OP=product.operation(prologue, dtype or weight.dtype), PLAN=plan, ZERO=zero_block, PDL=pdl,
        num_warps=1, launch_pdl=pdl, maxnreg=plan.registers,
    )
