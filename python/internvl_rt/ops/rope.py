"""Rotary position embedding (Su et al., 2021) with the append to the paged KV cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from internvl_rt import _C
from internvl_rt.ops.registry import Case, Cost, Inputs, Op, give, register


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
    *,
    out: Any = None,
    backend: str | None = None,
) -> Tensor:
    """Rotates q and k by their positions and stores the rotated k, and v, in cache pages.

    Dimensions j and j + R/2 of a head (j < R/2) turn as a pair by the angle
    a = positions[t] * inv_freq[sequence[t], j]:
        (x, y) -> scale[sequence[t]] * (x cos a - y sin a, y cos a + x sin a)
    Dimensions from R on are copied. Angles are float32 products, everything after them is computed
    in float32 and rounded once.

    q: [T, H, D], k and v: [T, K, D], float32 or bfloat16, contiguous in D; T, H and K may be
        strided, so they may be slices of one packed qkv row. D at most 1024.
    positions: [T] float32 (fractions are allowed).
    inv_freq: [B, R/2] float32, R <= D; scale: [B] float32 (1, or the attention factor of yarn, su);
        one row per sequence, because the table may depend on a sequence's length.
    sequence: [T] int32, the row of inv_freq and scale that a token uses.
    k_cache, v_cache: [pages, K, P, D] in the dtype of q, updated in place.
    slots: [T] int64, page * P + offset; negative: the token's k and v are not stored. Slots of a
        call must differ.
    Returns the rotated q [T, H, D]. out may be q.
    Raises ValueError for shapes, dtypes, slots or sequences that do not fit; nothing is written
    then.
    """
    run = _op.face(backend)
    if run is None:
        # A reference is pure and a cache may be large: it sees the pages that are written to.
        P, stored = k_cache.shape[2], slots >= 0
        pages, place = torch.unique(slots[stored] // P, return_inverse=True)
        local = slots.masked_scatter(stored, place * P + slots[stored] % P)
        caches = (k_cache[pages], v_cache[pages])
        y, keys, values = reference(q, k, v, positions, inv_freq, scale, sequence, *caches, local)
        result = give("rope", y, out)
        k_cache[pages], v_cache[pages] = keys, values
        return result
    if out is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    run(q, k, v, positions, inv_freq, scale, sequence, k_cache, v_cache, slots, out)
    return out


def reference(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """As the models' own code: cos and sin are rounded to the dtype before the multiplication."""
    index = sequence.long()
    angle = (positions[:, None] * inv_freq[index])[:, None]  # [T, 1, R/2]
    factor = scale[index][:, None, None]
    cos, sin = (angle.cos() * factor).to(q.dtype), (angle.sin() * factor).to(q.dtype)
    half = inv_freq.shape[1]

    def rotate(x: Tensor) -> Tensor:
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)

    stored = slots >= 0
    page, offset = slots[stored] // k_cache.shape[2], slots[stored] % k_cache.shape[2]
    k_cache, v_cache = k_cache.clone(), v_cache.clone()
    k_cache[page, :, offset] = rotate(k)[stored]
    v_cache[page, :, offset] = v[stored]
    return rotate(q), k_cache, v_cache


def cost(q: Tensor, k: Tensor, inv_freq: Tensor, **_: Any) -> Cost:
    moved = 2 * (q.numel() + 2 * k.numel()) * q.element_size()
    return Cost(moved, 6 * inv_freq.shape[1] * q.shape[0] * (q.shape[1] + k.shape[1]))


def _case(
    name: str,
    T: int,
    H: int,
    K: int,
    D: int,
    *,
    R: int | None = None,
    P: int = 64,
    sequences: int = 1,
    start: float = 0.0,
    skip: bool = False,
    theta: float = 1e6,
    **flags: bool,
) -> Case:
    R = D if R is None else R

    def build(make: Inputs) -> dict[str, Any]:
        # q, k and v as slices of one packed row, as the projection leaves them.
        qkv = make.normal(T, (H + 2 * K) * D).unflatten(1, (H + 2 * K, D))
        pages = T // P + 2
        slots = make.permutation(pages * P)[:T]
        if skip:
            slots[::3] = -1
        inv_freq = theta ** -(torch.arange(0, R, 2) / max(R, 1))
        shrink = make.uniform(sequences, 1, low=0.5) if sequences > 1 else torch.ones(1, 1)
        return {
            "q": qkv[:, :H],
            "k": qkv[:, H : H + K],
            "v": qkv[:, H + K :],
            "positions": start + torch.arange(T, dtype=torch.float32) * (0.25 if skip else 1.0),
            "inv_freq": inv_freq * shrink,
            "scale": 1 / shrink[:, 0],
            "sequence": make.integers(0, sequences, T, dtype=torch.int32),
            "k_cache": make.normal(pages, K, P, D),
            "v_cache": make.normal(pages, K, P, D),
            "slots": slots,
        }

    return Case(name, build, **flags)


def _shaped(make: Inputs, shape: tuple[int, ...]) -> dict[str, Any]:
    return _case("", *shape).build(make)


_op = register(
    Op(
        name="rope",
        function=rope,
        reference=reference,
        faces={"native": _C.rope},
        cost=cost,
        dims="T tokens, H query heads, K kv heads, D head dim, R rotated dims, B sequences, "
        "P page size",
        mutates=("k_cache", "v_cache"),
        shaped=_shaped,
        shape_help="TxHxKxD",
        cases=(
            _case("empty", 0, 4, 2, 64),
            _case("empty_rotation", 3, 2, 1, 8, R=0),
            _case("one", 1, 1, 1, 4),
            _case("odd_20", 5, 3, 1, 20, P=1),
            _case("odd_sequences", 7, 6, 2, 80, sequences=3, skip=True, P=4),
            _case("partial", 6, 4, 2, 96, R=36, P=2),
            _case("far", 9, 2, 2, 128, start=1e6 - 20),
            _case("wide", 3, 1, 1, 256, start=30000.0, theta=1e4),
            _case("qwen2_0.5b_decode", 1, 14, 2, 64, start=2047.0, bench=True),
            _case("qwen2_0.5b_prefill", 320, 14, 2, 64, bench=True, slow=True),
        ),
    )
)
