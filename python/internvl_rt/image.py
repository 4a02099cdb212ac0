"""Pictures to tiles: decoding with limits, the tile grid, and normalised pixels.

Decoding is Pillow's `convert("RGB")`, to the byte: alpha is dropped, 16-bit grey is clipped, the
first frame of an animation is taken and no EXIF rotation is applied, as InternVL's own code does.
Files may come from strangers: sizes are read from the header and refused before anything is
allocated, and whatever cannot be decoded completely raises one line that names the source.
"""

from __future__ import annotations

import functools
import io
import os
import re
import stat
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from internvl_rt import ops
from internvl_rt.ops.preprocess import IMAGENET_MEAN

MAX_TILES = 40
MAX_TILE_SIZE = 2048
MAX_BYTES = 128 << 20
MAX_SIDE = 65535
# A 50 megapixel camera's picture passes. Decoding takes up to 12 bytes a pixel (a progressive CMYK
# JPEG), 20 for WebP, so both limits keep a process below 1 GB.
MAX_PIXELS = 8192 * 6144
MAX_WEBP_PIXELS = 32_000_000
MAX_SQUARE_SIDE = 8192  # 192 MiB
_MEAN_COLOUR = tuple(int(255 * mean) for mean in IMAGENET_MEAN)

# What a small file could make Pillow repeat for minutes.
_MAX_PNG_CHUNKS = 50_000
_MAX_JPEG_SEGMENTS = 4096
_MAX_JPEG_SCAN_PIXELS = 1 << 30  # pixels times scans; a progressive file has 10 to 20 scans
_MAX_GIF_EXTENSION_BYTES = 256 << 10
_MAX_RLE_BYTES = 1 << 20

_FORMATS = "BMP, GIF, JPEG, PNG, WebP"
_SOURCES = "a path, bytes, a PIL image or a uint8 array [H, W, 3]"


# ---- the grid -----------------------------------------------------------------------------------


def tile_grid(
    width: int, height: int, max_tiles: int = 12, image_size: int = 448, min_tiles: int = 1
) -> tuple[int, int]:
    """(columns, rows) of the grid whose shape is nearest to a picture's.

    width, height, image_size: pixels. Of grids at the same distance |width/height - columns/rows|
    the later one (by area) is taken only where the picture has more than half its pixels.
    Source: InternVL's dynamic_preprocess. Raises ValueError for numbers out of range.
    """
    _integer("width", width, 1, 1 << 24)
    _integer("height", height, 1, 1 << 24)
    _integer("max_tiles", max_tiles, 1, MAX_TILES)
    _integer("min_tiles", min_tiles, 1, max_tiles)
    _integer("image_size", image_size, 1, MAX_TILE_SIZE)
    aspect = width / height
    best, nearest = (1, 1), float("inf")
    for columns, rows in _grids(min_tiles, max_tiles):
        distance = abs(aspect - columns / rows)
        larger = width * height > 0.5 * image_size * image_size * columns * rows
        if distance < nearest or (distance == nearest and larger):
            best, nearest = (columns, rows), distance
    return best


@functools.lru_cache(maxsize=256)
def _grids(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    # The reference sorts a set by area alone, so equal areas keep the set's order. Pairs of
    # integers hash alike everywhere: building the same set in the same order repeats it.
    grids = {
        (i, j)
        for n in range(min_tiles, max_tiles + 1)
        for i in range(1, n + 1)
        for j in range(1, n + 1)
        if min_tiles <= i * j <= max_tiles
    }
    return tuple(sorted(grids, key=lambda grid: grid[0] * grid[1]))


def _integer(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} is {value!r}, expected an integer from {low} to {high}")
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}, allowed: {low} to {high}")


# ---- pixels -------------------------------------------------------------------------------------


def pad_to_square(pixels: np.ndarray) -> np.ndarray:
    """A picture, uint8 [H, W, 3], in the middle of a square of the mean colour; Chat V1.0's way.

    Raises ValueError for a picture of which a side is longer than MAX_SQUARE_SIDE.
    """
    height, width, _ = pixels.shape
    side = max(height, width)
    if side > MAX_SQUARE_SIDE:
        raise ValueError(
            f"image: is {width} x {height} pixels and padded to a square, "
            f"allowed: {MAX_SQUARE_SIDE} a side"
        )
    square = np.empty((side, side, 3), np.uint8)
    square[:] = _MEAN_COLOUR
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = pixels
    return square


