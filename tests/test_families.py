"""Every family of models, through the real converter, against transformers; and what sparsity makes of its block."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from models import decode, edit_json, flags, random_tokens
from references import MODELS, NOT_IN_GGUF, byte_level_vocabulary, edit_gguf, reference, write_gguf
from safetensors.torch import load_file, save_file
from tokenizers import ByteLevelBPETokenizer

import calibrate
import eval
import generate
import greedy
import quantize
import refine
from convert_hf_checkpoint import main as convert
from decoder import Generator, fusable, unknown_parts
from formats.config import FAMILIES, config_fields
from formats.gguf_file import byte_level_tokenizer
from kernels import cpu
from model import ModelArgs, Transformer
from sparse_model import SparseTransformer
from thresholds import Cuts, load_table
from tokenizer import load_tokenizer

OLDER = ("Llama", "Mistral", "Qwen2")  # tests/test_convert.py has them in more forms
NEW = [name for name, (family, _) in MODELS.items() if family not in OLDER or "yarn" in name or "dynamic" in name]
NEW += ["llama-biases", "llama-gelu"]
# one of each family, which differ in their blocks
BLOCKS = "qwen3 phi3-longrope granite-biases smollm3 olmo2 gemma2 gemma3 gpt-neox gpt-neox-sequential opt".split()
LENGTH = 40  # beyond every window and original context of MODELS


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[tuple[str, str], Path]:
    """Converted checkpoints by name and source, made when they are first asked for, by `converted`."""
    return {(): tmp_path_factory.mktemp("families")}


def converted(folders: dict, name: str, source: str = "hf") -> Path:
    if (name, source) not in folders:
        root = folders[()] / f"{name}-{source}"
        root.mkdir()
        if source == "hf":
            reference(name, vocab_size=260).save_pretrained(root / "hf", max_shard_size="40KB")
            path = {"checkpoint_dir": root / "hf"}
        else:
            path = {"gguf": write_gguf(root / "m.gguf", reference(name, vocab_size=260))}
        folders[name, source] = convert(flags(**path, output_dir=root / "out"))
    return folders[name, source]


def tokens(rows: int = 2, length: int = LENGTH) -> torch.Tensor:
    return random_tokens(rows, length, 260)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def build(folder: Path, cls: type = SparseTransformer) -> Transformer:
    return cls.from_checkpoint(folder, dtype=torch.float32)


# ---------------------------------------------------------------- logits

SOURCES = [(name, source) for name in NEW for source in ("hf", "gguf") if source == "hf" or name not in NOT_IN_GGUF]


@pytest.mark.parametrize(("name", "source"), SOURCES)
@torch.no_grad()
def test_logits_equal_transformers(folders, name, source):
    folder = converted(folders, name, source)
    assert_close(build(folder, Transformer)(tokens()), reference(name, vocab_size=260)(tokens()).logits)


@pytest.mark.parametrize("name", NEW)
@torch.no_grad()
def test_decoding_equals_the_whole_pass(folders, name):
    model = build(converted(folders, name), Transformer)
    assert_close(decode(model, tokens(), prompt=5), model(tokens()))


@pytest.mark.parametrize("name", ["llama-dynamic", "phi3-longrope"])
@torch.no_grad()
def test_frequencies_follow_the_length_that_a_cache_is_set_up_for(folders, name):
    model, short = build(converted(folders, name), Transformer), tokens(1, 20)
    within = model(short)
    assert_close(decode(model, short, prompt=5), within)
    model.setup_caches(1, 64)  # beyond the original context
    assert (model(short, torch.arange(20)) - within).abs().max() > 1e-2
    assert torch.equal(model(short), within)  # not through the cache
    model.setup_caches(1, 32)
    assert_close(model(short, torch.arange(20)), within)


def test_older_hugging_face_forms(tmp_path):
    """Keys and names as the hub's folders have them, where transformers now writes others."""
    neox, opt, gemma = reference("gpt-neox"), reference("opt"), reference("gemma3")
    for model, name in ((neox, "neox"), (opt, "opt"), (gemma, "gemma")):
        model.save_pretrained(tmp_path / name)

    def rewrite(name: str, rename, drop: tuple[str, ...], **keys) -> None:
        weights = tmp_path / name / "model.safetensors"
        save_file({rename(key): tensor for key, tensor in load_file(weights).items()}, weights)
        config = json.loads((tmp_path / name / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(
            json.dumps({key: value for key, value in config.items() if key not in drop} | keys)
        )

    rewrite(
        "neox",
        lambda n: n.replace("lm_head", "embed_out"),
        ("rope_parameters",),
        rotary_pct=0.25,
        rotary_emb_base=10000,
    )
    weights = tmp_path / "neox/model.safetensors"
    buffers = {"attention.bias": torch.ones(1, 1, 8, 8), "attention.masked_bias": torch.tensor(-1e9)}
    buffers = {f"gpt_neox.layers.0.{name}": buffer for name, buffer in buffers.items()}
    save_file(
        load_file(weights) | buffers | {"gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(2)}, weights
    )
    rewrite("opt", lambda n: n.removeprefix("model."), ("tie_word_embeddings", "activation_function"))

    # a multimodal Gemma 3: its language model alone is taken
    text = json.loads((tmp_path / "gemma/config.json").read_text())
    text = {k: v for k, v in text.items() if k not in ("rope_parameters", "layer_types", "architectures")}
    text |= {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_theta": 1e6, "rope_local_base_freq": 1e4}
    text |= {"sliding_window_pattern": 3}
    multimodal = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text, "vision_config": {}}
    rewrite("gemma", lambda n: f"language_model.{n}", (*text, "rope_parameters", "layer_types"), **multimodal)
    weights = tmp_path / "gemma/model.safetensors"
    save_file(load_file(weights) | {"vision_tower.vision_model.embeddings.weight": torch.ones(3)}, weights)

    for model, name in ((neox, "neox"), (opt, "opt"), (gemma, "gemma")):
        out = convert(flags(checkpoint_dir=tmp_path / name, output_dir=tmp_path / f"{name}-out"))
        idx = random_tokens(1, LENGTH, 160)
        with torch.no_grad():
            assert_close(build(out, Transformer)(idx), model(idx).logits)


# ---------------------------------------------------------------- configs

CHANGES = {  # a model of MODELS -> keys of its config.json whose change must show
    "qwen3": [
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0, "layer_types": None},
        {"rms_norm_eps": 0.5},
    ],
    "llama-yarn": [
        *(
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0} | more}
            for more in (
                {},
                {"original_max_position_embeddings": 32, "truncate": False},
                {"original_max_position_embeddings": 32, "attention_factor": 2.0},
            )
        ),
        {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 4.0}},
    ],
    "llama-dynamic": [
        {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}},
        {"max_position_embeddings": 24},
    ],
    "phi3-longrope": [{"original_max_position_embeddings": 64}, {"sliding_window": 7}],
    "granite": [{key: 2.0} for key in ("embedding_multiplier", "residual_multiplier", "attention_multiplier")]
    + [{"logits_scaling": 2.0}, {"hidden_act": "relu"}],
    "smollm3": [{"no_rope_layers": [1, 1, 1, 1]}, {"no_rope_layers": None, "no_rope_layer_interval": 2}],
    "gemma2": [
        {"attn_logit_softcapping": None},
        {"final_logit_softcapping": None},
        {"query_pre_attn_scalar": 100},
        {"sliding_window": 9},
        {"layer_types": ["full_attention"] * 2},
        {"hidden_activation": "gelu"},
    ],
    "gemma3": [{"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}, "rope_local_base_freq": 1e3}],
    "gpt-neox": [
        {"use_parallel_residual": False},
        {"hidden_act": "relu"},
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ],
    "opt": [{"activation_function": "gelu"}],
}


@pytest.mark.parametrize(
    ("name", "change"), [(name, change) for name, all_ in CHANGES.items() for change in all_], ids=str
)
@torch.no_grad()
def test_a_field_of_the_config_changes_the_logits(folders, name, change):
    """The same weights; so transformers' logits must change with it, and ours as they do."""
    folder, idx = converted(folders, name), tokens(1)
    config = json.loads((folder / "config.json").read_text())
    model = Transformer(ModelArgs.from_config(config | change), dtype=torch.float32)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    plain = build(folder, Transformer)(idx)
    assert (model(idx) - plain).abs().max() > 1e-4 * plain.abs().max()


# fields of ModelArgs that the row of a family switches on
ROWS = [
    ("qwen3", {"qk_norm": ""}),
    ("olmo2", {"qk_norm": ""}),
    ("olmo2", {"post_norm": False}),
    ("gemma2", {"norm": "rms"}),
    ("gemma2", {"post_norm": False}),
    ("gemma2", {"embedding_multiplier": 1.0}),
    ("gemma3", {"local_rope_base": 0.0}),
    ("gemma3", {"qk_norm": ""}),
    ("gpt-neox", {"rotary_share": 1.0}),
    ("opt", {"learned_positions": False}),
    ("opt", {"o_bias": False}),
]


@pytest.mark.parametrize(("name", "change"), ROWS, ids=str)
@torch.no_grad()
def test_a_switch_of_a_family_changes_the_logits(folders, name, change):
    folder, idx = converted(folders, name), tokens(1)
    fields = config_fields(json.loads((folder / "config.json").read_text())) | change
    model = Transformer(ModelArgs(**fields), dtype=torch.float32)
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    plain = build(folder, Transformer)(idx)
    assert (model(idx) - plain).abs().max() > 1e-3 * plain.abs().max()


REFUSED = [
    ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before False, which is not supported; True is"),
    ("opt", {"word_embed_proj_dim": 32}, "word_embed_proj_dim 32, which is supported only as hidden_size"),
    ("opt", {"word_embed_proj_dim": "x"}, "word_embed_proj_dim 'x'"),
    ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine False"),
    ("opt", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm True"),
    ("opt", {"ffn_dim": 0}, "as 'ffn_dim', not 0"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
    ("gemma2", {"attn_logit_softcapping": -1.0}, "as 'attn_logit_softcapping', not -1.0"),
    ("gemma2", {"query_pre_attn_scalar": 0}, "as 'query_pre_attn_scalar', not 0"),
    ("gemma2", {"hidden_activation": "tanh"}, "hidden_activation 'tanh'; supported: 'silu'"),
    ("gemma3", {"sliding_window_pattern": 0, "layer_types": None}, "as 'sliding_window_pattern', not 0"),
    ("gemma3", {"rope_parameters": {"full_attention": 3}}, "rope settings 3"),
    (
        "gemma3",
        {"rope_parameters": {"full_attention": {}, "sliding_attention": {"rope_type": "yarn"}}},
        "'yarn' in sliding layers",
    ),
    ("granite", {"logits_scaling": 0}, "as 'logits_scaling', not 0"),
    ("smollm3", {"no_rope_layers": [1]}, "1 no_rope_layers for 4 layers"),
    ("smollm3", {"no_rope_layers": [2] * 4}, "as 'no_rope_layers'"),
    (
        "qwen3",
        {"rope_scaling": {"rope_type": "longrope", "long_factor": [1.0] * 12}, "rope_parameters": None},
        "'short_fa",
    ),
    ("llama-yarn", {"rope_parameters": {"rope_type": "yarn", "factor": -1}}, "yarn rope scaling needs .* as 'factor'"),
    ("llama-yarn", {"rope_parameters": {"rope_type": "yarn", "truncate": 1}}, "as 'truncate', not 1"),
    ("llama-dynamic", {"rope_parameters": {"rope_type": "dynamic"}}, "dynamic rope scaling needs .* as 'factor'"),
    ("llama-dynamic", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}, "head_dim": 2}, "head_dim 2"),
    (
        "phi3-longrope",
        {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0]}},
        "1 rope factors in config.json do not fit",
    ),
    ("llama-yarn", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "not defined for .* rope_theta 1.0"),
    ("gpt-neox", {"rope_parameters": {"partial_rotary_factor": 0.2}}, "partial_rotary_factor 0.2"),
    ("gpt-neox", {"use_parallel_residual": "yes"}, "as 'use_parallel_residual', not 'yes'"),
]


