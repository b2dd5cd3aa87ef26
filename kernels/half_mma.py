"""Products of 16-bit weights on a GPU: exact products, sums in float32 on the tensor cores. 1 to 8 rows of x.

A program is one warp. It takes PLAN.blocks of 32 inputs and a tile of 64 or 128 outputs, in pieces of 64. The tensor
core multiplies A [16 x 16] with B [16 x 8]. A word of W [in, out] is 2 outputs of one input, and the 4 words that a
lane loads at once are its part of A as they come:

    lane 4 g + t loads outputs 8 g .. 8 g + 7 of input 8 t + i:   word 0 is A's row g,     columns 2 t, 2 t + 1
                                                                  word 1    row g + 8, columns 2 t, 2 t + 1
                                                                  word 2    row g,     columns 2 t + 8, 2 t + 9
                                                                  word 3    row g + 8, columns 2 t + 8, 2 t + 9

    so 4 columns of A belong to one input. Column 4 r + p of B holds x_r of that input in the p-th of these 4 rows, and
    zeros in the other 3: two rows of x, r = 0 and 1, take one product. Lane 4 g + t gets the sums of outputs
    8 g + 4 (t % 2) .. + 3 of row t // 2, as neighbours.

A product adds inputs i, 8 + i, 16 + i and 24 + i of a block, and products follow one another by block and i, whatever
the number of rows: so a row has the same sums beside any others. Registers that a lane does not load hold 0, since 0
times what was there before may not be a number.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.few_rows import Prepared, kept_by_any, launch_prepare
from kernels.integer_mma import add_to, load_factors, load_where, pick_bytes
from kernels.packed_words import TABLE, WIDTH, escape_of, escapes_in, four_pairs, scales
from kernels.plan import of_rows
from kernels.triton_gemv import (
    BLOCK,
    MAX_SEGMENTS,
    Norm,
    Product,
    await_inputs,
    inputs,
    load_constants,
    load_inputs,
    outputs_of_tile,
    prefetch_tile,
    share_rstd,
    starts_of,
    wait_for_rstd,
    zeros_of,
)

PIECE = tl.constexpr(64)  # outputs that the warp loads at once, of 4 inputs

# Rows of x up to which every program makes its own inputs; more have a launch before for that. A step of llama-3-8b, 4
# rows, takes 5.18 ms so at 50 % and 5.31 with the launch; dense 5.69 and 5.64; 3 rows dense 5.44 and 5.55 (H100).
MAKES_ROWS = 4
RSTD_MAKERS = tl.constexpr(8)  # programs that compute the rstds of rows


class Lanes(NamedTuple):
    """How a tile is loaded and added."""

    full: bool  # segments end where a tile does
    add_vectors: bool  # the GPU adds 4 neighbours at once
    packed: bool


# ---- a tile


@triton.jit
def _multiply_add_half(sums, a, b0, b1, DTYPE: tl.constexpr):
    """sums + A B: 16 x 16 times 16 x 8, to 16 x 8 float32."""
    TYPE: tl.constexpr = "bf16.bf16" if DTYPE == tl.bfloat16 else "f16.f16"
    return tl.inline_asm_elementwise(
        "mma.sync.aligned.m16n8k16.row.col.f32." + TYPE + ".f32 "
        "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};",
        "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f", [a[0], a[1], a[2], a[3], b0, b1, sums[0], sums[1], sums[2], sums[3]],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
    )


@triton.jit
def _ballot(truth):
    """One bit of each lane's truth, in every lane."""
    return tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $1, 0; vote.sync.ballot.b32 $0, p, 0xffffffff; }", "=r,r",
        [truth.to(tl.int32)], dtype=tl.int32, is_pure=True, pack=1,
    )


