"""Where thresholds come from: a run's options and its checkpoint -> the cuts that its model is given.

    rule       made by                                     kept beside the checkpoint as
    uniform    calibrate.py: quantiles of |x|              calibration.safetensors (statistics, not thresholds)
    greedy     greedy.py: TEAL's Algorithm 1               thresholds_greedy.safetensors
    refined    refine.py: gradients of the KL divergence   thresholds_refined.safetensors

`cuts_for` is the one way from `--thresholds` and `--sparsity` to `Cuts`; `SparseTransformer.set_cuts` takes them. A new
rule is a function of (folder, statistics, sparsity), see `cuts_for`, and its row in `RULES`.
"""

import hashlib
import json
import math
import sys
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from formats.checkpoint import check_fingerprint, fingerprint
from formats.files import one_line, parse_json, regular_file, shown, write_output
from sparse_model import PROJECTIONS, SITES

STATISTICS_NAME = "calibration.safetensors"  # beside the checkpoint it belongs to
STATISTICS_FORMAT = "activation statistics 1"
PROBABILITIES = np.linspace(0, 1, 1001)  # the sparsities whose quantiles are stored
TABLE_FORMAT = "cut table 1"
ASSETS = Path(__file__).parent / "assets"  # tables that come with this repository, a folder per model
SCRIPTS = {"refined": "refine.py", "greedy": "greedy.py"}  # the script that makes a rule's table; the best rule first
OLD_FILES = {"allocation_greedy.json": "greedy", "allocation_global.safetensors": "refined"}


