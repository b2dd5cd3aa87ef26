"""A GGUF file seen as a Hugging Face folder: config.json, tensors and tokenizer, read from its metadata and tensors."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from formats.checkpoint import DTYPES, Shapes, Source, rename_tensors, write_weights
from formats.config import architecture_of, config_fields
from formats.files import one_line, write_json
from tokenizer import LLAMA3_SPLIT

GGUF_NAMES = {"token_embd": "tok_embeddings", "output_norm": "norm", "output": "output"}  # theirs -> ours
GGUF_NAMES |= {"attn_norm": "attention_norm", "ffn_norm": "ffn_norm", "attn_output": "attention.wo"}
GGUF_NAMES |= {f"attn_{letter}": f"attention.w{letter}" for letter in "qkv"}
GGUF_NAMES |= {"ffn_gate": "feed_forward.w1", "ffn_up": "feed_forward.w3", "ffn_down": "feed_forward.w2"}
GGUF_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
LLAMA3_PRE = ("llama-bpe", "llama3", "llama-v3")
# tokenizer.ggml.pre -> the regex before byte-level BPE, None for GPT-2's; qwen2 splits digits one by one
GGUF_PRE = dict.fromkeys(("default", "gpt-2", "smollm")) | dict.fromkeys(LLAMA3_PRE, LLAMA3_SPLIT)
GGUF_PRE["qwen2"] = LLAMA3_SPLIT.replace("{1,3}", "")
CONTROL, USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type, which are sentencepiece's own numbers


def convert_gguf(
    source: Path,
    partial: Path,
    architectures: Collection[str] = ("LlamaForCausalLM",),
    expected_shapes: Callable[[dict], Shapes] | None = None,
) -> None:
    """Writes the checkpoint of a GGUF file to `partial`; see `formats.checkpoint.convert`.

    `expected_shapes` gives names and shapes of the tensors that the model of a config.json has; None is for a file that
    is known to be whole. Raises ValueError for a damaged file, an architecture that is not among `architectures`, an
    unknown tensor type or tokenizer, tensors that do not fit.
    """
    metadata, sources = read_gguf(source)
    config = gguf_config(metadata, sources, architectures)
    sources.pop("rope_freqs.weight", None)
    half_split = metadata["general.architecture"] != "llama"  # llama's q and k are interleaved already
    expected = expected_shapes and expected_shapes(config)
    tensors = rename_tensors(sources, GGUF_NAMES, expected, config_fields(config)["head_dim"], half_split)
    write_gguf_tokenizer(metadata, partial)
    write_json(partial / "config.json", config)
    write_weights(partial, tensors)


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

    # metadata
    try:
        reader = Reader(path)
        metadata = Metadata({key: field.contents() for key, field in reader.fields.items()})
    except (ValueError, KeyError, IndexError, OverflowError, TypeError) as error:
        raise ValueError(f"{path} is truncated or not a GGUF file: {error}") from None
    if metadata.get("split.count", 1) > 1:
        raise ValueError(f"{path} is one of {metadata['split.count']} parts; join them: llama-gguf-split --merge")

    # tensors, of which none is read yet
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


def gguf_config(meta: Metadata, sources: dict[str, Source], architectures: Collection[str]) -> dict[str, Any]:
    """A config.json in Hugging Face's form. Raises ValueError for what is missing or not supported."""
    family = meta["general.architecture"]
    if architecture_of(family) not in architectures:
        raise ValueError(f"unknown GGUF architecture {family!r}; supported: {', '.join(architectures)}")
    if "token_embd.weight" not in sources:
        raise ValueError("the GGUF file has no tensor token_embd.weight")

    def get(key: str, default: Any = None) -> Any:
        value = meta[f"{family}.{key}"] if default is None else meta.get(f"{family}.{key}", default)
        if isinstance(value, list):
            raise ValueError(f"{family}.{key} differs from layer to layer ({value[:4]}...), which is not supported")
        return value

    # what follows from other values
    heads, dim = get("attention.head_count"), get("embedding_length")
    head_dim = get("attention.key_length", dim // heads)
    if (rotated := get("rope.dimension_count", head_dim)) != head_dim:
        raise ValueError(f"rotary embedding of {rotated} of a head's {head_dim} dimensions is not supported")
    ends = {meta[f"tokenizer.ggml.{k}_token_id"] for k in ("eos", "eot") if f"tokenizer.ggml.{k}_token_id" in meta}

    epsilon = float(str(np.float32(get("attention.layer_norm_rms_epsilon"))))  # 1e-05, not 9.99999974e-06
    config = {"architectures": [architecture_of(family)], "model_type": family, "hidden_size": dim}
    config |= {"intermediate_size": get("feed_forward_length"), "num_hidden_layers": get("block_count")}
    config |= {"num_attention_heads": heads, "num_key_value_heads": get("attention.head_count_kv", heads)}
    config |= {"head_dim": head_dim, "vocab_size": sources["token_embd.weight"].shape[0]}
    config |= {"max_position_embeddings": get("context_length"), "rms_norm_eps": epsilon}
    config |= {"rope_theta": get("rope.freq_base", 10000.0), "hidden_act": "silu"}
    config |= {"tie_word_embeddings": "output.weight" not in sources}
    config |= {"bos_token_id": meta.get("tokenizer.ggml.bos_token_id")}
    config |= {"eos_token_id": sorted(ends) if len(ends) > 1 else next(iter(ends), None)}

    # a window makes a Llama a Mistral; scaling factors of the rotary frequencies come as a tensor
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

    # bos, eos and the chat template
    special = {name: meta.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    config = {f"{name}_token": tokens[i] for name, i in special.items() if i is not None and i < len(tokens)}
    adds_bos = kind == "llama" or meta.get("tokenizer.ggml.pre") in LLAMA3_PRE
    config["add_bos_token"] = meta.get("tokenizer.ggml.add_bos_token", adds_bos)
    if "tokenizer.chat_template" in meta:
        config["chat_template"] = meta["tokenizer.chat_template"]
    write_json(folder / "tokenizer_config.json", config)


def _byte_level_tokenizer(tokens: list[str], types: list[int], merges: list[str], pre: str):
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    # the vocabulary and its merges
    if pre not in GGUF_PRE:
        raise ValueError(f"unknown tokenizer.ggml.pre {pre!r}; known: {', '.join(sorted(GGUF_PRE))}")
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    vocab = {token: i for i, token in enumerate(tokens)}
    try:
        tokenizer = Tokenizer(models.BPE(vocab, pairs, ignore_merges=pre in LLAMA3_PRE))
    except Exception as error:  # tokenizers raises nothing more precise
        raise ValueError(f"the GGUF file's merges do not fit its tokens: {one_line(error)}") from None

    # how a text is split before the merges, and what undoes it
    regex = GGUF_PRE[pre]
    steps = [pre_tokenizers.Split(Regex(regex), "isolated")] if regex else []
    if pre == "smollm":
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()

    # tokens that are found in a text as they stand
    added = [(token, kind) for token, kind in zip(tokens, types, strict=True) if kind in (CONTROL, USER_DEFINED)]
    tokenizer.add_tokens([AddedToken(token, special=kind == CONTROL, normalized=False) for token, kind in added])
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

    # pieces: token, score, type
    scores = meta["tokenizer.ggml.scores"]
    pieces = b"".join(
        field(1, field(1, token) + field(2, float(score)) + field(3, kind))
        for token, score, kind in zip(tokens, scores, types, strict=True)
    )

    # trainer_spec: BPE, vocabulary size, bytes for the unknown, then id and piece of the special tokens
    trainer = field(3, 2) + field(4, len(tokens)) + field(35, True)
    for name, id_field, piece_field, default in (("unknown", 40, 45, 0), ("bos", 41, 46, 1), ("eos", 42, 47, 2)):
        i = meta.get(f"tokenizer.ggml.{name}_token_id", default)
        trainer += field(id_field, i) + field(piece_field, tokens[i])

    # normalizer_spec
    normalizer = field(1, "identity") + field(5, True)  # spaces become U+2581
    normalizer += field(3, meta.get("tokenizer.ggml.add_space_prefix", True))
    normalizer += field(4, meta.get("tokenizer.ggml.remove_extra_whitespaces", False))
    return pieces + field(2, trainer) + field(3, normalizer)
