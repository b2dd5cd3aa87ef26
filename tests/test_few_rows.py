"""Fused steps of several rows, and of several positions of one text: each row as it is alone, to the bit on a GPU."""

import pytest
import torch
from models import FUSED, build_cut, caches, random_tokens

pytest.importorskip("triton")

from decoder import FusedGpuStep
from kernels.plan import plan_for
from kernels.few_rows import rows_plan
from kernels.quantized import Form

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = [70, 3, 40, 65, 1, 20, 33, 64]  # of the rows' prompts
WIDE = {"dim": 512, "n_head": 8, "intermediate_size": 5120, "std": 0.05}
INT4 = {"quant": "int4", "groupsize": 16, "intermediate_size": 176}
MODELS = {
    "16 bits": {},
    "window, biases": {"sliding_window": 5, "qkv_bias": True},
    "shifted": {"shifted": True},
    "int8, shifted": {"quant": "int8", "shifted": True},
    "int4": INT4,
}
WIDE_MODELS = {
    "wide": WIDE,
    "wide, shifted": WIDE | {"shifted": True},
    "wide, int8": WIDE | {"quant": "int8"},
    "wide, int4": WIDE | {"quant": "int4", "groupsize": 64},
}
PLANS = {"strands of 128": {"resident": 80}, "very wide": {"resident": 80, "very_wide": 8192}, "small": {}}


def steps_of(model, rows: list[int], sparsity: float, prompts, steps: int):
    """Logits [steps, rows, vocab] and tokens of these rows in one batch."""
    model.setup_caches(len(rows), 96)
    for key, value in zip(caches(model)[::2], caches(model)[1::2], strict=True):
        key.zero_(), value.zero_()
    single = type(model)
    for at, row in enumerate(rows):
        for cache, saved in zip(caches(model), prompts[row][1], strict=True):
            cache[at, :, : LENGTHS[row]] = saved
    model.sparsity = sparsity
    step = FusedGpuStep(model, 0.8, 20, dense=not sparsity)
    step.pdl = DEVICE == "cuda" and step.pdl
    token = torch.tensor([prompts[row][0] for row in rows], device=DEVICE)
    step.start(token, [LENGTHS[row] for row in rows], [50 + row for row in rows])
    logits = []
    for _ in range(steps):
        step.replay() if DEVICE == "cuda" else step.step()
        logits.append(step.logits[:, : model.config.vocab_size].clone())
    tokens = [step.tokens[at, LENGTHS[row] : LENGTHS[row] + steps + 1].clone() for at, row in enumerate(rows)]
    return torch.stack(logits), torch.stack(tokens)


def prompt_caches(model, row: int):
    """A first token for the row, and random keys and values of its prompt."""
    generator = torch.Generator().manual_seed(row)
    model.setup_caches(1, 96)
    saved = [torch.randn(c[0, :, : LENGTHS[row]].shape, generator=generator).to(c) for c in caches(model)]
    return row + 5, saved


@pytest.mark.parametrize("rows", [[1, 0], [2, 1, 0, 3, 4, 5, 6, 7]])
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
@pytest.mark.parametrize("name", MODELS)
def test_rows_equal_their_single_runs(name, sparsity, rows):
    if DEVICE == "cpu":
        rows = rows[:5]
    model = build_cut(FUSED, dtype=torch.bfloat16, device=DEVICE, **MODELS[name])
    prompts = {row: prompt_caches(model, row) for row in rows}
    steps = 1 if DEVICE == "cpu" else 8
    logits, tokens = steps_of(model, rows, sparsity, prompts, steps)
    for at, row in enumerate(rows):
        alone, own = steps_of(model, [row], sparsity, prompts, steps)
        if DEVICE == "cuda":
            assert torch.equal(logits[:, at], alone[:, 0])
        torch.testing.assert_close(logits[:, at], alone[:, 0], rtol=0, atol=2e-3 * alone.abs().max().item())
        assert torch.equal(tokens[at], own[0])
