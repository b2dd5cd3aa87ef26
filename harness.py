"""The LM evaluation harness (lm-eval) on this repository's models: what `eval.py --tasks` runs beside perplexity.

    python eval.py --tasks arc_challenge,piqa --sparsity 0.5                       # by the harness's names, fetched
    python eval.py --tasks benchmarks/tasks/multiple_choice.yaml --data piqa.jsonl --limit 100
    python eval.py --tasks humaneval --confirm_run_unsafe_code                     # runs what the model writes

Requests of equal length share a forward pass, so nothing is padded: a batch computes what single requests would. Of
every input the last `sparse_fraction` is cut, as in perplexity; in generation all new tokens are cut as well. A row
that has stopped stays in its batch until all have: the sparsity counts what it is fed then.
"""

import math
import os
import sys
from collections import defaultdict
from collections.abc import Hashable, Iterator
from functools import cache
from pathlib import Path

import lm_eval.utils
import torch
import yaml
from datasets import Dataset, DatasetDict
from jinja2 import StrictUndefined
from jinja2.sandbox import SandboxedEnvironment
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import metric_registry
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm

from decoder import check_finite
from formats.files import one_line, shown
from formats.text import read_records, read_text
from model import Transformer
from options import TASKS
from tokenizer import Tokenizer

# Examples before the question in TEAL's evaluation (arXiv 2408.14690, section 5.1); other tasks: as the harness has it.
NUM_FEWSHOT = {"mmlu": 5, "arc_challenge": 25, "hellaswag": 10, "gsm8k": 5, "piqa": 0, "winogrande": 5}
MAX_NEW_TOKENS = 256  # of a generation request that does not say, as in the harness's own model classes
# options of a generation request that are read, and those of sampling, which greedy generation has no use for
KNOWN = "until do_sample max_gen_toks max_length temperature top_p top_k min_p typical_p".split()
RUNS_CODE = {"class", "custom_dataset", "hf_evaluate", "trust_remote_code", "unsafe_code", "use_prompt"}

# A task's templates are programs of whoever wrote it: from here on the harness renders them in a sandbox.
_sandbox = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
_sandbox.filters, lm_eval.utils.env = lm_eval.utils.env.filters, _sandbox


def batches(same_input: dict[tuple[Hashable, tuple], list], size: int, doing: str, quiet: bool) -> Iterator[list]:
    """Keys (kind, token ids) of one kind and one length, up to `size` at a time, the longest first."""
    alike = defaultdict(list)
    for kind, tokens in same_input:
        alike[kind, len(tokens)].append((kind, tokens))
    with tqdm(total=sum(map(len, same_input.values())), disable=quiet, desc=doing, unit="request") as progress:
        for _, keys in sorted(alike.items(), key=lambda item: -item[0][1]):
            for batch in (keys[i : i + size] for i in range(0, len(keys), size)):
                yield batch
                progress.update(sum(len(same_input[key]) for key in batch))


