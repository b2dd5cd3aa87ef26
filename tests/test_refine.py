"""Cuts around a shift, the thresholds that refine.py makes of gradients, their file, what --allocation makes of it."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import eval as evaluation
import generate
import greedy
import refine
from greedy import resolve_allocation
from model import ModelArgs, Transformer
from refine import ThresholdTable, load_table, settle, start
from sparse_model import SparseProjection, SparseTransformer

SMALL = {"block_size": 64, "vocab_size": 96, "n_layer": 2, "n_head": 4, "n_local_heads": 2, "dim": 32}
BRIEF = {"device": "cpu", "precision": "float32", "max_new_tokens": 4, "num_samples": 1}


def build(cls: type) -> Transformer:
    model = cls(ModelArgs(**SMALL, intermediate_size=48), dtype=torch.float32)
    model.init_weights(seed=3, std=0.25)
    return model.requires_grad_(False).eval()


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(SMALL["vocab_size"], (6, 40), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(refine, "LEVELS", (0.3, 0.6))
    monkeypatch.setattr(refine, "ROWS", 6)


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
    module.threshold.copy_(threshold)
    module.set_shift(shift)
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
    module.set_shift(None)
    assert module.shift is None and "shift" not in module.state_dict()


def test_threshold_zero_with_a_shift_is_dense(tokens):
    model = build(SparseTransformer)
    dense = model(tokens)
    for module in model.sites:
        module.set_shift(torch.randn(module.weight.shape[0]))
    torch.testing.assert_close(model(tokens, dense_prefix=0), dense, atol=2e-4, rtol=1e-4)
    assert torch.equal(model(tokens), dense)  # several tokens at once are dense as they were


def test_the_offset_is_counted_as_read():
    model = build(SparseTransformer)
    before = model.bytes_per_step()
    for module in model.sites:
        module.set_shift(torch.ones(module.weight.shape[0]))
    assert model.bytes_per_step() - before == 4 * sum(module.weight.shape[1] for module in model.sites)


def test_cuts_of_another_model():
    model = build(SparseTransformer)
    cuts = [(module.threshold + 1, None) for module in model.sites]
    wide = [(threshold, torch.zeros(threshold.shape[1] + 1)) for threshold, _ in cuts]
    for wrong in (cuts[:-1], [(cuts[0][0][:, :-1], None), *cuts[1:]], wide):
        with pytest.raises(ValueError, match=rf"of another model: {len(wrong)} inputs.*the model has 8"):
            model.set_cuts(wrong)
    assert not any(module.threshold.any() for module in model.sites)


# ---------------------------------------------------------------- the algorithm


def test_start_is_the_mean_square_of_each_segments_gradient(tokens):
    model, dense, torch_generator = build(SparseTransformer), build(Transformer), torch.Generator().manual_seed(0)
    model.load_state_dict(dense.state_dict())
    found = start(model, tokens, seed=0)
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
    for j, (threshold, shift) in enumerate(found):
        widths = model.sites[j].widths
        for s, width in enumerate(widths):
            expected = (width / (sums[j, s] / (6 * 39))).sqrt()
            torch.testing.assert_close(threshold[s].double(), expected, rtol=1e-3, atol=0)
        medians = torch.stack([x.median(0).values for x in inputs[j]]).mean(0)
        torch.testing.assert_close(shift, medians, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("level", [0.05, 0.5, 0.93])
def test_settle_reaches_the_level(tokens, level):
    model = build(SparseTransformer)
    settle(model, tokens, level, start(model, tokens))
    model.reset_counts()
    model(tokens, dense_prefix=1)
    assert model.achieved_sparsity() == pytest.approx(level, abs=0.003)


def test_refinement_lowers_the_divergence_at_equal_sparsity(tokens, quick):
    model = build(SparseTransformer)
    tables = [ThresholdTable([], {}, {}) for _ in range(2)]
    for table, updates in zip(tables, (0, 30), strict=True):
        for _ in refine.refine(model, tokens, table, updates):
            pass
        assert table.levels == [0.3, 0.6]
    for i in range(2):
        values = []
        for table in tables:
            refine.settle(model, tokens, table.levels[i], table.row(i))  # on all windows, to compare
            model.reset_counts()
            values.append(divergence(model, tokens))
            assert model.achieved_sparsity() == pytest.approx(table.levels[i], abs=0.003)
        assert values[1] < 0.97 * values[0]


def test_every_unseen_window_is_cut_by_the_level(quick):
    tokens = torch.randint(SMALL["vocab_size"], (24, 40), generator=torch.Generator().manual_seed(5))
    model, table = build(SparseTransformer), ThresholdTable([], {}, {})
    for _ in refine.refine(model, tokens, table, 2):
        pass
    for i, level in enumerate(table.levels):
        model.set_cuts(table.row(i))
        reached = []
        for window in tokens[-3:].split(1):  # an eighth
            model.reset_counts()
            model(window, dense_prefix=refine.dense_prefix(tokens.shape[1]))
            reached.append(model.achieved_sparsity())
        assert min(reached) == pytest.approx(level, abs=0.001) and max(reached) > level + 0.003


def test_a_begun_table_is_continued(tokens, quick):
    model = build(SparseTransformer)
    whole, part = (ThresholdTable([], {}, {}) for _ in range(2))
    for _ in refine.refine(model, tokens, whole, 2):
        pass
    next(refine.refine(model, tokens, part, 2))
    assert part.levels == [0.3]
    for _ in refine.refine(model, tokens, part, 2):
        pass
    assert part.levels == whole.levels
    for name, tensor in whole.tensors.items():
        torch.testing.assert_close(part.tensors[name], tensor)


def test_gradients_that_are_not_finite(tokens):
    model = build(SparseTransformer)
    model.layers[1].ffn_norm.weight[3] = float("inf")
    with pytest.raises(ValueError, match=r"not finite; choose another --precision"):
        start(model, tokens)


# ---------------------------------------------------------------- the file


def table_of(model: SparseTransformer, **metadata) -> ThresholdTable:
    table = ThresholdTable([], {}, metadata)
    for level in (0.2, 0.6):
        table.append(level, [(module.threshold + level, torch.full_like(module.threshold[0], -level))
                             for module in model.sites])  # fmt: skip
    return table


def test_a_level_lies_between_its_neighbours(tmp_path):
    table_of(build(SparseTransformer), method="global").save(tmp_path / "t.safetensors")
    table = load_table(tmp_path / "t.safetensors")
    assert table.metadata == {"method": "global"} and table.levels == [0.2, 0.6]
    for sparsity, threshold, shift in (
        (0.0, 0.0, -0.2),
        (0.1, 0.1, -0.2),
        (0.2, 0.2, -0.2),
        (0.5, 0.5, -0.5),
        (0.6, 0.6, -0.6),
    ):
        cuts = table.at(sparsity)
        assert len(cuts) == 8 and cuts[0][0].shape == (3, 32) and cuts[3][1].shape == (48,)
        assert all(t.sub(threshold).abs().max() < 1e-6 and c.sub(shift).abs().max() < 1e-6 for t, c in cuts)
    with pytest.raises(ValueError, match=r"sparsity 0.7 is outside what the allocation covers, 0 to 0.600"):
        table.at(0.7)


def test_files_that_are_no_table(tmp_path):
    path = tmp_path / "t.safetensors"
    with pytest.raises(ValueError, match="no allocation file at"):
        load_table(path)
    path.write_bytes(b"short")
    with pytest.raises(ValueError, match="truncated or not a file of thresholds"):
        load_table(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="not a file of thresholds of this version"):
        load_table(path)


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory) -> Path:
    """A checkpoint with a text and thresholds made by the command line's main."""
    folder = shutil.copytree(tiny, tmp_path_factory.mktemp("refined") / "tiny")
    (folder / "text.txt").write_text(
        "".join(f"Hello, my name is Ann and story {i} is of rivers.\n" for i in range(200))
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refine, "LEVELS", (0.3, 0.6))
        greedy.main(folder, data=[str(folder / "text.txt")], num_tokens=800, updates=1, method="global",
                    precision="float32")  # fmt: skip
    return folder


