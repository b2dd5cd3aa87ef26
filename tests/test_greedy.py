"""The greedy allocation against a plain reading of Algorithm 1, its file, and what --allocation makes of it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import calibrate
import eval as evaluation
import generate
import greedy
from calibrate import Statistics, collect, load_statistics
from greedy import Allocation, load_allocation, resolve_allocation, teal_paths
from model import ModelArgs, Transformer
from refine import ThresholdTable
from sparse_model import PROJECTIONS, SparseTransformer

SMALL = {"block_size": 64, "vocab_size": 96, "n_layer": 2, "n_head": 4, "dim": 32, "intermediate_size": 48}
SIZES = {"q": 32 * 32, "k": 32 * 16, "v": 32 * 16, "o": 32 * 32, "gate": 32 * 48, "up": 32 * 48, "down": 48 * 32}
SENTENCE = "Hello, my name is Ann and this is story {} of {} rivers. "
BRIEF = {"device": "cpu", "precision": "float32", "max_new_tokens": 8, "num_samples": 1}


def build(cls: type, **changes) -> Transformer:
    model = cls(ModelArgs(**SMALL | {"n_local_heads": 2} | changes), dtype=torch.float32)
    model.init_weights(seed=3, std=0.25)
    return model.requires_grad_(False).eval()


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(SMALL["vocab_size"], (3, 22), generator=torch.Generator().manual_seed(5))


# ---------------------------------------------------------------- the algorithm


def brute_force(model: Transformer, statistics: Statistics, tokens: torch.Tensor, step: float) -> list[dict]:
    """Algorithm 1 in words, on the dense model: whole windows without a cache, weights multiplied one by one."""
    length = tokens.shape[1]
    first = length - length // 4
    rope, masks = model.rope_and_masks(torch.arange(length))

    def output(block, mask, x, thresholds):
        """The block with its inputs at positions [first:] cut by hand; each projection's own part is kept."""

        def product(module, x):
            parts = []
            for name, weight in zip(module.segments, module.weight.split(list(module.segments.values())), strict=True):
                cut = x.clone()
                cut[:, first:][x[:, first:].abs() <= thresholds[name]] = 0
                parts.append(cut @ weight.T)
            return torch.cat(parts, -1)

        modules = (block.attention.wqkv, block.attention.wo, block.feed_forward.w13, block.feed_forward.w2)
        hooks = [m.register_forward_hook(lambda m, args, _: product(m, args[0])) for m in modules]
        y = block(x, rope, mask, None)
        for hook in hooks:
            hook.remove()
        return y

    x, paths = model.tok_embeddings(tokens), []
    for i, (block, mask) in enumerate(zip(model.layers, masks, strict=True)):
        dense = block(x, rope, mask, None)

        def error(shares, i=i, block=block, mask=mask, x=x, dense=dense):
            thresholds = {p: statistics.threshold(i, p, share) for p, share in shares.items()}
            difference = (output(block, mask, x, thresholds) - dense)[:, first:].double()
            return sum(d.square().sum().sqrt().item() for d in difference.flatten(0, 1)) / (len(tokens) * (length // 4))

        shares = dict.fromkeys(PROJECTIONS, 0.0)
        path = [(0.0, dict(shares))]
        while any(share < 0.99 for share in shares.values()):
            trials = []
            for p in PROJECTIONS:
                if shares[p] < 0.99:
                    trial = shares | {p: min(0.99, shares[p] + step * SIZES["q"] / SIZES[p])}
                    trials.append((error(trial), PROJECTIONS.index(p), trial))
            least, _, shares = min(trials)
            path.append((least, shares))
        paths.append(path)
        x = dense
    return paths


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 5, "windowed_layers": [1]}])
def test_the_path_is_that_of_brute_force(tokens, changes):
    dense, sparse = build(Transformer, **changes), build(SparseTransformer, **changes)
    sparse.load_state_dict(dense.state_dict())
    statistics = collect(sparse, tokens)
    paths = list(teal_paths(sparse, statistics, tokens, 0.25))
    expected = brute_force(dense, statistics, tokens, 0.25)
    assert len(paths) == 2
    for rows, path in zip(paths, expected, strict=True):
        found = [{p: rows[p][i] for p in PROJECTIONS} for i in range(len(rows["level"]))]
        assert found == [pytest.approx(shares, abs=1e-6) for _, shares in path]
        assert rows["error"] == pytest.approx([error for error, _ in path], rel=1e-4, abs=1e-5)
        order = [max(PROJECTIONS, key=lambda p, i=i: found[i + 1][p] - found[i][p]) for i in range(9)]
        assert len(set(order)) > 3  # no order that is easily met by chance
    assert paths[0]["q"] != paths[1]["q"]
    assert all(block.attention.kv_cache is None for block in sparse.layers)


