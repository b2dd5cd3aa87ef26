"""Builds cpu.cpp with the system's compiler on first use, keeps the library, and calls it: a product, a decode step."""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("cpu.cpp")
FLAGS = ["-O3", "-march=native", "-std=c++17", "-fopenmp", "-fno-math-errno", "-shared", "-fPIC"]
GROUP = 64  # logits of which cpu.cpp keeps the largest
NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
INTEGERS = {torch.int8: "_int8", torch.uint8: "_int4"}


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
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else [platform.processor()]
    cpu = sorted({line for line in lines if line.lower().startswith(("model name", "flags", "features"))})
    key = hashlib.sha256(repr((SOURCE.read_text(), flags, version, cpu or lines, platform.machine())).encode())
    library = folder / f"cpu-{key.hexdigest()[:16]}.so"
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
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        reason = next((line for line in lines if "error" in line), lines[0])
        warnings.warn(f"the CPU kernel is not built, plain torch takes its place: {reason}", stacklevel=2)
        return None


def kernel(name: str, dtype: torch.dtype, weight: torch.dtype) -> Callable:
    """The library's function for values and for weights of these dtypes."""
    assert weight == dtype or weight in INTEGERS
    return getattr(library(), f"{name}_{NAMES[dtype]}" + INTEGERS.get(weight, ""))


def group_of(scale: Tensor | None, n_out: int) -> int:
    """Outputs of a scale and a minimum of int4; 0 of other weights."""
    return n_out // scale.shape[1] if scale is not None and scale.dim() == 3 else 0


def launch_sparse_gemv(
    x: Tensor, weight: Tensor, threshold: Tensor, segments: list[int], scale: Tensor | None = None
) -> Tensor:
    """`kernels.sparse_gemv.sparse_gemv` on a CPU, with torch's number of threads; the library must be there.

    Raises:
        MemoryError: too little for the threads' sums and lists.
    """
    n_out = sum(segments)
    group = group_of(scale, n_out)
    assert weight.is_contiguous() and threshold.is_contiguous() and weight.shape[1] == (n_out // 2 if group else n_out)
    assert scale is None or scale.is_contiguous()
    assert not group or (group % 16 == 0 and all(width % group == 0 for width in segments))
    x = x.contiguous()
    out = x.new_empty(x.shape[0], n_out)
    pointers = (None if tensor is None else tensor.data_ptr() for tensor in (x, weight, scale, threshold, out))
    failed = kernel("sparse_gemv", x.dtype, weight.dtype)(
        *map(ctypes.c_void_p, pointers),
        *(ctypes.c_int64(n) for n in (*x.shape, n_out, group, len(segments))),
        (ctypes.c_int64 * len(segments))(*segments),
        ctypes.c_int(torch.get_num_threads()),
    )
    if failed:
        raise MemoryError(f"no memory for a product of {tuple(x.shape)} by {tuple(weight.shape)} on the CPU")
    return out


class _Projection(ctypes.Structure):
    """`Projection` of cpu.cpp."""

    TENSORS = ("weight", "bias", "scale", "threshold", "shift", "offset")
    _fields_ = (*((name, ctypes.c_void_p) for name in TENSORS), ("group", ctypes.c_int64))


class _Layer(ctypes.Structure):
    """`Layer` of cpu.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("attention_norm", "ffn_norm")),
        *((name, _Projection) for name in ("wqkv", "wo", "w13", "w2")),
        *((name, ctypes.c_void_p) for name in ("k_cache", "v_cache")),
        ("window", ctypes.c_int64),
    )


class _Model(ctypes.Structure):
    """`Model` of cpu.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("n_layer", "n_head", "n_local_heads", "head_dim", "dim", "hidden")),
        *((name, ctypes.c_int64) for name in ("vocab", "cache_length")),
        ("layers", ctypes.POINTER(_Layer)),
        *((name, ctypes.c_void_p) for name in ("embedding", "norm", "output", "output_scale", "inv_freq")),
        *((name, ctypes.c_void_p) for name in ("h", "qkv", "y", "act", "logits", "tops", "tokens")),
        ("cut", ctypes.c_int64),
        *((name, ctypes.c_float) for name in ("eps", "temperature")),
        ("top_k", ctypes.c_int64),
    )


