"""Layer normalisation (Ba, Kiros and Hinton, 2016)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from internvl_rt import _C
from internvl_rt.ops.registry import Case, Cost, Inputs, Op, give, register


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """y = (x - mean) / sqrt(var + eps) * weight + bias over the last dimension, in float32.

    x: [T, C], float32 or bfloat16, contiguous in C; rows may be strided.
    weight, bias: [C], dtype of x.
    Returns y like x. out may be x. Raises ValueError for shapes or dtypes that do not fit.
    """
    run = _op.face(backend)
    if run is None:
        return give("layer_norm", reference(x, weight, bias, eps=eps), out)
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    run(x, weight, bias, out, eps)
    return out


def reference(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def cost(x: Tensor, weight: Tensor, **_: Any) -> Cost:
    return Cost((2 * x.numel() + 2 * weight.numel()) * x.element_size(), 8 * x.numel())


def _case(name: str, T: int, C: int, *, mean: float = 0.0, eps: float = 1e-6, **flags: Any) -> Case:
    def build(make: Inputs) -> dict[str, Any]:
        return {
            "x": make.normal(T, C, mean=mean, std=3.0),
            "weight": make.normal(C, mean=1.0, std=0.2),
            "bias": make.normal(C, std=0.2),
            "eps": eps,
        }

    return Case(name, build, **flags)


def _strided(make: Inputs) -> dict[str, Any]:
    x = make.normal(6, 300)[::2, 17:230]
    return {"x": x, "weight": make.normal(213), "bias": make.normal(213), "eps": 1e-5}


def _shaped(make: Inputs, shape: tuple[int, ...]) -> dict[str, Any]:
    return _case("", *shape).build(make)


_op = register(
    Op(
        name="layer_norm",
        function=layer_norm,
        reference=reference,
        faces={"native": _C.layer_norm, "cuda": _C.layer_norm},
        cost=cost,
        dims="T tokens, C channels",
        shaped=_shaped,
        shape_help="TxC",
        cases=(
            _case("empty", 0, 64),
            _case("one", 1, 1),
            _case("odd", 3, 7),
            _case("tail", 5, 895),
            _case("constant_eps", 3, 40, eps=0.5),
            _case("large_mean", 4, 1000, mean=1000.0),
            Case("strided", _strided),
            _case("internvit_300m", 1025, 1024, bench=True, slow=True),
            _case("projector", 256, 4096, eps=1e-5, bench=True, slow=True),
        ),
    )
)
