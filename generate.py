"""Generates text and says what it cost: tokens/s, achieved sparsity, bytes read per token, bandwidth.

python generate.py --sparsity 0.5 --compile                          # the default model, fetched on first use
python generate.py --sparsity 0.5 --compile --checkpoint_path checkpoints/ORG/NAME --compare_dense
python generate.py --sparsity 0.5 --compile --random_init llama-3-8b # latency alone, random weights
python generate.py --sparsity 0.5 --compile --prompts FILE           # a prompt per line, each a row of one batch
python generate.py --sparsity 0.4 --compile --interactive            # a chat
python generate.py --draft self --compile                            # the same text in less time, guessed ahead

Samples of a run repeat the same draws, so that only their time differs. Row r of a batch draws with --seed + r. In JSON
`text` is of the last sample's first row, and `prompt_tokens` counts its prompt; with --prompts both are lists of rows.
"""

import options

if __name__ == "__main__":
    options.run_script("generate")

import argparse
import json
import resource
import statistics as stats
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice, takewhile
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import tp
from calibrate import calibrate_random, statistics_for
from cli import placement
from decoder import FusedCpuStep, Generation, Generator, why_unfused
from formats.default_model import resolve_checkpoint
from formats.files import atomic_write, shown
from formats.text import read_text
from kernels import cpu
from model import ModelArgs, Transformer, read_config
from sparse_model import SparseTransformer
from speculate import MAX_DRAFTS, DraftingGenerator, acceptance, same_weights
from thresholds import STATISTICS_NAME, Cuts, Statistics, cuts_for, recorded_perplexity
from tokenizer import Tokenizer, load_tokenizer

DEFAULT_QUESTION = "How do plants make their food?"  # where the model has a chat template
DEFAULT_PROMPT = "Plants make their food by"  # where it has none
SYNTHETIC_PROMPT = 6  # tokens of the prompt where weights are random
CHAT_CONTEXT = 4096  # positions of the cache in a chat; unfused attention reads all of them at every token
WARM_UP_TOKENS = 5  # new ones
BRIEF_TOKENS, BRIEF_RUNS = 32, 3  # of each model, where --compare_dense neither asks for the dense one nor forbids it


@dataclass
class ModelSource:
    """Where a model's weights and cuts come from: the checkpoint in `folder`, else the named config `random_init`."""

    device: torch.device
    dtype: torch.dtype
    folder: Path | None = None
    random_init: str | None = None
    seed: int = 1234  # of random weights

    @property
    def config(self) -> ModelArgs:
        return ModelArgs.from_name(self.random_init) if self.folder is None else read_config(self.folder)

    @cached_property
    def sparse_model(self) -> SparseTransformer:
        return self.load(SparseTransformer)

    def load(self, cls: type) -> Transformer:
        cls = tp.RankTransformer if tp.count() > 1 else cls
        if self.folder is None:
            return cls.random_init(self.random_init, self.device, self.dtype, self.seed)
        return cls.from_checkpoint(self.folder, self.device, self.dtype)

    def statistics(self, path: Path | None = None) -> Statistics:
        """Those in the file, else those beside the checkpoint, else new ones; of random weights always new ones."""
        if self.folder is None:
            return calibrate_random(self.sparse_model)
        if tp.count() > 1 and not (path or self.folder / STATISTICS_NAME).is_file():
            raise ValueError(f"ranks make no statistics; run python calibrate.py --checkpoint_path {self.folder}")
        return statistics_for(self.folder, path, self.sparse_model)

    def cut_model(self, o: argparse.Namespace) -> tuple[SparseTransformer, str]:
        """`sparse_model` with the cuts that the options ask for, and the rule's name. Raises as `cuts_for` does."""
        rule, cuts = self.cuts(o.sparsity, o.thresholds, o.statistics)
        self.sparse_model.set_cuts(cuts)
        return self.sparse_model, rule

    def cuts(self, sparsity: float, thresholds: str = "best", statistics: Path | None = None) -> tuple[str, Cuts]:
        given = statistics is not None
        return cuts_for(thresholds, sparsity, self.folder, lambda: self.statistics(statistics), given)


@dataclass
class Prompt:
    ids: list[int]
    shown: str | None = None  # the text to show before the answer; None: synthetic


