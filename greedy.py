"""Sparsity allocation: checkpoint + statistics + text -> one file for every level of sparsity.

    python greedy.py --data c4 --method global                             # the default model, thresholds of refine.py
    python greedy.py --checkpoint_path DIR --data a.txt b.jsonl --num_tokens 8192 --step 0.05     # TEAL's

TEAL's block-wise greedy (arXiv 2408.14690, Algorithm 1): a block starts dense; each of its seven projections is tried
one step sparser, the one that costs the least error of the block's output keeps its step, and so on until all are cut
to 99 %. Steps cut equally many weights: `step` x size of q / size of the projection. The error is the l2 norm over
features of sparse minus dense output, averaged over the tokens of each window's last quarter; the tokens before it are
dense, and so is every block's input. All steps are kept, so that any sparsity is read by interpolation.

Cost, with P the weights of a block and Q those of q: P / (step Q) steps of at most 7 passes of the block over a quarter
of the tokens, 2 P operations each. Llama-2-7B, 4096 tokens, step 0.1: 119 steps, about 550 passes of 0.41 Tflop in each
of 32 blocks, 7.4 Pflop in all: estimated at one to three minutes on an H100 in bfloat16 (not measured). SmolLM2-135M on
one busy core: 3.5 minutes a block, in bfloat16. Beside the model, memory holds one block's activations over all tokens.
A run that was stopped goes on after the last whole block (`<output>.partial.json`).
"""

import argparse
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from calibrate import calibration_tokens, statistics_for
from cli import PRECISIONS, add_device_arguments, command_line, resolve_device
from formats.checkpoint import check_fingerprint, fingerprint
from formats.default_model import resolve_checkpoint
from formats.files import write_output
from formats.statistics import STATISTICS_NAME, Statistics
from model import KVCache, TransformerBlock
from refine import UPDATES, ThresholdTable, load_table, refine
from sparse_model import PROJECTIONS, SparseTransformer

METHODS = {"teal": "greedy", "global": "global"}  # of --method: the name of its --allocation
BESIDE = {"global": "allocation_global.safetensors", "greedy": "allocation_greedy.json"}  # the best first
NUM_TOKENS = {"teal": 4096, "global": 262144}
FORMAT = "sparsity allocation 1"
MOST = 0.99  # no projection is cut further
PRINTED = (0.25, 0.4, 0.5, 0.65)  # of the table that is printed


class Allocation:
    """How sparse each projection of each layer is, for every sparsity of the whole model.

    Attributes:
        layers: for each layer, rows in lists of equal length by name: "level", the model's sparsity that a row is for
            (of weights, so that large matrices count more; rising), and under each projection's name its sparsity.
        metadata: how it was made: method, fingerprint, text, tokens, window, step, dtype, inputs.
    """

    def __init__(self, layers: list[dict[str, list]], metadata: dict):
        self.layers, self.metadata = layers, metadata

    @property
    def covered(self) -> tuple[float, float]:
        """The first and the last sparsity that every layer has rows for."""
        return max(rows["level"][0] for rows in self.layers), min(rows["level"][-1] for rows in self.layers)

    def at(self, sparsity: float) -> list[dict[str, float]]:
        """Sparsity of each projection in each layer where the model's is `sparsity`, linear between two rows.

        Raises:
            ValueError: a sparsity beyond the rows.
        """
        first, last = self.covered
        if not first <= sparsity <= last:
            raise ValueError(
                f"sparsity {sparsity} is outside what the allocation covers, {first:.3f} to {last:.3f}; "
                "choose one inside or --allocation uniform"
            )
        return [{p: float(np.interp(sparsity, rows["level"], rows[p])) for p in PROJECTIONS} for rows in self.layers]

    def check_fingerprint(self, folder: Path) -> None:
        """Raises ValueError if it was made for another checkpoint than the one in `folder`."""
        check_fingerprint(self.metadata.get("fingerprint"), folder, "the allocation is", "greedy.py")

    def save(self, path: str | Path) -> None:
        """Writes a JSON file, whole or not at all. Raises ValueError if it cannot be written."""
        content = {"format": FORMAT, **self.metadata, "layers": self.layers}
        write_output(path, (json.dumps(content) + "\n").encode())


