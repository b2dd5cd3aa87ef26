"""Tokenizers of Llama-family checkpoints: tokenizer.json, sentencepiece and tiktoken behind one small interface.

    tokenizer = load_tokenizer("checkpoints/org/name", vocab_size=32000)
    ids = tokenizer.encode("Hello world", bos=tokenizer.adds_bos)
    text = tokenizer.decode(new_ids, after=ids)

A backend turns text into ids and one id into bytes; all else (decoding, streaming, chats) is common to the three. What
transformers does with a checkpoint's files is the standard, but for one thing: a message cannot bring special tokens.
"""

import base64
import codecs
import json
import math
import multiprocessing
import os
import re
import signal
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import datetime
from functools import cached_property
from pathlib import Path
from resource import RLIMIT_AS, RLIMIT_CORE, RLIMIT_CPU, setrlimit

import tokenizers
from tokenizers import AddedToken

from formats.files import one_line, read_json, shown

LLAMA3_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
LLAMA3_SPLIT += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_RESERVED = [f"<|reserved_special_token_{i}|>" for i in range(251)]
LLAMA3_SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", *_RESERVED[:4], "<|start_header_id|>", "<|end_header_id|>"]
LLAMA3_SPECIAL += [_RESERVED[4], "<|eot_id|>", *_RESERVED[5:]]
# files around a tokenizer, all optional
SETTINGS = "config.json generation_config.json tokenizer_config.json special_tokens_map.json added_tokens.json".split()
NAMED = "bos_token eos_token unk_token sep_token pad_token cls_token mask_token".split()  # settings: special tokens
TYPES = dict.fromkeys(NAMED, (str, dict)) | {"bos_token_id": (int,), "eos_token_id": (int,), "legacy": (bool,)}
TYPES |= {"add_bos_token": (bool,), "added_tokens_decoder": (dict,), "chat_template": (str, dict)}  # or null, or lists
GUARD = "\ufdd0"  # a code point that Unicode keeps out of text: the character after it is no part of a special token
ANSWER = "Wolf, 31 wolves"  # an answer that no template has of its own
SECONDS, BYTES = 2, 10**9  # that a template may take
CHARACTERS, TIMES = 1_000_000, 10  # that a template may write: so many, and so many times its messages
GROWTH = 100  # characters that a normaliser may make of one


