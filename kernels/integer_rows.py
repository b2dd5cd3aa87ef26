"""int8 and int4 products of 2 to 8 rows of x on a GPU, each row's sums as `kernels.integer_mma` has them of one row.

A weight's bytes are brought into the tensor core's order once, for all rows. It multiplies A [16 outputs x 32 inputs]
with B [32 inputs x 8 columns]:

    lane 4 g + t loads, of inputs t, t + 4 .. t + 28 of a block (8 inputs k), its words of W. Of 4 inputs' words it
    makes 4 words of one output each, int4: of two, as word & 0x0F0F0F0F and the word itself, whose sums are one's and
    16 times the other's. They are A's rows g and g + 8: 4 products have 8 neighbouring outputs of each lane (a unit).

    columns of B, up to 4 rows of x:   high byte of row 0, low byte of row 0, high byte of row 1, ...
                             5 to 8:   high bytes of rows 0 .. 7; and in a second product their low bytes

    so lane 4 g + t makes column g, and gets the sums of its outputs with row t, or with rows 2 t and 2 t + 1

The sums of a program's groups of 32 PLAN.blocks inputs lie on the outputs' grid. They are added exactly before they go
to memory: 8 rows of int4 add as many bytes as they read.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.few_rows import Prepared, kept_by_any, launch_prepare
from kernels.integer_mma import (
    Lanes,
    _add,
    _eight_of,
    _from_lane,
    _integer_kernel,
    _load,
    _load_block,
    _multiply_add_two,
    _on_grid,
    _pick_bytes,
)
from kernels.plan import Plan, chunk_of, of_integer_rows
from kernels.triton_gemv import (
    BLOCK,
    MAX_SEGMENTS,
    Norm,
    Product,
    biased,
    outputs_of_tile,
    scales_of,
    starts_of,
)

# ---- A and B


@triton.jit
def _transposed(weights, at: tl.constexpr, STEP: tl.constexpr):
    """Words at, at + STEP, ... of 4 inputs as 4 words of one byte of each."""
    one, two, three, four = weights[at], weights[at + STEP], weights[at + 2 * STEP], weights[at + 3 * STEP]
    a, b = _pick_bytes(one, two, 0x5140), _pick_bytes(three, four, 0x5140)
    c, d = _pick_bytes(one, two, 0x7362), _pick_bytes(three, four, 0x7362)
    first, second = _pick_bytes(a, b, 0x5410), _pick_bytes(a, b, 0x7632)
    return first, second, _pick_bytes(c, d, 0x5410), _pick_bytes(c, d, 0x7632)


@triton.jit
def _half_of_unit(weights, at: tl.constexpr, STEP: tl.constexpr, OP: tl.constexpr):
    """8 words of A, of one output each, from 4 inputs."""
    out = ()
    if OP.bits == 8:
        out = _transposed(weights, at, STEP) + _transposed(weights, at + 1, STEP)
    else:
        both = _transposed(weights, at, STEP)
        for i in tl.static_range(4):
            out = out + (both[i] & 0x0F0F0F0F, both[i])
    return out


@triton.jit
def _columns(words, EACH: tl.constexpr):
    """B of a block, 2 words for each of EACH products; words: 8 numbers of 16 bits in fixed point."""
    lane, out = tl.arange(0, BLOCK), ()
    for i in tl.static_range(EACH):
        low = i if EACH == 2 else lane // 4 % 2
        choice, sign = 0x7531 - low * 0x1111, low * -0x7F7F7F80  # low bytes count from -128
        out = out + (_pick_bytes(words[0], words[1], choice) ^ sign, _pick_bytes(words[2], words[3], choice) ^ sign)
    return out


@triton.jit
def _sums_of_unit(weights, at: tl.constexpr, columns, EACH: tl.constexpr, OP: tl.constexpr, PLAN: tl.constexpr,
                  LANES: tl.constexpr):
    """Of each of the lane's EACH rows the sums of 8 outputs, int32; at: the unit's first word in `weights`."""
    BLOCKS: tl.constexpr = PLAN.blocks
    WORDS: tl.constexpr = LANES.words
    z = tl.zeros((BLOCK,), tl.int32)
    sums = ((z, z, z, z),) * (4 * EACH)
    for b in tl.static_range(BLOCKS):
        near = _half_of_unit(weights, at + b * 8 * WORDS, WORDS, OP)
        far = _half_of_unit(weights, at + (b * 8 + 4) * WORDS, WORDS, OP)
        new = ()
        for i in tl.static_range(4 * EACH):
            a = near[i // EACH * 2], near[i // EACH * 2 + 1], far[i // EACH * 2], far[i // EACH * 2 + 1]
            b0, b1 = columns[(b * EACH + i % EACH) * 2], columns[(b * EACH + i % EACH) * 2 + 1]
            new = new + (_multiply_add_two(sums[i], a[0], a[1], a[2], a[3], b0, b1, SIGNED=OP.bits == 8),)
        sums = new

    out = ()
    for r in tl.static_range(EACH):
        for n in tl.static_range(8):
            if EACH == 1:
                high, low = sums[n // 2][n % 2 * 2], sums[n // 2][n % 2 * 2 + 1]
            else:
                high, low = sums[n // 2 * 2][n % 2 * 2 + r], sums[n // 2 * 2 + 1][n % 2 * 2 + r]
            total = high * 256 + low
            if OP.bits == 4 and n % 2 == 1:
                total -= out[r * 8 + n - 1]
            out = out + (total,)
    return out


@triton.jit
def _int4_columns(made, pairs, at: tl.constexpr, EACH: tl.constexpr, OP: tl.constexpr, PLAN: tl.constexpr,
                  LANES: tl.constexpr):
    """B of a group of inputs for one chunk, and its scale and the sum of x times m of each of a lane's EACH rows.

    made: x of the lane's inputs, of its column's row; pairs: s and m of input lane % 8 * 4 + lane // 8 of each block
    and chunk, `at` the first.
    """
    BLOCKS: tl.constexpr = PLAN.blocks
    lane = tl.arange(0, BLOCK)
    largest, scaled = tl.zeros((BLOCK,), tl.float32), ()
    lows = (largest,) * 8
    for b in tl.static_range(BLOCKS):
        pair, new = pairs[at + b * LANES.words], ()
        s, m = _eight_of(pair << 16), _eight_of(pair & -65536)
        for k in tl.static_range(8):
            x = made[b * 8 + k]
            new = new + (tl.fma(x, m[k].to(tl.float32, bitcast=True), lows[k]),)
            x *= s[k].to(tl.float32, bitcast=True)
            largest = tl.maximum(largest, tl.abs(x), propagate_nan=tl.PropagateNan.ALL)
            scaled = scaled + (x,)
        lows = new

    # the 4 lanes of a row have the same scale; x times m is added in the order of a single row's lanes
    low = ((lows[0] + lows[4]) + (lows[2] + lows[6])) + ((lows[1] + lows[5]) + (lows[3] + lows[7]))
    for i in tl.static_range(2):
        theirs = _from_lane(largest.to(tl.int32, bitcast=True), lane ^ (2 >> i)).to(tl.float32, bitcast=True)
        largest = tl.maximum(largest, theirs, propagate_nan=tl.PropagateNan.ALL)
        low += _from_lane(low.to(tl.int32, bitcast=True), lane ^ (2 >> i)).to(tl.float32, bitcast=True)
    scale, down = scales_of(largest.to(tl.int32, bitcast=True))
    columns, rows = (), ()
    for b in tl.static_range(BLOCKS):
        words = ()
        for k in tl.static_range(0, 8, 2):
            n, other = biased(scaled[b * 8 + k], scale), biased(scaled[b * 8 + k + 1], scale)
            words = words + (_pick_bytes(n, other, 0x5410),)
        columns = columns + _columns(words, EACH)
    for r in tl.static_range(EACH):
        source = lane % 4 * 8 + r * 4
        own = _from_lane(down.to(tl.int32, bitcast=True), source), _from_lane(low.to(tl.int32, bitcast=True), source)
        rows = rows + ((own[0].to(tl.float32, bitcast=True), own[1].to(tl.float32, bitcast=True)),)
    return columns, rows


@triton.jit
def _made(x_at, OP: tl.constexpr, PLAN: tl.constexpr):
    """x of the lane's 8 inputs of each block, float32."""
    BLOCKS: tl.constexpr = PLAN.blocks
    out, one = (), tl.full((BLOCK,), 1, tl.int32)
    for b in tl.static_range(BLOCKS):
        if OP.dtype == tl.float32:
            words = _load(x_at + b * BLOCK, one, 8, 4, APART=16)
        else:
            words = _load(x_at + b * BLOCK, one, 4, 4)
        for k in tl.static_range(8):
            if OP.dtype == tl.float32:
                out = out + (words[k].to(tl.float32, bitcast=True),)
            else:
                out = out + ((words[k // 2] >> k % 2 * 16).to(tl.int16).to(OP.dtype, bitcast=True).to(tl.float32),)
    return out


@triton.jit
def _int8_columns(x_at, down_at, down_stride, EACH: tl.constexpr, ROWS: tl.constexpr, PLAN: tl.constexpr):
    """`_int4_columns` of int8, of what the launch before has made."""
    BLOCKS: tl.constexpr = PLAN.blocks
    lane, columns, rows = tl.arange(0, BLOCK), (), ()
    for b in tl.static_range(BLOCKS):
        columns = columns + _columns(_load(x_at + b * BLOCK, tl.full((BLOCK,), 1, tl.int32), 4, 4), EACH)
    for r in tl.static_range(EACH):
        row = tl.minimum(lane % 4 * EACH + r, ROWS - 1)
        rows = rows + ((tl.load(down_at + row * down_stride), 0.0),)
    return columns, rows


# ---- the product


@triton.jit
def _eight_factors(ptr, at, next: tl.constexpr, end, WHOLE: tl.constexpr):
    """What belongs to each lane's 8 outputs at + next, ...; in this order the address is made once for all units."""
    near, far = tl.full((BLOCK,), 1, tl.int32), tl.full((BLOCK,), 1, tl.int32)
    if not WHOLE:
        near, far = (at + next < end).to(tl.int32), (at + (next + 4) < end).to(tl.int32)
    if ptr is None:
        return (tl.zeros((BLOCK,), tl.int32),) * 8
    else:
        return _load(ptr + at + next, near, 4, 4, ZERO=True) + _load(ptr + at + (next + 4), far, 4, 4, ZERO=True)


@triton.jit
def _rows_kernel(
    # what `kernels.few_rows.launch_prepare` makes
    made_ptr, kept_ptr, down_ptr,
    # read and written
    weight_ptr, out_ptr, offset_ptr, weight_scale_ptr, fineness_ptr,
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
    GROUPS: tl.constexpr = PLAN.groups
    WORDS: tl.constexpr = LANES.words
    EACH: tl.constexpr = 1 if ROWS <= 4 else 2  # rows of which a lane gets sums
    ROOM: tl.constexpr = (OP.n_in + 127) // 128 * 128  # inputs of a row of those made
    OWN: tl.constexpr = 2 if OP.bits == 8 else 1  # words of a unit, 8 outputs of a lane
    UNIT: tl.constexpr = 8 if OP.bits == 8 else LANES.chunk  # from one unit to the next
    WHOLE: tl.constexpr = LANES.full and not LANES.by_word  # every lane has all its outputs
    ALL: tl.constexpr = not OP.cut and WHOLE and OP.n_in % (32 * BLOCKS * GROUPS) == 0
    lane = tl.arange(0, BLOCK)
    group = tl.program_id(1) * GROUPS
    segment, first, last = outputs_of_tile(tl.program_id(0), tiles_1, tiles_2, start_1, start_2, N_OUT, PLAN.block_out)

    # a lane's first weights and scales
    piece, at_input = first + lane // 4 * 8 * (WORDS // 2 if OP.bits == 8 else 1), group * (BLOCKS * BLOCK)
    weights_at, scale_at = weight_ptr + (at_input + lane % 4).to(tl.int64) * N_OUT + piece, weight_scale_ptr
    if OP.bits == 4:
        weights_at = weight_ptr + (at_input + lane % 4).to(tl.int64) * (N_OUT >> 1) + (piece >> 1)
        scale_at += (at_input + lane % 8 * 4 + lane // 8).to(tl.int64) * (N_OUT // OP.groupsize)
    tile = weights_at, scale_at, piece, first, last, N_OUT

    # weights: dense ones before the launch before has ended; else those that any row keeps
    weights, pairs = (), ()
    if PDL and OP.cut:
        tl.extra.cuda.gdc_wait()
    if OP.cut:  # each segment has inputs of its own
        made_ptr += segment * (ROWS * ROOM)
        kept_ptr += segment * (ROWS * ((OP.n_in + BLOCK - 1) // BLOCK))
        if OP.bits == 8:
            down_ptr += segment * (ROWS * (ROOM // (BLOCKS * BLOCK)))
    for b in tl.static_range(BLOCKS * GROUPS):
        kept = kept_by_any(kept_ptr, group * BLOCKS + b, ROWS, ROWS, OP)
        weights, pairs = _load_block(weights, pairs, kept, b, tile, ALL, OP, LANES)
    if PDL and not OP.cut:
        tl.extra.cuda.gdc_wait()
    tl.debug_barrier()  # else the compiler puts some loads off until others have come

    # 8 neighbouring outputs of each lane at a time
    row = tl.minimum(lane // 4 if EACH == 2 else lane // 8, ROWS - 1)
    x_at = made_ptr + row * ROOM + at_input + lane % 4 * 8
    if OP.bits == 4 and GROUPS == 1:
        made = _made(x_at, OP, PLAN)
    for u in tl.static_range(WORDS // OWN):
        end, scales = last, ()
        if OP.bits == 4:
            end = tl.minimum(last, first + (u + 1) * UNIT)
        finenesses = _eight_factors(fineness_ptr, piece, u * UNIT, end, WHOLE)
        if OP.bits == 8:
            scales = _eight_factors(weight_scale_ptr, piece, u * UNIT, end, WHOLE)
        total = (tl.zeros((BLOCK,), tl.float32),) * (8 * EACH)
        for j in tl.static_range(GROUPS):
            offsets = _eight_factors(offset_ptr, piece, u * UNIT, tl.where(group + j == 0, end, 0), False)
            if OP.bits == 8:
                down_at = down_ptr + group + j
                columns, rows = _int8_columns(
                    x_at + j * BLOCKS * BLOCK, down_at, ROOM // (BLOCKS * BLOCK), EACH, ROWS, PLAN
                )
            else:
                if GROUPS > 1:
                    made = _made(x_at + j * BLOCKS * BLOCK, OP, PLAN)
                columns, rows = _int4_columns(made, pairs, j * BLOCKS * WORDS + u, EACH, OP, PLAN, LANES)
            sums, new = _sums_of_unit(weights, j * BLOCKS * 8 * WORDS + u * OWN, columns, EACH, OP, PLAN, LANES), ()
            for i in tl.static_range(8 * EACH):
                down, low = rows[i // 8]
                x, offset = sums[i].to(tl.float32), offsets[i % 8].to(tl.float32, bitcast=True)
                if OP.bits == 4:
                    x = tl.fma(x, down if i % 2 == 0 else down * 0.0625, low)
                    if offset_ptr is not None:
                        x += offset
                else:
                    factor = scales[i % 8].to(tl.float32, bitcast=True)
                    x = tl.fma(x * down, factor, offset) if offset_ptr is not None else x * down * factor
                new = new + (total[i] + _on_grid(x, finenesses[i % 8], OP, fineness_ptr is not None),)
            total = new

        # two lanes of neighbouring rows exchange halves: together they add 32 bytes of a row, then of the other's
        odd = lane % 2
        own_at = piece + odd * 4
        for r in tl.static_range(EACH):
            own, theirs = (), ()
            for i in tl.static_range(4):
                near, far = total[r * 8 + i], total[r * 8 + 4 + i]
                sent = tl.where(odd == 0, far, near).to(tl.int32, bitcast=True)
                own = own + (tl.where(odd == 0, near, far),)
                theirs = theirs + (_from_lane(sent, lane ^ 1).to(tl.float32, bitcast=True),)
            for pair in tl.static_range(2):
                row = (lane ^ pair) % 4 * EACH + r
                there = tl.full((BLOCK,), 1, tl.int32)
                if not WHOLE or ROWS % 4:
                    there = ((own_at + u * UNIT < end) & (row < ROWS)).to(tl.int32)
                _add(out_ptr + (row * out_stride + own_at) + u * UNIT, there, theirs if pair else own, 4, LANES)


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
    if prepared:
        plan = of_integer_rows(plan)
    hopper = pdl or (x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0))
    operation, lanes = product.operation(prologue, dtype), lanes_of(plan, product, hopper, bool(prepared))

    starts, tiles = starts_of(segments), starts_of([triton.cdiv(width, plan.block_out) for width in segments])
    grid = tiles[-1], triton.cdiv(n_in, BLOCK.value * plan.blocks * plan.groups), rows if prologue == "given" else 1
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
    _integer_kernel[grid](
        x, gain, product.threshold, weight, out, zero, last_rstd, *read, starts[-1], n_zero, *places, eps,
        ZERO=zero_block, **options,
    )