def read_prompt(prompt: str | None, tokenizer: Tokenizer | None, config: ModelArgs, seed: int) -> Prompt:
    """What `--prompt` asks for: a text, a number of synthetic tokens, by default a question or a text to continue.

    Raises ValueError for an empty prompt, one beyond the context, or a text for a model without a tokenizer.
    """
    # without a prompt: a question through the chat template, if there is one
    if prompt is None:
        ids = tokenizer and tokenizer.encode_chat([{"role": "user", "content": DEFAULT_QUESTION}])
        if ids:
            return Prompt(ids, f"> {DEFAULT_QUESTION}\n\n")
        prompt = DEFAULT_PROMPT if tokenizer else str(SYNTHETIC_PROMPT)

    # a number: so many tokens at random
    if prompt.isascii() and prompt.isdecimal():
        count = int(prompt[:18])
        if count < 1:
            raise ValueError("--prompt 0: a prompt needs at least one token")
        if count > config.block_size or len(prompt) > 18:
            raise ValueError(f"--prompt {shown(prompt)}: {config.name}'s context is {config.block_size} tokens")
        generator = torch.Generator().manual_seed(seed)
        return Prompt(torch.randint(config.vocab_size, (count,), generator=generator).tolist())

    return text_prompt(prompt, tokenizer)


def text_prompt(text: str, tokenizer: Tokenizer | None) -> Prompt:
    if tokenizer is None:
        raise ValueError(f"--random_init has no tokenizer for the prompt {shown(text)}; give a number of tokens")
    ids = tokenizer.encode(text, bos=tokenizer.adds_bos)
    if not ids:
        raise ValueError("the prompt is empty; give --prompt some text")
    return Prompt(ids, text)


def read_prompts(o: argparse.Namespace, tokenizer: Tokenizer | None, config: ModelArgs) -> list[Prompt]:
    """The prompt of each row; synthetic ones differ, as their seeds do. Raises ValueError as `read_prompt` does."""
    if o.interactive:
        return [Prompt([0] * SYNTHETIC_PROMPT)]
    if o.prompts is None:
        return [read_prompt(o.prompt, tokenizer, config, o.seed + row) for row in range(o.batch_size)]
    lines = (line.rstrip("\n") for line in read_text(o.prompts, lines=True) if line.strip())
    lines = list(islice(lines, options.MAX_BATCH + 1))
    if not 1 <= len(lines) <= options.MAX_BATCH:
        count = "no prompt" if not lines else f"over {options.MAX_BATCH} prompts"
        raise ValueError(f"{shown(o.prompts)} has {count}; each line that is not blank is a prompt")
    return [text_prompt(line, tokenizer) for line in lines]


def cache_length(prompts: list[Prompt], o: argparse.Namespace, config: ModelArgs) -> int:
    """Positions of the cache. Raises ValueError if they exceed the model's context."""
    if o.interactive:
        return min(config.block_size - spare_positions(o), CHAT_CONTEXT)
    longest = max(len(prompt.ids) for prompt in prompts)
    length = longest + o.max_new_tokens
    if length + spare_positions(o) > config.block_size:
        guesses = f", with room for {spare_positions(o)} guesses," if o.draft else ""
        both = f"a prompt of {longest} tokens and {o.max_new_tokens} new ones{guesses}"
        advice = "shorten the prompt or lower --max_new_tokens"
        raise ValueError(f"{both} do not fit {config.name}'s context of {config.block_size}: {advice}")
    return length


def spare_positions(o: argparse.Namespace) -> int:
    """Positions of the cache that guesses need behind the text."""
    return (o.speculate_k or MAX_DRAFTS) if o.draft else 0