def test_steps_cut_equal_shares_of_the_weights(tokens):
    model = build(SparseTransformer)
    for rows in teal_paths(model, collect(model, tokens), tokens, 0.22):
        shares = np.array([rows[p] for p in PROJECTIONS])
        sizes = np.array([SIZES[p] for p in PROJECTIONS])
        np.testing.assert_allclose(rows["level"], sizes @ shares / sizes.sum(), atol=1e-7)
        rises = np.diff(shares)
        assert ((rises > 0).sum(0) == 1).all()  # a step raises one projection
        whole = (shares[:, 1:] < 0.99) | (rises == 0)
        np.testing.assert_allclose(np.diff(rows["level"])[whole.all(0)], 0.22 * 1024 / sizes.sum(), atol=1e-7)
        assert (shares[:, 0] == 0).all() and (shares[:, -1] == 0.99).all()


def test_skipped_blocks_change_nothing(tokens):
    model = build(SparseTransformer)
    statistics = collect(model, tokens)
    both = list(teal_paths(model, statistics, tokens, 0.4))
    assert list(teal_paths(model, statistics, tokens, 0.4, skip=1)) == both[1:]


def test_outputs_that_are_not_finite(tokens):
    model = build(SparseTransformer)
    statistics = collect(model, tokens)
    model.layers[1].ffn_norm.weight[3] = float("inf")
    paths = teal_paths(model, statistics, tokens, 0.5)
    next(paths)
    with pytest.raises(ValueError, match=r"layer 1 is not finite.*--precision"):
        next(paths)


# ---------------------------------------------------------------- levels


def simple_allocation(**metadata) -> Allocation:
    rows = {p: [0.0, 0.2, 0.6] for p in PROJECTIONS} | {"level": [0.0, 0.2, 0.6]}
    other = rows | {"level": [0.0, 0.4, 0.8], "q": [0.1, 0.1, 0.9]}
    return Allocation([rows, other], metadata)


def test_a_level_lies_between_its_neighbours():
    first, second = simple_allocation().at(0.5)
    assert first == pytest.approx(dict.fromkeys(PROJECTIONS, 0.5))
    assert second == pytest.approx(dict.fromkeys(PROJECTIONS, 0.3) | {"q": 0.3})
    assert simple_allocation().at(0.2)[1] == pytest.approx(dict.fromkeys(PROJECTIONS, 0.1) | {"q": 0.1})
    assert simple_allocation().at(0.6)[0]["q"] == 0.6  # the last row of all layers
    for beyond in (-0.01, 0.61):
        with pytest.raises(ValueError, match=rf"sparsity {beyond} is outside.*0.000 to 0.600.*--allocation uniform"):
            simple_allocation().at(beyond)


