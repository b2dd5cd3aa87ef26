"""Packed bfloat16: the same numbers in 12 bits each, and a list of the few that do not fit.

The exponents of trained weights carry 2.6 bits, and nearly all lie in a window of 16. So a weight is its sign, its
mantissa and 4 bits, its exponent above the base of its segment's window. All others, the escapes, are listed. Of normal
weights they are 0.008 % (of the window of 15 that leaves a code to mark them 0.015 %, as of the 15 commonest), of
SmolLM2-135M's 0.03 %, nearly all of them zeros. Adding the base is one instruction for two weights.

A row is made of groups of 64 weights, 96 bytes: three planes of 8 int32 words, of which word t is about weights 8 t to
8 t + 7. They make four pairs. The words of the first plane are the signs and mantissas of pairs 0 and 1, where two
bfloat16 have them, those of pair 1 rotated left by 8; the second's are of pairs 2 and 3. The third plane holds the
exponents' codes, those of pair p at bits 4 p + 3 and 4 p + 19, modulo 32.
"""

import torch
from torch import Tensor

GROUP, GROUP_BYTES = 64, 96  # weights, and their bytes
CELL_ROWS, CELL = 32, 512  # rows and columns of a cell, whose escapes are listed together
HEAD_ROWS = 64  # of a cell of the lm_head, as many as a program has tokens
SEGMENTS, HEADER = 3, 8  # at most; int32 numbers of an escape table before its starts
MOST_BASE = 240  # of a window of 16 among 256 exponents
SIGNS, CODES = (
    0x807F807F - (1 << 32),
    0x07800780,
)  # of two bfloat16: signs and mantissas; the lowest 4 bits of exponents
PART = 1 << 24  # weights packed at once


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """bfloat16 [n, c], c a multiple of 64, as packed [n, 3 c / 2], uint8, and its escapes, int64.

    The first escape is -1 - base of the window, the others (i * c + j) << 16 | bits of weight i, j, ascending.
    """
    n, c = weight.shape
    assert weight.dtype == torch.bfloat16 and c % GROUP == 0
    parts = weight.split(max(1, PART // c))
    counts = sum(torch.bincount((_bits(part) >> 7 & 255).flatten(), minlength=256) for part in parts)
    base = int(counts.unfold(0, 16, 1).sum(1).argmax())

    packed = torch.empty(n, c * 3 // 2, dtype=torch.uint8, device=weight.device)
    escapes, first = [torch.tensor([-1 - base], device=weight.device)], 0
    for part in parts:
        bits = _bits(part)
        codes = (bits >> 7 & 255) - base
        i, j = (codes != codes & 15).nonzero(as_tuple=True)
        escapes.append(((i + first) * c + j) << 16 | bits[i, j])

        # the words of the three planes
        signs, codes = ((t & mask).view(len(part), -1, 8, 4, 2) for t, mask in ((bits, 0x807F), (codes, 15)))
        pairs = signs[..., 0] | signs[..., 1] << 16
        planes = [pairs[..., p] | _rotated_right(pairs[..., p + 1], 24) for p in (0, 2)]
        fields = (codes[..., 0] | codes[..., 1] << 16) << torch.arange(0, 16, 4, device=weight.device)
        planes.append(_rotated_right(fields.sum(-1, dtype=torch.int32), 29))
        packed[first : first + len(part)] = torch.stack(planes, 2).flatten(1).view(torch.uint8)
        first += len(part)
    return packed, torch.cat(escapes)


def _bits(weight: Tensor) -> Tensor:
    """bfloat16 -> int32 of its 16 bits."""
    return weight.contiguous().view(torch.int16).int() & 0xFFFF


def _rotated_right(words: Tensor, n: int) -> Tensor:
    return words >> n & (1 << 32 - n) - 1 | words << 32 - n


def escape_table(escapes: Tensor, n_rows: int, widths: list[int], cell_rows: int = CELL_ROWS) -> Tensor:
    """What `pack` lists of each segment, one after the other, as one int32 table for the kernels, 1-dimensional.

    It begins with the bases of three segments' windows, in both halves of a number each, the rows of a cell, the
    columns at which three segments start, those that are absent at the end, and the number of starts. Then come the
    starts of the cells in the list behind them, and the list's end. A cell has `cell_rows` rows and 512 columns of a
    segment; cell k of a segment that starts at column s is s // 512 + k + the segment's number, among as many for all
    rows as `cells_of` says. An entry is the bfloat16's bits in the upper half, its row in the cell << 9, its column
    there.
    Raises ValueError if they are not such escapes: the file is damaged.
    """
    width_of = torch.tensor(widths, device=escapes.device)
    heads = (escapes < 0).nonzero().flatten()
    segment = (escapes < 0).cumsum(0) - 1
    if len(heads) != len(widths) or heads[0] != 0:
        raise ValueError(f"the escapes of packed weights are damaged: {len(heads)} segments, not {len(widths)}")
    bases, listed, segment = -1 - escapes[heads], escapes[escapes >= 0], segment[escapes >= 0]
    at, order = listed >> 16, listed + (segment << 56)
    if (bases > MOST_BASE).any() or (at >= n_rows * width_of[segment]).any() or (order.diff() <= 0).any():
        raise ValueError("the escapes of packed weights are damaged: a base or a place is out of range or order")

    # sorted by cell, row and column
    starts = width_of.cumsum(0) - width_of
    row, column = at // width_of[segment], at % width_of[segment]
    n_cells = cells_of(sum(widths))
    cell = row // cell_rows * n_cells + starts[segment] // CELL + segment + column // CELL
    entry = (row % cell_rows) << 9 | column % CELL
    cell, by_cell = cell.sort(stable=True)
    entries = (entry | (listed & 0xFFFF) << 16)[by_cell].to(torch.int32)

    header = torch.full((2, 4), sum(widths), device=escapes.device)
    header[0, : len(widths)], header[0, 3], header[1, : len(widths)] = bases * 0x00800080, cell_rows, starts
    cells = torch.arange(-(-n_rows // cell_rows) * n_cells + 1, device=escapes.device)
    header[1, 3] = len(cells)
    return torch.cat((header.flatten().int(), torch.searchsorted(cell, cells).int(), entries))


def cells_of(n_columns: int) -> int:
    """Room for the cells of the same rows."""
    return n_columns // CELL + SEGMENTS


def table_part(table: Tensor, n_rows: int, first: int, last: int, n_columns: int) -> Tensor:
    """The escape table of rows first .. last - 1 among n_rows; both multiples of a cell's rows, or the end."""
    cell_rows = int(table[3])
    begin, end, all_cells = (-(-n // cell_rows) * cells_of(n_columns) for n in (first, last, n_rows))
    starts = table[HEADER + begin : HEADER + end + 1]
    entries = table[HEADER + all_cells + 1 :][starts[0] : starts[-1]]
    return torch.cat((table[: HEADER - 1], table.new_tensor([len(starts)]), starts - starts[0], entries))


def unpack(packed: Tensor, table: Tensor, cell_rows: int = CELL_ROWS) -> Tensor:
    """The bfloat16 weights [n, c] of packed ones [n, 3 c / 2] and their `escape_table`, in plain torch."""
    n, c = packed.shape[0], packed.shape[1] * 2 // 3
    first, second, codes = packed.contiguous().view(torch.int32).view(n, c // GROUP, 3, 8).unbind(2)
    starts, bases = table[4 : 4 + SEGMENTS], table[:SEGMENTS]
    group = torch.arange(0, c, GROUP, device=packed.device)
    base = bases[(group[:, None] >= starts).sum(1) - 1][:, None]
    signs = first, _rotated_right(first, 8), second, _rotated_right(second, 8)
    shifted = codes << 4, codes, codes >> 4, _rotated_right(codes, 8)
    pairs = [(s & SIGNS | e & CODES) + base for s, e in zip(signs, shifted, strict=True)]
    bits = torch.stack(pairs, 3).view(torch.int16).flatten(1)

    # the escapes, whose cells say where they are
    n_cells, end = cells_of(c), HEADER + -(-n // cell_rows) * cells_of(c) + 1
    entries = table[end:]
    cells = torch.arange(end - HEADER - 1, device=packed.device)
    cell = cells.repeat_interleave(table[HEADER:end].diff(), output_size=len(entries))
    ids = starts // CELL + torch.arange(SEGMENTS, device=packed.device)
    segment = ((cell % n_cells)[:, None] >= ids).sum(1) - 1
    column = starts[segment] + (cell % n_cells - ids[segment]) * CELL + (entries & CELL - 1)
    bits[cell // n_cells * cell_rows + (entries >> 9 & HEAD_ROWS - 1), column] = (entries >> 16).to(torch.int16)
    return bits.view(torch.bfloat16)