class Tokenizer:
    """What the three backends share. Each gives _piece_bytes(id) -> bytes of a token of its own, and _encode(text,
    special) -> ids, where special says whether the strings of special tokens become their ids and a GUARD is taken off,
    or _encode_part(text, inside) -> ids of what stands before the first added token, or after one (inside)."""

    added: dict[int, AddedToken]  # strings that are one token wherever they stand; a special one in templates alone
    own_size: int  # one more than the largest id that is not an added token's
    limit: float = math.inf  # the model's vocabulary: an added token may have an id beyond it, but no text may hold it
    bos_id: int | None = None
    end_ids: tuple[int, ...] = ()  # all ids that end a text by the checkpoint's files, maybe none
    adds_bos = False  # whether the checkpoint's own convention puts bos before a plain prompt
    leading_spaces = 0  # the encoder puts a space before a text: how many to take off again (inf: all)
    template: str | None = None
    named: dict[str, str]  # bos_token, eos_token, ... as the template sees them

    @cached_property
    def special(self) -> dict[str, int]:
        return {token.content: i for i, token in self.added.items() if token.special}

    @property
    def vocab_size(self) -> int:
        return max(self.own_size, *(i + 1 for i in self.added), 0)

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """All ids that end a text or an answer: `end_ids`, then that of the token that the template puts after one."""
        question = {"role": "user", "content": "?"}
        try:
            text = self._render([question, {"role": "assistant", "content": ANSWER}, question]) if self.template else ""
        except ValueError:  # where it matters, encode_chat says so
            return self.end_ids
        after = text.partition(ANSWER)[2].lstrip()
        ends = [i for i, token in self.added.items() if after.startswith(token.content) and i < self.limit]
        return tuple(dict.fromkeys([*self.end_ids, *sorted(ends, key=lambda i: len(self.added[i].content))[-1:]]))

    def token_id(self, token: str) -> int | None:
        return next((i for i, added in self.added.items() if added.content == token), None)

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 of a token, which may end inside a character; b"" for special tokens and unknown ids."""
        token = self.added.get(token_id)
        return self._piece_bytes(token_id) if token is None else b"" if token.special else token.content.encode()

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """The text taken literally ("<s>" is three characters), behind bos_id if `bos` and there is one. Raises
        ValueError if it holds an added token that the model's vocabulary lacks."""
        return [self.bos_id] * (bos and self.bos_id is not None) + self._ids(text, special=False)

    def _ids(self, text: str, special: bool) -> list[int]:
        ids = self._encode(text.encode("utf-8", "replace").decode(), special)
        if self.vocab_size > self.limit and max(ids, default=0) >= self.limit:
            reason = f"has the id {max(ids)}, but the model's vocabulary is {self.limit}: leave it out"
            raise ValueError(f"{shown(self.added[max(ids)].content)} in the text {reason}")
        return ids

    def decode(self, ids: Iterable[int], after: Iterable[int] = ()) -> str:
        """The text of ids, special tokens left out, bad UTF-8 as U+FFFD. after: see `Stream`."""
        stream = self.stream(after)
        return "".join(map(stream.push, ids)) + stream.flush()

    def stream(self, after: Iterable[int] = ()) -> "Stream":
        return Stream(self, after)

    def encode_chat(self, messages: list[dict]) -> list[int] | None:
        """messages: [{"role": ..., "content": ...}] -> ids that end where the assistant's answer begins; None if the
        checkpoint has no chat template. Special tokens come from the template alone: those spelt out in a message stay
        text. Raises ValueError where the template refuses, fails, or takes over 2 s or 1 GB."""
        if self.template is None:
            return None
        if not all(isinstance(message, dict) for message in messages):
            raise ValueError(f"a chat is a list of {{role, content}}, not {shown(messages)}")
        special = re.compile("|".join(map(re.escape, sorted([GUARD, *self.special], key=len, reverse=True))))

        def guard(value):
            return special.sub(lambda m: "".join(GUARD + c for c in m[0]), value) if isinstance(value, str) else value

        return self._ids(self._render([{key: guard(message[key]) for key in message} for message in messages]), True)

    def _render(self, messages: list[dict]) -> str:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment as Environment

        def refuse(message):
            raise TemplateError(message)

        def render() -> str:
            env = Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
            env.filters["tojson"] = lambda value, **options: json.dumps(value, **{"ensure_ascii": False} | options)
            env.globals.update(raise_exception=refuse, strftime_now=lambda form: datetime.now().strftime(form))
            env.globals.update(self.named, tools=None, documents=None)
            # {% generation %} marks what a model is trained on
            template = re.sub(r"({%[-+]?\s*(?:end)?)generation(\s*[-+]?%})", r"\1with\2", self.template)
            text = env.from_string(template).render(messages=messages, add_generation_prompt=True)
            if len(text) > CHARACTERS + TIMES * len(json.dumps(messages)):
                raise MemoryError(f"it writes {len(text):,} characters")
            return text

        return _in_a_child(render)

    @cached_property
    def _finder(self) -> tuple[tokenizers.Tokenizer, list[int]]:
        # a tokenizer without pieces, which finds the added tokens in a text; their ids in its order
        finder = tokenizers.Tokenizer(tokenizers.models.BPE())
        ids = {token.content: i for i, token in self.added.items()}
        finder.add_tokens([self.added[i] for i in ids.values()])
        return finder, list(ids.values())

    def _encode(self, text: str, special: bool) -> list[int]:
        places, ids, end = [], [], 0
        if special or not all(token.special for token in self.added.values()):
            finder, added = self._finder
            finder.encode_special_tokens = not special
            found = finder.encode(text, add_special_tokens=False)
            places = [(*place, added[index]) for index, place in zip(found.ids, found.offsets, strict=True)]
        for start, stop, token in places:
            ids += [*self._encode_part(_unguarded(text[end:start], special), end > 0), token]
            end = stop
        return ids + self._encode_part(_unguarded(text[end:], special), end > 0)


