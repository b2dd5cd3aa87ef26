"""A checkpoint: a folder with config.json, the weights and the tokenizer's files; read, identified, written.

The weights have GPT-Fast's names, matrices are [out, in], and rotary pairs of q and k are adjacent. A folder of its
final name is complete: `convert` builds it under another name and renames it at the end.
"""

import hashlib
import json
import math
import os
import re
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from formats.files import check_space, no_space_is_value_error, one_line, read_json, regular_file, shown, write_json

Shapes = dict[str, tuple[int, ...]]  # of a model's tensors, by name
FUSED = {"wqkv": ("wq", "wk", "wv"), "w13": ("w1", "w3")}  # projections that a checkpoint may hold apart, in order
CHECKPOINTS = Path(__file__).resolve().parents[1] / "checkpoints"
SINGLE_FILE_BYTES, SHARD_BYTES = 10 * 10**9, 5 * 10**9  # weights beyond the first are cut into shards of the second
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # that a source may have
WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".gguf")
COPIED_FILES = "config.json generation_config.json tokenizer.json tokenizer.model tokenizer_config.json".split()
COPIED_FILES += "special_tokens_map.json added_tokens.json chat_template.jinja chat_template.json".split()


# ---------------------------------------------------------------- reading


def checkpoint_folder(path: str | Path) -> Path:
    """The folder of a checkpoint, given it or a file in it; ValueError for no weights, or not those that it loads."""
    path = Path(os.path.abspath(path))  # "." has no name to choose a config by
    folder = path if path.is_dir() else path.parent
    if not path.exists():
        raise ValueError(f"no checkpoint at {path}")
    loaded = [file.name for file in weight_files(folder)]
    if not loaded:
        raise ValueError(f"{folder} has no model.safetensors, model.safetensors.index.json or model.pth")
    if path.suffix in WEIGHT_SUFFIXES and path != folder and path.name not in loaded:
        raise ValueError(f"{path} is not a weight file that is loaded; the checkpoint in {folder} is in {loaded[0]}")
    return folder


def weight_files(folder: Path) -> list[Path]:
    """Files that hold the weights: safetensors, as one or as the index's shards, else GPT-Fast's model.pth."""
    if (index := folder / "model.safetensors.index.json").is_file():
        return indexed_files(index)
    return [path for path in (folder / "model.safetensors", folder / "model.pth") if path.is_file()][:1]


def indexed_files(index: Path) -> list[Path]:
    """The weight files that an index names, each once; ValueError: one is missing or not in its folder, or no index."""
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise ValueError(f"{index} has no weight_map of tensors to files; get it again")
    names = sorted(set(found.values()))
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{index} names the shard {shown(name)} outside its folder")
        if not os.path.isfile(index.parent / name):  # False for a name that is too long, unlike Path's
            raise ValueError(f"{index} names the shard {shown(name)}, which is missing; get it again")
    return [index.parent / name for name in names]


