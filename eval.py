"""Perplexity and task scores of a checkpoint, dense or sparse, on the very model class that generate.py runs.

    python eval.py --tasks wikitext --data wiki.test.raw                   # the default model, dense
    python eval.py --tasks wikitext --data wiki.test.raw --sparsity 0.5    # the last 99 % of every window cut
    python eval.py --data text.txt --sparsity 0.5 --sparse_fraction 0.5    # the paper's protocol: the last half cut
    python eval.py --tasks generation --data wiki.test.raw --sparsity 0.5  # what it writes, as a dense model sees it
    python eval.py --tasks arc_challenge,piqa --sparsity 0.5               # the LM evaluation harness, see harness.py

The text is tokenised once, no bos added. Window i of num_windows starts at token int(i * (tokens - context - window) /
num_windows) and is context + window tokens long; the loss is the mean over the last `window` tokens of every window,
each predicted from those before it in the window.

In generation the `context` of every window is a prompt (by default 200 of 64 tokens), which is read densely. The model
goes on for `window` tokens (128), cut, drawn as generate.py draws. A text ends behind its first end-of-text token. The
perplexity is that of what was written under the dense model, or that of --judge. Repetition is the share of a text's
sequences of four tokens that it had before. Compare both with those of --sparsity 0.
"""

import options

if __name__ == "__main__":
    options.run_script("eval")

import argparse
import json
import math

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm, trange

import tp
from cli import placement
from decoder import MAX_ROWS, Generator, check_finite, why_unfused
from formats.default_model import resolve_checkpoint
from formats.text import task_tokens
from generate import ModelSource
from model import Transformer
from options import TASKS, TEMPERATURE
from sparse_model import SparseTransformer
from tokenizer import Tokenizer, load_tokenizer

DEFAULT_WINDOWS = 128  # of a perplexity, also where a short text makes them alike
GPU_WINDOWS = 4  # windows a forward pass on a GPU; logits are 4 x 512 x vocabulary in float32
WRITTEN_ROWS = 64  # texts that are written at once


def window_starts(num_tokens: int, context: int, window: int, num_windows: int) -> list[int]:
    """First token of every window. Raises ValueError if not one fits or a length is below 1."""
    if min(context, window, num_windows) < 1:
        raise ValueError(f"--context {context}, --window {window} and --num_windows {num_windows} must be at least 1")
    if num_tokens < context + window:
        short = f"the text has {num_tokens} tokens, a window {context} + {window}"
        raise ValueError(f"{short}; give a longer text or a smaller --context")
    if num_windows > max(DEFAULT_WINDOWS, places := num_tokens - context - window + 1):
        raise ValueError(f"--num_windows {num_windows} is more than the {places} places that the text has for a window")
    return [int(i * (num_tokens - context - window) / num_windows) for i in range(num_windows)]


@torch.no_grad()
def perplexity(
    model: Transformer, tokens: Tensor, context: int, window: int, num_windows: int, dense_prefix: int | None = None
) -> float:
    """Perplexity of `tokens` [num_tokens] (int64) by the protocol above, with log-softmax in float32.

    A SparseTransformer cuts positions [dense_prefix:] of every window and counts them anew; None is dense.
    Raises ValueError for a window beyond the text or the model's context, and for logits that are not finite.
    """
    if context + window > (most := model.config.block_size):
        raise ValueError(f"windows of {context} + {window} tokens exceed the model's context of {most}")
    starts = window_starts(len(tokens), context, window, num_windows)
    options = {} if dense_prefix is None else {"dense_prefix": dense_prefix}
    if options:
        model.reset_counts()

    loss, seen, device = 0.0, 0, model.device
    with tqdm(total=num_windows, desc="evaluating", unit="window") as progress:
        at_once = GPU_WINDOWS if device.type == "cuda" else 1
        for i in range(0, num_windows, at_once):
            batch = torch.stack([tokens[start : start + context + window] for start in starts[i : i + at_once]])
            losses = token_losses(model, batch.to(device), window, **options)
            loss, seen = loss + losses.double().sum().item(), seen + losses.numel()
            progress.set_postfix_str(f"perplexity {math.exp(loss / seen):.4f}")
            progress.update(len(batch))
    return math.exp(loss / seen)


def token_losses(model: Transformer, batch: Tensor, window: int, **options) -> Tensor:
    """Losses [B, window], float32, of the last tokens of a batch [B, T]. Raises ValueError if logits are not finite."""
    logits = model(batch[:, :-1], num_logits=window, **options)
    check_finite(logits, model.dtype)
    losses = F.cross_entropy(logits.flatten(0, 1).float(), batch[:, -window:].flatten(), reduction="none")
    return losses.view(len(batch), window)


def repetition(text: list[int], n: int = 4) -> float:
    """The share of a text's sequences of n tokens that it had before; 0 where it is shorter."""
    sequences = list(zip(*(text[i:] for i in range(n)), strict=False))
    return 1 - len(set(sequences)) / len(sequences) if sequences else 0.0


def evaluate_text(o: argparse.Namespace, model: Transformer, tokens: Tensor) -> tuple[dict, str]:
    """Measures and prints a perplexity; returns its JSON keys, and what was left dense."""
    dense_prefix = round((o.context + o.window) * (1 - o.sparse_fraction)) if o.sparsity else None
    value = perplexity(model, tokens, o.context, o.window, o.num_windows, dense_prefix)
    counted = o.num_windows * o.window
    print(f"{o.tasks} of {model.config.name}, {o.precision} on {model.device.type}: perplexity {value:.4f}")
    print(f"over {counted} tokens: {o.num_windows} windows of {o.context} + {o.window}")
    return {"perplexity": value, "tokens": counted}, f"the first {dense_prefix} tokens of every window are dense"


