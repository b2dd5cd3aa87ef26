"""The perplexity protocol and the cut of windows against a naive computation, token by token."""

import json
import math
from pathlib import Path

import pytest
import torch
from models import CONFIG, build, flags

import eval as evaluation
from calibrate import calibrate, collect
from decoder import Generator
from eval import perplexity, window_starts
from model import Transformer
from options import TEMPERATURE
from options import eval as eval_options
from sparse_model import SparseTransformer
from thresholds import cuts_for, load_statistics, uniform

CONTEXT, WINDOW, NUM_WINDOWS = 21, 10, 4


def make_model(cls: type) -> Transformer:
    return build(cls, CONFIG, seed=2, std=0.15, num_hidden_layers=3, max_position_embeddings=320)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(CONFIG["vocab_size"], (97,), generator=torch.Generator().manual_seed(5))


def naive_perplexity(logits_of, tokens: list[int]) -> float:
    """The protocol in words: every loss token predicted alone, from all tokens before it in its window."""
    losses = []
    for i in range(NUM_WINDOWS):
        start = int(i * (len(tokens) - CONTEXT - WINDOW) / NUM_WINDOWS)
        for position in range(start + CONTEXT, start + CONTEXT + WINDOW):
            logits = logits_of(torch.tensor([tokens[start:position]]))[0, -1].double()
            losses.append(-(logits[tokens[position]] - logits.logsumexp(0)).item())
    assert len(losses) == NUM_WINDOWS * WINDOW
    return math.exp(sum(losses) / len(losses))


def test_dense_perplexity_is_the_protocols(tokens):
    model = make_model(Transformer)
    expected = naive_perplexity(model, tokens.tolist())
    assert perplexity(model, tokens, CONTEXT, WINDOW, NUM_WINDOWS) == pytest.approx(expected, rel=1e-5)
    one_later = naive_perplexity(model, tokens.roll(1).tolist())
    assert one_later != pytest.approx(expected, rel=1e-3)  # the comparison can fail


def masked_logits(model: Transformer, thresholds: dict, prefix: int, idx: torch.Tensor) -> torch.Tensor:
    """The dense model with its projections' inputs zeroed by hand; q, k, v (gate, up) share one threshold."""
    hooks = []
    for i, module in enumerate(model.sites):
        threshold = thresholds[i // 4, next(iter(module.segments))]

        def cut(_, args, threshold=threshold):
            x = args[0].clone()
            x[:, prefix:][x[:, prefix:].abs() <= threshold] = 0
            return (x,)

        hooks.append(module.register_forward_pre_hook(cut))
    logits = model(idx)
    for hook in hooks:
        hook.remove()
    return logits


@pytest.mark.parametrize("prefix", [0, 6, 25])
def test_sparse_perplexity_is_that_of_masked_inputs(tokens, prefix):
    dense, sparse = make_model(Transformer), make_model(SparseTransformer)
    sparse.load_state_dict(dense.state_dict())
    statistics = collect(sparse, tokens[None, :64])
    sparse.set_cuts(uniform(None, lambda: statistics, 0.6))
    thresholds = {(i, p): statistics.threshold(i, p, 0.6) for i in range(3) for p in ("q", "o", "gate", "down")}

    expected = naive_perplexity(lambda idx: masked_logits(dense, thresholds, prefix, idx), tokens.tolist())
    actual = perplexity(sparse, tokens, CONTEXT, WINDOW, NUM_WINDOWS, dense_prefix=prefix)
    assert actual == pytest.approx(expected, rel=1e-4)
    assert actual != pytest.approx(perplexity(dense, tokens, CONTEXT, WINDOW, NUM_WINDOWS), rel=1e-3)
    assert sparse.achieved_sparsity() == pytest.approx(0.6, abs=0.08)

    first = sparse.achieved_sparsity()
    perplexity(sparse, tokens, CONTEXT, WINDOW, NUM_WINDOWS, dense_prefix=prefix)
    assert sparse.achieved_sparsity() == first  # counted anew


def test_what_is_not_finite_has_no_perplexity(tokens):
    model = make_model(Transformer)
    model.norm.weight[0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        perplexity(model, tokens, CONTEXT, WINDOW, NUM_WINDOWS)


def test_more_windows_than_places():
    assert len(window_starts(1000, 100, 20, 881)) == 881 and len(window_starts(120, 100, 20, 128)) == 128
    with pytest.raises(ValueError, match="--num_windows 9999999 is more than the 881 places"):
        window_starts(1000, 100, 20, 9999999)


def test_window_starts():
    assert window_starts(1000, 100, 20, 3) == [0, 293, 586]
    assert window_starts(120, 100, 20, 2) == [0, 0]
    with pytest.raises(ValueError, match=r"119 tokens, a window 100 \+ 20"):
        window_starts(119, 100, 20, 2)
    for lengths in ((0, 20, 2), (100, 0, 2), (100, 20, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            window_starts(1000, *lengths)


def test_windows_beyond_the_models_context(tokens):
    with pytest.raises(ValueError, match=r"300 \+ 21 tokens exceed the model's context of 320"):
        perplexity(make_model(Transformer), tokens.repeat(5), 300, 21, 1)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"Hello, my name is Ann and story {i} is of rivers.\n" for i in range(40)))
    return path


def test_main(copy, text, capsys):
    options = {"checkpoint_path": copy, "data": text, "context": 40, "window": 20, "num_windows": 3}
    options |= {"precision": "float32", "json": True}
    dense = evaluation.main(flags(**options))
    assert not (copy / "calibration.safetensors").exists()
    assert dense["sparsity"] == dense["achieved_sparsity"] == 0 and dense["tokens"] == 60

    model = SparseTransformer.from_checkpoint(copy, dtype=torch.float32)
    calibrate(copy, model, [str(text)], 640).save(copy / "calibration.safetensors")
    capsys.readouterr()
    sparse = evaluation.main(flags(sparsity=0.5, sparse_fraction=0.9, **options))
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1]) == sparse and "the first 6 tokens" in "\n".join(lines)
    keys = "task model perplexity tokens sparsity achieved_sparsity thresholds sparse_fraction"
    assert set(sparse) == set(keys.split())
    assert (sparse["thresholds"], sparse["sparse_fraction"], sparse["model"]) == ("uniform", 0.9, "copy")
    assert sparse["achieved_sparsity"] == pytest.approx(0.5, abs=0.06)
    assert sparse["perplexity"] != pytest.approx(dense["perplexity"], rel=1e-6)

    statistics = load_statistics(copy / "calibration.safetensors")
    model.set_cuts(uniform(copy, lambda: statistics, 0.5))
    tokens = torch.tensor(evaluation.load_tokenizer(copy, 300).encode(text.read_text()))
    assert perplexity(model, tokens, 40, 20, 3, dense_prefix=6) == sparse["perplexity"]


