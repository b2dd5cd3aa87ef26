"""Packed bfloat16: the same numbers in 12 bits each, and a list of the few that do not fit.

The exponents of trained weights carry 2.6 bits, and nearly all lie in a window of 16. So a weight is its sign, its
mantissa and 4 bits, its exponent above the base of its segment's window. All others, the escapes, are listed: 0.008 %
of normal weights, 0.03 % of SmolLM2-135M's, nearly all of them zeros.

A row is made of groups of 64 weights, 96 bytes: three planes of 8 int32 words, of which words t are about weights 8 t
to 8 t + 7, four pairs. Word t of plane p < 3 has pair p in place: 12 bits of each half, where a bfloat16 has its sign,
the lowest 4 bits of its exponent, here the code, and its mantissa. The 4 bits between them, SPARE, hold pair 3: its
codes in plane 0, the upper 4 bits of its mantissas in plane 1, and in plane 2 the lower 3, and the other half's sign.
So 9 instructions make 8 weights: 3 pairs take one each, see `kernels.half_mma`.

A GPU multiplies weights 2^(MOST_BASE - base) times as large, whose exponents are a constant above the code, and scales
the sums: powers of two round nothing. Hence the bounds of the base. No finite weight may overflow so.
"""

import torch
from torch import Tensor

