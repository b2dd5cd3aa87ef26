"""Files of a user: what is no file, JSON that is none, values in messages, locks."""

import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from models import change_config

from formats.checkpoint import checkpoint_folder, read_tensors
from formats.files import ECHO, lock, one_line, parse_json, read_json, regular_file, shown, write_json
from model import Transformer

MAKE = {
    "absent": (lambda path: None, "does not exist"),
    "a folder": (lambda path: path.mkdir(), "is a folder, not a file"),
    "a pipe": (lambda path: os.mkfifo(path), "is a pipe, not a file"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "is a device, not a file"),
    "a loop": (lambda path: path.symlink_to(path), "cannot be opened"),
    "deep": (lambda path: path.write_text("[" * 100_000), "is not valid JSON .maximum recursion depth"),
    "deep objects": (lambda path: path.write_text('{"a":' * 100_000), "is not valid JSON .maximum recursion depth"),
    "no UTF-8": (lambda path: path.write_bytes(b'{"a": "\xff"}'), "is not valid JSON"),
    "UTF-16": (lambda path: path.write_bytes('{"a": 1}'.encode("utf-16")), "is not valid JSON"),
    "cut": (lambda path: path.write_text('{"a": '), "is not valid JSON"),
    "a long integer": (lambda path: path.write_text('{"a": 1%s}' % ("0" * 9999)), "is not valid JSON"),
    "a list": (lambda path: path.write_text("[]"), "holds a list"),
    "empty": (lambda path: path.touch(), "is not valid JSON"),
}


@pytest.mark.parametrize("kind", MAKE)
def test_what_is_no_json_file_is_an_error_of_one_line(tmp_path, kind):
    make, message = MAKE[kind]
    make(tmp_path / "x.json")
    with pytest.raises(ValueError, match=message) as caught:
        read_json(tmp_path / "x.json")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 3 * ECHO


def test_a_file_through_a_link_is_a_file(tmp_path):
    write_json(tmp_path / "a.json", {"half of a pair": "\ud800", "é": "日"})
    (tmp_path / "b.json").symlink_to("a.json")
    assert regular_file(tmp_path / "b.json") == tmp_path / "b.json"
    assert read_json(tmp_path / "b.json") == {"half of a pair": "?", "é": "日"}
    for name in ("x" * 300, "a\0b"):
        with pytest.raises(ValueError, match=r"cannot be opened") as caught:
            regular_file(tmp_path / name)
        assert len(str(caught.value)) < 2 * ECHO


def deep():
    value: list = []
    for _ in range(100_000):
        value = [value]
    return value


def test_values_are_shown_in_at_most_200_characters():
    for value in ("x" * 999, 10**5000, [1] * 999, {"a": "b" * 999}, Path("a" * 999), deep(), "\ud800"):
        assert len(shown(value)) <= ECHO == 200
        shown(value).encode()  # a terminal can have it


def test_messages_of_others_are_cut():
    assert one_line(ValueError("a\nb")) == "a" and one_line(KeyError()) == "KeyError"
    assert len(one_line(ValueError("x" * 999))) == ECHO
    with pytest.raises(ValueError, match="line 3 is not valid JSON"):
        parse_json("{", "line 3")


def test_a_wait_for_a_lock_says_so(tmp_path):
    code = "import sys, time; from pathlib import Path; from formats.files import lock\n"
    code += "with lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(1)"
    root = Path(__file__).parents[1]
    holder = subprocess.Popen([sys.executable, "-c", code, tmp_path / "out"], stdout=subprocess.PIPE, cwd=root)
    assert holder.stdout.readline() == b"held\n"
    with pytest.warns(UserWarning, match="waiting for another run that works on .*out"):
        with lock(tmp_path / "out"):
            pass
    assert holder.wait() == 0
    with warnings.catch_warnings(action="error"), lock(tmp_path / "out"):
        pass


@pytest.mark.parametrize("folder", ["/dev/null/x/out", "/proc/x/out", "file/out"])
def test_a_lock_that_can_never_be_had_ends_at_once(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    begin = time.monotonic()
    with pytest.raises(ValueError, match=r"cannot write beside .*out"), lock(Path(folder)):
        pass
    assert time.monotonic() - begin < 2


def test_a_config_that_is_a_pipe(copy):
    (copy / "config.json").unlink()
    os.mkfifo(copy / "config.json")
    with pytest.raises(ValueError, match="pipe"):
        Transformer.from_checkpoint(copy)


def test_a_weight_file_that_would_not_be_loaded(copy):
    (copy / "model.pth").touch()
    for name in ("model.pth", "calibration.safetensors", "pytorch_model.bin"):
        (copy / name).touch()
        with pytest.raises(
            ValueError, match=rf"{name} is not a weight file that is loaded; .* is in model.safetensors"
        ):
            checkpoint_folder(copy / name)
    assert checkpoint_folder(copy / "model.safetensors") == checkpoint_folder(copy / "config.json") == copy
    change_config(copy, quantization_config=None)
    Transformer.from_checkpoint(copy)


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
def test_a_pipe_in_place_of_weights(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match="is a pipe, not a weight file"):
        read_tensors(tmp_path / name)
