"""Perplexity and task scores of a checkpoint, dense or sparse, on the very model class that generate.py runs.

    python eval.py --tasks wikitext --data wiki.test.raw                   # the default model, dense
    python eval.py --tasks wikitext --data wiki.test.raw --sparsity 0.5    # the last 99 % of every window cut
    python eval.py --data text.txt --sparsity 0.5 --sparse_fraction 0.5    # the paper's protocol: the last half cut
    python eval.py --tasks arc_challenge,piqa --sparsity 0.5               # the LM evaluation harness, see harness.py

The text is tokenised once, no bos added. Window i of num_windows starts at token int(i * (tokens - context - window) /
num_windows) and is context + window tokens long; the loss is the mean over the last `window` tokens of every window,
each predicted from those before it in the window.
"""

import argparse
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from cli import PRECISIONS, add_device_arguments, add_sparsity_arguments, command_line, resolve_device
from formats.default_model import resolve_checkpoint
from formats.text import task_text
from generate import ModelSource
from model import Transformer
from tokenizer import Tokenizer, load_tokenizer

TASKS = ("perplexity", "wikitext")
GPU_WINDOWS = 4  # windows a forward pass on a GPU; logits are 4 x 512 x vocabulary in float32


def window_starts(num_tokens: int, context: int, window: int, num_windows: int) -> list[int]:
    """First token of every window. Raises ValueError if not one fits or a length is below 1."""
    if min(context, window, num_windows) < 1:
        raise ValueError(f"--context {context}, --window {window} and --num_windows {num_windows} must be at least 1")
    if num_tokens < context + window:
        short = f"the text has {num_tokens} tokens, a window {context} + {window}"
        raise ValueError(f"{short}; give a longer text, or less --context")
    return [int(i * (num_tokens - context - window) / num_windows) for i in range(num_windows)]


@torch.no_grad()
def perplexity(
    model: Transformer, tokens: Tensor, context: int, window: int, num_windows: int, dense_prefix: int | None = None
) -> float:
    """Perplexity of `tokens` [num_tokens] (int64) by the protocol above, with log-softmax in float32.

    A SparseTransformer cuts positions [dense_prefix:] of every window and counts them anew; None is dense.
    Raises ValueError for a window beyond the text or the model's context, and for logits that are not finite.
    """
    if context + window > model.config.block_size:
        raise ValueError(f"windows of {context} + {window} tokens exceed the model's context {model.config.block_size}")
    starts = window_starts(len(tokens), context, window, num_windows)
    windows = torch.stack([tokens[i : i + context + window] for i in starts])
    options = {} if dense_prefix is None else {"dense_prefix": dense_prefix}
    if options:
        model.reset_counts()

    loss, seen, device = 0.0, 0, model.device
    with tqdm(total=num_windows, desc="evaluating", unit="window") as progress:
        for batch in windows.split(GPU_WINDOWS if device.type == "cuda" else 1):
            batch = batch.to(device)
            logits = model(batch[:, :-1], num_logits=window, **options)
            losses = F.cross_entropy(logits.flatten(0, 1).float(), batch[:, -window:].flatten(), reduction="none")
            loss, seen = loss + losses.double().sum().item(), seen + losses.numel()
            progress.set_postfix_str(f"perplexity {math.exp(loss / seen):.4f}")
            progress.update(len(batch))
    if not math.isfinite(loss):
        raise ValueError("the model's output is not finite; choose another --precision")
    return math.exp(loss / seen)


def evaluate_text(o: argparse.Namespace, model: Transformer, tokens: Tensor) -> tuple[dict, str]:
    """Measures and prints a perplexity; returns its JSON keys, and what was left dense."""
    dense_prefix = round((o.context + o.window) * (1 - o.sparse_fraction)) if o.sparsity else None
    value = perplexity(model, tokens, o.context, o.window, o.num_windows, dense_prefix)
    counted = o.num_windows * o.window
    print(f"{o.tasks} of {model.config.name}, {o.precision} on {o.device}: perplexity {value:.4f}")
    print(f"over {counted} tokens: {o.num_windows} windows of {o.context} + {o.window}")
    return {"perplexity": value, "tokens": counted}, f"the first {dense_prefix} tokens of every window are dense"