def preprocess(
    image: Any, max_tiles: int = 12, image_size: int = 448, use_thumbnail: bool = True
) -> torch.Tensor:
    """A picture as normalised tiles, float32 [t, 3, S, S] with S = image_size.

    image: anything that `load_image` takes.
    max_tiles: 1 to 40. Tiles stand row by row; with more than one and use_thumbnail the whole
        picture follows as the last, so t is at most max_tiles + 1.
    Raises what load_image raises, and ValueError or TypeError for numbers out of range.
    """
    _integer("max_tiles", max_tiles, 1, MAX_TILES)
    _integer("image_size", image_size, 1, MAX_TILE_SIZE)
    pixels = load_image(image)
    height, width, _ = pixels.shape
    columns, rows = tile_grid(width, height, max_tiles, image_size)
    if not pixels.flags.writeable:
        pixels = pixels.copy()  # torch warns about memory that it could write to
    return ops.preprocess(
        torch.from_numpy(pixels),
        columns=columns,
        rows=rows,
        image_size=image_size,
        thumbnail=use_thumbnail and columns * rows > 1,
    )


def load_image(source: Any) -> np.ndarray:
    """A picture as RGB, uint8 [H, W, 3] with packed pixels.

    source: a path; the bytes of a BMP, GIF, JPEG, PNG or WebP file; a PIL image (its current
        frame); or a uint8 array [H, W, 3], [H, W, 4] (alpha is dropped), or [H, W] (grey).
    At most 128 MiB, 50 331 648 pixels (32 million for WebP) and 65535 pixels a side.
    Pillow's own `ImageFile.LOAD_TRUNCATED_IMAGES` is left as the application has it.
    Raises OSError for a file that cannot be read, ValueError for one that is broken, too large or
    of another format and for an array of another shape or dtype, TypeError for other objects.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        return _from_pil(source)
    if isinstance(source, str | os.PathLike):
        path = os.fspath(source)
        name = f"image {_short(path)}"
        return _decode(_read(path, name), name)
    if isinstance(source, bytes | bytearray | memoryview):
        name = f"image of {memoryview(source).nbytes} bytes"
        _check_bytes(memoryview(source).nbytes, name)
        return _decode(bytes(source), name)
    raise TypeError(f"image is {type(source).__name__}, expected {_SOURCES}")


def _short(path: str | bytes) -> str:
    text = repr(path)
    return text if len(text) <= 200 else f"{text[:100]}...{text[-90:]}"


def _read(path: str | bytes, name: str) -> bytes:
    if isinstance(path, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", path):
        raise ValueError(f"{name}: is a URL and nothing is fetched; expected {_SOURCES}")
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(f"{name}: is a directory, expected a file")
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{name}: is not a regular file")
        _check_bytes(status.st_size, name)
        with open(path, "rb") as file:
            return file.read(MAX_BYTES)
    except FileNotFoundError:
        raise FileNotFoundError(f"{name}: no such file") from None
    except PermissionError:
        raise PermissionError(f"{name}: no permission to read it") from None
    except ValueError as error:
        if str(error).startswith(name):
            raise
        raise ValueError(f"{name}: is not a usable path") from None
    except OSError as error:
        if str(error).startswith(name):
            raise
        raise OSError(f"{name}: cannot be read ({error.strerror})") from None


def _check_bytes(n: int, name: str) -> None:
    if n == 0:
        raise ValueError(f"{name}: is empty, expected a {_FORMATS} file")
    if n > MAX_BYTES:
        raise ValueError(f"{name}: has {n} bytes, allowed: at most {MAX_BYTES}")


def _check_size(width: int, height: int, name: str, limit: int = MAX_PIXELS) -> None:
    if width < 1 or height < 1:
        raise ValueError(f"{name}: is {width} x {height} pixels, expected at least 1 x 1")
    if width > MAX_SIDE or height > MAX_SIDE:
        raise ValueError(f"{name}: is {width} x {height} pixels, allowed: {MAX_SIDE} a side")
    if width * height > limit:
        raise ValueError(
            f"{name}: is {width} x {height} = {width * height} pixels, allowed: at most {limit}"
        )


def _from_array(array: np.ndarray) -> np.ndarray:
    shape = list(array.shape)
    if array.dtype != np.uint8:
        raise ValueError(f"image: array has dtype {array.dtype}, expected uint8 in 0 to 255")
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        raise ValueError(f"image: array has shape {shape}, expected [H, W, 3], [H, W, 4] or [H, W]")
    height, width, channels = array.shape
    _check_size(width, height, f"image: array {shape}")
    if channels == 1:
        array = np.broadcast_to(array, (height, width, 3))
    return np.ascontiguousarray(array[:, :, :3])


def _from_pil(image: Image.Image) -> np.ndarray:
    name = f"PIL image {image.mode} {image.width} x {image.height}"
    _check_size(image.width, image.height, name)
    try:
        image.load()
        if "transparency" in image.info:
            image = image.copy()  # the caller keeps its info
        return _rgb(image)
    except MemoryError:
        raise ValueError(f"{name}: does not fit in memory") from None
    except Exception:
        raise ValueError(
            f"{name}: cannot be decoded to RGB, expected a complete picture of an open file"
        ) from None


def _rgb(image: Image.Image) -> np.ndarray:
    """A loaded image's `convert("RGB")`."""
    # Never part of RGB, but Pillow warns about some kinds of it.
    image.info.pop("transparency", None)
    if image.mode != "RGB":
        image = image.convert("RGB")
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    # In bands that stay in cache: Pillow copies a whole picture three times on its way to an array.
    step = max(1, (256 << 10) // image.width)
    for y in range(0, image.height, step):
        stop = min(y + step, image.height)
        pixels[y:stop] = np.asarray(image.crop((0, y, image.width, stop)))
    return pixels


# ---- files --------------------------------------------------------------------------------------


class _BrokenFileError(Exception):
    """What is wrong with a file, in the words of the message."""


def _decode(data: bytes, name: str) -> np.ndarray:
    kind = _kind(data)
    if kind not in _OPENERS:
        raise ValueError(f"{name}: is {kind}, allowed: {_FORMATS}")
    limit = MAX_WEBP_PIXELS if kind == "WebP" else MAX_PIXELS
    try:
        image = _OPENERS[kind](data, functools.partial(_check_size, name=name, limit=limit))
    except _BrokenFileError as error:
        raise ValueError(f"{name}: is a {kind} file with {error}") from None
    except ValueError as error:
        if str(error).startswith(name):
            raise
        raise ValueError(f"{name}: is a {kind} file with a truncated or broken header") from None
    except MemoryError:
        raise ValueError(f"{name}: does not fit in memory") from None
    except Exception:
        raise ValueError(f"{name}: is a {kind} file with a truncated or broken header") from None
    _check_size(image.width, image.height, name, limit)
    try:
        image.load()
        return _rgb(image)
    except MemoryError:
        raise ValueError(f"{name}: does not fit in memory") from None
    except Exception:
        raise ValueError(f"{name}: is a {kind} file that is truncated or corrupt") from None


def _kind(data: bytes) -> str:
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WebP"
    if data.startswith(b"BM"):
        return "BMP"
    if data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "TIFF"
    if data[4:8] == b"ftyp":
        brand = data[8:12]
        return "AVIF" if brand in (b"avif", b"avis") else "HEIF or a video"
    if data.startswith(b"%PDF"):
        return "PDF"
    head = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith(b"<"):
        return "SVG" if b"<svg" in head else "HTML or XML"
    if head.isascii() and head and all(c >= 32 or c in b"\t\r\n\f" for c in head):
        return "text"
    return "no picture format that is known"


_CheckSize = Callable[[int, int], None]


def _open_jpeg(data: bytes, check: _CheckSize) -> Image.Image:
    # Comments and application segments are left out (all but JFIF and Adobe, which tell the colour
    # space): pixels do not depend on them, and EXIF, ICC, Photoshop and multi-picture blocks are
    # where a small file can hide much work.
    kept = [data[:2]]
    at, size = 2, None
    for _ in range(_MAX_JPEG_SEGMENTS):
        if len(data) < at + 4:
            raise _BrokenFileError("a truncated header")
        if data[at] != 0xFF:
            raise _BrokenFileError("a broken header")
        code = data[at + 1]
        if code == 0xFF:  # padding
            at += 1
            continue
        if code in (0x00, 0x01) or 0xD0 <= code <= 0xD8:  # stand-alone
            at += 2
            continue
        if code == 0xDA:
            break
        length = 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if code == 0xD9 or length < 4 or at + length > len(data):
            raise _BrokenFileError("a truncated header")
        if 0xC0 <= code <= 0xCF and code not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", data, at + 5)
            check(width, height)
            size = width * height
        if code not in (0xFE, *range(0xE1, 0xEE), 0xEF):
            kept.append(data[at : at + length])
        at += length
    else:
        raise _BrokenFileError(f"more than {_MAX_JPEG_SEGMENTS} segments in its header")
    if size is None:
        raise _BrokenFileError("no frame header")
    scans = data.count(b"\xff\xda", at)
    if scans * size > _MAX_JPEG_SCAN_PIXELS:
        raise _BrokenFileError(
            f"{scans} scans of {size} pixels, allowed: {_MAX_JPEG_SCAN_PIXELS} in all"
        )
    kept.append(memoryview(data)[at:])
    return JpegImageFile(io.BytesIO(b"".join(kept)))


def _open_png(data: bytes, check: _CheckSize) -> Image.Image:
    if len(data) < 33 or data[12:16] != b"IHDR":
        raise _BrokenFileError("no IHDR chunk")
    check(*struct.unpack_from(">II", data, 16))
    at = 8
    for _ in range(_MAX_PNG_CHUNKS):
        if at + 12 > len(data) or data[at + 4 : at + 8] == b"IEND":
            break
        at += 12 + int.from_bytes(data[at : at + 4], "big")
    else:
        raise _BrokenFileError(f"more than {_MAX_PNG_CHUNKS} chunks")
    return PngImageFile(io.BytesIO(data))


def _open_gif(data: bytes, check: _CheckSize) -> Image.Image:
    if len(data) < 13:
        raise _BrokenFileError("a truncated header")
    width, height = struct.unpack_from("<HH", data, 6)
    check(width, height)
    at = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)
    start = at
    while data[at : at + 1] == b"!":  # an extension: label, then blocks up to an empty one
        at += 2
        while at < len(data) and data[at]:
            at += 1 + data[at]
            if at - start > _MAX_GIF_EXTENSION_BYTES:
                raise _BrokenFileError(
                    f"more than {_MAX_GIF_EXTENSION_BYTES} bytes before its first frame"
                )
        at += 1
    if data[at : at + 1] != b"," or len(data) < at + 10:
        raise _BrokenFileError("no complete frame")
    left, top, frame_width, frame_height = struct.unpack_from("<HHHH", data, at + 1)
    # A frame may reach past the screen, which Pillow then enlarges.
    check(max(width, left + frame_width), max(height, top + frame_height))
    return GifImageFile(io.BytesIO(data))


