"""int8 products on a GPU: the exact sums of integers, to the bit, of every shape and number of rows."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from kernels import grids
from kernels.few_rows import Prepared
from kernels.int8_mma import launch_int8
from kernels.triton_gemv import RSTD_BUFFER, Norm, Product

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HOPPER = DEVICE == "cuda" and torch.cuda.get_device_capability() >= (9, 0)
INF, NAN = float("inf"), float("nan")


def expected(x: Tensor, product: Product, blocks: int) -> Tensor:
    """The sums, [rows, out], of x [rows, in] float32, 0 where cut: integers of 16 bits on a scale of 32 `blocks`."""
    group = 32 * blocks
    x = torch.nn.functional.pad(x, (0, -x.shape[1] % group)).view(len(x), -1, group)
    exponent = ((x.abs().amax(2) * 1.004).view(torch.int32) >> 23).clamp_min(15)
    up, down = (((n - exponent) * (1 if n == 268 else -1) << 23).view(torch.float32) for n in (268, 14))
    weight = torch.nn.functional.pad(product.weight, (0, 0, 0, x.shape[1] * group - len(product.weight)))
    weight = weight.view(x.shape[1], group, -1).double()
    out = torch.zeros(len(x), weight.shape[2], device=x.device)
    for g, part in enumerate(weight):
        y = ((x[:, g] * up[:, g, None]).round().double() @ part).float() * down[:, g, None]
        if product.offset is None:
            y = y * product.weight_scale
        else:  # a fused multiply-add
            y = (y.double() * product.weight_scale + (product.offset.double() if g == 0 else 0)).float()
        out += torch.floor(y * product.multiplier * product.fineness + 0.5) / product.fineness
    return out


def case(n_in: int, segments: list[int], sparsity: float, rows: int, offset: bool = False):
    """x [rows, in], of very different sizes, and a product that cuts half of it or nothing."""
    generator, n_out = torch.Generator().manual_seed(n_in), sum(segments)
    weight = torch.randint(-127, 128, (n_in, n_out), generator=generator, dtype=torch.int8)
    x = torch.randn(rows, n_in, generator=generator) * torch.randn(n_in, generator=generator).exp()
    scale = 1e-3 + 1e-3 * torch.rand(n_out, generator=generator)
    threshold = torch.full((len(segments), n_in), 0.67 if sparsity else 0.0)
    tensors = weight, threshold, scale, torch.randn(n_out, generator=generator) if offset else None
    weight, threshold, scale, offset = (t if t is None else t.to(DEVICE) for t in tensors)
    fineness = grids.fineness(torch.full((n_out,), 300.0, device=DEVICE))
    return x.bfloat16().to(DEVICE), Product(weight, threshold, segments, sparsity, scale, offset, fineness)


def room(rows: int, n_in: int, segments: int = 3, dtype=torch.bfloat16) -> Prepared:
    n = -(-rows // 2) * 2 * segments * -(-n_in // 128) * 128
    made = torch.zeros(n, device=DEVICE, dtype=dtype)
    kept, down = (torch.zeros(n // 32, device=DEVICE, dtype=dtype) for dtype in (torch.int32, torch.float32))
    return Prepared(made, kept, down)


def cut(x: Tensor, product: Product) -> Tensor:
    x = x.float()
    return torch.where(x.abs() <= product.threshold[0], 0.0, x) if product.sparsity else x


SHAPES = [(64, [128], 2), (96, [48, 16], 1), (160, [128], 4), (100, [36], 2)]  # each way that a tile lies in its lanes
CASES = [(*shape, 0.5 * (i % 2)) for i, shape in enumerate(SHAPES)]
if DEVICE == "cuda":
    SHAPES += [(576, [576, 192, 192], 1), (4096, [4096], 2), (4096, [4096, 1024, 1024], 4), (14336, [4096], 4)]
    CASES = [(*shape, sparsity) for shape in SHAPES for sparsity in (0.0, 0.5)]


@pytest.mark.parametrize(("n_in", "segments", "blocks", "sparsity"), CASES)
def test_sums_are_exact_for_every_number_of_rows(n_in, segments, blocks, sparsity, monkeypatch):
    """In the interpreter by the assembly in numpy, see `lanes`."""
    choose = Product.plan
    monkeypatch.setattr(Product, "plan", lambda *given: choose(*given)._replace(blocks=blocks))
    sizes = (3, 8) if DEVICE == "cuda" else (2,)
    x, product = case(n_in, segments, sparsity, max(sizes), offset=n_in % 32 == 0 and len(segments) == 1)
    want = expected(cut(x, product), product, blocks)
    for rows in sizes:
        out = torch.zeros(rows, sum(segments), device=DEVICE)
        options = {"dtype": x.dtype, "pdl": HOPPER, "prepared": room(rows, n_in)}
        launch_int8("given", x[:rows].contiguous(), product, out, **options)
        assert torch.equal(out, want[:rows])
    for row in range(len(x)):
        out = torch.zeros(1, sum(segments), device=DEVICE)
        launch_int8("given", x[row : row + 1].contiguous(), product, out, dtype=x.dtype, pdl=HOPPER)
        assert torch.equal(out[0], want[row])
    out = torch.zeros(len(x), sum(segments), device=DEVICE)  # as the unfused op has them
    launch_int8("given", x, product, out, dtype=x.dtype)
    assert torch.equal(out, want)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_an_input_that_is_not_finite_spoils_its_row_alone_and_only_if_kept(value):
    x, product = case(40, [48, 16, 16], 0.5, 2)
    want = expected(cut(x, product), product, 1)
    x[1, 7] = value
    for threshold in (0.67, INF):
        product.threshold[0, 7] = threshold
        results = [torch.zeros(2, 80, device=DEVICE) for _ in range(2)]
        launch_int8("given", x, product, results[0], dtype=x.dtype)
        launch_int8("given", x, product, results[1], dtype=x.dtype, prepared=room(2, 40))
        for out in results:
            assert out[1, 48:].isnan().all()
            assert out[1, :48].isnan().all() == (threshold < INF or value != value)
            assert torch.equal(out[0], want[0]) or threshold == INF


@pytest.mark.gpu
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.65])
@pytest.mark.parametrize("prologue", ["norm", "silu"])
def test_rows_of_large_models_equal_single_ones(prologue, sparsity):
    """Prefetched and launched dependently, from what a step has, and near the product in float64."""
    n_in, segments = (4096, [14336, 14336]) if prologue == "norm" else (14336, [4096])
    _, product = case(n_in, segments, sparsity, 1)
    h = torch.randn(8, n_in if prologue == "norm" else 2 * n_in, device=DEVICE)
    width = sum(segments) + RSTD_BUFFER
    norm = None
    if prologue == "norm":
        norm = Norm(torch.ones(n_in, device=DEVICE, dtype=torch.bfloat16), 1e-5, torch.ones(1, device=DEVICE))
    options = {"norm": norm, "dtype": torch.bfloat16, "pdl": HOPPER}
    few = torch.zeros(8, width, device=DEVICE)
    launch_int8(prologue, h, product, few, prepared=room(8, n_in, len(segments)), **options)
    for row in range(8):
        out = torch.zeros(1, width, device=DEVICE)
        launch_int8(prologue, h[row : row + 1].contiguous(), product, out, **options)
        assert torch.equal(out[0, : sum(segments)], few[row, : sum(segments)])

    if prologue == "norm":
        x = (h * torch.rsqrt(h.square().mean(1, keepdim=True) + 1e-5)).bfloat16()
    else:
        gate, up = h.bfloat16().float().chunk(2, dim=1)
        x = torch.nn.functional.silu(gate).bfloat16().float() * up
    exact = cut(x.bfloat16(), product).double() @ product.weight.double() * product.weight_scale
    assert (few[:, : sum(segments)] - exact).norm() <= 3e-3 * exact.norm()
