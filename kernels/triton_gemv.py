"""The sparse product on a GPU, in Triton: one warp a tile of inputs x outputs, rows of cut inputs masked or skipped.

On an H100 many small programs that add their sums by atomics beat one program looping down a column strip, index lists
and larger tiles (benchmarks/NOTES.md). Neighbouring programs share inputs and differ in outputs, so that x stays in L1
and concurrent atomics meet different addresses: that order alone took 4096 -> 28672 at 50 % from 46.0 to 41.3 us.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_SEGMENTS = 3
SLOTS, SLOT_STRIDE = 64, 32  # copies of a norm's scale, one a cache line of 32 float32
SCALE_BUFFER = SLOTS * SLOT_STRIDE
ONE = 0x3F800000  # bits of 1.0, see `fraction`
RESIDENT = 2112  # programs of 128 registers that run at once on an H100: 16 on each of 132 multiprocessors
WIDE = 8192  # outputs beyond which a product has programs enough for 512 bytes of a row each
VERY_WIDE = 16384  # the same where cut rows are masked; by row, outputs beyond which two blocks a program pay
LARGE = 1 << 26  # weights from which on a product's rows are prefetched during attention
MOSTLY_CUT = 0.6  # sparsity from which on masked rows cost a wide product more time than a loop over the kept ones


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """float32 values as the model's dtype would hold them: inputs are compared with thresholds in that dtype."""
    return x.to(DTYPE).to(tl.float32)


@triton.jit
def shared_norm_scale(
    slots_ptr, program, h_ptr, eps, N: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr, STRIDE: tl.constexpr
):
    """RMSNorm's 1 / sqrt(mean(h^2) + eps) of h [N] float32: the first program computes it, the others wait for it.

    The slots hold 0 until then (zeroed by an earlier launch). They are many, a cache line each, since thousands of
    programs that poll one address queue for it: 4096 -> 6144 at 50 % took 13.5 us so, 12.7 us with 64 (H100).
    """
    if program == 0:
        squares = tl.zeros((BLOCK,), tl.float32)
        for start in tl.static_range(0, N, BLOCK):
            i = start + tl.arange(0, BLOCK)
            h = tl.load(h_ptr + i, mask=i < N, other=0.0)
            squares += h * h
        scale = tl.rsqrt(tl.sum(squares, axis=0) / N + eps)
        scale = tl.where(scale == 0.0, float("nan"), scale)  # infinite h: not a number, but not a hang
        tl.store(slots_ptr + tl.arange(0, SLOTS) * STRIDE, scale + tl.zeros((SLOTS,), tl.float32))
    slot = slots_ptr + (program % SLOTS) * STRIDE
    scale = tl.load(slot, volatile=True)
    while scale == 0.0:
        scale = tl.load(slot, volatile=True)
    return scale


@triton.jit
def _prefetch(rows_ptr, wanted, n_bytes):
    """Asks for n_bytes (a multiple of 16) at each wanted pointer, 16-byte aligned, to be brought into L2."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], $3; mov.u32 $0, 0; }",
        "=r,l,r,r", [rows_ptr.to(tl.int64), wanted.to(tl.int32), n_bytes], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _load_constants(
    rows, gain_ptr, threshold_ptr, PROLOGUE: tl.constexpr, CUT: tl.constexpr, SHIFT: tl.constexpr, N_IN: tl.constexpr
):
    """Of inputs `rows` what no launch writes, loaded: the norm's gain, the thresholds and the shifts, float32."""
    in_range = rows < N_IN
    gain = tl.zeros_like(rows).to(tl.float32)
    threshold, shift = gain, gain
    if PROLOGUE == "norm":
        gain = tl.load(gain_ptr + rows, mask=in_range, other=0.0).to(tl.float32)
    if SHIFT:
        pairs = 2 * rows[:, None] + tl.arange(0, 2)[None, :]
        threshold, shift = tl.split(tl.load(threshold_ptr + pairs, mask=in_range[:, None], other=0.0))
    elif CUT:
        threshold = tl.load(threshold_ptr + rows, mask=in_range, other=0.0)
    return gain, threshold, shift


