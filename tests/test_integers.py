"""int8 and int4 products on a GPU: the exact sums of integers, to the bit, of every shape and number of rows."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from kernels import grids
from kernels.few_rows import Prepared
from kernels.integer_mma import launch_integers
from kernels.quantized import dequantize
from kernels.triton_gemv import RSTD_BUFFER, Norm, Product

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HOPPER = DEVICE == "cuda" and torch.cuda.get_device_capability() >= (9, 0)
INF, NAN = float("inf"), float("nan")


def padded(t: Tensor, group: int) -> Tensor:
    """[groups, group, ...] of the inputs, with zeros behind the last."""
    return torch.cat([t, t.new_zeros(-len(t) % group, *t.shape[1:])]).unflatten(0, (-1, group))


def expected(x: Tensor, product: Product, blocks: int) -> Tensor:
    """The sums, [rows, out], of x [rows, in] float32, 0 where cut: integers of 16 bits on a scale of 32 `blocks`."""
    rows, n_out, groupsize = len(x), sum(product.segments), product.form.groupsize
    weight, scale = product.weight, product.weight_scale
    if groupsize:
        weight = torch.stack((weight & 15, weight >> 4), dim=2).flatten(1)
        scale = padded(scale.float(), 32 * blocks)
    out = torch.zeros(rows, n_out, device=x.device)
    for g, (part, codes) in enumerate(zip(padded(x.T, 32 * blocks), padded(weight, 32 * blocks), strict=True)):
        part = part.T[:, None]  # [rows, groups of outputs, inputs]
        made = part * scale[g, :, :, 0].T if groupsize else part
        exponent = ((made.abs().amax(2) * 1.004).view(torch.int32) >> 23).clamp_min(15)
        up, down = (((n - exponent) * (1 if n == 268 else -1) << 23).view(torch.float32) for n in (268, 14))
        codes = codes.double().view(32 * blocks, made.shape[1], -1)
        sums = torch.einsum("rgi,igo->rgo", (made * up[:, :, None]).round().double(), codes).float()
        offset = 0 if product.offset is None else product.offset.double() * (g == 0)
        if groupsize:  # beside a sum over the lanes, in one order
            low = torch.zeros(rows, made.shape[1], 32, device=x.device)
            for block, m in zip(part.split(32, dim=2), scale[g, :, :, 1].T.split(32, dim=1), strict=True):
                low = (low.double() + block.double() * m.double()).float()
            for i in (16, 8, 4, 2, 1):
                low = low + low[..., torch.arange(32) ^ i]
            y = (sums.double() * down[..., None] + low[..., :1]).float().reshape(rows, n_out) + offset
        elif product.offset is None:
            y = (sums * down[..., None]).view(rows, n_out) * scale
        else:  # a fused multiply-add
            y = ((sums * down[..., None]).view(rows, n_out).double() * scale + offset).float()
        out += torch.floor(y.float() * product.multiplier * product.fineness + 0.5) / product.fineness
    return out


def case(n_in: int, segments: list[int], sparsity: float, rows: int, offset: bool = False, groupsize: int = 0):
    """x [rows, in], of very different sizes, and a product that cuts half of it or nothing; groupsize 0 is int8."""
    generator, n_out = torch.Generator().manual_seed(n_in), sum(segments)
    if groupsize:
        weight = torch.randint(0, 256, (n_in, n_out // 2), generator=generator, dtype=torch.uint8)
        scale = torch.rand(n_in, n_out // groupsize, 2, generator=generator) * 0.01 - torch.tensor([0.0, 0.08])
        scale = scale.bfloat16()
    else:
        weight = torch.randint(-127, 128, (n_in, n_out), generator=generator, dtype=torch.int8)
        scale = 1e-3 + 1e-3 * torch.rand(n_out, generator=generator)
    x = torch.randn(rows, n_in, generator=generator) * torch.randn(n_in, generator=generator).exp()
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


# each way that a tile lies in its lanes: inputs, segments, blocks, groupsize, outputs of a tile
SHAPES = [(64, [128], 2, 0, 128), (96, [48, 16], 1, 0, 128), (160, [128], 4, 0, 128), (100, [36], 2, 0, 128)]
SHAPES += [(64, [256], 2, 64, 256), (128, [128], 4, 64, 128), (40, [48, 96], 1, 48, 96), (33, [128, 64], 2, 64, 128)]
if DEVICE == "cuda":
    SHAPES += [(576, [576, 192, 192], 1, 0, 128), (4096, [4096], 2, 0, 128), (4096, [4096, 1024, 1024], 4, 0, 128)]
    SHAPES += [(14336, [4096], 4, 0, 128), (4096, [4096], 2, 64, 256), (4096, [14336, 14336], 4, 64, 128)]
CASES = [(*shape, 0.5 * (i % 2)) for i, shape in enumerate(SHAPES)]


@pytest.mark.parametrize(("n_in", "segments", "blocks", "groupsize", "tile", "sparsity"), CASES)
def test_sums_are_exact_for_every_number_of_rows(n_in, segments, blocks, groupsize, tile, sparsity, monkeypatch):
    """In the interpreter by the assembly in numpy, see `lanes`."""
    choose = Product.plan
    fields = {"blocks": blocks, "block_out": tile}
    monkeypatch.setattr(Product, "plan", lambda *given: choose(*given)._replace(**fields))
    sizes = (3, 8, 8) if DEVICE == "cuda" else (2, 2)
    offset = n_in % 32 == 0 and len(segments) == 1
    x, product = case(n_in, segments, sparsity, max(sizes), offset, groupsize)
    want = expected(cut(x, product), product, blocks)
    for i, rows in enumerate(sizes):
        fields["early"] = i % 2 > 0  # loads what is cut, too: the same sums
        out = torch.zeros(rows, sum(segments), device=DEVICE)
        options = {"dtype": x.dtype, "pdl": HOPPER, "prepared": room(rows, n_in)}
        launch_integers("given", x[:rows].contiguous(), product, out, **options)
        assert torch.equal(out, want[:rows])
    for row in range(len(x)):
        fields["early"] = row % 2 > 0
        out = torch.zeros(1, sum(segments), device=DEVICE)
        launch_integers("given", x[row : row + 1].contiguous(), product, out, dtype=x.dtype, pdl=HOPPER)
        assert torch.equal(out[0], want[row])
    out = torch.zeros(len(x), sum(segments), device=DEVICE)  # as the unfused op has them
    launch_integers("given", x, product, out, dtype=x.dtype)
    assert torch.equal(out, want)


@pytest.mark.parametrize(("value", "groupsize"), [(NAN, 0), (INF, 0), (-INF, 0), (INF, 64)])
def test_an_input_that_is_not_finite_spoils_its_row_alone_and_only_if_kept(value, groupsize):
    segments = [64, 64] if groupsize else [48, 16, 16]
    x, product = case(40, segments, 0.5, 2, groupsize=groupsize)
    want = expected(cut(x, product), product, 1)
    x[1, 7] = value
    for threshold in (0.67, INF):
        product.threshold[0, 7] = threshold
        results = [torch.zeros(2, sum(segments), device=DEVICE) for _ in range(2)]
        launch_integers("given", x, product, results[0], dtype=x.dtype)
        launch_integers("given", x, product, results[1], dtype=x.dtype, prepared=room(2, 40))
        for out in results:
            assert out[1, segments[0] :].isnan().all()
            assert out[1, : segments[0]].isnan().all() == (threshold < INF or value != value)
            assert torch.equal(out[0], want[0]) or threshold == INF


@pytest.mark.gpu
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.65])
@pytest.mark.parametrize("prologue", ["norm", "silu"])
@pytest.mark.parametrize("groupsize", [0, 64])
def test_rows_of_large_models_equal_single_ones(groupsize, prologue, sparsity):
    """Prefetched and launched dependently, from what a step has, and near the product in float64."""
    n_in, segments = (4096, [14336, 14336]) if prologue == "norm" else (14336, [4096])
    _, product = case(n_in, segments, sparsity, 1, groupsize=groupsize)
    h = torch.randn(8, n_in if prologue == "norm" else 2 * n_in, device=DEVICE)
    width = sum(segments) + RSTD_BUFFER
    norm = None
    if prologue == "norm":
        norm = Norm(torch.ones(n_in, device=DEVICE, dtype=torch.bfloat16), 1e-5, torch.ones(1, device=DEVICE))
    options = {"norm": norm, "dtype": torch.bfloat16, "pdl": HOPPER}
    few = torch.zeros(8, width, device=DEVICE)
    launch_integers(prologue, h, product, few, prepared=room(8, n_in, len(segments)), **options)
    for row in range(8):
        out = torch.zeros(1, width, device=DEVICE)
        launch_integers(prologue, h[row : row + 1].contiguous(), product, out, **options)
        assert torch.equal(out[0, : sum(segments)], few[row, : sum(segments)])

    if prologue == "norm":
        x = (h * torch.rsqrt(h.square().mean(1, keepdim=True) + 1e-5)).bfloat16()
    else:
        gate, up = h.bfloat16().float().chunk(2, dim=1)
        x = torch.nn.functional.silu(gate).bfloat16().float() * up
    weight = dequantize(product.weight, product.weight_scale, torch.float32).double()
    exact = cut(x.bfloat16(), product).double() @ weight
    assert (few[:, : sum(segments)] - exact).norm() <= 3e-3 * exact.norm()