def choose_step(o: argparse.Namespace, config: ModelArgs, device: torch.device, one_length: bool = True) -> str:
    """The form of the decode step, "fused", "compiled" or "eager"; says on stderr why it is not fused.

    Raises ValueError if it is not, though prompts are not of `one_length`, or there is a draft.
    """
    if device.type == "cpu" and cpu.find_compiler() and not any(cpu.cache_folder().glob("*.so")):
        print("building the C++ kernels for this CPU, once (some 15 s)", file=sys.stderr)
    reason = why_unfused(config, device, o.batch_size, o.top_k)
    if not one_length and (reason or o.unfused or not o.compile):
        why = reason or "give --compile and leave out --unfused"
        raise ValueError(f"--prompts of different lengths (in tokens) need fused steps: {why}")
    who = "torchrun" if tp.count() > 1 else "--draft" if o.draft else None
    if reason and who:
        raise ValueError(f"{who} needs fused steps: {reason}")
    if (o.compile or o.compile_prefill) and device.type == "cpu" and cpu.library() is None:
        print("--compile is ignored: it needs a C++ compiler that works (g++ 12 or newer, or $CXX)", file=sys.stderr)
        o.compile = o.compile_prefill = False
    if o.compile and (reason or o.unfused):
        print(f"steps go through torch.compile: {reason or '--unfused'}", file=sys.stderr)
        return "compiled"
    if not o.compile and reason is None:
        fused = "one C++ call" if device.type == "cpu" else "one CUDA graph"
        gain = f"with --compile it is {fused}, which makes small models several times as fast"
        print(f"a step runs operation by operation; {gain}", file=sys.stderr)
    return "fused" if o.compile else "eager"


def load_generators(
    o: argparse.Namespace, source: ModelSource, length: int, step: str, static_prompt: bool
) -> tuple[list[Generator], str]:
    """The model's Generator and, where a run compares, one of the dense model; and the name of the cuts' rule."""
    # where our kernels run, the dense model runs them too: a speed-up then comes from sparsity alone
    ours = step == "fused" or (source.device.type == "cpu" and o.batch_size == 1 and cpu.library() is not None)
    dense_class = SparseTransformer if ours else Transformer
    dense_model = source.sparse_model if o.draft else None if o.sparsity else source.load(dense_class)
    model, rule = source.cut_model(o) if o.sparsity else (dense_model, "no")
    options = {"step": step, "compile_prefill": o.compile_prefill, "static_prompt": static_prompt, "seed": o.seed}
    options["spare"], sizes = spare_positions(o), (o.batch_size, length, o.temperature, o.top_k)
    make = partial(DraftingGenerator, draft=draft_model(o, source), speculate_k=o.speculate_k) if o.draft else Generator
    generators = [make(model, *sizes, **options)]
    wanted = step == "fused" if o.compare_dense is None else o.compare_dense
    if (o.sparsity or o.draft) and wanted and not o.interactive:
        dense_model = model if step == "fused" else source.load(dense_class)
        generators.append(Generator(dense_model, *sizes, **options, dense=True))
    return generators, rule


def draft_model(o: argparse.Namespace, source: ModelSource) -> SparseTransformer | None:
    """What `--draft` guesses with, cut at `--draft_sparsity`; None: no model. Raises ValueError for one that cannot."""
    if o.draft == "prompt":
        return None
    if o.draft == "self":
        draft, cuts = same_weights(source.sparse_model), (o.draft_sparsity, o.thresholds, o.statistics)
    else:
        source = ModelSource(source.device, source.dtype, check_draft(o, source))
        draft, cuts = source.sparse_model, (o.draft_sparsity,)
    if o.draft_sparsity:
        draft.set_cuts(source.cuts(*cuts)[1])
    return draft


def check_draft(o: argparse.Namespace, source: ModelSource) -> Path:
    """The folder of the checkpoint `--draft`. Raises ValueError if it has another vocabulary, or no fused step."""
    folder = resolve_checkpoint(Path(o.draft))
    config, vocab = read_config(folder), source.config.vocab_size
    if reason := why_unfused(config, source.device, 1, o.top_k):
        raise ValueError(f"--draft {shown(folder)} cannot guess: {reason}")
    other = f"--draft {shown(folder)} has another vocabulary than {source.config.name}"
    if config.vocab_size != vocab:
        raise ValueError(f"{other}, of {config.vocab_size} tokens, not {vocab}")
    ours, theirs = (load_tokenizer(f, vocab).token_bytes for f in (source.folder or folder, folder))
    if (i := next((i for i in range(vocab) if ours(i) != theirs(i)), None)) is not None:
        raise ValueError(f"{other}: token {i} is {theirs(i)}, not {ours(i)}")
    return folder


def dense_backend(step: str, dense_model: Transformer) -> str:
    if step == "fused":
        kernels = "one C++ call" if dense_model.device.type == "cpu" else "one CUDA graph"
        return f"the sparse kernels without the threshold test, {kernels} per step"
    ours = isinstance(dense_model, SparseTransformer)
    return ("the sparse kernel at threshold 0" if ours else "torch linear") + ", compiled" * (step == "compiled")


