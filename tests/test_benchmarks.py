import csv
import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from models import FUSED, build_cut, flags

import benchmarks.results as results
import generate
import options
from benchmarks import cpu_decode, decode, gemv, paper, plot, quality
from benchmarks.results import provenance, read_rows, write_rows
from kernels import cpu
from model import ModelArgs
from options import QUALITY_RULES
from thresholds import Cuts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(gemv, "TILES", [(16, 64, 1), (32, 128, 2)])
    monkeypatch.setattr(gemv, "COLD_BYTES", 1)
    monkeypatch.setattr(gemv, "MIN_COPIES", 2)
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8", "int4"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 1.0])
def test_all_contenders_compute_the_same_product(small, sparsity, dtype):
    problem = gemv.Problem(172, 192, sparsity, dtype, DEVICE)
    kept = (problem.x.float().abs() > problem.threshold).sum()
    assert kept == round(172 * (1 - sparsity))
    for name, launches in gemv.contenders(problem, pdl=False).items():
        for launch, out in launches:
            gemv.check(launch, out, problem, name)


def test_ties_with_the_threshold_are_kept(small):
    """In bfloat16 most draws of so many inputs have some."""
    for _ in range(8):
        problem = gemv.Problem(4096, 16, 0.5, "bfloat16", DEVICE)
        assert (problem.x.float().abs() > problem.threshold).sum() == 2048


def test_a_row_holds_the_best_recording_and_the_bytes_read(small, monkeypatch):
    make, times = gemv.Problem, []

    def record(launch, matrices):
        times.append(float(torch.randint(1000, 9999, ())))
        return times[-1]

    monkeypatch.setattr(gemv, "Problem", lambda *arguments: make(*arguments, DEVICE))
    monkeypatch.setattr(gemv, "graph_us", record)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(gemv, "TILES", [(16, 64, 1), (32, 64, 1), (16, 128, 1), (32, 128, 2)])
    rows = {row["kernel"]: row for row in gemv.measure(1000, 64, 0.5, "bfloat16")}
    recorded = iter(times)
    of_kernel = {}
    for tiles in (4, 3, 3):  # of a rival: all, then the best three
        for name, launches in (("ours", 1), ("teal", tiles), ("dejavu", tiles), ("dense_t", 1), ("dense", 1)):
            of_kernel.setdefault(name, []).extend(next(recorded) for _ in range(launches))
    assert next(recorded, None) is None and rows.keys() == of_kernel.keys()
    for name, row in rows.items():
        assert float(row["us"]) == min(of_kernel[name])
        assert row["bytes"] == (1000 if name.startswith("dense") else 500) * 64 * 2


def test_the_best_three_tiles_go_on():
    assert gemv.promising([5.0, 1.0, 4.0, 2.0, 3.0]) == [1, 3, 4]


def test_check_notices_a_wrong_row():
    problem = gemv.Problem(64, 64, 0.5, "float32", DEVICE)
    launch, out = gemv.contenders(problem, pdl=False)["ours"][0]

    def wrong(matrix):
        launch((torch.roll(matrix[0], 1, dims=0).contiguous(), None))

    with pytest.raises(ValueError, match="wrong"):
        gemv.check(wrong, out, problem, "ours")


def test_check_notices_scales_of_other_outputs():
    for dtype in ("int8", "int4"):
        torch.manual_seed(0)
        problem = gemv.Problem(64, 128, 0.5, dtype, DEVICE)
        launch, out = gemv.contenders(problem, pdl=False)["ours"][0]

        def wrong(matrix, launch=launch):
            launch((matrix[0], matrix[1].roll(1, dims=0)))

        gemv.check(launch, out, problem, "ours")
        with pytest.raises(ValueError, match="wrong"):
            gemv.check(wrong, out, problem, "ours")


