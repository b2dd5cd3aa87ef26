"""The dense Transformer: configs, cache, windows, checkpoints and what is wrong with them."""

import json
import math
import os
import pickle
import shutil
import struct
import time
import warnings
from functools import partial

import models
import pytest
import torch
from models import CONFIG, LLAMA3_ROPE, SMALL, change_config, random_tokens, split_weights
from safetensors.torch import load_file, save_file

from convert_hf_checkpoint import shapes_of
from formats.checkpoint import checkpoint_folder, fingerprint
from formats.config import FAMILIES, NUMBERS
from formats.named_configs import transformer_configs
from model import ModelArgs, Transformer, apply_rope, read_config, rope_inverse_frequencies

LLAMA = CONFIG | {"num_hidden_layers": 6}
build = partial(models.build, vector_std=0.2)


# ---------------------------------------------------------------- configs


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-2-7b", 6.738e9),
        ("llama-2-13b", 13.016e9),
        ("llama-2-70b", 68.977e9),
        ("llama-3-8b", 8.030e9),
        ("llama-3-70b", 70.554e9),
        ("llama-3.1-8b", 8.030e9),
        ("llama-3.2-1b", 1.236e9),
        ("llama-3.2-3b", 3.213e9),
        ("mistral-7b", 7.242e9),
        ("qwen2.5-0.5b", 0.494e9),
        ("qwen2.5-7b", 7.616e9),
        ("smollm2-135m", 134.5e6),
        ("qwen3-0.6b", 0.596e9),
        ("qwen3-8b", 8.191e9),
        ("gemma-3-4b", 3.880e9),
        ("phi-4", 14.660e9),
        ("olmo-2-7b", 7.299e9),
        ("pythia-6.9b", 6.857e9),
        ("opt-6.7b", 6.658e9),
        ("stories15M", 24.4e6),
    ],
)
def test_sizes_of_named_configs(name, parameters):
    found = sum(p.numel() for p in Transformer(ModelArgs.from_name(name), device="meta").parameters())
    assert found == pytest.approx(parameters, rel=1e-3)


def test_bytes_per_step_leaves_out_the_embedding():
    model = Transformer(ModelArgs.from_name("llama-3-8b"), device="meta", dtype=torch.bfloat16)
    embedding = 2 * 128256 * 4096
    assert model.bytes_per_step() == sum(p.nbytes for p in model.parameters()) - embedding
    tied = Transformer(ModelArgs.from_name("llama-3.2-1b"), device="meta", dtype=torch.bfloat16)
    assert tied.bytes_per_step() == sum(p.nbytes for p in tied.parameters())  # the head is read, as the embedding


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("Llama-2-7b-chat-hf", "llama-2-7b"),
        ("CodeLlama-7b-Python-hf", "CodeLlama-7b-Python-hf"),
        ("Meta-Llama-3.1-8B", "llama-3.1-8b"),
        ("vicuna-13B", "13B"),
        ("Mistral-7B-v0.1", "Mistral-7B"),
        ("stories15M", "stories15M"),
        ("SmolLM2-135M-Instruct", "smollm2-135m"),
        ("facebook/opt-6.7B", "opt-6.7b"),
        ("meta-llama/Meta-Llama-3-8B", "llama-3-8b"),
        ("mistralai/Mistral-7B-Instruct-v0.2", "Mistral-7B"),
        ("CodeLlama-13b-Python-hf", "13B"),
        ("google/gemma-3-4b-it", "gemma-3-4b"),
        *((key, key) for key in transformer_configs),
    ],
)
def test_the_longest_name_contained_decides(name, key):
    assert ModelArgs.from_name(name) == ModelArgs(**transformer_configs[key], name=name)
    for form in ("packed", "int8", "INT4"):
        expected = ModelArgs(**transformer_configs[key], quant=form.lower(), name=f"{name}-{form}")
        assert ModelArgs.from_name(f"{name}-{form}") == expected


TYPOS = "-packd -pack -packed8 -paked -int -int3 -int-8 -int88 -itn8 -fp8 -4bit -int8-chat -int8-int4 -packed- - _int8"


@pytest.mark.parametrize("name", ["gpt-x", "", "qwen3-1.7b", "213B", "llama-3-80b", "phi-4-mini", "llama-3-8b -int8"])
def test_an_unknown_name_lists_the_known_ones(name):
    with pytest.raises(ValueError, match=rf"{name!r}.*llama-3-8b.*smollm2-135m.*-packed, -int8, -int4"):
        ModelArgs.from_name(name)


