"""Sums, attention and draws that come out the same every time: whatever the order, the cache's length, the run."""

import math
from functools import partial

import pytest
import torch
from models import FUSED, build, build_cut, caches, random_tokens
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl

from decoder import FusedGpuStep, Generator, random_bits
from kernels import fused_step, grids
from kernels.products import launch_product
from kernels.quantized import dequantize
from kernels.triton_gemv import RSTD_BUFFER, Norm, Product, snap
from model import Transformer
from sparse_model import SparseTransformer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter's programs run in an order that can be set")
FORMS = {"none": {}, "int8": {"quant": "int8"}, "int4": {"quant": "int4", "groupsize": 16, "intermediate_size": 176}}


@triton.jit
def _snap_kernel(x_ptr, fineness_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, snap(tl.load(x_ptr + i), tl.load(fineness_ptr + i)))


def snapped(x: Tensor, fineness: Tensor) -> Tensor:
    out = torch.empty_like(x, device=DEVICE)
    _snap_kernel[(1,)](x.to(DEVICE), fineness.to(DEVICE), out, N=len(x))
    return out.cpu()


def added(terms: Tensor, seed: int) -> Tensor:
    """The float32 sum of terms [n, out], one after the other in a random order."""
    total = torch.zeros(terms.shape[1])
    for i in torch.randperm(len(terms), generator=torch.Generator().manual_seed(seed)):
        total = total + terms[i]
    return total


# ---------------------------------------------------------------- grids


@pytest.mark.parametrize("bound", [3e-5, 0.3, 1.0, 700.0])
def test_sums_on_a_grid_are_equal_in_any_order_up_to_the_bound(bound):
    generator = torch.Generator().manual_seed(0)
    terms = 2 * torch.rand(64, 128, generator=generator) - 1
    terms *= bound / terms.abs().sum(0)  # every order stays within the bound, and reaches most of it
    fineness = grids.fineness(torch.full((128,), bound))
    on_grid = torch.stack([snapped(term, fineness) for term in terms])
    assert torch.equal(on_grid * fineness, (on_grid * fineness).round())
    assert (on_grid - terms).abs().max() <= 0.5 / fineness.min() * (1 + 1e-6) <= bound * 2.0**-24 * 1.01 * 1.01
    sums = [added(on_grid, seed) for seed in range(8)]
    assert all(torch.equal(total, sums[0]) for total in sums)
    assert not all(torch.equal(added(terms, seed), added(terms, 0)) for seed in range(8))


def test_beyond_its_grid_a_sum_only_rounds():
    x = torch.tensor([2.0**24 + 2, -(2.0**30), 2.0**23 + 1, 0.4, -0.6, math.inf, -math.inf, 0.0])
    fineness = torch.ones(8)
    assert snapped(x, fineness).tolist() == [2.0**24 + 2, -(2.0**30), 2.0**23 + 2, 0, -1, math.inf, -math.inf, 0]
    assert snapped(torch.full((8,), math.nan), fineness).isnan().all()
    generator = torch.Generator().manual_seed(0)
    terms = torch.randn(64, 128, generator=generator)
    on_grid = torch.stack([snapped(term, grids.fineness(torch.full((128,), 1e-3))) for term in terms])
    torch.testing.assert_close(added(on_grid, 1), terms.sum(0), atol=1e-4, rtol=0)


def test_a_fineness_is_a_power_of_two_whatever_the_bound():
    bound = torch.tensor([0.0, 1.0, 1.0000001, 2.0, 1e-30, 1e30, math.inf, math.nan])
    fineness = grids.fineness(bound)
    assert fineness[1:4].tolist() == [2.0**24, 2.0**23, 2.0**23]
    assert fineness.isfinite().all() and (torch.frexp(fineness).mantissa == 0.5).all()


