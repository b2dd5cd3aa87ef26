"""Named configs for latency work with random weights: keyword arguments of `model.ModelArgs` by name."""

import re

from formats.config import FAMILIES
from formats.files import shown

# what publishers put behind a config's name; all else there is taken for a mistake, such as "-int-8" or "-fp8"
PUBLISHED = r"(?:-(?:chat|hf|instruct|it|pt|base|python|deduped|v[\d.]+))*"
_LLAMA31_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA31_ROPE |= {"original_max_position_embeddings": 8192}
_LLAMA3 = {"block_size": 8192, "vocab_size": 128256, "rope_base": 500000.0}
_LLAMA31 = _LLAMA3 | {"block_size": 131072, "rope_scaling": _LLAMA31_ROPE}
_LLAMA32 = _LLAMA31 | {"rope_scaling": _LLAMA31_ROPE | {"factor": 32.0}, "tie_embeddings": True}
_QWEN25 = {"block_size": 32768, "rope_base": 1e6, "norm_eps": 1e-6, "qkv_bias": True}
_QWEN3 = {"block_size": 40960, "vocab_size": 151936, "rope_base": 1e6, "norm_eps": 1e-6, "head_dim": 128}
_QWEN3 |= FAMILIES["Qwen3ForCausalLM"]
_GEMMA3 = {"block_size": 131072, "vocab_size": 262208, "head_dim": 256, "norm_eps": 1e-6, "activation": "gelu_tanh"}
_GEMMA3 |= {"rope_base": 1e6, "local_rope_base": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
_GEMMA3_4B = {"embedding_multiplier": 2560**0.5, "windowed_layers": [i for i in range(34) if (i + 1) % 6]}
_GEMMA3 |= {"sliding_window": 1024, "tie_embeddings": True} | FAMILIES["Gemma3ForCausalLM"]
_OLMO2 = {"block_size": 4096, "vocab_size": 100352, "rope_base": 5e5, "norm_eps": 1e-6} | FAMILIES["Olmo2ForCausalLM"]
_PYTHIA = {"vocab_size": 50432, "activation": "gelu", "rotary_share": 0.25, "parallel_residual": True}
_PYTHIA |= {"qkv_bias": True, "o_bias": True} | FAMILIES["GPTNeoXForCausalLM"]
_OPT = {"vocab_size": 50272, "activation": "relu", "tie_embeddings": True} | FAMILIES["OPTForCausalLM"]
_OPT |= {"qkv_bias": True, "o_bias": True, "mlp_bias": True}


def _named(n_layer: int, n_head: int, n_local_heads: int, dim: int, intermediate_size: int = 0, **others) -> dict:
    shape = {"n_layer": n_layer, "n_head": n_head, "n_local_heads": n_local_heads, "dim": dim}
    return shape | {"intermediate_size": intermediate_size} | others


transformer_configs = {  # layers, heads, key/value heads, width, hidden width; keyword arguments of ModelArgs
    "7B": _named(32, 32, 32, 4096),
    "13B": _named(40, 40, 40, 5120),
    "stories15M": _named(6, 6, 6, 288),
    "stories110M": _named(12, 12, 12, 768),
    "CodeLlama-7b-Python-hf": _named(32, 32, 32, 4096, block_size=16384, rope_base=1e6),
    "llama-2-7b": _named(32, 32, 32, 4096, block_size=4096),
    "llama-2-13b": _named(40, 40, 40, 5120, block_size=4096),
    "llama-2-70b": _named(80, 64, 8, 8192, 28672, block_size=4096),
    "llama-3-8b": _named(32, 32, 8, 4096, 14336, **_LLAMA3),
    "llama-3-70b": _named(80, 64, 8, 8192, 28672, **_LLAMA3),
    "llama-3.1-8b": _named(32, 32, 8, 4096, 14336, **_LLAMA31),
    "llama-3.2-1b": _named(16, 32, 8, 2048, 8192, **_LLAMA32),
    "llama-3.2-3b": _named(28, 24, 8, 3072, 8192, **_LLAMA32),
    "Mistral-7B": _named(32, 32, 8, 4096, 14336, block_size=32768, sliding_window=4096),
    "qwen2.5-0.5b": _named(24, 14, 2, 896, 4864, vocab_size=151936, tie_embeddings=True, **_QWEN25),
    "qwen2.5-7b": _named(28, 28, 4, 3584, 18944, vocab_size=152064, **_QWEN25),
    "smollm2-135m": _named(30, 9, 3, 576, 1536, block_size=8192, vocab_size=49152, rope_base=1e5, tie_embeddings=True),
    "qwen3-0.6b": _named(28, 16, 8, 1024, 3072, tie_embeddings=True, **_QWEN3),
    "qwen3-8b": _named(36, 32, 8, 4096, 12288, **_QWEN3),
    "gemma-3-4b": _named(34, 8, 4, 2560, 10240, **_GEMMA3, **_GEMMA3_4B),
    "phi-4": _named(40, 40, 10, 5120, 17920, block_size=16384, vocab_size=100352, rope_base=250000.0),
    "olmo-2-7b": _named(32, 32, 32, 4096, 11008, **_OLMO2),
    "pythia-6.9b": _named(32, 32, 32, 4096, 16384, **_PYTHIA),
    "opt-6.7b": _named(32, 32, 32, 4096, 16384, **_OPT),
}


def named_config(name: str, ending: str = PUBLISHED) -> dict:
    """The fields of the config whose key is the longest one contained in `name` (GPT-Fast's rule, case ignored).

    Behind the key `name` may have words that match `ending`, then "-packed", "-int8" or "-int4", which asks for such
    weights. Raises ValueError for anything else.
    """
    found = {key: re.search(rf"(?<![\d.]){re.escape(key)}", name, re.I) for key in transformer_configs}
    key = max((key for key, match in found.items() if match), key=len, default=None)
    form = key and re.fullmatch(rf"{ending}(?:-(packed|int8|int4))?", name[found[key].end() :], re.I)
    if not form:
        known = f"{', '.join(sorted(transformer_configs))}, each with -packed, -int8, -int4 or nothing behind it"
        raise ValueError(f"no config is named like {shown(name)}; known: {known}")
    return transformer_configs[key] | {"quant": (form[1] or "none").lower(), "name": name}