@triton.jit
def _load_inputs(rows, x_ptr, PROLOGUE: tl.constexpr, N_IN: tl.constexpr, CACHE: tl.constexpr):
    """What else `_inputs` makes x[rows] from, loaded: two float32 operands.

    CACHE ".cg" leaves nothing in L1: what is read before the wait may change.
    """
    in_range = rows < N_IN
    a = tl.load(x_ptr + rows, mask=in_range, other=0.0, cache_modifier=CACHE).to(tl.float32)
    b = tl.zeros_like(a)
    if PROLOGUE == "silu":
        b = tl.load(x_ptr + N_IN + rows, mask=in_range, other=0.0, cache_modifier=CACHE)
    return a, b


@triton.jit
def _inputs(a, b, gain, scale, shift, PROLOGUE: tl.constexpr, SHIFT: tl.constexpr, DTYPE: tl.constexpr):
    """x - shift from its operands, float32, rounded where the unfused model rounds."""
    if PROLOGUE == "norm":
        a = rounded(rounded(a * scale, DTYPE) * gain, DTYPE)
    elif PROLOGUE == "silu":
        gate = rounded(a, DTYPE)
        a = rounded(rounded(gate * tl.sigmoid(gate), DTYPE) * rounded(b, DTYPE), DTYPE)
    if SHIFT:
        a = rounded(a - shift, DTYPE)
    return a


