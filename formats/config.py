"""config.json in Hugging Face's form, as keyword arguments of `model.ModelArgs`."""

# field of ModelArgs -> key of config.json, and its default if it has one
NUMBERS = {"n_layer": ("num_hidden_layers",), "n_head": ("num_attention_heads",), "dim": ("hidden_size",)}
NUMBERS |= {"vocab_size": ("vocab_size",), "intermediate_size": ("intermediate_size",)}
NUMBERS |= {"n_local_heads": ("num_key_value_heads", 0), "head_dim": ("head_dim", 0)}
NUMBERS |= {"block_size": ("max_position_embeddings", 2048), "norm_eps": ("rms_norm_eps", 1e-6)}
ROPE_KEYS = {  # what each type of rope scaling needs
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "factors": ("factors",),
}


def architecture(config: dict) -> str | None:
    """The architecture's name, such as "LlamaForCausalLM", also of a config that has only a model_type."""
    names, model_type = config.get("architectures"), config.get("model_type")
    return names[0] if names else model_type and architecture_of(model_type)


def architecture_of(model_type: str) -> str:
    return f"{model_type.capitalize()}ForCausalLM"


def config_fields(config: dict, name: str = "") -> dict:
    """Keyword arguments of `model.ModelArgs` that a config.json decides, whatever its architecture.

    `name`: of a model whose config names none. Of int8 or int4 weights the name ends in "-int8" or "-int4".

    Raises ValueError for a missing key, a value of another type, rope scaling or quantisation of an unknown kind.
    """
    # widths, some of which follow from others
    fields = {field: _number(config, key, *default) for field, (key, *default) in NUMBERS.items()}
    n_head, head_dim = fields["n_head"], fields["head_dim"] or fields["dim"] // fields["n_head"]
    n_local_heads = fields["n_local_heads"] or n_head
    if n_head % n_local_heads or head_dim % 2:
        pair = f"{n_head} heads do not divide into {n_local_heads} key/value heads"
        raise ValueError(f"config.json: {pair}, or head_dim {head_dim} is odd")

    # parts with rules of their own
    parts = _rope(config) | _quantization(config) | _windows(config, fields["n_layer"])
    name, quant = config.get("_name_or_path") or name, parts["quant"]
    name = name if quant == "none" else f"{name.removesuffix(f'-{quant}')}-{quant}"
    fields |= {"n_local_heads": n_local_heads, "head_dim": head_dim, "name": name}
    return fields | parts | {"tie_embeddings": config.get("tie_word_embeddings", False)}


def _number(config: dict, key: str, default: float | None = None) -> float:
    """config[key]; the default where it is absent or null."""
    value = default if config.get(key) is None else config[key]
    if not isinstance(value, int | float):
        raise ValueError(f"config.json needs a number as {key!r}, not {value!r}")
    return value


def _quantization(config: dict) -> dict:
    """What quantize.py wrote into config.json. Raises ValueError for the quantisation of another program."""
    found = config.get("quantization") or {}
    mode, groupsize = "", 0
    if isinstance(found, dict):
        mode, groupsize = found.get("mode", "none"), found.get("groupsize", 64)
    if "quantization_config" in config or mode not in ("none", "int8", "int4") or not isinstance(groupsize, int):
        found = config.get("quantization_config") or mode or found
        only = "only quantize.py's int8 and int4 are supported"
        raise ValueError(f"config.json says the weights are quantised ({found}); {only}")
    return {"quant": mode, "groupsize": groupsize}


def _rope(config: dict) -> dict:
    """Base and scaling of the rotary embedding, from either of Hugging Face's two forms."""
    scaling = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    base = _number(scaling, "rope_theta", _number(config, "rope_theta", 10000.0))
    scaling.pop("rope_theta", None)
    kind = scaling.pop("type", None)
    kind = scaling.setdefault("rope_type", kind or "default")
    if kind not in ROPE_KEYS:
        raise ValueError(f"config.json has rope type {kind!r}; supported: {', '.join(ROPE_KEYS)}")
    missing = [key for key in ROPE_KEYS[kind] if key not in scaling]
    if missing:
        raise ValueError(f"config.json's {kind} rope scaling has no {', '.join(missing)}")
    return {"rope_base": float(base), "rope_scaling": None if kind == "default" else scaling}


def _windows(config: dict, n_layer: int) -> dict:
    """The sliding window and its layers: Llama has none, Mistral one in all layers, others if their config says so."""
    family, window = architecture(config), config.get("sliding_window")
    everywhere = family == "MistralForCausalLM"
    if family == "LlamaForCausalLM" or not window or not (everywhere or config.get("use_sliding_window", False)):
        return {}
    if config.get("layer_types"):
        layers = [i for i, kind in enumerate(config["layer_types"]) if kind == "sliding_attention"]
    else:
        layers = list(range(0 if everywhere else config.get("max_window_layers", n_layer), n_layer))
    return {"sliding_window": window, "windowed_layers": layers} if layers else {}
