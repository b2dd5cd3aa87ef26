"""Statistics against exact quantiles and moments, TEAL's histograms against numpy, files and texts of all kinds."""

import json
import subprocess
import sys
from pathlib import Path

import models
import numpy as np
import pytest
import torch
from models import flags
from safetensors.torch import save_file

import calibrate
import thresholds
from calibrate import bin_edges, bit_histogram, calibration_tokens, collect, quantiles, statistics_for, write_tails
from sparse_model import PROJECTIONS, SparseTransformer
from thresholds import RULES, Statistics, load_statistics, teal_statistics
from tokenizer import load_tokenizer

CONFIG = models.CONFIG | {"num_hidden_layers": 3, "intermediate_size": 172, "vocab_size": 300}
CONFIG |= {"max_position_embeddings": 320, "eos_token_id": 7, "bos_token_id": 5}
SENTENCE = "The quick brown fox, number {}, jumps over {} lazy dogs and reads a book about rivers.\n"


def text_of(sentences: int) -> str:
    return "".join(SENTENCE.format(i, i * i) for i in range(sentences))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return models.write_checkpoint(tmp_path / "org" / "tiny", CONFIG, text_of(50), std=0.1)


@pytest.fixture
def model() -> SparseTransformer:
    return models.build(SparseTransformer, CONFIG, seed=1, std=0.15)


def cut_everything(model: SparseTransformer) -> None:
    for module in model.sites:
        module.set_cut(torch.full_like(module.threshold, 1e9))


def magnitude_statistics(x: torch.Tensor) -> Statistics:
    counts = bit_histogram(x.float()).sum(0).numpy()
    return Statistics({"0.o.magnitude": quantiles(counts, bin_edges())}, {"kind": "own"})


N = 400_000
DISTRIBUTIONS = {
    "gaussian": lambda g: torch.randn(N, generator=g, dtype=torch.float64) * 0.37,
    "laplace": lambda g: torch.randn(N, generator=g).sign() * torch.empty(N).exponential_(3.0, generator=g),
    "heavy": lambda g: torch.empty(N).cauchy_(generator=g),
    "shifted": lambda g: torch.randn(N, generator=g) * 0.25 + 1.5,
    "asymmetric": lambda g: torch.empty(N).exponential_(1.0, generator=g) - 0.4,
    "tiny": lambda g: torch.randn(N, generator=g) * 1e-9,
    "half zeros": lambda g: torch.randn(N, generator=g).relu(),
}
SPARSITIES = [*np.linspace(0.001, 0.99, 173), 0.05, 0.5, 0.9]


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_thresholds_are_precise_to_a_thousandth(name):
    x = DISTRIBUTIONS[name](torch.Generator().manual_seed(3)).float()
    statistics = magnitude_statistics(x)
    magnitude = x.abs().sort().values.numpy()
    zeros = np.searchsorted(magnitude, 0.0, side="right") / N
    for s in SPARSITIES:
        threshold = statistics.threshold(0, "o", s)
        share = np.searchsorted(magnitude, threshold, side="right") / N
        assert abs(share - max(s, zeros)) <= 0.001, (s, threshold, share)
    assert statistics.threshold(0, "o", 0) == 0
    assert (statistics.threshold(0, "o", 0.4) == 0) == (name == "half zeros")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_thresholds_of_short_dtypes_are_as_close_as_their_values_allow(dtype):
    x = torch.randn(N, generator=torch.Generator().manual_seed(4)).to(dtype).float()
    statistics = magnitude_statistics(x)
    magnitude = x.abs().sort().values.numpy()
    errors = []
    for s in SPARSITIES:
        exact = magnitude[int(s * N)]  # the value in whose mass the exact quantile lies
        below, above = (np.searchsorted(magnitude, exact, side=side) / N for side in ("left", "right"))
        share = np.searchsorted(magnitude, statistics.threshold(0, "o", s), side="right") / N
        errors.append(share - s)
        assert min(abs(share - below), abs(share - above)) <= 1e-9 or abs(share - s) <= 0.001, (s, share)
        assert abs(share - s) <= 0.6 * (above - below) + 0.001, (s, share, below, above)
    assert abs(np.mean(errors)) < 0.0003  # neither cut too much nor too little


def test_bins_at_the_ends():
    x = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e30, float("inf"), -1.5, 1.5, 1.5])
    positive, negative = bit_histogram(x)
    assert positive[0] + negative[0] == 2
    assert positive[1] == negative[1] == 1
    assert positive[-1] == 2
    edges = bin_edges()
    found = int(positive[2:-1].argmax()) + 2
    assert positive[found] == 2 and negative[found] == 1 and edges[found] < 1.5 < edges[found + 1]
    assert positive.sum() + negative.sum() == len(x)
    assert (np.diff(edges) >= 0).all() and len(edges) == len(positive) + 1