def chat(generator: Generator, tokenizer: Tokenizer, max_new_tokens: int, context: int) -> None:
    """Reads prompts from stdin and streams answers until end of file; a chat where the model has a template."""
    messages: list[dict[str, str]] = []
    while True:
        try:
            text = input("\nYour prompt: ")
        except (EOFError, KeyboardInterrupt):
            print()
            return

        # the whole chat through the template, or the prompt alone; a message that does not go is left out
        try:
            ids = tokenizer.encode_chat([*messages, {"role": "user", "content": text}])
            stream = tokenizer.stream()
            if ids is None:
                ids = tokenizer.encode(text, bos=tokenizer.adds_bos)
                stream = tokenizer.stream(after=ids)
        except ValueError as error:
            print(error)
            continue
        room = context - len(ids)
        if room < 1:
            print(f"{len(ids)} tokens do not fit the chat's context of {context}; the message is left out")
        if not ids or room < 1:
            continue

        # the answer, token by token
        pieces: list[str] = []

        def show(token: Tensor, stream=stream, pieces=pieces) -> None:
            pieces.append("" if token.item() in tokenizer.eos_ids else stream.push(token.item()))
            print(pieces[-1], end="", flush=True)

        start = time.perf_counter()
        prompt = torch.tensor([ids], device=generator.device)
        with suppress(KeyboardInterrupt):  # Ctrl-C ends the answer, not the chat
            generator(prompt, min(max_new_tokens, room), show, tokenizer.eos_ids)
        new, seconds = len(pieces), time.perf_counter() - start
        pieces.append(stream.flush())
        print(pieces[-1])
        print(f"[{new} tokens, {new / seconds:.1f} tokens/s]")
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": "".join(pieces)}]


def measure(generators: list[Generator], prompts: list[Tensor], new_tokens: int, count: int) -> list[list[Generation]]:
    """`count` generations of each generator, alternated so that a drift of the machine meets all alike."""
    rounds = [[generator(prompts, new_tokens) for generator in generators] for _ in range(count)]
    return [list(generations) for generations in zip(*rounds, strict=True)]


def warm_up(generators: list[Generator], prompts: list[Tensor], o: argparse.Namespace, step: str) -> float | None:
    """Compiles and records the graphs; the seconds that it took, None where steps run operation by operation."""
    start = time.perf_counter()
    if o.compile_prefill or step == "compiled" or (step == "fused" and prompts[0].is_cuda):
        print("compiling (a minute or two the first time, cached after)", file=sys.stderr)
    measure(generators, prompts, min(o.max_new_tokens, WARM_UP_TOKENS), 1)
    return None if step == "eager" else time.perf_counter() - start


def tokens_per_sec(generations: list[Generation]) -> float:
    """Median over the generations of new tokens (of all rows) / wall time, prefill included."""
    return stats.median(g.new.numel() / g.total_s for g in generations)


def ms_per_step(generations: list[Generation]) -> float | None:
    """Median milliseconds per decode step; None where the first token was the last."""
    steps = generations[0].new.shape[1] - 1
    return 1e3 * stats.median(g.decode_s for g in generations) / steps if steps else None


@torch.inference_mode()
def count_kept(model: SparseTransformer, generation: Generation) -> None:
    """Counts the kept inputs of a generation's steps in one untimed pass over its tokens, the prompts' dense."""
    model.reset_counts()
    rows = [torch.cat((prompt, new[:-1])) for prompt, new in zip(generation.prompts, generation.new, strict=True)]
    prefixes = [len(prompt) for prompt in generation.prompts]
    prefix = prefixes if len(set(prefixes)) > 1 else prefixes[0]
    model(pad_sequence(rows, batch_first=True), num_logits=1, dense_prefix=prefix)


def write_trace(path: Path, generator: Generator, prompts: list[Tensor], max_new_tokens: int) -> None:
    """A Chrome trace of one generation, written to `path` with .json at its end."""
    with torch.profiler.profile() as profiler:
        generator(prompts, max_new_tokens)
    if tp.rank() > 0:
        return
    with atomic_write(path if path.suffix == ".json" else f"{path}.json") as temporary:
        profiler.export_chrome_trace(str(temporary))


