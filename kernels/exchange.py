"""What GPUs tell each other in a decode step that they share, in Triton: the parts of a sum, and their logits.

A rank writes each float32 into every rank's inbox as one word of 64 bits: the value, and above it a tag that no other
exchange has. Who waits looks at the words themselves, so neither a barrier nor a fence is needed: such a word arrives
whole. Two inboxes take turns. When a rank writes to one again, it has the others' words of the exchange between, which
they wrote after they had read that inbox.

All ranks add the parts in the same order. On their grid (`kernels.grids`) the order makes no difference.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = tl.constexpr(32)  # values of a program, one per thread, which would wait for several one after the other


@triton.constexpr_function
def _wait_and_add(ranks):
    """PTX of $0 = $1 and the values of words at $4, $5, ... added, once all have tag $2; $3 = 0: of $1 alone."""
    words = range(ranks)
    lines = ["{ .reg .pred p; .reg .b32 tag; .reg .f32 value, sum;", f".reg .b64 {', '.join(f'w{r}' for r in words)};"]
    lines += ["mov.f32 sum, $1; setp.eq.s32 p, $3, 0; @p bra DONE;", "WAIT:"]
    lines += [f"ld.relaxed.sys.global.b64 w{r}, [${4 + r}];" for r in words]
    lines += [f"mov.b64 {{value, tag}}, w{r}; setp.ne.s32 p, tag, $2; @p bra WAIT;" for r in words]
    lines += [f"mov.b64 {{value, tag}}, w{r}; add.f32 sum, sum, value;" for r in words]
    return " ".join([*lines, "DONE: mov.f32 $0, sum; }"])


@triton.constexpr_function
def _constraints(ranks):
    return "=f,f,r,r" + ",l" * ranks


@triton.jit
def _tag_and_inboxes(epoch_ptr, exchange, inboxes_ptr, PER_STEP: tl.constexpr, RANKS: tl.constexpr):
    """Of this exchange; where each rank's inbox lies. What both are read from is the same during a step."""
    inboxes = ()
    for r in tl.static_range(RANKS):
        inboxes = inboxes + (tl.load(inboxes_ptr + r).to(tl.pointer_type(tl.int64)),)  # noqa: RUF005 (no stars)
    return tl.load(epoch_ptr) * PER_STEP + exchange, inboxes


@triton.jit
def _send(inboxes, place, value, mask, tag, RANKS: tl.constexpr, ASM: tl.constexpr):
    """Writes values [BLOCK], with their tag, to these places of every rank's inbox."""
    word = (tag.to(tl.int64) << 32) | (value.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF)
    for r in tl.static_range(RANKS):
        if ASM:  # whole, and seen by other GPUs
            tl.inline_asm_elementwise(
                "{ .reg .pred p; setp.ne.s32 p, $3, 0; @p st.relaxed.sys.global.b64 [$1], $2; mov.u32 $0, 0; }",
                "=r,l,l,r", [(inboxes[r] + place).to(tl.int64), word, mask.to(tl.int32)], dtype=tl.int32,
                is_pure=False, pack=1,
            )
        else:
            tl.store(inboxes[r] + place, word, mask=mask)


@triton.jit
def _receive(x, at, apart, mask, tag, RANKS: tl.constexpr, ASM: tl.constexpr):
    """x [BLOCK] and the values that RANKS ranks write here, `apart` words from each other, added."""
    if ASM:
        operands = (x, tag, mask.to(tl.int32))
        for r in tl.static_range(RANKS):
            operands = operands + ((at + r * apart).to(tl.int64),)  # noqa: RUF005 (Triton knows no stars)
        x = tl.inline_asm_elementwise(
            _wait_and_add(RANKS), _constraints(RANKS), operands, dtype=tl.float32, is_pure=False, pack=1
        )
    else:
        for r in tl.static_range(RANKS):
            late = 1
            while late > 0:
                word = tl.load(at + r * apart, mask=mask, other=0, volatile=True)
                late = tl.sum((mask & ((word >> 32).to(tl.int32) != tag)).to(tl.int32), axis=0)
            x += tl.load(at + r * apart, mask=mask, other=0).to(tl.int32).to(tl.float32, bitcast=True)
    return x


