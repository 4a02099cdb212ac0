"""Token embeddings with image features in their places."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from internvl_rt import _C
from internvl_rt.ops.registry import Case, Cost, Inputs, Op, Tolerance, give, register


def embed_scatter(
    ids: Tensor,
    table: Tensor,
    *,
    image: Tensor | None = None,
    image_row: Tensor | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """out[t] = image[image_row[t]] where image_row[t] >= 0, else table[ids[t]].

    ids: int64 [T]; table: [V, C], float32 or bfloat16, rows may be strided.
    image: [N, C] of table's dtype, image_row: int64 [T]; both or neither.
    Returns [T, C]. Raises ValueError for an id or a row out of range; on a GPU, where looking would
    mean waiting, such a token gets a row of NaN instead.
    """
    run = _op.face(backend)
    if run is None:
        result = reference(ids, table, image=image, image_row=image_row)
        return give("embed_scatter", result, out)
    if out is None:
        out = table.new_empty(ids.shape[0], table.shape[1])
    run(ids, table, image, image_row, out)
    return out


def reference(
    ids: Tensor, table: Tensor, *, image: Tensor | None = None, image_row: Tensor | None = None
) -> Tensor:
    if image is None or image_row is None or not image.shape[0]:
        return table[ids]
    here = image_row >= 0
    text = table[ids.masked_fill(here, 0)]
    return torch.where(here[:, None], image[image_row.clamp_min(0)], text)


def cost(ids: Tensor, table: Tensor, **_: Any) -> Cost:
    return Cost(2 * ids.shape[0] * table.shape[1] * table.element_size())


def _case(name: str, T: int, V: int, C: int, N: int = 0, **flags: bool) -> Case:
    def build(make: Inputs) -> dict[str, Any]:
        arguments: dict[str, Any] = {
            "ids": make.integers(0, V, T),
            "table": make.normal(V, C),
        }
        if N:
            row = torch.full((T,), -1)
            row[make.permutation(T)[:N]] = make.permutation(N)
            arguments |= {"image": make.normal(N, C), "image_row": row}
        return arguments

    return Case(name, build, **flags)


def _shaped(make: Inputs, shape: tuple[int, ...]) -> dict[str, Any]:
    T, V, C = shape
    return _case("", T, V, C, N=T * 4 // 5).build(make)  # about a picture's share of its prompt


_op = register(
    Op(
        name="embed_scatter",
        function=embed_scatter,
        reference=reference,
        faces={"native": _C.embed_scatter, "cuda": _C.embed_scatter},
        cost=cost,
        dims="T tokens, V vocabulary, C channels, N image features",
        shaped=_shaped,
        shape_help="TxVxC",
        tolerance=Tolerance(exact=True),
        cases=(
            _case("empty", 0, 5, 8),
            _case("odd", 7, 11, 13, 3),
            _case("text_only", 33, 50, 96),
            _case("all_image", 16, 4, 20, 16),
            _case("qwen2_0.5b_tile", 320, 600, 896, 256, bench=True),
        ),
    )
)