@pytest.mark.parametrize(("name", "change", "message"), REFUSED, ids=str)
def test_what_is_not_implemented_is_named(folders, name, change, message):
    config = json.loads((converted(folders, name) / "config.json").read_text())
    with pytest.raises(ValueError, match=message) as error:
        ModelArgs.from_config(config | change)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize("value", [-1, 1.5, "x", [1], True, 10**30], ids=repr)
def test_longrope_of_a_wrong_original_context(folders, value):
    config = json.loads((converted(folders, "phi3-longrope") / "config.json").read_text())
    with pytest.raises(ValueError, match="needs a whole number"):
        ModelArgs.from_config(config | {"original_max_position_embeddings": value})


def test_every_family_has_a_model_here():
    assert {f"{family}ForCausalLM" for family, _ in MODELS.values()} == set(FAMILIES)


# ---------------------------------------------------------------- sparsity follows from the block


def cut_at_random(model: SparseTransformer) -> list[torch.Tensor]:
    """Cuts about half of each input; returns the thresholds, other ones for every input and projection."""
    generator, scales = torch.Generator().manual_seed(5), []
    hooks = [
        m.register_forward_pre_hook(lambda m, args: scales.append(args[0].abs().mean().item())) for m in model.sites
    ]
    model(tokens(1))
    for hook in hooks:
        hook.remove()
    cuts = [
        2 * scale * torch.rand(m.threshold.shape, generator=generator)
        for m, scale in zip(model.sites, scales, strict=True)
    ]
    model.set_cuts(Cuts(0.5, cuts, [None] * len(cuts)))
    return cuts


