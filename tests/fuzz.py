"""Feeds the scripts mutated files and flags, and reports what they should not have done with them.

    python tests/fuzz.py                            # 300 mutations with seed 0, as the test suite runs them
    python tests/fuzz.py --count 5000 --jobs 2      # thousands
    python tests/fuzz.py --rooms gguf,text          # of some kinds of input alone
    python tests/fuzz.py --index 17 --keep DIR      # one of them again, its files and its output left in DIR
    python tests/fuzz.py --rooms harness            # lm-eval's requests, which needs lm-eval

A mutation is told by its seed and index alone. It runs in a forked process of its own, so that a crash, a hang or an
endless allocation ends that process only. Right are a result that is finite, and an error of one line that a person can
read. A fault is anything else: another exception, a signal, over 20 s, over 4 GB, NaN or infinity in an output, a
message that is empty, long, or echoes a value at length.
"""

# ruff: noqa: E402 (the environment is set before torch is imported)

import argparse
import contextlib
import faulthandler
import gzip
import io
import json
import math
import os
import random
import re
import resource
import runpy
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "PIP_NO_INDEX": "1"}
os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
from models import LLAMA3_ROPE, TINY, split_weights, write_checkpoint
from safetensors.torch import load_file, save_file

from calibrate import calibrate
from formats.huggingface import HF_NAMES
from kernels import cpu
from model import Transformer
from sparse_model import SITES, SparseTransformer
from thresholds import CutTable