def test_every_level_is_met_in_every_block(tokens):
    model = build(SparseTransformer)
    statistics = collect(model, tokens)
    allocation = Allocation(list(teal_paths(model, statistics, tokens, 0.4)), {})
    inputs = []
    for module in model.sites:
        module.register_forward_pre_hook(lambda _, args: inputs.append(args[0].abs()))
    model(tokens)  # dense
    for level in (0.0, 0.25, 0.4, 0.5, 0.65, 0.987):
        shares, cut = allocation.at(level), [0.0, 0.0]
        model.set_sparsity(statistics, shares)
        for i, (module, x) in enumerate(zip(model.sites, inputs, strict=True)):
            for name, threshold in zip(module.segments, module.threshold, strict=True):
                cut[i // 4] += (x <= threshold).float().mean().item() * SIZES[name] / sum(SIZES.values())
        assert cut == pytest.approx([level] * 2, abs=0.005)  # what the thresholds cut
        for layer in shares:
            assert sum(SIZES[p] * layer[p] for p in PROJECTIONS) / sum(SIZES.values()) == pytest.approx(level, abs=1e-6)


def test_a_projection_without_its_share():
    model = build(SparseTransformer)
    statistics = collect(model, torch.arange(40).view(2, 20))
    shares = [dict.fromkeys(PROJECTIONS, 0.5), dict.fromkeys(PROJECTIONS[:-2], 0.5)]
    with pytest.raises(ValueError, match="layer 1 says no sparsity for up, down"):
        model.set_sparsity(statistics, shares)
    assert not any(module.threshold.any() for module in model.sites)


# ---------------------------------------------------------------- files


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "rivers.txt"
    path.write_text("".join(SENTENCE.format(i, i * i) for i in range(200)))
    return path


@pytest.fixture(scope="module")
def made(tiny, text, tmp_path_factory) -> Path:
    """A copy of the tiny checkpoint with statistics and an allocation."""
    folder = tmp_path_factory.mktemp("org") / "tiny"
    shutil.copytree(tiny, folder)
    calibrate.main(checkpoint_path=folder, data=[str(text)], num_tokens=640, precision="float32")
    make(folder, text)
    return folder


@pytest.fixture
def copy(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "tiny"))


def make(folder: Path, text: Path, **changes) -> Allocation:
    options = {"data": [str(text)], "num_tokens": 480, "step": 0.5, "precision": "float32"}
    return greedy.main(checkpoint_path=folder, **options | changes)


