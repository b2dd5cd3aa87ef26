"""How a product is launched on a GPU: its tile, its registers, and which rows are fetched before it may begin.

A program is one warp. It takes some blocks of BLOCK_IN inputs and one tile of outputs, and adds its sums to the result
by atomics. A plan depends on shapes, form and sparsity alone, since a block's own sum has an order.
Everything here was measured on one H100 80GB HBM3; benchmarks/NOTES.md has the tables. A step is one token through the
whole model at batch 1.
"""

import math
from typing import NamedTuple

import torch

from kernels.quantized import Form

# Inputs of a block: one per lane of a warp, and one per bit of the int32 in which the kernel lists kept inputs.
BLOCK_IN = 32

# Programs of 128 registers that run at the same time: 16 on each of an H100's 132 multiprocessors. A launch of more has
# programs that wait for others to end. 4096 -> 6144 at 50 % in two blocks of inputs has 3,072 and takes 10.2 us, in
# three 2,064 and 9.4 us. A small product ends soonest in small tiles, as long as all its programs run at once:
# SmolLM2-135M's step at 50 % took 0.413 ms in tiles of 32 x 64, 0.455 in 32 x 128, 0.580 in two blocks of those.
RESIDENT = 2112

# Outputs beyond which a product is wide: it has programs enough for 512 bytes of a row each. 4096 -> 28672 at 65 % took
# 38.5 us in tiles of 128 outputs, 32.6 in 256 (16 bits); at 25 % 60.2 and 60.2. Dense, a product of 16 bits is wide
# beyond DENSE_WIDE outputs.
WIDE, DENSE_WIDE = 8192, 4096

# Outputs beyond which a wide product of 16 bits keeps 256 outputs a program where cut rows are masked, and takes two
# blocks of inputs where it goes by row. Two blocks make llama-3-8b's step at 65 % 1.1 % shorter (gate|up, 28,672
# outputs). llama-2-7b's qkv (12,288) in the tiles of a narrow product makes its step at 50 % 0.6 % shorter, and
# llama-3.2-1b's gate|up (16,384) its own 0.7 %. It also tells which products prefetch more, see `_prefetch`.
VERY_WIDE = 16384

# Sparsity above which a wide product of 16 bits goes by row: a masked tile spends the instructions of cut rows, too.
# 4096 -> 28672 in tiles of 256 outputs, masked / by row: 32.6 / 31.9 us at 65 %, 49.4 / 51.1 at 40 %.
MOSTLY_CUT = 0.6

# Outputs of an int8 program, see `kernels.int8_mma`.
INT8_OUT = 128

# Weights from which on rows of gate|up are prefetched during attention. llama-3-8b and llama-2-7b gain, see
# `attention_prefetch`. With it llama-3.2-1b's step went from 0.708 to 0.705 ms at 50 % but from 0.616 to 0.620 at 65 %,
# and qwen2.5-0.5b's from 0.580 to 0.589 at 50 %.
LARGE = 1 << 26


BFLOAT16 = Form("none", torch.bfloat16)


class Plan(NamedTuple):
    """One launch of the product's kernel."""

    blocks: int  # of BLOCK_IN inputs that a program takes
    block_out: int  # outputs of its tile
    rows: int  # kept rows that it loads at once, listed; 0: all rows of a block are loaded, the cut ones masked
    registers: int | None = None  # most per thread; None: the compiler's choice
    prefetch: int = 0  # how many of the first programs prefetch rows to L2, before they wait for the launch before
    prefetch_blocks: int = 0  # of how many of their blocks
    guess: bool = False  # only those rows that they guess to be kept; else all
    # of packed weights alone, with the sums of plain ones: a block's rows i, i + strands, ... are added up, then the
    # strands' sums; chained: a block's sum begins with the one before it; listed: kept rows, else cut ones are masked
    strands: int = 1
    chained: bool = False
    listed: bool = False


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
    if form.name == "packed":
        plain = plan_for(prologue, n_in, segments, sparsity, BFLOAT16, dependent, last_rstd)
        return _packed(plain, segments, sparsity)
    if form.name == "int8":
        unknown = prologue == "norm" and not last_rstd
        prefetched = dependent and not unknown and math.gcd(*(part or segments)) % INT8_OUT == 0
        return _int8_plan(prologue, n_in, segments, sparsity, prefetched)
    n_out, bits, common = sum(segments), form.bits, math.gcd(*segments)
    blocks, block_out, rows = _tile(prologue, n_in, n_out, sparsity, bits)

    # Only tiles that divide every segment are prefetched. int4's wide ones keep their size all the same: 512 outputs do
    # not divide llama-2-7b's gate, but 256 make its step 4 to 6 % longer.
    if dependent and common % 128 == 0 and not (bits == 4 and n_out > WIDE):
        block_out = min(block_out, common & -common)

    registers = _registers(prologue, sparsity, bits, blocks, block_out, rows)
    prefetch, prefetch_blocks, guess = _prefetch(prologue, n_out, sparsity, bits, min(blocks, 3))
    unknown = guess and prologue == "norm" and not last_rstd
    if not dependent or unknown or math.gcd(*(part or segments)) % block_out:
        return Plan(blocks, block_out, rows, registers)
    return Plan(blocks, block_out, rows, registers, prefetch, prefetch_blocks, guess)


