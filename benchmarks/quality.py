"""Perplexity against sparsity for each rule: a table, rows of benchmarks/results/quality.csv (benchmarks/quality.sh).

    python -m benchmarks.quality --data wiki.test.raw --rules dense uniform greedy refined   # cut tables made before
    python -m benchmarks.quality --data wiki.test.raw --calibration c4.jsonl                 # the rivals as well

Rules: dense; uniform (one sparsity everywhere); greedy and refined (cut tables beside the checkpoint); norms (R-Sparse,
WINA: |x_i| times the norm of its weights); cats (|SiLU(gate)| decides about the outputs of up and the inputs of down,
all else dense); relu (ReLUfication: SiLU replaced, no threshold); up-input and up-output (only `up` is cut, by its
inputs as in TEAL, or its outputs where |SiLU(gate)| is small). The sparsity is that of the whole model.
"""

import options

if __name__ == "__main__":
    options.run_script("benchmarks.quality")

import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.results import command, model_columns, provenance, write_rows
from calibrate import calibration_tokens
from cli import placement
from eval import perplexity
from formats.default_model import resolve_checkpoint
from formats.text import task_tokens
from generate import ModelSource
from model import FeedForward
from sparse_model import PROJECTIONS, SITES, SparseTransformer
from thresholds import RULES, Cuts, Statistics, cuts_of_shares
from tokenizer import load_tokenizer

KEY = "device model quant text rule sparsity sparse_fraction context window num_windows"
CALIBRATION_TOKENS = 8192  # for CATS's thresholds


class GatedFeedForward(nn.Module):
    """A FeedForward whose product SiLU(gate) x up is cut where |SiLU(gate)| <= threshold, from `w2.dense_prefix` on."""

    def __init__(self, feed_forward: FeedForward, activation=F.silu):
        super().__init__()
        self.w13, self.w2, self.activation = feed_forward.w13, feed_forward.w2, activation
        self.threshold = -1.0
        self.sizes: list[Tensor] | None = None  # |activation| of each pass, where wanted

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w13(x).chunk(2, dim=-1)
        gate = self.activation(gate)
        if self.sizes is not None:
            self.sizes.append(gate.abs().flatten().float().cpu())
        keep = gate.abs() > self.threshold
        keep[:, : self.w2.dense_prefix or 0] = True
        return self.w2(gate * keep * up)


def share_of(model: SparseTransformer, *projections: str) -> float:
    sizes = model.projection_sizes()
    return sum(sizes[p] for p in projections) / sum(sizes.values())


@torch.no_grad()
def set_gates(model: SparseTransformer, tokens: Tensor, share: float) -> None:
    """Gate thresholds below which a share of |SiLU(gate)| lies on `tokens` [N, T], in a model of GatedFeedForwards."""
    gated = [block.feed_forward for block in model.layers]
    for feed_forward in gated:
        feed_forward.sizes, feed_forward.threshold = [], -1.0
    for window in tokens.split(1):
        model(window.to(model.device), num_logits=1)
    for feed_forward in gated:
        sizes = torch.cat(feed_forward.sizes)
        feed_forward.threshold = sizes.kthvalue(max(1, round(share * len(sizes)))).values.item()
        feed_forward.sizes = None


def gate(model: SparseTransformer, activation=F.silu) -> None:
    for block in model.layers:
        block.feed_forward = GatedFeedForward(block.feed_forward, activation)


def norm_cuts(statistics: Statistics, sparsity: float) -> Cuts:
    """Cuts input i where |x_i| * c_i is small, c_i the norm of its weights: each channel has a threshold of its own."""
    thresholds = []
    for layer in range(statistics.n_layer):
        for site in SITES.values():
            limits = [statistics.weighted_threshold(layer, p, sparsity) for p in site.projections]
            norms = torch.stack([statistics.get(layer, p, "column_norms") for p in site.projections])
            thresholds.append(torch.where(norms > 0, torch.tensor(limits)[:, None] / norms, math.inf))
    return Cuts(sparsity, thresholds, [None] * len(thresholds))