SECONDS, MEMORY = 20, 4 * 10**9  # limits of one mutation
MESSAGE, ECHO = 600, 200  # characters of an error's message, and of a value in it
TEXT = "Hello, my name is Ann and this is a story of rivers. "
QWEN = {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
CONFIGS = {  # the checkpoints whose files are mutated
    "llama": TINY | {"rope_theta": 1e4, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "hidden_act": "silu"},
    "llama3": TINY | {"rope_scaling": LLAMA3_ROPE, "rope_theta": 5e5, "head_dim": 8},
    "mistral": TINY | {"architectures": ["MistralForCausalLM"], "sliding_window": 8},
    "qwen2": TINY | QWEN | {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
    "tied": TINY | {"tie_word_embeddings": True, "rope_scaling": {"type": "linear", "factor": 2.0}},
}
OTHER_KEYS = (  # of a config.json, that none of these has
    "layer_types quantization quantization_config attention_bias mlp_bias model_type torch_dtype pad_token_id "
    "partial_rotary_factor original_max_position_embeddings num_experts use_sliding_window sliding_window rope_scaling"
).split()
TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}<|assistant|>"
TOKENIZER_CONFIG = {
    "bos_token": "<s>",
    "eos_token": {"content": "</s>", "lstrip": False},
    "add_bos_token": True,
    "chat_template": TEMPLATE,
    "added_tokens_decoder": {"298": {"content": "<s>", "special": True}, "299": {"content": "</s>", "special": True}},
}
JSON_FILES = {  # what stands beside the weights
    "tokenizer_config.json": TOKENIZER_CONFIG,
    "generation_config.json": {"eos_token_id": [299], "bos_token_id": 298},
    "special_tokens_map.json": {"bos_token": "<s>", "eos_token": {"content": "</s>"}},
    "added_tokens.json": {"<s>": 298, "</s>": 299},
}

# ---------------------------------------------------------------- values and bytes


@dataclass(frozen=True)
class Raw:
    """JSON that `json.dumps` would not write."""

    text: str


def strange(r: random.Random, value: Any = None) -> Any:
    """A value of another type, sign, size or depth than `value`."""
    numbers = [0, 1, -1, 2, 7, 10**7, 10**9, 2**31, 2**63, 10**18, 10**30, Raw("1" + "0" * 400), 0.5, 1.5, -0.5]
    numbers += [1e-300, 1e300, math.nan, math.inf, -math.inf]
    others = [None, True, False, "", "false", "NaN", "1e9", "\x00", "Zz" * 150, "Zz" * 50_000, "\ud800", [], {}]
    others += [[None], [[0]], {"a": 1}, [1] * 10_000, Raw("[" * 100_000 + "]" * 100_000), [value], str(value)]
    near: list = []
    if isinstance(value, int | float):
        near = [value + 1, value - 1, -value, 2 * value, value / 2, value * 10**6, float(value)]
    elif isinstance(value, list | tuple):
        near = [list(value)[:-1], list(value) * 2, list(value)[::-1], [*value, None], {}]
    elif isinstance(value, str):
        near = [value.upper(), value[:-1], value + " ", value * 100]
    return r.choice(r.choice([numbers, others, near or numbers]))


def place(r: random.Random, tree: Any) -> tuple:
    """The path of some value in a tree of JSON, the outer ones more often."""
    if not tree or not isinstance(tree, dict | list):
        return ()
    key = r.choice(list(tree)) if isinstance(tree, dict) else r.randrange(len(tree))
    return (key, *(place(r, tree[key]) if r.random() < 0.6 else ()))


def mutate_tree(r: random.Random, tree: Any, more_keys: tuple | list = ()) -> tuple[Any, str]:
    """A copy of the tree with one value replaced, dropped or added; and what was done."""
    tree = json.loads(json.dumps(tree))
    if more_keys and r.random() < 0.25:
        key = r.choice(more_keys)
        tree[key] = value = strange(r)
        return tree, f"{key} = {value!r}"
    *path, last = place(r, tree) or ("extra",)
    owner = tree
    for key in path:
        owner = owner[key]
    name = ".".join(map(str, (*path, last)))
    if r.random() < 0.12 and last in (owner if isinstance(owner, dict) else ()):
        del owner[last]
        return tree, f"{name} is missing"
    owner[last] = value = strange(r, owner[last] if isinstance(owner, list) or last in owner else None)
    return tree, f"{name} = {value!r}"


def dumps(tree: Any) -> str:
    """JSON of a tree with `Raw` in it."""
    raw: list[str] = []

    def keep(value: Raw) -> str:
        raw.append(value.text)
        return f"@raw{len(raw) - 1}@"

    text = json.dumps(tree, default=keep)
    return re.sub(r'"@raw(\d+)@"', lambda m: raw[int(m[1])], text)


def mutate_bytes(r: random.Random, data: bytes) -> tuple[bytes, str]:
    at = r.randrange(len(data) + 1)
    kinds = {
        "cut off": lambda: data[:at],
        "trailing bytes": lambda: data + r.choice([b"\0" * 64, b"xyz", b"\n\n", data[-100:], data]),
        "flipped bytes": lambda: flipped(r, data),
        "bytes inserted": lambda: data[:at] + r.randbytes(r.choice([1, 8, 100])) + data[at:],
        "bytes dropped": lambda: data[:at] + data[at + r.choice([1, 8, 100]) :],
        "not UTF-8": lambda: data[:at] + b"\xff\xfe\xe9" + data[at:],
        "a byte order mark": lambda: b"\xef\xbb\xbf" + data,
        "UTF-16": lambda: data.decode("utf-8", "replace").encode("utf-16"),
        "CRLF": lambda: data.replace(b"\n", b"\r\n"),
        "gzip": lambda: gzip.compress(data),
        "empty": lambda: b"",
        "white space": lambda: b" \n\n ",
        "null": lambda: b"null",
        "an array": lambda: b"[1, 2]",
        "a string": lambda: b'"x"',
        "deep": lambda: b"[" * 100_000,
        "deep and closed": lambda: b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        "a key twice": lambda: data.replace(b"{", b'{"hidden_size": 3, "hidden_size": null, ', 1),
    }
    kind = r.choice(list(kinds))
    return kinds[kind](), kind


def flipped(r: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    start = r.choice([len(data), 200, 1000])  # often in a header
    for _ in range(r.choice([1, 2, 8])):
        if changed:
            changed[r.randrange(min(start, len(changed)))] ^= 1 << r.randrange(8)
    return bytes(changed)


def replace_file(r: random.Random, path: Path) -> str:
    """Puts something that is no regular file in the place of `path`."""
    kind = r.choice(["fifo", "directory", "/dev/zero", "/dev/null", "/dev/tty", "absent", "dangling", "itself"])
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind != "absent":
        path.symlink_to({"dangling": "nowhere", "itself": path}.get(kind, kind))
    return kind


def mutate_file(r: random.Random, path: Path, more_keys: tuple | list = ()) -> str:
    """Mutates a file as a tree of JSON (if it is one), as bytes, or as a file; says how."""
    choice = r.random()
    if choice < 0.1:
        return f"{path.name}: {replace_file(r, path)}"
    data = path.read_bytes()
    if path.suffix == ".json" and choice < 0.75:
        tree, what = mutate_tree(r, json.loads(data), more_keys)
        path.write_text(dumps(tree), "utf-8", "surrogatepass")
        return f"{path.name}: {what}"
    if path.suffix == ".safetensors" and choice < 0.8:
        return f"{path.name}: {mutate_safetensors(r, path)}"
    data, what = mutate_bytes(r, data)
    path.write_bytes(data)
    return f"{path.name}: {what}"


def mutate_safetensors(r: random.Random, path: Path) -> str:
    """Mutates one tensor, the metadata, or the header that says where tensors lie."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    if r.random() < 0.3:
        if r.random() < 0.2:
            size = r.choice([0, 1, size + 8, 10**7, 2**40, 2**63])
            path.write_bytes(struct.pack("<Q", size) + data[8:])
            return f"a header of {size} bytes"
        chosen = r.choice([k for k in header if k != "__metadata__"] + ["__metadata__"] * 8)
        tree, what = mutate_tree(r, {chosen: header.get(chosen, {})})
        new = dumps(header | tree if chosen in tree else tree).encode("utf-8", "surrogatepass")
        path.write_bytes(struct.pack("<Q", len(new)) + new + data[8 + size :])
        return f"header: {what}"
    tensors = load_file(path)
    name = r.choice(sorted(tensors))
    what = mutate_tensors(r, tensors, name)
    metadata = {k: str(v) for k, v in header.get("__metadata__", {}).items()}
    save_file({k: t.contiguous() for k, t in tensors.items()}, path, metadata)
    return what


def mutate_tensors(r: random.Random, tensors: dict[str, torch.Tensor], name: str) -> str:
    tensor = tensors[name].clone()
    real = tensor if tensor.is_floating_point() else tensor.float()
    one = real.clone().flatten()
    if one.numel():
        one[r.randrange(len(one))] = r.choice([math.nan, math.inf, -math.inf])
    kinds = {
        "is missing": lambda: None,
        "one value not finite": lambda: one.view(real.shape),
        "all NaN": lambda: real * math.nan,
        "all infinite": lambda: torch.full_like(real, math.inf),
        "negative": lambda: -real.abs() - 1,
        "huge": lambda: (real.double() * 1e30).to(real.dtype),
        "zeros": lambda: torch.zeros_like(tensor),
        "transposed": lambda: tensor.t() if tensor.dim() == 2 else tensor[None],
        "flat": lambda: tensor.flatten(),
        "a row more": lambda: torch.cat([tensor, tensor[:1]]) if tensor.dim() else tensor[None],
        "a row less": lambda: tensor[:-1] if tensor.dim() else tensor[None],
        "no rows": lambda: tensor[:0] if tensor.dim() else tensor[None],
        "a dimension more": lambda: tensor[..., None],
        "a number": lambda: tensor.flatten()[0] if tensor.numel() else tensor,
        "reversed": lambda: tensor.flip(0) if tensor.dim() else tensor,
        "as float64": lambda: tensor.double(),
        "as float16": lambda: tensor.half(),
        "as int64": lambda: tensor.long(),
        "as int8": lambda: tensor.to(torch.int8),
        "as bool": lambda: tensor.bool(),
        "as complex": lambda: real.float().to(torch.complex64),
        "as float8": lambda: real.to(torch.float8_e4m3fn),
    }
    kind = r.choice(list(kinds))
    new = kinds[kind]()
    del tensors[name]
    if new is not None:
        tensors[name if r.random() < 0.9 else name + r.choice(["2", ".weight", "\n"])] = new
    if r.random() < 0.05:
        tensors["strange"] = torch.ones(3)
    return f"{name} {kind}"


# ---------------------------------------------------------------- what is mutated


@dataclass
class Case:
    """A mutation: what it is, and what is then run: scripts with their flags one after another, or a function."""

    what: str
    commands: list[list[str]] = field(default_factory=list)
    call: Callable[[], Any] | None = None
    stdin: bytes = b""
    encoding: str = "utf-8:strict"
    refuse: bool = False  # whether a result, however finite, is a fault
    file_size: int = 0  # bytes that a file may have: beyond them writing fails as on a full disk


def make_bases(folder: Path) -> None:
    """The files that are mutated, unharmed."""
    for name, config in CONFIGS.items():
        base = write_checkpoint(folder / name, config, TEXT)
        for file, content in JSON_FILES.items():
            (base / file).write_text(json.dumps(content))
        model = SparseTransformer.from_checkpoint(base, "cpu", torch.float32)
        statistics = calibrate(base, model, num_tokens=256)
        del statistics.metadata["fingerprint"]  # so that a mutated config or weight is used with them
        statistics.save(base / "calibration.safetensors")
        for rule in ("refined", "greedy"):
            cut_table(model, rule).save(base / f"thresholds_{rule}.safetensors")
        if name == "llama":
            split_weights(shutil.copytree(base, folder / "sharded"))
            hugging_face(base, folder)
            for mode in ("int8", "int4"):
                flags = ["--checkpoint_path", base, "--mode", mode, "--groupsize", 16, "--num_tokens", 0]
                script("quantize.py", [*flags, "--output_dir", folder / mode])
    for kind in ("gpt2", "llama"):
        (folder / f"{kind}.gguf").write_bytes(write_gguf(*gguf_parts(kind)))
    script("convert_hf_checkpoint.py", ["--gguf", folder / "llama.gguf", "--output_dir", folder / "sentencepiece"])
    tiktoken(shutil.copytree(folder / "llama", folder / "tiktoken"))
    teal(folder / "teal")
    texts(folder / "texts")


def warm_up(bases: Path) -> None:
    """Runs unharmed files once: what is imported or built at first use is there when a mutation runs."""
    for more in ((), ("--compile", "--sparsity", "0.5")):
        script(generate(bases / "llama")[0], [*generate(bases / "llama")[1:], *more])
    cpu.library()


def cut_table(model: SparseTransformer, rule: str) -> CutTable:
    levels, tensors, g = [0.25, 0.5, 0.75], {}, torch.Generator().manual_seed(0)
    for j, module in enumerate(model.sites):
        name, (rows, n_in) = f"{j // len(SITES)}.{list(SITES)[j % len(SITES)]}", module.threshold.shape
        steps = torch.tensor(levels)[:, None, None]
        tensors[f"{name}.threshold"] = (torch.rand(3, rows, n_in, generator=g) * steps).half()
        if rule == "refined":
            tensors[f"{name}.shift"] = torch.randn(3, n_in, generator=g).half() / 10
    quality = json.dumps({"text": "t", "perplexity": [(0.0, 9.0), (0.25, 9.5), (0.5, 10.0), (0.75, 20.0)]})
    return CutTable(levels, tensors, {"rule": rule, "text": "t", "tokens": "256", "quality": quality})


def hugging_face(base: Path, folder: Path) -> None:
    """The checkpoint under Hugging Face's names: as safetensors, as shards, and pickled."""
    theirs = {ours: name for name, ours in HF_NAMES.items()}
    tensors = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        layer, path = re.fullmatch(r"(?:layers\.(\d+)\.)?(.+)\.weight", name).groups()
        tensors[(f"model.layers.{layer}." if layer else "") + theirs[path] + ".weight"] = tensor
    for kind in ("hf", "hf-sharded", "hf-bin"):
        shutil.copytree(base, folder / kind, ignore=lambda _, names: [n for n in names if n.endswith("safetensors")])
        save_file(tensors, folder / kind / "model.safetensors")
    split_weights(folder / "hf-sharded")
    (folder / "hf-bin/model.safetensors").unlink()
    torch.save(tensors, folder / "hf-bin/pytorch_model.bin")


def tiktoken(folder: Path) -> None:
    import base64

    (folder / "tokenizer.json").unlink()
    (folder / "added_tokens.json").unlink()
    ranks = [bytes([i]) for i in range(256)] + [b"he", b"in", b"ri"]
    lines = [base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(ranks)]
    (folder / "tokenizer.model").write_bytes(b"".join(lines))
    added = {str(259 + i): {"content": t} for i, t in enumerate(("<|begin_of_text|>", "<|eot_id|>"))}
    content = TOKENIZER_CONFIG | {"added_tokens_decoder": added, "eos_token": "<|eot_id|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(content | {"bos_token": "<|begin_of_text|>"}))


def teal(folder: Path) -> None:
    for layer in range(2):
        for part in ("self_attn", "mlp"):
            path = folder / f"layer-{layer}/{part}/histograms.pt"
            path.parent.mkdir(parents=True)
            torch.save(teal_histogram(), path)


def teal_histogram() -> dict[str, torch.Tensor]:
    centers = torch.linspace(-3, 3, 101)
    counts = torch.exp(-(centers**2)) * 1000
    return {"h1": counts, "h1_centers": centers, "h2": counts.clone(), "h2_centers": centers.clone()}


def texts(folder: Path) -> None:
    folder.mkdir()
    (folder / "a.txt").write_text((TEXT + "\n") * 60)
    lines = [{"text": TEXT * 30}, {"prefix": TEXT * 10, "gold_completion": TEXT}, {"text": TEXT * 10}]
    jsonl = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "a.jsonl").write_text(jsonl)
    (folder / "a.json.gz").write_bytes(gzip.compress(jsonl.encode()))


# GGUF, written by hand so that every field of it can be wrong: key -> (number of the type, value)
INT8, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64 = 1, 4, 5, 6, 7, 8, 9, 10
PACK = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def gguf_parts(kind: str) -> tuple[dict[str, tuple], dict[str, tuple[torch.Tensor, int]]]:
    """Metadata and tensors (with the number of their type) of a small file whose tokenizer is gpt2's or llama's."""
    config = TINY | {"num_key_value_heads": 2}
    words = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)] if kind == "llama" else []
    if kind == "gpt2":
        from tokenizers.pre_tokenizers import ByteLevel

        words = sorted(ByteLevel.alphabet())
    words += ["he", "in", "ri", "an"] + [f"w{i}" for i in range(300)]
    words = words[:300]
    types = [2, 3, 3] + [6] * 256 if kind == "llama" else [1] * 256
    types += [1] * (300 - len(types))
    numbers = {"block_count": 2, "embedding_length": 32, "feed_forward_length": 48, "attention.head_count": 4}
    numbers |= {"attention.head_count_kv": 2, "context_length": 160, "rope.dimension_count": 8}
    meta = {"general.architecture": (STRING, "llama"), "general.name": (STRING, "tiny")}
    meta |= {f"llama.{key}": (UINT32, value) for key, value in numbers.items()}
    meta |= {"llama.attention.layer_norm_rms_epsilon": (FLOAT32, 1e-5), "llama.rope.freq_base": (FLOAT32, 1e4)}
    meta |= {"tokenizer.ggml.model": (STRING, kind), "tokenizer.ggml.tokens": (ARRAY, (STRING, words))}
    meta |= {"tokenizer.ggml.token_type": (ARRAY, (INT32, types)), "tokenizer.ggml.bos_token_id": (UINT32, 1)}
    meta |= {"tokenizer.ggml.eos_token_id": (UINT32, 2), "tokenizer.chat_template": (STRING, TEMPLATE)}
    if kind == "llama":
        scores = [-float(i) for i in range(300)]
        meta |= {"tokenizer.ggml.scores": (ARRAY, (FLOAT32, scores)), "tokenizer.ggml.add_bos_token": (BOOL, True)}
    else:
        meta |= {"tokenizer.ggml.pre": (STRING, "smollm"), "tokenizer.ggml.merges": (ARRAY, (STRING, ["h e", "i n"]))}

    g = torch.Generator().manual_seed(0)
    kv = config["hidden_size"] * 2 // 4
    shapes = {"token_embd": (300, 32), "output": (300, 32), "output_norm": (32,)}
    for i in range(2):
        b = f"blk.{i}."
        shapes |= {f"{b}attn_norm": (32,), f"{b}ffn_norm": (32,), f"{b}attn_q": (32, 32), f"{b}attn_k": (kv, 32)}
        shapes |= {f"{b}attn_v": (kv, 32), f"{b}attn_output": (32, 32)}
        shapes |= {f"{b}ffn_gate": (48, 32), f"{b}ffn_up": (48, 32), f"{b}ffn_down": (32, 48)}
    tensors = {
        f"{name}.weight": (torch.ones(s) if "norm" in name else torch.randn(s, generator=g) / 5, 0)
        for name, s in shapes.items()
    }
    return meta, tensors


