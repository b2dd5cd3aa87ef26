"""Decoding on a CPU beside what bounds it and what a user would pick instead, in one run, alternated round by round.

python -m benchmarks.cpu                                      # the default model
python -m benchmarks.cpu --random_init llama-3.2-1b
python -m benchmarks.cpu --checkpoint_path DIR                # e.g. one of quantize.py's
python -m benchmarks.cpu --gguf BF16.gguf --llama_python VENV/bin/python   # llama.cpp too (llama-cpp-python there)

A round measures: the read bandwidth (all weights of the model's size, in huge pages, by all threads), llama.cpp (its
own decode of one token after another, without sampling), our dense model, our kernels with every threshold 0, and the
sparsities asked for. Ours include sampling. Medians and quartiles go to benchmarks/results/cpu.csv.
"""

import argparse
import ctypes
import statistics as stats
import subprocess
import time

import torch

from benchmarks.results import command, provenance, write_rows
from calibrate import PRECISIONS
from convert_hf_checkpoint import command_line, resolve_checkpoint
from decoder import FusedCpuStep
from generate import ModelSource, count_kept
from kernels import cpu
from sparse_model import SparseTransformer

COLUMNS = (
    "date,device,torch,triton,commit,model,weights,dtype,threads,what,sparsity,ms_per_token,ms_quartiles,bytes_per_token,"
    "bandwidth_gbps,read_bandwidth_gbps,command"
).split(",")
KEY = ["device", "model", "weights", "dtype", "threads", "what", "sparsity"]
PROMPT, CACHE = 5, 512

LLAMA = """
import sys, time, llama_cpp
from llama_cpp import Llama
threads = int(sys.argv[2])
model = Llama(sys.argv[1], n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False)
token = (llama_cpp.llama_token * 1)(5)
print("ready", flush=True)
for line in sys.stdin:
    model.reset()
    model.eval([1, 2, 3, 4, 5])
    start = time.perf_counter()
    for _ in range(int(line)):
        llama_cpp.llama_decode(model._ctx.ctx, llama_cpp.llama_batch_get_one(token, 1))
    print((time.perf_counter() - start) / int(line), flush=True)
"""


def read_bandwidth(block: torch.Tensor) -> float:
    """GB/s of one pass over `block` by torch's number of threads."""
    start = time.perf_counter()
    cpu.library().read_all(
        ctypes.c_void_p(block.data_ptr()), ctypes.c_int64(block.nbytes), ctypes.c_int(torch.get_num_threads())
    )
    return block.nbytes / (time.perf_counter() - start) / 1e9


