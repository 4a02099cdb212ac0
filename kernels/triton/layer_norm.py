"""layer_norm in Triton (contract: kernels/layer_norm.h).

A program owns ROWS rows of BLOCK >= C columns and holds them in registers between the passes; wider
rows are streamed three times.
"""

# ruff: noqa: ANN001 (arguments of jitted functions are typed by the call)

from __future__ import annotations

import torch
from torch import Tensor

import triton
import triton.language as tl
from internvl_rt._triton.check import Checker
from internvl_rt._triton.rows import config


@triton.jit(do_not_specialize=["T"])
def _layer_norm(
    x,
    weight,
    bias,
    y,
    T,
    C,
    x_t,
    y_t,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STREAM: tl.constexpr,
) -> None:
    dtype: tl.constexpr = x.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    live = (row < T)[:, None]
    column = tl.arange(0, BLOCK)  # [BLOCK]
    x_row = x + (row * x_t)[:, None]
    y_row = y + (row * y_t)[:, None]

    if not STREAM:
        inside = live & (column < C)[None, :]  # [ROWS, BLOCK]
        v = tl.load(x_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
        mean = tl.sum(v, axis=1) / C
        d = tl.where(inside, v - mean[:, None], 0.0)
        inverse = tl.rsqrt(tl.sum(d * d, axis=1) / C + eps)
        w = tl.load(weight + column, mask=column < C, other=0.0).to(tl.float32)
        b = tl.load(bias + column, mask=column < C, other=0.0).to(tl.float32)
        result = d * inverse[:, None] * w[None, :] + b[None, :]
        tl.store(y_row + column[None, :], result.to(dtype), mask=inside)
    else:
        sums = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
        for start in range(0, C, BLOCK):
            at = (start + column)[None, :]
            sums += tl.load(x_row + at, mask=live & (at < C), other=0.0).to(tl.float32)
        mean = tl.sum(sums, axis=1) / C
        squares = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
        for start in range(0, C, BLOCK):
            at = (start + column)[None, :]
            inside = live & (at < C)
            v = tl.load(x_row + at, mask=inside, other=0.0).to(tl.float32)
            d = tl.where(inside, v - mean[:, None], 0.0)
            squares += d * d
        inverse = tl.rsqrt(tl.sum(squares, axis=1) / C + eps)
        for start in range(0, C, BLOCK):
            at = (start + column)[None, :]
            inside = live & (at < C)
            v = tl.load(x_row + at, mask=inside, other=0.0).to(tl.float32)
            w = tl.load(weight + at, mask=at < C, other=0.0).to(tl.float32)
            b = tl.load(bias + at, mask=at < C, other=0.0).to(tl.float32)
            result = (v - mean[:, None]) * inverse[:, None] * w + b
            tl.store(y_row + at, result.to(dtype), mask=inside)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, y: Tensor, eps: float) -> None:
    """x, y: [T, C], any row stride, contiguous in C; weight, bias: [C]. y may be x.

    Raises ValueError for shapes, dtypes and devices that do not fit.
    """
    check = Checker("layer_norm")
    check.tensor("x", x, [torch.float32, torch.bfloat16], "T C")
    check.tensor("weight", weight, [x.dtype], "C")
    check.tensor("bias", bias, [x.dtype], "C")
    check.tensor("y", y, [x.dtype], "T C")
    check.require(eps >= 0, "eps is negative or NaN, expected a number >= 0")
    T, C = x.shape
    if x.numel() == 0:
        return
    c = config(C)
    with torch.cuda.device_of(x):
        _layer_norm[(triton.cdiv(T, c.ROWS),)](
            *(x, weight, bias, y, T, C, x.stride(0), y.stride(0), eps),
            ROWS=c.ROWS,
            BLOCK=c.BLOCK,
            STREAM=c.STREAM,
            num_warps=c.num_warps,
            enable_fp_fusion=True,
        )
