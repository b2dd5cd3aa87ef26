"""Thresholds that cost the model's output least: checkpoint + text -> thresholds_refined, a cut table with shifts.

    python refine.py --data c4                                    # the default model
    python refine.py --checkpoint_path DIR --data a.txt b.jsonl --updates 16

Every input channel of every projection has its own threshold. All thresholds of the model are bought at one price:

1. Initial cuts. Cutting input x_i costs about 1/2 x_i^2 F_i of the model's loss. F_i is the mean of (dL/dx_i)^2 over
   tokens, where L is the loss with labels drawn from the model: the curvature of the KL divergence to it. The cut saves
   a row of the weight, `width` weights long. So an input is cut where x_i^2 F_i / width < price: its threshold is
   t_i = sqrt(price * width / F_i). A cut input is replaced by its channel's median c_i instead of 0, which adds a
   constant vector to the output and reads no weights.
2. Refinement. F is taken where nothing is cut; where half of the model is cut, errors add up differently. So we follow
   the gradient of the KL divergence of the sparse model to the dense one. With respect to c_i it is the sum of dL/dx_i
   over cut inputs. With respect to log t_i it is the sum of -dL/dx_i (x_i - c_i) over inputs near the threshold: the
   step of the cut is smoothed over a factor e^`BAND` to either side. The price, which is the model's mean loss per
   weight, is subtracted, so that weights move to where they count most. All thresholds are scaled together to keep the
   sparsity.

At the end of each level all thresholds are scaled until the sparse model cuts at least that level's share of the
weights in every window of a held-out part of the text, up to an eighth, that the updates did not see: on the text that
they saw it cuts a little more, and texts differ. The table records the perplexity on the held-out part.

Cost: an update is two forward passes, a backward one and the gradients of the segments once more, 8 P operations per
token for P weights. One update of five levels took an 8B model 52 s on an H100 (random weights, 40 GB); SmolLM2-135M
took 1.0 s per update there. On two CPU cores a level takes hours: give fewer --updates. Beside the model, memory holds
the activations of at least one window, see `batches_of`. A run that was stopped goes on after the last complete
level, which `<output>.<digest of the settings>.partial.safetensors` keeps.
"""

import options

if __name__ == "__main__":
    options.run_script("refine")

import json
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from calibrate import calibration_tokens
from cli import output_path, placement
from decoder import check_finite, not_finite
from formats.default_model import resolve_checkpoint
from sparse_model import SITES, SparseProjection, SparseTransformer, dense_prefix_of
from thresholds import Cuts, CutTable, make_table, table_metadata, table_name

LEVELS = (0.25, 0.4, 0.5, 0.65, 0.8)  # sparsities that are refined; between two, thresholds are interpolated
CURVATURE_TOKENS = 16384  # of the text, for the initial cuts
WINDOWS = 8  # that an update looks at
BAND = 0.35  # a cut counts as smoothed between threshold * e^-BAND and threshold * e^BAND
TOLERANCE = 5e-4  # of a level's sparsity on the calibration text
MEMORY = 24e9  # bytes of activations and logits on a GPU, which bound the windows per pass; one window always runs
# Adam's learning rates: log t per projection, log t per channel, c in units of its channel's spread
RATE_PROJECTION, RATE_CHANNEL, RATE_SHIFT = 0.005, 0.0025, 0.03


@contextmanager
def segment_gradients(model: SparseTransformer, receive: Callable) -> Iterator[None]:
    """Inside it every backward pass calls `receive(j, module, x, grads)` for site module j of the model.

    x: the module's input [B, T, in]; grads: the loss's gradients by x through each segment alone, S x [B, T, in].
    """

    # no parameter needs a gradient: it flows from the embeddings on
    def from_here(module, args: tuple[Tensor], y: Tensor) -> Tensor:
        return y.requires_grad_(torch.is_grad_enabled())

    def forward_hook(j: int, module: SparseProjection, args: tuple[Tensor], y: Tensor) -> None:
        def backward_hook(grad: Tensor) -> None:
            weight = module.dequantized(grad.dtype)
            parts = zip(grad.split(module.widths, -1), weight.split(module.widths, 1), strict=True)
            receive(j, module, args[0].detach(), [part @ weight.t() for part, weight in parts])

        if y.requires_grad:
            y.register_hook(backward_hook)

    with ExitStack() as hooks:
        hooks.enter_context(model.tok_embeddings.register_forward_hook(from_here))
        for j, module in enumerate(model.sites):
            hooks.enter_context(module.register_forward_hook(partial(forward_hook, j)))
        yield


