"""rms_norm in Triton (contract: kernels/rms_norm.h).

A program owns ROWS rows of BLOCK >= C columns and holds them in registers between the two passes;
wider rows are streamed twice. T and H are never specialised on, so that a row's bits do not depend
on its batch.
"""

# ruff: noqa: ANN001, ANN202 (arguments of jitted functions are typed by the call)

from __future__ import annotations

import torch
from torch import Tensor

import triton
import triton.language as tl
from internvl_rt._triton.check import Checker
from internvl_rt._triton.rows import config


@triton.jit
def _scale(h, weight, inverse, WEIGHT_IN_FP32: tl.constexpr, dtype: tl.constexpr):
    y = h * inverse[:, None]
    if not WEIGHT_IN_FP32:
        y = y.to(dtype).to(tl.float32)
    # In float32 either way: a product of two bfloat16 numbers is exact there.
    return (y * weight.to(tl.float32)[None, :]).to(dtype)


@triton.jit(do_not_specialize=["T", "H"])
def _rms_norm(
    x,
    weight,
    residual,
    y,
    residual_out,
    T,
    H,
    C,
    x_t,
    x_h,
    residual_t,
    residual_h,
    y_t,
    y_h,
    residual_out_t,
    residual_out_h,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    WEIGHT_IN_FP32: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STREAM: tl.constexpr,
) -> None:
    dtype: tl.constexpr = x.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    t = row // H
    h = row % H
    live = (row < T.to(tl.int64) * H)[:, None]
    column = tl.arange(0, BLOCK)  # [BLOCK]
    x_row = x + (t * x_t + h * x_h)[:, None]
    y_row = y + (t * y_t + h * y_h)[:, None]
    residual_row = residual + (t * residual_t + h * residual_h)[:, None]
    residual_out_row = residual_out + (t * residual_out_t + h * residual_out_h)[:, None]

    if not STREAM:
        inside = live & (column < C)[None, :]  # [ROWS, BLOCK]
        v = tl.load(x_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            r = tl.load(residual_row + column[None, :], mask=inside, other=0.0)
            v = (v + r.to(tl.float32)).to(dtype)
            tl.store(residual_out_row + column[None, :], v, mask=inside)
            v = v.to(tl.float32)
        w = tl.load(weight + column, mask=column < C, other=0.0)
        inverse = tl.rsqrt(tl.sum(v * v, axis=1) / C + eps)
        result = _scale(v, w, inverse, WEIGHT_IN_FP32, dtype)
        tl.store(y_row + column[None, :], result, mask=inside)
    else:
        squares = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
        for start in range(0, C, BLOCK):
            at = (start + column)[None, :]
            inside = live & (at < C)
            v = tl.load(x_row + at, mask=inside, other=0.0).to(tl.float32)
            if HAS_RESIDUAL:
                r = tl.load(residual_row + at, mask=inside, other=0.0)
                v = (v + r.to(tl.float32)).to(dtype)
                tl.store(residual_out_row + at, v, mask=inside)
                v = v.to(tl.float32)
            squares += v * v
        inverse = tl.rsqrt(tl.sum(squares, axis=1) / C + eps)
        # Orders the stores of h before the loads, whichever thread the compiler gives them to.
        tl.debug_barrier()
        for start in range(0, C, BLOCK):
            at = (start + column)[None, :]
            inside = live & (at < C)
            if HAS_RESIDUAL:
                v = tl.load(residual_out_row + at, mask=inside, other=0.0).to(tl.float32)
            else:
                v = tl.load(x_row + at, mask=inside, other=0.0).to(tl.float32)
            w = tl.load(weight + start + column, mask=start + column < C, other=0.0)
            result = _scale(v, w, inverse, WEIGHT_IN_FP32, dtype)
            tl.store(y_row + at, result, mask=inside)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    y: Tensor,
    residual_out: Tensor | None,
    eps: float,
    weight_in_fp32: bool,
) -> None:
    """x, residual, y, residual_out: [T, H, C], any strides but 1 for C; weight: [C].

    y may be x and residual_out may be residual. Raises ValueError for shapes, dtypes and devices
    that do not fit.
    """
    check = Checker("rms_norm")
    check.tensor("x", x, [torch.float32, torch.bfloat16], "T H C")
    check.tensor("weight", weight, [x.dtype], "C")
    check.tensor("y", y, [x.dtype], "T H C")
    check.require(eps >= 0, "eps is negative or NaN, expected a number >= 0")
    check.require(
        (residual is None) == (residual_out is None),
        "residual and residual_out are given together or not at all",
    )
    if residual is not None and residual_out is not None:
        check.tensor("residual", residual, [x.dtype], "T H C")
        check.tensor("residual_out", residual_out, [x.dtype], "T H C")
    T, H, C = x.shape
    if x.numel() == 0:
        return
    c = config(C)
    # Without a residual the kernel never touches these two; they need a type all the same.
    r = x if residual is None else residual
    r_out = y if residual_out is None else residual_out
    with torch.cuda.device_of(x):
        _rms_norm[(triton.cdiv(T * H, c.ROWS),)](
            *(x, weight, r, y, r_out),
            *(T, H, C),
            *(x.stride(0), x.stride(1), r.stride(0), r.stride(1)),
            *(y.stride(0), y.stride(1), r_out.stride(0), r_out.stride(1)),
            eps,
            HAS_RESIDUAL=residual is not None,
            WEIGHT_IN_FP32=weight_in_fp32,
            ROWS=c.ROWS,
            BLOCK=c.BLOCK,
            STREAM=c.STREAM,
            num_warps=c.num_warps,
            enable_fp_fusion=True,
        )
