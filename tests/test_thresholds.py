"""Cuts and their tables, which rule a run uses, and what it says of files that do not do."""

import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from models import SMALL, build, flags, random_tokens
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import eval as evaluation
import generate
import thresholds
from calibrate import collect
from formats.checkpoint import fingerprint
from sparse_model import SITES, SparseTransformer
from thresholds import (
    RULES,
    STATISTICS_FORMAT,
    STATISTICS_NAME,
    TABLE_FORMAT,
    Cuts,
    CutTable,
    Statistics,
    cuts_for,
    cuts_of_shares,
    load_statistics,
    load_table,
    make_table,
    recorded_perplexity,
    table_metadata,
    teal_statistics,
)

WIDTHS = [(3, 32), (1, 32), (2, 32), (1, 48)] * 2  # of `tiny`: segments and inputs of each site
LEVELS = (0.2, 0.6)
NAMES = ("refined", "greedy")


def cuts_at(level: float) -> Cuts:
    thresholds = [torch.full((segments, n_in), level) for segments, n_in in WIDTHS]
    return Cuts(level, thresholds, [torch.full((n_in,), -level) for _, n_in in WIDTHS])


def table_at(*levels: float, **metadata) -> CutTable:
    table = CutTable([], {}, metadata)
    for level in levels:
        table.append(cuts_at(level))
    return table


def write(folder: Path, rule: str, *levels: float, **metadata) -> Path:
    path = folder / f"thresholds_{rule}.safetensors"
    table_at(*levels, **{"rule": rule, "fingerprint": fingerprint(folder)} | metadata).save(path)
    return path


def no_statistics():
    raise AssertionError("statistics are not read")


def rule_of(name: str, folder: Path | None, sparsity: float = 0.5, **options) -> str:
    return cuts_for(name, sparsity, folder, no_statistics, **options)[0]


# ---------------------------------------------------------------- the table


@pytest.mark.parametrize("half", [False, True])
def test_a_sparsity_lies_between_its_levels(tmp_path, half):
    table = table_at(*LEVELS, rule="refined")
    if half:
        table.halve()
    table.save(tmp_path / "t.safetensors")
    loaded = load_table(tmp_path / "t.safetensors")
    assert loaded.metadata == {"rule": "refined"} and loaded.levels == [0.2, 0.6] and loaded.n_layer == 2
    assert {tensor.dtype for tensor in loaded.tensors.values()} == {torch.float16 if half else torch.float32}
    # below the first level thresholds sink to 0, and shifts stay
    for sparsity, shift in {0.0: -0.2, 0.1: -0.2, 0.2: -0.2, 0.3: -0.3, 0.5: -0.5, 0.6: -0.6}.items():
        cuts = loaded.at(sparsity)
        assert cuts.sparsity == sparsity and [tuple(t.shape) for t in cuts.thresholds] == WIDTHS
        for threshold, c in zip(cuts.thresholds, cuts.shifts, strict=True):
            assert threshold.dtype == c.dtype == torch.float32
            assert (threshold - sparsity).abs().max() < 3e-4 and (c - shift).abs().max() < 3e-4
    for beyond in (-0.01, 0.61):
        with pytest.raises(ValueError, match=rf"sparsity {beyond} is outside.*0 to 0.600; .*--thresholds uniform"):
            loaded.at(beyond)


def test_a_level_itself_is_exact():
    table = CutTable([], {}, {})
    torch.manual_seed(0)
    cuts = [cuts_at(level)._replace(thresholds=[torch.rand(shape) for shape in WIDTHS]) for level in LEVELS]
    for each in cuts:
        table.append(each)
    for level, expected in zip(LEVELS, cuts, strict=True):
        assert all(map(torch.equal, table.at(level).thresholds, expected.thresholds))


def test_halves_stay_finite():
    table = CutTable([], {}, {})
    wide = [torch.full(shape, 1e6) for shape in WIDTHS]
    table.append(Cuts(0.2, wide, [None] * 8))
    table.append(Cuts(0.4, [t + float("inf") for t in wide], [None] * 8))
    table.halve()
    assert all(threshold.isfinite().all() for threshold in table.at(0.3).thresholds)


