"""The compiled CPU product against float64, its decode step against the plain model, and a machine without compiler."""

import ctypes
import platform
import subprocess
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from models import FUSED, LLAMA3_ROPE, SWITCHES, YARN, build_cut, caches, random_tokens

from decoder import FusedCpuStep, Generator
from kernels import cpu
from kernels.quantized import Form, dequantize, pack_int4
from kernels.sparse_gemv import sparse_gemv, sparse_gemv_ref

build = partial(build_cut, FUSED | {"intermediate_size": 173})
needs_library = pytest.mark.skipif(cpu.library() is None, reason="no C++ compiler")


def problem(n_in, segments, batch, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, n_in, generator=generator).to(dtype)
    weight = torch.randn(n_in, sum(segments), generator=generator).to(dtype)
    return x, weight, torch.rand(len(segments), n_in, generator=generator)


def integers(weight, quant, groupsize=16):
    """A random weight [in, out] of the form `quant` in place of this one, and its scale; the same and None for none."""
    generator, (n_in, n_out) = torch.Generator().manual_seed(1), weight.shape
    if quant == "int8":
        codes = torch.randint(-127, 128, weight.shape, generator=generator, dtype=torch.int8)
        return codes, torch.rand(n_out, generator=generator)
    if quant == "int4":
        codes = torch.randint(16, weight.shape, generator=generator, dtype=torch.uint8)
        return pack_int4(codes), torch.randn(n_in, n_out // groupsize, 2, generator=generator).bfloat16()
    return weight, None


@contextmanager
def threads_of(n):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@needs_library
@pytest.mark.parametrize("quant", ["none", "int8"])
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("n_in, segments", [(172, [50, 30, 20]), (576, [576, 192, 192]), (11008, [33]), (7, [1])])
def test_kernel_equals_float64(n_in, segments, dtype, threads, quant):
    x, weight, threshold = problem(n_in, segments, 3, dtype)
    check_against_float64(x, *integers(weight, quant), threshold, segments, threads)


def check_against_float64(x, weight, scale, threshold, segments, threads):
    with threads_of(threads):
        result = cpu.launch_sparse_gemv(x, weight, threshold, segments, scale)
    truth = sparse_gemv_ref(x.double(), dequantize(weight, scale, torch.float32).double(), threshold, segments)
    plain = sparse_gemv_ref(x, weight, threshold, segments, scale)
    assert (result - truth).norm() <= 2 * (plain - truth).norm() + 1e-6 * truth.norm()


@needs_library
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "n_in, segments, groupsize", [(172, [48, 32], 16), (9, [5120], 32), (33, [144, 48], 48), (5, [4800] * 2, 4800)]
)
def test_groups_of_int4_wherever_they_end(n_in, segments, groupsize, dtype, threads):
    x, weight, threshold = problem(n_in, segments, 3, dtype)
    check_against_float64(x, *integers(weight, "int4", groupsize), threshold, segments, threads)


@needs_library
def test_the_op_runs_the_kernel(monkeypatch):
    calls = []
    launch = cpu.launch_sparse_gemv
    monkeypatch.setattr(cpu, "launch_sparse_gemv", lambda *args: calls.append(1) or launch(*args))
    x, weight, threshold = problem(64, [64], 1, torch.float32)
    for quant in ("none", "int8", "int4"):
        own, scale = integers(weight, quant)
        arguments = x, own, threshold, [64], scale
        torch.testing.assert_close(sparse_gemv(*arguments), sparse_gemv_ref(*arguments), rtol=1e-4, atol=1e-3)
    assert len(calls) == 3


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


def patterns(segments, n_in, dtype, seed=0):
    """x of size 1 and thresholds 0 or 2: every set of segments that keep an input, in random order."""
    x, weight, _ = problem(n_in, segments, 1, dtype, seed)
    sets = torch.randperm(n_in, generator=torch.Generator().manual_seed(seed)) % 2 ** len(segments)
    kept = (sets >> torch.arange(len(segments))[:, None]) & 1  # (S, n_in)
    return x.sign(), weight, (1 - kept) * 2.0


