"""gated_activation in Triton (contract: kernels/gated_activation.h).

A program owns BLOCK columns of a row.
"""

# ruff: noqa: ANN001 (arguments of jitted functions are typed by the call)

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import triton
import triton.language as tl
from internvl_rt._triton.check import Checker

BLOCK = 1024


@triton.jit
def _gated_activation(x, y, I, x_t, y_t, GPT_OSS: tl.constexpr, BLOCK: tl.constexpr) -> None:  # noqa: E741
    dtype: tl.constexpr = x.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < I
    gate = tl.load(x + row * x_t + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * x_t + I + at, mask=inside, other=0.0).to(tl.float32)
    if GPT_OSS:
        # Written so that a NaN stays one.
        gate = tl.where(gate > 7.0, 7.0, gate)
        up = tl.where(up > 7.0, 7.0, tl.where(up < -7.0, -7.0, up))
        result = gate / (1.0 + tl.exp(-1.702 * gate)) * (up + 1.0)
    else:
        result = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32) * up
    tl.store(y + row * y_t + at, result.to(dtype), mask=inside)


def gated_activation(x: Tensor, y: Tensor, gate: Any) -> None:
    """x: [T, 2I], y: [T, I], any row strides; gate: a member of _C.Gate. y may be x's first half.

    Raises ValueError for shapes, dtypes and devices that do not fit.
    """
    check = Checker("gated_activation")
    check.tensor("x", x, [torch.float32, torch.bfloat16], "T width")
    check.tensor("y", y, [x.dtype], "T I")
    check.require(
        check["width"] == 2 * check["I"],
        f"y has shape {list(y.shape)}, expected [T, I] with x {list(x.shape)} = [T, 2I]",
    )
    T, I = y.shape  # noqa: E741
    if y.numel() == 0:
        return
    with torch.cuda.device_of(x):
        _gated_activation[(T, triton.cdiv(I, BLOCK))](
            *(x, y, I, x.stride(0), y.stride(0)),
            GPT_OSS=gate.name == "gpt_oss",
            BLOCK=BLOCK,
            num_warps=4,
            enable_fp_fusion=True,
        )