@pytest.mark.parametrize("ending", [*TYPOS.split(), "int8", "packed", "\n", " "])
@pytest.mark.parametrize("name", ["llama-3-8b", "Meta-Llama-3-8B-Instruct", "13B"])
def test_a_mistyped_form_is_an_error(name, ending):
    with pytest.raises(ValueError) as error:
        Transformer.random_init(name + ending, device="meta")
    assert f"like {name + ending!r}; known: 13B" in str(error.value) and "\n" not in str(error.value)


def test_a_folder_may_be_called_anything_behind_its_config(tmp_path):
    for name, quant in {"Llama-2-7b-chat-hf-mine": "none", "llama-2-7b_v2-int8": "int8"}.items():
        assert read_config(tmp_path / name) == ModelArgs(**transformer_configs["llama-2-7b"], quant=quant, name=name)


def test_a_row_of_the_families_switches_fields_on(monkeypatch):
    monkeypatch.setitem(FAMILIES, "MineForCausalLM", {"qkv_bias": True, "tie_embeddings": True})
    args = ModelArgs.from_config(LLAMA | {"architectures": ["MineForCausalLM"]})
    assert args.qkv_bias and args.tie_embeddings


def test_from_config():
    args = ModelArgs.from_config(LLAMA | {"rms_norm_eps": 1e-5, "rope_theta": 5e5, "tie_word_embeddings": True})
    assert (args.n_layer, args.n_head, args.n_local_heads, args.dim, args.head_dim) == (6, 4, 2, 64, 16)
    assert (args.intermediate_size, args.vocab_size, args.block_size) == (96, 160, 128)
    assert (args.norm_eps, args.rope_base, args.tie_embeddings, args.qkv_bias) == (1e-5, 5e5, True, False)
    assert args.rope_scaling is None and args.sliding_window is None
    assert ModelArgs.from_config(LLAMA | {"head_dim": 24}).head_dim == 24
    assert ModelArgs.from_config({**LLAMA, "num_key_value_heads": None}).n_local_heads == 4
    by_type = {key: value for key, value in LLAMA.items() if key != "architectures"} | {"model_type": "qwen2"}
    assert ModelArgs.from_config(by_type).qkv_bias


@pytest.mark.parametrize(
    "scaling",
    [
        {"factor": 4.0, "type": "linear"},
        {"factor": 4.0, "rope_type": "linear"},
        LLAMA3_ROPE | {"original_max_position_embeddings": 8192},
        {"rope_type": "factors", "factors": [1.0, 2.0, 4.0, 8.0, 1.0, 1.0, 1.0, 1.0]},
    ],
)
def test_both_forms_of_rope_settings(scaling):
    old = ModelArgs.from_config(LLAMA | {"rope_theta": 3e4, "rope_scaling": scaling})
    new = ModelArgs.from_config(LLAMA | {"rope_parameters": {"rope_theta": 3e4, **scaling}})
    assert old == new and old.rope_base == 3e4 and old.rope_scaling["rope_type"] == scaling.get("rope_type", "linear")
    plain = rope_inverse_frequencies(ModelArgs(head_dim=16, rope_base=3e4))
    ratio = plain / rope_inverse_frequencies(old)
    if "factors" in scaling:
        torch.testing.assert_close(ratio, torch.tensor(scaling["factors"]))
    elif "low_freq_factor" in scaling:  # the shortest waves stay, the longest are stretched, all between in order
        assert ratio[0] == 1 and ratio[-1] == pytest.approx(8) and (ratio.diff() >= 0).all()
    else:
        torch.testing.assert_close(ratio, torch.full((8,), 4.0))


def test_default_rope_type_is_none():
    for key in ("rope_scaling", "rope_parameters"):
        args = ModelArgs.from_config(LLAMA | {key: {"rope_type": "default"}})
        assert args.rope_scaling is None and args.rope_base == 10000
    args = ModelArgs.from_config(LLAMA | {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}})
    assert args.rope_base == 7
    assert ModelArgs.from_config(LLAMA | {"rope_theta": None, "rms_norm_eps": None}) == ModelArgs.from_config(LLAMA)


QWEN = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 7}
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"]}
TYPES = ["full_attention", "sliding_attention"] * 3