def prepare(
    model: SparseTransformer, rule: str, sparsity: float, folder: Path, statistics: Statistics, tokens: Tensor | None
) -> float:
    """Sets a fresh model's cuts by `rule`; returns the factor of the counted sparsity (gated rules: down alone counts).

    Raises ValueError for a sparsity that the rule cannot reach, or a missing cut table.
    """
    if rule in RULES:
        model.set_cuts(RULES[rule](folder, lambda: statistics, sparsity))
    elif rule == "norms":
        model.set_cuts(norm_cuts(statistics, sparsity))
    elif rule == "relu":
        gate(model, F.relu)
        return share_of(model, "up", "down") / share_of(model, "down")
    if rule not in ("cats", "up-input", "up-output"):
        return 1.0

    # these cut some projections alone, which therefore lose a larger share than the whole model
    cut = ("up", "down") if rule == "cats" else ("up",)
    share = sparsity / share_of(model, *cut)
    if not share < 1:
        raise ValueError(f"{rule} cuts at most {share_of(model, *cut):.1%} of the weights, not {sparsity:.0%}")
    if rule == "up-input":
        shares = dict.fromkeys(PROJECTIONS, 0.0) | {"up": share}
        model.set_cuts(cuts_of_shares(statistics, [shares] * len(model.layers), sparsity))
        return 1.0
    gate(model)
    set_gates(model, tokens, share)
    return share_of(model, *cut) / share_of(model, "down")


def main(argv: list[str] | None = None) -> list[dict]:
    """Measures, writes the rows and prints them as a table. Raises ValueError for a user's mistake."""
    o = options.quality(argv)
    folder = resolve_checkpoint(o.checkpoint_path)

    # what all rules share: the text's tokens, statistics, and the tokens that gates are calibrated on
    source = ModelSource(*placement(o), folder)
    device = source.device
    tokenizer = load_tokenizer(folder, source.config.vocab_size)
    tokens = task_tokens("wikitext" if o.text == "wikitext" else "perplexity", o.data, tokenizer)
    statistics, gate_tokens = source.statistics(o.statistics), None
    if set(o.rules) & set(options.GATED):
        gate_tokens, _ = calibration_tokens(folder, source.sparse_model, o.calibration, CALIBRATION_TOKENS, seed=0)
    del source.sparse_model  # its memory is the next model's
    made = provenance(torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu")

    rows = []
    levels = {rule: (0.0,) if rule in ("dense", "relu") else o.sparsities for rule in o.rules}
    for rule, sparsity in [(name, level) for name in o.rules for level in levels[name]]:
        # a fresh model each time: some rules replace its modules
        model = source.load(SparseTransformer)
        try:
            factor = prepare(model, rule, sparsity, folder, statistics, gate_tokens)
        except ValueError as error:
            print(f"{rule} at {sparsity:.0%}: {error}", file=sys.stderr)
            continue

        prefix = None if rule == "dense" else round((o.context + o.window) * (1 - o.sparse_fraction))
        value = perplexity(model, tokens, o.context, o.window, o.num_windows, prefix)
        achieved = 0.0 if rule == "dense" else model.achieved_sparsity() * factor
        print(f"{rule:>10} {sparsity:5.0%} achieved {achieved:6.2%}  perplexity {value:.4f}", flush=True)

        row = made | model_columns(model.config) | {"text": o.text, "rule": rule, "sparsity": sparsity}
        row |= {"achieved_sparsity": f"{achieved:.4f}", "sparse_fraction": o.sparse_fraction}
        row |= {"context": o.context, "window": o.window, "num_windows": o.num_windows}
        rows.append(row | {"perplexity": f"{value:.4f}", "command": command("benchmarks.quality", argv)})
        write_rows("quality.csv", rows[-1:], KEY)
    return rows
