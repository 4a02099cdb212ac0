"""A checkpoint's tokenizer, through the `tokenizers` library.

`load_tokenizer` reads tokenizer.json, or builds a byte-level BPE from vocab.json and merges.txt.
The library recognises every added token wherever it stands in a text. That is right for a
template's markup and wrong for what a user typed, so `Tokenizer` has both ways.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import tokenizers

from internvl_rt.json_file import parse_json, read_bytes, read_json, show

MAX_TOKENIZER_BYTES = 128 << 20

# What a user may write with the power of a special token: markers of regions in a picture.
ALLOWED_IN_TEXT = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")

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
        "<|return|>",
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


class Tokenizer:
    """Text to ids and back. Made by `load_tokenizer`; safe to share between threads."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        """Raises ValueError for a backend that is not byte-level or not deterministic."""
        if not isinstance(backend.decoder, tokenizers.decoders.ByteLevel):
            kind = type(backend.decoder).__name__
            raise ValueError(f"the decoder is {kind}, supported: ByteLevel")
        if getattr(backend.model, "dropout", None):
            raise ValueError(f"the model's dropout is {backend.model.dropout}, supported: none")
        backend.no_truncation()  # some files keep the limits of their training
        backend.no_padding()
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self._added = {i: token.content for i, token in added.items()}
        self._added_ids = {token.content: i for i, token in added.items()}
        self._special = frozenset(
            i for i, t in added.items() if t.special or t.content in CONTROL_TOKENS
        )
        self._markers = frozenset(self._added_ids[t] for t in ALLOWED_IN_TEXT if self._has(t))
        self._any_added = _alternatives(self._added_ids)
        self._allowed = _alternatives(t for t in ALLOWED_IN_TEXT if self._has(t))
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self.prefix_ids = tuple(backend.encode("", add_special_tokens=True).ids)

    def _has(self, token: str) -> bool:
        return token in self._added_ids

    def encode_markup(self, text: str) -> list[int]:
        """Ids of `text` with every added token recognised; no BOS is put before it."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_plain(self, text: str) -> list[int]:
        """Ids of `text` typed by a user: no added token but those of ALLOWED_IN_TEXT."""
        ids: list[int] = []
        for piece in self.split_allowed(text):
            ids.extend(self.encode_literal(piece) if isinstance(piece, str) else [piece])
        return ids

    def encode_literal(self, text: str) -> list[int]:
        """Ids of `text` with no added token recognised at all."""
        if not text:
            return []
        normalizer = self._backend.normalizer
        normal = normalizer.normalize_str(text) if normalizer else text
        if not (self._any_added.search(text) or self._any_added.search(normal)):
            return self.encode_markup(text)
        # Around the library's search for added tokens, through the same stages.
        splitter = self._backend.pre_tokenizer
        words = splitter.pre_tokenize_str(normal) if splitter else [(normal, (0, len(normal)))]
        model = self._backend.model
        return [token.id for word, _ in words for token in model.tokenize(word)]

    def split_markup(self, text: str) -> Iterator[str | int]:
        """`text` in order: the ids of added tokens, and the strings between them."""
        return self._split(self._any_added, text)

    def split_allowed(self, text: str) -> Iterator[str | int]:
        """As `split_markup`, for the tokens of ALLOWED_IN_TEXT alone."""
        return self._split(self._allowed, text)

    def _split(self, pattern: re.Pattern[str], text: str) -> Iterator[str | int]:
        at = 0
        for match in pattern.finditer(text):
            if match.start() > at:
                yield text[at : match.start()]
            yield self._added_ids[match[0]]
            at = match.end()
        if at < len(text):
            yield text[at:]

    def decode(
        self, ids: Iterable[int], *, skip_special: bool = True, keep_markers: bool = True
    ) -> str:
        """Text of `ids`. Bytes that are not UTF-8 become U+FFFD; ids without a token are dropped.

        `skip_special` drops special tokens; `keep_markers` keeps those of ALLOWED_IN_TEXT then.
        """
        pieces = (
            self.token_bytes(i, skip_special=skip_special, keep_markers=keep_markers) for i in ids
        )
        return b"".join(pieces).decode("utf-8", "replace")

    def token_bytes(
        self, token_id: int, *, skip_special: bool = True, keep_markers: bool = True
    ) -> bytes:
        """The bytes that one token adds to the text."""
        if skip_special and token_id in self._special:
            kept = keep_markers and token_id in self._markers
            return self._added[token_id].encode("utf-8") if kept else b""
        added = self._added.get(token_id)
        if added is not None:
            return added.encode("utf-8")
        if not 0 <= token_id < 1 << 32:
            raise ValueError(f"token id is {token_id}, expected 0 to {(1 << 32) - 1}")
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        try:
            return bytes([_BYTES[c] for c in token])
        except KeyError:
            return token.encode("utf-8")

    def token_id(self, token: str) -> int | None:
        """The id of a token by its exact content, or None."""
        return self._backend.token_to_id(token)

    def special_id(self, token: str) -> int | None:
        """As `token_id`, among the added tokens only."""
        return self._added_ids.get(token)

    def is_special(self, token_id: int) -> bool:
        """Whether the token is a control token, which plain answers leave out."""
        return token_id in self._special


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of the checkpoint in `folder`.

    Reads tokenizer.json, else vocab.json and merges.txt; added_tokens.json and
    tokenizer_config.json complete the added tokens of either. Raises FileNotFoundError where the
    folder has neither, ValueError where a file is malformed or two disagree about an id.
    """
    folder = Path(folder)
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
            f"{folder}: no tokenizer files (tokenizer.json, or vocab.json and merges.txt)"
        )
    added = _added_tokens(name, data, folder)
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
        return Tokenizer(backend)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


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


def _added_tokens(name: str, data: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Every added token of the files, by ascending id."""
    found: dict[str, dict[str, Any]] = {}

    def add(where: str, content: Any, token_id: Any, flags: dict[str, Any]) -> None:
        if type(content) is not str or not content:
            raise ValueError(f"{where}: an added token is {show(content)}, expected a string")
        if type(token_id) is not int or not 0 <= token_id < 1 << 31:
            raise ValueError(f"{where}: {show(content)} has the id {show(token_id)}")
        known = found.get(content)
        if known is not None:
            if known["id"] != token_id:
                raise ValueError(
                    f"{where}: {show(content)} has id {token_id}, elsewhere {known['id']}"
                )
            return
        # A token that is not flagged still takes part in the chat's markup when it is one of it.
        special = flags.get("special", content in CONTROL_TOKENS or content in ALLOWED_IN_TEXT)
        kinds = ("single_word", "lstrip", "rstrip", "normalized")
        entry = {kind: flags.get(kind, False) for kind in kinds} | {"special": special}
        if any(type(value) is not bool for value in entry.values()):
            raise ValueError(f"{where}: {show(content)} has a flag that is not true or false")
        found[content] = {"id": token_id, "content": content, **entry}

    stored = data.get("added_tokens") or []
    if type(stored) is not list or not all(isinstance(t, dict) for t in stored):
        raise ValueError(f"{name}: added_tokens is not a list of objects")
    for token in stored:
        add(name, token.get("content"), token.get("id"), token)
    if (folder / "tokenizer_config.json").exists():
        config = read_json(folder / "tokenizer_config.json", MAX_TOKENIZER_BYTES)
        decoder = config.get("added_tokens_decoder") or {}
        if not isinstance(decoder, dict):
            raise ValueError("tokenizer_config.json: added_tokens_decoder is not an object")
        for key, token in decoder.items():
            if not isinstance(token, dict) or not re.fullmatch(r"[0-9]{1,9}", key):
                raise ValueError(f"tokenizer_config.json: added_tokens_decoder has {show(key)}")
            add("tokenizer_config.json", token.get("content"), int(key), token)
    if (folder / "added_tokens.json").exists():
        for content, token_id in read_json(folder / "added_tokens.json").items():
            add("added_tokens.json", content, token_id, {})
    return sorted(found.values(), key=lambda token: token["id"])