def main(
    checkpoint_path: str | None,
    random_init: str | None,
    gguf: str | None,
    llama_python: str | None,
    sparsities: list[float],
    steps: int,
    rounds: int,
    precision: str,
) -> None:
    """Measures, prints a table and writes the rows.

    Raises:
        ValueError: no compiled kernel, counts out of range, a llama.cpp that does not start; and as generate.py does.
    """
    if cpu.library() is None:
        raise ValueError("the compiled CPU kernel is what is measured here; it needs a C++ compiler (g++, or CXX)")
    if not 1 <= steps <= CACHE - PROMPT or rounds < 2:
        raise ValueError(f"--steps {steps} is outside 1 to {CACHE - PROMPT}, or --rounds {rounds} under 2")
    folder = None if random_init else resolve_checkpoint(checkpoint_path)
    source = ModelSource(folder, random_init, 1234, torch.device("cpu"), PRECISIONS[precision])
    model = source.load(SparseTransformer)
    prompt = torch.randint(model.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    block = torch.zeros(model.bytes_per_step(), dtype=torch.uint8)
    cpu.library().use_huge_pages(ctypes.c_void_p(block.data_ptr()), ctypes.c_int64(block.nbytes))
    llama = None
    if gguf:
        llama = subprocess.Popen(
            [llama_python, "-c", LLAMA, gguf, str(threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        if llama.stdout.readline() != "ready\n":
            raise ValueError(f"{llama_python} does not run llama.cpp on {gguf}; pip install llama-cpp-python there")

    def llama_step() -> float:
        llama.stdin.write(f"{steps}\n")
        llama.stdin.flush()
        return float(llama.stdout.readline())

    def our_step(decoder: FusedCpuStep) -> float:
        decoder.start(torch.tensor(5), PROMPT, 1)
        start = time.perf_counter()
        for _ in range(steps):
            decoder.replay()
        return (time.perf_counter() - start) / steps

    variants: dict[tuple[str, float], tuple] = {("dense", 0.0): (False, None), ("threshold 0", 0.0): (True, None)}
    for sparsity in sparsities:
        source.set_sparsity(model, sparsity, None)
        thresholds = [module.threshold.clone() for module in model.projections]
        variants["sparse", sparsity] = (True, thresholds)
    model.setup_caches(1, CACHE)  # after a calibration, which has caches of its own
    seconds = {key: [] for key in [*variants, ("llama.cpp", 0.0)]}
    read = {key: model.bytes_per_step() for key in seconds}
    bandwidths = []
    with torch.inference_mode():
        model.sparsity = 1.0  # any share but 0: "threshold 0" runs the sparse step as well
        decoders = {cut: FusedCpuStep(model, 0.8, 200, dense=not cut) for cut in (False, True)}
        for _ in range(rounds + 1):  # the first warms up
            bandwidths.append(read_bandwidth(block))
            if llama:
                seconds["llama.cpp", 0.0].append(llama_step())
                time.sleep(1)  # its idle threads spin for a while
            first = len(bandwidths) % len(variants)  # they take turns at what comes first, and behind llama.cpp
            for key, (cut, thresholds) in [*variants.items()][first:] + [*variants.items()][:first]:
                for i, module in enumerate(model.projections):
                    module.threshold.copy_(thresholds[i] if thresholds else torch.zeros(()))
                model(prompt, torch.arange(PROMPT))
                seconds[key].append(our_step(decoders[cut]))
                if thresholds and len(bandwidths) == 1:
                    tokens = decoders[cut].tokens[PROMPT : PROMPT + steps + 1]
                    count_kept(model, torch.cat((prompt, tokens[None]), 1), PROMPT)
                    read[key] = model.bytes_per_step()
                    model.reset_counts()
    if llama:
        llama.stdin.close()
        llama.wait()
    peak = stats.median(bandwidths[1:])
    print(f"\n{model.config.name}, {precision}, {threads} threads; {peak:.1f} GB/s read, medians of {rounds}")
    print(f"{'':>12}{'sparsity':>10}{'ms/token':>10}{'tokens/s':>10}{'to dense':>10}{'GB/s':>8}{'of read':>9}")
    dense = stats.median(seconds["dense", 0.0][1:])
    rows = []
    for (what, sparsity), times in seconds.items():
        if not times:
            continue
        low, middle, high = stats.quantiles(times[1:], n=4, method="inclusive")
        rate = read[what, sparsity] / middle / 1e9
        print(
            f"{what:>12}{sparsity:>10.0%}{1e3 * middle:>10.2f}{1 / middle:>10.1f}{dense / middle:>9.2f}x{rate:>8.1f}"
            f"{rate / peak:>9.0%}"
        )
        rows.append(
            {
                **provenance("cpu"),
                **{"model": model.config.name, "weights": "random" if random_init else "trained", "dtype": precision},
                **{"threads": threads, "what": what, "sparsity": sparsity, "ms_per_token": f"{1e3 * middle:.3f}"},
                **{"ms_quartiles": f"{1e3 * low:.3f}-{1e3 * high:.3f}", "bytes_per_token": read[what, sparsity]},
                **{"bandwidth_gbps": f"{rate:.1f}", "read_bandwidth_gbps": f"{peak:.1f}"},
                "command": command("benchmarks.cpu"),
            }
        )
    write_rows("cpu.csv", rows, COLUMNS, KEY)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint_path", metavar="DIR", help="default: the default model")
    parser.add_argument("--random_init", metavar="NAME", help="a named config, random weights")
    parser.add_argument("--gguf", metavar="FILE", help="the default model for llama.cpp, in BF16")
    parser.add_argument("--llama_python", default="python", metavar="PYTHON", help="one that has llama-cpp-python")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.65])
    parser.add_argument("--steps", type=int, default=60, help="tokens of each measurement")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--precision", default="bfloat16", choices=sorted(PRECISIONS))
    command_line(main, parser.parse_args())
