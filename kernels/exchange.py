"""What GPUs tell each other in a decode step split over several, in Triton: sums of their parts, and their logits.

A rank writes each float32 into every rank's inbox as one word of 64 bits: the value, and above it a tag that tells this
exchange from all others. Who waits looks at the words themselves, so neither a barrier nor a fence is needed: such a
word is written at once. Two inboxes take turns. When a rank writes to one again, it has the others' words of the
exchange between, and they wrote those after they had read this one.

Every rank adds the parts in the same order, and on their grid (`kernels.grids`), where it makes no difference.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fused_step import HEAD_ROWS

# Values of a program: one per thread, since a thread waits for its values one after the other.
SUM_BLOCK, GATHER_BLOCK = 32, 128


@triton.jit
def _put(at, word, mask, ASM: tl.constexpr):
    """Stores words of 64 bits so that another GPU sees each at once and whole."""
    if ASM:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $3, 0; @p st.relaxed.sys.global.b64 [$1], $2; mov.u32 $0, 0; }",
            "=r,l,l,r", [at.to(tl.int64), word, mask.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
        )
    else:
        tl.store(at, word, mask=mask)


@triton.jit
def _load_inboxes(inboxes_ptr, RANKS: tl.constexpr):
    """Where each rank's inbox lies, a tuple."""
    inboxes = ()
    for r in tl.static_range(RANKS):
        inboxes = inboxes + (tl.load(inboxes_ptr + r).to(tl.pointer_type(tl.int64)),)  # noqa: RUF005 (no stars)
    return inboxes


@triton.jit
def _send(inboxes, start, value, mask, tag, RANKS: tl.constexpr, ASM: tl.constexpr):
    """Writes values [BLOCK], with their tag, to these places of every rank's inbox."""
    word = (tag.to(tl.int64) << 32) | (value.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF)
    for r in tl.static_range(RANKS):
        _put(inboxes[r] + start, word, mask, ASM)


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
def _receive(x, inbox, start, room, mask, tag, RANKS: tl.constexpr, ASM: tl.constexpr):
    """x [BLOCK] and the values that RANKS ranks wrote, `room` words apart, to place start of this inbox, added."""
    at = inbox + start
    if ASM:
        operands = (x, tag, mask.to(tl.int32))
        for r in tl.static_range(RANKS):
            operands = operands + ((at + r * room).to(tl.int64),)  # noqa: RUF005 (Triton knows no stars)
        x = tl.inline_asm_elementwise(
            _wait_and_add(RANKS), _constraints(RANKS), operands, dtype=tl.float32, is_pure=False, pack=1
        )
    else:
        for r in tl.static_range(RANKS):
            late = 1
            while late > 0:
                word = tl.load(at + r * room, mask=mask, other=0, volatile=True)
                late = tl.sum((mask & ((word >> 32).to(tl.int32) != tag)).to(tl.int32), axis=0)
            x += tl.load(at + r * room, mask=mask, other=0).to(tl.int32).to(tl.float32, bitcast=True)
    return x


