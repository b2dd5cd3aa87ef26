"""Rows of the CPU's decode step: each as its single run, to the bit; drafts in one cache; draws as torch draws."""

import pytest
import torch
from models import SWITCHES, caches, random_tokens
from test_cpu_sums import CUTS, fixed_threads, random_model  # noqa: F401

from decoder import FusedCpuStep, sample, why_unfused
from kernels import cpu

pytestmark = pytest.mark.skipif(cpu.library() is None, reason="no C++ compiler")
LENGTHS = [5, 1, 9, 3, 12, 2, 7, 4]  # of the rows' prompts
PROMPTS = [random_tokens(1, length, 101, seed=length) for length in LENGTHS]
CACHE = 32


@pytest.fixture(autouse=True)
def two_threads(fixed_threads):  # noqa: F811
    fixed_threads(2)
    return fixed_threads


def filled_caches(model, prompts):
    """Gives the model a cache row per prompt, filled by a pass of that prompt alone."""
    parts = []
    for prompt in prompts:
        model.setup_caches(1, CACHE)
        for tensor in caches(model):
            tensor.zero_()
        model(prompt, torch.arange(prompt.shape[1]), dense_prefix=prompt.shape[1])
        parts.append([tensor.clone() for tensor in caches(model)])
    model.setup_caches(len(prompts), CACHE)
    for whole, *rows in zip(caches(model), *parts, strict=True):
        whole.copy_(torch.cat(rows))


def run(model, which, steps=12, dense=False, temperature=0.8):
    """Logits [rows, steps, vocab] and tokens [rows, steps] of the rows `which` in one batch; row r's seed is 40 + r."""
    filled_caches(model, [PROMPTS[r] for r in which])
    step = FusedCpuStep(model, temperature, 20, dense=dense)
    positions = [LENGTHS[r] for r in which]
    step.start(torch.tensor([r + 1 for r in which]), positions, [40 + r for r in which])
    logits = []
    for _ in range(steps):
        step.replay()
        logits.append(step.logits.clone())
    tokens = [row[at + 1 : at + 1 + steps] for row, at in zip(step.tokens, positions, strict=True)]
    return torch.stack(logits, dim=1), torch.stack(tokens)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("quant", ["none", "int8", "int4"])
def test_rows_equal_their_single_runs(two_threads, quant, cuts, temperature):
    """In any batch, at any place of it, with any number of threads; the rows' inputs are cut differently."""
    model, dense = random_model(torch.bfloat16, quant, cuts, intermediate_size=480), cuts == "dense"  # wide for 8 rows
    single = [run(model, [r], dense=dense, temperature=temperature) for r in range(8)]
    assert torch.cat([tokens for _, tokens in single]).unique().numel() > 20
    for which, threads in (([1, 0], 2), ([2, 7, 3], 1), ([5, 0, 6, 1], 3), (list(range(8)), 2)):
        two_threads(threads)
        logits, tokens = run(model, which, dense=dense, temperature=temperature)
        for i, r in enumerate(which):
            assert torch.equal(logits[i], single[r][0][0]) and torch.equal(tokens[i], single[r][1][0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("options", [{}, SWITCHES], ids=["", "switches"])
def test_rows_of_other_dtypes(two_threads, dtype, options):
    model = random_model(dtype, "none", "cut", **options)
    two_threads(1)  # with one thread, float32's order is that of the inputs
    logits, tokens = run(model, [4, 1, 2])
    for i, r in enumerate([4, 1, 2]):
        alone, drawn = run(model, [r])
        assert torch.equal(logits[i], alone[0]) and torch.equal(tokens[i], drawn[0])


@pytest.mark.parametrize("options", [{}, {"sliding_window": 5}, SWITCHES], ids=["full", "window", "switches"])
@pytest.mark.parametrize("quant, cuts", [("none", "dense"), ("none", "shifted"), ("int8", "cut"), ("int4", "cut")])
def test_drafts_equal_steps_of_one_row(two_threads, quant, cuts, options):
    """Up to 8 tokens at once give the logits, draws and caches that they give one after the other."""
    model, dense = random_model(torch.bfloat16, quant, cuts, **options), cuts == "dense"
    tokens, prompt = random_tokens(1, 8, 101, seed=3)[0], PROMPTS[2]
    start = prompt.shape[1]
    filled_caches(model, [prompt])
    one, logits, drawn = FusedCpuStep(model, 0.8, 20, dense=dense), [], []
    for i, token in enumerate(tokens):
        one.start(token[None], [start + i], [11])
        one.replay()
        logits.append(one.logits[0].clone())
        drawn.append(one.tokens[0, start + i + 1].item())
    after = [tensor.clone() for tensor in caches(model)]
    for threads, n in ((1, 8), (2, 8), (3, 5)):
        two_threads(threads)
        filled_caches(model, [prompt])
        many = FusedCpuStep(model, 0.8, 20, dense=dense, drafts=8)
        many.start(tokens[:n], list(range(start, start + n)), [11] * n)
        many.replay()
        assert torch.equal(many.logits[:n], torch.stack(logits[:n]))
        assert [many.tokens[i, start + i + 1].item() for i in range(n)] == drawn[:n]
        for mine, its in zip(caches(model), after, strict=True):
            assert torch.equal(mine[:, :, : start + n], its[:, :, : start + n]) and not mine[:, :, start + n :].any()


@pytest.mark.parametrize("temperature, top_k", [(0.8, 20), (0.8, 101), (3.0, 1), (1.3, 200), (0.0, 5)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_draws_equal_torchs(dtype, temperature, top_k):
    """Of logits with ties (16 bits have many) and without, at many seeds and positions."""
    model = random_model(dtype, "none", "cut", n_layer=1, vocab_size=700)
    model.setup_caches(8, 100)
    step, seeds = FusedCpuStep(model, temperature, top_k), [0, 1, 2**31, 2**32 - 1, 77, 2**32 + 77, 5, 6]
    step.start(torch.arange(8), list(range(8)), seeds)
    different = 0
    for i in range(60):
        step.replay()
        positions = torch.arange(i + 1, i + 9)[:, None]
        expected = sample(step.logits, torch.tensor(seeds)[:, None], positions, temperature, top_k)
        different += (step.tokens.gather(1, positions) != expected).sum().item()
    assert different <= 1  # a logarithm may be another in its last bit
    assert step.tokens.unique().numel() > (20 if temperature else 5)


def test_a_cpu_serves_eight_rows():
    config = random_model(torch.bfloat16, "none", "cut").config
    assert why_unfused(config, torch.device("cpu"), 8, 200) is None
    assert why_unfused(config, torch.device("cpu"), 9, 200) == "a fused step serves at most 8 rows"
