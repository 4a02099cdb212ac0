"""Attention over sequences that lie one behind the other, without score matrices in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from internvl_rt import _C
from internvl_rt.ops.registry import Case, Cost, Inputs, Op, give, register, triton_kernel


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_kv: Tensor,
    *,
    scale: float,
    causal: bool,
    window: int | None = None,
    sinks: Tensor | None = None,
    prefix: Tensor | None = None,
    out: Any = None,
    backend: str | None = None,
) -> Tensor:
    """softmax(scale * q k^T) v per sequence and head; statistics and sums in float32.

    Keys are taken in chunks of 256 positions that are merged in ascending order (online softmax,
    Milakov and Gimelshein, 2018; Dao et al., 2022). The bits of an output row depend on its query
    and the keys it sees alone, and equal those of paged_attention (but for its kernel on Hopper).

    q: [T, H, D]; k, v: [Tkv, K, D], float32 or bfloat16, contiguous in D; the other dimensions may
        be strided (slices of a packed qkv row). H is a multiple of K: query head h uses kv head
        h // (H / K). D: multiples of 4 from 4 to 256.
    cu_q, cu_kv: [B+1] int32 offsets: sequence b has queries cu_q[b] to cu_q[b+1] and keys cu_kv[b]
        to cu_kv[b+1]; the two lengths are independent.
    scale: factor of the scores, > 0.
    causal: the last query is aligned with the last key: query i sees keys up to
        kv_len - q_len + i. Otherwise every query sees every key.
    window: with causal, a query sees itself and the window - 1 keys before it.
    sinks: [H] float32 or the dtype of q: one more logit per head that takes weight but has no value
        (GPT-OSS).
    prefix: [B] int32, with causal: the first prefix[b] keys are visible to every query.
    Returns [T, H, D]; rows that see no key are zero. out may be q.
    Raises ValueError for shapes, dtypes, offsets or combinations that do not fit.
    """
    run = _op.face(backend)
    if run is None:
        result = reference(
            q,
            k,
            v,
            cu_q,
            cu_kv,
            scale=scale,
            causal=causal,
            window=window,
            sinks=sinks,
            prefix=prefix,
        )
        return give("flash_attention", result, out)
    if out is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    run(q, k, v, cu_q, cu_kv, scale, causal, window, sinks, prefix, out)
    return out


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_kv: Tensor,
    *,
    scale: float,
    causal: bool,
    window: int | None = None,
    sinks: Tensor | None = None,
    prefix: Tensor | None = None,
) -> Tensor:
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    for b in range(len(cu_q) - 1):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_kv[b], cu_kv[b + 1])
        out[rows] = attend(
            q[rows],
            k[keys],
            v[keys],
            scale=scale,
            causal=causal,
            window=window,
            sinks=sinks,
            prefix=0 if prefix is None else int(prefix[b]),
        )
    return out


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: bool,
    window: int | None,
    sinks: Tensor | None,
    prefix: int,
) -> Tensor:
    """Attention of one sequence in plain torch: q [T, H, D], k and v [S, K, D] -> [T, H, D]."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = torch.einsum("thd,shd->hts", q, k) * scale
    scores = scores.to(torch.promote_types(q.dtype, torch.float32))
    if causal:
        key = torch.arange(k.shape[0], device=k.device)
        position = torch.arange(q.shape[0], device=q.device)[:, None] + k.shape[0] - q.shape[0]
        visible = key <= position
        if window is not None:
            visible &= key > position - window
        visible |= key < prefix
        scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        extra = sinks.to(scores.dtype)[:, None, None].expand(-1, q.shape[0], 1)
        scores = torch.cat((scores, extra), dim=-1)
    weights = scores.softmax(-1) if scores.shape[-1] else scores
    # A row without keys is 0 / 0 above and nothing here.
    weights = weights.masked_fill(scores == float("-inf"), 0.0)[..., : k.shape[0]].to(q.dtype)
    return torch.einsum("hts,shd->thd", weights, v)


