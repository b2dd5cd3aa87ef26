"""Packed bfloat16 in Triton: words of two weights, made of what is stored, and their escapes, see `kernels.packed`.

Weights are 2^(MOST_BASE - base) times as large, so that no exponent needs an addition; what is made of them is scaled.
"""

import triton
import triton.language as tl

from kernels.packed import GROUP, HEADER, IN_LAST, IN_PLACE, MOST_BASE

WIDTH, TABLE, MASK, LAST_MASK = (tl.constexpr(n) for n in (GROUP, HEADER, IN_PLACE, IN_LAST))
UP, DOWN = tl.constexpr(127 + MOST_BASE), tl.constexpr(127 - MOST_BASE)


@triton.jit
def scales(table_ptr, segment):
    """(2^(MOST_BASE - base), 1 / that) of a segment, float32."""
    base = (tl.load(table_ptr + segment) >> 7) & 255
    return ((-base + UP) << 23).to(tl.float32, bitcast=True), ((base + DOWN) << 23).to(tl.float32, bitcast=True)


@triton.jit
def four_pairs(first, second, third, above):
    """The 4 words of two bfloat16 each of what the words of the three planes hold, escapes aside.

    above: what stands above the codes, from the table's header: a compiler that knows it would spend an instruction
    more on each word.
    """
    last = (((third << 20) | ((third >> 12) & 0xFFFFF)) & LAST_MASK) | above
    last = ((second >> 8) & 0x00780078) | (((first >> 4) & 0x07800780) | last)
    return (first & MASK) | above, (second & MASK) | above, (third & MASK) | above, last


@triton.jit
def load_words(at, element, mask):
    """The words of three planes that hold elements of eight weights each, counted from the group at `at`."""
    at += element // 8 * 24 + element % 8
    return tl.load(at, mask=mask, other=0), tl.load(at + 8, mask=mask, other=0), tl.load(at + 16, mask=mask, other=0)


@triton.jit
def in_order(pairs):
    """Eight weights of each element as float32, in order."""
    low, high = (), ()
    for p in tl.static_range(4):
        low = low + ((pairs[p] << 16).to(tl.float32, bitcast=True),)  # noqa: RUF005 (Triton knows no stars)
        high = high + ((pairs[p] & -65536).to(tl.float32, bitcast=True),)  # noqa: RUF005
    even = tl.interleave(tl.interleave(low[0], low[2]), tl.interleave(low[1], low[3]))
    odd = tl.interleave(tl.interleave(high[0], high[2]), tl.interleave(high[1], high[3]))
    return tl.interleave(even, odd)


@triton.jit
def escapes_in(slot, lists_ptr):
    """How many escapes a slot stands for, and where they are listed behind that number, if it is several."""
    list_ptr = lists_ptr + (slot >> 2)
    return tl.load(list_ptr, mask=(slot & 2) != 0, other=slot & 1), list_ptr


@triton.jit
def escape_of(slot, list_ptr, k, n):
    """The k-th of n escapes of a slot, from 1 on: row and column in its cell, and its bits in the upper half."""
    entry = tl.where((slot & 2) != 0, tl.load(list_ptr + k, mask=k <= tl.where((slot & 2) != 0, n, 0), other=0), slot)
    return (entry >> 8) & 31, (entry >> 2) & 63, entry & -65536


@triton.jit
def with_escapes(pairs, slot, lists_ptr, row, element, up):
    """`pairs`, words of eight weights each, with a cell's escapes times `up`; row, element: their place in the cell."""
    n_escapes, list_ptr = escapes_in(slot, lists_ptr)
    n = 1
    while n <= n_escapes:
        escaped_row, column, bits = escape_of(slot, list_ptr, n, n_escapes)
        mine, out = (row == escaped_row) & (element == column // 8), ()
        there = tl.where(column % 2 != 0, -65536, 0xFFFF)
        scaled = (bits.to(tl.float32, bitcast=True) * up).to(tl.int32, bitcast=True)
        scaled = tl.where(column % 2 != 0, scaled, (scaled >> 16) & 0xFFFF) & there
        for p in tl.static_range(4):
            replaced = (pairs[p] & ~there) | scaled
            out = out + (tl.where(mine & (column % 8 // 2 == p), replaced, pairs[p]),)  # noqa: RUF005
        pairs = out
        n += 1
    return pairs
