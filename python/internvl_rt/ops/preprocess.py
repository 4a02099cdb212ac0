"""Decoded RGB to normalised tiles: InternVL's dynamic preprocessing after the grid is chosen.

The resize is Pillow's antialiased bicubic for 8-bit pictures (Keys 1981, a = -1/2), bit for bit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from internvl_rt import _C
from internvl_rt.ops.registry import Case, Cost, Inputs, Op, Tolerance, give, register

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_BITS = 22  # fractional bits of a weight


def preprocess(
    image: Tensor,
    *,
    columns: int,
    rows: int,
    image_size: int,
    thumbnail: bool = False,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    dtype: torch.dtype = torch.float32,
    out: Any = None,
    backend: str | None = None,
) -> Any:
    """Resizes a picture to a grid of square tiles, cuts and normalises them.

    image: [H, W, 3] uint8 RGB; rows may be strided. The tiles are made, bit for bit the same, on
        the device where it lies.
    columns, rows: the grid, 0 to 1024; the picture is resized to columns*S x rows*S whatever its
        aspect ratio. 0 leaves the grid out.
    image_size: S, the side of a tile in pixels.
    thumbnail: append the whole picture resized to S x S as the last tile.
    mean, std: per channel, in units of 1/255: y = (byte/255 - mean) / std, each step in float32.
    dtype: float32, or bfloat16 (the float32 value rounded once).
    Returns [columns*rows + thumbnail, 3, S, S], tiles row by row.
    Raises ValueError for shapes, dtypes or numbers that do not fit.
    """
    run = _op.face(backend)
    table = _table(_three("mean", mean), _three("std", std), dtype)
    if run is None:
        result = reference(
            image,
            columns=columns,
            rows=rows,
            image_size=image_size,
            thumbnail=thumbnail,
            mean=mean,
            std=std,
            dtype=dtype,
        )
        return give("preprocess", result, out)
    if out is not None and out.dtype != dtype:
        raise ValueError(f"preprocess: out is {out.dtype}, expected dtype {dtype}")
    if out is None:
        tiles = columns * rows + int(thumbnail)
        if tiles < 0 or image_size < 1:
            raise ValueError(
                f"preprocess: columns, rows and image_size are {columns}, {rows} and {image_size}, "
                "allowed: at least 0, 0 and 1"
            )
        out = torch.empty(tiles, 3, image_size, image_size, dtype=dtype, device=image.device)
    run(image, table.to(image.device), out, columns, rows, image_size, thumbnail)
    return out


def _native(image: Tensor, table: Tensor, out: Tensor, *request: Any) -> None:
    if not image.is_cuda:
        return _C.preprocess(image, table, out, *request)
    # The weights are made by the host, in the double precision that Pillow's are.
    table_bytes, all_bytes = _C.preprocess_workspace(image, table, out, *request)
    tables = torch.empty(table_bytes, dtype=torch.uint8)
    _C.preprocess_tables(tables, *image.shape[:2], *request)
    workspace = torch.empty(all_bytes, dtype=torch.uint8, device=image.device)
    workspace[:table_bytes].copy_(tables)
    return _C.preprocess_cuda(image, table, out, *request, workspace)


def _three(name: str, values: Sequence[float]) -> tuple[float, ...]:
    numbers = tuple(float(v) for v in values)
    good = len(numbers) == 3 and all(math.isfinite(v) for v in numbers)
    if not good or (name == "std" and min(numbers) <= 0):
        kind = "positive" if name == "std" else "finite"
        raise ValueError(f"preprocess: {name} is {list(numbers)}, expected 3 {kind} numbers")
    return numbers


@functools.lru_cache(maxsize=16)
def _table(mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """The normalised value of every byte in every channel."""
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"preprocess: dtype is {dtype}, allowed: torch.float32, torch.bfloat16")
    byte = torch.arange(256, dtype=torch.float32) / 255
    scale = torch.tensor([mean, std], dtype=torch.float32).unsqueeze(-1)  # [2, 3, 1]
    return ((byte - scale[0]) / scale[1]).to(dtype)  # [3, 256]


def reference(
    image: Tensor,
    *,
    columns: int,
    rows: int,
    image_size: int,
    thumbnail: bool = False,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    S = image_size
    tiles = [image.new_empty(0, S, S, 3)]
    if columns * rows > 0:
        grid = _resize(image, rows * S, columns * S)
        grid = grid.view(rows, S, columns, S, 3).transpose(1, 2)
        tiles.append(grid.reshape(-1, S, S, 3))
    if thumbnail:
        tiles.append(_resize(image, S, S).unsqueeze(0))
    byte = torch.cat(tiles).permute(0, 3, 1, 2)  # [t, 3, S, S]
    table = _table(_three("mean", mean), _three("std", std), dtype)
    channel = torch.arange(3).view(1, 3, 1, 1)
    return table[channel, byte.long()].contiguous()


def _resize(image: Tensor, height: int, width: int) -> Tensor:
    """[H, W, 3] -> [height, width, 3], uint8."""
    H, W, _ = image.shape
    # Pillow 13: the vertical pass comes first where the height loses more than twice what the
    # width does. The order shows, because each pass rounds to a byte.
    lost = H - height
    vertical_first = lost > 0 and lost > 2 * (W - width)
    for axis in (0, 1) if vertical_first else (1, 0):
        n_out = (height, width)[axis]
        if image.shape[axis] != n_out:
            image = _resample(image.transpose(0, axis), n_out).transpose(0, axis)
    return image.contiguous()


def _resample(x: Tensor, n_out: int) -> Tensor:
    """Along dimension 0, in exact integers."""
    n_in = x.shape[0]
    first, weights = _weights(n_in, n_out)
    x = x.to(torch.int32, memory_format=torch.contiguous_format)  # sums stay below 2^31
    total = torch.full((n_out, *x.shape[1:]), 1 << (_BITS - 1), dtype=torch.int32)
    for i, weight in enumerate(weights):
        line = x.index_select(0, (first + i).clamp(max=n_in - 1))
        total.addcmul_(line, weight.view(-1, *[1] * (x.dim() - 1)))
    return (total >> _BITS).clamp(0, 255).to(torch.uint8)


def _weights(n_in: int, n_out: int) -> tuple[Tensor, list[Tensor]]:
    """First input of every output [n_out], and its weights, one tensor [n_out] per tap."""
    scale = n_in / n_out
    stretch = max(scale, 1.0)  # shrinking widens the filter
    support = 2.0 * stretch
    center = (torch.arange(n_out, dtype=torch.float64) + 0.5) * scale
    first = (center - support + 0.5).long().clamp(min=0)
    stop = (center + support + 0.5).long().clamp(max=n_in)
    exact = []
    for i in range(int((stop - first).max())):
        x = (((first + i).double() - center + 0.5) * (1.0 / stretch)).abs()
        near = (1.5 * x - 2.5) * x * x + 1
        far = (((x - 5) * x + 8) * x - 4) * -0.5
        weight = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
        exact.append(torch.where(first + i < stop, weight, 0.0))
    total = functools.reduce(torch.add, exact)  # in this order: the last bit of the sum counts
    fixed = [w / total * (1 << _BITS) for w in exact]
    return first, [torch.where(w < 0, w - 0.5, w + 0.5).int() for w in fixed]


def cost(
    image: Tensor,
    columns: int,
    rows: int,
    image_size: int,
    thumbnail: bool = False,
    dtype: torch.dtype = torch.float32,
    **_: Any,
) -> Cost:
    pixels = (columns * rows + int(thumbnail)) * image_size * image_size
    return Cost(image.numel() + 3 * pixels * dtype.itemsize)


def _case(name: str, H: int, W: int, columns: int, rows: int, S: int, **options: Any) -> Case:
    flags = {k: options.pop(k) for k in ("bench", "slow", "dtypes") if k in options}
    padding = options.pop("padding", 0)

    def build(make: Inputs) -> dict[str, Any]:
        image = make.integers(0, 256, H, W + padding, 3, dtype=torch.uint8)
        return {
            "image": image[:, :W],
            "columns": columns,
            "rows": rows,
            "image_size": S,
            "dtype": make.dtype,
            **options,
        }

    return Case(name, build, **flags)


def _shaped(make: Inputs, shape: tuple[int, ...]) -> dict[str, Any]:
    return _case("", *shape, 4, 3, 448, thumbnail=True).build(make)


_op = register(
    Op(
        name="preprocess",
        function=preprocess,
        reference=reference,
        faces={"native": _native, "cuda": _native},
        cost=cost,
        dims="H, W picture, S tile side, t tiles",
        tolerance=Tolerance(exact=True),
        shaped=_shaped,
        shape_help="HxW",
        cases=(
            _case("empty", 5, 7, 0, 0, 4),
            _case("odd", 37, 53, 3, 2, 13, thumbnail=True),
            _case("one_pixel", 1, 1, 1, 1, 28),
            _case("one_row", 1, 700, 4, 1, 14, thumbnail=True),
            _case("one_column", 700, 1, 1, 4, 14, thumbnail=True),
            _case("tiny_tile", 30, 20, 3, 2, 1, thumbnail=True),
            _case("thumbnail_only", 40, 50, 0, 0, 28, thumbnail=True),
            _case("same_size", 28, 28, 1, 1, 28),
            _case("same_width", 99, 28, 1, 1, 28),
            _case("same_height", 28, 99, 1, 1, 28),
            _case("strided_rows", 33, 21, 1, 1, 16, padding=5),
            _case("vertical_first", 200, 64, 4, 3, 14, thumbnail=True),
            _case("vertical_first_narrow", 150, 11, 1, 1, 28, thumbnail=True),
            _case("wide_tile", 16, 16, 1, 1, 530),
            _case("clip_numbers", 9, 9, 1, 1, 14, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)),
            _case("photo_640x480", 480, 640, 4, 3, 448, thumbnail=True, bench=True, slow=True),
            _case(
                "uhd_3840x2160",
                2160,
                3840,
                4,
                2,
                448,
                thumbnail=True,
                dtypes=(torch.float32,),
                bench=True,
                slow=True,
            ),
        ),
    )
)