@pytest.mark.parametrize(
    ("config", "window", "layers"),
    [
        (LLAMA | {"sliding_window": 7}, None, []),
        (MISTRAL | {"sliding_window": 7}, 7, [0, 1, 2, 3, 4, 5]),
        (MISTRAL | {"sliding_window": None}, None, []),
        (MISTRAL, None, []),
        (QWEN, None, []),
        (QWEN | {"use_sliding_window": False, "max_window_layers": 2}, None, []),
        (QWEN | {"use_sliding_window": True, "max_window_layers": 4}, 7, [4, 5]),
        (QWEN | {"use_sliding_window": True, "max_window_layers": 6}, None, []),
        (QWEN | {"use_sliding_window": True, "max_window_layers": 6, "layer_types": TYPES}, 7, [1, 3, 5]),
        (QWEN | {"use_sliding_window": True, "layer_types": ["full_attention"] * 6}, None, []),
    ],
)
def test_windows_of_a_config(config, window, layers):
    args = ModelArgs.from_config(config)
    assert (args.sliding_window, args.windowed_layers) == (window, layers)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            "GPT2LMHeadModel.*LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM",
        ),
        ({"architectures": None}, "unknown architecture None.*LlamaForCausalLM"),
        ({"architectures": [], "model_type": "gemma"}, "'GemmaForCausalLM'.*LlamaForCausalLM"),
        ({"rope_scaling": {"rope_type": "ntk", "factor": 4.0}}, "'ntk'.*linear, llama3, dynamic, yarn, longrope"),
        ({"rope_scaling": {"type": "linear"}}, "linear rope scaling needs a number.*'factor', it has none"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "llama3 rope scaling needs .*'low_freq_factor'",
        ),
        ({"hidden_act": "quick_gelu"}, "'quick_gelu'.*'silu', .*'relu'"),
        ({"architectures": ["MistralForCausalLM"], "attention_bias": True}, "attention_bias, which Mistral"),
        ({"architectures": ["Phi3ForCausalLM"], "mlp_bias": True}, "mlp_bias, which Phi3"),
        ({"num_key_value_heads": 3}, "4 heads do not divide into 3"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        ({"rope_theta": "1e4"}, "needs a number from .* as 'rope_theta', not '1e4'"),
        ({"hidden_size": None}, "needs a whole number from 1 .* as 'hidden_size', it has none"),
    ],
)
def test_configs_that_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ModelArgs.from_config(LLAMA | change)


WRONG_NUMBERS = [-1, 0, 1.5, math.nan, math.inf, 10**19, 10**400, True, "8", [8], {"a": 8}, "x" * 500]


@pytest.mark.parametrize("value", WRONG_NUMBERS, ids=lambda value: repr(value)[:9])
@pytest.mark.parametrize("field", NUMBERS)
def test_every_number_of_a_config_is_judged(field, value):
    key = NUMBERS[field][0]
    with pytest.raises(ValueError, match=rf"config.json needs a .*number from .* as '{key}', not ") as error:
        ModelArgs.from_config(LLAMA | {key: value})
    assert len(str(error.value)) < 350


@pytest.mark.parametrize("value", ["false", "", 1, [], [True], 0.0, math.nan], ids=repr)
@pytest.mark.parametrize("key", ["tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"])
def test_a_switch_is_true_or_false(key, value):
    with pytest.raises(ValueError, match=f"needs true or false as '{key}', not "):
        ModelArgs.from_config(MISTRAL | {key: value})
    assert ModelArgs.from_config(LLAMA | {key: None}) == ModelArgs.from_config(LLAMA)


def test_whole_floats_and_swish_are_read():
    args = ModelArgs.from_config(LLAMA | {"num_hidden_layers": 6.0, "hidden_act": "swish"})
    assert args == ModelArgs.from_config(LLAMA) and isinstance(args.n_layer, int)
    assert ModelArgs.from_config(LLAMA | {"quantization_config": None}).quant == "none"


@pytest.mark.parametrize(
    "change",
    [
        {"architectures": 3},
        {"architectures": [3]},
        {"architectures": "LlamaForCausalLM"},
        {"architectures": [["LlamaForCausalLM"]]},
        {"architectures": None, "model_type": 3},
        {"architectures": ["Qwen2MoeForCausalLM"]},
        {"num_experts": 8},
        {"_name_or_path": 3},
        {"hidden_act": None},
        {"head_dim": 10**6},
        {"rope_scaling": [1]},
        {"rope_scaling": "linear"},
        {"rope_scaling": {"rope_type": ["linear"]}},
        {"rope_scaling": {"rope_type": "default", "rope_theta": -1}},
        {"rope_theta": 0},
        {"rope_theta": math.nan},
        {"partial_rotary_factor": 0.5},
        *({"rope_scaling": {"rope_type": "linear", "factor": x}} for x in (0, -1, math.nan, math.inf, "4", True, [4])),
        *({"rope_scaling": LLAMA3_ROPE | {key: 0}} for key in LLAMA3_ROPE if key != "rope_type"),
        {"rope_scaling": LLAMA3_ROPE | {"high_freq_factor": 1.0}},
        *({"rope_scaling": {"rope_type": "factors", "factors": x}} for x in ([], [1.0] * 7, [0.0] * 8, 3, ["1"] * 8)),
        {"quantization_config": {"quant_method": "gptq"}},
        *({"quantization": x} for x in ("int8", [1], {"mode": []}, {"mode": "int9"})),
        *({"quantization": {"mode": "int4", "groupsize": x}} for x in (0, -64, "64", True, 1.5)),
    ],
    ids=repr,
)
def test_parts_of_a_config_are_judged(change):
    with pytest.raises(ValueError, match=r".") as error:
        ModelArgs.from_config(LLAMA | change)
    assert type(error.value) is ValueError and len(str(error.value)) < 500


