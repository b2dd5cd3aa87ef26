"""Generates text at batch 1 and says what it cost: tokens/s, achieved sparsity, bytes read per token, bandwidth.

python generate.py --sparsity 0.5 --compile                          # the default model, fetched on first use
python generate.py --sparsity 0.5 --compile --checkpoint_path checkpoints/ORG/NAME --compare_dense
python generate.py --sparsity 0.5 --compile --random_init llama-3-8b # latency alone, random weights
"""

import argparse
import json
import os
import resource
import statistics as stats
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from calibrate import (
    PRECISIONS,
    Statistics,
    add_device_arguments,
    calibrate_random,
    command_line,
    resolve_device,
    statistics_for,
)
from convert_hf_checkpoint import atomic_write, resolve_checkpoint
from decoder import FusedCpuStep, FusedGpuStep, unfusable
from greedy import resolve_allocation, set_allocation
from kernels import cpu
from model import ModelArgs, Transformer, read_config
from sparse_model import SparseTransformer
from tokenizer import load_tokenizer

DEFAULT_PROMPT = "Hello, my name is"
SYNTHETIC_PROMPT = 6  # tokens of the prompt where weights are random
INTERACTIVE_CONTEXT = 4096  # positions of the cache in a chat; unfused attention reads all of them at every token