def recorded_inputs(model: SparseTransformer, tokens: torch.Tensor) -> list[torch.Tensor]:
    inputs = []
    hooks = [m.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1))) for m in model.sites]
    model(tokens)
    for hook in hooks:
        hook.remove()
    return inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_collect_against_the_inputs_themselves(model, dtype):
    model = model.to(dtype)
    tokens = torch.randint(300, (2, 150), generator=torch.Generator().manual_seed(0))
    statistics = collect(model, tokens)
    inputs = recorded_inputs(model, tokens)
    values = np.linspace(0.02, 0.98, 25)
    tolerance = 0.002 if dtype == torch.float32 else 0.008  # 300 tokens, and the share of one bfloat16 value
    for i, (module, x) in enumerate(zip(model.sites, inputs, strict=True)):
        layer, x = i // 4, x.double()
        for projection, weight in zip(module.segments, module.weight.split(module.widths, 1), strict=True):
            norms = weight.double().pow(2).sum(1).sqrt()
            torch.testing.assert_close(
                statistics.get(layer, projection, "column_norms"), norms.float(), rtol=1e-5, atol=0
            )
            mean = statistics.get(layer, projection, "channel_mean").double()
            torch.testing.assert_close(mean, x.mean(0), rtol=1e-5, atol=1e-6)
            second = statistics.get(layer, projection, "channel_second_moment").double()
            torch.testing.assert_close(second, x.pow(2).mean(0), rtol=1e-5, atol=1e-9)
            z = (x - x.mean()) / x.std(correction=0)
            exact = [x.mean().item(), x.std(correction=0).item(), z.pow(4).mean().item()]
            assert statistics.get(layer, projection, "pooled").tolist() == pytest.approx(exact, rel=1e-4, abs=1e-6)
            for s in values:
                share = (x.abs() <= statistics.threshold(layer, projection, s)).double().mean().item()
                assert abs(share - s) <= tolerance, (layer, projection, s)
                share = (x.abs() * norms <= statistics.weighted_threshold(layer, projection, s)).double().mean().item()
                assert abs(share - s) <= 0.002, (layer, projection, s)
            signed = statistics.get(layer, projection, "signed")
            assert abs((x <= signed[250].item()).double().mean().item() - 0.25) <= tolerance
            assert signed[0].item() == pytest.approx(x.min().item(), rel=0.002)
            assert signed[-1].item() == pytest.approx(x.max().item(), rel=0.002)
    assert statistics.n_layer == 3
    assert statistics.metadata["tokens"] == "300" and statistics.metadata["dtype"] == str(dtype)[6:]


def test_collect_is_dense_and_leaves_no_hook(model):
    tokens = torch.randint(300, (1, 64))
    before = collect(model, tokens)
    cut_everything(model)
    after = collect(model, tokens)
    assert all(torch.equal(before.tensors[name], after.tensors[name]) for name in before.tensors)
    assert not any(module._forward_pre_hooks for module in model.sites)


def test_collect_refuses_infinite_inputs(model):
    model.layers[1].attention.wqkv.weight[0, -1] = float("inf")
    with pytest.raises(ValueError, match="an input of layer 1 in float32 is not finite"):
        collect(model, torch.randint(300, (1, 16)))


def test_sparsity_achieved_on_the_calibration_text_is_the_one_asked_for(model):
    tokens = torch.randint(300, (2, 200))
    statistics = collect(model, tokens)
    model.set_cuts(RULES["uniform"](None, lambda: statistics, 0.5))
    model(tokens, dense_prefix=0)
    assert model.achieved_sparsity() == pytest.approx(0.5, abs=0.05)  # later layers see the cut ones' outputs


def test_threshold_errors(model):
    statistics = collect(model, torch.randint(300, (1, 16)))
    for sparsity in (-0.1, 1.0, 50, float("nan")):
        for accessor in (statistics.threshold, statistics.weighted_threshold):
            with pytest.raises(ValueError, match=r"outside \[0, 1\)"):
                accessor(0, "q", sparsity)
    with pytest.raises(ValueError, match=r"'w2'.*q, k, v, o, gate, up, down"):
        statistics.threshold(0, "w2", 0.5)
    for layer in (-1, 3):
        with pytest.raises(ValueError, match=f"layer {layer}"):
            statistics.threshold(layer, "q", 0.5)