def change(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_main(made, text, capsys, tmp_path):
    allocation = make(made, text, output=tmp_path / "out" / "a.json")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["sparsity", *PROJECTIONS] and len(lines) == 6
    mean = sum(layer["down"] for layer in allocation.at(0.4)) / 2
    assert lines[2].split()[0] == "40%" and lines[2].split()[-1] == f"{mean:.1%}"
    assert "480 tokens of rivers.txt" in lines[-1]
    assert (tmp_path / "out" / "a.json").read_bytes() == (made / "allocation_greedy.json").read_bytes()  # made twice
    found = load_allocation(made / "allocation_greedy.json")
    assert (found.layers, found.metadata) == (allocation.layers, allocation.metadata)
    about = {"method": "teal", "text": "rivers.txt", "tokens": 480, "window": 160, "step": 0.5, "dtype": "float32"}
    assert about.items() <= found.metadata.items()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.json"]


def test_without_data_the_model_writes_its_own(copy):
    allocation = greedy.main(checkpoint_path=copy, num_tokens=100, step=0.5, precision="float32", seed=4)
    assert (allocation.metadata["text"], allocation.metadata["window"]) == ("the model's own, seed 4", 100)


@pytest.fixture
def stopped(copy, text, monkeypatch) -> Path:
    """The checkpoint after a run that was interrupted in its second block; `counted` counts the blocks since."""
    (copy / "allocation_greedy.json").unlink()
    original = greedy.greedy_path

    def interrupted(model, layer, *rest):
        if layer == 1:
            raise KeyboardInterrupt
        return original(model, layer, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(greedy, "greedy_path", interrupted)
        make(copy, text)
    assert not (copy / "allocation_greedy.json").exists()
    assert len(load_allocation(copy / "allocation_greedy.json.partial.json").layers) == 1
    return copy


@pytest.fixture
def searched(monkeypatch) -> list[int]:
    """The layers whose path was searched."""
    original, layers = greedy.greedy_path, []
    monkeypatch.setattr(greedy, "greedy_path", lambda *args: layers.append(args[1]) or original(*args))
    return layers


def test_a_stopped_run_goes_on(stopped, made, text, searched):
    make(stopped, text)
    assert searched == [1]
    assert (stopped / "allocation_greedy.json").read_bytes() == (made / "allocation_greedy.json").read_bytes()
    assert not (stopped / "allocation_greedy.json.partial.json").exists()


@pytest.mark.parametrize("changes", [{"step": 0.4}, {"num_tokens": 320}, {"precision": "bfloat16"}, {"data": 0}, {}])
def test_what_a_run_with_other_settings_left_is_not_used(stopped, text, searched, changes, tmp_path):
    if "data" in changes:  # another text of the same name and length
        (tmp_path / text.name).write_text(text.read_text()[7:])
        changes = {"data": [str(tmp_path / text.name)]}
    if not changes:
        statistics = load_statistics(stopped / "calibration.safetensors")
        statistics.tensors["1.down.magnitude"] = statistics.tensors["1.down.magnitude"] * 1.01
        statistics.save(stopped / "calibration.safetensors")
    make(stopped, text, **changes)
    assert searched == [0, 1]


def test_a_damaged_partial_file_is_not_used(stopped, text, searched):
    partial = stopped / "allocation_greedy.json.partial.json"
    partial.write_text(partial.read_text()[:-40])
    make(stopped, text)
    assert searched == [0, 1]


@pytest.mark.parametrize(("changes", "message"), [
    ({"step": 0.0}, "--step 0.0"), ({"step": 1.0}, "--step 1.0"), ({"num_tokens": 1}, "--num_tokens 1"),
    ({"num_tokens": 100}, "100 asked for: at least"), ({"data": ["absent.txt"]}, "absent.txt"),
    ({"statistics": Path("absent.safetensors")}, "no statistics file"), ({"checkpoint_path": Path("absent")}, "absent"),
    ({"device": "mars"}, "--device mars"), ({"output": Path(__file__) / "a.json"}, "give another --output"),
    ({"device": "meta"}, "--device meta is not supp"), ({"output": Path("a.safetensors")}, "what --method teal writes"),
])  # fmt: skip
def test_mistakes(made, text, changes, message):
    with pytest.raises(ValueError, match=message):
        make(**{"folder": changes.pop("checkpoint_path", made), "text": text} | changes)


ROWS = simple_allocation().layers[0]


@pytest.mark.parametrize("content", [
    "", "[]", "null", '"layers"', "{}", '{"format": "x", "layers": []}',
    json.dumps({"format": "other", "layers": [ROWS]}),
    *(json.dumps({"format": greedy.FORMAT, "layers": layers}) for layers in (
        [], {}, [None], [{}], [ROWS, 3], [ROWS | {"q": [0, 0.2]}], [ROWS | {"q": [0, 0.2, 1.0]}],
        [ROWS | {"q": [0, "x", 0.5]}], [ROWS | {"q": [0, -0.1, 0.5]}], [ROWS | {"level": [0, 0.5, 0.5]}],
        [ROWS | {"q": [0, float("nan"), 0.5]}], [{name: [] for name in ROWS}], [{"level": ROWS["level"]}],
    )),
])  # fmt: skip
def test_files_that_are_no_allocation(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"a\.json is truncated or not an allocation.*greedy.py"):
        load_allocation(path)


def test_a_missing_file_and_a_binary_one(made, tmp_path):
    with pytest.raises(ValueError, match=r"no allocation file at .*a\.json; make it with greedy.py"):
        load_allocation(tmp_path / "a.json")
    with pytest.raises(ValueError, match="not an allocation"):
        load_allocation(made / "calibration.safetensors")


# ---------------------------------------------------------------- --allocation


def thresholds(folder: Path, shares) -> torch.Tensor:
    model = SparseTransformer.from_checkpoint(folder, dtype=torch.float32)
    model.set_sparsity(load_statistics(folder / "calibration.safetensors"), shares)
    return torch.cat([module.threshold.flatten() for module in model.sites])


def test_names(copy):
    shares = load_allocation(copy / "allocation_greedy.json").at(0.5)
    elsewhere = str(shutil.copyfile(copy / "allocation_greedy.json", copy / "mine.json"))
    assert resolve_allocation("best", copy, 0.5) == resolve_allocation("greedy", copy, 0.5) == ("greedy", shares)
    assert resolve_allocation("uniform", copy, 0.5) == ("uniform", 0.5)
    assert resolve_allocation(elsewhere, copy, 0.5) == (elsewhere, shares)
    refined = copy / "allocation_global.safetensors"
    fingerprint = load_allocation(copy / "allocation_greedy.json").metadata["fingerprint"]
    table = ThresholdTable([], {}, {"fingerprint": fingerprint})
    model = SparseTransformer.from_checkpoint(copy, dtype=torch.float32)
    table.append(0.8, [(module.threshold + 1, module.threshold[0]) for module in model.sites])
    table.save(refined)
    for name in ("best", "global", str(refined)):
        found, cuts = resolve_allocation(name, copy, 0.4)
        assert found == name.replace("best", "global") and len(cuts) == 8 and cuts[0][0].unique().tolist() == [0.5]
    assert resolve_allocation("best", copy, 0.4, statistics=copy / "some.safetensors")[0] == "greedy"
    assert resolve_allocation("greedy", copy, 0.5) == ("greedy", shares)
    for name, path in (("global", refined), ("greedy", copy / "allocation_greedy.json")):
        path.unlink()
        with pytest.raises(ValueError, match=rf"--allocation {name}: .*{path.name}.*best, uniform, greedy"):
            resolve_allocation(name, copy, 0.5)
    assert resolve_allocation("best", copy, 0.5) == ("uniform", 0.5)


def test_names_for_random_weights(made):
    assert resolve_allocation("best", None, 0.5) == ("uniform", 0.5)
    for name in ("greedy", "absent.json"):
        with pytest.raises(
            ValueError, match=rf"--allocation {name}: no file {name}.*best, uniform, .*or a file's path"
        ):
            resolve_allocation(name, None, 0.5)
    path = str(made / "allocation_greedy.json")  # its checkpoint cannot be told from random weights
    assert resolve_allocation(path, None, 0.5) == (path, load_allocation(path).at(0.5))


@pytest.fixture
def used(monkeypatch) -> list[torch.Tensor]:
    """Thresholds that runs have set, all of a model in one."""
    original, seen = SparseTransformer.set_sparsity, []

    def record(self, *args):
        original(self, *args)
        seen.append(torch.cat([module.threshold.flatten() for module in self.projections]))

    monkeypatch.setattr(SparseTransformer, "set_sparsity", record)
    return seen


@pytest.mark.parametrize(("allocation", "name"), [("best", "greedy"), ("greedy", "greedy"), ("uniform", "uniform")])
def test_programs_use_and_name_it(made, text, used, capsys, allocation, name):
    shares = load_allocation(made / "allocation_greedy.json").at(0.45) if name == "greedy" else 0.45
    expected = thresholds(made, shares)
    used.clear()
    options = {"checkpoint_path": made, "sparsity": 0.45, "allocation": allocation}
    result = evaluation.main(**options, data=text, context=40, window=20, num_windows=2, precision="float32")
    assert result["allocation"] == name and f"45% asked for ({name} allocation)" in capsys.readouterr().out
    generate.main(**options, **BRIEF)
    assert f"45% asked for ({name} allocation)" in capsys.readouterr().out
    assert len(used) == 2 and torch.equal(used[0], expected) and torch.equal(used[1], expected)


def programs(folder: Path, text: Path, **options) -> list[str]:
    """What generate.py and eval.py refuse it with."""
    options |= {"checkpoint_path": folder}
    messages = []
    for run in (
        lambda: generate.main(**{"sparsity": 0.5} | options, **BRIEF),
        lambda: evaluation.main(**{"sparsity": 0.5} | options, data=text, context=40, window=20, num_windows=1),
    ):
        with pytest.raises(ValueError) as error:
            run()
        messages.append(str(error.value))
    return messages


def test_allocations_that_do_not_do(copy, text):
    path = copy / "allocation_greedy.json"
    layers = json.loads(path.read_text())["layers"]
    for message in programs(copy, text, sparsity=0.995, allocation="greedy"):
        assert "sparsity 0.995 is outside" in message
    change(path, layers=layers + layers[:1])
    for message in programs(copy, text):
        assert "the model has 2 layers, the statistics 2, the allocation 3" in message
    change(path, layers=layers, fingerprint="0" * 32)
    for allocation in ("best", "greedy", str(path)):
        for message in programs(copy, text, allocation=allocation):
            assert f"the allocation is of another checkpoint than {copy} (000" in message
            assert f"python greedy.py --checkpoint_path {copy}" in message
    path.write_text("{}")
    for message in programs(copy, text):
        assert "not an allocation" in message
    for message in programs(copy, text, allocation="absent.json"):
        assert "--allocation absent.json: no file absent.json" in message