def batches_of(windows: Tensor, model: SparseTransformer, single: bool = False) -> Iterator[Tensor]:
    """Windows [N, T] on the model's device, as many at once as `MEMORY` holds with their gradients; on a CPU one."""
    config, count = model.config, 1
    if model.device.type == "cuda" and not single:
        token = 20 * config.vocab_size + 4 * config.n_layer * (12 * config.dim + 6 * config.intermediate_size)
        count = max(1, int(MEMORY / (token * windows.shape[1])))
    return (batch.to(model.device) for batch in windows.split(count))


def initial_cuts(model: SparseTransformer, tokens: Tensor, seed: int = 0) -> Cuts:
    """Thresholds at price 1 and shifts (medians, averaged over windows), from windows `tokens` [N, T].

    Raises ValueError for outputs or gradients that are not finite (float16 overflows in some models).
    """
    prefix, device = dense_prefix_of(tokens.shape[1]), model.device
    generator = torch.Generator(device).manual_seed(seed)
    fisher = [torch.zeros_like(module.threshold) for module in model.sites]
    median = [torch.zeros_like(module.threshold[0]) for module in model.sites]

    def receive(j: int, module: SparseProjection, x: Tensor, grads: list[Tensor]) -> None:
        for s, grad in enumerate(grads):
            fisher[j][s] += grad[:, prefix:].float().square().mean((0, 1)) / len(tokens)
        median[j].add_(x[0, prefix:].float().median(0).values / len(tokens))

    # gradients of the loss with labels drawn from the model itself
    with segment_gradients(model, receive), tqdm(total=tokens.numel(), desc="curvature", unit="tok") as progress:
        for window in tokens.split(1):
            with torch.enable_grad():
                logits = model(window.to(device))[0].float()
                check_finite(logits, model.dtype)
                labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
                F.cross_entropy(logits, labels, reduction="sum").backward()
            progress.update(window.numel())

    # t = sqrt(width / F); a channel that seems to cost nothing costs a millionth of the mean
    thresholds = []
    for j, module in enumerate(model.sites):
        if not fisher[j].isfinite().all():
            raise not_finite(model.dtype, f"a gradient of layer {j // len(SITES)}")
        widths = torch.tensor(module.widths, device=device)[:, None]
        thresholds.append((widths / fisher[j].clamp_min(fisher[j].mean() * 1e-6)).sqrt())
    return Cuts(0.0, thresholds, median)


@torch.no_grad()
def share_cut(model: SparseTransformer, windows: Tensor, every: bool = False) -> float:
    """The share of its weights that a model cuts on all windows [N, T] together; every: the least of any window."""
    achieved = []
    for batch in batches_of(windows, model, single=every):
        if every or not achieved:
            model.reset_counts()
        model(batch, num_logits=1, dense_prefix=dense_prefix_of(windows.shape[1]))
        achieved.append(model.achieved_sparsity())
    return min(achieved) if every else achieved[-1]


@torch.no_grad()
def scaled_to(model: SparseTransformer, windows: Tensor, level: float, cuts: Cuts, every: bool = False) -> Cuts:
    """The cuts with all thresholds scaled by one factor, so that the model cuts `level` of its weights; they stay set.

    windows: [N, T], the text on which that holds to within `TOLERANCE`.
    every: each window by itself cuts at least that much, not only all of them together.
    """
    log_factor, low, high = 0.0, -math.inf, math.inf
    for _ in range(40):
        scaled = Cuts(level, [threshold * math.exp(log_factor) for threshold in cuts.thresholds], cuts.shifts)
        model.set_cuts(scaled)
        reached = share_cut(model, windows, every)
        if abs(reached - level) < TOLERANCE:
            break

        # the next factor: as if sparsity rose as 1 - exp(-a t), inside what is bracketed already
        low, high = (log_factor, high) if reached < level else (low, log_factor)
        log_factor += math.log(math.log1p(-level) / math.log1p(-min(max(reached, 1e-3), 0.9999)))
        if not low < log_factor < high:
            log_factor = (low + high) / 2
    return scaled


