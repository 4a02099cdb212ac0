"""rope in Triton (contract: kernels/rope.h): a program per token and head, those of q first, then k
and v. As on a GPU in C++, nobody has checked sequences and slots: see the contract.
"""

# ruff: noqa: ANN001, ANN202 (arguments of jitted functions are typed by the call)

from __future__ import annotations

import torch
from torch import Tensor

import triton
import triton.language as tl
from internvl_rt._triton.check import Checker

MAX_DIM = 1024


@triton.jit
def _round(x, BLOCK: tl.constexpr):
    # 1.5 * 2^52: adding it to a float64 rounds to an integer.
    magic = tl.full([BLOCK], 6755399441055744.0, tl.float64)
    return (x + magic) - magic


@triton.jit
def _sine_cosine(angle, BLOCK: tl.constexpr):
    """Within 2 ulp of 1 for |angle| up to 1e9: the reduction by pi / 2 is done in float64."""
    x = angle.to(tl.float64)
    turns = _round(x * tl.full([BLOCK], 0.636619772367581343, tl.float64), BLOCK)
    r = (x - turns * tl.full([BLOCK], 1.57079632679489662, tl.float64)).to(tl.float32)
    four_turns = _round(turns * tl.full([BLOCK], 0.25, tl.float64), BLOCK)
    quadrant = (turns - four_turns * tl.full([BLOCK], 4.0, tl.float64)).to(tl.float32)  # -2 .. 2
    r2 = r * r
    s = -1.9515295891e-4 * r2 + 8.3321608736e-3
    s = s * r2 - 1.6666654611e-1
    s = s * r2 * r + r
    c = 2.443315711809948e-5 * r2 - 1.388731625493765e-3
    c = c * r2 + 4.166664568298827e-2
    c = c * (r2 * r2) + (1.0 - 0.5 * r2)
    # Quadrants: 0 (s, c), 1 (c, -s), +-2 (-s, -c), -1 (-c, s).
    odd = (quadrant == 1.0) | (quadrant == -1.0)
    half_turn = (quadrant == 2.0) | (quadrant == -2.0)
    sine, cosine = tl.where(odd, c, s), tl.where(odd, s, c)
    sine = tl.where(half_turn | (quadrant == -1.0), -sine, sine)
    cosine = tl.where(half_turn | (quadrant == 1.0), -cosine, cosine)
    return sine, cosine


@triton.jit
def _copy(source, target, begin, end, BLOCK: tl.constexpr) -> None:
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < end
        tl.store(target + at, tl.load(source + at, mask=inside, other=0.0), mask=inside)


@triton.jit
def _rotate(
    source, target, kept, position, inv_freq, scale, known, half, BLOCK: tl.constexpr
) -> None:
    """kept: D, or 0 to write nothing. target may be source: one thread reads and writes a pair."""
    dtype: tl.constexpr = source.dtype.element_ty
    at = tl.arange(0, BLOCK)
    inside = at < tl.minimum(half, kept)
    turn = tl.load(inv_freq + at, mask=at < tl.where(known, half, 0), other=float("nan"))
    sine, cosine = _sine_cosine(position * turn, BLOCK)
    sine, cosine = sine * scale, cosine * scale
    a = tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(source + half + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(target + at, (a * cosine - b * sine).to(dtype), mask=inside)
    tl.store(target + half + at, (b * cosine + a * sine).to(dtype), mask=inside)
    _copy(source, target, 2 * half, kept, BLOCK)


@triton.jit(do_not_specialize=["B", "places"])
def _rope(
    q,
    k,
    v,
    positions,
    inv_freq,
    scale,
    sequence,
    slots,
    k_cache,
    v_cache,
    out,
    H,
    K,
    P,
    D,
    half,
    B,
    places,
    q_t,
    q_h,
    k_t,
    k_h,
    v_t,
    v_h,
    inv_freq_b,
    out_t,
    out_h,
    k_page,
    k_cache_h,
    k_p,
    v_page,
    v_cache_h,
    v_p,
    BLOCK: tl.constexpr,
) -> None:
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1)
    slot = tl.load(slots + t)
    kept = tl.where((slot >= 0) & (slot < places), D, 0)  # elements of k and v
    page, offset = slot // P, slot % P
    row = tl.load(sequence + t)
    known = (row >= 0) & (row < B)
    position = tl.load(positions + t)
    factor = tl.load(scale + row, mask=known, other=0.0)
    turns = inv_freq + row.to(tl.int64) * inv_freq_b
    if h < H:
        source, target = q + t * q_t + h * q_h, out + t * out_t + h * out_h
        _rotate(source, target, D, position, turns, factor, known, half, BLOCK)
    elif h < H + K:
        source = k + t * k_t + (h - H) * k_h
        target = k_cache + page * k_page + (h - H) * k_cache_h + offset * k_p
        _rotate(source, target, kept, position, turns, factor, known, half, BLOCK)
    else:
        head = h - H - K
        target = v_cache + page * v_page + head * v_cache_h + offset * v_p
        _copy(v + t * v_t + head * v_h, target, 0, kept, BLOCK)


def rope(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    scale: Tensor,
    sequence: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    out: Tensor,
) -> None:
    """Shapes as in internvl_rt.ops.rope; out may be q.

    Raises ValueError for shapes, dtypes and devices that do not fit.
    """
    check = Checker("rope")
    check.tensor("q", q, [torch.float32, torch.bfloat16], "T H D")
    check.tensor("k", k, [q.dtype], "T K D")
    check.tensor("v", v, [q.dtype], "T K D")
    check.tensor("positions", positions, [torch.float32], "T")
    check.tensor("inv_freq", inv_freq, [torch.float32], "B R/2")
    check.tensor("scale", scale, [torch.float32], "B")
    check.tensor("sequence", sequence, [torch.int32], "T")
    check.tensor("k_cache", k_cache, [q.dtype], "pages K P D")
    check.tensor("v_cache", v_cache, [q.dtype], "pages K P D")
    check.tensor("slots", slots, [torch.int64], "T")
    check.tensor("out", out, [q.dtype], "T H D")
    T, H, D = q.shape
    K, P, half = check["K"], check["P"], check["R/2"]
    check.require(D <= MAX_DIM, f"head dim D is {D}, at most {MAX_DIM} allowed")
    check.require(
        2 * half <= D, f"inv_freq has R/2 = {half} columns, at most D/2 = {D // 2} allowed"
    )
    if T * D == 0:
        return
    with torch.cuda.device_of(q):
        _rope[(T, H + 2 * K)](
            *(q, k, v, positions, inv_freq, scale, sequence, slots, k_cache, v_cache, out),
            *(H, K, P, D, half, scale.shape[0], k_cache.shape[0] * P),
            *(*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], inv_freq.stride(0)),
            *(*out.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3]),
            BLOCK=triton.next_power_of_2(max(half, 16)),
            num_warps=1,
            enable_fp_fusion=True,
        )