def mask_by_hand(dense: Transformer, thresholds: list[torch.Tensor], prefix: int) -> None:
    """Hooks on the dense layers: every projection sees the input with its own small values zeroed, after a prefix."""

    def hook(module, args, output, thresholds):
        (x,) = args
        cut = [torch.where(x.abs() > t, x, 0.0) for t in thresholds]
        weights = module.weight.split(list(module.segments.values()))
        y = torch.cat([F.linear(x, weight) for x, weight in zip(cut, weights, strict=True)], -1)
        y = y if module.bias is None else y + module.bias
        return torch.cat((output[:, :prefix], y[:, prefix:]), 1)

    for module, t in zip(dense.sites, thresholds, strict=True):
        module.register_forward_hook(lambda module, args, output, t=t: hook(module, args, output, t))


@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_sparse_equals_dense_or_masked_inputs(folders, name):
    folder = converted(folders, name)
    dense, sparse = build(folder, Transformer), build(folder)
    assert [list(m.segments) for m in sparse.sites[:4]] == [list(m.segments) for m in dense.sites[:4]]
    assert_close(decode(sparse, tokens(), prompt=5), dense(tokens()))
    thresholds = cut_at_random(sparse)
    mask_by_hand(dense, thresholds, 5)
    assert_close(decode(sparse, tokens(), prompt=5), dense(tokens()))
    sparse.reset_counts()
    assert_close(sparse(tokens(), dense_prefix=5), dense(tokens()))
    assert 0.3 < sparse.achieved_sparsity() < 0.7


