"""Mixture of experts: the weighted sum of a token's experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from internvl_rt import _C
from internvl_rt.ops.registry import Case, Cost, Inputs, Op, give, register


def moe_combine(
    x: Tensor,
    weights: Tensor,
    places: Tensor,
    *,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """out[t] = residual[t] + sum over j of weights[t, j] * x[places[t, j]], in float32, rounded
    once.

    x: [M, N], float32 or bfloat16, contiguous in N: the experts' results, sorted by expert.
    weights: [T, k] float32, places: [T, k] int32, both from moe_route. The k products are added in
        the order of j, so a token's bits depend on nothing but its own experts' results.
    residual: [T, N], dtype of x.
    Returns [T, N]. out may be residual. Raises ValueError for shapes, dtypes or places that do not
    fit; on CUDA a place out of range makes its token NaN.
    """
    run = _op.face(backend)
    if run is None:
        return give("moe_combine", reference(x, weights, places, residual=residual), out)
    if out is None:
        shape = (weights.shape[0] if weights.dim() else 0, x.shape[-1] if x.dim() else 0)
        out = torch.empty(shape, dtype=x.dtype, device=x.device)
    run(x, weights, places, residual, out)
    return out


def reference(
    x: Tensor, weights: Tensor, places: Tensor, *, residual: Tensor | None = None
) -> Tensor:
    y = torch.zeros((places.shape[0], x.shape[1]), dtype=x.dtype, device=x.device)
    for place, weight in zip(places.long().unbind(1), weights.to(x.dtype).unbind(1), strict=True):
        y = y + weight[:, None] * x[place]
    return y if residual is None else residual + y


def cost(x: Tensor, places: Tensor, residual: Tensor | None = None, **_: Any) -> Cost:
    rows = places.numel() + places.shape[0] * (1 if residual is None else 2)
    N = x.shape[1]
    return Cost(rows * N * x.element_size() + 8 * places.numel(), 2 * places.numel() * N)


def _case(name: str, T: int, k: int, N: int, *, residual: bool = True, **flags: bool) -> Case:
    def build(make: Inputs) -> dict[str, Any]:
        arguments: dict[str, Any] = {
            "x": make.normal(T * k, N),
            "weights": make.normal(T, k, dtype=torch.float32).softmax(-1),
            "places": make.permutation(T * k).int().view(T, k),
        }
        if residual:
            arguments["residual"] = make.normal(T, N)
        return arguments

    return Case(name, build, **flags)


def _strided(make: Inputs) -> dict[str, Any]:
    return {
        "x": make.normal(12, 90)[:, 5:50],
        "weights": make.uniform(4, 9)[:, 2:5],
        "places": make.permutation(12).int().view(4, 3),
        "residual": make.normal(4, 77)[:, 20:65],
    }


def _shaped(make: Inputs, shape: tuple[int, ...]) -> dict[str, Any]:
    return _case("", *shape).build(make)


_op = register(
    Op(
        name="moe_combine",
        function=moe_combine,
        reference=reference,
        faces={"native": _C.moe_combine, "cuda": _C.moe_combine},
        cost=cost,
        dims="T tokens, k experts of a token, M = T * k rows, N channels",
        shaped=_shaped,
        shape_help="TxkxN",
        cases=(
            _case("empty", 0, 2, 64),
            _case("empty_columns", 3, 2, 0),
            _case("one", 1, 1, 1, residual=False),
            _case("odd", 5, 3, 37),
            Case("strided", _strided),
            _case("gpt_oss_20b", 9, 4, 2880),
            _case("qwen3_30b_a3b_decode", 1, 8, 2048, bench=True),
            _case("qwen3_30b_a3b_prefill", 320, 8, 2048, bench=True, slow=True),
        ),
    )
)