def test_only_whole_sweeps_are_drawn(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    drawn = []
    monkeypatch.setattr(plot, "save", lambda figure, name, legend: drawn.append((name, len(figure.axes))))
    key = "device model dtype quant batch gpus prompt_tokens new_tokens achieved_sparsity ms_per_token sparsity"
    row = dict.fromkeys(key.split(), "1") | {"quant": "int8", "draft": "none", "step": "fused"}
    for sparsity, expected in ((0.0, []), (0.25, []), (0.4, []), (0.5, [("decode.png", 1)])):
        write_rows("decode.csv", [row | {"sparsity": sparsity}], key)
        plot.plot_decode()
        assert drawn == expected


def test_bytes_read_count_the_scales():
    for dtype, row, rest in (("float16", 400, 0), ("int8", 192, 4 * 192), ("int4", 96 + 3 * 4, 0)):
        n_out = 200 if dtype == "float16" else 192
        assert gemv.Problem(64, n_out, 0.5, dtype, DEVICE).bytes_read(10) == 10 * row + rest


def test_shapes_come_from_the_config():
    assert gemv.shapes("llama-3-8b") == [(4096, 6144), (4096, 4096), (4096, 28672), (4096, 14336), (14336, 4096)]


def test_a_new_row_replaces_the_one_it_supersedes(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    key = "device sparsity"
    write_rows("x.csv", [{"device": "a", "sparsity": 0.5, "us": 1}, {"device": "b", "sparsity": 0.5, "us": 2}], key)
    write_rows("x.csv", [{"device": "a", "sparsity": 0.5, "us": 3}, {"device": "a", "sparsity": 0.0, "us": 4}], key)
    assert [(row["device"], row["sparsity"], row["us"]) for row in read_rows("x.csv")] == [
        ("b", "0.5", "2"),
        ("a", "0.5", "3"),
        ("a", "0.0", "4"),
    ]


def test_committed_rows_name_where_they_come_from():
    for path in results.RESULTS.glob("*.csv"):
        with open(path, newline="") as f:
            rows = list(csv.DictReader(f))
        columns = "device torch triton note" if path.name == "peers.csv" else "date device torch commit"
        assert rows and all(row[c] for row in rows for c in columns.split())


def test_provenance_says_what_ran():
    row = provenance("some device")
    assert row["device"] == "some device" and row["torch"] and row["commit"]


def test_a_row_is_a_run_of_its_command(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    given = flags(random_init="stories15M-int8", sparsities=[0.0, 0.5], max_new_tokens=2, num_samples=1, device="cpu")
    decode.main([*given, "--prompt", "9"])
    dense, row = read_rows("decode.csv")
    assert (row["model"], row["quant"], row["weights"]) == ("stories15M", "int8", "random")
    assert (row["batch"], row["gpus"], row["draft"]) == ("1", "1", "none") and set(decode.KEY.split()) < row.keys()
    assert (dense["sparsity"], row["sparsity"], row["prompt_tokens"]) == ("0.0", "0.5", "9")
    assert 0 < float(row["ttft_ms"]) < 1e5
    assert float(dense["achieved_sparsity"]) == 0 and float(row["achieved_sparsity"]) == pytest.approx(0.5, abs=0.1)

    # the command in the row is the run
    run = []
    monkeypatch.setattr(decode, "generate", lambda flags: run.append(flags) or generate.main(flags))
    words = shlex.split(row["command"])
    assert words[:2] == ["python", "generate.py"]
    again = decode.measure(words[2:], ModelArgs.from_name("stories15M-int8"))
    same = ("bytes_per_token", "achieved_sparsity", "prompt_tokens", "new_tokens", "sparsity")
    assert [str(again[k]) for k in same] == [row[k] for k in same] and run[0][-len(words[2:]) :] == words[2:]


def test_rows_of_a_batch_are_a_row_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(decode, "why_unfused", lambda *a: "too many rows" if a[2] > 1 else None)
    sizes = {"max_new_tokens": 2, "num_samples": 1, "device": "cpu", "sparsities": [0.0], "batch_size": 2}
    monkeypatch.setattr(decode, "generate", lambda flags: generate.main([*flags[1:], "--prompt", "9"]))  # not compiled
    decode.main(flags(random_init="stories15M", **sizes))
    assert [(row["batch"], row["step"], row["prompt_tokens"]) for row in read_rows("decode.csv")] == [
        ("2", "compiled", "9")
    ]
    with pytest.raises(ValueError, match="--prompts has no effect in a sweep"):
        decode.main(["--prompts", "x"])


def test_committed_rows_have_one_name_for_a_model_and_are_drawn(monkeypatch):
    pytest.importorskip("matplotlib")
    for name, key in (("decode.csv", decode.KEY), ("quality.csv", quality.KEY), ("cpu.csv", cpu_decode.KEY)):
        rows = read_rows(name)
        assert len({tuple(row[k] for k in key.split()) for row in rows}) == len(rows)
        assert {row["quant"] for row in rows} <= {"none", "packed", "int8", "int4"}
        assert not any(row["model"].endswith(("-packed", "-int8", "-int4")) for row in rows)
    assert {row["rule"] for row in read_rows("quality.csv")} <= set(QUALITY_RULES)
    drawn = {}
    monkeypatch.setattr(plot, "save", lambda figure, name, legend: drawn.update({name: figure}))
    for draw in (plot.plot_decode, plot.plot_gemv, plot.plot_quality):
        draw()
    for figure in drawn.values():
        for axis in (axis for axis in figure.axes if axis.get_visible()):
            low, high = axis.get_ylim()
            for line in axis.lines:
                assert all(low <= y <= high for y in line.get_ydata()), axis.get_title()

    # a model that was tuned for a sparsity is a point in its base's panel, at that sparsity alone
    lines = {line.get_label(): line for axis in drawn["quality.png"].axes for line in axis.lines}
    tuned = [row for row in read_rows("quality.csv") if "-lora-" in row["model"] and row["rule"] == "refined"]
    own = [r for r in tuned if r["model"].endswith(f"-{float(r['sparsity']):.0%}"[:-1]) and r["quant"] == "none"]
    found = sorted(zip(*lines["refined, weights tuned (LoRA)"].get_data(), strict=True))
    assert found == sorted((100 * float(r["achieved_sparsity"]), float(r["perplexity"])) for r in own)
    assert 0 < len(own) < len(tuned)


def test_bytes_between_two_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    row = {"device": "cpu", "model": "m", "quant": "int8", "dtype": "bfloat16"}
    rows = [row | {"achieved_sparsity": x, "bytes_per_token": y} for x, y in ((0.0, 100), (0.5, 60))]
    rows += [row | {"device": "GPU", "achieved_sparsity": 0.6, "bytes_per_token": 100}]
    write_rows("decode.csv", rows, "achieved_sparsity")
    assert plot.bytes_line("m", "int8")(25.0) == pytest.approx(80)
    assert plot.bytes_line("m", "none") is None


@pytest.mark.skipif(cpu.library() is None, reason="no C++ compiler")
def test_a_cpus_variants_take_turns_and_count_the_bytes_that_they_read():
    model = build_cut(FUSED | {"block_size": options.CACHE}, dtype=torch.bfloat16)
    cuts = Cuts(0.5, [m.threshold.clone() for m in model.sites], [None] * len(model.sites))
    model.setup_caches(1, options.CACHE)
    all_bytes = model.bytes_per_step()
    dense, cut = variants = [cpu_decode.Variant("dense", 0.0, 0), cpu_decode.Variant("sparse", 0.5, 0, cuts)]
    assert cpu_decode.measure(model, variants, None, steps=4, rounds=2) > 0
    assert [len(variant.seconds) for variant in variants] == [3, 3]
    assert dense.bytes_per_token == 0 and 0.3 * all_bytes < cut.bytes_per_token < 0.95 * all_bytes


def test_typos_are_in_every_50th_letter():
    text = "rhinoceros 1234567890 " * 3000
    wrong = paper.with_typos(text)
    words = [word for word in wrong.split() if word != "1234567890"]
    assert len(words) == 3000 and paper.with_typos(text) == wrong
    assert 0.16 < sum(word != "rhinoceros" for word in words) / 3000 < 0.20  # 1 - 0.98^10
    assert {9, 10, 11} <= {len(word) for word in words} <= {8, 9, 10, 11, 12}


def fake_results(out, **tables):
    for name, cells in tables.items():
        (out / name).mkdir(parents=True)
        for cell, result in cells.items():
            (out / name / f"{cell}.json").write_text(json.dumps({"achieved_sparsity": 0.0} | result))


def test_the_papers_report(tmp_path):
    cut = {"perplexity": 22.8123, "achieved_sparsity": 0.493}
    half = {"results": {"piqa": {"acc": 0.5, "acc_norm": 0.6}}}
    fake_results(
        tmp_path,
        perplexity={"refined@50": cut, "dense@0": {"perplexity": 18.7}, "refined@25": cut | {"perplexity": 18.9}},
        tasks={"piqa@50": half, "piqa@0": {"results": {"piqa": {"acc": 0.5, "acc_norm": 0.7}}}},
        robustness={"typos@greedy": cut, "c4@dense": cut},
        generation={"own-text@dense": {"perplexity": 5.0, "repetition": 0.1}},
        latency={"refined@0": {"tokens_per_sec": 900.0}, "refined@50": {"tokens_per_sec": 2290.0}},
    )
    (tmp_path / "missing").write_text(f"123 {tmp_path}/tasks/mmlu@0.json\n")
    (tmp_path / "commands.sh").write_text("python eval.py\n")
    (tmp_path / "runs").write_text("date 2026: 3 steps\n")
    paper.main(["report", str(tmp_path), "checkpoints/org/model, windows 2"])
    text = (tmp_path / "report.md").read_text()
    assert (
        text.startswith("# model\n\ncheckpoints/org/model, windows 2.\n\ndate 2026: 3 steps\n")
        and "tasks/mmlu@0.json" in text
        and "```\npython eval.py\n```" in text
    )
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert ["perplexity", "0", "25", "50"] in rows and ["dense", "18.70 (0.0)"] in rows
    assert ["refined", "", "18.90 (49.3)", "22.81 (49.3)"] in rows and ["piqa", "70.00", "60.00"] in rows
    assert ["robustness", "dense", "greedy"] in rows and ["own-text", "5.00; 10.0%"] in rows
    assert ["refined", "900.0 (0.0)", "2290.0 (0.0)"] in rows and (tmp_path / "report.png").stat().st_size > 9999


def test_the_papers_report_draws_what_was_measured(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(paper, "grid", lambda n: drawn.append(plot.grid(n)) or drawn[-1])
    for name in ("missing", "commands.sh", "runs"):
        (tmp_path / name).write_text("")
    paper.main(["report", str(tmp_path), "model, windows 2"])
    assert not drawn and "report.png" not in (tmp_path / "report.md").read_text()

    fake_results(
        tmp_path,
        perplexity={"dense@0": {"perplexity": 18.7}, "refined@50": {"perplexity": 22.8, "achieved_sparsity": 0.49}},
        latency={"refined@0": {"tokens_per_sec": 2528.7}, "refined@50": {"tokens_per_sec": 2265.8}},
    )
    paper.main(["report", str(tmp_path), "model, windows 2"])
    assert "![perplexity, latency](report.png)" in (tmp_path / "report.md").read_text()
    ((figure, _),) = drawn
    first, last = figure.axes
    assert [axis.get_ylabel() for axis in figure.axes] == ["WikiText-2: perplexity", "Decoding one text: tokens/s"]
    assert [len(line.get_xdata()) for line in first.lines] == [1, 2] and first.get_yscale() == "log"
    assert last.get_ylim()[0] == 0 and last.get_ylim()[1] > 2528.7 * 1.04

    # the dense point lies above those of the rules, which begin there
    dense, refined = first.lines
    assert dense.get_zorder() > refined.get_zorder()


def test_the_papers_steps_go_on_and_one_that_fails_stops_no_other(tmp_path):
    """All of paper.sh but its scripts, whose place a script takes that notes how it is called."""
    fake, root = tmp_path / "bin" / "python", Path(__file__).parents[1]
    fake.parent.mkdir()
    fake.write_text(
        """#!/bin/sh
echo "$@" >> "$LOG"
case "$*" in
  *" estimate "*) echo $(wc -l) left; exit;;
  *calibrate.py*) touch "$MODEL/calibration.safetensors";;
  *greedy.py*) touch "$MODEL/thresholds_greedy.safetensors";;
  *refine.py*) touch "$MODEL/thresholds_refined.safetensors";;
  *"$FAIL"*) exit 1;;
esac
echo progress
echo '{"perplexity": 1}'
"""
    )
    fake.chmod(0o755)
    model, log, out = tmp_path / "model", tmp_path / "log", tmp_path / "out"
    model.mkdir()
    (model / "config.json").write_text('{"max_position_embeddings": 4096}')
    (tmp_path / "wiki.txt").write_text("text")
    environment = os.environ | {"PATH": f"{fake.parent}:{os.environ['PATH']}", "LOG": str(log), "MODEL": str(model)}
    environment |= {"OUT": str(out), "WIKITEXT": str(tmp_path / "wiki.txt"), "TEXTS": "code=code.txt", "LIMIT": "7"}
    environment |= {"TASKS": "piqa mmlu=task.yaml:mmlu.jsonl:5", "NUM_WINDOWS": "9", "DEVICE": "cpu"}

    def run(**changes) -> list[str]:
        log.write_text("")
        command = [str(root / "benchmarks" / "paper.sh"), str(model)]
        run.done = subprocess.run(command, env=environment | changes, capture_output=True, text=True, check=True)
        return [line for line in log.read_text().splitlines() if not line.startswith("-m benchmarks.paper")]

    # 3 that prepare, 13 perplexities, 4 rules on 2 texts and of own text, 2 tasks and latency at 5 sparsities
    assert run(ESTIMATE="1", FAIL="no") == [] and run.done.stdout.endswith("43 left\n")
    first = run(FAIL="--thresholds greedy")
    assert len(first) == 43 and "failed: " + str(out / "perplexity/greedy@25.json") in run.done.stderr
    assert (out / "missing").read_text().count("greedy") == 7
    assert (out / "commands.sh").read_text().splitlines() == [f"python {line}" for line in first]
    assert run(FAIL="no") == [line for line in first if "--thresholds greedy" in line]
    assert run(FAIL="no") == [] and (out / "missing").read_text() == ""
    with pytest.raises(subprocess.CalledProcessError) as error:
        run(FAIL="no", NUM_WINDOWS="8")
    assert "has results of other settings" in error.value.stderr and "windows 8" in error.value.stderr

    # the commands themselves
    base = f"--checkpoint_path {model} --precision bfloat16 --device cpu"
    wikitext = f"--data {tmp_path / 'wiki.txt'}"
    cut = "--sparsity 0.65 --thresholds"
    assert f"eval.py {base} --json --tasks wikitext {wikitext} --num_windows 9 {cut} uniform" in first
    assert f"eval.py {base} --json --tasks task.yaml --data mmlu.jsonl --num_fewshot 5 --limit 7 {cut} refined" in first
    assert f"eval.py {base} --json --tasks piqa --limit 7" in first
    assert f"eval.py {base} --json --tasks generation {wikitext} --num_windows 200" in first
    for line in first:  # what the scripts themselves make of them
        script, *arguments = line.split()
        getattr(options, script.removesuffix(".py"))(arguments)
    assert json.loads((out / "latency/refined@0.json").read_text()) == {"perplexity": 1}