def load_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors by name, memory-mapped. Raises ValueError as `read_tensors` does."""
    return {name: tensor for path in weight_files(folder) for name, tensor in read_tensors(path).items()}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a weight file by name, mapped unless in torch's older format; ValueError for any other file."""
    regular_file(path, "weight file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        pickled = torch.load(path, mmap=zipfile.is_zipfile(path), weights_only=True, map_location="cpu")
    except Exception as error:  # of safetensors, torch, pickle, and whatever damaged bytes lead to in them
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(f"{path} is refused: it would run {one_line(refused[1])}; get it as safetensors") from None
        reason = str(error).rpartition("WeightsUnpickler error: ")[2].strip() or type(error).__name__  # no advice
        raise ValueError(f"{path} cannot be read, it is truncated or no weight file: {one_line(reason)}") from None
    if not isinstance(pickled, dict):
        raise ValueError(f"{path} is no weight file: it holds a {type(pickled).__name__}, not tensors by name")
    for name, value in pickled.items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or value.layout != torch.strided:
            kind = f"{value.layout} tensor" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{path} is no weight file: its entry {shown(name)} is a {kind}, not a tensor")
    return {name: tensor.detach() for name, tensor in pickled.items()}


def check_layers(names: Iterable[str], n_layer: int) -> None:
    """Raises ValueError if tensors of these names (ours, Hugging Face's or GGUF's) are not of n_layer plain layers."""
    if experts := next((name for name in names if re.search(r"experts|_exps\.|block_sparse_moe", name)), None):
        raise ValueError(f"the weights are a mixture of experts, which is not supported: {shown(experts)}")
    found = {m[1] for name in names if (m := re.match(r"(?:model\.)?(?:layers|blk)\.(\d+)\.", name))}
    if len(found) != n_layer:
        raise ValueError(f"config.json has num_hidden_layers {n_layer}, but the weights have {len(found)} layers")


def expected_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A checkpoint's tensors: those of the model, with fused projections taken apart."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        path, kind = name.rsplit(".", 1)
        owner, _, last = path.rpartition(".")
        if last not in FUSED:
            tensors[name] = tensor
            continue
        widths = model.get_submodule(path).segments.values()
        rows = tensor.split([width * len(tensor) // sum(widths) for width in widths])
        tensors |= {f"{owner}.{part}.{kind}": t for part, t in zip(FUSED[last][-len(rows) :], rows, strict=True)}
    return tensors


def check_tensors(tensors: dict[str, Tensor], one_layer: nn.Module, folder: Path) -> None:
    """Raises ValueError for a tensor of another shape or kind than in a model of the config, here of a single layer."""
    expected = expected_tensors(one_layer) | one_layer.state_dict()
    for name, tensor in tensors.items():
        due = expected.get(re.sub(r"^layers\.\d+\.", "layers.0.", name), tensor)  # load_state_dict finds foreign names
        exact = name.endswith(".scale") or not due.is_floating_point()
        if due.dtype == torch.int32 and tensor.dim() == 1:  # a list of escapes, as long as it is
            due = tensor.new_empty(len(tensor), dtype=torch.int64)
        if tensor.shape != due.shape or not (tensor.dtype == due.dtype or (tensor.is_floating_point() and not exact)):
            found, asked = (f"{tuple(t.shape)} {t.dtype}".replace("torch.", "") for t in (tensor, due))
            reason = f"{name} is {found}, config.json asks for {asked}"
            raise ValueError(f"the weights in {folder} do not fit its config: {reason}")


def fuse_on_load(fused: str) -> Callable:
    """A load_state_dict pre-hook that stacks the tensors of a fused projection, where they come apart."""

    def hook(module, state_dict, prefix, *_):
        parts = FUSED[fused][-len(getattr(module, fused).segments) :]  # without a gate: up alone
        for kind in ("weight", "bias", "scale"):
            keys = [f"{prefix}{part}.{kind}" for part in parts]
            if all(key in state_dict for key in keys):
                state_dict[f"{prefix}{fused}.{kind}"] = torch.cat([state_dict.pop(key) for key in keys])

    return hook


def is_own_head(head: Tensor, embedding: Tensor | None) -> bool:
    """Whether an lm_head that a tied checkpoint stores is another matrix than its embedding; then it warns."""
    if embedding is None or (head.dtype == embedding.dtype and torch.equal(head, embedding)):
        return False
    warnings.warn("the stored lm_head is not the embedding: it is used, though config.json ties them", stacklevel=2)
    return True


# ---------------------------------------------------------------- identity


def fingerprint(folder: Path) -> str:
    """Identifies a checkpoint by its config and 64 x 4 KiB of each weight file: 32 hex digits that artifacts carry."""
    config = folder / "config.json"
    digest = hashlib.sha256(config.read_bytes() if config.is_file() else b"")
    for path in weight_files(folder):
        size = os.path.getsize(path)
        digest.update(str(size).encode())
        with open(path, "rb") as f:
            for i in range(64):
                f.seek(i * size // 64)
                digest.update(f.read(4096))
    return digest.hexdigest()[:32]


def check_fingerprint(found: str | None, folder: Path, what: str, script: str) -> None:
    """Raises ValueError if an artifact's fingerprint is not that of the checkpoint in `folder`. None is unknown."""
    if found is not None and found != (own := fingerprint(folder)):
        mend = f"to mend this: python {script} --checkpoint_path {folder}"
        raise ValueError(f"{what} of another checkpoint than {folder} ({found} against {own}); {mend}")


# ---------------------------------------------------------------- writing


class Source(NamedTuple):
    """A tensor that is not read before load() is called."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def copy_files(source: Path, output: Path) -> None:
    for name in COPIED_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, output / name)


def write_weights(folder: Path, tensors: dict[str, Source]) -> None:
    """Writes model.safetensors, or shards and their index, a tensor at a time; ValueError if the disk has no room."""
    total = sum(source.nbytes for source in tensors.values())
    check_space(folder, total, "set --output_dir")

    # deal the tensors out to shards, in order
    shards: list[dict[str, Source]] = [{}]
    room = SHARD_BYTES if total > SINGLE_FILE_BYTES else total
    for name, source in tensors.items():
        if shards[-1] and sum(other.nbytes for other in shards[-1].values()) + source.nbytes > room:
            shards.append({})
        shards[-1][name] = source

    # name the files; several need an index
    files = ["model.safetensors"]
    if len(shards) > 1:
        files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        index = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})

    with no_space_is_value_error(folder, total), tqdm(total=len(tensors), desc="converting", unit="tensor") as progress:
        for file, shard in zip(files, shards, strict=True):
            write_safetensors(folder / file, shard, progress)


def write_safetensors(path: Path, tensors: dict[str, Source], progress: tqdm) -> None:
    """The safetensors format: the header's length, a header in JSON, the tensors' bytes."""
    names = {dtype: name for name, dtype in DTYPES.items()} | {torch.int8: "I8", torch.uint8: "U8", torch.int64: "I64"}
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)  # so that every tensor is aligned
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, source in ordered:
        start, end = end, end + source.nbytes
        header[name] = {"dtype": names[source.dtype], "shape": source.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, source in ordered:
            tensor = source.load()
            assert tuple(tensor.shape) == source.shape and tensor.dtype == source.dtype
            file.write(tensor.contiguous().view(torch.uint8).numpy().data)
            progress.update()


# ---------------------------------------------------------------- converting


def check_absent(output: Path) -> None:
    """Raises ValueError if there is something at `output` already, other than an empty folder."""
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise ValueError(f"{output} is there already; delete it, or give another --output_dir")


def convert(convert_source: Callable[[Path, Path], None], source: Path, output: Path) -> None:
    """Runs convert_source(source, <output>.partial), then renames that folder; the caller holds the lock of output.

    Raises ValueError if `output` is there already or the disk is full, and what convert_source raises.
    """
    check_absent(output)
    partial = output.with_name(f"{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    partial.mkdir()
    try:
        with no_space_is_value_error(partial):
            convert_source(source, partial)
        os.replace(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def rename_tensors(
    sources: dict[str, Source], names: dict[str, str], expected: Shapes | None, head_dim: int, rotary_dim: int
) -> dict[str, Source]:
    """The tensors of a foreign checkpoint under our names, with rotary pairs adjacent; float64 becomes float32.

    `names`: theirs of a module (without layer) -> ours. `expected` None checks names alone. `rotary_dim`: rows of a
    head whose rotary pairs are half of it apart. Raises ValueError for a wrong set of tensors, wrong shapes or dtypes.
    """
    tensors, unexpected = {}, []
    for name, new, source in _apart(sources, names, expected):
        if new is None or (expected is not None and new not in expected):
            if new != "output.weight" and not name.endswith("rotary_emb.inv_freq"):  # the first: a tied head
                unexpected.append(name)
            continue
        if expected is not None and source.shape != expected[new]:
            raise ValueError(f"tensor {name} has shape {source.shape}; the config asks for {expected[new]}")
        if source.dtype == torch.float64:
            source = source._replace(dtype=torch.float32, load=lambda s=source: s.load().float())
        if source.dtype not in DTYPES.values():
            raise ValueError(f"tensor {name} has dtype {source.dtype}; supported: {', '.join(DTYPES)}, F64")

        # of q and k: projections and their biases, and norms
        half = rotary_dim and re.search(r"attention\.(w[qk]|[qk]_norm)\.", new)
        tensors[new] = interleave(source, head_dim, rotary_dim) if half else source

    missing = [_their_name(name, names, sources) for name in expected or () if name not in tensors]
    why = "the config is of another model" if unexpected else "the file is incomplete, or the config of another"
    if missing == ["lm_head.weight"]:
        why = "it has no lm_head of its own: set tie_word_embeddings to true if it shares the embedding"
    if found := unexpected or missing:
        listed = ", ".join(repr(name[:100])[1:-1] for name in found[:5])
        listed += f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise ValueError(f"{'unexpected' if unexpected else 'missing'} tensors for this config: {listed}; {why}")
    return tensors


def _our_name(name: str, names: dict[str, str]) -> str | None:
    match = re.fullmatch(r"(?:(?:model\.layers|blk)\.(\d+)\.)?(.+)\.(weight|bias)", name)
    if match is None or match[2] not in names:
        return None
    return (f"layers.{match[1]}." if match[1] else "") + f"{names[match[2]]}.{match[3]}"


def _their_name(name: str, names: dict[str, str], sources: Iterable[str]) -> str:
    """The inverse of `_our_name`, for the program whose names `sources` has."""
    layer, module, kind = re.fullmatch(r"(?:layers\.(\d+)\.)?(.+)\.(\w+)", name).groups()
    stem = next((theirs for theirs, ours in names.items() if ours == module), module)
    prefix = "blk" if any(source.startswith("blk.") for source in sources) else "model.layers"
    return (f"{prefix}.{layer}." if layer else "") + f"{stem}.{kind}"


def _apart(sources: dict[str, Source], names: dict[str, str], expected: Shapes | None) -> Iterator[tuple]:
    """Name, our name (None for an unknown one) and source of each tensor; those of fused projections part by part."""
    for name, source in sources.items():
        new = _our_name(name, names)
        owner, fused, kind = ("." + (new or "..")).rsplit(".", 2)
        parts = [part for p in FUSED.get(fused, ()) if (part := f"{owner}.{p}.{kind}"[1:]) in (expected or ())]
        if not parts:
            yield name, new, source
            continue
        ends = list(accumulate(expected[part][0] for part in parts))
        if source.shape != (due := (ends[-1], *expected[parts[0]][1:])):
            raise ValueError(f"tensor {name} has shape {source.shape}; the config asks for {due}")
        for part, first, end in zip(parts, [0, *ends], ends, strict=False):
            yield name, part, reordered(source, torch.arange(first, end))


def reordered(source: Source, rows: Tensor) -> Source:
    """The tensor of these rows, int64, of a source."""
    return source._replace(shape=(len(rows), *source.shape[1:]), load=lambda: source.load()[rows])


def interleave(source: Source, head_dim: int, rotary_dim: int) -> Source:
    """Puts the first rotary_dim = r rows of each head in the order 0, r/2, 1, r/2 + 1, ...: pairs become adjacent."""
    rows = torch.arange(source.shape[0]).view(-1, head_dim)
    rotated = rows[:, :rotary_dim].unflatten(1, (2, -1)).transpose(1, 2).flatten(1)
    return reordered(source, torch.cat((rotated, rows[:, rotary_dim:]), 1).flatten())
