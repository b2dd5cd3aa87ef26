"""Weights of other forms in a prompt's pass on a GPU: written once in the run's dtype, or for short prompts not at all.

Torch's own operations take two launches of int8 and nine of int4, which write float32 in between. A product of few
tokens takes less time than writing its weight in 16 bits, so it widens the weight in registers.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.packed import CELL_ROWS, GROUP
from kernels.packed_words import TABLE, WIDTH, escape_of, escapes_in, four_pairs, in_order, load_words, scales

# Of a program of a product: tokens, inputs and outputs at once, stages (of 99 KB in all at most), warps, registers.
TILES = ((64, 64, 128, 4, 8, 128), (128, 64, 128, 3, 8, 128))
PROGRAMS = 264  # where a product has fewer tiles, they are shared: two on each of an H100's 132 multiprocessors
_compiled = {}  # kernels, by what Triton compiles them for


# The even and the odd output of a byte. both: s and m at once, their bits are the upper ones of a float32.
@triton.jit
def _widened_int4(code, both, DTYPE: tl.constexpr):
    code = code.to(tl.int32)
    s, m = (both << 16).to(tl.float32, bitcast=True), (both & -65536).to(tl.float32, bitcast=True)
    return ((code & 15).to(tl.float32) * s + m).to(DTYPE), ((code >> 4).to(tl.float32) * s + m).to(DTYPE)


@triton.jit
def _dequantize_kernel(
    weight_ptr, scale_ptr, out_ptr, n_in, n_stored,
    # strides of an input and of an output; STORED: bytes of a group of int4, 0 of int8
    weight_in, weight_out, scale_in, scale_out, out_in, out_out, STORED: tl.constexpr,
    BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr,
):
    i = (tl.program_id(1) * BLOCK_IN + tl.arange(0, BLOCK_IN)).to(tl.int64)[:, None]
    j = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)[None, :]
    mask = (i < n_in) & (j < n_stored)
    value = tl.load(weight_ptr + i * weight_in + j * weight_out, mask=mask, other=0)

    if STORED:
        both = tl.load(scale_ptr + i * scale_in + j // STORED * scale_out, mask=mask, other=0)
        even, odd = _widened_int4(value, both, out_ptr.dtype.element_ty)
        value, j = tl.interleave(even, odd), tl.program_id(0) * 2 * BLOCK_OUT + tl.arange(0, 2 * BLOCK_OUT)[None, :]
        mask = (i < n_in) & (j < 2 * n_stored)
    else:
        value = value.to(tl.float32) * tl.load(scale_ptr + j, mask=j < n_stored, other=0.0)
    tl.store(out_ptr + i * out_in + j * out_out, value.to(out_ptr.dtype.element_ty), mask=mask)


# `_widened_int4` in bfloat16, whose instructions take two numbers at once. A code n behind the upper bits of 128 is
# 128 + n. s * n + m rounds once here. `dequantize` rounds to float32 first, which differs only where
# 0 < |m| <= 2^-24 |s n|: all mantissas and codes were tried. The loop takes 6.0 instructions per weight instead of
# 10.1 (64 tokens, groups of 64, sm_90).
@triton.jit
def _widened_int4_pair(code, both):
    pair = tl.inline_asm_elementwise(
        """{ .reg .b32 high, one, back, s, m; mov.b32 one, 0x3f803f80; mov.b32 back, 0xc300c300; shr.u32 high, $4, 4;
        prmt.b32 $0, $4, high, 0x0400; lop3.b32 $0, $0, 0x000f000f, 0x43004300, 0xea; fma.rn.bf16x2 $0, $0, one, back;
        prmt.b32 $1, $4, high, 0x0501; lop3.b32 $1, $1, 0x000f000f, 0x43004300, 0xea; fma.rn.bf16x2 $1, $1, one, back;
        prmt.b32 $2, $4, high, 0x0602; lop3.b32 $2, $2, 0x000f000f, 0x43004300, 0xea; fma.rn.bf16x2 $2, $2, one, back;
        prmt.b32 $3, $4, high, 0x0703; lop3.b32 $3, $3, 0x000f000f, 0x43004300, 0xea; fma.rn.bf16x2 $3, $3, one, back;
        prmt.b32 s, $5, $5, 0x1010; prmt.b32 m, $5, $5, 0x3232; fma.rn.bf16x2 $0, $0, s, m;
        prmt.b32 s, $6, $6, 0x1010; prmt.b32 m, $6, $6, 0x3232; fma.rn.bf16x2 $1, $1, s, m;
        prmt.b32 s, $7, $7, 0x1010; prmt.b32 m, $7, $7, 0x3232; fma.rn.bf16x2 $2, $2, s, m;
        prmt.b32 s, $8, $8, 0x1010; prmt.b32 m, $8, $8, 0x3232; fma.rn.bf16x2 $3, $3, s, m; }""",
        "=&r,=&r,=&r,=&r,r,r,r,r,r", [code, both], dtype=tl.int32, is_pure=True, pack=4,
    )
    return pair.to(tl.int16).to(tl.bfloat16, bitcast=True), (pair >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit(do_not_specialize=["n_tokens"])
def _product_kernel(
    x_ptr, weight_ptr, scale_ptr, out_ptr, sums_ptr, arrived_ptr, n_tokens, n_in, n_stored,
    # STORED: bytes of a group of int4, 0 of int8; SPLITS: programs of a tile
    STORED: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr,
    SPLITS: tl.constexpr,
):
    t = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)[:, None]
    j = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)[None, :]
    BYTES: tl.constexpr = BLOCK_OUT // 2 if STORED else BLOCK_OUT
    n_out = n_stored * (BLOCK_OUT // BYTES)
    byte = tl.program_id(1) * BYTES + tl.arange(0, BYTES)[None, :]
    y = tl.zeros((BLOCK_TOKENS, BLOCK_OUT), tl.float32)

    for start in range(tl.program_id(2) * BLOCK_IN, n_in, SPLITS * BLOCK_IN):
        i = start + tl.arange(0, BLOCK_IN)
        x = tl.load(x_ptr + t * n_in + i[None, :], mask=(t < n_tokens) & (i[None, :] < n_in), other=0.0)
        i = i.to(tl.int64)[:, None]
        weight = tl.load(weight_ptr + i * n_stored + byte, mask=(i < n_in) & (byte < n_stored), other=0)
        if STORED:
            ALONG: tl.constexpr = min(STORED & -STORED, BYTES)  # so many bytes share a scale, which is loaded once
            group = tl.program_id(1) * BYTES + tl.arange(0, BYTES // ALONG)[None, :] * ALONG
            mask = (i < n_in) & (group < n_stored)
            both = tl.load(scale_ptr + i * (n_stored // STORED) + group // STORED, mask=mask, other=0)[:, :, None]
            weight = weight.reshape(BLOCK_IN, BYTES // ALONG, ALONG)
            HALF: tl.constexpr = x.dtype
            even, odd = _widened_int4_pair(weight, both) if HALF == tl.bfloat16 else _widened_int4(weight, both, HALF)
            weight = tl.interleave(even, odd).reshape(BLOCK_IN, BLOCK_OUT)
        y = tl.dot(x, weight.to(x.dtype), y)

    # the last program of a tile adds the sums of all, in their order
    mask, at = (t < n_tokens) & (j < n_out), t.to(tl.int64) * n_out + j
    if SPLITS > 1:
        tl.store(sums_ptr + tl.program_id(2) * n_tokens * n_out + at, y, mask=mask)
        tl.debug_barrier()
        arrived_ptr += tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        if tl.atomic_add(arrived_ptr, 1, sem="acq_rel") < SPLITS - 1:
            return
        tl.store(arrived_ptr, 0)
        y = tl.zeros_like(y)
        for split in range(SPLITS):
            y += tl.load(sums_ptr + split * n_tokens * n_out + at, mask=mask, other=0.0, cache_modifier=".cg")
    if STORED == 0:
        y *= tl.load(scale_ptr + j, mask=j < n_out, other=0.0)
    tl.store(out_ptr + at, y.to(x_ptr.dtype.element_ty), mask=mask)


def _launch(kernel: triton.JITFunction, grid: tuple[int, int, int], *arguments: Tensor | int, **options: int) -> None:
    # kernel[grid](*arguments, **options), quicker: Triton looks at the first arguments of a kind alone
    kinds = (a if isinstance(a, int) else (a.dtype, a.data_ptr() % 16) for a in arguments)
    key = (kernel, arguments[0].device, *kinds)
    with torch.cuda.device_of(arguments[0]):
        if compiled := _compiled.get(key):
            compiled[grid](*arguments)
        else:
            _compiled[key] = kernel[grid](*arguments, **options)  # None in Triton's interpreter


def _stored(weight: Tensor, scale: Tensor) -> tuple[int, int, Tensor]:
    # outputs, bytes of a group of int4 (0 of int8), and the scale, int4's as one number per group
    if weight.dtype == torch.uint8:
        return 2 * weight.shape[1], weight.shape[1] // scale.shape[1], scale.view(torch.int32)
    return weight.shape[1], 0, scale


@cache
def _arrived(device: torch.device) -> Tensor:
    # programs of each tile whose sums are there; 0 between launches
    return torch.zeros(PROGRAMS, device=device, dtype=torch.int32)


def launch_dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What an int8 or int4 weight and its scale, `transposed` or not, stand for: [in, out], laid out as weight is."""
    # Equal to the bit: int4's code times s (4 and 8 bits) is exact in float32, whether or not m is added in the same
    # instruction.
    (n_in, n_stored), (n_out, stored, scale), by_row = weight.shape, _stored(weight, scale), weight.stride(1) == 1
    out = torch.empty((n_in, n_out) if by_row else (n_out, n_in), device=weight.device, dtype=dtype)
    out = out if by_row else out.t()

    block_in, block_out = (32, 128) if by_row else (128, 32)
    grid = -(-n_stored // block_out), -(-n_in // block_in), 1
    strides = weight.stride() + (scale.stride()[:2] if stored else (0, 0)) + out.stride()
    _launch(_dequantize_kernel, grid, weight, scale, out, n_in, n_stored, *strides, stored, block_in, block_out)
    return out


@triton.jit
def _unpack_kernel(weight_ptr, table_ptr, out_ptr, n_rows, n_columns, ROWS: tl.constexpr):
    """A cell's weights of packed ones, all columns of a group."""
    groups, group = n_columns // WIDTH, tl.program_id(0)
    rows = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    columns, n_slots = group * WIDTH + tl.arange(0, WIDTH)[None, :], tl.load(table_ptr + 3)
    segment = (group * WIDTH >= tl.load(table_ptr + 5)).to(tl.int32) + (group * WIDTH >= tl.load(table_ptr + 6))
    at = weight_ptr + (rows * groups + group) * 24
    words = load_words(at, tl.arange(0, WIDTH // 8)[None, :], rows < n_rows)
    out = in_order(four_pairs(words[0], words[1], words[2], tl.load(table_ptr + 7))) * scales(table_ptr, segment)[1]
    out_ptr += rows * n_columns + columns
    slot = tl.load(table_ptr + TABLE + tl.program_id(1) * groups + group)
    n, list_ptr = escapes_in(slot, table_ptr + TABLE + n_slots)
    for k in range(1, n + 1):
        row, column, bits = escape_of(slot, list_ptr, k, n)
        here = (rows % ROWS == row) & (columns % WIDTH == column)
        out = tl.where(here, bits.to(tl.float32, bitcast=True), out)
    tl.store(out_ptr, out.to(tl.bfloat16), mask=rows < n_rows)


def launch_unpack(weight: Tensor, table: Tensor) -> Tensor:
    """`packed.unpack`."""
    weight = weight.contiguous().view(torch.int32)
    n_rows, n_columns = len(weight), weight.shape[1] * 8 // 3
    out = torch.empty(n_rows, n_columns, device=weight.device, dtype=torch.bfloat16)
    grid = n_columns // GROUP, -(-n_rows // CELL_ROWS), 1
    _launch(_unpack_kernel, grid, weight, table, out, n_rows, n_columns, CELL_ROWS)
    return out


def launch_product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x [..., in], 16 bits, times what a contiguous int8 or int4 weight [in, out] stands for, [..., out], as x."""
    # The sums are float32. int8's scales come behind them, so that no weight is rounded; int4's weights are, as x is.
    (n_in, n_stored), (n_out, stored, scale), n_tokens = weight.shape, _stored(weight, scale), x.numel() // x.shape[-1]
    block_tokens, block_in, block_out, stages, warps, registers = TILES[n_tokens > TILES[0][0]]
    tiles = -(-n_tokens // block_tokens), -(-n_out // block_out)
    splits = max(1, min(PROGRAMS // (tiles[0] * tiles[1]), n_in // (2 * block_in)))

    out = torch.empty((*x.shape[:-1], n_out), device=x.device, dtype=x.dtype)
    sums = torch.empty((splits, n_tokens, n_out), device=x.device, dtype=torch.float32) if splits > 1 else out
    tensors = x.contiguous(), weight, scale, out, sums, _arrived(x.device)
    numbers = n_tokens, n_in, n_stored, stored, block_tokens, block_in, block_out, splits
    grid, options = (*tiles, splits), {"num_stages": stages, "num_warps": warps, "maxnreg": registers}
    _launch(_product_kernel, grid, *tensors, *numbers, **options)
    return out
