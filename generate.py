"""Generates text at batch 1 and says what it cost: tokens/s, achieved sparsity, bytes read per token, bandwidth.

python generate.py --sparsity 0.5 --compile                          # the default model, fetched on first use
python generate.py --sparsity 0.5 --compile --checkpoint_path checkpoints/ORG/NAME --compare_dense
python generate.py --sparsity 0.5 --compile --random_init llama-3-8b # latency alone, random weights
python generate.py --sparsity 0.4 --compile --interactive            # a chat
"""

import argparse
import json
import os
import resource
import statistics as stats
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from calibrate import calibrate_random, statistics_for
from cli import PRECISIONS, add_device_arguments, command_line, refuse_old_flags, resolve_device
from decoder import Generation, Generator, why_unfused
from formats.default_model import resolve_checkpoint
from formats.files import atomic_write
from kernels import cpu
from model import ModelArgs, Transformer, read_config
from sparse_model import SparseTransformer
from thresholds import Statistics, cuts_for, recorded_perplexity
from tokenizer import Tokenizer, load_tokenizer

DEFAULT_QUESTION = "How do plants make their food?"  # where the model has a chat template
DEFAULT_PROMPT = "Plants make their food by"  # where it has none
SYNTHETIC_PROMPT = 6  # tokens of the prompt where weights are random
TEMPERATURE, CHAT_TEMPERATURE = 0.8, 0.5
CHAT_CONTEXT = 4096  # positions of the cache in a chat; unfused attention reads all of them at every token
BRIEF_TOKENS = 64  # of the dense run that gives the speed-up where --compare_dense does not


@dataclass
class ModelSource:
    """Where a model's weights and cuts come from: a checkpoint's folder, or a named config with a seed.

    Attributes:
        folder: the checkpoint's; None: `random_init` names a config whose weights are random.
    """

    folder: Path | None
    random_init: str | None
    seed: int
    device: torch.device
    dtype: torch.dtype

    @property
    def config(self) -> ModelArgs:
        return ModelArgs.from_name(self.random_init) if self.folder is None else read_config(self.folder)

    def load(self, cls: type) -> Transformer:
        if self.folder is None:
            return cls.random_init(self.random_init, self.device, self.dtype, self.seed)
        return cls.from_checkpoint(self.folder, self.device, self.dtype)

    def statistics(self, model: SparseTransformer, path: str | None) -> Statistics:
        """Those in the file, else those beside the checkpoint, else new ones."""
        return calibrate_random(model) if self.folder is None else statistics_for(self.folder, path, model)

    def load_cut(self, thresholds: str, sparsity: float, statistics: str | None) -> tuple[SparseTransformer, str]:
        """A model with cuts set, and the rule's name. Wrong options are an error before the weights are loaded."""
        model = None

        def given_statistics() -> Statistics:
            nonlocal model
            model = self.load(SparseTransformer)
            return self.statistics(model, statistics)

        rule, cuts = cuts_for(thresholds, sparsity, self.folder, given_statistics, statistics is not None)
        model = model or self.load(SparseTransformer)
        model.set_cuts(cuts)
        return model, rule


@dataclass
class Prompt:
    """What is generated after: token ids, the text to show before the answer (None: synthetic), an end or none."""

    ids: list[int] = field(default_factory=list)
    shown: str | None = None


def read_prompt(prompt: str | None, tokenizer: Tokenizer | None, config: ModelArgs, seed: int) -> Prompt:
    """The prompt that `--prompt` asks for: a text, a number of synthetic tokens, or by default a question or its start.

    Raises:
        ValueError: an empty prompt, one beyond the context, or a text for a model without a tokenizer.
    """
    # without a prompt: a question through the chat template, if there is one
    if prompt is None and tokenizer is not None:
        ids = tokenizer.encode_chat([{"role": "user", "content": DEFAULT_QUESTION}])
        if ids:
            return Prompt(ids, f"> {DEFAULT_QUESTION}\n\n")
        prompt = DEFAULT_PROMPT
    if prompt is None:
        prompt = str(SYNTHETIC_PROMPT)

    # a number: so many tokens at random
    if prompt.isdecimal():
        count = int(prompt)
        if count < 1:
            raise ValueError("--prompt 0: a prompt needs at least one token")
        if count > config.block_size:
            raise ValueError(f"--prompt {prompt}: {config.name}'s context is {config.block_size} tokens")
        generator = torch.Generator().manual_seed(seed)
        return Prompt(torch.randint(config.vocab_size, (count,), generator=generator).tolist())

    # a text
    if tokenizer is None:
        raise ValueError(f"--random_init has no tokenizer for the prompt {prompt!r}; give a number of tokens")
    ids = tokenizer.encode(prompt, bos=tokenizer.adds_bos)
    if not ids:
        raise ValueError("the prompt is empty; give --prompt some text")
    return Prompt(ids, prompt)