def sample(logits: Tensor, temperature: float, top_k: int) -> Tensor:
    """Draws a token for each row. logits: [B, V]; returns [B, 1], int64. Temperature 0 takes the likeliest."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.float() / temperature
    kth = torch.topk(logits, min(top_k, logits.shape[-1])).values[:, -1:]
    logits = torch.where(logits < kth, -float("inf"), logits)
    # argmax(p / Exp(1)) is a draw from p and, unlike torch.multinomial, does not wait for the device
    noise = torch.empty_like(logits).exponential_(1)
    return (torch.softmax(logits, dim=-1) / noise).argmax(dim=-1, keepdim=True)


def decode_one_token(
    model: Transformer, token: Tensor, input_pos: Tensor, temperature: float, top_k: int
) -> tuple[Tensor, Tensor]:
    """The next token [B, 1] and its position [1], from a token [B, 1] at input_pos [1]."""
    logits = model(token, input_pos)
    return sample(logits[:, -1], temperature, top_k), input_pos + 1


def prefill(model: Transformer, prompt: Tensor, temperature: float, top_k: int) -> Tensor:
    """The first new token [B, 1] after a prompt [B, P], which is dense in a sparse model too."""
    single = prompt.shape[1] == 1 and isinstance(model, SparseTransformer)  # would be cut
    options = {"dense_prefix": 1} if single else {}
    logits = model(prompt, torch.arange(prompt.shape[1], device=prompt.device), num_logits=1, **options)
    return sample(logits[:, -1], temperature, top_k)


@dataclass
class Generation:
    """Prompt and new tokens [B, P + N]; wall time of the call and, of that, of the N - 1 steps after prefill."""

    tokens: Tensor
    total_s: float
    decode_s: float


class Generator:
    """A model with its cache and its (compiled) steps.

    Args:
        model: on its device; its cache is made here. Generators of one size may share a model; one of another size
            takes it from those before.
        batch_size, max_length: rows and positions of the cache.
        temperature, top_k: of the sampling; temperature 0 is greedy.
        compile: one row: the fused kernels, on a GPU in a CUDA graph (`FusedGpuStep`), on a CPU in one call
            (`FusedCpuStep`); else torch.compile of the decode step, with CUDA graphs on a GPU.
        compile_prefill: torch.compile of the prompt's pass.
        dense: takes the fused kernels without their test: a dense model. So does a model whose `sparsity` is 0.
        static_prompt: prompts keep their length, so that with fused kernels the prompt's pass is a CUDA graph too.
    """

    def __init__(
        self,
        model: Transformer,
        batch_size: int,
        max_length: int,
        temperature: float = 0.8,
        top_k: int = 200,
        compile: bool = False,
        compile_prefill: bool = False,
        dense: bool = False,
        static_prompt: bool = True,
    ):
        self.model, self.temperature, self.top_k = model, temperature, top_k
        self.device = model.device
        model.setup_caches(batch_size, max_length)
        self._cache = model.layers[0].attention.kv_cache
        self._decode, self._prefill = decode_one_token, prefill
        if compile_prefill:
            self._prefill = torch.compile(prefill, fullgraph=True, dynamic=not static_prompt)
        self._fused: FusedGpuStep | FusedCpuStep | None = None
        fits = can_fuse(self.device, batch_size, top_k)
        if compile and isinstance(model, SparseTransformer) and fits and unfusable(model.config) is None:
            fused_class = FusedCpuStep if self.device.type == "cpu" else FusedGpuStep
            self._fused = fused_class(model, temperature, top_k, dense=dense)
            if static_prompt and self.device.type == "cuda":
                self._prefill = GraphedPrefill(self._prefill)
        elif compile:
            mode = "reduce-overhead" if self.device.type == "cuda" else "default"
            self._decode = torch.compile(decode_one_token, mode=mode, fullgraph=True)

    @torch.inference_mode()
    def __call__(self, prompt: Tensor, max_new_tokens: int, on_token: Callable[[Tensor], bool] | None = None):
        """Generates after prompt [B, P]; `on_token` sees every new token [B, 1] and returns True to stop early.

        Raises:
            ValueError: the tokens do not fit the cache, or the model has a cache of another size by now.
        """
        rows, _, length, _ = self._cache.k_cache.shape
        if len(prompt) != rows or prompt.shape[1] + max_new_tokens > length:
            raise ValueError(
                f"{len(prompt)} rows of {prompt.shape[1]} tokens and {max_new_tokens} new ones do not fit this "
                f"Generator's cache of {rows} rows and {length} positions"
            )
        if self.model.layers[0].attention.kv_cache is not self._cache:
            raise ValueError("the model's cache was replaced by a Generator of another size; make this one anew")
        start = self._now()
        tokens = [prompt]
        token = self._prefill(self.model, prompt, self.temperature, self.top_k)
        prefilled = self._now()
        if self._fused is not None:
            tokens = self._replay(prompt, token, max_new_tokens, on_token)
            end = self._now()
            return Generation(tokens, end - start, end - prefilled)
        position = torch.tensor([prompt.shape[1]], device=self.device)
        while True:
            tokens.append(token.clone())  # a CUDA graph writes the next token into the same memory
            stop = on_token is not None and on_token(token)
            if stop or len(tokens) > max_new_tokens:
                break
            token, position = self._decode(self.model, tokens[-1], position, self.temperature, self.top_k)
            position = position.clone()
        end = self._now()
        return Generation(torch.cat(tokens, dim=1), end - start, end - prefilled)

    def _replay(self, prompt: Tensor, token: Tensor, max_new_tokens: int, on_token: Callable | None) -> Tensor:
        """The steps after prefill through the fused kernels: the host only launches them, unless `on_token` looks."""
        fused, length = self._fused, prompt.shape[1]
        fused.start(token, length, torch.randint(2**31, ()).item())
        last = length + 1
        while last < length + max_new_tokens:
            if on_token is not None and on_token(fused.tokens[None, last - 1 : last]):
                break
            fused.replay()
            last += 1
        else:
            if on_token is not None:
                on_token(fused.tokens[None, last - 1 : last])
        return torch.cat((prompt, fused.tokens[None, length:last]), dim=1)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class GraphedPrefill:
    """`prefill`, compiled or not, for prompts of one shape, recorded as a CUDA graph on the first call.

    Of 6 tokens of llama-3-8b's shape the launches alone took an H100's host 30 ms, where the graph takes 9.
    """

    def __init__(self, run: Callable[..., Tensor]):
        self.run, self.graph = run, None

    def __call__(self, model: Transformer, prompt: Tensor, temperature: float, top_k: int) -> Tensor:
        if self.graph is None:
            self.prompt = prompt.clone()
            self.run(model, self.prompt, temperature, top_k)  # warms up what must not happen while recording
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.token = self.run(model, self.prompt, temperature, top_k)
        self.prompt.copy_(prompt)
        self.graph.replay()
        return self.token


def can_fuse(device: torch.device, batch_size: int, top_k: int) -> bool:
    """Whether the fused kernels serve a run: one row; on a GPU a top_k that one program sorts, any order of sums."""
    if device.type == "cpu":
        return has_cpu_kernel(device, batch_size)
    deterministic = torch.are_deterministic_algorithms_enabled()
    return device.type == "cuda" and batch_size == 1 and top_k <= 1024 and not deterministic


def has_cpu_kernel(device: torch.device, batch_size: int) -> bool:
    """Whether one row on a CPU goes through the compiled kernel."""
    return device.type == "cpu" and batch_size == 1 and cpu.library() is not None


@torch.inference_mode()
def fastest_dense(model: SparseTransformer) -> str:
    """The fastest dense product on this CPU: "our kernel", "torch linear, [out, in]" or "torch linear, [in, out]".

    Best of the rounds, since neighbours only slow one down, over the model's first projections, as many as fit 256 MB:
    more than caches hold. Of integer weights torch has no such product.
    """
    if model.config.quant != "none":
        return "our kernel"
    modules, read = [], 0
    for module in model.projections:
        read += module.weight.nbytes
        if modules and read > 256e6:
            break
        modules.append(module)
    weights = [module.weight for module in modules]
    inputs = [torch.ones(1, len(weight), dtype=weight.dtype) for weight in weights]
    everything = [torch.full_like(module.threshold, -1.0) for module in modules]
    transposed = [weight.t().contiguous() for weight in weights]
    ways = {
        "our kernel": lambda i: cpu.launch_sparse_gemv(inputs[i], weights[i], everything[i], modules[i].widths),
        "torch linear, [out, in]": lambda i: torch.nn.functional.linear(inputs[i], transposed[i]),
        "torch linear, [in, out]": lambda i: torch.nn.functional.linear(inputs[i], weights[i].t()),
    }
    seconds = {way: [] for way in ways}
    for _ in range(5):
        for way, product in ways.items():
            start = time.perf_counter()
            for i in range(len(modules)):
                product(i)
            seconds[way].append(time.perf_counter() - start)
    return min(ways, key=lambda way: min(seconds[way]))


def measure(
    generators: list[Generator], prompt: Tensor, max_new_tokens: int, num_samples: int
) -> list[list[Generation]]:
    """`num_samples` generations of each generator, alternated so that a drift of the machine meets all alike."""
    runs: list[list[Generation]] = [[] for _ in generators]
    for _ in range(num_samples):
        for generator, generations in zip(generators, runs, strict=True):
            generations.append(generator(prompt, max_new_tokens))
    return runs


def tokens_per_sec(generations: list[Generation], prompt: Tensor) -> float:
    """Median over the generations of new tokens (of all rows) / wall time, prefill included."""
    return stats.median((g.tokens.numel() - prompt.numel()) / g.total_s for g in generations)


@torch.inference_mode()
def count_kept(model: SparseTransformer, tokens: Tensor, prompt_length: int) -> None:
    """Counts the kept inputs of a generation [B, P + N] in one untimed pass over its tokens, the prompt's dense."""
    model.reset_counts()
    model(tokens[:, :-1], num_logits=1, dense_prefix=prompt_length)