class Stream:
    """Text of ids as they come: push returns what is final, so never half a character; flush what is left over.

    after: the prompt's ids if ids continue it (a sentencepiece text loses its first space, a continuation must not)."""

    def __init__(self, tokenizer: Tokenizer, after: Iterable[int] = ()):
        self._token_bytes, self._spaces = tokenizer.token_bytes, tokenizer.leading_spaces
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        for token_id in after:
            self.push(token_id)

    def push(self, token_id: int) -> str:
        piece = self._token_bytes(int(token_id))
        if self._spaces and piece:
            piece = piece.removeprefix(b" ")
            self._spaces = 0 if piece else self._spaces - 1
        return self._utf8.decode(piece)

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class SentencePiece(Tokenizer):
    def __init__(self, data: bytes, added: dict[int, AddedToken], legacy: bool):
        from sentencepiece import SentencePieceProcessor

        self._sp = self._inside = SentencePieceProcessor(model_proto=data)
        if not legacy:  # no space after an added token: the file, and normalizer_spec.add_dummy_prefix: false
            self._inside = SentencePieceProcessor(model_proto=data + b"\x1a\x02\x18\x00")
        self.own_size = self._sp.vocab_size()
        self.added = {i: _special(self._sp.id_to_piece(i)) for i in filter(self._sp.is_control, range(self.own_size))}
        named = {self._sp.piece_to_id(token.content): token for i, token in added.items() if i < 0}
        self.added |= {i: token for i, token in named.items() if self._sp.id_to_piece(i) == token.content}
        self.added |= {i: token for i, token in added.items() if i >= 0}
        self.bos_id, self.adds_bos = self._sp.bos_id() if self._sp.bos_id() >= 0 else None, True
        self.end_ids = (self._sp.eos_id(),) if self._sp.eos_id() >= 0 else ()
        self.leading_spaces = int(self._sp.encode("x", out_type=str)[0].startswith("▁"))
        if self._sp.encode("  x") == self._sp.encode("x"):  # it drops spaces that it deems superfluous
            self.leading_spaces = math.inf

    def _piece_bytes(self, token_id):
        if not 0 <= token_id < self.own_size:
            return b""
        if self._sp.is_unknown(token_id):
            return self._sp.decode([token_id]).encode()
        piece = self._sp.id_to_piece(token_id)
        return bytes([int(piece[3:5], 16)]) if self._sp.is_byte(token_id) else piece.replace("▁", " ").encode()

    def _encode_part(self, text, inside):
        return (self._inside if inside else self._sp).encode(text)


class TikToken(Tokenizer):
    def __init__(self, data: bytes, added: dict[int, AddedToken], legacy: bool):
        import tiktoken

        lines = (line.split() for line in data.splitlines() if line)
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
        self.own_size = count = len(ranks)
        if sorted(ranks.values()) != list(range(count)) or any(bytes([i]) not in ranks for i in range(256)):
            raise ValueError(f"its {count} ranks have gaps or lack a byte")
        self.added = {i: token for i, token in added.items() if i >= 0}
        self.added = self.added or {128000 + i: _special(token) for i, token in enumerate(LLAMA3_SPECIAL)}
        if min(self.added) != count:
            raise ValueError(f"it has {count} ranks, but the special tokens start at {min(self.added)}")
        self.bos_id, self.adds_bos = self.special.get("<|begin_of_text|>"), True
        self.end_ids = tuple(self.special[t] for t in ("<|end_of_text|>", "<|eot_id|>") if t in self.special)
        self._tokens = {rank: token for token, rank in ranks.items()}
        self._bpe = tiktoken.Encoding("", pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens={})

    def _piece_bytes(self, token_id):
        return self._tokens.get(token_id, b"")

    def _encode_part(self, text, inside):
        # a run of a million spaces overflows tiktoken's stack
        return [i for piece in re.split(r"(\s{25000})", text) for i in self._bpe.encode_ordinary(piece)]


