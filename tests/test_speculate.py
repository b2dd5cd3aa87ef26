"""Drafts: the text is plain decoding's, to the bit, for any guesses; guesses by lookup; how many guesses pay."""

import copy
import json
import shutil
from functools import partial

import pytest
import torch
from models import FUSED, build_cut, change_config, flags, random_tokens
from test_cpu_sums import random_model

import generate
from decoder import FusedGpuStep, Generator
from kernels import cpu
from sparse_model import SparseTransformer
from speculate import MAX_DRAFTS, DraftingGenerator, DraftLength, GpuRounds, Lookup, acceptance, same_keys, same_weights
from thresholds import Cuts

COMPILER = pytest.mark.skipif(cpu.library() is None, reason="no C++ compiler")
GPU = pytest.param("cuda", marks=pytest.mark.gpu)
PROMPT, NEW = 6, 40


def milder(model: SparseTransformer, share: float = 0.7) -> SparseTransformer:
    """The model with lower thresholds, so that it is like the dense one, and the same weights."""
    view = same_weights(model)
    thresholds = [share * module.threshold for module in model.sites]
    view.set_cuts(Cuts(0.3, thresholds, [module.shift for module in model.sites]))
    return view


def draft_of(kind: str, model: SparseTransformer) -> SparseTransformer | None:
    """A sparser draft of the dense model; with "own cache" one whose keys are not the model's."""
    if kind == "prompt":
        return None
    draft = milder(model)
    if kind == "own cache":
        draft.norm = copy.deepcopy(model.norm)
        draft.norm.weight.mul_(1.01)
    assert same_keys(draft, model) == (kind == "self")
    return draft


def texts_of(generator: Generator, prompts: list[torch.Tensor], **options) -> list[list[int]]:
    return [generator(prompt, NEW, **options).new[0].tolist() for prompt in prompts]


def assert_lossless(model, draft, temperature, guesses, dense=True, text=None):
    """That drafting gives plain decoding's texts; returns the rounds. text: given prompts, else random ones."""
    options = {"step": "fused", "temperature": temperature, "top_k": 20, "dense": dense, "seed": 3}
    prompts = [random_tokens(1, PROMPT, 101, seed=i).to(model.device) for i in range(3)]
    size = 1, PROMPT + NEW
    plain = texts_of(Generator(model, *size, **options, spare=guesses or MAX_DRAFTS), prompts)
    drafting = DraftingGenerator(model, *size, **options, draft=draft, speculate_k=guesses)
    generations = [drafting(prompt, NEW) for prompt in prompts]
    assert [generation.new[0].tolist() for generation in generations] == plain
    for generation in generations:
        assert NEW - 1 <= sum(accepted + 1 for _, accepted in generation.rounds) <= NEW - 1 + drafting.spare
    return [r for generation in generations for r in generation.rounds], drafting


@COMPILER
@pytest.mark.parametrize("guesses", [1, 2, 3, 4, 5, 6, 7, None])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("kind", ["self", "own cache", "prompt"])
def test_the_text_is_plain_decodings(kind, temperature, guesses):
    model = random_model(torch.bfloat16, "none", "cut")
    model.setup_caches(1, PROMPT + NEW, guesses or MAX_DRAFTS)  # which a copy with keys of its own must not share
    rounds, _ = assert_lossless(model, draft_of(kind, model), temperature, guesses)
    assert {k for k, _ in rounds} - {0} <= set(range(1, (guesses or MAX_DRAFTS) + 1))
    if guesses and kind != "prompt":
        assert 0.02 < acceptance(rounds)["accept_rate"] < 0.99


@COMPILER
@pytest.mark.parametrize("cuts", ["dense", "shifted"])
@pytest.mark.parametrize("quant", ["none", "int8", "int4"])
def test_of_a_verifier_in_any_form(quant, cuts):
    """Cut or not; a draft in another form of the same weights reads its cache."""
    model = random_model(torch.float16 if quant == "none" else torch.bfloat16, quant, cuts)
    assert_lossless(model, milder(model), 0.8, 4, dense=cuts == "dense")