def gguf_value(kind: int, value: Any) -> bytes:
    if kind == STRING:
        data = value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass")
        return struct.pack("<Q", len(data)) + data
    if kind == ARRAY:
        inner, values = value
        return struct.pack("<IQ", inner, len(values)) + b"".join(gguf_value(inner, v) for v in values)
    number = float(value) if PACK[kind] in "fd" else int(value)
    if PACK[kind] not in "fd?":
        bits = 8 * struct.calcsize(PACK[kind])
        number = number % 2**bits - (2**bits if PACK[kind].islower() and number % 2**bits >= 2 ** (bits - 1) else 0)
    return struct.pack("<" + PACK[kind], number)


def write_gguf(meta: dict, tensors: dict, version: int = 3, counts: tuple | None = None, shift: int = 0) -> bytes:
    """A GGUF file; `counts` are what it says of the numbers of tensors and keys, `shift` is added to all offsets."""
    out = b"GGUF" + struct.pack("<IQQ", version, *(counts or (len(tensors), len(meta))))
    for key, (kind, value) in meta.items():
        out += gguf_value(STRING, key) + struct.pack("<I", kind) + gguf_value(kind, value)
    data = b""
    for name, (tensor, kind, *shape) in tensors.items():
        dims = (shape[0] if shape else tuple(tensor.shape))[::-1]
        out += gguf_value(STRING, name) + struct.pack(f"<I{len(dims)}Q", len(dims), *(d % 2**64 for d in dims))
        out += struct.pack("<IQ", kind, len(data) + shift)
        data += tensor.contiguous().numpy().tobytes()
        data += b"\0" * (-len(data) % 32)
    return out + b"\0" * (-len(out) % 32) + data


