"""`kernels.quantized.dequantize` on a GPU: one launch, which reads a weight once and writes it once in the run's dtype.

Torch's own operations take two launches of int8 and nine of int4, which write float32 in between.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import packed
from kernels.triton_gemv import CELL_OUT, SEGMENTS_AT_MOST, TABLE, in_order, load_packed, widened


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
def _unpack_kernel(
    weight_ptr, table_ptr, out_ptr, n_rows, n_columns, BLOCK_ROWS: tl.constexpr, ELEMENTS: tl.constexpr
):
    """out [n_rows, n_columns] of packed weights, but for their escapes: a program takes some rows and elements of 8."""
    rows = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None]
    columns = tl.program_id(1) * (8 * ELEMENTS) + tl.arange(0, 8 * ELEMENTS)[None, :]
    local, starts_ptr = tl.arange(0, ELEMENTS)[None, :], table_ptr + TABLE // 2
    elements = tl.program_id(1) * ELEMENTS + local
    segment = (8 * elements >= tl.load(starts_ptr + 1)).to(tl.int32) + (8 * elements >= tl.load(starts_ptr + 2))
    at = weight_ptr + rows.to(tl.int64) * (n_columns // 8 * 3) + tl.program_id(1) * (3 * ELEMENTS)
    there = (rows < n_rows) & (8 * elements < n_columns)
    weights = widened(load_packed(at, local, there), tl.load(table_ptr + segment))
    out = in_order(weights).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + rows.to(tl.int64) * n_columns + columns, out, mask=(rows < n_rows) & (columns < n_columns))


@triton.jit
def _escapes_kernel(table_ptr, out_ptr, n_columns, n_cells, n_starts):
    """Writes the escapes of a cell."""
    at = table_ptr + TABLE + tl.program_id(0)
    cell, starts_ptr = tl.program_id(0) % n_cells, table_ptr + TABLE // 2
    segment, start = 0, 0
    for s in tl.static_range(1, SEGMENTS_AT_MOST):
        start_s = tl.load(starts_ptr + s)
        here = cell >= start_s // CELL_OUT + s
        segment, start = tl.where(here, s, segment), tl.where(here, start_s, start)
    first_row = (tl.program_id(0) // n_cells).to(tl.int64) * tl.load(table_ptr + 3)
    first = start + (cell - start // CELL_OUT - segment) * CELL_OUT
    for i in range(tl.load(at), tl.load(at + 1), 32):
        k = i + tl.arange(0, 32)
        entry = tl.load(table_ptr + TABLE + n_starts + k, mask=k < tl.load(at + 1), other=0)
        place = (first_row + (entry >> 9 & 63)) * n_columns + first + (entry & CELL_OUT - 1)
        value = (entry & -65536).to(tl.float32, bitcast=True)
        tl.store(out_ptr + place, value.to(out_ptr.dtype.element_ty), mask=k < tl.load(at + 1))


def launch_unpack(weight: Tensor, table: Tensor, dtype: torch.dtype, cell_rows: int) -> Tensor:
    """`packed.unpack` in two launches, in `dtype`, contiguous."""
    weight = weight.contiguous()
    n_rows, n_columns = len(weight), weight.shape[1] * 2 // 3
    n_cells = packed.cells_of(n_columns)
    n_starts = triton.cdiv(n_rows, cell_rows) * n_cells + 1
    out = torch.empty(n_rows, n_columns, device=weight.device, dtype=dtype)
    with torch.cuda.device_of(weight):
        _unpack_kernel[triton.cdiv(n_rows, 8), triton.cdiv(n_columns, 512)](
            weight.view(torch.int32), table, out, n_rows, n_columns, BLOCK_ROWS=8, ELEMENTS=64
        )
        _escapes_kernel[(n_starts - 1,)](table, out, n_columns, n_cells, n_starts, num_warps=1)
    return out
