"""A GGUF file seen as a Hugging Face folder: config.json, tensors and tokenizer, read from its metadata and tensors."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from formats.checkpoint import DTYPES, Source, check_layers, rename_tensors, write_weights
from formats.config import MOST, architecture_of, checked, config_fields, known_architecture
from formats.files import one_line, regular_file, shown, write_json
from tokenizer import LLAMA3_SPLIT, load_tokenizer

GGUF_NAMES = {"token_embd": "tok_embeddings", "output_norm": "norm", "output": "output"}  # theirs -> ours
GGUF_NAMES |= {"attn_norm": "attention_norm", "ffn_norm": "ffn_norm", "attn_output": "attention.wo"}
GGUF_NAMES |= {f"attn_{letter}": f"attention.w{letter}" for letter in "qkv"}
GGUF_NAMES |= {"ffn_gate": "feed_forward.w1", "ffn_up": "feed_forward.w3", "ffn_down": "feed_forward.w2"}
GGUF_NAMES |= {"attn_q_norm": "attention.q_norm", "attn_k_norm": "attention.k_norm", "attn_qkv": "attention.wqkv"}
GGUF_NAMES |= {"post_attention_norm": "post_attention_norm", "post_ffw_norm": "post_ffn_norm"}
INTERLEAVED = ("llama", "granite", "smollm3")  # architectures whose rotary pairs of q and k are adjacent already
GRANITE = {"attention.scale": "attention_multiplier", "embedding_scale": "embedding_multiplier"}
GRANITE |= {"residual_scale": "residual_multiplier", "logit_scale": "logits_scaling"}
SOFTCAPS = ("attn_logit_softcapping", "final_logit_softcapping")
# numbers that some architectures have: in the others anything but 0 is an error
NEUTRAL = dict.fromkeys(("attention.clamp_kqv", "attention.max_alibi_bias", *SOFTCAPS, *GRANITE), 0)
ROPE_KINDS = ("none", "linear", "yarn", "longrope")
LAYERS_27B = {"gemma2": 46, "gemma3": 62}  # the size whose attention scale is not head_dim^-0.5, as in llama.cpp
UNQUANTIZED = DTYPES | {"F64": torch.float64}
GGUF_TYPES = (*UNQUANTIZED, "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")

# tokenizer.ggml.pre -> the regexes that split a text, one after the other, before byte-level BPE, as in llama.cpp;
# none: GPT-2's alone. Names that share a row are of models with the same split.
SINGLE_DIGITS = "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2".split()  # then GPT-2's
LLAMA3_PRE = "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2".split()
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
GPT2_PRE = "gpt-2 phi-2 gigachat a.x-4.0 mellum mpt olmo jais trillion granite-docling exaone4".split()
GGUF_PRE: dict[str, tuple[str, ...]] = dict.fromkeys(SINGLE_DIGITS + GPT2_PRE, ())
GGUF_PRE |= dict.fromkeys([*LLAMA3_PRE, *"dbrx smaug-bpe glm4 chatglm-bpe".split()], (LLAMA3_SPLIT,))
QWEN2_PRE = "qwen2 deepseek-r1-qwen kormo megrez stablelm2 hunyuan solar-open grok-2".split()
GGUF_PRE |= dict.fromkeys(QWEN2_PRE, (LLAMA3_SPLIT.replace("{1,3}", ""),))  # digits one by one
_UPPER, _LOWER = (rf"[{case}\p{{Lm}}\p{{Lo}}\p{{M}}]" for case in (r"\p{Lu}\p{Lt}", r"\p{Ll}"))
_WORD = rf"[^\r\n\p{{L}}\p{{N}}]?(?:{_UPPER}*{_LOWER}+|{_UPPER}+{_LOWER}*)(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
GGUF_PRE["gpt-4o"] = (_WORD + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",)
GGUF_PRE["default"] = (r"[\p{P}\$\+<=>\^~\|]+", GPT2_SPLIT, r"\p{N}+", "[0-9][0-9][0-9]")
GGUF_PRE["falcon"] = (r"[\p{P}\$\+<=>\^~\|`]+", GPT2_SPLIT, "[0-9][0-9][0-9]")
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type; sentencepiece's too


def convert_gguf(source: Path, partial: Path, expected_shapes=None) -> None:
    """Writes the checkpoint of a GGUF file to `partial`; see `formats.checkpoint.convert`.

    `expected_shapes` gives those of a config's model by name; None is for a file that is known to be whole. Raises
    ValueError for a damaged file, an unknown architecture, tensor type or tokenizer, tensors that do not fit.
    """
    metadata, sources = read_gguf(source)
    config, family = gguf_config(metadata, sources), metadata["general.architecture"]
    fields = config_fields(config)
    check_layers(sources, fields["n_layer"])
    sources = {name: tensor for name, tensor in sources.items() if not name.startswith("rope_f")}  # of `gguf_config`
    if fields.get("norm") == "rms_plus_one":  # the file holds 1 + weight
        norms = [name for name in sources if name.endswith("norm.weight")]
        sources |= {n: sources[n]._replace(load=lambda t=sources[n]: t.load() - 1) for n in norms}
    names = GGUF_NAMES | ({"ffn_up": "feed_forward.w13"} if family == "phi3" else {})
    rotary_dim = 0 if family in INTERLEAVED else int(fields["head_dim"] * fields["rotary_share"])
    expected = expected_shapes and expected_shapes(config)
    tensors = rename_tensors(sources, names, expected, fields["head_dim"], rotary_dim)
    write_gguf_tokenizer(metadata, partial)
    write_json(partial / "config.json", config)
    try:
        load_tokenizer(partial, config["vocab_size"])
    except ValueError as error:
        raise ValueError(f"the tokenizer in {source} does not load: {one_line(error)}") from None
    write_weights(partial, tensors)


class Metadata(dict):
    def read(self, key: str, kind: Any, *default, least: float = 0, most: float = 2**31 - 1) -> Any:
        return checked(self, key, kind, *default, least=least, most=most, where="the GGUF file")

    def per_token(self, name: str, n_tokens: int, kind: type, *default, **limits) -> list:
        values = self.read(f"tokenizer.ggml.{name}", [kind], *default, **limits)
        if len(values) != n_tokens:
            raise ValueError(f"the GGUF file has {len(values)} tokenizer.ggml.{name} for {n_tokens} tokens")
        return values

    def token_id(self, name: str, n_tokens: int, default: int | None = None) -> int | None:
        """The special token `name`, such as "eos", else `default`: as in llama.cpp also for an id out of range."""
        key = f"tokenizer.ggml.{name}_token_id"
        found = self.read(key, int, default, least=-(2**63), most=2**64)
        if found is None or 0 <= found < n_tokens:
            return found
        warnings.warn(f"{key} is {found}, but there are {n_tokens} tokens: it is ignored", stacklevel=1)
        return default


def read_gguf(path: Path) -> tuple[Metadata, dict[str, Source]]:
    """Metadata and tensors of a GGUF file. Raises ValueError if it is truncated, corrupt or of an unknown type."""
    try:
        import gguf
    except ImportError:
        raise ValueError("reading GGUF files needs the gguf package: pip install gguf") from None

    class Reader(gguf.GGUFReader):
        def _get(self, offset, dtype, count=1, override_order=None):
            # unlike the base class's, with an error at the end of the file, where that one returns short arrays
            dtype = np.dtype(dtype).newbyteorder(override_order or self.byte_order)
            if int(offset) + dtype.itemsize * int(count) > self.data.size:
                raise ValueError("it ends early")
            return np.frombuffer(self.data, dtype, int(count), int(offset))

    # metadata
    regular_file(path, "GGUF file")
    try:
        reader = Reader(path)
        metadata = Metadata({key: field.contents() for key, field in reader.fields.items()})
    except (ValueError, KeyError, IndexError, OverflowError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is truncated or not a GGUF file: {one_line(error)}") from None
    if reader.byte_order == "S":
        swap = "swap its bytes: python -m gguf.scripts.gguf_convert_endian FILE native"
        raise ValueError(f"{path} is a GGUF file of the other byte order (big-endian); {swap}")
    if (parts := metadata.read("split.count", int, 1)) > 1:
        raise ValueError(f"{path} is one of {parts} parts; join them: llama-gguf-split --merge")

    # the tensors' bytes follow each other to the file's end; else something was inserted, lost or appended
    end, unit = int(reader.data_offset), int(reader.alignment)
    for tensor in reader.tensors:
        start, due = int(tensor.data_offset), -(-end // unit) * unit
        if start != due:
            raise ValueError(f"{path} is damaged: tensor {tensor.name} is at byte {start}, not {due}")
        end = start + int(tensor.n_bytes)
    if reader.data.size > -(-end // unit) * unit or reader.data[end:].any():
        raise ValueError(f"{path} is damaged: it has {reader.data.size} bytes, its tensors end at byte {end}")

    # tensors, of which none is read yet
    sources = {}
    for tensor in reader.tensors:
        kind = tensor.tensor_type.name
        if kind not in GGUF_TYPES:
            raise ValueError(f"tensor {tensor.name} is of type {kind}; supported: {', '.join(GGUF_TYPES)}")
        shape, dtype = tuple(int(n) for n in tensor.shape[::-1]), UNQUANTIZED.get(kind, torch.float16)
        sources[tensor.name] = Source(shape, dtype, lambda t=tensor, s=shape, d=dtype: _dequantized(path, t, s, d))
    return metadata, sources


def _dequantized(path: Path, tensor: Any, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    from gguf.quants import dequantize

    raw = np.fromfile(path, np.uint8, tensor.n_bytes, offset=tensor.data_offset)
    if tensor.tensor_type.name in UNQUANTIZED:
        return torch.from_numpy(raw).view(dtype).view(shape)
    rows, out = raw.reshape(shape[0], -1), torch.empty(shape, dtype=dtype)
    for start in range(0, shape[0], 4096):  # bounds the float32 copies
        out[start : start + 4096] = torch.from_numpy(dequantize(rows[start : start + 4096], tensor.tensor_type))
    return out


def gguf_config(meta: Metadata, sources: dict[str, Source]) -> dict[str, Any]:
    """A config.json in Hugging Face's form. Raises ValueError for what is missing or not supported."""
    family = meta.read("general.architecture", str)

    def get(key: str, kind: Any, *default, **limits) -> Any:
        value = meta.get(f"{family}.{key}")
        if isinstance(value, list) and value:  # one value per layer
            if any(item != value[0] for item in value):
                raise ValueError(f"{family}.{key} differs from layer to layer ({shown(value)}), which is not supported")
            value = value[0]
        return Metadata({f"{family}.{key}": value}).read(f"{family}.{key}", kind, *default, **limits)

    config: dict[str, Any] = {"architectures": [architecture_of(family)], "model_type": family}
    known_architecture(config | {"num_experts": get("expert_count", int, 0)})
    if "token_embd.weight" not in sources or not sources["token_embd.weight"].shape:
        raise ValueError("the GGUF file has no tensor token_embd.weight")

    # what follows from other values, and what only has one value here
    heads, dim = get("attention.head_count", int, least=1), get("embedding_length", int, least=1)
    head_dim = get("attention.key_length", int, dim // heads)
    read = {"gemma2": SOFTCAPS, "gemma3": SOFTCAPS, "granite": GRANITE}.get(family, ())
    fixed = {"attention.value_length": head_dim} | {key: value for key, value in NEUTRAL.items() if key not in read}
    fixed |= {} if family == "phi3" else {"rope.scaling.attn_factor": 1}
    fixed |= {} if family in ("phi3", "gptneox") else {"rope.dimension_count": head_dim}
    fixed |= {"attention.sliding_window": 0} if family == "olmo2" else {}  # OLMo 3
    for key, value in (fixed | {"attention.causal": True}).items():
        if (other := get(key, bool if value is True else float, value, least=-MOST, most=MOST)) != value:
            raise ValueError(f"{family}.{key} {other} is not supported in a GGUF file; {value} is")

    # tokens that end a text
    vocab_size, n_tokens = sources["token_embd.weight"].shape[0], len(meta.read("tokenizer.ggml.tokens", [str], []))
    if n_tokens > vocab_size or get("vocab_size", int, n_tokens) not in (n_tokens, vocab_size):
        raise ValueError(f"the GGUF file has {n_tokens} tokens for an embedding of {vocab_size} rows; it is damaged")
    ends = {meta.token_id(name, n_tokens or vocab_size) for name in ("eos", "eot", "eom")} - {None}

    # 1e-05, not 9.99999974e-06
    kind = "" if family == "gptneox" else "rms_"
    epsilon = str(np.float32(get(f"attention.layer_norm_{kind}epsilon", float, most=MOST)))
    config |= {"hidden_size": dim, "intermediate_size": get("feed_forward_length", int)}
    config |= {"num_hidden_layers": get("block_count", int), "num_attention_heads": heads}
    config |= {"num_key_value_heads": get("attention.head_count_kv", int, heads)}
    config |= {"head_dim": head_dim, "vocab_size": vocab_size, "max_position_embeddings": get("context_length", int)}
    config |= {"rms_norm_eps": float(epsilon), "rope_theta": get("rope.freq_base", float, 10000.0, most=MOST)}
    config |= {"hidden_act": "silu", "tie_word_embeddings": "output.weight" not in sources}
    config |= {"bos_token_id": meta.token_id("bos", n_tokens or vocab_size)}
    config |= {"eos_token_id": sorted(ends) if len(ends) > 1 else next(iter(ends), None)}

    # a window makes a Llama a Mistral
    if window := get("attention.sliding_window", int, 0):
        config |= {"sliding_window": window, "use_sliding_window": True, "max_window_layers": 0}
        config |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral"} if family == "llama" else {}
    return config | _own_keys(family, get, config, sources) | _rope_keys(get, config, sources)


def _own_keys(family: str, get: Callable, config: dict, sources: dict[str, Source]) -> dict[str, Any]:
    """What the config.json of one architecture has and that of others has not."""
    found: dict[str, Any] = {}
    head_dim = config["head_dim"]
    if family == "granite":
        found = {theirs: get(key, float, 0, most=MOST) or 1.0 for key, theirs in GRANITE.items()}
        found["attention_multiplier"] = get("attention.scale", float, 0, most=MOST) or head_dim**-0.5
    if family in LAYERS_27B:
        largest = config["num_hidden_layers"] == LAYERS_27B[family]
        scalar = config["hidden_size"] // config["num_attention_heads"] if largest else head_dim
        found = {"query_pre_attn_scalar": scalar, "hidden_activation": "gelu_pytorch_tanh"}
        caps = {key: get(key, float, None, most=MOST) for key in SOFTCAPS}
        found |= {key: cap or None for key, cap in caps.items() if cap is not None}

    if family == "gemma3":
        found |= {"sliding_window": config.get("sliding_window")}  # none, unlike a config.json that lacks the key
        found |= {"sliding_window_pattern": get("attention.sliding_window_pattern", int, 6, least=1)}
        found |= {"rope_local_base_freq": get("rope.freq_base_swa", float, 10000.0, most=MOST)}
    if family == "gptneox":
        parallel = get("use_parallel_residual", bool, True)
        found = {"hidden_act": "gelu", "use_parallel_residual": parallel, "layer_norm_eps": config["rms_norm_eps"]}
    elif family != "qwen2":  # biases are where their tensors are
        biases = {"attention_bias": "attn_q", "mlp_bias": "ffn_up"}
        found |= {key: True for key, module in biases.items() if f"blk.0.{module}.bias" in sources}
    return found


def _rope_keys(get: Callable, config: dict, sources: dict[str, Source]) -> dict[str, Any]:
    """The rotary embedding: its share, and its scaling of four kinds, of which two are tensors."""
    dim, head_dim = get("rope.dimension_count", int, config["head_dim"]), config["head_dim"]
    found = {"partial_rotary_factor": dim / max(1, head_dim)} if dim != head_dim else {}

    # frequencies are divided by a factor (linear if no type is given; also under its older key; 0 is none) and by those
    # of a tensor
    if (scaling := get("rope.scaling.type", str, "linear")) not in ROPE_KINDS:
        raise ValueError(f"rope scaling of type {shown(scaling)} in a GGUF file; supported: {', '.join(ROPE_KINDS)}")
    factor = get("rope.scaling.factor", float, None) if scaling != "none" else 1
    factor = (get("rope.scale_linear", float, 0) if factor is None and scaling == "linear" else factor) or 1
    original = get("rope.scaling.original_context_length", int, config["max_position_embeddings"])
    context = {"original_max_position_embeddings": original}

    def divisors(name: str) -> list[float]:
        if name not in sources:
            raise ValueError(f"the GGUF file has no tensor {name}")
        return sources[name].load().float().flatten().tolist()

    if "rope_factors_long.weight" in sources or scaling == "longrope":
        keys = {f"{kind}_factor": divisors(f"rope_factors_{kind}.weight") for kind in ("long", "short")}
        keys |= {"rope_type": "longrope", "attention_factor": get("rope.scaling.attn_factor", float, 1.0, most=MOST)}
        return found | {"rope_scaling": keys | context} | context  # Phi-3 has it at the top
    if scaling == "yarn":
        found["rope_scaling"] = {"rope_type": "yarn", "factor": factor} | context
    elif "rope_freqs.weight" in sources:
        factors = [each * factor for each in divisors("rope_freqs.weight")]
        found["rope_scaling"] = {"rope_type": "factors", "factors": factors}
    elif factor != 1:
        found["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    return found


def write_gguf_tokenizer(meta: Metadata, folder: Path) -> None:
    kind, pre = meta.read("tokenizer.ggml.model", str), meta.read("tokenizer.ggml.pre", str, "")
    tokens, types = _tokens(meta)
    if kind == "gpt2":
        if not pre:
            warnings.warn("without tokenizer.ggml.pre, texts are split as llama.cpp does by default", stacklevel=2)
        tokenizer = byte_level_tokenizer(tokens, types, meta.read("tokenizer.ggml.merges", [str]), pre or "default")
        (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    elif kind == "llama":
        (folder / "tokenizer.model").write_bytes(_sentencepiece_model(meta, tokens, types))
    else:
        raise ValueError(f"unknown GGUF tokenizer {shown(kind)}; supported: gpt2, llama")

    # bos, eos and the chat template
    special = {name: meta.token_id(name, len(tokens)) for name in ("bos", "eos")}
    config = {f"{name}_token": tokens[i] for name, i in special.items() if i is not None}
    config["add_bos_token"] = meta.read("tokenizer.ggml.add_bos_token", bool, kind == "llama" or pre in LLAMA3_PRE)
    if meta.read("tokenizer.ggml.add_eos_token", bool, False):
        warnings.warn("tokenizer.ggml.add_eos_token is ignored: a prompt is to be continued, not ended", stacklevel=2)
    if template := meta.read("tokenizer.chat_template", str, None):
        config["chat_template"] = template
    write_json(folder / "tokenizer_config.json", config)


def _tokens(meta: Metadata) -> tuple[list[str], list[int]]:
    """Pieces and types of the tokens. As in llama.cpp an empty piece gets a name, a repeated one means its last id."""
    tokens = meta.read("tokenizer.ggml.tokens", [str])
    types = meta.per_token("token_type", len(tokens), int, [NORMAL] * len(tokens), most=BYTE)
    last = {token: i for i, token in enumerate(tokens)}
    if odd := [i for i, token in enumerate(tokens) if not token or last[token] != i]:
        warnings.warn(f"{len(odd)} tokens of the GGUF file are empty or repeated, first {odd[0]}: unused", stacklevel=3)
        tokens, types = list(tokens), list(types)
        for i in odd:
            tokens[i], types[i] = f"[UNUSED_{i}]", UNUSED
    return tokens, types


def byte_level_tokenizer(tokens: list[str], types: list[int], merges: list[str], pre: str):
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    # the vocabulary and its merges
    if pre not in GGUF_PRE:
        raise ValueError(f"unknown tokenizer.ggml.pre {shown(pre)}; known: {', '.join(sorted(GGUF_PRE))}")
    pairs, vocab = [tuple(merge.split(" ", 1)) for merge in merges], {token: i for i, token in enumerate(tokens)}
    try:
        tokenizer = Tokenizer(models.BPE(vocab, pairs, ignore_merges=pre in LLAMA3_PRE))
    except Exception as error:  # tokenizers raises nothing more precise
        raise ValueError(f"the tokenizer's merges do not fit its tokens: {one_line(error)}") from None

    # how a text is split before the merges, and what undoes it
    steps = [pre_tokenizers.Split(Regex(regex), "isolated") for regex in GGUF_PRE[pre]]
    steps += [pre_tokenizers.Digits(individual_digits=True)] if pre in SINGLE_DIGITS else []
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not GGUF_PRE[pre]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    if pre in ("qwen2", "deepseek-r1-qwen"):
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

    # special tokens: ids that are not given are sentencepiece's own; one token has to be the unknown
    special = {name: meta.token_id(name, len(tokens), i) for i, name in enumerate(("unknown", "bos", "eos"))}
    if UNKNOWN not in types and special["unknown"] < len(tokens):
        types = [UNKNOWN if i == special["unknown"] else kind for i, kind in enumerate(types)]

    # pieces: token, score, type
    scores = meta.per_token("scores", len(tokens), float, least=-1e38, most=1e38)
    pieces = b"".join(
        field(1, field(1, token) + field(2, float(score)) + field(3, kind or NORMAL))
        for token, score, kind in zip(tokens, scores, types, strict=True)
    )

    # trainer_spec: BPE, vocabulary size, bytes for the unknown, then id (40 to 42) and piece of the special tokens
    trainer = field(3, 2) + field(4, len(tokens)) + field(35, BYTE in types)
    for number, i in enumerate(special.values(), 40):
        trainer += field(number, i) + field(number + 5, tokens[i]) if i < len(tokens) else b""

    # normalizer_spec
    normalizer = field(1, "identity") + field(3, meta.read("tokenizer.ggml.add_space_prefix", bool, True))
    normalizer += field(4, meta.read("tokenizer.ggml.remove_extra_whitespaces", bool, False))
    return pieces + field(2, trainer) + field(3, normalizer + field(5, True))  # 5: spaces become U+2581