@pytest.mark.parametrize(
    "change",
    [
        *({"sliding_window": x} for x in (-1, 1.5, "7", True, [7], math.nan)),
        {"max_window_layers": -1},
        *({"layer_types": x} for x in (["full_attention"], TYPES + TYPES, ["x"] * 6, [1] * 6, "x", {})),
    ],
    ids=repr,
)
def test_windows_are_judged(change):
    with pytest.raises(ValueError, match=r"config.json needs "):
        ModelArgs.from_config(QWEN | {"use_sliding_window": True} | change)


@pytest.mark.parametrize(
    "key", ["hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size", "vocab_size"]
)
def test_missing_key_is_named(key):
    with pytest.raises(ValueError, match=key):
        ModelArgs.from_config({k: v for k, v in LLAMA.items() if k != key})


# ---------------------------------------------------------------- forward

VARIANTS = {
    "plain": {},
    "grouped": {"n_local_heads": 2},
    "one key head, head_dim of its own": {"n_local_heads": 1, "head_dim": 12},
    "tied, biases": {"tie_embeddings": True, "qkv_bias": True, "n_local_heads": 2},
    "window": {"sliding_window": 4},
    "window in one layer, grouped": {"sliding_window": 5, "windowed_layers": [1], "n_local_heads": 2},
    "norms of q and k, soft caps": {"qk_norm": "head", "attention_softcap": 2.0, "logit_softcap": 3.0},
    "learned positions, no gate": {"learned_positions": True, "rotary_share": 0.0, "gated": False, "norm": "layer"},
    "layers of their own": {
        "unrotated_layers": [0],
        "windowed_layers": [1],
        "sliding_window": 5,
        "local_rope_base": 9.0,
    },
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_decoding_with_a_cache_equals_the_full_forward(variant, batch):
    model, idx = build(**VARIANTS[variant]), random_tokens(batch, 20)
    full = model(idx)
    assert full.shape == (batch, 20, 96)
    model.setup_caches(batch, 24)  # longer than what is used
    parts = [model(idx[:, a:b], torch.arange(a, b)) for a, b in ((0, 7), (7, 11))]  # a prompt, then another
    parts += [model(idx[:, i : i + 1], torch.tensor([i])) for i in range(11, 20)]
    torch.testing.assert_close(torch.cat(parts, dim=1), full, atol=1e-4, rtol=1e-4)
    # a second text in the same cache is not disturbed by what the first left behind
    again = random_tokens(batch, 9, seed=2)
    torch.testing.assert_close(model(again, torch.arange(9)), model(again), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(
    ("layers", "windowed", "seen"),
    [
        (1, [0], range(7, 11)),  # query 10 sees keys j with 6 < j <= 10
        (2, [0, 1], range(4, 11)),
        (2, [0], range(11)),
        (2, [1], range(11)),
    ],
)
def test_a_window_sees_exactly_its_width(cached, layers, windowed, seen):
    model, idx = build(n_layer=layers, sliding_window=4, windowed_layers=windowed), random_tokens(1, 12)
    model.setup_caches(1, 12)

    def last(idx):
        if not cached:
            return model(idx)[0, 10]
        model(idx[:, :10], torch.arange(10))
        return model(idx[:, 10:11], torch.tensor([10]))[0, 0]

    def changed(position):
        other = idx.clone()
        other[0, position] = (other[0, position] + 1) % 96
        return not torch.equal(last(other), last(idx))

    assert [i for i in range(12) if changed(i)] == list(seen)


def test_the_window_is_in_its_layers():
    """Layer 0's window narrows what its later layers read; layer 1's does not touch layer 0."""
    idx, logits = random_tokens(1, 12), {}
    for windowed in ((0,), (1,)):
        model = build(sliding_window=4, windowed_layers=list(windowed))
        inputs = []
        model.layers[1].register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0]))
        model(idx)
        logits[windowed] = inputs[0]
    plain = build()
    plain.layers[1].register_forward_pre_hook(lambda _, args: logits.update(plain=args[0]))
    plain(idx)
    torch.testing.assert_close(logits[(1,)], logits["plain"], atol=1e-4, rtol=1e-4)
    assert (logits[(0,)] - logits["plain"])[:, 4:].abs().max() > 0.01


