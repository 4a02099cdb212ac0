"""Four-bit expert weights of GPT-OSS (OCP Microscaling Formats, MXFP4) to bfloat16."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from internvl_rt import _C
from internvl_rt.ops.registry import Case, Cost, Inputs, Op, Tolerance, give, register

_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def mxfp4_unpack(
    blocks: Tensor, scales: Tensor, *, out: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """value = element * 2^(scale - 127): exact; inf beyond bfloat16's range, NaN for scale 255.

    blocks: uint8 [..., G, 16], 32 elements each, the low half of a byte first; scales: uint8
        [..., G]. Both contiguous: `w_blocks[e]` and `w_scales[e]` give one expert's [N, K].
    Returns bfloat16 [..., G * 32]. Raises ValueError for shapes or dtypes that do not fit.
    """
    run = _op.face(backend)
    if blocks.shape != (*scales.shape, 16) or scales.dim() == 0:
        raise ValueError(
            f"mxfp4_unpack: blocks has shape {list(blocks.shape)}, scales {list(scales.shape)}; "
            "expected [..., G, 16] and [..., G]"
        )
    if run is None:
        return give("mxfp4_unpack", reference(blocks, scales), out)
    shape = (*scales.shape[:-1], scales.shape[-1] * 32)
    if out is None:
        out = torch.empty(shape, dtype=torch.bfloat16, device=blocks.device)
    elif out.shape != shape or not out.is_contiguous():
        raise ValueError(
            f"mxfp4_unpack: out has shape {list(out.shape)} and strides {list(out.stride())}, "
            f"expected contiguous {list(shape)}"
        )
    for name, tensor in (("blocks", blocks), ("scales", scales)):
        if not tensor.is_contiguous():
            raise ValueError(
                f"mxfp4_unpack: {name} has strides {list(tensor.stride())}, expected "
                "a contiguous tensor"
            )
    run(blocks.view(-1, 16), scales.view(-1), out.view(-1, 32))
    return out


def reference(blocks: Tensor, scales: Tensor) -> Tensor:
    halves = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2)  # [..., G, 32]
    table = torch.tensor([*_VALUES, *(-v for v in _VALUES)], dtype=torch.float64)
    factors = torch.exp2(scales.double() - 127.0).masked_fill(scales == 255, torch.nan)
    values = table.to(blocks.device)[halves.long()] * factors[..., None]
    return values.flatten(-2).to(torch.bfloat16)


def cost(blocks: Tensor, **_: Any) -> Cost:
    return Cost(blocks.numel() * 5 + blocks.numel() // 16)


def _case(name: str, *shape: int, low: int = 110, high: int = 140, **flags: bool) -> Case:
    def build(make: Inputs) -> dict[str, Any]:
        return {
            "blocks": make.integers(0, 256, *shape, 16, dtype=torch.uint8),
            "scales": make.integers(low, high, *shape, dtype=torch.uint8),
        }

    return Case(name, build, dtypes=(torch.bfloat16,), **flags)


def _every_scale(make: Inputs) -> dict[str, Any]:
    nibbles = torch.arange(16, dtype=torch.uint8)
    # All elements at all scales whose values are finite.
    return {
        "blocks": (nibbles | nibbles.flip(0) << 4).repeat(253, 1),
        "scales": torch.arange(253, dtype=torch.uint8),
    }


def _shaped(make: Inputs, shape: tuple[int, ...]) -> dict[str, Any]:
    N, K = shape
    return _case("", N, K // 32).build(make)


_op = register(
    Op(
        name="mxfp4_unpack",
        function=mxfp4_unpack,
        reference=reference,
        faces={"native": _C.mxfp4_unpack, "cuda": _C.mxfp4_unpack},
        cost=cost,
        dims="G blocks of 32 elements, N x K weight (bench)",
        shaped=_shaped,
        shape_help="NxK",
        tolerance=Tolerance(exact=True),
        cases=(
            _case("empty", 0, 3),
            _case("one", 1),
            _case("odd", 3, 5, 7),
            Case("every_scale", _every_scale, dtypes=(torch.bfloat16,)),
            _case("gpt_oss_20b_expert", 5760, 90, bench=True, slow=True),
        ),
    )
)