class Statistics:
    """Distributions of the inputs of a model's projections.

    tensors: by "<layer>.<site or projection>.<name>"; see `get`, of TEAL's `teal_statistics`.
    metadata: strings: kind ("own" or "teal"), and of own ones tokens, dtype, text, fingerprint (if it is known).
    """

    def __init__(self, tensors: dict[str, Tensor], metadata: dict[str, str]):
        self.tensors, self.metadata = tensors, metadata

    @property
    def n_layer(self) -> int:
        return 1 + max(int(name.split(".")[0]) for name in self.tensors)

    @property
    def projections(self) -> list[str]:
        """Those of a block, of which not each model has a gate."""
        own = self.metadata["kind"] == "own"
        return [p for p in PROJECTIONS if not own or f"0.{p}.column_norms" in self.tensors]

    def check(self) -> None:
        """Raises ValueError for tensors that are not what `get` and TEAL's histograms say, or a missing layer."""
        layers = set()
        for name, tensor in self.tensors.items():
            layer, owner, kind = [*name.split("."), "", ""][:3]
            if not (layer.isascii() and layer.isdecimal()) or owner not in (*PROJECTIONS, *SITES) or kind not in KINDS:
                raise ValueError(f"it holds {shown(name)}, which is no tensor of statistics")
            layers.add(int(layer))
            check_tensor(name, tensor, *KINDS[kind])
            if kind == "centers":  # of as many bins as the counts; neither all counts nor the greatest center is 0
                cumulative = self.tensors.get(f"{layer}.{owner}.cumulative", tensor[:0])
                check_tensor(name, cumulative, tensor.shape)
                check_tensor(name, torch.stack((tensor[-1], cumulative[-1])), (2,), sys.float_info.min)
        kind = self.metadata.get("kind")
        if kind not in ("own", "teal") or not layers or (kind == "own" and layers != set(range(len(layers)))):
            raise ValueError("layers of it, or its kind, are missing")

    def get(self, layer: int, projection: str, name: str) -> Tensor:
        """One tensor, float32 unless said otherwise, of a projection's input (or of that and the projection's weights).

        name: signed, magnitude [1001]: quantiles at PROBABILITIES of x and of |x| (least and greatest at the ends);
            weighted [1001]: those of |x_i| * c_i; column_norms [in]: c, the 2-norm of each input's weights;
            channel_mean, channel_second_moment [in]: of each input channel;
            pooled [3]: mean, standard deviation and kurtosis (3 for a Gaussian) over all channels and tokens.

        Raises ValueError: an unknown projection, a layer that is not there, a name that TEAL's histograms do not have.
        """
        if projection not in PROJECTIONS:
            raise ValueError(f"unknown projection {projection!r}; known: {', '.join(PROJECTIONS)}")
        for owner in (projection, PROJECTIONS[projection]):
            if f"{layer}.{owner}.{name}" in self.tensors:
                return self.tensors[f"{layer}.{owner}.{name}"]
        layers = sorted({int(key.split(".")[0]) for key in self.tensors})
        if layer in layers:
            raise ValueError(f"these statistics hold no {name} ({self.metadata['kind']}); run calibrate.py on a text")
        raise ValueError(f"no statistics of layer {layer}; there are {len(layers)}, {layers[0]} to {layers[-1]}")

    def threshold(self, layer: int, projection: str, sparsity: float) -> float:
        """The t for which a share `sparsity` of the projection's inputs has |x| <= t; 0 for sparsity 0.

        Precise to 0.001 of sparsity (in bfloat16 to the share of one value). Of TEAL's histograms it is TEAL's own, the
        quantile (1 + sparsity) / 2 of x. Raises ValueError as `get` does, and for a sparsity outside [0, 1).
        """
        if self.metadata["kind"] == "own":
            return _quantile(sparsity, sparsity, PROBABILITIES, self.get(layer, projection, "magnitude"))
        cumulative, centers = (self.get(layer, projection, name) for name in ("cumulative", "centers"))
        share = (0.5 + sparsity / 2) * cumulative.numpy()[-1]
        return max(0.0, _quantile(sparsity, share, cumulative, centers))  # below 0 where more than half of x is

    def weighted_threshold(self, layer: int, projection: str, sparsity: float) -> float:
        """The t for which a share `sparsity` has |x_i| * c_i <= t, c the `column_norms`. Raises as `threshold` does."""
        return _quantile(sparsity, sparsity, PROBABILITIES, self.get(layer, projection, "weighted"))

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file, whole or not at all. Raises ValueError if it cannot, or if `check` does."""
        self.check()
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        write_output(path, serialize(tensors, {"format": STATISTICS_FORMAT, **self.metadata}))


# Of each kind of a statistic: its shape (None: any length), its least value (None: any, NaN too), whether it rises.
# An input that is always 0 has no kurtosis: `pooled` then holds NaN.
KINDS: dict[str, tuple] = dict.fromkeys(("magnitude", "weighted"), ((len(PROBABILITIES),), 0.0, True))
KINDS |= {"signed": ((len(PROBABILITIES),), -math.inf, True), "pooled": ((3,), None)}
KINDS |= {"column_norms": ((None,), 0.0), "channel_mean": ((None,),), "channel_second_moment": ((None,), 0.0)}
KINDS |= {"cumulative": ((None,), 0.0, True), "centers": ((None,), -math.inf, True)}


def check_tensor(name: str, tensor: Tensor, shape: tuple, least: float | None = -math.inf, rising=False) -> None:
    """Raises ValueError for a tensor of an artifact that is not floating, finite, of this shape and at least `least`.

    None stands for any length but 0 in the shape, and for any value, NaN too. `rising`: nor falls its last dimension.
    """
    fault = ""
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        fault = f"is {str(tensor.dtype).removeprefix('torch.')}, not floating-point of 16 to 64 bits"
    elif tensor.dim() != len(shape) or any(n != (m or n) or n < 1 for n, m in zip(tensor.shape, shape, strict=True)):
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        fault = f"has shape {shown(list(tensor.shape))}, not [{wanted}]"
    elif least is not None and not tensor.isfinite().all():
        fault = "is not finite"
    elif least is not None and tensor.min() < least:
        fault = f"is {tensor.min().item():.3g} somewhere, below {least:g}"
    elif rising and (tensor.diff() < 0).any():
        fault = "does not rise"
    if fault:
        raise ValueError(f"{shown(name)} {fault}")


def _quantile(sparsity: float, share: float, cumulative: np.ndarray | Tensor, values: Tensor) -> float:
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity {sparsity} is outside [0, 1)")
    return float(np.interp(share, np.asarray(cumulative), values.numpy())) if sparsity else 0.0


def load_statistics(path: str | Path, folder: Path | None = None) -> Statistics:
    """Reads what `Statistics.save` wrote. Raises ValueError for no such file, or one of another checkpoint's folder."""
    statistics = read_artifact(path, Statistics, STATISTICS_FORMAT, "statistics", "make it with calibrate.py")
    if folder:
        check_fingerprint(statistics.metadata.get("fingerprint"), folder, "the statistics are", "calibrate.py")
    return statistics