def number_of_type(r: random.Random, value: Any) -> tuple[int, Any]:
    """A value with a type of GGUF that may hold it."""
    value = strange(r, value)
    if isinstance(value, Raw):
        value = 2**62
    if isinstance(value, bool):
        return BOOL, value
    if isinstance(value, int):
        return r.choice([UINT32, INT32, INT8, UINT64, 11]), value
    if isinstance(value, float):
        return r.choice([FLOAT32, 12]), min(max(value, -3e38), 3e38) if math.isfinite(value) else value
    if isinstance(value, list):
        return ARRAY, (r.choice([INT32, STRING]), [1, 2, 3][: len(value)])
    return STRING, "" if value is None else value


def room_gguf(r: random.Random, work: Path, bases: Path) -> Case:
    kind, path, options, what = r.choice(["gpt2", "llama"]), work / "in.gguf", {}, ""
    meta, tensors = gguf_parts(kind)
    choice = r.random()
    key, name = r.choice(list(meta)), r.choice(list(tensors))
    if choice < 0.2:
        meta[key] = number_of_type(r, meta[key][1] if meta[key][0] != ARRAY else list(meta[key][1][1]))
        what = f"{key} = {meta[key]!r}"
    elif choice < 0.3:
        keys = "rope.scaling.type rope.scaling.factor rope.scale_linear attention.sliding_window attention.key_length "
        keys = r.choice((keys + "expert_count vocab_size rope.scaling.original_context_length").split())
        extra = ["tokenizer.ggml.pre", "split.count", "tokenizer.ggml.unknown_token_id", "general.alignment"]
        extra += ["tokenizer.ggml.add_space_prefix", "tokenizer.ggml.eot_token_id", f"llama.{keys}", f"llama.{keys}"]
        key = r.choice(extra)
        meta[key] = number_of_type(r, 4)
        what = f"{key} = {meta[key]!r}"
    elif choice < 0.36:
        del meta[key]
        what = f"without {key}"
    elif choice < 0.5 and (arrays := [k for k in meta if meta[k][0] == ARRAY]):
        key = r.choice(arrays)
        inner, values = meta[key][1]
        at = r.randrange(len(values))
        edits = {
            "shorter": values[:-1],
            "longer": values + values[-1:],
            "empty": [],
            "repeated": values[:at] + values[:1] + values[at + 1 :],
            "odd item": [*values[:at], "" if inner == STRING else r.choice([-1, 99, 4, 3]), *values[at + 1 :]],
            "bytes": [*values[:at], b"\xff\xfe" if inner == STRING else 5, *values[at + 1 :]],
        }
        edit = r.choice(list(edits))
        meta[key], what = (ARRAY, (inner, edits[edit])), f"{key} {edit}"
    elif choice < 0.7:
        tensor = tensors[name][0]
        kinds = {
            "float64": (tensor.double(), 28),
            "float16": (tensor.half(), 1),
            "type that is wrong": (tensor, r.choice([1, 2, 8, 12, 30, 28, 24, 99, 4])),
            "integers": (tensor.to(torch.int8), 24),
            "NaN": (tensor * math.nan, 0),
            "a dimension of 0": (tensor, 0, (0, *tensor.shape[1:])),
            "huge": (tensor, 0, (2 ** r.choice([32, 40, 62, 63]), *tensor.shape[1:])),
            "swapped": (tensor, 0, tuple(tensor.shape[::-1])),
            "4 dimensions": (tensor, 0, (1, 1, 1, tensor.numel())),
            "missing": None,
        }
        edit = r.choice(list(kinds))
        tensors[name], what = kinds[edit], f"{name}: {edit}"
        if tensors[name] is None:
            del tensors[name]
    elif choice < 0.8:
        version, shift = r.choice([0, 1, 2, 4, 2**24 * 3]), r.choice([1, 16, 32, 32, 4096])
        counts = r.choice([0, 1, 10**9, 2**62]), r.choice([3, 10**9])
        options = r.choice([{"version": version}, {"shift": shift}, {"counts": counts}])
        what = str(options)
    path.write_bytes(write_gguf(meta, tensors, **options))
    if not what:
        what = replace_file(r, path) if r.random() < 0.2 else ""
    if not what:
        data, what = mutate_bytes(r, path.read_bytes())
        path.write_bytes(data)
    convert = ["convert_hf_checkpoint.py", "--gguf", str(path), "--output_dir", str(work / "out")]
    wrong = r"trailing bytes|'shift'|: NaN|: integers|: missing|huge|a dimension of 0"
    bad = re.search(wrong + r"|(tokens|scores|token_type) (shorter|longer)", what)
    return Case(f"{kind}.gguf: {what}", [convert, generate(work / "out")], refuse=bad is not None)


def generate(folder: Path, *more: str) -> list[str]:
    flags = ["--num_samples", "1", "--max_new_tokens", "4", "--json", *more]
    return ["generate.py", "--checkpoint_path", str(folder), *flags]


