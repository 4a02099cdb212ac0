"""Causal attention over a paged KV cache: decode steps and prefill chunks alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from internvl_rt import _C
from internvl_rt.ops.flash_attention import attend, offsets
from internvl_rt.ops.registry import Case, Cost, Inputs, Op, give, register


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    cu_q: Tensor,
    kv_lens: Tensor,
    *,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
    prefix: Tensor | None = None,
    phase: str | None = None,
    out: Any = None,
    backend: str | None = None,
) -> Tensor:
    """softmax(scale * q k^T) v with keys and values in pages; query i of a sequence with q_len
    queries and kv_len keys sees keys up to kv_len - q_len + i.

    The keys of the queries themselves are already in their pages (see rope). The maths, and every
    bit of the result, is that of flash_attention with causal=True over the same keys, however the
    queries of a sequence are spread over calls; on CUDA that holds within a phase.

    q: [T, H, D], float32 or bfloat16, contiguous in D, otherwise strided as you like.
    k_cache, v_cache: [pages, K, P, D] in the dtype of q; P is a power of two.
    page_table: [B, max_pages] int32: position j of sequence b lies in page page_table[b, j // P]
        at offset j % P. Entries behind kv_lens[b] are not looked at, nor, without a prefix, those
        of pages that lie before the window of all queries.
    cu_q: [B+1] int32 offsets of the sequences' queries (1 each in decode steps).
    kv_lens: [B] int32, keys of each sequence, those of its queries included.
    scale, window, sinks, prefix: as in flash_attention; prefix[b] <= kv_lens[b].
    phase: "decode" splits the keys over blocks of the GPU, "prefill" does not; None: decode where
        T = B. On the CPU both are the same.
    Returns [T, H, D]. out may be q.
    Raises ValueError for shapes, dtypes, offsets, lengths or pages that do not fit. On CUDA offsets
    and lengths are trusted, and a sequence whose table names no page gets NaN.
    """
    run = _op.face(backend)
    if phase not in (None, "decode", "prefill"):
        raise ValueError(f"paged_attention: phase is {phase!r}, allowed: decode, prefill")
    if run is None:
        result = reference(
            q,
            k_cache,
            v_cache,
            page_table,
            cu_q,
            kv_lens,
            scale=scale,
            window=window,
            sinks=sinks,
            prefix=prefix,
        )
        return give("paged_attention", result, out)
    if out is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    workspace = None
    if q.is_cuda and (phase or ("decode" if len(q) == len(kv_lens) else "prefill")) == "decode":
        size = _C.paged_attention_workspace(q, k_cache, page_table)
        workspace = torch.empty(size, dtype=torch.float32, device=q.device) if size else None
    run(
        *(q, k_cache, v_cache, page_table, cu_q, kv_lens, scale, window, sinks, prefix),
        *(workspace, out),
    )
    return out


def reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    cu_q: Tensor,
    kv_lens: Tensor,
    *,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
    prefix: Tensor | None = None,
) -> Tensor:
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    P = k_cache.shape[2]
    for b, n in enumerate(kv_lens.tolist()):
        rows = slice(cu_q[b], cu_q[b + 1])
        pages = page_table[b, : -(-n // P)].long()
        k, v = (c[pages].transpose(1, 2).flatten(0, 1)[:n] for c in (k_cache, v_cache))  # [n, K, D]
        out[rows] = attend(
            q[rows],
            k,
            v,
            scale=scale,
            causal=True,
            window=window,
            sinks=sinks,
            prefix=0 if prefix is None else int(prefix[b]),
        )
    return out


def cost(q: Tensor, k_cache: Tensor, cu_q: Tensor, kv_lens: Tensor, **_: Any) -> Cost:
    pairs = 0
    for n, m in zip(cu_q.diff().tolist(), kv_lens.tolist(), strict=True):
        pairs += n * m - n * (n - 1) // 2
    cached = int(kv_lens.sum()) * k_cache.shape[1] * k_cache.shape[3]
    moved = (2 * q.numel() + 2 * cached) * q.element_size()
    return Cost(moved, 4 * pairs * q.shape[1] * q.shape[2])


def _case(
    name: str,
    q_lens: Sequence[int],
    kv_lens: Sequence[int],
    heads: tuple[int, int],
    D: int,
    *,
    P: int = 64,
    window: int | None = None,
    sinks: bool = False,
    prefix: Sequence[int] | None = None,
    **flags: bool,
) -> Case:
    H, K = heads

    def build(make: Inputs) -> dict[str, Any]:
        most = max((-(-n // P) for n in kv_lens), default=0)
        pages = make.permutation(len(kv_lens) * most + 1)[: len(kv_lens) * most]
        arguments: dict[str, Any] = {
            "q": make.normal(sum(q_lens), (H + 2) * D).unflatten(1, (H + 2, D))[:, :H],
            "k_cache": make.normal(len(pages) + 1, K, P, D),
            "v_cache": make.normal(len(pages) + 1, K, P, D),
            "page_table": pages.int().view(len(kv_lens), most),
            "cu_q": offsets(q_lens),
            "kv_lens": torch.tensor(kv_lens, dtype=torch.int32),
            "scale": D**-0.5,
            "window": window,
        }
        if sinks:
            arguments["sinks"] = make.normal(H, std=2.0)
        if prefix is not None:
            arguments["prefix"] = torch.tensor(prefix, dtype=torch.int32)
        return arguments

    return Case(name, build, **flags)


def _shaped(make: Inputs, shape: tuple[int, ...]) -> dict[str, Any]:
    B, L, H, K, D = shape
    return _case("", [1] * B, [L] * B, (H, K), D).build(make)


_op = register(
    Op(
        name="paged_attention",
        function=paged_attention,
        reference=reference,
        faces={"native": _C.paged_attention, "cuda": _C.paged_attention},
        cost=cost,
        dims="T queries, H query heads, K kv heads, D head dim, B sequences, P page size, "
        "L keys of each (bench)",
        shaped=_shaped,
        shape_help="BxLxHxKxD",
        cases=(
            _case("empty", [], [], (2, 1), 64),
            _case("empty_sequences", [0, 2, 0], [5, 2, 0], (4, 2), 16, P=4),
            _case("one", [1], [1], (1, 1), 4, P=1),
            _case("odd_4", [1, 3], [7, 3], (3, 1), 4, P=2),
            _case("odd_20", [5, 1, 1], [25, 70, 1], (6, 2), 20, P=8),
            _case("odd_80", [1, 1], [300, 17], (4, 2), 80, P=16),
            _case("decode_128", [1, 1, 1], [257, 256, 255], (6, 2), 128),
            _case("chunk_96", [30], [290], (2, 2), 96),
            _case("wide_256", [2], [100], (2, 1), 256, P=128),
            _case("window", [1, 70], [300, 270], (8, 2), 64, window=128),
            _case("sinks", [1, 4], [500, 40], (8, 1), 64, window=128, sinks=True),
            _case("prefix", [1, 40], [90, 100], (2, 1), 64, prefix=[33, 80]),
            _case("qwen2_0.5b_decode_320", [1], [320], (14, 2), 64, bench=True),
            _case("qwen2_0.5b_decode_2048", [1], [2048], (14, 2), 64, bench=True),
            _case("qwen2_0.5b_decode_320x8", [1] * 8, [320] * 8, (14, 2), 64, bench=True),
            _case(
                "qwen2_0.5b_decode_2048x8", [1] * 8, [2048] * 8, (14, 2), 64, bench=True, slow=True
            ),
            _case("gpt_oss_20b_decode", [1], [2048], (64, 8), 64, sinks=True, bench=True),
            _case(
                "gpt_oss_20b_decode_window",
                [1],
                [2048],
                (64, 8),
                64,
                window=128,
                sinks=True,
                bench=True,
            ),
            _case("qwen2_0.5b_chunk", [256], [1088], (14, 2), 64, bench=True, slow=True),
        ),
    )
)
