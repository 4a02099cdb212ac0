"""A checkpoint's tokenizer: text to ids and back.

`load_tokenizer` reads tokenizer.model, tokenizer.json, or vocab.json and merges.txt. What lies
between added tokens goes through a `Vocabulary`: SentencePiece's or one of the `tokenizers`
library. Added tokens are found here, the way the slow tokenizers of Transformers find them: right
for a template's markup and wrong for what a user typed, so `Tokenizer` has both ways.
"""

from __future__ import annotations

import codecs
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import tokenizers

from internvl_rt.json_file import parse_json, read_bytes, read_json, show
from internvl_rt.sentencepiece import SPACE, Kind, is_word, read_sentencepiece

MAX_TOKENIZER_BYTES = 128 << 20

# What a user may write with the power of a special token: markers of regions in a picture.
ALLOWED_IN_TEXT = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")

# What the system message and the model's answers may hold besides: none of it frames a turn.
ALLOWED_UNTYPED = (
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
)

# Control tokens by name, because some checkpoints do not flag theirs as special.
CONTROL_TOKENS = frozenset(
    {
        "<img>",
        "</img>",
        "<IMG_CONTEXT>",
        "<video>",
        "<s>",
        "</s>",
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|system|>",
        "<|user|>",
        "<|assistant|>",
        "<|end|>",
        "<|start|>",
        "<|message|>",
        "<|channel|>",
        "<|constrain|>",
        "<|call|>",
        "<|return|>",
        "<|startoftext|>",
        "<|begin_of_text|>",
        "<|end_of_text|>",
    }
)

# Qwen2's word pattern (Apache-2.0), part of what its merges mean.
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_alphabet() -> dict[str, int]:
    """The characters that stand for the 256 bytes in a byte-level vocabulary (GPT-2's choice)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    table = {chr(b): b for b in printable}
    table.update({chr(256 + i): b for i, b in enumerate(others)})
    return table


_BYTES = _byte_alphabet()


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token with an id of its own; `lstrip` and `rstrip` take the white space beside it."""

    id: int
    content: str
    special: bool
    lstrip: bool
    rstrip: bool


@dataclass(frozen=True, slots=True)
class Spelling:
    """How the tokens of a vocabulary spell text.

    byte_level: every character stands for a byte; otherwise SPACE for a space and <0x0A> for a
    byte. prefix: "first" puts a space before a text that no added token begins, "each" before
    every text between added tokens, "none" nowhere. doubled: a text that has a space there gets
    one more. compose: added tokens are looked for after composing characters (NFC), as Qwen2's
    tokenizer does. strip_space: decoding drops one space at the start.
    """

    byte_level: bool
    compose: bool = False
    prefix: str = "none"
    doubled: bool = True
    strip_space: bool = False


class Vocabulary(Protocol):
    """Text without added tokens to ids, and ids to tokens."""

    size: int

    def encode(self, text: str) -> list[int]: ...
    def token(self, token_id: int) -> str | None: ...
    def token_id(self, token: str) -> int | None: ...


class LibraryVocabulary:
    """A vocabulary of the `tokenizers` library, whose own search for added tokens is avoided."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        """Raises ValueError for a model that is not deterministic."""
        if getattr(backend.model, "dropout", None):
            raise ValueError(f"the model's dropout is {backend.model.dropout}, supported: none")
        backend.no_truncation()  # some files keep the limits of their training
        backend.no_padding()
        self._backend = backend
        added = backend.get_added_tokens_decoder().values()
        self._added = _alternatives(token.content for token in added)
        # Some conversions list words of the vocabulary among the added tokens.
        words = [t.content for t in added if is_word(t.content) and not t.special]
        self._words = re.compile(f"({_alternatives(words).pattern})")
        self.size = backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        normalizer = self._backend.normalizer
        normal = normalizer.normalize_str(text) if normalizer else text
        if not (self._added.search(text) or self._added.search(normal)):
            return self._backend.encode(text, add_special_tokens=False).ids
        ids: list[int] = []
        for at, part in enumerate(self._words.split(normal)):
            ids.extend([self._backend.token_to_id(part)] if at % 2 else self._split(part))
        return ids

    def _split(self, normal: str) -> Iterator[int]:
        """The library's stages after normalising, around its search for added tokens."""
        splitter = self._backend.pre_tokenizer
        words = splitter.pre_tokenize_str(normal) if splitter else [(normal, (0, len(normal)))]
        model = self._backend.model
        return (token.id for word, _ in words for token in model.tokenize(word))

    def token(self, token_id: int) -> str | None:
        return self._backend.id_to_token(token_id)

    def token_id(self, token: str) -> int | None:
        return self._backend.token_to_id(token)