def _open_webp(data: bytes, check: _CheckSize) -> Image.Image:
    # Read here, because opening one allocates its canvas.
    kind = data[12:16]
    if len(data) < 30:
        raise _BrokenFileError("a truncated header")
    if kind == b"VP8X":
        width = 1 + int.from_bytes(data[24:27], "little")
        height = 1 + int.from_bytes(data[27:30], "little")
    elif kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    elif kind == b"VP8 ":
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
    else:
        raise _BrokenFileError("a broken header")
    check(width, height)
    return WebPImageFile(io.BytesIO(data))


def _open_bmp(data: bytes, check: _CheckSize) -> Image.Image:
    if len(data) < 26:
        raise _BrokenFileError("a truncated header")
    if int.from_bytes(data[14:18], "little") == 12:
        check(*struct.unpack_from("<HH", data, 18))
    else:
        width, height = struct.unpack_from("<ii", data, 18)
        check(width, abs(height))
        compression = int.from_bytes(data[30:34], "little")
        if compression in (1, 2) and len(data) > _MAX_RLE_BYTES:
            raise _BrokenFileError(f"{len(data)} run-length coded bytes, allowed: {_MAX_RLE_BYTES}")
    return BmpImageFile(io.BytesIO(data))


_OPENERS: dict[str, Callable[[bytes, _CheckSize], Image.Image]] = {
    "BMP": _open_bmp,
    "GIF": _open_gif,
    "JPEG": _open_jpeg,
    "PNG": _open_png,
    "WebP": _open_webp,
}