def answer_of(new: list[int], prompt: Prompt, tokenizer: Tokenizer) -> str:
    """The text of a row's new tokens, up to the first that ends it."""
    return tokenizer.decode(takewhile(lambda token: token not in tokenizer.eos_ids, new), after=prompt.ids)


def peak_memory_gb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def summary(o: argparse.Namespace, step: str, generators: list[Generator], runs: list[list[Generation]]) -> dict:
    """The keys of the JSON line, but for compile_s and text; runs are those of the model and of the dense one."""
    model, device = generators[0].model, generators[0].device
    if o.sparsity:
        count_kept(model, runs[0][-1])
    speed, ms, read = tokens_per_sec(runs[0]), ms_per_step(runs[0]), model.bytes_per_step()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    result = {"model": model.config.name, "device": name, "dtype": o.precision, "sparsity": o.sparsity}
    result |= {"achieved_sparsity": model.achieved_sparsity() if o.sparsity else 0.0, "tokens_per_sec": speed}
    result |= {"ms_per_token": ms, "ttft_ms": 1e3 * stats.median(g.total_s - g.decode_s for g in runs[0])}
    result |= {"bytes_per_token": read, "bandwidth_gbps": read / ms / 1e6 if ms and not o.draft else None}
    lengths = [len(prompt) for prompt in runs[0][-1].prompts]
    result |= {"peak_memory_gb": peak_memory_gb(device), "prompt_tokens": lengths if o.prompts else lengths[0]}
    result |= {"new_tokens": o.max_new_tokens, "batch": o.batch_size, "ranks": tp.count()}
    if o.draft:
        rounds = [r for g in runs[0] for r in g.rounds]
        result |= {"draft": o.draft, "speculate_k": o.speculate_k} | acceptance(rounds)
        result["tokens_per_round"] = sum(g.new.shape[1] - 1 for g in runs[0]) / max(len(rounds), 1)
    if o.compare_dense:
        dense, backend = tokens_per_sec(runs[-1]), dense_backend(step, generators[-1].model)
        result |= {"dense_tokens_per_sec": dense, "speedup": speed / dense, "dense_backend": backend}
    return result


def report(r: dict, o: argparse.Namespace, step: str, rule: str, brief: list[float | None]) -> None:
    """Prints the JSON's numbers for a person. brief: ms per step of the model and of the dense one in short runs."""
    # what ran
    weights = "random weights (normal, std 0.02)" if o.random_init else "trained weights"
    compiled = "" if r["compile_s"] is None else f"; compiled in {r['compile_s']:.1f} s, not in the speed"
    device = r["device"] + f" x {r['ranks']} ranks" * (r["ranks"] > 1)
    print(f"\nModel      {r['model']}, {weights}, {r['dtype']}, on {device}, {step} steps{compiled}")

    # speed, alone and against dense
    per_step, rate = "no decode step", ""
    if r["ms_per_token"] is not None:
        per_step = f"{r['ms_per_token']:.2f} ms per {'token' if o.draft else 'decode step'}"
        rate = f" = {r['bandwidth_gbps']:,.1f} GB/s" if r["bandwidth_gbps"] else ""
    many = r["batch"] > 1
    rows, per_row = f" x {r['batch']} rows" * many, f" ({r['tokens_per_sec'] / r['batch']:.1f} per row)" * many
    lengths = r["prompt_tokens"] if o.prompts else [r["prompt_tokens"]]
    prompt = " to ".join(map(str, sorted({min(lengths), max(lengths)})))
    counts = f"{prompt} prompt tokens, {r['new_tokens']} new{rows}, sampling included"
    print(f"Speed      {r['tokens_per_sec']:.1f} tokens/s{per_row}, median of {o.num_samples} ({counts}); {per_step}")
    print(f"First      {r['ttft_ms']:.1f} ms from the call to the first token{' of every row' * many}")
    if "speedup" in r:
        dense = f"{r['dense_tokens_per_sec']:.1f} tokens/s ({r['dense_backend']})"
        print(f"Dense      {dense}: speed-up {r['speedup']:.2f}x")
    elif brief and all(brief):
        ours, dense = brief
        this = "this run took {:.2f} per token" if o.draft else "sparse took {:.2f}"
        print(f"Dense      {dense:.2f} ms per decode step, where {this.format(ours)}: speed-up {dense / ours:.2f}x")

    # what was guessed
    if o.draft:
        kind = o.draft if o.draft == "prompt" else f"{o.draft} at {o.draft_sparsity:.0%}"
        asked = f"{o.speculate_k} guesses per round" if o.speculate_k else "as many guesses per round as pay"
        shares = " ".join(f"{share:.0%}" for share in r["accepted_by_position"])
        right = f"{r['accept_rate']:.0%} accepted (by position {shares or '-'})"
        print(f"Draft      {kind}, {asked}: {right}, {r['tokens_per_round']:.2f} tokens per round")

    # bytes, and the sparsity that they come from
    megabytes = r["bytes_per_token"] / 1e6
    print(f"Memory     {megabytes:,.1f} MB of weights read per step{rate}; peak {r['peak_memory_gb']:.2f} GB")
    if o.sparsity:
        achieved = f"{r['achieved_sparsity']:.1%} achieved in decoding" if r["new_tokens"] > 1 else "nothing decoded"
        print(f"Sparsity   {o.sparsity:.0%} asked for ({rule} thresholds), {achieved}; the prompt is dense")