def some_options(r: random.Random, rule: str | None = None) -> list[str]:
    """Options of generate.py that lead through other code."""
    options = ["--precision", r.choice(["float32", "float32", "bfloat16", "float16"])]
    options += r.choice([["--compile"], ["--compile"], ["--batch_size", "2"], [], []])  # both: torch.compile, slow
    if rule or r.random() < 0.3:
        options += ["--sparsity", "0.5", "--thresholds", rule or "uniform"]
    return options


def room_config(r: random.Random, work: Path, bases: Path) -> Case:
    base = r.choice([*CONFIGS, "int8", "int4"])
    folder = shutil.copytree(bases / base, work / base)
    what = mutate_file(r, folder / "config.json", OTHER_KEYS)
    return Case(f"{base}/{what}", [generate(folder, *some_options(r))], refuse=bad_config(folder / "config.json"))


def bad_config(path: Path) -> bool:
    """Whether a number or a switch of a config.json is of another type or outside of any sense."""
    numbers = "hidden_size intermediate_size num_hidden_layers num_attention_heads vocab_size max_position_embeddings"
    try:
        config = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError):
        return True
    if not isinstance(config, dict):
        return True
    for key in (*numbers.split(), "rms_norm_eps", "rope_theta", "head_dim", "num_key_value_heads"):
        value = config.get(key)
        most = math.inf if key in ("max_position_embeddings", "rope_theta") else 1e9
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < most
        ):
            if not (key in ("head_dim", "num_key_value_heads") and value == 0):
                return True
    return any(config.get(key) not in (None, True, False) for key in ("tie_word_embeddings", "use_sliding_window"))


REFUSED_TENSORS = (  # kinds of `mutate_tensors` that no reader may take
    "as int64|as int8|as bool|as complex|is missing|a row more|a row less|no rows"
)
NOT_FINITE = "|all NaN|all infinite|one value not finite"  # nor any reader of thresholds; weights show in the logits


def bad_tensor(what: str, tensors: str = REFUSED_TENSORS) -> bool:
    return re.search(tensors, what) is not None and "header: " not in what and ".json: " not in what


def room_weights(r: random.Random, work: Path, bases: Path) -> Case:
    base = r.choice(["llama", "sharded", "sharded", "qwen2", "tied", "int8", "int4"])
    folder = shutil.copytree(bases / base, work / base)
    what = mutate_file(r, r.choice([p for p in folder.glob("model*")]))
    bad = bad_tensor(what) and not ("int8" in base and "int8" in what)
    if base in ("int8", "int4"):
        bad |= re.search(r"w\w+\.(weight|scale) (as float|as int8)", what) is not None and what[-4:] != base
    return Case(f"{base}/{what}", [generate(folder, *some_options(r))], refuse=bad)


def room_folders(r: random.Random, work: Path, bases: Path) -> Case:
    base = r.choice(["hf", "hf-sharded", "hf-bin"])
    folder = shutil.copytree(bases / base, work / base)
    if base == "hf-bin" and r.random() < 0.5:
        tensors: Any = torch.load(folder / "pytorch_model.bin", weights_only=True)
        what = mutate_tensors(r, tensors, r.choice(sorted(tensors)))
        odd = [[1], 3, {"model": tensors}, tensors | {"step": 3}, tensors | {"odd": {"a": [1]}}, Path("x"), None]
        if r.random() < 0.3:
            tensors, what = r.choice(odd), "holds something else"
        old = r.random() < 0.3
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not old)
    else:
        what = mutate_file(r, r.choice(sorted(p for p in folder.iterdir() if p.name != "tokenizer.json")), OTHER_KEYS)
    convert = ["convert_hf_checkpoint.py", "--checkpoint_dir", str(folder), "--output_dir", str(work / "out")]
    return Case(f"{base}/{what}", [convert, generate(work / "out")])


def room_tokenizer(r: random.Random, work: Path, bases: Path) -> Case:
    base = r.choice(["llama", "llama", "sentencepiece", "tiktoken"])
    folder = shutil.copytree(bases / base, work / base)
    names = [*JSON_FILES, "tokenizer.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"]
    what = mutate_file(r, folder / r.choice([n for n in names if (folder / n).is_file()]))
    if r.random() < 0.5:
        return Case(f"{base}/{what}", [generate(folder, *some_options(r))])
    return Case(f"{base}/{what}", [generate(folder, "--interactive")], stdin=b"Hello\nand more\n")


def room_templates(r: random.Random, work: Path, bases: Path) -> Case:
    """Chat templates, which are programs, and the lines and messages that go into them."""
    folder = shutil.copytree(bases / r.choice(["llama", "sentencepiece", "tiktoken"]), work / "chat")
    bad = ["{{ 1 / 0 }}", "{{ x.y.z }}", "{% for i in range(10**9) %}x{% endfor %}", "{{ 'x' * 10**10 }}"]
    bad += ["{{ 9**9**9 }}", "{% if %}", "{{ messages[9] }}", "{{ messages[0]['content'] * 10**7 }}", ""]
    bad += ["{{ raise_exception('no') }}", "{{ ''.__class__.__mro__ }}", "{% include 'x' %}", "{{ strftime_now(3) }}"]
    bad += ["{{ messages | tojson(indent=2) }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ '\\ud800' }}"]
    bad += [TEMPLATE + "\x00", "{{ lipsum(n=10**6) }}", "{{ [1]*10**9 }}", "{{ '%010000000d' % 1 }}"]
    bad += ["{% set ns = namespace(x='x') %}{% for i in range(40) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}"]
    bad += ["{{ range(10**7) | list }}", "{% generation %}x{% endgeneration %}"]
    if r.random() < 0.5:
        template = r.choice(bad)
        (folder / "chat_template.jinja").write_text(template)
        return Case(f"template {template[:60]!r}", [generate(folder)])
    lines = [b"caf\xe9", b"\x00", b"", b"   ", b"a" * 200_000, b"<s></s><|user|>", "日本\u2028語".encode()]
    lines += [b"\xed\xa0\x80", b"\xef\xbf\xbd" * 50, b"\x1b[2J", b"\xf0\x9f\x98\x80" * 100, b"\r", b"{{ 1 / 0 }}"]
    lines += [b"Hello " * 40]
    if r.random() < 0.7:
        stdin = b"\n".join(r.choices(lines, k=3)) + r.choice([b"", b"\n"])
        encoding = r.choice(["utf-8", "utf-8", "ascii", "latin-1", "utf-16"]) + r.choice(
            [":strict", ":surrogateescape"]
        )
        return Case(f"stdin {stdin[:60]!r}, {encoding}", [generate(folder, "--interactive")], None, stdin, encoding)
    messages, what = mutate_tree(r, [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}])
    messages = json.loads(dumps(messages)) if "Raw" not in what else messages

    def call() -> None:
        from tokenizer import load_tokenizer

        load_tokenizer(folder, 300).encode_chat(messages)

    return Case(f"messages: {what}", call=call)


