"""16-bit products on a GPU: near float64, and each row's sums to the bit beside any others."""

import pytest
import torch
from test_integers import DEVICE, HOPPER, INF, NAN, room
from torch import Tensor

pytest.importorskip("triton")

from kernels import grids, half_mma
from kernels.half_mma import launch_half
from kernels.triton_gemv import RSTD_BUFFER, Norm, Product

HALF = torch.float16  # the interpreter rounds to bfloat16 in a way of its own


def case(n_in: int, segments: list[int], sparsity: float, rows: int, shift: bool = False, dtype=HALF):
    """x [rows, in], and a product that cuts half of it or nothing; with shifts it has offsets and a multiplier, too."""
    generator, n_out = torch.Generator().manual_seed(n_in), sum(segments)
    weight = torch.randn(n_in, n_out, generator=generator).to(dtype)
    x = torch.randn(rows, n_in, generator=generator).to(dtype)
    threshold = (0.6 + 0.1 * torch.rand(len(segments), n_in, generator=generator)) * (sparsity > 0)
    offset = None
    if shift:
        shifts = torch.randn(n_in, generator=generator).mul(0.3).to(dtype).float()
        threshold = torch.stack((threshold, shifts.expand_as(threshold)), 2).contiguous()
        offset = torch.randn(n_out, generator=generator).to(DEVICE)
    fineness = grids.fineness(torch.full((n_out,), 10.0 * n_in**0.5)).to(DEVICE)
    weight, threshold = weight.to(DEVICE), threshold.to(DEVICE)
    product = Product(weight, threshold, segments, sparsity, None, offset, fineness, 0.75 if shift else 1.0)
    return x.to(DEVICE), product


def expected(x: Tensor, product: Product) -> Tensor:
    """The sums, [rows, out], in float64."""
    weight, out, start = product.weight.double(), [], 0
    for threshold, width in zip(product.threshold, product.segments, strict=True):
        limit, shift = threshold.unbind(1) if threshold.dim() == 2 else (threshold, torch.zeros_like(threshold))
        moved = (x.float() - shift).to(x.dtype).float()
        kept = torch.where(moved.abs() <= limit, 0.0, moved) if product.sparsity else moved
        out.append(kept.double() @ weight[:, start : start + width])
        start += width
    out = torch.cat(out, 1) + (0 if product.offset is None else product.offset)
    return out * product.multiplier


SHAPES = [(64, [64], 2, 64, 0), (96, [128], 3, 128, 48), (40, [40, 32], 1, 64, 0), (70, [136], 2, 128, 48)]
if DEVICE == "cuda":
    SHAPES += [(576, [576, 192, 192], 1, 64, 0), (4096, [4096], 2, 64, 0), (4096, [4096, 1024, 1024], 3, 128, 48)]
    SHAPES += [(14336, [4096], 2, 128, 48), (4096, [4096], 2, 128, 0)]
CASES = [(*shape, 0.5 * (i not in (0, 5)), i % 3 == 2) for i, shape in enumerate(SHAPES)]