def test_the_recorded_perplexity():
    record = {"text": "a text", "perplexity": [(0.0, 10.0), (0.4, 20.0), (0.6, 80.0)]}
    table = table_at(0.4, 0.6, quality=json.dumps(record))
    assert table.perplexity_at(0.4) == (10.0, pytest.approx(20.0), "a text")
    assert table.perplexity_at(0.5)[1] == pytest.approx(40.0)  # the logarithm is linear
    assert table_at(0.4).perplexity_at(0.4) is None


def test_cuts_of_shares():
    model = build(SparseTransformer, SMALL, n_local_heads=2)
    statistics = collect(model, random_tokens(2, 30))
    shares = [{p: 0.1 * (1 + i + layer) for i, p in enumerate("q k v o gate up down".split())} for layer in (0, 1)]
    cuts = cuts_of_shares(statistics, shares, 0.4)
    assert cuts.sparsity == 0.4 and cuts.shifts == [None] * 8
    expected = [statistics.threshold(1, p, 0.1 * i) for p, i in (("gate", 6), ("up", 7))]
    torch.testing.assert_close(cuts.thresholds[len(SITES) + 2][:, 0], torch.tensor(expected))


def test_a_table_is_made_step_by_step(tiny, tmp_path):
    output, tokens = tmp_path / "t.safetensors", random_tokens(2, 8)
    metadata = table_metadata("refined", tiny, "a text", tokens, [tokens], updates=3)
    assert metadata.items() >= {"tokens": "16", "window": "8", "updates": "3", "fingerprint": fingerprint(tiny)}.items()
    assert metadata["inputs"] == hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:32]
    calls = []

    def steps(table, stop=False):
        for level in LEVELS[len(table.levels) :]:
            if stop and level == 0.6:
                raise KeyboardInterrupt
            calls.append(level)
            table.append(cuts_at(level))
            yield

    with pytest.raises(KeyboardInterrupt):
        make_table(output, CutTable([], {}, metadata), lambda table: steps(table, stop=True))
    (partial,) = tmp_path.glob("t.safetensors.*.partial.safetensors")
    assert load_table(partial).levels == [0.2] and not output.exists()

    # another table begins anew in a file of its own, the same one goes on and says so
    with warnings.catch_warnings(action="error"):
        make_table(output, CutTable([], {}, metadata | {"updates": "4"}), steps)
    assert partial.exists()
    with pytest.warns(UserWarning, match="goes on where an earlier run stopped"):
        assert make_table(output, CutTable([], {}, metadata), steps).levels == list(LEVELS)
    assert calls == [0.2, 0.2, 0.6, 0.6] and not partial.exists() and load_table(output).levels == list(LEVELS)


# ---------------------------------------------------------------- files that do not do


def test_files_that_are_no_table(tmp_path):
    path = tmp_path / "t.safetensors"
    with pytest.raises(ValueError, match=r"no cut table file at .*t\.safetensors; make it with greedy.py or refine.py"):
        load_table(path)
    table_at(0.5).save(path)
    content = path.read_bytes()
    for damaged in (b"", b"short", b"{}" * 99, content[:-40]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="is truncated or not a cut table file"):
            load_table(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="not a cut table file of this version"):
        load_table(path)
    with pytest.raises(ValueError, match="is a folder, not a cut table file"):
        load_table(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="is a pipe, not a cut table file"):
        load_table(tmp_path / "pipe")


