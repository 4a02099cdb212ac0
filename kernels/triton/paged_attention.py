"""paged_attention in Triton (contract: kernels/paged_attention.h): split over the keys.

A program owns ROWS rows (row = query * group + head within the group, so that the heads of a group
share the keys) of one kv head and one chunk of 256 absolute positions; a second kernel merges the
chunks in ascending order. The grid depends on the number of tokens and sequences and on the width
of the page table, never on lengths: a program whose chunk is empty says so and ends. A page outside
the cache is not read; its keys are not seen.
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

CHUNK = 256


@triton.jit(do_not_specialize=["B", "pages", "window"])
def _paged_attention(
    q,
    k_cache,
    v_cache,
    page_table,
    cu_q,
    kv_lens,
    prefix,
    partial,
    statistics,
    B,
    H,
    D,
    group,
    pages,
    max_pages,
    window,
    scale,
    q_t,
    q_h,
    page_table_b,
    k_page,
    k_h,
    k_p,
    v_page,
    v_h,
    v_p,
    P: tl.constexpr,
    HAS_PREFIX: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
) -> None:
    kv_head, chunk, chunks = tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    sequence, start = find_block(cu_q, B, tl.program_id(0), group, ROWS)
    if sequence >= 0:
        q_begin = tl.load(cu_q + sequence)
        q_len = tl.load(cu_q + sequence + 1) - q_begin
        kv_len = tl.load(kv_lens + sequence)
        row = start + tl.arange(0, ROWS)
        query, head = row // group, kv_head * group + row % group
        position = query + kv_len - q_len
        d = tl.arange(0, DIM)
        live = (query < q_len)[:, None] & (d < D)[None, :]  # [ROWS, DIM]
        token = (q_begin + query).to(tl.int64)
        source = q + (token * q_t + head * q_h)[:, None] + d[None, :]
        queries = tl.load(source, mask=live, other=0.0)
        kept = 0
        if HAS_PREFIX:
            kept = tl.load(prefix + sequence)

        m = tl.full([ROWS], float("-inf"), tl.float32)
        l = tl.zeros([ROWS], tl.float32)  # noqa: E741
        acc = tl.zeros([ROWS, DIM], tl.float32)
        last = tl.minimum((start + ROWS - 1) // group + 1, q_len) + kv_len - q_len
        end = tl.minimum(tl.minimum(kv_len, tl.maximum(last, kept)), (chunk + 1) * CHUNK)
        begin = chunk * CHUNK
        if not HAS_PREFIX:
            oldest = tl.maximum(start // group + kv_len - q_len - window + 1, 0)
            begin = tl.maximum(begin, oldest // KEYS * KEYS)
        for first in range(begin, end, KEYS):
            key = first + tl.arange(0, KEYS)
            entry = page_table + sequence.to(tl.int64) * page_table_b + key // P
            held = (key < kv_len) & (key // P < max_pages)
            page = tl.load(entry, mask=held, other=-1).to(tl.int64)
            held = held & (page >= 0) & (page < pages)
            there = held[:, None] & (d < D)[None, :]  # [KEYS, DIM]
            at = page * k_page + kv_head * k_h + (key % P) * k_p
            keys = tl.load(k_cache + at[:, None] + d[None, :], mask=there, other=0.0)
            scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
            seen = visible(position, key, kv_len, window, kept, True) & held[None, :]
            at = page * v_page + kv_head * v_h + (key % P) * v_p
            values = tl.load(v_cache + at[:, None] + d[None, :], mask=there, other=0.0)
            m, l, acc = merge(m, l, acc, tl.where(seen, scores, float("-inf")), values)  # noqa: E741

        # partial [T, H, chunks, DIM], statistics [T, H, chunks, 2]
        place = (token * H + head) * chunks + chunk
        tl.store(statistics + place * 2, m, mask=query < q_len)
        tl.store(statistics + place * 2 + 1, l, mask=query < q_len)
        # An empty chunk weighs nothing and is not read.
        tl.store(partial + place[:, None] * DIM + d[None, :], acc, mask=live & (l > 0.0)[:, None])


@triton.jit
def _merge_chunks(
    partial,
    statistics,
    sinks,
    out,
    H,
    D,
    chunks,
    out_t,
    out_h,
    HAS_SINKS: tl.constexpr,
    DIM: tl.constexpr,
) -> None:
    dtype: tl.constexpr = out.dtype.element_ty
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, DIM)
    m = tl.full([1], float("-inf"), tl.float32)
    l = tl.zeros([1], tl.float32)  # noqa: E741
    acc = tl.zeros([1, DIM], tl.float32)
    one = tl.arange(0, 1)
    for chunk in range(0, chunks):
        place = (token * H + head) * chunks + chunk
        m_chunk = tl.load(statistics + place * 2 + one)
        l_chunk = tl.load(statistics + place * 2 + 1 + one)
        full = (l_chunk > 0.0)[:, None] & (d < D)[None, :]
        acc_chunk = tl.load(partial + place * DIM + d[None, :], mask=full, other=0.0)
        highest = tl.maximum(m, m_chunk)
        safe = tl.where(highest == float("-inf"), 0.0, highest)
        shrink, weight = tl.exp(m - safe), tl.exp(m_chunk - safe)
        l = l * shrink + l_chunk * weight  # noqa: E741
        acc = acc * shrink[:, None] + acc_chunk * weight[:, None]
        m = highest
    sink = tl.full([1], float("-inf"), tl.float32)
    if HAS_SINKS:
        sink = tl.load(sinks + head + one).to(tl.float32)
    target = out + token * out_t + head * out_h + d[None, :]
    tl.store(target, finish(m, l, acc, sink).to(dtype), mask=(d < D)[None, :])


@dataclass(frozen=True)
class Config:
    ROWS: int
    KEYS: int
    DIM: int
    num_warps: int


def config(D: int, dtype: torch.dtype) -> Config:
    dim = triton.next_power_of_2(max(D, 16))
    return Config(16, 32 if dtype == torch.float32 or dim > 128 else 64, dim, 4)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    cu_q: Tensor,
    kv_lens: Tensor,
    scale: float,
    window: int | None,
    sinks: Tensor | None,
    prefix: Tensor | None,
    workspace: Tensor | None,
    out: Tensor,
) -> None:
    """Arguments as in internvl_rt.ops.paged_attention; workspace is for the native kernel alone.

    Offsets, lengths and pages are not looked at by the host. Allocates T * H * chunks * D floats
    for the results of the chunks.

    Raises ValueError for shapes, dtypes, devices and options that do not fit.
    """
    check = Checker("paged_attention")
    check.tensor("q", q, [torch.float32, torch.bfloat16], "T H D")
    check.tensor("k_cache", k_cache, [q.dtype], "pages K P D")
    check.tensor("v_cache", v_cache, [q.dtype], "pages K P D")
    check_options(check, q, cu_q, scale, True, window, sinks, prefix, out)
    check.tensor("page_table", page_table, [torch.int32], "B max_pages")
    check.tensor("kv_lens", kv_lens, [torch.int32], "B")
    P = check["P"]
    check.require(P >= 1 and P & (P - 1) == 0, f"page size P is {P}, expected a power of two")
    if q.numel() == 0:
        return
    T, H, D = q.shape
    K, c = check["K"], config(D, q.dtype)
    chunks = max(triton.cdiv(check["max_pages"] * P, CHUNK), 1)
    partial = torch.empty((T, H, chunks, c.DIM), dtype=torch.float32, device=q.device)
    statistics = torch.empty((T, H, chunks, 2), dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        blocks = triton.cdiv(T * (H // K), c.ROWS) + check["B"]
        _paged_attention[(blocks, K, chunks)](
            *(q, k_cache, v_cache, page_table, cu_q, kv_lens),
            *(cu_q if prefix is None else prefix, partial, statistics),
            *(check["B"], H, D, H // K, k_cache.shape[0], check["max_pages"]),
            *(NO_WINDOW if window is None else window, scale),
            *(*q.stride()[:2], page_table.stride(0)),
            *(*k_cache.stride()[:3], *v_cache.stride()[:3]),
            P=P,
            HAS_PREFIX=prefix is not None,
            CHUNK=CHUNK,
            ROWS=c.ROWS,
            KEYS=c.KEYS,
            DIM=c.DIM,
            num_warps=c.num_warps,
            enable_fp_fusion=True,
        )
        _merge_chunks[(T, H)](
            *(partial, statistics, q if sinks is None else sinks, out, H, D, chunks),
            *out.stride()[:2],
            HAS_SINKS=sinks is not None,
            DIM=c.DIM,
            num_warps=1,
            enable_fp_fusion=True,
        )
