"""SparseTransformer: the dense Transformer with every projection's input cut at a threshold (TEAL, arXiv 2408.14690).

One token at a time goes through the kernels of `kernels/`, which read only the rows of kept inputs. Several tokens at
a time (prefill) are dense, unless `dense_prefix` says from which position on they are cut: evaluation and counting.
"""

import torch
import torch.nn as nn
from torch import Tensor

from kernels.sparse_gemv import keep_mask, sparse_gemv, sparse_gemv_ref
from model import Float32Buffers, Transformer

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")


class SparseProjection(Float32Buffers):
    """A linear layer whose cut inputs' weights are not read.

    Attributes:
        weight: [in, out], contiguous: a kept input reads one row.
        segments: name and width of each of the S projections fused along out.
        threshold: [S, in], float32; input i counts for segment s where not (|x_i| <= threshold[s, i]).
        kept: kept inputs of each segment since `reset_counts` [S], int64, on the device.
        read: the same, but an input that several rows of a batch keep at one step counts once, as its weights do.
        seen, steps: positions that were cut, of all rows and of one row.
    """

    def __init__(self, in_features: int, segments: dict[str, int], bias=False, device=None, dtype=None):
        super().__init__()
        self.segments = segments
        self.widths = list(segments.values())
        n_out = sum(self.widths)
        self.weight = nn.Parameter(torch.empty(in_features, n_out, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(n_out, device=device, dtype=dtype)) if bias else None
        self.register_buffer("threshold", torch.zeros(len(segments), in_features, device=device))
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
            y = sparse_gemv(x[:, 0], self.weight, self.threshold, self.widths)[:, None]
        else:
            y = x @ self.weight
        return y if self.bias is None else y + self.bias

    def _cut_from(self, x: Tensor, prefix: int) -> Tensor:
        head, tail = x[:, :prefix] @ self.weight, x[:, prefix:]
        self.seen += tail.shape[0] * tail.shape[1]
        self.steps += tail.shape[1]
        for s, threshold in enumerate(self.threshold):
            keep = keep_mask(tail, threshold)
            self.kept[s] += keep.sum()
            self.read[s] += keep.any(dim=0).sum()
        return torch.cat((head, sparse_gemv_ref(tail, self.weight, self.threshold, self.widths)), dim=1)

    def column_norms(self) -> Tensor:
        """2-norm of each input's weights (a column of the usual [out, in] matrix), [S, in], float32."""
        return torch.stack([w.float().norm(dim=1) for w in self.weight.split(self.widths, dim=1)])


def _transpose_on_load(module, state_dict, prefix, *_):
    """Checkpoints hold [out, in]; the transposition runs on the module's own device, one matrix at a time."""
    key = prefix + "weight"
    if key in state_dict:
        state_dict[key] = state_dict[key].to(module.weight.device).t()
    state_dict.setdefault(prefix + "threshold", module.threshold)


class SparseTransformer(Transformer):
    """A Transformer that cuts small inputs of all seven projections. New thresholds are 0: all but exact zeros kept."""

    projection_class = SparseProjection

    def forward(
        self, idx: Tensor, input_pos: Tensor | None = None, num_logits: int = 0, dense_prefix: int | None = None
    ) -> Tensor:
        """Logits of the next token; see `Transformer.forward`.

        `dense_prefix` n: positions [n:] of `idx` are cut by plain masking and their kept inputs counted, the first n
        are dense. None: a single token is cut (by the kernels), several are dense.
        """
        if dense_prefix is None:
            return super().forward(idx, input_pos, num_logits)
        for projection in self.projections:
            projection.dense_prefix = dense_prefix
        try:
            return super().forward(idx, input_pos, num_logits)
        finally:
            for projection in self.projections:
                projection.dense_prefix = None

    def set_threshold(self, layer: int, projection: str, value: float | Tensor) -> None:
        """Sets one projection's threshold in place: one value, or one for each input [in]."""
        for module in self.projections[4 * layer : 4 * layer + 4]:
            if projection in module.segments:
                module.threshold[list(module.segments).index(projection)] = value
                return
        raise ValueError(f"unknown projection {projection!r}; known: {', '.join(PROJECTIONS)}")

    def set_sparsity(self, statistics, sparsity: float | list[dict[str, float]]) -> None:
        """Sets all thresholds from `calibrate.Statistics`: one sparsity, or one for each layer and projection.

        Raises:
            ValueError: the statistics or the list are of a model with another number of layers.
        """
        layers = sparsity if isinstance(sparsity, list) else [dict.fromkeys(PROJECTIONS, sparsity)] * len(self.layers)
        if not len(layers) == statistics.n_layer == len(self.layers):
            raise ValueError(
                f"the model has {len(self.layers)} layers, the statistics {statistics.n_layer}, "
                f"the allocation {len(layers)}"
            )
        for i, shares in enumerate(layers):
            for projection, share in shares.items():
                self.set_threshold(i, projection, statistics.threshold(i, projection, share))

    def reset_counts(self) -> None:
        for projection in self.projections:
            projection.kept.zero_()
            projection.read.zero_()
            projection.seen = projection.steps = 0

    def bytes_per_step(self) -> int:
        """See `Transformer.bytes_per_step`; of the projections the rows that the counted steps read, on average."""
        unread = 0.0
        for module in self.projections:
            for read, width in zip(module.read.tolist(), module.widths, strict=True):
                unread += (module.weight.shape[0] - read / max(module.steps, 1)) * width * module.weight.itemsize
        return super().bytes_per_step() - round(unread)

    def achieved_sparsity(self) -> float:
        """Share of the projections' weights that cut positions did not need, since `reset_counts`."""
        total = kept = 0.0
        for module in self.projections:
            n_in = module.weight.shape[0]
            total += n_in * sum(module.widths) * module.seen
            kept += sum(k * width for k, width in zip(module.kept.tolist(), module.widths, strict=True))
        return 1.0 - kept / total if total else 0.0