def room_artifacts(r: random.Random, work: Path, bases: Path) -> Case:
    """Statistics and cut tables."""
    base = r.choice([*CONFIGS])
    folder = shutil.copytree(bases / base, work / base)
    rule = r.choice(["uniform", "refined", "greedy", "best"])
    file = folder / f"thresholds_{rule}.safetensors"
    file = file if file.is_file() else folder / "calibration.safetensors"
    if rule == "best":
        file = folder / "thresholds_refined.safetensors"
    what = mutate_file(r, file)
    bad = bad_tensor(what, REFUSED_TENSORS + NOT_FINITE)
    bad &= re.search(r"\d\.\w+\.(threshold|shift) |levels", what) is not None
    return Case(f"{base}/{what}", [generate(folder, *some_options(r, rule))], refuse=bad)


def room_teal(r: random.Random, work: Path, bases: Path) -> Case:
    folder = shutil.copytree(bases / "teal", work / "teal")
    path = r.choice(sorted(folder.glob("*/*/histograms.pt")))
    if r.random() < 0.25:
        what = mutate_file(r, path)
    else:
        histogram: dict = teal_histogram()
        name = r.choice(list(histogram))
        if r.random() < 0.3:
            histogram[name] = value = strange(r, [1.0])
            what = f"{name} = {value!r}"
            if isinstance(value, Raw):
                histogram[name] = value.text
        else:
            what = mutate_tensors(r, histogram, name)
        torch.save(histogram, path)
    out = work / "out.safetensors"
    flags = ["--teal_histograms", str(folder), "--output", str(out)]
    checkpoint = shutil.copytree(bases / "llama", work / "llama")
    use = generate(checkpoint, "--sparsity", "0.5", "--thresholds", "uniform", "--statistics", str(out))
    unordered = NOT_FINITE + "|h._centers reversed|negative|h._centers zeros"
    bad = bad_tensor(what, REFUSED_TENSORS.replace("as int64|as int8|as bool|", "") + unordered)
    return Case(f"histograms: {what}", [["calibrate.py", *flags], use], refuse=bad)


def room_text(r: random.Random, work: Path, bases: Path) -> Case:
    source = r.choice(sorted((bases / "texts").iterdir()))
    suffix = source.suffix if r.random() < 0.7 else r.choice([".raw", ".TXT", ".json", ".gz", "", ".txt", ".jsonl"])
    path = work / f"data{suffix}"
    shutil.copyfile(source, path)
    if r.random() < 0.1:
        what = replace_file(r, path)
    elif source.suffix == ".jsonl" and r.random() < 0.6:
        lines = source.read_text().splitlines()
        tree, what = mutate_tree(r, json.loads(lines[0]), ["text", "prefix", "gold_completion"])
        lines[0] = dumps(tree) if r.random() < 0.8 else r.choice(["3", "null", '"x"', "[]", "{", "[" * 10**5, "NaN"])
        path.write_text("\n".join(lines), "utf-8", "surrogatepass")
    else:
        data, what = mutate_bytes(r, source.read_bytes())
        path.write_bytes(data)
    out, common = str(work / "out.safetensors"), ["--checkpoint_path", str(bases / "llama"), "--precision", "float32"]
    common += ["--data", str(path)]
    sizes = ["--context", "32", "--window", "16", "--num_windows", "2"]
    scripts = [["calibrate.py", *common, "--num_tokens", "320", "--output", out]]
    scripts += [["eval.py", *common, *sizes, "--tasks", task] for task in ("perplexity", "wikitext")]
    scripts += [["refine.py", *common, "--num_tokens", "320", "--updates", "0", "--output", out]]
    return Case(f"{source.name} as {path.name}: {what}", [r.choice(scripts)])


LONG_BY_RIGHT = {"num_samples", "updates", "num_tokens"}  # a large number of them is asked for and takes its time
NOT_FUZZED = {"unfused", "compile_prefill", "repo_id", "help"}  # torch.compile takes minutes; the network


def room_flags(r: random.Random, work: Path, bases: Path) -> Case:
    name = r.choice("generate calibrate greedy refine quantize eval convert_hf_checkpoint".split())
    folder = shutil.copytree(bases / "llama", work / "llama")
    out = str(work / "out.safetensors")
    base = {"checkpoint_path": str(folder), "precision": "float32"}
    if name in ("calibrate", "greedy", "refine"):
        base |= {"output": out, "num_tokens": "256", "data": str(bases / "texts/a.txt")}
    base |= {
        "generate": {"num_samples": "1", "max_new_tokens": "4"},
        "refine": {"updates": "1"},
        "quantize": {"mode": "int8", "num_tokens": "0", "output_dir": str(work / "quantized")},
        "eval": {"data": str(bases / "texts/a.txt"), "context": "32", "window": "16", "num_windows": "2"},
    }.get(name, {})
    if name == "convert_hf_checkpoint":
        base = {"checkpoint_dir": str(bases / "hf"), "output_dir": str(work / "out")}

    declared = "".join((ROOT / file).read_text() for file in (f"{name}.py", "cli.py"))
    known = sorted(set(re.findall(r'"--(\w+)"', declared)) - NOT_FUZZED)
    values = ["-1", "0", "1", "2", "0.5", "1.5", "-0.5", "nan", "inf", "-inf", "1e-39", "1e30", "10000000", "9" * 30]
    values += ["", " ", "true", "None", "\u0663", "\u00b2", "Zz" * 3000, "a\x01b", "\udcff", "0x10", "1_0", "+1"]
    values += ["1e400", "/dev/null", "/dev/zero", "/nonexistent/x", "/proc/x", str(work), str(folder)]
    values += [str(folder / "config.json"), "cuda", "cpu:1", "meta", "mps", "bfloat16", "int4", "uniform", "best"]
    values += ["wikitext", "c4", "llama-3.2-1b"]
    flags = dict(base)
    for flag in r.sample(known, r.choice([1, 1, 2, 3])):
        value = r.choice(values)
        if flag in LONG_BY_RIGHT and value in ("10000000", "9" * 30):
            value = "-10000000"
        if flag == "random_init" and value == "llama-3.2-1b":  # gigabytes, which it says
            value = "llama-3"
        flags[flag] = value
    if flags.get("checkpoint_path") in ("", None) and name != "convert_hf_checkpoint":
        flags["checkpoint_path"] = "."
    switches = {flag for flag in known if re.search(rf'"--{flag}",\s[^)]*(store_true|BooleanOptional)', declared)}
    words = [w for flag, value in flags.items() for w in ([f"--{flag}"] if flag in switches else [f"--{flag}", value])]
    return Case(f"{name}.py {' '.join(words)}"[-400:], [[f"{name}.py", *words]], stdin=b"Hello\n")


