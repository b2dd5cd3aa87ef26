"""TEAL's block-wise greedy (arXiv 2408.14690, Algorithm 1): checkpoint + statistics + text -> thresholds_greedy.

    python greedy.py --data c4                                              # the default model
    python greedy.py --checkpoint_path DIR --data a.txt b.jsonl --num_tokens 8192 --step 0.05

A block starts dense. In each round each of its seven projections is tried one step sparser, and the one that costs the
least error of the block's output keeps its step, until all are cut to 99 %. All steps cut equally many weights: a
projection's step is `step` x size of q / size of the projection. The error is the l2 norm over features of sparse minus
dense output, averaged over the tokens of the last quarter of each window. The tokens before that quarter are dense, and
so is every block's input. From all rounds the sparsity of each projection is read for each level of the cut table, and
its threshold from the statistics.

Cost, with P the weights of a block and Q those of q: P / (step Q) rounds of at most 7 passes of the block over a
quarter of the tokens, 2 P operations per token. An 8B model took 72 s on an H100 in bfloat16, SmolLM2-135M 3.5 minutes
per block on one busy core. Memory: the model and one block's activations over all tokens. A run that was stopped goes
on after the last complete block, which `<output>.<digest of the settings>.partial.safetensors` keeps.
"""

import options

if __name__ == "__main__":
    options.run_script("greedy")

import math
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from calibrate import calibration_tokens, statistics_for
from cli import output_path, placement
from decoder import not_finite
from formats.default_model import resolve_checkpoint
from model import TransformerBlock
from sparse_model import PROJECTIONS, SITES, SparseTransformer
from thresholds import CutTable, Statistics, make_table, table_metadata, table_name

MOST = 0.99  # no projection is cut further
LEVELS = [round(0.01 * i, 2) for i in range(1, 96)]  # of the cut table
PRINTED = (0.25, 0.4, 0.5, 0.65)  # levels whose sparsities are printed


def output_error(block: TransformerBlock, inputs: tuple, dense: Tensor) -> Tensor:
    """l2 norm over the features of the block's output minus `dense` [N, T, dim], averaged over the tokens; float32."""
    return (block(*inputs).float() - dense.float()).norm(dim=-1).mean()


def greedy_path(
    model: SparseTransformer, layer: int, statistics: Statistics, step: float, error: Callable, progress: tqdm
) -> dict[str, list[float]]:
    """TEAL's Algorithm 1 on one block; `error()` is that of its output, a scalar. Leaves its thresholds set.

    Returns a list per name, an item per round: "level", the share of the block's weights that is cut; "error"; and
    under the name of each projection the sparsity of its input.
    """
    sizes = model.projection_sizes()
    modules = {p: model.sites[layer * len(SITES) + list(SITES).index(PROJECTIONS[p])] for p in sizes}
    steps = {projection: step * sizes["q"] / size for projection, size in sizes.items()}
    path: dict[str, list] = {name: [] for name in ("level", "error", *sizes)}
    shares = dict.fromkeys(sizes, 0.0)

    def cut(projection: str, share: float) -> None:
        row = list(modules[projection].segments).index(projection)
        modules[projection].threshold[row] = statistics.threshold(layer, projection, share)

    def record(error: Tensor) -> None:
        level = sum(size * shares[p] for p, size in sizes.items()) / sum(sizes.values())
        for name, value in {"level": level, "error": error.item(), **shares}.items():
            path[name].append(round(value, 8))

    # begin dense
    for module in modules.values():
        module.set_cut(torch.zeros_like(module.threshold))
    record(error())

    while min(shares.values()) < MOST:
        # try each projection one step sparser
        tried = {p: min(MOST, round(shares[p] + steps[p], 8)) for p in sizes if shares[p] < MOST}
        errors = []
        for projection, share in tried.items():
            cut(projection, share)
            errors.append(error())
            cut(projection, shares[projection])

        # keep the step that costs least
        least = int(torch.stack(errors).argmin())
        projection = list(tried)[least]
        shares[projection] = tried[projection]
        cut(projection, shares[projection])
        record(errors[least])
        progress.update()
    return path