class Tokenizer:
    """Text to ids and back. Made by `load_tokenizer`; safe to share between threads."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        added: Sequence[AddedToken],
        spelling: Spelling,
        prefix_ids: Sequence[int],
    ) -> None:
        """prefix_ids: what begins every prompt, such as BOS."""
        self._vocabulary = vocabulary
        self._spelling = spelling
        self.prefix_ids = tuple(prefix_ids)
        self._added = {token.id: token for token in added}
        self._added_ids = {token.content: token.id for token in added}
        self._special = frozenset(t.id for t in added if t.special or t.content in CONTROL_TOKENS)
        allowed = [token for token in ALLOWED_IN_TEXT if token in self._added_ids]
        self._markers = frozenset(self._added_ids[token] for token in allowed)
        self._any_added = _alternatives(self._added_ids)
        self._typed = _alternatives(allowed)
        self._untyped = _alternatives(
            token for token in ALLOWED_IN_TEXT + ALLOWED_UNTYPED if token in self._added_ids
        )
        self.vocab_size = max(vocabulary.size, *(i + 1 for i in self._added), 0)

    def encode_markup(self, text: str) -> list[int]:
        """Ids of `text` with every added token recognised; no BOS is put before it."""
        if self._spelling.compose:
            text = unicodedata.normalize("NFC", text)
        return self._encode(self.split_markup(text))

    def encode_plain(self, text: str) -> list[int]:
        """Ids of `text` typed by a user: no added token but those of ALLOWED_IN_TEXT."""
        return self._encode(self.split_allowed(text, typed=True))

    def encode_literal(self, text: str) -> list[int]:
        """Ids of `text` with no added token recognised at all."""
        return self._encode([text])

    def _encode(self, pieces: Iterable[str | int]) -> list[int]:
        ids = IdWriter(self, ())
        ids.write(pieces)
        return ids.finish()

    def writer(self) -> IdWriter:
        """Takes the pieces of a prompt."""
        return IdWriter(self, self.prefix_ids)

    def split_markup(self, text: str) -> Iterator[str | int]:
        """`text` in order: the ids of added tokens, and the strings between them."""
        return self._split(self._any_added, text)

    def split_allowed(self, text: str, *, typed: bool) -> Iterator[str | int]:
        """As `split_markup`, for ALLOWED_IN_TEXT, and ALLOWED_UNTYPED where no user typed it."""
        return self._split(self._typed if typed else self._untyped, text)

    def _split(self, pattern: re.Pattern[str], text: str) -> Iterator[str | int]:
        at = 0
        for match in pattern.finditer(text):
            if match.start() > at:
                yield text[at : match.start()]
            yield self._added_ids[match[0]]
            at = match.end()
        if at < len(text):
            yield text[at:]

    def encode_between(self, before: int | None, text: str, behind: int | None) -> list[int]:
        """Ids of `text` between two added tokens; None at the ends of a prompt."""
        left, right = self._added.get(before), self._added.get(behind)
        if left and left.rstrip:
            text = text.lstrip()
        if right and right.lstrip:
            text = text.rstrip()
        if not text:
            return []
        if self._has_prefix(text, before):
            text = SPACE + text
        return self._vocabulary.encode(text)

    def _has_prefix(self, text: str, before: int | None) -> bool:
        prefix = self._spelling.prefix
        if prefix == "none" or (prefix == "first" and before is not None):
            return False
        return self._spelling.doubled or text[0] not in (" ", SPACE)

    def decode(
        self, ids: Iterable[int], *, skip_special: bool = True, keep_markers: bool = True
    ) -> str:
        """Text of `ids`. Bytes that are not UTF-8 become U+FFFD; ids without a token are dropped.

        `skip_special` drops special tokens; `keep_markers` keeps those of ALLOWED_IN_TEXT then.
        """
        reader = self.text_reader()
        pieces = [
            reader.push(self.token_bytes(i, skip_special=skip_special, keep_markers=keep_markers))
            for i in ids
        ]
        return "".join(pieces) + reader.finish()

    def text_reader(self) -> TextReader:
        """Puts the bytes of tokens together."""
        spelling = self._spelling
        return TextReader(each_byte=not spelling.byte_level, strip_space=spelling.strip_space)

    def token_bytes(
        self, token_id: int, *, skip_special: bool = True, keep_markers: bool = True
    ) -> bytes:
        """The bytes that one token adds to the text."""
        if skip_special and token_id in self._special:
            kept = keep_markers and token_id in self._markers
            return self._added[token_id].content.encode("utf-8") if kept else b""
        added = self._added.get(token_id)
        if added is not None:
            return added.content.encode("utf-8")
        if not 0 <= token_id < 1 << 32:
            raise ValueError(f"token id is {token_id}, expected 0 to {(1 << 32) - 1}")
        token = self._vocabulary.token(token_id)
        return b"" if token is None else _token_bytes(token, self._spelling)

    def token_id(self, token: str) -> int | None:
        """The id of a token by its exact content, or None."""
        found = self._added_ids.get(token)
        return self._vocabulary.token_id(token) if found is None else found

    def special_id(self, token: str) -> int | None:
        """As `token_id`, among the added tokens only."""
        return self._added_ids.get(token)

    def is_special(self, token_id: int) -> bool:
        """Whether the token is a control token, which plain answers leave out."""
        return token_id in self._special


class IdWriter:
    """Texts and added tokens in order to ids; what is written between two tokens is one text."""

    def __init__(self, tokenizer: Tokenizer, prefix_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prefix_ids)
        self._text: list[str] = []
        self._last: int | None = None

    def write(self, pieces: Iterable[str | int]) -> None:
        """Strings, in which nothing has power, and ids of added tokens."""
        for piece in pieces:
            if isinstance(piece, str):
                self._text.append(piece)
                continue
            if self._text:
                self._flush(piece)
            self._ids.append(piece)
            self._last = piece

    def place(self, token_id: int) -> int:
        """How many ids there will be before `token_id`, if that is written next."""
        self._flush(token_id)
        return len(self._ids)

    def features(self, length: int) -> int:
        """Takes places for features, of any id; returns the first. Behind them a text begins."""
        self._flush(None)
        start = len(self._ids)
        self._ids += [0] * length
        self._last = None
        return start

    def finish(self) -> list[int]:
        self._flush(None)
        return self._ids

    def _flush(self, behind: int | None) -> None:
        text = "".join(self._text)
        self._text.clear()
        self._ids.extend(self._tokenizer.encode_between(self._last, text, behind))


class TextReader:
    """Bytes in, text out, as soon as its characters are whole.

    each_byte: every byte that is not UTF-8 becomes a U+FFFD of its own, as SentencePiece has it;
    otherwise bytes that begin a character become one together. strip_space: a space that begins
    the text is dropped.
    """

    def __init__(self, *, each_byte: bool, strip_space: bool) -> None:
        errors = "surrogateescape" if each_byte else "replace"
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors)
        self._at_start = strip_space

    def push(self, data: bytes) -> str:
        return self._text(self._decoder.decode(data))

    def finish(self) -> str:
        """What is left; an unfinished character becomes U+FFFD."""
        return self._text(self._decoder.decode(b"", final=True))

    def _text(self, text: str) -> str:
        if self._at_start and text:
            self._at_start = False
            text = text.removeprefix(" ")
        return _ESCAPED.sub("\ufffd", text)


_ESCAPED = re.compile("[\ud800-\udfff]")  # bytes that were not UTF-8
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def _token_bytes(token: str, spelling: Spelling) -> bytes:
    if spelling.byte_level:
        try:
            return bytes([_BYTES[c] for c in token])
        except KeyError:
            return token.encode("utf-8")
    byte = _BYTE.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace(SPACE, " ").encode("utf-8")


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of the checkpoint in `folder`.

    Reads tokenizer.model, which the reference implementation prefers too, else tokenizer.json,
    else vocab.json and merges.txt; added_tokens.json and tokenizer_config.json complete the added
    tokens of each. Raises FileNotFoundError where the folder has none of them, ValueError where a
    file is malformed or two disagree about an id.
    """
    folder = Path(folder)
    if (folder / "tokenizer.model").exists():
        return _from_sentencepiece(folder)
    if (folder / "tokenizer.json").exists():
        name = "tokenizer.json"
        raw = read_bytes(folder / name, MAX_TOKENIZER_BYTES)
        data = parse_json(raw, name)
        if not isinstance(data, dict):
            raise ValueError(f"{name}: holds {show(data)}, expected an object")
    elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        name = "vocab.json"
        raw = b""
        data = _byte_level_bpe(folder)
    else:
        raise FileNotFoundError(
            f"{folder}: no tokenizer files "
            "(tokenizer.model, tokenizer.json, or vocab.json and merges.txt)"
        )
    config = _read_optional(folder / "tokenizer_config.json")
    added = _added_tokens(name, data.get("added_tokens"), folder, config)
    try:
        if not raw or len(added) != len(data.get("added_tokens") or ()):
            raw = json.dumps(data | {"added_tokens": added}).encode("utf-8")
        backend = _from_json(raw)
        for token in added:
            found = backend.token_to_id(token["content"])
            if found != token["id"]:
                raise ValueError(
                    f"token {show(token['content'])} has id {token['id']} in the files "
                    f"and {found} by its place after the vocabulary"
                )
        prefix_ids = backend.encode("", add_special_tokens=True).ids
        spelling = _library_spelling(backend, data, config)
        return Tokenizer(LibraryVocabulary(backend), _tokens(added), spelling, prefix_ids)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _from_sentencepiece(folder: Path) -> Tokenizer:
    model = read_sentencepiece(folder / "tokenizer.model")
    config = _read_optional(folder / "tokenizer_config.json")
    added = _added_tokens("tokenizer.model", [], folder, config)
    for token in added:
        content, i = token["content"], token["id"]
        found = model.token_id(content)
        renamed = i < model.size and model.pieces[i].kind in (Kind.NORMAL, Kind.BYTE)
        if found != i and (found is not None or renamed):
            there = f"is {show(model.token(i))}" if found is None else f"has it at {found}"
            raise ValueError(f"token {show(content)} has id {i}, tokenizer.model {there}")
    taken = {token["id"] for token in added}
    for i, piece in enumerate(model.pieces):
        if i in taken:
            continue
        if piece.kind in (Kind.CONTROL, Kind.UNKNOWN):
            added.append(_entry("tokenizer.model", piece.text, i, {"special": True}))
        elif piece.kind == Kind.USER_DEFINED and not is_word(piece.text):
            added.append(_entry("tokenizer.model", piece.text, i, {}))
    prefix_ids: list[int] = []
    if _flag(config, "add_bos_token", default=True):
        bos = config.get("bos_token", "<s>")
        bos = bos.get("content") if isinstance(bos, dict) else bos
        found = [token["id"] for token in added if token["content"] == bos]
        if not found:
            raise ValueError(f"tokenizer_config.json: bos_token is {show(bos)}, which has no id")
        prefix_ids = found
    if _flag(config, "add_eos_token", default=False):
        raise ValueError("tokenizer_config.json: add_eos_token is true, supported: false")
    prefix = _legacy_prefix(config) if model.add_dummy_prefix else "none"
    spelling = Spelling(byte_level=False, prefix=prefix, strip_space=model.add_dummy_prefix)
    return Tokenizer(model, _tokens(added), spelling, prefix_ids)