def room_disk(r: random.Random, work: Path, bases: Path) -> Case:
    """Outputs where nothing can be written, or not enough."""
    folder, file = shutil.copytree(bases / "llama", work / "llama"), work / "out.safetensors"
    (folder / "calibration.safetensors").unlink()
    common = ["--checkpoint_path", str(folder), "--precision", "float32"]
    text = ["--data", str(bases / "texts/a.txt"), "--num_tokens", "256"]
    rounding = ["--mode", r.choice(["int8", "int4"]), "--groupsize", "16", "--num_tokens", "0"]
    commands = [
        ["calibrate.py", *common, *text, "--output"],
        ["refine.py", *common, *text, "--updates", "0", "--output"],
        ["quantize.py", *common, *rounding, "--output_dir"],
        ["convert_hf_checkpoint.py", "--checkpoint_dir", str(bases / "hf-sharded"), "--output_dir"],
        ["convert_hf_checkpoint.py", "--gguf", str(bases / "gpt2.gguf"), "--output_dir"],
        [*generate(folder), "--profile"],
        [*generate(folder), "--sparsity", "0.5", "--thresholds"],
    ]
    command = r.choice(commands)
    file = "uniform" if command[-1] == "--thresholds" else str(file)
    size = r.choice([0, 2000, 20_000, 100_000])
    if not size:
        odd = ["/dev/full", "/dev/null", "/proc/x", str(folder), str(folder / "config.json"), str(work / "no/no/x"), ""]
        file = r.choice(odd)
    if size and r.random() < 0.2:
        (work / "out.safetensors").mkdir()
    return Case(f"{command[0]} {command[-1]} {file}, {size or 'unlimited'} bytes", [[*command, file]], file_size=size)


def room_harness(r: random.Random, work: Path, bases: Path) -> Case:
    """Requests of lm-eval's tasks; not in the default rooms, since lm-eval takes seconds to import."""
    names = ["until", "max_gen_toks", "max_new_tokens", "max_tokens", "temperature", "do_sample", "top_p", "num_beams"]
    options: dict = {"until": ["zz"], "max_gen_toks": 3}
    for name in r.sample(names, 2):
        options[name] = strange(r, options.get(name))
        options[name] = 10**30 if isinstance(options[name], Raw) else options[name]

    def call() -> None:
        from lm_eval.api.instance import Instance

        import harness
        from tokenizer import load_tokenizer

        model = Transformer.from_checkpoint(bases / "llama", "cpu", torch.float32)
        runner = harness.HarnessModel(model, load_tokenizer(bases / "llama", 300), None, 1)
        request = Instance("generate_until", {}, ("Hello", options), 0)
        assert all(isinstance(text, str) for text in runner.generate_until([request], disable_tqdm=True))

    return Case(f"request {options!r}"[:300], call=call)


ROOMS = {name.removeprefix("room_"): make for name, make in list(globals().items()) if name.startswith("room_")}
DEFAULT_ROOMS = [name for name in ROOMS if name != "harness"]

# ---------------------------------------------------------------- running


def script(name: str, flags: list) -> None:
    """Runs a script as its command line would."""
    sys.argv = [name, *map(str, flags)]
    runpy.run_path(str(ROOT / name), run_name="__main__")


def location(trace: traceback.StackSummary) -> str:
    """The innermost function of ours in a stack."""
    ours = [f for f in trace if str(ROOT) in f.filename and "/tests/" not in f.filename and "venv" not in f.filename]
    if not ours:
        return "?"
    return f"{Path(ours[-1].filename).relative_to(ROOT)}:{ours[-1].name}:{ours[-1].lineno}"


def judge_message(message: str, room: str) -> str | None:
    """What is wrong with an error's message."""
    text = message.split(": ", 1)[-1].strip()
    if not text:
        return f"an empty message ({message!r})"
    if "\n" in message.strip():
        return f"several lines: {message[:300]!r}"
    if len(message) > MESSAGE:
        return f"{len(message)} characters: {message[:160]!r}"
    if match := re.search(rf"(Zz){{{ECHO // 2 + 1},}}|\b(\d(, )?){{{ECHO},}}", message):
        return f"echoes a value at length ({len(match[0])}): {message[:160]!r}"
    if room not in ("flags", "templates") and re.search(r"allocate|not enough memory|MemoryError|bad_alloc", message):
        return f"memory: {message[:200]}"
    return None


class Watch:
    """Looks at every output and threshold of a model that runs."""

    def __init__(self):
        self.seen: set[str] = set()
        torch.nn.modules.module.register_module_forward_hook(self)

    def __call__(self, module: torch.nn.Module, args: tuple, output: Any) -> None:
        if not isinstance(module, Transformer):
            return
        if isinstance(output, torch.Tensor) and not output.isfinite().all():
            self.seen.add("logits that are not finite")
        for site in module.sites if isinstance(module, SparseTransformer) else ():
            values = [site.threshold, *(t for t in (site.shift, site.offset) if t is not None)]
            if not all(v.isfinite().all() for v in values) or (site.threshold < 0).any():
                self.seen.add("cuts that are not finite or negative")


def judge_result(watch: Watch, output: str, work: Path) -> str | None:
    """What is wrong with a run that ended with status 0."""
    if watch.seen:
        return f"{' and '.join(sorted(watch.seen))}, status 0"
    if match := re.search(r"(?i)(?<![\w.])[-+]?(nan|infinity|inf)\b(?!\w)", output.split("\nModel ")[-1]):
        return f"{match[0]} in the output, status 0"
    for file in filter(Path.is_file, work.glob("out*.safetensors")):
        for name, tensor in load_file(file).items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                return f"{name} in the written file is not finite"
    return None


def run_case(room: str, seed: int, index: int, bases: Path, work: Path) -> dict:
    """Prepares and runs one mutation in this process; returns what, fault (None: none), place, message."""
    r = random.Random(f"{seed}.{index}")
    case = ROOMS[room](r, work, bases)
    result: dict = {"what": case.what, "fault": None, "place": "", "message": "", "status": 0}
    (work / "case.txt").write_text(f"{case.what}\n{case.commands}\n", "utf-8", "backslashreplace")
    os.chdir(work)
    (work / "stdin").write_bytes(case.stdin)
    encoding, errors = case.encoding.split(":")
    for command in case.commands or [None]:
        watch = Watch()
        out = io.TextIOWrapper(open(work / "stdout", "wb"), encoding, errors)
        err = open(work / "stderr", "w", encoding="utf-8", errors="backslashreplace")
        sys.stdin = io.TextIOWrapper(open(work / "stdin", "rb"), encoding, errors)
        status, message = 0, ""
        if case.file_size:
            resource.setrlimit(resource.RLIMIT_FSIZE, (case.file_size, resource.RLIM_INFINITY))
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                case.call() if command is None else script(command[0], command[1:])
        except SystemExit as end:
            status = 0 if end.code in (None, 0) else end.code if isinstance(end.code, int) else 1
            message = end.code if isinstance(end.code, str) else ""
        except BaseException as error:
            status, message = 1, str(error)
            if command is not None or not isinstance(error, ValueError):
                result |= {"fault": f"{type(error).__name__}: {message[:200]}"}
                result |= {"place": location(traceback.extract_tb(error.__traceback__))}
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        err.flush()
        with contextlib.suppress(UnicodeError):
            out.flush()
        written = (work / "stderr").read_text("utf-8", "replace")
        if status == 2 and not message:  # argparse
            message = written.strip().splitlines()[-1]
        result |= {"message": message[:1000], "status": status}
        if result["fault"] is None and status:
            result["fault"] = judge_message(message, room)
        elif result["fault"] is None:
            result["fault"] = judge_result(watch, (work / "stdout").read_text("utf-8", "replace"), work)
        if result["fault"] is None and "Traceback (most" in written:
            result["fault"] = f"a traceback on stderr: {written.strip().splitlines()[-1][:200]}"
        if status or result["fault"]:
            break
    if case.refuse and not status and not result["fault"]:
        result["fault"] = f"accepted: {case.what[:150]}"
    return result


