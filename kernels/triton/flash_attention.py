"""flash_attention in Triton (contract: kernels/flash_attention.h).

A program owns ROWS queries of one head and walks over the keys they see, KEYS at a time from the
first on, so that a row's bits depend on its query and keys alone. Programs find their sequence
themselves: the grid depends on the number of tokens and sequences, never on their lengths.
"""

# ruff: noqa: ANN001 (arguments of jitted functions are typed by the call)

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import triton
import triton.language as tl
from internvl_rt._triton.attention import (
    NO_WINDOW,
    check_options,
    find_block,
    finish,
    merge,
    visible,
)
from internvl_rt._triton.check import Checker


@triton.jit(do_not_specialize=["B", "window"])
def _flash_attention(
    q,
    k,
    v,
    cu_q,
    cu_kv,
    sinks,
    prefix,
    out,
    B,
    D,
    group,
    window,
    scale,
    q_t,
    q_h,
    k_t,
    k_h,
    v_t,
    v_h,
    out_t,
    out_h,
    CAUSAL: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_PREFIX: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
) -> None:
    dtype: tl.constexpr = q.dtype.element_ty
    head = tl.program_id(1)
    sequence, start = find_block(cu_q, B, tl.program_id(0), 1, ROWS)
    if sequence >= 0:
        q_begin, kv_begin = tl.load(cu_q + sequence), tl.load(cu_kv + sequence)
        q_len = tl.load(cu_q + sequence + 1) - q_begin
        kv_len = tl.load(cu_kv + sequence + 1) - kv_begin
        row = start + tl.arange(0, ROWS)
        position = row + kv_len - q_len
        d = tl.arange(0, DIM)
        live = (row < q_len)[:, None] & (d < D)[None, :]  # [ROWS, DIM]
        token = (q_begin + row).to(tl.int64)[:, None]
        queries = tl.load(q + token * q_t + head * q_h + d[None, :], mask=live, other=0.0)

        kept = 0
        if HAS_PREFIX:
            kept = tl.load(prefix + sequence)
        begin, end = 0, kv_len
        if CAUSAL:
            last = tl.minimum(start + ROWS, q_len) + kv_len - q_len
            end = tl.minimum(kv_len, tl.maximum(last, kept))
            if not HAS_PREFIX:
                begin = tl.maximum(start + kv_len - q_len - window + 1, 0) // KEYS * KEYS

        m = tl.full([ROWS], float("-inf"), tl.float32)
        l = tl.zeros([ROWS], tl.float32)  # noqa: E741
        acc = tl.zeros([ROWS, DIM], tl.float32)
        k_head = k + kv_begin.to(tl.int64) * k_t + (head // group) * k_h
        v_head = v + kv_begin.to(tl.int64) * v_t + (head // group) * v_h
        for first in range(begin, end, KEYS):
            key = first + tl.arange(0, KEYS)
            there = (key < kv_len)[:, None] & (d < D)[None, :]  # [KEYS, DIM]
            place = key.to(tl.int64)[:, None]
            keys = tl.load(k_head + place * k_t + d[None, :], mask=there, other=0.0)
            scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
            seen = visible(position, key, kv_len, window, kept, CAUSAL)
            values = tl.load(v_head + place * v_t + d[None, :], mask=there, other=0.0)
            m, l, acc = merge(m, l, acc, tl.where(seen, scores, float("-inf")), values)  # noqa: E741

        sink = tl.full([ROWS], float("-inf"), tl.float32)
        if HAS_SINKS:
            sink = tl.zeros([ROWS], tl.float32) + tl.load(sinks + head).to(tl.float32)
        target = out + token * out_t + head * out_h + d[None, :]
        tl.store(target, finish(m, l, acc, sink).to(dtype), mask=live)


@dataclass(frozen=True)
class Config:
    ROWS: int
    KEYS: int
    DIM: int
    num_warps: int
    num_stages: int


def config(D: int, dtype: torch.dtype) -> Config:
    dim = triton.next_power_of_2(max(D, 16))
    if dtype == torch.float32:  # no tensor cores: products in exact float32
        return Config(32, 32, dim, 4, 1)
    # Eight warps: on sm_80 four would spill.
    return Config(128, 64, dim, 8, 2) if dim <= 64 else Config(64, 32, dim, 8, 2)


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_kv: Tensor,
    scale: float,
    causal: bool,
    window: int | None,
    sinks: Tensor | None,
    prefix: Tensor | None,
    out: Tensor,
) -> None:
    """Arguments as in internvl_rt.ops.flash_attention. The offsets are not looked at by the host.

    Raises ValueError for shapes, dtypes, devices and options that do not fit.
    """
    check = Checker("flash_attention")
    check.tensor("q", q, [torch.float32, torch.bfloat16], "T H D")
    check.tensor("k", k, [q.dtype], "Tkv K D")
    check.tensor("v", v, [q.dtype], "Tkv K D")
    check_options(check, q, cu_q, scale, causal, window, sinks, prefix, out)
    check.tensor("cu_kv", cu_kv, [torch.int32], "B+1")
    if q.numel() == 0:
        return
    T, H, D = q.shape
    c = config(D, q.dtype)
    with torch.cuda.device_of(q):
        # Each sequence may end within a block.
        _flash_attention[(triton.cdiv(T, c.ROWS) + check["B"], H)](
            *(q, k, v, cu_q, cu_kv),
            *(q if sinks is None else sinks, cu_q if prefix is None else prefix, out),
            *(check["B"], D, H // k.shape[1], NO_WINDOW if window is None else window, scale),
            *(*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *out.stride()[:2]),
            CAUSAL=causal,
            HAS_SINKS=sinks is not None,
            HAS_PREFIX=prefix is not None,
            ROWS=c.ROWS,
            KEYS=c.KEYS,
            DIM=c.DIM,
            num_warps=c.num_warps,
            num_stages=c.num_stages,
            enable_fp_fusion=True,
        )