@torch.no_grad()
def greedy_paths(
    model: SparseTransformer, statistics: Statistics, tokens: Tensor, step: float, skip: int = 0
) -> Iterator[dict[str, list[float]]]:
    """The paths of all blocks but the first `skip`, over tokens [N, T], int64, T > 1.

    Raises ValueError if an output is not finite.
    """
    assert tokens.dim() == 2 and tokens.shape[1] > 1, "a single token would be cut"
    length = tokens.shape[1]
    tail = slice(length - max(1, length // 4), None)

    # as many rounds as each projection takes alone, since a round raises one
    sizes = model.projection_sizes()
    rounds = sum(math.ceil(MOST * size / (step * sizes["q"])) for size in sizes.values())
    with tqdm(total=model.config.n_layer * rounds, initial=skip * rounds, desc="greedy", unit="round") as progress:
        # a block's dense pass leaves the keys and values of all positions in a cache, of which a trial, which runs the
        # last quarter alone, overwrites its part
        for layer in model.walk([tokens], cached=True):
            (x,), (dense,) = layer.inputs, layer.outputs
            if not dense.isfinite().all():
                raise not_finite(model.dtype, f"the output of layer {layer.index}")
            if layer.index >= skip:
                inputs = (x[:, tail], *layer.arguments_at(tail))
                error = partial(output_error, layer.block, inputs, dense[:, tail])
                with model.cut_after(0):
                    path = greedy_path(model, layer.index, statistics, step, error, progress)
                yield path


def add_layer(table: CutTable, path: dict[str, list[float]], statistics: Statistics) -> None:
    """Adds a layer's thresholds at all levels to a table of the layers before it; linear between rounds of `path`."""
    layer, projections = table.n_layer, [p for p in PROJECTIONS if p in path]
    shares = [{p: float(np.interp(level, path["level"], path[p])) for p in projections} for level in table.levels]
    for name, site in SITES.items():
        own = [p for p in site.projections if p in projections]
        thresholds = [[statistics.threshold(layer, p, share[p]) for p in own] for share in shares]
        table.tensors[f"{layer}.{name}.threshold"] = torch.tensor(thresholds)[:, :, None]  # [L, S, 1]
    table.tensors[f"{layer}.shares"] = torch.tensor([list(share.values()) for share in shares])


def print_shares(table: CutTable) -> None:
    mean = torch.stack([table.tensors[f"{layer}.shares"] for layer in range(table.n_layer)]).mean(0)
    names = [p for p in PROJECTIONS if p != "gate" or mean.shape[1] == len(PROJECTIONS)]
    print("sparsity" + "".join(f"{projection:>7}" for projection in names))
    for level in PRINTED:
        print(f"{level:8.0%}" + "".join(f"{share:7.1%}" for share in mean[table.levels.index(level)].tolist()))


def main(argv: list[str] | None = None) -> CutTable:
    """Makes the cut table of rule `greedy`, writes and returns it. Raises ValueError for a user's mistake."""
    o = options.greedy(argv)

    # load the model, the statistics and the text
    folder = resolve_checkpoint(o.checkpoint_path)
    output = o.output or output_path(folder / table_name("greedy"))
    model = SparseTransformer.from_checkpoint(folder, *placement(o))
    statistics = statistics_for(folder, o.statistics, model)
    tokens, text = calibration_tokens(folder, model, o.data, o.num_tokens, o.seed)

    # search block by block, on where a run with the same inputs stopped
    inputs = [tokens, *(statistics.tensors[name] for name in sorted(statistics.tensors))]
    metadata = table_metadata("greedy", folder, text, tokens, inputs, step=o.step, dtype=o.precision)

    def add_layers(table: CutTable) -> Iterator[None]:
        for path in greedy_paths(model, statistics, tokens, o.step, skip=table.n_layer):
            yield add_layer(table, path, statistics)

    table = make_table(output, CutTable(list(LEVELS), {}, metadata), add_layers)
    print_shares(table)
    print(f"{output}: greedy cuts of {table.n_layer} layers ({tokens.numel()} tokens of {text})")
    return table
