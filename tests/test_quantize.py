"""int8 checkpoints: what rounding costs, that every way through the model means the same weights, errors."""

import json

import pytest
import torch

from generate import Generator
from generate import main as generate
from kernels import cpu
from model import ModelArgs, Transformer, read_config
from quantize import main as quantize
from quantize import quantize_int8
from sparse_model import SparseTransformer

TINY = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture
def checkpoint(tmp_path):
    """A tied checkpoint of random weights."""
    from safetensors.torch import save_file

    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY))
    model = Transformer(read_config(folder), dtype=torch.float32)
    model.init_weights(0, std=0.1)
    save_file({name: tensor for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    return folder


def test_rounding_is_to_the_nearest_of_255_values():
    weight = torch.randn(50, 70, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    rounded, scale = quantize_int8(weight)
    assert rounded.dtype == torch.int8 and rounded.abs().max() == 127 and scale.dtype == torch.float32
    assert ((rounded * scale[:, None] - weight).abs() <= scale[:, None] * 0.5001).all()
    assert not rounded[3].any()
    torch.testing.assert_close(rounded.abs().amax(1)[0] * scale[0], weight[0].abs().max())


def test_weights_that_are_not_finite_are_refused():
    weight = torch.ones(2, 2)
    weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match="not finite"):
        quantize_int8(weight)


def test_every_class_computes_with_the_same_weights(checkpoint):
    folder = quantize(str(checkpoint), "int8", None)
    assert folder.name == "tiny-int8" and read_config(folder).quant == "int8"
    original = Transformer.from_checkpoint(checkpoint, dtype=torch.float32)
    dense = Transformer.from_checkpoint(folder, dtype=torch.float32)
    sparse = SparseTransformer.from_checkpoint(folder, dtype=torch.float32)
    idx = torch.randint(300, (2, 20), generator=torch.Generator().manual_seed(1))
    expected = dense(idx)
    torch.testing.assert_close(sparse(idx), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sparse(idx, dense_prefix=3), expected, rtol=1e-4, atol=1e-4)  # thresholds are 0
    error = (expected - original(idx)).norm() / original(idx).norm()
    assert 1e-4 < error < 0.03  # rounded, and no more than that

    by_hand = original  # the original with the weights that the int8 ones stand for
    for module, source in zip(by_hand.projections, dense.projections, strict=True):
        module.weight.data = source.weight * source.scale[:, None]
    logits = by_hand.norm(torch.randn(1, 1, 64))
    torch.testing.assert_close(dense.output(logits), logits @ (dense.output.weight * dense.output.scale[:, None]).t())
    for module, source in zip(sparse.projections, by_hand.projections, strict=True):
        torch.testing.assert_close(module.dequantized(torch.float32), source.weight.t())


def test_decoding_equals_the_whole_pass(checkpoint):
    folder = quantize(str(checkpoint), "int8", None)
    model = SparseTransformer.from_checkpoint(folder, dtype=torch.float32)
    prompt = torch.randint(300, (1, 5), generator=torch.Generator().manual_seed(2))
    tokens = Generator(model, 1, 25, temperature=0)(prompt, 15).tokens
    assert torch.equal(model(tokens[:, :-1])[:, 4:].argmax(-1), tokens[:, 5:])


def test_bytes_of_a_step_are_those_of_the_int8_weights(checkpoint):
    folder = quantize(str(checkpoint), "int8", None)
    model = SparseTransformer.from_checkpoint(folder, dtype=torch.bfloat16)
    matrices = 2 * (64 * 128 + 64 * 64 + 3 * 64 * 172) + 300 * 64
    scales = 4 * (2 * (128 + 64 + 2 * 172 + 64) + 300)
    assert model.bytes_per_step() == matrices + scales + 2 * 5 * 64  # and the norms
    assert sum(m.scale.nbytes for m in model.projections) + model.output.scale.nbytes == scales
    assert model.to(torch.float16).layers[0].attention.wo.scale.dtype == torch.float32


@pytest.mark.parametrize("cls", [Transformer, SparseTransformer])
def test_sums_of_integers_do_not_overflow_in_float16(cls):
    model = cls(ModelArgs(dim=64, n_head=4, intermediate_size=172, n_layer=1, quant="int8"), dtype=torch.float16)
    module = model.projections[1]
    module.weight.data.fill_(127)
    module.scale.fill_(1e-3)
    expected = torch.full((1, 2, 64), 64 * 100 * 0.127, dtype=torch.float16)
    x = torch.full((1, 2, 64), 100.0, dtype=torch.float16)  # 64 * 100 * 127 is beyond float16
    torch.testing.assert_close(module(x), expected, rtol=2e-3, atol=0)
    torch.testing.assert_close(module(x[:, :1]), expected[:, :1], rtol=2e-3, atol=0)


def test_random_weights_by_name():
    model = Transformer(ModelArgs.from_name("stories15M-int8"), dtype=torch.float32)
    model.init_weights(0)
    module = model.projections[0]
    assert module.weight.dtype == torch.int8
    assert (module.weight * module.scale[:, None]).std().item() == pytest.approx(0.02, rel=0.02)


def test_the_command_line_generates_with_it():
    result = generate(
        random_init="stories15M-int8", sparsity=0.5, max_new_tokens=4, num_samples=1, device="cpu",
        precision="float32", compare_dense=True,
    )  # fmt: skip
    assert 0.3 < result["achieved_sparsity"] < 0.7
    assert result["dense_backend"] == ("the sparse kernel at threshold 0" if cpu.library() else "torch linear")


def test_errors(checkpoint, tmp_path):
    folder = quantize(str(checkpoint), "int8", str(tmp_path / "out"))
    with pytest.raises(ValueError, match="out is quantised already"):
        quantize(str(folder), "int8", str(tmp_path / "again"))
    with pytest.raises(ValueError, match="out is there already"):
        quantize(str(checkpoint), "int8", str(folder))
    (checkpoint / "config.json").write_text(json.dumps({**TINY, "quantization": {"mode": "int3"}}))
    with pytest.raises(ValueError, match=r"quantised \(int3\)"):
        read_config(checkpoint)