def _legacy_prefix(config: dict[str, Any]) -> str:
    """Where Llama's slow tokenizer puts a space: its "legacy" form does after every added token."""
    legacy = config.get("legacy")
    return "each" if legacy is None or _flag(config, "legacy", default=True) else "first"


def _flag(config: dict[str, Any], key: str, *, default: bool) -> bool:
    value = config.get(key, default)
    if type(value) is not bool:
        raise ValueError(f"tokenizer_config.json: {key} is {show(value)}, expected true or false")
    return value


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path, MAX_TOKENIZER_BYTES) if path.exists() else {}


def _library_spelling(
    backend: tokenizers.Tokenizer, data: dict[str, Any], config: dict[str, Any]
) -> Spelling:
    """How the tokens of tokenizer.json spell text.

    What puts a space before a text is taken out of `backend`: where that happens depends on the
    added tokens around, which `Tokenizer` knows.
    """
    steps = _steps(data.get("decoder"), "decoders")
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        compose = _steps(data.get("normalizer"), "normalizers") == [{"type": "NFC"}]
        return Spelling(byte_level=True, compose=compose)
    if not {"Replace", "Metaspace"} & set(kinds) or not set(kinds) <= _SENTENCEPIECE_DECODERS:
        shown = ", ".join(map(str, kinds)) or "None"
        raise ValueError(f"the decoder is {shown}, supported: ByteLevel, or SentencePiece's")
    strip = any(
        step["type"] == "Strip"
        or (step["type"] == "Metaspace" and _metaspace_prefix(step) != "none")
        for step in steps
    )
    prefix, doubled = "none", True
    before = _steps(data.get("pre_tokenizer"), "pretokenizers")
    if [step.get("type") for step in before] == ["Metaspace"]:
        prefix, doubled = _metaspace_prefix(before[0]), False
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(
            prepend_scheme="never", split=before[0].get("split", True)
        )
    normalizers = _steps(data.get("normalizer"), "normalizers")
    if {"type": "Prepend", "prepend": SPACE} in normalizers:
        prefix = _legacy_prefix(config)
        normalizers.remove({"type": "Prepend", "prepend": SPACE})
        if normalizers != [_SPACES]:
            raise ValueError("the normalizer has more than Prepend and Replace")
        backend.normalizer = tokenizers.normalizers.Replace(" ", SPACE)
    return Spelling(byte_level=False, prefix=prefix, doubled=doubled, strip_space=strip)