def chat(generator: Generator, tokenizer: Tokenizer, max_new_tokens: int, context: int, seed: int) -> None:
    """Reads prompts from stdin and streams answers until end of file; a chat where the model has a template."""
    torch.manual_seed(seed)
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


def ms_per_step(generations: list[Generation], prompt: Tensor) -> float | None:
    """Median milliseconds per decode step; None where the first token was the last."""
    steps = generations[0].tokens.shape[1] - prompt.shape[1] - 1
    return 1e3 * stats.median(g.decode_s for g in generations) / steps if steps else None


@torch.inference_mode()
def count_kept(model: SparseTransformer, tokens: Tensor, prompt_length: int) -> None:
    """Counts the kept inputs of a generation [B, P + N] in one untimed pass over its tokens, the prompt's dense."""
    model.reset_counts()
    model(tokens[:, :-1], num_logits=1, dense_prefix=prompt_length)


def peak_memory_gb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def write_trace(path: str, generator: Generator, tokens: Tensor, max_new_tokens: int) -> None:
    """A Chrome trace of one generation, written to `path` with .json at its end."""
    with torch.profiler.profile() as profiler:
        generator(tokens, max_new_tokens)
    with atomic_write(path if path.endswith(".json") else f"{path}.json") as temporary:
        profiler.export_chrome_trace(str(temporary))


def answer_of(tokens: Tensor, prompt: Prompt, tokenizer: Tokenizer) -> str:
    """The text of a row's new tokens, up to the first that ends it."""
    new = tokens[len(prompt.ids) :].tolist()
    end = next((i for i, token in enumerate(new) if token in tokenizer.eos_ids), len(new))
    return tokenizer.decode(new[:end], after=prompt.ids)


def report(r: dict, num_samples: int, rule: str, batch_size: int, weights: str, dense_ms: float | None) -> None:
    """Prints what a person wants to know of the numbers in the JSON, what matters most last.

    dense_ms: milliseconds per step of a brief dense run, where there was one.
    """
    print(f"\nModel      {r['model']}, {weights}, {r['dtype']}, on {r['device']}")
    if r["compile_s"] is not None:
        print(f"Compile    {r['compile_s']:.1f} s, not in the speed")

    # bytes, and the sparsity that they come from
    step, rate = "no decode step", ""
    if r["ms_per_token"] is not None:
        step, rate = f"{r['ms_per_token']:.2f} ms per decode step", f" = {r['bandwidth_gbps']:,.1f} GB/s"
    print(f"Memory     {r['bytes_per_token'] / 1e6:,.1f} MB of weights read per step{rate}; peak", end=" ")
    print(f"{r['peak_memory_gb']:.2f} GB")
    if r["sparsity"]:
        achieved = f"{r['achieved_sparsity']:.1%} achieved in decoding" if r["new_tokens"] > 1 else "nothing decoded"
        print(f"Sparsity   {r['sparsity']:.0%} asked for ({rule} thresholds), {achieved}; the prompt is dense")

    # speed, alone and against dense
    batch = f" x {batch_size} rows" if batch_size > 1 else ""
    print(
        f"Speed      {r['tokens_per_sec']:.1f} tokens/s, median of {num_samples} ({r['prompt_tokens']} prompt tokens, "
        f"{r['new_tokens']} new{batch}, sampling included); {step}"
    )
    if "speedup" in r:
        print(
            f"Dense      {r['dense_tokens_per_sec']:.1f} tokens/s ({r['dense_backend']}): speed-up {r['speedup']:.2f}x"
        )
    elif dense_ms and r["ms_per_token"]:
        speedup = dense_ms / r["ms_per_token"]
        print(f"Dense      {dense_ms:.2f} ms per decode step, in one short run: speed-up {speedup:.2f}x")


def report_quality(rule: str, folder: Path | None, sparsity: float) -> None:
    """Prints what the sparsity costs in perplexity, by the cut table's own record."""
    recorded = recorded_perplexity(rule, folder, sparsity)
    if recorded:
        dense, sparse, text = recorded
        print(f"Quality    perplexity {sparse:.2f}, dense {dense:.2f} ({text}, recorded in the cut table)")
    elif folder:
        print("Quality    not recorded for these thresholds; eval.py measures it")


