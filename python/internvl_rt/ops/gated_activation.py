"""Gated activations: SwiGLU (Shazeer, 2020) and GPT-OSS's clamped variant."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from internvl_rt import _C
from internvl_rt.ops.registry import Case, Cost, Inputs, Op, give, register, triton_kernel

KINDS = dict(_C.Gate.__members__)


def gated_activation(
    x: Tensor,
    *,
    kind: str = "silu",
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """y = activation(gate) * up, where x holds gate and up side by side.

    x: [T, 2I], float32 or bfloat16, contiguous in 2I; rows may be strided.
    kind: "silu": silu(gate) * up; "gpt_oss": gate * sigmoid(1.702 gate) * (up + 1) with gate cut
        off above 7 and up clipped to [-7, 7].
    Returns [T, I]. out may be the first half of x. Raises ValueError for what does not fit.
    """
    run = _op.face(backend)
    if kind not in KINDS:
        raise ValueError(f"gated_activation: kind is {kind!r}, allowed: {', '.join(KINDS)}")
    if run is None:
        return give("gated_activation", reference(x, kind=kind), out)
    if out is None:
        out = torch.empty((*x.shape[:-1], x.shape[-1] // 2), dtype=x.dtype, device=x.device)
    run(x, out, KINDS[kind])
    return out


def reference(x: Tensor, *, kind: str = "silu") -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    if kind == "silu":
        return F.silu(gate) * up
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


def cost(x: Tensor, **_: Any) -> Cost:
    return Cost(x.numel() * 3 // 2 * x.element_size(), 6 * x.numel())


def _case(name: str, T: int, width: int, *, kind: str = "silu", **flags: Any) -> Case:
    def build(make: Inputs) -> dict[str, Any]:
        return {"x": make.normal(T, 2 * width, std=4.0), "kind": kind}

    return Case(name, build, **flags)


def _strided(make: Inputs) -> dict[str, Any]:
    return {"x": make.normal(6, 200)[::2, 7:161]}


def _shaped(make: Inputs, shape: tuple[int, ...]) -> dict[str, Any]:
    return _case("", *shape).build(make)


_op = register(
    Op(
        name="gated_activation",
        function=gated_activation,
        reference=reference,
        faces={
            "native": _C.gated_activation,
            "cuda": _C.gated_activation,
            "triton": triton_kernel("gated_activation", "gated_activation"),
        },
        cost=cost,
        dims="T tokens, I intermediate channels",
        shaped=_shaped,
        shape_help="TxI",
        cases=(
            _case("empty", 0, 64),
            _case("one", 1, 1),
            _case("odd", 3, 37),
            _case("odd_gpt_oss", 3, 45, kind="gpt_oss"),
            Case("strided", _strided),
            _case("gpt_oss_20b", 4, 2880, kind="gpt_oss"),
            _case("qwen2_0.5b_decode", 1, 4864, bench=True),
            _case("qwen2_0.5b_prefill", 320, 4864, bench=True, slow=True),
        ),
    )
)