def load_allocation(path: str | Path) -> Allocation:
    """Reads what `Allocation.save` wrote. Raises ValueError: no file there, or one that holds something else."""
    again = "make it with greedy.py"
    if not Path(path).is_file():
        raise ValueError(f"no allocation file at {path}; {again}")
    try:
        metadata = json.loads(Path(path).read_text(encoding="utf-8"))
        layers = metadata.pop("layers")
        valid = metadata.pop("format") == FORMAT and layers and all(map(_is_path, layers))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        valid = False
    if not valid:
        raise ValueError(f"{path} is truncated or not an allocation of this version; {again}")
    return Allocation(layers, metadata)


def _is_path(rows: dict[str, list]) -> bool:
    columns = np.array([rows[name] for name in ("level", *PROJECTIONS)], dtype=float)
    rising = (np.diff(columns[0]) > 0).all()
    return bool(columns.size and rising and ((columns >= 0) & (columns < 1)).all())


def load_any_allocation(path: Path) -> Allocation | ThresholdTable:
    """Reads an allocation of either method. Raises ValueError as `load_allocation` and `load_table` do."""
    return load_table(path) if path.suffix == ".safetensors" else load_allocation(path)


def resolve_allocation(
    name: str, folder: Path | None, sparsity: float, statistics: Path | None = None
) -> tuple[str, float | list]:
    """What `--allocation` means for the checkpoint in `folder` (None: random weights).

    "best" is the first of global, greedy and uniform that is there and covers the sparsity; 0 is dense whatever is.
    With a file of statistics it is not global, which has thresholds of its own.

    Returns:
        its name as it is reported, and what `set_allocation` takes for it.

    Raises:
        ValueError: an unknown name, a file that is missing, of another checkpoint, or without that sparsity.
    """
    beside = {known: folder / file for known, file in BESIDE.items()} if folder else {}
    if name == "best":
        candidates = [known for known in beside if sparsity and not (statistics and known == "global")]
        there = (known for known in candidates if beside[known].is_file())
        name = next((known for known in there if sparsity <= load_any_allocation(beside[known]).covered[1]), "uniform")
    if name == "uniform":
        return name, sparsity
    path = beside.get(name, Path(name))
    if not path.is_file():
        make = ", ".join(f"{known} (make it: python greedy.py --method {method})" for method, known in METHODS.items())
        raise ValueError(f"--allocation {name}: no file {path}; what does: best, uniform, {make}, or a file's path")
    allocation = load_any_allocation(path)
    if folder:
        allocation.check_fingerprint(folder)
    return name, allocation.at(sparsity)


def set_allocation(model: SparseTransformer, found: float | list, statistics: Callable[[], Statistics]) -> None:
    """Sets what `resolve_allocation` found; `statistics` is called where thresholds are to be read from them.

    Raises:
        ValueError: as `SparseTransformer.set_sparsity` and `SparseTransformer.set_cuts` do.
    """
    if isinstance(found, list) and isinstance(found[0], tuple):
        model.set_cuts(found)
    else:
        model.set_sparsity(statistics(), found)


def output_error(block: TransformerBlock, inputs: tuple, dense: Tensor) -> Tensor:
    """l2 norm over the features of the block's output minus `dense` [N, T, dim], averaged over the tokens; float32."""
    return (block(*inputs).float() - dense.float()).norm(dim=-1).mean()


def greedy_path(
    model: SparseTransformer,
    layer: int,
    statistics: Statistics,
    step: float,
    error: Callable[[], Tensor],
    progress: tqdm,
) -> dict[str, list]:
    """TEAL's Algorithm 1 on one block: the rows of an `Allocation`, and each one's error. Leaves thresholds set.

    `error` is that of the block's output as the model's thresholds are.
    """
    sizes = projection_sizes(model)
    steps = {projection: step * sizes["q"] / size for projection, size in sizes.items()}
    path: dict[str, list] = {name: [] for name in ("level", "error", *PROJECTIONS)}
    shares = dict.fromkeys(PROJECTIONS, 0.0)

    def cut(projection: str, share: float) -> None:
        model.set_threshold(layer, projection, statistics.threshold(layer, projection, share))

    def record(error: Tensor) -> None:
        level = sum(sizes[p] * shares[p] for p in PROJECTIONS) / sum(sizes.values())
        for name, value in {"level": level, "error": error.item(), **shares}.items():
            path[name].append(round(value, 8))

    for projection in PROJECTIONS:
        cut(projection, 0.0)
    record(error())
    while min(shares.values()) < MOST:
        tried = {p: min(MOST, round(shares[p] + steps[p], 8)) for p in PROJECTIONS if shares[p] < MOST}
        errors = []
        for projection, share in tried.items():
            cut(projection, share)
            errors.append(error())
            cut(projection, shares[projection])
        least = int(torch.stack(errors).argmin())
        projection = list(tried)[least]
        shares[projection] = tried[projection]
        cut(projection, shares[projection])
        record(errors[least])
        progress.update()
    return path


