"""The assembly of `kernels.integer_mma` and `kernels.half_mma` in numpy, lane by lane, for Triton's interpreter."""

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


def floats(values: np.ndarray) -> tl.tensor:
    return tl.tensor(TensorHandle(values.astype(np.float32), tl.float32), tl.block_type(tl.float32, [32]))


def gather(at: np.ndarray, wanted: np.ndarray, offsets: list[int], alignment: int) -> tuple[np.ndarray, np.ndarray]:
    """The memory in which all wanted words lie, and where they do: words at these offsets of each lane's address."""
    at = at[wanted].astype(np.int64)
    assert not (at % alignment).any()
    first, last = int(at.min()), int(at.max()) + 4 * max(offsets) + 4
    words = np.frombuffer((ctypes.c_byte * (last - first)).from_address(first), np.int32)
    return words, (at - first)[:, None] // 4 + offsets


def load_where(at, wanted, WORDS, VECTOR, APART=0, ONCE=False, ZERO=False):
    """Lanes that want nothing get zeros or nonsense."""
    words, vector, apart = (getattr(n, "value", n) for n in (WORDS, VECTOR, APART))
    out, wanted = np.full((32, words), 0 if ZERO else 0x5A5A5A5A), np.flatnonzero(data(wanted))
    if wanted.size:
        offsets = [i // vector * apart // 4 + i % vector for i in range(words)]
        memory, where = gather(data(at), wanted, offsets, 4 * vector)
        out[wanted] = memory[where]
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
        words, where = gather(data(at), wanted, list(range(len(v))), 4 * len(v))
        words.view(np.float32)[where] += np.stack([data(x)[wanted] for x in v], axis=1)


add_two = add_four


def from_lane(x, lane):
    return register(data(x)[data(lane) % 32])


def pick_bytes(word, other, choice):
    both = [np.ascontiguousarray(data(w).astype(np.int32)).view(np.uint8).reshape(32, 4) for w in (word, other)]
    digits = data(choice)[:, None] >> np.arange(0, 16, 4) & 15
    assert (digits < 8).all()
    return register(np.take_along_axis(np.concatenate(both, 1), digits, 1).copy().view(np.int32)[:, 0])


def matrix(words: list, rows: int, dtype=np.int8) -> np.ndarray:
    """[rows, columns] of the words that lanes 4 g + t hold, each 4 bytes of row g and columns 4 t .. 4 t + 3."""
    words = [data(w).astype(np.int32).view(dtype).reshape(8, 16) for w in words]
    return np.concatenate(words, rows).astype(np.int64)


def multiply_add(sums, a0, a1, b0, SIGNED=True):
    product = matrix([a0, a1], 0, np.int8 if SIGNED else np.uint8) @ matrix([b0], 0).T
    at = [product[GROUP + 8 * (i // 2), 2 * THREAD + i % 2] for i in range(4)]
    return tuple(register(data(s) + new) for s, new in zip(sums, at, strict=True))


def multiply_add_two(sums, a0, a1, a2, a3, b0, b1, SIGNED):
    return multiply_add(multiply_add(sums, a0, a1, b0, SIGNED), a2, a3, b1, SIGNED)


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
    """Lets `kernels.integer_mma` and `kernels.half_mma` run without a GPU."""
    from kernels import half_mma, integer_mma

    own = load_where, pick_bytes, eight_of, add_four, add_two, from_lane, multiply_add, multiply_add_two
    for function in (*own, multiply_add_half, ballot, stage, stage_four, staged_four, stage_half):
        names = {function.__name__, f"_{function.__name__}"}
        having = [(module, name) for module in (integer_mma, half_mma) for name in names if hasattr(module, name)]
        assert having
        for module, name in having:
            setattr(module, name, function)
    half_mma.RSTD_MAKERS = tl.constexpr(1)  # programs run one after the other
