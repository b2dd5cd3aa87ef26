"""The assembly of `kernels.int8_mma` and `kernels.half_mma` in numpy, lane by lane, for Triton's interpreter."""

import ctypes

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import TensorHandle

LANE = np.arange(32)
GROUP, THREAD = LANE // 4, LANE % 4


def data(x) -> np.ndarray:
    """What each lane's register holds."""
    return np.broadcast_to(x.handle.data if hasattr(x, "handle") else x, (32,))


def register(values: np.ndarray) -> tl.tensor:
    return tl.tensor(
        TensorHandle(values.astype(np.int64).astype(np.uint32).view(np.int32), tl.int32), tl.block_type(tl.int32, [32])
    )


def gather(at: np.ndarray, wanted: np.ndarray, offsets: list[int], alignment: int) -> tuple[np.ndarray, np.ndarray]:
    """The memory in which all wanted words lie, and where they do: words at these offsets of each lane's address."""
    at = at[wanted].astype(np.int64)
    assert not (at % alignment).any()
    first, last = int(at.min()), int(at.max()) + 4 * max(offsets) + 4
    words = np.frombuffer((ctypes.c_byte * (last - first)).from_address(first), np.int32)
    return words, (at - first)[:, None] // 4 + offsets


def floats(values: np.ndarray) -> tl.tensor:
    return tl.tensor(TensorHandle(values.astype(np.float32), tl.float32), tl.block_type(tl.float32, [32]))


def load_four(HOW, at, wanted):
    """Lanes that want nothing get nonsense, as 16 bits not a number, or 0."""
    how, wanted = tl.core._unwrap_if_constexpr(HOW), np.flatnonzero(data(wanted))
    out = np.full((32, 4), 0 if "mov.u32 $0, 0" in how else 0x7FFF7FFF)
    if wanted.size:
        halves = ".v2" in how
        offsets = [0, 1, 16, 17] if halves else [0, 1, 2, 3]
        words, where = gather(data(at), wanted, offsets, 8 if halves else 16)
        out[wanted] = words[where]
    return tuple(map(register, out.T))


def load_planes(at, wanted, pieces):
    n = 3 * tl.core._unwrap_if_constexpr(pieces)
    out, wanted = np.full((32, n), -1), np.flatnonzero(data(wanted))
    if wanted.size:
        offsets = [8 * plane + i for plane in range(3) for i in range(n // 3)]
        words, where = gather(data(at), wanted, offsets, 4 * n // 3)
        out[wanted] = words[where]
    return tuple(map(register, out.T))


STAGE = np.zeros(2 * 32 * 128, np.uint16)  # shared memory, by halves of words


def stage(words):
    STAGE[:] = 0xFFFF
    return register(np.zeros(32, np.int64))


def stage_four(at, w):
    words = np.stack([data(x).astype(np.int32) for x in w], 1).copy().view(np.uint16)
    STAGE[(data(at)[:, None] // 2 + np.arange(8))] = words


def staged_four(at):
    words = STAGE[(data(at)[:, None] // 2 + np.arange(8))].copy().view(np.int32)
    return tuple(map(register, words.T))


def stage_half(at, upper, wanted):
    for lane in np.flatnonzero(data(wanted)):
        STAGE[data(at)[lane] // 2] = data(upper)[lane].astype(np.int32).view(np.uint32) >> 16


def add_four(at, wanted, v):
    wanted = np.flatnonzero(data(wanted))
    if wanted.size:
        words, where = gather(data(at), wanted, [0, 1, 2, 3], 16)
        words.view(np.float32)[where] += np.stack([data(x)[wanted] for x in v], axis=1)


def from_lane(x, lane):
    return register(data(x)[data(lane) % 32])


def pick_bytes(word, choice):
    both = np.concatenate([data(word).astype(np.int32).view(np.uint8).reshape(32, 4), np.zeros((32, 4), np.uint8)], 1)
    digits = data(choice)[:, None] >> np.arange(0, 16, 4) & 15
    assert (digits < 8).all()
    return register(np.take_along_axis(both, digits, 1).copy().view(np.int32)[:, 0])


def matrix(words: list, rows: int) -> np.ndarray:
    """[rows, columns] of the words that lanes 4 g + t hold, each 4 bytes of row g and columns 4 t .. 4 t + 3."""
    return np.concatenate([data(w).astype(np.int32).view(np.int8).reshape(8, 16) for w in words], rows)


def multiply_add(sums, a0, a1, b0):
    a, b = matrix([a0, a1], 0).astype(np.int64), matrix([b0], 0).T
    product = a @ b
    at = [product[GROUP + 8 * (i // 2), 2 * THREAD + i % 2] for i in range(4)]
    return tuple(register(data(s) + new) for s, new in zip(sums, at, strict=True))


def multiply_add_two(sums, a0, a1, a2, a3, b0, b1):
    return multiply_add(multiply_add(sums, a0, a1, b0), a2, a3, b1)


def halves(word, dtype: torch.dtype) -> np.ndarray:
    """[8, 8] of the words that lanes 4 g + t hold, each the 2 numbers of row g and columns 2 t and 2 t + 1."""
    words = torch.from_numpy(data(word).astype(np.int32).copy())
    return words.view(dtype).view(8, 8).double().numpy()


def multiply_add_half(sums, a, b0, b1, DTYPE):
    dtype = getattr(torch, {"bf16": "bfloat16", "fp16": "float16"}[tl.core._unwrap_if_constexpr(DTYPE).name])
    a = np.block([[halves(a[0], dtype), halves(a[2], dtype)], [halves(a[1], dtype), halves(a[3], dtype)]])
    with np.errstate(invalid="ignore"):
        product = a @ np.concatenate([halves(b0, dtype).T, halves(b1, dtype).T])
    at = [product[GROUP + 8 * (i // 2), 2 * THREAD + i % 2] for i in range(4)]
    return tuple(floats(data(s) + new) for s, new in zip(sums, at, strict=True))


def ballot(truth):
    return register(np.full(32, (data(truth).astype(np.int64) << LANE).sum()))


def eight_of(x):
    return tuple(register(data(x)[THREAD * 8 + i]) for i in range(8))


def install() -> None:
    """Lets `kernels.int8_mma` and `kernels.half_mma` run without a GPU."""
    from kernels import half_mma, int8_mma

    staging = stage, stage_four, staged_four, stage_half
    shared, own = (load_four, pick_bytes), (multiply_add_half, ballot, eight_of, load_planes, *staging)
    functions = {int8_mma: (*shared, add_four, from_lane, multiply_add, multiply_add_two), half_mma: (*shared, *own)}
    for module, replaced in functions.items():
        for function in replaced:
            assert hasattr(module, f"_{function.__name__}")
            setattr(module, f"_{function.__name__}", function)
    half_mma.RSTD_MAKERS = tl.constexpr(1)  # programs run one after the other