def check_options(options: dict) -> None:
    """Raises ValueError if an option of generate.py is out of its range or does not go with another."""
    if not 0 <= options["sparsity"] < 1:
        raise ValueError(f"--sparsity {options['sparsity']} is outside [0, 1); 0.5 cuts half of the weights")
    for flag in ("num_samples", "max_new_tokens", "batch_size", "top_k"):
        if options[flag] < 1:
            raise ValueError(f"--{flag} {options[flag]} must be at least 1")
    if not options["temperature"] >= 0:
        raise ValueError(f"--temperature {options['temperature']} must be at least 0")
    if options["random_init"] and (options["checkpoint_path"] or options["interactive"]):
        raise ValueError("--random_init has no text to load or to talk: leave out --checkpoint_path and --interactive")


def choose_step(compile: bool, unfused: bool, config: ModelArgs, device: torch.device, rows: int, top_k: int) -> str:
    """The form of the decode step, "fused", "compiled" or "eager"; says on stderr why it is not the one asked for."""
    reason = why_unfused(config, device, rows, top_k)
    if not compile:
        if reason is None:
            print("each operation runs by itself; with --compile a step is 4 times as fast or more", file=sys.stderr)
        return "eager"
    if device.type == "cpu" and cpu.library() is None:
        print("No C++ compiler works here (g++, or CXX): --compile is left out", file=sys.stderr)
        return "eager"
    if reason or unfused:
        print(f"steps go through torch.compile, not the fused step: {reason or '--unfused'}", file=sys.stderr)
        return "compiled"
    return "fused"


def main(
    prompt: str | None = None,
    interactive: bool = False,
    num_samples: int = 5,
    max_new_tokens: int = 200,
    batch_size: int = 1,
    top_k: int = 200,
    temperature: float | None = None,
    checkpoint_path: str | None = None,
    compile: bool = False,
    unfused: bool = False,
    compile_prefill: bool = False,
    profile: str | None = None,
    sparsity: float = 0.0,
    thresholds: str = "best",
    statistics: str | None = None,
    random_init: str | None = None,
    seed: int = 1234,
    compare_dense: bool | None = None,
    deterministic: bool = False,
    json_line: bool = False,
    device: str | None = None,
    precision: str = "bfloat16",
) -> dict:
    """Loads a model, generates `num_samples` times and returns the keys of the JSON line.

    compare_dense: True times the dense model alternately, None in one short run, False not at all.

    Raises:
        ValueError: an argument, a file or a machine that does not do; the message says what would.
    """
    temperature = (CHAT_TEMPERATURE if interactive else TEMPERATURE) if temperature is None else temperature
    check_options(locals())
    torch_device = resolve_device(device)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)

    # what runs, and after which prompt
    folder = None if random_init else resolve_checkpoint(checkpoint_path)
    source = ModelSource(folder, random_init, seed, torch_device, PRECISIONS[precision])
    config = source.config
    tokenizer = load_tokenizer(folder, config.vocab_size) if folder else None
    asked = Prompt() if interactive else read_prompt(prompt, tokenizer, config, seed)
    length = min(config.block_size, CHAT_CONTEXT) if interactive else len(asked.ids) + max_new_tokens
    if length > config.block_size:
        raise ValueError(
            f"a prompt of {len(asked.ids)} tokens and {max_new_tokens} new ones do not fit {config.name}'s context of "
            f"{config.block_size}: shorten the prompt or lower --max_new_tokens"
        )
    rows = 1 if interactive else batch_size
    step = choose_step(compile, unfused, config, torch_device, rows, top_k)

    # dense too goes through our kernels where they run: a speed-up then comes from sparsity alone
    own_kernels = step == "fused" or (torch_device.type == "cpu" and rows == 1 and cpu.library() is not None)
    dense_class = SparseTransformer if own_kernels else Transformer
    rule = "no"
    if sparsity:
        model, rule = source.load_cut(thresholds, sparsity, statistics)
    else:
        model = source.load(dense_class)
    weights = "random weights (normal, std 0.02)" if folder is None else "trained weights"

    if interactive:
        chat(
            Generator(model, 1, length, temperature, top_k, step, compile_prefill, static_prompt=False),
            tokenizer,
            max_new_tokens,
            length,
            seed,
        )
        return {}

    # the model, and the dense one that it is compared with
    options = (batch_size, length, temperature, top_k, step, compile_prefill)
    generators = [Generator(model, *options)]
    if sparsity and (compare_dense or (compare_dense is None and step == "fused")):
        dense_model = model if step == "fused" else source.load(dense_class)
        generators.append(Generator(dense_model, *options, dense=True))
    tokens = torch.tensor(asked.ids, device=torch_device).repeat(batch_size, 1)

    # compile, record the graphs, warm up; then measure
    start = time.perf_counter()
    if step == "compiled" or (step == "fused" and torch_device.type == "cuda"):
        print("compiling (a minute or two on a CPU the first time, cached after)", file=sys.stderr)
    torch.manual_seed(seed)
    measure(generators, tokens, min(max_new_tokens, 5), 1)
    compile_s = time.perf_counter() - start if compile else None
    print(f"generating {num_samples} x {max_new_tokens} tokens", file=sys.stderr)
    torch.manual_seed(seed)
    runs = measure(generators if compare_dense else generators[:1], tokens, max_new_tokens, num_samples)
    brief = generators[1](tokens, min(max_new_tokens, BRIEF_TOKENS)) if len(generators) > len(runs) else None
    if profile:
        write_trace(profile, generators[0], tokens, max_new_tokens)

    # what it cost
    last = runs[0][-1].tokens
    text = answer_of(last[0], asked, tokenizer) if asked.shown is not None else None
    if sparsity:
        count_kept(model, last, len(asked.ids))
    ms, read = ms_per_step(runs[0], tokens), model.bytes_per_step()
    result = {
        "model": config.name,
        "device": torch.cuda.get_device_name(torch_device) if torch_device.type == "cuda" else "cpu",
        "dtype": precision,
        "sparsity": sparsity,
        "achieved_sparsity": model.achieved_sparsity() if sparsity else 0.0,
        "tokens_per_sec": tokens_per_sec(runs[0], tokens),
        "ms_per_token": ms,
        "bytes_per_token": read,
        "bandwidth_gbps": read / ms / 1e6 if ms else None,
        "compile_s": compile_s,
        "peak_memory_gb": peak_memory_gb(torch_device),
        "prompt_tokens": len(asked.ids),
        "new_tokens": max_new_tokens,
        "text": text,
    }
    if compare_dense:
        dense = tokens_per_sec(runs[-1], tokens)
        result |= {
            "dense_tokens_per_sec": dense,
            "speedup": result["tokens_per_sec"] / dense,
            "dense_backend": dense_backend(step, own_kernels, torch_device),
        }

    # say so
    if text is not None:
        print(f"{asked.shown}{text}")
    report(result, num_samples, rule, batch_size, weights, ms_per_step([brief], tokens) if brief else None)
    if sparsity:
        report_quality(rule, folder, sparsity)
    if json_line:
        print(json.dumps(result))
    return result


