"""Random models of transformers, and GGUF files of them by the gguf package: what checkpoints of users look like."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from models import CONFIG, LLAMA3_ROPE

transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")

TINY = CONFIG | {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}
LLAMA31 = LLAMA3_ROPE | {"rope_theta": 500000.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
MSCALED = YARN | {"mscale": 0.7, "mscale_all_dim": 1.2, "beta_fast": 20.0, "truncate": False}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75}
LONGROPE |= {"short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], "long_factor": [1.0, 1.5, 2.0, 3.0, 5.0, 8.0]}
GRANITE = {
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.1,
    "logits_scaling": 8.0,
}
GEMMA = {"head_dim": 24, "num_key_value_heads": 2, "sliding_window": 7, "query_pre_attn_scalar": 24}
GEMMA_ROPE = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}}
GEMMA_ROPE |= {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
GROUPED = {"num_key_value_heads": 2}
# of transformers: its class, and what differs from TINY. Contexts and windows are shorter than 40 tokens.
MODELS = {
    "llama2": ("Llama", {}),
    "llama2-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama3.1": ("Llama", GROUPED | {"rope_parameters": LLAMA31, "head_dim": 24}),
    "linear": ("Llama", {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 4.0}}),
    "llama-yarn": ("Llama", {"rope_parameters": YARN}),
    "llama-dynamic": ("Llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 32}),
    "llama-biases": ("Llama", GROUPED | {"attention_bias": True, "mlp_bias": True}),
    "llama-gelu": ("Llama", {"hidden_act": "gelu_new"}),
    "mistral": ("Mistral", GROUPED | {"sliding_window": 7}),
    "mistral-yarn": (
        "Mistral",
        {"sliding_window": 7, "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.2}},
    ),
    "qwen2": ("Qwen2", GROUPED),
    "qwen2-tied": ("Qwen2", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "qwen3": ("Qwen3", GROUPED | {"head_dim": 24}),
    "qwen3-yarn": ("Qwen3", GROUPED | {"head_dim": 16, "rope_parameters": YARN, "tie_word_embeddings": True}),
    "phi3": ("Phi3", GROUPED),
    "phi3-window": ("Phi3", GROUPED | {"sliding_window": 7}),
    "phi3-longrope": (
        "Phi3",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32, "tie_word_embeddings": True},
    ),
    "granite": ("Granite", GROUPED | GRANITE),
    "granite-biases": ("Granite", GROUPED | GRANITE | {"attention_bias": True, "mlp_bias": True}),
    "smollm3": ("SmolLM3", GROUPED | {"num_hidden_layers": 4}),
    "olmo2": ("Olmo2", GROUPED),
    "gemma2": ("Gemma2", GEMMA | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}),
    "gemma2-scaled": ("Gemma2", GEMMA | {"query_pre_attn_scalar": 50, "attn_logit_softcapping": None}),
    "gemma3": ("Gemma3", GEMMA | {"sliding_window_pattern": 3, "num_hidden_layers": 4, "rope_parameters": GEMMA_ROPE}),
    "gpt-neox": ("GPTNeoX", {}),
    "gpt-neox-sequential": ("GPTNeoX", {"use_parallel_residual": False}),
    "opt": ("OPT", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "opt-unbiased": ("OPT", {"ffn_dim": 96, "enable_bias": False, "activation_function": "gelu"}),
}
# llama.cpp has no such model, or no key for what is in it
NOT_IN_GGUF = "opt opt-unbiased llama-dynamic llama-gelu mistral-yarn qwen2-window gemma2-scaled".split()


def reference(name: str, dtype=torch.float32, **changes):
    """A random transformers model, biases and norms included."""
    family, options = MODELS[name]
    config_class = getattr(transformers, "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config")
    ids = {f"{token}_token_id": None for token in ("bos", "eos", "pad")}
    config = config_class(**{k: v for k, v in (TINY | ids | options | changes).items() if k != "architectures"})
    config._attn_implementation = "eager"  # the one that heeds soft-capping
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.2, generator=generator)
            parameter.data = parameter.to(dtype)  # not the model: its rotary frequencies stay float32
    return model


def byte_level_vocabulary() -> tuple[list[str], list[str]]:
    from tokenizers.pre_tokenizers import ByteLevel

    merges = ["Ġ t", "h e", "Ġt he"]
    return ["<|end|>", *sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in merges)], merges


def write_gguf(path: Path, model, kind: str = "F32", pre: str = "smollm", **metadata) -> Path:
    """As llama.cpp's converter does: its names (of the gguf package), its order of rows, its keys; vectors in F32."""
    config, rope = model.config, getattr(model.config, "rope_parameters", None)
    arch = {"mistral": "llama", "gemma3_text": "gemma3", "gpt_neox": "gptneox"}.get(
        config.model_type, config.model_type
    )
    writer, layers = gguf.GGUFWriter(path, arch), config.num_hidden_layers
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_block_count(layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    add_tokenizer(writer, pre)

    # what an architecture has beyond the others
    if arch == "gptneox":
        writer.add_layer_norm_eps(config.layer_norm_eps)
        writer.add_rope_dimension_count(int(rope["partial_rotary_factor"] * head_dim))
        writer.add_parallel_residual(config.use_parallel_residual)
    else:
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    full = rope.get("full_attention", rope)
    if arch not in ("gptneox", "gemma2"):
        writer.add_rope_freq_base(full["rope_theta"])
    if arch not in ("gptneox", "phi3"):
        writer.add_key_length(head_dim)
    if arch in ("gemma2", "gemma3", "phi3") or config.model_type == "mistral":
        writer.add_sliding_window(config.sliding_window or 0)
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if arch == "gemma3":
        writer.add_uint32("gemma3.attention.sliding_window_pattern", config._sliding_window_pattern)
        writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
    if arch == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if arch == "phi3":
        writer.add_rope_dimension_count(int(rope.get("partial_rotary_factor", 1.0) * head_dim))
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
    if full["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(full["rope_type"]))
        writer.add_rope_scaling_factor(full["factor"])
    if full["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(full["original_max_position_embeddings"])
    if full["rope_type"] == "longrope":
        original = config.original_max_position_embeddings
        scale = config.max_position_embeddings / original
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)))
        for length in ("long", "short"):
            factors = torch.tensor(full[f"{length}_factor"], dtype=torch.float32)
            writer.add_tensor(f"rope_factors_{length}.weight", factors.numpy())
    if full["rope_type"] == "llama3":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        scaled = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0]
        plain = full["rope_theta"] ** -(torch.arange(0, head_dim, 2) / head_dim)
        writer.add_tensor("rope_freqs.weight", (plain / scaled).float().numpy())

    # tensors
    names = gguf.get_tensor_name_map(next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == arch), layers)
    for name, tensor in model.float().state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = tensor.numpy()
        shape = array.shape
        if arch in ("llama", "granite", "smollm3") and ("q_proj" in name or "k_proj" in name):
            array = array.reshape(-1, 2, head_dim // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)
        if "query_key_value" in name:  # q, k and v of each head become q of all heads, k, v
            array = array.reshape(-1, 3, head_dim, *shape[1:]).swapaxes(0, 1).reshape(shape)
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            array = array + 1
        quantised = gguf.GGMLQuantizationType[kind if array.ndim == 2 else "F32"]
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(new, gguf.quants.quantize(array, quantised), raw_dtype=quantised)
    for key, value in metadata.items():
        writer.add_string(key.replace("__", "."), value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tokenizer(writer, pre: str) -> None:
    tokens, merges = byte_level_vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges(merges)
    writer.add_eos_token_id(0)


def edit_gguf(path: Path, **changes) -> Path:
    """Rewrites a GGUF file with other metadata ("__" is "."; None deletes), its tensors as they are."""
    reader = gguf.GGUFReader(path)
    values = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    types = {key: (field.types[0], field.types[-1]) for key, field in reader.fields.items()}
    tensors = [(t.name, np.array(t.data), t.tensor_type) for t in reader.tensors]
    guess = {bool: gguf.GGUFValueType.BOOL, int: gguf.GGUFValueType.INT64, str: gguf.GGUFValueType.STRING}
    guess |= {float: gguf.GGUFValueType.FLOAT32, list: gguf.GGUFValueType.ARRAY}
    writer = gguf.GGUFWriter(path, values.pop("general.architecture"))
    for key, value in (values | {key.replace("__", "."): value for key, value in changes.items()}).items():
        kind, item = types.get(key, (None, None))
        if key.replace(".", "__") in changes and value is not None:
            kind, item = guess[type(value)], guess[type(value[0])] if isinstance(value, list) else None
        if value is not None:
            writer.add_key_value(key, value, kind, item if kind == gguf.GGUFValueType.ARRAY else None)
    for name, data, kind in tensors:
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