@triton.jit(do_not_specialize=["rank", "exchange"])
def _sum_kernel(
    part_ptr, h_ptr, n, inboxes_ptr, epoch_ptr, room, rank, exchange,
    PER_STEP: tl.constexpr, RANKS: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):
    """h += the sum of all ranks' parts; zeroes this rank's."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    tag, inboxes = _tag_and_inboxes(epoch_ptr, exchange, inboxes_ptr, PER_STEP, RANKS)
    own_inbox = tl.load(inboxes_ptr + rank).to(tl.pointer_type(tl.int64))
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask, place = i < n, (tag & 1) * RANKS * room + i

    # the product has ended
    if PDL:
        tl.extra.cuda.gdc_wait()
    part = tl.load(part_ptr + i, mask=mask, other=0.0)
    h = tl.load(h_ptr + i, mask=mask, other=0.0)
    _send(inboxes, place + rank * room, part, mask, tag, RANKS, ASM)
    tl.store(part_ptr + i, tl.zeros((BLOCK,), tl.float32), mask=mask)
    tl.store(h_ptr + i, _receive(h, own_inbox + place, room, mask, tag, RANKS, ASM), mask=mask)


@triton.jit(do_not_specialize=["rank", "exchange"])
def _gather_kernel(
    own_ptr, logits_ptr, starts_ptr, n_vocab, own_stride, logits_stride,
    inboxes_ptr, epoch_ptr, room, rank, exchange,
    PER_STEP: tl.constexpr, RANKS: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):
    """A row's logits: a program takes BLOCK tokens of one rank, which starts_ptr tells."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    tag, inboxes = _tag_and_inboxes(epoch_ptr, exchange, inboxes_ptr, PER_STEP, RANKS)
    own_inbox = tl.load(inboxes_ptr + rank).to(tl.pointer_type(tl.int64))
    row = tl.program_id(1)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask, place = i < n_vocab, (tag & 1) * RANKS * room + row * n_vocab + i
    owner, start = 0, 0
    for r in tl.static_range(1, RANKS):
        next_start = tl.load(starts_ptr + r)
        owner = tl.where(tl.program_id(0) * BLOCK >= next_start, r, owner)
        start = tl.where(tl.program_id(0) * BLOCK >= next_start, next_start, start)

    if PDL:
        tl.extra.cuda.gdc_wait()
    if owner == rank:
        own = tl.load(own_ptr + row * own_stride + i - start, mask=mask, other=0.0)
        _send(inboxes, place, own, mask, tag, RANKS, ASM)
    logits = _receive(tl.zeros((BLOCK,), tl.float32), own_inbox + place, 0, mask, tag, 1, ASM)
    tl.store(logits_ptr + row * logits_stride + i, logits, mask=mask)


class Exchanges:
    """The exchanges of a step. All ranks make the same ones in the same order.

    inboxes: [ranks] int64, on the device: where the inbox of each lies, [2, ranks, room] words, zeros at first.
    starts: [ranks + 1] int32, on the device: the first token of each rank, multiples of BLOCK.
    """

    def __init__(self, inboxes: Tensor, starts: Tensor, rank: int, room: int, per_step: int, pdl: bool):
        self.inboxes, self.starts, self.pdl, self.made = inboxes, starts, pdl, 0
        epoch = torch.zeros(1, dtype=torch.int32, device=inboxes.device)  # steps so far, this one included
        self.common = inboxes, epoch, room, rank
        self.compiled = {"PER_STEP": per_step, "RANKS": len(inboxes), "ASM": inboxes.is_cuda, "PDL": pdl}

    def begin_step(self) -> None:
        self.common[1].add_(1)
        self.made = 0

    def _launch(self, kernel, grid: tuple, *own) -> None:
        kernel[grid](*own, *self.common, self.made, **self.compiled, num_warps=1, launch_pdl=self.pdl)
        self.made += 1

    def add(self, part: Tensor, h: Tensor) -> None:
        """h += the sum of all ranks' parts, both [rows, dim] float32; the part becomes 0."""
        self._launch(_sum_kernel, (triton.cdiv(h.numel(), BLOCK.value),), part, h, h.numel())

    def gather(self, own: Tensor, logits: Tensor, n_vocab: int) -> None:
        """logits [rows, vocab and room] float32 of every rank's own [rows, its part and room]."""
        grid = triton.cdiv(n_vocab, BLOCK.value), len(own)
        self._launch(_gather_kernel, grid, own, logits, self.starts, n_vocab, own.stride(0), logits.stride(0))
