"""SparseTransformer: the dense Transformer with every projection's input cut at a threshold (TEAL, arXiv 2408.14690).

One token at a time goes through the kernels of `kernels/`, which read only the rows of kept inputs. Several tokens at
a time (prefill) are dense, unless `dense_prefix` says from which position on they are cut: evaluation and counting.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn as nn
from torch import Tensor

from kernels.quantized import Form, dequantize, form_of
from kernels.sparse_gemv import keep_mask, sparse_gemv, sparse_gemv_ref
from model import Transformer, UncastBuffers

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")


class SparseProjection(UncastBuffers):
    """A linear layer whose cut inputs' weights are not read.

    Attributes:
        weight: [in, out], contiguous: a kept input reads one row. int4 is packed to [in, out / 2], uint8.
        scale: [out], float32, of int8; [in, groups, 2], bfloat16, of int4; else None. See `kernels.quantized.Form`.
        segments: name and width of each of the S projections fused along out.
        threshold: [S, in], float32; input i counts for segment s where not (|x_i - shift_i| <= threshold[s, i]).
        shift: [in], float32, what a cut input is taken to be, or None for 0; its product is `offset` [out], float32.
        kept: kept inputs of each segment since `reset_counts` [S], int64, on the device.
        read: the same, but an input that several rows of a batch keep at one step counts once, as its weights do.
        seen, steps: positions that were cut, of all rows and of one row.
    """

    def __init__(
        self,
        in_features: int,
        segments: dict[str, int],
        bias=False,
        device=None,
        dtype=None,
        quant: str = "none",
        groupsize: int = 0,
    ):
        super().__init__()
        self.segments = segments
        self.widths = list(segments.values())
        n_out = sum(self.widths)
        weight, scale = Form.named(quant, dtype, groupsize).empty(in_features, segments, device)
        self.weight = nn.Parameter(weight, requires_grad=quant == "none")
        self.register_buffer("scale", scale)
        self.bias = nn.Parameter(torch.empty(n_out, device=device, dtype=dtype)) if bias else None
        threshold = torch.zeros(len(segments), in_features, device=device, dtype=torch.float32)
        self.register_buffer("threshold", threshold)
        self.register_buffer("shift", None)
        self.register_buffer("offset", None)
        for counter in ("kept", "read"):
            zeros = torch.zeros(len(segments), device=device, dtype=torch.int64)
            self.register_buffer(counter, zeros, persistent=False)
        self.seen = self.steps = 0
        self.dense_prefix: int | None = None
        self.register_load_state_dict_pre_hook(_transpose_on_load)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, in] -> [B, T, out]
        if self.dense_prefix is not None:
            y = self._cut_from(x, self.dense_prefix)
        elif x.shape[1] == 1:
            y = self._cut(sparse_gemv, x[:, 0])[:, None]
        else:
            y = x @ self.dequantized(x.dtype)
        return y if self.bias is None else y + self.bias

    def _cut(self, product: Callable, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        y = product(self._moved(x), self.weight, self.threshold, self.widths, self.scale)
        return y if self.offset is None else (y + self.offset).to(x.dtype)

    def _moved(self, x: Tensor) -> Tensor:  # what is compared with the thresholds
        return x if self.shift is None else (x - self.shift).to(x.dtype)

    def _cut_from(self, x: Tensor, prefix: int) -> Tensor:
        head, tail = x[:, :prefix] @ self.dequantized(x.dtype), x[:, prefix:]
        self.seen += tail.shape[0] * tail.shape[1]
        self.steps += tail.shape[1]
        for s, threshold in enumerate(self.threshold):
            keep = keep_mask(self._moved(tail), threshold)
            self.kept[s] += keep.sum()
            self.read[s] += keep.any(dim=0).sum()
        return torch.cat((head, self._cut(sparse_gemv_ref, tail)), dim=1)

    def set_shift(self, shift: Tensor | None) -> None:
        """Cuts x around `shift` [in] from now on, W x = W (x - shift) + W shift; None: around 0."""
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
    """Checkpoints hold [out, in]; the transposition runs on the module's own device, one matrix at a time.

    This class's own state, which has thresholds, is taken as it is.
    """
    for name in ("shift", "offset"):
        if prefix + name in state_dict:
            setattr(module, name, torch.empty_like(state_dict[prefix + name], device=module.weight.device))
    for key in (prefix + "weight", prefix + "scale"):
        if key in state_dict and state_dict[key].dim() > 1 and prefix + "threshold" not in state_dict:
            state_dict[key] = state_dict[key].to(module.weight.device).transpose(0, 1)
    state_dict.setdefault(prefix + "threshold", module.threshold)


class SparseTransformer(Transformer):
    """A Transformer that cuts small inputs of all seven projections. New thresholds are 0: all but exact zeros kept."""

    projection_class = SparseProjection
    sparsity = 0.0  # about the share that the cuts in use cut, which says how a fused step launches its kernels

    def forward(
        self, idx: Tensor, input_pos: Tensor | None = None, num_logits: int = 0, dense_prefix: int | None = None
    ) -> Tensor:
        """Logits of the next token; see `Transformer.forward`.

        `dense_prefix` n: positions [n:] of `idx` are cut by plain masking and their kept inputs counted, the first n
        are dense. None: a single token is cut (by the kernels), several are dense.
        """
        if dense_prefix is None:
            return super().forward(idx, input_pos, num_logits)
        with self.cut_from(dense_prefix):
            return super().forward(idx, input_pos, num_logits)

    @contextmanager
    def cut_from(self, dense_prefix: int) -> Iterator[None]:
        """Inside it every projection cuts positions [dense_prefix:] of its input by plain masking and counts them."""
        for projection in self.projections:
            projection.dense_prefix = dense_prefix
        try:
            yield
        finally:
            for projection in self.projections:
                projection.dense_prefix = None

    def set_threshold(self, layer: int, projection: str, value: float | Tensor) -> None:
        """Sets one projection's threshold in place: one value, or one for each input [in]."""
        if not 0 <= layer < len(self.layers):
            raise ValueError(f"no layer {layer}; the model has {len(self.layers)}")
        for module in self.projections[4 * layer : 4 * layer + 4]:
            if projection in module.segments:
                module.threshold[list(module.segments).index(projection)] = value
                return
        raise ValueError(f"unknown projection {projection!r}; known: {', '.join(PROJECTIONS)}")

    def set_cuts(self, cuts: list[tuple[Tensor, Tensor | None]], sparsity: float = 0.5) -> None:
        """Sets (threshold [S, in], shift [in] or None) of each of `projections`; `sparsity` is about what they cut.

        Raises:
            ValueError: they are of another model; nothing was set then.
        """
        shapes = [tuple(module.threshold.shape) for module in self.projections]
        found = [tuple(threshold.shape) for threshold, _ in cuts]
        if shapes != found or any(c is not None and len(c) != n for (_, c), (_, n) in zip(cuts, shapes, strict=True)):
            raise ValueError(
                f"the thresholds are of another model: {len(cuts)} inputs, the first {found[:1]}; "
                f"the model has {len(shapes)}, the first {shapes[0]}"
            )
        for module, (threshold, shift) in zip(self.projections, cuts, strict=True):
            module.threshold.copy_(threshold)
            module.set_shift(shift)
        self.sparsity = sparsity

    def set_sparsity(self, statistics, sparsity: float | list[dict[str, float]]) -> None:
        """Sets all thresholds from `calibrate.Statistics`: one sparsity, or one for each layer and projection.

        Raises:
            ValueError: the statistics or the list are of a model with another number of layers, or a projection's
                share is missing; nothing was set then.
        """
        layers = sparsity if isinstance(sparsity, list) else [dict.fromkeys(PROJECTIONS, sparsity)] * len(self.layers)
        if not len(layers) == statistics.n_layer == len(self.layers):
            raise ValueError(
                f"the model has {len(self.layers)} layers, the statistics {statistics.n_layer}, "
                f"the allocation {len(layers)}"
            )
        for i, shares in enumerate(layers):
            if missing := [projection for projection in PROJECTIONS if projection not in shares]:
                raise ValueError(f"the allocation's layer {i} says no sparsity for {', '.join(missing)}")
        for module in self.projections:
            module.set_shift(None)
        for i, shares in enumerate(layers):
            for projection, share in shares.items():
                self.set_threshold(i, projection, statistics.threshold(i, projection, share))
        if isinstance(sparsity, list):
            sparsity = sum(sum(shares.values()) for shares in layers) / (len(PROJECTIONS) * len(layers))
        self.sparsity = sparsity

    def reset_counts(self) -> None:
        for projection in self.projections:
            projection.kept.zero_()
            projection.read.zero_()
            projection.seen = projection.steps = 0

    def bytes_per_step(self) -> int:
        """See `Transformer.bytes_per_step`; of the projections the rows that the counted steps read, on average.

        All rows where no step was counted. Offsets are in it, thresholds and shifts are not.
        """
        unread = 0.0
        for module in self.projections:
            unread -= 0 if module.offset is None else module.offset.nbytes
            n_in, n_out = module.threshold.shape[1], sum(module.widths)
            for read, width in zip(module.read.tolist(), module.widths, strict=True):
                rows = read / module.steps if module.steps else n_in
                unread += (n_in - rows) * module.form.row_bytes(n_out) * width / n_out
        return super().bytes_per_step() - round(unread)

    def achieved_sparsity(self) -> float:
        """Share of the projections' weights that cut positions did not need, since `reset_counts`."""
        total = kept = 0.0
        for module in self.projections:
            n_in = module.weight.shape[0]
            total += n_in * sum(module.widths) * module.seen
            kept += sum(k * width for k, width in zip(module.kept.tolist(), module.widths, strict=True))
        return 1.0 - kept / total if total else 0.0
