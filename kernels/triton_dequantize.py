"""`kernels.quantized.dequantize` on a GPU: one launch, which reads a weight once and writes it once in the run's dtype.

Torch's own operations take two launches of int8 and nine of int4, which write float32 in between.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.packed import CELL_ROWS, GROUP
from kernels.packed_words import TABLE, WIDTH, escape_of, escapes_in, four_pairs, in_order, load_words, scales


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
    code = tl.load(weight_ptr + i * weight_in + j * weight_out, mask=mask, other=0).to(tl.int32)
    out_ptr += i * out_in

    if STORED == 0:
        value = code.to(tl.float32) * tl.load(scale_ptr + j, mask=j < n_stored, other=0.0)
        tl.store(out_ptr + j * out_out, value.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        # s and m at once: their bits are the upper ones of a float32
        both = tl.load(scale_ptr + i * scale_in + j // STORED * scale_out, mask=mask, other=0)
        s, m = (both << 16).to(tl.float32, bitcast=True), (both & -65536).to(tl.float32, bitcast=True)
        even, odd = (code & 15).to(tl.float32) * s + m, (code >> 4).to(tl.float32) * s + m
        even, odd = even.to(out_ptr.dtype.element_ty), odd.to(out_ptr.dtype.element_ty)
        if BY_ROW:
            k = tl.program_id(0) * 2 * BLOCK_OUT + tl.arange(0, 2 * BLOCK_OUT)[None, :]
            tl.store(out_ptr + k * out_out, tl.interleave(even, odd), mask=(i < n_in) & (k < 2 * n_stored))
        else:
            tl.store(out_ptr + 2 * j * out_out, even, mask=mask)
            tl.store(out_ptr + (2 * j + 1) * out_out, odd, mask=mask)


def launch_dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What an int8 or int4 weight and its scale, `transposed` or not, stand for: [in, out], laid out as the weight is.

    Equal to the bit: int4's code times s (4 and 8 bits) is exact in float32, whether or not m is added in the same
    instruction.
    """
    shape, by_row = weight.shape, weight.stride(1) == 1
    stored, scale_strides = 0, (0, 0)
    if weight.dtype == torch.uint8:
        stored, scale = shape[1] // scale.shape[1], scale.view(torch.int32).squeeze(2)
        scale_strides = scale.stride()
    n_in, n_out = shape[0], shape[1] * (2 if stored else 1)
    out = torch.empty((n_in, n_out) if by_row else (n_out, n_in), device=weight.device, dtype=dtype)
    out = out if by_row else out.t()

    block_in, block_out = (32, 128) if by_row else (128, 32)
    strides = *weight.stride(), *scale_strides, *out.stride()
    with torch.cuda.device_of(weight):
        _dequantize_kernel[triton.cdiv(shape[1], block_out), triton.cdiv(n_in, block_in)](
            weight, scale, out, *shape, *strides,
            STORED=stored, BY_ROW=by_row, BLOCK_IN=block_in, BLOCK_OUT=block_out,
        )
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
    weight = weight.contiguous()
    n_rows, n_columns = len(weight), weight.shape[1] * 2 // 3
    out = torch.empty(n_rows, n_columns, device=weight.device, dtype=dtype)
    with torch.cuda.device_of(weight):
        _unpack_kernel[n_columns // GROUP, triton.cdiv(n_rows, CELL_ROWS)](
            weight.view(torch.int32), table, out, n_rows, n_columns, ROWS=CELL_ROWS
        )
    return out
