"""Thresholds that cost the model's output least: checkpoint + text -> thresholds_refined, a cut table with shifts.

    python refine.py --data c4                                    # the default model
    python refine.py --checkpoint_path DIR --data a.txt b.jsonl --updates 16

Every input channel of every projection has a threshold of its own, and all thresholds of the model are bought at one
price. Two steps:

1. Initial cuts. Cutting input x_i costs about 1/2 x_i^2 F_i of the model's loss. F_i is the mean of (dL/dx_i)^2 over
   tokens, where L is the loss with labels drawn from the model: the curvature of the KL divergence to it. The cut saves
   a row of the weight, `width` weights long. So an input is cut where x_i^2 F_i / width < price, which gives the
   threshold t_i = sqrt(price * width / F_i). A cut input is replaced by its channel's median c_i instead of 0; this
   adds a constant vector to the output and reads no weights.
2. Refinement. F is taken where nothing is cut, and errors add up otherwise where half of the model is cut. So we follow
   the gradient of the KL divergence of the sparse model to the dense one. With respect to c_i it is the sum of dL/dx_i
   over cut inputs. With respect to log t_i it is the sum of -dL/dx_i (x_i - c_i) over inputs near the threshold: the
   step of the cut is smoothed over a factor e^`BAND` to either side. The price, which is the model's mean loss per
   weight, is subtracted, so that weights move to where they count most. All thresholds are scaled together to keep the
   sparsity.

The weights stay as they are. At the end of each level all thresholds are scaled until the sparse model cuts at least
that level's share of the weights in every window of a held-out part of the text, up to an eighth, that the updates did
not see. On the text that they saw the model cuts a little more than on any other, and texts differ. The perplexity on
the held-out part is recorded in the table.

Cost: an update is two forward passes, a backward one and the gradients of the segments once more, 8 P operations per
token for P weights. One update of five levels took an 8B model 52 s on an H100 (random weights, 40 GB); SmolLM2-135M
took 1.0 s per update there. On two CPU cores a level takes hours: give fewer --updates. Beside the model, memory holds
the activations of at least one window, see `windows_per_pass`. A run that was stopped goes on after the last complete
level, which `<output>.partial.safetensors` keeps.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from calibrate import calibration_tokens
from cli import PRECISIONS, add_device_arguments, command_line, resolve_device
from formats.default_model import resolve_checkpoint
from sparse_model import SITES, SparseProjection, SparseTransformer
from thresholds import Cuts, CutTable, resume_table, table_metadata

NUM_TOKENS = 262144
LEVELS = (0.25, 0.4, 0.5, 0.65, 0.8)  # sparsities that are refined; between two, thresholds are interpolated
SPARSE_FRACTION = 0.99  # of each window, as in eval.py
START_TOKENS = 16384  # of the text, for the start
UPDATES, ROWS = 32, 8  # updates of a level, and windows each of them looks at
RATE_SCALE, RATE_SHAPE, RATE_SHIFT = 0.005, 0.0025, 0.03  # of Adam: log t a projection, a channel; c in units of spread
BAND = 0.35
TOLERANCE = 5e-4  # of a level's sparsity on the calibration text
MEMORY = 24e9  # bytes of activations and logits on a GPU, by which windows are taken at once; at least one is

Receive = Callable[[int, SparseProjection, Tensor, list[Tensor]], None]


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
