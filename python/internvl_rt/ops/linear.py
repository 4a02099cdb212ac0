"""Matrix product with packed weights and a fused epilogue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from internvl_rt import _C
from internvl_rt._C import WeightFormat
from internvl_rt.ops import quantise
from internvl_rt.ops.registry import Case, Cost, Inputs, Op, give, register

PANEL = quantise.PANEL
_TURN = PANEL // 2  # rows of a gated weight's gate that are followed by as many of up

_FORMATS = {torch.float32: WeightFormat.f32, torch.bfloat16: WeightFormat.bf16}
_ACTIVATIONS = {n: _C.Activation.__members__[n] for n in ("none", "gelu", "silu")}


@dataclass(frozen=True)
class PackedWeight:
    """A weight [n, k] in the layout that the kernels read: panels on the CPU (kernels/linear.h),
    plain rows on CUDA.

    data: one flat tensor, uint8 where it is quantised; n, k: the weight's shape; format: what its
    elements are; gated: whether it is held for `gated_linear`.
    """

    data: Tensor
    n: int
    k: int
    format: WeightFormat
    gated: bool = False

    def to(self, device: torch.device | str) -> PackedWeight:
        """The same weight in the layout of another device."""
        if self.data.device.type == torch.device(device).type:
            return self
        return pack(unpack(self).to(device).contiguous())

    @property
    def shape(self) -> tuple[int, int]:
        return self.n, self.k

    @property
    def quantised(self) -> bool:
        return self.format in quantise.FORMATS.values()


@dataclass(frozen=True)
class WeightRows:
    """A weight [n, k] that stays where it is, as in a mapped file.

    parts: the tensors whose rows, one after the other, are the weight's; pointers: int64, where
    each row lies, padded to whole panels and one more; gated: whether it is held for
    `gated_linear`.
    """

    parts: tuple[Tensor, ...]
    pointers: Tensor
    n: int
    k: int
    format: WeightFormat
    gated: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        return self.n, self.k

    @property
    def data(self) -> Tensor:
        return self.pointers


# What a product takes; a plain tensor is held anew in every call.
Weight = Tensor | PackedWeight | WeightRows


def hold(weight: Tensor | Sequence[Tensor], *, gated: bool = False) -> PackedWeight | WeightRows:
    """The weight in the form that the current instruction set reads best.

    Where its kernel reads rows as fast as packed panels nothing is copied, so that a mapped file
    costs neither time nor memory of its own; else the weight is packed. Arguments as of `pack`.
    """
    weights = _joinable(weight)
    first = weights[0]
    in_place = all(
        w.dtype == first.dtype and w.device.type == "cpu" and (w.stride(1) == 1 or w.shape[1] < 2)
        for w in weights
    )
    if not (in_place and first.dtype in _FORMATS and _C.reads_rows(_FORMATS[first.dtype])):
        return pack(weights, gated=gated)
    n, k = sum(w.shape[0] for w in weights), first.shape[1]
    rows = torch.cat(
        [torch.arange(len(w)) * (w.stride(0) * w.element_size()) + w.data_ptr() for w in weights]
    )
    gated = gated and n % PANEL == 0
    pointers = torch.zeros((-(-n // PANEL) + 1) * PANEL, dtype=torch.int64)
    if n:
        pointers[:n] = _in_turns(*rows.chunk(2)) if gated else rows
        pointers[n:] = rows[0]
    return WeightRows(tuple(weights), pointers, n, k, _FORMATS[first.dtype], gated)


def _in_turns(gate: Tensor, up: Tensor) -> Tensor:
    """_TURN rows of the gate and as many of up in turns: a panel holds both."""
    turns = [half.unflatten(0, (len(half) // _TURN, _TURN)) for half in (gate, up)]
    return torch.stack(turns, dim=1).flatten(0, 2)


def _joinable(weight: Tensor | Sequence[Tensor]) -> list[Tensor]:
    weights = [weight] if isinstance(weight, Tensor) else list(weight)
    if not weights:
        raise ValueError("pack: got no weight, expected at least one")
    for w in weights:
        if w.dim() != 2 or w.shape[1] != weights[0].shape[-1]:
            raise ValueError(f"pack: weight has shape {list(w.shape)}, expected [N, K] with one K")
    return weights


def pack(
    weight: Tensor | Sequence[Tensor],
    *,
    quant: str | None = None,
    gated: bool = False,
    out: Tensor | None = None,
) -> PackedWeight:
    """Packs a weight [N, K], or several with one K, whose outputs then stand side by side.

    weight: float32 or bfloat16, contiguous in K; memory-mapped rows are read once. On CUDA nothing
        is rearranged, and a single contiguous weight is not even copied.
    quant: "int8" or "int4" quantises it in groups of 64 along K (ops/quantise.py), on the CPU
        only; x may then be of either dtype. None keeps the weight's.
    gated: it is for `gated_linear`, which then is one kernel on the CPU. The result says whether
        it is: on CUDA, and where N is no multiple of 32, it stays as any other.
    out: flat memory of `packed_size(N, K, dtype or quant)` elements (N * K on CUDA), else it is
        allocated.
    Raises ValueError for shapes, dtypes or formats that do not fit, and for NaN or infinite weights
    that should be quantised.
    """
    weights = _joinable(weight)
    n, k = sum(w.shape[0] for w in weights), weights[0].shape[1]
    if quant is not None:
        weights = [_quantisable(w, quant) for w in weights]
        if len({w.dtype for w in weights}) > 1:
            weights = [w.float() for w in weights]
    first = weights[0]
    size = packed_size(n, k, quant or first.dtype)
    gated = gated and n % PANEL == 0 and not first.is_cuda
    if first.is_cuda:
        plain = torch.cat(weights) if len(weights) > 1 else first
        data = give("pack", plain.reshape(n * k), out)
        return PackedWeight(data, n, k, _FORMATS[first.dtype])
    if out is None:
        out = torch.empty(size, dtype=torch.uint8 if quant else first.dtype)
    form = quantise.FORMATS[quant] if quant else _FORMATS[first.dtype]
    _C.pack(weights, form, gated, out)
    return PackedWeight(out, n, k, form, gated)


def _quantisable(weight: Tensor, quant: str) -> Tensor:
    """The weight as it can be quantised: float32 or bfloat16, contiguous in K."""
    quantise.check_quant(quant)
    if weight.is_cuda or not weight.is_floating_point():
        raise ValueError(
            f"pack: weight is {weight.dtype} on {weight.device}, expected floats on the CPU for "
            f"{quant}"
        )
    weight = weight if weight.dtype in _FORMATS else weight.float()
    return weight if weight.stride(1) == 1 else weight.contiguous()


def packed_size(n: int, k: int, kind: torch.dtype | str) -> int:
    """Elements of a packed weight [n, k] of a dtype, or bytes of a quantised one.

    n is padded to 32, and k to 32 in bfloat16, to 64 where it is quantised.
    """
    if isinstance(kind, str):
        return _C.packed_size(n, k, quantise.FORMATS[quantise.check_quant(kind)])
    if kind not in _FORMATS:
        raise ValueError(f"pack: weight is {kind}, expected torch.float32 or torch.bfloat16")
    return _C.packed_size(n, k, _FORMATS[kind])


def readable(weight: PackedWeight | WeightRows) -> PackedWeight | WeightRows:
    """The weight, packed if the current instruction set reads no rows in place."""
    if isinstance(weight, WeightRows) and not _C.reads_rows(weight.format):
        return pack(weight.parts, gated=weight.gated)
    return weight


def unpack(weight: PackedWeight | WeightRows) -> Tensor:
    """The weight [n, k] again; a quantised one as code * scale in float32."""
    if isinstance(weight, WeightRows):
        return torch.cat(weight.parts)
    if weight.data.is_cuda:
        return weight.data.view(weight.n, weight.k)
    rows = _unpacked_rows(weight)
    if weight.gated:
        rows = rows.unflatten(0, (len(rows) // PANEL, 2, _TURN)).transpose(0, 1).flatten(0, 2)
    return rows


def _unpacked_rows(weight: PackedWeight) -> Tensor:
    if weight.quantised:
        parts = quantise.unpack_quantised(weight.data, weight.n, weight.k, weight.format)
        return quantise.dequantise(*parts)[:, : weight.k]
    columns = -(-weight.n // PANEL) * PANEL
    depth = weight.data.numel() // columns if columns else weight.k
    pair = 2 if weight.format == WeightFormat.bf16 else 1
    w = weight.data.view(columns // PANEL, depth // pair, PANEL, pair)
    return w.transpose(1, 2).reshape(columns, depth)[: weight.n, : weight.k]


def linear(
    x: Tensor,
    weight: Weight,
    *,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    phase: str | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """residual + scale * activation(x @ weight.T + bias), computed in float32 and rounded once.

    x: [M, K], float32 or bfloat16, contiguous in K. A row's result does not depend on the others;
        on CUDA that holds within a phase.
    weight: [N, K] of x's dtype, from `hold` or `pack`; a plain tensor is held anew in every call,
        which costs more than the product itself where M is small. Quantised by `pack`, its codes
        times scales take part; with bfloat16 x, sums of 64 codes times x are exact but for what x
        has below 2^-13 of the largest of those 64 (kernels/cpu/linear_digits.h).
    bias, scale: [N], dtype of x; scale is the layer scale of a residual branch.
    activation: "none", "gelu" (exact), "silu". For SwiGLU there is `gated_linear`.
    residual: [M, N], dtype of the result.
    out_dtype: x's dtype (default), or float32 for bfloat16 inputs (logits).
    phase: on CUDA, "decode" is the kernel for few rows and "prefill" the one for many, for any M;
        None: decode where M <= 16. On the CPU both are the same.
    out: [M, N], rows may be strided; may be residual, must not overlap x.
    Returns [M, N]. Raises ValueError for shapes, dtypes or options that do not fit.
    """
    run = _op.face(backend)
    if activation not in _ACTIVATIONS:
        raise ValueError(f"linear: activation is {activation!r}, allowed: none, gelu, silu")
    if phase not in (None, "decode", "prefill"):
        raise ValueError(f"linear: phase is {phase!r}, allowed: decode, prefill")
    if out_dtype not in (None, x.dtype, torch.float32):
        raise ValueError(f"linear: out_dtype is {out_dtype}, allowed: {x.dtype}, torch.float32")
    if run is None:
        result = reference(
            x,
            weight,
            bias=bias,
            activation=activation,
            residual=residual,
            scale=scale,
            out_dtype=out_dtype,
        )
        return give("linear", result, out)
    if isinstance(weight, Tensor):
        weight = hold(weight)
    elif weight.gated:
        raise ValueError("linear: weight is held for gated_linear, expected one without gated=True")
    weight = readable(weight)
    if out is None:
        out = torch.empty(
            (x.shape[0] if x.dim() == 2 else 0, weight.n),
            dtype=out_dtype or x.dtype,
            device=x.device,
        )
    elif out_dtype is not None and out.dtype != out_dtype:
        raise ValueError(f"linear: out is {out.dtype}, expected out_dtype {out_dtype}")
    run(
        x,
        weight.data,
        weight.n,
        weight.k,
        weight.format,
        bias,
        _ACTIVATIONS[activation],
        residual,
        scale,
        None if phase is None else phase == "decode",
        out,
    )
    return out


def reference(
    x: Tensor,
    weight: Weight,
    *,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    w = weight if isinstance(weight, Tensor) else unpack(weight)
    w = w.to(x.dtype)
    if out_dtype is not None and x.dtype != torch.float64 and out_dtype != x.dtype:
        x, w = x.to(out_dtype), w.to(out_dtype)
        bias, scale = (None if v is None else v.to(out_dtype) for v in (bias, scale))
    y = F.linear(x, w, bias)
    if activation == "gelu":
        y = F.gelu(y)
    elif activation == "silu":
        y = F.silu(y)
    elif activation != "none":
        raise ValueError(f"linear: activation {activation!r} is not implemented")
    if scale is not None:
        y = y * scale
    return y if residual is None else residual + y


def cost(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    **_: Any,
) -> Cost:
    (M, K), N = x.shape, weight.shape[0]
    size = x.element_size()
    out_size = (out_dtype or x.dtype).itemsize
    read = N * K * size
    if isinstance(weight, PackedWeight) and weight.quantised:
        read = weight.data.numel()
    moved = M * K * size + read + M * N * out_size * (1 if residual is None else 2)
    return Cost(moved, 2 * M * N * K)


def _case(name: str, M: int, N: int, K: int, **options: Any) -> Case:
    flags = {k: options.pop(k) for k in ("bench", "slow", "dtypes") if k in options}
    quant = options.get("quant")
    flags["cpu_only"] = quant is not None

    def build(make: Inputs) -> dict[str, Any]:
        std = K**-0.5 if K else 1.0
        weight = make.normal(N, K, std=std)
        arguments: dict[str, Any] = {
            "x": make.normal(M, K),
            "weight": pack(weight, quant=quant) if options.get("packed") or quant else weight,
        }
        for option in ("activation", "out_dtype"):
            if option in options:
                arguments[option] = options[option]
        if options.get("bias"):
            arguments["bias"] = make.normal(N)
        if options.get("scale"):
            arguments["scale"] = make.normal(N, std=0.5)
        if options.get("residual"):
            arguments["residual"] = make.normal(M, N, dtype=options.get("out_dtype"))
        return arguments

    return Case(name, build, **flags)


def _strided(make: Inputs) -> dict[str, Any]:
    x, residual = make.normal(9, 200), make.normal(9, 130)
    return {"x": x[:, 50:127], "weight": make.normal(45, 77), "residual": residual[:, 3:48]}


def _real(name: str, M: int, N: int, K: int, **options: Any) -> Case:
    return _case(name, M, N, K, packed=True, bench=True, slow=M * N * K > 1 << 24, **options)


_BF16 = (torch.bfloat16,)


def _shaped(make: Inputs, shape: tuple[int, ...]) -> dict[str, Any]:
    return _case("", *shape, packed=True).build(make)


_op = register(
    Op(
        name="linear",
        function=linear,
        reference=reference,
        faces={"native": _C.linear, "cuda": _C.linear},
        cost=cost,
        dims="M rows, N outputs, K inputs",
        shaped=_shaped,
        shape_help="MxNxK",
        cases=(
            _case("empty", 0, 64, 32),
            _case("empty_columns", 3, 0, 32),
            _case("empty_depth", 3, 5, 0, bias=True),
            _case("one", 1, 1, 1),
            _case("odd", 5, 31, 33),
            _case("odd_pairs", 2, 33, 31, bias=True),
            _case("tail_stream", 1, 4 * 32 * 17 + 5, 70, bias=True),
            _case("tail_3", 3, 200, 127, bias=True, activation="silu"),
            _case("tail_13", 13, 97, 129, bias=True, activation="gelu", packed=True),
            _case("tail_50", 50, 65, 450, bias=True, scale=True, residual=True, packed=True),
            _case("tail_250", 250, 300, 800, scale=True, residual=True, packed=True, slow=True),
            _case("all", 37, 64, 64, bias=True, activation="gelu", scale=True, residual=True),
            Case("strided", _strided),
            # What Hopper's matrix products take: a case for each.
            _case("aligned_bias", 37, 136, 72, bias=True),
            _case("aligned_bias_wide", 20, 3080, 24, bias=True),
            _case("aligned_gelu", 37, 136, 72, bias=True, activation="gelu"),
            _case("aligned_residual", 130, 136, 72, bias=True, scale=True, residual=True),
            _case("aligned_residual_wide", 20, 3080, 24, residual=True),
            _case("logits", 4, 100, 64, out_dtype=torch.float32, residual=True),
            _case("empty_int8", 0, 64, 32, quant="int8"),
            _case("empty_columns_int4", 3, 0, 32, quant="int4"),
            _case("empty_depth_int8", 3, 5, 0, bias=True, quant="int8"),
            _case("odd_int8", 5, 31, 33, bias=True, quant="int8"),
            _case("odd_int4", 2, 33, 65, quant="int4"),
            _case("tail_stream_int8", 1, 4 * 32 * 5 + 5, 323, bias=True, quant="int8"),
            _case("tail_3_int4", 3, 4 * 32 + 9, 450, activation="silu", quant="int4"),
            _case("tail_13_int8", 13, 97, 129, bias=True, activation="gelu", quant="int8"),
            _case("tail_50_int4", 50, 65, 450, scale=True, residual=True, quant="int4"),
            _case("logits_int8", 4, 100, 64, out_dtype=torch.float32, quant="int8"),
            _real(
                "internvit_300m_fc1", 1025, 4096, 1024, bias=True, activation="gelu", dtypes=_BF16
            ),
            _real("internvit_300m_fc2", 1025, 1024, 4096, bias=True, scale=True, residual=True),
            _real("qwen2_0.5b_qkv", 320, 1152, 896, bias=True),
            _real("qwen2_0.5b_down", 320, 896, 4864, residual=True),
            _real("qwen2_0.5b_up_decode", 1, 9728, 896),
            _real("qwen2_0.5b_up_decode_8", 8, 9728, 896),
            *(
                _real(f"qwen2_0.5b_up_decode_{quant}", 1, 9728, 896, quant=quant)
                for quant in quantise.FORMATS
            ),
            # An eighth of the vocabulary: more than a cache holds, less than a test should build.
            _real("qwen2_0.5b_logits", 1, 18960, 896, out_dtype=torch.float32, dtypes=_BF16),
        ),
    )
)