def test_positions_are_relative():
    model = build()
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0)).double()

    def dot(i, j):
        angles = torch.tensor([[i], [j]]) * model.inv_freq.double()
        rotated = [apply_rope(x, angles[n : n + 1].cos(), angles[n : n + 1].sin()) for n, x in enumerate((q, k))]
        return (rotated[0] * rotated[1]).sum()

    torch.testing.assert_close(dot(3, 1), dot(13, 11), atol=1e-5, rtol=1e-5)
    assert (dot(3, 1) - dot(3, 2)).abs() > 1e-3


def test_num_logits():
    model, idx = build(), random_tokens(2, 9)
    full = model(idx)
    assert torch.equal(model(idx, num_logits=0), full)
    for n in (1, 4, 9):
        torch.testing.assert_close(model(idx, num_logits=n), full[:, -n:])


def test_cache_beyond_the_context_is_refused():
    model = build()
    model.setup_caches(1, 64)
    with pytest.raises(ValueError, match=r"65 positions.*64"):
        model.setup_caches(1, 65)


def test_forward_without_positions_leaves_the_cache_alone():
    model = build()
    model.setup_caches(1, 16)
    model(random_tokens(1, 5))
    assert not model.layers[0].attention.kv_cache.k_cache.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_keeps_the_frequencies(dtype):
    model = build()
    before = model.inv_freq.clone()
    model = model.to(dtype)
    assert model.norm.weight.dtype == model.tok_embeddings.weight.dtype == dtype
    assert model.inv_freq.dtype == torch.float32 and torch.equal(model.inv_freq, before)
    assert "inv_freq" not in model.state_dict()
    model.setup_caches(1, 8)
    assert model.layers[0].attention.kv_cache.k_cache.dtype == dtype
    assert model(random_tokens(1, 3), torch.arange(3)).dtype == dtype


def test_default_dtype_does_not_matter():
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = Transformer(ModelArgs(**SMALL), dtype=torch.float32)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(model.inv_freq, build().inv_freq)


def test_random_init(monkeypatch):
    monkeypatch.setitem(transformer_configs, "tiny-model", SMALL | {"qkv_bias": True})
    model = Transformer.random_init("tiny-model", dtype=torch.float32, seed=3)
    again = Transformer.random_init("tiny-model", dtype=torch.float32, seed=3)
    other = Transformer.random_init("tiny-model", dtype=torch.float32, seed=4)
    for (name, p), q, r in zip(model.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q) and not p.requires_grad
        if p.dim() == 2:
            assert not torch.equal(p, r) and p.std() == pytest.approx(0.02, rel=0.1)
        else:
            assert (p == (0 if name.endswith("bias") else 1)).all()
    assert model(random_tokens(1, 4)).isfinite().all() and not model.training


# ---------------------------------------------------------------- layer by layer


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_walk_is_the_forward_pass(variant):
    model = build(**VARIANTS[variant])
    batches = [random_tokens(2, 12), random_tokens(1, 12, seed=3)]
    for layer in model.walk(batches):
        seen = [x.clone() for x in layer.inputs]
        if layer.index == 0:
            layer.outputs  # noqa: B018 asked for here or not, the next layer gets them
        assert layer.block is model.layers[layer.index] and len(seen) == 2
    for batch, x in zip(batches, layer.outputs, strict=True):
        torch.testing.assert_close(model.head(model.norm(x)), model(batch), atol=1e-5, rtol=1e-5)
    assert list(model.walk([]))[-1].outputs == []


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_cached_walk_runs_a_part_of_the_positions_again(variant):
    model, tail = build(**VARIANTS[variant]), slice(9, None)
    for layer in model.walk([random_tokens(3, 12)], cached=True):
        (x,), (dense,) = layer.inputs, layer.outputs
        again = layer.block(x[:, tail], *layer.arguments_at(tail))
        torch.testing.assert_close(again, dense[:, tail], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.head(model.norm(dense)), model(random_tokens(3, 12)), atol=1e-4, rtol=1e-4)
    assert all(block.attention.kv_cache is None for block in model.layers)