@pytest.mark.gpu
@pytest.mark.parametrize("guesses", [1, 4, 7, None])
@pytest.mark.parametrize("quant", ["none", "int8", "int4"])
@pytest.mark.parametrize("kind", ["self", "own cache", "prompt"])
def test_the_text_is_plain_decodings_on_a_gpu(kind, quant, guesses):
    options = {"quant": quant, "groupsize": 16, "intermediate_size": 176} if quant != "none" else {}
    model = build_cut(FUSED, dtype=torch.bfloat16, device="cuda", **options)
    for temperature, dense in ((0.0, True), (0.8, False)):
        _, drafting = assert_lossless(model, draft_of(kind, model), temperature, guesses, dense)
        assert not drafting.left_grid


@COMPILER
def test_tokens_are_seen_one_by_one_and_the_text_ends_where_it_should():
    """By a token that ends it, or by who looks; tokens beyond are not shown. The next text begins anew."""
    model = random_model(torch.bfloat16, "none", "cut")
    options = {"step": "fused", "top_k": 20, "dense": True}
    drafting = DraftingGenerator(model, 1, PROMPT + NEW, **options, draft=milder(model, 0.0), speculate_k=7)
    prompt, seen = random_tokens(1, PROMPT, 101), []
    text = drafting(prompt, NEW, lambda token: seen.append(token.item())).new[0].tolist()
    assert seen == text and len(text) == NEW

    end = next(i for i in range(3, NEW) if text[i] not in text[:i] and i % 8)
    assert drafting(prompt, NEW, None, {text[end]}).new[0].tolist() == text[: end + 1]
    seen.clear()
    assert drafting(prompt, NEW, lambda token: seen.append(token.item()) or len(seen) == 4).new[0].tolist() == text[:4]
    assert seen == text[:4]
    assert [drafting(prompt, n).new.shape[1] for n in (1, 2, NEW)] == [1, 2, NEW]
    with pytest.raises(ValueError, match="do not fit this Generator's cache of 1 rows and 46 positions"):
        drafting(prompt, NEW + 1)


@COMPILER
def test_a_perfect_draft_is_accepted_throughout():
    model = random_model(torch.bfloat16, "none", "cut")
    rounds, _ = assert_lossless(model, milder(model, 0.0), 0.8, 4)
    assert all(k == accepted for k, accepted in rounds)


@COMPILER
@pytest.mark.parametrize("kind", ["self", "prompt"])
def test_logits_that_are_not_finite(kind):
    model = random_model(torch.bfloat16, "none", "cut", n_layer=1)
    drafting = DraftingGenerator(model, 1, 60, 0.8, 20, "fused", draft=draft_of(kind, model), speculate_k=2)
    prompt = torch.tensor([[5, 6, 5, 6, 5]])
    drafting(prompt, 4)
    model.layers[0].feed_forward.w2.weight[:] = float("nan")
    with pytest.raises(ValueError, match="in bfloat16 is not finite"):
        drafting(prompt, 4)


def test_weights_are_shared_and_cuts_are_not():
    model = build_cut(FUSED, dtype=torch.bfloat16, quant="int8", shifted=True)
    before = [module.threshold.clone() for module in model.sites]
    view = milder(model)
    for ours, theirs in zip(view.parameters(), model.parameters(), strict=True):
        assert ours is theirs
    for ours, theirs, threshold in zip(view.sites, model.sites, before, strict=True):
        assert ours.scale is theirs.scale and not torch.equal(ours.threshold, threshold)
        assert torch.equal(theirs.threshold, threshold)
    assert (view.sparsity, model.sparsity) == (0.3, 0.5)


# ---------------------------------------------------------------- guesses by lookup


