"""The compiled CPU kernel against float64, and what happens where it cannot be built."""

import subprocess

import pytest
import torch

from kernels import cpu
from kernels.sparse_gemv import sparse_gemv, sparse_gemv_ref

needs_library = pytest.mark.skipif(cpu.library() is None, reason="no C++ compiler")


def problem(n_in, segments, batch, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, n_in, generator=generator).to(dtype)
    weight = torch.randn(n_in, sum(segments), generator=generator).to(dtype)
    return x, weight, torch.rand(len(segments), n_in, generator=generator)


@needs_library
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("n_in, segments", [(172, [50, 30, 20]), (576, [576, 192, 192]), (11008, [33]), (7, [1])])
def test_kernel_equals_float64(n_in, segments, dtype, threads):
    x, weight, threshold = problem(n_in, segments, 3, dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        result = cpu.launch_sparse_gemv(x, weight, threshold, segments)
    finally:
        torch.set_num_threads(before)
    truth = sparse_gemv_ref(x.double(), weight.double(), threshold, segments)
    plain = sparse_gemv_ref(x, weight, threshold, segments)
    assert (result - truth).norm() <= 2 * (plain - truth).norm() + 1e-6 * truth.norm()


@needs_library
def test_the_op_runs_the_kernel(monkeypatch):
    calls = []
    launch = cpu.launch_sparse_gemv
    monkeypatch.setattr(cpu, "launch_sparse_gemv", lambda *args: calls.append(1) or launch(*args))
    arguments = *problem(64, [64], 1, torch.float32), [64]
    torch.testing.assert_close(sparse_gemv(*arguments), sparse_gemv_ref(*arguments), rtol=1e-4, atol=1e-4)
    assert calls


@needs_library
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_is_not_finite(dtype):
    nan, inf = float("nan"), float("inf")
    weight = torch.full((20, 5), 2.0, dtype=dtype)
    weight[3] = inf  # a cut row: never read
    threshold = torch.full((1, 20), 0.5)
    x = torch.full((1, 20), 1.0, dtype=dtype)
    x[0, 3] = 0.5  # equal to its threshold: cut
    assert cpu.launch_sparse_gemv(x, weight, threshold, [5]).tolist() == [[38.0] * 5]
    x[0, 7] = nan
    assert cpu.launch_sparse_gemv(x, weight, threshold, [5]).isnan().all()
    x[0, 7] = -inf
    assert (cpu.launch_sparse_gemv(x, weight, threshold, [5]) == -inf).all()
    assert (cpu.launch_sparse_gemv(x, weight, torch.full((1, 20), inf), [5]) == 0).all()  # nothing kept


@needs_library
def test_a_build_is_kept_and_depends_on_its_flags(tmp_path):
    first = cpu.build(tmp_path, cpu.FLAGS)
    stamp = first.stat().st_mtime_ns
    assert cpu.build(tmp_path, cpu.FLAGS) == first and first.stat().st_mtime_ns == stamp
    assert cpu.build(tmp_path, [*cpu.FLAGS, "-DOTHER"]) != first
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".so", ".so"]  # and no temporary folder


@pytest.mark.parametrize("compiler", ["/nonexistent/g++", "false"])
def test_without_a_compiler_plain_torch_takes_over(tmp_path, monkeypatch, compiler):
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpu.library.cache_clear()
    try:
        with pytest.warns(UserWarning, match="plain torch takes its place"):
            assert cpu.library() is None
        arguments = *problem(64, [40, 24], 2, torch.float32), [40, 24]
        assert torch.equal(sparse_gemv(*arguments), sparse_gemv_ref(*arguments))
    finally:
        monkeypatch.undo()
        cpu.library.cache_clear()


@needs_library
def test_nothing_is_written_out_of_bounds(tmp_path):
    """Odd shapes under the address sanitizer, in a program of its own."""
    program = tmp_path / "main.cpp"
    program.write_text(
        f'#include "{cpu.SOURCE}"\n'
        "int main() {\n"
        "  for (int64_t n_in : {1, 7, 9, 64, 172}) for (int64_t n_out : {1, 63, 65, 1030}) for (int t : {1, 2, 5}) {\n"
        "    std::vector<float> x(2 * n_in, 1), w(n_in * n_out, 1), y(2 * n_out, -1), threshold(2 * n_in, 0.5);\n"
        "    int64_t segments[2] = {n_out / 2, n_out - n_out / 2};\n"
        "    sparse_gemv_float32(x.data(), w.data(), threshold.data(), y.data(), 2, n_in, n_out, 2, segments, t);\n"
        "    for (float v : y) if (v != float(n_in)) return 1;\n"
        "  }\n"
        "}\n"
    )
    binary = tmp_path / "main"
    flags = [flag for flag in cpu.FLAGS if flag not in ("-shared", "-fPIC")]
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1"]
    build = subprocess.run(["g++", *flags, *sanitize, str(program), "-o", str(binary)], capture_output=True, text=True)
    if "cannot find" in build.stderr and "asan" in build.stderr:
        pytest.skip("the address sanitizer's library is not installed")
    assert build.returncode == 0, build.stderr
    run = subprocess.run([binary], capture_output=True, text=True, env={"ASAN_OPTIONS": "detect_leaks=0"})
    assert run.returncode == 0, run.stderr
