"""Text from files and from C4: documents for calibration, the text of a perplexity, the records of a task.

A file is plain text, lines of JSON or one array, gzip or not, in UTF-8 with or without a byte order mark. Text and
lines are read as far as used.
"""

import gzip
import io
import itertools
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from formats.files import one_line, parse_json, regular_file, shown

WINDOW, MIN_WINDOW = 2048, 256  # tokens: of a window of calibration text, and the least that there must be
CHUNK, PIECE = 1 << 16, 1 << 20  # characters: read at once, and tokenised at once (1 M took 200 MB in `tokenizers`)
# fields of a record, and what joins them
FIELDS = {("text",): "", ("prefix", "gold_completion"): "", ("instruction", "input", "output"): "\n"}
PLAIN, RECORDS = (".txt", ".raw"), (".json", ".jsonl", ".ndjson")  # suffixes; of other files the first line decides


def read_text(path: str | Path, lines: bool = False) -> Iterator[str]:
    """A text file, in chunks or in lines. Raises ValueError for no such file, and for what is not UTF-8 or gzip."""
    with open(regular_file(path, "text file"), "rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    try:
        with (gzip.open if zipped else open)(path, "rt", encoding="utf-8-sig") as file:
            yield from file if lines else iter(lambda: file.read(CHUNK), "")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {one_line(error)}") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is a damaged gzip file ({one_line(error)}); get it again") from None


def read_records(path: str | Path) -> Iterator[dict]:
    """The objects in a file's lines of JSON, blank lines left out, or in its array. Raises ValueError for others."""
    first = next(filter(str.strip, read_text(path, lines=True)), "")
    if first.lstrip().startswith("["):
        values = parse_json("".join(read_text(path)), path)
        found = ((f"element {i} of {path}", value) for i, value in enumerate(values, 1))
    else:
        lines = ((f"line {i} of {path}", line) for i, line in enumerate(read_text(path, lines=True), 1))
        found = ((where, parse_json(line, where)) for where, line in lines if line.strip())
    for where, record in found:
        if not isinstance(record, dict):
            raise ValueError(f"{where} is not a JSON object: {shown(record)}")
        yield record


def read_documents(source: str | Path, lines: bool = False) -> Iterator[Iterator[str]]:
    """The documents in a plain text file (one), in `read_records`, or in `c4` (a shard of its validation split).

    Each comes in chunks or in lines. Raises ValueError: a file or record without text, C4 that cannot be fetched.
    """
    path = _fetch_c4() if source == "c4" else Path(source)
    suffix = (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()
    first = next(read_text(path), "")
    if suffix in PLAIN or (suffix not in RECORDS and not re.match(r'\s*\{\s*"', first)):
        yield read_text(path, lines)
        return

    for record in read_records(path):
        names = next((names for names in FIELDS if names[0] in record), ("text",))
        parts = [record.get(name) for name in names]
        if not all(isinstance(part, str) for part in parts):
            wanted = ", or ".join(" and ".join(names) for names in FIELDS)
            raise ValueError(f"a record of {path} is not a JSON object with the strings {wanted}: {shown(record)}")
        text = FIELDS[names].join(filter(None, parts))
        yield io.StringIO(text) if lines else iter([text])


def encode_pieces(chunks: Iterable[str], tokenizer, size: int = PIECE) -> Iterator[list[int]]:
    """Ids of a text that comes in chunks, about `size` characters at a time, as if it were tokenised whole."""
    # it is cut at a space between two words, where no tokenizer has a token that reaches across
    rest, inside = "", False
    chunks = (chunk[i : i + CHUNK] for chunk in chunks for i in range(0, len(chunk), CHUNK))
    for chunk in itertools.chain(chunks, [None]):
        rest += chunk or ""
        while rest and (chunk is None or len(rest) > size):
            words = re.match(r"(?s:.*)\S(?= \S)", rest[:size]) if len(rest) > size else None
            end = words.end() if words else size
            # a tokenizer that puts a space before each text: that one is the space at the cut
            own_space = inside and getattr(tokenizer, "leading_spaces", 0)
            yield tokenizer.encode(rest[:end].removeprefix(" ") if own_space else rest[:end])
            rest, inside = rest[end:], True


def _fetch_c4() -> Path:
    shard = "en/c4-validation.00000-of-00008.json.gz"
    try:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download("allenai/c4", shard, repo_type="dataset"))
    except Exception as error:  # the hub's client raises its HTTP library's errors too
        raise ValueError(f"cannot fetch C4 from the hub ({one_line(error)}); give a text file with --data") from None


def text_windows(data: list[str], tokenizer, num_tokens: int, context: int) -> Tensor:
    """The documents' first `num_tokens` tokens, each document followed by an empty line, as full windows [N, T].

    T is the least of 2048, `context` (the model's) and what there is. No bos is added. Raises ValueError for a text
    that cannot be read or is too short.
    """
    tokens: list[int] = []
    texts = (itertools.chain(document, ["\n\n"]) for source in data for document in read_documents(source))
    size = min(PIECE, CHUNK + 8 * num_tokens)
    for ids in itertools.chain.from_iterable(encode_pieces(text, tokenizer, size) for text in texts):
        tokens += ids
        if len(tokens) >= num_tokens:
            break

    length = min(WINDOW, context, num_tokens, len(tokens))
    if length < min(MIN_WINDOW, context):
        raise ValueError(f"{len(tokens)} tokens of text, {num_tokens} asked for: at least {MIN_WINDOW} are needed")
    count = min(num_tokens, len(tokens)) // length
    return torch.tensor(tokens[: count * length]).view(count, length)


def task_tokens(task: str, data: Path | None, tokenizer) -> Tensor:
    """Ids [N], int64, without bos, of the text in `data`. Raises ValueError as `read_documents` does, or for None."""
    pieces = (torch.tensor(ids, dtype=torch.int32) for ids in encode_pieces(_task_chunks(task, data), tokenizer))
    return torch.cat([torch.zeros(0, dtype=torch.int32), *pieces]).long()


def _task_chunks(task: str, data: Path | None) -> Iterator[str]:
    if data is None:
        raise ValueError(f"--tasks {task} needs --data FILE, for wikitext WikiText-2's raw test split (wiki.test.raw)")
    for i, document in enumerate(read_documents(data, lines=task == "wikitext")):
        yield "\n\n" if i else ""
        if task == "wikitext":
            for line in document:
                yield (line.removesuffix("\n") + "\n" if line.strip() else "") + "\n\n" * line.endswith("\n")
        else:
            yield from document
