"""One matrix-vector product, cold L2: ours beside TEAL's way, Deja Vu's way and dense, over sparsities and shapes.

python -m benchmarks.gemv                                    # the shapes of llama-3-8b, 0 to 95 %
python -m benchmarks.gemv --models llama-2-7b --sparsities 0 0.5
python -m benchmarks.gemv --dtype int4                       # ours alone, with int4 weights (or int8), x bfloat16

Each kernel runs in a CUDA graph over enough different matrices to overflow the L2 cache several times. The time is the
median of replays over the number of matrices, with all launches that a product needs (zeroed outputs, masks), of the
best of three recordings with new inputs and matrices: now and then one is 18 % slower than the next, and matrices
differ by up to 1 %. Inputs are uniform in [-0.5, 0.5]. The same run checks the results against float64. Rows go to
results/gemv.csv. On Hopper ours runs as in the decode step, by dependent launch. The others are ordinary launches,
written anew after what their authors describe, each with its best tile of a small search (one recording per tile, then
two more of the best three):
    dejavu   a launch makes flags from the mask; the product loads rows by flag (Deja Vu, arXiv 2310.17157, section 4)
    teal     the product tests the threshold itself, outputs zeroed and added to in float16, of bfloat16 in
             float32 (arXiv 2408.14690, 4.3)
    dense    cuBLAS on [out, in]; dense_t: on [in, out]
"""

import options

if __name__ == "__main__":
    options.run_script("benchmarks.gemv")

import itertools
import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.results import provenance, write_rows
from kernels.fused_step import record_graph
from kernels.products import launch_product
from kernels.quantized import dequantize, form_of
from kernels.triton_gemv import Product
from model import ModelArgs

KEY = "device kernel in_features out_features dtype sparsity"
TILES = [(m, n, w) for m in (16, 32, 64, 128) for n in (64, 128, 256) for w in (1, 2, 4) if m * n <= 8192 * w]
COLD_BYTES = 400e6  # of matrices in one graph: eight times an H100's L2
MIN_COPIES = 8  # so that a graph's own start, some 20 us, is shared by enough launches
WARM_UP, REPLAYS, RECORDINGS = 3, 20, 3

Matrix = tuple[Tensor, Tensor | None]  # a weight and its scale, None of a floating dtype


@triton.jit
def _flag_kernel(x_ptr, flag_ptr, threshold, N: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < N, other=0.0).to(tl.float32)
    tl.store(flag_ptr + i, (tl.abs(x) > threshold).to(tl.int8), mask=i < N)


@triton.jit
def _rival_kernel(
    x_ptr, flag_ptr, weight_ptr, out_ptr, threshold, n_out, N_IN: tl.constexpr, M: tl.constexpr, N: tl.constexpr
):
    """Adds a tile of M inputs x N outputs to out, in the dtype of out; without flags rows go by |x| > threshold."""
    rows = tl.program_id(0) * M + tl.arange(0, M)
    cols = tl.program_id(1) * N + tl.arange(0, N)
    x = tl.load(x_ptr + rows, mask=rows < N_IN, other=0.0, eviction_policy="evict_last").to(tl.float32)
    if flag_ptr is not None:
        keep = tl.load(flag_ptr + rows, mask=rows < N_IN, other=0) > 0
    else:
        keep = tl.abs(x) > threshold
    mask = keep[:, None] & (cols < n_out)[None, :]
    weights = weight_ptr + rows[:, None].to(tl.int64) * n_out + cols[None, :]
    weight = tl.load(weights, mask=mask, other=0.0, eviction_policy="evict_first")
    total = tl.sum(x[:, None] * weight.to(tl.float32), axis=0)
    tl.atomic_add(out_ptr + cols, total.to(out_ptr.dtype.element_ty), mask=cols < n_out, sem="relaxed")


def launch_rival(x: Tensor, weight: Tensor, threshold: float, out: Tensor, flags: Tensor | None, tile) -> None:
    n_in, n_out = weight.shape
    out.zero_()
    if flags is not None:
        _flag_kernel[(triton.cdiv(n_in, 1024),)](x, flags, threshold, N=n_in, BLOCK=1024)
    m, n, warps = tile
    grid = triton.cdiv(n_in, m), triton.cdiv(n_out, n)
    _rival_kernel[grid](x, flags, weight, out, threshold, n_out, n_in, m, n, num_warps=warps)