class HarnessModel(TemplateLM):
    """lm-eval's model interface over a Transformer or, if `sparse_fraction` is given, a SparseTransformer."""

    run_code = False  # consent to run code that the model writes, on this machine, as HumanEval does

    def __init__(self, model: Transformer, tokenizer: Tokenizer, sparse_fraction: float | None, batch_size: int):
        super().__init__()
        self.model, self.text_tokenizer, self.batch_size = model, tokenizer, batch_size
        self._device, self.max_length = model.device, model.config.block_size
        self.dense_share = None if sparse_fraction is None else 1 - sparse_fraction

    @property
    def eot_token_id(self) -> int:
        return next(iter(self.text_tokenizer.eos_ids), 0)

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id if self.text_tokenizer.bos_id is None else self.text_tokenizer.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        wanted = self.text_tokenizer.adds_bos if add_special_tokens is None else add_special_tokens
        return self.text_tokenizer.encode(string, bos=wanted)

    def _logits(self, idx: Tensor, num_logits: int, new: bool = False, input_pos: Tensor | None = None) -> Tensor:
        dense = self.dense_share
        cut = {} if dense is None else {"dense_prefix": 0 if new else round(idx.shape[1] * dense)}
        logits = self.model(idx, input_pos, num_logits=num_logits, **cut)
        check_finite(logits, self.model.dtype)
        return logits.float()

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests: list[tuple], disable_tqdm: bool = False, **kwargs) -> list[tuple]:
        """(log-probability, whether greedy) of each request's continuation; requests of one input share its pass."""
        scores, same_input = [()] * len(requests), defaultdict(list)
        for i, (_, context, continuation) in enumerate(requests):
            tokens = (context + continuation)[-self.max_length - 1 :]
            same_input[None, tuple(tokens[:-1])].append((i, torch.tensor(continuation[-self.max_length :])))
        for batch in batches(same_input, self.batch_size, "evaluating", disable_tqdm):
            idx = torch.tensor([tokens for _, tokens in batch], device=self._device)
            most = max(len(continuation) for key in batch for _, continuation in same_input[key])
            for row, key in zip(torch.log_softmax(self._logits(idx, most), -1).cpu(), batch, strict=True):
                for i, continuation in same_input[key]:
                    tail = row[-len(continuation) :]
                    value = tail.gather(-1, continuation[:, None]).sum().item()
                    scores[i] = (value, bool((tail.argmax(-1) == continuation).all()))
        return scores

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        owners, windows = [], []
        for i, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            ours = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            windows += [(None, *make_disjoint_window(window)) for window in ours]
            owners += [i] * (len(windows) - len(owners))
        totals = [0.0] * len(requests)
        for i, (value, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[i] += value
        return totals

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations up to the first stop string or end-of-text token, without it."""
        texts, same_input = [""] * len(requests), defaultdict(list)
        for i, request in enumerate(requests):
            context, until, limit, length = request.args[0], *self._limits(request.args[1])
            tokens = self.tok_encode(context)[limit - self.max_length :] or [self.prefix_token_id]
            limit = max(1, min(length, self.max_length) - len(tokens)) if length else limit
            same_input[(until, limit), tuple(tokens)].append(i)
        for batch in batches(same_input, self.batch_size, "generating", disable_tqdm):
            for key, text in zip(batch, self._generate([tokens for _, tokens in batch], *batch[0][0]), strict=True):
                for i in same_input[key]:
                    texts[i] = text
        return texts

    def _limits(self, request: dict) -> tuple[tuple[str, ...], int, int | None]:
        """What a request's options mean to lm-eval's Hugging Face class: stop strings, new tokens, tokens in all.
        Raises ValueError for sampled text, and for options that would change the text in a way that is not ours."""
        try:
            options = normalize_gen_kwargs(request, MAX_NEW_TOKENS)
            limit, length = options["max_gen_toks"], int(options.get("max_length") or 0) or None
        except (TypeError, ValueError) as error:
            raise ValueError(f"a task's options {shown(request)} cannot be read: {one_line(error)}") from None
        if options["do_sample"]:
            raise ValueError(f"a task asks for sampled text ({shown(request)}); only greedy generation is supported")
        if unknown := [key for key in options if key not in KNOWN and options[key] not in (None, False, 1)]:
            raise ValueError(f"a task asks for {unknown[0]} ({shown(request)}), which is not supported")
        if not 0 < limit < self.max_length:
            raise ValueError(f"a task asks for {limit} new tokens; the model's context is {self.max_length}")
        return tuple(str(stop) for stop in options["until"] if stop), limit, length

    @torch.no_grad()
    def _generate(self, contexts: list[tuple[int, ...]], until: tuple[str, ...], limit: int) -> list[str]:
        idx, length = torch.tensor(contexts, device=self._device), len(contexts[0])
        self.model.setup_caches(len(contexts), length + limit)
        positions = torch.arange(length + limit, device=self._device)
        streams = [self.text_tokenizer.stream(after=context) for context in contexts]
        texts, going = [""] * len(contexts), set(range(len(contexts)))  # rows that have not stopped

        logits = self._logits(idx, 1, False, positions[:length])
        for position in range(length, length + limit):
            token = logits[:, -1].argmax(-1, keepdim=True)
            for i in list(going):
                ended = int(token[i]) in self.text_tokenizer.eos_ids
                texts[i] += streams[i].flush() if ended else streams[i].push(int(token[i]))
                if ended or any(stop in texts[i] for stop in until):
                    going.remove(i)
            if not going or position == length + limit - 1:
                break
            logits = self._logits(token, 1, True, positions[position : position + 1])
        for i in going:
            texts[i] += streams[i].flush()
        for block in self.model.layers:
            block.attention.kv_cache = None
        ends = (min((text.find(stop) for stop in until if stop in text), default=len(text)) for text in texts)
        return [text[:end] for text, end in zip(texts, ends, strict=True)]


@cache
def task_manager() -> TaskManager:
    print("looking for lm-eval's tasks (ten seconds)", file=sys.stderr)
    return TaskManager()


def load_task(name: str, data: Path | None) -> tuple[str | dict, TaskManager]:
    """What `simple_evaluate` takes for a name or a task file; `data` replaces the file's own. Raises ValueError."""
    if not name.endswith((".yaml", ".yml")):
        manager = task_manager()
        if not manager.match_tasks([name]):
            tasks = f"{', '.join(TASKS)}, a file NAME.yaml, lm-eval's ({len(manager.all_tasks)}: lm-eval ls tasks)"
            raise ValueError(f"unknown task {shown(name)}: give one of {tasks}")
        return name, manager

    # a task file
    try:
        config = yaml.safe_load("".join(read_text(name)))
        refuse_code(config, name)
    except (OSError, RecursionError, yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{name} is not a task file of lm-eval ({one_line(error)})") from None

    # without a list of tasks it needs none of lm-eval's
    manager = TaskManager(include_defaults=False) if isinstance(config["task"], str) else task_manager()
    if data is None:
        if config.get("dataset_path") == "json" and not (config.get("dataset_kwargs") or {}).get("data_files"):
            raise ValueError(f"the task file {name} names no data; give it --data FILE.jsonl")
        return config, manager

    # its data, by whatever suffix
    records = list(read_records(data))
    if not records:
        raise ValueError(f"{data}, the --data of task {name}, is empty; give it a line of JSON per document")
    try:
        keys = dict.fromkeys(key for record in records for key in record)
        test = Dataset.from_dict({key: [record.get(key) for record in records] for key in keys})
    except (ValueError, TypeError, OverflowError) as error:  # a field of two types
        raise ValueError(f"the documents of {data} are not alike ({one_line(error)})") from None
    return config | {"dataset_kwargs": None, "custom_dataset": lambda **_: DatasetDict(test=test)}, manager


def refuse_code(config: dict, name: str) -> None:
    """Raises ValueError for a part of a task file that would run code of its own or of the hub's."""
    metrics = config.get("metric_list") or []
    parts = [config, config.get("dataset_kwargs") or {}, *metrics]
    found = [key for part in parts for key in RUNS_CODE if part.get(key)]
    found += [f"the metric {shown(part['metric'])}" for part in metrics if str(part["metric"]) not in metric_registry]
    if isinstance(config["task"], list) and not all(isinstance(task, str) for task in config["task"]):
        found.append("a task inside")
    if found:
        raise ValueError(f"the task file {name} has {found[0]}, which may run code: leave it out")


def runs_written_code(name: str) -> bool:
    """Whether lm-eval marks the task of this name as one that runs code which the model writes."""
    entry = None if name.endswith((".yaml", ".yml")) else task_manager().task_index.get(name)
    return bool(entry and entry.yaml_path and load_yaml(entry.yaml_path, resolve_func=False).get("unsafe_code"))


def evaluate(
    model: HarnessModel, name: str, data: Path | None = None, num_fewshot: int | None = None, limit: int | None = None
) -> dict[str, dict[str, float]]:
    """Scores by task and metric of a task, a group of tasks or a task file; of each the first `limit` documents.
    num_fewshot: examples before each question; None: as in `NUM_FEWSHOT`, else the task's own number.
    Raises ValueError for an unknown task, one whose data cannot be fetched or read, or that may not run its code."""
    task, manager = load_task(name, data)
    if model.run_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    elif runs_written_code(name):
        raise ValueError(f"task {name} runs code that the model writes, here; --confirm_run_unsafe_code allows it")
    fewshot = NUM_FEWSHOT.get(name) if num_fewshot is None else num_fewshot
    options = {"num_fewshot": fewshot, "limit": limit, "log_samples": False, "bootstrap_iters": 0}
    options["confirm_run_unsafe_code"] = model.run_code
    try:
        results = simple_evaluate(model, tasks=[task], task_manager=manager, **options)["results"]
    except (ValueError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of the hub, of the reader, of a field that is not there or of another type
        raise ValueError(f"task {name} cannot be evaluated ({type(error).__name__}: {one_line(error)})") from None
    numbers = {}
    for task in [name] if name in results else results:
        scores = {key.removesuffix(",none"): value for key, value in results[task].items() if "stderr" not in key}
        numbers[task] = {key: x for key, x in scores.items() if isinstance(x, float) and math.isfinite(x)}
    return numbers