def test_repetition():
    assert evaluation.repetition([1, 2, 3]) == evaluation.repetition([1, 2, 3, 4, 1, 2, 3]) == 0
    assert evaluation.repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert evaluation.repetition([7] * 12) == pytest.approx(8 / 9)


def test_generation_is_judged_by_the_dense_model(copy, text):
    model = SparseTransformer.from_checkpoint(copy, dtype=torch.float32)
    calibrate(copy, model, [str(text)], 640).save(copy / "calibration.safetensors")
    options = {"checkpoint_path": copy, "data": text, "tasks": "generation", "context": 10, "window": 30}
    options |= {"num_windows": 70, "precision": "float32"}
    dense, sparse = (evaluation.main(flags(**options, sparsity=sparsity)) for sparsity in (None, 0.6))
    assert dense["tokens"] == 70 * 30 and 0.4 < sparse["achieved_sparsity"] < 0.75 and sparse["repetition"] == 0

    # the texts again, and what the dense model makes of them token by token
    tokens = torch.tensor(evaluation.load_tokenizer(copy, 300).encode(text.read_text()))
    prompts = torch.stack([tokens[start : start + 10] for start in window_starts(len(tokens), 10, 30, 70)])
    model.set_cuts(cuts_for("uniform", 0.6, copy, lambda: load_statistics(copy / "calibration.safetensors"))[1])
    judge = Transformer.from_checkpoint(copy, dtype=torch.float32)
    for writer, found in ((judge, dense), (model, sparse)):
        new = Generator(writer, 70, 40, TEMPERATURE)(prompts, 30).new
        log_q = judge(torch.cat((prompts, new), 1)).log_softmax(-1)
        losses = -log_q[:, 9:-1].gather(-1, new[..., None])[..., 0]
        assert found["perplexity"] == pytest.approx(losses.mean().exp().item(), rel=1e-4)

    # a text ends behind its first end-of-text token
    o, end = eval_options(flags(**options, sparsity=0.6)), new[3, 7].item()
    lengths = [row.index(end) + 1 if end in row else 30 for row in new.tolist()]
    expected = sum(row[:n].sum() for row, n in zip(losses, lengths, strict=True)) / sum(lengths)
    ended, _ = evaluation.evaluate_generation(o, model, tokens, (end,))
    assert ended["tokens"] == sum(lengths) < 70 * 30
    assert ended["perplexity"] == pytest.approx(expected.exp().item(), rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, "--sparsity 1.0"),
        ({"sparsity": 50.0}, "--sparsity 50.0"),
        ({"sparse_fraction": 0.0}, "--sparse_fraction 0.0"),
        ({"thresholds": "greedy", "sparsity": 0.5, "context": 10, "window": 5}, "python greedy.py"),
        ({"device": "mars"}, "--device mars"),
        ({"context": 300, "window": 20}, r"300 \+ 20 tokens exceed"),
        ({"context": 300_000}, r"a window 300000 \+ 512"),
        ({"sparsity": 0.5, "statistics": Path("absent.safetensors"), "context": 10, "window": 5}, "no statistics file"),
        ({"checkpoint_path": Path("absent")}, "absent"),
        ({"tasks": "perplexity,piqa"}, "perplexity is a run of its own"),
        ({"batch_size": 0}, "--batch_size 0 must be at least 1"),
        ({"limit": 0}, "--limit 0 must be at least 1"),
        ({"judge": Path("other")}, "--judge has no effect without --tasks generation"),
        ({"tasks": "generation", "judge": Path("absent"), "context": 9, "window": 9}, "absent"),
        ({"tasks": "generation", "sparsity": 0.5, "sparse_fraction": 0.5}, "whose prompts are dense"),
        ({"tasks": "generation", "context": 100, "window": 100}, "exceed|do not fit"),
    ],
)
def test_mistakes(tiny, text, options, message):
    with pytest.raises(ValueError, match=message):
        evaluation.main(flags(**({"checkpoint_path": tiny, "data": text, "precision": "float32"} | options)))


def test_an_old_flag_ends_in_one_line_that_names_the_new_one(tiny):
    with pytest.raises(ValueError, match=r"--allocation is now --thresholds \{best,"):
        evaluation.main(flags(checkpoint_path=tiny, allocation="greedy"))
