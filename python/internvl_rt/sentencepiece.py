"""SentencePiece BPE models (`tokenizer.model`): their file, and text to pieces.

Own code, because the `tokenizers` library cannot be exact here. It merges by rank, and every pair
of tokens has one of its own; SentencePiece merges by the score of the result, of equal ones the
leftmost: with "ab" and "ba" of one score, "aba" is ab a and "bab" is ba b, which no order of ranks
gives. InternLM2's vocabulary has thousands of equal scores. The algorithm is byte-pair encoding
(Sennrich et al. 2016) in the order of SentencePiece (Kudo and Richardson 2018).
"""

from __future__ import annotations

import heapq
import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import NoReturn

from internvl_rt.json_file import read_bytes, show

MAX_MODEL_BYTES = 64 << 20
SPACE = "\u2581"  # how pieces write a space

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types of protocol buffers
_BPE = 2
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")

Value = int | bytes


class Kind(IntEnum):
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Piece:
    text: str
    score: float
    kind: Kind


class SentencePiece:
    """Text to piece ids and back to text; no added tokens, no BOS, no prefix before the text.

    User-defined pieces without an ASCII character are words like any other and are matched before
    anything is merged. The others are markup, which text typed by a user must not become.
    """

    def __init__(self, pieces: list[Piece], *, add_dummy_prefix: bool, byte_fallback: bool) -> None:
        """Raises ValueError for pieces that are given twice or lack what encoding needs."""
        self.pieces = pieces
        self.add_dummy_prefix = add_dummy_prefix
        self.size = len(pieces)
        self._ids = {piece.text: i for i, piece in enumerate(pieces)}
        if len(self._ids) < len(pieces):
            twice = next(p.text for i, p in enumerate(pieces) if self._ids[p.text] != i)
            _fail(f"the piece {show(twice)} is there twice")
        unknown = [i for i, piece in enumerate(pieces) if piece.kind == Kind.UNKNOWN]
        if len(unknown) != 1:
            _fail(f"{len(unknown)} pieces are of the kind UNKNOWN, expected 1")
        self._unknown = unknown[0]
        self._bytes = self._byte_ids() if byte_fallback else None
        self._normal = {
            p.text: (-p.score, i) for i, p in enumerate(pieces) if p.kind == Kind.NORMAL
        }
        words = [p.text for p in pieces if p.kind == Kind.USER_DEFINED and is_word(p.text)]
        words.sort(key=len, reverse=True)
        self._words = re.compile(f"({'|'.join(map(re.escape, words))})") if words else None

    def _byte_ids(self) -> list[int]:
        found = {}
        for i, piece in enumerate(self.pieces):
            if piece.kind == Kind.BYTE:
                match = _BYTE_PIECE.fullmatch(piece.text)
                if not match:
                    _fail(f"piece {i} is {show(piece.text)}, expected a byte such as <0x0A>")
                found[int(match[1], 16)] = i
        if len(found) < 256:
            _fail(f"byte fallback has {len(found)} pieces, expected 256")
        return [found[byte] for byte in range(256)]

    def encode(self, text: str) -> list[int]:
        text = text.replace(" ", SPACE)
        parts = self._words.split(text) if self._words else [text]
        ids: list[int] = []
        for at, part in enumerate(parts):
            if at % 2:
                ids.append(self._ids[part])
            else:
                ids.extend(self._merged(part))
        return ids

    def _merged(self, text: str) -> list[int]:
        """The pieces of text without words: the best pair becomes one symbol while there is one."""
        symbols = list(text)  # a symbol merged into its left neighbour becomes ""
        after = [*range(1, len(symbols)), -1]
        before = [*range(-1, len(symbols) - 1)]
        normal = self._normal
        pairs: list[tuple[float, int, int, int]] = []  # -score, left, right, length of the merged

        def consider(left: int, right: int) -> None:
            merged = symbols[left] + symbols[right]
            found = normal.get(merged)
            if found is not None:
                heapq.heappush(pairs, (found[0], left, right, len(merged)))

        for left in range(len(symbols) - 1):
            consider(left, left + 1)
        while pairs:
            _, left, right, length = heapq.heappop(pairs)
            if not symbols[left] or not symbols[right]:
                continue
            if len(symbols[left]) + len(symbols[right]) != length:
                continue  # one of the two has grown since
            symbols[left] += symbols[right]
            symbols[right] = ""
            after[left] = after[right]
            if after[right] >= 0:
                before[after[right]] = left
                consider(left, after[left])
            if before[left] >= 0:
                consider(before[left], left)
        return [i for symbol in symbols if symbol for i in self._symbol_ids(symbol)]

    def _symbol_ids(self, symbol: str) -> list[int]:
        found = self._normal.get(symbol)
        if found is not None:
            return [found[1]]
        if self._bytes is None:
            return [self._unknown]
        return [self._bytes[byte] for byte in symbol.encode("utf-8")]

    def token(self, token_id: int) -> str | None:
        return self.pieces[token_id].text if 0 <= token_id < self.size else None

    def token_id(self, token: str) -> int | None:
        return self._ids.get(token)