def strands_of(plan: Plan, n_out: int, bits: int) -> int:
    """How many strands of a block's rows are summed apart by the one-row kernel of floating weights.

    Triton lays a masked tile of 16 bits over a warp 8 outputs at a time, so that 256 outputs are one strand, 64 are 4.
    """
    if plan.rows or n_out % 16:  # else the loads of one row are not vectors
        return 1
    return max(1, (256 if bits == 16 else 128) // plan.block_out)


def _packed(plain: Plan, segments: list[int], sparsity: float) -> Plan:
    """The plan of packed weights, with the sums of bfloat16's `plain` plan."""
    strands = strands_of(plain, sum(segments), 16)
    by_thread, rows = (16, 8) if strands == 1 else (8, 4 if sparsity else 8)
    plan = plain._replace(block_out=32 * by_thread // strands, rows=rows, registers=96, strands=strands)
    plan = plan._replace(chained=plain.rows > 0, listed=sparsity > 0)
    if math.gcd(*segments) % plan.block_out:
        plan = plan._replace(prefetch=0, prefetch_blocks=0, guess=False)
    return plan


def _int8_plan(prologue: str, n_in: int, segments: list[int], sparsity: float, prefetched: bool) -> Plan:
    """That of an int8 product; its blocks share a scale of x, so they are the same for every number of rows of x.

    prefetched: whether rows can be, where some are cut; dense weights themselves are loaded before the wait.

    Four blocks save instructions, two have more programs. A step of llama-3-8b's 16 layers takes, in two / four blocks,
    1.518 / 1.536 ms dense, 1.019 / 1.020 at 50 % and 0.938 / 0.889 at 65 %; at 50 % qkv (6,144 outputs) 7.48 / 6.03 us,
    o 4.27 / 4.75, gate|up 21.57 / 22.87 and down 11.31 / 11.33. One block: 1.586 ms dense, 1.394 at 50 %.
    """
    wide, tiles = sum(segments) > WIDE, sum(-(-width // INT8_OUT) for width in segments)
    # o has at most two: ranks split its inputs at heads, multiples of 64
    most = 4 if sparsity and prologue != "given" and (not wide or sparsity > MOSTLY_CUT) else 2
    programs = tiles * -(-n_in // BLOCK_IN)
    blocks = next((b for b in (4, 2) if b <= most and programs >= b * RESIDENT // 2), 1)

    # 1,056 programs prefetch all their blocks: 1.024 ms at 50 %, none 1.072, 2,112 of them 1.026. Registers are the
    # compiler's: 128 dense (96: 1.518 -> 1.550 ms), 96 for two blocks, 168 for four.
    plan = Plan(blocks, INT8_OUT, 0)
    return plan._replace(prefetch=1056, prefetch_blocks=blocks, guess=True) if prefetched and sparsity else plan


def _tile(prologue: str, n_in: int, n_out: int, sparsity: float, bits: int) -> tuple[int, int, int]:
    """(blocks, block_out, rows) of a `Plan`, before the tile is made to divide the segments."""
    blocks, tiles, given = -(-n_in // BLOCK_IN), -(-n_out // 128), prologue == "given"
    wide = n_out > WIDE or (bits >= 16 and not sparsity and n_out > DENSE_WIDE)
    # int4 goes by row: converting rows that are not needed costs what skipping them saves.
    rows = 0 if bits >= 16 else 4 if sparsity else 16

    # A small product, see RESIDENT. Beyond half of what fits, 64 outputs gain nothing more (llama-3.2-1b at 50 %: 0.708
    # ms with 128, 0.710 with 64); int4 gains nothing from 128 there (0.626 ms with 512, 0.649 with 128).
    if not wide and blocks * -(-n_out // 64) <= RESIDENT // 2:
        return 1, 64, rows
    if not wide and blocks * tiles <= RESIDENT and bits >= 16:
        return 1, 128, rows

    # int4, dense, wants 1,024 outputs of gate|up (a step of 2.529 instead of 2.544 ms) and 256 of o and down.
    if bits == 4:
        return 1, 512 if sparsity else 1024 if wide else 256, rows

    # wide, of 16 bits
    if wide and sparsity > MOSTLY_CUT:
        return 1 if given or n_out <= VERY_WIDE else 2, 256, 16
    if wide and (not sparsity or n_out > VERY_WIDE):
        return 1, 256, 0

    # Narrow: more programs and fewer atomics. Three blocks where that lets all programs run at once, see RESIDENT.
    three = tiles * -(-blocks // 2) > RESIDENT >= tiles * -(-blocks // 3)
    return 3 if three and sparsity and prologue in ("given", "norm") else 2, 128, 0


def _registers(prologue: str, sparsity: float, bits: int, blocks: int, block_out: int, rows: int) -> int | None:
    """Most registers per thread, where the compiler's own choice is slower.

    Of products by row and of dense ones it takes 64, so that 32 programs fit a multiprocessor. With more a program has
    more loads in flight, and a norm's rstd, for which all others wait, comes sooner.
    """
    if bits > 16:
        return None

    # Dense: int4's step 2.534 -> 2.506 ms with 72, but not its gate|up; o and down of 16 bits with 128 5.163 -> 5.145
    # (llama-3-8b).
    if not sparsity and bits < 16:
        return None if block_out > 512 else 72
    if not sparsity:
        return 128 if blocks > 1 else None

    # By row after a norm: llama-3-8b's step at 65 % 2.398 -> 2.363 ms with 96, int4's at 50 % 1.816 -> 1.789 with 72.
    if rows:
        return (72 if bits < 16 else 96) if prologue == "norm" else None

    # Three unrolled blocks take 134 by themselves, of which not RESIDENT programs fit: 4096 -> 6144 11.5 instead of 9.4
    # us. After a norm the compiler needs no bound.
    return 128 if prologue == "given" and blocks == 3 else None


def _prefetch(prologue: str, n_out: int, sparsity: float, bits: int, blocks: int) -> tuple[int, int, bool]:
    """(prefetch, prefetch_blocks, guess) of a `Plan`.

    The memory is idle before a launch may begin. A guess comes from x as it is at that moment: from what the launch
    before has added up so far, or, given (o's x comes at once, at the end), from the last token's. The numbers are a
    step of llama-3-8b at 50 % unless said otherwise.
    """
    # All rows where all are needed: dense 5.28 -> 5.14 ms. And before o and down of int4, where a guess costs what it
    # saves.
    if not sparsity:
        return 528, 1, False
    if prologue != "norm" and bits < 16:
        return 264, 1, False

    # o: a guess takes 3.005 to 2.988 ms with both blocks of 1,056 programs. 1,320 programs of all blocks but the last
    # cost the step 0.35 % of that, but serve all shapes best alone (4096 -> 6144: 9.3 us, 9.5 with 1,056).
    if prologue == "given":
        return 1320, max(1, blocks - 1), True

    # down: 3.038 -> 3.016 ms from 528 to 2,112 programs; gate|up by row at 65 % 2.451 -> 2.428.
    if prologue != "norm" or (n_out > VERY_WIDE and sparsity > MOSTLY_CUT):
        return 2112, 1, True

    # qkv, gate|up. The second blocks of qkv's 528 programs: 3.005 -> 2.988 ms.
    if bits >= 16:
        return 528, blocks, True
    return 1056 if n_out > VERY_WIDE else 264, blocks, True


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