def test_programs_use_and_name_it(made, capsys):
    assert not list(made.glob("*partial*"))
    options = {"checkpoint_path": made, "sparsity": 0.45}
    result = evaluation.main(
        **options, data=made / "text.txt", context=40, window=20, num_windows=4, precision="float32"
    )
    assert result["allocation"] == "global" and "45% asked for (global allocation)" in capsys.readouterr().out
    assert result["achieved_sparsity"] == pytest.approx(0.45, abs=0.05)
    assert not (made / "calibration.safetensors").exists()  # thresholds need none
    generate.main(**options, **BRIEF)
    assert "45% asked for (global allocation)" in capsys.readouterr().out


def test_tables_that_do_not_do(made, tmp_path):
    copy = shutil.copytree(made, tmp_path / "copy")
    with pytest.raises(ValueError, match=r"sparsity 0\.7 is outside"):
        resolve_allocation("global", copy, 0.7)
    assert resolve_allocation("best", copy, 0.7) == ("uniform", 0.7)
    assert resolve_allocation("best", copy, 0.0) == ("uniform", 0.0)
    path = copy / "allocation_global.safetensors"
    table = load_table(path)
    table.metadata["fingerprint"] = "0" * 32
    table.save(path)
    for name in ("best", "global", str(path)):
        with pytest.raises(ValueError, match=r"the allocation is of another checkpoint.*greedy.py --method global"):
            resolve_allocation(name, copy, 0.5)


def test_a_stopped_run_goes_on(made, tmp_path, monkeypatch):
    copy = shutil.copytree(made, tmp_path / "copy")
    (copy / "allocation_global.safetensors").unlink()
    monkeypatch.setattr(refine, "LEVELS", (0.3, 0.6))
    options = {"data": [str(copy / "text.txt")], "num_tokens": 800, "updates": 1, "method": "global"}
    original, calls = refine.Refinement.update, []

    def stop(self, *args):
        calls.append(args[1])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(refine.Refinement, "update", stop)
    with pytest.raises(KeyboardInterrupt):
        greedy.main(copy, **options, precision="float32")
    assert load_table(copy / "allocation_global.safetensors.partial.safetensors").levels == [0.3]
    greedy.main(copy, **options, precision="float32")
    assert calls == [0.3, 0.6, 0.6]
    expected = load_table(made / "allocation_global.safetensors")
    for name, tensor in load_table(copy / "allocation_global.safetensors").tensors.items():
        torch.testing.assert_close(tensor, expected.tensors[name])


def test_mistakes(made):
    for options, message in (({"updates": -1}, "--updates -1"), ({"num_tokens": 1}, "--num_tokens 1 is too few")):
        with pytest.raises(ValueError, match=message):
            greedy.main(made, method="global", **options)


@pytest.mark.parametrize("missing", ["levels", "0.o.shift", "all"])
def test_damaged_tables(missing, made, tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(made / "allocation_global.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if missing != "all" and name != missing}
    path = tmp_path / "table.safetensors"
    save_file(kept or {"levels": torch.ones(1)}, path, {"format": "thresholds 1"})
    with pytest.raises(ValueError, match="is damaged"):
        load_table(path)
