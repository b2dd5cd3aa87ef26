"""config.json in Hugging Face's form, as keyword arguments of `model.ModelArgs`; the one place that judges values."""

import re
from collections.abc import Collection
from typing import Any

from formats.files import one_line, shown

KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
LEAST, MOST = 1e-30, 1e30  # of floats, which are positive and stay finite in float32

# field of ModelArgs -> key of config.json, kind, least and most, and its default if it has one
NUMBERS: dict[str, tuple] = {"n_layer": ("num_hidden_layers", int, 1, 10_000), "dim": ("hidden_size", int, 1, 2**24)}
NUMBERS |= {"n_head": ("num_attention_heads", int, 1, 2**16), "norm_eps": ("rms_norm_eps", float, LEAST, 1, 1e-6)}
NUMBERS |= {"vocab_size": ("vocab_size", int, 1, 2**28), "intermediate_size": ("intermediate_size", int, 1, 2**26)}
NUMBERS |= {"n_local_heads": ("num_key_value_heads", int, 1, 2**16, 0), "head_dim": ("head_dim", int, 1, 2**16, 0)}
NUMBERS |= {"block_size": ("max_position_embeddings", int, 1, 2**31 - 1, 2048)}
ROPE_KEYS = {  # what each type of rope scaling needs
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "factors": ("factors",),
}
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


def checked(values: dict, key: str, kind: Any, *default, least=1, most=2**31 - 1, where="config.json") -> Any:
    """values[key] if it is of this kind: int, float, bool, str, or [kind] for a list; numbers from least to most.

    An absent or null value is `default`. Raises ValueError, which says `where`, for a value that is wrong or missing.
    """
    value = values.get(key)
    if value is None and default:
        return default[0]
    one = kind[0] if isinstance(kind, list) else kind
    items = value if isinstance(kind, list) else [value]
    if not isinstance(items, list) or not all(_fits(item, one, least, most) for item in items):
        wanted = KINDS[one] + (f" from {least} to {most}" if one in (int, float) else "")
        found = "it has none" if value is None else f"not {shown(value)}"
        raise ValueError(f"{where} needs {'a list, each ' * (one is not kind)}{wanted} as {key!r}, {found}")
    return int(value) if kind is int else value


def _fits(value: Any, kind: type, least: float, most: float) -> bool:
    if kind in (bool, str) or isinstance(value, bool) or not isinstance(value, int | float):
        return kind in (bool, str) and isinstance(value, kind)
    return least <= value <= most and (kind is float or value == int(value))


def architecture(config: dict) -> str | None:
    """The architecture's name, such as "LlamaForCausalLM", also of a config that has only a model_type."""
    names, model_type = checked(config, "architectures", [str], []), checked(config, "model_type", str, None)
    return names[0] if names else model_type and architecture_of(model_type)


def architecture_of(model_type: str) -> str:
    return f"{model_type.capitalize()}ForCausalLM"


def known_architecture(config: dict, known: Collection[str]) -> str:
    """`architecture`, if it is among the `known` ones. Raises ValueError if not, or for a mixture of experts."""
    name = architecture(config)
    if any(checked(config, key, int, 0, least=0) > 1 for key in EXPERTS) or re.search("moe|mixtral", name or "", re.I):
        raise ValueError(f"{shown(name)} is a mixture of experts, not supported; supported: {', '.join(known)}")
    if name not in known:
        raise ValueError(f"unknown architecture {shown(name)}; supported: {', '.join(known)}")
    return name


