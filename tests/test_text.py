"""Texts of every form that files come in, read as far as they are used, and tokenised in pieces as if whole."""

import gzip
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_tokenizer import bpe_folder, metaspace_folder, spm_folder, tiktoken_folder  # noqa: F401, they are fixtures

from formats.text import encode_pieces, read_documents, read_records, task_tokens, text_windows
from tokenizer import load_tokenizer

TEXT = "Hello, my name is Ann.\n\n  Two  spaces, naïve café 東京 👋\nend"
RECORDS = [{"text": "b" * 98}, {"prefix": "c" * 60, "gold_completion": "d" * 38}, {"text": "x\u2028y\x0bz"}]
LINES = "\n".join(json.dumps(record, ensure_ascii=False) for record in RECORDS) + "\n\n"
TEXTS = ["b" * 98, "c" * 60 + "d" * 38, "x\u2028y\x0bz"]


class ByteTokenizer:
    """One token a byte."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


def documents(path: Path) -> list[str]:
    whole = ["".join(chunks) for chunks in read_documents(path)]
    assert ["".join(lines) for lines in read_documents(path, lines=True)] == whole
    return whole


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name", ["a.txt", "a.TXT", "wiki.test.raw", "README.md", "a.csv", "a", "a.b.c"])
def test_plain_text(tmp_path, name, zipped, mark, ends):
    content = mark + TEXT.replace("\n", ends).encode()
    path = tmp_path / (name + ".gz" * zipped)
    path.write_bytes(gzip.compress(content) if zipped else content)
    assert documents(path) == [TEXT]
    path.rename(tmp_path / name)  # gzip is told by its content
    assert documents(tmp_path / name) == [TEXT]


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "c4.json", "a.ndjson", "lines", "a.data"])
def test_lines_of_json(tmp_path, name, zipped, mark, ends):
    content = mark + LINES.replace("\n", ends).encode()
    path = tmp_path / (name + ".gz" * zipped)
    path.write_bytes(gzip.compress(content) if zipped else content)
    assert documents(path) == TEXTS and list(read_records(path)) == RECORDS
    tokens = task_tokens("perplexity", path, ByteTokenizer())
    assert bytes(tokens.tolist()).decode() == "\n\n".join(TEXTS)


def test_an_array_of_records(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(RECORDS, indent=2))
    assert documents(tmp_path / "a.json") == TEXTS and list(read_records(tmp_path / "a.json")) == RECORDS
    alpaca = [
        {"instruction": "Add.", "input": "1 + 1", "output": "2"},
        {"instruction": "a", "input": "", "output": "b"},
    ]
    (tmp_path / "b.json").write_text("\n" + json.dumps(alpaca))
    assert documents(tmp_path / "b.json") == ["Add.\n1 + 1\n2", "a\nb"]


def test_what_calls_itself_text_is_not_read_by_field(tmp_path):
    (tmp_path / "a.txt").write_text(LINES)
    assert documents(tmp_path / "a.txt") == [LINES]


def test_text_windows(tmp_path):
    (tmp_path / "a.txt").write_text("a" * 298)
    (tmp_path / "b.jsonl").write_text(json.dumps(RECORDS[0]) + "\n" + json.dumps(RECORDS[1]))
    data = [str(tmp_path / name) for name in ("a.txt", "b.jsonl")]
    everything = b"a" * 298 + b"\n\n" + b"b" * 98 + b"\n\n" + b"c" * 60 + b"d" * 38 + b"\n\n"
    windows = text_windows(data, ByteTokenizer(), num_tokens=10_000, context=100)
    assert windows.shape == (5, 100) and bytes(windows.flatten().tolist()) == everything
    windows = text_windows(data, ByteTokenizer(), num_tokens=10_000, context=4096)  # shorter than one window
    assert bytes(windows[0].tolist()) == everything
    assert text_windows(data, ByteTokenizer(), num_tokens=250, context=100).shape == (2, 100)
    assert text_windows(data, ByteTokenizer(), num_tokens=300, context=4096).shape == (1, 300)
    with pytest.raises(ValueError, match="200 tokens of text, 10000 asked for"):
        text_windows(data[1:], ByteTokenizer(), num_tokens=10_000, context=4096)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.gz", "a"])
@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_empty_files(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="tokens of text, 1000 asked for: at least 256 are needed"):
        text_windows([str(tmp_path / name)], ByteTokenizer(), 1000, 4096)
    tokens = task_tokens("perplexity", tmp_path / name, ByteTokenizer())
    assert tokens.dtype == torch.int64 and tokens.shape in ((0,), (2,))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.txt", None, "absent.txt does not exist"),
        ("a.txt", b"\xff\xfe\x00", "a.txt is not UTF-8 text"),
        ("a.txt", b"ok " * 99_999 + b"\xff", "a.txt is not UTF-8 text"),
        ("a.txt", gzip.compress(b"abc" * 999, mtime=0)[:-9], "a.txt is a damaged gzip file"),
        ("a.gz", b"\x1f\x8b\x08" + b"x" * 99, "a.gz is a damaged gzip file"),
        (
            "a.jsonl",
            b'{"body": "x"}\n',
            "prefix and gold_completion, or instruction and input and output: {'body': 'x'}",
        ),
        ("a.jsonl", b'{"text": null}\n', "prefix and gold_completion"),
        ("a.jsonl", b'{"prefix": "a"}\n', "prefix and gold_completion"),
        ("a.jsonl", b'{"text": "a"}\nnot json\n', "line 2 of .*a.jsonl is not valid JSON"),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', r"line 2 of .*a.jsonl is not a JSON object: \[1\]"),
        ("a.json", b"\n [1]\n", "element 1 of .*a.json is not a JSON object: 1"),
        ("a.json", b'[{"text": "a"},\n', "a.json is not valid JSON"),
        ("a.json", b'[{"instruction": "a", "input": "b"}]', "strings text, or prefix"),
        ("a.jsonl", b"[" * 99_999, ".*a.jsonl is .*(nested too deeply|recursion depth)"),
    ],
)
def test_texts_that_cannot_be_read(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    for read in (
        lambda path: text_windows([str(path)], ByteTokenizer(), 10**6, 100),
        lambda path: task_tokens("wikitext", path, ByteTokenizer()),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            read(tmp_path / name)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_what_is_no_file_is_not_waited_for(tmp_path, kind):
    path = Path("/dev/zero") if kind == "device" else tmp_path / kind
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    with pytest.raises(ValueError, match=f"is a {kind}, not a text file"):
        text_windows([str(path)], ByteTokenizer(), 1000, 100)


def test_unreachable_hub_is_one_line(monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def fail(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(ValueError, match=r"cannot fetch C4 from the hub \(no route\);"):
        text_windows(["c4"], ByteTokenizer(), 1000, 100)


def test_task_text(tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes(b" \n = Title = \n \n Words .\r\n")
    text = {task: bytes(task_tokens(task, path, ByteTokenizer()).tolist()) for task in ("perplexity", "wikitext")}
    assert text["perplexity"] == b" \n = Title = \n \n Words .\n"
    assert text["wikitext"] == b"\n\n = Title = \n\n\n\n\n Words .\n\n\n"
    path.write_bytes(b"one\ntwo")
    assert bytes(task_tokens("wikitext", path, ByteTokenizer()).tolist()) == b"one\n\n\ntwo\n"
    with pytest.raises(ValueError, match="needs --data FILE"):
        task_tokens("wikitext", None, ByteTokenizer())


@pytest.mark.parametrize("folder", ["bpe_folder", "spm_folder", "tiktoken_folder", "metaspace_folder"])
@pytest.mark.parametrize("size", [40, 150, 10_000])
def test_pieces_give_the_ids_of_the_whole(request, folder, size):
    tokenizer = load_tokenizer(request.getfixturevalue(folder))
    text = (
        "the cat sat on the mat\n\n\n and  the dog ran 123 456, it's Ann.\n x \t y\r\n  Hello world, my name is\n" * 5
    )
    chunks = [text[i : i + 11] for i in range(0, len(text), 11)]
    pieces = list(encode_pieces(chunks, tokenizer, size))
    assert list(itertools.chain(*pieces)) == tokenizer.encode(text) and (len(pieces) > 3) == (size < 1000)


@pytest.mark.parametrize("line", ["the river runs by hills and Ann tells her name ", "x" * 48])
def test_a_long_line_costs_what_is_used_of_it(tiny, tmp_path, line):
    """A thousand tokens of 100 MB of text that is one line; tokenised whole, 50 MB took 7 GB."""
    path = tmp_path / "long.txt"
    with open(path, "w") as file:
        for _ in range(100):
            file.write(line * (10**6 // len(line)))
    code = (
        "import sys, resource; from formats.text import text_windows; from tokenizer import load_tokenizer;"
        "t = load_tokenizer(sys.argv[1]); start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "print(text_windows([sys.argv[2]], t, 1000, 500).shape[0]);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start)"
    )
    command = [sys.executable, "-c", code, str(tiny), str(path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
    windows, kilobytes = map(int, done.stdout.split())
    assert windows == 2 and kilobytes < 90_000
