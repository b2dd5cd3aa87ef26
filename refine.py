"""Thresholds that cost the model's output least: what `greedy.py --method global` makes, for every level of sparsity.

All thresholds of the model, one a channel and projection, are bought at one price. Two steps:

1. Start. Cutting input x_i costs about 1/2 x_i^2 F_i of the model's loss, F_i the mean of (dL/dx_i)^2 over tokens, L
   the loss with labels drawn from the model (the curvature of the KL divergence to it). It saves a row of the weight,
   as long as the projection is wide. So x_i^2 F_i / width < price cuts: t_i = sqrt(price * width / F_i). Inputs are cut
   around their channel's median c_i instead of 0: a cut input is taken to be c_i, which costs a vector added to the
   output and no weights.
2. Refinement. F is taken where nothing is cut, and errors add up otherwise where half the model is. So the gradient of
   the KL divergence of the sparse model to the dense one is followed: with respect to c_i it is the sum of dL/dx_i over
   cut inputs, with respect to log t_i that of -dL/dx_i (x_i - c_i) over inputs near the threshold (the step of the cut
   smoothed over a factor e^`BAND` to either side). The price, the mean over the model of loss for a byte, is taken off,
   so that bytes move to where they count most, and all thresholds are scaled together to keep the sparsity.

The weights stay as they are. At the end of each level the thresholds are scaled until the sparse model, running on a
part of the calibration text that the updates did not see (up to an eighth), cuts that level's share of the weights or
more in every window: on the text that they saw it cuts a little more than on any other, and texts differ.

Cost: an update is two forward passes, a backward one and the segments' gradients once more, 8 P operations a token for
P weights: Llama-2-7B, 5 levels x 32 updates x 16,384 tokens, 150 Pflop, estimated at 10 minutes on an H100 in bfloat16
(not measured). SmolLM2-135M took 0.9 s an update there; on two CPU cores a level takes hours: give fewer --updates.
Beside the model, memory holds the activations of one window at least, see `at_once`.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor
from tqdm import tqdm

from formats.checkpoint import check_fingerprint
from formats.files import write_output
from formats.statistics import SITES
from sparse_model import SparseProjection, SparseTransformer

FORMAT = "thresholds 1"
LEVELS = (0.25, 0.4, 0.5, 0.65, 0.8)  # sparsities that are refined; between two, thresholds are interpolated
SPARSE_FRACTION = 0.99  # of each window, as in eval.py
START_TOKENS = 16384  # of the text, for the start
UPDATES, ROWS = 32, 8  # updates of a level, and windows each of them looks at
RATE_SCALE, RATE_SHAPE, RATE_SHIFT = 0.005, 0.0025, 0.03  # of Adam: log t a projection, a channel; c in units of spread
BAND = 0.35
TOLERANCE = 5e-4  # of a level's sparsity on the calibration text
MEMORY = 24e9  # bytes of activations and logits on a GPU, by which windows are taken at once; at least one is

Receive = Callable[[int, SparseProjection, Tensor, list[Tensor]], None]


class ThresholdTable:
    """Thresholds and shifts of a model's projections at several sparsities.

    Attributes:
        levels: [L] rising sparsities of the whole model, by weights.
        tensors: "<layer>.<site>.threshold" [L, S, in] and "<layer>.<site>.shift" [L, in], float32, the sites those of
            `calibrate.SITES`.
        metadata: strings: method, fingerprint, text, tokens, window, updates, dtype, inputs.
    """

    def __init__(self, levels: list[float], tensors: dict[str, Tensor], metadata: dict[str, str]):
        self.levels, self.tensors, self.metadata = levels, tensors, metadata

    def row(self, i: int) -> list[tuple[Tensor, Tensor]]:
        """(threshold [S, in], shift [in]) of every module of `SparseTransformer.projections` at level i."""
        names = [f"{layer}.{site}" for layer in range(len(self.tensors) // (2 * len(SITES))) for site in SITES]
        return [(self.tensors[f"{name}.threshold"][i], self.tensors[f"{name}.shift"][i]) for name in names]

    @property
    def covered(self) -> tuple[float, float]:
        """The first and the last sparsity."""
        return 0.0, self.levels[-1]

    def at(self, sparsity: float) -> list[tuple[Tensor, Tensor]]:
        """What `SparseTransformer.set_cuts` takes for a sparsity: linear between two levels, 0 thresholds at 0.

        Raises:
            ValueError: a sparsity beyond the last level.
        """
        if not 0 <= sparsity <= self.covered[1]:
            raise ValueError(
                f"sparsity {sparsity} is outside what the allocation covers, 0 to {self.covered[1]:.3f}; "
                "choose one inside or --allocation uniform"
            )
        above = int(np.searchsorted(self.levels, sparsity))
        upper = self.row(above)
        lower = self.row(above - 1) if above else [(torch.zeros_like(t), c) for t, c in upper]
        start = self.levels[above - 1] if above else 0.0
        weight = (sparsity - start) / (self.levels[above] - start)
        return [
            (torch.lerp(t0, t1, weight), torch.lerp(c0, c1, weight))
            for (t0, c0), (t1, c1) in zip(lower, upper, strict=True)
        ]

    def append(self, level: float, row: list[tuple[Tensor, Tensor]]) -> None:
        for j, values in enumerate(row):
            for kind, value in zip(("threshold", "shift"), values, strict=True):
                name = f"{j // len(SITES)}.{list(SITES)[j % len(SITES)]}.{kind}"
                value = value.detach().float().cpu()[None].clone()
                self.tensors[name] = torch.cat((self.tensors[name], value)) if self.levels else value
        self.levels.append(level)

    def check_fingerprint(self, folder: Path) -> None:
        """Raises ValueError if it was made for another checkpoint than the one in `folder`."""
        check_fingerprint(self.metadata.get("fingerprint"), folder, "the allocation is", "greedy.py --method global")

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file, whole or not at all. Raises ValueError if it cannot be written."""
        tensors = {**self.tensors, "levels": torch.tensor(self.levels, dtype=torch.float64)}
        write_output(path, serialize(tensors, {"format": FORMAT, **self.metadata}))