def read_artifact(path: str | Path, make: Callable, form: str, what: str, again: str):
    """What `make` makes of tensors and metadata of a safetensors file whose metadata name this form; it is checked."""
    if not Path(path).exists():
        raise ValueError(f"no {what} file at {path}; {again}")
    try:
        with safe_open(regular_file(path, f"{what} file"), "pt") as file:
            metadata = file.metadata() or {}
            if metadata.pop("format", None) != form:
                raise ValueError(f"{path} is not a {what} file of this version; {again}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or not a {what} file ({one_line(error)}); {again}") from None
    try:
        (artifact := make(tensors, metadata)).check()
        return artifact
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; {again}") from None


def teal_statistics(folder: str | Path) -> Statistics:
    """TEAL's published histograms, layer-{i}/{self_attn,mlp}/histograms.pt; ValueError for none or a damaged one."""
    tensors = {}
    for part, sites in (("self_attn", ("qkv", "o")), ("mlp", ("gate_up", "down"))):
        for path in Path(folder).glob(f"layer-*/{part}/histograms.pt"):
            try:
                layer = int(path.parts[-3].removeprefix("layer-"))
                histograms = torch.load(regular_file(path), map_location="cpu", weights_only=True)
                for site, name in zip(sites, ("h1", "h2"), strict=True):
                    both = histograms[name], histograms[f"{name}_centers"]
                    counts, centers = (x.to(torch.promote_types(x.dtype, torch.float64)) for x in both)
                    found = {f"{layer}.{site}.cumulative": counts.cumsum(0), f"{layer}.{site}.centers": centers}
                    Statistics(found, {"kind": "teal"}).check()
                    tensors |= found
            except Exception as error:  # unpickling fails in many ways
                reason = f"{type(error).__name__}: {one_line(error)}"
                raise ValueError(f"{path} is not a file of TEAL's histograms ({reason})") from None
    if not tensors:
        raise ValueError(f"{folder} holds no layer-*/self_attn/histograms.pt; give TEAL's folder `histograms`")
    return Statistics(tensors, {"kind": "teal"})


class Cuts(NamedTuple):
    """Thresholds and shifts, float32, of all sites of a model at one sparsity, in the order of its `sites`."""

    sparsity: float  # the share of the projections' weights that they are meant to cut, in [0, 1)
    thresholds: list[Tensor]  # one per site: [S, in], or [S, 1] for one value per projection
    shifts: list[Tensor | None]  # one per site: [in], the values that stand for cut inputs; None stands for zeros


def _site_names(n_layer: int) -> list[str]:
    return [f"{layer}.{site}" for layer in range(n_layer) for site in SITES]