_SENTENCEPIECE_DECODERS = frozenset({"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"})
_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}


def _metaspace_prefix(step: dict[str, Any]) -> str:
    scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
    return {"always": "each", "first": "first", "never": "none"}[scheme]


def _steps(part: Any, key: str) -> list[dict[str, Any]]:
    """The steps of a stage of tokenizer.json, which the library has found to be well formed."""
    if part is None:
        return []
    return list(part[key]) if part["type"] == "Sequence" else [part]


def _tokens(added: Iterable[dict[str, Any]]) -> list[AddedToken]:
    keys = ("id", "content", "special", "lstrip", "rstrip")
    return [AddedToken(**{key: token[key] for key in keys}) for token in added]


def _alternatives(tokens: Iterable[str]) -> re.Pattern[str]:
    """Any of `tokens`, the longest first; without tokens, nothing at all."""
    ordered = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) if ordered else r"(?!)")


def _from_json(data: bytes) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_buffer(data)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # the library's panics are no subclass of Exception
        reason = show(str(error)).strip("'\"")
        raise ValueError(f"not a tokenizer that the library can read ({reason})") from None


def _byte_level_bpe(folder: Path) -> dict[str, Any]:
    """The tokenizer.json that vocab.json and merges.txt of a Qwen2 checkpoint amount to."""
    vocab = read_json(folder / "vocab.json", MAX_TOKENIZER_BYTES)
    if any(type(i) is not int or not 0 <= i < 1 << 31 for i in vocab.values()):
        raise ValueError("vocab.json: an id is not an integer from 0 to 2147483647")
    try:
        lines = read_bytes(folder / "merges.txt", MAX_TOKENIZER_BYTES).decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"merges.txt: not UTF-8 at byte {error.start}") from None
    merges = []
    for number, line in enumerate(lines, 1):
        line = line.removesuffix("\r")
        if not line or (number == 1 and line.startswith("#version")):
            continue
        pair = line.split(" ")
        if len(pair) != 2:
            raise ValueError(f"merges.txt: line {number} is {show(line)}, expected two tokens")
        merges.append(pair)
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    words = {
        "type": "Split",
        "pattern": {"Regex": _QWEN2_WORDS},
        "behavior": "Isolated",
        "invert": False,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [words, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges,
        },
    }


