"""The greedy paths against a plain reading of Algorithm 1, and the cut table that greedy.py makes of them."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from models import SMALL, build, flags, random_tokens

import greedy
from calibrate import calibrate, collect
from greedy import add_layer, greedy_paths
from model import Transformer
from sparse_model import PROJECTIONS, SITES, SparseTransformer
from thresholds import STATISTICS_NAME, CutTable, Statistics, load_statistics, load_table

TWO_HEADS = SMALL | {"n_local_heads": 2}
SIZES = {"q": 32 * 32, "k": 32 * 16, "v": 32 * 16, "o": 32 * 32, "gate": 32 * 48, "up": 32 * 48, "down": 48 * 32}
SENTENCE = "Hello, my name is Ann and this is story {} of {} rivers. "
TABLE = "thresholds_greedy.safetensors"


@pytest.fixture
def tokens() -> torch.Tensor:
    return random_tokens(3, 22, seed=5)


# ---------------------------------------------------------------- the algorithm


def brute_force(model: Transformer, statistics: Statistics, tokens: torch.Tensor, step: float) -> list[dict]:
    """Algorithm 1 in words, on the dense model: whole windows without a cache, weights multiplied one by one."""
    length = tokens.shape[1]
    first = length - length // 4
    (rope, *_), masks = model.rope_and_masks(torch.arange(length))

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
                    trials.append((error(trial), list(PROJECTIONS).index(p), trial))
            least, _, shares = min(trials)
            path.append((least, shares))
        paths.append(path)
        x = dense
    return paths


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 5, "windowed_layers": [1]}])
def test_the_path_is_that_of_brute_force(tokens, changes):
    dense, sparse = build(Transformer, TWO_HEADS, **changes), build(SparseTransformer, TWO_HEADS, **changes)
    sparse.load_state_dict(dense.state_dict())
    statistics = collect(sparse, tokens)
    paths = list(greedy_paths(sparse, statistics, tokens, 0.25))
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
    model = build(SparseTransformer, TWO_HEADS)
    for rows in greedy_paths(model, collect(model, tokens), tokens, 0.22):
        shares = np.array([rows[p] for p in PROJECTIONS])
        sizes = np.array([SIZES[p] for p in PROJECTIONS])
        np.testing.assert_allclose(rows["level"], sizes @ shares / sizes.sum(), atol=1e-7)
        rises = np.diff(shares)
        assert ((rises > 0).sum(0) == 1).all()  # a step raises one projection
        whole = (shares[:, 1:] < 0.99) | (rises == 0)
        np.testing.assert_allclose(np.diff(rows["level"])[whole.all(0)], 0.22 * 1024 / sizes.sum(), atol=1e-7)
        assert (shares[:, 0] == 0).all() and (shares[:, -1] == 0.99).all()


def test_skipped_blocks_change_nothing(tokens):
    model = build(SparseTransformer, TWO_HEADS)
    statistics = collect(model, tokens)
    both = list(greedy_paths(model, statistics, tokens, 0.4))
    assert list(greedy_paths(model, statistics, tokens, 0.4, skip=1)) == both[1:]


def test_outputs_that_are_not_finite(tokens):
    model = build(SparseTransformer, TWO_HEADS)
    statistics = collect(model, tokens)
    model.layers[1].ffn_norm.weight[3] = float("inf")
    paths = greedy_paths(model, statistics, tokens, 0.5)
    next(paths)
    with pytest.raises(ValueError, match="the output of layer 1 in float32 is not finite"):
        next(paths)


# ---------------------------------------------------------------- the table


def table_of_paths(model: SparseTransformer, statistics: Statistics, tokens: torch.Tensor, levels: list) -> CutTable:
    table = CutTable(levels, {}, {})
    for path in greedy_paths(model, statistics, tokens, 0.4):
        add_layer(table, path, statistics)
    return table


def test_a_level_lies_between_its_rounds():
    model = build(SparseTransformer, TWO_HEADS)
    statistics = collect(model, random_tokens(3, 22))
    path = {p: [0.1, 0.2, 0.6] for p in PROJECTIONS} | {"level": [0.0, 0.4, 0.8], "q": [0.1, 0.1, 0.9]}
    table = CutTable([0.2, 0.4, 0.5], {}, {})
    add_layer(table, path, statistics)
    shares = dict(zip(PROJECTIONS, table.tensors["0.shares"].T.tolist(), strict=True))
    assert shares["up"] == pytest.approx([0.15, 0.2, 0.3]) and shares["q"] == pytest.approx([0.1, 0.1, 0.3])
    for i, share in enumerate([0.1, 0.1, 0.3]):
        assert table.tensors["0.qkv.threshold"][i, 0].item() == pytest.approx(statistics.threshold(0, "q", share))


def test_every_level_is_met_in_every_block(tokens):
    model = build(SparseTransformer, TWO_HEADS)
    statistics = collect(model, tokens)
    table = table_of_paths(model, statistics, tokens, [0.25, 0.4, 0.5, 0.65, 0.95])
    inputs = []
    for module in model.sites:
        module.register_forward_pre_hook(lambda _, args: inputs.append(args[0].abs()))
    model(tokens)  # dense
    for level in table.levels:
        model.set_cuts(table.at(level))
        cut = [0.0, 0.0]
        for i, (module, x) in enumerate(zip(model.sites, inputs, strict=False)):
            for name, threshold in zip(module.segments, module.threshold, strict=True):
                cut[i // len(SITES)] += (x <= threshold).float().mean().item() * SIZES[name] / sum(SIZES.values())
        assert cut == pytest.approx([level] * 2, abs=0.005)  # what the thresholds cut
        for layer in range(2):
            shares = table.tensors[f"{layer}.shares"][table.levels.index(level)].tolist()
            assert np.dot(list(SIZES.values()), shares) / sum(SIZES.values()) == pytest.approx(level, abs=1e-6)


# ---------------------------------------------------------------- the script


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "rivers.txt"
    path.write_text("".join(SENTENCE.format(i, i * i) for i in range(200)))
    return path


def make(folder: Path, text: Path, **changes) -> CutTable:
    options = {"data": text, "num_tokens": 480, "step": 0.5, "precision": "float32", "device": "cpu"}
    return greedy.main(flags(checkpoint_path=folder, **options | changes))


def assert_equal(a: CutTable, b: CutTable) -> None:
    assert (a.levels, a.metadata, a.tensors.keys()) == (b.levels, b.metadata, b.tensors.keys())
    assert all(torch.equal(a.tensors[name], tensor) for name, tensor in b.tensors.items())


@pytest.fixture(scope="module")
def made(tiny, text, tmp_path_factory) -> Path:
    """A copy of the tiny checkpoint with statistics and a cut table."""
    folder = shutil.copytree(tiny, tmp_path_factory.mktemp("org") / "tiny")
    model = SparseTransformer.from_checkpoint(folder, dtype=torch.float32)
    calibrate(folder, model, [str(text)], 640).save(folder / STATISTICS_NAME)
    make(folder, text)
    return folder


@pytest.fixture
def copy(made, tmp_path) -> Path:
    return shutil.copytree(made, tmp_path / "tiny")


def test_main(made, text, capsys, tmp_path):
    table = make(made, text, output=tmp_path / "out" / "a.safetensors")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["sparsity", *PROJECTIONS] and len(lines) == 6
    level = table.levels.index(0.4)
    mean = sum(table.tensors[f"{layer}.shares"][level, -1].item() for layer in range(2)) / 2
    assert lines[2].split()[0] == "40%" and lines[2].split()[-1] == f"{mean:.1%}"
    assert "480 tokens of rivers.txt" in lines[-1]
    loaded = load_table(made / TABLE)
    assert_equal(loaded, table)
    assert_equal(loaded, load_table(tmp_path / "out" / "a.safetensors"))  # made twice
    about = {"rule": "greedy", "text": "rivers.txt", "tokens": "480", "window": "160", "step": "0.5"}
    assert (about | {"dtype": "float32"}).items() <= loaded.metadata.items()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.safetensors"]


def test_without_data_the_model_writes_its_own(copy):
    table = make(copy, None, num_tokens=100, seed=4)
    assert (table.metadata["text"], table.metadata["window"]) == ("the model's own, seed 4", "100")


@pytest.fixture
def stopped(copy, text, monkeypatch) -> Path:
    """The checkpoint after a run that was interrupted in its second block."""
    (copy / TABLE).unlink()
    original = greedy.greedy_path

    def interrupted(model, layer, *rest):
        if layer == 1:
            raise KeyboardInterrupt
        return original(model, layer, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(greedy, "greedy_path", interrupted)
        make(copy, text)
    assert not (copy / TABLE).exists()
    assert load_table(next(copy.glob(f"{TABLE}.*.partial.safetensors"))).n_layer == 1
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
    assert_equal(load_table(stopped / TABLE), load_table(made / TABLE))
    assert not list(stopped.glob("*partial*"))


@pytest.mark.parametrize("changes", [{"step": 0.4}, {"num_tokens": 320}, {"precision": "bfloat16"}, {"data": 0}, {}])
def test_what_a_run_with_other_settings_left_is_not_used(stopped, text, searched, changes, tmp_path):
    if "data" in changes:  # another text of the same name and length
        (tmp_path / text.name).write_text(text.read_text()[7:])
        changes = {"data": tmp_path / text.name}
    if not changes:
        statistics = load_statistics(stopped / STATISTICS_NAME)
        statistics.tensors["1.down.magnitude"] = statistics.tensors["1.down.magnitude"] * 1.01
        statistics.save(stopped / STATISTICS_NAME)
    make(stopped, text, **changes)
    assert searched == [0, 1]


def test_a_damaged_partial_file_is_not_used(stopped, text, searched):
    (partial,) = stopped.glob(f"{TABLE}.*.partial.safetensors")
    partial.write_bytes(partial.read_bytes()[:-40])
    make(stopped, text)
    assert searched == [0, 1]


MISTAKES = {
    "--step 0.0": {"step": 0.0},
    "--step 1.0": {"step": 1.0},
    "--num_tokens 1": {"num_tokens": 1},
    "100 asked for: at least": {"num_tokens": 100},
    "absent.txt": {"data": "absent.txt"},
    "no statistics file": {"statistics": "absent.safetensors"},
    "no checkpoint at .*absent": {"checkpoint_path": "absent"},
    "--device mars": {"device": "mars"},
    "--device meta is not supp": {"device": "meta"},
    "argument --output: cannot write": {"output": Path(__file__) / "a.safetensors"},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes(made, text, message):
    options = dict(MISTAKES[message])
    with pytest.raises(ValueError, match=message):
        make(options.pop("checkpoint_path", made), text, **options)


def test_an_old_flag_is_named():
    with pytest.raises(ValueError, match=r"--method is now a script: greedy.py makes TEAL's thresholds, refine.py"):
        greedy.main(["--method", "global"])
