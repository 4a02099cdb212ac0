"""From vision to language: pixel unshuffle and the two-layer projector of InternVL."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from internvl_rt import _C
from internvl_rt.ops.linear import Weight, linear, pack, unpack
from internvl_rt.ops.registry import (
    Case,
    Cost,
    Inputs,
    Op,
    catalogue,
    give,
    register,
    triton_kernel,
)

_VERSIONS = ("v2", "v1")


def pixel_unshuffle_mlp(
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    w1: Weight,
    b1: Tensor,
    w2: Weight,
    b2: Tensor,
    *,
    grid: tuple[int, int],
    ratio: int = 2,
    version: str = "v2",
    eps: float = 1e-5,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """linear2(gelu(linear1(layer_norm(unshuffle(x))))): blocks of ratio x ratio patches to tokens.

    x: [t, h*w, C] patch features in row-major order, float32 or bfloat16, contiguous in C; tiles
        and patches may be strided, so that [:, 1:] drops a class token.
    ln_weight, ln_bias: [r*r*C]; a block's patches stand in it in row-major order.
    w1 [h1, r*r*C], b1 [h1], w2 [h2, h1], b2 [h2]: weights as in `linear`.
    grid: (h, w), multiples of ratio.
    version: order of a tile's tokens: "v2" row by row, "v1" column by column.
    Returns [t, h*w / (r*r), h2]. Raises ValueError for shapes, dtypes or options that do not fit.
    """
    run = _op.face(backend)
    if version not in _VERSIONS:
        raise ValueError(f"pixel_unshuffle_mlp: version is {version!r}, allowed: v2, v1")
    if run is None:
        result = reference(
            x,
            ln_weight,
            ln_bias,
            w1,
            b1,
            w2,
            b2,
            grid=grid,
            ratio=ratio,
            version=version,
            eps=eps,
        )
        return give("pixel_unshuffle_mlp", result, out)
    h, w = grid
    blocks = (h // ratio) * (w // ratio) if ratio > 0 else 0
    tiles, width = x.shape[0], ratio * ratio * x.shape[-1]
    rows = torch.empty((tiles * blocks, width), dtype=x.dtype, device=x.device)
    run(x, ln_weight, ln_bias, rows, h, w, ratio, version == "v1", eps)
    # A backend without products of its own takes the native ones.
    products = backend if backend in catalogue()["linear"].faces else None
    hidden = linear(rows, w1, bias=b1, activation="gelu", phase="prefill", backend=products)
    if out is None:
        out = torch.empty((tiles, blocks, w2.shape[0]), dtype=x.dtype, device=x.device)
    elif out.shape != (tiles, blocks, w2.shape[0]) or not out.is_contiguous():
        raise ValueError(
            f"pixel_unshuffle_mlp: out has shape {list(out.shape)} and strides "
            f"{list(out.stride())}, expected contiguous {[tiles, blocks, w2.shape[0]]}"
        )
    flat = out.view(tiles * blocks, w2.shape[0])
    linear(hidden, w2, bias=b2, phase="prefill", out=flat, backend=products)
    return out


def reference(
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    w1: Weight,
    b1: Tensor,
    w2: Weight,
    b2: Tensor,
    *,
    grid: tuple[int, int],
    ratio: int = 2,
    version: str = "v2",
    eps: float = 1e-5,
) -> Tensor:
    (h, w), r = grid, ratio
    tiles, _, C = x.shape
    cells = x.reshape(tiles, h // r, r, w // r, r, C)
    order = (0, 1, 3, 2, 4, 5) if version == "v2" else (0, 3, 1, 2, 4, 5)
    rows = cells.permute(order).reshape(tiles, (h // r) * (w // r), r * r * C)
    rows = F.layer_norm(rows, rows.shape[-1:], ln_weight, ln_bias, eps)
    w1, w2 = (v if isinstance(v, Tensor) else unpack(v) for v in (w1, w2))
    return F.linear(F.gelu(F.linear(rows, w1.to(x.dtype), b1)), w2.to(x.dtype), b2)


def cost(
    x: Tensor,
    w1: Weight,
    w2: Weight,
    **_: Any,
) -> Cost:
    (h1, width), h2 = w1.shape, w2.shape[0]
    rows = x.numel() // max(width, 1)
    weights = h1 * width + h2 * h1
    moved = (x.numel() * 3 + rows * (2 * h1 + h2) + weights) * x.element_size()
    return Cost(moved, 2 * rows * weights)


def _case(
    name: str,
    tiles: int,
    grid: tuple[int, int],
    C: int,
    hidden: int,
    *,
    ratio: int = 2,
    version: str = "v2",
    **flags: Any,
) -> Case:
    width = ratio * ratio * C

    def build(make: Inputs) -> dict[str, Any]:
        w1, w2 = make.normal(hidden, width, std=width**-0.5), make.normal(hidden, hidden, std=0.1)
        if flags.get("bench"):
            w1, w2 = pack(w1), pack(w2)
        return {
            "x": make.normal(tiles, 1 + grid[0] * grid[1], C)[:, 1:],
            "ln_weight": make.normal(width, mean=1.0, std=0.2),
            "ln_bias": make.normal(width, std=0.2),
            "w1": w1,
            "b1": make.normal(hidden),
            "w2": w2,
            "b2": make.normal(hidden),
            "grid": grid,
            "ratio": ratio,
            "version": version,
        }

    return Case(name, build, **flags)


def _shaped(make: Inputs, shape: tuple[int, ...]) -> dict[str, Any]:
    t, C, hidden = shape
    return _case("", t, (32, 32), C, hidden).build(make)


_op = register(
    Op(
        name="pixel_unshuffle_mlp",
        function=pixel_unshuffle_mlp,
        reference=reference,
        faces={
            "native": _C.pixel_unshuffle_norm,
            "cuda": _C.pixel_unshuffle_norm,
            "triton": triton_kernel("pixel_unshuffle_mlp", "pixel_unshuffle_norm"),
        },
        cost=cost,
        dims="t tiles, h x w patches, C channels, r ratio, h1 and h2 projector widths",
        shaped=_shaped,
        shape_help="txCxh2",
        cases=(
            _case("empty", 0, (4, 4), 8, 16),
            _case("odd", 2, (4, 6), 5, 33),
            _case("odd_v1", 2, (4, 6), 5, 33, version="v1"),
            _case("ratio_4", 1, (4, 8), 3, 20, ratio=4),
            _case("ratio_1", 1, (3, 2), 7, 10, ratio=1),
            _case("internvl3_1b", 1, (32, 32), 1024, 896, bench=True, slow=True),
        ),
    )
)
