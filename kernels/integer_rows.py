"""int8 and int4 products of 2 to 8 rows of x on a GPU: each row has the sums of `kernels.integer_mma`, to the bit."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import integer_mma as mma
from kernels.few_rows import Prepared, kept_by_any, launch_prepare
from kernels.integer_mma import Lanes
from kernels.plan import Plan, chunk_of, of_integer_rows
from kernels.triton_gemv import BLOCK, MAX_SEGMENTS, Norm, Product, biased, outputs_of_tile, scales_of, starts_of

# ---- a tile
#
# A weight's bytes are brought into the tensor core's order once, for all rows. It multiplies A [16 outputs x 32 inputs]
# with B [32 inputs x 8 columns]:
#
#     lane 4 g + t loads its words of inputs t, t + 4 .. t + 28 of a block. Of 4 inputs' words it makes 4 words of one
#     byte place each. In int8 that is one output; in int4 two, as word & 0x0F0F0F0F and the word itself, whose sums are
#     one output's and 16 times the other's. They are A's rows g and g + 8, so that 4 products have 8 neighbouring
#     outputs of each lane: a unit
#
#     columns of B, up to 4 rows of x:   high bytes of row 0, low bytes of row 0, high bytes of row 1, ...
#                              5 to 8:   high bytes of rows 0 .. 7; in a second product their low bytes
#
#     so lane 4 g + t makes column g, and gets the sums of its outputs with row t, or with rows 2 t and 2 t + 1
#
# A program takes PLAN.turns of 32 PLAN.blocks inputs each. Their sums lie on the outputs' grid, so they are added up,
# exactly, before they go to memory: 8 rows of int4 have as many bytes of sums as one turn has weights.


@triton.jit
def _half_of_unit(weights, at: tl.constexpr, STEP: tl.constexpr, OP: tl.constexpr):
    """8 words of A, of one output each, from 4 inputs, whose words lie STEP apart."""
    out = ()
    for i in tl.static_range(8 if OP.bits == 8 else 4):
        choice = 0x5140 + i % 4 // 2 * 0x2222
        near = mma._pick_bytes(weights[at + i // 4], weights[at + i // 4 + STEP], choice)
        far = mma._pick_bytes(weights[at + i // 4 + 2 * STEP], weights[at + i // 4 + 3 * STEP], choice)
        word = mma._pick_bytes(near, far, 0x5410 + i % 2 * 0x2222)
        out = out + ((word,) if OP.bits == 8 else (word & 0x0F0F0F0F, word))
    return out


@triton.jit
def _sums_of_unit(
    weights, at: tl.constexpr, columns, EACH: tl.constexpr, BLOCKS: tl.constexpr, WORDS: tl.constexpr, OP: tl.constexpr
):
    """Of each of the lane's EACH rows the sums of 8 outputs, int32; at: the unit's first word in `weights`."""
    z = tl.zeros((BLOCK,), tl.int32)
    sums, out = ((z, z, z, z),) * (4 * EACH), ()
    for b in tl.static_range(BLOCKS):
        a0 = _half_of_unit(weights, at + b * 8 * WORDS, WORDS, OP)
        a1 = _half_of_unit(weights, at + (b * 8 + 4) * WORDS, WORDS, OP)
        new = ()
        for i in tl.static_range(4 * EACH):
            a = a0[i // EACH * 2], a0[i // EACH * 2 + 1], a1[i // EACH * 2], a1[i // EACH * 2 + 1]
            b0, b1 = columns[(b * EACH + i % EACH) * 2], columns[(b * EACH + i % EACH) * 2 + 1]
            new = new + (mma._multiply_add_two(sums[i], a[0], a[1], a[2], a[3], b0, b1, SIGNED=OP.bits == 8),)
        sums = new
    for i in tl.static_range(8 * EACH):
        total = sums[i % 8 // 2 * EACH][i % 2 * 2 + i // 8] * 256
        total += sums[i % 8 // 2 * EACH + EACH - 1][i % 2 * 2 + (1 if EACH == 1 else i // 8)]
        if OP.bits == 4 and i % 2 == 1:
            total -= out[i - 1]
        out = out + (total,)
    return out


# ---- x


@triton.jit
def _columns(words, EACH: tl.constexpr):
    """B of a block, 2 words for each of EACH products; words: 8 numbers of 16 bits, see `triton_gemv.biased`."""
    out = ()
    for i in tl.static_range(EACH):
        low = i if EACH == 2 else tl.arange(0, BLOCK) // 4 % 2
        choice, sign = 0x7531 - low * 0x1111, low * -0x7F7F7F80  # high bytes; or low ones, made signed
        out = out + (mma._pick_bytes(words[0], words[1], choice) ^ sign,)
        out = out + (mma._pick_bytes(words[2], words[3], choice) ^ sign,)
    return out


@triton.jit
def _load_made(x_at, BLOCKS: tl.constexpr, OP: tl.constexpr):
    """x of the lane's 8 inputs of each block, float32."""
    WORDS: tl.constexpr = OP.dtype.primitive_bitwidth // 4
    out = ()
    for b in tl.static_range(BLOCKS):
        words = mma._load(x_at + b * BLOCK, tl.full((BLOCK,), 1, tl.int32), WORDS, 4, APART=16)
        for k in tl.static_range(8):
            n = words[k * WORDS // 8]
            if WORDS == 4:
                n = (n >> k % 2 * 16).to(tl.int16)
            out = out + (n.to(OP.dtype, bitcast=True).to(tl.float32),)
    return out


@triton.jit
def _int4_columns(made, pairs, at: tl.constexpr, EACH: tl.constexpr, BLOCKS: tl.constexpr, WORDS: tl.constexpr):
    """B of a group of inputs and a chunk, and down and the sum of x times m of each of a lane's EACH rows.

    made: x of the lane's inputs, of its column's row; pairs: s and m of input lane % 8 * 4 + lane // 8 of each block
    and chunk, `at` the first.
    """
    lane, largest = tl.arange(0, BLOCK), tl.zeros((BLOCK,), tl.float32)
    lows, scaled, columns, rows = (largest,) * 8, (), (), ()
    for b in tl.static_range(BLOCKS):
        pair, new = pairs[at + b * WORDS], ()
        s, m = mma._eight_of(pair << 16), mma._eight_of(pair & -65536)
        for k in tl.static_range(8):
            new = new + (tl.fma(made[b * 8 + k], m[k].to(tl.float32, bitcast=True), lows[k]),)
            scaled = scaled + (made[b * 8 + k] * s[k].to(tl.float32, bitcast=True),)
            largest = tl.maximum(largest, tl.abs(scaled[b * 8 + k]), propagate_nan=tl.PropagateNan.ALL)
        lows = new

    # the 4 lanes of a row share its scale; x times m is added in the order that the lanes of a single row have
    low = ((lows[0] + lows[4]) + (lows[2] + lows[6])) + ((lows[1] + lows[5]) + (lows[3] + lows[7]))
    low, largest = low.to(tl.int32, bitcast=True), largest.to(tl.int32, bitcast=True)
    for i in tl.static_range(2):
        theirs = mma._from_lane(low, lane ^ (2 >> i)).to(tl.float32, bitcast=True)
        low = (low.to(tl.float32, bitcast=True) + theirs).to(tl.int32, bitcast=True)
        largest = tl.maximum(largest, mma._from_lane(largest, lane ^ (2 >> i)))
    up, down = scales_of(largest)
    for b in tl.static_range(BLOCKS):
        words = ()
        for k in tl.static_range(b * 8, b * 8 + 8, 2):
            words = words + (mma._pick_bytes(biased(scaled[k], up), biased(scaled[k + 1], up), 0x5410),)
        columns = columns + _columns(words, EACH)
    for r in tl.static_range(EACH):
        own = mma._from_lane(down.to(tl.int32, bitcast=True), lane % 4 * 8 + r * 4).to(tl.float32, bitcast=True)
        rows = rows + ((own, mma._from_lane(low, lane % 4 * 8 + r * 4).to(tl.float32, bitcast=True)),)
    return columns, rows


# ---- the product


@triton.jit
def _load_factors(ptr, at, next: tl.constexpr, end, WHOLE: tl.constexpr):
    """What belongs to each lane's 8 outputs from at + next on; in this order an address is made once for all units."""
    out = ()
    for i in tl.static_range(next, next + 8, 4):
        there = tl.full((BLOCK,), 1, tl.int32) if WHOLE else (at + i < end).to(tl.int32)
        out = out + mma._load_factors(None if ptr is None else ptr + at, i, there, 4)
    return out


@triton.jit
def _rows_kernel(
    # what `kernels.few_rows.launch_prepare` makes; and what is read and written
    made_ptr, kept_ptr, down_ptr, weight_ptr, out_ptr, offset_ptr, weight_scale_ptr, fineness_ptr,
    # sizes; tiles_i and start_i: first tile and first output of segment i
    out_stride, tiles_1, tiles_2, start_1, start_2,
    # compiled in; N_OUT: so that a load's place needs no arithmetic
    N_OUT: tl.constexpr, OP: tl.constexpr, PLAN: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """out += m (W^T cut(x - shift) + offset) for ROWS rows of x."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    BLOCKS: tl.constexpr = PLAN.blocks
    TURNS: tl.constexpr = PLAN.turns
    WORDS: tl.constexpr = LANES.words
    INT8: tl.constexpr = OP.bits == 8
    EACH: tl.constexpr = 1 if ROWS <= 4 else 2  # rows of which a lane gets sums
    OWN: tl.constexpr = 2 if INT8 else 1  # words of a unit, 8 outputs of a lane
    UNIT: tl.constexpr = 8 if INT8 else LANES.chunk  # from one unit to the next
    ROOM: tl.constexpr = (OP.n_in + 127) // 128 * 128  # inputs of a row of those made
    WHOLE: tl.constexpr = LANES.full and not LANES.by_word  # every lane has all its outputs
    ALL: tl.constexpr = not OP.cut and WHOLE and OP.n_in % (32 * BLOCKS * TURNS) == 0
    lane, group = tl.arange(0, BLOCK), tl.program_id(1) * TURNS
    segment, first, last = outputs_of_tile(tl.program_id(0), tiles_1, tiles_2, start_1, start_2, N_OUT, PLAN.block_out)

    # a lane's first weights and scales
    piece, start = first + lane // 4 * (4 * WORDS if INT8 else 8), group * (BLOCKS * BLOCK)
    at = (start + lane % 4).to(tl.int64) * (N_OUT * OP.bits // 8) + (piece if INT8 else piece >> 1)
    scale_at = weight_scale_ptr
    if not INT8:
        scale_at += (start + lane % 8 * 4 + lane // 8).to(tl.int64) * (N_OUT // OP.groupsize)
    tile = weight_ptr + at, scale_at, piece, first, last, N_OUT

    # the weights that any row keeps, where inputs are cut, each segment its own; dense ones before the launch before
    # has ended. Without the barrier the compiler puts some loads off until others have come
    weights, pairs = (), ()
    if OP.cut:
        if PDL:
            tl.extra.cuda.gdc_wait()
        made_ptr += segment * (ROWS * ROOM)
        kept_ptr += segment * (ROWS * ((OP.n_in + BLOCK - 1) // BLOCK))
        if INT8:
            down_ptr += segment * (ROWS * (ROOM // (BLOCKS * BLOCK)))
    for b in tl.static_range(BLOCKS * TURNS):
        kept = kept_by_any(kept_ptr, group * BLOCKS + b, ROWS, ROWS, OP)
        weights, pairs = mma._load_block(weights, pairs, kept, b, tile, ALL, OP, LANES)
    if PDL and not OP.cut:
        tl.extra.cuda.gdc_wait()
    tl.debug_barrier()

    # x of a lane's column; int8's is on fixed point, and `downs` are those of a lane's rows
    made, columns, downs, odd, row = (), (), (), lane % 2, tl.minimum(lane // (8 // EACH), ROWS - 1)
    x_at = made_ptr + row * ROOM + start + lane % 4 * 8
    if INT8:
        for b in tl.static_range(BLOCKS * TURNS):
            words = mma._load(x_at + b * BLOCK, tl.full((BLOCK,), 1, tl.int32), 4, 4)
            columns = columns + _columns(words, EACH)
        for i in tl.static_range(TURNS * EACH):
            row = tl.minimum(lane % 4 * EACH + i % EACH, ROWS - 1)
            down = tl.load(down_ptr + row * (ROOM // (BLOCKS * BLOCK)) + group + i // EACH)
            downs = downs + ((down, 0.0),)
    elif TURNS == 1:
        made = _load_made(x_at, BLOCKS, OP)

    # a unit's sums of each group
    for u in tl.static_range(WORDS // OWN):
        end, scales = last if INT8 else tl.minimum(last, first + (u + 1) * UNIT), ()
        finenesses = _load_factors(fineness_ptr, piece, u * UNIT, end, WHOLE)
        if INT8:
            scales = _load_factors(weight_scale_ptr, piece, u * UNIT, end, WHOLE)
        total = (tl.zeros((BLOCK,), tl.float32),) * (8 * EACH)
        for j in tl.static_range(TURNS):
            offsets = _load_factors(offset_ptr, piece, u * UNIT, tl.where(group + j == 0, end, 0), False)
            if INT8:
                rows = downs[j * EACH : (j + 1) * EACH]
                own = columns[j * BLOCKS * EACH * 2 : (j + 1) * BLOCKS * EACH * 2]
            else:
                if TURNS > 1:
                    made = _load_made(x_at + j * BLOCKS * BLOCK, BLOCKS, OP)
                own, rows = _int4_columns(made, pairs, j * BLOCKS * WORDS + u, EACH, BLOCKS, WORDS)

            sums, new = _sums_of_unit(weights, j * BLOCKS * 8 * WORDS + u * OWN, own, EACH, BLOCKS, WORDS, OP), ()
            for i in tl.static_range(8 * EACH):
                x, offset = sums[i].to(tl.float32), offsets[i % 8].to(tl.float32, bitcast=True)
                down, low = rows[i // 8]
                if INT8:
                    x, down, low = x * down, scales[i % 8].to(tl.float32, bitcast=True), offset
                elif i % 2 == 1:
                    down *= 0.0625
                x = x * down if INT8 and offset_ptr is None else tl.fma(x, down, low)
                if offset_ptr is not None and not INT8:
                    x += offset
                new = new + (x,)
            new, sums = (), mma._on_grid(new, finenesses * EACH, 8 * EACH, OP, fineness_ptr is not None)
            for i in tl.static_range(8 * EACH):
                new = new + (total[i] + sums[i],)
            total = new

        # two lanes of neighbouring rows exchange halves: together they add 32 bytes of a row, then of the other's
        for r in tl.static_range(EACH):
            own, theirs = (), ()
            for i in tl.static_range(r * 8, r * 8 + 4):
                sent = tl.where(odd == 0, total[i + 4], total[i]).to(tl.int32, bitcast=True)
                own = own + (tl.where(odd == 0, total[i], total[i + 4]),)
                theirs = theirs + (mma._from_lane(sent, lane ^ 1).to(tl.float32, bitcast=True),)
            for pair in tl.static_range(2):
                row, there = (lane ^ pair) % 4 * EACH + r, tl.full((BLOCK,), 1, tl.int32)
                if not WHOLE or ROWS % 4:
                    there = ((piece + odd * 4 + u * UNIT < end) & (row < ROWS)).to(tl.int32)
                out_at = out_ptr + (row * out_stride + piece + odd * 4) + u * UNIT
                mma._add_to(out_at, there, theirs if pair else own, 4, LANES)


# ---- launching it, or the kernel of one row


def lanes_of(plan: Plan, product: Product, hopper: bool, several: bool) -> Lanes:
    """How tiles of `plan` lie in the lanes."""
    segments, (_, _, groupsize), step = product.segments, product.form, 4 if several else 1
    full = not any(width % plan.block_out for width in segments)
    if product.form.name == "int8":
        words = plan.block_out // 32
        vector = 2 if plan.blocks == 4 and full and not several else words
        by_word = any(width % 16 for width in segments)
        return Lanes(words, vector, 64 if vector == 2 else 4, 0, full, by_word, 0, hopper, step)
    chunk = chunk_of(groupsize)
    chunks = plan.block_out // chunk
    scales = chunks if full and chunk == groupsize else 0
    return Lanes(chunks, 1, chunk // 2, chunk, full, not full or chunk < 64, scales, hopper, step)


def launch_integers(
    prologue: str, x: Tensor, product: Product, out: Tensor, *,
    prepared: Prepared | None = None, norm: Norm | None = None, zero: Tensor | None = None, dtype: torch.dtype,
    pdl: bool = False,
) -> None:
    """`launch_gemv` of `kernels.triton_gemv` for int8 and int4; of 2 to 8 rows in one launch with `prepared`."""
    product.check()
    weight, segments, n_in, rows = product.weight, product.segments, len(product.weight), len(x)
    scale = product.weight_scale if product.form.name == "int8" else product.weight_scale.view(torch.int32)
    read = product.offset, scale, product.fineness
    assert all(t is None or t.data_ptr() % 16 == 0 for t in (weight, out, *read))
    assert len(out) == 1 or out.stride(0) % 4 == 0
    gain, eps, last_rstd = norm or (None, 0.0, None)
    plan = product.plan(prologue, pdl, last_rstd is not None)
    if prepared and product.fineness is not None:
        plan = of_integer_rows(plan)
    hopper = pdl or (x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0))
    operation, lanes = product.operation(prologue, dtype), lanes_of(plan, product, hopper, bool(prepared))

    starts, tiles = starts_of(segments), starts_of([triton.cdiv(width, plan.block_out) for width in segments])
    grid = tiles[-1], triton.cdiv(n_in, BLOCK.value * plan.blocks * plan.turns), rows if prologue == "given" else 1
    places = *tiles[1:MAX_SEGMENTS], *starts[1:MAX_SEGMENTS]
    options = {"OP": operation, "PLAN": plan, "LANES": lanes, "PDL": pdl, "num_warps": 1, "launch_pdl": pdl}
    options["maxnreg"] = plan.registers
    if prepared:
        if operation.bits == 8:
            prepared = prepared._replace(made=prepared.made.view(torch.int16))
        group = BLOCK.value * plan.blocks
        launch_prepare(x, operation, product.threshold, prepared, share=1, group=group, norm=norm, zero=zero, pdl=pdl)
        _rows_kernel[grid[:2]](
            *prepared, weight, out, *read, out.stride(0), *places, N_OUT=starts[-1], ROWS=rows, **options
        )
        return

    n_zero, zero_block = 0, 0
    if zero is not None:
        n_zero, zero_block = zero.numel(), triton.next_power_of_2(triton.cdiv(zero.numel(), grid[0] * grid[1]))
    mma._integer_kernel[grid](
        x, gain, product.threshold, weight, out, zero, last_rstd, *read, starts[-1], n_zero, *places, eps,
        ZERO=zero_block, **options,
    )