class CutTable:
    """Cuts of one model at rising sparsities: what greedy.py and refine.py write.

    levels: [L], the sparsities, rising.
    tensors: "<layer>.<site>.threshold" [L, S, in] or [L, S, 1], and where the rule has shifts "<layer>.<site>.shift"
        [L, in]; from greedy.py also "<layer>.shares" [L, 7 or, without a gate, 6], the sparsity of each input.
    metadata: strings: rule, fingerprint of the checkpoint, text, tokens, ...; `quality`, if known, is JSON: "text"
        and "perplexity", pairs of (sparsity, perplexity on that text) that start with the dense model's.
    """

    def __init__(self, levels: list[float], tensors: dict[str, Tensor], metadata: dict[str, str]):
        self.levels, self.tensors, self.metadata = levels, tensors, metadata

    @classmethod
    def of_file(cls, tensors: dict[str, Tensor], metadata: dict[str, str]) -> "CutTable":
        levels = tensors.pop("levels", torch.zeros(0))
        check_tensor("levels", levels, (None,), 0.0, True)
        return cls(levels.tolist(), tensors, metadata)

    def check(self) -> None:
        """Raises ValueError for tensors, levels or a record of quality that are not as the class says."""
        levels, names = self.levels, _site_names(self.n_layer)
        if not (levels and sorted(set(levels)) == levels and 0 < levels[0] <= levels[-1] < 1):
            raise ValueError(f"its levels {shown(levels)} do not rise between 0 and 1")

        # every site of every layer has thresholds for every level, and all or none have shifts
        thresholds, shifts = ({f"{name}.{kind}" for name in names} for kind in ("threshold", "shift"))
        found = set(self.tensors) - {f"{layer}.shares" for layer in range(self.n_layer)}
        if not names or found not in (thresholds, thresholds | shifts):
            raise ValueError("tensors are missing, or it has others")
        gateless = self.tensors["0.gate_up.threshold"].shape[1:2] == (1,)
        for name, tensor in self.tensors.items():
            _, *site, kind = name.split(".")
            segments = site and len(SITES[site[0]].projections) - (gateless and site[0] == "gate_up")
            rest = {"threshold": (segments, None), "shift": (None,)}
            least = -math.inf if kind == "shift" else 0.0
            check_tensor(name, tensor, (len(levels), *rest.get(kind, (len(PROJECTIONS) - gateless,))), least)
        self.perplexity_at(0.0)

    @property
    def n_layer(self) -> int:
        return sum(name.endswith(".threshold") for name in self.tensors) // len(SITES)

    def level(self, i: int) -> Cuts:
        """The cuts at level i, in float32."""
        names, tensors = _site_names(self.n_layer), self.tensors
        shifts = [tensors[f"{name}.shift"][i].float() if f"{name}.shift" in tensors else None for name in names]
        return Cuts(self.levels[i], [tensors[f"{name}.threshold"][i].float() for name in names], shifts)

    def at(self, sparsity: float) -> Cuts:
        """The cuts between two levels, linear; the level below the first has thresholds 0. Raises ValueError beyond."""
        if not 0 <= sparsity <= self.levels[-1]:
            covered = f"what the cut table covers, 0 to {self.levels[-1]:.3f}"
            raise ValueError(f"sparsity {sparsity} is outside {covered}; choose one inside or --thresholds uniform")
        above = int(np.searchsorted(self.levels, sparsity))
        upper = self.level(above)
        zeros = Cuts(0.0, [torch.zeros_like(threshold) for threshold in upper.thresholds], upper.shifts)
        lower = self.level(above - 1) if above else zeros
        weight = (sparsity - lower.sparsity) / (upper.sparsity - lower.sparsity)

        def between(low: list, high: list) -> list:
            return [None if b is None else torch.lerp(a, b, weight) for a, b in zip(low, high, strict=True)]

        return Cuts(sparsity, between(lower.thresholds, upper.thresholds), between(lower.shifts, upper.shifts))

    def append(self, cuts: Cuts) -> None:
        """Adds a level above the others, in float32."""
        names = _site_names(len(cuts.thresholds) // len(SITES))
        for kind, values in (("threshold", cuts.thresholds), ("shift", cuts.shifts)):
            for name, value in zip(names, values, strict=True):
                if value is not None:
                    before = [self.tensors[f"{name}.{kind}"]] if self.levels else []
                    self.tensors[f"{name}.{kind}"] = torch.cat([*before, value.detach().float().cpu()[None]])
        self.levels.append(cuts.sparsity)

    def halve(self) -> None:
        """Rounds all tensors to float16, or to its largest number, which halves the file."""
        most = torch.finfo(torch.float16).max
        self.tensors = {name: tensor.clamp(-most, most).half() for name, tensor in self.tensors.items()}

    def perplexity_at(self, sparsity: float) -> tuple[float, float, str] | None:
        """Perplexity, dense and at this sparsity (log-linear between records), and the text's name; None: no record."""
        if "quality" not in self.metadata:
            return None
        record = parse_json(self.metadata["quality"], "its quality")
        try:
            sparsities, perplexities = np.array(record["perplexity"], dtype=float).T.tolist()
            check_tensor("the perplexity", torch.tensor(perplexities), (None,), 1.0)
            check_tensor("its sparsity", torch.tensor(sparsities), (None,), 0.0, True)
            if not isinstance(record["text"], str):
                raise TypeError
        except (KeyError, TypeError, ValueError, OverflowError):
            raise ValueError(f"its quality {shown(record)} is not a text and (sparsity, perplexity) pairs") from None
        value = float(np.exp(np.interp(sparsity, sparsities, np.log(perplexities))))
        return perplexities[0], value, record["text"]

    def quality_report(self) -> str:
        """The record of quality, a line per sparsity."""
        quality = json.loads(self.metadata["quality"])
        lines = (f"{sparsity:4.0%} cut: perplexity {value:.2f}" for sparsity, value in quality["perplexity"])
        return "\n".join(f"{line} on {quality['text']}" for line in lines)

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file, whole or not at all. Raises ValueError if it cannot, or if `check` does."""
        self.check()
        tensors = {**self.tensors, "levels": torch.tensor(self.levels, dtype=torch.float64)}
        write_output(path, serialize(tensors, {"format": TABLE_FORMAT, **self.metadata}))


def load_table(path: str | Path, folder: Path | None = None) -> CutTable:
    """Reads what `CutTable.save` wrote. Raises ValueError as `load_statistics` does, and for an old or damaged file."""
    if Path(path).name in OLD_FILES:
        raise ValueError(_of_an_earlier_version(Path(path)))
    table = read_artifact(path, CutTable.of_file, TABLE_FORMAT, "cut table", "make it with greedy.py or refine.py")
    if folder:
        script = SCRIPTS.get(table.metadata.get("rule", ""), "refine.py")
        check_fingerprint(table.metadata.get("fingerprint"), folder, "the cut table is", script)
    return table


def _of_an_earlier_version(path: Path) -> str:
    rule = OLD_FILES[path.name]
    return f"{path} is of an earlier version and not read; make {table_name(rule)}: python {SCRIPTS[rule]}"


def table_metadata(rule: str, folder: Path, text: str, tokens: Tensor, inputs: list[Tensor], **options) -> dict:
    """How a table is made: from the checkpoint in `folder`, the options, and `inputs`, which are all that is left."""
    digest = hashlib.sha256(b"".join(tensor.cpu().numpy().tobytes() for tensor in inputs)).hexdigest()
    facts = {"rule": rule, "fingerprint": fingerprint(folder), "text": text, "tokens": tokens.numel()}
    facts |= {"window": tokens.shape[1], **options, "inputs": digest[:32]}
    return {name: str(value) for name, value in facts.items()}


def make_table(output: Path, new: CutTable, steps: Callable[[CutTable], Iterable]) -> CutTable:
    """The table that all of `steps(table)` make of the empty one `new`, written to `output`.

    After each step it is kept in `<output>.<digest of the metadata>.partial.safetensors`, with which a later run of the
    same settings goes on; it says so.
    """
    settings = hashlib.sha256(json.dumps(new.metadata, sort_keys=True).encode()).hexdigest()[:8]
    part, table = Path(f"{output}.{settings}.partial.safetensors"), new
    with suppress(ValueError):  # absent, damaged, or of another version
        begun = load_table(part)
        if begun.metadata == new.metadata:
            table = begun
            warnings.warn(f"goes on where an earlier run stopped, from {part}", stacklevel=2)
    for _ in steps(table):
        table.save(part)
    table.save(output)
    part.unlink(missing_ok=True)
    return table


def uniform(folder: Path | None, statistics: Callable[[], Statistics], sparsity: float) -> Cuts:
    """TEAL's uniform rule (arXiv 2408.14690, section 4.1): every projection's inputs are cut to the same sparsity."""
    own = statistics()
    return cuts_of_shares(own, [dict.fromkeys(own.projections, sparsity)] * own.n_layer, sparsity)


def cuts_of_shares(statistics: Statistics, shares: list[dict[str, float]], sparsity: float) -> Cuts:
    """Cuts that make the inputs of each layer's projections as sparse as `shares` says. Raises as `threshold` does."""
    thresholds = [
        torch.tensor([[statistics.threshold(layer, p, share[p])] for p in site.projections if p in share])
        for layer, share in enumerate(shares)
        for site in SITES.values()
    ]
    return Cuts(sparsity, thresholds, [None] * len(thresholds))


def table_name(rule: str) -> str:
    return f"thresholds_{rule}.safetensors"


def find_table(rule: str, folder: Path | None) -> CutTable | None:
    """The rule's table beside the checkpoint in `folder`, else the one in ASSETS, else None. Raises as `load_table`."""
    if folder is None:
        return None
    if (folder / (name := table_name(rule))).is_file():
        return load_table(folder / name, folder)
    shipped = map(load_table, ASSETS.glob(f"*/{name}"))
    return next((table for table in shipped if table.metadata["fingerprint"] == fingerprint(folder)), None)


def tabulated(rule: str, folder: Path | None, statistics: Callable[[], Statistics], sparsity: float) -> Cuts:
    """The cuts of a rule that a script of its own makes, from its table. Raises ValueError without one."""
    if table := find_table(rule, folder):
        return table.at(sparsity)
    where = f"beside {folder}" if folder else "for random weights"
    raise ValueError(f"--thresholds {rule}: no cut table {where}; make one: python {SCRIPTS[rule]}")


# the best first
RULES: dict[str, Callable[[Path | None, Callable, float], Cuts]] = {rule: partial(tabulated, rule) for rule in SCRIPTS}
RULES["uniform"] = uniform


def warn_of_old_files(folder: Path | None) -> None:
    """Warns of each table of an earlier version beside the checkpoint that no table of today replaces."""
    for name, rule in OLD_FILES.items():
        if folder and (folder / name).is_file() and not (folder / table_name(rule)).is_file():
            warnings.warn(_of_an_earlier_version(folder / name), stacklevel=2)


def best_rule(sparsity: float, folder: Path | None) -> str:
    """The first of `RULES` whose table for this checkpoint reaches the sparsity; else uniform."""
    warn_of_old_files(folder)
    for rule in SCRIPTS if sparsity else ():
        if (table := find_table(rule, folder)) and sparsity <= table.levels[-1]:
            return rule
    return "uniform"


def cuts_for(
    thresholds: str, sparsity: float, folder: Path | None, statistics: Callable[[], Statistics], own_statistics=False
) -> tuple[str, Cuts]:
    """From a run's options to the rule's name (or the file's path), for reports, and the cuts.

    thresholds: a rule of `RULES`, the path of a cut table, or best: see `best_rule`; uniform with own statistics.
    folder: the checkpoint's, None for random weights; statistics: reads or makes those of this model, if needed;
    own_statistics: whether the user gave `--statistics`.

    Raises ValueError: an unknown rule; a table that is missing, of another checkpoint, or without that sparsity;
    statistics beside a table, which reads none.
    """
    if thresholds == "global":
        raise ValueError("--thresholds global is now refined")
    rule = thresholds
    if rule == "best":
        rule = "uniform" if own_statistics else best_rule(sparsity, folder)
    if rule not in RULES and not Path(rule).is_file():
        raise ValueError(f"--thresholds {rule}: no such file; it takes best, {', '.join(RULES)} or a file")
    if own_statistics and (rule in SCRIPTS or rule not in RULES):
        raise ValueError(f"--statistics has no effect with --thresholds {rule}, a table of thresholds; drop one")
    if rule in RULES:
        return rule, RULES[rule](folder, statistics, sparsity)
    return rule, load_table(rule, folder).at(sparsity)


def table_of(rule: str, folder: Path | None) -> CutTable | None:
    """The table from which `cuts_for` took the cuts of this rule or file; None for a rule without one."""
    return find_table(rule, folder) if rule in RULES else load_table(rule, folder)


def recorded_perplexity(rule: str, folder: Path | None, sparsity: float) -> tuple[float, float, str] | None:
    """`CutTable.perplexity_at` of `table_of` this rule or file; None without a record."""
    table = table_of(rule, folder)
    return table and table.perplexity_at(sparsity)
