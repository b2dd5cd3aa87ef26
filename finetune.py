"""Weights that expect their inputs to be cut: checkpoint + cut table + text -> a checkpoint tuned by LoRA.

    python finetune.py --data c4 --output_dir OUT                           # the default model, tuned for 50 %
    python finetune.py --sparsity 0.25 0.4 0.5 0.65 --data a.txt b.jsonl    # one checkpoint for several levels
    python finetune.py --data c4 --num_tokens 500000 --own_tokens 2000000   # and texts that go on as the model would
    python finetune.py --sparsity 0 --data c4 --output_dir DENSE            # a dense model on the same text, to compare
    python finetune.py --checkpoint_path DENSE --loss kl --data c4          # and on from that one, see README's table

The weight W of each projection in --targets becomes W + alpha / rank * A B (LoRA, arXiv 2106.09685). A [in, rank] and
B [rank, out] are trained in float32, everything else is frozen. A product takes the sum, rounded to --precision. Inputs
are cut as in inference: the rows of a batch take the levels in turn, and the first 1 % of a row is dense. The gradient
goes through kept inputs. A cut input's shift passes through the tuned weight, of which the offset will be made.

The loss is that of the text's next tokens, or the KL divergence from the dense model without LoRA (kl). An eighth of
the text, up to 16 windows, is held out. With --own_tokens there are further windows: the first sixteenth is text, and
the dense model writes the rest. Their loss is always the KL divergence: their next tokens were drawn from the dense
model, so its distribution says the same without chance. --seed is that of A, of the windows' order and of the draws.

The result is an ordinary checkpoint, in the dtype of the given one, for generate.py, eval.py and quantize.py. Its cut
table is the one that it was trained with. All thresholds of a level are scaled by one factor, so that the tuned model
cuts as much of the held-out text as the given one did. finetune.json says how it was made. refine.py would make a new
table, but for the tuned model as its own dense one. A run that was stopped goes on from <output_dir>.state.safetensors,
saved every minute.

Memory: the model, 16 bytes per parameter of A and B, and what blocks keep of a batch for their gradients. If that is
more than 30 % of a GPU's memory, and always on a CPU, it is the input of each block and what one block keeps. Otherwise
--compile also records the first step as a CUDA graph, whose replays are the other steps: the host launches no kernels.
"""

import options

if __name__ == "__main__":
    options.run_script("finetune")

import argparse
import copy
import json
import math
import time
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save as serialize
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed
from tqdm import tqdm

from calibrate import calibration_tokens, statistics_for, write_tails
from cli import placement
from decoder import not_finite
from formats import checkpoint
from formats.checkpoint import Source, check_absent, convert, copy_files, fingerprint, load_weights, write_weights
from formats.default_model import resolve_checkpoint
from formats.files import lock, shown, write_json, write_output
from model import read_config
from refine import rescaling
from sparse_model import SITES, SparseProjection, SparseTransformer, dense_prefix_of
from thresholds import STATISTICS_NAME, Cuts, cuts_for, read_artifact, table_metadata, table_name, table_of

STATE_FORMAT = "state of a finetuning run 1"
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW
SAVE_SECONDS = 60  # between states
HELD_OUT = 16  # windows at most
OWN_PREFIX = 16  # of a window that the model goes on with: its length by what it is given
WARM_UP = 0.05  # of all steps, in which the learning rate rises; then it falls as a cosine does, to 0
LARGEST_STEP = 1.0  # of the gradient's norm, for the mean loss per token
LOOK_SECONDS = 5  # between looks at the losses, which wait for the device
KEPT = 0.3  # of a GPU's memory: what blocks may keep of a batch for their gradients
NOTHING, DENSE = -1, -2  # instead of a next token: no loss, or the divergence from the dense model
LOGITS = 1 << 26  # that the loss takes at once, so that its float32 tensors have 268 MB each