class Refinement:
    """Adam on all thresholds and shifts of a model, with the sparsity held."""

    def __init__(self, model: SparseTransformer, cuts: Cuts, spread: list[Tensor]):
        self.model, self.level, self.spread = model, cuts.sparsity, spread
        # log t = channel + projection; c = shift * spread
        self.channel = [threshold.clamp_min(1e-9).log() for threshold in cuts.thresholds]
        self.projection = [torch.zeros_like(channel[:, :1]) for channel in self.channel]
        self.shift = [shift / s for shift, s in zip(cuts.shifts, spread, strict=True)]
        rates = (RATE_PROJECTION, self.projection), (RATE_CHANNEL, self.channel), (RATE_SHIFT, self.shift)
        groups = [{"params": parameters, "lr": rate, "base": rate} for rate, parameters in rates]
        self.optimizer = torch.optim.Adam(groups, betas=(0.9, 0.98))

    def cuts(self) -> Cuts:
        thresholds = [(c + p).exp() for c, p in zip(self.channel, self.projection, strict=True)]
        return Cuts(self.level, thresholds, [c * s for c, s in zip(self.shift, self.spread, strict=True)])

    def update(self, windows: Tensor, rate: float) -> float:
        """One step over `windows` [N, T], learning rates times `rate`; returns the KL divergence, nats per token."""
        model, prefix = self.model, dense_prefix_of(windows.shape[1])
        cuts = self.cuts()
        slope = [torch.zeros_like(threshold) for threshold in cuts.thresholds]  # of the divergence, by log t
        volume = [torch.zeros_like(threshold) for threshold in cuts.thresholds]  # of the cut weights, by log t
        pull = [torch.zeros_like(shift) for shift in cuts.shifts]  # of the divergence, by c

        def receive(j: int, module: SparseProjection, x: Tensor, grads: list[Tensor]) -> None:
            compared = x[:, prefix:].float() - cuts.shifts[j]
            size = compared.abs()
            for s, grad in enumerate(grads):
                grad, t = grad[:, prefix:].float(), cuts.thresholds[j][s]
                near = (size > t * math.exp(-BAND)) & (size < t * math.exp(BAND))
                slope[j][s] -= (grad * compared * near).sum((0, 1)) / (2 * BAND)
                volume[j][s] += near.sum((0, 1)) * (module.widths[s] / (2 * BAND))
                pull[j] += (grad * (size <= t)).sum((0, 1))

        # the divergence from the dense model and its gradients
        model.set_cuts(cuts)
        model.reset_counts()
        divergence = 0.0
        with segment_gradients(model, receive):
            for batch in batches_of(windows, model):
                with torch.no_grad():
                    dense = torch.log_softmax(model(batch).float(), -1)
                with torch.enable_grad():
                    sparse = torch.log_softmax(model(batch, dense_prefix=prefix).float(), -1)
                    loss = F.kl_div(sparse, dense, log_target=True, reduction="sum")
                    loss.backward()
                divergence += loss.item() / windows.numel()

        # one step of Adam, the price of the cut weights subtracted
        price = sum(s.sum() for s in slope) / sum(v.sum() for v in volume).clamp_min(1)
        for j, spread in enumerate(self.spread):
            self.channel[j].grad = slope[j] - price * volume[j]
            self.projection[j].grad = self.channel[j].grad.sum(1, keepdim=True)
            self.shift[j].grad = pull[j] * spread
        for group in self.optimizer.param_groups:
            group["lr"] = group["base"] * rate
        self.optimizer.step()

        # half a step back to the sparsity: by how much it rises with log t
        weights = sum(module.threshold.shape[1] * sum(module.widths) for module in model.sites)
        rise = sum(v.sum().item() for v in volume) / (weights * windows.shape[0] * (windows.shape[1] - prefix))
        missing = (self.level - model.achieved_sparsity()) / max(rise, 0.05)
        for projection in self.projection:
            projection += 0.5 * min(max(missing, -0.2), 0.2)
        return divergence


@torch.no_grad()
def perplexity_of(model: SparseTransformer, windows: Tensor, cut: bool) -> float:
    """Perplexity on windows [N, T], cut after each window's dense prefix or dense."""
    prefix = dense_prefix_of(windows.shape[1]) if cut else None
    loss = 0.0
    for batch in batches_of(windows, model):
        logits = model(batch[:, :-1], dense_prefix=prefix).float()
        loss += F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    return math.exp(loss / windows[:, 1:].numel())