def report_quality(rule: str, folder: Path, sparsity: float) -> None:
    recorded = recorded_perplexity(rule, folder, sparsity)
    quality = "not recorded for these thresholds; eval.py measures it"
    if recorded:
        quality = "perplexity {1:.2f}, dense {0:.2f} ({2}, recorded in the cut table)".format(*recorded)
    print(f"Quality    {quality}")


def main(argv: list[str] | None = None) -> dict:
    """Generates and says what it cost; returns the JSON line's keys, none of a chat. A mistake raises ValueError."""
    o = options.generate(argv)
    if o.interactive and sys.stdin is None:
        raise ValueError("--interactive reads stdin, which is closed")
    tp.start(o.device, o.reduce)
    folder = None if o.random_init else resolve_checkpoint(o.checkpoint_path)
    source = ModelSource(*placement(o), folder, o.random_init, o.seed)

    if o.threads and source.device.type != "cpu":
        raise ValueError(f"--threads has no effect on {source.device}; it is for --device cpu")
    if o.threads:
        torch.set_num_threads(o.threads)
    FusedCpuStep.adaptive = not o.threads

    # the prompt, the form of a step, the models
    tokenizer = load_tokenizer(folder, source.config.vocab_size) if folder else None
    asked = read_prompts(o, tokenizer, source.config)
    o.batch_size, length = len(asked), cache_length(asked, o, source.config)
    one_length = len({len(prompt.ids) for prompt in asked}) == 1
    step = choose_step(o, source.config, source.device, one_length)
    generators, rule = load_generators(o, source, length, step, static_prompt=one_length and not o.interactive)

    # compile, then chat or measure
    prompts = [torch.tensor(prompt.ids, device=source.device) for prompt in asked]
    compile_s = warm_up(generators, prompts, o, step)
    if o.interactive:
        chat(generators[0], tokenizer, o.max_new_tokens, length)
        return {}
    print(f"generating {o.num_samples} x {o.max_new_tokens} tokens", file=sys.stderr)
    brief_tokens = min(BRIEF_TOKENS, o.max_new_tokens)
    runs = measure(generators if o.compare_dense else generators[:1], prompts, o.max_new_tokens, o.num_samples)
    brief = [] if len(runs) == len(generators) else measure(generators, prompts, brief_tokens, BRIEF_RUNS)
    if o.profile:
        write_trace(o.profile, generators[0], prompts, o.max_new_tokens)

    # say what came out and what it cost
    if any(generator.left_grid for generator in generators):
        print("a sum grew beyond its grid: another run may give other tokens", file=sys.stderr)
    result = summary(o, step, generators, runs) | {"compile_s": compile_s, "text": None}
    if asked[0].shown is not None:
        asked = asked if o.prompts else asked[:1]
        new = runs[0][-1].new.tolist()
        texts = [answer_of(tokens, prompt, tokenizer) for tokens, prompt in zip(new, asked, strict=False)]
        result["text"] = texts if o.prompts else texts[0]
        print("\n\n".join(f"{prompt.shown}{text}" for prompt, text in zip(asked, texts, strict=True)))
    report(result, o, step, rule, [ms_per_step(generations) for generations in brief])
    if o.sparsity and folder:
        report_quality(rule, folder, o.sparsity)
    if o.json:
        print(json.dumps(result))
    return result