def config_fields(config: dict, name: str = "") -> dict:
    """Keyword arguments of `model.ModelArgs` that a config.json decides, whatever its architecture.

    `name`: of the model, where it is known; it comes to end in "-int8" or "-int4" for such weights. Raises ValueError
    for a wrong or missing value, and rope scaling or quantisation of an unknown kind.
    """
    # widths, some of which follow from others
    fields = {
        field: checked(config, key, kind, *default, least=least, most=most)
        for field, (key, kind, least, most, *default) in NUMBERS.items()
    }
    n_head, head_dim = fields["n_head"], fields["head_dim"] or fields["dim"] // fields["n_head"]
    n_local_heads = fields["n_local_heads"] or n_head
    if n_head % n_local_heads or head_dim % 2 or not head_dim:
        pair = f"{n_head} heads do not divide into {n_local_heads} key/value heads"
        raise ValueError(f"config.json: {pair}, or head_dim {head_dim} is odd or 0")

    # parts with rules of their own
    parts = _rope(config, head_dim) | _quantization(config) | _windows(config, fields["n_layer"])
    name, quant = name or checked(config, "_name_or_path", str, ""), parts["quant"]
    name = name if quant == "none" else f"{name.removesuffix(f'-{quant}')}-{quant}"
    parts |= {"name": name, "tie_embeddings": checked(config, "tie_word_embeddings", bool, False)}
    return fields | {"n_local_heads": n_local_heads, "head_dim": head_dim} | parts


def _quantization(config: dict) -> dict:
    """What quantize.py wrote into config.json. Raises ValueError for the quantisation of another program."""
    found, foreign = config.get("quantization") or {}, config.get("quantization_config")
    mode = found.get("mode", "none") if isinstance(found, dict) else [found]
    if foreign or mode not in ("none", "int8", "int4"):
        how = f"config.json says the weights are quantised ({one_line(str(foreign or mode))})"
        raise ValueError(f"{how}; only quantize.py's int8 and int4 are supported")
    return {"quant": mode, "groupsize": checked(found, "groupsize", int, 64, where="config.json's quantization")}


def _rope(config: dict, head_dim: int) -> dict:
    """Base and scaling of the rotary embedding, from either of Hugging Face's two forms."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(found, dict):
        raise ValueError(f"config.json has rope settings {shown(found)}, not an object")
    base, share = 10000.0, 1.0
    for values in (config, found):
        base = checked(values, "rope_theta", float, base, least=LEAST, most=MOST)
        share = checked(values, "partial_rotary_factor", float, share, least=0)
    if share != 1:
        raise ValueError(f"config.json has partial_rotary_factor {share}; only 1 is supported")

    # the type, and the numbers that it needs
    kind = found.get("rope_type") or found.get("type") or "default"
    if not isinstance(kind, str) or kind not in ROPE_KEYS:
        raise ValueError(f"config.json has rope type {shown(kind)}; supported: {', '.join(ROPE_KEYS)}")
    scaling: dict = {key: value for key, value in found.items() if key not in ("rope_theta", "type")}
    for key in ROPE_KEYS[kind]:
        form = [float] if key == "factors" else float
        checked(scaling, key, form, least=LEAST, most=MOST, where=f"config.json's {kind} rope scaling")
    if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise ValueError("config.json's llama3 rope scaling has a low_freq_factor that is not below high_freq_factor")
    if kind == "factors" and len(scaling["factors"]) != head_dim // 2:
        raise ValueError(f"{len(scaling['factors'])} rope factors do not fit head_dim {head_dim}: half as many are due")
    return {"rope_base": float(base), "rope_scaling": None if kind == "default" else scaling | {"rope_type": kind}}


def _windows(config: dict, n_layer: int) -> dict:
    """The sliding window and its layers: Llama has none, Mistral one in all layers, others if their config says so."""
    family, some = architecture(config), checked(config, "use_sliding_window", bool, False)
    everywhere = family == "MistralForCausalLM"
    if family == "LlamaForCausalLM" or not (everywhere or some):
        return {}
    window = checked(config, "sliding_window", int, 0, least=0)
    types = checked(config, "layer_types", [str], [])
    if types and (len(types) != n_layer or not {"sliding_attention", "full_attention"}.issuperset(types)):
        raise ValueError(f"config.json needs sliding_attention or full_attention {n_layer} times, not {shown(types)}")

    # the layers
    first = 0 if types or everywhere else checked(config, "max_window_layers", int, n_layer, least=0)
    layers = [i for i in range(first, n_layer) if not types or types[i] == "sliding_attention"]
    return {"sliding_window": window, "windowed_layers": layers} if window and layers else {}
