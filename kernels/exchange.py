"""What GPUs tell each other in a decode step that they share, in Triton: their parts of a sum.

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


@triton.jit(do_not_specialize=["rank", "exchange"])
def _sum_kernel(
    part_ptr, total_ptr, n, inboxes_ptr, epoch_ptr, room, rank, exchange,
    PER_STEP: tl.constexpr, RANKS: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):
    """total += the sum of all ranks' parts; zeroes this rank's."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    # where the parts go to; these numbers are the same during a step
    tag = tl.load(epoch_ptr) * PER_STEP + exchange
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask, place = i < n, (tag & 1) * RANKS * room + i
    inboxes = ()
    for r in tl.static_range(RANKS):
        inboxes = inboxes + (tl.load(inboxes_ptr + r).to(tl.pointer_type(tl.int64)) + place,)  # noqa: RUF005 (no stars)
    own_inbox = tl.load(inboxes_ptr + rank).to(tl.pointer_type(tl.int64)) + place

    # the product has ended
    if PDL:
        tl.extra.cuda.gdc_wait()
    part = tl.load(part_ptr + i, mask=mask, other=0.0)
    total = tl.load(total_ptr + i, mask=mask, other=0.0)
    tl.store(part_ptr + i, tl.zeros((BLOCK,), tl.float32), mask=mask)

    # write it, with its tag, into every rank's inbox
    word = (tag.to(tl.int64) << 32) | (part.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF)
    for r in tl.static_range(RANKS):
        if ASM:
            tl.inline_asm_elementwise(
                "{ .reg .pred p; setp.ne.s32 p, $3, 0; @p st.relaxed.sys.global.b64 [$1], $2; mov.u32 $0, 0; }",
                "=r,l,l,r", [(inboxes[r] + rank * room).to(tl.int64), word, mask.to(tl.int32)], dtype=tl.int32,
                is_pure=False, pack=1,
            )
        else:
            tl.store(inboxes[r] + rank * room, word, mask=mask)

    # add what all ranks write here
    if ASM:
        operands = (total, tag, mask.to(tl.int32))
        for r in tl.static_range(RANKS):
            operands = operands + ((own_inbox + r * room).to(tl.int64),)  # noqa: RUF005
        total = tl.inline_asm_elementwise(
            _wait_and_add(RANKS), _constraints(RANKS), operands, dtype=tl.float32, is_pure=False, pack=1
        )
    else:
        for r in tl.static_range(RANKS):
            word = tl.load(own_inbox + r * room, mask=mask, other=0)
            while tl.max((mask & ((word >> 32).to(tl.int32) != tag)).to(tl.int32), axis=0) > 0:
                word = tl.load(own_inbox + r * room, mask=mask, other=0)
            total += word.to(tl.int32).to(tl.float32, bitcast=True)
    tl.store(total_ptr + i, total, mask=mask)


class Exchanges:
    """The exchanges of a step. All ranks make the same ones in the same order.

    inboxes: [ranks] int64, on the device: where the inbox of each lies, [2, ranks, room] words, zeros at first.
    """

    def __init__(self, inboxes: Tensor, rank: int, room: int, per_step: int, pdl: bool):
        self.inboxes, self.rank, self.room, self.pdl, self.made = inboxes, rank, room, pdl, 0
        self.epoch = torch.ones(1, dtype=torch.int32, device=inboxes.device)  # steps so far, this one included
        self.compiled = {"PER_STEP": per_step, "RANKS": len(inboxes), "ASM": inboxes.is_cuda, "PDL": pdl}

    def add(self, part: Tensor, total: Tensor) -> None:
        """total += the sum of all ranks' parts, both contiguous, float32; the part becomes 0."""
        _sum_kernel[(triton.cdiv(total.numel(), BLOCK.value),)](
            part, total, total.numel(), self.inboxes, self.epoch, self.room, self.rank, self.made,
            **self.compiled, num_warps=1, launch_pdl=self.pdl,
        )
        self.made += 1

    def next_step(self) -> None:
        self.epoch.add_(1)
        self.made = 0
