"""Mixture of experts: every expert's rows times its own weight, in one call."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from internvl_rt import _C
from internvl_rt._C import WeightFormat
from internvl_rt.ops import quantise
from internvl_rt.ops.linear import PackedWeight, pack, packed_size, unpack
from internvl_rt.ops.registry import Case, Cost, Inputs, Op, give, register


@dataclass(frozen=True)
class PackedExperts:
    """The weights [n, k] of `count` experts, each in the layout of PackedWeight, in one tensor.

    data: flat, the experts one behind the other, uint8 where they are quantised; gated: whether
    they are held for `grouped_gated_linear`. experts[e] is one of them, not copied.
    """

    data: Tensor
    count: int
    n: int
    k: int
    format: WeightFormat
    gated: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.count, self.n, self.k

    def to(self, device: torch.device | str) -> PackedExperts:
        """The same weights in the layout of another device."""
        if self.data.device.type == torch.device(device).type:
            return self
        plain = (unpack(self[e]).to(device) for e in range(self.count))
        return pack_experts(plain, count=self.count)

    def __getitem__(self, e: int) -> PackedWeight:
        if not 0 <= e < self.count:
            raise IndexError(f"expert is {e}, allowed: 0 to {self.count - 1}")
        data = self.data.view(self.count, -1)[e]
        return PackedWeight(data, self.n, self.k, self.format, self.gated)


def pack_experts(
    weights: Tensor | Iterable[Tensor | Sequence[Tensor]],
    *,
    count: int | None = None,
    quant: str | None = None,
    gated: bool = False,
) -> PackedExperts:
    """Packs the weights of a layer's experts.

    weights: [E, N, K], or one entry per expert as in `pack`: a weight [N, K], or several with one
        K whose outputs then stand side by side, as gated_activation wants gate and up (GPT-OSS
        stores them as alternating rows: w[0::2] and w[1::2]). All float32 or all bfloat16 on one
        device, contiguous in K, of one shape. They are read one expert at a time, so a generator
        may convert or read them as they are needed. On CUDA nothing is rearranged, and a contiguous
        [E, N, K] is not even copied.
    count: the number of experts, needed where weights has no length.
    quant: "int8" or "int4" quantises them, as in `pack`.
    gated: they are for `grouped_gated_linear`, as in `pack`.
    Raises ValueError for shapes, dtypes or a number of weights that do not fit.
    """
    if count is None:
        if not isinstance(weights, (Tensor, Sequence)):
            raise ValueError("pack_experts: weights has no length, expected count")
        count = len(weights)
    in_place = isinstance(weights, Tensor) and weights.is_cuda and weights.dim() == 3
    if in_place and quant is None and count > 0:
        if count != len(weights):
            raise ValueError(f"pack_experts: got {len(weights)} weights, expected {count}")
        _, n, k = weights.shape
        return PackedExperts(weights.reshape(-1), count, n, k, pack(weights[0]).format)
    packed: PackedExperts | None = None
    first: tuple[int, int, torch.dtype]
    size = seen = 0
    for seen, weight in enumerate(weights, start=1):
        if seen > count:
            raise ValueError(f"pack_experts: got more weights than count={count}")
        parts = [weight] if isinstance(weight, Tensor) else list(weight)
        if not parts:
            raise ValueError(f"pack_experts: expert {seen - 1} has no weight")
        n, k, dtype = sum(p.shape[0] for p in parts), parts[0].shape[-1], parts[0].dtype
        if packed is None:
            first, device = (n, k, dtype), parts[0].device
            size = n * k if device.type == "cuda" else packed_size(n, k, quant or dtype)
            stored = torch.uint8 if quant else dtype
            data = torch.empty(count * size, dtype=stored, device=device)
            one = pack(parts, quant=quant, gated=gated, out=data[:size])
            packed = PackedExperts(data, count, n, k, one.format, one.gated)
            continue
        if (n, k, dtype) != first:
            raise ValueError(
                f"pack_experts: expert {seen - 1} is {dtype} {[n, k]}, expected {first[2]} "
                f"{[*first[:2]]} as of expert 0"
            )
        pack(parts, quant=quant, gated=gated, out=packed.data[(seen - 1) * size : seen * size])
    if packed is None or seen != count:
        raise ValueError(f"pack_experts: got {seen} weights, expected {count or 'at least one'}")
    return packed


def grouped_linear(
    x: Tensor,
    weight: Tensor | PackedExperts,
    offsets: Tensor,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    phase: str | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """out[m] = x[rows[m]] @ weight[e].T + bias[e] for offsets[e] <= m < offsets[e + 1], computed in
    float32 and rounded once.

    x: [R, K], float32 or bfloat16, contiguous in K.
    weight: [E, N, K] of x's dtype, or quantised, from `pack_experts`; a plain tensor is packed in
        every call. An expert without rows is not read.
    offsets: [E + 1] int32 from 0 to M, rows: [M] int32 in [0, R): moe_route's offsets and tokens.
        Without rows, row m is x[m] (M = R): x is sorted by expert already.
    bias: [E, N], dtype of x.
    phase: as of `linear`.
    Every row has the bits that `linear` gives it with its expert's weight and bias; on CUDA that
    holds within a phase, for linear's own kernels.
    Returns [M, N]; out may be strided in M, must not overlap x. Raises ValueError for shapes,
    dtypes, offsets or rows that do not fit. On CUDA nobody waits for offsets and rows: a row index
    out of range makes its row NaN, and offsets that do not fit leave rows as they were.
    """
    run = _op.face(backend)
    if phase not in (None, "decode", "prefill"):
        raise ValueError(f"grouped_linear: phase is {phase!r}, allowed: decode, prefill")
    if run is None:
        result = reference(x, weight, offsets, rows=rows, bias=bias)
        return give("grouped_linear", result, out)
    if isinstance(weight, Tensor):
        weight = pack_experts(weight)
    elif weight.gated:
        raise ValueError(
            "grouped_linear: weight is held for grouped_gated_linear, expected one without gated"
        )
    if out is None:
        M = x.shape[0] if rows is None else rows.numel()
        out = torch.empty((M, weight.n), dtype=x.dtype, device=x.device)
    decode = None if phase is None else phase == "decode"
    held = (weight.data, *weight.shape, weight.format)
    run(x, *held, offsets, rows, bias, None, decode, out)
    return out


def reference(
    x: Tensor,
    weight: Tensor | PackedExperts,
    offsets: Tensor,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    if rows is not None:
        x = x[rows.long()]
    out = torch.zeros((x.shape[0], weight.shape[1]), dtype=x.dtype, device=x.device)
    bounds = offsets.tolist()
    for e, (begin, end) in enumerate(itertools.pairwise(bounds)):
        if begin == end:
            continue
        w = weight[e]
        w = unpack(w) if isinstance(w, PackedWeight) else w
        b = None if bias is None else bias[e]
        out[begin:end] = F.linear(x[begin:end], w.to(x.dtype), b)
    return out


def cost(
    x: Tensor,
    weight: Tensor | PackedExperts,
    offsets: Tensor,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    **_: Any,
) -> Cost:
    _, N, K = weight.shape
    M = x.shape[0] if rows is None else rows.numel()
    used = int((offsets.diff() > 0).sum())
    each = N * K * x.element_size()
    if isinstance(weight, PackedExperts) and weight.format in quantise.FORMATS.values():
        each = weight.data.numel() // weight.count
    rest = M * (K + N) + (0 if bias is None else used * N)
    return Cost(used * each + rest * x.element_size(), 2 * M * N * K)


def _routed(T: int, E: int, k: int) -> list[int]:
    """Rows of E experts that T tokens choose k of, unevenly as a router does."""
    shares = torch.arange(1, E + 1, dtype=torch.float32)
    counts = (shares / shares.sum() * T * k).floor().int().clamp(max=T).tolist()
    for e in range(T * k - sum(counts)):
        counts[e % E] += 1
    return counts


# Rows of each expert, and of how many tokens they are gathered; None: x is sorted.
Rows = tuple[Sequence[int], int | None]
ROWS: dict[str, Rows] = {
    "no rows": ([0, 0], None),
    "no tokens": ([0, 0, 0], 0),
    "few": ([3, 0, 2, 1], None),
    "gathered": ([1, 4, 0, 13], 5),
    "many": ([40, 1, 0, 17, 2, 70], 65),
    "many experts": ([e % 3 for e in range(140)], 7),
}


def _case(
    name: str,
    rows: str | Rows,
    N: int,
    K: int,
    *,
    bias: bool = False,
    packed: bool = False,
    quant: str | None = None,
    gated: bool = False,
    **flags: Any,
) -> Case:
    counts, tokens = ROWS[rows] if isinstance(rows, str) else rows

    def build(make: Inputs) -> dict[str, Any]:
        E, M = len(counts), sum(counts)
        weight = make.normal(E, N, K, std=K**-0.5 if K else 1.0)
        held = packed or quant
        arguments: dict[str, Any] = {
            "x": make.normal(M if tokens is None else tokens, K),
            "weight": pack_experts(weight, quant=quant, gated=gated) if held else weight,
            "offsets": torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32),
        }
        if tokens is not None:
            arguments["rows"] = make.integers(0, max(tokens, 1), M, dtype=torch.int32)
        if bias:
            arguments["bias"] = make.normal(E, N)
        return arguments

    return Case(name, build, cpu_only=quant is not None, **flags)


def _strided(make: Inputs) -> dict[str, Any]:
    return {
        "x": make.normal(9, 200)[:, 50:127],
        "weight": make.normal(4, 45, 77, std=0.1),
        "offsets": torch.tensor([0, 3, 3, 12, 14], dtype=torch.int32),
        "rows": make.integers(0, 9, 14, dtype=torch.int32),
        "bias": make.normal(4, 60)[:, 5:50],
    }


def _shaped(make: Inputs, shape: tuple[int, ...]) -> dict[str, Any]:
    T, E, k, N, K = shape
    return _case("", (_routed(T, E, k), T), N, K, packed=True).build(make)


_op = register(
    Op(
        name="grouped_linear",
        function=grouped_linear,
        reference=reference,
        faces={"native": _C.grouped_linear, "cuda": _C.grouped_linear},
        cost=cost,
        dims="R rows of x, M rows, E experts, N outputs, K inputs; T tokens, k experts of a token "
        "(bench)",
        shaped=_shaped,
        shape_help="TxExkxNxK",
        cases=(
            _case("empty", "no rows", 64, 32),
            _case("empty_rows", "no tokens", 8, 32),
            _case("empty_columns", "few", 0, 32),
            _case("empty_depth", "gathered", 5, 0, bias=True),
            _case("one", ([1], None), 1, 1),
            _case("odd", "few", 31, 33, bias=True),
            _case("odd_rows", "gathered", 33, 31, bias=True),
            _case("tail_many", "many", 97, 129, bias=True),
            _case("tail_experts", "many experts", 9, 16),
            Case("strided", _strided),
            _case("odd_int8", "few", 31, 33, bias=True, quant="int8"),
            _case("odd_rows_int4", "gathered", 33, 97, bias=True, quant="int4"),
            _case("tail_many_int8", "many", 97, 129, quant="int8"),
            _case("tail_many_int4", "many", 97, 129, quant="int4"),
            # An eighth of the outputs: wide enough for every path, small enough to build often.
            _case("gpt_oss_20b_up", ([2, 0, 1, 1], 2), 720, 2880, bias=True, slow=True),
            _case(
                "qwen3_30b_a3b_up_decode",
                ([1] * 8 + [0] * 8, 1),
                1536,
                2048,
                packed=True,
                bench=True,
                slow=True,
            ),
            _case(
                "qwen3_30b_a3b_down_prefill",
                (_routed(64, 16, 8), None),
                2048,
                768,
                packed=True,
                bench=True,
                slow=True,
            ),
        ),
    )
)