@pytest.mark.parametrize(("n_in", "segments", "blocks", "tile", "at_once", "sparsity", "shift"), CASES)
def test_rows_equal_single_ones(n_in, segments, blocks, tile, at_once, sparsity, shift, monkeypatch):
    """In the interpreter by the assembly in numpy, see `lanes`. at_once: rows of W, or 0 for all."""
    dtype = HALF if DEVICE == "cpu" or shift else torch.bfloat16
    choose = Product.plan
    fields = {"blocks": blocks, "block_out": tile, "rows": at_once}
    monkeypatch.setattr(Product, "plan", lambda *given: choose(*given)._replace(**fields))
    sizes = [(1, 8), (2, 8), (3, 1), (8, 8)] if DEVICE == "cuda" else [(3, 1), (2, 8)]
    x, product = case(n_in, segments, sparsity, max(sizes)[0], shift, dtype)
    single = torch.zeros(len(x), sum(segments), device=DEVICE)
    launch_half("given", x, product, single, dtype=dtype)  # as the unfused op has them
    want = expected(x, product)
    rounding = n_in / (32 * blocks) / product.fineness  # at most, of the programs' sums to their grid
    assert ((single - want).abs() <= rounding + 1e-6 * want.abs().max()).all()
    fields["early"] = True
    early = torch.zeros(len(x), sum(segments), device=DEVICE)
    launch_half("given", x, product, early, dtype=dtype, pdl=HOPPER)
    assert torch.equal(early, single)
    for i, (rows, makes) in enumerate(sizes):
        fields["early"] = i % 2 > 0
        monkeypatch.setattr(half_mma, "MAKES_ROWS", makes)
        prepared = room(rows, n_in, dtype=dtype)
        prepared.made.fill_(NAN)
        out = torch.zeros(rows, sum(segments), device=DEVICE)
        launch_half("given", x[:rows].contiguous(), product, out, prepared=prepared, dtype=dtype, pdl=HOPPER)
        assert torch.equal(out, single[:rows])


@pytest.mark.parametrize("value", [NAN, -INF])
def test_an_input_that_is_not_finite_spoils_its_row_alone_and_only_if_kept(value):
    x, product = case(24, [48, 32], 0.5, 2)
    want = torch.zeros(2, 80, device=DEVICE)
    launch_half("given", x, product, want, dtype=HALF)
    x[1, 7] = value
    for threshold in (0.67, INF):
        product.threshold[0, 7] = threshold
        for prepared in (None, room(2, 24, dtype=HALF)):
            out = torch.zeros(2, 80, device=DEVICE)
            launch_half("given", x, product, out, dtype=HALF, prepared=prepared)
            assert not out[1, 48:].isfinite().any()
            assert (not out[1, :48].isfinite().any()) == (threshold < INF or value != value)
            assert torch.equal(out[0], want[0]) or threshold == INF


@pytest.mark.parametrize("prologue", ["norm", "silu"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5] if DEVICE == "cuda" else [0.5])
def test_rows_with_a_prologue_equal_single_ones(prologue, sparsity):
    """What two rows make in every program, and more in a launch before."""
    n_in, segments = (4096, [14336, 14336]) if prologue == "norm" else (14336, [4096])
    if DEVICE == "cpu":
        n_in, segments = 64, [64, 32]
    _, product = case(n_in, segments, sparsity, 1)
    n_rows, n_out = (3 if DEVICE == "cpu" else 8), sum(segments)
    h = torch.randn(n_rows, n_in if prologue == "norm" else 2 * n_in, device=DEVICE)
    norm = None
    if prologue == "norm":
        norm = Norm(torch.ones(n_in, device=DEVICE, dtype=HALF), 1e-5, torch.ones(1, device=DEVICE))
    options = {"norm": norm, "dtype": HALF, "pdl": HOPPER}
    single = torch.zeros(n_rows, n_out + RSTD_BUFFER, device=DEVICE)
    for row in range(n_rows):
        launch_half(prologue, h[row : row + 1].contiguous(), product, single[row : row + 1], **options)
    for rows in (2, n_rows):
        few = torch.zeros(rows, n_out + RSTD_BUFFER, device=DEVICE)
        prepared = room(rows, n_in, len(segments), HALF)
        launch_half(prologue, h[:rows].contiguous(), product, few, prepared=prepared, **options)
        assert torch.equal(few[:, :n_out], single[:rows, :n_out])

    if prologue == "norm":
        x = (h * torch.rsqrt(h.square().mean(1, keepdim=True) + 1e-5)).to(HALF)
    else:
        gate, up = h.to(HALF).float().chunk(2, dim=1)
        x = (torch.nn.functional.silu(gate).to(HALF).float() * up).to(HALF)
    exact = expected(x, product)
    assert (single[:, :n_out] - exact).norm() <= 3e-3 * exact.norm()