def test_expected_shapes_are_those_of_a_checkpoint_with_projections_apart():
    config = {"architectures": ["Qwen2ForCausalLM"], "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96}
    shapes = shapes_of(config)
    assert len(shapes) == 3 + 2 * 12 and shapes["output.weight"] == (96, 32)
    assert shapes["layers.1.attention.wk.weight"] == (16, 32) and shapes["layers.1.attention.wk.bias"] == (16,)
    assert shapes["layers.0.feed_forward.w3.weight"] == (48, 32) and shapes["layers.0.ffn_norm.weight"] == (32,)
    assert "output.weight" not in shapes_of(config | {"tie_word_embeddings": True})


# ---------------------------------------------------------------- checkpoints


def test_checkpoint_folder(tiny, tmp_path):
    assert checkpoint_folder(tiny) == checkpoint_folder(tiny / "model.safetensors") == tiny
    assert checkpoint_folder(str(tiny / "config.json")) == tiny
    with pytest.raises(ValueError, match=r"no checkpoint at .*absent"):
        checkpoint_folder(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"no checkpoint at .*other\.safetensors"):
        checkpoint_folder(tiny / "other.safetensors")
    with pytest.raises(ValueError, match=r"has no model\.safetensors.*model\.pth"):
        checkpoint_folder(tmp_path)


def test_loads_what_the_file_holds(tiny):
    tensors = load_file(tiny / "model.safetensors")
    model = Transformer.from_checkpoint(tiny, dtype=torch.float32)
    attention, mlp = model.layers[1].attention, model.layers[1].feed_forward
    assert torch.equal(attention.wqkv.weight, torch.cat([tensors[f"layers.1.attention.w{n}.weight"] for n in "qkv"]))
    assert torch.equal(mlp.w13.weight, torch.cat([tensors[f"layers.1.feed_forward.w{n}.weight"] for n in "13"]))
    assert torch.equal(model.output_weight, tensors["output.weight"])
    assert model.config.name == "tiny" and not model.norm.weight.requires_grad and not model.training
    assert Transformer.from_checkpoint(tiny).norm.weight.dtype == torch.bfloat16


def test_shards_equal_one_file(tiny, copy):
    split_weights(copy)
    idx = random_tokens(1, 8)
    whole, parts = (Transformer.from_checkpoint(folder, dtype=torch.float32) for folder in (tiny, copy))
    assert torch.equal(whole(idx), parts(idx))


@pytest.mark.parametrize("tied", [False, True])
def test_gpt_fast_checkpoint(tiny, tmp_path, monkeypatch, tied):
    tensors = load_file(tiny / "model.safetensors")
    if tied:
        tensors["output.weight"] = tensors["tok_embeddings.weight"]
    fused = dict(tensors)
    for i in range(2):
        parts = [fused.pop(f"layers.{i}.attention.w{n}.weight") for n in "qkv"]
        fused[f"layers.{i}.attention.wqkv.weight"] = torch.cat(parts)
    folder = tmp_path / "Org-Shrunk-7B-chat"
    folder.mkdir()
    torch.save(fused, folder / "model.pth")
    shape = {"n_layer": 2, "n_head": 4, "n_local_heads": 2, "dim": 32, "head_dim": 8, "intermediate_size": 48}
    shape |= {"vocab_size": 300, "norm_eps": 1e-6, "tie_embeddings": tied}
    monkeypatch.setitem(transformer_configs, "shrunk-7b", shape)
    idx = random_tokens(2, 8)
    whole = Transformer.from_checkpoint(tiny, dtype=torch.float32)
    if tied:
        whole.output.weight.data.copy_(tensors["output.weight"])
    monkeypatch.chdir(folder)
    for path in (folder, folder / "model.pth", "model.pth", "."):
        model = Transformer.from_checkpoint(path, dtype=torch.float32)
        assert torch.equal(whole(idx), model(idx)) and model.config.name == "Org-Shrunk-7B-chat"


def truncate(path, size):
    os.truncate(path, size if size >= 0 else os.path.getsize(path) + size)


def edit_index(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def as_hugging_face(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors.pop("tok_embeddings.weight")
    save_file(tensors, folder / "model.safetensors")


def as_pth(folder, value):
    (folder / "model.safetensors").unlink()
    torch.save(value, folder / "model.pth")


class Mischief:
    def __reduce__(self):
        return print, ("a pickle was run",)


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


DAMAGE = {
    "cut at the end": (lambda f: truncate(f / "model.safetensors", -100), r"model\.safetensors cannot be read.*trunc"),
    "cut in the header": (lambda f: truncate(f / "model.safetensors", 50), "cannot be read.*truncated"),
    "empty": (lambda f: truncate(f / "model.safetensors", 0), "cannot be read.*truncated"),
    "pth cut": (lambda f: [as_pth(f, {"a": torch.ones(9)}), truncate(f / "model.pth", -500)], "cannot be read.*trunc"),
    "pth empty": (lambda f: [as_pth(f, {}), truncate(f / "model.pth", 0)], "cannot be read.*truncated"),
    "pth that runs code": (
        lambda f: as_pth(f, {"a": Mischief()}),
        r"model\.pth is refused: it would run print;",
    ),
    "pth of no dict": (lambda f: as_pth(f, [1, 2]), r"model\.pth"),
    "a plain pickle": (
        lambda f: [(f / "model.safetensors").unlink(), (f / "model.pth").write_bytes(pickle.dumps({"a": 1}))],
        r"it is truncated or no weight file: Unsupported operand",
    ),
    "missing shard": (
        lambda f: [split_weights(f), (f / "model-00002-of-00002.safetensors").unlink()],
        "shard 'model-00002-of-00002.safetensors', which is missing",
    ),
    "shard outside": (
        lambda f: [split_weights(f), edit_index(f, lambda i: i["weight_map"].update(x="../model.safetensors"))],
        r"'\.\./model\.safetensors' outside its folder",
    ),
    "shard at an absolute path": (
        lambda f: [split_weights(f), edit_index(f, lambda i: i["weight_map"].update(x="/etc/passwd"))],
        "'/etc/passwd' outside its folder",
    ),
    "index without a map": (lambda f: [split_weights(f), edit_index(f, lambda i: i.clear())], "has no weight_map"),
    "index with a list": (
        lambda f: [split_weights(f), edit_index(f, lambda i: i.update(weight_map=["a"]))],
        "has no weight_map",
    ),
    "index of numbers": (
        lambda f: [split_weights(f), edit_index(f, lambda i: i.update(weight_map={"x": 3}))],
        "has no weight_map",
    ),
    "index cut": (lambda f: [split_weights(f), truncate(f / "model.safetensors.index.json", 40)], "is not valid JSON"),
    "not converted": (as_hugging_face, "holds a Hugging Face checkpoint.*convert_hf_checkpoint.py --checkpoint_dir"),
    "other shapes": (
        lambda f: change_config(f, intermediate_size=64),
        r"w1\.weight is \(48, 32\).*\(64, 32\)",
    ),
    "too many layers": (lambda f: change_config(f, num_hidden_layers=3), "num_hidden_layers 3, but .* 2 layers"),
    "too few layers": (lambda f: change_config(f, num_hidden_layers=1), "num_hidden_layers 1, but .* 2 layers"),
    "a tensor missing": (lambda f: rewrite(f, lambda t: t.pop("layers.1.attention.wk.weight")), r"do not fit.*wqkv"),
    "a part of another shape": (
        lambda f: rewrite(f, lambda t: t.update({"layers.1.attention.wk.weight": torch.ones(16, 31)})),
        "do not fit",
    ),
    "config not JSON": (lambda f: truncate(f / "config.json", 30), r"config\.json is not valid JSON"),
    "no heads": (
        lambda f: change_config(f, num_attention_heads=0, head_dim=None),
        "as 'num_attention_heads', not 0",
    ),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "holds a list"),
    "config absent": (lambda f: (f / "config.json").unlink(), "no config is named like 'copy'"),
    "other architecture": (
        lambda f: change_config(f, architectures=["BertModel"]),
        "BertModel.*LlamaForCausalLM",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_checkpoints(copy, kind, capsys):
    damage, message = DAMAGE[kind]
    damage(copy)
    with pytest.raises(ValueError, match=message) as error:
        Transformer.from_checkpoint(copy)
    assert "\n" not in str(error.value) and len(str(error.value)) < 700
    assert "a pickle was run" not in capsys.readouterr().out


@pytest.mark.parametrize("stored", ["own", "the embedding"])
def test_a_stored_head_is_used_although_tied(copy, stored):
    tensors = load_file(copy / "model.safetensors")
    if stored == "the embedding":
        rewrite(copy, lambda t: t.update({"output.weight": t["tok_embeddings.weight"].clone()}))
    change_config(copy, tie_word_embeddings=True)
    own = stored == "own"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = Transformer.from_checkpoint(copy, dtype=torch.float32)
    assert [("lm_head" in str(w.message)) for w in caught] == [True] * own
    assert torch.equal(model.output_weight, tensors["output.weight" if own else "tok_embeddings.weight"])


@pytest.mark.parametrize("layers", [10_000, 10**9, 10**18])
def test_layers_that_the_weights_lack_take_no_memory(copy, layers):
    change_config(copy, num_hidden_layers=layers)
    begin = time.monotonic()
    with pytest.raises(ValueError, match="num_hidden_layers"):
        Transformer.from_checkpoint(copy)
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize("key", ["hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "head_dim"])
def test_widths_are_compared_before_memory_is_taken(copy, key, monkeypatch):
    change_config(copy, **{key: 65536})
    monkeypatch.setattr(Transformer, "load_state_dict", None)
    with pytest.raises(ValueError, match=r"do not fit its config: .*config.json asks for \(|do not divide"):
        Transformer.from_checkpoint(copy)


@pytest.mark.parametrize("quant", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.complex64, torch.bool])
def test_weights_of_another_dtype_are_not_cast(copy, quant, dtype):
    """Into a quantised file no other dtype is cast; into a file of floats no integers and no complex numbers."""
    config = models.TINY | {"intermediate_size": 64, "quantization": {"mode": quant, "groupsize": 16}}
    with torch.device("meta"):
        meta = Transformer(ModelArgs.from_config(config))
    tensors = {n: torch.ones(t.shape).to(t.dtype) for n, t in meta.state_dict().items()}
    change_config(copy, **config)
    save_file(tensors, copy / "model.safetensors")
    Transformer.from_checkpoint(copy)
    for name, tensor in tensors.items():
        exact = name.endswith(".scale") or not tensor.is_floating_point()
        if name.startswith("layers.1") and tensor.dtype != dtype and (exact or not dtype.is_floating_point):
            save_file(tensors | {name: torch.ones(tensor.shape, dtype=dtype)}, copy / "model.safetensors")
            with pytest.raises(ValueError, match=rf"{name} is \(.*\) \w+, config.json asks for \(.*\) \w+"):
                Transformer.from_checkpoint(copy)


def test_fingerprint(tiny, copy):
    first = fingerprint(tiny)
    assert len(first) == 32 and fingerprint(copy) == first  # not of the folder's place
    (copy / "calibration.safetensors").write_bytes(b"x")
    assert fingerprint(copy) == first
    rewrite(copy, lambda t: t["layers.1.feed_forward.w2.weight"].view(-1)[17].add_(1e-3))
    weights = fingerprint(copy)
    change_config(copy, rope_theta=2e4)
    config = fingerprint(copy)
    split_weights(copy)
    assert len({first, weights, config, fingerprint(copy)}) == 4


def test_fingerprint_of_a_large_file_samples_all_of_it(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(8 << 20))
    found = {fingerprint(tmp_path)}
    for position in (0, 1 << 20, 4 << 20, 7 << 20):
        with open(path, "r+b") as file:
            file.seek(position)
            file.write(b"x")
        found.add(fingerprint(tmp_path))
    assert len(found) == 5


# ---------------------------------------------------------------- a trained model


def test_stories_260k(data, tmp_path):
    """llama2.c's file: 7 ints, then float32 tensors, all layers of a kind together; rotary pairs adjacent as ours."""
    pytest.importorskip("sentencepiece")
    from tokenizer import load_tokenizer

    raw = (data / "stories260K" / "stories260K.bin").read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, context = struct.unpack("7i", raw[:28])
    values = torch.frombuffer(bytearray(raw[28:]), dtype=torch.float32)
    kv = dim // heads * kv_heads
    state = {}
    for name, *shape in (
        ("tok_embeddings", vocab, dim),
        ("attention_norm", dim),
        ("attention.wq", dim, dim),
        ("attention.wk", kv, dim),
        ("attention.wv", kv, dim),
        ("attention.wo", dim, dim),
        ("ffn_norm", dim),
        ("feed_forward.w1", hidden, dim),
        ("feed_forward.w2", dim, hidden),
        ("feed_forward.w3", hidden, dim),
        ("norm", dim),
    ):
        keys = [name] if name in ("tok_embeddings", "norm") else [f"layers.{i}.{name}" for i in range(layers)]
        for key in keys:
            count = torch.Size(shape).numel()
            state[f"{key}.weight"], values = values[:count].view(shape), values[count:]
    assert len(values) == context * (dim // heads)  # cosines and sines; the head is the embedding

    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": dim,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "model.safetensors")
    shutil.copyfile(data / "stories260K" / "tok512.model.purewater", tmp_path / "tokenizer.model")
    model, tokenizer = Transformer.from_checkpoint(tmp_path, dtype=torch.float32), load_tokenizer(tmp_path, vocab)
    model.setup_caches(1, 64)
    ids = [tokenizer.bos_id]
    for i in range(60):
        ids.append(model(torch.tensor([[ids[-1]]]), torch.tensor([i]))[0, -1].argmax().item())
    assert tokenizer.decode(ids).startswith("Once upon a time, there was a little girl named Lily. She loved to play")