DAMAGES = {
    "no levels": {"levels": None},
    "a site's thresholds": {"0.o.threshold": None},
    "a site's shifts": {"0.o.shift": None},
    "a layer": {f"0.{site}.{kind}": None for site in SITES for kind in ("threshold", "shift")},
    "a level of a site": {"1.down.threshold": torch.ones(1, 1, 48)},
    "not a vector": {"1.down.threshold": torch.tensor(1.0)},
    "another tensor": {"1.down.scale": torch.ones(2)},
    "falling levels": {"levels": torch.tensor([0.6, 0.2])},
    "equal levels": {"levels": torch.tensor([0.6, 0.6])},
    "level 0": {"levels": torch.tensor([0.0, 0.6])},
    "level 1": {"levels": torch.tensor([0.2, 1.0])},
    "nan": {"levels": torch.tensor([0.2, float("nan")])},
    "levels in a matrix": {"levels": torch.tensor([[0.2, 0.6]])},
    "a scalar": {"levels": torch.tensor(0.2)},
    "NaN": {"1.down.threshold": torch.full((2, 1, 48), float("nan"))},
    "infinite": {"1.down.threshold": torch.full((2, 1, 48), float("inf"))},
    "negative": {"1.down.threshold": torch.full((2, 1, 48), -0.1)},
    "complex": {"1.down.threshold": torch.ones(2, 1, 48, dtype=torch.complex64)},
    "float8": {"1.down.threshold": torch.ones(2, 1, 48).to(torch.float8_e4m3fn)},
    "integers": {"1.down.threshold": torch.ones(2, 1, 48, dtype=torch.int32)},
    "bools": {"1.down.threshold": torch.ones(2, 1, 48, dtype=torch.bool)},
    "another number of projections": {"1.down.threshold": torch.ones(2, 2, 48)},
    "no inputs": {"1.down.threshold": torch.ones(2, 1, 0)},
    "NaN shifts": {"0.o.shift": torch.full((2, 32), float("nan"))},
    "shifts of too many dimensions": {"0.o.shift": torch.zeros(2, 32, 1)},
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_tables(tmp_path, damage):
    path = tmp_path / "t.safetensors"
    table_at(*LEVELS).save(path)
    tensors = {name: tensor for name, tensor in (load_file(path) | DAMAGES[damage]).items() if tensor is not None}
    save_file(tensors, path, {"format": TABLE_FORMAT})
    with pytest.raises(ValueError, match=r"t\.safetensors is damaged: .*; make it with"):
        load_table(path)


@pytest.mark.parametrize("record", [
    "", "[" * 9999, "[]", "1", "{}", '{"text": "t", "perplexity": [[0, NaN]]}', '{"text": 1, "perplexity": [[0, 5.0]]}',
    '{"text": "t", "perplexity": []}', '{"text": "t", "perplexity": [[0, 5, 6]]}', '{"text": "t", "perplexity": "abc"}',
    '{"text": "t", "perplexity": [[0.5, 5.0], [0, 5.0]]}', '{"text": "t", "perplexity": {"0": 5}}',
])  # fmt: skip
def test_damaged_records_of_quality(tmp_path, record):
    path, table = tmp_path / "t.safetensors", table_at(*LEVELS)
    table.save(path)
    save_file(load_file(path), path, {"format": TABLE_FORMAT, "quality": record})
    with pytest.raises(ValueError, match=r"is damaged: '?its quality"):
        load_table(path)


def test_a_table_that_would_not_load_is_not_saved(tmp_path):
    table = table_at(*LEVELS)
    table.tensors["0.o.threshold"][0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"0\.o\.threshold' is not finite"):
        table.save(tmp_path / "t.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "tensor"), [
    ("0.qkv.magnitude", torch.linspace(0, 1, 1001).flip(0)), ("0.qkv.magnitude", torch.linspace(-1, 1, 1001)),
    ("0.qkv.magnitude", torch.full((1001,), float("nan"))), ("0.qkv.magnitude", torch.linspace(0, 1, 1000)),
    ("0.qkv.magnitude", torch.tensor(1.0)), ("0.qkv.magnitude", torch.ones(1001, dtype=torch.int32)),
    ("0.qkv.signed", torch.full((1001,), float("inf"))), ("0.q.column_norms", -torch.ones(32)),
    ("0.qkv.channel_mean", torch.zeros(0)), ("0.qkv.channel_mean", torch.zeros(2, 2)),
    ("2.qkv.magnitude", torch.linspace(0, 1, 1001)), ("10000000000.qkv.magnitude", torch.linspace(0, 1, 1001)),
    ("x.qkv.magnitude", torch.linspace(0, 1, 1001)), ("٣.qkv.magnitude", torch.linspace(0, 1, 1001)),
    ("0.w2.magnitude", torch.linspace(0, 1, 1001)), ("0.qkv.other", torch.linspace(0, 1, 1001)), ("0", torch.ones(1)),
])  # fmt: skip
def test_damaged_statistics(tmp_path, name, tensor):
    good = {"0.qkv.magnitude": torch.linspace(0, 1, 1001), "0.qkv.pooled": torch.tensor([0.0, 0.0, float("nan")])}
    path = tmp_path / "s.safetensors"
    Statistics(good, {"kind": "own"}).save(path)
    load_statistics(path)
    with pytest.raises(ValueError):
        Statistics(good | {name: tensor}, {"kind": "own"}).save(tmp_path / "other")
    save_file(good | {name: tensor}, path, {"format": STATISTICS_FORMAT, "kind": "own"})
    with pytest.raises(ValueError, match=r"s\.safetensors is damaged: .*; make it with calibrate.py"):
        load_statistics(path)


