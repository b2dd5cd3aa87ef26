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

BLOCK_TOKENS, BLOCK_IN, BLOCK_OUT = 64, 128, 64  # of a program of a product
_compiled = {}  # kernels, by what Triton compiles them for


@triton.jit
def _widened_int4(code, both, DTYPE: tl.constexpr):
    """The even and the odd output of a byte. both: s and m at once, their bits are the upper ones of a float32."""
    code = code.to(tl.int32)
    s, m = (both << 16).to(tl.float32, bitcast=True), (both & -65536).to(tl.float32, bitcast=True)
    return ((code & 15).to(tl.float32) * s + m).to(DTYPE), ((code >> 4).to(tl.float32) * s + m).to(DTYPE)


@triton.jit
def _dequantize_kernel(
    weight_ptr, scale_ptr, out_ptr, n_in, n_stored,
    # strides of an input and of an output; STORED: bytes of a group of int4, 0 of int8
    weight_in, weight_out, scale_in, scale_out, out_in, out_out, STORED: tl.constexpr,
    # BY_ROW: the outputs of an input lie side by side, else the inputs of an output
    BY_ROW: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr,
):
    i = (tl.program_id(1) * BLOCK_IN + tl.arange(0, BLOCK_IN)).to(tl.int64)[:, None]
    j = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)[None, :]
    mask = (i < n_in) & (j < n_stored)
    code = tl.load(weight_ptr + i * weight_in + j * weight_out, mask=mask, other=0)
    out_ptr += i * out_in

    if STORED == 0:
        value = code.to(tl.float32) * tl.load(scale_ptr + j, mask=j < n_stored, other=0.0)
        tl.store(out_ptr + j * out_out, value.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        both = tl.load(scale_ptr + i * scale_in + j // STORED * scale_out, mask=mask, other=0)
        even, odd = _widened_int4(code, both, out_ptr.dtype.element_ty)
        if BY_ROW:
            k = tl.program_id(0) * 2 * BLOCK_OUT + tl.arange(0, 2 * BLOCK_OUT)[None, :]
            tl.store(out_ptr + k * out_out, tl.interleave(even, odd), mask=(i < n_in) & (k < 2 * n_stored))
        else:
            tl.store(out_ptr + 2 * j * out_out, even, mask=mask)
            tl.store(out_ptr + (2 * j + 1) * out_out, odd, mask=mask)


@triton.jit(do_not_specialize=["n_tokens"])
def _product_kernel(
    x_ptr, weight_ptr, scale_ptr, out_ptr, n_tokens, n_in, n_stored,
    # STORED: bytes of a group of int4, 0 of int8; BLOCK_OUT: bytes of an input's weights
    STORED: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr,
):
    t = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)[:, None]
    j = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)[None, :]
    GROUPED: tl.constexpr = 1 if STORED % BLOCK_OUT == 0 else BLOCK_OUT  # a tile inside one group loads its scale once
    group = tl.program_id(1) * BLOCK_OUT + tl.arange(0, GROUPED)[None, :]
    even = tl.zeros((BLOCK_TOKENS, BLOCK_OUT), tl.float32)  # of int8 all outputs
    odd = tl.zeros((BLOCK_TOKENS, BLOCK_OUT), tl.float32)

    for start in range(0, n_in, BLOCK_IN):
        i = start + tl.arange(0, BLOCK_IN)
        x = tl.load(x_ptr + t * n_in + i[None, :], mask=(t < n_tokens) & (i[None, :] < n_in), other=0.0)
        i = i.to(tl.int64)[:, None]
        code = tl.load(weight_ptr + i * n_stored + j, mask=(i < n_in) & (j < n_stored), other=0)
        if STORED == 0:
            even = tl.dot(x, code.to(x.dtype), even)
        else:
            mask = (i < n_in) & (group < n_stored)
            both = tl.load(scale_ptr + i * (n_stored // STORED) + group // STORED, mask=mask, other=0)
            weight = _widened_int4(code, both, x.dtype)
            even, odd = tl.dot(x, weight[0], even), tl.dot(x, weight[1], odd)

    mask = (t < n_tokens) & (j < n_stored)
    if STORED == 0:
        even *= tl.load(scale_ptr + j, mask=j < n_stored, other=0.0)
        tl.store(out_ptr + t * n_stored + j, even.to(x_ptr.dtype.element_ty), mask=mask)
    else:
        out_ptr += 2 * (t * n_stored + j)
        tl.store(out_ptr, even.to(x_ptr.dtype.element_ty), mask=mask)
        tl.store(out_ptr + 1, odd.to(x_ptr.dtype.element_ty), mask=mask)


def _launch(kernel: triton.JITFunction, grid: tuple[int, int, int], *arguments: Tensor | int, **options: int) -> None:
    """kernel[grid](*arguments, **options), quicker: Triton looks at the first arguments of a kind alone."""
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


def launch_dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What a weight and its scale, `transposed` or not, stand for: [in, out], laid out as the weight is.

    Equal to the bit: int4's code times s (4 and 8 bits) is exact in float32, whether or not m is added in the same
    instruction.
    """
    if scale.dtype == torch.int32:
        return launch_unpack(weight, scale, dtype)
    (n_in, n_stored), (n_out, stored, scale), by_row = weight.shape, _stored(weight, scale), weight.stride(1) == 1
    out = torch.empty((n_in, n_out) if by_row else (n_out, n_in), device=weight.device, dtype=dtype)
    out = out if by_row else out.t()

    block_in, block_out = (32, 128) if by_row else (128, 32)
    grid = -(-n_stored // block_out), -(-n_in // block_in), 1
    strides = weight.stride() + (scale.stride()[:2] if stored else (0, 0)) + out.stride()
    _launch(_dequantize_kernel, grid, weight, scale, out, n_in, n_stored, *strides, stored, by_row, block_in, block_out)
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
    tl.store(out_ptr, out.to(out_ptr.dtype.element_ty), mask=rows < n_rows)


def launch_unpack(weight: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """`packed.unpack` in `dtype`, contiguous."""
    weight = weight.contiguous().view(torch.int32)
    n_rows, n_columns = len(weight), weight.shape[1] * 8 // 3
    out = torch.empty(n_rows, n_columns, device=weight.device, dtype=dtype)
    grid = n_columns // GROUP, -(-n_rows // CELL_ROWS), 1
    _launch(_unpack_kernel, grid, weight, table, out, n_rows, n_columns, CELL_ROWS)
    return out


def launch_product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x [..., in], 16 bits, times what a contiguous int8 or int4 weight [in, out] stands for, [..., out], as x.

    The sums are float32. int8's scales come behind them, so that no weight is rounded; int4's weights are, as x is.
    """
    (n_in, n_stored), (n_out, stored, scale), n_tokens = weight.shape, _stored(weight, scale), x.numel() // x.shape[-1]
    out = torch.empty((*x.shape[:-1], n_out), device=x.device, dtype=x.dtype)
    grid, block_out = (-(-n_tokens // BLOCK_TOKENS), -(-n_out // BLOCK_OUT), 1), BLOCK_OUT * n_stored // n_out
    numbers = n_tokens, n_in, n_stored, stored, BLOCK_TOKENS, BLOCK_IN, block_out
    stages = 4 if stored % block_out == 0 else 3  # 99 KB of shared memory at most, see GROUPED
    _launch(_product_kernel, grid, x.contiguous(), weight, scale, out, *numbers, num_warps=8, num_stages=stages)
    return out


_side_stream = cache(torch.cuda.Stream)


def launch_ahead(x: Tensor, site) -> Tensor:
    """x times what a site's weight stands for, while a stream beside the current one dequantises that of `site.later`.

    No two weights share memory before the current stream has multiplied the first: the stream beside waits for it.
    """
    current, beside = torch.cuda.current_stream(x.device), _side_stream(x.device)
    for later in site.later:
        beside.wait_stream(current)
        with torch.cuda.stream(beside):
            later.ready = launch_dequantize(later.weight, later.scale, x.dtype), beside.record_event()
    if site.ready is None:
        return x @ launch_dequantize(site.weight, site.scale, x.dtype)
    (weight, event), site.ready = site.ready, None
    current.wait_event(event)
    return x @ weight