@pytest.mark.parametrize(
    ("text", "guess"),
    [
        ([], (0, [])),
        ([1, 2, 3], (0, [])),
        ([1, 2, 3, 1], (0, [])),  # one token is too little
        ([1, 2, 3, 1, 2], (1, [3, 1, 2, 3])),  # what followed, then the guesses themselves
        ([1, 2, 9, 1, 2, 3, 1, 2], (1, [3, 1, 2, 3])),  # the latest of two
        ([7, 1, 2, 8, 3, 1, 2, 9, 7, 1, 2], (2, [8, 3, 1, 2])),  # the longest suffix before the latest
        ([0, 1, 2, 3, 4, 5, 6, 7, 9, 0, 1, 2, 3, 4, 5, 6, 7], (4, [9, 0, 1, 2])),
        ([5, 5, 5], (1, [5, 5, 5, 5])),
    ],
)
def test_lookup(text, guess):
    assert Lookup(text).guess(4) == guess
    grown = Lookup([])
    for token in text:
        grown.extend([token])
    assert grown.guess(4) == guess


# ---------------------------------------------------------------- how many guesses

COSTS = {k: (1.0 if k == 0 else 1.2 + 0.05 * k + 0.4 * k) for k in range(MAX_DRAFTS + 1)}


def simulated(rate, rounds=2000, length=None, kind=0) -> tuple[float, list[int]]:
    """Tokens per second against plain decoding's, and the numbers of guesses, where each is right at this rate."""
    length, generator = length or DraftLength(dict(COSTS)), torch.Generator().manual_seed(0)
    seconds = tokens = 0
    chosen = []
    for _ in range(rounds):
        k = length.choose(kind)
        right = (torch.rand(k, generator=generator) < rate).long().cumprod(0).sum().item()
        length.learn(kind, k, right, COSTS[k])
        seconds, tokens = seconds + COSTS[k], tokens + right + 1
        chosen.append(k)
    return tokens / seconds, chosen


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.4])
def test_guesses_that_do_not_pay_cost_at_most_3_percent(rate):
    speed, chosen = simulated(rate)
    assert speed > 0.97 and chosen[-200:].count(0) > 150 and any(chosen[-200:])


