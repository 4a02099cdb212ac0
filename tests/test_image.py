"""image.py: the grid and pixels of the reference implementation, and files that mean harm."""

import io
import json
import os
import pathlib
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from internvl_rt import image

GOLDEN = pathlib.Path(__file__).parent / "golden" / "preprocess"
GRID = json.loads((GOLDEN / "grid.json").read_text())
PIXELS = json.loads((GOLDEN / "pixels.json").read_text())


def noise(height, width, channels=3, seed=0):
    rng = np.random.default_rng([seed, height, width])
    return rng.integers(0, 256, (height, width, channels), dtype=np.uint8)


def photo(height=60, width=90, mode="RGB"):
    y, x = np.mgrid[:height, :width]
    smooth = np.stack([x * 2, y * 3, (x + y) % 256], -1).astype(np.uint8)
    return Image.fromarray(smooth).convert(mode)


def encode(picture, kind, **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind, body=b"", crc=None):
    check = zlib.crc32(kind + body) if crc is None else crc
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check)


def png(width, height, *chunks):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND")


# ---- grid and pixels ---------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["grid", "grid_min_num"])
def test_every_grid_of_the_reference(key):
    assert len(GRID[key]) > 50
    for row in GRID[key]:
        got = image.tile_grid(
            row["width"], row["height"], row["max_num"], row["image_size"], row.get("min_num", 1)
        )
        assert got == (row["grid_cols"], row["grid_rows"]), row


def test_ties_go_to_the_larger_grid_only_for_large_pictures():
    assert image.tile_grid(448, 448) == (1, 1)
    assert image.tile_grid(1000, 1000) == (3, 3)
    assert image.tile_grid(800, 800) == (2, 2)
    assert image.tile_grid(560, 448, 12) == (4, 3)


@pytest.mark.parametrize("row", PIXELS["pictures"], ids=lambda r: f"{r['file']}-{r['max_num']}")
def test_pixels_of_the_reference(row):
    pixels = image.preprocess(GOLDEN / row["file"], row["max_num"], row["image_size"])
    assert list(pixels.shape) == row["shape"]
    assert pixels.dtype == torch.float32
    for tile, want in zip(pixels, row["tiles"], strict=True):
        samples = tile.flatten()[torch.tensor(want["sample_index"])]
        assert samples.double().tolist() == want["sample_value"]
        sums = tile.double().sum((1, 2))
        assert torch.allclose(
            sums, torch.tensor(want["channel_sums"], dtype=torch.float64), rtol=1e-9, atol=1e-4
        )


def test_without_thumbnail_and_with_one_tile():
    picture = noise(50, 100)
    with_thumbnail = image.preprocess(picture, 2, 28)
    assert with_thumbnail.shape == (3, 3, 28, 28)
    assert torch.equal(image.preprocess(picture, 2, 28, use_thumbnail=False), with_thumbnail[:2])
    assert image.preprocess(picture, 1, 28).shape == (1, 3, 28, 28)


@pytest.mark.parametrize("size", [(1, 1), (1, 700), (700, 1), (13, 17), (1, 9000)])
def test_odd_sizes(size):
    pixels = image.preprocess(noise(*size), 12, 28)
    assert torch.isfinite(pixels).all()


# ---- sound sources: Pillow's convert("RGB"), to the byte ---------------------------------------


def animation(kind):
    frames = [photo().point(lambda v, k=k: (v + 60 * k) % 256) for k in range(4)]
    return encode(frames[0], kind, save_all=True, append_images=frames[1:], duration=50)


