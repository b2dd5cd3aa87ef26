"""Decoding on a CPU beside the read bandwidth that bounds it and beside llama.cpp, alternated round by round.

python -m benchmarks.cpu_decode                                      # the default model
python -m benchmarks.cpu_decode --random_init llama-3.2-1b
python -m benchmarks.cpu_decode --checkpoint_path DIR                # e.g. one of quantize.py's
python -m benchmarks.cpu_decode --gguf BF16.gguf --llama_python VENV/bin/python   # which has llama-cpp-python

A round measures: the read bandwidth (all weights of the model's size, in huge pages, by all threads), llama.cpp (its
own decode of one token after another, without sampling), our dense model, our kernels with every threshold 0, and the
sparsities asked for. Ours include sampling. Medians and quartiles go to benchmarks/results/cpu.csv.
"""

import options

if __name__ == "__main__":
    options.run_script("benchmarks.cpu_decode")

import ctypes
import statistics as stats
import subprocess
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.results import command, model_columns, provenance, write_rows
from decoder import FusedCpuStep, Generation
from formats.default_model import resolve_checkpoint
from generate import ModelSource, count_kept
from kernels import cpu
from options import CACHE, PROMPT
from sparse_model import SparseTransformer
from thresholds import Cuts, cuts_for

KEY = "device model weights dtype quant threads what sparsity"

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


def read_bandwidth(block: Tensor) -> float:
    """GB/s of one pass over `block` by torch's number of threads."""
    where, threads = (ctypes.c_void_p(block.data_ptr()), ctypes.c_int64(block.nbytes)), torch.get_num_threads()
    start = time.perf_counter()
    cpu.library().read_all(*where, ctypes.c_int(threads))
    return block.nbytes / (time.perf_counter() - start) / 1e9


class LlamaCpp:
    """llama.cpp in a process of another Python. Raises ValueError if it does not start."""

    def __init__(self, python: str, gguf: str, threads: int):
        call, pipe = [python, "-c", LLAMA, gguf, str(threads)], subprocess.PIPE
        self.process = subprocess.Popen(call, stdin=pipe, stdout=pipe, text=True)
        if self.process.stdout.readline() != "ready\n":
            raise ValueError(f"{python} does not run llama.cpp on {gguf}; pip install llama-cpp-python there")

    def seconds_per_token(self, steps: int) -> float:
        print(steps, file=self.process.stdin, flush=True)
        seconds = float(self.process.stdout.readline())
        time.sleep(1)  # its idle threads spin for a while
        return seconds


@dataclass
class Variant:
    what: str
    sparsity: float
    bytes_per_token: int  # that are read
    cuts: Cuts | None = None  # None: nothing is cut
    seconds: list[float] = field(default_factory=list)  # per token, by round


def our_seconds_per_token(decoder: FusedCpuStep, steps: int) -> float:
    decoder.start(torch.tensor([5]), [PROMPT], [1])
    start = time.perf_counter()
    for _ in range(steps):
        decoder.replay()
    return (time.perf_counter() - start) / steps