def test_guesses_that_pay_are_as_many_as_pay_most():
    for rate, best in ((0.8, (2, 6)), (0.95, (5, 7))):
        speed, chosen = simulated(rate)
        fixed = max(sum(rate**i for i in range(k + 1)) / COSTS[k] for k in COSTS)
        assert speed > 0.97 * fixed and best[0] <= sorted(chosen)[len(chosen) // 2] <= best[1]


def test_guesses_are_taken_up_again_when_the_text_changes():
    length = DraftLength(dict(COSTS))
    simulated(0.0, 500, length)
    speed, _ = simulated(0.9, 3000, length)
    assert speed > 1.3


def test_acceptance_by_position():
    rounds = [(2, 2), (2, 0), (0, 0), (3, 1)]
    assert acceptance(rounds) == {"accept_rate": 3 / 7, "accepted_by_position": [2 / 3, 1 / 3, 0.0]}
    assert acceptance([(0, 0)]) == {"accept_rate": 0.0, "accepted_by_position": []}


# ---------------------------------------------------------------- on a GPU, interpreted


def test_a_round_on_a_gpu_keeps_what_plain_steps_draw(monkeypatch):
    """Two right guesses and a wrong one: three tokens, where three plain steps go."""
    from test_few_rows import DEVICE, true_splats

    if DEVICE == "cuda":
        pytest.skip("the real graphs are tested above")
    true_splats.__wrapped__(monkeypatch)
    model = build_cut(FUSED, dtype=torch.bfloat16, n_layer=1)
    model.setup_caches(1, 16)
    plain = FusedGpuStep(model, 0.8, 20, dense=True)
    plain.start(torch.tensor([9]), [2], [4])
    for _ in range(4):
        plain.step()
    drawn = plain.tokens[0, 3:7].tolist()

    rounds = GpuRounds(plain, None, partial(FusedGpuStep, model, 0.8, 20, True), False)
    rounds.start(torch.tensor([9]), 2, 4)
    guesses = [*drawn[:2], (drawn[2] + 1) % 101]
    assert rounds.round(3, guesses) == (drawn[:3], True)
    assert (rounds.position, plain.position.item(), plain.token.item()) == (5, 5, drawn[2])
    assert plain.tokens[0, 2:6].tolist() == [9, *drawn[:3]]


# ---------------------------------------------------------------- the command line

BRIEF = {"device": "cpu", "compile": True, "max_new_tokens": 8, "num_samples": 1, "json": True}


@pytest.fixture(scope="module")
def checkpoint(tiny, tmp_path_factory):
    """A checkpoint with statistics beside it."""
    from calibrate import main as calibrate

    folder = shutil.copytree(tiny, tmp_path_factory.mktemp("org") / "calibrated")
    calibrate(flags(checkpoint_path=folder, num_tokens=200, device="cpu"))
    return folder


@COMPILER
@pytest.mark.parametrize("draft", ["self", "prompt", "PATH"])
def test_generate_reports_what_was_guessed(draft, checkpoint, capsys):
    options = BRIEF | {"checkpoint_path": checkpoint, "prompt": "Hello, my name is Ann", "compare_dense": True}
    plain = generate.main(flags(**BRIEF, checkpoint_path=checkpoint, prompt="Hello, my name is Ann"))
    sparsity = {} if draft == "prompt" else {"draft_sparsity": 0.25}
    path = checkpoint if draft == "PATH" else draft
    result = generate.main(flags(**options, draft=path, speculate_k=2, **sparsity))
    assert result["text"] == plain["text"] and result["speedup"] > 0
    assert (result["draft"], result["speculate_k"]) == (str(path), 2)
    assert 0 <= result["accept_rate"] <= 1 <= result["tokens_per_round"] <= 3
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result


@COMPILER
def test_a_chat_with_guesses(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", __import__("io").StringIO("Hello\nHello\n"))
    generate.main(flags(checkpoint_path=checkpoint, device="cpu", compile=True, draft="prompt", interactive=True))
    assert capsys.readouterr().out.count("tokens/s]") == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft": "self", "compile": None}, "--draft has no effect without --compile"),
        ({"draft": "self", "unfused": True}, "--unfused has no effect with --draft"),
        ({"draft": "self", "batch_size": 2}, "--batch_size has no effect with --draft"),
        ({"draft": "self", "prompts": "FILE"}, "--prompts has no effect with --draft"),
        ({"draft": "prompt", "draft_sparsity": 0.5}, "--draft_sparsity has no effect with --draft prompt"),
        ({"draft": "self", "draft_sparsity": 0}, "at 0 it is the model itself"),
        ({"draft_sparsity": 0.5}, "--draft_sparsity has no effect without --draft"),
        ({"speculate_k": 2}, "--speculate_k has no effect without --draft"),
        ({"draft": "self", "speculate_k": 0}, "--speculate_k 0 is outside 1 to 7"),
        ({"draft": "self", "speculate_k": 8}, "--speculate_k 8 is outside 1 to 7"),
        ({"draft": "self", "precision": "float32"}, "--draft needs --precision bfloat16 or float16"),
        ({"draft": "prompt", "prompt": "150", "speculate_k": 3}, "with room for 3 guesses, do not fit tiny's context"),
        ({"draft": "no/such"}, "no/such"),
    ],
)
def test_mistakes(options, message, tiny):
    with pytest.raises(ValueError) as error:
        generate.main(flags(**(BRIEF | {"checkpoint_path": tiny} | options)))
    assert message in str(error.value) and "\n" not in str(error.value)


@COMPILER
def test_drafts_that_cannot_be(tiny, copy):
    run = BRIEF | {"checkpoint_path": tiny, "draft": copy, "draft_sparsity": 0}
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    first, second = sorted(vocab, key=vocab.get)[-2:]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=r"has another vocabulary than .*: token 2.* is b"):
        generate.main(flags(**run))
    change_config(copy, vocab_size=301)
    with pytest.raises(ValueError, match="has another vocabulary than tiny, of 301 tokens, not 300"):
        generate.main(flags(**run))
    change_config(copy, vocab_size=300, architectures=["Olmo2ForCausalLM"], model_type="olmo2")
    with pytest.raises(ValueError, match="cannot guess: a fused step does not implement pre_norm = False"):
        generate.main(flags(**run))
    with pytest.raises(ValueError, match="--draft needs fused steps: a fused step does not implement"):
        generate.main(flags(**(run | {"checkpoint_path": copy, "draft": "prompt", "draft_sparsity": None})))