class TokenizerJson(Tokenizer):
    def __init__(self, data: bytes, added: dict[int, AddedToken], legacy: bool):
        from tokenizers.pre_tokenizers import ByteLevel

        spec, self._backend = json.loads(data), tokenizers.Tokenizer.from_buffer(data)
        self._backend.no_truncation()
        self._backend.no_padding()
        if (growth := _growth(spec.get("normalizer"))) > GROWTH:
            raise ValueError(f"its normaliser may make a text {growth:.3g} times as long")

        # tokens that are found in a text as they stand: the file's, and those of the other files
        known = {token.content for token in self._backend.get_added_tokens_decoder().values()}
        ids = [*sorted(i for i in added if i >= 0), *(i for i in added if i < 0 and added[i].content not in known)]
        self._backend.add_tokens([added[i] for i in ids])
        self.added = self._backend.get_added_tokens_decoder()
        self.own_size = max((i for i in self._backend.get_vocab().values() if i not in self.added), default=-1) + 1

        # what a token's characters stand for
        decoder = spec.get("decoder") or {}
        steps = {step["type"]: step for step in decoder.get("decoders", [decoder]) if step}
        self._byte_tokens = "ByteFallback" in steps
        self._byte_of = {}
        if "ByteLevel" in steps:  # a byte that prints in Latin-1 is written as that, the others as U+0100, U+0101, ...
            alphabet = sorted(ByteLevel.alphabet())
            self._byte_of = dict(zip(alphabet, sorted(range(256), key=lambda i: chr(i) not in alphabet), strict=True))
        elif not steps.keys() & {"Metaspace", "Replace"}:
            raise ValueError(f"its decoder {shown(list(steps))} is none of ByteLevel, Metaspace and Replace")

        # what the encoder adds: a space, bos
        if "Strip" in steps or steps.get("Metaspace", {}).get("prepend_scheme", "never") != "never":
            self.leading_spaces = 1
        first, plain = self._backend.encode("a").ids[:1], self._encode("a", special=False)[:1]
        if first != plain:  # the file's own post-processor begins a text with bos
            self.adds_bos, self.bos_id = True, first[0]

    def _piece_bytes(self, token_id):
        token = self._backend.id_to_token(token_id) or "" if 0 <= token_id < self.own_size else ""
        if self._byte_of:
            return b"".join(bytes([self._byte_of[c]]) if c in self._byte_of else c.encode() for c in token)
        if self._byte_tokens and re.fullmatch("<0x[0-9A-F]{2}>", token):
            return bytes([int(token[3:5], 16)])
        return token.replace("▁", " ").encode()

    def _encode(self, text, special):
        if special and GUARD in text:  # template, guarded, template, ...
            ids = []
            for i, part in enumerate(re.split(f"((?:{GUARD}(?s:.))+)", text)):
                ids += self._after(ids, _unguarded(part, special), special=i % 2 == 0)
            return ids
        self._backend.encode_special_tokens = not special
        return self._backend.encode(text, add_special_tokens=False).ids

    def _after(self, ids: list[int], text: str, special: bool) -> list[int]:
        # the text follows other ids, so it goes without the space that the encoder puts before a text
        line, on_a_line = self._encode("\n", special), self._encode("\n" + text, special)
        inside = self.leading_spaces and ids and text and on_a_line[: len(line)] == line
        return on_a_line[len(line) :] if inside else self._encode(text, special)


