"""Lossless drafts: a few tokens are guessed, one step of several rows verifies them, and plain decoding's are kept.

A round starts from the text's last token t at position p. Guesses d1 ... dk come from a model that is quicker than the
verifier, or from earlier text. One step feeds t, d1, ..., dk at positions p ... p + k. The draw behind d1 ... di is
plain decoding's if those i guesses are right. So guess d(i+1) is accepted where it equals that draw, and the first draw
that differs from its guess is one token more. A draw is a hash of seed, position and token (`decoder.random_bits`), and
a row of a fused step equals a step of that row alone, to the bit. So the text is plain decoding's, whatever is guessed.
"""

import copy
import math
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from decoder import MAX_ROWS, FusedCpuStep, FusedGpuStep, Generator, not_finite, prefill
from sparse_model import SparseTransformer

MAX_DRAFTS = MAX_ROWS - 1
CHOICES = (1, 3, 5, 7)  # of an adapting number of guesses: products take rows by twos on a GPU, by 2, 4 or 8 on a CPU
SUFFIXES = (2, 3, 4, 8)  # tokens that are looked up; behind one token alone a guess was right in 17 % (SmolLM2-135M)
# The acceptance that is expected at first, of a model's guesses and of those behind each of SUFFIXES, and how many
# guesses' worth that is.
EXPECTED, WEIGHT = (0.8, 0.35, 0.5, 0.6, 0.9), 4.0
MEMORY = 0.97  # share of the acceptance seen so far that stays in each round
RETRY = 0.01  # share of plain decoding's time that is spent on finding out whether guesses pay by now
PLAIN_EVERY = 32  # rounds
BURST = 8  # plain steps on a GPU between two looks, where nobody waits for tokens and no guess was accepted lately


def same_weights(model: SparseTransformer) -> SparseTransformer:
    """A model that shares the weights of this one, and its cache if there is one, and has cuts of its own."""
    shared = [*model.parameters(), *(module.scale for module in model.sites), model.output]
    shared += [block.attention.kv_cache for block in model.layers]
    return copy.deepcopy(model, {id(part): part for part in shared if part is not None})


def same_keys(draft: SparseTransformer, model: SparseTransformer) -> bool:
    """Whether a draft may read the model's cache: it is the model with other cuts, or in another form of weights."""
    form = dict.fromkeys(("name", "quant", "groupsize", "tie_embeddings"))
    alike = vars(model.config) | form == vars(draft.config) | form and draft.dtype == model.dtype
    return alike and torch.equal(draft.norm.weight, model.norm.weight)


def acceptance(rounds: list[tuple[int, int]]) -> dict:
    """Of rounds (guessed, accepted): the share of guesses that were accepted, in all and at each position."""
    tried = [[accepted > i for k, accepted in rounds if k > i] for i in range(max((k for k, _ in rounds), default=0))]
    rate = sum(map(sum, tried)) / max(1, sum(map(len, tried)))
    return {"accept_rate": rate, "accepted_by_position": [sum(right) / len(right) for right in tried]}


class Lookup:
    """Guesses without a model: what followed the text's last tokens where they stood before."""

    def __init__(self, text: list[int]):
        self.text: list[int] = []
        self.behind: dict[tuple[int, ...], int] = {}  # where the token after the last such tokens stands
        self.extend(text)

    def extend(self, tokens: list[int]) -> None:
        for token in tokens:
            end = len(self.text)
            for n in SUFFIXES:
                if n <= end:
                    self.behind[tuple(self.text[end - n :])] = end
            self.text.append(token)

    def guess(self, k: int) -> tuple[int, list[int]]:
        """Which of SUFFIXES is the longest that is found, from 1 on, and k guesses; 0 and none without one."""
        text = self.text
        for kind in range(len(SUFFIXES), 0, -1):
            if at := self.behind.get(tuple(text[-SUFFIXES[kind - 1] :])):
                period = len(text) - at  # beyond the end the guesses repeat themselves
                return kind, [text[at + i % period] for i in range(k)]
        return 0, []


