"""Builds sparse_gemv.cpp with the system's compiler on first use, keeps the library, and calls it."""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("sparse_gemv.cpp")
FLAGS = ["-O3", "-march=native", "-std=c++17", "-fopenmp", "-fno-math-errno", "-shared", "-fPIC"]
NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


def cache_folder() -> Path:
    """Where built libraries lie: $XDG_CACHE_HOME/teal_fast, by default ~/.cache/teal_fast."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "teal_fast"


def build(folder: Path, flags: list[str]) -> Path:
    """The library for this source, these flags, this compiler and this CPU, built unless `folder` has it.

    Raises:
        OSError, subprocess.CalledProcessError: no compiler, or it failed.
    """
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise OSError(f"no C++ compiler {compiler!r}")
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else [platform.processor()]
    cpu = sorted({line for line in lines if line.lower().startswith(("model name", "flags", "features"))})
    key = hashlib.sha256(repr((SOURCE.read_text(), flags, version, cpu or lines, platform.machine())).encode())
    library = folder / f"sparse_gemv-{key.hexdigest()[:16]}.so"
    if not library.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            built = Path(temporary) / library.name
            command = [compiler, *flags, str(SOURCE), "-o", str(built)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            built.replace(library)  # at once, so that nobody loads half a file
    return library


@functools.cache
def library() -> ctypes.CDLL | None:
    """The built library, or None, with a warning of one line, where it cannot be built."""
    try:
        return ctypes.CDLL(str(build(cache_folder(), FLAGS)))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[0]
        warnings.warn(f"the CPU kernel is not built, plain torch takes its place: {reason}", stacklevel=2)
        return None


def launch_sparse_gemv(x: Tensor, weight: Tensor, threshold: Tensor, segments: list[int]) -> Tensor:
    """`kernels.sparse_gemv.sparse_gemv` on a CPU, with torch's number of threads; the library must be there."""
    assert weight.is_contiguous() and threshold.is_contiguous() and sum(segments) == weight.shape[1]
    x = x.contiguous()
    out = x.new_empty(x.shape[0], weight.shape[1])
    getattr(library(), f"sparse_gemv_{NAMES[x.dtype]}")(
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, weight, threshold, out)),
        *(ctypes.c_int64(n) for n in (*x.shape, weight.shape[1], len(segments))),
        (ctypes.c_int64 * len(segments))(*segments),
        ctypes.c_int(torch.get_num_threads()),
    )
    return out