@triton.jit
def _load_half(
    weights, n: tl.constexpr, at, kept, col, last,
    N_OUT: tl.constexpr, ALL: tl.constexpr, PLAN: tl.constexpr, LANES: tl.constexpr,
):
    """The tuple `weights`, and the n-th half of a block: each lane's 4 words of 4 of its 8 inputs, of every piece.

    at: of the lane's first input and its output `col`; kept: bits of each block's inputs, or ALL of them are. Of packed
    weights the words are 3 for every piece, by plane.
    """
    at += n // 2 * BLOCK * N_OUT
    kept = kept[n // 2] >> (tl.arange(0, BLOCK) % 4 * 8)
    PIECES: tl.constexpr = PLAN.block_out // PIECE
    for i in tl.static_range(n % 2 * 4, n % 2 * 4 + 4):
        for p in tl.static_range(1 if LANES.packed else PIECES):
            wanted = tl.full((BLOCK,), 1, tl.int32) if ALL else kept & (1 << i)
            if not LANES.full:
                wanted = tl.where(col + p * PIECE < last, wanted, 0)
            if LANES.packed:
                weights = weights + load_where(at + i * N_OUT, wanted, 3 * PIECES, PIECES, APART=32, ONCE=True)
            else:
                weights = weights + load_where(at + (i * N_OUT + p * PIECE), wanted, 4, 4, ONCE=True, ZERO=True)
    return weights


@triton.constexpr_function
def stage_assembly(words):
    """The address of shared memory for words of each lane."""
    return f"{{ .shared .align 16 .b32 stage[{words * 32}]; mov.u32 $0, stage; }}"


@triton.jit
def _stage(WORDS: tl.constexpr):
    return tl.inline_asm_elementwise(
        stage_assembly(WORDS), "=r,r", [tl.arange(0, BLOCK)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _stage_four(at, w):
    tl.inline_asm_elementwise(
        "st.shared.v4.b32 [$1], {$2, $3, $4, $5}; mov.u32 $0, 0;", "=r,r,r,r,r,r", [at, w[0], w[1], w[2], w[3]],
        dtype=tl.int32, is_pure=False, pack=1,
    )


@triton.jit
def _staged_four(at):
    return tl.inline_asm_elementwise(
        "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,r", [at], dtype=(tl.int32,) * 4, is_pure=False, pack=1
    )


@triton.jit
def _stage_half(at, upper, wanted):
    """Stores the upper half of a word, where wanted is not 0."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b16 low, high; setp.ne.s32 p, $3, 0; mov.b32 {low, high}, $2; "
        "@p st.shared.b16 [$1], high; mov.u32 $0, 0; }",
        "=r,r,r,r", [at, upper, wanted], dtype=tl.int32, is_pure=False, pack=1,
    )


@triton.jit
def _with_escapes(words, escapes, stage, PIECES: tl.constexpr):
    """A lane's words of a block with the escapes of inputs that are kept, through shared memory: little code."""
    slot_at, n_slots, kept, lists_ptr, enlarge, _above = escapes
    lane = tl.arange(0, BLOCK)
    for j in tl.static_range(8 * PIECES):
        _stage_four(stage + lane * 16 + j * 512, words[4 * j : 4 * j + 4])
    tl.debug_barrier()
    p = 0
    while p < n_slots:
        slot = tl.load(slot_at + p)
        n, list_ptr = escapes_in(slot, lists_ptr)
        k = 1
        while k <= n:
            row, out, bits = escape_of(slot, list_ptr, k + lane, n)
            out += p * WIDTH
            word = row % 8 * (4 * PIECES) + out % (8 * PIECES) // 2
            at = stage + word // 4 * 512 + (out // (8 * PIECES) * 4 + row // 8) * 16 + word % 4 * 4 + out % 2 * 2
            value = (bits.to(tl.float32, bitcast=True) * enlarge).to(tl.int32, bitcast=True)
            _stage_half(at, value, tl.where(k + lane <= n, kept >> row, 0) & 1)
            k += BLOCK
        p += 1
    tl.debug_barrier()
    out = ()
    for j in tl.static_range(8 * PIECES):
        out = out + _staged_four(stage + lane * 16 + j * 512)
    return out


@triton.jit
def _unpacked(weights, b: tl.constexpr, hit, escapes, stage, PIECES: tl.constexpr):
    """A lane's words of block b, made of packed ones; hit: whether it has escapes."""
    words = ()
    for i in tl.static_range(8):
        w = weights[(8 * b + i) * 3 * PIECES : (8 * b + i + 1) * 3 * PIECES]
        for p in tl.static_range(PIECES):
            words = words + four_pairs(w[p], w[PIECES + p], w[2 * PIECES + p], escapes[5])
    if hit != 0:
        words = _with_escapes(words, escapes, stage, PIECES)
    return words


@triton.jit
def _add_half(
    sums, weights, at: tl.constexpr, n: tl.constexpr, x, choices, DTYPE: tl.constexpr, PIECES: tl.constexpr
):
    """Each piece's `sums`, and the products of the n-th half of a block, whose first word is `weights[at]`.

    x: 8 words, inputs 8 t + i of two rows.
    """
    for i in tl.static_range(n * 4, n * 4 + 4):
        b0, b1, added = pick_bytes(x[i], 0, choices[0]), pick_bytes(x[i], 0, choices[1]), ()
        for p in tl.static_range(PIECES):
            a = weights[at + (i * PIECES + p) * 4 : at + (i * PIECES + p) * 4 + 4]
            added = added + (_multiply_add_half(sums[p], a, b0, b1, DTYPE),)  # noqa: RUF005 (Triton knows no stars)
        sums = added
    return sums


@triton.jit
def _added(a, b, PIECES: tl.constexpr):
    out = ()
    for p in tl.static_range(PIECES):
        out = out + ((a[p][0] + b[p][0], a[p][1] + b[p][1], a[p][2] + b[p][2], a[p][3] + b[p][3]),)  # noqa: RUF005
    return out


@triton.jit
def _with_offsets(sums, offsets):
    """Those that the first programs add."""
    out = ()
    for i in tl.static_range(4):
        out = out + (sums[i] + offsets[i].to(tl.float32, bitcast=True),)  # noqa: RUF005
    return out


# ---- x


@triton.jit
def _eight_of(x):
    """x of lanes 8 t .. 8 t + 7 in lanes 4 g + t, through shared memory.

    Its barrier keeps the compiler from loading weights after the first product, to save registers.
    """
    lane = tl.arange(0, BLOCK)
    return tl.inline_asm_elementwise(
        "{ .shared .align 16 .b32 words[32]; .reg .b32 a, b; mov.u32 a, words; add.u32 b, a, $9; "
        "st.shared.b32 [b], $8; bar.warp.sync 0xffffffff; add.u32 a, a, $10; ld.shared.v4.b32 {$0, $1, $2, $3}, [a]; "
        "ld.shared.v4.b32 {$4, $5, $6, $7}, [a + 16]; }",
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r", [x, lane * 4, lane % 4 * 32], dtype=(tl.int32,) * 8,
        is_pure=False, pack=1,
    )


@triton.jit
def _shared_rstds(slots_ptr, slots_stride, program, h_ptr, h_stride, eps, N: tl.constexpr, ROWS: tl.constexpr):
    """`triton_gemv.shared_rstd` of every row of h: the first programs compute one each."""
    makers = tl.minimum(tl.num_programs(0) * tl.num_programs(1), RSTD_MAKERS)
    row = tl.where(program < makers, program, ROWS)
    while row < ROWS:
        share_rstd(slots_ptr + row * slots_stride, h_ptr + row * h_stride, eps, N)
        row += makers
    out = ()
    for r in tl.static_range(ROWS):
        out = out + (wait_for_rstd(slots_ptr + r * slots_stride, program),)  # noqa: RUF005
    return out


# ---- the product


@triton.jit
def _half_kernel(
    # read and written. With PREPARED x and kept are what `few_rows.launch_prepare` makes, two rows side by side
    x_ptr, kept_ptr, gain_ptr, weight_ptr, threshold_ptr, out_ptr, zero_ptr, last_rstd_ptr, offset_ptr, fineness_ptr,
    # of packed weights: see `packed.escape_table`; tag of the step, if x is awaited
    table_ptr, tag_ptr,
    # sizes; tiles_i and start_i: first tile and first output of segment i; the norm's epsilon
    x_stride, out_stride, n_zero, tiles_1, tiles_2, start_1, start_2, eps,
    # compiled in; N_OUT: so that a load's place needs no arithmetic; ZERO: how much of zero_ptr each program fills
    N_OUT: tl.constexpr, OP: tl.constexpr, PLAN: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
    PREPARED: tl.constexpr, ZERO: tl.constexpr, PDL: tl.constexpr,
):
    """out += m (W^T cut(x - shift) + offset) for ROWS rows of x, as `kernels.triton_gemv` has it of other forms."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    BLOCKS: tl.constexpr = PLAN.blocks
    PIECES: tl.constexpr = PLAN.block_out // PIECE
    PAIRS: tl.constexpr = (ROWS + 1) // 2
    N_BLOCKS: tl.constexpr = (OP.n_in + BLOCK - 1) // BLOCK
    ALL: tl.constexpr = (PLAN.early or not OP.cut) and LANES.full and OP.n_in % (32 * BLOCKS) == 0
    BEFORE: tl.constexpr = PLAN.early or (not OP.cut and PLAN.prefetch == 0)  # weights are loaded before the wait
    PACKED: tl.constexpr = LANES.packed
    N_WORDS: tl.constexpr = N_OUT * 3 // 8 if PACKED else N_OUT  # of a row, as it is loaded
    APART: tl.constexpr = 8 if PACKED else PIECE  # outputs from one of a lane's pieces to the next
    SETS: tl.constexpr = 1 if ROWS == 1 else PIECES  # of 4 sums to a lane and two rows
    INLINE: tl.constexpr = PACKED and PAIRS == 1
    AWAIT: tl.constexpr = tag_ptr is not None

    # the program's row of x, segment and tile
    lane = tl.arange(0, BLOCK)
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    x_ptr += tl.program_id(2) * x_stride
    out_ptr += tl.program_id(2) * out_stride
    tile = tl.program_id(0)
    segment, first, last = outputs_of_tile(tile, tiles_1, tiles_2, start_1, start_2, N_OUT, PLAN.block_out)

    # the program's inputs, a lane's first weights, and the first of the 4 outputs that it adds
    block = tl.program_id(1) * BLOCKS
    rows = block * BLOCK + lane
    col = first + lane // 4 * (8 * PIECES if PACKED else 8)
    first_word = first // PIECE * 24 + lane // 4 * PIECES // 8 * 24 + lane // 4 * PIECES % 8 if PACKED else col
    weights_at = weight_ptr + (block * BLOCK + lane % 4 * 8).to(tl.int64) * N_WORDS + first_word
    at, half = col + lane % 2 * 4, lane % 4 // 2  # which of two rows a lane adds
    if ROWS == 1:  # both halves get the row's sums: each adds a piece
        at += half * APART
    if OP.cut:
        threshold_ptr += segment * (2 * OP.n_in if OP.shift else OP.n_in)
    if PREPARED and OP.cut:  # each segment has inputs of its own
        x_ptr += segment * (PAIRS * N_BLOCKS * BLOCK)
        kept_ptr += segment * (ROWS * N_BLOCKS)

    # before the wait: what no launch of this step writes, and rows that a guess from x as it is now names
    constants, weights, finenesses, offsets, hits, escapes = (), (), (), (), (), ()
    shrink = 1.0
    if PACKED:
        n_slots = tl.minimum((last - first) // PIECE, PIECES)
        slots_ptr = table_ptr + TABLE + block * (N_OUT // PIECE) + first // PIECE
        for b in tl.static_range(BLOCKS):
            hit = 0
            for p in tl.static_range(PIECES):
                there = (block + b < N_BLOCKS) & (p < n_slots)
                hit = hit | tl.load(slots_ptr + b * (N_OUT // PIECE) + p, mask=there, other=0)
            hits = hits + (hit,)  # noqa: RUF005
        enlarge, shrink = scales(table_ptr, segment)
        lists_ptr, above = table_ptr + TABLE + tl.load(table_ptr + 3), tl.load(table_ptr + 7)

    if not PREPARED:
        for b in tl.static_range(BLOCKS):
            gain, threshold, shift = load_constants(rows + b * BLOCK, gain_ptr, threshold_ptr, OP)
            constants = constants + ((gain, threshold, shift),)  # noqa: RUF005
    if PLAN.prefetch > 0:
        if program < PLAN.prefetch:
            last_rstd = 1.0
            if PLAN.guess and OP.prologue == "norm":
                last_rstd = tl.load(last_rstd_ptr)
            ahead = constants[0] if PLAN.guess else (0.0, 0.0, 0.0)
            prefetch_tile(rows, ahead, first, N_WORDS, x_ptr, gain_ptr, threshold_ptr, last_rstd, weight_ptr, OP, PLAN)
    if BEFORE:
        there = ()
        for n in tl.static_range(2 * BLOCKS):
            there = there + (kept_by_any(None, block + n // 2, 1, OP),) if n % 2 == 0 else there  # noqa: RUF005
            weights = _load_half(weights, n, weights_at, there, col, last, N_WORDS, ALL, PLAN, LANES)
    for p in tl.static_range(SETS):
        there = (at + p * APART < last).to(tl.int32)
        finenesses = finenesses + (load_factors(fineness_ptr, at + p * APART, there, 4),)  # noqa: RUF005
        there = tl.where(tl.program_id(1) == 0, there, 0)
        offsets = offsets + (load_factors(offset_ptr, at + p * APART, there, 4),)  # noqa: RUF005

    # the launch before has ended, or x says when it is there
    if PDL and not AWAIT:
        tl.extra.cuda.gdc_wait()
    if ZERO > 0:
        z = program * ZERO + tl.arange(0, ZERO)
        tl.store(zero_ptr + z, tl.zeros((ZERO,), tl.float32), mask=z < n_zero)
    operands, rstds = (), (1.0,) * ROWS
    if AWAIT:
        operands = await_inputs(rows, x_ptr, tag_ptr, OP, BLOCKS)
    elif not PREPARED:
        for n in tl.static_range(BLOCKS * ROWS):
            a, up = load_inputs(rows + n // ROWS * BLOCK, x_ptr + n % ROWS * x_stride, OP, "")
            operands = operands + ((a, up),)  # noqa: RUF005
        if OP.prologue == "norm":
            rstds = _shared_rstds(out_ptr + N_OUT, out_stride, program, x_ptr, x_stride, eps, OP.n_in, ROWS)
            if PLAN.guess:
                if program == 0:
                    tl.store(last_rstd_ptr, rstds[0])

    # x: a word per two rows, of a block's input `lane`; and the weights that any row keeps
    made, kept = (), ()
    for b in tl.static_range(BLOCKS):
        any_keeps = tl.zeros((BLOCK,), tl.int1)
        if not PREPARED:
            for r in tl.static_range(ROWS):
                x, keep = inputs(rows + b * BLOCK, operands[b * ROWS + r], constants[b], rstds[r], OP)
                bits = tl.where(keep, x, 0.0).to(OP.dtype).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
                word = word | (bits << 16) if r % 2 == 1 else bits  # noqa: F821
                any_keeps = any_keeps | keep
                if r % 2 == 1 or r == ROWS - 1:
                    made = made + (word,)  # noqa: RUF005
        if PREPARED or not OP.cut:
            kept = kept + (kept_by_any(kept_ptr, block + b, ROWS, OP),)  # noqa: RUF005
        else:
            kept = kept + (_ballot(any_keeps),)  # noqa: RUF005

    # PLAN.rows of them are loaded before the first product, in halves of a block; 0: all are
    AT_ONCE: tl.constexpr = 2 * BLOCKS if PLAN.rows == 0 or PAIRS > 1 else PLAN.rows // 16
    tl.static_assert(AT_ONCE > 1 or not PACKED)  # whose block is made at once
    if not BEFORE:
        for n in tl.static_range(AT_ONCE):
            weights = _load_half(weights, n, weights_at, kept, col, last, N_WORDS, ALL, PLAN, LANES)

    # all loads are under way before a product waits for the first, see `_eight_of`
    if PREPARED:
        tl.debug_barrier()

    # where a lane's columns of B hold x, 16 bits of it or zeros
    place, low = lane // 4 % 4, 0 if ROWS == 1 else lane // 16
    choice = tl.where(place % 2 == 0, 0x4410 + low * 0x22, 0x1044 + low * 0x2200)
    choices = tl.where(place < 2, choice, 0x4444), tl.where(place < 2, 0x4444, choice)
    z = tl.zeros((BLOCK,), tl.float32)

    # packed weights: what finds their escapes; for more than two rows all words are made once
    if PACKED:
        stage = _stage(32 * PIECES)
        for b in tl.static_range(BLOCKS):
            escapes = escapes + ((slots_ptr + b * (N_OUT // PIECE), n_slots, kept[b], lists_ptr, enlarge, above),)  # noqa: RUF005
        if not INLINE:
            words = ()
            for b in tl.static_range(BLOCKS):
                words = words + _unpacked(weights, b, hits[b], escapes[b], stage, PIECES)
            weights = words

    # the sums of two rows at a time; each block has a chain of products of its own, for their latency
    for q in tl.static_range(PAIRS):
        sums = ()
        for b in tl.static_range(BLOCKS):
            if PREPARED:  # blocks beyond the last one have weights of 0, packed ones anything
                x_at = x_ptr + (q * N_BLOCKS + tl.minimum(block + b, N_BLOCKS - 1)) * BLOCK + lane % 4 * 8
                there = tl.full((BLOCK,), 1, tl.int32)
                if PACKED:
                    there = tl.where(block + b < N_BLOCKS, there, 0)
                x = load_where(x_at, there, 8, 4, APART=16, ZERO=PACKED)
            else:
                x = _eight_of(made[b * PAIRS + q])
            words = weights
            if INLINE:
                words = _unpacked(weights, b, hits[b], escapes[b], stage, PIECES)
            new = ((z, z, z, z),) * PIECES
            for n in tl.static_range(2):
                new = _add_half(new, words, 0 if INLINE else b * 32 * PIECES, n, x, choices, OP.dtype, PIECES)
                if not BEFORE and b * 2 + n + AT_ONCE < 2 * BLOCKS:
                    weights = _load_half(
                        weights, b * 2 + n + AT_ONCE, weights_at, kept, col, last, N_WORDS, ALL, PLAN, LANES
                    )
            sums = _added(sums, new, PIECES) if b > 0 else new

        # each lane's outputs
        if ROWS == 1 and PIECES == 2:
            v = ()
            for i in tl.static_range(4):
                v = v + (tl.where(half == 0, sums[0][i], sums[1][i]),)  # noqa: RUF005
            sums = (v,)
        row = 0 if ROWS == 1 else 2 * q + half
        end = tl.where(half < (PIECES if ROWS == 1 else ROWS - 2 * q), last, 0)
        for p in tl.static_range(SETS):
            out = sums[p]
            if PACKED:
                out = (out[0] * shrink, out[1] * shrink, out[2] * shrink, out[3] * shrink)
            if offset_ptr is not None:
                out = _with_offsets(out, offsets[p])
            out_at, there = out_ptr + row * out_stride + at + p * APART, (at + p * APART < end).to(tl.int32)
            add_to(out_at, there, out, finenesses[p], 4, OP, LANES, fineness_ptr is not None)

    # the next launch relies on the end of the one before, too
    if PDL and AWAIT:
        tl.extra.cuda.gdc_wait()


# ---- launching it


def fits_half(product: Product) -> bool:
    """Whether a product, or the one that it is a part of, is of 16-bit or packed weights whose segments 8 divides."""
    widths = product.whole[1] if product.whole else product.segments
    return product.form.bits in (12, 16) and not any(width % 8 for width in widths)


def launch_half(
    prologue: str, x: Tensor, product: Product, out: Tensor, *,
    prepared: Prepared | None = None, norm: Norm | None = None, zero: Tensor | None = None,
    tag: Tensor | None = None, dtype: torch.dtype, pdl: bool = False,
) -> None:
    """`kernels.triton_gemv.launch_gemv` of a 16-bit weight, of several rows of any prologue with `prepared`.

    x: "given" [rows, in], in dtype or tagged; else float32: h [rows, in] or gate|up [rows, 2 in and room].
    out: [rows, out and room], float32.
    """
    product.check()
    weight, segments, n_in = product.weight, product.segments, len(product.weight)
    packed = product.form.name == "packed"
    assert dtype == (torch.bfloat16 if packed else weight.dtype)
    assert x.dtype in (dtype, torch.int32) or prologue != "given"
    assert fits_half(product)
    assert all(t is None or t.data_ptr() % 16 == 0 for t in (weight, out, product.offset, product.fineness))
    assert len(out) == 1 or out.stride(0) % 4 == 0
    gain, eps, last_rstd = norm or (None, 0.0, None)
    rows = len(x) if prepared else 1
    operation, made, kept, x_stride = product.operation(prologue, dtype), x, None, x.stride(0)
    plan = product.plan(prologue, pdl, last_rstd is not None)
    plan = plan if rows == 1 else of_rows(plan)
    apart = rows > MAKES_ROWS
    if apart:
        launch_prepare(x, operation, product.threshold, prepared, paired=True, norm=norm, zero=zero, pdl=pdl)
        made, kept, zero = prepared.made.view(torch.int32), prepared.kept, None
    hopper = pdl or (x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0))
    lanes = Lanes(not any(width % plan.block_out for width in segments), hopper, packed)

    starts, tiles = starts_of(segments), starts_of([triton.cdiv(width, plan.block_out) for width in segments])
    grid = (tiles[-1], triton.cdiv(n_in, BLOCK.value * plan.blocks), len(x) // rows)
    n_zero, zero_block = zeros_of(zero, grid[0] * grid[1])
    _half_kernel[grid](
        made, kept, gain, weight.view(torch.int32) if packed else weight, product.threshold, out, zero, last_rstd,
        product.offset, product.fineness, product.weight_scale, None if prepared else tag,
        x_stride, out.stride(0), n_zero, *tiles[1:MAX_SEGMENTS], *starts[1:MAX_SEGMENTS], eps,
        N_OUT=starts[-1], OP=operation, PLAN=plan, LANES=lanes, ROWS=rows, PREPARED=apart, ZERO=zero_block, PDL=pdl,
        num_warps=1, launch_pdl=pdl, maxnreg=plan.registers,
    )
