"""The first half of a gated MLP: two products and the gate between them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from internvl_rt import _C
from internvl_rt.ops.gated_activation import KINDS, gated_activation
from internvl_rt.ops.gated_activation import reference as gate_reference
from internvl_rt.ops.linear import Weight, hold, linear, pack, readable
from internvl_rt.ops.linear import cost as product_cost
from internvl_rt.ops.linear import reference as product_reference
from internvl_rt.ops.registry import Case, Cost, Inputs, Op, give, register


def gated_linear(
    x: Tensor,
    weight: Weight,
    *,
    bias: Tensor | None = None,
    kind: str = "silu",
    phase: str | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """gated_activation(linear(x, weight, bias=bias), kind=kind): SwiGLU (Shazeer, 2020).

    One kernel where the weight is held for it (`hold` with gated=True, on the CPU), and where a
    GPU has one (Hopper, kind "silu", the prefill phase, bfloat16 rows of multiples of 16 bytes):
    gate and up then stay in float32 and the result is rounded once. Elsewhere it is those two ops.

    x: [M, K], float32 or bfloat16, contiguous in K. A row's result does not depend on the others;
        on CUDA that holds within a phase.
    weight: [2I, K], the gate's rows first, then those of up, from `hold` or `pack`; a plain tensor
        is held anew in every call. bias: [2I].
    kind: as of `gated_activation`. phase: as of `linear`.
    out: [M, I]; rows may be strided; must not overlap x.
    Returns [M, I]. Raises ValueError for shapes, dtypes or options that do not fit.
    """
    run = _op.face(backend)
    if kind not in KINDS:
        raise ValueError(f"gated_linear: kind is {kind!r}, allowed: {', '.join(KINDS)}")
    if phase not in (None, "decode", "prefill"):
        raise ValueError(f"gated_linear: phase is {phase!r}, allowed: decode, prefill")
    if weight.shape[0] % 2:
        raise ValueError(f"gated_linear: weight has N={weight.shape[0]}, expected an even number")
    if run is None:
        return give("gated_linear", reference(x, weight, bias=bias, kind=kind), out)
    if isinstance(weight, Tensor):
        weight = hold(weight, gated=backend in (None, "native"))
    weight = readable(weight)
    if out is None:
        rows = x.shape[0] if x.dim() == 2 else 0
        out = torch.empty((rows, weight.n // 2), dtype=x.dtype, device=x.device)
    decode = None if phase is None else phase == "decode"
    held = (weight.data, weight.n, weight.k, weight.format, weight.gated)
    # A call that is recorded says nothing; for a weight that is held for it there is a kernel.
    if run(x, *held, bias, KINDS[kind], decode, out) or weight.gated:
        return out
    both = linear(x, weight, bias=bias, phase=phase, backend=backend)
    return gated_activation(both, kind=kind, out=out, backend=backend)


def reference(
    x: Tensor, weight: Weight, *, bias: Tensor | None = None, kind: str = "silu"
) -> Tensor:
    return gate_reference(product_reference(x, weight, bias=bias), kind=kind)


def cost(x: Tensor, weight: Weight, bias: Tensor | None = None, **_: Any) -> Cost:
    whole = product_cost(x, weight, bias=bias)
    half = x.shape[0] * weight.shape[0] // 2
    return Cost(whole.bytes - half * x.element_size(), whole.flops + 6 * half)


def _case(
    name: str, M: int, N: int, K: int, *, bias: bool = False, kind: str = "silu", **flags: Any
) -> Case:
    def build(make: Inputs) -> dict[str, Any]:
        weight = make.normal(N, K, std=2.0 * K**-0.5 if K else 1.0)
        arguments: dict[str, Any] = {
            "x": make.normal(M, K),
            "weight": pack(weight) if flags.get("bench") else weight,
            "kind": kind,
        }
        if bias:
            arguments["bias"] = make.normal(N)
        return arguments

    return Case(name, build, **flags)


def _shaped(make: Inputs, shape: tuple[int, ...]) -> dict[str, Any]:
    return _case("", *shape, bench=True).build(make)


_op = register(
    Op(
        name="gated_linear",
        function=gated_linear,
        reference=reference,
        faces={"native": _C.gated_linear, "cuda": _C.gated_linear},
        cost=cost,
        dims="M rows, I intermediate channels, N = 2I outputs of the product, K inputs",
        shaped=_shaped,
        shape_help="MxNxK",
        cases=(
            _case("empty", 0, 32, 32),
            _case("empty_columns", 3, 0, 32),
            _case("one", 1, 2, 1),
            _case("odd", 5, 62, 33, bias=True),
            _case("odd_gpt_oss", 5, 62, 33, bias=True, kind="gpt_oss"),
            _case("aligned", 37, 272, 72),
            _case("aligned_bias", 20, 48, 200, bias=True),
            _case("whole_panels", 37, 320, 72, bias=True),
            _case("whole_panels_gpt_oss", 20, 64, 45, bias=True, kind="gpt_oss"),
            _case("qwen2_0.5b_decode", 1, 9728, 896, bench=True, slow=True),
            _case("qwen2_0.5b_prefill", 320, 9728, 896, bench=True, slow=True),
        ),
    )
)
