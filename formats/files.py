"""Files: written whole or not at all, by one process at a time, with errors that a user can act on."""

import contextlib
import errno
import json
import os
import secrets
import shutil
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

ECHO = 200  # characters of a user's value, or of another library's message, that a message repeats at most


def shown(value: Any) -> str:
    """A user's value as a message repeats it: a path or message as it is, else its repr; cut to 200 characters."""
    try:
        text = str(value) if isinstance(value, Path | Exception) else repr(value)
    except (RecursionError, ValueError):  # nested too deeply; an integer of over 4,300 digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= ECHO else f"{text[: ECHO - 3]}..."


def one_line(error: Exception | str) -> str:
    """The first line of an error's message, `shown`, or the name of its type where it has no message."""
    return shown(ValueError((str(error).splitlines() or [type(error).__name__])[0]))


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


def check_space(folder: Path, needed: int, advice: str) -> None:
    """Raises ValueError if the disk of `folder` has not `needed` bytes free; `advice`: what else the user can do."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(f"{folder} needs {needed:,} bytes, its disk has {free:,} free; free some, or {advice}")


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yields a path beside `path`, renamed to it on success, removed on failure. Raises ValueError for a full disk."""
    (path := Path(path)).parent.mkdir(parents=True, exist_ok=True)
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


def regular_file(path: str | Path, what: str = "file") -> Path:
    """`path`; ValueError if there is no such file (`what`), but a folder, or a pipe or device that may never end."""
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise ValueError(f"{shown(path)} does not exist") from None
    except (OSError, ValueError) as error:  # a name that is too long, a loop of links, a NUL
        raise ValueError(f"{shown(path)} cannot be opened ({getattr(error, 'strerror', error)})") from None
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe" if stat.S_ISFIFO(mode) else "a device"
        raise ValueError(f"{shown(path)} is {kind}, not a {what}")
    return path


def parse_json(text: str | bytes, where: str | Path) -> Any:
    """The value that a JSON text holds; `where` it is from, for the message. Raises ValueError if it is not JSON."""
    try:
        return json.loads(text if isinstance(text, str) else text.decode())
    except (ValueError, RecursionError) as error:  # bytes that are not UTF-8; a value that is nested too deeply
        raise ValueError(f"{str(where)[:ECHO]} is not valid JSON ({one_line(error)}); get it again") from None


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises ValueError if there is none."""
    if not isinstance(value := parse_json(regular_file(path).read_bytes(), path), dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not a JSON object; get it again")
    return value


def write_json(path: Path, value: Any) -> None:
    # half of a surrogate pair becomes "?"
    path.write_bytes(f"{json.dumps(value, indent=2, ensure_ascii=False)}\n".encode("utf-8", "replace"))


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Lets one process at a time work on `folder`; warns if it waits. Raises ValueError where it cannot be had."""
    held = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            held.acquire(timeout=0)
        except Timeout:
            warnings.warn(f"waiting for another run that works on {folder} (Ctrl-C ends the wait)", stacklevel=3)
            held.acquire()
    except (OSError, NotImplementedError) as error:  # the second: a file system without locks
        raise ValueError(f"cannot write beside {folder} ({one_line(error)}); work in another folder") from None
    try:
        yield
    finally:
        held.release()
