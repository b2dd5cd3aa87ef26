"""Statistics of the inputs of every projection, for thresholds: checkpoint + text -> calibration.safetensors.

    python calibrate.py --data c4                                  # the default model on a shard of C4 (fetched)
    python calibrate.py --checkpoint_path DIR --data a.txt b.jsonl # documents joined, cut into windows of 2048 tokens
    python calibrate.py --plot distributions.png                   # no --data: the model writes its own text
    python calibrate.py --teal_histograms histograms/ --output teal.safetensors     # TEAL's published ones, no model

The dense model reads the text once, in the dtype of the run. A block has four inputs (q, k and v share one, gate and up
another). The script counts the distributions of each input x, of |x| and, per projection, of |x_i| * ||W_:,i||_2.
The counts of a 70B model take 315 MB on its device, a window's widest inputs about 1 GB in float32, the file 64 MB.
"""

import options

if __name__ == "__main__":
    options.run_script("calibrate")

import warnings
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from cli import output_path, placement
from decoder import check_finite, not_finite
from formats.checkpoint import fingerprint
from formats.default_model import resolve_checkpoint
from formats.files import atomic_write
from formats.text import WINDOW, text_windows
from sparse_model import PROJECTIONS, SITES, SparseProjection, SparseTransformer
from thresholds import PROBABILITIES, STATISTICS_NAME, Statistics, load_statistics, teal_statistics
from tokenizer import load_tokenizer

OWN_TOKENS, OWN_ROW, OWN_ROWS = 4096, 128, 32  # of self-written text: tokens, tokens per row, rows at once
OWN_MEMORY = 16 * 10**9  # bytes of KV cache on a GPU for rows that are longer: so many are written at once

# Histogram bins: float32 bit patterns rounded to 9 mantissa bits, 512 bins per octave from 2^-40 to 2^24. Values of a
# shorter dtype lie in the middle of a bin, so an interpolated quantile is above or below them without bias.
DROPPED_BITS = 14  # of a float32's mantissa
FIRST, LAST = (127 - 40) << 9, (127 + 24) << 9


def bit_histogram(x: Tensor) -> Tensor:
    """Counts of x (float32, any shape) in the bins of `bin_edges`, [2, bins], int64: row 0 is x >= 0, row 1 x < 0."""
    key = (x.view(torch.int32).flatten() + (1 << DROPPED_BITS >> 1) >> DROPPED_BITS) & ((1 << 18) - 1)
    counts = torch.bincount(key, minlength=1 << 18).view(2, -1)
    below, above = counts[:, 1:FIRST].sum(1, keepdim=True), counts[:, LAST:].sum(1, keepdim=True)
    return torch.cat([counts[:, :1], below, counts[:, FIRST:LAST], above], dim=1)


def bin_edges() -> np.ndarray:
    """Edges of the bins of |x|, float64: exact zeros, underflow, 64 octaves, overflow (taken to reach one octave)."""
    bits = (np.arange(FIRST, LAST + 1, dtype=np.int32) << DROPPED_BITS) - (1 << DROPPED_BITS >> 1)
    edges = bits.view(np.float32).astype(np.float64)
    return np.concatenate([[0.0, 0.0], edges, [2 * edges[-1]]])


def quantiles(counts: np.ndarray, edges: np.ndarray) -> Tensor:
    """Values below which a share PROBABILITIES of the counts lies (from the least to the greatest), float32 [1001]."""
    # empty bins at the ends would stretch the range
    used = np.flatnonzero(counts)
    counts, edges = counts[used[0] : used[-1] + 1], edges[used[0] : used[-1] + 2]
    cumulative = np.concatenate([[0.0], np.cumsum(counts, dtype=np.float64) / counts.sum()])
    return torch.from_numpy(np.interp(PROBABILITIES, cumulative, edges)).float()


