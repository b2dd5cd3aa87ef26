"""Sums of the CPU's decode step: the same bits from any number of threads, precise, and how many threads it takes."""

import subprocess

import pytest
import torch

from decoder import FusedCpuStep
from kernels import cpu
from kernels.quantized import pack_int4
from sparse_model import SparseTransformer
from tests.models import FUSED, build

pytestmark = pytest.mark.skipif(cpu.library() is None, reason="no C++ compiler")
CUTS = ["dense", "cut", "shifted"]


@pytest.fixture
def fixed_threads(monkeypatch):
    """Sets a number of threads that every step takes."""
    before = torch.get_num_threads()
    monkeypatch.setattr(FusedCpuStep, "adaptive", False)
    yield torch.set_num_threads
    torch.set_num_threads(before)


def random_model(dtype, quant, cuts, seed=0, **changes):
    """A model of random weights whose inputs straddle their thresholds; each segment has its own."""
    changes = {"quant": quant, "groupsize": 16, "intermediate_size": 176, **changes}
    model = build(SparseTransformer, FUSED, dtype=dtype, seed=seed, vector_std=0.3, qkv_bias=True, **changes)
    generator = torch.Generator().manual_seed(seed)
    for module in model.sites:
        n_in = module.threshold.shape[1]
        if module.form.name == "int4":
            codes = torch.randint(16, (n_in, sum(module.widths)), generator=generator, dtype=torch.uint8)
            module.weight.copy_(pack_int4(codes))
            s = torch.rand(module.scale.shape[:2], generator=generator) * 0.1
            module.scale.copy_(torch.stack((s, s * -7.5 + 0.1 * torch.randn(s.shape, generator=generator)), dim=2))
        shift = torch.rand(n_in, generator=generator) * 0.4 - 0.2 if cuts == "shifted" else None
        module.set_cut(torch.rand(module.threshold.shape, generator=generator) * 0.5, shift)
    model.sparsity = 0.5
    return model


def run(model, cuts, steps, temperature=0.8):
    """The logits of all steps from an empty cache on, and the tokens drawn."""
    model.setup_caches(1, steps + 1)
    step = FusedCpuStep(model, temperature, top_k=20, dense=cuts == "dense")
    step.start(torch.tensor(3), 0, seed=7)
    logits = []
    for _ in range(steps):
        step.replay()
        logits.append(step.logits.clone())
    return torch.stack(logits), step.tokens.clone()


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("quant", ["none", "int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_any_number_of_threads_gives_the_same_bits(fixed_threads, dtype, quant, cuts):
    model = random_model(dtype, quant, cuts, n_layer=3)
    fixed_threads(1)
    logits, tokens = run(model, cuts, 200)
    assert logits.isfinite().all() and tokens.unique().numel() > 20
    for threads in (2, 3, 4):
        fixed_threads(threads)
        again, drawn = run(model, cuts, 200)
        assert torch.equal(again, logits) and torch.equal(drawn, tokens)
