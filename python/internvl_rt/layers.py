"""The layers that models are made of: they hold weights and call ops."""

from __future__ import annotations

from collections.abc import Sequence
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
    ) -> None:
        self.ops = opset
        if opset.choice("linear") == "native":
            self.weight: Any = ops.hold([w.to(dtype) for w in weights])
        else:
            self.weight = torch.cat([w.to(dtype) for w in weights])
        self.bias = None if biases is None else torch.cat([b.to(dtype) for b in biases])

    def __call__(self, x: Tensor, **epilogue: Any) -> Tensor:
        return self.ops.linear(x, self.weight, bias=self.bias, **epilogue)  # [M, K] -> [M, N]


class RmsNorm:
    def __init__(self, opset: OpSet, weight: Tensor, eps: float, dtype: torch.dtype) -> None:
        self.ops, self.weight, self.eps = opset, weight.to(dtype), eps

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x [T, C], or [T, H, C] to normalise every head; out may be x."""
        return self.ops.rms_norm(x, self.weight, eps=self.eps, out=out)


class LayerNorm:
    def __init__(
        self, opset: OpSet, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
    ) -> None:
        self.ops, self.eps = opset, eps
        self.weight, self.bias = weight.to(dtype), bias.to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return self.ops.layer_norm(x, self.weight, self.bias, eps=self.eps)  # [T, C]