def load_table(path: str | Path) -> ThresholdTable:
    """Reads what `ThresholdTable.save` wrote. Raises ValueError: no file there, or one that holds something else."""
    again = "make it with greedy.py --method global"
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.pop("format", None) != FORMAT:
                raise ValueError(f"{path} is not a file of thresholds of this version; {again}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError:
        raise ValueError(f"no allocation file at {path}; {again}") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or not a file of thresholds ({error}); {again}") from None
    levels = tensors.pop("levels", torch.zeros(0)).flatten().tolist()
    layers = len(tensors) // (2 * len(SITES))
    names = {f"{layer}.{site}.{kind}" for layer in range(layers) for site in SITES for kind in ("threshold", "shift")}
    whole = set(tensors) == names and all(len(tensor) == len(levels) for tensor in tensors.values())
    if not levels or not layers or not whole or sorted(set(levels)) != levels:
        raise ValueError(f"{path} is damaged: levels or tensors are missing; {again}")
    return ThresholdTable(levels, tensors, metadata)


@contextmanager
def segment_gradients(model: SparseTransformer, receive: Receive) -> Iterator[None]:
    """Inside it every backward pass calls `receive(j, module, x, grads)` for each of `projections`.

    x [B, T, in] is the module's input; grads are the loss's gradients by x through each of its segments alone, S x
    [B, T, in]. No parameter needs a gradient: it flows from the embeddings on.
    """

    def watch(j: int) -> Callable:
        def forward_hook(module: SparseProjection, args: tuple[Tensor], y: Tensor) -> None:
            def backward_hook(grad: Tensor) -> None:
                weight = module.dequantized(grad.dtype)
                parts = zip(grad.split(module.widths, -1), weight.split(module.widths, 1), strict=True)
                receive(j, module, args[0].detach(), [part @ weight.t() for part, weight in parts])

            if y.requires_grad:
                y.register_hook(backward_hook)

        return forward_hook

    hooks = [module.register_forward_hook(watch(j)) for j, module in enumerate(model.projections)]
    hooks.append(
        model.tok_embeddings.register_forward_hook(
            lambda module, args, y: y.requires_grad_() if torch.is_grad_enabled() else y
        )
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def at_once(model: SparseTransformer, length: int) -> int:
    """Windows of `length` tokens that a forward and backward pass takes within `MEMORY`; on a CPU one."""
    config = model.config
    token = 20 * config.vocab_size + 4 * config.n_layer * (12 * config.dim + 6 * config.intermediate_size)
    return max(1, int(MEMORY / (token * length))) if model.device.type == "cuda" else 1


def dense_prefix(length: int) -> int:
    """Positions of a window that stay dense, at least one: the first token's inputs are like no other's."""
    return max(1, round(length * (1 - SPARSE_FRACTION)))


def start(model: SparseTransformer, tokens: Tensor, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Thresholds at price 1 and shifts (medians, averaged over windows), from windows `tokens` [N, T]."""
    prefix, device = dense_prefix(tokens.shape[1]), model.device
    generator = torch.Generator(device).manual_seed(seed)
    fisher = [torch.zeros_like(module.threshold) for module in model.projections]
    median = [torch.zeros_like(module.threshold[0]) for module in model.projections]

    def receive(j: int, module: SparseProjection, x: Tensor, grads: list[Tensor]) -> None:
        for s, grad in enumerate(grads):
            fisher[j][s] += grad[:, prefix:].float().square().mean((0, 1)) / len(tokens)
        median[j].add_(x[0, prefix:].float().median(0).values / len(tokens))

    with segment_gradients(model, receive), tqdm(total=tokens.numel(), desc="curvature", unit="tok") as progress:
        for window in tokens.split(1):
            with torch.enable_grad():
                logits = model(window.to(device))[0].float()
                if not logits.isfinite().all():
                    raise ValueError("the model's output is not finite; choose another --precision")
                labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
                F.cross_entropy(logits, labels, reduction="sum").backward()
            progress.update(window.numel())
    found = []
    for j, module in enumerate(model.projections):
        if not fisher[j].isfinite().all():
            raise ValueError(f"gradients of layer {j // 4} are not finite; choose another --precision")
        widths = torch.tensor(module.widths, device=device)[:, None]
        found.append(((widths / fisher[j].clamp_min(fisher[j].mean() * 1e-6)).sqrt(), median[j]))
    return found


@torch.no_grad()
def settle(model: SparseTransformer, windows: Tensor, level: float, cuts: list[tuple], every=False) -> list[tuple]:
    """The cuts with all thresholds scaled alike, so that the model cuts `level` of its weights on `windows`, in every
    one at least that if `every`, to within `TOLERANCE`; set."""
    scale, low, high = 0.0, -math.inf, math.inf  # logarithms
    for _ in range(40):
        scaled = [(threshold * math.exp(scale), shift) for threshold, shift in cuts]
        model.set_cuts(scaled)
        reached = []
        for some in windows.split(1 if every else at_once(model, windows.shape[1])):
            if every or not reached:
                model.reset_counts()
            model(some.to(model.device), num_logits=1, dense_prefix=dense_prefix(windows.shape[1]))
            reached.append(model.achieved_sparsity())
        found = min(reached) if every else reached[-1]
        if abs(found - level) < TOLERANCE:
            break
        low, high = (scale, high) if found < level else (low, scale)
        # as if sparsity rose as 1 - exp(-a t)
        scale += math.log(math.log1p(-level) / math.log1p(-min(max(found, 1e-3), 0.9999)))
        if not low < scale < high:
            scale = (low + high) / 2
    return scaled


class Refinement:
    """Adam on all thresholds and shifts of a model, with the sparsity held."""

    def __init__(self, model: SparseTransformer, cuts: list[tuple[Tensor, Tensor]], spread: list[Tensor]):
        self.model, self.spread = model, spread
        self.shape = [threshold.clamp_min(1e-9).log() for threshold, _ in cuts]
        self.scale = [torch.zeros_like(shape[:, :1]) for shape in self.shape]
        self.shift = [shift / s for (_, shift), s in zip(cuts, spread, strict=True)]  # in units of its spread
        rates = (RATE_SCALE, self.scale), (RATE_SHAPE, self.shape), (RATE_SHIFT, self.shift)
        self.optimizer = torch.optim.Adam([{"params": p, "lr": r} for r, p in rates], betas=(0.9, 0.98))
        self.rates = [rate for rate, _ in rates]

    def cuts(self) -> list[tuple[Tensor, Tensor]]:
        groups = zip(self.shape, self.scale, self.shift, self.spread, strict=True)
        return [((shape + scale).exp(), shift * spread) for shape, scale, shift, spread in groups]

    def update(self, windows: Tensor, level: float, rate: float) -> float:
        """One step over `windows` [N, T], learning rates times `rate`; returns the KL divergence, nats a token."""
        model, prefix = self.model, dense_prefix(windows.shape[1])
        cuts = self.cuts()
        slope = [torch.zeros_like(threshold) for threshold, _ in cuts]  # of the divergence, by log t
        volume = [torch.zeros_like(threshold) for threshold, _ in cuts]  # of the cut weights, by log t
        pull = [torch.zeros_like(shift) for _, shift in cuts]  # of the divergence, by c

        def receive(j: int, module: SparseProjection, x: Tensor, grads: list[Tensor]) -> None:
            threshold, shift = cuts[j]
            moved = x[:, prefix:].float() - shift
            size = moved.abs()
            for s, grad in enumerate(grads):
                grad, t = grad[:, prefix:].float(), threshold[s]
                near = (size > t * math.exp(-BAND)) & (size < t * math.exp(BAND))
                slope[j][s] -= (grad * moved * near).sum((0, 1)) / (2 * BAND)
                volume[j][s] += near.sum((0, 1)) * (module.widths[s] / (2 * BAND))
                pull[j] += (grad * (size <= t)).sum((0, 1))

        model.set_cuts(cuts)
        model.reset_counts()
        divergence = 0.0
        with segment_gradients(model, receive):
            for some in windows.split(at_once(model, windows.shape[1])):
                some = some.to(model.device)
                with torch.no_grad():
                    dense = torch.log_softmax(model(some).float(), -1)
                with torch.enable_grad():
                    sparse = torch.log_softmax(model(some, dense_prefix=prefix).float(), -1)
                    loss = F.kl_div(sparse, dense, log_target=True, reduction="sum")
                    loss.backward()
                divergence += loss.item() / windows.numel()
        price = sum(s.sum() for s in slope) / sum(v.sum() for v in volume).clamp_min(1)
        for j, spread in enumerate(self.spread):
            self.shape[j].grad = slope[j] - price * volume[j]
            self.scale[j].grad = self.shape[j].grad.sum(1, keepdim=True)
            self.shift[j].grad = pull[j] * spread
        for group, base in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = base * rate
        self.optimizer.step()
        weights = sum(module.threshold.shape[1] * sum(module.widths) for module in model.projections)
        rise = sum(v.sum().item() for v in volume) / (weights * windows.shape[0] * (windows.shape[1] - prefix))
        missing = (level - model.achieved_sparsity()) / max(rise, 0.05)
        for scale in self.scale:
            scale += 0.5 * min(max(missing, -0.2), 0.2)
        return divergence


def refine(
    model: SparseTransformer, tokens: Tensor, table: ThresholdTable, updates: int, seed: int = 0
) -> Iterator[None]:
    """Appends the levels that `table` lacks, one an iteration, from windows `tokens` [N, T] (int64, T > 1).

    Raises:
        ValueError: gradients that are not finite (float16 overflows in some models).
    """
    cuts = start(model, tokens[: max(1, START_TOKENS // tokens.shape[1])], seed)
    device = model.device
    held_out = min(len(tokens) // 8, 2 * ROWS)
    unseen, tokens = (tokens[-held_out:], tokens[:-held_out]) if held_out else (tokens, tokens)
    few = unseen[:2]
    # the spread of a channel is measured by its threshold at the start, which is small where the loss is steep
    spread = [threshold.amin(0) for threshold, _ in settle(model, few, 0.5, cuts)]
    if table.levels:
        cuts = [(threshold.to(device), shift.to(device)) for threshold, shift in table.row(-1)]
    done = len(table.levels)
    with tqdm(total=len(LEVELS) * updates, initial=done * updates, desc="refining", unit="update") as progress:
        for level in LEVELS[done:]:
            state = Refinement(model, settle(model, few, level, cuts), spread)
            generator, epochs = torch.Generator().manual_seed(seed), -(-updates * ROWS // len(tokens))
            order = torch.cat([torch.randperm(len(tokens), generator=generator) for _ in range(max(1, epochs))])
            for i in range(updates):
                rate = 0.1 + 0.45 * (1 + math.cos(math.pi * i / updates))
                divergence = state.update(tokens[order[i * ROWS : (i + 1) * ROWS]], level, rate)
                progress.set_postfix_str(f"at {level:.0%}: {divergence:.4f} nats a token from dense")
                progress.update()
            cuts = settle(model, unseen, level, settle(model, few, level, state.cuts()), every=True)
            table.append(level, cuts)
            yield
