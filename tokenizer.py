"""Tokenizers of Llama-family checkpoints: tokenizer.json, sentencepiece and tiktoken behind one small interface.

    tokenizer = load_tokenizer("checkpoints/org/name", vocab_size=32000)
    ids = tokenizer.encode("Hello world", bos=tokenizer.adds_bos)
    ids = tokenizer.encode_chat([{"role": "user", "content": "Hi"}])    # None: the checkpoint has no chat template
    stream = tokenizer.stream(after=ids)
    text = "".join(stream.push(i) for i in new_ids) + stream.flush()

A backend turns text into ids and one id into bytes; all else (decoding, streaming, chats) is common to the three.
"""

import base64
import codecs
import json
import math
import re
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

from formats.files import read_json

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_RESERVED = [f"<|reserved_special_token_{i}|>" for i in range(251)]
LLAMA3_SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", *_RESERVED[:4], "<|start_header_id|>", "<|end_header_id|>"]
LLAMA3_SPECIAL += [_RESERVED[4], "<|eot_id|>", *_RESERVED[5:]]
# files around a tokenizer, all optional
SETTINGS = "config.json generation_config.json tokenizer_config.json special_tokens_map.json added_tokens.json".split()
GUARD = "\ufdd0"  # a code point that Unicode keeps out of text: marks what must not become a special token


class Tokenizer:
    """What the three backends share. Each of them gives _encode(text, special) -> ids, where special says whether the
    strings of special tokens become their ids, and token_bytes(id) -> bytes: b"" for special tokens and unknown ids."""

    special: dict[str, int]
    vocab_size: int  # one more than the largest id
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()  # all ids that end a text, maybe none
    adds_bos = False  # whether the checkpoint's own convention puts bos before a plain prompt
    leading_spaces = 0  # the encoder puts a space before a text: how many to take off again (inf: all)
    template: str | None = None
    bos_token = eos_token = ""  # as the template sees them

    def token_id(self, token: str) -> int | None:
        return self.special.get(token)

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """The text taken literally: "<s>" is three characters. bos=True puts bos_id before it, if there is one."""
        prefix = [self.bos_id] if bos and self.bos_id is not None else []
        return prefix + self._encode(text.encode("utf-8", "replace").decode(), special=False)

    def decode(self, ids: Iterable[int], after: Iterable[int] = ()) -> str:
        """The text of ids, special tokens left out, bad UTF-8 as U+FFFD. after: see `Stream`."""
        stream = self.stream(after)
        return "".join(map(stream.push, ids)) + stream.flush()

    def stream(self, after: Iterable[int] = ()) -> "Stream":
        return Stream(self, after)

    def encode_chat(self, messages: list[dict]) -> list[int] | None:
        """messages: [{"role": ..., "content": ...}] -> ids that end where the assistant's answer begins; None if the
        checkpoint has no chat template. Special tokens come from the template alone: those spelt out in a message stay
        text. Raises ValueError where the template refuses or fails."""
        if self.template is None:
            return None
        special = _any_of(self.special)

        def guard(value):
            return special.sub(lambda m: "".join(GUARD + c for c in m[0]), value) if isinstance(value, str) else value

        text = self._render([{key: guard(value) for key, value in message.items()} for message in messages])
        ids = []
        for i, part in enumerate(re.split(f"((?:{GUARD}(?s:.))+)", text)):  # template, guarded, template, ...
            ids += self.encode(part.replace(GUARD, "")) if i % 2 else self._encode(part, special=True)
        return ids

    def _render(self, messages: list[dict]) -> str:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message):
            raise jinja2.TemplateError(message)

        loops = "jinja2.ext.loopcontrols"  # break and continue
        env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loops])
        env.filters["tojson"] = lambda value, **options: json.dumps(value, **{"ensure_ascii": False} | options)
        env.globals.update(raise_exception=refuse, strftime_now=lambda form: datetime.now().strftime(form))
        env.globals.update(bos_token=self.bos_token, eos_token=self.eos_token, tools=None, documents=None)
        try:
            return env.from_string(self.template).render(messages=messages, add_generation_prompt=True)
        except Exception as error:  # a template is a program of the checkpoint's: it may fail in any way
            reason = f"does not take these messages ({type(error).__name__}: {error})"
            advice = "change the messages or use a plain prompt"
            raise ValueError(f"the checkpoint's chat template {reason}: {advice}") from error


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
    def __init__(self, data: bytes, added: dict[str, int]):
        from sentencepiece import SentencePieceProcessor

        self._sp = SentencePieceProcessor(model_proto=data)
        size = self._sp.vocab_size()
        self.special = {self._sp.id_to_piece(i): i for i in range(size) if self._sp.is_control(i)} | added
        self.vocab_size = max(size, *(i + 1 for i in self.special.values()), 0)
        self.bos_id = self._sp.bos_id() if self._sp.bos_id() >= 0 else None
        self.eos_ids = (self._sp.eos_id(),) if self._sp.eos_id() >= 0 else ()
        self.adds_bos = True
        if self._sp.encode("  x") == self._sp.encode("x"):  # it drops spaces that it deems superfluous
            self.leading_spaces = math.inf
        elif self._sp.encode("x", out_type=str)[0].startswith("▁"):
            self.leading_spaces = 1

    def token_bytes(self, token_id):
        if not 0 <= token_id < self._sp.vocab_size() or self._sp.is_control(token_id):
            return b""
        if self._sp.is_unknown(token_id):
            return self._sp.decode([token_id]).encode()
        piece = self._sp.id_to_piece(token_id)
        return bytes([int(piece[3:5], 16)]) if self._sp.is_byte(token_id) else piece.replace("▁", " ").encode()

    def _encode(self, text, special):
        parts = _any_of(self.special).split(text) if special else [text]
        return [i for part in parts for i in ([self.special[part]] if part in self.special else self._sp.encode(part))]