def cost(q: Tensor, k: Tensor, cu_q: Tensor, cu_kv: Tensor, *, causal: bool, **_: Any) -> Cost:
    pairs = 0
    for n, m in zip(cu_q.diff().tolist(), cu_kv.diff().tolist(), strict=True):
        pairs += n * m - (n * (n - 1) // 2 if causal else 0)
    moved = (2 * q.numel() + 2 * k.numel()) * q.element_size()
    return Cost(moved, 4 * pairs * q.shape[1] * q.shape[2])


def offsets(lengths: Sequence[int]) -> Tensor:
    """[B+1] int32 offsets of sequences with these lengths."""
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def _case(
    name: str,
    q_lens: Sequence[int],
    heads: tuple[int, int],
    D: int,
    *,
    kv_lens: Sequence[int] | None = None,
    causal: bool = False,
    window: int | None = None,
    sinks: torch.dtype | bool = False,
    prefix: Sequence[int] | None = None,
    scale: float | None = None,
    **flags: Any,
) -> Case:
    H, K = heads

    def build(make: Inputs) -> dict[str, Any]:
        if kv_lens is None:  # slices of one packed row, as the projection leaves them
            qkv = make.normal(sum(q_lens), (H + 2 * K) * D).unflatten(1, (H + 2 * K, D))
            q, k, v = qkv[:, :H], qkv[:, H : H + K], qkv[:, H + K :]
        else:
            q = make.normal(sum(q_lens), H, D)
            k, v = make.normal(sum(kv_lens), K, D), make.normal(sum(kv_lens), K, D)
        arguments: dict[str, Any] = {
            "q": q,
            "k": k,
            "v": v,
            "cu_q": offsets(q_lens),
            "cu_kv": offsets(q_lens if kv_lens is None else kv_lens),
            "scale": D**-0.5 if scale is None else scale,
            "causal": causal,
            "window": window,
        }
        if sinks:
            dtype = None if sinks is True else sinks
            arguments["sinks"] = make.normal(H, std=2.0, dtype=dtype)
        if prefix is not None:
            arguments["prefix"] = torch.tensor(prefix, dtype=torch.int32)
        return arguments

    return Case(name, build, **flags)


def _shaped(make: Inputs, shape: tuple[int, ...]) -> dict[str, Any]:
    T, H, K, D = shape
    return _case("", [T], (H, K), D).build(make)


_op = register(
    Op(
        name="flash_attention",
        function=flash_attention,
        reference=reference,
        faces={
            "native": _C.flash_attention,
            "cuda": _C.flash_attention,
            "triton": triton_kernel("flash_attention", "flash_attention"),
        },
        cost=cost,
        dims="T queries, Tkv keys, H query heads, K kv heads, D head dim, B sequences",
        shaped=_shaped,
        shape_help="TxHxKxD",
        cases=(
            _case("empty", [], (2, 1), 64),
            _case("empty_sequences", [0, 3, 0, 2], (2, 1), 8, kv_lens=[4, 0, 0, 5]),
            _case("empty_keys_sinks", [2, 1], (2, 2), 8, kv_lens=[0, 3], causal=True, sinks=True),
            _case("one", [1], (1, 1), 4),
            _case("odd_4", [5, 17], (3, 1), 4, causal=True),
            _case("odd_20", [33], (6, 2), 20),
            _case("odd_80", [19, 1, 40], (4, 2), 80, causal=True),
            _case("odd_96", [15], (2, 2), 96, kv_lens=[70]),
            _case("wide_128", [31], (6, 2), 128, causal=True),
            _case("wide_256", [29], (2, 1), 256, causal=True),
            _case("tail_255", [255], (2, 1), 64),
            _case("whole_256", [256], (2, 1), 64, causal=True),
            _case("tail_257", [257], (2, 1), 64, causal=True),
            _case("more_keys", [3, 9, 1], (14, 2), 64, kv_lens=[300, 9, 513], causal=True),
            _case("fewer_keys", [9, 4], (2, 1), 16, kv_lens=[5, 4], causal=True),
            _case("window", [300], (4, 2), 64, causal=True, window=128),
            _case("window_one", [40], (2, 2), 20, causal=True, window=1),
            _case("sinks", [150, 2], (8, 1), 64, causal=True, window=100, sinks=True),
            _case("sinks_fp32", [20], (4, 4), 16, sinks=torch.float32, scale=0.4),
            _case("prefix", [90, 50], (2, 1), 64, causal=True, prefix=[33, 0]),
            _case("prefix_window", [320], (2, 1), 32, causal=True, window=20, prefix=[270]),
            _case(
                "gpt_oss_20b_window",
                [300],
                (64, 8),
                64,
                causal=True,
                window=128,
                sinks=True,
                bench=True,
                slow=True,
            ),
            # One head of the ViT, small enough for an emulator.
            _case("internvit_300m_head", [1025], (1, 1), 64, dtypes=(torch.bfloat16,)),
            _case("qwen2_0.5b_group", [160], (7, 1), 64, causal=True, dtypes=(torch.bfloat16,)),
            _case("internvit_6b", [257], (25, 25), 128, bench=True, slow=True),
            _case("internvit_300m", [1025], (16, 16), 64, bench=True, slow=True),
            _case("qwen2_0.5b_prefill", [320], (14, 2), 64, causal=True, bench=True, slow=True),
            _case("qwen2_0.5b_long", [1088], (14, 2), 64, causal=True, bench=True, slow=True),
        ),
    )
)