GROUP, GROUP_BYTES = 64, 96  # weights, and their bytes
CELL_ROWS = 32  # of a cell, GROUP columns wide, whose escapes are listed together
SEGMENTS, HEADER = 3, 10  # at most; int32 numbers of an escape table before its slots
LEAST_BASE, MOST_BASE = 96, 128  # the latter a multiple of 16
IN_PLACE, SPARE, IN_LAST = 0x87FF87FF - (1 << 32), 0x78007800, 0x80078007 - (1 << 32)  # bits of a word
PART = 1 << 24  # weights packed at once


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """bfloat16 [n, c], c a multiple of 64, as packed [n, 3 c / 2], uint8, and its escapes, int64.

    The first escape is -1 - base of the window, the others (i * c + j) << 16 | bits of weight i, j, ascending.
    """
    n, c = weight.shape
    assert weight.dtype == torch.bfloat16 and c % GROUP == 0
    parts = weight.split(max(1, PART // c))
    counts = sum(torch.bincount((_bits(part) >> 7 & 255).flatten(), minlength=256) for part in parts)
    base = LEAST_BASE + int(counts[LEAST_BASE : MOST_BASE + 16].unfold(0, 16, 1).sum(1).argmax())
    if counts[255 + LEAST_BASE - MOST_BASE : 255].any():
        base = MOST_BASE

    packed = torch.empty(n, c * 3 // 2, dtype=torch.uint8, device=weight.device)
    escapes, first = [torch.tensor([-1 - base], device=weight.device)], 0
    for part in parts:
        bits = _bits(part)
        codes = (bits >> 7 & 255) - base
        i, j = (codes != codes & 15).nonzero(as_tuple=True)
        escapes.append(((i + first) * c + j) << 16 | bits[i, j])

        # the words of the three planes
        halves = (bits & 0x807F | (codes & 15) << 7).view(len(part), -1, 8, 4, 2)
        pairs = halves[..., 0] | halves[..., 1] << 16
        spare = pairs[..., 3] << 4, pairs[..., 3] << 8, _rotated_right(pairs[..., 3], 20)
        planes = [pairs[..., p] | spare[p] & SPARE for p in range(3)]
        packed[first : first + len(part)] = torch.stack(planes, 2).flatten(1).view(torch.uint8)
        first += len(part)
    return packed, torch.cat(escapes)


def with_checksum(stored: Tensor, escapes: Tensor) -> Tensor:
    """What a file lists: a checksum of the escapes, int64, and of `stored`, the file's packed weight; then the escapes.

    It is the sum modulo 2^64 of the escapes and of the sums of the weight's rows, each times an odd number of its own.
    So whatever changes a single one of them changes it.
    """
    terms = torch.cat((escapes, stored.contiguous().view(torch.int64).sum(1)))
    terms *= torch.arange(1, 2 * len(terms), 2, device=terms.device)
    return torch.cat((terms.sum(0, keepdim=True), escapes))


def _bits(weight: Tensor) -> Tensor:
    """bfloat16 -> int32 of its 16 bits."""
    return weight.contiguous().view(torch.int16).int() & 0xFFFF


def _rotated_right(words: Tensor, n: int) -> Tensor:
    return words >> n & (1 << 32 - n) - 1 | words << 32 - n


# An escape table, int32:
#
#     0 to 2    the base of each segment's window, in both halves of a number
#     3         the number of slots
#     4 to 6    the column at which each segment starts; the end, for those that are absent
#     7         MOST_BASE, as the bases are
#     8, 9      where the last two parts begin
#     slots     one for each cell of 32 rows and 64 columns, cells of the same rows side by side; 0: no escape
#     lists     of cells with several escapes: their number, then each
#     rows      for a CPU: where each row's escapes begin in the next part, and the last one's end
#     escapes   for a CPU: column and bits of each
#
# An escape in a slot or a list is the bfloat16's bits << 16, its row in the cell << 8, its column there << 2, and 1.
# The slot of several escapes is the place of their list << 2, and 2.


def escape_table(escapes: Tensor, n_rows: int, widths: list[int]) -> Tensor:
    """What `pack` lists of each segment, one after the other, as one table for the kernels, 1-dimensional.

    Raises ValueError if they are not such escapes: the file is damaged.
    """
    width_of = torch.tensor(widths, device=escapes.device)
    heads, segment = (escapes < 0).nonzero().flatten(), (escapes < 0).cumsum(0) - 1
    if len(heads) != len(widths) or heads[0] != 0:
        raise ValueError(f"the escapes of packed weights are damaged: they are not of {len(widths)} segments")
    bases, listed, segment = -1 - escapes[heads], escapes[escapes >= 0], segment[escapes >= 0]
    at, order, outside = listed >> 16, listed + (segment << 56), (bases < LEAST_BASE) | (bases > MOST_BASE)
    if outside.any() or (at >= n_rows * width_of[segment]).any() or (order.diff() <= 0).any():
        raise ValueError("the escapes of packed weights are damaged: a base or a place is out of range or order")

    # by row and column
    starts = width_of.cumsum(0) - width_of
    row, column = at // width_of[segment], starts[segment] + at % width_of[segment]
    by_row = (row * sum(widths) + column).argsort()
    listed, row, column = listed[by_row] & 0xFFFF, row[by_row], column[by_row]
    rows = torch.cat((row.new_zeros(1), torch.bincount(row, minlength=n_rows).cumsum(0)))

    # by cell
    cell, by_cell = (row // CELL_ROWS * (sum(widths) // GROUP) + column // GROUP).sort(stable=True)
    entries = (listed << 16 | row % CELL_ROWS << 8 | column % GROUP << 2 | 1)[by_cell]

    # one stands in its cell's slot, several in the list behind their number
    cells, nth, counts = torch.unique_consecutive(cell, return_inverse=True, return_counts=True)
    at, place = torch.arange(len(cell), device=cell.device) + nth + 1, counts.cumsum(0) - counts
    place += torch.arange(len(cells), device=cell.device)
    lists, slots = at.new_zeros(len(cell) + len(cells)), at.new_zeros(-(-n_rows // CELL_ROWS) * sum(widths) // GROUP)
    lists[at], lists[place] = entries, counts
    slots[cells] = torch.where(counts > 1, place << 2 | 2, lists[place + 1])

    header = torch.full((HEADER,), sum(widths), device=escapes.device)
    header[: len(widths)], header[4 : 4 + len(widths)] = bases * 0x00800080, starts
    header[3], header[7], header[8] = len(slots), MOST_BASE * 0x00800080, HEADER + len(slots) + len(lists)
    header[9] = header[8] + len(rows)
    return torch.cat((header, slots, lists, rows, torch.stack((column, listed), 1).flatten())).to(torch.int32)


def unpack(packed: Tensor, table: Tensor) -> Tensor:
    """The bfloat16 weights [n, c] of packed ones [n, 3 c / 2] and their `escape_table`, in plain torch."""
    n, c = packed.shape[0], packed.shape[1] * 2 // 3
    planes = packed.contiguous().view(torch.int32).view(n, c // GROUP, 3, 8).unbind(2)
    group = torch.arange(0, c, GROUP, device=packed.device)
    base = table[:SEGMENTS][(group[:, None] >= table[4 : 4 + SEGMENTS]).sum(1) - 1][:, None]
    last = planes[0] >> 4 & 0x07800780 | planes[1] >> 8 & 0x00780078 | _rotated_right(planes[2], 12) & IN_LAST
    pairs = [words + base for words in (*(plane & IN_PLACE for plane in planes), last)]
    bits = torch.stack(pairs, 3).view(torch.int16).flatten(1)

    rows, entries = table.tensor_split(table[8:HEADER].tolist())[1:]
    column, escapes = entries.view(-1, 2).long().unbind(1)
    row = torch.arange(n, device=packed.device).repeat_interleave(rows.diff().long())
    bits[row, column] = escapes.to(torch.int16)
    return bits.view(torch.bfloat16)
