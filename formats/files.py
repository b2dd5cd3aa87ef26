"""Files: written whole or not at all, by one process at a time, with errors that a user can act on."""

import contextlib
import errno
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock
from safetensors import SafetensorError


def one_line(error: Exception) -> str:
    """The first line of an error's message, or the name of its type where it has no message."""
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def no_space_is_value_error(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turns a full disk's error (safetensors has its own) into a ValueError that names `path` and the bytes needed."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) != errno.ENOSPC and "os error 28" not in str(error):
            raise
        size = f" ({needed:,} bytes needed)" if needed else ""
        raise ValueError(f"the disk is full: cannot write {path}{size}; free some space or write elsewhere") from None


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, of its suffix; renames it to `path` on success, removes it on failure.

    The folder is made if it is absent. Raises ValueError if the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(8)}{path.suffix}")
    try:
        with no_space_is_value_error(path):
            yield temporary
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_output(path: str | Path, content: bytes) -> None:
    """Writes the file that a script's --output names, whole or not at all. Raises ValueError if it cannot."""
    try:
        with atomic_write(path) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise ValueError(f"cannot write {path} ({error}); give the script that makes it another --output") from None


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises ValueError if there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except ValueError as e:
        raise ValueError(f"{path} is not valid JSON ({e}); get it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not a JSON object; get it again")
    return value


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def lock(folder: Path) -> FileLock:
    """A lock that lets one process at a time work on `folder`. The system frees the lock of a killed process."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(folder.with_name(f".{folder.name}.lock"))