@pytest.mark.parametrize("mode", ["int8", "int4"])
@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_quantised_weights_agree_with_what_they_stand_for(folders, tmp_path, name, mode):
    folder = converted(folders, name)
    config = json.loads((folder / "config.json").read_text())
    quantised = quantize.quantize_model(build(folder), tokens()[:0], mode, 16)
    rest = {n: w for n, w in load_file(folder / "model.safetensors").items()}
    rest = {n: w for n, w in rest.items() if ".".join(n.split(".")[-2:]) not in quantize.QUANTIZED}
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization": {"mode": mode, "groupsize": 16}}))
    save_file({n: w.contiguous() for n, w in (rest | quantised).items()}, tmp_path / "model.safetensors")
    sparse, dense = build(tmp_path), build(folder, Transformer)
    for ours, theirs in zip(dense.sites, sparse.sites, strict=True):
        ours.weight.copy_(theirs.dequantized(torch.float32).t())
        assert theirs.form.name == ("int4" if mode == "int4" and "q" not in theirs.segments else "int8")
    head = build(tmp_path, Transformer).output
    expected = F.linear(dense.norm(final_states(dense)), torch.eye(dense.config.dim))  # the head is a tensor of its own
    logits = dense.head(expected) if head is None else head(expected)
    scaling, cap = dense.config.logits_scaling, dense.config.logit_softcap
    logits = logits / scaling
    logits = cap * torch.tanh(logits / cap) if cap else logits
    assert_close(decode(sparse, tokens(), prompt=5), logits)