class Recorder:
    """Counts and sums of one SparseProjection's inputs; works as its forward_pre_hook."""

    def __init__(self, module: SparseProjection):
        device, n_in = module.weight.device, module.weight.shape[0]
        self.projections, self.norms = list(module.segments), module.column_norms()
        self.counts = torch.zeros(2, LAST - FIRST + 3, dtype=torch.int64, device=device)
        self.weighted = torch.zeros(len(self.projections), LAST - FIRST + 3, dtype=torch.int64, device=device)
        self.powers = torch.zeros(4, n_in, dtype=torch.float64, device=device)  # sums of x, x^2, x^3, x^4
        self.seen = 0

    def __call__(self, module: SparseProjection, args: tuple[Tensor, ...]) -> None:
        x = args[0].flatten(0, -2).float()  # [tokens, in]
        square = x * x
        for sums, power in zip(self.powers, (x, square, square * x, square * square), strict=True):
            sums += power.sum(0, dtype=torch.float64)
        self.counts += bit_histogram(x)
        for counts, norms in zip(self.weighted, self.norms, strict=True):
            counts += bit_histogram(x * norms).sum(0)
        self.seen += len(x)

    def results(self) -> dict[str, Tensor]:
        """What `Statistics` holds of this input, by "<site or projection>.<name>"."""
        # moments of each channel, and of all values together
        channel = self.powers.cpu() / self.seen
        m1, m2, m3, m4 = channel.mean(1)
        variance = m2 - m1**2
        kurtosis = (m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4) / variance**2

        # distributions: row 0 of the counts is x >= 0, row 1 is x < 0
        site, edges, counts = PROJECTIONS[self.projections[0]], bin_edges(), self.counts.cpu().numpy()
        signed = np.concatenate([counts[1, ::-1], counts[0]]), np.concatenate([-edges[:0:-1], edges])
        tensors = {
            f"{site}.signed": quantiles(*signed),
            f"{site}.magnitude": quantiles(counts.sum(0), edges),
            f"{site}.channel_mean": channel[0].float(),
            f"{site}.channel_second_moment": channel[1].float(),
            f"{site}.pooled": torch.stack([m1, variance.sqrt(), kurtosis]).float(),
        }
        for projection, weighted, norms in zip(self.projections, self.weighted, self.norms, strict=True):
            tensors[f"{projection}.weighted"] = quantiles(weighted.cpu().numpy(), edges)
            tensors[f"{projection}.column_norms"] = norms.cpu()
        return tensors