class CpuDecoder:
    """Decode steps of a SparseTransformer at batch 1 on a CPU, each one call of the compiled library.

    A step takes a token to the next one, sampling included, with torch's number of threads, which sets the order of
    sums. It reads the model's tensors where they lie, so they must stay there.

    Args:
        model: with its cache set up for one row.
        sparsity: about the share that the thresholds cut; 0 leaves them and the shifts out: the dense model.
        temperature, top_k: of the sampling; temperature 0 is greedy.

    Attributes:
        tokens: [positions of the cache + 1], int64; those from `start` on are valid.
        logits: [vocab], float32, of the last step, rounded to the model's dtype.
    """

    def __init__(self, model, sparsity: float, temperature: float, top_k: int):
        config, cache = model.config, model.layers[0].attention.kv_cache.k_cache
        self._decode = kernel("decode", cache.dtype, model.layers[0].attention.wo.weight.dtype)
        self._decode.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint64, ctypes.c_int]
        self._tensors = []  # those that only the structures point to

        def pointer(tensor: Tensor | None) -> int | None:
            if tensor is None:
                return None
            assert tensor.is_contiguous() and tensor.device.type == "cpu"
            self._tensors.append(tensor)
            return tensor.data_ptr()

        def room(n: int) -> int:
            return pointer(torch.zeros(n))

        def projection(module) -> _Projection:
            tensors = (pointer(getattr(module, name)) for name in _Projection.TENSORS)
            return _Projection(*tensors, group_of(module.scale, sum(module.widths)))

        layers = (_Layer * config.n_layer)()
        for i, block in enumerate(model.layers):
            attention, feed_forward = block.attention, block.feed_forward
            layers[i] = _Layer(
                *map(pointer, (block.attention_norm.weight, block.ffn_norm.weight)),
                *map(projection, (attention.wqkv, attention.wo, feed_forward.w13, feed_forward.w2)),
                *map(pointer, (attention.kv_cache.k_cache, attention.kv_cache.v_cache)),
                config.sliding_window if i in config.windowed_layers else cache.shape[2],
            )
        self.logits = torch.zeros(config.vocab_size)
        self.tokens = torch.zeros(cache.shape[2] + 1, dtype=torch.int64)
        self._model = _Model(
            *(config.n_layer, config.n_head, config.n_local_heads, config.head_dim, config.dim),
            *(config.intermediate_size, config.vocab_size, cache.shape[2], layers),
            *map(pointer, (model.tok_embeddings.weight, model.norm.weight, model.output_weight)),
            *map(pointer, (None if model.output is None else model.output.scale, model.inv_freq)),
            *(room(config.dim), room((config.n_head + 2 * config.n_local_heads) * config.head_dim)),
            *(room(config.n_head * config.head_dim), room(config.intermediate_size)),
            *(pointer(self.logits), room(-(-config.vocab_size // GROUP)), pointer(self.tokens)),
            *(sparsity > 0, config.norm_eps, temperature, min(top_k, config.vocab_size)),
        )
        for parameter in model.parameters():
            library().use_huge_pages(ctypes.c_void_p(parameter.data_ptr()), ctypes.c_int64(parameter.nbytes))

    def start(self, token: Tensor, position: int, seed: int) -> None:
        """Sets the token to feed next, its position, and the seed of the draws."""
        self.position, self.seed, self._threads = position, seed, torch.get_num_threads()
        self.tokens[position] = token.item()

    def replay(self) -> None:
        """One step. Little happens here: what a step read has swept Python's own data out of the caches.

        Raises:
            MemoryError: too little for the step; the position is the same then.
        """
        assert self.position < self._model.cache_length
        if self._decode(ctypes.addressof(self._model), self.position, self.seed, self._threads):
            raise MemoryError(f"no memory for a decode step at position {self.position} on the CPU")
        self.position += 1
