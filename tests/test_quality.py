"""The rivals' rules against naive computations, and the rows of benchmarks/quality.py."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from models import flags

import benchmarks.results as results
from benchmarks import quality
from calibrate import calibrate
from sparse_model import SparseTransformer
from thresholds import load_statistics

WINDOWS = {"context": 40, "window": 20, "num_windows": 4, "device": "cpu"}


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory) -> Path:
    folder = shutil.copytree(tiny, tmp_path_factory.mktemp("quality") / "tiny")
    (folder / "text.txt").write_text(
        "".join(f"Hello, my name is Ann and story {i} is of rivers.\n" for i in range(200))
    )
    statistics = calibrate(folder, load(folder), [str(folder / "text.txt")], 1600)
    statistics.save(folder / "calibration.safetensors")
    return folder


def load(folder: Path) -> SparseTransformer:
    return SparseTransformer.from_checkpoint(folder, dtype=torch.float32)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(300, (4, 50), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("rule", ["cats", "up-output"])
def test_gates_cut_the_share_of_the_weights(folder, tokens, rule):
    model = load(folder)
    assert quality.share_of(model, "up", "down") == pytest.approx(96 / 240)
    factor = quality.prepare(model, rule, 0.15, folder, load_statistics(folder / "calibration.safetensors"), tokens)
    model(tokens, dense_prefix=5)
    assert model.achieved_sparsity() * factor == pytest.approx(0.15, abs=0.02)
    feed_forward = model.layers[0].feed_forward
    x = model.layers[0].ffn_norm(torch.randn(1, 9, 32))
    gate, up = feed_forward.w13(x).chunk(2, -1)
    product = F.silu(gate)
    keep = product.abs() > feed_forward.threshold
    assert 0 < keep.float().mean() < 1
    torch.testing.assert_close(feed_forward(x)[:, 3:], feed_forward.w2(product * keep * up)[:, 3:])
    with pytest.raises(ValueError, match=rf"{rule} cuts at most"):
        quality.prepare(load(folder), rule, 0.45, folder, None, tokens)


def test_relu_counts_its_zeros(folder, tokens):
    model = load(folder)
    factor = quality.prepare(model, "relu", 0.0, folder, None, None)
    assert factor == pytest.approx(2)
    model(tokens, dense_prefix=0)
    assert 0.1 < model.achieved_sparsity() * factor < 0.3  # about half of up and down's 40 %


def test_column_norms_weigh_the_inputs(folder, tokens):
    model = load(folder)
    statistics = load_statistics(folder / "calibration.safetensors")
    quality.prepare(model, "norms", 0.5, folder, statistics, None)
    module = model.sites[2]
    t = statistics.weighted_threshold(0, "up", 0.5)
    norms = module.column_norms()
    x = torch.randn(7, 32)
    torch.testing.assert_close((x.abs() > module.threshold[1]).float(), (x.abs() * norms[1] > t).float())
    model(tokens, dense_prefix=0)
    assert model.achieved_sparsity() == pytest.approx(0.5, abs=0.15)


def test_rows(folder, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    options = {"data": folder / "text.txt", "text": "c4", "calibration": [str(folder / "text.txt")]}
    rows = quality.main(flags(checkpoint_path=folder, sparsities=[0.15], **options, **WINDOWS))
    written = results.read_rows("quality.csv")
    assert [row["rule"] for row in written] == ["dense", "uniform", "norms", "cats", "relu", "up-input", "up-output"]
    assert len(rows) == len(written) and set(quality.KEY.split()) < written[0].keys()
    assert all(float(row["perplexity"]) > 1 for row in written)
    assert written[0]["achieved_sparsity"] == "0.0000" and written[1]["quant"] == "none"
    for row in written[1:]:
        if row["rule"] != "relu":
            assert float(row["achieved_sparsity"]) == pytest.approx(0.15, abs=0.06)
    errors = capsys.readouterr().err
    for rule in ("greedy", "refined"):  # what is not there is said, the rest is measured
        assert f"{rule} at 15%: " in errors and "no cut table beside" in errors


def test_paths_in_a_command_are_names():
    assert results.short("/some/folder/text.txt") == "text.txt" and results.short("--rules") == "--rules"