def refine(model: SparseTransformer, tokens: Tensor, updates: int, table: CutTable, seed: int = 0) -> Iterator[None]:
    """Appends the levels that `table` lacks, one per step; tokens: [N, T], int64, T > 1. Raises as `initial_cuts`."""
    # initial cuts, and the part of the text that no update sees
    cuts = initial_cuts(model, tokens[: max(1, CURVATURE_TOKENS // tokens.shape[1])], seed)
    device = model.device
    held_out = min(len(tokens) // 8, 2 * WINDOWS)
    unseen, tokens = (tokens[-held_out:], tokens[:-held_out]) if held_out else (tokens, tokens)
    few = unseen[:2]

    # the spread of a channel is its initial threshold at 50 %, which is small where the loss is steep
    spread = [threshold.amin(0) for threshold in scaled_to(model, few, 0.5, cuts).thresholds]
    if table.levels:
        last = table.level(-1)
        cuts = Cuts(last.sparsity, [t.to(device) for t in last.thresholds], [c.to(device) for c in last.shifts])

    done = len(table.levels)
    with tqdm(total=len(LEVELS) * updates, initial=done * updates, desc="refining", unit="update") as progress:
        for level in LEVELS[done:]:
            # every update looks at other windows, as long as there are any
            state = Refinement(model, scaled_to(model, few, level, cuts), spread)
            generator, epochs = torch.Generator().manual_seed(seed), -(-updates * WINDOWS // len(tokens))
            order = torch.cat([torch.randperm(len(tokens), generator=generator) for _ in range(max(1, epochs))])
            for i in range(updates):
                rate = 0.1 + 0.45 * (1 + math.cos(math.pi * i / updates))
                divergence = state.update(tokens[order[i * WINDOWS : (i + 1) * WINDOWS]], rate)
                progress.set_postfix_str(f"at {level:.0%}: {divergence:.4f} nats per token from dense")
                progress.update()

            # hold the sparsity on text that the updates did not see
            cuts = scaled_to(model, unseen, level, scaled_to(model, few, level, state.cuts()), every=True)
            table.append(cuts)
            yield

    # rounded to float16 here alone, so that a stopped run goes on exactly
    text = "held-out calibration text" if held_out else "the calibration text"
    finish(model, table, unseen, text)


def finish(model: SparseTransformer, table: CutTable, windows: Tensor, text: str) -> None:
    """Rounds a table to float16 and records the quality of what is kept: perplexities on windows [N, T] of `text`."""
    table.halve()
    perplexities = [(0.0, perplexity_of(model, windows, cut=False))]
    for i, level in enumerate(table.levels):
        model.set_cuts(table.level(i))
        perplexities.append((level, perplexity_of(model, windows, cut=True)))
    table.metadata["quality"] = json.dumps({"text": text, "perplexity": perplexities})


def rescaling(model: SparseTransformer, table: CutTable, windows: Tensor, text: str) -> Callable[[], CutTable]:
    """Measures now how much of its weights a model cuts at each level of a table, on windows [N, T] of `text`.

    Returns a function, to be called when the model has other weights: it returns the table with each level's thresholds
    `scaled_to` that share again.
    """
    shares = []
    for i in range(len(table.levels)):
        model.set_cuts(table.level(i))
        shares.append(share_cut(model, windows))

    def rescaled() -> CutTable:
        scaled = CutTable([], {}, {name: value for name, value in table.metadata.items() if name != "quality"})
        for i, level in enumerate(tqdm(table.levels, desc="scaling thresholds", unit="level")):
            scaled.append(scaled_to(model, windows, shares[i], table.level(i))._replace(sparsity=level))
        finish(model, scaled, windows, text)
        return scaled

    return rescaled


def main(argv: list[str] | None = None) -> CutTable:
    """Makes the cut table of rule `refined`, writes and returns it. Raises ValueError for a user's mistake."""
    o = options.refine(argv)
    if o.statistics:
        warnings.warn("--statistics is not read: refined thresholds come from gradients", stacklevel=2)

    # load the model and the text
    folder = resolve_checkpoint(o.checkpoint_path)
    output = o.output or output_path(folder / table_name("refined"))
    model = SparseTransformer.from_checkpoint(folder, *placement(o))
    tokens, text = calibration_tokens(folder, model, o.data, o.num_tokens, o.seed)

    # refine level by level, on where a run with the same inputs stopped
    metadata = table_metadata("refined", folder, text, tokens, [tokens], updates=o.updates, dtype=o.precision)
    table = make_table(output, CutTable([], {}, metadata), partial(refine, model, tokens, o.updates))
    print(f"{output}: refined cuts of {table.n_layer} layers ({tokens.numel()} tokens of {text})")
    print(table.quality_report())
    return table
