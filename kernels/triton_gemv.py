"""What all products on a GPU share, in Triton: their inputs, thresholds and grids; and a product of any float weights.

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

from kernels.plan import AHEAD_BYTES, AHEAD_ROWS, BLOCK_IN, Plan, plan_for
from kernels.quantized import Form, form_of

MAX_SEGMENTS = 3
SLOTS, STRIDE = tl.constexpr(64), tl.constexpr(32)  # copies of a norm's rstd, one per cache line of 32 float32
RSTD_BUFFER = SLOTS.value * STRIDE.value  # behind the outputs of a product with a norm before it
BLOCK = tl.constexpr(BLOCK_IN)
TILE = tl.constexpr(64)  # outputs of a program of the kernel below
PIECE_ROWS, PIECE_BYTES = tl.constexpr(AHEAD_ROWS), tl.constexpr(AHEAD_BYTES)


class Operation(NamedTuple):
    """What a product's kernel computes: compiled in, as its `Plan` is, both as the kernels' uppercase OP and PLAN."""

    prologue: str  # what x is. "given"; "norm": RMSNorm of h; the name of an activation: that of gate, times up
    cut: bool  # whether inputs are compared with thresholds
    shift: bool  # whether thresholds come with shifts
    n_in: int
    dtype: tl.dtype  # in which inputs are rounded and compared
    bits: int = 16  # of a weight
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

    CACHE ".cg" leaves nothing in L1: what is read before the wait may change. x may be `tagged`.
    """
    in_range = rows < OP.n_in
    a = tl.load(x_ptr + rows, mask=in_range, other=0, cache_modifier=CACHE)
    a = untagged(a, OP) if x_ptr.dtype.element_ty == tl.int32 else a.to(tl.float32)
    b = tl.zeros_like(a)
    if OP.prologue != "given" and OP.prologue != "norm":
        b = tl.load(x_ptr + OP.n_in + rows, mask=in_range, other=0.0, cache_modifier=CACHE)
    return a, b


@triton.jit
def tagged(x, tag):
    """x of 16 bits with the number of the step that writes it, in one word: who reads both knows whether x is new."""
    return (x.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) | (tag << 16)


@triton.jit
def untagged(words, OP: tl.constexpr):
    return words.to(tl.int16).to(OP.dtype, bitcast=True).to(tl.float32)


@triton.jit
def _tagged_words(rows, x_ptr, OP: tl.constexpr):
    return tl.load(x_ptr + rows, mask=rows < OP.n_in, other=0, volatile=True)


@triton.jit
def _old(words, rows, tag, OP: tl.constexpr):
    """1 for each tagged word of another step."""
    return ((rows < OP.n_in) & ((words >> 16 & 0xFFFF) != (tag & 0xFFFF))).to(tl.int32)


@triton.jit
def await_inputs(rows, x_ptr, tag_ptr, OP: tl.constexpr, BLOCKS: tl.constexpr):
    """`load_inputs` of 1 or 2 blocks of tagged x, as soon as the launch before has written them in this step.

    To wait for its end, and then to load x, takes about 0.8 us longer (H100).
    """
    tag, none, words = tl.load(tag_ptr), tl.zeros((BLOCK,), tl.float32), _tagged_words(rows, x_ptr, OP)
    if BLOCKS == 1:
        while tl.max(_old(words, rows, tag, OP)) > 0:
            words = _tagged_words(rows, x_ptr, OP)
        return ((untagged(words, OP), none),)
    else:
        tl.static_assert(BLOCKS == 2)
        behind, next_words = rows + BLOCK, _tagged_words(rows + BLOCK, x_ptr, OP)
        while tl.max(_old(words, rows, tag, OP) | _old(next_words, behind, tag, OP)) > 0:
            words, next_words = _tagged_words(rows, x_ptr, OP), _tagged_words(behind, x_ptr, OP)
        return ((untagged(words, OP), none), (untagged(next_words, OP), none))


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


