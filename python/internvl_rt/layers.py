"""The layers that models are made of: they hold weights and call ops."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from internvl_rt import ops
from internvl_rt.ops import OpSet


class Linear:
    """y = x @ W^T + b. Several weights are stacked along their rows, as q, k and v are."""

    def __init__(
        self,
        opset: OpSet,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor] | None,
        dtype: torch.dtype,
        quant: str | None = None,
        gated: bool = False,
        pack: bool = False,
    ) -> None:
        """quant: "int8" or "int4" quantises the weights, None keeps them in dtype. gated: they are
        for gated_linear, and `weight` is all that is used of this layer beside `bias`. pack: also
        where they could be read in place."""
        self.ops = opset
        if quant is not None:
            packed = ops.pack(weights, quant=quant, gated=gated)
            native = opset.choice("linear") == "native"
            self.weight: Any = packed if native else ops.unpack(packed).to(dtype)
        elif opset.choice("linear") == "native":
            hold = ops.pack if pack else ops.hold
            self.weight = hold([w.to(dtype) for w in weights], gated=gated)
        else:
            self.weight = torch.cat([w.to(dtype) for w in weights])
        self.bias = None if biases is None else torch.cat([b.to(dtype) for b in biases])

    def __call__(self, x: Tensor, **epilogue: Any) -> Tensor:
        return self.ops.linear(x, self.weight, bias=self.bias, **epilogue)  # [M, K] -> [M, N]


class GroupedLinear:
    """y[m] = x[rows[m]] @ W[e]^T + b[e], where the range of offsets of expert e holds m."""

    def __init__(
        self,
        opset: OpSet,
        experts: Iterable[tuple[Sequence[Tensor], Sequence[Tensor] | None]],
        count: int,
        dtype: torch.dtype,
        quant: str | None = None,
        gated: bool = False,
    ) -> None:
        """experts: weights and biases of one after the other, as for Linear; quant, gated too."""
        self.ops = opset
        biases: list[Tensor] = []

        def weights() -> Iterator[list[Tensor]]:
            for parts, bias in experts:
                if bias is not None:
                    biases.append(torch.cat([b.to(dtype) for b in bias]))
                yield list(parts) if quant else [w.to(dtype) for w in parts]

        if opset.choice("grouped_linear") == "native":
            self.weight: Any = ops.pack_experts(weights(), count=count, quant=quant, gated=gated)
        elif quant is not None:
            each = (ops.pack(parts, quant=quant) for parts in weights())
            self.weight = torch.stack([ops.unpack(packed).to(dtype) for packed in each])
        else:
            self.weight = torch.stack([torch.cat(parts) for parts in weights()])
        self.bias = torch.stack(biases) if biases else None

    def __call__(
        self, x: Tensor, offsets: Tensor, rows: Tensor | None = None, phase: str | None = None
    ) -> Tensor:
        return self.ops.grouped_linear(
            x, self.weight, offsets, rows=rows, bias=self.bias, phase=phase
        )


class RmsNorm:
    def __init__(
        self,
        opset: OpSet,
        weight: Tensor,
        eps: float,
        dtype: torch.dtype,
        *,
        weight_in_fp32: bool = False,
    ) -> None:
        self.ops, self.weight, self.eps = opset, weight.to(dtype), eps
        self.weight_in_fp32 = weight_in_fp32

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x [T, C], or [T, H, C] to normalise every head; out may be x."""
        return self.ops.rms_norm(
            x, self.weight, eps=self.eps, weight_in_fp32=self.weight_in_fp32, out=out
        )


class LayerNorm:
    def __init__(
        self, opset: OpSet, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
    ) -> None:
        self.ops, self.eps = opset, eps
        self.weight, self.bias = weight.to(dtype), bias.to(dtype)

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x [T, C]; out may be x."""
        return self.ops.layer_norm(x, self.weight, self.bias, eps=self.eps, out=out)