@triton.jit(do_not_specialize=["rank", "exchange"])
def _sum_kernel(
    part_ptr, h_ptr, inboxes_ptr, epoch_ptr, n, room, rank, exchange,
    PER_STEP: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):
    """h += the sum of all ranks' parts; zeroes this rank's."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    tag = tl.load(epoch_ptr) * PER_STEP + exchange
    inboxes = _load_inboxes(inboxes_ptr, RANKS)
    inbox = tl.load(inboxes_ptr + rank).to(tl.pointer_type(tl.int64))
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    slot = (tag & 1) * RANKS * room

    # the product has ended
    if PDL:
        tl.extra.cuda.gdc_wait()
    part = tl.load(part_ptr + i, mask=mask, other=0.0)
    h = tl.load(h_ptr + i, mask=mask, other=0.0)
    _send(inboxes, slot + rank * room + i, part, mask, tag, RANKS, ASM)
    tl.store(part_ptr + i, tl.zeros((BLOCK,), tl.float32), mask=mask)
    h = _receive(h, inbox, slot + i, room, mask, tag, RANKS, ASM)
    tl.store(h_ptr + i, h, mask=mask)


@triton.jit
def first_of(n, rank, RANKS: tl.constexpr, UNIT: tl.constexpr):
    """`tp.edges`: where a rank's part of n begins, a multiple of UNIT."""
    return tl.minimum(n, tl.cdiv(n, UNIT) * rank // RANKS * UNIT)


@triton.jit(do_not_specialize=["rank", "exchange"])
def _gather_kernel(
    own_ptr, logits_ptr, top_ptr, inboxes_ptr, epoch_ptr, n_vocab, own_stride, logits_stride, top_stride, room, rank,
    exchange,
    PER_STEP: tl.constexpr, RANKS: tl.constexpr, UNIT: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
    ASM: tl.constexpr, PDL: tl.constexpr,
):
    """A row's logits of all ranks, and the largest of every GROUP of them."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    tag = tl.load(epoch_ptr) * PER_STEP + exchange
    row = tl.program_id(1)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = row * own_stride + i  # in the inbox, where the logits of each rank lie side by side
    slot = (tag & 1) * RANKS * room
    n_own = first_of(n_vocab, rank + 1, RANKS, UNIT) - first_of(n_vocab, rank, RANKS, UNIT)
    own = tl.load(own_ptr + at, mask=i < n_own, other=0.0)
    _send(_load_inboxes(inboxes_ptr, RANKS), slot + rank * room + at, own, i < n_own, tag, RANKS, ASM)

    inbox = tl.load(inboxes_ptr + rank).to(tl.pointer_type(tl.int64))
    for r in tl.static_range(RANKS):
        first = first_of(n_vocab, r, RANKS, UNIT)
        mask = i < first_of(n_vocab, r + 1, RANKS, UNIT) - first
        logits = _receive(tl.zeros((BLOCK,), tl.float32), inbox, slot + r * room + at, room, mask, tag, 1, ASM)
        tl.store(logits_ptr + row * logits_stride + first + i, logits, mask=mask)
        top = tl.max(tl.reshape(tl.where(mask, logits, float("-inf")), (BLOCK // GROUP, GROUP)), axis=1)
        group = tl.program_id(0) * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
        in_groups = group * GROUP < first_of(n_vocab, r + 1, RANKS, UNIT) - first
        tl.store(top_ptr + row * top_stride + first // GROUP + group, top, mask=in_groups)


class Inboxes:
    """The inboxes of all ranks, and what a step needs to use them.

    pointers: [ranks] int64, on the device: where each rank's inbox lies, [2, ranks, room] words.
    epoch: [1] int32, steps so far, the one that runs included; exchanges: how many of a step are launched so far.
    """

    def __init__(self, pointers: Tensor, rank: int, room: int, per_step: int, pdl: bool):
        self.pointers, self.rank, self.room, self.per_step, self.pdl = pointers, rank, room, per_step, pdl
        self.epoch = torch.zeros(1, dtype=torch.int32, device=pointers.device)
        self.exchanges = 0

    def begin_step(self) -> None:
        self.epoch.add_(1)
        self.exchanges = 0

    def _options(self) -> dict:
        self.exchanges += 1
        ranks, asm = len(self.pointers), self.pointers.is_cuda
        compiled = {"PER_STEP": self.per_step, "RANKS": ranks, "ASM": asm, "PDL": self.pdl}
        return compiled | {"launch_pdl": self.pdl}

    def add(self, part: Tensor, h: Tensor) -> None:
        """h += the sum of all ranks' parts, both [rows, dim] float32; the part becomes 0."""
        n, exchange = h.numel(), self.exchanges
        _sum_kernel[(triton.cdiv(n, SUM_BLOCK),)](
            part, h, self.pointers, self.epoch, n, self.room, self.rank, exchange,
            BLOCK=SUM_BLOCK, num_warps=SUM_BLOCK // 32, **self._options(),
        )

    def gather(self, own: Tensor, logits: Tensor, top: Tensor, n_vocab: int, unit: int) -> None:
        """logits [rows, vocab and room] of every rank's own [rows, its part and room]; top: see `launch_head`."""
        most, exchange = triton.cdiv(triton.cdiv(n_vocab, unit), len(self.pointers)) * unit, self.exchanges
        _gather_kernel[(triton.cdiv(most, GATHER_BLOCK), len(own))](
            own, logits, top, self.pointers, self.epoch, n_vocab, own.stride(0), logits.stride(0), top.stride(0),
            self.room, self.rank, exchange, UNIT=unit, GROUP=HEAD_ROWS, BLOCK=GATHER_BLOCK,
            num_warps=GATHER_BLOCK // 32, **self._options(),
        )