class DraftLength:
    """How many guesses pay: from the acceptance of those before and the seconds of rounds with each number.

    Acceptance is counted by position in the round, for each `kind` of guesses apart: 0 is a model's, others are
    `Lookup`'s by their suffix.
    seconds: of a round by its number of guesses; 0: of a plain step.
    """

    def __init__(self, seconds: dict[int, float]):
        self.seconds, self.rounds, self.measured = seconds, 0, dict.fromkeys(seconds, 0)
        self.counts = defaultdict(lambda: [[0.0, 0.0] for _ in range(MAX_DRAFTS)])  # tried and accepted
        self.plain_s: dict[int, float] = defaultdict(float)  # since the last guesses

    def expected(self, kind: int) -> list[float]:
        """Tokens of a round with 0, 1, ... guesses; a position rarely tried is taken to be like the one before it."""
        rate, right, tokens = EXPECTED[kind], 1.0, [1.0]
        for tried, accepted in self.counts[kind]:
            rate = (accepted + WEIGHT * rate) / (tried + WEIGHT)
            right *= rate
            tokens.append(tokens[-1] + right)
        return tokens

    def choose(self, kind: int, late: int = 0) -> int:
        """The number of guesses with the most tokens per second; at times another, to learn what that would bring.

        late: tokens that the draft has to be fed before it guesses.
        """
        plain, most, tokens = self.seconds[0], max(self.seconds), self.expected(kind)
        feeding = late * (self.seconds[most] - plain) / most
        seconds = {k: s + feeding * (k > 0) for k, s in self.seconds.items()}
        best = max(seconds, key=lambda k: tokens[k] / seconds[k])
        if best == 0:
            lost = {k: s - tokens[k] * plain for k, s in seconds.items() if k}
            least = min(lost, key=lost.get)
            best = least if lost[least] < RETRY * self.plain_s[kind] else 0
        elif self.rounds - self.measured[0] > PLAIN_EVERY:  # plain steps may be quicker by now
            best = 0
        return best

    def learn(self, kind: int, k: int, accepted: int, seconds: float) -> None:
        """What a round with k guesses came to."""
        self.rounds += 1
        self.plain_s[kind] = 0.0 if k else self.plain_s[kind] + self.seconds[0]
        if k in self.seconds:
            before, age = self.seconds[k], self.rounds - self.measured[k]
            weight = min(max(age / PLAIN_EVERY, 0.1), 0.5)
            self.seconds[k] += weight * (min(max(seconds, before / 2), 2 * before) - before)
            self.measured[k] = self.rounds
        for i, count in enumerate(self.counts[kind] if k else ()):
            count[0] = MEMORY * count[0] + (i < min(accepted + 1, k))
            count[1] = MEMORY * count[1] + (i < accepted)


class CpuRounds:
    """Rounds on a CPU. plain: the step of one row, whose `tokens` hold the text; draft: the same of a draft, or None.

    make_verifier: makes the step that verifies, of so many `drafts`. own_cache: the draft does not share the verifier's
    cache, so that it must be fed each token of the text, too.
    """

    def __init__(self, plain, draft, make_verifier: Callable, own_cache: bool):
        self.plain, self.draft, self.make_verifier, self.verifiers = plain, draft, make_verifier, {}
        self.own_cache = own_cache

    def start(self, token: Tensor, position: int, seed: int) -> None:
        """Begins behind a text of `position` tokens, which the caches hold, with a token [1]."""
        self.seed = seed
        self.position = self.known = position  # known: so many tokens of the text are in the draft's own cache
        for step in (self.plain, self.draft, *self.verifiers.values()):
            self._start(step, token, position)

    def _start(self, step, token: Tensor, position: int) -> None:
        if step is not None:
            rows = len(step.tokens)
            step.start(token.expand(rows), list(range(position, position + rows)), [self.seed] * rows)

    def late(self) -> int:
        """Tokens of the text that the draft has to be fed before it guesses."""
        return self.position - self.known if self.own_cache else 0

    def verifier(self, k: int):
        if k not in self.verifiers:
            self.verifiers[k] = self.make_verifier(drafts=k + 1)
            self._start(self.verifiers[k], self.plain.tokens[0, self.position :][:1], self.position)
        return self.verifiers[k]

    def round(self, k: int, guesses: list[int]) -> tuple[list[int], bool]:
        """The new tokens of a round with k guesses, given or the draft's, and whether their logits were finite."""
        for at in range(self.position - self.late(), self.position):
            self.draft.start(self.plain.tokens[0, at : at + 1], [at], [self.seed])
            self.draft.replay()
        new, finite = self._verify(k, guesses)
        self.known, self.position = self.position + min(len(new), k), self.position + len(new)
        return new, finite

    def steps(self, n: int) -> tuple[list[int], bool]:
        """The new tokens of n plain steps, and whether the last one's logits were finite."""
        self.plain.replay(n)
        self.position += n
        new = self.plain.tokens[0, self.position + 1 - n : self.position + 1].tolist()
        return new, self._finite(new)

    def _finite(self, new: list[int]) -> bool:
        return new[-1] >= 0

    def _verify(self, k: int, guesses: list[int]) -> tuple[list[int], bool]:
        at, text, verifier = self.position, self.plain.numbers[0], self.verifier(k)
        if self.draft:
            self.draft.feed([text[at]], at)
            self.draft.replay(k)
            guesses = self.draft.numbers[0, at + 1 : at + 1 + k].tolist()

        verifier.feed([text[at], *guesses], at)
        verifier.replay()
        new = verifier.numbers.diagonal(at + 1)[: k + 1].tolist()
        new = new[: next((i for i in range(k) if guesses[i] != new[i]), k) + 1]
        text[at + 1 : at + 1 + len(new)] = new
        self.plain.feed(new[-1:], at + len(new))
        return new, min(new) >= 0