def with_exif(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(photo(), "JPEG", exif=exif)


def transparent_palette():
    picture = photo(mode="P")
    return encode(picture, "PNG", transparency=bytes(range(256)))


def grey16():
    return encode(Image.fromarray(noise(40, 30, 1)[:, :, 0].astype(np.uint16) * 9), "PNG")


SOUND = {
    "jpeg": lambda: encode(photo(), "JPEG", quality=90),
    "jpeg_444": lambda: encode(photo(), "JPEG", quality=100, subsampling=0),
    "jpeg_progressive": lambda: encode(photo(), "JPEG", progressive=True),
    "jpeg_grey": lambda: encode(photo(mode="L"), "JPEG"),
    "jpeg_cmyk": lambda: encode(photo(mode="CMYK"), "JPEG"),
    "jpeg_icc_comment": lambda: encode(photo(), "JPEG", icc_profile=b"x" * 200_000, comment=b"hi"),
    "jpeg_rotated_by_exif": lambda: with_exif(6),
    "jpeg_trailing_garbage": lambda: encode(photo(), "JPEG") + b"garbage" * 50,
    "mpo": lambda: animation("MPO"),
    "png": lambda: encode(photo(), "PNG"),
    "png_rgba": lambda: encode(Image.fromarray(noise(20, 30, 4)), "PNG"),
    "png_la": lambda: encode(Image.fromarray(noise(20, 30, 4)).convert("LA"), "PNG"),
    "png_palette": lambda: encode(photo(mode="P"), "PNG"),
    "png_palette_transparent": transparent_palette,
    "png_one_bit": lambda: encode(photo(mode="1"), "PNG"),
    "png_grey16": grey16,
    "png_animated": lambda: animation("PNG"),
    "gif": lambda: encode(photo(), "GIF"),
    "gif_animated": lambda: animation("GIF"),
    "webp": lambda: encode(photo(), "WEBP"),
    "webp_lossless": lambda: encode(photo(), "WEBP", lossless=True),
    "webp_rgba": lambda: encode(Image.fromarray(noise(20, 30, 4)), "WEBP"),
    "webp_animated": lambda: animation("WEBP"),
    "bmp": lambda: encode(photo(), "BMP"),
    "bmp_palette": lambda: encode(photo(mode="P"), "BMP"),
}


@pytest.mark.parametrize("kind", SOUND)
def test_sound_files_equal_pillow(kind, tmp_path):
    data = SOUND[kind]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    path = tmp_path / "wrong_name.xyz"
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow's own warnings do not reach the caller
        for source in (path, str(path), data, bytearray(data), memoryview(data)):
            got = image.load_image(source)
            assert got.dtype == np.uint8
            assert np.array_equal(got, want)
        opened = Image.open(io.BytesIO(data))
        assert np.array_equal(image.load_image(opened), want)


def test_arrays():
    rgb = noise(9, 7)
    assert np.array_equal(image.load_image(rgb), rgb)
    rgba = noise(9, 7, 4)
    assert np.array_equal(image.load_image(rgba), rgba[:, :, :3])
    grey = rgb[:, :, 0]
    assert np.array_equal(image.load_image(grey), np.stack([grey] * 3, -1))
    want = image.preprocess(np.ascontiguousarray(rgb[::-1, ::2]), 1, 14)
    assert torch.equal(image.preprocess(rgb[::-1, ::2], 1, 14), want)
    rgb.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image.preprocess(rgb, 1, 14)


def test_threads_decode_alike():
    data = [SOUND[k]() for k in SOUND] * 3
    one = [image.preprocess(d, 4, 28) for d in data]
    with ThreadPoolExecutor(4) as pool:
        many = list(pool.map(lambda d: image.preprocess(d, 4, 28), data))
    assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))


# ---- broken and hostile sources ----------------------------------------------------------------


def flipped(data, at):
    return data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]


def jpeg_of_many_scans():
    data = encode(photo(), "JPEG", progressive=True)
    at = data.rindex(b"\xff\xda")
    scan = data[at:-2]
    sizes = struct.pack(">HH", 6000, 8000)
    frame = data.index(b"\xff\xc2") + 5
    return data[:frame] + sizes + data[frame + 4 : -2] + scan * 2000 + data[-2:]


def gif_frame_outside_its_screen():
    data = bytearray(encode(photo(), "GIF"))
    at = data.index(b",\0\0\0\0")
    data[at + 1 : at + 9] = struct.pack("<HHHH", 60000, 60000, 90, 60)
    return bytes(data)


def gif_of_comments():
    data = encode(photo(), "GIF")
    at = data.index(b",\0\0\0\0")
    return data[:at] + b"!\xfe" + (b"\xff" + b"c" * 255) * 20_000 + b"\0" + data[at:]