@pytest.mark.parametrize(("shifted", "biased"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("form", FORMS)
def test_the_bound_behind_a_norm_holds_for_the_worst_input(form, shifted, biased):
    """For each output the input that is largest there, with the norm's own rounding, any part of it and the offset."""
    model = build_cut(shifted=True, dtype=torch.bfloat16, vector_std=0.5, mlp_bias=True, **FORMS[form])
    module, gain = model.layers[0].feed_forward.w13, model.layers[0].ffn_norm.weight
    shift = module.shift if shifted else torch.zeros(64)
    bias = module.bias.float() * biased
    given = shift if shifted else None, bias if biased else None
    bound = grids.bound_after_norm(gain, module.weight, module.scale, *given)
    weight = dequantize(module.weight, module.scale, torch.float32)
    for j in range(0, weight.shape[1], 11):
        h = gain.float() * weight[:, j]
        x = (h / h.square().mean().sqrt()).bfloat16() * gain - shift.bfloat16()
        products = x.float() * weight[:, j]
        offset = shift @ weight[:, j] + bias[j]
        for part in (products.clamp(min=0).sum(), products.clamp(max=0).sum(), products.sum()):
            assert max(part.abs(), (part + offset).abs()) <= bound[j]
        assert shifted or products.sum() > 0.95 / grids.ROUNDING * bound[j]


@pytest.mark.parametrize("multiplier", [1.0, 3.3])
def test_the_residuals_bound_is_made_once_and_spares(multiplier):
    model = build(SparseTransformer, FUSED, dtype=torch.bfloat16, embedding_multiplier=multiplier)
    tried = torch.randint(101, (1, grids.PROBE_TOKENS), generator=torch.Generator().manual_seed(0)).unique().tolist()
    absent = next(token for token in range(101) if token not in tried)
    model.tok_embeddings.weight[absent] *= 1000
    bound = grids.residual_bound(model)
    idx = random_tokens(1, 100, 101, seed=8)
    idx[idx == absent] = 0
    for layer in model.walk([idx]):
        assert (4 * layer.inputs[0][0, 1:].abs().amax(0) < bound).all()
    assert (bound >= model.embed(torch.tensor([[absent]]), torch.zeros(1))[0, 0].abs()).all()
    model.tok_embeddings.weight.mul_(2)
    assert grids.residual_bound(model) is bound and "residual_bound" not in model.state_dict()


# ---------------------------------------------------------------- products


@pytest.mark.parametrize("form", FORMS)
def test_a_multiplied_product_lies_on_its_grid(form):
    model = build_cut(dtype=torch.bfloat16, device=DEVICE, residual_multiplier=0.22, o_bias=True, **FORMS[form])
    model.setup_caches(1, 70)
    module = model.layers[0].attention.wo
    product = FusedGpuStep(model, 0.0, 1).products[module]
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.bfloat16)
    out = torch.zeros(1, 64, device=DEVICE)
    launch_product("given", x, product, out, dtype=torch.bfloat16)
    kept = torch.where(x.abs() > module.threshold, x, 0).float()
    expected = 0.22 * (kept @ module.dequantized(torch.float32) + module.bias.float())
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(out * product.fineness, (out * product.fineness).round())


def sums_in_other_orders(monkeypatch, launch, out: Tensor) -> list[Tensor]:
    """What a kernel's programs add to `out`, caught and added in other orders."""
    terms = []

    def caught(pointer, value, mask, sem):
        term = torch.zeros(out.numel())
        at = (torch.from_numpy(pointer.handle.data.astype("int64")) - out.data_ptr()) // 4
        inside = torch.from_numpy(mask.handle.data)
        term[at[inside]] = torch.from_numpy(value.handle.data)[inside]
        terms.append(term)

    monkeypatch.setattr(tl, "atomic_add", caught)
    launch()
    assert len(terms) > 15
    return [added(torch.stack(terms), seed) for seed in range(6)]


@interpreted
@pytest.mark.parametrize("on_grid", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_a_product_is_the_same_in_any_order_of_its_programs(form, on_grid, monkeypatch):
    """Equal only if what the kernel's programs add lies on a grid."""
    model = build_cut(**FORMS[form] | {"dim": 512, "intermediate_size": 32}, shifted=True, dtype=torch.bfloat16)
    model.setup_caches(1, 70)
    step = FusedGpuStep(model, 0.0, 1)
    module, norm = model.layers[0].feed_forward.w13, model.layers[0].ffn_norm
    product = step.products[module]
    if not on_grid:
        product = product._replace(fineness=None)
    out = torch.zeros(1, sum(module.widths) + RSTD_BUFFER)
    h = torch.randn(1, 512, generator=torch.Generator().manual_seed(5))
    norm = Norm(norm.weight, norm.eps)
    launch = partial(launch_product, "norm", h, product, out, norm=norm, dtype=torch.bfloat16)
    sums = sums_in_other_orders(monkeypatch, launch, out)
    assert all(torch.equal(total, sums[0]) for total in sums) == on_grid


@interpreted
@pytest.mark.parametrize(
    "changes", [{}, {"norm": "layer", "gated": False, "parallel_residual": True, "mlp_bias": True}]
)
def test_the_unfused_product_is_the_same_in_any_order_too(changes, monkeypatch):
    """For sites of models that no fused step serves, and not without its grid."""
    model = build_cut(**changes | {"dim": 512, "intermediate_size": 512, "n_layer": 1}, dtype=torch.float16)
    grids.set_site_grids(model)
    x = torch.randn(1, 512, generator=torch.Generator().manual_seed(5)).half()
    assert all(module.fineness.shape == (sum(module.widths),) for module in model.sites)
    for module in model.sites[::3]:
        for fineness in (module.fineness, None):
            out = torch.zeros(1, sum(module.widths))
            product = Product(module.weight, module.threshold, module.widths, fineness=fineness)
            launch = partial(launch_product, "given", x, product, out, dtype=torch.float16)
            sums = sums_in_other_orders(monkeypatch, launch, out)
            assert all(torch.equal(total, sums[0]) for total in sums) == (fineness is not None)


@pytest.mark.gpu
@pytest.mark.parametrize("step", ["eager", "compiled"])
def test_unfused_runs_repeat_to_the_token(step):
    model = build_cut(block_size=400, dtype=torch.bfloat16, device=DEVICE, dim=512, intermediate_size=512)
    prompts = random_tokens(9, 5, 101).to(DEVICE)
    runs = [Generator(model, 9, 205, step=step)(prompts, 200).tokens for _ in range(3)]
    assert all(torch.equal(run, runs[0]) for run in runs)


@pytest.mark.parametrize("form", FORMS)
def test_grids_change_a_step_by_less_than_16_bits_do(form):
    model = build_cut(dtype=torch.float16, std=0.1, n_layer=1, device=DEVICE, **FORMS[form])
    model.setup_caches(1, 70)
    logits = []
    for with_grids in (True, False):
        step = FusedGpuStep(model, 0.0, 1)
        if not with_grids:
            step.residual = fused_step.Residual(step.residual.h)
            step.products = {module: p._replace(fineness=None) for module, p in step.products.items()}
        step.start(torch.tensor([3]), [0], [0])
        step.step()
        logits.append(step.logits[0, :101].clone())
        assert not step.left_grid
    torch.testing.assert_close(*logits, atol=2e-3 * logits[0].abs().max().item(), rtol=0)


def test_a_step_says_that_the_residual_stream_left_its_grid():
    model = build_cut(dtype=torch.float16, n_layer=1, device=DEVICE)
    model.setup_caches(1, 70)
    step = FusedGpuStep(model, 0.0, 1)
    step.start(torch.tensor([3]), [0], [0])
    step.step()
    assert not step.left_grid
    step.residual.h[0, 17] = 2.0**23.5 / step.residual.fineness[17]
    assert step.left_grid and not step.residual.beyond.any()  # after the last step
    step.step()
    assert step.residual.beyond.all() and step.left_grid  # found by the next step's embedding

    # between layers: an embedding that has grown since the grids were made, whose residual the layer cancels
    other = FusedGpuStep(model, 0.0, 1)
    other.start(torch.tensor([3]), [0], [0])
    model.tok_embeddings.weight[3, 60] = 2.0**23.5 / other.residual.fineness[60]
    other.step()
    other.residual.h.zero_()
    assert other.left_grid


# ---------------------------------------------------------------- attention


def test_chunks_lie_at_fixed_positions():
    starts = [fused_step._chunk_start.fn(chunk) for chunk in range(60)]
    assert starts[:10] == [*range(0, 513, 64), 640] and starts[15:19] == [1408, 1536, 1792, 2048]
    for position in range(9000):
        chunk = fused_step.chunk_of.fn(position)
        assert starts[chunk] <= position < starts[chunk + 1]
    assert [fused_step.chunks_in(length) for length in (1, 64, 65, 206, 1224, 8192)] == [1, 1, 2, 4, 14, 42]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("options", [{}, {"sliding_window": 70}])
@pytest.mark.parametrize("position", [3, 64, 200, 600])
def test_attention_does_not_depend_on_the_caches_length(position, options, dtype):
    """To the bit, whatever lies beyond the position: the two caches have 1 to 3 chunks more, one of NaN."""
    model = build_cut(dtype=dtype, n_layer=1, device=DEVICE, **options, block_size=2048)
    results = []
    for length in (position + 1, position + 70, position + 300):
        model.layers[0].attention.kv_cache = None
        model.setup_caches(1, length)
        generator = torch.Generator().manual_seed(1)
        for tensor in caches(model):
            tensor.fill_(math.nan)
            tensor[:, :, :position] = torch.randn(1, 2, position, 16, generator=generator).to(DEVICE, dtype)
        step = FusedGpuStep(model, 0.0, 1)
        step.start(torch.tensor([3], device=DEVICE), [position], [0])
        qkv = torch.randn(1, 128 + RSTD_BUFFER, generator=generator).to(DEVICE)
        module = model.layers[0].attention
        fused_step.launch_attention(
            qkv, step.heads[0], module.kv_cache, step.position, step.chunks, step.y[0], step.residual,
            (step.norms[1], step.products[model.layers[0].feed_forward.w13]), False,
        )  # fmt: skip
        assert not step.chunks.arrived.any()
        results.append(step.y[0].cpu().clone())
    assert results[0].isfinite().all() and results[0].any()
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@triton.jit
def _join_kernel(part_ptr, lse_ptr, out_ptr, n_chunks, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    heads = tl.broadcast_to(tl.arange(0, HEADS)[:, None], (HEADS, WIDTH))
    at = heads * WIDTH + tl.arange(0, WIDTH)[None, :]
    y = fused_step._join_chunks(part_ptr, lse_ptr, n_chunks, heads, at, at >= 0, HEADS, HEADS * WIDTH)
    tl.store(out_ptr + at, y)


@pytest.mark.parametrize("n_chunks", [1, 8, 10, 19])
@pytest.mark.parametrize(("empty", "last"), [(0, -3.0), (0, -200.0), (8, -120.0), (9, 40.0)])
def test_chunks_are_joined_by_their_weights(n_chunks, empty, last):
    """8 at a time, of very different log-sum-exps; the first ones may be empty, as behind a sliding window."""
    generator = torch.Generator().manual_seed(n_chunks)
    parts = torch.randn(n_chunks, 4, 16, generator=generator)
    lse = last + 6 * torch.rand(n_chunks, 4, generator=generator) + 9.0 * torch.arange(1 - n_chunks, 1)[:, None]
    lse[: min(empty, n_chunks - 1)] = -math.inf
    expected = (torch.softmax(lse.double(), 0)[..., None] * parts).sum(0)
    out = torch.empty(4, 16, device=DEVICE)
    _join_kernel[(1,)](parts.to(DEVICE), lse.to(DEVICE), out, n_chunks, HEADS=4, WIDTH=16)
    torch.testing.assert_close(out.cpu().double(), expected, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- draws


@triton.jit
def _bits_kernel(seed_ptr, position_ptr, out_ptr, N: tl.constexpr):
    token = tl.arange(0, N)
    bits = fused_step.random_bits(tl.load(seed_ptr), tl.load(position_ptr), token)
    tl.store(out_ptr + token, bits)


@pytest.mark.parametrize(("seed", "position"), [(0, 0), (1, 0), (0, 1), (2**32 - 1, 8191), (2**31, 131071)])
def test_the_kernels_noise_is_torchs_noise(seed, position):
    seeds, positions = (torch.tensor([n], device=DEVICE) for n in (seed, position))
    bits = torch.empty(1024, dtype=torch.int64, device=DEVICE)
    _bits_kernel[(1,)](seeds, positions, bits, N=1024)
    assert torch.equal(bits, random_bits(seeds, positions, torch.arange(1024, device=DEVICE)))


def test_random_bits_are_even_and_independent():
    """Every bit is 1 half of the time, and half of the bits change with any bit of seed, position or token."""
    n = 20_000
    inputs = torch.randint(2**17, (3, n), generator=torch.Generator().manual_seed(0))
    shares = lambda x: torch.stack([(x >> i & 1).double().mean() for i in range(32)])  # noqa: E731
    bits = random_bits(*inputs)
    assert bits.min() >= 0 and bits.max() < 2**32
    assert (shares(bits) - 0.5).abs().max() < 4.5 * 0.5 / n**0.5
    for which in range(3):
        for bit in range(17):
            changed = inputs.clone()
            changed[which] ^= 1 << bit
            assert (shares(bits ^ random_bits(*changed)) - 0.5).abs().max() < 0.03
    rows = random_bits(torch.arange(8)[:, None, None], torch.arange(40)[:, None], torch.arange(500)).flatten(0, 1)
    correlation = torch.corrcoef(rows.double())
    assert (correlation - torch.eye(320)).abs().max() < 6 / 500**0.5


def test_the_kernel_draws_what_torch_draws():
    from test_decode import draw

    from decoder import sample

    logits = torch.randn(500, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    drawn = draw(logits, 0.9, 40, 25, seed=11)
    seeds = torch.tensor([[11]], device=DEVICE)
    expected = [sample(logits[None], seeds, position, 0.9, 40).item() for position in range(1, 26)]
    assert drawn.tolist() == expected and len(set(expected)) > 5


# ---------------------------------------------------------------- whole runs, on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.65])
@pytest.mark.parametrize("form", ["none", "int8", "int4"])
def test_runs_repeat_to_the_token(form, sparsity, temperature):
    """Ten runs of 60 tokens, and longer and shorter ones, in caches of other lengths."""
    shape = {"block_size": 4096, "vocab_size": 4000, "n_layer": 6, "n_head": 16, "n_local_heads": 4, "dim": 1024}
    shape |= {"intermediate_size": 2816, "quant": form, "groupsize": 64}
    model = build_cut(shape, dtype=torch.bfloat16, device="cuda", std=0.05)
    model.sparsity = sparsity
    prompt = random_tokens(1, 50, 4000).cuda()
    make = partial(Generator, model, 1, temperature=temperature, step="fused", seed=3)
    generator = make(max_length=110)
    texts = [generator(prompt, 60).tokens for _ in range(10)]
    assert all(torch.equal(text, texts[0]) for text in texts) and not generator.left_grid
    if torch.cuda.get_device_capability() >= (9, 0):  # qkv, o, gate|up and down against 4 MiB
        all_read = {"none": [True, True, False, False], "int8": [True, True, False, True], "int4": [True] * 4}
        assert [site.reads_all for site in model.sites[:4]] == all_read[form]
    assert texts[0][0, 50:].unique().numel() > 3
    for new in (7, 300, 1200):
        other = make(max_length=50 + new)(prompt, new).tokens
        length = min(other.shape[1], 110)
        assert torch.equal(other[:, :length], texts[0][:, :length])


@pytest.mark.gpu
def test_a_dense_models_prompt_fills_any_cache_alike():
    model = build(Transformer, FUSED, dtype=torch.bfloat16, device="cuda")
    left = []
    for length in (60, 103, 256):
        Generator(model, 1, length, 0.0)(random_tokens(1, 37, 101).cuda(), 1)
        left.append([tensor[:, :, :37].clone() for tensor in caches(model)])
    for other in left[1:]:
        assert all(torch.equal(a, b) for a, b in zip(left[0], other, strict=True))