def test_save_and_load(model, tmp_path):
    statistics = collect(model, torch.randint(300, (1, 64)))
    statistics.metadata["fingerprint"] = "abc"
    path = tmp_path / "new" / "s.safetensors"
    statistics.save(path)
    again = load_statistics(path)
    assert again.metadata.get("fingerprint") == "abc" and again.metadata == statistics.metadata and again.n_layer == 3
    for projection in PROJECTIONS:
        assert again.threshold(2, projection, 0.4) == statistics.threshold(2, projection, 0.4)
        assert again.weighted_threshold(2, projection, 0.4) == statistics.weighted_threshold(2, projection, 0.4)
    assert list(path.parent.iterdir()) == [path]


def test_load_errors(model, tmp_path):
    path = tmp_path / "s.safetensors"
    with pytest.raises(ValueError, match="no statistics file"):
        load_statistics(path)
    collect(model, torch.randint(300, (1, 64))).save(path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"hello, world"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="truncated or not a statistics file"):
            load_statistics(path)
    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="not a statistics file"):
        load_statistics(path)


def test_save_where_nothing_can_be_written(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write"):
        collect(model, torch.randint(300, (1, 16))).save(tmp_path / "file" / "s.safetensors")


def test_statistics_for_makes_them_once(checkpoint, monkeypatch):
    monkeypatch.setattr(calibrate, "OWN_ROW", 16)
    monkeypatch.setattr(calibrate.calibrate, "__defaults__", (None, 64, 0))
    model = SparseTransformer.from_checkpoint(checkpoint, dtype=torch.float32)
    made = statistics_for(checkpoint, None, model)
    assert made.metadata["tokens"] == "64" and made.metadata.get("fingerprint")
    monkeypatch.setattr(calibrate, "collect", None)  # would fail
    assert statistics_for(checkpoint, None, model).threshold(1, "up", 0.5) == made.threshold(1, "up", 0.5)
    beside = checkpoint / "calibration.safetensors"
    moved = beside.rename(checkpoint.parent / "s.safetensors")
    assert statistics_for(checkpoint, moved, model).n_layer == 3 and not beside.exists()

    (checkpoint / "config.json").write_text(json.dumps(CONFIG | {"rope_theta": 5e5}))  # now another checkpoint
    with pytest.raises(ValueError, match=r"another checkpoint.*python calibrate.py --checkpoint_path"):
        statistics_for(checkpoint, moved, model)


def test_interrupted_calibration_leaves_nothing(checkpoint, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    before = set(checkpoint.iterdir())
    monkeypatch.setattr(thresholds, "serialize", interrupted)
    model = SparseTransformer.from_checkpoint(checkpoint, dtype=torch.float32)
    monkeypatch.setattr(calibrate.calibrate, "__defaults__", (None, 64, 0))
    with pytest.raises(KeyboardInterrupt):
        statistics_for(checkpoint, None, model)
    assert set(checkpoint.iterdir()) == before


def test_a_model_that_writes_nothing_finite(model):
    model.norm.weight[0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        write_tails(model, torch.full((5, 12), 5), 1)


def test_self_written_text_samples_from_the_dense_model(checkpoint, model, monkeypatch):
    monkeypatch.setattr(calibrate, "OWN_ROW", 12)
    monkeypatch.setattr(calibrate, "OWN_ROWS", 3)
    cut_everything(model)
    rows, _ = calibration_tokens(checkpoint, model, None, 50, 7)
    start = load_tokenizer(checkpoint, 300).bos_id
    assert rows.shape == (5, 12) and (rows[:, 0] == start).all()
    assert all(block.attention.kv_cache is None for block in model.layers)
    assert model.achieved_sparsity() == 0

    generator, expected = torch.Generator().manual_seed(7), []
    for count in (3, 2):  # no cache, every row from its start
        row = torch.full((count, 1), start)
        for _ in range(11):
            logits = model(row, dense_prefix=row.shape[1])[:, -1]
            row = torch.cat([row, torch.multinomial(logits.softmax(-1), 1, generator=generator)], 1)
        expected.append(row)
    assert torch.equal(rows, torch.cat(expected))
    assert not torch.equal(rows, calibration_tokens(checkpoint, model, None, 50, 8)[0])


def expected_teal_threshold(path: Path, name: str, sparsity: float) -> float:
    found = torch.load(path, weights_only=True)
    cumulative = np.cumsum(found[name].numpy().astype(np.float64))
    target = (0.5 + sparsity / 2) * found[name].numpy().astype(np.float64).sum()
    return np.interp(target, cumulative, found[f"{name}_centers"].numpy().astype(np.float64))


def check_teal(statistics: Statistics, folder: Path, layers: list[int]) -> None:
    parts = dict.fromkeys("qkv", ("self_attn", "h1")) | {"o": ("self_attn", "h2"), "down": ("mlp", "h2")}
    parts |= dict.fromkeys(("gate", "up"), ("mlp", "h1"))
    for layer in layers:
        for projection, (part, name) in parts.items():
            path = folder / f"layer-{layer}" / part / "histograms.pt"
            assert statistics.threshold(layer, projection, 0) == 0
            for s in [0.001, 0.25, 0.4, 0.5, 0.65, 0.777, 0.97, 0.99, 0.9999]:
                expected = max(0.0, expected_teal_threshold(path, name, s))  # ours cuts exact zeros at least
                assert statistics.threshold(layer, projection, s) == pytest.approx(expected, abs=1e-9, rel=1e-9)


def test_teal_histograms_of_the_authors(data, tmp_path):
    folder = data / "teal_artifacts" / "Llama-2-7B" / "histograms"
    if not folder.is_dir():
        pytest.skip("teal_artifacts is absent")
    calibrate.main(flags(teal_histograms=folder, output=tmp_path / "t.safetensors"))
    statistics = load_statistics(tmp_path / "t.safetensors")
    assert statistics.n_layer == 3 and statistics.metadata.get("fingerprint") is None
    check_teal(statistics, folder, [0, 1, 2])


def test_teal_histograms_with_layers_missing(tmp_path):
    generator = torch.Generator().manual_seed(0)
    folder = tmp_path / "histograms"
    for layer in (2, 10):  # 10 sorts before 2 as text
        for part in ("mlp", "self_attn"):
            found = {}
            for name in ("h1", "h2"):
                counts = torch.randint(0, 50_000, (10_000,), generator=generator).float()
                counts[3000:3100] = 0  # empty bins
                found[name] = counts
                found[f"{name}_centers"] = torch.randn(10_000, generator=generator).sort().values + 0.1 * layer
            (folder / f"layer-{layer}" / part).mkdir(parents=True)
            torch.save(found, folder / f"layer-{layer}" / part / "histograms.pt")
    teal_statistics(folder).save(tmp_path / "t.safetensors")
    statistics = load_statistics(tmp_path / "t.safetensors")
    assert statistics.n_layer == 11
    check_teal(statistics, folder, [2, 10])
    with pytest.raises(ValueError, match="no statistics of layer 3; there are 2, 2 to 10"):
        statistics.threshold(3, "q", 0.5)
    with pytest.raises(ValueError, match="hold no weighted"):
        statistics.weighted_threshold(2, "q", 0.5)
    with pytest.raises(ValueError, match=r"outside \[0, 1\)"):
        statistics.threshold(2, "q", 1.0)
    load_statistics(tmp_path / "t.safetensors", tmp_path)  # they carry none

    (folder / "layer-2" / "mlp" / "histograms.pt").write_bytes(b"x")
    with pytest.raises(ValueError, match="is not a file of TEAL's histograms"):
        teal_statistics(folder)
    with pytest.raises(ValueError, match=r"holds no layer-\*"):
        teal_statistics(tmp_path / "nothing")


def test_main_on_a_text_with_a_plot(checkpoint, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    text, picture = tmp_path / "text.txt", tmp_path / "p.png"
    text.write_text(text_of(40))
    weights = checkpoint / "model.safetensors"
    calibrate.main(flags(checkpoint_path=weights, data=[text], num_tokens=640, plot=picture, precision="float32"))
    statistics = load_statistics(checkpoint / "calibration.safetensors", checkpoint)
    assert statistics.metadata["tokens"] == "640" and statistics.metadata["text"] == "text.txt"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "3 layers" in capsys.readouterr().out
    with pytest.raises(ValueError, match="100 asked for: at least 256"):
        calibrate.main(flags(checkpoint_path=checkpoint, data=[text], num_tokens=100))
    with pytest.raises(ValueError, match="--num_tokens 1 must be at least 2"):
        calibrate.main(flags(checkpoint_path=checkpoint, num_tokens=1))
    with pytest.raises(ValueError, match="--teal_histograms needs --output"):
        calibrate.main(flags(teal_histograms=tmp_path))


def test_a_mistake_is_one_line_on_the_command_line(tmp_path):
    command = [sys.executable, calibrate.__file__, "--teal_histograms", str(tmp_path), "--output", str(tmp_path / "o")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1 and done.stderr.startswith("calibrate.py: ")
    assert list(tmp_path.iterdir()) == []