def in_child(room: str, seed: int, index: int, bases: Path, work: Path, seconds: float) -> dict:
    """Runs one mutation in a forked process under the limits."""
    work.mkdir()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setsid()
            stack = open(work / "stack", "w")
            faulthandler.enable(stack, all_threads=False)
            faulthandler.register(signal.SIGUSR1, stack, all_threads=False)
            resource.setrlimit(resource.RLIMIT_AS, (16 * MEMORY,) * 2)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            result = run_case(room, seed, index, bases, work)
            (work / "result.json").write_text(json.dumps(result))
            code = 0
        except BaseException:
            (work / "engine").write_text(traceback.format_exc(), "utf-8", "backslashreplace")
        finally:
            os._exit(code)

    # wait, and watch its time and memory
    start, killed, peak = time.monotonic(), "", 0
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        time.sleep(0.003 if time.monotonic() - start < 1 else 0.03)
        with contextlib.suppress(OSError, IndexError):
            peak = max(peak, int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096)
        killed = f"over {seconds:g} s" if time.monotonic() - start > seconds else killed
        killed = f"over {MEMORY / 1e9:g} GB" if peak > MEMORY else killed
        if killed:
            os.kill(pid, signal.SIGUSR1)
            time.sleep(0.2)
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            break

    result: dict = {"what": "?", "fault": None, "place": "", "message": "", "status": -1}
    if (work / "case.txt").is_file():
        result["what"] = (work / "case.txt").read_text("utf-8", "replace").splitlines()[0][:600]
    if (work / "engine").is_file():
        result["fault"] = f"the fuzzer itself failed: {(work / 'engine').read_text()}"
    elif (work / "result.json").is_file() and not killed:
        result |= json.loads((work / "result.json").read_text())
    else:
        stack = (work / "stack").read_text() if (work / "stack").is_file() else ""
        frames = re.findall(r'File "([^"]+)", line (\d+) in (\S+)', stack)
        ours = [(f, name, line) for f, line, name in frames if str(ROOT) in f and "/tests/" not in f]
        place = f"{Path(ours[0][0]).relative_to(ROOT)}:{ours[0][1]}:{ours[0][2]}" if ours else "?"
        result |= {"fault": killed or f"a crash: {stack.splitlines()[0] if stack else 'killed'}", "place": place}
    return result | {"room": room, "seed": seed, "index": index, "seconds": round(time.monotonic() - start, 2)}


def run_all(indices: Sequence[int], rooms: list[str], o: argparse.Namespace, folder: Path, log: IO[str]) -> None:
    """Runs mutations one after another, each forked; writes their results as lines of JSON."""
    for index in indices:
        room, work = random.Random(f"{o.seed}/{index}").choice(rooms), folder / f"w{index}"
        result = in_child(room, o.seed, index, folder / "bases", work, o.seconds)
        print(json.dumps(result), file=log, flush=True)
        if not o.keep:
            shutil.rmtree(work, ignore_errors=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300, help="mutations (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all of them (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="index of the first (default: %(default)s)")
    parser.add_argument("--index", type=int, help="only this one")
    parser.add_argument("--rooms", default=",".join(DEFAULT_ROOMS), help="kinds of input (default: all but harness)")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="limit of one (default: %(default)s)")
    parser.add_argument("--keep", type=Path, help="leave the files of --index in this folder")
    parser.add_argument("--log", type=Path, help="write every result to this file, as lines of JSON")
    o = parser.parse_args(argv)
    rooms, indices = o.rooms.split(","), range(o.first, o.first + o.count) if o.index is None else [o.index]

    torch.set_num_threads(1)
    folder = o.keep or Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            make_bases(folder / "bases")
            warm_up(folder / "bases")

        # deal the mutations out to processes, each of which forks one per mutation
        logs = [folder / f"log{job}" for job in range(o.jobs)]
        children = []
        for job, log in enumerate(logs):
            children.append(os.fork())
            if children[-1] == 0:
                with log.open("w") as file, contextlib.suppress(BaseException):
                    run_all(indices[job :: o.jobs], rooms, o, folder, file)
                os._exit(0)
        for pid in children:
            os.waitpid(pid, 0)
        results = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
    finally:
        if not o.keep:
            shutil.rmtree(folder, ignore_errors=True)

    if o.log:
        o.log.write_text("".join(json.dumps(result) + "\n" for result in results))
    assert len(results) == len(indices), "a process of the fuzzer ended early"
    return summary(results, o)


def summary(results: list[dict], o: argparse.Namespace) -> int:
    """Prints each kind of fault once, with a command that repeats it; returns 1 if there is any."""
    faults: dict[tuple, list[dict]] = {}
    for result in results:
        if result["fault"]:
            words = result["fault"].rsplit("." if result["fault"].startswith("accepted") else ": ", 1)[-1]
            kind = result["place"] or re.sub(r"/tmp\S*|\W+|\d+", " ", words)[:60].strip()
            faults.setdefault((result["room"], kind, result["fault"].split(":")[0]), []).append(result)
    rooms = "" if o.rooms == ",".join(DEFAULT_ROOMS) else f" --rooms {o.rooms}"
    for (room, kind, _), found in sorted(faults.items(), key=lambda item: (item[0][0], -len(item[1]))):
        first = found[0]
        print(f"\n{room}: {first['fault'][:300]}\n    at {kind}, {len(found)} times; for example {first['what'][:200]}")
        print(f"    python tests/fuzz.py --seed {first['seed']} --index {first['index']}{rooms} --keep DIR")
    ends = Counter("fault" if r["fault"] else "result" if r["status"] == 0 else "refused" for r in results)
    slowest = max((r["seconds"] for r in results if not r["fault"]), default=0)
    print(f"\n{len(results)} mutations: {dict(ends)}, {len(faults)} kinds of fault; slowest without one {slowest} s")
    if o.index is not None and not faults:
        print(results[0])
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