@needs_library
@pytest.mark.parametrize("quant", ["none", "int8", "int4"])
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("n_in, segments", [(173, [50, 30, 21]), (64, [33, 192]), (9, [1, 2, 3]), (40, [7, 1, 5, 4])])
def test_segments_keep_their_own_inputs(n_in, segments, dtype, threads, quant):
    segments = [16 * width for width in segments] if quant == "int4" else segments
    x, weight, threshold = patterns(segments, n_in, dtype)
    weight, scale = integers(weight, quant)
    stands_for = dequantize(weight, scale, torch.float32).double().split(segments, dim=1)
    truth = torch.cat([(x.double() * (t == 0)) @ w for t, w in zip(threshold, stands_for, strict=True)], dim=1)
    rtol = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    for nan in (False, True):
        if nan:
            x[0, threshold.sum(0).argmin()] = float("nan")  # is kept whatever the thresholds
            threshold[0] = 2.0
        with threads_of(threads):
            result = cpu.launch_sparse_gemv(x, weight, threshold, segments, scale)
        assert result.isnan().all() if nan else (result - truth).norm() <= rtol * truth.norm()


@needs_library
@pytest.mark.parametrize("quant", ["none", "int8", "int4"])
@pytest.mark.parametrize("shifted", [False, True])
def test_a_step_cuts_each_segment_by_itself(quant, shifted):
    """Thresholds 0 or far above every input, each segment's of its own: no input is near one."""
    model = build(shifted=shifted, quant=quant, groupsize=16, intermediate_size=176)
    generator = torch.Generator().manual_seed(2)
    for module in model.sites:
        module.threshold.copy_(torch.randint(2, module.threshold.shape, generator=generator) * 1e9)
    model.setup_caches(1, 8)
    logits = model(torch.tensor([[3]]), torch.tensor([0]))[0, -1]
    for threads in (1, 2, 5):
        decoder = FusedCpuStep(model, temperature=0.0, top_k=1)
        with threads_of(threads):
            decoder.start(torch.tensor([3]), [0], [0])
            decoder.replay()
        assert (decoder.logits[0] - logits).norm() <= 1e-5 * logits.norm()


@needs_library
def test_no_memory_is_an_error_of_one_line(monkeypatch):
    model = build()
    model.setup_caches(1, 8)
    decoder = FusedCpuStep(model, temperature=0.0, top_k=1)
    decoder.start(torch.tensor([3]), [0], [0])
    decoder.positions[0], decoder._model.cache_length = 2**46, 2**47  # more scores than there are addresses
    with pytest.raises(MemoryError, match="no memory for a decode step at position 70368744177664"):
        decoder.replay()
    pointers, sizes = [None] * 5, [ctypes.c_int64(n) for n in (1, 2**46, 33, 0, 1)]
    product = cpu.kernel("sparse_gemv", torch.float32, Form("none", torch.float32))
    assert product(*pointers, *sizes, (ctypes.c_int64 * 1)(33), ctypes.c_int(2)) == 1
    monkeypatch.setattr(cpu, "kernel", lambda *_: lambda *_: 1)
    with pytest.raises(MemoryError, match=r"no memory for a product of \(1, 64\) by \(64, 33\)"):
        cpu.launch_sparse_gemv(*problem(64, [33], 1, torch.float32), [33])


@needs_library
def test_a_build_is_kept_and_depends_on_its_flags(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu, "SOURCE", tmp_path / "small.cpp")  # the real one takes 15 s
    cpu.SOURCE.write_text('extern "C" int one() { return 1; }')
    tmp_path = tmp_path / "cache"
    first = cpu.build(tmp_path, cpu.FLAGS)
    stamp = first.stat().st_mtime_ns
    assert cpu.build(tmp_path, cpu.FLAGS) == first and first.stat().st_mtime_ns == stamp
    assert cpu.build(tmp_path, [*cpu.FLAGS, "-DOTHER"]) != first
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".so", ".so"]  # and no temporary folder


@pytest.mark.parametrize("compiler", ["/nonexistent/g++", "false", "loud"])
def test_without_a_compiler_plain_torch_takes_over(tmp_path, monkeypatch, compiler):
    if compiler == "loud":
        compiler = tmp_path / compiler
        compiler.write_text("#!/bin/sh\necho no licence >&2\nexit 1\n")
        compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
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