def _added_tokens(
    name: str, stored: Any, folder: Path, config: dict[str, Any]
) -> list[dict[str, Any]]:
    """Every added token of the files, by ascending id; `stored` holds those of the file `name`."""
    found: dict[str, dict[str, Any]] = {}

    def add(where: str, content: Any, token_id: Any, flags: dict[str, Any]) -> None:
        entry = _entry(where, content, token_id, flags)
        known = found.setdefault(content, entry)
        if known["id"] != token_id:
            raise ValueError(f"{where}: {show(content)} has id {token_id}, elsewhere {known['id']}")

    stored = stored or []
    if type(stored) is not list or not all(isinstance(t, dict) for t in stored):
        raise ValueError(f"{name}: added_tokens is not a list of objects")
    for token in stored:
        add(name, token.get("content"), token.get("id"), token)
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise ValueError("tokenizer_config.json: added_tokens_decoder is not an object")
    for key, token in decoder.items():
        if not isinstance(token, dict) or not re.fullmatch(r"[0-9]{1,9}", key):
            raise ValueError(f"tokenizer_config.json: added_tokens_decoder has {show(key)}")
        add("tokenizer_config.json", token.get("content"), int(key), token)
    for content, token_id in _read_optional(folder / "added_tokens.json").items():
        add("added_tokens.json", content, token_id, {})
    return sorted(found.values(), key=lambda token: token["id"])


def _entry(where: str, content: Any, token_id: Any, flags: dict[str, Any]) -> dict[str, Any]:
    """An added token in the form of tokenizer.json."""
    if type(content) is not str or not content:
        raise ValueError(f"{where}: an added token is {show(content)}, expected a string")
    if type(token_id) is not int or not 0 <= token_id < 1 << 31:
        raise ValueError(f"{where}: {show(content)} has the id {show(token_id)}")
    # A token that is not flagged still takes part in the chat's markup when it is one of it.
    special = flags.get("special", content in CONTROL_TOKENS or content in ALLOWED_IN_TEXT)
    kinds = ("single_word", "lstrip", "rstrip", "normalized")
    entry = {kind: flags.get(kind, False) for kind in kinds} | {"special": special}
    if any(type(value) is not bool for value in entry.values()):
        raise ValueError(f"{where}: {show(content)} has a flag that is not true or false")
    if entry["single_word"]:
        raise ValueError(f"{where}: {show(content)} has single_word true, supported: false")
    return {"id": token_id, "content": content, **entry}
