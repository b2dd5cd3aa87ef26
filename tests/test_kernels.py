"""The sparse product in its three implementations: the Triton kernel (interpreted, or on a GPU) and the CPU's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels import plan
from kernels.plan import Plan, plan_for
from kernels.quantized import Form, dequantize, form_of, pack_int4, transposed
from kernels.sparse_gemv import keep_mask, sparse_gemv, sparse_gemv_ref

pytest.importorskip("triton")

from kernels.products import launch_sparse_gemv
from kernels.triton_gemv import Product, launch_gemv
from model import ModelArgs

INF, NAN = float("inf"), float("nan")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SMALL = [(172, [50, 30, 20]), (33, [129, 1]), (64, [40]), (1, [1])]
LARGE = [(172, [64]), (576, [576, 192, 192]), (64, [1536, 1536]), (1536, [130]), (11008, [72])]
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel runs on the GPU here")
KERNELS = [pytest.param("interpreter", marks=interpreted), pytest.param("cuda", marks=pytest.mark.gpu)]


def product(implementation: str, x: Tensor, weight: Tensor, threshold: Tensor, segments: list[int], scale=None):
    """Runs one of the implementations; the result is on the CPU."""
    if implementation == "interpreter":
        return launch_sparse_gemv(x, weight, threshold, segments, scale)
    device = implementation
    scale = None if scale is None else scale.to(device)
    return sparse_gemv(x.to(device), weight.to(device), threshold.to(device), segments, scale).cpu()


def reference(x: Tensor, weight: Tensor, threshold: Tensor, segments: list[int]) -> Tensor:
    """In float64, segment by segment and row by row, from the kept inputs alone."""
    out, start = torch.zeros(x.shape[0], weight.shape[1], dtype=torch.float64), 0
    for t, width in zip(threshold, segments, strict=True):
        for b, row in enumerate(x.double()):
            pairs = zip(row.tolist(), t.tolist(), strict=True)
            kept = [i for i, (value, limit) in enumerate(pairs) if not abs(value) <= limit]
            out[b, start : start + width] = row[kept] @ weight[kept, start : start + width].double()
        start += width
    return out


def case(n_in: int, segments: list[int], dtype=torch.float32, batch: int = 1, sparsity: float = 0.5, seed: int = 0):
    """x, weight and a threshold for every input and segment: around the quantile of |x| for this sparsity."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, n_in, generator=generator).to(dtype)
    weight = torch.randn(n_in, sum(segments), generator=generator).to(dtype)
    middle = x.float().abs().flatten().quantile(sparsity)
    threshold = middle * (0.9 + 0.2 * torch.rand(len(segments), n_in, generator=generator))
    if sparsity == 0:
        threshold.zero_()
    if sparsity == 1:
        threshold.fill_(100.0)
    return x, weight, threshold, segments


def assert_as_precise_as_torch(result: Tensor, arguments: tuple):
    x, weight, threshold, segments = arguments
    exact = reference(*arguments)
    masked = zip(threshold, weight.split(segments, dim=1), strict=True)
    own = torch.cat([torch.where(x.float().abs() > t, x, 0) @ w for t, w in masked], dim=1)
    allowed = 2 * (own.double() - exact).abs().max() + 1e-6 * exact.abs().max()
    assert result.dtype == x.dtype and result.shape == exact.shape
    assert (result.double() - exact).abs().max() <= allowed


