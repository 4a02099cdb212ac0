"""JSON files from strangers: strict, bounded, with one-line errors in our own words."""

from __future__ import annotations

import io
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

MAX_JSON_BYTES = 16 << 20


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """One JSON object from a regular file, strictly.

    Refuses more than `max_bytes`, invalid UTF-8, duplicate keys, NaN and infinities, integers of
    more than 100 digits, and nesting beyond the interpreter's limit: ValueError of one line.
    """
    data = read_bytes(path, max_bytes)
    value = parse_json(data, path.name)
    if not isinstance(value, dict):
        _fail(f"{path.name}: holds {show(value)}, expected an object")
    return value


def open_regular(path: Path) -> BinaryIO:
    """A regular file, unbuffered, for reading; a pipe in its place cannot hang the loader."""

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))

    try:
        file = open(path, "rb", buffering=0, opener=opener)  # noqa: SIM115 (the caller's to close)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise IsADirectoryError(f"{path} is a folder, expected a file") from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(f"{path} is not a regular file")
    return file


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """A regular file of at most `max_bytes` bytes."""
    with io.BufferedReader(open_regular(path)) as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        _fail(f"{path.name}: more than {max_bytes} bytes")
    return data


def parse_json(data: bytes, name: str) -> Any:
    """`data` as strict JSON (see `read_json`); `name` begins the message of every error."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    raise ValueError(f"key {show(key)} appears twice")
                seen.add(key)
        return result

    def integer(text: str) -> int | float:
        if len(text) > 100:
            raise ValueError(f"an integer of {len(text)} digits")
        return -0.0 if text == "-0" else int(text)  # no integer to other readers of JSON

    def constant(text: str) -> NoReturn:
        raise ValueError(f"{text} is not JSON")

    try:
        return json.loads(
            data.decode("utf-8"),
            object_pairs_hook=unique,
            parse_int=integer,
            parse_constant=constant,
        )
    except UnicodeDecodeError as error:
        _fail(f"{name}: not UTF-8 at byte {error.start}")
    except RecursionError:
        _fail(f"{name}: nested too deeply")
    except ValueError as error:
        _fail(f"{name}: {error}")


def show(value: Any) -> str:
    """`value` for an error message: one line of ASCII, at most 80 characters."""
    text = ascii(value) if not isinstance(value, (dict, list)) or len(value) < 16 else ""
    if not text:
        text = f"{type(value).__name__} of {len(value)} entries"
    return text if len(text) <= 80 else text[:77] + "..."


def _fail(message: str) -> NoReturn:
    raise ValueError(message) from None