@triton.jit
def prefetch_gate_up(
    piece, h_ptr, gain_ptr, threshold_ptr, last_scale_ptr, weight_ptr, half_bytes,
    CUT: tl.constexpr, SHIFT: tl.constexpr, N_IN: tl.constexpr, ROWS: tl.constexpr, BYTES: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Prefetches, of ROWS rows of gate|up, BYTES of those that h and its norm's last scale keep.

    weight_ptr: uint8, a row is gate's half_bytes, then up's. piece: which part; neighbours are of the same rows.
    """
    pieces = tl.cdiv(half_bytes, BYTES)
    rows = piece // (2 * pieces) * ROWS + tl.arange(0, ROWS)
    up = piece // pieces % 2
    start = piece % pieces * BYTES
    wanted = rows < N_IN
    if CUT:
        threshold_ptr += up * (2 * N_IN if SHIFT else N_IN)
        gain, threshold, shift = _load_constants(rows, gain_ptr, threshold_ptr, "norm", CUT, SHIFT, N_IN)
        h, none = _load_inputs(rows, h_ptr, "norm", N_IN, ".cg")
        x = _inputs(h, none, gain, tl.load(last_scale_ptr), shift, "norm", SHIFT, DTYPE)
        wanted = wanted & ~(tl.abs(x) <= threshold)
    rows_ptr = weight_ptr + rows.to(tl.int64) * (2 * half_bytes) + up * half_bytes + start
    _prefetch(rows_ptr, wanted, tl.minimum(half_bytes - start, BYTES))


@triton.jit
def fraction(word, one, k: tl.constexpr, BITS: tl.constexpr):
    """1 + n / 2^(23 - PLACE) as float32, n the k-th integer of BITS 4 or 8 in int32 words: it becomes the mantissa.

    A shift (for every two integers of 4 bits) and one operation at the full rate (LOP3), where a conversion instruction
    runs at a quarter of it. At lower places float32 sums of 1 + n / 2^(23 - PLACE) would lose too much of n. `one` is
    the bit pattern of 1.0, no constant for the compiler, which makes two operations of it then.
    """
    PLACE: tl.constexpr = 15 + BITS % 8 * (k % 2)
    SHIFT: tl.constexpr = k * BITS - PLACE
    word = word >> SHIFT if SHIFT > 0 else word << -SHIFT
    return ((word & (((1 << BITS) - 1) << PLACE)) | one).to(tl.float32, bitcast=True)


@triton.jit
def _add_products(acc, x, word, one, BITS: tl.constexpr):
    """acc[k] + x times the `fraction` of the k-th integer of each word, for all k."""
    out = ()
    for k in tl.static_range(32 // BITS):
        out = out + (acc[k] + x * fraction(word, one, k, BITS),)  # noqa: RUF005 (Triton knows no stars)
    return out


@triton.jit
def _sum_of(acc, ones, low, k: tl.constexpr, BITS: tl.constexpr):
    return (acc[k] - ones) * 2.0 ** (8 - BITS % 8 * (k % 2)) + low


@triton.jit
def _joined(acc, ones, low, BITS: tl.constexpr):
    """The sums of x times integer, `low` added, of all integers of the words in their order; `ones`: the sum of x."""
    if BITS == 8:
        even = tl.interleave(_sum_of(acc, ones, low, 0, BITS), _sum_of(acc, ones, low, 2, BITS))
        odd = tl.interleave(_sum_of(acc, ones, low, 1, BITS), _sum_of(acc, ones, low, 3, BITS))
    else:
        even = tl.interleave(
            tl.interleave(_sum_of(acc, ones, low, 0, BITS), _sum_of(acc, ones, low, 4, BITS)),
            tl.interleave(_sum_of(acc, ones, low, 2, BITS), _sum_of(acc, ones, low, 6, BITS)),
        )
        odd = tl.interleave(
            tl.interleave(_sum_of(acc, ones, low, 1, BITS), _sum_of(acc, ones, low, 5, BITS)),
            tl.interleave(_sum_of(acc, ones, low, 3, BITS), _sum_of(acc, ones, low, 7, BITS)),
        )
    return tl.interleave(even, odd)


@triton.jit
def _lowest_bit(bits):
    """Index of the lowest bit set of an int32; of 0 something below 0."""
    low = (bits & -bits).to(tl.uint32).to(tl.float32)
    return (low.to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def _gemv_kernel(
    x_ptr, gain_ptr, weight_ptr, threshold_ptr, out_ptr, zero_ptr, last_scale_ptr, offset_ptr, weight_scale_ptr,
    n_out, n_zero, tiles_1, tiles_2, start_1, start_2, eps, one,
    PROLOGUE: tl.constexpr, CUT: tl.constexpr, SHIFT: tl.constexpr, N_IN: tl.constexpr, NORM_BLOCK: tl.constexpr,
    BLOCK_IN: tl.constexpr, BLOCKS: tl.constexpr, UNROLL: tl.constexpr, BLOCK_OUT: tl.constexpr, ROWS: tl.constexpr,
    ZERO: tl.constexpr, PREFETCH: tl.constexpr, AHEAD: tl.constexpr, GUESS: tl.constexpr, RAGGED: tl.constexpr,
    SLOTS: tl.constexpr, STRIDE: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, DTYPE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out += W^T cut(x - shift) + offset: a program for BLOCKS blocks of inputs, one tile of outputs, one row of x.

    PROLOGUE says what x is: "given"; "norm": RMSNorm of h; "silu": SiLU(gate) * up. tiles_i, start_i: first tile and
    first output of segment i.
    ROWS > 0 (blocks of 32 inputs): a loop over the bits of the block's kept inputs, ROWS at a time, a tile's part of a
    row by the whole warp; a cut row costs no instruction. ROWS 0: a tile is loaded at once with its cut rows masked,
    which costs fewer latencies. Weights of BITS 8 or 4 come as int32 words of four or eight outputs, by row only.
    PREFETCH, AHEAD, GUESS: see `prefetch_for`. RAGGED: some tile reaches past its segment, and is not prefetched.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    tile = tl.program_id(0)
    program = tl.program_id(1) * tl.num_programs(0) + tile
    x_ptr += tl.program_id(2) * N_IN
    out_ptr += tl.program_id(2) * n_out
    in_1, in_2 = (tile >= tiles_1).to(tl.int32), (tile >= tiles_2).to(tl.int32)
    first = tl.where(in_2 > 0, start_2, tl.where(in_1 > 0, start_1, 0))
    last = tl.where(in_2 > 0, n_out, tl.where(in_1 > 0, start_2, start_1))
    first += (tile - tl.where(in_2 > 0, tiles_2, tl.where(in_1 > 0, tiles_1, 0))) * BLOCK_OUT
    threshold_ptr += (in_1 + in_2) * (2 * N_IN if SHIFT else N_IN)
    cols = first + tl.arange(0, BLOCK_OUT)
    in_cols = cols < last
    row = tl.program_id(1) * BLOCKS * BLOCK_IN
    PACK: tl.constexpr = weight_ptr.dtype.element_ty.primitive_bitwidth // BITS
    TILE_BYTES: tl.constexpr = BLOCK_OUT * BITS // 8
    tl.static_assert(PREFETCH == 0 or TILE_BYTES % 16 == 0)
    n_words = n_out // PACK  # a word is PACK outputs
    tl.static_assert(PACK == 1 or ROWS > 0)
    rows = row + tl.arange(0, BLOCK_IN)
    last_scale = 1.0
    if GUESS and PROLOGUE == "norm":
        last_scale = tl.load(last_scale_ptr)
    gain, threshold, shift = _load_constants(rows, gain_ptr, threshold_ptr, PROLOGUE, CUT, SHIFT, N_IN)
    if PREFETCH > 0:
        if program < PREFETCH:
            for block in tl.static_range(AHEAD):
                ahead = rows + block * BLOCK_IN
                wanted = ahead < N_IN
                if RAGGED:
                    wanted = wanted & (first + BLOCK_OUT <= last)
                if GUESS:
                    g, t, s = gain, threshold, shift
                    if block > 0:
                        g, t, s = _load_constants(ahead, gain_ptr, threshold_ptr, PROLOGUE, CUT, SHIFT, N_IN)
                    a, b = _load_inputs(ahead, x_ptr, PROLOGUE, N_IN, ".cg")
                    wanted = wanted & ~(tl.abs(_inputs(a, b, g, last_scale, s, PROLOGUE, SHIFT, DTYPE)) <= t)
                _prefetch(weight_ptr + ahead.to(tl.int64) * n_words + first // PACK, wanted, TILE_BYTES)
    # a small product would wait for its offsets at the end: 4 to 7 % of SmolLM2-135M's step; with integers 1 to 3 %,
    # and 0.4 to 1.4 % more where they are loaded here (H100)
    EARLY: tl.constexpr = SHIFT and BITS >= 16 and BLOCK_OUT <= 64
    offset = tl.zeros((BLOCK_OUT,), tl.float32)
    if EARLY:
        if tl.program_id(1) == 0:
            offset = tl.load(offset_ptr + cols, mask=in_cols, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    if ZERO > 0:
        z = program * ZERO + tl.arange(0, ZERO)
        tl.store(zero_ptr + z, tl.zeros((ZERO,), tl.float32), mask=z < n_zero)
    a, b = _load_inputs(rows, x_ptr, PROLOGUE, N_IN, "")
    scale = 1.0
    if PROLOGUE == "norm":
        scale = shared_norm_scale(out_ptr + n_out, program, x_ptr, eps, N_IN, NORM_BLOCK, SLOTS, STRIDE)
        if GUESS:
            if program == 0:
                tl.store(last_scale_ptr, scale)
    words = first // PACK + tl.arange(0, BLOCK_OUT // PACK)
    acc = (tl.zeros((BLOCK_OUT // PACK,), tl.float32),) * PACK
    weight_ptr += row.to(tl.int64) * n_words
    ones = 0.0
    if BITS == 4:
        pairs = first // (2 * PACK) + tl.arange(0, BLOCK_OUT // (2 * PACK))
        ones = tl.zeros((BLOCK_OUT // (2 * PACK),), tl.float32)
        low = ones
        n_groups = n_out // GROUP
        weight_scale_ptr += row.to(tl.int64) * n_groups
    lane = tl.arange(0, BLOCK_IN)
    for _group in range(0, BLOCKS, UNROLL):
        for _block in tl.static_range(UNROLL):
            keep = rows < N_IN
            x = _inputs(a, b, gain, scale, shift, PROLOGUE, SHIFT, DTYPE)
            if CUT:
                keep = keep & ~(tl.abs(x) <= threshold)
            if BLOCKS > 1:
                rows += BLOCK_IN  # the next block's inputs come while this one's weights do
                a, b = _load_inputs(rows, x_ptr, PROLOGUE, N_IN, "")
                gain, threshold, shift = _load_constants(rows, gain_ptr, threshold_ptr, PROLOGUE, CUT, SHIFT, N_IN)
            if ROWS > 0:
                kept = tl.sum(keep.to(tl.int32) << lane, axis=0)
                while kept != 0:
                    for _row in tl.static_range(ROWS):
                        i = _lowest_bit(kept)
                        x_i = tl.sum(tl.where(lane == i, x.to(tl.int32, bitcast=True), 0), axis=0)
                        x_i = x_i.to(tl.float32, bitcast=True)
                        mask = words < tl.where(kept != 0, last // PACK, 0)
                        word = tl.load(
                            weight_ptr + i * n_words + words, mask=mask, other=0, eviction_policy="evict_first"
                        )
                        if BITS >= 16:
                            acc = (acc[0] + x_i * word.to(tl.float32),)
                        elif BITS == 8:  # the sign's bit flipped: 128 too large
                            ones += x_i
                            acc = _add_products(acc, x_i, word ^ -0x7F7F7F80, one, BITS)
                        else:  # two bfloat16, a scale and a minimum, for two words
                            mask = pairs < tl.where(kept != 0, last // (2 * PACK), 0)
                            pair = weight_scale_ptr + i * n_groups + pairs * (2 * PACK) // GROUP
                            pair = tl.load(pair, mask=mask, other=0)
                            low += x_i * (pair & -65536).to(tl.float32, bitcast=True)
                            x_i *= (pair << 16).to(tl.float32, bitcast=True)
                            ones += x_i
                            acc = _add_products(acc, tl.interleave(x_i, x_i), word, one, BITS)
                        kept = kept & (kept - 1)
            else:
                if CUT:
                    x = tl.where(keep, x, 0.0)
                mask = keep[:, None] & in_cols[None, :]
                offsets = lane[:, None] * n_out + cols[None, :]
                weight = tl.load(weight_ptr + offsets, mask=mask, other=0.0, eviction_policy="evict_first")
                acc = (acc[0] + tl.sum(x[:, None] * weight.to(tl.float32), axis=0),)
            weight_ptr += BLOCK_IN * n_words
            if BITS == 4:
                weight_scale_ptr += BLOCK_IN * n_groups
    if BITS == 4:
        total = _joined(acc, tl.interleave(ones, ones), tl.interleave(low, low), BITS)
    elif BITS == 8:
        total = _joined(acc, ones, -128 * ones, BITS)
        total *= tl.load(weight_scale_ptr + cols, mask=in_cols, other=0.0)
    else:
        total = acc[0]
    if EARLY:
        total += offset
    elif SHIFT:
        if tl.program_id(1) == 0:
            total += tl.load(offset_ptr + cols, mask=in_cols, other=0.0)
    tl.atomic_add(out_ptr + cols, total, mask=in_cols, sem="relaxed")


def tile_for(prologue: str, n_in: int, n_out: int, sparsity: float, bits: int) -> tuple[int, int, int, int]:
    """(BLOCK_IN, BLOCKS, BLOCK_OUT, ROWS) of a product, measured on an H100 at 0 to 65 %, cold L2.

    A wide product has programs enough for 512 bytes of a row each (bfloat16), a narrow one, or one of up to VERY_WIDE
    outputs whose cut rows are masked, gains from more of them and from fewer atomics. 4096 -> 28672 at 65 % took 38.5
    us with 128 outputs a program, 32.6 with 256 and 31.8 by row; at 25 % 60.2, 60.2 and 62.0. By row gate/up gains from
    two blocks, llama-3-8b's step at 65 % 1.1 %; llama-2-7b's qkv, 4096 -> 12288, as a narrow product makes its step 0.6
    % shorter at 50 %. int8 and int4 go by row: converting rows that are not needed costs what skipping saves.
    Three blocks where that lets all programs run at once: 4096 -> 6144 at 50 % 9.4 us, 10.2 with two, of which some
    wait for others to end. With x given smaller programs are better: 4096 -> 28672 39.0 instead of 39.4 us.
    A small product gains from programs that end soon, as long as all run at once (of x's row): SmolLM2-135M's step
    takes 0.42 ms with tiles of 32 x 64, 0.46 with 32 x 128, 0.58 with two blocks of those. Beyond half of what fits 64
    outputs gain nothing more, and with int4 128 lose to 512.
    Deterministic, a program takes all inputs: one sum, one order.
    """
    if torch.are_deterministic_algorithms_enabled():
        return 32, triton.cdiv(n_in, 32), 128, 4 if bits < 16 else 0
    wide = n_out > WIDE or (bits >= 16 and not sparsity and n_out > 4096)
    rows = 0 if bits >= 16 else 4 if sparsity else 16
    blocks, tiles = triton.cdiv(n_in, 32), triton.cdiv(n_out, 128)
    if not wide:
        if blocks * triton.cdiv(n_out, 64) <= RESIDENT // 2:
            return 32, 1, 64, rows
        if blocks * tiles <= RESIDENT and bits > 4:
            return 32, 1, 128, rows
    given = prologue == "given"
    if bits < 16 and not sparsity:
        return 32, 1, 1024 if bits == 4 and wide else 256, rows
    if bits == 4:
        return 32, 1, 512, rows
    if bits == 8:
        return (32, 2, 512, rows) if wide and not given else (32, 2 if n_in > 8192 else 1, 256, rows)
    if wide:
        if sparsity > MOSTLY_CUT:
            return 32, 1 if given or n_out <= VERY_WIDE else 2, 256, 16
        if given and sparsity:
            return 32, 1, 128, 0
        if not sparsity or n_out > VERY_WIDE:
            return 32, 1, 256, 0
    three = tiles * triton.cdiv(blocks, 2) > RESIDENT >= tiles * triton.cdiv(blocks, 3)
    return 32, 3 if three and sparsity and prologue != "silu" else 2, 128, 0


def registers_for(prologue: str, sparsity: float, bits: int, tile: tuple[int, int, int, int]) -> int | None:
    """Most registers a thread, where the compiler's own choice measures worse (NOTES.md).

    Of products by row and of dense ones it takes 64, so that 32 programs fit a multiprocessor. With more, a program has
    more loads in flight, and the norm's scale, for which all others wait, comes sooner.
    """
    _, blocks, block_out, rows = tile
    if bits > 16:
        return None
    if not sparsity:
        if bits < 16:
            return None if block_out > 512 else 80 if bits == 8 else 72
        return 128 if blocks > 1 else None
    if rows:
        return (72 if bits < 16 else 96) if prologue == "norm" else None
    return 128 if prologue == "given" and blocks == 3 else None  # 134 by itself, of which not `RESIDENT` programs fit


def prefetch_for(prologue: str, n_out: int, sparsity: float, bits: int, blocks: int) -> tuple[int, int, bool]:
    """What is prefetched before a launch waits for the one before: how many of its first programs ask for rows, of how
    many of their blocks, and whether only for those that they guess to be kept.

    The memory is idle then. A guess comes from x as it is at that moment: from what the launch before has added up so
    far, or, given (o's x comes at once, at the end), from the last token's. All rows are fetched where all are needed,
    and before o and down with integers, where a guess costs what it saves. Measured on an H100 (NOTES.md).
    """
    if not sparsity:
        return 528, 1, False
    if prologue != "norm" and bits < 16:
        return 264, 1, False
    if prologue == "given":
        return 1320, max(1, blocks - 1), True
    if prologue == "silu" or (n_out > VERY_WIDE and sparsity > MOSTLY_CUT):
        return 2112, 1, True
    if bits >= 16:
        return 528, blocks, True
    return 1056 if n_out > VERY_WIDE else 264, blocks, True


def rows_ahead(n_in: int, n_out: int, sparsity: float, bits: int) -> int:
    """Of how many of gate/up's rows those guessed to be kept are prefetched during attention, a multiple of 128.

    Measured on an H100: llama-3-8b's step 1.0, 1.4 and 1.4 % shorter at 40, 50 and 65 %, llama-2-7b's 1.1 and 1.2 at 50
    and 65 %, dense 0.8; small models' up to 1.6 % longer, int8's and int4's level (NOTES.md).
    """
    if bits < 16 or n_in * n_out < LARGE:
        return 0
    return 768 if sparsity else 256


def launch_gemv(
    prologue: str, x: Tensor, weight: Tensor, threshold: Tensor, out: Tensor, segments: list[int], *, sparsity=0.5,
    dtype=None, weight_scale=None, offset=None, gain=None, eps=0.0, zero=None, last_scale=None,
    tile=None, pdl=False,
) -> None:  # fmt: skip
    """Adds W^T cut(x - shift) + offset to `out`, with x made by the prologue (see the kernel).

    Args:
        x: "given" [B, in]; else one row, float32: h [in] or gate|up [2 in]. With `pdl` it is read before the launch
            before has ended, too, to guess what is kept: rows given are best kept in a buffer from step to step.
        weight, segments: as of `kernels.sparse_gemv.sparse_gemv`.
        threshold: [S, in], as there; with an offset [S, in, 2], threshold and shift of each input. Float32.
        out: [B, out], float32; with "norm" [out + SCALE_BUFFER], the rest zeros that take the norm's scale.
        sparsity: about the share that the thresholds cut, which chooses tile and prefetch; 0 compiles the test out.
        dtype: in which the inputs are rounded and compared; the weight's, if that is a floating type.
        weight_scale: of an int8 weight [out] float32, of an int4 one [in, groups, 2] bfloat16; see `sparse_gemv`.
        offset: [out], float32, or None: no shifts.
        gain, eps: RMSNorm's, [in] in the model's dtype.
        zero: a float32 buffer to fill with zeros.
        last_scale: "norm": [1] float32, this norm's scale at the last step, kept from launch to launch. The rows that
            it would keep are prefetched before the new scale is known; without it none of a cut product's are.
        tile: in place of `tile_for`'s.
        pdl: programmatic dependent launch.
    """
    n_in, n_out = weight.shape[0], sum(segments)
    bits = 8 * weight.nbytes // (n_in * n_out)
    assert threshold.shape == (len(segments), n_in) + (() if offset is None else (2,)) and threshold.is_contiguous()
    assert len(segments) <= MAX_SEGMENTS and weight.is_contiguous() and 8 * weight.nbytes == bits * n_in * n_out
    group = 0
    if bits < 16:
        assert all(width * bits % 32 == 0 for width in segments) and weight_scale.is_contiguous()
        weight = weight.view(torch.int32)
    if bits == 4:
        group = n_out // weight_scale.shape[1]
        assert group % 16 == 0 and all(width % group == 0 for width in segments)
        weight_scale = weight_scale.view(torch.int32)
    block_in, blocks, block_out, rows = tile or tile_for(prologue, n_in, n_out, sparsity, bits)
    common = math.gcd(*segments)
    aligned = common % 128 == 0
    # tiles that divide every segment can all be prefetched; int4's would be short and llama-2-7b's step 4 to 6 % longer
    if pdl and not tile and aligned and not (bits == 4 and n_out > WIDE):
        block_out = min(block_out, common & -common)
    ragged = common % block_out > 0
    tiles, starts = [0], [0]
    for width in segments:
        tiles.append(tiles[-1] + triton.cdiv(width, block_out))
        starts.append(starts[-1] + width)
    pad = MAX_SEGMENTS - len(segments)
    tiles, starts = tiles + tiles[-1:] * pad, starts + starts[-1:] * pad
    batch = x.shape[0] if prologue == "given" else 1
    grid = (tiles[-1], triton.cdiv(n_in, block_in * blocks), batch)
    # a deterministic tile has all blocks, too many to unroll
    prefetch, ahead, guess = prefetch_for(prologue, n_out, sparsity, bits, min(blocks, 3))
    unknown = guess and prologue == "norm" and last_scale is None
    if not pdl or unknown or (ragged and not aligned):
        prefetch, ahead, guess = 0, 0, False
    n_zero = 0 if zero is None else zero.numel()
    zero_block = triton.next_power_of_2(triton.cdiv(n_zero, grid[0] * grid[1])) if n_zero else 0
    _gemv_kernel[grid](
        x, gain, weight, threshold, out, zero, last_scale, offset, weight_scale,
        n_out, n_zero, tiles[1], tiles[2], starts[1], starts[2], eps, ONE,
        PROLOGUE=prologue, CUT=sparsity > 0, SHIFT=offset is not None, N_IN=n_in,
        NORM_BLOCK=min(4096, triton.next_power_of_2(n_in)), BLOCK_IN=block_in, BLOCKS=blocks,
        UNROLL=blocks if blocks < 4 else math.gcd(blocks, 4), BLOCK_OUT=block_out, ROWS=rows, ZERO=zero_block,
        PREFETCH=prefetch, AHEAD=ahead, GUESS=guess, RAGGED=ragged and prefetch > 0, SLOTS=SLOTS,
        STRIDE=SLOT_STRIDE, BITS=bits, GROUP=group, PDL=pdl, num_warps=1, launch_pdl=pdl,
        DTYPE=getattr(tl, str(dtype or weight.dtype).removeprefix("torch.")),
        maxnreg=registers_for(prologue, sparsity, bits, (block_in, blocks, block_out, rows)),
    )  # fmt: skip


def launch_sparse_gemv(
    x: Tensor, weight: Tensor, threshold: Tensor, segments: list[int], scale: Tensor | None = None
) -> Tensor:
    """The launcher behind `kernels.sparse_gemv.sparse_gemv`; same arguments and result."""
    out = torch.zeros(x.shape[0], sum(segments), device=x.device, dtype=torch.float32)
    launch_gemv("given", x.contiguous(), weight, threshold, out, segments, dtype=x.dtype, weight_scale=scale)
    return out.to(x.dtype)
