"""Root-mean-square normalisation (Zhang and Sennrich, 2019), optionally after a residual add."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from internvl_rt import _C
from internvl_rt.ops.registry import Case, Cost, Inputs, Op, give, register


def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float,
    residual: Tensor | None = None,
    weight_in_fp32: bool = False,
    out: Any = None,
    backend: str | None = None,
) -> Any:
    """y = x * rsqrt(mean(x^2) + eps) * weight over the last dimension, statistics in float32.

    x: [T, C] or [T, H, C], float32 or bfloat16, contiguous in C; T and H may be strided, so a slice
        of a packed qkv row is normalised per head ([T, H, D]) or over its full width ([T, H*D]).
    weight: [C], dtype of x.
    residual: like x; then h = x + residual is rounded to the dtype, normalised, and returned too.
    weight_in_fp32: multiply by weight before the only rounding (GPT-OSS) instead of after a first
        one (Llama, Qwen, InternViT).
    Returns y, or (y, h) with a residual. out may be x, or (x, residual).
    Raises ValueError for shapes or dtypes that do not fit.
    """
    run = _op.face(backend)
    if run is None:
        result = reference(x, weight, eps=eps, residual=residual, weight_in_fp32=weight_in_fp32)
        return give("rms_norm", result, out)
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        if residual is not None:
            out = (out, torch.empty_like(out))
    y, h = out if residual is not None else (out, None)
    run(_rows(x), weight, _rows(residual), _rows(y), _rows(h), eps, weight_in_fp32)
    return out


def _rows(x: Tensor | None) -> Tensor | None:
    return x.unsqueeze(1) if x is not None and x.dim() == 2 else x  # [T, H, C]


def _triton(*arguments: Any) -> None:
    from internvl_rt._triton.rms_norm import rms_norm as launch

    launch(*arguments)


def reference(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float,
    residual: Tensor | None = None,
    weight_in_fp32: bool = False,
) -> Any:
    h = x if residual is None else x + residual
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    y = (y * weight.to(y.dtype)).to(x.dtype) if weight_in_fp32 else y.to(x.dtype) * weight
    return y if residual is None else (y, h)


def cost(x: Tensor, weight: Tensor, residual: Tensor | None = None, **_: Any) -> Cost:
    rows = 2 if residual is None else 4
    return Cost((rows * x.numel() + weight.numel()) * x.element_size(), 4 * x.numel())


def _case(name: str, *shape: int, **options: Any) -> Case:
    flags = {k: options.pop(k) for k in ("bench", "slow") if k in options}

    def build(make: Inputs) -> dict[str, Any]:
        arguments: dict[str, Any] = {
            "x": make.normal(*shape, std=3.0),
            "weight": make.normal(shape[-1], mean=1.0, std=0.2),
            "eps": options.get("eps", 1e-6),
        }
        if options.get("residual"):
            arguments["residual"] = make.normal(*shape)
        if options.get("weight_in_fp32"):
            arguments["weight_in_fp32"] = True
        return arguments

    return Case(name, build, **flags)


def _shaped(make: Inputs, shape: tuple[int, ...]) -> dict[str, Any]:
    return _case("", *shape).build(make)


def _packed(name: str, T: int, heads: int, D: int, *, per_head: bool) -> Case:
    def build(make: Inputs) -> dict[str, Any]:
        qkv = make.normal(T, 3 * heads * D, std=2.0)
        x = qkv[:, heads * D : 2 * heads * D]
        x = x.unflatten(1, (heads, D)) if per_head else x
        return {"x": x, "weight": make.normal(x.shape[-1], mean=1.0, std=0.2), "eps": 1e-6}

    return Case(name, build)


_op = register(
    Op(
        name="rms_norm",
        function=rms_norm,
        reference=reference,
        faces={"native": _C.rms_norm, "cuda": _C.rms_norm, "triton": _triton},
        cost=cost,
        dims="T tokens, H heads (1 unless per head), C channels",
        shaped=_shaped,
        shape_help="TxC",
        cases=(
            _case("empty", 0, 64),
            _case("one", 1, 1),
            _case("odd", 3, 7),
            _case("tail", 5, 895),
            _case("tail_residual", 5, 63, residual=True),
            _case("zeros_eps", 4, 33, eps=1.0),
            _case("fp32_weight", 4, 130, weight_in_fp32=True),
            _packed("per_head_64", 9, 3, 64, per_head=True),
            _packed("per_head_128", 4, 2, 128, per_head=True),
            _packed("full_width_3200", 3, 25, 128, per_head=False),
            _case("qwen2_0.5b_decode", 1, 896, residual=True, bench=True),
            _case("qwen2_0.5b_prefill", 320, 896, residual=True, bench=True, slow=True),
            _case("qwen2_7b", 64, 3584, residual=True, bench=True, slow=True),
            _case("internvit_6b", 257, 3200, bench=True, slow=True),
        ),
    )
)
