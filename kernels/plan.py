"""How a product is launched on a GPU: its tile, its registers, and which rows are fetched before it may begin.

A program is one warp. It takes some blocks of BLOCK_IN inputs and one tile of outputs, and adds its sums to the result
by atomics. A plan depends on shapes, form and sparsity alone, since a block's own sum has an order.
Everything here was measured on one H100 80GB HBM3; benchmarks/NOTES.md has the tables. A step is one token through the
whole model at batch 1.
"""

import math
from typing import NamedTuple

from kernels.quantized import Form

# Inputs of a block: one per lane of a warp, and one per bit of the int32 in which the kernel lists kept inputs.
BLOCK_IN = 32

# Programs of 128 registers that run at the same time: 16 on each of an H100's 132 multiprocessors. A launch of more has
# programs that wait for others to end.
RESIDENT = 2112

# Outputs beyond which a product is wide: it has programs enough for long parts of a row each.
WIDE = 8192

# Bytes of weights below which a product reads all its rows before it waits for x. To ask for kept rows after the wait
# takes longer. Steps at 25 / 50 / 65 %, ms: SmolLM2-135M in bfloat16 0.424 / 0.412 / 0.405 -> 0.382 / 0.383 / 0.382
# (dense 0.377), in int4 0.416 / 0.408 / 0.404 -> 0.360 / 0.360 / 0.359; qwen2.5-0.5b in int4, all but gate|up, 0.501 /
# 0.477 / 0.462 -> 0.459 / 0.447 / 0.438. With 8 rows they take 3 to 13 % less. 8.7 MB are too much: qwen2.5-0.5b in
# bfloat16 at 65 % takes 0.518 ms without down, 0.530 with it.
SMALL_BYTES = 1 << 22

# Sparsity above which most of the instructions of a tile would be about cut rows.
MOSTLY_CUT = 0.6

# Outputs of an int8 program, and the most of one int4 product of the tensor cores, see `kernels.integer_mma`.
INT8_OUT, CHUNK = 128, 64
INT4_SIZES = ((4, 4), (2, 4), (2, 2), (1, 2), (1, 1))  # blocks of inputs and chunks of outputs, the best first

# Sparsity up to which int8 takes at most two blocks, as where nothing is cut. A step of llama-3-8b at 25 % takes 2.352
# ms with four blocks of qkv and down, 2.323 with two. At 40 % qkv takes less with four.
LITTLE_CUT = 0.3

# Weights from which on rows of gate|up are prefetched during attention. llama-3-8b and llama-2-7b gain, see
# `attention_prefetch`. With it llama-3.2-1b's step went from 0.708 to 0.705 ms at 50 % but from 0.616 to 0.620 at 65 %,
# and qwen2.5-0.5b's from 0.580 to 0.589 at 50 %.
LARGE = 1 << 26


class Plan(NamedTuple):
    """One launch of the product's kernel."""

    blocks: int  # of BLOCK_IN inputs that a program takes
    block_out: int  # outputs of its tile
    rows: int  # rows of W that it loads before its first product; 0: all
    registers: int | None = None  # most per thread; None: the compiler's choice
    prefetch: int = 0  # how many of the first programs prefetch rows to L2, before they wait for the launch before
    prefetch_blocks: int = 0  # of how many of their blocks
    guess: bool = False  # only those rows that they guess to be kept; else all
    early: bool = False  # all rows are loaded before the wait, and those of cut inputs times 0: weights must be finite


def plan_for(
    prologue: str,
    n_in: int,
    segments: list[int],
    sparsity: float,
    form: Form,
    dependent: bool,
    last_rstd: bool = True,
    part: list[int] | None = None,
) -> Plan:
    """How to launch a product.

    prologue: what makes its input: "given", "norm" or an activation, see `kernels.triton_gemv`.
    n_in, segments: inputs, and widths of the output segments.
    sparsity, form: about the share of inputs that the thresholds cut; the weight's form.
    dependent: a dependent launch, which starts before the one before has ended.
    last_rstd: whether a norm's rstd is kept from token to token; without it no row after a norm can be guessed.
    part: segments of a rank's part of the weight, which is multiplied with the sums of the whole.
    """
    unknown, common = prologue == "norm" and not last_rstd, math.gcd(*(part or segments))
    if form.name == "packed":
        plan = _packed_plan(_half_plan(prologue, n_in, segments, sparsity), segments)
    elif form.name == "none":
        plan = _half_plan(prologue, n_in, segments, sparsity)
    else:
        plan = _integer_plan(prologue, n_in, segments, sparsity, form)
    if sparsity and is_small(n_in, segments, form, dependent):
        return plan._replace(prefetch=0, prefetch_blocks=0, guess=False, early=True)
    whole = common % plan.block_out == 0 and plan.block_out * form.bits % 128 == 0
    if not dependent or (plan.guess and unknown) or not whole:
        return plan._replace(prefetch=0, prefetch_blocks=0, guess=False)
    return plan