def load_tokenizer(folder: str | Path, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint folder: tokenizer.json, else tokenizer.model (sentencepiece or tiktoken, told apart
    by content), with what the folder's other files say. vocab_size: the model's. Raises ValueError if there is none, a
    file does not parse, a setting is of a wrong type, or ids of other than added tokens exceed the model's."""
    folder = Path(folder)
    files = {file.name: read_json(file) for file in map(folder.joinpath, SETTINGS) if file.is_file()}
    config, generation, settings, special_map, more = (files.get(name, {}) for name in SETTINGS)
    path = folder / ("tokenizer.json" if (folder / "tokenizer.json").is_file() else "tokenizer.model")
    if not path.is_file():
        raise ValueError(f"no tokenizer in {folder}: put the checkpoint's tokenizer.json or tokenizer.model there")

    # the settings are of the right types
    for name, file in files.items():
        for key in file.keys() & TYPES.keys():
            values = file[key] if isinstance(file[key], list) else [file[key]]
            if not all(type(value) in (*TYPES[key], type(None)) for value in values):
                raise ValueError(f"{folder / name}: {key} cannot be {shown(file[key])}; copy the model's files again")

    # its backend
    data = path.read_bytes()
    model = TikToken if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", data) else SentencePiece
    backend = TokenizerJson if path.suffix == ".json" else model
    try:
        named = {key: _content(settings.get(key, special_map.get(key))) for key in NAMED}
        added = _added_tokens(settings, more, list(filter(None, named.values())))
        tokenizer = backend(data, added, settings.get("legacy") is not False)
    except Exception as error:  # tokenizers raises bare Exception, sentencepiece RuntimeError
        reason = f"{path} does not load as {backend.__name__} ({one_line(error)})"
        raise ValueError(f"{reason}: copy the model's tokenizer files again") from error

    # it must fit the model
    tokenizer.limit = math.inf if vocab_size is None else vocab_size
    if tokenizer.own_size > tokenizer.limit:
        reason = f"has ids up to {tokenizer.own_size - 1}, but the model's vocabulary is {vocab_size}"
        raise ValueError(f"the tokenizer in {folder} {reason}: use the tokenizer files of this checkpoint")

    def known(*values) -> list[int]:
        ids = [i for value in values for i in (value if isinstance(value, list | tuple) else [value])]
        return [i for i in dict.fromkeys(ids) if i is not None and 0 <= i < min(tokenizer.vocab_size, tokenizer.limit)]

    # bos and eos: the first that is given, and all that are given
    bos, eos = (tokenizer.token_id(named[key] or "") for key in ("bos_token", "eos_token"))
    given = known(bos, config.get("bos_token_id"), generation.get("bos_token_id"), tokenizer.bos_id)
    tokenizer.bos_id = given[0] if given else None
    tokenizer.end_ids = tuple(known(config.get("eos_token_id"), generation.get("eos_token_id"), eos, tokenizer.end_ids))
    tokenizer.adds_bos = tokenizer.bos_id is not None and bool(settings.get("add_bos_token", tokenizer.adds_bos))
    strings = {i: token for token, i in tokenizer.special.items()}
    bos_token = "" if "bos_token" in settings else strings.get(tokenizer.bos_id, "")
    eos_token = next((strings[i] for i in tokenizer.end_ids if i in strings), "")
    tokenizer.named = {"bos_token": bos_token, "eos_token": eos_token} | {k: v for k, v in named.items() if v}

    # the chat template: a file of its own, or a setting
    template, file = settings.get("chat_template"), folder / "chat_template.jinja"
    if isinstance(template, list):  # [{"name": "default", "template": ...}, ...]
        template = {e.get("name"): e.get("template") for e in template if isinstance(e, dict)}.get("default")
    tokenizer.template = file.read_text("utf-8-sig", "replace") if file.is_file() else template
    if not isinstance(tokenizer.template, str | None):
        raise ValueError(f"the chat template in {folder} cannot be {shown(template)}; copy the model's files again")
    return tokenizer


def _special(content: str) -> AddedToken:
    return AddedToken(content, special=True, normalized=False)


def _content(token: str | dict | None) -> str | None:
    # "<s>", {"content": "<s>"} or null
    return token["content"] if isinstance(token, dict) else token


def _added_tokens(settings: dict, more: dict[str, int], specials: list[str]) -> dict[int, AddedToken]:
    """The tokens of added_tokens.json and tokenizer_config.json by id; ids below 0 for special ones in neither."""
    for key in ("additional_special_tokens", "extra_special_tokens"):
        specials += map(_content, settings.get(key) or () if isinstance(settings.get(key), list) else ())
    tokens = {int(i): AddedToken(content, special=content in specials) for content, i in more.items()}
    for i, entry in (settings.get("added_tokens_decoder") or {}).items():
        flags = {flag: entry[flag] for flag in "single_word lstrip rstrip normalized special".split() if flag in entry}
        tokens[int(i)] = AddedToken(entry["content"], **flags)
        tokens[int(i)].special |= entry["content"] in specials
    if min(tokens, default=0) < 0:
        raise ValueError(f"an added token has the id {min(tokens)}")
    known = {token.content for token in tokens.values()}
    return tokens | {~i: _special(token) for i, token in enumerate(specials) if token not in known}


def _growth(normalizer: dict | None) -> float:
    """How many times as long a normaliser of tokenizer.json may make a text, at most; 1 for those that only fold."""
    step = normalizer or {"type": None}
    if step["type"] == "Sequence":
        return math.prod(map(_growth, step["normalizers"]))
    if step["type"] == "Replace":
        return max(1.0, len(step["content"]) / max(1, len(step["pattern"].get("String", ""))))
    return 1.0


def _in_a_child(render: Callable[[], str]) -> str:
    """What a template's function returns. Raises ValueError if it fails, or takes over SECONDS or BYTES."""
    # A template is a program of the checkpoint's: in a child process its time and memory are not ours.
    ours, theirs = multiprocessing.Pipe(duplex=False)

    def child():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            for kind, most in ((RLIMIT_CORE, 0), (RLIMIT_CPU, SECONDS), (RLIMIT_AS, used + BYTES)):
                setrlimit(kind, (most, most))
            theirs.send((render(), None))
        except Exception as error:
            over = str(error) or f"it takes over {BYTES / 1e9:.0f} GB"
            reason = over if isinstance(error, MemoryError) else f"{type(error).__name__}: {one_line(error)}"
            theirs.send((None, reason))

    process = multiprocessing.get_context("fork").Process(target=child, daemon=True)
    process.start()
    theirs.close()
    text, reason = None, f"it takes over {SECONDS} s"
    with ours, suppress(EOFError):  # its time was up
        text, reason = ours.recv() if ours.poll(10 * SECONDS) else (text, reason)
    process.kill()
    process.join()
    if text is None:
        refused = f"the checkpoint's chat template does not take these messages ({reason})"
        raise ValueError(f"{refused}: change the messages or use a plain prompt")
    return text


def _unguarded(text: str, special: bool) -> str:
    return re.sub(f"{GUARD}(?s:(.))", r"\1", text) if special else text
