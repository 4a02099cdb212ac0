"""pixel_unshuffle_norm in Triton (contract: kernels/pixel_unshuffle_mlp.h).

A program gathers the r * r cells of one output row as a tile of CELLS >= r * r by BLOCK >= C, in
registers, and normalises it there.
"""

# ruff: noqa: ANN001 (arguments of jitted functions are typed by the call)

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import triton
import triton.language as tl
from internvl_rt._triton.check import Checker

MAX_TILE = 16384


@triton.jit
def _pixel_unshuffle_norm(
    x,
    weight,
    bias,
    y,
    h,
    w,
    r,
    C,
    x_t,
    x_cell,
    y_row,
    eps,
    BY_COLUMNS: tl.constexpr,
    CELLS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    dtype: tl.constexpr = x.dtype.element_ty
    rows, columns = h // r, w // r
    row = tl.program_id(0)
    tile, block = row // (rows * columns), row % (rows * columns)
    if BY_COLUMNS:
        above, left = block % rows, block // rows
    else:
        above, left = block // columns, block % columns
    cell = tl.arange(0, CELLS)[:, None]  # of the block, row by row
    column = tl.arange(0, BLOCK)[None, :]
    inside = (cell < r * r) & (column < C)  # [CELLS, BLOCK]
    place = (above * r + cell // r) * w + left * r + cell % r  # of the cell in its tile
    source = x + tile.to(tl.int64) * x_t + place.to(tl.int64) * x_cell + column
    v = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    width = r * r * C
    mean = tl.sum(tl.sum(v, axis=1), axis=0) / width
    d = tl.where(inside, v - mean, 0.0)
    inverse = tl.rsqrt(tl.sum(tl.sum(d * d, axis=1), axis=0) / width + eps)
    at = cell * C + column
    scale = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
    result = d * inverse * scale + shift
    tl.store(y + row.to(tl.int64) * y_row + at, result.to(dtype), mask=inside)


@dataclass(frozen=True)
class Config:
    CELLS: int
    BLOCK: int
    num_warps: int


def config(r: int, C: int) -> Config:
    cells, block = triton.next_power_of_2(r * r), triton.next_power_of_2(C)
    return Config(cells, block, min(max(cells * block // 1024, 4), 16))


def pixel_unshuffle_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    y: Tensor,
    h: int,
    w: int,
    r: int,
    by_columns: bool,
    eps: float,
) -> None:
    """x: [t, h*w, C], weight and bias: [r*r*C], y: [t * (h/r) * (w/r), r*r*C].

    Raises ValueError for shapes, dtypes, devices and grids that do not fit, and for blocks of more
    than 16384 elements (with r * r and C rounded up to powers of two).
    """
    check = Checker("pixel_unshuffle_mlp")
    check.require(
        min(h, w, r) >= 1 and h % r == 0 and w % r == 0,
        f"grid is ({h}, {w}), expected multiples of ratio={r}",
    )
    check.require(eps >= 0, "eps is negative or NaN, expected a number >= 0")
    check.bind("h*w", h * w, "grid")
    check.tensor("x", x, [torch.float32, torch.bfloat16], "t h*w C")
    check.bind("width", r * r * x.shape[2], "ratio and x")
    check.tensor("ln_weight", weight, [x.dtype], "width")
    check.tensor("ln_bias", bias, [x.dtype], "width")
    check.bind("rows", x.shape[0] * (h // r) * (w // r), "grid, ratio and x")
    check.tensor("rows", y, [x.dtype], "rows width")
    if y.numel() == 0:
        return
    c = config(r, x.shape[2])
    check.require(
        c.CELLS * c.BLOCK <= MAX_TILE,
        f"a block has {c.CELLS} x {c.BLOCK} elements, at most {MAX_TILE} allowed",
    )
    with torch.cuda.device_of(x):
        _pixel_unshuffle_norm[(y.shape[0],)](
            *(x, weight, bias, y, h, w, r, x.shape[2]),
            *(x.stride(0), x.stride(1), y.stride(0), eps),
            BY_COLUMNS=by_columns,
            CELLS=c.CELLS,
            BLOCK=c.BLOCK,
            num_warps=c.num_warps,
            enable_fp_fusion=True,
        )