def random_matrix(n_in: int, n_out: int, dtype: str, device: str) -> Matrix:
    """A weight [in, out] of variance about 1 / in: of a floating dtype, or int8 or int4 (`kernels.quantized`)."""
    std = n_in**-0.5
    if dtype == "int8":
        codes = torch.randint(-127, 128, (n_in, n_out), device=device, dtype=torch.int8)
        return codes, torch.rand(n_out, device=device).add(0.5) * std / 73.3
    if dtype == "int4":
        codes = torch.randint(256, (n_in, n_out // 2), device=device, dtype=torch.uint8)
        step = torch.rand(n_in, n_out // ModelArgs.groupsize, 1, device=device).add(0.5) * std / 4.6
        return codes, (step * torch.tensor([1.0, -7.5], device=device)).to(torch.bfloat16)
    return (torch.randn(n_in, n_out, device=device) * std).to(getattr(torch, dtype)), None


class Problem:
    """One product: x [in], matrices [in, out] enough to overflow the L2, and a threshold that cuts the wanted share."""

    def __init__(self, n_in: int, n_out: int, sparsity: float, dtype: str, device="cuda"):
        self.n_out, self.sparsity = n_out, sparsity
        first = random_matrix(n_in, n_out, dtype, device)
        copies = max(MIN_COPIES, round(COLD_BYTES / first[0].nbytes))
        self.matrices = [first] + [random_matrix(n_in, n_out, dtype, device) for _ in range(copies - 1)]

        # inputs and their threshold
        x = (torch.rand(n_in, device=device) - 0.5).to(torch.bfloat16 if first[1] is not None else first[0].dtype)
        order = x.float().abs().argsort()
        cut = round(sparsity * n_in)
        threshold = x[order[cut - 1]].abs().item() if cut else 0.0
        kept = order[cut:]
        ties = kept[x[kept].abs() <= threshold]  # rounding makes some: of 4,096 inputs up to 20 more would be cut
        x[ties] = threshold * 1.01 + 1e-3
        self.x, self.threshold = x, threshold

    def expected(self, threshold: float) -> Tensor:
        kept = torch.where(self.x.float().abs() > threshold, self.x, 0).double()
        return kept @ dequantize(*self.matrices[0], torch.float32).double()

    def bytes_read(self, kept: int) -> int:
        """Of the weight's `kept` rows, with its scales."""
        form = form_of(*self.matrices[0])
        shared = self.matrices[0][1].nbytes if form.name == "int8" else 0  # int8's scales, whatever is kept
        return kept * form.row_bytes(self.n_out) + shared


def graph_us(launch: Callable[[Matrix], None], matrices: list[Matrix]) -> float:
    """Median microseconds of one product in a graph over all `matrices`."""

    def launch_all() -> None:
        for matrix in matrices:
            launch(matrix)

    # the row that it keeps, which no launch changes, says on which device
    graph, times = record_graph(launch_all, matrices[0][0][:1]), []
    for _ in range(WARM_UP + REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return 1e3 * sorted(times[WARM_UP:])[REPLAYS // 2] / len(matrices)


def contenders(problem: Problem, pdl: bool) -> dict[str, list[tuple[Callable[[Matrix], None], Tensor]]]:
    """For each kernel the launches to try (the best counts), each with the buffer of its result."""
    x, threshold, device = problem.x, problem.threshold, problem.x.device
    n_in, n_out = len(x), problem.n_out
    sums = torch.zeros(2, 1, n_out, device=device)  # ours: one is added to while the launch zeroes the other
    turns = itertools.cycle(((sums[0], sums[1]), (sums[1], sums[0])))
    thresholds = torch.full((1, n_in), threshold, device=device)

    # By dependent launch it starts, and fetches rows, while the launch before ends. Its guess of the kept rows is right
    # here, since x never changes; in the step o guesses by the last token's x.
    def ours(matrix: Matrix) -> None:
        (weight, scale), (out, other) = matrix, next(turns)
        product = Product(weight, thresholds, [n_out], problem.sparsity, scale)
        launch_product("given", x[None], product, out, dtype=x.dtype, zero=other, pdl=pdl)

    if problem.matrices[0][1] is not None:
        return {"ours": [(ours, sums)]}

    out = torch.empty(n_out, device=device, dtype=torch.float16 if x.dtype == torch.float16 else torch.float32)
    flags = torch.empty(n_in, device=device, dtype=torch.int8)
    dense = torch.empty(n_out, device=device, dtype=x.dtype)
    return {
        "ours": [(ours, sums)],
        "teal": [(lambda m, t=t: launch_rival(x, m[0], threshold, out, None, t), out) for t in TILES],
        "dejavu": [(lambda m, t=t: launch_rival(x, m[0], threshold, out, flags, t), out) for t in TILES],
        "dense_t": [(lambda m: torch.mv(m[0].t(), x, out=dense), dense)],
    }


def check(launch: Callable[[Matrix], None], out: Tensor, problem: Problem, name: str) -> None:
    """Raises ValueError if a launch's result is off by 1 % (a wrong row or column is; float16 sums are not)."""
    out.zero_()
    launch(problem.matrices[0])
    result = out.view(-1, problem.n_out).sum(0).double()  # ours: the other buffer is zero
    expected = problem.expected(-1.0 if name == "dense_t" else problem.threshold)
    error = (result - expected).norm() / expected.norm().clamp(min=1e-6)
    if not error < 1e-2:
        raise ValueError(f"{name} is wrong: relative error {error:.1e}")


def measure(n_in: int, n_out: int, sparsity: float, dtype: str) -> list[dict]:
    pdl = torch.cuda.get_device_capability() >= (9, 0)
    times: dict[str, list[float]] = {}  # of each launch, the best so far
    for recording in range(RECORDINGS):
        problem = Problem(n_in, n_out, sparsity, dtype)
        for name, launches in contenders(problem, pdl).items():
            best = times.setdefault(name, [math.inf] * len(launches))
            for i in range(len(launches)) if recording == 0 else promising(best):
                launch, out = launches[i]
                check(launch, out, problem, name)
                best[i] = min(best[i], graph_us(launch, problem.matrices))
        if "dense_t" in times:
            rowwise = [(weight.t().contiguous(), None) for weight, _ in problem.matrices]
            times.setdefault("dense", []).append(graph_us(lambda m, x=problem.x: torch.mv(m[0], x), rowwise))

    # bandwidth counts the rows that the kernel had to read
    kept = (problem.x.float().abs() > problem.threshold).sum().item()
    made, rows = provenance(torch.cuda.get_device_name()), []
    for name, us in ((name, min(best)) for name, best in times.items()):
        read = problem.bytes_read(n_in if name.startswith("dense") else kept)
        row = {"kernel": name, "in_features": n_in, "out_features": n_out, "dtype": dtype, "sparsity": sparsity}
        rows.append(made | row | {"us": f"{us:.2f}", "bytes": read, "bandwidth_gbps": f"{read / us / 1e3:.1f}"})
    return rows


def promising(times: list[float]) -> list[int]:
    """Indices of the three shortest."""
    return sorted(range(len(times)), key=times.__getitem__)[:3]


def shapes(name: str) -> list[tuple[int, int]]:
    """[in, out] of a named config's products: qkv, o, gate|up, one of these two, down."""
    c = ModelArgs.from_name(name)
    heads, hidden = c.n_head * c.head_dim, c.intermediate_size
    qkv = heads + 2 * c.n_local_heads * c.head_dim
    return [(c.dim, qkv), (heads, c.dim), (c.dim, 2 * hidden), (c.dim, hidden), (hidden, c.dim)]


def main(argv: list[str] | None = None) -> None:
    """Measures and prints all rows; writes them shape by shape. Raises ValueError without a GPU."""
    o = options.gemv(argv)
    if not torch.cuda.is_available():
        raise ValueError("the kernels are timed on a GPU; there is none. `pytest tests/test_kernels.py` checks them")
    for n_in, n_out in dict.fromkeys(shape for name in o.models for shape in shapes(name)):
        print(f"\n{n_in} -> {n_out}, {o.dtype}, us ({torch.cuda.get_device_name()})")
        for i, sparsity in enumerate(o.sparsities):
            rows = measure(n_in, n_out, sparsity, o.dtype)
            if i == 0:
                print(f"{'sparsity':>9}" + "".join(f"{row['kernel']:>10}" for row in rows))
            print(f"{sparsity:>9.0%}" + "".join(f"{row['us']:>10}" for row in rows))
            write_rows("gemv.csv", rows, KEY)
