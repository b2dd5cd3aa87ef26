"""Fused steps of several rows, and of several positions of one text: each row as it is alone, to the bit on a GPU."""

import numpy as np
import pytest
import torch
from models import FUSED, SWITCHES, build_cut, caches

pytest.importorskip("triton")

from decoder import FusedGpuStep

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = [70, 3, 40, 65, 1, 20, 33, 64]  # of the rows' prompts
MODELS = {
    "16 bits": {},
    "window, biases": {"sliding_window": 5, "qkv_bias": True},
    "switches": SWITCHES | {"shifted": True, "intermediate_size": 176},
    "shifted": {"shifted": True, "intermediate_size": 176},
    "int8, shifted": {"quant": "int8", "shifted": True, "n_layer": 1},
    "int4": {"quant": "int4", "groupsize": 16, "intermediate_size": 176, "n_layer": 1},
}
WIDE = {"dim": 512, "n_head": 8, "intermediate_size": 5120, "std": 0.05}
WIDE_MODELS = {
    "wide": WIDE,
    "wide, shifted": WIDE | {"shifted": True},
    "wide, switches": WIDE | SWITCHES,
    "wide, int8": WIDE | {"quant": "int8"},
    "wide, int4": WIDE | {"quant": "int4", "groupsize": 64},
}
PLANS = {"large": {"resident": 80}, "small": {}}


def empty_caches(model, rows: int) -> list[torch.Tensor]:
    """The model's caches, of these rows and 96 positions, zeroed."""
    model.setup_caches(rows, 96)
    return [tensor.zero_() for tensor in caches(model)]


def saved_prompt(model, row: int) -> list[torch.Tensor]:
    """Random keys and values [H, P, D] of the row's prompt, in the order of `caches`."""
    generator = torch.Generator().manual_seed(row)
    shapes = [cache[0, :, : LENGTHS[row]].shape for cache in empty_caches(model, 1)]
    return [torch.randn(shape, generator=generator).to(model.device, model.dtype) for shape in shapes]


def run(step: FusedGpuStep, tokens: list[int], positions: list[int], seeds: list[int], steps: int = 1):
    """Logits [rows, steps, vocab], and tokens [rows, steps], of these rows in one batch."""
    step.start(torch.tensor(tokens, device=DEVICE), positions, seeds)
    logits = []
    for _ in range(steps):
        step.replay() if DEVICE == "cuda" else step.step()
        logits.append(step.logits[:, :101].clone())
    drawn = [row[at + 1 : at + 1 + steps].clone() for row, at in zip(step.tokens, positions, strict=True)]
    return torch.stack(logits, dim=1), torch.stack(drawn)


def assert_equal(logits: torch.Tensor, expected: torch.Tensor) -> None:
    """To the bit on a GPU; the interpreter's matrix products round by their shapes."""
    if DEVICE == "cuda":
        assert torch.equal(logits, expected)
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-3 * expected.abs().max().item())


def steps_of(model, rows: list[int], prompts: dict, dense: bool):
    """Logits and tokens of some steps of these rows in one batch, each behind its own prompt."""
    for cache, *saved in zip(empty_caches(model, len(rows)), *(prompts[row] for row in rows), strict=True):
        for own, tensor in zip(cache, saved, strict=True):
            own[:, : tensor.shape[1]] = tensor
    step = FusedGpuStep(model, 0.8, 20, dense=dense)
    positions = [LENGTHS[row] for row in rows]
    return run(step, [row + 5 for row in rows], positions, [50 + row for row in rows], 8 if DEVICE == "cuda" else 1)


@pytest.fixture(autouse=DEVICE == "cpu")
def true_splats(monkeypatch):
    """The interpreter makes a tensor of a scalar truth value one of integers, which it then takes for no mask."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_splat(self, ret_ty, arg):
        data = np.full(ret_ty.shape, arg.data, dtype=arg.data.dtype)
        return TensorHandle(data, arg.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_splat", create_splat)


FEW, ALL = [1, 0], [2, 1, 0, 3, 4, 5, 6, 7]
CASES = [(name, sparsity, rows) for name in MODELS for sparsity in (0.0, 0.5) for rows in (FEW, ALL)]
if DEVICE == "cpu":  # which takes 5 s for a row of 16 bits
    CASES = [("shifted", 0.5, ALL[:5]), ("window, biases", 0.5, FEW), ("int8, shifted", 0.5, FEW), ("int4", 0.5, FEW)]


def check_rows(model, rows: list[int], dense: bool) -> None:
    """That a batch of these rows gives each the logits and tokens that it has alone."""
    prompts = {row: saved_prompt(model, row) for row in rows}
    logits, tokens = steps_of(model, rows, prompts, dense)
    for at, row in enumerate(rows):
        alone, own = steps_of(model, [row], prompts, dense)
        assert_equal(logits[at], alone[0])
        assert torch.equal(tokens[at], own[0])


@pytest.mark.parametrize(("name", "sparsity", "rows"), CASES)
def test_rows_equal_their_single_runs(name, sparsity, rows):
    check_rows(build_cut(FUSED, dtype=torch.bfloat16, device=DEVICE, **MODELS[name]), rows, dense=not sparsity)


def test_rows_of_32_bits():
    """Their sums lie on no grid, so on a GPU they are only close."""
    model = build_cut(FUSED, dtype=torch.float32, device=DEVICE, shifted=True, intermediate_size=80, n_layer=1)
    prompts = {row: saved_prompt(model, row) for row in FEW}
    logits, _ = steps_of(model, FEW, prompts, dense=False)
    for at, row in enumerate(FEW):
        alone, _ = steps_of(model, [row], prompts, dense=False)
        torch.testing.assert_close(logits[at, 0], alone[0, 0], rtol=0, atol=1e-4 * alone.abs().max().item())


@pytest.mark.gpu
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", WIDE_MODELS)
def test_rows_of_wide_models(name, plan, monkeypatch):
    """Widths that tiles divide, so that rows of W are prefetched, and tiles of all kinds."""
    for constant, value in PLANS[plan].items():
        monkeypatch.setattr(f"kernels.plan.{constant.upper()}", value)
    check_rows(build_cut(FUSED, dtype=torch.bfloat16, device=DEVICE, **WIDE_MODELS[name]), ALL, dense=False)


@pytest.mark.parametrize("name", MODELS if DEVICE == "cuda" else ["switches"])
def test_drafts_equal_steps_of_one_row(name):
    """Three positions of a text at once, where one chunk of attention ends, as one after the other: the caches too."""
    model = build_cut(FUSED, dtype=torch.bfloat16, device=DEVICE, **MODELS[name])
    saved, tokens, at = saved_prompt(model, 0), [9, 8, 7], [62, 63, 64]
    results = []
    for drafts in (0, 3):
        for cache, tensor in zip(empty_caches(model, 1), saved, strict=True):
            cache[0, :, : at[0]] = tensor[:, : at[0]]
        step = FusedGpuStep(model, 0.8, 20, drafts=drafts)
        size = drafts or 1
        outputs = [run(step, tokens[i : i + size], at[i : i + size], [4] * size) for i in range(0, 3, size)]
        results.append([torch.cat(each) for each in zip(*outputs, strict=True)] + [c.clone() for c in caches(model)])
    for one, many in zip(*results, strict=True):
        assert_equal(many.float(), one.float())