class TunedProjection(nn.Module):
    """A site of the model in training. Row r of a batch [B, T, in] is cut by `cuts[r]`, from position `prefix` on."""

    def __init__(self, base: SparseProjection, cuts: list[tuple[Tensor, Tensor | None]], prefix: int, scaling: float):
        super().__init__()
        self.weight, self.bias, self.segments, self.widths = base.weight, base.bias, base.segments, base.widths
        self.prefix, self.scaling = prefix, scaling
        self.a, self.b = nn.ParameterDict(), nn.ParameterDict()

        # [S, B, 1, in] and [B, 1, in]; what a projection alone has is spread over its inputs
        device, size = self.weight.device, base.threshold.shape
        threshold = torch.stack([t.to(device).expand(size) for t, _ in cuts], 1)[:, :, None]
        shift = None if cuts[0][1] is None else torch.stack([shift for _, shift in cuts])[:, None].to(device)
        self.register_buffer("threshold", threshold, persistent=False)
        self.register_buffer("shift", shift, persistent=False)

    def add_lora(self, projection: str, rank: int, generator: torch.Generator) -> None:
        n_in, width, device = len(self.weight), self.segments[projection], self.weight.device
        a = torch.empty(n_in, rank).uniform_(-(n_in**-0.5), n_in**-0.5, generator=generator)
        self.a[projection] = nn.Parameter(a.to(device))
        self.b[projection] = nn.Parameter(torch.zeros(rank, width, device=device))

    def delta(self, projection: str) -> Tensor:
        """What is added to the projection's weight: [in, width], float32."""
        if projection in self.a:
            return self.a[projection] @ self.b[projection] * self.scaling
        return torch.zeros(len(self.weight), self.segments[projection], device=self.weight.device)

    def tuned_weights(self) -> list[Tensor]:
        """The weight [in, width] of each projection, in the dtype of the model."""
        parts = zip(self.segments, self.weight.split(self.widths, 1), strict=True)
        return [(weight + self.delta(p)).to(weight.dtype) if p in self.a else weight for p, weight in parts]

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            size = (x if self.shift is None else (x - self.shift).to(x.dtype)).abs()
            size[:, : self.prefix] = math.inf
        stand_in = 0.0 if self.shift is None else self.shift.to(x.dtype)
        parts = zip(self.threshold, self.tuned_weights(), strict=True)
        y = torch.cat([torch.where(size <= threshold, stand_in, x) @ weight for threshold, weight in parts], -1)
        return y if self.bias is None else y + self.bias