@pytest.mark.parametrize(("counts", "centers"), [
    (torch.ones(9), torch.linspace(-1, 1, 8)), (torch.tensor(1.0), torch.tensor(1.0)), (torch.ones(0), torch.ones(0)),
    (torch.ones(9), torch.linspace(-1, 1, 9).flip(0)), (torch.ones(9), torch.linspace(-2, -1, 9)),
    (-torch.ones(9), torch.linspace(-1, 1, 9)), (torch.zeros(9), torch.linspace(-1, 1, 9)),
    (torch.full((9,), float("nan")), torch.linspace(-1, 1, 9)), (torch.ones(9), torch.full((9,), float("inf"))),
    (torch.full((9,), 1e308, dtype=torch.float64), torch.linspace(-1, 1, 9)), (torch.ones(3, 3), torch.ones(3, 3)),
    (torch.ones(9, dtype=torch.complex64), torch.linspace(-1, 1, 9)), ("nine", torch.linspace(-1, 1, 9)),
])  # fmt: skip
def test_damaged_histograms_of_teal(tmp_path, counts, centers):
    good = {"h1": torch.ones(9), "h1_centers": torch.linspace(-1, 1, 9)}
    good |= {name.replace("1", "2"): tensor for name, tensor in good.items()}
    file = tmp_path / "layer-0" / "mlp" / "histograms.pt"
    file.parent.mkdir(parents=True)
    torch.save(good, file)
    assert teal_statistics(tmp_path).threshold(0, "gate", 0.5) == pytest.approx(0.375, abs=0.2)
    torch.save(good | {"h2": counts, "h2_centers": centers}, file)
    with pytest.raises(ValueError, match="TEAL's histograms"):
        teal_statistics(tmp_path)


@pytest.mark.parametrize(("name", "rule", "script"), [
    ("allocation_greedy.json", "greedy", "greedy.py"), ("allocation_global.safetensors", "refined", "refine.py"),
])  # fmt: skip
def test_old_files(copy, name, rule, script):
    (copy / name).write_text("{}")
    message = rf"{name} is of an earlier version and not read; make thresholds_{rule}.safetensors: python {script}"
    with pytest.raises(ValueError, match=message):
        rule_of(str(copy / name), copy)
    other = "greedy" if rule == "refined" else "refined"
    write(copy, other, 0.6)
    with pytest.warns(UserWarning, match=message):
        assert rule_of("best", copy) == other
    write(copy, rule, 0.6)  # it has a successor
    with warnings.catch_warnings(action="error"):
        rule_of("best", copy)


# ---------------------------------------------------------------- which rule