@torch.inference_mode()
def evaluate_generation(o: argparse.Namespace, model: Transformer, tokens: Tensor, eos_ids: tuple) -> tuple[dict, str]:
    """Lets the model write, measures and prints what it wrote; returns the JSON keys, and what was left dense."""
    starts = window_starts(len(tokens), o.context, o.window, o.num_windows)
    judge = ModelSource(*placement(o), resolve_checkpoint(o.judge)).load(Transformer) if o.judge else model
    if judge.config.vocab_size != model.config.vocab_size:
        raise ValueError(f"--judge {o.judge} has another vocabulary; give the checkpoint that this one was made from")
    dense = {"dense_prefix": o.context + o.window} if isinstance(judge, SparseTransformer) else {}

    # on a CPU cut rows that are fused share what they read; each of others reads its own
    fused = model.device.type == "cpu" and isinstance(model, SparseTransformer) and tp.count() == 1
    fused = fused and not why_unfused(model.config, model.device, MAX_ROWS, Generator.top_k)
    step, at_once = ("fused", MAX_ROWS) if fused else ("eager", WRITTEN_ROWS)
    losses, texts = [], []
    for first in trange(0, o.num_windows, at_once, desc="writing and judging", unit="batch"):
        prompts = [tokens[start : start + o.context].to(model.device) for start in starts[first:][:at_once]]
        generator = Generator(model, len(prompts), o.context + o.window, TEMPERATURE, step=step, seed=first)
        written = generator(prompts, o.window)
        texts += written.new.tolist()
        for batch in written.tokens.split(GPU_WINDOWS):
            losses += token_losses(judge, batch, o.window, **dense).tolist()
            if o.sparsity:  # a pass that counts
                model(batch[:, :-1], num_logits=1, dense_prefix=o.context)

    # what stands behind the end of a text is left out
    ends = [next((i for i, token in enumerate(text, 1) if token in eos_ids), o.window) for text in texts]
    counted = sum(ends)
    value = math.exp(sum(sum(row[:end]) for row, end in zip(losses, ends, strict=True)) / counted)
    repeated = sum(repetition(text[:end]) for text, end in zip(texts, ends, strict=True)) / len(texts)
    print(f"{counted} tokens of {model.config.name}, {o.precision} on {model.device.type}, after {len(texts)} prompts:")
    print(f"perplexity {value:.4f} under the dense model {judge.config.name}, repetition {repeated:.1%}")
    return {"perplexity": value, "repetition": repeated, "tokens": counted}, "prompts are dense"


def evaluate_tasks(o: argparse.Namespace, model: Transformer, tokenizer: Tokenizer) -> tuple[dict, str]:
    """Scores and prints tasks of lm-eval; returns the JSON key `results`, and what was left dense."""
    import harness

    runner = harness.HarnessModel(model, tokenizer, o.sparse_fraction if o.sparsity else None, o.batch_size)
    runner.run_code, results = o.confirm_run_unsafe_code, {}
    for name in o.tasks.split(","):
        results |= harness.evaluate(runner, name, o.data, o.num_fewshot, o.limit)
    print(f"{model.config.name}, {o.precision} on {model.device.type}")
    for name, scores in results.items():
        print(f"{name}: " + ", ".join(f"{metric} {value:.4f}" for metric, value in scores.items()))
    return {"results": results}, f"the first {1 - o.sparse_fraction:.0%} of every input are dense"


def check_harness(tasks: str) -> None:
    try:
        import harness  # noqa: F401
    except ImportError as error:
        needs = f"--tasks {tasks} needs lm-eval, which {', '.join(options.TASKS)} do not"
        raise ValueError(f"{needs} (pip install -r requirements-dev.txt): {error}") from None


def main(argv: list[str] | None = None) -> dict:
    """Evaluates and prints; returns what --json prints. Raises ValueError for a user's mistake."""
    o = options.eval(argv)
    if o.tasks not in TASKS:
        check_harness(o.tasks)
    tp.start(o.device)
    source = ModelSource(*placement(o), resolve_checkpoint(o.checkpoint_path))

    # a text that is too short is an error before anything is made
    tokenizer = load_tokenizer(source.folder, source.config.vocab_size)
    if o.tasks in TASKS:
        tokens = task_tokens(o.tasks, o.data, tokenizer)
        window_starts(len(tokens), o.context, o.window, o.num_windows)

    model, rule = source.cut_model(o) if o.sparsity else (source.load(Transformer), "none")
    if o.tasks == "generation":
        found, dense_part = evaluate_generation(o, model, tokens, tokenizer.eos_ids)
    else:
        found, dense_part = evaluate_text(o, model, tokens) if o.tasks in TASKS else evaluate_tasks(o, model, tokenizer)
    achieved = model.achieved_sparsity() if o.sparsity else 0.0
    if o.sparsity:
        asked = f"sparsity {o.sparsity:.0%} asked for ({rule} thresholds), {achieved:.1%} achieved"
        print(f"{asked}; {dense_part}, the rest is cut")

    result = {"task": o.tasks, "model": model.config.name} | found | {"sparsity": o.sparsity}
    result |= {"achieved_sparsity": achieved, "thresholds": rule, "sparse_fraction": o.sparse_fraction}
    if o.json:
        print(json.dumps(result))
    return result