def can_compile(device: torch.device) -> bool:
    """torch.compile needs a C++ compiler for the CPU, one that builds our library; Triton's own is not checked."""
    return device.type == "cuda" or cpu.library() is not None


def peak_memory_gb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


@dataclass
class ModelSource:
    """Where a model's weights come from: a checkpoint's folder, or a named config with a seed."""

    folder: Path | None
    random_init: str | None
    seed: int
    device: torch.device
    dtype: torch.dtype

    def load(self, cls: type) -> Transformer:
        if self.folder is None:
            return cls.random_init(self.random_init, self.device, self.dtype, self.seed)
        return cls.from_checkpoint(self.folder, self.device, self.dtype)

    def set_sparsity(self, model: SparseTransformer, sparsity: float | list, statistics_path: str | None) -> None:
        def statistics() -> Statistics:
            if self.folder is None:
                return calibrate_random(model)
            return statistics_for(self.folder, statistics_path, model)

        set_allocation(model, sparsity, statistics)


def encode_prompt(prompt: str | None, tokenizer, config: ModelArgs, seed: int) -> list[int]:
    """Token ids of a prompt's text, or of a synthetic prompt where it is an integer or weights are random."""
    if prompt is None:
        prompt = str(SYNTHETIC_PROMPT) if tokenizer is None else DEFAULT_PROMPT
    if prompt.isdecimal():
        if int(prompt) < 1:
            raise ValueError("--prompt 0: a prompt needs at least one token")
        if int(prompt) > config.block_size:
            raise ValueError(f"--prompt {prompt}: {config.name}'s context is {config.block_size} tokens")
        return torch.randint(config.vocab_size, (int(prompt),), generator=torch.Generator().manual_seed(seed)).tolist()
    if tokenizer is None:
        raise ValueError(f"--random_init has no tokenizer for the prompt {prompt!r}; give a number of tokens")
    ids = tokenizer.encode(prompt, bos=tokenizer.adds_bos)
    if not ids:
        raise ValueError("the prompt is empty; give --prompt some text")
    return ids


