"""config.json in Hugging Face's form, as keyword arguments of `model.ModelArgs`; the one place that judges values."""

import math
import re
from collections.abc import Callable
from typing import Any

from formats.files import one_line, shown

KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
LEAST, MOST = 1e-30, 1e30  # of floats, which are positive and stay finite in float32

# Architecture of config.json -> the fields of ModelArgs that it switches on, whatever its config.json says. The tables
# after it have rows for families whose config.json differs from Llama's.
FAMILIES: dict[str, dict] = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {},
    "Qwen2ForCausalLM": {"qkv_bias": True},
    "Qwen3ForCausalLM": {"qk_norm": "head"},
    "Phi3ForCausalLM": {},
    "GraniteForCausalLM": {},
    "SmolLM3ForCausalLM": {},
    "Olmo2ForCausalLM": {"qk_norm": "whole", "pre_norm": False, "post_norm": True},
    "Gemma2ForCausalLM": {"norm": "rms_plus_one", "post_norm": True},
    "Gemma3ForCausalLM": {"norm": "rms_plus_one", "post_norm": True, "qk_norm": "head"},
    "GPTNeoXForCausalLM": {"norm": "layer", "gated": False, "mlp_bias": True},
}
FAMILIES["OPTForCausalLM"] = {"norm": "layer", "norm_eps": 1e-5, "gated": False}
FAMILIES["OPTForCausalLM"] |= {"rotary_share": 0.0, "learned_positions": True}
GEMMAS = ("Gemma2ForCausalLM", "Gemma3ForCausalLM")
MODEL_TYPES = {"smollm3": "SmolLM3", "gpt_neox": "GPTNeoX", "gptneox": "GPTNeoX", "opt": "OPT", "gemma3_text": "Gemma3"}