def webp_of_size(side):
    body = b"VP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + (side - 1).to_bytes(3, "little") * 2
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body + b"\0" * 64


def bmp_of_size(width, height):
    return (
        b"BM"
        + struct.pack("<IHHI", 60, 0, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    )


def bmp_of_runs():
    head = bytearray(bmp_of_size(5000, 5000))
    head[28:34] = struct.pack("<HI", 8, 1)
    head[10:14] = struct.pack("<I", 54 + 1024)
    return bytes(head) + b"\0" * 1024 + b"\x01\x00" * 2_000_000


ZEROS = zlib.compress(b"\0" * 10_000_000, 9)
HOSTILE = {
    "empty": (lambda: b"", "is empty"),
    "one_byte": (lambda: b"\xff", "no picture format"),
    "text": (lambda: b"this is no picture", "is text"),
    "html": (lambda: b"<!doctype html><html>", "is HTML"),
    "svg": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is SVG"),
    "pdf": (lambda: b"%PDF-1.7\n", "is PDF"),
    "tiff": (lambda: encode(photo(), "TIFF"), "is TIFF, allowed: BMP"),
    "avif": (lambda: b"\0\0\0\x1cftypavif" + b"\0" * 100, "is AVIF"),
    "jpeg_cut": (lambda: SOUND["jpeg"]()[:-200], "truncated or corrupt"),
    "jpeg_header": (lambda: SOUND["jpeg"]()[:120], "truncated header"),
    "jpeg_no_frame": (lambda: b"\xff\xd8\xff\xda\0\x08" + b"\0" * 50, "no frame header"),
    "jpeg_padding": (lambda: b"\xff\xd8" + b"\xff" * 3_000_000, "segments"),
    "jpeg_segments": (lambda: b"\xff\xd8" + b"\xff\xfe\0\x02" * 900_000, "segments"),
    "jpeg_scans": (jpeg_of_many_scans, "scans of"),
    "jpeg_zero": (
        lambda: (d := SOUND["jpeg"]())[: (i := d.index(b"\xff\xc0")) + 5] + b"\0" * 4 + d[i + 9 :],
        "expected at least 1 x 1",
    ),
    "png_half": (lambda: (d := SOUND["png"]())[: len(d) // 2], "PNG file"),
    "png_bad_crc": (lambda: flipped(SOUND["png"](), 60), "PNG file"),
    "png_zero": (lambda: png(0, 0, chunk(b"IDAT", b"")), "expected at least 1 x 1"),
    "png_bomb": (lambda: png(30000, 30000, chunk(b"IDAT", ZEROS)), "900000000 pixels"),
    "png_tall_bomb": (lambda: png(1, 2**31 - 1, chunk(b"IDAT", ZEROS)), "65535 a side"),
    "png_short": (lambda: png(7000, 7000, chunk(b"IDAT", ZEROS)), "truncated or corrupt"),
    "png_chunks": (lambda: png(9, 9, chunk(b"tEXt") * 100_000), "more than 50000 chunks"),
    "png_text_bomb": (
        lambda: png(9, 9, *[chunk(b"zTXt", b"k\0\0" + ZEROS)] * 100, chunk(b"IDAT", ZEROS)),
        "PNG file",
    ),
    "gif_half": (lambda: SOUND["gif"]()[:900], "GIF file"),
    "gif_outside": (gif_frame_outside_its_screen, "pixels, allowed"),
    "gif_comments": (gif_of_comments, "before its first frame"),
    "webp_half": (lambda: (d := SOUND["webp"]())[: len(d) // 2], "WebP file"),
    "webp_bomb": (lambda: webp_of_size(16383), "268402689 pixels"),
    "webp_no_data": (lambda: webp_of_size(900), "WebP file"),
    "bmp_half": (lambda: (d := SOUND["bmp"]())[: len(d) // 2], "truncated or corrupt"),
    "bmp_bomb": (lambda: bmp_of_size(60000, -60000), "3600000000 pixels"),
    "bmp_runs": (bmp_of_runs, "run-length"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_are_refused_in_one_line(kind, tmp_path):
    build, words = HOSTILE[kind]
    data = build()
    path = tmp_path / "file.jpg"
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for source in (path, data):
            with pytest.raises(ValueError, match=words) as caught:
                image.load_image(source)
            message = str(caught.value)
            assert message.startswith(f"image {str(path)!r}: " if source is path else "image of ")
            assert "\n" not in message
            assert " at 0x" not in message


def test_every_cut_and_flip_is_sound_or_refused():
    rng = np.random.default_rng(5)
    refused = 0
    for kind in ("jpeg", "png", "gif", "webp", "bmp", "jpeg_progressive", "png_palette"):
        data = SOUND[kind]()
        for _ in range(40):
            at = int(rng.integers(0, len(data)))
            bad = data[:at] if rng.random() < 0.5 else flipped(data, at)
            try:
                assert image.load_image(bad).ndim == 3
            except ValueError as error:
                refused += "\n" not in str(error)
    assert refused > 100


def test_paths_that_are_no_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        image.load_image(tmp_path / "missing.png")
    with pytest.raises(IsADirectoryError, match="is a directory"):
        image.load_image(tmp_path)
    with pytest.raises(ValueError, match="not a usable path"):
        image.load_image("a\0b")
    with pytest.raises(ValueError, match="is a URL and nothing is fetched"):
        image.load_image("https://example.com/a.png")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="not a regular file"):
        image.load_image(tmp_path / "pipe")
    with open(tmp_path / "big.jpg", "wb") as file:
        file.truncate(image.MAX_BYTES + 1)
    with pytest.raises(ValueError, match="allowed: at most 134217728"):
        image.load_image(tmp_path / "big.jpg")


@pytest.mark.parametrize(
    ("source", "error", "words"),
    [
        (None, TypeError, "image is NoneType"),
        (7, TypeError, "image is int"),
        ([[1, 2]], TypeError, "image is list"),
        (np.full((4, 4, 3), np.nan), ValueError, "dtype float64, expected uint8"),
        (np.zeros((4, 4, 3), np.int64), ValueError, "dtype int64"),
        (np.zeros((4, 4, 2), np.uint8), ValueError, r"shape \[4, 4, 2\]"),
        (np.zeros((3,), np.uint8), ValueError, r"shape \[3\]"),
        (np.zeros((2, 4, 4, 3), np.uint8), ValueError, r"shape \[2, 4, 4, 3\]"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, "4 x 0 pixels"),
        (np.broadcast_to(np.uint8(0), (9000, 9000, 3)), ValueError, "81000000 pixels"),
        (np.broadcast_to(np.uint8(0), (70000, 1, 3)), ValueError, "65535 a side"),
    ],
)
def test_wrong_sources(source, error, words):
    with pytest.raises(error, match=words):
        image.load_image(source)


def test_pil_images_that_fail_late():
    data = SOUND["jpeg"]()
    with pytest.raises(ValueError, match="PIL image RGB 90 x 60: cannot be decoded"):
        image.load_image(Image.open(io.BytesIO(data[:-200])))
    closed = Image.open(io.BytesIO(data))
    closed.close()
    with pytest.raises(ValueError, match="cannot be decoded"):
        image.load_image(closed)


def test_pil_images_keep_their_info():
    picture = Image.open(io.BytesIO(transparent_palette()))
    image.load_image(picture)
    assert "transparency" in picture.info


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"max_tiles": 0}, ValueError, "max_tiles is 0, allowed: 1 to 40"),
        ({"max_tiles": 41}, ValueError, "max_tiles is 41, allowed: 1 to 40"),
        ({"max_tiles": 2.0}, TypeError, "max_tiles is 2.0"),
        ({"max_tiles": True}, TypeError, "max_tiles is True"),
        ({"image_size": 0}, ValueError, "image_size is 0"),
        ({"image_size": 4096}, ValueError, "image_size is 4096"),
    ],
)
def test_wrong_options(options, error, words):
    with pytest.raises(error, match=words):
        image.preprocess(noise(4, 4), **options)


def test_wrong_grid_arguments():
    with pytest.raises(ValueError, match="width is 0"):
        image.tile_grid(0, 5)
    with pytest.raises(ValueError, match="min_tiles is 7, allowed: 1 to 6"):
        image.tile_grid(5, 5, 6, 448, 7)
