"""SparseTransformer: the dense Transformer with every projection's input cut at a threshold (TEAL, arXiv 2408.14690).

One token at a time goes through the kernels of `kernels/`, which read only the rows of kept inputs; in small products a
GPU reads all. Several tokens (prefill) are dense, unless `dense_prefix` says from where they are cut (evaluation).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from kernels.quantized import Form, dequantize, form_of, product, table_on_load
from kernels.sparse_gemv import keep_mask, sparse_gemv, sparse_gemv_ref
from model import Transformer, UncastBuffers

if TYPE_CHECKING:
    from thresholds import Cuts


class Site(NamedTuple):
    """A place of a block whose input is cut: the module there, and the projections that share its input."""

    module: str
    projections: tuple[str, ...]


SITES = {
    "qkv": Site("attention.wqkv", ("q", "k", "v")),
    "o": Site("attention.wo", ("o",)),
    "gate_up": Site("feed_forward.w13", ("gate", "up")),
    "down": Site("feed_forward.w2", ("down",)),
}
PROJECTIONS = {projection: name for name, site in SITES.items() for projection in site.projections}  # -> its site


class SparseProjection(UncastBuffers):
    """A linear layer whose cut inputs' weights are not read.

    weight, scale: [in, out], contiguous: a kept input reads one row; None. Other forms: `kernels.quantized.Form`.
    segments: name and width of each of the S projections fused along out.
    threshold: [S, in], float32; input i counts for segment s where not (|x_i - shift_i| <= threshold[s, i]).
    fineness: [out], float32, of the grid on which a GPU's kernel adds, see `kernels.grids`, or None.
    shift: [in], float32, what a cut input is taken to be, or None for 0; its product is `offset` [out], float32.
    kept: kept inputs of each segment since `reset_counts` [S], int64, on the device.
    read: the same, but an input that several rows of a batch keep at one step counts once, as its weights do.
    seen, steps: positions that were cut, of all rows and of one row.
    reads_all: whether a fused step reads all rows, see `kernels.plan.is_small`.
    """

    def __init__(
        self, n_in: int, segments: dict[str, int], bias=False, device=None, dtype=None, quant="none", groupsize=0
    ):
        super().__init__()
        self.segments, self.widths = segments, list(segments.values())
        weight, scale = Form.named(quant, dtype, groupsize).empty(n_in, segments, device)
        self.weight = nn.Parameter(weight, requires_grad=quant == "none")
        self.bias = nn.Parameter(torch.empty(sum(self.widths), device=device, dtype=dtype)) if bias else None

        # buffers, which keep their dtype; the counters are no part of a saved model
        threshold = torch.zeros(len(segments), n_in, device=device, dtype=torch.float32)
        for name, buffer in {"scale": scale, "threshold": threshold, "shift": None, "offset": None}.items():
            self.register_buffer(name, buffer)
        self.register_buffer("fineness", None, persistent=False)
        for name in ("kept", "read"):
            self.register_buffer(name, torch.zeros_like(threshold[:, 0], dtype=torch.int64), persistent=False)
        self.seen, self.steps, self.reads_all = 0, 0, False
        self.dense_prefix: int | list[int] | None = None
        self.register_load_state_dict_pre_hook(table_on_load)
        self.register_load_state_dict_pre_hook(_transpose_on_load)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, in] -> [B, T, out]
        prefix, length = self.dense_prefix, x.shape[1]
        if isinstance(prefix, list) or (prefix is not None and prefix < length):
            y = self._cut_after(prefix, x)
        elif prefix is None and length == 1:
            y = self._sparse_product(sparse_gemv, x[:, 0])[:, None]
        else:
            y = product(x, self)
        return y if self.bias is None else y + self.bias

    def _sparse_product(self, multiply: Callable, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        y = multiply(self._compared(x), self.weight, self.threshold, self.widths, self.scale, self.fineness)
        return y if self.offset is None else (y + self.offset).to(x.dtype)

    def _compared(self, x: Tensor) -> Tensor:
        """x - shift: what is compared with the thresholds."""
        return x if self.shift is None else (x - self.shift).to(x.dtype)

    def _cut_after(self, prefix: int | list[int], x: Tensor) -> Tensor:
        """The product of x [B, T, in], whose positions [prefix:] are cut and whose kept inputs are counted there."""
        if isinstance(prefix, list):  # what lies behind the last position that is cut goes before the first
            longest = max(prefix)
            x = torch.stack([row.roll(longest - own, 0) for row, own in zip(x, prefix, strict=True)])
            y = self._cut_after(longest, x)
            return torch.stack([row.roll(own - longest, 0) for row, own in zip(y, prefix, strict=True)])

        head, tail = x[:, :prefix] @ self.dequantized(x.dtype), x[:, prefix:]

        # count what the kernels would read
        self.seen += tail.shape[0] * tail.shape[1]
        self.steps += tail.shape[1]
        for s, threshold in enumerate(self.threshold):
            keep = keep_mask(self._compared(tail), threshold)
            self.kept[s] += keep.sum()
            self.read[s] += keep.any(dim=0).sum()

        return torch.cat((head, self._sparse_product(sparse_gemv_ref, tail)), dim=1)

    def set_cut(self, threshold: Tensor, shift: Tensor | None = None) -> None:
        """Sets threshold [S, in] or [S, 1] and shift [in]. Since W x = W (x - shift) + W shift, the offset follows."""
        self.threshold.copy_(threshold.expand_as(self.threshold))
        self.shift = None if shift is None else shift.to(self.weight.device, torch.float32)
        self.offset = None if shift is None else self.shift @ self.dequantized(torch.float32)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """What the weight stands for, [in, out]. The scale comes before the product: float16 does not hold its sums."""
        return dequantize(self.weight, self.scale, dtype)

    @property
    def form(self) -> Form:
        """How the weight is stored now; a cast of the model changes it."""
        return form_of(self.weight, self.scale)

    def column_norms(self) -> Tensor:
        """2-norm of each input's weights (a column of the usual [out, in] matrix), [S, in], float32."""
        return torch.stack([w.norm(dim=1) for w in self.dequantized(torch.float32).split(self.widths, dim=1)])


