"""Sums of the CPU's decode step: the same bits from any number of threads, precise, and how many threads it takes."""

import ctypes
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
    changes = {"quant": quant, "groupsize": 16, "intermediate_size": 176, "vector_std": 0.3, "qkv_bias": True} | changes
    model = build(SparseTransformer, FUSED, dtype=dtype, seed=seed, **changes)
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
    step.start(torch.tensor([3]), [0], [7])
    logits = []
    for _ in range(steps):
        step.replay()
        logits.append(step.logits[0].clone())
    return torch.stack(logits), step.tokens[0, : steps + 1].clone()


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("quant", ["none", "int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_any_number_of_threads_gives_the_same_bits(fixed_threads, dtype, quant, cuts):
    model = random_model(dtype, quant, cuts, n_layer=3)
    fixed_threads(1)
    logits, tokens = run(model, cuts, 200)
    assert logits.isfinite().all() and tokens.unique().numel() > 20
    for threads, steps in ((2, 200), (3, 50), (4, 50)):
        fixed_threads(threads)
        again, drawn = run(model, cuts, steps)
        assert torch.equal(again, logits[:steps]) and torch.equal(drawn, tokens[: steps + 1])


def test_float32_takes_all_threads_and_other_models_may_take_fewer():
    """A step that would be slow with all its threads is not waited for where tokens do not depend on how many."""
    for dtype, may_change in ((torch.float32, False), (torch.bfloat16, True)):
        model = random_model(dtype, "none", "cut")
        model.setup_caches(1, 64)
        step = FusedCpuStep(model, 0.0, top_k=1)
        step.start(torch.tensor([3]), [0], [0])
        for _ in range(8):
            step.replay()
        assert any((ctypes.c_double * cpu.PACE_DOUBLES).from_address(step._model.pace)) == may_change


PACE = """
#include SOURCE
#include <cstdio>
// Seconds of a step by the number of threads, on a machine where `busy` cores of 8 are another's.
double seconds(int threads, int busy) { return threads <= 8 - busy ? 0.008 / threads : 0.1; }
int main() {
  Pace pace{};
  const auto run = [&](int busy, int steps) {  // the time, and the threads of the last step that was no try
    double total = 0;
    int threads = 0;
    for (int i = 0; i < steps; i++) {
      const int now = pace.threads(8);
      if (!pace.away) threads = now;
      const double step = seconds(now, busy);
      pace.took(step);
      total += step;
    }
    std::printf("%d %.4f\\n", threads, total);
  };
  run(0, 200);    // all to itself
  run(1, 1000);   // 4 threads are best: 0.002 each
  run(7, 1000);   // 1 is best: 0.008 each
  run(0, 20000);  // and alone again
  run(0, 1000);
  if (pace.threads(2) > 2) return 1;  // another number: anew
}
"""


SPLIT = """
#include SOURCE
#include <cstdio>
// A product of 1,536 random inputs: the most that sums over parts of them, added up, differ from one over all,
// and the relative error of the latter.
template <typename W>
void split(std::vector<W> weight, std::vector<BFloat16> pairs, int64_t group, double (*value)(W, BFloat16*, int)) {
  constexpr int64_t N_IN = 1536, N_OUT = 512;
  weight.resize(N_IN * N_OUT);
  pairs.resize(group ? N_IN * N_OUT / group * 2 : 0);
  uint32_t state = 1;
  const auto random = [&] { return float(int32_t(state = state * 1664525 + 1013904223)) * 0x1p-31f; };
  for (auto& w : weight) {
    random();
    const uint32_t bits = state >> 8;
    if constexpr (std::is_same_v<W, BFloat16>) w = W::from(random()); else std::memcpy(&w, &bits, 1);
  }
  for (size_t p = 0; p < pairs.size(); p += 2) {
    const float s = random();
    pairs[p] = BFloat16::from(s), pairs[p + 1] = BFloat16::from(s * (-7.5f + random()));
  }
  Kept kept(1, N_IN, group);
  std::vector<float> x(N_IN), whole(N_OUT), part(N_OUT), rest(N_OUT);
  for (auto& v : x) v = BFloat16::from(random() * random());
  std::vector<int8_t> norms(N_OUT);
  Matrix<W> matrix{weight.data(), pairs.data(), N_OUT, group};
  column_norms<W>(matrix, N_IN, norms.data(), 1);
  matrix.log_norms = norms.data();

  const auto sums = [&](int thread, int threads, float* to) {
    kept.list<1, 1>(x.data(), nullptr, N_IN, true);
    kept.take(0, N_IN, thread, threads);
    outputs<1, 1>(matrix, kept, 0, N_OUT, {to, 0});
  };
  double most = 0, error = 0, norm = 0;
  sums(0, 1, whole.data());
  for (int threads : {3, 5, 7}) {
    std::vector<float> total(N_OUT);
    for (int thread = threads; thread--;) {
      sums(thread, threads, part.data());
      for (int64_t j = 0; j < N_OUT; j++) total[j] += part[j];
    }
    for (int64_t j = 0; j < N_OUT; j++) most = std::max(most, std::fabs(double(total[j]) - whole[j]));
  }
  for (int64_t j = 0; j < N_OUT; j++) {
    double truth = 0;
    for (int64_t i = 0; i < N_IN; i++) {
      const int64_t at = i * N_OUT + j;
      truth += double(x[i]) * value(weight[at / (group ? 2 : 1)], pairs.data() + (group ? at / group * 2 : 0), j % 2);
    }
    error += (whole[j] - truth) * (whole[j] - truth), norm += truth * truth;
  }
  std::printf("%g %g\\n", most, std::sqrt(error / norm));
}
int main() {
  split<BFloat16>({}, {}, 0, [](BFloat16 w, BFloat16*, int) { return double(float(w)); });
  split<Int8>({}, {}, 0, [](Int8 w, BFloat16*, int) { return double(w.value); });
  split<Int4>({}, {}, 32, [](Int4 w, BFloat16* pair, int odd) {
    return double(float(pair[0])) * (w.codes >> odd * 4 & 15) + double(float(pair[1]));
  });
}
"""


def run_with_source(tmp_path, main: str) -> list[list[float]]:
    """The numbers that a program prints, line by line; its source includes cpu.cpp without what the library exports."""
    source, program, binary = (tmp_path / name for name in ("cpu.cpp", "main.cpp", "main"))
    source.write_text("\n".join(line for line in cpu.SOURCE.read_text().splitlines() if not line.startswith("EXPORT(")))
    program.write_text(main.replace("SOURCE", f'"{source}"'))
    flags = [flag.replace("-O3", "-O1") for flag in cpu.FLAGS if flag not in ("-shared", "-fPIC")]
    subprocess.run(["g++", *flags, str(program), "-o", str(binary)], check=True, capture_output=True)
    output = subprocess.run([binary], check=True, capture_output=True, text=True).stdout
    return [[float(word) for word in line.split()] for line in output.splitlines()]


def test_sums_over_parts_of_the_inputs_add_up_exactly_and_are_precise(tmp_path):
    lines = run_with_source(tmp_path, SPLIT)
    assert [most for most, _ in lines] == [0, 0, 0]
    assert all(0 < error < bound for (_, error), bound in zip(lines, (4e-4, 4e-4, 1.2e-3), strict=True))


def test_as_many_threads_as_pay(tmp_path):
    """The controller on a machine whose steps take known times: it finds the best number, and trying costs little."""
    threads, seconds = zip(*run_with_source(tmp_path, PACE), strict=True)
    assert threads == (8, 4, 1, 8, 8)
    assert seconds[0] <= 200 * 0.001 * 1.03
    assert seconds[1] <= 1000 * 0.002 / 0.8 and seconds[2] <= 1000 * 0.008 / 0.8
    assert seconds[4] <= 1000 * 0.001 * 1.02