@torch.no_grad()
def collect(model: SparseTransformer, tokens: Tensor) -> Statistics:
    """Statistics of all inputs in a dense pass over tokens [N, T], int64, T > 1.

    Raises ValueError if an input is not finite (float16 overflows in some models).
    """
    assert tokens.dim() == 2 and tokens.shape[1] > 1, "a single token would be cut"

    # every input is counted on its way into its projections, whose weights ranks have whole in a walk alone
    recorders: list[Recorder] = []
    with tqdm(total=tokens.numel(), desc="calibrating", unit="tok") as progress:
        for windows in tokens.split(max(1, WINDOW // tokens.shape[1])):
            for layer in model.walk([windows]):
                modules = [layer.block.get_submodule(site.module) for site in SITES.values()]
                recorders += map(Recorder, modules if len(recorders) == 4 * layer.index else ())
                with ExitStack() as hooks:
                    for module, recorder in zip(modules, recorders[4 * layer.index :], strict=False):
                        hooks.enter_context(module.register_forward_pre_hook(recorder))
                    assert layer.outputs
            progress.update(windows.numel())

    # counts to distributions
    tensors = {}
    for i, recorder in enumerate(recorders):
        if not recorder.powers.isfinite().all():
            raise not_finite(model.dtype, f"an input of layer {i // 4}")
        tensors |= {f"{i // 4}.{name}": tensor for name, tensor in recorder.results().items()}
    dtype = str(model.dtype).removeprefix("torch.")
    return Statistics(tensors, {"kind": "own", "tokens": str(tokens.numel()), "dtype": dtype})


@torch.no_grad()
def write_tails(model: SparseTransformer, rows: Tensor, begun: int, seed: int = 0) -> Tensor:
    """Rows [N, T], int64, on the model's device, whose tokens from position `begun` on the dense model draws anew.

    The temperature is 1; the KV cache is released at the end. Raises ValueError for output that is not finite.
    """
    device, config, length = model.device, model.config, rows.shape[1]
    rows, generator = rows.to(device, copy=True), torch.Generator(device).manual_seed(seed)
    row_bytes = 2 * config.n_layer * config.n_local_heads * config.head_dim * length * model.dtype.itemsize
    at_once = max(OWN_ROWS, OWN_MEMORY // row_bytes) if length > OWN_ROW and device.type == "cuda" else OWN_ROWS

    with tqdm(total=rows[:, begun:].numel(), desc="writing text", unit="tok") as progress:
        for batch in rows.split(at_once):
            model.setup_caches(len(batch), length)
            for first, i in zip((0, *range(begun, length)), range(begun, length), strict=False):
                # all of it is dense prefix, so that a single position is dense too, whatever the thresholds
                at = torch.arange(first, i, device=device)
                logits = model(batch[:, first:i], at, num_logits=1, dense_prefix=i - first)
                check_finite(logits, model.dtype)
                probabilities = torch.softmax(logits[:, -1].float(), -1)
                batch[:, i : i + 1] = torch.multinomial(probabilities, 1, generator=generator)
                progress.update(len(batch))

    for block in model.layers:
        block.attention.kv_cache = None
    return rows


def calibration_tokens(
    folder: Path, model: SparseTransformer, data: list[str] | None, num_tokens: int, seed: int, context: int = 0
) -> tuple[Tensor, str]:
    """Windows of ids [N, T], int64, of `data` or, if None, of text that the model writes; and the text's name.

    context: T, if the text is as long; 0: that of the model, or 128 where it writes. Raises ValueError for a text that
    cannot be read or is too short, a tokenizer of another model, and as `write_tails`.
    """
    tokenizer = load_tokenizer(folder, model.config.vocab_size)
    if data is not None:
        names = " ".join(Path(source).name for source in data)
        return text_windows(data, tokenizer, num_tokens, context or model.config.block_size), names

    # rows from the start token on, of at least num_tokens together
    start = next((i for i in (tokenizer.bos_id, *tokenizer.eos_ids) if i is not None), 0)
    length = max(2, min(context or OWN_ROW, model.config.block_size, num_tokens))
    rows = torch.full((-(-num_tokens // length), length), start)
    return write_tails(model, rows, 1, seed), f"the model's own, seed {seed}"


def calibrate(
    folder: Path, model: SparseTransformer, data: list[str] | None = None, num_tokens: int = OWN_TOKENS, seed: int = 0
) -> Statistics:
    """Statistics of the checkpoint in `folder`, loaded as `model`, over `calibration_tokens`; raises as that does."""
    tokens, text = calibration_tokens(folder, model, data, num_tokens, seed)
    statistics = collect(model, tokens)
    statistics.metadata |= {"text": text, "fingerprint": fingerprint(folder)}
    return statistics


def calibrate_random(model: SparseTransformer) -> Statistics:
    """Statistics of a model with random weights, over random tokens (what it would write is no different)."""
    generator = torch.Generator().manual_seed(0)
    return collect(model, torch.randint(model.config.vocab_size, (WINDOW // OWN_ROW, OWN_ROW), generator=generator))


def statistics_for(folder: Path, path: str | Path | None, model: SparseTransformer) -> Statistics:
    """Statistics in `path`, else beside the checkpoint, made once of its own text. Raises as `load_statistics` does."""
    beside = folder / STATISTICS_NAME
    if path is None and not beside.exists():
        statistics = calibrate(folder, model)
        try:
            statistics.save(beside)
        except ValueError as error:
            warnings.warn(f"{error}. They serve this run alone", stacklevel=2)
            return statistics
    return load_statistics(path or beside, folder)


def plot(statistics: Statistics, path: Path) -> None:
    """Draws the densities of the four inputs (rows) of five layers (columns) into a PNG."""
    from matplotlib.figure import Figure

    # five layers, from the first to the last
    layers = sorted({i * (statistics.n_layer - 1) // 4 for i in range(5)})
    figure = Figure(figsize=(2.6 * len(layers), 8), layout="constrained")
    axes = figure.subplots(4, len(layers), squeeze=False)

    for row, (_, projections) in zip(axes, SITES.values(), strict=True):
        for axis, layer in zip(row, layers, strict=True):
            values = statistics.get(layer, projections[0], "signed").double().numpy()
            mean, std, kurtosis = statistics.get(layer, projections[0], "pooled").tolist()
            cut = statistics.threshold(layer, projections[0], 0.5)

            # the density of the middle 96 %, from the quantiles
            reach = np.abs(np.interp([0.02, 0.98], PROBABILITIES, values)).max()
            edges = np.linspace(-reach, reach, 82)
            density = np.diff(np.interp(edges, values, PROBABILITIES)) / np.diff(edges)
            axis.stairs(density, edges, fill=True, color="#9db8d9")

            # what is cut, the mean, the moments
            axis.axvspan(-cut, cut, color="#d9772b", alpha=0.15, linewidth=0)
            axis.axvline(mean, color="#a01c1c", linewidth=0.8, linestyle="--")
            axis.set_title(f"layer {layer}: std {std:.3g}, kurtosis {kurtosis:.3g}", fontsize=8)
            axis.tick_params(labelsize=7, left=False, labelleft=False)
            axis.locator_params(axis="x", nbins=5)
        row[0].set_ylabel(f"input of {', '.join(p for p in projections if p in statistics.projections)}")

    figure.suptitle("Inputs (96 % of them): density, mean (red), what 50 % sparsity cuts (shaded)", fontsize=10)

    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=130)


def main(argv: list[str] | None = None) -> Statistics:
    """Takes or converts statistics, writes and returns them. Raises ValueError for a user's mistake."""
    o = options.calibrate(argv)
    if o.teal_histograms is not None:
        output, statistics = o.output, teal_statistics(o.teal_histograms)
    else:
        folder = resolve_checkpoint(o.checkpoint_path)
        output = o.output or output_path(folder / STATISTICS_NAME)
        model = SparseTransformer.from_checkpoint(folder, *placement(o))
        statistics = calibrate(folder, model, o.data, o.num_tokens, o.seed)

        # the zeros of a ReLU cost nothing to cut: they are what threshold 0 cuts
        if model.config.activation == "relu":
            sizes = (statistics.get(i, "down", "magnitude")[1:] for i in range(statistics.n_layer))
            zeros = [(size == 0).float().mean() for size in sizes]
            print(f"inputs of down that are exactly 0: {min(zeros):.1%} to {max(zeros):.1%}, by layer")

    statistics.save(output)
    about = ", ".join(f"{key} {value}" for key, value in statistics.metadata.items())
    print(f"{output}: statistics of {statistics.n_layer} layers ({about})")
    if o.plot is not None:
        plot(statistics, o.plot)
        print(f"{o.plot}: their distributions")
    return statistics