class GpuRounds(CpuRounds):
    """Rounds on a GPU, each a CUDA graph of its own: guesses, verification, acceptance. The host reads the outcome."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        device = self.plain.position.device
        self.graphs: dict[int, Callable[[], None]] = {}
        self.rows = torch.arange(MAX_ROWS, device=device)
        self.guesses = torch.zeros(MAX_DRAFTS, dtype=torch.int64, device=device)
        self.outcome = torch.zeros(MAX_ROWS + 2, dtype=torch.int64, device=device)  # see `launch`

    def _finite(self, new: list[int]) -> bool:
        return bool(self.plain.logits[0].amax().isfinite())

    def _verify(self, k: int, guesses: list[int]) -> tuple[list[int], bool]:
        if guesses:
            self.guesses[:k] = torch.tensor(guesses)
        if k not in self.graphs:
            self.verifier(k)
            launch, state = partial(self.launch, k), (self.plain.token, self.plain.position)
            self.graphs[k] = self.plain.kernels.record_graph(launch, *state).replay if self.rows.is_cuda else launch
        self.graphs[k]()
        *new, kept, finite = self.outcome.tolist()
        return new[:kept], bool(finite)

    def launch(self, k: int) -> None:
        """Launches a round of k guesses."""
        plain, draft, verifier, guesses = self.plain, self.draft, self.verifiers[k], self.guesses[:k]
        if draft:
            draft.token.copy_(plain.token)
            torch.add(plain.position, 0, out=draft.position)  # a kernel: what follows starts while it ends
            for _ in range(k):
                draft.step()
            torch.gather(draft.tokens[0], 0, plain.position + 1 + self.rows[:k], out=guesses)

        verifier.token[:1].copy_(plain.token)
        verifier.token[1:].copy_(guesses)
        torch.add(self.rows[: k + 1], plain.position, out=verifier.position)
        verifier.step()

        # the step has left its draws in `token`: those behind accepted guesses are text, with one more
        drawn = verifier.token
        accepted = (drawn[:k] == guesses).cumprod(0).sum(0, keepdim=True)
        plain.tokens[0].index_copy_(0, plain.position + 1 + self.rows[: k + 1], drawn)
        plain.token.copy_(drawn.gather(0, accepted))
        plain.position.add_(accepted + 1)

        # for the host: the draws, how many are kept, and whether these come from finite logits
        finite = verifier.top.amax(1).isfinite() | (self.rows[: k + 1] > accepted)
        self.outcome[: k + 1].copy_(drawn)
        self.outcome[-2:-1].copy_(accepted + 1)
        self.outcome[-1].copy_(finite.all())


@dataclass(eq=False)
class DraftingGenerator(Generator):
    """A Generator of batch 1 with fused steps, whose text it guesses ahead: the same tokens in less time.

    draft: the model that guesses, with its cuts set; None: `Lookup` does. A draft whose keys are like the model's
        reads the model's cache; another gets a cache of its own.
    speculate_k: guesses per round, 1 to MAX_DRAFTS; None: as many as pay, see `DraftLength`, also none.

    A Generation's `rounds` say what became of the guesses.
    """

    draft: SparseTransformer | None = None
    speculate_k: int | None = None

    def __post_init__(self):
        assert self.step == "fused" and self.batch_size == 1
        self.spare = self.speculate_k or MAX_DRAFTS
        super().__post_init__()
        own_cache = self.draft is not None and not same_keys(self.draft, self.model)
        if own_cache:
            for ours, theirs in zip(self.draft.layers, self.model.layers, strict=False):
                if ours.attention.kv_cache is theirs.attention.kv_cache:  # of `same_weights`
                    ours.attention.kv_cache = None
            self.draft.setup_caches(1, self.max_length, self.spare)
        elif self.draft:
            self.draft.inv_freq = self.model.inv_freq
            for ours, theirs in zip(self.draft.layers, self.model.layers, strict=True):
                ours.attention.kv_cache = theirs.attention.kv_cache

        kind, rounds = (FusedCpuStep, CpuRounds) if self.device.type == "cpu" else (FusedGpuStep, GpuRounds)
        draft = self.draft and kind(self.draft, self.temperature, self.top_k)
        verifier = partial(kind, self.model, self.temperature, self.top_k, self.dense)
        self._drafting = rounds(self._step, draft, verifier, own_cache)
        self._length: DraftLength | None = None

    def _first_token(self, row: int, prompt: Tensor) -> Tensor:
        self._lookup = None if self.draft else Lookup(prompt.tolist())
        if self._drafting.own_cache:
            prefill(self.draft, prompt[None], self._row_seed, 0.0, 1)
        return super()._first_token(row, prompt)

    def _decode(self, first: Tensor, lengths: list[int], count: int, on_token, eos_ids) -> int:
        self._rounds, start = [], (first.flatten(), lengths[0], self._seeds[0])
        self._drafting.start(*start)
        if self._length is None and count > 1:
            self._length = DraftLength(self._measure(start))
        burst = 1 if self.device.type == "cpu" or on_token or eos_ids else BURST

        tokens, seen = first.flatten().tolist(), 0
        while True:
            for token in tokens[: count - seen]:
                seen += 1
                if (on_token and on_token(torch.tensor([[token]]))) or token in eos_ids or seen == count:
                    return seen
            if self._lookup:
                self._lookup.extend(tokens)
            tokens = self._round(count - seen, burst)

    def _round(self, left: int, burst: int) -> list[int]:
        """The tokens of the next round, or of `burst` plain steps, where so many are left to be made."""
        rounds, length = self._drafting, self._length
        kind, guesses = self._lookup.guess(MAX_DRAFTS) if self._lookup else (0, [])
        k = (self.speculate_k or length.choose(kind, rounds.late())) if guesses or self.draft else 0
        if self.device.type == "cpu":  # elsewhere each number has a graph of its own
            k = min(k, left - 1)

        if k or any(accepted for _, accepted in self._rounds[-BURST:]):
            burst = 1
        began, n = time.perf_counter(), min(burst, left)
        tokens, finite = rounds.round(k, guesses[:k]) if k else rounds.steps(n)
        if not finite:
            raise not_finite(self.model.dtype)
        seconds = (time.perf_counter() - began) / n
        for _ in range(n):
            length.learn(kind, k, len(tokens) - n, seconds)
            self._rounds.append((k, len(tokens) - n))
        return tokens

    def _measure(self, start: tuple) -> dict[int, float]:
        """Seconds of a plain step (0) and of rounds by their number of guesses, of which this compiles the kernels."""
        seconds = dict.fromkeys((0, self.speculate_k) if self.speculate_k else (0, *CHOICES), math.inf)
        for k in [*seconds] * 4:
            self._drafting.start(*start)
            began = time.perf_counter()
            self._drafting.round(k, [0] * k) if k else self._drafting.steps(1)
            seconds[k] = min(seconds[k], time.perf_counter() - began)
        self._drafting.start(*start)
        return seconds

    @property
    def left_grid(self) -> bool:
        steps = (self._step, *self._drafting.verifiers.values())
        return any(isinstance(step, FusedGpuStep) and step.left_grid for step in steps)