MODELS = {
    "grouped heads": {},
    "window": {"sliding_window": 5},
    "window in one layer, llama3 rope": {"sliding_window": 5, "windowed_layers": [1], "rope_scaling": LLAMA3_ROPE},
    "biases, one head a group": {"qkv_bias": True, "n_local_heads": 4},
    "shifts": {"shifted": True},
    "int8, biases, shifts": {"quant": "int8", "qkv_bias": True, "shifted": True},
    "int4, biases, shifts": {
        "quant": "int4",
        "groupsize": 16,
        "intermediate_size": 176,
        "qkv_bias": True,
        "shifted": True,
    },
    "switches": SWITCHES,
    "switches, int8, shifts": SWITCHES | {"quant": "int8", "shifted": True},
    "partly rotated, yarn, gelu": {"rotary_share": 0.5, "rope_scaling": YARN, "activation": "gelu"},
    "gelu by tanh": {"activation": "gelu_tanh"},
    "odd widths, tied": {"dim": 42, "head_dim": 14, "n_head": 3, "n_local_heads": 1, "tie_embeddings": True},
}


@needs_library
@pytest.mark.parametrize("cut", [True, False], ids=["cut", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_decode_steps_equal_plain_ones(name, dtype, cut):
    prompt, steps = 20, 4
    model = build(dtype=dtype, **MODELS[name])
    if dtype != torch.float32:  # else an input within rounding of its threshold is cut in one and kept in the other
        for module in model.sites:
            module.threshold.copy_((module.threshold > 0.15) * 1e9)
    model.setup_caches(1, prompt + steps)
    model(random_tokens(1, prompt, 101), torch.arange(prompt))
    before = [t.clone() for t in caches(model)]
    idx = torch.tensor([3, 5, 99, 0])
    logits = []
    for i, token in enumerate(idx):
        out = model(token.view(1, 1), torch.tensor([prompt + i]), dense_prefix=None if cut else 1)
        logits.append(out[0, -1].float())
    after = [t.clone() for t in caches(model)]
    rtol = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 3e-3}[dtype]
    results = []
    for threads in (1, 2, 8, 8):
        for tensor, old in zip(caches(model), before, strict=True):
            tensor.copy_(old)
        decoder = FusedCpuStep(model, temperature=0.0, top_k=1, dense=not cut)
        results.append([])
        with threads_of(threads):
            for i, token in enumerate(idx):
                decoder.start(token[None], [prompt + i], [0])
                decoder.replay()
                results[-1].append(decoder.logits.clone())
                assert (decoder.logits[0] - logits[i]).norm() <= rtol * logits[i].norm()
                assert decoder.tokens[0, prompt + i + 1] == decoder.logits.argmax()
        for fused, plain in zip(caches(model), after, strict=True):
            assert (fused.float() - plain.float()).norm() <= rtol * plain.float().norm()
    assert all(map(torch.equal, *results[-2:]))  # the same to the bit with as many threads


@needs_library
@pytest.mark.parametrize("shifted", [False, True])
def test_greedy_generations_equal_plain_ones(shifted):
    model = build(vocab_size=300, n_layer=4, shifted=shifted)
    prompt = torch.tensor([[1, 2, 3]])
    plain = Generator(model, 1, 60, temperature=0)(prompt, 57).tokens
    fused = Generator(model, 1, 60, temperature=0, step="fused")
    assert isinstance(fused._step, FusedCpuStep)
    assert torch.equal(fused(prompt, 57).tokens, plain)
    seen = []
    fused(prompt, 5, lambda token: seen.append(token.item()))
    assert seen == plain[0, 3:8].tolist()


@needs_library
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_in_a_step_ends_in_no_token(value):
    model = build()
    model.setup_caches(1, 8)
    model.tok_embeddings.weight[3] = value
    decoder = FusedCpuStep(model, temperature=0.8, top_k=3)
    decoder.start(torch.tensor([3]), [0], [0])
    decoder.replay(2)  # the second one has no token to feed, and reads the first one's keys
    assert decoder.logits.isnan().all() and decoder.tokens[0, 1:3].tolist() == [-1, -1]


def draws(logits, temperature, top_k, n):
    """n draws by the decoder's sampling from the same logits: those of a model whose embedding is all that counts."""
    model = build(n_layer=1, vocab_size=len(logits), dim=64)
    for module in model.sites:
        module.weight.zero_()
    model.tok_embeddings.weight.zero_()[:, 0] = 1.0  # normalised: (8, 0, 0, ...)
    model.output.weight.zero_()[:, 0] = logits / 8
    model.setup_caches(1, 256)
    decoder = FusedCpuStep(model, temperature, top_k)
    drawn = []
    for seed in range(-(-n // 250)):
        decoder.start(torch.tensor([0]), [0], [seed])
        for _ in range(250):
            decoder.replay()
        drawn.append(decoder.tokens[0, 1:251].clone())
    assert (decoder.logits - logits).abs().max() < 1e-2
    return torch.cat(drawn)[:n]


@needs_library
@pytest.mark.parametrize("vocab", [50, 1003])
def test_draws_follow_the_softmax_of_the_top_k(vocab):
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(1)) * 2
    n, top_k, temperature = 2000, 5, 0.7
    best = logits.topk(top_k)
    counts = (draws(logits, temperature, top_k, n)[:, None] == best.indices).sum(0)
    assert counts.sum() == n  # nothing outside the top_k
    expected = n * torch.softmax(best.values / temperature, 0)
    assert ((counts - expected) ** 2 / expected).sum() < 18.5  # 4 degrees of freedom: one seed in a thousand is worse


@needs_library
@pytest.mark.parametrize("top_k", [1, 3, 200, 5000])
def test_top_k_keeps_ties_and_may_exceed_the_vocabulary(top_k):
    logits = torch.tensor([0.0, 4.0, -1.0, 4.0, 3.0] + [-9.0] * 400)
    drawn = set(draws(logits, 3.0, top_k, 500).tolist())
    assert drawn == {1: {1, 3}, 3: {1, 3, 4}}[top_k] if top_k < 200 else {0, 1, 2, 3, 4} <= drawn


STEP = """
#include SOURCE
#include <cstdlib>
template <typename T> T* values(int64_t n, float scale) {  // of its own allocation, so that the sanitizer sees its end
  T* p = static_cast<T*>(std::malloc(n * sizeof(T)));
  for (int64_t i = 0; i < n; i++) p[i] = T::from(scale * float(i * 7919 % 201 - 100) / 100);
  return p;
}
template <> Int8* values(int64_t n, float) {
  Int8* p = static_cast<Int8*>(std::malloc(n));
  for (int64_t i = 0; i < n; i++) p[i] = {int8_t(i * 7919 % 201 - 100)};
  return p;
}
template <> Int4* values(int64_t n, float) {
  Int4* p = static_cast<Int4*>(std::malloc(n / 2));
  for (int64_t i = 0; i < n / 2; i++) p[i] = {uint8_t(i * 7919 % 256)};
  return p;
}
float* floats(int64_t n) { return &values<Float32>(n, 0.3f)->value; }
template <typename W, typename T>
Projection projection(int64_t segments, int64_t n_in, int64_t n_out) {
  constexpr bool groups = std::is_same_v<W, Int4>;  // of 16
  const void* scale = floats(n_out);
  if (groups) scale = values<BFloat16>(n_in * n_out / 16 * 2, 1);
  return {values<W>(n_in * n_out, 1), values<T>(n_out, 1), scale, floats(segments * n_in), floats(n_in), floats(n_out),
          groups ? 16 : 0};
}
template <typename T, typename W, typename V>
void run(int64_t heads, int64_t kv, int64_t d, int64_t dim, int64_t hidden, int64_t vocab, int64_t batch, bool shared,
         int64_t activation) {
  const int64_t qkv = (heads + 2 * kv) * d, length = 14, cached = (shared ? 1 : batch) * kv * length * d;
  Layer layer{values<T>(dim, 1), values<T>(dim, 1), values<T>(d, 1), values<T>(d, 1), projection<V, T>(3, dim, qkv),
              projection<W, T>(1, heads * d, dim), projection<W, T>(2, dim, 2 * hidden),
              projection<W, T>(1, hidden, dim), values<T>(cached, 1), values<T>(cached, 1), floats(d / 2), 1.1f, 5};
  Model m{1, heads, kv, d, dim, hidden, vocab, length, &layer, values<T>(vocab * dim, 1), values<T>(dim, 1),
          values<V>(vocab * dim, 1), floats(vocab), floats(batch * dim), floats(batch * qkv),
          floats(batch * heads * d), floats(batch * hidden), floats(batch * vocab),
          floats(batch * ((vocab + GROUP - 1) / GROUP)),
          static_cast<int64_t*>(std::calloc(batch * (length + 1), 8)), 1, shared, activation,
          1e-5f, 0.1f, 2, 0.5f, 3, 0.8f, 7};
  for (int64_t i = 0; i + batch <= length; i++) {
    std::vector<int64_t> positions(batch, i);
    std::vector<uint32_t> seeds(batch, 1);
    for (int64_t b = 0; b < batch; b++) positions[b] += shared || b % 2 ? b : 0;
    decode<T, W, V>(m, batch, positions.data(), seeds.data(), batch);
    for (int64_t b = 0; b < batch; b++) {
      const int64_t token = m.tokens[b * (length + 1) + positions[b] + 1];
      if (token < -1 || token >= vocab) std::exit(3);  // -1: not finite
    }
  }
}
template <typename T, typename W> void all() {
  for (int64_t batch : {1, 2, 3, 8}) {  // as many threads
    run<T, W, W>(3, 1, 14, 42, 173, 101, batch, false, 0);
    run<T, W, W>(4, 2, 16, 65, 64, 1001, batch, true, 1);
    run<T, W, W>(1, 1, 2, 1, 1, 1, batch, false, 2);
  }
}
template <typename T> void all_int4() {
  for (int64_t batch : {1, 2, 3, 8}) {
    run<T, Int4, Int8>(3, 1, 14, 48, 176, 101, batch, true, 3);
    run<T, Int4, Int8>(4, 2, 16, 64, 64, 1001, batch, false, 0);
  }
}
int main() {
  for (int64_t n_in : {1, 7, 9, 64, 172}) for (int64_t n_out : {1, 63, 65, 1030}) for (int t : {1, 2, 5}) {
    std::vector<float> x(2 * n_in, 1), w(n_in * n_out, 1), y(2 * n_out, -1), threshold(2 * n_in, 0.5);
    int64_t segments[2] = {n_out / 2, n_out - n_out / 2};
    sparse_gemv_float32(x.data(), w.data(), nullptr, threshold.data(), y.data(), 2, n_in, n_out, 0, 2,
                        segments, t);
    for (float v : y) if (v != float(n_in)) return 1;
    std::vector<int8_t> bytes(n_in * n_out, 3);
    std::vector<float> scale(n_out, 2);
    for (int64_t i = n_in; i < 2 * n_in; i += 2) threshold[i] = 1;  // the second segment keeps every other input
    sparse_gemv_float32_int8(x.data(), bytes.data(), scale.data(), threshold.data(), y.data(), 2, n_in, n_out, 0, 2,
                             segments, t);
    for (int64_t j = 0; j < 2 * n_out; j++)
      if (y[j] != 6.0f * float(j % n_out < segments[0] ? n_in : n_in / 2)) return 2;
  }
  all<BFloat16, BFloat16>(), all<Float16, Float16>(), all<Float32, Float32>();
  all<BFloat16, Int8>(), all<Float16, Int8>(), all<Float32, Int8>();
  all_int4<BFloat16>(), all_int4<Float16>(), all_int4<Float32>();
}
"""


@needs_library
@pytest.mark.parametrize("target", ["native", "haswell", "x86-64"])
def test_nothing_is_written_out_of_bounds(tmp_path, target):
    """Odd shapes under the address sanitizer, in a program of its own, with vectors of 16, 8 and 4 floats."""
    if target != "native" and platform.machine() != "x86_64":
        pytest.skip(f"no {target} here")
    if target == "haswell" and not torch.cpu._is_avx2_supported():
        pytest.skip("this CPU has no AVX2")
    program, binary = tmp_path / "main.cpp", tmp_path / "main"
    program.write_text(STEP.replace("SOURCE", f'"{cpu.SOURCE}"'))
    flags = [flag for flag in cpu.FLAGS if flag not in ("-shared", "-fPIC", "-march=native")]
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O0", f"-march={target}"]
    build = subprocess.run(["g++", *flags, *sanitize, str(program), "-o", str(binary)], capture_output=True, text=True)
    if "cannot find" in build.stderr and "asan" in build.stderr:
        pytest.skip("the address sanitizer's library is not installed")
    assert build.returncode == 0, build.stderr
    run = subprocess.run([binary], capture_output=True, text=True, env={"ASAN_OPTIONS": "detect_leaks=0"})
    assert run.returncode == 0, run.stderr
