"""Cuts around a shift, the thresholds that refine.py makes of gradients, and its runs that stop and go on."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from models import SMALL, copy_with_text, flags, random_tokens
from models import build as build_model

import refine
from model import Transformer
from refine import initial_cuts, perplexity_of, scaled_to
from sparse_model import SparseProjection, SparseTransformer, dense_prefix_of
from thresholds import Cuts, CutTable, load_table

TABLE = "thresholds_refined.safetensors"


def build(cls: type = SparseTransformer) -> Transformer:
    return build_model(cls, SMALL, n_local_heads=2, seed=3, std=0.25)


@pytest.fixture
def tokens() -> torch.Tensor:
    return random_tokens(6, 40, seed=5)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(refine, "LEVELS", (0.3, 0.6))
    monkeypatch.setattr(refine, "WINDOWS", 6)


def refined(model: SparseTransformer, tokens: torch.Tensor, updates: int) -> CutTable:
    table = CutTable([], {}, {})
    for _ in refine.refine(model, tokens, updates, table):
        pass
    return table


def divergence(model: SparseTransformer, tokens: torch.Tensor) -> float:
    dense, sparse = (torch.log_softmax(model(tokens, **options), -1) for options in ({}, {"dense_prefix": 1}))
    return F.kl_div(sparse, dense, log_target=True, reduction="sum").item() / tokens.numel()


# ---------------------------------------------------------------- the shift


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cut_input_is_taken_to_be_its_shift(dtype):
    torch.manual_seed(0)
    module = SparseProjection(24, {"a": 10, "b": 6}, dtype=dtype)
    module.weight.data.normal_()
    threshold, shift = torch.rand(2, 24), torch.randn(24)
    module.set_cut(threshold, shift)
    x = torch.randn(3, 5, 24, dtype=dtype)
    expected = []
    for t, weight in zip(threshold, module.weight.double().split([10, 6], 1), strict=True):
        keep = (x - shift).to(dtype).float().abs() > t
        expected.append(torch.where(keep, x.double(), shift.double()) @ weight)
    expected = torch.cat(expected, -1)
    tolerance = 1e-5 if dtype == torch.float32 else 0.15
    for position in range(5):  # one token: the kernel
        actual = module(x[:, position : position + 1])
        assert actual.dtype == dtype
        torch.testing.assert_close(actual[:, 0].double(), expected[:, position], atol=tolerance, rtol=0.02)
    module.dense_prefix = 2
    actual = module(x).double()
    torch.testing.assert_close(actual[:, 2:], expected[:, 2:], atol=tolerance, rtol=0.02)
    torch.testing.assert_close(actual[:, :2], x[:, :2].double() @ module.weight.double(), atol=tolerance, rtol=0.02)
    kept = sum(((x - shift).to(dtype).float().abs() > t)[:, 2:].sum() for t in threshold)
    assert module.kept.sum() == kept

    again = SparseProjection(24, {"a": 10, "b": 6}, dtype=dtype)
    again.load_state_dict(module.state_dict())
    again.dense_prefix = 2
    assert torch.equal(again(x), module(x))
    module.set_cut(threshold)
    assert module.shift is None and "shift" not in module.state_dict()


def test_threshold_zero_with_a_shift_is_dense(tokens):
    model = build()
    dense = model(tokens)
    for module in model.sites:
        module.set_cut(module.threshold, torch.randn(module.weight.shape[0]))
    torch.testing.assert_close(model(tokens, dense_prefix=0), dense, atol=2e-4, rtol=1e-4)
    assert torch.equal(model(tokens), dense)  # several tokens at once are dense as they were


def test_the_offset_is_counted_as_read():
    model = build()
    before = model.bytes_per_step()
    for module in model.sites:
        module.set_cut(module.threshold, torch.ones(module.weight.shape[0]))
    assert model.bytes_per_step() - before == 4 * sum(module.weight.shape[1] for module in model.sites)


def test_cuts_of_another_model():
    model = build()
    thresholds, shifts = [module.threshold + 1 for module in model.sites], [None] * 8
    wide = [torch.zeros(threshold.shape[1] + 1) for threshold in thresholds]
    for wrong in (
        Cuts(0.5, thresholds[:-1], shifts[:-1]),
        Cuts(0.5, [thresholds[0][:, :-1], *thresholds[1:]], shifts),
        Cuts(0.5, thresholds, wide),
    ):
        with pytest.raises(
            ValueError, match=rf"of another model: they are for {len(wrong[1])} sites.*this model has 8"
        ):
            model.set_cuts(wrong)
    assert not any(module.threshold.any() for module in model.sites) and model.sparsity == 0


# ---------------------------------------------------------------- the algorithm


def test_initial_cuts_are_of_the_mean_square_of_each_segments_gradient(tokens):
    model, dense, torch_generator = build(), build(Transformer), torch.Generator().manual_seed(0)
    model.load_state_dict(dense.state_dict())
    cuts = initial_cuts(model, tokens, seed=0)
    sums, inputs = {}, {}
    for window in tokens.split(1):
        leaves = {}

        def product(module, args, y, leaves=leaves):
            """y as before, with a zero for each segment's own input added, by which the loss is derived."""
            j = dense.sites.index(module)
            inputs.setdefault(j, []).append(args[0][0, 1:])
            parts = module.weight.split(list(module.segments.values()))
            leaves[j] = [torch.zeros_like(args[0], requires_grad=True) for _ in parts]
            return y + torch.cat([leaf @ w.T for leaf, w in zip(leaves[j], parts, strict=True)], -1)

        hooks = [module.register_forward_hook(product) for module in dense.sites]
        logits = dense(window)[0]
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=torch_generator)[:, 0]
        F.cross_entropy(logits, labels, reduction="sum").backward()
        for hook in hooks:
            hook.remove()
        for j, segments in leaves.items():
            for s, leaf in enumerate(segments):
                sums[j, s] = sums.get((j, s), 0) + leaf.grad[0, 1:].double().square().sum(0)
    for j, (threshold, shift) in enumerate(zip(cuts.thresholds, cuts.shifts, strict=True)):
        widths = model.sites[j].widths
        for s, width in enumerate(widths):
            expected = (width / (sums[j, s] / (6 * 39))).sqrt()
            torch.testing.assert_close(threshold[s].double(), expected, rtol=1e-3, atol=0)
        medians = torch.stack([x.median(0).values for x in inputs[j]]).mean(0)
        torch.testing.assert_close(shift, medians, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("level", [0.05, 0.5, 0.93])
def test_scaled_cuts_reach_the_level(tokens, level):
    model = build()
    cuts = scaled_to(model, tokens, level, initial_cuts(model, tokens))
    assert cuts.sparsity == model.sparsity == level
    assert torch.equal(model.sites[3].threshold, cuts.thresholds[3])  # they stay set
    model.reset_counts()
    model(tokens, dense_prefix=1)
    assert model.achieved_sparsity() == pytest.approx(level, abs=0.003)


def test_refinement_lowers_the_divergence_at_equal_sparsity(tokens, quick):
    model = build()
    tables = [refined(model, tokens, updates) for updates in (0, 30)]
    for i, level in enumerate((0.3, 0.6)):
        values = []
        for table in tables:
            assert table.levels == [0.3, 0.6]
            scaled_to(model, tokens, level, table.level(i))  # on all windows, to compare
            model.reset_counts()
            values.append(divergence(model, tokens))
            assert model.achieved_sparsity() == pytest.approx(level, abs=0.003)
        assert values[1] < 0.97 * values[0]


def test_every_unseen_window_is_cut_by_the_level(quick):
    model, tokens = build(), random_tokens(24, 40, seed=5)
    table = refined(model, tokens, 2)
    for i, level in enumerate(table.levels):
        model.set_cuts(table.level(i))
        reached = []
        for window in tokens[-3:].split(1):  # an eighth
            model.reset_counts()
            model(window, dense_prefix=dense_prefix_of(tokens.shape[1]))
            reached.append(model.achieved_sparsity())
        assert min(reached) == pytest.approx(level, abs=0.001) and max(reached) > level + 0.003


@pytest.mark.parametrize(("windows", "text"), [(24, "held-out calibration text"), (6, "the calibration text")])
def test_the_perplexity_on_the_held_out_text_is_recorded(quick, windows, text):
    model, tokens = build(), random_tokens(windows, 40, seed=5)
    table = refined(model, tokens, 1)
    quality = json.loads(table.metadata["quality"])
    assert quality["text"] == text and [level for level, _ in quality["perplexity"]] == [0.0, 0.3, 0.6]
    unseen = tokens[-3:] if windows == 24 else tokens
    logits = model(unseen)[:, :-1]
    dense = F.cross_entropy(logits.flatten(0, 1), unseen[:, 1:].flatten()).exp().item()
    assert quality["perplexity"][0][1] == pytest.approx(dense, rel=1e-4)
    model.set_cuts(table.at(0.6))
    sparse = perplexity_of(model, unseen, cut=True)
    assert quality["perplexity"][2][1] == pytest.approx(sparse)  # of what is kept, rounded
    assert table.perplexity_at(0.6) == (quality["perplexity"][0][1], pytest.approx(sparse), text)


def test_a_begun_table_is_continued(tokens, quick):
    model, begun = build(), CutTable([], {}, {})
    complete = refined(model, tokens, 2)
    next(refine.refine(model, tokens, 2, begun))
    assert begun.levels == [0.3] and {tensor.dtype for tensor in begun.tensors.values()} == {torch.float32}
    for _ in refine.refine(model, tokens, 2, begun):
        pass
    assert begun.levels == complete.levels and begun.metadata == complete.metadata
    for name, tensor in complete.tensors.items():
        assert tensor.dtype == torch.float16 and torch.equal(begun.tensors[name], tensor)


def test_gradients_that_are_not_finite(tokens):
    model = build()
    model.layers[1].ffn_norm.weight[3] = float("inf")
    with pytest.raises(ValueError, match="not finite"):
        initial_cuts(model, tokens)


# ---------------------------------------------------------------- the script


def make(folder: Path, **changes) -> CutTable:
    options = {"data": folder / "text.txt", "num_tokens": 800, "updates": 1, "precision": "float32", "device": "cpu"}
    return refine.main(flags(checkpoint_path=folder, **options | changes))


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory) -> Path:
    """A checkpoint with a text and a cut table."""
    folder = copy_with_text(tiny, tmp_path_factory.mktemp("refined"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refine, "LEVELS", (0.3, 0.6))
        make(folder)
    return folder


def test_main(made):
    table = load_table(made / TABLE)
    about = {"rule": "refined", "text": "text.txt", "tokens": "800", "window": "160", "updates": "1"}
    assert (about | {"dtype": "float32"}).items() <= table.metadata.items()
    assert table.levels == [0.3, 0.6] and {tensor.dtype for tensor in table.tensors.values()} == {torch.float16}
    assert not list(made.glob("*partial*"))


def test_a_stopped_run_goes_on(made, tmp_path, monkeypatch, capsys):
    copy = shutil.copytree(made, tmp_path / "copy")
    (copy / TABLE).unlink()
    monkeypatch.setattr(refine, "LEVELS", (0.3, 0.6))
    original, calls = refine.Refinement.update, []

    def stop(self, *args):
        calls.append(self.level)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(refine.Refinement, "update", stop)
    with pytest.raises(KeyboardInterrupt):
        make(copy)
    assert load_table(next(copy.glob(f"{TABLE}.*.partial.safetensors"))).levels == [0.3]
    with pytest.warns(UserWarning, match="goes on where an earlier run stopped") as warned:
        make(copy, statistics="any.safetensors")
    assert any("--statistics is not read" in str(warning.message) for warning in warned)
    assert calls == [0.3, 0.6, 0.6]
    printed = capsys.readouterr()
    assert "60% cut: perplexity" in printed.out
    expected, table = load_table(made / TABLE), load_table(copy / TABLE)
    assert table.metadata == expected.metadata
    assert all(torch.equal(tensor, expected.tensors[name]) for name, tensor in table.tensors.items())


@pytest.mark.parametrize("options", [{"updates": -1}, {"num_tokens": 1}, {"device": "mars"}])
def test_mistakes(made, options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"--{name} {value}"):
        make(made, **options)