# ---- integers: x on 16-bit fixed point, see `kernels.integer_mma`


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
    # what is added to 1.5 2^23 loses its fraction; 128 more, and a byte that counts from -128 becomes a signed one
    return (x * up + 12583040.0).to(tl.int32, bitcast=True) ^ 0x80


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
    # the tile's first inputs and their constants, its first output, and the outputs of a row (packed: its words)
    rows, constants, first, n_out,
    # what guesses which rows are kept, and the rows
    x_ptr, gain_ptr, threshold_ptr, last_rstd, weight_ptr,
    OP: tl.constexpr, PLAN: tl.constexpr,
):
    """Prefetches the tile's part of the first blocks' rows, all of them or those that it guesses to be kept."""
    BLOCKS: tl.constexpr = PLAN.prefetch_blocks
    TILE_BYTES: tl.constexpr = PLAN.block_out * OP.bits // 8
    tl.static_assert(TILE_BYTES % 16 == 0)
    for block in tl.static_range(BLOCKS):
        ahead = rows + block * BLOCK
        wanted = ahead < OP.n_in
        if PLAN.guess:
            ahead_constants = constants
            if block > 0:
                ahead_constants = load_constants(ahead, gain_ptr, threshold_ptr, OP)
            _x, wanted = inputs(ahead, load_inputs(ahead, x_ptr, OP, ".cg"), ahead_constants, last_rstd, OP)
        at = ahead.to(tl.int64) * n_out + (first * 3 // 8 if OP.bits == 12 else first)
        prefetch(weight_ptr + (at >> 1 if OP.bits == 4 else at), wanted, TILE_BYTES)


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
def _gemv_kernel(
    # read and written
    x_ptr, gain_ptr, weight_ptr, threshold_ptr, out_ptr, zero_ptr, offset_ptr, fineness_ptr,
    # sizes; tiles_i and start_i: first tile and first output of segment i; the norm's epsilon
    n_out, x_stride, out_stride, n_zero, tiles_1, tiles_2, start_1, start_2, eps,
    # compiled in; ZERO: how much of zero_ptr each program fills
    OP: tl.constexpr, ZERO: tl.constexpr, PDL: tl.constexpr,
):
    """out += m (W^T cut(x - shift) + offset): a program takes a block of inputs, a tile of outputs, a row of x.

    What a program adds lies on the outputs' grid, so that the order in which programs add changes nothing.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    tile = tl.program_id(0)
    program = tl.program_id(1) * tl.num_programs(0) + tile
    x_ptr += tl.program_id(2) * x_stride
    out_ptr += tl.program_id(2) * out_stride
    segment, first, last = outputs_of_tile(tile, tiles_1, tiles_2, start_1, start_2, n_out, TILE)
    threshold_ptr += segment * (2 * OP.n_in if OP.shift else OP.n_in)
    cols = first + tl.arange(0, TILE)
    in_cols = cols < last
    rows = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    constants = load_constants(rows, gain_ptr, threshold_ptr, OP)

    # the launch before has ended
    if PDL:
        tl.extra.cuda.gdc_wait()
    if ZERO > 0:
        z = program * ZERO + tl.arange(0, ZERO)
        tl.store(zero_ptr + z, tl.zeros((ZERO,), tl.float32), mask=z < n_zero)
    operands, rstd = load_inputs(rows, x_ptr, OP, ""), 1.0
    if OP.prologue == "norm":
        rstd = shared_rstd(out_ptr + n_out, program, x_ptr, eps, OP.n_in)
    x, keep = inputs(rows, operands, constants, rstd, OP)

    # the sums; the first row of programs adds the offsets
    at = weight_ptr + rows.to(tl.int64)[:, None] * n_out + cols[None, :]
    weight = tl.load(at, mask=keep[:, None] & in_cols[None, :], other=0.0, eviction_policy="evict_first")
    total = tl.sum(tl.where(keep, x, 0.0)[:, None] * weight.to(tl.float32), axis=0)
    if offset_ptr is not None:
        if tl.program_id(1) == 0:
            total += tl.load(offset_ptr + cols, mask=in_cols, other=0.0)
    if OP.multiplier != 1.0:
        total *= OP.multiplier
    if fineness_ptr is not None:
        total = snap(total, tl.load(fineness_ptr + cols, mask=in_cols, other=1.0))
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

    @property
    def shape(self) -> tuple[int, list[int]]:
        """Inputs and segments. A part has the whole's plan, and so its sums: any number of ranks gets the same bits."""
        return self.whole or (len(self.weight), self.segments)

    def plan(self, prologue: str, dependent: bool, last_rstd: bool = True) -> Plan:
        """See `plan_for`."""
        return plan_for(prologue, *self.shape, self.sparsity, self.form, dependent, last_rstd, self.segments)

    def operation(self, prologue: str, dtype: torch.dtype) -> Operation:
        """What a launch with this prologue computes, in the model's dtype."""
        cut, shift, form = self.sparsity > 0, self.threshold.dim() == 3, self.form
        operation = operation_of(prologue, len(self.weight), dtype)._replace(cut=cut, shift=shift, bits=form.bits)
        return operation._replace(groupsize=form.groupsize, multiplier=self.multiplier)

    def check(self) -> None:
        """Asserts what the kernel relies on."""
        n_in, n_out, form = len(self.weight), sum(self.segments), self.form
        assert self.threshold.shape in {(len(self.segments), n_in), (len(self.segments), n_in, 2)}
        assert self.threshold.is_contiguous() and len(self.segments) <= MAX_SEGMENTS
        assert self.weight.is_contiguous() and 8 * self.weight.nbytes == form.bits * n_in * n_out
        if form.name != "none":
            assert all(width * form.bits % 32 == 0 for width in self.segments) and self.weight_scale.is_contiguous()
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


def zeros_of(zero: Tensor | None, programs: int) -> tuple[int, int]:
    """How many zeros a launch writes to `zero`, and how many each of its programs, a power of two."""
    n_zero = 0 if zero is None else zero.numel()
    return n_zero, triton.next_power_of_2(triton.cdiv(n_zero, programs)) if n_zero else 0


def launch_gemv(
    prologue: str, x: Tensor, product: Product, out: Tensor, *,
    norm: Norm | None = None, zero: Tensor | None = None, tag: Tensor | None = None,
    dtype: torch.dtype | None = None, pdl: bool = False,
) -> None:
    """Adds multiplier (W^T cut(x - shift) + offset) to `out`, with x made by the prologue, see `Operation`.

    This kernel is of floating weights of any width, and reads them for each row of x. The others' launchers take the
    same; with `pdl` they read x before the launch before has ended, too, to guess what is kept.

    x: "given" [B, in], may be `tagged`; else float32: h [B, in] or gate|up [B, 2 in and room].
    out: [B, out and room], float32; with "norm" [B, out + RSTD_BUFFER], the rest zeros that take the norm's rstd.
    norm, zero: of the prologue "norm"; a float32 buffer to fill with zeros.
    tag: [1], int32, the step's number, with which the launch before tags x. The others' kernels of one row await x
        by it, and that launch's end only before their own.
    dtype: in which the inputs are rounded and compared; the weight's, if None.
    pdl: programmatic dependent launch.
    """
    product.check()
    assert product.form.name == "none"
    weight, n_in = product.weight, len(product.weight)
    gain, eps, _ = norm or (None, 0.0, None)

    # one program per tile of outputs, block of inputs and row of x; those of a row together fill `zero`
    starts = starts_of(product.segments)
    tiles = starts_of([triton.cdiv(width, TILE.value) for width in product.segments])
    grid = tiles[-1], triton.cdiv(n_in, BLOCK_IN), len(x)
    n_zero, zero_block = zeros_of(zero, grid[0] * grid[1])
    _gemv_kernel[grid](
        x, gain, weight, product.threshold, out, zero, product.offset, product.fineness,
        starts[-1], x.stride(0), out.stride(0), n_zero, *tiles[1:MAX_SEGMENTS], *starts[1:MAX_SEGMENTS], eps,
        OP=product.operation(prologue, dtype or weight.dtype), ZERO=zero_block, PDL=pdl, num_warps=1, launch_pdl=pdl,
    )