def dense_backend(step: str, own_kernels: bool, device: torch.device) -> str:
    """How the dense model ran, for the report."""
    if step == "fused":
        kernels = "one C++ call" if device.type == "cpu" else "one CUDA graph"
        return f"the sparse kernels without the threshold test, {kernels} per step"
    return ("the sparse kernel at threshold 0" if own_kernels else "torch linear") + ", compiled" * (step == "compiled")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", help="text, or a number of tokens of a synthetic prompt; default: a question")
    parser.add_argument("--interactive", action="store_true", help="chat")
    parser.add_argument("--num_samples", type=int, default=5)
    parser.add_argument("--max_new_tokens", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=1, help="rows; each cuts its own inputs")
    parser.add_argument("--top_k", type=int, default=200)
    cooler = f"0 is greedy; default: {TEMPERATURE}, in a chat {CHAT_TEMPERATURE}"
    parser.add_argument("--temperature", type=float, help=cooler)
    parser.add_argument(
        "--checkpoint_path", help="a checkpoint's folder or a file in it; default: SmolLM2-135M-Instruct"
    )
    parser.add_argument("--compile", action="store_true", help="fused decode steps: CUDA graphs, or C++ on a CPU")
    parser.add_argument("--unfused", action="store_true", help="with --compile: torch.compile in place of fused steps")
    parser.add_argument("--compile_prefill", action="store_true", help="torch.compile the prompt's pass too")
    parser.add_argument("--profile", metavar="FILE", help="write a Chrome trace of one generation")
    parser.add_argument("--sparsity", type=float, default=0.0, help="share of the weights to cut, 0 <= F < 1")
    parser.add_argument("--thresholds", default="best", help="best, uniform, greedy, refined or a cut table's file")
    parser.add_argument("--statistics", metavar="FILE", help="default: calibration.safetensors beside the checkpoint")
    parser.add_argument("--random_init", metavar="NAME", help="a named config with random weights, e.g. llama-3-8b")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument(
        "--compare_dense", action=argparse.BooleanOptionalAction, help="time the dense model too, alternated"
    )
    parser.add_argument("--deterministic", action="store_true", help="the same tokens run to run on a GPU, slower")
    parser.add_argument("--json", dest="json_line", action="store_true", help="a last line of JSON")
    add_device_arguments(parser)
    refuse_old_flags(parser, {"--allocation": "--thresholds {best,uniform,greedy,refined,FILE}"})
    return parser.parse_args()


if __name__ == "__main__":
    command_line(main, parse_arguments())