# what an architecture's config.json means by a key that it does not have, where not all architectures mean the same
_GEMMA: dict[str, Any] = {"head_dim": 256, "num_key_value_heads": 4, "tie_word_embeddings": True}
_GEMMA |= {"query_pre_attn_scalar": 256, "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 4096}
DEFAULTS: dict[str, dict] = {
    "Qwen3ForCausalLM": {"head_dim": 128},
    "Phi3ForCausalLM": {"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
    "SmolLM3ForCausalLM": {"rope_theta": 2e6, "tie_word_embeddings": True, "num_key_value_heads": 4},
    "Olmo2ForCausalLM": {"rms_norm_eps": 1e-5},
    "Gemma2ForCausalLM": _GEMMA
    | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "max_position_embeddings": 8192},
    "Gemma3ForCausalLM": _GEMMA
    | {"num_attention_heads": 8, "vocab_size": 262208, "max_position_embeddings": 131072, "rope_theta": 1e6}
    | {"rope_local_base_freq": 1e4, "sliding_window_pattern": 6},
    "GPTNeoXForCausalLM": {"rotary_pct": 0.25, "hidden_act": "gelu", "attention_bias": True},
    "OPTForCausalLM": {"activation_function": "relu", "tie_word_embeddings": True, "enable_bias": True},
}

# field of ModelArgs -> key of config.json, kind, least and most, and its default if it has one
NUMBERS: dict[str, tuple] = {"n_layer": ("num_hidden_layers", int, 1, 10_000), "dim": ("hidden_size", int, 1, 2**24)}
NUMBERS |= {"n_head": ("num_attention_heads", int, 1, 2**16), "norm_eps": ("rms_norm_eps", float, LEAST, 1, 1e-6)}
NUMBERS |= {"vocab_size": ("vocab_size", int, 1, 2**28), "intermediate_size": ("intermediate_size", int, 1, 2**26)}
NUMBERS |= {"n_local_heads": ("num_key_value_heads", int, 1, 2**16, 0), "head_dim": ("head_dim", int, 1, 2**16, 0)}
NUMBERS |= {"block_size": ("max_position_embeddings", int, 1, 2**31 - 1, 2048)}
# the same, of one architecture
_MULTIPLIERS = {"embedding_multiplier": "embedding_multiplier", "residual_multiplier": "residual_multiplier"}
_MULTIPLIERS |= {"logits_scaling": "logits_scaling", "attention_scale": "attention_multiplier"}
OWN_NUMBERS: dict[str, dict[str, tuple]] = {
    "GraniteForCausalLM": {field: (key, float, LEAST, MOST, 1.0) for field, key in _MULTIPLIERS.items()},
    "GPTNeoXForCausalLM": {"norm_eps": ("layer_norm_eps", float, LEAST, 1, 1e-5)},
    "OPTForCausalLM": {"intermediate_size": ("ffn_dim", int, 1, 2**26)},
}
OWN_NUMBERS |= {name: {"logit_softcap": ("final_logit_softcapping", float, LEAST, MOST, 0.0)} for name in GEMMAS}
OWN_NUMBERS["Gemma2ForCausalLM"]["attention_softcap"] = ("attn_logit_softcapping", float, LEAST, MOST, 0.0)

# switches of an architecture that have one supported value
FIXED: dict[str, dict[str, bool]] = {name: {"use_bidirectional_attention": False} for name in GEMMAS}
FIXED["OPTForCausalLM"] = {"do_layer_norm_before": True, "_remove_final_layer_norm": False}
FIXED["OPTForCausalLM"] |= {"layer_norm_elementwise_affine": True}

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu"}  # theirs -> ours
ACTIVATIONS |= dict.fromkeys(("gelu_pytorch_tanh", "gelu_new"), "gelu_tanh")
ACTIVATION_KEYS = dict.fromkeys(GEMMAS, "hidden_activation") | {"OPTForCausalLM": "activation_function"}
UNBIASED, PARTLY_ROTARY = ("MistralForCausalLM", "Phi3ForCausalLM"), ("Phi3ForCausalLM", "GPTNeoXForCausalLM")
# what each type of rope scaling needs
ROPE_KEYS: dict[str, tuple[str, ...]] = {"default": (), "linear": ("factor",)}
ROPE_KEYS["llama3"] = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
ROPE_KEYS |= {"dynamic": ("factor",), "yarn": (), "longrope": ("short_factor", "long_factor"), "factors": ("factors",)}
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
    return f"{MODEL_TYPES.get(model_type, model_type.capitalize())}ForCausalLM"


def known_architecture(config: dict) -> str:
    """`architecture`, if it is one of FAMILIES. Raises ValueError if not, or for a mixture of experts."""
    name = architecture(config)
    if any(checked(config, key, int, 0, least=0) > 1 for key in EXPERTS) or re.search("moe|mixtral", name or "", re.I):
        raise ValueError(f"{shown(name)} is a mixture of experts, not supported; supported: {', '.join(FAMILIES)}")
    if name not in FAMILIES:
        raise ValueError(f"unknown architecture {shown(name)}; supported: {', '.join(FAMILIES)}")
    return name


def config_fields(config: dict, name: str = "") -> dict:
    """Keyword arguments of `model.ModelArgs` for a config.json; ValueError if it has anything unknown or wrong.

    `name`: of the model, where it is known; it comes to end in "-int8" or "-int4" for such weights.
    """
    family = known_architecture(config)
    config = {**DEFAULTS.get(family, {}), **config}

    # widths, some of which follow from others
    fields = {
        field: checked(config, key, kind, *default, least=least, most=most)
        for field, (key, kind, least, most, *default) in (NUMBERS | OWN_NUMBERS.get(family, {})).items()
    }
    n_head, head_dim = fields["n_head"], fields["head_dim"] or fields["dim"] // fields["n_head"]
    n_local_heads = fields["n_local_heads"] or n_head
    if n_head % n_local_heads or head_dim % 2 or not head_dim:
        pair = f"{n_head} heads do not divide into {n_local_heads} key/value heads"
        raise ValueError(f"config.json: {pair}, or head_dim {head_dim} is odd or 0")
    fields |= {"n_local_heads": n_local_heads, "head_dim": head_dim}

    # parts with rules of their own
    parts = _switches(config, family, fields) | _quantization(config)
    parts |= {} if "learned_positions" in FAMILIES[family] else _rope(config, family, fields)
    parts |= _windows(config, family, fields["n_layer"], parts.get("unrotated_layers", []))
    name, quant = name or checked(config, "_name_or_path", str, ""), parts["quant"]
    name = name if quant == "none" else f"{name.removesuffix(f'-{quant}')}-{quant}"
    parts |= {"name": name, "tie_embeddings": checked(config, "tie_word_embeddings", bool, False)}
    return fields | parts | FAMILIES[family]


def _switches(config: dict, family: str, fields: dict) -> dict:
    """Activation, biases, attention's scale, layers without rope, and multipliers, by the rules of the family."""
    for key, value in FIXED.get(family, {}).items():
        if checked(config, key, bool, value) != value:
            raise ValueError(f"config.json has {key} {config[key]}, which is not supported; {value} is")
    if family == "OPTForCausalLM" and (width := config.get("word_embed_proj_dim") or fields["dim"]) != fields["dim"]:
        raise ValueError(f"config.json has word_embed_proj_dim {shown(width)}, which is supported only as hidden_size")
    key = ACTIVATION_KEYS.get(family, "hidden_act")
    activation = config.get(key, "silu")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(f"config.json has {key} {shown(activation)}; supported: {', '.join(map(repr, ACTIVATIONS))}")
    parts: dict[str, Any] = {"activation": ACTIVATIONS[activation]}

    # biases: one switch for both sides of attention, one for the MLP; OPT has one for all
    attention, mlp = ("enable_bias",) * 2 if family == "OPTForCausalLM" else ("attention_bias", "mlp_bias")
    for field, key in {"qkv_bias": attention, "o_bias": attention, "mlp_bias": mlp}.items():
        parts[field] = checked(config, key, bool, False) and family != "Qwen2ForCausalLM"  # which has one of its own
        if parts[field] and family in UNBIASED:
            raise ValueError(f"config.json sets {key}, which {family} does not have")

    # what one family has
    if family in GEMMAS:
        scalar = checked(config, "query_pre_attn_scalar", float, least=LEAST, most=MOST)
        parts |= {"embedding_multiplier": fields["dim"] ** 0.5}
        parts |= {"attention_scale": scalar**-0.5} if scalar != fields["head_dim"] else {}
    if family == "GPTNeoXForCausalLM":
        parts["parallel_residual"] = checked(config, "use_parallel_residual", bool, True)
    if family == "SmolLM3ForCausalLM":
        interval, layers = checked(config, "no_rope_layer_interval", int, 4), range(fields["n_layer"])
        every = [int((i + 1) % interval != 0) for i in layers]
        rotated = checked(config, "no_rope_layers", [int], every, least=0, most=1)  # 1: rotated, despite its name
        if len(rotated) < len(layers):
            raise ValueError(f"config.json has {len(rotated)} no_rope_layers for {len(layers)} layers")
        parts["unrotated_layers"] = [i for i in layers if not rotated[i]]
    return parts


def _quantization(config: dict) -> dict:
    """What quantize.py wrote into config.json. Raises ValueError for the quantisation of another program."""
    found, foreign = config.get("quantization") or {}, config.get("quantization_config")
    mode = found.get("mode", "none") if isinstance(found, dict) else [found]
    if foreign or mode not in ("none", "packed", "int8", "int4"):
        how = f"config.json says the weights are quantised ({one_line(str(foreign or mode))})"
        raise ValueError(f"{how}; only quantize.py's packed, int8 and int4 are supported")
    return {"quant": mode, "groupsize": checked(found, "groupsize", int, 64, where="config.json's quantization")}


def _rope(config: dict, family: str, fields: dict) -> dict:
    """Base, share and scaling of the rotary embedding, from any of Hugging Face's forms."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    local = {"rope_theta": config.get("rope_local_base_freq")} if family == "Gemma3ForCausalLM" else {}
    if isinstance(found, dict) and "full_attention" in found:  # apart for full and for sliding layers
        found, local = found["full_attention"], found.get("sliding_attention") or local
    if not isinstance(found, dict) or not isinstance(local, dict):
        raise ValueError(f"config.json has rope settings {shown(found)}, not an object")
    if local.get("rope_type", "default") != "default":
        raise ValueError(f"config.json has rope type {shown(local['rope_type'])} in sliding layers; only default is")
    neox = family == "GPTNeoXForCausalLM"
    base = checked(config, "rotary_emb_base" if neox else "rope_theta", float, 10000.0, least=LEAST, most=MOST)
    share = checked(config, "rotary_pct" if neox else "partial_rotary_factor", float, 1.0, least=LEAST, most=1)
    base = checked(found, "rope_theta", float, base, least=LEAST, most=MOST)
    share = checked(found, "partial_rotary_factor", float, share, least=LEAST, most=1)
    rotary_dim = int(fields["head_dim"] * share)
    if (share != 1 and family not in PARTLY_ROTARY) or rotary_dim % 2 or not rotary_dim:
        raise ValueError(f"config.json has partial_rotary_factor {share}; supported: 1, or an even part of a head")

    # the type, and the numbers that it needs
    kind = found.get("rope_type") or found.get("type") or "default"
    kind = "longrope" if family == "Phi3ForCausalLM" and kind in ("su", "yarn") else kind
    if not isinstance(kind, str) or kind not in ROPE_KEYS:
        raise ValueError(f"config.json has rope type {shown(kind)}; supported: {', '.join(ROPE_KEYS)}")
    where, other = f"config.json's {kind} rope scaling", ("rope_theta", "type", "partial_rotary_factor")
    scaling: dict = {key: value for key, value in found.items() if key not in other} | {"rope_type": kind}
    if family == "Phi3ForCausalLM":  # which has it at the top
        scaling["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    for key in ROPE_KEYS[kind]:
        divisors = kind in ("factors", "longrope")  # one for each frequency
        checked(scaling, key, [float] if divisors else float, least=LEAST, most=MOST, where=where)
        if divisors and len(scaling[key]) != rotary_dim // 2:
            raise ValueError(f"{len(scaling[key])} rope factors in config.json do not fit: {rotary_dim // 2} are due")
    if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise ValueError("config.json's llama3 rope scaling has a low_freq_factor that is not below high_freq_factor")
    if (kind == "dynamic" and rotary_dim == 2) or (kind == "yarn" and base == 1):
        raise ValueError(f"{where} is not defined for head_dim {rotary_dim} and rope_theta {base}")
    parts = {"rope_base": float(base), "rotary_share": share, "rope_scaling": None if kind == "default" else scaling}
    parts["local_rope_base"] = checked(local, "rope_theta", float, 0.0, least=LEAST, most=MOST)
    beyond = kind in ("dynamic", "yarn", "longrope")
    return parts | (_beyond_context(kind, scaling, fields["block_size"], where) if beyond else {})


def _beyond_context(kind: str, found: dict, most: int, where: str) -> dict:
    """The scaling of a model for texts beyond the context it was trained on, and their length; most: the config's."""

    def number(key: str, *default: float) -> float:
        return checked(found, key, float, *default, least=LEAST, most=MOST, where=where)

    original = checked(found, "original_max_position_embeddings", int, most, least=2, where=where)
    original, factor = most if kind == "dynamic" else original, number("factor", most / original)
    scaling = {"rope_type": kind, "factor": factor, "original_max_position_embeddings": original}
    if kind == "dynamic":
        return {"rope_scaling": scaling, "block_size": max(most, int(most * factor))}

    log = math.log(max(factor, 1))
    if kind == "longrope":
        own = math.sqrt(1 + log / math.log(original))
        scaling |= {key: found[key] for key in ROPE_KEYS[kind]}
    else:
        scales = [number(key, 0.0) for key in ("mscale", "mscale_all_dim")]
        over, under = scales if all(scales) else (1, 0)
        own = (0.1 * over * log + 1) / (0.1 * under * log + 1)
        scaling |= {key: number(key, value) for key, value in {"beta_fast": 32.0, "beta_slow": 1.0}.items()}
        scaling["truncate"] = checked(found, "truncate", bool, True, where=where)
        most = max(most, int(original * factor))
    return {"rope_scaling": scaling | {"attention_factor": number("attention_factor", own)}, "block_size": most}


def _windows(config: dict, family: str, n_layer: int, unrotated: list[int]) -> dict:
    """The sliding window and its layers: of the family, or as its config says; {} for none."""
    slides: dict[str, Callable[[int], bool]] = {"MistralForCausalLM": lambda i: True, "Phi3ForCausalLM": lambda i: True}
    slides["Gemma2ForCausalLM"] = lambda i: i % 2 == 0
    slides["Gemma3ForCausalLM"] = lambda i: (i + 1) % checked(config, "sliding_window_pattern", int, 6) != 0
    if checked(config, "use_sliding_window", bool, False):
        slides["Qwen2ForCausalLM"] = lambda i: i >= checked(config, "max_window_layers", int, n_layer, least=0)
        slides |= {"Qwen3ForCausalLM": slides["Qwen2ForCausalLM"], "SmolLM3ForCausalLM": unrotated.__contains__}
    if family not in slides:
        return {}

    window = checked(config, "sliding_window", int, 0, least=0)
    types = checked(config, "layer_types", [str], []) if family != "Phi3ForCausalLM" else []
    if types and (len(types) != n_layer or not {"sliding_attention", "full_attention"}.issuperset(types)):
        raise ValueError(f"config.json needs sliding_attention or full_attention {n_layer} times, not {shown(types)}")
    layers = [i for i in range(n_layer) if (types[i] == "sliding_attention" if types else slides[family](i))]
    return {"sliding_window": window, "windowed_layers": layers} if window and layers else {}


def language_config(config: dict) -> dict:
    """The config of a multimodal model's language model, of others the config itself."""
    if architecture(config) != "Gemma3ForConditionalGeneration":
        return config
    if not isinstance(text := config.get("text_config"), dict):
        raise ValueError(f"config.json needs an object as 'text_config', not {shown(text)}")
    above = {key: config[key] for key in ("bos_token_id", "eos_token_id", "torch_dtype", "dtype") if key in config}
    return {**above, **text, "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"}