def projection_sizes(model: SparseTransformer) -> dict[str, int]:
    """Weights of each projection of a block; all blocks are alike."""
    return {p: m.weight.shape[0] * width for m in model.projections[:4] for p, width in m.segments.items()}


@torch.no_grad()
def teal_paths(
    model: SparseTransformer, statistics: Statistics, tokens: Tensor, step: float, skip: int = 0
) -> Iterator[dict[str, list]]:
    """The greedy paths of all blocks but the first `skip`, over tokens [N, T] (int64, T > 1).

    A block's dense pass leaves the keys and values of all positions in a cache, where a trial, which runs the last
    quarter alone, overwrites those of the last quarter by its own.

    Raises:
        ValueError: a block's output is not finite (float16 overflows in some models).
    """
    assert tokens.dim() == 2 and tokens.shape[1] > 1, "a single token would be cut"
    length, config, weight = tokens.shape[1], model.config, model.norm.weight
    positions = torch.arange(length, device=weight.device)
    rope, masks = model.rope_and_masks(positions, length)
    tail = slice(length - max(1, length // 4), None)
    tail_rope = tuple(angles[tail] for angles in rope)
    cache = KVCache((len(tokens), config.n_local_heads, length, config.head_dim), weight.device, weight.dtype)
    x = model.tok_embeddings(tokens.to(weight.device))
    # as many steps as it takes each projection alone, since a step raises one
    sizes = projection_sizes(model)
    num_steps = sum(math.ceil(MOST * size / (step * sizes["q"])) for size in sizes.values())
    with tqdm(total=config.n_layer * num_steps, initial=skip * num_steps, desc="allocating", unit="step") as progress:
        for i, (block, mask) in enumerate(zip(model.layers, masks, strict=True)):
            block.attention.kv_cache = cache
            dense = block(x, rope, mask, positions)
            if not dense.isfinite().all():
                raise ValueError(f"the output of layer {i} is not finite; choose another --precision")
            if i >= skip:
                inputs = (x[:, tail], tail_rope, mask[tail], positions[tail])
                error = partial(output_error, block, inputs, dense[:, tail])
                with model.cut_from(0):
                    path = greedy_path(model, i, statistics, step, error, progress)
                yield path
            block.attention.kv_cache = None
            x = dense


def print_table(allocation: Allocation) -> None:
    """Mean sparsity of each projection over the layers, at a few levels."""
    print("sparsity" + "".join(f"{projection:>7}" for projection in PROJECTIONS))
    for level in PRINTED:
        layers = allocation.at(level)
        means = (sum(shares[projection] for shares in layers) / len(layers) for projection in PROJECTIONS)
        print(f"{level:8.0%}" + "".join(f"{mean:7.1%}" for mean in means))


def _begun(part: Path, new: Allocation | ThresholdTable) -> Allocation | ThresholdTable:
    """What `part` holds, if that was made as `new` is to be; else `new`."""
    try:
        found = load_any_allocation(part) if part.is_file() else new
    except ValueError:  # not ours: begin anew
        return new
    return found if found.metadata == new.metadata else new


def make_greedy(
    model: SparseTransformer, statistics: Statistics, tokens: Tensor, step: float, metadata: dict, output: Path
) -> Allocation:
    """TEAL's allocation, written to `output`; a layer that is done is kept in a file beside it until then."""
    part = Path(f"{output}.partial.json")
    allocation = _begun(part, Allocation([], metadata))
    for path in teal_paths(model, statistics, tokens, step, skip=len(allocation.layers)):
        allocation.layers.append(path)
        allocation.save(part)
    allocation.save(output)
    part.unlink(missing_ok=True)
    print_table(allocation)
    return allocation


def make_global(model: SparseTransformer, tokens: Tensor, updates: int, metadata: dict, output: Path) -> ThresholdTable:
    """The refined thresholds, written to `output`; a level that is done is kept in a file beside it until then."""
    part = Path(f"{output}.partial.safetensors")
    metadata = {name: str(value) for name, value in metadata.items()}
    table = _begun(part, ThresholdTable([], {}, metadata))
    for _ in refine(model, tokens, table, updates):
        table.save(part)
    table.save(output)
    part.unlink(missing_ok=True)
    return table


def main(
    checkpoint_path: Path | None = None,
    statistics: Path | None = None,
    data: list[str] | None = None,
    num_tokens: int | None = None,
    step: float = 0.1,
    updates: int = UPDATES,
    method: str = "teal",
    output: Path | None = None,
    device: str = "cpu",
    precision: str = "bfloat16",
    seed: int = 0,
) -> Allocation | ThresholdTable:
    """Makes an allocation, writes and returns it. Raises ValueError for a user's mistake."""
    num_tokens = NUM_TOKENS[method] if num_tokens is None else num_tokens
    if not 0.001 <= step < 1:
        raise ValueError(f"--step {step} is outside [0.001, 1); 0.1 is TEAL's")
    if updates < 0:
        raise ValueError(f"--updates {updates} is below 0; {UPDATES} is usual")
    if num_tokens < 2:
        raise ValueError(f"--num_tokens {num_tokens} is too few; {NUM_TOKENS[method]} is usual")
    folder = resolve_checkpoint(checkpoint_path)
    beside = folder / BESIDE[METHODS[method]]
    output = output or beside
    if output.suffix != beside.suffix:
        raise ValueError(f"--output {output}: what --method {method} writes ends in {beside.suffix}")
    model = SparseTransformer.from_checkpoint(folder, resolve_device(device), PRECISIONS[precision])
    found = statistics_for(folder, statistics, model) if method == "teal" else None
    tokens, text = calibration_tokens(folder, model, data, num_tokens, seed)
    inputs = hashlib.sha256(tokens.cpu().numpy().tobytes())
    for name in sorted(found.tensors) if found else ():
        inputs.update(found.tensors[name].numpy().tobytes())
    metadata = {
        "method": method,
        "fingerprint": fingerprint(folder),
        "text": text,
        "tokens": tokens.numel(),
        "window": tokens.shape[1],
        **({"step": step} if method == "teal" else {"updates": updates}),
        "dtype": precision,
        "inputs": inputs.hexdigest()[:32],  # of the tokens and, where they are used, the statistics
    }
    if method == "teal":
        allocation = make_greedy(model, found, tokens, step, metadata, output)
    else:
        allocation = make_global(model, tokens, updates, metadata, output)
    print(f"{output}: {method} allocation of {model.config.n_layer} layers ({tokens.numel()} tokens of {text})")
    return allocation


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Allocate sparsity to the projections of each layer.")
    parser.add_argument("--checkpoint_path", type=Path, help="folder, or a file in it (default: the default model)")
    parser.add_argument("--statistics", type=Path, help=f"default: {STATISTICS_NAME} beside the checkpoint")
    parser.add_argument("--data", nargs="+", help=".txt or .jsonl files, or c4 (default: the model's own text)")
    default = ", ".join(f"{method} {number}" for method, number in NUM_TOKENS.items())
    parser.add_argument("--num_tokens", type=int, help=f"length of the text (default: {default})")
    parser.add_argument("--method", choices=METHODS, default="teal")
    parser.add_argument("--step", type=float, default=0.1, help="teal: of q's sparsity (default: %(default)s)")
    parser.add_argument("--updates", type=int, default=UPDATES, help="global: of each level (default: %(default)s)")
    parser.add_argument("--output", type=Path, help=f"default: {' or '.join(BESIDE.values())} beside the checkpoint")
    parser.add_argument("--seed", type=int, default=0, help="of the model's own text")
    add_device_arguments(parser)
    command_line(main, parser.parse_args())