def test_products_and_sums_fuse_whatever_triton_thinks_of_it():
    asked = "getattr(triton.knobs.language, 'fp_fusion_enabled', lambda _: True)(None)"  # before 3.9 it always does
    code = f"import kernels, triton, warnings; warnings.simplefilter('error'); print({asked})"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    root = Path(plan.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


@pytest.mark.parametrize("implementation", [*KERNELS, "cpu"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n_in", "segments"), SMALL)
@pytest.mark.parametrize("sparsity", [0, 0.5, 0.98, 1])
def test_every_dtype_and_sparsity(implementation, dtype, n_in, segments, sparsity):
    for batch in (1, 3):
        arguments = case(n_in, segments, dtype, batch, sparsity)
        result = product(implementation, *arguments)
        assert_as_precise_as_torch(result, arguments)
        if sparsity == 1:
            assert not result.any()


@pytest.mark.parametrize("implementation", [*KERNELS, "cpu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("n_in", "segments"), LARGE)
def test_shapes_that_no_tile_divides(implementation, dtype, n_in, segments):
    arguments = case(n_in, segments, dtype)
    assert_as_precise_as_torch(product(implementation, *arguments), arguments)


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=interpreted), pytest.param("cuda", marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("sparsity", [0.5, 1])
@pytest.mark.parametrize("shift", [0.0, 0.25])
def test_every_input_is_in_one_program(shift, sparsity, device):
    x, weight, threshold, segments = case(600, [130, 64], sparsity=sparsity)
    offset, cuts = None, threshold
    if shift:
        offset = torch.ones(194, device=device)
        cuts = torch.stack((threshold, torch.full_like(threshold, shift)), dim=2)
    out = torch.zeros(1, 194, device=device)
    product = Product(weight.to(device), cuts.to(device), segments, offset=offset)
    launch_gemv("given", x.to(device), product, out)
    out = out.cpu() - 1 if shift else out.cpu()
    assert_as_precise_as_torch(out, (x - shift, weight, threshold, segments))


# Blocks x outputs / rows at once @ registers, then programs that prefetch x their blocks; ?: rows guessed; !: early.
PLANS = """
model        form site    | dense                | 50 %                 | 65 %
llama-3-8b   none qkv     | 2x64 0x0             | 2x128/32@96 528x2?   | 3x128/48@128 528x3?
llama-3-8b   none o       | 2x64 528x1           | 2x128/48@128 1320x2? | 2x128/48@128 1320x2?
llama-3-8b   none gate_up | 2x64 0x0             | 2x128 528x2?         | 3x128/48@128 528x3?
llama-3-8b   none down    | 2x64 0x0             | 2x128 1056x2?        | 2x128 1056x2?
llama-3-8b   int8 qkv      | 2x128 0x0            | 4x128 1056x4?        | 4x128 1056x4?
llama-3-8b   int8 o        | 2x128 0x0            | 2x128 1056x2?        | 2x128 1056x2?
llama-3-8b   int8 gate_up  | 2x128 0x0            | 2x128 1056x2?        | 4x128 1056x4?
llama-3-8b   int8 down     | 2x128 0x0            | 4x128 1056x4?        | 4x128 1056x4?
llama-3-8b   int4 qkv     | 2x256 0x0            | 2x256 0x0            | 2x256 0x0
llama-3-8b   int4 o       | 2x256 0x0            | 2x256 1056x2?        | 2x256 1056x2?
llama-3-8b   int4 gate_up | 4x256 0x0            | 2x256 0x0            | 2x256 0x0
llama-3-8b   int4 down    | 4x256 0x0            | 2x256 0x0            | 2x256 0x0
llama-2-7b   none qkv     | 2x64 0x0             | 2x128 528x2?         | 3x128/48@128 528x3?
llama-2-7b   none o       | 2x64 528x1           | 2x128/48@128 1320x2? | 2x128/48@128 1320x2?
llama-2-7b   none gate_up | 2x64 0x0             | 2x128 528x2?         | 3x128/48@128 528x3?
llama-2-7b   none down    | 2x64 0x0             | 2x128 1056x2?        | 2x128 1056x2?
llama-2-7b   int8 qkv      | 2x128 0x0            | 2x128 1056x2?        | 4x128 1056x4?
llama-2-7b   int8 o        | 2x128 0x0            | 2x128 1056x2?        | 2x128 1056x2?
llama-2-7b   int8 gate_up  | 2x128 0x0            | 2x128 1056x2?        | 4x128 1056x4?
llama-2-7b   int8 down     | 2x128 0x0            | 4x128 1056x4?        | 4x128 1056x4?
llama-2-7b   int4 qkv     | 4x256 0x0            | 2x256 0x0            | 2x256 0x0
llama-2-7b   int4 o       | 2x256 0x0            | 2x256 1056x2?        | 2x256 1056x2?
llama-2-7b   int4 gate_up | 4x256 0x0            | 2x256 0x0            | 2x256 0x0
llama-2-7b   int4 down    | 4x256 0x0            | 2x256 0x0            | 2x256 0x0
llama-3.2-1b none qkv     | 2x64 0x0             | 2x128/32@96 528x2?   | 3x128/48@128 528x3?
llama-3.2-1b none o       | 2x64 528x1           | 2x128/48@128 1320x2? | 2x128/48@128 1320x2?
llama-3.2-1b none gate_up | 2x64 0x0             | 2x128 528x2?         | 3x128/48@128 528x3?
llama-3.2-1b none down    | 2x64 0x0             | 2x128 1056x2?        | 2x128 1056x2?
llama-3.2-1b int8 qkv      | 1x128 0x0            | 1x128 1056x1?        | 1x128 1056x1?
llama-3.2-1b int8 o        | 1x128 0x0            | 1x128 1056x1?        | 1x128 1056x1?
llama-3.2-1b int8 gate_up  | 2x128 0x0            | 2x128 1056x2?        | 4x128 1056x4?
llama-3.2-1b int8 down     | 2x128 0x0            | 2x128 1056x2?        | 2x128 1056x2?
llama-3.2-1b int4 qkv     | 2x128 0x0            | 2x128 0x0!           | 2x128 0x0!
llama-3.2-1b int4 o       | 1x128 0x0            | 1x128 0x0!           | 1x128 0x0!
llama-3.2-1b int4 gate_up | 2x256 0x0            | 2x256 0x0            | 2x256 0x0
llama-3.2-1b int4 down    | 2x256 0x0            | 2x256 0x0            | 2x256 0x0
smollm2-135m none qkv     | 1x128 0x0            | 1x128 0x0!           | 1x128 0x0!
smollm2-135m none o       | 1x128 0x0            | 1x128 0x0!           | 1x128 0x0!
smollm2-135m none gate_up | 1x128 0x0            | 1x128 0x0!           | 1x128 0x0!
smollm2-135m none down    | 1x128 0x0            | 1x128 0x0!           | 1x128 0x0!
"""
FORMS = {"none": Form("none", torch.bfloat16), "int8": Form("int8", torch.int8), "int4": Form("int4", torch.uint8, 64)}


def described(p: Plan) -> str:
    tile = f"{p.blocks}x{p.block_out}" + f"/{p.rows}" * (p.rows > 0) + f"@{p.registers}" * (p.registers is not None)
    return f"{tile} {p.prefetch}x{p.prefetch_blocks}" + "?" * p.guess + "!" * p.early


def sites(name: str) -> dict[str, tuple]:
    """Prologue, inputs and segments of a named config's products."""
    c = ModelArgs.from_name(name)
    q, kv = c.n_head * c.head_dim, c.n_local_heads * c.head_dim
    return {
        "qkv": ("norm", c.dim, [q, kv, kv]),
        "o": ("given", q, [c.dim]),
        "gate_up": ("norm", c.dim, [c.intermediate_size] * 2),
        "down": ("silu", c.intermediate_size, [c.dim]),
    }


@pytest.mark.parametrize("line", PLANS.strip().splitlines()[1:])
def test_the_plans_that_were_measured(line):
    (name, form, site), *expected = line.split("|")[0].split(), *map(str.strip, line.split("|")[1:])
    plans = [plan_for(*sites(name)[site], sparsity, FORMS[form], dependent=True) for sparsity in (0.0, 0.5, 0.65)]
    assert [described(p) for p in plans] == expected


def test_nothing_is_prefetched_without_dependent_launch_or_what_a_guess_needs():
    product, tile = ("norm", 4096, [14336, 14336], 0.5, FORMS["none"]), Plan(2, 128, 0)
    assert plan_for(*product, dependent=False) == plan_for(*product, True, last_rstd=False) == tile
    assert plan_for("given", 4096, [4096], 0.0, FORMS["none"], True, last_rstd=False).prefetch == 528
    assert plan_for("given", 4096, [4096], 0.5, FORMS["none"], True, last_rstd=False).guess
    assert plan_for("silu", 4096, [136], 0.5, FORMS["none"], True).prefetch == 0  # no tile divides it


def test_int8_takes_larger_programs_where_more_is_cut():
    blocks = [plan_for("silu", 14336, [4096], sparsity, FORMS["int8"], True).blocks for sparsity in (0.0, 0.25, 0.4)]
    assert blocks == [2, 2, 4]


def test_a_cut_product_that_is_small_reads_all_rows_where_it_need_not_wait():
    def early(n_in: int, sparsity: float, form: Form, dependent: bool = True) -> bool:
        return plan_for("given", n_in, [1024], sparsity, form, dependent).early

    assert early(2047, 0.5, FORMS["none"]) and not early(2048, 0.5, FORMS["none"])
    assert early(4095, 0.5, FORMS["int8"]) and early(8191, 0.5, FORMS["int4"]) and not early(8192, 0.5, FORMS["int4"])
    assert not early(64, 0.0, FORMS["none"]) and not early(64, 0.5, FORMS["none"], dependent=False)
    assert not early(64, 0.5, Form("none", torch.float32))  # another kernel's, as are these widths
    assert not plan_for("given", 64, [1024, 36], 0.5, FORMS["none"], True).early


def test_what_attention_prefetches():
    def pieces(n_in: int, n_out: int, sparsity: float, form: str) -> int:
        return plan.attention_prefetch(n_in, n_out, sparsity, FORMS[form])

    assert pieces(4096, 28672, 0.25, "none") == 6 * 2 * 14  # 768 rows by 128, gate and up, 28,672 bytes by 2,048
    assert pieces(4096, 28672, 0.0, "none") == 2 * 2 * 14
    assert pieces(4096, 28672, 0.25, "int8") == 0
    assert pieces(2048, 22016, 0.25, "none") == 0  # qwen2.5-3b's


@pytest.mark.parametrize("out_first", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_a_form_says_what_its_tensors_are(name, out_first):
    """The form of new tensors is the form that they were made by, and its bytes are theirs."""
    form = FORMS[name]
    assert Form.named(name, torch.bfloat16, 64) == form
    weight, scale = form.empty(40, {"gate": 128, "up": 64}, out_first=out_first)
    assert weight.is_contiguous() and weight.shape[not out_first] == 192 * form.bits // (8 * weight.element_size())
    if out_first:
        weight, scale = transposed(weight, scale)
    assert form_of(weight, scale) == form and dequantize(weight.zero_(), scale, torch.float32).shape == (40, 192)
    own = scale[0].nbytes if name == "int4" else 0
    assert form.row_bytes(192) == weight[0].nbytes + own


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparsity", [0, 0.5, 0.98, 1])
@pytest.mark.parametrize(("n_in", "segments"), [(4096, [4096, 1024, 1024]), (11008, [4096]), (4096, [14336, 14336])])
def test_shapes_of_large_models(dtype, sparsity, n_in, segments):
    arguments = case(n_in, segments, dtype, 2, sparsity)
    assert_as_precise_as_torch(product("cuda", *arguments), arguments)


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparsity", [0, 0.5, 1])
@pytest.mark.parametrize(
    ("bits", "n_in", "segments", "groupsize"),
    [(8, 40, [64, 20, 20], 0), (8, 33, [516], 0), (4, 40, [64, 32, 16], 16), (4, 33, [576, 192], 64)],
)
def test_integer_weights(implementation, dtype, bits, n_in, segments, groupsize, sparsity):
    generator, n_out = torch.Generator().manual_seed(0), sum(segments)
    x, _, threshold, _ = case(n_in, segments, dtype, 2, sparsity)
    if bits == 8:
        weight = torch.randint(-128, 128, (n_in, n_out), generator=generator, dtype=torch.int8)
        scale = 1e-2 * torch.rand(n_out, generator=generator)
    else:
        weight = pack_int4(torch.randint(16, (n_in, n_out), generator=generator, dtype=torch.uint8))
        scale = torch.randn(n_in, n_out // groupsize, 2, generator=generator).bfloat16()
    exact = reference(x, dequantize(weight, scale, torch.float64), threshold, segments)
    result = product(implementation, x, weight, threshold, segments, scale)
    assert result.dtype == x.dtype
    # of float32 x has 16 bits
    allowed = max(1e-4, 2 * torch.finfo(dtype).eps)
    assert (result.double() - exact).abs().max() <= allowed * exact.abs().max().clamp(min=1e-9)


@pytest.mark.parametrize("implementation", [*KERNELS, "cpu"])
def test_every_row_cuts_its_own_inputs(implementation):
    x = torch.tensor([[5.0, 1.0, 5.0], [1.0, 5.0, 1.0], [1.0, 1.0, 1.0]])
    weight = torch.tensor([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]])
    result = product(implementation, x, weight, torch.full((1, 3), 2.0), [2])
    assert result.tolist() == [[25.0, 250.0], [10.0, 100.0], [0.0, 0.0]]


@pytest.mark.parametrize("implementation", [*KERNELS, "cpu"])
def test_every_segment_has_its_own_thresholds(implementation):
    threshold = torch.tensor([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, INF]])
    weight = torch.tensor([[1.0] * 7, [10.0] * 7, [100.0] * 7])
    result = product(implementation, torch.ones(1, 3), weight, threshold, [3, 1, 3])
    assert result.tolist() == [[110.0] * 3 + [101.0] + [11.0] * 3]


@pytest.mark.parametrize("implementation", [*KERNELS, "cpu"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_input_equal_to_its_threshold_is_cut(implementation, dtype):
    x = torch.tensor([[0.3, -0.3, 0.3, -0.3]]).to(dtype)
    t = x[0, 0].float()  # 0.3 as the dtype has it
    below = torch.nextafter(t, torch.tensor(0.0))
    threshold = torch.stack([t, t, below, below])[None]
    result = product(implementation, x, torch.eye(4, dtype=dtype), threshold, [4])
    assert torch.equal(result, torch.where(torch.arange(4) < 2, 0, x))


@pytest.mark.parametrize("implementation", [*KERNELS, "cpu"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_threshold_zero_keeps_all_but_exact_zeros(implementation, dtype):
    smallest = torch.finfo(dtype).smallest_normal
    x = torch.tensor([smallest, 0.0, -smallest, -0.0], dtype=dtype)
    assert keep_mask(x, torch.zeros(4)).tolist() == [True, False, True, False]
    x = torch.tensor([[1e-4, 0.0, -1e-4, -0.0]]).to(dtype)
    weight = torch.tensor([[1.0, 0, 0, 0], [0, NAN, INF, 0], [0, 0, 0, 1], [0, NAN, 0, 0]]).to(dtype)
    if implementation == "cpu":  # a masked dense product: what it cuts must be finite
        weight = weight.nan_to_num(nan=7.0, posinf=7.0)
    result = product(implementation, x, weight, torch.zeros(1, 4), [4])
    assert torch.equal(result, torch.stack([x[0, 0], x[0, 1], x[0, 1], x[0, 2]])[None])


@pytest.mark.parametrize("implementation", [*KERNELS, "cpu"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_that_are_not_finite(implementation, dtype):
    weight = torch.full((40, 5), 0.5, dtype=dtype)
    threshold = torch.full((1, 40), 2.0)
    x = torch.zeros(3, 40, dtype=dtype)
    x[0, 33], x[1, 7], x[2, 0] = NAN, INF, -INF
    result = product(implementation, x, weight, threshold, [5])
    assert result[0].isnan().all() and (result[1] == INF).all() and (result[2] == -INF).all()
    # a threshold of +inf cuts everything but NaN
    x[:, 3] = 100.0
    result = product(implementation, x, weight, threshold.fill_(INF), [5])
    assert result[0].isnan().all() and not result[1:].any()


@pytest.mark.parametrize("implementation", [*KERNELS, "cpu"])
def test_an_infinite_input_stays_in_its_segment(implementation):
    threshold = torch.tensor([[0.0, 0.0], [INF, 0.0], [INF, 0.0]])
    result = product(implementation, torch.tensor([[INF, 1.0]]), torch.ones(2, 7), threshold, [3, 1, 3])
    assert result.tolist() == [[INF] * 3 + [1.0] * 4]


@pytest.mark.parametrize("implementation", [*KERNELS, "cpu"])
def test_infinity_times_zero_is_nan_as_in_a_dense_layer(implementation):
    x, weight = torch.tensor([[INF, 1.0]]), torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    result = product(implementation, x, weight, torch.zeros(1, 2), [2])
    assert result[0, 0].isnan() and result[0, 1] == INF


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 3])
def test_weights_of_cut_inputs_are_not_read(implementation, dtype, batch):
    x, weight, threshold, segments = case(172, [50, 30, 20], dtype, batch, 0.7)
    clean = reference(x, weight, threshold, segments)
    start = 0
    for t, width in zip(threshold, segments, strict=True):
        cut_in_all_rows = (x.float().abs() <= t).all(0)
        assert cut_in_all_rows.any()
        weight[cut_in_all_rows, start : start + width] = NAN
        start += width
    result = product(implementation, x, weight, threshold, segments)
    assert result.isfinite().all()
    torch.testing.assert_close(result.double(), clean, atol=0.1 if dtype == torch.bfloat16 else 0.01, rtol=0.01)


@pytest.mark.parametrize("implementation", KERNELS)
def test_a_row_is_untouched_by_weights_that_another_row_reads(implementation):
    weight = torch.tensor([[1.0], [INF]])
    result = product(implementation, torch.tensor([[3.0, 1.0], [3.0, 3.0]]), weight, torch.full((1, 2), 2.0), [1])
    assert result.tolist() == [[3.0], [INF]]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_opcheck(device):
    for batch, dtype in ((1, torch.float32), (3, torch.bfloat16)):
        x, weight, threshold, segments = case(172, [50, 30, 20], dtype, batch)
        torch.library.opcheck(sparse_gemv, (x.to(device), weight.to(device), threshold.to(device), segments))


@pytest.mark.parametrize(
    ("device", "backend"), [("cpu", "aot_eager"), pytest.param("cuda", "inductor", marks=pytest.mark.gpu)]
)
def test_compiles_into_one_graph(device, backend):
    x, weight, threshold, segments = case(172, [50, 30, 20])
    x, weight, threshold = x.to(device), weight.to(device), threshold.to(device)

    def step(x, weight, threshold):
        return sparse_gemv(x, weight, threshold, segments) + 1

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, weight, threshold), step(x, weight, threshold))
        threshold *= 2  # new thresholds, same graph
        with torch.compiler.set_stance("fail_on_recompile"):
            torch.testing.assert_close(compiled(x, weight, threshold), step(x, weight, threshold))


def test_shapes_that_do_not_fit_are_refused_while_tracing():
    x, weight, threshold, segments = case(64, [40, 20])
    compiled = torch.compile(sparse_gemv, fullgraph=True, backend="eager")
    compiled(x, weight, threshold, segments)
    for wrong in ((x[:, :-1], weight, threshold), (x, weight, threshold[:1]), (x, weight, threshold[:, :-1])):
        with pytest.raises(torch._dynamo.exc.TorchRuntimeError):
            compiled(*wrong, segments)


def test_reference_takes_any_leading_shape():
    x, weight, threshold, segments = case(64, [40, 20], torch.float64, batch=6)
    expected = reference(x, weight, threshold, segments)
    torch.testing.assert_close(sparse_gemv_ref(x, weight, threshold, segments), expected)
    y = sparse_gemv_ref(x.view(2, 3, 64), weight, threshold, segments)
    torch.testing.assert_close(y, expected.view(2, 3, 60))


@pytest.mark.parametrize("implementation", KERNELS)
def test_more_segments_than_the_kernel_has_are_refused(implementation):
    with pytest.raises(AssertionError):
        product(implementation, *case(32, [8, 8, 8, 8]))
