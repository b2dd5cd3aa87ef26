"""Text from files and from C4: documents for calibration, and the one long text of a perplexity."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from formats.files import one_line

WINDOW, MIN_WINDOW = 2048, 256  # tokens: of a window of calibration text, and the least that there must be


def read_documents(source: str) -> Iterator[str]:
    """Texts of a .txt file (one), a .jsonl file or `c4` (a shard of its validation split), an empty line after each.

    Raises ValueError for no such file, another kind of file, a line that holds no text, C4 that cannot be fetched.
    """
    path = _fetch_c4() if source == "c4" else Path(source)
    if not path.is_file():
        raise ValueError(f"no text file at {path}")
    if source != "c4" and path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"{path} is neither .txt nor .jsonl; --data takes those, or c4")

    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as file:
            if path.suffix == ".txt":
                yield file.read() + "\n\n"
                return
            for line in file:
                if line.strip():
                    record = json.loads(line)
                    text = record["text"] if "text" in record else record["prefix"] + record["gold_completion"]
                    yield text + "\n\n"
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    except (ValueError, KeyError, TypeError):
        wanted = "a JSON object with the field text, or with prefix and gold_completion"
        raise ValueError(f"a line of {path} is not {wanted}: {line[:80]!r}") from None


def _fetch_c4() -> Path:
    shard = "en/c4-validation.00000-of-00008.json.gz"
    try:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download("allenai/c4", shard, repo_type="dataset"))
    except Exception as error:  # the hub's client raises its HTTP library's errors too
        reason = f"cannot fetch C4 from the hub ({one_line(error)})"
        raise ValueError(f"{reason}; give a .txt or .jsonl file with --data") from None


def text_windows(data: list[str], tokenizer, num_tokens: int, context: int) -> Tensor:
    """The documents' first `num_tokens` tokens, each document followed by an empty line, as windows [N, T].

    T is the least of 2048, `context` (the model's) and what there is. No bos is added; a last window that is not full
    is left out. Raises ValueError for a text that cannot be read or is too short.
    """
    tokens: list[int] = []
    for source in data:
        for text in read_documents(source):
            tokens += tokenizer.encode(text)
            if len(tokens) >= num_tokens:
                break

    length = min(WINDOW, context, num_tokens, len(tokens))
    if length < min(MIN_WINDOW, context):
        raise ValueError(f"{len(tokens)} tokens of text, {num_tokens} asked for: at least {MIN_WINDOW} are needed")
    count = min(num_tokens, len(tokens)) // length
    return torch.tensor(tokens[: count * length]).view(count, length)


def task_text(task: str, data: Path | None) -> str:
    """The text in `data`, for "wikitext" with an empty line between two lines. Raises ValueError if it has no text."""
    if data is None:
        raise ValueError(f"--tasks {task} needs --data FILE, for wikitext WikiText-2's raw test split (wiki.test.raw)")
    try:
        text = data.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {data} as UTF-8 text: {error}") from None
    if task == "wikitext":
        return "\n\n".join(line + "\n" if line.strip() else "" for line in text.split("\n"))
    return text