def chat(generator: Generator, tokenizer, max_new_tokens: int, context: int) -> None:
    """Reads prompts from stdin and streams answers until end of file; a chat where the model has a template."""
    messages: list[dict[str, str]] = []
    while True:
        try:
            text = input("\nYour prompt: ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        ids = tokenizer.encode_chat([*messages, {"role": "user", "content": text}])
        stream = tokenizer.stream()
        if ids is None:
            ids = tokenizer.encode(text, bos=tokenizer.adds_bos)
            stream = tokenizer.stream(after=ids)
        room = context - len(ids)
        if not ids:
            continue
        if room < 1:
            print(f"{len(ids)} tokens do not fit the chat's context of {context}; starting anew")
            messages = []
            continue
        pieces: list[str] = []

        def show(token: Tensor, stream=stream, pieces=pieces) -> bool:
            if token.item() in tokenizer.eos_ids:
                return True
            pieces.append(stream.push(token.item()))
            print(pieces[-1], end="", flush=True)
            return False

        result = generator(torch.tensor([ids], device=generator.device), min(max_new_tokens, room), show)
        pieces.append(stream.flush())
        print(pieces[-1])
        new = result.tokens.shape[1] - len(ids)
        print(f"[{new} tokens, {new / result.total_s:.1f} tokens/s]")
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": "".join(pieces)}]


def report(result: dict, num_samples: int, allocation: str, batch_size: int, weights: str) -> None:
    """Prints what a person wants to know of the numbers in the JSON."""
    r = result
    print(f"\nModel      {r['model']}, {weights}, {r['dtype']}, on {r['device']}")
    if r["sparsity"]:
        decoded = f"{r['achieved_sparsity']:.1%} achieved in decoding" if r["new_tokens"] > 1 else "nothing decoded"
        print(f"Sparsity   {r['sparsity']:.0%} asked for ({allocation} allocation), {decoded}; the prompt is dense")
    batch = f" x {batch_size} rows" if batch_size > 1 else ""
    step, rate = "no decode step", ""
    if r["ms_per_token"] is not None:
        step, rate = f"{r['ms_per_token']:.2f} ms a decode step", f" = {r['bandwidth_gbps']:,.1f} GB/s"
    print(
        f"Speed      {r['tokens_per_sec']:.1f} tokens/s, median of {num_samples} ({r['prompt_tokens']} prompt tokens, "
        f"{r['new_tokens']} new{batch}, sampling included); {step}"
    )
    print(
        f"Memory     {r['bytes_per_token'] / 1e6:,.1f} MB of weights read a step{rate}; "
        f"peak {r['peak_memory_gb']:.2f} GB"
    )
    if r["compile_s"] is not None:
        print(f"Compile    {r['compile_s']:.1f} s, not in the speed")
    if "speedup" in r:
        print(
            f"Dense      {r['dense_tokens_per_sec']:.1f} tokens/s ({r['dense_backend']}): speed-up {r['speedup']:.2f}x"
        )


def main(
    prompt: str | None = None,
    interactive: bool = False,
    num_samples: int = 5,
    max_new_tokens: int = 200,
    batch_size: int = 1,
    top_k: int = 200,
    temperature: float = 0.8,
    checkpoint_path: str | None = None,
    compile: bool = False,
    compile_prefill: bool = False,
    profile: str | None = None,
    sparsity: float = 0.0,
    allocation: str = "best",
    statistics: str | None = None,
    random_init: str | None = None,
    seed: int = 1234,
    compare_dense: bool = False,
    deterministic: bool = False,
    json_line: bool = False,
    device: str | None = None,
    precision: str = "bfloat16",
) -> dict:
    """Loads a model, generates `num_samples` times and returns the keys of the JSON line.

    Raises:
        ValueError: an argument, a file or a machine that does not do; the message says what would.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"--sparsity {sparsity} is outside [0, 1); 0.5 cuts half of the weights")
    for flag, value in (("num_samples", num_samples), ("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"--{flag} {value} must be at least 1")
    if not temperature >= 0 or top_k < 1:
        raise ValueError(f"--temperature {temperature} must be at least 0 and --top_k {top_k} at least 1")
    if random_init and (checkpoint_path or interactive):
        raise ValueError("--random_init has no text to load or to talk: leave out --checkpoint_path and --interactive")
    torch_device = resolve_device(device)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    if (compile or compile_prefill) and not can_compile(torch_device):
        print("No C++ compiler works here (g++, or CXX): --compile is left out", file=sys.stderr)
        compile = compile_prefill = False

    folder = None if random_init else resolve_checkpoint(checkpoint_path)
    config = ModelArgs.from_name(random_init) if random_init else read_config(folder)
    tokenizer = load_tokenizer(folder, config.vocab_size) if folder else None
    ids = [] if interactive else encode_prompt(prompt, tokenizer, config, seed)
    length = min(config.block_size, INTERACTIVE_CONTEXT) if interactive else len(ids) + max_new_tokens
    if length > config.block_size:
        raise ValueError(
            f"a prompt of {len(ids)} tokens and {max_new_tokens} new ones do not fit {config.name}'s context of "
            f"{config.block_size}: shorten the prompt or lower --max_new_tokens"
        )
    source = ModelSource(folder, random_init, seed, torch_device, PRECISIONS[precision])
    allocation, shares = resolve_allocation(allocation, folder, sparsity, statistics)
    rows = 1 if interactive else batch_size
    fused = compile and can_fuse(torch_device, rows, top_k)
    # dense too goes through our kernels where they are the faster ones: a speed-up then comes from sparsity alone
    dense_class = SparseTransformer if fused or has_cpu_kernel(torch_device, rows) else Transformer
    model = source.load(SparseTransformer if sparsity else dense_class)
    if sparsity:
        source.set_sparsity(model, shares, statistics)
        model.sparsity = sparsity
    weights = "random weights (normal, std 0.02)" if folder is None else "trained weights"

    if interactive:
        generator = Generator(model, 1, length, temperature, top_k, compile, compile_prefill, static_prompt=False)
        torch.manual_seed(seed)
        chat(generator, tokenizer, max_new_tokens, length)
        return {}

    generators = [Generator(model, batch_size, length, temperature, top_k, compile, compile_prefill)]
    backend = "torch linear" + (", compiled" if compile else "")
    if fused:
        kernels = "one C++ call" if torch_device.type == "cpu" else "one CUDA graph"
        backend = f"the sparse kernels without the threshold test, {kernels} a step"
    elif dense_class is SparseTransformer:
        backend = "the sparse kernel at threshold 0"
    if compare_dense and sparsity:
        dense_model = model if fused else None
        # on a CPU torch's products may be the faster ones: then they are the rival
        if has_cpu_kernel(torch_device, rows) and (fastest := fastest_dense(model)) != "our kernel":
            dense_model = source.load(Transformer)
            if fastest.endswith("[in, out]"):
                for module in dense_model.projections:
                    module.weight.data = module.weight.t().contiguous().t()
            backend = fastest + (", compiled" if compile else "")
        elif dense_model is None:
            dense_model = source.load(dense_class)
        generators.append(
            Generator(dense_model, batch_size, length, temperature, top_k, compile, compile_prefill, True)
        )
    tokens = torch.tensor(ids, device=torch_device).repeat(batch_size, 1)

    torch.manual_seed(seed)
    start = time.perf_counter()
    if compile and not all(isinstance(generator._fused, FusedCpuStep) for generator in generators):
        print("compiling (a minute or two on a CPU the first time, cached after)", file=sys.stderr)
    measure(generators, tokens, min(max_new_tokens, 5), 1)  # compiles, records the graphs, warms up
    compile_s = time.perf_counter() - start if compile else None
    torch.manual_seed(seed)
    print(f"generating {num_samples} x {max_new_tokens} tokens", file=sys.stderr)
    runs = measure(generators, tokens, max_new_tokens, num_samples)
    if profile:
        with torch.profiler.profile() as profiler:
            generators[0](tokens, max_new_tokens)
        with atomic_write(profile if profile.endswith(".json") else f"{profile}.json") as temporary:
            profiler.export_chrome_trace(str(temporary))
    last = runs[0][-1].tokens
    text = None
    if tokenizer and not (prompt or "").isdecimal():
        new = last[0, len(ids) :].tolist()
        end = next((i for i, token in enumerate(new) if token in tokenizer.eos_ids), len(new))
        text = tokenizer.decode(new[:end], after=ids)
    if sparsity:
        count_kept(model, last, len(ids))

    steps = max_new_tokens - 1
    ms = 1e3 * stats.median(g.decode_s / steps for g in runs[0]) if steps else None
    read = model.bytes_per_step()
    result = {
        "model": config.name,
        "device": torch.cuda.get_device_name(torch_device) if torch_device.type == "cuda" else "cpu",
        "dtype": precision,
        "sparsity": sparsity,
        "achieved_sparsity": model.achieved_sparsity() if sparsity else 0.0,
        "tokens_per_sec": tokens_per_sec(runs[0], tokens),
        "ms_per_token": ms,
        "bytes_per_token": read,
        "bandwidth_gbps": read / ms / 1e6 if steps else None,
        "compile_s": compile_s,
        "peak_memory_gb": peak_memory_gb(torch_device),
        "prompt_tokens": len(ids),
        "new_tokens": max_new_tokens,
        "text": text,
    }
    if compare_dense:
        dense = tokens_per_sec(runs[-1], tokens)
        result |= {
            "dense_tokens_per_sec": dense,
            "speedup": result["tokens_per_sec"] / dense,
            "dense_backend": backend,
        }
    if text is not None:
        print(f"{DEFAULT_PROMPT if prompt is None else prompt}{text}")
    report(result, num_samples, allocation, batch_size, weights)
    if json_line:
        print(json.dumps(result))
    return result


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", help="text, or a number of tokens of a synthetic prompt")
    parser.add_argument("--interactive", action="store_true", help="chat")
    parser.add_argument("--num_samples", type=int, default=5)
    parser.add_argument("--max_new_tokens", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=1, help="rows; each cuts its own inputs")
    parser.add_argument("--top_k", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy")
    parser.add_argument(
        "--checkpoint_path", help="a checkpoint's folder or a file in it; default: SmolLM2-135M-Instruct"
    )
    parser.add_argument("--compile", action="store_true", help="fused decode steps: CUDA graphs, or C++ on a CPU")
    parser.add_argument("--compile_prefill", action="store_true", help="torch.compile the prefill too")
    parser.add_argument("--profile", metavar="FILE", help="write a Chrome trace of one generation")
    parser.add_argument("--sparsity", type=float, default=0.0, help="share of the weights to cut, 0 <= F < 1")
    parser.add_argument("--allocation", default="best", help="best, uniform, greedy, global or a file")
    parser.add_argument("--statistics", metavar="FILE", help="default: calibration.safetensors beside the checkpoint")
    parser.add_argument("--random_init", metavar="NAME", help="a named config with random weights, e.g. llama-3-8b")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--compare_dense", action="store_true", help="time the dense model too, alternated")
    parser.add_argument("--deterministic", action="store_true", help="the same tokens run to run on a GPU, slower")
    parser.add_argument("--json", dest="json_line", action="store_true", help="a last line of JSON")
    add_device_arguments(parser)
    return parser.parse_args()


if __name__ == "__main__":
    command_line(main, parse_arguments())