class TikToken(Tokenizer):
    def __init__(self, data: bytes, added: dict[str, int]):
        import tiktoken

        lines = (line.split() for line in data.splitlines() if line)
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
        count = len(ranks)
        if sorted(ranks.values()) != list(range(count)) or any(bytes([i]) not in ranks for i in range(256)):
            raise ValueError(f"its {count} ranks have gaps or lack a byte")
        self.special = added or {token: 128000 + i for i, token in enumerate(LLAMA3_SPECIAL)}
        if min(self.special.values()) != count:
            raise ValueError(f"it has {count} ranks, but the special tokens start at {min(self.special.values())}")
        self.vocab_size = max(self.special.values()) + 1
        self.bos_id = self.special.get("<|begin_of_text|>")
        self.eos_ids = tuple(self.special[t] for t in ("<|end_of_text|>", "<|eot_id|>") if t in self.special)
        self.adds_bos = True
        self._tokens = {rank: token for token, rank in ranks.items()}
        self._bpe = tiktoken.Encoding("", pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens=self.special)

    def token_bytes(self, token_id):
        return self._tokens.get(token_id, b"")

    def _encode(self, text, special):
        allowed = "all" if special else set()
        parts = re.split(r"(\s{25000})", text)  # a run of a million spaces overflows tiktoken's stack
        return [i for part in parts for i in self._bpe.encode(part, allowed_special=allowed, disallowed_special=())]


class TokenizerJson(Tokenizer):
    def __init__(self, data: bytes, added: dict[str, int]):
        from tokenizers import Tokenizer as Backend
        from tokenizers.pre_tokenizers import ByteLevel

        spec, self._backend = json.loads(data), Backend.from_buffer(data)
        self._backend.no_truncation()
        self._backend.no_padding()
        self.vocab_size = max(self._backend.get_vocab().values()) + 1

        # tokens that are found in a text as they stand
        tokens = spec.get("added_tokens") or []
        self.special = {token["content"]: token["id"] for token in tokens if token["special"]}
        self._added = {token["id"]: b"" if token["special"] else token["content"].encode() for token in tokens}

        # what a token's characters stand for
        decoder = spec.get("decoder") or {}
        steps = {step["type"]: step for step in decoder.get("decoders", [decoder]) if step}
        self._byte_tokens = "ByteFallback" in steps
        if "ByteLevel" in steps:  # a byte that prints in Latin-1 is written as that, the others as U+0100, U+0101, ...
            chars = set(ByteLevel.alphabet())
            rest = (i for i in range(256) if chr(i) not in chars)
            self._byte_of = {c: ord(c) for c in chars if ord(c) < 256} | {chr(256 + n): i for n, i in enumerate(rest)}
        elif steps.keys() & {"Metaspace", "Replace"}:
            self._byte_of = None
        else:
            raise ValueError(f"its decoder {list(steps)} is none of ByteLevel, Metaspace and Replace")

        # what the encoder adds: a space, bos
        if "Strip" in steps or steps.get("Metaspace", {}).get("prepend_scheme", "never") != "never":
            self.leading_spaces = 1
        first, plain = self._backend.encode("a").ids[:1], self._encode("a", special=False)[:1]
        if first != plain:  # the file's own post-processor begins a text with bos
            self.adds_bos, self.bos_id = True, first[0]

    def token_id(self, token):
        return self._backend.token_to_id(token)

    def token_bytes(self, token_id):
        if token_id in self._added:
            return self._added[token_id]
        token = self._backend.id_to_token(token_id) or "" if 0 <= token_id < self.vocab_size else ""
        if self._byte_of is not None:
            return b"".join(bytes([self._byte_of[c]]) if c in self._byte_of else c.encode() for c in token)
        if self._byte_tokens and re.fullmatch("<0x[0-9A-F]{2}>", token):
            return bytes([int(token[3:5], 16)])
        return token.replace("▁", " ").encode()

    def _encode(self, text, special):
        self._backend.encode_special_tokens = not special
        return self._backend.encode(text, add_special_tokens=False).ids


