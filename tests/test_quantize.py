"""int8 and int4 checkpoints: what rounding costs, that every way through the model means the same weights, errors."""

import math
import shutil

import pytest
import torch
from models import CONFIG, SMALL, build, change_config, flags, random_tokens, write_checkpoint

import generate
import quantize as script
from calibrate import collect, statistics_for
from decoder import Generator, GraphedPrefill
from formats.checkpoint import fingerprint
from formats.files import read_json
from kernels import cpu
from kernels.quantized import (
    SHORT,
    Form,
    dequantize,
    fill_random,
    pack_int4,
    product,
    quantized_product,
    transposed,
)
from kernels.sparse_gemv import sparse_gemv, sparse_gemv_ref
from model import ModelArgs, Transformer, read_config
from quantize import gptq, int8_scale, quantize_model, quantize_weight, round_int4, round_int8
from sparse_model import SparseTransformer
from thresholds import STATISTICS_NAME, Cuts, CutTable, cuts_for, load_statistics, recorded_perplexity

SHAPE = {"intermediate_size": 176, "vocab_size": 300, "max_position_embeddings": 256, "tie_word_embeddings": True}
SHAPE = CONFIG | SHAPE
MODES = ["int8", "int4"]


def quantize(folder, mode, output=None, **options):
    options = {"num_tokens": 0, "precision": "float32", "device": "cpu"} | options
    options = ({"groupsize": 16} if mode == "int4" else {}) | options
    return script.main(flags(checkpoint_path=folder, mode=mode, output_dir=output, **options))


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A tied checkpoint of random weights."""
    return write_checkpoint(tmp_path_factory.mktemp("org") / "tiny", SHAPE, std=0.1)


@pytest.fixture
def checkpoint(written, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(written, tmp_path / "tiny")


def test_int8_is_the_nearest_of_255_values():
    weight = randn(50, 70)
    weight[:, 3] = 0
    scale = int8_scale(weight)
    value, codes = round_int8(weight, scale)
    assert codes.dtype == torch.int8 and codes.abs().max() == 127 and scale.dtype == torch.float32
    assert ((value - weight).abs() <= scale * 0.5001).all()
    assert not codes[:, 3].any()
    torch.testing.assert_close(dequantize(codes, scale, torch.float32), value)


@pytest.mark.parametrize("groupsize", [2, 16, 64])
def test_int4_means_what_it_was_rounded_to(groupsize):
    weight = randn(50, 192) + 0.3
    weight[3] = 0
    weight[4] = -1.5
    weight[5, :64] *= 1e-20
    value, codes, scale = round_int4(weight, groupsize)
    assert codes.dtype == torch.uint8 and codes.max() == 15 and scale.dtype == torch.bfloat16
    packed = pack_int4(codes)
    assert packed.shape == (50, 96) and scale.shape == (50, 192 // groupsize, 2)
    assert packed[7, 5] == codes[7, 10] + 16 * codes[7, 11]
    assert torch.equal(dequantize(packed, scale, torch.float32), value)  # so s and m were bfloat16 already
    torch.testing.assert_close(value[3:5], weight[3:5])


@pytest.mark.parametrize("device", ["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("out_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("form", "groupsize"), [("int8", 0), ("int4", 16), ("int4", 48), ("int4", 64)])
def test_a_gpu_dequantises_to_the_bit(form, groupsize, dtype, out_first, device):
    if device == "interpreter" and torch.cuda.is_available():
        pytest.skip("the kernel runs on the GPU here")
    launch = pytest.importorskip("kernels.triton_dequantize").launch_dequantize
    for n_in, n_out in ((40, 192), (129, 576), (1, 192)):
        weight, scale = Form.named(form, dtype, groupsize).empty(n_in, {"o": n_out}, out_first=out_first)
        fill_random(weight, scale, 0.3, torch.Generator().manual_seed(0))
        scale.copy_(scale * (0.5 + torch.rand(scale.shape, generator=torch.Generator().manual_seed(1))))
        weight, scale = transposed(weight, scale) if out_first else (weight, scale)
        expected = dequantize(weight, scale, dtype)
        weight, scale = (t if device == "interpreter" else t.cuda() for t in (weight, scale))
        found = launch(weight, scale, dtype).cpu()
        assert (found.stride(0) == 1) == (out_first or n_in == 1) or found.stride(1) == 1
        if device == "interpreter" and dtype == torch.bfloat16:  # the interpreter cuts the bits that do not fit
            assert ((found - expected).abs() <= 2**-7 * expected.abs()).all()
        else:
            assert torch.equal(found, expected)


@pytest.mark.parametrize("device", ["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("form", "groupsize"), [("int8", 0), ("int4", 16), ("int4", 48), ("int4", 64)])
@pytest.mark.parametrize(("tokens", "n_in", "n_out"), [((1,), 40, 192), ((2, 3), 700, 192), ((70,), 129, 576)])
def test_a_short_prompts_product_is_as_precise_as_torchs(form, groupsize, dtype, device, tokens, n_in, n_out):
    if device == "interpreter" and (torch.cuda.is_available() or dtype == torch.bfloat16):
        pytest.skip("the kernel runs on the GPU here; the interpreter has no product of bfloat16")
    launch = pytest.importorskip("kernels.triton_dequantize").launch_product
    weight, scale = Form.named(form, dtype, groupsize).empty(n_in, {"o": n_out})
    fill_random(weight, scale, 0.3, torch.Generator().manual_seed(0))
    scale.copy_(scale * (0.5 + torch.rand(scale.shape, generator=torch.Generator().manual_seed(1))))
    x = randn(math.prod(tokens), n_in).to(dtype).view(*tokens, n_in)
    exact = x.double() @ dequantize(weight, scale, torch.float32 if form == "int8" else dtype).double()
    tensors = [t if device == "interpreter" else t.cuda() for t in (x, weight, scale)]
    found = [launch(*tensors).cpu() for _ in range(2)]  # the second time by what the first one compiled
    assert torch.equal(*found) and found[0].dtype == dtype
    error = (found[0].double() - exact).abs()
    assert (error <= torch.finfo(dtype).eps / 2 * exact.abs() + 1e-6 * n_in).all()


@pytest.mark.gpu
@pytest.mark.parametrize("groupsize", [16, 48, 64, 128])
def test_a_short_prompts_product_widens_int4_as_dequantize_does(groupsize):
    launch = pytest.importorskip("kernels.triton_dequantize").launch_product
    weight, scale = Form.named("int4", torch.bfloat16, groupsize).empty(128, {"o": 384}, device="cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    weight.random_(0, 256, generator=generator)
    scale.copy_(torch.rand(scale.shape, device="cuda", generator=generator) + 0.5)
    scale[..., 1] *= -(2.0 ** torch.randint(-14, 7, scale.shape[:2], device="cuda", generator=generator))
    for tokens in (64, 128):  # a product's two tiles
        parts = torch.eye(128, device="cuda", dtype=torch.bfloat16).split(tokens)
        found = torch.cat([launch(x, weight, scale) for x in parts])
        assert torch.equal(found, dequantize(weight, scale, torch.bfloat16))


LONG = {"block_size": SHORT + 60, "dim": 512, "n_head": 8, "intermediate_size": 2048, "n_layer": 5, "o_bias": True}


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_on_a_gpu_short_and_long_products_agree_and_have_gradients(mode):
    model = build(SparseTransformer, SMALL | LONG, device="cuda", dtype=torch.bfloat16, quant=mode)
    for site in model.sites[:4]:
        x = randn(SHORT + 1, site.threshold.shape[1]).to("cuda", torch.bfloat16)
        long, weight = product(x, site), site.dequantized(torch.bfloat16)
        assert torch.equal(long, x @ weight)
        for tokens in (5, SHORT + 1):
            arguments = x[:tokens], site.weight, site.scale
            torch.library.opcheck(quantized_product, arguments, test_utils=("test_schema", "test_faketensor"))
        short, close = product(x[:-1], site), {"rtol": 1e-2, "atol": 1e-2 * long.abs().max().item()}
        torch.testing.assert_close(short, long[:-1], **close)
        assert not torch.equal(short, long[:-1]) and torch.equal(product(x[:60], site)[:5], product(x[:5], site))
        inputs = x[:5].clone().requires_grad_()
        product(inputs, site).sum().backward()
        torch.testing.assert_close(inputs.grad, weight.sum(1).expand(5, -1), **close)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_a_recorded_prompt_equals_the_eager_one(mode):
    model = build(SparseTransformer, SMALL | LONG, device="cuda", dtype=torch.bfloat16, quant=mode, std=0.05)
    model.setup_caches(1, SHORT + 60)
    tokens = torch.randint(0, 96, (3, 1, SHORT + 50), device="cuda")

    def run(_model, prompt, *_):
        return model(prompt, torch.arange(prompt.shape[1], device="cuda"), num_logits=1, from_start=True)

    with torch.inference_mode():
        expected, graphed = [run(model, prompt) for prompt in tokens], GraphedPrefill(run)
        for prompt, logits in zip([*tokens, *tokens], [*expected, *expected], strict=True):
            assert torch.equal(graphed(model, prompt), logits)


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["int8", "int4"])
def test_a_gpus_dequantised_weight_takes_one_launch(form):
    weight, scale = Form.named(form, torch.bfloat16, 64).empty(256, {"o": 512}, device="cuda")
    fill_random(weight, scale, 0.3, torch.Generator("cuda").manual_seed(0))
    dequantize(weight, scale, torch.bfloat16)
    with torch.profiler.profile() as profiler:
        dequantize(weight, scale, torch.bfloat16)
        torch.cuda.synchronize()
    assert [event.name for event in profiler.events() if event.device_type.name == "CUDA"] == ["_dequantize_kernel"]


def test_int4_beats_the_range_of_every_group():
    weight = randn(200, 64)
    low, high = weight.aminmax(dim=1, keepdim=True)
    step = (high - low) / 15
    plain = ((weight - low) / step).round() * step + low
    error = (round_int4(weight, 64)[0] - weight).square().mean(1)
    assert error.mean() < 0.9 * (plain - weight).square().mean()
    assert (error < 1.02 * (plain - weight).square().mean(1)).all()  # bfloat16 costs a little


@pytest.mark.parametrize("mode", MODES)
def test_gptq_lowers_the_error_of_the_outputs(mode):
    x = randn(2000, 32) @ randn(32, 160, seed=1) + 0.1 * randn(2000, 160, seed=2)
    weight = randn(160, 64, seed=3)
    scale = int8_scale(weight)
    rounding, form = {"int8": (round_int8, scale), "int4": (round_int4, 16)}[mode]

    def error(hessian):
        tensors = quantize_weight("w", weight, hessian, mode, 16)
        codes, found = tensors["w.weight"].t(), tensors["w.scale"]
        found = dequantize(codes, found.transpose(0, 1) if mode == "int4" else found, torch.float32)
        return (x @ (found - weight)).norm() / (x @ weight).norm()

    assert error(x.t() @ x) < 0.6 * error(torch.zeros(160, 160))
    codes, expected = gptq(weight, torch.zeros(160, 160), rounding, form)[0], rounding(weight, form)[1]
    assert torch.equal(codes, expected)  # no text: to nearest


@pytest.mark.parametrize("mode", MODES)
def test_what_is_not_finite_is_refused(mode):
    weight, hessian = torch.ones(16, 16), torch.zeros(16, 16)
    with pytest.raises(ValueError, match="choose another --precision"):
        quantize_weight("w", weight, hessian + float("nan"), mode, 16)
    weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match="w cannot be quantised, it has weights that are not finite"):
        quantize_weight("w", weight, hessian, mode, 16)


@pytest.mark.parametrize("mode", MODES)
def test_every_class_computes_with_the_same_weights(checkpoint, mode):
    folder = quantize(checkpoint, mode)
    assert folder.name == f"tiny-{mode}" and read_config(folder).quant == mode
    original = Transformer.from_checkpoint(checkpoint, dtype=torch.float32)
    dense = Transformer.from_checkpoint(folder, dtype=torch.float32)
    sparse = SparseTransformer.from_checkpoint(folder, dtype=torch.float32)
    idx = random_tokens(2, 20, 300)
    expected = dense(idx)
    torch.testing.assert_close(sparse(idx), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sparse(idx, dense_prefix=3), expected, rtol=1e-4, atol=1e-4)  # thresholds are 0
    error = (expected - original(idx)).norm() / original(idx).norm()
    assert (1e-4 < error < 0.03) if mode == "int8" else (0.01 < error < 0.4)  # rounded, and no more than that

    # the original with the weights that the quantised ones stand for
    for module, source in zip(original.sites, sparse.sites, strict=True):
        assert (module.weight - source.dequantized(torch.float32).t()).norm() < 0.12 * module.weight.norm()
        module.weight.data = source.dequantized(torch.float32).t()
    original.output = dense.output
    torch.testing.assert_close(original(idx), expected, rtol=1e-4, atol=1e-4)
    x = randn(1, 1, 64)
    torch.testing.assert_close(dense.output(x), x @ (dense.output.weight * dense.output.scale[:, None]).t())


def test_fused_projections_are_those_of_the_single_ones():
    """Parts stacked along out, each with whole groups."""
    module = build(SparseTransformer, CONFIG, std=0.02).sites[0]
    zeros = torch.zeros(64, 64)
    whole = quantize_weight("wqkv", module.weight, zeros, "int4", 32)
    parts = [
        quantize_weight(n, w, zeros, "int4", 32)
        for n, w in zip("qkv", module.weight.split([64, 32, 32], 1), strict=True)
    ]
    for kind in ("weight", "scale"):
        stacked = torch.cat([part[f"{n}.{kind}"] for n, part in zip("qkv", parts, strict=True)])
        assert torch.equal(whole[f"wqkv.{kind}"], stacked)


@pytest.mark.parametrize("mode", MODES)
def test_a_text_makes_the_outputs_better(checkpoint, mode):
    model = SparseTransformer.from_checkpoint(checkpoint, dtype=torch.float32)
    windows = random_tokens(8, 100, 300)
    errors = []
    for text in (windows[:0], windows):
        config = ModelArgs.from_config(SHAPE | {"quantization": {"mode": mode, "groupsize": 16}})
        quantized = SparseTransformer(config, dtype=torch.float32)
        quantized.load_state_dict(quantize_model(model, text, mode, 16), strict=False)
        for name in ("tok_embeddings", "norm"):
            quantized.get_submodule(name).load_state_dict(model.get_submodule(name).state_dict())
        for theirs, ours in zip(quantized.layers, model.layers, strict=True):
            theirs.attention_norm, theirs.ffn_norm = ours.attention_norm, ours.ffn_norm
        errors.append((quantized(windows) - model(windows)).norm())
    assert errors[1] < 0.85 * errors[0]


@pytest.mark.parametrize("mode", MODES)
def test_decoding_equals_the_whole_pass(checkpoint, mode):
    folder = quantize(checkpoint, mode)
    model = SparseTransformer.from_checkpoint(folder, dtype=torch.float32)
    prompt = random_tokens(1, 5, 300, seed=2)
    tokens = Generator(model, 1, 25, temperature=0)(prompt, 15).tokens
    assert torch.equal(model(tokens[:, :-1])[:, 4:].argmax(-1), tokens[:, 5:])


def test_the_op_takes_packed_weights():
    weight, x = randn(48, 96), randn(3, 48, seed=1)
    value, codes, scale = round_int4(weight, 32)
    threshold = torch.full((2, 48), 0.5)
    arguments = (x, pack_int4(codes), threshold, [32, 64], scale)
    expected = torch.where(x.abs() <= 0.5, 0, x) @ value
    torch.testing.assert_close(sparse_gemv_ref(*arguments), expected)
    torch.testing.assert_close(sparse_gemv(*arguments), expected)
    torch.library.opcheck(sparse_gemv, arguments)


@pytest.mark.parametrize("mode", MODES)
def test_bytes_of_a_step_are_those_of_the_quantised_weights(checkpoint, mode):
    model = SparseTransformer.from_checkpoint(quantize(checkpoint, mode), dtype=torch.bfloat16)
    outputs = 2 * (128 + 64 + 2 * 176 + 64)
    weights = 2 * (64 * 128 + 64 * 64 + 3 * 64 * 176)
    rest = 300 * 64 + 4 * 300 + 2 * 5 * 64  # lm_head, its scales, and the norms
    wqkv = 2 * 64 * 128  # int8 in both
    in_rows = weights if mode == "int8" else wqkv + (weights - wqkv) // 2 + (weights - wqkv) // 16 * 4
    scales = 4 * outputs if mode == "int8" else 4 * 2 * 128
    assert model.bytes_per_step() == in_rows + scales + rest
    model.set_cuts(Cuts(0.99, [torch.full_like(m.threshold, float("inf")) for m in model.sites], [None] * 8))
    model(torch.zeros(1, 9, dtype=torch.int64), dense_prefix=2)
    assert model.bytes_per_step() == scales + rest  # a cut input's row skips the scales that are its own
    assert model.to(torch.float16).layers[0].attention.wo.scale.dtype == (
        torch.float32 if mode == "int8" else torch.bfloat16
    )


@pytest.mark.parametrize("cls", [Transformer, SparseTransformer])
def test_sums_of_integers_do_not_overflow_in_float16(cls):
    model = cls(ModelArgs(dim=64, n_head=4, intermediate_size=172, n_layer=1, quant="int8"), dtype=torch.float16)
    module = model.sites[1]
    module.weight.data.fill_(127)
    module.scale.fill_(1e-3)
    expected = torch.full((1, 2, 64), 64 * 100 * 0.127, dtype=torch.float16)
    x = torch.full((1, 2, 64), 100.0, dtype=torch.float16)  # 64 * 100 * 127 is beyond float16
    torch.testing.assert_close(module(x), expected, rtol=2e-3, atol=0)
    torch.testing.assert_close(module(x[:, :1]), expected[:, :1], rtol=2e-3, atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_random_weights_by_name(mode):
    model = SparseTransformer(ModelArgs.from_name(f"stories110M-{mode}"), dtype=torch.float32)
    model.init_weights(0)
    module = model.sites[1]
    assert module.weight.dtype == {"int8": torch.int8, "int4": torch.uint8}[mode]
    assert model.output.weight.dtype == model.sites[0].weight.dtype == torch.int8
    weight = module.dequantized(torch.float32)
    assert weight.std().item() == pytest.approx(0.02, rel=0.02) and abs(weight.mean()) < 1e-3


@pytest.mark.parametrize("name", ["stories15M-int8", "stories110M-int4"])
def test_the_command_line_generates_with_it(name):
    options = {"max_new_tokens": 4, "num_samples": 1, "device": "cpu", "precision": "float32", "compare_dense": True}
    result = generate.main(flags(random_init=name, sparsity=0.5, **options))
    assert 0.3 < result["achieved_sparsity"] < 0.7
    assert result["dense_backend"] == ("the sparse kernel at threshold 0" if cpu.library() else "torch linear")


def test_a_checkpoint_with_a_tokenizer_is_quantised_on_its_own_text(tiny, tmp_path):
    folder = quantize(tiny, "int4", tmp_path / "out", num_tokens=64, groupsize=16)
    config = read_json(folder / "config.json")
    assert config["quantization"] == {"mode": "int4", "text": "the model's own, seed 0", "tokens": 64, "groupsize": 16}
    options = {"max_new_tokens": 4, "num_samples": 1, "device": "cpu"}
    result = generate.main(flags(checkpoint_path=folder, sparsity=0.5, **options))
    assert 0.2 < result["achieved_sparsity"] < 0.8


@pytest.fixture
def calibrated(checkpoint):
    """The checkpoint with statistics and a cut table."""
    model = SparseTransformer.from_checkpoint(checkpoint, dtype=torch.float32)
    quality = '{"text": "t", "perplexity": [[0, 9]]}'
    table = CutTable([], {}, {"rule": "refined", "quality": quality})
    shapes = [module.threshold.shape for module in model.sites]
    table.append(Cuts(0.5, [torch.rand(shape) for shape in shapes], [randn(shape[1]) for shape in shapes]))
    statistics = collect(model, random_tokens(1, 64, 300))
    for name, artifact in (("calibration", statistics), ("thresholds_refined", table)):
        artifact.metadata["fingerprint"] = fingerprint(checkpoint)
        artifact.save(checkpoint / f"{name}.safetensors")
    return checkpoint


def test_statistics_and_tables_go_along(calibrated, tmp_path, capsys):
    cuts = cuts_for("best", 0.5, calibrated, None)[1]
    for mode in MODES:
        folder = quantize(calibrated, mode, tmp_path / mode)
        rule, found = cuts_for("best", 0.5, folder, None)  # says if they were of another checkpoint
        assert rule == "refined" and recorded_perplexity(rule, folder, 0.5) is None  # it was that of the original
        torch.testing.assert_close((found.thresholds, found.shifts), (cuts.thresholds, cuts.shifts))
        assert (folder / STATISTICS_NAME).is_file() == (mode == "int8")
    model = SparseTransformer.from_checkpoint(tmp_path / "int8", dtype=torch.float32)
    expected = load_statistics(calibrated / STATISTICS_NAME).threshold(1, "up", 0.5)
    assert statistics_for(tmp_path / "int8", None, model).threshold(1, "up", 0.5) == expected
    printed = capsys.readouterr()
    assert "(with it: thresholds_refined.safetensors, calibration.safetensors)" in printed.out
    assert "calibration.safetensors stays behind: int4 needs its own" in printed.err


def test_what_stays_behind(calibrated, tmp_path, capsys):
    change_config(calibrated, rope_theta=5e5)
    (calibrated / "allocation_greedy.json").write_text("{}")
    with pytest.warns(UserWarning, match=r"allocation_greedy.json is of an earlier version.*python greedy.py"):
        folder = quantize(calibrated, "int8", tmp_path / "again")
    printed = capsys.readouterr().err
    assert "calibration.safetensors stays behind: the statistics are of another checkpoint" in printed
    assert "thresholds_refined.safetensors stays behind: the cut table is of another checkpoint" in printed
    assert not [*folder.glob("thresholds*"), *folder.glob("allocation*"), *folder.glob("calibration*")]


def test_an_unknown_fingerprint_stays_unknown(calibrated, tmp_path):
    statistics = load_statistics(calibrated / STATISTICS_NAME)
    del statistics.metadata["fingerprint"]  # as of TEAL's histograms
    statistics.save(calibrated / STATISTICS_NAME)
    folder = quantize(calibrated, "int8", tmp_path / "unknown")
    assert load_statistics(folder / STATISTICS_NAME).metadata.get("fingerprint") is None


def test_errors(checkpoint, tmp_path):
    folder = quantize(checkpoint, "int8", tmp_path / "out")
    with pytest.raises(ValueError, match="out is quantised already"):
        quantize(folder, "int4", tmp_path / "again")
    with pytest.raises(ValueError, match="out is there already"):
        quantize(checkpoint, "int8", folder)
    with pytest.raises(ValueError, match="group size 32: int4 needs a multiple of 16 that divides gate's 176 outputs"):
        quantize(checkpoint, "int4", tmp_path / "again", groupsize=32)
    with pytest.raises(ValueError, match="group size 1: int4"):
        quantize(checkpoint, "int4", tmp_path / "again", groupsize=1)
    with pytest.raises(ValueError, match="--num_tokens -5 must be at least 0"):
        quantize(checkpoint, "int8", tmp_path / "again", num_tokens=-5)
    assert not (tmp_path / "again").exists()
    for wrong in ({"mode": "int3"}, "int8", {"mode": "int4", "groupsize": "64"}):
        change_config(checkpoint, quantization=wrong)
        with pytest.raises(ValueError, match=r"quantised \(|'groupsize'"):
            read_config(checkpoint)
    change_config(checkpoint, quantization={"mode": "int8"})
    assert read_config(checkpoint).name == f"{checkpoint.name}-int8"
    (checkpoint / "config.json").unlink()
    with pytest.raises(ValueError, match=r"no config\.json"):
        quantize(checkpoint.rename(checkpoint.with_name("stories15M")), "int8", tmp_path / "again")


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_a_graph_rounds_a_block_to_the_bit(mode):
    for seed in (0, 1):  # the second one replays the graphs of the first; the last block has 72 rows
        weight, x = randn(200, 192, seed=seed).cuda(), randn(900, 200, seed=seed + 2).cuda()
        rounding, form = (round_int8, int8_scale(weight)) if mode == "int8" else (round_int4, 64)
        recorded = gptq(weight, x.t() @ x, rounding, form)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(script, "round_on_gpu", script.round_block)
            launched = gptq(weight, x.t() @ x, rounding, form)
        assert all(map(torch.equal, recorded, launched))