def is_small(n_in: int, segments: list[int], form: Form, dependent: bool) -> bool:
    """Whether a product reads all its rows, even those of cut inputs; see `SMALL_BYTES`.

    Not one of 32 bits, or of widths that 8 does not divide: their kernel, `kernels.triton_gemv`, reads kept rows alone.
    """
    own_kernel = form.bits <= 16 and math.gcd(8, *segments) == 8
    return dependent and own_kernel and n_in * sum(segments) * form.bits < 8 * SMALL_BYTES


def _half_plan(prologue: str, n_in: int, segments: list[int], sparsity: float) -> Plan:
    """That of a 16-bit product; its blocks are the same for every number of rows of x, as the sums depend on them.

    A dense program that prefetches nothing loads its weights before it waits for the launch before. The numbers are
    llama-3-8b's step unless said otherwise.
    """
    programs = -(-n_in // BLOCK_IN) * sum(-(-width // 64) for width in segments)  # of 1 x 64

    # A small product ends soonest where all programs run at once: SmolLM2-135M's dense step takes 6.2 % less in 1 x 128
    # than in 1 x 64, 3.6 % less in 2 x 64. With all rows loaded before the wait 1 x 64 and 1 x 128 are level.
    if programs <= RESIDENT // 2:
        return Plan(1, 128, 0)

    # Dense: one block of gate|up makes one row's step 0.4 % shorter, but has twice the sums to add for several rows.
    # o's weights are prefetched: loaded before the wait they make the step 0.5 % longer.
    if not sparsity:
        return Plan(2, 64, 0, None, 528, 1) if prologue == "given" else Plan(2, 64, 0)

    # Large programs spend least on what is not multiplication. o and down have at most two blocks, since ranks split
    # their inputs at multiples of 64. All 64 rows at once take 160 registers: -1.4 % for down, -0.8 % for gate|up. But
    # o's programs all run at once with 128, and at 65 % three blocks of gate|up with 48 of 96 rows take 1.0 % less.
    if prologue == "given":
        return Plan(2, 128, 48, 128, 1320, 2, True)
    if prologue != "norm":
        return Plan(2, 128, 0, None, 1056, 2, True)
    if sparsity > MOSTLY_CUT:
        return Plan(3, 128, 48, 128, 528, 3, True)
    return Plan(2, 128, 0, None, 528, 2, True) if sum(segments) > WIDE else Plan(2, 128, 32, 96, 528, 2, True)


def of_rows(plan: Plan) -> Plan:
    """A 16-bit plan for several rows of x, with the same sums, which only the blocks make. Nothing is guessed."""
    return plan._replace(guess=False, block_out=64, rows=0, registers=None)


def _packed_plan(half: Plan, segments: list[int]) -> Plan:
    """That of packed weights, with the blocks and so the sums of 16-bit ones, but for bounds of registers.

    Dense, a step of llama-3-8b takes 3.0 % less with gate|up in tiles of 128 outputs, 1.0 % with down, 0.7 % with o,
    and 1.0 % more with qkv; 256 lose 2 to 5 % (H100).
    """
    block_out = 128 if half.blocks > 1 and (half.guess or len(segments) < 3) else half.block_out
    rows, prefetch = half.rows if half.blocks > 2 else 0, half.prefetch * half.block_out // block_out
    return half._replace(block_out=block_out, rows=rows, registers=None, prefetch=prefetch)


def chunk_of(groupsize: int) -> int:
    """Outputs of an int4 product of the tensor cores, all of one group and whole words."""
    return next(n for n in range(CHUNK, 0, -8) if groupsize % n == 0)


def _integer_plan(prologue: str, n_in: int, segments: list[int], sparsity: float, form: Form) -> Plan:
    """That of integers; its blocks share a scale of x, so they are the same for every number of rows of x.

    Where some are cut rows are prefetched; dense weights themselves are loaded before the wait.

    Four blocks save instructions, two have more programs. A step of llama-3-8b's 16 layers takes, in two / four blocks,
    1.518 / 1.536 ms dense, 1.019 / 1.020 at 50 % and 0.938 / 0.889 at 65 %; at 50 % qkv (6,144 outputs) 7.48 / 6.03 us,
    o 4.27 / 4.75, gate|up 21.57 / 22.87 and down 11.31 / 11.33. One block: 1.586 ms dense, 1.394 at 50 %. That is int8.
    int4's o, gate|up and down, dense, in 2 blocks x 256 outputs 47.8 us, x 128 outputs 54.1, in 4 x 128 52.0, in
    1 x 256 53.0. Its dense step in 2 and, but for o, 4 blocks x 256: 2.306 and 2.224 ms.
    """
    # o has at most two: ranks split its inputs at heads, multiples of 64
    many = sparsity > MOSTLY_CUT or (sparsity > LITTLE_CUT and sum(segments) <= WIDE)
    most = 4 if many and prologue != "given" else 2
    chunk, sizes, small = INT8_OUT, ((4, 1), (2, 1), (1, 1)), RESIDENT // 2
    if form.name == "int4":
        chunk, small = chunk_of(form.groupsize), RESIDENT // 4
        most = 2 if sparsity or prologue == "given" else 4
        sizes = INT4_SIZES if chunk == CHUNK else ((2, 4), (1, 4))  # words that are loaded alone end anywhere

    def fits(blocks: int, chunks: int) -> bool:
        programs = sum(-(-width // (chunk * chunks)) for width in segments) * -(-n_in // BLOCK_IN)
        divides = chunk != CHUNK or not math.gcd(*segments) % (chunk * chunks)
        return blocks <= most and divides and programs >= blocks * (small if blocks < 4 else RESIDENT // 2)

    blocks, chunks = next((size for size in sizes if fits(*size)), sizes[-1])

    # 1,056 programs prefetch all their blocks: 1.024 ms at 50 %, none 1.072, 2,112 of them 1.026. Registers are the
    # compiler's: 128 dense (96: 1.518 -> 1.550 ms), 96 for two blocks, 168 for four.
    # int4's gate|up takes 26.1 us with it at 50 %, 18.9 without.
    plan = Plan(blocks, chunk * chunks, 0)
    ahead = sparsity and (form.name == "int8" or prologue == "given")
    return plan._replace(prefetch=1056, prefetch_blocks=blocks, guess=True) if ahead else plan


# A program that prefetches during attention asks for AHEAD_BYTES of each of AHEAD_ROWS rows of gate or up. Pieces of 1,
# 2 and 4 KB: 2.908, 2.910 and 2.919 ms (llama-3-8b's step at 50 %).
AHEAD_ROWS, AHEAD_BYTES = 128, 2048

# How many rows of gate|up are considered then: all of them are fetched in a dense step, in a sparse one those that are
# guessed to be kept. llama-3-8b's step at 50 % with 0 / 256 / 512 / 768 / 1,024 rows: 2.987 / 2.974 / 2.956 / 2.939 /
# 2.950 ms, dense 5.159 / 5.114 / 5.122 / 5.132 / 5.170.
DENSE_ROWS_AHEAD, ROWS_AHEAD = 256, 768


def attention_prefetch(n_in: int, n_out: int, sparsity: float, form: Form) -> int:
    """How many pieces of gate|up [n_in, n_out] are prefetched beside attention, unless it reads CROWDED keys.

    llama-3-8b's step is 1.0, 1.4 and 1.4 % shorter with it at 40, 50 and 65 %, dense 0.8 %, llama-2-7b's 1.1 and 1.2 %
    at 50 and 65 %; int8's and int4's is level.
    """
    half_bytes = n_out * form.bits // 16  # of gate's row, and of up's
    if form.bits < 12 or n_in * n_out < LARGE or half_bytes % 16:
        return 0
    return (ROWS_AHEAD if sparsity else DENSE_ROWS_AHEAD) // AHEAD_ROWS * 2 * -(-half_bytes // AHEAD_BYTES)


# Positions of the cache times key/value heads beyond which prefetching during attention makes a step 0.6 to 1.3 %
# longer (8 heads, 6,145 positions).
CROWDED = 49152
