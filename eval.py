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

from calibrate import statistics_for
from cli import PRECISIONS, add_device_arguments, command_line, refuse_old_flags, resolve_device
from formats.default_model import resolve_checkpoint
from formats.text import task_text
from model import Transformer, read_config
from sparse_model import SparseTransformer
from thresholds import Statistics, cuts_for
from tokenizer import load_tokenizer

TASKS = ("perplexity", "wikitext")
GPU_WINDOWS = 4  # windows a forward pass on a GPU; logits are 4 x 512 x vocabulary in float32


def window_starts(num_tokens: int, context: int, window: int, num_windows: int) -> list[int]:
    """First token of every window. Raises ValueError if not one fits or a length is below 1."""
    if min(context, window, num_windows) < 1:
        raise ValueError(f"--context {context}, --window {window} and --num_windows {num_windows} must be at least 1")
    if num_tokens < context + window:
        raise ValueError(
            f"the text has {num_tokens} tokens, a window {context} + {window}; give a longer text, or less --context"
        )
    return [int(i * (num_tokens - context - window) / num_windows) for i in range(num_windows)]


def load_harness(tasks: str):
    """The module `harness`, with which `tasks` are evaluated. Raises ValueError if lm-eval is not installed."""
    try:
        import harness
    except ImportError as error:
        raise ValueError(
            f"--tasks {tasks}: perplexity and wikitext need nothing more, others lm-eval "
            f"(pip install -r requirements-dev.txt): {error}"
        ) from None
    return harness


@torch.no_grad()
def perplexity(
    model: Transformer, tokens: Tensor, context: int, window: int, num_windows: int, dense_prefix: int | None = None
) -> float:
    """Perplexity of `tokens` [num_tokens] (int64) by the protocol above, with log-softmax in float32.

    A SparseTransformer cuts positions [dense_prefix:] of every window and counts them anew; None is dense.

    Raises:
        ValueError: a window beyond the text or the model's context, logits that are not finite.
    """
    if context + window > model.config.block_size:
        raise ValueError(f"windows of {context} + {window} tokens exceed the model's context {model.config.block_size}")
    device = model.device
    starts = window_starts(len(tokens), context, window, num_windows)
    windows = torch.stack([tokens[i : i + context + window] for i in starts])
    options = {}
    if dense_prefix is not None:
        model.reset_counts()
        options["dense_prefix"] = dense_prefix
    loss, seen = 0.0, 0
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


def check_options(options: dict) -> None:
    """Raises ValueError if an option of eval.py is out of its range or does not go with another."""
    tasks, data = options["tasks"], options["data"]
    if not 0 <= options["sparsity"] < 1:
        raise ValueError(f"--sparsity {options['sparsity']} is outside [0, 1)")
    if not 0 < options["sparse_fraction"] <= 1:
        raise ValueError(f"--sparse_fraction {options['sparse_fraction']} is outside (0, 1]")
    for flag in ("batch_size", "limit"):
        if options[flag] is not None and options[flag] < 1:
            raise ValueError(f"--{flag} {options[flag]} must be at least 1")
    if tasks in TASKS:
        return
    named = tasks.split(",")
    if mixed := [name for name in named if name in TASKS]:
        raise ValueError(f"--tasks {tasks}: {mixed[0]} is a run of its own; leave out the others")
    if data is not None and not all(name.endswith((".yaml", ".yml")) for name in named):
        raise ValueError(f"--data is the text of perplexity and of task files; {tasks} has data of its own")


def load_model(
    folder: Path, sparsity: float, thresholds: str, statistics: Path | None, device: torch.device, dtype: torch.dtype
) -> tuple[Transformer, str]:
    """The model that is evaluated, with its cuts set, and the rule's name."""
    if not sparsity:
        return Transformer.from_checkpoint(folder, device, dtype), "none"

    def given_statistics() -> Statistics:
        return statistics_for(folder, statistics, SparseTransformer.from_checkpoint(folder, device, dtype))

    rule, cuts = cuts_for(thresholds, sparsity, folder, given_statistics, statistics is not None)
    model = SparseTransformer.from_checkpoint(folder, device, dtype)
    model.set_cuts(cuts)
    return model, rule