def test_the_best_rule_is_the_first_whose_table_reaches_the_sparsity(copy):
    statistics = collect(SparseTransformer.from_checkpoint(copy, dtype=torch.float32), random_tokens(1, 60, 300))

    def best(sparsity: float) -> str:
        rule, cuts = cuts_for("best", sparsity, copy, lambda: statistics)
        assert cuts.sparsity == sparsity
        return rule

    assert list(RULES) == ["refined", "greedy", "uniform"] and best(0.5) == "uniform"
    write(copy, "greedy", 0.2, 0.9)
    assert best(0.5) == "greedy" and best(0.95) == "uniform"
    write(copy, "refined", 0.2, 0.6)
    assert (best(0.5), best(0.6), best(0.7), best(0.0)) == ("refined", "refined", "greedy", "uniform")


def test_names(copy):
    for rule in NAMES:
        with pytest.raises(
            ValueError, match=rf"--thresholds {rule}: no cut table beside {copy}; make one: python \w+.py"
        ):
            rule_of(rule, copy)
        with pytest.raises(ValueError, match=f"--thresholds {rule}: no cut table for random weights"):
            rule_of(rule, None)
    write(copy, "refined", 0.8)
    write(copy, "greedy", 0.6)
    for rule, share in (("refined", 0.4), ("greedy", 0.4)):
        found, cuts = cuts_for(rule, share, copy, no_statistics)
        assert found == rule and cuts.thresholds[0].unique().item() == pytest.approx(share)
    elsewhere = str(shutil.copyfile(copy / "thresholds_greedy.safetensors", copy / "mine.safetensors"))
    for folder in (copy, None):  # random weights cannot be told from its checkpoint
        rule, cuts = cuts_for(elsewhere, 0.4, folder, no_statistics)
        assert rule == elsewhere and cuts.shifts[0].unique().item() == pytest.approx(-0.6)
    for name in ("absent.safetensors", str(copy), "teal"):
        with pytest.raises(
            ValueError, match=rf"--thresholds {name}: no such file; it takes best, refined, greedy, uniform"
        ):
            rule_of(name, copy)
    with pytest.raises(ValueError, match="--thresholds global is now refined"):
        rule_of("global", copy)
    with pytest.raises(ValueError, match=r"sparsity 0\.7 is outside"):
        rule_of("greedy", copy, 0.7)


def test_uniform_reads_statistics(tiny):
    statistics = collect(SparseTransformer.from_checkpoint(tiny, dtype=torch.float32), random_tokens(1, 60, 300))
    for name, own in (("uniform", False), ("best", False), ("uniform", True), ("best", True)):
        rule, cuts = cuts_for(name, 0.5, tiny, lambda: statistics, own)
        assert rule == "uniform" and cuts.shifts == [None] * 8
        assert cuts.thresholds[6][1, 0].item() == pytest.approx(statistics.threshold(1, "up", 0.5))


def test_statistics_beside_a_table_are_an_error(copy):
    paths = [write(copy, rule, 0.6) for rule in NAMES]
    for name in (*NAMES, str(paths[0])):
        with pytest.raises(ValueError, match=f"--statistics has no effect with --thresholds {name}, a table"):
            rule_of(name, copy, own_statistics=True)
    with pytest.raises(AssertionError, match="statistics are not read"):  # best is then uniform, which reads them
        rule_of("best", copy, own_statistics=True)


def test_tables_of_another_checkpoint(copy):
    path = write(copy, "refined", 0.6, fingerprint="0" * 32)
    for name in ("best", "refined", str(path)):
        with pytest.raises(
            ValueError, match=r"the cut table is of another checkpoint than .*\(000.*python refine.py --ch"
        ):
            rule_of(name, copy)
    with pytest.raises(ValueError, match=r"python greedy.py --checkpoint_path"):
        rule_of(str(write(copy, "greedy", 0.6, fingerprint="0" * 32)), copy)
    path.write_bytes(b"short")
    with pytest.raises(ValueError, match="truncated"):
        rule_of("best", copy)


# ---------------------------------------------------------------- the shipped table


