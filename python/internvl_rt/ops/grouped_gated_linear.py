"""The first half of gated experts: their products and the gate between gate and up."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from internvl_rt import _C
from internvl_rt.ops.gated_activation import KINDS, gated_activation
from internvl_rt.ops.gated_activation import reference as gate_reference
from internvl_rt.ops.grouped_linear import PackedExperts, Rows, grouped_linear, pack_experts
from internvl_rt.ops.grouped_linear import _case as products_case
from internvl_rt.ops.grouped_linear import _routed as routed
from internvl_rt.ops.grouped_linear import cost as products_cost
from internvl_rt.ops.grouped_linear import reference as products_reference
from internvl_rt.ops.registry import Case, Cost, Inputs, Op, give, register


def grouped_gated_linear(
    x: Tensor,
    weight: Tensor | PackedExperts,
    offsets: Tensor,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    kind: str = "silu",
    phase: str | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """gated_activation(grouped_linear(x, weight, offsets, rows=rows, bias=bias), kind=kind): SwiGLU
    (Shazeer, 2020) of experts.

    One kernel where the weight is held for it (`pack_experts` with gated=True, on the CPU): gate
    and up then stay in float32 and the result is rounded once. Elsewhere it is those two ops.

    x: [R, K], float32 or bfloat16, contiguous in K.
    weight: [E, 2I, K], of each expert the gate's rows first, then those of up, from `pack_experts`;
        a plain tensor is packed in every call. bias: [E, 2I].
    offsets, rows, phase: as of `grouped_linear`. kind: as of `gated_activation`.
    Every row has the bits that `gated_linear` gives it with its expert's weight and bias, one
    kernel or two; on CUDA that holds within a phase, for linear's own kernels.
    Returns [M, I]; out may be strided in M, must not overlap x. Raises ValueError for shapes,
    dtypes, offsets, rows or options that do not fit.
    """
    run = _op.face(backend)
    if kind not in KINDS:
        raise ValueError(f"grouped_gated_linear: kind is {kind!r}, allowed: {', '.join(KINDS)}")
    if phase not in (None, "decode", "prefill"):
        raise ValueError(f"grouped_gated_linear: phase is {phase!r}, allowed: decode, prefill")
    if weight.shape[1] % 2:
        raise ValueError(
            f"grouped_gated_linear: weight has N={weight.shape[1]}, expected an even number"
        )
    if run is None:
        result = reference(x, weight, offsets, rows=rows, bias=bias, kind=kind)
        return give("grouped_gated_linear", result, out)
    if isinstance(weight, Tensor):
        weight = pack_experts(weight, gated=backend in (None, "native"))
    if not weight.gated:
        both = grouped_linear(
            x, weight, offsets, rows=rows, bias=bias, phase=phase, backend=backend
        )
        return gated_activation(both, kind=kind, out=out, backend=backend)
    if out is None:
        M = x.shape[0] if rows is None else rows.numel()
        out = torch.empty((M, weight.n // 2), dtype=x.dtype, device=x.device)
    held = (weight.data, *weight.shape, weight.format)
    run(x, *held, offsets, rows, bias, KINDS[kind], None, out)
    return out


def reference(
    x: Tensor,
    weight: Tensor | PackedExperts,
    offsets: Tensor,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    kind: str = "silu",
) -> Tensor:
    return gate_reference(products_reference(x, weight, offsets, rows=rows, bias=bias), kind=kind)


def cost(
    x: Tensor,
    weight: Tensor | PackedExperts,
    offsets: Tensor,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    **_: Any,
) -> Cost:
    whole = products_cost(x, weight, offsets, rows=rows, bias=bias)
    half = (x.shape[0] if rows is None else rows.numel()) * weight.shape[1] // 2
    return Cost(whole.bytes - half * x.element_size(), whole.flops + 6 * half)


def _case(
    name: str, rows: str | Rows, N: int, K: int, *, kind: str = "silu", **options: Any
) -> Case:
    products = products_case(name, rows, N, K, gated=True, **options)
    return dataclasses.replace(products, build=lambda make: products.build(make) | {"kind": kind})


def _shaped(make: Inputs, shape: tuple[int, ...]) -> dict[str, Any]:
    T, E, k, N, K = shape
    return _case("", (routed(T, E, k), T), N, K, packed=True).build(make)


def _real(name: str, rows: Rows, **options: Any) -> Case:
    flags = {"packed": True, "bench": True, "slow": True}
    return _case(f"qwen3_30b_a3b_{name}", rows, 1536, 2048, **flags, **options)


_op = register(
    Op(
        name="grouped_gated_linear",
        function=grouped_gated_linear,
        reference=reference,
        faces={"native": _C.grouped_linear, "cuda": _C.grouped_linear},
        cost=cost,
        dims="R rows of x, M rows, E experts, I intermediate channels, N = 2I outputs, "
        "K inputs; T tokens, k experts of a token (bench)",
        shaped=_shaped,
        shape_help="TxExkxNxK",
        cases=(
            _case("empty", "no rows", 64, 32),
            _case("empty_rows", "no tokens", 32, 32),
            _case("empty_columns", "few", 0, 32),
            _case("empty_depth", "gathered", 32, 0, bias=True),
            _case("one", ([1], None), 2, 1),
            _case("odd", "few", 62, 33, bias=True),
            _case("odd_gpt_oss", "gathered", 62, 31, bias=True, kind="gpt_oss"),
            _case("whole_panels", "gathered", 96, 31, bias=True),
            _case("whole_panels_gpt_oss", "few", 64, 45, bias=True, kind="gpt_oss"),
            _case("tail_many", "many", 160, 129, bias=True),
            _case("tail_experts", "many experts", 32, 16),
            _case("odd_int8", "few", 62, 33, bias=True, quant="int8"),
            _case("whole_panels_int8", "few", 96, 97, bias=True, quant="int8"),
            _case("tail_many_int4", "many", 160, 129, quant="int4"),
            _real("decode", ([1] * 8, 1)),
            _real("decode_int4", ([1] * 8, 1), quant="int4"),
            _real("prefill", (routed(64, 12, 8), 64)),
        ),
    )
)