def final_states(model: Transformer) -> torch.Tensor:
    return list(model.walk([tokens()]))[-1].outputs[0]


@pytest.mark.parametrize("name", ["qwen3", "gpt-neox", "opt"])
def test_every_script_takes_the_family(folders, tmp_path, capsys, name):
    """Statistics, both rules, int8, perplexity and text, of blocks with and without a gate."""
    folder = converted(folders, name)
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(["a story of rivers"] * 4, vocab_size=260, show_progress=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    edit_json(folder / "config.json", bos_token_id=None, eos_token_id=None)
    run = {"checkpoint_path": folder, "precision": "float32", "device": "cpu"}
    statistics = calibrate.main(flags(**run, num_tokens=256))
    report = capsys.readouterr().out
    gated = name == "qwen3"
    assert statistics.projections == [*"qkvo", *["gate"] * gated, "up", "down"]
    assert ("inputs of down that are exactly 0" in report) == (name == "opt")

    (tmp_path / "text.txt").write_text("a story of rivers and of seas " * 60)
    data = {"data": tmp_path / "text.txt"}
    table = greedy.main(flags(**run, **data, num_tokens=128, step=0.5))
    assert table.tensors["0.gate_up.threshold"].shape[1] == 1 + gated
    assert table.tensors["0.shares"].shape[1] == 6 + gated
    assert ("gate" in capsys.readouterr().out) == gated
    load_table(folder / "thresholds_greedy.safetensors", folder)
    if name == "opt":  # the least that refine does
        refine.main(flags(**run, **data, num_tokens=128, updates=1))

    for rule in ("uniform", "greedy", *["refined"] * (name == "opt")):
        text = generate.main(flags(**run, thresholds=rule, sparsity=0.5, prompt="a", max_new_tokens=4, num_samples=1))
        assert 0.2 < text["achieved_sparsity"] < 0.8
    result = eval.main(flags(**run, **data, sparsity=0.4, context=30, window=10, num_windows=2, thresholds="greedy"))
    assert 0.3 < result["achieved_sparsity"] < 0.5 and result["perplexity"] > 1
    out = quantize.main(flags(**run, mode="int8", num_tokens=64, output_dir=tmp_path / "int8"))
    assert eval.main(flags(checkpoint_path=out, **data, context=30, window=10, num_windows=2))["perplexity"] > 1


@pytest.mark.parametrize("name", MODELS)
def test_the_fused_steps_take_what_they_implement(folders, name):
    config = ModelArgs.from_config(reference(name).config.to_dict())
    plain = MODELS[name][0] in OLDER and name not in ("llama-yarn", "mistral-yarn", "llama-biases", "llama-gelu")
    assert fusable(config) == (plain or name in ("phi3", "phi3-window"))
    assert all(len(part) < 200 for part in unknown_parts(config))


# ---------------------------------------------------------------- tokenizers


def test_the_tokenizer_of_opt_is_made_of_its_two_files(tmp_path):
    """The hub's folders of OPT have vocab.json and merges.txt alone; every text begins with </s>."""
    tokens, merges = byte_level_vocabulary()
    vocab = {token: i for i, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", *tokens])}
    reference("opt", vocab_size=270, bos_token_id=2, eos_token_id=2).save_pretrained(tmp_path / "hf")
    (tmp_path / "hf/vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "hf/merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    named = {f"{name}_token": {"content": "</s>", "__type": "AddedToken"} for name in ("bos", "eos", "unk")}
    settings = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, **named}
    (tmp_path / "hf/tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(convert(flags(checkpoint_dir=tmp_path / "hf", output_dir=tmp_path / "out")), 270)
    theirs = ByteLevelBPETokenizer(str(tmp_path / "hf/vocab.json"), str(tmp_path / "hf/merges.txt"))
    text = "the river's naïve 1234 stones\n\n  in  the sea"
    assert tokenizer.adds_bos and tokenizer.bos_id == 2 and tokenizer.eos_ids == (2,)
    assert tokenizer.encode(text, bos=tokenizer.adds_bos) == [2, *theirs.encode(text).ids]
    assert tokenizer.decode(theirs.encode(text).ids) == text

    for change in ({"ab": 300}, {"ab": "x"}, {"ab": [1]}, {"ab": 3}):
        (tmp_path / "hf/vocab.json").write_text(json.dumps(vocab | change))
        with pytest.raises(ValueError, match=r"vocab.json has no token of id|do not fit"):
            convert(flags(checkpoint_dir=tmp_path / "hf", output_dir=tmp_path / "again"))
    (tmp_path / "hf/merges.txt").unlink()
    with pytest.raises(ValueError, match=r"vocab.json has no token|merges.txt does not exist"):
        convert(flags(checkpoint_dir=tmp_path / "hf", output_dir=tmp_path / "again"))


# what the families' own templates do beyond Llama's, in their words
TEMPLATES = {
    "gemma3": "{{ bos_token }}{% set first = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}"
    "{% for m in messages if m['role'] != 'system' %}<start_of_turn>{{ m['role'] }}\n{{ first if loop.first }}"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    "qwen3": "{%- set ns = namespace(last=messages|length - 1) %}{%- for m in messages[::-1] %}"
    "{%- set ns.last = loop.index0 %}{%- endfor %}{%- for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content.split('</think>')[-1].lstrip('\n') }}<|im_end|>\n{%- endfor %}{%- if add_generation_prompt %}"
    "<|im_start|>assistant\n{%- if enable_thinking is defined and enable_thinking is false %}<think>{%- endif %}"
    "{%- endif %}",
    "granite": "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}"
    "{%- set rest = messages[1:] %}{%- else %}{%- set system = 'Today is ' + strftime_now('%Y') %}"
    "{%- set rest = messages %}{%- endif %}{{ '<|start_of_role|>system<|end_of_role|>' + system + '\n' }}"
    "{%- for m in rest %}{{ '<|start_of_role|>' + m['role'] + '<|end_of_role|>' + m['content'] }}{%- endfor %}",
    "smollm3": "{%- for m in messages %}{%- if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{%- else %}{{ '<|im_start|>' ~ m.role ~ '\n' ~ (m.content if m.content is string else '') }}"
    "{{ '<|im_end|>\n' }}{%- endif %}{%- endfor %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("source", ["hf", "gguf"])
def test_chat_templates(tmp_path, name, source):
    model = reference(name, vocab_size=260, num_hidden_layers=2)
    if source == "gguf":
        path = {"gguf": write_gguf(tmp_path / "m.gguf", model, tokenizer__chat_template=TEMPLATES[name])}
    else:
        model.save_pretrained(tmp_path / "hf")
        tokens, merges = byte_level_vocabulary()
        tokenizer = byte_level_tokenizer(tokens, [3] + [1] * (len(tokens) - 1), merges, "smollm")
        (tmp_path / "hf/tokenizer.json").write_text(tokenizer.to_str())
        (tmp_path / "hf/chat_template.jinja").write_text(TEMPLATES[name])
        path = {"checkpoint_dir": tmp_path / "hf"}
    tokenizer = load_tokenizer(convert(flags(**path, output_dir=tmp_path / "out")), 260)
    text = tokenizer.decode(tokenizer.encode_chat([{"role": "user", "content": "the {{ bos_token }} sea"}]))
    assert "the {{ bos_token }} sea" in text and "user" in text


def test_a_sentencepiece_tokenizer_without_a_space_before_the_text(tmp_path):
    """Gemma's in GGUF: add_space_prefix is false, and pieces are scored."""
    pieces = [
        "<pad>",
        "<eos>",
        "<bos>",
        "<unk>",
        *(f"<0x{i:02X}>" for i in range(256)),
        "\u2581",
        "a",
        "b",
        "\u2581a",
        "ab",
    ]
    model = reference("gemma2", vocab_size=len(pieces))
    path = write_gguf(tmp_path / "m.gguf", model)
    keys = {"tokens": pieces, "model": "llama", "pre": "default", "scores": [-float(i) for i in range(len(pieces))]}
    keys |= {"token_type": [3, 3, 3, 2, *[6] * 256, *[1] * 5], "bos_token_id": 2, "eos_token_id": 1, "merges": None}
    keys |= {"add_space_prefix": False, "unknown_token_id": 3}
    path = edit_gguf(path, **{f"tokenizer__ggml__{key}": value for key, value in keys.items()})
    tokenizer = load_tokenizer(convert(flags(gguf=path, output_dir=tmp_path / "out")), len(pieces))
    ids = tokenizer.encode("ab a", bos=tokenizer.adds_bos)
    assert [pieces[i] for i in ids] == ["<bos>", "ab", "\u2581a"] and tokenizer.decode(ids[1:]) == "ab a"


# ---------------------------------------------------------------- compiled and fused


@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_a_step_is_one_graph(folders, name):
    """torch.compile takes the whole step of every block, the sparse op in it; so a GPU records it as a CUDA graph."""
    torch._dynamo.reset()
    model, idx = build(converted(folders, name)), tokens(1)
    cut_at_random(model)
    expected = decode(model, idx, prompt=36)
    step = torch.compile(lambda token, position: model(token, position), fullgraph=True, backend="aot_eager")
    actual = [step(idx[:, i : i + 1], torch.tensor([i])) for i in range(36, LENGTH)]
    assert_close(torch.cat(actual, 1), expected[:, 36:])


@pytest.mark.parametrize("name", BLOCKS)
def test_rows_equal_their_single_runs(folders, name):
    """Each prompt's pass writes its own row of the cache, in every block."""
    model, prompts = build(converted(folders, name)), tokens(3, 6)
    cut_at_random(model)
    together = Generator(model, 3, LENGTH, 0.8, 20)(prompts, 30).new
    for row, prompt in enumerate(prompts):
        alone = Generator(model, 1, LENGTH, 0.8, 20, seed=row)(prompt[None], 30).new
        assert torch.equal(alone[0], together[row])


@pytest.mark.skipif(cpu.library() is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("name", ["phi3", "phi3-window", "llama-dynamic", "linear"])
def test_a_fused_step_of_what_it_implements(folders, name):
    """Among them the frequencies of a cache beyond the original context."""
    model, idx = build(converted(folders, name)), tokens(1, 8)
    eager = Generator(model, 1, 64, temperature=0)(idx, 50).tokens
    assert torch.equal(Generator(model, 1, 64, temperature=0, step="fused")(idx, 50).tokens, eager)
