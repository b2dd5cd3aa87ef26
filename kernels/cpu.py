"""Builds cpu.cpp with the system's compiler on first use, keeps the library, and calls its product.

The library's decode step takes the structures that stand here; `decoder.FusedCpuStep` fills them.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from kernels.quantized import Form, form_of

SOURCE = Path(__file__).with_name("cpu.cpp")
FLAGS = ["-O3", "-march=native", "-std=c++20", "-fopenmp", "-fno-math-errno", "-shared", "-fPIC"]
PACE_DOUBLES = 40  # room for cpu.cpp's `Pace`, which is zeros at first
GROUP = 64  # logits of which cpu.cpp keeps the largest
NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


def cache_folder() -> Path:
    """Where built libraries lie: $XDG_CACHE_HOME/teal_fast, by default ~/.cache/teal_fast."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "teal_fast"


def find_compiler() -> list[str] | None:
    """The C++ compiler's words, $CXX (which may be several, "ccache g++") or g++; None if there is no such program."""
    words = shlex.split(os.environ.get("CXX") or "g++")
    return words if words and shutil.which(words[0]) else None


def build(folder: Path, flags: list[str]) -> Path:
    """The library for this source, these flags, this compiler and this CPU, built unless `folder` has it.

    Raises OSError without a compiler, subprocess.CalledProcessError if it fails.
    """
    if (compiler := find_compiler()) is None:
        raise OSError(f"no C++ compiler {os.environ.get('CXX') or 'g++'!r}")
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True).stdout

    # the CPU's name and instructions: -march=native builds for these
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else [platform.processor()]
    cpu = sorted({line for line in lines if line.lower().startswith(("model name", "flags", "features"))})
    key = hashlib.sha256(repr((SOURCE.read_text(), flags, version, cpu or lines, platform.machine())).encode())

    library = folder / f"cpu-{key.hexdigest()[:16]}.so"
    if not library.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            built = Path(temporary) / library.name
            command = [*compiler, *flags, str(SOURCE), "-o", str(built)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            built.replace(library)  # a rename, so that nobody loads half a file
    return library


@functools.cache
def library() -> ctypes.CDLL | None:
    """The built library, or None, with a warning of one line, where it cannot be built."""
    try:
        try:
            return ctypes.CDLL(str(build(cache_folder(), FLAGS)))
        except OSError as error:  # the cache cannot be written, or there is no compiler, which the next try says
            with tempfile.TemporaryDirectory() as folder:
                library = ctypes.CDLL(str(build(Path(folder), FLAGS)))
            where = f"{cache_folder()} ({error}); choose another folder with XDG_CACHE_HOME"
            warnings.warn(f"the CPU kernels are built anew in each run, they cannot be kept in {where}", stacklevel=2)
            return library
    except (OSError, subprocess.CalledProcessError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        reason = next((line for line in lines if "error" in line), lines[0])
        warnings.warn(f"the CPU kernel is not built, plain torch takes its place: {reason}", stacklevel=2)
        return None


def has_kernel(dtype: torch.dtype, form: Form) -> bool:
    """Whether the library has a product of values of this dtype and weights of this form."""
    only = {"none": form.dtype, "packed": torch.bfloat16}.get(form.name, dtype)
    return dtype in NAMES and only == dtype


def kernel(name: str, dtype: torch.dtype, form: Form) -> Callable:
    """The library's function for values of this dtype and weights of this form."""
    assert has_kernel(dtype, form)
    return getattr(library(), f"{name}_{NAMES[dtype]}" + ("" if form.name == "none" else f"_{form.name}"))


def launch_sparse_gemv(
    x: Tensor, weight: Tensor, threshold: Tensor, segments: list[int], scale: Tensor | None = None
) -> Tensor:
    """`kernels.sparse_gemv.sparse_gemv` on a CPU, with torch's number of threads; the library must be there.

    Raises MemoryError: too little for the threads' sums and lists.
    """
    n_out, form = sum(segments), form_of(weight, scale)
    assert weight.is_contiguous() and threshold.is_contiguous() and 8 * weight[0].nbytes == form.bits * n_out
    assert scale is None or scale.is_contiguous()
    if group := form.groupsize:
        assert group % 16 == 0 and all(width % group == 0 for width in segments)

    x = x.contiguous()
    out = x.new_empty(x.shape[0], n_out)
    pointers = (None if tensor is None else tensor.data_ptr() for tensor in (x, weight, scale, threshold, out))
    failed = kernel("sparse_gemv", x.dtype, form)(
        *map(ctypes.c_void_p, pointers),
        *(ctypes.c_int64(n) for n in (*x.shape, n_out, group, len(segments))),
        (ctypes.c_int64 * len(segments))(*segments),
        ctypes.c_int(torch.get_num_threads()),
    )
    if failed:
        raise MemoryError(f"no memory for a product of {tuple(x.shape)} by {tuple(weight.shape)} on the CPU")
    return out


def unpack(weight: Tensor, table: Tensor) -> Tensor:
    """`packed.unpack` by the library, which must be there."""
    weight = weight.contiguous()
    out = torch.empty(len(weight), weight.shape[1] * 2 // 3, dtype=torch.bfloat16)
    pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (weight, table, out))
    library().unpack(*pointers, *(ctypes.c_int64(n) for n in out.shape), ctypes.c_int(torch.get_num_threads()))
    return out


def column_norms(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Bounds for the sums of a decode step in `dtype`: int8, [out], of int4 [groups]; see cpu.cpp's `column_norms`.

    A step in float32 needs none; they are zeros there.
    """
    form, n_in = form_of(weight, scale), weight.shape[0]
    n_out = 8 * weight[0].nbytes // form.bits
    norms = torch.zeros(n_out // form.groupsize if form.name == "int4" else n_out, dtype=torch.int8)
    kernel("column_norms", dtype, form)(
        *(ctypes.c_void_p(None if t is None else t.data_ptr()) for t in (weight, scale)),
        *(ctypes.c_int64(n) for n in (n_in, n_out, form.groupsize)),
        *(ctypes.c_void_p(norms.data_ptr()), ctypes.c_int(torch.get_num_threads())),
    )
    return norms


POINTER, INTEGER, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


def _fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class Projection(ctypes.Structure):
    """`Projection` of cpu.cpp, in its order."""

    TENSORS = "weight bias scale threshold shift offset"
    _fields_ = _fields(POINTER, TENSORS) + _fields(INTEGER, "group") + _fields(POINTER, "log_norms")


class Layer(ctypes.Structure):
    """`Layer` of cpu.cpp, in its order."""

    _fields_ = _fields(POINTER, "attention_norm ffn_norm q_norm k_norm") + _fields(Projection, "wqkv wo w13 w2")
    _fields_ += _fields(POINTER, "k_cache v_cache inv_freq") + _fields(FLOAT, "rope_factor")
    _fields_ += _fields(INTEGER, "window")


class Model(ctypes.Structure):
    """`Model` of cpu.cpp, in its order; SHAPE, FACTORS: names of ModelArgs; ACTIVATIONS: their numbers' order."""

    SHAPE = "n_layer n_head n_local_heads head_dim dim intermediate_size vocab_size"
    FACTORS = "embedding_multiplier residual_multiplier logits_scaling"
    ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
    _fields_ = _fields(INTEGER, f"{SHAPE} cache_length") + _fields(ctypes.POINTER(Layer), "layers")
    _fields_ += _fields(POINTER, "embedding norm output output_scale h qkv y act logits tops tokens")
    _fields_ += _fields(INTEGER, "cut shared activation") + _fields(FLOAT, f"eps softmax_scale {FACTORS} temperature")
    _fields_ += _fields(INTEGER, "top_k") + _fields(POINTER, "pace") + _fields(POINTER, "ranks")


class Ranks(ctypes.Structure):
    """`Ranks` of cpu.cpp, in its order."""

    _fields_ = _fields(INTEGER, "rank ranks hidden hidden_first") + _fields(POINTER, "partials barrier pids")