def without_head(model: SparseTransformer) -> SparseTransformer:
    """The model, its tensors shared, as one that returns the last hidden states [B, T, dim] instead of logits."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    headless = copy.deepcopy(model, shared)
    headless.head = lambda hidden: hidden
    return headless


def tuned_copy(model: SparseTransformer, rows: list[Cuts], length: int, o: argparse.Namespace) -> SparseTransformer:
    """A model `without_head` whose sites are `TunedProjection`s, for batches of as many rows as cuts."""
    student, generator = without_head(model), torch.Generator().manual_seed(o.seed)
    for layer, block in enumerate(student.layers):
        for i, site in enumerate(SITES.values(), len(SITES) * layer):
            cuts = [(row.thresholds[i], row.shifts[i]) for row in rows]
            tuned = TunedProjection(model.sites[i], cuts, dense_prefix_of(length), o.alpha / o.rank)
            for projection in tuned.segments:
                if projection in o.targets:
                    tuned.add_lora(projection, o.rank, generator)
            block.set_submodule(site.module, tuned)
    return student


def keep_all(model: SparseTransformer, tokens: int) -> bool:
    """Whether blocks keep all that their gradients need of so many tokens: the GPU has room for it, estimated."""
    if model.device.type != "cuda":
        return False
    config, weights = model.config, sum(site.weight.numel() for site in model.sites)
    kept = weights + tokens * config.n_layer * (12 * config.dim + 6 * config.intermediate_size)
    return kept * model.dtype.itemsize < KEPT * torch.cuda.get_device_properties(model.device).total_memory


def loss_and_gradient(
    hidden: Tensor, following: Tensor, dense: Tensor | None, model: SparseTransformer
) -> tuple[Tensor, Tensor]:
    """Sum over N tokens of the loss, float32, and its gradient by the hidden states [N, dim].

    following: the next tokens [N], int64, or `NOTHING`, or `DENSE`. The loss is the KL divergence from a distribution:
        all its mass is on the next token, or it is the dense model's.
    dense: the dense model's hidden states [N, dim]; None if no token needs them.
    """
    logits = model.head(hidden).float()
    log_q = logits.log_softmax(-1)
    p = (following[:, None] == torch.arange(logits.shape[1], device=logits.device)).float()
    if dense is not None:
        p = torch.where((following == DENSE)[:, None], model.head(dense).float().softmax(-1), p)
    loss, slope = (torch.special.xlogy(p, p) - p * log_q).sum(), log_q.exp() * p.sum(1, keepdim=True) - p

    # back through the logits' cap and scaling
    if cap := model.config.logit_softcap:
        slope = slope * (1 - (logits / cap).square())
    return loss, (slope / model.config.logits_scaling).to(model.dtype) @ model.output_weight


class Training:
    """LoRA parameters, AdamW and the losses so far [steps], float32."""

    def __init__(self, model: SparseTransformer, rows: list[Cuts], texts: Tensor, own: Tensor, o: argparse.Namespace):
        windows = torch.cat((texts, own))
        self.o, self.windows, self.model = o, windows.to(model.device), model
        self.n_texts = 0 if o.loss == "kl" else len(texts)  # windows whose loss is of next tokens: the first ones
        self.student, self.teacher = tuned_copy(model, rows, windows.shape[1], o), without_head(model)
        compiled = partial(torch.compile, dynamic=False) if o.compile else lambda function: function
        self.loss_and_gradient = compiled(loss_and_gradient)
        for block in (*self.student.layers, *self.teacher.layers):
            block.forward = compiled(block.forward)
        keep = keep_all(model, o.batch_size * windows.shape[1])
        for block in () if keep else self.student.layers:  # only its input is kept for the gradient
            block.forward = partial(recomputed, block.forward, use_reentrant=False, preserve_rng_state=False)

        # of all batches alike, and no part of a step: some frequencies come from the host
        needs = model.rope_and_masks(torch.arange(windows.shape[1], device=model.device), length=windows.shape[1])
        self.student.rope_and_masks = self.teacher.rope_and_masks = lambda *_: needs

        # what a step reads and writes
        self.picked = torch.zeros(o.batch_size, dtype=torch.int64, device=model.device)
        self.rate, self.loss = (torch.zeros((), device=model.device) for _ in range(2))
        self.recorded, self.graph = keep and o.compile, None

        self.parameters = {name: p for name, p in self.student.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ValueError(f"--targets {' '.join(o.targets)}: {model.config.name} has no such projection")
        adamw = partial(torch.optim.AdamW, betas=(0.9, 0.99), weight_decay=0.0, fused=True, capturable=self.recorded)
        self.optimizer = adamw(self.parameters.values(), self.rate)
        self.steps = max(1, round(o.epochs * len(windows) / o.batch_size))
        generator, epochs = torch.Generator().manual_seed(o.seed), -(-self.steps * o.batch_size // len(windows))
        order = [torch.randperm(len(windows), generator=generator) for _ in range(epochs)]
        self.order = torch.cat(order).to(model.device)
        self.losses = torch.zeros(0)

    def learning_rate(self, step: int) -> float:
        rising = (step + 1) / max(1, WARM_UP * self.steps)
        return self.o.learning_rate * min(1.0, rising) * 0.5 * (1 + math.cos(math.pi * step / self.steps))

    def step(self, step: int) -> Tensor:
        """Trains on one batch; returns the mean loss per token, still on the device."""
        self.picked.copy_(self.order[step * self.o.batch_size :][: self.o.batch_size])
        self.rate.fill_(self.learning_rate(step))
        if self.graph:
            self.graph.replay()
        elif self.recorded:
            from kernels.fused_step import record_graph

            self.graph = record_graph(self.learn, self.rate)  # runs it once: this step
        else:
            self.learn()
        return self.loss.clone()

    def learn(self) -> None:
        """A step on the windows `picked` at the learning rate `rate`; sets `loss`. The host never waits for it."""
        batch = self.windows[self.picked]

        # hidden states, and what they are compared with
        hidden = self.student(batch).flatten(0, 1)
        following = F.pad(batch[:, 1:], (0, 1), value=NOTHING)
        following = torch.where((self.picked < self.n_texts)[:, None], following, DENSE).flatten()
        count, dense = (following != NOTHING).sum(), None
        if self.n_texts < len(self.windows):
            with torch.no_grad():
                dense = self.teacher(batch).flatten(0, 1)

        # the loss, some tokens at a time; its gradient is of the sum, which float16 holds, and divided afterwards
        size = 1 << (LOGITS // self.model.config.vocab_size | 1).bit_length() - 1
        with torch.no_grad():
            pieces = [slice(i, i + size) for i in range(0, len(hidden), size)]
            parts = [(hidden[i], following[i], None if dense is None else dense[i]) for i in pieces]
            losses, gradients = zip(*(self.loss_and_gradient(*part, self.model) for part in parts), strict=True)
        hidden.backward(torch.cat(gradients))
        for parameter in self.parameters.values():
            parameter.grad /= count

        torch.nn.utils.clip_grad_norm_(self.parameters.values(), LARGEST_STEP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.loss.copy_(torch.stack(losses).sum() / count)

    def run(self) -> Iterator[None]:
        """Makes the steps that are left; yields whenever `losses` has grown. Raises ValueError if one is not finite."""
        begun, new, looked = len(self.losses), [], time.monotonic()
        tokens = self.o.batch_size * self.windows.shape[1]
        total, initial = self.steps * tokens, begun * tokens
        with tqdm(total=total, initial=initial, desc="finetuning", unit="tok", unit_scale=True) as progress:
            for step in range(begun, self.steps):
                new.append(self.step(step))
                if time.monotonic() - looked < LOOK_SECONDS and step + 1 < self.steps:
                    continue

                # look at the losses of the last few steps
                recent = torch.stack(new).cpu()
                if not recent.isfinite().all():
                    raise not_finite(self.student.dtype, f"the loss at --learning_rate {self.o.learning_rate:g}")
                progress.set_postfix_str(f"{self.o.loss} {recent.mean():.4f} nats per token")
                progress.update(len(new) * tokens)
                self.losses, new, looked = torch.cat((self.losses, recent)), [], time.monotonic()
                yield
        self.graph = None  # and its memory


class SavedState(NamedTuple):
    tensors: dict[str, Tensor]  # losses, parameters and their moments
    metadata: dict[str, str]  # the options that the run was started with

    def check(self) -> None:
        if "losses" not in self.tensors:
            raise ValueError("losses are missing")


def save_state(training: Training, path: Path, metadata: dict[str, str]) -> None:
    tensors = {"losses": training.losses}
    for name, parameter in training.parameters.items():
        moments = training.optimizer.state[parameter]
        tensors |= {name: parameter.detach().cpu(), **{f"{name}.{kind}": moments[kind].cpu() for kind in MOMENTS}}
    write_output(path, serialize(tensors, {"format": STATE_FORMAT, **metadata}))


def resume(training: Training, path: Path, metadata: dict[str, str]) -> None:
    """Sets what `save_state` kept. Raises ValueError for a damaged file, and if a run of other options made it."""
    state = read_artifact(path, SavedState, STATE_FORMAT, "state of finetuning", "delete it")
    meaning = {"fingerprint": "checkpoint", "inputs": "text or cut table", "targets": "list of targets"}
    meaning |= {name: f"number of {name}" for name in ("epochs", "tokens")}
    for name, value in metadata.items():
        if (found := state.metadata.get(name)) != value:
            kept = f"{path} is of a run with another {meaning.get(name, name)}: {shown(found)}, now {shown(value)}"
            raise ValueError(f"{kept}; go on with the same, delete the file, or give another --output_dir")

    for name, parameter in training.parameters.items():
        for saved in (name, *(f"{name}.{kind}" for kind in MOMENTS)):
            if saved not in state.tensors or state.tensors[saved].shape != parameter.shape:
                raise ValueError(f"{path} is damaged: {saved} is missing or has another shape; delete it")

    training.losses = state.tensors["losses"]
    for name, parameter in training.parameters.items():
        moments = {kind: state.tensors[f"{name}.{kind}"].to(parameter) for kind in MOMENTS}
        moments["step"] = torch.tensor(float(len(training.losses)), device=parameter.device)
        training.optimizer.state[parameter] = moments
        parameter.data.copy_(state.tensors[name])
    done = f"step {len(training.losses)} of {training.steps}"
    warnings.warn(f"goes on where an earlier run stopped, after {done}, from {path}", stacklevel=3)


def train(training: Training, path: Path, metadata: dict[str, str]) -> None:
    """Runs all steps, on from the state in `path` if there is one. Raises ValueError as `resume` and `run` do."""
    if path.exists():
        resume(training, path, metadata)
    saved = time.monotonic()
    for _ in training.run():
        if time.monotonic() - saved >= SAVE_SECONDS or len(training.losses) == training.steps:
            save_state(training, path, metadata)
            saved = time.monotonic()


def merged_weights(folder: Path, student: SparseTransformer) -> dict[str, Source]:
    """The tensors of the checkpoint in `folder`, with what was trained added to the projections, in their dtype."""
    # of each tensor's name, fused or not, the module and its projections
    owners: dict[str, tuple[TunedProjection, tuple[str, ...]]] = {}
    for layer, block in enumerate(student.layers):
        for site in SITES.values():
            module, (owner, name) = block.get_submodule(site.module), f"layers.{layer}.{site.module}".rsplit(".", 1)
            projections = tuple(module.segments)
            owners[f"{owner}.{name}.weight"] = module, projections
            for part, projection in zip(checkpoint.FUSED.get(name, ())[-len(projections) :], projections, strict=False):
                owners[f"{owner}.{part}.weight"] = module, (projection,)

    def load(name: str, tensor: Tensor) -> Tensor:
        module, projections = owners.get(name, (None, ()))
        if module is None or not module.a:
            return tensor
        with torch.no_grad():
            delta = torch.cat([module.delta(p) for p in projections], 1).t().cpu()
            return (tensor.float() + delta).to(tensor.dtype)

    return {name: Source(tuple(w.shape), w.dtype, partial(load, name, w)) for name, w in load_weights(folder).items()}


@torch.no_grad()
def merge(model: SparseTransformer, student: SparseTransformer) -> None:
    """Gives `model` the tuned weights, which the student shares: it is of no use afterwards."""
    for module, tuned in zip(model.sites, student.sites, strict=True):
        module.weight.copy_(torch.cat(tuned.tuned_weights(), 1))


def cuts_of_rows(o: argparse.Namespace, folder: Path, model: SparseTransformer) -> tuple[str, list[Cuts]]:
    """The rule's name or a table's file, and the cuts of each row of a batch. Raises ValueError as `cuts_for` does."""
    levels = sorted(set(o.sparsity))
    if len(levels) > o.batch_size:
        raise ValueError(f"--batch_size {o.batch_size} has no row for each of {len(levels)} levels of sparsity")
    statistics = partial(statistics_for, folder, None, model)
    rule, last = cuts_for(o.thresholds, levels[-1] or 0.5, folder, statistics)
    nothing = Cuts(0.0, [torch.full_like(threshold, -1.0) for threshold in last.thresholds], last.shifts)
    cuts = [cuts_for(rule, level, folder, statistics)[1] if level else nothing for level in levels]
    return rule, [cuts[r % len(cuts)] for r in range(o.batch_size)]


def training_text(o: argparse.Namespace, folder: Path, model: SparseTransformer) -> tuple[list[Tensor], Tensor, dict]:
    """Windows [N, T] of text and of the model's own; those held out; and of how many tokens each text is.

    Raises ValueError for a text that is too short.
    """
    if o.context > model.config.block_size:
        raise ValueError(f"--context {o.context} exceeds the model's context of {model.config.block_size}")
    tokens, name = calibration_tokens(folder, model, o.data, o.num_tokens, o.seed, o.context)
    if len(tokens) < 2:
        few = f"{tokens.numel()} tokens of text are one window of {tokens.shape[1]}"
        raise ValueError(f"{few}; another one must be held out: give more text or a smaller --context")
    count = max(1, min(len(tokens) // 8, HELD_OUT))
    texts, held_out = tokens[:-count].cpu(), tokens[-count:]
    amounts, own = {name: texts.numel()}, texts[:0]

    # texts that begin as these, and go on as the model would
    if more := -(-o.own_tokens // tokens.shape[1]):
        begun = texts[torch.arange(more) % len(texts)]
        own = write_tails(model, begun, max(1, tokens.shape[1] // OWN_PREFIX), o.seed).cpu()
        amounts["the model's own after the beginnings of these"] = own.numel()
    return [texts, own], held_out, amounts


def main(argv: list[str] | None = None) -> Path:
    """Tunes a checkpoint and returns the new one's folder. Raises ValueError for a user's mistake."""
    o = options.finetune(argv)
    folder = resolve_checkpoint(o.checkpoint_path)
    if (quant := read_config(folder).quant) != "none":
        raise ValueError(f"{folder} has {quant} weights; tune the checkpoint that it was made from, then quantise")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json to go with the new weights; convert_hf_checkpoint.py writes one")
    output = o.output_dir or folder.with_name(f"{folder.name}-tuned")

    with lock(output):
        check_absent(output)
        model = SparseTransformer.from_checkpoint(folder, *placement(o))
        rule, rows = cuts_of_rows(o, folder, model)
        statistics = statistics_for(folder, None, model) if rule == "uniform" else None
        windows, held_out, amounts = training_text(o, folder, model)
        table = table_of(rule, folder)
        rescaled = rescaling(model, table, held_out, "held-out text of finetuning") if table else None

        # what decides the result, to the last bit
        names = "sparsity targets rank alpha learning_rate loss epochs batch_size seed precision".split()
        inputs = [*windows, *(t for row in rows for t in (*row.thresholds, *row.shifts) if t is not None)]
        chosen = {name: getattr(o, name) for name in names}
        metadata = table_metadata(rule, folder, " and ".join(amounts), torch.cat(windows), inputs, **chosen)

        # train
        training, state = Training(model, rows, *windows, o), output.with_name(f"{output.name}.state.safetensors")
        train(training, state, metadata)
        made = {"options": metadata, "text_tokens": amounts, "steps": training.steps}
        made |= {"tokens_seen": training.steps * o.batch_size * held_out.shape[1], "losses": training.losses.tolist()}

        # the cuts of what became of it; uniform ones follow from statistics
        weights = merged_weights(folder, training.student)
        merge(model, training.student)
        if table:
            table = rescaled()

        def write(folder: Path, part: Path) -> None:
            copy_files(folder, part)
            write_weights(part, weights)
            write_json(part / "finetune.json", made)
            artifact = statistics or table
            artifact.metadata["fingerprint"] = fingerprint(part)
            artifact.save(part / (STATISTICS_NAME if statistics else table_name(table.metadata.get("rule", "refined"))))

        convert(write, folder, output)
        state.unlink()

    print(f"{output}: tuned on {made['tokens_seen']:,} tokens of {json.dumps(amounts)}; use it as --checkpoint_path")
    if table:
        print(table.quality_report())
    return output