def load_tokenizer(folder: str | Path, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint folder: tokenizer.json, else tokenizer.model (sentencepiece or tiktoken, told apart
    by content). bos, eos and the chat template come from the folder's other files, all optional. vocab_size: the
    model's. Raises ValueError if there is no tokenizer, a file does not parse, or ids would exceed the model's."""
    folder = Path(folder)
    files = {file.name: read_json(file) for file in map(folder.joinpath, SETTINGS) if file.is_file()}
    config, generation, settings, special_map, more = (files.get(name, {}) for name in SETTINGS)
    path = next((folder / n for n in ("tokenizer.json", "tokenizer.model") if (folder / n).is_file()), None)
    if path is None:
        raise ValueError(f"no tokenizer in {folder}: put the checkpoint's tokenizer.json or tokenizer.model there")

    # its backend
    data = path.read_bytes()
    backend = TikToken if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", data) else SentencePiece
    backend = TokenizerJson if path.suffix == ".json" else backend
    try:
        added = {t["content"]: int(i) for i, t in settings.get("added_tokens_decoder", {}).items()}
        tokenizer = backend(data, more | added)
    except Exception as error:  # tokenizers raises bare Exception, sentencepiece RuntimeError
        reason = f"does not load as {backend.__name__} ({error})"
        raise ValueError(f"{path} {reason}: copy the model's tokenizer files again") from error

    # it must fit the model
    if vocab_size is not None and tokenizer.vocab_size > vocab_size:
        reason = f"has ids up to {tokenizer.vocab_size - 1}, but the model's vocabulary is {vocab_size}"
        raise ValueError(f"the tokenizer in {folder} {reason}: use the tokenizer files of this checkpoint")

    def named(key: str) -> str | None:  # "bos_token": "<s>", {"content": "<s>"} or null
        token = settings.get(key, special_map.get(key))
        return token.get("content") if isinstance(token, dict) else token

    def known(*values) -> list[int]:
        ids = [i for value in values for i in (value if isinstance(value, list | tuple) else [value])]
        return [i for i in dict.fromkeys(ids) if isinstance(i, int) and 0 <= i < tokenizer.vocab_size]

    # bos and eos: the first that is given, and all that are given
    bos, eos = named("bos_token"), named("eos_token")
    given = tokenizer.token_id(bos or ""), config.get("bos_token_id"), generation.get("bos_token_id"), tokenizer.bos_id
    tokenizer.bos_id = next(iter(known(*given)), None)
    given = config.get("eos_token_id"), generation.get("eos_token_id"), tokenizer.token_id(eos or ""), tokenizer.eos_ids
    tokenizer.eos_ids = tuple(known(*given))
    tokenizer.adds_bos = tokenizer.bos_id is not None and bool(settings.get("add_bos_token", tokenizer.adds_bos))
    strings = {i: token for token, i in tokenizer.special.items()}
    tokenizer.bos_token = bos or ("" if "bos_token" in settings else strings.get(tokenizer.bos_id, ""))
    tokenizer.eos_token = eos or next((strings[i] for i in tokenizer.eos_ids if i in strings), "")

    # the chat template: a file of its own, or a setting
    template, file = settings.get("chat_template"), folder / "chat_template.jinja"
    if isinstance(template, list):  # [{"name": "default", "template": ...}, ...]
        template = {entry.get("name"): entry.get("template") for entry in template}.get("default")
    tokenizer.template = file.read_text("utf-8") if file.is_file() else template
    return tokenizer


def _any_of(strings: Iterable[str]) -> re.Pattern:
    """Matches (as a group) any of the strings, the longest first; nothing where there are none."""
    return re.compile("(" + ("|".join(map(re.escape, sorted(strings, key=len, reverse=True))) or "(?!)") + ")")