def main(
    checkpoint_path: Path | None = None,
    sparsity: float = 0.0,
    thresholds: str = "best",
    statistics: Path | None = None,
    sparse_fraction: float = 0.99,
    tasks: str = "perplexity",
    data: Path | None = None,
    context: int = 2048,
    window: int = 512,
    num_windows: int = 128,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    device: str = "cpu",
    precision: str = "bfloat16",
    json_line: bool = False,
) -> dict:
    """Evaluates and prints; returns what --json prints. Raises ValueError for a user's mistake."""
    check_options(locals())
    torch_device, dtype = resolve_device(device), PRECISIONS[precision]

    # the text, or the harness; a text that is too short is an error before anything is made
    text = task_text(tasks, data) if tasks in TASKS else None
    harness = None if tasks in TASKS else load_harness(tasks)
    folder = resolve_checkpoint(checkpoint_path)
    tokenizer = load_tokenizer(folder, read_config(folder).vocab_size)
    if text is not None:
        tokens = torch.tensor(tokenizer.encode(text))
        window_starts(len(tokens), context, window, num_windows)
    model, rule = load_model(folder, sparsity, thresholds, statistics, torch_device, dtype)

    # evaluate
    result = {"task": tasks, "model": model.config.name}
    if text is not None:
        dense_prefix = round((context + window) * (1 - sparse_fraction)) if sparsity else None
        result["perplexity"] = perplexity(model, tokens, context, window, num_windows, dense_prefix)
        result["tokens"] = num_windows * window
        dense_part = f"the first {dense_prefix} tokens of every window are dense"
    else:
        runner = harness.HarnessModel(model, tokenizer, sparse_fraction if sparsity else None, batch_size)
        result["results"] = {}
        for name in tasks.split(","):
            result["results"] |= harness.evaluate(runner, name, data, num_fewshot, limit)
        dense_part = f"the first {1 - sparse_fraction:.0%} of every input are dense"
    result |= {
        "sparsity": sparsity,
        "achieved_sparsity": model.achieved_sparsity() if sparsity else 0.0,
        "thresholds": rule,
        "sparse_fraction": sparse_fraction,
    }

    # say so
    if text is not None:
        print(f"{tasks} of {model.config.name}, {precision} on {torch_device}: perplexity {result['perplexity']:.4f}")
        print(f"over {result['tokens']} tokens: {num_windows} windows of {context} + {window}")
    else:
        print(f"{model.config.name}, {precision} on {torch_device}")
        for name, scores in result["results"].items():
            print(f"{name}: " + ", ".join(f"{metric} {value:.4f}" for metric, value in scores.items()))
    if sparsity:
        print(
            f"sparsity {sparsity:.0%} asked for ({rule} thresholds), {result['achieved_sparsity']:.1%} achieved; "
            f"{dense_part}, the rest is cut"
        )
    if json_line:
        print(json.dumps(result))
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measure a checkpoint, dense or sparse: perplexity or tasks.")
    parser.add_argument("--checkpoint_path", type=Path, help="folder, or a file in it (default: the default model)")
    parser.add_argument("--sparsity", type=float, default=0.0, help="share of the weights to cut, 0 <= F < 1")
    parser.add_argument("--thresholds", default="best", help="best, uniform, greedy, refined or a cut table's file")
    parser.add_argument("--statistics", type=Path, help="default: calibration.safetensors beside the checkpoint")
    parser.add_argument("--sparse_fraction", type=float, default=0.99, help="share of a window that is cut, its end")
    parser.add_argument(
        "--tasks", default="perplexity", help="perplexity, wikitext, or lm-eval's names or task files (comma between)"
    )
    parser.add_argument("--data", type=Path, metavar="FILE", help="the text; of a task file, the .jsonl to read")
    parser.add_argument("--context", type=int, default=2048, help="tokens of a window without loss")
    parser.add_argument("--window", type=int, default=512, help="tokens of a window with loss")
    parser.add_argument("--num_windows", type=int, default=128)
    parser.add_argument("--num_fewshot", type=int, help="examples before a task's question (default: as in the paper)")
    parser.add_argument("--limit", type=int, help="only so many documents of a task")
    parser.add_argument("--batch_size", type=int, default=8, help="requests of a task at once")
    parser.add_argument("--json", dest="json_line", action="store_true", help="a last line of JSON")
    add_device_arguments(parser)
    refuse_old_flags(parser, {"--allocation": "--thresholds {best,uniform,greedy,refined,FILE}"})
    command_line(main, parser.parse_args())