def _transpose_on_load(module, state_dict, prefix, *_):
    """Checkpoints hold [out, in], transposed on the module's device; own state, which has thresholds, is not."""
    for name in ("shift", "offset"):
        if prefix + name in state_dict:
            setattr(module, name, torch.empty_like(state_dict[prefix + name], device=module.weight.device))
    for key in (prefix + "weight", prefix + "scale"):
        if key in state_dict and state_dict[key].dim() > 1 and prefix + "threshold" not in state_dict:
            state_dict[key] = state_dict[key].to(module.weight.device).transpose(0, 1)
    state_dict.setdefault(prefix + "threshold", module.threshold)


def dense_prefix_of(length: int) -> int:
    """Positions of a window that stay dense, 1 % and at least one: the first token's inputs are like no other's."""
    return max(1, round(length * (1 - 0.99)))


class SparseTransformer(Transformer):
    """A Transformer that cuts small inputs of all seven projections. New thresholds are 0: all but exact zeros kept."""

    projection_class = SparseProjection
    sparsity = 0.0  # of the cuts that were set last: about the share that they cut

    def forward(self, *inputs, dense_prefix: int | list[int] | None = None, **options) -> Tensor:
        """Logits of the next token; see `Transformer.forward`.

        dense_prefix: None: a single token is cut (by the kernels), several are dense. n: see `cut_after`.
        """
        if dense_prefix is None:
            return super().forward(*inputs, **options)
        with self.cut_after(dense_prefix):
            return super().forward(*inputs, **options)

    @contextmanager
    def cut_after(self, dense_prefix: int | list[int]) -> Iterator[None]:
        """Inside it every projection cuts positions [dense_prefix:] of its input by plain masking and counts them.

        A list: of each row, and as many of them as the longest prefix leaves.
        """
        for module in self.sites:
            module.dense_prefix = dense_prefix
        try:
            yield
        finally:
            for module in self.sites:
                module.dense_prefix = None

    @torch.no_grad()
    def set_cuts(self, cuts: "Cuts") -> None:
        """Sets the thresholds and shifts of all sites, and remembers their sparsity.

        Raises ValueError: the cuts are of another model; nothing was set then.
        """
        shapes = [tuple(module.threshold.shape) for module in self.sites]
        fits = len(cuts.thresholds) == len(cuts.shifts) == len(shapes) and all(
            tuple(threshold.shape) in ((segments, n_in), (segments, 1)) and (shift is None or len(shift) == n_in)
            for threshold, shift, (segments, n_in) in zip(cuts.thresholds, cuts.shifts, shapes, strict=True)
        )
        if not fits:
            given = tuple(cuts.thresholds[0].shape) if cuts.thresholds else "missing"
            raise ValueError(
                f"the thresholds are of another model: they are for {len(cuts.thresholds)} sites, of which the first "
                f"is {given}; this model has {len(shapes)}, of which the first is {shapes[0]}"
            )
        for module, threshold, shift in zip(self.sites, cuts.thresholds, cuts.shifts, strict=True):
            module.set_cut(threshold, shift)
        self.sparsity = cuts.sparsity

    def projection_sizes(self) -> dict[str, int]:
        """Weights of each projection of a block; all blocks are alike."""
        return {p: m.threshold.shape[1] * width for m in self.sites[: len(SITES)] for p, width in m.segments.items()}

    def reset_counts(self) -> None:
        for module in self.sites:
            module.kept.zero_()
            module.read.zero_()
            module.seen = module.steps = 0

    def bytes_per_step(self) -> int:
        """See `Transformer.bytes_per_step`; of the projections the rows that the counted steps read, on average.

        All rows where no step was counted, or `reads_all`. Offsets are in it, thresholds and shifts are not.
        """
        unread = 0.0
        for module in self.sites:
            unread -= 0 if module.offset is None else module.offset.nbytes
            n_in, n_out = module.threshold.shape[1], sum(module.widths)
            for read, width in zip(module.read.tolist(), module.widths, strict=True):
                rows = read / module.steps if module.steps and not module.reads_all else n_in
                unread += (n_in - rows) * module.form.row_bytes(n_out) * width / n_out
        return super().bytes_per_step() - round(unread)

    def achieved_sparsity(self) -> float:
        """Share of the projections' weights that cut positions did not need, since `reset_counts`."""
        total = sum(m.threshold.shape[1] * sum(m.widths) * m.seen for m in self.sites)
        kept = sum(k * width for m in self.sites for k, width in zip(m.kept.tolist(), m.widths, strict=True))
        return 1.0 - kept / total if total else 0.0
