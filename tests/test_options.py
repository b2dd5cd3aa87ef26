"""Flags of all scripts: help, what is refused before torch is there, and how a process ends."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import cli
import options
from cli import Parser, command_line, output_path

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = "generate calibrate greedy refine finetune quantize convert_hf_checkpoint eval".split()
SCRIPTS += "decode cpu_decode gemv plot quality paper".split()


def command(script: str) -> list[str]:
    bench = (ROOT / "benchmarks" / f"{script}.py").exists()
    return [sys.executable, "-m", f"benchmarks.{script}"] if bench else [sys.executable, f"{script}.py"]


@pytest.fixture
def parsers(monkeypatch) -> list[Parser]:
    made, original = [], Parser.__init__
    monkeypatch.setattr(Parser, "__init__", lambda self, *a, **k: (original(self, *a, **k), made.append(self))[0])
    return made


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_a_help_with_its_default(script, parsers, capsys):
    with pytest.raises(SystemExit):
        getattr(options, script)(["--help"])
    (parser,) = parsers
    formatter = parser._get_formatter()
    for action in parser._actions[1:]:
        if action.help != "==SUPPRESS==":
            assert "default" in formatter._get_help_string(action), action.dest
    assert parser.description.splitlines()[0] in capsys.readouterr().out


def test_a_flag_means_one_thing_in_all_scripts(parsers, capsys):
    for script in SCRIPTS:
        with pytest.raises(SystemExit):
            getattr(options, script)(["--help"])
    meant = {}
    for parser in parsers:
        for action in parser._actions:
            if action.help != "==SUPPRESS==":
                meant.setdefault(action.dest, set()).add((action.metavar, str(action.type), type(action).__name__))
    for flag in "output output_dir json device statistics sparsity thresholds plot profile".split():
        assert len(meant[flag]) == 1, meant[flag]
    assert {metavar for metavar, *_ in meant["data"]} == {"FILE"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_wrong_flags_do_not_wait_for_torch(script):
    block = f"import sys; sys.modules.update(torch=None, numpy=None); import options; options.run_script({script!r})"
    done = subprocess.run([sys.executable, "-c", block, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--help" in done.stdout, done.stderr
    done = subprocess.run(
        [sys.executable, "-c", block, "--sparsity", "x" * 5000], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and len(done.stderr) < 650, done.stderr


@pytest.mark.parametrize(
    ("script", "line"),
    [
        *(("generate", f"--interactive {flags}") for flags in ("--prompt 5", "--num_samples 2", "--batch_size 2")),
        *(("generate", f"--interactive {flags}") for flags in ("--compare_dense", "--profile x.json", "--json")),
        *(("generate", f"--prompts x {flags}") for flags in ("--prompt 5", "--batch_size 2", "--interactive")),
        ("generate", "--thresholds uniform"),
        ("generate", "--statistics x"),
        ("generate", "--random_init a --sparsity 0.5 --statistics x"),
        ("generate", "--unfused"),
        ("eval", "--limit 5"),
        ("eval", "--tasks piqa --window 5"),
        ("eval", "--sparse_fraction 0.5"),
        ("calibrate", "--data a.txt --seed 1"),
        ("calibrate", "--teal_histograms a --output b --num_tokens 5"),
        ("greedy", "--data a.txt --seed 1"),
        ("refine", "--data a.txt --seed 1"),
        ("quantize", "--mode int8 --groupsize 32"),
        ("quantize", "--mode int8 --num_tokens 0 --data a.txt"),
        ("cpu_decode", "--llama_python python3"),
        ("cpu_decode", "--random_init a --checkpoint_path b"),
        ("quality", "--rules dense --calibration a.txt"),
        ("eval", "--tasks wikitext --data a.txt --confirm_run_unsafe_code"),
    ],
)
def test_a_flag_that_another_makes_meaningless(script, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"has no effect .*; leave (one of them out|it out)$"):
        getattr(options, script)(line.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("script", "line"),
    [
        *(("generate", f"--{flag} {value}") for flag in ("top_k", "threads", "max_new_tokens") for value in (0, 2**64)),
        *(("generate", f"--temperature {value}") for value in ("nan", -1)),
        *(("generate", f"--batch_size {value}") for value in (0, 1025)),
        *(("generate", f"--seed {value}") for value in (-1, 10**30)),
        *((script, "--sparsity nan") for script in ("generate", "eval")),
        *((script, "--sparsities 0.5 1") for script in ("decode", "cpu_decode", "gemv", "quality")),
        *((script, "--num_tokens -1") for script in ("calibrate", "greedy", "refine")),
        ("quantize", "--mode int8 --num_tokens -1"),
        *(("eval", f"--{flag} 0") for flag in ("context", "window", "num_windows", "sparse_fraction")),
    ],
)
def test_a_number_out_of_its_range(script, line):
    with pytest.raises(ValueError, match=rf"{re.findall('--[a-z_]+', line)[-1]} .* (must be|is outside) "):
        getattr(options, script)(line.split())


def test_defaults_and_what_was_given():
    o = options.generate([])
    assert (o.sparsity, o.num_samples, o.temperature, o.compare_dense, o.device) == (0.0, 5, 0.8, None, None)
    assert options.generate(["--no-compare_dense", "--sparsity", "0"]).compare_dense is False
    assert options.quality(["--rules", "dense"]).precision == "float32"
    with pytest.raises(ValueError, match=r"unrecognized arguments: --frob"):
        options.decode(["--frob"])


@pytest.mark.parametrize("flag", ["--plot", "--output"])
def test_what_cannot_be_written_is_said_first(flag, tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "x", tmp_path / ("x" * 300), tmp_path / "a\udcff", "/proc/x"):
        with pytest.raises(ValueError, match=f"argument {flag}: cannot write"):
            options.calibrate([flag, str(path)])
    with pytest.raises(ValueError, match="cannot write"):
        output_path(tmp_path)
    for script, rest in (("quantize", ["--mode", "int8"]), ("convert_hf_checkpoint", ["--gguf", "x"])):
        with pytest.raises(ValueError, match="argument --output_dir: cannot write"):
            getattr(options, script)([*rest, "--output_dir", "/proc/x"])
    assert options.calibrate([flag, str(tmp_path / "new" / "x.png")])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_needs_are_looked_at_before_the_work(monkeypatch, tmp_path):
    monkeypatch.setattr(options, "find_spec", lambda name: None)
    for script, line in (("calibrate", f"--plot {tmp_path}/a.png"), ("plot", "")):
        with pytest.raises(ValueError, match="pip install matplotlib"):
            getattr(options, script)(line.split())


@pytest.mark.parametrize("error", [ValueError("a\n b" * 9999), OSError("x" * 9999), MemoryError()])
def test_a_mistake_is_one_short_line(error):
    def main():
        raise error

    with pytest.raises(SystemExit) as caught:
        command_line(main)
    assert "\n" not in caught.value.code and len(caught.value.code) < cli.MESSAGE + 50
    assert caught.value.code.split(": ", 1)[1]


def test_a_full_disk_or_closed_pipe_behind_stdout_is_no_traceback():
    block = "import cli; cli.command_line(lambda: print('x' * 9))"
    if Path("/dev/full").is_char_device():
        full = os.open("/dev/full", os.O_WRONLY)
        done = subprocess.run([sys.executable, "-c", block], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
        os.close(full)
        assert done.returncode == 1 and "No space left" in done.stderr and "Traceback" not in done.stderr
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", block], cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 1 and done.stderr == ""


@pytest.mark.parametrize("wait", [0.5, 1.0, 1.5])
def test_ctrl_c_while_importing_says_nothing(wait):
    arguments = [*command("generate"), "--checkpoint_path", "nothing"]
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    time.sleep(wait)
    process.send_signal(signal.SIGINT)
    output = process.communicate()[0]
    assert "Traceback" not in output and (process.returncode in (130, -signal.SIGINT) or "nothing" in output)


def test_devices():
    assert cli.resolve_device("cpu") == torch.device("cpu")
    assert cli.resolve_device(None).type in ("cpu", "cuda")
    for name in ("mars", "meta", "cuda:77"):
        with pytest.raises(ValueError, match=f"--device {name}"):
            cli.resolve_device(name)


@pytest.mark.parametrize("flags", [["--device" + "x" * 500], ["--precision", "x" * 500], ["--num_samples", "x" * 500]])
def test_a_long_value_is_not_echoed_at_length(flags):
    with pytest.raises(ValueError, match=r"x{150}") as error:
        options.generate(flags)
    assert len(str(error.value)) < 400