def test_a_shipped_table_is_used_for_its_checkpoint_alone(copy, tmp_path, monkeypatch):
    monkeypatch.setattr(thresholds, "ASSETS", tmp_path / "assets")
    record = json.dumps({"text": "a text", "perplexity": [(0.0, 10.0), (0.6, 20.0)]})
    (tmp_path / "assets" / "model").mkdir(parents=True)
    write(copy, "refined", 0.6, quality=record).rename(tmp_path / "assets" / "model" / "thresholds_refined.safetensors")
    assert rule_of("best", copy) == rule_of("refined", copy) == "refined"
    assert recorded_perplexity("refined", copy, 0.6) == (10.0, pytest.approx(20.0), "a text")
    write(copy, "refined", 0.8)  # one beside the checkpoint comes first, and has no record
    assert rule_of("refined", copy, 0.8) == "refined" and recorded_perplexity("refined", copy, 0.6) is None
    assert recorded_perplexity("uniform", copy, 0.6) is None and recorded_perplexity("refined", None, 0.6) is None
    (copy / "thresholds_refined.safetensors").unlink()
    (copy / "config.json").write_text((copy / "config.json").read_text() + "\n")
    with pytest.raises(ValueError, match="no cut table beside"):
        rule_of("refined", copy)


def test_the_default_models_table_ships():
    (path,) = thresholds.ASSETS.glob("*/*.safetensors")
    assert path.parent.name == "SmolLM2-135M-Instruct" and path.stat().st_size <= 3e6
    table = load_table(path)
    assert table.metadata["rule"] == "refined" and table.n_layer == 30 and table.levels[-1] >= 0.65
    assert len(table.metadata["fingerprint"]) == 32
    dense, sparse, _ = table.perplexity_at(0.5)
    assert 1 < dense < sparse < 2 * dense
    with safe_open(path, "pt") as file:
        shapes = [tuple(file.get_slice(f"0.{site}.threshold").get_shape()) for site in SITES]
    levels = len(table.levels)
    assert shapes == [(levels, 3, 576), (levels, 1, 576), (levels, 2, 576), (levels, 1, 1536)]


def test_the_default_models_table_is_its_own():
    folder = Path(__file__).parents[1] / "checkpoints" / "HuggingFaceTB" / "SmolLM2-135M-Instruct"
    if not (folder / "config.json").is_file():
        pytest.skip("the default model is not here")
    (path,) = thresholds.ASSETS.glob("SmolLM2-135M-Instruct/*")
    assert load_table(path).metadata["fingerprint"] == fingerprint(folder)


# ---------------------------------------------------------------- programs


@pytest.mark.parametrize(("name", "rule"), [("best", "refined"), ("greedy", "greedy"), ("uniform", "uniform")])
def test_programs_use_and_name_it(copy, monkeypatch, capsys, name, rule):
    (copy / "text.txt").write_text("".join(f"Hello, my name is Ann and story {i} is of rivers.\n" for i in range(200)))
    model = SparseTransformer.from_checkpoint(copy, dtype=torch.float32)
    statistics = collect(model, random_tokens(1, 60, 300))
    statistics.metadata["fingerprint"] = fingerprint(copy)
    statistics.save(copy / STATISTICS_NAME)
    write(copy, "refined", 0.6)
    write(copy, "greedy", 0.9)
    expected, used = cuts_for(rule, 0.45, copy, lambda: statistics)[1], []
    original = SparseTransformer.set_cuts
    monkeypatch.setattr(SparseTransformer, "set_cuts", lambda self, cuts: used.append(cuts) or original(self, cuts))

    options = {"checkpoint_path": copy, "sparsity": 0.45, "thresholds": name, "device": "cpu", "precision": "float32"}
    result = evaluation.main(flags(**options, data=copy / "text.txt", context=40, window=20, num_windows=2))
    assert result["thresholds"] == rule and f"45% asked for ({rule} thresholds)" in capsys.readouterr().out
    generate.main(flags(**options, max_new_tokens=4, num_samples=1))
    assert f"45% asked for ({rule} thresholds)" in capsys.readouterr().out
    assert len(used) == 2
    for cuts in used:
        assert cuts.sparsity == 0.45 and all(map(torch.equal, cuts.thresholds, expected.thresholds))