def is_word(token: str) -> bool:
    """Whether a token without the power of markup: markup has some ASCII in it."""
    return not any(character.isascii() for character in token)


def read_sentencepiece(path: Path) -> SentencePiece:
    """The BPE model in the file at `path`.

    Raises OSError for a file that cannot be read, ValueError for one that is malformed or whose
    normalisation or algorithm is not supported.
    """
    data = read_bytes(path, MAX_MODEL_BYTES)
    try:
        return _model(data)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None


def _model(data: bytes) -> SentencePiece:
    pieces: list[Piece] = []
    trainer: dict[int, Value] = {}
    normalizer: dict[int, Value] = {}
    for number, value in _fields(data):
        if number == 1:
            pieces.append(_piece(_message("pieces", value), len(pieces)))
        elif number == 2:
            trainer.update(_fields(_message("trainer_spec", value)))
        elif number == 3:
            normalizer.update(_fields(_message("normalizer_spec", value)))
    for name, spec, number, default, supported in (
        ("model_type", trainer, 3, 1, _BPE),
        ("treat_whitespace_as_suffix", trainer, 24, 0, 0),
        ("precompiled_charsmap", normalizer, 2, b"", b""),
        ("remove_extra_whitespaces", normalizer, 4, 1, 0),
        ("escape_whitespaces", normalizer, 5, 1, 1),
    ):
        value = spec.get(number, default)
        if value != supported:
            _fail(f"{name} is {_brief(value)}, supported: {_brief(supported)}")
    return SentencePiece(
        pieces,
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        byte_fallback=bool(trainer.get(35, 0)),
    )


def _piece(data: bytes, index: int) -> Piece:
    fields = dict(_fields(data))
    text, score, kind = fields.get(1, b""), fields.get(2, bytes(4)), fields.get(3, Kind.NORMAL)
    if not isinstance(text, bytes) or not isinstance(score, bytes) or len(score) != 4:
        _fail(f"piece {index} has a field of another type")
    try:
        decoded = text.decode("utf-8")
    except UnicodeDecodeError:
        _fail(f"piece {index} is not UTF-8")
    if not decoded:
        _fail(f"piece {index} is empty")
    value = struct.unpack("<f", score)[0]
    if not math.isfinite(value):
        _fail(f"piece {index} has the score {value}")
    # No published model has pieces that are merged first and taken apart afterwards.
    supported = [k for k in Kind if k != Kind.UNUSED]
    if kind not in supported:
        _fail(f"piece {index} is of the kind {show(kind)}, supported: {list(map(int, supported))}")
    return Piece(decoded, value, Kind(kind))


def _brief(value: Value) -> str:
    return str(value) if isinstance(value, int) else f"{len(value)} bytes long"


def _message(name: str, value: Value) -> bytes:
    if not isinstance(value, bytes):
        _fail(f"{name} is a number, expected a message")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, Value]]:
    """The fields of a protocol-buffer message: number, and an integer or raw bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if not number:
            _fail("a field has the number 0")
        if wire == _VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == _BYTES:
            size, at = _varint(data, at)
        elif wire in (_FIXED32, _FIXED64):
            size = 4 if wire == _FIXED32 else 8
        else:
            _fail(f"field {number} has the wire type {wire}, expected 0, 1, 2 or 5")
        if size > len(data) - at:
            _fail(f"field {number} has {size} bytes, {len(data) - at} are left")
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """An integer of up to 64 bits, seven in a byte, the lowest first."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            _fail("the file ends within a number")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    _fail("a number has more than 10 bytes")


def _fail(message: str) -> NoReturn:
    raise ValueError(message) from None