def evaluate_tasks(o: argparse.Namespace, model: Transformer, tokenizer: Tokenizer) -> tuple[dict, str]:
    """Scores and prints tasks of lm-eval; returns the JSON key `results`, and what was left dense."""
    import harness

    runner = harness.HarnessModel(model, tokenizer, o.sparse_fraction if o.sparsity else None, o.batch_size)
    results = {}
    for name in o.tasks.split(","):
        results |= harness.evaluate(runner, name, o.data, o.num_fewshot, o.limit)
    print(f"{model.config.name}, {o.precision} on {o.device}")
    for name, scores in results.items():
        print(f"{name}: " + ", ".join(f"{metric} {value:.4f}" for metric, value in scores.items()))
    return {"results": results}, f"the first {1 - o.sparse_fraction:.0%} of every input are dense"


def main(argv: list[str] | None = None) -> dict:
    """Evaluates and prints; returns what --json prints. Raises ValueError for a user's mistake."""
    o = parse_arguments(argv)
    device, text = resolve_device(o.device), task_text(o.tasks, o.data) if o.tasks in TASKS else None
    source = ModelSource(device, PRECISIONS[o.precision], resolve_checkpoint(o.checkpoint_path))

    # a text that is too short is an error before anything is made
    tokenizer = load_tokenizer(source.folder, source.config.vocab_size)
    if text is not None:
        tokens = torch.tensor(tokenizer.encode(text))
        window_starts(len(tokens), o.context, o.window, o.num_windows)

    model, rule = source.cut_model(o) if o.sparsity else (source.load(Transformer), "none")
    found, dense_part = evaluate_tasks(o, model, tokenizer) if text is None else evaluate_text(o, model, tokens)
    achieved = model.achieved_sparsity() if o.sparsity else 0.0
    if o.sparsity:
        asked = f"sparsity {o.sparsity:.0%} asked for ({rule} thresholds), {achieved:.1%} achieved"
        print(f"{asked}; {dense_part}, the rest is cut")

    result = {"task": o.tasks, "model": model.config.name} | found | {"sparsity": o.sparsity}
    result |= {"achieved_sparsity": achieved, "thresholds": rule, "sparse_fraction": o.sparse_fraction}
    if o.json:
        print(json.dumps(result))
    return result


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The options. Raises ValueError if one is out of its range, does not go with another, or needs lm-eval."""
    parser = argparse.ArgumentParser(description="Measure a checkpoint, dense or sparse: perplexity or tasks.")
    add_sparsity_arguments(parser)
    add_device_arguments(parser)
    tasks_help = "perplexity, wikitext, or lm-eval's names or task files (comma between)"
    parser.add_argument("--tasks", default="perplexity", help=tasks_help)
    parser.add_argument("--data", type=Path, metavar="FILE", help="the text; of a task file, the .jsonl to read")
    add_protocol_arguments(parser)
    parser.add_argument("--num_fewshot", type=int, help="examples before a task's question (default: as in the paper)")
    parser.add_argument("--limit", type=int, help="only so many documents of a task")
    parser.add_argument("--batch_size", type=int, default=8, help="requests of a task at once")
    o = parser.parse_args(argv)

    # ranges
    if not 0 <= o.sparsity < 1:
        raise ValueError(f"--sparsity {o.sparsity} is outside [0, 1)")
    if not 0 < o.sparse_fraction <= 1:
        raise ValueError(f"--sparse_fraction {o.sparse_fraction} is outside (0, 1]")
    for flag in ("batch_size", "limit"):
        if getattr(o, flag) is not None and getattr(o, flag) < 1:
            raise ValueError(f"--{flag} {getattr(o, flag)} must be at least 1")
    if o.tasks in TASKS:
        return o

    # tasks of the harness
    named = o.tasks.split(",")
    if mixed := [name for name in named if name in TASKS]:
        raise ValueError(f"--tasks {o.tasks}: {mixed[0]} is a run of its own; leave out the others")
    if o.data is not None and not all(name.endswith((".yaml", ".yml")) for name in named):
        raise ValueError(f"--data is the text of perplexity and of task files; {o.tasks} has data of its own")
    try:
        import harness  # noqa: F401
    except ImportError as error:
        needs = f"--tasks {o.tasks}: perplexity and wikitext need nothing more, others lm-eval"
        raise ValueError(f"{needs} (pip install -r requirements-dev.txt): {error}") from None
    return o


def add_protocol_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the windows of a perplexity, and the share of a window that is cut."""
    parser.add_argument("--sparse_fraction", type=float, default=0.99, help="share of a window that is cut, its end")
    parser.add_argument("--context", type=int, default=2048, help="tokens of a window without loss")
    parser.add_argument("--window", type=int, default=512, help="tokens of a window with loss")
    parser.add_argument("--num_windows", type=int, default=128)


if __name__ == "__main__":
    command_line(main)