@torch.inference_mode()
def measure(
    model: SparseTransformer, variants: list[Variant], llama: tuple[LlamaCpp, Variant] | None, steps: int, rounds: int
) -> float:
    """Adds the seconds of each round to the variants; returns the median read bandwidth, GB/s. Round 1 warms up."""
    prompt = torch.randint(model.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    block = torch.zeros(model.bytes_per_step(), dtype=torch.uint8)
    cpu.library().use_huge_pages(ctypes.c_void_p(block.data_ptr()), ctypes.c_int64(block.nbytes))
    bandwidths = []
    for turn in range(1, rounds + 2):
        bandwidths.append(read_bandwidth(block))
        if llama:
            llama[1].seconds.append(llama[0].seconds_per_token(steps))

        # the variants take turns at what comes first, and behind llama.cpp
        first = turn % len(variants)
        for variant in variants[first:] + variants[:first]:
            if variant.cuts:
                model.set_cuts(variant.cuts)
            model(prompt, torch.arange(PROMPT))
            decoder = FusedCpuStep(model, 0.8, 200, dense=variant.cuts is None)
            variant.seconds.append(our_seconds_per_token(decoder, steps))

            # the first round counts the bytes, in an untimed pass over its tokens
            if variant.cuts and turn == 1:
                tokens = decoder.tokens[:, PROMPT : PROMPT + steps + 1]
                count_kept(model, Generation(list(prompt), tokens, 0.0, 0.0))
                variant.bytes_per_token = model.bytes_per_step()
                model.reset_counts()
    return stats.median(bandwidths[1:])


def main(argv: list[str] | None = None) -> None:
    """Measures, prints a table and writes the rows. Raises ValueError for a user's mistake, as generate.py does."""
    o = options.cpu_decode(argv)
    if cpu.library() is None:
        raise ValueError("the compiled CPU kernel is what is measured here; it needs a C++ compiler (g++, or CXX)")
    folder = None if o.random_init else resolve_checkpoint(o.checkpoint_path)
    source = ModelSource(torch.device("cpu"), getattr(torch, o.precision), folder, o.random_init)
    model = source.sparse_model
    zeros = [torch.zeros(len(module.widths), 1) for module in model.sites]
    nothing = Cuts(1e-9, zeros, [None] * len(zeros))  # all but exact zeros kept, with the test in place
    threads = torch.get_num_threads()

    # the variants: dense, nothing cut, each sparsity; llama.cpp reads what our dense model does
    dense_bytes = model.bytes_per_step()
    variants = [Variant("dense", 0.0, dense_bytes), Variant("threshold 0", 0.0, dense_bytes, nothing)]
    for sparsity in o.sparsities:
        _, cuts = cuts_for("uniform", sparsity, folder, source.statistics)
        variants.append(Variant("sparse", sparsity, dense_bytes, cuts))
    llama = None
    if o.gguf:
        llama = LlamaCpp(o.llama_python, o.gguf, threads), Variant("llama.cpp", 0.0, dense_bytes)

    # caches come after a calibration, which has caches of its own
    model.setup_caches(1, CACHE)
    bandwidth = measure(model, variants, llama, o.steps, o.rounds)
    if llama:
        llama[0].process.communicate()  # closes its input, which ends it
        variants.append(llama[1])

    # a table for a person, rows for the file
    print(f"\n{model.config.name}, {o.precision}, {threads} threads; {bandwidth:.1f} GB/s read, medians of {o.rounds}")
    print(f"{'':>12}{'sparsity':>10}{'ms/token':>10}{'tokens/s':>10}{'to dense':>10}{'GB/s':>8}{'of read':>9}")
    dense, rows = 1e3 * stats.median(variants[0].seconds[1:]), []
    for variant in variants:
        low, middle, high = (1e3 * q for q in stats.quantiles(variant.seconds[1:], n=4, method="inclusive"))
        rate = variant.bytes_per_token / middle / 1e6
        speed = f"{middle:>10.2f}{1e3 / middle:>10.1f}{dense / middle:>9.2f}x"
        print(f"{variant.what:>12}{variant.sparsity:>10.0%}{speed}{rate:>8.1f}{rate / bandwidth:>9.0%}")
        row = provenance("cpu") | model_columns(model.config)
        row |= {"weights": "random" if o.random_init else "trained", "dtype": o.precision, "threads": threads}
        row |= {"what": variant.what, "sparsity": variant.sparsity, "ms_per_token": f"{middle:.3f}"}
        row |= {"ms_quartiles": f"{low:.3f}-{high:.3f}", "bytes_per_token": variant.bytes_per_token}
        row |= {"bandwidth_gbps": f"{rate:.1f}", "read_bandwidth_gbps": f"{bandwidth:.1f}"}
        rows.append(row | {"command": command("benchmarks.cpu_decode", argv)})
    write_rows("cpu.csv", rows, KEY)
